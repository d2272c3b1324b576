"""Errors as sentences: what was got, what was expected, where, and the remedy."""

from typing import Any

import jax
import numpy as np


class CompileError(ValueError):
    """The step cannot be compiled; the message says where and what to do.

    Raised by `eqx_etrace.compile` only: a step that compiled does not raise it.

    !!! example

        ```python
        def forgetful(model, x, state):
            return model(x, state)[0], jnp.zeros_like(state)

        try:
            eqx_etrace.compile(net, state, x, call=forgetful)
        except eqx_etrace.CompileError as error:
            print(error)  # No trainable weight reaches the state: ...
        ```
    """


def sentence(where: str, got: str, expected: str, remedy: str) -> str:
    """The one shape that every message about a wrong argument has."""
    return f"{where}: got {got}, expected {expected}. {remedy}"


def describe(leaf: Any) -> str:
    """`float32[3, 4]` for an array-like, the type's name for anything else."""
    if leaf is None:
        return "None"
    if not is_array_like(leaf):
        return f"an object of type `{type(leaf).__name__}`"
    shape = ", ".join(str(size) for size in np.shape(leaf))
    return f"{dtype_of(leaf)}[{shape}]"


def is_array_like(leaf: Any) -> bool:
    """Arrays, `jax.ShapeDtypeStruct`s and Python numbers can be staged."""
    if isinstance(leaf, bool | int | float | complex | np.generic):
        return True
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def dtype_of(leaf: Any) -> Any:
    """The dtype JAX will give the leaf (x64 off narrows NumPy's doubles)."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf.dtype
    return jax.dtypes.canonicalize_dtype(jax.dtypes.result_type(leaf))


def size(count: int | float) -> str:
    """A number of bytes as a person reads it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:g} B"
