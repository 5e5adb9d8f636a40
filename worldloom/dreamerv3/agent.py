"""The DreamerV3 agent: filters to act, and learns world model, policy and critic in one update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.capture import Captured, Tensors
from worldloom.dreamerv3.actor_critic import (
    ContinuousPolicy,
    DiscretePolicy,
    Imagined,
    ReturnRange,
    policy_loss,
    replay_returns,
)
from worldloom.dreamerv3.rssm import RSSMState
from worldloom.dreamerv3.world_model import DreamerV3WorldModel, Head
from worldloom.nets import compile_part, flatten, load_flat
from worldloom.optim import LaProp, flat_gradient, load_optimizer, move_towards
from worldloom.staging import Columns, Staging
from worldloom.tally import Tally
from worldloom.types import ActState, Array, Batch, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec, split_obs

ROWS = ("actions", "rewards", "is_first", "terminated", "truncated")  # what an update reads of a batch beside obs
STEPS_AT_ONCE = {True: (8, 5), False: (1, 1)}  # of filter and imagination in one compiled graph, on CUDA and elsewhere


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
            self.columns = {
                "deter": ColumnSpec((c.deter,), "uint16", context_only=True),
                "stoch": ColumnSpec((c.stoch,), "uint8", context_only=True),
            }
        shown = model.encoder.vectors | model.encoder.images
        self._obs_columns = {name: f"obs/{name}" for name in shown}
        self._imagined_at_once = c.imagination_length  # steps in one call of _imagine_steps
        self.updates = 0
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._generator = torch.Generator(self.device).manual_seed(seed + 1)  # of learning
        self._trained = [p for p in [*model.parameters(), *self.behaviour.parameters()] if p.requires_grad]
        self._optimizer = LaProp(self._trained, c.lr, (c.beta1, c.beta2), c.eps, c.clip, c.warmup)
        self._dtype, self._tally, self._staging = torch.float32, Tally(), Staging(self.device)
        self._learn = Captured(self.core, self.device, self._generator)
        self._act = Captured(self._choose, self.device, self.acting_generator)

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool = True) -> None:
        """Compiled, an update is a few graphs, each compiled once: some steps of the filter and of the imagination,
        which Python repeats, and the batched parts around them. One graph of it all runs little faster and takes
        451 s to compile on two CPU cores.
        """
        self._dtype = getattr(torch, precision)
        self._learn.enabled = self._act.enabled = capture and self.device.type == "cuda"
        if not compiled:
            return
        model, cuda = self.world_model, self.device.type == "cuda"
        model.rssm.steps_at_once, self._imagined_at_once = STEPS_AT_ONCE[self.device.type == "cuda"]
        for owner, name in [
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
            compile_part(self._optimizer, "change")

    def _autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the chosen precision. One context for each phase: weights that were cast without
        gradient must not serve where a gradient is needed."""
        return nullcontext() if self._dtype == torch.float32 else torch.autocast(self.device.type, self._dtype)

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
        shown = {name: torch.as_tensor(value) for name, value in _as_mapping(obs).items()}
        shown = self.world_model.as_mapping(shown, "act", 1)
        envs = len(next(iter(shown.values())))
        state = self._previous(act_state, envs)
        first = torch.as_tensor(is_first)
        found = self._act({**split_obs(shown), "is_first": first, **state})
        kept = {name: value.clone() for name, value in found.items()}  # the next call fills the same buffers
        return kept["action"].cpu().numpy(), kept

    def _choose(self, given: Tensors) -> Tensors:
        """On the device alone: the posterior state after these observations, and an action drawn from the policy."""
        model, first, action = self.world_model, given["is_first"], given["action"]
        tokens = model.encoder({name: given[column] for name, column in self._obs_columns.items()})
        embedded = model.rssm.embed_action(action * (~first).unsqueeze(-1))
        noise = model.draw_noise(1, len(first), self.acting_generator)[0]
        state = RSSMState(given["deter"], given["stoch"])
        state, _ = model.rssm.observe_step(state, embedded, model.rssm.embed_tokens(tokens), first, noise)
        draw = self.behaviour.policy.draw_noise((len(first),), self.acting_generator, self.device)
        action = self.behaviour.policy.sample(state.features, draw)
        return {"deter": state.deter, "stoch": state.stoch, "action": action}

    def _previous(self, act_state: ActState | None, envs: int) -> dict[str, Tensor]:
        if act_state is None:
            state = self.world_model.rssm.initial(envs)
            action = torch.zeros(envs, self.world_model.action_dim, device=self.device)
            return {"deter": state.deter, "stoch": state.stoch, "action": action}
        if len(act_state["deter"]) != envs:
            raise ValueError(
                f"act: act_state has {len(act_state['deter'])} rows and obs {envs}. Keep one act_state for each vector "
                "of environments."
            )
        return dict(act_state)

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:
        if not self._stored:
            return {}
        found = compact(RSSMState(act_state["deter"], act_state["stoch"]))
        return {name: value.cpu().numpy() for name, value in found.items()}

    # Learning

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """One update (the specification's contract): world model, imagination, behaviour, replay values; one backward.

        Returns metrics, and fresh latents [B, T, ...] of the trained rows for replay. An update with a loss or gradient
        that is not finite changes nothing. Raises FloatingPointError after several of them in a row, ValueError for a
        batch of other keys or shapes.
        """
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def learn(self, batch: Batch) -> Columns:
        """`update` without waiting for the device: columns can be read once they have arrived, metrics by `collect`."""
        fresh = self._learn(self._staging.send(self.stage(batch)))
        self.updates += 1
        return Columns(fresh)

    def collect(self) -> Metrics:
        """Means over the updates since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return self._tally.read()

    def stage(self, batch: Batch) -> Tensors:
        """What the update reads of a batch, by name: the trained rows, and of the row before them the latents alone."""
        context = self.windows.context
        given = {name: torch.as_tensor(value) for name, value in batch.items() if name != "obs"}
        missing = [name for name in self.columns if name not in given]
        if missing:
            raise ValueError(
                f"batch lacks {', '.join(missing)}, the stored latents. Sample it from a ReplayBuffer made with this "
                "agent's columns, or set agent.replay_context to zeros."
            )
        given |= split_obs({name: torch.as_tensor(value) for name, value in _as_mapping(batch["obs"]).items()})
        used = {name: value for name, value in given.items() if name in ROWS or name.startswith("obs/")}
        rows = {name: value[:, context:] for name, value in used.items()}
        return rows | {name: given[name][:, 0] for name in self.columns}

    def core(self, given: Tensors) -> Tensors:
        """The update on the device alone: nothing is read back, and no number in Python changes between updates.

        Returns the fresh latents as replay stores them.
        """
        rows = self._rows(given)
        noise = self._draw_noise(*rows["rewards"].shape)
        loss, scalars, states, (low, high) = self._loss(rows, self._context(given), noise)
        flat, _ = flat_gradient(loss, self._trained)
        made, norm = self._optimizer.apply(flat, torch.isfinite(loss.detach()))
        with torch.no_grad():
            self.behaviour.range.move(low, high, made)
            slow, online = self.behaviour.slow_value.parameters(), self.behaviour.value.parameters()
            move_towards(slow, online, made * self.config.slow_critic_rate)
            self._tally.add({"loss": loss, **scalars, "grad_norm": norm}, made)
            return compact(states.transposed()) if self._stored else {}

    def _context(self, given: Tensors) -> RSSMState:
        """The state before the first trained row: as replay stored it, or zeros."""
        if not self._stored:
            return self.world_model.rssm.initial(len(given["rewards"]))
        return expand(given["deter"], given["stoch"], self.config.classes)

    def _rows(self, given: Tensors) -> Batch:
        rows = {name: value for name, value in given.items() if name in ROWS}
        never = torch.zeros_like(rows["rewards"], dtype=torch.bool)
        rows = {"is_first": never, "terminated": never, "truncated": never, **rows}
        if not self._stored:  # a window starts from nothing, the action before it included
            rows["is_first"] = torch.cat([torch.ones_like(rows["is_first"][:, :1]), rows["is_first"][:, 1:]], 1)
        return cast(Batch, {**rows, "obs": {name: given[column] for name, column in self._obs_columns.items()}})

    def _draw_noise(self, batch: int, steps: int) -> UpdateNoise:
        c, model, generator = self.config, self.world_model, self._generator
        starts = batch * steps
        policy = self.behaviour.policy.draw_noise((c.imagination_length + 1, starts), generator, self.device)
        return UpdateNoise(
            model.draw_noise(steps, batch, generator),
            model.draw_noise(c.imagination_length, starts, generator),
            policy,
        )

    def _loss(
        self, rows: Batch, context: RSSMState, noise: UpdateNoise
    ) -> tuple[Tensor, dict[str, Tensor], RSSMState, tuple[Tensor, Tensor]]:
        """The sum to minimise, scalars to log, the filtered states [T, B, ...], and where the return range moves to."""
        c = self.config
        with self._autocast():
            world = self.world_model.losses(rows, context, noise.posterior)
        states = world.posterior.states
        with self._autocast():
            imagined = self.imagine(states.flatten().detach(), noise)
        returns = imagined.returns(c.lam)
        low, high = self.behaviour.range.after(returns)
        ends = tuple(rows[name].float().transpose(0, 1) for name in ("rewards", "terminated", "truncated", "is_first"))
        with self._autocast():
            behaviour, logged = self._behaviour_losses(imagined, returns, ReturnRange.scale_of(low, high))
            replayed = self._replay_value_loss(ends, states.features, imagined.slow_values[0], returns[0])
        loss = world.total + behaviour["policy_loss"] + behaviour["value_loss"] + c.replay_value_scale * replayed
        scalars = {**world.parts, **behaviour, "replay_value_loss": replayed, **logged}
        return loss, scalars, states.detach(), (low, high)

    @torch.no_grad()
    def imagine(self, start: RSSMState, noise: UpdateNoise) -> Imagined:
        """H steps with the current policy from every start [N, ...]; nothing here is differentiated."""
        state, features, actions = start, [start.features.unsqueeze(0)], []
        for draws in zip(
            noise.policy[:-1].split(self._imagined_at_once), noise.prior.split(self._imagined_at_once), strict=True
        ):
            state, seen, chosen = self._imagine_steps(state, *draws)
            features.append(seen.to(features[0].dtype))
            actions.append(chosen)
        actions.append(self.behaviour.policy.sample(features[-1][-1], noise.policy[-1]).unsqueeze(0))
        return self._evaluate_imagined(torch.cat(features), torch.cat(actions))

    def _imagine_steps(
        self, state: RSSMState, policy_noise: Tensor, prior_noise: Tensor
    ) -> tuple[RSSMState, Tensor, Tensor]:
        """n steps of the policy in the model: the last state, features after each [n, N, F] and actions [n, N, A]."""
        features, actions = [], []
        for draw, prior in zip(policy_noise.unbind(), prior_noise.unbind(), strict=True):
            action = self.behaviour.policy.sample(state.features, draw)
            state = self.world_model.rssm.imagine_step(state, action, prior)
            actions.append(action)
            features.append(state.features)
        rows = (len(features), -1)  # torch.stack copies on one thread
        return state, torch.cat(features).unflatten(0, rows), torch.cat(actions).unflatten(0, rows)

    def _evaluate_imagined(self, features: Tensor, actions: Tensor) -> Imagined:
        model, behaviour = self.world_model, self.behaviour
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
            "policy_loss": policy_loss(log_prob, entropy, advantage, weight, self.config.entropy_scale),
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
        """The critic on real rows, with gradient into the world model through features [T, B, F].

        rows: rewards, terminated, truncated and is_first, [T, B] each; slow_values, boot: [T B], the slow critic and
        the imagined returns of the starts.
        """
        c, (rewards, terminated, truncated, is_first) = self.config, rows
        last = torch.maximum(terminated, truncated)
        last = torch.cat([torch.maximum(last[:-1], is_first[1:]), last[-1:]])  # an abandoned episode ends too
        target = replay_returns(rewards, terminated, last, boot.view(rewards.shape), c.discount, c.lam)
        error = self._value_error(features[:-1], target, slow_values.view(rewards.shape)[:-1])
        return ((1 - last[:-1]) * error).mean()

    def _value_error(self, features: Tensor, target: Tensor, slow_value: Tensor) -> Tensor:
        """Cross-entropy of the critic with the return, plus that with the slow critic's value: [...]."""
        logits, bins = self.behaviour.value(features).float(), self.world_model.bins
        both = fn.two_hot(target.detach(), bins) + fn.two_hot(slow_value.detach(), bins)
        return fn.soft_cross_entropy(logits, both)

    def _decode(self, logits: Tensor) -> Tensor:
        return fn.antisymmetric_mean(logits.float(), self.world_model.bins)

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
        self._learn.forget()


def compact(state: RSSMState) -> Tensors:
    """A state as replay keeps it: deter as bfloat16 bits [..., D] uint16, stoch as class indices [..., S] uint8."""
    bits = state.deter.detach().to(torch.bfloat16).contiguous().view(torch.uint16)
    return {"deter": bits, "stoch": state.stoch.detach().argmax(-1).to(torch.uint8)}


def expand(deter: Tensor, stoch: Tensor, classes: int) -> RSSMState:
    """The inverse of `compact`, in float32."""
    wide = deter.contiguous().view(torch.bfloat16).float()
    return RSSMState(wide, fn.one_hot(stoch, classes).float())


def _as_mapping(obs: Any) -> dict[str, Any]:
    return dict(obs) if isinstance(obs, Mapping) else {"obs": obs}
