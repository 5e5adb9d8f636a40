"""The driver's own end: by SIGTERM, as `ray job stop` sends it to the driver and SLURM to all, and by SIGKILL."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.arguments import dump_config
from launch.status import status
from tests.distributed.ray_runs import slow_config
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.config import CheckpointConfig, TrainConfig
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]


def parents():
    """pid -> (parent, state) of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        found[int(folder.name)] = (int(parent), state)
    return found


def descendants(pid):
    tree, wanted = parents(), {pid}
    while more := {child for child, (parent, _) in tree.items() if parent in wanted} - wanted:
        wanted |= more
    return wanted - {pid}


def running(pids):
    return {pid for pid, (_, state) in parents().items() if pid in pids and state != "Z"}


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def started(tmp_path):
    """A run in a process of its own, whose start has begun; ended at the end whatever happens."""
    config = slow_config(
        train=TrainConfig(total_steps=100_000, learning_starts=100, train_ratio=12),
        checkpoint=CheckpointConfig(interval=0),
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "launch.train", "--config", str(tmp_path / "config.yaml")]
    log = (tmp_path / "log").open("w")
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [*command, "--run-dir", str(run_dir)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
    )
    try:
        yield process, run_dir
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture
def driver(started):
    """A run in a process of its own, past its first updates; ended at the end whatever happens."""
    process, run_dir = started
    metrics = run_dir / "metrics.jsonl"
    wait_for(
        lambda: metrics.exists() and '"updates": 1' in metrics.read_text(), 180, (run_dir.parent / "log").read_text()
    )
    return process, run_dir, descendants(process.pid)


@pytest.mark.parametrize("window", [20.0, pytest.param(3.0, marks=pytest.mark.slow)])  # 3 s is that of `ray job stop`
def test_sigterm_leaves_a_manifest_within_the_stop_window_and_the_run_goes_on(window, driver):
    process, run_dir, others = driver
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + window
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = read_manifest(newest_checkpoint(run_dir))
    assert saved["limiter"]["env_steps"] > 100
    assert verify(run_dir) == []
    wait_for(lambda: not running(others), 30, f"{running(others)} still run")
    more = saved["limiter"]["env_steps"] + 100
    command = [sys.executable, "-m", "launch.train", "--resume", "--run-dir", str(run_dir)]
    done = subprocess.run(
        [*command, "--train.total_steps", str(more)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = re.search(r"resumed from \S+: ([\d,]+) steps, ([\d,]+) updates", done.stdout)
    assert [int(n.replace(",", "")) for n in told.groups()] == [
        saved["limiter"]["env_steps"], saved["limiter"]["updates"],
    ]  # fmt: skip
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["updates"] == summary["env_steps"] // 2  # owed over both, without a burst
    assert verify(run_dir) == []


def signal_group(number, process, others):
    os.killpg(process.pid, number)


def signal_each(number, process, others):
    for pid in [*sorted(others), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.mark.parametrize(
    ("send", "number"),
    [
        pytest.param(signal_group, signal.SIGTERM, id="sigterm to the group, as timeout does", marks=pytest.mark.slow),
        pytest.param(signal_each, signal.SIGTERM, id="sigterm to each, as systemd and SLURM do"),
        pytest.param(signal_group, signal.SIGINT, id="sigint to the group", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_all_saves_like_one_to_the_driver(send, number, driver):
    process, run_dir, others = driver
    send(number, process, others)
    assert process.wait(timeout=120) == 130
    told = (run_dir.parent / "log").read_text()
    saved = read_manifest(newest_checkpoint(run_dir))["limiter"]["env_steps"]
    assert f"saved at step {saved:,}; go on with:\n  python -m launch.train --resume --run-dir {run_dir}" in told
    assert verify(run_dir) == []
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["actor_restarts"], summary["updates_lost"]) == ("interrupted", 0, 0)
    wait_for(lambda: not running(others), 30, f"{running(others)} still run")


def test_sigterm_to_the_group_while_a_run_starts_ends_it_with_a_word(started):
    process, run_dir = started
    log, seen = run_dir.parent / "log", set()

    def actors_start():
        seen.update(descendants(process.pid))
        for pid in seen:
            with contextlib.suppress(OSError):  # it has just ended
                if re.match(rb"ray::\w+Actor", Path(f"/proc/{pid}/cmdline").read_bytes()):
                    return True
        return False

    wait_for(actors_start, 180, "no actor starts")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert log.read_text().endswith("stopped at once; nothing was saved yet\n")
    assert not run_dir.exists()
    wait_for(lambda: not running(seen), 30, f"{running(seen)} still run")


def test_sigkill_of_the_driver_leaves_no_actor_behind_and_is_told(driver):
    process, run_dir, others = driver
    assert time.time() - (run_dir / ".heartbeat").stat().st_mtime <= 10
    assert dict(status(run_dir))["status"].startswith(f"running (process {process.pid} on ")
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode() for pid in others}
    ours = re.compile(r"ray::(LearnerActor|ReplayActor|EnvActor|learner|replay|env)")  # by class while it is idle
    actors = {pid for pid, name in names.items() if ours.match(name)}
    assert len(actors) == 3, names
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not running(actors), 30, "an actor still runs")
    wait_for(lambda: "ended without a word" in (run_dir.parent / "log").read_text(), 30, "nothing was told")
    found = dict(status(run_dir))["status"]
    assert re.match(rf"died: process {process.pid} on .*, is gone; go on with --resume", found)


@pytest.mark.slow
def test_the_end_of_the_cluster_is_told_with_the_resume_command(driver):
    """Ray ends the driver, without a word, once the head (GCS) has not answered for 60 s."""
    process, run_dir, others = driver
    (head,) = (pid for pid in others if b"gcs_server" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])
    os.kill(head, signal.SIGKILL)
    process.wait(timeout=150)
    told = run_dir.parent / "log"
    wait_for(lambda: "its Ray cluster is gone. Nothing was saved yet." in told.read_text(), 30, "nothing was told")
    assert dict(status(run_dir))["status"].startswith("died: ")
