"""timm_rdp.lightning.RDP: Lightning's trainer runs the iterations, and they are those of a loop."""

import os

import pytest
import torch
from core_helpers import batch, loss_of, parameters_of, same_bits, small_model
from ranks import Ranks
from torch.utils.data import DataLoader, DistributedSampler
from trained import Iterations, adamw, loader, written_out

from timm_rdp import ResidualDropPath

lightning = pytest.importorskip("lightning.pytorch", reason='needs the extra "clients"')
from timm_rdp.lightning import RDP  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


class Classifier(lightning.LightningModule):
    def __init__(self, name="test_vit"):
        super().__init__()
        self.net, self.losses = small_model(name), []

    def training_step(self, images_and_labels, index):
        loss = loss_of(self.net, *images_and_labels)
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, images_and_labels, index):
        self.log("validation", loss_of(self.net, *images_and_labels))

    def configure_optimizers(self):
        return adamw(self)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def fit(module, callbacks, validate=True, ckpt_path=None, **options):
    trainer = lightning.Trainer(callbacks=callbacks, **{**QUIET, "max_epochs": 2, **options})
    trainer.fit(module, loader(), loader(8) if validate else None, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("how", ["same", "next"])
def test_every_step_of_the_trainer_is_the_iterations_of_the_method(monkeypatch, how):
    iterations = Iterations(monkeypatch)
    module = Classifier()
    trainer = fit(module, [RDP(how)])
    assert trainer.global_step == 10
    assert iterations.are_those_of(10, how)
    assert same_bits(parameters_of(module.net), written_out(10, how))


@pytest.mark.parametrize("how", ["same", "next"])
def test_accumulation_and_the_trainers_clipping_are_followed(how):
    module = Classifier()
    options = {"accumulate_grad_batches": 5, "gradient_clip_val": 0.3, "max_epochs": 4}
    assert fit(module, [RDP(how)], **options).global_step == 4
    expected = written_out(4, how, accumulate=5, clip=0.3)
    assert same_bits(parameters_of(module.net), expected)
    assert not same_bits(expected, written_out(4, how, accumulate=5))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_a_loss_scale_is_taken_out_of_both_iterations(clip):
    def weights(scaler):
        precision = lightning.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
        precision.autocast_context_manager = lambda: torch.autocast("cpu", torch.bfloat16)
        module = Classifier()
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
        fit(module, [RDP()], plugins=[precision], gradient_clip_val=clip)
        return parameters_of(module.net)

    # Powers of two change no bit, and plain SGD would take a scale that was left in.
    scaled = weights(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert same_bits(scaled, weights(torch.amp.GradScaler("cpu", enabled=False)))


def test_what_is_logged_is_the_droppath_iterations_loss():
    module = Classifier()
    trainer = fit(module, [RDP()], max_epochs=1)
    assert len(module.losses) > 5
    losses, first = iter(module.losses), []
    rdp = ResidualDropPath(small_model("test_vit"))
    for _ in range(5):
        for it in rdp.cycle():
            with it:
                loss = next(losses)
            if it.phase == "droppath":
                first.append(loss)
    assert next(losses, None) is None
    logged = trainer.logged_metrics
    assert logged["loss_step"].item() == pytest.approx(first[-1])
    assert logged["loss_epoch"].item() == pytest.approx(sum(first) / 5)


class Checkpoint(lightning.Callback):
    """Saves a checkpoint after some step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("how", ["same", "next"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, how):
    whole = Classifier()
    path = str(tmp_path / "it.ckpt")
    fit(whole, [RDP(how), Checkpoint(5, path)], max_epochs=2)
    state = torch.load(path)["callbacks"]["RDP"]
    assert state["phase"] == ("complement" if how == "next" else "droppath")
    resumed = Classifier()
    fit(resumed, [RDP(how)], ckpt_path=path)
    assert same_bits(parameters_of(whole.net), parameters_of(resumed.net))
    fresh = Classifier()
    fit(fresh, [RDP(how, seed=1)], max_epochs=2)
    assert not same_bits(parameters_of(whole.net), parameters_of(fresh.net))


def is_unpatched(model):
    other = small_model("test_vit")
    types = [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return types and not hooks and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["same", "next"])
@pytest.mark.parametrize("forward", [1, 2])  # with "same" the second is that of a complement
def test_an_exception_leaves_nothing_behind_and_training_goes_on(how, forward):
    class Fails(Classifier):
        def training_step(self, images_and_labels, index):
            if len(self.losses) == forward:
                self.losses.append(0)
                raise ArithmeticError("once")
            return super().training_step(images_and_labels, index)

    module, callback = Fails(), RDP(how)
    with pytest.raises(ArithmeticError, match="once"):
        fit(module, [callback])
    assert is_unpatched(module.net) and "log" not in vars(module)
    fit(module, [callback])
    assert is_unpatched(module.net)


def test_the_pass_that_renews_batch_norms_for_swa_is_no_training(monkeypatch):
    def run(callbacks):
        module = Classifier("test_resnet")
        swa = lightning.callbacks.StochasticWeightAveraging(1e-3, swa_epoch_start=2)
        fit(module, [*callbacks, swa], max_epochs=3)
        return module

    images = batch("test_resnet", 4)[0]
    iterations = Iterations(monkeypatch)
    module = run([RDP("next")])
    assert len(iterations.seen) == 15  # 3 epochs, and not a fourth
    assert int(module.net.bn1.num_batches_tracked) == 5
    with torch.no_grad():
        assert module.net.eval()(images).isfinite().all()
    assert not any(type(m).__name__.startswith("Masked") for m in module.net.modules())


def one_line(error, *parts):
    message = str(error.value)
    return "\n" not in message and all(part in message for part in parts)


def test_what_cannot_be_trained_so_is_refused_in_one_line(tmp_path):
    manual, two, none = Classifier(), Classifier(), Classifier()
    manual.automatic_optimization = False
    two.teacher = small_model("test_vit")
    none.net = torch.nn.Linear(2, 2)
    for module, callback, parts in (
        (manual, RDP(), ["manual optimization", "attach()"]),
        (two, RDP(), ["2 children with DropPaths ['net', 'teacher']", "RDP(model=...)"]),
        (none, RDP(), ["without DropPaths", "drop_path_rate=0.1"]),
        (torch.compile(Classifier(), backend="eager"), RDP(), ["compiled as a whole"]),
    ):
        with pytest.raises(ValueError) as error:
            fit(module, [callback])
        assert one_line(error, *parts)
    assert is_unpatched(manual.net) and is_unpatched(two.net)
    for options, parts in (
        ({"batch": "other"}, ["'other'", '"next" or "same"']),
        ({"model": two.net}, ["takes the name", "not a VisionTransformer"]),
    ):
        with pytest.raises(ValueError) as error:
            RDP(**options)
        assert one_line(error, *parts)


def test_the_network_can_be_named():
    module = Classifier()
    module.teacher = small_model("test_vit").requires_grad_(False)
    fit(module, [RDP(model="net")])
    assert same_bits(parameters_of(module.net), written_out(10, "same"))


def split(dataset, size, rank):
    """Batches of 2, of which as many as there are ranks make up one of loader()."""
    sampler = DistributedSampler(dataset, size, rank, shuffle=False)
    return DataLoader(dataset, 2, sampler=sampler)


def in_processes(rank, size, how, accumulate, head):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(GROUP_RANK="0", LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", TORCHELASTIC_RUN_ID="t")
    module = Classifier()
    module.configure_optimizers = lambda: sgd(module)
    if head:
        module.head = torch.nn.Linear(10, 10)
    trainer = lightning.Trainer(
        callbacks=[RDP(how)],
        strategy="ddp",
        devices=size,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.3,
        use_distributed_sampler=False,  # it would shuffle
        **QUIET,
    )
    counts = []
    callback = trainer.callbacks[0]

    class Count(lightning.Callback):
        def on_train_batch_end(self, *_):
            counts.append((callback.controller.current_cycle, callback.controller.phase))

    trainer.callbacks.append(Count())
    try:
        trainer.fit(module, split(loader(16).dataset, size, rank), loader(8))
    except ValueError as error:
        return str(error)
    return parameters_of(module.net), counts


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


@pytest.mark.xdist_group("lightning in processes")
@pytest.mark.parametrize("how, accumulate", [("same", 1), ("same", 2), ("next", 1)])
def test_ranks_agree_and_train_as_one_process_on_all_batches(ranks, how, accumulate):
    (first, counts), (second, _) = ranks.run(in_processes, how, accumulate, False)
    assert same_bits(first, second)
    steps = 8 // accumulate
    ends = counts[accumulate - 1 :: accumulate]  # 2 epochs, with a validation between
    assert [cycle for cycle, _ in ends] == [
        step if how == "same" else step // 2 for step in range(1, steps + 1)
    ]
    alone = written_out(steps, how, accumulate, clip=0.3, per_epoch=4, optimizer=sgd)
    assert all(torch.allclose(first[name], alone[name], atol=1e-6) for name in alone)
    other = written_out(steps, how, accumulate, per_epoch=4, optimizer=sgd)
    assert not all(torch.allclose(other[name], alone[name], atol=1e-6) for name in alone)


@pytest.mark.xdist_group("lightning in processes")
def test_parameters_outside_of_the_network_are_refused_under_ddp(ranks):
    for message in ranks.run(in_processes, "same", 1, True):
        assert "head.weight" in message and "\n" not in message
