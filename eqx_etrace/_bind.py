"""What a global rule learns of the step that it is for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from ._graph import ETraceGraph
from ._jaxpr import SCAN, Equation, Program, aval_of
from ._locality import flow
from ._op_rules import OpRule, OpRules, op_rule
from ._pattern import identity, through
from ._reads import ALL, Reads
from ._relation import Use, find_uses
from ._rules import Structure, Uses, WeightUse
from ._space import spaces


def structure(graph: ETraceGraph, reads: Reads) -> Structure:
    """What the compiler knows of the step, in the order of the vectors of a rule."""
    from scipy.sparse import csr_matrix, hstack, vstack

    avals, hidden = graph.program.avals, graph.hidden
    weights = [graph.weights[k] for k in spaces(graph).reaching]

    def read(equation: Equation, k: int) -> list[Any]:
        if equation.primitive is SCAN:  # Its reads leave out products with weights.
            return [ALL for _ in equation.outputs]
        return reads(equation, k)

    def rows(sources: list[int]) -> Any:
        start = identity({ref: avals[ref].size for ref in sources})
        width = next(iter(start.values())).shape[1]
        found = through(graph.body, avals, read, start)
        for ref in hidden.doors:
            if ref not in found:
                found[ref] = csr_matrix((avals[ref].size, width), dtype=bool)
        return csr_matrix(vstack([found[ref] for ref in hidden.doors]))

    of_weights, start, blocks = rows(weights), 0, []
    for ref in weights:
        block = of_weights[:, start : start + avals[ref].size]
        start += avals[ref].size
        pair = np.issubdtype(avals[ref].dtype, np.complexfloating)
        blocks += [block] * (2 if pair else 1)
    return Structure(rows(list(hidden.old)), csr_matrix(hstack(blocks)), _units(graph))


def _units(graph: ETraceGraph) -> Any:
    """Which hidden numbers belong to one unit."""
    from scipy.sparse import csr_matrix

    sizes = [graph.program.avals[ref].size for ref in graph.hidden.old]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    unit, offset = np.full(starts[-1], -1), 0
    for group in graph.groups:
        for slot, leaf in enumerate(group.slot_leaf):
            index = group.index[slot]
            size = sizes[leaf]
            places = np.arange(size) if index is None else np.asarray(index)
            unit[starts[leaf] + places] = offset + np.arange(group.units)
        offset += group.units
    alone = unit < 0
    unit[alone] = offset + np.arange(alone.sum())
    where = (np.arange(unit.size), unit)
    member = csr_matrix((np.ones(unit.size, bool), where))
    return csr_matrix(member @ member.T)


def weight_uses(graph: ETraceGraph, op_rules: OpRules) -> Uses:
    """Where the weights that reach the hidden state meet the data of the step."""
    program, of = graph.program, spaces(graph)
    numbers = {graph.weights[k]: number for number, k in enumerate(of.reaching)}
    doors, found = set(graph.hidden.doors), []
    for use in find_uses(program):
        if use.ref in numbers and doors & flow(program, [use.y])[0]:
            edge = use.equation.index, use.operand
            op = op_rule(program, use.equation, use.operand, use.output, op_rules)
            derivative = _derivative(program, use, op)
            drive, y = _drive(program, use.y), _spec(program, use.y)
            found.append(WeightUse(numbers[use.ref], edge, drive, y, derivative, op))
    return Uses(of.states.size, of.weights, tuple(found))


def _spec(program: Program, ref: Any) -> jax.ShapeDtypeStruct:
    aval = aval_of(program.avals, ref)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _derivative(program: Program, use: Use, op: OpRule) -> Any:
    """Shape and dtype of dy/dw, None where it is no array of its own."""
    weight, y = _spec(program, use.ref), _spec(program, use.y)
    alike = {jnp.issubdtype(spec.dtype, jnp.complexfloating) for spec in (weight, y)}
    if len(alike) > 1:  # Of a real number by a complex one it is a pair.
        return None
    specs = [_spec(program, ref) for ref in use.equation.inputs]
    return jax.eval_shape(lambda *args: op.derivative(args), *specs)


def _drive(program: Program, ref: int) -> int:
    """The sum that a value is all part of, if nothing else reads it; else itself."""
    while True:
        readers = [e for e in program.equations if ref in e.values]
        if len(readers) != 1 or ref in program.outputs:
            return ref
        (equation,) = readers
        total = equation.outputs[0]
        same = program.avals[ref] == program.avals[total]
        once = equation.values.count(ref) == 1
        if equation.primitive is not prims.add_p or not (same and once):
            return ref
        ref = total
