"""The pipeline's errors: input files, stores and clusters (see `inn.errors` for their form)."""

from __future__ import annotations

from inn.errors import FlareFieldError, MisuseError, ModelError

__all__ = ["ClusterError", "FlareFieldError", "InputError", "MisuseError", "ModelError", "StoreError"]


class InputError(FlareFieldError):
    """An observation file that cannot be used."""


class StoreError(FlareFieldError):
    """A store (observation, map or grid) that is damaged or not what it should be."""


class ClusterError(FlareFieldError):
    """A cluster that cannot be reached, is not safe to use, or was lost."""
