"""The first seconds of a command."""

import io
import logging
import os
import subprocess
import sys

from distributed.cluster import Shares, ray_log
from tests.own_families import ROOT


def test_training_says_what_starts_before_it_imports_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported now')\n")
    command = [sys.executable, "-m", "launch.train", "--config", "configs/tdmpc2_pendulum.yaml", "--run-dir=runs/a"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.stdout == "training of configs/tdmpc2_pendulum.yaml in runs/a: loading …\n"
    assert ran.stderr == "torch is imported now\n"
    tuning = subprocess.run([*command, "--from", "a.pt"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert tuning.stdout == "training of configs/tdmpc2_pendulum.yaml from a.pt in runs/a: loading …\n"
    assert subprocess.run([*command, "--help"], cwd=ROOT, env=environment, capture_output=True).stdout == b""


def test_what_ray_says_is_kept_in_a_file_and_only_errors_are_shown(tmp_path):
    screen = logging.StreamHandler(io.StringIO())
    speaker = logging.getLogger("ray._private.authentication")
    logging.getLogger("ray").addHandler(screen)
    with ray_log(tmp_path / "run" / "ray.log"):
        speaker.warning("Token authentication is enabled")
        speaker.error("a node is gone")
    speaker.warning("afterwards")
    logging.getLogger("ray").removeHandler(screen)
    kept, shown = (tmp_path / "run" / "ray.log").read_text(), screen.stream.getvalue()
    assert "Token authentication is enabled" in kept
    assert "a node is gone" in kept
    assert "afterwards" not in kept
    assert shown == "a node is gone\nafterwards\n"


def test_the_banner_of_a_local_cluster_says_what_the_machine_has(monkeypatch):
    import distributed.cluster as cluster

    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 5.0})  # logical ones, one for each process
    shares = Shares(cpus=1.0, gpus=0.0, server_gpus=0.0, learner_threads=1, processes=5)
    assert shares.describe(own=True) == f"this machine: {cluster.usable_cpus()} CPUs and 0 GPUs for 5 processes"
