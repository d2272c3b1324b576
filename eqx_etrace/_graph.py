"""`ETraceGraph`: what the compiler knows about one time step of a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree, Shaped

from ._decision import Decision
from ._diagram import input_names, to_mermaid, to_text
from ._exits import Exits
from ._facts import GroupFacts
from ._group import HiddenGroup
from ._hidden import Hidden
from ._jaxpr import Equation, Program
from ._place import Place
from ._relation import Relation
from ._report import Report, explain, report
from ._rules import GlobalRule, LocalRule
from ._stage import Frozen, Leaves
from ._structure import same_structure


class Options(NamedTuple):
    """Arguments of `compile`, hashable."""

    call: Callable[..., Any] | None
    max_unroll: int
    max_slots: int
    op_rules: tuple[tuple[Any, Any], ...]


class ETraceGraph(eqx.Module):
    """What the compiler knows about one time step of a model; frozen, a pytree.

    Its arrays (constants of the step, untrained arrays of the model) are leaves, all
    the rest is static: a graph may be closed over, or passed through `eqx.filter_jit`,
    `jax.jit` and scan carries. Made by `eqx_etrace.compile`; for jit two graphs are
    never equal, so compile once, outside jit. `same_structure` compares two graphs.

    **Attributes:**

    - `groups`: the `HiddenGroup`s.
    - `relations`: the `Relation`s, one trace each.
    - `rule`: the learning rule.
    - `vjp`: `"single-step"` or `"multi-step"`, as it was decided.
    - `batch`: the batch size, None for an unbatched graph.
    - `decisions`: every `Decision` of the compiler.

    !!! example

        ```python
        print(graph)             # one line
        print(graph.report())    # a table, with every reason
        print(graph.to_text())   # a drawing for the terminal
        ```
    """

    groups: tuple[HiddenGroup, ...]
    relations: tuple[Relation, ...]
    rule: LocalRule | GlobalRule
    vjp: str = eqx.field(static=True)
    batch: int | None = eqx.field(static=True)
    decisions: tuple[Decision, ...] = eqx.field(static=True)
    program: Program = eqx.field(static=True)
    constants: tuple[Shaped[Array, "..."], ...]
    fixed: PyTree
    static: Frozen = eqx.field(static=True)
    trainable: Frozen = eqx.field(static=True)
    """Which leaves of the model are params."""
    param_leaves: Leaves = eqx.field(static=True)
    state_leaves: Leaves = eqx.field(static=True)
    x_leaves: Leaves = eqx.field(static=True)
    out_leaves: Leaves = eqx.field(static=True)
    hidden: Hidden = eqx.field(static=True)
    preparation: tuple[Equation, ...] = eqx.field(static=True)
    body: tuple[Equation, ...] = eqx.field(static=True)
    weights: tuple[int, ...] = eqx.field(static=True)
    """The weights that the body reads from the preparation."""
    prepared: tuple[int, ...] = eqx.field(static=True)
    """What else it reads from there: made of params, without a derivative."""
    saved: tuple[int, ...] = eqx.field(static=True)
    """The values of the body that traces and local programs read."""
    facts: tuple[GroupFacts, ...] = eqx.field(static=True, default=())
    """Per group, what is known of its Jacobian."""
    exits: Exits | None = eqx.field(static=True, default=None)
    """Where signals come in that are not the derivative by the state."""
    learned: tuple[int, ...] = eqx.field(static=True, default=())
    """The params, among `weights`, that the learning signal is made with."""
    place: Place | None = eqx.field(static=True, default=None)
    """On which devices it is, see `eqx_etrace.shardings`."""
    options: Options | None = eqx.field(static=True, default=None)
    """What else `compile` was told, to compile the model again."""

    def params(self, model: Any) -> PyTree:
        """The trainable part of `model`, which must have the structure compiled.

        **Raises:** `ValueError` if the model does not fit.
        """
        structure = jtu.tree_structure(model)
        if structure != self.trainable.treedef:
            raise ValueError(
                f"model: got the structure {structure}, expected "
                f"{self.trainable.treedef}. Compile again after changing the model."
            )
        params = eqx.filter(model, self.trainable.thaw())
        self.param_leaves.flatten(params, None, "Pass the model that was compiled.")
        return params

    def model(self, params: PyTree) -> Any:
        """The whole model with these params: the inverse of `params`."""
        remedy = "Pass params as `graph.params(model)` gives them."
        self.param_leaves.flatten(params, None, remedy)
        return eqx.combine(params, self.fixed, self.static.thaw())

    def report(self) -> Report:
        """A table for a person: weights, hidden groups, and every reason.

        Every weight that gets no temporal credit is named, with the reason.

        !!! example

            ```python
            print(graph.report())
            ```
        """
        return report(self)

    def explain(self, *, weight: str | None = None, state: str | None = None) -> Report:
        """The decisions about one param or state leaf, by its key path.

        **Arguments:**

        - `weight`: a key path such as `"cell.weight_hh"`.
        - `state`: a key path such as `"state[0]"`.

        **Raises:** `ValueError` if there is no such leaf; the message lists them.
        """
        return explain(self, weight, state)

    def to_text(self) -> Report:
        """The graph as plain text: what feeds each hidden group and each output.

        !!! example

            ```python
            print(graph.to_text())
            ```
        """
        return to_text(self)

    def to_mermaid(self) -> Report:
        """The graph as the text of a Mermaid flowchart.

        Weights, hidden groups (units x slots) and outputs are nodes. Solid arrows carry
        credit; dashed arrows are what is cut between units or groups, and weights
        that are credited for the current step alone. GitHub, GitLab, notebooks and
        documentation tools draw it from a code block of the language `mermaid`.

        !!! example

            ```python
            text = f"```mermaid\\n{graph.to_mermaid()}\\n```"
            ```
        """
        return to_mermaid(self)

    def input_names(self, number: int) -> tuple[str, ...]:
        """What the `inputs` of hidden group `number` are, in their order.

        A key path for a param, an old state leaf or an input of the step, else the
        equation and the line of code that the value comes from.

        **Raises:** `ValueError` if there is no such group.

        !!! example

            ```python
            found = eqx_etrace.jacobians(graph, params, state, x)
            for name, value in zip(graph.input_names(0), found.inputs[0]):
                print(name, value.shape)
            ```
        """
        return input_names(self, number)

    def same_structure(self, other: "ETraceGraph") -> bool:
        """Whether two graphs run the same step and keep the same traces.

        Two compiles of one model have the same structure: params, state and trace of
        the one fit the other. The equations of the step, key paths, shapes, dtypes,
        units, traces, the learning rule's structure, form of the step and batch size
        count; the values of arrays and the lines of code do not. Call it outside jit.

        **Raises:** `TypeError` if `other` is no graph.

        !!! example

            ```python
            again = eqx_etrace.compile(net, state, x)
            assert graph.same_structure(again)
            ```
        """
        return same_structure(self, other)

    def __repr__(self) -> str:
        batch = "" if self.batch is None else f", batch={self.batch}"
        if self.place is not None and self.place.axes:
            batch += f" over {self.place.devices} devices"
        sizes = ", ".join(f"{g.units} x {g.slots}" for g in self.groups)
        return (
            f"ETraceGraph({self.param_leaves.count} params, {len(self.relations)} "
            f"relations, groups [{sizes}], {self.vjp}{batch})"
        )
