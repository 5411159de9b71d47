"""ResidualDroppath in Hugging Face's Trainer: `trainer.add_callback(RDPCallback(trainer))`."""

from contextlib import nullcontext
from typing import Any

from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback  # pyright: ignore

from timm_rdp.callbacks import TrainsWithRDP

KEY = "timm_rdp"  # in the trainer_state.json of each checkpoint


class RDPCallback(TrainsWithRDP, TrainerCallback):  # pyright: ignore
    """Trains the model of a Trainer, which is the first argument.

    Each checkpoint's `trainer_state.json` holds where the cycles stand, and
    `train(resume_from_checkpoint=...)` continues there.
    """

    def __init__(self, trainer: Any, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if not hasattr(trainer, "callback_handler"):
            raise ValueError(f"RDPCallback takes the Trainer first, not a {type(trainer).__name__}")
        self._trainer = trainer
        self._calls: list[tuple[tuple, dict]] = []  # of training_step(), for the coming step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Patch the model and attach to the optimizer."""
        if state is not self._trainer.state:
            raise ValueError("this RDPCallback was made for another Trainer: make one for this")
        self.detach()
        self._state = state.stateful_callbacks.get(KEY, {})
        trainer, calls = self._trainer, self._calls
        training_step = trainer.training_step

        def clip() -> None:
            if args.max_grad_norm:
                clip_grad_norm_(trainer.model.parameters(), args.max_grad_norm)

        def noted(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return training_step(*args, **kwargs)

        def again() -> None:
            for i, (args, kwargs) in enumerate(calls, start=1):
                accumulates = i < len(calls)
                with trainer.accelerator.no_sync(args[0]) if accumulates else nullcontext():
                    training_step(*args, **kwargs)

        self._attach(trainer.model, trainer.model_wrapped, trainer.optimizer, clip, again)
        trainer.training_step = noted

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the batches of the last step."""
        self._calls.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note where the cycles stand: a checkpoint may follow."""
        state.stateful_callbacks[KEY] = self.state_dict()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the model back."""
        self.detach()

    def detach(self) -> None:
        """Give the model back, also after an exception, which the Trainer does not report."""
        self._calls.clear()
        vars(self._trainer).pop("training_step", None)
        super().detach()
