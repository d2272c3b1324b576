"""Readouts: their values over time, and their gradients."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import assert_same_gradient, bptt, online, quick_jit

import eqx_etrace as etrace
from eqx_etrace import nn


IN, OUT, STEPS = 3, 2, 6
KEY = jax.random.key(4)
XS = jax.random.normal(KEY, (STEPS, IN))
TS = jax.random.normal(jax.random.key(5), (STEPS, OUT))


def _outs(readout, xs):
    def body(state, x):
        out, state = readout(x, state)
        return state, out

    return quick_jit(lambda xs: jax.lax.scan(body, readout.init_state(), xs)[1])(xs)


def _leaky(**options):
    return nn.LeakyReadout(IN, OUT, key=KEY, **options)


def test_linear():
    readout: Any = nn.LinearReadout(IN, OUT, key=KEY)
    out, state = readout(XS[0], readout.init_state())
    np.testing.assert_allclose(out, readout.weight @ XS[0] + readout.bias)
    assert state == ()
    bare = nn.LinearReadout(IN, OUT, use_bias=False, key=KEY)
    np.testing.assert_allclose(bare(XS[0], ())[0], readout.weight @ XS[0])


def test_leaky_solves_its_equation():
    """For a constant input y, v(t) = y + (v(0) - y) exp(-t / tau)."""
    readout = _leaky(tau=3.0, dt=0.7)
    readout = eqx.tree_at(lambda r: r.raw_tau, readout, readout.raw_tau + 0.1)
    y = np.asarray(readout.weight @ XS[0] + readout.bias)
    outs = _outs(readout, jnp.broadcast_to(XS[0], (5, IN)))
    time = 0.7 * np.arange(1, 6)[:, None]
    expected = y * (1 - np.exp(-time / np.asarray(readout.tau)))
    np.testing.assert_allclose(outs, expected, rtol=1e-12)


def test_leaky_over_time():
    readout = _leaky(tau=3.0)
    alpha, v, expected = np.exp(-1 / 3.0), np.zeros(OUT), []
    for x in np.asarray(XS):
        v = alpha * v + (1 - alpha) * (readout.weight @ x + readout.bias)
        expected.append(v)
    np.testing.assert_allclose(_outs(readout, XS), expected, rtol=1e-12)


def test_time_constants_stay_in_their_bounds():
    readout = _leaky(tau=7.0, tau_bounds=(2.0, 50.0))
    np.testing.assert_allclose(readout.tau, 7.0, rtol=1e-12)
    assert readout.tau.shape == (OUT,)
    for raw, bound in ((-1e3, 2.0), (1e3, 50.0)):
        far = eqx.tree_at(lambda r: r.raw_tau, readout, jnp.full(OUT, raw))
        np.testing.assert_allclose(far.tau, bound, rtol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 1.0},
        {"tau": 2000.0},
        {"tau_bounds": (0.0, 100.0)},
        {"tau_bounds": (100.0, 10.0)},
        {"tau_bounds": (1.0, float("inf"))},
    ],
)
def test_time_constants_that_are_refused(options):
    with pytest.raises(ValueError, match="nn.LeakyReadout: got tau="):
        _leaky(**options)


def test_a_step_of_no_length():
    with pytest.raises(ValueError, match="got dt=0.0"):
        _leaky(dt=0.0)


def test_largest_so_far():
    outs = _outs(nn.MaxOverTime(IN), XS)
    np.testing.assert_array_equal(outs, np.maximum.accumulate(XS, axis=0))


def test_spikes_so_far():
    spikes = (XS > 0).astype(XS.dtype)
    np.testing.assert_array_equal(
        _outs(nn.SpikeCount(IN), spikes), np.cumsum(spikes, 0)
    )


# Through the compiler: name: (net, groups). Each is one layer with a memory.

NETS = {
    "leaky": (_leaky(tau=3.0), [(OUT, 1)]),
    "largest": (nn.Sequential([_leaky(tau=3.0), nn.MaxOverTime(OUT)]), [(OUT, 2)]),
    "count": (
        nn.Sequential([nn.MinGRU(IN, OUT, key=KEY), nn.SpikeCount(OUT)]),
        [(OUT, 2)],
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_gradient_equals_bptt(name):
    net, groups = NETS[name]
    state = net.init_state()
    graph = etrace.compile(net, state, XS[0])
    assert [(group.units, group.slots) for group in graph.groups] == groups
    assert graph.vjp == "single-step"
    run = quick_jit(functools.partial(online, graph))
    got = run(graph.params(net), state, XS, TS)
    assert_same_gradient(got, bptt(net, state, XS, TS))
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        assert np.any(leaf), jax.tree_util.keystr(path)


def test_linear_has_the_gradient_of_the_step():
    net = nn.Sequential(
        [nn.IndRNN(IN, IN, key=KEY), nn.LinearReadout(IN, OUT, key=KEY)]
    )
    graph = etrace.compile(net, net.init_state(), XS[0])
    run = quick_jit(functools.partial(online, graph))
    got = run(graph.params(net), net.init_state(), XS, TS)
    assert_same_gradient(got, bptt(net, net.init_state(), XS, TS))


READOUTS = {
    "LinearReadout": functools.partial(nn.LinearReadout, IN, OUT, key=KEY),
    "LeakyReadout": functools.partial(nn.LeakyReadout, IN, OUT, key=KEY),
    "MaxOverTime": functools.partial(nn.MaxOverTime, IN),
    "SpikeCount": functools.partial(nn.SpikeCount, IN),
}


@pytest.mark.parametrize("name", READOUTS)
def test_dtype(name):
    readout = eqx.filter_eval_shape(READOUTS[name], dtype=jnp.float32)
    state, x = readout.init_state(), jnp.ones(IN, "float32")
    out, new = eqx.filter_eval_shape(type(readout).__call__, readout, x, state)
    leaves = jax.tree.leaves((readout, state, out, new))
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}


@pytest.mark.parametrize("name", READOUTS)
def test_wrong_sizes_are_refused(name):
    readout = READOUTS[name]()
    where = rf"nn.{name}: got "
    with pytest.raises(ValueError, match=where + r"an input of shape \(4,\), .*\(3,\)"):
        readout(jnp.ones(IN + 1), readout.init_state())
    if name != "LinearReadout":
        with pytest.raises(ValueError, match=where + r"a state of shape \(1,\)"):
            readout(jnp.ones(IN), jnp.zeros(1))


@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match=f"nn.SpikeCount: got size={size}"):
        nn.SpikeCount(size)
    with pytest.raises(ValueError, match=f"nn.MaxOverTime: got size={size}"):
        nn.MaxOverTime(size)
    with pytest.raises(ValueError, match=f"got output_size={size}"):
        nn.LinearReadout(IN, size, key=KEY)
    with pytest.raises(ValueError, match=f"got input_size={size}"):
        nn.LeakyReadout(size, OUT, key=KEY)
