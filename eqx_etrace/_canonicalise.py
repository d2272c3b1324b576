"""From a staged step to a flat program: which calls are spliced in, kept or refused.

| call | what happens |
|---|---|
| jit, remat, plain calls | spliced in: they only wrap |
| custom_jvp, custom_vjp | kept as one equation: spliced in, the rule would be lost |
| cond, scan, while | kept where neither a weight nor hidden state passes through |
| any other call | an error, never a silent leaf |

`refuse` runs after the hidden leaves are known, because a call that touches data alone
does not concern the traces and may be anything.
"""

from collections.abc import Iterable
from typing import Any

from ._errors import CompileError
from ._jaxpr import (
    CONTROL_FLOW,
    CUSTOM,
    INLINE,
    Equation,
    Program,
    describe_equation,
    flatten,
    inner_jaxpr,
    is_higher_order,
)
from ._stage import Staged


def _expand(equation: Equation) -> Any | None:
    return inner_jaxpr(equation.params) if equation.primitive in INLINE else None


def canonicalise(staged: Staged) -> tuple[Program, list[Any]]:
    """The flat program of a staged step, and the values of its constants."""
    return flatten(
        staged.closed, _expand, params=staged.params.count, states=staged.state.count
    )


def refuse(equations: Iterable[Equation]) -> None:
    """Raise for a call that credit passes through and that cannot be differentiated
    neuron by neuron."""
    for equation in equations:
        if equation.primitive in CUSTOM or not is_higher_order(equation):
            continue
        known = equation.primitive in CONTROL_FLOW
        what = "control flow" if known else "a call that the compiler does not know"
        raise CompileError(
            f"A weight or the hidden state passes through {what}: "
            f"{describe_equation(equation)}. Expected plain operations, jit, remat or "
            "custom derivatives there. Unroll it, use `jnp.where` in place of a "
            "branch, or move it to where only data passes."
        )
