"""Every neuron against the equations of its paper, written out in NumPy."""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit
from scipy.integrate import solve_ivp

from eqx_etrace import nn


UNITS, STEPS = 3, 80
RNG = np.random.default_rng(0)


def _inputs(mean, spread):
    return mean + spread * RNG.normal(size=(STEPS, UNITS))


def _run(neuron, xs, state=None):
    """Outputs and states of a sequence, time first."""

    def body(state, x):
        out, state = neuron(x, state)
        return state, (out, state)

    state = neuron.init_state() if state is None else state
    scan = quick_jit(lambda state, xs: jax.lax.scan(body, state, xs)[1])
    return scan(state, jnp.asarray(xs))


# One step each: (parameters, state before, input) -> (state after, spikes). A state
# holds the membrane before its reset, so that a step begins with it.


def _if(p, s, i):
    v = s.v - (s.v > p.threshold) * p.threshold + p.dt * i / p.capacitance
    return SimpleNamespace(v=v), v > p.threshold


def _lif(p, s, i):
    v = np.where(s.v > p.threshold, p.v_reset, s.v)
    v_inf = p.v_rest + p.resistance * i
    v = v_inf + (v - v_inf) * np.exp(-p.dt / p.tau)
    return SimpleNamespace(v=v), v > p.threshold


def _alif(p, s, i):
    z = s.v > p.threshold + p.beta * s.a
    v = s.v - z * (p.threshold - p.v_reset)
    v_inf = p.v_rest + p.resistance * i
    v = v_inf + (v - v_inf) * np.exp(-p.dt / p.tau)
    a = (s.a + z) * np.exp(-p.dt / p.tau_a)
    return SimpleNamespace(v=v, a=a), v > p.threshold + p.beta * a


def _gif(p, s, i):
    z = s.v > s.threshold
    v = np.where(z, p.v_reset, s.v)
    i1 = np.where(z, p.r_1 * s.i1 + p.jump_1, s.i1)
    i2 = np.where(z, p.r_2 * s.i2 + p.jump_2, s.i2)
    th = np.where(z, np.maximum(s.threshold, p.threshold_reset), s.threshold)
    v_inf = p.v_rest + p.resistance * (i + i1 + i2)
    b = 1 / p.tau_threshold
    th_inf = p.threshold_inf + p.a / b * (v - p.v_rest)
    new = SimpleNamespace(
        v=v_inf + (v - v_inf) * np.exp(-p.dt / p.tau),
        i1=i1 * np.exp(-p.dt / p.tau_1),
        i2=i2 * np.exp(-p.dt / p.tau_2),
        threshold=th_inf + (th - th_inf) * np.exp(-b * p.dt),
    )
    return new, new.v > new.threshold


def _adex(p, s, i):
    z = s.v > p.v_peak
    v, w = np.where(z, p.v_reset, s.v), s.w + z * p.b
    upswing = p.delta_t * np.exp((v - p.v_t) / p.delta_t)
    v_inf = p.v_rest + upswing + p.resistance * (i - w)
    w_inf = p.a * (v - p.v_rest)
    new = SimpleNamespace(
        v=v_inf + (v - v_inf) * np.exp(-p.dt / p.tau),
        w=w_inf + (w - w_inf) * np.exp(-p.dt / p.tau_w),
    )
    return new, new.v > p.v_peak


def _izhikevich(p, s, i):
    z = s.v > p.v_peak
    start = np.where(z, p.c, s.v)
    v, u = start, s.u + z * p.d
    for _ in range(2):
        low = np.minimum(v, p.v_peak)
        v = v + p.dt / 2 * (0.04 * low**2 + 5 * low + 140 - u + i)
    u = p.b * start + (u - p.b * start) * np.exp(-p.a * p.dt)
    return SimpleNamespace(v=v, u=u), v > p.v_peak


def _gates(v):
    """Alpha and beta of m, h, n as in the paper, for a rest of -65 mV."""
    return (
        (0.1 * (v + 40) / (1 - np.exp(-(v + 40) / 10)), 4 * np.exp(-(v + 65) / 18)),
        (0.07 * np.exp(-(v + 65) / 20), 1 / (1 + np.exp(-(v + 35) / 10))),
        (
            0.01 * (v + 55) / (1 - np.exp(-(v + 55) / 10)),
            0.125 * np.exp(-(v + 65) / 80),
        ),
    )


def _hodgkin_huxley(p, s, i):
    v, gates = s.v, [s.m, s.h, s.n]
    dt = p.dt / p.substeps
    for _ in range(p.substeps):
        m, h, n = gates
        g_na, g_k = p.g_na * m**3 * h, p.g_k * n**4
        g = g_na + g_k + p.g_l
        v_inf = (g_na * p.e_na + g_k * p.e_k + p.g_l * p.e_l + i) / g
        rates = _gates(v)
        v = v_inf + (v - v_inf) * np.exp(-dt * g / p.capacitance)
        gates = [
            a / (a + b) + (x - a / (a + b)) * np.exp(-dt * (a + b))
            for x, (a, b) in zip(gates, rates, strict=True)
        ]
    new = SimpleNamespace(v=v, m=gates[0], h=gates[1], n=gates[2], above=s.v > 0)
    return new, (v > 0) & ~(s.v > 0)


def _li(p, s, i):
    v_inf = p.v_rest + p.resistance * i
    v = v_inf + (s.v - v_inf) * np.exp(-p.dt / p.tau)
    return SimpleNamespace(v=v), v


PER_UNIT = [8.0, 12.0, 20.0]
# (neuron, what is not its default, reference, inputs)
NEURONS: dict[str, Any] = {
    "IF": (nn.IF, {"threshold": 1.2, "capacitance": 2.0}, _if, (0.5, 1.0)),
    "LIF": (
        nn.LIF,
        {"tau": PER_UNIT, "v_rest": 0.1, "v_reset": -0.2, "resistance": 2.0}
        | {"reset": "value", "dt": 0.5},
        _lif,
        (1.2, 1.0),
    ),
    "ALIF": (
        nn.ALIF,
        {"tau": 10.0, "tau_a": [30.0, 40.0, 50.0], "beta": 0.3, "v_reset": 0.1},
        _alif,
        (2.5, 1.0),
    ),
    "GIF": (
        nn.GIF,
        {"a": 0.005, "r_1": 0.5, "jump_1": 0.4, "jump_2": -0.1, "tau": 10.0},
        _gif,
        (2.5, 0.5),
    ),
    "AdEx": (nn.AdEx, {"b": 40.0, "tau_w": PER_UNIT}, _adex, (1500.0, 300.0)),
    "Izhikevich": (nn.Izhikevich, {"d": [8.0, 6.0, 2.0]}, _izhikevich, (20.0, 4.0)),
    "HodgkinHuxley": (
        nn.HodgkinHuxley,
        {"dt": 1.0, "substeps": 20},
        _hodgkin_huxley,
        (12.0, 2.0),
    ),
    "LI": (nn.LI, {"tau": PER_UNIT, "v_rest": 0.3}, _li, (1.0, 1.0)),
}


def _parameters(neuron, options):
    """The numbers of the neuron: its defaults from the module, the rest as given."""
    found = {name: getattr(neuron, name) for name in neuron.__dataclass_fields__}
    values = {k: v() if isinstance(v, nn.Parameter) else v for k, v in found.items()}
    changed = {k: np.asarray(v) for k, v in options.items() if k != "reset"}
    return SimpleNamespace(**values | changed)


def _make(name):
    make, options, reference, drive = NEURONS[name]
    neuron = make(UNITS, **options)
    return neuron, _parameters(neuron, options), reference, _inputs(*drive)


@pytest.mark.parametrize("name", NEURONS)
def test_trajectory(name):
    neuron, p, reference, xs = _make(name)
    p.dt, p.substeps = float(p.dt), int(getattr(p, "substeps", 1))
    start = neuron.init_state()
    s = SimpleNamespace(**{k: np.asarray(v) for k, v in start._asdict().items()})
    outs, states = _run(neuron, xs)
    total = np.zeros(UNITS)
    for t, x in enumerate(xs):
        s, out = reference(p, s, x)
        total += out
        np.testing.assert_allclose(outs[t], out, rtol=1e-8, err_msg=f"step {t}")
        for leaf, got in states._asdict().items():
            np.testing.assert_allclose(
                got[t], getattr(s, leaf), rtol=1e-8, atol=1e-10, err_msg=f"{leaf} {t}"
            )
    if name != "LI":
        assert np.all(total >= 3) and np.all(total < STEPS / 2), total


def test_defaults_are_those_of_the_papers():
    """The reference above takes them from the module."""
    p = _parameters(nn.HodgkinHuxley(1), {})
    assert (p.g_na, p.g_k, p.g_l, p.capacitance) == (120, 36, 0.3, 1)
    assert (p.e_na, p.e_k, p.e_l) == (50, -77, -54.387)
    p = _parameters(nn.Izhikevich(1), {})
    assert (p.a, p.b, p.c, p.d, p.v_peak) == (0.02, 0.2, -65, 8, 30)
    p = _parameters(nn.AdEx(1), {})
    assert (p.v_rest, p.v_t, p.delta_t) == (-70.6, -50.4, 2)
    assert (p.a, p.b, p.tau_w) == (4, 80.5, 144)
    np.testing.assert_allclose([p.resistance * 30, p.tau * 30], [1, 281], rtol=1e-3)
    p = _parameters(nn.GIF(1), {})
    assert (p.tau, 1 / p.tau_1, 1 / p.tau_2, p.tau_threshold) == (20, 0.2, 0.02, 100)
    assert (p.v_rest, p.threshold_inf, p.threshold_reset) == (-70, -50, -60)


def _hodgkin_huxley_ode(t, y, current):
    v, m, h, n = y
    flow = 120 * m**3 * h * (50 - v) + 36 * n**4 * (-77 - v) + 0.3 * (-54.387 - v)
    opened = [
        a * (1 - x) - b * x for x, (a, b) in zip((m, h, n), _gates(v), strict=True)
    ]
    return [flow + current, *opened]


def _adex_ode(t, y, current):
    v, w = y
    upswing = 2 * np.exp((v + 50.4) / 2)
    return [
        (-(v + 70.6) + upswing + (current - w) / 30) / 9.37,
        (4 * (v + 70.6) - w) / 144,
    ]


ODES = {
    "HodgkinHuxley": (
        nn.HodgkinHuxley(1, dt=0.5, substeps=2000),
        _hodgkin_huxley_ode,
        10.0,
    ),
    "AdEx": (nn.AdEx(1, dt=0.002), _adex_ode, 500.0),
}


@pytest.mark.parametrize("name", ODES)
def test_small_steps_solve_the_differential_equations(name):
    """The reference above has the integrator of the module, this one has not."""
    neuron, ode, current = ODES[name]
    steps = round(9 / neuron.dt)
    _, states = _run(neuron, np.full((steps, 1), current))
    start = [float(x[0]) for x in neuron.init_state() if x.dtype != bool]
    times = neuron.dt * np.arange(1, steps + 1)
    options: Any = {"args": (current,), "rtol": 1e-9, "atol": 1e-9, "t_eval": times}
    expected = solve_ivp(ode, (0, times[-1]), start, **options).y
    assert np.ptp(expected[0]) > (10 if name == "AdEx" else 100)
    for got, want in zip(states, expected, strict=False):
        gap = np.abs(got[:, 0] - want).max()
        assert gap < 5e-3 * np.ptp(want), gap


# Exact integration.


@pytest.mark.parametrize("dt", [0.1, 1.0, 7.0])
def test_leaky_membranes_are_exact_at_any_step(dt):
    """A constant current for 14 ms, in steps of any length."""
    steps = round(14 / dt)
    high, v0 = math.inf, 0.4
    options: Any = {"tau": 6.0, "v_rest": 0.2, "resistance": 1.5, "dt": dt}
    expected = 0.2 + 1.5 * 2.0 + (v0 - 0.2 - 3.0) * math.exp(-14 / 6)
    neurons = [
        nn.LIF(1, threshold=high, **options),
        nn.ALIF(1, threshold=high, **options),
        nn.LI(1, **options),
    ]
    for neuron in neurons:
        state = neuron.init_state()._replace(v=jnp.array([v0]))
        _, states = _run(neuron, np.full((steps, 1), 2.0), state)
        np.testing.assert_allclose(states.v[-1], expected, rtol=1e-12)


def test_a_conductance_is_part_of_the_leak():
    """dv/dt under a current I - g v, each neuron's own way, over one step."""
    g, current = np.array([0.3, 0.0, 2.0]), np.array([1.0, 1.0, -1.0])
    tau, dt, v0 = 6.0, 2.0, 0.4

    def after(neuron):
        state = neuron.init_state()._replace(v=jnp.full(3, v0))
        return neuron.advance(state, jnp.asarray(current), jnp.asarray(g)).v

    def solved(rate, drive):
        at = drive / rate
        return at + (v0 - at) * np.exp(-rate * dt)

    expected = solved((1 + 1.5 * g) / tau, (0.2 + 1.5 * current) / tau)
    options: Any = {"tau": tau, "v_rest": 0.2, "resistance": 1.5, "dt": dt}
    for make in (nn.LIF, nn.ALIF, nn.LI):
        np.testing.assert_allclose(after(make(3, **options)), expected, rtol=1e-12)
    got = after(nn.IF(3, capacitance=2.0, dt=dt))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(g > 0, solved(g / 2, current / 2), v0 + dt * current / 2)
    np.testing.assert_allclose(got, expected, rtol=1e-12)


MV = {"GIF": nn.GIF(3), "AdEx": nn.AdEx(3), "Izhikevich": nn.Izhikevich(3)}


@pytest.mark.parametrize("name", [*MV, "HodgkinHuxley"])
def test_a_small_conductance_is_a_current(name):
    """To first order in g, I - g v is the current at the membrane's start."""
    neuron = MV.get(name, nn.HodgkinHuxley(3, substeps=1))
    state = neuron.init_state()
    zero = jnp.zeros(3)

    def by_conductance(g):
        return neuron.advance(state, zero, g * jnp.ones(3)).v

    def by_current(g):
        return neuron.advance(state, -g * state.v, None).v

    got, expected = (jax.jacfwd(f)(0.0) for f in (by_conductance, by_current))
    # The conductance also speeds up the leak, by as much as the step is long.
    np.testing.assert_allclose(got, expected, rtol=0.2)
    assert np.all(np.abs(expected) > 1e-3)


def test_the_reset_can_be_off():
    neuron = nn.LIF(1, tau=2.0, reset="none")
    outs, states = _run(neuron, np.full((40, 1), 3.0))
    np.testing.assert_allclose(states.v[-1], 3.0, rtol=1e-6)
    assert outs[-30:].min() == 1


def test_layers_of_any_shape():
    """A map of channels, each with its own time constant."""
    tau = np.array([5.0, 10.0])[:, None, None]
    neuron = nn.LIF((2, 3, 3), tau=tau, trainable="tau")
    assert neuron.tau.shape == (2, 1, 1)
    out, state = neuron(jnp.full((2, 3, 3), 4.0), neuron.init_state())
    assert out.shape == state.v.shape == (2, 3, 3)
    expected = -4 * np.expm1(-1 / tau) * np.ones((2, 3, 3))
    np.testing.assert_allclose(state.v, expected, rtol=1e-12)


# Refractory periods.


def test_refractory_holds_the_membrane():
    """Literally: a LIF neuron that is held for three steps after each spike."""
    xs = _inputs(8.0, 2.0)
    neuron = nn.Refractory(nn.LIF(UNITS, tau=10.0, dt=0.5), 1.5)
    outs, states = _run(neuron, xs)
    v, left, fired = np.zeros(UNITS), np.zeros(UNITS, int), np.zeros(UNITS, bool)
    total = np.zeros(UNITS)
    for t, x in enumerate(xs):
        left = np.where(fired, 3, np.maximum(left - 1, 0))
        v = v - fired * 1.0
        v = np.where(left > 0, v, x + (v - x) * np.exp(-0.05))
        fired = (v > 1) & (left == 0)
        total += fired
        np.testing.assert_array_equal(outs[t], fired)
        np.testing.assert_allclose(states.neuron.v[t], v, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(states.count[t], left)
    assert np.all(total >= 5)


def test_refractory_lets_the_adaptation_go_on():
    neuron = nn.Refractory(nn.ALIF(1, tau_a=10.0), 4.0)
    outs, states = _run(neuron, np.full((12, 1), 30.0))
    first = int(np.argmax(outs[:, 0]))
    decays = np.asarray(states.neuron.a[first + 1 : first + 5, 0])
    expected = np.exp(-0.1 * np.arange(1, 5))
    np.testing.assert_allclose(decays, expected, rtol=1e-12)
    np.testing.assert_array_equal(outs[first + 1 : first + 5], 0)


def test_no_refractory_period_is_the_plain_neuron():
    xs = _inputs(2.0, 2.0)
    plain = nn.LIF(UNITS, tau=10.0)
    wrapped = nn.Refractory(plain, 0.0)
    for a, b in zip(_run(plain, xs), _run(wrapped, xs), strict=True):
        np.testing.assert_array_equal(jax.tree.leaves(a)[0], jax.tree.leaves(b)[0])


# Wrong arguments.


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: nn.LIF(3)(jnp.ones(4), nn.LIF(3).init_state()),
            r"LIF: got an input of shape \(4,\), expected \(3,\)",
        ),
        (
            lambda: nn.LIF(3)(jnp.ones(3), nn.LIF(1).init_state()),
            r"LIF: got state.v of shape \(1,\), expected \(3,\)",
        ),
        (
            lambda: nn.ALIF(3)(jnp.ones(3), nn.LIF(3).init_state()),
            "ALIF: got a state of structure",
        ),
        (lambda: nn.LIF(0), "units: got 0, expected an integer of at least 1"),
        (lambda: nn.LIF(3, dt=0.0), "dt: got 0.0, expected a number above 0"),
        (lambda: nn.LIF(3, tau=-1.0), "LIF.tau: got -1.0, expected a number above 0"),
        (
            lambda: nn.LIF(3, tau=[1.0, 2.0]),
            r"LIF.tau: got an array of shape \(2,\), expected a number or an array of "
            r"shape \(3,\)",
        ),
        (
            lambda: nn.LIF(3, trainable=("tau", "taw")),
            "LIF: got trainable = taw, expected names out of tau, threshold",
        ),
        (
            lambda: nn.LIF(3, tau=nn.Constant(2.0), trainable="tau"),
            "LIF.tau: got a Constant that is to train",
        ),
        (lambda: nn.LIF(3, threshold=math.nan), "Constant: got .*nan.*expected"),
        (
            lambda: nn.Refractory(nn.LIF(3), 1.5),
            "Refractory: got a period of 1.5 ms, expected a multiple .* 1.0 ms",
        ),
        (
            lambda: nn.Recurrent(nn.LIF(3)),
            "Recurrent: got neither a connection nor a key",
        ),
        (
            lambda: _recurrent(nn.Dense(3, 4, key=jax.random.key(0))),
            r"Recurrent: got an input of shape \(3,\), expected \(4,\)",
        ),
        (
            lambda: nn.Recurrent(
                nn.LIF(3, dt=0.5), nn.Delta(3), synapse=nn.Exponential(3)
            ),
            "Recurrent: got a time step of 1.0 ms in Exponential, expected 0.5 ms",
        ),
        (
            lambda: nn.HodgkinHuxley(3, substeps=0),
            "substeps: got 0, expected an integer of at least 1",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _recurrent(connection):
    layer = nn.Recurrent(nn.LIF(3), connection)
    return layer(jnp.ones(3), layer.init_state())


def test_an_unknown_reset():
    reset: Any = "zero"
    # Beartype is first in the tests; without it the message is a sentence.
    with pytest.raises((ValueError, TypeError), match="zero"):
        nn.LIF(3, reset=reset)
