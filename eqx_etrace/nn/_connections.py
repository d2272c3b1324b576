"""Connections: weights between what units send and what others receive.

They remember nothing; their state is `()`, so that they are called as everything else.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ._parameters import Positive
from ._shapes import check_count, check_input
from ._synapses_conductance import Drive


def _uniform(key: PRNGKeyArray, shape: tuple[int, ...], fan_in: int) -> Array:
    limit = 1 / fan_in**0.5
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def _bias(use_bias: bool, key: PRNGKeyArray, post: int, fan_in: int) -> Array | None:
    return _uniform(key, (post,), fan_in) if use_bias else None


class _Stateless(eqx.Module):
    def init_state(self) -> tuple[()]:
        """`()`."""
        return ()


class Dense(_Stateless):
    """All to all: `weight @ x + bias`.

    **Arguments:**

    - `pre`, `post`: how many units send and receive.
    - `use_bias`: whether there is a bias.
    - `key`: for the weights, uniform within 1 / sqrt(pre), and the biases.

    **Returns:** (when called with x, (pre,), and a state) an array (post,) and `()`.

    **Raises:** `ValueError` for an input of another size.

    !!! example

        ```python
        connection = nn.Dense(3, 4, key=key)
        current, _ = connection(jnp.ones(3), connection.init_state())
        ```
    """

    weight: Float[Array, "post pre"]
    bias: Float[Array, " post"] | None
    pre: int = eqx.field(static=True)
    post: int = eqx.field(static=True)

    def __init__(
        self, pre: int, post: int, *, use_bias: bool = True, key: PRNGKeyArray
    ):
        check_count("pre", pre)
        check_count("post", post)
        self.pre, self.post = pre, post
        w_key, b_key = jax.random.split(key)
        self.weight = _uniform(w_key, (post, pre), pre)
        self.bias = _bias(use_bias, b_key, post, pre)

    def __call__(
        self, x: Float[Array, " pre"], state: tuple[()] = ()
    ) -> tuple[Float[Array, " post"], tuple[()]]:
        check_input(self, x, (self.pre,))
        y = self.weight @ x
        return (y if self.bias is None else y + self.bias), state


class Sparse(_Stateless):
    """Each unit receives from a fixed number of others, drawn once.

    Memory and traces are of the size of what there is: `post` times `fan_in`.

    **Arguments:**

    - `pre`, `post`: how many units send and receive.
    - `fan_in`: how many a unit receives from; drawn without repetition.
    - `indices`: which, an integer array (post, fan_in), in place of a draw.
    - `use_bias`: whether there is a bias.
    - `key`: for the indices, the weights, uniform within 1 / sqrt(fan_in), and the
      biases.

    **Returns:** (when called with x, (pre,), and a state) an array (post,) and `()`.

    **Raises:** `ValueError` for sizes or indices that do not fit.

    !!! example

        ```python
        connection = nn.Sparse(100, 4, fan_in=10, key=key)
        current, _ = connection(jnp.ones(100), connection.init_state())
        ```
    """

    weight: Float[Array, "post fan_in"]
    bias: Float[Array, " post"] | None
    indices: Int[Array, "post fan_in"]
    pre: int = eqx.field(static=True)
    post: int = eqx.field(static=True)

    def __init__(
        self,
        pre: int,
        post: int,
        fan_in: int,
        *,
        indices: Any | None = None,
        use_bias: bool = True,
        key: PRNGKeyArray,
    ):
        for name, size in (("pre", pre), ("post", post), ("fan_in", fan_in)):
            check_count(name, size)
        self.pre, self.post = pre, post
        i_key, w_key, b_key = jax.random.split(key, 3)
        drawn = _draw(i_key, pre, post, fan_in) if indices is None else indices
        self.indices = _checked(drawn, pre, (post, fan_in))
        self.weight = _uniform(w_key, (post, fan_in), fan_in)
        self.bias = _bias(use_bias, b_key, post, fan_in)

    def __call__(
        self, x: Float[Array, " pre"], state: tuple[()] = ()
    ) -> tuple[Float[Array, " post"], tuple[()]]:
        check_input(self, x, (self.pre,))
        # As a product it has one value per unit, not one per synapse.
        y = jnp.einsum("ij,ij->i", self.weight, x[self.indices])
        return (y if self.bias is None else y + self.bias), state


def _draw(key: PRNGKeyArray, pre: int, post: int, fan_in: int) -> Array:
    if fan_in > pre:
        raise ValueError(
            f"Sparse: got a fan_in of {fan_in}, expected at most pre = {pre}. A unit "
            "receives from each other one once."
        )

    # The places of the largest of `pre` random numbers: each set is as likely.
    return jax.lax.top_k(jax.random.uniform(key, (post, pre)), fan_in)[1]


def _checked(indices: Any, pre: int, shape: tuple[int, ...]) -> Array:
    # Indexing would take the nearest unit for one that does not exist.
    array = jnp.asarray(indices)
    if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"Sparse: got indices {array.dtype}{list(array.shape)}, expected integers "
            f"of shape {shape}. Row i lists the units that unit i receives from."
        )
    if not isinstance(array, jax.core.Tracer):
        numbers = np.asarray(array)
        if numbers.min() < 0 or numbers.max() >= pre:
            raise ValueError(
                f"Sparse: got indices from {numbers.min()} to {numbers.max()}, "
                f"expected them from 0 to {pre - 1}. They number the units that send."
            )
    return array


class Conv(_Stateless):
    """A convolution, by `eqx.nn.Conv`.

    Channels come first. The units that receive are laid out as `out_shape` says.

    **Arguments:** as for `eqx.nn.Conv`, whose further options are passed on.

    **Returns:** (when called with x, (in_channels, ...), and a state) an array
    (out_channels, ...) and `()`.

    **Raises:** `ValueError` for an input with other channels or axes.

    !!! example

        ```python
        connection = nn.Conv(2, 1, 4, kernel_size=3, stride=2, key=key)
        neuron = nn.LIF(connection.out_shape((1, 8, 8)))
        current, _ = connection(jnp.ones((1, 8, 8)), connection.init_state())
        spikes, state = neuron(current, neuron.init_state())
        ```
    """

    conv: eqx.nn.Conv

    def __init__(
        self,
        num_spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        key: PRNGKeyArray,
        **options: Any,
    ):
        self.conv = eqx.nn.Conv(
            num_spatial_dims, in_channels, out_channels, kernel_size, key=key, **options
        )

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of the given shape."""
        x = jax.ShapeDtypeStruct(shape, self.conv.weight.dtype)
        return jax.eval_shape(lambda x: self(x)[0], x).shape

    def __call__(
        self, x: Float[Array, "..."], state: tuple[()] = ()
    ) -> tuple[Float[Array, "..."], tuple[()]]:
        channels, axes = self.conv.in_channels, self.conv.num_spatial_dims
        if x.ndim != axes + 1 or x.shape[0] != channels:
            raise ValueError(
                f"Conv: got an input of shape {x.shape}, expected ({channels}, ...) "
                f"with {axes} axes after the channels. Map a batch with `jax.vmap`."
            )
        return self.conv(x), state


def _check_excitatory(owner: str, excitatory: int, pre: int) -> None:
    check_count("excitatory", excitatory, least=0)
    if excitatory > pre:
        raise ValueError(
            f"{owner}: got {excitatory} excitatory units, expected at most pre = "
            f"{pre}. The first units are excitatory, the others inhibitory."
        )


def _positive(key: PRNGKeyArray, post: int, pre: int) -> Positive:
    """Uniform between 0 and 2 / sqrt(pre); not at 0, where raw is -inf."""
    low, high = 0.01 / pre**0.5, 2 / pre**0.5
    return Positive(jax.random.uniform(key, (post, pre), minval=low, maxval=high))


class Dale(_Stateless):
    """All to all, where each unit either excites or inhibits.

    The current is what excites less what inhibits. Weights stay positive as `Positive`
    does it, their sign is that of the unit that sends.

    **Arguments:**

    - `pre`, `post`: how many units send and receive.
    - `excitatory`: how many of those that send excite; they are the first.
    - `key`: for the weights, uniform between 0 and 2 / sqrt(pre).

    **Returns:** (when called with x, (pre,), and a state) an array (post,) and `()`.

    **Raises:** `ValueError` for sizes that do not fit.

    **Source:** Song, Yang and Wang, *Training excitatory-inhibitory recurrent neural
    networks for cognitive tasks*, PLOS Computational Biology 12, 2016.

    !!! example

        ```python
        connection = nn.Dale(10, 10, excitatory=8, key=key)
        layer = nn.Recurrent(nn.LIF(10), connection)
        weights = connection.matrix()  # (post, pre), with signs
        ```
    """

    weight: Positive
    excitatory: int = eqx.field(static=True)

    def __init__(self, pre: int, post: int, excitatory: int, *, key: PRNGKeyArray):
        check_count("pre", pre)
        check_count("post", post)
        _check_excitatory("Dale", excitatory, pre)
        self.weight = _positive(key, post, pre)
        self.excitatory = excitatory

    def matrix(self) -> Float[Array, "post pre"]:
        """The weights with their signs."""
        weight = self.weight()
        excites = np.arange(weight.shape[1]) < self.excitatory
        return weight * jnp.asarray(np.where(excites, 1, -1)[None], weight.dtype)

    def __call__(
        self, x: Float[Array, " pre"], state: tuple[()] = ()
    ) -> tuple[Float[Array, " post"], tuple[()]]:
        check_input(self, x, self.weight.shape[1:])
        return self.matrix() @ x, state


class ExcInh(_Stateless):
    """As `Dale`, with excitation and inhibition apart, for `COBA`.

    **Arguments:** as for `Dale`.

    **Returns:** (when called with x, (pre,), and a state) a `Drive` of two arrays
    (post,), and `()`.

    **Raises:** `ValueError` for sizes that do not fit.

    !!! example

        ```python
        connection = nn.ExcInh(10, 10, excitatory=8, key=key)
        layer = nn.Recurrent(nn.COBA(nn.LIF(10), e_exc=5.0, e_inh=-1.0), connection)
        ```
    """

    weight: Positive
    excitatory: int = eqx.field(static=True)

    def __init__(self, pre: int, post: int, excitatory: int, *, key: PRNGKeyArray):
        check_count("pre", pre)
        check_count("post", post)
        _check_excitatory("ExcInh", excitatory, pre)
        self.weight = _positive(key, post, pre)
        self.excitatory = excitatory

    def __call__(
        self, x: Float[Array, " pre"], state: tuple[()] = ()
    ) -> tuple[Drive, tuple[()]]:
        check_input(self, x, self.weight.shape[1:])
        weight, n = self.weight(), self.excitatory
        return Drive(exc=weight[:, :n] @ x[:n], inh=weight[:, n:] @ x[n:]), state
