"""Runs in object stores: an S3 server of this machine, the memory of this process, and file:// URLs."""

import dataclasses
import json
import threading
import time
import uuid

import numpy as np
import pytest

from launch import runs, status, train
from launch.claim import Claim
from launch.earlier import check_unused
from tests.run_configs import TINY_YAML, tiny_config
from tests.s3 import new_bucket, s3_server
from worldloom import load_agent
from worldloom.files import CheckpointError
from worldloom.locations import files_below, find, locate, make_folder, read_bytes, write_bytes
from worldloom.manifest import checkpoints, newest_checkpoint, read_manifest
from worldloom.runs import checkpoint, home, lease
from worldloom.runs.config import CheckpointConfig
from worldloom.runs.home import fetch_small_files, open_home
from worldloom.runs.inline import InlineTrainer
from worldloom.runs.lease import LEASE, Lease, LeaseLost, writer_of
from worldloom.runs.verify import verify

CONFIG = tiny_config(checkpoint=CheckpointConfig(interval=100, keep=2))


@pytest.fixture(scope="module")
def server():
    with s3_server() as variables:
        yield variables


@pytest.fixture(params=["s3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("memory", "file"))])
def place(request, tmp_path, monkeypatch):
    """A storage's URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "s3":
        request.getfixturevalue("server")
        return f"{new_bucket()}/runs"
    return f"memory://{uuid.uuid4().hex}/runs" if request.param == "memory" else f"file://{tmp_path}/runs"


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return new_bucket()


def trained(url, steps=300, resume=False):
    """Train, and return the summary and where the run lies."""
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, total_steps=steps))
    with open_home(url) as place:
        trainer = InlineTrainer(config, place, resume)
        trainer.run.write_config("algorithm: tiny\n")
        return trainer.train(), place


@pytest.mark.pages
def test_a_run_in_a_storage_is_the_run_in_a_folder(place, tmp_path):
    url = f"{place}/one"
    summary, _ = trained(url)
    assert summary["status"] == "completed"
    inside = files_below(locate(url))
    assert {"config.yaml", "metrics.jsonl", "summary.json", "report.html"} <= inside.keys()
    assert LEASE not in inside
    assert len(checkpoints(url)) == 2
    assert verify(url) == []
    InlineTrainer(CONFIG, tmp_path / "straight").train()
    ours, theirs = (read_manifest(newest_checkpoint(run))["files"] for run in (tmp_path / "straight", url))
    assert ours == theirs  # checksums
    again, _ = trained(url, 500, resume=True)
    assert again["env_steps"] == 500
    assert verify(url) == []
    lines = [json.loads(line) for line in read_bytes(locate(url) / "metrics.jsonl").splitlines()]
    assert [line["env_steps"] for line in lines] == sorted(line["env_steps"] for line in lines)
    assert lines[0]["env_steps"] < 300 < lines[-1]["env_steps"]  # one history
    copied = runs.pull(locate(url), tmp_path / "copied")
    assert verify(copied) == []
    theirs, ours = load_agent(url), load_agent(copied)
    for name, value in theirs.world_model.state_dict().items():
        np.testing.assert_array_equal(value, ours.world_model.state_dict()[name])


def test_rows_are_uploaded_once(bucket, monkeypatch):
    from worldloom import files

    url, written = f"{bucket}/once", []
    original = files.write_bytes
    monkeypatch.setattr(files, "write_bytes", lambda path, data: (written.append(str(path)), original(path, data)))
    trained(url)
    rows = [path for path in written if "/rows/" in path]
    assert len(rows) == len(set(rows)) == 3
    held = [name for shard in read_manifest(newest_checkpoint(url))["rows"] for name in shard]
    assert [path.name for path in find(locate(url), "checkpoints/rows/*")] == held


class Killed(BaseException):
    """What a process that is killed between two objects leaves is what it wrote before."""


def test_a_writer_killed_between_any_two_objects_leaves_a_checkpoint_that_loads(bucket, monkeypatch):
    """Each write of the third checkpoint is the last one in turn."""
    from worldloom import files, manifest
    from worldloom.runs import agent_state

    url = f"{bucket}/killed"
    trained(url, 200)
    before = [folder.name for folder in checkpoints(url)]
    left = {"writes": 0}

    def counted(original):
        def call(*args):
            if not left["writes"]:
                raise Killed
            left["writes"] -= 1
            return original(*args)

        return call

    for module, name in ((files, "write_bytes"), (manifest, "write_bytes"), (agent_state, "upload")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    monkeypatch.setattr(checkpoint, "remove_folder", counted(checkpoint.remove_folder))
    monkeypatch.setattr(checkpoint, "remove_file", counted(checkpoint.remove_file))
    seen = set()
    for writes in range(30):
        left["writes"] = 1000
        with open_home(url) as place:
            trainer = InlineTrainer(CONFIG, place, resume=True)
            left["writes"] = writes
            try:
                trainer.save()
                complete = True
            except Killed:
                complete = False
            left["writes"] = 1000
            trainer.run.recorder.close()
            trainer.rollout.close()
        assert verify(url) == []
        seen.add(checkpoints(url)[-1].name)
        assert newest_checkpoint(url).name >= before[-1]
        if complete:
            break
    assert complete
    assert writes > 5
    assert len(seen) > 1
    left["writes"] = 1000
    again, _ = trained(url, 300, resume=True)
    assert again["env_steps"] == 300
    folders = [path.name for path in find(locate(url), "checkpoints/step-*")]
    assert folders == [folder.name for folder in checkpoints(url)]  # what was not complete is gone


def test_a_damaged_checkpoint_in_a_store_costs_one_checkpoint(bucket, caplog):
    url = f"{bucket}/damaged"
    trained(url)
    older, newest = checkpoints(url)
    data = bytearray(read_bytes(newest / "learner.msgpack"))
    data[len(data) // 2] ^= 1
    write_bytes(newest / "learner.msgpack", bytes(data))
    assert newest_checkpoint(url) == older
    assert "is damaged (learner.msgpack has checksum" in caplog.text
    trained(url, 400, resume=True)
    assert [path.name for path in find(newest, "manifest*")] == ["manifest.damaged"]
    assert verify(url) == []


def test_a_writer_that_lost_its_lease_stops(bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 600.0)
    url = f"{bucket}/lease"
    trained(url, 200)
    before = {name: size for name, size in files_below(locate(url)).items() if name.startswith("checkpoints")}
    with open_home(url) as place:
        trainer = InlineTrainer(CONFIG, place, resume=True)
        with monkeypatch.context() as patch:
            patch.setattr(lease.Writer, "gone", lambda self: True)  # it was silent for long
            other = Lease(locate(url)).__enter__()
        with pytest.raises(LeaseLost, match=r"lease was taken over by process \d+ on .*This one stops"):
            trainer.train()
    after = {name: size for name, size in files_below(locate(url)).items() if name.startswith("checkpoints")}
    assert after == before
    assert writer_of(locate(url)).token == other._mine.token
    other.__exit__()
    assert writer_of(locate(url)) is None


def test_a_writer_that_wakes_after_its_successor_has_ended_writes_nothing(bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 600.0)
    url = f"{bucket}/late"
    with open_home(url) as place:
        (place.dir / "metrics.jsonl").write_text("old\n")
        with monkeypatch.context() as patch:
            patch.setattr(lease.Writer, "gone", lambda self: True)
            trained(url, 200)  # takes the run over, and ends
        whole = files_below(locate(url))
        with pytest.raises(LeaseLost, match=r"has no lease\.json any more"):
            place.check()
    assert files_below(locate(url)) == whole  # the metrics of the other were not replaced at the end


def test_a_run_in_use_is_refused_and_a_dead_one_is_taken(bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    url, said = locate(f"{bucket}/used"), []
    monkeypatch.setattr(lease.Writer, "gone", lambda self: False)  # as if it were on another machine
    with Lease(url, said.append), pytest.raises(ValueError, match=r"is in use by process \d+ on "), Lease(url):
        pass
    dead = Lease(url, said.append)
    dead._write()  # and never again
    monkeypatch.setattr(lease, "SILENT_SECONDS", 2.0)
    with Lease(url, said.append):
        assert writer_of(url).token != dead._mine.token
    assert said
    assert "waiting 2 s for a sign" in said[-1]


def test_files_that_grow_are_copied_while_the_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(home, "MIRROR_SECONDS", 0.1)
    url = f"{bucket}/growing"
    with open_home(url) as place:
        (place.dir / "metrics.jsonl").write_text("{}\n")
        deadline = time.monotonic() + 60
        while "metrics.jsonl" not in files_below(locate(url)) and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        assert read_bytes(locate(url) / "metrics.jsonl") == b"{}\n"
        (place.dir / ".lock").write_text("here")
    assert files_below(locate(url)).keys() == {"metrics.jsonl"}


def test_a_store_that_refuses_is_a_disk_that_refuses(bucket, monkeypatch):
    """The run goes on; the loss is counted."""
    from worldloom.runs import inline

    def refuse(*args):
        raise OSError("the bucket is gone")

    with open_home(f"{bucket}/refusing") as place:
        trainer = InlineTrainer(CONFIG, place)
        with monkeypatch.context() as patch:
            patch.setattr(inline, "write_agent", refuse)
            trainer.save()
        assert trainer.run.recorder.counters["checkpoints_failed"] == 1
        trainer.save()
        assert trainer.run.unsaved is False
        trainer.run.recorder.close()
        trainer.rollout.close()


def test_the_commands_know_storages(place, tmp_path, capsys, monkeypatch):
    """Begin, list, show, go on with auto, and copy, by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLDLOOM_STORAGE", place)
    command = small_command(tmp_path)
    assert train.main([*command, "--name", "cart", "--train.total_steps", "120"]) == 0
    assert train.main([*command, "--name", "cart", "--train.total_steps", "120", "--resume", "auto"]) == 0
    assert "is complete: nothing is left to do" in capsys.readouterr().out
    assert train.main([*command, "--name", "cart", "--train.total_steps", "160", "--resume", "auto"]) == 0
    assert "differs from the run so far: train.total_steps: 120 -> 160" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.main([*command, "--name", "cart", "--resume", "auto", "--env.action_repeat", "2"])
    assert "env.action_repeat is 2, but 1 in this run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*command, "--name", "cart"])
    assert "already holds a run" in capsys.readouterr().err
    assert runs.main(["--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["name"], row["task"], row["status"]) == (
        "cart", "tests.environments:Counting-v0", "completed"
    )  # fmt: skip
    assert status.main(["--run-dir", f"{place}/cart", "--verify"]) == 0
    assert "hold" in capsys.readouterr().out
    assert runs.main(["pull", "cart", "--to", "copy"]) == 0
    assert status.main(["--run-dir", "copy", "--verify"]) == 0
    assert runs.main(["pull", "cart", "--to", "copy"]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert runs.main(["pull", "none"]) == 1
    assert "holds no config.yaml" in capsys.readouterr().err


def small_command(folder):
    config = folder / "small.yaml"
    config.write_text(TINY_YAML)
    return ["--config", str(config), "--log.interval", "20"]


def test_auto_begins_again_where_nothing_was_saved(tmp_path, capsys):
    command = small_command(tmp_path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"env_steps": 20}\n')
    (run_dir / "config.yaml").write_text("algorithm: tdmpc2:1m\n")
    with pytest.raises(SystemExit):
        train.main([*command, "--run-dir", str(run_dir)])
    assert train.main([*command, "--run-dir", str(run_dir), "--resume", "auto"]) == 0
    assert "ended before its first checkpoint: the run begins again" in capsys.readouterr().out
    assert '{"env_steps": 20}\n' not in (run_dir / "metrics.jsonl").read_text()


def test_a_run_at_a_url_begins_again_without_the_lines_of_the_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = locate(f"memory://{uuid.uuid4().hex}/runs/a")
    for name in ("metrics.jsonl", "config.yaml", "tensorboard/events.1"):
        make_folder((run / name).parent)
        write_bytes(run / name, b'{"env_steps": 900}\n')
    with open_home(str(run)) as home:
        check_unused(home, "auto")
        (home.dir / "metrics.jsonl").open("a").write('{"env_steps": 100}\n')
    assert read_bytes(run / "metrics.jsonl") == b'{"env_steps": 100}\n'
    assert not list((home.dir / "tensorboard").glob("*"))


def test_a_copy_of_a_run_has_its_summary_last_and_no_lock(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    names = ["summary.json", ".lock", ".heartbeat", "metrics.jsonl", "report.html"]
    for name in names:
        (run / name).write_text("x")
    monkeypatch.setattr("worldloom.runs.home.files_below", lambda folder: dict.fromkeys(names, 1))
    fetched = []
    monkeypatch.setattr("worldloom.runs.home.download", lambda source, target: fetched.append(target.name))
    fetch_small_files(run, tmp_path / "copy")
    assert fetched == ["metrics.jsonl", "report.html", "summary.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a/b"], "--name is 'a/b', expected a name without slashes"),
        (["--name", "a", "--run-dir", "b"], "expected one of them"),
        (["--name", "a", "--storage", "foo://bucket"], "Install what reads it"),
        (["--name", "a", "--resume", "sometimes"], "invalid choice"),
        (["--name", "none", "--resume"], "holds no config.yaml"),
        (["--resume"], "none was given"),
    ],
)
def test_wrong_names_of_runs_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        train.main(["--runtime", "inline", *arguments])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_url_is_opened_before_it_is_trained_in():
    with pytest.raises(ValueError, match="Open it first: with open_home"):
        InlineTrainer(CONFIG, "memory://x/y")


def test_no_checkpoint_in_a_store_is_said(place):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_checkpoint(f"{place}/none")


def test_auto_waits_for_the_process_that_is_about_to_end(tmp_path, monkeypatch, capsys):
    """As the driver of a lost cluster does for a minute, with its claim on the run."""
    monkeypatch.setattr(train, "RETRY_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    other = Claim(tmp_path / "run", "")
    other.__enter__()
    waited = []

    def end(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            other.__exit__(None, None, None)

    monkeypatch.setattr(train.time, "sleep", end)
    assert train.main([*small_command(tmp_path), "--run-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0
    assert "is in use by process" in (said := capsys.readouterr().out)
    assert "Waiting, since --resume is auto" in said
    assert len(waited) >= 2
