"""The graph as a value: through jit and scan, and compared with another graph."""

import functools
import typing
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from models import MODELS
from oracles import problem

import eqx_etrace as etrace


ALL = list(MODELS)
BATCH = 3
N, IN = 6, 4
KEY = jax.random.key(0)


@functools.cache
def _graph(name):
    model, state, xs, _ = problem(name)
    return etrace.compile(model, state, xs[0])


def _close(got, expected, rtol=1e-10):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-13)


# The graph under transformations.


def _total(graph, params, state, trace, x):
    out, *_ = etrace.step(graph, params, state, trace, x)
    found = etrace.jacobians(graph, params, state, x)
    return jnp.sum(out**2) + sum(jnp.sum(J) for J in found.hidden_to_hidden)


def _arguments(name):
    model, state, xs, _ = problem(name)
    graph = _graph(name)
    return graph, graph.params(model), state, etrace.init_trace(graph), xs[0]


@pytest.mark.parametrize("name", ["alif", "layernorm_between"])
def test_graph_closed_over_and_as_an_argument_without_retracing(name):
    graph, *rest = _arguments(name)
    expected = _total(graph, *rest)
    for jit in (jax.jit, eqx.filter_jit):
        traced = eqx.debug.assert_max_traces(_total, max_traces=1)
        run = jit(traced)
        _close(run(graph, *rest), expected, 1e-12)
        # What comes out of jit is the same graph, and goes in again.
        again = jit(lambda g: g)(graph)
        _close(run(again, *rest), expected, 1e-12)
        assert jax.tree.structure(again) == jax.tree.structure(graph)

    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def closed(params, state, trace, x):
        return _total(graph, params, state, trace, x)

    _close(closed(*rest), expected, 1e-12)
    _close(closed(*rest), expected, 1e-12)


@pytest.mark.parametrize("name", ["alif", "layernorm_between"])
def test_graph_in_a_scan_carry(name):
    graph, params, state, trace, x = _arguments(name)

    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(graph, params, state, trace, x):
        def body(carry, _):
            graph, state, trace = carry
            out, state, trace = etrace.step(graph, params, state, trace, x)
            return (graph, state, trace), out

        return jax.lax.scan(body, (graph, state, trace), None, length=2)

    (carried, new, _), outs = run(graph, params, state, trace, x)
    expected, middle, moved = etrace.step(graph, params, state, trace, x)
    _close(outs[0], expected, 1e-12)
    expected, last, _ = etrace.step(carried, params, middle, moved, x)
    _close(outs[1], expected, 1e-12)
    run(carried, params, state, trace, x)
    _close(ravel_pytree(new)[0], ravel_pytree(last)[0], 1e-12)


# Equal structure.


@pytest.mark.parametrize("name", ALL)
def test_two_compiles_of_a_model_have_the_same_structure(name):
    model, state, xs, _ = problem(name)
    other = etrace.compile(model, state, xs[0])
    assert _graph(name).same_structure(other)
    assert other.same_structure(_graph(name))


def _fresh_surrogate(model, x, h):
    """Its surrogate gradient is another function object at every trace."""

    @jax.custom_jvp
    def fire(v):
        return (v > 0).astype(v.dtype)

    @fire.defjvp
    def _(primals, tangents):
        return fire(*primals), 0.3 * tangents[0]

    @jax.custom_vjp
    def soft(v):
        return jnp.tanh(v)

    soft.defvjp(lambda v: (jnp.tanh(v), v), lambda v, g: (g * v,))
    h = soft(0.9 * h + model(x))
    return fire(h), h


def test_functions_made_anew_are_the_same_structure():
    linear = eqx.nn.Linear(IN, N, key=KEY)
    one, two = (
        etrace.compile(linear, jnp.zeros(N), jnp.zeros(IN), call=_fresh_surrogate)
        for _ in range(2)
    )
    assert one.same_structure(two)


def test_every_other_model_has_another_structure():
    names = [n for n in ALL if MODELS[n].inputs == MODELS["gru"].inputs]
    for name in names[1:]:
        assert not _graph(names[0]).same_structure(_graph(name))
    assert not _graph("lif").same_structure(_graph("lif_packed"))


def _scaled(factor, model, x, h):
    h = factor * jnp.tanh(model(x) + h)
    return h, h


def _variant(**changes):
    options = {"size": N, "factor": 0.5, "vjp": "auto", "batch": (), "key": KEY}
    options |= changes
    size, batch = options["size"], options["batch"]
    return etrace.compile(
        eqx.nn.Linear(IN, size, key=options["key"]),
        jnp.zeros((*batch, size)),
        jnp.zeros((*batch, IN)),
        call=functools.partial(_scaled, options["factor"]),
        vjp=options["vjp"],
        batched=bool(batch),
    )


def test_values_of_params_are_no_structure():
    assert _variant().same_structure(_variant(key=jax.random.key(9)))


@pytest.mark.parametrize(
    "change",
    [{"size": 5}, {"factor": 0.6}, {"vjp": "multi-step"}, {"batch": (BATCH,)}],
    ids=lambda change: next(iter(change)),
)
def test_what_is_structure(change):
    assert not _variant().same_structure(_variant(**change))
    assert _variant(**change).same_structure(_variant(**change))


def test_structure_of_something_else():
    with pytest.raises(TypeError, match=r"other: got .*int.*expected an ETraceGraph"):
        typing.cast(Any, _variant()).same_structure(3)
