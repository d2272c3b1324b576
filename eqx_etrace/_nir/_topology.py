"""Which node reads which: nested graphs opened, cycles cut.

NIR's edges have no delay; in steps, something on a cycle has to. It is an edge out of
a neuron: one that leads, through nodes that are no neurons, to a neuron of the same
cycle that comes before it or to itself, counted from the inputs. What its neuron sent
one step ago is then read.
"""

import collections
import graphlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import nir


Edge = tuple[str, str]

SPIKING = (nir.LIF, nir.CubaLIF, nir.IF)
NEURONS = (*SPIKING, nir.LI, nir.CubaLI)


class Wiring(NamedTuple):
    """A graph without graphs inside."""

    nodes: dict[str, Any]
    """In an order in which each can be called."""
    edges: list[Edge]
    late: frozenset[Edge]


def wiring(graph: Any) -> Wiring:
    nodes, edges = _opened(graph, "")
    for key in _inner_ends(nodes, graph):
        edges = _bridged(edges, key)
        del nodes[key]
    _check_ways(nodes, edges)
    late = frozenset(_late(nodes, edges, SPIKING))
    try:
        order = _order(nodes, edges, late)
    except graphlib.CycleError:
        late = frozenset(_late(nodes, edges, NEURONS))
        try:
            order = _order(nodes, edges, late)
        except graphlib.CycleError as error:
            cycle = " -> ".join(reversed(error.args[1]))
            raise ValueError(
                f"from_nir: got a cycle without neurons, {cycle}, expected one with a "
                "LIF, CubaLIF, IF, LI or CubaLI node, whose output of the last step is "
                "read. A loop without a memory has no next value."
            ) from None
    return Wiring({key: nodes[key] for key in order}, edges, late)


def _opened(graph: Any, prefix: str) -> tuple[dict[str, Any], list[Edge]]:
    """All nodes of all graphs; edges that meet a graph meet its Input or Output."""
    try:
        graph.validate_structure()
    except ValueError as error:
        raise ValueError(f"from_nir: {error}. Mend the edges of the graph.") from None
    nodes, edges, doors = {}, [], {}
    for key, node in graph.nodes.items():
        if not isinstance(node, nir.NIRGraph):
            nodes[prefix + key] = node
            continue
        doors[key] = tuple(_door(prefix + key, e) for e in (node.inputs, node.outputs))
        inner_nodes, inner_edges = _opened(node, f"{prefix}{key}.")
        nodes |= inner_nodes
        edges += inner_edges
    for a, b in graph.edges:
        source = doors[a][1] if a in doors else prefix + a
        target = doors[b][0] if b in doors else prefix + b
        edges.append((source, target))
    return nodes, edges


def _door(key: str, ends: Collection[str]) -> str:
    if len(ends) != 1:
        raise ValueError(
            f"from_nir, node {key!r} (NIRGraph): got {len(ends)} Input or Output nodes "
            f"({', '.join(ends)}), expected one of each. Edges to a nested graph do "
            "not say which one they mean."
        )
    return f"{key}.{next(iter(ends))}"


def _inner_ends(nodes: Mapping[str, Any], graph: Any) -> list[str]:
    ends = (key for key, n in nodes.items() if isinstance(n, nir.Input | nir.Output))
    return [key for key in ends if key not in graph.nodes]


def _bridged(edges: Iterable[Edge], key: str) -> list[Edge]:
    """Without a node that passes on what it gets."""
    edges = list(edges)
    targets = [b for a, b in edges if a == key]
    if key in targets:
        raise ValueError(
            f"from_nir, node {key!r}: got an edge to itself, expected neurons on every "
            "cycle. A loop without a memory has no next value."
        )
    kept = []
    for a, b in edges:
        if b == key:
            kept += [(a, target) for target in targets]
        elif a != key:
            kept.append((a, b))
    return kept


def _check_ways(nodes: Mapping[str, Any], edges: list[Edge]) -> None:
    """That each node is on a way from an input to an output: what is not would drop
    out of the network without a word."""
    inputs = [key for key, node in nodes.items() if isinstance(node, nir.Input)]
    outputs = [key for key, node in nodes.items() if isinstance(node, nir.Output)]
    fed = _reached(_successors(edges), inputs)
    used = _reached(_successors((b, a) for a, b in edges), outputs)
    for key, node in nodes.items():
        if key not in fed or key not in used:
            missing = "an Input" if key not in fed else "an Output"
            raise ValueError(
                f"from_nir, node {key!r} ({type(node).__name__}): got no way between "
                f"it and {missing} node, expected each node to lie between one of both."
                " Add the edge that is missing, or remove the node."
            )


def _successors(edges: Iterable[Edge]) -> dict[str, list[str]]:
    found = collections.defaultdict(list)
    for a, b in edges:
        found[a].append(b)
    return found


def _reached(
    successors: Mapping[str, list[str]],
    starts: Iterable[str],
    stop: Collection[str] = (),
) -> list[str]:
    """Breadth first, the starts included; not beyond those to stop at."""
    found = list(dict.fromkeys(starts))
    for key in found:
        if key not in stop:
            new = dict.fromkeys(successors.get(key, ()))
            found += [k for k in new if k not in found]
    return found


def _late(
    nodes: Mapping[str, Any], edges: list[Edge], kinds: tuple[type, ...]
) -> Iterable[Edge]:
    successors = _successors(edges)
    inputs = [key for key, node in nodes.items() if isinstance(node, nir.Input)]
    order = _reached(successors, inputs)
    neurons = {key for key in order if isinstance(nodes[key], kinds)}
    for a, b in edges:
        if a not in neurons:
            continue
        met = neurons.intersection(_reached(successors, [b], stop=neurons))
        back = (key for key in met if a in _reached(successors, [key]))
        if any(order.index(key) <= order.index(a) for key in back):
            yield a, b


def _order(
    nodes: Mapping[str, Any], edges: list[Edge], late: Collection[Edge]
) -> list[str]:
    sorter = graphlib.TopologicalSorter({key: [] for key in nodes})
    for a, b in edges:
        if (a, b) not in late:
            sorter.add(b, a)
    return list(sorter.static_order())
