"""The commands as a person types them: good input, bad input, Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.arguments import dump_config, run_config, run_parser
from launch.claim import Claim
from launch.train import main
from tests.run_configs import TINY_YAML, tiny_config
from worldloom import load_agent
from worldloom.envs.suites import AtariConfig
from worldloom.manifest import newest_checkpoint, read_manifest, write_manifest
from worldloom.runs.checkpoint import begin_checkpoint, commit_checkpoint
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.verify import verify
from worldloom.tdmpc2.agent import TDMPC2Agent

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
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert "Traceback" not in said
    return said


def parse(*argv):
    parser = run_parser("launch.train", "")
    return run_config(parser, parser.parse_args(list(argv)))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_parse_and_fit_their_algorithm(path):
    from worldloom.runs.build import check_config

    check_config(parse("--config", str(path)))


def test_yaml_and_overrides_are_typed(config):
    built = parse("--config", config, "--train.seed", "7", "--agent.horizon", "5", "--train.train_ratio", "3e2")
    assert built.agent["lr"] == 3e-4  # plain PyYAML reads 3e-4 as text
    assert built.agent["horizon"] == 5
    assert built.agent["mlp_dim"] == 16
    assert (built.train.seed, built.train.train_ratio, built.replay.capacity) == (7, 300.0, 10_000)


def test_protocols_lie_between_the_preset_and_the_overrides(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text(
        "algorithm: dreamerv3:size1m\nagent: {lr: 1e-4}\nenv: {num_envs: 2}\n"
        "protocols: {head: {agent: {policy_unimix: 0}, env: {action_repeat: 3}, train: {train_ratio: 7}}}\n"
    )
    paper = parse("--config", str(path))
    assert (paper.agent, paper.env.action_repeat, paper.train.train_ratio) == ({"lr": 1e-4}, 1, None)
    head = parse("--config", str(path), "--protocol", "head", "--agent.bins", "5", "--train.train_ratio=9")
    assert head.agent == {"lr": 1e-4, "policy_unimix": 0, "bins": 5}
    assert (head.env.action_repeat, head.env.num_envs, head.train.train_ratio) == (3, 2, 9.0)
    (tmp_path / "saved.yaml").write_text(dump_config(head))
    assert parse("--config", str(tmp_path / "saved.yaml")) == head


def test_published_protocols_are_those_of_the_paper_and_of_the_authors_code():
    def of(name, *more):
        c = parse("--config", str(ROOT / "configs" / f"dreamerv3_{name}.yaml"), *more)
        return c.algorithm, c.env.action_repeat, c.train.train_ratio, c.env.atari.noops, c.env.atari.full_actions

    head = ("--protocol", "head")
    assert of("dmc_proprio")[:3] == ("dreamerv3:size12m", 2, 512)
    assert of("dmc_proprio", *head)[:3] == ("dreamerv3:size1m", 1, 1024)
    assert of("dmc_vision")[:3] == ("dreamerv3:size12m", 2, 512)
    assert of("dmc_vision", *head)[:3] == ("dreamerv3:size200m", 1, 256)
    assert of("atari100k") == ("dreamerv3:size200m", 4, 128, 0, True)
    assert of("atari100k", *head) == ("dreamerv3:size200m", 4, 256, 30, False)
    storm = parse("--config", str(ROOT / "configs" / "storm_atari100k.yaml"))
    assert (storm.algorithm, storm.env.action_repeat, storm.train.train_ratio) == ("storm:18m", 4, 1024)
    assert (storm.train.total_steps, storm.train.learning_starts, storm.replay.recency) == (102_000, 1024, [])
    assert storm.env.atari == AtariConfig(sticky=0.25, noops=0, resize="area", life_loss="mark", same_seed=True)
    diamond = parse("--config", str(ROOT / "configs" / "diamond_atari100k.yaml"))
    assert (diamond.algorithm, diamond.env.action_repeat, diamond.train.train_ratio) == ("diamond:atari", 4, 2432)
    assert (diamond.train.total_steps, diamond.train.learning_starts) == (100_000, 5000)
    assert diamond.env.atari == AtariConfig(least_noops=1, noops=30, resize="area", life_loss="end")
    assert diamond.replay.recency == [0.1, 0.1, 0.1, 0.7]
    assert of("atari") == ("dreamerv3:size200m", 4, 32, 0, True)
    assert of("atari", *head) == ("dreamerv3:size200m", 4, 32, 30, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "head"], ["protocol", "head", "paper only"]),
        (["--train.totl_steps", "5"], ["totl_steps", "train.total_steps"]),
        (["--total_steps", "5"], ["total_steps", "train.total_steps"]),
        (["--train.total_steps", "many"], ["train.total_steps", "many", "int"]),
        (["--train.total_steps", "1.5"], ["train.total_steps", "1.5", "int"]),
        (["--replay.capacity", "-5"], ["replay.capacity", "-5", "at least 1"]),
        (["--runtime.kind", "rai"], ["runtime.kind", "rai", "inline"]),
        (["--train.learning_starts", "400"], ["train.learning_starts", "400", "train.total_steps=300"]),
        (["--algorithm", "tdmpc2:7m"], ["tdmpc2:7m", "tdmpc2:5m"]),
        (["--agent.horzon", "4"], ["agent.horzon", "horizon"]),
        (["--agent.horizon", "four"], ["agent.horizon", "four", "int"]),
        (["--agent.latent_dim", "20"], ["agent.latent_dim", "20", "simnorm_dim"]),
        (["--replay.shards", "2"], ["replay.shards is 2", "1 with runtime.kind inline", "several are for Ray"]),
        (["--train.device", "cuda:7"], ["train.device", "cuda:7"]),
        (["--train.device", "gpu"], ["train.device", "gpu", "auto"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(config, capsys, arguments, words):
    said = refusal(capsys, "--config", config, *arguments)
    for word in words:
        assert word in said, said


def test_bad_yaml_keys_are_refused_with_the_nearest_name(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(TINY_YAML.replace("total_steps", "totalsteps"))
    said = refusal(capsys, "--config", str(path))
    assert "totalsteps" in said
    assert "train.total_steps" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--env.id", "Pendulun-v1"], ["Pendulun-v1", "Pendulum-v1"]),
        (["--env.id", "FrozenLake-v1"], ["FrozenLake-v1", "class indices", "one-hot"]),
        (["--env.id", "tests.environments:Broken-v0"], ["NaN or infinity at entries [1]"]),
        (["--replay.capacity", "1000000000000"], ["replay.capacity", "GiB", "Lower replay.capacity"]),
        (["--replay.capacity", "3"], ["replay.capacity is 3", "window of 4"]),
    ],
)
def test_bad_environments_and_sizes_end_the_command_with_a_sentence(config, tmp_path, capsys, arguments, words):
    assert main(["--config", config, "--run-dir", str(tmp_path / "run"), *arguments]) == 1
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said


@pytest.mark.pages
def test_train_evaluate_and_resume_as_commands(config, tmp_path, capsys):
    from launch import evaluate, status

    run_dir = tmp_path / "run"
    assert main(["--config", config, "--run-dir", str(run_dir)]) == 0
    assert "return 280.0 ± 0.0 over 2 episodes" in capsys.readouterr().out
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["total_steps"] == 300
    summary = json.loads((run_dir / "summary.json").read_text())
    expected = {
        "status", "algorithm", "env_id", "env_steps", "updates", "episodes", "eval_return_mean", "eval_return_std",
        "eval_episodes", "wall_seconds", "env_steps_per_second", "updates_per_second", "learner_busy_fraction",
        "train_ratio_target", "train_ratio_actual", "weight_staleness_p95", "actor_restarts", "env_steps_discarded",
        "seed", "device",
    }  # fmt: skip
    assert expected <= summary.keys()
    assert "280.0 ± 0.0" in (run_dir / "report.html").read_text()
    assert (run_dir / "imagined.png").is_file()

    assert status.main(["--run-dir", str(run_dir)]) == 0
    told = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["status"] == "completed"
    assert told["steps"] == "300 of 300 (100%)"
    assert told["evaluation"] == "280.0 ± 0.0 at step 300"
    assert told["train ratio"] == "12"
    assert re.search(r"(learner|environments)( \d+%|$)", told["limited by"])
    os.utime(run_dir / "summary.json", (1, 1))  # the run went on after it
    assert dict(status.status(run_dir))["status"] == "stopped before its end; go on with --resume"
    with Claim(run_dir, ""):
        assert dict(status.status(run_dir))["status"].startswith(f"running (process {os.getpid()} on ")
    (run_dir / ".lock").unlink()  # as of a program that uses the library
    assert dict(status.status(run_dir))["status"] == "running"
    os.utime(run_dir / "metrics.jsonl", (2, 2))
    assert "go on with --resume" in dict(status.status(run_dir))["status"]
    assert status.main(["--run-dir", str(tmp_path)]) == 1
    assert "expected the directory of a run" in capsys.readouterr().err

    assert evaluate.main(["--run-dir", str(run_dir), "--episodes", "5"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == {
        "eval_return_mean": 280.0, "eval_return_std": 0.0, "eval_episodes": 5
    }  # fmt: skip

    assert evaluate.main(["--run-dir", str(run_dir), "--episodes", "1", "--agent.num_samples", "8"]) == 0
    assert "return 280.0 ± 0.0 over 1 episodes" in capsys.readouterr().out
    assert evaluate.main(["--run-dir", str(run_dir), "--agent.mlp_dim", "24"]) == 1
    assert "size mismatch" in capsys.readouterr().err
    assert evaluate.main(["--run-dir", str(run_dir), "--agent.num_sample", "8"]) == 1
    assert "Did you mean 'num_samples'" in capsys.readouterr().err

    assert "already holds a run" in refusal(capsys, "--config", config, "--run-dir", str(run_dir))
    assert main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "400"]) == 0
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] >= 400
    assert main(["--resume", "--run-dir", str(run_dir), "--agent.mlp_dim", "24"]) == 1
    assert "mlp_dim is 16 there, 24 here" in capsys.readouterr().err


def test_a_run_without_a_decoder_is_filmed_with_its_rewards(tmp_path, capsys):
    from launch import imagine

    run_dir = str(tmp_path / "run")
    arguments = ["--algorithm", "dreamerv3:size1m", "--env.id", "tests.environments:screen", "--env.num_envs", "1",
                 "--env.image_size", "48", "--runtime", "inline", "--replay.capacity", "200", "--eval.episodes", "1",
                 "--log.picture_interval", "0", "--run-dir", run_dir]  # fmt: skip
    small = {"deter": 32, "hidden": 8, "units": 8, "stoch": 4, "classes": 4, "depth": 4, "batch_size": 2,
             "batch_length": 6, "ne_width": 16}  # fmt: skip
    arguments += [word for name, value in small.items() for word in (f"--agent.{name}", str(value))]
    until = ["--train.learning_starts", "20", "--train.total_steps"]
    words = "agent.representation is 'barlow', expected 'decoder' or 'r2dreamer'"
    assert words in refusal(capsys, *arguments, *until, "22", "--agent.representation", "barlow")
    assert main([*arguments, *until, "22", "--agent.representation", "ne"]) == 0
    assert "embedding_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["--resume", "--run-dir", run_dir, "--agent.representation", "decoder"]) == 1
    assert "config.representation is 'ne' there, 'decoder' here" in capsys.readouterr().err
    film = tmp_path / "imagined.gif"
    assert imagine.main(["--run-dir", run_dir, "--out", str(film), "--steps", "7"]) == 0
    assert "This model has no decoder: it predicts rewards" in capsys.readouterr().out
    assert imageio.imread(film).shape == (7, 260, 800, 3)


@pytest.mark.pages
def test_a_run_is_filmed_and_its_imagination_shown(tmp_path, capsys):
    from launch import evaluate, imagine

    run_dir, small = tmp_path / "run", ["deter=32", "hidden=8", "units=8", "stoch=4", "classes=4", "depth=4"]
    arguments = ["--algorithm", "dreamerv3:size1m", "--env.id", "tests.environments:screen", "--env.num_envs", "1",
                 "--runtime", "inline", "--train.total_steps", "30", "--train.learning_starts", "29", "--eval.episodes",
                 "2", "--log.picture_interval", "10", "--agent.batch_size", "2", "--agent.batch_length", "6",
                 "--env.image_size", "48", "--replay.capacity", "200"]  # fmt: skip
    for field in small:
        name, value = field.split("=")
        arguments += [f"--agent.{name}", value]
    assert main([*arguments, "--run-dir", str(run_dir)]) == 0
    assert imageio.imread(run_dir / "imagined.png").ndim == 3
    assert len(imageio.imread(run_dir / "imagined.gif", index=None)) > 1
    assert "data:image/gif;base64," in (run_dir / "report.html").read_text()
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("imagination")] == [10, 20, 30]

    film = tmp_path / "new" / "film.mp4"
    assert evaluate.main(["--run-dir", str(run_dir), "--episodes", "2", "--video", str(film)]) == 0
    frames = imageio.imread(film)
    assert frames.shape == (9, 64, 64, 3)  # the first environment plays one episode of 9 steps
    assert abs(frames[:, 32, 32, 0].astype(int) - 20 * np.arange(9)).max() < 8
    assert evaluate.main(["--run-dir", str(run_dir), "--video", "film.txt"]) == 1
    assert "expected a file that ends in .mp4 or .gif" in capsys.readouterr().err

    imagined = tmp_path / "imagined.gif"
    assert imagine.main(["--run-dir", str(run_dir), "--out", str(imagined), "--steps", "8"]) == 0
    assert "5 steps observed, 3 imagined" in capsys.readouterr().out
    assert imageio.imread(imagined).shape == (8, 3 * 50, 3 * 3 * 50, 3)
    assert imagine.main(["--run-dir", str(run_dir), "--out", str(tmp_path / "a.png")]) == 0
    for bad, words in [(["--out", "a.txt"], "ends in .gif"), (["--steps", "5"], "observed is 5 of 5 rows")]:
        assert imagine.main(["--run-dir", str(run_dir), *bad]) == 1
        assert words in capsys.readouterr().err
    assert imagine.main(["--run-dir", str(tmp_path)]) == 1


def test_resume_and_evaluate_without_a_run_are_refused(tmp_path, capsys):
    from launch import evaluate

    assert "holds no config.yaml" in refusal(capsys, "--resume", "--run-dir", str(tmp_path))
    assert evaluate.main(["--run-dir", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


def interrupt(arguments, run_dir, after_steps):
    """Start the command, press Ctrl-C once it got so far, and give its exit code and output."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "launch.train",
        *arguments,
        "--run-dir",
        str(run_dir),
        "--log.interval",
        "50",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # several threads beside other work take many times as long
    )
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        lines = metrics.read_text().rpartition("\n")[0].splitlines() if metrics.exists() else []
        if lines and json.loads(lines[-1])["env_steps"] >= after_steps:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.mark.parametrize("kind", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_ctrl_c_saves_and_prints_the_resume_command(config, tmp_path, kind, capsys):
    run_dir = tmp_path / "run"
    arguments = ["--config", config, "--runtime", kind, "--runtime.env_actors", "1", "--train.total_steps", "100_000"]
    code, output = interrupt(arguments, run_dir, after_steps=200)
    assert code == 130, output
    assert "Traceback" not in output
    command = f"python -m launch.train --resume --run-dir {run_dir}"
    assert command in output
    stopped = json.loads((run_dir / "summary.json").read_text())
    assert stopped["status"] == "interrupted"
    assert stopped["env_steps"] >= 200
    assert main(["--resume", "--run-dir", str(run_dir), "--runtime", "inline", "--train.total_steps",
                 str(stopped["env_steps"] + 50)]) == 0  # fmt: skip
    assert f"resumed from step-{stopped['env_steps']:012d}" in capsys.readouterr().out


def test_a_run_whose_end_is_nowhere_on_disk_says_so_and_saves_its_agent(config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / "rows").symlink_to("/proc")  # nobody can make files there
    (run_dir / "checkpoints").rename(tmp_path / "aside")
    made = InlineTrainer.save

    def save(self):
        if not (run_dir / "checkpoints").exists():
            (tmp_path / "aside").rename(run_dir / "checkpoints")
        made(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineTrainer, "save", save)
        assert main(["--config", config, "--run-dir", str(run_dir)]) == 1
    (folder,) = run_dir.glob("rescued-*")
    assert f"its agent alone is in {folder / 'agent'}" in capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "unsaved"
    assert summary["checkpoints_failed"] == 1
    agent = load_agent(folder / "agent")
    assert agent.act(np.zeros((1, 3), np.float32), None, np.ones(1, bool))[0].shape == (1, 1)


def test_two_runs_on_one_directory_are_refused_and_the_first_goes_on(config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["--config", config, "--run-dir", str(run_dir)]) == 0
    before = (run_dir / "config.yaml").read_text()
    with Claim(run_dir, ""):
        said = refusal(capsys, "--resume", "--run-dir", str(run_dir), "--train.total_steps", "400")
        assert f"is in use by process {os.getpid()} on" in said
        assert (run_dir / "config.yaml").read_text() == before
    assert main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "400"]) == 0


def test_a_run_that_an_error_ends_keeps_its_traceback_and_says_how_to_go_on(config, tmp_path, capsys, monkeypatch):
    run_dir, learn = tmp_path / "run", TDMPC2Agent.learn
    error: Exception = RuntimeError("CUDA error: an illegal memory access was encountered")

    def learn_until(agent, batch):
        if agent.updates == 130:
            raise error
        return learn(agent, batch)

    def train(*more):
        return main(["--run-dir", str(run_dir), "--runtime", "inline", *more])

    monkeypatch.setattr(TDMPC2Agent, "learn", learn_until)
    assert train("--config", config, "--checkpoint.interval", "100") == 1
    said = capsys.readouterr().err
    assert "launch.train: CUDA error: an illegal memory access was encountered\n" in said
    assert f"The traceback is in {run_dir / 'error.txt'}." in said
    assert f"python -m launch.train --resume --run-dir {run_dir}" in said
    assert "in learn_until" in (run_dir / "error.txt").read_text()
    error = KeyError("a slip of the programmer's")
    with pytest.raises(KeyError):  # is shown whole, and kept too
        train("--resume", "--train.total_steps", "400")
    assert "KeyError" in (run_dir / "error.txt").read_text()
    monkeypatch.setattr(TDMPC2Agent, "learn", learn)
    assert train("--resume") == 0
    assert not (run_dir / "error.txt").exists()


@pytest.mark.parametrize("wrong", [["--env.id", "Nowhere-v0"], ["--replay.capacity", "1000000000000"]])
def test_a_run_that_is_refused_leaves_no_directory(wrong, config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["--config", config, "--run-dir", str(run_dir), *wrong]) == 1
    assert not run_dir.exists()
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    assert main(["--config", config, "--run-dir", str(run_dir), *wrong]) == 1
    assert (run_dir / "notes.txt").read_text() == "mine"
    assert "launch.train:" in capsys.readouterr().err


def test_a_checkpoint_of_a_newer_version_is_refused(config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    main(["--config", config, "--run-dir", str(run_dir)])
    folder = newest_checkpoint(run_dir)
    write_manifest(folder, {**read_manifest(folder), "format": 99})
    assert main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "400"]) == 1
    assert "is of format 99, but this version reads 2 and 3. Update WorldLoom" in capsys.readouterr().err
    assert json.loads((folder / "manifest.json").read_text())["format"] == 99  # nothing was written over


def test_a_resume_that_is_refused_leaves_the_run_as_it_was(config, tmp_path, capsys):
    run_dir = tmp_path / "run"
    main(["--config", config, "--run-dir", str(run_dir)])
    before = (run_dir / "config.yaml").read_text()
    assert main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "400", "--agent.mlp_dim", "24"]) == 1
    assert "is of another model" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == before
    assert not (run_dir / "error.txt").exists()
    assert main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "400"]) == 0


def test_a_directory_that_is_deleted_during_the_run_is_made_again(config, tmp_path, capsys):
    run_dir, made = tmp_path / "run", InlineTrainer.save
    deleted = []

    def save(self):
        if deleted == [1]:
            shutil.rmtree(run_dir)
        deleted.append(1)
        made(self)

    arguments = ["--config", config, "--run-dir", str(run_dir), "--checkpoint.interval", "100"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InlineTrainer, "save", save)
        assert main(arguments) == 0
    assert f"{run_dir} was deleted; it is made again" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").is_file()
    assert verify(run_dir) == []
    assert main(["--resume", "--run-dir", str(run_dir), "--train.total_steps", "350"]) == 0
    rows = read_manifest(newest_checkpoint(run_dir))["rows"][0]
    assert rows[0].startswith("0-000000000000-")  # all rows, also those of the checkpoint that was deleted


def test_files_of_rows_that_vanish_while_a_checkpoint_is_written_make_it_invalid(tmp_path):
    InlineTrainer(tiny_config(), tmp_path / "run").train()
    folder = newest_checkpoint(tmp_path / "run")
    manifest = read_manifest(folder)
    partial = begin_checkpoint(tmp_path / "run", 999)
    with pytest.raises(FileNotFoundError, match="replay-0.msgpack of the checkpoint were deleted while"):
        commit_checkpoint(partial, manifest, keep=2)
    assert newest_checkpoint(tmp_path / "run") == folder
