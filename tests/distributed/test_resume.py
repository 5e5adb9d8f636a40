"""A run goes on in either runtime, whichever it began in; a resume that fails leaves its directory as it was."""

import dataclasses
import json

import numpy as np
import pytest
import ray
import yaml

from distributed.coordinator import Coordinator
from launch.arguments import dump_config
from launch.train import main
from tests.distributed.ray_runs import ray_config
from worldloom.files import read_msgpack
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.config import RuntimeConfig, TrainConfig
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]
COUNTS = ("rows", "steps", "episodes", "chunks", "duplicates")


def run_config(kind, steps, actors=1, **sections):
    runtime = RuntimeConfig(kind=kind, env_actors=actors, chunk_steps=8, publish_interval=5, learner_threads=1)
    train = TrainConfig(total_steps=steps, learning_starts=100, train_ratio=12)
    return ray_config(runtime=runtime, train=train, **sections)


def begin(config, run_dir):
    """Start or resume a run without a step: its Run, what replay has accepted and a batch of it, and what goes on."""
    resume = (run_dir / "checkpoints").exists()
    if config.runtime.kind == "inline":
        trainer = InlineTrainer(config, run_dir, resume)
        return trainer.run, trainer.replay.accepted(), trainer.replay.draw(8) if resume else None, trainer.train
    coordinator = Coordinator(config, run_dir)

    def train():
        try:
            return coordinator.train()
        finally:
            coordinator.close()

    try:
        coordinator.start(resume)
        replay = coordinator.parts.replay.handles[0]
        batch = ray.get(replay.sample.remote(1))[0] if resume else None
        return coordinator.run, ray.get(replay.accepted.remote()), batch, train
    except BaseException:
        coordinator.close()
        raise


def test_a_run_goes_on_in_either_runtime_exactly_where_it_stood(tmp_path):
    kinds = ["inline", "inline", "ray", "ray", "inline"]  # all four ways from one to the next
    for steps, kind in zip((200, 300, 400, 500, 600), kinds, strict=True):
        config = run_config(kind, steps)
        run, accepted, batch, train = begin(config, tmp_path)
        if batch is not None:
            folder = newest_checkpoint(tmp_path)
            manifest, saved = read_manifest(folder), read_msgpack(folder / "replay-0.msgpack")
            assert run.limiter.state_dict() == manifest["limiter"]
            assert run.limiter.env_steps >= steps - 100
            counters = run.recorder.saved_counters()
            assert counters.pop("wall_seconds") >= manifest["counters"].pop("wall_seconds") > 0
            assert counters == manifest["counters"]
            assert run.incarnation == manifest["incarnation"] + 1
            assert {name: getattr(accepted, name) for name in COUNTS} == {name: saved[name] for name in COUNTS}
            again = InlineTrainer(dataclasses.replace(config, runtime=RuntimeConfig(kind="inline")), tmp_path, True)
            assert again.agent.updates == manifest["limiter"]["updates"]
            for name, column in again.replay.draw(8).items():
                np.testing.assert_array_equal(batch[name], column, err_msg=name)
        summary = train()
        assert steps <= summary["env_steps"] < steps + 32
        assert summary["updates"] == summary["env_steps"] // 2  # owed over all of it, without a burst
        assert summary["runtime"] == kind
        assert verify(tmp_path) == []


def files(folder):
    """Every file's bytes, but for the lock's, which names the process at work."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def inline_run(tmp_path_factory):
    """A run of 200 steps in one process, and the command that began it."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "config.yaml").write_text(dump_config(run_config("inline", 200)))
    assert main(["--config", str(folder / "config.yaml"), "--run-dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_resume_that_fails_leaves_the_directory_as_it_was(inline_run, capsys, monkeypatch):
    resume = ["--resume", "--run-dir", str(inline_run), "--train.total_steps", "300"]
    before = files(inline_run)
    for kind in ("inline", "ray"):
        assert main([*resume, "--runtime", kind, "--agent.mlp_dim", "24"]) == 1
        assert "mlp_dim is 16 there, 24 here" in capsys.readouterr().err
        assert files(inline_run) == before
    assert main([*resume, "--runtime", "ray", "--replay.shards", "2", "--runtime.env_actors", "2"]) == 1
    assert "has 1 replay shards, expected 2. Go on with --replay.shards 1." in capsys.readouterr().err
    assert files(inline_run) == before

    def dies(*args):
        raise RuntimeError("no env actor came up")

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "train", dies)
        assert main([*resume, "--runtime", "ray"]) == 1
    assert "no env actor came up" in capsys.readouterr().err
    assert (inline_run / "config.yaml").read_bytes() == before[inline_run / "config.yaml"]

    assert main(resume) == 0  # as if none of it had been tried
    assert "resumed from step-000000000200: 200 steps, 100 updates" in capsys.readouterr().out
    written = yaml.safe_load((inline_run / "config.yaml").read_text())
    assert (written["runtime"]["kind"], written["train"]["total_steps"]) == ("inline", 300)
    assert json.loads((inline_run / "summary.json").read_text())["env_steps"] == 300
