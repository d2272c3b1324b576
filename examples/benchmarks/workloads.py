"""Four recurrent networks, what they are fed, and their gradient through time.

`Net` makes one step of one sample. Each cell leaves all that a loss sees to its new
state. With `local=True` it cuts the gradient on its way into the recurrent product:
trained by BPTT, such a twin has exactly the gradient that D-RTRL gives the network.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from network import (
    CURRENT_DECAY,
    MEMBRANE_DECAY,
    THRESHOLD,
    loss_fn as loss_fn,
    spike,
)


ADAPTATION_DECAY = 0.98
ADAPTATION = 0.2
OUTPUTS = 10


class Weights(eqx.Module):
    """A product with the input and one with what is fed back."""

    w_in: Array
    w_rec: Array
    b: Array
    local: bool = eqx.field(static=True, default=False)

    def drive(self, x, fed_back):
        cut = jax.lax.stop_gradient if self.local else lambda value: value
        return self.w_in @ x + self.b + self.w_rec @ cut(fed_back)


class TanhCell(Weights):
    """The state is h."""

    def __call__(self, x, h):
        return jnp.tanh(self.drive(x, h))

    @staticmethod
    def read(h):
        return h


class GRUCell(eqx.Module):
    """`equinox.nn.GRUCell`, and the same in plain sight where a twin cuts it."""

    cell: eqx.nn.GRUCell
    local: bool = eqx.field(static=True, default=False)

    def __call__(self, x, h):
        if not self.local:
            return self.cell(x, h)
        from_x = jnp.split(self.cell.weight_ih @ x + self.cell.bias, 3)
        from_h = jnp.split(self.cell.weight_hh @ jax.lax.stop_gradient(h), 3)
        r = jax.nn.sigmoid(from_x[0] + from_h[0])
        z = jax.nn.sigmoid(from_x[1] + from_h[1])
        n = jnp.tanh(from_x[2] + r * (from_h[2] + self.cell.bias_n))
        return n + z * (h - n)

    @staticmethod
    def read(h):
        return h


class LIFCell(Weights):
    """Leaky integrate-and-fire, as in `network.py` with the gradient through the reset.

    The state is (current g, membrane v).
    """

    def __call__(self, x, state):
        g, v = state
        z = self.read(state)
        g = CURRENT_DECAY * g + self.drive(x, z)
        v = MEMBRANE_DECAY * (v - z) + (1 - MEMBRANE_DECAY) * g
        return g, v

    @staticmethod
    def read(state):
        return spike(state[1] - THRESHOLD)


class ALIFCell(Weights):
    """The same with a threshold that every spike raises: the state is (g, v, a)."""

    def __call__(self, x, state):
        g, v, a = state
        z = self.read(state)
        g = CURRENT_DECAY * g + self.drive(x, z)
        v = MEMBRANE_DECAY * (v - z) + (1 - MEMBRANE_DECAY) * g
        return g, v, ADAPTATION_DECAY * a + z

    @staticmethod
    def read(state):
        return spike(state[1] - THRESHOLD - ADAPTATION * state[2])


class Net(eqx.Module):
    cell: TanhCell | GRUCell | LIFCell | ALIFCell
    readout: eqx.nn.Linear

    def __call__(self, x, state):
        state = self.cell(x, state)
        return self.readout(self.cell.read(state)), state


def draw_weights(kind, key, inputs, units, gains):
    """Random weights; gains in units of one over the root of the fan-in."""
    keys = jax.random.split(key, 3)
    return kind(
        w_in=gains[0] * jax.random.normal(keys[0], (units, inputs)) / inputs**0.5,
        w_rec=gains[1] * jax.random.normal(keys[1], (units, units)) / units**0.5,
        b=gains[2] * jax.random.normal(keys[2], (units,)),
    )


class Workload(NamedTuple):
    inputs: int
    units: int
    slots: tuple[str, ...]  # the state variables of a unit
    init_cell: Callable


WORKLOADS = {
    "rnn": Workload(
        64, 256, ("h",),
        lambda *args: draw_weights(TanhCell, *args, gains=(1.0, 1.0, 0.1)),
    ),
    "gru": Workload(
        64, 256, ("h",),
        lambda key, inputs, units: GRUCell(eqx.nn.GRUCell(inputs, units, key=key)),
    ),
    "lif": Workload(
        100, 512, ("g", "v"),
        lambda *args: draw_weights(LIFCell, *args, gains=(1.5, 1.0, 0.3)),
    ),
    "alif": Workload(
        100, 512, ("g", "v", "a"),
        lambda *args: draw_weights(ALIFCell, *args, gains=(1.5, 1.0, 0.3)),
    ),
}  # fmt: skip


def init_net(key, name, inputs=None, units=None, outputs=OUTPUTS):
    load = WORKLOADS[name]
    inputs, units = inputs or load.inputs, units or load.units
    keys = jax.random.split(key)
    readout = eqx.nn.Linear(units, outputs, key=keys[1])
    return Net(load.init_cell(keys[0], inputs, units), readout)


def twin(net):
    """The network with the gradient cut where it enters the recurrent product."""
    return dataclasses.replace(net, cell=dataclasses.replace(net.cell, local=True))


def init_state(net, name, batch):
    slots, units = WORKLOADS[name].slots, net.readout.in_features
    state = tuple(jnp.zeros((batch, units)) for _ in slots)
    return state if len(slots) > 1 else state[0]


def init_data(key, net, name, steps, batch):
    """Inputs and targets, time first."""
    cell = net.cell.cell.weight_ih if name == "gru" else net.cell.w_in
    keys = jax.random.split(key)
    shapes = (steps, batch, cell.shape[1]), (steps, batch, net.readout.out_features)
    return tuple(map(jax.random.normal, keys, shapes))


def losses_of(net, state, xs, ys):
    """The summed loss of a sequence, and its last state."""

    def body(state, xy):
        out, state = jax.vmap(net)(xy[0], state)
        return state, loss_fn(out, xy[1])

    state, losses = jax.lax.scan(body, state, (xs, ys))
    return jnp.sum(losses), state


def in_windows(fun, carry, sequences, length):
    """Folds `fun(carry, sequences) -> carry` over windows of `length` steps, and over
    what is left at the end."""
    steps = len(jax.tree.leaves(sequences)[0])
    whole = steps - steps % length
    if whole > length:
        count = whole // length

        def cut(a):
            return a[:whole].reshape(count, length, *a.shape[1:])

        def body(carry, window):
            return fun(carry, window), None

        carry, _ = jax.lax.scan(body, carry, jax.tree.map(cut, sequences))
    elif whole:
        carry = fun(carry, jax.tree.map(lambda a: a[:whole], sequences))
    if steps > whole:
        carry = fun(carry, jax.tree.map(lambda a: a[whole:], sequences))
    return carry


def bptt(net, state, xs, ys):
    """The loss and gradient by differentiating the whole sequence, and the state."""
    fun = jax.value_and_grad(losses_of, has_aux=True)
    (loss, state), grads = fun(net, state, xs, ys)
    return loss, grads, state


def checkpointed_bptt(net, state, xs, ys):
    """The same, but what lies within a chunk is computed again on the way back."""
    length = round(len(xs) ** 0.5)

    def loss(net):
        @jax.checkpoint
        def chunk(carry, xy):
            loss, state = losses_of(net, carry[1], *xy)
            return carry[0] + loss, state

        return in_windows(chunk, (jnp.zeros(()), state), (xs, ys), length)

    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(net)
    return value, grads, state


def truncated_bptt(net, state, xs, ys, *, window):
    """The same, cut after every `window` steps."""

    def chunk(carry, xy):
        total, grads, state = carry
        loss, new, state = bptt(net, state, *xy)
        return total + loss, jax.tree.map(jnp.add, grads, new), state

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, net), state
    return in_windows(chunk, start, (xs, ys), window)
