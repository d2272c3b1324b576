"""What learning will cost in memory, before anything is allocated."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._compile import compile
from ._drive import value_and_grad, window_length
from ._errors import CompileError, describe, is_array_like, sentence, size
from ._graph import ETraceGraph
from ._report import table
from ._rules import DRTRL, GlobalRule, LocalRule, name_of
from ._space import trace_bytes


@dataclasses.dataclass(frozen=True)
class TraceBytes:
    """The trace of one use of a weight.

    **Attributes:**

    - `weight`: the key paths of its params.
    - `group`: the number of the hidden group.
    - `rule`: its learning rule.
    - `bytes`: of all samples of a batch.

    !!! example

        ```python
        rows = eqx_etrace.plan(net, state, x, T=50).weights
        largest = max(rows, key=lambda row: row.bytes)
        ```
    """

    weight: str
    group: int
    rule: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What `plan` returns; `print` shows a table. All numbers are bytes.

    **Attributes:**

    - `weights`: per use of a weight its trace, a `TraceBytes`; none for a rule that
      follows the whole state.
    - `params`, `gradient`, `state`, `trace`: what goes in and comes out of a sequence.
    - `temporaries`: what XLA allocates on its own to run it by `value_and_grad`.
    - `bptt`: what it allocates for backpropagation through the same sequence.
    - `batch`, `steps`, `window`, `rule`: of what.

    !!! example

        ```python
        found = eqx_etrace.plan(net, state, x, T=1000, batch=32)
        assert found.online < found.bptt
        ```
    """

    weights: tuple[TraceBytes, ...]
    params: int
    gradient: int
    state: int
    trace: int
    temporaries: int
    bptt: int
    batch: int | None
    steps: int
    window: int
    rule: str

    @property
    def online(self) -> int:
        """Trace and temporaries: what takes the place of `bptt`."""
        return self.trace + self.temporaries

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings, lists and dicts, for JSON."""
        return dataclasses.asdict(self) | {"online": self.online}

    def __str__(self) -> str:
        batch = "unbatched" if self.batch is None else f"batch {self.batch}"
        head = f"{self.rule}, {batch}, {self.steps} steps, window {self.window}"
        traces = [
            (row.weight, str(row.group), row.rule, size(row.bytes))
            for row in self.weights
        ]
        names = "params", "gradient", "state", "trace", "temporaries", "online", "bptt"
        totals = [(name, size(getattr(self, name))) for name in names]
        lines = [head, ""]
        if traces:
            lines += [*table(("weight", "group", "rule", "trace"), traces), ""]
        return "\n".join([*lines, *table(("memory", "of all samples"), totals)])

    __repr__ = __str__


def plan(
    model: Any,
    state: PyTree,
    x: PyTree,
    rule: LocalRule | GlobalRule = DRTRL(),  # noqa: B008 a frozen module without arrays
    batch: int | None = None,
    T: int = 100,  # noqa: N803 the name that sequences have everywhere
    window: int | None = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    target: PyTree = None,
    **options: Any,
) -> MemoryPlan:
    """The memory of learning from a sequence, from shapes alone.

    Traces are counted; what XLA needs besides, and what backpropagation through time
    needs, are compiled for this machine and not run: a few seconds, and no memory of
    the size in question.

    **Arguments:**

    - `model`, `state`, `x`: as for `eqx_etrace.compile`, of one sample. Each may be a
      pytree of `jax.ShapeDtypeStruct`s: `eqx.filter_eval_shape(make_model, key)` gives
      a model that takes no memory.
    - `rule`: the learning rule.
    - `batch`: how many samples at once, None for an unbatched graph.
    - `T`: how many steps a sequence has.
    - `window`: as for `eqx_etrace.value_and_grad`; None is what that picks.
    - `loss_fn`, `target`: as for `value_and_grad`, and a target of one step, with the
      batch in front if there is one; left out, the sum of the squares of the outputs.
    - `options`: further ones of `compile`.

    **Returns:** a `MemoryPlan`.

    **Raises:** what `compile` raises; `ValueError` for sizes below 1.

    !!! example

        ```python
        print(eqx_etrace.plan(net, state, x, eqx_etrace.ESDRTRL(0.9), batch=32, T=500))
        ```
    """
    for name, number in (("T", T), ("batch", batch)):
        if not isinstance(number, int) or number < 1:
            if name == "T" or number is not None:
                raise ValueError(
                    f"{name}: got {number!r}, expected an integer of at least 1. It "
                    "is a number of " + ("steps." if name == "T" else "samples.")
                )
    model = jtu.tree_map(_light, model)
    state, x = (_specs(tree, batch) for tree in (state, x))
    graph = compile(model, state, x, rule, batched=batch is not None, **options)
    params = _specs(eqx.filter(model, graph.trainable.thaw()))
    per_step = _loss(loss_fn)
    targets = jtu.tree_map(lambda leaf: _spec(leaf, T), target)
    if target is None:
        targets = jax.ShapeDtypeStruct((T,), jnp.int32)
    data = params, state, jtu.tree_map(lambda leaf: _spec(leaf, T), x), targets
    traces = () if isinstance(graph.rule, GlobalRule) else _traces(graph)
    return MemoryPlan(
        traces,
        _bytes(params),
        _bytes(params),
        _bytes(state),
        (batch or 1) * trace_bytes(graph),
        _temporaries(_online(graph, per_step, window), *data),
        _temporaries(_through_time(graph, per_step), *data),
        batch,
        T,
        min(T, window_length(graph, window)),
        name_of(graph.rule),
    )


def _light(leaf: Any) -> Any:
    """Zeros without memory in place of a shape."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        got, expected = describe(leaf), "an array of numbers"
        raise CompileError(sentence("model", got, expected, "Make the key itself."))
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _spec(leaf: Any, *lead: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*lead, *jnp.shape(leaf)), jnp.result_type(leaf))


def _specs(tree: PyTree, batch: int | None = None) -> PyTree:
    lead = () if batch is None else (batch,)
    return jtu.tree_map(
        lambda leaf: (
            _spec(leaf, *lead)
            if is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)
            else leaf
        ),
        tree,
    )


def _bytes(tree: PyTree) -> int:
    leaves = jtu.tree_leaves(tree)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _traces(graph: ETraceGraph) -> tuple[TraceBytes, ...]:
    rule = graph.rule
    assert isinstance(rule, LocalRule)
    return tuple(
        TraceBytes(
            relation.name,
            relation.group,
            name_of(rule.of(relation)),
            (graph.batch or 1) * rule.trace_bytes(relation),
        )
        for relation in graph.relations
    )


def _loss(loss_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    def squares(out: PyTree, target: PyTree) -> Any:
        del target
        leaves = [leaf for leaf in jtu.tree_leaves(out) if eqx.is_inexact_array(leaf)]
        with jax.numpy_dtype_promotion("standard"):
            return sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in leaves)

    return squares if loss_fn is None else loss_fn


def _temporaries(fun: Callable[..., Any], *data: PyTree) -> int:
    analysis: Any = jax.jit(fun).lower(*data).compile().memory_analysis()
    return int(analysis.temp_size_in_bytes)


def _online(
    graph: ETraceGraph, loss_fn: Callable[..., Any], window: int | None
) -> Callable[..., Any]:
    drive = value_and_grad(graph, loss_fn, window=window)

    def run(params: PyTree, state: PyTree, xs: PyTree, targets: PyTree) -> Any:
        return drive(params, state, None, xs, targets)

    return run


def _through_time(
    graph: ETraceGraph, loss_fn: Callable[..., Any]
) -> Callable[..., Any]:
    """Loss and gradient of a sequence by reverse mode through a scan of the model."""
    options = graph.options
    assert options is not None  # Every compiled graph has them.

    def total(params: PyTree, state: PyTree, xs: PyTree, targets: PyTree) -> Any:
        model = graph.model(params)

        def one(x: PyTree, state: PyTree) -> Any:
            call = options.call
            return model(x, state) if call is None else call(model, x, state)

        def body(state: PyTree, now: Any) -> Any:
            x, target = now
            out, state = (one if graph.batch is None else jax.vmap(one))(x, state)
            return state, jnp.sum(loss_fn(out, target))

        state, losses = jax.lax.scan(body, state, (xs, targets))
        return jnp.sum(losses), state

    return jax.value_and_grad(total, has_aux=True)
