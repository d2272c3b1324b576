"""From a graph of NIR to a module: each node by a table, with its shapes checked."""

import os
from collections.abc import Sequence
from typing import Any

import nir
import numpy as np

from ..nn._neurons import UNIT_SPIKE, Reset, Spike
from ._assemble import Parts, assemble
from ._modules import Shape, out_shape
from ._read_nodes import NODES, TRAINABLE, Modules, Options
from ._time import DISCRETISATIONS, SECOND, Steps
from ._topology import Wiring, wiring


def read(
    source: Any,
    dt: float | None,
    discretisation: Any,
    reset: Reset | None,
    spike: Spike | None,
    trainable: str | Sequence[str],
) -> Any:
    graph = source
    if isinstance(source, str | os.PathLike):
        # Types are inferred here: those of files need not be complete.
        graph = nir.read(os.fspath(source), type_check=False)
    if not isinstance(graph, nir.NIRGraph):
        raise TypeError(
            f"from_nir: got a `{type(graph).__name__}`, expected a `nir.NIRGraph` or "
            "the path of a file with one. Wrap a single node: "
            "`nir.NIRGraph.from_list(node)`."
        )
    noted = graph.metadata
    if dt is None and "dt" in noted:
        dt = float(noted["dt"]) * SECOND
    if dt is not None and not (np.isfinite(dt) and dt > 0):
        raise ValueError(
            f"from_nir: got dt={dt}, expected a number above 0. It is in ms."
        )
    method = discretisation or noted.get("discretisation", "euler")
    if method not in DISCRETISATIONS:
        raise ValueError(
            f"from_nir: got discretisation={method!r}, expected 'euler' or 'exact'. "
            "Other simulators use Euler's method."
        )
    names = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    _check_names(names)
    options = Options(Steps(dt, method), reset, spike or UNIT_SPIKE, names)
    return assemble(_parts(wiring(graph), options))


def _check_names(names: Sequence[str]) -> None:
    known = sorted({name for names in TRAINABLE.values() for name in names})
    unknown = sorted(set(names).difference(known))
    if unknown:
        raise ValueError(
            f"from_nir: got trainable = {', '.join(unknown)}, expected names out of "
            f"{', '.join(known)}. Weights always train; they are not named here."
        )


def _parts(graph: Wiring, options: Options) -> Parts:
    parts, taken, sent = Parts({}, {}, {}, {}), {}, {}
    for key, node in graph.nodes.items():
        sources = tuple((a, (a, b) in graph.late) for a, b in graph.edges if b == key)
        if isinstance(node, nir.Input):
            sent[key] = parts.inputs[key] = _input_shape(graph, key)
            continue
        early = [sent[a] for a, late in sources if not late]
        shape = _common_shape(key, early or [_early_guess(graph, key, sources[0][0])])
        taken[key] = shape
        if isinstance(node, nir.Output):
            parts.outputs[key] = sources
            continue
        for suffix, module in _made(key, node, shape, options):
            name = key + suffix
            parts.nodes[name], parts.sources[name] = module, sources
            shape, sources = _out_shape(key, node, module, shape), ((name, False),)
        sent[key] = shape
    for a, b in graph.late:
        _common_shape(b, [taken[b], sent[a]])
    return parts


def _early_guess(graph: Wiring, key: str, source: str) -> Shape:
    """What a neuron sends that is not made yet; looked at again when it is. Its
    parameters have its shape, or are one number for all."""
    shape = tuple(graph.nodes[source].output_type["output"])
    takes = (graph.nodes[key].input_type or {}).get("input")
    if np.prod(shape) == 1 and takes is not None:
        shape = takes
    return tuple(int(n) for n in shape)


def _common_shape(key: str, shapes: Sequence[Shape]) -> Shape:
    if len(set(shapes)) != 1:
        raise ValueError(
            f"from_nir, node {key!r}: got inputs of shapes "
            f"{', '.join(map(str, shapes))}, expected one shape. What arrives at a "
            "node is added up."
        )
    return shapes[0]


def _input_shape(graph: Wiring, key: str) -> Shape:
    """That of the Input node, or else what its readers take."""
    shape = graph.nodes[key].input_type.get("input")
    for reader in (graph.nodes[b] for a, b in graph.edges if a == key):
        takes = (reader.input_type or {}).get("input")
        # Neurons with one number for all say nothing of their shape.
        if shape is None and takes is not None and len(takes):
            shape = takes
    if shape is None:
        raise ValueError(
            f"from_nir, node {key!r} (Input): got no shape, expected one. Set it: "
            f'`graph.nodes[{key!r}].input_type = {{"input": np.array(shape)}}`.'
        )
    return tuple(int(n) for n in shape)


def _made(key: str, node: Any, shape: Shape, options: Options) -> Modules:
    name = type(node).__name__
    make = NODES.get(type(node))
    if make is None:
        known = ", ".join(sorted(kind.__name__ for kind in NODES))
        raise ValueError(
            f"from_nir, node {key!r}: got a {name}, expected one of {known}, Input, "
            "Output or NIRGraph. Other nodes have no counterpart here."
        )
    try:
        return make(node, shape, options)
    except ValueError as error:
        raise ValueError(f"from_nir, node {key!r} ({name}): {error}") from error


def _out_shape(key: str, node: Any, module: Any, shape: Shape) -> Shape:
    try:
        return out_shape(key, module, shape)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"from_nir, node {key!r} ({type(node).__name__}): got an input of shape "
            f"{shape}, which it does not take. {error}"
        ) from error
