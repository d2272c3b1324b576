"""How online gradients lie to the exact one, as bars."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from .._compare import Alignment, GradientReport
from .._errors import describe, sentence
from ._axes import COLOURS, colour, points, put_legend, shorten, take_axes


# What is drawn of an `Alignment`, its label, and what the exact gradient has.
_VALUES = {
    "cosine": ("cosine with {}", 1.0),
    "norm_ratio": ("norm ratio to {}", 1.0),
    "sign_agreement": ("same sign as {}", 1.0),
    "relative_error": ("relative error to {}", 0.0),
}
_LONGEST = 40  # letters of a name


def alignment(
    report: GradientReport | Mapping[str, GradientReport],
    ax: Axes | Iterable[Axes] | None = None,
    *,
    values: Sequence[str] = ("cosine", "norm_ratio"),
) -> tuple[Axes, ...]:
    """Bars of cosine and norm ratio for every param, of one rule or of several.

    A dashed line is where the exact gradient is. A rule whose bars reach it for the
    readout and fall short for the recurrent weights has the right direction with a part
    of the credit missing; a param without a bar has a word in its place.

    **Arguments:**

    - `report`: what `eqx_etrace.compare_gradients` returns, or several of them by the
      name of a rule.
    - `ax`: one Axes for each of `values`; None makes a figure.
    - `values`: which attributes of an `eqx_etrace.Alignment` to draw: `"cosine"`,
      `"norm_ratio"`, `"sign_agreement"`, `"relative_error"`.

    **Returns:** a tuple of Axes, one for each of `values`. The last row is of all
    params as one vector. Where a number has no meaning it says "missing" (the online
    gradient is zero, the exact one is not), "zero" (both are) or "exact is zero".

    **Raises:** `ValueError` for no report, reports against different exact gradients or
    unknown values; `TypeError` for what is no report.

    !!! example

        ```python
        from eqx_etrace import plot

        found = eqx_etrace.compare_gradients(graph, params, state, xs, targets, loss_fn)
        cosines, norms = plot.alignment({"D-RTRL": found})
        ```
    """
    named = (
        report if isinstance(report, Mapping) else {getattr(report, "rule", ""): report}
    )
    _check(named, values)
    paths = list(dict.fromkeys(path for r in named.values() for path in r.leaves))
    rows = len(paths) + 1
    names = shorten([*paths, "total"], _LONGEST)
    wide = 0.4 + 0.08 * max(map(len, names)) + 2.4 * len(values)
    figsize = (wide, 1.2 + rows * max(0.24, 0.14 * len(named)))
    axes = take_axes(ax, len(values), ncols=len(values), figsize=figsize, sharey=True)
    against = next(iter(named.values())).against.upper()
    for axis, value in zip(axes, values, strict=True):
        low_high = [0.0, _VALUES[value][1]]
        for number, (name, one) in enumerate(named.items()):
            found = [one.leaves.get(path) for path in paths]
            bars = _Bars(number, len(named), name)
            low_high += _draw(axis, bars, [*found, one.total], value)
        _finish(axis, names, value, against, low_high)
    if isinstance(report, Mapping):
        columns = max(1, int(figsize[0] / (0.6 + 0.07 * max(map(len, named)))))
        put_legend(axes, ax is None, "upper center", ncols=columns)
    else:
        axes[0].set_title(str(report).splitlines()[0], loc="left", fontsize="medium")
    return axes


def _check(named: Mapping[str, Any], values: Sequence[str]) -> None:
    unknown = [value for value in values if value not in _VALUES]
    if unknown or not values or isinstance(values, str):
        expected = f"a sequence of names out of {', '.join(_VALUES)}"
        remedy = 'For one of them: values=("cosine",).'
        raise ValueError(sentence("values", repr(values), expected, remedy))
    for name, one in named.items():
        if not isinstance(one, GradientReport):
            remedy = "It is what `compare_gradients` returns."
            expected = "a `GradientReport`"
            raise TypeError(
                sentence(f"report {name!r}", describe(one), expected, remedy)
            )
    against = sorted({report.against for report in named.values()})
    if len(against) != 1:
        got = f"reports against {' and '.join(against)}" if against else "no report"
        expected = "one or more against the same exact gradient"
        remedy = "Pass what `compare_gradients` returns."
        raise ValueError(sentence("report", got, expected, remedy))


class _Bars(NamedTuple):
    """Those of one report: the how many-th of how many, and its name."""

    number: int
    of: int
    name: str


def _draw(
    axis: Axes, bars: _Bars, found: Sequence[Alignment | None], value: str
) -> list[float]:
    """The bars of one report; what they reach."""
    thick = 0.8 / bars.of
    rows = np.arange(len(found)) - 0.4 + thick * (bars.number + 0.5)
    sizes = [math.nan if row is None else getattr(row, value) for row in found]
    drawn = [size if math.isfinite(size) else 0.0 for size in sizes]
    style: dict[str, Any] = {"color": colour(bars.number), "label": bars.name}
    if bars.number >= len(COLOURS):
        style["hatch"] = "///"
    axis.barh(rows, drawn, thick, **style)
    font = min(8.0, 0.9 * thick * points(axis)[1] / len(found))
    for row, size, one in zip(rows, sizes, found, strict=True):
        text = f"{size:.3g}" if math.isfinite(size) else _note(one)
        # In a column at the right edge, where no bar goes.
        where = {"transform": axis.get_yaxis_transform(), "ha": "right"}
        axis.text(0.99, row, text, fontsize=max(2.0, font), va="center", **where)
    return drawn


def _note(found: Alignment | None) -> str:
    if found is None:
        return "not in it"
    if found.zero:
        return "missing" if found.missing else "zero"
    return "exact is zero" if math.isnan(found.sign_agreement) else "not finite"


def _finish(
    axis: Axes, names: list[str], value: str, against: str, reached: list[float]
) -> None:
    label, exact = _VALUES[value]
    low, high = min(reached), max(reached)
    numbers = 36 / max(64.0, points(axis)[0])  # Their column's share of the width.
    space = 0.05 * (high - low)
    right = high + space + numbers * (high - low + 2 * space) / (1 - numbers)
    axis.set_xlim(low - (space if low < 0 else 0.0), right)
    axis.axvline(exact, color="0.5", linestyle="--", linewidth=1, zorder=0)
    axis.set_xlabel(label.format(against), fontsize="small")
    font = min(9.0, max(3.0, 0.8 * points(axis)[1] / len(names)))
    axis.set_yticks(range(len(names)), names, fontsize=font)
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.axhline(len(names) - 1.5, color="0.5", linewidth=0.5)
