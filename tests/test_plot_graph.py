"""Drawings of graphs show every node and edge, and no text lies over another."""

import inspect
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from oracles import problem
from test_diagram import _awkward

import eqx_etrace as etrace
from eqx_etrace import plot as typed_plot
from eqx_etrace._diagram import draw


# Matplotlib's types do not let a test look inside.
plot: Any = typed_plot


class Stack(eqx.Module):
    """Many weights with long names, and an edge between any two layers."""

    a_long_name_for_cells: list
    readout: eqx.nn.Linear

    def __call__(self, x, states):
        new = []
        for cell, state in zip(self.a_long_name_for_cells, states, strict=True):
            x = cell(x, state)
            new.append(x)
        return {"out": self.readout(x), "rates with $ and $": states[0]}, new


def _stack():
    key = jax.random.key(0)
    cells = [eqx.nn.GRUCell(4, 4, key=key) for _ in range(4)]
    net = Stack(cells, eqx.nn.Linear(4, 2, key=key))
    return etrace.compile(net, [jnp.zeros(4)] * 4, jnp.ones(4))


def _of(name, rule):
    model, state, xs, _ = problem(name)
    return etrace.compile(model, state, xs[0], rule)


GRAPHS = {
    "gru_lif": lambda: _of("gru_lif", etrace.DRTRL()),
    "past the state": lambda: _of("spike_before_hard_reset", etrace.DRTRL()),
    "three slots": lambda: _of("alif_trainable_beta", etrace.DRTRL()),
    "ESDRTRL": lambda: _of("delayed_layers", etrace.ESDRTRL(0.9)),
    "RTRL": lambda: _of("lif_lif", etrace.RTRL()),
    "Immediate": lambda: _of("rnn", etrace.Immediate()),
    "awkward": _awkward,
    "stack": _stack,
}


@pytest.fixture(scope="module", params=list(GRAPHS))
def drawn(request):
    graph = GRAPHS[request.param]()
    axis = plot.graph(graph)
    axis.figure.draw_without_rendering()
    yield draw(graph), axis
    plt.close("all")


def _boxes(axis) -> dict[Any, Any]:
    return {p.get_gid(): p for p in axis.patches if isinstance(p, FancyBboxPatch)}


def _arrows(axis) -> list[Any]:
    return [p for p in axis.patches if isinstance(p, FancyArrowPatch)]


def _at(axis, text):
    """The box that a text is in the middle of, by its id."""
    x, y = text.get_position()
    for id, box in _boxes(axis).items():
        middle = box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2
        if (x, y) == pytest.approx(middle):
            return id
    return None


def test_every_node_is_a_box_with_its_text(drawn):
    drawing, axis = drawn
    assert set(_boxes(axis)) == {node.id for node in drawing.nodes}
    texts = {_at(axis, text): text.get_text() for text in axis.texts}
    for node in drawing.nodes:
        words = " ".join(texts[node.id].split())
        if node.kind == "weight":
            assert words == f"{node.label[0]} {', '.join(node.label[1:])}"
        else:
            assert words == " ".join(node.label)
    assert axis.get_title() == drawing.title
    assert not axis.axison


def test_every_edge_is_an_arrow_from_box_to_box(drawn):
    drawing, axis = drawn
    boxes = _boxes(axis)
    wanted = [(f"{e.source}-{e.target}", e.dashed) for e in drawing.edges]
    found = [(p.get_gid(), p.get_linestyle() == "--") for p in _arrows(axis)]
    assert sorted(found) == sorted(wanted)
    labels = [t.get_text() for t in axis.texts if _at(axis, t) is None]
    legend = labels.pop()
    assert legend.startswith("solid: credit")
    assert sorted(labels) == sorted(edge.label for edge in drawing.edges)
    for arrow in _arrows(axis):
        source, target = (boxes[id] for id in arrow.get_gid().split("-"))
        (x, y), *_, (to_x, to_y) = arrow._path_original.vertices
        assert x == pytest.approx(source.get_x() + source.get_width())
        from_a_weight = arrow.get_gid().startswith("w")
        side = 0 if from_a_weight else target.get_width()
        assert to_x == pytest.approx(target.get_x() + side)
        for box, height in ((source, y), (target, to_y)):
            assert 0 < height - box.get_y() < box.get_height()


def test_no_text_lies_over_another_or_leaves_its_box(drawn):
    _, axis = drawn
    texts = [text for text in axis.texts if text.get_text()]
    extents = [text.get_window_extent() for text in texts]
    for (one, a), (two, b) in itertools.combinations(
        zip(texts, extents, strict=True), 2
    ):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, (one.get_text(), two.get_text())
    for text, extent in zip(texts, extents, strict=True):
        box = _boxes(axis).get(_at(axis, text), axis.figure)
        room = box.get_window_extent()
        assert room.x0 <= extent.x0 and extent.x1 <= room.x1, text.get_text()
        assert room.y0 <= extent.y0 and extent.y1 <= room.y1, text.get_text()


def test_boxes_and_lanes_are_apart(drawn):
    _, axis = drawn
    boxes = [box.get_window_extent() for box in _boxes(axis).values()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    lanes = []
    for arrow in _arrows(axis):
        vertices = arrow._path_original.vertices
        if len(vertices) == 4 and vertices[0, 1] != pytest.approx(vertices[3, 1] + 0.8):
            lanes.append((vertices[1, 0], *sorted(vertices[1:3, 1])))
    for (x, low, high), (x2, low2, high2) in itertools.combinations(lanes, 2):
        assert x != pytest.approx(x2) or high < low2 or high2 < low


@pytest.mark.parametrize("size", [(3, 2), (6, 6), (16, 3)])
def test_letters_are_as_large_as_given_axes_have_room_for(size):
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    graph = GRAPHS["gru_lif"]()
    before = plt.get_fignums()
    assert plot.graph(graph, axis) is axis
    assert plt.get_fignums() == before
    figure.draw_without_rendering()
    room = axis.get_window_extent()
    edges = np.array(
        [t.get_window_extent().extents for t in axis.texts if t.get_text()]
    )
    slack = 2  # pixels: letters are set on whole ones
    assert edges[:, :2].min(0) == pytest.approx(
        np.maximum(edges[:, :2].min(0), room.p0 - slack)
    )
    assert edges[:, 2:].max(0) == pytest.approx(
        np.minimum(edges[:, 2:].max(0), room.p1 + slack)
    )
    (font,) = {text.get_fontsize() for text in axis.texts}
    assert 2 < font <= 12
    filled = (edges[:, 2:].max(0) - edges[:, :2].min(0)) / room.size
    assert font == 12 or filled.max() > 0.8


def test_a_long_key_path_is_shortened():
    weights = {"a" * 40 + tail: jnp.ones(3) for tail in ("one", "two")}

    def call(weights, x, h):
        h = sum(weights.values()) * h + x
        return h, h

    graph = etrace.compile(weights, jnp.zeros(3), jnp.ones(3), call=call)
    texts = [text.get_text() for text in plot.graph(graph).texts]
    found = [text for text in texts if "…" in text]
    assert len(found) == len(set(found)) == 2 and max(map(len, found)) < 60
    plt.close("all")


def test_refuses_what_is_no_graph():
    plain = inspect.unwrap(plot.graph)  # Without the check of annotations.
    with pytest.raises(
        TypeError, match="graph: got an object of type `dict`, expected"
    ):
        plain({})
    with pytest.raises(ValueError, match=r"ax: got 1 \(str\)"):
        plain(GRAPHS["Immediate"](), "ax")
