"""A window gives what its steps give one by one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import quick_jit
from windows import (
    OneStepLate,
    assert_same,
    by_steps,
    chain,
    each_square,
    of_catalogue,
    random_trace,
    squares,
)

import eqx_etrace as etrace
from eqx_etrace import _window


RULES = {
    "drtrl": etrace.DRTRL(),
    "unit": etrace.DRTRL(scope="unit"),
    "es": etrace.ESDRTRL(0.8),
    "es pair": etrace.ESDRTRL((0.7, 0.9)),
}
# An op rule each, or a kind of state, or a form of the trace.
KINDS = [
    "lif",
    "hard_reset",
    "rnn_rnn",
    "any_dimension_numbers",
    "low_rank_recurrent",
    "conv1d_strides_dilation_groups",
    "embedding",
    "odd_elementwise_ops",
    "product_with_a_rule_of_its_own",
    "bcoo_recurrent",
    "sparse_recurrent",
    "complex_recurrence",
]
SOME = ["lif", "hard_reset", "conv2d_recurrent", "two_uses"]
GRID = [(name, rule) for rule in ("drtrl", "es") for name in KINDS]
GRID += [(name, rule) for rule in ("unit", "es pair") for name in SOME]


def _of_one_window(name, rule, steps, window):
    """Both ways from a trace that is not zero, in one program."""
    graph, params, state, xs, ts = of_catalogue(name, rule)
    assert graph.vjp == "single-step"
    xs, ts = jax.tree.map(lambda a: a[:steps], (xs, ts))
    args = params, state, random_trace(graph), xs, ts, jnp.linspace(0.0, 1.2, steps)
    fused = etrace.value_and_grad(graph, squares, window=window)

    @quick_jit
    def both(*args):
        return fused(*args), by_steps(graph, squares, *args)

    return both(*args)


@pytest.mark.parametrize("name, rule", GRID)
def test_a_window_from_a_trace_equals_its_steps(name, rule):
    """Of the rest of the catalogue, see `test_catalogue.py`."""
    assert_same(*_of_one_window(name, RULES[rule], 4, 4))


# Windows of every length, and all that may come with a sequence.

T, B = 37, 3
LENGTHS = [1, 2, 7, 32, T]


def _lanes(*shape):
    """Weights of losses, some zero, and resets, some at the edges of windows."""
    rng = np.random.default_rng(6)
    mask = rng.uniform(0.5, 1.5, shape) * (rng.uniform(size=shape) < 0.7)
    reset = rng.uniform(size=shape) < 0.1
    reset[0], reset[7], reset[-1] = rng.uniform(size=(3, *shape[1:])) < 0.5
    return jnp.asarray(mask), jnp.asarray(reset)


@functools.cache
def _sequence(slots, rule, dtype="float64"):
    """The graph, a sequence with everything, and what its steps give."""
    graph, params, state, xs, ts = chain(slots, T, B, RULES[rule], dtype)
    assert graph.vjp == "single-step"
    assert [(g.units, g.slots) for g in graph.groups] == [(6, slots)]
    mask, reset = _lanes(T, B)
    args = params, state, random_trace(graph), xs, ts, mask.astype(dtype)
    initial = jax.tree.map(lambda a: 0.5 + 0.1 * a, state)
    options = {"reset": reset, "initial": initial}
    run = quick_jit(functools.partial(by_steps, graph, each_square))
    return graph, args, options, run(*args, **options)


def _check_window(slots, rule, length, dtype="float64", **tolerance):
    graph, args, options, expected = _sequence(slots, rule, dtype)
    run = etrace.value_and_grad(graph, each_square, window=length)
    assert_same(quick_jit(run)(*args, **options), expected, **tolerance)


@pytest.mark.parametrize(
    "slots, length",
    [(1, 7), (4, 7), *((slots, length) for slots in (2, 3) for length in LENGTHS)],
)
def test_windows_of_every_length(slots, length):
    _check_window(slots, "drtrl", length)


@pytest.mark.parametrize(
    "rule, length", [("unit", 7), ("es", 1), ("es", 7), ("es", T), ("es pair", 7)]
)
def test_windows_of_every_rule(rule, length):
    _check_window(2, rule, length)


@pytest.mark.parametrize("rule", RULES)
def test_a_group_that_nothing_moves_and_nobody_hears(rule):
    rng = np.random.default_rng(0)
    w, u, xs, ts = (
        jnp.asarray(rng.normal(size=shape))
        for shape in ((3, 2), (3, 3), (9, 2), (9, 3))
    )
    net, state = OneStepLate(w, u), (jnp.zeros(3), jnp.zeros(3))
    graph = etrace.compile(net, state, xs[0], RULES[rule], vjp="single-step")
    args = graph.params(net), state, None, xs, ts
    fused = etrace.value_and_grad(graph, squares, window=4)
    got, expected = quick_jit(lambda *a: (fused(*a), by_steps(graph, squares, *a)))(
        *args
    )
    assert_same(got[:3], expected[:3])
    assert np.abs(got[1].second).max() > 0


@pytest.mark.parametrize("length", [7, T])
@pytest.mark.parametrize("rule", ["drtrl", "es"])
def test_windows_in_float32(rule, length):
    _check_window(3, rule, length, "float32", rtol=1e-5, atol=1e-6)


def test_the_window_that_is_picked():
    _check_window(2, "drtrl", None)


# name: (batch, loss_fn, what is given of a trace, mask, reset and initial)
GIVEN = {
    "nothing": (None, squares, ""),
    "a trace": (None, squares, "trace"),
    "resets": (None, squares, "reset"),
    "resets to a state": (None, squares, "mask reset initial"),
    "one loss of a batch": (B, squares, ""),
    "one loss of a batch, a mask": (B, squares, "trace mask"),
    "a loss of each sample, one mask": (B, each_square, "mask"),
    "all lanes are reset": (B, each_square, "reset initial"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_may_be_left_out(name):
    batch, loss_fn, given = GIVEN[name]
    graph, *args = chain(2, 7, batch)
    mask, reset = _lanes(8)
    options = {"mask": mask[:7], "reset": reset[:7], "initial": args[1]}
    options = {k: v for k, v in options.items() if k in given.split()}

    @quick_jit
    def run(params, state, xs, ts, options):
        # A single window knows that a trace of None is zero.
        trace = None if "trace" not in given else etrace.init_trace(graph)
        args = params, state, trace, xs, ts
        runs = [etrace.value_and_grad(graph, loss_fn, window=k) for k in (3, 7)]
        expected = by_steps(graph, loss_fn, *args, **options)
        return [run(*args, **options) for run in runs], expected

    found, expected = run(*args, options)
    for got in found:
        assert_same(got, expected)


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "a trace"])
def test_a_long_window_is_taken_back_in_chunks(name, monkeypatch):
    monkeypatch.setattr(_window, "CHUNK", 4)
    batch, loss_fn, given = GIVEN[name]
    graph, params, state, xs, ts = chain(3, 12, batch)
    mask, reset = _lanes(12)
    options = {"mask": mask, "reset": reset, "initial": state}
    options = {k: v for k, v in options.items() if k in given.split()}

    def with_aux(out, target):
        return loss_fn(out, target), out

    def run(params, state, xs, ts, options):
        fun = etrace.value_and_grad(graph, with_aux, window=12, has_aux=True)
        return fun(params, state, None, xs, ts, **options)

    args = params, state, xs, ts, options
    assert re.search(r"length=3\b", str(jax.make_jaxpr(run)(*args)))
    (losses, outs), *rest = quick_jit(run)(*args)
    expected = by_steps(graph, loss_fn, params, state, None, xs, ts, **options)
    assert_same((losses, *rest), expected)
    evolved = etrace.evolve(graph, params, state, None, xs)[0]
    if "reset" not in options:
        assert_same(outs, evolved)
