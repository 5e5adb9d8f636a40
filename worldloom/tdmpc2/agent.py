"""The TD-MPC2 agent: plans to act, and learns model, values and policy in one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.capture import Captured, Tensors
from worldloom.nets import compile_part, flatten, load_flat
from worldloom.optim import flat_gradient, load_optimizer
from worldloom.staging import Columns, Staging
from worldloom.tally import Tally
from worldloom.tdmpc2.planner import Planner
from worldloom.tdmpc2.world_model import TDMPC2WorldModel, alternatives
from worldloom.types import ActState, Array, Batch, ColumnSpec, Metrics, ObsArray, Precision, WindowSpec

NOT_EPISODIC = (
    "warning: episodes end truly here (terminated), but the model has no termination head, so its plans look past the "
    "end. Set agent.episodic: true."
)


ROWS = ("obs", "actions", "rewards", "terminated", "continues", "task")  # what an update reads of a batch


class RunningScale:
    """S, the running distance of the 5th and 95th percentiles, at least 1: values are divided by it."""

    def __init__(self, tau: float, device: torch.device | None = None) -> None:
        self.tau = tau
        self.value = torch.ones((), device=device)

    def after(self, x: Tensor) -> Tensor:
        """Where `value` moves to with these values; whoever makes the update takes it there."""
        low, high = fn.percentile_range(x)
        return self.value.lerp((high - low).clamp(min=1.0), self.tau)


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
        self.device = model.bins.device
        self.scale = RunningScale(c.tau, self.device)
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self._generator = torch.Generator(self.device).manual_seed(seed + 1)  # of learning
        policy = list(model.policy.parameters())
        encoder = list(model.encoder.parameters())
        apart = {id(p) for p in [*policy, *encoder]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        self._model_parameters, self._policy_parameters = [*encoder, *rest], policy
        groups: list[dict[str, Any]] = [{"params": encoder, "lr": c.lr * c.encoder_lr_scale}, {"params": rest}]
        cuda = self.device.type == "cuda"
        self._model_optimizer = torch.optim.Adam(groups, lr=c.lr, fused=True, capturable=cuda)
        self._policy_optimizer = torch.optim.Adam(policy, lr=c.lr, eps=1e-5, fused=True, capturable=cuda)
        self._tally, self._staging = Tally(), Staging(self.device)
        self._learn = Captured(self.core, self.device, self._generator)
        self._act = Captured(self._choose, self.device, self.acting_generator)

    def configure_learning(self, precision: Precision, compiled: bool, capture: bool = True) -> None:
        """Compiled, the losses of the model and of the policy are a graph each, and on a GPU an iteration of the
        planner (on a CPU that gains nothing)."""
        if precision != "float32":
            raise ValueError(f"train.precision is {precision!r}, but TD-MPC2 learns in float32, as published.")
        cuda = self.device.type == "cuda"
        self._learn.enabled = self._act.enabled = capture and cuda
        if compiled:
            compile_part(self.world_model, "losses")
            compile_part(self, "_policy_loss")
        if compiled and cuda:
            compile_part(self.planner, "iterate")
            compile_part(self.planner, "policy_sequences")

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
        numbers = None if task is None else torch.as_tensor(task).long()
        shown = self.world_model.check_observation("act", torch.as_tensor(obs), numbers)
        given = {
            "obs": shown,
            "is_first": torch.as_tensor(is_first),
            "mean": self._previous_mean(act_state, len(shown)),
        }
        found = self._act(given if numbers is None else {**given, "task": numbers}, explore=explore)
        mean = found["mean"].clone()  # the next call fills the same buffers
        return found["action"].cpu().numpy(), {"mean": mean}

    def _choose(self, given: Tensors, explore: bool) -> Tensors:
        """On the device alone: actions and plans for these observations."""
        model, task = self.world_model, given.get("task")
        z = model.latent(given["obs"], task, model.draw_eval_shifts(len(given["obs"]), self.acting_generator))
        noise = self.planner.draw_noise(len(z), self.acting_generator)
        mean = given["mean"] * ~given["is_first"][:, None, None]
        if self.config.mpc:
            action, mean = self.planner.plan(z, mean, noise, explore, task)
        else:
            sample = model.sample_policy(z, noise.explore, model.action_mask(task))
            action = sample.action if explore else sample.mean_action
        return {"action": action, "mean": mean}

    def _previous_mean(self, act_state: ActState | None, envs: int) -> Tensor:
        if act_state is None:
            return torch.zeros(envs, self.config.horizon, self.world_model.action_dim, device=self.device)
        if len(act_state["mean"]) != envs:
            raise ValueError(
                f"act: act_state has {len(act_state['mean'])} rows and obs {envs}. Keep one act_state for each "
                "vector of environments."
            )
        return act_state["mean"]

    def replay_columns(self, act_state: ActState) -> dict[str, Array]:  # noqa: ARG002 - the protocol's argument
        return {}

    # Learning

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Array]]:
        """One update: world model, then policy, then target values (algorithm 2 of the paper).

        An update with a loss or gradient that is not finite changes nothing. Raises FloatingPointError after several of
        them in a row, ValueError for a batch of other keys or shapes.
        """
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def learn(self, batch: Batch) -> Columns:
        """`update` without waiting for the device; `collect` reads its metrics."""
        made = self._learn(self._staging.send(self.stage(batch)))
        self.updates += 1
        return Columns(made)

    def collect(self) -> Metrics:
        """Means over the updates since the last call. Waits for the device. Raises FloatingPointError as `update`."""
        return self._tally.read()

    def stage(self, batch: Batch) -> Tensors:
        """What the update reads of a batch, by name."""
        given: Tensors = {name: torch.as_tensor(batch[name]) for name in ROWS if name in batch}  # type: ignore[literal-required]
        if given["actions"].shape[1] != self.windows.length:
            raise ValueError(
                f"update: the batch has {given['actions'].shape[1]} rows, expected {self.windows.length}: the steps of "
                "agent.horizon and the row that they start from. Make the replay with windows=agent.windows."
            )
        task = self.world_model.batch_task(cast(Batch, given))
        rest = {name: value for name, value in given.items() if name != "task"}
        return rest if task is None else {**rest, "task": task}

    def core(self, given: Tensors) -> Tensors:
        """The update on the device alone: nothing is read back, and no number in Python changes between updates."""
        model, batch = self.world_model, cast(Batch, given)
        noise = model.draw_noise(batch["actions"].shape[0], batch["actions"].shape[1], self._generator)
        found = model.losses(batch, noise)
        made, grad_norm = self._step(found.loss, self._model_parameters, self._model_optimizer)
        task = given.get("task")
        latents = model.with_task_embedding(found.latents.detach(), task)
        policy, made = self._update_policy(latents, model.action_mask(task), made)
        model.update_targets(made)
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
        self._tally.add(scalars, made)
        return {}

    def _step(
        self, loss: Tensor, params: Sequence[Tensor], optimizer: torch.optim.Optimizer, allowed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clip the gradient's norm and step; a gradient that is not finite, or `allowed` False, changes nothing.

        Returns whether the step was made, and the norm before clipping.
        """
        flat, grads = flat_gradient(loss, params)
        norm = torch.linalg.vector_norm(flat)
        made = torch.isfinite(norm) & torch.isfinite(loss.detach())
        made = made if allowed is None else made & allowed
        flat.mul_((self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        optimizer.found_inf = (~made).float()  # type: ignore[attr-defined]  # torch's fused Adam skips where it is 1
        optimizer.step()
        return made, norm

    def _update_policy(self, z: Tensor, mask: Tensor | None, allowed: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Maximise scaled values plus entropy on z [B, H+1, D + T]; value heads and task embeddings are frozen.

        mask: [B, A], for a multi-task model. allowed: bool scalar. Returns scalars, and whether the step was made.
        """
        model = self.world_model
        noise = torch.randn(*z.shape[:-1], model.action_dim, device=self.device, generator=self._generator)
        heads = model.draw_heads(self._generator)
        dropped = model.draw_dropped((*z.shape[:-1], len(heads)), self._generator)
        wide = None if mask is None else mask[:, None]
        loss, value, entropy, scale = self._policy_loss(z, noise, heads, dropped, wide)
        made, norm = self._step(loss, self._policy_parameters, self._policy_optimizer, allowed)
        self.scale.value.copy_(torch.where(made, scale, self.scale.value))
        return {"policy_loss": loss, "policy_grad_norm": norm, "policy_entropy": entropy, "value": value}, made

    def _policy_loss(
        self, z: Tensor, noise: Tensor, heads: Tensor, dropped: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, means of value and entropy, and the scale of values that it is computed with."""
        model, c = self.world_model, self.config
        sample = model.sample_policy(z, noise, mask)
        if model.action_classes:
            values = self._choice_values(z, sample.action, heads, dropped)  # [B, H+1, A]
            value = (sample.log_std.exp() * values).sum(-1).detach() / len(model.action_classes)
        else:
            value = self._frozen_value(z, sample.action, heads, dropped)  # [B, H+1]
        scale = self.scale.after(value[:, 0])
        if model.action_classes:
            target = boltzmann(values, scale * c.entropy_coef, model.action_classes)
            loss = discounted_mean(-(target * sample.log_std).sum(-1), c.rho)
        else:
            loss = policy_loss(value / scale, sample.scaled_entropy, c.rho, c.entropy_coef)
        return loss, value.mean(), -sample.log_prob.mean(), scale

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
            "scale": self.scale.value.clone(),
            "updates": self.updates,
            "generator": self._generator.get_state(),
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.world_model.load_state_dict(state["model"])
        load_optimizer(self._model_optimizer, state["model_optimizer"])
        load_optimizer(self._policy_optimizer, state["policy_optimizer"])
        self.scale.value.copy_(state["scale"])
        self.updates = int(state["updates"])
        self._generator.set_state(state["generator"])
        self.acting_generator.set_state(state["acting_generator"])
        self._learn.forget()


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
