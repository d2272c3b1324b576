"""`init_trace` and `step`: one online step, a pure function with its own derivative.

With the single-step VJP the gradient of a related weight is l . e: the learning signal
of this step times the trace of this step. With the multi-step VJP (here for a window of
one step) it is the ordinary gradient through the step plus dL/dh_{t-1} . e_{t-1}. In
both the cotangent of the state and of the trace is zero by definition: credit to the
past flows through the trace alone.
"""

import dataclasses
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._at_exits import (
    gains,
    less_this_step,
    of_use,
    slopes,
    tapped,
    zeros_at_exits,
)
from ._dynamics import advance_global, init_global
from ._errors import describe, dtype_of, is_array_like, sentence
from ._given import read_given
from ._graph import ETraceGraph
from ._jacobian import (
    GroupJacobian,
    jacobians,
    moving_operands,
    prepare,
    relation_jacobian,
    run,
    shared_env,
)
from ._place import WHOLE, over_devices, placed, spreads
from ._rules import GlobalRule, LocalRule
from ._stage import Frozen
from ._step_credit import (
    credit,
    credit_at_exits,
    heard_of,
    instantiate,
    is_inexact,
    per_sample,
    silent_slots,
)
from ._synthetic import bootstraps, synthetic, with_lesson


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

    if isinstance(graph.rule, GlobalRule):
        return placed(graph, init_global(graph, graph.rule))

    def lead(leaf: Any) -> Any:
        return (
            leaf
            if graph.batch is None
            else jnp.zeros((graph.batch, *leaf.shape), leaf.dtype)
        )

    rule = graph.rule
    traces = tuple(rule.kept(r, rule.init(r)) for r in graph.relations)
    return placed(graph, jtu.tree_map(lead, traces))


def step(
    graph: ETraceGraph,
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    x: PyTree,
    *,
    signal: PyTree = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """One time step of the model, with the trace carried along; a pure function.

    Differentiate it with respect to `params` (and `x`): take `jax.grad` of a loss of
    `out` inside each step of a `jax.lax.scan` for memory flat in time, or around the
    whole scan, for the same gradient.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.
    - `params`: `graph.params(model)`, or what an optimiser made of it.
    - `state`, `x`: as given to `compile`, the batch in front for a batched graph.
    - `trace`: `init_trace(graph)`, or what the last step returned.
    - `signal`: for a rule with `Modulatory` the modulator, with `TargetProjection` the
      target of this step; else nothing.

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
    param_leaves, state_leaves, x_leaves = read_step(graph, params, state, x)
    check_trace(graph, trace)
    given = read_given(graph, signal)
    if place := spreads(graph):
        batch = place.batch
        specs = WHOLE, batch, batch, batch, batch
        run = over_devices(graph, _told, specs, batch)
        return run(params, state, trace, x, given)
    weights, prepared = prepare(graph, param_leaves)
    out, new_state, new_trace = one_step(
        graph, weights, prepared, state_leaves, trace, x_leaves, given
    )
    return (
        jtu.tree_unflatten(graph.out_leaves.treedef, out),
        jtu.tree_unflatten(
            graph.state_leaves.treedef, graph.state_leaves.join(new_state)
        ),
        new_trace,
    )


def _told(
    graph: ETraceGraph, params: Any, state: Any, trace: Any, x: Any, signal: Any
) -> tuple[PyTree, PyTree, PyTree]:
    return step(graph, params, state, trace, x, signal=signal)


def one_step(
    graph: ETraceGraph,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    x: Any,
    given: Any = None,
) -> tuple[Any, Any, Any]:
    """`step` on leaves, from the prepared weights."""
    arrays, static = eqx.partition(graph, eqx.is_array)
    core: Any = _core  # pyright cannot see through the decorator
    frozen = Frozen.of(static)
    weights, prepared = tuple(weights), tuple(prepared)
    return core(frozen, arrays, weights, prepared, state, trace, given, x)


def read_step(
    graph: ETraceGraph, params: PyTree, state: PyTree, x: PyTree
) -> tuple[list[Any], list[Any], list[Any]]:
    """The leaves of what a step takes, checked; those of the state in parts."""
    remedy = "Pass an input like the one the graph was compiled for, or compile again."
    leaves = read_state(graph, params, state)
    return *leaves, _arrays(graph.x_leaves.flatten(x, graph.batch, remedy))


def read_state(
    graph: ETraceGraph, params: PyTree, state: PyTree
) -> tuple[list[Any], list[Any]]:
    """The same without an input."""
    remedy = "Pass params as `graph.params(model)` gives them."
    p = graph.param_leaves.flatten(params, None, remedy)
    remedy = "Pass a state like the one the graph was compiled for, or compile again."
    s = graph.state_leaves.flatten(state, graph.batch, remedy)
    return _arrays(p), graph.state_leaves.split(_arrays(s))


def _arrays(leaves: list[Any]) -> list[Any]:
    """Python numbers and NumPy arrays as what JAX makes of them."""
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]


def check_trace(graph: ETraceGraph, trace: PyTree) -> None:
    expected = jax.eval_shape(lambda: init_trace(graph))
    remedy = "Start from `init_trace(graph)` of this very graph and batch size."
    if jtu.tree_structure(trace) != jtu.tree_structure(expected):
        got, wanted = jtu.tree_structure(trace), jtu.tree_structure(expected)
        raise ValueError(sentence("trace", str(got), str(wanted), remedy))
    pairs = zip(
        jtu.tree_leaves_with_path(trace), jtu.tree_leaves(expected), strict=True
    )
    for (path, leaf), spec in pairs:
        fits = is_array_like(leaf) and jnp.shape(leaf) == spec.shape
        if not fits or dtype_of(leaf) != spec.dtype:
            where = "trace" + jtu.keystr(path)
            if isinstance(graph.rule, LocalRule):
                relation = graph.relations[path[0].idx]
                where = f"trace[{path[0].idx}] of {relation.name}"
            got, wanted = describe(leaf), describe(spec)
            raise ValueError(sentence(where, got, wanted, remedy))


def merge_graph(static: Frozen, arrays: PyTree) -> ETraceGraph:
    return eqx.combine(arrays, static.thaw())


def _forward(
    graph: ETraceGraph,
    weights: Any,
    prepared: Any,
    state: Any,
    x: Any,
    at_door: Any = None,
    cut_at_door: bool = False,
    edge: Any = None,
    at_exit: Any = None,
    averages: Any = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    def one(state: Any, x: Any, at_door: Any, at_exit: Any, averages: Any) -> Any:
        shared = shared_env(graph, weights, prepared)
        more, tap = tapped(graph, at_exit, averages)
        return run(
            graph,
            shared,
            state,
            x,
            at_door=at_door,
            cut_at_door=cut_at_door,
            edge=(edge or {}) | more,
            tap=tap,
        )

    axes = (0, 0, 0, 0, 0)
    return per_sample(graph, one, axes)(state, x, at_door, at_exit, averages)


def advance(
    graph: ETraceGraph,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    x: Any,
    saved: Any,
) -> tuple[Any, tuple[GroupJacobian, ...], Any]:
    """The new trace, and the Jacobians and slopes that it was made with."""
    if isinstance(graph.rule, GlobalRule):
        args = weights, prepared, state, trace, x
        return advance_global(graph, graph.rule, *args), (), None
    shared = shared_env(graph, weights, prepared)

    def one(state: Any, saved: Any) -> Any:
        return jacobians(graph, shared, state, saved)

    found = per_sample(graph, one, (0, 0))(state, saved)
    env = shared | dict(zip(graph.saved, saved, strict=True))
    gain: Any = [()] * len(graph.groups)
    slope = None
    if graph.rule.filters:
        gain = per_sample(graph, ft.partial(gains, graph, shared), (0, 0))(saved, found)
    if any(relation.passes for relation in graph.relations):
        sloping = per_sample(graph, ft.partial(slopes, graph, shared), (0, 0, 0))
        slope = sloping(state, saved, gain)
    new, whole = [], graph.rule.whole(graph.relations, trace)
    for relation, old in zip(graph.relations, whole, strict=True):
        jacobian = relation_jacobian(graph, relation, found[relation.group], env)
        jacobian = dataclasses.replace(jacobian, gain=gain[relation.group])
        if relation.passes:
            mine = of_use(graph, relation, slope)
            jacobian = dataclasses.replace(jacobian, slope=mine)
        moving = moving_operands(graph, relation)
        now = graph.rule.update_all(relation, old, jacobian, moving, graph.batch)
        new.append(graph.rule.kept(relation, now))
    return tuple(new), found, slope


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    static: Frozen,
    arrays: Any,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    given: Any,
    x: Any,
) -> tuple[Any, Any, Any]:
    del given
    graph = merge_graph(static, arrays)
    new_state, out, saved = _forward(graph, weights, prepared, state, x)
    new_trace, *_ = advance(graph, weights, prepared, state, trace, x, saved)
    return out, new_state, new_trace


def _core_fwd(static: Frozen, *primals: Any) -> tuple[Any, Any]:
    """The step, and a function from cotangents to derivatives by weights, by x, and by
    the hidden leaves: the new ones (single-step) or the old ones (multi-step)."""
    perturbed = jtu.tree_map(lambda leaf: leaf.perturbed, primals[-1])
    values = jtu.tree_map(lambda leaf: leaf.value, primals)
    arrays, weights, prepared, state, trace, given, x = values
    graph = merge_graph(static, arrays)
    single = graph.vjp == "single-step"
    hidden = [state[i] for i in graph.hidden.leaves]
    # A local rule does without what a weight with a trace does to other units at once;
    # a global one counts it when it comes from the new state.
    whole = isinstance(graph.rule, GlobalRule)
    related = {relation.edge for relation in graph.relations}
    cut = single and not whole
    edge = dict.fromkeys(related, jax.lax.stop_gradient) if cut else None
    taps = graph.exits is not None and graph.rule.filters
    made = averages = None
    if any(relation.passes for relation in graph.relations):
        _, _, saved = _forward(graph, weights, prepared, state, x)
        made = advance(graph, weights, prepared, state, trace, x, saved)
        averages = less_this_step(graph, made[0], made[2])
    moving = tuple(i for i, moves in enumerate(perturbed) if moves and is_inexact(x[i]))

    def full(weights: Any, moved: Any, leaves: Any) -> Any:
        inputs, old = list(x), list(state)
        for i, leaf in zip(moving, moved, strict=True):
            inputs[i] = leaf
        if not single:
            for i, leaf in zip(graph.hidden.leaves, leaves, strict=True):
                old[i] = leaf
        at = (None, leaves) if taps else (leaves if single else None, None)
        result = _forward(
            graph, weights, prepared, old, inputs, at[0], whole, edge, at[1], averages
        )
        new_state, out, _ = result
        return [leaf for leaf in (*new_state, *out) if is_inexact(leaf)], result

    leaves = [jnp.zeros_like(leaf) for leaf in hidden] if single else hidden
    leaves = zeros_at_exits(graph) if taps else leaves
    moved = [x[i] for i in moving]
    _, pull, (new_state, out, saved) = jax.vjp(
        full, weights, moved, leaves, has_aux=True
    )
    if made is None:
        made = advance(graph, weights, prepared, state, trace, x, saved)
    new_trace, found, _ = made
    kept = (new_trace, found) if single else (trace, None)
    marks = dict.fromkeys(moving)
    local = None if graph.exits is None else (weights, prepared, saved, given)
    if bootstraps(graph):
        local = weights, hidden, [new_state[i] for i in graph.hidden.leaves]
    return (out, new_state, new_trace), (arrays, pull, kept, marks, local)


def _core_bwd(static: Frozen, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, pull, (trace, found), marks, local = residuals
    graph = merge_graph(static, arrays)
    of_out, of_state, _ = cotangents
    of_state = list(of_state)
    if bootstraps(graph):
        weights, old, new = local
        for i, more in zip(
            graph.hidden.leaves, synthetic(graph, weights, new), strict=True
        ):
            of_state[i] = instantiate(of_state[i]) + more
    given = [
        instantiate(cotangent)
        for cotangent, spec in zip(
            (*of_state, *of_out),
            (*graph.state_leaves.parts.specs, *graph.out_leaves.specs),
            strict=True,
        )
        if is_inexact(spec)
    ]
    of_weights, of_moved, derivatives = pull(given)
    silent = tuple(
        silent_slots(graph, group, of_state, single=found is not None)
        for group in graph.groups
    )
    gradients = of_weights
    if bootstraps(graph):
        weights, old, _ = local
        gradients = with_lesson(graph, weights, old, derivatives, gradients)
    elif local is not None:
        derivatives, heard, learned = heard_of(
            graph, local, derivatives, of_out, of_state
        )
        gradients = credit_at_exits(graph, trace, heard, learned, gradients)
    if derivatives is not None:
        gradients = credit(graph, trace, derivatives, found, silent, gradients)
    of_x: list[Any] = [None] * graph.x_leaves.count
    for i, cotangent in zip(marks, of_moved, strict=True):
        of_x[i] = cotangent
    return None, gradients, None, None, None, None, of_x


_core.defvjp(_core_fwd, _core_bwd, symbolic_zeros=True)
