"""STORM, DIAMOND and DreamerV3 without a decoder through Ray: two env actors, a killed learner, pictures of what is
imagined."""

import dataclasses

import imageio.v3 as imageio
import numpy as np
import pytest

from tests.distributed.ray_runs import run, run_and_kill
from tests.run_configs import diamond_config, ne_config, r2dreamer_config, storm_config
from worldloom import load_agent
from worldloom.runs.config import CheckpointConfig, RuntimeConfig
from worldloom.runs.verify import verify

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("small_cluster")]
each = pytest.mark.parametrize("make", [storm_config, diamond_config, ne_config, r2dreamer_config])
RUNTIME = RuntimeConfig(kind="ray", env_actors=2, chunk_steps=8, publish_interval=5, learner_threads=1)
STARTS = {storm_config: 100, diamond_config: 0, ne_config: 100, r2dreamer_config: 100}  # steps that owe no updates
STEPS = {storm_config: 2, diamond_config: 4, ne_config: 2, r2dreamer_config: 2}  # for each update
DECODERS = (storm_config, diamond_config)


@pytest.mark.pages
@each
def test_two_env_actors_train_to_the_end_and_a_picture_shows_what_is_imagined(make, tmp_path):
    summary, counts = run(make(runtime=RUNTIME), tmp_path)
    assert summary["status"] == "completed"
    assert 300 <= summary["env_steps"] == counts.steps < 306
    assert summary["updates"] == (summary["env_steps"] - STARTS[make]) // STEPS[make]
    assert verify(tmp_path) == []
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    picture = imageio.imread(tmp_path / "imagined.png")
    assert picture.std() > 10
    assert (tmp_path / "imagined.gif").is_file() == ("data:image/gif;base64," in page) == (make in DECODERS)
    agent, again = (load_agent(tmp_path) for _ in range(2))
    assert np.array_equal(agent.acting_weights(), again.acting_weights())


@each
def test_a_run_whose_learner_is_killed_goes_on(make, tmp_path):
    config = make(runtime=RUNTIME, checkpoint=CheckpointConfig(interval=100))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=400))
    summary, counts = run_and_kill(config, tmp_path, [(200, "learner")])
    assert summary["status"] == "completed"
    assert summary["env_steps"] == counts.steps >= 400
    assert summary["actor_restarts"] == 1
    assert verify(tmp_path) == []
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, total_steps=450))
    summary, counts = run(longer, tmp_path, resume=True)
    assert summary["env_steps"] == counts.steps >= 450
    assert verify(tmp_path) == []
