"""Nodes of NIR that `eqx_etrace.nn` has no counterpart for, and graphs of nodes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..nn._containers import _call, _initial
from ..nn._neurons import Spike
from ..nn._parameters import Parameter
from ..nn._shapes import check_input


Shape = tuple[int, ...]


def out_shape(where: str, module: Any, shape: Shape) -> Shape:
    """That of what any module returns for an input of a shape."""
    x = jax.ShapeDtypeStruct(shape, jnp.result_type(float))
    state = jax.eval_shape(lambda: _initial(module))

    def out(x: Any, state: Any) -> Any:
        return _call(where, module, x, state, None)[0]

    return jax.eval_shape(out, x, state).shape


class Stateless(eqx.Module):
    """The convention `(x, state) -> (out, state)` for what remembers nothing."""

    def init_state(self) -> tuple[()]:
        return ()


class Scale(Stateless):
    """Each value times a number of its own."""

    factor: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."], state: tuple[()]) -> tuple[Array, Any]:
        check_input(self, x, self.shape)
        return self.factor(x.dtype) * x, state


class Threshold(Stateless):
    """1 above the threshold, 0 elsewhere, with a surrogate derivative."""

    threshold: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    spike: Spike = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."], state: tuple[()]) -> tuple[Array, Any]:
        check_input(self, x, self.shape)
        return self.spike(x - self.threshold(x.dtype)), state


class Flatten(Stateless):
    """The axes from `start` to `end`, both counted, become one."""

    start: int = eqx.field(static=True)
    end: int = eqx.field(static=True)

    def __call__(self, x: Float[Array, "..."], state: tuple[()]) -> tuple[Array, Any]:
        first, last = self.start % x.ndim, self.end % x.ndim
        shape = (*x.shape[:first], -1, *x.shape[last + 1 :])
        return x.reshape(shape), state


Source = tuple[str, bool]
"""The key of a node, and whether what it sent one step ago is meant."""


class Network(eqx.Module):
    """Nodes that are called one after the other, each with the sum of its sources.

    A source that closes a cycle is read one step late: off the state of its neurons.

    With one input and one output x and the output are arrays, else dicts of arrays
    with the names of the `Input` and `Output` nodes. The state is a dict with an entry
    for each node, None for those without.
    """

    nodes: dict[str, Any]
    sources: tuple[tuple[str, tuple[Source, ...]], ...] = eqx.field(static=True)
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = eqx.field(static=True)
    outputs: tuple[tuple[str, tuple[Source, ...]], ...] = eqx.field(static=True)

    def init_state(self) -> dict[str, PyTree]:
        return {key: _initial(node) for key, node in self.nodes.items()}

    def __call__(
        self, x: PyTree, state: dict[str, PyTree]
    ) -> tuple[PyTree, dict[str, PyTree]]:
        values, new = self._received(x), {}
        for key, sources in self.sources:
            total = self._sum(sources, values, state)
            values[key], new[key] = _call(
                f"node {key!r}", self.nodes[key], total, state[key], None
            )
        outs = {key: self._sum(s, values, state) for key, s in self.outputs}
        return (outs if len(outs) > 1 else outs.popitem()[1]), new

    def _received(self, x: PyTree) -> dict[str, Array]:
        single = len(self.inputs) == 1
        values = {self.inputs[0][0]: x} if single else dict(x)
        shapes = jax.tree.map(jnp.shape, values)
        if shapes != dict(self.inputs):
            raise ValueError(
                f"from_nir: got inputs of shapes {shapes}, expected "
                f"{dict(self.inputs)}. Map a batch with `jax.vmap`."
            )
        return values

    def _sum(
        self, sources: tuple[Source, ...], values: dict[str, Array], state: Any
    ) -> Array:
        terms = [
            self.nodes[key].output(state[key]) if late else values[key]
            for key, late in sources
        ]
        return sum(terms[1:], start=terms[0])
