"""Whose run directory it is, as `launch.status` and later runs see it."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from launch import claim
from launch.claim import Claim, Holder, holder_of, silence


def test_a_claim_is_taken_again_where_the_directory_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.05)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Claim(run_dir, ""):
        shutil.rmtree(run_dir)
        run_dir.mkdir()
        deadline = time.monotonic() + 60
        while holder_of(run_dir) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder_of(run_dir).pid == os.getpid()
        with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on"), Claim(run_dir, ""):
            pass
    assert holder_of(run_dir) is None


def test_a_process_on_another_machine_is_known_by_its_heartbeat(tmp_path):
    holder = Holder("elsewhere", os.getpid(), time.time() - 1000)
    (tmp_path / ".lock").write_text(json.dumps(vars(holder)))
    assert holder_of(tmp_path) == holder
    assert silence(tmp_path, holder) == pytest.approx(1000, abs=60)  # it never beat
    (tmp_path / ".heartbeat").touch()
    assert silence(tmp_path, holder) < 60
    os.utime(tmp_path / ".heartbeat", (0, time.time() - 500))
    assert silence(tmp_path, holder) == pytest.approx(500, abs=60)


def test_a_process_of_this_machine_that_is_gone_is_known_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / ".heartbeat").touch()
    assert silence(tmp_path, Holder(socket.gethostname(), ended.pid, time.time())) == float("inf")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_process_that_lives_on_holds_up_neither_the_end_nor_the_next_run(tmp_path):
    context = multiprocessing.get_context("fork")
    end = context.Event()
    with Claim(tmp_path, ""):
        child = context.Process(target=end.wait, daemon=True)
        child.start()
    try:
        with Claim(tmp_path, ""):
            assert child.is_alive()
    finally:
        end.set()
        child.join()
