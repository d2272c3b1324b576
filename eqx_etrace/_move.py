"""The trace over many steps, for rules that have no other form of that."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from ._forward import Setting, at_step, moving_leaves, renew, renew_trace
from ._jacobian import run
from ._step import advance, init_trace


def move_by_steps(
    setting: Setting,
    state: Sequence[Any],
    trace: PyTree | None,
    xs: Sequence[Any],
    reset: Any | None,
) -> PyTree:
    """The trace after a window of steps from this state; None is the zero trace."""
    graph, zero = setting.graph, init_trace(setting.graph)

    def body(carry: Any, now: Any) -> tuple[Any, None]:
        (state, trace), (slices, fresh) = carry, now
        if fresh is not None:
            state = renew(setting.initial, state, fresh)
            trace = renew_trace(zero, trace, fresh)
        x = at_step(setting, xs, slices)

        def one(state: Any, x: Any) -> tuple[Any, Any]:
            new, _, saved = run(graph, setting.env, state, x)
            return new, saved

        per_sample = one if graph.batch is None else jax.vmap(one)
        new, saved = per_sample(state, x)
        args = setting.weights, setting.prepared, state, trace, x, saved
        return (new, advance(graph, *args)[0]), None

    start = list(state), zero if trace is None else trace
    steps = moving_leaves(setting, xs), reset
    (_, trace), _ = jax.lax.scan(body, start, steps, length=setting.steps)
    return trace
