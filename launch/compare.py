"""Compare runs on one page: python -m launch.compare runs/A runs/B … [--out FILE], or the folder of a sweep."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from launch.failures import sentence
from launch.places import run_place, small_files
from worldloom.locations import is_remote
from worldloom.report.compare import write_comparison


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's options."""
    parser = argparse.ArgumentParser(prog="launch.compare", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder, URL or name of a run, or a sweep's folder")
    parser.add_argument("--out", metavar="FILE", help="the page; default: compare.html in the folder of the first run")
    return parser


def main(argv: list[str] | None = None) -> int:
    given = command_parser().parse_args(argv)
    try:
        with contextlib.ExitStack() as copies:
            runs = [run_place(name) for name in given.runs]
            folders = [copies.enter_context(small_files(run)) for run in runs]
            out = Path(given.out) if given.out else default_page(runs[0])
            print(write_comparison(folders, out))
    except (ValueError, OSError, KeyError) as error:
        print(f"launch.compare: {sentence(error)}", file=sys.stderr)
        return 1
    return 0


def default_page(first: Path) -> Path:
    """Return where the page lies: in the sweep's folder, or beside the first run; here, if that lies at a URL."""
    if is_remote(first):
        return Path("compare.html")
    return (first.parent if (first / "config.yaml").is_file() else first) / "compare.html"


DESCRIPTION = "Write one HTML page with the learning curves, final returns and configurations of several runs."

if __name__ == "__main__":
    sys.exit(main())
