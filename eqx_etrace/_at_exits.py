"""Learning signals at work: from the exits of the units to the hidden state.

But for the zeros to start from, all is about one sample; batched callers map it.
"""

import functools as ft
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ._exits import Exits, inexact_outputs
from ._graph import ETraceGraph
from ._jacobian import with_context
from ._jaxpr import evaluate
from ._locality import Edge
from ._readout import changed_state
from ._relation import Relation
from ._rules import LocalRule
from ._same_step import partial_signal
from ._signals import Symmetric


Taps = dict[int, Callable[[Any], Any]]


def zeros_at_exits(graph: ETraceGraph) -> list[Any]:
    """Zeros in the shapes of the exits, the batch in front."""
    lead = () if graph.batch is None else (graph.batch,)
    return [jnp.zeros((*lead, *at.shape), at.dtype) for at in _exits(graph).exits]


def tapped(
    graph: ETraceGraph, at_exits: Sequence[Any] | None, averages: Any
) -> tuple[dict[Edge, Callable[[Any], Any]], Taps]:
    """What adds a change to each exit, for those that act beyond its unit, by the edges
    that these read; and what it needs of values that the step makes before.

    `averages` are, per relation that passes a signal on and per exit of its group, the
    average of the derivative of the exit by y less that of this step."""
    if at_exits is None:
        return {}, {}
    seen: dict[int, Any] = {}
    changes: list[list[Any]] = [[change] for change in at_exits]
    passing = [relation for relation in graph.relations if relation.passes]
    for relation, each in zip(passing, averages or (), strict=True):
        for number, more in zip(_of_group(graph, relation.group), each, strict=True):
            bend = ft.partial(_bent, graph, relation, number, more, seen)
            changes[number].append(bend)
    pairs = zip(_exits(graph).edges, changes, strict=True)
    edges = {edge: _add(change) for edges, change in pairs for edge in edges}
    return edges, {r.y: ft.partial(_note, seen, r.y) for r in passing}


def _of_group(graph: ETraceGraph, group: int) -> list[int]:
    """The exits that a group acts through."""
    return [n for n, at in enumerate(_exits(graph).exits) if at.places[group]]


def _note(seen: dict[int, Any], ref: int, value: Any) -> Any:
    seen[ref] = value
    return value


def _bent(
    graph: ETraceGraph, relation: Relation, number: int, more: Any, seen: Mapping
) -> Any:
    """Zero, with a derivative by y: what the average has more than this step."""
    at = _exits(graph).exits[number]
    places = jnp.asarray(at.places[relation.group])
    found = jnp.zeros(at.size, at.dtype)
    if relation.y in seen:  # Else the exit is made before y, and does not read it.
        y = seen[relation.y]
        moved = relation.map.gather(more.astype(y.dtype) * (y - stop_gradient(y)))
        found = found.at[places].add(moved.real.astype(at.dtype))
    return found.reshape(at.shape)


def _add(changes: Sequence[Any]) -> Callable[[Any], Any]:
    def add(value: Any) -> Any:
        for change in changes:
            value = value + (change() if callable(change) else change)
        return value

    return add


def _exits(graph: ETraceGraph) -> Exits:
    assert graph.exits is not None  # Else the signal is the derivative by the state.
    return graph.exits


def heard_at_exits(
    graph: ETraceGraph,
    env: Mapping[int, Any],
    of_out: Sequence[Any],
    at_exits: Sequence[Any],
    given: Any,
) -> list[Any]:
    """The learning signals; the exact ones are those `at_exits`. `of_out` are the
    derivatives of the loss by the outputs that have one."""
    exits, rule = _exits(graph), graph.rule
    assert isinstance(rule, LocalRule)  # Others have no signal to choose.
    if isinstance(rule.signal, Symmetric):
        return list(at_exits)
    error = error_of(exits, of_out)
    each = [env[ref] for ref in graph.learned] or [given] * len(exits.exits)
    return [
        rule.signal.at_exit(number, at, error, mine)
        for number, (at, mine) in enumerate(zip(exits.exits, each, strict=True))
    ]


def feedback_gradients(
    graph: ETraceGraph, env: Mapping[int, Any], of_out: Sequence[Any]
) -> list[Any]:
    """Per learned feedback matrix the gradient of a readout, transposed."""
    if not graph.learned:
        return []
    exits = _exits(graph)
    error, (values, _) = error_of(exits, of_out), _pull_to_state(graph, exits, env)
    found = []
    for ref, value in zip(graph.learned, values, strict=True):
        dtype = env[ref].dtype
        left = value.real.reshape(-1, 1).astype(dtype)
        found.append(left * error[None].astype(dtype))
    return found


def to_state(
    graph: ETraceGraph,
    env: Mapping[int, Any],
    heard: Sequence[Any] | None,
    of_out: Sequence[Any],
    of_doors: Sequence[Any],
) -> list[Any]:
    """The derivatives by the new hidden leaves from signals at the exits (None is
    zero), from those by the outputs, of which the direct ones count, and from those
    that the loss has by the state itself. `env` has weights, constants and context."""
    exits = _exits(graph)
    values, pull = _pull_to_state(graph, exits, env)
    if heard is None:
        heard = [jnp.zeros_like(value) for value in values]
    direct = [of_out[i] for i in exits.direct]
    return pull((list(heard), direct, list(of_doors)))[0]


def _pull_to_state(
    graph: ETraceGraph, exits: Exits, env: Mapping[int, Any]
) -> tuple[list[Any], Callable[[Any], Any]]:
    outputs, doors = inexact_outputs(graph), graph.hidden.doors

    def fun(change: Any) -> tuple[list[Any], list[Any], list[Any]]:
        now, tap = changed_state(graph, dict(env), change)
        now = evaluate(exits.equations, now, tap=tap)
        direct = [now[outputs[i]] for i in exits.direct]
        return [now[ref] for ref in exits.refs], direct, [now[ref] for ref in doors]

    found, pull = jax.vjp(fun, [jnp.zeros_like(env[ref]) for ref in doors])
    return found[0], pull


def gains(
    graph: ETraceGraph, shared: Mapping[int, Any], saved: Sequence[Any], found: Any
) -> list[list[list[Any] | None]]:
    """Per group and exit, dz/dh' of every slot, a vector over units, the other new
    slots held fixed; None where the group does not act through this exit. `found` are
    the Jacobians of the groups."""
    exits = _exits(graph)
    env = dict(shared) | dict(zip(graph.saved, saved, strict=True))
    values, pull = _pull_to_state(graph, exits, env)
    outputs = inexact_outputs(graph)
    direct = [_zeros(graph, outputs[i]) for i in exits.direct]
    doors = [_zeros(graph, ref) for ref in graph.hidden.doors]
    per_group: list[list[list[Any] | None]] = [[] for _ in graph.groups]
    for number, value in enumerate(values):
        seeds = [jnp.zeros_like(other) for other in values]
        seeds[number] = jnp.ones_like(value)
        leaves = dict(enumerate(pull((seeds, direct, doors))[0]))
        for g, group in enumerate(graph.groups):
            row = None
            if exits.exits[number].places[g]:
                row = partial_signal(group.read(leaves), found[g].within)
            per_group[g].append(row)
    return per_group


def slopes(
    graph: ETraceGraph,
    shared: Mapping[int, Any],
    state: Sequence[Any],
    saved: Sequence[Any],
    gain: Sequence[Sequence[list[Any] | None]],
) -> list[list[list[Any]]]:
    """Per group, exit that it acts through, and use, the derivative of the exit by y,
    of the shape of y. `gain` is what `gains` gives."""
    env = dict(shared) | dict(zip(graph.saved, saved, strict=True))
    per_group = []
    for group, rows in zip(graph.groups, gain, strict=True):
        old = [state[graph.hidden.leaves[leaf]] for leaf in group.own]
        start = [_zeros(graph, ref) for ref in group.uses]
        now = with_context(graph, group, env)
        _, pull = jax.vjp(ft.partial(group.local_step, now, old), start)
        found = []
        for row in rows:
            if row is not None:
                placed = [group.place(s, entry) for s, entry in enumerate(row)]
                of_doors = [sum(leaves) for leaves in zip(*placed, strict=True)]
                found.append(pull(of_doors)[0])
        per_group.append(found)
    return per_group


def less_this_step(graph: ETraceGraph, trace: Any, slope: Any) -> list[list[Any]]:
    """What `tapped` takes as averages: those in the trace less the slopes of now."""
    found = []
    for relation, entries in zip(graph.relations, trace, strict=True):
        if relation.passes:
            pairs = zip(entries.average[0], of_use(graph, relation, slope), strict=True)
            found.append([old - now.astype(old.dtype) for old, now in pairs])
    return found


def of_use(graph: ETraceGraph, relation: Relation, slope: Any) -> list[Any]:
    """The slopes of the exits of one relation by its y."""
    use = graph.groups[relation.group].uses.index(relation.y)
    return [row[use] for row in slope[relation.group]]


def _zeros(graph: ETraceGraph, ref: int) -> Any:
    aval = graph.program.avals[ref]
    return jnp.zeros(aval.shape, aval.dtype)


def at_units(graph: ETraceGraph, heard: Sequence[Any]) -> list[list[Any | None]]:
    """Per group the signals at the exits as vectors over its units; None for those
    that it does not act through."""
    per_group = []
    for g in range(len(graph.groups)):
        found = []
        for at, signal in zip(_exits(graph).exits, heard, strict=True):
            places = at.places[g]
            found.append(signal.reshape(-1)[jnp.asarray(places)] if places else None)
        per_group.append(found)
    return per_group


def error_of(exits: Exits, of_out: Sequence[Any]) -> Any:
    """The output errors as one vector."""
    parts = [part for i in exits.errors for part in _parts(of_out[i])]
    if not parts:
        return jnp.zeros(0)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.concatenate(parts)


def _parts(leaf: Any) -> list[Any]:
    pair = (leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,)
    return [part.reshape(-1) for part in pair]


def count_errors(graph: ETraceGraph, exits: Exits) -> int:
    """How many numbers `error_of` gives."""
    avals = [graph.program.avals[ref] for ref in inexact_outputs(graph)]
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
    return jax.eval_shape(lambda out: error_of(exits, out), specs).size
