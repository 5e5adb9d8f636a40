"""Small DIAMOND models and batches that the tests share, and the authors' arrays."""

from pathlib import Path

import numpy as np
import torch

from worldloom.diamond import SIZES, DiamondAgent, DiamondConfig, DiamondWorldModel

DATA = Path(__file__).parent / "data"
SHAPE, ACTIONS = (3, 16, 16), 3


def tiny_agent(seed=0, **overrides):
    torch.manual_seed(seed)
    config = DiamondConfig(**{**SIZES["tiny"], "warmup": 2, "batch_size": 4, **overrides})
    return DiamondAgent(DiamondWorldModel(SHAPE, ACTIONS, config, 100), seed, (ACTIONS,))


def shake(agent, size=0.05):
    """Give the layers that start at zero values, so that every part of a network counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in [*agent.world_model.parameters(), *agent.behaviour.parameters()]:
            parameter.add_(size * torch.randn_like(parameter))
    return agent


def batch_of(agent, seed=2, rows=None):
    """Windows, one of which crosses from an episode that ended into the next."""
    torch.manual_seed(seed)
    lead = (agent.batch_size, rows or agent.windows.length)
    first, ended = torch.zeros(lead, dtype=torch.bool), torch.zeros(lead, dtype=torch.bool)
    ended[1, 3], first[1, 4] = True, True
    return {
        "obs": torch.randint(256, (*lead, *agent.world_model.obs_shape), dtype=torch.uint8),
        "actions": torch.eye(ACTIONS)[torch.randint(ACTIONS, lead)] * ~first.unsqueeze(-1),
        "rewards": torch.randint(-2, 3, lead).float() * ~first,
        "is_first": first,
        "terminated": ended,
        "truncated": torch.zeros(lead, dtype=torch.bool),
    }


def arrays(name):
    """The authors' arrays, which their code (github.com/eloialonso/diamond of 2024-12-06) computed from random
    parameters, on a CPU: `params/`, a part of each gradient under `grads/` (see `thin`), inputs and outputs."""
    with np.load(DATA / f"diamond_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def thin(values, most=100):
    """Return at most so many numbers of a gradient or parameter, as the arrays keep them."""
    flat = values.detach().flatten()
    return flat[:: -(-len(flat) // most)]


def off(found, expected):
    """Return the greatest difference, as a share of the expected array's greatest number."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()
