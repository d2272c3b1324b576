"""Samples whose numbers are not finite any more, and a batch without them."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._errors import describe, sentence
from ._forward import Setting, at_step, renew, renew_trace
from ._graph import ETraceGraph
from ._inputs import Inputs
from ._jacobian import prepare, run
from ._objective import Objective
from ._step import init_trace, read_state


if TYPE_CHECKING:
    from ._drive import Sequence


def check_lanes_of(loss: Any) -> None:
    """Raise `ValueError` unless there is one loss for each sample of a batch."""
    if not loss.shape:
        remedy = "Compile with a batch, and return one loss per sample, (B,)."
        got, expected = describe(loss), "one loss per sample, to leave out some"
        raise ValueError(sentence("loss_fn", got, expected, remedy))


def without_lost(
    graph: ETraceGraph,
    objective: Objective,
    drive: Callable[..., Any],
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    inputs: Inputs,
    rest: "Sequence",
    initial: PyTree,
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """What `drive` gives for these arguments, without the samples that are lost.

    Another sample stands in for each of them, with no weight in the loss. Their losses
    are NaN, and they begin anew."""
    kept = _finite(graph, objective, params, state, trace, inputs, rest, initial)
    lanes = jnp.where(kept, jnp.arange(graph.batch), jnp.argmax(kept))

    def stand_in(axis: int, tree: PyTree) -> PyTree:
        lead = (graph.batch,)
        return jtu.tree_map(
            lambda a: jnp.take(a, lanes, axis) if a.shape[axis:][:1] == lead else a,
            tree,
        )

    leaves = [
        stand_in(int(moves), leaf)
        for leaf, moves in zip(inputs.leaves, inputs.moving, strict=True)
    ]
    mask = jnp.ones((), bool) if rest.mask is None else rest.mask
    mask = mask[:, None] if mask.ndim == 1 else mask
    mask = jnp.where(kept, mask, jnp.zeros((), mask.dtype))
    mine = stand_in(1, rest._replace(mask=None))._replace(
        mask=jnp.broadcast_to(mask, (inputs.steps, len(kept)))
    )
    zero, lost = init_trace(graph), ~kept
    if trace is not None:
        trace = renew_trace(zero, trace, lost)
    losses, grads, new, trace = drive(
        params,
        stand_in(0, state),
        trace,
        dataclasses.replace(inputs, leaves=leaves),
        mine,
        initial,
    )
    some = jnp.any(kept)
    grads = jtu.tree_map(lambda g: jnp.where(some, g, jnp.zeros((), g.dtype)), grads)
    start = jtu.tree_map(jnp.zeros_like, new) if initial is None else initial
    return (
        jtu.tree_map(ft.partial(_blank, kept), losses),
        grads,
        renew(start, new, lost),
        renew_trace(zero, trace, lost),
    )


def _blank(kept: Any, leaf: Any) -> Any:
    """NaN, or zero where there is none, for the samples that were lost."""
    if leaf.shape[1:2] != kept.shape:
        return leaf
    inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
    blank = jnp.asarray(jnp.nan if inexact else 0).astype(leaf.dtype)
    return jnp.where(kept.reshape(-1, *(1 for _ in leaf.shape[2:])), leaf, blank)


def _finite(
    graph: ETraceGraph,
    objective: Objective,
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    inputs: Inputs,
    rest: "Sequence",
    initial: PyTree,
) -> Bool[Array, " batch"]:
    """Whether the state, the trace and all losses that count are, per sample."""
    leaves, start = read_state(graph, params, state)
    new = jtu.tree_map(jnp.zeros_like, state) if initial is None else initial
    fresh = read_state(graph, params, new)[1]
    weights, prepared = prepare(graph, leaves)
    setting = Setting(graph, weights, prepared, inputs.moving, inputs.steps)
    one = jax.vmap(ft.partial(run, graph, setting.env))

    def body(carry: Any, step: "Sequence") -> tuple[Any, None]:
        state, kept = carry
        if step.reset is not None:
            state = renew(fresh, state, step.reset)
        state, out, _ = one(state, at_step(setting, inputs.leaves, step.xs))
        out = jtu.tree_unflatten(graph.out_leaves.treedef, out)
        loss, _ = objective.of_step(out, step.targets)
        counts = True if step.mask is None else step.mask.astype(bool)
        fine = jnp.isfinite(loss) | jnp.logical_not(counts)
        return (state, kept & fine & _all_finite(graph, state)), None

    steps = rest._replace(signal=None)
    carry = start, _all_finite(graph, (start, trace))
    (_, kept), _ = jax.lax.scan(body, carry, steps, length=inputs.steps)
    return kept


def _all_finite(graph: ETraceGraph, tree: PyTree) -> Bool[Array, " batch"]:
    found = jnp.ones(graph.batch or 1, bool)
    for leaf in jtu.tree_leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            found &= jnp.all(jnp.isfinite(leaf).reshape(len(found), -1), axis=1)
    return found
