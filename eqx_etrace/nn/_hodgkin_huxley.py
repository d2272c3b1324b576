"""The neuron of Hodgkin and Huxley, in small steps within one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._neurons import MV_SPIKE, AbstractNeuron, Spike, mean_decay, relax
from ._parameters import Free, Parameter, Positive, Value, read, set_parameters
from ._shapes import Units, check_count, check_positive, shape_of


class HodgkinHuxleyState(NamedTuple):
    """The membrane potential, the gates m, h and n, and whether the membrane was above
    the threshold one step ago, so that a spike counts once."""

    v: Float[Array, "*units"]
    m: Float[Array, "*units"]
    h: Float[Array, "*units"]
    n: Float[Array, "*units"]
    above: Bool[Array, "*units"]


def _rates(v: Array) -> tuple[tuple[Array, Array], ...]:
    """Opening and closing of m, h and n per ms. x / (1 - exp(-x)) has no value at 0
    as it stands."""
    m = 1 / mean_decay((v + 40) / 10), 4 * jnp.exp(-(v + 65) / 18)
    h = 0.07 * jnp.exp(-(v + 65) / 20), jax.nn.sigmoid((v + 35) / 10)
    n = 0.1 / mean_decay((v + 55) / 10), 0.125 * jnp.exp(-(v + 65) / 80)
    return m, h, n


class HodgkinHuxley(AbstractNeuron):
    r"""The neuron of Hodgkin and Huxley, with the squid's gates.

    $$C \frac{dv}{dt} = g_{Na} m^3 h (E_{Na} - v) + g_K n^4 (E_K - v) + g_L (E_L - v)
      + I$$

    and $\frac{dx}{dt} = \alpha_x (1 - x) - \beta_x x$ for the gates m, h and n. A step
    is a `jax.lax.scan` over `substeps` steps of exponential Euler, in each of which
    every equation is integrated exactly with the other variables held at its start.
    There is no reset. A spike is the step in which the membrane rises above
    `threshold`.

    `eqx_etrace.compile` unrolls loops of up to `max_unroll` substeps, a few tenths of a
    second each.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `g_na`, `g_k`, `g_l`: conductances, mS/cm^2.
    - `e_na`, `e_k`, `e_l`: reversal potentials, mV.
    - `capacitance`: C, uF/cm^2. Currents are in uA/cm^2.
    - `threshold`: of the spike, mV.
    - `dt`: the time step, ms.
    - `substeps`: how many steps there are within it; 0.05 ms and less are accurate.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of the numbers above, `dt` and `substeps` apart, train, as for
      `LIF`.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and a `HodgkinHuxleyState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Hodgkin and Huxley, *A quantitative description of membrane current and
    its application to conduction and excitation in nerve*, Journal of Physiology 117,
    1952, with the rest at -65 mV.

    !!! example

        ```python
        neuron = nn.HodgkinHuxley(4)
        spikes, state = neuron(jnp.full(4, 10.0), neuron.init_state())
        ```
    """

    g_na: Parameter
    g_k: Parameter
    g_l: Parameter
    e_na: Parameter
    e_k: Parameter
    e_l: Parameter
    capacitance: Parameter
    threshold: Parameter
    spike: Spike = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        g_na: Value = 120.0,
        g_k: Value = 36.0,
        g_l: Value = 0.3,
        e_na: Value = 50.0,
        e_k: Value = -77.0,
        e_l: Value = -54.387,
        capacitance: Value = 1.0,
        threshold: Value = 0.0,
        dt: float = 0.5,
        substeps: int = 10,
        spike: Spike = MV_SPIKE,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        check_count("substeps", substeps)
        self.shape, self.dt, self.substeps = shape_of(units), float(dt), substeps
        self.spike = spike
        positive = {"g_na": g_na, "g_k": g_k, "g_l": g_l, "capacitance": capacitance}
        free = {"e_na": e_na, "e_k": e_k, "e_l": e_l, "threshold": threshold}
        set_parameters(self, self.shape, trainable, {Positive: positive, Free: free})

    def init_state(self) -> HodgkinHuxleyState:
        """At -65 mV, with the gates where they stay there."""
        v = jnp.full(self.shape, -65.0)
        m, h, n = (opening / (opening + closing) for opening, closing in _rates(v))
        return HodgkinHuxleyState(v, m, h, n, above=jnp.zeros(self.shape, bool))

    def after_spike(self, state: HodgkinHuxleyState) -> HodgkinHuxleyState:
        threshold = read(self, state.v.dtype).threshold
        return state._replace(above=state.v > threshold)

    def advance(
        self,
        state: HodgkinHuxleyState,
        current: Array,
        conductance: Array | None = None,
    ) -> HodgkinHuxleyState:
        def substep(state: HodgkinHuxleyState, _: None) -> Any:
            return self._substep(state, current, conductance), None

        return jax.lax.scan(substep, state, length=self.substeps)[0]

    def _substep(
        self,
        state: HodgkinHuxleyState,
        current: Array,
        conductance: Array | None,
    ) -> HodgkinHuxleyState:
        v, *gates, above = state
        m, h, n = gates
        p = read(self, v.dtype)
        dt = self.dt / self.substeps
        na, k = p.g_na * m**3 * h, p.g_k * n**4
        total = na + k + p.g_l
        if conductance is not None:
            total = total + conductance
        target = (na * p.e_na + k * p.e_k + p.g_l * p.e_l + current) / total
        new = relax(v, target, dt * total / p.capacitance)
        opened = [
            relax(gate, opening / (opening + closing), dt * (opening + closing))
            for gate, (opening, closing) in zip(gates, _rates(v), strict=True)
        ]
        return HodgkinHuxleyState(new, *opened, above=above)

    def output(self, state: HodgkinHuxleyState) -> Float[Array, "*units"]:
        spikes = self.spike(state.v - read(self, state.v.dtype).threshold)
        return jnp.where(state.above, 0.0, spikes)
