"""Parameters of neurons and synapses: numbers that are fixed, and numbers that train.

Every floating-point array in a module is trained by `eqx.is_inexact_array`, so that a
number that is not to be trained must not be one: `Constant` keeps it out of the leaves.
What trains has the raw number as its only leaf and stays within its bounds by the
function that it is read through.
"""

import abc
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._shapes import check_positive


Value = Any
"""A number, an array of the shape of the units, or a `Parameter`."""


def _array(value: Any) -> Array:
    """Floating point, of JAX's default dtype unless it has one of its own."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    return jnp.asarray(value, jnp.result_type(float))


class Parameter(eqx.Module):
    """A number, or one per unit, that a neuron or a synapse reads at every step.

    Called with a dtype it gives its value. See `Constant`, `Free`, `Positive` and
    `Bounded`.

    !!! example

        ```python
        tau = nn.Bounded(20.0, lower=1.0, upper=100.0)
        neuron = nn.LIF(4, tau=tau)  # one time constant for all four
        assert isinstance(neuron.tau, nn.Parameter)
        ```
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of its value: `()`, or one that broadcasts to the units."""

    @abc.abstractmethod
    def __call__(self, dtype: Any = None) -> float | Float[Array, "..."]:
        """The value. Constants take on `dtype`, what trains keeps its own."""


class Constant(Parameter):
    """A number, or one per unit, that does not train. It has no leaves.

    **Arguments:**

    - `value`: a number or an array.

    **Raises:** `ValueError` if it is not a number.

    !!! example

        ```python
        neuron = nn.LIF(3, tau=nn.Constant([10.0, 20.0, 30.0]))
        ```
    """

    numbers: tuple[float, ...] = eqx.field(static=True)
    dimensions: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, value: Any):
        array = np.asarray(value, float)
        if np.isnan(array).any():
            raise ValueError(
                f"Constant: got {value!r}, expected numbers. Look where it was "
                "computed."
            )
        self.numbers = tuple(array.reshape(-1).tolist())
        self.dimensions = array.shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dimensions

    def __call__(self, dtype: Any = None) -> float | Float[Array, "..."]:
        if not self.dimensions:
            return self.numbers[0]
        dtype = jnp.result_type(float) if dtype is None else dtype
        return jnp.asarray(np.reshape(self.numbers, self.dimensions), dtype)


class Free(Parameter):
    """A number, or one per unit, that trains without bounds.

    **Arguments:**

    - `value`: where it starts.

    !!! example

        ```python
        neuron = nn.LIF(3, v_rest=nn.Free([0.0, 0.1, 0.2]))
        ```
    """

    raw: Float[Array, "..."]

    def __init__(self, value: Any):
        self.raw = _array(value)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def __call__(self, dtype: Any = None) -> Float[Array, "..."]:
        del dtype
        return self.raw


class Positive(Parameter):
    r"""A number, or one per unit, that trains and stays above zero.

    The value is $\log(1 + e^{\text{raw}})$.

    **Arguments:**

    - `value`: where it starts, above zero.

    **Raises:** `ValueError` if it is not above zero.

    !!! example

        ```python
        neuron = nn.LIF(3, threshold=nn.Positive(1.0))
        ```
    """

    raw: Float[Array, "..."]

    def __init__(self, value: Any):
        array = _array(value)
        _check_within("Positive", array, 0.0, float("inf"))
        # The inverse of softplus, written so that large numbers do not overflow.
        self.raw = array + jnp.log(-jnp.expm1(-array))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def __call__(self, dtype: Any = None) -> Float[Array, "..."]:
        del dtype
        return jax.nn.softplus(self.raw)


class Bounded(Parameter):
    r"""A number, or one per unit, that trains between two bounds.

    The value is $\text{lower} + (\text{upper} - \text{lower}) / (1 + e^{-\text{raw}})$.

    **Arguments:**

    - `value`: where it starts, between the bounds.
    - `lower`, `upper`: numbers, which it does not reach.

    **Raises:** `ValueError` if the start is not between the bounds.

    !!! example

        ```python
        tau = nn.Bounded([10.0, 20.0, 30.0], lower=5.0, upper=50.0)
        neuron = nn.LIF(3, tau=tau)
        ```
    """

    raw: Float[Array, "..."]
    lower: float = eqx.field(static=True)
    upper: float = eqx.field(static=True)

    def __init__(self, value: Any, lower: float, upper: float):
        array = _array(value)
        _check_within("Bounded", array, lower, upper)
        self.raw = jnp.log(array - lower) - jnp.log(upper - array)
        self.lower, self.upper = float(lower), float(upper)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def __call__(self, dtype: Any = None) -> Float[Array, "..."]:
        del dtype
        return self.lower + (self.upper - self.lower) * jax.nn.sigmoid(self.raw)


def _check_within(owner: str, array: Array, lower: float, upper: float) -> None:
    # Under vmap, as when an ensemble is made, there is no value to look at.
    if isinstance(array, jax.core.Tracer):
        return
    if not bool(jnp.all((array > lower) & (array < upper))):
        raise ValueError(
            f"{owner}: got {array}, expected numbers between {lower} and {upper}. The "
            "start must lie between the bounds; move the start or the bounds."
        )


def fraction(value: Any) -> Parameter:
    """What trains between 0 and 1."""
    return Bounded(value, 0.0, 1.0)


def time_constant(dt: float, upper: float | None = None) -> Callable[[Any], Parameter]:
    """What trains above a tenth of a step, where a memory is gone in a step, and below
    `upper`, ten times its largest start unless told otherwise."""

    def make(value: Any) -> Parameter:
        bound = 10 * float(np.max(value)) if upper is None else upper
        return Bounded(value, 0.1 * dt, bound)

    return make


def _fits(got: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A scalar, or of as many axes as the units, each as long or of length 1."""
    pairs = zip(got, shape, strict=False)
    same_rank = len(got) == len(shape)
    return got == () or (same_rank and all(a in (1, b) for a, b in pairs))


def _make(
    where: str,
    value: Value,
    shape: tuple[int, ...],
    trains: bool,
    kind: Callable[[Any], Parameter],
) -> Parameter:
    if isinstance(value, Constant) and trains:
        raise ValueError(
            f"{where}: got a Constant that is to train, expected one or the other. "
            "Pass the bare number, or leave the name out of `trainable`."
        )
    if not isinstance(value, Parameter):
        number = np.asarray(value, float)
        if trains:
            value = kind(np.broadcast_to(number, shape) if number.ndim == 0 else number)
        else:
            value = Constant(number)
    if not _fits(value.shape, shape):
        raise ValueError(
            f"{where}: got an array of shape {value.shape}, expected a number or an "
            f"array of shape {shape}. One value per unit is an array of that shape."
        )
    return value


def set_parameters(
    module: eqx.Module,
    shape: tuple[int, ...],
    trainable: str | Sequence[str],
    kinds: Mapping[Callable[[Any], Parameter], Mapping[str, Value]],
) -> None:
    """Give a module that is being made its parameters: for each kind of bounds those
    that get them where they train."""
    owner = type(module).__name__
    names = [name for values in kinds.values() for name in values]
    chosen = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise ValueError(
            f"{owner}: got trainable = {', '.join(unknown)}, expected names out of "
            f"{', '.join(names)}. Weights always train; they are not named here."
        )
    for kind, values in kinds.items():
        for name, value in values.items():
            where = f"{owner}.{name}"
            if kind is not Free and not isinstance(value, Parameter):
                for number in np.asarray(value, float).reshape(-1):
                    check_positive(where, number)
            made = _make(where, value, shape, name in chosen, kind)
            setattr(module, name, made)


def read(module: eqx.Module, dtype: Any) -> Any:
    """The values of a module's parameters by their names."""
    found = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name, None)
        if isinstance(value, Parameter):
            found[field.name] = value(dtype)
    return types.SimpleNamespace(**found)
