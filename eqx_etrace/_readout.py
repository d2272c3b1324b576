"""From the new state to the outputs: what the derivative of a loss has to run."""

import functools as ft
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ._graph import ETraceGraph
from ._jacobian import shared_env
from ._jaxpr import Equation, evaluate, live
from ._known import known


class Readout(NamedTuple):
    """The part of the step from the new state, and from the weights without a trace, to
    the outputs, and the values that it reads besides."""

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
    kept = tuple(live(equations, outputs))
    needed = outputs.union(*(equation.values for equation in kept))
    written = {ref for equation in kept for ref in equation.outputs}
    known = weights | set(graph.prepared) | set(graph.program.constants)
    # A new state that the step makes from other new states is known all the same.
    context = (needed - written - known) | (needed & doors)
    return Readout(kept, tuple(sorted(context)))


def outputs_of(
    graph: ETraceGraph,
    part: Readout,
    prepared: Sequence[Any],
    context: Sequence[Any],
    weights: Sequence[Any],
    change: Sequence[Any],
) -> list[Any]:
    """The outputs of one sample where the new hidden leaves change by `change`."""
    env = shared_env(graph, weights, prepared)
    env |= dict(zip(part.context, context, strict=True))
    env, tap = changed_state(graph, env, change)
    edges = {relation.edge for relation in graph.relations}
    edge = dict.fromkeys(edges, jax.lax.stop_gradient)
    env = evaluate(part.equations, env, edge=edge, tap=tap)
    return [env[ref] for ref in graph.program.outputs[graph.state_leaves.parts.count :]]


def changed_state(
    graph: ETraceGraph, env: dict[int, Any], change: Sequence[Any]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """The values with the new hidden leaves changed, and taps that keep them so where
    equations make some of them from others."""
    env, tap = dict(env), {}
    for ref, delta in zip(graph.hidden.doors, change, strict=True):
        if ref in env:
            tap[ref] = ft.partial(_changed, env[ref], delta)
            env[ref] = env[ref] + delta
    return env, tap


def _changed(value: Any, delta: Any, made: Any) -> Any:
    return known(value, made) + delta
