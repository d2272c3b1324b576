"""Products of rows in groups: the values and gradients of JAX's own."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import RaggedDotDimensionNumbers as Numbers
from oracles import assert_same_gradient, sum_of_squares

import eqx_etrace as etrace


ROWS, IN, N = 5, 3, 4
BASIC = Numbers((((1,), (1,)), ((), ())), [0], [0])
CROSSED = Numbers((((0, 2), (1, 2)), ((), ())), [1], [3])
BATCH = Numbers((((2,), (2,)), ((0,), (1,))), [1], [0])
CONTRACTED = Numbers((((1,), (0,)), ((), ())), [1], [])
CASES = {
    "groups fill the rows": (BASIC, (ROWS, IN), (3, IN, N), [2, 1, 2]),
    "rows are left over": (BASIC, (ROWS, IN), (3, IN, N), [1, 0, 2]),
    "one group": (BASIC, (ROWS, IN), (1, IN, N), [ROWS]),
    "two axes contracted": (CROSSED, (IN, ROWS, 2), (N, IN, 2, 2), [3, 2]),
    "a batch axis": (BATCH, (2, ROWS, IN), (3, 2, IN, N), [1, 3, 1]),
}


class Experts(eqx.Module):
    w: jax.Array
    sizes: tuple[int, ...] = eqx.field(static=True)
    numbers: Numbers = eqx.field(static=True)

    def __call__(self, x, h):
        sizes = jnp.array(self.sizes, jnp.int32)
        drive = jax.lax.ragged_dot_general(x, self.w, sizes, self.numbers)
        h = jnp.tanh(0.5 * h + drive)
        return h, h


def _problem(numbers, x_shape, w_shape, sizes):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=shape)) for shape in (x_shape, w_shape))
    model = Experts(w, tuple(sizes), numbers)
    h = jnp.asarray(rng.normal(size=jax.eval_shape(model, x, 0.0)[0].shape))
    return model, x, h


@pytest.mark.parametrize("name", CASES)
def test_one_step_is_that_of_jax(name):
    model, x, h = _problem(*CASES[name])
    graph = etrace.compile(model, h, x)
    assert {relation.op.name for relation in graph.relations} == {"dense"}
    trace = etrace.init_trace(graph)

    def ours(params):
        return sum_of_squares(etrace.step(graph, params, h, trace, x)[0], 1.0)

    def theirs(model):
        return sum_of_squares(model(x, h)[0], 1.0)

    params = graph.params(model)
    np.testing.assert_allclose(ours(params), theirs(model), rtol=1e-14)
    got, expected = jax.grad(ours)(params), jax.grad(theirs)(model)
    assert np.any(expected.w)
    assert_same_gradient(got, expected)


def test_what_is_not_a_number_stays_in_its_row():
    model, x, h = _problem(*CASES["groups fill the rows"])
    graph = etrace.compile(model, h, x)
    params, trace = graph.params(model), etrace.init_trace(graph)
    x = x.at[0].set(jnp.inf)
    out = etrace.step(graph, params, h, trace, x)[0]
    np.testing.assert_allclose(out, model(x, h)[0], rtol=1e-14)
    assert np.all(np.isfinite(out[1:]))


def test_a_report_says_how_it_is_read():
    model, x, h = _problem(*CASES["rows are left over"])
    text = str(etrace.compile(model, h, x).report())
    assert "w: rows in groups: one product over all groups, zero outside" in text
    assert "(test_ragged.py:" in text


def test_groups_of_the_contracted_axis_are_refused():
    """JAX has no derivative of it to map."""
    model, x, h = _problem(CONTRACTED, (ROWS, IN), (IN, N), [1, 2])
    message = r"`ragged_dot_general`.*Pass an op rule of your own"
    with pytest.raises(etrace.CompileError, match=message):
        etrace.compile(model, h, x)
