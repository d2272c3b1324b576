"""The interface of local rules: relation by relation, no product of groups."""

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree, Shaped

from .._relation import Relation


@dataclasses.dataclass(frozen=True)
class RelationJacobian:
    """The derivatives of the local program that concern one relation, of one sample.

    **Attributes:**

    - `transition`: D, `transition[s'][s]` a vector over units, None where it is
      structurally zero.
    - `direct`: df, `direct[s']` of the shape of y, None where y does not feed slot s'.
    - `operands`: the values of the operands of the use, the weight among them.
    """

    transition: Sequence[Sequence[Shaped[Array, " units"] | None]]
    direct: Sequence[Shaped[Array, "..."] | None]
    operands: tuple[Any, ...]


class LocalRule(eqx.Module):
    """A learning rule that works relation by relation.

    The step calls `init` once, `update` once per step and sample, and `gradient` once
    per gradient with all samples of a batch.
    """

    @abstractmethod
    def init(self, relation: Relation) -> PyTree:
        """The zero trace of one sample."""

    @abstractmethod
    def update(
        self, relation: Relation, trace: PyTree, jacobian: RelationJacobian
    ) -> PyTree:
        """The trace after one more step of one sample."""

    @abstractmethod
    def gradient(
        self,
        relation: Relation,
        trace: PyTree,
        signal: Sequence[Shaped[Array, "..."]],
    ) -> Shaped[Array, "..."]:
        """The weight's gradient: the signal, spread over y per slot, times the trace.

        A batch is a leading axis of both, and is summed.
        """
