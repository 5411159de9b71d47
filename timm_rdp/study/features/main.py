"""`timm-rdp features`: how any timm model reuses features, from one checkpoint or several."""

import argparse
import statistics
from dataclasses import dataclass
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
from timm_rdp.study import figures
from timm_rdp.study.features import layers, models, similarity
from timm_rdp.study.options import at_least, check_installed, check_output
from timm_rdp.training.flags import COUNT, SEED
from timm_rdp.training.model import EVALUATORS

KINDS = {"paths": "path outputs", "blocks": "block outputs"}
MAX_CHECKPOINTS = 6
# By task: the evaluator's metric beside the loss, as tables and as texts call it.
SCORES = {"classification": ("accuracy", "top-1"), "multilabel": ("map", "mean average precision")}


@dataclass
class Network:
    """What was measured of one network."""

    label: str
    kinds: dict[str, dict[str, Any]]  # by a key of KINDS: what `_measure` returns
    loss: float | None  # None where it has not the images' classes
    score: float | None  # of SCORES
    importance: dict[str, tuple[float, float, float]]  # by path: loss, score, rise of the loss
    skipped: set[str]  # layers whose output is no feature per image


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
    add("--no-importance", action="store_true", help="leave out path importance, the slow part")
    else_own = "(default: the checkpoint's, else the {}')"
    add("--num-classes", type=COUNT, help=f"the model's outputs {else_own.format('images')}")
    add("--img-size", type=COUNT, help=f"image size {else_own.format('model')}")
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


@torch.no_grad()
def observe(
    args: argparse.Namespace, images: Subset, classes: int, source: models.Source, device: str
) -> Network:
    """Pass the images through one network, streaming, and measure it."""
    torch.manual_seed(args.seed)
    model, data, mode = models.build(args, source, classes)
    every_path = models.find_paths(args.model, model, data["input_size"])
    paths, modules = layers.choose(model, every_path, args.layers)
    outputs, task = getattr(model, "num_classes", classes), task_of(images)
    trained = source.settings.get("task") or task
    is_own = (outputs, trained) == (classes, task)
    if not (args.no_importance or is_own):
        told = f"{trained} with {outputs} classes, the images are for {task} with {classes}"
        raise UsageError(
            f"{source.label} is for {told}: path importance needs its own classes; give "
            "--data-dir or --dataset with those, or --no-importance"
        )
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
    means = {name: _loss_and_score(evaluator) for name, evaluator in scored.items()}
    loss, score = means.pop("", (None, None))
    importance = {name: (a, b, a - (loss or 0.0)) for name, (a, b) in means.items()}
    kinds = {}
    for kind in KINDS:
        own = {n: f for (k, n), f in features.items() if k == kind and n not in skipped}
        if own:
            kinds[kind] = _measure(source.label, own, args.cka == "unbiased")
    return Network(source.label, kinds, loss, score, importance, skipped)


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


def write(
    args: argparse.Namespace,
    output: Path,
    images: str,
    score: tuple[str, str],
    networks: list[Network],
) -> None:
    """Figures, tables, summary; `images` says what was passed through the networks."""
    output.mkdir(parents=True, exist_ok=True)
    labels = [network.label for network in networks]
    kinds = {kind: [n.kinds[kind] for n in networks] for kind in networks[0].kinds}
    grid = [(KINDS[kind], 0, [own["cka"] for own in each]) for kind, each in kinds.items()]
    title = f"Layer similarity in {args.model}, {images}"
    figures.write_figure(
        output / "similarity",
        figures.similarity_grid(grid, labels, "similarity (linear CKA)", title),
        ("network", "layers", "number", "name", "other_number", "other_name", "cka", "cosine"),
        (
            (n.label, kind, i, a, j, b, f"{own['cka'][i, j]:.6f}", f"{own['cosine'][i, j]:.6f}")
            for n in networks
            for kind, own in n.kinds.items()
            for i, a in enumerate(own["names"])
            for j, b in enumerate(own["names"])
        ),
    )
    ranks = [
        (KINDS[kind], [torch.tensor(own["ranks"]) for own in each]) for kind, each in kinds.items()
    ]
    title = f"Dimensions that the features of {args.model} use"
    what = "effective rank (dimensions)"
    figures.lines_per_layer(ranks, labels, what, title).savefig(output / "rank.png")
    rows = []
    for network, (kind, own) in ((n, item) for n in networks for item in n.kinds.items()):
        climbs = similarity.rebounds(own["cka"]).tolist() if len(own["names"]) > 2 else []
        climbs = [*(f"{climb:.6f}" for climb in climbs), "", ""]
        for i, (name, width, climb) in enumerate(
            zip(own["names"], own["widths"], climbs, strict=False)
        ):
            rows.append((network.label, kind, i, name, width, f"{own['ranks'][i]:.4f}", climb))
    header = ("network", "layers", "number", "name", "width", "effective_rank", "rebound")
    figures.write_csv(output / "layers.csv", header, rows)
    if names := list(networks[0].importance):
        rises = [torch.tensor([n.importance[path][2] for path in names]) for n in networks]
        figures.write_figure(
            output / "importance",
            figures.path_importance(names, rises, labels),
            ("network", "path", "loss", score[0], "loss_rise"),
            (
                (n.label, path, *(f"{value:.6f}" for value in values))
                for n in networks
                for path, values in n.importance.items()
            ),
        )
    text = summary(args, images, score[1], networks)
    (output / "summary.txt").write_text(text)
    print(text)
    print(f"Figures, their numbers and this summary are in {output}")


def summary(args: argparse.Namespace, images: str, score: str, networks: list[Network]) -> str:
    """What was measured, as plain text."""
    folder = f"--data-dir {args.data_dir}" if args.data_dir else "the demo (handwritten digits)"
    folder = args.dataset or folder
    lines = [
        f"{args.model}: {images} from {folder}",
        f"CKA: linear, {args.cka}; positions pooled: {args.pool}; revisit score: 0 where features "
        "only stay or drift away, 1 where all are lost and come back",
    ]
    for network in networks:
        lines += ["", network.label]
        if network.loss is not None:
            lines.append(f"  loss {network.loss:.4f}, {score} {network.score:.2%}")
        for kind, own in network.kinds.items():
            score = "needs 3 layers or more"
            if len(own["names"]) > 2:
                cka, cosine = map(similarity.revisit_score, (own["cka"], own["cosine"]))
                score = f"{cka:.3f} by CKA, {cosine:.3f} by cosine"
            rank = statistics.mean(own["ranks"])
            what = f"{len(own['names'])} {KINDS[kind]}: revisit score {score}"
            lines.append(f"  {what}; mean effective rank {rank:.1f}")
        if network.importance:
            rises = {path: rise for path, (*_, rise) in network.importance.items()}
            ranked = [f"{p} {rises[p]:+.4f}" for p in sorted(rises, key=lambda p: -rises[p])]
            lines.append(f"  paths whose loss matters most: {'; '.join(ranked[:3])}")
            lines.append(f"  paths that matter least: {'; '.join(ranked[-3:])}")
        if network.skipped:
            skipped = ", ".join(sorted(network.skipped))
            lines.append(f"  not a feature per image, left out: {skipped}")
    return "\n".join(lines) + "\n"
