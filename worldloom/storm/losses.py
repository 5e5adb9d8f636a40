"""The losses of STORM's world model (Zhang et al. 2023, "World model learning")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from worldloom import functional as fn
from worldloom.gang import ALONE, Gang
from worldloom.nets import Statistics
from worldloom.storm.networks import STORMNetworks
from worldloom.storm.transformer import Dropped, segments
from worldloom.types import Batch


@dataclass(frozen=True)
class WorldNoise:
    """Holds all random numbers of the world model's losses on T trained rows."""

    posterior: Tensor  # [B, T, S, K] standard exponential
    dropped: Sequence[Dropped]  # one for each block of the transformer, or none


@dataclass(frozen=True)
class WorldLosses:
    """The world model's losses, means over the batch, and what its batch norms saw."""

    total: Tensor
    parts: dict[str, Tensor]  # scalars, unscaled
    seen: Statistics


def draw_world_noise(
    networks: STORMNetworks, batch: int, steps: int, generator: Generator | None = None, gang: Gang = ALONE
) -> WorldNoise:
    """Draw all random numbers of `world_losses` for windows [batch, steps + 1]; in a gang, a learner's share."""
    posterior = networks.draw_noise(batch * gang.size, steps, generator=generator)
    dropped = networks.transformer.draw_dropped(batch * gang.size, steps, generator)
    return WorldNoise(gang.share(posterior, 0), [each.share(gang) for each in dropped])


def world_losses(networks: STORMNetworks, batch: Batch, noise: WorldNoise, gang: Gang = ALONE) -> WorldLosses:
    """Return the losses of windows [B, T + 1] (Zhang et al. 2023, "World model learning"), a pure function.

    Observations are read in rows 0 to T - 1, actions, rewards and ends in rows 1 to T. loss = squared error, summed
    over pixels + CE(reward, two-hot symlog r) + BCE(termination) + dynamics_scale max(1, mean KL(sg(q) || p))
    + representation_scale max(1, mean KL(q || sg(p))), with q_t the posterior and p_t the prior of row t. gang: of
    learners, whose shares of a batch these windows are; both KLs and batch norms are those of the whole batch. Raises
    ValueError for bad shapes.
    """
    c = networks.config
    seen = Statistics(gang)
    obs, steps = networks.read(batch)
    shown = {name: value[:, :-1] for name, value in obs.items()}
    actions, rewards, first = steps.actions[:, 1:], steps.rewards[:, 1:], steps.is_first[:, 1:]
    log_q, z = networks.see(shown, noise.posterior, seen)
    errors = networks.decoder.losses(networks.decoder(z, seen), shown)
    _, positions, allowed = segments(first)
    h = networks.transformer(networks.token(z, actions, first), positions, allowed, noise.dropped)
    log_q, log_p = log_q[:, 1:], networks.log_probs(networks.prior(h))[:, :-1]
    ends = networks.termination(h).float().squeeze(-1)
    target = fn.two_hot(fn.symlog(rewards), networks.bins)
    parts = {
        "reconstruction_loss": sum(errors.values(), torch.zeros_like(rewards)).mean(),
        "reward_loss": fn.soft_cross_entropy(networks.reward(h).float(), target).mean(),
        "termination_loss": F.binary_cross_entropy_with_logits(ends, steps.terminated[:, 1:]),
        # the mean is taken before the floor, so that below it the whole batch gives no gradient
        "dynamics_loss": fn.free_nats(gang.average(fn.categorical_kl(log_q.detach(), log_p).mean()), c.free_nats),
        "representation_loss": fn.free_nats(gang.average(fn.categorical_kl(log_q, log_p.detach()).mean()), c.free_nats),
    }
    kl = c.dynamics_scale * parts["dynamics_loss"] + c.representation_scale * parts["representation_loss"]
    total = parts["reconstruction_loss"] + parts["reward_loss"] + parts["termination_loss"] + kl
    parts["kl_loss"] = kl
    parts |= {"posterior_entropy": fn.categorical_entropy(log_q), "prior_entropy": fn.categorical_entropy(log_p)}
    if isinstance(networks.obs_shape, dict):
        parts |= {f"reconstruction/{name}": error.mean() for name, error in errors.items()}
    return WorldLosses(total, parts, seen)
