"""UORO: an unbiased estimate of RTRL of rank one."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from ._global import Dynamics, GlobalRule, Sizes


class RankOne(NamedTuple):
    """The trace of `UORO`: J is estimated by the product of two vectors."""

    states: Shaped[Array, "*batch states"]
    weights: Shaped[Array, "*batch weights"]
    key: PRNGKeyArray


class UORO(GlobalRule):
    r"""Unbiased online recurrent optimisation.

    The derivative of the hidden state by the weights is estimated by one product
    $\tilde s\,\tilde\theta^\top$, whose expectation it is. With random signs $\nu$,

    $$\tilde s^t = \rho_0 D^t \tilde s^{t-1} + \rho_1 \nu, \qquad
      \tilde\theta^t = \tilde\theta^{t-1} / \rho_0
        + \nu^\top \tfrac{\partial h^t}{\partial w} / \rho_1,$$

    $\rho_0 = \sqrt{|\tilde\theta| / |D \tilde s|}$ and
    $\rho_1 = \sqrt{|\nu^\top \partial h / \partial w| / |\nu|}$, which keep the
    variance low: one forward and one reverse product with the Jacobian of the step.

    The gradient is that of `RTRL` on average, with a variance that grows with the
    network; learning rates have to be smaller for it.

    **Arguments:**

    - `key`: a key from `jax.random.key`; each sample draws signs of its own from it.

    Memory: batch x (hidden state + weights).

    **Source:** Tallec and Ollivier, *Unbiased online recurrent optimization*,
    ICLR 2018.

    !!! example

        ```python
        rule = eqx_etrace.UORO(jax.random.key(0))
        graph = eqx_etrace.compile(net, state, x, rule=rule)
        ```
    """

    credit: ClassVar[str] = "through the whole state, an unbiased estimate"

    key: PRNGKeyArray

    def init(self, sizes: Sizes, sample: Int[Array, ""]) -> RankOne:
        """Zeros, and the key of the sample."""
        states, weights = (jnp.zeros(n, sizes.dtype) for n in sizes[:2])
        return RankOne(states, weights, jax.random.fold_in(self.key, sample))

    def update(self, dynamics: Dynamics, trace: RankOne) -> RankOne:
        """One step of the recursions above."""
        sizes = dynamics.sizes
        key, now = jax.random.split(trace.key)
        signs = _signs(now, sizes)
        moved = dynamics.jvp(trace.states)
        new = dynamics.vjp(signs)[1]
        # As much of the product on either side; any factors leave it unbiased.
        old = _root_of_ratio(trace.weights, moved)
        fresh = _root_of_ratio(new, signs)
        states = old * moved + fresh * signs
        return RankOne(states, trace.weights / old + new / fresh, key)

    def gradient(
        self, trace: RankOne, signal: Shaped[Array, " states"]
    ) -> Shaped[Array, " weights"]:
        """(signal . s) theta."""
        return jnp.dot(signal, trace.states) * trace.weights


def _signs(key: PRNGKeyArray, sizes: Sizes) -> Shaped[Array, " states"]:
    return jax.random.rademacher(key, (sizes.states,), sizes.dtype)


def _root_of_ratio(
    above: Shaped[Array, " n"], below: Shaped[Array, " m"]
) -> Shaped[Array, ""]:
    """sqrt(|above| / |below|), and one where a vector is zero."""
    norms = jnp.linalg.norm(above), jnp.linalg.norm(below)
    some = (norms[0] > 0) & (norms[1] > 0)
    above_, below_ = (jnp.where(some, norm, 1) for norm in norms)
    return jnp.sqrt(above_ / below_)
