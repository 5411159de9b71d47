"""Where a run stands."""

from dataclasses import dataclass


@dataclass
class RunState:
    """The place of a run within its epochs; set by the loop, kept in checkpoints.

    Attributes:
        epoch: the epoch in progress, from 0.
        update: the update in progress within it, from 0.
        updates_done: how many of its updates are done.
        batches_done: how many of its batches have been used.
        validated: whether there has been a validation.
    """

    epoch: int = 0
    update: int = 0
    updates_done: int = 0
    batches_done: int = 0
    validated: bool = False
