"""Which values a window saves of its steps, so that its derivatives can run later.

Of what they read much is moved or computed cheaply from other values, and is done again
for all steps at once. The values to save are then a cut of the step's graph: they lie
on every way from what is not at hand afterwards to what is read. The smallest one is
that of a maximum flow.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import primitives as prims

from ._graph import ETraceGraph
from ._jaxpr import Equation, is_elementwise, is_structural, literal


class Plan(NamedTuple):
    """How the values that are read come about."""

    save: tuple[int, ...]
    """Those that the scan over the steps saves."""
    equations: tuple[Equation, ...]
    """What is run again."""
    read: tuple[int, ...]
    after: tuple[tuple[int, int], ...] = ()
    """Pairs of a new hidden leaf and an old one that is saved: the new one is that of
    the step after, and so one step more is saved."""


# What costs more to compute than to save.
_COSTLY = frozenset(
    getattr(prims, f"{name}_p")
    for name in (
        "tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "erf", "erfc",
        "erf_inv", "sin", "cos", "tan", "pow", "lgamma", "digamma", "cbrt",
    )
    if hasattr(prims, f"{name}_p")
)  # fmt: skip


def plan(graph: ETraceGraph, read: Sequence[int], in_a_row: bool = False) -> Plan:
    """Decide which of the values to save. `in_a_row` says that each step begins where
    the one before has ended, in all samples."""
    program, first = graph.program, graph.param_leaves.count
    states = program.inputs[first : first + graph.state_leaves.parts.count]
    free = set(program.inputs) - set(states) | set(program.constants)
    free |= {*graph.weights, *graph.prepared}
    found = _planned(graph, read, free)
    pairs = zip(graph.hidden.doors, graph.hidden.old, strict=True)
    after = tuple(pair for pair in pairs if in_a_row and pair[1] in found.save)
    if not after:
        return found
    doors, old = zip(*after, strict=True)
    found = _planned(graph, {*read, *old}, free | {*doors})
    return found._replace(read=tuple(read), after=after)


def _planned(graph: ETraceGraph, read: Iterable[int], free: set[int]) -> Plan:
    """The same where what is `free` need not be saved."""
    program = graph.program
    makers = (e for e in graph.body if _is_cheap(e, program.avals))
    cheap = {ref: equation for equation in makers for ref in equation.outputs}
    met, wanted = set(), [ref for ref in read if ref not in free]
    while wanted:
        ref = wanted.pop()
        if ref not in met:
            met.add(ref)
            wanted += [r for r in _sources(cheap, ref) if r not in free]
    save = _smallest_cut(program.avals, cheap, met, set(read) - free)
    again = _made_again(cheap, set(read) - free, save, free)
    equations = tuple(again[index] for index in sorted(again))
    return Plan(tuple(sorted(save)), equations, tuple(read))


def _sources(cheap: dict[int, Equation], ref: int) -> tuple[int, ...]:
    return cheap[ref].values if ref in cheap else ()


def _smallest_cut(
    avals: Any, cheap: dict[int, Equation], met: set[int], read: set[int]
) -> set[int]:
    """The values of the smallest size from which cheap equations make what is read; of
    several, those next to it.

    Each value is an edge, from node 2k to 2k + 1, with its size as the capacity.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    if not met:
        return set()
    refs = sorted(met)
    number = {ref: k for k, ref in enumerate(refs)}
    source, sink = 2 * len(refs), 2 * len(refs) + 1
    bytes_ = np.array([avals[r].size * avals[r].dtype.itemsize for r in refs], float)
    # Capacities are integers of 32 bits; what is larger than all of them is no limit.
    sizes = np.ceil(bytes_ * min(1.0, 2**28 / max(bytes_.sum(), 1.0))).astype(int) + 1
    unlimited = int(sizes.sum()) + 1
    edges = [(2 * k, 2 * k + 1, size) for k, size in enumerate(sizes)]
    for ref, k in number.items():
        if ref not in cheap:
            edges.append((source, 2 * k, unlimited))
        if ref in read:
            edges.append((2 * k + 1, sink, unlimited))
        for other in {r for r in _sources(cheap, ref) if r in number}:
            edges.append((2 * number[other] + 1, 2 * k, unlimited))
    rows, columns, limits = np.array(edges, np.int32).T
    limit = csr_matrix((limits, (rows, columns)), shape=(sink + 1, sink + 1))
    left = limit - maximum_flow(limit, source, sink).flow
    left.data = (left.data > 0).astype(np.int32)
    left.eliminate_zeros()
    behind = set(breadth_first_order(left.T.tocsr(), sink, return_predecessors=False))
    return {
        ref for ref, k in number.items() if 2 * k + 1 in behind and 2 * k not in behind
    }


def _made_again(
    cheap: dict[int, Equation], read: set[int], save: set[int], free: set[int]
) -> dict[int, Equation]:
    """The equations, by their index, from what is saved to what is read."""
    again: dict[int, Equation] = {}
    wanted = list(read)
    while wanted:
        ref = wanted.pop()
        if ref in save or ref in free or cheap[ref].index in again:
            continue
        again[cheap[ref].index] = cheap[ref]
        wanted += cheap[ref].values
    return again


def _is_cheap(equation: Equation, avals: Any) -> bool:
    if equation.effectful or equation.primitive in _COSTLY:
        return False
    return is_light(equation, avals)


def is_light(equation: Equation, avals: Any) -> bool:
    """Whether elements are moved or computed one by one."""

    def known(ref: Any) -> Any:
        return None if isinstance(ref, int) else literal(ref)

    return is_elementwise(equation, avals) or is_structural(equation, known)
