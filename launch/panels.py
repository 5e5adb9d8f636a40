"""The panels of the Grafana board, row by row, with their PromQL."""

from __future__ import annotations

from dataclasses import dataclass

from distributed.metrics import LOGGED_AT, gauge_name

SESSION = 'SessionName=~"$SessionName"'  # $SessionName and $run are chosen on the board
COUNT, SHARE, PERCENT, SECONDS = "short", "percentunit", "percent", "s"  # Grafana's names of units; a share is 0 to 1


@dataclass(frozen=True)
class Panel:
    """A panel of curves: PromQL by legend, and what a reader should know. top: where the axis ends."""

    title: str
    about: str
    unit: str
    lines: dict[str, str]
    top: float | None = None
    stacked: bool = False  # the curves add up


@dataclass(frozen=True)
class Stat:
    """A panel of the newest number, or of the newest word, which is then the legend. red_from: a value that is bad."""

    title: str
    about: str
    unit: str
    query: str
    word: str = ""
    red_from: float | None = None


def series(metric: str) -> str:
    """Return PromQL for the series of a metric of metrics.jsonl."""
    return f'{gauge_name(metric)}{{{SESSION}, run="$run"}}'


def value(metric: str) -> str:
    """Return PromQL for its value. A run that was resumed has two series for some seconds."""
    return f"max({series(metric)})"


def each(prefix: str, ending: str = "") -> str:
    """Return PromQL for all metrics whose names begin and end so, told apart by the label `metric`: what is between."""
    pattern = f"{gauge_name(prefix)}(.*{ending})"
    found = f'{{__name__=~"{pattern}", {SESSION}, run="$run"}}'
    return f'max by (metric) (label_replace({found}, "metric", "$1", "__name__", "{pattern}"))'


def of_nodes(metric: str) -> str:
    """Return PromQL for what Ray exports of each node."""
    return f"max by (ip) (ray_{metric}{{{SESSION}}})"


def of_gpus(metric: str) -> str:
    """Return PromQL for what Ray exports of each GPU."""
    return f"max by (ip, GpuIndex) (ray_{metric}{{{SESSION}}})"


LIMIT = "max by (limited_by) (" + series("limited_by") + ") == 1"
LIMITS = "sum by (limited_by) (sum_over_time(" + series("limited_by") + "[5m]))"

GLANCE = [
    Stat("Steps", "Environment steps so far.", COUNT, value("env_steps")),
    Stat("Return", "Mean of the last 20 training episodes.", COUNT, value("episode/return")),
    Stat("Evaluation", "Mean return of the newest evaluation.", COUNT, value("eval/return_mean")),
    Stat("Steps/s", "Environment steps per second.", COUNT, value("rate/env_steps_per_second")),
    Stat("Limited by", "What limited the run since the last log line.", COUNT, LIMIT, word="{{limited_by}}"),
    Stat(
        "Faults", "Failures, restarts and losses of all kinds. 0 is good.", COUNT, f"sum({each('count/')})", red_from=1
    ),
    Stat(
        "Checkpoint age",
        "Since the newest checkpoint, at the last log line: what a crash would cost.",
        SECONDS,
        value("checkpoint/age_seconds"),
        red_from=3600,
    ),
    Stat(
        "Silent for",
        "Since the last line of metrics. A run that hangs turns red.",
        SECONDS,
        f"time() - {value(LOGGED_AT)}",
        red_from=600,
    ),
]

LEARNING = [
    Panel(
        "Return",
        "Training episodes (mean of the last 20) and evaluations. It should rise.",
        COUNT,
        {
            "training": value("episode/return"),
            "evaluation": value("eval/return_mean"),
            "spread of evaluation": value("eval/return_std"),
        },
    ),
    Panel(
        "Losses",
        "Means between two log lines. Losses of the world model should fall, then stay.",
        COUNT,
        {"{{metric}}": each("learner/", "loss")},
    ),
    Panel(
        "Norm of gradients",
        "Before clipping. A steady rise is the first sign of divergence.",
        COUNT,
        {"{{metric}}": each("learner/", "grad_norm")},
    ),
]

SPEED = [
    Panel("Steps per second", "Since the last log line.", COUNT, {"steps/s": value("rate/env_steps_per_second")}),
    Panel("Updates per second", "Since the last log line.", COUNT, {"updates/s": value("rate/updates_per_second")}),
    Panel(
        "What limits it",
        "Share of the last five minutes, by what limited the run.",
        SHARE,
        {"{{limited_by}}": f"{LIMITS} / scalar(sum({LIMITS}))"},
        top=1,
        stacked=True,
    ),
    Panel(
        "The learner's time",
        "Share in which it learns (1: it never waits), and in which it publishes weights.",
        SHARE,
        {"learning": value("rate/learner_busy_fraction"), "publishing": value("weights/publish_fraction")},
        top=1,
    ),
    Panel(
        "Train ratio",
        "Replayed steps per environment step. At its target once learning runs.",
        COUNT,
        {"train ratio": value("rate/train_ratio")},
    ),
    Panel(
        "Waiting",
        "Seconds since the last log line in which env actors were held back, the learner was idle, and environments "
        "waited for actions.",
        SECONDS,
        {
            "env actors held back": value("wait/collecting_seconds"),
            "learner idle": value("wait/learning_seconds"),
            "waiting for actions": value("wait/acting_seconds"),
        },
    ),
]

LOSSES = [
    Panel("Faults and losses", "Over the whole run. All at 0 is good.", COUNT, {"{{metric}}": each("count/")}),
    Panel(
        "Skipped updates",
        "Share of the updates that were not finite and so changed nothing. 0 is good.",
        SHARE,
        {"skipped": value("learner/skipped_updates")},
        top=1,
    ),
    Panel(
        "Checkpoints",
        "Seconds since the newest one, that it took, and for which learning stopped.",
        SECONDS,
        {
            "age": value("checkpoint/age_seconds"),
            "took": value("checkpoint/seconds"),
            "learning stopped": value("checkpoint/paused_seconds"),
        },
    ),
]

DATA = [
    Panel(
        "Replay filled",
        "Share of its capacity; of several shards the fullest. At 1 the oldest rows go.",
        SHARE,
        {"filled": value("replay/filled_fraction")},
        top=1,
    ),
    Panel(
        "Drawing a batch",
        "Seconds for one batch: the median, and at most for 95 % of them.",
        SECONDS,
        {"p50": value("replay/sample_seconds_p50"), "p95": value("replay/sample_seconds_p95")},
    ),
    Panel(
        "Age of the weights that act, in publishes",
        "For 95 % of the chunks at most this.",
        COUNT,
        {"p95": value("weights/staleness_p95")},
    ),
    Panel(
        "Age of the weights that act, in seconds",
        "Seconds for which newer weights existed; for 95 % of the chunks at most this.",
        SECONDS,
        {"p95": value("weights/staleness_seconds_p95")},
    ),
    Panel(
        "Acting server: batches filled",
        "Share of their places; evaluations may take it above 1. Empty without an acting server.",
        SHARE,
        {"filled": value("acting/batch_fill")},
    ),
    Panel(
        "Acting server: one batch",
        "Seconds that one batch of actions takes. Empty without an acting server.",
        SECONDS,
        {"one batch": value("acting/seconds")},
    ),
]

CLUSTER = [
    Panel(
        "Object store: used",
        "Share of the stores of all nodes together.",
        SHARE,
        {"used": value("plasma/used_fraction")},
        top=1,
    ),
    Panel(
        "Object store: put in per second",
        "Chunks, batches and weights.",
        "Bps",
        {"put in": value("plasma/bytes_per_second")},
    ),
    Panel(
        "Object store: spilled to disk",
        "Since the cluster began. Anything but 0: the store is too small.",
        "bytes",
        {"spilled": value("plasma/spilled_bytes")},
    ),
    Panel("CPU", "Of each node, all programs.", PERCENT, {"{{ip}}": of_nodes("node_cpu_utilization")}, top=100),
    Panel(
        "Memory",
        "Share in use on each node. Ray ends workers from 95 % on.",
        SHARE,
        {"{{ip}}": f"{of_nodes('node_mem_used')} / {of_nodes('node_mem_total')}"},
        top=1,
    ),
    Panel(
        "GPU: busy",
        "Share of the time in which a kernel ran, all programs. Empty without a GPU.",
        PERCENT,
        {"{{ip}} GPU {{GpuIndex}}": of_gpus("node_gpus_utilization")},
        top=100,
    ),
    Panel(
        "GPU: memory in use",
        "All programs. Empty without a GPU.",
        "mbytes",
        {"{{ip}} GPU {{GpuIndex}}": of_gpus("node_gram_used")},
    ),
]

ROWS: dict[str, list[Stat] | list[Panel]] = {
    "At a glance": GLANCE,
    "Is it learning?": LEARNING,
    "How fast, and what limits it?": SPEED,
    "Is anything being lost?": LOSSES,
    "Replay, and the weights that act": DATA,
    "Cluster": CLUSTER,
}
