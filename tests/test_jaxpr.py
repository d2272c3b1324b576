"""The flat program computes what the jaxpr computed, and keeps what must be kept."""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as prims
from models import spike

from eqx_etrace._canonicalise import wrapped
from eqx_etrace._flatten import flatten
from eqx_etrace._jaxpr import (
    CUSTOM,
    ELEMENTWISE,
    INLINE,
    STRUCTURAL,
    Origin,
    evaluate,
    is_elementwise,
    is_higher_order,
    live,
)


def _program(fun, *args, params=0, states=0):
    closed = jax.make_jaxpr(fun)(*args)
    return flatten(closed, wrapped, params=params, states=states)


def _run(program, constants, *args):
    env = dict(zip(program.constants, constants, strict=True))
    env.update(zip(program.inputs, args, strict=True))
    env = evaluate(program.equations, env)
    return [env[ref] for ref in program.outputs]


@jax.custom_vjp
def _clipped(v):
    return jnp.sin(v)


_clipped.defvjp(lambda v: (_clipped(v), v), lambda v, g: (jnp.clip(v, 0, 1) * g,))

FUNCTIONS = {
    "jit": lambda x: jax.jit(lambda y: jnp.sin(y) * 2)(x) + x,
    "nested jit": lambda x: jax.jit(lambda y: jax.jit(jnp.cos)(y) + 1)(x),
    "remat": lambda x: jax.checkpoint(lambda y: jnp.exp(jnp.sin(y)))(x),
    "custom_jvp": lambda x: spike(x) + x,
    "custom_vjp": lambda x: _clipped(x) * x,
    "relu in jit": lambda x: jax.jit(jax.nn.relu)(x),
    "constants": lambda x: x * jnp.arange(4.0) + jnp.linspace(0.0, 1.0, 4),
    "captured array": lambda x: x + jnp.asarray(np.arange(4.0) ** 2),
    "several results": lambda x: (x, x, 2 * x, jnp.ones(3)),
    "cond on data": lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "scan": lambda x: jax.lax.scan(lambda c, y: (c + y, c * y), x[0], x),
    "indexing": lambda x: (x[1], x[jnp.array([0, 2])], x.at[0].set(1.0), x[::-1]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_program_computes_the_same(name):
    fun = FUNCTIONS[name]
    x = jnp.array([0.3, -0.7, 1.1, -0.2])
    program, constants = _program(fun, x)
    got, expected = _run(program, constants, x), jax.tree.leaves(fun(x))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_program_has_the_same_derivative(name):
    fun = FUNCTIONS[name]
    x = jnp.array([0.3, -0.7, 1.1, -0.2])
    program, constants = _program(fun, x)

    def total(leaves):
        return sum(jnp.sum(leaf) for leaf in leaves)

    got = jax.grad(lambda y: total(_run(program, constants, y)))(x)
    expected = jax.grad(lambda y: total(jax.tree.leaves(fun(y))))(x)
    np.testing.assert_allclose(got, expected, rtol=1e-14)


def test_what_wraps_is_spliced_in_and_custom_derivatives_are_kept():
    def fun(x):
        return jax.jit(jax.checkpoint(lambda y: spike(y) + _clipped(y)))(x)

    program, _ = _program(fun, jnp.ones(3))
    found = [equation.primitive for equation in program.equations]
    assert not INLINE.intersection(found)
    assert [p for p in found if p in CUSTOM] == [
        prims.custom_jvp_call_p,
        prims.custom_vjp_call_p,
    ]


def test_values_are_written_once_and_before_they_are_read():
    def fun(x, y):
        return jax.jit(lambda a, b: (a @ b, jnp.tanh(a)))(x, y)

    program, _ = _program(fun, jnp.ones((3, 3)), jnp.ones(3))
    written = set(program.inputs) | set(program.constants)
    for equation in program.equations:
        assert written.issuperset(equation.values)
        assert not written.intersection(equation.outputs)
        written.update(equation.outputs)
    assert written.issuperset(program.outputs)


def test_new_state_leaves_have_values_of_their_own():
    def fun(w, h):
        return h, h, w, jnp.zeros(2), h

    program, constants = _program(fun, jnp.ones(2), jnp.arange(2.0), params=1, states=4)
    assert len(set(program.outputs[:4])) == 4
    assert not set(program.outputs) & set(program.inputs)
    assert all(program.origins[ref] is Origin.DATA for ref in program.outputs)
    for a, b in zip(
        _run(program, constants, jnp.ones(2), jnp.arange(2.0)),
        fun(jnp.ones(2), jnp.arange(2.0)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_origins():
    def fun(w, x):
        return jnp.tanh(jnp.abs(w)) * x + jnp.arange(2.0)

    program, _ = _program(fun, jnp.ones(2), jnp.ones(2), params=1)
    origins = {e.primitive: program.origins[e.outputs[0]] for e in program.equations}
    assert origins[prims.abs_p] is origins[prims.tanh_p] is Origin.WEIGHT
    assert origins[prims.mul_p] is origins[prims.add_p] is Origin.DATA
    assert prims.iota_p not in origins, "what depends on nothing is evaluated"


def test_source_lines_point_to_the_model():
    program, _ = _program(lambda x: jax.jit(lambda y: jnp.sin(y))(x), jnp.ones(2))
    assert program.equations[0].source.startswith("test_jaxpr.py:")


def _solve(w, x):
    return jnp.linalg.solve(2 * jnp.eye(2) + w, x)


def test_a_library_function_stands_at_the_line_that_calls_it():
    """JAX traces it once for all its callers, and knows no line in it."""
    program, _ = _program(_solve, jnp.ones((2, 2)), jnp.ones(2))
    sources = {equation.source for equation in program.equations}
    assert all("(_solve)" in source for source in sources)
    assert any(e.primitive is prims.linear_solve_p for e in program.equations)


def test_a_linear_solve_reads_its_weight_once():
    """In the product; what factorises it or transposes it has no derivative."""
    program, _ = _program(_solve, jnp.ones((2, 2)), jnp.ones(2), params=1)
    solve = next(e for e in program.equations if e.primitive is prims.linear_solve_p)
    origins = [program.origins[ref] for ref in solve.values]
    assert origins.count(Origin.WEIGHT) == origins.count(Origin.DATA) == 1
    assert origins[0] is Origin.WEIGHT and origins[-1] is Origin.DATA


def test_dead_equations_go_and_effects_stay():
    def fun(x):
        jnp.exp(x)
        jax.debug.print("{x}", x=x)
        return x + 1

    program, _ = _program(fun, jnp.ones(2))
    found = [equation.primitive for equation in program.equations]
    assert prims.exp_p not in found
    assert any(equation.effectful for equation in program.equations)
    assert prims.add_p in found
    assert len(live(program.equations, [])) == 1


def test_elementwise_custom_derivatives_are_elementwise():
    def fun(x):
        return spike(x), _clipped(x), jax.nn.relu(x), jax.nn.softplus(x), jax.nn.elu(x)

    program, _ = _program(fun, jnp.ones(3))
    custom = [e for e in program.equations if e.primitive in CUSTOM]
    assert len(custom) == 4
    assert all(is_elementwise(equation, program.avals) for equation in custom)


def test_a_custom_derivative_that_mixes_is_not_elementwise():
    @jax.custom_jvp
    def normalise(x):
        return x / jnp.sum(x)

    normalise.defjvp(lambda p, t: (normalise(p[0]), t[0]))
    program, _ = _program(normalise, jnp.ones(3))
    (equation,) = program.equations
    assert is_higher_order(equation)
    assert not is_elementwise(equation, program.avals)


def test_tap_and_edge_change_what_is_written_and_read():
    program, constants = _program(lambda x: jnp.sin(x) * x, jnp.ones(2))
    sine, product = program.equations
    env = dict(zip(program.inputs, [jnp.ones(2)], strict=True))
    out = evaluate(
        program.equations,
        env,
        tap={sine.outputs[0]: lambda v: v + 1},
        edge={(product.index, 1): lambda v: 10 * v},
    )
    expected = (np.sin(1) + 1) * 10
    np.testing.assert_allclose(out[program.outputs[0]], expected)
    del constants


def test_tables_hold_primitives():
    assert len(ELEMENTWISE) > 60
    assert len(STRUCTURAL) >= 9
    for table in (ELEMENTWISE, STRUCTURAL, INLINE, CUSTOM):
        assert all(isinstance(primitive, jex_core.Primitive) for primitive in table)
