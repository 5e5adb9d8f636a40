"""The subject of a report."""

from __future__ import annotations

from dataclasses import dataclass

from worldloom.envs.suites import AtariConfig, DMCConfig


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The facts about a run that its metrics, its page and published curves need."""

    algorithm: str
    env_id: str
    action_repeat: int
    atari: AtariConfig
    dmc: DMCConfig
    total_steps: int  # environment (agent) steps
    seed: int
    runtime: str  # ray or inline
