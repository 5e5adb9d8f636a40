"""The sections of a run's configuration: every field with its type, default and unit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from worldloom.envs.suites import AtariConfig, DMCConfig
from worldloom.ranges import are_shares
from worldloom.report.boards import check_boards


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}, expected {expected}.")


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The environment.

    Args:
        id: Gymnasium id, module:id, or module:factory, a function or class that makes the environment
        num_envs: environments per env actor
        action_repeat: environment frames per agent step; rewards are summed
        frame_stack: frames that an image holds in its channels, the oldest first
        image_size: side of the square to which images are resized; null keeps their size (atari and dmc have their own)
        atari: frames and actions of ALE/ ids; others ignore it
        dmc: observations of dm_control/ ids; others ignore it
    """

    id: str = "Pendulum-v1"
    num_envs: int = 4
    action_repeat: int = 1
    frame_stack: int = 1
    image_size: int | None = None
    atari: AtariConfig = field(default_factory=AtariConfig)
    dmc: DMCConfig = field(default_factory=DMCConfig)

    def __post_init__(self) -> None:
        _require(self.num_envs >= 1, "env.num_envs", self.num_envs, "at least 1")
        _require(self.action_repeat >= 1, "env.action_repeat", self.action_repeat, "at least 1")
        _require(self.frame_stack >= 1, "env.frame_stack", self.frame_stack, "at least 1")

    def for_evaluation(self) -> EnvConfig:
        """Return the environment in which agents are judged: that of training, less what only training does."""
        return replace(self, atari=self.atari.for_evaluation())


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The replay buffer.

    Args:
        capacity: rows kept in all shards together; new rows replace the oldest
        shards: replay actors that share the rows; each env actor writes to one, so there may be at most one per actor
        recency: shares of each batch that come from equal parts of the windows of a shard by age, the oldest first, as
            [0.1, 0.1, 0.1, 0.7]; [] draws uniformly
    """

    capacity: int = 1_000_000
    shards: int = 1
    recency: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        _require(self.shards >= 1, "replay.shards", self.shards, "at least 1")
        _require(self.capacity >= 1, "replay.capacity", self.capacity, "at least 1 row")
        fits = not self.recency or are_shares(self.recency)
        _require(fits, "replay.recency", self.recency, "shares in [0, 1] that sum to 1, or []")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training: its length, its train ratio and how the learner computes.

    Args:
        total_steps: environment (agent) steps
        train_ratio: replayed steps per environment step; null takes the algorithm's own
        learning_starts: environment steps before the first update
        seed: seed of all random numbers
        device: device of the learner: auto, cpu or cuda, and inline also cuda:N; auto takes a GPU if there is one
        precision: precision of the learner's matrix products; auto takes that of the algorithm's authors on the device
        compile: run updates through torch.compile: the first takes about a minute longer, the rest are faster; auto
            does so on a GPU
        capture: on a GPU, run each update and each plan as one CUDA graph, which avoids waiting for kernel launches;
            auto does so
    """

    total_steps: int = 100_000
    train_ratio: float | None = None
    learning_starts: int = 1_000
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    capture: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _require(self.total_steps >= 1, "train.total_steps", self.total_steps, "at least 1")
        _require(
            self.train_ratio is None or self.train_ratio > 0, "train.train_ratio", self.train_ratio, "above 0, or null"
        )
        _require(self.learning_starts >= 0, "train.learning_starts", self.learning_starts, "0 or more")
        _require(self.seed >= 0, "train.seed", self.seed, "0 or more")


CHUNKS_PER_SECOND = 200  # of all env actors together, at most: each costs the coordinator about 1 ms


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The parts of a run: where they run, and how often they exchange data.

    Args:
        kind: ray, or inline for one process without Ray
        sync: alternate one vector step and every update that is due: with Ray this gives the same numbers as inline,
            and --resume goes on as if the run had never stopped (for this, open episodes are cut at each checkpoint)
        env_actors: remote actors, each with env.num_envs environments; 0 acts in the coordinator
        learners: learner actors that make every update together, each from its share of the batch and on a GPU of its
            own where there are GPUs; their number divides the batch. With train.device cuda:0 all share one GPU
        receipt_interval: updates between two comparisons of all that several learners hold
        acting: local: env actors hold a copy of the weights; server: they send observations, and one batched call acts
            for all; auto takes server for agents that plan, if the learner has a GPU
        acting_server: where the server runs: in the learner's process, or in an actor of its own
        acting_deadline: longest time in seconds from the first observation of a server's batch until the batch closes
        chunk_steps: vector steps per collect, more where over 200 chunks a second would arrive otherwise; a collect
            ends earlier after chunk_seconds
        chunk_seconds: longest time of a collect in seconds, longer with over 200 env actors for each of these seconds
        publish_interval: updates between two versions of the weights
        learner_threads: CPU threads of each learner; 0 takes those that the env actors leave (inline: torch's default)
        collect_timeout: seconds without an answer after which an env actor is replaced
        build_timeout: seconds after which an env actor that builds one environment is replaced
        silence_timeout: seconds without a heartbeat after which the learner, replay or acting server is replaced
        learner_timeout: longest time in seconds of one update, and of one exchange of several learners, once updates
            are compiled; then the learner is replaced
        replay_timeout: longest time in seconds of one call of replay; then this shard of replay is replaced
    """

    kind: Literal["ray", "inline"] = "ray"
    sync: bool = False
    env_actors: int = 2
    learners: int = 1
    receipt_interval: int = 100
    acting: Literal["auto", "local", "server"] = "auto"
    acting_server: Literal["learner", "actor"] = "learner"
    acting_deadline: float = 0.003
    chunk_steps: int = 64
    chunk_seconds: float = 1.0
    publish_interval: int = 50
    learner_threads: int = 0
    collect_timeout: float = 300.0
    build_timeout: float = 300.0
    silence_timeout: float = 60.0
    learner_timeout: float = 600.0
    replay_timeout: float = 600.0

    def __post_init__(self) -> None:
        _require(self.env_actors >= 0, "runtime.env_actors", self.env_actors, "0 or more")
        _require(self.learners >= 1, "runtime.learners", self.learners, "at least 1")
        _require(
            self.kind == "ray" or self.learners == 1,
            "runtime.learners",
            self.learners,
            "1 with runtime.kind inline: several are for Ray",
        )
        _require(self.receipt_interval >= 1, "runtime.receipt_interval", self.receipt_interval, "at least 1")
        _require(self.chunk_steps >= 1, "runtime.chunk_steps", self.chunk_steps, "at least 1")
        _require(self.chunk_seconds > 0, "runtime.chunk_seconds", self.chunk_seconds, "above 0")
        _require(self.publish_interval >= 1, "runtime.publish_interval", self.publish_interval, "at least 1")
        _require(self.learner_threads >= 0, "runtime.learner_threads", self.learner_threads, "0 or more")
        _require(self.acting_deadline >= 0, "runtime.acting_deadline", self.acting_deadline, "0 or more")
        _require(
            not (self.sync and self.acting == "server"),
            "runtime.acting",
            self.acting,
            "local or auto with runtime.sync",
        )
        for name in ("collect_timeout", "build_timeout", "silence_timeout", "learner_timeout", "replay_timeout"):
            _require(getattr(self, name) > 0, f"runtime.{name}", getattr(self, name), "above 0")

    @property
    def collect_seconds(self) -> float:
        """Seconds after which a collect ends: so many that not too many of them end each second."""
        return max(self.chunk_seconds, self.env_actors / CHUNKS_PER_SECOND)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation without exploration noise, on environments of its own.

    Args:
        interval: environment steps between two evaluations; 0 evaluates at the end only
        episodes: episodes per evaluation
    """

    interval: int = 10_000
    episodes: int = 10

    def __post_init__(self) -> None:
        _require(self.interval >= 0, "eval.interval", self.interval, "0 or more")
        _require(self.episodes >= 1, "eval.episodes", self.episodes, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        interval: environment steps between two checkpoints; 0 saves at the end only
        keep: number of newest checkpoints to keep
        compress: compress the rows of replay losslessly (zlib): images take less space, but longer to write
        on_error: when the disk is full or cannot be written: continue, and try again at the next interval, or stop the
            run
    """

    interval: int = 10_000
    keep: int = 3
    compress: bool = False
    on_error: Literal["continue", "stop"] = "continue"

    def __post_init__(self) -> None:
        _require(self.interval >= 0, "checkpoint.interval", self.interval, "0 or more")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics.

    Args:
        interval: environment steps between two lines of metrics
        picture_interval: environment steps between two pictures of imagination; 0 draws one at the end
        to: boards that show the metrics besides metrics.jsonl: tensorboard, wandb (Weights & Biases) and mlflow; the
            last two are the extras worldloom[wandb] and worldloom[mlflow]
    """

    interval: int = 1_000
    picture_interval: int = 0
    to: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        _require(self.picture_interval >= 0, "log.picture_interval", self.picture_interval, "0 or more")
        _require(self.interval >= 1, "log.interval", self.interval, "at least 1")
        check_boards(self.to)


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """A trained agent whose weights a run starts from, to fine-tune it; its network keeps its configuration.

    Args:
        checkpoint: run, model directory, or file of TD-MPC2's authors; a folder or URL; null begins with new weights
        like: of a multi-task checkpoint, the task whose embedding the task of this run starts from; null takes the task
            that is called like env.id
    """

    checkpoint: str | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        _require(self.like is None or self.checkpoint is not None, "start.like", self.like, "null without --from")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a whole run.

    Args:
        algorithm: a preset such as tdmpc2:5m, an alias, or module:size of a family of your own
        agent: fields that replace those of the preset's config
        protocol: paper: the published hyper-parameters; head: those of the authors' current code, if the preset has
            them
        storage: folder or URL (s3://bucket/runs) with a folder for each run; null takes $WORLDLOOM_STORAGE, else runs/
            or, in a Ray job, ~/worldloom/runs
    """

    algorithm: str = "tdmpc2:5m"
    agent: dict[str, Any] = field(default_factory=dict)
    protocol: Literal["paper", "head"] = "paper"
    storage: str | None = None
    start: StartConfig = field(default_factory=StartConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(
            self.train.learning_starts < self.train.total_steps,
            "train.learning_starts",
            self.train.learning_starts,
            f"less than train.total_steps={self.train.total_steps}",
        )
        _require(
            self.runtime.kind == "ray" or self.replay.shards == 1,
            "replay.shards",
            self.replay.shards,
            "1 with runtime.kind inline: several are for Ray, and a run that began with several goes on with Ray",
        )
        _require(
            self.replay.shards <= max(self.runtime.env_actors, 1),
            "replay.shards",
            self.replay.shards,
            f"at most runtime.env_actors={max(self.runtime.env_actors, 1)}, each of which writes to one shard",
        )
