"""From a jaxpr to a flat program, and from a program to a rewritten one.

Both are one pass of a `Builder` over equations. What is asked of every equation is a
*conversion*: a function that appends other equations in its place and returns their
results, or None to keep it. A conversion has three moves:

- `splice(jaxpr, args)` appends the equations of a jaxpr;
- `trace(fun, *args)` appends what `fun` does, by tracing it;
- `while_taken(predicate)` is the time in which the branch of a conditional is appended.

A rewritten program is the old one read again, so a conversion never sees how programs
are numbered, and nothing builds equations by hand.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex_core
from jax.extend import source_info_util
from jax.extend.core import primitives as prims

from ._jaxpr import (
    Aval,
    Equation,
    Origin,
    Program,
    Ref,
    evaluate,
    index_positions,
    live,
    open_jaxpr,
    to_aval,
)


Conversion = Callable[["Builder", Sequence[Ref]], list[Ref]]
"""From the inputs of an equation to its results."""
Convert = Callable[[Equation, bool], Conversion | None]
"""From an equation, and whether it is in a branch, to its conversion."""


def _source(eqn: Any) -> str:
    text = source_info_util.summarize(eqn.source_info)
    path, colon, rest = text.partition(":")
    return f"{Path(path).name}{colon}{rest}"


class Builder:
    """Collects equations while a jaxpr or a program is read; lives for one pass."""

    def __init__(self, convert: Convert):
        self.convert = convert
        self.avals: list[Aval] = []
        self.origins: list[Origin] = []
        self.equations: list[Equation] = []
        self.constants: dict[int, Any] = {}
        self.taken: Ref | None = None
        self.source = ""
        """The user's line, for the equations of a conversion."""

    def new(self, aval: Aval, origin: Origin) -> int:
        self.avals.append(aval)
        self.origins.append(origin)
        return len(self.avals) - 1

    def constant(self, value: Any) -> int:
        ref = self.new(to_aval(jax.typeof(value)), Origin.CONSTANT)
        self.constants[ref] = value
        return ref

    def aval(self, ref: Ref) -> Aval:
        return self.avals[ref] if isinstance(ref, int) else to_aval(ref.aval)

    def origin(self, ref: Ref) -> Origin:
        return self.origins[ref] if isinstance(ref, int) else Origin.CONSTANT

    def splice(
        self, jaxpr: Any, args: Iterable[Ref], source: str | None = None
    ) -> list[Ref]:
        """Append the equations of `jaxpr`, reading `args`; returns its outputs."""
        inner, consts = open_jaxpr(jaxpr)
        env: dict[Any, Ref] = {}
        for var, value in zip(inner.constvars, consts, strict=True):
            env[var] = self.constant(value)
        env.update(zip(inner.invars, args, strict=True))

        def read(atom: Any) -> Ref:
            return atom if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in inner.eqns:
            inputs = tuple(read(atom) for atom in eqn.invars)
            # A library function that JAX has traced for itself has no line of the user.
            line = (_source(eqn) or self.source) if source is None else source
            equation = Equation(
                -1, eqn.primitive, eqn.params, inputs, (), line, bool(eqn.effects)
            )
            avals = [to_aval(var.aval) for var in eqn.outvars]
            env.update(zip(eqn.outvars, self.append(equation, avals), strict=True))
        return [read(atom) for atom in inner.outvars]

    def trace(self, fun: Callable[..., Any], *args: Ref) -> list[Ref]:
        """Append what `fun` does to values of these shapes; it returns a list.

        Its equations are the user's, too: they stand at the line that is converted."""
        avals = (self.aval(ref) for ref in args)
        specs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        return self.splice(jax.make_jaxpr(fun)(*specs), args, self.source)

    @contextlib.contextmanager
    def while_taken(self, predicate: Ref) -> Iterator[None]:
        """Within it every result of a weight is guarded by the predicate."""
        outer = self.taken
        if outer is not None:
            (predicate,) = self.trace(lambda a, b: [a & b], outer, predicate)
        self.taken = predicate
        yield
        self.taken = outer

    def guard(self, ref: Ref) -> Ref:
        """The same value, whose derivative is zero unless the predicate holds, even
        where the derivative of what reads it is not a number."""
        if not self.aval(ref).inexact:
            return ref

        def select(taken: Any, value: Any) -> list[Any]:
            return [jax.lax.select_n(taken, jax.lax.stop_gradient(value), value)]

        taken, self.taken = self.taken, None
        (ref,) = self.trace(select, taken, ref)
        self.taken = taken
        return ref

    def maker(self, ref: Ref) -> Equation:
        """The equation that made a value."""
        return next(e for e in reversed(self.equations) if ref in e.outputs)

    def append(self, equation: Equation, avals: Sequence[Aval]) -> list[Ref]:
        """Append an equation, or what it is converted to."""
        conversion = self.convert(equation, self.taken is not None)
        if conversion is not None:
            outer, self.source = self.source, equation.source
            results = conversion(self, equation.inputs)
            self.source = outer
            return results
        return self.keep(equation, avals)

    def keep(self, equation: Equation, avals: Sequence[Aval]) -> list[Ref]:
        """Append an equation as it is; in a branch its results may be guarded."""
        results = self.emit(equation, avals)
        mixes = {self.origin(ref) for ref in (*equation.inputs, *results)}
        if self.taken is not None and mixes >= {Origin.WEIGHT, Origin.DATA}:
            return [self.guard(ref) for ref in results]
        return results

    def emit(self, equation: Equation, avals: Sequence[Aval]) -> list[Ref]:
        read = [self.origins[ref] for ref in equation.values]
        made = max(read, key=lambda origin: origin.value, default=Origin.CONSTANT)
        outputs = []
        for aval in avals:
            lost = made is Origin.WEIGHT and not (
                equation.differentiable and aval.inexact
            )
            outputs.append(self.new(aval, Origin.PREPARED if lost else made))
        index = len(self.equations)
        self.equations.append(
            dataclasses.replace(equation, index=index, outputs=tuple(outputs))
        )
        return outputs

    def output(self, ref: Ref) -> int:
        """A copy of a value that is data, whatever it was."""
        equation = Equation(-1, prims.copy_p, {}, (ref,), (), "")
        (ref,) = self.emit(equation, [self.aval(ref)])
        self.origins[ref] = Origin.DATA
        return ref


def flatten(
    closed: Any, convert: Convert, *, params: int, states: int
) -> tuple[Program, list[Any]]:
    """Flatten a closed jaxpr of one step; returns it and its constants' values.

    The first `params` inputs are the parameters, the first `states` outputs the new
    state. Each output is data written by an equation, and each new state leaf has a
    value of its own, so that perturbing one of them has one meaning. Equations that
    depend on nothing are evaluated here.
    """
    builder = Builder(convert)
    inner, _ = open_jaxpr(closed)
    inputs = tuple(
        builder.new(to_aval(var.aval), Origin.WEIGHT if i < params else Origin.DATA)
        for i, var in enumerate(inner.invars)
    )
    return _finish(builder, inputs, builder.splice(closed, inputs), states)


def flatten_unfolded(closed: Any, convert: Convert) -> tuple[Program, list[Any]]:
    """Flatten a closed jaxpr to read it, not to run it: what depends on nothing stays
    an equation, since to evaluate it takes longer than all else. The values of indices
    are found all the same."""
    builder = Builder(convert)
    inner, _ = open_jaxpr(closed)
    inputs = tuple(builder.new(to_aval(var.aval), Origin.DATA) for var in inner.invars)
    results = builder.splice(closed, inputs)
    return _finish(builder, inputs, results, 0, _indices)


def flatten_body(
    closed: Any,
    origins: Sequence[Origin],
    convert: Convert,
    known: Mapping[int, Any],
) -> tuple[Program, list[Any]]:
    """Flatten the body of a loop, whose inputs have these origins; `known` gives the
    values of those that are constants, by their position."""
    builder = Builder(convert)
    inner, _ = open_jaxpr(closed)
    inputs = tuple(
        builder.new(to_aval(var.aval), origin)
        for var, origin in zip(inner.invars, origins, strict=True)
    )
    builder.constants.update((inputs[i], value) for i, value in known.items())
    return _finish(builder, inputs, builder.splice(closed, inputs), 0)


def rewrite(
    program: Program,
    values: Sequence[Any],
    convert: Convert,
    *,
    states: int,
    parts: Mapping[int, tuple[int, int]] | None = None,
) -> tuple[Program, list[Any]]:
    """Read a program again with other conversions.

    `parts` says of complex values which two values are their real and imaginary part:
    whatever reads such a value is made to read it through its parts.
    """
    builder = Builder(convert)
    env: dict[int, Ref] = {}
    for ref in program.inputs:
        env[ref] = builder.new(program.avals[ref], program.origins[ref])
    inputs = tuple(env.values())
    for ref, value in zip(program.constants, values, strict=True):
        env[ref] = builder.constant(value)
    for equation in program.equations:
        moved = tuple(env[r] if isinstance(r, int) else r for r in equation.inputs)
        avals = [program.avals[ref] for ref in equation.outputs]
        moved = dataclasses.replace(equation, inputs=moved)
        if env.keys() >= set(equation.outputs):
            continue  # a part, made already
        env.update(zip(equation.outputs, builder.append(moved, avals), strict=True))
        for ref in set(equation.outputs).intersection(parts or ()):
            *halves, env[ref] = builder.trace(_through_parts, env[ref])
            env.update(zip((parts or {})[ref], halves, strict=True))
    results = [env[ref] for ref in program.outputs]
    return _finish(builder, inputs, results, states)


def _through_parts(value: Any) -> list[Any]:
    real, imag = jax.lax.real(value), jax.lax.imag(value)
    return [real, imag, jax.lax.complex(real, imag)]


def _indices(
    equations: list[Equation], origins: tuple[Origin, ...], known: dict[int, Any]
) -> tuple[list[Equation], dict[int, Any]]:
    """Keep all equations; the values of constants that are read, and of indices."""
    read = {ref for equation in equations for ref in equation.values}
    found = {ref: value for ref, value in known.items() if ref in read}
    wanted = {
        equation.inputs[k]
        for equation in equations
        for k in index_positions(equation)
        if isinstance(equation.inputs[k], int)
    }
    missing = [
        ref for ref in sorted(wanted - found.keys()) if origins[ref] is Origin.CONSTANT
    ]
    return equations, found | _evaluated(equations, origins, found, missing)


def _finish(
    builder: Builder,
    inputs: tuple[int, ...],
    results: Sequence[Ref],
    states: int,
    fold: Callable[..., tuple[list[Equation], dict[int, Any]]] | None = None,
) -> tuple[Program, list[Any]]:
    outputs: list[int] = []
    for position, ref in enumerate(results):
        data = builder.origin(ref) is Origin.DATA
        if not data or ref in inputs or (position < states and ref in outputs):
            ref = builder.output(ref)
        outputs.append(ref)
    origins = tuple(builder.origins)
    equations = live(builder.equations, outputs)
    equations, known = (fold or _fold)(equations, origins, builder.constants)
    program = Program(
        avals=tuple(builder.avals),
        origins=origins,
        equations=tuple(
            dataclasses.replace(equation, index=index)
            for index, equation in enumerate(equations)
        ),
        constants=tuple(known),
        inputs=inputs,
        outputs=tuple(outputs),
    )
    return program, list(known.values())


def _fold(
    equations: list[Equation], origins: tuple[Origin, ...], known: dict[int, Any]
) -> tuple[list[Equation], dict[int, Any]]:
    """Evaluate what depends on nothing; keep the constants that are still read."""
    rest = [equation for equation in equations if not _constant(equation, origins)]
    wanted = {ref for equation in rest for ref in equation.values}
    wanted = [ref for ref in sorted(wanted) if origins[ref] is Origin.CONSTANT]
    missing = [ref for ref in wanted if ref not in known]
    known = known | _evaluated(equations, origins, known, missing)
    return rest, {ref: known[ref] for ref in wanted}


def _constant(equation: Equation, origins: tuple[Origin, ...]) -> bool:
    fixed = all(origins[ref] is Origin.CONSTANT for ref in equation.outputs)
    return fixed and bool(equation.outputs) and not equation.effectful


def _evaluated(
    equations: list[Equation],
    origins: tuple[Origin, ...],
    known: dict[int, Any],
    missing: list[int],
) -> dict[int, Any]:
    """The values of these constants."""
    if not missing:
        return {}
    needed = live((e for e in equations if _constant(e, origins)), missing)
    with jax.ensure_compile_time_eval():
        values = jax.jit(lambda env: _pick(evaluate(needed, env), missing))(known)
    return dict(zip(missing, values, strict=True))


def _pick(env: Mapping[int, Any], refs: Iterable[int]) -> list[Any]:
    return [env[ref] for ref in refs]
