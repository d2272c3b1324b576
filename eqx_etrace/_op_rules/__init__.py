"""Op rules, one family a file; `op_rule` finds the one for a use of a weight."""

from .._jaxpr import Equation, Program
from ._base import OpRule as OpRule, cast as cast, product as product
from ._by_ad import ByAD as ByAD, by_ad
from ._dense import Dense as Dense, dense
from ._elementwise import Elementwise as Elementwise, elementwise


# In order: the first that fits is taken, and the last fits always.
OP_RULES = (dense, elementwise, by_ad)


def op_rule(program: Program, equation: Equation, k: int, output: int) -> OpRule:
    """The op rule for operand `k` and output `output` of an equation."""
    found = (build(program, equation, k, output) for build in OP_RULES)
    return next(rule for rule in found if rule is not None)
