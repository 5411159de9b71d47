"""Rule 9: under DistributedDataParallel the ranks never disagree on what is trained."""

import collections
import contextlib

import pytest
import timm
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from core_helpers import (
    SMALL,
    buffers_of,
    changed,
    optimizer_state_of,
    parameters_of,
    same_bits,
    small_model,
)
from digits import digit_images
from ranks import Ranks
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from timm_rdp import ResidualDropPath

pytestmark = pytest.mark.xdist_group("ranks")  # one set of processes is enough

COAT = "coat_tiny"  # blocks that share parameters


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


def create(name, drop_path_rate=0.5):
    if name in SMALL:
        return small_model(name, drop_path_rate)
    torch.manual_seed(0)
    return timm.create_model(
        name,
        num_classes=10,
        drop_path_rate=drop_path_rate,
        img_size=32,
        embed_dims=[32] * 4,
        serial_depths=[1] * 4,
        parallel_depth=2,
    )


def train(
    rank,
    size,
    name,
    batch="same",
    cycles=20,
    images=4,  # of one forward, of all ranks together
    accumulate=1,
    clip=None,
    wrap="before",
    attach=None,
    drop_probs=None,  # of all paths, one number per cycle
    short_from=None,  # batch from which on the last rank has one image less
    no_sync=True,
    backend=None,
    **ddp_options,
):
    """Train as one of `size` ranks; what this rank ends with. Frozen parameters are checked."""
    model = called = create(name)
    example = torch.zeros(2, 3, *([SMALL[name][0] if name in SMALL else 32] * 2))
    rdp = None
    if wrap == "after":
        rdp = ResidualDropPath(model, example_input=example)
        if backend == "regions":
            rdp.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True
    )
    if attach == "first":
        rdp.attach(optimizer)
    torch._dynamo.reset()
    counters.clear()
    distributed = dist.is_initialized()
    ddp = None
    if backend == "compiled inside":
        called = torch.compile(called, backend="aot_eager")
    if distributed:
        called = ddp = DistributedDataParallel(called, **ddp_options)
    if backend == "compiled outside":
        called = torch.compile(called, backend="aot_eager")
    if wrap == "after":
        rdp.follow(called)
    else:
        rdp = ResidualDropPath(called, example_input=example)
        if backend == "regions":
            rdp.compile(backend="aot_eager")
    if attach == "last":
        rdp.attach(optimizer)

    steps = []
    start = 0

    def backward(part):
        many, labels = digit_images(images, example.shape[-1], start + part * images)
        mine = slice(rank * images // size, (rank + 1) * images // size)
        if short_from is not None and len(steps) >= short_from and rank == size - 1:
            mine = slice(mine.start, mine.stop - 1)
        synchronise = ddp is None or part == accumulate - 1 or not no_sync
        with contextlib.nullcontext() if synchronise else ddp.no_sync():
            loss = torch.nn.functional.cross_entropy(called(many[mine]), labels[mine]) / accumulate
            loss.backward()

    def update(it):
        before = parameters_of(model)
        state = optimizer_state_of(optimizer, model)
        with contextlib.nullcontext() if attach else it:
            for part in range(accumulate):
                backward(part)
            norm = None
            if clip is not None:
                norm = torch.nn.utils.clip_grad_norm_(called.parameters(), clip).item()
            optimizer.step()
            optimizer.zero_grad()
        trained = changed(before, parameters_of(model))
        trained |= changed(state, optimizer_state_of(optimizer, model))
        assert trained <= it.trainable
        steps.append(
            {
                "phase": it.phase,
                "dropped": sorted(it.dropped),
                "trained": sorted(trained),
                "norm": norm,
            }
        )

    for cycle in range(cycles):
        if drop_probs is not None:
            for path in rdp.paths:
                path.module.drop_prob = drop_probs[cycle]
        if batch == "same":
            for it in rdp.cycle():
                update(it)
            start += images * accumulate
        else:
            while rdp.iteration().cycle == cycle:
                update(rdp.iteration())
                start += images * accumulate
    if distributed and size > 1:
        distribute_bn(model, size, reduce=True)
    return {
        "parameters": parameters_of(model),
        "buffers": buffers_of(model),
        "steps": steps,
        "graphs": counters["stats"]["unique_graphs"],
    }


def check_ranks_agree(results):
    for other in results[1:]:
        assert same_bits(other["parameters"], results[0]["parameters"])
        assert same_bits(other["buffers"], results[0]["buffers"])
        assert other["steps"] == results[0]["steps"]


def check_one_process_agrees(results, *args, **options):
    alone = train(0, 1, *args, **options)
    for ours, theirs in zip(results[0]["steps"], alone["steps"], strict=True):
        assert (ours["norm"] or 0.0) == pytest.approx(theirs["norm"] or 0.0, rel=1e-4)
        assert (ours["phase"], ours["dropped"]) == (theirs["phase"], theirs["dropped"])
        assert ours["trained"] == theirs["trained"]
    for name, parameter in alone["parameters"].items():
        torch.testing.assert_close(
            results[0]["parameters"][name], parameter, rtol=1e-4, atol=1e-5, msg=name
        )


def train_with(rank, size, name, options):
    return train(rank, size, name, **options)


@pytest.mark.parametrize(
    "name, batch, options",
    [
        ("test_vit", "same", {"accumulate": 2, "clip": 0.5}),
        pytest.param("test_vit", "next", {"clip": 0.5}, marks=pytest.mark.slow),
        pytest.param("test_resnet", "same", {"clip": 0.5}, marks=pytest.mark.slow),
        pytest.param("test_resnet", "next", {"accumulate": 2, "images": 8}, marks=pytest.mark.slow),
        pytest.param(COAT, "same", {}, marks=pytest.mark.slow),
        pytest.param(COAT, "next", {"accumulate": 2, "clip": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_ranks_end_bitwise_equal_and_as_one_process_would(ranks, name, batch, options):
    results = ranks.run(train_with, name, {"batch": batch, **options})
    check_ranks_agree(results)
    if name != "test_resnet":  # there the statistics are those of each rank's batch
        check_one_process_agrees(results, name, batch=batch, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name, batch", [("test_vit", "same"), ("test_resnet", "next")])
def test_four_ranks_end_bitwise_equal_and_as_one_process_would(ranks, name, batch):
    options = {"batch": batch, "accumulate": 2, "clip": 0.5, "images": 8}
    results = ranks.run(train_with, name, options, size=4)
    check_ranks_agree(results)
    if name == "test_vit":
        check_one_process_agrees(results, name, **options)


def test_accumulation_may_synchronise_every_backward(ranks):
    options = {"accumulate": 2, "no_sync": False, "cycles": 8}
    results = ranks.run(train_with, "test_vit", options)
    check_ranks_agree(results)
    check_one_process_agrees(results, "test_vit", accumulate=2, cycles=8)


@pytest.mark.parametrize("batch", ["same", "next"])
def test_cycles_that_drop_nothing_or_everything_neither_hang_nor_desynchronise(ranks, batch):
    drop_probs = [0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0]
    options = {"batch": batch, "cycles": len(drop_probs), "drop_probs": drop_probs}
    results = ranks.run(train_with, "test_vit", options)
    check_ranks_agree(results)
    check_one_process_agrees(results, "test_vit", **options)
    dropped = [len(s["dropped"]) for s in results[0]["steps"] if s["phase"] == "droppath"]
    everything = max(dropped)
    assert [dropped[i] for i in (0, 1, 2, 3, 4, 5, 7)] == [
        everything * drop_probs[i] for i in (0, 1, 2, 3, 4, 5, 7)
    ]
    assert sum(s["phase"] == "complement" for s in results[0]["steps"]) == 4


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_rank_with_a_shorter_last_batch_stays_in_step(ranks, name):
    check_ranks_agree(ranks.run(train_with, name, {"cycles": 6, "images": 8, "short_from": 5}))


@pytest.mark.parametrize(
    "wrap, attach", [("before", "last"), ("after", "first"), ("after", "last")]
)
def test_attached_loop_equals_the_written_out_one(ranks, wrap, attach):
    options = {"batch": "next", "cycles": 6, "accumulate": 2}
    written = ranks.run(train_with, "test_vit", options)
    attached = ranks.run(train_with, "test_vit", {**options, "wrap": wrap, "attach": attach})
    check_ranks_agree(attached)
    assert same_bits(attached[0]["parameters"], written[0]["parameters"])
    assert attached[0]["steps"] == written[0]["steps"]


@pytest.mark.parametrize(
    "backend, wrap, graphs",
    [
        pytest.param("compiled inside", "before", 4, marks=pytest.mark.slow),
        pytest.param("compiled outside", "after", 4, marks=pytest.mark.slow),
        pytest.param("regions", "before", 16, marks=pytest.mark.slow),
        pytest.param("regions", "after", 16, marks=pytest.mark.slow),
    ],
)
def test_compiled_ranks_end_bitwise_equal_and_as_one_process_would(ranks, backend, wrap, graphs):
    options = {"cycles": 6, "backend": backend, "wrap": wrap}
    results = ranks.run(train_with, "test_vit", options)
    check_ranks_agree(results)
    check_one_process_agrees(results, "test_vit", cycles=6)
    assert 1 <= results[0]["graphs"] <= graphs


@pytest.mark.parametrize(
    "option",
    ["find_unused_parameters", "gradient_as_bucket_view", "no broadcast_buffers"],
)
def test_options_of_the_wrapper_change_nothing(ranks, option):
    value = not option.startswith("no ")
    results = ranks.run(train_with, "test_resnet", {"cycles": 6, option.removeprefix("no "): value})
    check_ranks_agree(results)
    plain = ranks.run(train_with, "test_resnet", {"cycles": 6})
    assert same_bits(results[0]["parameters"], plain[0]["parameters"])


def test_what_the_user_froze_stays_frozen_on_every_rank(ranks):
    for frozen in ranks.run(train_with_frozen):
        assert frozen == {"cls_token", "blocks.4.mlp.fc1.weight", "head.bias"}


def train_with_frozen(rank, size):
    frozen = ["cls_token", "blocks.4.mlp.fc1.weight", "head.bias"]
    model = create("test_vit")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    ddp = DistributedDataParallel(model)
    rdp = ResidualDropPath(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = parameters_of(model)
    for _ in range(10):
        for it in rdp.cycle():
            with it:
                update(ddp, optimizer, rank)
    return set(before) - changed(before, parameters_of(model))


def update(called, optimizer, rank, count=4):
    images, labels = digit_images(count, 32, count * rank)
    torch.nn.functional.cross_entropy(called(images), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_plain_training_evaluation_and_exceptions_keep_ranks_equal(ranks):
    results = ranks.run(train_with_interruptions)
    assert same_bits(*results)


def train_with_interruptions(rank, size):
    model = create("test_vit")
    ddp = DistributedDataParallel(model)
    rdp = ResidualDropPath(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    snapshots = []
    for cycle in range(4):
        torch.manual_seed(rank)  # per-sample masks differ between ranks
        update(ddp, optimizer, rank)
        snapshots.append(parameters_of(model))
        for it in rdp.cycle():
            with pytest.raises(KeyboardInterrupt), it:
                torch.nn.functional.cross_entropy(ddp(digit_images(2)[0]), torch.zeros(2).long())
                raise KeyboardInterrupt
            with pytest.raises(KeyboardInterrupt), rdp.iteration():
                ddp(digit_images(2)[0]).sum().backward()
                raise KeyboardInterrupt
            optimizer.zero_grad()
            with rdp.iteration() as again:
                assert (again.phase, again.cycle) == (it.phase, cycle)
                with torch.no_grad():
                    ddp(digit_images(2 + rank)[0])
                ddp.eval()
                model(digit_images(2)[0])
                ddp.train()
                update(ddp, optimizer, rank)
            snapshots.append(parameters_of(model))
    rdp.detach()
    update(ddp, optimizer, rank)
    assert snapshots[-1].keys() == changed(snapshots[-1], parameters_of(model))
    return [*snapshots, parameters_of(model)]


@pytest.mark.parametrize("what", ["seed", "every", "cycle"])
def test_ranks_that_differ_in_what_sets_the_masks_are_refused_on_all(ranks, what):
    values = "1 and 2" if what == "every" else "0 and 1"
    for message in ranks.run(controller_of_rank, what):
        assert message == (
            f"ranks differ in the {what} of ResidualDropPath: {values}; give all the same"
        )


def controller_of_rank(rank, size, what):
    model = create("test_vit")
    rdp = ResidualDropPath(
        model, seed=rank if what == "seed" else 0, every=1 + rank if what == "every" else 1
    )
    if what == "cycle" and rank == 1:
        rdp.load_state_dict({**rdp.state_dict(), "cycle": 1})
    with pytest.raises(ValueError) as error:
        rdp.follow(DistributedDataParallel(model))
    return str(error.value)


@pytest.mark.parametrize("uses", ["every rank", "rank 1", "a part", "no rank"])
def test_a_parameter_that_only_the_loss_uses_is_averaged_too(ranks, uses):
    results = ranks.run(train_with_a_temperature, uses)
    assert same_bits(results[0]["parameters"], results[1]["parameters"])
    assert results[0]["temperature moved"] is (uses != "no rank")


def train_with_a_temperature(rank, size, uses):
    model = create("test_vit")
    model.temperature = torch.nn.Parameter(torch.ones(()))
    model.never_used = torch.nn.Parameter(torch.ones(3))
    ddp = DistributedDataParallel(model)
    rdp = ResidualDropPath(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(6):
        images, labels = digit_images(4, 32, 4 * (rank + size * i))
        frozen = model.temperature.clone()
        with rdp.iteration() as it:
            for part in range(2):
                output = ddp(images[2 * part :][:2])
                if {"every rank": True, "rank 1": rank == 1, "a part": part == 1}.get(uses):
                    output = output * model.temperature
                torch.nn.functional.cross_entropy(output, labels[2 * part :][:2]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if it.phase == "complement":
            assert same_bits(frozen.detach(), model.temperature.detach())
    return {
        "parameters": parameters_of(model),
        "temperature moved": model.temperature.item() != 1.0,
    }


def test_a_wrapper_that_the_controller_was_not_told_of_is_refused(ranks):
    for message in ranks.run(wrapped_without_follow):
        assert "DistributedDataParallel" in message
        assert "call follow() with it" in message
        assert "\n" not in message


def wrapped_without_follow(rank, size):
    model = create("test_vit")
    rdp = ResidualDropPath(model)
    ddp = DistributedDataParallel(model)
    with pytest.raises(RuntimeError) as error, rdp.iteration():
        ddp(digit_images(2)[0])
    rdp.follow(ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for it in rdp.cycle():
        with it:
            update(ddp, optimizer, rank)
    return str(error.value)


def test_a_parameter_that_gets_no_gradient_is_named_on_every_rank(ranks):
    for message in ranks.run(loss_from_a_part):
        assert message.startswith("parameter head_dist.")
        assert "build the loss from the output of the whole model" in message


def loss_from_a_part(rank, size):
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", depth=3, img_size=32, drop_path_rate=0.2
    )
    model.set_distilled_training(True)
    ddp = DistributedDataParallel(model)
    rdp = ResidualDropPath(ddp)
    with pytest.raises(RuntimeError) as error, rdp.iteration():
        ddp(digit_images(2)[0])[0].sum().backward()
    return str(error.value)


def test_a_communication_hook_is_refused(ranks):
    for message in ranks.run(controller_with_hook):
        assert message.startswith("DistributedDataParallel has a communication hook")


def controller_with_hook(rank, size):
    ddp = DistributedDataParallel(create("test_vit"))
    ddp.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(ValueError) as error:
        ResidualDropPath(ddp)
    return str(error.value)


def test_a_validation_between_forward_and_backward_keeps_ranks_equal(ranks):
    plain, validated = (ranks.run(train_attached, validated) for validated in (False, True))
    assert same_bits(*validated)
    assert same_bits(validated[0], plain[0])


def train_attached(rank, size, validated):
    model = create("test_vit")
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    rdp = ResidualDropPath(ddp).attach(optimizer)
    for i in range(6):
        images, labels = digit_images(4, 32, 4 * (rank + size * i))
        loss = torch.nn.functional.cross_entropy(ddp(images), labels)
        if validated:
            with torch.no_grad():
                ddp.eval()(images)
            ddp.train()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rdp.current_cycle == 3
    return parameters_of(model)


@pytest.mark.skipif(
    not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch before 2.6 has no FSDP2"
)
@pytest.mark.parametrize(
    "when, size",
    [("before", 2), ("after", 2), pytest.param("after", 4, marks=pytest.mark.slow)],
)
def test_sharded_models_train_what_an_iteration_trains_and_as_one_process_would(ranks, when, size):
    results = ranks.run(train_sharded, when, size=size)
    (steps, parameters), *others = results
    for other in others:
        assert other[0] == steps
        assert same_bits(other[1], parameters)
    for phase, trained, trainable in steps:
        assert trained == trainable, phase
    alone, expected = train_sharded(0, 1, images=4 * size)
    assert [phase for phase, *_ in alone] == [phase for phase, *_ in steps]
    torch.testing.assert_close(parameters, expected, rtol=1e-4, atol=1e-5)


def train_sharded(rank, size, when=None, images=4):
    """Per iteration its phase, what changed, and what should; and the parameters at the end.

    FSDP2 shards the model `when` RDP has patched it or before; without it one process trains alone.
    """
    model = create("test_vit")
    rdp = ResidualDropPath(model) if when != "before" else None
    if when is not None:
        mesh = init_device_mesh("cpu", (size,))
        for part in (*model.blocks, model):
            torch.distributed.fsdp.fully_shard(part, mesh=mesh)
        rdp = ResidualDropPath(model) if rdp is None else rdp.follow(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)

    def whole():
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        return {n: getattr(p, "full_tensor", p.clone)().clone() for n, p in parameters.items()}

    seen = []
    for _ in range(3):
        for it in rdp.cycle():
            before = whole()
            with torch.no_grad():  # which leaves parameters whole
                model.eval()(digit_images(2)[0])
            model.train()
            with it:
                update(model, optimizer, rank, images)
            if when is not None:
                model.reshard()
            seen.append((it.phase, changed(before, whole()), it.trainable))
    return seen, whole()


def test_synchronised_batch_norm_is_traced_without_communication(ranks):
    expected = [(p.name, p.parameters) for p in ResidualDropPath(create("test_resnet")).paths]
    for paths in ranks.run(paths_with_synchronised_batch_norm):
        assert paths == expected


def paths_with_synchronised_batch_norm(rank, size):
    model = convert_sync_batchnorm(create("test_resnet"))
    if rank == 0:  # alone, so that a collective would be waited for in vain
        return [(p.name, p.parameters) for p in ResidualDropPath(model).paths]
    return [(p.name, p.parameters) for p in ResidualDropPath(create("test_resnet")).paths]


def test_trained_parameters_in_the_wrapper_but_outside_of_the_model_are_refused(ranks):
    for message in ranks.run(controller_of_a_part):
        assert message.startswith("DistributedDataParallel also trains 1.weight, outside of the")


def controller_of_a_part(rank, size):
    whole = torch.nn.Sequential(create("test_vit"), torch.nn.Linear(10, 2))
    rdp = ResidualDropPath(whole[0])
    with pytest.raises(ValueError) as error:
        rdp.follow(DistributedDataParallel(whole))
    whole[1].requires_grad_(False)
    rdp.follow(DistributedDataParallel(whole))
    return str(error.value)


def test_a_static_graph_is_refused(ranks):
    for message in ranks.run(controller_with_static_graph):
        assert "static_graph" in message


def controller_with_static_graph(rank, size):
    with pytest.raises(ValueError) as error:
        ResidualDropPath(DistributedDataParallel(create("test_vit"), static_graph=True))
    return str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_ranks_send_no_more_than_is_trained_and_than_plain_training_does(ranks, name):
    plain, iterations = ranks.run(communication, name)[0]
    assert plain["gradients"] == 4 * sum(p.numel() for p in create(name).parameters())
    assert {it["phase"] for it in iterations} == {"droppath", "complement"}
    for it in iterations:
        if it["phase"] == "complement":
            assert 0 < it["gradients"] <= 1.1 * it["trained"]
        else:
            assert 0 < it["gradients"] <= plain["gradients"]
            assert it["gradients"] + it["buffers"] <= plain["gradients"] + plain["buffers"]


def communication(rank, size, name):
    """Bytes sent by an update of plain DistributedDataParallel, and by each iteration."""
    model = create(name)
    ddp = DistributedDataParallel(model)
    images, _ = digit_images(2, SMALL[name][0])

    def backward():
        with Traffic() as sent:
            ddp(images).square().sum().backward()
        return {"gradients": sent["allreduce_"], "buffers": sent["broadcast_"]}

    for _ in range(3):  # in the first ones the wrapper settles its buckets
        plain = backward()
    rdp = ResidualDropPath(ddp, example_input=images)
    iterations = []
    for _ in range(6):
        for it in rdp.cycle():
            with it:
                trained = 4 * sum(model.get_parameter(n).numel() for n in it.trainable)
                iterations.append({"phase": it.phase, "trained": trained, **backward()})
                model.zero_grad()
    return plain, iterations


class Traffic(TorchDispatchMode):
    """Bytes handed to each collective operation, whoever calls it."""

    def __enter__(self):
        super().__enter__()
        self.bytes = collections.Counter()
        return self.bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            size = sum(t.numel() * t.element_size() for t in args[0])
            self.bytes[function._schema.name.removeprefix("c10d::")] += size
        return function(*args, **(kwargs or {}))


def test_communication_overlaps_with_the_backward_pass(ranks):
    plain, iterations = ranks.run(launches_before_the_last_gradient)[0]
    assert plain > 2
    assert iterations[0] >= plain - 1  # nothing was dropped
    assert min(iterations) >= 1


def launches_before_the_last_gradient(rank, size):
    """Reductions that begin while gradients are being made: plain, and per droppath iteration."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=4, num_classes=10, drop_path_rate=0.5
    )
    ddp = DistributedDataParallel(model, bucket_cap_mb=1)
    images, _ = digit_images(2)

    def backward():
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            ddp(images).square().sum().backward()
        events = seen.events()
        last = max(e.time_range.start for e in events if "AccumulateGrad" in e.name)
        return sum(e.name == "c10d::allreduce_" and e.time_range.start < last for e in events)

    for _ in range(3):  # in the first ones the wrapper settles its buckets
        plain = backward()
        model.zero_grad()
    rdp = ResidualDropPath(ddp)
    probs = [path.drop_prob for path in rdp.paths]
    iterations = []
    for cycle in range(6):
        for path, prob in zip(rdp.paths, probs, strict=True):
            path.module.drop_prob = prob if cycle else 0.0
        for it in rdp.cycle():
            with it:
                launched = backward()
                model.zero_grad()
            if it.phase == "droppath":
                iterations.append(launched)
    return plain, iterations
