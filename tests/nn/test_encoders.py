"""Encoders against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit

from eqx_etrace import nn


KEY = jax.random.key(0)
X = jnp.array([[0.0, 0.03, 0.2], [0.5, 0.97, 1.0]])
SERIES = jnp.cumsum(jax.random.normal(jax.random.key(1), (40, 2)), 0)


def _within(spikes, probability, errors=4.5):
    """The mean of each element over time within so many standard errors."""
    error = np.sqrt(probability * (1 - probability) / len(spikes))
    assert np.all(np.abs(np.mean(spikes, 0) - probability) <= errors * error)


def test_rate():
    spikes = nn.rate_encode(X, 4000, key=KEY)
    assert spikes.shape == (4000, *X.shape)
    assert set(np.unique(spikes)) == {0, 1}
    _within(spikes, np.asarray(X))
    assert abs(np.corrcoef(spikes[1:, 1, 0], spikes[:-1, 1, 0])[0, 1]) < 0.08
    assert abs(np.corrcoef(spikes[:, 0, 2], spikes[:, 1, 0])[0, 1]) < 0.08


def test_rate_with_gain_and_offset():
    spikes = nn.rate_encode(X, 4000, key=KEY, gain=2.0, offset=-0.1)
    _within(spikes, np.clip(2 * X - 0.1, 0, 1))


def test_poisson():
    """A spike is at least one event of a Poisson distribution with mean rate dt."""
    rate = jnp.array([-5.0, 0.0, 20.0, 300.0, 2000.0])
    spikes = nn.poisson_encode(rate, 4000, key=KEY, dt=0.001)
    assert set(np.unique(spikes)) == {0, 1}
    _within(spikes, 1 - np.exp(-0.001 * np.maximum(rate, 0)))


@pytest.mark.parametrize("encode", [nn.rate_encode, nn.poisson_encode])
def test_the_key_decides(encode):
    options = {"dt": 0.5} if encode is nn.poisson_encode else {}
    one, again, other = (
        encode(X, 50, key=key, **options) for key in (KEY, KEY, jax.random.key(1))
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)


def test_latency_is_when_a_membrane_reaches_its_threshold():
    tau, threshold, steps = 5.0, 0.1, 12
    x = jnp.array([-1.0, 0.0, 0.1, 0.105, 0.15, 0.25, 0.5, 1.0, 30.0])
    spikes = np.asarray(nn.latency_encode(x, steps, tau=tau, threshold=threshold))
    time = np.arange(steps + 1)[:, None]
    membrane = np.asarray(x) * (1 - np.exp(-time / tau))
    crosses = (membrane[:-1] <= threshold) & (membrane[1:] > threshold)
    np.testing.assert_array_equal(spikes, crosses.astype(float))
    # Early for a large input, none at the threshold, none beyond the end (0.105).
    np.testing.assert_array_equal(spikes.sum(0), [0, 0, 0, 0, 1, 1, 1, 1, 1])
    assert np.all(np.diff(spikes.argmax(0)[4:]) <= 0) and spikes[0, -1] == 1


def test_linear_latency():
    x = jnp.array([-3.0, 0.0, 0.24, 0.5, 0.75, 1.0, 7.0])
    spikes = nn.linear_latency_encode(x, 5)
    np.testing.assert_array_equal(np.sum(spikes, 0), np.ones(7))
    np.testing.assert_array_equal(np.argmax(spikes, 0), [4, 4, 3, 2, 1, 0, 0])


def test_population():
    responses = nn.population_encode(X, 5, low=-1.0, high=1.0)
    centres = np.array([-1, -0.5, 0, 0.5, 1])
    expected = np.exp(-((np.asarray(X)[..., None] - centres) ** 2) / (2 * 0.5**2))
    np.testing.assert_allclose(responses, expected, rtol=1e-12)
    wide = nn.population_encode(X, 5, low=-1.0, high=1.0, width=2.0)
    np.testing.assert_allclose(wide, expected ** (0.5**2 / 2.0**2), rtol=1e-12)


def test_population_of_a_single_number():
    assert nn.population_encode(jnp.array(0.5), 3).shape == (3,)


def test_delta():
    xs = jnp.array([0.0, 0.5, 0.7, 0.6, 0.1, 0.1])
    expected = [0, 1, 0, 0, -1, 0]
    np.testing.assert_array_equal(nn.delta_encode(xs, threshold=0.5), expected)
    got = nn.delta_encode(xs, threshold=0.5, initial=jnp.array(1.0))
    np.testing.assert_array_equal(got, [-1, *expected[1:]])


def test_numbers_of_numpy():
    got = nn.delta_encode(np.array([0.0, 0.5]), threshold=0.5, initial=-1.0)
    np.testing.assert_array_equal(got, [1, 1])


def test_step_forward():
    xs, threshold = np.asarray(SERIES), 0.8
    baseline, expected = xs[0].copy(), []
    for x in xs:
        spike = np.where(x - baseline >= threshold, 1, 0)
        spike = np.where(baseline - x >= threshold, -1, spike)
        baseline = baseline + threshold * spike
        expected.append(spike)
    got = nn.step_forward_encode(SERIES, threshold=threshold)
    np.testing.assert_array_equal(got, expected)
    got = nn.step_forward_encode(SERIES, threshold=0.8, initial=SERIES[0] + 5)
    assert np.all(got[0] == -1)


def test_step_forward_can_be_undone_and_misses_no_slow_change():
    xs = jnp.linspace(0, 1, 200)
    spikes = nn.step_forward_encode(xs, threshold=0.1)
    assert np.max(np.abs(0.1 * np.cumsum(spikes) - xs)) < 0.1
    assert not np.any(nn.delta_encode(xs, threshold=0.1))


# name: a function of (x, key).
ENCODERS = {
    "rate_encode": lambda x, key: nn.rate_encode(x, 7, key=key),
    "poisson_encode": lambda x, key: nn.poisson_encode(x, 7, key=key, dt=0.1),
    "latency_encode": lambda x, key: nn.latency_encode(x, 7, tau=5.0),
    "linear_latency_encode": lambda x, key: nn.linear_latency_encode(x, 7),
    "population_encode": lambda x, key: nn.population_encode(x, 7),
    "delta_encode": lambda x, key: nn.delta_encode(x, threshold=0.1),
    "step_forward_encode": lambda x, key: nn.step_forward_encode(x, threshold=0.1),
}
SHAPES = {"population_encode": (7, 2, 7)} | dict.fromkeys(
    ("delta_encode", "step_forward_encode"), (7, 2)
)
EVERY = pytest.mark.parametrize("name", ENCODERS)


@EVERY
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtype_and_shape(name, dtype):
    out = jax.eval_shape(ENCODERS[name], jnp.ones((7, 2), dtype), KEY)
    assert out.dtype == dtype
    assert out.shape == SHAPES.get(name, (7, 7, 2))


@EVERY
def test_under_vmap_and_jit(name):
    xs, keys = jnp.stack([SERIES[:7], SERIES[7:14]]), jax.random.split(KEY)
    got = quick_jit(jax.vmap(ENCODERS[name]))(xs, keys)
    np.testing.assert_allclose(got[1], ENCODERS[name](xs[1], keys[1]), rtol=1e-12)


def test_half_precision_has_all_of_its_steps():
    spikes = nn.linear_latency_encode(jnp.array([0.0], jnp.bfloat16), 1000)
    assert np.argmax(spikes[:, 0]) == 999


@EVERY
def test_integers_are_refused(name):
    message = f"nn.{name}: got an array of dtype int64, expected a floating-point one"
    with pytest.raises(TypeError, match=message):
        ENCODERS[name](jnp.ones((7, 2), int), KEY)


REFUSED = {
    "steps": (functools.partial(nn.rate_encode, X, 0, key=KEY), "got steps=0"),
    "more steps": (functools.partial(nn.linear_latency_encode, X, -1), "steps=-1"),
    "dt": (functools.partial(nn.poisson_encode, X, 3, key=KEY, dt=0.0), "got dt=0.0"),
    "tau": (functools.partial(nn.latency_encode, X, 3, tau=-1.0), "got tau=-1.0"),
    "threshold": (
        functools.partial(nn.latency_encode, X, 3, tau=1.0, threshold=0.0),
        "got threshold=0.0",
    ),
    "one unit": (functools.partial(nn.population_encode, X, 1), "got size=1"),
    "bounds": (
        functools.partial(nn.population_encode, X, 3, low=1.0, high=0.0),
        "low=1.0 and high=0.0",
    ),
    "width": (
        functools.partial(nn.population_encode, X, 3, width=-0.5),
        "got width=-0.5",
    ),
    "delta": (functools.partial(nn.delta_encode, X, threshold=0.0), "threshold=0.0"),
    "step": (
        functools.partial(nn.step_forward_encode, X, threshold=-1.0),
        "threshold=-1.0",
    ),
    "initial": (
        functools.partial(nn.delta_encode, X, threshold=1.0, initial=jnp.ones(2)),
        r"shape \(2,\), expected \(3,\)",
    ),
    "no time": (
        functools.partial(nn.step_forward_encode, X[0, 0], threshold=1.0),
        "a single number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_are_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
