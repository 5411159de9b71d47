"""`timm-rdp features`: how any timm model reuses features, from one checkpoint or several."""

import argparse
import statistics
import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from tqdm import tqdm

from timm_rdp.errors import UsageError
from timm_rdp.study.features.images import Images
from timm_rdp.study.features.layers import POOLS, Recorder, choose, dropped
from timm_rdp.study.features.models import (
    DATA_SETTINGS,
    SETTINGS,
    Source,
    build,
    check_model_name,
    class_count,
    one_line,
    read_source,
    trace,
)
from timm_rdp.study.features.similarity import (
    cka_matrix,
    cosine_matrix,
    effective_rank,
    rebounds,
    revisit_score,
)
from timm_rdp.study.figures import (
    check_matplotlib,
    lines_per_layer,
    path_importance,
    save,
    similarity_grid,
)
from timm_rdp.study.outputs import write_csv
from timm_rdp.training.files import check_output

KINDS = {"paths": "path outputs", "blocks": "block outputs"}
MAX_CHECKPOINTS = 6


@dataclass
class Network:
    """What was measured of one network."""

    label: str
    layers: dict[str, list[str]] = field(default_factory=dict)  # kind: names
    width: dict[str, list[int]] = field(default_factory=dict)
    cka: dict[str, Tensor] = field(default_factory=dict)
    cosine: dict[str, Tensor] = field(default_factory=dict)
    rank: dict[str, Tensor] = field(default_factory=dict)
    loss: float = float("nan")
    accuracy: float = float("nan")
    importance: dict[str, tuple[float, float]] = field(default_factory=dict)  # path: loss, accuracy
    skipped: set[str] = field(default_factory=set)


def build_parser() -> argparse.ArgumentParser:
    """The options of `timm-rdp features`."""
    parser = argparse.ArgumentParser(
        prog="timm-rdp features",
        description="Layer similarity (CKA, cosine), revisit score, effective rank and path "
        "importance of a timm model, for one or more checkpoints side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="timm's name of the model")
    add("--checkpoint", nargs="+", default=[], metavar="FILE", help="of train_rdp.py or of timm")
    add("--label", nargs="+", default=[], metavar="NAME", help="what to call each checkpoint")
    add("--use-ema", action="store_true", help="the checkpoints' averaged weights")
    add("--pretrained", action="store_true", help="timm's own weights, without --checkpoint")
    add("--data-dir", metavar="DIR", help="images, as for training; without it the demo's digits")
    add("--output", default="output/features", metavar="DIR", help="folder to write into")
    add("--num-images", type=int, default=256, help="validation images to use at most")
    add("--seed", type=int, default=0, help="of their choice, and of weights that are random")
    add("--batch-size", type=int, default=32, help="images at a time")
    add("--layers", nargs="+", metavar="NAME", help="only these paths and modules; * is any text")
    add("--pool", choices=POOLS, default="mean", help="positions of a layer to one value a channel")
    add("--cka", choices=("unbiased", "biased"), default="unbiased", help="estimate of HSIC")
    add("--no-importance", action="store_true", help="leave out path importance, the slow part")
    add("--num-classes", type=int, help="the model's outputs, where the checkpoint does not say")
    add("--img-size", type=int, help="image size, where the checkpoint does not say")
    add("--in-chans", type=int, help="image channels, where the checkpoint does not say")
    add("--device", help="the best there is, unless given")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for options that cannot be followed, before any work."""
    check_model_name(args.model)
    if len(args.checkpoint) > MAX_CHECKPOINTS:
        raise UsageError(
            f"--checkpoint: {len(args.checkpoint)} do not fit side by side; "
            f"give {MAX_CHECKPOINTS} or fewer"
        )
    if args.label and len(args.label) != max(1, len(args.checkpoint)):
        raise UsageError(
            f"--label: {len(args.label)} names for {max(1, len(args.checkpoint))} networks; "
            "give one each"
        )
    if args.pretrained and args.checkpoint:
        raise UsageError("--pretrained and --checkpoint: give one of them")
    for name in ("batch_size", "num_classes", "img_size", "in_chans"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}: must be 0 or more")
    if args.device:
        try:
            torch.empty(0, device=args.device)
        except Exception as error:
            raise UsageError(
                f"--device {args.device}: cannot be used ({one_line(error)[:80]}); give cpu"
            ) from error
    check_matplotlib()
    check_output(args.output)


def main(argv: list[str] | None = None) -> int:
    """Run `timm-rdp features`; returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        check(args)
        images = Images(args.data_dir, args.num_images, args.seed)
        sources = read_sources(args)
        networks = [observe(args, images, source) for source in sources]
        write(args, images, networks)
    except UsageError as error:
        print(f"timm-rdp features: {error}", file=sys.stderr)
        return 2
    return 0


def read_sources(args: argparse.Namespace) -> list[Source]:
    """The networks to compare: a checkpoint each, or the one without."""
    if not args.checkpoint:
        label = "pretrained" if args.pretrained else f"untrained (seed {args.seed})"
        return [Source(args.label[0] if args.label else label)]
    labels = args.label or short_names(args.checkpoint)
    return [
        read_source(path, args.model, args.use_ema, label)
        for path, label in zip(args.checkpoint, labels, strict=True)
    ]


def short_names(paths: list[str]) -> list[str]:
    """Paths without what they have in common at both ends, or in full if that leaves nothing."""
    parts = [path.split("/") for path in paths]
    if len(paths) == 1:
        return [parts[0][-1]]
    while all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def model_settings(args: argparse.Namespace, source: Source, classes: int) -> dict:
    """How to build the model: as the command line says, else as the checkpoint was trained."""
    settings = {name: source.settings.get(name) for name in SETTINGS}
    for name in ("img_size", "in_chans"):
        settings[name] = getattr(args, name) or settings[name]
    if args.img_size:
        settings["input_size"] = None
    settings["num_classes"] = None
    if not args.pretrained or args.num_classes:
        settings["num_classes"] = class_count(source, args.model, args.num_classes, classes)
    return settings


@torch.no_grad()
def observe(args: argparse.Namespace, images: Images, source: Source) -> Network:
    """Pass the images through one network, streaming, and measure it."""
    torch.manual_seed(args.seed)
    settings = model_settings(args, source, images.classes)
    model = build(args.model, source, settings, args.pretrained)
    known = {k: v for k, v in source.settings.items() if k in DATA_SETTINGS and v is not None}
    data = resolve_data_config({**settings, **known}, model=model)
    paths = trace(args.model, model, data["input_size"])
    chosen, modules = choose(model, paths, args.layers)
    outputs = getattr(model, "num_classes", images.classes)
    if not args.no_importance and outputs != images.classes:
        raise UsageError(
            f"{source.label} tells {outputs} classes apart, the images have {images.classes}: path "
            "importance needs its own classes; give --data-dir with those, or --no-importance"
        )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)

    network = Network(source.label)
    losses = dict.fromkeys(["", *(path.name for path in chosen)], 0.0)
    correct = dict.fromkeys(losses, 0)
    batches = images.batches(
        args.batch_size, create_transform(**data), "L" if data["input_size"][0] == 1 else "RGB"
    )
    with_importance = [] if args.no_importance else chosen
    with (
        Recorder(
            model, chosen, modules, len(images), args.pool, with_input=not args.layers
        ) as recorder,
        tqdm(
            total=len(images) * (1 + len(with_importance)), unit="image", desc=source.label
        ) as bar,
    ):
        for x, y in batches:
            x, y = x.to(device), y.to(device)
            _add_up(model(x), y, "", losses, correct, outputs == images.classes)
            bar.update(len(x))
            if with_importance:
                with recorder.paused():
                    for path in with_importance:
                        with dropped(model, path):
                            _add_up(model(x), y, path.name, losses, correct, True)
                        bar.update(len(x))
    if outputs == images.classes:
        network.loss = losses[""] / len(images)
        network.accuracy = correct[""] / len(images)
    for path in with_importance:
        network.importance[path.name] = (
            losses[path.name] / len(images),
            correct[path.name] / len(images),
        )
    network.skipped = recorder.skipped
    for kind in KINDS:
        _compare(network, kind, getattr(recorder, kind), args.cka == "unbiased")
    return network


def _add_up(
    logits: Tensor, y: Tensor, name: str, losses: dict, correct: dict, comparable: bool
) -> None:
    if isinstance(logits, tuple | list):  # distilled models: one output a head
        logits = torch.stack(list(logits)).mean(0)
    if comparable:
        losses[name] += F.cross_entropy(logits.float(), y, reduction="sum").item()
        correct[name] += (logits.argmax(1) == y).sum().item()


def _compare(network: Network, kind: str, layers: dict[str, Tensor], unbiased: bool) -> None:
    """Similarity and rank of one kind of layer; nothing where there are none."""
    for name, layer in layers.items():
        if not layer.isfinite().all():
            raise UsageError(
                f"{network.label}: features of {name} are not finite; the weights have diverged, "
                "use another checkpoint"
            )
    if not layers:
        return
    features = list(layers.values())
    network.layers[kind] = list(layers)
    network.width[kind] = [layer.shape[1] for layer in features]
    network.cka[kind] = cka_matrix(features, unbiased)
    network.cosine[kind] = cosine_matrix(features)
    network.rank[kind] = torch.tensor([effective_rank(layer) for layer in features])


def write(args: argparse.Namespace, images: Images, networks: list[Network]) -> None:
    """Figures, tables, summary."""
    output = check_output(args.output)
    output.mkdir(parents=True, exist_ok=True)
    labels = [network.label for network in networks]
    kinds = [kind for kind in KINDS if kind in networks[0].layers]
    save(
        similarity_grid(
            [(KINDS[kind], 0, [network.cka[kind] for network in networks]) for kind in kinds],
            labels,
            "similarity (linear CKA)",
            f"Layer similarity in {args.model}, {len(images)} images",
        ),
        output / "similarity.png",
    )
    save(
        lines_per_layer(
            [(KINDS[kind], [network.rank[kind] for network in networks]) for kind in kinds],
            labels,
            "effective rank (dimensions)",
            f"Dimensions that the features of {args.model} use",
        ),
        output / "rank.png",
    )
    write_csv(
        output / "similarity.csv",
        ("network", "layers", "number", "name", "other_number", "other_name", "cka", "cosine"),
        (
            (n.label, kind, i, a, j, b, f"{n.cka[kind][i, j]:.6f}", f"{n.cosine[kind][i, j]:.6f}")
            for n in networks
            for kind in kinds
            for i, a in enumerate(n.layers[kind])
            for j, b in enumerate(n.layers[kind])
        ),
    )
    write_csv(
        output / "layers.csv",
        ("network", "layers", "number", "name", "width", "effective_rank", "rebound"),
        (row for network in networks for kind in kinds for row in _layer_rows(network, kind)),
    )
    if not args.no_importance and networks[0].importance:
        _write_importance(output, networks, labels)
    text = summary(args, images, networks)
    (output / "summary.txt").write_text(text)
    print(text)
    print(f"Figures, their numbers and this summary are in {output}")


def _layer_rows(network: Network, kind: str):
    names = network.layers[kind]
    climbs = rebounds(network.cka[kind]).tolist() if len(names) > 2 else []
    climbs = [f"{c:.6f}" for c in climbs] + [""] * (len(names) - len(climbs))
    for i, name in enumerate(names):
        rank = f"{network.rank[kind][i]:.4f}"
        yield (network.label, kind, i, name, network.width[kind][i], rank, climbs[i])


def _write_importance(output, networks: list[Network], labels: list[str]) -> None:
    names = list(networks[0].importance)
    rises = [torch.tensor([n.importance[p][0] - n.loss for p in names]) for n in networks]
    save(path_importance(names, rises, labels), output / "importance.png")
    write_csv(
        output / "importance.csv",
        ("network", "path", "loss", "accuracy", "loss_rise"),
        (
            (n.label, path, f"{loss:.6f}", f"{accuracy:.6f}", f"{loss - n.loss:.6f}")
            for n in networks
            for path, (loss, accuracy) in n.importance.items()
        ),
    )


def summary(args: argparse.Namespace, images: Images, networks: list[Network]) -> str:
    """What was measured, as plain text."""
    lines = [
        f"{args.model}: {len(images)} validation images of {images.classes} classes from "
        f"{'--data-dir ' + args.data_dir if args.data_dir else 'the demo (handwritten digits)'}",
        f"CKA: linear, {args.cka}; positions pooled: {args.pool}; revisit score: 0 where features "
        "only stay or drift away, 1 where all are lost and come back",
    ]
    for network in networks:
        lines += ["", network.label]
        if network.loss == network.loss:
            lines.append(f"  loss {network.loss:.4f}, top-1 {network.accuracy:.2%}")
        for kind, names in network.layers.items():
            score = "needs 3 layers or more"
            if len(names) > 2:
                cka, cosine = network.cka[kind], network.cosine[kind]
                score = f"{revisit_score(cka):.3f} by CKA, {revisit_score(cosine):.3f} by cosine"
            rank = statistics.mean(network.rank[kind].tolist())
            lines.append(
                f"  {len(names)} {KINDS[kind]}: revisit score {score}; mean effective rank "
                f"{rank:.1f}"
            )
        if network.importance:
            ranked = sorted(network.importance.items(), key=lambda item: -item[1][0])
            shown = "; ".join(f"{p} {v[0] - network.loss:+.4f}" for p, v in ranked[:3])
            lines.append(f"  paths whose loss matters most: {shown}")
            shown = "; ".join(f"{p} {v[0] - network.loss:+.4f}" for p, v in ranked[-3:])
            lines.append(f"  paths that matter least: {shown}")
        if network.skipped:
            lines.append(
                f"  not a feature per image, left out: {', '.join(sorted(network.skipped))}"
            )
    return "\n".join(lines) + "\n"
