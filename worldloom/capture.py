"""A function of tensors as one CUDA graph, so that the device waits for no launches; other devices run it as it is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WARMUP = 2  # calls of each shape in one thread that run uncaptured: libraries initialise themselves, compilers compile
SHAPES = 16  # graphs kept for one function; further shapes run uncaptured

Tensors = dict[str, Tensor]


@dataclass
class Turns:
    """Keeps recordings and uncaptured calls of different threads apart: a wait for the whole device breaks a recording.

    A recording begins with such a wait, and uncaptured calls may contain one, as libraries initialise themselves.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)  # held while a recording is made
    uncaptured: int = 0  # calls that run now

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Open a context in which nothing is recorded. Waits for the recording that is being made."""
        with self.lock:
            self.uncaptured += 1
        try:
            yield
        finally:
            with self.lock:
                self.uncaptured -= 1


TURNS = Turns()


@dataclass
class Recording:
    """The calls so far with one set of shapes and, after WARMUP of them, the graph and the buffers that it uses.

    Calls are counted in each thread: cuBLAS has handles for each, and making one breaks the recording.
    """

    thread: threading.local = field(default_factory=threading.local)
    graph: torch.cuda.CUDAGraph | None = None
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)

    @property
    def warm(self) -> bool:
        """Return whether the current thread has run the function often enough to record it."""
        return getattr(self.thread, "calls", 0) >= WARMUP

    def count(self) -> None:
        self.thread.calls = getattr(self.thread, "calls", 0) + 1


class Captured:
    """Calls `function(inputs, **settings)`, which takes and returns tensors by name and reads nothing back to the host.

    On CUDA the first calls of each shape run uncaptured, on a stream of their own. The next call of a thread that made
    some of them records the function as a graph; this call and all later ones, of any thread, replay it. The outputs
    are buffers that the next call overwrites: keep their `own`. The function may change tensors outside of it
    (parameters, optimiser states) that stay at one address; call `forget` after they moved. generator: the source of
    the function's random numbers.
    """

    def __init__(self, function: Callable[..., Tensors], device: torch.device, generator: torch.Generator) -> None:
        self._function, self._device, self._generator = function, device, generator
        self.enabled = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Drop all recordings, because tensors that the function uses were replaced by others."""
        self._recordings: dict[Hashable, Recording] = {}
        self._pool: Any = None
        self._beside: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what uses the tensors of the original."""
        return {**self.__dict__, "_recordings": {}, "_pool": None, "_beside": None}

    def __call__(self, inputs: Mapping[str, Tensor], **settings: Hashable) -> Tensors:
        """Run the function; return its outputs by name, on the device. inputs may lie on the host, pinned or not."""
        if not self.enabled:
            return self._function(self._moved(inputs), **settings)
        recording = self._recording(inputs, settings)
        if recording is None:
            return self._run_beside(inputs, settings)
        if recording.graph is None:
            if not (recording.warm and self._record(recording, inputs, settings)):
                outputs = self._run_beside(inputs, settings)
                recording.count()
                return outputs
        else:
            for name, value in inputs.items():
                recording.inputs[name].copy_(value, non_blocking=True)
        assert recording.graph is not None
        recording.graph.replay()
        return recording.outputs

    def own(self, outputs: Tensors) -> Tensors:
        """Return outputs that the next call leaves as they are: copies, where it would overwrite them."""
        return {name: value.clone() for name, value in outputs.items()} if self.enabled else dict(outputs)

    def _moved(self, inputs: Mapping[str, Tensor]) -> Tensors:
        return {name: value.to(self._device, non_blocking=True) for name, value in inputs.items()}

    def _recording(self, inputs: Mapping[str, Tensor], settings: Mapping[str, Hashable]) -> Recording | None:
        shapes = tuple((name, value.shape, value.dtype) for name, value in inputs.items())
        key = (shapes, tuple(settings.items()))
        if key not in self._recordings and len(self._recordings) >= SHAPES:
            return None
        return self._recordings.setdefault(key, Recording())

    def _run_beside(self, inputs: Mapping[str, Tensor], settings: Any) -> Tensors:
        current, beside = torch.cuda.current_stream(self._device), self._stream()
        beside.wait_stream(current)
        with TURNS.call(), torch.cuda.stream(beside):
            outputs = self._function(self._moved(inputs), **settings)
        current.wait_stream(beside)
        for value in outputs.values():
            value.record_stream(current)
        return outputs

    def _stream(self) -> torch.cuda.Stream:
        """Return the stream of uncaptured calls and recordings: one, as torch has 32, which it hands out in turn."""
        self._beside = self._beside or torch.cuda.Stream(self._device)
        return self._beside

    def _record(self, recording: Recording, inputs: Mapping[str, Tensor], settings: Any) -> bool:
        """Record the function, unless another thread runs one uncaptured; return whether this was done."""
        with TURNS.lock:
            if TURNS.uncaptured:
                return False
            recording.inputs = {
                name: torch.empty(value.shape, dtype=value.dtype, device=self._device).copy_(value)
                for name, value in inputs.items()
            }
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream(), capture_error_mode="thread_local"):
                recording.outputs = self._function(recording.inputs, **settings)
            recording.graph = graph
        return True
