"""What a run leaves behind: args.yaml, summary.csv, checkpoints and curves.png."""

import argparse
import csv
import io
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from timm import utils
from timm.models import safe_model_name

from timm_rdp.errors import TrainingError, UsageError, refused_with
from timm_rdp.training.log import Losses, mean_lr
from timm_rdp.training.loop import check_weights
from timm_rdp.training.model import trained_module
from timm_rdp.training.resume import state_of_rank, state_of_run
from timm_rdp.training.saver import Curves, Saver, restore_history, write_atomically
from timm_rdp.training.setup import Parts
from timm_rdp.training.state import RunState

_logger = logging.getLogger("timm_rdp.training")

SUMMARY = "summary.csv"


class Outputs(NamedTuple):
    """What the primary process writes."""

    folder: str
    saver: Saver
    summary: "Summary"
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

    Raises:
        UsageError: the folder cannot be written.
    """
    # timm's name for a run: time, model and image size
    size = str(parts.data_config["input_size"][-1])
    name = "-".join([f"{datetime.now():%Y%m%d-%H%M%S}", safe_model_name(args.model), size])
    experiment = args.experiment or name
    wandb = _start_wandb(args, experiment) if args.log_wandb else None
    folder = os.path.join(args.output or "./output/train", experiment)
    try:
        utils.get_outdir(args.output or "./output/train", experiment)
        write_atomically(os.path.join(folder, "args.yaml"), text.encode())
    except (OSError, TrainingError) as error:
        raise UsageError(
            f"--output {folder}: cannot be written ({error}); name another one with --output"
        ) from error
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
        _logger.info(f"Continuing {args.resume} at epoch {state.epoch}/{parts.last_epoch}{within}.")
    summary = Summary(folder, state.epoch if args.resume else 0)
    if summary.is_begun_anew and not automatic:
        _logger.info(f"{folder} holds another run's {SUMMARY}, which this one begins anew")
    ema = ", moving average validated" if args.model_ema and not args.model_ema_force_cpu else ""
    curves = Curves(folder, f"{args.model}{ema}")
    return Outputs(folder, saver, summary, curves, wandb, entries)


class Summary:
    """The run's summary.csv: timm's columns in timm's format, then those of ResidualDroppath.

    Args:
        folder: the run's.
        start_epoch: rows of this and later epochs are from before a resume or of another run, and
            go when the first row is added.
    """

    def __init__(self, folder: str, start_epoch: int = 0):
        self._path = os.path.join(folder, SUMMARY)
        self.rows: list[dict] = []
        old = Path(self._path)
        self.is_begun_anew = old.exists() and start_epoch == 0
        text = old.read_bytes().decode() if old.exists() else ""
        for row in csv.DictReader(io.StringIO(text, newline="")):
            if row["epoch"].isdigit() and int(row["epoch"]) < start_epoch:
                values = {k: float(v) if v else None for k, v in row.items() if k is not None}
                self.rows.append({**values, "epoch": int(row["epoch"])})

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
        self.rows.append(row)
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=dict.fromkeys(chain(*self.rows)))
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self._path, out.getvalue().encode())
        return row


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


def save_recovery(
    args: argparse.Namespace,
    parts: Parts,
    state: RunState,
    outputs: Outputs | None,
    losses: Losses,
) -> None:
    """Write a checkpoint of the epoch in progress, with its losses; every rank must call it.

    Raises:
        TrainingError: a weight is not a finite number, or the file cannot be written.
    """
    check_weights(parts.task, state)
    entry = None
    if parts.sampler is not None:  # else the run goes on with the next epoch
        entry = _state_of_run(args, parts, state, losses)
    if outputs is not None:
        outputs.entries["run"] = entry
        outputs.saver.save_recovery(state.epoch, batch_idx=state.update)


def _state_of_run(
    args: argparse.Namespace, parts: Parts, state: RunState, losses: Losses | None = None
) -> dict[str, Any]:
    own = state_of_rank(state, parts.device, parts.sampler, parts.stream, losses)
    updates = None if losses is None else state.updates_done
    return state_of_run(args, state, own, updates, parts.lr_scheduler, parts.optimizer)


def save_epoch(
    args: argparse.Namespace,
    parts: Parts,
    state: RunState,
    outputs: Outputs | None,
    metrics: tuple[Any, Any, Any],
    latest: float,
) -> None:
    """Write the epoch's row, curves and checkpoints; every rank must call it.

    Args:
        metrics: of training, of validation, of ResidualDroppath.
        latest: the one by which checkpoints are ranked.
    """
    entry = _state_of_run(args, parts, state)
    if outputs is None:
        return
    train_metrics, eval_metrics, rdp_metrics = metrics
    row = outputs.summary.add(
        state.epoch, train_metrics, eval_metrics, mean_lr(parts.optimizer), rdp_metrics
    )
    if outputs.wandb is not None:
        outputs.wandb.log(row)
    outputs.curves.update(outputs.summary.rows, last=state.epoch + 1 == parts.last_epoch)
    outputs.entries["run"] = entry
    outputs.saver.save_checkpoint(state.epoch, metric=latest)
    if state.epoch + 1 in (args.save_epochs or ()):
        outputs.saver.save_milestone(state.epoch + 1)
