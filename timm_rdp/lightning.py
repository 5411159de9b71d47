"""ResidualDroppath in Lightning: `Trainer(callbacks=[RDP()])`."""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

from timm_rdp.callbacks import TrainsWithRDP
from timm_rdp.core.foreign import find_drop_paths

try:
    from lightning.pytorch import Callback  # pyright: ignore
except ImportError:  # the package under its other name
    from pytorch_lightning import Callback  # pyright: ignore


class RDP(TrainsWithRDP, Callback):  # pyright: ignore
    """Trains a network of a LightningModule, by default its only child that has DropPaths.

    Checkpoints hold where the cycles stand. What `training_step()` logs is that of the droppath
    iteration.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._batches: list[tuple[Any, int]] = []  # since the gradients were zeroed
        self._paused = ExitStack()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Patch the network and attach to the optimizer."""
        takes = inspect.signature(pl_module.training_step).parameters
        if not pl_module.automatic_optimization:
            why = "manual optimization: attach() to your optimizer in on_fit_start() instead"
        elif getattr(pl_module, "_compiler_ctx", None) is not None:
            why = "a LightningModule compiled as a whole: compile the network in it instead"
        elif "dataloader_iter" in takes and self._batch == "same":
            why = 'training_step(dataloader_iter), which cannot be repeated: use batch="next"'
        else:
            why = self._find_network(pl_module)
        if why:
            raise ValueError(f"RDP() does not support {why}")
        if not trainer.global_step:
            self._state = {}
        optimizer = trainer.optimizers[0]

        def clip() -> None:
            by = (trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            pl_module.configure_gradient_clipping(optimizer, *by)

        def again() -> None:
            self._again(trainer, pl_module, len(takes))

        self._attach(pl_module, trainer.strategy.model, optimizer, clip, again)

    def _find_network(self, module: Any) -> str | None:
        if self._model is None:
            found = [name for name, child in module.named_children() if find_drop_paths(child)]
            if not found:
                return "a module without DropPaths: create its network with drop_path_rate=0.1"
            if len(found) > 1:
                return f"{len(found)} children with DropPaths {found}: name one, RDP(model=...)"
            self._model = found[0]
        return None

    def _again(self, trainer: Any, module: Any, arguments: int) -> None:
        """Forward and backward on the batches of the step, without logging them twice."""
        strategy = trainer.strategy
        module.log = lambda *_, **__: None
        try:
            for i, batch in enumerate(self._batches, start=1):
                accumulates = i < len(self._batches) and strategy.model is not module
                with strategy.model.no_sync() if accumulates else nullcontext():
                    loss = strategy.training_step(*batch[:arguments])
                    loss = loss["loss"] if isinstance(loss, Mapping) else loss
                    if loss is not None:
                        loss = loss / trainer.accumulate_grad_batches
                        strategy.backward(loss, trainer.optimizers[0])
        finally:
            del module.log

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch; no step follows where Lightning's SWA only renews BatchNorms."""
        if self._batch == "same":
            self._batches.append((batch, batch_idx))
        rdp = self.controller
        if trainer.fit_loop._skip_backward and rdp is not None and not rdp._paused:
            self._paused.enter_context(rdp.pause())

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Forget all batches but the current one, which comes before its own backward."""
        del self._batches[:-1]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End the pause of SWA's last pass."""
        self._paused.close()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the network back."""
        self._paused.close()
        self._batches = []
        self.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same after an exception."""
        self.on_train_end(trainer, pl_module)
