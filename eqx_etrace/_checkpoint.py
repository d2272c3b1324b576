"""Checkpoints: all that learning carries along, in one file that is whole or not there.

A file is one line of JSON, which says what it is of, and behind it the leaves as
Equinox writes them.
"""

import json
import os
import pathlib
import tempfile
from typing import IO, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._graph import ETraceGraph
from ._rules import name_of
from ._stage import named_leaves


_FORMAT = "eqx_etrace checkpoint 1"


class Checkpoint(NamedTuple):
    """All that learning carries from step to step.

    **Attributes:**

    - `params`: as `graph.params(model)` gives them, after some updates.
    - `opt_state`: that of the optimiser.
    - `state`, `trace`: as `eqx_etrace.step` or `learn` returned them.
    - `step`: how far the data have been read, an integer.

    !!! example

        ```python
        start = eqx_etrace.Checkpoint(params, (), state, trace, 0)
        ```
    """

    params: PyTree
    opt_state: PyTree
    state: PyTree
    trace: PyTree
    step: Any


def save_checkpoint(
    path: str | os.PathLike[str], graph: ETraceGraph, checkpoint: Checkpoint
) -> None:
    """Write a checkpoint to a file.

    It is written beside the file and takes its place when it is complete: whatever
    happens on the way, an older checkpoint stays as it was.

    **Arguments:**

    - `path`: of the file; its folder is there.
    - `graph`: what the checkpoint is of: its params, rule and traces are noted.
    - `checkpoint`: a `Checkpoint`; any pytrees of arrays, numbers and random keys.

    **Raises:** `OSError` where the file cannot be written.

    !!! example

        ```python
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            now = eqx_etrace.Checkpoint(params, (), state, trace, 100)
            eqx_etrace.save_checkpoint(f"{folder}/run.eqx", graph, now)
            again = eqx_etrace.load_checkpoint(f"{folder}/run.eqx", graph, like=now)
        ```
    """
    path = pathlib.Path(path)
    header = {
        "format": _FORMAT,
        "graph": _described(graph),
        "leaves": _spec(checkpoint),
    }
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            eqx.tree_serialise_leaves(file, _without_keys(checkpoint))
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def load_checkpoint(
    path: str | os.PathLike[str], graph: ETraceGraph, like: Checkpoint
) -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` has written.

    **Arguments:**

    - `path`: of the file.
    - `graph`: the graph to go on with; compiled again from the same model it will do.
    - `like`: a checkpoint of the same structure, shapes and dtypes, such as the one to
      start from; its values are not read.

    **Returns:** a `Checkpoint`. Learning goes on from it bit for bit as it would have.

    **Raises:** `ValueError` for a file that is no checkpoint, is not complete, is of
    another graph, or has other leaves; it names the first.

    !!! example

        ```python
        start = eqx_etrace.Checkpoint(params, (), state, trace, 0)
        try:
            start = eqx_etrace.load_checkpoint("run.eqx", graph, like=start)
        except FileNotFoundError:
            pass  # The first run.
        ```
    """
    with open(path, "rb") as file:
        header = _header(path, file)
        _check_graph(path, header["graph"], _described(graph))
        _check_leaves(path, header["leaves"], _spec(like))
        try:
            found = eqx.tree_deserialise_leaves(file, _without_keys(like))
        except (EOFError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"{path}: got a file that ends too early, expected a whole checkpoint. "
                "Take an older one."
            ) from error
        if file.read(1):
            raise ValueError(
                f"{path}: got more than the leaves of a checkpoint, expected its end. "
                "Take an older one."
            )
    return jtu.tree_map(_with_keys, found, like)


def _header(path: Any, file: IO[bytes]) -> dict[str, Any]:
    line = file.readline()
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: got {line[:40]!r} at its start, expected the header of a "
            "checkpoint, whole. Give a file that `save_checkpoint` has written."
        )
    return header


def _described(graph: ETraceGraph) -> dict[str, Any]:
    """What of a graph a checkpoint depends on, as JSON."""
    return {
        "rule": name_of(graph.rule),
        "vjp": graph.vjp,
        "batch": graph.batch,
        "params": list(graph.param_leaves.paths),
        "state": list(graph.state_leaves.paths),
        "traces": [
            [relation.name, relation.op.name, relation.group, list(relation.slots)]
            for relation in graph.relations
        ],
    }


def _check_graph(path: Any, got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if got.get(name) != value:
            raise ValueError(
                f"{path}: got a checkpoint of another graph, whose {name} is "
                f"{got.get(name)!r}, expected {value!r}. Compile the model and the "
                "rule that it was written with."
            )


def _spec(checkpoint: Checkpoint) -> list[list[Any]]:
    leaves = named_leaves("checkpoint", _without_keys(checkpoint))
    return [
        [name, str(np.asarray(leaf).dtype), list(np.shape(leaf))]
        for name, leaf in leaves
    ]


def _check_leaves(path: Any, got: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(expected, got, strict=False):
        if ours != theirs:
            (name, dtype, shape), (other, kind, size) = ours, theirs
            raise ValueError(
                f"{path}: got {other} {kind}{size}, expected {name} {dtype}{shape}. "
                "Make `like` as the checkpoint was made: same optimiser, same sizes."
            )
    if len(got) != len(expected):
        raise ValueError(
            f"{path}: got {len(got)} leaves, expected {len(expected)}. Make `like` as "
            "the checkpoint was made: same optimiser, same sizes."
        )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Random keys as the numbers that they are made of."""
    return jtu.tree_map(
        lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree
    )


def _with_keys(leaf: Any, like: Any) -> Any:
    if not _is_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
