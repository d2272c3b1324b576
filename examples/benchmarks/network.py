"""The network of the benchmarks: spiking, recurrent, with a synaptic current."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array


CURRENT_DECAY = 0.9
MEMBRANE_DECAY = 0.95
THRESHOLD = 1.0


@jax.custom_jvp
def spike(v):
    """1 above zero; its derivative is taken to be that of `surrogate`."""
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    return spike(*primals), surrogate(*primals) * tangents[0]


def surrogate(v):
    return 0.3 * jnp.maximum(0, 1 - jnp.abs(v))


class Net(eqx.Module):
    """One step of one sample. The state is (current g, membrane v).

    `reset` says how the spike that resets the membrane is differentiated: "detached"
    not at all, as is usual, "attached" as every other spike. `local` cuts the gradient
    through the recurrent weights: trained by BPTT, such a twin gets exactly the
    gradient that D-RTRL gives the network itself.
    """

    w_in: Array
    b: Array
    w_rec: Array
    w_out: Array
    b_out: Array
    reset: str = eqx.field(static=True, default="detached")
    local: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        g, v = state
        z = spike(v - THRESHOLD)
        fed_back = jax.lax.stop_gradient(z) if self.local else z
        resetting = jax.lax.stop_gradient(z) if self.reset == "detached" else z
        a = MEMBRANE_DECAY
        g = CURRENT_DECAY * g + self.w_in @ x + self.b + self.w_rec @ fed_back
        v = a * (v - resetting) + (1 - a) * g
        return self.w_out @ spike(v - THRESHOLD) + self.b_out, (g, v)


def init_net(key, inputs, units, outputs, **options):
    """Gains that keep a tenth to a third of the units spiking under normal input."""
    keys = jax.random.split(key, 4)

    def draw(key, out, fan_in, gain):
        return gain * jax.random.normal(key, (out, fan_in)) / fan_in**0.5

    return Net(
        w_in=draw(keys[0], units, inputs, 1.5),
        b=0.3 * jax.random.normal(keys[1], (units,)),
        w_rec=draw(keys[2], units, units, 1.0),
        w_out=draw(keys[3], outputs, units, 1.0),
        b_out=jnp.zeros(outputs),
        **options,
    )


def init_state(net, batch):
    return jnp.zeros((batch, *net.b.shape)), jnp.zeros((batch, *net.b.shape))


def init_data(key, net, steps, batch):
    """Inputs and targets, time first."""
    keys = jax.random.split(key)
    shapes = (steps, batch, net.w_in.shape[1]), (steps, batch, net.b_out.shape[0])
    return tuple(map(jax.random.normal, keys, shapes))


def loss_fn(out, y):
    """The squared error of one step, mean over the batch."""
    return 0.5 * jnp.sum((out - y) ** 2) / out.shape[0]


def bptt(net, state, xs, ys):
    """The gradient by differentiating the whole sequence, and the loss."""

    def loss(net):
        def body(state, xy):
            out, state = jax.vmap(net)(xy[0], state)
            return state, loss_fn(out, xy[1])

        return jnp.sum(jax.lax.scan(body, state, (xs, ys))[1])

    return jax.value_and_grad(loss)(net)
