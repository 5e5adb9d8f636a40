"""Runs of Ray jobs, whose working directory is a copy of the checkout that comes and goes."""

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch import status
from launch.places import run_place
from launch.train import main
from tests.run_configs import TINY_YAML
from worldloom.manifest import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
SHORT = TINY_YAML.replace("total_steps: 300", "total_steps: 120")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """What Ray sets for the process that a job starts, in a working directory as Ray unpacks it."""
    working_dir = tmp_path / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    working_dir.mkdir(parents=True)
    monkeypatch.chdir(working_dir)
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}})
    )
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WORLDLOOM_STORAGE", raising=False)
    return working_dir


@pytest.mark.parametrize(
    ("given", "lies"),
    [("runs/mine", "mine"), ("mine", "mine"), ("sweep/3", "sweep/3"), ("runs/sweep/3", "sweep/3"), ("./runs/a", "a")],
)
def test_a_relative_run_directory_of_a_job_lies_in_the_runs_folder(given, lies, job, tmp_path, monkeypatch):
    assert run_place(given) == tmp_path / "home" / "worldloom" / "runs" / lies
    monkeypatch.setenv("WORLDLOOM_STORAGE", "/shared/runs")
    assert run_place(given) == Path("/shared/runs") / lies
    monkeypatch.setenv("WORLDLOOM_STORAGE", "~/elsewhere")
    assert run_place(given) == tmp_path / "home" / "elsewhere" / lies
    assert run_place("/data/mine") == Path("/data/mine")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert run_place(given) == Path(given)


def test_a_job_names_its_run_directory_first_and_a_later_one_resumes_it(job, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(SHORT)
    run_dir = tmp_path / "home" / "worldloom" / "runs" / "mine"
    assert main(["--config", str(tmp_path / "tiny.yaml"), "--run-dir", "runs/mine"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"run directory: {run_dir}"
    assert not list(job.iterdir())
    shutil.rmtree(job)  # the checkout changed: the next job's copy has another name
    job.with_name("_ray_pkg_fedcba9876543210").mkdir()
    os.chdir(job.with_name("_ray_pkg_fedcba9876543210"))
    assert main(["--resume", "--run-dir", "runs/mine", "--train.total_steps", "140"]) == 0
    assert "resumed from step-000000000120" in capsys.readouterr().out
    assert status.main(["--run-dir", "runs/mine"]) == 0
    assert "140 of 140" in capsys.readouterr().out


def test_a_default_run_directory_of_a_job_lies_there_too(job, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(SHORT)
    assert main(["--config", str(tmp_path / "tiny.yaml")]) == 0
    (run_dir,) = (tmp_path / "home" / "worldloom" / "runs").iterdir()
    assert run_dir.name.startswith("tests.environments-Counting-v0-tdmpc2-1m-")
    assert capsys.readouterr().out.splitlines()[0] == f"run directory: {run_dir}"


def test_a_runs_folder_that_is_relative_is_refused(job, monkeypatch, capsys):
    monkeypatch.setenv("WORLDLOOM_STORAGE", "shared/runs")
    for words in (["--run-dir", "runs/mine"], ["--resume", "--run-dir", "runs/mine"]):
        with pytest.raises(SystemExit):
            main(["--train.learning_starts", "10", *words])
        assert (
            "WORLDLOOM_STORAGE is 'shared/runs', expected an absolute path or a URL in a Ray job."
            in capsys.readouterr().err
        )
    assert status.main(["--run-dir", "runs/mine"]) == 1


def free_ports():
    """Yield ports below those that systems hand out, which Ray's other servers get while it starts."""
    for port in random.sample(range(20_000, 32_000), 1_000):
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            yield port


@pytest.fixture
def head(tmp_path):
    """Address of a cluster that `ray start` began, with ports and a folder of its own; jobs keep runs in tmp_path."""
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    ports = [str(port) for port in itertools.islice(free_ports(), len(names))]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "WORLDLOOM_STORAGE": str(tmp_path / "runs")}
    with tempfile.TemporaryDirectory(prefix="wl") as folder:  # short, since Ray's sockets lie there
        options = [*(word for pair in zip(names, ports, strict=True) for word in pair), "--temp-dir", folder]
        command = [RAY, "start", "--head", "--block", "--num-cpus", "3", "--object-store-memory", str(200 * 2**20)]
        log = (tmp_path / "head.log").open("w")
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{ports[1]}"
        finally:
            process.terminate()  # and with it all that it started
            process.wait(60)
            log.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_submitted_again_from_a_changed_checkout_goes_on(head, tmp_path):
    checkout, run_dir = tmp_path / "checkout", tmp_path / "runs" / "mine"
    left_out = shutil.ignore_patterns(".*", "runs", "docs", "benchmarks", "site", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    (checkout / "tiny.yaml").write_text(TINY_YAML.replace("kind: inline", "kind: ray, env_actors: 1"))
    said = submit(head, checkout, "--config", "tiny.yaml", "--run-dir", "runs/mine")
    log = said.split("Running entrypoint for job", 1)[1].splitlines()[1:]
    assert log[:2] == ["training of tiny.yaml in runs/mine: loading …", f"run directory: {run_dir}"], said
    steps = int(newest_checkpoint(run_dir).name.removeprefix("step-"))
    assert steps >= 300
    (checkout / "launch" / "__init__.py").write_text('"""Changed."""\n')
    total = str(steps + 100)
    said = submit(head, checkout, "--resume", "--run-dir", "runs/mine", "--train.total_steps", total)
    assert f"resumed from step-{steps:012d}" in said
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] >= steps + 100
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def submit(address, checkout, *arguments):
    """`ray job submit` in the checkout, to its end; what it said."""
    command = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--"]
    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(
            [*command, sys.executable, "-m", "launch.train", *arguments],
            cwd=checkout, capture_output=True, text=True, timeout=400, env={**os.environ, "RAY_AUTH_MODE": "token"},
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout
        not_up_yet = any(words in done.stderr for words in ("Failed to connect", "No available agent to submit job"))
        assert not_up_yet, done.stdout + done.stderr
        assert time.monotonic() < deadline, done.stderr
