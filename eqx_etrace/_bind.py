"""What a global rule learns of the step that it is for."""

from typing import Any

import numpy as np

from ._graph import ETraceGraph
from ._jaxpr import SCAN, Equation
from ._pattern import identity, through
from ._reads import ALL, Reads
from ._rules import Structure
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
