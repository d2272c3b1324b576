"""Memory and time against the length of the sequence."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from .._plan import MemoryPlan
from ._axes import colour, line_style, put_legend, take_axes


# What a row may hold, its label and its unit.
_VALUES = {"memory": ("memory", "B"), "time": ("time per step", "s")}
_MARKERS = "o", "s", "^", "D", "v", "P", "X"
_Points = dict[str, dict[str, dict[float, float]]]


def scaling(
    rows: Iterable[Mapping[str, Any] | MemoryPlan],
    ax: Axes | Iterable[Axes] | None = None,
) -> tuple[Axes, ...]:
    """Memory and time of learning methods against the number of steps, log-log.

    Backpropagation through time rises with the length of the sequence, by a straight
    line of slope one; what keeps nothing of the past stays flat.

    **Arguments:**

    - `rows`: in any order. A row is a mapping with `"method"`, a name, `"steps"`, the
      length of the sequence, and `"memory"` in bytes or `"time"` in seconds per step,
      or both; None is left out, and so is anything else in it. What `eqx_etrace.plan`
      returns stands for two rows, of its rule and of BPTT.
    - `ax`: one Axes for memory and one for time, or only for what there is; None makes
      a figure.

    **Returns:** a tuple of Axes, one for each of memory and time that there is.

    **Raises:** `ValueError` for rows that lack something, numbers that are not above
    zero, and two different numbers for the same method and length; `TypeError` for what
    is no row.

    !!! example

        ```python
        from eqx_etrace import plot

        plans = [eqx_etrace.plan(net, state, x, T=T) for T in (50, 500)]
        (memory,) = plot.scaling(plans)
        ```
    """
    found = _read(rows)
    panels = {value: methods for value, methods in found.items() if methods}
    if not panels:
        raise ValueError(
            "rows: got nothing to draw, expected rows with `memory` or `time`. Pass "
            "what was measured, or what `eqx_etrace.plan` returns."
        )
    figsize = (2.4 + 2.9 * len(panels), 3.0)
    axes = take_axes(ax, len(panels), ncols=len(panels), figsize=figsize)
    # A method has one colour in all panels.
    order = list(dict.fromkeys(name for m in found.values() for name in m))
    for axis, (value, methods) in zip(axes, panels.items(), strict=True):
        for name, numbers in methods.items():
            _line(axis, name, order.index(name), dict(sorted(numbers.items())))
        _finish(axis, value, methods)
    put_legend(axes, ax is None, "right upper")
    return axes


def _rows(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Plain rows, and how to call each in a message."""
    for number, row in enumerate(rows):
        if isinstance(row, MemoryPlan):
            for method, memory in ((row.rule, row.online), ("BPTT", row.bptt)):
                made = {"method": method, "steps": row.steps, "memory": memory}
                yield f"rows[{number}], {method}", made
        else:
            yield f"rows[{number}]", row


def _read(rows: Iterable[Any]) -> _Points:
    found: _Points = {value: {} for value in _VALUES}
    for where, row in _rows(rows):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"{where}: got {row!r}, expected a mapping or what `eqx_etrace.plan` "
                "returns. Pass a list of rows."
            )
        told = [value for value in _VALUES if row.get(value) is not None]
        if "method" not in row or "steps" not in row or not told:
            raise ValueError(
                f"{where}: got the keys {', '.join(map(repr, row)) or '(none)'}, "
                "expected 'method', 'steps', and 'memory' or 'time'. A row is one "
                "method at one length."
            )
        method, steps = str(row["method"]), _number(where, "steps", row["steps"])
        for value in told:
            number = _number(where, value, row[value])
            known = found[value].setdefault(method, {}).setdefault(steps, number)
            if known != number:
                raise ValueError(
                    f"{where}: got {value} = {number:g} for {method!r} at {steps:g} "
                    f"steps, expected the {known:g} of a row before. Give different "
                    "measurements different names."
                )
    return found


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(
            f"{where}: got {name} = {value!r}, expected a finite number above 0. The "
            "axes are logarithmic; leave out what has none."
        )
    return number


def _line(axis: Axes, name: str, number: int, numbers: dict[float, float]) -> None:
    axis.plot(
        list(numbers),
        list(numbers.values()),
        color=colour(number),
        linestyle=line_style(number),
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        label=name,
    )


def _finish(axis: Axes, value: str, methods: dict[str, dict[float, float]]) -> None:
    label, unit = _VALUES[value]
    numbers = [number for points in methods.values() for number in points.values()]
    low, high = min(numbers) / 1.5, max(numbers) * 1.5
    # A decade at least: what is nearly the same shall look so.
    wider = max(1.0, math.sqrt(10 * low / high))
    axis.set(xscale="log", yscale="log", ylim=(low / wider, high * wider))
    axis.set(xlabel="steps", ylabel=label)
    lengths = sorted({steps for points in methods.values() for steps in points})
    if len(lengths) <= 8:
        axis.set_xticks(lengths, [f"{steps:g}" for steps in lengths])
    axis.yaxis.set_major_formatter(EngFormatter(unit=unit))
    if high / low < 1000:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
