"""A cluster user's day, end to end, with real parts: python -m benchmarks.cluster_day

An S3 server, a Ray head and a second node, a job from a copy of this checkout, Prometheus, a stopped job, a changed
checkout, a killed head, a new one, and the finished run copied out of the bucket and opened in Chromium. Each step is
printed with what was checked; the first check that does not hold ends the day.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from launch.board import board
from worldloom.files import CheckpointError
from worldloom.locations import locate
from worldloom.manifest import checkpoint_folders, newest_checkpoint, read_manifest
from worldloom.runs.verify import verify

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE = 300.0  # seconds for each thing that is waited for
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "docs", "site", "__pycache__", "*.egg-info")
RAYS_OWN = re.compile(
    r"\d{4}-\d\d-\d\d .*(INFO|WARNING)|Running entrypoint for job "
)  # lines of the job's log that Ray writes
GPU = "GPU"  # in the titles of panels that a machine without one leaves empty


def main() -> int:
    parser = ArgumentParser(prog="benchmarks.cluster_day", description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="environment steps of the run")
    parser.add_argument("--picture", type=str, default=None, help="PNG of the report, as Chromium shows it")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="wl", ignore_cleanup_errors=True) as folder,
        contextlib.ExitStack() as open_ones,
    ):
        day = Day(Path(folder), options.steps, open_ones)
        day.morning()
        day.noon()
        day.evening(options.picture)
    print(f"\nthe day is over: every check holds ({time.monotonic() - day.begun:.0f} s)")
    return 0


class Day:
    """The parts of the day, and what they have in common."""

    def __init__(self, folder: Path, steps: int, open_ones: contextlib.ExitStack) -> None:
        self.begun, self._folder, self._steps, self._open = time.monotonic(), folder, steps, open_ones
        self._checkout = folder / "checkout"
        shutil.copytree(ROOT, self._checkout, ignore=LEFT_OUT)
        (folder / "token").write_text(secrets.token_hex(32))
        s3 = free_port()
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{s3}",
            AWS_ACCESS_KEY_ID="day",
            AWS_SECRET_ACCESS_KEY="day",
            AWS_DEFAULT_REGION="us-east-1",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(folder / "token"),
            RAY_JOB_STOP_WAIT_TIME_S="60",
            XDG_CACHE_HOME=str(folder / "cache"),
        )
        self._s3 = s3
        self._run = locate("s3://day/runs/pendulum")

    def morning(self) -> None:
        """A bucket, two nodes, a job, and its numbers in Prometheus."""
        self._open.enter_context(self._process("s3", sys.executable, "-m", "moto.server", "-p", str(self._s3)))
        until(lambda: socket.create_connection(("127.0.0.1", self._s3), 1).close() is None, "the S3 server")
        import s3fs

        s3fs.S3FileSystem().mkdir("day")
        self._done("S3 server is up", "bucket s3://day made")
        cluster = self._open.enter_context(contextlib.ExitStack())
        self._start_cluster(cluster, "first")
        self._submit("first")
        self._wait_for_checkpoint(self._steps // 8)
        first = self._log("first").splitlines()[0]
        require("as pendulum in s3://day/runs" in first, first)
        until(lambda: f"run directory: {self._run}" in self._log("first"), "the run's place in the log")
        self._done("job trains", f"first line of its log: {first}")
        self._done("job says where its run is", self._metadata("first"))
        self._prometheus()
        self._cluster = cluster

    def noon(self) -> None:
        """The job is stopped, the checkout changes, and the next job goes on."""
        self._ray("job", "stop", *self._at, "first")
        until(lambda: "was stopped" in self._status("first"), "the job's stop")
        steps = self._saved()
        require(verify(self._run) == [], str(verify(self._run)))
        self._done("ray job stop", f"saved at step {steps:,}; launch.status --verify: invariants hold")
        (self._checkout / "launch" / "__init__.py").write_text('"""A changed line."""\n')
        self._submit("second")
        self._done("one line changed, submitted again", self._goes_on("second", steps))
        self._wait_for_checkpoint(steps + self._steps // 4)

    def evening(self, picture: str | None) -> None:
        """The head is killed; on a new one the run goes on, ends, and is looked at."""
        self._cluster.close()
        steps = self._saved()
        self._done("head and second node killed", f"the bucket holds step {steps:,}")
        self._start_cluster(self._open, "second")
        self._submit("third")
        self._done("submitted to the new head", self._goes_on("third", steps))
        until(lambda: "succeeded" in self._status("third"), "the end of the run")
        self._done("finished", self._log("third").strip().splitlines()[-2].strip())
        listed = self._launch("runs", "--storage", "s3://day/runs", "--json")
        (row,) = json.loads(listed)
        require(row["status"] == "completed", listed)
        self._done("launch.runs", f"{row['name']}: {row['steps']} steps, return {row['return']}, {row['status']}")
        here = self._folder / "here"
        self._launch("runs", "pull", "pendulum", "--storage", "s3://day/runs", "--to", str(here))
        require("invariants            hold" in self._launch("status", "--run-dir", str(here), "--verify"), "verify")
        self._done("launch.runs pull", f"{sum(1 for path in here.rglob('*') if path.is_file())} files; invariants hold")
        self._report(here / "report.html", picture)

    def _start_cluster(self, held: contextlib.ExitStack, name: str) -> None:
        port, dashboard = free_port(), free_port()
        self._at = ("--address", f"http://127.0.0.1:{dashboard}")
        self._temp = self._folder / name
        ports = {"--port": port, "--dashboard-port": dashboard, "--ray-client-server-port": free_port()}
        options = [str(word) for pair in ports.items() for word in pair]
        small = ("--num-cpus", "2", "--object-store-memory", str(200 * 2**20), "--block")
        agent = ("--dashboard-agent-listen-port",)
        head = (RAY, "start", "--head", *options, *agent, str(free_port()), "--temp-dir", str(self._temp), *small)
        held.enter_context(self._process(f"{name}-head", *head))
        until(lambda: "no nodes" not in self._ray("list", "nodes", *self._at), f"the {name} head")
        node = (RAY, "start", "--address", f"127.0.0.1:{port}", *agent, str(free_port()), *small)
        held.enter_context(self._process(f"{name}-node", *node))
        until(lambda: self._ray("list", "nodes", *self._at).count("ALIVE") == 2, "the second node")
        self._done(f"{name} head and another node", "2 nodes are ALIVE")

    def _submit(self, name: str) -> None:
        command = [sys.executable, "-m", "launch.train", "--config", "configs/tdmpc2_pendulum.yaml"]
        run = ["--storage", "s3://day/runs", "--name", "pendulum"]
        often = ["--checkpoint.interval", str(self._steps // 16), "--log.interval", "100", "--eval.episodes", "5"]
        often += ["--eval.interval", str(self._steps // 8), "--runtime.acting", "server"]
        total = ["--train.total_steps", str(self._steps)]
        submit = ("job", "submit", *self._at, "--no-wait", "--submission-id", name, "--working-dir", ".", "--")
        until(lambda: self._ray(*submit, *command, *run, *often, *total, cwd=self._checkout), f"submission of {name}")

    def _goes_on(self, job: str, steps: int) -> str:
        """Return the line in which the job says where it goes on, which must be at `steps`."""
        said = rf"resumed from step-\S+: {steps:,} steps.*"
        found = until(lambda: re.search(said, self._log(job)), f"{said!r} in the log of {job}")
        return str(found[0])

    def _saved(self) -> int:
        return int(read_manifest(newest_checkpoint(self._run))["limiter"]["env_steps"])

    def _wait_for_checkpoint(self, steps: int) -> None:
        until(lambda: checkpoint_folders(self._run) and self._saved() >= steps, f"a checkpoint at step {steps:,}")

    def _status(self, job: str) -> str:
        said = subprocess.run([RAY, "job", "status", *self._at, job], capture_output=True, text=True, timeout=PATIENCE)
        return said.stdout + said.stderr  # a job that ended otherwise than well makes the command fail

    def _log(self, job: str) -> str:
        """Return the log of a job, without the lines that `ray job logs` itself writes."""
        lines = self._ray("job", "logs", *self._at, job).splitlines()
        return "\n".join(line for line in lines if not RAYS_OWN.match(line))

    def _metadata(self, job: str) -> str:
        listed = self._ray("job", "list", *self._at)
        found = re.search(r"metadata=(\{[^}]*worldloom_run[^}]*\})", listed)
        require(found is not None, f"no job has the metadata worldloom_run: {listed}")
        return f"metadata of {job}: {found and found[1]}"

    def _prometheus(self) -> None:
        if not shutil.which("prometheus"):
            print("          Prometheus: skipped, since there is no `prometheus` on PATH")
            return
        self._launch("dashboard", "--temp-dir", str(self._temp))
        scrape = self._temp / "session_latest" / "metrics" / "prometheus" / "prometheus.yml"
        port, data = free_port(), self._folder / "prometheus"
        options = [f"--config.file={scrape}", f"--storage.tsdb.path={data}", f"--web.listen-address=127.0.0.1:{port}"]
        self._open.enter_context(self._process("prometheus", "prometheus", *options))
        session = (self._temp / "session_latest").resolve().name

        def answers(query: str) -> list[Any]:
            asked = query.replace("$SessionName", session).replace("$run", "pendulum")
            address = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': asked})}"
            return list(json.loads(urllib.request.urlopen(address, timeout=10).read())["data"]["result"])

        (steps,) = until(lambda: answers("ray_worldloom_env_steps"), "the run's steps in Prometheus")
        self._done("Prometheus scrapes the job", f"step {float(steps['value'][1]):,.0f}")
        panels = [panel for panel in board()["panels"] if panel["type"] != "row" and GPU not in panel["title"]]
        queries = [target["expr"] for panel in panels for target in panel["targets"]]
        for query in queries:
            until(lambda query=query: answers(query), query)
        self._done("every panel of the board has numbers", f"{len(panels)} panels, {len(queries)} queries")

    def _report(self, page: Path, picture: str | None) -> None:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        if chromium is None:
            print("          report: not opened, since there is no `chromium` on PATH")
            return
        plain = [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={self._folder / 'chromium'}",
        ]
        shown = subprocess.run(
            [*plain, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
        ).stdout
        require("TD-MPC2" in shown or "tdmpc2" in shown, shown[:500])
        require(shown.count("<svg") >= 1, "the report shows no plot")
        if picture:
            size = ["--window-size=1000,2400", f"--screenshot={Path(picture).resolve()}"]
            subprocess.run([*plain, *size, page.as_uri()], capture_output=True, timeout=120, check=True)
        self._done("report opened in Chromium", f"{shown.count('<svg')} plots" + (f", {picture}" if picture else ""))

    def _ray(self, *words: str, cwd: Path | None = None) -> str:
        """Return what a command of Ray says; "" if it fails."""
        ran = subprocess.run([RAY, *words], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)
        return ran.stdout if ran.returncode == 0 else ""

    def _launch(self, command: str, *words: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", f"launch.{command}", *words], cwd=ROOT, capture_output=True, text=True
        )
        require(ran.returncode == 0, ran.stdout + ran.stderr)
        return ran.stdout

    @contextlib.contextmanager
    def _process(self, name: str, *command: str) -> Iterator[None]:
        """A context in which a command runs in a process group of its own, all of which is killed at the end."""
        with (self._folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                yield
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _done(self, step: str, checked: str) -> None:
        print(f"{time.monotonic() - self.begun:6.0f} s  {step}: {checked}", flush=True)


def require(holds: bool, found: str) -> None:
    if not holds:
        raise SystemExit(f"benchmarks.cluster_day: a check does not hold: {found}")


def until(attempt: Callable[[], Any], what: str) -> Any:
    """Return what the attempt returns, once that is true and nothing is raised that may pass."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError, CheckpointError, LookupError):
            if found := attempt():
                return found
        require(time.monotonic() < deadline, f"{what} did not come within {PATIENCE:.0f} s")
        time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
