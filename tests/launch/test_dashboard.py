"""The Grafana board and the command that puts it where Ray's provisioning looks; no cluster."""

import ast
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

from distributed.metrics import LOGGED_AT, gauge_name
from launch.board import board, board_text
from launch.dashboard import main

ROOT = Path(__file__).resolve().parents[2]
PANELS = [panel for panel in board()["panels"] if panel["type"] != "row"]
SOURCES = [  # of what a run records
    "worldloom/report/metrics.py", "worldloom/report/timing.py", "worldloom/acting/server.py",
    "distributed/gauges.py", "distributed/saving.py", "distributed/actors/replay.py",
]  # fmt: skip
UNITS = {"short", "percentunit", "percent", "s", "Bps", "bytes", "mbytes"}


def test_the_file_of_the_board_is_up_to_date():
    found = (ROOT / "launch" / "cluster" / "grafana" / "worldloom.json").read_text()
    assert found == board_text(), "python -m launch.board > launch/cluster/grafana/worldloom.json"


def recorded():
    """A pattern for each metric that a source names; what an f-string puts in may be any word."""
    for source in SOURCES:
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = [node.value]
            else:
                continue
            if re.fullmatch(r"\w+/[\w\0]+", name := "".join(parts)):
                yield re.compile(gauge_name(name.replace("\0", "XXX")).replace("XXX", r"\w+"))


def test_recorded_metrics_are_found_in_the_sources():
    patterns = list(recorded())
    for name in ("rate/train_ratio", "count/rows_lost", "replay/sample_seconds_p95", "acting/batch_fill"):
        assert any(pattern.fullmatch(gauge_name(name)) for pattern in patterns)
    assert not any(pattern.fullmatch(gauge_name("rate/unknown")) for pattern in patterns)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_and_asks_for_exported_metrics(panel):
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["targets"]
    of_ray = (Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py").read_text()
    for target in panel["targets"]:
        names = re.findall(r'\bray_\w+(?=\{)|(?<=__name__=~")ray_\w+', target["expr"])
        assert names, target
        for name in names:
            if name.startswith("ray_worldloom_"):
                counts = [gauge_name(line) for line in ("env_steps", "limited_by", LOGGED_AT)]
                assert name in counts or any(pattern.match(name) or starts(name, pattern) for pattern in recorded())
            else:
                assert f'"{name.removeprefix("ray_")}": Gauge(' in of_ray


def starts(name, pattern):
    """Whether it is the start of a name in a regular expression, such as ray_worldloom_learner_."""
    return name.endswith("_") and pattern.pattern.startswith(name)


def test_no_two_panels_overlap_and_all_fit_the_grid():
    taken = {}
    for panel in board()["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        columns = range(place["x"], place["x"] + place["w"])
        for cell in itertools.product(columns, range(place["y"], place["y"] + place["h"])):
            assert taken.setdefault(cell, panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in board()["panels"]]
    assert len(ids) == len(set(ids))


def test_every_query_keeps_to_what_is_chosen_at_the_top():
    assert [choice["name"] for choice in board()["templating"]["list"]] == ["datasource", "SessionName", "run"]
    for target in (target for panel in PANELS for target in panel["targets"]):
        selectors = re.findall(r"\{[^{}]*\}", target["expr"])
        assert selectors
        for selector, name in zip(selectors, re.findall(r"(\w*)\{", target["expr"]), strict=True):
            assert 'SessionName=~"$SessionName"' in selector
            assert ('run="$run"' in selector) == (not name.startswith("ray_") or "worldloom" in name)
        assert target["datasource"]["uid"] == "${datasource}"


WORKER = 'SessionName="s", role="coordinator", index="0", run="mine"'
GPU = 'SessionName="s", GpuDeviceName="H100"'
# Series every 10 seconds, a panel, and what it shows after 50 seconds: by labels, since several may be shown.
SHOWN = [
    (
        {f'ray_node_gpus_utilization{{ip="{ip}", GpuIndex="{gpu}", {GPU}}}': f"{busy}x5" for ip, gpu, busy in
         (("a", 0, 50), ("a", 1, 60), ("b", 0, 70))},
        "GPU: busy",
        {'{ip="a", GpuIndex="0"}': 50, '{ip="a", GpuIndex="1"}': 60, '{ip="b", GpuIndex="0"}': 70},
    ),
    (
        {f'ray_node_gram_used{{ip="a", GpuIndex="0", {GPU}}}': "40000x5"},
        "GPU: memory in use",
        {'{ip="a", GpuIndex="0"}': 40000},
    ),
    (  # 2 samples of 6 in the warm-up
        {f'ray_worldloom_limited_by{{limited_by="{word}", {WORKER}}}': values for word, values in
         (("learner", "_ _ 1 1 1 1"), ("environments (warm-up)", "1 1 0 0 0 0"))},
        "What limits it",
        {'{limited_by="learner"}': 4 / 6, '{limited_by="environments (warm-up)"}': 2 / 6},
    ),
    (
        {f'ray_worldloom_limited_by{{limited_by="{word}", {WORKER}}}': values for word, values in
         (("learner", "_ _ 1 1 1 1"), ("environments (warm-up)", "1 1 0 0 0 0"))},
        "Limited by",
        {'{limited_by="learner"}': 1},
    ),
    (  # resumed while the series of its first process is still there
        {f'ray_worldloom_env_steps{{WorkerId="{worker}", {WORKER}}}': f"{steps}x5" for worker, steps in
         (("1", 500), ("2", 520))},
        "Steps",
        {"{}": 520},
    ),
    (
        {f'ray_worldloom_count_{what}{{{WORKER}}}': f"{count}x5" for what, count in
         (("actor_restarts", 1), ("env_steps_discarded", 32), ("rows_lost", 0))},
        "Faults",
        {"{}": 33},
    ),
]  # fmt: skip


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on PATH (Debian's package `prometheus` has one)")
@pytest.mark.parametrize(("series", "title", "shown"), SHOWN, ids=lambda part: part if isinstance(part, str) else "")
def test_a_panel_shows_what_prometheus_makes_of_series(series, title, shown, tmp_path):
    (panel,) = [panel for panel in PANELS if panel["title"] == title]
    query = panel["targets"][0]["expr"].replace("$SessionName", ".+").replace("$run", "mine")
    samples = [{"labels": labels, "value": number} for labels, number in shown.items()]
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "50s", "exp_samples": samples}],
    }
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({"rule_files": [], "evaluation_interval": "10s", "tests": [test]})
    )
    ran = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture
def session(tmp_path, monkeypatch):
    """The temporary directory of a cluster with one session."""
    monkeypatch.delenv("RAY_METRICS_OUTPUT_ROOT", raising=False)
    monkeypatch.delenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", raising=False)
    (tmp_path / "session_1").mkdir()
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_1")
    return tmp_path


def test_both_files_are_written_where_rays_own_lie(session, capsys):
    (session / "session_1" / "prom_metrics_service_discovery.json").write_text("[]")
    assert main(["--temp-dir", str(session)]) == 0
    metrics = session / "session_1" / "metrics"
    assert json.loads((metrics / "grafana" / "dashboards" / "worldloom.json").read_text())["title"] == "WorldLoom"
    (job,) = yaml.safe_load((metrics / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"{session}/session_latest/prom_metrics_service_discovery.json"]
    said = capsys.readouterr().out
    assert f"--config.file={session}/session_latest/metrics/prometheus/prometheus.yml" in said
    assert "missing" not in said


def test_rays_variables_and_arguments_name_other_places(session, monkeypatch, capsys):
    monkeypatch.setenv("RAY_METRICS_OUTPUT_ROOT", str(session / "root"))
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(session / "boards"))
    assert main(["--temp-dir", str(session)]) == 0
    assert (session / "boards" / "worldloom.json").is_file()
    assert (session / "root" / "prometheus" / "prometheus.yml").is_file()
    assert "is missing. Start Ray with its dashboard." in capsys.readouterr().out
    given = ["--board", str(session / "mine"), "--scrape", str(session / "mine.yml")]
    assert main(["--temp-dir", str(session), *given]) == 0
    assert (session / "mine" / "worldloom.json").is_file()
    assert (session / "mine.yml").is_file()


def test_without_a_cluster_it_says_what_to_do(tmp_path, capsys):
    assert main(["--temp-dir", str(tmp_path)]) == 1
    assert "holds no session of Ray" in (said := capsys.readouterr().err)
    assert "Run `ray start --head` first" in said
