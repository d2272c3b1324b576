"""x @ A @ B read as x @ (A @ B): two weights in a row are one effective weight.

Between the two products lies a value of rank r that no unit owns, so A would have no
local path to the state and no trace. Where nothing else reads that value, the product
A @ B is a weight like any other: it is formed once in the preparation, its trace has
the exact gradient, and the preparation takes that to A and B.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax

from ._flatten import Builder, Conversion
from ._hidden import influence
from ._jaxpr import DOT_GENERAL, Equation, Origin, Program, Ref


def low_rank(
    program: Program, credit: Sequence[Equation], doors: Sequence[int]
) -> dict[int, tuple[Conversion, str]]:
    """The second products of such pairs that lead to the new hidden state `doors`, and
    what is done with them."""
    made = {e.outputs[0]: e for e in credit if e.primitive is DOT_GENERAL}
    readers = collections.Counter(program.outputs)
    for equation in program.equations:
        readers.update(equation.values)
    found = {}
    for y, second in made.items():
        for k, ref in second.operands:
            pair = ref in made and _is_pair(program, made[ref], second, k)
            if pair and readers[ref] == 1 and influence(program, {y}) & set(doors):
                how = "x @ A @ B is read as x @ (A @ B), a product with one weight"
                found[second.index] = (_joined(program, made[ref], second, k), how)
    return found


def _is_pair(program: Program, first: Equation, second: Equation, k: int) -> bool:
    """Whether `second` contracts all that the weight of `first` put in its operand k,
    with a weight of its own, and nothing else."""
    origins = [program.origins[ref] for ref in first.values]
    other = second.inputs[1 - k]
    if Origin.WEIGHT not in origins or Origin.DATA not in origins:
        return False
    if not isinstance(other, int) or program.origins[other] is not Origin.WEIGHT:
        return False
    contract, batch = second.params["dimension_numbers"]
    if batch[0] or first.params["dimension_numbers"][1][0]:
        return False
    a = origins.index(Origin.WEIGHT)
    return sorted(contract[k]) == list(_places(program, first, a))


def _free(program: Program, equation: Equation, k: int) -> list[int]:
    """The axes of operand k of a product that it contracts with nothing."""
    contract, _ = equation.params["dimension_numbers"]
    ndim = len(program.avals[equation.inputs[k]].shape)
    return [axis for axis in range(ndim) if axis not in contract[k]]


def _places(program: Program, first: Equation, a: int) -> range:
    """The axes of the result of `first` that come from its operand a."""
    count = len(_free(program, first, a))
    start = len(_free(program, first, 0)) if a == 1 else 0
    return range(start, start + count)


def _joined(program: Program, first: Equation, second: Equation, k: int) -> Conversion:
    a = next(i for i in (0, 1) if program.origins[first.inputs[i]] is Origin.WEIGHT)
    free, start = _free(program, first, a), _places(program, first, a).start
    (outer, _), (inner, _) = (e.params["dimension_numbers"] for e in (first, second))
    options = {
        name: second.params[name] for name in ("precision", "preferred_element_type")
    }

    def product(x: Any, one: Any, two: Any) -> list[Any]:
        pairs = [free[axis - start] for axis in inner[k]], inner[1 - k]
        weight = jax.lax.dot_general(one, two, (pairs, ((), ())), **options)
        places = [sorted(outer[a]).index(axis) for axis in outer[a]]
        sides = [(x, outer[1 - a]), (weight, places)]
        (left, left_axes), (right, right_axes) = sides if k == 0 else sides[::-1]
        numbers = ((left_axes, right_axes), ((), ()))
        return [jax.lax.dot_general(left, right, numbers, **options)]

    def join(b: Builder, inputs: Sequence[Ref]) -> list[Ref]:
        before = b.maker(inputs[k])
        args = before.inputs[1 - a], before.inputs[a], inputs[1 - k]
        return b.trace(product, *args)

    return join
