"""Op rules, one family a file; `op_rule` finds the one for a use of a weight."""

from .._jaxpr import Equation, Program, describe_equation
from ._base import SMALL as SMALL, OpRule as OpRule
from ._by_ad import ByAD as ByAD, by_ad as by_ad
from ._convolution import Convolution as Convolution, convolution
from ._dense import Dense as Dense, dense
from ._elementwise import Elementwise as Elementwise, elementwise
from ._gather import Gather as Gather, gather
from ._merged import Merged as Merged, merge_axes as merge_axes
from ._own import (
    ELEMENTWISE,
    OpRuleBuilder as OpRuleBuilder,
    OpRules as OpRules,
    build_own,
    check_op_rules as check_op_rules,
    own_elementwise as own_elementwise,
)
from ._products import (
    cast as cast,
    product as product,
    sum_of_first as sum_of_first,
)
from ._use import OpUse as OpUse, describe_use as describe_use


# In order: the first that fits is taken.
OP_RULES: tuple[OpRuleBuilder, ...] = (dense, convolution, gather, elementwise)


def op_rule(
    program: Program,
    equation: Equation,
    k: int,
    output: int,
    op_rules: OpRules | None = None,
) -> OpRule:
    """The op rule for operand `k` and output `output` of an equation.

    `op_rules` are the user's and come first; the default by AD comes last.
    """
    own = (op_rules or {}).get(equation.primitive)
    use = describe_use(program, equation, k, output, own == ELEMENTWISE)
    if callable(own):
        rule = build_own(own, use, describe_equation(equation))
        if rule is not None:
            return rule
    for build in OP_RULES:
        if (rule := build(use)) is not None:
            return rule
    return by_ad(use)
