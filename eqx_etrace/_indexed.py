"""Places that data choose, read and written: `state[i]`, `state.at[i].set(y)`.

A ring buffer writes one row at the place of a counter. Which row is known at run time
only, so by the labels every row would be mixed with every other. Read as a comparison
with all places and a select, or a sum of selected rows, it is elementwise or a fixed
contraction: each element stays with its unit, and the rows of a unit are its slots.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as prims
from jax.lax import GatherScatterMode

from ._flatten import Builder, Conversion
from ._jaxpr import SCATTER_ADD, SCATTER_MUL, Equation, Origin, Program, Ref, literal


def multiplied(
    program: Program, equation: Equation, known: Mapping[int, Any]
) -> tuple[Conversion, str] | None:
    """`state.at[places].multiply(y)` at constant places, each of them once: a product
    with ones elsewhere, which is elementwise."""
    if equation.primitive is not SCATTER_MUL:
        return None
    params, (x, places, y) = equation.params, equation.inputs
    places = known.get(places) if isinstance(places, int) else literal(places)
    if places is None:
        return None
    options = {name: params[name] for name in ("dimension_numbers", "mode")}

    def spread(add: bool, x: Any, y: Any) -> Any:
        put = jax.lax.scatter_add if add else jax.lax.scatter
        start = (jnp.zeros if add else jnp.ones)(x.shape, y.dtype)
        return put(start, jnp.asarray(places), y, **options)

    with jax.ensure_compile_time_eval():
        shapes = [_shape(program, ref) for ref in (x, y)]
        if (spread(True, *(jnp.ones(shape) for shape in shapes)) > 1).any():
            return None

    def convert(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        x, _, y = inputs
        return b.trace(lambda x, y: [x * spread(False, x, y)], x, y)

    return convert, "a product at some places is a product with ones at the others"


def indexed(program: Program, equation: Equation) -> tuple[Conversion, str] | None:
    """The conversion of such an equation, None for any other."""
    build = _BUILDERS.get(equation.primitive)
    if build is None or not isinstance(equation.inputs[0], int):
        return None
    if program.origins[equation.inputs[0]] is not Origin.DATA:
        return None
    places = [r for r in equation.inputs[1:] if not _is_inexact(program, r)]
    if all(_known(program, ref) for ref in places):
        return None
    fun = build(equation, [_shape(program, ref) for ref in equation.inputs])
    if fun is None:
        return None

    def convert(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        return b.trace(lambda *args: [fun(*args)], *inputs)

    return convert, "a place that data choose is compared with every place"


def _known(program: Program, ref: Ref) -> bool:
    return not isinstance(ref, int) or program.origins[ref] is Origin.CONSTANT


def _is_inexact(program: Program, ref: Ref) -> bool:
    dtype = program.avals[ref].dtype if isinstance(ref, int) else ref.aval.dtype
    return jnp.issubdtype(dtype, jnp.inexact)


def _shape(program: Program, ref: Ref) -> tuple[int, ...]:
    return program.avals[ref].shape if isinstance(ref, int) else ref.aval.shape


def _one_or_all(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    return all(k in (1, n) for k, n in zip(sizes, shape, strict=True))


def _here(
    shape: Sequence[int], starts: dict[int, Any], sizes: Sequence[int]
) -> dict[int, Any]:
    """Per axis of which one element is taken, where it is."""
    found = {}
    for axis, start in starts.items():
        if sizes[axis] != shape[axis]:
            found[axis] = jax.lax.broadcasted_iota(start.dtype, shape, axis) == start
    return found


def _everywhere(here: dict[int, Any], shape: Sequence[int]) -> Any:
    mask = jnp.ones(shape, bool)
    for place in here.values():
        mask = mask & place
    return mask


def _clipped(start: Any, size: int) -> Any:
    return jnp.clip(start, 0, size - 1).astype(start.dtype)


def _read_slice(equation: Equation, shapes: Any) -> Callable | None:
    shape, sizes = shapes[0], equation.params["slice_sizes"]
    if not _one_or_all(sizes, shape):
        return None

    def read(x: Any, *starts: Any) -> Any:
        clipped = {a: _clipped(s, shape[a]) for a, s in enumerate(starts)}
        here = _here(shape, clipped, sizes)
        rows = jnp.where(_everywhere(here, shape), x, jnp.zeros_like(x))
        return rows.sum(tuple(here), keepdims=True) if here else rows

    return read


def _write_slice(equation: Equation, shapes: Any) -> Callable | None:
    del equation
    shape, sizes = shapes[:2]
    if not _one_or_all(sizes, shape):
        return None

    def write(x: Any, y: Any, *starts: Any) -> Any:
        clipped = {a: _clipped(s, shape[a]) for a, s in enumerate(starts)}
        mask = _everywhere(_here(shape, clipped, sizes), shape)
        return jnp.where(mask, jnp.broadcast_to(y, shape), x)

    return write


def _starts(indices: Any, axes: Sequence[int], shape: Sequence[int], mode: Any) -> Any:
    """One start per indexed axis, and whether all of them are in bounds."""
    starts = {int(axis): indices[c] for c, axis in enumerate(axes)}
    inside = [(s >= 0) & (s < shape[axis]) for axis, s in starts.items()]
    if mode is GatherScatterMode.CLIP:
        starts = {axis: _clipped(s, shape[axis]) for axis, s in starts.items()}
    return starts, jnp.all(jnp.stack(inside))


def _gather(equation: Equation, shapes: Any) -> Callable | None:
    params, shape = equation.params, shapes[0]
    numbers, sizes, mode = (
        params[name] for name in ("dimension_numbers", "slice_sizes", "mode")
    )
    if len(shapes[1]) != 1 or numbers.operand_batching_dims:
        return None
    axes = numbers.start_index_map
    if not _one_or_all(sizes, shape) or any(sizes[a] != 1 for a in axes):
        return None

    def read(x: Any, indices: Any) -> Any:
        starts, inside = _starts(indices, axes, shape, mode)
        here = {
            a: jax.lax.broadcasted_iota(s.dtype, shape, a) == s
            for a, s in starts.items()
        }
        rows = jnp.where(_everywhere(here, shape), x, jnp.zeros_like(x))
        row = rows.sum(tuple(here), keepdims=True)
        row = row.reshape([sizes[a] for a in _kept(numbers, len(shape))])
        if mode is not GatherScatterMode.FILL_OR_DROP:
            return row
        fill = params["fill_value"]
        fill = jnp.asarray(jnp.nan if fill is None else fill, row.dtype)
        return jnp.where(inside, row, fill)

    return read


def _kept(numbers: Any, ndim: int) -> list[int]:
    return [a for a in range(ndim) if a not in numbers.collapsed_slice_dims]


def _scatter(equation: Equation, shapes: Any) -> Callable | None:
    params, shape = equation.params, shapes[0]
    numbers, mode = params["dimension_numbers"], params["mode"]
    if len(shapes[1]) != 1 or numbers.operand_batching_dims:
        return None
    axes = [int(axis) for axis in numbers.scatter_dims_to_operand_dims]
    kept = [a for a in range(len(shape)) if a not in numbers.inserted_window_dims]
    whole = [1 if a in axes else shape[a] for a in kept]
    if tuple(whole) != tuple(shapes[2]):
        return None
    sizes = [1 if a in axes else n for a, n in enumerate(shape)]
    adds = equation.primitive is SCATTER_ADD

    def write(x: Any, indices: Any, y: Any) -> Any:
        starts, inside = _starts(indices, axes, shape, mode)
        here = {
            a: jax.lax.broadcasted_iota(s.dtype, shape, a) == s
            for a, s in starts.items()
        }
        mask = _everywhere(here, shape)
        if mode is GatherScatterMode.FILL_OR_DROP:
            mask = mask & inside
        y = jnp.broadcast_to(y.reshape(sizes), shape)
        if adds:
            return x + jnp.where(mask, y, jnp.zeros_like(y))
        return jnp.where(mask, y, x)

    return write


_BUILDERS: dict[Any, Callable[[Equation, Any], Callable | None]] = {
    prims.dynamic_slice_p: _read_slice,
    prims.dynamic_update_slice_p: _write_slice,
    prims.gather_p: _gather,
    prims.scatter_p: _scatter,
    SCATTER_ADD: _scatter,
}
