"""Generators of random numbers whose saved state also serves on another kind of device."""

from __future__ import annotations

import logging
import zlib

from torch import Generator, Tensor

logger = logging.getLogger(__name__)


def restore_generator(generator: Generator, state: Tensor) -> None:
    """Go on from a saved state, or, if it comes from another kind of device (CPU or CUDA), from a seed made of it.

    The run then continues with other random numbers than it would have drawn there, and says so.
    """
    try:
        generator.set_state(state)
    except RuntimeError:
        generator.manual_seed(zlib.crc32(state.cpu().numpy().tobytes()))
        logger.warning(
            "random numbers were saved on another kind of device than %s: they start from a seed made of that state.",
            generator.device.type,
        )
