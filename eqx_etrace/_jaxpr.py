"""The only file that knows JAX's intermediate representation.

A closed jaxpr is flattened once into a `Program`: a list of equations over integers,
in order, without nested calls. Everything after this file reads programs.

Invariants of a program:

- every value has one number, one shape and one dtype; an equation reads values that
  exist before it; there are no variables, so programs are hashable static data;
- calls that only wrap (jit, remat) are spliced in; custom derivatives are kept as one
  equation, because their rule is lost as soon as their body is inlined;
- the source line of the user's code stays with each equation.

`evaluate` is the one evaluator. Two hooks are all that a rewrite needs: `edge` changes
what an equation reads (a cut is a `stop_gradient` there), `tap` changes what a value is
for all that read it later (a perturbation is an addition there).
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jax.extend.core import primitives as prims


Ref = Any  # an int that numbers a value, or a JAX literal


def _present(names: str) -> frozenset:
    """The primitives of these names that the installed JAX has."""
    found = (
        getattr(prims, f"{name}_p", getattr(jax.lax, f"{name}_p", None))
        for name in names.split()
    )
    return frozenset(primitive for primitive in found if primitive is not None)


ELEMENTWISE = _present(
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
CONTROL_FLOW = frozenset({prims.cond_p, prims.scan_p, prims.while_p})
STOP_GRADIENT = prims.stop_gradient_p
DOT_GENERAL = prims.dot_general_p
SCATTER_ADD = prims.scatter_add_p


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
    return avals[ref] if isinstance(ref, int) else _aval(ref.aval)


# -- from a jaxpr to a program ---------------------------------------------------------


def _aval(aval: Any) -> Aval:
    return Aval(tuple(aval.shape), aval.dtype)


def open_jaxpr(jaxpr: Any) -> tuple[Any, list[Any]]:
    """Jaxpr and constants, whether the version at hand keeps them together or apart."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def _source(eqn: Any) -> str:
    text = source_info_util.summarize(eqn.source_info)
    path, colon, rest = text.partition(":")
    return f"{Path(path).name}{colon}{rest}"


class _Builder:
    """Collects equations while a jaxpr is flattened; lives for one `flatten` only."""

    def __init__(self, expand: Callable[[Equation], Any | None]):
        self.expand = expand
        self.avals: list[Aval] = []
        self.equations: list[Equation] = []
        self.constants: list[int] = []
        self.constant_values: list[Any] = []

    def new(self, aval: Any) -> int:
        self.avals.append(_aval(aval))
        return len(self.avals) - 1

    def constant(self, value: Any) -> int:
        self.constants.append(self.new(jax.typeof(value)))
        self.constant_values.append(value)
        return self.constants[-1]

    def splice(self, jaxpr: Any, args: Iterable[Ref]) -> list[Ref]:
        """Append the equations of `jaxpr`, reading `args`; returns its outputs."""
        inner, consts = open_jaxpr(jaxpr)
        env: dict[Any, Ref] = {}
        for var, value in zip(inner.constvars, consts, strict=True):
            env[var] = self.constant(value)
        env.update(zip(inner.invars, args, strict=True))

        def read(atom: Any) -> Ref:
            return atom if isinstance(atom, jex_core.Literal) else env[atom]

        for eqn in inner.eqns:
            inputs = tuple(read(atom) for atom in eqn.invars)
            results = self.append(eqn, inputs, _source(eqn))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def append(self, eqn: Any, inputs: tuple[Ref, ...], source: str) -> list[Ref]:
        candidate = Equation(
            -1, eqn.primitive, eqn.params, inputs, (), source, bool(eqn.effects)
        )
        body = self.expand(candidate)
        if body is not None:
            return self.splice(body, inputs)
        return self.emit(candidate, [var.aval for var in eqn.outvars])

    def emit(self, equation: Equation, avals: list[Any]) -> list[Ref]:
        outputs = tuple(self.new(aval) for aval in avals)
        index = len(self.equations)
        self.equations.append(
            dataclasses.replace(equation, index=index, outputs=outputs)
        )
        return list(outputs)

    def copy(self, ref: Ref) -> int:
        aval = self.avals[ref] if isinstance(ref, int) else ref.aval
        equation = Equation(-1, prims.copy_p, {}, (ref,), (), "")
        return self.emit(equation, [aval])[0]


def flatten(
    closed: Any,
    expand: Callable[[Equation], Any | None],
    *,
    params: int,
    states: int,
) -> tuple[Program, list[Any]]:
    """Flatten a closed jaxpr of one step; returns it and its constants' values.

    The first `params` inputs are the parameters, the first `states` outputs the new
    state. Each output is data written by an equation, and each new state leaf has a
    value of its own, so that perturbing one of them has one meaning. `expand` gives
    the body of an equation that is to be spliced in, or None. Equations that depend on
    nothing are evaluated here.
    """
    builder = _Builder(expand)
    inner, _ = open_jaxpr(closed)
    inputs = tuple(builder.new(var.aval) for var in inner.invars)
    results = builder.splice(closed, inputs)
    origin = dict.fromkeys(inputs[:params], Origin.WEIGHT)
    origin.update(dict.fromkeys(inputs[params:], Origin.DATA))
    origin.update(dict.fromkeys(builder.constants, Origin.CONSTANT))
    for equation in builder.equations:
        read = [origin[ref] for ref in equation.values]
        made = max(read, key=lambda o: o.value, default=Origin.CONSTANT)
        for ref in equation.outputs:
            trained = equation.differentiable and builder.avals[ref].inexact
            lost = made is Origin.WEIGHT and not trained
            origin[ref] = Origin.PREPARED if lost else made
    outputs: list[int] = []
    for position, ref in enumerate(results):
        data = isinstance(ref, int) and origin[ref] is Origin.DATA
        if not data or ref in inputs or (position < states and ref in outputs):
            ref = builder.copy(ref)
            origin[ref] = Origin.DATA
        outputs.append(ref)
    origins = tuple(origin[ref] for ref in range(len(builder.avals)))
    equations = live(builder.equations, outputs)
    known = dict(zip(builder.constants, builder.constant_values, strict=True))
    equations, known = _fold(equations, origins, known)
    program = Program(
        avals=tuple(builder.avals),
        origins=origins,
        equations=tuple(
            dataclasses.replace(equation, index=index)
            for index, equation in enumerate(equations)
        ),
        constants=tuple(known),
        inputs=inputs,
        outputs=tuple(outputs),
    )
    return program, list(known.values())


def _fold(
    equations: list[Equation], origins: tuple[Origin, ...], known: dict[int, Any]
) -> tuple[list[Equation], dict[int, Any]]:
    """Evaluate what depends on nothing; keep the constants that are still read."""

    def constant(equation: Equation) -> bool:
        fixed = all(origins[ref] is Origin.CONSTANT for ref in equation.outputs)
        return fixed and bool(equation.outputs) and not equation.effectful

    rest = [equation for equation in equations if not constant(equation)]
    wanted = {ref for equation in rest for ref in equation.values}
    wanted = [ref for ref in sorted(wanted) if origins[ref] is Origin.CONSTANT]
    missing = [ref for ref in wanted if ref not in known]
    if missing:
        needed = live((eqn for eqn in equations if constant(eqn)), missing)
        with jax.ensure_compile_time_eval():
            values = jax.jit(lambda env: _pick(evaluate(needed, env), missing))(known)
        known = known | dict(zip(missing, values, strict=True))
    return rest, {ref: known[ref] for ref in wanted}


def _pick(env: Mapping[int, Any], refs: Iterable[int]) -> list[Any]:
    return [env[ref] for ref in refs]


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


def is_higher_order(equation: Equation) -> bool:
    if equation.primitive in COMBINING:
        return False
    return next(iter(jex_core.jaxprs_in_params(equation.params)), None) is not None


def _pointwise(inputs: Iterable[Any], outputs: Iterable[Any]) -> bool:
    """Every input broadcasts, axis by axis or as a scalar, to the one output shape."""
    shapes = {tuple(aval.shape) for aval in outputs}
    if len(shapes) != 1:
        return False
    (shape,) = shapes

    def fits(small: tuple[int, ...]) -> bool:
        if len(small) not in (0, len(shape)):
            return False
        return all(n in (1, m) for n, m in zip(small, shape, strict=False))

    return all(fits(tuple(aval.shape)) for aval in inputs)


def _elementwise_body(jaxpr: Any) -> bool:
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        ins, outs = [v.aval for v in eqn.invars], [v.aval for v in eqn.outvars]
        if eqn.primitive in INLINE | CUSTOM:
            if not _elementwise_body(inner_jaxpr(eqn.params)):
                return False
        elif eqn.primitive is prims.broadcast_in_dim_p:
            if ins[0].shape != () and ins[0].shape != outs[0].shape:
                return False
        elif eqn.primitive not in ELEMENTWISE | {STOP_GRADIENT}:
            return False
        elif not _pointwise(ins, outs):
            return False
    return True


def is_elementwise(equation: Equation, avals: tuple[Aval, ...]) -> bool:
    """Whether output element i reads element i of each operand and nothing else."""
    operands = [aval_of(avals, ref) for ref in equation.inputs]
    if not _pointwise(operands, [avals[ref] for ref in equation.outputs]):
        return False
    if equation.primitive in CUSTOM:
        return _elementwise_body(inner_jaxpr(equation.params))
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
) -> dict[int, Any]:
    """Run equations in order over `env`; returns all values, `env` included.

    **Arguments:**

    - `edge`: functions applied to what an equation reads, by (equation, operand).
    - `tap`: functions applied to a value where it is written, by its number.
    """
    edge, tap, env = edge or {}, tap or {}, dict(env)
    for equation in equations:
        args = []
        for k, ref in enumerate(equation.inputs):
            value = env[ref] if isinstance(ref, int) else literal(ref)
            change = edge.get((equation.index, k))
            args.append(value if change is None else change(value))
        for ref, value in zip(equation.outputs, bind(equation, args), strict=True):
            change = tap.get(ref)
            env[ref] = value if change is None else change(value)
    return env
