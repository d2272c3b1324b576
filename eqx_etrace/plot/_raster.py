"""Spikes over time, with membranes and traces below."""

from collections.abc import Iterable
from typing import Any, overload

import numpy as np
from jaxtyping import ArrayLike
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ._axes import colour, points, positive, read, take_axes


@overload
def raster(
    spikes: ArrayLike,
    *,
    threshold: None = None,
    dt: float | None = None,
    unit: str = "ms",
    ax: Axes | Iterable[Axes] | None = None,
) -> Axes: ...


@overload
def raster(
    spikes: ArrayLike,
    *,
    membrane: ArrayLike | None = None,
    trace: ArrayLike | None = None,
    threshold: float | None = None,
    dt: float | None = None,
    unit: str = "ms",
    ax: Axes | Iterable[Axes] | None = None,
) -> tuple[Axes, ...]: ...


def raster(
    spikes: Any,
    *,
    membrane: Any = None,
    trace: Any = None,
    threshold: float | None = None,
    dt: float | None = None,
    unit: str = "ms",
    ax: Any = None,
) -> Any:
    """Spikes as ticks, unit by unit, with a membrane and a trace on the same time axis.

    The first look at a spiking network: which units fire, which are silent, whether all
    fire at once.

    **Arguments:**

    - `spikes`: (T, units) of one sample. Every number that is not zero is a spike; one
      below zero gets another colour.
    - `membrane`, `trace`: (T,) or (T, few), for one panel each below the spikes.
    - `threshold`: a dashed line in the panel of the membrane.
    - `dt`: the length of a step: step t is drawn at t x `dt`. None counts steps.
    - `unit`: that of `dt`.
    - `ax`: the Axes, as many as there are panels; None makes a figure.

    **Returns:** the Axes of the spikes; if there are more panels, a tuple of Axes from
    top to bottom.

    **Raises:** `ValueError` for another rank, another number of steps, no step, or
    numbers that are not finite.

    !!! example

        ```python
        from eqx_etrace import plot

        neuron = nn.LIF(20)
        drive = 2 * jax.random.uniform(key, (100, 20))

        def body(state, x):
            spikes, state = neuron(x, state)
            return state, (spikes, state.v)

        _, (spikes, v) = jax.lax.scan(body, neuron.init_state(), drive)
        plot.raster(spikes, membrane=v[:, 0], threshold=1.0, dt=neuron.dt)
        ```
    """
    shapes = ["(T, units)"]
    spikes = read("spikes", spikes, shapes, "Take one sample: spikes[:, sample].")
    steps = len(spikes)
    lines = {
        name: _lines(name, value, steps)
        for name, value in (("membrane", membrane), ("trace", trace))
        if value is not None
    }
    if threshold is not None:
        read("threshold", threshold, ["()"], "It is one number.")
        if "membrane" not in lines:
            raise ValueError(
                f"threshold: got {threshold} without a membrane, expected both. Pass "
                "`membrane=`, in whose panel it is drawn."
            )
    scale = 1.0 if dt is None else positive("dt", dt, "It is the length of a step.")
    axes = take_axes(
        ax,
        1 + len(lines),
        nrows=1 + len(lines),
        figsize=(6.4, 2.4 + 1.3 * len(lines)),
        sharex=True,
        height_ratios=(2, *(1 for _ in lines)),
    )
    time = scale * np.arange(steps)
    for axis in axes:
        axis.set_xlim(time[0] - scale / 2, time[-1] + scale / 2)
    _ticks(axes[0], time, spikes)
    for axis, (name, curves) in zip(axes[1:], lines.items(), strict=True):
        _curves(axis, time, curves, name)
        if name == "membrane" and threshold is not None:
            axis.axhline(threshold, color="0.5", linestyle="--", linewidth=1)
    axes[-1].set_xlabel("step" if dt is None else f"time ({unit})")
    if dt is None:
        axes[-1].xaxis.set_major_locator(_whole())
    return axes if lines else axes[0]


def _lines(name: str, value: Any, steps: int) -> np.ndarray:
    remedy = f"Take a few units of one sample: {name}[:, :3]."
    array = read(name, value, ["(T,)", "(T, few)"], remedy)
    if len(array) != steps:
        raise ValueError(
            f"{name}: got {len(array)} steps, expected {steps}, as many as of `spikes`."
            " Take both from the same run, time first."
        )
    return array.reshape(steps, -1)


def _ticks(axis: Axes, time: Any, spikes: np.ndarray) -> None:
    steps, units = spikes.shape
    width, height = points(axis)
    at, unit = np.nonzero(spikes)
    # However many units and steps there are, a tick stays visible and alone.
    half = max(0.4, 0.6 * units / height)
    line = min(1.5, max(0.5, 0.8 * width / steps))
    colours = [colour(0 if number > 0 else 1) for number in spikes[at, unit]]
    if len(at):
        axis.vlines(time[at], unit - half, unit + half, colors=colours, linewidth=line)
    else:
        where = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "no spikes", **where)
    axis.set(ylabel="unit", ylim=(-0.5, units - 0.5))
    axis.yaxis.set_major_locator(_whole())


def _whole() -> MaxNLocator:
    """Ticks at whole numbers, be it a single one."""
    return MaxNLocator(nbins="auto", integer=True, min_n_ticks=1)


def _curves(axis: Axes, time: Any, curves: Any, name: str) -> None:
    marker = "." if len(time) == 1 else None
    for number, curve in enumerate(curves.T):
        axis.plot(time, curve, color=colour(number), linewidth=1, marker=marker)
    axis.set_ylabel(name)
