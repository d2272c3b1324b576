"""The cells of Equinox in the convention `(x, state) -> (out, state)`."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._cells_common import check_shape


def _check_cell(where: str, cell: Any, kind: type) -> None:
    if not isinstance(cell, kind):
        raise TypeError(
            f"{where}: got an object of type `{type(cell).__name__}`, expected an "
            f"`equinox.nn.{kind.__name__}`. Make one and pass it in: "
            f"`{where}(eqx.nn.{kind.__name__}(inputs, units, key=key))`."
        )


class GRU(eqx.Module):
    """Calls an `equinox.nn.GRUCell` as `(x, state) -> (out, state)`.

    The state is `h`, (hidden_size,), and so is the output.

    **Source:** Cho et al., *Learning phrase representations using RNN encoder-decoder
    for statistical machine translation*, EMNLP 2014.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.GRU(eqx.nn.GRUCell(3, 8, key=jax.random.key(0)))
        out, state = cell(jnp.ones(3), cell.init_state())
        ```
    """

    cell: eqx.nn.GRUCell

    def __init__(self, cell: eqx.nn.GRUCell):
        """**Arguments:** `cell`, with its weights as they are."""
        _check_cell("nn.GRU", cell, eqx.nn.GRUCell)
        self.cell = cell

    def init_state(self) -> Float[Array, " units"]:
        """Zeros."""
        return jnp.zeros(self.cell.hidden_size, self.cell.weight_ih.dtype)

    def __call__(self, x: Array, state: Array) -> tuple[Array, Array]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.GRU", "an input", x, (self.cell.input_size,))
        check_shape("nn.GRU", "a state", state, (self.cell.hidden_size,))
        h = self.cell(x, state)
        return h, h


class LSTM(eqx.Module):
    """Calls an `equinox.nn.LSTMCell` as `(x, state) -> (out, state)`.

    The state is `(h, c)`, each (hidden_size,), two slots a unit; the output is h.

    **Source:** Hochreiter and Schmidhuber, *Long short-term memory*, Neural Computation
    9, 1997; with the forget gate of Gers, Schmidhuber and Cummins, *Learning to
    forget*, Neural Computation 12, 2000.

    !!! example

        ```python
        from eqx_etrace import nn

        cell = nn.LSTM(eqx.nn.LSTMCell(3, 8, key=jax.random.key(0)))
        out, (h, c) = cell(jnp.ones(3), cell.init_state())
        ```
    """

    cell: eqx.nn.LSTMCell

    def __init__(self, cell: eqx.nn.LSTMCell):
        """**Arguments:** `cell`, with its weights as they are."""
        _check_cell("nn.LSTM", cell, eqx.nn.LSTMCell)
        self.cell = cell

    def init_state(self) -> tuple[Float[Array, " units"], Float[Array, " units"]]:
        """Zeros for h and c."""
        zeros = jnp.zeros(self.cell.hidden_size, self.cell.weight_ih.dtype)
        return zeros, zeros

    def __call__(
        self, x: Array, state: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array]]:
        """As `eqx_etrace.nn.RNN`."""
        check_shape("nn.LSTM", "an input", x, (self.cell.input_size,))
        check_shape("nn.LSTM", "a state h", state[0], (self.cell.hidden_size,))
        check_shape("nn.LSTM", "a state c", state[1], (self.cell.hidden_size,))
        h, c = self.cell(x, state)
        return h, (h, c)
