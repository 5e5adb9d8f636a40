"""A world model of your own: a GRU predicts observations and rewards, and the agent acts by searching in it (CEM).

In the manner of PlaNet (Hafner et al. 2019, https://arxiv.org/abs/1811.04551), with a deterministic state, for vectors
and continuous actions.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from worldloom import Family, LatentState, Trajectory, WindowSpec
from worldloom.functional import symexp, symlog
from worldloom.nets import flatten, load_flat, mlp
from worldloom.optim import load_optimizer
from worldloom.pretrained import save_model
from worldloom.staging import Columns
from worldloom.tally import Tally


@dataclass(frozen=True, kw_only=True)
class GRUConfig:
    """Every field can be set from the command line: --agent.units 64."""

    units: int = 128  # D, of the state
    batch_size: int = 32  # B, windows per update
    batch_length: int = 12  # T, rows of a window
    observed: int = 4  # rows of a window that are seen; the rest is predicted without looking
    lr: float = 1e-3
    horizon: int = 12  # H, steps that a plan looks ahead
    candidates: int = 64  # plans tried in each round
    elites: int = 8  # best plans, from which the next round is drawn
    rounds: int = 4
    discount: float = 0.97
    noise: float = 0.3  # standard deviation of exploration


class GRUWorldModel(nn.Module):
    """The state is h [B, D]: `step` moves it by an action, `correct` by what was seen."""

    def __init__(self, obs_shape, action_dim, config, episode_length=None):
        super().__init__()
        if not isinstance(obs_shape, tuple) or len(obs_shape) != 1:
            raise ValueError(f"the GRU family reads vectors: obs_shape is {obs_shape}, expected (V,).")
        self.obs_shape, self.action_dim, self.config, self.episode_length = (
            obs_shape,
            action_dim,
            config,
            episode_length,
        )
        (numbers,), units = obs_shape, config.units
        self.encoder = mlp([numbers, units], units)
        self.correct = nn.GRUCell(units, units)
        self.step = nn.GRUCell(action_dim, units)
        self.heads = mlp([units, units], numbers + 2)  # observation, reward, continue

    def see(self, h, obs):
        return self.correct(self.encoder(symlog(obs.float())), h)

    def read(self, h):
        """Observation [..., V] and reward [...] in symlog, and the logit of going on [...]."""
        out = self.heads(h)
        return out[..., :-2], out[..., -2], out[..., -1]

    def initial_state(self, batch_size):
        return LatentState(torch.zeros(batch_size, self.config.units, device=self.step.bias_hh.device))

    def encode(self, obs):
        return LatentState(self.see(self.initial_state(len(obs)).deterministic, obs))

    def predict(self, state, action):
        return LatentState(self.step(action, state.deterministic))

    def observe(self, state, action, obs):
        return LatentState(self.see(self.step(action, state.deterministic), obs))

    def decode(self, state):
        obs, reward, going_on = self.read(state.deterministic)
        return {"obs": symexp(obs), "reward": symexp(reward)[:, None], "continue": going_on.sigmoid()[:, None]}

    def imagine(self, state, actions):
        states = [state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        _, reward, going_on = self.read(torch.stack([s.deterministic for s in states[1:]]))
        return Trajectory(tuple(states), symexp(reward)[..., None], going_on.sigmoid()[..., None])

    def compute_loss(self, batch):
        """Errors of every row as predicted before it was seen; on is_first rows nothing was predicted."""
        obs, actions = batch["obs"].float(), batch["actions"].float()
        rows = obs.shape[1]
        first = batch["is_first"] if "is_first" in batch else torch.zeros(obs.shape[:2], dtype=torch.bool)
        first = first.to(obs.device)
        ends = batch["terminated"].float() if "terminated" in batch else torch.zeros_like(batch["rewards"])
        h, predicted = self.encode(obs[:, 0]).deterministic, []
        for t in range(1, rows):
            h = self.step(actions[:, t], h) * ~first[:, t, None]
            predicted.append(h)
            if t < self.config.observed:
                h = self.see(h, obs[:, t])
            else:  # a new episode cannot be foreseen
                h = torch.where(first[:, t, None], self.see(h, obs[:, t]), h)
        seen, reward, going_on = self.read(torch.stack(predicted, 1))
        known = (~first[:, 1:]).float()
        losses = {
            "obs_loss": (seen - symlog(obs[:, 1:])).square().mean(-1),
            "reward_loss": (reward - symlog(batch["rewards"][:, 1:].float())).square(),
            "continue_loss": F.binary_cross_entropy_with_logits(going_on, 1 - ends[:, 1:], reduction="none"),
        }
        means = {name: (loss * known).sum() / known.sum().clamp(min=1) for name, loss in losses.items()}
        return {"loss": sum(means.values()), **means}

    def describe(self):
        return {
            "family": __name__,  # by which every process of a run finds FAMILY below
            "obs_shape": list(self.obs_shape),
            "action_dim": self.action_dim,
            "episode_length": self.episode_length,
            "config": dataclasses.asdict(self.config),
        }

    def update_targets(self):
        """Do nothing: this model learns from no slow copies."""

    def save_pretrained(self, directory):
        save_model(directory, self.describe(), self)


class GRUAgent:
    """Acts by the cross-entropy method: draws plans, keeps those that the model likes best, draws around them."""

    behaviour, columns, random_warmup, pretrain, plans = None, {}, True, False, True
    default_precision, true_ends_hint = "float32", None

    def __init__(self, model, seed=0, action_classes=()):
        if action_classes:
            raise ValueError("the GRU family takes continuous actions, and this environment has choices.")
        self.world_model, self.config, c = model, model.config, model.config
        self.batch_size, self.windows = c.batch_size, WindowSpec(c.batch_length, context=1, crosses_episodes=False)
        self.train_ratio = float(c.batch_size * self.windows.trained)  # one update for each step
        self.updates, self.tally, self.device = 0, Tally(), model.step.bias_hh.device
        self.acting_generator = torch.Generator(self.device).manual_seed(seed)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=c.lr)

    def configure_learning(self, precision, compiled, capture=True):
        if precision != "float32":
            raise ValueError(f"train.precision is {precision!r}, expected float32.")

    @torch.no_grad()
    def act(self, obs, act_state, is_first, explore=True):
        model, c = self.world_model, self.config
        obs = torch.as_tensor(obs, device=self.device)
        kept = ~torch.as_tensor(is_first, device=self.device)[:, None]
        h, mean = model.initial_state(len(obs)).deterministic, torch.zeros(len(obs), c.horizon, model.action_dim)
        mean = mean.to(self.device)
        if act_state is not None:
            h = model.step(act_state["action"], act_state["h"]) * kept
            mean[:, :-1] = act_state["mean"][:, 1:] * kept[..., None]
        h = model.see(h, obs)
        mean = self.search(h, mean)
        noise = torch.randn(mean[:, 0].shape, generator=self.acting_generator, device=self.device)
        action = (mean[:, 0] + explore * c.noise * noise).clamp(-1, 1)
        return action.cpu().numpy(), {"h": h, "action": action, "mean": mean}

    def search(self, h, mean):
        """The mean of the best plans [E, H, A], from states h [E, D] and the mean of the plans before."""
        c, std = self.config, torch.ones_like(mean)
        start = LatentState(h.repeat_interleave(c.candidates, 0))
        discount = c.discount ** torch.arange(c.horizon, device=h.device)[:, None]
        for _ in range(c.rounds):
            noise = torch.randn(len(h), c.candidates, *mean.shape[1:], generator=self.acting_generator, device=h.device)
            plans = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)  # [E, N, H, A]
            dream = self.world_model.imagine(start, plans.flatten(0, 1).transpose(0, 1))
            alive = torch.cat([torch.ones_like(dream.continues[:1]), dream.continues[:-1]]).cumprod(0)
            returns = (discount[..., None] * alive * dream.rewards).sum(0).view(len(h), c.candidates)
            best = returns.topk(c.elites, 1).indices[..., None, None].expand(-1, -1, *mean.shape[1:])
            elites = plans.gather(1, best)
            mean, std = elites.mean(1), elites.std(1).clamp(min=0.05)
        return mean

    def replay_columns(self, act_state):
        return {}

    def learn(self, batch):
        loss = self.world_model.compute_loss({name: value.to(self.device) for name, value in batch.items()})
        self.optimizer.zero_grad()
        loss["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.world_model.parameters(), 10.0)
        made = torch.isfinite(norm)
        if made:
            self.optimizer.step()
        self.tally.add({**loss, "grad_norm": norm}, made)
        self.updates += 1
        return Columns({})

    def collect(self):
        return self.tally.read()

    def update(self, batch):
        columns = self.learn(batch)
        return self.collect(), columns.arrays()

    def acting_weights(self):
        return flatten(list(self.world_model.parameters()))

    def load_acting_weights(self, flat):
        load_flat(list(self.world_model.parameters()), flat)

    def describe(self):
        return self.world_model.describe()

    def state_dict(self):
        return {
            "model": self.world_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "acting_generator": self.acting_generator.get_state(),
        }

    def load_state_dict(self, state):
        self.world_model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.updates = int(state["updates"])
        self.acting_generator.set_state(state["acting_generator"])


FAMILY = Family(
    config=GRUConfig,
    sizes={"small": {}, "tiny": {"units": 16, "batch_size": 8, "batch_length": 6, "candidates": 16, "elites": 4}},
    default_size="small",
    model=GRUWorldModel,
    agent=GRUAgent,
    description="A GRU that predicts observations and rewards; acts by the cross-entropy method",
)
