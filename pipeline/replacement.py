"""A store that is made beside its name, ``<store>.<run>.new`` with its journal, and put there when whole.

What is needed only while it is made may lie beside it, in its `scratch`.

Who does this holds the store's lock, and ends the journal with a record that says ``finished``. A command
that is killed at any moment leaves something that the next one goes on with (`replacements`), or completes
(`finish_swaps`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import zarr

from pipeline.errors import StoreError
from pipeline.journal import Journal
from pipeline.storage import Place, log_at

SCRATCH = ".scratch"


def replacement(output: Place, run: str) -> Place:
    """Where a run makes what is to take a store's place.

    Parameters
    ----------
    output : Place
        The store.
    run : str
        Identity of the run, 32 hexadecimal digits.
    """
    return output.beside(f".{run}.new")


def replacements(output: Place) -> list[Place]:
    """List what runs have made, or begun to make, to take a store's place."""
    return [replacement(output, run) for run in output.runs(".new")]


def scratch(store: Place) -> Place:
    """Where a replacement keeps what is needed only while it is made: gone when it has taken its place."""
    return store.beside(SCRATCH)


def opened_group(
    store: Place, mode: Literal["r", "r+"] = "r+", what: str = "store that is being made"
) -> zarr.Group:
    """Open a store that is being made, as a worker does.

    Parameters
    ----------
    store : Place
        The store.
    mode : {"r", "r+"}
        As for `zarr.open_group`.
    what : str
        What an error calls it.

    Raises
    ------
    StoreError
        It is not there, or cannot be read.
    """
    try:
        return zarr.open_group(store.zarr, mode=mode, use_consolidated=False)
    except (FileNotFoundError, ValueError, KeyError) as failure:
        raise StoreError(
            f"the {what} has gone, or cannot be read",
            where=store,
            found=failure,
            remedy="put it where all workers see it under the same name, leave it alone, and start the "
            "command again",
        ) from failure


def discard(store: Place) -> None:
    """Remove a replacement, its scratch and its journal."""
    store.remove()
    scratch(store).remove()
    log_at(store.journal).remove()


def as_swapped(output: Place) -> tuple[Place, Path | str, list[Place]]:
    """Say what `finish_swaps` would leave, and leave everything as it is.

    Parameters
    ----------
    output : Place
        The store.

    Returns
    -------
    store : Place
        Where what is to be found at its place lies now: there, or in a replacement.
    journal : Path or str
        Where its journal lies now.
    unfinished : list of Place
        Replacements that are not whole.
    """
    store, journal = output, output.journal
    finished = [one for run in output.runs(".new.journal") if _is_finished(one := replacement(output, run))]
    for one in finished:
        store = one if one.exists() and not one.half_appeared() else output
        journal = one.journal
    known = {one.name for one in finished}
    return store, journal, [one for one in replacements(output) if one.name not in known]


def finish_swaps(output: Place) -> bool:
    """Complete what a run that was killed between its last record and its end left undone.

    Parameters
    ----------
    output : Place
        The store.

    Returns
    -------
    bool
        Whether another store has come to its place.
    """
    swapped = False
    for run in output.runs(".new.journal"):
        store = replacement(output, run)
        if _is_finished(store):
            swap(output, store)
            swapped = True
        elif not store.exists():
            log_at(store.journal).remove()
    for ending in (".old", ".new.layout", f".new{SCRATCH}.layout"):
        for run in output.runs(ending):
            output.beside(f".{run}{ending}").remove()
    for run in output.runs(f".new{SCRATCH}"):
        if not (store := replacement(output, run)).exists():
            scratch(store).remove()
    return swapped


def _is_finished(store: Place) -> bool:
    try:
        return Journal.open(store.journal).finished
    except StoreError:
        return False


def swap(output: Place, store: Place) -> None:
    """Put a finished replacement and its journal in the store's place."""
    run = store.name.removeprefix(f"{output.name}.").removesuffix(".new")
    output.replace_with(store, output.beside(f".{run}.old"))
    scratch(store).remove()
