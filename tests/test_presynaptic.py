"""Factorised traces of sparse connections: vectors over units, not over synapses."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from models import spike
from oracles import quick_jit
from spread import alike, mesh_of
from windows import apart, each_square

import eqx_etrace as etrace


N, IN, OUT, EDGES, STEPS, BATCH = 12, 3, 2, 40, 13, 3
RULE = etrace.ESDRTRL((0.7, 0.8))
DRAWN = np.random.default_rng(0)
# Pairs (post, pre) without repetition; the last units receive nothing.
PAIRS = [(post, pre) for post in range(N - 2) for pre in range(N) if post != pre]
POST, PRE = np.array(sorted(map(tuple, DRAWN.permutation(PAIRS)[:EDGES]))).T
FAN_IN = DRAWN.integers(0, N, (N, 4))
PLACES = np.add.outer(np.arange(N), np.arange(3)) % N


class Net(eqx.Module):
    """LIF neurons with currents; `current(w, z)` is what they send to each other."""

    u: jax.Array
    w: jax.Array
    readout: jax.Array
    current: Any = eqx.field(static=True)

    def __call__(self, x, state):
        v, g = state
        z = spike(v - 0.5)
        g = 0.8 * g + self.w @ x + self.current(self.u, z)
        v = 0.9 * v * (1 - z) + jnp.tanh(g)
        return self.readout @ spike(v - 0.5), (v, g)


def edges(u, z):
    return jax.ops.segment_sum(u * z[PRE], POST, num_segments=N)


def edges_shuffled(u, z):
    order = np.random.default_rng(1).permutation(EDGES)
    return jnp.zeros(N).at[POST[order]].add(z[PRE[order]] * u[order])


def rows(u, z):
    return jnp.einsum("ij,ij->i", u, z[FAN_IN])


def patches(u, z):
    """A convolution round a ring, as a product."""
    return z[PLACES] @ u


CURRENTS = {
    "edges": (edges, (EDGES,), True),
    "edges shuffled": (edges_shuffled, (EDGES,), True),
    "rows": (rows, FAN_IN.shape, False),
    "patches": (patches, (3,), False),
}


def network(name, batch=None) -> tuple[Any, ...]:
    current, shape, _ = CURRENTS[name]
    keys = jax.random.split(jax.random.key(3), 5)
    u, w, readout = (
        jax.random.normal(key, size)
        for key, size in zip(keys, (shape, (N, IN), (OUT, N)), strict=False)
    )
    lead = (STEPS,) if batch is None else (STEPS, batch)
    data = [
        jax.random.normal(key, (*lead, size))
        for key, size in zip(keys[3:], (IN, OUT), strict=True)
    ]
    net = Net(u, w, readout, current)
    return net, (jnp.zeros((*lead[1:], N)),) * 2, *data


def of_use(graph):
    (found,) = (n for n, r in enumerate(graph.relations) if r.weight == ("u",))
    return found


@pytest.mark.parametrize("name", CURRENTS)
def test_the_trace_has_one_number_per_unit(name):
    net, state, xs, _ = network(name)
    graph = etrace.compile(net, state, xs[0], RULE)
    one, other = etrace.init_trace(graph), etrace.init_trace(apart(graph))
    number = of_use(graph)
    assert one[number].presynaptic.shape == (N,)
    assert np.prod(other[number].presynaptic.shape) >= 3 * N
    if CURRENTS[name][2]:
        assert [v.shape for v in one[number].postsynaptic] == [(N,)] * 2
        assert [v.shape for v in other[number].postsynaptic] == [(EDGES,)] * 2


@pytest.mark.parametrize("window", [1, 5, None])
@pytest.mark.parametrize("batch", [None, BATCH])
@pytest.mark.parametrize("name", CURRENTS)
def test_it_gives_what_a_filter_per_synapse_gives(name, batch, window):
    net, state, xs, ts = network(name, batch)
    graph = etrace.compile(net, state, xs[0], RULE, batched=batch is not None)
    params = graph.params(net)
    reset = jax.random.bernoulli(jax.random.key(9), 0.2, xs.shape[:-1])
    found = []
    for each in (graph, apart(graph)):
        fun = etrace.value_and_grad(each, each_square, window=window)
        (losses, grads, *_), (_, again, _, trace) = quick_jit(
            lambda fun=fun: (
                fun(params, state, None, xs, ts),
                fun(params, state, None, xs, ts, reset=reset),
            )
        )()
        found.append((losses, grads, again, trace))
    alike(found[0][:3], found[1][:3], 1e-12)
    number = of_use(graph)
    presynaptic: Any = graph.relations[number].presynaptic
    one, other = (each[3][number] for each in found)
    x = np.asarray(presynaptic.copied(one.presynaptic))
    np.testing.assert_allclose(x.ravel(), np.ravel(other.presynaptic), atol=1e-14)


def test_edges_learn_as_the_entries_of_a_matrix():
    net, state, xs, ts = network("edges")
    dense = jnp.zeros((N, N)).at[POST, PRE].set(net.u)
    twin = Net(dense, net.w, net.readout, jnp.matmul)
    found = []
    for each in (net, twin):
        graph = etrace.compile(each, state, xs[0], RULE)
        fun = quick_jit(etrace.value_and_grad(graph, each_square))
        found.append(fun(graph.params(each), state, None, xs, ts)[1])
    alike(found[0].u, found[1].u[POST, PRE], 1e-12)
    alike(found[0].w, found[1].w, 1e-12)


def test_projections_of_one_population_share_its_vector():
    class Two(eqx.Module):
        a: jax.Array
        b: jax.Array

        def __call__(self, x, v):
            z = spike(v - 0.5)
            drive = edges(self.a, z) + jnp.einsum("ij,ij->i", self.b, z[FAN_IN])
            v = 0.9 * v + x + drive
            return v, v

    net: Any = Two(jnp.ones(EDGES), jnp.ones(FAN_IN.shape))
    graph = etrace.compile(net, jnp.zeros(N), jnp.ones(N), RULE)
    trace = etrace.init_trace(graph)
    vectors = [entry.presynaptic for entry in trace]
    assert [None if v is None else v.shape for v in vectors] == [(N,), None]
    xs, ts = jnp.ones((STEPS, N)), jnp.zeros((STEPS, N))
    found = []
    for each in (graph, apart(graph)):
        fun = quick_jit(etrace.value_and_grad(each, each_square))
        found.append(fun(graph.params(net), jnp.zeros(N), None, xs, ts)[1])
    alike(found[0], found[1], 1e-12)


class Halves(eqx.Module):
    """Two elements of one product feed each unit."""

    w: Any
    join: Any = eqx.field(static=True)

    def __call__(self, x, h):
        if isinstance(self.w, tuple):
            y = jnp.stack([part @ x for part in self.w])
        else:
            y = (self.w @ x).reshape(2, N)
        h = 0.5 * h + self.join(y, h)
        return h, h


@pytest.mark.parametrize("same", [True, False])
def test_one_df_per_unit_where_all_are_the_same(same):
    def join(y, h):
        if same:
            return jnp.tanh(y.sum(0) + h)
        return jnp.tanh(y[0] + h) * jax.nn.sigmoid(y[1])

    w = jax.random.normal(jax.random.key(0), (2 * N, IN))
    (_, _, xs, _), ts = network("rows"), jnp.ones((STEPS, N))
    found = []
    weights: Any = (w, (w[:N], w[N:]))
    for each in weights:
        net: Any = Halves(each, join)
        h = jnp.zeros(N)
        graph = etrace.compile(net, h, xs[0], RULE)
        fun = quick_jit(etrace.value_and_grad(graph, each_square))
        grads, trace = (fun(graph.params(net), h, None, xs, ts)[n] for n in (1, 3))
        found.append((grads.w, trace[0].postsynaptic[0].shape))
    assert found[0][1] == ((N,) if same else (2 * N,))
    alike(found[0][0], jnp.concatenate(found[1][0]), 1e-12)


BUFFER = np.arange(2 * N).reshape(2, N)
# What x is of a state h (2, N), and what it is copied from.
COPIES = {
    "gather": (lambda h: h[0][FAN_IN], lambda h: h[0]),
    "of a buffer": (lambda h: h.ravel()[BUFFER[:, FAN_IN].T], lambda h: h.ravel()),
    "turned": (lambda h: h[1][::-1][FAN_IN].reshape(N, 2, 2), lambda h: h[1][::-1]),
    "repeated": (lambda h: jnp.repeat(h[0], 5), lambda h: h[0]),
    "broadcast": (lambda h: h[0][:, None] + jnp.zeros((N, 3)), None),
    "scaled": (lambda h: (2 * h[0])[FAN_IN], lambda h: 2 * h[0]),
    "few": (lambda h: h[0][:3][np.array([0, 1, 2, 0, 1, 2])], lambda h: h[0][:3]),
    "outside": (lambda h: jnp.take(h[0], FAN_IN + 1, fill_value=0), None),
    "outside, no number": (lambda h: jnp.take(h[0], FAN_IN + 1), None),
    "padded": (lambda h: jnp.pad(h[0], (0, 5 * N)), None),
    "of two": (lambda h: jnp.concatenate([h[0], h[1], h[0], h[1]]), None),
    "as it is": (lambda h: h.reshape(-1), None),
    "data for indices": (lambda h: h[0][(h[0] > 0).astype(int)[FAN_IN]], None),
    "not linear": (lambda h: jnp.tanh(h[0][FAN_IN]), None),
}


def test_what_x_is_copied_from():
    h = jnp.arange(2.0 * N).reshape(2, N) - 5
    for name, (make, value) in COPIES.items():

        def call(w, x, state, make=make):
            h, y = state
            y = 0.5 * y + w * make(h)
            return y, (h + x, y)

        w = jnp.ones(make(h).shape)
        graph = etrace.compile(w, (h, w), 0.0, RULE, call=call)
        found = graph.relations[0].presynaptic
        assert (found is None) == (value is None), name
        if found is not None and value is not None:
            source = value(h)
            assert found.shape == source.shape, name
            np.testing.assert_array_equal(found.copied(source), make(h), name)
            several = found.copied(jnp.stack([source, -source]))
            np.testing.assert_array_equal(several, jnp.stack([make(h), -make(h)]))


def test_other_rules_are_told_of_operands_as_they_are():
    net, state, xs, _ = network("edges")
    graph = etrace.compile(net, state, xs[0], etrace.DRTRL())
    for relation in graph.relations:
        assert relation.presynaptic is None and relation.first is None
        assert relation.operands == relation.equation.inputs
    rule = etrace.ByWeight(etrace.DRTRL(), {"u": RULE})
    mixed = etrace.compile(net, state, xs[0], rule)
    kept = [r.presynaptic is not None for r in mixed.relations]
    assert kept == [r.weight == ("u",) for r in mixed.relations]


@pytest.mark.parametrize("name", ["edges", "rows"])
def test_nothing_of_a_window_is_as_large_as_its_synapses(name):
    units, fan_in, steps = 100, 200, 40
    rng = np.random.default_rng(0)
    pre = rng.integers(0, units, (units, fan_in))
    post = np.repeat(np.arange(units), fan_in)

    def current(u, z):
        if name == "rows":
            return jnp.einsum("ij,ij->i", u, z[pre])
        return jax.ops.segment_sum(u * z[pre.ravel()], post, num_segments=units)

    u = jnp.ones(pre.shape if name == "rows" else pre.size)
    net = Net(u, jnp.ones((units, IN)), jnp.ones((OUT, units)), current)
    state = (jnp.zeros(units),) * 2
    xs = jax.random.normal(jax.random.key(0), (steps, IN))
    ts = jnp.ones((steps, OUT))
    graph = etrace.compile(net, state, xs[0], RULE)

    def run(graph):
        fun = jax.jit(etrace.value_and_grad(graph, each_square))
        args = graph.params(net), state, None, xs, ts
        compiled = fun.lower(*args).compile()
        memory: Any = compiled.memory_analysis()
        return compiled(*args)[1], memory.temp_size_in_bytes

    (found, small), (expected, large) = run(graph), run(apart(graph))
    # Newer versions of XLA hold a dozen arrays of a single step.
    most = 6 if jax.__version_info__ < (0, 11) else 16
    assert small < most * u.nbytes and large > steps * u.nbytes
    alike(found, expected, 1e-12)


def test_over_devices_the_vector_is_on_all():
    net, state, xs, ts = network("rows", batch=4)
    graph = etrace.compile(net, state, xs[0], RULE, batched=True)
    number = of_use(graph)
    fun = quick_jit(etrace.value_and_grad(graph, each_square))
    expected = fun(graph.params(net), state, None, xs, ts)
    there = etrace.shardings(graph, mesh_of("both"))
    assert there.trace[number].presynaptic.spec == P("data")
    values = graph.params(net), state
    params, state = jax.device_put(values, (there.params, there.state))
    xs, ts = jax.device_put((xs, ts), there.sequence)
    spread = quick_jit(etrace.value_and_grad(there.graph, each_square))
    alike(spread(params, state, None, xs, ts), expected)
