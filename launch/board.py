"""The Grafana board of a run, made from launch/panels.py.

python -m launch.board > launch/cluster/grafana/worldloom.json"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from distributed.metrics import gauge_name
from launch.panels import ROWS, SESSION, Panel, Stat

COLUMNS = 24  # of Grafana's grid
STAT_SIZE, PANEL_SIZE = (3, 4), (8, 8)  # width and height
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def board() -> dict[str, Any]:
    """Return the board as Grafana's dashboard JSON."""
    return {
        "uid": "worldloom",
        "title": "WorldLoom",
        "tags": ["worldloom"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": list(_laid_out()),
    }


def _variables() -> Iterator[dict[str, Any]]:
    """Yield the choices at the top of the board: the Prometheus, the session of Ray, and the run."""
    yield {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}
    steps = gauge_name("env_steps")
    session = _choice("SessionName", "Ray session", f"label_values({steps}, SessionName)")
    yield {**session, "includeAll": True, "allValue": ".+"}
    yield {**_choice("run", "Run", f"label_values({steps}{{{SESSION}}}, run)"), "includeAll": False}


def _choice(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # whenever the time range changes
        "sort": 2,  # the newest session first
        "multi": False,
    }


def _laid_out() -> Iterator[dict[str, Any]]:
    """The title and the panels of each row, from left to right and from top to bottom."""
    number, y = 0, 0
    for title, panels in ROWS.items():
        place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        yield {"id": (number := number + 1), "type": "row", "title": title, "gridPos": place, "panels": []}
        x, y = 0, y + 1
        width, height = STAT_SIZE if isinstance(panels[0], Stat) else PANEL_SIZE
        for panel in panels:
            if x + width > COLUMNS:
                x, y = 0, y + height
            place = {"x": x, "y": y, "w": width, "h": height}
            shown = _stat(panel) if isinstance(panel, Stat) else _curves(panel)
            yield {"id": (number := number + 1), "gridPos": place, **_heading(panel), **shown}
            x += width
        y += height


def _heading(panel: Stat | Panel) -> dict[str, Any]:
    return {"title": panel.title, "description": panel.about, "datasource": SOURCE}


def _stat(panel: Stat) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red_from is not None:
        steps.append({"color": "red", "value": panel.red_from})
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "name" if panel.word else "value",
        "colorMode": "value",
        "graphMode": "none",
    }
    defaults = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    target = _target(0, panel.word, panel.query)
    if panel.word:  # of a range it would show every word that held in it
        target |= {"instant": True, "range": False}
    return {
        "type": "stat",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": [target],
    }


def _curves(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "custom": {"lineWidth": 1, "fillOpacity": 5, "showPoints": "auto"}}
    if panel.top is not None:
        defaults |= {"min": 0, "max": panel.top}
    if panel.stacked:
        defaults["custom"] |= {"fillOpacity": 60, "stacking": {"mode": "normal", "group": "A"}}
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [_target(at, legend, query) for at, (legend, query) in enumerate(panel.lines.items())],
    }


def _target(at: int, legend: str, query: str) -> dict[str, Any]:
    reference = chr(ord("A") + at)
    return {"refId": reference, "datasource": SOURCE, "expr": query, "legendFormat": legend, "range": True}


def board_text() -> str:
    """Return the text of worldloom.json."""
    return json.dumps(board(), indent=1) + "\n"


if __name__ == "__main__":
    print(board_text(), end="")
