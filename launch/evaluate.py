"""Evaluate a trained run: python -m launch.evaluate --run-dir DIR --episodes 10"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from worldloom import load_agent
from worldloom.envs import EnvironmentFailed, make_env
from worldloom.suites import AtariConfig, DMCConfig
from worldloom.training.assembly import choose_device
from worldloom.training.checkpoint import CheckpointError
from worldloom.training.evaluation import evaluate


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="launch.evaluate", description="Play whole episodes without exploration noise.")
    parser.add_argument("--run-dir", dest="run_dir", type=str, required=True, help="directory of a run")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the environments and of acting")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all")
    overrides = "fields of the agent that shape no parameter, each as --agent.NAME VALUE (--agent.num_samples 256)"
    parser.add_argument("--agent", type=dict[str, Any], default={}, help=overrides)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        agent = load_agent(options.run_dir, choose_device(options.device), options.seed, **options.agent)
        env = yaml.safe_load((Path(options.run_dir) / "config.yaml").read_text())["env"]
        suites: dict[str, Any] = {
            "atari": AtariConfig(**env["atari"]),
            "dmc": DMCConfig(**env["dmc"]),
            "frame_stack": env["frame_stack"],
        }
        make = lambda count: make_env(env["id"], count, options.seed, env["action_repeat"], **suites)  # noqa: E731
        result = evaluate(agent, make, options.episodes, options.seed)
    except (ValueError, TypeError, OSError, CheckpointError, EnvironmentFailed) as error:
        print(f"launch.evaluate: {error}", file=sys.stderr)
        return 1
    for number, (total, length) in enumerate(zip(result.returns, result.lengths, strict=True), 1):
        print(f"episode {number}: return {total:.1f} in {length} steps")
    print(f"return {result.mean:.1f} ± {result.std:.1f} over {len(result.returns)} episodes of {env['id']}")
    print(
        json.dumps(
            {"eval_return_mean": result.mean, "eval_return_std": result.std, "eval_episodes": len(result.returns)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
