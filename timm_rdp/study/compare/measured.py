"""The finished runs of a comparison, measured from their checkpoints beside their accuracy."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data.transforms_factory import create_transform
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from timm_rdp import ResidualDropPath
from timm_rdp.errors import refused_with
from timm_rdp.study import measures
from timm_rdp.study.compare.cost import build_on_meta, flop_counter
from timm_rdp.study.compare.runs import NEVER
from timm_rdp.study.features import models
from timm_rdp.training.dataset import make_dataset
from timm_rdp.training.flags import build_parser
from timm_rdp.training.model import example_input
from timm_rdp.training.saver import write_atomically

AREAS = ("area_even", "area_drawn")
NAMES = (*measures.CALIBRATION, *AREAS, *measures.STRENGTHS)  # as runs.csv and table.csv have them
_BATCH = 8  # images; FLOPs are counted for as many more


def measure_runs(folders: Sequence[Path], count: int, device: str) -> None:
    """Measure runs on so many of their validation images, those that have not been so far."""
    missing = [folder for folder in folders if not read_measures(folder, count)]
    for folder in tqdm(missing, "measuring", unit="run", leave=False, disable=None):
        found = {"asked": count, **_measure_run(folder, count, device)}
        write_atomically(f"{folder}.measures.json", (json.dumps(found, indent=2) + "\n").encode())


def read_measures(folder: Path, count: int) -> dict[str, Any]:
    """What was measured of a run on so many images (see measures.measure); {} where nothing was."""
    file = Path(f"{folder}.measures.json")
    if not file.exists():
        return {}
    with refused_with(f"{file} is damaged, delete it"):
        found = json.loads(file.read_text())
        found["removed"] = {int(k): scores for k, scores in found["removed"].items()}
        return found if found["asked"] == count else {}


def rebuild(folder: Path) -> tuple[argparse.Namespace, nn.Module, dict[str, Any], str]:
    """A finished run's options, network in eval mode, timm's data config and mode of images."""
    trained = yaml.safe_load((folder / "args.yaml").read_text())
    args = argparse.Namespace(**vars(build_parser().parse_args([])) | trained)
    is_averaged = args.model_ema and not args.model_ema_force_cpu  # as it was validated
    source = models.read_source(str(folder / "last.pth.tar"), args.model, is_averaged, folder.name)
    asked = dict(model=args.model, pretrained=False, num_classes=None, img_size=None, in_chans=None)
    return args, *models.build(argparse.Namespace(**asked), source, args.num_classes or 0)


def _measure_run(folder: Path, count: int, device: str) -> dict[str, Any]:
    args, model, data, mode = rebuild(folder)
    dataset = make_dataset(args, mode, is_training=False)
    dataset.transform = create_transform(**data)
    images = models.draw(dataset, count, 0)
    paths = models.find_paths(args.model, model, data["input_size"])
    batches = DataLoader(images, args.validation_batch_size or args.batch_size)
    return measures.measure(model.to(device), paths, batches, args.task, data)


def inference_flops(args: argparse.Namespace) -> dict[str, list[float]] | None:
    """FLOPs of an image's inference by number of removed paths, for measures.COLUMNS.

    None where they cannot be counted without data, or a path cannot be removed by itself.
    """
    args = argparse.Namespace(**{**vars(args), "drop_path": 0.1})
    model, data_config, _ = build_on_meta(args)
    size = data_config["input_size"]
    paths = models.find_paths(args.model, model, size)
    if any(path.call for path in paths):
        return None
    example = example_input(args, size, model.train())
    rdp = ResidualDropPath(model, every=NEVER, example_input=example)
    dtype = next(model.parameters()).dtype

    def flops(removed: list[int]) -> float:
        for i, path in enumerate(rdp.paths):
            setattr(path.module, path.kind.rate, float(i in removed))
        counts = []
        # What is dropped is still run for one image: the difference of two batches is without.
        for batch in (_BATCH, 2 * _BATCH):
            images = torch.empty((batch, *size), device="meta", dtype=dtype)
            with rdp.iteration(), torch.no_grad(), flop_counter() as counter:
                model(images)
            counts.append(counter.get_total_flops())
        return (counts[1] - counts[0]) / _BATCH

    sets = measures.subsets(len(paths), len(paths))
    try:
        return {str(k): [flops(removed) for removed in own] for k, own in sets.items()}
    except Exception:  # whatever a model raises that asks for the values of its input
        return None
