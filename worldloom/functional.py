"""The mathematics that the models share: tensors in, tensors out; no config, module or device.

DreamerV3 is Hafner et al. 2025 (Nature), TD-MPC2 is Hansen et al. 2024 (ICLR). Golden values of every function are in
tests/test_functional.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) ln(1 + |x|), elementwise: [...] to [...] (DreamerV3, eq. 9)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Return sign(x) (exp(|x|) - 1), elementwise: [...] to [...], the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def symexp_bins(count: int, limit: float = 20.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return bin positions spaced by symexp, exactly antisymmetric around a middle bin at 0 (DreamerV3).

    Returns [count], ascending from symexp(-limit) to symexp(limit). Raises ValueError unless `count` is odd and at
    least 3.
    """
    if count % 2 == 0 or count < 3:
        raise ValueError(f"symexp_bins: count is {count}, expected an odd number of at least 3.")
    half = symexp(torch.linspace(-limit, 0, count // 2 + 1, dtype=dtype))
    return torch.cat([half, -half[:-1].flip(0)])


def two_hot(x: Tensor, bins: Tensor) -> Tensor:
    """Spread each value over its two neighbouring bins, so that the mean of the bins is the value.

    Bin i + 1 gets (x - bins[i]) / (bins[i + 1] - bins[i]), bin i the rest. x: [...], bins: [K] ascending. Returns
    [..., K], which sums to one; values beyond either end give all to the end bin.
    DreamerV3 passes raw values with `symexp_bins`; TD-MPC2 passes symlog(x) with evenly spaced bins.
    """
    x = x.clamp(bins[0], bins[-1])
    lower = (torch.bucketize(x.contiguous(), bins, right=True) - 1).clamp(0, len(bins) - 2)
    left, right = bins[lower], bins[lower + 1]
    weight = ((x - left) / (right - left)).unsqueeze(-1)
    target = torch.zeros(*x.shape, len(bins), dtype=x.dtype, device=x.device)
    target.scatter_(-1, lower.unsqueeze(-1), 1 - weight)
    return target.scatter_(-1, lower.unsqueeze(-1) + 1, weight)


def random_mask(shape: Sequence[int], rate: float, generator: Generator | None, device: torch.device) -> Tensor:
    """Draw booleans of `shape`, each True with probability `rate` in [0, 1), independently.

    On a CPU the code draws the gaps between True entries, which are geometric: far less work where True is rare.
    """
    if device.type != "cpu":
        return torch.rand(tuple(shape), generator=generator, device=device) < rate
    count = math.prod(shape)
    mask = torch.zeros(count + 1, dtype=torch.bool)
    if rate > 0:
        enough = int(count * rate + 10 * math.sqrt(count * rate) + 16)  # ten standard deviations more than expected
        uniform = 1 - torch.rand(enough, generator=generator, dtype=torch.float64)
        gaps = (uniform.log_() / math.log1p(-rate)).floor_()
        mask[((gaps + 1).cumsum(0) - 1).clamp_(max=count).long()] = True
    return mask[:count].view(tuple(shape))


def unit_pixels(image: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]: uint8 over 255, floats as they are. Raises ValueError for other integers."""
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"an image is {image.dtype} {tuple(image.shape)}, expected uint8, or floats in [0, 1].")
    return image.float()


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return -sum(target * log softmax(logits)) over the last axis: [..., K] and [..., K] to [...]."""
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def symlog_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Decode TD-MPC2's two-hot head: symexp(sum(softmax(logits) * bins)) (section 3.1).

    logits: [..., K], bins: [K] evenly spaced in symlog space, where the mean is taken. Returns [...].
    """
    return symexp(F.softmax(logits, dim=-1) @ bins)


def antisymmetric_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Decode DreamerV3's two-hot head: sum(softmax(logits) * bins), without symexp afterwards.

    logits: [..., K] with K odd, bins: [K] from `symexp_bins`. Returns [...]. The sum is over i > 0 of
    (p[i] - p[-i]) bins[i], i counted from the middle, so that equal logits give exactly 0 although bins reach 4.85e8.
    It is not written as a matrix product, which autocast would compute in bfloat16.
    """
    probs = F.softmax(logits, dim=-1)
    half = len(bins) // 2
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)


def lambda_return(reward: Tensor, discount: Tensor, next_value: Tensor, lam: float | Tensor) -> Tensor:
    """Mix every n-step return, from the last step back (Sutton & Barto 2018, section 12.1).

    R[t] = reward[t] + discount[t] ((1 - lam) next_value[t] + lam R[t + 1]), with R[T] = next_value[T - 1].
    reward, discount, next_value: [T, ...], all belonging to the move out of step t; discount is gamma times
    the chance that the episode goes on. lam: a number, or [T, ...] where the mix differs by step (0 cuts the
    trace at the end of an episode). Returns R, [T, ...]. Raises ValueError if the shapes differ.
    """
    if not reward.shape == discount.shape == next_value.shape:
        raise ValueError(
            f"lambda_return: reward {tuple(reward.shape)}, discount {tuple(discount.shape)} and next_value "
            f"{tuple(next_value.shape)} differ, expected one shape [T, ...]. Drop the first row of value."
        )
    now, later = reward + discount * (1 - lam) * next_value, discount * lam
    target, targets = next_value[-1], []
    for known, weight in zip(now.unbind()[::-1], later.unbind()[::-1], strict=True):
        target = torch.addcmul(known, weight, target)
        targets.append(target)
    return torch.stack(targets[::-1])


def percentile_range(x: Tensor, low: float = 0.05, high: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return two quantiles of all entries of x, linearly interpolated, each a scalar.

    Both models divide by their difference: DreamerV3 averages each quantile over time, TD-MPC2 the difference.
    """
    ordered = x.detach().flatten().sort().values

    def at(q: float) -> Tensor:
        position = q * (len(ordered) - 1)
        lower = int(position)
        upper = min(lower + 1, len(ordered) - 1)
        return torch.lerp(ordered[lower], ordered[upper], position - lower)

    return at(low), at(high)


def eager_on_cpu(x: Tensor) -> bool:
    """Return whether torch's own CPU kernels compute x, one by one; some functions have forms for these."""
    return x.is_cpu and not torch.compiler.is_compiling()


def exporting() -> bool:
    """Return whether torch.export traces this. `torch.compiler.is_exporting` is missing in torch 2.6, and says so of
    every compilation before 2.12."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def short_softmax(x: Tensor) -> Tensor:
    """Return the softmax over a short last axis: [..., K] to [..., K].

    torch's CPU kernel does not vectorise over a few neighbours; laid out as K planes it is several times as fast.
    """
    if x.is_cpu and x.shape[-1] <= 32:
        return F.softmax(x.movedim(-1, 0).contiguous(), dim=0).movedim(0, -1)
    return F.softmax(x, dim=-1)


def unimix_probs(logits: Tensor, mix: float = 0.01) -> Tensor:
    """Return (1 - mix) softmax(logits) + mix / K, [..., K], in at least float32 (DreamerV3)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probs = short_softmax(wide)
    return (1 - mix) * probs + mix / logits.shape[-1] if mix else probs


def unimix_log_probs(logits: Tensor, mix: float = 0.01) -> Tensor:
    """Return the logarithm of `unimix_probs`, [..., K]."""
    if mix == 0:  # where the logarithm of a probability that is rounded to 0 would be -inf
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return torch.log(unimix_probs(logits, mix))


@torch.no_grad()
def categorical_entropy(log_probs: Tensor) -> Tensor:
    """Return -sum p log p of log probabilities [..., S, K], summed over S and averaged over the rest, in nats."""
    return -(log_probs.exp() * log_probs).sum((-2, -1)).mean()


def exponential_noise(shape: Sequence[int], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Draw standard exponential numbers of any shape, for `draw_one_hot`.

    They are -ln of uniform numbers, which on a CPU is several times as fast as `Tensor.exponential_`.
    """
    return torch.rand(*shape, generator=generator, device=device).log_().neg_()


def one_hot(index: Tensor, count: int) -> Tensor:
    """Return integers [...] as one-hot bools [..., count]; an index outside of 0..count-1 gives no True.

    This is a comparison, because torch's own one_hot reads the indices on the host to check them.
    """
    return index.unsqueeze(-1) == torch.arange(count, device=index.device)


def draw_one_hot(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw categorical choices as one-hot [..., K] without gradient, from probabilities [..., K].

    noise: [..., K] standard exponential; the argmin of noise / probs is an exact draw.
    """
    score = noise / probs.detach()  # in this order it is laid out as noise; short_softmax leaves K planes
    return one_hot(score.argmin(-1), probs.shape[-1]).to(probs.dtype)


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum(p (log p - log q)) in nats, over S groups: log probabilities [..., S, K] to [...]."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def redundancy_reduction(x: Tensor, y: Tensor, redundancy: float, counted: Tensor | None = None) -> Tensor:
    """Return sum_i (c_ii - 1)^2 + redundancy sum_{i != j} c_ij^2, a scalar, where c_ij is the correlation of entry i of
    x with entry j of y over N rows (Zbontar et al. 2021, "Barlow Twins", eq. 1).

    x, y: [N, E]. counted: [N, 1] of 0 and 1, the rows that count; all without it. An entry is standardised as
    (x - mean) / (std + 1e-8), with N - 1 in std and N in c, as R2-Dreamer's code does: c_ii is at most 1 - 1 / N.
    """
    counted = torch.ones_like(x[:, :1]) if counted is None else counted
    rows = counted.sum()
    x, y = _standardised(x, counted, rows), _standardised(y, counted, rows)
    c, own = x.mT @ y / rows.clamp(min=1), (x * y).sum(0) / rows.clamp(min=1)  # own: the diagonal of c
    loss: Tensor = (own - 1).square().sum() + redundancy * (c.square().sum() - own.square().sum())
    return loss


def _standardised(x: Tensor, counted: Tensor, rows: Tensor) -> Tensor:
    """Return the counted rows of x [N, E] with mean 0 and deviation 1, all others as zeros."""
    centred = (x - (x * counted).sum(0) / rows.clamp(min=1)) * counted
    deviation: Tensor = torch.linalg.vector_norm(centred, dim=0) / (rows - 1).clamp(min=1).sqrt()  # its slope at 0 is 0
    return centred / (deviation + 1e-8)


def free_nats(kl: Tensor, nats: float = 1.0) -> Tensor:
    """Return max(kl, nats) elementwise; below it the gradient is zero (DreamerV3, "World model learning")."""
    return kl.clamp(min=nats)
