"""Boards that show metrics while a run goes on: TensorBoard, Weights & Biases and MLflow, as `log.to` names them."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from worldloom.files import write_text
from worldloom.types import Array

logger = logging.getLogger(__name__)

QUEUE = 100_000  # TensorBoard events that may wait for the disk before adding one blocks
CLOSE_SECONDS = 30.0
PROJECT = "worldloom"  # of W&B and MLflow, unless their own environment variables name another
IDS = "boards.json"  # in the run directory: the ids under which W&B and MLflow know the run
PARAMETER_LETTERS, PARAMETERS = 6000, 100  # MLflow takes no longer ones, and not more in one call
MODULES = {"tensorboard": (), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy")}  # what each cannot do without


class Board(Protocol):
    """A place that shows metrics. A failure of it must not end the run once the board is open."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics at environment step `step`."""

    def picture(self, step: int, name: str, image: Array) -> None:
        """Show an image [H, W, 3] uint8."""

    def close(self) -> None: ...


def check_boards(names: Sequence[str]) -> None:
    """Raises ValueError if the packages of a board are missing."""
    for name in names:
        for module in MODULES[name]:
            if find_spec(module) is None:
                raise ValueError(
                    f"log.to names {name}, but the package {module} is missing. Install it with: "
                    f"pip install 'worldloom[{name}]'"
                )


def open_boards(run_dir: Path) -> list[Board]:
    """Open the boards that config.yaml names in log.to; TensorBoard alone if there is no such file."""
    config = _saved_config(run_dir)
    names = config.get("log", {}).get("to", ["tensorboard"])
    makers: dict[str, Callable[[], Board]] = {
        "wandb": lambda: WandB(run_dir, config),
        "mlflow": lambda: MLflow(run_dir, config),
    }
    if find_spec("tensorboardX"):
        makers["tensorboard"] = lambda: TensorBoard(run_dir)
    return [makers[name]() for name in names if name in makers]


def renew_files(boards: Sequence[Board], run_dir: Path) -> list[Board]:
    """Return the boards for a run directory that was deleted and made anew: TensorBoard gets new files."""
    renewed: list[Board] = []
    for board in boards:
        if isinstance(board, TensorBoard):
            board.close()
        renewed.append(TensorBoard(run_dir) if isinstance(board, TensorBoard) else board)
    return renewed


def _saved_config(run_dir: Path) -> dict[str, Any]:
    saved = run_dir / "config.yaml"
    if not saved.is_file():
        return {}
    import yaml

    config: dict[str, Any] = yaml.safe_load(saved.read_text())
    return config


class TensorBoard:
    """Writes events to RUN/tensorboard."""

    def __init__(self, run_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), max_queue=QUEUE)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            if self._is_alive():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Array) -> None:
        if self._is_alive():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._is_alive():  # a full disk may still end its thread, and close would then wait without end
            closing = threading.Thread(target=self._writer.close, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)

    def _is_alive(self) -> bool:
        """Return True while events can be written.

        A full disk ends tensorboardX's writing thread, whose queue then blocks every caller that adds to it."""
        if self._writer is not None and not self._writer.file_writer.event_writer._worker.is_alive():
            logger.warning("TensorBoard events cannot be written: they are missing from now on.")
            self._writer = None
        return self._writer is not None


class WandB:
    """Writes to Weights & Biases; a resumed run goes on under its id.

    W&B's own variables apply: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, and WANDB_MODE=offline, which keeps
    everything in RUN/wandb for `wandb sync`. Raises RuntimeError if W&B refuses, for example without an API key.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_dir.resolve().name,
                dir=str(run_dir),
                id=_id_of(run_dir, "wandb"),
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise RuntimeError(
                f"W&B could not be opened: {error} Log in with `wandb login`, set WANDB_MODE=offline, or take wandb "
                "out of log.to."
            ) from error
        _keep_id(run_dir, "wandb", self._run.id)
        self._run.define_metric("*", step_metric="env_steps")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "env_steps": step})

    def picture(self, step: int, name: str, image: Array) -> None:
        self._run.log({name: self._image(image), "env_steps": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Writes to MLflow in a thread, since a server may be slow; a resumed run goes on under its id.

    MLflow's own variables apply: MLFLOW_TRACKING_URI (default: the file mlflow.db beside the run directory) and
    MLFLOW_EXPERIMENT_NAME. Raises RuntimeError if the server cannot be reached at the start.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        beside = f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
        address = os.environ.get("MLFLOW_TRACKING_URI", beside)
        self._metric = Metric
        try:
            self._client = MlflowClient(tracking_uri=address)
            self._id = _id_of(run_dir, "mlflow") or self._begin(run_dir.resolve(), config)
            self._client.update_run(self._id, status="RUNNING")
        except MlflowException as error:
            raise RuntimeError(
                f"MLflow at {address} could not be opened: {error} Set MLFLOW_TRACKING_URI, or take mlflow out of "
                "log.to."
            ) from error
        _keep_id(run_dir, "mlflow", self._id)
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def _begin(self, run_dir: Path, config: Mapping[str, Any]) -> str:
        """Make the run, with every field of its configuration as a parameter; return its id."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        artifacts = (run_dir / "mlflow").as_uri() if "MLFLOW_TRACKING_URI" not in os.environ else None
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        run_id: str = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
        fields = [Param(key, str(value)[:PARAMETER_LETTERS]) for key, value in flat(config).items()]
        for begin in range(0, len(fields), PARAMETERS):
            self._client.log_batch(run_id, params=fields[begin : begin + PARAMETERS])
        return run_id

    def _work(self) -> None:
        """Make the calls in their order; after one that fails, make no more."""
        while call := self._calls.get():
            try:
                call()
            except Exception as error:  # of a server, a network or a disk; the run needs none of them
                logger.warning("MLflow cannot be written (%s): metrics are missing there from now on.", error)
                return

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        values = [self._metric(name, float(value), now, step) for name, value in metrics.items()]
        self._calls.put(lambda: self._client.log_batch(self._id, metrics=values))

    def picture(self, step: int, name: str, image: Array) -> None:
        self._calls.put(lambda: self._client.log_image(self._id, image, key=name, step=step, synchronous=True))

    def close(self) -> None:
        self._calls.put(lambda: self._client.set_terminated(self._id))
        self._calls.put(None)
        self._thread.join(CLOSE_SECONDS)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of nested mappings by their dotted names, as the command line calls them."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping) and value
        fields |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return fields


def _id_of(run_dir: Path, board: str) -> str | None:
    try:
        found: str | None = json.loads((run_dir / IDS).read_text()).get(board)
    except (OSError, ValueError):
        return None
    return found


def _keep_id(run_dir: Path, board: str, run_id: str) -> None:
    path = run_dir / IDS
    known = json.loads(path.read_text()) if path.is_file() else {}
    write_text(path, json.dumps({**known, board: run_id}) + "\n")
