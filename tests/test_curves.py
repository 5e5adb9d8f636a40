"""The command that draws learning curves over the published ones."""

import csv
import json
import os
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
    """Stands in for the training: each run gets as far as the first published point; notes what was asked for."""
    asked = []

    def carry_out(plan):
        asked.append(plan.runs)
        for name, config in plan.runs.items():
            run, seed = plan.folder.path / name, config.train.seed
            if seed == 9:
                plan.folder.failed(name, "Traceback\nOSError: no luck")
                continue
            run.mkdir(exist_ok=True)
            (run / "config.yaml").write_text(plan.folder.config_of(name).read_text())
            lines = [(25_000, 400.0), (50_000, 956.0 + 14 * seed)][: 1 if seed == 3 else None]
            metric = "episode/return" if seed == 4 else "eval/return_mean"
            (run / "metrics.jsonl").write_text(
                "".join(
                    f'{{"env_steps": {steps}, "wall_seconds": {steps / 10}, "{metric}": {value}}}\n'
                    for steps, value in lines
                )
            )
        return 0

    monkeypatch.setattr(curves, "carry_out", carry_out)
    return asked


def test_the_table_gives_the_difference_in_published_standard_deviations(trained, tmp_path, capsys):
    more = ["--train.device", "cpu"]
    assert curves.main(["--tasks", "cup-catch", "--seeds", "1,2", "--out", str(tmp_path), *more]) == 0
    (runs,) = trained
    assert list(runs) == ["ball_in_cup-catch-seed-1", "ball_in_cup-catch-seed-2"]
    config = runs["ball_in_cup-catch-seed-2"]
    assert (config.algorithm, config.env.id, config.env.action_repeat) == (
        "tdmpc2:5m",
        "dm_control/ball_in_cup-catch-v0",
        2,
    )
    assert (config.train.device, config.train.total_steps, config.eval.interval) == ("cpu", 50_000, 25_000)
    text = (tmp_path / "table.md").read_text()
    assert "981.2 ± 7.0 | -0.6 |" in text
    assert "| 1 (not finished at 100,000), 2 (not finished at 100,000) | 100,000 | 977.0 ± 9.9 |" in text
    assert str(tmp_path) not in text
    assert text.startswith(
        "`python -m benchmarks.curves --tasks cup-catch --seeds 1,2 --out OUT --train.device cpu` on "
    )
    assert f"{os.cpu_count()} cores of " in text
    curves.main(["--table", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == text  # which says how the runs were made, not the table
    with (tmp_path / "curves.csv").open() as file:
        assert [(row["measured"], row["frames"], row["return"]) for row in csv.DictReader(file)][:2] == [
            ("evaluations", "50000", "400.0"),
            ("evaluations", "100000", "970.0"),
        ]
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert "ball_in_cup-catch" in (tmp_path / "compare.html").read_text()
    assert "977.0" in capsys.readouterr().out


def test_tasks_and_seeds_are_added_later_and_failures_stay_on_the_page(trained, tmp_path):
    command = ["--out", str(tmp_path), "--steps", "50000"]
    curves.main([*command, "--tasks", "cup-catch", "--seeds", "1"])
    curves.main([*command, "--tasks", "cup-catch,reacher", "--seeds", "9"])
    curves.main([*command, "--tasks", "cup-catch", "--seeds", "1..2"])
    assert [len(runs) for runs in trained] == [1, 2, 2]
    text = (tmp_path / "table.md").read_text()
    assert text.count("ball_in_cup-catch-v0 | 1 (not finished at 100,000), 2 (not finished at 100,000)") == 1
    for task in ("ball_in_cup-catch", "reacher-easy"):
        assert f"{task}-seed-9 failed: OSError: no luck" in text
    assert text.count("benchmarks.curves") == 3
    with pytest.raises(SystemExit, match=r"eval.interval is 25000, and now it is 35000. Choose another --out,"):
        curves.main(["--out", str(tmp_path), "--steps", "70000", "--tasks", "cup-catch", "--seeds", "1"])


def test_a_seed_that_did_not_get_far_leaves_the_others_comparable(trained, tmp_path):
    curves.main(["--out", str(tmp_path), "--tasks", "cup-catch", "--seeds", "1,3"])
    seeds = "1 (not finished at 100,000), 3 (not finished at 50,000)"
    assert f"| {seeds} | 100,000 | 970.0 (1 of 2 seeds) | 981.2 ± 7.0 | -1.6 |" in (tmp_path / "table.md").read_text()


def test_a_run_that_was_not_evaluated_yet_shows_its_training(trained, tmp_path):
    curves.main(["--out", str(tmp_path), "--tasks", "cup-catch", "--seeds", "4"])
    said = "4 (not finished at 100,000) | 0 | none; the last 20 training episodes: 1012.0 at 100,000 | none reported"
    assert said in (tmp_path / "table.md").read_text()
    with (tmp_path / "curves.csv").open() as file:
        rows = [(row["measured"], row["frames"], row["return"]) for row in csv.DictReader(file)]
    name = "training, last 20 episodes"
    assert rows == [(name, "50000", "400.0"), (name, "100000", "1012.0")]
    assert name in (tmp_path / "curves.svg").read_text()


def test_a_run_that_failed_stays_on_the_page(trained, tmp_path):
    assert curves.main(["--out", str(tmp_path), "--tasks", "cup-catch", "--seeds", "9"]) == 0
    assert "ball_in_cup-catch-seed-9 failed: OSError: no luck" in (tmp_path / "table.md").read_text()


def test_a_table_of_nothing_says_so(tmp_path):
    assert curves.main(["--table", "--out", str(tmp_path / "none")]) == 0
    assert len((tmp_path / "none" / "table.md").read_text().splitlines()) == 2  # the head of the table


def test_training_returns_are_compared_without_evaluations():
    o, more = curves.parse(["--algorithm", "dreamerv3:size12m", "--tasks", "walker-walk"])
    assert curves.our_config(o, o.tasks[0], 1, more).eval.interval == 0


def test_a_comma_at_the_end_of_tasks_adds_none():
    assert curves.parse(["--tasks", "walker-run,"])[0].tasks == ["dm_control/walker-run-v0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "cup-throw"], "has no such task, expected some of: dm_control/cartpole-swingup-v0"),
        (["--algorithm", "tdmpc3:5m"], "unknown model 'tdmpc3:5m'"),
        (["--seeds", "one"], "--seeds is 'one', expected numbers such as 1,2,3 or 1..3."),
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
        "--runtime.learner_threads": 1,
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
    assert row.startswith("| dm_control/cartpole-swingup-v0 | 1 (completed at 2,000) | 2,000 | ")
    assert "<svg" in (tmp_path / "curves.svg").read_text()
