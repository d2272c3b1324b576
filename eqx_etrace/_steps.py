"""`steps` and `evolve`: a window with an exact gradient inside, or with none."""

import dataclasses
import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._forward import Setting, forward
from ._graph import ETraceGraph
from ._inputs import Inputs, read_inputs, specs_of, window_of
from ._jacobian import prepare
from ._multi_step import forward_from, moved_trace, with_edge
from ._place import WHOLE, over_devices, spreads
from ._saving import plan
from ._stage import Frozen
from ._step import check_trace, init_trace, merge_graph, read_state
from ._step_credit import instantiate, is_inexact
from ._synthetic import bootstraps, synthetic, with_lesson
from ._window import local_reads


def steps(
    graph: ETraceGraph, params: PyTree, state: PyTree, trace: PyTree, xs: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """A window of steps, exact inside and with the trace at its start; a pure function.

    Differentiated with respect to `params` (and `xs`) the gradient is that of
    backpropagation through the window, plus dL/dh at its start times the trace: what
    truncated backpropagation leaves out, as far as the learning rule keeps it. This
    holds for every graph, whatever its `vjp`.

    **Arguments:**

    - `graph`, `params`, `state`, `trace`: as for `eqx_etrace.step`.
    - `xs`: the inputs of all steps, time in front: (K, ...), or (K, B, ...) for a
      batched graph. Parts that do not change are wrapped in
      `eqx_etrace.SingleStepData`.

    **Returns:** `(outs, state, trace)`: the outputs of all steps, time in front, and
    the state and trace after the last. The cotangents of `state` and `trace` are zero
    by definition.

    **Raises:** `ValueError` that names the first leaf that does not fit.

    !!! example

        ```python
        def loss(params):
            outs, new_state, new_trace = eqx_etrace.steps(
                graph, params, state, trace, xs
            )
            return jnp.sum((outs - targets) ** 2), (new_state, new_trace)

        grads, (state, trace) = jax.grad(loss, has_aux=True)(params)
        ```
    """
    if graph.exits is not None:
        raise ValueError(
            f"steps: got a graph of the rule {type(graph.rule).__name__} with a signal "
            "or filter of its own, expected the exact signal: within a window the "
            "gradient is that of backpropagation. Use `step` or `value_and_grad`."
        )
    inputs = read_inputs(graph, xs)
    leaves, start = read_state(graph, params, state)
    check_trace(graph, trace)
    if spreads(graph):
        return _over_devices(graph, steps, params, state, trace, xs)
    weights, prepared = prepare(graph, leaves)
    arrays, static = eqx.partition(graph, eqx.is_array)
    core: Any = _core  # pyright cannot see through the decorator
    outs, new, trace = core(
        (Frozen.of(static), (inputs.moving, inputs.steps)),
        arrays,
        weights,
        tuple(prepared),
        start,
        trace,
        inputs.leaves,
    )
    return _outputs(graph, outs), _state(graph, new), trace


def evolve(
    graph: ETraceGraph, params: PyTree, state: PyTree, trace: PyTree, xs: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """Many steps forward, the trace carried along, and no gradient.

    For the part of a sequence that is not learnt from: a warm-up, a delay. Memory for
    the derivatives does not grow with the number of steps.

    **Arguments:** as for `eqx_etrace.steps`; `trace` may be None for zeros.

    **Returns:** `(outs, state, trace)` as `eqx_etrace.steps` does. Their derivatives
    are zero.

    **Raises:** `ValueError` that names the first leaf that does not fit.

    !!! example

        ```python
        _, state, trace = eqx_etrace.evolve(graph, params, state, None, xs)
        ```
    """
    inputs = read_inputs(graph, xs)
    leaves, start = read_state(graph, params, state)
    if trace is None:
        trace = init_trace(graph)
    check_trace(graph, trace)
    if spreads(graph):
        return _over_devices(graph, evolve, params, state, trace, xs)
    given = leaves, start, trace, inputs.leaves
    leaves, start, trace, xs_leaves = jax.lax.stop_gradient(given)
    weights, prepared = prepare(graph, leaves)
    setting = Setting(graph, weights, prepared, inputs.moving, inputs.steps)
    inputs = Inputs(xs_leaves, inputs.moving, inputs.steps)
    outs, new, trace = _evolve(setting, start, trace, inputs)
    return _outputs(graph, outs), _state(graph, new), trace


def _over_devices(
    graph: ETraceGraph,
    fun: Any,
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    xs: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    """`steps` or `evolve`, each device with its own samples."""
    assert graph.place is not None
    batch, sequence = graph.place.batch, graph.place.sequence
    specs = WHOLE, batch, batch, specs_of(graph, xs)
    run = over_devices(graph, fun, specs, (sequence, batch, batch))
    return run(params, state, trace, xs)


_WINDOW = 32


def _evolve(setting: Setting, state: Any, trace: Any, inputs: Inputs) -> Any:
    length = min(_WINDOW, inputs.steps)
    full = (inputs.steps - 1) // length
    pairs = list(zip(inputs.leaves, inputs.moving, strict=True))
    moving = [leaf for leaf, moves in pairs if moves]

    def body(carry: Any, slices: Any) -> Any:
        rest = iter(slices)
        xs = [next(rest) if moves else leaf for leaf, moves in pairs]
        count = len(slices[0]) if slices else length
        now = dataclasses.replace(setting, steps=count)
        outs, state, trace = _move(now, carry[0], carry[1], xs)
        return (state, trace), outs

    def window(carry: Any, number: Any) -> Any:
        return body(carry, window_of(moving, number, length))

    carry, first = jax.lax.scan(window, (state, trace), jnp.arange(full))
    carry, last = body(carry, [array[full * length :] for array in moving])
    first = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in first]
    outs = [jnp.concatenate(pair) for pair in zip(first, last, strict=True)]
    return outs, *carry


def _outputs(graph: ETraceGraph, leaves: Any) -> PyTree:
    return jtu.tree_unflatten(graph.out_leaves.treedef, leaves)


def _state(graph: ETraceGraph, leaves: Any) -> PyTree:
    table = graph.state_leaves
    return jtu.tree_unflatten(table.treedef, table.join(leaves))


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(
    static: tuple[Frozen, tuple[tuple[bool, ...], int]],
    arrays: Any,
    weights: Any,
    prepared: Any,
    state: Any,
    trace: Any,
    xs: Any,
) -> tuple[Any, Any, Any]:
    graph = merge_graph(static[0], arrays)
    setting = Setting(graph, weights, prepared, *static[1])
    return _move(setting, state, trace, xs)


def _move(setting: Setting, state: Any, trace: Any, xs: Any) -> tuple[Any, Any, Any]:
    made = plan(setting.graph, local_reads(setting.graph))
    ran = forward(setting, state, xs, None, made, outputs=True)
    return ran.outs, ran.state, moved_trace(setting, ran, state, trace, xs, None)


def _core_fwd(static: Any, *primals: Any) -> tuple[Any, Any]:
    perturbed = jtu.tree_map(lambda leaf: leaf.perturbed, primals[-1])
    values = jtu.tree_map(lambda leaf: leaf.value, primals)
    arrays, weights, prepared, state, trace, xs = values
    graph = merge_graph(static[0], arrays)
    setting = Setting(graph, weights, prepared, *static[1])
    moving = enumerate(perturbed)
    moved = tuple(i for i, moves in moving if moves and is_inexact(xs[i]))

    def full(weights: Any, hidden: Any, changed: Any) -> Any:
        inputs = list(xs)
        for i, leaf in zip(moved, changed, strict=True):
            inputs[i] = leaf
        ran = forward_from(setting, weights, state, hidden, inputs, None)
        return [
            leaf for leaf in (*ran.state, *(ran.outs or ())) if is_inexact(leaf)
        ], ran

    hidden = [state[i] for i in graph.hidden.leaves]
    changed = [xs[i] for i in moved]
    _, pull, ran = jax.vjp(full, weights, hidden, changed, has_aux=True)
    new = moved_trace(setting, ran, state, trace, xs, None)
    local = None
    if bootstraps(graph):
        local = weights, hidden, [ran.state[i] for i in graph.hidden.leaves]
    kept = arrays, pull, trace, dict.fromkeys(moved), local
    return (ran.outs, ran.state, new), kept


def _core_bwd(static: Any, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    arrays, pull, trace, moved, local = residuals
    graph = merge_graph(static[0], arrays)
    of_outs, of_state, _ = cotangents
    of_state = list(of_state)
    if bootstraps(graph):
        guess = synthetic(graph, local[0], local[2])
        for i, more in zip(graph.hidden.leaves, guess, strict=True):
            of_state[i] = instantiate(of_state[i]) + more
    given = [
        instantiate(cotangent)
        for cotangent, spec in zip(
            (*of_state, *of_outs),
            (*graph.state_leaves.parts.specs, *graph.out_leaves.specs),
            strict=True,
        )
        if is_inexact(spec)
    ]
    of_weights, edge, of_moved = pull(given)
    of_x: list[Any] = [None] * graph.x_leaves.count
    for i, cotangent in zip(moved, of_moved, strict=True):
        of_x[i] = cotangent
    total = with_edge(graph, of_weights, trace, edge)
    if bootstraps(graph):
        total = with_lesson(graph, local[0], local[1], edge, total)
    return None, tuple(total), None, None, None, of_x


_core.defvjp(_core_fwd, _core_bwd, symbolic_zeros=True)
