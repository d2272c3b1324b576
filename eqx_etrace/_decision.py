"""What the compiler decided about a weight or a state leaf, and why."""

import dataclasses
import enum


class Kind(enum.Enum):
    """The kinds of decision; `graph.explain` and `graph.report` show them.

    !!! example

        ```python
        cut = [d for d in graph.decisions if d.kind is eqx_etrace.Kind.CUT]
        ```
    """

    RELATION = "temporal credit"
    CURRENT_STEP = "current-step gradient only"
    UNUSED = "no gradient at all"
    NOT_HIDDEN = "carried along, not hidden"
    CUT = "credit between units is cut"
    ACROSS_GROUPS = "credit across hidden groups"
    MULTI_STEP = "multi-step VJP"
    WARNING = "approximation chosen by the user"
    REWRITTEN = "read in another form"
    DENSE = "dense Jacobian of the step"
    CHOSEN = "rule chosen to fit a budget"
    BY_AD = "no closed form: Jacobian by automatic differentiation"


@dataclasses.dataclass(frozen=True)
class Decision:
    """One decision of the compiler, as `graph.decisions` lists them.

    **Attributes:**

    - `kind`: which kind of decision, a `Kind`.
    - `reason`: a sentence for a person.
    - `weight`: the key paths of the params concerned, e.g. `("cell.weight_hh",)`.
    - `state`: the key paths of the state leaves concerned, e.g. `("state[0]",)`.
    - `source`: the line of the user's (or of a library's) code.

    !!! example

        ```python
        for decision in graph.decisions:
            if "cell.bias" in decision.weight:
                print(decision.kind, decision.because)
        ```
    """

    kind: Kind
    reason: str
    weight: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    source: str = ""

    @property
    def about(self) -> str:
        """The key paths concerned."""
        return ", ".join(self.weight + self.state)

    @property
    def because(self) -> str:
        """The reason, with the line of code."""
        return self.reason + (f" ({self.source})" if self.source else "")

    def __str__(self) -> str:
        return f"{self.about}: {self.kind.value}: {self.because}"
