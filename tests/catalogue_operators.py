"""Elementwise weights, convolutions, embeddings and sparse connectivity."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from catalogue_case import (
    IN,
    KINDS,
    N,
    around,
    leaky,
    normal,
    table_of_cases,
    zeros,
)
from jax.experimental import sparse


OPERATORS, case = table_of_cases()
_int = jnp.zeros((), int)


# Elementwise.


@case(
    params={
        "tau": around(0.5),
        "gain": around(1.0, N),
        "row": (1, N),
        "column": (2, 1),
        "w": (N, IN),
    },
    state=zeros(2, N),
    oracle="bptt",
    units=[(1, 2 * N)],
    ops={f"['{name}']": {"elementwise"} for name in ("tau", "gain", "row", "column")},
)
def any_broadcasting(p, x, h, taps):
    """One number drives a row, another a column: all are one unit."""
    drive = jnp.sin(jnp.arange(1.0, N + 1) * x[0]) * p["gain"]
    drive = drive[None] * p["row"] + x[1] * p["column"] + (p["w"] @ x)[None]
    h = leaky(h, drive - p["tau"] * h)
    return h, h


@case(
    params={
        "w": (N, IN),
        "tau": around(1.0, N),
        "power": around(2.0, N),
        "floor": around(-0.2, N),
        "top": around(1.0, N),
        "slope": around(0.3, N),
    },
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
)
def odd_elementwise_ops(p, x, h, taps):
    drive = p["w"] @ x
    drive = jnp.where(drive > 0, drive, p["slope"] * drive)
    drive = jnp.clip(drive, p["floor"], p["top"])
    decay = jnp.exp(-1.0 / jax.nn.softplus(p["tau"]))
    h = decay * h + (1 - decay) * jnp.abs(drive) ** p["power"]
    return jnp.maximum(h, p["floor"]), h


@case(
    make=lambda key: (
        {
            "w": eqx.nn.Linear(IN, N, key=key),
            "prelu": eqx.nn.PReLU(0.3),
        },
        zeros(N),
    ),
    oracle="bptt",
    units=[(N, 1)],
    ops={".negative_slope": {"elementwise"}},
)
def prelu(p, x, h, taps):
    h = 0.7 * h + p["prelu"](p["w"](x) - 0.5 * h)
    return h, h


# Convolution.

_conv = {"structure": "no op rule for convolutions yet, they go by AD"}


def _layers(**layers):
    """(p, zero state) from functions of a key, the state's shape by `state`."""
    shape = layers.pop("state")

    def make(key):
        keys = jax.random.split(key, len(layers))
        pairs = zip(layers.items(), keys, strict=True)
        return {name: layer(key) for (name, layer), key in pairs}, zeros(*shape)

    return make


@case(
    make=_layers(conv=lambda key: eqx.nn.Conv1d(2, 3, 3, key=key), state=(3, 5)),
    x=zeros(2, 7),
    oracle="bptt",
    units=[(15, 1)],
    ops={".weight": {"convolution"}, ".bias": {"elementwise"}},
)
def conv1d(p, x, h, taps):
    h = leaky(h, p["conv"](x))
    return h, h


@case(
    make=_layers(
        conv=lambda key: eqx.nn.Conv1d(
            4, 6, 2, stride=2, padding=1, dilation=2, groups=2, key=key
        ),
        state=(6, 4),
    ),
    x=zeros(4, 7),
    oracle="bptt",
    units=[(24, 1)],
    ops={".weight": {"convolution"}},
)
def conv1d_strides_dilation_groups(p, x, h, taps):
    h = leaky(h, p["conv"](x))
    return h, h


@case(
    make=_layers(
        conv=lambda key: eqx.nn.Conv2d(1, 2, 2, key=key),
        rec=lambda key: eqx.nn.Conv2d(2, 2, 3, padding=1, use_bias=False, key=key),
        readout=lambda key: eqx.nn.Linear(18, 2, key=key),
        state=(2, 3, 3),
    ),
    x=zeros(1, 4, 4),
    oracle="twin",
    units=[(18, 1)],
    ops={"['conv'].weight": {"convolution"}, "['rec'].weight": {"convolution"}},
)
def conv2d_recurrent(p, x, h, taps):
    h = leaky(h, p["conv"](x) + 2 * p["rec"](taps.recur(h)))
    return p["readout"](h.reshape(-1)), h


@case(
    make=_layers(
        conv=lambda key: eqx.nn.Conv2d(1, 4, 2, key=key),
        rec=lambda key: eqx.nn.Conv1d(
            4, 4, 3, padding="SAME", padding_mode="CIRCULAR", groups=4, key=key
        ),
        state=(4, 4),
    ),
    x=zeros(1, 3, 3),
    oracle="twin",
    units=[(16, 1)],
    ops={"['rec'].weight": {"convolution"}},
)
def conv1d_recurrent_circular_depthwise(p, x, h, taps):
    drive = p["conv"](x).reshape(4, 4)
    h = leaky(h, drive + 2 * p["rec"](taps.recur(h)))
    return h, h


@case(
    make=_layers(conv=lambda key: eqx.nn.Conv3d(1, 2, 2, key=key), state=(2, 1, 2, 2)),
    x=zeros(1, 2, 3, 3),
    oracle="bptt",
    units=[(8, 1)],
    ops={".weight": {"convolution"}},
)
def conv3d(p, x, h, taps):
    h = leaky(h, p["conv"](x))
    return h, h


@case(
    make=_layers(
        conv=lambda key: eqx.nn.ConvTranspose1d(2, 3, 3, stride=2, key=key),
        state=(3, 7),
    ),
    x=zeros(2, 3),
    oracle="bptt",
    units=[(21, 1)],
    ops={".weight": {"convolution"}},
)
def conv1d_transposed(p, x, h, taps):
    h = leaky(h, p["conv"](x))
    return h, h


@case(
    make=_layers(
        conv=lambda key: eqx.nn.ConvTranspose2d(
            2, 2, 2, stride=2, groups=2, output_padding=1, key=key
        ),
        state=(2, 5, 5),
    ),
    x=zeros(2, 2, 2),
    oracle="bptt",
    units=[(50, 1)],
    ops={".weight": {"convolution"}},
)
def conv2d_transposed(p, x, h, taps):
    h = leaky(h, p["conv"](x))
    return h, h


@case(
    params={"w": (2, 2, 1, 3)},
    state=zeros(3, 3, 3),
    x=zeros(1, 4, 4, 1),
    oracle="bptt",
    units=[(27, 1)],
    ops={"['w']": {"convolution"}},
)
def conv_channels_last(p, x, h, taps):
    """The weight kept as (height, width, in, out), the batch axis of size 1."""
    layout = ("NHWC", "HWIO", "NHWC")
    drive = jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "VALID", dimension_numbers=layout
    )
    h = leaky(h, drive[0])
    return h, h


@case(
    make=_layers(
        conv=lambda key: eqx.nn.Conv1d(1, 2, 2, key=key),
        state=(2, 3),
    ),
    x=zeros(1, 7),
    oracle="bptt",
    units=[(6, 1)],
    ops={".weight": {"convolution"}},
)
def conv_then_average_pool(p, x, h, taps):
    """Windows that do not overlap: each product goes to one unit."""
    pool = eqx.nn.AvgPool1d(2, stride=2)
    h = leaky(h, pool(p["conv"](x)))
    return h, h


# Embeddings.

_gather = {"structure": "no op rule for gathers yet, they go by AD"}


@case(
    make=_layers(
        embedding=lambda key: eqx.nn.Embedding(KINDS, N, key=key),
        rec=lambda key: eqx.nn.Linear(N, N, key=key),
        state=(N,),
    ),
    x=_int,
    oracle="twin",
    units=[(N, 1)],
    ops={"['embedding'].weight": {"gather"}},
)
def embedding(p, x, h, taps):
    h = leaky(h, p["embedding"](x) + p["rec"](taps.recur(h)))
    return h, h


@case(
    params={"w": (KINDS, N)},
    state=zeros(N),
    x=jnp.zeros(3, int),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"gather"}},
)
def several_rows_at_once(p, x, h, taps):
    """A bag of words; the same row may come twice."""
    h = leaky(h, p["w"][x].sum(0))
    return h, h


@case(
    params={"w": (N, KINDS, KINDS)},
    state=zeros(N),
    x=(_int, _int),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"gather"}},
)
def two_indices(p, x, h, taps):
    h = leaky(h, p["w"][:, x[0], x[1]])
    return h, h


@case(
    params={"w": (3, N, IN)},
    state=(zeros(N), _int),
    oracle="bptt",
    units=[(N, 1)],
)
def a_weight_for_each_phase(p, x, state, taps):
    """Sliced by a counter in the state: what meets the input is then data."""
    h, count = state
    w = jax.lax.dynamic_index_in_dim(p["w"], count % 3, keepdims=False)
    h = leaky(h, w @ x)
    return h, (h, count + 1)


@case(
    params={"w": (KINDS, N)},
    state=zeros(N),
    x=_int,
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def one_hot(p, x, h, taps):
    h = leaky(h, jax.nn.one_hot(x, KINDS) @ p["w"])
    return h, h


@case(
    params={"w": (N, IN), "knots": (9,)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
)
def lookup_table(p, x, h, taps):
    """A trainable curve of the input, shared by all units."""
    grid = jnp.linspace(-4.0, 4.0, 9)
    drive = jnp.interp(jnp.sin(jnp.arange(1.0, N + 1)) * x[0], grid, p["knots"])
    h = leaky(h, drive + p["w"] @ x)
    return h, h


@case(
    params={"w": (N, IN), "u": (N,)},
    state=zeros(N),
    x={"i": jnp.zeros(N, int), "x": zeros(IN)},
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": N - 1},
)
def routed_by_the_input(p, x, h, taps):
    """Which unit each unit hears is data."""
    h = leaky(h, p["w"] @ x["x"] + p["u"] * taps.recur(h)[x["i"]])
    return h, h


# Sparse connectivity.

_rng = np.random.default_rng(0)
_src = _rng.integers(0, IN, 10)
_dst = np.sort(np.concatenate([np.arange(N), _rng.integers(0, N, 4)]))
# Recurrent edges without one from a unit to itself.
_pre = np.array([1, 2, 3, 4, 5, 0, 3, 4, 5, 0])
_post = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])


@case(
    params={"w": (10,), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"elementwise"}},
)
def sparse_input(p, x, h, taps):
    """gather -> multiply -> segment_sum, edges sorted by target."""
    drive = jax.ops.segment_sum(
        p["w"] * x[_src], _dst, num_segments=N, indices_are_sorted=True
    )
    h = leaky(h, drive - p["tau"] * h)
    return h, h


def _sparse_recurrent(p, x, h, taps):
    rec = jnp.zeros(N).at[_post].add(p["u"] * taps.recur(h)[_pre])
    h = leaky(h, p["w"] @ x + rec)
    return h, h


@case(
    params={"w": (N, IN), "u": normal(10, scale=1.0)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"elementwise"}},
)
def sparse_recurrent_of_few(p, x, h, taps):
    """The products of edges join no units, few as they may be."""
    return _sparse_recurrent(p, x, h, taps)


@case(
    params={"w": (N, IN), "u": normal(10, scale=1.0)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"elementwise"}},
    options={"max_slots": 2},
)
def sparse_recurrent(p, x, h, taps):
    return _sparse_recurrent(p, x, h, taps)


@case(
    params={"w": (N, IN), "u": normal(12, scale=1.0)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"elementwise"}},
    options={"max_slots": 2},
)
def sparse_recurrent_with_autapses(p, x, h, taps):
    """Two units hear themselves, and that is no recurrence to be cut."""
    pre, post = np.append(_pre, [2, 5]), np.append(_post, [2, 5])
    heard = jnp.where(pre == post, h[pre], taps.recur(h)[pre])
    rec = jax.ops.segment_sum(p["u"] * heard, post, num_segments=N)
    h = leaky(h, p["w"] @ x + rec)
    return h, h


@case(
    params={"w": (N, IN), "u": normal(10, scale=1.0)},
    state={"v": zeros(N), "g": zeros(N)},
    oracle="twin",
    units=[(N, 2)],
    ops={"['u']": {"elementwise"}},
    options={"max_slots": 2},
)
def sparse_recurrent_two_slots(p, x, state, taps):
    """The products go into a synaptic current, which feeds the membrane."""
    rate = jnp.tanh(taps.recur(state["v"]))
    g = (0.5 * state["g"]).at[_post].add(p["u"] * rate[_pre]) + p["w"] @ x
    v = leaky(state["v"], g)
    return v, {"v": v, "g": g}


def _bcoo(data, rows, columns, shape):
    indices = jnp.asarray(np.stack([rows, columns], axis=1))
    return sparse.BCOO((data, indices), shape=shape)


@case(
    params={"w": (10,), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
)
def bcoo_input(p, x, h, taps):
    h = leaky(h, _bcoo(p["w"], _dst, _src, (N, IN)) @ x - p["tau"] * h)
    return h, h


@case(
    params={"w": (N, IN), "u": normal(10, scale=1.0)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def bcoo_recurrent(p, x, h, taps):
    h = leaky(h, p["w"] @ x + _bcoo(p["u"], _post, _pre, (N, N)) @ taps.recur(h))
    return h, h
