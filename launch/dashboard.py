"""The command that gives Grafana our board and Prometheus the cluster's nodes: python -m launch.dashboard"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from launch.board import board_text
from launch.failures import sentence
from worldloom.files import write_text

DESCRIPTION = """Write WorldLoom's Grafana board and Prometheus' scrape file to where Ray's own provisioning of Grafana
and Prometheus looks. Run it on the head node after each `ray start --head`, which begins new folders. The board
answers: is it learning, how fast, what limits it, is anything being lost. To import it by hand, take
launch/cluster/grafana/worldloom.json."""
NODES = "prom_metrics_service_discovery.json"  # Ray's dashboard keeps the addresses of all nodes there
SCRAPE = """# What Prometheus reads of the Ray cluster; written by python -m launch.dashboard
global: {{scrape_interval: 5s}}
scrape_configs:
  - job_name: ray
    file_sd_configs:
      - files: ['{nodes}']
        refresh_interval: 10s
"""


def command_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = ArgumentParser(prog="launch.dashboard", description=DESCRIPTION)
    parser.add_argument("--temp-dir", dest="temp_dir", type=str, default="/tmp/ray", help="as given to `ray start`")
    board_help = "folder for the board; default: $RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR, else Ray's session"
    parser.add_argument("--board", type=str | None, default=None, help=board_help)
    scrape_help = (
        "scrape file to write; default: prometheus/prometheus.yml in $RAY_METRICS_OUTPUT_ROOT or Ray's session"
    )
    parser.add_argument("--scrape", type=str | None, default=None, help=scrape_help)
    return parser


def main(argv: list[str] | None = None) -> int:
    options = command_parser().parse_args(argv)
    try:
        session = session_of(Path(options.temp_dir))
        board, scrape = write(session, options.board, options.scrape)
    except OSError as error:
        print(f"launch.dashboard: {sentence(error)}", file=sys.stderr)
        return 1
    print(f"board        {board}")
    print(f"scrape file  {scrape}")
    print(f"Start Prometheus with: prometheus --config.file={scrape}")
    if not (session / NODES).exists():
        print(f"Prometheus finds no nodes yet: {session / NODES} is missing. Start Ray with its dashboard.")
    return 0


def session_of(temp_dir: Path) -> Path:
    """Return the folder of the newest session of Ray, by a name that a later session takes over."""
    session = temp_dir.absolute() / "session_latest"
    if not session.is_dir():
        raise FileNotFoundError(
            f"{temp_dir} holds no session of Ray, expected the folder of a running cluster. Run `ray start --head` "
            "first, or give its --temp-dir."
        )
    return session


def write(session: Path, board: str = "", scrape: str = "") -> tuple[Path, Path]:
    """Write both files, where Ray's own lie unless told otherwise; return their paths."""
    root = Path(os.environ.get("RAY_METRICS_OUTPUT_ROOT") or session / "metrics")
    boards = board or os.environ.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR") or root / "grafana" / "dashboards"
    board_file, scrape_file = Path(boards) / "worldloom.json", Path(scrape or root / "prometheus" / "prometheus.yml")
    for file, text in ((board_file, board_text()), (scrape_file, SCRAPE.format(nodes=session / NODES))):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return board_file, scrape_file


if __name__ == "__main__":
    sys.exit(main())
