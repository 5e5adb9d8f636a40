"""The command that draws learning curves over the published ones."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import curves
from tests.run_configs import TINY_AGENT, TINY_DREAMER

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stands in for the training: two seeds of cup-catch as far as the first published point."""
    asked = []

    def sweep(argv):
        asked.append(argv)
        for seed, final in ((1, 970.0), (2, 984.0)):
            run = tmp_path / f"seed-{seed}"
            run.mkdir(exist_ok=True)
            (run / "config.yaml").write_text(
                "algorithm: tdmpc2:5m\nenv: {id: dm_control/ball_in_cup-catch-v0, action_repeat: 2}\n"
                f"train: {{total_steps: 50000, seed: {seed}}}\nruntime: {{kind: inline}}\n"
            )
            lines = [(25_000, 400.0), (50_000, final)]
            (run / "metrics.jsonl").write_text(
                "".join(
                    f'{{"env_steps": {steps}, "wall_seconds": {steps / 10}, "eval/return_mean": {value}}}\n'
                    for steps, value in lines
                )
            )
        return 0

    monkeypatch.setattr(curves, "sweep", sweep)
    return asked


def test_the_table_gives_the_difference_in_published_standard_deviations(trained, tmp_path, capsys):
    more = ["--train.device", "cpu"]
    assert curves.main(["--tasks", "cup-catch", "--seeds", "1,2", "--out", str(tmp_path), *more]) == 0
    (argv,) = trained
    assert argv[argv.index("--env.id") + 1] == "dm_control/ball_in_cup-catch-v0"
    assert argv[:2] == ["--config", "configs/tdmpc2_dmc.yaml"]
    assert argv[-2:] == more
    row = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert "| dm_control/ball_in_cup-catch-v0 | 1, 2 | 100,000 | 100,000 | 977.0 ± 9.9 | 981.2 ± 7.0 | -0.6 |" in row
    with (tmp_path / "curves.csv").open() as file:
        assert [(row["frames"], row["return"]) for row in csv.DictReader(file)][:2] == [
            ("50000", "400.0"),
            ("100000", "970.0"),
        ]
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert "977.0" in capsys.readouterr().out


def test_a_single_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(curves, "train", lambda argv: asked.append(argv) or 3)
    monkeypatch.setattr(curves, "read_results", lambda out, metric: [])
    monkeypatch.setattr(curves, "write", lambda results, out: (out / "table.md").write_text(""))
    assert curves.main(["--tasks", "cup-catch", "--seeds", "4", "--out", str(tmp_path)]) == 3
    (argv,) = asked
    assert argv[argv.index("--run-dir") + 1] == str(tmp_path / "ball_in_cup-catch-seed-4")
    assert argv[argv.index("--resume") + 1] == "auto"
    assert argv[argv.index("--env.id") + 1] == "dm_control/ball_in_cup-catch-v0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "cup-throw"], "has no such task, expected some of: dm_control/cartpole-swingup-v0"),
        (["--algorithm", "tdmpc3:5m"], "unknown model 'tdmpc3:5m'"),
    ],
)
def test_wrong_requests_are_refused_with_what_there_is(words, said, capsys):
    with pytest.raises(SystemExit):
        curves.main(words)
    assert said in capsys.readouterr().err


def wait_for(pattern, folder, process, seconds=400.0):
    """Wait until a file of that name is there, while the process lives."""
    ends = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends, f"no {pattern} in {folder}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("algorithm", "fields"), [("tdmpc2:1m", TINY_AGENT), ("dreamerv3:size1m", TINY_DREAMER)])
def test_a_real_run_is_interrupted_goes_on_and_is_kept(algorithm, fields, tmp_path):
    small = {
        "--env.num_envs": 1, "--train.learning_starts": 100, "--train.train_ratio": 24, "--train.compile": "false",
        "--train.device": "cpu", "--eval.episodes": 1, "--checkpoint.interval": 100, "--replay.capacity": 5000,
    }  # fmt: skip
    small |= {f"--agent.{name}": value for name, value in fields.items()}
    words = ["--algorithm", algorithm, "--tasks", "cartpole-swingup", "--steps", "1000", "--out", str(tmp_path)]
    words += [str(word) for pair in small.items() for word in pair]
    command = [sys.executable, "-m", "benchmarks.curves", *words]
    first = subprocess.Popen([*command, "--seeds", "1"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for("*/checkpoints/step-*/manifest.json", tmp_path, first)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=300)[0].decode()
    assert first.returncode not in (0, None), said
    (summary,) = tmp_path.glob("*/summary.json")
    assert json.loads(summary.read_text())["status"] == "interrupted"
    subprocess.run([*command, "--seeds", "1"], cwd=ROOT, check=True)
    assert json.loads(summary.read_text())["env_steps"] == 1000
    complete = summary.read_text()
    subprocess.run([*command, "--seeds", "1"], cwd=ROOT, check=True)
    assert summary.read_text() == complete
    row = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert row.startswith("| dm_control/cartpole-swingup-v0 | 1 | 2,000 | ")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
