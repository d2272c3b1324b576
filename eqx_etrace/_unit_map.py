"""Which unit each element of y feeds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from ._custom_types import Labels


class UnitMap(eqx.Module):
    """For each element of y, the unit it feeds, as a way to spread unit vectors."""

    units: int = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    repeats: tuple[int, int] | None = eqx.field(static=True)
    """(outer, inner): the unit vector tiled `outer` times, each entry `inner` times."""
    index: Int[Array, "..."] | None
    """The unit of each element, -1 for none, where no tiling describes it."""

    def spread(self, v: Shaped[Array, "*lead _"]) -> Shaped[Array, "..."]:
        """A vector over units as an array of the shape of y; axes in front stay.

        A vector of size one stands for equal entries, and stays of size one.
        """
        lead = v.shape[:-1]
        if v.shape[-1] == 1 != self.units:
            return v.reshape(*lead, *(1 for _ in self.shape))
        if self.repeats is not None:
            outer, inner = self.repeats
            shape = (*lead, outer, self.units, inner)
            tiled = jnp.broadcast_to(v[..., None, :, None], shape)
            return tiled.reshape(*lead, *self.shape)
        index = jnp.asarray(self.index)
        return jnp.where(index >= 0, v[..., index], jnp.zeros((), v.dtype))

    def gather(self, y: Shaped[Array, "..."]) -> Shaped[Array, " _"]:
        """The other way: for each unit the sum of the elements of y that feed it."""
        (found,) = jax.vjp(self.spread, jnp.zeros(self.units, y.dtype))[1](y)
        return found

    @property
    def total(self) -> bool:
        """Whether every element of y feeds a unit of the group."""
        return self.index is None or bool((np.asarray(self.index) >= 0).all())

    def positions(self) -> Int[Array, "..."]:
        """Per element of y the unit it feeds, -1 for none."""
        if self.index is not None:
            return self.index
        return self.spread(jnp.arange(self.units, dtype=jnp.int32))


def unit_map(positions: Labels, units: int, shape: tuple[int, ...]) -> UnitMap:
    """The cheapest description of `positions`, the unit of each element of y."""
    flat = positions.reshape(-1)
    if flat.size:
        inner = int(np.argmax(flat != flat[0])) or flat.size
        outer, rest = divmod(flat.size, units * inner)
        tiles = np.arange(units)[None, :, None]
        if not rest and (flat.reshape(outer, units, inner) == tiles).all():
            return UnitMap(units, shape, (outer, inner), None)
    index = jnp.asarray(positions.reshape(shape), jnp.int32)
    return UnitMap(units, shape, None, index)
