"""The evaluation command: python -m launch.evaluate --run-dir DIR --episodes 10 --video out.mp4"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from launch.failures import sentence
from launch.places import FAILURES, env_config, run_envs, run_place
from worldloom import load_agent
from worldloom.acting.evaluation import ENVS_AT_ONCE, Evaluation, start_evaluation
from worldloom.runs.build import choose_device
from worldloom.runs.config import EnvConfig
from worldloom.types import Agent, Array


def command_parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    parser = ArgumentParser(prog="launch.evaluate", description="Play whole episodes without exploration noise.")
    parser.add_argument("--run-dir", dest="run_dir", type=str, required=True, help="folder, URL or name of a run")
    parser.add_argument("--episodes", type=int, default=10)
    video = f"film the episodes of the first of up to {ENVS_AT_ONCE} environments: a .mp4 or .gif file"
    parser.add_argument("--video", type=str, default=None, help=video)
    parser.add_argument("--seed", type=int, default=0, help="seed of the environments and of acting")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 uses all")
    overrides = "agent fields that change no parameter shape, each as --agent.NAME VALUE (--agent.num_samples 256)"
    parser.add_argument("--agent", type=dict[str, Any], default={}, help=overrides)
    return parser


def main(argv: list[str] | None = None) -> int:
    options = command_parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run_dir = run_place(options.run_dir)
        agent = load_agent(run_dir, choose_device(options.device), options.seed, **options.agent)
        env = env_config(run_dir)
        result = play(agent, env, options.episodes, options.seed, options.video)
    except FAILURES as error:
        print(f"launch.evaluate: {sentence(error)}", file=sys.stderr)
        return 1
    for number, (total, length) in enumerate(zip(result.returns, result.lengths, strict=True), 1):
        print(f"episode {number}: return {total:.1f} in {length} steps")
    print(f"return {result.mean:.1f} ± {result.std:.1f} over {len(result.returns)} episodes of {env.id}")
    if options.video:
        print(f"video: {options.video}")
    print(
        json.dumps(
            {"eval_return_mean": result.mean, "eval_return_std": result.std, "eval_episodes": len(result.returns)}
        )
    )
    return 0


def play(agent: Agent, env: EnvConfig, episodes: int, seed: int, video: str | None) -> Evaluation:
    """Evaluate the agent; if `video` names a file, film the first environment."""
    evaluator = start_evaluation(agent, lambda count: run_envs(env, count, seed, bool(video)), episodes, seed)
    with film_to(video, evaluator.frames_per_second) if video else nullcontext() as film:
        return evaluator.finish(on_frame=film.append_data if film else None)


@contextmanager
def film_to(path: str, fps: float) -> Iterator[Any]:
    """Open a writer of frames [H, W, 3]. Raises ValueError unless `path` ends in .mp4 or .gif."""
    import imageio.v2 as imageio

    kind = Path(path).suffix
    if kind not in (".mp4", ".gif"):
        raise ValueError(f"--video is {path!r}, expected a file that ends in .mp4 or .gif.")
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"fps": fps, "macro_block_size": 2} if kind == ".mp4" else {"duration": 1000 / fps}
    with imageio.get_writer(path, **options) as writer:
        yield writer


def save_frames(path: str, frames: Array, fps: float) -> None:
    """Write frames [T, H, W, 3] as a film."""
    with film_to(path, fps) as film:
        for frame in frames:
            film.append_data(frame)


if __name__ == "__main__":
    sys.exit(main())
