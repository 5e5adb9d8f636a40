"""Learners that `Trainer` updates: a world model with the trainer's optimiser, or an agent with its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from worldloom.files import CheckpointError
from worldloom.pretrained import load_parameters, save_model, save_parameters
from worldloom.replay.buffer import ReplayBuffer
from worldloom.runs.agent_state import check_finite
from worldloom.runs.build import choose_device
from worldloom.training.config import TrainingConfig
from worldloom.types import Agent, Batch, WorldModel


class Learner(Protocol):
    """Learns from a buffer; `draws` chooses the sequences."""

    model: WorldModel
    device: torch.device

    def check(self, buffer: ReplayBuffer) -> None:
        """Raise ValueError if the buffer does not fit the model, or holds no sequence that is long enough."""

    def update(self, buffer: ReplayBuffer, draws: np.random.Generator, step: int) -> dict[str, float]:
        """Update once and return the metrics. Raises FloatingPointError for a NaN loss, before parameters change."""

    def losses(self, buffer: ReplayBuffer, draws: np.random.Generator) -> dict[str, float]:
        """Return the world model's losses on one batch."""

    def check_finite(self) -> None:
        """Raise FloatingPointError if a parameter is NaN or infinite."""

    def save(self, folder: Path) -> None:
        """Write the files that `create_world_model` and, for an agent, `load_agent` read."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that `load` needs in addition to these files."""

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Load a checkpoint. Raises CheckpointError if it is of another model."""


def make_learner(model: WorldModel | Agent, config: TrainingConfig) -> Learner:
    """Return the learner of a model. Raises TypeError unless it is a world model or an agent, ValueError for an absent
    device."""
    if isinstance(model, nn.Module) and isinstance(model, WorldModel):
        return ModelLearner(model, config)
    if isinstance(model, Agent):
        return AgentLearner(model)
    raise TypeError(f"Trainer: model is a {type(model).__name__}, expected a world model or an agent.")


class ModelLearner:
    """Learns by `compute_loss` and AdamW, with a linear warm-up and the gradient's global norm clipped."""

    def __init__(self, model: WorldModel, config: TrainingConfig) -> None:
        self.model, self.config = model, config
        self.device = torch.device(choose_device(config.device))
        self._module = cast(nn.Module, model).to(self.device)
        self._parameters = [p for p in self._module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay)

    def check(self, buffer: ReplayBuffer) -> None:
        _check_shapes(self.model, buffer)
        buffer.check_length(self.config.sequence_length)

    def update(self, buffer: ReplayBuffer, draws: np.random.Generator, step: int) -> dict[str, float]:
        losses = self.model.compute_loss(self._sample(buffer, draws))
        self._optimizer.zero_grad()
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.grad_clip)
        metrics = _floats({**losses, "grad_norm": norm})
        if bad := [name for name, value in metrics.items() if not np.isfinite(value)]:
            raise FloatingPointError(
                f"update {step}: {', '.join(bad)} is NaN or infinite, so this update was not made. Lower "
                "learning_rate, or look for huge values in the data."
            )
        rise = min((step + 1) / max(self.config.warmup_steps, 1), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rise
        self._optimizer.step()
        self.model.update_targets()
        return metrics

    def losses(self, buffer: ReplayBuffer, draws: np.random.Generator) -> dict[str, float]:
        return _floats(self.model.compute_loss(self._sample(buffer, draws)))

    def _sample(self, buffer: ReplayBuffer, draws: np.random.Generator) -> Batch:
        return buffer.sample(self.config.batch_size, self.config.sequence_length, self.device, draws)

    def check_finite(self) -> None:
        check_finite([self._module])

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict()}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        try:
            if "optimizer" not in state:
                raise ValueError("it was saved while an agent was trained, not a world model alone")
            load_parameters(folder / "model.safetensors", self._module)
            self._optimizer.load_state_dict(state["optimizer"])
        except (ValueError, FileNotFoundError) as error:
            raise CheckpointError(f"{folder} is of another model: {error}") from error


class AgentLearner:
    """Learns by the agent's own update: its optimisers, batch size and windows."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.model = agent, cast(WorldModel, agent.world_model)
        self.device = next(agent.world_model.parameters()).device
        self._modules = [agent.world_model, *([] if agent.behaviour is None else [agent.behaviour])]

    def check(self, buffer: ReplayBuffer) -> None:
        _check_shapes(self.model, buffer)
        if missing := self.agent.columns.keys() - buffer.specs.keys():
            raise ValueError(
                f"the buffer has no column {', '.join(sorted(missing))}, which the agent learns from. Make it with "
                "ReplayBuffer(…, windows=agent.windows, columns=agent.columns)."
            )
        buffer.check_length(self.agent.windows.length)

    def update(self, buffer: ReplayBuffer, draws: np.random.Generator, step: int) -> dict[str, float]:  # noqa: ARG002
        batch = self._sample(buffer, draws)
        metrics, columns = self.agent.update(batch)
        if columns:
            buffer.write_back(batch["rows"].cpu().numpy(), columns)
        return metrics

    def losses(self, buffer: ReplayBuffer, draws: np.random.Generator) -> dict[str, float]:
        return _floats(self.model.compute_loss(self._sample(buffer, draws)))

    def _sample(self, buffer: ReplayBuffer, draws: np.random.Generator) -> Batch:
        return buffer.sample(self.agent.batch_size, self.agent.windows.length, self.device, draws)

    def check_finite(self) -> None:
        check_finite(self._modules)

    def save(self, folder: Path) -> None:
        save_model(folder, self.agent.describe(), self.agent.world_model)
        if self.agent.behaviour is not None:
            save_parameters(folder / "behaviour.safetensors", self.agent.behaviour.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"agent": self.agent.state_dict()}

    def load(self, folder: Path, state: Mapping[str, Any]) -> None:
        try:
            self.agent.load_state_dict(state["agent"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} is of another agent: {error}") from error


def _check_shapes(model: WorldModel, buffer: ReplayBuffer) -> None:
    described = cast(Any, model)
    for name in ("obs_shape", "action_dim"):
        wanted, found = getattr(described, name, None), getattr(buffer, name)
        if wanted is not None and wanted != found:
            raise ValueError(f"the buffer has {name}={found}, but the model has {name}={wanted}.")


def _floats(losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
    values = torch.stack([value.detach().float() for value in losses.values()]).tolist()
    return dict(zip(losses, values, strict=True))
