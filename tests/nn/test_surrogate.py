"""Spikes are a step forward; each derivative is its formula."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqx_etrace import nn


X = np.array([-3.0, -0.7, -0.26, -0.01, 0.0, 0.02, 0.24, 0.9, 2.5])


def _normal(x, mean, sigma):
    return np.exp(-((x - mean) ** 2) / (2 * sigma**2)) / math.sqrt(2 * np.pi * sigma**2)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _multi(x, s=0.4, h=0.2, k=5.0):
    sides = _normal(x, s, k * s) + _normal(x, -s, k * s)
    return (1 + h) * _normal(x, 0.0, s) - h * sides


FORMULAS = {
    "triangle": (
        nn.triangle(0.8, scale=0.4),
        lambda x: 0.4 * np.clip(1 - abs(x) / 0.8, 0, None),
    ),
    "sigmoid": (
        nn.sigmoid(3.0, scale=0.5),
        lambda x: 0.5 * 3 * _sigmoid(3 * x) * (1 - _sigmoid(3 * x)),
    ),
    "arctan": (
        nn.arctan(3.0, scale=0.5),
        lambda x: 0.5 * 1.5 / (1 + (np.pi / 2 * 3 * x) ** 2),
    ),
    "relu_grad": (
        nn.relu_grad(0.8, scale=0.3),
        lambda x: 0.3 * np.clip(0.8 - abs(x), 0, None),
    ),
    "boxcar": (
        nn.boxcar(0.5, scale=2.0),
        lambda x: 2.0 / 0.5 * (abs(x) < 0.25),
    ),
    "superspike": (
        nn.superspike(10.0, scale=0.5),
        lambda x: 0.5 / (1 + 10 * abs(x)) ** 2,
    ),
    "gaussian": (nn.gaussian(0.4, scale=0.5), lambda x: 0.5 * _normal(x, 0.0, 0.4)),
    "multi_gaussian": (
        nn.multi_gaussian(0.4, height=0.2, spread=5.0, scale=0.5),
        lambda x: 0.5 * _multi(x),
    ),
}
# The integral of a surrogate is the height of the step it stands for.
AREAS = [
    (nn.triangle(2.0, 1.0), 2.0),
    (nn.sigmoid(4.0), 1.0),
    (nn.arctan(40.0), 1.0),
    (nn.relu_grad(1.0, 1.0), 1.0),
    (nn.boxcar(2.0), 1.0),
    (nn.superspike(100.0), 0.02),
    (nn.gaussian(), 1.0),
    (nn.multi_gaussian(scale=1.0), 0.85),
]


@pytest.mark.parametrize("name", FORMULAS)
def test_derivative_is_the_formula(name):
    spike, formula = FORMULAS[name]
    np.testing.assert_allclose(spike.slope(jnp.asarray(X)), formula(X), rtol=1e-12)
    primal, tangent = jax.jvp(spike, (jnp.asarray(X),), (jnp.full(X.shape, 2.0),))
    np.testing.assert_array_equal(primal, X > 0)
    np.testing.assert_allclose(tangent, 2 * formula(X), rtol=1e-12)
    pulled = jax.vjp(spike, jnp.asarray(X))[1](jnp.full(X.shape, 3.0))[0]
    np.testing.assert_allclose(pulled, 3 * formula(X), rtol=1e-12)


@pytest.mark.parametrize("spike, area", AREAS, ids=lambda v: repr(v))
def test_area(spike, area):
    x = np.linspace(-50, 50, 200_001)
    got = np.trapezoid(spike.slope(jnp.asarray(x)), x)
    np.testing.assert_allclose(got, area, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_forward_and_derivative_keep_the_dtype(dtype):
    x = jnp.asarray([-1.0, 0.0, 1e-3, 1.0], dtype)
    for spike, _ in FORMULAS.values():
        z, dz = jax.jvp(spike, (x,), (x,))
        assert z.dtype == dz.dtype == dtype
        np.testing.assert_array_equal(z.astype(float), [0, 0, 1, 1])


def _bump(x, width):
    return jnp.exp(-jnp.abs(x) / width)


def _of_the_layer(x):
    return jnp.mean(x) + jnp.max(x) + x * 0


def test_own_derivative():
    spike = nn.surrogate(_bump, width=0.5)
    slopes = jax.vmap(jax.grad(spike))(jnp.asarray(X))
    np.testing.assert_allclose(slopes, np.exp(-abs(X) / 0.5), rtol=1e-12)


def test_straight_through():
    spike = nn.surrogate(lambda x: 1.0)
    np.testing.assert_array_equal(spike.slope(jnp.asarray(X)), np.ones(X.shape))


def test_own_derivative_sees_one_neuron():
    spike = nn.surrogate(_of_the_layer)
    np.testing.assert_allclose(spike.slope(jnp.asarray(X)), 2 * X, rtol=1e-12)


def test_the_derivative_has_a_derivative():
    found = jax.vmap(jax.grad(jax.grad(nn.gaussian(0.4))))(jnp.asarray(X))
    np.testing.assert_allclose(found, -X / 0.4**2 * _normal(X, 0, 0.4), rtol=1e-12)


def test_equal_settings_are_equal():
    for name, (spike, _) in FORMULAS.items():
        make = getattr(nn, name)
        again = make(**dict(spike.options))
        assert spike == again and hash(spike) == hash(again)
        assert spike != make(**dict(spike.options) | {"scale": 9.0})
        assert repr(spike).startswith(f"Surrogate({name}, ")
    one, two = nn.surrogate(_bump, width=0.5), nn.surrogate(_bump, width=0.5)
    assert one == two and hash(one) == hash(two)
    assert len({nn.sigmoid(), nn.sigmoid(25.0), nn.sigmoid(2.0)}) == 2


def test_equal_settings_compile_once():
    count = eqx.debug.assert_max_traces(lambda m, i, s: m(i, s), max_traces=1)
    run = eqx.filter_jit(count)
    for _ in range(2):
        neuron = nn.LIF(3, tau=[1.0, 2.0, 3.0], spike=nn.superspike(10.0))
        run(neuron, jnp.ones(3), neuron.init_state())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.triangle(width=0.0), "triangle: got width = 0.0, expected"),
        (lambda: nn.gaussian(sigma=-1.0), "gaussian: got sigma = -1.0, expected"),
        (lambda: nn.arctan(scale=math.inf), "arctan: got scale = inf, expected"),
        (lambda: nn.surrogate(lambda x: jnp.stack([x, x])), "expected one number"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_derivative_has_to_be_callable():
    with pytest.raises(TypeError):
        nn.surrogate(0.5)  # type: ignore[arg-type] on purpose
