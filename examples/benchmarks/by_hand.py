"""The derivatives of the cells of `workloads.py`, worked out on paper.

A cell is written as new slots h' of every unit, as functions of its old slots h and of
products y = W x. `Derivatives` has dh'/dh of the same unit and dh'/dy, the path through
the recurrent product left out, as D-RTRL leaves it out. All take arrays of any leading
axes: one step of a batch, or a whole window of them.

A linear synapse, g' = 0.9 g + y, has the same trace for all units: its input filtered
by 0.9, a vector. A `folded` cell has no slot g but reads that filtered input in place
of x. A tanh cell forgets its own past, and folded it has no trace at all.

Weights that share an input are one block, the bias a column of it.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import traces
from jaxtyping import Array
from network import CURRENT_DECAY, MEMBRANE_DECAY, THRESHOLD, spike, surrogate
from workloads import ADAPTATION, ADAPTATION_DECAY


class Use(NamedTuple):
    """What a block of weights multiplies, and what comes of its product y."""

    x: Array
    drive: dict[str, Array | float]  # dh'/dy of each slot that y reaches


class Derivatives(NamedTuple):
    decay: dict[tuple[str, str], Array | float]  # dh'/dh, by (slot of h', slot of h)
    uses: dict[str, Use]


def beside(*parts):
    """Vectors end to end, then a 1 for the bias."""
    one = jnp.ones((*parts[0].shape[:-1], 1), parts[0].dtype)
    return jnp.concatenate([*parts, one], axis=-1)


def joint_shape(cell):
    """That of w_in, w_rec and b side by side."""
    units, inputs = cell.w_in.shape
    return units, inputs + units + 1


def split_weights(cell, block):
    """The gradient of (w_in, w_rec, b) from that of a block that holds all three."""
    inputs = cell.w_in.shape[1]
    return dataclasses.replace(
        cell, w_in=block[:, :inputs], w_rec=block[:, inputs:-1], b=block[:, -1]
    )


@dataclasses.dataclass(frozen=True)
class TanhByHand:
    folded: bool = True
    slots = ("h",)
    input_decay = None

    @property
    def traced(self):
        """The slots that the next step reads."""
        return () if self.folded else ("h",)

    def blocks(self, cell):
        """The shapes of the blocks of weights."""
        return {"w": joint_shape(cell)}

    def feed(self, cell, x):
        """The part of the step that does not wait for the state."""
        return x @ cell.w_in.T + cell.b

    def advance(self, cell, h, fed):
        """The new state, and what of the step the derivatives need besides."""
        return jnp.tanh(fed + h @ cell.w_rec.T), None

    def derive(self, cell, h, new, kept, x):
        none = {} if self.folded else {("h", "h"): jnp.zeros_like(h)}
        return Derivatives(none, {"w": Use(beside(x, h), {"h": 1 - new**2})})

    def signal(self, cell, new, into_read):
        """dL/dh' of each slot from dL/d(what the readout reads)."""
        return {"h": into_read}

    def gradient(self, cell, blocks):
        return split_weights(cell, blocks["w"])


@dataclasses.dataclass(frozen=True)
class GRUByHand:
    """h' = n + z (h - n), with n = tanh(y_x + r y_h) and two gates r and z."""

    folded: bool = True
    slots = traced = ("h",)
    input_decay = None

    def blocks(self, cell):
        inputs, units = cell.cell.input_size, cell.cell.hidden_size
        return {
            "gates": (2 * units, inputs + units + 1),
            "new_x": (units, inputs + 1),
            "new_h": (units, units + 1),
        }

    def feed(self, cell, x):
        return x @ cell.cell.weight_ih.T + cell.cell.bias

    def advance(self, cell, h, fed):
        from_x = jnp.split(fed, 3, axis=-1)
        from_h = jnp.split(h @ cell.cell.weight_hh.T, 3, axis=-1)
        r = jax.nn.sigmoid(from_x[0] + from_h[0])
        z = jax.nn.sigmoid(from_x[1] + from_h[1])
        y_h = from_h[2] + cell.cell.bias_n
        n = jnp.tanh(from_x[2] + r * y_h)
        return n + z * (h - n), (r, z, n, y_h)

    def derive(self, cell, h, new, kept, x):
        r, z, n, y_h = kept
        into_n = (1 - z) * (1 - n**2)
        gates = into_n * y_h * r * (1 - r), (h - n) * z * (1 - z)
        uses = {
            "gates": Use(beside(x, h), {"h": jnp.concatenate(gates, axis=-1)}),
            "new_x": Use(beside(x), {"h": into_n}),
            "new_h": Use(beside(h), {"h": into_n * r}),
        }
        return Derivatives({("h", "h"): z}, uses)

    def signal(self, cell, new, into_read):
        return {"h": into_read}

    def gradient(self, cell, blocks):
        gates, new_x, new_h = blocks["gates"], blocks["new_x"], blocks["new_h"]
        inputs = cell.cell.input_size
        grads = (
            jnp.concatenate([gates[:, :inputs], new_x[:, :-1]]),
            jnp.concatenate([gates[:, inputs:-1], new_h[:, :-1]]),
            jnp.concatenate([gates[:, -1], new_x[:, -1]]),
            new_h[:, -1],
        )

        def weights(cell):
            inner = cell.cell
            return inner.weight_ih, inner.weight_hh, inner.bias, inner.bias_n

        return eqx.tree_at(weights, cell, grads)


@dataclasses.dataclass(frozen=True)
class LIFByHand:
    """g' = 0.9 g + y and v' = k (v - z) + (1 - k) g', with the spike z of v."""

    folded: bool = True
    slots = ("g", "v")

    @property
    def input_decay(self):
        return CURRENT_DECAY if self.folded else None

    @property
    def traced(self):
        return ("v",) if self.folded else ("g", "v")

    def blocks(self, cell):
        return {"w": joint_shape(cell)}

    def feed(self, cell, x):
        return x @ cell.w_in.T + cell.b

    def over(self, state):
        """How far the membrane is above its threshold."""
        return state[1] - THRESHOLD

    def advance(self, cell, state, fed):
        g, v, *_ = state
        z = spike(self.over(state))
        g = CURRENT_DECAY * g + fed + z @ cell.w_rec.T
        v = MEMBRANE_DECAY * (v - z) + (1 - MEMBRANE_DECAY) * g
        return (g, v), None

    def derive(self, cell, old, new, kept, x):
        slope = surrogate(self.over(old))
        return self.with_current(self.own_decay(slope), x, spike(self.over(old)))

    def own_decay(self, slope):
        return {("v", "v"): MEMBRANE_DECAY * (1 - slope)}

    def with_current(self, decay, x, z):
        part = 1 - MEMBRANE_DECAY
        drive: dict[str, Array | float] = {"v": part}
        if not self.folded:
            drive["g"] = 1.0
            decay = decay | {("g", "g"): CURRENT_DECAY}
            decay |= {("v", "g"): part * CURRENT_DECAY}
        return Derivatives(decay, {"w": Use(beside(x, z), drive)})

    def signal(self, cell, new, into_read):
        return {"v": into_read * surrogate(self.over(new))}

    def gradient(self, cell, blocks):
        return split_weights(cell, blocks["w"])


@dataclasses.dataclass(frozen=True)
class ALIFByHand(LIFByHand):
    """The same with a' = rho a + z, and the spike z of v - beta a."""

    slots = ("g", "v", "a")

    @property
    def traced(self):
        return (*super().traced, "a")

    def over(self, state):
        return state[1] - THRESHOLD - ADAPTATION * state[2]

    def advance(self, cell, state, fed):
        new, _ = super().advance(cell, state, fed)
        a = ADAPTATION_DECAY * state[2] + spike(self.over(state))
        return (*new, a), None

    def own_decay(self, slope):
        return {
            ("v", "v"): MEMBRANE_DECAY * (1 - slope),
            ("v", "a"): MEMBRANE_DECAY * ADAPTATION * slope,
            ("a", "v"): slope,
            ("a", "a"): ADAPTATION_DECAY - ADAPTATION * slope,
        }

    def signal(self, cell, new, into_read):
        into_v = into_read * surrogate(self.over(new))
        return {"v": into_v, "a": -ADAPTATION * into_v}


BY_HAND = {"rnn": TanhByHand, "gru": GRUByHand, "lif": LIFByHand, "alif": ALIFByHand}


# What the rules need of one step, or of a window of steps.


def read_out(hand, net, new, y):
    """Loss and gradient of the readout, and l = dL/dh'."""
    read, weight = net.cell.read(new), net.readout.weight
    flat = read.reshape(-1, read.shape[-1])
    difference = flat @ weight.T + net.readout.bias - y.reshape(-1, y.shape[-1])
    error = difference / y.shape[-2]
    grads = error.T @ flat, jnp.sum(error, axis=0)
    readout = eqx.tree_at(lambda r: (r.weight, r.bias), net.readout, grads)
    into_read = (error @ weight).reshape(read.shape)
    signal = hand.signal(net.cell, new, into_read)
    return (0.5 * jnp.sum(difference * error), readout), signal


def observe_step(hand, net, state, x, y):
    new, kept = hand.advance(net.cell, state, hand.feed(net.cell, x))
    derivatives = hand.derive(net.cell, state, new, kept, x)
    return new, derivatives, *read_out(hand, net, new, y)


def observe_window(hand, net, state, xs, ys):
    """The loop makes new states and no more; all else is done for all steps at once."""

    def body(state, fed):
        new, kept = hand.advance(net.cell, state, fed)
        return new, (new, kept)

    last, (new, kept) = jax.lax.scan(body, state, hand.feed(net.cell, xs))
    old = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), state, new)
    derivatives = hand.derive(net.cell, old, new, kept, xs)
    return last, derivatives, *read_out(hand, net, new, ys)


def filter_inputs(hand, uses, filtered):
    """The inputs that a folded synapse lets through, and the last ones; of one step or,
    with one axis more, of a window."""
    if hand.input_decay is None:
        return uses, filtered

    def let_through(old, x):
        new = hand.input_decay * old + x
        return new, new

    seen, last = {}, {}
    for name, use in uses.items():
        run = jax.lax.scan if use.x.ndim == 3 else lambda body, *args: body(*args)
        last[name], x = run(let_through, filtered[name], use.x)
        seen[name] = use._replace(x=x)
    return seen, last


def tile(vectors, rows):
    """Vectors of the units for a block with several rows a unit."""
    return {
        key: jnp.concatenate([v] * (rows // v.shape[-1]), axis=-1)
        if isinstance(v, jax.Array) and v.shape[-1] < rows
        else v
        for key, v in vectors.items()
    }


def driven(signal, drive):
    """sum_s l_s f_s at the rows of a block."""
    return traces.total_of([signal[s] * f for s, f in drive.items() if s in signal])


def zero_totals(hand, net):
    """Loss, gradient of the readout and of the blocks, for their sums over steps."""
    blocks = {k: jnp.zeros(shape) for k, shape in hand.blocks(net.cell).items()}
    return (jnp.zeros(()), jax.tree.map(jnp.zeros_like, net.readout)), blocks


def as_gradient(hand, net, seen, blocks):
    loss, readout = seen
    cell = hand.gradient(net.cell, blocks)
    return loss, dataclasses.replace(net, cell=cell, readout=readout)
