"""From numbers to spikes: functions of an array, or of a whole sequence.

Time is the first axis of what they return, and the dtype is that of what they get.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ._cells_common import check_size


def _floating(where: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{where}: got an array of dtype {x.dtype}, expected a floating-point one. "
            "The spikes have its dtype; scale it first, for example `x / 255`."
        )
    return x


def _check_positive(where: str, **numbers: Any) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(
                f"{where}: got {name}={number!r}, expected a number above 0. A zero or "
                "negative one has no meaning here."
            )


def _bernoulli(key: PRNGKeyArray, probability: Array, steps: int) -> Array:
    shape = (steps, *probability.shape)
    spikes = jax.random.bernoulli(key, probability[None], shape)
    return spikes.astype(probability.dtype)


def rate_encode(
    x: ArrayLike,
    steps: int,
    *,
    key: PRNGKeyArray,
    gain: float = 1.0,
    offset: float = 0.0,
) -> Float[Array, "..."]:
    r"""Spikes with probability `gain * x + offset` in every step.

    **Arguments:**

    - `x`: floating-point numbers of any shape.
    - `steps`: T, how many time steps.
    - `key`: a key for the spikes.
    - `gain`, `offset`: probabilities are clipped to [0, 1].

    **Returns:** zeros and ones, (T, *x.shape), of the dtype of x.

    **Raises:** `TypeError` for integers, `ValueError` for no steps.

    **Source:** Adrian and Zotterman, *The impulses produced by sensory nerve-endings*,
    Journal of Physiology 61, 1926; arguments as in snnTorch.

    !!! example

        ```python
        from eqx_etrace import nn

        spikes = nn.rate_encode(jnp.array([0.1, 0.9]), 20, key=jax.random.key(0))
        assert spikes.shape == (20, 2)
        ```
    """
    x = _floating("nn.rate_encode", x)
    check_size("nn.rate_encode", steps=steps)
    return _bernoulli(key, jnp.clip(gain * x + offset, 0, 1), steps)


def poisson_encode(
    rate: ArrayLike, steps: int, *, key: PRNGKeyArray, dt: float
) -> Float[Array, "..."]:
    r"""Poisson processes in steps of `dt`: a spike where at least one event falls.

    The probability of a spike is $1 - e^{-\text{rate} \cdot dt}$, which is close to
    rate times dt where that is small.

    **Arguments:**

    - `rate`: events per unit of time, of any shape; a negative one counts as zero.
    - `steps`: T, how many time steps.
    - `key`: a key for the spikes.
    - `dt`: how long a step is: 0.001 for a rate in Hz and steps of a millisecond.

    **Returns:** zeros and ones, (T, *rate.shape), of the dtype of rate.

    **Raises:** `TypeError` for integers, `ValueError` for no steps or a `dt` of 0.

    **Source:** Heeger, *Poisson model of spike generation*, Stanford University, 2000.

    !!! example

        ```python
        from eqx_etrace import nn

        hertz = jnp.array([10.0, 100.0])
        spikes = nn.poisson_encode(hertz, 50, key=jax.random.key(0), dt=0.001)
        ```
    """
    rate = _floating("nn.poisson_encode", rate)
    check_size("nn.poisson_encode", steps=steps)
    _check_positive("nn.poisson_encode", dt=dt)
    return _bernoulli(key, -jnp.expm1(-dt * jnp.maximum(rate, 0)), steps)


def _widened(x: Array) -> Array:
    """Step numbers need more digits than half precision has."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def _one_spike(step: Array, steps: int, dtype: Any) -> Array:
    """A spike in the step of that number, if there is one."""
    times = jnp.arange(steps, dtype=step.dtype).reshape(steps, *(1,) * step.ndim)
    return (times == step[None]).astype(dtype)


def latency_encode(
    x: ArrayLike, steps: int, *, tau: float, threshold: float = 0.01
) -> Float[Array, "..."]:
    r"""One spike each, early for a large input: the time a membrane takes to charge.

    A leaky membrane with the time constant $\tau$ and the constant current x reaches
    the threshold $\theta$ at $t = \tau \log \frac{x}{x - \theta}$. The spike is in the
    step that holds t. There is none for $x \le \theta$ and none after the last step.

    **Arguments:**

    - `x`: currents, floating-point numbers of any shape.
    - `steps`: T, how many time steps.
    - `tau`: the time constant, in steps.
    - `threshold`: $\theta$, above 0, in the unit of x.

    **Returns:** zeros and ones, (T, *x.shape), of the dtype of x.

    **Raises:** `TypeError` for integers, `ValueError` for no steps, or a `tau` or
    `threshold` that is not above 0.

    **Source:** Gerstner and Kistler, *Spiking neuron models*, Cambridge University
    Press, 2002, section 4.1; arguments as in snnTorch.

    !!! example

        ```python
        from eqx_etrace import nn

        spikes = nn.latency_encode(jnp.array([0.02, 0.5, 1.0]), 20, tau=10.0)
        ```
    """
    x = _floating("nn.latency_encode", x)
    check_size("nn.latency_encode", steps=steps)
    _check_positive("nn.latency_encode", tau=tau, threshold=threshold)
    current = _widened(x)
    reached = current > threshold
    above = jnp.where(reached, current - threshold, 1)
    time = tau * jnp.log1p(threshold / above)
    return _one_spike(jnp.where(reached, jnp.floor(time), -1), steps, x.dtype)


def linear_latency_encode(x: ArrayLike, steps: int) -> Float[Array, "..."]:
    """Exactly one spike each: 1 in the first step, 0 in the last, linear in between.

    **Arguments:**

    - `x`: floating-point numbers of any shape, clipped to [0, 1].
    - `steps`: T, how many time steps.

    **Returns:** zeros and ones, (T, *x.shape), of the dtype of x; the spike is in step
    `round((T - 1) * (1 - x))`.

    **Raises:** `TypeError` for integers, `ValueError` for no steps.

    **Source:** Eshraghian et al., *Training spiking neural networks using lessons from
    deep learning*, Proceedings of the IEEE 111, 2023.

    !!! example

        ```python
        from eqx_etrace import nn

        spikes = nn.linear_latency_encode(jnp.array([0.0, 0.5, 1.0]), 11)
        ```
    """
    x = _floating("nn.linear_latency_encode", x)
    check_size("nn.linear_latency_encode", steps=steps)
    step = jnp.round((steps - 1) * (1 - jnp.clip(_widened(x), 0, 1)))
    return _one_spike(step, steps, x.dtype)


def population_encode(
    x: ArrayLike,
    size: int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    width: float | None = None,
) -> Float[Array, "..."]:
    r"""The responses of `size` units to each number, by Gaussian receptive fields.

    $$r_k = e^{-(x - c_k)^2 / (2 w^2)}$$

    with the centres $c_k$ evenly from `low` to `high`, both included. Responses are
    between 0 and 1: pass them to `eqx_etrace.nn.rate_encode` or to
    `eqx_etrace.nn.latency_encode` for spikes.

    **Arguments:**

    - `x`: floating-point numbers of any shape.
    - `size`: how many units a number has, at least 2.
    - `low`, `high`: the first and the last centre.
    - `width`: w; the distance of two centres if None.

    **Returns:** (*x.shape, size), of the dtype of x.

    **Raises:** `TypeError` for integers, `ValueError` for fewer than two units, or if
    `high` is not above `low` or `width` not above 0.

    **Source:** Bohte, La Poutré and Kok, *Unsupervised clustering with spiking neurons
    by sparse temporal coding and multilayer RBF networks*, IEEE Transactions on Neural
    Networks 13, 2002.

    !!! example

        ```python
        from eqx_etrace import nn

        responses = nn.population_encode(jnp.array([0.2, 0.7]), 6)
        spikes = nn.rate_encode(responses, 20, key=jax.random.key(0))
        assert spikes.shape == (20, 2, 6)
        ```
    """
    x = _floating("nn.population_encode", x)
    check_size("nn.population_encode", size=size)
    if size < 2 or not high > low:
        raise ValueError(
            f"nn.population_encode: got size={size!r}, low={low!r} and high={high!r}, "
            "expected at least two units and low < high. Centres lie evenly between."
        )
    width = (high - low) / (size - 1) if width is None else width
    _check_positive("nn.population_encode", width=width)
    centres = jnp.linspace(low, high, size, dtype=x.dtype)
    distance = x[..., None] - centres.reshape((1,) * x.ndim + (size,))
    return jnp.exp(-((distance / width) ** 2) / 2)


def _before(where: str, xs: Array, initial: ArrayLike | None) -> Array:
    if xs.ndim == 0:
        raise ValueError(
            f"{where}: got a single number, expected a sequence with time in front. "
            "It is changes over time that make a spike."
        )
    if initial is None:
        return xs[0]
    if jnp.shape(initial) != xs.shape[1:]:
        raise ValueError(
            f"{where}: got initial of shape {jnp.shape(initial)}, expected "
            f"{xs.shape[1:]}, that of one step. It is the value before the first step."
        )
    return jnp.asarray(initial, xs.dtype)


def delta_encode(
    xs: ArrayLike, *, threshold: float, initial: ArrayLike | None = None
) -> Float[Array, "..."]:
    r"""1 where the input has risen by the threshold since the step before, -1 where it
    has fallen by it, 0 elsewhere.

    **Arguments:**

    - `xs`: floating-point numbers, time in front: (T, ...).
    - `threshold`: above 0, in the unit of xs.
    - `initial`: the value before the first step; the first value if None, so that the
      first step has no spike.

    **Returns:** -1, 0 and 1, (T, ...), of the dtype of xs. `jnp.maximum(spikes, 0)` are
    the rises alone.

    **Raises:** `TypeError` for integers, `ValueError` for another threshold or shape.

    **Source:** Eshraghian et al., *Training spiking neural networks using lessons from
    deep learning*, Proceedings of the IEEE 111, 2023.

    !!! example

        ```python
        from eqx_etrace import nn

        xs = jnp.sin(jnp.arange(30.0))
        spikes = nn.delta_encode(xs, threshold=0.1)
        ```
    """
    xs = _floating("nn.delta_encode", xs)
    _check_positive("nn.delta_encode", threshold=threshold)
    first = _before("nn.delta_encode", xs, initial)
    change = jnp.diff(jnp.concatenate([first[None], xs]), axis=0)
    return _sign(change, threshold)


def _sign(change: Array, threshold: float) -> Array:
    rise, fall = change >= threshold, change <= -threshold
    return rise.astype(change.dtype) - fall.astype(change.dtype)


def step_forward_encode(
    xs: ArrayLike, *, threshold: float, initial: ArrayLike | None = None
) -> Float[Array, "..."]:
    r"""Delta modulation: spikes from which the input can be built up again.

    A baseline follows the input: $b^t = b^{t-1} + \theta s^t$, with $s^t = \pm 1$ where
    the input is at least $\theta$ away from $b^{t-1}$, else 0. Other than
    `eqx_etrace.nn.delta_encode` it misses no slow change. The input is
    `initial + threshold * jnp.cumsum(spikes, 0)` up to $\theta$, as long as it changes
    by less than $\theta$ a step.

    **Arguments:**

    - `xs`: floating-point numbers, time in front: (T, ...).
    - `threshold`: $\theta$, above 0, in the unit of xs.
    - `initial`: the baseline before the first step; the first value if None.

    **Returns:** -1, 0 and 1, (T, ...), of the dtype of xs.

    **Raises:** `TypeError` for integers, `ValueError` for another threshold or shape.

    **Source:** de Jager, *Delta modulation, a method of PCM transmission using the
    1-unit code*, Philips Research Reports 7, 1952; as step-forward encoding in Kasabov
    et al., *Evolving spatio-temporal data machines based on the NeuCube neuromorphic
    framework*, Neural Networks 78, 2016.

    !!! example

        ```python
        from eqx_etrace import nn

        xs = jnp.sin(0.1 * jnp.arange(60.0))
        spikes = nn.step_forward_encode(xs, threshold=0.1)
        rebuilt = xs[0] + 0.1 * jnp.cumsum(spikes, 0)
        ```
    """
    xs = _floating("nn.step_forward_encode", xs)
    _check_positive("nn.step_forward_encode", threshold=threshold)

    def body(baseline: Array, x: Array) -> tuple[Array, Array]:
        spike = _sign(x - baseline, threshold)
        return baseline + threshold * spike, spike

    first = _before("nn.step_forward_encode", xs, initial)
    return jax.lax.scan(body, first, xs)[1]
