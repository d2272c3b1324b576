"""Surrogate derivatives of spikes."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from .. import nn
from .._errors import sentence
from ._axes import colour, line_style, positive, put_legend, shorten, take_axes


def surrogates(
    *surrogates: Callable[[Any], Any], ax: Axes | None = None, span: float = 2.0
) -> Axes:
    """Surrogate derivatives around the threshold, over the step of the spike in grey.

    How wide they are next to the fluctuations of the membrane decides how many neurons
    learn; how high they are, what becomes of a gradient that flows through many spikes.

    **Arguments:**

    - `surrogates`: spike functions of `eqx_etrace.nn`, or any function of one number
      with a derivative.
    - `ax`: the Axes; None makes a figure.
    - `span`: how far from the threshold to either side, in the units of the membrane.

    **Returns:** the Axes. What differs from the defaults is in the names.

    **Raises:** `TypeError` for what is no function, `ValueError` for nothing to draw or
    a derivative that is not finite.

    !!! example

        ```python
        from eqx_etrace import plot

        plot.surrogates(nn.triangle(), nn.superspike(slope=10.0), nn.gaussian())
        ```
    """
    for number, spike in enumerate(surrogates):
        if not callable(spike):
            expected = "a spike function such as nn.superspike()"
            got, remedy = repr(spike), "Call what makes it."
            raise TypeError(sentence(f"surrogates[{number}]", got, expected, remedy))
    if not surrogates:
        raise ValueError(
            "surrogates: got none, expected one or more. Pass some, such as "
            "nn.superspike()."
        )
    span = positive("span", span, "It is in the units of the membrane.")
    x = jnp.asarray(np.linspace(-span, span, 801))  # With its zero in the middle.
    slopes = [_slope(spike, x) for spike in surrogates]
    (axis,) = take_axes(ax, 1, figsize=(4.4 if len(surrogates) == 1 else 6.4, 3.2))
    axis.step(x, np.asarray(surrogates[0](x)), color="0.75", linewidth=1, label="spike")
    names = shorten([_name(spike) for spike in surrogates], 36)
    for number, (name, slope) in enumerate(zip(names, slopes, strict=True)):
        style = line_style(number)
        axis.plot(x, slope, color=colour(number), linestyle=style, label=name)
    axis.set(xlabel="membrane - threshold", ylabel="spike, surrogate derivative")
    if len(names) == 1:
        axis.set_title(names[0], fontsize="medium")
    else:
        put_legend([axis], ax is None, "right upper")
    return axis


def _slope(spike: Callable[[Any], Any], x: jax.Array) -> np.ndarray:
    slope = np.asarray(jax.vmap(jax.grad(spike))(x), np.float64)
    if not np.isfinite(slope).all():
        first = int(np.flatnonzero(~np.isfinite(slope))[0])
        raise ValueError(
            f"surrogates: got a derivative {slope[first]} of {_name(spike)} at "
            f"{float(x[first]):g}, expected finite numbers. Look at its function there."
        )
    return slope


def _name(spike: Callable[[Any], Any]) -> str:
    """As one would write it, without what is the default."""
    if not isinstance(spike, nn.Surrogate):
        return getattr(spike, "__name__", type(spike).__name__)
    derivative = spike.derivative
    name = getattr(derivative, "__name__", type(derivative).__name__).lstrip("_")
    defaults = {}
    if getattr(derivative, "__module__", "") == nn.Surrogate.__module__:
        defaults = inspect.signature(getattr(nn, name)).parameters
    told = [
        f"{option}={value:g}"
        for option, value in spike.options
        if option not in defaults or defaults[option].default != value
    ]
    return f"{name}({', '.join(told)})"
