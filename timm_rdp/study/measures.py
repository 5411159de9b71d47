"""Measures beside accuracy: calibration, accuracy without some paths and on damaged images."""

import random
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from timm_rdp import Path
from timm_rdp.study.features.layers import dropped
from timm_rdp.training.model import EVALUATORS

BINS = 15
FIT_EVERY = 5  # every fifth image fits the temperature, and the others are scored
STEPS = 12  # of the numbers of paths removed, beside none
DRAWN = 4  # subsets for each of them, beside the evenly spaced one
COLUMNS = ("even", *(f"drawn_{i + 1}" for i in range(DRAWN)))  # of a table of removals
CALIBRATION = ("nll", "ece", "ece_scaled", "temperature")
# Standard deviation of noise on images in 0..1, of the blur in heights, contrast left, shift in
# widths and heights.
DAMAGES = {
    "noise": (0.05, 0.1, 0.2),
    "blur": (0.02, 0.04, 0.08),
    "contrast": (0.6, 0.4, 0.2),
    "shift": (0.05, 0.1, 0.2),
}
# By the name of their score, in the order of DAMAGES.
STRENGTHS = {f"{k}_{s + 1}": (k, x) for k, own in DAMAGES.items() for s, x in enumerate(own)}


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Expected calibration error in [0, 1], of logits (N, classes) and class indices (N,).

    Source: Guo et al. 2017, arXiv 1706.04599, with bins of equal width, closed above.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    gaps = torch.zeros(BINS, dtype=torch.float64)
    gaps.index_add_(0, place, (predicted == targets).double() - confidence)
    return (gaps.abs().sum() / len(targets)).item()


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature, between 1/100 and 100, that logits are divided by for the least NLL."""
    low, high = -4.6, 4.6  # of its logarithm; NLL is convex in the inverse
    loss = lambda log: F.cross_entropy(logits.double() * torch.tensor(-log).exp(), targets)
    for _ in range(50):
        one, other = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, other) if loss(one) < loss(other) else (one, high)
    return torch.tensor((low + high) / 2).exp().item()


def calibration(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """NLL (nats), calibration error raw and after temperature scaling, and the temperature.

    The temperature is fitted on every fifth image, which is not scored.
    """
    fits = torch.arange(len(targets)) % FIT_EVERY == 0
    temperature = fit_temperature(logits[fits], targets[fits])
    own, targets = logits[~fits].double(), targets[~fits]
    scaled = calibration_error(own / temperature, targets)
    nll = F.cross_entropy(own, targets).item()
    values = (nll, calibration_error(own, targets), scaled, temperature)
    return dict(zip(CALIBRATION, values, strict=True))


def subsets(paths: int, most: int) -> dict[int, list[list[int]]]:
    """By number of removed paths, which ones: evenly spaced, then drawn ones, of this many paths.

    A drawn subset holds the smaller ones of its column, the same for every network.
    """
    orders = [random.Random(f"removed {i}").sample(range(paths), paths) for i in range(DRAWN)]
    counts = sorted({round(most * step / STEPS) for step in range(STEPS + 1)})
    even = {k: [int((i + 0.5) * paths / k) for i in range(k)] for k in counts}
    return {k: [even[k], *(sorted(order[:k]) for order in orders)] for k in counts}


def damage(images: Tensor, kind: str, strength: float, seed: int) -> Tensor:
    """Images (B, C, H, W) in 0..1, damaged (see DAMAGES); noise is a function of the seed."""
    height, width = images.shape[-2:]
    if kind == "noise":
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        images = images + strength * noise.to(images)
    elif kind == "blur":
        size = 2 * max(1, round(3 * strength * height)) + 1
        images = gaussian_blur(images, [size, size], [strength * height])
    elif kind == "contrast":
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + strength * (images - mean)
    else:
        down, right = max(1, round(strength * height)), max(1, round(strength * width))
        padded = F.pad(images, (right, 0, down, 0), mode="replicate")
        images = padded[..., :height, :width]
    return images.clamp(0, 1)


@torch.no_grad()
def measure(
    model: nn.Module,
    paths: Sequence[Path],
    batches: Iterable,
    task: str,
    data: dict[str, Any],
    remove: int | None = None,
    damaged: bool = True,
    alone: Sequence[Path] = (),
) -> dict[str, Any]:
    """Measure a network on batches of normalized images and targets.

    Args:
        model: in eval mode; images go to its device.
        task: as --task calls it; calibration is for classification alone.
        data: timm's data config, whose mean and std the images were normalized with.
        remove: remove up to so many paths (default: all).
        alone: paths that are also removed one at a time.

    Returns:
        CALIBRATION; "loss"; "score" (0..1) of the task's metric; a score for each of STRENGTHS;
        "removed": {paths removed: scores, of the evenly spaced and of each drawn subset};
        "area_even", "area_drawn": area under that curve over the share removed; with `alone`
        "importance": {path: (loss, score, rise of the loss)}
    """
    chosen = subsets(len(paths), len(paths) if remove is None else remove)
    removals: dict[Any, list[Path]] = {path.name: [path] for path in alone}
    for k, own in chosen.items():
        own = own if k else own[:1]
        removals |= {(k, i): [paths[j] for j in subset] for i, subset in enumerate(own)}
    damages = STRENGTHS if damaged else {}
    scored, logits, targets = _evaluate(model, batches, task, data, removals, damages)
    scores = {key: own[EVALUATORS[task].default_metric] / 100 for key, own in scored.items()}
    removed = {k: [scores[k, i if k else 0] for i in range(1 + DRAWN)] for k in chosen}
    found: dict[str, Any] = dict.fromkeys(CALIBRATION)
    if task == "classification":
        found |= calibration(logits, targets)
    loss = scored[0, 0]["loss"]
    found |= {"loss": loss, "score": scores[0, 0], "removed": removed}
    found |= {name: scores[name] for name in damages}
    if len(chosen) > 1:
        found["area_even"] = area(removed, slice(1))
        found["area_drawn"] = area(removed, slice(1, None))
    if alone:
        losses = {path.name: scored[path.name]["loss"] for path in alone}
        found["importance"] = {n: (own, scores[n], own - loss) for n, own in losses.items()}
    return found


def _evaluate(
    model: nn.Module,
    batches: Iterable,
    task: str,
    data: dict[str, Any],
    removals: dict[Any, list[Path]],
    damages: dict[str, tuple[str, float]],
) -> tuple[dict[Any, dict[str, float]], Tensor, Tensor]:
    """What the task's evaluator finds with each of the removals and damages, by their keys.

    Returns also the logits of (0, 0), which removes nothing, and the targets.
    """
    device = next(model.parameters()).device
    mean, std = (torch.tensor(data[n], device=device).view(-1, 1, 1) for n in ("mean", "std"))
    evaluators = {key: EVALUATORS[task]() for key in (*removals, *damages)}
    logits, targets = [], []
    for batch, (x, y) in enumerate(batches):
        x = x.to(device)
        for key, evaluator in evaluators.items():
            images = x
            if key in damages:
                images = (damage(x * std + mean, *damages[key], batch) - mean) / std
            with dropped(model, *removals.get(key, ())):
                output = model(images)
            evaluator.update(output.cpu(), y)
            if key == (0, 0):
                logits.append(output.float().cpu())
                targets.append(y)
    computed = {key: evaluator.compute() for key, evaluator in evaluators.items()}
    return computed, torch.cat(logits), torch.cat(targets)


def area(removed: dict[int, list[float]], columns: slice) -> float:
    """Area under the mean score of some subsets over the share of the paths that are removed."""
    shares = [k / max(removed) for k in sorted(removed)]
    scores = [fmean(removed[k][columns]) for k in sorted(removed)]
    return torch.trapezoid(*torch.tensor([scores, shares], dtype=torch.float64)).item()


def told(found: dict[str, Any]) -> list[str]:
    """What was measured, as lines of text."""
    lines = []
    if found.get("nll") is not None:
        text = "  calibration error {1:.4f}, {2:.4f} at its temperature {3:.2f}"
        lines.append(text.format(*(found[name] for name in CALIBRATION)))
    if "area_even" in found:
        shown = (f"{k} {s[0]:.2%}/{sum(s[1:]) / DRAWN:.2%}" for k, s in found["removed"].items())
        lines.append(f"  with paths removed, evenly spaced/drawn: {'; '.join(shown)}")
        lines.append("  area under that curve: {area_even:.4f}/{area_drawn:.4f}".format(**found))
    for kind in DAMAGES if "noise_1" in found else ():
        scores = [f"{found[name]:.2%}" for name, (own, _) in STRENGTHS.items() if own == kind]
        lines.append(f"  under {kind}, at three strengths: {', '.join(scores)}")
    return lines
