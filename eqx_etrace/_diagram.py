"""A picture of a graph: weights, hidden groups, outputs, and what credit passes.

Solid edges carry credit; dashed edges say what is cut or credited for the current step
alone. One drawing is made, and written as Mermaid or as plain text.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ._decision import Kind
from ._hidden import params_of
from ._jaxpr import Origin, describe_equation
from ._locality import flow
from ._relation import find_uses
from ._report import Report
from ._rules import name_of


if TYPE_CHECKING:
    from ._graph import ETraceGraph


@dataclasses.dataclass(frozen=True)
class Node:
    """`kind` is "weight", "group" or "output"; `label` has one line an entry."""

    id: str
    kind: str
    label: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Edge:
    """An arrow between two nodes, by their ids; dashed where credit is cut."""

    source: str
    target: str
    label: str = ""
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What both texts show."""

    title: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def draw(graph: "ETraceGraph") -> Drawing:
    """The nodes and edges of a graph."""
    edges = [
        *_relations(graph),
        *_other_uses(graph),
        *_own_past(graph),
        *_between_groups(graph),
        *_to_outputs(graph),
        *_cuts(graph),
    ]
    batch = "unbatched" if graph.batch is None else f"batch {graph.batch}"
    title = f"{name_of(graph.rule)}, {graph.vjp}, {batch}"
    return Drawing(title, tuple(_nodes(graph)), tuple(dict.fromkeys(edges)))


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(str(n) for n in shape) or "scalar"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _nodes(graph: "ETraceGraph") -> list[Node]:
    leaves = zip(graph.param_leaves.paths, graph.param_leaves.specs, strict=True)
    unused = {p for d in graph.decisions if d.kind is Kind.UNUSED for p in d.weight}
    nodes = []
    for i, (path, spec) in enumerate(leaves):
        note = (Kind.UNUSED.value,) if path in unused else ()
        nodes.append(Node(f"w{i}", "weight", (path, _shape(spec.shape), *note)))
    for i, group in enumerate(graph.groups):
        size = f"{_count(group.units, 'unit')} x {_count(group.slots, 'slot')}"
        where = ", ".join(dict.fromkeys(group.leaves))
        nodes.append(Node(f"g{i}", "group", (f"hidden group {i}", size, where)))
    leaves = zip(graph.out_leaves.paths, graph.out_leaves.specs, strict=True)
    for i, (path, spec) in enumerate(leaves):
        nodes.append(Node(f"y{i}", "output", (path, _shape(spec.shape))))
    return nodes


def _weight_ids(graph: "ETraceGraph", paths: Iterable[str]) -> list[str]:
    return [f"w{graph.param_leaves.paths.index(path)}" for path in paths]


def _doors(graph: "ETraceGraph") -> frozenset[int]:
    return frozenset(graph.hidden.doors)


def _reached(
    graph: "ETraceGraph", start: Iterable[int], blocked: frozenset[int]
) -> tuple[list[int], list[int]]:
    """The groups and the outputs that `start` acts on without passing the blocked."""
    reached, _ = flow(graph.program, start, blocked=blocked)
    groups = [i for i, g in enumerate(graph.groups) if reached.intersection(g.doors)]
    outputs = graph.program.outputs[graph.state_leaves.parts.count :]
    return groups, [i for i, ref in enumerate(outputs) if ref in reached]


def _relations(graph: "ETraceGraph") -> list[Edge]:
    """The weights with a trace, and their ways past the new state."""
    edges = []
    for relation in graph.relations:
        target = f"g{relation.group}"
        label = f"{relation.op.name} trace"
        _, outputs = _reached(graph, [relation.y], _doors(graph))
        own = {*graph.groups[relation.group].doors}
        for source in _weight_ids(graph, relation.weight):
            edges.append(Edge(source, target, label))
            edges += [
                Edge(source, f"y{i}", "past the state")
                for i in outputs
                if graph.program.outputs[graph.state_leaves.parts.count + i] not in own
            ]
    return edges


def _other_uses(graph: "ETraceGraph") -> list[Edge]:
    """The uses of weights that have no trace."""
    edges = []
    related = {(*relation.edge, relation.y) for relation in graph.relations}
    params = params_of(graph.program, graph.param_leaves.count)
    for use in find_uses(graph.program):
        if (use.equation.index, use.operand, use.y) in related:
            continue
        groups, outputs = _reached(graph, [use.y], _doors(graph))
        for param in sorted(params.get(use.ref, ())):
            for group in groups:
                label = "current step only"
                edges.append(Edge(f"w{param}", f"g{group}", label, dashed=True))
            edges += [Edge(f"w{param}", f"y{i}") for i in outputs]
    return edges


def _own_past(graph: "ETraceGraph") -> list[Edge]:
    return [
        Edge(f"g{i}", f"g{i}", "own past")
        for i, group in enumerate(graph.groups)
        if any(any(row) for row in group.transition_matrix)
    ]


def _between_groups(graph: "ETraceGraph") -> list[Edge]:
    edges = []
    for i, group in enumerate(graph.groups):
        doors = frozenset(group.doors)
        for label, start, blocked in (
            ("same step", group.doors, _doors(graph) - doors),
            ("last step", group.old, _doors(graph)),
        ):
            groups, _ = _reached(graph, start, blocked)
            edges += [Edge(f"g{i}", f"g{j}", label) for j in groups if j != i]
    return edges


def _to_outputs(graph: "ETraceGraph") -> list[Edge]:
    edges = []
    for i, group in enumerate(graph.groups):
        doors = frozenset(group.doors)
        for label, start, blocked in (
            ("", group.doors, _doors(graph) - doors),
            ("old state", group.old, _doors(graph)),
        ):
            _, outputs = _reached(graph, start, blocked)
            first = graph.state_leaves.parts.count
            own = [j for j in outputs if graph.program.outputs[first + j] in doors]
            if label:
                outputs = [j for j in outputs if j not in own]
            edges += [Edge(f"g{i}", f"y{j}", label) for j in outputs]
    return edges


def _cuts(graph: "ETraceGraph") -> list[Edge]:
    """What no trace carries, from the decisions of the compiler."""
    edges = []
    ids = {group.leaves: f"g{i}" for i, group in enumerate(graph.groups)}
    for decision in graph.decisions:
        if decision.kind is Kind.CUT:
            found = re.search(r"`[^`]+`(?: at [^\s,]+)?", decision.reason)
            what = decision.reason if found is None else found[0]
            node = ids[decision.state]
            edges.append(Edge(node, node, f"cut: {what}", dashed=True))
        if decision.kind is Kind.ACROSS_GROUPS:
            for one, first in ids.items():
                for two, second in ids.items():
                    both = tuple(dict.fromkeys(one + two))
                    if one != two and decision.state == both:
                        label = "cut: later steps"
                        edges.append(Edge(first, second, label, dashed=True))
    return edges


# -- as text ---------------------------------------------------------------------------


_ESCAPED = {c: f"#{ord(c)};" for c in "#\"'`[](){}<>|;&\\"}


def escape(text: str) -> str:
    """A label for Mermaid: what its grammar reads is written as an entity code."""
    return "".join(_ESCAPED.get(character, character) for character in text)


_SHAPES = {"weight": ('["', '"]'), "group": ('(["', '"])'), "output": ('[["', '"]]')}


def to_mermaid(graph: "ETraceGraph") -> Report:
    """The text of `graph.to_mermaid()`."""
    drawing = draw(graph)
    lines = ["flowchart LR", f"  %% {escape(drawing.title)}"]
    for node in drawing.nodes:
        before, after = _SHAPES[node.kind]
        label = "<br/>".join(map(escape, node.label))
        lines.append(f"  {node.id}{before}{label}{after}")
    for edge in drawing.edges:
        arrow = "-.->" if edge.dashed else "-->"
        label = f'|"{escape(edge.label)}"|' if edge.label else ""
        lines.append(f"  {edge.source} {arrow}{label} {edge.target}")
    return Report("\n".join(lines))


def to_text(graph: "ETraceGraph") -> Report:
    """The text of `graph.to_text()`: every group and output with what feeds it."""
    drawing = draw(graph)
    names = {node.id: node.label[0] for node in drawing.nodes}
    width = max(len(name) for name in names.values())
    lines = [drawing.title]
    for node in drawing.nodes:
        fed = [edge for edge in drawing.edges if edge.target == node.id]
        silent = node.kind == "weight" and not any(
            edge.source == node.id for edge in drawing.edges
        )
        if node.kind == "weight" and not silent:
            continue
        lines += ["", ", ".join(node.label)]
        for edge in fed:
            arrow = "<~~" if edge.dashed else "<--"
            label = f"  {edge.label}" if edge.label else ""
            lines.append(f"  {arrow} {names[edge.source].ljust(width)}{label}".rstrip())
    lines += ["", "<-- credit   <~~ cut, or credited for the current step alone"]
    return Report("\n".join(lines))


# -- names -----------------------------------------------------------------------------


def input_names(graph: "ETraceGraph", number: int) -> tuple[str, ...]:
    """The names of `graph.input_names(number)`."""
    if not 0 <= number < len(graph.groups):
        last = len(graph.groups) - 1
        raise ValueError(
            f"number: got {number}, expected a hidden group from 0 to {last}. Count "
            "them in `graph.groups`."
        )
    program = graph.program
    tables = graph.param_leaves, graph.state_leaves.parts, graph.x_leaves
    paths = [path for table in tables for path in table.paths]
    names = dict(zip(program.inputs, paths, strict=True))
    made = {ref: e for e in program.equations for ref in e.outputs}
    params = params_of(program, graph.param_leaves.count)
    found = []
    for ref in graph.groups[number].reads:
        if ref in names:
            found.append(names[ref])
        elif program.origins[ref] is Origin.WEIGHT:
            of = sorted(graph.param_leaves.paths[i] for i in params.get(ref, ()))
            found.append(f"{describe_equation(made[ref])} of {', '.join(of)}")
        elif ref in made:
            found.append(describe_equation(made[ref]))
        else:
            found.append("a constant")
    return tuple(found)
