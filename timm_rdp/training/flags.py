"""The command line of timm's training script, flag by flag, with timm's names and defaults."""

import argparse
from collections.abc import Callable

from timm.loss import LOSS_TYPES
from timm.utils.misc import ParseKwargs

from timm_rdp.args import Parser, add_rdp_args, number, show_defaults

INT, FLOAT = number(int), number(float)
COUNT = number(int, "of at least 1", lambda x: x >= 1)
INDEX = number(int, "of at least 0", lambda x: x >= 0)
SEED = number(int, "between 0 and 4294967295", lambda x: 0 <= x < 2**32)
AMOUNT = number(float, "of at least 0", lambda x: x >= 0)
POSITIVE = number(float, "above 0", lambda x: x > 0)
SHARE = number(float, "between 0 and 1", lambda x: 0 <= x <= 1)
RATE = number(float, "of at least 0 and below 1", lambda x: 0 <= x < 1)

TASKS = ("classification", "multilabel")
RESIZE = ("", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
SCHEDULES = (
    "cosine", "tanh", "step", "multistep", "poly", "plateau", "wsd", "rsqrt", "constant", "none",
)  # fmt: skip


class KeyValues(ParseKwargs):
    """timm's key=value ... arguments, with a complaint where a value is no such pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
        except Exception:
            message = f"takes key=value ..., got {' '.join(values)!r}"
            raise argparse.ArgumentError(self, message) from None


def build_parser() -> Parser:
    """Return the parser: every flag of timm's training script, and the --rdp group.

    `parse_args` of the parser raises UsageError where argparse would print its usage.
    """
    parser = Parser(
        prog="timm-rdp train",
        description="Train any timm model, with or without ResidualDroppath (arXiv 2411.09475), by "
        "the flags of timm's own script. Without data it trains on a demo, handwritten digits.",
    )
    add = parser.add_argument
    add("-c", "--config", default="", metavar="FILE", help="YAML file of flags, or a recipe")
    add("data", nargs="?", metavar="DIR", help="the same as --data-dir DIR")
    add_rdp_args(parser)
    for title, add_flags in _GROUPS.items():
        add_flags(parser.add_argument_group(title).add_argument)
    return show_defaults(parser)


def flag(name: str) -> str:
    """Return the flag of an option's name."""
    return "--local_rank" if name == "local_rank" else f"--{name.replace('_', '-')}"


# One flag reads best on one or two lines here.
# fmt: off

def _data(add: Callable) -> None:
    add("--task", default="classification", choices=TASKS, help="one class an image, or several")
    add("--data-dir", metavar="DIR", help="folder of train and validation folders, or .tar of such")
    add("--dataset", default="", help="torch/, tfds/, wds/, hfds/ or hfids/ and a data set's name")
    add("--train-split", default="train", help="split to train on")
    add("--val-split", default="validation", help="split to validate on; '' for none")
    add("--train-num-samples", type=COUNT, help="where the data set cannot tell")
    add("--val-num-samples", type=COUNT, help="where the data set cannot tell")
    add("--dataset-download", action="store_true", help="let torch/ and tfds/ download themselves")
    add("--class-map", default="", metavar="FILE", help="text file of class names, in order")
    add("--input-img-mode", help="PIL mode of images (default: RGB, or L for one channel)")
    add("--input-key", help="the data set's key of images")
    add("--target-key", help="the data set's key of labels; several for multilabel: a,b/c,d")
    add("--target-format", choices=("indices", "multihot"),
        help="multilabel: lists of class indices (the default), or vectors of 0 and 1")
    add("--dataset-trust-remote-code", action="store_true", help="let hfds/ data run its own code")
    add("--train-img-sizes", type=INT, nargs="+", help="image sizes to draw from, batch by batch")
    add("--train-batch-sizes", type=INT, nargs="+", help="for each of them (default: --batch-size)")
    add("--train-size-probs", type=FLOAT, nargs="+", help="weight of each (default: equal)")
    add("--train-size-schedule", default="constant", choices=("constant", "progressive"),
        help="progressive moves from the first size to the last")
    add("--train-size-schedule-spread", type=FLOAT, default=0.65, help="progressive: its spread")
    add("--train-size-random-mix", type=SHARE, default=0.1, help="progressive: batches of any size")
    add("--train-batches-per-epoch", "--train-steps-per-epoch", type=COUNT,
        help="batches per epoch (default: from the data)")
    add("--variable-batch-loss-scale", default="none", choices=("none", "sqrt", "linear"),
        help="scale of the loss with the batch size")
    add("--naflex-loader", action="store_true", help="patch sequences, for NaFlex models")
    add("--naflex-train-seq-lens", type=INT, nargs="+", default=[128, 256, 576, 784, 1024],
        help="sequence lengths to train with")
    add("--naflex-max-seq-len", type=COUNT, default=576, help="sequence length of validation")
    add("--naflex-patch-sizes", type=INT, nargs="+", help="patch sizes to draw from")
    add("--naflex-patch-size-probs", type=FLOAT, nargs="+", help="of each (default: equal)")
    add("--naflex-loss-scale", default="linear", choices=("none", "sqrt", "linear"), help="by size")
    add("--naflex-patchify-channels-first", action="store_true", help="channels first in patches")


def _model(add: Callable) -> None:
    add("--model", default="resnet50", help="timm model, or hf-hub:ID, or local-dir:FOLDER")
    add("--pretrained", action="store_true", help="start from pretrained weights")
    add("--pretrained-path", metavar="FILE", help="pretrained weights; the head is adapted")
    add("--pretrained-cfg-overlay", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="other entries of the pretrained model's configuration")
    add("--initial-checkpoint", default="", metavar="FILE", help="weights to load, of this model")
    add("--resume", default="", metavar="FILE", help="continue from this checkpoint, exactly where "
        "it was written; auto: from the newest good one in --output/--experiment, if there is one")
    add("--no-resume-opt", action="store_true", help="--resume: leave the optimizer state out")
    add("--num-classes", type=COUNT, help="number of classes (default: the model's)")
    add("--gp", help="global pooling: fast, avg, max, avgmax, catavgmax")
    add("--img-size", type=COUNT, help="image height and width in pixels")
    add("--in-chans", type=COUNT, help="image channels (default: 3)")
    add("--input-size", type=COUNT, nargs=3, help="image channels, height and width")
    add("--crop-pct", type=POSITIVE, help="share of the image kept by validation's crop")
    add("--mean", type=FLOAT, nargs="+", help="mean pixel value, per channel")
    add("--std", type=FLOAT, nargs="+", help="standard deviation, per channel")
    add("--interpolation", default="", choices=RESIZE, help="resize (default: the model's)")
    add("-b", "--batch-size", type=COUNT, default=128, help="images per batch and process")
    add("-vb", "--validation-batch-size", type=COUNT, help="default: --batch-size")
    add("--channels-last", action="store_true", help="channels-last memory layout")
    add("--fuser", default="", choices=("", "te", "old", "legacy", "nvfuser", "nvf"),
        help="TorchScript fuser")
    add("--grad-accum-steps", type=INT, default=1, help="batches whose gradients make one update")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--fast-norm", action="store_true", help="normalisation layers in the AMP dtype")
    add("--model-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="further arguments of the model")
    add("--head-init-scale", type=FLOAT, help="scale of the classifier's initial weights")
    add("--head-init-bias", type=FLOAT, help="the classifier's initial bias")
    add("--torchcompile-mode", help="torch.compile mode")
    add("--torchscript", action="store_true", help="compile the model with torch.jit.script")
    add("--torchcompile", nargs="?", const="inductor", help="with this backend (default: inductor)")
    add("--kd-model-name", help="teacher: a pretrained timm model, or local-dir:FOLDER")
    add("--kd-distill-type", default="logit", choices=("logit", "feature", "token"),
        help="what the student imitates")
    add("--kd-loss-type", default="kl", choices=("kl",), help="loss between logits")
    add("--distill-loss-weight", type=FLOAT, help="weight of the teacher's loss")
    add("--task-loss-weight", type=FLOAT, help="weight of the labels' loss")
    add("--kd-temperature", type=POSITIVE, default=4.0, help="softmax temperature")
    add("--kd-student-feature-dim", type=INT, help="default: asked of the model")
    add("--kd-teacher-feature-dim", type=INT, help="default: asked of the model")
    add("--kd-token-distill-type", default="soft", choices=("soft", "hard"), help="its targets")


def _optimizer(add: Callable) -> None:
    add("--opt", default="sgd", help="timm optimizer")
    add("--opt-eps", type=AMOUNT, help="epsilon (default: the optimizer's)")
    add("--opt-betas", type=FLOAT, nargs="+", help="betas (default: the optimizer's)")
    add("--momentum", type=AMOUNT, default=0.9, help="momentum")
    add("--weight-decay", type=AMOUNT, default=2e-5, help="weight decay")
    add("--clip-grad", type=AMOUNT, help="clip gradients at N (default: no clipping)")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="what N limits")
    add("--layer-decay", type=AMOUNT, help="learning rate factor from one layer to the one below")
    add("--layer-decay-min-scale", type=FLOAT, default=0, help="smallest factor it may give")
    add("--layer-decay-no-opt-scale", type=FLOAT, help="layers of a smaller factor do not train")
    add("--opt-kwargs", nargs="*", default={}, action=KeyValues, metavar="KEY=VALUE",
        help="further arguments of the optimizer")


def _schedule(add: Callable) -> None:
    add("--sched", default="cosine", choices=SCHEDULES, help="schedule of the learning rate")
    add("--sched-on-updates", action="store_true", help="advance it at every update, not epoch")
    add("--lr", type=AMOUNT, help="learning rate (default: from --lr-base)")
    add("--lr-base", type=AMOUNT, default=0.1, help="learning rate for a batch of --lr-base-size")
    add("--lr-base-size", type=COUNT, default=256, help="the batch that --lr-base is for")
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"), help="default: by --opt")
    add("--lr-noise", type=FLOAT, nargs="+", help="noise: from and to, as shares of the epochs")
    add("--lr-noise-pct", type=FLOAT, default=0.67, help="limit of that noise")
    add("--lr-noise-std", type=FLOAT, default=1.0, help="standard deviation of that noise")
    add("--lr-cycle-mul", type=FLOAT, default=1.0, help="growth of a cycle's length")
    add("--lr-cycle-decay", type=FLOAT, default=0.5, help="factor of each further cycle")
    add("--lr-cycle-limit", type=INT, default=1, help="cycles")
    add("--lr-k-decay", type=FLOAT, default=1.0, help="k of k-decay for cosine and poly")
    add("--warmup-lr", type=AMOUNT, default=1e-5, help="learning rate at the start of the warmup")
    add("--min-lr", type=AMOUNT, default=0, help="lowest learning rate")
    add("--epochs", type=COUNT, default=300, help="epochs")
    add("--epoch-repeats", type=AMOUNT, default=0.0, help="iterable data set: passes per epoch")
    add("--start-epoch", type=INDEX, help="first epoch, also when resuming")
    add("--decay-milestones", type=INT, nargs="+", default=[90, 180, 270], help="multistep: epochs")
    add("--stop-epoch", type=INT, help="end after N epochs, with the schedule of all of them")
    add("--decay-epochs", type=POSITIVE, help="step: epochs between decays (default: 90); wsd, "
        "rsqrt: epochs of the decay, below 1 a share of all (default: 0.2)")
    add("--lr-decay-fn", help="wsd, rsqrt: shape of the decay, such as 1-sqrt or linear")
    add("--lr-stable-timescale", type=POSITIVE, help="rsqrt: in epochs (default: --warmup-epochs)")
    add("--warmup-epochs", type=INDEX, default=5, help="warmup epochs")
    add("--warmup-prefix", action="store_true", help="the warmup comes on top of --epochs")
    add("--cooldown-epochs", type=INDEX, default=0, help="epochs at the lowest rate at the end")
    add("--patience-epochs", type=INDEX, default=10, help="plateau: epochs before a decay")
    add("--decay-rate", "--dr", type=AMOUNT, default=0.1, help="factor of a decay, power of poly")


def _augmentation(add: Callable) -> None:
    add("--no-aug", action="store_true", help="no training augmentation at all")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="random crop (default: rrc)")
    add("--scale", type=FLOAT, nargs="+", default=[0.08, 1.0], help="random crop: part of the area")
    add("--ratio", type=FLOAT, nargs="+", default=[3 / 4, 4 / 3], help="random crop: aspect ratios")
    add("--hflip", type=SHARE, default=0.5, help="probability of a horizontal flip")
    add("--vflip", type=SHARE, default=0.0, help="probability of a vertical flip")
    add("--color-jitter", type=AMOUNT, default=0.4, help="strength of colour jitter")
    add("--color-jitter-prob", type=SHARE, help="probability of colour jitter")
    add("--grayscale-prob", type=SHARE, help="probability of greyscale")
    add("--gaussian-blur-prob", type=SHARE, help="probability of a Gaussian blur")
    add("--aa", help="AutoAugment, RandAugment, AugMix: original, 3a, rand-m9-mstd0.5, augmix-m5")
    add("--aug-repeats", type=AMOUNT, default=0, help="distributed: times that each image comes")
    add("--aug-splits", type=INDEX, default=0, help="versions of each image, the first one clean")
    add("--reprob", type=SHARE, default=0.0, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erases")
    add("--recount", type=COUNT, default=1, help="areas erased at most")
    add("--resplit", action="store_true", help="no random erasing in the first, clean split")
    add("--mixup", type=AMOUNT, default=0.0, help="mixup alpha, 0 for none")
    add("--cutmix", type=AMOUNT, default=0.0, help="cutmix alpha, 0 for none")
    add("--cutmix-minmax", type=FLOAT, nargs="+", help="cutmix by side ratio, from to")
    add("--mixup-prob", type=SHARE, default=1.0, help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=SHARE, default=0.5, help="cutmix's part where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem", "half"), help="mix per")
    add("--mixup-off-epoch", type=INDEX, default=0, help="epoch from which mixup is off, 0: never")
    add("--train-interpolation", default="random", choices=(*RESIZE, "random"), help="resize")


def _loss(add: Callable) -> None:
    add("--loss", choices=LOSS_TYPES, help="default: ce, or bce with --task multilabel")
    add("--smoothing", type=RATE, help="label smoothing (default: 0.1, multilabel: 0)")
    add("--class-stats", metavar="FILE", help="JSON file of images per class, for db and weights")
    add("--loss-pos-weight", help="bce, asl: of positive targets: neg_pos, N, N,N,... or a file")
    add("--loss-class-weight", help="bce, asl: inv_freq, effective_num, N, N,N,... or a file")
    add("--loss-weight-power", type=FLOAT, default=1.0, help="exponent of weights by frequency")
    add("--loss-weight-beta", type=FLOAT, default=0.999, help="beta of effective_num")
    add("--loss-weight-max", type=FLOAT, help="largest weight from --class-stats")
    add("--bce-sum", action="store_true", help="bce: sum over classes")
    add("--bce-target-thresh", type=FLOAT, help="bce: targets above N become 1")
    add("--asl-gamma-pos", type=FLOAT, default=1.0, help="asl: focusing on positive targets")
    add("--asl-gamma-neg", type=FLOAT, default=4.0, help="asl: focusing on negative targets")
    add("--asl-clip", type=FLOAT, default=0.05, help="multilabel asl: margin of negative targets")
    add("--asl-reduction", default="batchmean", choices=("batchmean", "sum", "mean"), help="of asl")
    add("--poly-epsilon", type=FLOAT, default=2.0, help="poly: coefficient")
    add("--poly-gamma", type=FLOAT, default=0.0, help="multilabel poly: focal gamma")
    add("--poly-alpha", type=FLOAT, help="multilabel poly: balance of positive targets")
    add("--twoway-tp", type=FLOAT, default=4.0, help="twoway: temperature of positive logits")
    add("--twoway-tn", type=FLOAT, default=1.0, help="twoway: temperature of negative logits")
    add("--db-neg-scale", type=FLOAT, default=2.0, help="db: scale of negative logits")
    add("--db-init-bias", type=FLOAT, default=0.05, help="db: shift of logits by class frequency")
    add("--db-focal-gamma", type=FLOAT, default=2.0, help="db: focusing")
    add("--bce-loss", action="store_true", help="former name of --loss bce")
    add("--jsd-loss", action="store_true", help="former name of --loss jsd, for --aug-splits")
    add("--bce-pos-weight", type=AMOUNT, help="former name of --loss-pos-weight")


def _regularization(add: Callable) -> None:
    add("--drop", type=RATE, default=0.0, help="dropout rate")
    add("--drop-connect", type=FLOAT, help="timm's former name of --drop-path")
    add("--drop-path", type=RATE, help="stochastic depth (default: the model's, 0.1 with --rdp)")
    add("--drop-path-schedule", choices=("constant", "early", "late"), default="constant",
        help="early, late: stochastic depth in the first or second half of the epochs only")
    add("--drop-block", type=RATE, help="DropBlock rate")
    add("--bn-momentum", type=FLOAT, help="BatchNorm momentum, where the model takes one")
    add("--bn-eps", type=POSITIVE, help="BatchNorm epsilon, where the model takes one")
    add("--sync-bn", action="store_true", help="distributed: BatchNorm over all processes")
    add("--dist-bn", default="reduce", choices=("", "broadcast", "reduce"),
        help="distributed: what is done with BatchNorm statistics after each epoch")
    add("--split-bn", action="store_true", help="BatchNorm statistics for each of --aug-splits")
    add("--model-ema", action="store_true", help="keep and validate an average of the weights")
    add("--model-ema-force-cpu", action="store_true", help="keep it on the CPU, unvalidated")
    add("--model-ema-decay", type=SHARE, default=0.9998, help="decay of the average")
    add("--model-ema-warmup", action="store_true", help="warm the decay up")


def _run(add: Callable) -> None:
    add("--seed", type=SEED, default=42, help="random seed")
    add("--data-seed", type=INT, help="own random stream of the data's order and augmentation")
    add("--worker-seeding", default="all", choices=("all", "part"), help="in loader workers")
    add("--log-interval", type=COUNT, default=50, help="updates between log lines")
    add("--val-interval", type=COUNT, default=1, help="epochs between validations and checkpoints")
    add("--recovery-interval", type=INDEX, default=0, help="updates between recovery checkpoints")
    add("--checkpoint-hist", type=COUNT, default=10, help="checkpoints to keep")
    add("-j", "--workers", type=INDEX, default=4, help="loader processes")
    add("--persistent-workers", action="store_true", default=True, help="keep them (default: True)")
    add("--no-persistent-workers", dest="persistent_workers", action="store_false",
        help="start them anew in each epoch")
    add("--save-images", action="store_true", help="save the batch at every log line as an image")
    add("--pin-mem", action="store_true", help="load into page-locked memory")
    add("--no-prefetcher", action="store_true", help="normalise images in the loader processes")
    add("--output", default="", metavar="DIR", help="folder of all runs (default: output/train)")
    add("--experiment", default="", help="folder in it (default: time, model and image size)")
    add("--save-epochs", type=INT, nargs="+", help="epochs after which milestone-N is kept")
    add("--eval-metric", help="ranks checkpoints (default: top1, multilabel: map)")
    add("--multilabel-threshold", type=FLOAT, default=0.5, help="probability of a yes, for F1")
    add("--tta", type=INDEX, default=0, help="test-time augmentation: outputs averaged per image")
    add("--use-multi-epochs-loader", action="store_true", help="keep loader processes")
    add("--log-wandb", action="store_true", help="log to Weights & Biases")
    add("--wandb-project", help="project there")
    add("--wandb-tags", nargs="+", default=[], help="tags there")
    add("--wandb-resume-id", default="", help="run there to continue, with --resume")
    add("--device", help="cuda, mps, xpu, npu, cpu, ... (default: the best there is)")
    add("--amp", action="store_true", help="automatic mixed precision")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="its dtype")
    add("--model-dtype", choices=("float32", "float16", "bfloat16"), help="dtype without AMP")
    add("--no-ddp-bb", action="store_true", help="distributed: buffers are not broadcast")
    add("--synchronize-step", action="store_true", help="wait for the device after each update")
    add("--local_rank", type=INT, default=0, help="set by old launchers; not used")
    add("--device-modules", nargs="+", help="Python modules to import first, for device plugins")

# fmt: on


_GROUPS: dict[str, Callable[[Callable], None]] = {
    "data, scheduled image sizes and NaFlex": _data,
    "model and distillation": _model,
    "optimizer": _optimizer,
    "learning rate and epochs": _schedule,
    "augmentation": _augmentation,
    "loss": _loss,
    "regularization, batch norm and moving average of weights": _regularization,
    "device, run and outputs": _run,
}
