"""What a step is for the compiler, and the only words about JAX's primitives.

A closed jaxpr is flattened (`_flatten`) into a `Program`: a list of equations over
integers, in order, without nested calls. Everything after reads programs. No file but
these two knows JAX's intermediate representation.

Invariants of a program:

- every value has one number, one shape and one dtype; an equation reads values that
  exist before it; there are no variables, so programs are hashable static data;
- calls that only wrap (jit, remat) are spliced in; custom derivatives are kept as one
  equation, because their rule is lost as soon as their body is inlined;
- the source line of the user's code stays with each equation.

`evaluate` is the one evaluator. Three hooks are all that a local program needs: `edge`
changes what an equation reads (a cut is a `stop_gradient` there), `tap` changes what a
value is for all that read it later (a perturbation is an addition there), `through`
takes the place of an equation.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox.internal as eqxi
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives as prims


Ref = Any  # an int that numbers a value, or a JAX literal


def _present(names: str) -> frozenset:
    """The primitives of these names that the installed JAX has."""
    found = (
        getattr(prims, f"{name}_p", getattr(jax.lax, f"{name}_p", None))
        for name in names.split()
    )
    return frozenset(primitive for primitive in found if primitive is not None)


ELEMENTWISE = frozenset({eqxi.select_if_vmap_p}) | _present(
    "abs acos acosh add add_jaxvals and asin asinh atan atan2 atanh bessel_i0e "
    "bessel_i1e cbrt ceil clamp clz complex conj convert_element_type copy cos cosh "
    "digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a "
    "igammac imag integer_pow is_finite le lgamma log log1p log2 logistic lt max min "
    "mul name ne neg nextafter not one_minus_square or polygamma polynomial "
    "population_count pow real reduce_precision regularized_incomplete_beta rem round "
    "rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin "
    "sinh sqrt square sub tan tanh xor zeta"
)
STRUCTURAL = _present(
    "broadcast_in_dim concatenate pad reshape rev slice split squeeze stack tile "
    "transpose unstack"
)
REDUCTIONS = _present(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor"
)
# Structural as long as the index operands, which follow the ones counted here, are
# constants: gather(x, indices), dynamic_slice(x, *starts), ...
INDEXED = {
    prims.gather_p: (1,),
    prims.dynamic_slice_p: tuple(range(1, 64)),
    prims.dynamic_update_slice_p: tuple(range(2, 64)),
    prims.scatter_p: (1,),
}
# They carry the jaxpr of an addition, a maximum, ...: no calls, though they look so.
COMBINING = _present(
    "scatter scatter_add scatter_sub scatter_mul scatter_min scatter_max reduce "
    "reduce_window select_and_scatter"
)
CUSTOM = frozenset({prims.custom_jvp_call_p, prims.custom_vjp_call_p})
INLINE = frozenset({prims.jit_p, prims.remat_p, prims.closed_call_p, prims.call_p})
REAL, IMAG = prims.real_p, prims.imag_p
COND, SCAN, WHILE = prims.cond_p, prims.scan_p, prims.while_p
STOP_GRADIENT = prims.stop_gradient_p
LINEAR_SOLVE = prims.linear_solve_p
DOT_GENERAL, MUL = prims.dot_general_p, prims.mul_p
SCATTER_ADD, SCATTER_MUL = prims.scatter_add_p, prims.scatter_mul_p


@dataclasses.dataclass(frozen=True)
class Aval:
    """Shape and dtype of a value."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def inexact(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.inexact)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(size) for size in self.shape)}]"


class Origin(enum.Enum):
    """What a value is computed from.

    `CONSTANT`: nothing. `WEIGHT`: params, with a derivative. `PREPARED`: params,
    without one (masks made by comparison, `stop_gradient`). `DATA`: the step's state or
    input.
    """

    CONSTANT = 0
    PREPARED = 1
    WEIGHT = 2
    DATA = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One application of a primitive. Compared by identity: it is static data."""

    index: int
    primitive: jex_core.Primitive
    params: Mapping[str, Any]
    inputs: tuple[Ref, ...]
    outputs: tuple[int, ...]
    source: str
    effectful: bool = False

    @property
    def operands(self) -> tuple[tuple[int, int], ...]:
        """Position and number of the inputs that are values, without the literals."""
        return tuple((k, r) for k, r in enumerate(self.inputs) if isinstance(r, int))

    @property
    def values(self) -> tuple[int, ...]:
        """The numbers of the inputs that are values."""
        return tuple(ref for _, ref in self.operands)

    @property
    def differentiable(self) -> bool:
        return self.primitive is not STOP_GRADIENT


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A flat step: `inputs` and `constants` go in, `outputs` come out.

    Hashed and compared by identity, so that it can be a static field of a pytree.
    """

    avals: tuple[Aval, ...]
    origins: tuple[Origin, ...]
    equations: tuple[Equation, ...]
    constants: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Program({len(self.equations)} equations)"


def aval_of(avals: tuple[Aval, ...], ref: Ref) -> Aval:
    """Shape and dtype of what an equation reads, literals included."""
    return avals[ref] if isinstance(ref, int) else to_aval(ref.aval)


# -- reading jaxprs ------------------------------------------------------------------


def to_aval(aval: Any) -> Aval:
    return Aval(tuple(aval.shape), aval.dtype)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Jaxpr and constants, whether the version at hand keeps them together or apart."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def live(equations: Iterable[Equation], targets: Iterable[int]) -> list[Equation]:
    """The equations that the targets need, and those with an effect, in order."""
    needed, kept = set(targets), []
    for equation in reversed(list(equations)):
        if equation.effectful or needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.values)
    return kept[::-1]


# -- what an equation is ---------------------------------------------------------------


def inner_jaxpr(params: Mapping[str, Any]) -> Any:
    """The body of a call that wraps, or of a custom derivative."""
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def loop_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many inputs of a scan are fixed, and how many go round."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    fixed, carry, _ = params["ft_in"].unpack()  # from JAX 0.12 on
    return len(fixed), len(carry)


def is_higher_order(equation: Equation) -> bool:
    if equation.primitive in COMBINING:
        return False
    return next(iter(jex_core.jaxprs_in_params(equation.params)), None) is not None


@functools.cache
def _ragged_dot() -> jex_core.Primitive:
    """It has no public name."""
    shapes = (1, 1), (1, 1, 1), (1,)
    specs = map(jax.ShapeDtypeStruct, shapes, (jnp.float32, jnp.float32, jnp.int32))
    jaxpr, _ = open_jaxpr(jax.make_jaxpr(jax.lax.ragged_dot)(*specs))
    return jaxpr.eqns[0].primitive


def is_ragged_dot(equation: Equation) -> bool:
    """Whether the equation is a product of rows in groups."""
    return equation.primitive is _ragged_dot()


def solve_operands(params: Mapping[str, Any]) -> tuple[slice, list[Any]]:
    """Of a linear solve: the operands that only help to find the solution, through
    which there is no derivative, and the avals of the results."""
    counts = params["const_lengths"]
    first = counts.matvec
    last = first + counts.vecmat + counts.solve + counts.transpose_solve
    solve, _ = open_jaxpr(params["jaxprs"].solve)
    return slice(first, last), [to_aval(var.aval) for var in solve.outvars]


def _pointwise(inputs: Iterable[Any], outputs: Iterable[Any]) -> bool:
    """Every inexact input broadcasts, axis by axis or as a scalar, to the one shape of
    the inexact outputs; what has no derivative may do as it likes."""
    shapes = {tuple(aval.shape) for aval in outputs if _inexact(aval)}
    if len(shapes) != 1:
        return not shapes
    (shape,) = shapes

    def fits(small: tuple[int, ...]) -> bool:
        if len(small) not in (0, len(shape)):
            return False
        return all(n in (1, m) for n, m in zip(small, shape, strict=False))

    return all(fits(tuple(aval.shape)) for aval in inputs if _inexact(aval))


def _inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)


def _bodies(primitive: jex_core.Primitive, params: Mapping[str, Any]) -> Any | None:
    """The jaxpr whose elements are those of the equation, if it has such a one."""
    if primitive in INLINE | CUSTOM or primitive is SCAN:
        return inner_jaxpr(params)
    return params["body_jaxpr"] if primitive is WHILE else None


def _elementwise_body(jaxpr: Any) -> bool:
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        ins, outs = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
        if not any(_inexact(aval) for aval in outs):
            continue
        body = _bodies(eqn.primitive, eqn.params)
        if body is not None:
            if not _elementwise_body(body):
                return False
        elif eqn.primitive is prims.broadcast_in_dim_p:
            if ins[0].shape != () and ins[0].shape != outs[0].shape:
                return False
        elif eqn.primitive not in ELEMENTWISE | {STOP_GRADIENT}:
            return False
        elif not _pointwise(ins, outs):
            return False
    return True


def has_custom_vjp(equations: Iterable[Any]) -> bool:
    """Whether any equation, or one inside of it, has a reverse rule of its own, and so
    no forward mode."""
    for equation in equations:
        if equation.primitive is prims.custom_vjp_call_p:
            return True
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if has_custom_vjp(getattr(inner, "eqns", ())):
                    return True
    return False


def is_elementwise(equation: Equation, avals: tuple[Aval, ...]) -> bool:
    """Whether an inexact output element i reads, of what has a derivative, element i of
    each operand and nothing else."""
    operands = [aval_of(avals, ref) for ref in equation.inputs]
    if not _pointwise(operands, [avals[ref] for ref in equation.outputs]):
        return False
    body = _bodies(equation.primitive, equation.params)
    if body is not None:
        return _elementwise_body(body)
    return equation.primitive in ELEMENTWISE or not equation.differentiable


def is_structural(equation: Equation, known: Callable[[Ref], Any | None]) -> bool:
    """Whether the equation only moves elements; `known` gives constant operands."""
    if equation.primitive in STRUCTURAL:
        return True
    if equation.primitive not in INDEXED:
        return False
    indices = (equation.inputs[k] for k in index_positions(equation))
    return all(known(ref) is not None for ref in indices)


def index_positions(equation: Equation) -> tuple[int, ...]:
    """Which operands say where to move elements, rather than are moved."""
    positions = INDEXED.get(equation.primitive, ())
    return tuple(k for k in positions if k < len(equation.inputs))


def describe_equation(equation: Equation) -> str:
    where = f" at {equation.source}" if equation.source else ""
    return f"`{equation.primitive}`{where}"


# -- evaluation ------------------------------------------------------------------------


def literal(ref: Ref) -> Any:
    return ref.val


def bind(equation: Equation, args: Iterable[Any]) -> list[Any]:
    """Apply the equation's primitive to new arguments."""
    bound = equation.primitive.get_bind_params(equation.params)
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)
    out = equation.primitive.bind(*subfuns, *args, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def evaluate(
    equations: Iterable[Equation],
    env: Mapping[int, Any],
    *,
    edge: Mapping[tuple[int, int], Callable[[Any], Any]] | None = None,
    tap: Mapping[int, Callable[[Any], Any]] | None = None,
    through: Mapping[int, Callable[[list[Any]], list[Any]]] | None = None,
) -> dict[int, Any]:
    """Run equations in order over `env`; returns all values, `env` included.

    **Arguments:**

    - `edge`: functions applied to what an equation reads, by (equation, operand).
    - `tap`: functions applied to a value where it is written, by its number.
    - `through`: functions in place of equations, by their index.
    """
    edge, tap, through, env = edge or {}, tap or {}, through or {}, dict(env)
    for equation in equations:
        args = []
        for k, ref in enumerate(equation.inputs):
            value = env[ref] if isinstance(ref, int) else literal(ref)
            change = edge.get((equation.index, k))
            args.append(value if change is None else change(value))
        apply = through.get(equation.index)
        values = bind(equation, args) if apply is None else apply(args)
        for ref, value in zip(equation.outputs, values, strict=True):
            change = tap.get(ref)
            env[ref] = value if change is None else change(value)
    return env
