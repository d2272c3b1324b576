"""Synapses: filters from what arrives at a neuron to its current."""

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._parameters import (
    Bounded,
    Constant,
    Parameter,
    Value,
    read,
    set_parameters,
    time_constant,
)
from ._shapes import Units, check_input, check_positive, check_state, shape_of


class AbstractSynapse(eqx.Module):
    """A linear filter, unit by unit: `(x, state) -> (out, state)` of one time step.

    What arrives in a step acts at its end; `advance` gives the new state, `output` the
    current that it stands for.

    !!! example

        ```python
        synapse = nn.Alpha(4)
        current, state = synapse(jnp.ones(4), synapse.init_state())
        assert jnp.array_equal(current, synapse.output(state))
        ```
    """

    shape: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def init_state(self) -> Any:
        """Zeros: a named tuple of arrays of the shape of the units."""

    @abc.abstractmethod
    def advance(self, state: Any, x: Array) -> Any:
        """The state one step later."""

    @abc.abstractmethod
    def output(self, state: Any) -> Float[Array, "*units"]:
        """The current."""

    def __call__(
        self, x: Float[Array, "*units"], state: Any
    ) -> tuple[Float[Array, "*units"], Any]:
        check_input(self, x, self.shape)
        check_state(self, state)
        state = self.advance(state, x)
        return self.output(state), state


class Delta(eqx.Module):
    """No filter: what arrives is the current of this step. Its state is empty.

    **Arguments:**

    - `units`: how many units, or their shape.

    **Returns:** (when called with an input and a state) the input and `()`.

    **Raises:** `ValueError` for an input of another size.

    !!! example

        ```python
        synapse = nn.Delta(4)
        current, state = synapse(jnp.ones(4), synapse.init_state())
        ```
    """

    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, units: Units):
        self.shape = shape_of(units)

    def init_state(self) -> tuple[()]:
        return ()

    def __call__(
        self, x: Float[Array, "*units"], state: tuple[()]
    ) -> tuple[Float[Array, "*units"], tuple[()]]:
        check_input(self, x, self.shape)
        return x, state


class ExponentialState(NamedTuple):
    """The current."""

    g: Float[Array, "*units"]


class Exponential(AbstractSynapse):
    r"""A current that jumps by what arrives, and decays.

    $\tau \frac{dg}{dt} = -g + \tau \sum_k x_k \delta(t - t_k)$, exact.

    **Arguments:**

    - `units`: how many units, or their shape.
    - `tau`: the time constant, ms.
    - `dt`: the time step, ms.
    - `trainable`: `"tau"` if it trains, one number per unit, between a tenth of `dt`
      and ten times its largest start. It can also be an array or a `Parameter`.

    **Returns:** (when called with an input and a state) the current and an
    `ExponentialState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Gerstner et al., *Neuronal Dynamics*, 2014, chapter 3.

    !!! example

        ```python
        synapse = nn.Exponential(4, tau=10.0, trainable="tau")
        current, state = synapse(jnp.ones(4), synapse.init_state())
        ```
    """

    tau: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau: Value = 5.0,
        dt: float = 1.0,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        kinds = {time_constant(dt): {"tau": tau}}
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> ExponentialState:
        return ExponentialState(g=jnp.zeros(self.shape))

    def advance(self, state: ExponentialState, x: Array) -> ExponentialState:
        tau = read(self, state.g.dtype).tau
        return ExponentialState(g=state.g * jnp.exp(-self.dt / tau) + x)

    def output(self, state: ExponentialState) -> Float[Array, "*units"]:
        return state.g


class AlphaState(NamedTuple):
    """The current, and what is on its way to it."""

    g: Float[Array, "*units"]
    h: Float[Array, "*units"]


class Alpha(AbstractSynapse):
    r"""A current that follows an alpha function of time.

    An input x makes $x \frac{t}{\tau} e^{1 - t/\tau}$, which peaks at x after $\tau$:
    $\tau \frac{dg}{dt} = -g + h$ and $\tau \frac{dh}{dt} = -h$, where $h$ jumps by
    $e\,x$. Exact.

    **Arguments:** as for `Exponential`.

    **Returns:** (when called with an input and a state) the current and an
    `AlphaState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Rall, *Distinguishing theoretical synaptic potentials computed for
    different soma-dendritic distributions of synaptic input*, Journal of
    Neurophysiology 30, 1967.

    !!! example

        ```python
        synapse = nn.Alpha(4, tau=3.0)
        current, state = synapse(jnp.ones(4), synapse.init_state())
        ```
    """

    tau: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau: Value = 5.0,
        dt: float = 1.0,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        kinds = {time_constant(dt): {"tau": tau}}
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> AlphaState:
        zeros = jnp.zeros(self.shape)
        return AlphaState(g=zeros, h=zeros)

    def advance(self, state: AlphaState, x: Array) -> AlphaState:
        ratio = self.dt / read(self, state.g.dtype).tau
        decay = jnp.exp(-ratio)
        return AlphaState(
            g=decay * (state.g + ratio * state.h),
            h=decay * state.h + math.e * x,
        )

    def output(self, state: AlphaState) -> Float[Array, "*units"]:
        return state.g


class DualExponentialState(NamedTuple):
    """Two decaying exponentials, whose difference is the current."""

    slow: Float[Array, "*units"]
    fast: Float[Array, "*units"]


class DualExponential(AbstractSynapse):
    r"""A current with a time constant for its rise and one for its decay.

    An input x makes $x\,A\,(e^{-t/\tau_{decay}} - e^{-t/\tau_{rise}})$, with A such
    that the peak is x. Exact.

    **Arguments:**

    - `units`: how many units, or their shape.
    - `tau_rise`, `tau_decay`: the time constants, ms; the first is the smaller one.
    - `dt`: the time step, ms.
    - `trainable`: which of `tau_rise` and `tau_decay` train, one number per unit. They
      stay apart: one that trains does not cross the middle (geometric) between both.

    **Returns:** (when called with an input and a state) the current and a
    `DualExponentialState`.

    **Raises:** `ValueError` for wrong sizes or values, or time constants that are
    equal or in the other order.

    **Source:** Destexhe, Mainen and Sejnowski, *Kinetic models of synaptic
    transmission*, in *Methods in Neuronal Modeling*, 1998.

    !!! example

        ```python
        synapse = nn.DualExponential(4, tau_rise=1.0, tau_decay=10.0)
        current, state = synapse(jnp.ones(4), synapse.init_state())
        ```
    """

    tau_rise: Parameter
    tau_decay: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        tau_rise: Value = 2.0,
        tau_decay: Value = 10.0,
        dt: float = 1.0,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        highest = _extreme(tau_rise, largest=True)
        lowest = _extreme(tau_decay, largest=False)
        if not highest < lowest:
            raise ValueError(
                f"DualExponential: got tau_rise up to {highest} and tau_decay from "
                f"{lowest}, expected tau_rise to be smaller. For equal ones take "
                "`Alpha`."
            )
        middle = math.sqrt(highest * lowest)
        kinds = {
            time_constant(dt, upper=middle): {"tau_rise": tau_rise},
            _above(middle): {"tau_decay": tau_decay},
        }
        set_parameters(self, self.shape, trainable, kinds)

    def init_state(self) -> DualExponentialState:
        zeros = jnp.zeros(self.shape)
        return DualExponentialState(slow=zeros, fast=zeros)

    def advance(self, state: DualExponentialState, x: Array) -> DualExponentialState:
        p = read(self, state.slow.dtype)
        return DualExponentialState(
            slow=state.slow * jnp.exp(-self.dt / p.tau_decay) + x,
            fast=state.fast * jnp.exp(-self.dt / p.tau_rise) + x,
        )

    def output(self, state: DualExponentialState) -> Float[Array, "*units"]:
        p = read(self, state.slow.dtype)
        gap = p.tau_decay - p.tau_rise
        # At the peak both exponentials fall at the same rate.
        peak = jnp.log(p.tau_decay / p.tau_rise) * p.tau_decay * p.tau_rise / gap
        height = jnp.exp(-peak / p.tau_decay) - jnp.exp(-peak / p.tau_rise)
        return (state.slow - state.fast) / height


def _extreme(value: Value, largest: bool) -> float:
    """The bound of a time constant that trains, else its largest or smallest."""
    if isinstance(value, Bounded):
        return value.upper if largest else value.lower
    if isinstance(value, Parameter) and not isinstance(value, Constant):
        raise ValueError(
            f"DualExponential: got {type(value).__name__}, expected numbers or "
            "Bounded. The bounds have to keep both time constants apart."
        )
    numbers = value() if isinstance(value, Constant) else value
    array = np.asarray(numbers, float)
    return float(array.max() if largest else array.min())


def _above(lower: float) -> Any:
    def make(value: Any) -> Parameter:
        return Bounded(value, lower, 10 * float(np.max(value)))

    return make
