"""Whether two graphs run the same step, whatever the arrays in them hold.

Graphs and programs are compared by identity, which is what jit needs. Here a graph is
written out as nested tuples without identities: equations by primitive, operands and
parameters, arrays that say which element belongs to which unit by their values.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.tree_util as jtu
import numpy as np

from ._errors import describe, sentence
from ._group import HiddenGroup
from ._jaxpr import Equation, Program, Ref, aval_of, literal
from ._relation import Relation


if TYPE_CHECKING:
    from ._graph import ETraceGraph


def same_structure(graph: "ETraceGraph", other: Any) -> bool:
    """The answer of `graph.same_structure(other)`."""
    if not isinstance(other, type(graph)):
        got, remedy = describe(other), "Pass what `eqx_etrace.compile` returned."
        raise TypeError(sentence("other", got, "an ETraceGraph", remedy))
    return _graph(graph) == _graph(other)


def _graph(graph: "ETraceGraph") -> tuple[Any, ...]:
    tables = (
        graph.param_leaves,
        graph.state_leaves,
        graph.x_leaves,
        graph.out_leaves,
        graph.hidden,
    )
    rule = jtu.tree_map(_spec, graph.rule)
    return (
        graph.vjp,
        graph.batch,
        tables,
        jtu.tree_structure(rule),
        tuple(jtu.tree_leaves(rule)),
        _program(graph.program),
        tuple(map(_group, graph.groups)),
        tuple(map(_relation, graph.relations)),
    )


def _spec(leaf: Any) -> Any:
    if not hasattr(leaf, "shape"):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _program(program: Program) -> tuple[Any, ...]:
    return (
        program.avals,
        program.origins,
        program.constants,
        program.inputs,
        program.outputs,
        tuple(_equation(program, equation) for equation in program.equations),
    )


def _equation(program: Program, equation: Equation) -> tuple[Any, ...]:
    operands = tuple(_operand(program, ref) for ref in equation.inputs)
    params = _text(equation.params)
    return str(equation.primitive), operands, equation.outputs, params


def _operand(program: Program, ref: Ref) -> Any:
    if isinstance(ref, int):
        return ref
    return str(aval_of(program.avals, ref)), repr(literal(ref))


def _text(value: Any) -> Any:
    """A parameter of an equation without the addresses of functions."""
    if isinstance(value, Mapping):
        return tuple((name, _text(value[name])) for name in sorted(value))
    if isinstance(value, tuple | list):
        return tuple(map(_text, value))
    return re.sub(r"0x[0-9a-f]+", "", repr(value))


def _array(value: Any) -> Any:
    return None if value is None else (value.shape, np.asarray(value).tobytes())


def _group(group: HiddenGroup) -> tuple[Any, ...]:
    return (
        (group.units, group.slots, group.leaves, group.shapes, group.dtypes),
        (group.transition_matrix, group.within_matrix, group.order, group.slot_leaf),
        (group.old, group.doors, group.uses, group.reads, group.cut, group.masked),
        tuple(equation.index for equation in group.equations),
        tuple(map(_array, group.index)),
        tuple(map(_array, group.masks)),
    )


def _relation(relation: Relation) -> tuple[Any, ...]:
    op = type(relation.op), relation.trace_shape, relation.weight_shape
    return (
        (relation.weight, relation.group, relation.slots, relation.reached),
        (relation.edge, relation.y, op, relation.trace_dtypes),
        (relation.map.repeats, relation.y_shape, _array(relation.map.index)),
    )
