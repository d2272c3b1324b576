"""Op rules, one family a file; `op_rule` finds the one for a use of a weight."""

from collections.abc import Callable, Mapping
from typing import Any

from .._jaxpr import Equation, Program
from ._base import OpRule as OpRule
from ._by_ad import ByAD as ByAD, by_ad as by_ad
from ._convolution import Convolution as Convolution, convolution
from ._dense import Dense as Dense, dense
from ._elementwise import Elementwise as Elementwise, elementwise
from ._gather import Gather as Gather, gather
from ._use import OpUse as OpUse, describe_use as describe_use


Builder = Callable[[OpUse], OpRule | None]

# In order: the first that fits is taken, and the last fits always.
OP_RULES: tuple[Builder, ...] = (dense, convolution, gather, elementwise, by_ad)


def op_rule(
    program: Program,
    equation: Equation,
    k: int,
    output: int,
) -> OpRule:
    """The op rule for operand `k` and output `output` of an equation."""
    use = describe_use(program, equation, k, output)
    found = (build(use) for build in OP_RULES)
    return next(rule for rule in found if rule is not None)
