"""Loss and accuracy on the validation set."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

import torch
from timm import utils
from torch import nn

from timm_rdp.training.interrupt import Stopped
from timm_rdp.training.loop import Run, to_device

_logger = logging.getLogger(__name__)


def evaluate(run: Run, model: nn.Module, suffix: str = "") -> OrderedDict:
    """Run `model` over the validation loader.

    Returns:
        loss, top1 and top5 (the last two in percent), averaged over the samples

    Raises:
        Stopped: the run was asked to stop.
    """
    args = run.args
    losses, top1, top5 = (utils.AverageMeter() for _ in range(3))
    meters = (losses, top1, top5)
    times = utils.AverageMeter()
    pending: list[tuple[torch.Tensor, int]] = []
    last = len(run.data.eval) - 1
    model.eval()

    start = time.time()
    with torch.inference_mode():
        batches = run.progress.watch(run.data.eval, f"Validation{suffix}")
        for index, (input, target) in enumerate(batches):
            input, target = to_device(run, input, target)
            with run.autocast():
                output = model(input)
                if isinstance(output, tuple | list):
                    output = output[0]
                if args.tta > 1:
                    output = output.unfold(0, args.tta, args.tta).mean(dim=2)
                    target = target[0 : target.size(0) : args.tta]
                loss = run.eval_loss(output, target)
            measured = [loss, *utils.accuracy(output, target, topk=(1, 5))]
            if args.distributed:
                measured = [utils.reduce_tensor(m, args.world_size) for m in measured]
            # Numbers are fetched from the device only where they are shown.
            pending.append((torch.stack([m.float() for m in measured]), output.shape[0]))

            if signum := run.interruption.agreed():
                raise Stopped(signum)
            times.update(time.time() - start)
            start = time.time()
            if index == last or index % args.log_interval == 0:
                _settle(pending, meters)
                if utils.is_primary(args) and not run.progress.is_bar:
                    _logger.info(
                        f"Test{suffix}: [{index:>4d}/{last}]  "
                        f"Time: {times.val:.3f} ({times.avg:.3f})  "
                        f"Loss: {losses.val:>7.3f} ({losses.avg:>6.3f})  "
                        f"Acc@1: {top1.val:>7.3f} ({top1.avg:>7.3f})  "
                        f"Acc@5: {top5.val:>7.3f} ({top5.avg:>7.3f})"
                    )
    _settle(pending, meters)
    return OrderedDict(loss=losses.avg, top1=top1.avg, top5=top5.avg)


def _settle(pending: list, meters: tuple) -> None:
    if not pending:
        return
    values = torch.stack([m for m, _ in pending]).tolist()
    for measured, (_, count) in zip(values, pending, strict=True):
        for meter, value in zip(meters, measured, strict=True):
            meter.update(value, count)
    pending.clear()
