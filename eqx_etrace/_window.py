"""Windows of steps: forward once, then everything else for all steps at once.

A scan runs the plain step and keeps what the derivatives read. All that follows is
mapped over time and batch together: the Jacobians of the local program, the outputs and
the loss, the derivative of the loss by the new state. A rule then turns them into
gradients and a trace, with small vectors scanned over time and large products taken
once.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._jacobian import (
    GroupJacobian,
    group_jacobian,
    moving_operands,
    reduced,
    run,
    shared_env,
    value_of,
)
from ._jaxpr import Equation, evaluate
from ._rules import GroupWindow, Window


@dataclasses.dataclass(frozen=True)
class Setting:
    """What stays as it is over a sequence."""

    graph: ETraceGraph
    weights: Sequence[Any]
    prepared: Sequence[Any]
    moving: tuple[bool, ...]
    """Per leaf of x, whether it has a slice per step."""
    initial: Sequence[Any] | None = None
    """Leaves of the state that a lane starts anew with."""

    @property
    def env(self) -> dict[int, Any]:
        return shared_env(self.graph, self.weights, self.prepared)

    @property
    def related(self) -> dict[Any, Callable[[Any], Any]]:
        """Weights with a trace get their gradient from it."""
        edges = {relation.edge for relation in self.graph.relations}
        return dict.fromkeys(edges, jax.lax.stop_gradient)


class Forward(NamedTuple):
    """A window that has run: the last state, and of every step the outputs, the old
    hidden leaves and the kept values."""

    state: list[Any]
    outs: list[Any]
    old: list[Any]
    kept: dict[int, Any]


def renew(new: PyTree, old: PyTree, where: Any) -> PyTree:
    """The old leaves, and the new ones where `where`, of their first axes, says so."""

    def choose(new: Any, old: Any) -> Any:
        mask = where.reshape(where.shape + (1,) * (old.ndim - where.ndim))
        return jnp.where(mask, new, old)

    return jax.tree.map(choose, new, old)


def forward(
    setting: Setting,
    state: Sequence[Any],
    xs: Sequence[Any],
    reset: Any | None,
    keep: Sequence[int],
) -> Forward:
    """Run the plain steps; `xs` has time in front where it moves."""
    graph, env = setting.graph, setting.env

    def one(state: Any, x: Any) -> Any:
        return run(graph, env, state, x, keep=keep)

    per_sample = one if graph.batch is None else jax.vmap(one)

    def body(state: list[Any], step: Any) -> Any:
        slices, fresh = step
        if fresh is not None:
            state = renew(setting.initial, state, fresh)
        new, out, kept = per_sample(state, at_step(setting, xs, slices))
        return new, (out, [state[i] for i in graph.hidden.leaves], kept)

    steps = moving_leaves(setting, xs), reset
    new, (outs, old, kept) = jax.lax.scan(body, list(state), steps)
    return Forward(new, outs, old, dict(zip(keep, kept, strict=True)))


def moving_leaves(setting: Setting, xs: Sequence[Any]) -> list[Any]:
    return [leaf for leaf, moves in zip(xs, setting.moving, strict=True) if moves]


def at_step(setting: Setting, xs: Sequence[Any], slices: Sequence[Any]) -> list[Any]:
    """The leaves of x of one step."""
    rest = iter(slices)
    pairs = zip(xs, setting.moving, strict=True)
    return [next(rest) if moves else leaf for leaf, moves in pairs]


class Readout(NamedTuple):
    """The part of the step from the new state and the weights without a trace to out,
    and the values that it reads besides."""

    equations: tuple[Equation, ...]
    context: tuple[int, ...]


def readout(graph: ETraceGraph) -> Readout:
    """What has to be run to differentiate `out`; the rest of the step is not."""
    related = {relation.edge for relation in graph.relations}
    doors, weights = set(graph.hidden.doors), set(graph.weights)
    outputs = set(graph.program.outputs[graph.state_leaves.parts.count :])
    moved, equations = doors | weights, []
    for equation in graph.body:
        arrives = any(
            ref in moved and (equation.index, k) not in related
            for k, ref in equation.operands
        )
        if arrives and equation.differentiable and not equation.effectful:
            moved.update(equation.outputs)
            equations.append(equation)
    needed, kept = set(outputs), []
    for equation in reversed(equations):
        if needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.values)
    written = {ref for equation in kept for ref in equation.outputs}
    known = weights | set(graph.prepared) | set(graph.program.constants)
    return Readout(tuple(kept[::-1]), tuple(sorted(needed - written - known)))


def merge(graph: ETraceGraph, tree: PyTree) -> PyTree:
    """Time and batch as one axis."""
    if graph.batch is None:
        return tree
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def unmerge(graph: ETraceGraph, tree: PyTree) -> PyTree:
    """The inverse of `merge`."""
    batch = graph.batch
    if batch is None:
        return tree
    return jax.tree.map(lambda a: a.reshape(-1, batch, *a.shape[1:]), tree)


def window_jacobians(setting: Setting, ran: Forward) -> list[GroupJacobian]:
    """The Jacobians of all groups and steps, time and batch in front."""
    graph, env = setting.graph, setting.env
    saved = [ran.kept[ref] for ref in graph.saved]

    def one(old: Sequence[Any], saved: Sequence[Any]) -> list[GroupJacobian]:
        state: list[Any] = [None] * graph.state_leaves.parts.count
        for i, leaf in zip(graph.hidden.leaves, old, strict=True):
            state[i] = leaf
        mine = env | dict(zip(graph.saved, saved, strict=True))
        return [group_jacobian(graph, group, mine, state) for group in graph.groups]

    return unmerge(graph, jax.vmap(one)(*merge(graph, (ran.old, saved))))


def credit(
    setting: Setting,
    ran: Forward,
    trace: Sequence[Any] | None,
    totals: Sequence[Any] | None,
    reset: Any | None,
) -> tuple[list[Any | None], tuple[Any, ...]]:
    """Per relation its gradient and its new trace.

    `totals` are the derivatives of each step's loss by the new hidden leaves, time and
    batch in front, or None for no signal.
    """
    graph, env = setting.graph, setting.env | ran.kept
    groups = [
        _group_window(graph, number, jacobian, len(ran.old[0]), totals, reset)
        for number, jacobian in enumerate(window_jacobians(setting, ran))
    ]
    gradients, traces = [], []
    for number, relation in enumerate(graph.relations):
        group, jacobian = groups[relation.group]
        operands = tuple(value_of(env, ref) for ref in relation.equation.inputs)
        window = Window(
            relation,
            group,
            reduced(relation, group.group, jacobian, operands),
            moving_operands(graph, relation),
            graph.batch,
            reset,
        )
        old = None if trace is None else trace[number]
        gradient, new = graph.rule.window(window, old)
        gradients.append(gradient)
        traces.append(new)
    return gradients, tuple(traces)


def _group_window(
    graph: ETraceGraph,
    number: int,
    jacobian: GroupJacobian,
    steps: int,
    totals: Sequence[Any] | None,
    reset: Any | None,
) -> tuple[GroupWindow, GroupJacobian]:
    group = graph.groups[number]
    if totals is not None:
        read = jax.vmap(lambda leaves: group.read(dict(enumerate(leaves))))
        totals = unmerge(graph, read(merge(graph, list(totals))))
    rows = {
        slot for r in graph.relations if r.group == number for slot in r.array_slots
    }
    alive = None if reset is None else jnp.logical_not(reset)
    window = GroupWindow(
        group,
        jacobian.transition,
        jacobian.within,
        totals,
        alive,
        graph.batch,
        steps,
        sorted(rows),
    )
    transition = tuple(map(tuple, window.transition))
    return window, dataclasses.replace(jacobian, transition=transition)


OutputGradient = Callable[[list[Any]], tuple[Any, list[Any]]]
"""From the outputs of all steps, time and batch in front, to the losses (and what comes
with them) and the derivatives of their sum by the floating-point outputs."""


def single_step_window(
    setting: Setting,
    state: Sequence[Any],
    trace: Sequence[Any] | None,
    xs: Sequence[Any],
    reset: Any | None,
    losses: OutputGradient,
) -> tuple[Any, list[Any], list[Any], tuple[Any, ...]]:
    """Losses, gradients of the weights, state and trace: equal to step by step."""
    graph, part = setting.graph, readout(setting.graph)
    keep = sorted({*graph.saved, *part.context})
    ran = forward(setting, state, xs, reset, keep)
    context = merge(graph, [ran.kept[ref] for ref in part.context])
    zeros = [jnp.zeros_like(leaf) for leaf in merge(graph, ran.old)]

    def outputs(weights: Any, change: Any) -> Any:
        env = shared_env(graph, weights, setting.prepared)
        fun = ft.partial(_outputs, graph, part, setting.related, env)
        found = jax.vmap(fun)(context, change)
        return [leaf for leaf in found if _inexact(leaf)], found

    _, pull, found = jax.vjp(outputs, setting.weights, zeros, has_aux=True)
    result, given = losses(unmerge(graph, found))
    direct, totals = pull(merge(graph, given))
    gradients, new = credit(setting, ran, trace, unmerge(graph, totals), reset)
    return result, add_gradients(graph, direct, gradients), ran.state, new


def _outputs(
    graph: ETraceGraph, part: Readout, edge: Any, env: Any, context: Any, change: Any
) -> list[Any]:
    """The outputs of one sample where the new hidden leaves change by `change`."""
    given = dict(zip(part.context, context, strict=True))
    tap = {}
    for ref, delta in zip(graph.hidden.doors, change, strict=True):
        if ref in given:
            given[ref] = given[ref] + delta
        tap[ref] = ft.partial(jnp.add, delta)
    env = evaluate(part.equations, env | given, edge=edge, tap=tap)
    return [env[ref] for ref in graph.program.outputs[graph.state_leaves.parts.count :]]


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


def multi_step_window(
    setting: Setting,
    state: Sequence[Any],
    trace: Sequence[Any] | None,
    xs: Sequence[Any],
    reset: Any | None,
    losses: OutputGradient,
) -> tuple[Any, list[Any], list[Any], tuple[Any, ...]]:
    """The same by reverse mode within the window, and by the trace at its start."""
    graph = setting.graph

    def outputs(weights: Any, hidden: Any) -> Any:
        ran = forward_from(setting, weights, state, hidden, xs, reset)
        return [leaf for leaf in ran.outs if _inexact(leaf)], ran

    hidden = [state[i] for i in graph.hidden.leaves]
    _, pull, ran = jax.vjp(outputs, setting.weights, hidden, has_aux=True)
    result, given = losses(ran.outs)
    direct, edge = pull(given)
    gradients = at_edge(graph, trace, edge)
    new = credit(setting, ran, trace, None, reset)[1]
    return result, add_gradients(graph, direct, gradients), ran.state, new


def forward_from(
    setting: Setting,
    weights: Any,
    state: Sequence[Any],
    hidden: Sequence[Any],
    xs: Sequence[Any],
    reset: Any | None,
) -> Forward:
    """The plain steps as a function of the weights and the hidden leaves."""
    graph, start = setting.graph, list(state)
    for i, leaf in zip(graph.hidden.leaves, hidden, strict=True):
        start[i] = leaf
    setting = dataclasses.replace(setting, weights=weights)
    return forward(setting, start, xs, reset, graph.saved)


def at_edge(
    graph: ETraceGraph, trace: Sequence[Any] | None, edge: Sequence[Any]
) -> list[Any | None]:
    """Per relation what its trace gives for the derivatives by the hidden leaves."""
    if trace is None:
        return [None for _ in graph.relations]
    leaves = dict(enumerate(edge))
    signals = []
    for group in graph.groups:
        read = group.read if graph.batch is None else jax.vmap(group.read)
        signals.append(read(leaves))
    return [
        graph.rule.gradient(relation, trace[number], signals[relation.group])
        for number, relation in enumerate(graph.relations)
    ]
