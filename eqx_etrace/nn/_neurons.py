"""What all neurons share: the order of a step, the spike and the reset."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._shapes import check_input, check_state
from ._surrogate import superspike


Reset = Literal["subtract", "value", "none"]
Spike = Callable[[Array], Array]

UNIT_SPIKE = superspike(25.0)
"""For a membrane that is measured in thresholds."""
MV_SPIKE = superspike(0.2)
"""For a membrane in mV."""


class Membrane(Protocol):
    """The state of a neuron: a named tuple with its membrane potential and more."""

    @property
    def v(self) -> Array: ...

    def _replace(self, /, **changes: Any) -> Any: ...


class AbstractNeuron(eqx.Module):
    """A layer of neurons: `(current, state) -> (out, state)` for one time step `dt`.

    A step is made of three methods: `after_spike` applies what follows from the spikes
    that the state holds, `advance` integrates over the time step, and `output` reads
    the spikes off the new state. A state therefore holds the membrane before its
    reset, and the spikes of the last step can be read off it at any time. Eligibility
    traces profit: the new state is the only way out of the step.

    Subclass it for a neuron of your own, with `shape` and `dt` as static fields.

    !!! example

        ```python
        neuron = nn.LIF(4)
        state = neuron.init_state()
        spikes, state = neuron(jnp.full(4, 30.0), state)
        assert jnp.array_equal(spikes, neuron.output(state))
        after = neuron.after_spike(state)  # what the next step starts from
        ```
    """

    shape: eqx.AbstractVar[tuple[int, ...]]
    dt: eqx.AbstractVar[float]

    @abc.abstractmethod
    def init_state(self) -> Any:
        """The state at rest: a named tuple of arrays of the shape of the units."""

    @abc.abstractmethod
    def after_spike(self, state: Any) -> Any:
        """The state after the resets and jumps of the spikes that it holds."""

    @abc.abstractmethod
    def advance(
        self, state: Any, current: Any, conductance: Array | None = None
    ) -> Any:
        """The state `dt` later, without resets.

        A `conductance` g adds the current $-g v$ to what is constant over the step.
        """

    @abc.abstractmethod
    def output(self, state: Any) -> Float[Array, "*units"]:
        """What the neurons send out: spikes, 0 or 1."""

    def __call__(self, x: Any, state: Any) -> tuple[Float[Array, "*units"], Any]:
        check_input(self, x, self.shape)
        check_state(self, state)
        state = self.advance(self.after_spike(state), x)
        return self.output(state), state


@dataclasses.dataclass(frozen=True)
class Firing:
    """How a neuron spikes and what becomes of its membrane. Static."""

    spike: Spike
    reset: Reset
    detach_reset: bool

    def __post_init__(self) -> None:
        if self.reset not in ("subtract", "value", "none"):
            raise ValueError(
                f"reset: got {self.reset!r}, expected 'subtract', 'value' or 'none'. "
                "'subtract' takes the threshold off the membrane, 'value' puts it at "
                "v_reset."
            )

    def resets(self, spikes: Array) -> Array:
        """The spikes as the reset sees them."""
        return jax.lax.stop_gradient(spikes) if self.detach_reset else spikes

    def membrane(self, v: Array, spikes: Array, threshold: Any, v_reset: Any) -> Array:
        """The membrane after its reset."""
        z = self.resets(spikes)
        if self.reset == "subtract":
            return v - z * (threshold - v_reset)
        if self.reset == "value":
            return (1 - z) * v + z * v_reset
        return v


def relax(v: Array, target: Any, ratio: Any, load: Any | None = None) -> Array:
    """The solution of dv/ds = target - v - load v at s = ratio, exact."""
    if load is not None:
        target, ratio = target / (1 + load), ratio * (1 + load)
    return v - (target - v) * jnp.expm1(-ratio)


def mean_decay(x: Array) -> Array:
    """The mean of exp(-s) over s from 0 to x: (1 - exp(-x)) / x, 1 at zero."""
    small = jnp.abs(x) < 1e-4
    # Each branch has to stay finite where the other is taken, or its derivative is
    # not a number.
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 - x / 2, -jnp.expm1(-safe) / safe)
