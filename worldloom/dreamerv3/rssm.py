"""The recurrent state-space model: a block-diagonal GRU with categorical latents (DreamerV3, eq. 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom import functional as fn
from worldloom.dreamerv3.layers import BlockLinear, Linear, NormedLinear, RMSNorm


@dataclass(frozen=True)
class RSSMState:
    """deter [..., D] and stoch [..., S, K], one-hot along K (with straight-through gradients while learning)."""

    deter: Tensor
    stoch: Tensor

    @property
    def features(self) -> Tensor:
        """[..., D + S K]"""
        return torch.cat([self.deter, self.stoch.flatten(-2).to(self.deter.dtype)], -1)

    def detach(self) -> RSSMState:
        return RSSMState(self.deter.detach(), self.stoch.detach())

    def flatten(self) -> RSSMState:
        """[T, B, ...] to [T B, ...]."""
        return RSSMState(self.deter.flatten(0, 1), self.stoch.flatten(0, 1))


@dataclass(frozen=True)
class Posterior:
    """What `observe` gives for T steps, time-first."""

    states: RSSMState  # [T, B, ...]
    log_probs: Tensor  # [T, B, S, K], with unimix


class RSSM(nn.Module):
    """action_dim: A. tokens: E, width of the embedded observation."""

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
        super().__init__()
        self.deter, self.stoch, self.classes, self.unimix = deter, stoch, classes, unimix
        flat = stoch * classes
        self.deter_in = NormedLinear(deter, hidden)
        self.stoch_in = NormedLinear(flat, hidden)
        self.action_in = NormedLinear(action_dim, hidden)
        self.hidden = BlockLinear(deter, deter, blocks, shared=3 * hidden)
        self.hidden_norm = RMSNorm(deter)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.obs_in = NormedLinear(deter + tokens, hidden)
        self.obs_logits = Linear(hidden, flat)
        self.prior_in = nn.Sequential(NormedLinear(deter, hidden), NormedLinear(hidden, hidden))
        self.prior_logits = Linear(hidden, flat)
        self.learning_step = self.observe_step  # what `observe` repeats; an agent that learns compiles it

    def initial(self, batch_size: int) -> RSSMState:
        like = self.gru.bias
        deter = torch.zeros(batch_size, self.deter, device=like.device)
        return RSSMState(deter, torch.zeros(batch_size, self.stoch, self.classes, device=like.device))

    def embed_action(self, action: Tensor) -> Tensor:
        """[..., A] to [..., hidden]; entries beyond [-1, 1] are scaled back."""
        embedded: Tensor = self.action_in(action / action.detach().abs().clamp(min=1.0))
        return embedded

    def core(self, state: RSSMState, action: Tensor) -> Tensor:
        """The next deter [R, D], from embedded actions [R, hidden]."""
        h = state.deter
        x = torch.cat([self.deter_in(h), self.stoch_in(state.stoch.flatten(-2)), action], -1)
        y = F.silu(self.hidden_norm(self.hidden(h, x)))
        gates = self.gru(y).view(len(h), self.hidden.weight.shape[1], 3, -1)
        reset, candidate, update = (gate.reshape(h.shape) for gate in gates.unbind(2))
        return gru_gate(reset, candidate, update, h)

    def prior(self, deter: Tensor) -> Tensor:
        """Log probabilities [..., S, K] of what the model expects to see."""
        return self._log_probs(self.prior_logits(self.prior_in(deter)))

    def posterior(self, deter: Tensor, tokens: Tensor) -> Tensor:
        """Log probabilities [..., S, K] after seeing tokens [..., E]."""
        return self._posterior(deter, self.embed_tokens(tokens))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens' share of the posterior's first layer, for all steps at once."""
        linear = self.obs_in.linear
        return F.linear(tokens, linear.weight[:, self.deter :], linear.bias)

    def _posterior(self, deter: Tensor, embedded: Tensor) -> Tensor:
        linear, norm = self.obs_in.linear, self.obs_in.norm
        x = F.silu(norm(embedded + F.linear(deter, linear.weight[:, : self.deter])))
        return self._log_probs(self.obs_logits(x))

    def _log_probs(self, logits: Tensor) -> Tensor:
        return fn.unimix_log_probs(logits.unflatten(-1, (self.stoch, self.classes)), self.unimix)

    def observe_step(
        self, state: RSSMState, action: Tensor, embedded: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[RSSMState, Tensor]:
        """Filter one observation: (posterior state, its log probabilities).

        action: [B, hidden] embedded; embedded: tokens, [B, hidden]; is_first: [B] bool resets a row; the embedded
        action of such a row must already be that of a zero action. noise: [B, S, K] standard exponential.
        """
        keep = (~is_first).to(state.deter.dtype).unsqueeze(-1)
        state = RSSMState(state.deter * keep, state.stoch * keep.unsqueeze(-1))
        deter = self.core(state, action)
        log_probs = self._posterior(deter, embedded)
        return RSSMState(deter, sample_one_hot(log_probs, noise)), log_probs

    def observe(self, state: RSSMState, actions: Tensor, tokens: Tensor, is_first: Tensor, noise: Tensor) -> Posterior:
        """Filter T steps. actions [T, B, A] led to tokens [T, B, E]; is_first [T, B]; noise [T, B, S, K].

        What needs no recurrence is computed for all steps at once.
        """
        embedded_actions = self.embed_action(actions * (~is_first).to(actions.dtype).unsqueeze(-1))
        rows = (embedded_actions, self.embed_tokens(tokens), is_first, noise)
        deters, stochs, log_probs = [], [], []
        for row in zip(*(value.unbind() for value in rows), strict=True):
            state, log_prob = self.learning_step(state, *row)
            deters.append(state.deter)
            stochs.append(state.stoch)
            log_probs.append(log_prob)
        return Posterior(RSSMState(torch.stack(deters), torch.stack(stochs)), torch.stack(log_probs))

    def imagine_step(self, state: RSSMState, action: Tensor, noise: Tensor) -> RSSMState:
        """The next state under action [R, A], drawn from the prior; noise: [R, S, K] standard exponential."""
        deter = self.core(state, self.embed_action(action))
        return RSSMState(deter, sample_one_hot(self.prior(deter), noise))


def gru_gate(reset: Tensor, candidate: Tensor, update: Tensor, h: Tensor) -> Tensor:
    """One step of the GRU: the reset gate multiplies the candidate before its tanh, and updates start out rare."""
    u = torch.sigmoid(update - 1)
    return torch.lerp(h.to(u.dtype), torch.tanh(torch.sigmoid(reset) * candidate), u)


def sample_one_hot(log_probs: Tensor, noise: Tensor) -> Tensor:
    """A categorical draw as one-hot [..., K], with the gradient of the probabilities (straight-through).

    noise: [..., K] standard exponential.
    """
    probs = log_probs.exp()
    return fn.draw_one_hot(probs, noise) + probs - probs.detach()
