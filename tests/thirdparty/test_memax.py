"""The recurrent layers of memax: set actions, and semigroups read as recurrences.

A layer of memax works on sequences. Its three public parts make one time step: the map
of the input into the recurrent space, the algebra, the map to the output. Semigroups
can also be called on a sequence of one step, because an associative scan over that
leaves no loop in the jaxpr.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest
from problems import (
    assert_equals_bptt,
    assert_first_step,
    assert_learns,
    assert_near_bptt,
    assert_nothing_is_lost_silently,
    message_of_refusal,
    problem,
)


pytest.importorskip("memax.equinox")
pytestmark = pytest.mark.thirdparty

SIZE = 6
KEYS = jax.random.split(jax.random.key(0), 2)
NO_START = jnp.zeros((), bool)

SET, SEMI = "set_actions", "semigroups"
# Module, class, arguments before the key. All sizes are the same.
LAYERS = {
    "Elman": (SET, "elman", "Elman", (SIZE, SIZE)),
    "GRU": (SET, "gru", "GRU", (SIZE,)),
    "LSTM": (SET, "lstm", "LSTM", (SIZE,)),
    "MGU": (SET, "mgu", "MGU", (SIZE,)),
    "Spherical": (SET, "spherical", "Spherical", (SIZE, SIZE)),
    "S6": (SEMI, "s6", "S6", (SIZE, SIZE)),
    "NMax": (SEMI, "nmax", "NMax", (SIZE,)),
    "DLSE": (SEMI, "dlse", "DLSE", (SIZE,)),
    "FWP": (SEMI, "fwp", "FWP", (SIZE, SIZE)),
    "FART": (SEMI, "fart", "FART", (SIZE, SIZE)),
    "DeltaNet": (SEMI, "delta", "DeltaNet", (SIZE, SIZE)),
    "DeltaProduct": (SEMI, "deltap", "DeltaProduct", (SIZE, SIZE, 2)),
    "GDN": (SEMI, "gdn", "GDN", (SIZE, SIZE)),
    "LRU": (SEMI, "lru", "LRU", (SIZE, SIZE)),
    "FFM": (SEMI, "ffm", "FFM", (SIZE, 3, 2)),
    "PSpherical": (SEMI, "spherical", "PSpherical", (SIZE, SIZE)),
    "LinearRecurrent": (SEMI, "lrnn", "LinearRecurrent", (SIZE,)),
    "Stack": (SEMI, "stack", "Stack", (SIZE, 3)),
    "MLP": (SEMI, "mlp", "MLP", (SIZE,)),
    "Attention": (SEMI, "attn", "Attention", (SIZE, 4, None)),
}


def by_parts(layer, x, state):
    x = x, NO_START
    state = layer.algebra(state, layer.forward_map(x))
    return layer.backward_map(state, x), state


def by_sequence(layer, x, state):
    states, out = layer(state, (x[None], NO_START[None]))
    return out[0], jax.tree.map(lambda a: a[-1], states)


def _make(name):
    family, module, layer, sizes = LAYERS[name]
    module = importlib.import_module(f"memax.equinox.{family}.{module}")
    return getattr(module, layer)(*sizes, key=KEYS[0])


def _residual(name):
    """Two layers between feed-forward layers with LayerNorm."""
    models = importlib.import_module("memax.equinox.models.residual")

    def layer(recurrent_size, key):
        del recurrent_size, key
        return _make(name)

    return models.ResidualModel(layer, SIZE, 2, SIZE, 2, key=KEYS[0])


@functools.cache
def _problem(name, call=by_parts):
    stacked = name.startswith("two ")
    model = _residual(name.removeprefix("two ")) if stacked else _make(name)
    call = by_sequence if stacked else call
    return problem(model, call, model.initialize_carry(), SIZE, KEYS[1])


# NMax pins its decay to float32, so its rounding differs by the order of operations.
# A rotation of the whole state makes one unit of it.
LOCAL = {"S6": 1e-10, "NMax": 1e-6, "Spherical": 1e-10}
# The cosine that was measured, less a little. It is low where a key and a value meet in
# an outer product: each of them feeds a row or a column of units, and credit through
# the one that is cut ends with its step.
OTHERS = {
    "Elman": 0.96,
    "GRU": 0.97,
    "LSTM": 0.97,
    "MGU": 0.99,
    "DLSE": 0.999,
    "FWP": 0.68,
    "FART": 0.75,
    "DeltaNet": 0.74,
    "DeltaProduct": 0.95,
    "GDN": 0.6,
    "two S6": 0.99,
}
EVERY = [*LOCAL, *OTHERS]
SEMIGROUPS = [name for name in EVERY if LAYERS.get(name, " ")[0] == SEMI]


@pytest.mark.parametrize("name", EVERY)
def test_first_step_equals_autodiff(name):
    assert_first_step(_problem(name), rtol=LOCAL.get(name, 1e-10))


@pytest.mark.parametrize("name", SEMIGROUPS)
def test_first_step_of_a_sequence_of_one(name):
    assert_first_step(_problem(name, by_sequence), rtol=LOCAL.get(name, 1e-10))


@pytest.mark.parametrize("name", LOCAL)
def test_recurrence_within_units_equals_bptt(name):
    assert_equals_bptt(_problem(name), rtol=LOCAL[name])


@pytest.mark.parametrize("name", OTHERS)
def test_near_bptt(name):
    assert_near_bptt(_problem(name), OTHERS[name])


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_lost_silently(name):
    assert_nothing_is_lost_silently(_problem(name))


@pytest.mark.parametrize("name", EVERY)
def test_learns(name):
    assert_learns(_problem(name))


# What is refused, and why.


# The state is a running sum or a window of the bare inputs: weights come after it.
@pytest.mark.parametrize("name", ["LinearRecurrent", "Stack", "MLP"])
def test_without_weights_before_the_state(name):
    message = message_of_refusal(_problem(name))
    assert message.startswith("No trainable weight reaches the state")
    assert "[0]." in message and "state[" in message


def test_attention_sorts_its_window_by_data():
    """Keys and values are moved to where the mask of the step says: no element of the
    new state belongs to one element of the old one."""
    message = message_of_refusal(_problem("Attention"))
    assert message.startswith("No weight feeds single units")
    assert "[0].K.weight" in message and "state[0][0]" in message


@pytest.mark.parametrize("name", ["Elman", "GRU", "LSTM", "MGU", "two GRU"])
def test_set_action_on_a_sequence_of_one(name):
    assert_first_step(_problem(name, by_sequence))


def test_a_product_of_rotations_by_the_input():
    """What the weights make acts on every row of the state, and each row is a unit."""
    message = message_of_refusal(_problem("PSpherical"))
    assert message.startswith("No weight feeds single units")
    assert "[0].project.weight" in message and "state[0]" in message


@pytest.mark.parametrize("name", ["LRU", "FFM"])
def test_complex_state(name):
    with jax.enable_x64(False):  # the package pins complex64
        assert_first_step(_problem(name), rtol=1e-4)
