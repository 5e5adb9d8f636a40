"""One update of TD-MPC2: world model, then policy, then target values (Hansen et al. 2024, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from worldloom import functional as fn
from worldloom.capture import Tensors
from worldloom.gang import ALONE, Gang
from worldloom.generators import restore_generator
from worldloom.nets import compile_part
from worldloom.optim import GuardedAdam, load_optimizer
from worldloom.tally import Tally
from worldloom.tdmpc2.losses import LossNoise, RunningScale, batch_task, discounted_mean, draw_loss_noise, joint_loss
from worldloom.tdmpc2.policy import Sample
from worldloom.tdmpc2.world_model import TDMPC2WorldModel
from worldloom.types import Batch

ROWS = ("obs", "actions", "rewards", "terminated", "continues", "task")  # what an update reads of a batch


class TDMPC2Learning:
    """TD-MPC2's update: its two optimisers, the scale of values and the generator of its random numbers."""

    def __init__(self, model: TDMPC2WorldModel, seed: int) -> None:
        c, device = model.config, model.bins.device
        self.model, self.scale, self.tally = model, RunningScale(c.tau, device), Tally()
        self.generator = torch.Generator(device).manual_seed(seed)
        policy, encoder = list(model.policy.parameters()), list(model.encoder.parameters())
        apart = {id(p) for p in [*policy, *encoder]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
        groups: list[dict[str, Any]] = [{"params": encoder, "lr": c.lr * c.encoder_lr_scale}, {"params": rest}]
        self.model_optimizer = GuardedAdam(groups, c.lr, 1e-8, c.grad_clip)
        self.policy_optimizer = GuardedAdam([{"params": policy}], c.lr, 1e-5, c.grad_clip)
        self.joint_loss = joint_loss  # `compile` replaces it
        self.gang = ALONE

    def join(self, gang: Gang) -> None:
        """Make updates together with the other learners of a gang from now on."""
        self.gang = self.model_optimizer.gang = self.policy_optimizer.gang = gang
        if gang.size > 1 and vars(self).pop("policy_loss", None):  # compiled with what is to be exchanged in it
            self._compile_policy_loss()

    def compile(self) -> None:
        """Replace the two losses by their compiled forms."""
        compile_part(self, "joint_loss")
        self._compile_policy_loss()

    def _compile_policy_loss(self) -> None:
        for name in ["policy_loss"] if self.gang.size == 1 else ["policy_values", "policy_losses"]:
            compile_part(self, name)

    def stage(self, batch: Batch) -> Tensors:
        """Return what the update reads of a batch, by name. Raises ValueError for another length or wrong tasks."""
        given: Tensors = {name: torch.as_tensor(batch[name]) for name in ROWS if name in batch}  # type: ignore[literal-required]
        length = self.model.config.horizon + 1
        if given["actions"].shape[1] != length:
            raise ValueError(
                f"update: the batch has {given['actions'].shape[1]} rows, expected {length}: the steps of "
                "agent.horizon and the row that they start from. Make the replay with windows=agent.windows."
            )
        task = batch_task(self.model, cast(Batch, given))
        self.model.check_task_numbers("batch['task']", task)
        rest = {name: value for name, value in given.items() if name != "task"}
        return rest if task is None else {**rest, "task": task}

    def core(self, given: Tensors) -> Tensors:
        """Make the update on the device alone; return no columns for replay. See `worldloom.learner.Update`."""
        model, batch = self.model, cast(Batch, given)
        noise = self.draw_noise(*batch["actions"].shape[:2])
        found = self.joint_loss(model, batch, noise)
        made, grad_norm = self.model_optimizer.step(found.loss)
        task = given.get("task")
        latents = model.with_task_embedding(found.latents.detach(), task)
        policy, made = self.update_policy(latents, model.action_mask(task), made)
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
        self.tally.add(scalars, made)
        return {}

    def draw_noise(self, batch: int, rows: int) -> LossNoise:
        """Draw the noise for a batch of [B, T] rows: this learner's share of that for the whole batch."""
        noise = draw_loss_noise(self.model, batch * self.gang.size, rows, self.generator)
        of_rows = {name: value for name, value in vars(noise).items() if value is not None and name != "target_heads"}
        return replace(noise, **{name: self.gang.share(value, 0) for name, value in of_rows.items()})

    def update_policy(self, z: Tensor, mask: Tensor | None, allowed: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Maximise scaled values plus entropy of the policy on z [B, H+1, D + T]; heads and embeddings are frozen.

        mask: [B, A], for a multi-task model. allowed: bool scalar. Returns scalars, and whether the step was made.
        """
        model = self.model
        lead = (self.gang.size * len(z), z.shape[1])
        noise = self.gang.share(torch.randn(*lead, model.action_dim, device=z.device, generator=self.generator), 0)
        heads = model.draw_heads(1, self.generator)[0]
        dropped = model.draw_dropped((*lead, len(heads)), self.generator)
        dropped = None if dropped is None else self.gang.share(dropped, 0)
        wide = None if mask is None else mask[:, None]
        loss, value, entropy, scale = self.policy_loss(z, noise, heads, dropped, wide)
        made, norm = self.policy_optimizer.step(loss, allowed)
        self.scale.value.copy_(torch.where(made, scale, self.scale.value))
        return {"policy_loss": loss, "policy_grad_norm": norm, "policy_entropy": entropy, "value": value}, made

    def policy_loss(
        self, z: Tensor, noise: Tensor, heads: Tensor, dropped: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the loss, means of value and entropy, and the new scale S of values: all scalars.

        The loss is the mean over t of rho^t times the mean over B of `sample.loss` (Hansen et al. 2024, eq. 4).
        """
        sample, values, expected = self.policy_values(z, noise, heads, dropped, mask)
        scale = self.scale.after(self.gang.gather(expected[:, 0].detach()))
        return *self.policy_losses(sample, values, expected, scale), scale

    def policy_values(
        self, z: Tensor, noise: Tensor, heads: Tensor, dropped: Tensor | None, mask: Tensor | None
    ) -> tuple[Sample, Tensor, Tensor]:
        """Return actions that the policy draws, their values as `sample.values`, and the expected values [B, H+1]."""
        sample = self.model.policy.sample(z, noise, mask)
        values = sample.values(lambda action: self.frozen_value(z, action, heads, dropped))
        return sample, values, sample.expected(values)

    def policy_losses(
        self, sample: Sample, values: Tensor, expected: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss with the scale S of the whole batch's values, and means of value and entropy: scalars."""
        c = self.model.config
        loss = discounted_mean(sample.loss(values, scale, c.entropy_coef), c.rho)
        return loss, expected.mean(), -sample.log_prob.mean()

    def frozen_value(self, z: Tensor, action: Tensor, heads: Tensor, dropped: Tensor | None) -> Tensor:
        """Return the mean value [...] of two heads, whose parameters get no gradient; action: [..., A]."""
        model, lead = self.model, action.shape[:-1]
        joint = torch.cat([z.expand(*lead, -1), action], -1)
        wide = None if dropped is None else dropped.expand(*lead, *dropped.shape[-2:])
        logits = model.q(joint, heads, dropped=wide, rate=model.config.dropout, frozen=True)
        return fn.symlog_mean(logits, model.bins).mean(0)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model_optimizer": self.model_optimizer.adam.state_dict(),
            "policy_optimizer": self.policy_optimizer.adam.state_dict(),
            "scale": self.scale.value.clone(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.model_optimizer.adam, state["model_optimizer"])
        load_optimizer(self.policy_optimizer.adam, state["policy_optimizer"])
        self.scale.value.copy_(state["scale"])
        restore_generator(self.generator, state["generator"])
