"""The denoiser, which draws the next frame from the last frames and actions: network, loss and sampler.

Alonso et al. 2024, section 3; preconditioning and sampler are EDM's (Karras et al. 2022). Frames lie in [-1, 1].
Letters: B samples, n context frames, k further targets of a window, C image channels, S side, N noise levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from worldloom.diamond.config import DiamondConfig
from worldloom.diamond.layers import UNet, conv3, groups, zeroed
from worldloom.diamond.rows import as_context

MOST_CHURN = math.sqrt(2) - 1  # of a step, by which the noise level grows


@dataclass(frozen=True)
class Coefficients:
    """EDM's preconditioning of noise levels: D = c_skip noisy + c_out F(c_in noisy; c_noise)."""

    c_in: Tensor  # [B, 1, 1, 1]
    c_out: Tensor  # [B, 1, 1, 1]
    c_skip: Tensor  # [B, 1, 1, 1]
    c_noise: Tensor  # [B]

    def combined(self, noisy: Tensor, raw: Tensor) -> Tensor:
        """Return D from noisy frames and the network's output F, [B, C, S, S] each, quantised."""
        return quantised(self.c_skip * noisy + self.c_out * raw)


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
    """The random numbers of a denoising loss."""

    rows: Tensor  # [B] uniform in [0, 1): which rows of a window it takes
    level: Tensor  # [k + 1, B] standard normal, of ln(sigma)
    offset: Tensor  # [k + 1, B, C, 1, 1] standard normal, which all pixels of a channel share
    pixels: Tensor  # [k + 1, B, C, S, S] standard normal


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
        self.unet = UNet([(c.channels, c.depth, False)] * c.levels, c.cond)
        self.norm_out = nn.GroupNorm(groups(c.channels), c.channels)
        self.conv_out = zeroed(conv3(c.channels, shape[0]))

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the preconditioning for noise levels sigma [B] (Karras et al. 2022, table 1).

        With s = sqrt(sigma^2 + sigma_offset^2), in training and sampling alike, and d = sigma_data: c_in = 1 / sqrt(s^2
        + d^2), c_skip = d^2 / (s^2 + d^2), c_out = s sqrt(c_skip), c_noise = ln(s) / 4.
        """
        d, s = self.config.sigma_data, (sigma**2 + self.config.sigma_offset**2).sqrt()
        c_skip = d**2 / (s**2 + d**2)
        wide = [x[:, None, None, None] for x in (1 / (s**2 + d**2).sqrt(), s * c_skip.sqrt(), c_skip)]
        return Coefficients(wide[0], wide[1], wide[2], s.log() / 4)

    def condition(self, c_noise: Tensor, actions: Tensor) -> Tensor:
        """Return the conditioning [B, cond] on c_noise [B] and on class indices actions [B, n], the oldest first."""
        phase = 2 * math.pi * c_noise.unsqueeze(1) * self.noise_emb  # no matrix product, to stay in float32
        embedded = torch.cat([phase.cos(), phase.sin()], 1) + self.act_emb(actions).flatten(1)
        return cast(Tensor, self.cond_proj(embedded))

    def raw(self, context: Tensor, actions: Tensor, noisy: Tensor, given: Coefficients) -> Tensor:
        """Return F [B, C, S, S] in float32, of context frames [B, n, C, S, S] over sigma_data, class indices actions
        [B, n], each out of its frame, and c_in times noisy [B, C, S, S]."""
        scaled = [context.flatten(1, 2) / self.config.sigma_data, noisy * given.c_in]
        x = self.unet(self.conv_in(torch.cat(scaled, 1)), self.condition(given.c_noise, actions))
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x))).float())

    @torch.no_grad()
    def denoise(self, context: Tensor, actions: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return D [B, C, S, S], quantised, without gradient; sigma: [B], all others as `raw` takes them."""
        given = self.coefficients(sigma)
        return given.combined(noisy, self.raw(context, actions, noisy, given))

    def draw_noise(self, batch: int, generator: Generator | None) -> DenoisingNoise:
        """Draw the random numbers of `loss` for B = batch windows."""
        device, lead = self.noise_emb.device, (self.config.autoregressive + 1, batch)
        shapes = (lead, (*lead, self.shape[0], 1, 1), (*lead, *self.shape))
        rows = torch.rand(batch, generator=generator, device=device)
        return DenoisingNoise(rows, *(torch.randn(shape, generator=generator, device=device) for shape in shapes))

    def loss(self, frames: Tensor, actions: Tensor, episode: Tensor, noise: DenoisingNoise) -> Tensor:
        """Return the mean over targets of E |F - (x - c_skip noisy) / c_out|^2, a scalar (Alonso et al. 2024, eq. 5).

        frames: [B, n + 1 + k, C, S, S]; actions: [B, n + 1 + k] class indices, which led to these frames; episode:
        [B, n + 1 + k], numbers that tell episodes apart. Target i is frame n + i, noised to sigma = exp(noise_mean +
        noise_std level); then its quantised D takes its place in the context of the next target. Frames of another
        episode than the target's are grey, 0.0, in its context, and their moves are action 0.
        """
        c, seen, losses = self.config, list(frames.unbind(1)), []
        for i, (level, offset, pixels) in enumerate(zip(noise.level, noise.offset, noise.pixels, strict=True)):
            row, x = c.context + i, frames[:, c.context + i]
            recent, moves = torch.stack(seen[i:row], 1), actions[:, i + 1 : row + 1]
            context, moves = as_context(recent, moves, episode[:, i:row], episode[:, row])
            sigma = (c.noise_mean + c.noise_std * level).exp().clamp(c.noise_low, c.noise_high)
            noisy = x + c.sigma_offset * offset + sigma[:, None, None, None] * pixels
            given = self.coefficients(sigma)
            raw = self.raw(context, moves, noisy, given)
            losses.append((raw - (x - given.c_skip * noisy) / given.c_out).square().mean())
            seen[row] = given.combined(noisy, raw.detach())
        return torch.stack(losses).mean()

    def draw_frame_noise(self, lead: tuple[int, ...], batch: int, generator: Generator | None) -> Tensor:
        """Draw the random numbers of `sample`, [*lead, 1, B, C, S, S] standard normal: the start, then, if the sampler
        churns, those of its N steps."""
        count = 1 + self.config.sampler_steps * (self.config.sampler_churn > 0)
        return torch.randn(*lead, count, batch, *self.shape, generator=generator, device=self.noise_emb.device)

    @torch.no_grad()
    def sample(self, context: Tensor, actions: Tensor, noise: Tensor) -> list[Tensor]:
        """Draw the next frame by EDM's sampler (Karras et al. 2022, alg. 2); return it at every noise level, N + 1 of
        [B, C, S, S], the last of which is the frame.

        It starts from noise of standard deviation 1, not of the first level, and tells the network the level before
        churn. context: [B, n, C, S, S]; actions: [B, n] class indices; noise: [1 or N + 1, B, C, S, S], as
        `draw_frame_noise` draws it.
        """

        def slope(x: Tensor, told: float, sigma: float) -> Tensor:
            return (x - self.denoise(context, actions, x, torch.full((len(x),), told, device=x.device))) / sigma

        x, path = noise[0], [noise[0]]
        growth = 1 + min(self.config.sampler_churn / self.config.sampler_steps, MOST_CHURN)
        for i, (sigma, following) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True), 1):
            grown = sigma * growth
            if growth > 1:
                x = x + noise[i] * math.sqrt(grown**2 - sigma**2)
            first = slope(x, sigma, grown)
            moved = x + first * (following - grown)
            if self.config.sampler_order == 2 and following > 0:  # Heun's method
                moved = x + (first + slope(moved, following, following)) / 2 * (following - grown)
            path.append(x := moved)
        return path
