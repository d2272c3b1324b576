"""Products of arrays that broadcast, one of which may be complex, and their sums."""

import string
from typing import Any

import jax
import jax.numpy as jnp


def cast(array: Any, dtype: Any) -> Any:
    """An array in the precision of a dtype; it stays real, or complex, as it is."""
    array, real = jnp.asarray(array), jnp.finfo(dtype).dtype
    if not jnp.iscomplexobj(array):
        return array.astype(real)
    return array.astype(jnp.complex128 if real == jnp.float64 else jnp.complex64)


def product(one: Any, other: Any) -> Any:
    """A product of arrays of one precision, of which one may be complex."""
    one, other = _alike(one, other)
    return one * other


def _alike(one: Any, other: Any) -> tuple[Any, Any]:
    if jnp.iscomplexobj(one) == jnp.iscomplexobj(other):
        return one, other
    one, other = (
        a if jnp.iscomplexobj(a) else jax.lax.complex(a, jnp.zeros_like(a))
        for a in (one, other)
    )
    return one, other


def sum_of_first(array: Any) -> Any:
    """`jnp.sum(array, 0)`, spelt as a product with ones.

    XLA's CPU backend fuses what makes an array into its sum, and then goes through it
    column by column, an order of magnitude slower.
    """
    ones = jnp.ones(array.shape[0], array.dtype)
    return jnp.einsum("a,a...->...", ones, array, precision=jax.lax.Precision.HIGHEST)


def sum_of_product(a: Any, b: Any, axes: tuple[int, ...]) -> Any:
    """`jnp.sum(a * b, axes)` for arrays of one rank, without an array of that size.

    Where each of them varies along an axis that is kept and the other is blind to, the
    sum is a product of matrices, which is many times as fast as the sum of the
    products; otherwise it is spelt as such, and fused.
    """
    a, b = _alike(a, b)
    kept = [axis for axis in range(a.ndim) if axis not in axes]
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    only_a = any(a.shape[axis] != 1 == b.shape[axis] for axis in kept)
    only_b = any(b.shape[axis] != 1 == a.shape[axis] for axis in kept)
    if not (only_a and only_b):
        whole = jnp.broadcast_to(a * b, shape)
        return sum_of_first(whole) if axes == (0,) else jnp.sum(whole, axes)
    of_a, of_b = (
        [axis for axis in range(array.ndim) if array.shape[axis] != 1]
        for array in (a, b)
    )
    letters = string.ascii_letters
    spelt = [
        "".join(letters[axis] for axis in own)
        for own in (of_a, of_b, [axis for axis in kept if shape[axis] != 1])
    ]
    found = jnp.einsum(f"{spelt[0]},{spelt[1]}->{spelt[2]}", a.squeeze(), b.squeeze())
    # An axis of size one in both is summed once.
    return found.reshape([shape[axis] for axis in kept])
