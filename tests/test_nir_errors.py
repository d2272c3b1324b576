"""What NIR or the library cannot say is refused, with the node or the module."""

import dataclasses
import pathlib
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import nir
import numpy as np
import pytest
from test_nir import _conv, _lif, _made, _one_for_all

import eqx_etrace as etrace
from eqx_etrace import nn


@dataclasses.dataclass(eq=False)
class Oscillator(nir.NIRNode):
    """A node of a later version of NIR."""

    omega: np.ndarray

    def __post_init__(self):
        self.input_type = self.output_type = {"input": np.array(self.omega.shape)}


def _in(*shape):
    return nir.Input({"input": np.array(shape)})


def _out(*shape):
    return nir.Output({"output": np.array(shape)})


def _unknown() -> Any:
    """The type of what a file does not say."""
    return {"input": None}


ONES = np.ones(2)
LINEAR, WIDER = nir.Linear(np.eye(2)), nir.Linear(np.ones((3, 2)))
LIF = _lif((2,), tau=np.full(2, 0.01))


def _chain(*nodes: Any):
    keys = [f"node{i}" for i in range(len(nodes))]
    ends = {
        "input": _in(2),
        "output": _out(2),
    }
    path = ["input", *keys, "output"]
    edges = list(zip(path, path[1:], strict=False))
    return nir.NIRGraph(
        {**ends, **dict(zip(keys, nodes, strict=True))}, edges, type_check=False
    )


def _graph(nodes, *edges):
    ends = {"input": _in(2), "output": _out(2)}
    edges = [tuple(edge.split()) for edge in edges]
    return nir.NIRGraph({**ends, **nodes}, edges, type_check=False)


def _two_doors():
    ends = {key: _in(2) for key in ("one", "two")}
    nodes = {**ends, "w": LINEAR, "end": _out(2)}
    edges = [("one", "w"), ("two", "w"), ("w", "end")]
    return nir.NIRGraph(nodes, edges, type_check=False)


def _image(node):
    nodes = {"input": _in(2, 5, 4), "node": node}
    nodes["output"] = _out(1)
    edges = [("input", "node"), ("node", "output")]
    return nir.NIRGraph(nodes, edges, type_check=False)


NO_SHAPE: Any = _chain(nir.Scale(ONES))
NO_SHAPE.nodes["input"].input_type = _unknown()
NO_SHAPE.nodes["node0"].input_type = _unknown()

NOTED = _chain(LIF)
NOTED.metadata = {"discretisation": "rk4"}

# A graph, options, and what the message says.
GRAPHS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown node": (
        _chain(LINEAR, Oscillator(ONES)),
        {},
        r"node 'node1': got a Oscillator, expected one of Affine, AvgPool2d",
    ),
    "unknown node inside": (
        _chain(_chain(Oscillator(ONES))),
        {},
        r"node 'node0.node0': got a Oscillator",
    ),
    "no time step": (_chain(LIF), {"dt": None}, r"node0' \(LIF\).*expected `dt=`"),
    "time step": (_chain(LIF), {"dt": -1.0}, "got dt=-1.0, expected a number above 0"),
    "discretisation": (NOTED, {}, "got discretisation='rk4', expected 'euler'"),
    "trainable": (_chain(LIF), {"trainable": "weight"}, "got trainable = weight"),
    "large step": (
        _chain(LINEAR, LIF),
        {"dt": 11.0},
        r"node1' \(LIF\): got a time constant of 10.0 ms.*overshoots",
    ),
    "negative tau": (
        _chain(_lif((2,), tau=np.array([0.01, -0.01]))),
        {},
        r"node0' \(LIF\): got a time constant of -10.0 ms, expected one above 0",
    ),
    "odd delay": (
        _chain(nir.Delay(np.array([0.001, 0.0015]))),
        {},
        r"node0' \(Delay\): got a delay of \[1\.  1\.5\] ms, expected multiples",
    ),
    "negative delay": (_chain(nir.Delay(-0.001 * ONES)), {}, "integers of at least 0"),
    "wrong size": (
        _chain(LINEAR, nir.Linear(np.ones((2, 3)))),
        {},
        r"node1' \(Linear\): got an input of shape \(2,\), which it does not take",
    ),
    "wrong units": (_chain(_lif((3,))), {}, r"node0' \(LIF\).*of shape \(3,\)"),
    "wrong sum": (
        _graph(
            {"w": nir.Linear(np.ones((3, 2)))}, "input w", "w output", "input output"
        ),
        {},
        r"node 'output': got inputs of shapes \(2,\), \(3,\)|\(3,\), \(2,\)",
    ),
    "wrong feedback": (
        _graph(
            {"lif": LIF, "w": nir.Linear(np.ones((2, 3)))},
            *("input lif", "lif w", "w lif", "lif output"),
        ),
        {},
        r"node 'w' \(Linear\): got an input of shape \(2,\)",
    ),
    "weights of three axes": (
        _chain(nir.Linear(np.ones((2, 2, 2)))),
        {},
        r"node0' \(Linear\): got weights of shape \(2, 2, 2\)",
    ),
    "strided same": (
        _image(_conv(nir.Conv2d, None, (3, 3), padding="same", stride=2)),
        {},
        r"node' \(Conv2d\): got padding 'same' with a stride",
    ),
    "flatten": (
        _chain(nir.Flatten(_unknown(), 1, -1)),
        {},
        r"node0' \(Flatten\): got axes 1 to -1",
    ),
    "integrated image": (
        _image(nir.I(np.ones((2, 5, 4)))),
        {},
        r"node' \(I\): got an input of shape \(2, 5, 4\), expected a vector",
    ),
    "no shape": (NO_SHAPE, {}, r"node 'input' \(Input\): got no shape"),
    "loop without neurons": (
        _graph({"w": LINEAR, "s": LINEAR}, "input w", "w s", "s w", "s output"),
        {},
        "got a cycle without neurons, (w -> s -> w|s -> w -> s), expected",
    ),
    "empty loop": (
        _graph({"g": _chain()}, "input g", "g g", "g output"),
        {},
        r"node 'g\.(input|output)': got an edge to itself",
    ),
    "no way in": (
        _graph({"w": LINEAR}, "input output", "w output"),
        {},
        r"node 'w' \(Linear\): got no way between it and an Input",
    ),
    "no way out": (
        _graph({"w": LINEAR}, "input output", "input w"),
        {},
        r"node 'w' \(Linear\): got no way between it and an Output",
    ),
    "missing node": (_graph({}, "input lif", "lif output"), {}, "'lif' which does not"),
    "repeated edge": (
        _graph({"w": LINEAR}, "input w", "input w", "w output"),
        {},
        "Duplicate edge",
    ),
    "two doors": (_chain(_two_doors()), {}, r"node0' \(NIRGraph\): got 2 Input or"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_are_refused(name):
    graph, options, message = GRAPHS[name]
    with pytest.raises(ValueError, match=message):
        etrace.from_nir(graph, **{"dt": 1.0, **options})


def test_no_graph():
    with pytest.raises(TypeError, match="got a `LIF`, expected a `nir.NIRGraph`"):
        etrace.from_nir(_one_for_all(), dt=1.0)


def _dense():
    return _made(nn.Dense, 2, 2)


def _lif_of(dt=1.0):
    return nn.LIF(2, dt=dt, reset="value")


def _conv_of(**options):
    return _made(eqx.nn.Conv2d, 2, 4, 3, **options)


class Cell(eqx.Module):
    def __call__(self, x, state):
        return x, state


IMAGE = jax.ShapeDtypeStruct((2, 5, 4), jnp.float64)

# A model, options, and what the message says.
MODULES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown module": (
        lambda: nn.Sequential([_dense(), nn.Sequential([nn.ALIF(2)])]),
        {},
        r"`layers\[1\]\.layers\[0\]`: got `ALIF`, expected one of AvgPool2d, Conv",
    ),
    "unknown function": (
        lambda: nn.Sequential([_dense(), jnp.tanh]),
        {},
        r"`layers\[1\]`: got `tanh`",
    ),
    "unknown neuron": (
        lambda: nn.Recurrent(nn.Refractory(_lif_of(), 1.0), _dense()),
        {},
        "`neuron`: got `Refractory`",
    ),
    "a cell of one's own": (Cell, {"x": np.ones(2)}, "`model`: got `Cell`"),
    "a layer of Equinox": (
        eqx.nn.PReLU,
        {"x": np.ones(2)},
        "`model`: got `PReLU`",
    ),
    "soft reset": (
        lambda: nn.Sequential([_dense(), nn.LIF(2)]),
        {},
        r"`layers\[1\]` \(LIF\): got reset='subtract', expected reset='value'",
    ),
    "time steps": (
        lambda: nn.Sequential([_lif_of(), _lif_of(dt=0.5)]),
        {},
        r"1.0 ms of `layers\[0\]`, 0.5 ms of `layers\[1\]`, expected the same",
    ),
    "another time step": (_lif_of, {"dt": 2.0}, "2.0 ms of `dt=`, 1.0 ms of `model`"),
    "delay": (lambda: nn.Delay(2, 1), {}, r"`model` \(Delay\).*expected `dt=`"),
    "delayed weights": (
        lambda: nn.DelayedDense(2, 2, 0, key=jax.random.key(0)),
        {"x": np.ones(2)},
        "`model`: got `DelayedDense`",
    ),
    "no size": (_conv_of, {}, "got a `Conv2d` as the first layer"),
    "padding": (
        lambda: _conv_of(padding=((0, 1), (1, 1))),
        {"x": IMAGE},
        r"got a padding of \(\(0, 1\), \(1, 1\)\), expected the same on both sides",
    ),
    "strided same": (
        lambda: _conv_of(padding="SAME", stride=2),
        {"x": IMAGE},
        "got padding 'SAME' with a stride",
    ),
    "circular": (
        lambda: _conv_of(padding=1, padding_mode="CIRCULAR"),
        {"x": IMAGE},
        "padding_mode='CIRCULAR', expected 1 or 2 and 'ZEROS'",
    ),
    "maximum": (lambda: eqx.nn.MaxPool2d(2), {"x": IMAGE}, "got `MaxPool2d`"),
    "other pool": (
        lambda: eqx.nn.Pool(0.0, jax.lax.max, 2, 2),
        {"x": IMAGE},
        "got a pool of another kind",
    ),
    "twice": (
        lambda: nn.Sequential([nn.Residual(eqx.nn.Identity()), _dense()]),
        {"x": np.ones(2)},
        "output of node 'input' twice as an input of 'affine'",
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_are_refused(name):
    make, options, message = MODULES[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        etrace.to_nir(model, **options)


def test_unknown_methods():
    from eqx_etrace._nir._write import write

    # What a user meets, whose annotations are not checked.
    with pytest.raises(ValueError, match="got discretisation='rk4', expected 'euler'"):
        write(_dense(), None, None, "rk4", False)


@pytest.mark.parametrize("fun", [etrace.to_nir, etrace.from_nir])
def test_without_the_package(fun, monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(ImportError, match=r"pip install 'eqx-etrace\[nir\]'"):
        fun(_dense())


def test_the_page_names_every_node():
    from eqx_etrace._nir._read_nodes import NODES

    text = (pathlib.Path(__file__).parent.parent / "docs" / "nir.md").read_text()
    assert not [k.__name__ for k in NODES if f"`{k.__name__}`" not in text]
