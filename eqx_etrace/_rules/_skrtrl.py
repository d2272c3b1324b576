"""SK-RTRL: the diagonal blocks of RTRL exactly, and a sketch of what is left."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from ._global import Dynamics, GlobalRule, Sizes, Structure
from ._snap import Plan, integers, make_plan
from ._uses import Uses


class Sketch(NamedTuple):
    """The trace of `SKRTRL`: J is estimated by S + left . right^T.

    - `entries`: S, the entries within units, in the order of its pattern.
    - `left`: (states, rank), `right`: (weights, rank).
    - `bound`: no less than the Frobenius norm of the error.
    """

    entries: Shaped[Array, "*batch entries"]
    left: Shaped[Array, "*batch states rank"]
    right: Shaped[Array, "*batch weights rank"]
    bound: Shaped[Array, "*batch"]


class SKRTRL(GlobalRule):
    r"""Sketched real-time recurrent learning.

    $J = dh/dw$ is estimated by $S + L R^\top$. $S$ follows the diagonal blocks of
    units, $S^t = \mathrm{diag}(D^t)\,S^{t-1} + \partial h^t / \partial w$. What it
    misses, $D L R^\top + \mathrm{offdiag}(D)\,S$, is brought back to the best matrix of
    rank r at every step.

    With rank 0 it is `SnAp(1)`, with as many as there are hidden numbers it is `RTRL`.
    The trace has a certificate: with $\rho = \min(|D|_F, \sqrt{|D|_1 |D|_\infty})$ and
    $\eta$ the norm of what was dropped, $e^t = \rho\,e^{t-1} + \eta$ is no less than
    $|J - S - L R^\top|_F$; it is `trace.bound`.

    **Arguments:**

    - `rank`: r, an integer of at least 0.

    Memory: batch x (weights + hidden state) x rank, and as for `SnAp(1)`; time grows
    with the cube of the hidden state.

    **Raises:** `ValueError` for a rank that is no integer of at least 0.

    **Source:** SK-RTRL, 2026, with `SnAp(1)` of Menick et al., ICLR 2021, as its exact
    part.

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.SKRTRL(8))
        ```
    """

    credit: ClassVar[str] = "through the whole state, by a sketch with an error bound"

    rank: int = eqx.field(static=True)
    plan: tuple[Plan, Any] | None = None
    """Of the diagonal blocks, and the pairs of entries in one column."""

    def __check_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not whole or self.rank < 0:
            raise ValueError(
                f"rank: got {self.rank!r}, expected an integer of at least 0. Try 8."
            )

    def bound(
        self, structure: Callable[[], Structure], uses: Callable[[], Uses]
    ) -> "SKRTRL":
        """With the pattern that the step has."""
        del uses
        found = structure()
        within = found.transition.multiply(found.units)
        plan = make_plan(found._replace(transition=within), 1)
        return SKRTRL(self.rank, (plan, _pairs(np.asarray(plan.kept[1]))))

    def init(self, sizes: Sizes, sample: Int[Array, ""]) -> Sketch:
        """Zeros."""
        del sample
        assert self.plan is not None  # The compiler has bound it.
        rank = min(self.rank, sizes.states)
        shapes = (
            self.plan[0].kept[0].shape,
            (sizes.states, rank),
            (sizes.weights, rank),
            (),
        )
        return Sketch(*(jnp.zeros(shape, sizes.dtype) for shape in shapes))

    def update(self, dynamics: Dynamics, trace: Sketch) -> Sketch:
        """One step of the recursions above."""
        assert self.plan is not None
        plan, pairs = self.plan
        sizes = dynamics.sizes
        D = jax.vmap(dynamics.jvp)(jnp.eye(sizes.states, dtype=sizes.dtype)).T
        row, column, _ = plan.moves
        entries = plan.step(dynamics, D[row, column], trace.entries)
        sketch, dropped = self._brought_back(trace, D, D.at[row, column].set(0), pairs)
        bound = _norm(D) * trace.bound + dropped
        return Sketch(entries, *sketch, bound)

    def _brought_back(
        self, trace: Sketch, D: Any, off: Any, pairs: Any
    ) -> tuple[tuple[Any, Any], Any]:
        """The best approximation of D L R^T + off S, and the norm of what it drops.

        Nothing of the shape of J is formed: with A = [D L, off] and B = [R^T; S] the
        squares of A B are A (B B^T) A^T, and B B^T is as small as D.
        """
        assert self.plan is not None
        plan, _ = self.plan
        row, column = plan.kept
        s, R = trace.entries, trace.right
        states, rank = trace.left.shape
        first, second = pairs
        squares = jnp.zeros((states, states), s.dtype)
        squares = squares.at[row[first], row[second]].add(s[first] * s[second])
        cross = jax.ops.segment_sum(s[:, None] * R[column], row, states)
        inner = jnp.block([[R.T @ R, cross.T], [cross, squares]])
        moved = D @ trace.left
        outer = jnp.concatenate([moved, off], axis=1)
        values, vectors = jnp.linalg.eigh(outer @ inner @ outer.T)
        left = vectors[:, states - rank :]
        right = R @ (moved.T @ left)
        right = right + jax.ops.segment_sum(
            s[:, None] * (off.T @ left)[row], column, plan.weights
        )
        # Rounding counts as dropped, so that the bound stays one.
        slack = jnp.finfo(s.dtype).eps * states * jnp.sum(jnp.abs(values))
        lost = jnp.sum(jnp.maximum(values[: states - rank], 0))
        return (left, right), jnp.sqrt(lost + slack)

    def gradient(
        self, trace: Sketch, signal: Shaped[Array, " states"]
    ) -> Shaped[Array, " weights"]:
        """signal . (S + L R^T)."""
        assert self.plan is not None
        plan = self.plan[0]
        return plan.pulled(trace.entries, signal) + trace.right @ (
            trace.left.T @ signal
        )


def _norm(D: Any) -> Any:
    """No less than the largest singular value."""
    size = jnp.abs(D)
    mixed = jnp.sqrt(size.sum(axis=0).max() * size.sum(axis=1).max())
    return jnp.minimum(jnp.linalg.norm(D), mixed)


def _pairs(column: Any) -> tuple[Any, ...]:
    """The numbers of all pairs of entries in one column."""
    order = np.argsort(column, kind="stable")
    _, counts = np.unique(column, return_counts=True)
    starts = np.cumsum(counts) - counts
    repeats = np.repeat(counts, counts)
    first = np.repeat(np.arange(column.size), repeats)
    offset = np.arange(first.size) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    second = np.repeat(np.repeat(starts, counts), repeats) + offset
    return integers(order[first], order[second])
