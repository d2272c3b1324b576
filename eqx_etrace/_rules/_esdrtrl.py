"""ES-D-RTRL: the trace as a product of a filtered dy/dw and a filtered dh/dy."""

import functools as ft
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._custom_types import Scope
from .._op_rules import cast, product
from .._relation import Relation
from .._signals import Signal, Symmetric
from ._base import LocalRule, RelationJacobian, check_scope, check_signal
from ._window import Window


AT_ONCE = 64
"""Windows of at most so many steps filter by a product; longer ones step by step."""


class FactorisedTrace(NamedTuple):
    """The trace of `ESDRTRL` for one relation.

    - `presynaptic`: dy/dw, filtered; for a product `W @ x` the vector x; where that
      consists of copies, as in a sparse connection, what it is copied from.
    - `postsynaptic`: per slot dh/dy, filtered, of the shape of y; where it is the same
      for all elements of y that feed one unit, a vector over units.
    - `weight`: 1 - decay^t after t steps, which the latter is to be divided by.

    Of relations with the same x, as of those with the same dh/dy, the first keeps what
    they share; the others have None, or the rest where only a part is the same, as for
    the gates of a GRU.
    """

    presynaptic: Shaped[Array, "..."] | None
    postsynaptic: tuple[Shaped[Array, "..."], ...] | None
    weight: Shaped[Array, "*batch"] | None


class ESDRTRL(LocalRule):
    r"""D-RTRL with an exponentially smoothed, factorised trace; also known as pp-prop.

    The trace of a weight is the product of two vectors,

    $$x^t = a_x\,x^{t-1} + \frac{\partial y^t}{\partial w},\qquad
      f^t = a_f\,D^t f^{t-1} + L^t f^t + (1 - a_f)\,\frac{\partial h^t}{\partial y^t},$$

    and the gradient of a step is $l \cdot f^t \otimes x^t / (1 - a_f^t)$: the last
    factor makes up for the start from zero, counted in steps since then. D and L are
    those of `DRTRL`.

    **Arguments:**

    - `decay`: the smoothing factor a, at least 0 and below 1; a pair
      $(a_x, a_f)$; or an integer k of at least 1 for $a = (k - 1) / (k + 1)$. With 0
      the gradient is that of the current step alone.
    - `scope`, `signal`: as for `DRTRL`.

    Memory: batch x (inputs + outputs x slots) of each weight, as for activations; of a
    sparse connection, whether its synapses are rows of indices or a list of edges,
    batch x (units that send + units that receive x slots). It is an approximation on
    every model with a memory; for one elementwise weight per unit it saves nothing.

    **Source:** Wang et al., *Model-agnostic linear-memory online learning in spiking
    neural networks*, Nature Communications 17, 2026.

    !!! example

        ```python
        rule = eqx_etrace.ESDRTRL(decay=0.9)
        graph = eqx_etrace.compile(net, state, x, rule=rule)
        ```
    """

    windowed: ClassVar[bool] = True
    factorised: ClassVar[bool] = True

    decay: float | int | tuple[float, float] = eqx.field(static=True)
    scope: Scope = eqx.field(static=True)
    signal: Signal  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        decay: float | int | tuple[float, float],
        scope: Scope = "local",
        signal: Signal | None = None,
    ):
        self.decay, self.scope = decay, scope
        self.signal = Symmetric() if signal is None else signal

    def __check_init__(self) -> None:
        check_scope(self.scope)
        check_signal(self.signal)
        if isinstance(self.decay, int) and not isinstance(self.decay, bool):
            legal = self.decay == 0 or self.decay >= 1
        else:
            pair = self.decay if isinstance(self.decay, tuple) else (self.decay,) * 2
            legal = len(pair) == 2 and all(
                isinstance(a, float | int) and not isinstance(a, bool) and 0 <= a < 1
                for a in pair
            )
        if not legal:
            raise ValueError(
                f"decay: got {self.decay!r}, expected a number of at least 0 and below "
                "1, a pair of them, or an integer rank of at least 1. Try 0.9."
            )

    @property
    def decays(self) -> tuple[float, float]:
        """(a_x, a_f)."""
        if isinstance(self.decay, tuple):
            return float(self.decay[0]), float(self.decay[1])
        decay = self.decay
        if isinstance(decay, int) and decay:
            decay = (decay - 1) / (decay + 1)
        return float(decay), float(decay)

    def init(self, relation: Relation) -> FactorisedTrace:
        """Zeros: one presynaptic array, and one of the shape of y per slot."""
        shape = relation.derivative_shape or relation.op.trace_shape
        if relation.presynaptic is not None:
            shape = relation.presynaptic.shape
        dtype = self._dtype(relation, relation.trace_dtypes[0])
        slots = (self._dtype(relation, d) for d in relation.trace_dtypes)
        post = tuple(jnp.zeros(relation.drive_shape, d) for d in slots)
        weight = jnp.zeros((), jnp.finfo(dtype).dtype)
        return FactorisedTrace(jnp.zeros(shape, dtype), post, weight)

    def _dtype(self, relation: Relation, dtype: Any) -> Any:
        real = not jnp.issubdtype(relation.y_dtype, jnp.complexfloating)
        return cast(jnp.zeros((), dtype if real else relation.y_dtype), dtype).dtype

    def kept(self, relation: Relation, trace: FactorisedTrace) -> FactorisedTrace:
        """Without the factors that an earlier relation keeps."""
        if relation.same_x is not None:
            trace = trace._replace(presynaptic=None)
        pieces = relation.pieces
        if relation.same_df is not None or pieces is not None:
            own = None
            if pieces is not None and pieces.own is not None:
                own = tuple(map(pieces.of_own, trace.postsynaptic or ()))
            trace = trace._replace(postsynaptic=own, weight=None)
        return trace

    def joined(
        self, relation: Relation, trace: FactorisedTrace, earlier: Sequence[Any]
    ) -> FactorisedTrace:
        """With them."""
        if relation.same_x is not None:
            pre = earlier[relation.same_x].presynaptic
            trace = trace._replace(presynaptic=pre)
        if relation.same_df is not None:
            _, post, weight = earlier[relation.same_df]
            trace = trace._replace(postsynaptic=post, weight=weight)
        if relation.pieces is not None:
            weight = earlier[relation.pieces.runs[0][2]].weight
            own = trace.postsynaptic or (None,) * len(relation.slots)
            post = relation.pieces.joined_slots(own, lambda n: earlier[n].postsynaptic)
            trace = trace._replace(postsynaptic=post, weight=weight)
        return trace

    def update(
        self, relation: Relation, trace: FactorisedTrace, jacobian: RelationJacobian
    ) -> FactorisedTrace:
        """One step of both filters, for one sample."""
        pre = self._filtered(relation, trace.presynaptic, jacobian)
        post, weight = self._driven(relation, trace[1:], jacobian)
        return FactorisedTrace(pre, post, weight)

    def _filtered(
        self, relation: Relation, pre: Any, jacobian: RelationJacobian
    ) -> Any:
        """One step of the presynaptic filter."""
        found = self._derivative(relation, jacobian.operands)
        return self.decays[0] * pre + cast(found, pre.dtype)

    def _derivative(self, relation: Relation, operands: Sequence[Any]) -> Any:
        """dy/dw, or what the x of it is copied from."""
        if relation.presynaptic is not None:
            return operands[-1]
        return relation.derivative(tuple(operands))

    def _driven(
        self, relation: Relation, trace: Any, jacobian: RelationJacobian
    ) -> Any:
        """One step of the postsynaptic filters and of their weight."""
        a_f, (entries, weight) = self.decays[1], trace
        old = dict(zip(relation.slots, entries, strict=True))
        new: dict[int, Any] = {}
        spread = relation.spread
        for slot, entry in old.items():
            total = jnp.zeros_like(entry)
            direct = jacobian.direct[slot]
            if direct is not None:
                total = total + (1 - a_f) * cast(direct, entry.dtype)
            for row, rest, scale in (
                (jacobian.transition[slot], old, a_f),
                (jacobian.within[slot], new, 1.0),
            ):
                for source, other in rest.items():
                    if row[source] is not None:
                        factor = scale * spread(cast(row[source], entry.dtype))
                        total = total + product(factor, other.astype(entry.dtype))
            new[slot] = total
        return tuple(new.values()), a_f * weight + (1 - a_f)

    def gradient(
        self,
        relation: Relation,
        trace: FactorisedTrace,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."]:
        """The sum over slots, units and batch of signal . post . pre."""
        heard = self._heard(relation, trace[1:], signal)
        return self._product(relation, heard, trace.presynaptic)

    def _heard(
        self,
        relation: Relation,
        trace: Any,
        signal: Sequence[Shaped[Array, "..."] | None],
    ) -> Shaped[Array, "..."] | None:
        """signal . post, of the shape of df, made up for the start."""
        (entries, weight), total = trace, None
        for slot, entry in zip(relation.slots, entries, strict=True):
            heard = signal[slot]
            if heard is not None:
                more = product(relation.spread(cast(heard, entry.dtype)), entry)
                total = more if total is None else total + more
        if total is None:
            return None
        weight = jnp.where(weight > 0, weight, 1).astype(weight.dtype)
        weight = weight.reshape(weight.shape + (1,) * len(relation.drive_shape))
        return total / weight.astype(total.dtype)

    def _product(
        self, relation: Relation, heard: Any | None, presynaptic: Any
    ) -> Shaped[Array, "..."]:
        """The sum over the axes in front of heard . pre."""
        if heard is None:
            return jnp.zeros(relation.op.weight_shape, relation.weight_dtype)
        found = relation.contract_factors(heard, presynaptic)
        if not jnp.issubdtype(relation.weight_dtype, jnp.complexfloating):
            found = found.real
        return found.astype(relation.weight_dtype)

    def window(
        self, window: Window, trace: FactorisedTrace | None
    ) -> tuple[Shaped[Array, "..."] | None, FactorisedTrace]:
        """The filters step by step, then one product over time and batch."""
        relation, group = window.relation, window.group
        zero = window.per_sample_of(self.init(relation))
        old, total = zero if trace is None else trace, group.total

        def filtered(pre: Any, parts: Any) -> tuple[Any, Any]:
            new = self._filtered(relation, pre, window.step(parts))
            return new, None if total is None else new

        def every_filtered() -> tuple[Any, Any]:
            if window.reset is None and window.group.steps <= AT_ONCE:
                return self._filtered_at_once(window, old[0])
            return _scanned(window, filtered, zero[0], old[0], window.parts)

        first = window.number if relation.same_x is None else relation.same_x
        pre, every = group.once((self, "x", first), every_filtered)
        first = window.number if relation.same_df is None else relation.same_df
        (post, weight), heard = group.once(
            (self, "df", first), lambda: self._df(window, zero[1:], old[1:], total)
        )
        new, gradient = FactorisedTrace(pre, post, weight), None
        if group.edge is not None and trace is not None:
            gradient = self.gradient(relation, trace, group.edge)
        if total is not None:
            found = jax.tree.map(window.merged, (heard, every))
            gradient = self._product(relation, *found)
        return gradient, new

    def _df(self, window: Window, zero: Any, old: Any, total: Any) -> tuple[Any, Any]:
        """The postsynaptic filters and their weight, and what they hear."""
        relation, pieces = window.relation, window.relation.pieces
        if pieces is None:

            def driven(post: Any, parts: Any, saved: Any) -> tuple[Any, Any]:
                jacobian = window.at(saved)
                new = self._driven(relation, post, jacobian)
                if parts is None:
                    return new, None
                signal = window.group.signal_of(parts, jacobian.within)
                return new, self._heard(relation, new, signal)

            return _scanned(window, driven, zero, old, total, window.group.saved_at)

        def earlier(number: int) -> Any:
            return window.group.once((self, "df", number), _not_there)

        own = [None] * len(relation.slots), None
        if pieces.own is not None:
            zero, old = ((tuple(map(pieces.of_own, v)), w) for v, w in (zero, old))
            (post, _), heard = self._df(window.of_own(), zero, old, total)
            own = post, heard
        post = pieces.joined_slots(own[0], lambda n: earlier(n)[0][0])
        (_, weight), heard = earlier(pieces.runs[0][2])
        if heard is not None:
            heard = pieces.joined(own[1], lambda n: earlier(n)[1])
        return (post, weight), heard

    def _filtered_at_once(self, window: Window, old: Any) -> tuple[Any, Any]:
        """The presynaptic filter as a product with the powers of its decay."""
        relation, steps = window.relation, window.group.steps
        moving = window.moving(window.jacobian.operands)

        def derivative(moving: Any) -> Any:
            found = self._derivative(relation, window.operands(moving))
            return cast(found, old.dtype)

        age = np.arange(steps)
        powers = jnp.asarray(self.decays[0] ** (age + 1.0), old.dtype)
        powers = powers.reshape(-1, *(1 for _ in old.shape))
        if not any(map(operator.and_, relation.read, window.stacked)):
            found = jnp.asarray(np.cumsum(self.decays[0] ** age), old.dtype)
            first = [operand[(0,) * window.lead] for operand in moving]
            found = found.reshape(powers.shape) * derivative(first)
        else:
            mixing = np.tril(self.decays[0] ** np.maximum(age[:, None] - age, 0))
            for _ in range(window.lead):
                derivative = jax.vmap(derivative)
            found = derivative(moving)
            found = jnp.tensordot(jnp.asarray(mixing, old.dtype), found, 1)
        every = powers * old + found
        return every[-1], every


def _not_there() -> Any:
    raise AssertionError("a window asked for an earlier relation that was not run")


def _scanned(
    window: Window,
    fun: Callable[..., Any],
    zero: Any,
    old: Any,
    parts: Any,
    *at: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """`fun(trace, parts) -> (trace, found)` of a sample, over all steps; the rest of
    what it is given by functions of the number of the step."""

    def advance(trace: Any, step: Any) -> tuple[Any, Any]:
        parts, reset, number = step
        if reset is not None:
            trace = jax.tree.map(ft.partial(_renew, reset), zero, trace)
        more = [given(number) for given in at]
        return window.per_sample(fun, 0)(trace, parts, *more)

    steps = parts, window.reset, jnp.arange(window.group.steps)
    return jax.lax.scan(advance, old, steps)


def _renew(where: Any, new: Any, old: Any) -> Any:
    mask = where.reshape(where.shape + (1,) * (old.ndim - where.ndim))
    return jnp.where(mask, new, old)
