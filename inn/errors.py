"""Errors a person can act on: what is wrong, where, what was found and expected, and the remedy."""

from __future__ import annotations

from typing import Any


class FlareFieldError(Exception):
    """A failure with everything its reader needs to mend it.

    Parameters
    ----------
    problem : str
        One sentence: what is wrong.
    where : object, optional
        The file, store or argument it is about.
    found, expected : object, optional
        What was there and what should have been.
    remedy : str, optional
        What to do about it.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.where = None if where is None else str(where)
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy

    def __str__(self) -> str:
        head = self.problem if self.where is None else f"{self.where}: {self.problem}"
        rows = (("found", self.found), ("expected", self.expected), ("remedy", self.remedy))
        return "\n".join([head, *(f"  {name}: {value}" for name, value in rows if value is not None)])

    def __reduce__(self) -> tuple[Any, ...]:
        # Dask carries exceptions by pickle, which would lose keyword-only arguments.
        details = {key: getattr(self, key) for key in ("where", "found", "expected", "remedy")}
        return _rebuild, (type(self), self.problem, details)


def _rebuild(kind: type[FlareFieldError], problem: str, details: dict[str, Any]) -> FlareFieldError:
    return kind(problem, **details)


class MisuseError(FlareFieldError):
    """The request itself is wrong: contradictory settings, an output that is something else."""

    exit_code = 2


class ModelError(FlareFieldError):
    """A model directory or checkpoint that is not what it should be."""
