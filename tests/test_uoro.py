"""UORO against its formula, and against RTRL over all of its signs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_same_gradient, bptt, differences, quick_jit
from plain_rnn import as_weights, gradient, plain_rnn
from windows import assert_same, chain, squares

import eqx_etrace as etrace
from eqx_etrace._rules import _uoro


def _by_formula(plain, key):
    w, u, out, h, xs, ts = plain
    s, theta = np.zeros(h.size), np.zeros(w.size + u.size)
    total, of_out = np.zeros_like(theta), np.zeros_like(out)
    key = jax.random.fold_in(key, 0)
    for x, t in zip(xs, ts, strict=True):
        old, h = h, np.tanh(w @ x + u @ h)
        key, now = jax.random.split(key)
        nu = np.asarray(jax.random.rademacher(now, h.shape, "float64"))
        slope = 1 - h**2
        moved = slope * (u @ s)
        fresh = np.concatenate([np.outer(nu * slope, v).ravel() for v in (x, old)])
        norms = [np.linalg.norm(v) for v in (theta, moved, fresh, nu)]
        first = np.sqrt(norms[0] / norms[1]) if norms[0] * norms[1] else 1.0
        second = np.sqrt(norms[2] / norms[3])
        s, theta = first * moved + second * nu, theta / first + fresh / second
        error = 2 * (out @ h - t)
        total += (out.T @ error) @ s * theta
        of_out += np.outer(error, h)
    return as_weights(total, plain) | {"out": of_out}


def test_the_gradient_is_that_of_the_formula():
    key = jax.random.key(3)
    graph, params, data, plain = plain_rnn(etrace.UORO(key))
    got = gradient(graph, params, data)
    found = {"w": got.w, "u": got.u, "out": got.out}
    assert_same_gradient(found, _by_formula(plain, key), rtol=1e-8)


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
def test_it_is_unbiased(vjp, monkeypatch):
    """Over all signs of three steps, exactly."""
    steps = 3
    rule = etrace.UORO(jax.random.key(0))
    graph, params, (h, xs, ts), _ = plain_rnn(rule, steps=steps, vjp=vjp)
    every = itertools.product([-1.0, 1.0], repeat=steps * h.size)
    every = jnp.asarray(list(every)).reshape(-1, steps, h.size)

    def run(signs):
        drawn = iter(signs)
        monkeypatch.setattr(_uoro, "_signs", lambda key, sizes: next(drawn))
        state, trace, total = h, etrace.init_trace(graph), None
        for x, t in zip(xs, ts, strict=True):

            def at_step(params, state=state, trace=trace, x=x, t=t):
                out, *new = etrace.step(graph, params, state, trace, x)
                return squares(out, t), new

            grads, (state, trace) = jax.grad(at_step, has_aux=True)(params)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return total

    found = quick_jit(jax.vmap(run))(every)
    exact = bptt(graph.model(params), h, xs, ts, loss=squares)
    assert_same_gradient(jax.tree.map(lambda g: g.mean(0), found), exact, rtol=1e-9)
    # One draw is far from it.
    assert max(differences(jax.tree.map(lambda g: g[0], found), exact).values()) > 0.1


def test_samples_draw_their_own_signs():
    graph, params, state, xs, ts = chain(1, 6, 2)
    net = graph.model(params)
    rule = etrace.UORO(jax.random.key(1))
    same = jax.tree.map(lambda a: jnp.stack([a[0], a[0]]), (state, xs[0]))
    graph = etrace.compile(net, same[0], same[1], rule, batched=True)
    xs, ts = (jnp.stack([a[:, 0]] * 2, 1) for a in (xs, ts))
    run = quick_jit(etrace.value_and_grad(graph, squares))
    first, second = (run(params, same[0], None, xs, ts) for _ in range(2))
    assert_same(first[:2], second[:2], rtol=0, atol=0)
    states, weights, keys = first[3]
    assert states.shape == (2, 6) and weights.ndim == 2
    assert float(jnp.abs(states[0] - states[1]).max()) > 1e-3
    assert (
        jax.random.key_data(keys[0]).tolist() != jax.random.key_data(keys[1]).tolist()
    )


def test_a_new_sequence_draws_new_signs():
    """A reset forgets the trace, not where the random numbers are."""
    graph, params, (h, xs, ts), _ = plain_rnn(etrace.UORO(jax.random.key(2)))
    fun = quick_jit(etrace.value_and_grad(graph, squares))
    reset = jnp.arange(len(xs)) == 10
    *_, whole = fun(params, h, None, xs, ts)
    *_, cut = fun(params, h, None, xs, ts, reset=reset)
    keys = [np.asarray(jax.random.key_data(trace.key)) for trace in (whole, cut)]
    first, second = keys
    assert np.array_equal(first, second)
    assert not np.array_equal(whole.states, cut.states)
