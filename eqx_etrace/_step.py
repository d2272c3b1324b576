"""`init_trace` and `step`: one online step, a pure function with its own derivative.

With the single-step VJP the gradient of a related weight is l . e: the learning signal
of this step times the trace of this step. With the multi-step VJP (here for a window of
one step) it is the ordinary gradient through the step plus dL/dh_{t-1} . e_{t-1}. In
both the cotangent of the state and of the trace is zero by definition: credit to the
past flows through the trace alone.
"""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._errors import describe, dtype_of, is_array_like, sentence
from ._graph import ETraceGraph
from ._jacobian import (
    GroupJacobian,
    jacobians,
    partial_signal,
    prepare,
    relation_jacobian,
    run,
    shared_env,
)
from ._stage import Frozen


def init_trace(graph: ETraceGraph) -> PyTree:
    """The zero trace: what every sequence starts with.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.

    **Returns:** a tuple with one entry per relation, in the order of
    `graph.relations`. For `DRTRL` an entry is a tuple of arrays, one per slot that
    keeps a trace, of the dtype of that state leaf and the shape `relation.op`
    gives, with the batch in front for a batched graph.

    !!! example

        ```python
        trace = eqx_etrace.init_trace(graph)
        ```
    """

    def lead(leaf: Any) -> Any:
        return leaf if graph.batch is None else jnp.zeros(
            (graph.batch, *leaf.shape), leaf.dtype
        )

    traces = tuple(graph.rule.init(relation) for relation in graph.relations)
    return jtu.tree_map(lead, traces)


def step(
    graph: ETraceGraph, params: PyTree, state: PyTree, trace: PyTree, x: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """One time step of the model, with the trace carried along; a pure function.

    Differentiate it with respect to `params` (and `x`): take `jax.grad` of a loss of
    `out` inside each step of a `jax.lax.scan` for memory flat in time, or around the
    whole scan, for the same gradient.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.
    - `params`: `graph.params(model)`, or what an optimiser made of it.
    - `state`, `x`: as given to `compile`; with a leading batch axis for a batched graph.
    - `trace`: `init_trace(graph)`, or what the last step returned.

    **Returns:** `(out, state, trace)`. `out` and `state` are what the model returns.
    The cotangents of `state` and `trace` are zero by definition.

    **Raises:** `ValueError` that names the first leaf whose structure, shape or dtype
    does not fit the graph.

    !!! example

        ```python
        def loss(params):
            out, new_state, new_trace = eqx_etrace.step(graph, params, state, trace, x)
            return jnp.sum((out - target) ** 2), (new_state, new_trace)

        grads, (state, trace) = jax.grad(loss, has_aux=True)(params)
        ```
    """
    param_leaves, state_leaves, x_leaves = _leaves(graph, params, state, x)
    _check_trace(graph, trace)
    weights, prepared = prepare(graph, param_leaves)
    arrays, static = eqx.partition(graph, eqx.is_array)
    out, new_state, new_trace = _core(
        Frozen.of(static), arrays, weights, tuple(prepared), state_leaves, trace, x_leaves
    )
    return (
        jtu.tree_unflatten(graph.out_leaves.treedef, out),
        jtu.tree_unflatten(graph.state_leaves.treedef, new_state),
        new_trace,
    )


def _leaves(
    graph: ETraceGraph, params: PyTree, state: PyTree, x: PyTree
) -> tuple[list[Any], list[Any], list[Any]]:
    batch = graph.batch
    remedy = "Pass params as `graph.params(model)` gives them."
    p = graph.param_leaves.flatten(params, None, remedy)
    remedy = "Pass a state like the one the graph was compiled for, or compile again."
    s = graph.state_leaves.flatten(state, batch, remedy)
    remedy = "Pass an input like the one the graph was compiled for, or compile again."
    return p, s, graph.x_leaves.flatten(x, batch, remedy)


def _check_trace(graph: ETraceGraph, trace: PyTree) -> None:
    expected = jax.eval_shape(lambda: init_trace(graph))
    remedy = "Start from `init_trace(graph)` of this very graph and batch size."
    if jtu.tree_structure(trace) != jtu.tree_structure(expected):
        got, wanted = jtu.tree_structure(trace), jtu.tree_structure(expected)
        raise ValueError(sentence("trace", str(got), str(wanted), remedy))
    for number, relation in enumerate(graph.relations):
        pairs = zip(
            jtu.tree_leaves(trace[number]),
            jtu.tree_leaves(expected[number]),
            strict=True,
        )
        for leaf, spec in pairs:
            fits = is_array_like(leaf) and jnp.shape(leaf) == spec.shape
            if not fits or dtype_of(leaf) != spec.dtype:
                where = f"trace[{number}] of {relation.name}"
                got, wanted = describe(leaf), describe(spec)
                raise ValueError(sentence(where, got, wanted, remedy))


def _merge(static: Frozen, arrays: PyTree) -> ETraceGraph:
    return eqx.combine(arrays, static.thaw())


def _per_sample(graph: ETraceGraph, fun: Any, axes: tuple[int | None, ...]) -> Any:
    """`fun` of one sample, or mapped over the batch along these axes."""
    return fun if graph.batch is None else jax.vmap(fun, in_axes=axes)


def _forward(
    graph: ETraceGraph,
    weights: Any,
    prepared: Any,
    state: Any,
    x: Any,
    at_door: Any = None,
    edge: Any = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    def one(weights: Any, prepared: Any, state: Any, x: Any, at_door: Any):
        shared = shared_env(graph, weights, prepared)
        return run(graph, shared, state, x, at_door=at_door, edge=edge)

    return _per_sample(graph, one, (None, None, 0, 0, 0))(
        weights, prepared, state, x, at_door
    )


def _advance(
    graph: ETraceGraph,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    saved: Any,
    *,
    within: bool,
) -> tuple[Any, tuple[GroupJacobian, ...]]:
    """The new trace, and the Jacobians it was made with."""

    def one(weights: Any, prepared: Any, state: Any, trace: Any, saved: Any):
        shared = shared_env(graph, weights, prepared)
        found = jacobians(graph, shared, state, saved, within=within)
        env = shared | dict(zip(graph.saved, saved, strict=True))
        new = tuple(
            graph.rule.update(
                relation,
                trace[number],
                relation_jacobian(graph, relation, found[relation.group], env),
            )
            for number, relation in enumerate(graph.relations)
        )
        return new, found

    return _per_sample(graph, one, (None, None, 0, 0, 0))(
        weights, prepared, state, trace, saved
    )


def _credit(
    graph: ETraceGraph,
    trace: Any,
    derivatives: list[Any],
    found: tuple[GroupJacobian, ...] | None,
    gradients: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Add to the gradients what the traces give for derivatives by the hidden leaves.

    With the Jacobians, the derivatives are by the new state and become the learning
    signal; without, they are by the old state and are the signal.
    """

    def signals(derivatives: Any, found: Any) -> Any:
        leaves = dict(enumerate(derivatives))
        per_group = [group.read(leaves) for group in graph.groups]
        if found is not None:
            per_group = [
                partial_signal(group, total, jacobian.within)
                for group, total, jacobian in zip(
                    graph.groups, per_group, found, strict=True
                )
            ]
        return [
            [relation.map.spread(v) for v in per_group[relation.group]]
            for relation in graph.relations
        ]

    spread = _per_sample(graph, signals, (0, 0))(derivatives, found)
    total = dict(zip(graph.weights, gradients, strict=True))
    for number, relation in enumerate(graph.relations):
        gradient = graph.rule.gradient(relation, trace[number], spread[number])
        total[relation.ref] = total[relation.ref] + gradient
    return tuple(total[ref] for ref in graph.weights)


def _inexact(leaves: Any) -> tuple[list[Any], list[Any]]:
    split = [], []
    for leaf in leaves:
        split[not jnp.issubdtype(leaf.dtype, jnp.inexact)].append(leaf)
    return split


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    static: Frozen,
    arrays: Any,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    x: Any,
) -> tuple[Any, Any, Any]:
    graph = _merge(static, arrays)
    new_state, out, saved = _forward(graph, weights, prepared, state, x)
    new_trace, _ = _advance(
        graph, weights, prepared, state, trace, saved, within=False
    )
    return out, new_state, new_trace


def _core_fwd(
    static: Frozen,
    arrays: Any,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    x: Any,
) -> tuple[Any, Any]:
    graph = _merge(static, arrays)
    single = graph.vjp == "single-step"
    hidden = [state[i] for i in graph.hidden.leaves]
    related = {relation.edge for relation in graph.relations}
    edge = dict.fromkeys(related, jax.lax.stop_gradient) if single else None
    x_inexact, _ = _inexact(x)

    def full(weights: Any, x_inexact: Any, at_door: Any, hidden: Any) -> Any:
        rest = list(state)
        for position, leaf in zip(graph.hidden.leaves, hidden, strict=True):
            rest[position] = leaf
        whole = _fill(x, x_inexact)
        new_state, out, saved = _forward(
            graph, weights, prepared, rest, whole, at_door, edge
        )
        inexact, _ = _inexact([*new_state, *out])
        return inexact, (new_state, out, saved)

    if single:
        zeros = [jnp.zeros_like(leaf) for leaf in hidden]
        fun = lambda w, x, d: full(w, x, d, hidden)  # noqa: E731 one of two
        args = (weights, x_inexact, zeros)
    else:
        fun = lambda w, x, h: full(w, x, None, h)  # noqa: E731 one of two
        args = (weights, x_inexact, hidden)
    _, pull, (new_state, out, saved) = jax.vjp(fun, *args, has_aux=True)
    new_trace, found = _advance(
        graph, weights, prepared, state, trace, saved, within=single
    )
    kept = (new_trace, found) if single else (trace, None)
    return (out, new_state, new_trace), (arrays, pull, kept, x)


def _core_bwd(static: Frozen, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, pull, (trace, found), x = residuals
    graph = _merge(static, arrays)
    of_out, of_state, _ = cotangents
    given = [
        cotangent
        for cotangent, spec in zip(
            [*of_state, *of_out],
            [*graph.state_leaves.specs, *graph.out_leaves.specs],
            strict=True,
        )
        if jnp.issubdtype(spec.dtype, jnp.inexact)
    ]
    of_weights, of_x, derivatives = pull(given)
    gradients = _credit(graph, trace, derivatives, found, of_weights)
    none = [None] * len(x)
    positions = [
        i for i, leaf in enumerate(x) if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    for position, cotangent in zip(positions, of_x, strict=True):
        none[position] = cotangent
    return None, gradients, None, None, None, none


def _fill(x: Any, inexact: Any) -> list[Any]:
    rest = iter(inexact)
    return [
        next(rest) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf for leaf in x
    ]


_core.defvjp(_core_fwd, _core_bwd)
