"""`timm-rdp features`: how any timm model reuses features, from one checkpoint or several."""

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data import MultiLabelTarget
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from timm_rdp.args import Parser, show_defaults
from timm_rdp.errors import UsageError, report
from timm_rdp.study import measures
from timm_rdp.study.features import layers, models, similarity
from timm_rdp.study.features.report import KINDS, SCORES, Network, write
from timm_rdp.study.options import at_least, check_installed, check_output
from timm_rdp.training.flags import COUNT, SEED
from timm_rdp.training.options import resolve_device

MAX_CHECKPOINTS = 6


def _parser() -> Parser:
    parser = Parser(
        prog="timm-rdp features",
        description="Layer similarity (CKA, cosine), revisit score, effective rank and path "
        "importance of a timm model, for one or more checkpoints side by side.",
    )
    add = parser.add_argument
    one_of = parser.add_mutually_exclusive_group().add_argument
    # fmt: off
    add("--model", required=True, metavar="NAME", help="name of a timm model")
    one_of("--checkpoint", nargs="+", default=[], metavar="FILE", help="of train_rdp.py or of timm")
    one_of("--pretrained", action="store_true", help="timm's own weights")
    add("--label", nargs="+", default=[], metavar="NAME", help="what to call each checkpoint")
    add("--use-ema", action="store_true", help="the checkpoints' averaged weights")
    add("--data-dir", metavar="DIR",
        help="images, as for training (default: the checkpoint's --dataset, else the demo's)")
    add("--dataset", metavar="NAME", help="in --data-dir, as for training (default: image folders)")
    add("--output", default="output/features", metavar="DIR", help="folder to write into")
    add("--num-images", type=at_least(models.MIN_IMAGES), default=256,
        help="validation images to use at most")
    add("--seed", type=SEED, default=0,
        help="of their choice, and of weights that are random (default: 0)")
    add("--batch-size", type=COUNT, default=32, help="images at a time")
    add("--layers", nargs="+", metavar="NAME", help="only these paths and modules; * is any text")
    add("--pool", choices=layers.POOLS, default="mean",
        help="positions of a layer to one value a channel")
    add("--cka", choices=("unbiased", "biased"), default="unbiased", help="estimate of HSIC")
    add("--remove", type=COUNT, metavar="K", help="also the accuracy with up to K paths removed")
    add("--damage", action="store_true", help="also on noisy, blurred, pale and shifted images")
    add("--no-importance", action="store_true", help="leave out path importance, the slow part")
    add("--num-classes", type=COUNT,
        help="the model's outputs (default: the checkpoint's, else the images')")
    add("--img-size", type=COUNT, help="image size (default: the checkpoint's, else the model's)")
    add("--in-chans", type=COUNT, help="image channels (default: the checkpoint's, else 3)")
    add("--device", help="default: the best there is")
    # fmt: on
    return show_defaults(parser)


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp features`; returns its exit status."""
    try:
        args = _parser().parse_args(argv)
        check_installed("matplotlib")
        output = check_output(args.output)
        device = resolve_device(args.device)
        sources = read_sources(args)
        trained = sources[0].settings
        if args.dataset is None:
            args.dataset = "" if args.data_dir else trained.get("dataset") or ""
        what = (args.data_dir, args.num_images, args.seed, args.dataset, trained)
        images, classes = models.choose_images(*what)
        dataset: Any = images.dataset
        several = isinstance(getattr(dataset, "target_transform", None), MultiLabelTarget)
        task = "multilabel" if several else "classification"
        networks = [observe(args, images, classes, task, own, device) for own in sources]
        told = f"{len(images)} validation images of {classes} classes"
        write(args, output, told, SCORES[task], networks)
    except UsageError as error:
        return report(error)
    return 0


def read_sources(args: argparse.Namespace) -> list[models.Source]:
    """The networks to compare: a checkpoint each, or the one without."""
    files, labels = args.checkpoint, args.label
    if len(files) > MAX_CHECKPOINTS:
        raise UsageError(f"--checkpoint: {len(files)} files, more than {MAX_CHECKPOINTS}")
    if labels and len(labels) != max(1, len(files)):
        raise UsageError(f"--label: {len(labels)} names, {max(1, len(files))} needed; one each")
    if not files:
        untrained = f"untrained (seed {args.seed})"
        return [models.Source((labels or ["pretrained" if args.pretrained else untrained])[0])]
    # By file, or else by folder, where that tells them apart.
    for name_of in (lambda path: path.name, lambda path: path.parent.name, str):
        names = [name_of(Path(file)) for file in files]
        if len(set(names)) == len(files):
            break
    return [
        models.read_source(path, args.model, args.use_ema, label)
        for path, label in zip(files, labels or names, strict=True)
    ]


@torch.no_grad()
def observe(
    args: argparse.Namespace,
    images: Subset,
    classes: int,
    task: str,
    source: models.Source,
    device: str,
) -> Network:
    """Pass the images, which are for a task, through one network, streaming, and measure it."""
    torch.manual_seed(args.seed)
    model, data, mode = models.build(args, source, classes)
    every_path = models.find_paths(args.model, model, data["input_size"])
    if (args.remove or 0) > len(every_path):
        raise UsageError(f"--remove {args.remove}: {args.model} has {len(every_path)} paths")
    paths, modules = layers.choose(model, every_path, args.layers)
    trained, outputs = source.settings.get("task") or task, getattr(model, "num_classes", classes)
    is_own = (trained, outputs) == (task, classes)
    if not (is_own or args.no_importance):
        raise UsageError(
            f"{source.label} is for {trained} with {outputs} classes, the images are for {task} "
            f"with {classes}: path importance needs its own classes; give --data-dir or --dataset "
            "with those, or --no-importance"
        )
    model.to(device)
    dataset: Any = images.dataset
    dataset.transform, dataset.input_img_mode = create_transform(**data), mode
    batches = DataLoader(images, args.batch_size)
    features: dict[tuple[str, str], Tensor] = {}  # by a key of KINDS and the layer's name
    skipped: set[str] = set()
    for i, (x, _) in enumerate(tqdm(batches, source.label, unit="batch")):
        x = x.to(device)
        found = layers.run_observed(model, x, paths, modules, args.pool, not args.layers)[1]
        for key, pooled in found.items():
            if pooled is None:
                skipped.add(key[1])
                continue
            # Once per layer: small tensors kept batch by batch would pin the heap between the big
            # ones that are freed.
            if key not in features:
                features[key] = torch.empty(len(images), pooled.shape[1])
            features[key][i * args.batch_size :][: len(x)] = pooled
    measured = {}
    if is_own:
        batches = tqdm(batches, f"{source.label}, measures", unit="batch")
        alone = () if args.no_importance else paths
        more = (args.remove or 0, args.damage, alone)
        measured = measures.measure(model, every_path, batches, task, data, *more)
    kinds = {}
    for kind in KINDS:
        own = {n: f for (k, n), f in features.items() if k == kind and n not in skipped}
        if own:
            kinds[kind] = _measure(source.label, own, args.cka == "unbiased")
    return Network(source.label, kinds, measured, skipped)


def _measure(label: str, features: dict[str, Tensor], unbiased: bool) -> dict[str, Any]:
    """Names, widths, CKA and cosines (layers, layers) and effective ranks, in forward order."""
    for name, layer in features.items():
        if not layer.isfinite().all():
            raise UsageError(
                f"{label}: features of {name} are not finite; the weights have diverged, "
                "use another checkpoint"
            )
    own = list(features.values())
    return {
        "names": list(features),
        "widths": [layer.shape[1] for layer in own],
        "cka": similarity.cka_matrix(own, unbiased),
        "cosine": similarity.cosine_matrix(own),
        "ranks": [similarity.effective_rank(layer) for layer in own],
    }
