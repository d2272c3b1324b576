r"""Spikes: a step forward, and a smooth function for its derivative.

A spike is $z = H(x)$, with x how far the membrane is above its threshold. The
derivative of H is zero wherever it exists; a surrogate puts $\sigma(x)$ in its place.
"""

import dataclasses
import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """A spike function: 1 where its input is above zero, 0 elsewhere.

    Made by `surrogate` or by one of the functions named after a derivative. Two with
    the same derivative and options are equal and have the same hash, so that modules
    that hold them are compiled once.

    **Arguments:**

    - `derivative`: a function of one number, and of the options by name.
    - `options`: names and values of the options.

    **Returns:** (when called) an array like its input, of the same dtype.

    !!! example

        ```python
        spike = nn.superspike(slope=10.0)
        assert spike == nn.superspike(slope=10.0)
        spikes = spike(jnp.array([-0.2, 0.3]))
        slopes = spike.slope(jnp.array([-0.2, 0.3]))
        ```
    """

    derivative: Callable[..., Any]
    options: tuple[tuple[str, float], ...] = ()

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return _step(self, x)

    def slope(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The surrogate derivative at x."""
        # Whatever the derivative does, it sees one number: it cannot mix neurons.
        of_one = jnp.vectorize(lambda x: self.derivative(x, **dict(self.options)))
        return of_one(x).astype(x.dtype)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        name = getattr(self.derivative, "__name__", repr(self.derivative))
        return f"Surrogate({', '.join([name.lstrip('_'), options]).rstrip(', ')})"


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _step(spike: Surrogate, x: Array) -> Array:
    del spike
    return (x > 0).astype(x.dtype)


@_step.defjvp
def _step_jvp(
    spike: Surrogate, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return _step(spike, x), spike.slope(x) * dx


def surrogate(derivative: Callable[..., Any], **options: float) -> Surrogate:
    """A spike function with a surrogate derivative of your own.

    **Arguments:**

    - `derivative`: a function of one number (an array of shape `()`), and of the
      options by keyword. It is mapped over neurons.
    - `options`: numbers, such as a width.

    **Returns:** a `Surrogate`. Two are equal if function and options are: define the
    function once, at module level.

    **Raises:** `TypeError` for a derivative that cannot be called, `ValueError` for one
    that does not give one number for one number.

    !!! example

        ```python
        def bump(x, width):
            return jnp.exp(-jnp.abs(x) / width)

        spike = nn.surrogate(bump, width=0.5)
        neuron = nn.LIF(4, spike=spike)
        ```
    """
    if not callable(derivative):
        raise TypeError(
            f"surrogate: got {derivative!r}, expected a function of one number. Pass "
            "the derivative that is to replace that of the step."
        )
    spike = Surrogate(derivative, tuple(sorted(options.items())))
    found = jax.eval_shape(lambda x: derivative(x, **options), jnp.zeros(()))
    if getattr(found, "shape", None) != ():
        raise ValueError(
            f"surrogate: got a derivative that gives {found}, expected one number for "
            "one number. Write it for an array of shape (); it is mapped over neurons."
        )
    return spike


def _built_in(derivative: Callable[..., Any], **options: float) -> Surrogate:
    """Widths and slopes are above zero, all numbers finite."""
    for name, value in options.items():
        above = name in ("width", "slope", "sigma", "spread")
        if not math.isfinite(value) or (above and value <= 0):
            expected = "a number above 0" if above else "a finite number"
            raise ValueError(
                f"{derivative.__name__.lstrip('_')}: got {name} = {value}, expected "
                f"{expected}. It is in the units of the membrane potential or their "
                "inverse."
            )
    numbers = sorted((name, float(value)) for name, value in options.items())
    return Surrogate(derivative, tuple(numbers))


def _triangle(x: Array, width: float, scale: float) -> Array:
    return scale * jnp.maximum(0.0, 1 - jnp.abs(x) / width)


def triangle(width: float = 1.0, scale: float = 0.3) -> Surrogate:
    r"""$\sigma(x) = \text{scale} \cdot \max(0, 1 - |x| / \text{width})$.

    **Arguments:**

    - `width`: where it reaches zero, in the units of x.
    - `scale`: its value at the threshold; it damps what flows through many steps.

    **Returns:** a `Surrogate`.

    **Source:** Bellec et al., *Long short-term memory and learning-to-learn in networks
    of spiking neurons*, NeurIPS 2018.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.triangle(width=0.5))
        ```
    """
    return _built_in(_triangle, width=width, scale=scale)


def _sigmoid(x: Array, slope: float, scale: float) -> Array:
    s = jax.nn.sigmoid(slope * x)
    return scale * slope * s * (1 - s)


def sigmoid(slope: float = 25.0, scale: float = 1.0) -> Surrogate:
    r"""$\sigma(x) = \text{scale} \cdot k\,s\,(1 - s)$ with $s = 1/(1 + e^{-kx})$.

    **Arguments:**

    - `slope`: k, in the inverse units of x. The value at the threshold is k/4.
    - `scale`: a factor.

    **Returns:** a `Surrogate`.

    **Source:** Zenke and Vogels, *The remarkable robustness of surrogate gradient
    learning for instilling complex function in spiking neural networks*, Neural
    Computation 33, 2021.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.sigmoid(slope=4.0))
        ```
    """
    return _built_in(_sigmoid, slope=slope, scale=scale)


def _arctan(x: Array, slope: float, scale: float) -> Array:
    return scale * slope / 2 / (1 + (math.pi * slope * x / 2) ** 2)


def arctan(slope: float = 2.0, scale: float = 1.0) -> Surrogate:
    r"""$\sigma(x) = \text{scale} \cdot \frac{k}{2} / (1 + (\pi k x / 2)^2)$.

    **Arguments:**

    - `slope`: k, in the inverse units of x. The value at the threshold is k/2.
    - `scale`: a factor.

    **Returns:** a `Surrogate`.

    **Source:** Fang et al., *Incorporating learnable membrane time constant to enhance
    learning of spiking neural networks*, ICCV 2021.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.arctan())
        ```
    """
    return _built_in(_arctan, slope=slope, scale=scale)


def _relu_grad(x: Array, width: float, scale: float) -> Array:
    return scale * jnp.maximum(0.0, width - jnp.abs(x))


def relu_grad(width: float = 1.0, scale: float = 0.3) -> Surrogate:
    r"""$\sigma(x) = \text{scale} \cdot \max(0, \text{width} - |x|)$.

    A triangle whose sides keep their slope when it gets wider; see `triangle` for one
    that keeps its height, `boxcar` for a constant.

    **Arguments:**

    - `width`: where it reaches zero, in the units of x.
    - `scale`: the slope of its sides.

    **Returns:** a `Surrogate`.

    **Source:** Neftci, Mostafa and Zenke, *Surrogate gradient learning in spiking
    neural networks*, IEEE Signal Processing Magazine 36, 2019.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.relu_grad(width=0.5))
        ```
    """
    return _built_in(_relu_grad, width=width, scale=scale)


def _boxcar(x: Array, width: float, scale: float) -> Array:
    inside = (jnp.abs(x) < width / 2).astype(x.dtype)
    return scale / width * inside


def boxcar(width: float = 1.0, scale: float = 1.0) -> Surrogate:
    r"""$\sigma(x) = \text{scale} / \text{width}$ where $|x| < \text{width}/2$, else 0.

    The derivative of a straight line from 0 to 1, a straight-through estimator within
    the box.

    **Arguments:**

    - `width`: of the whole box, in the units of x.
    - `scale`: its area.

    **Returns:** a `Surrogate`.

    **Source:** Wu et al., *Spatio-temporal backpropagation for training
    high-performance spiking neural networks*, Frontiers in Neuroscience 12, 2018.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.boxcar(width=2.0))
        ```
    """
    return _built_in(_boxcar, width=width, scale=scale)


def _superspike(x: Array, slope: float, scale: float) -> Array:
    return scale / (1 + slope * jnp.abs(x)) ** 2


def superspike(slope: float = 25.0, scale: float = 1.0) -> Surrogate:
    r"""$\sigma(x) = \text{scale} / (1 + k|x|)^2$, that of a fast sigmoid.

    **Arguments:**

    - `slope`: k, in the inverse units of x. The value at the threshold is `scale`.
    - `scale`: a factor.

    **Returns:** a `Surrogate`.

    **Source:** Zenke and Ganguli, *SuperSpike: supervised learning in multilayer
    spiking neural networks*, Neural Computation 30, 2018.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.superspike(slope=10.0))
        ```
    """
    return _built_in(_superspike, slope=slope, scale=scale)


def _normal(x: Array, mean: float, sigma: float) -> Array:
    z = (x - mean) / sigma
    return jnp.exp(-(z**2) / 2) / (sigma * math.sqrt(2 * math.pi))


def _gaussian(x: Array, sigma: float, scale: float) -> Array:
    return scale * _normal(x, 0.0, sigma)


def gaussian(sigma: float = 0.5, scale: float = 1.0) -> Surrogate:
    r"""$\sigma(x) = \text{scale} \cdot \mathcal N(x; 0, \text{sigma}^2)$.

    **Arguments:**

    - `sigma`: the standard deviation, in the units of x.
    - `scale`: its area.

    **Returns:** a `Surrogate`.

    **Source:** Yin, Corradi and Bohté, *Effective and efficient computation with
    multiple-timescale spiking recurrent neural networks*, ICONS 2020.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.gaussian(sigma=0.4))
        ```
    """
    return _built_in(_gaussian, sigma=sigma, scale=scale)


def _multi_gaussian(
    x: Array, sigma: float, height: float, spread: float, scale: float
) -> Array:
    sides = _normal(x, sigma, spread * sigma) + _normal(x, -sigma, spread * sigma)
    return scale * ((1 + height) * _normal(x, 0.0, sigma) - height * sides)


def multi_gaussian(
    sigma: float = 0.5, height: float = 0.15, spread: float = 6.0, scale: float = 0.5
) -> Surrogate:
    r"""A Gaussian with two wide, shallow ones below zero at its sides.

    $$\sigma(x) = \text{scale} \cdot \big[(1 + h)\,\mathcal N(x; 0, \sigma^2)
      - h\,\mathcal N(x; \sigma, s^2 \sigma^2)
      - h\,\mathcal N(x; -\sigma, s^2 \sigma^2)\big]$$

    **Arguments:**

    - `sigma`: the standard deviation of the middle one, in the units of x.
    - `height`: h, the weight of each side.
    - `spread`: s, how much wider the sides are.
    - `scale`: a factor.

    **Returns:** a `Surrogate`.

    **Source:** Yin, Corradi and Bohté, *Accurate and efficient time-domain
    classification with adaptive spiking recurrent neural networks*, Nature Machine
    Intelligence 3, 2021.

    !!! example

        ```python
        neuron = nn.LIF(4, spike=nn.multi_gaussian())
        ```
    """
    return _built_in(
        _multi_gaussian, sigma=sigma, height=height, spread=spread, scale=scale
    )
