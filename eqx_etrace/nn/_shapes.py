"""What the pieces check of their arguments, with sentences for what does not fit."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


Units = int | Sequence[int]
"""How many units a layer has, or the shape that they are laid out in."""


def shape_of(units: Units) -> tuple[int, ...]:
    """**Raises:** `ValueError` for anything but positive integers."""
    shape = (units,) if isinstance(units, int | np.integer) else tuple(units)
    for size in shape:
        check_count("units", size)
    return tuple(int(size) for size in shape)


def check_count(name: str, got: Any, least: int = 1) -> None:
    integer = isinstance(got, int | np.integer) and not isinstance(got, bool)
    if not integer or got < least:
        raise ValueError(
            f"{name}: got {got!r}, expected an integer of at least {least}. Give the "
            "size of the layer without the batch."
        )


def check_positive(name: str, got: Any) -> None:
    if not np.isfinite(got) or got <= 0:
        raise ValueError(
            f"{name}: got {got}, expected a number above 0. Times are in ms."
        )


def check_input(owner: object, x: Any, shape: tuple[int, ...]) -> None:
    if jnp.shape(x) != shape:
        raise ValueError(
            f"{type(owner).__name__}: got an input of shape {jnp.shape(x)}, expected "
            f"{shape}. Give the layer the sizes of its input; map a batch with "
            "`jax.vmap`."
        )


def check_state(owner: Any, state: Any) -> None:
    """That `state` has the structure and the shapes of `owner.init_state()`."""
    like = jax.eval_shape(owner.init_state)
    name = type(owner).__name__
    remedy = "Make it with `init_state()`; map a batch with `jax.vmap`."
    if jax.tree.structure(state) != jax.tree.structure(like):
        raise ValueError(
            f"{name}: got a state of structure {jax.tree.structure(state)}, expected "
            f"{jax.tree.structure(like)}. {remedy}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(like), strict=True):
        if jnp.shape(leaf) != spec.shape:
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}: got state{where} of shape {jnp.shape(leaf)}, expected "
                f"{spec.shape}. {remedy}"
            )
