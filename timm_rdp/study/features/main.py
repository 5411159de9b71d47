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
from timm_rdp.errors import UsageError, refused_with, report
from timm_rdp.study import measures
from timm_rdp.study.features import layers, models, similarity
from timm_rdp.study.features.report import KINDS, SCORES, Network, write
from timm_rdp.study.options import at_least, check_installed, check_output
from timm_rdp.training.flags import COUNT, SEED
from timm_rdp.training.model import EVALUATORS

MAX_CHECKPOINTS = 6


def _parser() -> Parser:
    parser = Parser(
        prog="timm-rdp features",
        description="Layer similarity (CKA, cosine), revisit score, effective rank and path "
        "importance of a timm model, for one or more checkpoints side by side.",
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="name of a timm model")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--checkpoint", nargs="+", default=[], metavar="FILE", help="of train_rdp.py or of timm")
    one_of("--pretrained", action="store_true", help="timm's own weights")
    add("--label", nargs="+", default=[], metavar="NAME", help="what to call each checkpoint")
    add("--use-ema", action="store_true", help="the checkpoints' averaged weights")
    add(
        "--data-dir",
        metavar="DIR",
        help="images, as for training (default: the checkpoint's "
        "--dataset, else the demo's digits)",
    )
    add("--dataset", metavar="NAME", help="in --data-dir, as for training (default: image folders)")
    add("--output", default="output/features", metavar="DIR", help="folder to write into")
    images = "validation images to use at most"
    add("--num-images", type=at_least(models.MIN_IMAGES), default=256, help=images)
    seed = "of their choice, and of weights that are random (default: 0)"
    add("--seed", type=SEED, default=0, help=seed)
    add("--batch-size", type=COUNT, default=32, help="images at a time")
    add("--layers", nargs="+", metavar="NAME", help="only these paths and modules; * is any text")
    add(
        "--pool",
        choices=layers.POOLS,
        default="mean",
        help="positions of a layer to one value a channel",
    )
    add("--cka", choices=("unbiased", "biased"), default="unbiased", help="estimate of HSIC")
    add("--remove", type=COUNT, metavar="K", help="also the accuracy with up to K paths removed")
    add("--damage", action="store_true", help="also on noisy, blurred, pale and shifted images")
    add("--no-importance", action="store_true", help="leave out path importance, the slow part")
    outputs = "the model's outputs (default: the checkpoint's, else the images')"
    add("--num-classes", type=COUNT, help=outputs)
    add("--img-size", type=COUNT, help="image size (default: the checkpoint's, else the model's)")
    add("--in-chans", type=COUNT, help="image channels (default: the checkpoint's, else 3)")
    add("--device", help="default: the best there is")
    return show_defaults(parser)


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp features`; returns its exit status."""
    try:
        args = _parser().parse_args(argv)
        check_installed("matplotlib")
        output = check_output(args.output)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with refused_with(f"--device {device}"):
            torch.empty(0, device=device)
        sources = read_sources(args)
        trained = sources[0].settings
        if args.dataset is None:
            args.dataset = "" if args.data_dir else trained.get("dataset") or ""
        images, classes = models.choose_images(
            args.data_dir, args.num_images, args.seed, args.dataset, trained
        )
        networks = [observe(args, images, classes, own, device) for own in sources]
        told = f"{len(images)} validation images of {classes} classes"
        write(args, output, told, SCORES[task_of(images)], networks)
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


def task_of(images: Subset) -> str:
    """The task, as --task calls it, that the targets of a data set are for."""
    how = getattr(images.dataset, "target_transform", None)
    return "multilabel" if isinstance(how, MultiLabelTarget) else "classification"


def _has_own_classes(
    source: models.Source, outputs: int, task: str, classes: int, needed: bool
) -> bool:
    trained = source.settings.get("task") or task
    is_own = (outputs, trained) == (classes, task)
    if needed and not is_own:
        told = f"{trained} with {outputs} classes, the images are for {task} with {classes}"
        raise UsageError(
            f"{source.label} is for {told}: path importance needs its own classes; give "
            "--data-dir or --dataset with those, or --no-importance"
        )
    return is_own


@torch.no_grad()
def observe(
    args: argparse.Namespace, images: Subset, classes: int, source: models.Source, device: str
) -> Network:
    """Pass the images through one network, streaming, and measure it."""
    torch.manual_seed(args.seed)
    model, data, mode = models.build(args, source, classes)
    every_path = models.find_paths(args.model, model, data["input_size"])
    if (args.remove or 0) > len(every_path):
        raise UsageError(f"--remove {args.remove}: {args.model} has {len(every_path)} paths")
    paths, modules = layers.choose(model, every_path, args.layers)
    outputs, task = getattr(model, "num_classes", classes), task_of(images)
    is_own = _has_own_classes(source, outputs, task, classes, not args.no_importance)
    model.to(device)
    dropping = [] if args.no_importance else paths
    features: dict[tuple[str, str], Tensor] = {}  # by a key of KINDS and the layer's name
    skipped: set[str] = set()
    scored: dict[str, Any] = {}  # timm's evaluators, by dropped path, "" for none

    def add_up(name: str, logits: Any, y: Tensor) -> None:
        if isinstance(logits, tuple | list):  # distilled models: one output a head
            logits = torch.stack(list(logits)).mean(0)
        if is_own:
            scored.setdefault(name, EVALUATORS[task](device)).update(logits, y)
        bar.update(len(y))

    dataset: Any = images.dataset
    dataset.transform, dataset.input_img_mode = create_transform(**data), mode
    count = len(images)
    with tqdm(total=count * (1 + len(dropping)), unit="image", desc=source.label) as bar:
        for i, (x, y) in enumerate(DataLoader(images, args.batch_size)):
            x, y = x.to(device), y.to(device)
            logits, found = layers.run_observed(
                model, x, paths, modules, args.pool, not args.layers
            )
            add_up("", logits, y)
            skipped |= {name for (_, name), pooled in found.items() if pooled is None}
            for key, pooled in found.items():
                if pooled is not None:
                    # Once per layer: small tensors kept batch by batch would pin the heap between
                    # the big ones that are freed.
                    if key not in features:
                        features[key] = torch.empty(count, pooled.shape[1])
                    features[key][i * args.batch_size :][: len(x)] = pooled
            for path in dropping:
                with layers.dropped(model, path):
                    add_up(path.name, model(x), y)
    measured = {}
    if is_own:
        again, extra = DataLoader(images, args.batch_size), (args.remove or 0, args.damage)
        measured = measures.measure(model, every_path, again, task, data, *extra)
    means = {name: _loss_and_score(evaluator) for name, evaluator in scored.items()}
    loss, score = means.pop("", (None, None))
    importance = {name: (a, b, a - (loss or 0.0)) for name, (a, b) in means.items()}
    kinds = {}
    for kind in KINDS:
        own = {n: f for (k, n), f in features.items() if k == kind and n not in skipped}
        if own:
            kinds[kind] = _measure(source.label, own, args.cka == "unbiased")
    return Network(source.label, kinds, loss, score, importance, measured, skipped)


def _loss_and_score(evaluator: Any) -> tuple[float, float]:
    found = evaluator.compute()
    return found["loss"], found[evaluator.default_metric] / 100


def _measure(label: str, features: dict[str, Tensor], unbiased: bool) -> dict[str, Any]:
    """Names, widths, CKA and cosines (layers, layers) and effective ranks, in forward order."""
    for name, layer in features.items():
        if not layer.isfinite().all():
            raise UsageError(
                f"{label}: features of {name} are not finite; the weights have diverged, "
                "use another checkpoint"
            )
    own = list(features.values())
    found = {"names": list(features), "widths": [layer.shape[1] for layer in own]}
    matrices = {
        "cka": similarity.cka_matrix(own, unbiased),
        "cosine": similarity.cosine_matrix(own),
    }
    return found | matrices | {"ranks": [similarity.effective_rank(layer) for layer in own]}
