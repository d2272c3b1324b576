"""Which relations have a vector in common: the same dy/dw, or the same df.

Weights that act on one x, and weights whose products are summed before anything else
happens to them, differ in one factor of the trace only. A rule that keeps the factors
apart keeps the common one once.
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np

from ._graph import ETraceGraph
from ._jaxpr import literal
from ._pieces import Run
from ._relation import Relation


def share_names(graph: ETraceGraph) -> tuple[tuple[Hashable, Hashable], ...]:
    """Per relation a name of its dy/dw and one of its df, see `Weights.names`."""
    return tuple(
        (_derivative_key(graph, relation), _drive_key(graph, relation))
        for relation in graph.relations
    )


def shared_runs(graph: ETraceGraph) -> tuple[tuple[Run, ...], ...]:
    """Per relation which elements of its df earlier relations have."""
    return tuple(
        _runs_of(graph, number, relation)
        for number, relation in enumerate(graph.relations)
    )


def _runs_of(graph: ETraceGraph, number: int, relation: Relation) -> tuple[Run, ...]:
    uses = graph.groups[relation.group].uses
    runs = graph.facts[relation.group].runs[uses.index(relation.y)]
    found = []
    for start, stop, use, at in runs:
        like = (
            n
            for n, other in enumerate(graph.relations[:number])
            if other.y == uses[use] and _filter_key(other) == _filter_key(relation)
        )
        found.append((start, stop, next(like, None), at))
    one_axis = len(relation.y_shape) == 1 and relation.first is None
    if not one_axis or any(which is None for _, _, which, _ in found):
        return ()
    return tuple(found)


def _filter_key(relation: Relation) -> Hashable:
    """What else a filter of df is made by."""
    return (
        relation.group,
        relation.slots,
        relation.reached,
        relation.trace_dtypes,
        relation.y_dtype,
        relation.first is None,
        len(relation.y_shape),
    )


def _drive_key(graph: ETraceGraph, relation: Relation) -> Hashable:
    group = graph.groups[relation.group]
    drive = graph.facts[relation.group].drives[group.uses.index(relation.y)]
    index = relation.map.index
    return (
        _filter_key(relation),
        drive,
        relation.y_shape,
        relation.map.repeats,
        None if index is None else np.asarray(index).tobytes(),
    )


def _derivative_key(graph: ETraceGraph, relation: Relation) -> Hashable:
    """How dy/dw is made, and of what; None where that has constants of its own. Where
    x is copied from a smaller value, that value."""
    avals = graph.program.avals
    dtype = relation.trace_dtypes[0]
    if relation.presynaptic is not None:
        return relation.presynaptic.ref, str(dtype), relation.y_dtype
    given = [(k, ref) for k, ref in relation.equation.operands if relation.reads[k]]
    specs = {k: jax.ShapeDtypeStruct(avals[r].shape, avals[r].dtype) for k, r in given}

    def derivative(values: dict[int, jax.Array]) -> jax.Array:
        operands = [
            values.get(k, jnp.zeros(avals[ref].shape, avals[ref].dtype))
            if isinstance(ref, int)
            else literal(ref)
            for k, ref in enumerate(relation.equation.inputs)
        ]
        return relation.derivative(tuple(operands))

    closed = jax.make_jaxpr(derivative)(specs)
    if closed.consts:
        return None
    return str(closed), tuple(ref for _, ref in given), str(dtype), relation.y_dtype
