"""Readouts: what stands between a recurrent network and its loss."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._cells_common import check_shape, check_size, default_dtype, uniform


class LinearReadout(eqx.Module):
    """`weight @ x + bias`, in the convention of readouts that have a state.

    It has none: its state is the empty tuple. A network that is written for one readout
    takes any of them. In a container an `equinox.nn.Linear` does as well.

    !!! example

        ```python
        from eqx_etrace import nn

        readout = nn.LinearReadout(8, 2, key=jax.random.key(0))
        out, state = readout(jnp.ones(8), readout.init_state())
        ```
    """

    weight: Float[Array, "outputs inputs"]
    bias: Float[Array, " outputs"] | None
    input_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `output_size`: how many features x and the output have.
        - `use_bias`: whether there is a bias.
        - `dtype`: of the weights; JAX's default float if None.
        - `key`: a key for the weights, uniform within $1/\sqrt{\text{input\_size}}$.
        """
        check_size("nn.LinearReadout", input_size=input_size, output_size=output_size)
        one, two = jax.random.split(key)
        shape = output_size, input_size
        self.weight = uniform(one, shape, input_size, dtype)
        self.bias = uniform(two, shape[:1], input_size, dtype) if use_bias else None
        self.input_size = input_size
        self.output_size = output_size

    def init_state(self) -> tuple[()]:
        """The empty tuple."""
        return ()

    def __call__(self, x: Array, state: tuple[()]) -> tuple[Array, tuple[()]]:
        """**Arguments:** the input (input_size,) and the empty state.

        **Returns:** the output (output_size,) and the empty state.

        **Raises:** `ValueError` for another shape.
        """
        check_shape("nn.LinearReadout", "an input", x, (self.input_size,))
        y = self.weight @ x
        return (y if self.bias is None else y + self.bias), state


class LeakyReadout(eqx.Module):
    r"""Leaky integrators that do not spike: the readout of many spiking networks.

    $$v' = \alpha \circ v + (1 - \alpha) \circ (W x + b), \qquad
    \alpha = e^{-dt/\tau}, \qquad
    \tau = \tau_{min} + (\tau_{max} - \tau_{min})\, \sigma(\rho)$$

    which is the exact solution of $\tau \dot v = -v + W x + b$ over a step of constant
    input. Each output has a time constant of its own, trained through the unbounded
    `raw_tau` ($\rho$) and always between its bounds; `readout.tau` gives it. The state
    is v, (output_size,), and so is the output.

    The readout remembers, so that a step's input also acts on later outputs. A local
    rule with single-step credit does not count that for the weights in front of it;
    multi-step credit does within its window.

    **Source:** the readout neurons of Bellec et al., *A solution to the learning
    dilemma for recurrent networks of spiking neurons*, Nature Communications 11, 2020,
    there without the factor $1 - \alpha$.

    !!! example

        ```python
        from eqx_etrace import nn

        readout = nn.LeakyReadout(8, 2, tau=20.0, key=jax.random.key(0))
        out, state = readout(jnp.ones(8), readout.init_state())
        ```
    """

    weight: Float[Array, "outputs inputs"]
    bias: Float[Array, " outputs"] | None
    raw_tau: Float[Array, " outputs"]
    input_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)
    tau_bounds: tuple[float, float] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        tau: float = 20.0,
        tau_bounds: tuple[float, float] = (1.0, 1000.0),
        dt: float = 1.0,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `input_size`, `output_size`: how many features x and the output have.
        - `tau`: the time constant of all outputs at the start, in the unit of `dt`.
        - `tau_bounds`: it stays between these two; `tau` lies between them.
        - `dt`: how long a step is.
        - `use_bias`, `dtype`, `key`: as for `eqx_etrace.nn.LinearReadout`.
        """
        check_size("nn.LeakyReadout", input_size=input_size, output_size=output_size)
        low, high = tau_bounds
        if not 0 < low < tau < high < math.inf:
            raise ValueError(
                f"nn.LeakyReadout: got tau={tau!r} with tau_bounds={tau_bounds!r}, "
                "expected 0 < lower bound < tau < upper bound. All have the unit of dt."
            )
        if not dt > 0:
            raise ValueError(
                f"nn.LeakyReadout: got dt={dt!r}, expected a number above 0. It is the "
                "length of a step in the unit of tau."
            )
        linear = LinearReadout(
            input_size, output_size, use_bias=use_bias, dtype=dtype, key=key
        )
        self.weight, self.bias = linear.weight, linear.bias
        raw = math.log((tau - low) / (high - tau))
        self.raw_tau = jnp.full(output_size, raw, linear.weight.dtype)
        self.input_size = input_size
        self.output_size = output_size
        self.tau_bounds = (float(low), float(high))
        self.dt = float(dt)

    @property
    def tau(self) -> Float[Array, " outputs"]:
        """The time constants, in the unit of `dt`."""
        low, high = self.tau_bounds
        return low + (high - low) * jax.nn.sigmoid(self.raw_tau)

    def init_state(self) -> Float[Array, " outputs"]:
        """Zeros."""
        return jnp.zeros(self.output_size, self.weight.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.LinearReadout`; output and new state are the same."""
        check_shape("nn.LeakyReadout", "an input", x, (self.input_size,))
        check_shape("nn.LeakyReadout", "a state", state, (self.output_size,))
        y = self.weight @ x
        y = y if self.bias is None else y + self.bias
        rate = self.dt / self.tau
        v = jnp.exp(-rate) * state - jnp.expm1(-rate) * y
        return v, v


class MaxOverTime(eqx.Module):
    r"""The largest value of each feature so far: $m' = \max(m, x)$.

    Behind a leaky readout it gives one vector of logits for a whole sequence, for a
    loss at its last step. The state is m, (size,), and so is the output. The gradient
    goes to the step of the maximum.

    **Source:** Cramer et al., *The Heidelberg spiking data sets for the systematic
    evaluation of spiking neural networks*, IEEE TNNLS 33, 2022.

    !!! example

        ```python
        from eqx_etrace import nn

        readout = nn.Sequential(
            [nn.LeakyReadout(8, 2, key=jax.random.key(0)), nn.MaxOverTime(2)]
        )
        out, state = readout(jnp.ones(8), readout.init_state())
        ```
    """

    size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, size: int, *, dtype: Any = None):
        """**Arguments:** `size`, how many features there are, and the `dtype` of the
        state, JAX's default float if None."""
        check_size("nn.MaxOverTime", size=size)
        self.size = size
        self.dtype = default_dtype(dtype)

    def init_state(self) -> Float[Array, " features"]:
        """Minus infinity: the first step is its own maximum."""
        return jnp.full(self.size, -jnp.inf, self.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.LinearReadout`; output and new state are the same."""
        check_shape("nn.MaxOverTime", "an input", x, (self.size,))
        check_shape("nn.MaxOverTime", "a state", state, (self.size,))
        largest = jnp.maximum(state, x)
        return largest, largest


class SpikeCount(eqx.Module):
    """How many spikes each unit has emitted so far: a running sum.

    The state is the count, (size,), a float, and so is the output. Divide by the number
    of steps for a rate.

    !!! example

        ```python
        from eqx_etrace import nn

        readout = nn.SpikeCount(2)
        out, state = readout(jnp.array([1.0, 0.0]), readout.init_state())
        ```
    """

    size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, size: int, *, dtype: Any = None):
        """**Arguments:** `size`, how many units there are, and the `dtype` of the
        state, JAX's default float if None."""
        check_size("nn.SpikeCount", size=size)
        self.size = size
        self.dtype = default_dtype(dtype)

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.size, self.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.LinearReadout`; output and new state are the same."""
        check_shape("nn.SpikeCount", "an input", x, (self.size,))
        check_shape("nn.SpikeCount", "a state", state, (self.size,))
        count = state + x
        return count, count
