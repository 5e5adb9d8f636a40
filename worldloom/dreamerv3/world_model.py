"""DreamerV3's world model: encoder, RSSM, decoder (or what replaces it), reward and continue heads, and the losses that
train them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom import functional as fn
from worldloom.arguments import check_action, check_batch, read_steps
from worldloom.dreamerv3.config import DreamerV3Config
from worldloom.dreamerv3.encoder import Decoder, Encoder
from worldloom.dreamerv3.layers import Linear, mlp
from worldloom.dreamerv3.representation import Rows, make_representation
from worldloom.dreamerv3.rssm import RSSM, Posterior, RSSMState
from worldloom.gang import ALONE, Gang
from worldloom.observations import VECTOR, as_lists, as_mapping, as_tuples, checked
from worldloom.pretrained import save_model
from worldloom.types import Batch, LatentState, Obs, ObsShape, Trajectory, is_image


class Head(nn.Module):
    """An MLP on features [..., D + S K] with a linear output [..., outputs]; scale multiplies its initial kernel."""

    def __init__(self, inputs: int, units: int, layers: int, outputs: int, scale: float) -> None:
        super().__init__()
        self.mlp = mlp(inputs, units, layers)
        self.output = Linear(units, outputs, scale)

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.mlp(features)))


@dataclass(frozen=True)
class WorldLosses:
    """The world model's losses, means over the batch, and the filtered states."""

    parts: dict[str, Tensor]  # scalars, unscaled
    total: Tensor
    posterior: Posterior  # [T, B, ...]


class DreamerV3WorldModel(nn.Module):
    """DreamerV3's world model. obs_shape: one shape, or a mapping of them; (C, H, W) are images, all others vectors.

    obs_classes: the class count, by key, of observations that are class indices. A number -inf or a class index -1
    marks what was not observed. action_classes: the choices of each one-hot part of an action, () for continuous ones;
    only NE-Dreamer's transformer asks. Raises ValueError for images whose sides cannot be halved four times to 3..16,
    and for class counts without an observation.
    """

    bins: Tensor

    def __init__(
        self,
        obs_shape: ObsShape,
        action_dim: int,
        config: DreamerV3Config | None = None,
        episode_length: int | None = None,
        obs_classes: Mapping[str, int] | None = None,
        action_classes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}, expected at least 1.")
        self.config = c = config or DreamerV3Config()
        self.obs_shape = as_tuples(obs_shape)
        shapes = as_mapping(self.obs_shape)
        self.action_dim, self.episode_length = action_dim, episode_length
        self.obs_classes, self.action_classes = dict(obs_classes or {}), tuple(action_classes)
        for key, count in self.obs_classes.items():
            if key not in shapes or is_image(shapes[key]) or count < 2:
                raise ValueError(
                    f"obs_classes[{key!r}] is {count}, expected at least 2 classes of an observation that is not an "
                    f"image, one of {sorted(shapes)}."
                )
        flat = c.stoch * c.classes
        features = c.deter + flat
        self.encoder = Encoder(shapes, self.obs_classes, c.units, c.depth, c.encoder_layers)
        self.rssm = RSSM(action_dim, self.encoder.tokens, c.deter, c.hidden, c.stoch, c.classes, c.blocks, c.unimix)
        self.decoder: Decoder | None = None
        if c.representation == "decoder":
            parts = (shapes, self.obs_classes, c.deter, flat, c.units, c.depth, c.decoder_layers, c.blocks)
            self.decoder = Decoder(*parts)
        self.representation = make_representation(c, features, self.encoder.tokens, action_dim, self.action_classes)
        self.reward = Head(features, c.units, c.reward_layers, c.bins, 0.0)
        self.continues = Head(features, c.units, c.continue_layers, 1, 1.0)
        self.register_buffer("bins", fn.symexp_bins(c.bins, dtype=torch.float64).float(), persistent=False)

    # Heads on features [..., D + S K]

    def predict_reward(self, features: Tensor) -> Tensor:
        """Return the reward [...] of the step that arrived at these features."""
        return fn.antisymmetric_mean(self.reward(features).float(), self.bins)

    def predict_continue(self, features: Tensor) -> Tensor:
        """Return the chance [...] that the episode goes on from here, times the discount, which the head learns too."""
        return torch.sigmoid(self.continues(features).float()).squeeze(-1)

    # WorldModel

    def encode(self, obs: Obs) -> LatentState:
        """Return the posterior after seeing only obs [B, *obs_shape]; images are uint8, or floats in [0, 1].
        Raises ValueError that names the key of a missing or wrong observation."""
        tokens = self.encoder(self.as_mapping(obs, "encode", 1))
        state = self.rssm.initial(len(tokens))
        return self._observe(state, torch.zeros(len(tokens), self.action_dim, device=tokens.device), tokens)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        check_action("predict", action, (state.batch_size, self.action_dim))
        return as_latent(self.rssm.imagine_step(self.as_rssm(state), action, self._noise(state.batch_size)))

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        check_action("observe", action, (state.batch_size, self.action_dim))
        tokens = self.encoder(self.as_mapping(obs, "observe", 1))
        if len(tokens) != state.batch_size:
            raise ValueError(f"observe: {len(tokens)} observations, expected {state.batch_size}: one for each state.")
        return self._observe(self.as_rssm(state), action, tokens)

    def _observe(self, state: RSSMState, action: Tensor, tokens: Tensor) -> LatentState:
        embedded = self.rssm.embed_tokens(tokens)
        first = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        noise = self._noise(len(tokens))
        posterior, _ = self.rssm.observe_step(state, self.rssm.embed_action(action), embedded, first, noise)
        return as_latent(posterior)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return `obs` (numbers in their units, classes, images in [0, 1]; None without a decoder), `reward` [B, 1] and
        `continue` [B, 1]."""
        assert state.stochastic is not None
        obs: Any = None
        if self.decoder is not None:
            decoded = self.decoder(state.deterministic, state.stochastic)
            shown = {name: self.decoder.shown(name, value) for name, value in decoded.items()}
            obs = shown if isinstance(self.obs_shape, dict) else shown[VECTOR]
        return {
            "obs": obs,
            "reward": self.predict_reward(state.features).unsqueeze(-1),
            "continue": self.continue_probability(state.features).unsqueeze(-1),
        }

    def continue_probability(self, features: Tensor) -> Tensor:
        """Return the chance [...] that the episode goes on: the head's output without the discount in it."""
        return (self.predict_continue(features) / self.config.discount).clamp(max=1.0)

    def imagine(self, state: LatentState, actions: Tensor) -> Trajectory:
        check_action("imagine", actions, (actions.shape[0], state.batch_size, self.action_dim))
        states, rewards, continues = [state], [], []
        for action in actions:
            states.append(self.predict(states[-1], action))
            rewards.append(self.predict_reward(states[-1].features))
            continues.append(self.continue_probability(states[-1].features))
        return Trajectory(tuple(states), torch.stack(rewards).unsqueeze(-1), torch.stack(continues).unsqueeze(-1))

    def initial_state(self, batch_size: int) -> LatentState:
        return as_latent(self.rssm.initial(batch_size))

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return `loss` and its parts: `kl_loss` (`dynamics_loss` and `representation_loss`, scaled and added),
        `reconstruction_loss` (and `reconstruction/<key>`; without a decoder `embedding_loss`), `reward_loss` and
        `continue_loss`, all scalars."""
        check_batch(batch)
        shape = batch["actions"].shape[:2]
        found = self.losses(batch, self.rssm.initial(shape[0]), self.draw_noise(shape[1], shape[0]))
        c, parts = self.config, found.parts
        kl = c.dynamics_scale * parts["dynamics_loss"] + c.representation_scale * parts["representation_loss"]
        return {"loss": found.total, "kl_loss": kl, **parts}

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        save_model(directory, self.describe(), self)

    def update_targets(self) -> None:
        """Do nothing: the slow critic belongs to the behaviour."""

    def describe(self) -> dict[str, Any]:
        return {
            "family": "dreamerv3",
            "obs_shape": as_lists(self.obs_shape),
            "obs_classes": self.obs_classes,
            "action_classes": list(self.action_classes),
            "action_dim": self.action_dim,
            "episode_length": self.episode_length,
            "config": dataclasses.asdict(self.config),
        }

    # Learning

    def draw_noise(self, steps: int, rows: int, generator: Generator | None = None) -> Tensor:
        """Draw noise [T, R, S, K], standard exponential, for categorical draws."""
        shape = (steps, rows, self.config.stoch, self.config.classes)
        return fn.exponential_noise(shape, generator, self.bins.device)

    def losses(self, batch: Batch, state: RSSMState, noise: Tensor, gang: Gang = ALONE) -> WorldLosses:
        """Return the losses of rows [B, T, ...] after `state`; noise [T, B, S, K].

        gang: the learners whose rows are one batch. Raises ValueError for bad shapes.
        """
        obs = self.as_mapping(batch["obs"], "batch['obs']", 2)
        steps = read_steps(batch, obs, self.action_dim)
        given = (steps.actions, steps.rewards, steps.is_first, steps.terminated)
        actions, rewards, is_first, terminated = (value.transpose(0, 1).contiguous() for value in given)
        seen = {name: value.transpose(0, 1) for name, value in obs.items()}
        tokens = self.embed(seen)
        posterior = self.rssm.observe(state, actions, tokens, is_first, noise)
        total, parts = self.posterior_losses(posterior, seen, rewards, terminated)
        if self.representation is not None:
            rows = Rows(posterior.states.features, actions, is_first, tokens)
            parts["embedding_loss"] = self.representation(rows, gang)
            total = total + self.representation.scale * parts["embedding_loss"]
        return WorldLosses(parts, total, posterior)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Return tokens [T, B, E] of observations [T, B, *shape]; may be replaced by its compiled form."""
        tokens: Tensor = self.encoder(obs)
        return tokens

    def posterior_losses(
        self, posterior: Posterior, obs: Mapping[str, Tensor], rewards: Tensor, terminated: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its parts, scalars, of T filtered rows [T, B, ...] (paper: "World model learning"):
        reconstruction + reward + continue losses + dynamics_scale max(free_nats, KL(sg(posterior) || prior))
        + representation_scale max(free_nats, KL(posterior || sg(prior))).

        Without a decoder nothing is reconstructed, and `losses` adds what `representation` compares.
        """
        c = self.config
        log_q, log_p = posterior.log_probs, self.rssm.prior(posterior.states.deter)
        features = posterior.states.features
        parts, errors = {}, {}
        if self.decoder is not None:
            decoded = self.decoder(posterior.states.deter, posterior.states.stoch.flatten(-2))
            errors = self.decoder.losses(decoded, obs)
            parts["reconstruction_loss"] = sum(errors.values(), torch.zeros_like(rewards)).mean()
        soft_continue = (1 - terminated) * c.discount
        reward_target = fn.two_hot(rewards, self.bins)
        parts |= {
            "reward_loss": fn.soft_cross_entropy(self.reward(features).float(), reward_target).mean(),
            "continue_loss": F.binary_cross_entropy_with_logits(
                self.continues(features).float().squeeze(-1), soft_continue
            ),
            "dynamics_loss": fn.free_nats(fn.categorical_kl(log_q.detach(), log_p), c.free_nats).mean(),
            "representation_loss": fn.free_nats(fn.categorical_kl(log_q, log_p.detach()), c.free_nats).mean(),
        }
        scales = {"dynamics_loss": c.dynamics_scale, "representation_loss": c.representation_scale}
        first, *others = [scales[name] * loss if name in scales else loss for name, loss in parts.items()]
        total = sum(others, first)
        parts |= {"posterior_entropy": fn.categorical_entropy(log_q), "prior_entropy": fn.categorical_entropy(log_p)}
        if isinstance(self.obs_shape, dict):
            parts |= {f"reconstruction/{name}": error.mean() for name, error in errors.items()}
        return total, parts

    # Conversions

    def as_mapping(self, obs: Obs, where: str, lead: int) -> dict[str, Tensor]:
        """Return every observation by key. Raises ValueError that names a missing key, a wrong shape or kind."""
        return checked(obs, self.encoder.vectors | self.encoder.images, self.obs_classes, where, lead)

    def as_rssm(self, state: LatentState) -> RSSMState:
        """Return a `LatentState` as this model's. Raises ValueError for a state of another kind of model."""
        if state.stochastic is None:
            raise ValueError("the state has no stochastic part, expected a state that this model made.")
        return RSSMState(state.deterministic, state.stochastic.unflatten(-1, (self.config.stoch, self.config.classes)))

    def _noise(self, rows: int) -> Tensor:
        return self.draw_noise(1, rows)[0]


def as_latent(state: RSSMState) -> LatentState:
    return LatentState(state.deter, state.stoch.flatten(-2), state.stoch.shape[-1])
