"""`conv_general_dilated` with the weight as its kernel.

Any number of spatial axes, strides, padding, dilation of either side (a transposed
convolution dilates x), feature groups, any order of axes.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.extend.core import primitives as prims
from jaxtyping import Array, Shaped

from ._base import OpRule, place
from ._products import cast, product
from ._use import OpUse


@dataclasses.dataclass(frozen=True)
class Convolution(OpRule):
    """Trace axes: example and spatial axes of y, then the axes of the weight as stored.

    dy[n, o, p] / dw[o, i, k] = patch[n, i, k, p], what x shows the kernel at p. With
    feature groups, i counts within the group of o.
    """

    y_axes: tuple[int, ...]
    """Per axis of y, its axis in the trace."""
    patch_axes: tuple[int, ...]
    """The axes in the trace of (example, o, i, kernel..., position...)."""
    groups: int
    window: tuple[tuple[str, Any], ...]
    """How the kernel moves over x."""

    name: ClassVar[str] = "convolution"

    def expand(self, v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return place(v, self.y_axes, len(self.trace_shape))

    def influence(
        self, df: Shaped[Array, "..."], operands: tuple[Any, ...]
    ) -> Shaped[Array, "..."]:
        return product(self.expand(df), self._patches(cast(operands[0], df.dtype)))

    def derivative(self, operands: tuple[Any, ...]) -> Shaped[Array, "..."]:
        return self._patches(jnp.asarray(operands[0]))

    def _patches(self, x: Any) -> Any:
        window = dict(self.window)
        order = window["dimension_numbers"].out_spec
        # Found by a convolution with ones, which must not round.
        exact = jax.lax.Precision.HIGHEST
        patches = jax.lax.conv_general_dilated_patches(x, precision=exact, **window)
        patches = jnp.transpose(patches, order)
        examples, features, *positions = patches.shape
        kernel = window["filter_shape"]
        inputs = features // math.prod(kernel)
        shape = (examples, self.groups, inputs // self.groups, *kernel, *positions)
        patches = patches.reshape(shape)
        if self.groups > 1:
            outputs = self.trace_shape[self.patch_axes[1]]
            patches = jnp.repeat(patches, outputs // self.groups, axis=1)
        return place(patches, self.patch_axes, len(self.trace_shape))


def convolution(use: OpUse) -> Convolution | None:
    """The rule of a convolution, None if the weight is not the kernel of one.

    Groups of examples are left to the default: only derivatives of convolutions have
    them.
    """
    params = use.params
    if use.primitive is not prims.conv_general_dilated_p or use.operand != 1:
        return None
    if params["batch_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    of_y, of_w = numbers.out_spec, numbers.rhs_spec
    w_shape, y_shape = use.weight.shape, use.y.shape
    lead = len(of_y) - 1
    positions = list(range(1, lead))
    y_axes = [0] * len(of_y)
    targets = [0, lead + of_w[0], *positions]
    for axis, target in zip(of_y, targets, strict=True):
        y_axes[axis] = target
    window = {
        "filter_shape": tuple(w_shape[axis] for axis in of_w[2:]),
        # The kernel in the order of this shape, however the weight is stored.
        "dimension_numbers": numbers._replace(rhs_spec=tuple(range(len(of_w)))),
    }
    for key in ("window_strides", "padding", "lhs_dilation", "rhs_dilation"):
        window[key] = params[key]
    return Convolution(
        trace_shape=(y_shape[of_y[0]], *(y_shape[a] for a in of_y[2:]), *w_shape),
        weight_shape=w_shape,
        summed=tuple(range(lead)),
        y_axes=tuple(y_axes),
        patch_axes=(0, *(lead + axis for axis in of_w), *positions),
        groups=params["feature_group_count"],
        window=tuple(window.items()),
    )
