"""Store and recall: adaptive spiking neurons keep a bit, with e-prop.

    python examples/store_recall.py

A bit comes every 200 ms. The network has to keep the one that is shown with a store
command, and to give it back at the next recall command: the task of Bellec et al. 2018
in steps of 10 ms, twelve bits, T = 240 (six with --quick). It is kept in thresholds
that rise with each spike and fall in 1.2 s. The readout is leaky, and e-prop filters
its traces as the readout filters spikes.

Accuracy of recalls, seeds 0, 1, 2: e-prop 0.98, 1.00, 0.99, BPTT 1.00 thrice, in 90
seconds on two cores; with --quick 0.98 to 0.99 and 0.99 to 1.00, in 30.
"""

import argparse
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import eqx_etrace as etrace
from eqx_etrace import nn, tasks


UNITS, CHANNELS, BATCH = 100, 40, 32
DT, TAU = 10.0, 20.0  # ms: a step, and what membranes and readout forget with
loss_fn = optax.softmax_cross_entropy_with_integer_labels
RULE = etrace.EProp(kappa=math.exp(-DT / TAU), normalised=True)


class Net(eqx.Module):
    """Recurrent adaptive neurons, and a leaky readout."""

    inputs: nn.Dense
    layer: nn.Recurrent
    readout: nn.LeakyReadout

    def __init__(self, *, key):
        one, two, three = jax.random.split(key, 3)
        spike = nn.triangle(scale=0.3)
        memory = {"tau_a": 1200.0, "beta": 0.2}
        neuron = nn.ALIF(UNITS, tau=TAU, resistance=4.0, dt=DT, spike=spike, **memory)
        self.inputs = nn.Dense(CHANNELS, UNITS, use_bias=False, key=one)
        self.layer = nn.Recurrent(neuron, key=two)
        self.readout = nn.LeakyReadout(UNITS, 2, tau=TAU, dt=DT, key=three)

    def init_state(self):
        return self.layer.init_state(), self.readout.init_state()

    def __call__(self, x, state):
        layer, readout = state
        drive, _ = self.inputs(x)
        spikes, layer = self.layer(drive, layer)
        out, readout = self.readout(spikes, readout)
        return out, (layer, readout)


def rest(net, size):
    return jax.tree.map(lambda a: jnp.zeros((size, *a.shape)), net.init_state())


@partial(jax.jit, static_argnums=(1, 2))
def make_batch(key, size, periods):
    """Inputs, targets and mask with time in front."""
    options = {"periods": periods, "period_steps": 20, "rate": 0.5}
    task = partial(tasks.store_recall, **options)
    return jax.vmap(task, out_axes=1)(jax.random.split(key, size))


def forward(net, state, xs):
    """The outputs of the plain model at every step."""

    def body(state, x):
        out, state = jax.vmap(net)(x, state)
        return state, out

    return jax.lax.scan(body, state, xs)[1]


def online(graph, state):
    """The gradient of e-prop, forward in time."""
    drive = etrace.value_and_grad(graph, loss_fn, reduction="mean")
    return lambda params, *batch: drive(params, state, None, *batch)[1]


def bptt(graph, state):
    """The gradient of the same loss, backward in time."""

    def loss(params, xs, targets, mask):
        losses = loss_fn(forward(graph.model(params), state, xs), targets)
        return jnp.mean(losses, where=mask)

    return jax.grad(loss)


def train(gradient, params, data, updates, key, name):
    """Adam on fresh batches; the same key gives the same batches."""
    schedule = optax.cosine_decay_schedule(1e-2, updates)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = optimiser.init(params)

    @jax.jit
    def update(params, opt_state, key):
        grads = gradient(params, *data(key, BATCH))
        change, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, change), opt_state

    for one in tqdm(jax.random.split(key, updates), name):
        params, opt_state = update(params, opt_state, one)
    return params


@eqx.filter_jit
def accuracy(net, xs, targets, mask):
    """The share of recalls whose logits, added up over the period, give the bit."""
    outs = forward(net, rest(net, xs.shape[1]), xs)
    parts = [a.reshape(-1, 20, *a.shape[1:]) for a in (outs, targets, mask)]
    votes, bits, counts = parts
    right = votes.sum(1).argmax(-1) == bits[:, 0]
    return jnp.mean(right, where=counts[:, 0])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short form")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    periods, updates = (6, 100) if args.quick else (12, 300)

    model_key, train_key, test_key = jax.random.split(jax.random.key(args.seed), 3)
    data = partial(make_batch, periods=periods)
    test = data(test_key, 1000)
    net = Net(key=model_key)
    state, x = rest(net, BATCH), jnp.zeros((BATCH, CHANNELS))
    # The time constants of the readout stay what the filter takes them for.
    trained = jax.tree.map(eqx.is_inexact_array, net)
    trained = eqx.tree_at(lambda net: net.readout.raw_tau, trained, False)
    graph = etrace.compile(net, state, x, RULE, batched=True, trainable=trained)
    for name, make_gradient in {"e-prop": online, "BPTT": bptt}.items():
        gradient, start = make_gradient(graph, state), graph.params(net)
        params = train(gradient, start, data, updates, train_key, name)
        print(f"{name}: accuracy {accuracy(graph.model(params), *test):.3f}")


if __name__ == "__main__":
    main()
