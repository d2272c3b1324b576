"""KF-RTRL: an unbiased estimate of RTRL, one Kronecker product per use of a weight."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from .._op_rules import cast, product
from ._global import Dynamics, GlobalRule, Sizes, Structure
from ._uses import Space, Uses, WeightUse, numbers


class Factors(NamedTuple):
    """The trace of `KFRTRL`.

    - `inputs`: A, per sum of products the factors dy/dw of the weights in it.
    - `states`: B, per sum of products an array (states, numbers of y).
    - `exact`: (states, weights), J of the weights that are followed exactly.
    """

    inputs: tuple[tuple[Shaped[Array, "..."], ...], ...]
    states: tuple[Shaped[Array, "*batch states y"], ...]
    exact: Shaped[Array, "*batch states weights"]
    key: PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which weights are estimated, by which products, and which are not."""

    weights: Space
    drives: tuple[tuple[WeightUse, ...], ...]
    exact: tuple[int, ...]

    @property
    def uses(self) -> tuple[WeightUse, ...]:
        return tuple(use for uses in self.drives for use in uses)


class KFRTRL(GlobalRule):
    r"""Kronecker-factored real-time recurrent learning.

    Where a weight meets the data in a product, $y = W x$, its influence $dh / dW$ is
    estimated by $A \otimes B$, the first like x, the second hidden state x y, whose
    expectation it is. With a random sign $\sigma$ at every step,

    $$A^t = p_0 A^{t-1} + \sigma\,p_1\,x^t, \qquad
      B^t = D^t B^{t-1} / p_0 + \sigma\,\frac{\partial h^t}{\partial y^t} / p_1,$$

    $p_0 = \sqrt{|D B| / |A|}$ and $p_1 = \sqrt{|\partial h / \partial y| / |x|}$, which
    keep the variance low. (The second sign of the paper would turn both factors, and
    change nothing.) Products that are only added up, $W x + U h$, share B, as in the
    paper. The gradient is that of `RTRL` on average, with a variance far below that of
    `UORO`, which has one product of vectors for all weights.

    A lookup in an embedding and a convolution count as products. A weight whose
    exact influence takes no more memory than the two factors (a bias, a time constant)
    is followed exactly, and so is one that is used in any other way.

    **Arguments:**

    - `key`: a key from `jax.random.key`; each sample draws signs of its own from it.

    Memory: batch x (x + hidden state x y) for each weight, and batch x hidden state x
    weight for one that is followed exactly. Time grows with these times the hidden
    state.

    **Source:** Mujika, Meier and Steger, *Approximating real-time recurrent learning
    with random Kronecker factors*, NeurIPS 2018.

    !!! example

        ```python
        rule = eqx_etrace.KFRTRL(jax.random.key(0))
        graph = eqx_etrace.compile(net, state, x, rule=rule)
        ```
    """

    credit: ClassVar[str] = "through the whole state, an unbiased estimate"

    key: PRNGKeyArray
    plan: Plan | None = eqx.field(static=True, default=None)

    def bound(
        self, structure: Callable[[], Structure], uses: Callable[[], Uses]
    ) -> "KFRTRL":
        """With the uses of weights that the step has."""
        del structure
        return KFRTRL(self.key, _plan(uses()))

    @property
    def _bound_plan(self) -> Plan:
        assert self.plan is not None  # The compiler has bound it.
        return self.plan

    def init(self, sizes: Sizes, sample: Int[Array, ""]) -> Factors:
        """Zeros, and the key of the sample."""
        plan, n, dtype = self._bound_plan, sizes.states, sizes.dtype
        zeros = [[_spec(use) for use in uses] for uses in plan.drives]
        inputs = tuple(
            tuple(cast(jnp.zeros(spec.shape, spec.dtype), dtype) for spec in specs)
            for specs in zeros
        )
        states = tuple(
            jnp.zeros((n, numbers(uses[0].y)), dtype) for uses in plan.drives
        )
        exact = sum(numbers(plan.weights.specs[k]) for k in plan.exact)
        key = jax.random.fold_in(self.key, sample)
        return Factors(inputs, states, jnp.zeros((n, exact), dtype), key)

    def update(self, dynamics: Dynamics, trace: Factors) -> Factors:
        """One step of the recursions above."""
        plan, dtype = self._bound_plan, dynamics.sizes.dtype
        now = dynamics.by_use(plan.uses, plan.exact)
        key, drawn = jax.random.split(trace.key)
        signs = _signs(drawn, (len(plan.drives),), dtype)
        operands, inputs, states = iter(now.operands), [], []
        rows = zip(plan.drives, trace.inputs, trace.states, now.drives, strict=True)
        for i, (uses, old, moved, fresh) in enumerate(rows):
            found = [cast(use.op.derivative(next(operands)), dtype) for use in uses]
            kept, moved = _balanced(old, now.states @ moved)
            new, fresh = _balanced(found, fresh)
            pairs = zip(kept, new, strict=True)
            inputs.append(tuple(a + product(signs[i], x) for a, x in pairs))
            states.append(moved + signs[i] * fresh)
        exact = now.states @ trace.exact + now.weights
        return Factors(tuple(inputs), tuple(states), exact, key)

    def gradient(
        self, trace: Factors, signal: Shaped[Array, " states"]
    ) -> Shaped[Array, " weights"]:
        """(signal . B) A, as the operation itself puts the two together."""
        plan = self._bound_plan
        specs, dtype = plan.weights.specs, plan.weights.dtype
        alone = Space(tuple(specs[k] for k in plan.exact), dtype)
        leaves = dict(zip(plan.exact, alone.unpack(signal @ trace.exact), strict=True))
        rows = zip(plan.drives, trace.inputs, trace.states, strict=True)
        for uses, inputs, states in rows:
            (heard,) = Space((_wide(uses[0].y, dtype),), dtype).unpack(signal @ states)
            for use, derivative in zip(uses, inputs, strict=True):
                # dy/dw multiplies the conjugate of a derivative by pairs.
                found = jnp.conj(use.op.contract([jnp.conj(heard)], [derivative]))
                more = leaves.get(use.weight)
                leaves[use.weight] = found if more is None else more + found
        return plan.weights.pack([leaves[k] for k in range(len(specs))])


def _plan(uses: Uses) -> Plan:
    """What of the two takes less memory, weight by weight."""
    exact, specs = [], uses.weights.specs
    for k, spec in enumerate(specs):
        own = [use for use in uses.uses if use.weight == k]
        known = all(use.derivative is not None for use in own)
        factors = sum(
            numbers(use.derivative) + uses.states * numbers(use.y)
            for use in own
            if use.derivative is not None
        )
        if not own or not known or uses.states * numbers(spec) <= factors:
            exact.append(k)
    drives: dict[int, list[WeightUse]] = {}
    for use in uses.uses:
        if use.weight not in exact:
            drives.setdefault(use.drive, []).append(use)
    return Plan(uses.weights, tuple(map(tuple, drives.values())), tuple(exact))


def _spec(use: WeightUse) -> jax.ShapeDtypeStruct:
    assert use.derivative is not None  # Or its weight is followed exactly.
    return use.derivative


def _wide(spec: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
    """In the precision of the trace."""
    zero = jax.eval_shape(lambda: cast(jnp.zeros(spec.shape, spec.dtype), dtype))
    return jax.ShapeDtypeStruct(zero.shape, zero.dtype)


def _signs(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.random.rademacher(key, shape, dtype)


def _balanced(
    inputs: Sequence[Any], states: Any
) -> tuple[list[Any], Shaped[Array, "states y"]]:
    """Two factors of equal norm with the same product; zero where that is zero, so
    that neither adds noise."""
    norms = _norm(inputs), _norm([states])
    some = (norms[0] > 0) & (norms[1] > 0)
    above, below = (jnp.sqrt(jnp.where(some, norm, 1)) for norm in norms)
    ratio = jnp.where(some, below / above, 0)
    other = jnp.where(some, above / below, 0)
    return [product(a, ratio) for a in inputs], states * other


def _norm(arrays: Sequence[Any]) -> Shaped[Array, ""]:
    """Of all numbers; squares that are too large or too small do not spoil it."""
    sizes = [jnp.abs(array) for array in arrays]
    top = jnp.max(jnp.stack([jnp.max(size, initial=0) for size in sizes]))
    scale = jnp.where(top > 0, top, 1)
    squares = sum((jnp.sum((size / scale) ** 2) for size in sizes), jnp.zeros_like(top))
    return top * jnp.sqrt(squares)
