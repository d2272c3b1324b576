"""The catalogue: one table of all the small models that the library is checked on."""

import jax.numpy as jnp
from catalogue_case import Case, Table
from catalogue_control import CONTROL
from catalogue_coupling import COUPLING
from catalogue_operators import OPERATORS
from catalogue_products import PRODUCTS
from catalogue_structure import STRUCTURE
from catalogue_weights import WEIGHTS
from models import MODELS, PLAIN


OWN: Table = {
    **PRODUCTS,
    **OPERATORS,
    **WEIGHTS,
    **STRUCTURE,
    **COUPLING,
    **CONTROL,
}


def _of_models(name: str) -> Case:
    """A model of `models.py`, which `test_gradients.py` checks, as a case."""
    case = MODELS[name]

    def step(p, x, state, taps):
        return p(x, state) if taps is PLAIN else p.run(x, state, taps)

    return Case(
        step,
        lambda key: case.make(key),
        jnp.zeros(case.inputs),
        case.oracle,
        units=[],
        vjp=case.vjp,
        groups=case.groups,
    )


CATALOGUE: Table = {**{name: _of_models(name) for name in MODELS}, **OWN}
assert len(CATALOGUE) == len(MODELS) + len(OWN), "two cases have the same name"
