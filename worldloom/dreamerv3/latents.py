"""Latents as replay stores them: an update of later rows starts from the state before its first row."""

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
    """The replay columns of one state: deter as the bits of bfloat16, stoch as class indices, a seventh of float32.

    Empty where updates start from zeros (replay_context).
    """
    if config.replay_context != "stored":
        return {}
    return {
        "deter": ColumnSpec((config.deter,), "uint16", context_only=True),
        "stoch": ColumnSpec((config.stoch,), "uint8", context_only=True),
    }


def compact(state: RSSMState) -> Tensors:
    """A state as replay keeps it: deter as bfloat16 bits [..., D] uint16, stoch as class indices [..., S] uint8."""
    bits = state.deter.detach().to(torch.bfloat16).contiguous().view(torch.uint16)
    return {"deter": bits, "stoch": state.stoch.detach().argmax(-1).to(torch.uint8)}


def expand(deter: Tensor, stoch: Tensor, classes: int) -> RSSMState:
    """The inverse of `compact`, in float32."""
    wide = deter.contiguous().view(torch.bfloat16).float()
    return RSSMState(wide, fn.one_hot(stoch, classes).float())
