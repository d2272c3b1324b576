"""Values that the step has made, in programs that differentiate it afterwards.

The Jacobians of a step are taken when it has run. What it has made is not made again:
an equation of which the value is known gives that value, and only its derivative is
computed. What a derivative reads is then the smallest part of the step.
"""

import functools as ft
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive, primitives as prims

from ._jaxpr import Aval, Equation


SLOPES: dict[Primitive, Callable[[Any], Any]] = {
    prims.tanh_p: lambda y: (1 - y) * (1 + y),
    prims.logistic_p: lambda y: y * (1 - y),
    prims.exp_p: lambda y: y,
    prims.exp2_p: lambda y: math.log(2.0) * y,
    prims.expm1_p: lambda y: y + 1,
}
"""dy/dx as a function of y: the costly part of a gate is not computed again."""


@ft.partial(jax.custom_jvp, nondiff_argnums=(2,))
def known(value: Any, made: Any, slope: Callable[[Any], Any] | None = None) -> Any:
    """`made`, of which the value is known: nothing is run for that. With a `slope`, the
    same function of it as in `SLOPES`, `made` is what the value is a function of."""
    del made, slope
    return value


@known.defjvp
def _(slope: Callable[[Any], Any] | None, primals: Any, tangents: Any) -> Any:
    value, moved = primals[0], tangents[1]
    return value, moved if slope is None else slope(value) * moved


def values_made(equations: Iterable[Equation], avals: tuple[Aval, ...]) -> set[int]:
    """The values of these that have a derivative."""
    outputs = (ref for equation in equations for ref in equation.outputs)
    return {ref for ref in outputs if avals[ref].inexact}


def tap_known(
    equations: Iterable[Equation], env: Mapping[int, Any]
) -> tuple[dict[int, Callable[[Any], Any]], dict[int, Callable[[Any], Any]]]:
    """The arguments `tap` and `through` of `evaluate` that give the values of these
    equations which `env` has."""
    tap: dict[int, Callable[[Any], Any]] = {}
    through: dict[int, Callable[[Any], Any]] = {}
    for equation in equations:
        for ref in equation.outputs:
            if ref not in env:
                continue
            slope = SLOPES.get(equation.primitive)
            if slope is not None:
                through[equation.index] = _through(slope, env[ref])
            elif jax.numpy.issubdtype(env[ref].dtype, jax.numpy.inexact):
                tap[ref] = ft.partial(known, env[ref])
    return tap, through


def _through(slope: Callable[[Any], Any], value: Any) -> Callable[[Any], Any]:
    return lambda args: [known(value, *args, slope)]
