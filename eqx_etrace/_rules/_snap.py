"""SnAp: RTRL on the entries that a few steps can reach."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from ._drtrl import DRTRL
from ._global import Dynamics, GlobalRule, Sizes, Structure
from ._uses import Uses


def SnAp(order: int) -> "DRTRL | SparseRTRL":  # noqa: N802
    r"""The sparse n-step approximation of RTRL.

    Of $J = dh/dw$ it keeps the entries that a weight can reach within n steps, and
    drops the others at every step,

    $$J^t = \left(D^t J^{t-1} + \frac{\partial h^t}{\partial w}\right) \circ M_n,$$

    where $M_1$ holds the state variables of the unit that a weight feeds and $M_{n+1}$
    what the structure of $D$ reaches from $M_n$. With n as large as the longest path of
    the network, it is `RTRL`. Where all units are connected that is n = 2; its use
    is in sparse recurrences.

    **Arguments:**

    - `order`: n, at least 1.

    **Returns:** for n = 1 `DRTRL(scope="unit")`, which is the same; else a global rule.
    Structure is what the compiler reads off the step: edge lists, sparse matrices and
    elementwise recurrences are sparse, a dense matrix multiplied by a mask is not.

    Memory: batch x entries of $M_n$; time grows with these and with those of $D$.

    **Raises:** `ValueError` for an order that is no integer of at least 1.

    **Source:** Menick et al., *A practical sparse approximation for real time recurrent
    learning*, ICLR 2021.

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.SnAp(2))
        ```
    """
    if not isinstance(order, int) or isinstance(order, bool) or order < 1:
        raise ValueError(
            f"order: got {order!r}, expected an integer of at least 1. It counts steps."
        )
    return DRTRL(scope="unit") if order == 1 else SparseRTRL(order)


class Plan(eqx.Module):
    """Where the entries of J are, and what they are made of; all arrays of integers."""

    kept: tuple[Any, Any]
    """The row and column of each entry."""
    terms: tuple[Any, Any, Any]
    """Entry += D entry . old entry, the numbers of all three."""
    moves: tuple[Any, Any, Any]
    """The row and column of each entry of D, and the colour of its column."""
    fresh: tuple[Any, Any, Any]
    """The number of each entry with a direct part, its column and its row's colour."""
    colours: tuple[int, int] = eqx.field(static=True)
    """How many columns of D and rows of the direct part are told apart."""
    weights: int = eqx.field(static=True)
    by_column: Any
    """The colour of each column of D."""
    by_row: Any
    """The colour of each row of the direct part."""

    def step(
        self,
        dynamics: Dynamics,
        transition: Shaped[Array, " moves"],
        trace: Shaped[Array, " entries"],
    ) -> Shaped[Array, " entries"]:
        """D J + dh/dw on these entries, from the entries of D and of J."""
        rows = jnp.arange(self.colours[1], dtype=jnp.int32)
        seeds = (rows[:, None] == self.by_row[None]).astype(trace.dtype)
        pulled = jax.vmap(lambda seed: dynamics.vjp(seed)[1])(seeds)
        new, move, old = self.terms
        terms = transition[move] * trace[old]
        total = jax.ops.segment_sum(terms, new, trace.size, indices_are_sorted=True)
        entry, column, colour = self.fresh
        return total.at[entry].add(pulled[colour, column], unique_indices=True)

    def pulled(
        self, trace: Shaped[Array, " entries"], signal: Shaped[Array, " states"]
    ) -> Shaped[Array, " weights"]:
        """signal . J."""
        row, column = self.kept
        return jax.ops.segment_sum(signal[row] * trace, column, self.weights)


class SparseRTRL(GlobalRule):
    """What `SnAp` gives for an order of at least 2."""

    credit: ClassVar[str] = "through what it can reach within a few steps, see `SnAp`"

    order: int = eqx.field(static=True)
    plan: Plan | None = None

    def bound(
        self, structure: Callable[[], Structure], uses: Callable[[], Uses]
    ) -> "SparseRTRL":
        """With the pattern that the step has."""
        del uses
        return SparseRTRL(self.order, make_plan(structure(), self.order))

    @property
    def _bound_plan(self) -> Plan:
        assert self.plan is not None  # The compiler has bound it.
        return self.plan

    def init(self, sizes: Sizes, sample: Int[Array, ""]) -> Shaped[Array, " entries"]:
        """Zeros, one for each entry of the pattern."""
        del sample
        return jnp.zeros(self._bound_plan.kept[0].shape, sizes.dtype)

    def update(
        self, dynamics: Dynamics, trace: Shaped[Array, " entries"]
    ) -> Shaped[Array, " entries"]:
        """One step of the recursion above."""
        plan, sizes = self._bound_plan, dynamics.sizes
        columns = jnp.arange(plan.colours[0], dtype=jnp.int32)
        seeds = (columns[:, None] == plan.by_column[None]).astype(sizes.dtype)
        pushed = jax.vmap(dynamics.jvp)(seeds)
        row, _, colour = plan.moves
        return plan.step(dynamics, pushed[colour, row], trace)

    def gradient(
        self, trace: Shaped[Array, " entries"], signal: Shaped[Array, " states"]
    ) -> Shaped[Array, " weights"]:
        """signal . J."""
        return self._bound_plan.pulled(trace, signal)


# Terms of the product D J, each an addition a step and three numbers in memory.
_MOST = 1 << 26


def make_plan(structure: Structure, order: int) -> Plan:
    """Where J has entries after so many steps, and how they follow from each other."""
    from scipy.sparse import csr_matrix

    # scipy's own types of these hide their attributes.
    D: Any = csr_matrix(structure.transition)
    direct: Any = csr_matrix(structure.direct)
    kept: Any = csr_matrix(structure.units @ direct)
    for _ in range(order - 1):
        kept = kept + D @ kept
    kept.sort_indices()
    D.sort_indices()
    row, column = kept.nonzero()
    keys = row.astype(np.int64) * kept.shape[1] + column
    by_column, by_row = _colours(D), _colours(csr_matrix(direct.T))
    fresh: Any = direct.nonzero()
    d_row, d_column = D.nonzero()
    return Plan(
        kept=integers(row, column),
        terms=integers(*_terms(kept, keys, d_row, d_column)),
        moves=integers(d_row, d_column, by_column[d_column]),
        fresh=integers(_numbers(keys, kept, *fresh)[0], fresh[1], by_row[fresh[0]]),
        colours=(int(by_column.max()) + 1, int(by_row.max()) + 1),
        weights=int(kept.shape[1]),
        by_column=integers(by_column)[0],
        by_row=integers(by_row)[0],
    )


def integers(*arrays: Any) -> tuple[Any, ...]:
    return tuple(jnp.asarray(array, jnp.int32) for array in arrays)


def _numbers(keys: Any, kept: Any, row: Any, column: Any) -> tuple[Any, Any]:
    """The numbers of entries among those kept, and whether they are."""
    wanted = row.astype(np.int64) * kept.shape[1] + column
    found = np.searchsorted(keys, wanted)
    there = keys[np.minimum(found, keys.size - 1)] == wanted
    return found, there


def _terms(kept: Any, keys: Any, d_row: Any, d_column: Any) -> tuple[Any, Any, Any]:
    """What `Plan.terms` says: each entry (i, k) of D times each kept (k, p), where
    (i, p) is kept too."""
    counts = np.diff(kept.indptr)[d_column]
    if counts.sum() > _MOST:
        raise ValueError(
            f"SnAp: got a step whose pattern takes {counts.sum()} products, expected "
            f"at most {_MOST}. Lower the order, or use RTRL or DRTRL."
        )
    move = np.repeat(np.arange(d_row.size), counts)
    first = np.repeat(kept.indptr[d_column] - (np.cumsum(counts) - counts), counts)
    old = first + np.arange(move.size)
    new, there = _numbers(keys, kept, d_row[move], kept.indices[old])
    new, move, old = new[there], move[there], old[there]
    order = np.argsort(new, kind="stable")
    return new[order], move[order], old[order]


def _colours(matrix: Any) -> Any:
    """A colour for each column, so that no row has two entries of one colour; greedily,
    the fullest columns first."""
    by_column = matrix.tocsc()
    colours = np.full(matrix.shape[1], -1)
    for column in np.argsort(-np.diff(by_column.indptr), kind="stable"):
        rows = by_column.indices[slice(*by_column.indptr[column : column + 2])]
        taken = np.unique(colours[matrix[rows].indices]) if rows.size else rows
        free = np.setdiff1d(np.arange(taken.size + 1), taken)
        colours[column] = free[0]
    return colours
