"""Random cells: small programs drawn by hypothesis, with what is known of their units.

A cell is data. Its populations are computed one after the other, the slots of each in
the order in which they are listed; a slot's new value is an expression of

- old and (earlier) new slots of the same unit, and of the unit's own inputs,
- drives: products of a weight with the input, with an old or a new slot of any unit,
- elementwise weights: biases, gains, time constants.

`RandomCell` evaluates it as an Equinox model. The facts that the theory needs follow
from how the cell was drawn and are independent of the library: an element belongs to
the unit of its index in its population, and every value that goes on to another unit
passes the tap `recur` or `leave`. State leaves are laid out in many ways, each known
by the function that takes it apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import models
import numpy as np
from hypothesis import strategies as st
from jaxtyping import Array
from models import spike


IN = 5
Expr = tuple[Any, ...]
Place = tuple[int, int]
"""A population and a slot of it."""


@dataclasses.dataclass(frozen=True)
class Taps(models.Taps):
    """`near` and `far` meet each weight where it is used: near where its result acts
    on a unit's new state or on the output, far where it lies behind a mixing product
    or another cut. A far weight has no trace, its gradient is the current step's."""

    near: Callable[[str, Array], Array] = lambda name, w: w
    far: Callable[[str, Array], Array] = lambda name, w: w


@dataclasses.dataclass(frozen=True)
class Source:
    """One operand of a product: the input, or a slot, old or new, of any population."""

    kind: Literal["x", "old", "new"]
    place: Place = (0, 0)
    how: str = "plain"


@dataclasses.dataclass(frozen=True)
class Drive:
    sources: tuple[Source, ...]
    spelling: str = "matvec"
    prepared: str = "plain"
    bias: bool = False
    norm: bool = False
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """`after`: what becomes of the value before it is stored. An output that reads the
    value from before it bypasses the new state."""

    expr: Expr
    after: str = "nothing"


@dataclasses.dataclass(frozen=True)
class Population:
    units: int
    slots: tuple[Slot, ...]
    drives: tuple[Drive, ...]
    leaves: tuple[tuple[str, tuple[int, ...]], ...]
    """Per state leaf its layout and its slots."""


@dataclasses.dataclass(frozen=True)
class Read:
    """One part of the output: a new slot, an old one, or one before its `after`."""

    kind: Literal["new", "old", "raw"]
    place: Place
    how: str = "dense"


@dataclasses.dataclass(frozen=True)
class Cell:
    populations: tuple[Population, ...]
    reads: tuple[Read, ...]
    seed: int = 0

    @property
    def max_slots(self) -> int:
        """Fewer than the units of a layer, so that no mean joins a layer to a unit."""
        return max(2, *(len(p.slots) for p in self.populations))


# Layouts of state leaves: how the slots, vectors over units, lie in one array. The
# functions run on JAX arrays and, to learn which element is which, on NumPy's.


def _turned(n: int) -> np.ndarray:
    return (2 * np.arange(n) + 1) % n if n % 2 else np.roll(np.arange(n), 1)


def take_apart(layout: str, leaf: Any, n: int) -> list[Any]:
    xp: Any = jnp if isinstance(leaf, jax.Array) else np
    if layout == "plain":
        return [leaf]
    if layout == "reversed":
        return [leaf[::-1]]
    if layout == "turned":
        return [leaf[_turned(n)]]
    if layout == "matrix":
        return [leaf.reshape(n)]
    if layout == "rows":
        return [leaf[i] for i in range(leaf.shape[0])]
    if layout == "columns":
        return [leaf[:, i] for i in range(leaf.shape[1])]
    if layout == "flat":
        return list(xp.split(leaf, leaf.size // n))
    if layout == "interleaved":
        return [leaf[i :: leaf.size // n] for i in range(leaf.size // n)]
    raise ValueError(layout)


def put_together(layout: str, slots: list[Any]) -> Any:
    xp: Any = jnp if isinstance(slots[0], jax.Array) else np
    n = slots[0].size
    if layout == "plain":
        return slots[0]
    if layout == "reversed":
        return slots[0][::-1]
    if layout == "turned":
        return slots[0][np.argsort(_turned(n))]
    if layout == "matrix":
        return slots[0].reshape(2, n // 2)
    if layout == "rows":
        return xp.stack(slots)
    if layout == "columns":
        return xp.stack(slots, axis=1)
    if layout == "flat":
        return xp.concatenate(slots)
    if layout == "interleaved":
        return xp.stack(slots, axis=1).reshape(-1)
    raise ValueError(layout)


ALONE = ("plain", "reversed", "turned", "matrix")
PACKED = ("rows", "columns", "flat", "interleaved")


# Weights: how a matrix is made of parameters, and how a product is spelt.


def _mask(shape: tuple[int, ...]) -> np.ndarray:
    return ((np.arange(int(np.prod(shape))) % 3) != 1).reshape(shape).astype(float)


PREPARED: dict[str, Callable[[Any, tuple[int, ...]], Array]] = {
    "plain": lambda get, s: get(s),
    "abs": lambda get, s: jnp.abs(get(s)),
    "masked": lambda get, s: _mask(s) * get(s),
    "transposed": lambda get, s: get(s[::-1]).T,
    "sum": lambda get, s: get(s) + 0.5 * get(s),
    "doubled": lambda get, s: 2 * get(s),
    "flat": lambda get, s: get((s[0] * s[1],)).reshape(s),
    "low rank": lambda get, s: get((s[0], 2)) @ get((2, s[1])),
    "reversed": lambda get, s: get(s)[::-1],
    "rows": lambda get, s: jnp.concatenate([get((1, s[1])), get((s[0] - 1, s[1]))]),
    "normed": lambda get, s: _normed(get(s)),
    "with constant": lambda get, s: get(s) + _mask(s),
    "one for all": lambda get, s: jnp.broadcast_to(get((1, s[1])), s),
}


def _normed(w: Array) -> Array:
    return w / jnp.sqrt(0.1 + jnp.sum(w**2, axis=1, keepdims=True))


SPELLINGS: dict[str, Callable[[Array, Array], Array]] = {
    "matvec": lambda w, v: w @ v,
    "vecmat": lambda w, v: v @ w.T,
    "einsum": lambda w, v: jnp.einsum("ij,j->i", w, v),
    "einsum turned": lambda w, v: jnp.einsum("ji,j->i", w.T, v),
    "one row": lambda w, v: (v[None] @ w.T)[0],
    "one column": lambda w, v: (w @ v[:, None]).reshape(-1),
    "dot per unit": lambda w, v: jax.vmap(jnp.dot, in_axes=(0, None))(w, v),
    "two of one": lambda w, v: _two_of_one(w, v),
    "blocks": lambda w, v: w[:, :2] @ v[:2] + w[:, 2:] @ v[2:],
    "jitted": lambda w, v: jax.jit(jnp.matmul)(w, v),
    # Here the weight is used elementwise and what mixes is a sum, so that the element
    # (i, i) of a recurrent product stays within the unit: it is for inputs alone.
    "product and sum": lambda w, v: jnp.sum(w * v[None], axis=1),
}


def _two_of_one(w: Array, v: Array) -> Array:
    first, second = jnp.split(jnp.concatenate([w, 0.5 * w]) @ v, 2)
    return first + second


GAINS: dict[str, Callable[[Any, int], Array]] = {
    "vector": lambda get, n: get((n,)),
    "scalar": lambda get, n: get(()),
    "one": lambda get, n: get((1,)),
    "sigmoid": lambda get, n: jax.nn.sigmoid(get((n,))),
    "scalar sigmoid": lambda get, n: jax.nn.sigmoid(get(())),
    "exp": lambda get, n: jnp.exp(-jnp.exp(get((n,)))),
    "part": lambda get, n: get((n + 1,))[1:],
    "scalar of two": lambda get, n: get(()) * get(()),
}

UNARY: dict[str, Callable[[Array], Array]] = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": lambda v: jax.nn.relu(v + 0.3),
    "spike": lambda v: spike(v - 0.3),
    "half": lambda v: 0.5 * v,
    "square": lambda v: 0.3 * v**2,
    "detach": jax.lax.stop_gradient,
    "shaped": lambda v: jnp.tanh(v.reshape(1, -1)).T[:, 0],
    "padded": lambda v: jnp.pad(v, (1, 2))[1:-2],
    "remat": jax.checkpoint(jnp.sin),
}

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": jnp.maximum,
    "leak": lambda a, b: 0.7 * a + 0.3 * b,
    "reset": lambda a, b: a * (1 - spike(b - 0.3)),
    "joined": lambda a, b: _halves(jnp.tanh(jnp.concatenate([a, b[::-1]]))),
    "summed": lambda a, b: jnp.sum(jnp.tanh(jnp.stack([a, b])), axis=0),
    "coupled": lambda a, b: _coupled(jnp.stack([a, b], axis=1)),
    "scattered": lambda a, b: jnp.zeros(a.size).at[:].set(a).at[1:].add(b[1:]),
    "where": lambda a, b: jnp.where(a > 0.1, b, 0.5 * b),
}
NOT_FELT = {"detach": 0, "where": 0}
"""Which operand no derivative passes through."""


def _halves(v: Array) -> Array:
    a, b = jnp.split(v, 2)
    return a + 0.5 * b[::-1]


def _coupled(v: Array) -> Array:
    v = v @ jnp.array([[0.6, 0.2], [0.3, 0.5]])
    return v[:, 0] + jnp.tanh(v[:, 1])


AFTER: dict[str, Callable[[Array], Array]] = {
    "nothing": lambda v: v,
    "hard reset": lambda v: v * (1 - jax.lax.stop_gradient(spike(v - 0.3))),
    "squash": jnp.tanh,
}


# The model.


class RandomCell(eqx.Module):
    params: dict[str, Array]
    cell: Cell = eqx.field(static=True)

    def __call__(self, x, state):
        return self.run(x, state, Taps())

    def run(self, x, state, taps):
        return _Evaluation(self.cell, self.params, x, state, taps).run()


class _Evaluation:
    """One time step. Parameters are numbered in the order of their use."""

    def __init__(self, cell: Cell, params: dict, x: Array, state, taps, draw=None):
        self.cell, self.params, self.x, self.taps = cell, params, x, taps
        self.draw = draw
        self.used: list[tuple[str, tuple[int, ...]]] = []
        self.drives: dict[tuple[int, int], Array] = {}
        self.raw: dict[Place, Array] = {}
        self.new: dict[Place, Array] = {}
        self.old: dict[Place, Array] = {}
        leaves = iter(state)
        for p, population in enumerate(cell.populations):
            for layout, slots in population.leaves:
                parts = take_apart(layout, next(leaves), population.units)
                self.old |= {(p, s): v for s, v in zip(slots, parts, strict=True)}

    def run(self):
        state: list[Array] = []
        for p in range(len(self.cell.populations)):
            state += self.population(p, len(state))
        return self.output(), tuple(state)

    def weights(self, far: bool = False, tied: bool = False):
        tap = self.taps.far if far else self.taps.near

        def get(shape: tuple[int, ...]) -> Array:
            known = [name for name, drawn in self.used if drawn == shape]
            name = known[-1] if tied and known else f"w{len(self.used)}"
            if name == f"w{len(self.used)}":
                self.used.append((name, shape))
            if self.draw is not None and name not in self.params:
                self.params[name] = self.draw(shape)
            return tap(name, jnp.asarray(self.params[name]))

        return get

    def population(self, p: int, first: int) -> list[Array]:
        population = self.cell.populations[p]
        leaves: list[Array | None] = [None] * len(population.leaves)
        for s, slot in enumerate(population.slots):
            self.raw[p, s] = self.expr(slot.expr, p)
            self.new[p, s] = AFTER[slot.after](self.raw[p, s])
            for i, (layout, slots) in enumerate(population.leaves):
                if leaves[i] is None and all((p, t) in self.new for t in slots):
                    leaf = put_together(layout, [self.new[p, t] for t in slots])
                    leaf = leaves[i] = self.taps.new(first + i, leaf)
                    parts = take_apart(layout, leaf, population.units)
                    self.new |= {(p, t): v for t, v in zip(slots, parts, strict=True)}
        return [leaf for leaf in leaves if leaf is not None]

    def expr(self, e: Expr, p: int) -> Array:
        kind, *args = e
        n = self.cell.populations[p].units
        if kind == "old":
            return self.old[p, args[0]]
        if kind == "new":
            return self.new[p, args[0]]
        if kind == "x":
            return self.x[:n]
        if kind == "drive":
            return self.drive(p, args[0])
        if kind == "bias":
            return jnp.broadcast_to(GAINS[args[0]](self.weights(), n), (n,))
        if kind == "scale":
            inner = self.expr(args[1], p)
            return GAINS[args[0]](self.weights(), n) * inner
        if kind == "mean":
            mean = jnp.mean(self.taps.leave(self.old[p, args[0]]))
            return jnp.broadcast_to(mean, (n,))
        if kind == "roll":
            old = self.old[p, args[0]]
            return 0.6 * old - 0.3 * jnp.roll(self.taps.leave(old), 1)
        if kind == "gate":
            gate = jax.nn.sigmoid(self.weights(far=True)((IN,)) @ self.x)
            return self.taps.leave(gate) * self.expr(args[0], p)
        if kind in UNARY:
            return UNARY[kind](self.expr(args[0], p))
        return BINARY[kind](self.expr(args[0], p), self.expr(args[1], p))

    def drive(self, p: int, d: int) -> Array:
        if (p, d) not in self.drives:
            drive, n = (
                self.cell.populations[p].drives[d],
                self.cell.populations[p].units,
            )
            v = jnp.concatenate([self.source(source) for source in drive.sources])
            get = self.weights(tied=drive.tied)
            w = PREPARED[drive.prepared](get, (n, v.size))
            y = SPELLINGS[drive.spelling](w, v)
            if drive.bias:
                y = y + get((n,))
            self.drives[p, d] = self.norm(y) if drive.norm else y
        return self.drives[p, d]

    def source(self, source: Source) -> Array:
        if source.kind == "x":
            return self.x
        tap = self.taps.recur if source.kind == "old" else self.taps.leave
        v = (self.old if source.kind == "old" else self.new)[source.place]
        if source.how == "gain":
            v = jnp.tanh(self.weights(far=True)((v.size,)) * v)
        elif source.how != "plain":
            v = UNARY[source.how](v)
        return tap(v)

    def norm(self, y: Array) -> Array:
        mean = jnp.mean(self.taps.leave(y), keepdims=True)
        variance = jnp.var(self.taps.leave(y), keepdims=True)
        return self.weights()((y.size,)) * (y - mean) / jnp.sqrt(variance + 0.1)

    def output(self) -> Array:
        parts = []
        for read in self.cell.reads:
            v = {"new": self.new, "old": self.old, "raw": self.raw}[read.kind]
            v = v[read.place]
            if read.how == "dense":
                v = self.weights()((2, v.size)) @ v
            elif read.how == "gain":
                v = spike(self.weights()((v.size,)) * v - 0.3)
            elif read.how == "sum":
                v = jnp.sum(v, keepdims=True)
            parts.append(v)
        return jnp.concatenate(parts)


def make(cell: Cell):
    """(model, zero state, width of the output), with the parameters of the seed."""
    state = []
    for population in cell.populations:
        for layout, slots in population.leaves:
            zeros = [np.zeros(population.units)] * len(slots)
            state.append(put_together(layout, zeros))
    rng = np.random.default_rng(cell.seed)
    drawn: dict[str, Any] = {}

    def draw(shape: tuple[int, ...]) -> Any:
        return 0.7 * rng.normal(size=shape)

    def evaluate(x, state):
        return _Evaluation(cell, drawn, x, state, Taps(), draw).run()[0]

    out = jax.eval_shape(evaluate, np.zeros(IN), state)
    params = {name: jnp.asarray(w) for name, w in drawn.items()}
    return RandomCell(params, cell), tuple(state), out.size


# What is known of a cell.


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
                if kind in ("old", "new", "roll") and (p, args[0]) in hidden:
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
                if source.kind == "new" and source.place[0] == p:
                    return not packed  # else it may read what is not yet stored
        if len({i for i, _ in enumerate(population.leaves)}) > 1 and _split(cell, p):
            return False
    return all(read.kind == "new" for read in cell.reads)


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
        kinds += ["unary"] * 4 + ["binary"] * 10 + ["scale"] * 4 + ["gate"]
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
        # A drive joins what it drives elementwise; through a sum it joins nothing.
        deeper = _exprs((slots, new, 0), roll, depth - 1)
    return kind, draw(deeper), draw(deeper)


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
    return Drive(
        tuple(drawn),
        draw(st.sampled_from(spellings)),
        draw(st.sampled_from(list(PREPARED))),
        bias=draw(st.booleans()),
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
        expr = draw(_exprs((count, s, len(drives)), roll))
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
