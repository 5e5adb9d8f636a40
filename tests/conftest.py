import os
import secrets

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ray_token(tmp_path_factory):
    """Ray 2.60 keeps its token in the home directory, unless told otherwise."""
    path = tmp_path_factory.mktemp("ray") / "token"
    path.write_text(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory):
    """A Ray cluster of two processors for the tests of one module."""
    import ray

    os.environ["WORLDLOOM_TEST_MARKS"] = str(tmp_path_factory.mktemp("marks"))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()
