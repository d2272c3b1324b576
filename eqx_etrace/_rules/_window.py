"""What a learning rule is told about a window of steps.

Axes: time in front, then the batch if there is one, then units or elements of y.
"""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from .._group import HiddenGroup
from .._op_rules import sum_of_first
from .._relation import Relation
from .._same_step import partial_signal
from ._base import RelationJacobian


Rows = Sequence[Sequence[Any | None]]


class GroupWindow:
    """D and L of one hidden group over a window, and dL/dh; lives for one trace.

    With the direct derivatives D and L of every step and the learning signal l_t, the
    derivative of the whole window's loss by the new state of step t, within units, is

        mu_t = (1 - L_t)^-T (l_t + D_{t+1}^T mu_{t+1}),

    and what a trace of step t has become at the end is multiplied by

        Psi_t (1 - L_t)^-1,   Psi_{t-1} = Psi_t (1 - L_t)^-1 D_t,   Psi_K = 1.
    """

    def __init__(
        self,
        group: HiddenGroup,
        transition: Rows,
        within: Rows,
        total: Sequence[Shaped[Array, "..."]] | None,
        alive: Bool[Array, "..."] | None,
        batch: int | None,
        steps: int,
        rows: Sequence[int],
        saved_at: Callable[[Any], Any],
        later: Sequence[Shaped[Array, "..."]] | None = None,
        edge: Sequence[Shaped[Array, "..."]] | None = None,
    ):
        self.group, self.within, self.total = group, within, total
        self._found: dict[Any, Any] = {}
        self.later = later  # What comes back from the window after this one.
        self.edge = edge  # The derivative by the old state, where that is known.
        self.saved_at = saved_at  # What was saved of a step, the batch in front.
        self.batch, self.steps, self.rows = batch, steps, rows
        if alive is not None:  # What a lane forgets at a reset, it forgets altogether.
            transition = [
                [
                    None if d is None else jnp.where(alive[..., None], d, _zero(d))
                    for d in row
                ]
                for row in transition
            ]
        self.transition = transition

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all relations that ask by this name."""
        if name not in self._found:
            self._found[name] = make()
        return self._found[name]

    @ft.cached_property
    def signal(self) -> list[Any]:
        """The learning signal of every step, per slot; None where it is zero since
        nothing but the unit's own new state reads the slot."""
        assert self.total is not None
        return self.signal_of(self.total, self.within)

    def signal_of(self, total: Sequence[Any], within: Rows) -> list[Any]:
        """The learning signal from the derivative by the new state and L."""
        pairs = zip(partial_signal(total, within), self.group.silent, strict=True)
        return [None if silent else signal for signal, silent in pairs]

    @ft.cached_property
    def adjoint(self) -> tuple[list[Any], list[Any | None]]:
        """mu of every step, and D_1^T mu_1, the derivative by the old state; None in
        the latter where no later slot reads one."""
        assert self.total is not None
        slots = range(self.group.slots)
        read = [s for s in slots if any(row[s] is not None for row in self.transition)]
        if not read:
            return self._through(self.signal, self.within), [None for _ in slots]

        def back(later: dict[int, Any], step: Any) -> tuple[dict[int, Any], list[Any]]:
            signal, moving = step
            transition, within = self._rows(moving)
            heard = [
                _add(v, later[s]) if s in later else v for s, v in enumerate(signal)
            ]
            mu = self._through(heard, within)
            found = _row_times(mu, transition)
            return {s: _or_zero(found[s], later[s]) for s in read}, mu

        zero = {s: jnp.zeros_like(self.total[s][0]) for s in read}
        if self.later is not None:
            zero = {s: self.later[s].astype(v.dtype) for s, v in zero.items()}
        steps = self.signal, self._moving
        first, mu = jax.lax.scan(back, zero, steps, length=self.steps, reverse=True)
        return mu, [first.get(s) for s in slots]

    @ft.cached_property
    def suffix(self) -> tuple[list[list[Any | None]], list[list[Any | None]]]:
        """Psi_t (1 - L_t)^-1 of every step, and Psi_0; rows and columns are slots.

        None where structurally zero, and in rows that nobody reads. What is equal for
        all units has size one."""
        slots, width = range(self.group.slots), self._widths()
        lead = () if self.batch is None else (self.batch,)
        one = [
            [
                jnp.full((*lead, width[s][t]), s == t, self.group.dtypes[s])
                if width[s][t]
                else None
                for t in slots
            ]
            for s in slots
        ]

        def back(later: list[list[Any]], moving: Any) -> tuple[Any, Any]:
            transition, within = self._rows(moving)
            factors = [self._through(row, within) for row in later]
            rows = [_row_times(row, transition) for row in factors]
            kept = [
                [
                    None if old is None else _or_zero(new, old)
                    for new, old in zip(*pair, strict=True)
                ]
                for pair in zip(rows, later, strict=True)
            ]
            return kept, factors

        first, factors = jax.lax.scan(
            back, one, self._moving, length=self.steps, reverse=True
        )
        return factors, first

    @property
    def _moving(self) -> tuple[Any, Any]:
        """The entries with time in front."""
        return tuple(
            [[d if d is None or _moves(d) else None for d in row] for row in rows]
            for rows in (self.transition, self.within)
        )  # pyright: ignore[reportReturnType] two rows in, two rows out

    def _rows(self, moving: tuple[Any, Any]) -> tuple[Rows, Rows]:
        """D and L of one step, from those of its entries that move."""
        found = []
        for rows, now in zip((self.transition, self.within), moving, strict=True):
            found.append(
                [
                    [
                        d if d is None or not _moves(d) else new
                        for d, new in zip(*pair, strict=True)
                    ]
                    for pair in zip(rows, now, strict=True)
                ]
            )
        return found[0], found[1]

    def _widths(self) -> list[list[int]]:
        """The size of the entries of Psi: 0 where structurally zero, however long the
        window, and 1 where they are equal for all units."""
        slots, units = range(self.group.slots), self.group.units
        moves, passes = (
            [[0 if d is None else d.shape[-1] for d in row] for row in rows]
            for rows in (self.transition, self.within)
        )
        width = [[int(s == t and s in self.rows) for t in slots] for s in slots]
        while True:
            new = [list(row) for row in width]
            for row in new:
                reached = list(row)
                for t in reversed(self.group.order):
                    for s in slots:
                        reached[s] = max(reached[s], _both(reached[t], passes[t][s]))
                for t in slots:
                    for s in slots:
                        row[s] = max(row[s], _both(reached[t], moves[t][s]))
            new = [[min(n, units) for n in row] for row in new]
            if new == width:
                return width
            width = new

    def _through(self, row: Sequence[Any], within: Rows) -> list[Any]:
        """A row times (1 - L)^-1."""
        row = list(row)
        for target in reversed(self.group.order):
            for source, factor in enumerate(within[target]):
                if factor is not None and row[target] is not None:
                    row[source] = _add(row[source], row[target] * factor)
        return row


def _zero(array: Any) -> Any:
    return jnp.zeros((), array.dtype)


def _moves(entry: Any) -> bool:
    """Whether an entry has more axes than that of the units."""
    return entry.ndim > 1


def _both(one: int, other: int) -> int:
    return max(one, other) if one and other else 0


def _row_times(row: Sequence[Any], matrix: Rows) -> list[Any]:
    found: list[Any] = [None] * len(row)
    for value, factors in zip(row, matrix, strict=True):
        for s, factor in enumerate(factors):
            if factor is not None and value is not None:
                found[s] = _add(found[s], value * factor)
    return found


def _or_zero(new: Any, old: Any) -> Any:
    return jnp.zeros_like(old) if new is None else new.astype(old.dtype)


def _add(total: Any, more: Any) -> Any:
    return more if total is None else total + more.astype(total.dtype)


@dataclasses.dataclass(frozen=True)
class Window:
    """One relation over a window; what `LocalRule.window` works with.

    **Attributes:**

    - `relation`: the relation.
    - `number`: its number among all.
    - `group`: its hidden group over the window.
    - `jacobian`: the relation's Jacobian of every step, time and batch in front.
    - `stacked`: per operand in `jacobian.operands`, whether it has these axes.
    - `batch`: the batch size, or None.
    - `reset`: where a step starts from a new state, time and batch in front, or None.
    - `at`: the Jacobian of a step and sample from what was saved of it,
      `group.saved_at(step)`: entries that are read once need not be held in memory for
      all steps.
    """

    relation: Relation
    number: int
    group: GroupWindow
    jacobian: RelationJacobian
    stacked: tuple[bool, ...]
    batch: int | None
    reset: Bool[Array, "..."] | None
    at: Callable[[Any], RelationJacobian]

    @property
    def lead(self) -> int:
        """How many axes are in front."""
        return 1 if self.batch is None else 2

    def merged(self, array: Any) -> Any:
        """Time and batch as one axis."""
        return array if self.batch is None else array.reshape(-1, *array.shape[2:])

    def moving(self, operands: Sequence[Any]) -> list[Any]:
        """The operands that have the axes in front."""
        pairs = zip(operands, self.stacked, strict=True)
        return [operand for operand, stacked in pairs if stacked]

    def operands(self, moving: Sequence[Any]) -> tuple[Any, ...]:
        """All operands, those with axes in front from `moving`."""
        rest = iter(moving)
        pairs = zip(self.jacobian.operands, self.stacked, strict=True)
        return tuple(next(rest) if stacked else operand for operand, stacked in pairs)

    def derivative(self, operands: Sequence[Any]) -> Any:
        """dy/dw of one step, the batch in front."""
        rule = self.relation.op
        moving = self.moving(operands)
        return self.per_sample(
            lambda moving: rule.derivative(self.operands(moving)), 0
        )(moving)

    def of_own(self) -> "Window":
        """The same for the elements of y alone whose df no earlier relation has."""
        pieces = self.relation.pieces
        assert pieces is not None and pieces.map is not None

        def own(jacobian: RelationJacobian) -> RelationJacobian:
            direct = [
                d if d is None or d.shape[-1] == 1 else pieces.of_own(d)
                for d in jacobian.direct
            ]
            return dataclasses.replace(jacobian, direct=direct)

        return dataclasses.replace(
            self,
            relation=dataclasses.replace(self.relation, map=pieces.map, pieces=None),
            jacobian=own(self.jacobian),
            at=lambda saved: own(self.at(saved)),
        )

    def last(self) -> RelationJacobian:
        """The Jacobian of the last step, the batch in front."""
        return self.step(jax.tree.map(lambda a: a[-1], self.parts))

    def per_sample(self, fun: Callable[..., Any], axis: int) -> Callable[..., Any]:
        """`fun` of one sample, mapped over the batch at this axis of all arguments."""
        return fun if self.batch is None else jax.vmap(fun, in_axes=axis)

    def per_sample_of(self, tree: Any) -> Any:
        """What is the same for all samples, for each of them."""
        if self.batch is None:
            return tree
        lead = (self.batch,)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, lead + a.shape), tree)

    @property
    def parts(self) -> tuple[Any, list[Any]]:
        """What of the Jacobian has axes in front: entries, and operands."""
        found, y = self.jacobian, len(self.relation.drive_shape)
        rows = [
            [[_if_more(d, 1) for d in row] for row in entries]
            for entries in (found.transition, found.within)
        ]
        direct = [_if_more(d, y) for d in found.direct]
        return (*rows, direct), self.moving(found.operands)

    def step(self, parts: tuple[Any, list[Any]]) -> RelationJacobian:
        """The Jacobian of one step from its parts."""
        found, (moving, operands) = self.jacobian, parts
        entries: Any = (found.transition, found.within, found.direct)
        transition, within, direct = jax.tree.map(
            lambda fixed, now: fixed if now is None else now,
            tuple(map(_nested, entries)),
            tuple(map(_nested, moving)),
            is_leaf=lambda entry: entry is None,
        )
        return RelationJacobian(transition, within, direct, self.operands(operands))

    def pullback(self, q: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """The sum over time, batch and y of q . dy/dw."""
        relation = self.relation
        moving = [
            self.merged(operand) for operand in self.moving(self.jacobian.operands)
        ]

        w, q = self.jacobian.operands[relation.operand], self.merged(q)

        def y(w: Any, *args: Any) -> Any:
            return relation.y_of(w, self.operands(args))

        if relation.op.trace_shape == relation.y_shape:

            def of_one(q: Any, *args: Any) -> Any:
                value, pull = jax.vjp(lambda w: y(w, *args), w)
                return pull(q.astype(value.dtype))[0]

            return sum_of_first(jax.vmap(of_one)(q, *moving))
        value, pull = jax.vjp(lambda w: jax.vmap(ft.partial(y, w))(*moving), w)
        return pull(q.astype(value.dtype))[0]


def _if_more(entry: Any | None, axes: int) -> Any | None:
    return entry if entry is not None and entry.ndim > axes else None


def _nested(entries: Any) -> Any:
    """Sequences as lists, so that two of these have one structure."""
    if isinstance(entries, list | tuple):
        return [_nested(entry) for entry in entries]
    return entries
