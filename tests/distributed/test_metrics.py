"""What a run exports to Ray, for the dashboard and Prometheus."""

import contextlib
import time
from types import SimpleNamespace

import pytest

from distributed import metrics
from distributed.metrics import RayGauges, gauge_name
from distributed.saving import Checkpoints
from worldloom.report.sinks import MetricsLogger


@pytest.fixture
def exported(monkeypatch):
    """The values of all gauges: by the name in Prometheus, or that and a word."""
    values = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name, self.keys = f"ray_{name}", tag_keys

        def set_default_tags(self, tags):
            self.tags = tags

        def set(self, value, tags=None):
            assert set(self.tags) | set(tags or {}) == set(self.keys)
            values[(self.name, *(tags or {}).values())] = value

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    return values


def test_every_number_of_a_line_is_exported_with_its_counts_and_time(exported, tmp_path):
    logger, before = MetricsLogger(tmp_path, [RayGauges("mine")]), time.time()
    logger.write(50, 7, 1.5, {"rate/train_ratio": 12.0})
    logger.close()
    assert before <= exported.pop(("ray_worldloom_logged_at",)) <= time.time()
    names = {"env_steps": 50, "updates": 7, "wall_seconds": 1.5, "rate/train_ratio": 12.0}
    assert exported == {(gauge_name(name),): value for name, value in names.items()}
    assert gauge_name("rate/train_ratio") == "ray_worldloom_rate_train_ratio"


def test_a_word_is_1_while_it_holds_and_0_afterwards(exported):
    gauges = RayGauges("mine")
    for word in ("environments (warm-up)", "learner", "learner"):
        gauges({"limited_by": word})
    assert exported["ray_worldloom_limited_by", "environments (warm-up)"] == 0
    assert exported["ray_worldloom_limited_by", "learner"] == 1


def test_the_age_of_the_newest_checkpoint_begins_again_with_each(monkeypatch):
    clock, recorded = SimpleNamespace(now=100.0), {}
    monkeypatch.setattr("distributed.saving.time", SimpleNamespace(monotonic=lambda: clock.now))
    run = SimpleNamespace(saving=contextlib.nullcontext, recorder=SimpleNamespace(gauges=recorded.update))
    config = SimpleNamespace(checkpoint=SimpleNamespace(keep=1))
    checkpoints = Checkpoints(SimpleNamespace(run=run, config=config), None, None)
    clock.now = 107.0
    assert checkpoints.age == 7  # since the start, as there is none yet
    checkpoints.saving = SimpleNamespace(advance=lambda ready: True, paused=0.5, seconds=2.0)
    checkpoints.take([])
    assert recorded == {"checkpoint/paused_seconds": 0.5, "checkpoint/seconds": 2.0, "checkpoint/age_seconds": 0}
    clock.now = 110.0
    assert checkpoints.age == 3
