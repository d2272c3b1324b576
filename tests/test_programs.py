"""What the compiled programs of sequences need: memory, and compilations."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from oracles import quick_jit
from windows import squares

import eqx_etrace as etrace


B = 4


class Gated(eqx.Module):
    """A unit whose decay depends on its input: each weight has a trace of its own."""

    w: jax.Array
    u: jax.Array

    def __call__(self, x, h):
        drive = self.w @ x + self.u @ h
        h = jax.nn.sigmoid(drive - h) * h + drive
        return h[:3], h


def _problem(units, inputs, steps):
    net = Gated(jnp.ones((units, inputs)), jnp.ones((units, units)))
    h, xs = jnp.zeros((B, units)), jnp.ones((steps, B, inputs))
    graph = etrace.compile(net, h, xs[0], batched=True)
    assert graph.vjp == "single-step"
    trace = etrace.init_trace(graph)
    args = graph.params(net), h, trace, xs, jnp.ones((steps, B, 3))
    return graph, args, sum(leaf.nbytes for leaf in jax.tree.leaves(trace))


def _compiled(fun, *args):
    return jax.jit(fun).lower(*args).compile()


def _temp_of(compiled):
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def _temp(fun, *args):
    return _temp_of(_compiled(fun, *args))


def _has_shape(compiled, *shape):
    """Whether any value of the program has this shape, in whatever order of axes."""
    found = re.findall(r"f64\[([\d,]+)\]", compiled.as_text())
    return sorted(shape) in [sorted(map(int, axes.split(","))) for axes in found]


@pytest.mark.parametrize("mask", [False, True])
def test_a_trace_that_nobody_reads_is_not_computed(mask):
    """The whole sequence in one window, from a trace of zeros."""
    units, inputs, steps = 48, 40, 8
    graph, args, size = _problem(units, inputs, steps)
    drive = etrace.value_and_grad(graph, squares, window=steps)
    given = (jnp.ones(steps),) if mask else ()

    def run(params, h, xs, ts, *mask):
        return drive(params, h, None, xs, ts, *mask)

    params, h, _, xs, ts = args
    whole = _compiled(run, params, h, xs, ts, *given)
    less = _compiled(lambda *a: run(*a)[:3], params, h, xs, ts, *given)
    for width in (inputs, units):
        assert _has_shape(whole, B, units, width)
        assert not _has_shape(less, B, units, width)
    assert _temp_of(less) < 0.5 * size


def test_memory_does_not_grow_with_time():
    """Nor where some steps are left over, which are a window of their own."""
    found = []
    for steps in (288, 1600, 100, 1604):
        graph, args, _ = _problem(32, 24, steps)
        drive = etrace.value_and_grad(graph, squares, window=32)
        found.append(_temp(lambda *a, drive=drive: drive(*a)[1:], *args))
    assert abs(found[1] - found[0]) <= 0.05 * found[0]
    assert abs(found[3] - found[2]) <= 0.05 * found[2]
    assert found[1] <= found[2]


def test_memory_of_a_window_is_that_of_the_trace():
    """Where the trace is large: the one that goes in, and the one that comes out."""
    graph, args, size = _problem(512, 512, 65)
    drive = etrace.value_and_grad(graph, squares, window=32)
    assert _temp(drive, *args) <= 2.2 * size


def test_a_longer_sequence_is_the_same_program():
    found = []
    for steps in (37, 37 + 5 * 8):
        graph, args, _ = _problem(4, 3, steps)
        drive = etrace.value_and_grad(graph, squares, window=8)
        text = str(jax.make_jaxpr(drive)(*args))
        found.append(text.count("\n"))
    assert abs(found[0] - found[1]) <= 2


@pytest.mark.parametrize("window", [1, 4])
def test_the_same_shapes_compile_once(window):
    graph, args, _ = _problem(4, 3, 10)
    calls = []

    def loss_fn(out, target):
        calls.append(None)
        return squares(out, target)

    run = quick_jit(etrace.value_and_grad(graph, loss_fn, window=window))
    first = run(*args)
    traced = len(calls)
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, args[0], first[1])
    run(params, *first[2:], *args[3:])
    run(params, args[1], *args[2:])
    assert len(calls) == traced


def _products_in_loops(jaxpr, looped=False):
    """How often each pair of operand shapes is multiplied in the body of a loop."""
    found = []
    for equation in jaxpr.eqns:
        if looped and equation.primitive.name == "dot_general":
            found.append(tuple(sorted(v.aval.shape[-2:] for v in equation.invars)))
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                loop = looped or equation.primitive.name == "scan"
                found += _products_in_loops(inner, loop)
    return found


def test_the_products_of_x_are_taken_for_all_steps_at_once():
    units, inputs, steps = 7, 5, 6
    graph, (params, h, _, xs, ts), _ = _problem(units, inputs, steps)

    def run(params, h, xs, ts):
        fun = etrace.value_and_grad(graph, squares, window=steps)
        return fun(params, h, None, xs, ts)[:2]

    closed = jax.make_jaxpr(run)(params, h, xs, ts)
    products = _products_in_loops(closed.jaxpr)
    assert any((units, units) in pair for pair in products)
    assert not any((units, inputs) in pair for pair in products)
