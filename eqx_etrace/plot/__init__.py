"""Figures of what networks, learning rules and graphs do; needs matplotlib.

Every function draws into the Axes it is given, or into a new figure of pyplot, which a
notebook shows, and returns the Axes. None calls `show` or changes a setting.
"""

try:
    from ._alignment import alignment as alignment
    from ._graph import graph as graph
    from ._raster import raster as raster
    from ._scaling import scaling as scaling
    from ._surrogates import surrogates as surrogates
except ModuleNotFoundError as error:
    if str(error.name).split(".")[0] != "matplotlib":
        raise
    raise ImportError(
        "eqx_etrace.plot: got no package matplotlib, expected version 3.9 or later. "
        "Install the extra `plot`: pip install 'eqx-etrace[plot]'."
    ) from error
