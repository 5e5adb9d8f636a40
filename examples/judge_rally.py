"""Judge by a number what a world model that was trained on Rally imagines, while its own agent plays.

python -m examples.judge_rally runs/NAME
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from examples.rally import read_frames
from launch.places import env_config, run_envs, run_place
from worldloom import load_agent
from worldloom.acting.evaluation import record_episode
from worldloom.envs.vector import VectorEnv
from worldloom.imagination import open_loop
from worldloom.types import Agent

SEEN, IMAGINED = 4, 15  # rows that the model sees, steps that it then imagines under the true actions
LONGEST = 200  # rows that are played of an episode


def right_frames(agent: Agent, make_env: Callable[[int], VectorEnv], starts: int = 64) -> npt.NDArray[np.bool_]:
    """Return which imagined frames have the ball and the paddle within a pixel of the truth [starts, IMAGINED].

    make_env returns one environment for a seed. Each start lies in an episode of its own, with all its rows.
    """
    rows, seed = SEEN + IMAGINED, 1000
    right: list[npt.NDArray[np.bool_]] = []
    while len(right) < starts:
        obs, actions, rewards = record_episode(agent, make_env(seed), LONGEST, seed)
        if len(obs) >= rows:
            part = slice(start := seed % (len(obs) - rows + 1), start + rows)
            loop = open_loop(agent.world_model, obs[part], actions[part], rewards[part], SEEN, seed)
            true, imagined = (read_frames(frames["obs"][SEEN:]) for frames in (loop.truth, loop.predicted))
            right.append((np.abs(true - imagined) <= 1).all(-1))
        seed += 1
    return np.stack(right)


def main(run: str) -> None:
    place = run_place(run)
    config, agent = env_config(place), load_agent(place)
    right = right_frames(agent, lambda seed: run_envs(config, 1, seed))
    print(f"share of {len(right)} imagined frames that are right, by step: {right.mean(0).round(2).tolist()}")
    print(f"mean: {right.mean():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
