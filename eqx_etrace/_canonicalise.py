"""From a staged step to a flat program: which calls are spliced in, rewritten or kept.

| call | what happens |
|---|---|
| jit, remat, plain calls | spliced in: they only wrap |
| custom_jvp, custom_vjp | kept as one equation: spliced in, the rule would be lost |
| a sparse product | gather, multiply, scatter-add: one product per stored entry |
| a linear solve | kept as one equation: its factors are no weights |

and where a weight or the hidden state passes through:

| cond, switch | all branches, and a select of their results |
| scan | unrolled up to `max_unroll`; beyond, its weights are taken out (`_loop`) |
| while | kept if it is free of weights, with its derivative in forward mode |
| ragged_dot | a product over all groups (`_ragged`) |
| a place in the state that data choose | a comparison with every place (`_indexed`) |
| x @ A @ B | x @ (A @ B): one weight in place of two (`_low_rank`) |

Where only data passes, control flow stays as it is. Whatever else credit would have to
pass through is an error, never a silent leaf.

The select of a branch keeps the derivative of the branch that is not taken out of the
gradient, even where it is not a number: what enters a branch, and every product of a
weight in it, goes through a select of its own, whose derivative is zero, not a product
with zero. All of them read the same predicate, so nothing changes in value.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from ._decision import Decision, Kind
from ._errors import CompileError
from ._flatten import Builder, Conversion, Convert, flatten, rewrite
from ._hidden import credit_equations, find_hidden, influence, params_of
from ._indexed import indexed, multiplied
from ._jaxpr import (
    COND,
    CUSTOM,
    IMAG,
    INLINE,
    LINEAR_SOLVE,
    REAL,
    SCAN,
    WHILE,
    Equation,
    Origin,
    Program,
    Ref,
    bind,
    describe_equation,
    inner_jaxpr,
    is_elementwise,
    is_higher_order,
    loop_counts,
    solve_operands,
)
from ._loop import descended
from ._low_rank import low_rank
from ._ragged import ragged
from ._stage import Staged


def wrapped(equation: Equation, guarded: bool) -> Conversion | None:
    """The conversions that do not depend on where credit passes."""
    del guarded
    if equation.primitive in INLINE:
        return lambda b, inputs: b.splice(inner_jaxpr(equation.params), inputs)
    if equation.primitive is sparse.bcoo_dot_general_p:
        return _sparse_product(equation)
    if equation.primitive is LINEAR_SOLVE:
        return _linear_solve(equation)
    return None


def _linear_solve(equation: Equation) -> Conversion:
    """The equation with a stop where it has no derivative: a weight that is factorised,
    or read by the transposed product, is no weight of the equation there."""
    helpers, avals = solve_operands(equation.params)

    def solve(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        stopped = list(inputs)
        for k in range(*helpers.indices(len(inputs))):
            if b.origin(inputs[k]) in (Origin.WEIGHT, Origin.DATA):
                (stopped[k],) = b.trace(lambda a: [jax.lax.stop_gradient(a)], inputs[k])
        return b.keep(dataclasses.replace(equation, inputs=tuple(stopped)), avals)

    return solve


def _sparse_product(equation: Equation) -> Conversion | None:
    """A product of a sparse matrix without batch or dense axes and a dense array."""
    contract, batch = equation.params["dimension_numbers"]
    shape = equation.params["lhs_spinfo"].shape

    def multiply(data: Any, indices: Any, dense: Any) -> list[Any]:
        free = [axis for axis in range(len(shape)) if axis not in contract[0]]
        rest = [axis for axis in range(dense.ndim) if axis not in contract[1]]
        dtype = jnp.result_type(data, dense)
        rows = jnp.transpose(dense, (*contract[1], *rest)).astype(dtype)
        if contract[0]:
            read = tuple(indices[:, axis] for axis in contract[0])
            rows = rows.at[read].get(mode="fill", fill_value=0)
        else:
            rows = jnp.broadcast_to(rows, (data.shape[0], *rows.shape))
        terms = data.reshape(-1, *(1,) * len(rest)).astype(dtype) * rows
        if not free:
            return [terms.sum(0)]
        written = tuple(indices[:, axis] for axis in free)
        zeros = [shape[axis] for axis in free] + [dense.shape[axis] for axis in rest]
        return [jnp.zeros(zeros, dtype).at[written].add(terms, mode="drop")]

    def product(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        return b.trace(multiply, *inputs)

    return None if batch[0] else product


# -- control flow ----------------------------------------------------------------------


def _branches(equation: Equation) -> Conversion:
    """All branches, and a select of their results."""

    def choose(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        index, *operands = inputs
        results = []
        for number, branch in enumerate(equation.params["branches"]):
            (taken,) = b.trace(lambda i, n=number: [i == n], index)
            with b.while_taken(taken):
                args = [
                    b.guard(ref) if b.origin(ref) is Origin.DATA else ref
                    for ref in operands
                ]
                results.append(b.splice(branch, args))
        return [
            b.trace(lambda i, *cases: [jax.lax.select_n(i, *cases)], index, *cases)[0]
            for cases in zip(*results, strict=True)
        ]

    return choose


def _unrolled(equation: Equation) -> Conversion:
    """The steps of a scan one after the other."""
    params = equation.params
    consts, carry = loop_counts(params)

    def unroll(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        fixed, xs = inputs[:consts], inputs[consts + carry :]
        state = list(inputs[consts : consts + carry])
        order = range(params["length"])
        rows = []
        for i in reversed(order) if params["reverse"] else order:
            x = [b.trace(lambda a, i=i: [a[i]], ref)[0] for ref in xs]
            results = b.splice(params["jaxpr"], (*fixed, *state, *x))
            state, row = results[:carry], results[carry:]
            rows.append(row)
        rows = rows[::-1] if params["reverse"] else rows
        columns = zip(*rows, strict=True)
        ys = [b.trace(lambda *a: [jnp.stack(a)], *column)[0] for column in columns]
        return [*state, *ys]

    return unroll


def _forward_mode(equation: Equation, elementwise: bool) -> Conversion:
    """A loop that cannot be run backward, with a Jacobian found on the way forward."""

    def loop(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        return b.trace(run, *inputs)

    @jax.custom_vjp
    def run(*args: Any) -> list[Any]:
        return bind(equation, args)

    def forward(*args: Any) -> tuple[list[Any], Any]:
        moving = [k for k, arg in enumerate(args) if _inexact(arg)]

        def of_moving(*moved: Any) -> list[Any]:
            inputs = list(args)
            for k, arg in zip(moving, moved, strict=True):
                inputs[k] = arg
            return [out for out in bind(equation, inputs) if _inexact(out)]

        moved = [args[k] for k in moving]
        if not elementwise:
            columns = jax.jacfwd(of_moving, tuple(range(len(moved))))(*moved)
        else:
            columns = []
            for k in range(len(moved)):
                tangents = [jnp.full_like(arg, j == k) for j, arg in enumerate(moved)]
                columns.append(jax.jvp(of_moving, moved, tangents)[1])
            columns = list(zip(*columns, strict=True))
        return run(*args), (dict.fromkeys(moving), moved, columns, [*args])

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
        moving, moved, columns, args = residuals
        given = [c for c in cotangents if _inexact(c)]
        found: list[Any] = [None] * len(args)
        for j, (k, arg) in enumerate(zip(moving, moved, strict=True)):
            total = jnp.zeros_like(arg)
            for row, cotangent in zip(columns, given, strict=True):
                if elementwise:
                    term = row[j] * cotangent
                    lost = () if arg.ndim else tuple(range(term.ndim))
                    total = total + term.sum(lost)
                else:
                    axes = cotangent.ndim
                    total = total + jnp.tensordot(cotangent, row[j], axes)
            found[k] = total
        return tuple(found)

    run.defvjp(forward, backward)
    return loop


def _inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


# -- where credit passes ---------------------------------------------------------------


def _converted(equation: Equation, max_unroll: int) -> tuple[Conversion, str] | None:
    """The conversion of a conditional, a loop of known length or a product in groups,
    and what it does."""
    if equation.primitive is COND and not equation.effectful:
        count = len(equation.params["branches"])
        how = f"all {count} branches run, and a select takes the result of one"
        return _branches(equation), how
    if equation.primitive is SCAN and 0 < equation.params["length"] <= max_unroll:
        return _unrolled(equation), f"unrolled to {equation.params['length']} steps"
    return ragged(equation)


def _loop(program: Program, equation: Equation) -> tuple[Conversion, str] | None:
    """The same for a loop of unknown length that reads no weight."""
    if equation.primitive is not WHILE or _reads_weight(program, equation):
        return None
    elementwise = is_elementwise(equation, program.avals)
    size = "diagonal" if elementwise else "dense"
    how = f"a loop of unknown length: a {size} Jacobian, found in forward mode"
    return _forward_mode(equation, elementwise), how


def _long_loop(
    program: Program, equation: Equation, max_unroll: int
) -> tuple[Conversion, str] | None:
    """The same for a loop that is too long to be unrolled and reads weights."""
    if equation.primitive is not SCAN or is_elementwise(equation, program.avals):
        return None
    fixed = equation.inputs[: loop_counts(equation.params)[0]]
    weights = (
        isinstance(r, int) and program.origins[r] is Origin.WEIGHT for r in fixed
    )
    if not any(weights):
        return None
    how = "a long loop, not unrolled: its products with a weight are one product"
    return descended(equation, nested(max_unroll)), how


def nested(max_unroll: int) -> Convert:
    """The conversions inside of a loop or a branch."""

    def convert(equation: Equation, guarded: bool) -> Conversion | None:
        found = _converted(equation, max_unroll)
        return wrapped(equation, guarded) if found is None else found[0]

    return convert


def _reads_weight(program: Program, equation: Equation) -> bool:
    return any(program.origins[ref] is Origin.WEIGHT for ref in equation.values)


def _choose(
    program: Program,
    known: Mapping[int, Any],
    credit: Sequence[Equation],
    doors: Sequence[int],
    max_unroll: int,
) -> dict[int, tuple[Conversion, str]]:
    """Control flow first: only then all the products can be seen."""
    found = {
        equation.index: _converted(equation, max_unroll)
        or _loop(program, equation)
        or indexed(program, equation)
        or multiplied(program, equation, known)
        or _long_loop(program, equation, max_unroll)
        for equation in credit
    }
    chosen = {index: how for index, how in found.items() if how is not None}
    return chosen or low_rank(program, credit, doors)


def canonicalise(
    staged: Staged, max_unroll: int
) -> tuple[Program, list[Any], list[Decision]]:
    """The flat program of a staged step, the values of its constants, and what was
    rewritten.

    **Raises:** `CompileError` for a call that credit passes through and that cannot be
    differentiated neuron by neuron.
    """
    params, states = staged.params.count, staged.state.parts.count
    program, values = flatten(staged.closed, wrapped, params=params, states=states)
    parts = _parts(program, states)
    if parts:
        program, values = rewrite(program, values, wrapped, states=states, parts=parts)
    decisions = []
    while True:
        old = program.inputs[params : params + states]
        leaves = find_hidden(program, old, program.outputs[:states])
        credit = credit_equations(program, tuple(old[i] for i in leaves))
        doors = [program.outputs[i] for i in leaves]
        known = dict(zip(program.constants, values, strict=True))
        chosen = _choose(program, known, credit, doors, max_unroll)
        if not chosen:
            _refuse(program, credit, max_unroll)
            return program, values, decisions
        for index, (_, how) in chosen.items():
            about = _about(staged, program, program.equations[index])
            decisions.append(Decision(Kind.REWRITTEN, how, *about))
        convert = functools.partial(_convert, chosen, max_unroll)
        program, values = rewrite(program, values, convert, states=states)


def _parts(program: Program, states: int) -> dict[int, tuple[int, int]]:
    """The complex values that are new state, and their parts, which are its doors."""
    made = {ref: e for e in program.equations for ref in e.outputs}
    doors = program.outputs[:states]
    found = {}
    for real, imag in itertools.pairwise(doors):
        one, two = made[real], made[imag]
        if one.primitive is REAL and two.primitive is IMAG and one.inputs == two.inputs:
            found[one.inputs[0]] = real, imag
    return found


def _convert(
    chosen: Mapping[int, tuple[Conversion, str]],
    max_unroll: int,
    equation: Equation,
    guarded: bool,
) -> Conversion | None:
    if equation.index in chosen:
        return chosen[equation.index][0]
    # What is nested in a branch is guarded like the rest of the branch.
    convert = nested(max_unroll) if guarded else wrapped
    return convert(equation, guarded)


def _about(
    staged: Staged, program: Program, equation: Equation
) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """The params and the state leaves that pass through an equation, and its line."""
    first = staged.params.count
    read = set(equation.values)
    sources = params_of(program, first)
    weights = frozenset().union(*(sources.get(ref, ()) for ref in read))

    def reaching(paths: Sequence[str], refs: Sequence[int]) -> tuple[str, ...]:
        pairs = zip(paths, refs, strict=False)
        return tuple(path for path, ref in pairs if read & influence(program, {ref}))

    paths = tuple(staged.params.paths[i] for i in sorted(weights))
    state = reaching(staged.state.parts.paths, program.inputs[first:])
    if not paths and not state:  # what a weight adds to the step
        paths = reaching(staged.params.paths, program.inputs)
    return paths, state, equation.source


def _refuse(program: Program, credit: Sequence[Equation], max_unroll: int) -> None:
    for equation in credit:
        if equation.primitive in CUSTOM | {LINEAR_SOLVE}:
            continue
        if not is_higher_order(equation):
            continue
        where = describe_equation(equation)
        if equation.primitive is COND:
            what = f"a branch with a side effect: {where}"
            remedy = "Move the effect out of the branch, or use `jnp.where`."
        elif equation.primitive is SCAN:
            length = equation.params["length"]
            elementwise = is_elementwise(equation, program.avals)
            if length and (elementwise or not _reads_weight(program, equation)):
                continue
            what = (
                f"a loop of {length} steps, more than max_unroll={max_unroll}, that "
                f"goes along a weight or starts from one: {where}"
            )
            remedy = f"Pass `max_unroll={length}`."
        elif equation.primitive is WHILE:
            what = f"a loop of unknown length that reads a weight: {where}"
            remedy = "Use a loop of known length, `jax.lax.scan`, with `jnp.where`."
        else:
            what = f"a call that the compiler does not know: {where}"
            remedy = "Use plain operations, jit, remat or custom derivatives there."
        raise CompileError(
            f"A weight or the hidden state passes through {what}. {remedy}"
        )
