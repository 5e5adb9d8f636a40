"""Makes the pictures of the README and of these pages: make pictures, or python docs/pictures/make.py [--only PICTURE]

It trains what `make train` trains, a short DreamerV3 on CartPole, one on Catch and DIAMOND on Rally; a run that is
complete is kept, and one that was interrupted goes on. From them it draws learning_curve.svg, imagination.gif,
catch.gif (true beside imagined: `make demo`), rally.gif (the same) and, if there is a Chromium, report.png. Further
arguments, such as --train.total_steps 500, go to the training.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT))

import imageio.v3 as imageio
import numpy as np
from PIL import Image

from launch.arguments import run_config, run_parser
from launch.imagine import FRAMES_PER_SECOND
from worldloom.report.page import read_metrics, returns_section
from worldloom.runs.build import subject_of

PICTURES = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SHORT = "--runtime inline --train.total_steps 2_500 --eval.interval 0 --checkpoint.interval 0 --train.compile false"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=CHECKOUT / "runs" / "pictures", help="folder of the runs")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    parser.add_argument("--only", choices=MAKERS, help="one of the pictures; default: all")
    options, more = parser.parse_known_args()
    for name in [options.only] if options.only else MAKERS:
        MAKERS[name](options.runs.resolve(), options.out.resolve() / name, more)


def make_learning_curve(runs: Path, out: Path, more: Sequence[str]) -> None:
    train(runs / "pendulum", "tdmpc2_pendulum.yaml", *more)
    draw_learning_curve(runs / "pendulum", out)


def make_imagination(runs: Path, out: Path, more: Sequence[str]) -> None:
    train(runs / "cartpole", "dreamerv3_cartpole.yaml", *SHORT.split(), *more)
    run("launch.imagine", "--run-dir", str(runs / "cartpole"), "--out", str(out), "--steps", "40")


def make_catch(runs: Path, out: Path, more: Sequence[str]) -> None:
    train(runs / "catch", "dreamerv3_catch.yaml", "--runtime", "inline", *more)
    film_episode(runs / "catch", out)


def make_rally(runs: Path, out: Path, more: Sequence[str]) -> None:
    train(runs / "rally", "diamond_rally.yaml", "--runtime", "inline", *more)
    film_episode(runs / "rally", out)


def film_episode(run_dir: Path, out: Path) -> None:
    """Film the start of an episode: 5 frames that the model sees, and 40 that it imagines from the true actions."""
    run("launch.imagine", "--run-dir", str(run_dir), "--out", str(out), "--steps", "45", "--observed", "5")
    shrink(out)


def shrink(film: Path, colours: int = 32) -> None:
    """Draw a film with few colours, the same in all frames: half as many bytes."""
    frames = [Image.fromarray(frame) for frame in imageio.imread(film)]
    together = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames[::4]])).quantize(colours)
    small = [frame.quantize(palette=together, dither=Image.Dither.NONE) for frame in frames]
    small[0].save(film, save_all=True, append_images=small[1:], duration=1000 // FRAMES_PER_SECOND, loop=0)


def make_report(runs: Path, out: Path, more: Sequence[str]) -> None:
    train(runs / "pendulum", "tdmpc2_pendulum.yaml", *more)
    take_screenshot(runs / "pendulum" / "report.html", out)


def train(run_dir: Path, preset: str, *overrides: str) -> None:
    run("launch.train", "--config", f"configs/{preset}", "--run-dir", str(run_dir), "--resume", "auto", *overrides)


def run(module: str, *arguments: str) -> None:
    """Run a command of the project; end with its status if it fails or is interrupted, for it has said why."""
    command = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=CHECKOUT)
    answer = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command itself, which then saves
    ended = command.wait()
    signal.signal(signal.SIGINT, answer)
    if ended:
        sys.exit(ended)


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


MAKERS = {
    "learning_curve.svg": make_learning_curve,
    "imagination.gif": make_imagination,
    "catch.gif": make_catch,
    "rally.gif": make_rally,
    "report.png": make_report,
}

if __name__ == "__main__":
    main()
