"""Time to import worldloom beside importing torch alone: python -m benchmarks.import_time

Fresh processes in pairs, one after the other, so that both see the same machine; medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {"torch": [], "worldloom": []}
    for turn in range(repeats + 1):
        for module, measured in seconds.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
            if turn:  # the first of each reads the files from disk
                measured.append(time.perf_counter() - begun)
    ratios = [ours / theirs for ours, theirs in zip(seconds["worldloom"], seconds["torch"], strict=True)]
    print(f"| import | median s of {repeats} | best |\n|---|---|---|")
    for module, measured in seconds.items():
        print(f"| {module} | {statistics.median(measured):.3f} | {min(measured):.3f} |")
    print(f"\nworldloom against torch: {statistics.median(ratios):.3f}x (median of pairs)")


if __name__ == "__main__":
    main()
