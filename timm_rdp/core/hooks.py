"""Hooks that do nothing in a copy of the model that they were registered on."""

from collections.abc import Callable
from typing import Any


class Hook:
    """A forward hook that calls `function`, and does nothing in a copy of the model.

    Args:
        function: takes the hook's arguments; None for a hook that does nothing.
    """

    def __init__(self, function: Callable[..., Any] | None = None):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return None if self.function is None else self.function(*args)

    def __reduce__(self) -> tuple:
        return (Hook, ())
