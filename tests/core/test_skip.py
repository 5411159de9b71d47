"""A dropped path is not run, and nothing that an update leaves behind shows it."""

import copy

import pytest
import torch
from core_helpers import batch, buffers_of, loss_of, same_bits, small_model
from test_families import FAMILIES, KINDS, create, first_tensor
from timm.layers import DropPath
from torch import nn

from timm_rdp import ResidualDropPath
from timm_rdp.core.drop_path import Hook, MaskedDropPath
from timm_rdp.core.trace import trace_paths

# Blocks of different makes; with `-m slow` all families.
BY_DEFAULT = {"cait", "convnext", "efficientnet", "levit", "mlp_mixer", "resnet", "twins"}
MODELS = {**FAMILIES, **KINDS}


def marks_of(family):
    if family not in BY_DEFAULT:
        yield pytest.mark.slow


def pair(model, example_input=None):
    """Controllers of the model and of a copy of it, which computes dropped paths and cuts them."""
    other = copy.deepcopy(model)
    skipping, cutting = (ResidualDropPath(m, example_input=example_input) for m in (model, other))
    cutting.model.run_what_is_dropped = True
    return skipping, cutting


def update(rdp, images, autocast=False):
    """Everything that the next iteration leaves behind, in the model and outside."""
    rdp.model.zero_grad()
    torch.manual_seed(7)
    with rdp.iteration():
        for hook in skip_hooks(rdp.model):
            if hasattr(rdp.model, "run_what_is_dropped"):
                # It still says what the zeros are like, and passes on the whole batch.
                hook.function = lambda *args, skip=hook.function: skip(*args) and None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = first_tensor(rdp.model(images))
            loss = output.float().square().mean()
        loss.backward()
    return {
        "output": output.detach(),
        "strides": output.stride(),
        "loss": loss.detach(),
        "gradients": {n: p.grad for n, p in rdp.model.named_parameters() if p.grad is not None},
        "buffers": buffers_of(rdp.model),
        "masks": [m.masks for m in rdp.model.modules() if isinstance(m, DropPath)],
    }


def go_to_cycle(rdp, cycle):
    rdp.load_state_dict({**rdp.state_dict(), "cycle": cycle, "phase": "droppath"})


def check_equal(skipping, cutting, images, cycles=3, **options):
    """Droppath iterations of both do the same; how many paths were not run."""
    skippable = {p.name for p in skipping.paths if p.entrances}
    skipped = 0
    for cycle in range(cycles):
        for rdp in (skipping, cutting):
            go_to_cycle(rdp, cycle)
        skipped += len(skipping.iteration().dropped & skippable)
        dropped = sorted(skipping.iteration().dropped)
        ours, theirs = (update(rdp, images, **options) for rdp in (skipping, cutting))
        different = [what for what in ours if not same_bits(ours[what], theirs[what])]
        assert not different, dropped
    return skipped


@pytest.mark.parametrize("family", [pytest.param(f, marks=[*marks_of(f)]) for f in sorted(MODELS)])
def test_updates_are_bitwise_those_that_compute_and_cut(family):
    name, size, options = MODELS[family]
    model = create(name, {**options, "drop_path_rate": 0.5}).float()
    skipping, cutting = pair(model, torch.zeros(2, 3, size, size))
    skipped = check_equal(skipping, cutting, torch.randn(3, 3, size, size))
    if family in BY_DEFAULT:
        assert skipped > 0


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("how", ["checkpointed", "channels last", "bf16"])
def test_updates_are_bitwise_equal_in_other_modes_too(name, how):
    model = small_model(name)
    if how == "checkpointed":
        model.set_grad_checkpointing()
    images, _ = batch(name, 3)
    if how == "channels last":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    skipping, cutting = pair(model)
    assert check_equal(skipping, cutting, images, autocast=how == "bf16") > 0


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "cait_xxs24_224"])
def test_forwards_of_other_batch_sizes_may_share_a_backward(name, checkpointed):
    results = []
    model = small_model(name)
    model.set_grad_checkpointing(checkpointed)
    for rdp in pair(model):
        go_to_cycle(rdp, 1)
        with rdp.iteration() as it:
            assert it.dropped
            losses = [loss_of(rdp.model, *batch(name, count)) for count in (3, 1, 5)]
            sum(losses).backward()
        results.append([losses, [p.grad for p in rdp.model.parameters()], buffers_of(rdp.model)])
    skipped, cut = results
    skipped[1] = [0 if g is None else g for g in skipped[1]]
    cut[1] = [0 if g is None else g for g in cut[1]]
    assert same_bits(skipped, cut)


class Blocks(nn.Module):
    """Two kinds of paths: one never takes a single sample, of the other a single path does not."""

    runs = 0

    class Block(nn.Module):
        def __init__(self, fixed):
            super().__init__()
            self.fixed = fixed
            self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
            self.drop_path1, self.drop_path2 = DropPath(0.5), DropPath(0.5)

        def forward(self, x):
            y = self.fc1(x)
            x = x + self.drop_path1(y.view(len(x), 4) if 1 in self.fixed else y)
            y = self.fc2(x)
            return x + self.drop_path2(y.expand(len(x), 4) if 2 in self.fixed else y)

    def __init__(self):
        super().__init__()
        fixed = [(1,)] * 20
        fixed[7] = (1, 2)
        self.blocks = nn.Sequential(*map(self.Block, fixed))

    def forward(self, x):
        Blocks.runs += 1
        return self.blocks(x)


def test_a_kind_of_path_that_cannot_be_skipped_is_found_out_by_two_trials():
    before = Blocks.runs
    paths = trace_paths(Blocks(), torch.ones(2, 4)).paths
    # The trace, two failures of the one kind, one of the other, and the trial that succeeds.
    assert Blocks.runs - before == 5
    skippable = {p.name for p in paths if p.entrances}
    assert skippable == {f"blocks.{i}.drop_path2" for i in range(20) if i != 7}
    skipping, cutting = pair(Blocks(), torch.ones(2, 4))
    assert check_equal(skipping, cutting, torch.randn(3, 4)) > 0


def entry_sizes(rdp, names):
    """Batch sizes that every module sees which owns a parameter carried by the paths `names`."""
    sizes = {}
    owners = {n.rpartition(".")[0] for n in rdp.dropped_part(names)}
    modules = dict(rdp.model.named_modules())
    hooks = [
        modules[owner].register_forward_hook(
            lambda _, args, __, owner=owner: sizes.setdefault(owner, set()).add(args[0].shape[0])
        )
        for owner in owners
        if "drop_path" not in {m for m, _ in modules[owner].named_children()}
    ]
    return sizes, hooks


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_byobnet", "cait_xxs24_224"])
def test_modules_on_a_dropped_path_are_not_handed_the_batch(name):
    rdp = ResidualDropPath(small_model(name))
    seen = set()
    assert all(p.entrances for p in rdp.paths)
    for _ in range(4):
        for it in rdp.cycle():
            sizes, hooks = entry_sizes(rdp, it.dropped)
            with it:
                loss_of(rdp.model, *batch(name, 8)).backward()
            for hook in hooks:
                hook.remove()
            if it.phase == "droppath":
                assert all(max(got) <= 2 for got in sizes.values()), sizes
            else:
                assert all(got == {8} for got in sizes.values()), sizes
            seen |= {(it.phase, owner) for owner in sizes}
    assert {phase for phase, _ in seen} == {"droppath", "complement"}


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_evaluation_within_an_iteration_runs_every_path(name):
    rdp = ResidualDropPath(small_model(name))
    go_to_cycle(rdp, 1)
    images, _ = batch(name, 4)
    expected = small_model(name).eval()(images)
    with rdp.iteration() as it, torch.no_grad():
        assert it.dropped
        rdp.model.eval()
        sizes, hooks = entry_sizes(rdp, it.dropped)
        assert same_bits(rdp.model(images), expected)
        assert set.union(*sizes.values()) == {4}
        for hook in hooks:
            hook.remove()
        rdp.model.train()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_copy_made_within_an_iteration_is_a_plain_model(name):
    rdp = ResidualDropPath(small_model(name))
    images, labels = batch(name, 4)
    go_to_cycle(rdp, 1)
    with rdp.iteration() as it:
        assert it.dropped
        twin = copy.deepcopy(rdp.model).train()  # copied with it: BatchNorm that rests just now
        torch.manual_seed(3)
        outputs = twin(images)
        sizes, hooks = entry_sizes(rdp, it.dropped)
        loss_of(rdp.model, images, labels).backward()
        assert max(set.union(*sizes.values())) <= 2
        for hook in hooks:
            hook.remove()
    plain = small_model(name)
    torch.manual_seed(3)
    assert same_bits(outputs, plain(images))


def skip_hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, Hook)
        and getattr(getattr(hook.function, "func", None), "__func__", None)
        is MaskedDropPath.pass_on_one_sample
    ]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_no_hook_outlives_its_iteration(name):
    rdp = ResidualDropPath(small_model(name))
    go_to_cycle(rdp, 1)
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), rdp.iteration() as it:
            assert it.dropped
            assert len(skip_hooks(rdp.model)) >= len(it.dropped)
            loss_of(rdp.model, *batch(name))
            raise error
        assert not skip_hooks(rdp.model)
    for it in rdp.cycle():
        with it:
            assert bool(skip_hooks(rdp.model)) is (it.phase == "droppath")
            loss_of(rdp.model, *batch(name)).backward()
        assert not skip_hooks(rdp.model)


def test_a_users_hook_stays_and_sees_the_whole_batch():
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    go_to_cycle(rdp, 1)
    dropped = sorted(rdp.iteration().dropped)
    entrance = next(p.entrances[0] for p in rdp.paths if p.name in dropped)
    sizes = []
    module = model.get_submodule(entrance)
    hook = module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    for it in rdp.cycle():
        with it:
            loss_of(model, *batch("test_vit")).backward()
    assert sizes == [4, 4]
    assert list(module._forward_pre_hooks) == [hook.id]
