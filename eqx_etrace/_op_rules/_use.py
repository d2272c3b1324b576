"""What a builder of op rules is told about the use of a weight."""

import dataclasses
import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive

from .._jaxpr import Equation, Program, aval_of, bind, is_elementwise


@dataclasses.dataclass(frozen=True, eq=False)
class OpUse:
    """One use of a weight: an operation y = op(..., w, ...) in the step of a model.

    A builder of op rules (`op_rules` of `eqx_etrace.compile`) receives it. It knows
    shapes and dtypes, no values, and is compared by identity, so that an op rule may
    keep it as a field.

    **Arguments:**

    - `primitive`: the JAX primitive of the operation.
    - `params`: what the primitive was bound with, besides the operands.
    - `inputs`, `outputs`: shape and dtype of every operand and every result, a
      `jax.ShapeDtypeStruct` each.
    - `operand`: which of the inputs the weight w is.
    - `output`: which of the outputs y is.
    - `elementwise`: whether an element of y reads the element of each operand at the
      same place, after broadcasting, and nothing else.
    - `apply`: takes the operands as one sequence, gives the results as a list.

    !!! example

        ```python
        def builder(use: eqx_etrace.OpUse) -> eqx_etrace.OpRule | None:
            return MyRule(use) if use.operand == 0 else None
        ```
    """

    primitive: Primitive
    params: Mapping[str, Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    operand: int
    output: int
    elementwise: bool
    apply: Callable[[Sequence[Any]], list[Any]]

    @property
    def weight(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the weight."""
        return self.inputs[self.operand]

    @property
    def y(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the result that feeds the hidden state."""
        return self.outputs[self.output]

    def y_of(self, w: Any, operands: Sequence[Any]) -> Any:
        """The value of y for the weight `w` and the other operands as they are."""
        args = list(operands)
        args[self.operand] = w
        return self.apply(args)[self.output]


def describe_use(
    program: Program,
    equation: Equation,
    operand: int,
    output: int,
    elementwise: bool = False,
) -> OpUse:
    """The use of operand `operand` for output `output` of an equation.

    `elementwise` says that it is so where the primitive alone does not tell.
    """

    def spec(ref: Any) -> jax.ShapeDtypeStruct:
        aval = aval_of(program.avals, ref)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    return OpUse(
        primitive=equation.primitive,
        params=equation.params,
        inputs=tuple(spec(ref) for ref in equation.inputs),
        outputs=tuple(spec(ref) for ref in equation.outputs),
        operand=operand,
        output=output,
        elementwise=elementwise or is_elementwise(equation, program.avals),
        apply=ft.partial(bind, equation),
    )
