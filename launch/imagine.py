"""The command that shows what a trained world model imagines: python -m launch.imagine --run-dir DIR --out FILE"""

from __future__ import annotations

import sys
from pathlib import Path

import imageio.v3 as imageio
import torch
from jsonargparse import ArgumentParser

from launch.evaluate import save_frames
from launch.failures import sentence
from launch.places import FAILURES, env_config, run_envs, run_place
from worldloom import load_agent
from worldloom.acting.evaluation import record_episode
from worldloom.imagination import OBSERVED, OpenLoop, open_loop
from worldloom.report.pictures import NO_DECODER, film, image_keys, plot, reward_film
from worldloom.runs.build import choose_device

FRAMES_PER_SECOND = 10
DESCRIPTION = """Play one episode, show the world model its first steps, and let it imagine the rest from the true
actions. Images become a film (truth, prediction, error; .gif or .mp4). A model without a decoder is filmed with its
rewards. Otherwise, the result is a plot of true and predicted rewards and observations (.png or .gif)."""


def command_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = ArgumentParser(prog="launch.imagine", description=DESCRIPTION)
    parser.add_argument("--run-dir", dest="run_dir", type=str, required=True, help="folder, URL or name of a run")
    parser.add_argument("--out", type=str, default="imagined.gif", help="file to write: .gif, .mp4 or .png")
    parser.add_argument("--steps", type=int, default=50, help="rows in total; fewer if the episode ends before")
    parser.add_argument("--observed", type=int, default=OBSERVED, help="rows at the start that the model sees")
    parser.add_argument("--seed", type=int, default=0, help="seed of the environment, acting and imagination")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 uses all")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = command_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run_dir = run_place(options.run_dir)
        agent = load_agent(run_dir, choose_device(options.device), options.seed)
        env = run_envs(env_config(run_dir), 1, options.seed)
        obs, actions, rewards = record_episode(agent, env, options.steps, options.seed)
        loop = open_loop(agent.world_model, obs, actions, rewards, options.observed, options.seed)
        written = write(Path(options.out), loop, env.name)
    except FAILURES as error:
        print(f"launch.imagine: {sentence(error)}", file=sys.stderr)
        return 1
    print(f"{loop.observed} steps observed, {loop.steps - loop.observed} imagined: {written}")
    return 0


def write(out: Path, loop: OpenLoop, title: str) -> str:
    """Write a film if there are images, or no decoder, and `out` is not a .png; else a plot. Return the names of the
    files, and what a film without a decoder lacks."""
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    keys = image_keys(loop)
    if out.suffix not in (".gif", ".mp4", ".png"):
        raise ValueError(f"--out is {str(out)!r}, expected a file that ends in .gif, .mp4 or .png.")
    if not loop.predicted and out.suffix != ".png":
        save_frames(str(out), reward_film(loop, title), FRAMES_PER_SECOND)
        return f"{out}. {NO_DECODER}"
    if keys and out.suffix != ".png":
        names = [out if key == keys[0] else out.with_stem(f"{out.stem}-{key}") for key in keys]
        for key, name in zip(keys, names, strict=True):
            save_frames(str(name), film(loop, key), FRAMES_PER_SECOND)
        return ", ".join(map(str, names))
    if out.suffix == ".mp4":
        raise ValueError(f"--out is {str(out)!r}, but there are no images to film. Choose a .png or .gif file.")
    imageio.imwrite(out, plot(loop, title))
    return str(out)


if __name__ == "__main__":
    sys.exit(main())
