"""The denoiser, which draws the next frame from the last frames and actions: network, loss and sampler.

Alonso et al. 2024, section 3; preconditioning and sampler are EDM's (Karras et al. 2022). Frames lie in [-1, 1].
Letters: B samples, n context frames, k further targets of a window, C image channels, S side, N noise levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom.diamond.config import DiamondConfig
from worldloom.diamond.layers import UNet, conv3, group_norm, zeroed
from worldloom.diamond.rows import as_context

MOST_CHURN = math.sqrt(2) - 1  # of a step, by which the noise level grows


@dataclass(frozen=True)
class Coefficients:
    """EDM's preconditioning of noise levels, [B] each: D = c_skip noisy + c_out F(c_in noisy; c_noise)."""

    c_in: Tensor
    c_out: Tensor
    c_skip: Tensor
    c_noise: Tensor


def coefficients(sigma: Tensor, sigma_data: float, sigma_offset: float) -> Coefficients:
    """Return the preconditioning for noise levels sigma [B] (Karras et al. 2022, table 1).

    With s = sqrt(sigma^2 + sigma_offset^2), in training and sampling alike, and d = sigma_data: c_in = 1 / sqrt(s^2 +
    d^2), c_skip = d^2 / (s^2 + d^2), c_out = s sqrt(c_skip), c_noise = ln(s) / 4.
    """
    s = (sigma**2 + sigma_offset**2).sqrt()
    c_in = 1 / (s**2 + sigma_data**2).sqrt()
    c_skip = sigma_data**2 / (s**2 + sigma_data**2)
    return Coefficients(c_in, s * c_skip.sqrt(), c_skip, s.log() / 4)


def quantised(frames: Tensor) -> Tensor:
    """Return frames in [-1, 1] at grey levels 0..255, cut downwards as a conversion to bytes cuts them."""
    levels = frames.clamp(-1, 1).add(1).div(2).mul(255).floor()
    return levels.div(255).mul(2).sub(1)


def sigma_schedule(steps: int, low: float, high: float, rho: float) -> list[float]:
    """Return noise levels from `high` to `low`, then 0: steps + 1 numbers (Karras et al. 2022, eq. 5)."""
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    shares = [i / max(steps - 1, 1) for i in range(steps)]
    return [*((top + share * (bottom - top)) ** rho for share in shares), 0.0]


@dataclass(frozen=True)
class DenoisingNoise:
    """The random numbers of a denoising loss: all standard normal."""

    level: Tensor  # [k + 1, B], of ln(sigma)
    offset: Tensor  # [k + 1, B, C, 1, 1], which all pixels of a channel share
    pixels: Tensor  # [k + 1, B, C, S, S]


@dataclass(frozen=True)
class FrameNoise:
    """The random numbers of sampled frames: all standard normal."""

    start: Tensor  # [B, C, S, S]
    churn: Tensor | None = None  # [N, B, C, S, S], where the sampler adds noise on the way


class Denoiser(nn.Module):
    """The network F and its preconditioned form D. shape: of a frame, (C, S, S); actions: the number of choices."""

    noise_emb: Tensor

    def __init__(self, shape: tuple[int, ...], actions: int, config: DiamondConfig) -> None:
        super().__init__()
        self.config, self.shape, c = config, shape, config
        self.sigmas = sigma_schedule(c.sampler_steps, c.sampler_low, c.sampler_high, c.sampler_rho)
        self.register_buffer("noise_emb", torch.randn(1, c.cond // 2))  # drawn once, saved, never trained
        self.act_emb = nn.Embedding(actions, c.cond // c.context)
        self.cond_proj = nn.Sequential(nn.Linear(c.cond, c.cond), nn.SiLU(), nn.Linear(c.cond, c.cond))
        self.conv_in = conv3((c.context + 1) * shape[0], c.channels)
        self.unet = self.make_unet(c)
        self.norm_out = group_norm(c.channels)
        self.conv_out = zeroed(conv3(c.channels, shape[0]), bias=False)

    @staticmethod
    def make_unet(config: DiamondConfig) -> UNet:
        return UNet([config.channels] * config.levels, [config.depth] * config.levels, config.cond)

    # Network

    def condition(self, c_noise: Tensor, actions: Tensor) -> Tensor:
        """Return the conditioning [B, cond] on c_noise [B] and on class indices actions [B, n], the oldest first."""
        phase = 2 * math.pi * c_noise.unsqueeze(1) @ self.noise_emb
        embedded = torch.cat([phase.cos(), phase.sin()], 1) + self.act_emb(actions).flatten(1)
        return cast(Tensor, self.cond_proj(embedded))

    def network(self, context: Tensor, actions: Tensor, noisy: Tensor, c_noise: Tensor) -> Tensor:
        """Return F [B, C, S, S] of context [B, n, C, S, S], actions [B, n] and noisy [B, C, S, S], both scaled."""
        x = self.conv_in(torch.cat([context.flatten(1, 2), noisy], 1))
        x = self.unet(x, self.condition(c_noise, actions))
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))))

    def raw(self, context: Tensor, actions: Tensor, noisy: Tensor, given: Coefficients) -> Tensor:
        """Return F in float32 for frames as they are: the context is divided by sigma_data, `noisy` scaled by c_in."""
        scaled = noisy * given.c_in[:, None, None, None]
        return self.network(context / self.config.sigma_data, actions, scaled, given.c_noise).float()

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return coefficients(sigma, self.config.sigma_data, self.config.sigma_offset)

    def denoise(self, context: Tensor, actions: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return D, quantised, [B, C, S, S], without gradient.

        context: [B, n, C, S, S]; actions: [B, n], each out of its frame; noisy: [B, C, S, S]; sigma: [B].
        """
        with torch.no_grad():
            given = self.coefficients(sigma)
            return combined(noisy, self.raw(context, actions, noisy, given), given)

    # Loss

    def draw_noise(self, batch: int, generator: Generator | None) -> DenoisingNoise:
        """Draw the random numbers of `loss` for B = batch windows."""
        device, terms = self.noise_emb.device, self.config.autoregressive + 1

        def normal(*shape: int) -> Tensor:
            return torch.randn(terms, batch, *shape, generator=generator, device=device)

        return DenoisingNoise(normal(), normal(self.shape[0], 1, 1), normal(*self.shape))

    def loss(self, frames: Tensor, actions: Tensor, episode: Tensor, noise: DenoisingNoise) -> Tensor:
        """Return the mean over targets of E |F - (x - c_skip noisy) / c_out|^2, a scalar (Alonso et al. 2024, eq. 5).

        frames: [B, n + 1 + k, C, S, S]; actions: [B, n + 1 + k] class indices, which led to these frames; episode:
        [B, n + 1 + k], numbers that tell episodes apart. Target i is frame n + i, noised to sigma = exp(noise_mean +
        noise_std level); then its quantised D takes its place in the context of the next target. Frames of another
        episode than the target's are grey, 0.0, in its context, and count as action 0.
        """
        c, seen, losses = self.config, list(frames.unbind(1)), []
        for i, (level, offset, pixels) in enumerate(zip(noise.level, noise.offset, noise.pixels, strict=True)):
            row = c.context + i
            rows = slice(i, row)
            context, moves = as_context(
                torch.stack(seen[rows], 1), actions[:, i + 1 : row + 1], episode[:, rows], episode[:, row]
            )
            sigma = (c.noise_mean + c.noise_std * level).exp().clamp(c.noise_low, c.noise_high)
            noisy = frames[:, row] + c.sigma_offset * offset + sigma[:, None, None, None] * pixels
            given = self.coefficients(sigma)
            found = self.raw(context, moves, noisy, given)
            c_skip, c_out = (x[:, None, None, None] for x in (given.c_skip, given.c_out))
            losses.append((found - (frames[:, row] - c_skip * noisy) / c_out).square().mean())
            seen[row] = combined(noisy, found.detach(), given)
        return torch.stack(losses).mean()

    # Sampler

    def draw_frame_noise(self, frames: Sequence[int], generator: Generator | None) -> FrameNoise:
        """Draw the random numbers of `sample`, with the leading dimensions `frames`, such as [B] or [H, B]."""
        device, churns = self.noise_emb.device, self.config.sampler_churn > 0
        start = torch.randn(*frames, *self.shape, generator=generator, device=device)
        if not churns:
            return FrameNoise(start)
        lead = (*frames[:-1], self.config.sampler_steps, frames[-1])
        return FrameNoise(start, torch.randn(*lead, *self.shape, generator=generator, device=device))

    @torch.no_grad()
    def sample(self, context: Tensor, actions: Tensor, noise: FrameNoise) -> Tensor:
        """Draw the next frame [B, C, S, S] from context [B, n, C, S, S] and class indices actions [B, n].

        EDM's sampler (Karras et al. 2022, algorithm 2), from noise of standard deviation 1, not of the first level. The
        network is told the level before churn.
        """
        return self.sample_path(context, actions, noise)[-1]

    def sample_path(self, context: Tensor, actions: Tensor, noise: FrameNoise) -> list[Tensor]:
        """Return the frame at every noise level, from the start noise to the sampled frame: N + 1 of [B, C, S, S]."""
        c, path = self.config, [noise.start]
        churn = min(c.sampler_churn / c.sampler_steps, MOST_CHURN)
        for i, (sigma, following) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            x, grown = path[-1], sigma * (1 + churn)
            if churn > 0:
                assert noise.churn is not None
                x = x + noise.churn[i] * math.sqrt(grown**2 - sigma**2)
            slope = self._slope(context, actions, x, sigma, grown)
            moved = x + slope * (following - grown)
            if c.sampler_order == 2 and following > 0:
                again = self._slope(context, actions, moved, following, following)
                moved = x + (slope + again) / 2 * (following - grown)
            path.append(moved)
        return path

    def _slope(self, context: Tensor, actions: Tensor, x: Tensor, told: float, sigma: float) -> Tensor:
        """Return dx / dsigma at level sigma, [B, C, S, S], where the network is told another level."""
        levels = torch.full((len(x),), told, device=x.device)
        return (x - self.denoise(context, actions, x, levels)) / sigma


def combined(noisy: Tensor, raw: Tensor, given: Coefficients) -> Tensor:
    """Return D = c_skip noisy + c_out F, quantised: [B, C, S, S]."""
    c_skip, c_out = (x[:, None, None, None] for x in (given.c_skip, given.c_out))
    return quantised(c_skip * noisy + c_out * raw)
