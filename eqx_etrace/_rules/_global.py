"""The interface of global rules: the whole hidden state as one vector."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped

from .._custom_types import Scope
from ._uses import UseJacobian, Uses, WeightUse


class Sizes(NamedTuple):
    """What a global rule is for: `states` hidden numbers, `weights` numbers of the
    weights that reach them, and the dtype of both."""

    states: int
    weights: int
    dtype: Any


class Structure(NamedTuple):
    """What the compiler knows of a step: sparse boolean matrices (`scipy.sparse`).

    - `transition`: states x states, whether an old number acts on a new one.
    - `direct`: states x weights, whether a number of a weight acts on a new one.
    - `units`: states x states, whether two belong to one unit.
    """

    transition: Any
    direct: Any
    units: Any


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
        by_use: Callable[[Sequence[WeightUse], Sequence[int]], UseJacobian],
    ):
        self.sizes = Sizes(states.size, weights.size, states.dtype)
        self._at, self._by_use = (states, weights), by_use
        # Here, and not when they are asked for: that may be under a vmap of the rule.
        _, self._pull = jax.vjp(step, states, weights)
        if transposed:
            self._push = _transposed(self._pull, states, weights)
        else:
            self._push = jax.linearize(step, states, weights)[1]

    def jvp(
        self,
        states: Shaped[Array, " states"],
        weights: Shaped[Array, " weights"] | None = None,
    ) -> Shaped[Array, " states"]:
        """How the new state changes with the old one, and with the weights."""
        zeros = jnp.zeros_like(self._at[1])
        return self._push(states, zeros if weights is None else weights)

    def vjp(
        self, states: Shaped[Array, " states"]
    ) -> tuple[Shaped[Array, " states"], Shaped[Array, " weights"]]:
        """The derivative of `states . new state` by the old state and by the weights,
        the latter with the old state held fixed."""
        return self._pull(states)

    def by_use(self, uses: Sequence[WeightUse], weights: Sequence[int]) -> UseJacobian:
        """The derivatives by the old state, by these weights, and by the drives of
        these uses, in the order of the first use of each."""
        return self._by_use(uses, weights)


def _transposed(pull: Callable[..., Any], states: Any, weights: Any) -> Any:
    """Forward mode from reverse mode, for what has a reverse rule of its own."""
    transpose = jax.linear_transpose(pull, states)

    def push(*change: Any) -> Any:
        return transpose(change)[0]

    try:
        jax.eval_shape(push, states, weights)
    except ValueError:  # The rule has a loop of its own, which cannot be turned round.
        units = jnp.eye(states.size, dtype=states.dtype)
        rows = jax.vmap(pull)(units)
        return lambda *change: sum(map(jnp.dot, rows, change), jnp.zeros_like(states))
    return push


class GlobalRule(eqx.Module):
    """A learning rule that follows how all weights have acted on the whole state.

    The step calls `init` once per sample, `update` once per step and sample, and
    `gradient` with a derivative of the loss by the hidden state.
    """

    scope: ClassVar[Scope] = "local"
    credit: ClassVar[str] = "through the whole state"
    """What a weight that reaches the state gets, for the report."""
    leak: ClassVar[float | None] = None
    detach: ClassVar[tuple[tuple[str, str], ...]] = ()
    windowed: ClassVar[bool] = False
    filters: ClassVar[bool] = False

    def bound(
        self, structure: Callable[[], Structure], uses: Callable[[], Uses]
    ) -> "GlobalRule":
        """The rule for the step whose structure, or uses of weights, these give;
        itself, if that is enough. The compiler calls it once."""
        del structure, uses
        return self

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
