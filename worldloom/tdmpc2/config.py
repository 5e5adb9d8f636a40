"""TD-MPC2's numbers: the five published sizes and every hyper-parameter, with the paper's defaults."""

from __future__ import annotations

from dataclasses import dataclass

from worldloom.ranges import (
    COUNT,
    FINITE,
    NATURAL,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SHARE,
    Range,
    check_ranges,
    require,
)

SIZES: dict[str, dict[str, int]] = {  # paper, table 8
    "1m": {"encoder_dim": 256, "mlp_dim": 384, "latent_dim": 128, "encoder_layers": 2, "num_q": 2},
    "5m": {"encoder_dim": 256, "mlp_dim": 512, "latent_dim": 512, "encoder_layers": 2, "num_q": 5},
    "19m": {"encoder_dim": 1024, "mlp_dim": 1024, "latent_dim": 768, "encoder_layers": 3, "num_q": 5},
    "48m": {"encoder_dim": 1792, "mlp_dim": 1792, "latent_dim": 768, "encoder_layers": 4, "num_q": 5},
    "317m": {"encoder_dim": 4096, "mlp_dim": 4096, "latent_dim": 1376, "encoder_layers": 5, "num_q": 8},
}


RANGES: dict[str, Range] = {
    **dict.fromkeys(("encoder_dim", "mlp_dim", "latent_dim", "encoder_layers", "simnorm_dim", "batch_size"), COUNT),
    **dict.fromkeys(("horizon", "iterations", "num_samples", "num_elites"), COUNT),
    **dict.fromkeys(("task_dim", "num_pi_trajs"), NATURAL),
    **dict.fromkeys(("bin_limit", "lr", "grad_clip", "discount_denominator", "min_std", "max_std"), POSITIVE),
    **dict.fromkeys(("consistency_coef", "reward_coef", "value_coef", "termination_coef"), NOT_NEGATIVE),
    **dict.fromkeys(("entropy_coef", "encoder_lr_scale", "temperature"), NOT_NEGATIVE),
    **dict.fromkeys(("discount", "discount_min", "discount_max"), PROBABILITY),
    **dict.fromkeys(("log_std_min", "log_std_max"), FINITE),
    "num_q": Range(2),  # targets take the minimum of two heads
    "num_bins": Range(3),  # scalar heads are not supported
    "dropout": SHARE,
    "rho": Range(0, 1, low_open=True),
    "tau": Range(0, 1, low_open=True),
    "min_probability": Range(0, 1, low_open=True),
}


@dataclass(frozen=True, kw_only=True)
class TDMPC2Config:
    """The settings of TD-MPC2; defaults are the reference's for one task with states (Hansen et al. 2024, table 9)."""

    # Networks
    encoder_dim: int = 256  # width of the encoder's hidden layers
    mlp_dim: int = 512  # width of every other hidden layer
    latent_dim: int = 512  # D, size of a latent, a multiple of simnorm_dim
    encoder_layers: int = 2  # layers of the encoder, the last one included
    num_q: int = 5  # N, value heads
    simnorm_dim: int = 8  # entries per softmax group
    num_bins: int = 101  # K, two-hot bins
    bin_limit: float = 10.0  # bins span [-bin_limit, bin_limit] in symlog space
    dropout: float = 0.01  # probability of dropout in the first layer of each value head, in training
    log_std_min: float = -10.0  # lower bound of the policy's log standard deviation
    log_std_max: float = 2.0  # upper bound of the policy's log standard deviation
    episodic: bool = False  # learn a termination head, for tasks with true ends
    task_dim: int = 0  # T, size of the task embedding; 0 for a single task
    given_tasks: bool = False  # task embeddings are given, of any norm, and not learned: Newt's vectors of language
    augment_eval: bool = True  # shift images at random in acting and evaluation too, as the authors' code does
    symlog_obs: bool = False  # take symlog of vectors first, as in the authors' files from before their code was public

    # Learning
    batch_size: int = 256  # B, windows per update
    horizon: int = 3  # H, steps trained and planned
    rho: float = 0.5  # weight of step t in the losses is rho^t
    consistency_coef: float = 20.0  # weight of the latent prediction error
    reward_coef: float = 0.1  # weight of the reward loss
    value_coef: float = 0.1  # weight of the value loss
    termination_coef: float = 1.0  # weight of the termination loss
    entropy_coef: float = 1e-4  # weight of the entropy bonus in the policy loss
    lr: float = 3e-4  # learning rate of Adam
    encoder_lr_scale: float = 0.3  # the encoder learns at lr times this
    grad_clip: float = 20.0  # limit of the gradient's global norm
    tau: float = 0.01  # share of the way that target value heads and value scale move per update
    discount: float | None = None  # gamma; null derives it from the episode length
    discount_denominator: float = 5.0  # an episode is this many effective horizons long
    discount_min: float = 0.95  # lower bound of the derived discount
    discount_max: float = 0.995  # its upper bound, and the discount if no episode length is known
    pretrain: bool = True  # one update per warm-up step when learning starts

    # Planning (MPPI)
    mpc: bool = True  # plan; otherwise act with the policy
    iterations: int = 6  # iterations per plan; 2 more with 20 or more action dimensions
    num_samples: int = 512  # sequences per iteration, the policy's included
    num_elites: int = 64  # best sequences that the next iteration is fitted to
    num_pi_trajs: int = 24  # sequences from the policy
    temperature: float = 0.5  # factor of values in the weights of elites, exp(temperature * value)
    min_std: float = 0.05  # smallest standard deviation of sampled actions
    max_std: float = 2.0  # largest one, and that of the first iteration
    min_probability: float = 0.1  # share of discrete plans that stays uniform (an extension, not published)

    # What trained weights fit: the shapes of parameters, and what the networks compute with them
    network_fields = (
        "encoder_dim", "mlp_dim", "latent_dim", "encoder_layers", "num_q", "simnorm_dim", "num_bins", "bin_limit",
        "log_std_min", "log_std_max", "episodic", "task_dim", "given_tasks", "symlog_obs",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        for name, holds, expected in (
            ("latent_dim", self.latent_dim % self.simnorm_dim == 0, f"a multiple of simnorm_dim={self.simnorm_dim}"),
            ("num_pi_trajs", self.num_pi_trajs < self.num_samples, f"less than num_samples={self.num_samples}"),
            ("num_elites", self.num_elites <= self.num_samples, f"at most num_samples={self.num_samples}"),
            ("min_std", self.min_std <= self.max_std, f"at most max_std={self.max_std}"),
            ("log_std_min", self.log_std_min < self.log_std_max, f"less than log_std_max={self.log_std_max}"),
            ("discount_min", self.discount_min <= self.discount_max, f"at most discount_max={self.discount_max}"),
        ):
            require(self, holds, name, expected)

    def discount_for(self, episode_length: int | None) -> float:
        """Return gamma for episodes of that many agent steps (Hansen et al. 2024); the largest if not known.

        gamma = (h - 1) / h between discount_min and discount_max, with h = episode_length / discount_denominator.
        """
        if self.discount is not None:
            return self.discount
        if episode_length is None:
            return self.discount_max
        horizon = episode_length / self.discount_denominator
        return min(max((horizon - 1) / horizon, self.discount_min), self.discount_max)
