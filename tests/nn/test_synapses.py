"""Synapses, plasticity, connections and delays against their closed forms."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit

import eqx_etrace as etrace
from eqx_etrace import nn


KEY = jax.random.key(0)
UNITS, STEPS = 3, 60
RNG = np.random.default_rng(0)
SPIKES = (RNG.random((STEPS, UNITS)) < 0.25).astype(float)
WEIGHTED = SPIKES * RNG.normal(size=(STEPS, UNITS))


def _run(piece, xs):
    """Outputs and states of a sequence, time first."""

    def body(state, x):
        out, state = piece(x, state)
        return state, (out, state)

    scan = quick_jit(lambda state, xs: jax.lax.scan(body, state, xs)[1])
    return scan(piece.init_state(), jax.tree.map(jnp.asarray, xs))


def _sum_of_kernels(kernel, xs, dt):
    """What each input leaves at each later step: a sum over all of them."""
    out = np.zeros(xs.shape)
    for k, x in enumerate(xs):
        t = dt * np.arange(len(xs) - k)[:, None]
        out[k:] += kernel(t) * x
    return out


TAU = np.array([2.0, 3.0, 7.0])


def _dual(t):
    """Peak found by search, not by its formula."""
    times = np.linspace(0, 40, 400_001)
    shape = np.exp(-times / 9) - np.exp(-times / 1.5)
    return (np.exp(-t / 9) - np.exp(-t / 1.5)) / shape.max()


SYNAPSES: dict[str, Any] = {
    "exponential": (nn.Exponential, {"tau": TAU}, lambda t: np.exp(-t / TAU)),
    "alpha": (nn.Alpha, {"tau": TAU}, lambda t: t / TAU * np.exp(1 - t / TAU)),
    "dual": (nn.DualExponential, {"tau_rise": 1.5, "tau_decay": 9.0}, _dual),
}


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("name", SYNAPSES)
def test_currents_are_sums_of_their_kernel(name, trains):
    make, taus, kernel = SYNAPSES[name]
    synapse = make(UNITS, dt=0.5, trainable=tuple(taus) if trains else (), **taus)
    outs, _ = _run(synapse, WEIGHTED)
    expected = _sum_of_kernels(kernel, WEIGHTED, 0.5)
    np.testing.assert_allclose(outs, expected, rtol=1e-8, atol=1e-10)


def test_delta():
    outs, states = _run(nn.Delta(UNITS), WEIGHTED)
    np.testing.assert_array_equal(outs, WEIGHTED)
    assert states == ()


def test_conductances():
    """A leaky membrane between two reversal potentials, solved step by step."""
    exc, inh = 0.6 * SPIKES, 0.2 * SPIKES[::-1]
    lif = nn.LIF(UNITS, tau=TAU + 5, v_rest=-65.0, threshold=-50.0, v_reset=-65.0)
    neuron = nn.COBA(lif, e_exc=0.0, e_inh=-80.0, tau_exc=4.0, tau_inh=[5.0, 8.0, 12.0])
    outs, states = _run(neuron, nn.Drive(jnp.asarray(exc), jnp.asarray(inh)))
    v, g_e, g_i = np.full(UNITS, -65.0), np.zeros(UNITS), np.zeros(UNITS)
    for t in range(STEPS):
        v = v - (v > -50) * (-50 + 65)
        g_e = g_e * np.exp(-1 / 4.0) + exc[t]
        g_i = g_i * np.exp(-1 / np.array([5.0, 8.0, 12.0])) + inh[t]
        # (tau) dv/dt = -(v + 65) + g_e (0 - v) + g_i (-80 - v), linear in v.
        g = 1 + g_e + g_i
        v_inf = (-65 + g_e * 0 + g_i * -80) / g
        v = v_inf + (v - v_inf) * np.exp(-g / (TAU + 5))
        np.testing.assert_allclose(states.g_exc[t], g_e, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(states.g_inh[t], g_i, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(states.neuron.v[t], v, rtol=1e-10)
        np.testing.assert_array_equal(outs[t], v > -50)
    assert np.all(outs.sum(0) >= 2)


@pytest.mark.parametrize("tau_f, tau_d", [(50.0, 5.0), (2.0, 60.0)])
def test_tsodyks_markram(tau_f, tau_d):
    """From spike to spike with the exact solutions in between."""
    stp = nn.STP(UNITS, release=[0.1, 0.2, 0.6], tau_f=tau_f, tau_d=tau_d, dt=0.5)
    outs, _ = _run(stp, SPIKES)
    expected = np.zeros(SPIKES.shape)
    for unit, share in enumerate([0.1, 0.2, 0.6]):
        u, r, last = 0.0, 1.0, 0
        for t in np.flatnonzero(SPIKES[:, unit]):
            gap = 0.5 * (t - last)
            u, r = u * math.exp(-gap / tau_f), 1 - (1 - r) * math.exp(-gap / tau_d)
            u = u + share * (1 - u)
            expected[t, unit] = u * r
            r, last = r - u * r, t
    np.testing.assert_allclose(outs, expected, rtol=1e-10, atol=1e-14)


def test_facilitation_and_depression_differ():
    """At a steady 50 Hz, dt of 1 ms: one warms up before it tires, one only tires."""
    train = np.zeros((200, 1))
    train[::20] = 1
    warm, _ = _run(nn.STP(1, release=0.05, tau_f=500.0, tau_d=50.0), train)
    tired, _ = _run(nn.STP(1, release=0.5, tau_f=20.0, tau_d=500.0), train)
    warm, tired = warm[::20, 0], tired[::20, 0]
    assert warm[3] > 2 * warm[0]
    assert tired[3] < 0.4 * tired[0]


def test_depression():
    std = nn.STD(UNITS, release=0.4, tau_d=30.0)
    outs, states = _run(std, SPIKES)
    r, total = np.ones(UNITS), 0.0
    for t, x in enumerate(SPIKES):
        r = 1 - (1 - r) * np.exp(-1 / 30.0)
        np.testing.assert_allclose(outs[t], 0.4 * r * x, rtol=1e-10, atol=1e-14)
        r, total = r - 0.4 * r * x, total + x
        np.testing.assert_allclose(states.r[t], r, rtol=1e-10)
    assert np.all(total > 5)


# Connections.


def test_dense():
    dense = nn.Dense(4, 3, key=KEY)
    x = RNG.normal(size=4)
    out, state = dense(jnp.asarray(x), dense.init_state())
    assert dense.bias is not None and state == ()
    np.testing.assert_allclose(out, dense.weight @ x + dense.bias, rtol=1e-12)
    assert float(jnp.abs(dense.weight).max()) <= 0.5
    bare = nn.Dense(4, 3, use_bias=False, key=KEY)
    assert bare.bias is None
    np.testing.assert_allclose(bare(jnp.asarray(x))[0], bare.weight @ x, rtol=1e-12)


def test_sparse_is_a_dense_matrix_with_zeros():
    sparse: Any = nn.Sparse(7, 5, 3, key=KEY)
    matrix, indices = np.zeros((5, 7)), np.asarray(sparse.indices)
    for row, sources, weights in zip(
        matrix, indices, np.asarray(sparse.weight), strict=True
    ):
        assert len(set(sources)) == 3
        row[sources] = weights
    x = RNG.normal(size=7)
    out, _ = sparse(jnp.asarray(x), ())
    np.testing.assert_allclose(out, matrix @ x + sparse.bias, rtol=1e-12)
    again = nn.Sparse(7, 5, 3, indices=sparse.indices, key=KEY)
    np.testing.assert_array_equal(again(jnp.asarray(x))[0], out)
    assert len(np.unique(indices)) == 7


def test_convolution():
    conv = nn.Conv(2, 2, 3, kernel_size=3, stride=2, padding=1, key=KEY)
    x = jnp.asarray(RNG.normal(size=(2, 5, 6)))
    out, state = conv(x, conv.init_state())
    assert out.shape == conv.out_shape(x.shape) == (3, 3, 3) and state == ()
    np.testing.assert_array_equal(out, conv.conv(x))


def test_dale():
    x = jnp.asarray(RNG.normal(size=5))
    dale = nn.Dale(5, 4, excitatory=3, key=KEY)
    apart = nn.ExcInh(5, 4, excitatory=3, key=KEY)
    weight = np.log1p(np.exp(dale.weight.raw))
    signs = np.array([1, 1, 1, -1, -1])
    np.testing.assert_allclose(dale.matrix(), weight * signs, rtol=1e-12)
    np.testing.assert_allclose(dale(x)[0], weight * signs @ x, rtol=1e-12)
    drive, _ = apart(x)
    np.testing.assert_allclose(drive.exc, weight[:, :3] @ x[:3], rtol=1e-12)
    np.testing.assert_allclose(drive.inh, weight[:, 3:] @ x[3:], rtol=1e-12)
    np.testing.assert_allclose(drive.exc - drive.inh, dale(x)[0], rtol=1e-12)
    pushed = eqx.tree_at(lambda d: d.weight.raw, dale, dale.weight.raw - 30)
    assert np.all(np.sign(pushed.matrix()) == signs)


def test_all_may_excite_or_inhibit():
    x = jnp.ones(3)
    only = nn.ExcInh(3, 2, excitatory=3, key=KEY)(x)[0]
    np.testing.assert_array_equal(only.inh, np.zeros(2))
    none = nn.ExcInh(3, 2, excitatory=0, key=KEY)(x)[0]
    np.testing.assert_array_equal(none.exc, np.zeros(2))


@pytest.mark.parametrize("excitatory", [0, 3])
def test_all_of_one_kind_compile(excitatory):
    inputs = nn.ExcInh(3, 2, excitatory=excitatory, key=KEY)
    neuron = nn.COBA(nn.LIF(2), e_exc=5.0, e_inh=-1.0)

    def call(model, x, state):
        drive, _ = model[0](x)
        return model[1](drive, state)

    state = neuron.init_state()
    graph = etrace.compile((inputs, neuron), state, jnp.ones(3), call=call)
    assert "trace on" in str(graph.explain(weight="[0].weight.raw"))


# Delays.


@pytest.mark.parametrize("steps", [0, 1, 4, [0, 3, 1]])
def test_delay(steps):
    outs, states = _run(nn.Delay(UNITS, steps), WEIGHTED)
    late = np.zeros(WEIGHTED.shape)
    for unit, d in enumerate(np.broadcast_to(steps, (UNITS,))):
        late[d:, unit] = WEIGHTED[: STEPS - d, unit]
    np.testing.assert_array_equal(outs, late)
    assert states.buffer.shape[1:] == (np.max(steps), UNITS)


def test_delay_of_a_map():
    steps = np.array([[0, 1], [2, 3]])
    xs = RNG.normal(size=(8, 2, 2))
    outs, _ = _run(nn.Delay((2, 2), steps), xs)
    for i in range(2):
        for j in range(2):
            d = steps[i, j]
            np.testing.assert_array_equal(outs[d:, i, j], xs[: 8 - d, i, j])


def test_delays_of_connections():
    delays = RNG.integers(0, 4, (2, UNITS))
    connection = nn.DelayedDense(UNITS, 2, delays, key=KEY)
    outs, _ = _run(connection, SPIKES)
    expected = np.zeros((STEPS, 2)) + np.asarray(connection.bias)
    for i in range(2):
        for j in range(UNITS):
            d = delays[i, j]
            late = SPIKES[: STEPS - d, j]
            expected[d:, i] += float(connection.weight[i, j]) * late
    np.testing.assert_allclose(outs, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: nn.Dense(3, 4, key=KEY)(jnp.ones(4)),
            r"Dense: got an input of shape \(4,\), expected \(3,\)",
        ),
        (
            lambda: nn.Sparse(3, 4, 2, key=KEY)(jnp.ones(4)),
            r"Sparse: got an input of shape \(4,\), expected \(3,\)",
        ),
        (
            lambda: nn.Dale(3, 4, 2, key=KEY)(jnp.ones(4)),
            r"Dale: got an input of shape \(4,\), expected \(3,\)",
        ),
        (
            lambda: nn.ExcInh(3, 4, 2, key=KEY)(jnp.ones(4)),
            r"ExcInh: got an input of shape \(4,\), expected \(3,\)",
        ),
        (
            lambda: nn.Conv(1, 2, 4, 2, key=KEY)(jnp.ones((3, 5))),
            r"Conv: got an input of shape \(3, 5\), expected \(2, ...\) with 1 axes",
        ),
        (
            lambda: nn.Exponential(3)(jnp.ones(2), nn.Exponential(3).init_state()),
            r"Exponential: got an input of shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: nn.Exponential(3)(jnp.ones(3), nn.Exponential(2).init_state()),
            r"Exponential: got state.g of shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: nn.Delay(3, 2)(jnp.ones(3), nn.Delay(3, 1).init_state()),
            r"Delay: got state.buffer of shape \(1, 3\), expected \(2, 3\)",
        ),
        (
            lambda: nn.STP(3)(jnp.ones(4), nn.STP(3).init_state()),
            r"STP: got an input of shape \(4,\), expected \(3,\)",
        ),
        (
            lambda: nn.STD(3)(jnp.ones(4), nn.STD(3).init_state()),
            r"STD: got an input of shape \(4,\), expected \(3,\)",
        ),
        (lambda: nn.STP(3, release=1.5), "STP.release: got 1.5, expected a number"),
        (lambda: nn.Delay(3, -1), "Delay: got delays -1, expected integers"),
        (lambda: nn.Delay(3, [1, 2]), r"Delay: got delays of shape \(2,\), expected"),
        (
            lambda: nn.DelayedDense(3, 2, [[1, 2]], key=KEY),
            r"DelayedDense: got delays of shape \(1, 2\), expected \(2, 3\)",
        ),
        (
            lambda: nn.Sparse(3, 4, 5, key=KEY),
            "Sparse: got a fan_in of 5, expected at most pre = 3",
        ),
        (
            lambda: nn.Sparse(3, 1, 2, indices=[[0, 3]], key=KEY),
            "Sparse: got indices from 0 to 3, expected them from 0 to 2",
        ),
        (
            lambda: nn.Sparse(3, 2, 2, indices=[[0, 1]], key=KEY),
            r"Sparse: got indices .*\[1, 2\], expected integers of shape \(2, 2\)",
        ),
        (
            lambda: nn.Dale(3, 4, 5, key=KEY),
            "Dale: got 5 excitatory units, expected at most pre = 3",
        ),
        (
            lambda: nn.DualExponential(3, tau_rise=5.0, tau_decay=5.0),
            "DualExponential: got tau_rise up to 5.0 and tau_decay from 5.0, expected",
        ),
        (
            lambda: nn.DualExponential(3, tau_rise=nn.Positive(2.0)),
            "DualExponential: got Positive, expected numbers or Bounded",
        ),
        (
            lambda: _coba(nn.Drive(jnp.ones(3), jnp.ones(4))),
            r"COBA: got an input of shape Drive.*expected a Drive of two arrays",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _coba(x):
    neuron: Any = nn.COBA(nn.LIF(3), e_exc=5.0, e_inh=-1.0)
    return neuron(x, neuron.init_state())
