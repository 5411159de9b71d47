"""The rules on a GPU: `pytest -m gpu`; with `--device cpu` the same code on the CPU."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from core_helpers import batch as batch_of
from core_helpers import (
    buffers_of,
    changed,
    loss_of,
    optimizer_state_of,
    parameters_of,
    same_bits,
    small_model,
)
from ranks import Ranks
from test_optimizers import TINY, backward, check_cycle, make_optimizer, what_the_optimizer_needs
from timm.layers import convert_sync_batchnorm
from timm.optim import list_optimizers
from torch.nn.parallel import DistributedDataParallel

from timm_rdp import ResidualDropPath, skip_dropped

pytestmark = [
    pytest.mark.gpu,
    # torch's own, see test_regions.py
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
MODELS = ("test_vit", "test_resnet", "convnext_atto")


def batch(device, name, start=0):
    return [t.to(device) for t in batch_of(name, 8, start)]


def resting(model, dropped_part):
    """Names of the buffers of modules all of whose parameters are dropped."""
    return {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        for buffer, _ in module.named_buffers(recurse=False)
        if (own := {f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)})
        and own <= dropped_part
    }


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_keeps_every_bit_of_what_is_frozen_or_dropped(name, dtype, layout, device):
    model = small_model(name).to(device, memory_format=layout)
    rdp = ResidualDropPath(model, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == torch.float16)
    phases, overflows = [], 0
    for cycle in range(8):
        for it in rdp.cycle():
            state = lambda: (parameters_of(model), optimizer_state_of(optimizer, model))
            before, buffers = state(), buffers_of(model)
            images, labels = batch(device, name, 8 * cycle)
            overflow = scaler.is_enabled() and cycle == 4
            with it:
                with torch.autocast(device.type, dtype):
                    loss = loss_of(model, images.to(memory_format=layout), labels)
                scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            moved, state_moved = (changed(*pair) for pair in zip(before, state(), strict=True))
            part = rdp.dropped_part(it.dropped)
            should = part if it.phase == "complement" else set(before[0]) - part
            assert state_moved <= should
            assert moved == (set() if overflow else should)
            if it.phase == "droppath":
                assert not changed(buffers, buffers_of(model)) & resting(model, part)
            phases.append(it.phase)
            overflows += overflow
    assert phases.count("complement") >= 4
    assert bool(overflows) == scaler.is_enabled()


FUSED = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("name", [*list_optimizers(), *(f"torch fused {n}" for n in FUSED)])
def test_every_optimizer_leaves_what_is_frozen_alone(name, device):
    model = small_model("test_vit", **TINY).to(device)
    rdp = ResidualDropPath(model, seed=1)
    if name.startswith("torch"):
        optimizer = FUSED[name.split()[-1]](model.parameters(), lr=0.01, fused=True)
    else:
        try:
            optimizer = make_optimizer(model, name)
        except (AssertionError, ImportError, RuntimeError) as why:
            pytest.skip(str(why))
    images, labels = batch(device, "test_vit")

    def train():
        backward(optimizer, loss_of(model, images, labels))
        optimizer.step()
        optimizer.zero_grad()

    with what_the_optimizer_needs(name):
        for _ in range(2):  # momentum and statistics of every parameter
            for it in rdp.cycle():
                with it:
                    train()
        phases = [phase for _ in range(5) for phase in check_cycle(rdp, optimizer, train)]
    assert phases.count("complement") >= 2


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_ranks_end_bitwise_equal(name, size, device, tmp_path):
    if device.type == "cuda" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    ranks = Ranks(tmp_path)
    try:
        results = ranks.run(train_rank, name, device.type, size=size)
    finally:
        ranks.stop()
    for steps, *rest in results:
        assert same_bits([steps, *rest], [*results[0]])
        assert all(trained <= trainable for _, trained, trainable in steps)
        assert sum(phase == "complement" for phase, *_ in steps) >= 4


def train_rank(rank, size, name, kind):
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    group = dist.new_group(backend="nccl" if kind == "cuda" else "gloo")
    model = small_model(name).to(device)
    if kind == "cuda":  # which alone can synchronise them
        model = convert_sync_batchnorm(model, group)
    ddp = DistributedDataParallel(model, process_group=group)
    rdp = ResidualDropPath(ddp, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    steps = []
    for cycle in range(8):
        for it in rdp.cycle():
            before = parameters_of(model)
            with it:
                loss_of(ddp, *batch(device, name, 8 * (size * cycle + rank))).backward()
                optimizer.step()
                optimizer.zero_grad()
            steps.append((it.phase, changed(before, parameters_of(model)), set(it.trainable)))
    averaged = buffers_of(model) if kind == "cuda" else {}
    on_cpu = lambda tensors: {n: t.cpu() for n, t in tensors.items()}
    return steps, on_cpu(parameters_of(model)), on_cpu(averaged)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_regions_give_the_updates_of_eager_mode(name, device):
    # In float32 the last bits of batch norm's statistics grow to 0.01 within these six cycles.
    ends = []
    for compiled in (False, True):
        model = small_model(name).to(device, torch.float64)
        rdp = ResidualDropPath(model, seed=1)
        if compiled:
            rdp.compile()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for cycle in range(6):
            for it in rdp.cycle():
                before = parameters_of(model)
                images, labels = batch(device, name, 8 * cycle)
                with it:
                    loss_of(model, images.double(), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                assert changed(before, parameters_of(model)) <= it.trainable
        ends.append(parameters_of(model))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_cuda_graphs_are_refused(device):
    rdp = ResidualDropPath(small_model("test_vit").to(device))
    with pytest.raises(ValueError, match="records CUDA graphs"):
        rdp.compile(mode="reduce-overhead")


@pytest.mark.parametrize("name", MODELS)
def test_skipped_samples_change_no_gradient(name, device):
    gradients = []
    for skipping in (False, True):
        model = small_model(name).to(device)
        if skipping:
            skip_dropped(model)
        torch.manual_seed(3)
        loss_of(model, *batch(device, name)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    if name == "test_resnet":  # statistics are those of the samples that are kept
        assert gradients[0].keys() == gradients[1].keys()
    else:
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_a_fixed_number_of_samples_is_kept(device):
    model = small_model("test_vit").to(device)
    skip_dropped(model, samples="fixed")
    loss_of(model, *batch(device, "test_vit")).backward()
    for module in model.modules():
        if (masks := getattr(module, "masks", None)) and module.drop_prob:
            kept = max(1, round(8 * (1 - module.drop_prob)))
            assert [int(mask.sum()) for mask in masks] == [kept]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_no_update_waits_for_the_device(compiled, device):
    model = small_model("test_vit").to(device)
    rdp = ResidualDropPath(model, seed=1)
    if compiled:
        rdp.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = batch(device, "test_vit")

    def cycle():
        for it in rdp.cycle():
            with it:
                loss_of(model, images, labels).backward()
                optimizer.step()
                optimizer.zero_grad()

    for _ in range(10):  # the first complement iteration looks at what the optimizer moved
        cycle()
    start = rdp.state_dict()
    with waiting_is_an_error(device):
        for _ in range(3):
            cycle()
    assert rdp.state_dict()["cycle"] == start["cycle"] + 3


@contextlib.contextmanager
def waiting_is_an_error(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
