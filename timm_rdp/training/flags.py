"""The command line of timm's training script, flag by flag, with timm's names and defaults."""

import argparse

from timm.utils import ParseKwargs

from timm_rdp import add_rdp_args
from timm_rdp.errors import UsageError, nearest


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage text."""

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [f for action in self._actions for f in action.option_strings]
            close = nearest(unknown.split(" ")[0].split("=")[0], flags)
            raise UsageError(f"unknown flag or argument: {unknown!r}{close or ' (see --help)'}")
        raise UsageError(f"{message.removeprefix('argument ')} (see --help)")


class _KeyValues(ParseKwargs):
    """timm's key=value ... arguments, with a complaint where a value is no such pair."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            super().__call__(parser, namespace, values, option_string)
        except Exception:
            message = f"takes key=value ..., got {' '.join(values)!r}"
            raise argparse.ArgumentError(self, message) from None


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: every flag of timm's training script, and the --rdp group.

    `parse_args` of the parser raises UsageError where argparse would print its usage.
    """
    parser = _Parser(
        prog="timm-rdp train",
        description="Train any timm model, with or without ResidualDroppath (arXiv 2411.09475). "
        "Takes every flag of timm's own training script. Without data it trains on a small demo, "
        "handwritten digits.",
    )
    parser.add_argument(
        "-c", "--config", type=str, default="", metavar="FILE",
        help="YAML file of flags (names with underscores); the command line overrides it",
    )  # fmt: skip
    add_rdp_args(parser)
    for add in (
        _add_data,
        _add_model,
        _add_device,
        _add_optimizer,
        _add_schedule,
        _add_augmentation,
        _add_regularization,
        _add_batch_norm,
        _add_ema,
        _add_run,
        _add_scheduled_sizes,
        _add_naflex,
        _add_distillation,
    ):
        add(parser)
    return parser


# One flag reads best on one or two lines here.
# fmt: off

def _add_data(parser):
    parser.add_argument("data", nargs="?", metavar="DIR",
                        help="the data folder; --data-dir says the same and is preferred")
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="folder with a training and a validation folder, "
        "each of one folder of images per class (or a .tar of such)")
    add("--dataset", default="", metavar="NAME", help="type/name of a data set that is not a plain "
        "folder: torch/, tfds/, wds/, hfds/, hfids/")
    add("--train-split", default="train", metavar="NAME", help="split to train on")
    add("--val-split", default="validation", metavar="NAME",
        help="split to validate on; empty for none")
    add("--train-num-samples", type=int, metavar="N",
        help="training samples of a data set that cannot tell")
    add("--val-num-samples", type=int, metavar="N",
        help="validation samples of a data set that cannot tell")
    add("--dataset-download", action="store_true", default=False,
        help="let torch/ and tfds/ data sets download themselves")
    add("--class-map", type=str, default="", metavar="FILE",
        help="text file that maps class names to indices")
    add("--input-img-mode", type=str, metavar="MODE",
        help="PIL mode that images are converted to (default: RGB, or L for one channel)")
    add("--input-key", type=str, metavar="KEY", help="the data set's key of images")
    add("--target-key", type=str, metavar="KEY", help="the data set's key of labels")
    add("--dataset-trust-remote-code", action="store_true", default=False,
        help="let a Hugging Face data set run code of its own")


def _add_model(parser):
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", type=str, default="resnet50", metavar="NAME",
        help="timm model name, or hf-hub:ID, or local-dir:FOLDER (default: resnet50)")
    add("--pretrained", action="store_true", default=False, help="start from pretrained weights")
    add("--pretrained-path", type=str, metavar="FILE",
        help="take this file as the pretrained weights; the head is adapted")
    add("--initial-checkpoint", type=str, default="", metavar="FILE",
        help="load these weights into the new model")
    add("--resume", type=str, default="", metavar="FILE",
        help="continue from this checkpoint exactly where it was written; auto: from the newest "
        "good one in --output/--experiment, or from the start where there is none")
    add("--no-resume-opt", action="store_true", default=False,
        help="with --resume: leave the optimizer state out")
    add("--num-classes", type=int, metavar="N", help="number of classes (default: the model's)")
    add("--gp", type=str, metavar="POOL", help="global pooling: fast, avg, max, avgmax, catavgmax")
    add("--img-size", type=int, metavar="N", help="image height and width in pixels")
    add("--in-chans", type=int, metavar="N", help="image channels (default: 3)")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"),
        help="image channels, height and width")
    add("--crop-pct", type=float, metavar="R", help="share of the image kept by validation's crop")
    add("--mean", type=float, nargs="+", metavar="M", help="mean pixel value, per channel")
    add("--std", type=float, nargs="+", metavar="S", help="standard deviation, per channel")
    add("--interpolation", type=str, default="", metavar="NAME",
        help="resize interpolation (default: the model's)")
    add("-b", "--batch-size", type=int, default=128, metavar="N",
        help="images per batch and process (default: 128)")
    add("-vb", "--validation-batch-size", type=int, metavar="N",
        help="images per batch in validation (default: --batch-size)")
    add("--channels-last", action="store_true", default=False, help="channels-last memory layout")
    add("--fuser", type=str, default="", metavar="NAME", help="TorchScript fuser: te, old, nvfuser")
    add("--grad-accum-steps", type=int, default=1, metavar="N",
        help="batches whose gradients make one update (default: 1)")
    add("--grad-checkpointing", action="store_true", default=False,
        help="recompute activations in the backward pass to save memory")
    add("--fast-norm", action="store_true", default=False,
        help="run normalisation layers in the AMP dtype where that is possible")
    add("--model-kwargs", nargs="*", default={}, action=_KeyValues, metavar="KEY=VALUE",
        help="further arguments of the model")
    add("--head-init-scale", type=float, metavar="X", help="scale the classifier's initial weights")
    add("--head-init-bias", type=float, metavar="X", help="the classifier's initial bias")
    add("--torchcompile-mode", type=str, metavar="MODE", help="torch.compile mode")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--torchscript", action="store_true", default=False,
                        help="compile the model with torch.jit.script")
    either.add_argument("--torchcompile", type=str, nargs="?", const="inductor", metavar="BACKEND",
                        help="compile with torch.compile (BACKEND default: inductor)")


def _add_device(parser):
    add = parser.add_argument_group("device and processes").add_argument
    add("--device", type=str, metavar="NAME",
        help="cuda, mps, xpu, npu, cpu, ... (default: the best there is)")
    add("--amp", action="store_true", default=False, help="automatic mixed precision")
    add("--amp-dtype", type=str, default="float16", metavar="DTYPE",
        help="float16 or bfloat16 (default: float16)")
    add("--model-dtype", type=str, metavar="DTYPE",
        help="dtype of weights without AMP: float32, float16, bfloat16 (default: float32)")
    add("--no-ddp-bb", action="store_true", default=False,
        help="distributed: do not broadcast buffers at each forward")
    add("--synchronize-step", action="store_true", default=False,
        help="wait for the device after each update")
    add("--local_rank", type=int, default=0, metavar="N", help="set by old launchers; not used")
    add("--device-modules", type=str, nargs="+", metavar="MODULE",
        help="Python modules to import first, for devices that come as plugins")


def _add_optimizer(parser):
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", type=str, default="sgd", metavar="NAME", help="timm optimizer (default: sgd)")
    add("--opt-eps", type=float, metavar="X", help="epsilon (default: the optimizer's)")
    add("--opt-betas", type=float, nargs="+", metavar="B", help="betas (default: the optimizer's)")
    add("--momentum", type=float, default=0.9, metavar="M", help="momentum (default: 0.9)")
    add("--weight-decay", type=float, default=2e-5, metavar="W",
        help="weight decay (default: 2e-5)")
    add("--clip-grad", type=float, metavar="X", help="clip gradients at X (default: no clipping)")
    add("--clip-mode", type=str, default="norm", metavar="MODE",
        help="what X limits: norm, value or agc (default: norm)")
    add("--layer-decay", type=float, metavar="R",
        help="learning rate factor from one layer to the one below")
    add("--layer-decay-min-scale", type=float, default=0, metavar="R",
        help="smallest factor that layer decay may give (default: 0)")
    add("--layer-decay-no-opt-scale", type=float, metavar="R",
        help="layers whose factor is below R are not trained")
    add("--opt-kwargs", nargs="*", default={}, action=_KeyValues, metavar="KEY=VALUE",
        help="further arguments of the optimizer")


def _add_schedule(parser):
    add = parser.add_argument_group("learning rate and epochs").add_argument
    add("--sched", type=str, default="cosine", metavar="NAME",
        help="cosine, tanh, step, multistep, poly, plateau, wsd, rsqrt, constant, none "
        "(default: cosine)")
    add("--sched-on-updates", action="store_true", default=False,
        help="advance the schedule at every update, not at every epoch")
    add("--lr", type=float, metavar="LR", help="learning rate (default: from --lr-base)")
    add("--lr-base", type=float, default=0.1, metavar="LR",
        help="learning rate for a batch of --lr-base-size, scaled to the global batch "
        "(default: 0.1)")
    add("--lr-base-size", type=int, default=256, metavar="N",
        help="the batch that --lr-base is for (default: 256)")
    add("--lr-base-scale", type=str, default="", metavar="HOW",
        help="linear or sqrt (default: sqrt for Ada* and LAMB, else linear)")
    add("--lr-noise", type=float, nargs="+", metavar="R",
        help="learning rate noise: from and to, as shares of the epochs")
    add("--lr-noise-pct", type=float, default=0.67, metavar="R", help="limit of that noise")
    add("--lr-noise-std", type=float, default=1.0, metavar="S",
        help="standard deviation of that noise")
    add("--lr-cycle-mul", type=float, default=1.0, metavar="R",
        help="growth of a cycle's length (default: 1)")
    add("--lr-cycle-decay", type=float, default=0.5, metavar="R",
        help="learning rate factor of each further cycle (default: 0.5)")
    add("--lr-cycle-limit", type=int, default=1, metavar="N", help="cycles (default: 1)")
    add("--lr-k-decay", type=float, default=1.0, metavar="K",
        help="k of k-decay for cosine and poly (default: 1)")
    add("--warmup-lr", type=float, default=1e-5, metavar="LR",
        help="learning rate at the start of the warmup (default: 1e-5)")
    add("--min-lr", type=float, default=0, metavar="LR", help="lowest learning rate (default: 0)")
    add("--epochs", type=int, default=300, metavar="N", help="epochs (default: 300)")
    add("--epoch-repeats", type=float, default=0.0, metavar="R",
        help="passes over an iterable data set that count as one epoch")
    add("--start-epoch", type=int, metavar="N", help="first epoch, also when resuming")
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], metavar="N",
        help="multistep: epochs at which the rate decays (default: 90 180 270)")
    add("--decay-epochs", type=float, default=90, metavar="N",
        help="step: epochs between decays (default: 90)")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="warmup epochs (default: 5)")
    add("--warmup-prefix", action="store_true", default=False,
        help="the warmup comes on top of --epochs")
    add("--cooldown-epochs", type=int, default=0, metavar="N",
        help="epochs at the lowest rate after the schedule (default: 0)")
    add("--patience-epochs", type=int, default=10, metavar="N",
        help="plateau: epochs without improvement before a decay (default: 10)")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="R",
        help="factor of one decay; poly: the power (default: 0.1)")


def _add_augmentation(parser):
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action="store_true", default=False, help="no training augmentation at all")
    add("--train-crop-mode", type=str, metavar="MODE", help="rrc, rkrc or rkrr (default: rrc)")
    add("--scale", type=float, nargs="+", default=[0.08, 1.0], metavar="R",
        help="random resized crop: smallest and largest area (default: 0.08 1)")
    add("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3], metavar="R",
        help="random resized crop: aspect ratios (default: 0.75 1.33)")
    add("--hflip", type=float, default=0.5, metavar="P",
        help="probability of a horizontal flip (default: 0.5)")
    add("--vflip", type=float, default=0.0, metavar="P",
        help="probability of a vertical flip (default: 0)")
    add("--color-jitter", type=float, default=0.4, metavar="X",
        help="strength of colour jitter (default: 0.4)")
    add("--color-jitter-prob", type=float, metavar="P", help="probability of colour jitter")
    add("--grayscale-prob", type=float, metavar="P", help="probability of greyscale")
    add("--gaussian-blur-prob", type=float, metavar="P", help="probability of a Gaussian blur")
    add("--aa", type=str, metavar="POLICY",
        help="AutoAugment, RandAugment, AugMix: v0, original, 3a, rand-m9-mstd0.5, augmix-m5, ...")
    add("--aug-repeats", type=float, default=0, metavar="N",
        help="distributed: times that each image comes, augmented anew (default: 0)")
    add("--aug-splits", type=int, default=0, metavar="N",
        help="versions of each image, the first one clean: 0, or 2 and more (default: 0)")
    add("--jsd-loss", action="store_true", default=False,
        help="Jensen-Shannon consistency loss between --aug-splits")
    add("--bce-loss", action="store_true", default=False, help="binary cross entropy")
    add("--bce-sum", action="store_true", default=False, help="BCE: sum over classes")
    add("--bce-target-thresh", type=float, metavar="X", help="BCE: targets above X become 1")
    add("--bce-pos-weight", type=float, metavar="X", help="BCE: weight of positive targets")
    add("--reprob", type=float, default=0.0, metavar="P",
        help="probability of random erasing (default: 0)")
    add("--remode", type=str, default="pixel", metavar="MODE",
        help="what erases: const, rand or pixel (default: pixel)")
    add("--recount", type=int, default=1, metavar="N", help="areas erased at most (default: 1)")
    add("--resplit", action="store_true", default=False,
        help="no random erasing in the first, clean split")
    add("--mixup", type=float, default=0.0, metavar="A", help="mixup alpha (default: 0, off)")
    add("--cutmix", type=float, default=0.0, metavar="A", help="cutmix alpha (default: 0, off)")
    add("--cutmix-minmax", type=float, nargs="+", metavar="R",
        help="cutmix by smallest and largest side ratio instead of alpha")
    add("--mixup-prob", type=float, default=1.0, metavar="P",
        help="probability of mixup or cutmix where either is on (default: 1)")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P",
        help="probability of cutmix where both are on (default: 0.5)")
    add("--mixup-mode", type=str, default="batch", metavar="MODE",
        help="mix per batch, pair, elem or half (default: batch)")
    add("--mixup-off-epoch", type=int, default=0, metavar="N",
        help="epoch from which mixup is off (default: 0, never)")
    add("--train-interpolation", type=str, default="random", metavar="NAME",
        help="training resize: random, bilinear, bicubic (default: random)")


def _add_regularization(parser):
    add = parser.add_argument_group("regularization").add_argument
    add("--smoothing", type=float, default=0.1, metavar="X", help="label smoothing (default: 0.1)")
    add("--drop", type=float, default=0.0, metavar="P", help="dropout rate (default: 0)")
    add("--drop-connect", type=float, metavar="P", help="timm's former name of --drop-path")
    add("--drop-path", type=float, metavar="P",
        help="stochastic depth rate (default: the model's, 0.1 with --rdp)")
    add("--drop-block", type=float, metavar="P", help="DropBlock rate")


def _add_batch_norm(parser):
    add = parser.add_argument_group("batch norm").add_argument
    add("--bn-momentum", type=float, metavar="M", help="momentum, where the model takes one")
    add("--bn-eps", type=float, metavar="X", help="epsilon, where the model takes one")
    add("--sync-bn", action="store_true", default=False,
        help="distributed: statistics over all processes")
    add("--dist-bn", type=str, default="reduce", metavar="HOW",
        help="distributed: after each epoch broadcast or reduce the statistics, or '' "
        "(default: reduce)")
    add("--split-bn", action="store_true", default=False,
        help="statistics of their own for each of --aug-splits")


def _add_ema(parser):
    add = parser.add_argument_group("moving average of weights").add_argument
    add("--model-ema", action="store_true", default=False, help="keep and validate the average")
    add("--model-ema-force-cpu", action="store_true", default=False,
        help="keep it on the CPU, without validation")
    add("--model-ema-decay", type=float, default=0.9998, metavar="R",
        help="decay (default: 0.9998)")
    add("--model-ema-warmup", action="store_true", default=False, help="warm the decay up")


def _add_run(parser):
    add = parser.add_argument_group("run and outputs").add_argument
    add("--seed", type=int, default=42, metavar="N", help="random seed (default: 42)")
    add("--data-seed", type=int, metavar="N",
        help="draw the order and augmentation of the data from a random stream of their own, so "
        "that runs of other models or drop rates see the same data (default: timm's one stream)")
    add("--worker-seeding", type=str, default="all", metavar="MODE",
        help="what is seeded in loader workers: all or part (default: all)")
    add("--log-interval", type=int, default=50, metavar="N",
        help="updates between log lines (default: 50)")
    add("--val-interval", type=int, default=1, metavar="N",
        help="epochs between validations and checkpoints (default: 1)")
    add("--recovery-interval", type=int, default=0, metavar="N",
        help="updates between recovery checkpoints (default: 0, none)")
    add("--checkpoint-hist", type=int, default=10, metavar="N",
        help="checkpoints to keep (default: 10)")
    add("-j", "--workers", type=int, default=4, metavar="N", help="loader processes (default: 4)")
    add("--save-images", action="store_true", default=False,
        help="save the batch at every log line as an image")
    add("--pin-mem", action="store_true", default=False, help="load into page-locked memory")
    add("--no-prefetcher", action="store_true", default=False,
        help="normalise images in the loader workers, not on the device")
    add("--output", type=str, default="", metavar="DIR",
        help="folder of all runs (default: output/train)")
    add("--experiment", type=str, default="", metavar="NAME",
        help="folder of this run in it (default: time, model and image size)")
    add("--eval-metric", type=str, default="top1", metavar="NAME",
        help="what the best checkpoint is best in: top1, top5 or loss (default: top1)")
    add("--tta", type=int, default=0, metavar="N",
        help="test-time augmentation: outputs averaged per image (default: 0)")
    add("--use-multi-epochs-loader", action="store_true", default=False,
        help="keep the loader's processes between epochs")
    add("--log-wandb", action="store_true", default=False, help="log to Weights & Biases")
    add("--wandb-project", type=str, metavar="NAME", help="project there")
    add("--wandb-tags", type=str, nargs="+", default=[], metavar="TAG", help="tags there")
    add("--wandb-resume-id", type=str, default="", metavar="ID",
        help="run there to continue, with --resume")


def _add_scheduled_sizes(parser):
    add = parser.add_argument_group("scheduled image sizes").add_argument
    add("--train-img-sizes", type=int, nargs="+", metavar="N",
        help="image sizes to draw from, batch by batch")
    add("--train-batch-sizes", type=int, nargs="+", metavar="N",
        help="batch size for each of them (default: --batch-size)")
    add("--train-size-probs", type=float, nargs="+", metavar="P",
        help="weight of each of them (default: equal)")
    add("--train-size-schedule", type=str, default="constant", choices=("constant", "progressive"),
        help="progressive moves from the first size to the last (default: constant)")
    add("--train-size-schedule-spread", type=float, default=0.65, metavar="S",
        help="progressive: spread over neighbouring sizes (default: 0.65)")
    add("--train-size-random-mix", type=float, default=0.1, metavar="R",
        help="progressive: share of batches of any size (default: 0.1)")
    add("--train-batches-per-epoch", "--train-steps-per-epoch", type=int, metavar="N",
        help="batches per epoch (default: from the data)")
    add("--variable-batch-loss-scale", type=str, default="none",
        choices=("none", "sqrt", "linear"),
        help="scale of the loss with the batch size (default: none)")


def _add_naflex(parser):
    add = parser.add_argument_group("NaFlex: native aspect ratio").add_argument
    add("--naflex-loader", action="store_true", default=False,
        help="batches of patch sequences, for NaFlex models")
    add("--naflex-train-seq-lens", type=int, nargs="+", default=[128, 256, 576, 784, 1024],
        metavar="N", help="sequence lengths to train with (default: 128 256 576 784 1024)")
    add("--naflex-max-seq-len", type=int, default=576, metavar="N",
        help="sequence length of validation (default: 576)")
    add("--naflex-patch-sizes", type=int, nargs="+", metavar="N", help="patch sizes to draw from")
    add("--naflex-patch-size-probs", type=float, nargs="+", metavar="P",
        help="probability of each (default: equal)")
    add("--naflex-loss-scale", type=str, default="linear", choices=("none", "sqrt", "linear"),
        help="scale of the loss with the batch size (default: linear)")
    add("--naflex-patchify-channels-first", action="store_true", default=False,
        help="lay patches out channels first")


def _add_distillation(parser):
    add = parser.add_argument_group("distillation").add_argument
    add("--kd-model-name", type=str, metavar="NAME",
        help="teacher: a timm model name with pretrained weights, or local-dir:FOLDER")
    add("--kd-distill-type", type=str, default="logit", choices=["logit", "feature", "token"],
        help="what the student imitates (default: logit)")
    add("--kd-loss-type", type=str, default="kl", metavar="NAME", help="kl, the only one there is")
    add("--distill-loss-weight", type=float, metavar="W", help="weight of the teacher's loss")
    add("--task-loss-weight", type=float, metavar="W", help="weight of the labels' loss")
    add("--kd-temperature", type=float, default=4.0, metavar="T",
        help="softmax temperature (default: 4)")
    add("--kd-student-feature-dim", type=int, metavar="N",
        help="student's features (default: asked of the model)")
    add("--kd-teacher-feature-dim", type=int, metavar="N",
        help="teacher's features (default: asked of the model)")
    add("--kd-token-distill-type", type=str, default="soft", choices=["soft", "hard"],
        help="token distillation: soft or hard targets (default: soft)")
