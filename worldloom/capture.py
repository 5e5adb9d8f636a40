"""A function of tensors as one CUDA graph, so that the device waits for no launches; other devices run it as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

WARMUP = 2  # calls of each shape that run uncaptured, while libraries initialise themselves and compilers compile
SHAPES = 16  # graphs kept for one function; further shapes run uncaptured

ONE_AT_A_TIME = threading.Lock()  # a recording first waits for the device, which would break one in another thread

Tensors = dict[str, Tensor]


@dataclass
class Recording:
    """The calls so far with one set of shapes and, after WARMUP of them, the graph and the buffers that it uses."""

    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)


class Captured:
    """Calls `function(inputs, **settings)`, which takes and returns tensors by name and reads nothing back to the host.

    On CUDA the first calls of each shape run uncaptured, on a stream of their own. The next call records the function
    as a graph; this call and all later ones replay it. The outputs are buffers that the next call overwrites: keep
    their `own`. The function may change tensors outside of it (parameters, optimiser states) that stay at one address;
    call `forget` after they moved. generator: the source of the function's random numbers.
    """

    def __init__(self, function: Callable[..., Tensors], device: torch.device, generator: torch.Generator) -> None:
        self._function, self._device, self._generator = function, device, generator
        self.enabled = device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Drop all recordings, because tensors that the function uses were replaced by others."""
        self._recordings: dict[Hashable, Recording] = {}
        self._pool: Any = None

    def __call__(self, inputs: Mapping[str, Tensor], **settings: Hashable) -> Tensors:
        """Run the function; return its outputs by name, on the device. inputs may lie on the host, pinned or not."""
        if not self.enabled:
            return self._function(self._moved(inputs), **settings)
        recording = self._recording(inputs, settings)
        if recording is None or recording.calls < WARMUP:
            return self._run_beside(recording, inputs, settings)
        if recording.graph is None:
            self._record(recording, inputs, settings)
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

    def _run_beside(self, recording: Recording | None, inputs: Mapping[str, Tensor], settings: Any) -> Tensors:
        if recording is not None:
            recording.calls += 1
        current, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            outputs = self._function(self._moved(inputs), **settings)
        current.wait_stream(beside)
        for value in outputs.values():
            value.record_stream(current)
        return outputs

    def _record(self, recording: Recording, inputs: Mapping[str, Tensor], settings: Any) -> None:
        recording.inputs = {
            name: torch.empty(value.shape, dtype=value.dtype, device=self._device).copy_(value)
            for name, value in inputs.items()
        }
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        recording.graph = torch.cuda.CUDAGraph()
        recording.graph.register_generator_state(self._generator)
        with ONE_AT_A_TIME, torch.cuda.graph(recording.graph, pool=self._pool, capture_error_mode="thread_local"):
            recording.outputs = self._function(recording.inputs, **settings)
