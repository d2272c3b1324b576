"""KF-RTRL against its formula, and against backpropagation over all of its signs."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import CATALOGUE
from catalogue_case import loss, problem
from oracles import (
    assert_same_gradient,
    bptt,
    differences,
    online,
    online_steps,
    quick_jit,
)
from plain_rnn import as_weights, gradient, plain_rnn
from windows import assert_same, by_steps, chain, of_catalogue, squares

import eqx_etrace as etrace
from eqx_etrace._report import size
from eqx_etrace._rules import _kfrtrl


RULE = etrace.KFRTRL(jax.random.key(3))


def _by_formula(plain, key):
    """As in the paper: one A for x and the old state, and two signs for each step."""
    w, u, out, h, xs, ts = plain
    A, B = np.zeros(xs.shape[1] + h.size), np.zeros((h.size, h.size))
    total, of_out = np.zeros(w.size + u.size), np.zeros_like(out)
    key, others, both = jax.random.fold_in(key, 0), np.random.default_rng(0), 1.0
    for x, t in zip(xs, ts, strict=True):
        old, h = h, np.tanh(w @ x + u @ h)
        key, now = jax.random.split(key)
        sign = np.asarray(jax.random.rademacher(now, (1,), "float64"))[0]
        # What turns the sign of both factors changes nothing: one sign is enough.
        c1 = others.choice([-1.0, 1.0])
        both = c1 * both
        c2 = both * sign
        slope, hat = np.diag(1 - h**2), np.concatenate([x, old])
        moved = slope @ u @ B
        norms = [np.linalg.norm(a) for a in (moved, A, slope, hat)]
        p0 = np.sqrt(norms[0] / norms[1]) if norms[0] * norms[1] else 1.0
        p1 = np.sqrt(norms[2] / norms[3])
        A = c1 * p0 * A + c2 * p1 * hat
        B = c1 * moved / p0 + c2 * slope / p1
        error = 2 * (out @ h - t)
        by_hat = np.outer((out.T @ error) @ B, A)
        total += np.concatenate([part.ravel() for part in np.split(by_hat, [3], 1)])
        of_out += np.outer(error, h)
    return as_weights(total, plain) | {"out": of_out}


def test_the_gradient_is_that_of_the_formula():
    graph, params, data, plain = plain_rnn(RULE)
    got = gradient(graph, params, data)
    found = {"w": got.w, "u": got.u, "out": got.out}
    assert_same_gradient(found, _by_formula(plain, RULE.key), rtol=1e-9)


# Over all signs, exactly.


def _for_signs(monkeypatch, graph, params, data, signs):
    """The gradient of a sequence for each of these signs, (draws, steps, drives)."""
    state, xs, ts = data

    def run(signs):
        def body(carry, now):
            x, t, sign = now
            monkeypatch.setattr(_kfrtrl, "_signs", lambda key, shape, dtype: sign)

            def at_step(params):
                out, *new = etrace.step(graph, params, carry[0], carry[1], x)
                return loss(out, t), tuple(new)

            grads, carry = jax.grad(at_step, has_aux=True)(params)
            return carry, grads

        start = state, etrace.init_trace(graph)
        grads = jax.lax.scan(body, start, (xs, ts, signs))[1]
        return jax.tree.map(lambda g: g.sum(0), grads)

    assert signs.shape[1:] == (len(ts), len(graph.rule.plan.drives))
    return quick_jit(jax.vmap(run))(signs)


def _every_sign(steps, drives):
    """All of them, but for the first step, whose signs drop out."""
    found = list(itertools.product([-1.0, 1.0], repeat=(steps - 1) * drives))
    later = jnp.asarray(found).reshape(-1, steps - 1, drives)
    return jnp.concatenate([jnp.ones_like(later[:, :1]), later], axis=1)


def _assert_unbiased(found, exact):
    mean = jax.tree.map(lambda g: g.mean(0), found)
    mask = jax.tree.map(lambda a: a is not None, mean, is_leaf=lambda a: a is None)
    exact = eqx.filter(exact, mask)
    assert_same_gradient(mean, exact, rtol=1e-9, atol=1e-12)
    return max(differences(jax.tree.map(lambda g: g[0], found), exact).values())


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
def test_it_is_unbiased(vjp, monkeypatch):
    graph, params, data, _ = plain_rnn(RULE, steps=7, vjp=vjp)
    found = _for_signs(monkeypatch, graph, params, data, _every_sign(7, 1))
    exact = bptt(graph.model(params), *data, loss=loss)
    # One draw is far from it.
    assert _assert_unbiased(found, exact) > 0.1


@pytest.mark.parametrize(
    "name, drives, vjp",
    [
        ("rnn_rnn", 2, "single-step"),
        ("rnn_rnn", 2, "multi-step"),
        ("lif", 1, "single-step"),
        ("lif", 1, "multi-step"),
    ],
)
def test_it_is_unbiased_on_layers_and_spiking_neurons(name, drives, vjp, monkeypatch):
    steps = 4
    graph, params, state, *data = of_catalogue(name, RULE, vjp=vjp)
    data = state, *(a[:steps] for a in data)
    found = _for_signs(monkeypatch, graph, params, data, _every_sign(steps, drives))
    exact = bptt(graph.model(params), *data, loss=loss)
    assert _assert_unbiased(found, exact) > 0.1


# What is not a plain product: the others with `pytest -m long`.
KINDS = [
    "bilinear",
    "complex_state_complex_weights",
    "conv1d",
    "embedding",
    "low_rank_recurrent",
    "nested_vmaps",
    "scan_that_gives_out_its_substeps",
    "tied_transposes",
]
assert set(KINDS) <= set(CATALOGUE)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in KINDS else [pytest.mark.long])
        for name in CATALOGUE
    ],
)
def test_it_is_unbiased_whatever_the_step(name, monkeypatch):
    graph, params, state, xs, ts = of_catalogue(name, RULE)
    xs, ts = jax.tree.map(lambda a: a[:3], (xs, ts))
    # Each weight has one sign a step, or one for each of its uses, whose errors add up:
    # the mean over signs that are equal for all of them is that over all signs.
    assert isinstance(graph.rule, etrace.KFRTRL) and graph.rule.plan is not None
    drives = len(graph.rule.plan.drives)
    signs = jnp.broadcast_to(_every_sign(3, 1), (4, 3, drives))
    found = _for_signs(monkeypatch, graph, params, (state, xs, ts), signs)
    model, state, *_ = problem(CATALOGUE[name])
    _assert_unbiased(found, bptt(model, state, xs, ts, loss=loss))


class ReadTwice(eqx.Module):
    """w x alone acts on the gate, so that it drives the state unlike u h does."""

    w: jax.Array
    u: jax.Array

    def __call__(self, x, h):
        y = self.w @ x
        h = jnp.tanh(y + self.u @ h) * jax.nn.sigmoid(y)
        return h, h


def test_a_product_that_is_read_twice_has_factors_of_its_own(monkeypatch):
    _, params, (h, xs, ts), _ = plain_rnn(RULE, steps=4)
    net, ts = ReadTwice(params.w, params.u), jnp.ones(4)
    graph = etrace.compile(net, h, xs[0], RULE)
    signs = _every_sign(4, 2)
    found = _for_signs(monkeypatch, graph, net, (h, xs, ts), signs)
    _assert_unbiased(found, bptt(net, h, xs, ts, loss=loss))


# With the signs that it draws itself.


def _draws(rule, count, **options):
    """Gradients of many keys, and the exact one."""
    graph, params, data, _ = plain_rnn(rule, **options)

    def one(key):
        keyed = eqx.tree_at(lambda graph: graph.rule.key, graph, key)
        return online(keyed, params, *data, loss=squares)

    found = quick_jit(jax.vmap(one))(jax.random.split(jax.random.key(1), count))
    exact = bptt(graph.model(params), *data, loss=squares)
    return [tuple(map(np.asarray, (g.w, g.u))) for g in (found, exact)]


def test_over_many_keys_it_is_unbiased():
    found, exact = _draws(RULE, 4000, steps=8)
    for draws, wanted in zip(found, exact, strict=True):
        spread = draws.std(0, ddof=1) / np.sqrt(len(draws))
        assert (np.abs(draws.mean(0) - wanted) < 4 * spread).all()
        assert (spread > 0).all()


def test_its_variance_is_below_that_of_uoro():
    errors = []
    for rule in (RULE, etrace.UORO(jax.random.key(3))):
        found, exact = _draws(rule, 300, units=16)
        pairs = zip(found, exact, strict=True)
        errors.append([np.mean((draws - wanted) ** 2) for draws, wanted in pairs])
    assert (10 * np.asarray(errors[0]) < errors[1]).all()


def test_samples_draw_their_own_signs():
    graph, params, state, xs, ts = chain(1, 6, 2)
    same = jax.tree.map(lambda a: jnp.stack([a[0], a[0]]), (state, xs[0]))
    graph = etrace.compile(graph.model(params), same[0], same[1], RULE, batched=True)
    xs, ts = (jnp.stack([a[:, 0]] * 2, 1) for a in (xs, ts))
    run = quick_jit(etrace.value_and_grad(graph, squares))
    first, second = (run(params, same[0], None, xs, ts) for _ in range(2))
    assert_same(first[:2], second[:2], rtol=0, atol=0)
    states = first[3].states[0]
    assert float(jnp.abs(states[0] - states[1]).max()) > 1e-3


# What it keeps, and for which weights.


def test_a_weight_is_followed_exactly_where_that_is_no_more_memory():
    """The time constants of `lif`: without a sign in them, no draw differs."""
    graph, params, *data = of_catalogue("lif", RULE)
    got = quick_jit(functools.partial(online, graph, loss=loss))(params, *data)
    exact = bptt(graph.model(params), *data, loss=loss)
    gaps = differences(got, exact)
    products = {name for name in gaps if name.endswith("weight") and "layer" in name}
    assert len(products) == 2 and min(gaps[name] for name in products) > 1e-2
    assert max(gap for name, gap in gaps.items() if name not in products) < 1e-10


@pytest.mark.parametrize("batch", [None, 3])
def test_the_report_counts_what_is_allocated(batch):
    graph, params, state, xs, _ = chain(2, 1, batch)
    batched = batch is not None
    graph = etrace.compile(graph.model(params), state, xs[0], RULE, batched=batched)
    trace = etrace.init_trace(graph)
    total = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trace))
    # Twelve hidden numbers; w (6, 5) and u (6, 6) share B, the gains (2, 6) are exact.
    key = 8
    assert total == (batch or 1) * (8 * (5 + 6 + 12 * 6 + 12 * 12) + key)
    assert f"trace {size(total)}" in str(graph.report()).splitlines()[0]


def test_the_dtype_of_the_trace_is_that_of_the_state():
    graph, params, state, xs, ts = chain(2, 5, None, RULE, "float32")
    run = quick_jit(etrace.value_and_grad(graph, squares))
    _, grads, _, trace = run(params, state, None, xs, ts)
    floats = jax.tree.leaves((grads, trace.inputs, trace.states, trace.exact))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_norms_neither_overflow_nor_vanish(scale):
    x, df = (jnp.full(shape, scale, "float32") for shape in ((3,), (2, 2)))
    (a,), b = _kfrtrl._balanced([x], df)
    norms = [float(jnp.linalg.norm(factor / scale)) for factor in (a, b)]
    np.testing.assert_allclose(norms, np.sqrt(2 * np.sqrt(3)), rtol=1e-6)
    np.testing.assert_allclose((a / scale) * b[0, 0] / scale, jnp.ones(3), rtol=1e-6)
    (none,), nothing = _kfrtrl._balanced([x], jnp.zeros((2, 2), "float32"))
    assert not none.any() and not nothing.any()


# As any other rule.


@pytest.mark.parametrize("vjp", ["single-step", "multi-step"])
def test_a_sequence_is_its_steps(vjp):
    graph, params, state, xs, ts = chain(2, 6, 3)
    model = graph.model(params)
    graph = etrace.compile(model, state, xs[0], RULE, batched=True, vjp=vjp)
    run = quick_jit(etrace.value_and_grad(graph, squares, window=1))
    expected = by_steps(graph, squares, params, state, None, xs, ts)
    assert_same(run(params, state, None, xs, ts), expected, rtol=1e-10)


def test_two_compiles_have_the_same_structure():
    one, other = (plain_rnn(RULE)[0] for _ in range(2))
    assert one.same_structure(other)
    more = plain_rnn(RULE, units=5)[0]
    assert not one.same_structure(more)


def test_each_step_has_a_sign_of_its_own():
    graph, params, (h, xs, ts), _ = plain_rnn(RULE, steps=2)
    grads = online_steps(graph, params, h, xs, ts, squares)
    # The first step is exact whatever its sign is.
    exact = bptt(graph.model(params), h, xs[:1], ts[:1], loss=squares)
    assert_same_gradient(jax.tree.map(lambda g: g[0], grads), exact, rtol=1e-9)
