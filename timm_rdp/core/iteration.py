"""One iteration of the method: what it drops and what it trains."""

from dataclasses import dataclass, field
from typing import Any

DROPPATH = "droppath"
COMPLEMENT = "complement"


@dataclass(eq=False, repr=False)
class Iteration:
    """One training iteration, to be entered with `with`; made by ResidualDropPath.

    Within it the model's DropPaths and `requires_grad` flags are set for its phase. Leaving it by
    an exception restores everything and does not count: the same iteration comes next.

    Attributes:
        phase: "droppath" or "complement".
        cycle: cycle number, from 0.
        dropped: names of the paths that are dropped in the droppath iteration of this cycle.
    """

    phase: str
    cycle: int
    dropped: frozenset[str]
    _part: frozenset[str]
    _controller: Any
    _trained: frozenset[str] | None = field(default=None, init=False)  # once it has been entered
    _entered_by_user: bool = field(default=False, init=False)  # or by attach() for batches again

    @property
    def trainable(self) -> frozenset[str]:
        """Names of the parameters that this iteration trains."""
        if self._trained is None:
            return self._part - self._controller._patch.frozen(self._part)
        return self._trained

    def __enter__(self) -> "Iteration":
        self._controller._enter(self)
        self._entered_by_user = True
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._controller._leave(completed=error is None)

    def __repr__(self) -> str:
        return f"<{self.phase} iteration of cycle {self.cycle}, {len(self.dropped)} paths dropped>"
