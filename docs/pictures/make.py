"""Makes the pictures of the README and of these pages: make pictures, or python docs/pictures/make.py

It trains what `make train` trains and a short DreamerV3 on CartPole, unless these runs are there already. From them it
draws learning_curve.svg, imagination.gif and, if there is a Chromium, report.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

from launch.arguments import run_config, run_parser
from worldloom.report.page import read_metrics, returns_section
from worldloom.runs.build import subject_of

PICTURES = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHORT = "--runtime inline --train.total_steps 2_500 --eval.interval 0 --checkpoint.interval 0 --train.compile false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=CHECKOUT / "runs" / "pictures", help="folder of the two runs")
    runs = parser.parse_args().runs.resolve()
    pendulum, cartpole = runs / "pendulum", runs / "cartpole"
    train(pendulum, "tdmpc2_pendulum.yaml")
    train(cartpole, "dreamerv3_cartpole.yaml", *SHORT.split())
    draw_learning_curve(pendulum, PICTURES / "learning_curve.svg")
    film = PICTURES / "imagination.gif"
    run("launch.imagine", "--run-dir", str(cartpole), "--out", str(film), "--steps", "40")
    take_screenshot(pendulum / "report.html", PICTURES / "report.png")


def train(run_dir: Path, preset: str, *overrides: str) -> None:
    if not (run_dir / "report.html").is_file():
        run("launch.train", "--config", f"configs/{preset}", "--run-dir", str(run_dir), *overrides)


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=CHECKOUT, check=True)


def draw_learning_curve(run_dir: Path, out: Path) -> None:
    parser = run_parser("make.py", "")
    config = run_config(parser, parser.parse_args(["--config", str(run_dir / "config.yaml")]))
    drawn = returns_section(read_metrics(run_dir), subject_of(config)).picture
    out.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n")
    print(out)


def take_screenshot(page: Path, out: Path, width: int = 1100, height: int = 1000) -> None:
    """Show the top of a page as an image; without a browser, the picture stays as it is."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"{out} stays as it is: there is no {' or '.join(BROWSERS)} here")
        return
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={out}"]
        quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        subprocess.run([browser, *quiet, *options, page.as_uri()], check=True, capture_output=True, timeout=120)
    print(out)


if __name__ == "__main__":
    main()
