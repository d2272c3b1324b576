"""Synthetic gradients at work: the guess at the end of a window, and its lesson."""

import functools as ft
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._errors import CompileError, describe, sentence
from ._graph import ETraceGraph
from ._signals import Bootstrapped
from ._space import of_states


def bootstraps(graph: ETraceGraph) -> bool:
    """Whether the end of a window gets a guess."""
    return isinstance(getattr(graph.rule, "signal", None), Bootstrapped)


def _guess(graph: ETraceGraph, learned: Sequence[Any], hidden: Sequence[Any]) -> Any:
    """M(h) of one sample, as a vector."""
    leaves: list[Any] = [None] * graph.param_leaves.count
    inputs = graph.program.inputs
    for ref, leaf in zip(graph.learned, learned, strict=True):
        leaves[inputs.index(ref)] = leaf
    params = jtu.tree_unflatten(graph.param_leaves.treedef, leaves)
    model = eqx.combine(params, graph.fixed, graph.static.thaw())
    path = graph.rule.signal.path  # pyright: ignore[reportAttributeAccessIssue]
    module = ft.reduce(getattr, path.split("."), model)
    return module(of_states(graph).pack(hidden))


def check_synthesiser(graph: ETraceGraph) -> None:
    """Raise `CompileError` unless M fits the hidden state."""
    space, avals = of_states(graph), graph.program.avals
    learned = [
        jax.ShapeDtypeStruct(avals[r].shape, avals[r].dtype) for r in graph.learned
    ]
    found = jax.eval_shape(
        lambda learned, hidden: _guess(graph, learned, hidden), learned, space.specs
    )
    if getattr(found, "shape", None) != (space.size,):
        expected = f"{space.dtype}[{space.size}], a number for each of the hidden state"
        remedy = "Let the synthesiser map (n,) to (n,)."
        raise CompileError(sentence("synthesiser", describe(found), expected, remedy))


def synthetic(
    graph: ETraceGraph, weights: Sequence[Any], hidden: Sequence[Any]
) -> list[Any]:
    """The guess of the derivative by the hidden leaves, the batch in front."""
    learned = _learned(graph, weights)

    def one(hidden: Any) -> list[Any]:
        return of_states(graph).unpack(_guess(graph, learned, hidden))

    found = (one if graph.batch is None else jax.vmap(one))(list(hidden))
    return list(jax.lax.stop_gradient(found))


def with_lesson(
    graph: ETraceGraph,
    weights: Sequence[Any],
    hidden: Sequence[Any],
    target: Sequence[Any],
    gradients: Sequence[Any],
) -> tuple[Any, ...]:
    """The gradients of the weights with what M learns from the derivative that came
    back to a state."""
    learned = _learned(graph, weights)

    def loss(learned: Any) -> Any:
        def one(hidden: Any, target: Any) -> Any:
            wrong = _guess(graph, learned, hidden) - of_states(graph).pack(target)
            return jnp.sum(wrong**2) / 2

        found = (one if graph.batch is None else jax.vmap(one))(hidden, target)
        return jnp.sum(found)

    args = jax.lax.stop_gradient((list(hidden), list(target)))
    hidden, target = args
    found = dict(zip(graph.learned, jax.grad(loss)(learned), strict=True))
    pairs = zip(graph.weights, gradients, strict=True)
    return tuple(g + found[ref] if ref in found else g for ref, g in pairs)


def _learned(graph: ETraceGraph, weights: Sequence[Any]) -> list[Any]:
    values = dict(zip(graph.weights, weights, strict=True))
    return [values[ref] for ref in graph.learned]
