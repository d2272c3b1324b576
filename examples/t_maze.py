"""A T-maze, learned online: a sign at the entrance says where to turn at the far end.

    python examples/t_maze.py

The agent sees a sign at the entrance and nothing in the corridor that tells, and must
turn at the junction to where the sign pointed. It can walk on, back and into walls. A
GRU gives policy and value; all weights move at every step by the error of temporal
differences, with the credit for the past in eligibility traces. Where an episode ends,
in one of 16 mazes side by side, state and trace begin anew.

Success in a corridor of 10 at last (three seeds, 50 s of CPU): D-RTRL 0.99, Immediate
0.50 - 0.87. BPTT, with an update every 16 steps: 0.49 - 0.50 for as many steps, 1.00
for as many updates, which takes 16 times as many steps.
"""

import argparse
import functools
from collections import namedtuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import eqx_etrace as etrace
from eqx_etrace import nn


WIDTH, LANES, SEGMENT = 32, 16, 16
DISCOUNT, ENTROPY = 0.98, 0.05
REST = jnp.zeros((LANES, WIDTH)), None  # the states of GRU and readout at the entrance
NORTH, EAST, SOUTH, WEST = range(4)
# Goal in the south, in the north; corridor; junction. As Bakker, NIPS 2002.
VIEWS = jnp.array([[1.0, 1, 0], [0, 1, 1], [1, 0, 1], [0, 1, 0]])
Step = namedtuple("Step", "x reset action goal end success")  # goal: of the value


def observe(north, position, corridor):
    return VIEWS[jnp.where(position == 0, 1 * north, 2 + (position == corridor))]


def make_net(key):
    one, two = jax.random.split(key)
    cell = eqx.nn.GRUCell(3, WIDTH, key=one)
    slow = cell.bias.at[WIDTH : 2 * WIDTH].add(2.0)  # units that forget slowly
    cell = eqx.tree_at(lambda cell: cell.bias, cell, slow)
    return nn.Sequential([nn.GRU(cell), eqx.nn.Linear(WIDTH, 5, key=two)])


def renewed(state, reset):
    return jax.tree.map(lambda a: jnp.where(reset[:, None], 0, a), state)


def act(net, corridor, world, key):
    """One step of all lanes by the present policy."""
    (state, north, position, reset), (one, two) = world, jax.random.split(key)
    north = jnp.where(reset, jax.random.bernoulli(one, shape=reset.shape), north)
    position = jnp.where(reset, 0, position)
    x = observe(north, position, corridor)
    out, state = jax.vmap(net)(x, renewed(state, reset))
    action = jax.random.categorical(two, out[:, :4])
    end = ((action == NORTH) | (action == SOUTH)) & (position == corridor)
    success = end & ((action == NORTH) == north)
    way = 1 * (action == EAST) - (action == WEST)
    new = jnp.clip(position + way, 0, corridor)
    reward = jnp.where(success, 4.0, jnp.where(new == position, -0.1, 0.0))
    following, _ = jax.vmap(net)(observe(north, new, corridor), state)
    goal = reward + DISCOUNT * jnp.where(end, 0.0, following[:, 4])
    return (state, north, new, end), Step(x, reset, action, goal, end, success)


def loss_fn(out, step):
    """Of actor and critic, one number a lane; the TD error is the advantage."""
    logs, error = jax.nn.log_softmax(out[:, :4]), step.goal - out[:, 4]
    chosen = jnp.take_along_axis(logs, step.action[:, None], axis=1)[:, 0]
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=1)
    return error**2 / 2 - chosen * jax.lax.stop_gradient(error) - ENTROPY * entropy


def online_gradient(net, rule):
    """A gradient from step to step, and the state and trace to begin with."""
    graph = etrace.compile(net, REST, jnp.zeros((LANES, 3)), rule, batched=True)
    drive = etrace.grad(graph, loss_fn, reduction="mean")

    def gradient(params, state, trace, steps):
        return drive(params, state, trace, steps.x, steps, reset=steps.reset)

    return gradient, [REST, etrace.init_trace(graph)]


def bptt_gradient(net):
    """The same by backpropagation through a segment of several steps."""

    def loss(params, state, steps):
        def one(state, step):
            state = renewed(state, step.reset)
            out, state = jax.vmap(eqx.combine(params, net))(step.x, state)
            return state, loss_fn(out, step)

        state, losses = jax.lax.scan(one, state, steps)
        return losses.mean(), state

    return jax.grad(loss, has_aux=True), [REST]


def train(net, gradient, memory, updates, every, corridor, key):
    """With an update every few steps; returns ends and successes of all updates."""
    params = eqx.filter(net, eqx.is_inexact_array)
    schedule = optax.linear_schedule(2e-3, 0.0, updates)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def body(carry, key):
        params, opt_state, memory, world = carry
        play = functools.partial(act, eqx.combine(params, net), corridor)
        world, steps = jax.lax.scan(play, world, jax.random.split(key, every))
        grads, *memory = gradient(params, *memory, steps)
        change, opt_state = optimiser.update(grads, opt_state)
        carry = optax.apply_updates(params, change), opt_state, memory, world
        return carry, (steps.end.sum(), steps.success.sum())

    zeros = jnp.zeros(LANES, int)
    carry = params, optimiser.init(params), memory, (REST, zeros > 0, zeros, zeros < 1)
    keys = jax.random.split(key, updates)
    return jax.jit(functools.partial(jax.lax.scan, body))(carry, keys)[1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corridor", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a short form")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    corridor, steps = (5, 3000) if args.quick else (args.corridor, 20_000)
    init, play = jax.random.split(jax.random.key(args.seed))
    net = make_net(init)
    methods = {
        "D-RTRL": (online_gradient(net, etrace.DRTRL()), steps, 1),
        "Immediate": (online_gradient(net, etrace.Immediate()), steps, 1),
        "BPTT, as many steps": (bptt_gradient(net), steps // SEGMENT, SEGMENT),
        "BPTT, as many updates": (bptt_gradient(net), steps, SEGMENT),
    }
    print(f"corridor {corridor}, {LANES} lanes: success in the last fifth")
    for name, (gradient, updates, every) in methods.items():
        ends, successes = train(net, *gradient, updates, every, corridor, play)
        successes, ends = (a[-updates // 5 :].sum() for a in (successes, ends))
        print(f"{name}, {updates} updates: {successes / ends:.3f}", flush=True)


if __name__ == "__main__":
    main()
