"""From the user's model to a staged step: one jaxpr and its leaf tables.

The step is traced once, on the shapes of one sample, as a flat function

    (params leaves, state leaves, x leaves) -> (new state leaves, output leaves)

with two real leaves in place of a complex state leaf: its real and its imaginary part
are two state variables of a unit. Every leaf keeps the key path that the user knows it
by. What is wrong with the arguments of `compile` is said here, before or right after
the user's step is traced.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._errors import CompileError, describe, dtype_of, is_array_like, sentence


KeyPath = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Structure, key paths, shapes and dtypes of a pytree; static and hashable."""

    name: str
    treedef: Any
    paths: tuple[str, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def count(self) -> int:
        return len(self.specs)

    def flatten(self, tree: PyTree, batch: int | None, remedy: str) -> list[Any]:
        """The leaves of `tree`, or a ValueError that names the first that differs."""
        leaves, treedef = jtu.tree_flatten(tree)
        if treedef != self.treedef:
            raise ValueError(self._structure_message(tree, remedy))
        lead = () if batch is None else (batch,)
        for path, spec, leaf in zip(self.paths, self.specs, leaves, strict=True):
            expected = jax.ShapeDtypeStruct((*lead, *spec.shape), spec.dtype)
            fits = is_array_like(leaf) and jnp.shape(leaf) == expected.shape
            if not fits or dtype_of(leaf) != expected.dtype:
                got, wanted = describe(leaf), describe(expected)
                raise ValueError(sentence(path, got, wanted, remedy))
        return leaves

    @property
    def parts(self) -> "Leaves":
        """The same with two real leaves in place of a complex one."""
        paths, specs = [], []
        for path, spec in zip(self.paths, self.specs, strict=True):
            if not _is_complex(spec):
                paths.append(path)
                specs.append(spec)
                continue
            real = jax.ShapeDtypeStruct(spec.shape, jnp.finfo(spec.dtype).dtype)
            paths += [f"{path}.real", f"{path}.imag"]
            specs += [real, real]
        return Leaves(self.name, self.treedef, tuple(paths), tuple(specs))

    def split(self, leaves: Sequence[Any]) -> list[Any]:
        """The real parts of the leaves, in the order of `parts`."""
        found = []
        for leaf in leaves:
            found += [leaf.real, leaf.imag] if _is_complex(leaf) else [leaf]
        return found

    def join(self, parts: Sequence[Any]) -> list[Any]:
        """The inverse of `split`."""
        rest = iter(parts)
        return [
            jax.lax.complex(next(rest), next(rest)) if _is_complex(spec) else next(rest)
            for spec in self.specs
        ]

    def _structure_message(self, tree: PyTree, remedy: str) -> str:
        got = dict(named_leaves(self.name, tree, keep_none=True))
        for path, spec in zip(self.paths, self.specs, strict=True):
            if got.get(path) is None:
                below = [other for other in got if other.startswith(path)]
                found = "None" if path in got else "nothing"
                if below and path not in got:
                    found = f"a pytree with the leaves {', '.join(below)}"
                return sentence(path, found, describe(spec), remedy)
        for path, leaf in got.items():
            if path not in self.paths and leaf is not None:
                return sentence(path, describe(leaf), "nothing there", remedy)
        got, expected, first = _differing(jtu.tree_structure(tree), self.treedef)
        whole = self.name or "params"
        path = self.paths[first] if expected.num_leaves == 1 else whole
        return sentence(path, str(got), str(expected), remedy)


def _differing(got: Any, expected: Any, first: int = 0) -> tuple[Any, Any, int]:
    """The smallest parts in which two structures differ, and how many leaves precede
    them."""
    pairs = list(zip(got.children(), expected.children(), strict=False))
    alike = got.node_data() == expected.node_data()
    different = [number for number, (a, b) in enumerate(pairs) if alike and a != b]
    if not different:
        return got, expected, first
    first += sum(b.num_leaves for _, b in pairs[: different[0]])
    return _differing(*pairs[different[0]], first)


def _is_complex(leaf: Any) -> bool:
    return jnp.issubdtype(dtype_of(leaf), jnp.complexfloating)


def named_leaves(
    name: str, tree: PyTree, keep_none: bool = False
) -> list[tuple[str, Any]]:
    """Leaves with paths as a person writes them: `cell.weight_hh`, `state[0]`."""
    # None counts as a child, so that a path does not depend on what is left out.
    flat, _ = jtu.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    children: dict[KeyPath, set[Any]] = {}
    for path, _ in flat:
        for depth, key in enumerate(path):
            children.setdefault(path[:depth], set()).add(key)
    return [
        (_as_written(name, path, children), leaf)
        for path, leaf in flat
        if keep_none or leaf is not None
    ]


def is_below(path: str, start: str) -> bool:
    """Whether a key path is this one or goes on from it."""
    rest = path.removeprefix(start)
    return path.startswith(start) and (not rest or rest[0] in ".[")


def _as_written(name: str, path: KeyPath, children: Mapping[KeyPath, set[Any]]) -> str:
    """A class that names no keys, such as a quantity with a unit, is passed over if it
    has one child; the children of others are numbered."""
    for depth, key in enumerate(path):
        if isinstance(key, jtu.FlattenedIndexKey):
            alone = len(children[path[:depth]]) == 1
            name += "" if alone else f"[{key.key}]"
        else:
            name += jtu.keystr((key,))
    return name.lstrip(".") or "model"


def named_parts(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The same with the two parts of a complex leaf in its place."""
    found = []
    for path, leaf in named_leaves(name, tree):
        if is_array_like(leaf) and _is_complex(leaf):
            leaf = jnp.asarray(leaf)
            found += [(f"{path}.real", leaf.real), (f"{path}.imag", leaf.imag)]
        else:
            found.append((path, leaf))
    return found


def leaf_table(name: str, tree: PyTree, drop_batch: bool = False) -> Leaves:
    """Read a pytree of arrays, shape structs or Python numbers into a table."""
    named = named_leaves(name, tree)
    specs = []
    for path, leaf in named:
        if not is_array_like(leaf):
            remedy = "Every leaf of state and x must be an array, a shape or a number."
            raise CompileError(sentence(path, describe(leaf), "an array", remedy))
        shape = jnp.shape(leaf)[1:] if drop_batch else jnp.shape(leaf)
        specs.append(jax.ShapeDtypeStruct(shape, dtype_of(leaf)))
    paths = tuple(path for path, _ in named)
    return Leaves(name, jtu.tree_structure(tree), paths, tuple(specs))


@dataclasses.dataclass(frozen=True)
class Staged:
    """What tracing the step gives: the jaxpr, the tables, and the rest of the model."""

    closed: Any
    params: Leaves
    state: Leaves
    """As the user knows it."""
    x: Leaves
    out: Leaves
    fixed: PyTree
    """The arrays of the model that are not trained; None elsewhere."""
    static: "Frozen"
    """The rest of the model: functions, strings, sizes."""
    trainable: "Frozen"
    """True for the leaves of the model that are params."""
    batch: int | None


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A pytree without arrays, hashable whatever its containers are."""

    treedef: Any
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, tree: PyTree) -> "Frozen":
        leaves, treedef = jtu.tree_flatten(tree)
        return cls(treedef, tuple(leaves))

    def thaw(self) -> PyTree:
        return jtu.tree_unflatten(self.treedef, self.leaves)


def _batch_size(state: PyTree, x: PyTree) -> int:
    named = named_leaves("state", state) + named_leaves("x", x)
    sizes = {}
    for path, leaf in named:
        if not is_array_like(leaf) or jnp.ndim(leaf) == 0:
            expected = "a leading batch axis"
            remedy = "With batched=True every leaf of state and x carries the batch."
            raise CompileError(sentence(path, describe(leaf), expected, remedy))
        sizes.setdefault(jnp.shape(leaf)[0], path)
    if len(sizes) != 1:
        got = ", ".join(f"{size} in {path}" for size, path in sizes.items())
        remedy = "Give every leaf of state and x the same leading axis."
        where = "batched=True" if sizes else "state and x"
        raise CompileError(sentence(where, got or "no leaf", "one size", remedy))
    return next(iter(sizes))


def _check_trainable(params: PyTree) -> None:
    for path, leaf in named_leaves("", params):
        if not eqx.is_inexact_array(leaf):
            remedy = "Let `trainable` select floating-point arrays only."
            expected = "a floating-point array"
            raise CompileError(sentence(path, describe(leaf), expected, remedy))


def _check_new_state(old: Leaves, new: PyTree) -> None:
    remedy = (
        "The step must return (out, state) with the state as it came in; pass `call=` "
        "for a model with another convention, and cast where the dtype grows."
    )
    try:
        old.flatten(new, None, remedy)
    except ValueError as error:
        raise CompileError(f"The step returned another state. {error}") from None


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray | np.generic)


def _spec(leaf: Any) -> Any:
    if not is_array_like(leaf):
        return leaf
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype_of(leaf))


def default_call(model: Any, x: PyTree, state: PyTree) -> Any:
    return model(x, state)


def _while_tracing(tables: Mapping[str, Leaves], batched: bool) -> str:
    """What an error of the model itself does not tell."""
    told = [
        f"{path} {describe(spec)}"
        for name in ("x", "state")
        for path, spec in zip(tables[name].paths, tables[name].specs, strict=True)
    ]
    remedy = "The batch is left out of them, since batched=True was given."
    if not batched:
        remedy = "If they have a batch in front, compile with batched=True."
    return (
        f"eqx_etrace.compile was tracing one step of the model with {', '.join(told)}. "
        f"{remedy} A model that is not called as `model(x, state)` needs `call=`."
    )


def stage(
    model: Any,
    state: PyTree,
    x: PyTree,
    *,
    call: Callable | None,
    trainable: Any,
    batched: bool,
) -> Staged:
    """Trace one step of `model` and read the tables of all its leaves."""
    params, rest = eqx.partition(model, trainable)
    _check_trainable(params)
    fixed, static = eqx.partition(rest, _is_array)
    batch = _batch_size(state, x) if batched else None
    tables = {
        "params": leaf_table("", params),
        "state": leaf_table("state", state, drop_batch=batched),
        "x": leaf_table("x", x, drop_batch=batched),
    }
    returned = []

    def flat(params: list[Any], parts: list[Any], x: list[Any]) -> list[Any]:
        groups = (params, tables["state"].join(parts), x)
        trees = [
            jtu.tree_unflatten(table.treedef, leaves)
            for table, leaves in zip(tables.values(), groups, strict=True)
        ]
        whole = eqx.combine(trees[0], rest)
        result = (call or default_call)(whole, trees[2], trees[1])
        if not isinstance(result, tuple) or len(result) != 2:
            got = f"an object of type `{type(result).__name__}`"
            remedy = "Pass `call=lambda model, x, state: ...` to adapt the model."
            expected = "a tuple (out, state)"
            raise CompileError(sentence("the step's result", got, expected, remedy))
        out, new_state = result
        returned.append(jtu.tree_map(_spec, (out, new_state)))
        new_leaves = map(jnp.asarray, jtu.tree_leaves(new_state))
        return tables["state"].split(list(new_leaves)) + jtu.tree_leaves(out)

    specs = [tables["params"].specs, tables["state"].parts.specs, tables["x"].specs]
    try:
        closed = jax.make_jaxpr(flat)(*map(list, specs))
    except Exception as error:
        if not isinstance(error, CompileError):
            error.add_note(_while_tracing(tables, batched))
        raise
    out, new_state = returned[-1]
    _check_new_state(tables["state"], new_state)
    return Staged(
        closed=closed,
        params=tables["params"],
        state=tables["state"],
        x=tables["x"],
        out=leaf_table("out", out),
        fixed=fixed,
        static=Frozen.of(static),
        trainable=Frozen.of(jtu.tree_map(lambda _, p: p is not None, model, params)),
        batch=batch,
    )
