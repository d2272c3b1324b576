"""`learn`: a sequence with an update of the parameters every few steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from ._drive import Sequence, check_window, read, renewed, sequence
from ._graph import ETraceGraph
from ._inputs import Inputs, window_of
from ._objective import Objective, weighted
from ._place import spreads
from ._step import check_trace, init_trace, read_state, step


def learn(
    graph: ETraceGraph,
    loss_fn: Callable[..., Any],
    optimiser: optax.GradientTransformation,
    *,
    every: int = 1,
    has_aux: bool = False,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, PyTree, PyTree, PyTree]]:
    """A function that drives a sequence and updates the parameters on the way.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.
    - `loss_fn`: as for `eqx_etrace.value_and_grad`.
    - `optimiser`: any optax transformation, with or without extra state. Labels for
      `optax.multi_transform` that have the structure of a callable model are given as a
      function of the params, `lambda _: labels`, since Optax would call them.
    - `every`: the number of steps whose gradients are added up to one update. With 1,
      the default, it is the loop one would write with `eqx_etrace.step`; with more,
      these steps are taken in one window. Steps that are left over at the end make an
      update of their own.
    - `has_aux`, `skip_nonfinite`: as for `eqx_etrace.value_and_grad`; a sample is
      skipped for one update, and begins anew at the next.

    **Returns:** a pure function
    `fn(params, opt_state, state, trace, xs, targets, mask=None, *, reset=None,
    initial=None, signal=None)` that returns `(losses, params, opt_state, state,
    trace)`; the arguments are those of `eqx_etrace.value_and_grad`, and `opt_state` is
    `optimiser.init(params)`, or what the last call returned. Everything that goes in
    and comes out again may be donated: `jax.jit(fn, donate_argnums=(0, 1, 2, 3))`.

    A trace that was built with older parameters is kept, so that with updates on the
    way the gradient is that of no fixed parameters; small learning rates make this
    small.

    **Raises:** `ValueError` that names the argument and both shapes.

    !!! example

        ```python
        import optax

        optimiser = optax.adam(1e-3)
        fun = jax.jit(eqx_etrace.learn(graph, loss_fn, optimiser, every=10))
        losses, params, opt_state, state, trace = fun(
            params, optimiser.init(params), state, trace, xs, targets
        )
        ```
    """
    check_window(every, "every")
    objective = Objective(loss_fn, has_aux)
    optimiser = optax.with_extra_args_support(optimiser)

    def update(params: PyTree, opt_state: PyTree, grads: PyTree) -> tuple[Any, Any]:
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def fun(
        params: PyTree,
        opt_state: PyTree,
        state: PyTree,
        trace: PyTree,
        xs: PyTree,
        targets: PyTree,
        mask: Any = None,
        *,
        reset: Any = None,
        initial: PyTree = None,
        signal: PyTree = None,
    ) -> tuple[PyTree, PyTree, PyTree, PyTree, PyTree]:
        inputs, rest = read(
            graph, objective, xs, targets, mask, reset, signal, skip_nonfinite
        )
        read_state(graph, params, state)
        trace = init_trace(graph) if trace is None else trace
        check_trace(graph, trace)
        params, state, trace = jtu.tree_map(jnp.asarray, (params, state, trace))

        def chunk(carry: Any, part: Sequence) -> Any:
            params, opt_state, state, trace = carry
            count = len(jtu.tree_leaves(part)[0])
            one = every == 1 and not (skip_nonfinite or spreads(graph))
            run = one_step if one else window
            losses, grads, state, trace = run(params, state, trace, part, count)
            return (*update(params, opt_state, grads), state, trace), losses

        def window(
            params: Any, state: Any, trace: Any, part: Sequence, count: int
        ) -> Any:
            mine = Inputs(_leaves(inputs, part.xs), inputs.moving, count)
            given = params, state, trace, mine, part, initial
            return sequence(graph, objective, None, *given, skip=skip_nonfinite)

        def one_step(
            params: Any, state: Any, trace: Any, part: Sequence, count: int
        ) -> Any:
            del count
            now = jtu.tree_map(lambda array: array[0], part)
            state, trace = renewed(graph, state, trace, now.reset, initial)
            leaves = _leaves(inputs, now.xs)
            x = jtu.tree_unflatten(graph.x_leaves.treedef, leaves)

            def loss(params: Any) -> Any:
                out, *new = step(graph, params, state, trace, x, signal=now.signal)
                value, aux = objective.of_step(out, now.targets)
                total, kept = weighted(value, now.mask)
                return total, (kept, aux, new)

            found, grads = jax.value_and_grad(loss, has_aux=True)(params)
            kept, aux, (state, trace) = found[1]
            losses = (kept, aux) if has_aux else kept
            return jtu.tree_map(lambda a: a[None], losses), grads, state, trace

        carry = params, opt_state, state, trace
        losses, carry = _chunks(chunk, every, inputs.steps, carry, rest)
        return losses, *carry

    return fun


def _leaves(inputs: Inputs, moving: list[Any]) -> list[Any]:
    rest = iter(moving)
    pairs = zip(inputs.leaves, inputs.moving, strict=True)
    return [next(rest) if moves else leaf for leaf, moves in pairs]


def _chunks(chunk: Any, every: int, steps: int, carry: Any, rest: Sequence) -> Any:
    full, tail = divmod(steps, every)
    found = []
    if full:

        def window(carry: Any, number: Any) -> Any:
            return chunk(carry, window_of(rest, number, every))

        carry, losses = jax.lax.scan(window, carry, jnp.arange(full))
        found.append(jtu.tree_map(lambda a: a.reshape(-1, *a.shape[2:]), losses))
    if tail:
        part = jtu.tree_map(lambda a: a[full * every :], rest)
        carry, losses = chunk(carry, part)
        found.append(losses)
    return jtu.tree_map(lambda *a: jnp.concatenate(a), *found), carry
