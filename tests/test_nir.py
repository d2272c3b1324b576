"""Each node of NIR against its equations, and each module to NIR and back."""

import equinox as eqx
import jax
import jax.lax as lax
import jax.numpy as jnp
import nir
import nir_reference
import numpy as np
import pytest
from oracles import quick_jit

import eqx_etrace as etrace
from eqx_etrace import nn


STEPS, DT = 40, 2.0
PRECISIONS = {"float32": 1e-5, "float64": 1e-9}


def run(model, xs):
    def body(state, x):
        out, state = model(x, state)
        return state, out

    xs = jnp.asarray(xs, jnp.result_type(float))
    return np.asarray(quick_jit(lambda: lax.scan(body, model.init_state(), xs)[1])())


def _u(low, high, *shape):
    """Numbers that do not depend on what else is drawn."""
    seed = [*shape, round(100 * (low + 10)), round(100 * (high + 10))]
    return np.random.default_rng(seed).uniform(low, high, shape)


def _lif(shape, r=None, tau=None):
    return nir.LIF(
        tau=_u(0.004, 0.03, *shape) if tau is None else tau,
        r=_u(2, 6, *shape) if r is None else r,
        v_leak=_u(-0.3, 0.3, *shape),
        v_threshold=_u(0.4, 0.8, *shape),
        v_reset=_u(-0.5, 0.0, *shape),
    )


def _cuba(kind, shape, w_in, **more):
    return kind(
        tau_syn=_u(0.004, 0.01, *shape),
        tau_mem=_u(0.004, 0.03, *shape),
        r=_u(1, 3, *shape),
        v_leak=_u(-0.3, 0.3, *shape),
        w_in=w_in,
        **more,
    )


def _cuba_lif(shape, w_in):
    fire = {"v_threshold": _u(0.2, 0.5, *shape), "v_reset": _u(-0.3, 0.0, *shape)}
    return _cuba(nir.CubaLIF, shape, w_in, **fire)


def _one_for_all():
    return nir.LIF(*(np.array(n) for n in (0.01, 2.0, 0.1, 0.5, -0.2)))


def _conv(kind, space, kernel, groups=1, **options):
    weight = _u(-1, 1, 4, 2 // groups, *kernel).astype(np.float32)
    options = {"stride": 1, "padding": 0, "dilation": 1} | options
    return kind(space, weight, groups=groups, bias=_u(-1, 1, 4), **options)


def _pairs(*pairs):
    return [np.array(pair) for pair in pairs]


# A node and the shape of its input.
NODES = {
    "LIF": (_lif((5,)), (5,)),
    "LIF, memoryless": (_lif((5,), tau=np.array([2e-3, 3e-3, 2e-3, 1, 1])), (5,)),
    "LIF, one for all": (_one_for_all(), (5,)),
    "LIF, of two axes": (_lif((2, 3)), (2, 3)),
    "LIF, r < 0": (_lif((3,), r=np.array([-9.0, 0.0, 9.0])), (3,)),
    "CubaLIF": (_cuba_lif((5,), _u(1, 3, 5)), (5,)),
    "CubaLIF, w_in < 0": (_cuba_lif((3,), np.array([-2.0, 0.0, 3.0])), (3,)),
    "CubaLI": (_cuba(nir.CubaLI, (4,), _u(1, 3, 4)), (4,)),
    "LI": (nir.LI(_u(0.003, 0.02, 4), _u(-1, 2, 4), _u(-1, 1, 4)), (4,)),
    "IF": (nir.IF(_u(100, 400, 4), _u(0.5, 1, 4), _u(-0.2, 0, 4)), (4,)),
    "I": (nir.I(_u(-1, 2, 4)), (4,)),
    "Linear": (nir.Linear(_u(-1, 1, 2, 3).astype(np.float32)), (3,)),
    "Affine": (nir.Affine(_u(-1, 1, 2, 3), _u(-1, 1, 2)), (3,)),
    "Conv1d": (_conv(nir.Conv1d, 7, (3,), stride=2, padding=1), (2, 7)),
    "Conv1d, dilated": (_conv(nir.Conv1d, 7, (3,), dilation=2, groups=2), (2, 7)),
    "Conv2d": (_conv(nir.Conv2d, (5, 6), (3, 2), stride=(2, 1)), (2, 5, 6)),
    "Conv2d, same": (_conv(nir.Conv2d, (5, 4), (2, 4), padding="same"), (2, 5, 4)),
    "Conv2d, valid": (_conv(nir.Conv2d, (5, 4), (2, 3), padding="valid"), (2, 5, 4)),
    "Conv2d, no shape": (_conv(nir.Conv2d, None, (3, 3), padding=(2, 1)), (2, 5, 4)),
    "SumPool2d": (nir.SumPool2d(*_pairs((2, 3), (2, 1), (1, 0))), (2, 5, 4)),
    "AvgPool2d": (nir.AvgPool2d(*_pairs((2, 2), (2, 2), (1, 1))), (2, 5, 4)),
    "Flatten": (nir.Flatten({"input": np.array([2, 3, 4])}, 0, -1), (2, 3, 4)),
    "Flatten, some": (nir.Flatten({"input": np.array([2, 3, 4])}, 1, 2), (2, 3, 4)),
    "Scale": (nir.Scale(_u(-1, 1, 3)), (3,)),
    "Threshold": (nir.Threshold(_u(-0.5, 0.5, 3)), (3,)),
    "Delay": (nir.Delay(np.array([0.0, 0.002, 0.006])), (3,)),
}


def _around(node, shape):
    ends = {
        "input": nir.Input({"input": np.array(shape)}),
        "output": nir.Output({"output": np.array([0])}),
    }
    edges = [("input", "node"), ("node", "output")]
    return nir.NIRGraph({**ends, "node": node}, edges, type_check=False)


def _inputs(shape):
    return np.random.default_rng(1).uniform(-0.6, 1.0, (STEPS, *shape))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NODES)
def test_a_node_follows_its_equations(name, precision):
    node, shape = NODES[name]
    graph, xs = _around(node, shape), _inputs(shape)
    reference = nir_reference.simulate(
        graph.nodes, graph.edges, ["node"], xs, DT / 1000
    )["node"]
    with jax.enable_x64(precision == "float64"):
        got = run(etrace.from_nir(graph, dt=DT), xs)
        assert got.dtype == precision
    tolerance = PRECISIONS[precision]
    np.testing.assert_allclose(got, reference, rtol=tolerance, atol=tolerance)
    if "v_threshold" in vars(node):
        assert 0.03 < reference.mean() < 0.9


def _made(kind, *args, **options):
    """A layer with weights drawn by NumPy: JAX would compile each draw."""
    key = jax.random.key(0)
    blank = eqx.filter_eval_shape(kind, *args, key=key, **options)
    rng = np.random.default_rng(len(kind.__name__))

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) % leaf.shape[0])
        return jnp.asarray(rng.uniform(-0.7, 0.9, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, blank)


def _stack():
    layers = [
        _made(nn.Dense, 3, 6),
        nn.LIF(6, tau=np.linspace(3, 20, 6), resistance=9.0, dt=DT, reset="value"),
        nn.Delay(6, [0, 1, 2, 3, 4, 5]),
        _made(nn.Dale, 6, 5, 4),
        nn.Exponential(5, tau=4.0, dt=DT),
        nn.LIF(5, resistance=9.0, v_rest=0.1, v_reset=-0.2, dt=DT, reset="value"),
        _made(nn.Sparse, 5, 4, 2),
        nn.Sequential([nn.Exponential(4, tau=3.0, dt=DT), nn.LI(4, tau=3.0, dt=DT)]),
        _made(eqx.nn.Linear, 4, 2),
        nn.IF(2, threshold=1.5, capacitance=0.8, dt=DT, reset="value"),
        nn.SpikeCount(2),
    ]
    return nn.Sequential(layers), (3,)


def _convolutions():
    layers = [
        _made(nn.Conv, 2, 2, 3, 3, padding="SAME"),
        nn.IF((3, 6, 4), threshold=0.5, dt=DT, reset="value"),
        eqx.nn.AvgPool2d(2, 2),
        _made(eqx.nn.Conv2d, 3, 4, 2, use_bias=False, padding=1),
        nn.LIF((4, 4, 3), resistance=8.0, dt=DT, reset="value"),
        eqx.nn.Pool(0.0, lax.add, 2, 2, 1),
        jnp.ravel,
    ]
    return nn.Sequential(layers), (2, 6, 4)


def _line():
    conv = _made(eqx.nn.Conv1d, 2, 3, 3, stride=2, padding=1)
    return nn.Sequential([conv, nn.LI((3, 4), dt=DT)]), (2, 7)


def _recurrent():
    connection = nn.Sequential([nn.Delay(6, 2), _made(nn.Dense, 6, 6)])
    neuron = nn.LIF(6, resistance=2.0, dt=DT, reset="value")
    counter = nn.IF(6, threshold=3.0, dt=DT, reset="value")
    layers = [
        _made(nn.Dense, 3, 6),
        nn.Recurrent(neuron, connection, synapse=nn.Exponential(6, dt=DT)),
        nn.Recurrent(counter, _made(nn.Dense, 6, 6, use_bias=False)),
        nn.Recurrent(nn.LI(6, dt=DT), nn.Delta(6)),
    ]
    return nn.Sequential(layers), (3,)


def _residual():
    inner = nn.Sequential([nn.LIF(4, resistance=4.0, dt=DT, reset="value")])
    block = [_made(nn.Dense, 4, 4), inner, _made(nn.Dense, 4, 4, use_bias=False)]
    readout = _made(nn.LeakyReadout, 4, 2, dt=DT)
    return nn.Sequential([nn.Residual(nn.Sequential(block)), readout]), (4,)


def _shared_synapse():
    """Synapses that are no part of one node: other things read or bring the current."""
    neurons = [nn.LIF(3, tau=t, resistance=0.7, dt=DT, reset="value") for t in (5, 9)]
    layers = [
        nn.Exponential(3, tau=3.0, dt=DT),
        nn.Residual(neurons[0]),
        nn.Residual(nn.Exponential(3, tau=7.0, dt=DT)),
        neurons[1],
    ]
    return nn.Sequential(layers), (3,)


def _soft():
    layers = [
        _made(nn.Dense, 3, 6),
        nn.LIF(6, resistance=9.0, v_reset=0.1, dt=DT),
        _made(nn.Dense, 6, 6),
        nn.LIF(6, tau=4.0, resistance=2.5, dt=DT, reset="none"),
        nn.IF(6, threshold=2.5, dt=DT),
    ]
    return nn.Sequential(layers), (3,)


MODELS = {
    "stack": _stack,
    "convolutions": _convolutions,
    "line": _line,
    "recurrent": _recurrent,
    "residual": _residual,
    "shared synapse": _shared_synapse,
    "soft": _soft,
}


def _round_trip(make, path, **options):
    model, shape = make()
    xs = 2 * _inputs(shape)
    graph = etrace.to_nir(model, xs[0], any_reset=make is _soft, **options)
    nir.write(path, graph)
    back = etrace.from_nir(path)
    return model, graph, back, xs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_to_a_file_and_back(name, precision, tmp_path):
    tolerance = PRECISIONS[precision]
    with jax.enable_x64(precision == "float64"):
        model, _, back, xs = _round_trip(MODELS[name], tmp_path / "net.nir")
        expected, got = run(model, xs), run(back, xs)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["stack", "recurrent"])
def test_exact_time_constants(name, tmp_path):
    path = tmp_path / "net.nir"
    model, graph, back, xs = _round_trip(MODELS[name], path, discretisation="exact")
    np.testing.assert_allclose(run(back, xs), run(model, xs), rtol=1e-9, atol=1e-9)
    if name == "stack":
        np.testing.assert_allclose(graph.nodes["lif"].tau, np.linspace(3, 20, 6) / 1000)


@pytest.mark.parametrize("name", ["stack", "recurrent", "residual", "shared synapse"])
def test_a_written_graph_follows_its_equations(name):
    model, shape = MODELS[name]()
    xs = 2 * _inputs(shape)
    nodes, edges, order = _flat(etrace.to_nir(model))
    reference = nir_reference.simulate(nodes, edges, order, xs, DT / 1000)
    np.testing.assert_allclose(run(model, xs), reference["output"], rtol=1e-9)


def _flat(graph, prefix=""):
    """Nested graphs opened, ends as nodes; what feeds back comes before its neurons, so
    that it reads the step before."""
    nodes, edges = {}, []
    for key, node in graph.nodes.items():
        if isinstance(node, nir.NIRGraph):
            inner = _flat(node, f"{prefix}{key}.")
            nodes |= inner[0]
            edges += inner[1]
        else:
            nodes[prefix + key] = node
    for a, b in graph.edges:
        a = f"{a}.output" if isinstance(graph.nodes[a], nir.NIRGraph) else a
        b = f"{b}.input" if isinstance(graph.nodes[b], nir.NIRGraph) else b
        edges.append((prefix + a, prefix + b))
    if prefix:
        nodes = dict(sorted(nodes.items(), key=lambda item: _rank(item[1])))
    return nodes, edges, [key for key in nodes if key != "input"]


def _rank(node):
    neurons = nir.LIF | nir.CubaLIF | nir.IF | nir.LI | nir.CubaLI
    return 2 if isinstance(node, nir.Output) else int(isinstance(node, neurons))


@pytest.mark.parametrize("name", MODELS)
def test_the_types_of_a_written_graph_are_complete(name, tmp_path):
    """So that the package reads it with all its checks."""
    _, graph, *_ = _round_trip(MODELS[name], tmp_path / "net.nir")
    again = nir.read(tmp_path / "net.nir")
    assert again.edges == graph.edges
    for key, node in graph.nodes.items():
        for value in (*node.input_type.values(), *node.output_type.values()):
            assert value is not None, key


def test_layers_come_back_as_they_were():
    model, _ = _stack()
    back = etrace.from_nir(etrace.to_nir(model))
    assert isinstance(back, nn.Sequential)
    kinds = [type(layer).__name__ for layer in back.layers]
    expected = "Dense LIF Delay Dense Exponential LIF Dense Exponential LI Dense IF"
    assert kinds == [*expected.split(), "SpikeCount"]
    assert back.layers[1].tau.shape == (6,)
    assert back.layers[5].tau.shape == ()


def test_a_synapse_and_its_neurons_are_one_node():
    model, _ = _stack()
    kinds = [type(node).__name__ for node in etrace.to_nir(model).nodes.values()]
    assert "CubaLIF" in kinds and "CubaLI" in kinds
    alone = nn.Sequential([nn.Exponential(2), _made(nn.Dense, 2, 2)])
    kinds = [type(node).__name__ for node in etrace.to_nir(alone).nodes.values()]
    assert kinds == ["Input", "LI", "Affine", "Output"]


def test_what_is_noted_can_be_overruled():
    model, shape = _soft()
    graph, xs = etrace.to_nir(model, any_reset=True), 2 * _inputs(shape)
    hard = etrace.from_nir(graph, reset="value")
    assert hard.layers[1].firing.reset == "value"
    assert np.any(run(hard, xs) != run(model, xs))
    spike = nn.arctan()
    other = etrace.from_nir(graph, dt=1.0, discretisation="exact", spike=spike)
    assert {other.layers[i].firing.spike for i in (1, 3, 4)} == {spike}
    assert other.layers[1].dt == 1.0
    # 20 ms in steps of 2 ms decay to exp(-0.1); Euler's method would have 1 - 0.1.
    tau = np.asarray(graph.nodes["lif"].tau, float)
    np.testing.assert_allclose(1 - DT / 1000 / tau, np.exp(-0.1), rtol=1e-12)
    np.testing.assert_allclose(other.layers[1].tau(), 1000 * tau[0], rtol=1e-12)


def test_parameters_that_train():
    model, shape = _stack()
    graph, xs = etrace.to_nir(model), 2 * _inputs(shape)
    back = etrace.from_nir(graph, trainable=("tau", "threshold"))
    kinds = {type(back.layers[i].tau) for i in (1, 4, 5, 7, 8)}
    assert kinds == {nn.Bounded}
    assert isinstance(back.layers[10].threshold, nn.Free)
    assert isinstance(back.layers[1].v_reset, nn.Constant)
    np.testing.assert_allclose(run(back, xs), run(model, xs), rtol=1e-9, atol=1e-9)
