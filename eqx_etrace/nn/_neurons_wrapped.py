"""Neurons around neurons: with a refractory period, and with recurrent weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._connections import Dense
from ._neurons import AbstractNeuron
from ._shapes import check_state


class RefractoryState(NamedTuple):
    """The state of the neuron, and for how many steps, this one counted, it is held."""

    neuron: Any
    count: Int[Array, "*units"]


class Refractory(AbstractNeuron):
    """A neuron whose membrane is held for some time after each spike.

    The membrane stays where the reset has put it, and no spike is sent, in the
    `period` after the step of a spike. Everything else, such as an adaptation, goes
    on. The counter is an integer and carries no gradient; through the held membrane it
    flows unchanged.

    **Arguments:**

    - `neuron`: any neuron that spikes.
    - `period`: how long, ms; a whole number of the neuron's time steps.

    **Returns:** (when called with a current and a state) spikes and a
    `RefractoryState`.

    **Raises:** `ValueError` for a period that is not a whole number of steps.

    !!! example

        ```python
        neuron = nn.Refractory(nn.LIF(4), 2.0)
        spikes, state = neuron(jnp.full(4, 30.0), neuron.init_state())
        v = state.neuron.v
        ```
    """

    neuron: AbstractNeuron
    steps: int = eqx.field(static=True)

    def __init__(self, neuron: AbstractNeuron, period: float):
        steps = round(period / neuron.dt)
        if steps < 0 or abs(steps * neuron.dt - period) > 1e-6 * neuron.dt:
            raise ValueError(
                f"Refractory: got a period of {period} ms, expected a multiple of the "
                f"neuron's time step of {neuron.dt} ms. Round it, or choose another dt."
            )
        self.neuron, self.steps = neuron, steps

    @property
    def shape(self) -> tuple[int, ...]:
        return self.neuron.shape

    @property
    def dt(self) -> float:
        return self.neuron.dt

    def init_state(self) -> RefractoryState:
        count = jnp.zeros(self.shape, jnp.int32)
        return RefractoryState(self.neuron.init_state(), count)

    def after_spike(self, state: RefractoryState) -> RefractoryState:
        held = state.count > 0
        spiked = self.output(state) > 0
        neuron = jax.tree.map(
            lambda old, new: jnp.where(held, old, new),
            state.neuron,
            self.neuron.after_spike(state.neuron),
        )
        left = jnp.maximum(state.count - 1, 0)
        return RefractoryState(neuron, jnp.where(spiked, self.steps, left))

    def advance(
        self, state: RefractoryState, current: Any, conductance: Array | None = None
    ) -> RefractoryState:
        neuron = self.neuron.advance(state.neuron, current, conductance)
        v = jnp.where(state.count > 0, state.neuron.v, neuron.v)
        return RefractoryState(neuron._replace(v=v), state.count)

    def output(self, state: RefractoryState) -> Float[Array, "*units"]:
        return jnp.where(state.count > 0, 0.0, self.neuron.output(state.neuron))


class RecurrentState(NamedTuple):
    """The states of the parts; `()` for those without one."""

    neuron: Any
    synapse: Any
    connection: Any


class Recurrent(eqx.Module):
    """Neurons whose spikes come back to them, one step later, through weights.

    The spikes of the last step go through `connection`, are added to the input, and
    go through `synapse` to the neurons. With `LIF` inside it is an RLIF layer, with
    `ALIF` an RALIF or LSNN layer.

    **Arguments:**

    - `neuron`: any neuron.
    - `connection`: from spikes of the neurons to their input, `(x, state) -> (out,
      state)` with `init_state()`; None for a `Dense` without biases, for which `key` is
      needed.
    - `synapse`: from that sum to the current, e.g. an `Exponential`; None if the sum is
      the current.
    - `key`: for the weights of the dense connection.

    **Returns:** (when called with an input of the shape of the units and a state) the
    output of the neurons and a `RecurrentState`.

    **Raises:** `ValueError` for wrong sizes, where the key is missing, or where neuron
    and synapse differ in their time step.

    !!! example

        ```python
        layer = nn.Recurrent(nn.ALIF(8), synapse=nn.Exponential(8), key=key)
        spikes, state = layer(jnp.ones(8), layer.init_state())
        ```
    """

    neuron: Any
    connection: Any
    synapse: Any

    def __init__(
        self,
        neuron: Any,
        connection: Callable[..., Any] | None = None,
        *,
        synapse: Callable[..., Any] | None = None,
        key: PRNGKeyArray | None = None,
    ):
        if connection is None:
            if key is None or len(neuron.shape) != 1:
                raise ValueError(
                    f"Recurrent: got neither a connection nor a key, or neurons of "
                    f"shape {neuron.shape}, expected a key and neurons of one axis, or "
                    "a connection. Pass `key=` to draw the weights of a dense one."
                )
            (units,) = neuron.shape
            connection = Dense(units, units, use_bias=False, key=key)
        _check_steps(neuron, connection, synapse)
        self.neuron, self.connection, self.synapse = neuron, connection, synapse

    @property
    def shape(self) -> tuple[int, ...]:
        return self.neuron.shape

    def init_state(self) -> RecurrentState:
        return RecurrentState(
            neuron=self.neuron.init_state(),
            synapse=() if self.synapse is None else self.synapse.init_state(),
            connection=self.connection.init_state(),
        )

    def output(self, state: RecurrentState) -> Array:
        """What the neurons send out."""
        return self.neuron.output(state.neuron)

    def __call__(self, x: Any, state: RecurrentState) -> tuple[Array, RecurrentState]:
        check_state(self, state)
        feedback, connection = self.connection(self.output(state), state.connection)
        x, synapse = _add(x, feedback), state.synapse
        if self.synapse is not None:
            x, synapse = self.synapse(x, synapse)
        out, neuron = self.neuron(x, state.neuron)
        return out, RecurrentState(neuron, synapse, connection)


def _check_steps(neuron: Any, *others: Any) -> None:
    for other in others:
        dt = getattr(other, "dt", neuron.dt)
        if dt != neuron.dt:
            raise ValueError(
                f"Recurrent: got a time step of {dt} ms in {type(other).__name__}, "
                f"expected {neuron.dt} ms, that of {type(neuron).__name__}. Give both "
                "the same `dt`."
            )


def _add(x: Any, feedback: Any) -> Any:
    def shapes(tree: Any) -> Any:
        return jax.tree.map(jnp.shape, tree)

    if shapes(x) != shapes(feedback):
        raise ValueError(
            f"Recurrent: got an input of shape {shapes(x)}, expected {shapes(feedback)}"
            ", that of what comes back. Project the input to the units before."
        )
    return jax.tree.map(jnp.add, x, feedback)
