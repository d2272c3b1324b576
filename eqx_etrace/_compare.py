"""How far an online gradient is from the exact one, leaf by leaf."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._compile import compile
from ._drive import HORIZON, value_and_grad
from ._graph import ETraceGraph
from ._inputs import read_inputs, unwrap
from ._report import table
from ._rules import RTRL, name_of


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How one gradient lies to the exact one; NaN where that has no meaning.

    **Attributes:**

    - `size`: of how many numbers they are made; a complex one counts twice.
    - `cosine`: of the angle between them; NaN if one of them is zero.
    - `norm_ratio`: the norm of the online gradient over that of the exact one.
    - `sign_agreement`: the share of numbers of one sign in both, where the exact one is
      not zero.
    - `relative_error`: the norm of their difference over that of the exact one.
    - `zero`: whether the online gradient is zero.
    - `missing`: whether it is zero and the exact one is not.

    !!! example

        ```python
        found = eqx_etrace.compare_gradients(graph, params, state, xs, targets, loss_fn)
        assert found.leaves["cell.weight_hh"].norm_ratio < 1
        ```
    """

    size: int
    cosine: float
    norm_ratio: float
    sign_agreement: float
    relative_error: float
    zero: bool
    missing: bool


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What `compare_gradients` found; `print` shows a table.

    **Attributes:**

    - `leaves`: per key path of a param its `Alignment`.
    - `total`: that of all of them, as one vector.
    - `rule`, `against`, `window`, `steps`: of what, and over how many steps.

    !!! example

        ```python
        found = eqx_etrace.compare_gradients(graph, params, state, xs, targets, loss_fn)
        assert found.total.cosine > 0.5 and not found.missing
        ```
    """

    leaves: dict[str, Alignment]
    total: Alignment
    rule: str
    against: str
    window: int | None
    steps: int

    @property
    def zero(self) -> tuple[str, ...]:
        """The params whose online gradient is zero."""
        return tuple(path for path, row in self.leaves.items() if row.zero)

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of them whose exact gradient is not."""
        return tuple(path for path, row in self.leaves.items() if row.missing)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers, strings and dicts, for JSON."""
        plain = dataclasses.asdict(self)
        return plain | {"zero": list(self.zero), "missing": list(self.missing)}

    def __str__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        head = f"{self.rule} against {self.against.upper()}, {self.steps} steps{window}"
        columns = "param", "size", "cosine", "norm ratio", "same sign", "rel. error"
        rows = [_row(*pair) for pair in (*self.leaves.items(), ("total", self.total))]
        lines = [head, "", *table((*columns, ""), rows)]
        return "\n".join(lines)

    __repr__ = __str__


def _row(path: str, found: Alignment) -> tuple[str, ...]:
    note = "missing" if found.missing else ("zero" if found.zero else "")
    numbers = (
        found.cosine,
        found.norm_ratio,
        found.sign_agreement,
        found.relative_error,
    )
    texts = ("-" if math.isnan(number) else f"{number:.3g}" for number in numbers)
    return path, str(found.size), *texts, note


def compare_gradients(
    graph: ETraceGraph,
    params: PyTree,
    state: PyTree,
    xs: PyTree,
    targets: PyTree,
    loss_fn: Callable[..., Any],
    *,
    against: str = "bptt",
    window: int | None = None,
    float64: bool = False,
    **options: Any,
) -> GradientReport:
    """The gradient of a graph's rule next to the exact one, of one sequence.

    The first thing to look at when online learning does not do what backpropagation
    does: which weights get another gradient, how much of it, and which get none.

    **Arguments:**

    - `graph`, `params`, `state`: as for `eqx_etrace.step`.
    - `xs`, `targets`, `loss_fn`: as for `eqx_etrace.value_and_grad`; a few dozen steps
      are enough.
    - `against`: `"bptt"`, backpropagation through all of the sequence, or `"rtrl"`, the
      same gradient forward in time, with another rounding and a trace of hidden state
      x weights.
    - `window`: that of the online gradient. For `vjp="multi-step"` it is the horizon of
      exact credit; None takes a quarter of the sequence, 32 at most, so that the trace
      has something to say.
    - `float64`: whether to compile the model again and compare in double precision. A
      model that fixes a narrower dtype inside says so.
    - `options`: `mask`, `reset`, `initial` and `signal`, as for the function that
      `value_and_grad` returns.

    **Returns:** a `GradientReport`. Params that make the learning signal itself
    (`AdaptiveFeedback`, `DNI`) are left out: they follow no gradient of the loss.

    **Raises:** `ValueError` that names the argument.

    !!! example

        ```python
        print(eqx_etrace.compare_gradients(graph, params, state, xs, targets, loss_fn))
        ```
    """
    if against not in ("bptt", "rtrl"):
        raise ValueError(
            f"against: got {against!r}, expected 'bptt' or 'rtrl'. Both are exact."
        )
    if float64:
        with jax.enable_x64(True):
            data = _doubled((params, state, xs, targets))
            graph, options = _compiled_again(graph, *data[:3]), _doubled(options)
            return _compared(graph, data, loss_fn, against, window, options)
    data = params, state, xs, targets
    return _compared(graph, data, loss_fn, against, window, options)


def _compared(
    graph: ETraceGraph,
    data: tuple[PyTree, PyTree, PyTree, PyTree],
    loss_fn: Callable[..., Any],
    against: str,
    window: int | None,
    options: dict[str, Any],
) -> GradientReport:
    params, state, xs, targets = data
    steps = read_inputs(graph, xs, ("targets", targets)).steps
    if window is None and graph.vjp == "multi-step":
        window = max(1, min(HORIZON, steps // 4))
    exact = dataclasses.replace(
        graph, rule=RTRL(), vjp="multi-step", exits=None, learned=()
    )
    whole = steps if against == "bptt" else 1
    signal = options.pop("signal", None)

    @jax.jit
    def both(*args: Any, **options: Any) -> Any:
        online = value_and_grad(graph, loss_fn, window=window)
        truth = value_and_grad(exact, loss_fn, window=whole)
        found = online(*args, **options, signal=signal)[1]
        return found, truth(*args, **options)[1]

    found, truth = both(params, state, None, xs, targets, **options)
    pairs = zip(jtu.tree_leaves(found), jtu.tree_leaves(truth), strict=True)
    own = {graph.program.inputs.index(ref) for ref in graph.learned}
    vectors = {
        graph.param_leaves.paths[number]: tuple(map(_vector, pair))
        for number, pair in enumerate(pairs)
        if number not in own
    }
    total = (np.concatenate(parts) for parts in zip(*vectors.values(), strict=True))
    return GradientReport(
        {path: _alignment(*pair) for path, pair in vectors.items()},
        _alignment(*total),
        name_of(graph.rule),
        against,
        window,
        steps,
    )


def _vector(leaf: Any) -> Any:
    """All real numbers of a leaf, in double precision."""
    array: Any = np.asarray(leaf).reshape(-1)
    parts = [array.real, array.imag] if np.iscomplexobj(array) else [array]
    return np.concatenate(parts).astype(np.float64)


def _alignment(found: Any, truth: Any) -> Alignment:
    size, length = np.linalg.norm(found), np.linalg.norm(truth)
    moves = truth != 0
    agree = np.sign(found[moves]) == np.sign(truth[moves])

    def over(value: Any, by: Any) -> float:
        return float(value / by) if by > 0 else math.nan

    return Alignment(
        found.size,
        over(found @ truth, size * length),
        over(size, length),
        over(agree.sum(), agree.size),
        over(np.linalg.norm(found - truth), length),
        not found.any(),
        bool(not found.any() and truth.any()),
    )


def _doubled(tree: PyTree) -> PyTree:
    """Floating-point and complex leaves in double precision."""

    def double(leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf):
            return leaf
        wide = jnp.complex128 if jnp.iscomplexobj(leaf) else jnp.float64
        return leaf.astype(wide)

    return jtu.tree_map(double, tree)


def _compiled_again(
    graph: ETraceGraph, params: PyTree, state: PyTree, xs: PyTree
) -> ETraceGraph:
    """The graph of the same model in double precision."""
    options = graph.options
    assert options is not None  # Every compiled graph has them.
    fixed, rule = _doubled((graph.fixed, graph.rule))
    model = eqx.combine(params, fixed, graph.static.thaw())
    return compile(
        model,
        state,
        _of_one_step(xs),
        rule,
        call=options.call,
        trainable=graph.trainable.thaw(),
        batched=graph.batch is not None,
        vjp=graph.vjp,  # pyright: ignore[reportArgumentType] a str, for static fields
        max_unroll=options.max_unroll,
        max_slots=options.max_slots,
        op_rules=dict(options.op_rules),
    )


def _of_one_step(xs: PyTree) -> PyTree:
    """Shapes and dtypes of the input of one step."""
    plain, moving = unwrap(xs)
    leaves, treedef = jtu.tree_flatten(plain)
    specs: Sequence[Any] = [
        jax.ShapeDtypeStruct(leaf.shape[1:] if moves else leaf.shape, leaf.dtype)
        for leaf, moves in zip(leaves, moving, strict=True)
    ]
    return jtu.tree_unflatten(treedef, specs)
