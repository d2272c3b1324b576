"""Loops that are too long to be unrolled, inside of a step.

`descended` takes the weights out of such a loop. With y_t = op(x_t, w) a product inside
of it, the loop is read as

    X = all the x_t, from the loop run once without derivatives
    Y = op(X, w), all the products of the loop in one equation
    the loop again, with constants for weights, and with (Y - its own value)_t added to
    each y_t: nothing in value, and all of the derivative by w.

So Y is a use of the weight like any other, and its trace is that of all substeps.

`Loop` reads a loop without weights: which elements of the state each element of its
results reads, by way of all substeps. Products with what was a weight are cut inside,
as they are outside; the loop with these cuts is its part of the local program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._flatten import Builder, Conversion, Convert, flatten_body
from ._jaxpr import Equation, Origin, Program, Ref, bind, evaluate, literal, loop_counts


def _inexact(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _still(value: Any) -> Any:
    return jax.lax.stop_gradient(value) if _inexact(value) else value


def loop_origins(equation: Equation, origins: Sequence[Origin]) -> list[Origin]:
    """Those of the inputs of the body: what changes from substep to substep is data."""
    fixed, _ = loop_counts(equation.params)
    return [*origins[:fixed], *[Origin.DATA] * len(origins[fixed:])]


# -- weights out of a loop -------------------------------------------------------------


def descended(equation: Equation, convert: Convert) -> Conversion:
    """The three steps above, in place of a loop that reads weights."""

    def replace(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        origins = [b.origin(ref) for ref in inputs]
        body = _Body(equation, origins, convert)
        return b.trace(body.run, *inputs)

    return replace


class _Body:
    """The body of a loop: what depends on weights alone, and the rest."""

    def __init__(self, equation: Equation, origins: Sequence[Origin], convert: Convert):
        self.params = equation.params
        # Constants are no more than fixed here: their values are not at hand.
        fixed = (
            Origin.PREPARED if o is Origin.CONSTANT else o
            for o in loop_origins(equation, origins)
        )
        body, values = flatten_body(self.params["jaxpr"], list(fixed), convert, {})
        self.body = body
        self.constants = dict(zip(body.constants, values, strict=True))
        data = {r for r, o in enumerate(body.origins) if o is Origin.DATA}
        self.steps = [e for e in body.equations if data.intersection(e.outputs)]
        self.preparation = [e for e in body.equations if e not in self.steps]
        weights = {r for r, o in enumerate(body.origins) if o is Origin.WEIGHT}
        self.uses = [e for e in self.steps if weights.intersection(e.values)]
        self.data, (self.fixed, self.carried) = data, loop_counts(self.params)

    def run(self, *args: Any) -> list[Any]:
        inputs, last = self.body.inputs, self.fixed + self.carried
        carry, xs = args[self.fixed : last], args[last:]
        given = dict(zip(inputs, args[: self.fixed], strict=False))
        data = {ref: v for ref, v in given.items() if ref in self.data}
        env = evaluate(self.preparation, self.constants | given)
        still = {ref: _still(value) for ref, value in env.items()}
        first, rows = ([_still(value) for value in values] for values in (carry, xs))
        _, (_, operands) = self.scan(still, first, rows, None)
        shifts = []
        for use, found in zip(self.uses, operands, strict=True):
            values = self.all_at_once(use, env, found)
            shifts.append([_shift(value) for value in values if _inexact(value)])
        new, (ys, _) = self.scan(still | data, carry, xs, shifts)
        return [*new, *ys]

    def scan(self, env: Mapping[int, Any], carry: Any, xs: Any, shifts: Any) -> Any:
        inputs = self.body.inputs[self.fixed :]

        def substep(carry: Any, row: Any) -> Any:
            x, shift = row
            start = dict(env) | dict(zip(inputs, (*carry, *x), strict=True))
            found = evaluate(self.steps, start, tap=self.taps(shift))
            results = [found[ref] for ref in self.body.outputs]
            seen = [[found[r] for r in self.read(use)] for use in self.uses]
            return results[: len(carry)], (results[len(carry) :], seen)

        length, reverse = self.params["length"], self.params["reverse"]
        carry = list(carry)
        return jax.lax.scan(substep, carry, (xs, shifts), length, reverse)

    def taps(self, shifts: Any) -> dict[int, Callable[[Any], Any]]:
        found = {}
        for use, shift in zip(self.uses, shifts or (), strict=bool(shifts)):
            moved = [r for r in use.outputs if self.body.avals[r].inexact]
            for ref, change in zip(moved, shift, strict=True):
                found[ref] = lambda value, change=change: value + change
        return found

    def read(self, use: Equation) -> list[int]:
        """The data that a use reads."""
        return [ref for ref in use.values if ref in self.data]

    def all_at_once(self, use: Equation, env: Any, operands: Sequence[Any]) -> Any:
        """A use in all substeps, as one operation on all that it meets."""
        rest = iter(operands)
        args, axes = [], []
        for ref in use.inputs:
            data = isinstance(ref, int) and ref in self.data
            if data:
                args.append(next(rest))
            else:
                args.append(env[ref] if isinstance(ref, int) else literal(ref))
            axes.append(0 if data else None)
        return jax.vmap(lambda *args: bind(use, args), in_axes=tuple(axes))(*args)


def _shift(value: Any) -> Any:
    return value - jax.lax.stop_gradient(value)


# -- loops without weights -------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A loop as a part of the local program; static, compared by identity."""

    equation: Equation
    body: Program
    constants: Mapping[int, Any]
    cuts: frozenset[tuple[int, int]]

    def local(self, args: Sequence[Any]) -> list[Any]:
        """The loop with its products cut."""
        params = self.equation.params
        first, count = loop_counts(params)
        fixed = dict(self.constants) | dict(
            zip(self.body.inputs, args[:first], strict=False)
        )
        edge = dict.fromkeys(self.cuts, jax.lax.stop_gradient)

        def substep(carry: Any, x: Any) -> Any:
            rest = zip(self.body.inputs[first:], (*carry, *x), strict=True)
            env = evaluate(self.body.equations, fixed | dict(rest), edge=edge)
            results = [env[ref] for ref in self.body.outputs]
            return results[:count], results[count:]

        carry, xs = list(args[first:][:count]), list(args[first + count :])
        length, reverse = params["length"], params["reverse"]
        new, ys = jax.lax.scan(substep, carry, xs, length, reverse)
        return [*new, *ys]
