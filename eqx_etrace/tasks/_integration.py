"""Tasks that ask for a running total of the inputs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from ._common import Sample, check_above, check_count, check_share, default_dtype


def integrator(
    key: PRNGKeyArray,
    *,
    steps: int = 100,
    channels: int = 1,
    decay: float = 1.0,
    scale: float | None = None,
    dtype: Any = None,
) -> Sample:
    r"""Add up noise: $y^t = \text{decay} \cdot y^{t-1} + x^t$ with $y^0 = 0$.

    **Arguments:**

    - `key`: a key for the noise.
    - `steps`: T.
    - `channels`: how many independent sums there are.
    - `decay`: 1 for a perfect integrator, below for a leaky one.
    - `scale`: the standard deviation of $x^t$; $1/\sqrt{T}$ if None, with which the
      last target of a perfect integrator has the variance 1.
    - `dtype`: JAX's default float if None.

    **Returns:** a `Sample` with inputs x and targets y, both (T, channels); every step
    counts.

    **Raises:** `ValueError` for another size, decay or scale.

    **Source:** Seung, *How the brain keeps the eyes still*, PNAS 93, 1996.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.integrator(jax.random.key(0), steps=50)
        ```
    """
    check_count("tasks.integrator", steps=steps, channels=channels)
    check_share("tasks.integrator", decay=decay)
    scale = 1 / math.sqrt(steps) if scale is None else scale
    check_above("tasks.integrator", scale=scale)
    dtype = default_dtype(dtype)
    inputs = scale * jax.random.normal(key, (steps, channels), dtype)

    def body(y: Any, x: Any) -> tuple[Any, Any]:
        y = decay * y + x
        return y, y

    _, targets = jax.lax.scan(body, jnp.zeros(channels, dtype), inputs)
    return Sample(inputs, targets, jnp.ones(steps, bool))


def flip_flop(
    key: PRNGKeyArray,
    *,
    bits: int = 3,
    steps: int = 100,
    probability: float = 0.1,
    dtype: Any = None,
) -> Sample:
    """Keep bits: each output is the sign of the last pulse on its channel.

    **Arguments:**

    - `key`: a key for the pulses.
    - `bits`: how many channels there are.
    - `steps`: T.
    - `probability`: of a pulse in a step. The first step sets every bit.
    - `dtype`: JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, bits), pulses of 1 or -1, else 0; targets
    (T, bits), 1 or -1; every step counts.

    **Raises:** `ValueError` for another size or a number that is no probability.

    **Source:** Sussillo and Barak, *Opening the black box: low-dimensional dynamics in
    high-dimensional recurrent neural networks*, Neural Computation 25, 2013.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.flip_flop(jax.random.key(0), bits=2)
        ```
    """
    check_count("tasks.flip_flop", bits=bits, steps=steps)
    check_share("tasks.flip_flop", probability=probability)
    one, two = jax.random.split(key)
    pulse = jax.random.bernoulli(one, probability, (steps, bits)).at[0].set(True)
    sign = jax.random.rademacher(two, (steps, bits), default_dtype(dtype))
    inputs = jnp.where(pulse, sign, 0)

    def body(y: Any, x: Any) -> tuple[Any, Any]:
        y = jnp.where(x == 0, y, x)
        return y, y

    _, targets = jax.lax.scan(body, inputs[0], inputs)
    return Sample(inputs, targets, jnp.ones(steps, bool))


def rotation(
    key: PRNGKeyArray, *, steps: int = 50, speed: float = 0.3, dtype: Any = None
) -> Sample:
    r"""Keep a heading: integrate an angular velocity on the circle.

    $\theta^t = \theta^{t-1} + \omega^t$ with a heading $\theta^0$ that is shown once.

    **Arguments:**

    - `key`: a key for the first heading and the velocities.
    - `steps`: T.
    - `speed`: the standard deviation of $\omega$, in radians a step.
    - `dtype`: JAX's default float if None.

    **Returns:** a `Sample` with inputs (T, 3): $\omega$, and in the first step
    $\cos \theta^0$ and $\sin \theta^0$, later 0; targets (T, 2), $\cos \theta^t$ and
    $\sin \theta^t$; every step counts.

    **Raises:** `ValueError` for another size or speed.

    **Source:** Cueva et al., *Emergence of functional and structural properties of the
    head direction system by optimization of recurrent neural networks*, ICLR 2020.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.rotation(jax.random.key(0))
        ```
    """
    check_count("tasks.rotation", steps=steps)
    check_above("tasks.rotation", speed=speed)
    one, two = jax.random.split(key)
    dtype = default_dtype(dtype)
    start = jax.random.uniform(one, (), dtype, 0, 2 * math.pi)
    velocity = speed * jax.random.normal(two, (steps,), dtype)
    heading = start + jnp.cumsum(velocity)
    shown = jnp.zeros((steps, 2), dtype)
    shown = shown.at[0].set(jnp.stack([jnp.cos(start), jnp.sin(start)]))
    inputs = jnp.concatenate([velocity[:, None], shown], axis=1)
    targets = jnp.stack([jnp.cos(heading), jnp.sin(heading)], axis=1)
    return Sample(inputs, targets, jnp.ones(steps, bool))
