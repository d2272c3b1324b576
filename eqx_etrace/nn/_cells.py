"""Cells whose units talk to each other through a recurrent product.

All follow one convention: `cell(x, state) -> (out, state)` is one time step of one
sample, `cell.init_state()` is the state before the first step.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._cells_common import Gate, check_shape, check_size, default_dtype


class RNN(eqx.Module):
    r"""The plain recurrent network.

    $$h' = \phi(W x + U h + b)$$

    The state is `h`, (hidden_size,), and so is the output.

    **Source:** Elman, *Finding structure in time*, Cognitive Science 14, 1990.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.RNN(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    weight_ih: Float[Array, "units inputs"]
    weight_hh: Float[Array, "units units"]
    bias: Float[Array, " units"] | None
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Callable[[Array], Array] = jnp.tanh,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `input_size`, `hidden_size`: how many features x and h have.
        - `activation`: $\phi$, elementwise.
        - `use_bias`: whether there is a b.
        - `dtype`: of the weights and the state; JAX's default float if None.
        - `key`: a key for the weights, uniform within $1/\sqrt{\text{hidden\_size}}$.
        """
        check_size("nn.RNN", input_size=input_size, hidden_size=hidden_size)
        gate = Gate(input_size, hidden_size, use_bias=use_bias, dtype=dtype, key=key)
        self.weight_ih, self.weight_hh = gate.weight_ih, gate.weight_hh
        self.bias = gate.bias
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.activation = activation

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.weight_ih.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """**Arguments:** the input (input_size,) and the state.

        **Returns:** the output and the new state.

        **Raises:** `ValueError` for another shape.
        """
        check_shape("nn.RNN", "an input", x, (self.input_size,))
        check_shape("nn.RNN", "a state", state, (self.hidden_size,))
        y = self.weight_ih @ x + self.weight_hh @ state
        h = self.activation(y if self.bias is None else y + self.bias)
        return h, h


class MGU(eqx.Module):
    r"""The minimal gated unit: a GRU whose two gates are one.

    $$f = \sigma(W_f x + U_f h + b_f), \qquad
    \tilde h = \tanh(W x + U (f \circ h) + b), \qquad
    h' = (1 - f) \circ h + f \circ \tilde h$$

    with the params of f in `forget` and those of the other product in `candidate`. The
    state is `h`, (hidden_size,), and so is the output. The gate of a unit reaches the
    others within the step, by $U (f \circ h)$: `eqx_etrace.compile` chooses multi-step.

    **Source:** Zhou et al., *Minimal gated unit for recurrent neural networks*,
    International Journal of Automation and Computing 13, 2016.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.MGU(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    forget: Gate
    candidate: Gate
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** as for `eqx_etrace.nn.RNN`, without `activation`."""
        check_size("nn.MGU", input_size=input_size, hidden_size=hidden_size)
        one, two = jax.random.split(key)
        options = {"use_bias": use_bias, "dtype": dtype}
        self.forget = Gate(input_size, hidden_size, key=one, **options)
        self.candidate = Gate(input_size, hidden_size, key=two, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.forget.weight_ih.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.MGU", "an input", x, (self.input_size,))
        check_shape("nn.MGU", "a state", state, (self.hidden_size,))
        f = jax.nn.sigmoid(self.forget(x, state))
        candidate = jnp.tanh(self.candidate(x, f * state))
        h = (1 - f) * state + f * candidate
        return h, h


class MinimalRNN(eqx.Module):
    r"""MinimalRNN: an encoded input, and one gate that mixes it into the state.

    $$z = \tanh(W x + b), \qquad u = \sigma(U_z z + U_h h + b_u), \qquad
    h' = u \circ h + (1 - u) \circ z$$

    with W and b in `encoder`, $U_z$ in `update.weight_ih` and $U_h$ in
    `update.weight_hh`. The state is `h`, (hidden_size,), and so is the output. The
    encoder reaches all units through $U_z z$: `eqx_etrace.compile` chooses multi-step.

    **Source:** Chen, *MinimalRNN: toward more interpretable and trainable recurrent
    neural networks*, 2017 (arXiv:1711.06788).

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.MinimalRNN(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    encoder: eqx.nn.Linear
    update: Gate
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** as for `eqx_etrace.nn.RNN`, without `activation`."""
        check_size("nn.MinimalRNN", input_size=input_size, hidden_size=hidden_size)
        one, two = jax.random.split(key)
        options: Any = {"use_bias": use_bias, "dtype": dtype}
        self.encoder = eqx.nn.Linear(input_size, hidden_size, key=one, **options)
        self.update = Gate(hidden_size, hidden_size, key=two, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.update.weight_hh.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.MinimalRNN", "an input", x, (self.input_size,))
        check_shape("nn.MinimalRNN", "a state", state, (self.hidden_size,))
        z = jnp.tanh(self.encoder(x))
        u = jax.nn.sigmoid(self.update(z, state))
        h = u * state + (1 - u) * z
        return h, h


class CFN(eqx.Module):
    r"""The chaos-free network: without input its state goes to zero.

    $$\theta = \sigma(U_\theta h + V_\theta x + b_\theta), \qquad
    \eta = \sigma(U_\eta h + V_\eta x + b_\eta), \qquad
    h' = \theta \circ \tanh(h) + \eta \circ \tanh(W x)$$

    with $\theta$ in `forget`, $\eta$ in `input` and W in `candidate`, which has no
    bias. The state is `h`, (hidden_size,), and so is the output.

    **Source:** Laurent and von Brecht, *A recurrent neural network without chaos*, ICLR
    2017.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.CFN(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    forget: Gate
    input: Gate
    candidate: eqx.nn.Linear
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** as for `eqx_etrace.nn.RNN`, without `activation`."""
        check_size("nn.CFN", input_size=input_size, hidden_size=hidden_size)
        one, two, three = jax.random.split(key, 3)
        options = {"use_bias": use_bias, "dtype": dtype}
        self.forget = Gate(input_size, hidden_size, key=one, **options)
        self.input = Gate(input_size, hidden_size, key=two, **options)
        self.candidate = eqx.nn.Linear(
            input_size, hidden_size, use_bias=False, dtype=dtype, key=three
        )
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.forget.weight_ih.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.CFN", "an input", x, (self.input_size,))
        check_shape("nn.CFN", "a state", state, (self.hidden_size,))
        forget = jax.nn.sigmoid(self.forget(x, state))
        admit = jax.nn.sigmoid(self.input(x, state))
        h = forget * jnp.tanh(state) + admit * jnp.tanh(self.candidate(x))
        return h, h


class URLSTM(eqx.Module):
    r"""An LSTM with a refine gate and time constants spread over many scales.

    $$f = \sigma(L_f(x, h) + b), \quad r = \sigma(L_r(x, h) - b), \quad
    g = r \circ (1 - (1 - f)^2) + (1 - r) \circ f^2$$

    $$c' = g \circ c + (1 - g) \circ \tanh(L_u(x, h)), \qquad
    h' = \sigma(L_o(x, h)) \circ \tanh(c')$$

    with $L_f, L_r, L_u, L_o$ linear in `forget`, `refine`, `candidate` and `output`,
    and b in `forget_bias`, such that $\sigma(b)$ starts uniform within (1/n, 1 - 1/n)
    for n units. The state is `(h, c)`, each (hidden_size,); the output is `h'`.

    **Source:** Gu et al., *Improving the gating mechanism of recurrent neural
    networks*, ICML 2020.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.URLSTM(3, 8, key=jax.random.key(0))
        out, (h, c) = cell(jnp.ones(3), cell.init_state())
        ```
    """

    forget: Gate
    refine: Gate
    candidate: Gate
    output: Gate
    forget_bias: Float[Array, " units"]
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:** as for `eqx_etrace.nn.RNN`, without `activation`; `use_bias`
        is for `candidate` and `output`."""
        check_size("nn.URLSTM", input_size=input_size, hidden_size=hidden_size)
        keys = jax.random.split(key, 5)
        size = input_size, hidden_size
        plain: Any = {"use_bias": False, "dtype": dtype}
        biased: Any = {"use_bias": use_bias, "dtype": dtype}
        self.forget = Gate(*size, key=keys[0], **plain)
        self.refine = Gate(*size, key=keys[1], **plain)
        self.candidate = Gate(*size, key=keys[2], **biased)
        self.output = Gate(*size, key=keys[3], **biased)
        # With one or two units the interval would be empty.
        edge = 1 / max(hidden_size, 3)
        dtype = default_dtype(dtype)
        share = jax.random.uniform(keys[4], (hidden_size,), dtype, edge, 1 - edge)
        self.forget_bias = jnp.log(share) - jnp.log1p(-share)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """Zeros for h and c."""
        zeros = jnp.zeros(self.hidden_size, self.forget_bias.dtype)
        return zeros, zeros

    def __call__(
        self, x: Array, state: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        """As `eqx_etrace.nn.RNN`."""
        h, c = state
        check_shape("nn.URLSTM", "an input", x, (self.input_size,))
        check_shape("nn.URLSTM", "a state h", h, (self.hidden_size,))
        check_shape("nn.URLSTM", "a state c", c, (self.hidden_size,))
        f = jax.nn.sigmoid(self.forget(x, h) + self.forget_bias)
        r = jax.nn.sigmoid(self.refine(x, h) - self.forget_bias)
        g = r * (1 - (1 - f) ** 2) + (1 - r) * f**2
        c = g * c + (1 - g) * jnp.tanh(self.candidate(x, h))
        h = jax.nn.sigmoid(self.output(x, h)) * jnp.tanh(c)
        return h, (h, c)
