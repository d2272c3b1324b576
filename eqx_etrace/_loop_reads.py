"""What the results of a loop read, by way of all its substeps.

For every value of the body a sparse boolean matrix says which elements of the body's
inputs it reads. The carry goes round until nothing new is found. Products with what was
a weight are cut, and add nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ._custom_types import Labels
from ._flatten import Convert, flatten_body
from ._jaxpr import Equation, Origin, Program, Ref, loop_counts
from ._loop import Loop, loop_origins
from ._pattern import identity, through


# No unit reads more elements than this, and beyond it the matrices fill up.
_MOST = 64


def find_loop(
    program: Program,
    equation: Equation,
    known: Callable[[Ref], Any | None],
    make_reads: Callable[[Program, Mapping[int, Any]], Any],
    convert: Convert,
) -> tuple[Loop, Any]:
    """A loop and the reads of its body."""

    fixed, _ = loop_counts(equation.params)
    origins = loop_origins(
        equation,
        [
            program.origins[ref] if isinstance(ref, int) else Origin.CONSTANT
            for ref in equation.inputs
        ],
    )
    origins = [Origin.PREPARED if o is Origin.WEIGHT else o for o in origins]
    values = (known(ref) for ref in equation.inputs[:fixed])
    given = {i: value for i, value in enumerate(values) if value is not None}
    body, found = flatten_body(equation.params["jaxpr"], origins, convert, given)
    constants = dict(zip(body.constants, found, strict=True))
    constants |= {body.inputs[i]: value for i, value in given.items()}
    reads = make_reads(body, constants)
    cuts = frozenset(
        (inner.index, k)
        for inner in body.equations
        if reads.is_mixing(inner) and _prepared(body, inner)
        for k, ref in inner.operands
        if body.origins[ref] is Origin.DATA and body.avals[ref].inexact
    )
    return Loop(equation, body, constants, cuts), reads


def _prepared(body: Program, equation: Equation) -> bool:
    return any(body.origins[ref] is Origin.PREPARED for ref in equation.values)


def loop_reads(loop: Loop, reads: Any) -> list[list[Labels]]:
    """Per operand of the loop and per result, the reads as `Reads` gives them, or
    None where they are too many."""
    params, body = loop.equation.params, loop.body
    first, count = loop_counts(params)
    length = params["length"]
    sizes = [body.avals[ref].size for ref in body.inputs]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    found = _through(loop, reads)
    carried = slice(starts[first], starts[first + count])
    outputs = [_matrix(found, body, ref, starts[-1]) for ref in body.outputs]
    state, rows = outputs[:count], outputs[count:]
    around = _closure(state, carried, int(starts[-1]))
    tables: list[list[Labels]] = []
    shapes = [body.avals[ref].shape for ref in body.outputs]
    places = np.concatenate(
        [[0], np.cumsum([body.avals[r].size for r in body.outputs])]
    )
    for k, size in enumerate(sizes):
        columns = slice(starts[k], starts[k] + size)
        spread = length if k >= first + count else 1
        mine = []
        for o in range(count):
            block = around[places[o] : places[o + 1], columns]
            mine.append(_padded(block, shapes[o], spread, size))
        for o, row in enumerate(rows, count):
            block = _beyond(row, around, carried)[:, columns]
            table = _padded(block, shapes[o], spread, size)
            if table is not None:
                table = np.broadcast_to(
                    table[:, None], (table.shape[0], length, *shapes[o])
                )
            mine.append(table)
        tables.append(mine)
    return tables


def _through(loop: Loop, reads: Any) -> dict[int, Any]:
    body = loop.body
    sizes = {ref: body.avals[ref].size for ref in body.inputs}
    found = {
        ref: matrix
        for ref, matrix in identity(sizes).items()
        if body.origins[ref] is Origin.DATA and body.avals[ref].inexact
    }
    return through(body.equations, body.avals, reads, found, loop.cuts)


def _matrix(found: Mapping[int, Any], body: Program, ref: int, width: Any) -> Any:
    from scipy.sparse import csr_matrix

    if ref in found:
        return found[ref]
    return csr_matrix((body.avals[ref].size, int(width)), dtype=bool)


def _closure(state: Sequence[Any], carried: slice, width: int) -> Any:
    """What the carry reads after any number of substeps, one at least."""
    from scipy.sparse import csr_matrix, vstack

    if not state:
        return csr_matrix((0, width), dtype=bool)
    once = csr_matrix(vstack(state))
    total = once
    while True:
        more = total + total[:, carried] @ once
        if more.nnz == total.nnz:
            return total
        total = more


def _beyond(row: Any, around: Any, carried: slice) -> Any:
    """A result of each substep: it reads the carry at its start, of any age."""
    return row + row[:, carried] @ around


def _padded(block: Any, shape: tuple[int, ...], spread: int, size: int) -> Labels:
    """A sparse matrix as reads: per output element its columns, NONE where fewer;
    `spread` times, once for each row of an operand that the loop goes along."""
    block = block.tocsr()
    counts = np.diff(block.indptr)
    most = int(counts.max(initial=0))
    if most > _MOST:
        return None
    table = np.full((max(most, 1), counts.size), -1, np.int64)
    rank = np.arange(block.indices.size) - np.repeat(block.indptr[:-1], counts)
    table[rank, np.repeat(np.arange(counts.size), counts)] = block.indices
    if spread != 1:
        steps = np.arange(spread)[:, None, None] * size
        table = np.where(table >= 0, table[None] + steps, -1).reshape(-1, counts.size)
    return table.reshape(-1, *shape)
