"""When a function is recorded as a CUDA graph; stand-ins for torch.cuda write down what would happen on a GPU."""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from worldloom.capture import Captured

GENERATOR = torch.Generator()


class Log(list):
    """The entries so far; `note` adds how the function runs now."""


class StandInGraph:
    def register_generator_state(self, generator):
        assert generator is GENERATOR

    def replay(self):
        self.log.append("replay")


class StandInStream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, stream):
        assert isinstance(stream, StandInStream)


@pytest.fixture
def log(monkeypatch):
    """Return a list that grows by what happens: "call" or "record" where the function runs, and "replay"."""
    happened, recording = Log(), threading.local()

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        assert isinstance(stream, StandInStream)
        recording.on = True
        yield
        recording.on = False

    monkeypatch.setattr(StandInGraph, "log", happened, raising=False)
    for name, value in {
        "CUDAGraph": StandInGraph,
        "Stream": StandInStream,
        "current_stream": StandInStream,
        "stream": lambda _: contextlib.nullcontext(),
        "graph_pool_handle": lambda: "pool",
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    happened.note = lambda: happened.append("record" if getattr(recording, "on", False) else "call")
    return happened


def captured(function):
    made = Captured(function, torch.device("cpu"), GENERATOR)
    made.enabled = True
    return made


def given(rows=1):
    return {"x": torch.zeros(rows)}


def noting(log):
    def function(inputs):
        log.note()
        return {"y": inputs["x"] + 1}

    return captured(function)


def test_the_third_call_of_a_shape_is_recorded_and_later_ones_are_replayed(log):
    function = noting(log)
    for _ in range(4):
        assert function(given())["y"].tolist() == [1.0]
    function(given(2))
    assert log == ["call", "call", "record", "replay", "replay", "call"]


def test_a_thread_records_only_what_it_has_run_itself(log):
    function = noting(log)
    with contextlib.ExitStack() as held:  # cuBLAS makes a handle in each thread, which would break a recording
        threads = [held.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        for _ in range(2):
            for thread in threads:
                thread.submit(function, given()).result()
        assert log == ["call"] * 6
        threads[0].submit(function, given()).result()
        threads[1].submit(function, given()).result()
    function(given())  # a thread that never ran it
    assert log == ["call"] * 6 + ["record", "replay", "replay", "replay"]


def test_nothing_is_recorded_while_another_thread_runs_uncaptured(log):
    begun, goes_on = threading.Event(), threading.Event()

    def compiling(inputs):
        begun.set()
        assert goes_on.wait(60)
        return dict(inputs)

    function = noting(log)
    function(given())
    function(given())
    with ThreadPoolExecutor(1) as thread:
        other = thread.submit(captured(compiling), given())
        assert begun.wait(60)
        function(given())
        assert log == ["call"] * 3
        goes_on.set()
        other.result()
    function(given())
    assert log == ["call"] * 3 + ["record", "replay"]


def test_an_uncaptured_call_waits_for_a_recording(log):
    begun, goes_on, order = threading.Event(), threading.Event(), []

    def slow(inputs):
        log.note()
        if log[-1] == "record":
            begun.set()
            assert goes_on.wait(60)
            order.append("recorded")
        return dict(inputs)

    def other(inputs):
        order.append("called")
        return dict(inputs)

    function = captured(slow)
    with ThreadPoolExecutor(1) as recording, ThreadPoolExecutor(1) as calling:
        made = [recording.submit(function, given()) for _ in range(3)]
        assert begun.wait(60)
        called = calling.submit(captured(other), given())
        with pytest.raises(TimeoutError):
            called.result(0.2)
        goes_on.set()
        for each in [*made, called]:
            each.result()
    assert order == ["recorded", "called"]


def test_a_copy_makes_its_own_recordings(log):
    function = noting(log)
    for _ in range(3):
        function(given())
    del log[:]
    copied = copy.deepcopy(function)
    assert copied.enabled
    copied(given())
    function(given())
    assert log == ["call", "replay"]


@pytest.mark.gpu
def test_threads_that_take_turns_get_what_an_uncaptured_function_gives():
    """Ray's threads do so; a recording in a thread that has no cuBLAS handle yet fails."""
    device = torch.device("cuda")
    weights = torch.randn(64, 64, device=device)
    function = Captured(lambda inputs: {"y": inputs["x"] @ weights}, device, torch.Generator(device))
    with contextlib.ExitStack() as held:
        threads = [held.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        for _ in range(4):
            for thread in threads:
                x = torch.randn(8, 64)
                found = thread.submit(lambda x=x: function({"x": x})["y"].cpu()).result()
                torch.testing.assert_close(found, x @ weights.cpu(), atol=1e-2, rtol=1e-2)  # TF32
    assert any(recording.graph is not None for recording in function._recordings.values())
