"""The losses of STORM's world model (Zhang et al. 2023, "World model learning")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from worldloom import functional as fn
from worldloom.storm.layers import Statistics
from worldloom.storm.networks import STORMNetworks
from worldloom.storm.transformer import Dropped, segments
from worldloom.types import Batch


@dataclass(frozen=True)
class WorldNoise:
    """All random numbers of the world model's losses on T trained rows."""

    posterior: Tensor  # [B, T, S, K] standard exponential
    dropped: Sequence[Dropped] | None  # one for each block of the transformer


@dataclass(frozen=True)
class WorldLosses:
    """The world model's losses, means over the batch, and what its batch norms saw."""

    total: Tensor
    parts: dict[str, Tensor]  # scalars, unscaled
    seen: Statistics


def draw_world_noise(networks: STORMNetworks, batch: int, steps: int, generator: Generator | None = None) -> WorldNoise:
    """Draw all random numbers of `world_losses` for windows [batch, steps + 1]."""
    posterior = networks.draw_noise(batch, steps, generator=generator)
    return WorldNoise(posterior, networks.transformer.draw_dropped(batch, steps, generator))


def world_losses(networks: STORMNetworks, batch: Batch, noise: WorldNoise) -> WorldLosses:
    """Return the losses of windows [B, T + 1] (Zhang et al. 2023, "World model learning"), a pure function.

    Observations are read in rows 0 to T - 1, actions, rewards and ends in rows 1 to T. loss = squared error, summed
    over pixels + CE(reward, two-hot symlog r) + BCE(termination) + dynamics_scale max(1, mean KL(sg(q) || p))
    + representation_scale max(1, mean KL(q || sg(p))), with q_t the posterior and p_t the prior of row t. Raises
    ValueError for bad shapes.
    """
    c = networks.config
    obs, (actions, rewards, first, terminated) = rows_of(networks, batch)
    seen: Statistics = []
    shown = {name: value[:, :-1] for name, value in obs.items()}
    log_q, z = networks.see(shown, noise.posterior, seen)
    errors = networks.decoder.losses(networks.decoder(z, seen), shown)
    _, positions, allowed = segments(first[:, 1:])
    tokens = networks.token(z, actions[:, 1:], first[:, 1:])
    h = networks.transformer(tokens, positions, allowed, noise.dropped)
    parts = {"reconstruction_loss": sum(errors.values(), torch.zeros_like(rewards[:, 1:])).mean()}
    parts |= head_losses(networks, h, rewards[:, 1:], terminated[:, 1:])
    log_q, log_p = log_q[:, 1:], networks.log_probs(networks.prior(h))[:, :-1]
    parts |= kl_losses(log_q, log_p, c.free_nats)
    total = (
        parts["reconstruction_loss"]
        + parts["reward_loss"]
        + parts["termination_loss"]
        + c.dynamics_scale * parts["dynamics_loss"]
        + c.representation_scale * parts["representation_loss"]
    )
    parts |= {"posterior_entropy": fn.categorical_entropy(log_q), "prior_entropy": fn.categorical_entropy(log_p)}
    if isinstance(networks.obs_shape, dict):
        parts |= {f"reconstruction/{name}": error.mean() for name, error in errors.items()}
    return WorldLosses(total, parts, seen)


def head_losses(networks: STORMNetworks, h: Tensor, rewards: Tensor, terminated: Tensor) -> dict[str, Tensor]:
    target = fn.two_hot(fn.symlog(rewards), networks.bins)
    ends = networks.termination(h).float().squeeze(-1)
    return {
        "reward_loss": fn.soft_cross_entropy(networks.reward(h).float(), target).mean(),
        "termination_loss": F.binary_cross_entropy_with_logits(ends, terminated),
    }


def kl_losses(log_q: Tensor, log_p: Tensor, nats: float) -> dict[str, Tensor]:
    """Return both KLs, scalars: the mean is taken before the floor, so below it the whole batch has no gradient."""
    return {
        "dynamics_loss": fn.free_nats(fn.categorical_kl(log_q.detach(), log_p).mean(), nats),
        "representation_loss": fn.free_nats(fn.categorical_kl(log_q, log_p.detach()).mean(), nats),
    }


def rows_of(networks: STORMNetworks, batch: Batch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return observations by key, and actions [B, R, A], rewards, is_first and terminated [B, R] of R rows.

    Flags that are missing become False. Raises ValueError for wrong shapes, or fewer than 3 rows or too many."""
    obs, actions = networks.as_mapping(batch["obs"], "batch['obs']", 2), batch["actions"]
    lead, most = (actions.shape[0], actions.shape[1]), networks.config.max_length + 1
    networks.check_action("batch['actions']", actions, lead)
    if not 3 <= lead[1] <= most:
        raise ValueError(f"the batch has {lead[1]} rows, expected 3 to {most}: agent.max_length and a first one.")
    rewards = batch["rewards"].float()
    terminated = 1 - batch["continues"] if "continues" in batch else torch.zeros_like(rewards)
    terminated = batch.get("terminated", terminated).float()
    first = batch.get("is_first", torch.zeros_like(rewards)).bool()
    flags = {"rewards": rewards, "is_first": first, "terminated": terminated}
    for name, value in {**obs, **flags}.items():
        if (tuple(value.shape) if name in flags else tuple(value.shape[:2])) != lead:
            raise ValueError(f"batch: {name!r} is {tuple(value.shape)} and actions [{lead[0]}, {lead[1]}, A].")
    return obs, (actions.float(), rewards, first, terminated)
