"""Where the hidden state leaves its units: what other learning signals work on.

From the new state, elementwise and structural equations stay within a unit. A value
that they make and that a mixing equation reads on its way to an output is an *exit*; an
output that they make is a *direct* one. The part of the step between the new state and
these is small, and is all that has to be differentiated where the signal at the exits
is known.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._decision import Decision, Kind
from ._errors import CompileError
from ._jaxpr import Equation, Program, live
from ._locality import Edge
from ._pattern import identity, through
from ._reads import Mixing, Reads
from ._rules import LocalRule
from ._signals import Exit, Symmetric
from ._stage import is_below


if TYPE_CHECKING:
    from ._graph import ETraceGraph


@dataclasses.dataclass(frozen=True)
class Exits:
    """What `find_exits` finds.

    - `refs`, `exits`: the values, and what is known of each.
    - `edges`: per exit, the edges by which mixing equations read it.
    - `direct`: the positions of the direct outputs among those that have a derivative.
    - `errors`: the positions of those by which the loss makes the output error: not
      direct, or direct ones of units that act on no others, as of a leaky readout.
    - `equations`: those from the new state to all of them.
    - `context`: the values of the step that these read besides, to be saved.
    """

    refs: tuple[int, ...]
    exits: tuple[Exit, ...]
    edges: tuple[tuple[Edge, ...], ...]
    direct: tuple[int, ...]
    errors: tuple[int, ...]
    equations: tuple[Equation, ...]
    context: tuple[int, ...]


def find_exits(graph: "ETraceGraph", reads: Reads) -> Exits:
    """The exits of all groups; see the head of this file."""
    program, doors = graph.program, graph.hidden.doors
    local, equations, met = set(doors), [], {}
    leads = _leads(program, graph.body)
    for equation in graph.body:
        read = [(k, ref) for k, ref in equation.operands if ref in local]
        if not (read and equation.differentiable) or equation.effectful:
            continue
        if reads.kind(equation) is not Mixing.MIXING:
            local.update(r for r in equation.outputs if program.avals[r].inexact)
            equations.append(equation)
        elif leads.intersection(equation.outputs):
            for k, ref in read:
                met.setdefault(ref, []).append((equation.index, k))
    outputs = inexact_outputs(graph)
    direct = tuple(i for i, ref in enumerate(outputs) if ref in local)
    targets = {*met, *(outputs[i] for i in direct)}
    kept = tuple(live(equations, targets))
    needed = targets.union(*(equation.values for equation in kept))
    written = {ref for equation in kept for ref in equation.outputs}
    known = {*graph.weights, *graph.prepared, *program.constants}
    context = (needed - written - known) | set(doors)
    exits = _describe(graph, reads, kept, tuple(met))
    shown = _describe(graph, reads, kept, tuple(outputs[i] for i in direct))
    acting = [any(at.places[g] != () for at in exits) for g in range(len(graph.groups))]
    no_error = {
        i
        for i, at in zip(direct, shown, strict=True)
        if any(
            places != () for places, acts in zip(at.places, acting, strict=True) if acts
        )
    }
    return Exits(
        tuple(met),
        exits,
        tuple(map(tuple, met.values())),
        direct,
        tuple(i for i in range(len(outputs)) if i not in no_error),
        kept,
        tuple(sorted(context)),
    )


def inexact_outputs(graph: "ETraceGraph") -> list[int]:
    """The outputs that have a derivative."""
    outputs = graph.program.outputs[graph.state_leaves.parts.count :]
    return [ref for ref in outputs if graph.program.avals[ref].inexact]


def _leads(program: Program, body: Sequence[Equation]) -> set[int]:
    """The values with a derivative that some output, or new state, depends on."""
    found = set(program.outputs)
    for equation in reversed(body):
        if equation.differentiable and found.intersection(equation.outputs):
            found.update(ref for _, ref in equation.operands)
    return found


def _describe(
    graph: "ETraceGraph",
    reads: Reads,
    equations: Sequence[Equation],
    refs: Sequence[int],
) -> tuple[Exit, ...]:
    """Whose units each exit speaks for."""
    from scipy.sparse import csr_matrix

    avals, doors = graph.program.avals, graph.hidden.doors
    start = identity({ref: avals[ref].size for ref in doors})
    found = through(equations, avals, reads, start)
    offsets = np.concatenate([[0], np.cumsum([avals[ref].size for ref in doors])])
    exits = []
    for ref in refs:
        pattern = csr_matrix(found[ref])
        places = []
        for group in graph.groups:
            member = _member(group, offsets)
            places.append(_places(csr_matrix(pattern @ member)))
        exits.append(Exit(avals[ref].shape, avals[ref].dtype, tuple(places)))
    return tuple(exits)


def _member(group: Any, offsets: Any) -> Any:
    """Which element of the doors belongs to which unit of a group."""
    from scipy.sparse import csr_matrix

    rows, columns = [], []
    for leaf, index in zip(group.slot_leaf, group.index, strict=True):
        places = np.arange(group.units) if index is None else np.asarray(index)
        rows.append(offsets[leaf] + places)
        columns.append(np.arange(group.units))
    where = (np.concatenate(rows), np.concatenate(columns))
    ones = np.ones(len(where[0]), bool)
    return csr_matrix((ones, where), shape=(int(offsets[-1]), group.units))


def _places(pattern: Any) -> tuple[int, ...] | None:
    """Per unit its element, from which elements (rows) are of which units."""
    if not pattern.nnz:
        return ()
    per_element = np.diff(pattern.indptr)
    per_unit = np.diff(pattern.tocsc().indptr)
    if per_element.max() > 1 or (per_unit != 1).any():
        return None
    return tuple(int(i) for i in pattern.tocsc().indices)


def check_exits(graph: "ETraceGraph", exits: Exits) -> None:
    """Raise `CompileError` where a group has no place for a signal, or more than one
    for each unit and the rule filters it."""
    rule = graph.rule
    assert isinstance(rule, LocalRule)  # No other asks for exits.
    what = type(rule).__name__
    if not exits.refs:
        raise CompileError(
            f"{what}: got a step whose outputs read the state without a weight or not "
            "at all, expected a readout: there is no error to send back to the units. "
            "Return what a readout makes of the new state."
        )
    hears = rule.signal.given == "nothing" and not isinstance(rule.signal, Symmetric)
    if hears and not exits.errors:
        raise CompileError(
            f"{what} with {type(rule.signal).__name__}: got outputs that all show "
            "directly what units do that act on others, expected one of a readout: "
            "there is no output error to send back. Return what a readout makes of "
            "them, or use the signal Symmetric()."
        )
    behind = _behind(graph, exits)
    for number, group in enumerate(graph.groups):
        names = ", ".join(dict.fromkeys(group.leaves))
        places = [at.places[number] for at in exits.exits]
        if rule.filters and None in places:
            raise CompileError(
                f"{what}: got a unit of hidden group {number} ({names}) that acts "
                "through several elements of one value, expected one element for each "
                "unit: what is filtered is a trace per unit. Use the rule without the "
                "filter."
            )
        dtypes = [at.dtype for at in exits.exits if at.places[number] != ()]
        if rule.filters and any(map(_is_complex, dtypes)):
            raise CompileError(
                f"{what}: got a unit of hidden group {number} ({names}) that acts "
                "through a complex value, expected real ones: a filter for each. Let "
                "the weights read the real and the imaginary part, as `nn.LRU` does."
            )
        direct = behind.intersection(group.doors)
        if not direct and all(p == () for p in places):
            raise CompileError(
                f"{what}: got hidden group {number} ({names}), whose new state no "
                "output and no other group reads in the same step, expected one that "
                "does: no signal would come back to it. Let what follows read the new "
                "state, or use the signal Symmetric()."
            )


def _is_complex(dtype: Any) -> bool:
    return np.issubdtype(dtype, np.complexfloating)


def _behind(graph: "ETraceGraph", exits: Exits) -> set[int]:
    """The new hidden leaves that a direct output is made of."""
    outputs = inexact_outputs(graph)
    direct = {outputs[i] for i in exits.direct}
    kept = live(exits.equations, direct)
    return direct.union(*(equation.values for equation in kept))


def passing(graph: "ETraceGraph") -> list[bool]:
    """Per relation whether its y is one of those by which others reach its group: the
    last on the way to the units, counted once."""
    body = [equation for equation in graph.body if equation.differentiable]
    ahead = {
        y: {ref for equation in live(body, {y}) for ref in equation.values}
        for y in {relation.y for relation in graph.relations}
    }
    found, seen = [], set()
    for relation in graph.relations:
        ys = {r.y for r in graph.relations if r.group == relation.group}
        last = not any(relation.y in ahead[y] for y in ys)
        here = relation.group, relation.y
        found.append(last and here not in seen)
        seen.add(here)
    return found


def with_learned(graph: "ETraceGraph", path: str) -> "ETraceGraph":
    """The graph that hands out the params under this key path, which no equation of
    the step reads, as weights of the learning signal.

    **Raises:** `CompileError` if there are none."""
    paths, program = graph.param_leaves.paths, graph.program
    mine = [k for k, other in enumerate(paths) if is_below(other, path)]
    refs = tuple(program.inputs[k] for k in mine)
    read = {ref for equation in program.equations for ref in equation.values}
    if not mine or read.intersection(refs):
        got = "no such param" if not mine else "params that the step reads itself"
        raise CompileError(
            f"{path!r}: got {got}, expected params for the learning signal alone. Give "
            f"the model a field of this name; its params are {', '.join(paths)}."
        )
    names = {paths[k] for k in mine}
    reason = "it makes the learning signal, and learns by a rule of its own"
    decisions = [d for d in graph.decisions if not names.intersection(d.weight)]
    decisions += [Decision(Kind.CURRENT_STEP, reason, (paths[k],)) for k in mine]
    return dataclasses.replace(
        graph,
        weights=(*graph.weights, *refs),
        learned=refs,
        decisions=tuple(decisions),
    )


def check_feedback(graph: "ETraceGraph", exits: Exits, path: str, errors: int) -> None:
    """Raise `CompileError` unless there is a matrix of the right shape per exit."""
    got = [graph.program.avals[ref].shape for ref in graph.learned]
    expected = [(at.size, errors) for at in exits.exits]
    if got != expected:
        raise CompileError(
            f"{path!r}: got arrays of the shapes {got}, expected {expected}: for each "
            "value by which units act on others, its elements x output errors. Give "
            "the model a leaf, or a tuple of leaves, of these shapes."
        )
