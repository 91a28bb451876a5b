"""Loops over pixels that NumPy would need many passes for, compiled when they are first called (by Numba).

Nothing here is fast mathematics: operations keep their order, so that the bits are those that NumPy gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile a function for the types that it is called with, and keep the result for other processes.

    Parameters
    ----------
    function : callable
        Of arrays and numbers; as Numba takes it, without the interpreter.
    """
    try:
        loops = njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:
        # Where neither the package's nor the user's folder can be written to, each process compiles it.
        loops = njit(function, nogil=True, error_model="numpy")
    return cast(Function, loops)
