"""Heartbeats: learner, replay and acting server must answer, and get on with their work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from distributed.launcher import ActorLost, Launcher
from worldloom.runs.config import RuntimeConfig

LOOK_SECONDS = 0.5  # between two looks
BEAT_SECONDS = 2.0  # between an answer and the next question
SILENT_SECONDS = 10.0  # without an answer, after which a part is named on screen
PREPARE_SECONDS = 3600.0  # for a call in which the learner compiles


@dataclass
class Heart:
    """One part's heartbeat."""

    name: str
    handle: Any
    work_seconds: float  # bound on one call, or on one update of the learner
    asked: Any = None  # a reference to the answer that is waited for
    since: float = field(default_factory=time.monotonic)  # when it was asked, or when the last answer came
    named: bool = False  # on screen, in this silence


class Watch:
    """Asks every part for its pulse, without waiting for the answers, and ends parts that are past a bound.

    say: shows a line to the user.
    """

    def __init__(self, runtime: RuntimeConfig, launcher: Launcher, say: Callable[[str], None]) -> None:
        self._runtime, self._launcher, self._say = runtime, launcher, say
        self._hearts: dict[str, Heart] = {}
        self._lost: dict[str, ActorLost] = {}  # found, and not raised yet
        self._deferring = False
        self._looked = 0.0

    def follow(self, name: str, handle: Any, work_seconds: float) -> None:
        """Watch this actor from now on; it takes the place of an earlier one of that name."""
        self._hearts[name] = Heart(name, handle, work_seconds)

    def forget(self, name: str) -> None:
        """Watch this actor no more, since another one is started in its place."""
        self._hearts.pop(name, None)
        self._lost.pop(name, None)

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Raise nothing inside; a loss that is found there is raised by the first `look` afterwards.

        A recovery must not be left half-way for another loss: what it had started would stay unrestored.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def look(self) -> None:
        """Ask, and take answers that are there. Raises ActorLost for a part that was ended, or has died."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for heart in list(self._hearts.values()):
            if heart.asked is None:
                if now - heart.since >= BEAT_SECONDS:
                    heart.asked, heart.since = heart.handle.pulse.remote(), now
            elif ray.wait([heart.asked], timeout=0)[0]:
                self._take(heart, now)
            else:
                self._silent(heart, now - heart.since)
        if self._lost and not self._deferring:
            raise self._lost.pop(next(iter(self._lost)))

    def _take(self, heart: Heart, now: float) -> None:
        try:
            seconds, preparing = ray.get(heart.asked)
        except RayError as error:
            self._lose(heart, f"{heart.name}: died ({type(error).__name__}).")
            return
        silence, heart.asked, heart.since = now - heart.since, None, now
        if heart.named:
            heart.named = False
            self._say(f"{heart.name} answers again after {silence:.0f} s")
        if seconds > (PREPARE_SECONDS if preparing else heart.work_seconds):
            self._end(heart, f"was at one call for {seconds:.0f} s")

    def _silent(self, heart: Heart, seconds: float) -> None:
        if seconds > SILENT_SECONDS and not heart.named:
            heart.named = True
            self._say(
                f"{heart.name} has not answered for {seconds:.0f} s; it is replaced after "
                f"{self._runtime.silence_timeout:g} s (runtime.silence_timeout)"
            )
        if seconds > self._runtime.silence_timeout:
            self._end(heart, f"gave no answer for {seconds:.0f} s")

    def _end(self, heart: Heart, why: str) -> None:
        self._launcher.end(heart.handle)
        self._lose(heart, f"{heart.name} {why} and was ended.")

    def _lose(self, heart: Heart, why: str) -> None:
        del self._hearts[heart.name]
        self._lost[heart.name] = ActorLost(why)
