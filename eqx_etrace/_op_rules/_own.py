"""The op rules that a user passes to `compile` for own primitives."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.extend.core import Primitive

from .._errors import CompileError
from .._jaxpr import Program, aval_of, describe_equation
from ._base import OpRule
from ._use import OpUse


ELEMENTWISE = "elementwise"
OpRuleBuilder = Callable[[OpUse], OpRule | None]
OpRules = Mapping[Primitive, OpRuleBuilder | Literal["elementwise"]]


def check_op_rules(op_rules: Any) -> None:
    """Raise `TypeError` unless it maps primitives to builders."""
    if not isinstance(op_rules, Mapping):
        raise TypeError(
            f"op_rules: got an object of type `{type(op_rules).__name__}`, expected a "
            "mapping such as `{my_primitive: builder}`."
        )
    for primitive, builder in op_rules.items():
        if not isinstance(primitive, Primitive):
            raise TypeError(
                f"op_rules: got the key {primitive!r}, expected a JAX primitive. Pass "
                "the `jax.extend.core.Primitive` itself, not its name or a function "
                "that binds it."
            )
        if not (builder == ELEMENTWISE or _is_builder(builder)):
            raise TypeError(
                f"op_rules[{primitive}]: got {builder!r}, expected 'elementwise' or a "
                "function from an `OpUse` to an `OpRule` or None."
            )


def _is_builder(builder: Any) -> bool:
    # A class derived from OpRule wants three shapes, not a use.
    return callable(builder) and not (
        inspect.isclass(builder) and issubclass(builder, OpRule)
    )


def own_elementwise(program: Program, op_rules: OpRules) -> frozenset[Primitive]:
    """The primitives that the user calls elementwise, if the step agrees."""
    named = frozenset(p for p, rule in op_rules.items() if rule == ELEMENTWISE)
    for equation in program.equations:
        if equation.primitive not in named:
            continue
        ins = [aval_of(program.avals, ref).shape for ref in equation.inputs]
        outs = {program.avals[ref].shape for ref in equation.outputs}
        if len(outs) != 1 or not _broadcast(ins, *outs):
            raise CompileError(
                f"op_rules[{equation.primitive}] says 'elementwise': got operands of "
                f"the shapes {ins} and results of {sorted(outs)} from "
                f"{describe_equation(equation)}, expected one shape that all operands "
                "broadcast to. Leave it out of `op_rules`, or give a builder."
            )
    return named


def _broadcast(shapes: list[tuple[int, ...]], to: tuple[int, ...]) -> bool:
    full = [shape for shape in shapes if shape]
    if any(len(shape) != len(to) for shape in full):
        return False
    return all(
        size in (1, wanted)
        for shape in full
        for size, wanted in zip(shape, to, strict=True)
    )


def build_own(builder: OpRuleBuilder, use: OpUse, where: str) -> OpRule | None:
    """What a user's builder makes of a use, after a look at its shapes."""
    rule = builder(use)
    if rule is None:
        return None
    name = f"op_rules[{use.primitive}]"
    if not isinstance(rule, OpRule):
        raise TypeError(
            f"{name}: got {rule!r} from the builder, expected an `OpRule` or None."
        )
    _agree(f"{name}.weight_shape", where, rule.weight_shape, use.weight.shape)
    df = jax.ShapeDtypeStruct(use.y.shape, use.y.dtype)
    found = jax.eval_shape(rule.influence, df, use.inputs)
    _agree(f"{name}.influence", where, found.shape, rule.trace_shape)
    spread = jax.eval_shape(rule.expand, df).shape
    if len(spread) != len(rule.trace_shape) or not _broadcast(
        [spread], rule.trace_shape
    ):
        _agree(f"{name}.expand", where, spread, rule.trace_shape)
    left = [n for a, n in enumerate(rule.trace_shape) if a not in rule.summed]
    if np.prod(left, dtype=int) != np.prod(rule.weight_shape, dtype=int):
        _agree(f"{name}.summed", where, tuple(left), rule.weight_shape)
    return rule


def _agree(what: str, where: str, got: Any, expected: Any) -> None:
    if tuple(got) != tuple(expected):
        raise CompileError(
            f"{what}: got the shape {tuple(got)} for {where}, expected "
            f"{tuple(expected)}. Check the layout of the op rule."
        )
