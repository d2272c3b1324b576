"""The spiking neurons, `Sequential` and `Graph` of jaxpike."""

import functools

import jax
import jax.numpy as jnp
import pytest
from problems import (
    assert_equals_bptt,
    assert_first_step,
    assert_learns,
    assert_near_bptt,
    assert_nothing_is_lost_silently,
    problem,
)


jp = pytest.importorskip("jaxpike")
pytestmark = pytest.mark.thirdparty

IN, UNITS = 5, 16
KEYS = jax.random.split(jax.random.key(0), 6)


@pytest.fixture(autouse=True, scope="module")
def state_in_float64():
    """jaxpike keeps states in the dtype of this constant of its own, float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jp.neurons, "STATE_DTYPE", jnp.float64)
        yield


def call(model, x, state):
    state, out = model(state, x)
    return out, state


def _dense(index, size=UNITS, width=UNITS):
    return jp.Dense(size, width, key=KEYS[index], gain=3.0)


def _layer(neuron):
    return jp.Sequential(_dense(0, IN), neuron)


def _two_layers(neuron):
    return jp.Sequential(*_layer(neuron).layers, _dense(1), neuron)


def _with_integrator(neuron):
    return jp.Sequential(*_layer(neuron).layers, _dense(2), jp.LeakyIntegrator(5.0))


def _recurrent(neuron):
    nodes = {"w_in": _dense(0, IN), "hidden": neuron, "w_rec": _dense(3)}
    edges = [("input", "w_in"), ("w_in", "hidden"), ("hidden", "w_rec")]
    return jp.Graph(nodes, [*edges, ("w_rec", "hidden")], output="hidden")


# One layer: the recurrence is each neuron's own, so that D-RTRL is BPTT. As functions,
# because the dtype of the neurons is set by a fixture.
LOCAL = {
    "LIF": lambda: _layer(jp.LIF(5.0)),
    "LIF, reset to zero": lambda: _layer(jp.LIF(5.0, reset="zero")),
    "LIF, a tau each": lambda: _layer(jp.LIF(jnp.linspace(3.0, 9.0, UNITS))),
    "LIF, arctan": lambda: _layer(jp.LIF(5.0, surrogate=jp.ATan())),
    "LIF, triangle": lambda: _layer(jp.LIF(5.0, surrogate=jp.Triangular())),
    "LIF, box": lambda: _layer(jp.LIF(5.0, surrogate=jp.Boxcar())),
    "ALIF": lambda: _layer(jp.ALIF(5.0, 20.0)),
    "ALIF, reset to zero": lambda: _layer(jp.ALIF(5.0, 20.0, reset="zero")),
    "LinearLIF": lambda: _layer(jp.LinearLIF(5.0)),
    "LeakyIntegrator": lambda: _layer(jp.LeakyIntegrator(5.0)),
    "Izhikevich": lambda: _layer(jp.Izhikevich()),
    "Izhikevich, chattering": lambda: _layer(jp.Izhikevich.preset("chattering")),
}
# The cosine that was measured, less a little.
OTHERS = {
    "two LIF": (lambda: _two_layers(jp.LIF(5.0)), 0.999),
    "two ALIF": (lambda: _two_layers(jp.ALIF(5.0, 20.0)), 0.99),
    "LIF, integrator": (lambda: _with_integrator(jp.LIF(5.0)), 0.99),
    "ALIF, integrator": (lambda: _with_integrator(jp.ALIF(5.0, 20.0)), 0.99),
    "recurrent LIF": (lambda: _recurrent(jp.LIF(5.0)), 0.999),
    "recurrent ALIF": (lambda: _recurrent(jp.ALIF(5.0, 20.0)), 0.999),
}
EVERY = [*LOCAL, *OTHERS]


@functools.cache
def _problem(name):
    model = LOCAL[name]() if name in LOCAL else OTHERS[name][0]()
    # Graph keeps its feedback in float32 whatever the dtype of the neurons.
    state = jax.tree.map(lambda a: a.astype(jnp.float64), model.init_state((IN,)))
    millivolts = "Izhikevich" in name
    return problem(model, call, state, IN, KEYS[5], scale=20.0 if millivolts else 1.5)


@pytest.mark.parametrize("name", EVERY)
def test_first_step_equals_autodiff(name):
    assert_first_step(_problem(name))


@pytest.mark.parametrize("name", LOCAL)
def test_a_layer_of_neurons_equals_bptt(name):
    assert_equals_bptt(_problem(name))


@pytest.mark.parametrize("name", OTHERS)
def test_near_bptt(name):
    assert_near_bptt(_problem(name), OTHERS[name][1])


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_lost_silently(name):
    assert_nothing_is_lost_silently(_problem(name))


@pytest.mark.parametrize("name", EVERY)
def test_learns(name):
    assert_learns(_problem(name))
