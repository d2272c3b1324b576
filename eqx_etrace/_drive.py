"""`value_and_grad` and `grad`: sequences in windows, with memory flat in time."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._forward import Setting, at_step, moving_leaves, renew, renew_trace
from ._given import read_given
from ._graph import ETraceGraph
from ._inputs import Inputs, check_lanes, check_time, read_inputs, window_of
from ._jacobian import prepare
from ._lanes import check_lanes_of, without_lost
from ._multi_step import multi_step_window
from ._objective import Losses, Objective, count
from ._place import WHOLE, over_devices, spreads
from ._rules import GlobalRule
from ._space import trace_bytes
from ._step import check_trace, init_trace, one_step, read_state
from ._window import single_step_window


Reduction = Literal["sum", "mean"]
HORIZON = 32
"""The window of a multi-step graph, unless another is asked for."""
MANY = 8
"""From so many windows on the last one is like the others, if it is as long."""


class Sequence(NamedTuple):
    """What has time in front: the moving leaves of x, targets, mask, resets, and what
    the learning signal is given."""

    xs: list[Any]
    targets: PyTree
    mask: Any | None
    reset: Any | None
    signal: PyTree


class Carry(NamedTuple):
    """What goes from window to window."""

    state: list[Any]
    trace: Any
    gradients: list[Any]


def value_and_grad(
    graph: ETraceGraph,
    loss_fn: Callable[..., Any],
    *,
    window: int | None = None,
    reduction: Reduction = "sum",
    has_aux: bool = False,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[PyTree, PyTree, PyTree, PyTree]]:
    r"""A function that drives a sequence and gives its losses and gradient.

    It runs through the sequence once, forward in time, and its memory does not grow
    with the length: state, trace and gradient go from one window of steps to the next.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.
    - `loss_fn`: `loss_fn(out, target)` for one step. `out` is what the model returns
      (with the batch in front for a batched graph). It gives a scalar or, for a batched
      graph, one loss per sample, (B,), whose sum counts.
    - `window`: how many steps are taken at once. For a graph with
      `vjp="single-step"` it changes speed and memory alone, not the gradient: with
      `window=1` every step moves the whole trace, with more the trace is read and
      written once a window; None picks a window whose vectors take about as much memory
      as the trace. For `vjp="multi-step"` it is the horizon of exact credit: within a
      window the gradient is that of backpropagation, from before it comes what the
      trace holds; None is 32.
    - `reduction`: `"sum"`, the gradient of the sum of the losses, or `"mean"`, that of
      their mean; both over what the mask leaves.
    - `has_aux`: whether `loss_fn` returns `(loss, aux)`.
    - `skip_nonfinite`: whether samples of a batch whose state, trace or loss is not
      finite leave the others alone. Their losses are NaN (of an `aux` what is no float
      is zero), they have no part in the gradient, nor in a mean, and begin anew: from
      `initial`, with an empty trace. It takes one loss per sample, and a second run of
      the plain step beforehand.

    **Returns:** a pure function
    `fn(params, state, trace, xs, targets, mask=None, *, reset=None, initial=None,
    signal=None)` that returns `(losses, grads, state, trace)`:

    - `params`: `graph.params(model)`; `state`: as for `compile`.
    - `trace`: that of the steps before, or None for zeros, which costs nothing. With
      the state and trace of a first call a second one goes on where that ended: two
      calls on halves give the gradient of one on the whole.
    - `xs`: the inputs, time in front: (T, ...), or (T, B, ...) for a batched graph.
      Parts that do not change are wrapped in `eqx_etrace.SingleStepData`.
    - `targets`: a pytree with time in front.
    - `mask`: (T,), or (T, B) where `loss_fn` gives one loss per sample: booleans, or
      weights of the losses. A loss at the last step only is a mask that is zero but for
      the last. What is masked runs all the same: pad with finite numbers.
    - `reset`: (T,), or (T, B) for a batched graph: where true, this step begins a new
      sequence, from the state `initial` (zeros, unless given) and an empty trace.
    - `signal`: for a rule with `Modulatory` the modulators, time in front; for one with
      `TargetProjection` what is projected, if not `targets`.
    - `losses`: (T,), or (T, B), times the mask; with `has_aux` a pair of these and of
      the `aux` of all steps.
    - `grads`: like `params`.

    **Raises:** `ValueError` that names the argument and both shapes.

    !!! example

        ```python
        def loss_fn(out, target):
            return jnp.sum((out - target) ** 2)

        fun = jax.jit(eqx_etrace.value_and_grad(graph, loss_fn))
        losses, grads, state, trace = fun(params, state, None, xs, targets)
        ```
    """
    check_window(window)
    if reduction not in ("sum", "mean"):
        raise ValueError(
            f"reduction: got {reduction!r}, expected 'sum' or 'mean'. Use 'sum' for a "
            "gradient that adds up over calls."
        )
    objective = Objective(loss_fn, has_aux)

    def fun(
        params: PyTree,
        state: PyTree,
        trace: PyTree,
        xs: PyTree,
        targets: PyTree,
        mask: Any = None,
        *,
        reset: Any = None,
        initial: PyTree = None,
        signal: PyTree = None,
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        inputs, rest = read(
            graph, objective, xs, targets, mask, reset, signal, skip_nonfinite
        )
        given = params, state, trace, inputs, rest, initial
        losses, grads, state, trace = sequence(
            graph, objective, window, *given, skip=skip_nonfinite
        )
        if reduction == "mean":
            values, mask = losses[0] if has_aux else losses, rest.mask
            if skip_nonfinite:
                mask = without_nan(mask, values)
            total = count(mask, values.shape, values.dtype)
            grads = jtu.tree_map(lambda g: g / total.astype(g.dtype), grads)
        return losses, grads, state, trace

    return fun


def without_nan(mask: Any | None, losses: Any) -> Any:
    """The mask, zero where a sample was skipped."""
    kept = jnp.isfinite(losses)
    if mask is None:
        return kept
    lanes: Any = mask[:, None] if mask.ndim < kept.ndim else mask
    return jnp.where(kept, lanes, jnp.zeros((), lanes.dtype))


def grad(
    graph: ETraceGraph,
    loss_fn: Callable[..., Any],
    *,
    window: int | None = None,
    reduction: Reduction = "sum",
    has_aux: bool = False,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[PyTree, ...]]:
    """`value_and_grad` without the losses.

    **Arguments:** as for `eqx_etrace.value_and_grad`.

    **Returns:** a function of the same arguments that returns `(grads, state, trace)`,
    with `has_aux` `(grads, aux, state, trace)`.

    !!! example

        ```python
        fun = jax.jit(eqx_etrace.grad(graph, loss_fn))
        grads, state, trace = fun(params, state, None, xs, targets)
        ```
    """
    both = value_and_grad(
        graph,
        loss_fn,
        window=window,
        reduction=reduction,
        has_aux=has_aux,
        skip_nonfinite=skip_nonfinite,
    )

    @ft.wraps(both)
    def fun(*args: Any, **kwargs: Any) -> tuple[PyTree, ...]:
        losses, grads, *rest = both(*args, **kwargs)
        return (grads, losses[1], *rest) if has_aux else (grads, *rest)

    return fun


def check_window(window: Any, name: str = "window") -> None:
    whole = isinstance(window, int) and not isinstance(window, bool)
    if window is not None and not (whole and window >= 1):
        raise ValueError(
            f"{name}: got {window!r}, expected an integer of at least 1. It counts "
            "steps."
        )


def read(
    graph: ETraceGraph,
    objective: Objective,
    xs: PyTree,
    targets: PyTree,
    mask: Any,
    reset: Any,
    signal: PyTree = None,
    per_sample: bool = False,
) -> tuple[Inputs, Sequence]:
    """Check what has time in front, and that there is a loss per sample if need be."""
    inputs = read_inputs(graph, xs, ("targets", targets), ("mask", mask))
    targets = check_time("targets", targets, inputs.steps)
    loss = objective.spec(graph, targets)
    if per_sample:
        check_lanes_of(loss)
    mask = check_lanes("mask", mask, inputs.steps, graph.batch, bool(loss.shape))
    reset = check_lanes("reset", reset, inputs.steps, graph.batch, True)
    if reset is not None:
        reset = reset.astype(bool)
        if graph.batch is not None and reset.ndim == 1:
            reset = jnp.broadcast_to(reset[:, None], (inputs.steps, graph.batch))
    pairs = zip(inputs.leaves, inputs.moving, strict=True)
    moving = [leaf for leaf, moves in pairs if moves]
    signal = read_given(graph, signal, targets, inputs.steps)
    return inputs, Sequence(moving, targets, mask, reset, signal)


def sequence(
    graph: ETraceGraph,
    objective: Objective,
    window: int | None,
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    inputs: Inputs,
    rest: Sequence,
    initial: PyTree,
    skip: bool = False,
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """Losses, gradient, state and trace of a sequence that has been checked.

    With `skip` without the samples whose numbers are not finite."""
    leaves, start = read_state(graph, params, state)
    if trace is not None:
        check_trace(graph, trace)
    if spreads(graph):
        given = params, state, trace, inputs, rest, initial
        return _over_devices(graph, objective, window, *given, skip=skip)
    if skip:
        drive = ft.partial(sequence, graph, objective, window)
        given = params, state, trace, inputs, rest, initial
        return without_lost(graph, objective, drive, *given)
    weights, pull, prepared = jax.vjp(
        lambda leaves: prepare(graph, leaves), leaves, has_aux=True
    )
    if rest.reset is not None:
        new = jtu.tree_map(jnp.zeros_like, state) if initial is None else initial
        initial = read_state(graph, params, new)[1]
    setting = Setting(graph, weights, prepared, inputs.moving, inputs.steps, initial)
    length = window_length(graph, window)
    result, carry = _windows(
        setting, objective, length, Carry(start, trace, []), inputs, rest
    )
    (of_params,) = pull(tuple(carry.gradients))
    losses, aux = result
    return (
        (losses, aux) if objective.has_aux else losses,
        jtu.tree_unflatten(graph.param_leaves.treedef, of_params),
        _as_state(graph, carry.state),
        carry.trace,
    )


def _over_devices(
    graph: ETraceGraph,
    objective: Objective,
    window: int | None,
    params: PyTree,
    state: PyTree,
    trace: PyTree,
    inputs: Inputs,
    rest: Sequence,
    initial: PyTree,
    skip: bool,
) -> tuple[PyTree, PyTree, PyTree, PyTree]:
    """`sequence`, each device with its own samples; the gradients are added up once."""
    place = graph.place
    assert place is not None
    if trace is None and isinstance(graph.rule, GlobalRule):
        trace = init_trace(graph)  # Samples draw different numbers.
    batch, sequences = place.batch, place.sequence
    whole = rest.mask is not None and rest.mask.ndim == 1
    each: Any = [sequences] * len(rest)
    cut = Sequence(*each)._replace(mask=WHOLE if whole else sequences)

    def one(
        graph: ETraceGraph, params: Any, state: Any, trace: Any, leaves: Any, *rest: Any
    ) -> Any:
        mine = dataclasses.replace(inputs, leaves=leaves)
        given = params, state, trace, mine, *rest
        losses, grads, *end = sequence(graph, objective, window, *given, skip=skip)
        return losses, place.added(grads), *end

    leaves = [sequences if moves else batch for moves in inputs.moving]
    specs = WHOLE, batch, batch, leaves, cut, batch
    run = over_devices(graph, one, specs, (sequences, WHOLE, batch, batch))
    return run(params, state, trace, inputs.leaves, rest, initial)


def _as_state(graph: ETraceGraph, leaves: list[Any]) -> PyTree:
    table = graph.state_leaves
    return jtu.tree_unflatten(table.treedef, table.join(leaves))


def _windows(
    setting: Setting,
    objective: Objective,
    length: int,
    carry: Carry,
    inputs: Inputs,
    rest: Sequence,
) -> tuple[Any, Carry]:
    """All windows; the last one stands outside of the scan: it may be shorter, and a
    trace that nobody reads is not computed. Not so the last of many that is as long as
    they are: that costs less than a second program, in memory and to compile."""
    graph, steps = setting.graph, inputs.steps
    length = min(length, steps)
    full = (steps - 1) // length
    if steps % length == 0 and full >= MANY:
        full += 1
    run = ft.partial(_window, setting, objective, length == 1, inputs)
    zeros = [jnp.zeros_like(weight) for weight in setting.weights]
    if not full and length > 1:
        result, new = run(carry, rest)
        return result, new
    trace = init_trace(graph) if carry.trace is None else carry.trace
    carry = Carry(carry.state, trace, zeros)

    def body(carry: Carry, part: Sequence) -> tuple[Carry, Any]:
        result, new = run(carry, part)
        total = map(jnp.add, carry.gradients, new.gradients)
        return new._replace(gradients=list(total)), result

    def window(carry: Carry, number: Any) -> tuple[Carry, Any]:
        return body(carry, window_of(rest, number, length))

    carry, first = jax.lax.scan(window, carry, jnp.arange(full))
    first = jtu.tree_map(lambda a: a.reshape(-1, *a.shape[2:]), first)
    if full * length == steps:
        return first, carry
    tail = jtu.tree_map(lambda array: array[full * length :], rest)
    carry, last = body(carry, tail)
    return jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), first, last), carry


def _window(
    setting: Setting,
    objective: Objective,
    per_step: bool,
    inputs: Inputs,
    carry: Carry,
    part: Sequence,
) -> tuple[Any, Carry]:
    losses = Losses(setting.graph, objective, part.targets, part.mask, part.signal)
    steps = len(jtu.tree_leaves(part)[0])
    setting = dataclasses.replace(setting, steps=steps)
    rest = iter(part.xs)
    pairs = zip(inputs.leaves, inputs.moving, strict=True)
    xs = [next(rest) if moves else leaf for leaf, moves in pairs]
    if per_step:
        run = _one_step
    elif setting.graph.vjp == "single-step":
        run = single_step_window
    else:
        run = multi_step_window
    result, gradients, state, trace = run(
        setting, carry.state, carry.trace, xs, part.reset, losses
    )
    return result, Carry(state, trace, gradients)


def _one_step(
    setting: Setting, state: Any, trace: Any, xs: Any, reset: Any, losses: Losses
) -> tuple[Any, list[Any], list[Any], Any]:
    """A window of one step, by the derivative of `step`."""
    graph = setting.graph
    slices = [leaf[0] for leaf in moving_leaves(setting, xs)]
    x = at_step(setting, xs, slices)
    if reset is not None:
        assert setting.initial is not None
        state = renew(setting.initial, state, reset[0])
        trace = renew_trace(init_trace(graph), trace, reset[0])

    signal = jtu.tree_map(lambda array: array[0], losses.signal)

    def outputs(weights: Any) -> Any:
        out, *new = one_step(graph, weights, setting.prepared, state, trace, x, signal)
        inexact = [o for o in out if jnp.issubdtype(o.dtype, jnp.inexact)]
        return inexact, (out, *new)

    _, pull, (out, state, trace) = jax.vjp(outputs, setting.weights, has_aux=True)
    result, given = losses([leaf[None] for leaf in out])
    (gradients,) = pull([leaf[0] for leaf in given])
    return result, list(gradients), state, trace


def renewed(
    graph: ETraceGraph, state: PyTree, trace: PyTree, reset: Any | None, initial: PyTree
) -> tuple[PyTree, PyTree]:
    """State and trace, those of a new sequence where `reset` says so."""
    if reset is None:
        return state, trace
    if initial is None:
        initial = jtu.tree_map(jnp.zeros_like, state)
    zero = init_trace(graph)
    return renew(initial, state, reset), renew_trace(zero, trace, reset)


def window_length(graph: ETraceGraph, window: int | None) -> int:
    """How many steps a window has where this was asked for."""
    if not graph.rule.windowed and graph.vjp == "single-step":
        return 1  # The rule has no other form of the same gradient.
    return window or pick_window(graph)


def pick_window(graph: ETraceGraph) -> int:
    """A power of two of steps whose vectors take about the memory of the trace."""
    if graph.vjp == "multi-step":
        return HORIZON
    avals = [graph.program.avals[ref] for ref in graph.saved]
    step = sum(aval.size * jnp.dtype(aval.dtype).itemsize for aval in avals)
    trace = trace_bytes(graph)
    length = 16
    while length < 128 and 2 * length * step <= trace:
        length *= 2
    return length
