"""The recurrent state-space model: a block-diagonal GRU with categorical latents.

Hafner et al. 2025, "World model learning"; h is `deter`, z is `stoch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldloom import functional as fn
from worldloom import products
from worldloom.dreamerv3.layers import BlockLinear, Linear, NormedLinear, NormSiLU, norm_silu
from worldloom.dreamerv3.unroll import Tape, addend, linear_product


@dataclass(frozen=True)
class RSSMState:
    """A state: deter [..., D] and stoch [..., S, K], one-hot along K (with straight-through gradients in learning)."""

    deter: Tensor
    stoch: Tensor

    @property
    def features(self) -> Tensor:
        """The input of the heads: deter and flat stoch, [..., D + S K]."""
        return torch.cat([self.deter, self.stoch.flatten(-2).to(self.deter.dtype)], -1)

    def detach(self) -> RSSMState:
        """Return the state without its history of gradients."""
        return RSSMState(self.deter.detach(), self.stoch.detach())

    def transposed(self) -> RSSMState:
        """Return states [T, B, ...] as [B, T, ...]."""
        return RSSMState(self.deter.transpose(0, 1), self.stoch.transpose(0, 1))

    def flatten(self) -> RSSMState:
        """Return states [T, B, ...] as [T B, ...]."""
        return RSSMState(self.deter.flatten(0, 1), self.stoch.flatten(0, 1))


@dataclass(frozen=True)
class Posterior:
    """The result of `observe` for T steps, time-first."""

    states: RSSMState  # [T, B, ...]
    log_probs: Tensor  # [T, B, S, K], with unimix


class LoopAdded(NamedTuple):
    """The terms that the linear maps of a step add: their biases, or the tokens' share; [T, B, O] each."""

    deter_in: Tensor
    stoch_in: Tensor
    hidden: Tensor
    gru: Tensor
    obs_in: Tensor
    obs_logits: Tensor


class LoopInputs(NamedTuple):
    """The inputs of the linear maps of a step, in the order of LoopAdded: [n, B, I] each, or their tapes."""

    deter: Any
    stoch: Any
    joint: Any  # deter and the embedded inputs, for the map whose blocks see a part of the first and all of the second
    core: Any
    next_deter: Any
    seen: Any


class LoopWeights(NamedTuple):
    """The weights of a step as its products take them, [I, O] each, or by blocks [G, I / G, O / G]."""

    deter_in: Tensor
    stoch_in: Tensor
    hidden_own: Tensor
    hidden_shared: Tensor
    gru: Tensor
    obs_in: Tensor
    obs_logits: Tensor


class RecurrentCore(nn.Module):
    """The sequence model: the next deter under an action. deter: its width D; flat: S K; hidden: width of layers."""

    def __init__(self, action_dim: int, deter: int, hidden: int, flat: int, blocks: int) -> None:
        super().__init__()
        self.deter = deter
        self.deter_in = NormedLinear(deter, hidden)
        self.stoch_in = NormedLinear(flat, hidden)
        self.action_in = NormedLinear(action_dim, hidden)
        self.hidden = BlockLinear(deter, deter, blocks, shared=3 * hidden)
        self.hidden_norm = NormSiLU(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)

    def embed_action(self, action: Tensor) -> Tensor:
        """Embed actions [..., A] as [..., hidden]; each entry a enters as a / max(1, |a|)."""
        embedded: Tensor = self.action_in(action / action.detach().abs().clamp(min=1.0))
        return embedded

    def core(self, state: RSSMState, action: Tensor) -> Tensor:
        """Return the next deter [R, D], from embedded actions [R, hidden]."""
        h = state.deter
        x = torch.cat([self.deter_in(h), self.stoch_in(state.stoch.flatten(-2)), action], -1)
        y = self.hidden_norm(self.hidden(h, x))
        return self.gates(self.gru(y), h)

    def gates(self, gates: Tensor, h: Tensor) -> Tensor:
        """Return the next deter [R, D], from the GRU's gates [R, 3 D] and the previous deter h [R, D]."""
        grouped = gates.view(len(h), self.hidden.weight.shape[1], 3, -1)
        before = h.view(len(h), grouped.shape[1], -1)
        if fn.eager_on_cpu(h) and h.dtype == gates.dtype:
            return cast(Tensor, _CpuGate.apply(grouped, before)).flatten(1)  # type: ignore[no-untyped-call]
        reset, candidate, update = grouped.unbind(2)
        return gru_gate(reset, candidate, update, before).flatten(1)


class RSSM(RecurrentCore):
    """The sequence model, with prior and posterior over S categorical variables of K classes.

    action_dim: A. tokens: E, width of the embedded observation. unimix: share of a uniform distribution.
    """

    def __init__(
        self,
        action_dim: int,
        tokens: int,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        blocks: int,
        unimix: float,
    ) -> None:
        flat = stoch * classes
        super().__init__(action_dim, deter, hidden, flat, blocks)
        self.stoch, self.classes, self.unimix = stoch, classes, unimix
        self.obs_in = NormedLinear(deter + tokens, hidden)
        self.obs_logits = Linear(hidden, flat)
        self.prior_in = nn.Sequential(NormedLinear(deter, hidden), NormedLinear(hidden, hidden))
        self.prior_logits = Linear(hidden, flat)
        self.learning_steps = self.observe_steps  # the part that `observe` repeats; may be compiled
        self.steps_at_once = 1 << 30  # steps of `observe` in one call of learning_steps

    def initial(self, batch_size: int) -> RSSMState:
        """Return the state before any observation: zeros."""
        like = self.gru.bias
        deter = torch.zeros(batch_size, self.deter, device=like.device)
        return RSSMState(deter, torch.zeros(batch_size, self.stoch, self.classes, device=like.device))

    def prior(self, deter: Tensor) -> Tensor:
        """Return log probabilities [..., S, K] before an observation is seen, from deter [..., D]."""
        return fn.unimix_log_probs(self._prior_logits(deter), self.unimix)

    def _prior_logits(self, deter: Tensor) -> Tensor:
        return self._by_variable(self.prior_logits(self.prior_in(deter)))

    def posterior(self, deter: Tensor, tokens: Tensor) -> Tensor:
        """Return log probabilities [..., S, K] after tokens [..., E] are seen, from deter [..., D]."""
        return fn.unimix_log_probs(self._posterior_logits(deter, self.embed_tokens(tokens)), self.unimix)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens' share [..., hidden] of the posterior's first layer, for all steps at once."""
        linear = self.obs_in.linear
        return products.linear(tokens, linear.weight[:, self.deter :], linear.bias)

    def _posterior_logits(self, deter: Tensor, embedded: Tensor) -> Tensor:
        linear, norm = self.obs_in.linear, self.obs_in.norm
        x = norm(embedded + products.linear(deter, linear.weight[:, : self.deter]))
        return self._by_variable(self.obs_logits(x))

    def _by_variable(self, logits: Tensor) -> Tensor:
        return logits.view(*logits.shape[:-1], self.stoch, self.classes)

    def _draw(self, logits: Tensor, noise: Tensor) -> Tensor:
        return sample_one_hot(fn.unimix_probs(logits, self.unimix), noise)

    def observe_step(
        self, state: RSSMState, action: Tensor, embedded: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[RSSMState, Tensor]:
        """Filter one observation; return the posterior state and its log probabilities [B, S, K].

        action: [B, hidden] embedded; embedded: tokens, [B, hidden]; is_first: [B] bool resets a row; the embedded
        action of such a row must already be that of a zero action. noise: [B, S, K] standard exponential.
        """
        keep = (~is_first).to(state.deter.dtype).unsqueeze(-1)
        state = RSSMState(state.deter * keep, state.stoch * keep.unsqueeze(-1))
        deter = self.core(state, action)
        logits = self._posterior_logits(deter, embedded)
        return RSSMState(deter, self._draw(logits, noise)), fn.unimix_log_probs(logits, self.unimix)

    def observe(self, state: RSSMState, actions: Tensor, tokens: Tensor, is_first: Tensor, noise: Tensor) -> Posterior:
        """Filter T steps. actions [T, B, A] led to tokens [T, B, E]; is_first [T, B]; noise [T, B, S, K].

        The result equals that of repeated `observe_step`. Everything without recurrence is computed for all steps at
        once, and so is the gradient of every weight (`unroll`).
        """
        lead = (len(actions), len(state.deter))
        given, added, scales = self.prepare(actions, tokens, is_first, noise)
        tapes = [Tape() for _ in LoopInputs._fields]
        weights = self._loop_weights(added.hidden.dtype)
        added = self._with_weight_gradients(added, tapes)
        whole = (*given, *added, *(scale.expand(*lead, -1) for scale in scales))
        parts = []
        for rows in zip(*(value.split(self.steps_at_once) for value in whole), strict=True):
            state, part, read = self.learning_steps(state, weights, rows)
            parts.append(part)
            for tape, value in zip(tapes, read, strict=True):
                tape.inputs.append(value)
        deter, stoch, logits = (torch.cat(values) for values in zip(*parts, strict=True))
        return Posterior(RSSMState(deter, stoch), fn.unimix_log_probs(logits, self.unimix))

    def prepare(
        self, actions: Tensor, tokens: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[tuple[Tensor, ...], LoopAdded, tuple[Tensor, ...]]:
        """Return the inputs of every step of the loop: (embedded action, mask of kept states, noise) [T, B, ...], the
        terms that its linear maps add, and the scales of its norms [O] each."""
        keep = (~is_first).to(actions.dtype).unsqueeze(-1)
        embedded_actions = self.embed_action(actions * keep)
        embedded_tokens = self.embed_tokens(tokens)
        layers = (self.deter_in.linear, self.stoch_in.linear, self.hidden, self.gru)
        lead, dtype = (*actions.shape[:2], -1), embedded_tokens.dtype
        biases = [layer.bias.to(dtype).expand(lead) for layer in (*layers, self.obs_logits)]
        added = LoopAdded(biases[0], biases[1], biases[2], biases[3], embedded_tokens, biases[4])
        norms = (self.deter_in.norm, self.stoch_in.norm, self.hidden_norm, self.obs_in.norm)
        return (embedded_actions, keep, noise), added, tuple(norm.scale for norm in norms)

    def _loop_weights(self, dtype: torch.dtype) -> LoopWeights:
        """Return the weights, cast once for all steps, without gradient."""
        own, shared = self.hidden.parts()
        found = (
            self.deter_in.linear.weight.mT,
            self.stoch_in.linear.weight.mT,
            own,
            shared,
            self.gru.parts()[0],
            self.obs_in.linear.weight[:, : self.deter].mT,
            self.obs_logits.weight.mT,
        )
        return LoopWeights(*(weight.detach().to(dtype) for weight in found))

    def _with_weight_gradients(self, added: LoopAdded, tapes: list[Tape]) -> LoopAdded:
        read = LoopInputs(*tapes)
        return LoopAdded(
            addend(self.deter_in.linear.weight, added.deter_in, read.deter, linear_product),
            addend(self.stoch_in.linear.weight, added.stoch_in, read.stoch, linear_product),
            addend(self.hidden.weight, added.hidden, read.joint, self.hidden.product),
            addend(self.gru.weight, added.gru, read.core, self.gru.product),
            addend(self.obs_in.linear.weight[:, : self.deter], added.obs_in, read.next_deter, linear_product),
            addend(self.obs_logits.weight, added.obs_logits, read.seen, linear_product),
        )

    def observe_steps(
        self, state: RSSMState, w: LoopWeights, rows: tuple[Tensor, ...]
    ) -> tuple[RSSMState, tuple[Tensor, Tensor, Tensor], LoopInputs]:
        """Filter n steps; each step reads one entry of every tensor of `rows` [n, B, ...].

        Returns the last state, (deter, stoch, posterior logits) [n, B, ...], and the inputs of the linear maps.
        """
        made, read = [], []
        for row in zip(*(value.unbind() for value in rows), strict=True):
            action, keep, noise, *rest = row
            add, scale = LoopAdded(*rest[:6]), rest[6:]
            h, z = state.deter * keep, (state.stoch * keep.unsqueeze(-1)).flatten(-2)
            x1 = norm_silu(products.addmm(add.deter_in, h, w.deter_in), scale[0])
            x2 = norm_silu(products.addmm(add.stoch_in, z, w.stoch_in), scale[1])
            x = torch.cat([x1, x2, action], -1)
            joint = self.hidden.grouped(h, w.hidden_own, products.addmm(add.hidden, x, w.hidden_shared))
            y = norm_silu(joint, scale[2])
            deter = self.gates(self.gru.grouped(y, w.gru, add.gru), h)
            seen = norm_silu(products.addmm(add.obs_in, deter, w.obs_in), scale[3])
            logits = self._by_variable(products.addmm(add.obs_logits, seen, w.obs_logits))
            read.append(tuple(value.detach() for value in (h, z, x, y, deter, seen)))
            state = RSSMState(deter, self._draw(logits, noise))
            made.append((deter, state.stoch, logits))
        deters, stochs, all_logits = (torch.stack(values) for values in zip(*made, strict=True))
        hs, zs, xs, *others = (torch.stack(values) for values in zip(*read, strict=True))
        inputs = LoopInputs(hs, zs, torch.cat([hs.to(xs.dtype), xs], -1), *others)
        return state, (deters, stochs, all_logits), inputs

    def imagine_step(self, state: RSSMState, action: Tensor, noise: Tensor) -> RSSMState:
        """Return the next state under action [R, A], drawn from the prior; noise: [R, S, K] standard exponential."""
        deter = self.core(state, self.embed_action(action))
        return RSSMState(deter, self._draw(self._prior_logits(deter), noise))


def gru_gate(reset: Tensor, candidate: Tensor, update: Tensor, h: Tensor) -> Tensor:
    """Return u tanh(sigmoid(reset) candidate) + (1 - u) h, with u = sigmoid(update - 1); all [..., D].

    The reset gate multiplies the candidate before its tanh, and the -1 makes updates rare at first.
    """
    u = torch.sigmoid(update - 1)
    return torch.lerp(h.to(u.dtype), torch.tanh(torch.sigmoid(reset) * candidate), u)


class _CpuGate(torch.autograd.Function):
    """`gru_gate` of gates [R, G, 3, D / G] and h [R, G, D / G], with 9 operations for its gradients in place of 14."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, h: Tensor) -> Tensor:
        reset, candidate, update = gates.unbind(2)
        r, u = torch.sigmoid(reset), (update - 1).sigmoid_()
        new = (r * candidate).tanh_()
        ctx.save_for_backward(gates, h, r, u, new)
        return torch.lerp(h, new, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gates, h, r, u, new = ctx.saved_tensors
        of_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
        of_reset, of_candidate, of_update = of_gates.unbind(2)
        torch.ops.aten.sigmoid_backward(gradient * (new - h), u, grad_input=of_update)
        of_new = gradient * u
        of_product = torch.ops.aten.tanh_backward(of_new, new)
        torch.mul(of_product, r, out=of_candidate)
        torch.ops.aten.sigmoid_backward(of_product * gates[:, :, 1], r, grad_input=of_reset)
        return of_gates, gradient - of_new


def sample_one_hot(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw one-hot samples [..., K] from probabilities, with the gradient of these (straight-through).

    noise: [..., K] standard exponential.
    """
    return cast(Tensor, _StraightThrough.apply(probs, fn.draw_one_hot(probs, noise)))  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """The draw, with the gradient of the probabilities that it was drawn from."""

    @staticmethod
    def forward(ctx: Any, probs: Tensor, drawn: Tensor) -> Tensor:
        return drawn.view_as(drawn)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
