"""Modules and their edges to one module: a chain, or a network of nodes.

A cycle of one neuron becomes `nn.Recurrent`, and what is then a chain `nn.Sequential`.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

from .. import nn
from ..nn._neurons import AbstractNeuron
from ._modules import Network, Source


Sources = tuple[Source, ...]


@dataclasses.dataclass
class Parts:
    """Modules in an order in which each can be called, and what each reads."""

    inputs: dict[str, tuple[int, ...]]
    nodes: dict[str, Any]
    sources: dict[str, Sources]
    outputs: dict[str, Sources]


def assemble(parts: Parts) -> Any:
    for key, sources in list(parts.sources.items()):
        for source, late in sources:
            if late and source in parts.nodes:
                parts = _with_recurrent(parts, source, key)
    if _is_chain(parts):
        return nn.Sequential(list(parts.nodes.values()))
    return Network(
        parts.nodes,
        tuple(parts.sources.items()),
        tuple(parts.inputs.items()),
        tuple(parts.outputs.items()),
    )


def _is_chain(parts: Parts) -> bool:
    if len(parts.inputs) != 1 or len(parts.outputs) != 1 or not parts.nodes:
        return False
    keys = [*parts.inputs, *parts.nodes]
    expected = [((key, False),) for key in keys]
    return expected == [*parts.sources.values(), *parts.outputs.values()]


def _chain(modules: Sequence[Any]) -> Any:
    """One module, with a state."""
    if len(modules) == 1 and hasattr(modules[0], "init_state"):
        return modules[0]
    return nn.Sequential(list(modules))


def _with_recurrent(parts: Parts, neuron: str, first: str) -> Parts:
    """The cycle that begins with the late edge from `neuron` to `first` as one node,
    where it has one neuron, one way in and one way out."""
    cycle = _simple_cycle(parts, neuron, first)
    if cycle is None or not isinstance(parts.nodes[neuron], AbstractNeuron):
        return parts
    outside = {
        key: tuple(s for s in parts.sources[key] if s[0] not in cycle) for key in cycle
    }
    entries = [key for key in cycle if outside[key]]
    readers = collections.Counter(
        source
        for key, sources in [*parts.sources.items(), *parts.outputs.items()]
        for source, _ in sources
        if key not in cycle
    )
    if len(entries) != 1 or set(cycle).intersection(readers) - {neuron}:
        return parts
    at = cycle.index(entries[0])
    modules = [parts.nodes[key] for key in cycle]
    layer = nn.Recurrent(
        modules[-1],
        _chain(modules[:at]) if at else nn.Delta(modules[-1].shape),
        synapse=_chain(modules[at:-1]) if at < len(cycle) - 1 else None,
    )
    others = set(cycle) - {neuron}
    nodes = {key: node for key, node in parts.nodes.items() if key not in others}
    sources = {key: s for key, s in parts.sources.items() if key not in others}
    nodes[neuron], sources[neuron] = layer, outside[entries[0]]
    return dataclasses.replace(parts, nodes=nodes, sources=sources)


def _simple_cycle(parts: Parts, neuron: str, first: str) -> list[str] | None:
    """From `first` to `neuron`, if that is all that lies on a way back to it."""
    readers = collections.defaultdict(list)
    for key, sources in parts.sources.items():
        for source, late in sources:
            readers[source].append((key, late))
    ahead = _all_from(readers, neuron)
    around = {key for key in ahead if neuron in _all_from(readers, key)}
    cycle, key = [], neuron
    while True:
        following = [reader for reader in readers[key] if reader[0] in around]
        if len(following) != 1 or following[0][1] != (key == neuron):
            return None
        key = following[0][0]
        cycle.append(key)
        if key == neuron:
            complete = cycle[0] == first and len(cycle) == len(around)
            return cycle if complete else None


def _all_from(readers: Any, start: str) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for key, _ in readers.get(waiting.pop(), ()):
            if key not in found:
                found.add(key)
                waiting.append(key)
    return found
