"""The progress line: what fits which width, what limits a run, and the time left."""

import io
import time

import pytest
from rich.console import Console

from worldloom.report.display import Standing, run_line
from worldloom.report.timing import LIMITS, Timing
from worldloom.runs.limiter import RateLimiter


def standing(**changes):
    shares = dict.fromkeys(LIMITS, 0.0) | {"environments": 0.64, "learner": 0.36}
    facts = {"env_steps": 16_000, "updates": 24_000, "seconds": 700.0, "seconds_left": 754.0, "steps_per_second": 43.2,
             "last_return": -123.4, "eval_return": -120.1, "limits": shares}  # fmt: skip
    return Standing(**{**facts, **changes})


def on_a_terminal(width, line):
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None, legacy_windows=False)
    console.print(line)
    return console.file.getvalue().rstrip("\n")


def test_eighty_columns_show_bar_count_time_left_return_and_what_limits_the_run():
    shown = on_a_terminal(80, run_line(standing(), 100_000))
    assert shown == "━━──────── 16,000/100,000 · ETA 12:34 · return -123.4 · limit: environments 64%"


def test_a_hundred_and_twenty_columns_show_more():
    shown = on_a_terminal(120, run_line(standing(), 100_000))
    for words in ("━━────────", "16,000/100,000", "ETA 12:34", "43 steps/s", "return -123.4", "eval -120.1"):
        assert words in shown
    assert shown.endswith("limit: environments 64%, learner 36%")


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_long_runs_fit_every_width(width):
    large = standing(env_steps=9_999_999, updates=99_999_999, seconds_left=360_000.0, last_return=-12_345.6)
    shown = on_a_terminal(width, run_line(large, 10_000_000))
    assert len(shown) <= width
    assert "ETA 100:00:00" in shown
    assert "9,999,999/10,000,000" in shown or width < 80
    assert "environments 64%" in shown or width < 60
    assert "…" not in shown


def test_the_warm_up_is_named_without_a_share_and_has_no_time_left():
    shown = on_a_terminal(80, run_line(standing(limits={"warm-up": 1.0}, seconds_left=None, last_return=None), 100_000))
    assert "ETA -:--" in shown
    assert shown.endswith("limit: warm-up")


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still unless the test moves it: `clock.now`."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_shares_of_what_limits_a_run_add_up_with_the_warm_up_apart(clock):
    timing = Timing(0.0, (0, 0))
    clock.now += 10
    assert timing.shares()["warm-up"] == 1.0
    timing.end_warm_up((100, 0))
    clock.now += 10
    timing.spend("learning", 6.0)
    timing.spend("held", 2.0)
    shares = timing.shares()
    assert shares == pytest.approx({"learner": 0.2, "ratio": 0.1, "environments": 0.2, "replay": 0.0, "warm-up": 0.5})
    timing.mark((100, 10))
    clock.now += 20
    timing.spend("held", 5.0)  # with an idle learner
    assert timing.shares() == pytest.approx(
        {"learner": 0.0, "ratio": 0.0, "environments": 0.75, "replay": 0.25, "warm-up": 0.0}
    )
    assert timing.shares(longer=True)["warm-up"] == pytest.approx(0.25)
    timing.mark((200, 20))
    assert sum(timing.limits().values()) == pytest.approx(1.0, abs=2e-3)
    assert timing.limits()["warm-up"] == 0.25


def test_the_time_left_counts_the_updates_that_the_limiter_still_owes(clock):
    """A warm-up of 1,000 steps at 1 ms, then 1,000 updates of 50 ms that they owe, then both in turn."""
    limiter = RateLimiter(train_ratio=16, replayed_per_update=16, learning_starts=1_000, pretrain=True)
    timing, total = Timing(0.0, (0, 0)), 5_000

    def left():
        counts = limiter.env_steps, limiter.updates
        return timing.seconds_left(total - limiter.env_steps, limiter.updates_left(total), counts)

    clock.now += 1.0
    limiter.env_steps = 1_000
    timing.end_warm_up((1_000, 0))
    assert left() is None
    for number in range(100):
        seconds = 0.05 if number else 60.0  # the first one compiles
        clock.now += seconds
        limiter.updates += 1
        timing.spend("learning", seconds)
        timing.end_first_updates((1_000, limiter.updates))
        assert (left() is None) == (number == 0)
    assert limiter.updates_left(total) == 4_900
    assert left() == pytest.approx(4_900 * 0.05 + 4_000 * 0.001)
    timing.mark((1_000, 100))
    while limiter.env_steps < 2_000:  # a resume would not owe the burst; here it is made first
        if limiter.updates_due():
            clock.now += 0.05
            limiter.updates += 1
            timing.spend("learning", 0.05)
        else:
            clock.now += 0.002
            limiter.env_steps += 1
    assert left() == pytest.approx(3_001 * 0.05 + 3_000 * 0.002)


def test_learning_and_collecting_at_the_same_time_are_not_added_up(clock):
    limiter = RateLimiter(train_ratio=16, replayed_per_update=16, learning_starts=0, pretrain=False)
    timing = Timing(0.0, (0, 0))
    timing.end_warm_up((0, 0))
    timing.end_first_updates((0, 0))
    limiter.env_steps, limiter.updates = 100, 100
    clock.now += 10.0  # the learner was busy all the time, while actors collected
    timing.spend("learning", 10.0)
    assert timing.seconds_left(900, limiter.updates_left(1_000), (100, 100)) == pytest.approx(90.0)
