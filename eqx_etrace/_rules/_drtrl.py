"""D-RTRL: an exact eligibility trace per weight entry, diagonal over units."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._custom_types import Scope
from .._op_rules import cast, product
from .._relation import Relation
from ._base import LocalRule, RelationJacobian


class DRTRL(LocalRule):
    r"""Diagonal real-time recurrent learning with exact traces.

    For a weight entry $w$ that acts on unit $i$ through $y$, the trace of slot $s'$ is

    $$\epsilon^t_{s'} = \sum_s D^t_{s's}\,\epsilon^{t-1}_s
      + \sum_s L^t_{s's}\,\epsilon^t_s
      + \frac{\partial h^t_{s'}}{\partial y^t}\,\frac{\partial y^t}{\partial w}$$

    with $D$ the S x S Jacobian by the unit's own old state variables and $L$ that by
    its own new ones (a membrane that reads the new current). It is exact for every path
    that stays within a unit: membrane, current, adaptation, gates, reset. What is left
    out is the credit through *other* units, that is, through the recurrent product;
    `graph.report()` lists it.

    **Arguments:**

    - `scope`: what the diagonal $D$ is. Three things go by this name:

        - `"local"` (the default): the recurrent products are cut before the derivative
          is taken, so $D$ is leak, gates and reset. This is the diagonal of D-RTRL and
          of e-prop.
        - `"unit"`: the block of the unit in the whole Jacobian of the step, the weight
          $W_{ii}$ of a unit on itself included. This is SnAp-1 (Menick et al., *A
          practical sparse approximation for real time recurrent learning*, ICLR 2021).
          Where one product lies between the old state and the new, as in an RNN, LSTM
          or LIF layer, it costs as much as `"local"`; otherwise the dense Jacobian is
          formed at every step, and the report says so.
        - the whole Jacobian, nothing cut: exact RTRL, which is no diagonal.

        Neither diagonal is closer to the gradient of backpropagation on every model.

    Memory: batch x weight entries x slots. It needs no hyper-parameter.

    **Source:** Wang et al., *Model-agnostic linear-memory online learning in spiking
    neural networks*, Nature Communications 17, 2026. The idea of keeping a unit's own
    past goes back to Mozer, Complex Systems 3, 1989, and for spiking neurons to Bellec
    et al., Nature Communications 11, 2020 (e-prop).

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.DRTRL())
        ```
    """

    scope: Scope = eqx.field(static=True, default="local")

    def __check_init__(self) -> None:
        if self.scope not in ("local", "unit"):
            raise ValueError(
                f"scope: got {self.scope!r}, expected 'local' or 'unit'. Leave it out "
                "for D-RTRL; 'unit' is SnAp-1."
            )

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
        new: dict[int, Any] = {}
        old = dict(zip(relation.slots, trace, strict=True))
        for slot, dtype in zip(relation.slots, relation.trace_dtypes, strict=True):
            terms = []
            direct = jacobian.direct[slot]
            if direct is not None:
                # Where df is known to be one, XLA would simplify the influence, then
                # compute it again inside every slot that reads this one, and copy the
                # whole old trace to be able to.
                direct = jax.lax.optimization_barrier(cast(direct, dtype))
                influence = relation.op.influence(direct, jacobian.operands)
                # By a real weight, a complex y has a real influence on real slots.
                real = not jnp.issubdtype(dtype, jnp.complexfloating)
                terms.append(influence.real if real else influence.astype(dtype))
            for row, traces in ((jacobian.transition, old), (jacobian.within, new)):
                for source, entries in traces.items():
                    factor = row[slot][source]
                    if factor is not None:
                        factor = relation.expand(cast(factor, dtype))
                        terms.append(product(factor, entries.astype(dtype)))
            zero = jnp.zeros(relation.op.trace_shape, dtype)
            new[slot] = sum(terms[1:], terms[0]) if terms else zero
        return tuple(new.values())

    def gradient(
        self,
        relation: Relation,
        trace: tuple[Shaped[Array, "..."], ...],
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """The sum over slots, units and batch of signal . trace; None is zero."""
        heard = [
            (v.astype(entries.dtype), entries)
            for slot, entries in zip(relation.slots, trace, strict=True)
            if (v := signal[slot]) is not None
        ]
        if not heard:
            return jnp.zeros(relation.op.weight_shape, relation.weight_dtype)
        vectors, traces = zip(*heard, strict=True)
        return relation.op.contract(vectors, traces).astype(relation.weight_dtype)
