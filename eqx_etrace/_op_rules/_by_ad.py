"""The default: the Jacobian of one equation by automatic differentiation.

It defines what every closed form must equal. Its trace has an entry for every pair of
an element of y and an element of the weight, which the report shows as its cost.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._errors import CompileError
from ._base import OpRule
from ._products import cast, product
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
        w = jnp.asarray(operands[self.use.operand])
        if not jnp.issubdtype(self.use.y.dtype, jnp.complexfloating):
            return product(self.expand(df), cast(jax.jacrev(y)(w), df.dtype))
        value, pull = jax.vjp(y, w)
        rows = jnp.eye(value.size, dtype=value.dtype).reshape(-1, *value.shape)
        (found,) = jax.vmap(pull)(rows * df[None].astype(value.dtype))
        return cast(found.reshape(self.trace_shape), df.dtype)


def by_ad(use: OpUse) -> ByAD:
    """The default rule, for any operand of any differentiable equation.

    **Raises:** `CompileError` for one that JAX cannot differentiate row by row.
    """
    y_shape, w_shape = use.y.shape, use.weight.shape
    rule = ByAD(y_shape + w_shape, w_shape, tuple(range(len(y_shape))), use)
    try:
        jax.eval_shape(
            lambda *args: rule.influence(args[0], args[1:]), use.y, *use.inputs
        )
    except NotImplementedError as error:
        raise CompileError(
            f"A weight meets the data in `{use.primitive}`, which has no op rule, and "
            f"JAX cannot map its derivative over the elements of the result: {error}. "
            "Pass an op rule of your own, `op_rules={primitive: builder}`."
        ) from error
    return rule
