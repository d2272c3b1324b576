"""Streams of chaotic systems: say the value that comes next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ._common import Sample, check_above, check_count, default_dtype


def _stream(series: Array, horizon: int, normalise: bool) -> Sample:
    """`series` is (T + horizon, channels)."""
    if normalise:
        mean = jnp.mean(series, axis=0, keepdims=True)
        std = jnp.std(series, axis=0, keepdims=True)
        series = (series - mean) / std
    steps = len(series) - horizon
    return Sample(series[:steps], series[horizon:], jnp.ones(steps, bool))


def _check_stream(where: str, steps: int, horizon: int, washout: int) -> None:
    check_count(where, steps=steps, horizon=horizon)
    check_count(where, 0, washout=washout)


def _iterate(step: Callable[[Any], Any], state: Any, steps: int) -> Any:
    return jax.lax.fori_loop(0, steps, lambda _, state: step(state), state)


def _record(step: Callable[[Any], Any], state: Any, steps: int) -> Any:
    """The states of so many steps, the first one included."""
    return jax.lax.scan(lambda s, _: (step(s), s), state, length=steps)[1]


def _columns(where: str, coordinates: tuple[int, ...], count: int) -> list[int]:
    if not coordinates or not all(c in range(count) for c in coordinates):
        raise ValueError(
            f"{where}: got coordinates={coordinates!r}, expected some of "
            f"{tuple(range(count))}. They choose what of the state is seen."
        )
    return list(coordinates)


def mackey_glass(
    key: PRNGKeyArray,
    *,
    steps: int = 500,
    horizon: int = 1,
    tau: float = 17.0,
    beta: float = 0.2,
    gamma: float = 0.1,
    power: float = 10.0,
    dt: float = 1.0,
    substeps: int = 10,
    washout: int = 500,
    normalise: bool = True,
    dtype: Any = None,
) -> Sample:
    r"""The Mackey-Glass equation, a delay equation that is chaotic for $\tau \ge 17$.

    $$\dot x(t) = \frac{\beta x(t - \tau)}{1 + x(t - \tau)^p} - \gamma x(t)$$

    It starts from a constant past, drawn uniformly within (0.5, 1.5), and is solved
    with fourth-order Runge-Kutta steps.

    **Arguments:**

    - `key`: a key for the past.
    - `steps`: T, samples of the stream.
    - `horizon`: how many samples ahead the target is.
    - `tau`, `beta`, `gamma`, `power`: the parameters; `tau` in units of time.
    - `dt`: the time between two samples.
    - `substeps`: solver steps between two samples; `tau` is at least two of them and a
      whole number of them.
    - `washout`: samples at the start that are thrown away.
    - `normalise`: whether the stream is shifted and scaled to mean 0 and variance 1.
    - `dtype`: JAX's default float if None.

    **Returns:** a `Sample` with inputs and targets (T, 1); every step counts.

    **Raises:** `ValueError` for another size or parameter.

    **Source:** Mackey and Glass, *Oscillation and chaos in physiological control
    systems*, Science 197, 1977.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.mackey_glass(jax.random.key(0), horizon=6)
        ```
    """
    where = "tasks.mackey_glass"
    _check_stream(where, steps, horizon, washout)
    check_count(where, substeps=substeps)
    check_above(where, tau=tau, beta=beta, gamma=gamma, power=power, dt=dt)
    h = dt / substeps
    lag = round(tau / h)
    if lag < 2 or abs(lag * h - tau) > 1e-6 * tau:
        raise ValueError(
            f"{where}: got tau={tau!r}, dt={dt!r} and substeps={substeps!r}, expected "
            "tau to be a whole number of solver steps dt / substeps, and at least two. "
            "Choose more substeps."
        )

    def rate(x: Array, delayed: Array) -> Array:
        return beta * delayed / (1 + delayed**power) - gamma * x

    def step(past: Array) -> Array:
        """`past` holds the solver steps from t - tau - h to t."""
        x, start, end = past[-1], past[1], past[2]
        # Cubic, so that the order of the solver is kept.
        middle = (9 * (start + end) - past[0] - past[3]) / 16
        k1 = rate(x, start)
        k2 = rate(x + h / 2 * k1, middle)
        k3 = rate(x + h / 2 * k2, middle)
        k4 = rate(x + h * k3, end)
        new = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return jnp.concatenate([past[1:], new[None]])

    def sample(past: Array) -> Array:
        return _iterate(step, past, substeps)

    first = jax.random.uniform(key, (), default_dtype(dtype), 0.5, 1.5)
    past = _iterate(sample, jnp.full(lag + 2, first), washout)
    # Of the past only the present is recorded.
    series = jax.lax.scan(
        lambda past, _: (sample(past), past[-1:]), past, length=steps + horizon
    )[1]
    return _stream(series, horizon, normalise)


def lorenz(
    key: PRNGKeyArray,
    *,
    steps: int = 500,
    horizon: int = 1,
    sigma: float = 10.0,
    rho: float = 28.0,
    beta: float = 8 / 3,
    dt: float = 0.02,
    substeps: int = 4,
    washout: int = 500,
    coordinates: tuple[int, ...] = (0,),
    normalise: bool = True,
    dtype: Any = None,
) -> Sample:
    r"""The Lorenz system.

    $$\dot x = \sigma (y - x), \qquad \dot y = x (\rho - z) - y, \qquad
    \dot z = x y - \beta z$$

    It starts from a normal draw around (0, 0, 25) and is solved with fourth-order
    Runge-Kutta steps. From x alone, the default, the next value asks for a memory; all
    three coordinates determine it.

    **Arguments:**

    - `key`: a key for the start.
    - `steps`: T, samples of the stream.
    - `horizon`: how many samples ahead the target is.
    - `sigma`, `rho`, `beta`: the parameters.
    - `dt`: the time between two samples.
    - `substeps`: solver steps between two samples.
    - `washout`: samples at the start that are thrown away.
    - `coordinates`: which of x, y and z (0, 1, 2) are seen and asked for.
    - `normalise`: whether each is shifted and scaled to mean 0 and variance 1.
    - `dtype`: JAX's default float if None.

    **Returns:** a `Sample` with inputs and targets (T, coordinates); every step counts.

    **Raises:** `ValueError` for another size, parameter or coordinate.

    **Source:** Lorenz, *Deterministic nonperiodic flow*, Journal of the Atmospheric
    Sciences 20, 1963.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.lorenz(jax.random.key(0), coordinates=(0, 1, 2))
        ```
    """
    where = "tasks.lorenz"
    _check_stream(where, steps, horizon, washout)
    check_count(where, substeps=substeps)
    check_above(where, sigma=sigma, rho=rho, beta=beta, dt=dt)
    columns = _columns(where, coordinates, 3)
    h = dt / substeps

    def rate(s: Array) -> Array:
        x, y, z = s
        return jnp.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])

    def step(s: Array) -> Array:
        k1 = rate(s)
        k2 = rate(s + h / 2 * k1)
        k3 = rate(s + h / 2 * k2)
        k4 = rate(s + h * k3)
        return s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def sample(s: Array) -> Array:
        return _iterate(step, s, substeps)

    draw = jax.random.normal(key, (3,), default_dtype(dtype))
    start = _iterate(sample, draw.at[2].add(25), washout)
    series = _record(sample, start, steps + horizon)[:, jnp.array(columns)]
    return _stream(series, horizon, normalise)


def henon(
    key: PRNGKeyArray,
    *,
    steps: int = 500,
    horizon: int = 1,
    a: float = 1.4,
    b: float = 0.3,
    washout: int = 100,
    coordinates: tuple[int, ...] = (0,),
    normalise: bool = True,
    dtype: Any = None,
) -> Sample:
    r"""The Hénon map.

    $$x^{t+1} = 1 - a (x^t)^2 + y^t, \qquad y^{t+1} = b x^t$$

    It starts uniformly within 0.1 of the origin. From x alone, the default, the next
    value asks for a memory of one step.

    **Arguments:**

    - `key`: a key for the start.
    - `steps`: T, samples of the stream.
    - `horizon`: how many samples ahead the target is.
    - `a`, `b`: the parameters.
    - `washout`: samples at the start that are thrown away.
    - `coordinates`: which of x and y (0, 1) are seen and asked for.
    - `normalise`: whether each is shifted and scaled to mean 0 and variance 1.
    - `dtype`: JAX's default float if None.

    **Returns:** a `Sample` with inputs and targets (T, coordinates); every step counts.

    **Raises:** `ValueError` for another size or coordinate.

    **Source:** Hénon, *A two-dimensional mapping with a strange attractor*,
    Communications in Mathematical Physics 50, 1976.

    !!! example

        ```python
        from eqx_etrace import tasks

        inputs, targets, mask = tasks.henon(jax.random.key(0), steps=200)
        ```
    """
    where = "tasks.henon"
    _check_stream(where, steps, horizon, washout)
    columns = _columns(where, coordinates, 2)

    def step(s: Array) -> Array:
        return jnp.stack([1 - a * s[0] ** 2 + s[1], b * s[0]])

    draw = jax.random.uniform(key, (2,), default_dtype(dtype), -0.1, 0.1)
    start = _iterate(step, draw, washout)
    series = _record(step, start, steps + horizon)[:, jnp.array(columns)]
    return _stream(series, horizon, normalise)
