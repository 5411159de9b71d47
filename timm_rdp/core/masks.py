"""Masks as a pure function of seed and cycle."""

import random
from collections.abc import Sequence


def sample_masks(
    seed: int, cycle: int, drop_probs: Sequence[float], stream: str = ""
) -> tuple[bool, ...]:
    """Decide for each residual path whether cycle `cycle` keeps it.

    The decisions depend on nothing but the arguments: they are the same on every rank, device and
    platform, and no global random state is read or moved. Python's Mersenne Twister is used because
    its output for a given seed is guaranteed across versions, which torch's generators are not.

    Args:
        seed: seed of the run, any integer.
        cycle: cycle number, 0, 1, 2, ...
        drop_probs: probability with which each path is dropped, in call order.
        stream: of another name, draws independently of the cycle's own masks.

    Returns:
        One bool per path, True = kept.
    """
    generator = random.Random(f"ResidualDroppath {seed} {cycle}{stream}")
    return tuple(generator.random() >= p for p in drop_probs)
