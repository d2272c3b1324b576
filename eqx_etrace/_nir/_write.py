"""From a module to a graph of NIR: containers open, the rest by a table."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import nir
import numpy as np

from .. import nn
from ..nn._containers import _Function
from ._modules import Network, Shape, out_shape
from ._time import DISCRETISATIONS, Steps
from ._write_nodes import CUBA, FUNCTIONS, MODULES, Context


@dataclasses.dataclass(frozen=True)
class Value:
    """What some nodes send, added up."""

    sources: tuple[str, ...]
    shape: Shape


def write(
    model: Any,
    x: Any,
    dt: float | None,
    discretisation: Any,
    any_reset: bool,
) -> Any:
    if discretisation not in DISCRETISATIONS:
        raise ValueError(
            f"to_nir: got discretisation={discretisation!r}, expected 'euler' or "
            "'exact'. Other simulators use Euler's method."
        )
    steps = Steps(_time_step(model, dt), discretisation)
    builder = Builder(Context(steps, any_reset))
    single = not isinstance(model, Network) or len(model.inputs) == 1
    shapes = {"input": _input_shape(model, x)} if single else dict(model.inputs)
    values = {key: builder.input(key, shape) for key, shape in shapes.items()}
    if isinstance(model, Network):
        outs = builder.network("", model, list(values.values()))
    else:
        outs = {"output": builder.emit("", model, values["input"])}
    for key, value in outs.items():
        builder.output(key if len(outs) > 1 else "output", value)
    noted: dict[str, Any] = {"discretisation": discretisation}
    if steps.step is not None:
        noted["dt"] = steps.seconds
    return builder.graph(noted)


def _time_step(model: Any, dt: float | None) -> float | None:
    """The one of all modules that have one, which is also `dt` if that is given."""
    found = {} if dt is None else {"dt=": float(dt)}
    leaves = jax.tree_util.tree_leaves_with_path(
        model, is_leaf=lambda m: hasattr(m, "dt")
    )
    for path, leaf in leaves:
        if hasattr(leaf, "dt"):
            found[_name(jax.tree_util.keystr(path))] = float(leaf.dt)
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{step} ms of `{path}`" for path, step in found.items())
        raise ValueError(
            f"to_nir: got time steps of {listed}, expected the same one. A graph is "
            "simulated with one time step."
        )
    return next(iter(found.values()), None)


_IN_SIZES: dict[type, Callable[[Any], Any]] = {
    nn.Dense: lambda m: (m.pre,),
    nn.Sparse: lambda m: (m.pre,),
    nn.Dale: lambda m: m.weight.shape[1:],
    nn.LinearReadout: lambda m: (m.input_size,),
    nn.LeakyReadout: lambda m: (m.input_size,),
    nn.SpikeCount: lambda m: (m.size,),
    eqx.nn.Linear: lambda m: m.weight.shape[1:],
    Network: lambda m: m.inputs[0][1],
}


def _input_shape(model: Any, x: Any) -> Shape:
    if x is not None:
        return tuple(int(n) for n in jnp.shape(x))
    first = model
    while isinstance(first, nn.Sequential | eqx.nn.Sequential | nn.Residual):
        first = first.layer if isinstance(first, nn.Residual) else first.layers[0]
    if isinstance(first, nn.Recurrent) and first.synapse is not None:
        return _input_shape(first.synapse, None)
    of = _IN_SIZES.get(type(first), lambda m: getattr(m, "shape", None))
    shape = of(first)
    if shape is None:
        raise ValueError(
            f"to_nir: got a `{type(first).__name__}` as the first layer, which does "
            "not say how large its input is, expected an input. Pass one, or a "
            "`jax.ShapeDtypeStruct`: `to_nir(model, x)`."
        )
    return shape


def _name(path: str) -> str:
    return path.removeprefix(".") or "model"


class Builder:
    """A graph that is being built. Only `write` and `recurrent` hold one."""

    def __init__(self, context: Context):
        self.context = context
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.synapses: list[str] = []

    def input(self, key: str, shape: Shape) -> Value:
        self.nodes[key] = nir.Input({"input": np.array(shape, int)})
        return Value((key,), shape)

    def output(self, key: str, value: Value) -> None:
        self.add(nir.Output({"output": np.array(value.shape, int)}), value, (), key)

    def add(self, node: Any, value: Value, shape: Shape, name: str = "") -> Value:
        name = name or type(node).__name__.lower()
        key, count = name, 0
        while key in self.nodes:
            count += 1
            key = f"{name}_{count}"
        self.nodes[key] = node
        self.edges += [(source, key) for source in value.sources]
        return Value((key,), shape)

    def later(self, token: str, sources: Sequence[str]) -> None:
        """What nodes were to read from `token` they read from `sources`."""
        edges = []
        for a, b in self.edges:
            edges += [(s, b) for s in sources] if a == token else [(a, b)]
        self.edges = edges

    def emit(self, path: str, module: Any, value: Value) -> Value:
        if type(module) in (nn.Sequential, eqx.nn.Sequential):
            for i, layer in enumerate(module.layers):
                value = self.emit(f"{path}.layers[{i}]", layer, value)
            return value
        if type(module) is nn.Residual:
            out = self.emit(f"{path}.layer", module.layer, value)
            out_shape(_name(path), module, value.shape)
            return Value((*value.sources, *out.sources), value.shape)
        if type(module) is nn.Recurrent:
            return self.recurrent(path, module, value)
        if type(module) is Network:
            _check_single(path, module)
            return self.network(path, module, [value]).popitem()[1]
        if type(module) in (nn.Delta, eqx.nn.Identity):
            return value
        make = _maker(path, module)
        shape = out_shape(_name(path), module, value.shape)
        for node in _nodes(path, module, make, value.shape, self.context):
            node.input_type = {"input": np.array(value.shape, int)}
            # Of several nodes the first is a product, and changes the shape.
            node.output_type = {"output": np.array(shape, int)}
            value = self.add(node, value, shape)
        if type(module) is nn.Exponential:
            self.synapses += value.sources
        return value

    def recurrent(self, path: str, module: nn.Recurrent, value: Value) -> Value:
        """A graph of its own, in the layout that simulators read layers from."""
        inner = Builder(self.context)
        start = inner.input("input", value.shape)
        out = Value((*start.sources, "<back>"), value.shape)
        if module.synapse is not None:
            out = inner.emit(f"{path}.synapse", module.synapse, out)
        out = inner.emit(f"{path}.neuron", module.neuron, out)
        back = inner.emit(f"{path}.connection", module.connection, out)
        out_shape(_name(path), module, value.shape)
        inner.later("<back>", back.sources)
        inner.output("output", out)
        return self.add(inner.graph({}), value, out.shape, "recurrent")

    def network(
        self, path: str, module: Network, values: Sequence[Value]
    ) -> dict[str, Value]:
        names = (name for name, _ in module.inputs)
        known, late = dict(zip(names, values, strict=True)), set()

        def total(sources: Sequence[tuple[str, bool]]) -> Value:
            keys, shape = [], ()
            for key, is_late in sources:
                if is_late:
                    late.add(key)
                    keys.append(f"<{key}>")
                    shape = module.nodes[key].shape
                else:
                    keys += known[key].sources
                    shape = known[key].shape
            return Value(tuple(keys), shape)

        for key, sources in module.sources:
            where = f"{path}.nodes[{key!r}]"
            known[key] = self.emit(where, module.nodes[key], total(sources))
        outs = {key: total(sources) for key, sources in module.outputs}
        for key in late:
            self.later(f"<{key}>", known[key].sources)
        return outs

    def graph(self, metadata: dict[str, Any]) -> Any:
        self._merge_synapses()
        twice = [e for e, n in collections.Counter(self.edges).items() if n > 1]
        if twice:
            a, b = twice[0]
            raise ValueError(
                f"to_nir: got the output of node {a!r} twice as an input of {b!r}, "
                "expected it once. NIR has no repeated edges; put twice the weight on "
                "one."
            )
        return nir.NIRGraph(self.nodes, self.edges, metadata, type_check=False)

    def _merge_synapses(self) -> None:
        """A synapse and the neurons that it alone feeds are one node of NIR."""
        for key in self.synapses:
            targets = [b for a, b in self.edges if a == key]
            if len(targets) != 1:
                continue
            (target,) = targets
            sources = [a for a, b in self.edges if b == target]
            merged = CUBA.get(type(self.nodes[target]))
            if merged is None or sources != [key]:
                continue
            self.nodes[target] = merged(self.nodes.pop(key), self.nodes[target])
            self.edges = [
                (a, target if b == key else b) for a, b in self.edges if a != key
            ]


def _check_single(path: str, module: Network) -> None:
    if len(module.inputs) != 1 or len(module.outputs) != 1:
        raise ValueError(
            f"to_nir, `{_name(path)}`: got a network of {len(module.inputs)} inputs "
            f"and {len(module.outputs)} outputs inside another one, expected one of "
            "each. Write it on its own."
        )


def _maker(path: str, module: Any) -> Callable[..., list[Any]]:
    function = module.fun if type(module) is _Function else None
    if isinstance(module, eqx.nn.Lambda):
        function = module.fn
    make = FUNCTIONS.get(function) if function else MODULES.get(type(module))
    if make is None:
        name = getattr(function, "__name__", type(module).__name__)
        known = ", ".join(sorted({kind.__name__ for kind in MODULES}))
        raise ValueError(
            f"to_nir, `{_name(path)}`: got `{name}`, expected one of {known}, "
            "Sequential, Residual, Recurrent or `jnp.ravel`. NIR has no node for it."
        )
    return make


def _nodes(
    path: str,
    module: Any,
    make: Callable[..., list[Any]],
    shape: Shape,
    context: Context,
) -> list[Any]:
    try:
        return make(module, shape, context)
    except ValueError as error:
        kind = type(module).__name__
        raise ValueError(f"to_nir, `{_name(path)}` ({kind}): {error}") from error
