"""RTRL against backpropagation, and what all global rules have in common."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import CATALOGUE
from catalogue_case import by_autodiff, loss, one_in
from oracles import assert_same_gradient, bptt, online, quick_jit
from plain_rnn import as_weights, gradient, plain_rnn
from windows import assert_same, by_steps, chain, each_square, of_catalogue, squares

import eqx_etrace as etrace
from eqx_etrace._report import size


@one_in(10, CATALOGUE)
def test_rtrl_is_backpropagation(name):
    graph, params, *data = of_catalogue(name, etrace.RTRL())
    got = quick_jit(functools.partial(online, graph, loss=loss))(params, *data)
    mask = jax.tree.map(lambda a: a is not None, got, is_leaf=lambda a: a is None)
    exact = by_autodiff(CATALOGUE[name])
    assert_same_gradient(got, eqx.filter(exact, mask), rtol=1e-9)


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


def _by_formula(plain):
    """J' = D J + I, for J of all units by all entries of w and u."""
    w, u, out, h, xs, ts = plain
    n = h.size
    J, total = np.zeros((n, w.size + u.size)), np.zeros(w.size + u.size)
    of_out = np.zeros_like(out)
    for x, t in zip(xs, ts, strict=True):
        old, h = h, np.tanh(w @ x + u @ h)
        slope = np.diag(1 - h**2)
        now = np.hstack([np.kron(np.eye(n), x), np.kron(np.eye(n), old)])
        J = slope @ (u @ J + now)
        error = 2 * (out @ h - t)
        total += (out.T @ error) @ J
        of_out += np.outer(error, h)
    return as_weights(total, plain) | {"out": of_out}


def test_the_gradient_is_that_of_the_formula():
    graph, params, data, plain = plain_rnn(etrace.RTRL())
    got = gradient(graph, params, data)
    found = {"w": got.w, "u": got.u, "out": got.out}
    assert_same_gradient(found, _by_formula(plain), rtol=1e-10)
    exact = bptt(graph.model(params), *data, loss=squares)
    assert_same_gradient(got, exact, rtol=1e-10)


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
    graph, params, (h, xs, _), _ = plain_rnn(etrace.RTRL())
    with pytest.raises(ValueError, match=r"trace: got float64\[2, 2\], expected float"):
        etrace.step(graph, params, h, jnp.zeros((2, 2)), xs[0])
