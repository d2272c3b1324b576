"""OTPE through several layers, against its formula."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike
from oracles import assert_same_gradient, quick_jit
from windows import assert_same, differ, squares

import eqx_etrace as etrace


SIZES, OUT, STEPS = (4, 5, 6, 3), 2, 20
LEAK, KAPPA = 0.6, 0.8


class Layer(eqx.Module):
    weight: Any
    bias: Any

    def __call__(self, x, v):
        v = LEAK * v + self.weight @ x + self.bias
        return spike(v - 1), v


class Net(eqx.Module):
    """Layers of leaky neurons without reset, each fed by the spikes of the one below;
    the gain is a weight behind the product of a layer."""

    layers: tuple[Layer, ...]
    out: Any
    gain: Any

    def __call__(self, x, state) -> tuple[jax.Array, Any]:
        new = []
        for layer, v in zip(self.layers, state, strict=True):
            x, v = layer(x * self.gain, v)
            new.append(v)
        return self.out @ x, tuple(new)


RULES = {
    "the average": etrace.OTPE(KAPPA),
    "this step": etrace.Kappa(etrace.DRTRL(), KAPPA),
}


def _problem(rule, **options):
    rng = np.random.default_rng(0)
    layers = tuple(
        Layer(rng.normal(0.3, 1.0, (n, m)), rng.normal(0.2, 0.1, n))
        for m, n in zip(SIZES, SIZES[1:], strict=False)
    )
    plain = Net(layers, rng.normal(size=(OUT, SIZES[-1])), np.asarray(1.3))
    net = jax.tree.map(jnp.asarray, plain)
    xs, ts = rng.normal(size=(STEPS, SIZES[0])), rng.normal(size=(STEPS, OUT))
    state = tuple(jnp.zeros(n) for n in SIZES[1:])
    graph = etrace.compile(net, state, jnp.asarray(xs[0]), rule, **options)
    return graph, (graph.params(net), state, None, jnp.asarray(xs), jnp.asarray(ts))


def _by_formula(net, xs, ts, *, average):
    """The gradients by weights and biases, layer by layer."""
    layers = net.layers
    vs = [np.zeros(n) for n in SIZES[1:]]
    eps = [np.zeros((n, m + 1)) for m, n in zip(SIZES, SIZES[1:], strict=False)]
    smooth, total = list(eps), list(eps)
    passed, count = list(vs), 0.0
    for x, target in zip(xs, ts, strict=True):
        old = KAPPA * count / (KAPPA * count + 1) if average else 0.0
        count = KAPPA * count + 1
        z = x
        for i, layer in enumerate(layers):
            x = net.gain * z
            vs[i] = LEAK * vs[i] + layer.weight @ x + layer.bias
            eps[i] = LEAK * eps[i] + np.append(x, 1.0)
            psi = np.asarray(jax.vmap(jax.grad(spike))(jnp.asarray(vs[i] - 1)))
            smooth[i] = KAPPA * smooth[i] + psi[:, None] * eps[i]
            passed[i] = old * passed[i] + (1 - old) * psi
            z = (vs[i] > 1) * 1.0
        signal = net.out.T @ (2 * (net.out @ z - target))
        for i in reversed(range(len(layers))):
            total[i] = total[i] + signal[:, None] * smooth[i]
            signal = net.gain * layers[i].weight.T @ (signal * passed[i])
    return tuple(Layer(g[:, :-1], g[:, -1]) for g in total)


def _gradient(graph, *args, **options):
    fun = etrace.value_and_grad(graph, squares, **options)
    return quick_jit(lambda *args: fun(*args)[1])(*args)


@pytest.mark.parametrize("name", RULES)
def test_three_layers_are_those_of_the_formula(name):
    graph, args = _problem(RULES[name])
    plain = jax.tree.map(np.asarray, args[0])
    xs, ts = map(np.asarray, args[3:])
    expected = _by_formula(plain, xs, ts, average=name == "the average")
    other = _by_formula(plain, xs, ts, average=name != "the average")
    assert differ(expected[0].weight, other[0].weight)
    assert_same_gradient(_gradient(graph, *args).layers, expected, rtol=1e-10)


def test_the_average_goes_on_from_call_to_call_and_through_evolve():
    graph, (params, state, _, xs, ts) = _problem(RULES["the average"])
    fun = etrace.value_and_grad(graph, squares)
    half = STEPS // 2

    def last(xs, ts):
        mask = jnp.arange(STEPS) >= half
        return fun(params, state, None, xs, ts, mask)[1]

    def moved(xs, ts):
        zero = etrace.init_trace(graph)
        _, now, trace = etrace.evolve(graph, params, state, zero, xs[:half])
        return fun(params, now, trace, xs[half:], ts[half:])[1]

    assert_same(quick_jit(last)(xs, ts), quick_jit(moved)(xs, ts))


def test_a_batch_is_its_samples():
    graph, (params, state, _, xs, ts) = _problem(RULES["the average"])
    stacked = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape)), state)
    two = jnp.stack([xs, xs[::-1]], 1), jnp.stack([ts, 2 * ts], 1)
    batched = etrace.compile(
        graph.model(params), stacked, two[0][0], RULES["the average"], batched=True
    )
    singles = [
        _gradient(graph, params, state, None, two[0][:, b], two[1][:, b])
        for b in range(2)
    ]
    expected = jax.tree.map(jnp.add, *singles)
    assert_same(_gradient(batched, params, stacked, None, *two), expected)


def test_what_one_weight_more_on_the_way_does():
    """The bias adds to the product: the average is that of the last of both, once."""
    graph, _ = _problem(RULES["the average"])
    passing = [r.weight for r in graph.relations if r.passes]
    assert passing == [(f"layers[{i}].bias",) for i in range(3)]


def test_an_average_has_no_place_for_other_signals():
    signal = etrace.RandomFeedback(jax.random.key(0))
    with pytest.raises(ValueError, match="average: got True with .* RandomFeedback"):
        etrace.Kappa(etrace.DRTRL(signal=signal), KAPPA, average=True)
    assert not etrace.OTPE(KAPPA, signal).average
    assert not etrace.ThreeFactor(etrace.OTPE(KAPPA)).average  # pyright: ignore


class Rotating(eqx.Module):
    """A layer of rotating units: a complex number each, or two real ones."""

    turn: jax.Array
    w: tuple[jax.Array, jax.Array]
    out: tuple[jax.Array, jax.Array]
    kind: str = eqx.field(static=True)

    def __call__(self, x, h):
        (w, v), (out, put) = self.w, self.out
        c, s = 0.9 * jnp.cos(self.turn), 0.9 * jnp.sin(self.turn)
        if self.kind == "real":
            h = c * h[0] - s * h[1] + w @ x, s * h[0] + c * h[1] + v @ x
            return out @ jnp.tanh(h[0]) - put @ jnp.tanh(h[1]), h
        x = x.astype(complex)
        h = jax.lax.complex(c, s) * h + jax.lax.complex(w, v) @ x
        a, b = jnp.tanh(h.real), jnp.tanh(h.imag)
        if self.kind == "complex":
            return (jax.lax.complex(out, put) @ jax.lax.complex(a, b)).real, h
        return out @ a - put @ b, h


class Pair(eqx.Module):
    layers: tuple[Rotating, Rotating]

    def __call__(self, x, state):
        y, first = self.layers[0](x, state[0])
        out, second = self.layers[1](y, state[1])
        return out, (first, second)


def _rotating(kind, rule):
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.normal(size=shape))

    def layer():
        pairs = [(drawn(*shape), drawn(*shape)) for shape in ((3, 2), (2, 3))]
        return Rotating(drawn(3), *pairs, kind=kind)

    net = Pair((layer(), layer()))
    zero = (jnp.zeros(3), jnp.zeros(3)) if kind == "real" else jnp.zeros(3, complex)
    xs, ts = drawn(9, 2), drawn(9, 2)
    graph = etrace.compile(net, (zero, zero), xs[0], rule)
    fun = quick_jit(etrace.grad(graph, squares))
    return fun(graph.params(net), (zero, zero), None, xs, ts)[0]


@pytest.mark.parametrize("rule", [etrace.OTPE(0.5), etrace.EProp(0.5)])
def test_complex_units_are_pairs_of_real_ones(rule):
    got, expected = (_rotating(kind, rule) for kind in ("parts", "real"))
    got, expected, other = (
        [(layer.turn, layer.w, layer.out) for layer in found.layers]
        for found in (got, expected, _rotating("real", etrace.DRTRL()))
    )
    assert_same_gradient(got, expected)
    assert differ(expected, other)
    with pytest.raises(etrace.CompileError, match="acts through a complex value"):
        _rotating("complex", rule)
