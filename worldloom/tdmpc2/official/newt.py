"""Checkpoints of Newt, TD-MPC2's successor for 200 tasks (Hansen et al. 2025, https://arxiv.org/abs/2511.19584).

Newt acts as TD-MPC2 does, with the same networks. Its files differ in three things: each value head has tensors of its
own; task embeddings are given vectors of language, of any norm; and all observations and actions are filled up with
zeros, in models of one task too. Source: the authors' code (github.com/nicklashansen/newt, commit 75def92),
tdmpc2/common/world_model.py, common/layers.py and tdmpc2.py.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

HEAD = re.compile(r"_Qs\.(online|target)\._Qs\.(\d+)\.(.+)")
GROUPS = {"online": "_Qs.params.", "target": "_target_Qs_params."}  # in layout C, where heads are stacked
READS_ACTIONS = ("_dynamics.0.weight", "_reward.0.weight", "_Qs.params.0.weight", "_target_Qs_params.0.weight")
POLICY = ("_pi.2.weight", "_pi.2.bias")  # rows of means, then of log standard deviations
ENCODER, MASKS = "_encoder.state.0.weight", "_action_masks"


def is_newt(state: State) -> bool:
    """Return whether these are tensors of Newt."""
    return any(HEAD.fullmatch(key) for key in state)


def from_newt(state: State, obs_size: int | None, path: object = "the checkpoint") -> State:
    """Return tensors of Newt under the names of layout C.

    A model of one task comes without the actions that it does not use and, with obs_size, without the observation's
    entries from there on: both are always zero, so that it acts the same. Raises ValueError for other tensors.
    """
    state = _with_stacked_heads(state, path)
    if "_task_emb.weight" in state:
        return state
    used, total = _used_actions(state.pop(MASKS, torch.zeros(0)), path)
    for name in (name for name in (*READS_ACTIONS, *POLICY, ENCODER) if name in state):
        value = state[name]
        if not value.ndim or (name in POLICY and len(value) != 2 * total):
            raise ValueError(f"{path}: {name} has shape {tuple(value.shape)}, which {total} actions do not fit.")
        if name in POLICY:
            state[name] = torch.cat([value[:used], value[total : total + used]])
        else:
            state[name] = value[..., :obs_size] if name == ENCODER else value[..., : value.shape[-1] - total + used]
    return state


def _used_actions(masks: Tensor, path: object) -> tuple[int, int]:
    """Return how many actions the masks [environments, A] of one task let through, the first ones, and A."""
    used = int(masks[0].sum()) if masks.ndim == 2 else 0
    if used < 1 or not torch.equal(masks.float(), (torch.arange(masks.shape[1]) < used).float().expand_as(masks)):
        raise ValueError(f"{path}: {MASKS} is not that of one task, expected ones, then zeros, the same in all rows.")
    return used, masks.shape[1]


def _with_stacked_heads(state: State, path: object) -> State:
    found: dict[str, dict[int, Tensor]] = {}
    rest = {}
    for key, value in state.items():
        if match := HEAD.fullmatch(key):
            found.setdefault(GROUPS[match[1]] + match[3], {})[int(match[2])] = value
        else:
            rest[key] = value
    for name, heads in found.items():
        if sorted(heads) != list(range(len(heads))) or len({value.shape for value in heads.values()}) > 1:
            raise ValueError(f"{path}: the value heads' tensors {name} are missing or of different shapes.")
        rest[name] = torch.stack([heads[number] for number in range(len(heads))])
    return rest
