"""Global rules at work: their traces from step to step, and what these give."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._jacobian import run, shared_env
from ._jaxpr import has_custom_vjp
from ._rules import Dynamics, GlobalRule
from ._space import spaces


def init_global(graph: ETraceGraph, rule: GlobalRule) -> PyTree:
    """The zero trace."""
    of = spaces(graph)

    def one(sample: Any) -> PyTree:
        return rule.init(of.sizes, sample)

    if graph.batch is None:
        return one(jnp.zeros((), jnp.int32))
    return jax.vmap(one)(jnp.arange(graph.batch))


def advance_global(
    graph: ETraceGraph,
    rule: GlobalRule,
    weights: Sequence[Any],
    prepared: Sequence[Any],
    state: Sequence[Any],
    trace: PyTree,
    x: Sequence[Any],
) -> PyTree:
    """The trace after one more step."""
    of = spaces(graph)
    transposed = has_custom_vjp(graph.body)

    def one(state: Any, trace: Any, x: Any) -> PyTree:
        def step(states: Any, changed: Any) -> Any:
            leaves, values = list(state), list(weights)
            new = of.states.unpack(states)
            for i, leaf in zip(graph.hidden.leaves, new, strict=True):
                leaves[i] = leaf
            for k, leaf in zip(of.reaching, of.weights.unpack(changed), strict=True):
                values[k] = leaf
            new = run(graph, shared_env(graph, values, prepared), leaves, x)[0]
            return of.states.pack([new[i] for i in graph.hidden.leaves])

        at = of.states.pack([state[i] for i in graph.hidden.leaves])
        of_weights = of.weights.pack([weights[k] for k in of.reaching])
        return rule.update(Dynamics(step, at, of_weights, transposed), trace)

    per_sample = one if graph.batch is None else jax.vmap(one)
    return per_sample(list(state), trace, list(x))


def credit_global(
    graph: ETraceGraph, rule: GlobalRule, trace: PyTree, derivatives: Sequence[Any]
) -> list[Any | None]:
    """Per weight what the trace gives for derivatives by the hidden leaves, the batch
    summed; None for a weight that does not reach them."""
    of = spaces(graph)

    def one(trace: Any, derivatives: Any) -> Any:
        return rule.gradient(trace, of.states.pack(derivatives))

    if graph.batch is None:
        total = one(trace, list(derivatives))
    else:
        total = jnp.sum(jax.vmap(one)(trace, list(derivatives)), axis=0)
    found: list[Any | None] = [None for _ in graph.weights]
    for k, leaf in zip(of.reaching, of.weights.unpack(total), strict=True):
        # The derivative by a complex number is conjugate to that by its two parts.
        found[k] = jnp.conj(leaf) if jnp.iscomplexobj(leaf) else leaf
    return found
