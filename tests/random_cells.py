"""Random cells, drawn by hypothesis, and what is known of each without the library."""

import dataclasses
from typing import Any

import numpy as np
from cells import (
    AFTER,
    ALONE,
    BINARY,
    GAINS,
    IN,
    PACKED,
    PREPARED,
    SPELLINGS,
    UNARY,
    Cell,
    Drive,
    Expr,
    Place,
    Population,
    Read,
    Slot,
    Source,
    put_together,
    take_apart,
)
from hypothesis import strategies as st


# What is known of a cell.

NOT_FELT = {"detach": 0, "where": 0}
"""Which operand no derivative passes through."""


def element_numbers(cell: Cell) -> dict[Place, np.ndarray]:
    """For each slot, the numbers of its elements, counted through all state leaves."""
    numbers, first = {}, 0
    for p, population in enumerate(cell.populations):
        for layout, slots in population.leaves:
            zeros = [np.zeros(population.units)] * len(slots)
            shape = put_together(layout, zeros).shape
            size = int(np.prod(shape))
            leaf = np.arange(first, first + size).reshape(shape)
            parts = take_apart(layout, leaf, population.units)
            numbers |= {(p, s): v for s, v in zip(slots, parts, strict=True)}
            first += size
    return numbers


def same_unit(cell: Cell) -> np.ndarray:
    """(elements, elements): 1 where the population and the index in it agree."""
    numbers = element_numbers(cell)
    owner = np.zeros(sum(v.size for v in numbers.values()), int)
    for (p, _), places in numbers.items():
        owner[places] = 100 * p + np.arange(places.size)
    return (owner[:, None] == owner[None]).astype(float)


def felt(e: Expr):
    """The leaves of an expression that a derivative reaches."""
    kind, *args = e
    children = [a for a in args if isinstance(a, tuple)]
    if not children:
        return [e]
    drop = NOT_FELT.get(kind)
    found = [] if kind != "scale" else [("bias", args[0])]
    found += [("gate",)] if kind == "gate" else []
    for i, child in enumerate(children):
        found += felt(child) if i != drop else []
    return found


def _leaf_of(cell: Cell) -> dict[Place, int]:
    leaves = [(p, ss) for p, q in enumerate(cell.populations) for _, ss in q.leaves]
    return {(p, s): i for i, (p, slots) in enumerate(leaves) for s in slots}


def hidden_slots(cell: Cell) -> set[Place]:
    """The slots in leaves that a weight influences, now or later."""
    leaf, hidden = _leaf_of(cell), set()
    while True:
        found = set()
        for p, population in enumerate(cell.populations):
            for s, slot in enumerate(population.slots):
                for kind, *args in felt(slot.expr):
                    reads = kind in ("old", "new", "mean", "roll")
                    if kind in ("bias", "drive", "gate") or (
                        reads and leaf[p, args[0]] in hidden
                    ):
                        found.add(leaf[p, s])
        if found | hidden == hidden:
            return {place for place, i in leaf.items() if i in hidden}
        hidden |= found


def _stored(cell: Cell, p: int, t: int, s: int) -> bool:
    """Whether new slot t lies in its leaf when slot s is computed."""
    return any(t in slots and max(slots) < s for _, slots in cell.populations[p].leaves)


def _joins(cell: Cell, p: int, s: int, t: int, hidden: set[Place]) -> bool:
    """Whether new slot t is more than data to slot s: stored, or made of old state or
    of what a weight adds. A mean over the layer is no unit's own."""
    if _stored(cell, p, t, s):
        return (p, t) in hidden

    def carries(e: Expr) -> bool:
        kind, *args = e
        if kind == "old":
            return (p, args[0]) in hidden
        if kind == "new":
            return _joins(cell, p, s, args[0], hidden)
        if kind in ("summed", "coupled"):
            return any((p, a[0]) in hidden for k, *a in felt(e) if k == "old")
        if kind in ("roll", "drive", "bias", "scale"):
            return True
        drop = NOT_FELT.get(kind)
        children = [a for a in args if isinstance(a, tuple)]
        return any(carries(a) for i, a in enumerate(children) if i != drop)

    return carries(cell.populations[p].slots[t].expr)


def expected_units(cell: Cell) -> set[frozenset[int]]:
    """The hidden elements of each unit: the slots that read each other, or the same
    drive, are one unit's, index by index."""
    hidden, numbers = hidden_slots(cell), element_numbers(cell)
    owner: dict[Any, Any] = {place: place for place in hidden}

    def root(node):
        owner.setdefault(node, node)
        return node if owner[node] == node else root(owner[node])

    for p, population in enumerate(cell.populations):
        for s, slot in enumerate(population.slots):
            nodes: list[Any] = [(p, s)] if (p, s) in hidden else []
            for kind, *args in felt(slot.expr):
                if kind in ("old", "roll") and (p, args[0]) in hidden:
                    nodes.append((p, args[0]))
                elif kind == "new" and _joins(cell, p, s, args[0], hidden):
                    nodes.append((p, args[0]))
                elif kind == "drive":
                    nodes.append((p, "drive", args[0]))
            for node in nodes[1:]:
                owner[root(node)] = root(nodes[0])
    joined: dict[Any, list[Place]] = {}
    for place in hidden:
        joined.setdefault(root(place), []).append(place)
    return {
        frozenset(int(k) for k in unit)
        for places in joined.values()
        for unit in np.stack([numbers[place] for place in places], axis=1)
    }


def is_clean(cell: Cell) -> bool:
    """Whether the new state is plainly the only way out, so that the library must
    choose the single-step form. Cells that are not may still have it."""
    for p, population in enumerate(cell.populations):
        if any(drive.norm for drive in population.drives):
            return False
        if any(
            slot.expr[0] in ("old", "new", "x", "bias") for slot in population.slots
        ):
            return False
        packed = {s for _, slots in population.leaves if len(slots) > 1 for s in slots}
        for drive in population.drives:
            for source in drive.sources:
                if source.kind == "old" and source.place[0] != p:
                    return False
                if source.kind == "new" and source.place[0] == p and packed:
                    return False  # it may read what is not yet stored
        if len({i for i, _ in enumerate(population.leaves)}) > 1 and _split(cell, p):
            return False
    return all(read.kind == "new" for read in cell.reads)


def reads_around(cell: Cell) -> bool:
    """Whether old state plainly gets past its own unit's new state: into an output, or
    through a product into another population. No single step credits that, which the
    first step, before which nothing has happened, cannot show."""
    hidden = hidden_slots(cell)
    if any(read.kind == "old" and read.place in hidden for read in cell.reads):
        return True
    return any(
        source.kind == "old" and source.place[0] != p and source.place in hidden
        for p, population in enumerate(cell.populations)
        for slot in population.slots
        for kind, *args in felt(slot.expr)
        if kind == "drive"
        for source in population.drives[args[0]].sources
    )


def _split(cell: Cell, p: int) -> bool:
    """Whether the slots of a population are more than one unit's."""
    numbers = element_numbers(cell)
    units = expected_units(cell)
    own = {int(v[0]) for (q, _), v in numbers.items() if q == p}
    return sum(bool(own & unit) for unit in units) > 1


# Drawing.

_UNARY = [*UNARY, "tanh", "sigmoid", "spike"]
_BINARY = [*BINARY, "add", "mul", "leak"]
_HOW = ["plain", "tanh", "spike", "gain"]


@st.composite
def _exprs(draw, sizes: tuple[int, int, int], roll: bool, depth: int = 3) -> Expr:
    """`sizes`: how many old slots, new slots and drives there are to read."""
    slots, new, drives = sizes
    deeper = _exprs(sizes, roll, depth - 1)
    kinds = ["old"] * 3 + ["drive"] * 3 * bool(drives) + ["new"] * 3 * bool(new)
    kinds += ["x", "bias", "mean"] + ["roll"] * 2 * roll
    if depth:
        kinds += ["unary"] * 4 + ["binary"] * 10 + ["scale"] * 4
        # The gate drives a whole layer, which is undone; so may be, before it, a drive
        # that is shared as often as the layer has units, and with it a unit's slots.
        kinds += ["gate"] * (slots == 1)
    kind = draw(st.sampled_from(kinds))
    if kind in ("old", "mean", "roll"):
        return kind, draw(st.integers(0, slots - 1))
    if kind in ("new", "drive"):
        return kind, draw(st.integers(0, (new if kind == "new" else drives) - 1))
    if kind == "x":
        return ("x",)
    if kind == "bias":
        return "bias", draw(st.sampled_from(list(GAINS)))
    if kind == "unary":
        return draw(st.sampled_from(_UNARY)), draw(deeper)
    if kind == "scale":
        return "scale", draw(st.sampled_from(list(GAINS))), draw(deeper)
    if kind == "gate":
        return "gate", draw(deeper)
    kind = draw(st.sampled_from(_BINARY))
    if kind in ("summed", "coupled"):
        # A drive joins what it drives elementwise; through a sum it joins nothing, and
        # a new slot that is not stored yet may be a drive alone.
        deeper = _exprs((slots, 0, 0), roll, depth - 1)
    first = _exprs(sizes, roll, 0) if kind == "where" else deeper
    one, other = draw(first), draw(deeper)
    if kind == "scattered":  # what is scattered with a weight is cut, as by a product
        one, other = _with_data(one), _with_data(other)
    return kind, one, other


def _with_data(e: Expr) -> Expr:
    """The expression, the input added to it if it is made of weights alone."""

    def leaves(e: Expr) -> set[str]:
        children = [a for a in e[1:] if isinstance(a, tuple)]
        return {e[0]}.union(*map(leaves, children)) - set(UNARY) - set(BINARY)

    return ("add", e, ("x",)) if leaves(e) <= {"bias", "scale"} else e


@st.composite
def _drives(draw, p: int, counts: list[int], done: int) -> Drive:
    """A drive of population `p`, of which `done` slots have their new value."""
    sources = [Source("x")]
    for q, slots in enumerate(counts):
        for s in range(slots):
            sources += [Source("old", (q, s))] * (3 if q == p else 1)
            if q < p or (q == p and s < done):
                sources += [Source("new", (q, s))] * 3
    drawn = []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        source = draw(st.sampled_from(sources))
        how = draw(st.sampled_from(_HOW)) if source.kind != "x" else "plain"
        drawn.append(dataclasses.replace(source, how=how))
    state = any(source.kind != "x" for source in drawn)
    spellings = [s for s in SPELLINGS if not (state and s == "product and sum")]
    spelling = draw(st.sampled_from(spellings))
    return Drive(
        tuple(drawn),
        spelling,
        draw(st.sampled_from(list(PREPARED))),
        # The bias joins what the drive drives, which the sum of products does not.
        bias=spelling == "product and sum" or draw(st.booleans()),
        norm=draw(st.sampled_from([False] * 9 + [True])),
        tied=draw(st.sampled_from([False] * 5 + [True])),
    )


@st.composite
def _layouts(draw, units: int, slots: int):
    """Leaves for so many slots: each alone, or two or more in one array."""
    order = draw(st.permutations(range(slots)))
    size = draw(st.integers(1, slots))
    alone = [layout for layout in ALONE if units % 2 == 0 or layout != "matrix"]
    leaves = []
    if size > 1:
        leaves.append((draw(st.sampled_from(PACKED)), tuple(order[:size])))
    for s in order[size if size > 1 else 0 :]:
        leaves.append((draw(st.sampled_from(alone + ["plain"] * 2)), (s,)))
    return tuple(leaves)


def _is_bare(slot: Slot) -> bool:
    return slot.expr[0] == "old" and slot.after == "nothing"


@st.composite
def _populations(draw, p: int, counts: list[int], roll: bool) -> Population:
    count = counts[p]
    units = draw(st.integers(max(2, *counts) + 1, IN))
    drives: list[Drive] = []
    slots: list[Slot] = []
    for s in range(count):
        if not s or draw(st.booleans()):
            drives.append(draw(_drives(p, counts, s)))
        expr = _with_data(draw(_exprs((count, s, len(drives)), roll)))
        if s == 0:
            expr = (draw(st.sampled_from(["add", "leak", "sub"])), ("drive", 0), expr)
        after = draw(st.sampled_from(["nothing"] * 3 + list(AFTER)))
        slots.append(Slot(expr, after))
    # A bare old slot, stored as it is, would be one value with two names, and what
    # reads the old slot would read the new one.
    leaves = tuple(
        ("reversed", places)
        if layout == "plain" and _is_bare(slots[places[0]])
        else (layout, places)
        for layout, places in draw(_layouts(units, count))
    )
    return Population(units, tuple(slots), tuple(drives), leaves)


@st.composite
def cells(draw) -> Cell:
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    roll = max(counts) == 1 and draw(st.booleans())
    populations = tuple(draw(_populations(p, counts, roll)) for p in range(len(counts)))
    places = [(p, s) for p, count in enumerate(counts) for s in range(count)]
    reads = []
    kinds = draw(st.sampled_from([["new"]] * 3 + [["new", "old"], ["new", "raw"]]))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(kinds))
        slot = populations[place[0]].slots[place[1]]
        if kind == "raw" and slot.after == "nothing":
            kind = "new"
        how = draw(st.sampled_from(["dense", "dense", "gain", "sum", "plain"]))
        reads.append(Read(kind, place, how))
    return Cell(populations, tuple(reads), draw(st.integers(0, 3)))
