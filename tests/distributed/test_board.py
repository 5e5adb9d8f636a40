"""Prometheus itself scrapes a live run; every panel of the board gets numbers, and they agree with metrics.jsonl."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import ray

from distributed.coordinator import Coordinator
from distributed.metrics import gauge_name
from launch.board import board
from launch.dashboard import main
from launch.panels import value
from tests.distributed.ray_runs import ray_config
from worldloom.report.page import read_metrics
from worldloom.runs.config import CheckpointConfig, EvalConfig, RuntimeConfig, TrainConfig

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        PROMETHEUS is None, reason="no prometheus binary on PATH (Debian's package `prometheus` has one)"
    ),
]
PANELS = [panel for panel in board()["panels"] if panel["type"] != "row"]
GPU = {"GPU: busy", "GPU: memory in use"}  # of which a machine without one exports nothing
PATIENCE = 120.0


@pytest.fixture
def cluster(no_cluster, monkeypatch):
    """The folder of a cluster with Ray's dashboard, which keeps the list of nodes to scrape."""
    for name in ("RAY_METRICS_OUTPUT_ROOT", "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
    with tempfile.TemporaryDirectory(
        prefix="wl", ignore_cleanup_errors=True
    ) as folder:  # short: Ray's sockets lie there
        options = {
            "num_cpus": 3,
            "log_to_driver": False,
            "object_store_memory": 200 * 2**20,
            "dashboard_port": free_port(),
        }
        soon = {"metrics_report_interval_ms": 1000}
        ray.init(address="local", include_dashboard=True, _temp_dir=folder, _system_config=soon, **options)
        yield Path(folder)
        ray.shutdown()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Prometheus:
    """A Prometheus of our own, which reads the scrape file of launch.dashboard."""

    def __init__(self, scrape, folder):
        self._url = f"http://127.0.0.1:{(port := free_port())}/api/v1"
        options = [f"--config.file={scrape}", f"--storage.tsdb.path={folder}", f"--web.listen-address=127.0.0.1:{port}"]
        self._log = (folder.parent / "prometheus.log").open("w")
        self.process = subprocess.Popen([PROMETHEUS, *options], stdout=self._log, stderr=self._log)

    def get(self, what, **query):
        """Its answer to a query of its HTTP API, once it serves."""
        address = f"{self._url}/{what}?{urllib.parse.urlencode(query, doseq=True)}"
        answer = json.loads(until(lambda: urllib.request.urlopen(address, timeout=10).read(), address))
        assert answer["status"] == "success", (query, answer)
        return answer["data"]

    def numbers(self, query):
        """What a query gives now: (labels, number)."""
        return [(found["metric"], float(found["value"][1])) for found in self.get("query", query=query)["result"]]

    def close(self):
        self.process.terminate()
        self.process.wait(60)
        self._log.close()


def until(attempt, what):
    """What the attempt returns, once it returns something and raises no OSError."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if found := attempt():
                return found
        assert time.monotonic() < deadline, f"{what} took too long"
        time.sleep(0.1)


@pytest.fixture
def run(cluster, tmp_path):
    """A run with evaluations, checkpoints and an acting server, trained to its end but still there; its folder."""
    config = ray_config(
        train=TrainConfig(total_steps=3000, learning_starts=100, train_ratio=12),
        runtime=RuntimeConfig(
            kind="ray", env_actors=1, chunk_steps=8, publish_interval=5, learner_threads=1, acting="server"
        ),
        eval=EvalConfig(interval=800, episodes=2),
        checkpoint=CheckpointConfig(interval=700),
    )
    coordinator = Coordinator(config, tmp_path / "mine")
    try:
        coordinator.start(resume=False)
        yield coordinator
    finally:
        coordinator.close()


def test_every_panel_shows_numbers_of_a_live_run_and_they_are_those_of_metrics_jsonl(cluster, run, tmp_path):
    assert main(["--temp-dir", str(cluster)]) == 0
    prometheus = Prometheus(cluster / "session_latest" / "metrics" / "prometheus" / "prometheus.yml", tmp_path / "data")
    try:
        run.train()
        lines, steps = read_metrics(tmp_path / "mine"), gauge_name("env_steps")
        session = cluster.joinpath("session_latest").resolve().name
        until(lambda: [number for _, number in prometheus.numbers(steps)] == [lines[-1]["env_steps"]], "the last line")
        assert prometheus.get("label/SessionName/values", **{"match[]": steps}) == [session]
        assert prometheus.get("label/run/values", **{"match[]": f'{steps}{{SessionName="{session}"}}'}) == ["mine"]
        (scraped,) = prometheus.get("query", query=f"{steps}[1h]")["result"]
        seen = {float(number) for _, number in scraped["values"]}
        assert len(seen) > 1  # it was scraped while it trained
        assert seen <= {line["env_steps"] for line in lines}
        for panel in PANELS:
            for query in (target["expr"] for target in panel["targets"]):
                asked = query.replace("$SessionName", session).replace("$run", "mine")
                if panel["title"] in GPU:
                    assert prometheus.numbers(asked) == []
                else:
                    until(lambda asked=asked, query=query: agrees(query, prometheus.numbers(asked), lines), query)
    finally:
        prometheus.close()


def agrees(query, found, lines):
    """Whether what Prometheus answered to a panel's query is what metrics.jsonl says; `found` may be from before."""
    last = {name: number for line in lines for name, number in line.items()}
    plain = {value(name): number for name, number in last.items()}
    family = re.search(r'__name__=~"ray_worldloom_(\w+)_\(\.\*(\w*)\)"', query)
    if query in plain:
        return [number for _, number in found] == [plain[query]]
    if family:
        room, ending = family.groups()
        named = {name.partition("/")[2]: number for name, number in last.items() if name.startswith(f"{room}/")}
        named = {name: number for name, number in named.items() if name.endswith(ending)}
        if query.startswith("sum("):
            return [number for _, number in found] == [sum(named.values())]
        return {labels["metric"]: number for labels, number in found} == named
    if "sum_over_time" in query:
        assert {labels["limited_by"] for labels, _ in found} <= {line.get("limited_by") for line in lines}
        return sum(number for _, number in found) == pytest.approx(1)
    if "limited_by" in query:
        return found == [({"limited_by": last["limited_by"]}, 1)]
    (number,) = [number for _, number in found]
    if "time()" in query:
        return 0 <= number < PATIENCE
    return 0 < number <= (100 if "cpu" in query else 1)
