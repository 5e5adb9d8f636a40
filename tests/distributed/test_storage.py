"""A run on Ray whose storage is an object store: shards and learner write there by themselves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.arguments import dump_config
from tests.distributed.ray_runs import matrix_config
from tests.distributed.test_driver import wait_for
from tests.s3 import new_bucket, s3_server
from worldloom.locations import find, locate
from worldloom.manifest import checkpoint_folders, newest_checkpoint, read_manifest
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


def test_a_run_of_two_shards_goes_on_from_a_bucket_on_another_machine(tmp_path, monkeypatch):
    """The driver is killed after its first checkpoint; the second driver has none of the first one's files."""
    with s3_server():
        place = new_bucket()
        config = matrix_config("tdmpc2", actors=2, shards=2, steps=100_000, chunk_steps=8)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        name = ["--storage", f"{place}/runs", "--name", "mine", "--resume", "auto"]
        command = [sys.executable, "-m", "launch.train", "--config", str(tmp_path / "config.yaml"), *name]
        saving = ["--checkpoint.interval", "200"]
        run = locate(f"{place}/runs/mine")
        with (tmp_path / "log").open("w") as log:
            environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "first")}
            process = subprocess.Popen([*command, *saving], cwd=ROOT, stdout=log, stderr=log, env=environment)
            try:
                wait_for(lambda: checkpoint_folders(run), 240, (tmp_path / "log").read_text())
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()
        assert verify(run) == []
        steps = read_manifest(newest_checkpoint(run))["limiter"]["env_steps"]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
        more = [*command, "--train.total_steps", str(steps + 200)]
        done = subprocess.run(more, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        assert f"{steps:,} steps, " in done.stdout
        assert "differs from the run so far: train.total_steps: 100000 ->" in done.stdout
        assert verify(run) == []
        last = read_manifest(newest_checkpoint(run))
        assert last["limiter"]["env_steps"] >= steps + 200
        assert [len(names) > 0 for names in last["rows"]] == [True, True]
        held = {path.name for path in find(run, "checkpoints/rows/*")}
        assert held >= {name for shard in last["rows"] for name in shard}
