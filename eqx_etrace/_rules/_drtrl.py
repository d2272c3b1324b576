"""D-RTRL: an exact eligibility trace per weight entry, diagonal over units."""

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from .._custom_types import Scope
from .._op_rules import cast, product
from .._relation import Relation
from .._signals import Signal, Symmetric
from ._base import (
    LocalRule,
    RelationJacobian,
    check_scope,
    check_signal,
    with_operands,
)
from ._fused import advance, through
from ._in_place import at, over_samples
from ._window import Window


class Factors(NamedTuple):
    """The trace of a slot without a past: direct . dy/dw, and multiples of others."""

    direct: Shaped[Array, "..."]
    others: tuple[Shaped[Array, " units"], ...]
    derivative: Shaped[Array, "..."]


Entry: TypeAlias = Any
"""An array, or the `Factors` of one."""


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

    - `recursion`: `"jacobian"`, the default, takes the diagonal as it is. A number from
      0 to 1 stands in for it: all traces of a unit decay by that number at each step,
      as in RFLO, whatever the unit does. With 0 there is no past, see
      `eqx_etrace.Immediate`.
    - `trace_dtype`: the dtype in which large traces are kept between steps, such as
      `jnp.bfloat16` for half the memory and a rounding error of 0.4 % a step. None,
      the default, is that of the state.
    - `signal`: where the learning signal comes from, a `eqx_etrace.Signal`. The
      default is the derivative of the loss.
    - `detach`: pairs (from, to) of key paths of the state, such as
      `("state.z", "state.v")`: the old value of the one is taken out of the derivative
      of the new value of the other, within a unit. For published rules that leave out
      the path through the reset, or through the adaptation.

    Memory: batch x weight entries x slots, less where a trace is the same for all
    units or has no past; `graph.report()` shows which. It needs no hyper-parameter.

    **Source:** Wang et al., *Model-agnostic linear-memory online learning in spiking
    neural networks*, Nature Communications 17, 2026. The idea of keeping a unit's own
    past goes back to Mozer, Complex Systems 3, 1989, and for spiking neurons to Bellec
    et al., Nature Communications 11, 2020 (e-prop).

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.DRTRL())
        ```
    """

    windowed: ClassVar[bool] = True

    scope: Scope = eqx.field(static=True)
    trace_dtype: Any = eqx.field(static=True)
    recursion: Literal["jacobian"] | float = eqx.field(static=True)
    signal: Signal  # pyright: ignore[reportIncompatibleVariableOverride]
    detach: tuple[tuple[str, str], ...] = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        scope: Scope = "local",
        recursion: Literal["jacobian"] | float = "jacobian",
        trace_dtype: Any = None,
        signal: Signal | None = None,
        detach: tuple[tuple[str, str], ...] = (),
    ):
        self.scope, self.recursion, self.trace_dtype = scope, recursion, trace_dtype
        self.signal = Symmetric() if signal is None else signal
        self.detach = detach

    def __check_init__(self) -> None:
        pairs = isinstance(self.detach, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in self.detach
        )
        if not pairs:
            raise ValueError(
                f"detach: got {self.detach!r}, expected pairs of key paths (from, to). "
                "Copy the paths from `graph.report()`."
            )
        check_scope(self.scope)
        check_signal(self.signal)
        number = isinstance(self.recursion, float | int) and 0 <= self.recursion <= 1
        if self.recursion != "jacobian" and not number:
            raise ValueError(
                f"recursion: got {self.recursion!r}, expected 'jacobian' or a number "
                "from 0 to 1. Leave it out for D-RTRL."
            )
        if self.leak is not None and self.scope != "local":
            raise ValueError(
                f"scope: got {self.scope!r} beside recursion={self.recursion!r}, "
                "expected 'local': a number has no diagonal to choose. Leave one out."
            )
        floating = self.trace_dtype is None or jnp.issubdtype(
            self.trace_dtype, jnp.floating
        )
        if not floating:
            raise ValueError(
                f"trace_dtype: got {self.trace_dtype!r}, expected a real "
                "floating-point dtype or None. Try jnp.bfloat16."
            )

    @property
    def by_adjoint(self) -> bool:
        """It has."""
        return True

    @property
    def leak(self) -> float | None:
        """The recursion, if it is a number."""
        return None if self.recursion == "jacobian" else float(self.recursion)

    def stored(self, dtype: Any) -> Any:
        """The dtype in which an array of this dtype is kept."""
        real = not jnp.issubdtype(dtype, jnp.complexfloating)
        return self.trace_dtype if self.trace_dtype is not None and real else dtype

    def init(self, relation: Relation) -> tuple[Entry, ...]:
        """Zeros in the layout of the relation, one entry per slot."""
        return tuple(
            self._zero(relation, slot, dtype, links)
            for slot, dtype, links in zip(
                relation.slots, relation.trace_dtypes, relation.links, strict=True
            )
        )

    def _zero(self, relation: Relation, slot: int, dtype: Any, links: Any) -> Entry:
        if links is None:
            return jnp.zeros(relation.array_shape(slot), self.stored(dtype))
        unit = jnp.zeros(relation.map.units, dtype)
        derivative = jnp.zeros(relation.derivative_shape or (), dtype)
        others = tuple(unit for _ in links)
        return Factors(jnp.zeros(relation.y_shape, dtype), others, derivative)

    def update(
        self, relation: Relation, trace: tuple[Entry, ...], jacobian: RelationJacobian
    ) -> tuple[Entry, ...]:
        """One step of the recursion above, for one sample."""
        old, new = dict(zip(relation.slots, trace, strict=True)), {}
        within = _Within(relation, jacobian)
        for slot, dtype in zip(relation.slots, relation.trace_dtypes, strict=True):
            direct, factors = within.total(slot)
            if slot in within.passing:
                derivative = relation.op.derivative(jacobian.operands)
                new[slot] = within.factors(slot, cast(derivative, dtype), dtype)
                continue
            terms = []
            if direct is not None:
                # Where df is known to be one, XLA would simplify the influence, then
                # compute it again inside every slot that reads this one, and copy the
                # whole old trace to be able to.
                direct = jax.lax.optimization_barrier(cast(direct, dtype))
                influence = relation.op.influence(direct, jacobian.operands)
                # By a real weight, a complex y has a real influence on real slots.
                real = not jnp.issubdtype(dtype, jnp.complexfloating)
                terms.append(influence.real if real else influence.astype(dtype))
            for row, traces in ((jacobian.transition[slot], old), (factors, new)):
                for source, entries in traces.items():
                    factor = row[source]
                    if factor is not None:
                        factor = relation.expand(cast(factor, dtype))
                        terms.append(product(factor, entries.astype(dtype)))
            shape = relation.array_shape(slot)
            total = sum(terms[1:], terms[0]) if terms else jnp.zeros(shape, dtype)
            new[slot] = jnp.broadcast_to(total, shape)
        stored = map(self.stored, relation.trace_dtypes)
        return tuple(
            entry if isinstance(entry, Factors) else entry.astype(kept)
            for entry, kept in zip(new.values(), stored, strict=True)
        )

    def update_all(
        self,
        relation: Relation,
        trace: tuple[Entry, ...],
        jacobian: RelationJacobian,
        stacked: Sequence[bool],
        batch: int | None,
    ) -> tuple[Entry, ...]:
        """As above. Where large traces act on each other, one sample at a time."""
        at_once = functools.partial(super().update_all, relation)
        large = [
            slot
            for slot, links in zip(relation.slots, relation.links, strict=True)
            if links is None and relation.array_shape(slot) == relation.trace_shape
        ]
        if batch is None or len(large) < 2 or not _is_large(relation):
            return at_once(trace, jacobian, stacked, batch)
        entries = jacobian.transition, jacobian.within, jacobian.direct

        def in_place(trace: Any, entries: Any, operands: Any) -> tuple[Entry, ...]:
            old = dict(zip(relation.slots, trace, strict=True))
            rest = {slot: entry for slot, entry in old.items() if slot not in large}

            def one(b: Any, mine: Any) -> tuple[None, Any]:
                small, parts = jax.tree.map(lambda a: at(a, b), (rest, entries))
                pairs = zip(operands, stacked, strict=True)
                args = tuple(at(a, b) if moves else a for a, moves in pairs)
                now = small | mine
                moved = self.update(
                    relation,
                    tuple(now[slot] for slot in relation.slots),
                    with_operands(parts, args),
                )
                found = dict(zip(relation.slots, moved, strict=True))
                return None, {slot: found[slot] for slot in large}

            traces = {slot: old[slot] for slot in large}
            done, _ = over_samples(batch, traces, None, one)
            others = at_once(trace, with_operands(entries, operands), stacked, batch)
            found = dict(zip(relation.slots, others, strict=True)) | done
            return tuple(found.values())

        def together(trace: Any, entries: Any, operands: Any) -> tuple[Entry, ...]:
            whole = with_operands(entries, operands)
            return at_once(trace, whole, stacked, batch)

        return jax.lax.platform_dependent(
            trace, entries, jacobian.operands, cpu=in_place, default=together
        )

    def gradient(
        self,
        relation: Relation,
        trace: tuple[Entry, ...],
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """The sum over slots, units and batch of signal . trace; None is zero."""
        signal, vectors, traces = _resolved(relation, trace, signal)
        for slot, links, entry in zip(
            relation.slots, relation.links, trace, strict=True
        ):
            heard = signal[slot]
            if links is None and heard is not None:
                vectors.append(relation.map.spread(heard))
                traces.append(entry)
        if not vectors:
            return jnp.zeros(relation.op.weight_shape, relation.weight_dtype)
        return relation.op.contract(vectors, traces).astype(relation.weight_dtype)

    def heard(
        self,
        relation: Relation,
        trace: tuple[Entry, ...],
        row: Sequence[Shaped[Array, " units"]],
        operands: tuple[Any, ...],
    ) -> Shaped[Array, "..."]:
        """The sum over slots of row . trace for one sample, unit by unit; an array of
        the shape of a trace. `operands` are those of the step that made the trace."""
        signal, vectors, _ = _resolved(relation, trace, row)
        terms = [relation.op.influence(vector, operands) for vector in vectors]
        for slot, links, entry in zip(
            relation.slots, relation.links, trace, strict=True
        ):
            if links is None:
                factor = relation.expand(cast(signal[slot], entry.dtype))
                terms.append(product(factor, entry))
        total = sum(terms[1:], terms[0])
        return jnp.broadcast_to(total, relation.trace_shape)

    def window(
        self, window: Window, trace: tuple[Entry, ...] | None
    ) -> tuple[Shaped[Array, "..."] | None, tuple[Entry, ...]]:
        """Many steps with a few large products, and the trace touched once."""
        relation, gradient, edge = window.relation, None, None
        if window.group.total is not None:
            gradient, edge = self.from_adjoint(window), window.group.adjoint[1]
        elif window.group.edge is not None and trace is not None:
            edge, *rest = _resolved(relation, trace, window.group.edge)
            if rest[0]:
                gradient = relation.op.contract(*rest).astype(relation.weight_dtype)
        moved, found = advance(window, trace, edge)
        if found is not None:
            found = found.astype(relation.weight_dtype)
            gradient = found if gradient is None else gradient + found
        last = window.last()
        within, new = _Within(relation, last), []
        for slot, dtype in zip(relation.slots, relation.trace_dtypes, strict=True):
            within.total(slot)
            if slot in moved:
                new.append(moved[slot].astype(self.stored(dtype)))
                continue
            derivative = window.derivative(last.operands)
            new.append(within.factors(slot, cast(derivative, dtype), dtype))
        shapes = window.per_sample_of(self.init(relation))
        new = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), new, [*shapes])
        return gradient, tuple(new)

    def from_adjoint(self, window: Window) -> Shaped[Array, "..."]:
        """The adjoint of every step times df times dy/dw, as one product."""
        q = through(window, window.group.adjoint[0])
        assert q is not None  # Else the relation would have no slot.
        return window.pullback(q)


def _resolved(
    relation: Relation, trace: Sequence[Entry], signal: Sequence[Any | None]
) -> tuple[list[Any], list[Any], list[Any]]:
    """A signal that counts for traces that are arrays what the others are multiples of,
    and what is left of these: vectors, and the dy/dw that each multiplies."""
    signal, vectors, derivatives = list(signal), [], []
    entries = list(zip(relation.slots, relation.links, trace, strict=True))
    for slot, links, entry in reversed(entries):
        heard = signal[slot]
        if heard is None or links is None:
            continue
        for source, factor in zip(links, entry.others, strict=True):
            more = heard.astype(factor.dtype) * factor
            signal[source] = _add(signal[source], more)
        spread = relation.map.spread(heard.astype(entry.direct.dtype))
        vectors.append(spread * entry.direct)
        derivatives.append(entry.derivative)
    return signal, vectors, derivatives


def _is_large(relation: Relation) -> bool:
    return math.prod(relation.trace_shape) > 1 << 14


class _Within:
    """The paths of one step into each slot, those through passing slots resolved.

    A passing slot is one whose trace is no array, see `Relation.links`.
    """

    def __init__(self, relation: Relation, jacobian: RelationJacobian):
        self.relation, self.jacobian = relation, jacobian
        self.passing: dict[int, tuple[Any, dict[int, Any]]] = {}

    def total(self, slot: int) -> tuple[Any, Any]:
        """df, and per slot whose trace is an array the factor of its new trace."""
        spread = self.relation.map.spread
        direct, factors = self.jacobian.direct[slot], {}
        for source in self.relation.slots:
            factor = self.jacobian.within[slot][source]
            if factor is None:
                continue
            if source not in self.passing:
                factors[source] = _add(factors.get(source), factor)
                continue
            passed, others = self.passing[source]
            if passed is not None:
                direct = _add(direct, spread(factor).astype(passed.dtype) * passed)
            for other, value in others.items():
                more = factor.astype(value.dtype) * value
                factors[other] = _add(factors.get(other), more)
        if self.relation.links[self.relation.slots.index(slot)] is not None:
            self.passing[slot] = direct, factors
        return direct, collections.defaultdict(lambda: None, factors)

    def factors(self, slot: int, derivative: Any, dtype: Any) -> "Factors":
        direct, others = self.passing[slot]
        links = self.relation.links[self.relation.slots.index(slot)] or ()
        zero = jnp.zeros(self.relation.map.units, dtype)
        if direct is None:
            direct = jnp.zeros(self.relation.y_shape, dtype)
        found = (cast(others.get(link, zero), dtype) for link in links)
        return Factors(cast(direct, dtype), tuple(found), derivative)


def _add(total: Any, more: Any) -> Any:
    return more if total is None else total + more.astype(total.dtype)
