"""The derivatives of one step: the step itself, and D, L and df of its local program.

All functions here work on one sample; batched callers map them with `jax.vmap`.

For every hidden group and slot s', one reverse pass through the group's local program,
seeded with ones on slot s' of all units, gives at once

    D[s'][s] = dh'_{s'}/dh_s    (units)          by the old state
    L[s'][s] = dh'_{s'}/dh'_s   (units)          by the other new slots of the step
    df[s']   = dh'_{s'}/dy      (the shape of y) for every relation

because in the local program no value feeds more than one unit. They are direct
derivatives. In an order in which L is strictly triangular the trace follows slot by
slot,

    e'_{s'} = sum_s D[s'][s] e_s + sum_s L[s'][s] e'_s + df[s'] dy/dw

and the learning signal l, the derivative of the loss that does not count these
same-step paths twice, follows from the total derivative T of the full step by one
product: dh'/d(delta h') = (1 - L)^-1 = M and T = M^T l, so that l = T - L^T T.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from ._graph import ETraceGraph
from ._group import HiddenGroup
from ._jaxpr import Equation, Ref, evaluate, literal
from ._locality import Edge
from ._relation import Relation
from ._rules import RelationJacobian


Entries = tuple[tuple[Shaped[Array, "... #units"] | None, ...], ...]


class GroupJacobian(eqx.Module):
    """D, L and df of one hidden group; None where structurally zero.

    Of one step and sample, or of a window with time and batch in front.

    **Attributes:**

    - `transition`: D, S x S vectors over units.
    - `within`: L, S x S vectors over units.
    - `direct`: per use of the group, per slot, an array of the shape of y.
    """

    transition: Entries
    within: Entries
    direct: tuple[tuple[Shaped[Array, "..."] | None, ...], ...]


def prepare(
    graph: ETraceGraph, params: Sequence[Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Run the preparation: the weights, and the other values made of params alone."""
    env = dict(zip(graph.program.constants, graph.constants, strict=True))
    env.update(zip(graph.program.inputs, params, strict=False))
    env = evaluate(graph.preparation, env)
    weights = tuple(env[ref] for ref in graph.weights)
    return weights, tuple(env[ref] for ref in graph.prepared)


def shared_env(
    graph: ETraceGraph, weights: Sequence[Any], prepared: Sequence[Any]
) -> dict[int, Any]:
    """What all samples have in common: constants, weights, other prepared values."""
    env = dict(zip(graph.program.constants, graph.constants, strict=True))
    env.update(zip(graph.weights, weights, strict=True))
    env.update(zip(graph.prepared, prepared, strict=True))
    return env


def run(
    graph: ETraceGraph,
    shared: Mapping[int, Any],
    state: Sequence[Any],
    x: Sequence[Any],
    *,
    at_door: Sequence[Any] | None = None,
    cut_at_door: bool = False,
    edge: Mapping[Edge, Callable[[Any], Any]] | None = None,
    tap: Mapping[int, Callable[[Any], Any]] | None = None,
    keep: Sequence[int] | None = None,
    body: Sequence[Equation] | None = None,
    through: Mapping[int, Callable[[list[Any]], list[Any]]] | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """One step of the full program: new state, output, and the values to keep, those
    of `graph.saved` unless others are named. `body` are its equations without those
    whose values are in `shared` already, some of them `through` other functions.
    `at_door` is added to the new hidden leaves; with `cut_at_door` their derivative is
    that by this change alone."""
    first = graph.param_leaves.count
    env = dict(shared) | dict(
        zip(graph.program.inputs[first:], (*state, *x), strict=True)
    )
    tap = dict(tap or {})
    if at_door is not None:
        for ref, change in zip(graph.hidden.doors, at_door, strict=True):
            tap[ref] = _add(change, cut_at_door)
    body = graph.body if body is None else body
    env = evaluate(body, env, edge=edge, tap=tap, through=through)
    count = graph.state_leaves.parts.count
    outputs = [env[ref] for ref in graph.program.outputs]
    kept = graph.saved if keep is None else keep
    return outputs[:count], outputs[count:], [env[ref] for ref in kept]


def _add(change: Any, cut: bool) -> Callable[[Any], Any]:
    if cut:
        return lambda value: jax.lax.stop_gradient(value) + change
    return lambda value: value + change


def with_context(
    graph: ETraceGraph, group: HiddenGroup, env: Mapping[int, Any]
) -> dict[int, Any]:
    """With zeros for what the local program of a group reads and its derivatives, by
    `graph.saved`, do not."""
    avals = graph.program.avals
    zeros = {
        ref: jnp.zeros(avals[ref].shape, avals[ref].dtype)
        for ref in group.context
        if ref not in env
    }
    return zeros | dict(env)


def group_jacobian(
    graph: ETraceGraph,
    group: HiddenGroup,
    env: Mapping[int, Any],
    state: Sequence[Any],
) -> GroupJacobian:
    """D, L and df of one group, by one reverse pass per slot."""
    avals, env = graph.program.avals, with_context(graph, group, env)
    old = [state[graph.hidden.leaves[leaf]] for leaf in group.own]
    at_use, at_door = (
        [jnp.zeros(avals[ref].shape, avals[ref].dtype) for ref in refs]
        for refs in (group.uses, group.doors)
    )

    def local(old: list[Any], at_use: list[Any], at_door: list[Any]) -> list[Any]:
        return group.local_step(env, old, at_use, at_door)

    _, pull = jax.vjp(local, old, at_use, at_door)
    transition, within, direct = [], [], []
    for slot in range(group.slots):
        of_old, of_use, of_door = pull(group.seed(slot))
        row = group.read(dict(zip(group.own, of_old, strict=True)))
        if group.leak is not None:
            row = [jnp.full_like(entry, group.leak) for entry in row]
        transition.append(_keep(row, group.transition_matrix[slot]))
        row = group.read(dict(zip(group.own, of_door, strict=True)))
        within.append(_keep(row, group.within_matrix[slot]))
        direct.append(of_use)
    if group.whole is not None:
        transition, direct = _true_blocks(graph, group, env, old, at_use, within)
    per_use = tuple(zip(*direct, strict=True))
    return GroupJacobian(tuple(transition), tuple(within), per_use)


def _true_blocks(
    graph: ETraceGraph,
    group: HiddenGroup,
    env: Mapping[int, Any],
    old: list[Any],
    at_use: list[Any],
    within: Sequence[Sequence[Any]],
) -> tuple[list[Any], list[Any]]:
    """D and df from the dense Jacobians of the step, nothing cut.

    Their true blocks B count the paths within the step; the direct derivatives, which
    the trace goes by, are (1 - L) B.
    """
    _, pull = jax.vjp(lambda *args: group.whole_step(env, *args), old, at_use)
    units = jnp.arange(group.units)
    maps = {relation.y: relation.map for relation in graph.relations}
    places = [maps[ref].spread(units + 1) - 1 for ref in group.uses]
    states, uses = [], []
    for slot in range(group.slots):
        ones, numbers = group.seed(slot), group.place(slot, units, empty=-1)

        def row(unit: Any, ones: Any = ones, numbers: Any = numbers) -> Any:
            seeds = [
                jnp.where(number == unit, one, jnp.zeros_like(one))
                for one, number in zip(ones, numbers, strict=True)
            ]
            of_old, of_use = pull(seeds)
            slots = group.read(dict(zip(group.own, of_old, strict=True)))
            own = (
                jnp.where(place == unit, found, jnp.zeros_like(found))
                for place, found in zip(places, of_use, strict=True)
            )
            return [column[unit] for column in slots], list(own)

        of_old, of_use = jax.vmap(row)(units)
        states.append(of_old)
        uses.append([found.sum(0) for found in of_use])
    spread = [maps[ref].spread for ref in group.uses]
    keep = [lambda factor: factor] * group.slots
    return _direct(states, within, keep), _direct(uses, within, spread)


def _direct(
    block: Sequence[Sequence[Any]], within: Sequence[Sequence[Any]], spread: Any
) -> list[tuple[Any, ...]]:
    """(1 - L) B, column by column; `spread` shapes L like each of the columns."""
    return [
        tuple(
            entry - sum(put(factor) * row[i] for factor, row in _pairs(factors, block))
            for i, (entry, put) in enumerate(zip(entries, spread, strict=True))
        )
        for entries, factors in zip(block, within, strict=True)
    ]


def _pairs(factors: Sequence[Any], rows: Sequence[Any]) -> list[tuple[Any, Any]]:
    pairs = zip(factors, rows, strict=True)
    return [(factor, row) for factor, row in pairs if factor is not None]


def _keep(row: Sequence[Any], structure: Sequence[bool]) -> tuple[Any, ...]:
    return tuple(
        entry if kept else None for entry, kept in zip(row, structure, strict=True)
    )


def jacobians(
    graph: ETraceGraph,
    shared: Mapping[int, Any],
    state: Sequence[Any],
    saved: Sequence[Any],
) -> tuple[GroupJacobian, ...]:
    """The Jacobians of all groups, at the values that `run` saved."""
    env = dict(shared) | dict(zip(graph.saved, saved, strict=True))
    return tuple(group_jacobian(graph, group, env, state) for group in graph.groups)


def relation_jacobian(
    graph: ETraceGraph,
    relation: Relation,
    jacobian: GroupJacobian,
    env: Mapping[int, Any],
) -> RelationJacobian:
    """What a learning rule needs to know about one relation."""
    operands = tuple(value_of(env, ref) for ref in relation.operands)
    return reduced(relation, graph.groups[relation.group], jacobian, operands)


def moving_operands(graph: ETraceGraph, relation: Relation) -> tuple[bool, ...]:
    """Per operand of a relation, whether it is data of the step, with the batch in
    front."""
    saved = set(graph.saved)
    return tuple(isinstance(ref, int) and ref in saved for ref in relation.operands)


def reduced(
    relation: Relation,
    group: HiddenGroup,
    jacobian: GroupJacobian,
    operands: tuple[Any, ...],
) -> RelationJacobian:
    """The entries that concern one relation; axes in front stay.

    Where a trace is alike for all units, one entry stands for all of them.
    """
    direct = list(jacobian.direct[group.uses.index(relation.y)])
    transition: list[Any] = list(jacobian.transition)
    within: list[Any] = list(jacobian.within)
    for slot in range(group.slots):
        if slot not in relation.reached:
            direct[slot] = None
        elif relation.first is not None:
            direct[slot] = _taken(direct[slot], relation)
    for slot, alike in zip(relation.slots, relation.alike, strict=True):
        if alike:
            transition[slot] = _firsts(transition[slot], 1)
            within[slot] = _firsts(within[slot], 1)
            direct[slot] = _firsts([direct[slot]], len(relation.drive_shape))[0]
    return RelationJacobian(transition, within, direct, operands)


def _taken(direct: Any, relation: Relation) -> Any:
    """The entry of one element per unit."""
    lead = direct.shape[: direct.ndim - len(relation.y_shape)]
    return direct.reshape(*lead, -1).at[..., relation.first].get(mode="clip")


def _firsts(row: Sequence[Any], axes: int) -> list[Any]:
    """The first entry along the last axes, which stay, with size one."""
    first = (..., *(slice(1) for _ in range(axes)))
    return [None if entry is None else entry[first] for entry in row]


def value_of(env: Mapping[int, Any], ref: Ref) -> Any:
    return env[ref] if isinstance(ref, int) else literal(ref)
