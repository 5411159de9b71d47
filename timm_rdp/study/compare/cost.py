"""What the variants of a comparison cost: counted, before anything is trained."""

import argparse
import math
import warnings
from statistics import fmean
from typing import Any

import torch
from timm.scheduler.scheduler_factory import create_scheduler_v2, scheduler_kwargs
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop, sdpa_flop
from tqdm import tqdm

from timm_rdp import ResidualDropPath
from timm_rdp.args import RandomSecond
from timm_rdp.core.rdp import COMPLEMENT, DROPPATH
from timm_rdp.core.regions import find_regions
from timm_rdp.errors import refused_with
from timm_rdp.training.data import close_data, create_data
from timm_rdp.training.model import build_model, example_input, setup_precision

FLOP_CYCLES = 50


def convolution_backward_flops(
    grad_out_shape: list[int], x_shape: list[int], w_shape: list[int], *rest: Any, **_kwargs: Any
) -> int:
    """FLOPs of a convolution's backward: each of its two gradients takes as many as the forward.

    Torch's own formula (2.15) counts the gradient of the weight `groups` times over, which makes a
    depthwise model's backward look several times as large as it is.
    """
    *_, transposed, _, _, output_mask = rest  # asked for: gradients of input, weight, bias
    forward = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed=transposed)
    return sum(output_mask[:2]) * forward


def flop_counter() -> FlopCounterMode:
    """Torch's counter of the FLOPs of what runs within it, also on the meta device.

    Matrix products, attention and convolutions count, 2 for a multiplication and its addition;
    elementwise operations, normalisation and pooling count as nothing.
    """
    aten = torch.ops.aten
    counts = {
        aten.convolution_backward: convolution_backward_flops,
        # which not every version of torch counts
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    }
    return FlopCounterMode(display=False, custom_mapping=counts)


def build_on_meta(args: argparse.Namespace) -> tuple[nn.Module, dict, float]:
    """A run's model without weights, in train mode on the meta device; data config, batches.

    The batches of an epoch are its images / --batch-size.
    """
    own = {"pretrained": False, "pretrained_path": None, "initial_checkpoint": ""}
    own |= {"distributed": False, "rank": 0, "world_size": 1, "torchscript": False}
    args = argparse.Namespace(**{**vars(args), **own})
    cpu = torch.device("cpu")
    model_dtype = setup_precision(args, cpu)[0]
    with torch.random.fork_rng(devices=[]):
        model, data_config = build_model(args, cpu, model_dtype)
        data = create_data(args, data_config, model, cpu, model_dtype)
    batches = len(data.train) * data.batch_size_reference / args.batch_size
    close_data(data)
    if not args.naflex_loader:  # these models read sizes off the values of their input
        model.to("meta")
    return model.train(), data_config, batches


def count_costs(
    args: argparse.Namespace, model: nn.Module, data_config: dict, random: bool = False
) -> dict[str, Any]:
    """What the kinds of update of a model from `build_on_meta` cost.

    Returns:
        "update", "droppath", "complement": FLOPs per image at the model's input size, forward and
            backward, of timm's own update and of the mean iteration of each phase (over the first
            cycles of seed 0), without a teacher's; None where they cannot be counted without data
        "random": with `random`, as "complement", of second iterations that train a random part
        "complements": complement iterations per cycle, as expected over masks
    """
    costs: dict[str, Any] = {"update": None}
    example, kinds, in_regions = None, {}, {}
    if args.drop_path:
        kinds = {COMPLEMENT: ResidualDropPath, **({"random": RandomSecond} if random else {})}
        with refused_with(f"--model {args.model}"):
            example = example_input(args, data_config["input_size"], model)
            rdp = ResidualDropPath(model, example_input=example)
            in_regions = find_regions(model, rdp._graph)
            rdp.detach()
        # The cycles in which something is dropped that can be trained.
        complements = 1 - math.prod(1 - path.drop_prob for path in rdp.paths if path.parameters)
        costs |= dict.fromkeys((DROPPATH, *kinds)) | {"complements": complements}
    if args.naflex_loader:
        return costs
    batch = args.batch_size * max(1, args.aug_splits)
    dtype = next(model.parameters()).dtype
    images = torch.empty((batch, *data_config["input_size"]), device="meta", dtype=dtype)
    try:
        update = _flops(model, images)
        known: dict[tuple, int] = {}
        counts: dict[str, list[int]] = {name: [] for name in (DROPPATH, *kinds) if kinds}
        task = "counting what an update costs"
        for second, kind in kinds.items():
            rdp = kind(model, example_input=example)
            for _ in tqdm(range(FLOP_CYCLES), task, leave=False, disable=None):
                for it in rdp.cycle():
                    key = (it.phase, it.dropped if it.phase == DROPPATH else it.trainable)
                    with it:
                        known[key] = known.get(key) or _flops(model, images)
                    counts[DROPPATH if it.phase == DROPPATH else second].append(known[key])
            rdp.detach()
    except Exception:  # whatever a model raises that asks for the values of its input
        return costs
    phases = {phase: fmean(own or [0.0]) for phase, own in counts.items()}
    if args.torchcompile and not in_regions:  # it computes everything and discards what is frozen
        phases = dict.fromkeys(phases, update)
    counted = {"update": update, **phases}.items()
    return costs | {name: flops / args.batch_size for name, flops in counted}


def _flops(model: nn.Module, images: torch.Tensor) -> int:
    with flop_counter() as counter:
        model(images).sum().backward()
    model.zero_grad()
    return counter.get_total_flops()


def total_epochs(args: argparse.Namespace, epochs: int) -> int:
    """How many epochs a run with --epochs `epochs` takes, warmup and cooldown included."""
    if args.stop_epoch is not None:
        return args.stop_epoch
    options = argparse.Namespace(**{**vars(args), "epochs": epochs, "lr": args.lr or 0.1})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.lr)
    with warnings.catch_warnings(), refused_with(f"--sched {args.sched} with --epochs {epochs}"):
        warnings.simplefilter("ignore")  # the run itself says them once
        kwargs = dict[str, Any](scheduler_kwargs(options, decreasing_metric=False))
        return create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=1_000)[1]


def matched_epochs(args: argparse.Namespace, ratio: float) -> int:
    """The --epochs whose run takes `ratio` times the epochs of the recipe's, or those if less."""
    wanted = ratio * total_epochs(args, args.epochs)
    candidates = range(args.epochs, max(args.epochs, math.ceil(wanted)) + 1)
    return min(candidates, key=lambda epochs: abs(total_epochs(args, epochs) - wanted))
