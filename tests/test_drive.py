"""`value_and_grad`, `grad` and `evolve`: what goes in, and from call to call."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_same_gradient, bptt, problem, quick_jit
from windows import assert_same, by_steps, chain, differ, each_square, squares

import eqx_etrace as etrace


B = 3


def _run(graph, args, loss_fn=squares, options=(), **keywords):
    fun = etrace.value_and_grad(graph, loss_fn, **dict(options))
    return quick_jit(fun)(*args, **keywords)


# From call to call.


@pytest.mark.parametrize("rule", [etrace.DRTRL(), etrace.ESDRTRL(0.8)])
@pytest.mark.parametrize("window", [1, 4])
def test_two_halves_are_the_whole(window, rule):
    graph, params, state, xs, ts = chain(2, 12, rule=rule)
    run = quick_jit(etrace.value_and_grad(graph, squares, window=window))
    whole = run(params, state, None, xs, ts)
    losses, first, *carried = run(params, state, None, xs[:6], ts[:6])
    more, second, *last = run(params, *carried, xs[6:], ts[6:])
    total = jax.tree.map(jnp.add, first, second)
    assert_same((jnp.concatenate([losses, more]), total, *last), whole)


def test_two_halves_are_the_whole_with_a_horizon():
    """Where the horizon divides the halves: it begins anew with each call."""
    model, state, xs, ts = problem("layernorm_between", 12)
    graph = etrace.compile(model, state, xs[0])
    assert graph.vjp == "multi-step"
    run = quick_jit(etrace.value_and_grad(graph, squares, window=3))
    params = graph.params(model)
    _, whole, *end = run(params, state, None, xs, ts)
    _, first, *carried = run(params, state, None, xs[:6], ts[:6])
    _, second, *last = run(params, *carried, xs[6:], ts[6:])
    assert_same((jax.tree.map(jnp.add, first, second), *last), (whole, *end))


def _stepped(graph, params, state, trace, xs):
    def body(carry, x):
        state, trace = carry
        out, *moved = etrace.step(graph, params, state, trace, x)
        return tuple(moved), out

    carry, outs = jax.lax.scan(body, (state, trace), xs)
    return outs, *carry


@pytest.mark.parametrize("batch", [None, B])
@pytest.mark.parametrize("rule", [etrace.DRTRL(), etrace.ESDRTRL((0.5, 0.9))])
@pytest.mark.parametrize("steps", [1, 40])
def test_evolve_equals_stepping(steps, rule, batch):
    graph, params, state, xs, _ = chain(2, steps, batch, rule)
    trace = etrace.init_trace(graph)
    expected = quick_jit(functools.partial(_stepped, graph))(params, state, trace, xs)
    run = quick_jit(functools.partial(etrace.evolve, graph))
    for start in (trace, None):
        assert_same(run(params, state, start, xs), expected)


def test_evolve_has_no_derivatives():
    graph, params, state, xs, _ = chain(2, 5)
    trace = etrace.init_trace(graph)

    def total(*args):
        found = jax.tree.leaves(etrace.evolve(graph, *args))
        return sum(jnp.sum(leaf) for leaf in found)

    by_all = quick_jit(jax.grad(total, argnums=(0, 1, 2, 3)))
    for leaf in jax.tree.leaves(by_all(params, state, trace, xs)):
        np.testing.assert_array_equal(leaf, 0)


# Inputs that stay the same.


class TwoInputs(eqx.Module):
    w: jax.Array

    def __call__(self, x, h):
        h = jnp.tanh(0.5 * h + self.w @ x["fast"] + x["slow"][0])
        return h, h


def _two_inputs(batch, steps=7):
    rng = np.random.default_rng(0)
    lead = () if batch is None else (batch,)
    net = TwoInputs(jnp.asarray(rng.normal(size=(4, 3))))
    fast = jnp.asarray(rng.normal(size=(steps, *lead, 3)))
    slow = jnp.asarray(rng.normal(size=(*lead, 4)))
    x, h = {"fast": fast[0], "slow": (slow,)}, jnp.zeros((*lead, 4))
    graph = etrace.compile(net, h, x, batched=batch is not None)
    return graph, graph.params(net), h, fast, slow


@pytest.mark.parametrize("batch", [None, B])
def test_parts_that_stay_the_same_equal_parts_repeated(batch):
    graph, params, h, fast, slow = _two_inputs(batch)
    trace, ts = etrace.init_trace(graph), jnp.zeros(len(fast))
    repeated = jnp.stack([slow] * len(fast))
    single, multi = etrace.SingleStepData, etrace.MultiStepData
    many: list[Any] = [
        {"fast": fast, "slow": (repeated,)},
        {"fast": fast, "slow": single((slow,))},
        {"fast": multi(fast), "slow": (single(slow),)},
        multi({"fast": fast, "slow": (repeated,)}),
    ]

    @quick_jit
    def run(xs):
        drives = [
            etrace.value_and_grad(graph, squares, window=window) for window in (1, 3, 7)
        ]
        driven = [drive(params, h, trace, xs, ts) for drive in drives]
        window = etrace.steps(graph, params, h, trace, xs)
        return driven, window, etrace.evolve(graph, params, h, trace, xs)

    expected = run(many[0])
    for xs in many[1:]:
        assert_same(run(xs), expected)


def test_targets_count_the_steps_if_no_input_moves():
    graph, params, h, fast, slow = _two_inputs(None)
    x, ts = {"fast": fast[0], "slow": (slow,)}, jnp.arange(4.0)
    got = _run(graph, (params, h, None, etrace.SingleStepData(x), ts))
    repeated = jax.tree.map(lambda a: jnp.stack([a] * 4), x)
    assert_same(got, _run(graph, (params, h, None, repeated, ts)))
    assert got[0].shape == (4,)


# Losses, targets, masks.


class Targets(NamedTuple):
    value: Any
    more: dict[str, Any]


def test_targets_of_any_structure_and_what_comes_with_a_loss():
    graph, params, state, xs, ts = chain(2, 7)
    labels = jnp.arange(7) % 3
    targets = Targets(ts, {"label": labels, "nothing": None})

    def loss_fn(out, target):
        loss = (
            squares(out, target.value) - jax.nn.log_softmax(out)[target.more["label"]]
        )
        return loss, {"best": jnp.argmax(out), "out": out}

    evolve = quick_jit(functools.partial(etrace.evolve, graph))
    outs, *_ = evolve(params, state, None, xs)
    for window in (1, 3):
        options = {"window": window, "has_aux": True}

        @quick_jit
        def run(*args, options=options):
            driven = etrace.value_and_grad(graph, loss_fn, **options)(*args)
            alone = etrace.grad(graph, loss_fn, **options)(*args)
            some = options | {"has_aux": False}
            fun = etrace.value_and_grad(graph, lambda *a: loss_fn(*a)[0], **some)
            return driven, alone, fun(*args)

        driven, alone, plain = run(params, state, None, xs, targets)
        (losses, aux), grads, *carried = driven
        assert_same((losses, grads, *carried), plain)
        assert_same(alone, (grads, aux, *carried))
        np.testing.assert_array_equal(aux["best"], aux["out"].argmax(-1))
        np.testing.assert_allclose(aux["out"], outs, rtol=1e-12)


def test_no_targets():
    graph, params, state, xs, _ = chain(1, 5)
    got = _run(graph, (params, state, None, xs, None), lambda out, _: jnp.sum(out**2))
    expected = _run(graph, (params, state, None, xs, jnp.zeros((5, 3))))
    assert_same(got, expected)


def test_grad_is_value_and_grad_without_the_losses():
    graph, *args = chain(1, 5)
    args.insert(2, None)
    got = quick_jit(etrace.grad(graph, squares, window=2))(*args)
    assert_same(got, _run(graph, args, options={"window": 2})[1:])


@pytest.mark.parametrize("window", [1, 3])
def test_a_loss_at_the_last_step_alone(window):
    """The gradient of that step, by the trace of all the steps before."""
    graph, params, state, xs, ts = chain(2, 8)
    mask = jnp.zeros(8).at[-1].set(1.0)
    args = params, state, None, xs, ts, mask
    losses, got, *_ = _run(graph, args, options={"window": window})
    evolve = quick_jit(functools.partial(etrace.evolve, graph))
    _, state, trace = evolve(params, state, None, xs[:-1])

    def last(params):
        return squares(etrace.step(graph, params, state, trace, xs[-1])[0], ts[-1])

    value, expected = quick_jit(jax.value_and_grad(last))(params)
    assert_same_gradient(got, expected, rtol=1e-12)
    np.testing.assert_allclose(losses, mask * value, rtol=1e-12)


LANES = {
    "steps": lambda steps: jnp.arange(1.0 * steps) % 3 / 2,
    "lanes": lambda steps: (jnp.arange(1.0 * steps * B) % 3 / 2).reshape(steps, B),
    "none": lambda steps: None,
}


@pytest.mark.parametrize("lanes", LANES)
def test_the_mean_is_over_what_the_mask_leaves(lanes):
    graph, params, state, xs, ts = chain(1, 6, B)
    mask = LANES[lanes](6)
    args = params, state, None, xs, ts, mask
    options = {"window": 4}
    losses, total, *_ = _run(graph, args, each_square, options)
    same, mean, *_ = _run(graph, args, each_square, options | {"reduction": "mean"})
    assert_same(same, losses)
    if mask is not None and mask.ndim == 1:
        mask = mask[:, None]
    count = np.sum(np.ones((6, B)) if mask is None else np.ones((6, B)) * mask)
    assert_same(mean, jax.tree.map(lambda g: g / count, total))


@pytest.mark.parametrize("window", [1, 4])
def test_booleans_and_integers_are_masks(window):
    graph, params, state, xs, ts = chain(1, 6, B)
    mask = jnp.arange(6 * B).reshape(6, B) % 4 > 0
    found = [
        _run(graph, (params, state, None, xs, ts, m), each_square, {"window": window})
        for m in (mask, mask.astype(int), mask.astype(float))
    ]
    assert_same(found[0], found[2])
    assert_same(found[1], found[2])


@pytest.mark.parametrize("window, lanes", [(1, "lanes"), (4, "steps"), (4, "lanes")])
def test_what_is_masked_may_be_no_number(lanes, window):
    graph, params, state, xs, ts = chain(2, 6, B)
    mask = LANES[lanes](6)
    hidden = (mask == 0).reshape(mask.shape + (1,) * (3 - mask.ndim))
    options = {"window": window}
    args = params, state, None, xs
    got = _run(
        graph, (*args, jnp.where(hidden, jnp.nan, ts), mask), each_square, options
    )
    assert_same(got, _run(graph, (*args, ts, mask), each_square, options))


# Resets.


@pytest.mark.parametrize("window, initial", [(1, True), (4, False), (9, True)])
def test_a_lane_that_is_reset_is_two_sequences(window, initial):
    """Lane 1 is reset at step 5; the others go on."""
    graph, params, state, xs, ts = chain(2, 9, B)
    new = jax.tree.map(lambda a: 0.3 - a, state) if initial else None
    reset = jnp.zeros((9, B), bool).at[5, 1].set(True)
    options = {"window": window}
    args = params, state, None, xs, ts
    losses, got, end, trace = _run(
        graph, args, each_square, options, reset=reset, initial=new
    )
    alone, *_ = chain(2, 9)

    fun = quick_jit(functools.partial(by_steps, alone, squares))

    def one(lane, state, start, stop):
        part = [jnp.asarray(a[start:stop, lane]) for a in (xs, ts)]
        return fun(params, jax.tree.map(lambda a: a[lane], state), None, *part)

    second = jax.tree.map(jnp.zeros_like, state) if new is None else new
    parts = [one(0, state, 0, 9), one(1, state, 0, 5), one(1, second, 5, 9)]
    parts.append(one(2, state, 0, 9))
    expected = jax.tree.map(lambda *g: sum(g[1:], g[0]), *(part[1] for part in parts))
    assert_same_gradient(got, expected, rtol=1e-12)
    lanes = [parts[0], parts[2], parts[3]]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *(lane[2:] for lane in lanes))
    assert_same((end, trace), stacked)
    middle = jnp.concatenate([parts[1][0], parts[2][0]])
    np.testing.assert_allclose(losses[:, 1], middle, rtol=1e-12)
    assert differ(got, _run(graph, args, each_square, options)[1])


@pytest.mark.parametrize("window", [4, 9])
def test_a_reset_inside_a_horizon_is_two_sequences(window):
    model, state, xs, ts = problem("layernorm_between", 9)
    graph = etrace.compile(model, state, xs[0])
    reset = jnp.arange(9) == 5
    args = graph.params(model), state, None, xs, ts
    got = _run(graph, args, options={"window": window}, reset=reset, initial=state)[1]
    if window == 9:
        parts = [bptt(model, state, xs[:5], ts[:5]), bptt(model, state, xs[5:], ts[5:])]
    else:  # Windows of 4, 1 | 3, 1 steps: the horizon is where it was.
        run = quick_jit(etrace.value_and_grad(graph, squares, window=4))
        first = run(args[0], state, None, xs[:5], ts[:5])[1]
        run = quick_jit(etrace.value_and_grad(graph, squares, window=3))
        parts = [first, run(args[0], state, None, xs[5:], ts[5:])[1]]
    expected = jax.tree.map(jnp.add, *parts)
    assert_same_gradient(got, expected)
