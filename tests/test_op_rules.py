"""Closed-form op rules equal the default by automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit

from eqx_etrace._canonicalise import wrapped
from eqx_etrace._flatten import flatten
from eqx_etrace._jaxpr import evaluate
from eqx_etrace._op_rules import (
    ByAD,
    Convolution,
    Dense,
    Elementwise,
    Gather,
    by_ad,
    describe_use,
    op_rule,
)
from eqx_etrace._relation import find_uses


def _product(spec):
    return lambda w, x: jnp.einsum(spec, w, x)


def _dot(contract, batch, swap=False):
    def fun(w, x):
        args = (x, w) if swap else (w, x)
        return jax.lax.dot_general(*args, (contract, batch))

    return fun


@jax.custom_vjp
def _gated(w, x):
    return jnp.tanh(w) * x


_gated.defvjp(lambda w, x: (_gated(w, x), (w, x)), lambda r, g: (g * r[1], g * r[0]))


@jax.custom_jvp
def _scaled(w, x):
    return jnp.tanh(w * x)


@_scaled.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return _scaled(w, x), jnp.abs(x) * dw + jnp.abs(w) * dx


# name: (one equation of a weight and data, shape of the weight, shape of the data)
CASES = {
    "W @ x": (lambda w, x: w @ x, (4, 3), (3,), Dense),
    "x @ W": (lambda w, x: x @ w, (3, 4), (3,), Dense),
    "matrix x": (lambda w, x: x @ w, (3, 4), (2, 3), Dense),
    "W on the left of a matrix": (lambda w, x: w @ x, (4, 3), (3, 2), Dense),
    "shared over time": (_product("kn,btk->btn"), (3, 4), (2, 5, 3), Dense),
    "two contracted axes": (_product("ijn,ij->n"), (2, 3, 4), (2, 3), Dense),
    "crossed contracted axes": (
        _dot(((0, 2), (1, 0)), ((), ())),
        (2, 4, 3),
        (3, 2),
        Dense,
    ),
    "batch dims": (_dot(((2,), (1,)), ((0,), (0,))), (2, 4, 3), (2, 3), Dense),
    "batch dims, x left": (
        _dot(((1,), (1,)), ((0,), (0,)), swap=True),
        (2, 3, 4),
        (2, 3),
        Dense,
    ),
    "two batch dims, free axes on both": (
        _dot(((2,), (3,)), ((0, 3), (1, 0))),
        (2, 5, 4, 3),
        (3, 2, 6, 4),
        Dense,
    ),
    "batch dim only": (_dot(((), ()), ((0,), (0,))), (3,), (3,), Dense),
    "outer product": (_dot(((), ()), ((), ())), (3,), (4,), Dense),
    "inner product": (_dot(((0,), (0,)), ((), ())), (3,), (3,), Dense),
    "bias": (lambda w, x: x + w, (3,), (3,), Elementwise),
    "gain": (lambda w, x: x * w, (2, 3), (2, 3), Elementwise),
    "scalar gain": (lambda w, x: x * w, (), (2, 3), Elementwise),
    "power": (lambda w, x: x**w, (3,), (3,), Elementwise),
    "divide by": (lambda w, x: x / w, (3,), (3,), Elementwise),
    "maximum": (jnp.maximum, (3,), (3,), Elementwise),
    "selected": (lambda w, x: jax.lax.select_n(x > 0.5, x, w), (3,), (3,), Elementwise),
    "clamped": (
        lambda w, x: jax.lax.clamp(w, x - 1.0, jnp.ones(3)),
        (3,),
        (3,),
        Elementwise,
    ),
    "custom_vjp": (_gated, (3,), (3,), Elementwise),
    "custom_jvp, scalar": (_scaled, (), (3,), ByAD),
    "convolution": (
        lambda w, x: jax.lax.conv(x, w, (1,), "SAME"),
        (2, 3, 3),
        (1, 3, 6),
        Convolution,
    ),
    "gather by data": (lambda w, x: w[jnp.argsort(x)], (3, 2), (3,), Gather),
    "slice by data": (lambda w, x: w[jnp.argmin(x)], (3, 2), (3,), Gather),
    "sorted together": (lambda w, x: jax.lax.sort((w, x))[0], (3,), (3,), ByAD),
}


def use_of(fun, w, *data):
    """The rule found for `fun(w, *data)`, the default, the values of the operands, the
    shape of y."""
    closed = jax.make_jaxpr(fun)(w, *data)
    program, constants = flatten(closed, wrapped, params=1, states=0)
    env = dict(zip(program.constants, constants, strict=True))
    env.update(zip(program.inputs, (w, *data), strict=True))
    env = evaluate(program.equations, env)
    uses = [use for use in find_uses(program) if use.ref == program.inputs[0]]
    # Of several results the one that is returned, if it is returned as it is.
    use = next((use for use in uses if use.y in program.outputs), uses[0])
    operands = tuple(
        env[ref] if isinstance(ref, int) else ref.val for ref in use.equation.inputs
    )
    where = (use.equation, use.operand, use.output)
    rule = op_rule(program, *where)
    default = by_ad(describe_use(program, *where))
    return rule, default, operands, program.avals[use.y].shape


def check_gradient(rule, default, operands, shape, rtol=1e-12):
    """Two steps of a trace and a gradient, by the rule and by the default."""
    keys = jax.random.split(jax.random.key(1), 4)
    df, decay, l0, l1 = (jax.random.normal(key, shape) for key in keys)

    def gradient(rule):
        first = rule.influence(df, operands)
        assert first.shape == rule.trace_shape
        assert rule.expand(decay).ndim == first.ndim
        second = rule.expand(decay) * first + rule.influence(l1, operands)
        return rule.contract([l0, l1], [first, second])

    # One compilation costs less than one per operation; not the quick one, for without
    # its fusion emitters XLA scatters wrongly by 8-bit indices.
    got, expected = jax.jit(lambda: (gradient(rule), gradient(default)))()
    assert got.shape == operands[default.use.operand].shape
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-14)
    return expected


def check_batch(rule, shape):
    """The contraction of a batch is the sum of the contractions."""
    keys = jax.random.split(jax.random.key(2), 2)
    v = jax.random.normal(keys[0], (3, *shape))
    trace = jax.random.normal(keys[1], (3, *rule.trace_shape))

    @quick_jit
    def both():
        each = (rule.contract([v[b]], [trace[b]]) for b in range(3))
        return rule.contract([v], [trace]), sum(each)

    got, expected = both()
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def _use(name):
    fun, w_shape, x_shape, _ = CASES[name]
    keys = jax.random.split(jax.random.key(0))
    w = 0.2 + jax.random.uniform(keys[0], w_shape)
    return use_of(fun, w, 0.2 + jax.random.uniform(keys[1], x_shape))


@pytest.mark.parametrize("name", CASES)
def test_the_rule_found(name):
    rule, _, _, _ = _use(name)
    assert type(rule) is CASES[name][3]


@pytest.mark.parametrize("name", CASES)
def test_influence_and_contraction_equal_the_default(name):
    assert np.abs(check_gradient(*_use(name))).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_contraction_of_a_batch_is_the_sum(name):
    rule, _, _, shape = _use(name)
    check_batch(rule, shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sums_of_16_bit_traces_do_not_stall(dtype):
    """4096 ones in bfloat16 stall at 256 when they are added up in bfloat16."""
    rule, _, _, _ = _use("bias")
    ones = jnp.ones((4096, 3), dtype)
    np.testing.assert_array_equal(rule.contract([ones], [ones]), [4096.0] * 3)


def test_rules_are_static():
    first, _, _, _ = _use("W @ x")
    second, _, _, _ = _use("W @ x")
    assert first == second and hash(first) == hash(second)
