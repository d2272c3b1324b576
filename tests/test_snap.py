"""SnAp against its formula, its two ends, and what it costs."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import CATALOGUE
from catalogue_case import by_autodiff, loss, one_in
from oracles import assert_same_gradient, bptt, differences, online, quick_jit
from plain_rnn import OUT, gradient, plain_rnn
from windows import of_catalogue, squares

import eqx_etrace as etrace
from eqx_etrace._rules import _snap


class Ring(eqx.Module):
    """Each unit reads two neighbours by weights of an edge list."""

    w: jax.Array
    edges: jax.Array
    out: jax.Array

    def __call__(self, x, h):
        n = h.size
        sources = (jnp.arange(n)[:, None] + jnp.array([[1, 3]])).ravel() % n
        targets = jnp.repeat(jnp.arange(n), 2)
        fed = jax.ops.segment_sum(self.edges * h[sources], targets, n)
        h = 0.5 * h + jnp.tanh(self.w * x[0] + fed)
        return self.out @ h, h


def _ring(rule, n=8):
    rng = np.random.default_rng(2)
    net = Ring(*(jnp.asarray(rng.normal(size=s)) for s in ((n,), (2 * n,), (OUT, n))))
    h, xs, ts = (rng.normal(size=s) for s in ((n,), (12, 1), (12, OUT)))
    data = tuple(map(jnp.asarray, (h, xs, ts)))
    graph = etrace.compile(net, data[0], data[1][0], rule)
    return graph, graph.params(net), data


def _by_mask(plain, h, xs, ts, order):
    """J' = (D J + I) o M for the ring, all of it dense."""
    w, edges, out = (np.asarray(a) for a in (plain.w, plain.edges, plain.out))
    n = h.size
    sources = (np.arange(n)[:, None] + np.array([1, 3])).ravel() % n
    targets = np.repeat(np.arange(n), 2)
    J, total = np.zeros((n, 3 * n)), np.zeros(3 * n)
    connected = np.eye(n, dtype=bool)
    connected[targets, sources] = True
    mask = np.hstack([np.eye(n), np.arange(n)[:, None] == targets]).astype(bool)
    for _ in range(order - 1):
        mask = (connected.astype(int) @ mask) > 0
    for x, t in zip(xs, ts, strict=True):
        fed = np.bincount(targets, edges * h[sources], n)
        slope = 1 - np.tanh(w * x[0] + fed) ** 2
        D = 0.5 * np.eye(n)
        D[targets, sources] += slope[targets] * edges
        now = np.zeros((n, 2 * n))
        now[targets, np.arange(2 * n)] = h[sources]
        fresh = slope[:, None] * np.hstack([np.eye(n) * x[0], now])
        h = 0.5 * h + np.tanh(w * x[0] + fed)
        J = (D @ J + fresh) * mask
        total += (out.T @ (2 * (out @ h - t))) @ J
    return {"w": total[:n], "edges": total[n:]}, mask


@one_in(17, CATALOGUE)
def test_it_misses_nothing_in_the_long_run(name):
    """With an order beyond all paths it is RTRL, whatever the step is made of."""
    graph, params, *data = of_catalogue(name, etrace.SnAp(40))
    got = quick_jit(functools.partial(online, graph, loss=loss))(params, *data)
    mask = jax.tree.map(lambda a: a is not None, got, is_leaf=lambda a: a is None)
    exact = by_autodiff(CATALOGUE[name])
    assert_same_gradient(got, eqx.filter(exact, mask), rtol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_the_gradient_is_that_of_the_formula(order):
    graph, params, data = _ring(etrace.SnAp(order))
    got = gradient(graph, params, data)
    h, xs, ts = map(np.asarray, data)
    expected, mask = _by_mask(params, h, xs, ts, order)
    assert_same_gradient({"w": got.w, "edges": got.edges}, expected, rtol=1e-10)
    assert etrace.init_trace(graph).shape == (mask.sum(),)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert max(differences(got, exact).values()) > 1e-3


def test_at_the_diameter_it_is_backpropagation():
    graph, params, data = _ring(etrace.SnAp(8))
    got = gradient(graph, params, data)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert_same_gradient(got, exact, rtol=1e-10)
    graph, params, data, _ = plain_rnn(etrace.SnAp(2))
    got = gradient(graph, params, data)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert_same_gradient(got, exact, rtol=1e-10)


def test_of_one_step_it_is_the_diagonal_block():
    """The sparse form of order one, which `SnAp` does without."""
    graph, params, data, _ = plain_rnn(_snap.SparseRTRL(1))
    other, *_ = plain_rnn(etrace.SnAp(1))
    assert other.rule == etrace.DRTRL(scope="unit")
    got, expected = (gradient(g, params, data) for g in (graph, other))
    assert_same_gradient(got, expected, rtol=1e-10)


def test_the_cost_grows_with_the_pattern():
    def size(n):
        graph, *_ = _ring(etrace.SnAp(2), n)
        assert isinstance(graph.rule, _snap.SparseRTRL)
        plan = graph.rule.plan
        assert plan is not None
        return np.array([plan.terms[0].size, plan.kept[0].size, max(plan.colours)])

    small, large = size(16), size(64)
    assert (large[:2] == 4 * small[:2]).all()
    assert large[2] <= 8


def test_orders_that_are_none_get_a_sentence():
    with pytest.raises(ValueError, match="order: got 0, expected an integer"):
        etrace.SnAp(0)
