"""One run, inline or with Ray: its directory, limiter, intervals, records and manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from worldloom.files import CheckpointError, write_text
from worldloom.locations import remove_folder
from worldloom.manifest import read_manifest
from worldloom.replay.chunk import row_bytes
from worldloom.replay.memory import ring_bytes
from worldloom.report.metrics import Recorder
from worldloom.report.sinks import Sink
from worldloom.runs.build import AgentSpec, EnvSpec, make_limiter, replay_columns, subject_of
from worldloom.runs.checkpoint import begin_checkpoint, commit_checkpoint, tidy
from worldloom.runs.config import RunConfig
from worldloom.runs.home import Home
from worldloom.runs.lease import LeaseLost
from worldloom.runs.limiter import Every
from worldloom.spaces import observation_shape
from worldloom.types import ObsShape


class Run:
    """State that the in-process trainer and the Ray coordinator share. Counters go on from those of `checkpoint`.

    It writes the first files of a run. Make it after everything else is restored, so that a failed resume changes no
    file.
    """

    def __init__(
        self,
        config: RunConfig,
        home: Home,
        env: EnvSpec,
        spec: AgentSpec,
        checkpoint: Path | None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self.config, self.home, self.spec = config, home, spec
        self.dir.mkdir(parents=True, exist_ok=True)
        self.unsaved = False  # the last checkpoint could not be written
        self._config_text: str | None = None  # of config.yaml
        manifest = read_manifest(checkpoint) if checkpoint else {}
        self.limiter = make_limiter(config, spec)
        try:
            if manifest:
                self.limiter.load_state_dict(manifest["limiter"])
            # It distinguishes actors started now from earlier ones.
            self.incarnation = int(manifest.get("incarnation", -1)) + 1
            counters = {name: float(value) for name, value in manifest.get("counters", {}).items()}
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{checkpoint}/manifest.json lacks what a run needs, or is damaged: {error}"
            ) from error
        if checkpoint:
            tidy(checkpoint)
        self.recorder = Recorder(self.dir, subject_of(config), self.limiter, counters, spec.true_ends_hint, sinks)
        self.eval_clock = Every(config.eval.interval, self.limiter.env_steps)
        self.checkpoint_clock = Every(config.checkpoint.interval, self.limiter.env_steps)
        self.picture_clock = Every(config.log.picture_interval, self.limiter.env_steps)
        self.log_clock = Every(config.log.interval, self.limiter.env_steps)
        self._print_header(env, checkpoint)

    def _print_header(self, env: EnvSpec, checkpoint: Path | None) -> None:
        spec, config, say = self.spec, self.config, self.recorder.say
        say(f"run directory: {self.home.root}")
        shape = _shown(observation_shape(env.observation_space))
        say(
            f"{config.algorithm} ({spec.parameters:,} parameters) on {config.env.id}: observations "
            f"{shape}, actions [{env.action_dim}], learner on {spec.device}"
        )
        size = ring_bytes(config.replay.capacity, replay_columns(env, spec))
        say(f"replay: {config.replay.capacity:,} rows, {size / 2**20:,.1f} MiB when full")
        if spec.columns:
            own, names = row_bytes(spec.columns), ", ".join(spec.columns)
            say(f"of which {names}: {own:,} bytes a row, {config.replay.capacity * own / 2**20:,.1f} MiB")
        say(self.limiter.describe())
        if checkpoint:
            done = f"{self.limiter.env_steps:,} steps, {self.limiter.updates:,} updates"
            say(f"resumed from {checkpoint.name}: {done}")

    @property
    def dir(self) -> Path:
        """The folder of this machine with the files that grow."""
        return self.home.dir

    @property
    def finished(self) -> bool:
        return self.limiter.env_steps >= self.config.train.total_steps

    @property
    def random_actions(self) -> bool:
        """True during the warm-up of an agent that asks for random actions; a trained agent acts by itself."""
        return self.spec.random_warmup and not self.limiter.learning and self.config.start.checkpoint is None

    def manifest(self, incarnation: int) -> dict[str, Any]:
        """Return the manifest of a checkpoint made now, without the files that hold its rows."""
        return {
            "algorithm": self.config.algorithm,
            "env_id": self.config.env.id,
            "limiter": self.limiter.state_dict(),
            "counters": self.recorder.saved_counters(),
            "incarnation": incarnation,
        }

    def write_config(self, text: str) -> None:
        """Write config.yaml, and again with a checkpoint if it is deleted."""
        self._config_text = text
        for folder in {self.dir, self.home.root}:  # at once: a checkpoint without it is of no use
            write_text(folder / "config.yaml", text)

    def _write_again_what_was_deleted(self) -> None:
        if self._config_text is not None and not (self.dir / "config.yaml").exists():
            self.recorder.say(f"warning: {self.dir} was deleted; it is made again with this checkpoint")
            self.dir.mkdir(parents=True, exist_ok=True)
            self.write_config(self._config_text)

    def open_checkpoint(self, env_steps: int) -> Path:
        """Return an empty folder for a checkpoint. Raises OSError, or LeaseLost if another process has this run."""
        self.home.check()
        self._write_again_what_was_deleted()
        return begin_checkpoint(self.home.root, env_steps)

    def commit_checkpoint(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Make a checkpoint valid, then remove old ones. Raises OSError, or LeaseLost as `open_checkpoint` does."""
        self.home.check()
        commit_checkpoint(folder, manifest, self.config.checkpoint.keep)
        self.unsaved = False

    def drop_checkpoint(self, folder: Path) -> None:
        """Remove what was written of a checkpoint that cannot become valid, unless another process has this run."""
        with contextlib.suppress(OSError, LeaseLost):
            self.home.check()
            remove_folder(folder)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Wrap the writing of a checkpoint: report a disk error, and raise it if checkpoint.on_error is stop. Earlier
        checkpoints stay valid."""
        try:
            yield
        except OSError as error:
            self.unsaved = True
            self.recorder.counters["checkpoints_failed"] += 1
            text = f"no checkpoint could be written at step {self.limiter.env_steps:,} ({error})"
            if self.config.checkpoint.on_error == "stop":
                raise OSError(f"{text}. Free or repair the disk, then go on with: {self.resume_command()}") from error
            self.recorder.say(f"warning: {text}; earlier ones stay valid, and the next interval tries again")

    def end_unsaved(self, agent: Path | None) -> None:
        """Say where the agent alone was saved, at the end of a run whose last checkpoint could not be written."""
        saved = f"its agent alone is in {agent} (worldloom.load_agent reads it)" if agent else "its agent is lost, too"
        self.recorder.say(f"warning: the last state of this run is in no checkpoint; {saved}")

    def status(self, finished: bool) -> str:
        """Return what summary.json says at the end: completed, interrupted, or unsaved."""
        if self.unsaved:
            return "unsaved"
        return "completed" if finished else "interrupted"

    def title(self) -> str:
        """Return the title of a picture made now."""
        return f"{self.config.algorithm} on {self.config.env.id}, step {self.limiter.env_steps:,}"

    def resume_command(self) -> str:
        return f"python -m launch.train --resume --run-dir {self.home.root}"


def _shown(shape: ObsShape) -> str:
    return ", ".join(f"{key} {part}" for key, part in shape.items()) if isinstance(shape, Mapping) else str(shape)
