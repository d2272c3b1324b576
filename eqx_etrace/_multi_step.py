"""Windows with exact credit inside, and what a trace holds of before at the start."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._dynamics import credit_global
from ._forward import Forward, Setting, forward, values
from ._graph import ETraceGraph
from ._move import move_by_steps
from ._objective import Losses
from ._rules import GlobalRule
from ._saving import plan
from ._step import init_trace
from ._synthetic import bootstraps, synthetic, with_lesson
from ._window import add_gradients, credit, local_reads


def multi_step_window(
    setting: Setting,
    state: Sequence[Any],
    trace: Any,
    xs: Sequence[Any],
    reset: Any | None,
    losses: Losses,
) -> tuple[Any, list[Any], list[Any], Any]:
    """The losses, gradients of the weights, state and trace: by reverse mode within the
    window, and by the trace at its start."""
    graph = setting.graph

    def outputs(weights: Any, hidden: Any) -> Any:
        ran = forward_from(setting, weights, state, hidden, xs, reset)
        moving = [
            leaf for leaf in ran.outs or () if jnp.issubdtype(leaf.dtype, jnp.inexact)
        ]
        end = [ran.state[i] for i in graph.hidden.leaves] if guesses else []
        return (moving, end), ran

    guesses = bootstraps(graph)
    hidden = [state[i] for i in graph.hidden.leaves]
    (_, end), pull, ran = jax.vjp(outputs, setting.weights, hidden, has_aux=True)
    result, given = losses(ran.outs)
    guess = synthetic(graph, setting.weights, end) if guesses else []
    direct, edge = pull((given, guess))
    if guesses:
        total = with_lesson(graph, setting.weights, hidden, edge, direct)
        return result, list(total), ran.state, init_trace(graph)
    if not graph.rule.windowed:
        total = with_edge(graph, direct, trace, edge)
        new = moved_trace(setting, ran, state, trace, xs, reset)
    else:  # In one go, so that a large trace is read once and written in place.
        found = values(setting, ran, plan(graph, local_reads(graph)))
        signals = _signals_of(graph, edge)
        gradients, new = credit(setting, found, trace, None, reset, signals)
        total = add_gradients(graph, direct, gradients)
    return result, total, ran.state, new


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
    made = plan(graph, local_reads(graph))
    return forward(setting, start, xs, reset, made, outputs=True, derivatives=True)


def moved_trace(
    setting: Setting,
    ran: Forward,
    state: Sequence[Any],
    trace: Any,
    xs: Sequence[Any],
    reset: Any | None,
) -> Any:
    """The trace after a window that has run from this state, with what `local_reads`
    names."""
    graph = setting.graph
    if not graph.rule.windowed:
        return move_by_steps(setting, state, trace, xs, reset)
    found = values(setting, ran, plan(graph, local_reads(graph)))
    return credit(setting, found, trace, None, reset)[1]


def with_edge(
    graph: ETraceGraph, direct: Sequence[Any], trace: Any, edge: Sequence[Any]
) -> list[Any]:
    """The gradients of the weights with what the trace gives for derivatives by the
    hidden leaves."""
    if trace is None:
        return list(direct)
    rule = graph.rule
    if isinstance(rule, GlobalRule):
        more = credit_global(graph, rule, trace, edge)
        pairs = zip(direct, more, strict=True)
        return [g if new is None else g + new for g, new in pairs]
    whole, signals = rule.whole(graph.relations, trace), _signals_of(graph, edge)
    gradients = [
        rule.gradient(relation, entries, signals[relation.group])
        for relation, entries in zip(graph.relations, whole, strict=True)
    ]
    return add_gradients(graph, direct, gradients)


def _signals_of(graph: ETraceGraph, derivatives: Sequence[Any]) -> list[Any]:
    """Derivatives by hidden leaves, per group and slot."""
    leaves, found = dict(enumerate(derivatives)), []
    for group in graph.groups:
        read = group.read if graph.batch is None else jax.vmap(group.read)
        found.append(read(leaves))
    return found
