"""Windows of a multi-step graph: exact inside, and by the trace at their start."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, Taps
from oracles import Dense, assert_same_gradient, bptt, online, problem, quick_jit
from windows import differ, squares

import eqx_etrace as etrace


STEPS = 12
MULTI = [name for name, case in MODELS.items() if case.vjp == "multi-step"]
BOTH = [*MULTI, "lif"]


@functools.cache
def _setting(name, vjp: Any = "multi-step"):
    model, state, xs, ts = problem(name)
    graph = etrace.compile(model, state, xs[0], vjp=vjp)
    assert graph.vjp == vjp
    return graph, graph.params(model), state, xs[:STEPS], ts[:STEPS]


@functools.cache
def _theory(name, *lengths):
    """The gradient of each window: BPTT, and dL/dh at its start times the influence
    matrix J, which goes through the local program step by step."""
    model, leaves, xs, ts = problem(name)
    dense = Dense(model, leaves, MODELS[name].groups)

    def step(p, h, leaves, x):
        out, new = dense.step(p, h, leaves, x, Taps())
        return out, dense.flat(new), new

    def loss(p, h, leaves, xs, ts):
        def body(carry, now):
            h, leaves = carry
            out, *moved = step(p, h, leaves, now[0])
            return tuple(moved), squares(out, now[1])

        return jnp.sum(jax.lax.scan(body, (h, leaves), (xs, ts))[1])

    def move(carry, x):
        h, leaves, J = carry
        D, F, _ = dense.local(dense.p, h, leaves, x)
        _, *new = step(dense.p, h, leaves, x)
        return (*new, (D * dense.same_unit) @ J + F), None

    @quick_jit
    def window(h, leaves, J, xs, ts):
        dp, dh = jax.grad(loss, argnums=(0, 1))(dense.p, h, leaves, xs, ts)
        return dp + dh @ J, jax.lax.scan(move, (h, leaves, J), xs)[0]

    J = jnp.zeros((len(dense.same_unit), dense.p.size))
    carry, start, found = (dense.flat(dense.leaves), dense.leaves, J), 0, []
    for length in lengths:
        some = slice(start, start + length)
        gradient, carry = window(*carry, xs[some], ts[some])
        found.append(dense.unravel(gradient))
        start += length
    return found


def _in_windows(name, window):
    full, rest = divmod(STEPS, window)
    found = _theory(name, *([window] * full + [rest] * (rest > 0)))
    return jax.tree.map(lambda *g: sum(g[1:], g[0]), *found)


def _online(name, window):
    graph, params, state, xs, ts = _setting(name)
    run = quick_jit(etrace.value_and_grad(graph, squares, window=window))
    return run(params, state, None, xs, ts)[1]


@functools.cache
def _bptt(name):
    return bptt(*problem(name, STEPS))


@pytest.mark.parametrize("name", BOTH)
def test_one_window_equals_bptt(name):
    assert_same_gradient(_online(name, STEPS), _bptt(name))


# 5 leaves two steps over.
@pytest.mark.parametrize("name, window", [*((name, 5) for name in BOTH), ("lif", 1)])
def test_shorter_windows_equal_the_theory(name, window):
    assert_same_gradient(_online(name, window), _in_windows(name, window))


@pytest.mark.parametrize("name", ["layernorm_between", "delayed_layers", "lif"])
def test_the_window_is_a_horizon(name):
    """A guard: no two of the gradients above are one and the same."""
    some = [_in_windows(name, window) for window in (1, 5)] + [_bptt(name)]
    assert differ(some[0], some[1]) and differ(some[1], some[2])
    if name == "lif":  # Its own form is another one.
        graph, *data = _setting(name, "single-step")
        single = quick_jit(functools.partial(online, graph))(*data)
        assert all(differ(single, gradient) for gradient in some)


def test_the_window_of_a_multi_step_graph_is_32_unless_given():
    model, state, xs, ts = problem("layernorm_between")
    xs, ts = (jnp.concatenate([a, -a])[:35] for a in (xs, ts))
    graph, params, *_ = _setting("layernorm_between")
    runs = [etrace.value_and_grad(graph, squares, window=k) for k in (None, 32, 35)]
    found = [quick_jit(run)(params, state, None, xs, ts)[1] for run in runs]
    assert_same_gradient(found[0], found[1])
    assert differ(found[0], found[2], by=1e-9)


# `steps`: the same for a window of one's own, whatever the form of the graph.

WARM = 4


def _after_a_warm_up(name, vjp):
    """State and trace after some steps, and the rest of the sequence."""
    graph, params, state, xs, ts = _setting(name, vjp)
    warm_up = quick_jit(functools.partial(etrace.evolve, graph))
    _, state, trace = warm_up(params, state, None, xs[:WARM])
    return graph, params, state, trace, xs[WARM:], ts[WARM:]


def _loss_of_steps(graph, params, state, trace, xs, ts):
    outs, *carried = etrace.steps(graph, params, state, trace, xs)
    return squares(outs, ts), carried


OF_STEPS = [("layernorm_between", "multi-step"), ("gru_lif", "single-step")]
OF_STEPS += [("lif", form) for form in ("single-step", "multi-step")]


@pytest.mark.parametrize("name, vjp", OF_STEPS)
def test_steps_equal_the_theory(name, vjp):
    """BPTT from the state after the warm-up, and the influence matrix from before."""
    graph, *args = _after_a_warm_up(name, vjp)
    run = functools.partial(_loss_of_steps, graph)
    got, carried = quick_jit(jax.grad(run, has_aux=True))(*args)
    assert_same_gradient(got, _theory(name, WARM, STEPS - WARM)[1])
    without_the_trace = bptt(problem(name)[0], args[1], *args[3:])
    assert differ(got, without_the_trace)
    moved = quick_jit(functools.partial(etrace.evolve, graph))(*args[:4])
    for a, b in zip(jax.tree.leaves(carried), jax.tree.leaves(moved[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name, vjp", OF_STEPS[-2:])
def test_gradients_of_steps_by_everything_else(name, vjp):
    """By the inputs that of the plain model, by state and trace zero."""
    graph, params, state, trace, xs, ts = _after_a_warm_up(name, vjp)

    def plain(xs):
        def body(state, x):
            out, state = graph.model(params)(x, state)
            return state, out

        return squares(jax.lax.scan(body, state, xs)[1], ts)

    def ours(state, trace, xs):
        return _loss_of_steps(graph, params, state, trace, xs, ts)[0]

    run = quick_jit(jax.grad(ours, argnums=(0, 1, 2)))
    *zero, by_xs = run(state, trace, xs)
    np.testing.assert_allclose(by_xs, quick_jit(jax.grad(plain))(xs), rtol=1e-10)
    assert np.abs(by_xs).max() > 1e-3
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))


def test_steps_hear_a_loss_of_the_state_they_return():
    graph, params, state, trace, xs, _ = _after_a_warm_up("lif", "single-step")

    def ours(params):
        zero = jax.tree.map(jnp.zeros_like, trace)
        _, new, _ = etrace.steps(graph, params, state, zero, xs)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in new)

    def plain(params):
        def body(state, x):
            return graph.model(params)(x, state)[1], None

        new = jax.lax.scan(body, state, xs)[0]
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in new)

    got, expected = (quick_jit(jax.grad(fun))(params) for fun in (ours, plain))
    assert_same_gradient(got, expected)
