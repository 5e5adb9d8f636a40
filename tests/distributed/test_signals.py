"""Which processes heed SIGTERM where the driver blocked it while it started its cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ACTOR = """
import multiprocessing, os, signal, subprocess, sys, time
from distributed.signals import outlive_sigterm, sigterm_blocked

def blocked():
    return signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])

if sys.argv[1] == "actor":
    assert blocked()
    os.kill(os.getpid(), signal.SIGTERM)
    outlive_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    started = subprocess.Popen(["sleep", "600"])
    started.terminate()
    assert started.wait() == -signal.SIGTERM
    fork = multiprocessing.get_context("fork")
    is_up = fork.Event()
    forked = fork.Process(target=lambda: (is_up.set(), time.sleep(600)))
    forked.start()
    is_up.wait()
    forked.terminate()
    forked.join()
    assert forked.exitcode == -signal.SIGTERM
else:
    with sigterm_blocked():
        actor = subprocess.Popen([sys.executable, __file__, "actor"])
    assert not blocked()
    assert actor.wait() == 0
    outlive_sigterm()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""


@pytest.mark.timeout(120)
def test_an_actor_outlives_sigterm_and_the_processes_that_it_starts_do_not(tmp_path):
    (tmp_path / "actor.py").write_text(ACTOR)
    done = subprocess.run(
        [sys.executable, tmp_path / "actor.py", "driver"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == -15, done.stderr  # the driver itself heeds it: nothing was blocked there
