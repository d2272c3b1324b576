"""Integrate-and-fire neurons with memory of their own spikes: ALIF and GIF."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._neurons import (
    MV_SPIKE,
    UNIT_SPIKE,
    AbstractNeuron,
    Firing,
    Reset,
    Spike,
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


class ALIFState(NamedTuple):
    """The membrane potential before its reset, and the adaptation."""

    v: Float[Array, "*units"]
    a: Float[Array, "*units"]


class ALIF(AbstractNeuron):
    r"""Leaky integrate and fire with a threshold that rises with every spike.

    $\tau \frac{dv}{dt} = -(v - v_{rest}) + R I$ and
    $\tau_a \frac{da}{dt} = -a$, a spike where $v > \theta + \beta a$; each spike adds 1
    to $a$. Exact for a current that is constant over the step.

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `tau`, `tau_a`: time constants of membrane and adaptation, ms.
    - `beta`: by how much a spike raises the threshold.
    - `threshold`: $\theta$, the threshold without adaptation.
    - `v_rest`: the resting potential, where the membrane starts.
    - `v_reset`: where `reset="value"` puts the membrane; `"subtract"` takes off
      `threshold - v_reset`, without the adaptation.
    - `resistance`: R.
    - `dt`: the time step, ms.
    - `reset`: `"subtract"`, `"value"` or `"none"`.
    - `detach_reset`: whether the spike in the reset is held constant by the gradient.
      The spike that the adaptation counts never is.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of `tau`, `tau_a`, `beta`, `threshold`, `v_rest`, `v_reset` and
      `resistance` train, as for `LIF`.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and an `ALIFState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Bellec et al., *Long short-term memory and learning-to-learn in networks
    of spiking neurons*, NeurIPS 2018.

    !!! example

        ```python
        neuron = nn.ALIF(4, tau_a=[50.0, 100.0, 200.0, 400.0])
        spikes, state = neuron(jnp.full(4, 30.0), neuron.init_state())
        ```
    """

    tau: Parameter
    tau_a: Parameter
    beta: Parameter
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
        tau_a: Value = 200.0,
        beta: Value = 0.2,
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
        free = {"threshold": threshold, "v_rest": v_rest, "v_reset": v_reset}
        kinds = {
            time_constant(dt): {"tau": tau, "tau_a": tau_a},
            Free: free | {"beta": beta},
            Positive: {"resistance": resistance},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> ALIFState:
        zeros = jnp.zeros(self.shape)
        return ALIFState(v=self.v_rest() + zeros, a=zeros)

    def after_spike(self, state: ALIFState) -> ALIFState:
        p = read(self, state.v.dtype)
        spikes = self.output(state)
        v = self.firing.membrane(state.v, spikes, p.threshold, p.v_reset)
        return ALIFState(v=v, a=state.a + spikes)

    def advance(
        self, state: ALIFState, current: Array, conductance: Array | None = None
    ) -> ALIFState:
        p = read(self, state.v.dtype)
        load = None if conductance is None else p.resistance * conductance
        target = p.v_rest + p.resistance * current
        v = relax(state.v, target, self.dt / p.tau, load)
        return ALIFState(v=v, a=state.a * jnp.exp(-self.dt / p.tau_a))

    def output(self, state: ALIFState) -> Float[Array, "*units"]:
        p = read(self, state.v.dtype)
        return self.firing.spike(state.v - p.threshold - p.beta * state.a)


class GIFState(NamedTuple):
    """The membrane potential before its reset, two currents of the neuron's own spikes,
    and the threshold."""

    v: Float[Array, "*units"]
    i1: Float[Array, "*units"]
    i2: Float[Array, "*units"]
    threshold: Float[Array, "*units"]


class GIF(AbstractNeuron):
    r"""The generalised integrate-and-fire neuron of Mihalas and Niebur.

    $\tau \frac{dv}{dt} = -(v - v_{rest}) + R (I + i_1 + i_2)$,
    $\tau_j \frac{di_j}{dt} = -i_j$ and
    $\frac{d\theta}{dt} = a (v - v_{rest}) - (\theta - \theta_\infty) / \tau_\theta$, a
    spike where $v > \theta$. With a spike $i_j \to r_j i_j + A_j$, $v$ is reset,
    and $\theta$ is raised to $\theta_{reset}$ at least. Tonic and phasic spiking,
    bursts, adaptation and rebound are a choice of its numbers. Each equation is
    integrated exactly over the step with the other variables held at its start
    (exponential Euler).

    **Arguments:**

    - `units`: how many neurons, or the shape that they are laid out in.
    - `tau`, `tau_1`, `tau_2`, `tau_threshold`: time constants of the membrane, of the
      two currents and of the threshold, ms.
    - `threshold_inf`, `threshold_reset`: $\theta_\infty$, where the threshold starts,
      and $\theta_{reset}$, mV.
    - `v_rest`, `v_reset`: as for `LIF`, mV.
    - `resistance`: R, e.g. GOhm for currents in pA.
    - `a`: how the membrane moves the threshold, 1/ms.
    - `r_1`, `r_2`, `jump_1`, `jump_2`: $r_j$, and $A_j$ in the unit of the current.
    - `dt`: the time step, ms.
    - `reset`: `"value"`, `"subtract"` or `"none"`.
    - `detach_reset`: whether the spike is held constant by the gradient where it resets
      membrane and threshold. The spike in the currents never is.
    - `spike`: the spike function with its surrogate derivative.
    - `trainable`: which of the numbers above train, as for `LIF`.

    **Returns:** (when called with a current of the shape of the units and a state)
    spikes of the same shape and a `GIFState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Mihalas and Niebur, *A generalized linear integrate-and-fire neural
    model produces diverse spiking behaviors*, Neural Computation 21, 2009.

    !!! example

        ```python
        bursting = nn.GIF(4, a=0.005, jump_1=0.5, jump_2=-0.03)
        spikes, state = bursting(jnp.full(4, 2.0), bursting.init_state())
        ```
    """

    tau: Parameter
    tau_1: Parameter
    tau_2: Parameter
    tau_threshold: Parameter
    threshold_inf: Parameter
    threshold_reset: Parameter
    v_rest: Parameter
    v_reset: Parameter
    resistance: Parameter
    a: Parameter
    r_1: Parameter
    r_2: Parameter
    jump_1: Parameter
    jump_2: Parameter
    firing: Firing = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau: Value = 20.0,
        tau_1: Value = 5.0,
        tau_2: Value = 50.0,
        tau_threshold: Value = 100.0,
        threshold_inf: Value = -50.0,
        threshold_reset: Value = -60.0,
        v_rest: Value = -70.0,
        v_reset: Value = -70.0,
        resistance: Value = 20.0,
        a: Value = 0.0,
        r_1: Value = 0.0,
        r_2: Value = 1.0,
        jump_1: Value = 0.0,
        jump_2: Value = 0.0,
        dt: float = 1.0,
        reset: Reset = "value",
        detach_reset: bool = True,
        spike: Spike = MV_SPIKE,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        self.firing = Firing(spike, reset, detach_reset)
        taus = {"tau": tau, "tau_1": tau_1, "tau_2": tau_2}
        free = {"v_rest": v_rest, "v_reset": v_reset, "a": a, "r_1": r_1, "r_2": r_2}
        thresholds = {"threshold_inf": threshold_inf}
        thresholds |= {"threshold_reset": threshold_reset}
        kinds = {
            time_constant(dt): taus | {"tau_threshold": tau_threshold},
            Free: free | thresholds | {"jump_1": jump_1, "jump_2": jump_2},
            Positive: {"resistance": resistance},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> GIFState:
        zeros = jnp.zeros(self.shape)
        v, threshold = self.v_rest() + zeros, self.threshold_inf() + zeros
        return GIFState(v=v, i1=zeros, i2=zeros, threshold=threshold)

    def after_spike(self, state: GIFState) -> GIFState:
        p = read(self, state.v.dtype)
        v, i1, i2, threshold = state
        spikes = self.output(state)
        low = jnp.maximum(0.0, p.threshold_reset - threshold)
        return GIFState(
            v=self.firing.membrane(v, spikes, threshold, p.v_reset),
            i1=i1 + spikes * ((p.r_1 - 1) * i1 + p.jump_1),
            i2=i2 + spikes * ((p.r_2 - 1) * i2 + p.jump_2),
            threshold=threshold + self.firing.resets(spikes) * low,
        )

    def advance(
        self, state: GIFState, current: Array, conductance: Array | None = None
    ) -> GIFState:
        p = read(self, state.v.dtype)
        v, i1, i2, threshold = state
        load = None if conductance is None else p.resistance * conductance
        target = p.v_rest + p.resistance * (current + i1 + i2)
        to = p.threshold_inf + p.a * p.tau_threshold * (v - p.v_rest)
        return GIFState(
            v=relax(v, target, self.dt / p.tau, load),
            i1=i1 * jnp.exp(-self.dt / p.tau_1),
            i2=i2 * jnp.exp(-self.dt / p.tau_2),
            threshold=relax(threshold, to, self.dt / p.tau_threshold),
        )

    def output(self, state: GIFState) -> Float[Array, "*units"]:
        return self.firing.spike(state.v - state.threshold)
