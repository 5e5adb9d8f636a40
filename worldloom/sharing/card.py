"""The model card of an agent: README.md, which says what the agent can do, where it comes from and how to load it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.locations import Location, is_file, locate, read_bytes
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.report.origin import commit, versions

LIBRARY_LICENCE = "mit"
UNKNOWN_TASK = "YOUR-ENVIRONMENT-v0"


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Facts about a trained agent; None leaves one out. Returns are undiscounted sums over an episode.

    task: the id of its environment, as `make_env` takes it. licence: of the weights, as the Hub writes it (mit,
    apache-2.0, cc-by-4.0). commit: of the checkout that trained it.
    """

    algorithm: str
    task: str | None = None
    action_repeat: int = 1
    environment: str = ""  # further arguments of make_env, as Python writes them
    return_mean: float | None = None
    return_std: float = 0.0  # over episodes
    episodes: int = 0  # that were played for the return
    env_steps: int | None = None  # agent steps; frames are these times action_repeat
    updates: int | None = None
    seed: int | None = None
    command: str | None = None
    commit: str | None = None
    versions: str | None = None
    started_from: str | None = None  # the checkpoint whose weights training began with
    converted_from: str | None = None  # the file of a family's authors that the weights are of
    licence: str = LIBRARY_LICENCE

    @property
    def title(self) -> str:
        return f"{self.algorithm} on {self.task}" if self.task else self.algorithm

    def text(self, load: str = "load_agent('PATH')") -> str:
        """Return the README: facts that the Hub reads, then those that people read. load: how the example loads it."""
        parts = ["---", *self._front(), "---", "", f"# {self.title}", "", self._lead(), "", *self._facts(), ""]
        return "\n".join([*parts, "## Use", "", "```python", *self._example(load), "```", ""])

    def _front(self) -> Iterator[str]:
        """Yield the Hub's metadata. JSON's strings are YAML's too."""
        family = self.algorithm.partition(":")[0]
        yield from ("library_name: worldloom", f"license: {json.dumps(self.licence)}")
        yield "pipeline_tag: reinforcement-learning"
        named = [family, self.task] if self.task else [family]
        yield f"tags: {json.dumps(['reinforcement-learning', 'world-model', *named])}"
        if self.return_mean is not None and self.task:
            task = json.dumps(self.task)
            yield from ("model-index:", f"- name: {json.dumps(self.algorithm)}", "  results:")
            yield "  - task: {type: reinforcement-learning, name: reinforcement-learning}"
            yield f"    dataset: {{name: {task}, type: {task}}}"
            value = json.dumps(f"{self.return_mean:.1f} +/- {self.return_std:.1f}")
            yield f"    metrics: [{{type: mean_reward, name: mean_reward, value: {value}, verified: false}}]"

    def _lead(self) -> str:
        if self.converted_from is not None:
            return f"A world model and the agent that acts with it: the weights of `{self.converted_from}`, converted."
        made = "A world model and the agent that acts with it, trained with WorldLoom."
        if self.return_mean is None:
            return f"{made} It was not evaluated at its last step."
        mean, std = self.return_mean, self.return_std
        return f"{made} Its return is {mean:.1f} ± {std:.1f} (mean and deviation over {self.episodes} episodes)."

    def _facts(self) -> list[str]:
        frames = None if self.env_steps is None else self.env_steps * self.action_repeat
        rows: dict[str, Any] = {
            "task": self.task and f"`{self.task}`, action repeat {self.action_repeat}",
            "environment steps": self.env_steps if frames is None else f"{self.env_steps:,} ({frames:,} frames)",
            "updates": None if self.updates is None else f"{self.updates:,}",
            "seed": self.seed,
            "started from": self.started_from and f"`{self.started_from}`",
            "command": self.command and f"`{self.command}`",
            "commit": self.commit and f"`{self.commit}`",
            "versions": self.versions,
            "licence of the weights": self.licence,
        }
        return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value is not None)]

    def _example(self, load: str) -> list[str]:
        task, repeat, more = self.task or UNKNOWN_TASK, self.action_repeat, self.environment
        return [
            "import numpy as np, worldloom, worldloom.envs",
            *(["from worldloom.envs import AtariConfig, DMCConfig"] if "Config(" in more else []),
            f"agent = worldloom.{load}",
            f"env = worldloom.envs.make_env({task!r}, action_repeat={repeat}{more and f', {more}'})",
            "actions, state = agent.act(env.reset(), None, is_first=np.ones(1, bool), explore=False)",
            "step = env.step(actions)  # and so on, with act(step.obs, state, step.is_first, explore=False)",
        ]


def card_of_run(run: Location, licence: str = LIBRARY_LICENCE) -> ModelCard:
    """Return the card of a run's newest checkpoint.

    The return is left out if the run was not evaluated at that step. Raises CheckpointError if there is no checkpoint.
    """
    root = locate(run)
    manifest = read_manifest(newest_checkpoint(root))
    steps = int(manifest["limiter"]["env_steps"])
    summary = _summary(root)
    facts: dict[str, Any] = {name: summary.get(name) for name in ("command", "commit", "versions", "seed")}
    if summary.get("env_steps") == steps and summary.get("eval_return_mean") is not None:
        facts |= {"return_mean": summary["eval_return_mean"], "return_std": summary["eval_return_std"]}
        facts["episodes"] = summary["eval_episodes"]
    config = root / "config.yaml"
    settings = yaml.safe_load(read_bytes(config)) if is_file(config) else {}
    env = settings.get("env", {})
    counted = summary.get("env_steps") or 0
    return ModelCard(
        algorithm=manifest["algorithm"],
        task=manifest["env_id"],
        action_repeat=env.get("action_repeat", summary["frames"] // counted if counted else 1),
        environment=_environment(env),
        env_steps=steps,
        updates=int(manifest["limiter"]["updates"]),
        started_from=settings.get("start", {}).get("checkpoint"),
        licence=licence,
        **facts,
    )


def _environment(env: dict[str, Any]) -> str:
    """Return the arguments of make_env, other than id and action repeat, that differ from its own in evaluations."""
    plain = {"frame_stack": 1, "image_size": None}
    given = [f"{name}={env[name]!r}" for name, value in plain.items() if env.get(name, value) != value]
    atari, dmc = (_known(kind, env.get(name, {})) for kind, name in ((AtariConfig, "atari"), (DMCConfig, "dmc")))
    kinds: tuple[tuple[str, Any], ...] = (("atari", AtariConfig(**atari).for_evaluation()), ("dmc", DMCConfig(**dmc)))
    for section, used in kinds:
        own = type(used)()
        fields = {name: value for name, value in vars(used).items() if value != getattr(own, name)}
        if fields:
            words = ", ".join(f"{name}={value!r}" for name, value in fields.items())
            given.append(f"{section}={type(own).__name__}({words})")
    return ", ".join(given)


def _known(kind: type[Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved fields that this version has."""
    return {field.name: saved[field.name] for field in dataclasses.fields(kind) if field.name in saved}


def card_of_agent(family: str, updates: int | None, licence: str, published: str | None = None) -> ModelCard:
    """Return the card of an agent of which no run is known. published: the file of its family's authors, if it is."""
    if published is not None:
        return ModelCard(algorithm=family, converted_from=published, versions=versions(), licence=licence)
    return ModelCard(algorithm=family, updates=updates, commit=commit(), versions=versions(), licence=licence)


def _summary(root: Path) -> dict[str, Any]:
    """Return summary.json of a run; {} while it has none."""
    path = root / "summary.json"
    return dict(json.loads(read_bytes(path))) if is_file(path) else {}
