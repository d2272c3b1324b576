"""Which elements of an operand each element of an equation's output reads.

One array answers for every kind of equation. For operand k and output o it has the
shape (reads, *shape of o) and holds element numbers of the operand, or NONE:

| equation | reads |
|---|---|
| elementwise | one: the element at the same place, after broadcasting |
| structural | one: found by evaluating the equation on the element numbers themselves |
| a reduction, a product with a constant | the elements along the contracted axes |
| pooling | the elements in the window |
| anything else | every operand element, or ALL for more than a unit may have |

`pull` moves labels forward along these reads, `push` moves them backward.
"""

import dataclasses
import enum
import functools as ft
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims

from ._canonicalise import wrapped
from ._custom_types import Labels
from ._flatten import Convert
from ._jaxpr import (
    DOT_GENERAL,
    REDUCTIONS,
    SCAN,
    SCATTER_ADD,
    Equation,
    Program,
    Ref,
    aval_of,
    bind,
    index_positions,
    is_elementwise,
    is_structural,
    literal,
)
from ._loop import Loop
from ._loop_reads import find_loop, loop_reads
from ._pattern import flat
from ._windows import window_reads


NONE = -1
SEVERAL = -2
ALL = None
# A contraction that reads more than this many elements in total is not spelt out: no
# unit is that large, and the array would be.
_MOST_READS = 1 << 22
WINDOWED = frozenset(
    {prims.reduce_window_sum_p, prims.reduce_window_max_p, prims.reduce_window_min_p}
)


_MOST_SLOTS = 64


class Mixing(enum.Enum):
    """What an equation does to elements."""

    ELEMENTWISE = 0
    STRUCTURAL = 1
    MIXING = 2


class Reads:
    """The reads of the equations of one program; a cache that lives for a compile."""

    def __init__(
        self,
        program: Program,
        constants: Mapping[int, Any],
        elementwise: frozenset[Any] = frozenset(),
        convert: Convert = wrapped,
    ):
        self.program = program
        self.constants = constants
        self.elementwise = elementwise
        """Primitives that are elementwise because the user says so."""
        self.convert = convert
        """What is done with the calls inside of loops."""
        self._loops: dict[int, tuple[Loop, list[list[Labels]]]] = {}
        self._kinds: dict[int, Mixing] = {}
        self._cache: dict[tuple[int, int], list[Labels]] = {}

    def known(self, ref: Ref) -> Any | None:
        """The value of a constant operand, None for anything else."""
        return self.constants.get(ref) if isinstance(ref, int) else literal(ref)

    def kind(self, equation: Equation) -> Mixing:
        if equation.index not in self._kinds:
            kind = Mixing.MIXING
            own = equation.primitive in self.elementwise
            if own or is_elementwise(equation, self.program.avals):
                kind = Mixing.ELEMENTWISE
            elif is_structural(equation, self.known):
                kind = Mixing.STRUCTURAL
            self._kinds[equation.index] = kind
        return self._kinds[equation.index]

    def __call__(self, equation: Equation, k: int) -> list[Labels]:
        """Per output, the array described above, or ALL."""
        key = (equation.index, k)
        if key not in self._cache:
            self._cache[key] = self._find(equation, k)
        return self._cache[key]

    def _find(self, equation: Equation, k: int) -> list[Labels]:
        kind = self.kind(equation)
        operand = aval_of(self.program.avals, equation.inputs[k])
        if kind is Mixing.ELEMENTWISE:
            places = _places(operand.shape)
            outs = [self.program.avals[ref] for ref in equation.outputs]
            return [
                np.broadcast_to(places, out.shape)[None] if out.inexact else ALL
                for out in outs
            ]
        if kind is Mixing.STRUCTURAL:
            return [out[None] for out in self._moved(equation, k)]
        if equation.primitive in REDUCTIONS:
            axes = tuple(int(axis) for axis in equation.params["axes"])
            return [_to_front(_places(operand.shape), axes)]
        if equation.primitive in WINDOWED:
            return [self._windowed(equation, operand)]
        if equation.primitive is DOT_GENERAL:
            return [self._contracted(equation, k)]
        if equation.primitive is SCAN:
            return self._loop(equation)[1][k]
        if equation.primitive is SCATTER_ADD and k != 1:
            return [self._added(equation, k)]
        outs = [self.program.avals[ref] for ref in equation.outputs]
        return [_all(operand.size, out.shape) for out in outs]

    def loop(self, equation: Equation) -> Loop:
        """The local form of a loop that is kept."""
        return self._loop(equation)[0]

    def _loop(self, equation: Equation) -> tuple[Loop, list[list[Labels]]]:
        if equation.index not in self._loops:
            make = ft.partial(Reads, elementwise=self.elementwise, convert=self.convert)
            found = find_loop(self.program, equation, self.known, make, self.convert)
            self._loops[equation.index] = found[0], loop_reads(*found)
        return self._loops[equation.index]

    def is_mixing(self, equation: Equation) -> bool:
        return self.kind(equation) is Mixing.MIXING

    def _moved(self, equation: Equation, k: int) -> list[Labels]:
        indices = index_positions(equation)
        args = []
        for position, ref in enumerate(equation.inputs):
            aval = aval_of(self.program.avals, ref)
            if position in indices:
                args.append(self.known(ref))
            elif position == k:
                args.append(jnp.asarray(_places(aval.shape)))
            else:
                args.append(jnp.full(aval.shape, NONE, np.int32))
        if "fill_value" in equation.params:  # What is read outside is no element.
            params = {**equation.params, "fill_value": NONE}
            equation = dataclasses.replace(equation, params=params)
        with jax.ensure_compile_time_eval():
            outs = [np.asarray(out) for out in bind(equation, args)]
        return [np.where(out < 0, NONE, out) for out in outs]

    def _windowed(self, equation: Equation, operand: Any) -> Labels:
        window = int(np.prod(equation.params["window_dimensions"], dtype=np.int64))
        if window * self.program.avals[equation.outputs[0]].size > _MOST_READS:
            return ALL
        return window_reads(_places(operand.shape), equation.params)

    def _added(self, equation: Equation, k: int) -> Labels:
        """x.at[constant indices].add(updates): x in place, updates where they land."""
        shapes = [aval_of(self.program.avals, ref).shape for ref in equation.inputs]
        indices = self.known(equation.inputs[1])
        if k == 0 or indices is None:
            return _places(shapes[0])[None] if k == 0 else ALL
        dtype = aval_of(self.program.avals, equation.inputs[0]).dtype

        def add(updates: Any) -> Any:
            zero = jnp.zeros(shapes[0], dtype)
            return bind(equation, [zero, indices, updates])[0]

        with jax.ensure_compile_time_eval():
            pull = jax.vjp(add, jnp.zeros(shapes[2], dtype))[1]

            def picked(values: Labels) -> Labels:
                return np.asarray(pull(jnp.asarray(values, dtype))[0]).astype(int)

            # Digit by digit: small integers are exact in every floating dtype.
            rest, landed, weight = _places(shapes[0]), 0, 1
            present = picked(np.ones(shapes[0])) > 0
            while rest.any():
                landed = landed + weight * picked(rest % 64)
                rest, weight = rest // 64, weight * 64
        landed = np.where(present, landed, NONE)
        return _by_target(landed.reshape(-1), shapes[0])

    def _contracted(self, equation: Equation, k: int) -> Labels:
        (contract, batch) = equation.params["dimension_numbers"]
        mine, other = self._shape(equation, k), self._shape(equation, 1 - k)
        free = _free(len(mine), contract[k], batch[k])
        other_free = _free(len(other), contract[1 - k], batch[1 - k])
        order = [*contract[k], *batch[k], *free]
        places = np.transpose(_places(mine), order)
        count = int(np.prod([mine[axis] for axis in contract[k]], dtype=np.int64))
        lead = tuple(mine[axis] for axis in batch[k])
        own = tuple(mine[axis] for axis in free)
        others = tuple(other[axis] for axis in other_free)
        if places.size * int(np.prod(others, dtype=np.int64)) > _MOST_READS:
            return ALL
        places = places.reshape(count, *lead, *own)
        gap = tuple(range(places.ndim, places.ndim + len(others)))
        if k == 1:
            gap = tuple(range(1 + len(lead), 1 + len(lead) + len(others)))
        shape = (*lead, *own, *others) if k == 0 else (*lead, *others, *own)
        return np.broadcast_to(np.expand_dims(places, gap), (count, *shape))

    def _shape(self, equation: Equation, k: int) -> tuple[int, ...]:
        return aval_of(self.program.avals, equation.inputs[k]).shape


def _free(ndim: int, *taken: tuple[int, ...]) -> list[int]:
    return [axis for axis in range(ndim) if not any(axis in axes for axes in taken)]


def _places(shape: tuple[int, ...]) -> Labels:
    size = int(np.prod(shape, dtype=np.int64))
    return np.arange(size, dtype=np.int32).reshape(shape)


def _all(size: int, shape: tuple[int, ...]) -> Labels:
    """Every element, where these are few enough to be of one unit."""
    if size > _MOST_SLOTS:
        return ALL
    places = np.arange(size, dtype=np.int32).reshape(size, *(1,) * len(shape))
    return np.broadcast_to(places, (size, *shape))


def _by_target(targets: Labels, shape: tuple[int, ...]) -> Labels:
    """From the target of each source to the sources of each target, by rows."""
    sources = np.flatnonzero(targets >= 0)
    sources = sources[np.argsort(targets[sources], kind="stable")]
    targets = targets[sources]
    first = np.searchsorted(targets, targets)
    rank = np.arange(targets.size) - first
    size = int(np.prod(shape, dtype=np.int64))
    rows = np.full((int(rank.max(initial=0)) + 1, size), NONE)
    rows[rank, targets] = sources
    return rows.reshape(-1, *shape)


def _to_front(places: Labels, axes: tuple[int, ...]) -> Labels:
    kept = [axis for axis in range(places.ndim) if axis not in axes]
    shape = tuple(places.shape[axis] for axis in kept)
    return np.transpose(places, [*axes, *kept]).reshape(-1, *shape)


def pull(labels: Labels, reads: Labels) -> Labels:
    """Labels of the operand's elements, as (reads, output elements)."""
    rows = flat(reads)
    if not labels.size:
        return np.full(rows.shape, NONE)
    return np.where(rows >= 0, labels[rows], NONE)


def any_read(marks: Labels, reads: Labels, size: int) -> Labels:
    """Which output elements read a marked element of the operand."""
    if reads is ALL or not marks.size:
        return np.full(size, bool(marks.any()))
    rows = flat(reads)
    return (marks[rows] & (rows >= 0)).any(axis=0)


def push(labels: Labels, reads: Labels, size: int) -> Labels:
    """Labels of the output's elements, as (operand elements): NONE where no labelled
    element reads, SEVERAL where elements of different labels do."""
    if reads is ALL:
        found = np.unique(labels[labels != NONE])
        label = NONE if found.size == 0 else found[0] if found.size == 1 else SEVERAL
        return np.full(size, label, np.int32)
    rows = flat(reads)
    targets = np.broadcast_to(labels, rows.shape)
    used = (rows >= 0) & (targets != NONE)
    rows, targets = rows[used], targets[used]
    result = np.full(size, NONE, np.int32)
    result[rows] = targets
    result[rows[result[rows] != targets]] = SEVERAL
    return result


def push_bits(bits: Labels, reads: Labels, size: int) -> Labels:
    """Union, over the output elements that read it, of each element's bits."""
    if reads is ALL:
        return np.full(size, np.bitwise_or.reduce(bits, initial=0), np.int64)
    rows = flat(reads)
    values = np.broadcast_to(bits, rows.shape)
    used = (rows >= 0) & (values != 0)
    result = np.zeros(size, np.int64)
    np.bitwise_or.at(result, rows[used], values[used])
    return result


def merge(first: Labels | None, second: Labels) -> Labels:
    """Two label arrays of one value: SEVERAL where they disagree."""
    if first is None:
        return second
    agree = (first == second) | (second == NONE)
    return np.where(first == NONE, second, np.where(agree, first, SEVERAL))
