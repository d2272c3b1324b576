"""What all figures share: the Axes to draw in, colours, and how much room there is."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from .._errors import describe, sentence


# Okabe and Ito, "Color universal design", 2008: told apart with any colour vision.
# Their yellow and black are left out, which are lost on white and on dark paper.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F"


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def line_style(number: int) -> str:
    """Another one when the colours begin anew."""
    return ("-", "--", ":")[number // len(COLOURS) % 3]


def take_axes(ax: Any, panels: int, **figure: Any) -> tuple[Axes, ...]:
    """The Axes given, one or several, or those of a new figure."""
    if ax is None:
        # Here and nowhere else: pyplot keeps every figure that it makes.
        import matplotlib.pyplot as plt

        made = plt.subplots(squeeze=False, layout="constrained", **figure)[1]
        return tuple(made.flat)
    given = tuple(np.asarray(ax, dtype=object).flat)
    if len(given) != panels or not all(isinstance(axis, Axes) for axis in given):
        kinds = ", ".join(sorted({type(axis).__name__ for axis in given}))
        expected = "one Axes" if panels == 1 else f"{panels} Axes, one for each panel"
        remedy = "Leave it out for a new figure."
        raise ValueError(sentence("ax", f"{len(given)} ({kinds})", expected, remedy))
    return given


def put_legend(axes: Sequence[Axes], own: bool, where: str, **options: Any) -> None:
    """Outside of the panels in a figure of our own, else inside of the first."""
    options = {"fontsize": "small", "frameon": False} | options
    if own:
        figure: Any = axes[0].figure
        named = axes[0].get_legend_handles_labels()
        figure.legend(*named, loc=f"outside {where}", **options)
    else:
        axes[0].legend(fontsize="small")


def points(axis: Axes) -> tuple[float, float]:
    """Width and height of the Axes in points, in which fonts are measured."""
    figure: Any = axis.figure
    box = axis.get_window_extent()
    return box.width * 72 / figure.dpi, box.height * 72 / figure.dpi


def read(name: str, value: Any, shapes: Sequence[str], remedy: str) -> np.ndarray:
    """A real array without NaN, of one of the shapes such as `(T, units)`."""
    array = np.asarray(value)
    ranks = [len(shape.replace(",", " ").strip("( )").split()) for shape in shapes]
    expected = f"a real array of shape {' or '.join(shapes)}, not empty"
    real = jnp.isdtype(array.dtype, ("bool", "integral", "real floating"))
    if not real or array.ndim not in ranks or array.size == 0:
        got = describe(value) if real else f"{array.dtype}{list(array.shape)}"
        raise ValueError(sentence(name, got, expected, remedy))
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        where = tuple(map(int, np.argwhere(~np.isfinite(array))[0]))
        got = f"{array[where]} at {list(where)}"
        remedy = "Look for where it comes from before you draw it."
        raise ValueError(sentence(name, got, "finite numbers", remedy))
    return array


def positive(name: str, number: Any, remedy: str) -> float:
    plain = isinstance(number, int | float | np.number) and not isinstance(number, bool)
    if not plain or not np.isfinite(number) or number <= 0:
        raise ValueError(
            sentence(name, repr(number), "a finite number above 0", remedy)
        )
    return float(number)


def shorten(texts: Sequence[str], length: int) -> list[str]:
    """Long texts without their middle, as long as they still differ."""
    half = (length - 1) // 2
    short = [t if len(t) <= length else f"{t[:half]}…{t[-half:]}" for t in texts]
    return short if len(set(short)) == len(set(texts)) else list(texts)
