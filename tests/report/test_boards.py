"""Metrics on the boards of log.to: TensorBoard, W&B (offline) and MLflow (in a file)."""

import json
import logging

import numpy as np
import pytest
import yaml

import worldloom.report.boards as boards
from launch.train import main
from tests.run_configs import TINY_YAML
from worldloom.report.boards import MLflow, TensorBoard, WandB, flat, open_boards
from worldloom.report.sinks import MetricsLogger
from worldloom.runs.config import LogConfig

CONFIG = {"algorithm": "tdmpc2:1m", "agent": {}, "train": {"seed": 3}, "log": {"to": ["tensorboard"]}}


def test_fields_have_the_names_of_the_command_line():
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "agent": {}}) == {"a": 1, "b.c": 2, "b.d.e": 3, "agent": {}}


def test_tensorboard_alone_is_the_default(tmp_path):
    assert LogConfig().to == ["tensorboard"]
    assert [type(board) for board in open_boards(tmp_path)] == [TensorBoard]


def test_a_run_may_have_no_board(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "log": {"to": []}}))
    logger = MetricsLogger(tmp_path)
    logger.write(1, 0, 0.1, {"a": 1.0})
    logger.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.jsonl"]


@pytest.mark.parametrize("board", ["wandb", "mlflow"])
def test_a_board_whose_package_is_missing_is_refused_before_anything_starts(board, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(boards, "find_spec", lambda module: None)
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "tiny.yaml"), "--run-dir", str(tmp_path / "run"), f"--log.to=[{board}]"])
    said = capsys.readouterr().err
    assert f"log.to names {board}, but the package {board} is missing" in said
    assert f"pip install 'worldloom[{board}]'" in said
    assert not (tmp_path / "run").exists()


def test_an_unknown_board_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY_YAML)
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "tiny.yaml"), "--log.to=[wandbb]"])
    assert "log.to" in capsys.readouterr().err


def test_wandb_records_a_run_offline_and_a_resumed_one_under_the_same_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (10, 20):
        board = WandB(tmp_path, CONFIG)
        board.write(step, {"eval/return_mean": 41.5})
        board.picture(step, "imagination", np.zeros((8, 8, 3), np.uint8))
        board.close()
    run_id = json.loads((tmp_path / "boards.json").read_text())["wandb"]
    sessions = [path for path in (tmp_path / "wandb").glob("offline-run-*") if (path / f"run-{run_id}.wandb").is_file()]
    assert sessions
    records = b"".join(path.read_bytes() for path in (tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    for words in (b"eval/return_mean", b"41.5", b"imagination", b"env_steps", b"tdmpc2:1m"):
        assert words in records
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))) == 2


def test_wandb_without_a_key_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(RuntimeError, match=r"W&B could not be opened: No API key .*Log in with `wandb login`"):
        WandB(tmp_path, CONFIG)


@pytest.mark.slow  # MLflow takes 10 s to be imported and to make its database
def test_mlflow_records_a_run_in_a_file_and_a_resumed_one_under_the_same_id(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = tmp_path / "mine"
    run_dir.mkdir()
    for step in (10, 20):
        board = MLflow(run_dir, {**CONFIG, "train": {"seed": step}})
        board.write(step, {"eval/return_mean": step / 2})
        board.picture(step, "imagination", np.zeros((8, 8, 3), np.uint8))
        board.close()
    run_id = json.loads((run_dir / "boards.json").read_text())["mlflow"]
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("worldloom").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "mine", "FINISHED")
    assert run.data.params == {"algorithm": "tdmpc2:1m", "agent": "{}", "train.seed": "10", "log.to": "['tensorboard']"}
    history = client.get_metric_history(run_id, "eval/return_mean")
    assert [(metric.step, metric.value) for metric in history] == [(10, 5.0), (20, 10.0)]
    assert len(list((run_dir / "mlflow").rglob("*.png"))) == 2


class Unreachable(MLflow):
    """MLflow whose server went away after the start."""

    def _begin(self, run_dir, config):
        return "some-id"


def test_an_mlflow_server_that_goes_away_costs_metrics_and_not_the_run(tmp_path, monkeypatch, caplog):
    tracking = pytest.importorskip("mlflow.tracking")

    class Client:
        def __init__(self, tracking_uri):
            pass

        def update_run(self, run_id, status):
            pass

        def log_batch(self, run_id, metrics):
            raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "MlflowClient", Client)
    with caplog.at_level(logging.WARNING):
        board = Unreachable(tmp_path, CONFIG)
        board.write(1, {"a": 1.0})
        board.write(2, {"a": 1.0})
        board.close()
    assert caplog.text.count("MLflow cannot be written (no route)") == 1
