"""Fine-tuning on Ray: the learner starts from the file's weights, also where it dies before the first checkpoint."""

import pytest
import torch
import yaml

from launch.train import main
from tests.distributed.ray_runs import handle_of, kill
from tests.runs.test_start import TASKS, YAML, assert_same_weights, trained
from worldloom import load_agent
from worldloom.runs.verify import verify
from worldloom.tdmpc2 import save_official

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.usefixtures("small_cluster")
@pytest.mark.parametrize("acting", ["local", "server"])
def test_a_learner_that_dies_early_starts_from_the_file_again(acting, tmp_path, monkeypatch):
    from distributed.coordinator import Coordinator

    save_official(trained(), tmp_path / "counting-1.pt")
    (tmp_path / "preset.yaml").write_text(YAML)
    begin = Coordinator.start

    def start_and_kill(self, resume):
        begin(self, resume)
        (tmp_path / "counting-1.pt").unlink(missing_ok=True)  # the run has its own copy
        kill(handle_of(self, "learner"))

    monkeypatch.setattr(Coordinator, "start", start_and_kill)
    command = ["--config", str(tmp_path / "preset.yaml"), "--runtime", "ray", "--runtime.env_actors", "1"]
    command += ["--runtime.acting", acting, "--run-dir", str(tmp_path / "run")]
    assert main([*command, "--from", str(tmp_path / "counting-1.pt")]) == 0
    assert_same_weights(load_agent(tmp_path / "run").world_model, trained())
    assert verify(tmp_path / "run") == []


@pytest.mark.usefixtures("small_cluster")
def test_several_tasks_become_one_on_ray_and_the_run_goes_on_in_one_process(tmp_path):
    source, run = tmp_path / "three", tmp_path / "run"
    trained(obs=5, action=4, tasks=TASKS).save_pretrained(source)
    (tmp_path / "preset.yaml").write_text(YAML)
    command = ["--config", str(tmp_path / "preset.yaml"), "--from", str(source), "--like", "mw-reach"]
    assert main([*command, "--runtime", "ray", "--runtime.env_actors", "1", "--run-dir", str(run)]) == 0
    expected = trained(obs=5, action=4, tasks=TASKS).for_task("new", "mw-reach", (3,), 1, None)
    assert_same_weights(load_agent(run).world_model, expected)
    more = ["--train.total_steps", "160", "--agent.lr", "3e-4"]
    assert main(["--resume", "--run-dir", str(run), "--runtime", "inline", *more]) == 0
    moved = load_agent(run).world_model.task_embedding.weight
    assert not torch.equal(moved, expected.task_embedding.weight)
    assert yaml.safe_load((run / "config.yaml").read_text())["start"]["checkpoint"] == str(source)
