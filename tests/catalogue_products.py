"""Products with weights in every form: dense, several axes, low rank, by AD."""

import equinox as eqx
import jax
import jax.numpy as jnp
from catalogue_case import (
    IN,
    N,
    around,
    leaky,
    normal,
    table_of_cases,
    zeros,
)


PRODUCTS, case = table_of_cases()


@case(
    params={"w": (3, 2, IN), "u": (3, 2, 2)},
    state=zeros(3, 2),
    oracle="twin",
    units=[(6, 1)],
    ops={"['w']": {"dense"}, "['u']": {"dense"}},
)
def batch_axis(p, x, h, taps):
    """Heads: the first axis is a batch axis of the recurrent product."""
    rec = jnp.einsum("hij,hj->hi", p["u"], taps.recur(h))
    h = leaky(h, p["w"] @ x + rec)
    return h, h


@case(
    params={"w": (N, 2, 3)},
    state=zeros(N),
    x=zeros(3, 2),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def several_contracted_axes(p, x, h, taps):
    h = leaky(h, jnp.einsum("nab,ba->n", p["w"], x))
    return h, h


@case(
    params={"w": (IN, N), "tau": around(0.5, N)},
    state=zeros(2, N),
    x=zeros(2, IN),
    oracle="bptt",
    units=[(2 * N, 1)],
    ops={"['w']": {"dense"}, "['tau']": {"elementwise"}},
)
def shared_over_an_axis(p, x, h, taps):
    """The axis t is neither batch nor contracted: the weight is shared over it."""
    h = p["tau"][None] * h + jnp.tanh(jnp.einsum("tk,kn->tn", x, p["w"]))
    return h, h


@case(
    params={"w": (IN, N), "u": (N, N)},
    state=zeros(2, N),
    x=zeros(2, IN),
    oracle="twin",
    units=[(2 * N, 1)],
    ops={"['u']": {"dense"}},
)
def shared_over_an_axis_recurrent(p, x, h, taps):
    rec = jnp.einsum("tk,kn->tn", taps.recur(h), p["u"])
    h = leaky(h, jnp.einsum("tk,kn->tn", x, p["w"]) + rec)
    return h, h


@case(
    params={"w": (IN, N), "u": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}, "['u']": {"dense"}},
)
def weight_on_the_right(p, x, h, taps):
    h = leaky(h, x @ p["w"] + jnp.dot(taps.recur(h), p["u"]))
    return h, h


@case(
    params={"w": (2, N, 3)},
    state=zeros(N),
    x=zeros(3, N, 2),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"dense"}},
)
def any_dimension_numbers(p, x, h, taps):
    """A batch axis in the middle of both, contracted axes crossed over."""
    numbers = (((0, 2), (2, 0)), ((1,), (1,)))
    h = leaky(h, jax.lax.dot_general(p["w"], x, numbers))
    return h, h


@case(
    params={"u": (N, N)},
    state=zeros(N),
    x=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"dense"}},
)
def two_uses(p, x, h, taps):
    h = leaky(h, p["u"] @ x + 0.5 * p["u"] @ taps.recur(h))
    return h, h


@case(
    params={"u": (N, N)},
    state=zeros(N),
    x=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"dense"}},
)
def tied_transposes(p, x, h, taps):
    """Used as it is, transposed in the recurrence, and transposed in the readout."""
    h = leaky(h, p["u"] @ x + p["u"].T @ taps.recur(h))
    return p["u"].T @ h, h


@case(
    params={"w": (N, IN, IN), "v": (N, IN, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"dense"}, "['v']": {"dense"}},
)
def bilinear(p, x, h, taps):
    """The products of the first contraction are summed within their unit."""
    drive = jnp.einsum("nij,i,j->n", p["w"], x, jnp.sin(x))
    rec = jnp.einsum("nij,i,j->n", p["v"], x, taps.recur(h))
    h = leaky(h, drive + 0.3 * rec)
    return h, h


@case(
    params={"w": (IN,), "u": (), "b": ()},
    state=zeros(),
    oracle="bptt",
    units=[(1, 1)],
    ops={"['w']": {"dense"}, "['u']": {"elementwise"}},
)
def one_scalar_unit(p, x, h, taps):
    h = jnp.tanh(p["w"] @ x + p["u"] * h + p["b"])
    return h, h


def _written_out(p, x, h, taps):
    drive = (p["w"] * x[None]).sum(1) + (p["u"] * taps.recur(h)[None]).sum(1)
    h = leaky(h, drive)
    return p["out"] @ h, h


@case(
    params={"w": (N, IN), "u": (N, N), "out": (3, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
)
def written_out_product(p, x, h, taps):
    """Broadcast, multiply and sum is a product with a weight, and joins no units."""
    return _written_out(p, x, h, taps)


@case(
    params={"w": (N, IN), "u": (N, N), "out": (3, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": N - 1},
)
def written_out_product_of_many(p, x, h, taps):
    return _written_out(p, x, h, taps)


@case(
    params={"w": (N, IN), "tau": around(0.3, N)},
    state=zeros(N, IN),
    oracle="bptt",
    units=[(N * IN, 1)],
    ops={"['w']": {"elementwise"}, "['tau']": {"elementwise"}},
)
def outer_product(p, x, h, taps):
    """Every synapse has a state of its own."""
    h = leaky(h, p["w"] * x[None] - p["tau"][:, None] * h)
    return h.sum(1), h


_low_rank = "the first weight of a low-rank pair gets its current-step gradient"


@case(
    params={"a": (IN, 2), "b": (2, N), "tau": around(0.5, N)},
    state=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['a']": {"dense"}, "['b']": {"dense"}},
)
def low_rank_input(p, x, h, taps):
    h = leaky(h, x @ p["a"] @ p["b"] - p["tau"] * h)
    return h, h


@case(
    params={"w": (N, IN), "a": (2, N), "b": (N, 2)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['a']": {"dense"}, "['b']": {"dense"}},
)
def low_rank_recurrent(p, x, h, taps):
    h = leaky(h, p["w"] @ x + p["b"] @ (p["a"] @ taps.recur(h)))
    return h, h


@case(
    params={"w": (N, IN), "a": (2, N), "b": (N, 2)},
    state=zeros(N),
    oracle="twin+now",
    units=[(N, 1)],
    ops={"['b']": {"dense"}},
)
def bottleneck(p, x, h, taps):
    """Not linear in between: `a` has no local path, and keeps the current step."""
    inner = taps.leave(jnp.tanh(p["a"] @ taps.recur(h)))
    h = leaky(h, p["w"] @ x + p["b"] @ inner)
    return h, h


@case(
    make=lambda key: (
        {
            "mlp": eqx.nn.MLP(IN, N, 5, 1, activation=jnp.tanh, key=key),
            "u": normal(N, N)(key),
        },
        zeros(N),
    ),
    oracle="twin+now",
    units=[(N, 1)],
    ops={".layers[1].weight": {"dense"}, ".layers[1].bias": {"elementwise"}},
)
def mlp_in_front(p, x, h, taps):
    """A feed-forward network without state in front: its last layer has a trace."""
    first, second = p["mlp"].layers
    inner = taps.leave(jnp.tanh(first(x)))
    h = leaky(h, second(inner) + p["u"] @ taps.recur(h))
    return h, h


# By AD: primitives without an op rule of their own.


@case(
    params={"w": lambda key: normal(N, N)(key) + 2 * jnp.eye(N), "tau": (N,)},
    state=zeros(N),
    x=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"by AD"}},
)
def triangular_solve(p, x, h, taps):
    drive = jax.scipy.linalg.solve_triangular(p["w"], x, lower=True)
    h = leaky(h, drive + p["tau"] * h)
    return h, h


def _regular(key):
    return normal(N, N)(key) + 2 * jnp.eye(N)


@case(
    params={"w": _regular, "tau": (N,)},
    state=zeros(N),
    x=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"by AD"}},
)
def solve(p, x, h, taps):
    """A call with four functions: the factors that it solves with are no weights."""
    h = leaky(h, jnp.linalg.solve(p["w"], x) + p["tau"] * h)
    return h, h


@case(
    params={"w": (N, IN), "u": _regular},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"by AD"}},
)
def solve_for_the_state(p, x, h, taps):
    """The recurrent product is with the inverse of the weight."""
    h = leaky(h, p["w"] @ x + jnp.linalg.solve(p["u"], taps.recur(h)))
    return h, h


@case(
    params={"w": (N, IN), "b": (N,)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['b']": {"by AD"}},
)
def solve_with_a_matrix_of_the_state(p, x, h, taps):
    matrix = 2 * jnp.eye(N) + jnp.diag(jnp.tanh(taps.recur(h)[1:]), 1)
    h = leaky(h, p["w"] @ x + jnp.linalg.solve(matrix, p["b"]))
    return h, h


@case(
    params={"w": (N, IN), "tau": around(0.3, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    options={"max_slots": N - 1},
)
def solve_with_a_constant(p, x, h, taps):
    """No weight is in it: a coupling of more units than one may have slots."""
    matrix = 3 * jnp.eye(N) - jnp.ones((N, N)) / N
    h = leaky(h, p["w"] @ x + jnp.linalg.solve(matrix, taps.recur(h)) - p["tau"] * h)
    return h, h


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"by AD"}},
)
def conjugate_gradient(p, x, h, taps):
    """Of the three functions that read the weight, one has a derivative by it."""
    matrix = p["u"] @ p["u"].T + jnp.eye(N)
    solved, _ = jax.scipy.sparse.linalg.cg(
        lambda v: matrix @ v,
        taps.recur(h),
        tol=1e-14,
        M=lambda v: v / jnp.diagonal(matrix),
    )
    h = leaky(h, p["w"] @ x + solved)
    return h, h


@case(
    params={"w": (N, IN), "u": _regular},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['u']": {"by AD"}},
)
def solve_in_a_branch(p, x, h, taps):
    rec = jax.lax.cond(
        x[0] > 0,
        lambda h: jnp.linalg.solve(p["u"], taps.recur(h)),
        lambda h: 0.5 * h,
        h,
    )
    h = leaky(h, p["w"] @ x + rec)
    return h, h


@case(
    params={"w": (N,), "tau": around(0.5, N)},
    state=zeros(N),
    x=zeros(N),
    oracle="twin+now",
    units=[(N, 1)],
)
def cumulative_sum(p, x, h, taps):
    """Each product goes to several units: no trace, but the current step."""
    h = leaky(h, taps.leave(jnp.cumsum(p["w"] * x)) - p["tau"] * h)
    return h, h


@case(
    params={"w": (N,), "tau": around(0.5, N)},
    state=zeros(N),
    x=zeros(N),
    oracle="bptt",
    units=[(N, 1)],
    ops={"['w']": {"elementwise"}},
)
def cumulative_sum_of_a_weight(p, x, h, taps):
    """This one is a preparation of the weight."""
    h = leaky(h, jnp.cumsum(jax.nn.softplus(p["w"])) * x - p["tau"] * h)
    return h, h


@case(
    params={"w": (N,), "tau": around(0.5, N)},
    state=zeros(N),
    x=zeros(N),
    oracle="twin+now",
    units=[(N, 1)],
)
def sort(p, x, h, taps):
    h = leaky(h, taps.leave(jnp.sort(p["w"] * x)) - p["tau"] * h)
    return h, h


@case(
    params={"w": (N,), "tau": around(0.5, N)},
    state=zeros(N),
    x=zeros(N),
    oracle="twin+now",
    units=[(N, 1)],
)
def fourier(p, x, h, taps):
    """A circular convolution by way of the spectrum."""
    spectrum = jnp.fft.rfft(p["w"]) * jnp.fft.rfft(x)
    h = leaky(h, taps.leave(jnp.fft.irfft(spectrum, N)) - p["tau"] * h)
    return h, h


@jax.custom_vjp
def _product(w, x):
    return w @ x


_product.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda kept, g: (2 * g[:, None] * kept[1][None], g @ kept[0]),
)


@case(
    params={"w": (N, IN), "u": (N, N)},
    state=zeros(N),
    oracle="twin",
    units=[(N, 1)],
    ops={"['w']": {"by AD"}, "['u']": {"by AD"}},
)
def product_with_a_rule_of_its_own(p, x, h, taps):
    """A custom derivative that is not the derivative, to see which one is used."""
    h = leaky(h, _product(p["w"], x) + _product(p["u"], taps.recur(h)))
    return h, h


# Rows in groups, each with a weight of its own.


@case(
    params={"w": (2, IN, N)},
    state=zeros(3, N),
    x=zeros(3, IN),
    oracle="bptt",
    units=[(3 * N, 1)],
    ops={"['w']": {"dense"}},
)
def ragged_dot(p, x, h, taps):
    """Rows 0 and 1 by the first expert, row 2 by the second."""
    drive = jax.lax.ragged_dot(x, p["w"], jnp.array([2, 1], jnp.int32))
    h = leaky(h, drive)
    return h, h


@case(
    params={"w": (3, IN, N), "u": (3, N, N)},
    state=zeros(4, N),
    x={"drive": zeros(4, IN), "first": jnp.zeros((), jnp.int32)},
    oracle="twin",
    units=[(4 * N, 1)],
    ops={"['w']": {"dense"}, "['u']": {"dense"}},
)
def ragged_dot_recurrent(p, x, h, taps):
    """The groups are chosen at run time; one of them may be empty."""
    first = x["first"] % 5
    sizes = jnp.stack([first, 4 - first, jnp.zeros_like(first)])
    drive = jax.lax.ragged_dot(x["drive"], p["w"], sizes)
    h = leaky(h, drive + jax.lax.ragged_dot(taps.recur(h), p["u"], sizes))
    return h, h
