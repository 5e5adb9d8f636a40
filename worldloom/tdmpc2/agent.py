"""The TD-MPC2 agent: plans to act, and learns model, values and policy in one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.nets import flatten, load_flat
from worldloom.optim import load_optimizer
from worldloom.tdmpc2.planner import Planner
from worldloom.tdmpc2.world_model import TDMPC2WorldModel, alternatives
from worldloom.types import ActState, Array, Batch, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec

NOT_EPISODIC = (
    "warning: episodes end truly here (terminated), but the model has no termination head, so its plans look past the "
    "end. Set agent.episodic: true."
)


class RunningScale:
    """S, the running distance of the 5th and 95th percentiles, at least 1: values are divided by it."""

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self.value = torch.ones(())

    def update(self, x: Tensor) -> None:
        low, high = fn.percentile_range(x)
        self.value = self.value.to(x.device).lerp((high - low).clamp(min=1.0), self.tau)


class TDMPC2Agent:
    """Acts on vectors or images with continuous or one-hot actions; see `worldloom.types.Agent` for the protocol."""

    behaviour = None  # the world model holds policy and values
    random_warmup = True
    default_precision: Precision = "float32"

    def __init__(self, model: TDMPC2WorldModel, seed: int = 0, action_classes: tuple[int, ...] = ()) -> None:
        if tuple(action_classes) != model.action_classes:
            raise ValueError(f"the agent has action classes {action_classes}, its model {model.action_classes}.")
        c = model.config
        self.world_model, self.config, self.planner = model, c, Planner(model)
        self.batch_size, self.pretrain = c.batch_size, c.pretrain
        self.columns: Mapping[str, ColumnSpec] = {"task": ColumnSpec((), "int32")} if model.tasks else {}
        self.windows = WindowSpec(length=c.horizon + 1, context=1, crosses_episodes=False)
        self.train_ratio = float(c.batch_size * c.horizon)  # one update per environment step
        self.true_ends_hint = None if c.episodic else NOT_EPISODIC
        self.plans = c.mpc
        self.updates = 0
        self.scale = RunningScale(c.tau)
        self.device = model.bins.device
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._generator = torch.Generator(self.device).manual_seed(seed + 1)  # of learning
        policy = list(model.policy.parameters())
        encoder = list(model.encoder.parameters())
        apart = {id(p) for p in [*policy, *encoder]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        self._model_parameters, self._policy_parameters = [*encoder, *rest], policy
        groups: list[dict[str, Any]] = [{"params": encoder, "lr": c.lr * c.encoder_lr_scale}, {"params": rest}]
        self._model_optimizer = torch.optim.Adam(groups, lr=c.lr, fused=True)
        self._policy_optimizer = torch.optim.Adam(policy, lr=c.lr, eps=1e-5, fused=True)

    def configure_learning(self, precision: Precision, compiled: bool) -> None:
        """Compiled, the losses of the model and of the policy are a graph each."""
        if precision != "float32":
            raise ValueError(f"train.precision is {precision!r}, but TD-MPC2 learns in float32, as published.")
        if compiled:
            for owner, name in [(cast(Any, self.world_model), "losses"), (self, "_policy_loss")]:
                setattr(owner, name, torch.compile(getattr(owner, name), fullgraph=True))

    # Acting

    @torch.inference_mode()
    def act(
        self,
        obs: ObsArray,
        act_state: ActState | None,
        is_first: Array,
        explore: bool = True,
        task: Array | None = None,
    ) -> tuple[Array, ActState]:
        """Actions [E, A] in [-1, 1] or one-hot for obs [E, *obs_shape]; act_state holds every environment's last plan.

        task: [E] numbers of the tasks, for a multi-task model; actions beyond a task's own are zero.
        """
        numbers = None if task is None else torch.as_tensor(task, device=self.device).long()
        model, shown = self.world_model, torch.as_tensor(obs, device=self.device)
        shown = model.check_observation("act", shown, numbers)
        z = model.latent(shown, numbers, model.draw_eval_shifts(len(shown), self.acting_generator))
        noise = self.planner.draw_noise(len(z), self.acting_generator)
        mean = self._previous_mean(act_state, is_first, len(z))
        if self.config.mpc:
            action, mean = self.planner.plan(z, mean, noise, explore, numbers)
        else:
            sample = self.world_model.sample_policy(z, noise.explore, self.world_model.action_mask(numbers))
            action = sample.action if explore else sample.mean_action
        return action.cpu().numpy(), {"mean": mean}

    def _previous_mean(self, act_state: ActState | None, is_first: Array, envs: int) -> Tensor:
        if act_state is None:
            return torch.zeros(envs, self.config.horizon, self.world_model.action_dim, device=self.device)
        if len(act_state["mean"]) != envs:
            raise ValueError(
                f"act: act_state has {len(act_state['mean'])} rows and obs {envs}. Keep one act_state for each "
                "vector of environments."
            )
        return act_state["mean"] * ~torch.as_tensor(is_first, device=self.device)[:, None, None]

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:  # noqa: ARG002 - the protocol's argument
        return {}

    # Learning

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """One update: world model, then policy, then target values (algorithm 2 of the paper)."""
        batch = cast(Batch, {name: torch.as_tensor(value, device=self.device) for name, value in batch.items()})
        model, c = self.world_model, self.config
        if batch["actions"].shape[1] != self.windows.length:
            raise ValueError(
                f"update: the batch has {batch['actions'].shape[1]} rows, expected {self.windows.length}: the steps of "
                "agent.horizon and the row that they start from. Make the replay with windows=agent.windows."
            )
        noise = model.draw_noise(len(batch["actions"]), batch["actions"].shape[1], self._generator)
        found = model.losses(batch, noise)
        self._model_optimizer.zero_grad()
        found.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._model_parameters, c.grad_clip)
        self._model_optimizer.step()
        policy = self._update_policy(found.latents.detach(), model.action_mask(model.batch_task(batch)))
        model.update_targets()
        self.updates += 1
        scalars = {
            "loss": found.loss,
            "consistency_loss": found.consistency_loss,
            "reward_loss": found.reward_loss,
            "value_loss": found.value_loss,
            "termination_loss": found.termination_loss,
            "grad_norm": grad_norm,
            "value_scale": self.scale.value,
            **policy,
        }
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
        metrics = dict(zip(scalars, values, strict=True))
        if any(metrics[name] != metrics[name] for name in ("loss", "policy_loss")):
            raise FloatingPointError(self._name_nan(metrics))
        return metrics, {}

    def _update_policy(self, z: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Maximise scaled values plus entropy on z [B, H+1, D + T]; value heads and task embeddings are frozen.

        mask: [B, A], for a multi-task model.
        """
        model, c = self.world_model, self.config
        noise = torch.randn(*z.shape[:-1], model.action_dim, device=self.device, generator=self._generator)
        heads = model.draw_heads(self._generator)
        dropped = model.draw_dropped((*z.shape[:-1], len(heads)), self._generator)
        loss, value, entropy = self._policy_loss(z, noise, heads, dropped, None if mask is None else mask[:, None])
        self._policy_optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._policy_parameters, c.grad_clip)
        self._policy_optimizer.step()
        return {
            "policy_loss": loss,
            "policy_grad_norm": grad_norm,
            "policy_entropy": entropy,
            "value": value,
        }

    def _policy_loss(
        self, z: Tensor, noise: Tensor, heads: Tensor, dropped: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and means of value and entropy; the scale of values follows."""
        model, c = self.world_model, self.config
        sample = model.sample_policy(z, noise, mask)
        if model.action_classes:
            values = self._choice_values(z, sample.action, heads, dropped)  # [B, H+1, A]
            value = (sample.log_std.exp() * values).sum(-1).detach() / len(model.action_classes)
        else:
            value = self._frozen_value(z, sample.action, heads, dropped)  # [B, H+1]
        self.scale.update(value[:, 0])
        if model.action_classes:
            target = boltzmann(values, self.scale.value * c.entropy_coef, model.action_classes)
            loss = discounted_mean(-(target * sample.log_std).sum(-1), c.rho)
        else:
            loss = policy_loss(value / self.scale.value, sample.scaled_entropy, c.rho, c.entropy_coef)
        return loss, value.mean(), -sample.log_prob.mean()

    def _frozen_value(self, z: Tensor, action: Tensor, heads: Tensor, dropped: Tensor | None) -> Tensor:
        model = self.world_model
        joint, rate = torch.cat([z, action], -1), self.config.dropout
        logits = model.q(joint, heads, dropped=dropped, rate=rate, frozen=True)
        return fn.symlog_mean(logits, model.bins).mean(0)

    @torch.no_grad()
    def _choice_values(self, z: Tensor, drawn: Tensor, heads: Tensor, dropped: Tensor | None) -> Tensor:
        """[B, H+1, A]: the value of every choice of every part, the other parts as `drawn`."""
        others = alternatives(drawn, self.world_model.action_classes)  # [A, B, H+1, A]
        wide = None if dropped is None else dropped.expand(len(others), *dropped.shape)
        return self._frozen_value(z.expand(len(others), *z.shape), others, heads, wide).movedim(0, -1)

    def _name_nan(self, metrics: Metrics) -> str:
        bad = [name for name, value in metrics.items() if name.endswith("_loss") and value != value]
        return (
            f"update {self.updates}: NaN in {', '.join(bad) or 'loss'}. Look for huge rewards or observations; "
            "lower agent.lr, or go on from the last checkpoint with --resume."
        )

    # Exchange

    def _acting_parameters(self) -> list[Tensor]:
        model = self.world_model
        modules: list[nn.Module] = [model.encoder, model.policy]
        if self.config.mpc:
            modules += [model.dynamics, model.reward, model.q]
            modules += [] if model.termination is None else [model.termination]
        modules += [] if model.task_embedding is None else [model.task_embedding]
        return [parameter.detach() for module in modules for parameter in module.parameters()]

    def acting_weights(self) -> Array:
        return flatten(self._acting_parameters())

    def load_acting_weights(self, flat: Array) -> None:
        load_flat(self._acting_parameters(), flat)

    def describe(self) -> dict[str, Any]:
        return self.world_model.describe()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.world_model.state_dict(),
            "model_optimizer": self._model_optimizer.state_dict(),
            "policy_optimizer": self._policy_optimizer.state_dict(),
            "scale": self.scale.value,
            "updates": self.updates,
            "generator": self._generator.get_state(),
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.world_model.load_state_dict(state["model"])
        load_optimizer(self._model_optimizer, state["model_optimizer"])
        load_optimizer(self._policy_optimizer, state["policy_optimizer"])
        self.scale.value = state["scale"].to(self.device)
        self.updates = int(state["updates"])
        self._generator.set_state(state["generator"])
        self.acting_generator.set_state(state["acting_generator"])


def boltzmann(values: Tensor, temperature: Tensor, classes: Sequence[int]) -> Tensor:
    """[..., A]: chances of the choices of each part by their values [..., A].

    Of all categorical policies these maximise expected value plus temperature times entropy; a policy that follows
    them by cross-entropy finds back from a wrong certainty, where the gradient of its own expected value is zero.
    """
    parts = (values / temperature).split(tuple(classes), -1)
    return torch.cat([part.softmax(-1) for part in parts], -1)


def discounted_mean(loss: Tensor, rho: float) -> Tensor:
    """Mean over t of rho^t times the mean over B, of [B, T]."""
    weight = rho ** torch.arange(loss.shape[1], device=loss.device)
    return (loss.mean(0) * weight).mean()


def policy_loss(value: Tensor, scaled_entropy: Tensor, rho: float, entropy_coef: float) -> Tensor:
    """-mean over t of rho^t mean over B of (value + entropy bonus); value is already scaled. [B, H+1] each."""
    return -discounted_mean(value + entropy_coef * scaled_entropy, rho)
