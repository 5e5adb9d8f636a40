"""Judge by a number what a world model that was trained on Rally imagines, while its own agent plays.

python -m examples.judge_rally runs/NAME
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from examples.rally import read_frames
from launch.failures import sentence
from launch.places import FAILURES, env_config, run_envs, run_place
from worldloom import load_agent
from worldloom.acting.evaluation import record_episode
from worldloom.envs.vector import VectorEnv
from worldloom.imagination import open_loop
from worldloom.types import Agent

SEEN, IMAGINED = 4, 15  # rows that the model sees, steps that it then imagines under the true actions
LONGEST = 200  # rows that are played of an episode
PATIENCE = 20  # episodes that are played for each start, at most


def right_frames(agent: Agent, make_env: Callable[[int], VectorEnv], starts: int = 64) -> npt.NDArray[np.bool_]:
    """Return which imagined frames have the ball and the paddle within a pixel of the truth [starts, IMAGINED].

    make_env returns one environment for a seed. Each start lies in an episode of its own, with all its rows. Raises
    ValueError for a model without a decoder, and if hardly any episode is long enough.
    """
    rows, seed = SEEN + IMAGINED, 1000
    right: list[npt.NDArray[np.bool_]] = []
    while len(right) < starts:
        obs, actions, rewards = record_episode(agent, make_env(seed), LONGEST, seed)
        if len(obs) >= rows:
            part = slice(start := seed % (len(obs) - rows + 1), start + rows)
            loop = open_loop(agent.world_model, obs[part], actions[part], rewards[part], SEEN, seed)
            if not loop.predicted:
                raise ValueError("this model has no decoder, so it draws no frames. Judge one with a decoder.")
            true, imagined = (read_frames(frames["obs"][SEEN:]) for frames in (loop.truth, loop.predicted))
            right.append((np.abs(true - imagined) <= 1).all(-1))
        seed += 1
        if seed - 1000 >= PATIENCE * starts and len(right) < starts:
            raise ValueError(f"only {len(right)} of {seed - 1000} episodes have {rows} steps. Train the agent longer.")
    return np.stack(right)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="examples.judge_rally", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder, URL or name of a run on examples.rally:Rally")
    try:
        place = run_place(parser.parse_args(argv).run)
        config, agent = env_config(place), load_agent(place)
        right = right_frames(agent, lambda seed: run_envs(config, 1, seed))
    except FAILURES as error:
        print(f"examples.judge_rally: {sentence(error)}", file=sys.stderr)
        return 1
    print(f"share of {len(right)} imagined frames that are right, by step: {right.mean(0).round(2).tolist()}")
    print(f"mean: {right.mean():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
