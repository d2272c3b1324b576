"""`monitor`, against numbers computed by hand."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue_case import one_in
from every_rule import NETS, RULES, Problem, with_extras
from models import random_state
from oracles import quick_jit

import eqx_etrace as etrace
from eqx_etrace._monitor import spectral_radius


LEAK, UNITS, IN = 0.9, 6, 3


class LIF(eqx.Module):
    weight: jax.Array
    out: jax.Array

    def __call__(self, x, v) -> tuple[jax.Array, Any]:
        v = LEAK * v + self.weight @ x
        return self.out @ near(v - 1), v


@jax.custom_jvp
def near(v):
    return (v > 0).astype(v.dtype)


@near.defjvp
def _(primals, tangents):
    (v,), (dv,) = primals, tangents
    return near(v), dv * jnp.maximum(1 - jnp.abs(v), 0)


def _watched(graph, params, state, xs):
    """The monitors of all steps, next to the steps themselves."""

    def body(carry, x):
        state, trace = carry
        found = etrace.monitor(graph, params, state, trace, x)
        _, *carry = etrace.step(graph, params, state, trace, x)
        return carry, found

    start = [state, etrace.init_trace(graph)]
    return quick_jit(lambda: jax.lax.scan(body, start, xs)[1])()


@pytest.mark.parametrize("batch", [None, 2])
def test_a_layer_of_neurons_by_hand(batch):
    rng = np.random.default_rng(0)
    weight, out = rng.normal(0, 0.9, (UNITS, IN)), rng.normal(size=(2, UNITS))
    lead = () if batch is None else (batch,)
    xs, v = rng.normal(size=(12, *lead, IN)), np.zeros((*lead, UNITS))
    net = LIF(jnp.asarray(weight), jnp.asarray(out))
    start = jnp.asarray(v), jnp.asarray(xs[0])
    graph = etrace.compile(net, *start, batched=batch is not None)
    found = _watched(graph, graph.params(net), start[0], jnp.asarray(xs))
    shares = np.zeros((3, 12))
    norm, x_bar = np.zeros(12), np.zeros((*lead, IN))
    for t, x in enumerate(xs):
        norm[t] = np.mean(np.sqrt(UNITS * np.sum(x_bar**2, axis=-1)))
        x_bar = LEAK * x_bar + x
        v = LEAK * v + x @ weight.T
        fired, learns = v > 1, np.abs(v - 1) <= 1 - 1e-3
        shares[:, t] = [a.mean() for a in (fired, ~fired & ~learns, fired & ~learns)]
    np.testing.assert_allclose(found.rate[0][0], shares[0])
    np.testing.assert_allclose(found.dead[0], shares[1])
    np.testing.assert_allclose(found.saturated[0], shares[2])
    np.testing.assert_allclose(found.radius[0], LEAK)
    assert (shares.max(axis=1) > 0).all()
    # One leak for all: the trace is a vector.
    np.testing.assert_allclose(found.trace_norm[0], norm / np.sqrt(UNITS))


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_the_spectral_radius(slots):
    rng = np.random.default_rng(slots)
    matrix = rng.normal(size=(50, slots, slots))
    expected = np.abs(np.linalg.eigvals(matrix)).max(axis=-1)
    got = spectral_radius(jnp.asarray(matrix))
    rtol = 1e-9 if slots < 3 else 1e-2
    np.testing.assert_allclose(got, expected, rtol=rtol)
    assert spectral_radius(jnp.zeros((slots, slots))) < 1e-200
    decays = np.diag(np.full(slots, 0.9)) + np.diag(np.ones(slots - 1), 1)
    np.testing.assert_allclose(spectral_radius(jnp.asarray(decays)), 0.9, rtol=0.02)


@one_in(8, RULES)
def test_every_rule_is_watched(name):
    net, state, xs, ts = NETS["lif"]()
    if name in ("EProp adaptive", "DNI"):
        net = with_extras(name, Problem(net, state, xs, ts))
    graph = etrace.compile(net, state, xs[0], RULES[name]())
    trace = etrace.init_trace(graph)
    args = graph, graph.params(net), random_state(jax.random.key(0), state), trace
    found = quick_jit(lambda x: etrace.monitor(*args, x))(xs[0])
    assert all(leaf.shape == () for leaf in jax.tree.leaves(found))
    assert all(norm == 0 for norm in found.trace_norm) or name in ("UORO", "KFRTRL")
    assert len(found.radius) == len(graph.groups)
    assert 0 < found.radius[0] < 2 or name == "Immediate"


@pytest.mark.parametrize("name", ["gru", "lstm", "gru_lif", "sparse RNN", "conv-LIF"])
def test_other_networks_are_watched(name):
    net, state, xs, _ = NETS[name]()
    graph = etrace.compile(net, state, xs[0])
    found = _watched(graph, graph.params(net), state, xs[:3])
    for rates in found.rate:
        assert all(bool(jnp.isfinite(rate).all()) for rate in rates) and rates
    assert all(float(share.max()) <= 1 for share in (*found.dead, *found.saturated))


def test_a_group_that_nobody_reads_has_no_rate():
    def call(w, x, h):
        h = 0.5 * h + w @ x
        return h, h

    w, x = jnp.ones((4, 2)), jnp.ones(2)
    graph = etrace.compile(w, jnp.zeros(4), x, call=call)
    trace = etrace.init_trace(graph)
    found = etrace.monitor(graph, w, jnp.zeros(4), trace, x)
    assert found.rate == ((),)
    assert bool(jnp.isnan(found.dead[0])) and bool(jnp.isnan(found.saturated[0]))
    assert found.radius[0] == 0.5


def test_a_graph_with_constants_is_closed_over():
    net, state, xs, _ = NETS["sparse RNN"]()
    graph = etrace.compile(net, state, xs[0])
    args = graph.params(net), state, etrace.init_trace(graph), xs[0]
    with pytest.raises(ValueError, match="closes over"):
        jax.jit(etrace.monitor)(graph, *args)


def test_another_trace_is_refused():
    net, state, xs, _ = NETS["gru"]()
    graph = etrace.compile(net, state, xs[0])
    with pytest.raises(ValueError, match="init_trace"):
        etrace.monitor(graph, graph.params(net), state, (), xs[0])
