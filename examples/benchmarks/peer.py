"""The benchmark network in braintrace, for the comparison in `per_step.py`.

Imported only where braintrace is installed. Spikes, decays and weights are those of
`network.py`; braintrace finds a weight only where it goes through its own `matmul`.
"""

import warnings

import brainstate
import braintrace
import jax
import jax.numpy as jnp
from network import CURRENT_DECAY, MEMBRANE_DECAY, THRESHOLD, loss_fn, spike


class PeerNet(brainstate.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.units = net.b.shape[0]
        self.detached = net.reset == "detached"
        state = brainstate.ParamState
        self.w_in = state({"weight": net.w_in.T, "bias": net.b})
        self.w_rec = state({"weight": net.w_rec.T})
        self.w_out = state({"weight": net.w_out.T, "bias": net.b_out})

    def init_state(self, batch_size=None):
        shape = (self.units,) if batch_size is None else (batch_size, self.units)
        self.g = brainstate.HiddenState(jnp.zeros(shape))
        self.v = brainstate.HiddenState(jnp.zeros(shape))

    def update(self, x):
        z = spike(self.v.value - THRESHOLD)
        reset = jax.lax.stop_gradient(z) if self.detached else z
        w_in, w_rec, w_out = self.w_in.value, self.w_rec.value, self.w_out.value
        driven = braintrace.matmul(x, w_in["weight"], w_in["bias"])
        fed_back = braintrace.matmul(z, w_rec["weight"])
        self.g.value = CURRENT_DECAY * self.g.value + driven + fed_back
        kept = MEMBRANE_DECAY * (self.v.value - reset)
        self.v.value = kept + (1 - MEMBRANE_DECAY) * self.g.value
        z = spike(self.v.value - THRESHOLD)
        return braintrace.matmul(z, w_out["weight"], w_out["bias"])


def runner(net, xs, ys, *, vmap):
    """A function without arguments that runs the sequence and returns its losses."""
    batch = xs.shape[1]
    with warnings.catch_warnings():  # That the readout has no trace is as it should be.
        warnings.filterwarnings("ignore", "ETP primitive .* no connected hidden states")
        learner = braintrace.compile(
            PeerNet(net), braintrace.D_RTRL, xs[0], batch_size=batch, vmap=vmap
        )

    def step_loss(x, y):
        return loss_fn(learner(x), y)

    @brainstate.transform.jit
    def run(xs, ys):
        return learner.etrace_grad(
            xs, ys, step_fn=step_loss, reduction="sum", return_value=True
        )

    return lambda: run(xs, ys)
