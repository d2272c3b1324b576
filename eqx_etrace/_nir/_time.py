"""From NIR's differential equations to steps, and back.

A step of the library takes the share 1 - exp(-dt / tau) of the way to the target.
Euler's method takes dt / tau of it: the same step with another time constant. So
networks of simulators that use Euler's method are met exactly.
"""

import dataclasses
from typing import Any, Literal

import numpy as np


Discretisation = Literal["euler", "exact"]
DISCRETISATIONS = ("euler", "exact")

SECOND = 1000.0
"""NIR counts in seconds, the library in ms."""

# In place of a time constant of zero, which a neuron without a memory has: its decay,
# exp(-1000), is zero in every float.
_NO_MEMORY = 1e-3


@dataclasses.dataclass(frozen=True)
class Steps:
    """The time step in ms, None as long as nothing needs one, and the method."""

    step: float | None
    discretisation: Discretisation

    @property
    def dt(self) -> float:
        if self.step is None:
            raise ValueError(
                "got no time step, expected `dt=`, in ms. The network has a time scale."
            )
        return self.step

    @property
    def seconds(self) -> float:
        return self.dt / SECOND

    def tau_of(self, seconds: Any) -> np.ndarray:
        """The time constant of the library, ms, for one of NIR."""
        tau = np.asarray(np.asarray(seconds, float) * SECOND)
        if not np.all(tau > 0):
            raise ValueError(
                f"got a time constant of {np.min(tau)} ms, expected one above 0. Look "
                "where the file was written."
            )
        if self.discretisation == "exact":
            return tau
        share = self.dt / tau
        if np.any(share > 1 + 1e-6):
            raise ValueError(
                f"got a time constant of {np.min(tau)} ms, expected at least dt = "
                f"{self.dt} ms, below which Euler's method overshoots. Take a smaller "
                "`dt`, that which the network was trained with, or "
                '`discretisation="exact"`.'
            )
        remembers = share < 1
        decay = np.log1p(-np.where(remembers, share, 0.5))
        return np.where(remembers, -self.dt / decay, _NO_MEMORY * self.dt)

    def tau_to(self, tau: Any) -> np.ndarray:
        """The time constant of NIR, s, for one of the library."""
        tau = np.asarray(tau, float)
        exact = self.discretisation == "exact"
        return np.asarray((tau if exact else self.dt / self.share(tau)) / SECOND)

    def share(self, tau: Any) -> np.ndarray:
        """How far a step goes to its target, for a time constant of the library."""
        return np.asarray(-np.expm1(-self.dt / np.asarray(tau, float)))

    def count(self, seconds: Any) -> np.ndarray:
        """A delay in steps."""
        steps = np.asarray(seconds, float) / self.seconds
        whole = np.round(steps)
        # Files hold single precision: a delay is off by a part of itself.
        if np.any(np.abs(steps - whole) > 1e-5 * np.maximum(1, whole)):
            raise ValueError(
                f"got a delay of {np.asarray(seconds) * SECOND} ms, expected multiples "
                f"of dt = {self.dt} ms. Take a smaller `dt`, or round the delays."
            )
        return np.asarray(whole, int)
