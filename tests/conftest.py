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
