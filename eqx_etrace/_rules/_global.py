"""The interface of global rules: the whole hidden state as one vector."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Int, PyTree, Shaped

from .._custom_types import Scope


class Sizes(NamedTuple):
    """What a global rule is for: `states` hidden numbers, `weights` numbers of the
    weights that reach them, and the dtype of both."""

    states: int
    weights: int
    dtype: Any


class Dynamics:
    """One step of one sample, near where it is, as a map of two vectors.

    The hidden state h, all leaves in one vector of shape (states,), and the weights w
    in one of shape (weights,) give the new hidden state. Complex numbers are pairs.

    **Attributes:**

    - `sizes`: how long the vectors are.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], Any],
        states: Shaped[Array, " states"],
        weights: Shaped[Array, " weights"],
        transposed: bool,
    ):
        self.sizes = Sizes(states.size, weights.size, states.dtype)
        self._at = states, weights
        _, pull = jax.vjp(step, *self._at)
        self._pull = pull
        if transposed:  # There is no forward mode of a `custom_vjp`.
            transpose = jax.linear_transpose(pull, states)
            self._push = lambda *change: transpose(change)[0]
        else:
            self._push = jax.linearize(step, *self._at)[1]

    def jvp(
        self,
        states: Shaped[Array, " states"],
        weights: Shaped[Array, " weights"] | None = None,
    ) -> Shaped[Array, " states"]:
        """How the new state changes with the old one, and with the weights."""
        zeros = jax.tree.map(jax.numpy.zeros_like, self._at[1])
        return self._push(states, zeros if weights is None else weights)

    def vjp(
        self, states: Shaped[Array, " states"]
    ) -> tuple[Shaped[Array, " states"], Shaped[Array, " weights"]]:
        """The derivative of `states . new state` by the old state and by the weights,
        the latter with the old state held fixed."""
        return self._pull(states)


class GlobalRule(eqx.Module):
    """A learning rule that follows how all weights have acted on the whole state.

    The step calls `init` once per sample, `update` once per step and sample, and
    `gradient` with a derivative of the loss by the hidden state.
    """

    scope: ClassVar[Scope] = "local"
    leak: ClassVar[float | None] = None

    @abstractmethod
    def init(self, sizes: Sizes, sample: Int[Array, ""]) -> PyTree:
        """The zero trace of the sample of this number."""

    @abstractmethod
    def update(self, dynamics: Dynamics, trace: PyTree) -> PyTree:
        """The trace after one more step of one sample."""

    @abstractmethod
    def gradient(
        self, trace: PyTree, signal: Shaped[Array, " states"]
    ) -> Shaped[Array, " weights"]:
        """signal . trace: the derivative of the loss by the weights, for the derivative
        of the loss by the state that the trace is about; of one sample."""
