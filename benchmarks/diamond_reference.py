"""Seconds per update and per action of DIAMOND's authors' code, in a Python of its own.

python benchmarks/diamond_reference.py CHECKOUT OPTIONS: CHECKOUT holds eloialonso/diamond, OPTIONS are JSON. That
Python needs torch, torcheval, gymnasium, omegaconf, tqdm, wandb, OpenCV and h5py. Sizes are those of the option
"config" (our DiamondConfig). An update is one step of each of their three trainers: denoiser, reward and end model,
and policy in imagined frames; an action is one of the policy in one environment, from a frame in numpy to the choice
in numpy. Uncompiled, float32.

Prints seconds as JSON: {"update": [...], "act_1": [...]}. Imports nothing of WorldLoom.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tdmpc2_reference import timed

SHAPES = {"rally": (3, 16, 3), "image": (3, 64, 6)}  # channels, side, choices


class Loader:
    """Gives the same random windows for ever; an episode ends in none of them."""

    def __init__(self, options: dict[str, Any], length: int) -> None:
        from data import Batch

        channels, side, choices = SHAPES[options["obs"]]
        size = (options["batch"], length)
        flags = torch.zeros(size, dtype=torch.long)
        self.batch_sampler = SimpleNamespace(batch_size=options["batch"])
        self.batch = Batch(
            obs=torch.rand(*size, channels, side, side) * 2 - 1,
            act=torch.randint(choices, size),
            rew=torch.randint(-1, 2, size).float(),
            end=flags,
            trunc=flags,
            mask_padding=torch.ones(size, dtype=torch.bool),
            info=[{}] * options["batch"],
            segment_ids=[],
        ).to(options["device"])

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch)


def make_agent(c: dict[str, Any], obs: str) -> Any:
    from agent import Agent, AgentConfig
    from models.actor_critic import ActorCriticConfig
    from models.diffusion import DenoiserConfig
    from models.diffusion.inner_model import InnerModelConfig
    from models.rew_end_model import RewEndModelConfig

    channels, side, choices = SHAPES[obs]

    def levels(prefix: str) -> tuple[list[int], list[int], list[int]]:
        count = c[prefix + "levels"]
        return [c[prefix + "depth"]] * count, [c[prefix + "channels"]] * count, [0] * count

    wide, count = c["policy_channels"], c["policy_levels"]
    widths = [wide] * (count // 2) + [2 * wide] * (count - count // 2)
    inner = InnerModelConfig(channels, c["context"], c["cond"], *levels(""))
    return Agent(
        AgentConfig(
            DenoiserConfig(inner, c["sigma_data"], c["sigma_offset"]),
            RewEndModelConfig(c["reward_lstm"], channels, side, c["reward_cond"], *levels("reward_")),
            ActorCriticConfig(c["policy_lstm"], channels, side, widths, [1] * count),
            choices,
        )
    )


def make_environment(agent: Any, loader: Loader, c: dict[str, Any]) -> Any:
    from envs import WorldModelEnv
    from envs.world_model_env import WorldModelEnvConfig
    from models.diffusion import DiffusionSamplerConfig

    sampler = DiffusionSamplerConfig(c["sampler_steps"], c["sampler_low"], c["sampler_high"], c["sampler_rho"])
    # theirs loads 256 batches at once, and uses one of them in each update
    return WorldModelEnv(agent.denoiser, agent.rew_end_model, loader, WorldModelEnvConfig(c["horizon"], 1, sampler))


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    c, device = options["config"], options["device"]
    torch.set_num_threads(options["threads"])
    sys.path.insert(0, str(checkout / "src"))
    from models.actor_critic import ActorCriticLossConfig
    from models.diffusion import SigmaDistributionConfig
    from utils import configure_opt

    agent = make_agent(c, options["obs"]).to(device)
    context = Loader(options, c["context"])
    losses = ActorCriticLossConfig(c["horizon"], c["gamma"], c["lam"], c["value_scale"], c["entropy_scale"])
    noise = SigmaDistributionConfig(c["noise_mean"], c["noise_std"], c["noise_low"], c["noise_high"])
    agent.setup_training(noise, losses, make_environment(agent, context, c))
    windows = Loader(options, c["context"] + 1 + c["autoregressive"]).batch
    longer = Loader(options, c["context"] + c["horizon"]).batch
    parts = [
        (agent.denoiser, (windows,), c["clip_denoiser"], c["decay"]),
        (agent.rew_end_model, (longer,), c["clip_reward"], c["decay"]),
        (agent.actor_critic, (), c["clip_policy"], 0.0),
    ]
    optimizers = [configure_opt(part, c["lr"], decay, 1e-8) for part, _, _, decay in parts]

    def update() -> None:
        for (part, given, clip, _), optimizer in zip(parts, optimizers, strict=True):
            optimizer.zero_grad()
            loss, _ = part(*given)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), clip)
            optimizer.step()

    channels, side, _ = SHAPES[options["obs"]]
    frame = np.random.default_rng(0).integers(256, size=(1, side, side, channels), dtype=np.uint8)
    state = tuple(torch.zeros(1, c["policy_lstm"], device=device) for _ in range(2))

    @torch.no_grad()
    def act() -> None:
        seen = torch.tensor(frame, device=device).div(255).mul(2).sub(1).permute(0, 3, 1, 2).contiguous()
        logits, _, _ = agent.actor_critic.predict_act_value(seen, state)
        torch.distributions.Categorical(logits=logits).sample().cpu().numpy()

    found = {"update": timed("update", update, options), "act_1": timed("act_1", act, options)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
