"""DIAMOND's numbers: the published settings, and a small preset for quick runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from worldloom.ranges import COUNT, FINITE, NATURAL, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range, check_ranges, require

SIZES: dict[str, dict[str, Any]] = {
    "atari": {},
    "tiny": {
        "cond": 32, "channels": 16, "levels": 2, "depth": 1,
        "reward_cond": 32, "reward_channels": 16, "reward_levels": 2, "reward_depth": 1, "reward_lstm": 64,
        "policy_channels": 8, "policy_levels": 2, "policy_lstm": 64,
        "horizon": 5, "batch_size": 16, "lr": 1e-3, "train_ratio": 72.0,
    },
}  # fmt: skip

RANGES: dict[str, Range] = {
    "context": Range(2),
    **dict.fromkeys(("cond", "channels", "levels", "depth", "sampler_steps", "horizon", "batch_size"), COUNT),
    **dict.fromkeys(("reward_cond", "reward_channels", "reward_levels", "reward_depth", "reward_lstm"), COUNT),
    **dict.fromkeys(("policy_channels", "policy_levels", "policy_lstm"), COUNT),
    **dict.fromkeys(("sigma_data", "noise_low", "noise_high", "sampler_low", "sampler_high", "sampler_rho"), POSITIVE),
    **dict.fromkeys(("clip_denoiser", "clip_reward", "clip_policy", "lr", "train_ratio"), POSITIVE),
    **dict.fromkeys(("sigma_offset", "noise_std", "sampler_churn", "entropy_scale", "value_scale"), NOT_NEGATIVE),
    **dict.fromkeys(("decay", "autoregressive"), NOT_NEGATIVE),
    **dict.fromkeys(("gamma", "lam", "epsilon"), PROBABILITY),
    "noise_mean": FINITE,
    "warmup": NATURAL,
}


@dataclass(frozen=True, kw_only=True)
class DiamondConfig:
    """The settings of DIAMOND. Defaults are the published ones for Atari (Alonso et al. 2024, arXiv:2405.12399)."""

    # Denoiser
    context: int = 4  # n, frames and actions that the next frame depends on
    cond: int = 256  # width of the conditioning on noise level and actions, a multiple of the context
    channels: int = 64  # of every level of the U-Net
    levels: int = 4  # of the U-Net; each halves the sides
    depth: int = 2  # residual blocks of a level
    sigma_data: float = 0.5  # standard deviation of the frames' pixels, as the preconditioning takes it
    sigma_offset: float = 0.3  # standard deviation of the noise that all pixels of a channel share
    noise_mean: float = -0.4  # mean of ln(sigma) in training
    noise_std: float = 1.2  # standard deviation of ln(sigma) in training
    noise_low: float = 2e-3  # least sigma in training
    noise_high: float = 20.0  # greatest sigma in training
    autoregressive: int = 1  # further frames of a window that are denoised after its first, from denoised context
    # Sampler
    sampler_steps: int = 3  # N, noise levels of one frame
    sampler_low: float = 2e-3  # last noise level before 0
    sampler_high: float = 5.0  # first noise level
    sampler_rho: float = 7.0  # curvature of the schedule
    sampler_order: Literal[1, 2] = 1  # 1 Euler, 2 Heun
    sampler_churn: float = 0.0  # noise that is added anew on the way
    # Reward and end
    reward_cond: int = 128  # width of the action's embedding
    reward_channels: int = 32  # of every level of the encoder
    reward_levels: int = 4  # of the encoder
    reward_depth: int = 2  # residual blocks of a level
    reward_lstm: int = 512  # D, width of the LSTM
    # Policy and critic
    policy_channels: int = 32  # of the encoder's first half of levels; the second half has twice as many
    policy_levels: int = 4  # of the encoder; each halves the sides
    policy_lstm: int = 512  # width of the LSTM
    horizon: int = 15  # H, imagined steps
    gamma: float = 0.985  # discount
    lam: float = 0.95  # lambda of the returns
    entropy_scale: float = 1e-3  # weight of the entropy bonus in the policy loss
    value_scale: float = 1.0  # weight of the critic's loss
    epsilon: float = 0.01  # chance of a uniformly random action while exploring
    # Optimiser (AdamW, one step for the three parts together)
    batch_size: int = 32  # B, windows per update
    lr: float = 1e-4  # learning rate of AdamW
    warmup: int = 100  # updates in which the learning rate grows from 0
    decay: float = 1e-2  # weight decay of the denoiser and of the reward and end model; the policy has none
    clip_denoiser: float = 1.0  # limit of the gradient's norm
    clip_reward: float = 100.0  # limit of the gradient's norm
    clip_policy: float = 100.0  # limit of the gradient's norm
    train_ratio: float = 2432.0  # replayed steps per environment step

    # What trained weights fit: the shapes of parameters, and what the networks compute with them
    network_fields = (
        "context", "cond", "channels", "levels", "depth", "sigma_data", "sigma_offset", "reward_cond",
        "reward_channels", "reward_levels", "reward_depth", "reward_lstm", "policy_channels", "policy_levels",
        "policy_lstm",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        for name in ("channels", "reward_channels", "policy_channels"):
            width = getattr(self, name)
            fits = width % 8 == 0 and all(wide % max(1, wide // 32) == 0 for wide in (width, 2 * width))
            require(self, fits, name, "a multiple of 8 that makes equal groups, such as a multiple of 32")
        require(self, self.cond % (2 * self.context) == 0, "cond", f"a multiple of 2 context = {2 * self.context}")
        require(self, self.noise_high >= self.noise_low, "noise_high", f"at least noise_low={self.noise_low:g}")
        low = f"at least sampler_low={self.sampler_low:g}"
        require(self, self.sampler_high >= self.sampler_low, "sampler_high", low)
        more = f"at least 1 + autoregressive = {1 + self.autoregressive}, since a window has context + horizon rows"
        require(self, self.horizon > self.autoregressive, "horizon", more)

    @property
    def window(self) -> int:
        """Rows of a window, n + H."""
        return self.context + self.horizon

    @property
    def denoised_rows(self) -> int:
        """Rows that the denoiser takes of a window: n of context and 1 + autoregressive targets."""
        return self.context + 1 + self.autoregressive
