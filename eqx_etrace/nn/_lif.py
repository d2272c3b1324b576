"""Integrate-and-fire neurons, and the leaky integrator without spikes."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._neurons import (
    UNIT_SPIKE,
    AbstractNeuron,
    Firing,
    Reset,
    Spike,
    mean_decay,
    relax,
)
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


class IFState(NamedTuple):
    """The membrane potential, before the reset of the spikes that it stands for."""

    v: Float[Array, "*units"]


class IF(AbstractNeuron):
    r"""Integrate and fire: a membrane without leak.

    $C \frac{dv}{dt} = I$, a spike where $v > \theta$. Exact for a current that is
    constant over the step.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `threshold`: $\theta$.
    - `v_reset`: where `reset="value"` puts the membrane; `"subtract"` takes off
      `threshold - v_reset`. The membrane starts there.
    - `capacitance`: C.
    - `dt`: the time step, ms.
    - `reset`: `"subtract"`, `"value"` or `"none"`.
    - `detach_reset`: whether the spike in the reset is held constant by the gradient.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of `threshold`, `v_reset` and `capacitance` train, one number
      per unit. Any of them can also be an array, one number per unit, or a `Parameter`.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and an `IFState`.

    **Raises:** `ValueError` for wrong sizes or values.

    !!! example

        ```python
        neuron = nn.IF(4)
        spikes, state = neuron(jnp.ones(4), neuron.init_state())
        ```
    """

    threshold: Parameter
    v_reset: Parameter
    capacitance: Parameter
    firing: Firing = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        threshold: Value = 1.0,
        v_reset: Value = 0.0,
        capacitance: Value = 1.0,
        dt: float = 1.0,
        reset: Reset = "subtract",
        detach_reset: bool = True,
        spike: Spike = UNIT_SPIKE,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        self.firing = Firing(spike, reset, detach_reset)
        kinds = {
            Free: {"threshold": threshold, "v_reset": v_reset},
            Positive: {"capacitance": capacitance},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> IFState:
        return IFState(self.v_reset() + jnp.zeros(self.shape))

    def after_spike(self, state: IFState) -> IFState:
        p = read(self, state.v.dtype)
        spikes = self.output(state)
        return IFState(self.firing.membrane(state.v, spikes, p.threshold, p.v_reset))

    def advance(
        self, state: IFState, current: Array, conductance: Array | None = None
    ) -> IFState:
        ratio = self.dt / read(self, state.v.dtype).capacitance
        if conductance is None:
            return IFState(state.v + ratio * current)
        load = ratio * conductance
        decayed = state.v * jnp.exp(-load)
        return IFState(decayed + ratio * current * mean_decay(load))

    def output(self, state: IFState) -> Float[Array, "*units"]:
        return self.firing.spike(state.v - read(self, state.v.dtype).threshold)


class LIFState(NamedTuple):
    """The membrane potential, before the reset of the spikes that it stands for."""

    v: Float[Array, "*units"]


class LIF(AbstractNeuron):
    r"""Leaky integrate and fire.

    $\tau \frac{dv}{dt} = -(v - v_{rest}) + R I$, a spike where $v > \theta$. Exact for
    a current that is constant over the step: the membrane decays by $e^{-dt/\tau}$
    towards $v_{rest} + R I$.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `tau`: the membrane time constant, ms.
    - `threshold`: $\theta$.
    - `v_rest`: the resting potential, where the membrane starts.
    - `v_reset`: where `reset="value"` puts the membrane; `"subtract"` takes off
      `threshold - v_reset`.
    - `resistance`: R.
    - `dt`: the time step, ms.
    - `reset`: `"subtract"`, `"value"` or `"none"`.
    - `detach_reset`: whether the spike in the reset is held constant by the gradient.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of `tau`, `threshold`, `v_rest`, `v_reset` and `resistance`
      train, one number per unit. Any of them can also be an array, one number per
      unit, or a `Parameter`. A time constant that trains stays between a tenth of `dt`
      and ten times its largest start.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and a `LIFState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Gerstner et al., *Neuronal Dynamics*, 2014, chapter 1.

    !!! example

        ```python
        neuron = nn.LIF(4, tau=[5.0, 10.0, 20.0, 40.0], trainable="tau")
        spikes, state = neuron(jnp.full(4, 1.5), neuron.init_state())
        ```
    """

    tau: Parameter
    threshold: Parameter
    v_rest: Parameter
    v_reset: Parameter
    resistance: Parameter
    firing: Firing = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau: Value = 20.0,
        threshold: Value = 1.0,
        v_rest: Value = 0.0,
        v_reset: Value = 0.0,
        resistance: Value = 1.0,
        dt: float = 1.0,
        reset: Reset = "subtract",
        detach_reset: bool = True,
        spike: Spike = UNIT_SPIKE,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        self.firing = Firing(spike, reset, detach_reset)
        kinds = {
            time_constant(dt): {"tau": tau},
            Free: {"threshold": threshold, "v_rest": v_rest, "v_reset": v_reset},
            Positive: {"resistance": resistance},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> LIFState:
        return LIFState(self.v_rest() + jnp.zeros(self.shape))

    def after_spike(self, state: LIFState) -> LIFState:
        p = read(self, state.v.dtype)
        spikes = self.output(state)
        return LIFState(self.firing.membrane(state.v, spikes, p.threshold, p.v_reset))

    def advance(
        self, state: LIFState, current: Array, conductance: Array | None = None
    ) -> LIFState:
        p = read(self, state.v.dtype)
        load = None if conductance is None else p.resistance * conductance
        target = p.v_rest + p.resistance * current
        return LIFState(relax(state.v, target, self.dt / p.tau, load))

    def output(self, state: LIFState) -> Float[Array, "*units"]:
        return self.firing.spike(state.v - read(self, state.v.dtype).threshold)


class LIState(NamedTuple):
    """The membrane potential."""

    v: Float[Array, "*units"]


class LI(AbstractNeuron):
    r"""A leaky integrator, which does not spike: its output is the membrane.

    $\tau \frac{dv}{dt} = -(v - v_{rest}) + R I$, exact for a current that is constant
    over the step. A readout that smooths spikes.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `tau`: the membrane time constant, ms.
    - `v_rest`: the resting potential, where the membrane starts.
    - `resistance`: R.
    - `dt`: the time step, ms.
    - `trainable`: which of `tau`, `v_rest` and `resistance` train, as for `LIF`.

    **Returns:** (when called with a current of the shape of the units and a state) the
    membrane potential and a `LIState`.

    **Raises:** `ValueError` for wrong sizes or values.

    !!! example

        ```python
        readout = nn.LI(2, tau=10.0)
        v, state = readout(jnp.ones(2), readout.init_state())
        ```
    """

    tau: Parameter
    v_rest: Parameter
    resistance: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau: Value = 20.0,
        v_rest: Value = 0.0,
        resistance: Value = 1.0,
        dt: float = 1.0,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        kinds = {
            time_constant(dt): {"tau": tau},
            Free: {"v_rest": v_rest},
            Positive: {"resistance": resistance},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> LIState:
        return LIState(self.v_rest() + jnp.zeros(self.shape))

    def after_spike(self, state: LIState) -> LIState:
        return state

    def advance(
        self, state: LIState, current: Array, conductance: Array | None = None
    ) -> LIState:
        p = read(self, state.v.dtype)
        load = None if conductance is None else p.resistance * conductance
        target = p.v_rest + p.resistance * current
        return LIState(relax(state.v, target, self.dt / p.tau, load))

    def output(self, state: LIState) -> Float[Array, "*units"]:
        return state.v
