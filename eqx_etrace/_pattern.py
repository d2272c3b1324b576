"""Which elements act on which through many equations, as sparse boolean matrices."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ._custom_types import Labels
from ._jaxpr import Aval, Equation


def flat(reads: Labels) -> Labels:
    """(reads, elements of the output), also where one of them is zero."""
    return reads.reshape(reads.shape[0], math.prod(reads.shape[1:]))


def through(
    equations: Iterable[Equation],
    avals: tuple[Aval, ...],
    reads: Any,
    found: dict[int, Any],
    cuts: Iterable[tuple[int, int]] = (),
) -> dict[int, Any]:
    """Per value what each of its elements reads, from that of the values in `found`.

    Rows are elements; columns are whatever those of `found` are.
    """
    cuts = frozenset(cuts)
    for equation in equations:
        if not equation.differentiable:
            continue
        for k, ref in equation.operands:
            if ref not in found or (equation.index, k) in cuts:
                continue
            arrays = zip(equation.outputs, reads(equation, k), strict=True)
            for out, array in arrays:
                if avals[out].inexact:
                    term = _select(array, found[ref], avals[out].size)
                    found[out] = found[out] + term if out in found else term
    return found


def _select(array: Labels, matrix: Any, size: int) -> Any:
    """The rows of the operand's matrix that each output element reads, together."""
    from scipy.sparse import csr_matrix

    if array is None:
        union = csr_matrix(matrix.sum(axis=0) > 0)
        return csr_matrix(np.ones((size, 1), bool)) @ union
    rows = flat(array)
    used = rows >= 0
    where = (np.broadcast_to(np.arange(size), rows.shape)[used], rows[used])
    shape = (size, matrix.shape[0])
    return csr_matrix((np.ones(used.sum(), bool), where), shape=shape) @ matrix


def identity(sizes: Mapping[int, int]) -> dict[int, Any]:
    """Each value reads itself: its elements are columns, value after value."""
    from scipy.sparse import csr_matrix

    starts = np.concatenate([[0], np.cumsum(list(sizes.values()))])
    found = {}
    for start, (ref, size) in zip(starts[:-1], sizes.items(), strict=True):
        where = (np.arange(size), start + np.arange(size))
        ones, shape = np.ones(size, bool), (size, int(starts[-1]))
        found[ref] = csr_matrix((ones, where), shape=shape)
    return found
