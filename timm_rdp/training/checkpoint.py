"""Reading and writing checkpoints: timm's format, with the run's own state added.

Everything is read with `weights_only=True`: a checkpoint is data, never code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm import utils
from timm.models import clean_state_dict, load_checkpoint, load_state_dict
from timm.task import TrainingTask
from torch import nn

from timm_rdp import ResidualDropPath
from timm_rdp.errors import TrainingError, UsageError

_logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
_RDP_OPTIONS = ("rdp_batch", "rdp_every", "rdp_start_epoch", "rdp_seed", "drop_path")


def read_checkpoint(path: str | Path, flag: str, mmap: bool = False) -> Any:
    """Load a file that torch.save wrote, without executing anything in it.

    Args:
        path: the file.
        flag: the option that named it, for the message.
        mmap: leave the tensors on disk until they are used.

    Raises:
        UsageError: missing, truncated, no checkpoint, or one that holds more than data.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: there is no such file; check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)
    except Exception as error:
        if mmap and "mmap can only be used" in str(error):  # a file from before torch 1.6
            return read_checkpoint(path, flag)
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            why = "it is not a checkpoint, or one that holds code besides data; nothing was run"
        else:
            why = "it is truncated or not a checkpoint"
        raise UsageError(f"{flag} {path}: cannot be read ({why}); use another file") from error


def find_newest(args: argparse.Namespace) -> None:
    """Replace `--resume auto` by the newest checkpoint of the run's folder that can be read.

    Raises:
        UsageError: the folder's name is not given.
    """
    if args.resume != "auto":
        return
    if not args.experiment:
        raise UsageError(
            "--resume auto looks in --output/--experiment: name the run with --experiment NAME"
        )
    args.resume = ""
    folder = Path(args.output or "./output/train", args.experiment)
    names = ("last", "recovery-*", "checkpoint-*", "milestone-*", "model_best")
    found = [path for name in names for path in folder.glob(f"{name}.pth.tar")]
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            _weights_of(read_checkpoint(path, "--resume", mmap=True), str(path), "--resume")
        except UsageError as error:
            _logger.warning(
                f"{str(error).removeprefix('--resume ')}: passing over to the one before"
            )
        else:
            args.resume = str(path)
            return
    _logger.info(f"--resume auto: there is no checkpoint in {folder}, starting from the beginning")


def check_same_choice(args: argparse.Namespace) -> None:
    """Check that `--resume auto` found the same on every rank.

    Raises:
        UsageError: it did not.
    """
    if not args.distributed:
        return
    found = [""] * args.world_size
    torch.distributed.all_gather_object(found, args.resume)
    if len(set(found)) > 1:
        listed = ", ".join(path or "none" for path in dict.fromkeys(found))
        raise UsageError(
            f"--resume auto: ranks see different checkpoints ({listed}); --output must be a folder "
            "that all of them share"
        )


def check_checkpoints(args: argparse.Namespace) -> None:
    """Read every checkpoint that the options name, before anything is built.

    Raises:
        UsageError: one of them cannot be read or holds no weights.
    """
    if args.resume:
        _weights_of(read_checkpoint(args.resume, "--resume", mmap=True), args.resume, "--resume")
    if args.pretrained_path and not args.pretrained:
        raise UsageError(
            f"--pretrained-path {args.pretrained_path} is only read with --pretrained: add it"
        )
    for flag, path in (
        ("--initial-checkpoint", args.initial_checkpoint),
        ("--pretrained-path", args.pretrained_path),
    ):
        if not path:
            continue
        suffix = Path(path).suffix.lower()
        if suffix in (".npz", ".npy", ".safetensors"):
            _check_plain_file(path, flag, suffix)
        else:
            _weights_of(read_checkpoint(path, flag, mmap=True), path, flag)


def _check_plain_file(path: str, flag: str, suffix: str) -> None:
    """The formats that timm reads beside torch's own; none of them can hold code."""
    if not os.path.isfile(path):
        raise UsageError(f"{flag} {path}: there is no such file; check the path")
    try:
        if suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt"):
                pass
        else:
            import numpy as np

            np.load(path, allow_pickle=False)
    except Exception as error:
        raise UsageError(
            f"{flag} {path}: cannot be read (it is truncated or not a {suffix} file); "
            "use another file"
        ) from error


def _weights_of(checkpoint: Any, path: str, flag: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The key under which a checkpoint keeps its weights ('': it is nothing else), and those."""
    key = ""
    weights = checkpoint
    if isinstance(checkpoint, Mapping):
        key = next((k for k in ("state_dict", "model") if k in checkpoint), "")
        weights = checkpoint[key] if key else checkpoint
    if (
        not isinstance(weights, Mapping)
        or not weights
        or not all(isinstance(v, torch.Tensor) for v in weights.values())
    ):
        raise UsageError(
            f"{flag} {path}: holds no weights (no 'state_dict' of tensors); "
            "use a checkpoint that a training run wrote"
        )
    return key, clean_state_dict(weights)


def _check_fit(model: nn.Module, weights: Mapping, path: str, flag: str, model_name: str) -> None:
    own = model.state_dict()
    missing = [k for k in own if k not in weights]
    unknown = [k for k in weights if k not in own]
    shapes = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    found = []
    if missing:
        found.append(f"it lacks {len(missing)} of the model's entries, e.g. {missing[0]}")
    if unknown:
        found.append(f"it has {len(unknown)} that the model has not, e.g. {unknown[0]}")
    if shapes:
        key = shapes[0]
        found.append(
            f"{len(shapes)} differ in shape, e.g. {key}: "
            f"{tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        )
    if found:
        raise UsageError(
            f"{flag} {path}: does not fit --model {model_name} ({'; '.join(found)}); "
            "give the model, class count and sizes that it was trained with"
        )


def load_initial_weights(model: nn.Module, path: str, model_name: str) -> None:
    """Load `--initial-checkpoint` into a fresh model; EMA weights first, as timm does.

    Raises:
        UsageError: the file does not fit the model.
    """
    flag = "--initial-checkpoint"
    if Path(path).suffix.lower() not in (".npz", ".npy", ".safetensors"):
        checkpoint = read_checkpoint(path, flag, mmap=True)
        for key in ("state_dict_ema", "model_ema"):
            if isinstance(checkpoint, Mapping) and checkpoint.get(key) is not None:
                checkpoint = {"state_dict": checkpoint[key]}
        _check_fit(model, _weights_of(checkpoint, path, flag)[1], path, flag, model_name)
    try:
        load_checkpoint(model, path)
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{flag} {path}: does not fit --model {model_name}: {text}") from error


def check_pretrained(model: nn.Module, path: str, model_name: str) -> None:
    """Find out whether timm has loaded anything from `--pretrained-path`: it does not tell.

    Its adaptation may rename and reshape, so that tensors are compared by size and sum.

    Raises:
        UsageError: no weight of the model is from the file.
    """
    if Path(path).suffix.lower() in (".npz", ".npy"):
        return  # what these formats hold, timm names one by one
    if not _sums(model.state_dict()) & _sums(load_state_dict(path)):
        raise UsageError(
            f"--pretrained-path {path}: does not fit --model {model_name} (none of its weights is "
            "in it); give the model that it was trained with"
        )


def _sums(weights: Mapping[str, torch.Tensor]) -> set[tuple[int, str]]:
    floats = [t.detach().double() for t in weights.values() if t.is_floating_point()]
    # Constants (zeros, ones) are in every model.
    return {(t.numel(), f"{t.sum().item():.6e}") for t in floats if t.numel() > 1 and t.std() > 0}


def resume(
    args: argparse.Namespace,
    task: TrainingTask,
    optimizer: torch.optim.Optimizer,
    loss_scaler: Any,
    rdp: ResidualDropPath | None,
) -> tuple[dict, int | None]:
    """Load `--resume` into model, task, optimizer, loss scaler and RDP.

    Returns:
        the checkpoint, and the epoch to go on with (None: the checkpoint does not say)

    Raises:
        UsageError: the checkpoint is of another model, optimizer or set of paths.
    """
    path = args.resume
    checkpoint = read_checkpoint(path, "--resume")
    key, weights = _weights_of(checkpoint, path, "--resume")
    if not key:
        checkpoint = {}
    model = utils.unwrap_model(task.get_eval_model())
    _check_fit(model, weights, path, "--resume", args.model)
    try:
        task.load_checkpoint_state(weights, checkpoint.get("task_state"))
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"--resume {path}: does not fit this distillation: {text}") from error

    if not args.no_resume_opt:
        if "optimizer" in checkpoint:
            _load_optimizer(args, optimizer, checkpoint)
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    _resume_rdp(args, rdp, checkpoint)

    epoch = checkpoint.get("epoch")
    if epoch is not None and checkpoint.get("version", 1) > 1:
        epoch += 1  # older ones count the epoch before saving
    return checkpoint, epoch


def _load_optimizer(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, checkpoint: dict
) -> None:
    then = getattr(checkpoint.get("args"), "opt", args.opt)
    if then.lower() != args.opt.lower():
        raise UsageError(
            f"--resume {args.resume}: was written with --opt {then}, not {args.opt}; "
            "give that one, or start its state afresh with --no-resume-opt"
        )
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"--resume {args.resume}: its optimizer state does not fit ({error}); "
            "give the optimizer flags that it was trained with, or --no-resume-opt"
        ) from error


def _resume_rdp(args: argparse.Namespace, rdp: ResidualDropPath | None, checkpoint: dict) -> None:
    # `timm-rdp launch` keeps the state with the optimizer's, because it knows no checkpoint.
    state = checkpoint.get("rdp") or checkpoint.get("optimizer", {}).get("timm_rdp")
    if rdp is None:
        if state is not None:
            _logger.info(f"{args.resume} was trained with --rdp; this run goes on without it.")
        return
    if state is None:
        _logger.info(f"{args.resume} has no ResidualDroppath state: cycles start at 0.")
        return
    then = checkpoint.get("args") or argparse.Namespace()
    changed = [
        f"--{name.replace('_', '-')} {getattr(then, name)} -> {getattr(args, name)}"
        for name in _RDP_OPTIONS
        if hasattr(then, name) and getattr(then, name) != getattr(args, name)
    ]
    if changed:
        _logger.warning(
            f"ResidualDroppath options differ from {args.resume}, this run's apply: "
            + ", ".join(changed)
        )
    seed, every = rdp.seed, rdp.every
    try:
        rdp.load_state_dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume {args.resume}: its ResidualDroppath state: {error}") from error
    rdp.seed, rdp.every = seed, every


def load_ema(args: argparse.Namespace, task: TrainingTask, checkpoint: dict) -> None:
    """Load the EMA weights of `--resume`; the plain ones where it has none."""
    key = next(
        k for k in ("state_dict_ema", "model_ema", "state_dict", "model", "") if checkpoint.get(k)
    )
    state = {"state_dict_ema": "task_state_ema", "state_dict": "task_state"}.get(key, "")
    task.load_checkpoint_state(clean_state_dict(checkpoint[key]), checkpoint.get(state), ema=True)


class _StateOfRun:
    """What the saver asks of the task, with the entries that are the run's own."""

    def __init__(self, task: TrainingTask, run_state: Callable[[], dict]):
        self._task = task
        self._run_state = run_state

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict:
        state = self._task.get_checkpoint_state(ema=ema, **kwargs)
        return state if ema else {**state, **self._run_state()}


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
        super().__init__(task=_StateOfRun(task, run_state), **kwargs)
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


def all_finite(module: nn.Module) -> bool:
    """Whether every weight and statistic of a module is a finite number."""
    tensors = [t for t in module.state_dict().values() if t.is_floating_point() and t.numel()]
    with torch.no_grad():
        largest = [n.float() for n in torch._foreach_norm(tensors, float("inf"))]
        return bool(torch.stack(largest).isfinite().all())
