"""Small TD-MPC2 models and batches that the tests share."""

import dataclasses

import torch

from worldloom.tdmpc2 import TDMPC2Config, TDMPC2WorldModel

TINY = TDMPC2Config(
    encoder_dim=16,
    mlp_dim=24,
    latent_dim=16,
    num_q=3,
    batch_size=8,
    num_samples=24,
    num_elites=6,
    num_pi_trajs=4,
    iterations=3,
)


def tiny_model(obs=3, action=2, **overrides):
    torch.manual_seed(0)
    return TDMPC2WorldModel((obs,), action, dataclasses.replace(TINY, **overrides), episode_length=200)


def shake(model):
    """Give the zero-initialised output layers values, so that rewards and values differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch_of(model, batch_size=8, length=4, terminated=False):
    torch.manual_seed(2)
    ends = torch.zeros(batch_size, length, dtype=torch.bool)
    ends[:, -1] = terminated
    return {
        "obs": torch.randn(batch_size, length, *model.obs_shape),
        "actions": torch.rand(batch_size, length, model.action_dim) * 2 - 1,
        "rewards": torch.randn(batch_size, length),
        "terminated": ends,
    }
