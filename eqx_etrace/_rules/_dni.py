"""Decoupled neural interfaces: a learned guess of the gradient from the future."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree, Shaped

from .._custom_types import Scope
from .._relation import Relation
from .._signals import Bootstrapped, Signal
from ._base import LocalRule, RelationJacobian


class DNI(LocalRule):
    r"""Synthetic gradients: backpropagation in windows, and a guess of the rest.

    Within a window the gradient is exact. Its end gets $M(h)$, a guess of the
    derivative of all later losses by the state there, from a module M that learns on
    the way: its target at the start of a window is what comes back to there, from the
    losses of the window and from the guess at its end. No trace is kept.

    M is part of your model, so that optimiser and checkpoints hold it; the step does
    not call it. Its gradient is that of $\tfrac12 |M(h) - \text{target}|^2$.

    **Arguments:**

    - `path`: the key path of M in the model. M maps the hidden state of a sample, all
      leaves in one vector (n,), to a vector (n,); let it give zeros at first.

    The window is that of `value_and_grad` or of `eqx_etrace.steps`; `step` is one of
    length one. A sequence that is reset inside a window is cut there; what follows the
    last step is a guess as well.

    **Source:** Jaderberg et al., *Decoupled neural interfaces using synthetic
    gradients*, ICML 2017.

    !!! example

        ```python
        class Learner(eqx.Module):
            net: Net
            synthesiser: eqx.nn.Linear

            def __call__(self, x, state):
                return self.net(x, state)

        guess = eqx.nn.Linear(8, 8, key=key)
        guess = jax.tree.map(jnp.zeros_like, guess)
        rule = eqx_etrace.DNI("synthesiser")
        graph = eqx_etrace.compile(Learner(net, guess), state, x, rule)
        ```
    """

    path: str = eqx.field(static=True)

    def __init__(self, path: str = "synthesiser"):
        self.path = path

    @property
    def scope(self) -> Scope:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Nothing depends on it."""
        return "local"

    @property
    def signal(self) -> Signal:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The guess."""
        return Bootstrapped(self.path)

    def init(self, relation: Relation) -> PyTree:
        """No trace."""
        del relation
        return ()

    def update(
        self, relation: Relation, trace: PyTree, jacobian: RelationJacobian
    ) -> PyTree:
        """No trace."""
        del relation, jacobian
        return trace

    def gradient(
        self,
        relation: Relation,
        trace: PyTree,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """Nothing beyond the window."""
        del trace, signal
        found: Any = jnp.zeros(relation.op.weight_shape, relation.weight_dtype)
        return found
