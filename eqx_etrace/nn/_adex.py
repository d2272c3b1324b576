"""The adaptive exponential integrate-and-fire neuron."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._neurons import MV_SPIKE, AbstractNeuron, Firing, Reset, Spike, relax
from ._parameters import (
    Free,
    Parameter,
    Positive,
    Value,
    read,
    set_parameters,
    time_constant,
)
from ._shapes import Units, check_positive, shape_of


class AdExState(NamedTuple):
    """The membrane potential before its reset, and the adaptation current."""

    v: Float[Array, "*units"]
    w: Float[Array, "*units"]


class AdEx(AbstractNeuron):
    r"""The adaptive exponential integrate-and-fire neuron.

    $\tau \frac{dv}{dt} = -(v - v_{rest}) + \Delta_T e^{(v - v_T)/\Delta_T} + R (I - w)$
    and $\tau_w \frac{dw}{dt} = a (v - v_{rest}) - w$, a spike where $v > v_{peak}$;
    with a spike $v$ is reset and $w \to w + b$. Each equation is integrated exactly
    over the step with the exponential term and the other variable held at its start
    (exponential Euler). The exponential term grows up to the peak and no further, so
    that the upswing stays finite.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `tau`, `tau_w`: time constants of membrane and adaptation, ms.
    - `v_rest`, `v_reset`: resting potential and reset, mV.
    - `v_t`, `delta_t`, `v_peak`: where the upswing begins, its sharpness, and where it
      counts as a spike, mV.
    - `resistance`: R, GOhm for currents in pA.
    - `a`, `b`: adaptation to the membrane (nS), and its jump with a spike (pA).
    - `dt`: the time step, ms.
    - `reset`: `"value"`, `"subtract"` or `"none"`.
    - `detach_reset`: whether the spike in the reset of the membrane is held constant
      by the gradient. The spike in the adaptation never is.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of the numbers above train, as for `LIF`.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and an `AdExState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Brette and Gerstner, *Adaptive exponential integrate-and-fire model as
    an effective description of neuronal activity*, Journal of Neurophysiology 94, 2005,
    with $\tau = C / g_L$ and $R = 1 / g_L$.

    !!! example

        ```python
        neuron = nn.AdEx(4, dt=0.5)
        spikes, state = neuron(jnp.full(4, 800.0), neuron.init_state())
        ```
    """

    tau: Parameter
    tau_w: Parameter
    v_rest: Parameter
    v_reset: Parameter
    v_t: Parameter
    v_peak: Parameter
    delta_t: Parameter
    resistance: Parameter
    a: Parameter
    b: Parameter
    firing: Firing = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau: Value = 9.37,
        tau_w: Value = 144.0,
        v_rest: Value = -70.6,
        v_reset: Value = -70.6,
        v_t: Value = -50.4,
        v_peak: Value = -30.0,
        delta_t: Value = 2.0,
        resistance: Value = 1 / 30,
        a: Value = 4.0,
        b: Value = 80.5,
        dt: float = 0.5,
        reset: Reset = "value",
        detach_reset: bool = True,
        spike: Spike = MV_SPIKE,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        self.firing = Firing(spike, reset, detach_reset)
        free = {"v_rest": v_rest, "v_reset": v_reset, "v_t": v_t, "v_peak": v_peak}
        kinds = {
            time_constant(dt): {"tau": tau, "tau_w": tau_w},
            Free: free | {"a": a, "b": b},
            Positive: {"delta_t": delta_t, "resistance": resistance},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> AdExState:
        zeros = jnp.zeros(self.shape)
        return AdExState(v=self.v_rest() + zeros, w=zeros)

    def after_spike(self, state: AdExState) -> AdExState:
        p = read(self, state.v.dtype)
        spikes = self.output(state)
        v = self.firing.membrane(state.v, spikes, p.v_peak, p.v_reset)
        return AdExState(v=v, w=state.w + p.b * spikes)

    def advance(
        self, state: AdExState, current: Array, conductance: Array | None = None
    ) -> AdExState:
        p = read(self, state.v.dtype)
        v, w = state
        upswing = jnp.exp((jnp.minimum(v, p.v_peak) - p.v_t) / p.delta_t)
        drive = p.delta_t * upswing + p.resistance * (current - w)
        load = None if conductance is None else p.resistance * conductance
        return AdExState(
            v=relax(v, p.v_rest + drive, self.dt / p.tau, load),
            w=relax(w, p.a * (v - p.v_rest), self.dt / p.tau_w),
        )

    def output(self, state: AdExState) -> Float[Array, "*units"]:
        return self.firing.spike(state.v - read(self, state.v.dtype).v_peak)
