"""timm_rdp.transformers.RDPCallback: Hugging Face's Trainer runs the iterations of the method."""

import json
import os

import pytest
import torch
from core_helpers import loss_of, parameters_of, same_bits, small_model
from ranks import Ranks
from torch import nn
from torch.utils.data import SequentialSampler
from trained import Iterations, adamw, loader, written_out

transformers = pytest.importorskip("transformers", reason='needs the extra "clients"')
pytest.importorskip("accelerate", reason='needs the extra "clients"')
from timm_rdp.transformers import RDPCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory:UserWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


class OwnLoss(InOrder):
    """For models that return no loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])
        return (loss, {}) if return_outputs else loss


def wrapped_model():
    """The model of transformers that holds a timm model."""
    options = {"drop_path_rate": 0.5, "img_size": 32}
    config = transformers.TimmWrapperConfig(
        architecture="test_vit", num_labels=10, model_args=options
    )
    model = transformers.TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(small_model("test_vit").state_dict())
    return model


def made(folder, model=None, kind=InOrder, **options):
    model = wrapped_model() if model is None else model
    images = [{"pixel_values": i, "labels": label} for i, label in loader().dataset]
    given = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    args = transformers.TrainingArguments(str(folder), **(given | options))
    optimizers = (adamw(model), None)
    return kind(model, args, train_dataset=images, eval_dataset=images, optimizers=optimizers)


def trained(folder, callback=(), resume=None, **options):
    """The timm model after training, and the trainer."""
    trainer = made(folder, **options)
    trainer.add_callback(RDPCallback(trainer, *callback))
    trainer.train(resume_from_checkpoint=resume)
    return getattr(trainer.model, "timm_model", trainer.model), trainer


@pytest.mark.parametrize("how", ["same", "next"])
def test_every_step_of_the_trainer_is_the_iterations_of_the_method(tmp_path, monkeypatch, how):
    iterations = Iterations(monkeypatch)
    model, trainer = trained(tmp_path, [how], eval_strategy="steps", eval_steps=3)
    assert trainer.state.global_step == 10
    assert iterations.are_those_of(10, how)
    assert same_bits(parameters_of(model), written_out(10, how))


@pytest.mark.parametrize("how", ["same", "next"])
def test_accumulation_and_the_trainers_clipping_are_followed(tmp_path, how):
    options = {"gradient_accumulation_steps": 5, "max_grad_norm": 0.3, "num_train_epochs": 4}
    model, trainer = trained(tmp_path, [how], **options)
    assert trainer.state.global_step == 4
    assert same_bits(parameters_of(model), written_out(4, how, accumulate=5, clip=0.3))


@pytest.mark.parametrize("how", ["same", "next"])
def test_a_loss_of_the_trainers_own_is_computed_again(tmp_path, how):
    model, trainer = trained(tmp_path, [how], model=small_model("test_vit"), kind=OwnLoss)
    assert same_bits(parameters_of(model), written_out(10, how))
    assert "training_step" not in vars(trainer)


@pytest.mark.parametrize("how", ["same", "next"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, how):
    options = {"save_strategy": "steps", "save_steps": 5}
    whole, _ = trained(tmp_path / "whole", [how], **options)
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["timm_rdp"]
    assert kept["phase"] == ("complement" if how == "next" else "droppath")
    resumed, trainer = trained(tmp_path / "resumed", [how], str(checkpoint), **options)
    assert trainer.state.global_step == 10
    assert same_bits(parameters_of(whole), parameters_of(resumed))


def test_an_exception_leaves_nothing_behind_after_detach_or_the_next_training(tmp_path):
    class Fails(OwnLoss):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            if self.calls in (2, 4):  # of a complement iteration, of a droppath iteration
                raise ArithmeticError("once")
            return super().compute_loss(*args, **kwargs)

    trainer = made(tmp_path, small_model("test_vit"), Fails)
    callback = RDPCallback(trainer)
    trainer.add_callback(callback)
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="once"):
            trainer.train()
    callback.detach()
    for module, other in zip(
        trainer.model.modules(), small_model("test_vit").modules(), strict=True
    ):
        assert type(module) is type(other)
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.requires_grad for p in trainer.model.parameters())
    trainer.train()
    assert callback.controller is None


def test_what_cannot_be_trained_so_is_refused_in_one_line(tmp_path):
    trainer = made(tmp_path, small_model("test_vit"), OwnLoss)
    trainer.add_callback(RDPCallback(trainer))
    trainer.create_optimizer()
    for wrapper in (nn.DataParallel(trainer.model), nn.Sequential(trainer.model)):
        trainer.model_wrapped = wrapper
        with pytest.raises(ValueError) as error:
            trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        assert type(wrapper).__name__ in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="takes the Trainer first, not a VisionTransformer"):
        RDPCallback(trainer.model)
    other = made(tmp_path, small_model("test_vit"), OwnLoss)
    other.add_callback(RDPCallback(trainer))
    with pytest.raises(ValueError, match="made for another Trainer"):
        other.train()


def in_processes(rank, size, folder, how, accumulate):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    options = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2}
    trainer = made(folder, small_model("test_vit"), OwnLoss, max_grad_norm=0.3, **options)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9)
    trainer.optimizer = optimizer
    trainer.add_callback(RDPCallback(trainer, how))
    trainer.train()
    assert trainer.args.world_size == size
    return parameters_of(trainer.model)


@pytest.mark.xdist_group("transformers in processes")
@pytest.mark.parametrize("how, accumulate", [("same", 5), ("next", 1)])
def test_ranks_agree_and_train_as_one_process_on_all_batches(ranks, tmp_path, how, accumulate):
    first, second = ranks.run(in_processes, str(tmp_path), how, accumulate)
    assert same_bits(first, second)

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    alone = written_out(10 // accumulate, how, accumulate, clip=0.3, optimizer=sgd)
    assert all(torch.allclose(first[name], alone[name], atol=1e-6) for name in alone)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = Ranks(tmp_path_factory.mktemp("ranks"))
    yield processes
    processes.stop()


def test_the_loss_of_the_written_out_loop_is_that_of_the_trainer():
    images, labels = next(iter(loader()))
    ours = loss_of(small_model("test_vit").eval(), images, labels)
    theirs = wrapped_model().eval()(images, labels=labels).loss
    assert same_bits(ours, theirs)
