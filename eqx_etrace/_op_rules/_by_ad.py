"""The default: the Jacobian of one equation by automatic differentiation.

It defines what every closed form must equal. Its trace has an entry for every pair of
an element of y and an element of the weight, which the report shows as its cost.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from ._base import OpRule
from ._use import OpUse


@dataclasses.dataclass(frozen=True)
class ByAD(OpRule):
    """Trace axes: the axes of y, then the axes of the weight."""

    use: OpUse

    name: ClassVar[str] = "by AD"

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return v.reshape(v.shape + (1,) * len(self.weight_shape))

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        def y(w: Any) -> Any:
            return self.use.y_of(w, operands)

        # Reverse mode: a custom_vjp has no other.
        jacobian = jax.jacrev(y)(jnp.asarray(operands[self.use.operand]))
        return self.expand(df) * jacobian.astype(df.dtype)


def by_ad(use: OpUse) -> ByAD:
    """The default rule, for any operand of any differentiable equation."""
    y_shape, w_shape = use.y.shape, use.weight.shape
    return ByAD(y_shape + w_shape, w_shape, tuple(range(len(y_shape))), use)
