"""Reads against the truth: no derivative where no read is, for a table of equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import spike

from eqx_etrace._canonicalise import wrapped
from eqx_etrace._flatten import flatten
from eqx_etrace._reads import (
    ALL,
    NONE,
    SEVERAL,
    Mixing,
    Reads,
    any_read,
    merge,
    pull,
    push,
)


A23, A3, A34 = (2, 3), (3,), (3, 4)

# One equation each, of its floating-point operands; exact where every read has a
# derivative, which holds for random numbers unless an operand is only compared.
EXACT = {
    "add": (lambda x, y: x + y, [A23, A23]),
    "scalar times": (lambda x, y: x * y, [(), A23]),
    "tanh": (jnp.tanh, [A23]),
    "logaddexp": (lambda x: jax.nn.softplus(x), [A3]),
    "reshape": (lambda x: x.reshape(3, 2), [A23]),
    "transpose": (lambda x: x.T, [A23]),
    "broadcast": (lambda x: jnp.broadcast_to(x[None], (2, 3)), [A3]),
    "slice": (lambda x: x[:, 1:], [A23]),
    "strided": (lambda x: x[:, ::2], [A34]),
    "reverse": (lambda x: x[::-1], [A23]),
    "concatenate": (lambda x, y: jnp.concatenate([x, y]), [A23, (1, 3)]),
    "pad": (lambda x: jnp.pad(x, ((1, 0), (0, 2))), [A23]),
    "split": (lambda x: jnp.split(x, 3, axis=1), [A23]),
    "squeeze": (lambda x: jnp.squeeze(x, 0), [(1, 3)]),
    "stack": (lambda x, y: jnp.stack([x, y]), [A3, A3]),
    "tile": (lambda x: jnp.tile(x, 2), [A3]),
    "gather": (lambda x: x[jnp.array([2, 0, 2])], [A34]),
    "dynamic_slice": (lambda x: jax.lax.dynamic_slice(x, (1,), (2,)), [A3]),
    "scatter": (lambda x, y: x.at[jnp.array([2, 0])].set(y), [A3, (2,)]),
    "scatter-add": (
        lambda x, y: x.at[jnp.array([2, 0, 2, 9])].add(y, mode="drop"),
        [A3, (4,)],
    ),
    "update": (lambda x, y: jax.lax.dynamic_update_slice(x, y, (1,)), [A3, (2,)]),
    "sum": (lambda x: x.sum(0), [A23]),
    "sum of all": (lambda x: x.sum(), [A23]),
    "mean": (lambda x: x.mean(1), [A23]),
    "prod": (lambda x: x.prod(1), [A23]),
    "dot": (lambda x, y: x @ y, [A23, A34]),
    "dot of vectors": (lambda x, y: x @ y, [A3, A3]),
    "batched dot": (lambda x, y: jnp.einsum("bi,bij->bj", x, y), [A23, (2, 3, 4)]),
    "two contracted": (lambda x, y: jnp.einsum("ij,jik->k", x, y), [A23, (3, 2, 4)]),
    "outer": (lambda x, y: jnp.einsum("i,j->ij", x, y), [A3, (2,)]),
    "spike": (lambda x: spike(x), [A3]),
}
BOUND = {
    "max": (lambda x: x.max(0), [A23]),
    "cumsum": (lambda x: jnp.cumsum(x), [A3]),
    "sort": (lambda x: jnp.sort(x), [A3]),
    "gather by data": (lambda x, y: x[jnp.argmax(y)], [A3, A3]),
    "select": (lambda x, y: jnp.where(x > 0, x, y), [A3, A3]),
}


def _chain(fun, arrays):
    """Reads of the outputs by the inputs, through all equations of the function."""
    program, constants = flatten(
        jax.make_jaxpr(fun)(*arrays), wrapped, params=0, states=0
    )
    reads = Reads(program, dict(zip(program.constants, constants, strict=True)))
    patterns = []
    for ref, array in zip(program.inputs, arrays, strict=True):
        seen = {ref: np.eye(array.size, dtype=bool)}
        for equation in program.equations:
            for k, source in equation.operands:
                if source not in seen:
                    continue
                for out, found in zip(
                    equation.outputs, reads(equation, k), strict=True
                ):
                    size = program.avals[out].size
                    mine = seen.setdefault(out, np.zeros((size, array.size), bool))
                    if found is ALL:
                        mine |= seen[source].any(0)
                        continue
                    for row in np.asarray(found).reshape(found.shape[0], -1):
                        mine[row != NONE] |= seen[source][row[row != NONE]]
        patterns.append(
            np.concatenate(
                [
                    seen.get(out, np.zeros((program.avals[out].size, array.size), bool))
                    for out in program.outputs
                ]
            )
        )
    return patterns


def _jacobian(fun, arrays, k):
    def flat(x):
        args = [*arrays[:k], x, *arrays[k + 1 :]]
        return jnp.concatenate(
            [leaf.reshape(-1) for leaf in jax.tree.leaves(fun(*args))]
        )

    jacobian = jax.jacrev(flat)(arrays[k])
    return np.asarray(jacobian).reshape(-1, arrays[k].size) != 0


def _arrays(shapes):
    # Around zero, where the surrogate derivative does not vanish.
    keys = jax.random.split(jax.random.key(1), len(shapes))
    return [0.1 + jax.random.uniform(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("name", EXACT)
def test_reads_are_the_pattern_of_the_jacobian(name):
    fun, shapes = EXACT[name]
    arrays = _arrays(shapes)
    for k, pattern in enumerate(_chain(fun, arrays)):
        np.testing.assert_array_equal(pattern, _jacobian(fun, arrays, k))


@pytest.mark.parametrize("name", BOUND)
def test_reads_hold_the_pattern_of_the_jacobian(name):
    fun, shapes = BOUND[name]
    arrays = _arrays(shapes)
    for k, pattern in enumerate(_chain(fun, arrays)):
        assert (pattern | ~_jacobian(fun, arrays, k)).all()


def test_gather_by_data_is_mixing():
    def fun(x, i):
        return x[i]

    closed = jax.make_jaxpr(fun)(jnp.ones(3), jnp.arange(2))
    program, constants = flatten(closed, wrapped, params=0, states=0)
    reads = Reads(program, dict(zip(program.constants, constants, strict=True)))
    kinds = {str(e.primitive): reads.kind(e) for e in program.equations}
    assert kinds["gather"] is Mixing.MIXING


def test_push_and_pull():
    reads = np.array([[0, 0, 2], [1, NONE, 2]])
    labels = np.array([5, 6, 7], np.int32)
    np.testing.assert_array_equal(pull(labels, reads), [[5, 5, 7], [6, NONE, 7]])
    got = push(np.array([4, 4, 8], np.int32), reads, 4)
    np.testing.assert_array_equal(got, [4, 4, 8, NONE])
    got = push(np.array([4, 3, 8], np.int32), reads, 4)
    np.testing.assert_array_equal(got, [SEVERAL, 4, 8, NONE])
    np.testing.assert_array_equal(push(labels, ALL, 2), [SEVERAL, SEVERAL])
    np.testing.assert_array_equal(push(np.array([NONE, 6], np.int32), ALL, 2), [6, 6])


def test_merge():
    first = np.array([NONE, 1, 1, SEVERAL])
    second = np.array([2, NONE, 3, 1])
    np.testing.assert_array_equal(merge(first, second), [2, 1, SEVERAL, SEVERAL])


def test_an_operand_without_elements_is_read_by_none():
    """As the slices of an associative scan over few steps are."""
    nobody, reads = np.empty(0, np.int32), np.array([[NONE, NONE]])
    np.testing.assert_array_equal(pull(nobody, reads), [[NONE, NONE]])
    np.testing.assert_array_equal(any_read(nobody > 0, reads, 2), [False, False])
