"""A weight that meets many places of one unit: one trace for all of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from .._custom_types import Labels
from ._base import OpRule
from ._products import cast, sum_of_product


@dataclasses.dataclass(frozen=True)
class Merged(OpRule):
    """The trace of another rule, summed over axes along which y feeds one unit.

    Whatever is at these places decays alike from then on, so that only the sum matters:
    the positions of a pooled convolution, the substeps of a loop.
    """

    rule: OpRule
    axes: tuple[int, ...]
    """The axes of the rule's own trace that are summed."""

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.name

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        where = tuple(
            0 if axis in self.axes else slice(None)
            for axis in range(len(self.rule.trace_shape))
        )
        return self.rule.expand(v)[where]

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        return self.rule.influence(df, operands).sum(self.axes)

    def accumulate(
        self,
        dfs: Shaped[Array, "steps ..."],
        operands: tuple[Any, ...],
        stacked: Sequence[bool],
    ) -> Shaped[Array, "..."]:
        derivative = self.rule._derivatives(operands, stacked)
        if derivative is None:
            return super().accumulate(dfs, operands, stacked)
        dfs = jax.vmap(self.rule.expand)(dfs)
        axes = (0, *(axis + 1 for axis in self.axes))
        return sum_of_product(dfs, cast(derivative, dfs.dtype), axes)


def merge_axes(rule: OpRule, units: Labels) -> OpRule:
    """The rule, summed over the axes along which `units`, the unit of each element of
    y, does not change."""
    shape = rule.trace_shape
    places = np.asarray(rule.expand(jnp.asarray(units, jnp.int32)))
    axes = tuple(
        axis
        for axis in rule.summed
        if shape[axis] > 1
        and places.shape[axis] == shape[axis]
        and (places == places.take([0], axis)).all()
    )
    if not axes:
        return rule
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    return Merged(
        trace_shape=tuple(shape[axis] for axis in kept),
        weight_shape=rule.weight_shape,
        summed=tuple(kept.index(axis) for axis in rule.summed if axis not in axes),
        rule=rule,
        axes=axes,
    )
