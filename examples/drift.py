"""Adaptation to drift: a plant changes on the way, and a network that learns online
follows it.

    python examples/drift.py

The plant is a weight on a damped spring, seen by a sensor that saturates. A force,
random at every step, drives it, and in the middle of the stream the spring stiffens:
it swings twice as fast. An LSTM hears the force alone and says at every step what the
sensor shows, so that it has to carry a state of its own; then it is told the error, and
its weights move. There is one stream and nothing is seen twice.

Normalised squared errors (three seeds, 15 s of CPU): before the change, over the 500
steps after it, and 30 000 steps later. Held are the weights that D-RTRL had found
before. Truncated BPTT goes back ten steps at every step, at ten times the work.

    D-RTRL       0.020 - 0.033    0.28 - 0.44    0.019 - 0.024
    held                          1.09 - 1.33    1.08 - 1.16
    Immediate    0.048 - 0.107    0.26 - 0.35    0.12 - 0.24
    BPTT         0.006 - 0.010    0.17 - 0.20    0.002 - 0.003
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqx_etrace as etrace
from eqx_etrace import nn


WIDTH = 16
DAMPING, SLOW, FAST = 0.9, 0.3, 0.6  # the factor and the angle of a step
HISTORY = 10  # steps that truncated BPTT goes back at each update
SETTLED, SHOCK = 2000, 500  # steps over which an error is averaged
RULES = {"D-RTRL": etrace.DRTRL(), "Immediate": etrace.Immediate()}


def plant(forces):
    """What the sensor shows; the spring stiffens after half of the steps."""
    half = len(forces) // 2

    def one(position, inputs):
        force, number = inputs
        angle = jnp.where(number < half, SLOW, FAST)
        turn = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))
        position = DAMPING * turn * position + 0.5 * force
        return position, jnp.tanh(1.5 * position.real)

    numbers = jnp.arange(len(forces))
    return jax.lax.scan(one, jnp.zeros(1, complex), (forces, numbers))[1]


def make_net(key):
    one, two = jax.random.split(key)
    cell = nn.LSTM(eqx.nn.LSTMCell(1, WIDTH, key=one))
    return nn.Sequential([cell, eqx.nn.Linear(WIDTH, 1, key=two)])


def squared_error(out, target):
    return jnp.sum((out - target) ** 2)


def run(net, state, xs):
    """Outputs and states of every step, without learning."""

    def one(state, x):
        out, state = net(x, state)
        return state, (out, state)

    return jax.lax.scan(one, state, xs)[1]


def online(net, rule, optimiser, xs, targets):
    """Errors of all steps, and of the second half with the weights held from there."""
    state, half = net.init_state(), len(xs) // 2
    graph = etrace.compile(net, state, xs[0], rule)
    params = graph.params(net)
    fun = jax.jit(etrace.learn(graph, squared_error, optimiser, every=1))
    carry = params, optimiser.init(params), state, etrace.init_trace(graph)
    first, *carry = fun(*carry, xs[:half], targets[:half])
    outs, _ = eqx.filter_jit(run)(graph.model(carry[0]), carry[2], xs[half:])
    held = jax.vmap(squared_error)(outs, targets[half:])
    second, *_ = fun(*carry, xs[half:], targets[half:])
    return jnp.concatenate([first, second]), jnp.concatenate([first, held])


@eqx.filter_jit
def truncated_bptt(net, optimiser, xs, targets):
    """The same by backpropagation through the last few steps, at every step."""
    params, static = eqx.partition(net, eqx.is_inexact_array)
    padded = jnp.concatenate([jnp.zeros((HISTORY - 1, 1)), xs])
    recent = jnp.arange(len(xs))[:, None] + jnp.arange(HISTORY)

    def body(carry, inputs):
        params, opt_state, state = carry
        indices, target = inputs

        def loss(params):
            outs, states = run(eqx.combine(params, static), state, padded[indices])
            # The next history starts one step later.
            return squared_error(outs[-1], target), jax.tree.map(lambda s: s[0], states)

        (error, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), error

    carry = params, optimiser.init(params), net.init_state()
    return jax.lax.scan(body, carry, (recent, targets))[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="default: 60000, 16000 with --quick")
    parser.add_argument("--quick", action="store_true", help="a short form")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    steps = args.steps or (16_000 if args.quick else 60_000)
    half = steps // 2
    data, init = jax.random.split(jax.random.key(args.seed))
    forces = jax.random.uniform(data, (steps, 1), minval=-1.0, maxval=1.0)
    targets = plant(forces)
    net = make_net(init)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def report(name, errors):
        first, second = errors[:half], errors[half:]
        spans = first[-SETTLED:], second[:SHOCK], second[-SETTLED:]
        var = targets[:half].var(), targets[half:].var()
        before, after, later = (span.mean() for span in spans)
        before, after, later = before / var[0], after / var[1], later / var[1]
        print(f"{name:16s}{before:8.4f}{after:8.4f}{later:8.4f}")

    print(f"NMSE over {steps} steps, a change after {half}")
    print(f"{'':16s}  before   after  at last")
    for name, rule in RULES.items():
        errors, held = online(net, rule, optimiser, forces, targets)
        report(name, errors)
        if name == "D-RTRL":
            report("D-RTRL, held", held)
    report(f"BPTT, {HISTORY} steps", truncated_bptt(net, optimiser, forces, targets))


if __name__ == "__main__":
    main()
