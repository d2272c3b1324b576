"""Cells as data: small recurrent programs, and an Equinox model that runs them.

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
    "scattered": lambda a, b: a.at[_turned(a.size)].add(b[_turned(a.size)]),
    "where": lambda a, b: jnp.where(a > 0.1, b, 0.5 * b),
}


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
