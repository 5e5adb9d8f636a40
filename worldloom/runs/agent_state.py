"""The agent's part of a checkpoint."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldloom.files import CheckpointError, checksum_of, read_msgpack, write_msgpack
from worldloom.locations import is_remote, upload
from worldloom.pretrained import read_description, save_described, save_parameters
from worldloom.types import Agent

logger = logging.getLogger(__name__)


def check_finite(modules: Sequence[nn.Module]) -> None:
    """Raise FloatingPointError if parameters are NaN or infinite, so that they are not saved."""
    if not all(p.isfinite().all() for module in modules for p in module.parameters()):
        raise FloatingPointError(
            "parameters are NaN or infinite, so no checkpoint was written. Lower the learning rate (agent.lr), or go "
            "on from the last checkpoint with --resume."
        )


@dataclass(frozen=True)
class AgentSnapshot:
    """The agent's part of a checkpoint."""

    description: dict[str, Any]
    model: Mapping[str, torch.Tensor]
    behaviour: Mapping[str, torch.Tensor] | None
    state: Mapping[str, Any]


def take_agent(agent: Agent) -> AgentSnapshot:
    """Return views of the agent's state. Raises FloatingPointError if parameters are NaN or infinite."""
    behaviour = agent.behaviour
    check_finite([agent.world_model, *([] if behaviour is None else [behaviour])])
    own = None if behaviour is None else behaviour.state_dict()
    return AgentSnapshot(agent.describe(), agent.world_model.state_dict(), own, agent.state_dict())


def copy_agent(agent: Agent) -> AgentSnapshot:
    """Copy the agent's state to CPU memory, for `write_agent` while the agent goes on learning.

    Raises the errors of `take_agent`."""
    taken, copies = take_agent(agent), {}

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):  # a parameter may occur several times
            key = (value.data_ptr(), tuple(value.shape), value.dtype)
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, Mapping):
            return {name: copied(part) for name, part in value.items()}
        return [copied(part) for part in value] if isinstance(value, list | tuple) else value

    behaviour = copied(taken.behaviour) if taken.behaviour is not None else None
    return AgentSnapshot(taken.description, copied(taken.model), behaviour, copied(taken.state))


def write_agent(folder: Path, snapshot: AgentSnapshot) -> dict[str, str]:
    """Write a snapshot; return path relative to `folder` -> checksum, of its files."""
    if is_remote(folder):  # safetensors writes to disks only
        with tempfile.TemporaryDirectory(prefix="worldloom-") as local:
            files = write_agent(Path(local), snapshot)
            for name in files:
                upload(Path(local) / name, folder / name)
        return files
    save_described(folder / "agent", snapshot.description, snapshot.model)
    if snapshot.behaviour is not None:
        save_parameters(folder / "agent" / "behaviour.safetensors", snapshot.behaviour)
    files = {f"agent/{path.name}": checksum_of(path) for path in (folder / "agent").iterdir()}
    return {**files, "learner.msgpack": write_msgpack(folder / "learner.msgpack", snapshot.state)}


def rescue_agent(run_dir: Path, snapshot: AgentSnapshot) -> Path | None:
    """Save the agent alone, after a checkpoint could not be written: into the run directory, else into the system's
    temporary folder. Return the folder for `load_agent`, or None if neither takes it."""
    for parent in (str(run_dir), None):  # None: the temporary folder
        try:
            folder = Path(tempfile.mkdtemp(prefix="rescued-" if parent else f"worldloom-{run_dir.name}-", dir=parent))
            write_agent(folder, snapshot)
            return folder / "agent"
        except OSError as error:
            logger.warning("the agent could not be saved in %s: %s", parent or tempfile.gettempdir(), error)
    return None


def load_agent_state(folder: Path, agent: Agent) -> None:
    """Load the agent's state. Settings that change no parameter shape, such as the learning rate, may differ.

    Raises CheckpointError if the checkpoint is of another model.
    """
    expected = json.loads(json.dumps(agent.describe()))
    try:
        saved = read_description(folder / "agent")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    if {**saved, "config": None} != {**expected, "config": None}:
        raise _of_another_model(folder, saved, expected)
    state = read_msgpack(folder / "learner.msgpack")
    try:
        agent.load_state_dict(state)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:  # of other shapes or names
        if saved != expected:
            raise _of_another_model(folder, saved, expected) from error
        raise CheckpointError(
            f"{folder / 'learner.msgpack'} is damaged, or of another version: {error}. Delete its checkpoint to use "
            "the one before it."
        ) from error


def _of_another_model(folder: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> CheckpointError:
    difference = _difference(saved, expected)
    return CheckpointError(f"{folder} is of another model: {difference}. Resume with its own config.")


def _difference(saved: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted(saved.keys() | expected.keys()):
        a, b = saved.get(key, "missing"), expected.get(key, "missing")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            parts.append(_difference(a, b, f"{prefix}{key}."))
        elif a != b:
            parts.append(f"{prefix}{key} is {a!r} there, {b!r} here")
    return "; ".join(part for part in parts if part)
