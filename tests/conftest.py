import contextlib
import gc
import importlib
import os
import secrets
import shutil
import sys

import pytest
import torch

from tests.own_families import EXAMPLE, ROOT

gc.set_threshold(200_000, 20, 20)  # its passes over torch's many objects took a tenth of the time
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of commands: threads of all processes beside each other take many times as long
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's name; its 15 makes tests wait beside any other work
APART = (
    "test_driver.py",
    "test_lockstep.py",
    "test_hangs.py",
)  # of the Ray tests, so that all processes have as much to do


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Keep the tests of a file, and most that share the Ray cluster, in one process of `make test`, which has three."""
    for item in items:
        shares = item.path.parent.name == "distributed" and item.path.name not in APART
        item.add_marker(pytest.mark.xdist_group("ray" if shares else item.path.name))


@pytest.fixture(scope="session", autouse=True)
def ray_token(tmp_path_factory):
    """Ray 2.60 keeps its token in the home directory, unless told otherwise."""
    path = tmp_path_factory.mktemp("ray") / "token"
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    os.environ.pop("RAY_ADDRESS", None)
    yield
    end_cluster()


@pytest.fixture(scope="session")
def marks(tmp_path_factory):
    """Where `tests.environments.once` leaves its marks."""
    folder = tmp_path_factory.mktemp("marks")
    os.environ["WORLDLOOM_TEST_MARKS"] = str(folder)
    return folder


@pytest.fixture
def small_cluster(marks):
    """A Ray cluster of two processors. It is started once, and every test finds it without marks and actors."""
    import ray

    for mark in marks.iterdir():
        mark.unlink()
    if not ray.is_initialized():
        options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 200 * 2**20}
        soon = {"metrics_report_interval_ms": 1000}  # in place of 10 seconds, since a test waits for one
        ray.init(address="local", num_cpus=2, _system_config=soon, **options)
    yield
    for left in ray.util.list_named_actors(all_namespaces=True):  # by a test that failed
        with contextlib.suppress(ValueError):  # it has just died
            ray.kill(ray.get_actor(left["name"], left["namespace"]))


@pytest.fixture(autouse=True)
def no_pages(request, monkeypatch):
    """Let runs in this process draw nothing and write no report, which takes seconds, where no test looks at them."""
    if request.node.get_closest_marker("pages"):
        return
    monkeypatch.setattr("worldloom.report.metrics.write_report", lambda *args: None)
    monkeypatch.setattr("worldloom.runs.inline.InlineTrainer._picture", lambda self: None)
    monkeypatch.setattr("distributed.learning.Learning.draw_picture", lambda self: None)


@pytest.fixture
def no_cluster():
    """End the shared cluster, for tests that start one of their own."""
    end_cluster()


def end_cluster():
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        sys.modules["ray"].shutdown()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with `my_package`, which holds the example; on sys.path here, and on PYTHONPATH for other processes."""
    folder = tmp_path / "elsewhere"
    (folder / "my_package").mkdir(parents=True)
    (folder / "my_package" / "__init__.py").write_text("")
    shutil.copy(EXAMPLE, folder / "my_package" / "my_family.py")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]
