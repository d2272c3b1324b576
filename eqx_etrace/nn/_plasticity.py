"""Short-term plasticity: synapses that tire, and synapses that warm up."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._neurons import relax
from ._parameters import (
    Parameter,
    Value,
    fraction,
    read,
    set_parameters,
    time_constant,
)
from ._shapes import Units, check_input, check_positive, check_state, shape_of


class STPState(NamedTuple):
    """The share of the resources that a spike releases, and the resources left."""

    u: Float[Array, "*units"]
    r: Float[Array, "*units"]


def _check_release(owner: str, module: eqx.Module) -> None:
    release = read(module, None).release
    if isinstance(release, float) and release > 1:
        raise ValueError(
            f"{owner}.release: got {release}, expected a number from 0 to 1. It is the "
            "share of the resources that a spike releases."
        )


class STP(eqx.Module):
    r"""Short-term plasticity of Tsodyks and Markram, per unit that sends.

    Between spikes $\tau_f \frac{du}{dt} = -u$ and $\tau_d \frac{dr}{dt} = 1 - r$,
    exact. A spike raises $u \to u + U (1 - u)$, lets through $u\,r$ in place of 1, and
    takes it from the resources: $r \to r - u\,r$. It comes before the weights of a
    connection.

    **Arguments:**

    - `units`: how many units send, or their shape.
    - `release`: U, from 0 to 1, the share that a first spike releases.
    - `tau_f`, `tau_d`: time constants of facilitation and of recovery from depression,
      ms. `tau_f` well above `tau_d` facilitates.
    - `dt`: the time step, ms.
    - `trainable`: which of `release`, `tau_f` and `tau_d` train, one number per unit.
      Each can also be an array or a `Parameter`.

    **Returns:** (when called with spikes of the shape of the units and a state) the
    spikes, each as strong as its synapse is now, and an `STPState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Tsodyks, Pawelzik and Markram, *Neural networks with dynamic synapses*,
    Neural Computation 10, 1998.

    !!! example

        ```python
        stp, dense = nn.STP(3, tau_f=500.0, tau_d=50.0), nn.Dense(3, 4, key=key)
        released, state = stp(jnp.ones(3), stp.init_state())
        current, _ = dense(released, dense.init_state())
        ```
    """

    release: Parameter
    tau_f: Parameter
    tau_d: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        release: Value = 0.2,
        tau_f: Value = 500.0,
        tau_d: Value = 200.0,
        dt: float = 1.0,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        kinds = {
            fraction: {"release": release},
            time_constant(dt): {"tau_f": tau_f, "tau_d": tau_d},
        }
        set_parameters(self, self.shape, trainable, kinds)
        _check_release("STP", self)

    def init_state(self) -> STPState:
        """Rested: nothing facilitated, all resources there."""
        return STPState(u=jnp.zeros(self.shape), r=jnp.ones(self.shape))

    def __call__(
        self, x: Float[Array, "*units"], state: STPState
    ) -> tuple[Float[Array, "*units"], STPState]:
        check_input(self, x, self.shape)
        check_state(self, state)
        p = read(self, state.u.dtype)
        u = state.u * jnp.exp(-self.dt / p.tau_f)
        r = relax(state.r, 1.0, self.dt / p.tau_d)
        u = u + p.release * (1 - u) * x
        released = u * r * x
        return released, STPState(u=u, r=r - released)


class STDState(NamedTuple):
    """The resources left."""

    r: Float[Array, "*units"]


class STD(eqx.Module):
    r"""Short-term depression, per unit that sends: `STP` with a constant u = U.

    **Arguments:**

    - `units`: how many units send, or their shape.
    - `release`: U, from 0 to 1, the share of the resources that a spike releases.
    - `tau_d`: the time constant of recovery, ms.
    - `dt`: the time step, ms.
    - `trainable`: which of `release` and `tau_d` train, as for `STP`.

    **Returns:** (when called with spikes of the shape of the units and a state) the
    spikes, each as strong as its synapse is now, and an `STDState`.

    **Raises:** `ValueError` for wrong sizes or values.

    **Source:** Abbott, Varela, Sen and Nelson, *Synaptic depression and cortical gain
    control*, Science 275, 1997.

    !!! example

        ```python
        std = nn.STD(3, release=0.5)
        released, state = std(jnp.ones(3), std.init_state())
        ```
    """

    release: Parameter
    tau_d: Parameter
    shape: tuple[int, ...] = eqx.field(static=True)
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        units: Units,
        *,
        release: Value = 0.5,
        tau_d: Value = 200.0,
        dt: float = 1.0,
        trainable: str | Sequence[str] = (),
    ):
        check_positive("dt", dt)
        self.shape, self.dt = shape_of(units), float(dt)
        kinds = {fraction: {"release": release}, time_constant(dt): {"tau_d": tau_d}}
        set_parameters(self, self.shape, trainable, kinds)
        _check_release("STD", self)

    def init_state(self) -> STDState:
        """Rested: all resources there."""
        return STDState(r=jnp.ones(self.shape))

    def __call__(
        self, x: Float[Array, "*units"], state: STDState
    ) -> tuple[Float[Array, "*units"], STDState]:
        check_input(self, x, self.shape)
        check_state(self, state)
        p = read(self, state.r.dtype)
        r = relax(state.r, 1.0, self.dt / p.tau_d)
        released = p.release * r * x
        return released, STDState(r=r - released)
