"""From uses of weights to relations, or to a decision that says why not.

A use is an equation y = op(..., w, ...) with a weight among its operands. It is related
to a hidden group if y feeds units of that group in the local program; the unit map says
which element of y feeds which unit. A use that feeds units of two groups gives two
relations, each blind to the other's elements.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from ._canonicalise import wrapped
from ._errors import CompileError
from ._flatten import flatten_unfolded
from ._group import HiddenGroup
from ._jaxpr import MUL, Equation, Origin, Program, Ref, aval_of, bind
from ._locality import Edge, Locality
from ._op_rules import SMALL, Dense, Elementwise, OpRule, OpRules, merge_axes, op_rule
from ._pieces import Pieces
from ._presynaptic import Presynaptic, find_presynaptic
from ._reads import NONE, Reads
from ._unit_map import UnitMap, unit_map
from ._units import Units


class Relation(eqx.Module):
    """One use of a weight and the hidden group whose units it feeds.

    A use is an equation y = op(..., w, ...) of the step; w may be a param or anything
    computed from params alone. A relation keeps one trace per slot that it can reach.

    **Attributes:**

    - `weight`: the key paths of the params that the weight is computed from.
    - `group`: the number of the hidden group in `graph.groups`.
    - `slots`: the slots of the group that have a trace, in the order of the trace.
    - `op`: the op rule, which knows the layout of the trace; `op.name` says which.
    - `source`: the line of code of the use.
    - `weight_shape`, `y_shape`, `trace_shape`: shapes of the weight as it is used, of
      y, and of the trace of one slot and one sample.
    - `units`: for each element of y the unit that it feeds, -1 for none.
    - `name`: the key paths in one string.

    !!! example

        ```python
        for relation in graph.relations:
            print(relation.name, relation.y_shape, graph.groups[relation.group].leaves)
        ```
    """

    weight: tuple[str, ...] = eqx.field(static=True)
    group: int = eqx.field(static=True)
    slots: tuple[int, ...] = eqx.field(static=True)
    reached: tuple[int, ...] = eqx.field(static=True)
    """The slots that y feeds within the step; the others are fed through these."""
    op: OpRule = eqx.field(static=True)
    source: str = eqx.field(static=True)
    ref: int = eqx.field(static=True)
    """The number of the weight's value in the program."""
    equation: Equation = eqx.field(static=True)
    operand: int = eqx.field(static=True)
    y: int = eqx.field(static=True)
    y_dtype: Any = eqx.field(static=True)
    trace_dtypes: tuple[Any, ...] = eqx.field(static=True)
    weight_dtype: Any = eqx.field(static=True)
    derivative_shape: tuple[int, ...] | None = eqx.field(static=True)
    """The shape of dy/dw where the op rule gives it and all is real."""
    reads: tuple[bool, ...] = eqx.field(static=True)
    """Per operand of the use, whether the influence depends on its value."""
    links: tuple[tuple[int, ...] | None, ...] = eqx.field(static=True)
    """Per entry of `slots` None, or that its trace needs no array of its own: no old
    slot acts on it and it acts on no later step, so that it is df . dy/dw of this very
    step and a multiple of the traces of these other slots."""
    alike: tuple[bool, ...] = eqx.field(static=True)
    """Per entry of `slots`, whether the trace is the same for all units: then it has
    the shape of dy/dw."""
    map: UnitMap
    presynaptic: Presynaptic | None = None
    """What the x of w * x or w @ x is copied from, where that is smaller, for a rule
    that filters x alone."""
    first: Int[Array, " units"] | None = None
    """For each unit an element of y that feeds it, where all of these have the same df,
    for a rule that filters df alone."""
    exits: int = eqx.field(static=True, default=0)
    """By how many values its group acts beyond its units, where a rule filters them."""
    passes: bool = eqx.field(static=True, default=False)
    """Whether a rule passes a signal on by an average of derivatives by this y."""
    same_x: int | None = eqx.field(static=True, default=None)
    """The number of the first relation with the same dy/dw, None if that is this."""
    same_df: int | None = eqx.field(static=True, default=None)
    """The number of the first relation with the same df, None if that is this."""
    pieces: Pieces | None = None
    """What of df is that of earlier relations, where that is not all."""

    @property
    def operands(self) -> tuple[Ref, ...]:
        """What a rule is told: the operands of the use and what x is copied from."""
        if self.presynaptic is None:
            return self.equation.inputs
        return *self.equation.inputs, self.presynaptic.ref

    @property
    def read(self) -> tuple[bool, ...]:
        """Per operand, whether the trace depends on its value."""
        if self.presynaptic is None:
            return self.reads
        return *(False for _ in self.reads), True

    @property
    def values(self) -> tuple[int, ...]:
        """Those of the operands that are values, without the literals."""
        return tuple(ref for ref in self.operands if isinstance(ref, int))

    @property
    def edge(self) -> Edge:
        return self.equation.index, self.operand

    @property
    def name(self) -> str:
        return " * ".join(self.weight) or "a constant"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.op.weight_shape

    @property
    def y_shape(self) -> tuple[int, ...]:
        return self.map.shape

    @property
    def trace_shape(self) -> tuple[int, ...]:
        return self.op.trace_shape

    @property
    def units(self) -> Int[Array, "..."]:
        return self.map.positions()

    def whole(self) -> "Relation":
        """With x and df as they are."""
        return dataclasses.replace(self, presynaptic=None, first=None, pieces=None)

    @property
    def drive_shape(self) -> tuple[int, ...]:
        """The shape of df as a rule is told it: that of y, or one element per unit."""
        return self.y_shape if self.first is None else (self.map.units,)

    def spread(self, v: Shaped[Array, "*lead _"]) -> Shaped[Array, "..."]:
        """A vector over units as one that multiplies df."""
        return self.map.spread(v) if self.first is None else v

    def expand(self, v: Shaped[Array, " units"]) -> Shaped[Array, "..."]:
        """A vector over units, shaped so that it multiplies a trace."""
        return self.op.expand(self.map.spread(v))

    def y_of(self, w: Any, operands: tuple[Any, ...]) -> Any:
        """y for the weight `w` and the other operands as they are."""
        args = list(operands[: len(self.equation.inputs)])
        args[self.operand] = w
        return bind(self.equation, args)[self.equation.outputs.index(self.y)]

    @property
    def forms(self) -> tuple[str, ...]:
        """Per entry of `slots`, how its trace is smaller than others, for a reader."""
        pairs = zip(self.links, self.alike, strict=True)
        return tuple(
            " (of this step alone)" if links is not None else " (a vector)" * alike
            for links, alike in pairs
        )

    def derivative(self, operands: tuple[Any, ...]) -> Shaped[Array, "..."]:
        """dy/dw, shaped to broadcast against the trace, however large."""
        found = self.op.derivative(operands)
        if found is not None:
            return found
        one = jnp.ones(self.y_shape, self.y_dtype)
        whole = self.op.influence(one, operands)
        real = not jnp.issubdtype(self.weight_dtype, jnp.complexfloating)
        if not jnp.iscomplexobj(one) or not real:
            return whole
        # By a real weight an influence is the real part of a product.
        imaginary = self.op.influence(-1j * one, operands)
        return jax.lax.complex(whole.real, imaginary.real)

    def contract_factors(self, df: Any, derivative: Any) -> Shaped[Array, "..."]:
        """`op.contract` of a df and of a dy/dw or what the x of it is copied from; an
        axis in front of both is summed."""
        spread = self.map.spread if self.first is not None else lambda v: v
        if self.presynaptic is None:
            return self.op.contract([spread(df)], [derivative])

        def copied(value: Any) -> Any:
            assert self.presynaptic is not None
            w = jnp.zeros(self.weight_shape, value.dtype)
            x = self.presynaptic.copied(value)
            return self.derivative((w, x) if self.operand == 0 else (x, w))

        def contract(df: Any, value: Any) -> Any:
            return self.op.contract_derivative(spread(df), copied(value))

        if derivative.ndim == len(self.presynaptic.shape):
            return contract(df, derivative)
        if self.presynaptic.positions.size <= SMALL or self.op.summed:
            each = jax.vmap(copied)(derivative)
            return self.op.contract_derivative(spread(df), each)

        # Some versions of XLA would make the copies of all samples first.
        def add(total: Any, sample: Any) -> tuple[Any, None]:
            return total + contract(*sample), None

        one = jax.eval_shape(contract, df[0], derivative[0])
        zero = jnp.zeros(one.shape, one.dtype)
        return jax.lax.scan(add, zero, (df, derivative))[0]

    @property
    def array_slots(self) -> tuple[int, ...]:
        """The slots whose trace is an array."""
        pairs = zip(self.slots, self.links, strict=True)
        return tuple(slot for slot, links in pairs if links is None)

    def array_shape(self, slot: int) -> tuple[int, ...]:
        """The shape of the trace of one slot and one sample where it is an array."""
        alike = self.alike[self.slots.index(slot)]
        shape = self.derivative_shape if alike else self.op.trace_shape
        return self.op.trace_shape if shape is None else shape

    def __repr__(self) -> str:
        where = f", {self.source}" if self.source else ""
        return (
            f"Relation({self.name} {list(self.weight_shape)} -> y "
            f"{list(self.y_shape)} -> group {self.group}; {self.op.name} trace "
            f"{list(self.trace_shape)} on slots {list(self.slots)}{where})"
        )


@dataclasses.dataclass(frozen=True)
class Use:
    """A weight among the operands of an equation of the step."""

    equation: Equation
    operand: int
    output: int

    @property
    def ref(self) -> int:
        return self.equation.inputs[self.operand]

    @property
    def y(self) -> int:
        return self.equation.outputs[self.output]


def find_uses(program: Program) -> list[Use]:
    """Every place where a trainable weight meets the data of the step."""
    uses = []
    for equation in program.equations:
        data = [
            o
            for o, ref in enumerate(equation.outputs)
            if program.origins[ref] is Origin.DATA and program.avals[ref].inexact
        ]
        for k, ref in equation.operands:
            if program.origins[ref] is Origin.WEIGHT and equation.differentiable:
                uses.extend(Use(equation, k, output) for output in data)
    return uses


def related_groups(use: Use, units: Units, locality: Locality) -> list[int]:
    """The groups that a use feeds in the local program."""
    feeds = locality.feeds.get(use.y)
    if feeds is None:
        return []
    return sorted({int(group) for group in units.group[feeds[feeds >= 0]]})


def _trace_dtype(state: Any, weight: Any) -> Any:
    """That of the state; complex for a complex weight."""
    if not jnp.issubdtype(weight, jnp.complexfloating):
        return state
    return jnp.dtype(jnp.complex128 if state == jnp.float64 else jnp.complex64)


def _derivative_shape(
    program: Program, use: Use, op: OpRule, weight: Any
) -> tuple[int, ...] | None:
    real = not any(
        jnp.issubdtype(dtype, jnp.complexfloating)
        for dtype in (weight.dtype, program.avals[use.y].dtype)
    )
    specs = [aval_of(program.avals, ref) for ref in use.equation.inputs]
    specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in specs]
    found = jax.eval_shape(lambda *args: op.derivative(args), *specs)
    return found.shape if real and found is not None else None


def _reads(program: Program, use: Use, op: OpRule) -> tuple[bool, ...]:
    specs = [aval_of(program.avals, ref) for ref in (use.y, *use.equation.inputs)]
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in specs]
    closed = jax.make_jaxpr(lambda df, *args: op.influence(df, args))(*shapes)
    try:
        found, _ = flatten_unfolded(closed, wrapped)
    except CompileError:  # A call that the compiler cannot read: perhaps on all.
        return (True,) * len(use.equation.inputs)
    read = {ref for equation in found.equations for ref in equation.values}
    return tuple(ref in read for ref in found.inputs[1:])


def _presynaptic(
    program: Program, use: Use, op: OpRule, reads: Reads
) -> Presynaptic | None:
    by_x = isinstance(op, Dense) or (
        isinstance(op, Elementwise) and use.equation.primitive is MUL
    )
    avals = [aval_of(program.avals, ref) for ref in (use.y, *use.equation.inputs)]
    if not by_x or any(jnp.iscomplexobj(a) or not a.inexact for a in avals):
        return None
    return find_presynaptic(program, reads, use.equation.inputs[1 - use.operand])


def _links(
    group: HiddenGroup, slots: tuple[int, ...], separable: bool
) -> tuple[tuple[int, ...] | None, ...]:
    """What the field `links` of a relation says."""
    found: dict[int, tuple[int, ...] | None] = {}
    for slot in slots:
        row = group.transition_matrix[slot]
        column = (other[slot] for other in group.transition_matrix)
        found[slot] = None
        if separable and not any(row) and not any(column):
            reads = [s for s in slots if group.within_matrix[slot][s]]
            through = ((s,) if found[s] is None else found[s] for s in reads)
            found[slot] = tuple(sorted({s for links in through for s in links or ()}))
    return tuple(found.values())


def make_relation(
    program: Program,
    use: Use,
    number: int,
    units: Units,
    locality: Locality,
    group: HiddenGroup,
    names: tuple[str, ...],
    op_rules: OpRules,
    reads: Reads,
) -> Relation:
    """The relation of a use to group `number`."""
    links = [
        [a or b for a, b in zip(direct, within, strict=True)]
        for direct, within in zip(
            group.transition_matrix, group.within_matrix, strict=True
        )
    ]
    feeds = locality.feeds[use.y]
    mine = (feeds >= 0) & (units.group[feeds] == number)
    positions = np.where(mine, units.position[feeds], NONE)
    fed = locality.seeds.get(use.y, locality.bits[use.y])[mine]
    bits = int(np.bitwise_or.reduce(fed, initial=0))
    reached = tuple(s for s in range(group.slots) if (bits >> s) & 1)
    kept = set(reached)
    while True:
        more = {t for t, row in enumerate(links) if any(row[s] for s in kept)} | kept
        if more == kept:
            break
        kept = more
    slots = tuple(slot for slot in group.order if slot in kept)
    op = op_rule(program, use.equation, use.operand, use.output, op_rules)
    shape, weight = program.avals[use.y].shape, program.avals[use.ref]
    op = merge_axes(op, positions.reshape(shape))
    smaller = _derivative_shape(program, use, op, weight)
    return Relation(
        weight=names,
        group=number,
        slots=slots,
        reached=reached,
        op=op,
        source=use.equation.source,
        ref=use.ref,
        equation=use.equation,
        operand=use.operand,
        y=use.y,
        y_dtype=program.avals[use.y].dtype,
        trace_dtypes=tuple(_trace_dtype(group.dtypes[s], weight.dtype) for s in slots),
        weight_dtype=weight.dtype,
        derivative_shape=smaller,
        reads=_reads(program, use, op),
        links=_links(group, slots, smaller is not None),
        alike=(False,) * len(slots),
        map=unit_map(positions, group.units, shape),
        presynaptic=_presynaptic(program, use, op, reads),
    )
