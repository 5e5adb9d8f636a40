"""One update of DreamerV3: world model, imagination, behaviour and replay values (Hafner et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.actor_critic import policy_loss
from worldloom.capture import Tensors
from worldloom.dreamerv3.actor_critic import Imagined, ReturnRange, replay_returns
from worldloom.dreamerv3.behaviour import Behaviour
from worldloom.dreamerv3.latents import compact, expand, latent_columns
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.dreamerv3.world_model import DreamerV3WorldModel
from worldloom.gang import Gang
from worldloom.generators import restore_generator
from worldloom.imagining import ImaginingUpdate
from worldloom.nets import compile_part
from worldloom.observations import as_mapping
from worldloom.optim import LaProp, flat_gradient, load_optimizer, move_towards
from worldloom.types import Batch, Precision, split_obs

ROWS = ("actions", "rewards", "is_first", "terminated", "truncated")  # what an update reads of a batch besides obs
STEPS_AT_ONCE = {True: (8, 5), False: (1, 1)}  # filtered, imagined steps per compiled graph: CUDA, else


@dataclass(frozen=True)
class UpdateNoise:
    """All random numbers of one update."""

    posterior: Tensor  # [T, B, S, K] standard exponential
    prior: Tensor  # [H, T B, S, K] standard exponential
    policy: Tensor  # [H + 1, T B, A], as the policy draws it


class DreamerV3Learning(ImaginingUpdate):
    """DreamerV3's update: its loss, its optimiser and the generator of its random numbers."""

    def __init__(self, model: DreamerV3WorldModel, behaviour: Behaviour, seed: int) -> None:
        super().__init__(model, seed)
        c, self.model, self.behaviour = model.config, model, behaviour
        trained = [p for p in [*model.parameters(), *behaviour.parameters()] if p.requires_grad]
        self.optimizer = LaProp(trained, c.lr, (c.beta1, c.beta2), c.eps, c.clip, c.warmup)
        self._imagined_at_once = c.imagination_length  # steps in one _imagine_steps

    @property
    def stored(self) -> bool:
        """True if updates start from stored latents, and write fresh ones back."""
        return self.model.config.replay_context == "stored"

    def join(self, gang: Gang) -> None:
        """Make updates together with the other learners of a gang from now on."""
        self.gang = gang

    def configure(self, precision: Precision, compiled: bool) -> None:
        """Set the precision of matrix products and, if `compiled`, compile an update.

        It is then a few graphs, each compiled once: some steps of the filter and of the imagination, which Python
        repeats, and the batched parts around them. One graph of everything is hardly faster, and takes 451 s to compile
        on two CPU cores.
        """
        self._dtype = getattr(torch, precision)
        if not compiled:
            return
        model, cuda = self.model, self.model.bins.is_cuda
        model.rssm.steps_at_once, self._imagined_at_once = STEPS_AT_ONCE[cuda]
        replaced = [(part, name) for part in [model.representation] if part for name in ("predict", "compare")]
        for owner, name in [
            *replaced,
            (model, "embed"),
            (model.rssm, "prepare"),
            (model.rssm, "learning_steps"),
            (model, "posterior_losses"),
            (self, "_imagine_steps"),
            (self, "_evaluate_imagined"),
            (self, "_behaviour_losses"),
        ]:
            compile_part(owner, name)
        if cuda:
            compile_part(self.optimizer, "change")

    def stage(self, batch: Batch) -> Tensors:
        """Return what the update reads of a batch, by name: the trained rows and, of the row before, only the latents.

        Raises ValueError if the stored latents are missing.
        """
        columns = latent_columns(self.model.config)
        given = {name: torch.as_tensor(value) for name, value in batch.items() if name != "obs"}
        missing = [name for name in columns if name not in given]
        if missing:
            raise ValueError(
                f"batch lacks {', '.join(missing)}, the stored latents. Sample it from a ReplayBuffer made with this "
                "agent's columns, or set agent.replay_context to zeros."
            )
        if "continues" in given:
            given.setdefault("terminated", given["continues"] < 1)
        given |= split_obs({name: torch.as_tensor(value) for name, value in as_mapping(batch["obs"]).items()})
        used = {name: value for name, value in given.items() if name in ROWS or name.startswith("obs/")}
        rows = {name: value[:, 1:] if columns else value for name, value in used.items()}
        return rows | {name: given[name][:, 0] for name in columns}

    def core(self, given: Tensors) -> Tensors:
        """Make the update on the device alone; return fresh latents for replay. See `worldloom.learner.Update`."""
        rows = self.rows(given)
        noise = self.draw_noise(*rows["rewards"].shape)
        loss, scalars, states, (low, high) = self.loss(rows, self.context(given), noise)
        flat, whole_loss = self.gang.mean(flat_gradient(loss, self.optimizer.params), loss)
        made, norm = self.optimizer.apply(flat, torch.isfinite(whole_loss))
        with torch.no_grad():
            self.behaviour.range.move(low, high, made)
            slow, online = self.behaviour.slow_value.parameters(), self.behaviour.value.parameters()
            move_towards(slow, online, made * self.model.config.slow_critic_rate)
            norms = {"grad_norm": norm, "update_norm": self.optimizer.update_norm}
            self.tally.add({"loss": loss, **scalars, **norms}, made)
            return compact(states.transposed()) if self.stored else {}

    def context(self, given: Tensors) -> RSSMState:
        """Return the state before the first trained row: as replay stored it, or zeros."""
        if not self.stored:
            return self.model.rssm.initial(len(given["rewards"]))
        return expand(given["deter"], given["stoch"], self.model.config.classes)

    def rows(self, given: Tensors) -> Batch:
        """Return the trained rows as a batch; flags that are missing become False."""
        rows = {name: value for name, value in given.items() if name in ROWS}
        never = torch.zeros_like(rows["rewards"], dtype=torch.bool)
        rows = {"is_first": never, "terminated": never, "truncated": never, **rows}
        if not self.stored:  # a window starts from zeros, without a previous action
            rows["is_first"] = torch.cat([torch.ones_like(rows["is_first"][:, :1]), rows["is_first"][:, 1:]], 1)
        return cast(Batch, {**rows, "obs": {name: given[column] for name, column in obs_columns(self.model).items()}})

    def draw_noise(self, batch: int, steps: int) -> UpdateNoise:
        """Draw all random numbers of an update of `batch` windows with `steps` trained rows.

        Of several learners, each draws those for the whole batch and keeps its share.
        """
        model, generator, share = self.model, self.generator, self.gang.share
        c, whole = model.config, batch * self.gang.size
        starts = whole * steps
        policy = self.behaviour.policy.draw_noise((c.imagination_length + 1, starts), generator, model.bins.device)
        posterior = model.draw_noise(steps, whole, generator)
        prior = model.draw_noise(c.imagination_length, starts, generator)
        prior, policy = (share(x.unflatten(1, (steps, whole)), 2).flatten(1, 2) for x in (prior, policy))
        return UpdateNoise(share(posterior, 1), prior, policy)

    def loss(
        self, rows: Batch, context: RSSMState, noise: UpdateNoise
    ) -> tuple[Tensor, dict[str, Tensor], RSSMState, tuple[Tensor, Tensor]]:
        """Return the sum to minimise, scalars to log, the filtered states [T, B, ...] and the new return percentiles.

        The sum: world model + policy + value + replay_value_scale * replay value loss.
        """
        c = self.model.config
        with self._autocast():
            world = self.model.losses(rows, context, noise.posterior, self.gang)
        states = world.posterior.states
        with self._autocast():
            imagined = self.imagine(states.flatten().detach(), noise)
        returns = imagined.returns(c.lam)
        low, high = self.behaviour.range.after(self.gang.gather(returns))
        ends = tuple(rows[name].float().transpose(0, 1) for name in ("rewards", "terminated", "truncated", "is_first"))
        with self._autocast():
            behaviour, logged = self._behaviour_losses(imagined, returns, ReturnRange.scale_of(low, high))
            replayed = self._replay_value_loss(ends, states.features, imagined.slow_values[0], returns[0])
        loss = world.total + behaviour["policy_loss"] + behaviour["value_loss"] + c.replay_value_scale * replayed
        scalars = {**world.parts, **behaviour, "replay_value_loss": replayed, **logged}
        return loss, scalars, states.detach(), (low, high)

    @torch.no_grad()
    def imagine(self, start: RSSMState, noise: UpdateNoise) -> Imagined:
        """Imagine H steps with the current policy from every start [N, ...], without gradient."""
        state, features, actions = start, [start.features], []
        for draws in zip(
            noise.policy[:-1].split(self._imagined_at_once), noise.prior.split(self._imagined_at_once), strict=True
        ):
            state, seen, chosen = self._imagine_steps(state, features[-1], *draws)
            features += seen
            actions += chosen
        actions.append(self.behaviour.policy.sample(features[-1], noise.policy[-1]))
        rows = (len(features), -1)  # torch.stack copies on one thread
        return self._evaluate_imagined(torch.cat(features).unflatten(0, rows), torch.cat(actions).unflatten(0, rows))

    def _imagine_steps(
        self, state: RSSMState, features: Tensor, policy_noise: Tensor, prior_noise: Tensor
    ) -> tuple[RSSMState, list[Tensor], list[Tensor]]:
        """Take n steps in the model, from a state with these features; return the last state, the features [N, F] after
        each step, and the actions [N, A]."""
        seen, actions, dtype = [], [], features.dtype
        for draw, prior in zip(policy_noise.unbind(), prior_noise.unbind(), strict=True):
            action = self.behaviour.policy.sample(features, draw)
            state = self.model.rssm.imagine_step(state, action, prior)
            features = state.features.to(dtype)
            actions.append(action)
            seen.append(features)
        return state, seen, actions

    def _evaluate_imagined(self, features: Tensor, actions: Tensor) -> Imagined:
        model, behaviour = self.model, self.behaviour
        return Imagined(
            features,
            actions,
            model.predict_reward(features),
            model.predict_continue(features),
            self._decode(behaviour.value(features)),
            self._decode(behaviour.slow_value(features)),
        )

    def _behaviour_losses(
        self, imagined: Imagined, returns: Tensor, scale: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        behaviour, features, weight = self.behaviour, imagined.features[:-1], imagined.weights()
        log_prob, entropy = behaviour.policy.log_prob_and_entropy(features, imagined.actions[:-1])
        advantage = (returns - imagined.values[:-1]) / scale
        losses = {
            "policy_loss": policy_loss(log_prob, entropy, advantage, weight, self.model.config.entropy_scale),
            "value_loss": (weight * self._value_error(features, returns, imagined.slow_values[:-1])).mean(),
        }
        logged = {
            "policy_entropy": entropy.mean(),
            "advantage_magnitude": advantage.abs().mean(),
            "return": returns.mean(),
            "return_range": scale,
            "imagined_reward": imagined.rewards.mean(),
            "imagined_continue": imagined.continues.mean(),
            "value": imagined.values.mean(),
        }
        return losses, logged

    def _replay_value_loss(
        self, rows: tuple[Tensor, ...], features: Tensor, slow_values: Tensor, boot: Tensor
    ) -> Tensor:
        """Return the critic's loss on real rows, a scalar, with gradient into the world model through features.

        rows: rewards, terminated, truncated and is_first, [T, B] each; features: [T, B, F]; slow_values, boot: [T B],
        the slow critic's values and the imagined returns, both of the starts.
        """
        c, (rewards, terminated, truncated, is_first) = self.model.config, rows
        last = torch.maximum(terminated, truncated)
        last = torch.cat([torch.maximum(last[:-1], is_first[1:]), last[-1:]])  # an abandoned episode ends too
        target = replay_returns(rewards, terminated, last, boot.view(rewards.shape), c.discount, c.lam)
        error = self._value_error(features[:-1], target, slow_values.view(rewards.shape)[:-1])
        return ((1 - last[:-1]) * error).mean()

    def _value_error(self, features: Tensor, target: Tensor, slow_value: Tensor) -> Tensor:
        """Return the critic's cross-entropy with the return, plus that with the slow critic's value: [...]."""
        logits, bins = self.behaviour.value(features).float(), self.model.bins
        both = fn.two_hot(target.detach(), bins) + fn.two_hot(slow_value.detach(), bins)
        return fn.soft_cross_entropy(logits, both)

    def _decode(self, logits: Tensor) -> Tensor:
        return fn.antisymmetric_mean(logits.float(), self.model.bins)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optimizer"])
        restore_generator(self.generator, state["generator"])


def obs_columns(model: DreamerV3WorldModel) -> dict[str, str]:
    """Return the replay column of each observation that the model reads, by key."""
    return {name: f"obs/{name}" for name in model.encoder.vectors | model.encoder.images}
