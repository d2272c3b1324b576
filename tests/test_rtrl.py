"""RTRL against backpropagation, and UORO against RTRL."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import CATALOGUE
from catalogue_case import by_autodiff, loss, problem
from oracles import assert_same_gradient, bptt, differences, online, quick_jit
from windows import assert_same, by_steps, chain, each_square, squares

import eqx_etrace as etrace
from eqx_etrace._report import size
from eqx_etrace._rules import _snap, _uoro


N, IN, OUT, STEPS = 4, 3, 2, 20


class RNN(eqx.Module):
    w: jax.Array
    u: jax.Array
    out: jax.Array

    def __call__(self, x, h):
        h = jnp.tanh(self.w @ x + self.u @ h)
        return self.out @ h, h


def _problem(rule, steps=STEPS, **options):
    rng = np.random.default_rng(0)
    plain = {
        "w": rng.normal(size=(N, IN)),
        "u": rng.normal(size=(N, N)),
        "out": rng.normal(size=(OUT, N)),
    }
    net = RNN(**{name: jnp.asarray(value) for name, value in plain.items()})
    h, xs, ts = (rng.normal(size=s) for s in ((N,), (steps, IN), (steps, OUT)))
    graph = etrace.compile(net, jnp.asarray(h), jnp.asarray(xs[0]), rule, **options)
    data = tuple(map(jnp.asarray, (h, xs, ts)))
    return graph, (graph.params(net), *data), (plain, h, xs, ts)


def _compiled(case, rule):
    model, *data = problem(case)
    x = jax.tree.map(lambda a: a[0], data[1])
    options = dict(case.options)
    if case.trainable is not None:
        options["trainable"] = case.trainable(model)
    graph = etrace.compile(model, data[0], x, rule, **options)
    return graph, graph.params(model), problem(case)[1:]


# Every sixth model; all of them with `pytest -m long`.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if i % 6 else [])
        for i, name in enumerate(CATALOGUE)
    ],
)
def test_rtrl_is_backpropagation(name):
    case = CATALOGUE[name]
    graph, params, data = _compiled(case, etrace.RTRL())
    got = quick_jit(functools.partial(online, graph, loss=loss))(params, *data)
    mask = jax.tree.map(lambda a: a is not None, got, is_leaf=lambda a: a is None)
    assert_same_gradient(got, eqx.filter(by_autodiff(case), mask), rtol=1e-9)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
def test_sequences(vjp, window):
    """With a batch, masks and resets, and a trace from before."""
    graph, params, state, xs, ts = chain(2, 7, 3)
    rule = etrace.RTRL()
    net = graph.model(params)
    graph = etrace.compile(net, state, xs[0], rule, batched=True, vjp=vjp)
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.uniform(size=(7, 3)))
    options = {"reset": jnp.asarray(rng.uniform(size=(7, 3)) < 0.2), "initial": state}
    run = quick_jit(etrace.value_and_grad(graph, each_square, window=window))
    carried = run(params, state, None, xs, ts)[2:]
    state, trace = carried
    args = params, state, trace, xs, ts, mask
    expected = by_steps(graph, each_square, *args, **options)
    assert_same(run(*args, **options), expected, rtol=1e-10)
    later = etrace.evolve(graph, params, state, trace, xs)[1:]
    assert_same(later, run(params, state, trace, xs, ts)[2:], rtol=1e-10)


def _by_formula(plain, h, xs, ts):
    """J' = D J + I, for J of all units by all entries of w and u."""
    w, u, out = plain.values()
    J, total = np.zeros((N, w.size + u.size)), np.zeros(w.size + u.size)
    of_out = np.zeros_like(out)
    for x, t in zip(xs, ts, strict=True):
        old, h = h, np.tanh(w @ x + u @ h)
        slope = np.diag(1 - h**2)
        now = np.hstack([np.kron(np.eye(N), x), np.kron(np.eye(N), old)])
        J = slope @ (u @ J + now)
        error = 2 * (out @ h - t)
        total += (out.T @ error) @ J
        of_out += np.outer(error, h)
    return {
        "w": total[: w.size].reshape(w.shape),
        "u": total[w.size :].reshape(u.shape),
        "out": of_out,
    }


def test_the_gradient_is_that_of_the_formula():
    graph, args, plain = _problem(etrace.RTRL())
    got = quick_jit(functools.partial(online, graph, loss=squares))(*args)
    found = {"w": got.w, "u": got.u, "out": got.out}
    assert_same_gradient(found, _by_formula(*plain), rtol=1e-10)
    exact = bptt(graph.model(args[0]), *args[1:], loss=squares)
    assert_same_gradient(got, exact, rtol=1e-10)


# UORO.


def _uoro_by_formula(plain, h, xs, ts, key):
    w, u, out = plain.values()
    s, theta = np.zeros(N), np.zeros(w.size + u.size)
    total, of_out = np.zeros_like(theta), np.zeros_like(out)
    key = jax.random.fold_in(key, 0)
    for x, t in zip(xs, ts, strict=True):
        old, h = h, np.tanh(w @ x + u @ h)
        key, now = jax.random.split(key)
        nu = np.asarray(jax.random.rademacher(now, (N,), "float64"))
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
    return {
        "w": total[: w.size].reshape(w.shape),
        "u": total[w.size :].reshape(u.shape),
        "out": of_out,
    }


def test_uoro_is_that_of_the_formula():
    key = jax.random.key(3)
    graph, args, plain = _problem(etrace.UORO(key))
    got = quick_jit(functools.partial(online, graph, loss=squares))(*args)
    found = {"w": got.w, "u": got.u, "out": got.out}
    assert_same_gradient(found, _uoro_by_formula(*plain, key), rtol=1e-8)


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
def test_uoro_is_unbiased(vjp, monkeypatch):
    """Over all signs of three steps, exactly."""
    steps = 3
    graph, args, _ = _problem(etrace.UORO(jax.random.key(0)), steps, vjp=vjp)
    every = itertools.product([-1.0, 1.0], repeat=steps * N)
    every = jnp.asarray(list(every)).reshape(-1, steps, N)
    params, h, xs, ts = args

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


# SnAp.


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


# Every seventeenth model; all of them with `pytest -m long`.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if i % 17 else [])
        for i, name in enumerate(CATALOGUE)
    ],
)
def test_snap_misses_nothing_in_the_long_run(name):
    """With an order beyond all paths it is RTRL, whatever the step is made of."""
    case = CATALOGUE[name]
    graph, params, data = _compiled(case, etrace.SnAp(40))
    got = quick_jit(functools.partial(online, graph, loss=loss))(params, *data)
    mask = jax.tree.map(lambda a: a is not None, got, is_leaf=lambda a: a is None)
    assert_same_gradient(got, eqx.filter(by_autodiff(case), mask), rtol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_snap_is_that_of_the_formula(order):
    graph, params, data = _ring(etrace.SnAp(order))
    got = quick_jit(functools.partial(online, graph, loss=squares))(params, *data)
    h, xs, ts = map(np.asarray, data)
    expected, mask = _by_mask(params, h, xs, ts, order)
    assert_same_gradient({"w": got.w, "edges": got.edges}, expected, rtol=1e-10)
    assert etrace.init_trace(graph).shape == (mask.sum(),)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert max(differences(got, exact).values()) > 1e-3


def test_snap_at_the_diameter_is_backpropagation():
    graph, params, data = _ring(etrace.SnAp(8))
    got = quick_jit(functools.partial(online, graph, loss=squares))(params, *data)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert_same_gradient(got, exact, rtol=1e-10)
    graph, args, _ = _problem(etrace.SnAp(2))
    got = quick_jit(functools.partial(online, graph, loss=squares))(*args)
    exact = bptt(graph.model(args[0]), *args[1:], loss=squares)
    assert_same_gradient(got, exact, rtol=1e-10)


def test_snap_of_one_step_is_the_diagonal_block():
    """The sparse form of order one, which `SnAp` does without."""
    graph, args, _ = _problem(_snap.SparseRTRL(1))
    other, *_ = _problem(etrace.SnAp(1))
    assert other.rule == etrace.DRTRL(scope="unit")
    run = functools.partial(online, loss=squares)
    got, expected = (
        quick_jit(functools.partial(run, g))(*args) for g in (graph, other)
    )
    assert_same_gradient(got, expected, rtol=1e-10)


def test_the_cost_of_snap_grows_with_the_pattern():
    def size(n):
        graph, *_ = _ring(etrace.SnAp(2), n)
        assert isinstance(graph.rule, _snap.SparseRTRL)
        plan = graph.rule.plan
        assert plan is not None
        return np.array([plan.terms[0].size, plan.kept[0].size, max(plan.colours)])

    small, large = size(16), size(64)
    assert (large[:2] == 4 * small[:2]).all()
    assert large[2] <= 8


def test_orders_of_snap_that_are_none_get_a_sentence():
    with pytest.raises(ValueError, match="order: got 0, expected an integer"):
        etrace.SnAp(0)


# What all global rules have in common.


class Coupled(eqx.Module):
    """No weight feeds a unit of its own: all are sorted."""

    w: jax.Array

    def __call__(self, x, h):
        drive = jnp.sort(jnp.cumsum(self.w * x[0]))
        h = 0.5 * h + jnp.tanh(drive) * np.linspace(0.1, 2, h.size)
        return h, h


def test_a_weight_needs_no_unit_of_its_own():
    n = 70  # More than a unit may have.
    net = Coupled(jnp.linspace(-1, 1, n))
    h, xs, ts = jnp.zeros(n), jnp.linspace(-1, 1, 6)[:, None], jnp.ones((6, n))
    graph = etrace.compile(net, h, xs[0], etrace.RTRL())
    params = graph.params(net)
    got = quick_jit(functools.partial(online, graph, loss=squares))(params, h, xs, ts)
    exact = bptt(net, h, xs, ts, loss=squares)
    assert_same_gradient({"w": got.w}, {"w": exact.w})
    with pytest.raises(etrace.CompileError, match="No weight feeds single units"):
        etrace.compile(net, h, xs[0])


@pytest.mark.parametrize(
    "rule", [etrace.RTRL(), etrace.UORO(jax.random.key(0)), etrace.SnAp(2)]
)
@pytest.mark.parametrize("batch", [None, 3])
def test_the_report_has_one_trace(rule, batch):
    graph, params, state, xs, _ = chain(2, 1, batch)
    net = graph.model(params)
    graph = etrace.compile(net, state, xs[0], rule, batched=batch is not None)
    trace = etrace.init_trace(graph)
    arrays = [leaf for leaf in jax.tree.leaves(trace)]
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in arrays)
    text = str(graph.report())
    assert f"trace {size(total)}" in text.splitlines()[0]
    assert "is cut" not in text and "whole state" in text or "few steps" in text
    assert all(d.kind is not etrace.Kind.CUT for d in graph.decisions)


def test_traces_of_another_network_get_a_sentence():
    graph, (params, h, xs, _), _ = _problem(etrace.RTRL())
    with pytest.raises(ValueError, match=r"trace: got float64\[2, 2\], expected float"):
        etrace.step(graph, params, h, jnp.zeros((2, 2)), xs[0])
