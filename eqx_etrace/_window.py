"""Windows of steps: forward once, then everything else for all steps at once.

A scan runs the plain step and saves what the derivatives read. All that follows is
mapped over time and batch together: the Jacobians of the local program, the outputs and
the loss, the derivative of the loss by the new state. A rule then turns them into
gradients and a trace, with small vectors scanned over time and large products taken
once.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._at_exits import feedback_gradients, heard_at_exits, to_state
from ._forward import (
    Forward,
    Setting,
    Values,
    forward,
    merge,
    part_of,
    unmerge,
    values,
)
from ._graph import ETraceGraph
from ._group import HiddenGroup
from ._inputs import window_of
from ._jacobian import (
    GroupJacobian,
    group_jacobian,
    moving_operands,
    reduced,
    value_of,
)
from ._objective import Losses
from ._readout import Readout, outputs_of, readout
from ._relation import Relation
from ._rules import GroupWindow, LocalRule, RelationJacobian, Window
from ._saving import Plan, plan


def local_reads(graph: ETraceGraph) -> list[int]:
    """The values that the Jacobians read, and the operands of the uses of weights."""
    reads = {ref for facts in graph.facts for ref in facts.reads}
    data = {*graph.saved, *graph.program.inputs[graph.param_leaves.count :]}
    for relation in graph.relations:
        operands = zip(relation.operands, relation.read, strict=True)
        known = (ref for ref, read in operands if read and isinstance(ref, int))
        reads.update(data.intersection(known))
    return sorted(reads)


def window_jacobian(
    setting: Setting, number: int, known: Values
) -> tuple[GroupJacobian, Callable[[dict[int, Any]], GroupJacobian]]:
    """The Jacobian of a group, time and batch in front; and a function that gives that
    of one step and sample, from its slices of what was saved.

    Entries that depend on weights alone have no such axes; those that are equal for all
    units stand for them with size one.
    """
    graph, facts = setting.graph, setting.graph.facts[number]
    fixed = _entries(setting, number, {}, fixed=True)

    def moving(given: dict[int, Any]) -> GroupJacobian:
        return _entries(setting, number, given, fixed=False)

    def joined(moving: GroupJacobian) -> GroupJacobian:
        both = jax.tree.map(
            lambda a, b: b if a is None else a,
            fixed,
            moving,
            is_leaf=lambda a: a is None,
        )
        return _narrow(both, facts)

    def at(saved: dict[int, Any]) -> GroupJacobian:
        return joined(moving(known.again(saved)))

    return joined(unmerge(graph, jax.vmap(moving)(known.merged))), at


def _entries(
    setting: Setting, number: int, given: dict[int, Any], fixed: bool
) -> GroupJacobian:
    """Of one sample, the entries that depend on weights alone, or all others."""
    graph = setting.graph
    avals, mine = graph.program.avals, setting.env
    for ref in {*graph.saved, *graph.hidden.old}:
        # Nothing that is asked for here depends on what was not saved.
        mine[ref] = given.get(ref, jnp.zeros(avals[ref].shape, avals[ref].dtype))
    state: list[Any] = [None] * graph.state_leaves.parts.count
    for i, ref in zip(graph.hidden.leaves, graph.hidden.old, strict=True):
        state[i] = mine[ref]
    jacobian = group_jacobian(graph, graph.groups[number], mine, state)
    some = graph.facts[number].fixed
    flags = jax.tree.leaves((some.transition, some.within, some.direct))
    leaves, treedef = jax.tree.flatten(jacobian)
    pairs = zip(leaves, flags, strict=True)
    leaves = [a if flag == fixed else None for a, flag in pairs]
    return jax.tree.unflatten(treedef, leaves)


def _narrow(jacobian: GroupJacobian, facts: Any) -> GroupJacobian:
    def vector(entry: Any, alike: Any) -> Any:
        return entry[..., :1] if alike else entry

    def rows(entries: Any, flags: Any) -> Any:
        return tuple(
            tuple(map(vector, *pair)) for pair in zip(entries, flags, strict=True)
        )

    return dataclasses.replace(
        jacobian,
        transition=rows(jacobian.transition, facts.alike.transition),
        within=rows(jacobian.within, facts.alike.within),
    )


def credit(
    setting: Setting,
    known: Values,
    trace: Sequence[Any] | None,
    totals: Sequence[Any] | None,
    reset: Any | None,
    edge: Sequence[Any] | None = None,
) -> tuple[list[Any | None], tuple[Any, ...]]:
    """Per relation its gradient and its new trace.

    `known` is what the derivatives read and `totals` the derivatives of each step's
    loss by the new hidden leaves, time and batch as one axis, or None for no signal. Or
    else `edge`, per group and slot the derivative by the old state, for the gradient of
    the old trace alone.
    """
    graph, rule = setting.graph, _local(setting.graph)
    gradients, traces = [], []
    if trace is not None:
        trace = rule.whole(graph.relations, trace)
    windows = _windows(setting, known, totals, reset, edge=edge)
    for number, window in enumerate(windows):
        old = None if trace is None else trace[number]
        # Entries with time and batch in front meet those that have neither.
        with jax.numpy_rank_promotion("allow"):
            gradient, new = rule.window(window, old)
        gradients.append(gradient)
        traces.append(rule.kept(window.relation, new))
    return gradients, tuple(traces)


def _local(graph: ETraceGraph) -> LocalRule:
    rule = graph.rule
    assert isinstance(rule, LocalRule)  # The windows of others are in `_multi_step`.
    return rule


def _windows(
    setting: Setting,
    known: Values,
    totals: Sequence[Any] | None,
    reset: Any | None,
    later: Sequence[Sequence[Any]] | None = None,
    edge: Sequence[Sequence[Any]] | None = None,
) -> list[Window]:
    """What the rule is told, relation by relation."""
    graph = setting.graph
    env = setting.env | unmerge(graph, known.merged)
    groups = [
        _group_window(setting, number, known, totals, reset, later, edge)
        for number in range(len(graph.groups))
    ]
    found = []
    for number, relation in enumerate(graph.relations):
        group, jacobian, jacobian_at = groups[relation.group]
        operands = _operands(setting, relation, env)
        mine = reduced(relation, group.group, jacobian, operands)
        moving = moving_operands(graph, relation)
        at = ft.partial(_of_step, relation, group.group, operands, jacobian_at)
        found.append(
            Window(relation, number, group, mine, moving, graph.batch, reset, at)
        )
    return found


def _of_step(
    relation: Relation,
    group: HiddenGroup,
    operands: tuple[Any, ...],
    jacobian_at: Callable[[dict[int, Any]], GroupJacobian],
    saved: dict[int, Any],
) -> RelationJacobian:
    return reduced(relation, group, jacobian_at(saved), operands)


def _operands(
    setting: Setting, relation: Relation, env: dict[int, Any]
) -> tuple[Any, ...]:
    """The operands of a use, those without influence of any value."""
    graph, found = setting.graph, []
    lead = (setting.steps,) if graph.batch is None else (setting.steps, graph.batch)
    for ref in relation.operands:
        if isinstance(ref, int) and ref not in env:
            aval = graph.program.avals[ref]
            found.append(jnp.zeros((*lead, *aval.shape), aval.dtype))
        else:
            found.append(value_of(env, ref))
    return tuple(found)


def _group_window(
    setting: Setting,
    number: int,
    known: Values,
    totals: Sequence[Any] | None,
    reset: Any | None,
    later: Sequence[Sequence[Any]] | None,
    edge: Sequence[Sequence[Any]] | None,
) -> tuple[GroupWindow, GroupJacobian, Callable[[dict[int, Any]], GroupJacobian]]:
    graph = setting.graph
    group = graph.groups[number]
    jacobian, at = window_jacobian(setting, number, known)
    if totals is not None:
        read = jax.vmap(lambda leaves: group.read(dict(enumerate(leaves))))
        totals = unmerge(graph, read(list(totals)))
    mine = [relation for relation in graph.relations if relation.group == number]
    window = GroupWindow(
        group,
        jacobian.transition,
        jacobian.within,
        totals,
        None if reset is None else jnp.logical_not(reset),
        graph.batch,
        setting.steps,
        sorted({slot for relation in mine for slot in relation.array_slots}),
        known.at,
        None if later is None else later[number],
        None if edge is None else edge[number],
    )
    transition = tuple(map(tuple, window.transition))
    return window, dataclasses.replace(jacobian, transition=transition), at


CHUNK = 32
"""So many steps at most are taken back at once: their vectors stay in the cache."""


def single_step_window(
    setting: Setting,
    state: Sequence[Any],
    trace: Sequence[Any] | None,
    xs: Sequence[Any],
    reset: Any | None,
    losses: Losses,
) -> tuple[Any, list[Any], list[Any], tuple[Any, ...]]:
    """Losses, gradients of the weights, state and trace: equal to step by step."""
    graph, part = setting.graph, readout(setting.graph)
    context = () if graph.exits is None else graph.exits.context
    read = sorted({*local_reads(graph), *part.context, *context})
    made = plan(graph, read, in_a_row=reset is None)
    ran = forward(setting, state, xs, reset, made)
    found = values(setting, ran, made)
    length = _chunk(setting)
    if trace is None and length is not None and _local(graph).by_adjoint:
        result, total = _in_chunks(setting, ran, made, part, reset, losses, length)
        new = credit(setting, found, None, None, reset)[1]
        return result, total, ran.state, new
    result, direct, totals = _signals(setting, part, found.merged, losses)
    gradients, new = credit(setting, found, trace, totals, reset)
    return result, add_gradients(graph, direct, gradients), ran.state, new


def _signals(
    setting: Setting, part: Readout, merged: dict[int, Any], losses: Losses
) -> tuple[Any, list[Any], list[Any]]:
    """The losses of all steps, and the derivatives of their sum by the weights that the
    outputs read, and of each by the new hidden leaves."""
    graph = setting.graph
    context = [merged[ref] for ref in part.context]
    samples = setting.steps * (graph.batch or 1)
    zeros = [
        jnp.zeros((samples, *aval.shape), aval.dtype)
        for aval in (graph.program.avals[ref] for ref in graph.hidden.doors)
    ]

    def outputs(weights: Any, change: Any) -> Any:
        def one(context: Any, change: Any) -> list[Any]:
            return outputs_of(graph, part, setting.prepared, context, weights, change)

        found = jax.vmap(one)(context, change)
        return [leaf for leaf in found if _inexact(leaf)], found

    _, pull, found = jax.vjp(outputs, setting.weights, zeros, has_aux=True)
    result, given = losses(unmerge(graph, found))
    given = merge(graph, given)
    direct, totals = pull(given)
    if graph.exits is not None:
        signal = merge(graph, losses.signal)
        totals, learned = _at_exits(setting, merged, given, signal)
        learned = dict(zip(graph.learned, learned, strict=True))
        pairs = zip(graph.weights, direct, strict=True)
        direct = [g + learned[r].sum(0) if r in learned else g for r, g in pairs]
    return result, list(direct), totals


def _at_exits(
    setting: Setting, merged: dict[int, Any], of_out: Sequence[Any], signal: Any
) -> tuple[list[Any], list[Any]]:
    """The same derivatives by the new hidden leaves as the rule's signal makes them,
    and the gradients of learned feedback, of each sample."""
    graph, env, doors = setting.graph, setting.env, setting.graph.hidden.doors
    assert graph.exits is not None
    context = {ref: merged[ref] for ref in graph.exits.context}

    def one(context: dict[int, Any], of_out: Any, signal: Any) -> Any:
        zeros = [jnp.zeros_like(context[ref]) for ref in doors]
        now = env | context
        heard = heard_at_exits(graph, now, of_out, (), signal)
        found = to_state(graph, now, heard, of_out, zeros)
        return found, feedback_gradients(graph, now, of_out)

    return jax.vmap(one)(context, list(of_out), signal)


def _chunk(setting: Setting) -> int | None:
    """How many steps to take back at once, where that is fewer than all."""
    steps = setting.steps
    fitting = (n for n in range(CHUNK, CHUNK // 4, -1) if steps % n == 0)
    return next(fitting, None) if steps > CHUNK else None


def _in_chunks(
    setting: Setting,
    ran: Forward,
    made: Plan,
    part: Readout,
    reset: Any | None,
    losses: Losses,
    length: int,
) -> tuple[Any, list[Any]]:
    """The losses and the gradient of a window that has run from a zero trace, by a few
    steps after the other, the last ones first."""
    graph, count = setting.graph, setting.steps // length
    rule = _local(graph)
    setting = dataclasses.replace(setting, steps=length)
    lead = () if graph.batch is None else (graph.batch,)
    nothing = [
        [jnp.zeros((*lead, group.units), dtype) for dtype in group.dtypes]
        for group in graph.groups
    ]

    def back(carry: Any, number: Any) -> tuple[Any, Any]:
        later, total = list(carry[0]), carry[1]
        saved = part_of(ran.saved, made, number, length)
        fresh = window_of(reset, number, length)
        given = values(setting, ran._replace(saved=saved), made)
        now = losses.part(number, length)
        result, direct, totals = _signals(setting, part, given.merged, now)
        windows = _windows(setting, given, totals, fresh, later)
        with jax.numpy_rank_promotion("allow"):
            gradients = [rule.from_adjoint(window) for window in windows]
        found = add_gradients(graph, direct, gradients)
        for window in windows:
            first = zip(
                window.group.adjoint[1], nothing[window.relation.group], strict=True
            )
            later[window.relation.group] = [
                zero if v is None else v for v, zero in first
            ]
        return (later, list(map(jnp.add, total, found))), result

    zeros = [jnp.zeros_like(weight) for weight in setting.weights]
    (_, total), result = jax.lax.scan(
        back, (nothing, zeros), jnp.arange(count), reverse=True
    )
    result = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), result)
    return result, total


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def add_gradients(
    graph: ETraceGraph, direct: Sequence[Any], gradients: Sequence[Any | None]
) -> list[Any]:
    """The gradients of the weights, from those of their uses."""
    total = dict(zip(graph.weights, direct, strict=True))
    for relation, gradient in zip(graph.relations, gradients, strict=True):
        if gradient is not None:
            total[relation.ref] = total[relation.ref] + gradient
    return [total[ref] for ref in graph.weights]
