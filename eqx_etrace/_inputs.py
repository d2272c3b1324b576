"""What has time in front: inputs, targets and masks, and their checks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._errors import describe, dtype_of, is_array_like, sentence
from ._graph import ETraceGraph
from ._stage import named_leaves


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class SingleStepData:
    """Wraps a part of `xs` that is the same in all steps: it has no time axis.

    **Arguments:**

    - `value`: an array or any pytree of arrays, as one step takes it.

    !!! example

        ```python
        constant = eqx_etrace.SingleStepData(x)  # x has no time axis
        fun = eqx_etrace.value_and_grad(graph, loss_fn)
        losses, grads, state, trace = fun(params, state, None, constant, targets)
        ```
    """

    value: PyTree


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiStepData:
    """Wraps a part of `xs` that has one slice for each step, which is the default.

    **Arguments:**

    - `value`: an array or any pytree of arrays, each with time in front.

    !!! example

        ```python
        sequence = eqx_etrace.MultiStepData(xs)  # the same as xs alone
        outs, state, trace = eqx_etrace.evolve(graph, params, state, None, sequence)
        ```
    """

    value: PyTree


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The leaves of `xs`, which of them move, and the number of steps."""

    leaves: list[Any]
    moving: tuple[bool, ...]
    steps: int


def _is_wrapped(node: Any) -> bool:
    return isinstance(node, SingleStepData | MultiStepData)


def unwrap(xs: PyTree) -> tuple[PyTree, list[bool]]:
    """The plain pytree, and per leaf whether it moves."""

    def value(node: Any) -> Any:
        return node.value if _is_wrapped(node) else node

    moving: list[bool] = []
    for node in jtu.tree_leaves(xs, is_leaf=_is_wrapped):
        moves = not isinstance(node, SingleStepData)
        moving += [moves] * len(jtu.tree_leaves(value(node)))
    return jtu.tree_map(value, xs, is_leaf=_is_wrapped), moving


def specs_of(graph: ETraceGraph, xs: PyTree) -> PyTree:
    """How the leaves of `xs` are cut where the batch is spread over devices."""
    assert graph.place is not None
    both = graph.place.batch, graph.place.sequence
    cuts = [both[moves] for moves in unwrap(xs)[1]]
    return jtu.tree_unflatten(jtu.tree_structure(xs), cuts)


def read_inputs(graph: ETraceGraph, xs: PyTree, *others: tuple[str, PyTree]) -> Inputs:
    """Check `xs` against the graph. The number of steps is that of the first leaf with
    a time axis; of the `others`, pairs of name and pytree, if there is none.

    **Raises:** `ValueError` that names the first leaf that does not fit.
    """
    plain, moving = unwrap(xs)
    steps = None
    for (path, leaf), moves in zip(named_leaves("xs", plain), moving, strict=True):
        if moves and steps is None:
            steps = _first_axis(path, leaf), path
    for name, tree in others:
        for path, leaf in named_leaves(name, tree) if steps is None else ():
            steps = steps or (_first_axis(path, leaf), path)
    if steps is None:
        raise ValueError(
            "xs: got no leaf with a time axis, expected at least one. Give a part of "
            "`xs` one slice for each step."
        )
    if steps[0] == 0:
        raise ValueError(
            f"{steps[1]}: got 0 steps, expected at least one. Leave out what is empty."
        )
    leaves = _check_leaves(graph, plain, moving, steps)
    return Inputs(leaves, tuple(moving), steps[0])


def _first_axis(path: str, leaf: Any) -> int:
    if not is_array_like(leaf) or not jnp.ndim(leaf):
        remedy = "Put time in front, or wrap what stays the same in `SingleStepData`."
        raise ValueError(sentence(path, describe(leaf), "an axis of steps", remedy))
    return int(jnp.shape(leaf)[0])


def _check_leaves(
    graph: ETraceGraph, xs: PyTree, moving: Sequence[bool], steps: tuple[int, str]
) -> list[Any]:
    table = graph.x_leaves
    lead = () if graph.batch is None else (graph.batch,)
    remedy = (
        f"All inputs have the steps of {steps[1]} in front, then what one step takes; "
        "wrap what stays the same in `SingleStepData`."
    )
    leaves, treedef = jtu.tree_flatten(xs)
    if treedef != table.treedef:
        raise ValueError(sentence("xs", str(treedef), str(table.treedef), remedy))
    for (path, leaf), spec, moves in zip(
        named_leaves("xs", xs), table.specs, moving, strict=True
    ):
        front = (steps[0], *lead) if moves else lead
        wanted = jax.ShapeDtypeStruct((*front, *spec.shape), spec.dtype)
        fits = is_array_like(leaf) and jnp.shape(leaf) == wanted.shape
        if not fits or dtype_of(leaf) != wanted.dtype:
            got, expected = describe(leaf), describe(wanted)
            raise ValueError(sentence(path, got, expected, remedy))
    return [jnp.asarray(leaf) for leaf in leaves]


def check_time(name: str, tree: PyTree, steps: int) -> PyTree:
    """Raise `ValueError` unless every leaf has `steps` in front; arrays throughout."""
    for path, leaf in named_leaves(name, tree):
        count = _first_axis(path, leaf)
        if count != steps:
            remedy = f"`{name}` has one entry for each step of `xs`."
            got, expected = describe(leaf), f"{steps} steps in front"
            raise ValueError(sentence(path, got, expected, remedy))
    return jtu.tree_map(jnp.asarray, tree)


def check_lanes(
    name: str, mask: Any, steps: int, batch: int | None, per_sample: bool
) -> Any:
    """A mask (steps,), or where it may be (steps, batch); None stays."""
    if mask is None:
        return None
    shapes: list[tuple[int, ...]] = [(steps,)]
    if per_sample and batch is not None:
        shapes.append((steps, batch))
    if not is_array_like(mask) or jnp.shape(mask) not in shapes:
        expected = " or ".join(f"the shape {shape}" for shape in shapes)
        remedy = "One entry for each step"
        remedy += ", or for each step and sample." if len(shapes) > 1 else "."
        raise ValueError(sentence(name, describe(mask), expected, remedy))
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        remedy = "Pass booleans, or real weights."
        raise ValueError(sentence(name, describe(mask), "a real mask", remedy))
    return mask


def window_of(tree: PyTree, number: Any, length: int) -> PyTree:
    """Window `number` of all that has time in front, taken from where it is: what is
    cut into windows beforehand is copied as a whole."""
    return jtu.tree_map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, number * length, length), tree
    )
