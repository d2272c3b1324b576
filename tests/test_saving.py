"""What a window saves: enough, and as little as can be."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as prims
from models import MODELS

import eqx_etrace as etrace
from eqx_etrace._jaxpr import Aval, Equation
from eqx_etrace._saving import _made_again, _smallest_cut, plan
from eqx_etrace._window import local_reads


def _random_program(rng, count=9):
    """Values, some of which cheap equations make from others; and what is read."""
    sizes = rng.integers(1, 6, count)
    avals: Any = tuple(Aval((int(n),), jnp.dtype("float32")) for n in sizes)
    cheap = {}
    for ref in range(2, count):
        if rng.random() < 0.7:
            sources = rng.choice(ref, min(ref, rng.integers(1, 4)), replace=False)
            values = tuple(map(int, sources))
            cheap[ref] = Equation(ref, prims.add_p, {}, values, (ref,), "")
    read = {int(ref) for ref in rng.choice(count, 3, replace=False)}
    return avals, cheap, read


def _met(cheap, read):
    met, wanted = set(), list(read)
    while wanted:
        ref = wanted.pop()
        if ref not in met:
            met.add(ref)
            wanted += cheap[ref].values if ref in cheap else ()
    return met


def _enough(cheap, read, save):
    """Whether what is read can be made from what is saved."""
    wanted = list(read)
    while wanted:
        ref = wanted.pop()
        if ref not in save:
            if ref not in cheap:
                return False
            wanted += cheap[ref].values
    return True


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_smallest(seed):
    avals, cheap, read = _random_program(np.random.default_rng(seed))
    met = _met(cheap, read)
    save = _smallest_cut(avals, cheap, met, read)
    assert _enough(cheap, read, save)
    made = _made_again(cheap, read, save, set())
    assert {ref for ref in read if ref not in save} <= set(made)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(sorted(met), n) for n in range(len(met) + 1)
    )
    least = min(
        sum(avals[ref].size for ref in subset)
        for subset in subsets
        if _enough(cheap, read, set(subset))
    )
    # A byte of each is rounded up, which does not change the order of whole numbers.
    assert sum(avals[ref].size for ref in save) == least


# How many numbers a unit saves at each step, for D-RTRL.
SAVED = {
    "rnn": 2,  # the old and the new state; tanh' follows from the latter
    "gru": 5,  # the state, three gates, and what the reset gate lets through
    "lif": 3,  # the membrane, of which a spike is made, and two steps of the current
}


# The same where each step begins where the one before has ended.
SAVED_IN_A_ROW = {
    "rnn": 1,  # a new state is the old one of the next step
    "gru": 5,
    "lif": 2,  # the membrane and the current
}


@pytest.mark.parametrize("in_a_row", [False, True])
@pytest.mark.parametrize("name", SAVED)
def test_a_cell_saves_few_numbers(name, in_a_row):
    case = MODELS[name]
    net, state = case.make(jax.random.key(0))
    graph = etrace.compile(net, state, jnp.zeros(5))
    avals = graph.program.avals
    save = plan(graph, local_reads(graph), in_a_row).save
    units = sum(group.units for group in graph.groups)
    want = SAVED_IN_A_ROW if in_a_row else SAVED
    assert sum(avals[ref].size for ref in save) == want[name] * units
