"""Learning signals: what tells a unit how it should have acted, a part of a rule.

A signal is a number per *exit* of a unit: a value that the step makes from the unit's
new state and that something beyond the unit reads, such as its spike. With the exact
signal it is the derivative of the loss by that value; the others put something in its
place that needs no path back from the outputs. From an exit to the state variables of
its own unit, derivatives are as they are; and so are those of what leaves a unit for an
output directly, without a weight.
"""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, Shaped


@dataclasses.dataclass(frozen=True)
class Exit:
    """A value by which units act beyond themselves.

    - `shape`, `dtype`: of one sample.
    - `places`: per hidden group, the element of each unit, in the order of units; ()
      for a group that does not act through it, None where it is not one per unit.
    """

    shape: tuple[int, ...]
    dtype: Any
    places: tuple[tuple[int, ...] | None, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Signal(eqx.Module):
    """Where the learning signal of a local rule comes from.

    `given` says what the caller passes as `signal=` at every step: nothing, a
    `"target"` or a `"modulator"`.

    !!! example

        ```python
        rule = eqx_etrace.DRTRL(signal=eqx_etrace.RandomFeedback(jax.random.key(0)))
        assert isinstance(rule.signal, eqx_etrace.Signal)
        ```
    """

    given: ClassVar[Literal["nothing", "target", "modulator"]] = "nothing"

    def bound(self, exits: Sequence[Exit], errors: int) -> "Signal":
        """The signal for a network with these exits and so many numbers of output
        error; itself, if there is nothing to prepare. The compiler calls it once."""
        del exits, errors
        return self

    @abstractmethod
    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """The signal of one step and sample, of the shape of exit `number`.

        `error` is the derivative of the loss by the outputs, without those that show
        directly what units do which act on others, such as spikes for a regulariser."""


class Symmetric(Signal):
    """The exact signal: the derivative of the loss, through the weights of the readout.

    !!! example

        ```python
        rule = eqx_etrace.DRTRL(signal=eqx_etrace.Symmetric())  # as without
        ```
    """

    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """Not by a formula: the step differentiates the loss."""
        raise NotImplementedError


def _drawn(key: PRNGKeyArray, number: int, at: Exit, width: int, scale: Any) -> Any:
    """A random matrix from `width` numbers to an exit."""
    dtype = jnp.finfo(at.dtype).dtype
    scale = at.size**-0.5 if scale is None else scale
    drawn = jax.random.normal(jax.random.fold_in(key, number), (at.size, width), dtype)
    return jnp.asarray(scale, dtype) * drawn


def _all_drawn(signal: Any, exits: Sequence[Exit], width: int) -> tuple[Any, ...]:
    """A random matrix for each exit; those that are there already, if they fit: another
    precision is no other network."""
    shapes = [(at.size, width) for at in exits]
    if [matrix.shape for matrix in signal.matrices or ()] == shapes:
        return signal.matrices
    return tuple(
        _drawn(signal.key, number, at, width, signal.scale)
        for number, at in enumerate(exits)
    )


def _projected(matrix: Any, at: Exit, vector: Any) -> Any:
    found = matrix @ vector.astype(matrix.dtype)
    return found.reshape(at.shape).astype(at.dtype)


def _check_scale(scale: Any) -> None:
    number = isinstance(scale, float | int) and not isinstance(scale, bool)
    if scale is not None and not (number and scale > 0):
        raise ValueError(
            f"scale: got {scale!r}, expected a number above 0 or None. It is the "
            "standard deviation of the random weights."
        )


class RandomFeedback(Signal):
    r"""The output error through fixed random weights, $L = B e$.

    In place of the readout's weights, which a neuron cannot know, each exit has a
    random matrix of its own, also over several layers (direct feedback alignment). The
    outputs themselves, and weights without a trace, learn by their exact gradient.

    **Arguments:**

    - `key`: a key from `jax.random.key`. The matrices follow from it alone: they are
      the same under jit, and on every device.
    - `scale`: the standard deviation of their entries; None is one over the root of the
      number of units, as in a readout.

    **Source:** Lillicrap et al., Nature Communications 7, 2016; Nøkland, *Direct
    feedback alignment provides learning in deep neural networks*, NeurIPS 2016.

    !!! example

        ```python
        signal = eqx_etrace.RandomFeedback(jax.random.key(0))
        graph = eqx_etrace.compile(net, state, x, eqx_etrace.DRTRL(signal=signal))
        ```
    """

    key: PRNGKeyArray
    scale: float | None = eqx.field(static=True, default=None)
    matrices: tuple[Shaped[Array, "units errors"], ...] | None = None

    def __check_init__(self) -> None:
        _check_scale(self.scale)

    def bound(self, exits: Sequence[Exit], errors: int) -> "RandomFeedback":
        """With its matrices."""
        matrices = _all_drawn(self, exits, errors)
        return dataclasses.replace(self, matrices=matrices)

    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """B e."""
        del given
        assert self.matrices is not None  # The compiler has bound it.
        return _projected(self.matrices[number], at, error)


class TargetProjection(Signal):
    r"""The target through fixed random weights, $L = B y^*$: no error, no path back.

    All of the hidden layers learn while the step runs. The target of the step is the
    argument `signal` of `eqx_etrace.step`; `value_and_grad` and `learn` take `targets`
    unless they are given another.

    **Arguments:**

    - `key`, `scale`: as for `eqx_etrace.RandomFeedback`.
    - `size`: how many numbers a target is made of, for classes their number (one-hot).

    **Source:** Frenkel, Lefebvre and Bol, *Learning without feedback: fixed random
    learning signals allow for feedforward training of deep neural networks*, Frontiers
    in Neuroscience 15, 2021.

    !!! example

        ```python
        signal = eqx_etrace.TargetProjection(jax.random.key(0), size=2)
        graph = eqx_etrace.compile(net, state, x, eqx_etrace.DRTRL(signal=signal))
        out, state, trace = eqx_etrace.step(
            graph, params, state, eqx_etrace.init_trace(graph), x, signal=target
        )
        ```
    """

    given: ClassVar[Literal["nothing", "target", "modulator"]] = "target"

    key: PRNGKeyArray
    size: int = eqx.field(static=True)
    scale: float | None = eqx.field(static=True, default=None)
    matrices: tuple[Shaped[Array, "units size"], ...] | None = None

    def __check_init__(self) -> None:
        _check_scale(self.scale)
        if not (isinstance(self.size, int) and self.size >= 1):
            raise ValueError(
                f"size: got {self.size!r}, expected an integer of at least 1. It is "
                "how many numbers the target of a step has."
            )

    def bound(self, exits: Sequence[Exit], errors: int) -> "TargetProjection":
        """With its matrices."""
        del errors
        matrices = _all_drawn(self, exits, self.size)
        return dataclasses.replace(self, matrices=matrices)

    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """B y*."""
        del error
        assert self.matrices is not None  # The compiler has bound it.
        return _projected(self.matrices[number], at, given)


class Modulatory(Signal):
    r"""A third factor from outside: $L = m$, such as a reward or a TD error.

    It is the argument `signal` of every step: a scalar for all units, one number per
    unit, or per sample; or a tuple with one of these for each hidden group. The
    gradient is m times the eligibility, and optimisers go against it: pass the negative
    of a reward.

    Shapes: `()` or `(units,)`; in a batched graph `()`, `(batch,)`, `(batch, units)` or
    `(1, units)`.

    **Source:** Frémaux and Gerstner, *Neuromodulated spike-timing-dependent plasticity,
    and theory of three-factor learning rules*, Frontiers in Neural Circuits 9, 2016.

    !!! example

        ```python
        rule = eqx_etrace.DRTRL(signal=eqx_etrace.Modulatory())
        graph = eqx_etrace.compile(net, state, x, rule)

        def loss(params, reward):
            out, *_ = eqx_etrace.step(graph, params, state, trace, x, signal=-reward)
            return jnp.sum(out)

        trace = eqx_etrace.init_trace(graph)
        grads = jax.grad(loss)(params, jnp.asarray(0.5))
        ```
    """

    given: ClassVar[Literal["nothing", "target", "modulator"]] = "modulator"

    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """m, where the units are."""
        del number, error
        found = jnp.zeros(at.size, at.dtype)
        for modulator, places in zip(given, at.places, strict=True):
            if modulator.ndim == 0 or places is None:
                # What is not one per unit takes none but one for all, see `_given`.
                found = found + modulator.astype(at.dtype)
            elif places:
                found = found.at[jnp.asarray(places)].add(modulator.astype(at.dtype))
        return found.reshape(at.shape)


class AdaptiveFeedback(Signal):
    r"""The output error through feedback weights that learn as the readout does.

    $L = B e$, and B gets the gradient of the readout, transposed: with the same weight
    decay on both they come to agree. (Of a readout with a memory that is what a readout
    without one would get at this step.) B is part of your model, so that optimiser and
    checkpoints hold it: a leaf, or a tuple of one leaf per exit, that the step does not
    read. `compile` says which shapes it needs, (units, outputs) each.

    **Arguments:**

    - `path`: the key path of B in the model.

    **Source:** Bellec et al., Nature Communications 11, 2020 (adaptive e-prop), after
    Kolen and Pollack, *Backpropagation without weight transport*, ICNN 1994.

    !!! example

        ```python
        class Learner(eqx.Module):
            net: Net
            feedback: jax.Array  # (units, outputs)

            def __call__(self, x, state):
                return self.net(x, state)

        learner = Learner(net, 0.3 * jax.random.normal(key, (8, 2)))
        rule = eqx_etrace.EProp(signal=eqx_etrace.AdaptiveFeedback("feedback"))
        graph = eqx_etrace.compile(learner, state, x, rule)
        ```
    """

    path: str = eqx.field(static=True, default="feedback")

    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """B e; here `given` is B."""
        del number
        return _projected(given, at, error)


class Bootstrapped(Signal):
    r"""A learned guess of what the future will say about the state, for `DNI`.

    **Arguments:**

    - `path`: the key path, in the model, of the module M that guesses: it maps the
      hidden state of a sample, all leaves in one vector (n,), to a vector (n,).

    !!! example

        ```python
        assert eqx_etrace.DNI("synthesiser").signal.path == "synthesiser"
        ```
    """

    path: str = eqx.field(static=True, default="synthesiser")

    def at_exit(
        self, number: int, at: Exit, error: Shaped[Array, " errors"], given: Any
    ) -> Shaped[Array, "..."]:
        """Not by a formula: it comes in at the end of a window."""
        raise NotImplementedError
