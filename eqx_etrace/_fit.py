"""`fit`: a loop over batches, which may end after any of them and go on from there."""

import contextlib
import dataclasses
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import PyTree

from ._callbacks import Callback
from ._checkpoint import Checkpoint, save_checkpoint
from ._drive import Reduction, value_and_grad, without_nan
from ._errors import describe, sentence
from ._forward import renew_trace
from ._graph import ETraceGraph
from ._learn import learn
from ._objective import count, weighted
from ._step import init_trace


Evaluate = Callable[[Checkpoint], Mapping[str, Any]]
_NAMES = ("xs", "targets", "mask", "reset", "signal")


class _Found(NamedTuple):
    """Of one batch; on the device until somebody asks."""

    sums: dict[str, tuple[Any, Any]]
    """Per metric its sum over what counts, and how much that is."""
    finite: Any
    """Whether the updated params are."""
    lost: tuple[Any, Any] | None
    """Where there is a loss per sample: how many samples have one that is not finite,
    and the first of them."""


# On the device: one batch.


def _updates(
    graph: ETraceGraph,
    loss_fn: Callable[..., Any],
    optimiser: optax.GradientTransformation,
    every: int | None,
    window: int | None,
    reduction: Reduction,
    has_aux: bool,
    skip_nonfinite: bool,
) -> Callable[..., Any]:
    """What `learn` returns, or the same with one update for all steps."""
    if every is not None:
        if window is not None or reduction != "sum":
            raise ValueError(
                f"every: got {every} with window={window!r} and reduction="
                f"{reduction!r}, expected it alone: the gradients of so many steps are "
                "added up in one window. Leave out the others, or `every`."
            )
        return learn(
            graph,
            loss_fn,
            optimiser,
            every=every,
            has_aux=has_aux,
            skip_nonfinite=skip_nonfinite,
        )
    gradient = value_and_grad(
        graph,
        loss_fn,
        window=window,
        reduction=reduction,
        has_aux=has_aux,
        skip_nonfinite=skip_nonfinite,
    )

    def fun(params: Any, opt_state: Any, state: Any, trace: Any, **batch: Any) -> Any:
        losses, grads, state, trace = gradient(params, state, trace, **batch)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return losses, optax.apply_updates(params, updates), opt_state, state, trace

    return fun


def _emptied(graph: ETraceGraph, trace: PyTree) -> PyTree:
    """The zero trace; random keys go on, so that no two sequences draw the same."""
    return renew_trace(init_trace(graph), trace, jnp.asarray(True))


def _has_keys(trace: PyTree) -> bool:
    leaves = jtu.tree_leaves(trace)
    return any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)


def _sums(graph: ETraceGraph, losses: Any, aux: Any, mask: Any) -> Any:
    found = {"loss": (jnp.sum(losses), count(mask, losses.shape, losses.dtype))}
    if not isinstance(aux, Mapping) or "loss" in aux:
        got = f"the keys {sorted(aux)}" if isinstance(aux, Mapping) else describe(aux)
        expected = "a dict of numbers, none of them `loss`"
        remedy = "`fit` takes their means as metrics."
        raise ValueError(sentence("aux of loss_fn", got, expected, remedy))
    shapes = [losses.shape[:1]]
    if graph.batch is not None:
        shapes.append((*shapes[0], graph.batch))
    if mask is not None and jnp.ndim(mask) == 2:
        shapes = shapes[1:]
    for name, values in aux.items():
        if jnp.shape(values) not in shapes:
            got = f"{describe(values)} for all steps"
            expected = " or ".join(map(str, shapes))
            remedy = "Give one number, or one per sample as the mask has it."
            raise ValueError(sentence(f"aux of loss_fn, {name}", got, expected, remedy))
        values = jnp.asarray(values).astype(losses.dtype)
        total = count(mask, values.shape, losses.dtype)
        found[name] = weighted(values, mask)[0], total
    return found


def _lost(losses: Any) -> Any:
    if losses.ndim == 1:
        return None
    kept = jnp.all(jnp.isfinite(losses), axis=0)
    return jnp.sum(~kept), jnp.argmin(kept)


def _all_finite(tree: PyTree) -> Any:
    each = [jnp.all(jnp.isfinite(leaf)) for leaf in jtu.tree_leaves(tree)]
    return jnp.all(jnp.stack(each))


def _batch_fn(
    graph: ETraceGraph,
    run: Callable[..., Any],
    has_aux: bool,
    carry: bool,
    initial: PyTree,
    skip_nonfinite: bool,
) -> Callable[..., Any]:
    def fun(
        params: Any, opt_state: Any, state: Any, trace: Any, batch: dict[str, Any]
    ) -> Any:
        new = state if initial is None and not carry else initial
        past = trace
        if not carry:  # None costs less than zeros.
            past = _emptied(graph, trace) if _has_keys(trace) else None
        losses, params, opt_state, *end = run(
            params, opt_state, state, past, **batch, initial=new
        )
        if not carry:
            end = [state, _emptied(graph, end[1])]
        losses, aux = losses if has_aux else (losses, {})
        lost, mask = _lost(losses), batch.get("mask")
        if skip_nonfinite:
            mask = without_nan(mask, losses)
            losses = jnp.nan_to_num(losses, nan=0.0)
        sums = _sums(graph, losses, aux, mask)
        if skip_nonfinite:
            one = jnp.ones((), losses.dtype)
            sums["skipped samples"] = lost[0].astype(losses.dtype), one
            lost = None
        return _Found(sums, _all_finite(params), lost), params, opt_state, *end

    return fun


# On the host.


def _check_count(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and value >= 1):
        raise ValueError(
            f"{name}: got {value!r}, expected an integer of at least 1. It counts "
            "batches."
        )


def _own(graph: ETraceGraph, start: Any) -> Checkpoint:
    """A copy, as arrays whose types stay the same over a batch."""
    if not isinstance(start, Checkpoint):
        remedy = "Make one, with step 0."
        raise ValueError(sentence("start", describe(start), "a Checkpoint", remedy))
    trace = init_trace(graph) if start.trace is None else start.trace
    copy = jtu.tree_map(
        # With a dtype it is not weakly typed, which would compile a second time.
        lambda leaf: jnp.array(leaf, dtype=jnp.asarray(leaf).dtype),
        start._replace(trace=trace, step=None),
    )
    return copy._replace(step=operator.index(start.step))


def _arguments(batch: Any) -> dict[str, Any]:
    got = describe(batch)
    if isinstance(batch, Mapping):
        if {"xs", "targets"} <= set(batch) <= set(_NAMES):
            return dict(batch)
        got = f"a dict of {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list):
        if len(batch) in (2, 3):
            return dict(zip(_NAMES, batch, strict=False))
        got = f"a {type(batch).__name__} of {len(batch)}"
    expected = "(xs, targets), (xs, targets, mask), or a dict of them"
    remedy = f"A dict may have {', '.join(_NAMES)}."
    raise ValueError(sentence("batches", got, expected, remedy))


def _fetched(found: list[_Found], step: int) -> list[_Found]:
    """What was found up to this step, on the host, if all of it is finite."""
    found = jax.device_get(found)
    for at, one in enumerate(found, step - len(found) + 1):
        loss = one.sums["loss"][0]
        if not np.isfinite(loss):
            who = ""
            if one.lost is not None:
                count, first = map(int, one.lost)
                who = f" in sample {first}" + f" and {count - 1} more" * (count > 1)
            raise FloatingPointError(
                f"loss: got {loss} at step {at}{who}, expected a finite number. Lower "
                "the learning rate, clip the gradient, or look at that batch."
            )
        if not one.finite:
            raise FloatingPointError(
                f"params: got some that are not finite after the update of step {at}, "
                "expected finite numbers. Look for a square root or logarithm of zero "
                "in model and loss, or clip the gradient."
            )
    return found


def _metrics(found: list[_Found]) -> dict[str, float]:
    metrics = {}
    # JAX has sorted them.
    for name in sorted(found[0].sums, key=lambda name: name != "loss"):
        total, weight = (sum(float(one.sums[name][i]) for one in found) for i in (0, 1))
        metrics[name] = total / weight if weight else math.nan
    return metrics


def _numbers(found: Mapping[str, Any], metrics: dict[str, float]) -> dict[str, float]:
    for name, value in found.items():
        if name in metrics or np.size(value) != 1:
            got = f"{name!r} with {describe(value)}"
            expected = f"one number under a name other than {', '.join(metrics)}"
            remedy = "Rename it, or take its mean."
            raise ValueError(sentence("evaluate", got, expected, remedy))
    return {name: float(value) for name, value in found.items()}


@dataclasses.dataclass
class _Host:
    """What is told and written of a run."""

    graph: ETraceGraph
    callbacks: Sequence[Callback]
    evaluate: Evaluate | None
    path: str | os.PathLike[str] | None
    found: list[_Found] = dataclasses.field(default_factory=list)
    """Of the batches since the last report."""

    def report(self, now: Checkpoint) -> None:
        metrics = _metrics(_fetched(self.found, now.step))
        self.found = []
        if self.evaluate is not None:
            metrics |= _numbers(self.evaluate(now), metrics)
        for callback in self.callbacks:
            callback(now.step, dict(metrics))

    def save(self, now: Checkpoint) -> None:
        self.found = _fetched(self.found, now.step)
        if self.path is not None:
            save_checkpoint(self.path, self.graph, now)

    def rescue(self, now: Checkpoint) -> None:
        """Save after an error, what is finite and was not given away to a batch."""
        if not any(leaf.is_deleted() for leaf in jtu.tree_leaves(now[:4])):
            with contextlib.suppress(FloatingPointError):
                self.save(now)


def fit(
    graph: ETraceGraph,
    loss_fn: Callable[..., Any],
    optimiser: optax.GradientTransformation,
    start: Checkpoint,
    batches: Iterable[Any],
    *,
    every: int | None = None,
    window: int | None = None,
    reduction: Reduction = "sum",
    has_aux: bool = False,
    skip_nonfinite: bool = False,
    carry: bool = True,
    initial: PyTree = None,
    callbacks: Sequence[Callback] = (),
    evaluate: Evaluate | None = None,
    report_every: int = 1,
    path: str | os.PathLike[str] | None = None,
    save_every: int | None = None,
    donate: bool = False,
) -> Checkpoint:
    """Learn from batches, one after the other, and tell of it on the way.

    A loop on the host around `eqx_etrace.learn` or `eqx_etrace.value_and_grad`, for
    what comes in batches: a stream in chunks, or new sequences each time. It may end
    after any batch; from the checkpoint that it returns, or has written, a second call
    goes on bit for bit as one call would have.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returned.
    - `loss_fn`, `has_aux`, `skip_nonfinite`: as for `eqx_etrace.value_and_grad`. An
      `aux` is a dict of numbers, whose means are metrics; so is how many samples of a
      batch were skipped.
    - `optimiser`: any optax transformation.
    - `start`: a `Checkpoint`. Its `step` counts the batches that were read; its `trace`
      may be None, for zeros. Its arrays are copied and stay usable.
    - `batches`: any iterable of `(xs, targets)`, of `(xs, targets, mask)`, or of dicts
      with these names and, if need be, `reset` and `signal`: the arguments of
      `eqx_etrace.value_and_grad`. Within a call, batches of one shape compile once.
      The caller skips what was read: `itertools.islice(batches, start.step, None)`.
    - `every`: the number of steps to an update, as for `eqx_etrace.learn`. Unless
      given, each batch makes one update, from the gradient of `value_and_grad` with
      this `window` and `reduction`.
    - `carry`: whether state and trace go on from batch to batch. If not, each batch
      begins with `start.state`, which the result has, too, and an empty trace.
    - `initial`: the state after a `reset` within a batch. Unless given, zeros, or with
      `carry=False` `start.state`.
    - `callbacks`: functions of `(step, metrics)`, the batches read so far and a dict of
      floats, such as `eqx_etrace.progress()` and `eqx_etrace.CSVLogger(path)`.
    - `evaluate`: a function of the `Checkpoint` of now, called before the callbacks. It
      returns a dict of further metrics, which may be empty.
    - `report_every`: how many batches to a report, which evaluates and calls. Metrics
      are means since the last report, over all steps (and samples) that the mask
      leaves, by weight; `loss` is the first. At the end there is a report of the rest.
    - `path`: a file for `eqx_etrace.save_checkpoint`. It is written every `save_every`
      batches and at the end, be that the last batch, a `KeyboardInterrupt` or another
      error: it then holds all up to the last batch that was complete.
    - `donate`: hand the memory of each checkpoint to the next one. What `evaluate`
      keeps of it is deleted, and after an interrupt within a batch nothing is written:
      the last of `save_every` counts.

    **Returns:** the `Checkpoint` after the last batch; without a batch that is `start`.

    **Raises:** `FloatingPointError` with the step at which a loss or a param was not
    finite, and the sample where `loss_fn` gives a loss for each, at the next report or
    before the next file is written, which stays as it was; `ValueError` that names the
    argument. Between reports and files nothing waits for the device.

    !!! example

        ```python
        import optax

        optimiser = optax.adam(1e-3)
        start = eqx_etrace.Checkpoint(params, optimiser.init(params), state, trace, 0)
        batches = [(xs, targets)] * 4

        def show(step, metrics):
            print(step, metrics["loss"])

        now = eqx_etrace.fit(
            graph, loss_fn, optimiser, start, batches, callbacks=[show], report_every=2
        )
        net = graph.model(now.params)
        ```
    """
    _check_count("report_every", report_every)
    if save_every is not None:
        _check_count("save_every", save_every)
        if path is None:
            raise ValueError(
                f"save_every: got {save_every} without a path, expected both. Give the "
                "file to save to as `path`."
            )
    options = every, window, reduction, has_aux, skip_nonfinite
    run = _updates(graph, loss_fn, optimiser, *options)
    fun = _batch_fn(graph, run, has_aux, carry, initial, skip_nonfinite)
    fun = jax.jit(fun, donate_argnums=(0, 1, 2, 3) if donate else ())
    host, now = _Host(graph, callbacks, evaluate, path), _own(graph, start)
    try:
        for batch in batches:
            found, *new = fun(*now[:4], _arguments(batch))
            now = Checkpoint._make([*new, now.step + 1])
            host.found.append(found)
            if now.step % report_every == 0:
                host.report(now)
            if save_every is not None and now.step % save_every == 0:
                host.save(now)
        if host.found:
            host.report(now)
    except BaseException:
        host.rescue(now)
        raise
    host.save(now)
    return now
