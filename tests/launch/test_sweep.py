"""Sweeps: values on the command line, shares of a cluster, what a folder knows, and whole sweeps on Ray."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import launch.sweep
import launch.sweeps.workers as workers
from launch.claim import Claim
from launch.sweep import main
from launch.sweeps.folder import SweepFolder, clear_remains, newest_figures, only_one
from launch.sweeps.grid import combinations, run_names, take_axes, values_of
from launch.sweeps.plan import read_plan, sweep_parser
from launch.sweeps.process import INTERRUPTED, OneRun, error_of, train_one
from launch.sweeps.search import NewLines, SearchConfig, as_texts, one_sample
from launch.sweeps.slots import Slots, slots
from launch.sweeps.workers import Ending
from tests.run_configs import TINY_YAML

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_YAML)
    return str(path)


def refusal(capsys, *argv):
    """What the command says when it refuses its arguments."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code not in (0, None)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# Values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3", ["3"]),
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ("0..4", ["0", "1", "2", "3", "4"]),
        ("0..8..4,20", ["0", "4", "8", "20"]),
        ("-1..1", ["-1", "0", "1"]),
        ("[tensorboard,wandb]", ["[tensorboard,wandb]"]),
        ("[tensorboard],[tensorboard,wandb]", ["[tensorboard]", "[tensorboard,wandb]"]),
        ("{a: [1,2], b: 3},{a: 4}", ["{a: [1,2], b: 3}", "{a: 4}"]),
        ("'a,b',c", ["a,b", "c"]),
        ("'0..4'", ["0..4"]),
        ("1,1,2", ["1", "2"]),
        ("pkg:Env-v0", ["pkg:Env-v0"]),
        ("", [""]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, values):
    assert values_of(text) == values


@pytest.mark.parametrize(
    ("text", "words"), [("1,,2", "one of its values is empty"), ("1,", "is empty"), ("4..0", "a range that goes up")]
)
def test_values_that_are_unclear_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        values_of(text, "--train.seed")


def test_fields_with_one_value_stay_and_the_sweeps_own_options_are_not_split():
    argv = ["--config", "a,b.yaml", "--train.seed=0..1", "--agent.lr", "1e-4,3e-4", "--log.to=[wandb,mlflow]"]
    argv += ["--train.total_steps", "60", "--sweep-dir", "runs/a,b", "--search.samples", "3"]
    rest, axes = take_axes(argv, {"config", "sweep-dir"})
    assert axes == {"train.seed": ["0", "1"], "agent.lr": ["1e-4", "3e-4"]}
    assert rest == [
        "--config", "a,b.yaml", "--log.to=[wandb,mlflow]", "--train.total_steps", "60", "--sweep-dir", "runs/a,b",
        "--search.samples", "3",
    ]  # fmt: skip


def test_every_combination_is_a_run_with_a_name_of_its_own():
    points = combinations({"env.id": ["ALE/Pong-v5", "a:B-v0"], "train.seed": ["0", "1"]})
    assert points[1] == {"env.id": "ALE/Pong-v5", "train.seed": "1"}
    assert run_names(points) == [
        "id-ALE-Pong-v5_seed-0", "id-ALE-Pong-v5_seed-1", "id-a-B-v0_seed-0", "id-a-B-v0_seed-1"
    ]  # fmt: skip
    assert run_names(combinations({"eval.interval": ["1", "2"], "log.interval": ["3"]}))[0] == (
        "eval.interval-1_log.interval-3"
    )
    assert run_names(combinations({"env.id": ["a:b", "a/b"]})) == ["0_id-a-b", "1_id-a-b"]


def test_a_plan_holds_typed_configurations(config):
    argv = ["--config", config, "--train.seed", "0..1", "--log.to", "[],[tensorboard]", "--agent.lr", "1e-3"]
    plan = read_plan(sweep_parser(), argv)
    assert [(run.train.seed, run.log.to) for run in plan.runs.values()] == [
        (0, []), (0, ["tensorboard"]), (1, []), (1, ["tensorboard"])
    ]  # fmt: skip
    assert {run.agent["lr"] for run in plan.runs.values()} == {1e-3}
    assert {run.runtime.kind for run in plan.runs.values()} == {"inline"}
    assert plan.folder.path == Path("runs/tiny-sweep").resolve()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.seed", "1"], "nothing varies"),
        (["--train.seed", "0,x"], "train.seed"),
        (["--train.sed", "0,1"], "Did you mean train.seed?"),
        (["--agent.lr", "1e-3,fast"], "agent.lr is 'fast'"),
        (["--train.total_steps", "300,50"], "train.learning_starts is 100, expected less than train.total_steps=50"),
        (["--train.seed", "0..1", "--parallel", "0"], "--parallel is 0, expected auto or at least 1"),
        (["--train.seed", "0..1", "--as", "threads"], "as"),
        (
            ["--search", "{space: {agent.lr: {loguniform: [1e-4, 1e-2]}}}", "--train.seed", "0..1"],
            "search.space and runs",
        ),
        (["--search", "{space: {agent.lr: {lognormal: [0, 1]}}}"], "search.space.agent.lr"),
        (["--search", "{space: {agent.lr: {loguniform: [1]}}}"], "loguniform does not take"),
        (["--search", "{space: {agent.rl: {uniform: [0, 1]}}}"], "agent.rl"),
        (["--search", "{space: {train.seed: {choice: [1, 2, 3, 4, 5, 6, 7, 8, x]}}}"], "train.seed"),
        (["--train.seed", "0..1", "--train.device", "cuda:3"], "train.device is 'cuda:3', but"),
    ],
)
def test_what_is_impossible_is_refused_before_anything_starts(config, tmp_path, capsys, arguments, words):
    assert words in refusal(capsys, "--config", config, "--sweep-dir", str(tmp_path / "sweep"), *arguments)
    assert not (tmp_path / "sweep").exists()


def test_every_value_of_a_choice_is_checked_and_null_is_null(config):
    pytest.importorskip("pandas")
    search = "{space: {train.train_ratio: {choice: [null, 256]}, log.to: {choice: [[], [tensorboard]]}}}"
    read_plan(sweep_parser(), ["--config", config, "--search", search])
    sampled = {"a": None, "b": [1, "x"], "c": np.int64(3), "d": 1e-4, "e": "text", "f": True}
    assert as_texts(sampled) == {"a": "null", "b": '[1, "x"]', "c": "3", "d": "0.0001", "e": "text", "f": "true"}


def test_samples_of_a_search_have_the_fields_of_its_space():
    pytest.importorskip("pandas")
    space = {
        "agent.lr": {"loguniform": [1e-4, 1e-2]},
        "agent.horizon": {"choice": [2, 3]},
        "train.seed": {"grid_search": [5]},
    }
    sample = one_sample(SearchConfig(space=space))
    assert 1e-4 <= sample["agent.lr"] <= 1e-2
    assert sample["agent.horizon"] in (2, 3)
    assert sample["train.seed"] == 5


# Shares


@pytest.mark.parametrize(
    ("asked", "runs", "cpus", "gpus", "expected"),
    [
        (None, 15, 8, 0, (8, 1.0, 0.0, 1)),  # a CPU for each run
        (None, 2, 8, 0, (2, 1.0, 0.0, 4)),  # few runs may use more threads
        (4, 15, 2, 0, (4, 0.5, 0.0, 1)),
        (3, 15, 2, 0, (3, 0.66, 0.0, 1)),
        (None, 15, 16, 1, (4, 1.0, 0.25, 4)),  # four share a GPU
        (None, 3, 16, 1, (3, 1.0, 1 / 3, 5)),
        (None, 15, 16, 8, (15, 1.0, 0.5, 1)),
        (None, 3, 16, 8, (3, 1.0, 1.0, 5)),
        (6, 15, 16, 4, (6, 1.0, 0.5, 2)),
    ],
)
def test_a_cluster_is_shared_evenly(asked, runs, cpus, gpus, expected):
    found = slots(asked, runs, cpus, gpus)
    assert (found.parallel, found.cpus, pytest.approx(found.gpus), found.threads) == expected
    assert found.parallel * found.cpus <= max(cpus, found.parallel)


# The folder


def begin(folder, config, *arguments):
    plan = read_plan(sweep_parser(), ["--config", config, *arguments])
    made = SweepFolder(folder)
    made.begin(plan.runs, None, plan.argv)
    return made


def test_a_folder_goes_on_with_the_same_sweep_and_refuses_another(config, tmp_path):
    sweep = tmp_path / "sweep"
    begin(sweep, config, "--train.seed", "0..1")
    begin(sweep, config, "--train.seed", "0,1").failed("seed-1", "no luck")
    content = json.loads((sweep / "sweep.json").read_text())
    assert content["command"] == ["--config", config, "--train.seed", "0,1"]
    assert content["errors"] == {"seed-1": "no luck"}
    assert content["runs"]["seed-1"]["train"]["seed"] == 1
    assert yaml.safe_load((sweep / "configs" / "seed-1.yaml").read_text())["train"]["seed"] == 1
    with pytest.raises(ValueError, match=r"train.total_steps is 300, and now it is 400\. Choose another --sweep-dir"):
        begin(sweep, config, "--train.seed", "0..1", "--train.total_steps", "400")
    with pytest.raises(ValueError, match=r"agent.rho is 'not set', and now it is 0.4"):
        begin(sweep, config, "--train.seed", "0..1", "--agent.rho", "0.4")
    begin(sweep, config, "--train.seed", "0..1", "--runtime.learner_threads", "2", "--checkpoint.keep", "9")
    goes_on = yaml.safe_load((sweep / "configs" / "seed-1.yaml").read_text())  # what the runs go on with
    assert (goes_on["runtime"]["learner_threads"], goes_on["checkpoint"]["keep"]) == (2, 9)
    with pytest.raises(ValueError, match=r"a sweep of other runs \(for example seed-0\)"):
        begin(sweep, config, "--train.seed", "1..2")
    del content["runs"]["seed-0"]["log"]["to"]  # an earlier version had no such field
    (sweep / "sweep.json").write_text(json.dumps(content))
    begin(sweep, config, "--train.seed", "0..1")
    begin(sweep, config, "--train.seed", "0..2")  # a grid may grow
    assert sorted(json.loads((sweep / "sweep.json").read_text())["runs"]) == ["seed-0", "seed-1", "seed-2"]


def test_a_folder_with_other_files_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="holds other files but no sweep.json"):
        begin(tmp_path, config, "--train.seed", "0..1")


def test_two_sweeps_do_not_work_in_one_folder(tmp_path):
    with only_one(tmp_path), pytest.raises(ValueError, match="another launch.sweep works in"), only_one(tmp_path):
        pass


def make_run(run_dir, status=None, checkpoint=False):
    run_dir.mkdir()
    lines = [{"env_steps": 100, "wall_seconds": 5.0, "episode/return": 1.0}, {"env_steps": 200, "wall_seconds": 9.5}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"env_st')
    if checkpoint:
        (run_dir / "checkpoints" / "step-000000000100").mkdir(parents=True)
        (run_dir / "checkpoints" / "step-000000000100" / "manifest.json").write_text("{}")
    if status:
        (run_dir / "summary.json").write_text(json.dumps({"status": status}))


def test_the_standing_of_a_run_follows_from_its_files(config, tmp_path):
    folder = begin(tmp_path / "sweep", config, "--train.seed", "0..1")
    assert folder.standing("seed-0").status == "waiting"
    make_run(folder.path / "seed-0", "interrupted", checkpoint=True)
    standing = folder.standing("seed-0")
    assert (standing.status, standing.env_steps, standing.wall_seconds, standing.last_return) == (
        "saved",
        200,
        9.5,
        1.0,
    )
    with Claim(folder.path / "seed-0", ""):
        assert folder.standing("seed-0").status == "running"
    folder.failed("seed-0", "it broke")
    assert folder.standing("seed-0").status == "failed"
    make_run(folder.path / "seed-1", "completed")
    assert folder.standing("seed-1").status == "finished"
    assert newest_figures(folder.path / "nothing") == (0, 0.0, None)
    with (folder.path / "seed-1" / "metrics.jsonl").open("a") as file:
        file.write('\n{"env_steps": 10, "wall_seconds": 1.0, "episode/return": 7.0, "resumed_at": 0}\n')
    assert newest_figures(folder.path / "seed-1") == (10, 1.0, 7.0)  # what came before is made again


def test_only_what_no_checkpoint_continues_is_cleared(tmp_path):
    for name, checkpoint in (("young", False), ("saved", True), ("held", False)):
        make_run(tmp_path / name, checkpoint=checkpoint)
    with Claim(tmp_path / "held", ""):
        for name in ("young", "saved", "held"):
            clear_remains(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["held", "saved"]


def test_lines_are_read_once_and_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = NewLines(path)
    assert lines.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert lines.read() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write(": 3}\n")
    assert lines.read() == [{"a": 3}]


# One run


@pytest.fixture
def one(config, tmp_path):
    return OneRun(Path(config), tmp_path / "run", tmp_path / "run.log", tmp_path / "stop", ROOT)


def test_a_run_that_fails_leaves_its_error_in_the_log(one):
    wrong = OneRun(one.config, one.run_dir, one.log, one.stop_file, one.cwd, overrides={"env.id": "Nope-v0"})
    code = train_one(wrong)
    assert code == 1
    assert "env.id is 'Nope-v0', which Gymnasium cannot make" in error_of(one.log, code)
    assert error_of(one.log.with_name("none"), -9) == "launch.train ended with exit code -9 and said nothing"


@pytest.mark.slow
def test_a_run_saves_when_it_is_asked_to_and_goes_on(one):
    longer = OneRun(one.config, one.run_dir, one.log, one.stop_file, one.cwd, overrides={"train.total_steps": 2000})

    def stop_once_it_learns():
        if newest_figures(one.run_dir)[0]:
            one.stop_file.touch()

    several = {**longer.overrides, "log.interval": 50}
    assert train_one(OneRun(*list(vars(one).values())[:6], several), stop_once_it_learns) == INTERRUPTED
    assert one.arguments()[-2:] == ["--resume", "auto"]
    assert json.loads((one.run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert train_one(longer) == INTERRUPTED  # the stop file is still there
    one.stop_file.unlink()
    short = newest_figures(one.run_dir)[0] + 20
    assert train_one(OneRun(*list(vars(one).values())[:6], {"train.total_steps": short})) == 0
    assert "resumed from step-" in one.log.read_text()


# Whole sweeps


class AtOnce:
    """Workers whose runs end at once: those of `failing` with an error, those of `interrupting` after Ctrl-C."""

    failing, interrupting = (), ()

    def __init__(self, slots, stop_file):
        self._slots, self._stop_file, self._runs = slots, stop_file, {}
        type(self).begun = []

    @property
    def running(self):
        return len(self._runs)

    def start(self, name, run):
        assert self.running < self._slots.parallel
        self._runs[name] = run
        self.begun.append(name)

    def ended(self):
        name = next(iter(self._runs))
        run_dir = self._runs.pop(name).run_dir
        if name in self.failing:
            yield Ending(name, 1, "Traceback …\nValueError: no luck")
        elif name in self.interrupting:
            signal.raise_signal(signal.SIGINT)
            yield Ending(name, INTERRUPTED)
        else:
            make_run(run_dir, "completed")
            (run_dir / "config.yaml").write_text((run_dir.parent / "configs" / f"{name}.yaml").read_text())
            yield Ending(name, 0)

    def stop(self):
        self._stop_file.touch()


@pytest.fixture
def at_once(monkeypatch):
    class Fresh(AtOnce):
        pass

    @contextlib.contextmanager
    def cluster(plan, runs, stop):
        yield Slots(2, 1.0, 0.0, 1)

    monkeypatch.setattr(workers, "TaskWorkers", Fresh)
    monkeypatch.setattr(launch.sweep, "_cluster", cluster)
    return Fresh


def test_a_run_that_fails_ends_no_other_and_is_tried_again_by_the_same_command(config, tmp_path, at_once, capsys):
    command = ["--config", config, "--sweep-dir", str(tmp_path / "sweep"), "--train.seed", "0..3"]
    at_once.failing = ("seed-1",)
    assert main(command) == 1
    said = capsys.readouterr()
    assert at_once.begun == ["seed-0", "seed-1", "seed-2", "seed-3"]
    assert "seed-1 failed: ValueError: no luck" in said.out
    assert "1 of 4 runs failed; try them again with:\n  python -m launch.sweep --config" in said.out
    assert "Traceback …" in said.err
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["errors"] == {
        "seed-1": "Traceback …\nValueError: no luck"
    }
    assert (tmp_path / "sweep" / "compare.html").is_file()
    at_once.failing = ()
    assert main(command) == 0
    assert at_once.begun == ["seed-1"]
    assert "4 runs, of which 3 are finished already" in capsys.readouterr().out
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["errors"] == {}
    assert main(command) == 0
    assert at_once.begun == ["seed-1"]  # nothing was left to begin


def test_ctrl_c_starts_no_more_runs_and_prints_the_command_that_goes_on(config, tmp_path, at_once, capsys):
    sweep = tmp_path / "a sweep"
    at_once.interrupting = ("seed-1",)
    assert main(["--config", config, "--sweep-dir", str(sweep), "--train.seed", "0..5"]) == 130
    assert at_once.begun == ["seed-0", "seed-1", "seed-2"]  # two at a time
    assert (sweep / "stop").exists()
    said = capsys.readouterr().out
    assert "stopping: every run saves" in said
    assert f"go on with:\n  python -m launch.sweep --config {config} --sweep-dir '{sweep}' --train.seed 0..5" in said
    at_once.interrupting = ()
    assert main(["--config", config, "--sweep-dir", str(sweep), "--train.seed", "0..5"]) == 0
    assert not (sweep / "stop").exists()


def interrupted(command, sweep, number):
    """Send a sweep the signal once a run has a checkpoint; return what it said."""
    begun = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not list(sweep.glob("*/checkpoints/step-*/manifest.json")) and begun.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    begun.send_signal(number)
    said = begun.communicate(timeout=240)[0]
    assert begun.returncode == INTERRUPTED, said
    assert "go on with:\n  python -m launch.sweep" in said
    return said


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_on_ray_is_interrupted_goes_on_and_survives_a_run_that_fails(number, config, tmp_path):
    sweep = tmp_path / "sweep"
    command = [
        sys.executable, "-m", "launch.sweep", "--config", config, "--sweep-dir", str(sweep), "--parallel", "2",
        "--env.id", "tests.environments:Counting-v0,Nope-v0", "--train.total_steps", "2000", "--train.train_ratio", "1",
        "--checkpoint.interval", "200",
    ]  # fmt: skip
    interrupted(command, sweep, number)
    run_dir = sweep / "id-tests.environments-Counting-v0"
    saved = json.loads((run_dir / "summary.json").read_text())
    assert saved["status"] == "interrupted"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "id-Nope-v0 failed: launch.train: env.id is 'Nope-v0', which Gymnasium cannot make" in again.stdout
    finished = json.loads((run_dir / "summary.json").read_text())
    assert finished["status"] == "completed"
    assert 2000 <= finished["env_steps"] < 2010  # how many steps a start makes at once depends on where it was cut
    assert "resumed from step-" in (sweep / "logs" / f"{run_dir.name}.log").read_text()
    assert "id-Nope-v0" in json.loads((sweep / "sweep.json").read_text())["errors"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_tries_its_samples_and_names_the_best(config, tmp_path, capsys, small_cluster):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    search = "{samples: 2, grace_steps: 100, space: {agent.lr: {loguniform: [1e-4, 1e-2]}, train.seed: {choice: [3]}}}"
    command = ["--config", config, "--sweep-dir", str(tmp_path / "sweep"), "--eval.interval", "100", "--search", search]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "best: sample-0000" in said
    for name in ("sample-00000", "sample-00001"):
        settings = yaml.safe_load((tmp_path / "sweep" / name / "config.yaml").read_text())
        assert settings["train"]["seed"] == 3
        assert 1e-4 <= settings["agent"]["lr"] <= 1e-2
    before = {path: path.stat().st_mtime for path in (tmp_path / "sweep").glob("sample-*/metrics.jsonl")}
    assert main(command) == 0
    assert before == {path: path.stat().st_mtime for path in (tmp_path / "sweep").glob("sample-*/metrics.jsonl")}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_search_is_interrupted_and_goes_on(number, config, tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    sweep = tmp_path / "sweep"
    command = [
        sys.executable, "-m", "launch.sweep", "--config", config, "--sweep-dir", str(sweep), "--parallel", "2",
        "--env.id", "tests.environments:Counting-v0", "--train.total_steps", "2000", "--train.train_ratio", "1",
        "--checkpoint.interval", "200", "--eval.interval", "500",
        "--search", "{samples: 2, asha: false, space: {agent.lr: {loguniform: [1e-4, 1e-2]}}}",
    ]  # fmt: skip
    said = interrupted(command, sweep, number)
    samples = sorted(path.parent for path in sweep.glob("sample-*/summary.json"))
    cut = [run for run in samples if json.loads((run / "summary.json").read_text())["status"] == "interrupted"]
    assert cut, said
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "best: sample-0000" in again.stdout
    for run in cut:
        assert json.loads((run / "summary.json").read_text())["status"] == "completed"
        assert "resumed from step-" in (sweep / "logs" / f"{run.name}.log").read_text()
