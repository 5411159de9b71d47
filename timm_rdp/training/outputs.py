"""What a run leaves behind: args.yaml, summary.csv, checkpoints; curves.png by curves.py."""

import argparse
import csv
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from timm import utils
from timm.models import safe_model_name

from timm_rdp.errors import TrainingError, UsageError, refused_with
from timm_rdp.training.checkpoint import Saver, restore_history
from timm_rdp.training.curves import Curves
from timm_rdp.training.files import write_atomically
from timm_rdp.training.log import Losses, mean_lr
from timm_rdp.training.loop import check_weights
from timm_rdp.training.model import trained_module
from timm_rdp.training.resume import state_of_rank, state_of_run
from timm_rdp.training.setup import Parts
from timm_rdp.training.state import RunState

_logger = logging.getLogger("timm_rdp.training")

SUMMARY = "summary.csv"


def experiment_name(args: argparse.Namespace, data_config: Mapping) -> str:
    """`--experiment`, or timm's name for a run: time, model and image size."""
    if args.experiment:
        return args.experiment
    size = str(data_config["input_size"][-1])
    return "-".join([f"{datetime.now():%Y%m%d-%H%M%S}", safe_model_name(args.model), size])


def create_output(args: argparse.Namespace, experiment: str, args_text: str) -> str:
    """Make the run's folder, write args.yaml into it, and return it.

    Raises:
        UsageError: it cannot be written.
    """
    folder = os.path.join(args.output or "./output/train", experiment)
    try:
        utils.get_outdir(args.output or "./output/train", experiment)
        write_atomically(os.path.join(folder, "args.yaml"), args_text.encode())
    except (OSError, TrainingError) as error:
        raise UsageError(
            f"--output {folder}: cannot be written ({error}); name another one with --output"
        ) from error
    return folder


class Summary:
    """The run's summary.csv: timm's columns in timm's format, then those of ResidualDroppath.

    Args:
        folder: the run's.
        start_epoch: rows of this and later epochs are from before a resume, and are dropped.
        resumed: whether rows of earlier epochs belong to this run; otherwise a run that is started
            afresh in an old folder writes its own header below them, as timm does.
    """

    def __init__(self, folder: str, start_epoch: int = 0, resumed: bool = False):
        self._path = os.path.join(folder, SUMMARY)
        self.rows: list[dict] = []
        self._text = ""
        old = Path(self._path)
        if not old.exists():
            return
        text = old.read_bytes().decode()
        if not resumed:
            self._text = text
            return
        for row in csv.DictReader(io.StringIO(text, newline="")):
            if row["epoch"].isdigit() and int(row["epoch"]) < start_epoch:
                self._append({k: v for k, v in row.items() if k is not None}, parse=True)

    def add(
        self,
        epoch: int,
        train_metrics: Mapping,
        eval_metrics: Mapping | None,
        lr: float,
        rdp_metrics: Mapping,
    ) -> dict:
        """Add an epoch's row to the file, and return it."""
        row: dict[str, Any] = OrderedDict(epoch=epoch)
        row.update((f"train_{k}", v) for k, v in train_metrics.items())
        row.update((f"eval_{k}", v) for k, v in (eval_metrics or {}).items())
        row["lr"] = lr
        row.update(rdp_metrics)
        self._append(row)
        write_atomically(self._path, self._text.encode())
        return row

    def _append(self, row: Mapping, parse: bool = False) -> None:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=row.keys())
        if not self.rows:
            writer.writeheader()
        writer.writerow(row)
        self._text += out.getvalue()
        numbers = {k: float(v) if v else None for k, v in row.items()} if parse else dict(row)
        self.rows.append(numbers)


def _start_wandb(args: argparse.Namespace, experiment: str) -> Any:
    """Begin the wandb run that `--log-wandb` asks for, and return the module."""
    import wandb

    with refused_with("--log-wandb (log in, or set WANDB_MODE=offline to log into a folder)"):
        wandb.init(
            project=args.wandb_project,
            name=experiment,
            config=vars(args),
            tags=args.wandb_tags,
            resume="must" if args.wandb_resume_id else None,
            id=args.wandb_resume_id or None,
        )
    return wandb


class Outputs(NamedTuple):
    """What the primary process writes."""

    folder: str
    saver: Saver
    summary: Summary
    curves: Curves
    wandb: Any
    entries: dict[str, Any]  # of the checkpoint that is written next, beside timm's


def open_outputs(
    args: argparse.Namespace, parts: Parts, state: RunState, text: str, automatic: bool
) -> Outputs:
    """Make the run's folder and what writes into it.

    Args:
        text: of args.yaml.
        automatic: whether `--resume auto` was given.
    """
    experiment = experiment_name(args, parts.data_config)
    wandb = _start_wandb(args, experiment) if args.log_wandb else None
    folder = create_output(args, experiment, text)
    entries: dict[str, Any] = {}
    rdp = parts.rdp

    def run_entries() -> dict[str, Any]:
        kept = {k: v for k, v in entries.items() if v is not None}
        return kept if rdp is None else {**kept, "rdp": rdp.state_dict()}

    saver = Saver(
        task=parts.task,
        run_state=run_entries,
        model=trained_module(parts.task),
        optimizer=parts.optimizer,
        args=args,
        amp_scaler=parts.loss_scaler,
        checkpoint_dir=folder,
        recovery_dir=folder,
        decreasing=parts.eval_metric == "loss",
        max_history=args.checkpoint_hist,
    )
    if parts.checkpoint:
        restore_history(saver, parts.checkpoint, args.resume)
    if args.resume:
        within = f", update {state.updates_done}" if state.updates_done else ""
        _logger.info(f"Continuing {args.resume} at epoch {state.epoch}/{parts.num_epochs}{within}.")
    # What a run left that ended before its first checkpoint is not kept by --resume auto.
    summary = Summary(folder, state.epoch, resumed=bool(args.resume) or automatic)
    return Outputs(folder, saver, summary, Curves(folder), wandb, entries)


def rank_state(parts: Parts, state: RunState, losses: Losses | None = None) -> dict[str, Any]:
    """What this process must know to go on from here (see resume.state_of_rank)."""
    return state_of_rank(state, parts.device, parts.samplers[0], parts.stream, losses)


def save_recovery(
    args: argparse.Namespace,
    parts: Parts,
    state: RunState,
    outputs: Outputs | None,
    losses: Losses,
    mine: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint of the epoch in progress; every rank must call it.

    Args:
        losses: of the epoch.
        mine: what `rank_state` returned where the run is to go on, by default here.

    Raises:
        TrainingError: a weight is not a finite number, or the file cannot be written.
    """
    mine = mine or rank_state(parts, state, losses)
    check_weights(parts.task, state)
    entry = None
    if parts.samplers[0] is not None:  # else the run goes on with the next epoch
        entry = state_of_run(
            args, state, mine, state.updates_done, parts.lr_scheduler, parts.optimizer
        )
    if outputs is not None:
        outputs.entries["run"] = entry
        outputs.saver.save_recovery(state.epoch, batch_idx=state.update)


def save_epoch(
    args: argparse.Namespace,
    parts: Parts,
    state: RunState,
    outputs: Outputs | None,
    metrics: tuple[Any, Any, Any],
    latest: float,
) -> None:
    """Write the epoch's row, curves and checkpoint; every rank must call it.

    Args:
        metrics: of training, of validation, of ResidualDroppath.
        latest: the one by which checkpoints are ranked.
    """
    mine = rank_state(parts, state)
    entry = state_of_run(args, state, mine, None, parts.lr_scheduler, parts.optimizer)
    if outputs is None:
        return
    train_metrics, eval_metrics, rdp_metrics = metrics
    row = outputs.summary.add(
        state.epoch, train_metrics, eval_metrics, mean_lr(parts.optimizer), rdp_metrics
    )
    if outputs.wandb is not None:
        outputs.wandb.log(row)
    outputs.curves.update(outputs.summary.rows, last=state.epoch + 1 == parts.num_epochs)
    outputs.entries["run"] = entry
    outputs.saver.save_checkpoint(state.epoch, metric=latest)
