"""The models of the table, compiled, and what there is to know of their first step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from models import MODELS
from oracles import Dense, problem, quick_jit

import eqx_etrace as etrace


@functools.cache
def graph_of(name):
    model, state, xs, _ = problem(name)
    return etrace.compile(model, state, xs[0])


@functools.cache
def jacobians_of(name):
    model, state, xs, _ = problem(name)
    graph = graph_of(name)
    run = quick_jit(functools.partial(etrace.jacobians, graph))
    return run(graph.params(model), state, xs[0])


@functools.cache
def dense_of(name):
    """The dense reference, its D, F and M, and where it keeps each slot."""
    model, state, xs, _ = problem(name)
    dense = Dense(model, state, MODELS[name].groups)
    h = dense.flat(dense.leaves)
    matrices = quick_jit(dense.local)(dense.p, h, dense.leaves, xs[0])
    numbers = dense.split(jnp.arange(float(h.size)), dense.leaves)
    numbered = jax.tree.unflatten(dense.treedef, numbers)
    places = [np.asarray(g.concat(numbered), int) for g in graph_of(name).groups]
    return dense, matrices, places


def assert_close(got, expected, rtol=1e-10):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-13)
