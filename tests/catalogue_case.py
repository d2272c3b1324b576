"""What a case of the catalogue is, and the gradients that it is checked against.

A case is a function `step(p, x, state, taps) -> (out, state)` of one time step, with
the places where the local program cuts marked by hand: `taps.recur` is put on the old
hidden state where it enters a recurrent mixing op, `taps.leave` on any other value on
its way from one unit to another. Without taps it is the model, with taps that stop
gradients its local program. From the two, autodiff alone gives what each form of the
online gradient has to be:

| oracle | gradient of |
|---|---|
| bptt | the model: its recurrence is local, no tap is used |
| twin | the local program (single-step, one layer) |
| twin+now | the same, and of what the taps cut within the step that is under way |
| multi | the model's outputs, from states of the local program (multi-step) |
| dense | the explicit matrices of `oracles.dense_reference`, by `groups` |
| one step | a step alone: nothing better is known, a comment says why |

Nothing in this file uses the library under test.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import PRNGKeyArray, PyTree
from models import PLAIN, Groups, Taps
from oracles import bptt, dense_reference, one_step


N, IN, STEPS = 6, 4, 7
KINDS = 5
"""Integer inputs are drawn below this."""
CUT = Taps(recur=jax.lax.stop_gradient, leave=jax.lax.stop_gradient)
CHECKS = ("structure", "one step", "sequence", "nothing left out")


def everything(why: str) -> dict[str, str]:
    """For `pending`, where the model does not compile."""
    return dict.fromkeys(CHECKS, why)


class Model(eqx.Module):
    p: PyTree
    step: Callable = eqx.field(static=True)
    cut: bool = eqx.field(static=True, default=False)

    def __call__(self, x, state):
        return self.run(x, state, CUT if self.cut else PLAIN)

    def run(self, x, state, taps):
        return self.step(self.p, x, state, taps)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """**Arguments:**

    - `step(p, x, state, taps)`: one time step.
    - `make(key)` gives `p` and a state; the state is then drawn at random.
    - `x`: an example of the input; floating-point leaves are drawn from a normal
      distribution, integers below `KINDS`.
    - `oracle`: see the head of this file.
    - `units`: (units, slots) of each hidden group.
    - `vjp`: the form that the compiler has to choose.
    - `ops`: for a key path in `p`, the op rules of the relations of that param.
    - `groups`: for the oracle "dense", as in `models.Case`.
    - `zero`: key paths in `p` of params whose gradient is zero; no other may be.
    - `trainable`: (predicate or filter spec of the model), None for all.
    - `options`: further arguments of `compile`.
    - `pending`: per check, why the library fails it today.
    """

    step: Callable[..., Any]
    make: Callable[[PRNGKeyArray], tuple[PyTree, PyTree]]
    x: PyTree
    oracle: str
    units: list[tuple[int, int]]
    vjp: str = "single-step"
    ops: Mapping[str, set[str]] = dataclasses.field(default_factory=dict)
    groups: Groups = ()
    zero: tuple[str, ...] = ()
    trainable: Callable[[Model], PyTree] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pending: Mapping[str, str] = dataclasses.field(default_factory=dict)


Table = dict[str, Case]


def zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape)


def leaky(h, drive):
    """A unit whose own derivative is neither zero nor constant."""
    return 0.6 * h + jnp.tanh(drive - 0.4 * h)


def _rng(key: PRNGKeyArray) -> np.random.Generator:
    """NumPy's: JAX would compile a sampler for every shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def normal(*shape: int, scale: float = 0.6) -> Callable[[PRNGKeyArray], jax.Array]:
    return lambda key: jnp.asarray(_rng(key).normal(0.0, scale, shape))


def around(centre: float, *shape: int) -> Callable[[PRNGKeyArray], jax.Array]:
    return lambda key: jnp.asarray(_rng(key).normal(centre, 0.3, shape))


def complex_normal(*shape: int) -> Callable[[PRNGKeyArray], jax.Array]:
    def make(key):
        re, im = _rng(key).normal(0.0, 0.4, (2, *shape))
        return jnp.asarray(re + 1j * im)

    return make


def draw(specs: Mapping[str, Any], key: PRNGKeyArray) -> dict[str, Any]:
    """Params by name, each from a shape or from a function of a key."""
    keys = jax.random.split(key, len(specs))
    pairs = zip(specs.items(), keys, strict=True)
    return {
        name: (normal(*spec) if isinstance(spec, tuple) else spec)(key)
        for (name, spec), key in pairs
    }


def table_of_cases() -> tuple[Table, Callable[..., Callable]]:
    """An empty table, and a decorator that makes a case of a step and adds it under
    the name of the step. Besides the fields of `Case` it takes `params`, as for
    `draw`, and `state`, in place of `make`."""
    table: Table = {}

    def case(*, params=None, state=None, **fields):
        def make(key):
            return draw(params or {}, key), state

        def add(step):
            name = step.__name__.lstrip("_")
            assert name not in table, name
            table[name] = Case(step, **({"make": make, "x": zeros(IN)} | fields))
            return step

        return add

    return table, case


def _random(rng: np.random.Generator, leaf: Any, lead: tuple[int, ...], scale: float):
    """Like `leaf` with the axes `lead` in front; integers below `KINDS`."""
    shape = (*lead, *leaf.shape)
    if not eqx.is_inexact_array(leaf):
        return jnp.asarray(rng.integers(0, KINDS, shape))
    value = rng.normal(0.0, scale, shape)
    if jnp.iscomplexobj(leaf):
        value = value + 1j * rng.normal(0.0, scale, shape)
    return jnp.asarray(value)


def loss(out: PyTree, target) -> Any:
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(out))


@functools.cache
def _drawn(case: Case) -> tuple[Model, tuple[list, Any], PyTree, jax.Array]:
    p, state = case.make(jax.random.key(3))
    rng = np.random.default_rng(4)
    drawn, rest = eqx.partition(state, eqx.is_inexact_array)
    drawn = jax.tree.map(lambda a: _random(rng, a, (), 0.8), drawn)
    xs = jax.tree.map(lambda a: _random(rng, a, (STEPS,), 1.5), case.x)
    ts = jnp.asarray(rng.normal(size=STEPS))
    state = jax.tree.flatten(eqx.combine(drawn, rest))
    return Model(p, case.step), state, xs, ts


def problem(case: Case) -> tuple[Model, PyTree, PyTree, jax.Array]:
    """(model, random state, inputs, targets)."""
    model, (leaves, treedef), xs, ts = _drawn(case)
    # Anew each time: an `eqx.nn.State` may be used only once.
    return model, jax.tree.unflatten(treedef, leaves), xs, ts


def one_in(n: int, names: Iterable[str]) -> Any:
    """Names as params of a test: every n-th, the others with `pytest -m long`."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.long] if i % n else [])
            for i, name in enumerate(names)
        ],
    )


# The oracles.


class _Now(eqx.Module):
    """A step from a state that no gradient passes."""

    model: Model

    def __call__(self, x, state):
        inexact, rest = eqx.partition(state, eqx.is_inexact_array)
        return self.model(x, eqx.combine(jax.lax.stop_gradient(inexact), rest))


class _Mixed(eqx.Module):
    """The outputs of the model, and the new state of its local program."""

    model: Model

    def __call__(self, x, state):
        out, _ = self.model.run(x, state, PLAIN)
        _, state = self.model.run(x, state, CUT)
        return out, state


def first_step(case: Case) -> Model:
    model, state, xs, ts = problem(case)
    return one_step(model, state, jax.tree.map(lambda a: a[0], xs), ts[0], loss)


def by_autodiff(case: Case) -> Model:
    model, *data = problem(case)
    return bptt(model, *data, loss=loss)


def sequence(case: Case) -> Model | None:
    """The gradient of the whole sequence, None where there is no oracle for it."""
    model, *data = problem(case)
    twin = Model(model.p, model.step, cut=True)
    if case.oracle == "bptt":
        return bptt(model, *data, loss=loss)
    if case.oracle == "twin":
        return Model(bptt(twin, *data, loss=loss).p, model.step)
    if case.oracle == "twin+now":
        past = bptt(twin, *data, loss=loss).p
        now, less = (bptt(_Now(m), *data, loss=loss).model.p for m in (model, twin))
        total = jax.tree.map(lambda a, b, c: a + (b - c), past, now, less)
        return Model(total, model.step)
    if case.oracle == "multi":
        return bptt(_Mixed(model), *data, loss=loss).model
    if case.oracle == "dense":
        forms = dense_reference(model, *data, groups=case.groups, loss=loss)
        return jax.tree.map(lambda g: g.sum(0), forms[case.vjp])
    assert case.oracle == "one step", case.oracle
    return None
