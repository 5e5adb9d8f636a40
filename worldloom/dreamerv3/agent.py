"""The DreamerV3 agent: filters to act, and learns world model, policy and critic in one update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.dreamerv3.actor_critic import (
    ContinuousPolicy,
    DiscretePolicy,
    Imagined,
    ReturnRange,
    policy_loss,
    replay_returns,
)
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.dreamerv3.world_model import DreamerV3WorldModel, Head, WorldLosses
from worldloom.nets import flatten, load_flat
from worldloom.optim import LaProp, load_optimizer
from worldloom.types import ActState, Array, Batch, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec


class Behaviour(nn.Module):
    """Policy, critic, slow critic and the return range."""

    def __init__(self, model: DreamerV3WorldModel, action_classes: tuple[int, ...]) -> None:
        super().__init__()
        c = model.config
        features = c.deter + c.stoch * c.classes
        self.policy: ContinuousPolicy | DiscretePolicy
        if action_classes:
            self.policy = DiscretePolicy(features, c.units, c.policy_layers, action_classes, c.policy_unimix)
        else:
            self.policy = ContinuousPolicy(features, c.units, c.policy_layers, model.action_dim)
        self.value = Head(features, c.units, c.value_layers, c.bins, 0.0)
        self.slow_value = copy.deepcopy(self.value).requires_grad_(False)
        self.range = ReturnRange(c)


@dataclass(frozen=True)
class UpdateNoise:
    """Everything random in one update."""

    posterior: Tensor  # [T, B, S, K] standard exponential
    prior: Tensor  # [H, T B, S, K] standard exponential
    policy: Tensor  # [H + 1, T B, A], as the policy draws it


class DreamerV3Agent:
    """Acts with a recurrent state per environment; see `worldloom.types.Agent` for the protocol.

    action_classes: the choices of each one-hot part of an action; () for continuous actions.
    """

    random_warmup = False
    pretrain = False
    true_ends_hint = None
    plans = False
    default_precision: Precision = "bfloat16"

    def __init__(self, model: DreamerV3WorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        c = model.config
        self.world_model, self.config, self.action_classes = model, c, tuple(action_classes)
        self.device = model.bins.device
        self.behaviour = Behaviour(model, self.action_classes).to(self.device)
        self.batch_size, self.train_ratio = c.batch_size, c.train_ratio
        self._stored = c.replay_context == "stored"
        context = int(self._stored)
        self.windows = WindowSpec(c.batch_length + context, context, crosses_episodes=True, online_queue=True)
        self.columns: Mapping[str, ColumnSpec] = {}
        if self._stored:  # deter as the bits of bfloat16, stoch as class indices: a seventh of float32
            self.columns = {"deter": ColumnSpec((c.deter,), "uint16"), "stoch": ColumnSpec((c.stoch,), "uint8")}
        self.updates = 0
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._generator = torch.Generator(self.device).manual_seed(seed + 1)  # of learning
        trained = [p for p in [*model.parameters(), *self.behaviour.parameters()] if p.requires_grad]
        self._optimizer = LaProp(trained, c.lr, (c.beta1, c.beta2), c.eps, c.clip, c.warmup)
        self._dtype = torch.float32

    def configure_learning(self, precision: Precision, compiled: bool) -> None:
        """Compiled, an update is five graphs, each compiled once: the step of the filter and that of the imagination,
        which Python repeats, and the batched parts around them. One graph of it all runs little faster and takes
        451 s to compile on two CPU cores.
        """
        self._dtype = getattr(torch, precision)
        if not compiled:
            return
        model: Any = self.world_model
        for owner, name in [
            (model.rssm, "learning_step"),
            (model, "posterior_losses"),
            (self, "_imagine_step"),
            (self, "_appraise"),
            (self, "_behaviour_losses"),
        ]:
            setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True))

    def _autocast(self) -> torch.autocast:
        """Matrix products in the chosen precision. One context for each phase: weights that were cast without
        gradient must not serve where a gradient is needed."""
        wide = self._dtype == torch.float32
        return torch.autocast(self.device.type, None if wide else self._dtype, enabled=not wide)

    # Acting

    @torch.inference_mode()
    def act(
        self,
        obs: ObsArray,
        act_state: ActState | None,
        is_first: Array,
        explore: bool = True,  # noqa: ARG002 - the reference samples in evaluation too
    ) -> tuple[Array, ActState]:
        """Actions [E, A] for obs [E, *obs_shape]: one-hot, or drawn from the Normal and not clipped."""
        model = self.world_model
        given = {name: torch.as_tensor(value, device=self.device) for name, value in _as_mapping(obs).items()}
        tokens = model.encoder(model.as_mapping(given, "act", 1))
        envs = len(tokens)
        first = torch.as_tensor(is_first, device=self.device)
        state, action = self._previous(act_state, envs)
        embedded = model.rssm.embed_action(action * (~first).unsqueeze(-1))
        noise = model.draw_noise(1, envs, self.acting_generator)[0]
        state, _ = model.rssm.observe_step(state, embedded, model.rssm.embed_tokens(tokens), first, noise)
        draw = self.behaviour.policy.draw_noise((envs,), self.acting_generator, self.device)
        action = self.behaviour.policy.sample(state.features, draw)
        return action.cpu().numpy(), {"deter": state.deter, "stoch": state.stoch, "action": action}

    def _previous(self, act_state: ActState | None, envs: int) -> tuple[RSSMState, Tensor]:
        if act_state is None:
            action = torch.zeros(envs, self.world_model.action_dim, device=self.device)
            return self.world_model.rssm.initial(envs), action
        if len(act_state["deter"]) != envs:
            raise ValueError(
                f"act: act_state has {len(act_state['deter'])} rows and obs {envs}. Keep one act_state for each vector "
                "of environments."
            )
        return RSSMState(act_state["deter"], act_state["stoch"]), act_state["action"]

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:
        if not self._stored:
            return {}
        return compact(RSSMState(act_state["deter"], act_state["stoch"]))

    # Learning

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """One update (the specification's contract): world model, imagination, behaviour, replay values; one backward.

        Returns metrics, and fresh latents [B, T, ...] of the trained rows for replay. Raises FloatingPointError for a
        NaN loss, ValueError for a batch of other keys or shapes.
        """
        moved = {name: torch.as_tensor(value, device=self.device) for name, value in batch.items() if name != "obs"}
        obs = {name: torch.as_tensor(v, device=self.device) for name, v in _as_mapping(batch["obs"]).items()}
        context = self.windows.context
        rows = cast(Batch, {name: value[:, context:] for name, value in moved.items()})
        rows["obs"] = {name: value[:, context:] for name, value in obs.items()}
        never = torch.zeros_like(rows["rewards"], dtype=torch.bool)
        rows = cast(Batch, {"is_first": never, "terminated": never, "truncated": never, **rows})
        if not self._stored:  # a window starts from nothing, the action before it included
            rows["is_first"] = torch.cat([torch.ones_like(rows["is_first"][:, :1]), rows["is_first"][:, 1:]], 1)
        noise = self._draw_noise(*rows["rewards"].shape)
        loss, scalars, states = self._loss(rows, self._context(moved), noise)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        with torch.no_grad():
            slow, online = self.behaviour.slow_value, self.behaviour.value
            torch._foreach_lerp_(list(slow.parameters()), list(online.parameters()), self.config.slow_critic_rate)
        self.updates += 1
        scalars = {"loss": loss, **scalars}
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
        metrics = dict(zip(scalars, values, strict=True))
        if metrics["loss"] != metrics["loss"]:
            raise FloatingPointError(self._name_nan(metrics))
        return metrics, self._fresh_columns(states)

    def _context(self, rows: Mapping[str, Tensor]) -> RSSMState:
        """The state before the first trained row: as replay stored it, or zeros."""
        if not self._stored:
            return self.world_model.rssm.initial(len(rows["rewards"]))
        if missing := [name for name in self.columns if name not in rows]:
            raise ValueError(
                f"batch lacks {', '.join(missing)}, the stored latents. Sample it from a ReplayBuffer made with this "
                "agent's columns, or set agent.replay_context to zeros."
            )
        return expand(rows["deter"][:, 0], rows["stoch"][:, 0], self.config.classes)

    def _fresh_columns(self, states: RSSMState) -> dict[str, Array]:
        """[B, T, ...]; the context row keeps what it has, which another window may have refreshed meanwhile."""
        if not self._stored:
            return {}
        return compact(RSSMState(states.deter.transpose(0, 1), states.stoch.transpose(0, 1)))

    def _draw_noise(self, batch: int, steps: int) -> UpdateNoise:
        c, model, generator = self.config, self.world_model, self._generator
        starts = batch * steps
        policy = self.behaviour.policy.draw_noise((c.imagination_length + 1, starts), generator, self.device)
        return UpdateNoise(
            model.draw_noise(steps, batch, generator),
            model.draw_noise(c.imagination_length, starts, generator),
            policy,
        )

    def _loss(self, rows: Batch, context: RSSMState, noise: UpdateNoise) -> tuple[Tensor, dict[str, Tensor], RSSMState]:
        """The sum to minimise, scalars to log, and the filtered states [T, B, ...]."""
        c = self.config
        with self._autocast():
            world = self.world_model.losses(rows, context, noise.posterior)
        states = world.posterior.states
        with self._autocast():
            imagined = self.imagine(states.flatten().detach(), noise)
        returns = imagined.returns(c.lam)
        self.behaviour.range.update(returns)
        with self._autocast():
            behaviour, logged = self._behaviour_losses(imagined, returns)
            replayed = self._replay_value_loss(rows, world, imagined, returns[0])
        loss = world.total + behaviour["policy_loss"] + behaviour["value_loss"] + c.replay_value_scale * replayed
        scalars = {**world.parts, **behaviour, "replay_value_loss": replayed, **logged}
        return loss, scalars, states.detach()

    @torch.no_grad()
    def imagine(self, start: RSSMState, noise: UpdateNoise) -> Imagined:
        """H steps with the current policy from every start [N, ...]; nothing here is differentiated."""
        state, features, actions = start, [start.features], []
        for t in range(self.config.imagination_length):
            state, action = self._imagine_step(state, noise.policy[t], noise.prior[t])
            actions.append(action)
            features.append(state.features)
        actions.append(self.behaviour.policy.sample(features[-1], noise.policy[-1]))
        rows = (len(features), -1)  # torch.stack copies on one thread
        return self._appraise(torch.cat(features).unflatten(0, rows), torch.cat(actions).unflatten(0, rows))

    def _imagine_step(self, state: RSSMState, policy_noise: Tensor, prior_noise: Tensor) -> tuple[RSSMState, Tensor]:
        """The state after an action of the policy, and that action."""
        action = self.behaviour.policy.sample(state.features, policy_noise)
        return self.world_model.rssm.imagine_step(state, action, prior_noise), action

    def _appraise(self, features: Tensor, actions: Tensor) -> Imagined:
        model, behaviour = self.world_model, self.behaviour
        return Imagined(
            features,
            actions,
            model.predict_reward(features),
            model.predict_continue(features),
            self._decode(behaviour.value(features)),
            self._decode(behaviour.slow_value(features)),
        )

    def _behaviour_losses(self, imagined: Imagined, returns: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        behaviour, features, weight = self.behaviour, imagined.features[:-1], imagined.weights()
        log_prob, entropy = behaviour.policy.log_prob_and_entropy(features, imagined.actions[:-1])
        advantage = (returns - imagined.values[:-1]) / behaviour.range.scale
        losses = {
            "policy_loss": policy_loss(log_prob, entropy, advantage, weight, self.config.entropy_scale),
            "value_loss": (weight * self._value_error(features, returns, imagined.slow_values[:-1])).mean(),
        }
        logged = {
            "policy_entropy": entropy.mean(),
            "advantage_magnitude": advantage.abs().mean(),
            "return": returns.mean(),
            "return_range": behaviour.range.scale,
            "imagined_reward": imagined.rewards.mean(),
            "imagined_continue": imagined.continues.mean(),
            "value": imagined.values.mean(),
        }
        return losses, logged

    def _replay_value_loss(self, rows: Batch, world: WorldLosses, imagined: Imagined, boot: Tensor) -> Tensor:
        """The critic on real rows, with gradient into the world model; boot: [T B], imagined returns of the starts."""
        c = self.config
        rewards, terminated, truncated, is_first = (
            rows[name].float().transpose(0, 1) for name in ("rewards", "terminated", "truncated", "is_first")
        )
        last = torch.maximum(terminated, truncated)
        last = torch.cat([torch.maximum(last[:-1], is_first[1:]), last[-1:]])  # an abandoned episode ends too
        target = replay_returns(rewards, terminated, last, boot.view(rewards.shape), c.discount, c.lam)
        slow = imagined.slow_values[0].view(rewards.shape)
        features = world.posterior.states.features
        error = self._value_error(features[:-1], target, slow[:-1])
        return ((1 - last[:-1]) * error).mean()

    def _value_error(self, features: Tensor, target: Tensor, slow_value: Tensor) -> Tensor:
        """Cross-entropy of the critic with the return, plus that with the slow critic's value: [...]."""
        logits, bins = self.behaviour.value(features).float(), self.world_model.bins
        both = fn.two_hot(target.detach(), bins) + fn.two_hot(slow_value.detach(), bins)
        return fn.soft_cross_entropy(logits, both)

    def _decode(self, logits: Tensor) -> Tensor:
        return fn.antisymmetric_mean(logits.float(), self.world_model.bins)

    def _name_nan(self, metrics: Metrics) -> str:
        losses = [name for name in metrics if name.endswith("_loss") or name.startswith("reconstruction/")]
        bad = [name for name in losses if metrics[name] != metrics[name]]
        return (
            f"update {self.updates}: NaN in {', '.join(bad) or 'loss'}. Look for huge rewards or observations; lower "
            "agent.lr, or go on from the last checkpoint with --resume."
        )

    # Exchange

    def _acting_parameters(self) -> list[Tensor]:
        modules: list[nn.Module] = [self.world_model.encoder, self.world_model.rssm, self.behaviour.policy]
        return [parameter.detach() for module in modules for parameter in module.parameters()]

    def acting_weights(self) -> Array:
        return flatten(self._acting_parameters())

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(self._acting_parameters(), flat)

    def describe(self) -> dict[str, Any]:
        return {**self.world_model.describe(), "action_classes": list(self.action_classes)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.world_model.state_dict(),
            "behaviour": self.behaviour.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "updates": self.updates,
            "generator": self._generator.get_state(),
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.world_model.load_state_dict(state["model"])
        self.behaviour.load_state_dict(state["behaviour"])
        load_optimizer(self._optimizer, state["optimizer"])
        self.updates = int(state["updates"])
        self._generator.set_state(state["generator"])
        self.acting_generator.set_state(state["acting_generator"])


def compact(state: RSSMState) -> dict[str, Array]:
    """A state as replay keeps it: deter as bfloat16 bits [..., D] uint16, stoch as class indices [..., S] uint8."""
    bits = state.deter.detach().to(torch.bfloat16).contiguous().view(torch.uint16)
    return {"deter": bits.cpu().numpy(), "stoch": state.stoch.detach().argmax(-1).to(torch.uint8).cpu().numpy()}


def expand(deter: Tensor, stoch: Tensor, classes: int) -> RSSMState:
    """The inverse of `compact`, in float32."""
    wide = deter.contiguous().view(torch.bfloat16).float()
    return RSSMState(wide, torch.nn.functional.one_hot(stoch.long(), classes).float())


def _as_mapping(obs: Any) -> dict[str, Any]:
    return dict(obs) if isinstance(obs, Mapping) else {"obs": obs}
