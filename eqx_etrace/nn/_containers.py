"""Modules made of modules, whose state is a tuple of states.

What has a method `init_state()` follows the convention `(x, state) -> (out, state)`.
Anything else that can be called is stateless and is called as `layer(x)`: layers of
`equinox.nn`, functions. What is neither is refused when the container is made.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree


_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


class _Function(eqx.Module):
    """A plain function as no leaf, so that `jax.tree.map` sees arrays alone."""

    fun: Callable[..., Any] = eqx.field(static=True)

    def __call__(self, x: Any) -> Any:
        return self.fun(x)


def _name(layer: Any) -> str:
    if isinstance(layer, _Function):
        return _name(layer.fun)
    return getattr(layer, "__name__", type(layer).__name__)


def _parameters(layer: Any) -> list[inspect.Parameter]:
    """Those of the call, or none where Python cannot tell."""
    try:
        return list(inspect.signature(layer).parameters.values())
    except (TypeError, ValueError):
        return []


def _is_stateful(layer: Any) -> bool:
    return callable(getattr(layer, "init_state", None))


def _takes_key(layer: Any) -> bool:
    return any(p.name == "key" for p in _parameters(layer))


def _refuse(where: str, layer: Any, remedy: str) -> None:
    raise TypeError(
        f"{where}: got `{_name(layer)}`, expected a module with `init_state()` that is "
        "called as `(x, state) -> (out, state)`, or a stateless module or function "
        f"that is called as `layer(x)`. {remedy}"
    )


def _checked(where: str, layer: Any) -> Any:
    if isinstance(layer, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        kind = "GRU" if isinstance(layer, eqx.nn.GRUCell) else "LSTM"
        _refuse(where, layer, f"Wrap it: `nn.{kind}(cell)`.")
    if isinstance(layer, type):
        _refuse(where, layer, "Pass an instance, not the class.")
    if isinstance(layer, eqx.nn.StatefulLayer) and layer.is_stateful():
        _refuse(where, layer, "Its state is an `equinox.nn.State`, no tuple entry.")
    if not callable(layer):
        _refuse(where, layer, "It cannot be called.")
    if _is_stateful(layer):
        return layer
    needed = [
        p.name
        for p in _parameters(layer)
        if p.kind in _POSITIONAL and p.default is inspect.Parameter.empty
    ]
    if len(needed) > 1:
        remedy = f"It takes {', '.join(needed)}. Give it a method `init_state()`."
        _refuse(where, layer, remedy)
    return _Function(layer) if jax.tree_util.all_leaves([layer]) else layer


def _all_checked(where: str, layers: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(layers, list | tuple) or not layers:
        raise TypeError(
            f"{where}: got {layers!r}, expected a list or tuple of at least one layer. "
            f"Write `{where}([first, second])`."
        )
    return tuple(_checked(f"{where}, layer {i}", a) for i, a in enumerate(layers))


def _initial(layer: Any) -> PyTree:
    return layer.init_state() if _is_stateful(layer) else None


def _call(
    where: str, layer: Any, x: Any, state: PyTree, key: PRNGKeyArray | None
) -> tuple[Any, PyTree]:
    with_key = {} if key is None or not _takes_key(layer) else {"key": key}
    if not _is_stateful(layer):
        return layer(x, **with_key), None
    result = layer(x, state, **with_key)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"{where}: got an object of type `{type(result).__name__}` from "
            f"`{_name(layer)}`, expected the pair (out, state). A module with "
            "`init_state()` returns its new state next to its output."
        )
    return result


def _states_of(where: str, states: Any, count: int) -> tuple[PyTree, ...]:
    if not isinstance(states, list | tuple) or len(states) != count:
        got = f"{len(states)}" if isinstance(states, list | tuple) else repr(states)
        raise ValueError(
            f"{where}: got {got} for the states of {count} layers, expected a tuple of "
            f"{count}. `init_state()` makes one."
        )
    return tuple(states)


def _keys(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


class Sequential(eqx.Module):
    """Layers one after the other: each takes the output of the one before it.

    A layer with a method `init_state()` is called as `(x, state) -> (out, state)`, any
    other as `layer(x)`: layers of `equinox.nn`, functions. The state is a tuple with an
    entry for each layer, None for those without a state. The params of a layer are
    found under `layers[i]`; weights in the closure of a function are no params.

    !!! example

        ```python
        import eqx_etrace
        from eqx_etrace import nn

        one, two = jax.random.split(jax.random.key(0))
        net = nn.Sequential(
            [nn.MGU(3, 8, key=one), jnp.tanh, eqx.nn.Linear(8, 2, key=two)]
        )
        out, state = net(jnp.ones(3), net.init_state())
        graph = eqx_etrace.compile(net, net.init_state(), jnp.ones(3))
        ```
    """

    layers: tuple[Callable[..., Any], ...]

    def __init__(self, layers: Sequence[Any]):
        """**Arguments:** `layers`, a list or tuple.

        **Raises:** `TypeError` for a layer that is neither stateful nor stateless, such
        as an `equinox.nn.GRUCell`, for which `eqx_etrace.nn.GRU` is there.
        """
        self.layers = _all_checked("nn.Sequential", layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> Callable[..., Any]:
        return self.layers[i]

    def init_state(self) -> tuple[PyTree, ...]:
        """The states of the layers, None for those without."""
        return tuple(_initial(layer) for layer in self.layers)

    def __call__(
        self, x: PyTree, state: tuple[PyTree, ...], *, key: PRNGKeyArray | None = None
    ) -> tuple[PyTree, tuple[PyTree, ...]]:
        """**Arguments:**

        - `x`: the input of the first layer.
        - `state`: as `init_state` returns it.
        - `key`: split among the layers; those that take a `key` get theirs.

        **Returns:** the output of the last layer and the new state.
        """
        old, new = _states_of("nn.Sequential", state, len(self.layers)), []
        for i, one in enumerate(_keys(key, len(self.layers))):
            x, s = _call(f"nn.Sequential, layer {i}", self.layers[i], x, old[i], one)
            new.append(s)
        return x, tuple(new)


class Residual(eqx.Module):
    """Adds its input to the output of a layer: `x + layer(x)`.

    The layer may have a state or none, as in `eqx_etrace.nn.Sequential`; the state is
    that of the layer, None if it has none.

    **Source:** He et al., *Deep residual learning for image recognition*, CVPR 2016.

    !!! example

        ```python
        from eqx_etrace import nn

        block = nn.Residual(nn.LRU(4, 8, 4, key=jax.random.key(0)))
        out, state = block(jnp.ones(4), block.init_state())
        ```
    """

    layer: Callable[..., Any]

    def __init__(self, layer: Any):
        """**Arguments:** `layer`, whose output has the shape of its input."""
        self.layer = _checked("nn.Residual", layer)

    def init_state(self) -> PyTree:
        """The state of the layer."""
        return _initial(self.layer)

    def __call__(
        self, x: Array, state: PyTree, *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, PyTree]:
        """As `eqx_etrace.nn.Sequential`.

        **Raises:** `ValueError` if input and output differ in shape.
        """
        out, state = _call("nn.Residual", self.layer, x, state, key)
        if jnp.shape(out) != jnp.shape(x):
            raise ValueError(
                f"nn.Residual: got an output of shape {jnp.shape(out)} from "
                f"`{_name(self.layer)}`, expected {jnp.shape(x)}, that of its input. "
                "Choose its sizes alike."
            )
        return x + out, state


class Stack(eqx.Module):
    """Layers one after the other, with the outputs of all of them side by side.

    A deep recurrent network whose readout sees every layer. Online this matters: the
    credit of a lower layer does not have to pass through the memory of those above it.
    Layers and state are as in `eqx_etrace.nn.Sequential`; each output is a vector.

    **Source:** Graves, *Generating sequences with recurrent neural networks*, 2013
    (arXiv:1308.0850).

    !!! example

        ```python
        from eqx_etrace import nn

        one, two = jax.random.split(jax.random.key(0))
        deep = nn.Stack([nn.RNN(3, 8, key=one), nn.RNN(8, 6, key=two)])
        out, state = deep(jnp.ones(3), deep.init_state())
        assert out.shape == (14,)
        ```
    """

    layers: tuple[Callable[..., Any], ...]

    def __init__(self, layers: Sequence[Any]):
        """**Arguments:** `layers`, as for `eqx_etrace.nn.Sequential`."""
        self.layers = _all_checked("nn.Stack", layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> Callable[..., Any]:
        return self.layers[i]

    def init_state(self) -> tuple[PyTree, ...]:
        """The states of the layers, None for those without."""
        return tuple(_initial(layer) for layer in self.layers)

    def __call__(
        self, x: Array, state: tuple[PyTree, ...], *, key: PRNGKeyArray | None = None
    ) -> tuple[Array, tuple[PyTree, ...]]:
        """As `eqx_etrace.nn.Sequential`; the output is that of all layers, joined."""
        old, new, outs = _states_of("nn.Stack", state, len(self.layers)), [], []
        for i, one in enumerate(_keys(key, len(self.layers))):
            x, s = _call(f"nn.Stack, layer {i}", self.layers[i], x, old[i], one)
            if jnp.ndim(x) != 1:
                raise ValueError(
                    f"nn.Stack: got an output of shape {jnp.shape(x)} from layer {i}, "
                    "expected a vector. Flatten it in a layer of its own."
                )
            new.append(s)
            outs.append(x)
        return jnp.concatenate(outs), tuple(new)
