"""Cells whose units remember themselves alone: D-RTRL is exact for one such layer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._cells_common import ElementwiseGate, Gate, check_shape, check_size


class IndRNN(eqx.Module):
    r"""The independently recurrent network: each unit sees its own past alone.

    $$h' = \phi(W x + u \circ h + b)$$

    with the vector u in `weight_hh`. The state is `h`, (hidden_size,), and so is the
    output.

    **Source:** Li et al., *Independently recurrent neural network (IndRNN): building a
    longer and deeper RNN*, CVPR 2018.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.IndRNN(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    weight_ih: Float[Array, "units inputs"]
    weight_hh: Float[Array, " units"]
    bias: Float[Array, " units"] | None
    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        activation: Callable[[Array], Array] = jax.nn.relu,
        use_bias: bool = True,
        dtype: Any = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:** as for `eqx_etrace.nn.RNN`; `weight_hh` starts uniform within
        (0, 1), which a rectified unit can hold a value with."""
        check_size("nn.IndRNN", input_size=input_size, hidden_size=hidden_size)
        one, two = jax.random.split(key)
        gate = ElementwiseGate(
            input_size, hidden_size, use_bias=use_bias, dtype=dtype, key=one
        )
        self.weight_ih, self.bias = gate.weight_ih, gate.bias
        dtype = gate.weight_hh.dtype
        self.weight_hh = jax.random.uniform(two, (hidden_size,), dtype)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.activation = activation

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.weight_ih.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.IndRNN", "an input", x, (self.input_size,))
        check_shape("nn.IndRNN", "a state", state, (self.hidden_size,))
        y = self.weight_ih @ x + self.weight_hh * state
        h = self.activation(y if self.bias is None else y + self.bias)
        return h, h


class MinGRU(eqx.Module):
    r"""minGRU: a GRU whose gate does not see the state.

    $$z = \sigma(L_z x), \qquad \tilde h = L_h x, \qquad
    h' = (1 - z) \circ h + z \circ \tilde h$$

    with the linear $L_z$ in `update` and $L_h$ in `candidate`. The state is `h`,
    (hidden_size,), and so is the output.

    **Source:** Feng et al., *Were RNNs all we needed?*, 2024 (arXiv:2410.01201).

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.MinGRU(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    update: eqx.nn.Linear
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
        """**Arguments:** as for `eqx_etrace.nn.RNN`, without `activation`; the weights
        start as those of `equinox.nn.Linear`."""
        check_size("nn.MinGRU", input_size=input_size, hidden_size=hidden_size)
        one, two = jax.random.split(key)
        options: Any = {"use_bias": use_bias, "dtype": dtype}
        self.update = eqx.nn.Linear(input_size, hidden_size, key=one, **options)
        self.candidate = eqx.nn.Linear(input_size, hidden_size, key=two, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.update.weight.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.MinGRU", "an input", x, (self.input_size,))
        check_shape("nn.MinGRU", "a state", state, (self.hidden_size,))
        z = jax.nn.sigmoid(self.update(x))
        h = (1 - z) * state + z * self.candidate(x)
        return h, h


class MinLSTM(eqx.Module):
    r"""minLSTM: an LSTM whose gates do not see the state and sum to one.

    $$f = \sigma(L_f x), \qquad i = \sigma(L_i x), \qquad
    h' = \frac{f \circ h + i \circ L_h x}{f + i}$$

    with the linear $L_f$, $L_i$ and $L_h$ in `forget`, `input` and `candidate`. The
    state is `h`, (hidden_size,), and so is the output.

    **Source:** Feng et al., *Were RNNs all we needed?*, 2024 (arXiv:2410.01201).

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.MinLSTM(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    forget: eqx.nn.Linear
    input: eqx.nn.Linear
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
        """**Arguments:** as for `eqx_etrace.nn.MinGRU`."""
        check_size("nn.MinLSTM", input_size=input_size, hidden_size=hidden_size)
        one, two, three = jax.random.split(key, 3)
        options: Any = {"use_bias": use_bias, "dtype": dtype}
        self.forget = eqx.nn.Linear(input_size, hidden_size, key=one, **options)
        self.input = eqx.nn.Linear(input_size, hidden_size, key=two, **options)
        self.candidate = eqx.nn.Linear(input_size, hidden_size, key=three, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.forget.weight.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.MinLSTM", "an input", x, (self.input_size,))
        check_shape("nn.MinLSTM", "a state", state, (self.hidden_size,))
        # f / (f + i) without a division, which may be zero by zero.
        forget = jax.nn.log_sigmoid(self.forget(x))
        keep = jax.nn.sigmoid(forget - jax.nn.log_sigmoid(self.input(x)))
        h = keep * state + (1 - keep) * self.candidate(x)
        return h, h


class QuasiLSTM(eqx.Module):
    r"""eLSTM: an LSTM whose gates see their own cell alone, made for exact RTRL.

    $$f = \sigma(W_f x + w_f \circ c + b_f), \qquad
    z = \tanh(W_z x + w_z \circ c + b_z), \qquad
    c' = f \circ c + (1 - f) \circ z$$

    $$\text{out} = \sigma(W_o x + U_o c' + b_o) \circ c'$$

    with f in `forget` and z in `candidate`, whose `weight_hh` is a vector, and the
    output gate in `output`, whose `weight_hh` is a matrix: it acts after the state. The
    state is `c`, (hidden_size,); the output has the same size.

    **Source:** Irie, Gopalakrishnan and Schmidhuber, *Exploring the promise and limits
    of real-time recurrent learning*, ICLR 2024.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.QuasiLSTM(3, 8, key=jax.random.key(0))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    forget: ElementwiseGate
    candidate: ElementwiseGate
    output: Gate
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
        check_size("nn.QuasiLSTM", input_size=input_size, hidden_size=hidden_size)
        one, two, three = jax.random.split(key, 3)
        options: Any = {"use_bias": use_bias, "dtype": dtype}
        self.forget = ElementwiseGate(input_size, hidden_size, key=one, **options)
        self.candidate = ElementwiseGate(input_size, hidden_size, key=two, **options)
        self.output = Gate(input_size, hidden_size, key=three, **options)
        self.input_size = input_size
        self.hidden_size = hidden_size

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.hidden_size, self.forget.weight_ih.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.QuasiLSTM", "an input", x, (self.input_size,))
        check_shape("nn.QuasiLSTM", "a state", state, (self.hidden_size,))
        f = jax.nn.sigmoid(self.forget(x, state))
        c = f * state + (1 - f) * jnp.tanh(self.candidate(x, state))
        return jax.nn.sigmoid(self.output(x, c)) * c, c
