"""The two public functions; the package `nir` is imported when one is called."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Array, PyTree

from ._time import Discretisation


def _check_installed(name: str) -> None:
    try:
        import nir  # noqa: F401 pyright: ignore
    except ImportError as error:
        raise ImportError(
            f"{name}: got no package `nir`, expected one, which reads and writes "
            "the format. Install it: pip install 'eqx-etrace[nir]'"
        ) from error


# The types of NIR stand in the docstrings: annotations would import the package.
def to_nir(
    model: Any,
    x: PyTree = None,
    *,
    dt: float | None = None,
    discretisation: Discretisation = "euler",
    any_reset: bool = False,
) -> Any:
    r"""A network as a graph of the Neuromorphic Intermediate Representation.

    NIR is how simulators and neuromorphic hardware exchange networks: Lava, Nengo,
    Norse, Rockpool, Sinabs, snnTorch, SpiNNaker2 and others. `nir.write(path, graph)`
    makes a file of it.

    NIR describes neurons by differential equations, in seconds. With
    `discretisation="euler"` the time constants are such that a simulator that uses
    Euler's method with the same `dt` makes the same steps as this library; with
    `"exact"` they are those of the model. See the page about NIR for the tables.

    **Arguments:**

    - `model`: a module of `eqx_etrace.nn`, a layer of `equinox.nn`, or `nn.Sequential`,
      `nn.Residual` and `nn.Recurrent` of such ones, or what `from_nir` returns.
    - `x`: an input, or a `jax.ShapeDtypeStruct`, where the first layer does not know
      its size, as a convolution.
    - `dt`: the time step, ms; None for that of the neurons. A network with delays and
      without neurons has none.
    - `discretisation`: `"euler"` or `"exact"`.
    - `any_reset`: whether neurons may have another reset than `"value"`, the only one
      of NIR. It is then written to the metadata of their nodes, which `from_nir` reads;
      other simulators have to be told.

    **Returns:** a `nir.NIRGraph`. Weights have the dtype that they have, other numbers
    JAX's default float. `dt`, in seconds, and `discretisation` are in its metadata.
    Surrogate derivatives, and what trains, are not part of NIR.

    **Raises:** `ValueError` for a module without counterpart, with its path, and for
    what NIR cannot say; `ImportError` without the extra `nir`.

    **Source:** Pedersen et al., *Neuromorphic intermediate representation: a unified
    instruction set for interoperable brain-inspired computing*, Nature Communications
    15, 2024.

    !!! example

        ```python
        net = nn.Sequential(
            [nn.Dense(3, 8, key=key), nn.LIF(8, reset="value"), nn.Dense(8, 2, key=key)]
        )
        found = eqx_etrace.to_nir(net)
        assert sorted(found.nodes) == ["affine", "affine_1", "input", "lif", "output"]
        ```
    """
    _check_installed("to_nir")
    from ._write import write

    return write(model, x, dt, discretisation, any_reset)


def from_nir(
    source: Any,
    *,
    dt: float | None = None,
    discretisation: Discretisation | None = None,
    reset: Literal["subtract", "value", "none"] | None = None,
    spike: Callable[[Array], Array] | None = None,
    trainable: str | Sequence[str] = (),
) -> Any:
    r"""A graph of the Neuromorphic Intermediate Representation as an Equinox module.

    It runs what other simulators have written, and trains it on. Called as
    `(x, state) -> (out, state)`, with `init_state()`; `eqx_etrace.compile` takes it as
    it is.

    **Arguments:**

    - `source`: a `nir.NIRGraph`, or the path of a file with one.
    - `dt`: the time step, ms; None for what `to_nir` has noted. Take that of the
      simulator that the network comes from: 0.1 for what snnTorch writes, 1 for Norse
      unless told otherwise. A graph without time constants and delays needs none.
    - `discretisation`: `"euler"` for the same steps as simulators make that use Euler's
      method, `"exact"` for time constants as they are in the file; None for what
      `to_nir` has noted, else `"euler"`.
    - `reset`: of all neurons, `"value"`, `"subtract"` or `"none"`; None for what
      `to_nir` has noted, else `"value"`, which is what NIR says.
    - `spike`: the spike function of all neurons with its surrogate derivative; None for
      that of `nn.LIF`.
    - `trainable`: which parameters of neurons and synapses train beside the weights,
      by their names in `eqx_etrace.nn`, such as `"tau"`.

    **Returns:** `nn.Sequential` for a chain, with `nn.Recurrent` for neurons whose
    spikes come back to them. For other graphs a module that calls its `nodes`, a dict,
    in turn; each gets the sum of what its edges bring, and an edge that closes a cycle
    brings what was sent one step ago. With several inputs or outputs they are dicts.
    Weights are of JAX's default float.

    **Raises:** `ValueError` for a node without counterpart and for shapes that do not
    fit, with the key of the node, `TypeError` for what is no graph, `ImportError`
    without the extra `nir`.

    **Source:** as for `to_nir`.

    !!! example

        ```python
        import nir
        import numpy as np

        ones = np.ones(2)
        lif = nir.LIF(tau=0.02 * ones, r=ones, v_leak=0 * ones, v_threshold=ones)
        found = nir.NIRGraph.from_list(nir.Linear(np.ones((2, 3))), lif)
        net = eqx_etrace.from_nir(found, dt=1.0)
        spikes, state = net(jnp.ones(3), net.init_state())
        ```
    """
    _check_installed("from_nir")
    from ._read import read

    return read(source, dt, discretisation, reset, spike, trainable)
