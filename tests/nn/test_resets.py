"""Resets and their switches change the gradient that they should, and no other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit

from eqx_etrace import nn


SPIKE = nn.superspike(2.0)
UNITS = 3
RESETS: list[Any] = ["subtract", "value", "none"]


def _by_hand(v, current, reset, detach):
    """One step of a LIF neuron: tau = 10, threshold 0.8, rest 0.1, reset at -0.2."""
    z = SPIKE(v - 0.8)
    z = jax.lax.stop_gradient(z) if detach else z
    if reset == "subtract":
        v = v - z * (0.8 + 0.2)
    if reset == "value":
        v = (1 - z) * v - z * 0.2
    target = 0.1 + current
    return target + (v - target) * jnp.exp(-0.1)


def _total(step, currents):
    """A loss that reads every spike and every membrane, each with its own weight."""
    v, found = jnp.full(UNITS, 0.9), 0.0
    weights = np.random.default_rng(1).normal(size=(len(currents), 2, UNITS))
    for current, weight in zip(currents, weights, strict=True):
        v = step(v, current)
        found += jnp.sum(weight[0] * SPIKE(v - 0.8)) + jnp.sum(weight[1] * v)
    return found


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_lif_equals_its_twin(reset, detach):
    neuron = nn.LIF(
        UNITS,
        tau=10.0,
        threshold=0.8,
        v_rest=0.1,
        v_reset=-0.2,
        reset=reset,
        detach_reset=detach,
        spike=SPIKE,
    )
    drawn = np.random.default_rng(0).normal(3.0, 3.0, (6, UNITS))
    currents = jnp.asarray(drawn)

    def module(v, current):
        return neuron(current, nn.LIFState(v))[1].v

    def twin(v, current):
        return _by_hand(v, current, reset, detach)

    got, expected, other = (
        quick_jit(jax.grad(lambda x, step=step: _total(step, x)))(currents)
        for step in (module, twin, lambda v, i: _by_hand(v, i, reset, not detach))
    )
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    if reset != "none":
        assert np.abs(got - other).max() > 1e-2


# d(new v)/d(old v) of the reset alone: (neuron, threshold, v_reset, scale of v).
NEURONS: dict[str, Any] = {
    "IF": (nn.IF, lambda s: 1.0, 0.0, 1.0),
    "ALIF": (nn.ALIF, lambda s: 1 + 0.2 * s.a, 0.0, 1.0),
    "GIF": (nn.GIF, lambda s: s.threshold, -70.0, 10.0),
    "AdEx": (nn.AdEx, lambda s: -30.0, -70.6, 10.0),
    "Izhikevich": (nn.Izhikevich, lambda s: 30.0, -65.0, 10.0),
}


def _near_threshold(neuron, threshold, scale):
    """Two units below, one above."""
    state = neuron.init_state()
    offset = scale * jnp.array([-0.7, -0.2, 0.4])
    if isinstance(state, nn.ALIFState):
        state = state._replace(a=jnp.array([0.0, 0.5, 0.3]))
    return state._replace(v=threshold(state) + offset), offset


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reset", ["subtract", "value"])
@pytest.mark.parametrize("name", NEURONS)
def test_derivative_of_the_reset(name, reset, detach):
    make, threshold, v_reset, scale = NEURONS[name]
    spike = nn.superspike(1.0 / scale)
    neuron = make(UNITS, reset=reset, detach_reset=detach, spike=spike)
    state, offset = _near_threshold(neuron, threshold, scale)

    def after(v):
        new = neuron.after_spike(state._replace(v=v))
        return jax.tree.map(jnp.sum, new), new

    grads, new = jax.jacrev(after, has_aux=True)(state.v)
    z, slope = (offset > 0).astype(float), spike.slope(offset)
    base = 1.0 if name == "ALIF" else threshold(state)  # it subtracts the bare one
    if reset == "subtract":
        np.testing.assert_allclose(new.v, state.v - z * (base - v_reset), rtol=1e-12)
        expected = 1 - (0 if detach else slope * (base - v_reset))
    else:
        np.testing.assert_allclose(new.v, jnp.where(z, v_reset, state.v), rtol=1e-12)
        expected = 1 - z - (0 if detach else slope * (state.v - v_reset))
    np.testing.assert_allclose(grads.v, expected * np.ones(UNITS), rtol=1e-10)
    jumps = {"ALIF": ("a", 1.0), "AdEx": ("w", 80.5), "Izhikevich": ("u", 8.0)}
    if name in jumps:
        leaf, size = jumps[name]
        np.testing.assert_allclose(getattr(grads, leaf), size * slope, rtol=1e-10)


@pytest.mark.parametrize("detach", [False, True])
def test_gif_jumps_carry_gradient_and_its_threshold_is_a_reset(detach):
    spike = nn.superspike(0.1)
    options: Any = {"r_1": 0.5, "jump_1": 0.3, "jump_2": -0.1, "threshold_reset": -40.0}
    neuron = nn.GIF(UNITS, detach_reset=detach, spike=spike, **options)
    state, offset = _near_threshold(neuron, lambda s: s.threshold, 10.0)
    state = state._replace(i1=jnp.array([0.1, 0.2, 0.3]))

    def after(v):
        new = neuron.after_spike(state._replace(v=v))
        return jax.tree.map(jnp.sum, new)

    grads, slope = jax.jacrev(after)(state.v), spike.slope(offset)
    expected = slope * (-0.5 * state.i1 + 0.3)
    np.testing.assert_allclose(grads.i1, expected, rtol=1e-10)
    np.testing.assert_allclose(grads.i2, -0.1 * slope, rtol=1e-10)
    np.testing.assert_allclose(grads.threshold, 0 if detach else 10 * slope, rtol=1e-10)


def test_refractory_counters_carry_no_gradient():
    """The neuron with its counter against one whose holding times are data."""
    neuron = nn.Refractory(nn.LIF(UNITS, tau=10.0, spike=SPIKE), 2.0)
    currents = jnp.asarray(np.random.default_rng(2).normal(8.0, 3.0, (10, UNITS)))

    def run(currents):
        state, states, outs = neuron.init_state(), [], []
        for current in currents:
            out, state = neuron(current, state)
            states.append(state)
            outs.append(out)
        return states, jnp.stack(outs)

    states, _ = quick_jit(run)(currents)
    held = [np.asarray(state.count > 0) for state in states]
    assert jnp.issubdtype(states[0].count.dtype, jnp.integer)
    assert np.sum(held) > 5

    def twin(currents):
        v, before, outs = jnp.zeros(UNITS), np.zeros(UNITS, bool), []
        for current, now in zip(currents, held, strict=True):
            fired = jnp.where(before, 0.0, SPIKE(v - 1))
            v = v - jax.lax.stop_gradient(fired)
            v = jnp.where(now, v, current + (v - current) * jnp.exp(-0.1))
            outs.append(jnp.where(now, 0.0, SPIKE(v - 1)))
            before = now
        return jnp.stack(outs)

    weights = np.random.default_rng(3).normal(size=(10, UNITS))
    got = quick_jit(jax.grad(lambda x: jnp.sum(weights * run(x)[1])))(currents)
    expected = quick_jit(jax.grad(lambda x: jnp.sum(weights * twin(x))))(currents)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-14)
    assert np.count_nonzero(expected) > 10
