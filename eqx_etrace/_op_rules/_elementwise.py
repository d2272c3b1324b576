"""Any elementwise equation with a weight among its operands, broadcasting included."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._jaxpr import CUSTOM
from ._base import OpRule
from ._products import cast, product, sum_of_first
from ._use import OpUse


@dataclasses.dataclass(frozen=True)
class Elementwise(OpRule):
    """Trace axes: the axes of y, one entry per element of y.

    dy_i/dw_i is one reverse pass with ones, the operands broadcast to the shape of y.
    """

    use: OpUse

    name: ClassVar[str] = "elementwise"

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return v

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        if self.use.primitive not in CUSTOM:
            # All of them: clamp and select want their scalars to go together.
            operands = tuple(jnp.broadcast_to(a, self.trace_shape) for a in operands)

        def y(w: Any) -> Any:
            return self.use.y_of(w, operands)

        value, pull = jax.vjp(y, jnp.asarray(operands[self.use.operand]))
        if jnp.iscomplexobj(value):
            return cast(pull(df.astype(value.dtype))[0], df.dtype)
        return product(df, cast(pull(jnp.ones_like(value))[0], df.dtype))

    def accumulate(
        self,
        dfs: Shaped[Array, "steps ..."],
        operands: tuple[Any, ...],
        stacked: Sequence[bool],
    ) -> Shaped[Array, "..."]:
        axes = 0, tuple(0 if moves else None for moves in stacked)
        return sum_of_first(jax.vmap(self.influence, axes)(dfs, operands))


def elementwise(use: OpUse) -> Elementwise | None:
    """The elementwise rule, None if the equation mixes elements."""
    if not use.elementwise:
        return None
    y_shape, w_shape = use.y.shape, use.weight.shape
    if use.primitive in CUSTOM and w_shape != y_shape:
        return None  # its body is traced for these shapes: the weight cannot broadcast
    padded = (1,) * (len(y_shape) - len(w_shape)) + w_shape
    summed = tuple(
        axis for axis, size in enumerate(y_shape) if padded[axis] == 1 != size
    )
    return Elementwise(y_shape, w_shape, summed, use)
