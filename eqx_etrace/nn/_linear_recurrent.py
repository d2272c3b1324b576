"""Diagonal linear recurrences: the linear recurrent unit and recurrent trace units."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, PRNGKeyArray

from ._cells_common import check_shape, check_size, default_dtype


def _check_ring(where: str, r_min: float, r_max: float, max_phase: float) -> None:
    if not 0 <= r_min < r_max <= 1:
        raise ValueError(
            f"{where}: got r_min={r_min!r} and r_max={r_max!r}, expected "
            "0 <= r_min < r_max <= 1. They bound the absolute value of the eigenvalues."
        )
    if not max_phase > 0:
        raise ValueError(
            f"{where}: got max_phase={max_phase!r}, expected a number above 0. It is "
            "the largest angle of an eigenvalue, in radians."
        )


def _ring(
    key: PRNGKeyArray,
    size: int,
    dtype: Any,
    r_min: float,
    r_max: float,
    max_phase: float,
) -> tuple[Array, Array]:
    """(nu_log, theta_log) of eigenvalues that lie uniformly on a ring."""
    one, two = jax.random.split(key)
    # The logarithm of zero is what the lower bound is for.
    least = float(jnp.finfo(dtype).eps)
    area = jax.random.uniform(one, (size,), dtype, least)
    square = area * (r_max**2 - r_min**2) + r_min**2
    turn = jax.random.uniform(two, (size,), dtype, least)
    return jnp.log(-0.5 * jnp.log(square)), jnp.log(max_phase * turn)


def _input_norm(nu_log: Array) -> Array:
    """sqrt(1 - r ** 2), also where r is next to one."""
    return jnp.sqrt(-jnp.expm1(-2 * jnp.exp(nu_log)))


def _normal(key: PRNGKeyArray, shape: tuple[int, int], std: float, dtype: Any) -> Array:
    return std * jax.random.normal(key, shape, dtype)


class LRU(eqx.Module):
    r"""The linear recurrent unit: a complex diagonal recurrence and a linear readout.

    $$h' = \lambda \circ h + \gamma \circ (B x), \qquad
    \text{out} = \mathrm{Re}(C h') + D x, \qquad
    \lambda = e^{-\nu + i \theta}$$

    The params are real, so that any optimiser can train them: `nu_log`, `theta_log` and
    `gamma_log`, the logarithms of $\nu$, $\theta$ and $\gamma$, and `b_real`, `b_imag`,
    `c_real`, `c_imag` and `d`. The state is `h`, complex of shape (hidden_size,): two
    slots a unit. A nonlinearity belongs behind it, for example
    `Residual(Sequential([LRU(...), jax.nn.gelu]))`.

    **Source:** Orvieto et al., *Resurrecting recurrent neural networks for long
    sequences*, ICML 2023; trained with exact traces by Zucchet et al., *Online learning
    of long-range dependencies*, NeurIPS 2023.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.LRU(3, 8, 3, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    nu_log: Float[Array, " units"]
    theta_log: Float[Array, " units"]
    gamma_log: Float[Array, " units"]
    b_real: Float[Array, "units inputs"]
    b_imag: Float[Array, "units inputs"]
    c_real: Float[Array, "outputs units"]
    c_imag: Float[Array, "outputs units"]
    d: Float[Array, "outputs inputs"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`, `output_size`: of x, h and the output.
        - `r_min`, `r_max`, `max_phase`: the eigenvalues start uniformly on the ring of
          these radii, with an angle of up to `max_phase` radians.
        - `dtype`: of the params; JAX's default float if None.
        - `key`: a key for the params. B, C and D start normal, with the variances
          1/(2 inputs), 1/units and 1/inputs for each number, and
          $\gamma = \sqrt{1 - |\lambda|^2}$.
        """
        sizes = {"input_size": input_size, "hidden_size": hidden_size}
        check_size("nn.LRU", **sizes, output_size=output_size)
        _check_ring("nn.LRU", r_min, r_max, max_phase)
        dtype = default_dtype(dtype)
        if dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"nn.LRU: got dtype {dtype}, expected float32 or float64. The state is "
                "complex, and JAX has complex numbers of these two alone."
            )
        ring, *keys = jax.random.split(key, 6)
        nu_log, theta_log = _ring(ring, hidden_size, dtype, r_min, r_max, max_phase)
        self.nu_log, self.theta_log = nu_log, theta_log
        self.gamma_log = jnp.log(_input_norm(nu_log))
        b, c = (hidden_size, input_size), (output_size, hidden_size)
        self.b_real = _normal(keys[0], b, 1 / math.sqrt(2 * input_size), dtype)
        self.b_imag = _normal(keys[1], b, 1 / math.sqrt(2 * input_size), dtype)
        self.c_real = _normal(keys[2], c, 1 / math.sqrt(hidden_size), dtype)
        self.c_imag = _normal(keys[3], c, 1 / math.sqrt(hidden_size), dtype)
        d = (output_size, input_size)
        self.d = _normal(keys[4], d, 1 / math.sqrt(input_size), dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size

    def init_state(self) -> Complex[Array, " units"]:
        """Complex zeros."""
        zeros = jnp.zeros(self.hidden_size, self.nu_log.dtype)
        return jax.lax.complex(zeros, zeros)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`; the output has the shape (output_size,)."""
        check_shape("nn.LRU", "an input", x, (self.input_size,))
        check_shape("nn.LRU", "a state", state, (self.hidden_size,))
        decay, angle = -jnp.exp(self.nu_log), jnp.exp(self.theta_log)
        gamma = jnp.exp(self.gamma_log)
        drive = gamma * (self.b_real @ x), gamma * (self.b_imag @ x)
        h = jnp.exp(jax.lax.complex(decay, angle)) * state + jax.lax.complex(*drive)
        out = self.c_real @ h.real - self.c_imag @ h.imag + self.d @ x
        return out, h


def _rotated(
    params: "RTU | NonlinearRTU", x: Array, state: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The pair of each unit, turned by its angle and shrunk, with its input added."""
    c1, c2 = state
    r, theta = jnp.exp(-jnp.exp(params.nu_log)), jnp.exp(params.theta_log)
    g, phi = r * jnp.cos(theta), r * jnp.sin(theta)
    norm = _input_norm(params.nu_log)
    return (
        g * c1 - phi * c2 + norm * (params.weight_1 @ x),
        g * c2 + phi * c1 + norm * (params.weight_2 @ x),
    )


class RTU(eqx.Module):
    r"""Recurrent trace units, the linear kind: each unit turns a pair of real numbers.

    $$c_1' = g \circ c_1 - \varphi \circ c_2 + \gamma \circ (W_1 x), \qquad
    c_2' = g \circ c_2 + \varphi \circ c_1 + \gamma \circ (W_2 x)$$

    $$\text{out} = \phi([c_1', c_2']), \qquad g = r \cos \theta, \quad
    \varphi = r \sin \theta, \quad \gamma = \sqrt{1 - r^2}, \quad r = e^{-\nu}$$

    with `nu_log` and `theta_log`, the logarithms of $\nu$ and $\theta$, and the weights
    `weight_1` and `weight_2`. The state is `(c1, c2)`, each (hidden_size,), two slots a
    unit; the output is (2 * hidden_size,). The derivatives by `theta_log` have the
    factor $\theta$ of the chain rule, which published code for this unit leaves out.

    **Source:** Elelimy, White, Bowling and White, *Real-time recurrent learning using
    trace units in reinforcement learning*, NeurIPS 2024.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.RTU(3, 8, key=jax.random.key(0))
        out, (c1, c2) = cell(jnp.ones(3), cell.init_state())
        ```
    """

    nu_log: Float[Array, " units"]
    theta_log: Float[Array, " units"]
    weight_1: Float[Array, "units inputs"]
    weight_2: Float[Array, "units inputs"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: how many features x and each of c1, c2 have.
        - `activation`: $\phi$, elementwise.
        - `r_min`, `r_max`, `max_phase`: r and $\theta$ start as for
          `eqx_etrace.nn.LRU`.
        - `dtype`: of the params; JAX's default float if None.
        - `key`: a key for the params; weights start normal with variance 1/inputs.
        """
        check_size("nn.RTU", input_size=input_size, hidden_size=hidden_size)
        _check_ring("nn.RTU", r_min, r_max, max_phase)
        dtype = default_dtype(dtype)
        ring, one, two = jax.random.split(key, 3)
        nu_log, theta_log = _ring(ring, hidden_size, dtype, r_min, r_max, max_phase)
        self.nu_log, self.theta_log = nu_log, theta_log
        shape, std = (hidden_size, input_size), 1 / math.sqrt(input_size)
        self.weight_1 = _normal(one, shape, std, dtype)
        self.weight_2 = _normal(two, shape, std, dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.activation = activation

    def init_state(self) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """Zeros for c1 and c2."""
        zeros = jnp.zeros(self.hidden_size, self.nu_log.dtype)
        return zeros, zeros

    def __call__(
        self, x: Array, state: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        """As `eqx_etrace.nn.RNN`; the output has the shape (2 * hidden_size,)."""
        check_shape("nn.RTU", "an input", x, (self.input_size,))
        check_shape("nn.RTU", "a state c1", state[0], (self.hidden_size,))
        check_shape("nn.RTU", "a state c2", state[1], (self.hidden_size,))
        new = _rotated(self, x, state)
        return self.activation(jnp.concatenate(new)), new


class NonlinearRTU(eqx.Module):
    r"""Recurrent trace units, the nonlinear kind: the activation is in the recurrence.

    As `eqx_etrace.nn.RTU`, with $\phi$ on the right sides of $c_1'$ and $c_2'$ and none
    behind them: out is $[c_1', c_2']$.

    **Source:** Elelimy, White, Bowling and White, *Real-time recurrent learning using
    trace units in reinforcement learning*, NeurIPS 2024.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.NonlinearRTU(3, 8, activation=jnp.tanh, key=jax.random.key(0))
        out, (c1, c2) = cell(jnp.ones(3), cell.init_state())
        ```
    """

    nu_log: Float[Array, " units"]
    theta_log: Float[Array, " units"]
    weight_1: Float[Array, "units inputs"]
    weight_2: Float[Array, "units inputs"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** as for `eqx_etrace.nn.RTU`."""
        linear = RTU(
            input_size,
            hidden_size,
            r_min=r_min,
            r_max=r_max,
            max_phase=max_phase,
            dtype=dtype,
            key=key,
        )
        self.nu_log, self.theta_log = linear.nu_log, linear.theta_log
        self.weight_1, self.weight_2 = linear.weight_1, linear.weight_2
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.activation = activation

    def init_state(self) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """Zeros for c1 and c2."""
        zeros = jnp.zeros(self.hidden_size, self.nu_log.dtype)
        return zeros, zeros

    def __call__(
        self, x: Array, state: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        """As `eqx_etrace.nn.RTU`."""
        check_shape("nn.NonlinearRTU", "an input", x, (self.input_size,))
        check_shape("nn.NonlinearRTU", "a state c1", state[0], (self.hidden_size,))
        check_shape("nn.NonlinearRTU", "a state c2", state[1], (self.hidden_size,))
        c1, c2 = _rotated(self, x, state)
        new = self.activation(c1), self.activation(c2)
        return jnp.concatenate(new), new
