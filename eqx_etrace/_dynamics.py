"""Global rules at work: their traces from step to step, and what these give."""

import functools as ft
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._jacobian import shared_env, value_of
from ._jaxpr import evaluate, has_custom_vjp
from ._rules import Dynamics, GlobalRule, Space, UseJacobian, WeightUse
from ._space import Spaces, spaces


def init_global(graph: ETraceGraph, rule: GlobalRule) -> PyTree:
    """The zero trace."""
    of = spaces(graph)

    def one(sample: Any) -> PyTree:
        return rule.init(of.sizes, sample)

    if graph.batch is None:
        return one(jnp.zeros((), jnp.int32))
    return jax.vmap(one)(jnp.arange(graph.batch))


class _Sample(NamedTuple):
    """One step of one sample, as maps of vectors."""

    graph: ETraceGraph
    of: Spaces
    weights: Sequence[Any]
    prepared: Sequence[Any]
    state: Sequence[Any]
    x: Sequence[Any]

    @property
    def at(self) -> tuple[Any, Any]:
        """The hidden state and the weights."""
        states = [self.state[i] for i in self.graph.hidden.leaves]
        weights = [self.weights[k] for k in self.of.reaching]
        return self.of.states.pack(states), self.of.weights.pack(weights)

    def env(self, states: Any, weights: Mapping[int, Any]) -> dict[int, Any]:
        """What the step reads, from this hidden state and with these weights."""
        graph, leaves, values = self.graph, list(self.state), list(self.weights)
        new = self.of.states.unpack(states)
        for i, leaf in zip(graph.hidden.leaves, new, strict=True):
            leaves[i] = leaf
        for number, leaf in weights.items():
            values[self.of.reaching[number]] = leaf
        inputs = graph.program.inputs[graph.param_leaves.count :]
        read = dict(zip(inputs, (*leaves, *self.x), strict=True))
        return shared_env(graph, values, self.prepared) | read

    def doors(self, values: Mapping[int, Any]) -> Any:
        """The new hidden state, from all values of the step."""
        return self.of.states.pack([values[ref] for ref in self.graph.hidden.doors])

    def step(self, states: Any, weights: Any) -> Any:
        leaves = dict(enumerate(self.of.weights.unpack(weights)))
        return self.doors(evaluate(self.graph.body, self.env(states, leaves)))

    def by_use(self, uses: Sequence[WeightUse], numbers: Sequence[int]) -> UseJacobian:
        """What `Dynamics.by_use` gives, by one reverse pass per hidden number."""
        graph, of, dtype = self.graph, self.of, self.of.states.dtype
        drives = {use.drive: Space((use.y,), dtype) for use in uses}
        own = {number: Space((of.weights.specs[number],), dtype) for number in numbers}

        def moved(states: Any, weights: Any, changes: Any) -> Any:
            leaves = {n: space.unpack(weights[n])[0] for n, space in own.items()}
            added = {
                ref: space.unpack(changes[ref])[0] for ref, space in drives.items()
            }
            tap = {ref: ft.partial(jnp.add, change) for ref, change in added.items()}
            values = evaluate(graph.body, self.env(states, leaves), tap=tap)
            read = [graph.program.equations[use.edge[0]].inputs for use in uses]
            operands = (tuple(value_of(values, ref) for ref in refs) for refs in read)
            return self.doors(values), tuple(operands)

        reaching = [self.weights[k] for k in of.reaching]
        weights = {n: space.pack([reaching[n]]) for n, space in own.items()}
        changes = {ref: jnp.zeros(space.size, dtype) for ref, space in drives.items()}
        at, _ = self.at
        _, pull, operands = jax.vjp(moved, at, weights, changes, has_aux=True)
        D, by_weights, by_drives = jax.vmap(pull)(jnp.eye(at.size, dtype=dtype))
        # In the order asked for: that of a dict ends with JAX.
        columns = jnp.zeros((at.size, 0), dtype), *(by_weights[n] for n in numbers)
        found = tuple(by_drives[ref] for ref in drives)
        return UseJacobian(D, jnp.concatenate(columns, axis=1), found, operands)


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
        now = _Sample(graph, of, weights, prepared, state, x)
        return rule.update(Dynamics(now.step, *now.at, transposed, now.by_use), trace)

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
