"""Training scripts as people have them, to be launched by the tests; none knows of RDP."""

PLAIN = """
import argparse

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="test_vit")
parser.add_argument("--drop-path", type=float, default=None)
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--updates", type=int, default=8)
parser.add_argument("--resume")
parser.add_argument("--out", required=True)
args = parser.parse_args()

torch.manual_seed(args.seed)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
images = nn.functional.interpolate(images[:64], (32, 32), mode="bilinear").repeat(1, 3, 1, 1)
labels = torch.tensor(digits.target[:64])

model = timm.create_model(
    args.model, img_size=32, num_classes=10, drop_path_rate=args.drop_path
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
first = 0
if args.resume:
    saved = torch.load(args.resume)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["updates"]
model.train()
losses = []
for update in range(first, args.updates):
    some = slice(8 * update % 64, 8 * update % 64 + 8)
    loss = nn.functional.cross_entropy(model(images[some]), labels[some])
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
torch.save(
    dict(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        updates=args.updates,
        losses=losses,
    ),
    args.out,
)
print("done")
"""

TIMM_STYLE = """
import argparse

import torch
from sklearn.datasets import load_digits
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TrainingTask,
)
from timm.utils import dispatch_clip_grad
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--drop-path", type=float)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--distill")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--sched-on-updates", action="store_true")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--start-epoch", type=int, default=0)
    parser.add_argument("--compile")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = nn.functional.interpolate(images[:64], (32, 32), mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target[:64])

    model = create_model(
        "test_vit", img_size=32, num_classes=10, drop_path_rate=args.drop_path
    )
    loss_fn = nn.CrossEntropyLoss()
    teacher = None
    if args.distill:
        teacher = create_model("test_resnet", num_classes=10, drop_path_rate=0.5)
        tasks = dict(logit=LogitDistillationTask, feature=FeatureDistillationTask)
        task = tasks[args.distill](model, teacher, criterion=loss_fn, verbose=False)
    else:
        task = ClassificationTask(model, criterion=loss_fn, verbose=False)
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=1e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    if args.compile:
        task.compile(backend=args.compile)
    updates_per_epoch = 8 // args.accumulate
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step",
        decay_epochs=1,
        num_epochs=args.epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates_per_epoch,
    )
    if args.start_epoch and args.sched_on_updates:
        scheduler.step_update(num_updates=args.start_epoch * updates_per_epoch)
    elif args.start_epoch:
        scheduler.step(args.start_epoch)

    losses, updates = [], args.start_epoch * updates_per_epoch
    for epoch in range(args.start_epoch, args.epochs):
        task.get_trainable_module().train()
        for batch in range(8):
            some = slice(8 * batch, 8 * batch + 8)
            loss = task(images[some], labels[some])["loss"] / args.accumulate
            loss.backward()
            losses.append(loss.item())
            if (batch + 1) % args.accumulate:
                continue
            dispatch_clip_grad(task.get_clip_parameters(), value=0.5, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
            scheduler.step_update(num_updates=updates)
        if hasattr(optimizer, "sync_lookahead"):
            optimizer.sync_lookahead()
        task.get_eval_model().eval()
        with torch.inference_mode():
            accuracy = (task.get_eval_model()(images).argmax(1) == labels).float().mean()
        scheduler.step(epoch + 1, accuracy.item())
    classes = lambda m: sorted({type(x).__name__ for x in m.modules()})
    torch.save(
        dict(
            **task.get_checkpoint_state(),
            **task.get_checkpoint_state(ema=True),
            optimizer=optimizer.state_dict(),
            losses=losses,
            teacher_classes=teacher and classes(teacher),
        ),
        args.out,
    )


main()
"""

DISTRIBUTED = """
import sys
import timm, torch
from torch.nn.parallel import DistributedDataParallel

rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, num_classes=10, drop_path_rate=0.5)
if FIRST == "ddp":
    model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
if FIRST == "optimizer":
    model = DistributedDataParallel(model)
images = torch.randn(2, 4, 3, 32, 32)
for update in range(8):
    model(images[rank]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
torch.save(model.module.state_dict(), sys.argv[1])
"""

DISTRIBUTED_EXPLICIT = DISTRIBUTED.replace(
    "for update in range(8):\n",
    "import timm_rdp\n"
    "rdp = timm_rdp.ResidualDropPath(model, seed=3)\n"
    "for update in range(8):\n"
    "  with rdp.iteration():\n",
)


def with_explicit_cycles(script: str) -> str:
    """TIMM_STYLE with the cycles of ResidualDropPath written into it by hand."""
    begin, end = (
        script.index(text) for text in ("            loss = task(", "            updates += 1")
    )
    body = script[begin:end].replace("            losses.append(loss.item())\n", "")
    body = body.replace(
        "            if (batch + 1) % args.accumulate:\n                continue\n", ""
    )
    body = "".join(f"        {line}\n" for line in body.splitlines())
    cycle = (
        "            for it in rdp.cycle():\n"
        "                with it:\n"
        f"{body}"
        "                if it.phase == 'droppath':\n"
        "                    losses.append(loss.item())\n"
    )
    script = script[:begin] + cycle + script[end:]
    lines = {
        "    optimizer = create_optimizer_v2(": "    from timm_rdp import ResidualDropPath\n"
        "    rdp = ResidualDropPath(model, seed=args.seed)\n"
        "    optimizer = create_optimizer_v2(",
        "    updates_per_epoch =": "    if args.compile:\n"
        "        rdp.follow(task.get_trainable_module())\n"
        "    updates_per_epoch =",
    }
    for old, new in lines.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    return script


def with_explicit_iterations(script: str, example: str = "None") -> str:
    """TIMM_STYLE with ResidualDropPath written into it by hand.

    Args:
        example: Python code of the example input.
    """
    lines = {
        "    optimizer = create_optimizer_v2(": "    from timm_rdp import ResidualDropPath\n"
        f"    rdp = ResidualDropPath(model, seed=args.seed, example_input={example})\n"
        "    optimizer = create_optimizer_v2(",
        "            some = slice(": "            if batch % args.accumulate == 0:\n"
        "                iteration = rdp.iteration()\n"
        "                iteration.__enter__()\n"
        "            some = slice(",
        "            optimizer.zero_grad()": "            iteration.__exit__(None, None, None)\n"
        "            optimizer.zero_grad()",
        "    updates_per_epoch =": "    if args.compile:\n"
        "        rdp.follow(task.get_trainable_module())\n"
        "    updates_per_epoch =",
    }
    for old, new in lines.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    return script
