"""The loss of a sequence: its checks, its mask, and its derivative by the outputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._errors import describe, sentence
from ._graph import ETraceGraph
from ._inputs import window_of
from ._place import spreads
from ._stage import named_leaves


@dataclasses.dataclass(frozen=True)
class Objective:
    """What `loss_fn` gives for the outputs of a graph: `loss_fn(out, target)`."""

    loss_fn: Callable[..., Any]
    has_aux: bool

    def of_step(self, out: PyTree, target: PyTree) -> tuple[Any, Any]:
        """The loss of one step, and what comes with it."""
        found = self.loss_fn(out, target)
        return found if self.has_aux else (found, None)

    def spec(self, graph: ETraceGraph, targets: PyTree) -> Any:
        """Shape and dtype of the loss of one step.

        **Raises:** `ValueError` for anything but a real scalar or, for a batched
        graph, one real number per sample.
        """
        lead = () if graph.batch is None else (graph.batch,)
        outs = [
            jax.ShapeDtypeStruct((*lead, *spec.shape), spec.dtype)
            for spec in graph.out_leaves.specs
        ]
        out = jtu.tree_unflatten(graph.out_leaves.treedef, outs)
        target = jtu.tree_map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), targets
        )
        found = jax.eval_shape(self.loss_fn, out, target)
        told = None
        if self.has_aux:
            if not (isinstance(found, tuple) and len(found) == 2):
                raise ValueError(
                    f"loss_fn: got {type(found).__name__}, expected a pair (loss, aux) "
                    "because of `has_aux=True`. Return both, or leave out `has_aux`."
                )
            found, told = found
        shapes = [(), lead] if lead else [()]
        real = hasattr(found, "dtype") and jnp.issubdtype(found.dtype, jnp.floating)
        if not real or found.shape not in shapes:
            expected = " or ".join(f"float{list(shape)}" for shape in shapes)
            remedy = "Return a scalar loss of one step"
            remedy += ", or one loss per sample." if lead else "."
            raise ValueError(sentence("loss_fn", describe(found), expected, remedy))
        if spreads(graph):
            self._check_samples(lead, found, told, targets)
        return found

    def _check_samples(
        self, lead: tuple[int, ...], loss: Any, aux: PyTree, targets: PyTree
    ) -> None:
        """Raise `ValueError` unless each sample has its own part of everything, so that
        a device can do without those of the others."""
        remedy = "The batch is spread over devices, and each knows its own samples."
        for path, leaf in (
            *named_leaves("loss_fn", loss),
            *named_leaves("aux of loss_fn", aux),
        ):
            if leaf.shape[:1] != lead:
                expected = f"one entry per sample, {lead}, in front"
                raise ValueError(sentence(path, describe(leaf), expected, remedy))
        for path, leaf in named_leaves("targets", targets):
            if leaf.shape[1:2] != lead:
                expected = f"time, then the batch {lead} in front"
                raise ValueError(sentence(path, describe(leaf), expected, remedy))


@dataclasses.dataclass(frozen=True)
class Losses:
    """An objective over some steps, as `_window` wants it: from the leaves of all
    outputs to the losses and the derivative of their weighted sum by the outputs."""

    graph: ETraceGraph
    objective: Objective
    targets: PyTree
    mask: Any | None
    signal: PyTree = None
    """What the rule's learning signal is given, see `_given`."""

    def part(self, number: Any, length: int) -> "Losses":
        """Those of the steps of one window."""
        parts = self.targets, self.mask, self.signal
        targets, mask, signal = window_of(parts, number, length)
        return dataclasses.replace(self, targets=targets, mask=mask, signal=signal)

    def __call__(self, outs: list[Any]) -> tuple[Any, list[Any]]:
        inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in outs]
        moving = [leaf for leaf, moves in zip(outs, inexact, strict=True) if moves]

        def every(moving: list[Any]) -> Any:
            rest = iter(moving)
            pairs = zip(outs, inexact, strict=True)
            leaves = [next(rest) if moves else leaf for leaf, moves in pairs]
            out = jtu.tree_unflatten(self.graph.out_leaves.treedef, leaves)
            return jax.vmap(self.objective.of_step)(out, self.targets)

        losses, pull, aux = jax.vjp(every, moving, has_aux=True)
        if self.mask is None:
            return (losses, aux), pull(jnp.ones_like(losses))[0]
        weight = _against(self.mask, losses).astype(losses.dtype)
        weight = jnp.broadcast_to(weight, losses.shape)
        # What is masked may be no number, and zero times that would be none either.
        given = [_where(self.mask, leaf) for leaf in pull(weight)[0]]
        return (_where(self.mask, losses * weight), aux), given


def weighted(loss: Any, mask: Any | None) -> tuple[Any, Any]:
    """The weighted sum of the losses of one step, and each of them."""
    if mask is None:
        return jnp.sum(loss), loss
    kept = _where(mask, loss * _against(mask, loss).astype(loss.dtype))
    return jnp.sum(kept), kept


def _against(mask: Any, leaf: Any) -> Any:
    return mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))


def _where(mask: Any, leaf: Any) -> Any:
    kept = _against(mask, leaf).astype(bool)
    return jnp.where(kept, leaf, jnp.zeros((), leaf.dtype))


def count(mask: Any | None, shape: tuple[int, ...], dtype: Any) -> Any:
    """How many losses of this shape the mask leaves, by weight."""
    if mask is None:
        size = 1
        for n in shape:
            size *= n
        return jnp.asarray(size, dtype)
    ones = jnp.ones(shape, dtype)
    return jnp.sum(_against(mask, ones).astype(dtype) * ones)
