"""Paths removed from trained networks, with BatchNorm's statistics estimated anew for what is left.

    python benchmarks/removed_statistics.py output/registered/e5/runs/*/ --output statistics.csv

`timm-rdp compare --measure` removes paths and leaves the rest as it is, running means and variances
too. Here each network that is left sees training images first, without augmentation as when they
are scored, and BatchNorm averages their statistics; weights stay. Scored images, subsets and areas
are those of the measures, which each run has to have, and its last.pth.tar.

Writes a row a run as each ends; what is there is not run again.
"""

import argparse
import csv
from pathlib import Path

import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_rdp.study import measures
from timm_rdp.study.compare import measured
from timm_rdp.study.features import models
from timm_rdp.study.features.layers import dropped
from timm_rdp.training.dataset import make_dataset

SCORED, TRAINING, BATCH = 2000, 2560, 256
COLUMNS = ("run", *measured.AREAS, *(f"{name}_anew" for name in measured.AREAS))


def estimate(model: nn.Module, batches: list[Tensor]) -> None:
    """Give every BatchNorm the mean of the batches' statistics; nothing else is trained.

    torch.optim.swa_utils.update_bn puts the whole model in train mode, so that DropPaths drop.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average
        norm.train()
    for x in batches:
        model(x)
    for norm in norms:
        norm.eval()


@torch.no_grad()
def areas(folder: Path) -> list[float]:
    """area_even and area_drawn, in [0, 1], of a run with statistics estimated anew."""
    args, model, data, mode = measured.rebuild(folder)
    batches = {}
    for is_training, count in ((True, TRAINING), (False, SCORED)):
        dataset = make_dataset(args, mode, is_training=is_training)
        dataset.transform = create_transform(**data)
        batches[is_training] = list(DataLoader(models.draw(dataset, count, 0), BATCH))
    scored = sum(len(y) for _, y in batches[False])
    paths = models.find_paths(args.model, model, data["input_size"])
    removed = {}
    for k, subsets in measures.subsets(len(paths), len(paths)).items():
        removed[k] = []
        for subset in subsets:
            with dropped(model, *(paths[i] for i in subset)):
                estimate(model, [x for x, _ in batches[True]])
                correct = sum((model(x).argmax(1) == y).sum().item() for x, y in batches[False])
            removed[k].append(correct / scored)
    return [measures.area(removed, columns) for columns in (slice(1), slice(1, None))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of timm-rdp compare")
    parser.add_argument(
        "--output", type=Path, required=True, help="the CSV file to write or extend"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if args.output.exists():
        with open(args.output, newline="") as file:
            done = {row["run"] for row in csv.DictReader(file)}
    kept = {folder: measured.read_measures(folder, SCORED) for folder in args.runs}
    if missing := [str(folder) for folder, found in kept.items() if not found]:
        parser.error(f"not measured with --measure {SCORED}: {', '.join(missing)}")
    for folder in args.runs:
        if folder.name in done:
            continue
        row = [folder.name, *(kept[folder][name] for name in measured.AREAS), *areas(folder)]
        with open(args.output, "a", newline="") as file:
            writer = csv.writer(file)
            if not file.tell():
                writer.writerow(COLUMNS)
            writer.writerow(row)
        print(*row, flush=True)


if __name__ == "__main__":
    main()
