"""Which elements a sliding window reads: pooling between a weight and its units."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._custom_types import Labels


NONE = -1


def window_reads(places: Labels, params: Mapping[str, Any]) -> Labels:
    """The reads of `reduce_window_sum` and its like, as (window, *shape of the output).

    `places` are the numbers of the operand's elements; what is padded reads NONE.
    """
    for axis, dilation in enumerate(params["base_dilation"]):
        places = _dilate(places, axis, dilation)
    low, high = zip(*params["padding"], strict=True)
    room = [(max(a, 0), max(b, 0)) for a, b in params["padding"]]
    places = np.pad(places, room, constant_values=NONE)
    cropped = tuple(
        slice(max(-a, 0), size - max(-b, 0))
        for a, b, size in zip(low, high, places.shape, strict=True)
    )
    places = places[cropped]
    window, strides = params["window_dimensions"], params["window_strides"]
    dilations = params["window_dilation"]
    spans = [(w - 1) * d for w, d in zip(window, dilations, strict=True)]

    def seen(offset: tuple[int, ...]) -> Labels:
        axes = zip(offset, dilations, spans, strides, places.shape, strict=True)
        return places[tuple(slice(o * d, n - s + o * d, k) for o, d, s, k, n in axes)]

    return np.stack([seen(offset) for offset in np.ndindex(*window)])


def _dilate(places: Labels, axis: int, dilation: int) -> Labels:
    shape = list(places.shape)
    shape[axis] = max((shape[axis] - 1) * dilation + 1, 0)
    wide = np.full(shape, NONE, places.dtype)
    wide[(slice(None),) * axis + (slice(None, None, dilation),)] = places
    return wide
