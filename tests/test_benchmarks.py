"""The benchmark for GPUs, whole, with tiny sizes on the CPU: time on a GPU must not be lost to a slip."""

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TINY = [
    *("--device", "cpu", "--minutes", "12", "--tdmpc2-sizes", "1m", "--dreamer-sizes", "size1m", "--envs", "1"),
    *("--batch", "2", "--length", "4", "--repeats", "1", "--modes", "eager,captured", "--parallel", "2"),
    *("--precisions", "float32", "--others", "storm:tiny,diamond:tiny"),
]
MODELS = ("tdmpc2:1m", "dreamerv3:size1m", "storm:tiny", "diamond:tiny")


def measure(out, *more):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *TINY, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in (out / "figures.jsonl").read_text().splitlines()]
    return done.stdout, figures


def test_correctness_and_timing_give_figures_and_are_not_done_twice(tmp_path):
    said, figures = measure(tmp_path, "--stages", "correctness,timing")
    jobs = {figure["job"] for figure in figures if "done" in figure}
    assert jobs == {
        *(f"correctness {family}" for family in ("dreamerv3", "tdmpc2", "storm", "diamond")),
        *(f"{kind} {model}" for kind in ("update", "act") for model in MODELS),
    }, (tmp_path / "log.txt").read_text()
    timed = [figure for figure in figures if "median_ms" in figure]
    assert {figure["mode"] for figure in timed} == {"eager", "captured"}
    assert all(figure["median_ms"] > 0 for figure in timed)
    table = (tmp_path / "table.md").read_text()
    assert "| update tdmpc2:1m | captured | ready_s " in table
    said, again = measure(tmp_path, "--stages", "correctness,timing")
    assert "correctness: 0 jobs" in said
    assert again == figures


def test_learning_runs_are_interrupted_in_time_and_leave_their_run(tmp_path):
    more = "--env.id tests.environments:Screen-v0 --env.time_limit 20 --env.action_repeat 1 --log.interval 10"
    _, figures = measure(
        *(tmp_path, "--stages", "pixels", "--steps", "100000", "--learning-seconds", "60"),
        *("--train-more", f"{more} --train.learning_starts 50 --agent.batch_size 2 --agent.batch_length 8"),
    )
    assert {figure["job"] for figure in figures if "done" in figure} <= {"pixels"}
    summary = json.loads((tmp_path / "pixels" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["updates"] > 0


def test_a_run_through_ray_learns_and_is_evaluated(tmp_path):
    more = "--env.id tests.environments:Counting-v0 --env.action_repeat 1 --runtime.acting server --eval.interval 0"
    learns = (
        "--algorithm tdmpc2:1m --agent.num_samples 16 --agent.num_elites 4 --agent.num_pi_trajs 2 --agent.iterations 2"
    )
    _, figures = measure(
        *(tmp_path, "--stages", "ray", "--steps", "300", "--learning-seconds", "600"),
        *("--train-more", f"{more} {learns} --train.learning_starts 200 --eval.episodes 2"),
    )
    assert {figure["job"] for figure in figures if "done" in figure} == {"ray"}, (tmp_path / "log.txt").read_text()
    summary = json.loads((tmp_path / "ray" / "summary.json").read_text())
    assert (summary["status"], summary["runtime"]) == ("completed", "ray")
    assert summary["eval_episodes"] == 2
