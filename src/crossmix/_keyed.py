"""Random generators seeded by a key of integers."""

import numpy as np
import torch


def keyed_generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator whose state is a pure function of a key.

    Args:
        *key: Non-negative integers, e.g. seed, stream and step. Similar keys give unrelated streams.
        device: The device that the generator draws on.

    Returns:
        A new generator.

    Raises:
        ValueError: If the key is empty or contains a negative number.

    Example:
        >>> from crossmix.engine import keyed_generator
        >>> torch.equal(torch.rand(2, generator=keyed_generator(0, 7)), torch.rand(2, generator=keyed_generator(0, 7)))
        True
    """
    if not key or min(key) < 0:
        raise ValueError(f"`key` must hold non-negative integers, got {key}; pass e.g. (seed, stream, step).")
    # NumPy pads keys with zeros, which would make (0,) and (0, 0) equal; the length tells them apart.
    seed = int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)
