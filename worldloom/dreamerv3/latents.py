"""Latents as replay stores them; an update starts from the stored state before its first row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.capture import Tensors
from worldloom.dreamerv3.config import DreamerV3Config
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.types import ColumnSpec


def latent_columns(config: DreamerV3Config) -> Mapping[str, ColumnSpec]:
    """Return the replay columns of one state: deter as the bits of bfloat16, stoch as class indices.

    They take about 40 % of the bytes of float32. There are none if updates start from zeros (replay_context).
    """
    if config.replay_context != "stored":
        return {}
    return {
        "deter": ColumnSpec((config.deter,), "uint16", context_only=True),
        "stoch": ColumnSpec((config.stoch,), "uint8", context_only=True),
    }


def compact(state: RSSMState) -> Tensors:
    """Return a state as replay keeps it: deter as bfloat16 bits [..., D] uint16, stoch as indices [..., S] uint8."""
    bits = state.deter.detach().to(torch.bfloat16).contiguous().view(torch.uint16)
    return {"deter": bits, "stoch": state.stoch.detach().argmax(-1).to(torch.uint8)}


def expand(deter: Tensor, stoch: Tensor, classes: int) -> RSSMState:
    """Return the float32 state of compact columns: the inverse of `compact`, up to rounding. classes: K."""
    wide = deter.contiguous().view(torch.bfloat16).float()
    return RSSMState(wide, fn.one_hot(stoch, classes).float())
