"""RTRL: the exact derivative of the hidden state by all weights."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from ._global import Dynamics, GlobalRule, Sizes


class RTRL(GlobalRule):
    r"""Real-time recurrent learning: the gradient of backpropagation, forward in time.

    It carries $J^t = dh^t/dw$, all of the hidden state by all weights that reach it,

    $$J^t = \frac{\partial h^t}{\partial h^{t-1}} J^{t-1}
      + \frac{\partial h^t}{\partial w},$$

    each column by one product with the Jacobian of the step, which is never formed.
    Nothing is left out: credit through other units and other layers is there. With
    weights that stay as they are, the gradient of a sequence is that of backpropagation
    through time; with updates on the way, $J$ holds what older weights have done.

    Memory: batch x hidden state x weights, time per step that times the fan-in of a
    unit: for small networks, and to compare with.

    **Source:** Williams and Zipser, *A learning algorithm for continually running fully
    recurrent neural networks*, Neural Computation 1, 1989.

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.RTRL())
        ```
    """

    credit: ClassVar[str] = "through the whole state, exact"

    def init(
        self, sizes: Sizes, sample: Int[Array, ""]
    ) -> Shaped[Array, "states weights"]:
        """Zeros."""
        del sample
        return jnp.zeros((sizes.states, sizes.weights), sizes.dtype)

    def update(
        self, dynamics: Dynamics, trace: Shaped[Array, "states weights"]
    ) -> Shaped[Array, "states weights"]:
        """One step of the recursion above."""
        units = jnp.eye(dynamics.sizes.states, dtype=dynamics.sizes.dtype)
        of_weights = jax.vmap(lambda unit: dynamics.vjp(unit)[1])(units)
        return jax.vmap(dynamics.jvp, in_axes=1, out_axes=1)(trace) + of_weights

    def gradient(
        self,
        trace: Shaped[Array, "states weights"],
        signal: Shaped[Array, " states"],
    ) -> Shaped[Array, " weights"]:
        """signal . J."""
        return signal @ trace
