"""What no method without a backward pass through time can do without.

The forward loop, the error of the outputs brought back to the units, and the products
that a gradient of the weights is made of, on vectors of the right shapes that are there
anyway: no derivatives, no filters. It is not a gradient.
"""

import jax
import jax.numpy as jnp
from by_hand import beside
from network import CURRENT_DECAY, MEMBRANE_DECAY
from workloads import ADAPTATION_DECAY, GRUCell, in_windows, loss_fn


def forward_and_products(net, state, xs, ys, *, window, products=True):
    """The loss, sums of the size of the gradient, and the state.

    The inputs' products are taken for a whole window where that is faster."""
    cell, units = net.cell, net.readout.in_features
    gru = isinstance(cell, GRUCell)
    from_x, from_h, bias = (
        (cell.cell.weight_ih, cell.cell.weight_hh, cell.cell.bias)
        if gru
        else (cell.w_in, cell.w_rec, cell.b)
    )

    def run(carry, xy):
        total, state, sums = carry
        xs, ys = xy

        def step(state, driven):
            # A GRU's products of x are three times its state, and cheaper made here.
            driven = driven @ from_x.T + bias if gru else driven
            fed_back = cell.read(state)
            new = advanced(cell, state, fed_back, driven, fed_back @ from_h.T)
            return new, (fed_back, cell.read(new))

        driven = xs if gru else xs @ from_x.T + bias
        state, (old, new) = jax.lax.scan(step, state, driven)
        out = new @ net.readout.weight.T + net.readout.bias
        total, error = total + jnp.sum(jax.vmap(loss_fn)(out, ys)), out - ys
        found = [_product(error, beside(new))]
        if products:
            back = jnp.tile(error @ net.readout.weight, len(bias) // units)
            parts = [beside(xs), old] if gru else [beside(xs, old)]
            found += [_product(back, part) for part in parts]
        sums = [old + more for old, more in zip(sums, found, strict=True)]
        return total, state, sums

    inputs, rows = from_x.shape[1] + 1, len(bias)
    sums = [jnp.zeros((len(net.readout.bias), units + 1))]
    if products:
        columns = [inputs, units] if gru else [inputs + units]
        sums += [jnp.zeros((rows, width)) for width in columns]
    carry = in_windows(run, (jnp.zeros(()), state, sums), (xs, ys), window)
    total, state, sums = carry
    return total, sums, state


def _product(left, right):
    return jnp.einsum("tbo,tbi->oi", left, right)


def advanced(cell, state, fed_back, from_x, from_h):
    """The new state, from its products."""
    if isinstance(cell, GRUCell):
        x, h = jnp.split(from_x, 3, -1), jnp.split(from_h, 3, -1)
        r, z = jax.nn.sigmoid(x[0] + h[0]), jax.nn.sigmoid(x[1] + h[1])
        new = jnp.tanh(x[2] + r * (h[2] + cell.cell.bias_n))
        return new + z * (state - new)
    if not isinstance(state, tuple):
        return jnp.tanh(from_x + from_h)
    g, v, *adaptation = state
    g = CURRENT_DECAY * g + from_x + from_h
    v = MEMBRANE_DECAY * (v - fed_back) + (1 - MEMBRANE_DECAY) * g
    return g, v, *(ADAPTATION_DECAY * a + fed_back for a in adaptation)
