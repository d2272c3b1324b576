"""Graphs of NIR that are no chains, the layouts of other simulators, and training."""

import jax
import jax.numpy as jnp
import nir
import nir_reference
import numpy as np
import pytest
from oracles import quick_jit
from test_nir import DT, MODELS, _cuba_lif, _flat, _inputs, _lif, _u, run

import eqx_etrace as etrace
from eqx_etrace import nn
from eqx_etrace._nir._topology import wiring


def _w(post, pre):
    return _u(-0.8, 1.0, post, pre)


def _ends(size, out=None):
    return {
        "input": nir.Input({"input": np.array([size])}),
        "output": nir.Output({"output": np.array([size if out is None else out])}),
    }


def _graph(nodes, *edges):
    return nir.NIRGraph(nodes, [tuple(e.split()) for e in edges], type_check=False)


def _layer():
    """As snnTorch writes recurrent layers."""
    nodes = {**_ends(4), "lif": _cuba_lif((4,), 3.0), "w_rec": _affine(4, 4)}
    edges = ("input lif", "lif w_rec", "w_rec lif", "lif output")
    return _graph(nodes, *edges)


def _affine(post, pre):
    return nir.Affine(_w(post, pre), _u(-0.3, 0.3, post))


def _nested():
    nodes = {
        **_ends(3, 2),
        "fc1": _affine(4, 3),
        "lif1": _layer(),
        "fc2": _affine(2, 4),
    }
    return _graph(nodes, "input fc1", "fc1 lif1", "lif1 fc2", "fc2 output")


def _deeply_nested():
    inner = _graph({**_ends(4), "rnn": _layer()}, "input rnn", "rnn output")
    nodes = {**_ends(4), "block": inner, "more": _layer()}
    return _graph(nodes, "input block", "block more", "more output")


def _skip():
    nodes = {**_ends(4), "a": _affine(4, 4), "b": _lif((4,), r=np.full(4, 9.0))}
    nodes["c"] = _affine(4, 4)
    edges = ("input a", "a b", "b c", "a c", "input c", "c output", "b output")
    return _graph(nodes, *edges)


def _two_populations():
    """Each excites or inhibits the other and itself; one gets the input."""
    nodes = {**_ends(3, 5), "in": _affine(5, 3), "exc": _lif((5,)), "inh": _lif((4,))}
    excites = nir.Linear(4 * np.abs(_w(4, 5)))
    nodes |= {"ee": _affine(5, 5), "ei": excites, "ie": nir.Linear(-_w(5, 4))}
    edges = ("input in", "in exc", "exc ee", "ee exc", "exc ei", "ei inh", "inh ie")
    return _graph(nodes, *edges, "ie exc", "exc output")


def _leaky_loop():
    """Without spikes, and with a delay on the way."""
    li = nir.LI(np.full(3, 0.01), np.ones(3), np.zeros(3))
    delay = nir.Delay(np.array([0.002, 0.004, 0.0]))
    nodes = {**_ends(3), "li": li, "delay": delay, "w": nir.Linear(0.5 * _w(3, 3))}
    return _graph(nodes, "input li", "li delay", "delay w", "w li", "li output")


def _on_itself():
    nodes = {**_ends(4), "lif": _lif((4,))}
    return _graph(nodes, "input lif", "lif lif", "lif output")


def _shared_weights():
    """What comes in and what comes back go through the same weights."""
    nodes = {**_ends(4), "w": _affine(4, 4), "lif": _lif((4,))}
    return _graph(nodes, "input w", "w lif", "lif w", "lif output")


def _two_ways_in():
    nodes = {**_ends(4), "w": _affine(4, 4), "lif": _lif((4,))}
    return _graph(nodes, "input w", "input lif", "w lif", "lif w", "lif output")


def _two_ways_out():
    nodes = {**_ends(4), "w": _affine(4, 4), "lif": _lif((4,))}
    return _graph(nodes, "input lif", "w lif", "lif w", "w output", "lif output")


# The graph, the order in which the reference calls its nodes, and what it becomes.
NESTED = ["fc1", "lif1.input", "lif1.w_rec", "lif1.lif", "lif1.output", "fc2", "output"]
DEEP = [
    "block.input",
    *(f"block.rnn.{key}" for key in ("input", "w_rec", "lif", "output")),
    "block.output",
    *(f"more.{key}" for key in ("input", "w_rec", "lif", "output")),
    "output",
]
GRAPHS = {
    "nested": (_nested(), NESTED, "Dense Recurrent Dense"),
    "deeply nested": (_deeply_nested(), DEEP, "Recurrent Recurrent"),
    "skip": (_skip(), "a b c output".split(), "Dense LIF Dense"),
    "two populations": (
        _two_populations(),
        "in ee ie exc ei inh output".split(),
        "Dense Dense Dense LIF Dense LIF",
    ),
    "leaky loop": (_leaky_loop(), "delay w li output".split(), "Recurrent"),
    "on itself": (_on_itself(), "lif output".split(), "Recurrent"),
    "two ways in": (_two_ways_in(), "w lif output".split(), "Dense LIF"),
    "two ways out": (_two_ways_out(), "w lif output".split(), "Dense LIF"),
    "shared weights": (_shared_weights(), "w lif output".split(), "Recurrent"),
}


def _kinds(model):
    sequential = isinstance(model, nn.Sequential)
    layers = model.layers if sequential else model.nodes.values()
    return sorted(type(layer).__name__ for layer in layers)


def _reference(name, xs):
    graph, order, _ = GRAPHS[name]
    nodes, edges, _ = _flat(graph)
    found = nir_reference.simulate(nodes, edges, order, xs, DT / 1000)
    for key in order:
        if isinstance(nodes[key], nir.LIF | nir.CubaLIF):
            assert 0.02 < found[key].mean() < 0.95, key
    return found["output"]


def _sample(graph):
    return 1.5 * _inputs(graph.nodes["input"].input_type["input"])


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_follows_its_equations(name, tmp_path):
    graph, _, kinds = GRAPHS[name]
    xs = _sample(graph)
    nir.write(tmp_path / "net.nir", graph)
    model = etrace.from_nir(str(tmp_path / "net.nir"), dt=DT)
    expected = _reference(name, xs)
    assert expected.std() > 0.1
    np.testing.assert_allclose(run(model, xs), expected, rtol=1e-9, atol=1e-12)
    assert _kinds(model) == sorted(kinds.split())


@pytest.mark.parametrize("name", ["nested", "skip", "two populations", "on itself"])
def test_a_graph_and_back(name, tmp_path):
    graph, *_ = GRAPHS[name]
    xs = _sample(graph)
    with jax.enable_x64(False):
        model = etrace.from_nir(graph, dt=DT)
        nir.write(tmp_path / "net.nir", etrace.to_nir(model))
        back = etrace.from_nir(tmp_path / "net.nir")
        assert type(back) is type(model) and _kinds(back) == _kinds(model)
        np.testing.assert_allclose(run(back, xs), run(model, xs), atol=1e-5)


ENDS = ("fc2", "output")


def test_flat_and_nested_cycles_are_the_same():
    graph, *_ = GRAPHS["nested"]
    nodes, *_ = _flat(graph)
    flat = nir.NIRGraph(
        {
            key: node
            for key, node in nodes.items()
            if "." not in key or "put" not in key
        },
        [
            ("input", "fc1"),
            ("fc1", "lif1.lif"),
            ("lif1.lif", "lif1.w_rec"),
            ("lif1.w_rec", "lif1.lif"),
            ("lif1.lif", "fc2"),
            ("fc2", "output"),
        ],
    )
    one, two = (etrace.from_nir(g, dt=DT) for g in (graph, flat))
    assert jax.tree.structure(one) == jax.tree.structure(two)


def test_only_cycles_have_late_edges():
    graph, *_ = GRAPHS["two populations"]
    assert wiring(graph).late == {("exc", "ee"), ("inh", "ie")}
    # The second of two layers also gets the input, and is met first.
    nodes = {**_ends(2), "one": _lif((2,)), "two": _lif((2,))}
    edges = "input two", "input one", "one two", "two output"
    assert not wiring(_graph(nodes, *edges)).late


def test_several_inputs_and_outputs(tmp_path):
    nodes = {
        "left": nir.Input({"input": np.array([2])}),
        "right": nir.Input({"input": np.array([3])}),
        "a": _affine(4, 2),
        "b": _affine(4, 3),
        "lif": _lif((4,)),
        "drive": nir.Output({"output": np.array([4])}),
        "spikes": nir.Output({"output": np.array([4])}),
    }
    edges = "left a", "right b", "a lif", "b lif", "a drive", "b drive", "lif spikes"
    model = etrace.from_nir(_graph(nodes, *edges), dt=DT)
    x = {"left": jnp.ones(2), "right": -jnp.ones(3)}
    out, state = model(x, model.init_state())
    a, b = nodes["a"], nodes["b"]
    drive = a.weight.sum(1) + a.bias - b.weight.sum(1) + b.bias
    np.testing.assert_allclose(out["drive"], drive, rtol=1e-12)
    nir.write(tmp_path / "net.nir", etrace.to_nir(model))
    back = etrace.from_nir(tmp_path / "net.nir")
    again, _ = back(x, back.init_state())
    np.testing.assert_allclose(again["drive"], out["drive"], rtol=1e-12)
    np.testing.assert_array_equal(again["spikes"], out["spikes"])
    with pytest.raises(ValueError, match="got inputs of shapes"):
        model({"left": jnp.ones(2), "right": jnp.ones(2)}, state)


# What snnTorch's layers do in a step, and what it writes of them.
ALPHA, BETA, THRESHOLD, SNN_DT = 0.8, 0.9, 0.6, 1e-4


def _leaky_of_snntorch():
    """One number for all neurons."""
    tau = SNN_DT / (1 - np.array([BETA], np.float32))
    v_threshold = np.array([THRESHOLD])
    return nir.LIF(tau=tau, r=tau / SNN_DT, v_leak=0 * tau, v_threshold=v_threshold)


def _synaptic_of_snntorch(size):
    ones = np.ones(size, np.float32)
    tau_syn, tau_mem = SNN_DT / (1 - ALPHA) * ones, SNN_DT / (1 - BETA) * ones
    return nir.CubaLIF(
        tau_syn=tau_syn,
        tau_mem=tau_mem,
        r=tau_mem / SNN_DT,
        v_leak=0 * ones,
        v_threshold=THRESHOLD * ones,
        w_in=tau_syn / SNN_DT,
    )


@pytest.mark.parametrize("reset", ["value", "subtract"])
def test_a_network_of_snntorch(reset, tmp_path):
    weights = [0.5 * _w(4, 3), 0.4 * _w(4, 4), 0.1 * np.abs(_w(2, 4))]
    layer = _graph(
        {
            **_ends(4),
            "lif": _synaptic_of_snntorch(4),
            "w_rec": nir.Affine(weights[1], np.full(4, 0.1)),
        },
        *("input lif", "lif w_rec", "w_rec lif", "lif output"),
    )
    nodes = {**_ends(3, 2), "0": nir.Linear(weights[0]), "1": layer}
    nodes |= {"2": nir.Linear(weights[2]), "3": _leaky_of_snntorch()}
    graph = _graph(nodes, "input 0", "0 1", "1 2", "2 3", "3 output")
    nir.write(tmp_path / "net.nir", graph)

    xs, outs = 2 * _inputs((3,)), []
    current, v, z, v2 = np.zeros(4), np.zeros(4), np.zeros(4), np.zeros(2)
    for x in xs:
        current = ALPHA * current + weights[0] @ x + weights[1] @ z + 0.1
        v = BETA * v + current
        z = (v > THRESHOLD).astype(float)
        v = v - z * (v if reset == "value" else THRESHOLD)
        v2 = BETA * v2 + weights[2] @ z
        out = (v2 > THRESHOLD).astype(float)
        v2 = v2 - out * (v2 if reset == "value" else THRESHOLD)
        outs.append(out)

    assert 0.05 < np.mean(outs) < 0.95
    given = {} if reset == "value" else {"reset": reset}
    model = etrace.from_nir(tmp_path / "net.nir", dt=0.1, **given)
    assert [
        type(m).__name__ for m in model.layers
    ] == "Dense Recurrent Dense LIF".split()
    np.testing.assert_array_equal(run(model, xs), outs)


def test_a_network_of_norse():
    """Its `LIFBoxCell`: r = 1, times in seconds, steps of a millisecond."""
    weight = 6 * _w(4, 3)
    lif = nir.LIF(*(np.full(4, n) for n in (0.01, 1.0, 0.1, 0.5, -0.1)))
    xs, v, outs = _inputs((3,)), np.full(4, 0.1), []
    for x in xs:
        v = v + 0.001 * 100 * (0.1 - v + weight @ x)
        outs.append((v > 0.5).astype(float))
        v = np.where(v > 0.5, -0.1, v)
    assert 0.05 < np.mean(outs) < 0.95
    model = etrace.from_nir(nir.NIRGraph.from_list(nir.Linear(weight), lif), dt=1.0)
    np.testing.assert_array_equal(run(model, xs), outs)


def _squares(out, target):
    return jnp.sum((out - target) ** 2)


def _gradient(net, xs, size):
    """Of every weight, after the compiler has found a use for each."""
    compiled = etrace.compile(net, net.init_state(), xs[0])
    assert etrace.Kind.UNUSED not in {d.kind for d in compiled.decisions}
    fun = quick_jit(etrace.value_and_grad(compiled, _squares))
    targets = jnp.ones((len(xs), *size))
    losses, grads, *_ = fun(compiled.params(net), net.init_state(), None, xs, targets)
    assert losses.shape == (len(xs),) and np.all(np.isfinite(losses))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    zero = [jax.tree_util.keystr(path) for path, g in leaves if not np.any(g)]
    assert not zero
    return jax.tree.leaves(grads)


@pytest.mark.parametrize("name", ["nested", "two populations"])
def test_what_comes_back_trains(name):
    graph, *_ = GRAPHS[name]
    net = etrace.from_nir(graph, dt=DT, trainable="tau")
    size = graph.nodes["output"].output_type["output"]
    grads = _gradient(net, jnp.asarray(_sample(graph)[:20]), size)
    # Weights, biases and time constants.
    assert len(grads) == 8


@pytest.mark.parametrize("name", ["convolutions", "recurrent"])
def test_gradients_survive_the_way(name):
    net, shape = MODELS[name]()
    xs = jnp.asarray(2 * _inputs(shape)[:20])
    back = etrace.from_nir(etrace.to_nir(net, xs[0]))
    size = jax.eval_shape(lambda: net(xs[0], net.init_state())[0]).shape
    found, expected = _gradient(back, xs, size), _gradient(net, xs, size)
    if name == "convolutions":
        # A convolution without biases has come back with zeros for them.
        found = [g for g in found if g.size != 4]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)
