"""Any elementwise equation with a weight among its operands, broadcasting included."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._jaxpr import CUSTOM, Equation, Program, bind, is_elementwise
from ._base import OpRule, cast, product


@dataclasses.dataclass(frozen=True)
class Elementwise(OpRule):
    """Trace axes: the axes of y, one entry per element of y.

    dy_i/dw_i is one reverse pass with ones, the operands broadcast to the shape of y.
    """

    equation: Equation
    operand: int
    output: int

    name: ClassVar[str] = "elementwise"

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return v

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        if self.equation.primitive not in CUSTOM:
            # All of them: clamp and select want their scalars to go together.
            operands = tuple(jnp.broadcast_to(a, self.trace_shape) for a in operands)

        def y(w: Any) -> Any:
            args = list(operands)
            args[self.operand] = w
            return bind(self.equation, args)[self.output]

        value, pull = jax.vjp(y, jnp.asarray(operands[self.operand]))
        if jnp.iscomplexobj(value):
            return cast(pull(df.astype(value.dtype))[0], df.dtype)
        return product(df, cast(pull(jnp.ones_like(value))[0], df.dtype))


def elementwise(
    program: Program, equation: Equation, k: int, output: int
) -> Elementwise | None:
    """The elementwise rule for operand `k`, None if the equation mixes elements."""
    if not is_elementwise(equation, program.avals):
        return None
    y_shape = program.avals[equation.outputs[output]].shape
    w_shape = program.avals[equation.inputs[k]].shape
    if equation.primitive in CUSTOM and w_shape != y_shape:
        return None  # its body is traced for these shapes: the weight cannot broadcast
    padded = (1,) * (len(y_shape) - len(w_shape)) + w_shape
    summed = tuple(
        axis for axis, size in enumerate(y_shape) if padded[axis] == 1 != size
    )
    return Elementwise(y_shape, w_shape, summed, equation, k, output)
