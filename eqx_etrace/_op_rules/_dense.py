"""`dot_general` with a weight on either side, any dimension numbers, batch dims too."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._jaxpr import DOT_GENERAL
from ._base import OpRule, place
from ._products import cast, product
from ._use import OpUse


@dataclasses.dataclass(frozen=True)
class Dense(OpRule):
    """Trace axes: the free axes of x, then the axes of the weight as it is stored.

    dy[g, b, f] / dw[b, c, f] = x[g, b, c], with batch (b), contracted (c) and free axes
    of the weight (f) and of x (g): the influence is a product of two vectors.
    """

    y_axes: tuple[int, ...]
    """Per axis of y, its axis in the trace."""
    x_axes: tuple[int, ...]
    """Per axis of x, its axis in the trace."""
    x_operand: int

    name: ClassVar[str] = "dense"

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return place(v, self.y_axes, len(self.trace_shape))

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        x = cast(self.derivative(operands), df.dtype)
        return product(self.expand(df), x)

    def derivative(self, operands: tuple[Any, ...]) -> Shaped[Array, "..."]:
        x = jnp.asarray(operands[self.x_operand])
        return place(x, self.x_axes, len(self.trace_shape))


def dense(use: OpUse) -> Dense | None:
    """The dense rule, None if the equation is no product."""
    if use.primitive is not DOT_GENERAL:
        return None
    k = use.operand
    w_shape, x_shape = use.weight.shape, use.inputs[1 - k].shape
    contract, batch = use.params["dimension_numbers"]
    paired = dict(zip(contract[1 - k], contract[k], strict=True))
    paired |= dict(zip(batch[1 - k], batch[k], strict=True))
    x_free = [axis for axis in range(len(x_shape)) if axis not in paired]
    free = [a for a in range(len(w_shape)) if a not in paired.values()]
    lead = len(x_free)
    x_axes = tuple(
        x_free.index(axis) if axis in x_free else lead + paired[axis]
        for axis in range(len(x_shape))
    )
    of_w = [lead + axis for axis in free]
    of_x = list(range(lead))
    y_axes = [lead + axis for axis in batch[k]]
    y_axes += of_w + of_x if k == 0 else of_x + of_w
    return Dense(
        trace_shape=(*(x_shape[axis] for axis in x_free), *w_shape),
        weight_shape=w_shape,
        summed=tuple(of_x),
        y_axes=tuple(y_axes),
        x_axes=x_axes,
        x_operand=1 - k,
    )
