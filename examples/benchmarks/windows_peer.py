"""The networks of `workloads.py` in braintrace, for the comparison in `windows.py`.

Imported only where braintrace is installed. It finds a weight only where it goes
through its own `matmul`.
"""

import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
from windows_by_hand import ES_DECAY
from workloads import (
    ADAPTATION,
    ADAPTATION_DECAY,
    CURRENT_DECAY,
    MEMBRANE_DECAY,
    THRESHOLD,
    loss_fn,
    spike,
)


def weight_of(weight, bias=None):
    found = {"weight": weight.T}
    return brainstate.ParamState(found if bias is None else found | {"bias": bias})


def times(x, state):
    value = state.value
    if "bias" in value:
        return braintrace.matmul(x, value["weight"], value["bias"])
    return braintrace.matmul(x, value["weight"])


class PeerNet(brainstate.nn.Module):
    """`slots` hidden states; a cell says how they go on and what the readout sees."""

    slots = 1

    def __init__(self, net):
        super().__init__()
        self.units = net.readout.in_features
        self.w_out = weight_of(net.readout.weight, net.readout.bias)
        self.make_weights(net.cell)

    def make_weights(self, cell):
        self.w_in = weight_of(cell.w_in, cell.b)
        self.w_rec = weight_of(cell.w_rec)

    def init_state(self, batch_size=None):
        shape = (self.units,) if batch_size is None else (batch_size, self.units)
        for slot in range(self.slots):
            setattr(self, f"h{slot}", brainstate.HiddenState(jnp.zeros(shape)))

    def drive(self, x, fed_back):
        return times(x, self.w_in) + times(fed_back, self.w_rec)

    def update(self, x):
        return times(self.advance(x), self.w_out)


class PeerTanh(PeerNet):
    def advance(self, x):
        self.h0.value = jnp.tanh(self.drive(x, self.h0.value))
        return self.h0.value


class PeerGRU(PeerNet):
    """A weight for each gate, as braintrace wants one output a unit."""

    def make_weights(self, cell):
        def thirds(a):
            return jnp.split(a, 3)

        cell = cell.cell
        pairs = zip(thirds(cell.weight_ih), thirds(cell.bias), strict=True)
        self.from_x = [weight_of(*pair) for pair in pairs]
        r, z, n = thirds(cell.weight_hh)
        self.from_h = [weight_of(r), weight_of(z), weight_of(n, cell.bias_n)]

    def advance(self, x):
        h = self.h0.value
        y = [times(x, w) for w in self.from_x]
        u = [times(h, w) for w in self.from_h]
        r, z = jax.nn.sigmoid(y[0] + u[0]), jax.nn.sigmoid(y[1] + u[1])
        n = jnp.tanh(y[2] + r * u[2])
        self.h0.value = n + z * (h - n)
        return self.h0.value


class PeerLIF(PeerNet):
    slots = 2

    def spikes(self):
        return spike(self.h1.value - THRESHOLD)

    def advance(self, x):
        z = self.spikes()
        self.h0.value = CURRENT_DECAY * self.h0.value + self.drive(x, z)
        kept = MEMBRANE_DECAY * (self.h1.value - z)
        self.h1.value = kept + (1 - MEMBRANE_DECAY) * self.h0.value
        self.adapt(z)
        return self.spikes()

    def adapt(self, z):
        pass


class PeerALIF(PeerLIF):
    slots = 3

    def spikes(self):
        return spike(self.h1.value - THRESHOLD - ADAPTATION * self.h2.value)

    def adapt(self, z):
        self.h2.value = ADAPTATION_DECAY * self.h2.value + z


PEERS = {"rnn": PeerTanh, "gru": PeerGRU, "lif": PeerLIF, "alif": PeerALIF}


def runner(job, *, algorithm, vmap=False):
    """A function without arguments that runs the sequence and returns its loss."""
    options = {"decay_or_rank": ES_DECAY} if algorithm == "pp_prop" else {}
    rule = getattr(braintrace, algorithm)
    with warnings.catch_warnings():  # That the readout has no trace is as it should be.
        warnings.filterwarnings("ignore", "ETP primitive .* no connected hidden states")
        learner = braintrace.compile(
            PEERS[job.name](job.net),
            rule,
            job.xs[0],
            batch_size=job.batch,
            vmap=vmap,
            **options,
        )

    def step_loss(x, y):
        return loss_fn(learner(x), y)

    @brainstate.transform.jit
    def run(xs, ys):
        return learner.etrace_grad(
            xs, ys, step_fn=step_loss, reduction="sum", return_value=True
        )

    def loss_and_no_gradient():
        grads, losses = jax.block_until_ready(run(job.xs, job.ys))
        del grads  # In a layout of its own, and of a rule that counts paths twice.
        return jnp.sum(losses), None

    return loss_and_no_gradient
