"""ES-D-RTRL against its formula, written out in NumPy."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike
from oracles import assert_same_gradient, online, quick_jit
from windows import assert_same, chain, differ, local, squares

import eqx_etrace as etrace
from eqx_etrace._rules import FactorisedTrace


N, IN, OUT, STEPS = 5, 4, 3, 20
LEAK, SLOW = 0.6, 0.8


class LeakyRNN(eqx.Module):
    w: jax.Array
    u: jax.Array
    out: jax.Array

    def __call__(self, x, h):
        h = LEAK * h + jnp.tanh(self.w @ x + self.u @ h - 0.4 * h)
        return self.out @ h, h


class LIF(eqx.Module):
    w: jax.Array
    u: jax.Array
    out: jax.Array

    def __call__(self, x, state):
        v, g = state
        z = spike(v - 1)
        g = SLOW * g + self.w @ x + self.u @ z
        v = LEAK * (v - z) + (1 - LEAK) * g
        return self.out @ spike(v - 1), (v, g)


def _slope(v):
    return 0.5 / (1 + np.abs(2 * v)) ** 2


def _rnn_step(p, x, state):
    """The new state, and of its slots D, L, df; the presynaptic values; dout/dh."""
    (h,) = state
    z = np.tanh(p["w"] @ x + p["u"] @ h - 0.4 * h)
    slope = 1 - z**2
    D, L = [[LEAK - 0.4 * slope]], [[0.0]]
    return [LEAK * h + z], D, L, [slope], h, np.ones(N), lambda h: h[0]


def _lif_step(p, x, state):
    v, g = state
    z = (v > 1).astype(float)
    new_g = SLOW * g + p["w"] @ x + p["u"] @ z
    new_v = LEAK * (v - z) + (1 - LEAK) * new_g
    D = [[LEAK * (1 - _slope(v - 1)), 0.0], [0.0, SLOW * np.ones(N)]]
    L, df = [[0.0, 1 - LEAK], [0.0, 0.0]], [0.0, np.ones(N)]
    return [new_v, new_g], D, L, df, z, _slope(new_v - 1), lambda s: 1.0 * (s[0] > 1)


# name: (model, its step, the order of its slots)
MODELS = {"rnn": (LeakyRNN, _rnn_step, (0,)), "lif": (LIF, _lif_step, (1, 0))}


def _formula(name, p, state, xs, ts, a_x, a_f):
    """x^t and f^t of the docstring of `ESDRTRL`, step by step."""
    _, step, order = MODELS[name]
    slots = len(state)
    pre = {"w": np.zeros(IN), "u": np.zeros(N)}
    post = [np.zeros(N) for _ in range(slots)]
    total = {key: np.zeros_like(value) for key, value in p.items()}
    for t, (x, target) in enumerate(zip(xs, ts, strict=True), start=1):
        state, D, L, df, source, through, seen = step(p, x, state)
        for key, value in (("w", x), ("u", source)):
            pre[key] = a_x * pre[key] + value
        old, post = post, [np.zeros(N) for _ in range(slots)]
        for s in order:
            past = sum(D[s][r] * old[r] for r in range(slots))
            now = sum(L[s][r] * post[r] for r in range(slots))
            post[s] = a_f * past + now + (1 - a_f) * df[s]
        error = 2 * (p["out"] @ seen(state) - target)
        total["out"] += np.outer(error, seen(state))
        # Of the new slots the output reads the first alone.
        signal = through * (p["out"].T @ error)
        for key in ("w", "u"):
            total[key] += np.outer(signal * post[0], pre[key]) / (1 - a_f**t)
    return total


def _problem(name, rule):
    rng = np.random.default_rng(1)
    shapes = {"w": (N, IN), "u": (N, N), "out": (OUT, N)}
    p = {key: rng.normal(0.0, 0.7, shape) for key, shape in shapes.items()}
    model, _, order = MODELS[name]
    start = [rng.normal(0.0, 0.5, N) for _ in order]
    xs, ts = rng.normal(size=(STEPS, IN)), rng.normal(size=(STEPS, OUT))
    net = model(**{key: jnp.asarray(value) for key, value in p.items()})
    state = tuple(map(jnp.asarray, start)) if len(start) > 1 else jnp.asarray(start[0])
    graph = etrace.compile(net, state, jnp.asarray(xs[0]), rule=rule)
    args = graph.params(net), state, jnp.asarray(xs), jnp.asarray(ts)
    return graph, args, (p, start, xs, ts)


@pytest.mark.parametrize("decay", [0.8, (0.7, 0.9), (0.9, 0.0), (0.0, 0.9), 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_formula(name, decay):
    rule = etrace.ESDRTRL(decay)
    graph, args, plain = _problem(name, rule)
    got = quick_jit(lambda *args: online(graph, *args))(*args)
    expected = _formula(name, *plain, *rule.decays)
    found = {"w": got.w, "u": got.u, "out": got.out}
    assert_same_gradient(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_without_decay_there_is_no_memory(name):
    graph, args, _ = _problem(name, etrace.ESDRTRL(0.0))
    params, state, xs, ts = args

    def of_the_step(params):
        def body(state, now):
            out, state = graph.model(params)(now[0], jax.lax.stop_gradient(state))
            return state, squares(out, now[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, ts))[1])

    run = quick_jit(etrace.value_and_grad(graph, squares))
    got = run(params, state, None, xs, ts)[1]
    assert_same_gradient(got, quick_jit(jax.grad(of_the_step))(params))
    other, *_ = _problem(name, etrace.ESDRTRL(0.8))
    run = quick_jit(etrace.value_and_grad(other, squares))
    assert differ(got, run(params, state, None, xs, ts)[1])


@pytest.mark.parametrize("window", [1, 4])
def test_the_correction_counts_the_steps_of_evolve(window):
    graph, params, state, xs, ts = chain(2, 9, 3, etrace.ESDRTRL(0.9))
    run = quick_jit(etrace.value_and_grad(graph, squares, window=window))
    mask = (jnp.arange(9) >= 5).astype(float)
    losses, *expected = run(params, state, None, xs, ts, mask)
    evolve = quick_jit(functools.partial(etrace.evolve, graph))
    _, *carried = evolve(params, state, None, xs[:5])
    found, *got = run(params, *carried, xs[5:], ts[5:])
    assert_same([found, *got], [losses[5:], *expected])
    for _, _, weight in local(graph).whole(graph.relations, got[-1]):
        np.testing.assert_allclose(weight, 1 - 0.9**9, rtol=1e-12)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_trace_is_as_large_as_activations(slots, batch):
    graph, *_ = chain(slots, 1, batch, etrace.ESDRTRL(0.9))
    lead = () if batch is None else (batch,)
    # Of the two products; a gain has a trace as large as itself.
    kept = etrace.init_trace(graph)
    whole = local(graph).whole(graph.relations, kept)
    for relation, trace in list(zip(graph.relations, whole, strict=True))[:2]:
        outputs, inputs = relation.weight_shape
        assert isinstance(trace, FactorisedTrace)
        assert trace.presynaptic is not None and trace.postsynaptic is not None
        assert trace.weight is not None
        assert trace.presynaptic.shape == (*lead, 1, inputs)
        assert [f.shape for f in trace.postsynaptic] == [(*lead, outputs)] * slots
        assert trace.weight.shape == lead
        size = inputs if relation.same_x is None else 0
        size += outputs * slots + 1 if relation.same_df is None else 0
        assert local(graph).trace_bytes(relation) == 8 * size
    sizes = sum(local(graph).trace_bytes(relation) for relation in graph.relations)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) == (batch or 1) * sizes


class Gates(eqx.Module):
    """Two products with one x, and a sum of three whose derivatives agree."""

    i: jax.Array
    f: jax.Array
    u: jax.Array
    b: jax.Array
    out: jax.Array

    def __call__(self, x, h):
        keep = jax.nn.sigmoid(self.f @ x)
        h = keep * h + jnp.tanh(self.i @ x + self.u @ h + self.b)
        return self.out @ h, h


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("batch", [None, 2])
def test_what_relations_share_is_kept_once(window, batch):
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = (N, IN), (N, IN), (N, N), (N,), (OUT, N)
    net = Gates(*map(jax.random.normal, keys, shapes))
    lead = () if batch is None else (batch,)
    state = jnp.full((*lead, N), 0.3)
    xs = jax.random.normal(keys[5], (STEPS, *lead, IN))
    ts = jax.random.normal(keys[6], (STEPS, *lead, OUT))
    rule = etrace.ESDRTRL((0.7, 0.9))
    graph = etrace.compile(net, state, xs[0], rule=rule, batched=batch is not None)
    names = {relation.name: number for number, relation in enumerate(graph.relations)}
    shared = {r.name: (r.same_x, r.same_df) for r in graph.relations}
    first = min(names["i"], names["u"], names["b"])
    x = min(names["i"], names["f"])
    expected = {
        name: (
            x if name in "if" and names[name] != x else None,
            first if name in "iub" and names[name] != first else None,
        )
        for name in "fiub"
    }
    assert shared == expected
    plain = tuple(
        dataclasses.replace(relation, same_x=None, same_df=None)
        for relation in graph.relations
    )
    other = dataclasses.replace(graph, relations=plain)
    found, sizes = [], []
    for g in (graph, other):
        run = quick_jit(etrace.value_and_grad(g, squares, window=window))
        _, grads, _, trace = run(g.params(net), state, None, xs, ts)
        found.append((grads, local(g).whole(g.relations, trace)))
        size = sum(leaf.size for leaf in jax.tree.leaves(trace))
        bytes_of = sum(map(rule.trace_bytes, g.relations))
        assert 8 * size == (batch or 1) * bytes_of
        sizes.append(size)
    assert_same(*found)
    assert sizes[0] < sizes[1]


class Bias(eqx.Module):
    """A bias and a time constant of each unit, or the same as products with a one."""

    w: jax.Array
    b: jax.Array
    tau: jax.Array
    out: jax.Array
    spelt_out: bool = eqx.field(static=True)

    def __call__(self, x, state):
        v, g = state
        one = jnp.ones(1)
        b = self.b[:, None] @ one if self.spelt_out else self.b
        keep = self.tau[:, None] @ one if self.spelt_out else self.tau
        g = SLOW * g + self.w @ x + b
        v = jnp.tanh(LEAK * v + g + keep)
        return self.out @ v, (v, g)


def test_biases_are_as_products_with_a_one():
    rng = np.random.default_rng(3)
    shapes = (N, IN), (N,), (N,), (OUT, N)
    w, b, tau, out = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    state = (jnp.full(N, 0.1), jnp.full(N, -0.2))
    xs, ts = (jnp.asarray(rng.normal(size=(STEPS, n))) for n in (IN, OUT))
    found = []
    for spelt_out in (False, True):
        net = Bias(w, b, tau, out, spelt_out)
        graph = etrace.compile(net, state, xs[0], rule=etrace.ESDRTRL((0.7, 0.9)))
        got = quick_jit(lambda *args, g=graph: online(g, *args))
        found.append(jax.tree.leaves(got(graph.params(net), state, xs, ts)))
    assert_same(*found)


@pytest.mark.parametrize("name", MODELS)
def test_without_decay_it_is_immediate(name):
    graph, args, _ = _problem(name, etrace.ESDRTRL(0.0))
    other, *_ = _problem(name, etrace.Immediate())
    got, expected = (
        quick_jit(lambda *a, g=g: online(g, *a))(*args) for g in (graph, other)
    )
    assert_same(got, expected)
    assert etrace.PPProp is etrace.ESDRTRL
