"""Traces keep the structure they have: vectors where all units agree, else arrays."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike
from oracles import assert_same_gradient, bptt, problem, quick_jit
from windows import differ, local, of_catalogue, squares

import eqx_etrace as etrace


N, IN, STEPS = 5, 4, 8


class Filter(eqx.Module):
    """A product with a decay of its own; `cell(p, x, h, drive)` gives out and state."""

    w: jax.Array
    tau: jax.Array
    cell: functools.partial = eqx.field(static=True)

    def __call__(self, x, state):
        return self.cell(self, x, state, self.w @ x)


def _decaying(decay):
    def cell(p, x, h, drive):
        h = decay(p, x, h) * h + drive
        return jnp.tanh(h), h

    return cell, jnp.ones(N)


def _of_state(p, x, h, drive):
    h = 0.9 * h + jnp.tanh(drive - 0.5 * h)
    return h, h


def _two_slots(p, x, state, drive):
    """A current, and a membrane whose reset is detached."""
    v, g = state
    g = 0.8 * g + drive
    v = 0.9 * v + g - jax.lax.stop_gradient(spike(v - 1))
    return jnp.tanh(v), (v, g)


def _two_slots_with_reset(p, x, state, drive):
    """The reset is not detached: the membranes differ, the currents do not."""
    v, g = state
    g = 0.8 * g + drive
    v = 0.9 * (v - spike(v - 1)) + g
    return jnp.tanh(v), (v, g)


def _through_a_gate(p, x, state, drive):
    """The second filter reads the first through a gain for each unit."""
    h, s = state
    h = 0.9 * h + drive
    s = 0.7 * s + jnp.linspace(0.5, 1.0, N) * h
    return jnp.tanh(s), (h, s)


def _indexed(p, x, state, drive):
    """A ring of three filters; the input turns it."""
    h = state
    i = jnp.argmax(x[:3])
    h = h.at[i].set(0.9 * h[i] + drive)
    return jnp.tanh(h.sum(0)), h


def _same_decay(p, x, h):
    return 0.9


VECTOR, MATRIX = (1, IN), (N, IN)
two = (jnp.ones(N), jnp.zeros(N))
# name: (cell and state, shapes of the traces of w, slot by slot)
CELLS = {
    "one number": (_decaying(_same_decay), [VECTOR]),
    "an array of one number": (_decaying(lambda p, x, h: jnp.full(N, 0.9)), [VECTOR]),
    "a gate that all share": (
        _decaying(lambda p, x, h: jax.nn.sigmoid(x[0])),
        [VECTOR],
    ),
    "one trained number": (
        _decaying(lambda p, x, h: jax.nn.sigmoid(p.tau[0])),
        [VECTOR],
    ),
    "heterogeneous": (
        _decaying(lambda p, x, h: jnp.linspace(0.5, 0.9, N)),
        [MATRIX],
    ),
    "a trained number each": (
        _decaying(lambda p, x, h: jax.nn.sigmoid(p.tau)),
        [MATRIX],
    ),
    "a gate for each unit": (
        _decaying(lambda p, x, h: jax.nn.sigmoid(jnp.resize(x, (N,)))),
        [MATRIX],
    ),
    "a gate of the unit's state": ((_of_state, jnp.ones(N)), [MATRIX]),
    "a detached reset": ((_two_slots, two), [VECTOR, VECTOR]),
    "a reset": ((_two_slots_with_reset, two), [VECTOR, MATRIX]),
    "a gain for each unit": ((_through_a_gate, two), [VECTOR, MATRIX]),
    "an indexed slot": ((_indexed, jnp.ones((3, N))), [MATRIX] * 3),
}


def _cell(name):
    (cell, state), _ = CELLS[name]
    rng = np.random.default_rng(2)
    w, tau = rng.normal(size=(N, IN)), rng.normal(size=N)
    net = Filter(jnp.asarray(w), jnp.asarray(tau), cell)
    xs, ts = rng.normal(size=(STEPS, IN)), rng.normal(size=(STEPS, N))
    return net, state, jnp.asarray(xs), jnp.asarray(ts)


@pytest.mark.parametrize("name", CELLS)
def test_traces_are_vectors_where_all_units_agree(name):
    net, state, xs, ts = _cell(name)
    graph = etrace.compile(net, state, xs[0])
    assert graph.vjp == "single-step"
    (number,) = [i for i, r in enumerate(graph.relations) if r.weight == ("w",)]
    relation, trace = graph.relations[number], etrace.init_trace(graph)[number]
    assert [leaf.shape for leaf in trace] == CELLS[name][1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trace))
    assert local(graph).trace_bytes(relation) == size


@pytest.mark.parametrize("name", CELLS)
def test_the_gradient_is_bptt_for_there_is_no_recurrence(name):
    net, state, xs, ts = _cell(name)
    graph = etrace.compile(net, state, xs[0])
    trace = etrace.init_trace(graph)

    @quick_jit
    def run(params):
        drives = [etrace.value_and_grad(graph, squares, window=k) for k in (1, 3)]
        return [drive(params, state, trace, xs, ts)[1] for drive in drives]

    expected = bptt(net, state, xs, ts)
    for got in run(graph.params(net)):
        assert_same_gradient(got, expected)


def test_a_unit_without_a_past_keeps_no_array():
    """A plain RNN: df and dy/dw of this very step, each a vector."""
    model, state, xs, _ = problem("rnn")
    graph = etrace.compile(model, state, xs[0])
    for relation, (entry,) in zip(
        graph.relations, etrace.init_trace(graph), strict=True
    ):
        leaves = jax.tree.leaves(entry)
        assert all(leaf.size <= max(relation.weight_shape) for leaf in leaves)
        size = sum(leaf.nbytes for leaf in leaves)
        assert local(graph).trace_bytes(relation) == size
        if len(relation.weight_shape) == 2:
            assert relation.links == ((),)
            assert size == 8 * sum(relation.weight_shape)


# Without the structure.


def _plain(graph):
    """The graph whose traces are all arrays of full size."""
    relations = tuple(
        dataclasses.replace(
            relation,
            alike=(False,) * len(relation.slots),
            links=(None,) * len(relation.slots),
        )
        for relation in graph.relations
    )
    return dataclasses.replace(graph, relations=relations)


def _assert_same_without(graph, params, state, xs, ts):
    plain = _plain(graph)
    sizes = [sum(local(g).trace_bytes(r) for r in g.relations) for g in (graph, plain)]
    assert sizes[0] < sizes[1]

    @quick_jit
    def run(*args):
        one, other = (
            etrace.value_and_grad(g, squares, window=3) for g in (graph, plain)
        )
        params, state, xs, ts = args
        first = one(params, state, etrace.init_trace(graph), xs, ts)
        return first[1], other(params, state, etrace.init_trace(plain), xs, ts)[1]

    assert_same_gradient(*run(params, state, xs, ts), rtol=1e-11)


SOME = [name for name, (_, shapes) in CELLS.items() if VECTOR in shapes]


@pytest.mark.parametrize("name", SOME)
def test_the_gradient_is_that_of_whole_arrays(name):
    net, state, xs, ts = _cell(name)
    graph = etrace.compile(net, state, xs[0])
    _assert_same_without(graph, graph.params(net), state, xs, ts)


STRUCTURED = [
    "lstm",
    "rnn",
    "lif_scalar_tau",
    "rnn_indrnn",
    "sparse_recurrent_two_slots",
    "three_layers",
    "delay_line",
    "quantities",
]


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_gradient_is_that_of_whole_arrays_on_the_catalogue(name):
    graph, params, state, xs, ts = of_catalogue(name, etrace.DRTRL())
    xs, ts = jax.tree.map(lambda a: a[:4], (xs, ts))
    _assert_same_without(graph, params, state, xs, ts)


def test_the_comparison_with_whole_arrays_sees_a_fault():
    """A guard: told that units agree where they do not, the gradient is another one."""
    net, state, xs, ts = _cell("heterogeneous")
    graph = etrace.compile(net, state, xs[0])
    relations = tuple(
        dataclasses.replace(r, alike=(r.weight == ("w",),)) for r in graph.relations
    )
    wrong = dataclasses.replace(graph, relations=relations)
    params = graph.params(net)
    runs = [etrace.value_and_grad(g, squares, window=3) for g in (graph, wrong)]
    found = [quick_jit(run)(params, state, None, xs, ts)[1] for run in runs]
    assert differ(found[1].w, found[0].w)
