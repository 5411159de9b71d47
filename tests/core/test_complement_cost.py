"""What an iteration computes, counted in operators: what runs and what trains, and nothing else."""

import collections

import pytest
import torch
from core_helpers import batch, loss_of, small_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rdp import ResidualDropPath

BATCH = 6
TOKENS = 5  # of test_vit at 32 pixels: 2 x 2 patches and the class token


def iteration(rdp, phase, dropped):
    """The next iteration of this phase, with exactly the paths `dropped` dropped."""
    for path in rdp.paths:
        path.module.drop_prob = float(path.name in dropped)
    it = rdp.iteration()
    while it.phase != "droppath":
        with it:
            it = rdp.iteration()
    if phase == "complement":
        with it:
            loss_of(rdp.model, *batch("test_vit", 2))
        it = rdp.iteration()
    assert (it.phase, it.dropped) == (phase, frozenset(dropped))
    return it


def profiled(function):
    """How often each operator ran, with the shapes that it was given; and what function gave."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        result = function()
    counts = collections.Counter(
        (event.name, tuple(map(tuple, event.input_shapes))) for event in seen.events()
    )
    return counts, result


def number(counts, name, rows=None, columns=None):
    """How often the operator `name` was given a first matrix of this size."""
    total = 0
    for (operator, shapes), count in counts.items():
        matrix = next((s for s in shapes if len(s) == 2), (None, None))
        if operator == name and rows in (None, matrix[0]) and columns in (None, matrix[1]):
            total += count
    return total


def linears(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]


EARLIEST = ["blocks.1.drop_path1", "blocks.2.drop_path2", "blocks.5.drop_path1"]


@pytest.mark.parametrize("earliest", EARLIEST)
def test_weight_gradients_are_computed_for_what_is_trained_alone(earliest):
    rdp = ResidualDropPath(small_model("test_vit"))
    dropped = {earliest, "blocks.5.drop_path2"}
    with iteration(rdp, "complement", dropped) as it:
        loss = loss_of(rdp.model, *batch("test_vit", BATCH))
        counts, _ = profiled(loss.backward)
    trained = [n for n in linears(rdp.model) if f"{n}.weight" in it.trainable]
    assert len(trained) == 4
    # (out, rows) times (rows, in) is the gradient of a weight.
    assert number(counts, "aten::mm", columns=BATCH * TOKENS) == len(trained)
    # (rows, out) times (out, in) is that of an input: of every layer from the earliest path on.
    names = linears(rdp.model)
    behind = names[names.index(trained[0]) :]
    assert number(counts, "aten::mm", rows=BATCH * TOKENS) == len(behind)
    # The head's input has a gradient, its weight has not; the stem has neither.
    assert number(counts, "aten::mm", rows=BATCH) == 1
    assert number(counts, "aten::mm", columns=BATCH) == 0
    assert number(counts, "aten::convolution_backward") == 0


@pytest.mark.parametrize("path", ["drop_path1", "drop_path2"])
def test_depth_before_the_earliest_trained_path_costs_no_backward(path):
    counted = []
    for depth in (3, 6):
        rdp = ResidualDropPath(small_model("test_vit", depth=depth))
        with iteration(rdp, "complement", {f"blocks.{depth - 1}.{path}"}):
            loss = loss_of(rdp.model, *batch("test_vit", BATCH))
            counts, _ = profiled(loss.backward)
        counted.append(counts)
    assert counted[0] == counted[1]
    assert number(counted[0], "aten::mm") > 0


@pytest.mark.parametrize(
    "name, dropped",
    [
        ("test_vit", {"blocks.3.drop_path1"}),
        ("test_vit", {"blocks.3.drop_path2", "blocks.4.drop_path1"}),
        ("test_resnet", {"layer3.0.drop_path"}),
        ("test_resnet", {"layer3.0.drop_path", "layer4.0.drop_path"}),
    ],
)
def test_no_activation_is_kept_before_the_earliest_trained_path(name, dropped):
    rdp = ResidualDropPath(small_model(name))
    kept = 0
    at_the_path = []

    def keep(tensor):
        nonlocal kept
        kept += 1
        return tensor

    first = next(p for p in rdp.paths if p.name in dropped).parameters[0].rpartition(".")[0]
    module = rdp.model.get_submodule(first)
    module.register_forward_pre_hook(lambda *_: at_the_path.append(kept))
    for path in rdp.paths:
        path.module.drop_prob = float(path.name in dropped)
    for it in rdp.cycle():
        with it, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            kept = 0
            loss_of(rdp.model, *batch(name, BATCH)).backward()
            assert kept > 0
    droppath, complement = at_the_path
    assert droppath > 0
    assert complement == 0


class Convolutions(TorchDispatchMode):
    """Names of the weights of the convolutions that ran, and what their backward computed."""

    def __init__(self, model):
        super().__init__()
        self.names = {p.data_ptr(): n for n, p in model.named_parameters()}
        self.forward, self.input_gradients, self.weight_gradients = {}, set(), set()
        self.backward = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.forward[self.names[args[1].data_ptr()]] = args[0].shape[0]
        if function is torch.ops.aten.convolution_backward.default:
            name = self.names[args[2].data_ptr()]
            self.backward.add(name)
            if args[-1][0]:
                self.input_gradients.add(name)
            if args[-1][1]:
                self.weight_gradients.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "dropped", [{"layer2.0.drop_path"}, {"layer4.0.drop_path"}, {"layer3.0.drop_path"}]
)
def test_convolutions_are_differentiated_for_what_is_trained_alone(dropped):
    (path,) = dropped
    model = small_model("test_resnet")
    rdp = ResidualDropPath(model)
    for p in rdp.paths:
        p.module.drop_prob = float(p.name in dropped)
    seen = {}
    for it in rdp.cycle():
        with it, Convolutions(model) as seen[it.phase]:
            loss_of(model, *batch("test_resnet", BATCH)).backward()
    convolutions = list(seen["complement"].forward)  # in the order in which they run
    block = path.removesuffix("drop_path")
    carried = [n for n in convolutions if n in rdp.dropped_part(dropped)]
    assert len(carried) >= 2

    complement = seen["complement"]
    assert set(complement.forward.values()) == {BATCH}
    assert complement.weight_gradients == set(carried)
    behind = convolutions[convolutions.index(carried[0]) + 1 :]
    shortcut = {n for n in behind if n.startswith(f"{block}downsample")}
    assert complement.input_gradients == set(behind) - shortcut
    assert complement.backward == set(carried) | (set(behind) - shortcut)

    droppath = seen["droppath"]
    assert droppath.backward == droppath.weight_gradients == set(convolutions) - set(carried)
    few = {n for n, rows in droppath.forward.items() if rows < BATCH}
    assert few == set(carried)


@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_full_batch_work_falls_with_the_number_of_dropped_paths(count):
    model = small_model("test_vit")
    rdp = ResidualDropPath(model)
    dropped = {p.name for p in rdp.paths[:count]}
    with iteration(rdp, "droppath", dropped):
        forward, loss = profiled(lambda: loss_of(model, *batch("test_vit", BATCH)))
        backward, _ = profiled(loss.backward)
    run = len(linears(model)) - 2 * count  # each path of a ViT has two
    attentions = 6 - sum(name.endswith("drop_path1") for name in dropped)
    assert number(forward, "aten::addmm", rows=BATCH * TOKENS) == run
    assert number(backward, "aten::mm", rows=BATCH * TOKENS) == run
    assert number(backward, "aten::mm", columns=BATCH * TOKENS) == run
    backwards = [n for n, _ in backward.elements() if "scaled_dot_product" in n and "aten" in n]
    assert len(backwards) == attentions
