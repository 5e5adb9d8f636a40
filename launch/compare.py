"""Compare runs on one page: python -m launch.compare runs/A runs/B … [--out FILE], or the folder of a sweep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.places import run_place
from worldloom.report.compare import write_comparison


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.compare", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run, or a folder of runs (a sweep)")
    parser.add_argument("--out", metavar="FILE", help="the page; default: compare.html in the folder of the first run")
    given = parser.parse_args(argv)
    try:
        folders = [run_place(name) for name in given.runs]
        out = Path(given.out) if given.out else default_page(folders[0])
        print(write_comparison(folders, out))
    except (ValueError, OSError, KeyError) as error:
        print(f"launch.compare: {error}", file=sys.stderr)
        return 1
    return 0


def default_page(first: Path) -> Path:
    """Return where the page lies: in the sweep's folder, or beside the first run."""
    return (first.parent if (first / "config.yaml").is_file() else first) / "compare.html"


DESCRIPTION = "Write one HTML page with the learning curves, final returns and configurations of several runs."

if __name__ == "__main__":
    sys.exit(main())
