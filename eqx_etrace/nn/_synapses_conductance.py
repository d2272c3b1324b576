"""Conductance-based synapses: excitation and inhibition that pull a membrane."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._neurons import AbstractNeuron
from ._parameters import Free, Parameter, Value, read, set_parameters, time_constant
from ._shapes import check_state


class Drive(NamedTuple):
    """What arrives at excitatory and at inhibitory synapses, both at least zero."""

    exc: Float[Array, "*units"]
    inh: Float[Array, "*units"]


class COBAState(NamedTuple):
    """The state of the neuron, and the two conductances."""

    neuron: Any
    g_exc: Float[Array, "*units"]
    g_inh: Float[Array, "*units"]


class COBA(AbstractNeuron):
    r"""A neuron behind conductance-based synapses.

    $\tau_k \frac{dg_k}{dt} = -g_k$ for excitation and inhibition, where $g_k$ jumps by
    what arrives, and the neuron gets the current $\sum_k g_k (E_k - v)$. The new
    conductances are held over the step; the membrane is then integrated with them as
    part of its leak, which is exact for `IF`, `LIF`, `LI` and `ALIF`.

    **Arguments:**

    - `neuron`: any neuron.
    - `e_exc`, `e_inh`: the reversal potentials, in the units of the neuron's membrane:
      0 and -80 mV for one that rests at -65 mV.
    - `tau_exc`, `tau_inh`: the time constants of the conductances, ms.
    - `trainable`: which of the numbers above train, as for `LIF`.

    Conductances are in the inverse unit of the neuron's resistance.

    **Returns:** (when called with a `Drive`, as `ExcInh` makes it, and a state) the
    output of the neuron and a `COBAState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Vogels and Abbott, *Signal propagation and logic gating in networks of
    integrate-and-fire neurons*, Journal of Neuroscience 25, 2005.

    !!! example

        ```python
        lif = nn.LIF(4, v_rest=-60.0, v_reset=-60.0, threshold=-50.0, reset="value")
        neuron = nn.COBA(lif, e_exc=0.0, e_inh=-80.0)
        weights = nn.ExcInh(10, 4, excitatory=8, key=key)
        drive, _ = weights(jnp.ones(10), weights.init_state())
        spikes, state = neuron(drive, neuron.init_state())
        ```
    """

    neuron: AbstractNeuron
    e_exc: Parameter
    e_inh: Parameter
    tau_exc: Parameter
    tau_inh: Parameter

    def __init__(
        self,
        neuron: AbstractNeuron,
        *,
        e_exc: Value,
        e_inh: Value,
        tau_exc: Value = 5.0,
        tau_inh: Value = 10.0,
        trainable: str | Sequence[str] = (),
    ):
        self.neuron = neuron
        kinds = {
            time_constant(neuron.dt): {"tau_exc": tau_exc, "tau_inh": tau_inh},
            Free: {"e_exc": e_exc, "e_inh": e_inh},
        }
        set_parameters(self, neuron.shape, trainable, kinds)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.neuron.shape

    @property
    def dt(self) -> float:
        return self.neuron.dt

    def init_state(self) -> COBAState:
        zeros = jnp.zeros(self.shape)
        return COBAState(self.neuron.init_state(), g_exc=zeros, g_inh=zeros)

    def after_spike(self, state: COBAState) -> COBAState:
        return state._replace(neuron=self.neuron.after_spike(state.neuron))

    def conduct(self, state: COBAState, drive: Drive) -> COBAState:
        """The state with its new conductances."""
        p = read(self, state.g_exc.dtype)
        return state._replace(
            g_exc=state.g_exc * jnp.exp(-self.dt / p.tau_exc) + drive.exc,
            g_inh=state.g_inh * jnp.exp(-self.dt / p.tau_inh) + drive.inh,
        )

    def drift(self, state: COBAState, conductance: Array | None = None) -> COBAState:
        """The neuron one step later, under the conductances of the state."""
        p = read(self, state.g_exc.dtype)
        current = state.g_exc * p.e_exc + state.g_inh * p.e_inh
        total = state.g_exc + state.g_inh
        if conductance is not None:
            total = total + conductance
        return state._replace(neuron=self.neuron.advance(state.neuron, current, total))

    def advance(
        self, state: COBAState, current: Drive, conductance: Array | None = None
    ) -> COBAState:
        return self.drift(self.conduct(state, current), conductance)

    def output(self, state: COBAState) -> Float[Array, "*units"]:
        return self.neuron.output(state.neuron)

    def __call__(
        self, x: Drive, state: COBAState
    ) -> tuple[Float[Array, "*units"], COBAState]:
        shapes = jax.tree.map(jnp.shape, x)
        if not isinstance(x, Drive) or set(shapes) != {self.shape}:
            raise ValueError(
                f"COBA: got an input of shape {shapes}, expected a Drive of two arrays "
                f"of shape {self.shape}. Make it with `ExcInh`, or put what excites "
                "and what inhibits into a `Drive`."
            )
        check_state(self, state)
        state = self.advance(self.after_spike(state), x)
        return self.output(state), state
