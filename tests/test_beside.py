"""The command that trains our code and the authors' on one task and draws both curves."""

import csv
import dataclasses
import json
import shlex
import sys

import pytest

from benchmarks import beside
from tests.run_configs import TINY_AGENT
from worldloom.envs.suites import paper_name

AUTHORS = """
import json, sys
options = json.loads(sys.argv[2])
print("checkout", sys.argv[1])
if options["seed"] == 9:
    sys.exit("no GPU")
with open(options["out"], "w") as file:
    file.writelines(f"{steps},{100 * options['seed'] + steps}\\n" for steps in (20, 40, 60))
"""
SMALL = shlex.split(
    "--env.id tests.environments:Counting-v0 --train.learning_starts 50 --train.train_ratio 12 --replay.capacity 1000"
) + [word for name, value in TINY_AGENT.items() for word in (f"--agent.{name}", str(value))]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Return the command for a checkout whose code only writes returns."""
    (tmp_path / "checkout" / "tdmpc2").mkdir(parents=True)
    (tmp_path / "authors.py").write_text(AUTHORS)
    stand_in = dataclasses.replace(beside.COMPARISONS["tdmpc2"], program=str(tmp_path / "authors.py"))
    monkeypatch.setitem(beside.COMPARISONS, "tdmpc2", stand_in)
    fixed = ["--tdmpc2", str(tmp_path / "checkout"), "--out", str(tmp_path / "out"), "--steps", "60", *SMALL]

    def run(*words):
        return beside.main([*fixed, "--threads", "1", "--python", sys.executable, *words])

    return run


def test_both_sides_are_trained_and_what_is_complete_is_kept(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--seeds", "1") == 0
    first = (out / "ours-1" / "done.json").stat().st_mtime_ns
    (out / "authors-2").mkdir()
    (out / "authors-2" / "returns.csv").write_text("20,-5\n")  # of a run that was cut short
    assert command("--seeds", "1,2") == 0
    assert (out / "ours-1" / "done.json").stat().st_mtime_ns == first
    said = capsys.readouterr().out
    assert said.count("training") == 4
    with (out / "returns.csv").open() as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    steps = range(4, 61, 4)  # an episode of 7 frames is 4 agent steps; the rewards are 10, 20, … 70
    ours = [("ours", str(seed), str(at), "280.0") for seed in (1, 2) for at in steps]
    authors = [("authors", str(seed), str(at), str(100.0 * seed + at)) for seed in (1, 2) for at in (20, 40, 60)]
    assert rows == ours + authors
    table = (out / "table.md").read_text()
    assert "| ours | 1 | 60 | 15 | 280.0 | 280.0 | " in table
    assert "| authors | 2 | 60 | 3 | 240.0 | 240.0 | " in table
    assert "Mean return: ours minus theirs +90.0; between seeds of one side at most 100.0." in table
    assert "<svg" in (out / "curves.svg").read_text()
    with pytest.raises(
        SystemExit, match="is complete with threads 1 .asked for: 2.. Give these again, or another --out"
    ):
        command("--seeds", "1", "--threads", "2")


def test_code_of_the_authors_that_fails_is_quoted(command, tmp_path, capsys):
    assert command("--seeds", "9") == 1
    said = capsys.readouterr().err
    assert "the authors' code ended with 1" in said
    assert said.endswith("no GPU\n")
    assert not (tmp_path / "out" / "authors-9" / "done.json").exists()


def test_a_wrong_task_is_refused_before_the_authors_train(command, tmp_path, capsys):
    assert command("--seeds", "1", "--env.id", "tests.environments:Nothing-v0") == 1
    assert "Nothing" in capsys.readouterr().err
    assert not (tmp_path / "out" / "authors-1").exists()


@pytest.mark.parametrize(
    ("task", "env_id"),
    [
        ("cup-catch", "dm_control/ball_in_cup-catch-v0"),
        ("cartpole-balance-sparse", "dm_control/cartpole-balance_sparse-v0"),
        ("walker-walk", "dm_control/walker-walk-v0"),
    ],
)
def test_tasks_are_called_as_the_authors_call_them(task, env_id):
    assert beside.env_id(task) == env_id
    assert paper_name(env_id) == task


def test_a_table_alone_tells_what_was_trained_and_names_no_place(command, tmp_path):
    command("--seeds", "1")
    assert command("--table", "--steps", "7", "--threads", "2") == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert "60 agent steps (120 frames)" in text
    assert "1 threads" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "one"], "--seeds is 'one', expected numbers such as 1,2,3 or 1..3."),
        (["--python", "no/python"], "--python is no/python, expected a Python that has what the authors' code needs."),
    ],
)
def test_wrong_words_are_refused_before_anything_trains(words, said, command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(*words)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_authors_code_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        beside.main(["--dreamerv3", str(tmp_path)])
    assert "has no folder dreamerv3, expected a checkout" in capsys.readouterr().err


def test_dreamerv3_gets_the_same_settings_on_both_sides():
    settings = beside.Settings("walker-walk", 1000, 2, 512.0, 16, 64)
    ours = beside.dreamerv3_ours(settings)
    flags = beside.dreamerv3_theirs(settings, 3)["flags"]
    theirs = dict(zip(flags[::2], flags[1::2], strict=True))
    shared = {"--agent.batch_size": "--batch_size", "--agent.batch_length": "--batch_length"}
    shared |= {"--env.num_envs": "--run.envs", "--train.train_ratio": "--run.train_ratio"}
    assert {name: ours[ours.index(name) + 1] for name in shared} == {
        mine: theirs[their] for mine, their in shared.items()
    }
    assert (theirs["--task"], theirs["--seed"], theirs["--run.steps"]) == ("dmc_walker_walk", "3", "1000")
    assert json.dumps(flags)  # they go to the program as text
