"""A drawing of a graph: weights on the left, hidden groups and outputs on the right.

All is laid out in ems, the height of a letter, so that nothing overlaps whatever the
size of the Axes: the letters are as large as there is room for. An edge leaves its node
by a port of its own, a short line that carries the label. From there an edge of a
weight bends to its target across a gap without nodes. Edges between groups and outputs
run along lanes at the far right, in another one wherever two would meet.
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from .._diagram import Drawing, Edge, Node, draw
from .._errors import describe, sentence
from .._graph import ETraceGraph
from ._axes import COLOURS, points, shorten, take_axes


# Light enough for dark letters.
_FILLS = {"weight": "#FBE6C5", "group": "#CDE5F5", "output": "#CDEBE0"}
_INK, _SOLID, _DASHED = "#1A1A1A", "#6B6B6B", COLOURS[1]
_LEGEND = "solid: credit     dashed: cut, or credited for the current step alone"
# In letters, and in ems.
_LONGEST = 44
_LINE, _PORT, _PAD, _GAP, _LOOP, _LANE = 1.3, 2.2, 0.5, 9.0, 2.6, 1.2
# In points.
_FONT, _LARGEST = 9.0, 12.0


def graph(graph: ETraceGraph, ax: Axes | None = None) -> Axes:
    """A drawing of an `ETraceGraph`: weights, hidden groups, outputs, and all cuts.

    The same nodes and arrows as `graph.to_mermaid()`: solid ones carry credit; dashed
    ones are what is cut between units or groups, and weights that are credited for the
    current step alone.

    **Arguments:**

    - `graph`: what `eqx_etrace.compile` returns.
    - `ax`: the Axes, whose own axis goes off; None makes a figure of the size that the
      drawing needs. Letters are as large as there is room for when it is called.

    **Returns:** the Axes. Every box has the id of its node, and every arrow those of
    both ends, as its `gid`, which is the id in an SVG file.

    **Raises:** `TypeError` for what is no graph.

    !!! example

        ```python
        from eqx_etrace import plot

        ax = plot.graph(graph)
        ```
    """
    if not isinstance(graph, ETraceGraph):
        remedy = "It is what `eqx_etrace.compile` returns."
        got = describe(graph)
        raise TypeError(sentence("graph", got, "an `ETraceGraph`", remedy))
    drawing = draw(graph)
    layout = _lay_out(drawing)
    width, height = layout.width, layout.height + 2 * _LINE
    size = width * _FONT / 72, height * _FONT / 72 + 0.3
    (axis,) = take_axes(ax, 1, figsize=size)
    axis.axis("off")
    axis.set_title(drawing.title, fontsize=_FONT)
    if ax is None:
        whole: Any = axis.figure
        whole.draw_without_rendering()  # The letters need the final size of the Axes.
    room = points(axis)
    em = min(room[0] / width, room[1] / height, _LARGEST)
    margin = (room[0] / em - width) / 2
    axis.set_xlim(-margin, width + margin)
    axis.set_ylim(room[1] / em - _LINE / 2, -_LINE / 2)
    _draw_all(axis, layout, em)
    return axis


class _Box(NamedTuple):
    """A node with its text, in ems from the upper left corner of the drawing."""

    node: Node
    text: str
    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    def port(self, number: int, of: int) -> float:
        """The height of a port, at the left or the right side."""
        return self.top + self.height * (number + 0.5) / of


class _Arrow(NamedTuple):
    """An edge with its way: a start, lines to `lines` and, if any, one Bezier curve."""

    edge: Edge
    start: tuple[float, float]
    lines: tuple[tuple[float, float], ...]
    curve: tuple[tuple[float, float], ...]
    label_at: tuple[float, float]


class _Layout(NamedTuple):
    boxes: dict[str, _Box]
    arrows: list[_Arrow]
    width: float
    height: float


class _Sides(NamedTuple):
    """Which edges are at each node: of a weight all; of a target by its sides."""

    weights: dict[str, list[Edge]]
    left: dict[str, list[Edge]]
    right: dict[str, list[Edge]]


def _lay_out(drawing: Drawing) -> _Layout:
    sides = _sides(drawing)
    stub = _widest(e.label for edges in sides.weights.values() for e in edges)
    boxes, height = _place(drawing, sides, stub)
    starts, ends = _ports(boxes, sides)
    right = max(box.right for box in boxes.values())
    across = dict.fromkeys(e for edges in sides.right.values() for e in edges)
    labels = _widest(e.label for e in across) + _LOOP + _PAD
    lanes = _lanes([e for e in across if e.source != e.target], starts, ends)
    arrows = []
    for edges in sides.weights.values():
        for edge in edges:
            source, y = boxes[edge.source].right, starts[edge]
            bend = source + stub + 2 * _PAD
            target = boxes[edge.target].left, ends[edge]
            middle = (bend + target[0]) / 2
            curve = (middle, y), (middle, target[1]), target
            at = source + _PAD, y - 0.2
            arrows.append(_Arrow(edge, (source, y), ((bend, y),), curve, at))
    for edge in across:
        y = starts[edge]
        if edge in lanes:
            lane, end = right + labels + _LANE * lanes[edge], ends[edge]
            lines = (lane, y), (lane, end), (right, end)
            at = right + _PAD, y - 0.2
            arrows.append(_Arrow(edge, (right, y), lines, (), at))
        else:
            out = right + _LOOP
            curve = (out, y + 0.9), (out, y - 0.9), (right, y - 0.4)
            at = right + _LOOP, y + 0.4
            arrows.append(_Arrow(edge, (right, y + 0.4), (), curve, at))
    width = right + labels + _LANE * (1 + max(lanes.values(), default=0))
    return _Layout(boxes, arrows, width, height)


def _sides(drawing: Drawing) -> _Sides:
    targets = [node.id for node in drawing.nodes if node.kind != "weight"]
    rank = {id: number for number, id in enumerate(targets)}
    sides = _Sides(
        {node.id: [] for node in drawing.nodes if node.kind == "weight"},
        {id: [] for id in targets},
        {id: [] for id in targets},
    )
    for edge in drawing.edges:
        edge = dataclasses.replace(edge, label=shorten([edge.label], _LONGEST)[0])
        if edge.source in rank:
            for id in {edge.source: None, edge.target: None}:
                sides.right[id].append(edge)
        else:
            sides.weights[edge.source].append(edge)
            sides.left[edge.target].append(edge)
    for id, edges in sides.right.items():
        # What comes from above or goes there is above what goes down.
        edges.sort(key=lambda e: rank[e.source] + rank[e.target] - 2 * rank[id])
    return sides


def _place(
    drawing: Drawing, sides: _Sides, stub: float
) -> tuple[dict[str, _Box], float]:
    """The boxes, a target beside the weights that feed it first; how high they are."""
    texts = _texts(drawing.nodes)
    targets = [node for node in drawing.nodes if node.kind != "weight"]
    rank = {node.id: number for number, node in enumerate(targets)}
    beside: list[list[Node]] = [[] for _ in range(len(targets) + 1)]
    for node in drawing.nodes:
        if node.kind == "weight":
            ranks = (rank[edge.target] for edge in sides.weights[node.id])
            beside[min(ranks, default=-1)].append(node)
    widths = [
        2 * _PAD + _widest(t for n in nodes for t in texts[n.id].splitlines())
        for nodes in ([n for nodes in beside for n in nodes], targets)
    ]
    lefts = 0.0, widths[0] + stub + 2 * _PAD + _GAP
    boxes, top = {}, 0.0
    for nodes, target in zip(beside, [*targets, None], strict=True):
        columns = nodes, [] if target is None else [target]
        heights = [[_height(n, texts[n.id], sides) for n in c] for c in columns]
        tallest = max(sum(each) + _PAD * len(each) for each in heights)
        for x, width, column, each in zip(lefts, widths, columns, heights, strict=True):
            y = top + (tallest - sum(each) - _PAD * len(each)) / 2
            for node, height in zip(column, each, strict=True):
                box = _Box(node, texts[node.id], x, y, width, height)
                boxes[node.id] = box
                y += height + _PAD
        top += tallest + 2 * _PAD
    return boxes, top


def _height(node: Node, text: str, sides: _Sides) -> float:
    lines = _LINE * len(text.splitlines()) + _PAD
    if node.kind == "weight":
        return max(lines, _PORT * len(sides.weights[node.id]) - _PAD)
    ports = _PORT * len(sides.right[node.id]), 0.5 * len(sides.left[node.id])
    return max(lines, *ports)


def _ports(
    boxes: dict[str, _Box], sides: _Sides
) -> tuple[dict[Edge, float], dict[Edge, float]]:
    """How far down each edge starts and ends."""
    starts, ends = {}, {}
    for id, edges in (*sides.weights.items(), *sides.right.items()):
        for number, edge in enumerate(edges):
            here = starts if edge.source == id else ends
            here[edge] = boxes[id].port(number, len(edges))
    for id, edges in sides.left.items():
        for number, edge in enumerate(sorted(edges, key=starts.__getitem__)):
            ends[edge] = boxes[id].port(number, len(edges))
    return starts, ends


def _lanes(
    edges: Iterable[Edge], starts: dict[Edge, float], ends: dict[Edge, float]
) -> dict[Edge, int]:
    """The innermost lane in which each edge meets no other, short ones first."""
    lanes: dict[Edge, int] = {}
    spans = {e: sorted((starts[e], ends[e])) for e in edges}
    for edge, (top, bottom) in sorted(spans.items(), key=lambda s: s[1][1] - s[1][0]):
        met = {
            lane
            for other, lane in lanes.items()
            if spans[other][0] <= bottom and top <= spans[other][1]
        }
        lanes[edge] = next(n for n in range(len(met) + 1) if n not in met)
    return lanes


def _texts(nodes: Sequence[Node]) -> dict[str, str]:
    """One line for a weight; for the others one an entry, or several."""
    paths = shorten([node.label[0] for node in nodes], _LONGEST)
    texts = {}
    for node, path in zip(nodes, paths, strict=True):
        if node.kind == "weight":
            texts[node.id] = f"{path}   {', '.join(node.label[1:])}"
            continue
        lines = [part for entry in node.label[1:] for part in _wrap(entry)]
        texts[node.id] = "\n".join([path, *shorten(lines, _LONGEST)])
    return texts


def _wrap(text: str) -> list[str]:
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, 30, max_lines=4, placeholder=" …", **options)


def _widest(texts: Iterable[str]) -> float:
    """In ems; a `$` would start a formula."""
    # On a screen each letter has a whole number of pixels: a tenth for that.
    return 1.1 * max(
        (
            TextPath((0, 0), text.replace("$", "S"), size=1).get_extents().width
            for text in texts
            if text.strip()
        ),
        default=0.0,
    )


def _draw_all(axis: Axes, layout: _Layout, em: float) -> None:
    style: Any = {"fontsize": em, "parse_math": False}
    for box in layout.boxes.values():
        corner, fill = (box.left, box.top), _FILLS[box.node.kind]
        rounded = 0.8 if box.node.kind == "group" else 0.2
        shape = f"round,pad=0,rounding_size={rounded}"
        patch = FancyBboxPatch(
            corner, box.width, box.height, shape, fc=fill, ec=_SOLID, gid=box.node.id
        )
        axis.add_patch(patch)
        middle = box.left + box.width / 2, box.top + box.height / 2
        axis.text(*middle, box.text, ha="center", va="center", color=_INK, **style)
    for arrow in layout.arrows:
        edge = arrow.edge
        path = Path(
            [arrow.start, *arrow.lines, *arrow.curve],
            [Path.MOVETO]
            + [Path.LINETO] * len(arrow.lines)
            + [Path.CURVE4] * len(arrow.curve),
        )
        patch = FancyArrowPatch(
            path=path,
            arrowstyle="-|>",
            mutation_scale=em,
            color=_DASHED if edge.dashed else _SOLID,
            linestyle="--" if edge.dashed else "-",
            gid=f"{edge.source}-{edge.target}",
        )
        axis.add_patch(patch)
        axis.text(*arrow.label_at, edge.label, va="bottom", **style)
    axis.text(0, layout.height, _LEGEND, va="top", **style)
