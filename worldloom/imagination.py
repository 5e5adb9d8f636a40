"""Imagined episodes: a world model observes some steps and predicts the rest open loop under the true actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.types import Array, WorldModel, is_image, join_obs, split_obs

OBSERVED = 5  # steps, as the DreamerV3 paper shows them


@dataclass(frozen=True)
class OpenLoop:
    """T rows of one episode, and the model's predictions of them; images are floats in [0, 1], channel-first.

    The first `observed` predictions saw their own observation, later ones saw none. `predicted` is empty for a model
    without a decoder.
    """

    observed: int  # rows
    truth: Mapping[str, Array]  # [T, ...] by key; "obs" for a single observation
    predicted: Mapping[str, Array]  # [T, ...] by key
    true_rewards: Array  # [T - observed], of the imagined rows
    predicted_rewards: Array  # [T - observed]
    reward: str = "reward"  # what both of them are, in words

    @property
    def steps(self) -> int:
        """The number of rows, T."""
        return self.observed + len(self.true_rewards)


@torch.no_grad()
def open_loop(
    model: WorldModel, obs: Any, actions: Array, rewards: Array, observed: int = OBSERVED, seed: int = 0
) -> OpenLoop:
    """Observe the first rows of an episode, then imagine the others.

    obs: [T, *obs_shape] or a mapping, actions [T, A], rewards [T], aligned as rows (`worldloom.types`): row 0's
    action and reward are not read. observed: rows, at least 1 and fewer than T. seed: for the model's draws;
    torch's own generator stays as it was. A model whose `predicts_signs` is true is compared with the rewards' signs.
    Raises ValueError for shorter sequences.
    """
    steps = len(actions)
    if not 1 <= observed < steps:
        raise ValueError(f"open_loop: observed is {observed} of {steps} rows, expected at least 1 and fewer than that.")
    device = next(cast(torch.nn.Module, model).parameters()).device
    parts = {name: torch.as_tensor(value, device=device) for name, value in split_obs(obs).items()}
    moves = torch.as_tensor(actions, device=device).float().unsqueeze(1)  # [T, 1, A]

    def row(t: int) -> Any:
        return join_obs({name: value[t : t + 1] for name, value in parts.items()})

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        states = [model.encode(row(0))]
        for t in range(1, observed):
            states.append(model.observe(states[-1], moves[t], row(t)))
        imagined = model.imagine(states[-1], moves[observed:])
        decoded = [model.decode(state)["obs"] for state in [*states, *imagined.states[1:]]]
    predicted: dict[str, Array] = {}
    if decoded[0] is not None:
        by_row = [split_obs(each) for each in decoded]
        predicted = {_key(name): _numbers(torch.cat([each[name] for each in by_row])) for name in by_row[0]}
    true_rewards, signs = np.asarray(rewards, np.float32)[observed:], getattr(model, "predicts_signs", False)
    return OpenLoop(
        observed,
        {_key(name): _numbers(value) for name, value in parts.items()},
        predicted,
        np.sign(true_rewards) if signs else true_rewards,
        _numbers(imagined.rewards[:, 0, 0]),
        "sign of reward" if signs else "reward",
    )


def _key(column: str) -> str:
    return column.removeprefix("obs/")


def _numbers(value: Tensor) -> Array:
    """Return images as floats in [0, 1], and everything else in its own units."""
    shown = fn.unit_pixels(value) if is_image(tuple(value.shape[1:])) else value.float()
    array: Array = shown.cpu().numpy()
    return array
