"""Rules that have a name of their own and are a choice of what others are made of."""

from jaxtyping import PRNGKeyArray

from .._signals import Modulatory, Signal, Symmetric, TargetProjection
from ._base import LocalRule
from ._drtrl import DRTRL
from ._esdrtrl import ESDRTRL
from ._kappa import Kappa


PPProp = ESDRTRL


def Immediate() -> DRTRL:  # noqa: N802 it stands where a class of rules stands
    r"""The gradient of each step by itself, without any past.

    The trace is $\epsilon^t = \frac{\partial h^t}{\partial y^t}
    \frac{\partial y^t}{\partial w}$ and those paths between the state variables of a
    unit that lie within the step. What any rule with a memory has to be better than.
    Known as SLTT, as spatial backpropagation, and as SnAp-0.

    **Returns:** `DRTRL(recursion=0.0)`.

    **Source:** Meng et al., *Towards memory- and time-efficient backpropagation for
    training spiking neural networks*, ICCV 2023 (SLTT).

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.Immediate())
        ```
    """
    return DRTRL(recursion=0.0)


def OSTL(recurrent: bool = False) -> DRTRL:  # noqa: N802
    r"""Online spatio-temporal learning.

    $\epsilon^t = \frac{ds^t}{ds^{t-1}} \epsilon^{t-1} + \frac{ds^t}{d\theta}$, layer by
    layer, and the gradient $L^t \epsilon^t$: D-RTRL with one of two diagonals.

    **Arguments:**

    - `recurrent`: whether a unit's weight on itself counts (OSTL "with H"), as
      `scope="unit"` of `eqx_etrace.DRTRL`, or not (`"local"`).

    **Returns:** a `DRTRL`.

    **Source:** Bohnstingl et al., *Online spatio-temporal learning in deep neural
    networks*, IEEE TNNLS 34, 2023.

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.OSTL())
        ```
    """
    return DRTRL(scope="unit" if recurrent else "local")


def OTTT(decay: float) -> ESDRTRL:  # noqa: N802
    r"""Online training through time: a filtered input times the error of the step.

    $a^t = \lambda a^{t-1} + x^t$ and the gradient $\frac{\partial l^t}{\partial u^t}
    \otimes a^t$, whatever the unit remembers. Made for feed-forward layers of
    integrate-and-fire neurons with the leak $\lambda$.

    **Arguments:**

    - `decay`: $\lambda$, at least 0 and below 1.

    **Returns:** `ESDRTRL((decay, 0.0))`.

    **Source:** Xiao et al., *Online training through time for spiking neural networks*,
    NeurIPS 2022.

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, rule=eqx_etrace.OTTT(0.5))
        ```
    """
    return ESDRTRL((decay, 0.0))


def RFLO(leak: float, signal: Signal | None = None) -> DRTRL:  # noqa: N802
    r"""Random feedback local online learning.

    For a leaky unit $h^t = \lambda h^{t-1} + (1 - \lambda)\,\phi(u^t)$ the trace is
    $p^t = \lambda p^{t-1} + (1 - \lambda)\,\phi'(u^t)\,x^t$, and the signal is the
    output error through fixed random weights.

    **Arguments:**

    - `leak`: $\lambda$, from 0 to 1: what a unit keeps from step to step.
    - `signal`: usually `eqx_etrace.RandomFeedback(key)`; None is the exact one, through
      the transposed readout.

    **Returns:** `DRTRL(recursion=leak, signal=signal)`.

    **Source:** Murray, *Local online learning in recurrent networks with random
    feedback*, eLife 8, 2019.

    !!! example

        ```python
        signal = eqx_etrace.RandomFeedback(jax.random.key(0))
        graph = eqx_etrace.compile(net, state, x, eqx_etrace.RFLO(0.9, signal))
        ```
    """
    return DRTRL(recursion=leak, signal=_or_exact(signal))


def EProp(  # noqa: N802
    kappa: float = 0.0,
    *,
    normalised: bool = False,
    signal: Signal | None = None,
    recurrent: bool = False,
    detach: tuple[tuple[str, str], ...] = (),
) -> DRTRL | Kappa:
    r"""e-prop: eligibility traces of spiking neurons, and a broadcast error.

    The eligibility $e^t = \frac{\partial z^t}{\partial h^t} \epsilon^t$ of a spike,
    filtered as a leaky readout filters the spike, times a learning signal per neuron.
    The derivative of the spike is the surrogate of your model.

    **Arguments:**

    - `kappa`: the decay of the readout, at least 0 and below 1; 0 is no filter.
    - `normalised`: see `eqx_etrace.Kappa`.
    - `signal`: None is symmetric e-prop; `RandomFeedback(key)` and
      `AdaptiveFeedback()` are the other two of the paper.
    - `recurrent`: whether a neuron's spike counts for itself through its own recurrent
      weight; the paper stops the gradient there.
    - `detach`: see `eqx_etrace.DRTRL`: the paper's code, for instance, keeps the spike
      in the adaptation and leaves it out of the reset. Where the spike is no state leaf
      of its own, use `jax.lax.stop_gradient` in the model.

    Two more parts of the paper need no rule. *Firing rates*: return the spikes from the
    model as well, and add their deviation from a rate to the loss; what the loss reads
    of a unit directly is exact under every signal. *Reward-based e-prop*: with the
    gradient g of policy and value at every step, carry $G^t = \gamma G^{t-1} + g^t$ and
    update with the TD error times G.

    **Returns:** a `DRTRL`, inside a `Kappa` if there is a filter.

    **Source:** Bellec et al., *A solution to the learning dilemma for recurrent
    networks of spiking neurons*, Nature Communications 11, 2020.

    !!! example

        ```python
        signal = eqx_etrace.RandomFeedback(jax.random.key(0))
        rule = eqx_etrace.EProp(kappa=0.9, signal=signal)
        graph = eqx_etrace.compile(net, state, x, rule)
        ```
    """
    scope = "unit" if recurrent else "local"
    rule = DRTRL(scope=scope, signal=_or_exact(signal), detach=detach)
    return Kappa(rule, kappa, normalised) if kappa else rule


def OSTTP(  # noqa: N802
    key: PRNGKeyArray, size: int, scale: float | None = None, recurrent: bool = False
) -> DRTRL:
    r"""Online spatio-temporal learning with target projection.

    The traces of `eqx_etrace.OSTL`, and the signal $L = B y^*$: the target of the step
    through fixed random weights. Nothing comes back from the outputs, so that hidden
    layers learn while the step runs.

    **Arguments:**

    - `key`, `size`, `scale`: as for `eqx_etrace.TargetProjection`.
    - `recurrent`: as for `eqx_etrace.OSTL`.

    **Returns:** a `DRTRL`.

    **Source:** Ortner, Pes, Gentinetta, Frenkel and Pantazi, *Online spatio-temporal
    learning with target projection*, AICAS 2023.

    !!! example

        ```python
        rule = eqx_etrace.OSTTP(jax.random.key(0), size=2)
        graph = eqx_etrace.compile(net, state, x, rule)
        fun = eqx_etrace.value_and_grad(graph, loss_fn)
        losses, grads, *_ = fun(params, state, None, xs, targets)
        ```
    """
    scope = "unit" if recurrent else "local"
    return DRTRL(scope=scope, signal=TargetProjection(key, size, scale))


def ThreeFactor(rule: LocalRule | None = None) -> LocalRule:  # noqa: N802
    r"""Eligibility times a modulator from outside: $\Delta w = m^t e^t$.

    **Arguments:**

    - `rule`: whose traces are the eligibility, a `eqx_etrace.DRTRL`, `ESDRTRL` or
      `Kappa`; `DRTRL()` if left out.

    **Returns:** that rule with the signal `eqx_etrace.Modulatory()`, which is where the
    shapes and the sign of m are explained.

    **Source:** Frémaux and Gerstner, *Neuromodulated spike-timing-dependent plasticity,
    and theory of three-factor learning rules*, Frontiers in Neural Circuits 9, 2016.

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, eqx_etrace.ThreeFactor())
        fun = eqx_etrace.value_and_grad(graph, loss_fn)
        rewards = jnp.ones(len(xs))
        losses, grads, *_ = fun(params, state, None, xs, targets, signal=-rewards)
        ```
    """
    return (DRTRL() if rule is None else rule).with_signal(Modulatory())


def OTPE(decay: float, signal: Signal | None = None) -> Kappa:  # noqa: N802
    r"""Online training with postsynaptic estimates.

    With the derivative $R^t$ of a unit's spike by its weights, through the unit's own
    past, $\hat R^t = \lambda \hat R^{t-1} + R^t$ estimates how that spike acts on a
    leaky integrator that follows; the gradient is $L^t \hat R^t$. Through a hidden
    layer the signal passes by the running average of its derivatives, see `average`
    of `eqx_etrace.Kappa`.

    **Arguments:**

    - `decay`: $\lambda$, the leak of what follows, at least 0 and below 1.
    - `signal`: None is the derivative of the loss. Another one comes to every layer
      directly, and needs no average.

    **Returns:** `Kappa(DRTRL(), decay, average=True)`.

    **Source:** Summe, Schaefer and Joshi, *Estimating post-synaptic effects for online
    training of feed-forward SNNs*, 2023 (arXiv:2311.16151).

    !!! example

        ```python
        graph = eqx_etrace.compile(net, state, x, eqx_etrace.OTPE(0.9))
        ```
    """
    rule = DRTRL(signal=_or_exact(signal))
    return Kappa(rule, decay, average=isinstance(rule.signal, Symmetric))


def _or_exact(signal: Signal | None) -> Signal:
    return Symmetric() if signal is None else signal
