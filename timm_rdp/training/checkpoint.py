"""Reading checkpoints: timm's format, with the run's own state added.

Everything is read with `weights_only=True`: a checkpoint is data, never code.
"""

import argparse
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm import utils
from timm.models import clean_state_dict, load_checkpoint, load_state_dict
from timm.task import TrainingTask
from torch import nn

from timm_rdp import ResidualDropPath
from timm_rdp.core.versions import safe_globals
from timm_rdp.errors import UsageError, refused_with

_logger = logging.getLogger(__name__)

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
        with safe_globals([argparse.Namespace]):
            mmap = mmap and zipfile.is_zipfile(path)  # files from before torch 1.6 are none
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        why = "it is truncated or not a checkpoint"
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            why = "it is not a checkpoint, or one that holds code besides data; nothing was run"
        raise UsageError(f"{flag} {path}: cannot be read ({why}); use another file") from error


def find_newest(args: argparse.Namespace) -> None:
    """Replace `--resume auto` by the newest checkpoint of the run's folder that can be read.

    Raises:
        UsageError: the folder's name is not given, or ranks see different checkpoints.
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
    files = [path for name in names for path in folder.glob(f"{name}.pth.tar")]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            weights_of(read_checkpoint(path, "--resume", mmap=True), f"--resume {path}")
            args.resume = str(path)
            break
        except UsageError as error:
            why = str(error).removeprefix("--resume ")
            _logger.warning(f"{why}: passing over to the one before")
    else:
        _logger.info(f"--resume auto: there is no checkpoint in {folder}, starting afresh")
    if args.distributed:
        found = [""] * args.world_size
        torch.distributed.all_gather_object(found, args.resume)
        if len(set(found)) > 1:
            listed = ", ".join(path or "none" for path in dict.fromkeys(found))
            raise UsageError(
                f"--resume auto: ranks see different checkpoints ({listed}); --output must be a "
                "folder that all of them share"
            )


def check_weights_files(args: argparse.Namespace) -> None:
    """Read the weights that options name, before anything is built: UsageError names the file."""
    for flag in ("--initial-checkpoint", "--pretrained-path"):
        path = getattr(args, flag[2:].replace("-", "_"))
        if path and not _is_foreign(path):
            weights_of(read_checkpoint(path, flag, mmap=True), f"{flag} {path}")


def _is_foreign(path: str) -> bool:
    """Whether timm reads this file by its ending, as what cannot hold code."""
    return Path(path).suffix.lower() in (".npz", ".npy", ".safetensors")


def weights_of(checkpoint: Any, what: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The key under which a checkpoint keeps its weights ('': it is nothing else), and those."""
    found = checkpoint if isinstance(checkpoint, Mapping) else {}
    key = next((k for k in ("state_dict", "model") if found.get(k) is not None), "")
    weights = found[key] if key else found
    tensors = isinstance(weights, Mapping) and map(torch.is_tensor, weights.values())
    if not weights or not tensors or not all(tensors):
        raise UsageError(
            f"{what}: holds no weights (no 'state_dict' of tensors); "
            "use a checkpoint that a training run wrote"
        )
    return key, clean_state_dict(dict(weights))


def check_fit(model: nn.Module, weights: Mapping[str, torch.Tensor], what: str, name: str) -> None:
    """Check that weights are those of a model, entry by entry.

    Args:
        model: of timm's `name`.
        weights: a state dict.
        what: the option and value that they came from.
        name: for the message.

    Raises:
        UsageError: an entry is missing, unknown or of another shape.
    """
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    theirs = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = [k for k in {**own, **theirs} if own.get(k) != theirs.get(k)]
    if wrong:
        raise UsageError(
            f"{what}: does not fit --model {name}: {len(wrong)} entries are missing, unknown or of "
            f"another shape, e.g. {wrong[0]}: {theirs.get(wrong[0], 'missing')} instead of "
            f"{own.get(wrong[0], 'nothing')}; give the model, class count and sizes that it was "
            "trained with"
        )


def load_initial_weights(model: nn.Module, path: str, name: str) -> None:
    """Load `--initial-checkpoint` into a fresh model; EMA weights first, as timm does.

    Raises:
        UsageError: the file does not fit the model.
    """
    what = f"--initial-checkpoint {path}"
    with refused_with(what):
        if not _is_foreign(path):
            check_fit(model, load_state_dict(path), what, name)
        load_checkpoint(model, path)


def check_pretrained(model: nn.Module, path: str, name: str) -> None:
    """Find out whether timm has loaded anything from `--pretrained-path`: it does not tell.

    Its adaptation may rename and reshape, so that tensors are compared by size and sum.

    Raises:
        UsageError: no weight of the model is from the file.
    """
    if _is_foreign(path) and not path.endswith(".safetensors"):
        return  # what these formats hold, timm names one by one
    if not _sums(model.state_dict()) & _sums(load_state_dict(path)):
        raise UsageError(
            f"--pretrained-path {path}: does not fit --model {name} (none of its weights is "
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
        what the checkpoint holds beside these, and the epoch to go on with (None: it does not say)

    Raises:
        UsageError: the checkpoint is of another model, optimizer or set of paths.
    """
    what = f"--resume {args.resume}"
    checkpoint = read_checkpoint(args.resume, "--resume")
    key, weights = weights_of(checkpoint, what)
    if not key:
        checkpoint = {}
    check_fit(utils.unwrap_model(task.get_eval_model()), weights, what, args.model)
    with refused_with(f"{what}: does not fit this distillation"):
        task.load_checkpoint_state(weights, checkpoint.get("task_state"))

    if not args.no_resume_opt:
        if "optimizer" in checkpoint:
            _load_optimizer(args, optimizer, checkpoint)
        if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
            loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    _resume_rdp(args, rdp, checkpoint)

    epoch = checkpoint.get("epoch")
    if epoch is not None and checkpoint.get("version", 1) > 1:
        epoch += 1  # older ones count the epoch before saving
    return {k: checkpoint[k] for k in ("run", "saver", "epoch", "metric") if k in checkpoint}, epoch


def _load_optimizer(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, checkpoint: dict
) -> None:
    then = getattr(checkpoint.get("args"), "opt", args.opt)
    if then.lower() != args.opt.lower():
        raise UsageError(
            f"--resume {args.resume}: was written with --opt {then}, not {args.opt}; "
            "give that one, or start its state afresh with --no-resume-opt"
        )
    with refused_with(
        f"--resume {args.resume}: its optimizer state does not fit; give the optimizer flags that "
        "it was trained with, or --no-resume-opt"
    ):
        optimizer.load_state_dict(checkpoint["optimizer"])


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
    with refused_with(f"--resume {args.resume}: its ResidualDroppath state"):
        rdp.load_state_dict(state)
    rdp.seed, rdp.every = seed, every
