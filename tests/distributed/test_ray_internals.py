"""The private parts of Ray that a run uses are there; where one is missing, a run goes on with less."""

import json
import time

import pytest
import ray

from distributed import ray_internals
from distributed.ray_internals import ObjectStoreStats, draining_nodes, end_by_sigkill, free_cpus_by_node, note_in_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("small_cluster")]


@pytest.fixture
def complaints(monkeypatch):
    """Collect what the code finds missing of Ray."""
    found = []
    monkeypatch.setattr(ray_internals, "_say_once", lambda what, instead: found.append(what))
    return found


def two_nodes(monkeypatch):
    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [node, {**node, "Resources": {"CPU": 6.0}}])


def wait_until_free():
    """Wait until both processors are free: actors of the test before give theirs back after they ended."""
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.1)


def test_ray_has_every_private_part_that_we_use(complaints, monkeypatch):
    from ray._private.state import available_resources_per_node

    wait_until_free()
    assert [node["CPU"] for node in available_resources_per_node().values()] == free_cpus_by_node() == [2.0]
    assert draining_nodes() == set()
    stats = ObjectStoreStats().read()
    assert stats.object_store_bytes_avail > 100 * 2**20
    assert 0 <= stats.object_store_bytes_used <= stats.object_store_bytes_avail
    before = stats.cumulative_created_bytes
    kept = ray.put(bytes(2**20))
    assert ObjectStoreStats().read().cumulative_created_bytes >= before + 2**20
    del kept
    assert stats.spilled_bytes_total == 0
    two_nodes(monkeypatch)
    assert free_cpus_by_node() == [2.0]  # the private way, which knows better than two_nodes
    node = ray._private.worker._global_node
    monkeypatch.setattr(node, "kill_all_processes", node.kill_all_processes)  # put back afterwards
    end_by_sigkill()
    assert complaints == []


def test_without_the_private_parts_a_run_goes_on_with_less(complaints, monkeypatch):
    wait_until_free()
    two_nodes(monkeypatch)
    monkeypatch.delattr("ray._private.state.available_resources_per_node")
    monkeypatch.delattr("ray._private.state.GlobalState.get_draining_nodes")
    monkeypatch.delattr("ray._private.internal_api.get_memory_info_reply")
    assert free_cpus_by_node() == pytest.approx([0.5, 1.5])
    assert draining_nodes() == set()
    assert ObjectStoreStats().read() is None
    monkeypatch.delattr("ray._private.worker._global_node")
    end_by_sigkill()
    assert len(complaints) == 4


@pytest.fixture
def submitted(monkeypatch):
    """A job as `ray job submit` writes it down and tells its driver; returns what is written down now."""
    from ray._private.ray_constants import KV_NAMESPACE_JOB
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    key = b"_ray_internal_job_info_mine"
    _internal_kv_put(key, json.dumps({"status": "RUNNING", "metadata": {"owner": "me"}}), namespace=KV_NAMESPACE_JOB)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "mine"}}))
    return lambda: json.loads(_internal_kv_get(key, namespace=KV_NAMESPACE_JOB))


def test_a_job_gets_the_place_of_its_run_among_its_metadata(submitted, complaints, monkeypatch):
    note_in_job("worldloom_run", "s3://bucket/runs/mine")
    assert submitted() == {"status": "RUNNING", "metadata": {"owner": "me", "worldloom_run": "s3://bucket/runs/mine"}}
    assert complaints == []
    monkeypatch.delattr("ray.dashboard.modules.job.common.JobInfoStorageClient")
    note_in_job("worldloom_run", "elsewhere")
    assert complaints == ["the metadata of a job"]
