"""The default rule on primitives without a closed form, against one reverse pass."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as prims
from oracles import assert_same_gradient, bptt, online, quick_jit
from test_op_rules import check_batch, use_of

import eqx_etrace as etrace
from eqx_etrace import Kind
from eqx_etrace._op_rules import ByAD


def _at(method):
    def fun(w, x):
        places = x.at[jnp.argsort(x)[:2]]
        # JAX has no derivative of a product over places that may repeat.
        return getattr(places, method)(w, unique_indices=True)

    return fun


def _lower(w):
    """A well-conditioned triangle from any weight."""
    return jnp.tril(w) + 3 * jnp.eye(len(w))


@jax.custom_vjp
def _mixed(w, x):
    return jnp.cumsum(w * x), jnp.sum(w) * x


def _mixed_bwd(x, cotangents):
    first, second = cotangents
    return 2 * first * x + jnp.sum(second * x), first


_mixed.defvjp(lambda w, x: (_mixed(w, x), x), _mixed_bwd)


# name: (one equation of a weight and data, shape of the weight, shape of the data)
CASES = {
    "concatenate": (lambda w, x: jnp.concatenate([w, x]), (2,), (3,)),
    "put a slice": (
        lambda w, x: jax.lax.dynamic_update_slice_in_dim(x, w, jnp.argmax(x), 0),
        (2,),
        (4,),
    ),
    "scatter": (_at("set"), (2,), (4,)),
    "scatter_add": (_at("add"), (2,), (4,)),
    "scatter_mul": (_at("multiply"), (2,), (4,)),
    "scatter_max": (_at("max"), (2,), (4,)),
    "scatter into": (lambda w, x: w.at[jnp.argsort(x)[:2]].add(x[:2]), (4,), (3,)),
    "solve": (
        lambda w, x: jax.lax.linalg.triangular_solve(w, x, left_side=True, lower=True),
        (3, 3),
        (3, 1),
    ),
    "right-hand side": (
        lambda w, x: jax.lax.linalg.triangular_solve(
            _lower(x), w, left_side=True, lower=True
        ),
        (3, 1),
        (3, 3),
    ),
    "weight as signal": (
        lambda w, x: jax.lax.conv(w, x, (1,), "SAME"),
        (1, 2, 4),
        (3, 2, 2),
    ),
    "groups of examples": (
        lambda w, x: jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", batch_group_count=2
        ),
        (4, 2, 3),
        (4, 2, 5),
    ),
    "window by data": (
        lambda w, x: jax.lax.dynamic_slice_in_dim(w, jnp.argmax(x), 2),
        (5, 2),
        (3,),
    ),
    "sorted along": (lambda w, x: jax.lax.sort((x, w), num_keys=1)[1], (4,), (4,)),
    "custom_vjp, second output": (lambda w, x: _mixed(w, x)[1], (3,), (3,)),
    "custom_vjp, first output": (lambda w, x: _mixed(w, x)[0], (3,), (3,)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_default_equals_one_reverse_pass(name):
    fun, w_shape, x_shape = CASES[name]
    keys = jax.random.split(jax.random.key(0), 4)
    w = 1 + jax.random.uniform(keys[0], w_shape)
    x = jax.random.uniform(keys[1], x_shape)
    rule, _, operands, shape = use_of(fun, w, x)
    assert type(rule) is ByAD
    use = rule.use
    df, signal = (jax.random.normal(key, shape) for key in keys[2:])

    @quick_jit
    def both(operands):
        trace = rule.influence(df, operands)
        _, pull = jax.vjp(lambda w: use.y_of(w, operands), operands[use.operand])
        return rule.contract([signal], [trace]), pull(signal * df)[0]

    got, expected = both(operands)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    check_batch(rule, shape)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_of_the_trace_is_that_of_df(dtype):
    rule, _, operands, shape = use_of(
        CASES["concatenate"][0], jnp.ones(2, dtype), jnp.ones(3, dtype)
    )
    assert rule.influence(jnp.ones(shape, dtype), operands).dtype == dtype


def test_sums_of_16_bit_traces_do_not_stall():
    """600 ones stall at 256 when they are added up in bfloat16."""
    rule, _, operands, shape = use_of(
        lambda w, x: jax.lax.conv_general_dilated(w, x, (1,), [(599, 599)]),
        jnp.ones((1, 1, 1), jnp.bfloat16),
        jnp.ones((1, 1, 600), jnp.bfloat16),
    )
    ones = jnp.ones(shape, jnp.bfloat16)
    got = rule.contract([ones], [rule.influence(ones, operands)])
    np.testing.assert_array_equal(got, [[[600.0]]])


def test_a_sequence_by_the_default_equals_bptt_and_shows_its_cost():
    class Net(eqx.Module):
        triangle: jax.Array
        decay: jax.Array

        def __call__(self, x, h):
            triangle = _lower(self.triangle)
            drive = prims.triangular_solve_p.bind(
                triangle,
                x[:, None],
                left_side=True,
                lower=True,
                transpose_a=False,
                conjugate_a=False,
                unit_diagonal=False,
            )
            h = jnp.tanh(self.decay * h + drive[:, 0])
            return h, h

    keys = jax.random.split(jax.random.key(1), 3)
    model = Net(jax.random.normal(keys[0], (4, 4)), jnp.linspace(0.2, 0.9, 4))
    xs, ts = jax.random.normal(keys[1], (2, 6, 4))
    state = jax.random.normal(keys[2], (4,))
    graph = etrace.compile(model, state, xs[0])
    (decision,) = [d for d in graph.decisions if d.kind is Kind.BY_AD]
    assert decision.weight == ("triangle",)
    assert "its trace has 4 x 1 x 4 x 4 entries" in decision.reason
    run = quick_jit(functools.partial(online, graph))
    got = run(graph.params(model), state, xs, ts)
    assert_same_gradient(got, bptt(model, state, xs, ts))
