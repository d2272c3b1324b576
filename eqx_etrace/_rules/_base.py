"""The interface of local rules: relation by relation, no product of groups."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
from jaxtyping import Array, PyTree, Shaped

from .._custom_types import Scope
from .._decision import Decision
from .._relation import Relation
from .._signals import Signal, Symmetric
from ._weights import Weights


if TYPE_CHECKING:
    from ._window import Window


@dataclasses.dataclass(frozen=True)
class RelationJacobian:
    """The derivatives of the local program that concern one relation, of one sample.

    They are direct derivatives of the new slot s': by the old slots, by the other new
    slots of the same step, and by y, the rest held fixed. None where structurally zero.

    **Attributes:**

    - `transition`: D, `transition[s'][s]` a vector over units, by the old slot s.
    - `within`: L, `within[s'][s]` a vector over units, by the *new* slot s.
    - `direct`: df, `direct[s']` of the shape of y.
    - `operands`: the values of the operands of the use, the weight among them; then,
      for a rule that is `factorised`, where x is copied from one, that value.
    - `gain`: for a rule that `filters`, per exit of the group and slot the derivative
      of the exit, a vector over units; None for an exit that is not of this group.
    - `slope`: for a rule with an `average`, per exit of the group its derivative by y,
      of the shape of y, where this is the last y on the way to the unit.
    """

    transition: Sequence[Sequence[Shaped[Array, "..."] | None]]
    within: Sequence[Sequence[Shaped[Array, "..."] | None]]
    direct: Sequence[Shaped[Array, "..."] | None]
    operands: tuple[Any, ...]
    gain: Sequence[Sequence[Shaped[Array, "..."]] | None] = ()
    slope: Sequence[Shaped[Array, "..."]] = ()


def with_operands(
    entries: Any, operands: tuple[Any, ...], gain: Any = ()
) -> RelationJacobian:
    """A Jacobian from its (transition, within, direct), the operands and the gain."""
    transition, within, direct = entries
    return RelationJacobian(transition, within, direct, operands, gain)


def check_scope(scope: Any) -> None:
    """Raise `ValueError` unless it is one of those there are."""
    if scope not in ("local", "unit"):
        raise ValueError(
            f"scope: got {scope!r}, expected 'local' or 'unit'. Leave it out "
            "for D-RTRL; 'unit' is SnAp-1."
        )


def check_signal(signal: Any) -> None:
    """Raise `TypeError` unless it is a learning signal."""
    if not isinstance(signal, Signal):
        raise TypeError(
            f"signal: got {signal!r}, expected a learning signal such as "
            "RandomFeedback(key). Pass an instance, not the class."
        )


class LocalRule(eqx.Module):
    """A learning rule that works relation by relation.

    The step calls `init` once, `update` once per step and sample, and `gradient` once
    per gradient with all samples of a batch. `scope` says how much of a recurrent
    product the transition keeps: nothing (`"local"`) or what stays within a unit.

    For a rule of your own these three methods are enough: windows, batches, drivers,
    learning signals and the report work with it. A trace is any pytree of arrays.

    !!! example

        A trace that leaks, as that of RFLO does:

        ```python
        class Leaky(eqx_etrace.LocalRule):
            decay: float = eqx.field(static=True, default=0.9)
            scope: str = eqx.field(static=True, default="local")

            def init(self, relation):
                shape, dtypes = relation.trace_shape, relation.trace_dtypes
                return tuple(jnp.zeros(shape, dtype) for dtype in dtypes)

            def update(self, relation, trace, jacobian):
                new = []
                for slot, old in zip(relation.slots, trace):
                    direct = jacobian.direct[slot]  # dh'/dy, shaped like y
                    if direct is None:
                        new.append(self.decay * old)
                    else:
                        now = relation.op.influence(direct, jacobian.operands)
                        new.append(self.decay * old + now)
                return tuple(new)

            def gradient(self, relation, trace, signal):
                heard = [
                    (relation.map.spread(signal[slot]), entry)
                    for slot, entry in zip(relation.slots, trace)
                    if signal[slot] is not None
                ]
                vectors, traces = zip(*heard)
                return relation.op.contract(vectors, traces)

        graph = eqx_etrace.compile(net, state, x, rule=Leaky())
        fun = jax.jit(eqx_etrace.value_and_grad(graph, loss_fn))
        losses, grads, *_ = fun(params, state, None, xs, targets)
        ```
    """

    scope: eqx.AbstractVar[Scope]
    windowed: ClassVar[bool] = False
    """Whether the rule has `window`; without, steps are taken one by one."""
    factorised: ClassVar[bool] = False
    """Whether the rule filters dy/dw and dh/dy apart from each other."""
    filters: ClassVar[bool] = False
    """Whether the rule has `gradient_at_exits`, for signals that come in there."""

    detach: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs (from, to) of state leaves: entries of D to leave out."""

    signal: ClassVar[Signal] = Symmetric()
    """Where the learning signal comes from; a field in rules that let one choose."""

    def with_signal(self, signal: Signal) -> "LocalRule":
        """The same rule with another signal."""
        return dataclasses.replace(self, signal=signal)

    @property
    def by_adjoint(self) -> bool:
        """Whether the rule has `from_adjoint`."""
        return False

    @property
    def leak(self) -> float | None:
        """A number in place of D, None to take D as it is.

        The trace of every slot then decays by it at each step, and slots act on each
        other within a step alone. 0 leaves no past at all."""
        return None

    def of(self, relation: Relation) -> "LocalRule":
        """The rule of one relation: this one, unless it is made of several."""
        del relation
        return self

    def bound(self, weights: Weights) -> tuple["LocalRule", tuple[Decision, ...]]:
        """The rule for these weights, and what it decided; itself, if that is enough.
        The compiler calls it once."""
        del weights
        return self, ()

    @abstractmethod
    def init(self, relation: Relation) -> PyTree:
        """The zero trace of one sample."""

    @abstractmethod
    def update(
        self, relation: Relation, trace: PyTree, jacobian: RelationJacobian
    ) -> PyTree:
        """The trace after one more step of one sample."""

    def update_all(
        self,
        relation: Relation,
        trace: PyTree,
        jacobian: RelationJacobian,
        stacked: Sequence[bool],
        batch: int | None,
    ) -> PyTree:
        """`update` of all samples, the batch in front of trace and Jacobian, and of
        the operands that are `stacked`."""

        def one(trace: Any, entries: Any, operands: Any) -> PyTree:
            return self.update(relation, trace, with_operands(entries, operands))

        entries = jacobian.transition, jacobian.within, jacobian.direct
        if batch is not None:
            axes = tuple(0 if moves else None for moves in stacked)
            one = jax.vmap(one, in_axes=(0, 0, axes))
        return one(trace, entries, jacobian.operands)

    @abstractmethod
    def gradient(
        self,
        relation: Relation,
        trace: PyTree,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """The weight's gradient: the signal, per slot a vector over units, times the
        trace.

        A batch is a leading axis of both, and is summed. `signal[s]` is None where it
        is known to be zero.
        """

    def window(
        self, window: "Window", trace: PyTree
    ) -> tuple[Shaped[Array, "..."] | None, PyTree]:
        """The gradient and the trace of many steps at once, batch and all.

        Equal to `update` and `gradient` step by step. `trace` is None for the zero
        trace. The gradient is None where the window has no signal; where
        `window.group.edge` is given, it is that of `trace` for this signal.
        """
        raise NotImplementedError

    def gradient_at_exits(
        self,
        relation: Relation,
        trace: PyTree,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """The weight's gradient for signals at its units' exits; see `filters`."""
        raise NotImplementedError

    def from_adjoint(self, window: "Window") -> Shaped[Array, "..."] | None:
        """The gradient of a window that starts from a zero trace, by what `adjoint`
        of its group says and without a trace; see `by_adjoint`."""
        raise NotImplementedError

    def kept(self, relation: Relation, trace: PyTree) -> PyTree:
        """A trace without what other relations keep for it, see `Relation.same_x`
        and `same_df`."""
        del relation
        return trace

    def joined(
        self, relation: Relation, trace: PyTree, earlier: Sequence[PyTree]
    ) -> PyTree:
        """A trace with what it shares with those of earlier relations, which are whole:
        the inverse of `kept`."""
        del relation, earlier
        return trace

    def whole(self, relations: Sequence[Relation], traces: Sequence[PyTree]) -> PyTree:
        """All traces with what they share."""
        found: list[PyTree] = []
        for relation, trace in zip(relations, traces, strict=True):
            found.append(self.joined(relation, trace, found))
        return tuple(found)

    def trace_bytes(self, relation: Relation) -> int:
        """Bytes of the trace of one sample."""
        kept = jax.eval_shape(lambda: self.kept(relation, self.init(relation)))
        leaves = jax.tree.leaves(kept)
        sizes = (leaf.size * leaf.dtype.itemsize for leaf in leaves)
        return int(sum(sizes))
