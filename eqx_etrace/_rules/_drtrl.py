"""D-RTRL: an exact eligibility trace per weight entry, diagonal over units."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._relation import Relation
from ._base import LocalRule, RelationJacobian


class DRTRL(LocalRule):
    r"""Diagonal real-time recurrent learning with exact traces.

    For a weight entry $w$ that acts on unit $i$ through $y$, the trace of slot $s'$ is

    $$\epsilon^t_{s'} = \sum_s D^t_{s's}\,\epsilon^{t-1}_s
      + \frac{\partial h^t_{s'}}{\partial y^t}\,\frac{\partial y^t}{\partial w}$$

    with $D$ the S x S Jacobian of the unit's own state variables. It is exact for every
    path that stays within a unit: membrane, current, adaptation, gates, reset. What is
    left out is the credit through *other* units, that is, through the recurrent
    product; `graph.report()` lists it.

    Memory: batch x weight entries x slots. It needs no hyper-parameter.

    **Source:** Wang, Dong, Jiang, Ji, Liu, Zhang, Wu, *BrainTrace*, Nature
    Communications 2026; the diagonal approximation goes back to Mozer 1989 and to
    Bellec et al., Nature Communications 2020 (e-prop).

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.DRTRL())
        ```
    """

    def init(self, relation: Relation) -> tuple[Shaped[Array, "..."], ...]:
        """Zeros in the layout of the relation, one array per slot."""
        shape = relation.op.trace_shape
        return tuple(jnp.zeros(shape, dtype) for dtype in relation.trace_dtypes)

    def update(
        self,
        relation: Relation,
        trace: tuple[Shaped[Array, "..."], ...],
        jacobian: RelationJacobian,
    ) -> tuple[Shaped[Array, "..."], ...]:
        """One step of the recursion above, for one sample."""
        new = []
        for target, dtype in zip(relation.slots, relation.trace_dtypes, strict=True):
            terms = []
            direct = jacobian.direct[target]
            if direct is not None:
                direct = direct.astype(dtype)
                terms.append(relation.op.influence(direct, jacobian.operands))
            for slot, old in zip(relation.slots, trace, strict=True):
                factor = jacobian.transition[target][slot]
                if factor is not None:
                    factor = relation.expand(factor.astype(dtype))
                    terms.append(factor * old.astype(dtype))
            zero = jnp.zeros(relation.op.trace_shape, dtype)
            new.append(sum(terms[1:], terms[0]) if terms else zero)
        return tuple(new)

    def gradient(
        self,
        relation: Relation,
        trace: tuple[Shaped[Array, "..."], ...],
        signal: Sequence[Shaped[Array, "..."]],
    ) -> Shaped[Array, "..."]:
        """The sum over slots, units and batch of signal . trace."""
        vectors = [
            signal[slot].astype(dtype)
            for slot, dtype in zip(relation.slots, relation.trace_dtypes, strict=True)
        ]
        return relation.op.contract(vectors, trace).astype(relation.weight_dtype)
