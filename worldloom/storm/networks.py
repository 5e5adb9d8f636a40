"""STORM's networks: autoencoder of single observations, transformer over their latents, and heads.

Zhang et al. 2023, "World model learning". In this library rows arrive, so token t is made of the latent of row t - 1
and the action that led to row t, and h_t, read from tokens up to t, predicts row t: its latent, reward and end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn

from worldloom import functional as fn
from worldloom.arguments import Steps, read_steps
from worldloom.nets import BatchNorm, Statistics, relu_head
from worldloom.observations import as_mapping, as_tuples, checked
from worldloom.products import Linear
from worldloom.storm.config import STORMConfig
from worldloom.storm.encoder import Decoder, Encoder
from worldloom.storm.transformer import Transformer, remember
from worldloom.types import Batch, Obs, ObsShape

HEAD_LAYERS = 2  # hidden layers of the reward and termination heads
LIMIT = 20.0  # the two-hot heads' bins reach from -LIMIT to LIMIT, in symlog space


class STORMNetworks(nn.Module):
    """Encoder, posterior, stem of tokens, transformer, prior, decoder, and heads of reward and termination.

    obs_shape: one shape, or a mapping of them; (C, H, W) are images, all others vectors. Vectors are an extension of
    ours, and so are continuous actions. A number -inf marks what was not observed. Raises ValueError for images whose
    sides cannot be halved four times to 3..16.
    """

    bins: Tensor

    def __init__(
        self, obs_shape: ObsShape, action_dim: int, config: STORMConfig | None = None, episode_length: int | None = None
    ) -> None:
        super().__init__()
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}, expected at least 1.")
        self.config = c = config or STORMConfig()
        self.obs_shape, self.action_dim, self.episode_length = as_tuples(obs_shape), action_dim, episode_length
        shapes, latent = as_mapping(self.obs_shape), c.stoch * c.classes
        self.encoder = Encoder(shapes, c.units, c.vector_layers, c.stem_channels)
        self.posterior = Linear(self.encoder.size, latent)
        self.stem = nn.Sequential(
            Linear(latent + action_dim, c.hidden, bias=False),
            nn.LayerNorm(c.hidden),
            nn.ReLU(),
            Linear(c.hidden, c.hidden, bias=False),
            nn.LayerNorm(c.hidden),
        )
        self.transformer = Transformer(c.hidden, c.layers, c.heads, c.max_length, c.dropout)
        self.prior = Linear(c.hidden, latent)
        self.decoder = Decoder(shapes, latent, c.units, c.vector_layers, c.stem_channels)
        self.reward = relu_head(c.hidden, c.hidden, HEAD_LAYERS, c.bins)
        self.termination = relu_head(c.hidden, c.hidden, HEAD_LAYERS, 1)
        self.register_buffer("bins", torch.linspace(-LIMIT, LIMIT, c.bins), persistent=False)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return the log probabilities [..., S, K] of a latent head's output [..., S K]."""
        c = self.config
        return fn.unimix_log_probs(logits.unflatten(-1, (c.stoch, c.classes)), c.unimix)

    def draw(self, log_probs: Tensor, noise: Tensor) -> Tensor:
        """Draw latents z [..., S K], flat one-hots, with the gradient of their probabilities (straight-through).

        log_probs, noise (standard exponential): [..., S, K].
        """
        probs = log_probs.exp()
        return (fn.draw_one_hot(probs, noise) + (probs - probs.detach())).flatten(-2)

    def see(self, obs: Mapping[str, Tensor], noise: Tensor, seen: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """Return the log posterior [..., S, K] of observations [..., *shape] by name, and a draw z [..., S K] of it."""
        log_q = self.log_probs(self.posterior(self.encoder(obs, seen)))
        return log_q, self.draw(log_q, noise)

    def token(self, z: Tensor, action: Tensor, first: Tensor | None = None) -> Tensor:
        """Return tokens [..., D] of latents z [..., S K] and the actions [..., A] that followed.

        first: bools [...]; where True nothing came before, and the token is that of zeros.
        """
        both = torch.cat([z, action], -1)
        out: Tensor = self.stem(both if first is None else both * ~first.unsqueeze(-1))
        return out

    def advance(
        self, memory: Tensor, filled: Tensor, z: Tensor, action: Tensor, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the token of z [B, S K] and action [B, A]; return the new memory, counts and h [B, D].

        memory: [B, M, D] with `filled` [B] tokens at its left; first [B]: forget them, nothing came before.
        """
        begun = filled if first is None else torch.where(first, 0, filled)
        memory, filled = remember(memory, begun, self.token(z, action, first))
        return memory, filled, self.transformer.last(memory, filled)

    def empty_memory(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return a memory without tokens, [rows, M, D], and its counts [rows]."""
        memory = torch.zeros(rows, self.config.acting_context, self.config.hidden, device=self.bins.device)
        return memory, memory.new_zeros(rows, dtype=torch.int64)

    def expected(self, logits: Tensor) -> Tensor:
        """Return the number [...] that a two-hot head's logits [..., bins] mean.

        Call it outside of autocast: the mean is a matrix product, and 1000 would become 1029 in bfloat16.
        """
        return fn.symlog_mean(logits.float(), self.bins)

    def outcome(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reward for arriving at h [..., D], and the chance that the episode goes on: [..., 1] each."""
        return self.expected(self.reward(h)).unsqueeze(-1), torch.sigmoid(-self.termination(h).float())

    def move_statistics(self, seen: Statistics, made: Tensor) -> None:
        """Move the running statistics of all batch norms towards what they saw; see `BatchNorm.move`."""
        modules = [*self.encoder.modules(), *self.decoder.modules()]
        for norm, found in zip([m for m in modules if isinstance(m, BatchNorm)], seen.pairs, strict=True):
            norm.move(*found, self.config.norm_rate, made)

    def draw_noise(self, *lead: int, generator: Generator | None = None) -> Tensor:
        """Draw noise [*lead, S, K], standard exponential, for categorical draws."""
        return fn.exponential_noise((*lead, self.config.stoch, self.config.classes), generator, self.bins.device)

    def as_mapping(self, obs: Obs, where: str, lead: int) -> dict[str, Tensor]:
        """Return every observation by key. Raises ValueError that names a missing key, a wrong shape or kind."""
        return checked(obs, self.encoder.vectors | self.encoder.images, {}, where, lead)

    def read(self, batch: Batch) -> tuple[dict[str, Tensor], Steps]:
        """Return observations by key, and the other parts of a batch, for 3 to max_length + 1 rows. Raises ValueError
        for other lengths, and as `as_mapping` and `read_steps`."""
        obs = self.as_mapping(batch["obs"], "batch['obs']", 2)
        steps, most = read_steps(batch, obs, self.action_dim), self.config.max_length + 1
        if "life_lost" in batch:  # counts as an end, though the episode goes on
            ends = torch.maximum(steps.terminated, batch["life_lost"].float())
            steps = dataclasses.replace(steps, terminated=ends)
        if not 3 <= steps.rewards.shape[1] <= most:
            found = f"the batch has {steps.rewards.shape[1]} rows"
            raise ValueError(f"{found}, expected 3 to {most}: those of agent.max_length and the one before them.")
        return obs, steps
