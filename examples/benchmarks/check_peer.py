"""Compares ES-D-RTRL with `pp_prop` of braintrace, weight by weight.

On networks whose state variables do not act on each other within a step: elsewhere
braintrace counts such paths twice. Biases are left out, for it scales them otherwise.
Run it where braintrace is installed: `python check_peer.py`.
"""

import warnings

import brainstate
import braintrace
import jax
import numpy as np
from handwritten import relative_error
from windows_peer import PEERS, PeerNet
from workloads import (
    MEMBRANE_DECAY,
    THRESHOLD,
    Net,
    Weights,
    init_data,
    init_net,
    init_state,
    loss_fn,
    spike,
)

import eqx_etrace as etrace


DECAY, BATCH, STEPS = 0.9, 4, 25


class MembraneCell(Weights):
    """Leaky integrate-and-fire without a current."""

    def __call__(self, x, v):
        z = self.read(v)
        return MEMBRANE_DECAY * (v - z) + self.drive(x, z)

    @staticmethod
    def read(v):
        return spike(v - THRESHOLD)


class PeerMembrane(PeerNet):
    def advance(self, x):
        v = self.h0.value
        z = spike(v - THRESHOLD)
        self.h0.value = MEMBRANE_DECAY * (v - z) + self.drive(x, z)
        return spike(self.h0.value - THRESHOLD)


def networks():
    """Name, network, state, data and the peer's class."""
    for name in ("rnn", "gru", "lif"):
        net = init_net(jax.random.key(0), name, inputs=9, units=16, outputs=3)
        xs, ys = init_data(jax.random.key(1), net, name, STEPS, BATCH)
        state, peer = init_state(net, name, BATCH), PEERS[name]
        if name == "lif":
            cell = MembraneCell(net.cell.w_in, net.cell.w_rec, net.cell.b)
            net, state, peer = Net(cell, net.readout), state[0], PeerMembrane
        yield name, net, state, xs, ys, peer


def of_library(net, state, xs, ys):
    rule = etrace.ESDRTRL(DECAY)
    graph = etrace.compile(net, state, xs[0], rule, batched=True)
    fun = jax.jit(etrace.value_and_grad(graph, loss_fn))
    return fun(graph.params(net), state, None, xs, ys)[1]


def of_peer(net, xs, ys, peer):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ETP primitive .* no connected hidden states")
        learner = braintrace.compile(
            peer(net), braintrace.pp_prop, xs[0], batch_size=BATCH, decay_or_rank=DECAY
        )

    @brainstate.transform.jit
    def run(xs, ys):
        def at_step(x, y):
            return loss_fn(learner(x), y)

        return learner.etrace_grad(
            xs, ys, step_fn=at_step, reduction="sum", return_value=True
        )

    return run(xs, ys)[0]


def matrices(tree):
    """The weights of two axes but the readout's, as a set that needs no names."""
    found = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if leaf.ndim == 2]
    return [leaf for leaf in found if 3 not in leaf.shape]


def side_by_side(ours, theirs):
    """Our gradients, each with the peer's of the same weight: that which is nearest."""
    parts = []
    for leaf in matrices(ours.cell):
        thirds = len(leaf) == 48
        parts += np.split(leaf, 3) if thirds else [leaf]
    others = [leaf.T for leaf in matrices(theirs)]
    for part in parts:
        gaps = [
            float(relative_error(other, part))
            for other in others
            if other.shape == part.shape
        ]
        yield min(gaps)


def main():
    for name, net, state, xs, ys, peer in networks():
        gaps = list(
            side_by_side(of_library(net, state, xs, ys), of_peer(net, xs, ys, peer))
        )
        print(f"{name}: {len(gaps)} weights, at most {max(gaps):.0e} apart")
        assert max(gaps) < 1e-4, name


if __name__ == "__main__":
    main()
