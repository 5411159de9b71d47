"""Writing checkpoints: timm's saver and format, so that no interruption loses what was there."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from timm import utils
from timm.task import TrainingTask

from timm_rdp.errors import TrainingError

_BUFFER_BYTES = 1 << 20


class _NotingFile(io.FileIO):
    """A file that keeps its error: torch reports that a write failed, but not why."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class Saver(utils.CheckpointSaver):
    """timm's CheckpointSaver, writing so that no interruption loses what was there.

    Args:
        task: the task to save.
        run_state: called at every save; its entries go into the checkpoint beside timm's.
        kwargs: as timm's.
    """

    def __init__(self, *, task: TrainingTask, run_state: Callable[[], dict], **kwargs: Any):
        def state(ema: bool = False, **kwargs: Any) -> dict:
            of_task = task.get_checkpoint_state(ema=ema, **kwargs)
            return of_task if ema else {**of_task, **run_state()}

        super().__init__(task=SimpleNamespace(get_checkpoint_state=state), **kwargs)
        self._last_is_written = False

    def finish(self, epoch: int, metric: float | None) -> None:
        """Do what `save_checkpoint` does once it has written `last`, which is there already."""
        self._last_is_written = True
        self.save_checkpoint(epoch, metric)
        self._last_is_written = False

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        if self._last_is_written:
            return
        # The paths that arrive here are temporary; timm's _replace gives them their name.
        file = None
        try:
            file = _NotingFile(save_path, "wb")
            with io.BufferedWriter(file, _BUFFER_BYTES) as buffered:  # torch writes in small pieces
                super()._save(buffered, epoch, metric)
                buffered.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                os.unlink(save_path)
            cause = (file and file.error) or error
            reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
            raise TrainingError(
                f"the checkpoint of epoch {epoch} cannot be written to {save_path} ({reason}); "
                "those from before are intact: make room and --resume"
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        if self._last_is_written:
            return
        os.replace(src, dst)  # timm unlinks first: a moment without any checkpoint

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f"{dst}.tmp"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            os.link(src, temporary)
        except OSError:
            shutil.copy2(src, temporary)
        os.replace(temporary, dst)


def restore_history(saver: Saver, checkpoint: dict, path: str) -> None:
    """Go on ranking the checkpoints of the folder that the run is resumed into."""
    state = checkpoint.get("saver")
    folder, name = os.path.split(os.path.realpath(path))
    if not state or folder != os.path.realpath(saver.checkpoint_dir):
        return
    pending = state.get("pending", (None, None))
    if name == "last.pth.tar" and pending[0] is not None:
        # What followed the writing of `last` may have been cut short: it is done again.
        known = [entry for entry in state["checkpoint_files"] if f"-{pending[0]}." not in entry[0]]
        saver.load_state_dict({**state, "checkpoint_files": known, "pending": (None, None)})
        saver.finish(*pending)
    elif pending[1] is None:
        saver.load_state_dict({**state, "pending": (None, None)})  # a recovery is not ranked
    else:
        saver.load_state_dict(state)
    recoveries = Path(folder).glob("recovery-*.pth.tar")
    *old, saver.prev_recovery_file, saver.curr_recovery_file = [
        "",
        "",
        *map(str, sorted(recoveries, key=lambda p: p.stat().st_mtime_ns)),
    ]
    for file in filter(None, old):
        os.unlink(file)
