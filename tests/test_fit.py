"""`fit` against loops written by hand, and against itself where it was stopped."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import quick_options
from windows import assert_same, chain, each_square, squares

import eqx_etrace as etrace
from eqx_etrace._fit import _own


STEPS, B, BATCHES = 4, 3, 5
OPTIMISER = optax.adam(0.02)
RULES = {"drtrl": etrace.DRTRL(), "uoro": etrace.UORO(jax.random.key(3))}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Compiling is nearly all that these small problems cost."""
    quick = functools.partial(jax.jit, compiler_options=quick_options())
    monkeypatch.setattr(jax, "jit", quick)
    with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic needs it
        yield


@functools.cache
def _problem(rule="drtrl", batch=None, count=BATCHES):
    """A graph, a checkpoint to start from, and batches of a stream."""
    graph, params, state, xs, ts = chain(1, count * STEPS, batch, RULES[rule])
    trace = etrace.init_trace(graph)
    start = etrace.Checkpoint(params, OPTIMISER.init(params), state, trace, 0)
    parts = [jnp.split(array, count) for array in (xs, ts)]
    return graph, start, list(zip(*parts, strict=True))


def _identical(got, expected):
    """Bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def _fit(graph, start, batches, loss_fn=squares, **options):
    return etrace.fit(graph, loss_fn, OPTIMISER, start, batches, **options)


class Log(list):
    def __call__(self, step, metrics):
        self.append((step, metrics))


# The same numbers as by hand.


def _loop(fun, start, batches):
    """`fun(*checkpoint, **batch)` as `learn` gives it, batch after batch."""
    now, found = start, []
    for batch in batches:
        losses, *new = fun(*now[:4], **batch)
        now = etrace.Checkpoint._make([*new, now.step + 1])
        found.append(losses)
    return now, found


def _once(graph, loss_fn, **options):
    gradient = etrace.value_and_grad(graph, loss_fn, **options)

    def fun(params, opt_state, state, trace, **batch):
        losses, grads, *end = gradient(params, state, trace, **batch)
        updates, opt_state = OPTIMISER.update(grads, opt_state, params)
        return losses, optax.apply_updates(params, updates), opt_state, *end

    return jax.jit(fun)


@pytest.mark.parametrize("every", [1, 3])
def test_updates_every_few_steps_are_those_of_learn(every):
    graph, start, batches = _problem()
    fun = jax.jit(etrace.learn(graph, squares, OPTIMISER, every=every))
    named = [{"xs": xs, "targets": ts} for xs, ts in batches]
    expected, losses = _loop(fun, start, named)
    log = Log()
    got = _fit(graph, start, batches, every=every, callbacks=[log])
    _identical(got, expected)
    assert [step for step, _ in log] == [1, 2, 3, 4, 5]
    means = [metrics["loss"] for _, metrics in log]
    np.testing.assert_allclose(means, [np.mean(found) for found in losses], rtol=1e-14)


@pytest.mark.parametrize("options", [{}, {"window": 2, "reduction": "mean"}])
def test_an_update_for_a_batch_is_that_of_its_gradient(options):
    graph, start, batches = _problem()
    named = [{"xs": xs, "targets": ts} for xs, ts in batches]
    expected, _ = _loop(_once(graph, squares, **options), start, named)
    got = _fit(graph, start, iter(batches), **options)
    _identical(got, expected)


def _masked(batches):
    rng = np.random.default_rng(0)
    shape = STEPS, B
    masks = [rng.integers(0, 3, shape) / 2 for _ in batches]
    resets = [rng.uniform(size=shape) < 0.3 for _ in batches]
    names = ("xs", "targets", "mask", "reset")
    parts = zip(*zip(*batches, strict=True), masks, resets, strict=True)
    return [dict(zip(names, part, strict=True)) for part in parts]


def test_masks_and_resets():
    graph, start, batches = _problem(batch=B)
    batches = _masked(batches)
    fun = functools.partial(_once(graph, each_square), initial=start.state)
    expected, losses = _loop(fun, start, batches)
    log = Log()
    options = {"initial": start.state, "callbacks": [log], "report_every": 2}
    got = _fit(graph, start, batches, each_square, **options)
    _identical(got, expected)
    assert [step for step, _ in log] == [2, 4, 5]
    for (_, metrics), some in zip(log, ([0, 1], [2, 3], [4]), strict=True):
        total = sum(losses[i].sum() for i in some)
        weight = sum(batches[i]["mask"].sum() for i in some)
        assert metrics["loss"] == pytest.approx(float(total / weight), rel=1e-14)


@pytest.mark.parametrize("rule", RULES)
def test_new_sequences_begin_at_the_start(rule):
    """Each with an empty trace; but random signs are not drawn again."""
    graph, start, batches = _problem(rule)
    reset = jnp.arange(STEPS) == 2
    batches = [{"xs": xs, "targets": ts, "reset": reset} for xs, ts in batches]
    fun = functools.partial(_once(graph, squares), initial=start.state)
    now, zero = start, etrace.init_trace(graph)
    for batch in batches:
        empty = zero._replace(key=now.trace.key) if rule == "uoro" else None
        _, *new = fun(*now[:2], start.state, empty, **batch)
        now = etrace.Checkpoint._make([*new, now.step + 1])
    kept = zero._replace(key=now.trace.key) if rule == "uoro" else zero
    expected = now._replace(state=start.state, trace=kept)
    # Of another trace nothing is seen.
    used = jax.tree.map(
        lambda a: a + 1 if jnp.issubdtype(a.dtype, jnp.inexact) else a, start.trace
    )
    used = start._replace(trace=used)
    got = _fit(graph, used, batches, carry=False)
    # XLA rounds zeros that it knows of otherwise than those that it is given.
    assert_same(got[:4], expected[:4])
    _identical(got[2:], expected[2:])
    if rule == "uoro":
        assert jnp.any(
            jax.random.key_data(got.trace.key) != jax.random.key_data(zero.key)
        )


def test_what_comes_with_the_loss_is_a_metric():
    graph, start, batches = _problem(batch=B)
    batches = _masked(batches)[:2]

    def loss_fn(out, target):
        losses = each_square(out, target)
        return losses, {"close": losses < 1.0, "all": 2 * losses}

    log = Log()
    options = {"has_aux": True, "carry": False, "callbacks": [log], "report_every": 9}
    _fit(graph, start, batches, loss_fn, **options)
    fun = jax.jit(etrace.value_and_grad(graph, loss_fn, has_aux=True))
    params, opt_state = start[:2]
    close, weights, total = [], [], 0.0
    for batch in batches:
        batch = batch | {"initial": start.state}
        (losses, aux), grads, *_ = fun(params, start.state, None, **batch)
        updates, opt_state = OPTIMISER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        close.append(aux["close"])
        weights.append(batch["mask"])
        total += losses.sum()
    ((step, metrics),) = log
    assert step == 2
    assert list(metrics) == ["loss", "all", "close"]
    expected = np.average(np.stack(close), weights=np.stack(weights))
    assert metrics["close"] == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 1
    loss = float(total / np.sum(weights))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-12)
    assert metrics["all"] == pytest.approx(2 * loss, rel=1e-12)


# Stopped, and gone on with.

MODES = {"stream": {"every": 2}, "sequences": {"carry": False}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", RULES)
def test_it_goes_on_bit_for_bit(tmp_path, rule, mode):
    graph, start, batches = _problem(rule)
    run = functools.partial(etrace.fit, graph, squares, OPTIMISER, **MODES[mode])
    path = tmp_path / "run.eqx"
    seen = {}

    def keep(now):
        seen[now.step] = now
        return {}

    whole = run(start, batches, evaluate=keep)
    assert list(seen) == [1, 2, 3, 4, 5]
    _identical(seen[5], whole)

    part = run(start, batches[:2], path=path)
    _identical(part, seen[2])
    part = etrace.load_checkpoint(path, graph, like=start)
    _identical(part, seen[2])
    rest = itertools.islice(batches, part.step, None)
    _identical(run(part, rest), whole)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("where", ["callback", "data"])
def test_an_interrupt_leaves_the_last_whole_batch(tmp_path, where, donate):
    graph, start, batches = _problem()
    path, seen = tmp_path / "run.eqx", {}

    def keep(now):
        seen[now.step] = jax.tree.map(jnp.array, now[:4])
        return {}

    def interrupt(step, metrics):
        if step == 3 and where == "callback":
            raise KeyboardInterrupt

    def data():
        yield from batches[:3]
        raise KeyboardInterrupt

    options = {"path": path, "save_every": 2, "evaluate": keep, "donate": donate}
    with pytest.raises(KeyboardInterrupt):
        _fit(graph, start, data(), callbacks=[interrupt], **options)
    found = etrace.load_checkpoint(path, graph, like=start)
    assert found.step == 3
    _identical(found[:4], seen[3])


def test_an_interrupt_within_a_batch(tmp_path, monkeypatch):
    """Where its memory was given away, the file that there is stays."""
    graph, start, batches = _problem()
    saved = {}
    for donate in (False, True):
        path, jit = tmp_path / f"{donate}.eqx", jax.jit

        def jit_and_interrupt(fun, jit=jit, **options):
            compiled, calls = jit(fun, **options), itertools.count(1)

            def call(*args):
                found = compiled(*args)
                if next(calls) == 4:
                    raise KeyboardInterrupt
                return found

            return call

        with monkeypatch.context() as patched:
            patched.setattr(jax, "jit", jit_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                _fit(graph, start, batches, path=path, save_every=2, donate=donate)
        saved[donate] = etrace.load_checkpoint(path, graph, like=start).step
    assert saved == {False: 3, True: 2}


def test_what_is_donated_is_not_what_was_given():
    graph, start, batches = _problem()
    kept = []

    def keep(now):
        kept.append(now)
        return {}

    run = functools.partial(etrace.fit, graph, squares, OPTIMISER, start)
    for carry in (True, False):
        kept.clear()
        got = run(batches, donate=True, evaluate=keep, carry=carry)
        _identical(got, run(batches, carry=carry))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kept[0].params))


def test_no_batch_changes_nothing(tmp_path):
    graph, start, _ = _problem()
    start, log = start._replace(step=7), Log()
    got = _fit(graph, start, [], callbacks=[log])
    _identical(got, start)
    assert not log
    got = _fit(graph, start._replace(trace=None), iter([]))
    _identical(got, start)


# What it does and does not do on the way.


def test_batches_of_one_shape_compile_once():
    graph, start, batches = _problem()
    # As users write it: weakly typed, or from NumPy.
    state = jax.tree.map(lambda a: jnp.full(a.shape, 0.5), start.state)
    assert jax.tree.leaves(state)[0].weak_type
    params = jax.tree.map(np.asarray, start.params)
    start = start._replace(state=state, params=params)

    def traced(batches):
        calls = []

        def loss_fn(out, target):
            calls.append(None)
            return squares(out, target)

        _fit(graph, start, batches, loss_fn)
        return len(calls)

    one = traced(batches[:1])
    assert traced(batches) == one > 0
    shorter = jax.tree.map(lambda a: a[:2], batches[0])
    assert traced([*batches, shorter]) > one


def test_nothing_is_fetched_between_reports(monkeypatch):
    graph, start, batches = _problem()
    fetched, get = [], jax.device_get

    def counted(tree):
        fetched.append(len(tree))
        return get(tree)

    monkeypatch.setattr(jax, "device_get", counted)
    seen = []

    def data():
        for batch in batches:
            yield batch
            seen.append(len(fetched))

    log = Log()
    run = functools.partial(etrace.fit, graph, squares, OPTIMISER, start)
    run(data(), callbacks=[log], report_every=3)
    assert seen == [0, 0, 1, 1, 1]
    assert fetched[:2] == [3, 2]
    assert [step for step, _ in log] == [3, 5]
    assert all(type(value) is float for _, metrics in log for value in metrics.values())


def test_evaluation_joins_the_metrics():
    graph, start, batches = _problem()
    log, other = Log(), Log()

    def evaluate(now):
        return {"norm": optax.tree.norm(now.params), "at": now.step}

    options = {"evaluate": evaluate, "callbacks": [log, other], "report_every": 5}
    got = _fit(graph, start, batches, **options)
    ((step, metrics),) = log
    assert other == log and other[0][1] is not metrics
    assert list(metrics) == ["loss", "norm", "at"]
    assert (step, metrics["at"]) == (5, 5.0)
    assert metrics["norm"] == float(optax.tree.norm(got.params))


def test_a_mask_that_leaves_nothing_has_no_mean():
    graph, start, batches = _problem()
    log = Log()
    batches = [(*batches[0], np.zeros(STEPS))]
    _fit(graph, start, batches, callbacks=[log])
    assert math.isnan(log[0][1]["loss"])


@pytest.mark.parametrize("report_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_it(tmp_path, report_every):
    graph, start, batches = _problem()
    path, log = tmp_path / "run.eqx", Log()
    batches = list(batches)
    batches[2] = batches[2][0], batches[2][1] * jnp.nan
    options = {"path": path, "save_every": 2, "callbacks": [log]}
    with pytest.raises(FloatingPointError, match="loss: got nan at step 3") as caught:
        _fit(graph, start, batches, report_every=report_every, **options)
    assert caught.value.__context__ is None  # It is told once.
    assert [step for step, _ in log] == ([1, 2] if report_every == 1 else [])
    found = etrace.load_checkpoint(path, graph, like=start)
    assert found.step == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.params))


def test_params_that_are_not_finite_are_not_saved(tmp_path):
    """The loss is zero, its derivative infinity times zero."""
    graph, start, batches = _problem()
    path = tmp_path / "run.eqx"

    def loss_fn(out, target):
        return jnp.sqrt(jnp.sum((out * target) ** 2))

    batches = [*batches[:3], (batches[3][0], jnp.zeros_like(batches[3][1]))]
    with pytest.raises(FloatingPointError, match="params: .* update of step 4"):
        _fit(graph, start, batches, loss_fn, path=path, save_every=1)
    assert etrace.load_checkpoint(path, graph, like=start).step == 3


def test_other_errors_save_what_there_is(tmp_path):
    graph, start, batches = _problem()
    run = functools.partial(etrace.fit, graph, squares, OPTIMISER, start)

    def stop(step, metrics):
        if step == 2:
            raise FloatingPointError("of somebody else")

    path = tmp_path / "data.eqx"
    with pytest.raises(ValueError, match="batches: got a list of 1"):
        run([*batches[:2], [1]], path=path)
    assert etrace.load_checkpoint(path, graph, like=start).step == 2
    path = tmp_path / "callback.eqx"
    with pytest.raises(FloatingPointError, match="somebody else"):
        run(batches, path=path, callbacks=[stop])
    assert etrace.load_checkpoint(path, graph, like=start).step == 2


# Wrong arguments.

BATCH_ERRORS = {
    "an array": (np.zeros(3), "float64.3."),
    "four": ((1, 2, 3, 4), "a tuple of 4"),
    "no targets": ({"xs": 1}, "a dict of 'xs'"),
    "another name": ({"xs": 1, "targets": 2, "masks": 3}, "'masks'"),
}


@pytest.mark.parametrize("name", BATCH_ERRORS)
def test_what_is_no_batch_is_refused(name):
    graph, start, _ = _problem()
    batch, got = BATCH_ERRORS[name]
    with pytest.raises(ValueError, match=f"batches: got .*{got}.*expected .xs, targ"):
        _fit(graph, start, [batch])


OPTION_ERRORS = {
    "report_every": ({"report_every": 0}, "report_every: got 0, expected"),
    "save_every": ({"save_every": -1, "path": "a"}, "save_every: got -1"),
    "no path": ({"save_every": 2}, "save_every: got 2 without a path"),
    "both": ({"every": 2, "window": 4}, "every: got 2 with window=4"),
    "mean": ({"every": 2, "reduction": "mean"}, "every: got 2 .*'mean'"),
    "every": ({"every": 0}, "every: got 0"),
}


@pytest.mark.parametrize("name", OPTION_ERRORS)
def test_wrong_options_are_refused_before_the_data(name):
    graph, start, _ = _problem()
    options, message = OPTION_ERRORS[name]
    batches = iter([1])
    with pytest.raises(ValueError, match=message):
        _fit(graph, start, batches, **options)
    assert next(batches) == 1


def _with_aux(aux):
    return lambda out, target: (jnp.sum((out - target) ** 2), aux(out))


AUX_ERRORS = {
    "no dict": (_with_aux(lambda out: jnp.sum(out)), "aux of loss_fn: got float"),
    "its name": (_with_aux(lambda out: {"loss": out[0]}), "aux of loss_fn: .*loss"),
    "no number": (_with_aux(lambda out: {"out": out}), "aux of loss_fn, out: got"),
}


@pytest.mark.parametrize("name", AUX_ERRORS)
def test_an_aux_that_is_no_number_is_refused(name):
    graph, start, batches = _problem()
    loss_fn, message = AUX_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        _fit(graph, start, batches, loss_fn, has_aux=True)


@pytest.mark.parametrize("found", [{"loss": 1.0}, {"rates": np.zeros(3)}])
def test_an_evaluation_that_is_no_number_is_refused(found):
    graph, start, batches = _problem()
    with pytest.raises(ValueError, match="evaluate: got .* expected one number"):
        _fit(graph, start, batches[:1], evaluate=lambda now: found)


def test_a_start_of_another_type_is_refused():
    graph, start, _ = _problem()
    with pytest.raises(ValueError, match="start: got .*tuple.*expected a Checkpoint"):
        _own(graph, tuple(start))
