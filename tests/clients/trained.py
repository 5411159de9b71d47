"""What the tests of the trainers share: batches, the loop written out, and a look at iterations."""

from typing import Any

import torch
from core_helpers import batch, buffers_of, changed, loss_of, parameters_of, small_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from timm_rdp import ResidualDropPath


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def loader(count: int = 20, size: int = 4) -> DataLoader:
    """Digits in batches, always in the same order."""
    return DataLoader(TensorDataset(*batch("test_vit", count)), size)


def written_out(
    steps: int,
    how: str,
    accumulate: int = 1,
    clip: float = 0.0,
    name: str = "test_vit",
    optimizer: Any = adamw,
    size: int = 4,
    per_epoch: int = 5,
) -> dict[str, Tensor]:
    """The parameters after as many steps on the batches of loader(), without a trainer."""
    model = small_model(name)
    optimizer, rdp = optimizer(model), ResidualDropPath(model)
    for step in range(steps):
        for it in rdp.cycle() if how == "same" else [rdp.iteration()]:
            with it:
                for i in range(step * accumulate, (step + 1) * accumulate):
                    images = batch(name, size, size * (i % per_epoch))
                    (loss_of(model, *images) / accumulate).backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return parameters_of(model)


class Iterations:
    """Notes every iteration of every controller, and what changed in it."""

    def __init__(self, patch: Any):
        self.seen: list[tuple[str, int]] = []
        self._after: dict | None = None
        enter, leave = ResidualDropPath._enter, ResidualDropPath._leave

        def entered(rdp: ResidualDropPath, it: Any) -> None:
            enter(rdp, it)
            if rdp._loop is None:  # a loop that is written out
                return
            self._before = self._all(rdp)
            if self._after is not None and self._rdp is rdp:
                assert not changed(self._after, self._before), "changed between iterations"
            self._rdp = rdp

        def left(rdp: ResidualDropPath, completed: bool, aside: bool = False) -> None:
            it = rdp._active
            assert it is not None
            leave(rdp, completed, aside)
            if completed and rdp._loop is not None:
                self._check(rdp, it)

        patch.setattr(ResidualDropPath, "_enter", entered)
        patch.setattr(ResidualDropPath, "_leave", left)

    def _all(self, rdp: ResidualDropPath) -> dict[str, Any]:
        """Parameters, the optimizer's state of each, and buffers."""
        optimizer = rdp._loop._optimizer
        state = getattr(optimizer, "_own", optimizer).state
        found = parameters_of(rdp.model)
        for name, p in rdp.model.named_parameters():
            own = state[p].items() if p in state else ()
            kept = {k: v.clone() if isinstance(v, Tensor) else v for k, v in own}
            found[f"state of {name}"] = kept
        return found | {f"buffer {n}": b for n, b in buffers_of(rdp.model).items()}

    def _check(self, rdp: ResidualDropPath, it: Any) -> None:
        self._after = self._all(rdp)
        moved = changed(self._before, self._after)
        assert {n for n in moved if n in dict(rdp.model.named_parameters())} == it.trainable
        states = {n.removeprefix("state of ") for n in moved if n.startswith("state of ")}
        assert states <= it.trainable
        if it.phase == "droppath":
            dropped = rdp.dropped_part(it.dropped)
            buffers = {n.removeprefix("buffer ") for n in moved if n.startswith("buffer ")}
            assert not {n for n in buffers if f"{n.rpartition('.')[0]}.weight" in dropped}
        self.seen.append((it.phase, it.cycle))

    def are_those_of(self, steps: int, how: str, first: int = 0) -> bool:
        """Whether they are the iterations of so many steps of the trainer, from the first on."""
        rdp = ResidualDropPath(small_model("test_vit"))
        expected: list[tuple[str, int]] = []
        for step in range(first + steps):
            for it in rdp.cycle() if how == "same" else [rdp.iteration()]:
                with it:
                    pass
                if step >= first:
                    expected.append((it.phase, it.cycle))
        assert {"droppath", "complement"} == {phase for phase, _ in expected}
        return self.seen == expected
