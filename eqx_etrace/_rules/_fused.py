"""The exact trace of D-RTRL over a window of steps, read and written once.

With the factors of `GroupWindow`, a trace after K steps is

    eps_K = Psi_0 eps_0 + sum_t (Psi_t (1 - L_t)^-1 df_t) . dy_t/dw,

a sum over time that is one product of matrices per sample.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._op_rules import cast, product
from .._relation import Relation
from ._in_place import Arrays, at, over_samples
from ._window import Window


def advance(
    window: Window, trace: Sequence[Any] | None, edge: Sequence[Any] | None
) -> tuple[Arrays, Any | None]:
    """The new traces that are arrays, by slot, and edge . old trace, summed.

    `edge` is per slot the derivative of the window's loss by the old state. Either
    `trace` or `edge` may be None, for zero.
    """
    relation = window.relation
    slots = relation.array_slots
    if not slots:
        return {}, None
    old, heard = {}, {}
    if trace is not None:
        entries = zip(relation.slots, trace, strict=True)
        old = {slot: entry for slot, entry in entries if slot in slots}
        heard = {s: v for s in slots if edge is not None and (v := edge[s]) is not None}
    steps, start = _factors(window, slots)
    operands = window.moving(window.jacobian.operands)
    if window.batch is not None:
        steps, operands = jax.tree.map(
            lambda a: jnp.moveaxis(a, 1, 0), (steps, operands)
        )
    return _run(window, old, heard, start if old else {}, steps, operands)


def _factors(window: Window, slots: Sequence[int]) -> tuple[Arrays, dict[int, Arrays]]:
    """Per slot what multiplies dy/dw of every step, and what multiplies old traces."""
    relation = window.relation
    factors, first = window.group.suffix
    steps, start = {}, {}
    for slot in slots:
        alike = relation.alike[relation.slots.index(slot)]
        keep = slice(1) if alike else slice(None)
        row = [None if f is None else f[..., keep] for f in factors[slot]]
        found = through(window, row)
        assert found is not None  # Else it would be no slot of the relation.
        steps[slot] = found
        start[slot] = {
            s: f[..., keep] for s, f in enumerate(first[slot]) if f is not None
        }
        start[slot] = {s: f for s, f in start[slot].items() if s in slots}
    return steps, start


def through(window: Window, row: Sequence[Any]) -> Any | None:
    """The sum over slots of a row of vectors over units times df; shaped like y."""
    total = None
    for value, direct in zip(row, window.jacobian.direct, strict=True):
        if value is None or direct is None:
            continue
        spread = window.relation.map.spread(cast(value, direct.dtype))
        more = product(spread, direct)
        total = more if total is None else total + more
    return total


class _Sample:
    """One sample of a relation: how its traces move."""

    def __init__(self, window: Window):
        self.window, self.relation = window, window.relation
        relation = self.relation
        pairs = zip(relation.slots, relation.trace_dtypes, strict=True)
        self.dtypes = dict(pairs)

    def moved(self, slot: int, old: Arrays, start: Arrays, df: Any, moving: Any) -> Any:
        dtype = self.dtypes[slot]
        operands = self.window.operands(moving)
        found = self.relation.op.accumulate(
            cast(df, dtype), operands, self.window.stacked
        )
        real = not jnp.issubdtype(dtype, jnp.complexfloating)
        total = found.real if real else found.astype(dtype)
        for source, factor in start.items():
            factor = self.relation.expand(cast(factor, dtype))
            total = total + product(factor, old[source].astype(dtype))
        return jnp.broadcast_to(total, self.relation.array_shape(slot))


def _run(
    window: Window,
    old: Arrays,
    heard: Arrays,
    start: dict[int, Arrays],
    steps: Arrays,
    operands: Sequence[Any],
) -> tuple[Arrays, Any | None]:
    relation, sample = window.relation, _Sample(window)
    spread = relation.map.spread
    vectors = {s: spread(v) for s, v in heard.items()}

    def all_moved(old: Any, start: Any, steps: Any, operands: Any) -> Arrays:
        found = {
            slot: sample.moved(slot, old, start.get(slot, {}), df, operands)
            for slot, df in steps.items()
        }
        return {s: e.astype(old[s].dtype) if s in old else e for s, e in found.items()}

    def at_once(old: Any, vectors: Any, start: Any, steps: Any, operands: Any) -> Any:
        moved = window.per_sample(all_moved, 0)(old, start, steps, operands)
        return moved, _contracted(relation, vectors, old)

    args = old, vectors, start, steps, operands
    large = [s for s in steps if relation.array_shape(s) == relation.trace_shape]
    if window.batch is None or not old or not large:
        return at_once(*args)

    def one_by_one(*args: Any) -> Any:
        return _one_by_one(window, all_moved, large, *args)

    # On a CPU each of the large arrays is read once and written in place.
    return jax.lax.platform_dependent(*args, cpu=one_by_one, default=at_once)


def _contracted(relation: Relation, vectors: Arrays, old: Arrays) -> Any | None:
    if not vectors:
        return None
    return relation.op.contract(list(vectors.values()), [old[s] for s in vectors])


def _one_by_one(
    window: Window,
    all_moved: Any,
    large: Sequence[int],
    old: Arrays,
    vectors: Arrays,
    start: dict[int, Arrays],
    steps: Arrays,
    operands: Sequence[Any],
) -> tuple[Arrays, Any | None]:
    """Sample by sample: the contraction with its old traces, then the new ones in
    their place."""
    relation = window.relation
    heard = {s: v for s, v in vectors.items() if s in large}
    quiet = {s: v for s, v in vectors.items() if s not in large}
    rest = {s: e for s, e in old.items() if s not in large}
    others = rest, heard, start, steps, operands

    def one(b: Any, mine: Arrays) -> tuple[Any | None, Arrays]:
        small, v, *factors = jax.tree.map(lambda a: at(a, b), others)
        found = None
        if v:
            found = relation.op.contract(list(v.values()), [mine[s] for s in v])
        return found, all_moved(small | mine, *factors)

    total = None
    if heard:
        sample = jax.tree.map(lambda a: a[0], (heard, old))
        found: Any = _contracted(relation, *sample)
        total = jnp.zeros_like(found)
    traces = {s: old[s] for s in large}
    traces, total = over_samples(window.batch or 1, traces, total, one)
    moved = window.per_sample(
        lambda *args: {s: e for s, e in all_moved(*args).items() if s not in large}, 0
    )(old, start, steps, operands)
    if quiet:
        found = _contracted(relation, quiet, old)
        total = found if total is None else total + found
    return moved | traces, total
