"""Products of rows in groups, each with a weight of its own: `jax.lax.ragged_dot`.

JAX cannot map the derivative of such a product over the elements of its result. Read as
one product over all groups, in which a row is zero outside of its own group, it is a
dense product like any other: the trace has an entry per row and weight.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._flatten import Builder, Conversion
from ._jaxpr import Equation, Ref, is_ragged_dot


def ragged(equation: Equation) -> tuple[Conversion, str] | None:
    """The conversion of such a product, None for anything else."""
    if not is_ragged_dot(equation):
        return None
    params = equation.params
    numbers = params["ragged_dot_dimension_numbers"]
    (contract, batch) = numbers.dot_dimension_numbers
    (rows,) = numbers.lhs_ragged_dimensions
    if rows in (*contract[0], *batch[0]) or params["group_offset"] is not None:
        return None

    def multiply(x: Any, w: Any, sizes: Any) -> list[Any]:
        ends = jnp.cumsum(sizes, dtype=sizes.dtype)
        row = jnp.arange(x.shape[rows], dtype=sizes.dtype)[:, None]
        own = (row >= (ends - sizes)[None]) & (row < ends[None])
        others = [axis for axis in range(x.ndim) if axis != rows]
        own = jnp.broadcast_to(jnp.expand_dims(own, others), (*x.shape, sizes.size))
        apart = jnp.where(own, x[..., None], jnp.zeros((), x.dtype))
        groups = (*contract[0], x.ndim), (*contract[1], *numbers.rhs_group_dimensions)
        options = {k: params[k] for k in ("precision", "preferred_element_type")}
        return [jax.lax.dot_general(apart, w, (groups, batch), **options)]

    def product(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        x, w, sizes = inputs
        return b.trace(multiply, x, w, sizes)

    return (
        product,
        "rows in groups: one product over all groups, zero outside their own",
    )
