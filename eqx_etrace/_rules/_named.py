"""Rules that have a name of their own and are a choice of what others are made of."""

from ._drtrl import DRTRL
from ._esdrtrl import ESDRTRL


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
