"""Izhikevich's quadratic neuron."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._neurons import MV_SPIKE, AbstractNeuron, Firing, Reset, Spike, relax
from ._parameters import Free, Parameter, Positive, Value, read, set_parameters
from ._shapes import Units, check_count, check_positive, shape_of


class IzhikevichState(NamedTuple):
    """The membrane potential before its reset, and the recovery variable."""

    v: Float[Array, "*units"]
    u: Float[Array, "*units"]


class Izhikevich(AbstractNeuron):
    r"""Izhikevich's neuron: a quadratic upswing and a recovery variable.

    $\frac{dv}{dt} = 0.04 v^2 + 5 v + 140 - u + I$ and $\frac{du}{dt} = a (b v - u)$, a
    spike where $v > v_{peak}$; with a spike $v$ is reset to $c$ and $u \to u + d$. The
    membrane takes `substeps` steps of Euler with $u$ held, as in the paper (two of
    0.5 ms), $u$ is integrated exactly with $v$ held at its start. Beyond the peak the
    quadratic term stays what it is at the peak, so that the upswing stays finite.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `a`: the rate of the recovery, 1/ms.
    - `b`: its sensitivity to the membrane.
    - `c`: where the membrane is put after a spike, mV.
    - `d`: the jump of the recovery with a spike.
    - `v_peak`: where the upswing counts as a spike, mV.
    - `dt`: the time step, ms.
    - `substeps`: how many steps of Euler there are within it.
    - `reset`: `"value"`, `"subtract"` (which takes off `v_peak - c`) or `"none"`.
    - `detach_reset`: whether the spike in the reset of the membrane is held constant
      by the gradient. The spike in the recovery never is.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of `a`, `b`, `c`, `d` and `v_peak` train, as for `LIF`.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and an `IzhikevichState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Izhikevich, *Simple model of spiking neurons*, IEEE Transactions on
    Neural Networks 14, 2003.

    !!! example

        ```python
        fast_spiking = nn.Izhikevich(4, a=0.1, d=2.0)
        spikes, state = fast_spiking(jnp.full(4, 10.0), fast_spiking.init_state())
        ```
    """

    a: Parameter
    b: Parameter
    c: Parameter
    d: Parameter
    v_peak: Parameter
    firing: Firing = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        a: Value = 0.02,
        b: Value = 0.2,
        c: Value = -65.0,
        d: Value = 8.0,
        v_peak: Value = 30.0,
        dt: float = 1.0,
        substeps: int = 2,
        reset: Reset = "value",
        detach_reset: bool = True,
        spike: Spike = MV_SPIKE,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        check_count("substeps", substeps)
        self.shape, self.dt, self.substeps = shape_of(units), float(dt), substeps
        self.firing = Firing(spike, reset, detach_reset)
        free = {"b": b, "c": c, "d": d, "v_peak": v_peak}
        set_parameters(self, self.shape, trainable, {Positive: {"a": a}, Free: free})

    def init_state(self) -> IzhikevichState:
        v = self.c() + jnp.zeros(self.shape)
        return IzhikevichState(v=v, u=self.b() * v)

    def after_spike(self, state: IzhikevichState) -> IzhikevichState:
        p = read(self, state.v.dtype)
        spikes = self.output(state)
        v = self.firing.membrane(state.v, spikes, p.v_peak, p.c)
        return IzhikevichState(v=v, u=state.u + p.d * spikes)

    def advance(
        self, state: IzhikevichState, current: Array, conductance: Array | None = None
    ) -> IzhikevichState:
        p = read(self, state.v.dtype)
        v, u = state
        for _ in range(self.substeps):
            below = jnp.minimum(v, p.v_peak)
            drift = (0.04 * below + 5) * below + 140 - u + current
            if conductance is not None:
                drift = drift - conductance * v
            v = v + self.dt / self.substeps * drift
        return IzhikevichState(v=v, u=relax(u, p.b * state.v, self.dt * p.a))

    def output(self, state: IzhikevichState) -> Float[Array, "*units"]:
        return self.firing.spike(state.v - read(self, state.v.dtype).v_peak)
