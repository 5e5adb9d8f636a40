"""Agents for other people: model cards, directories, and the Hugging Face Hub, here a folder with its interface."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import httpx2
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard as HubCard
from huggingface_hub import errors

import worldloom
from tests.dreamerv3_models import tiny_agent
from tests.run_configs import tiny_config
from tests.tdmpc2_models import tiny_model
from worldloom import ModelCard, export, from_hub, load_agent, push_to_hub, save_agent
from worldloom.manifest import newest_checkpoint, read_manifest
from worldloom.runs.inline import InlineTrainer
from worldloom.tdmpc2 import TDMPC2Agent, save_official


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 300 steps that was evaluated at its end: 8 steps an episode, whose rewards sum up to 280."""
    folder = tmp_path_factory.mktemp("runs") / "counting"
    InlineTrainer(tiny_config(), folder).train()
    return folder


class Hub:
    """The Hub's interface as far as it is used: a folder for each repository and revision."""

    def __init__(self, root):
        self.root, self.log = root, []

    def create_repo(self, repo_id, private, exist_ok):
        self.log.append(("create", repo_id, private, exist_ok))
        (self.root / repo_id / "main").mkdir(parents=True, exist_ok=True)

    def create_branch(self, repo_id, branch, exist_ok):
        (self.root / repo_id / branch).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, repo_id, folder_path, revision, commit_message):
        self.log.append(("upload", repo_id, revision, commit_message))
        at = self.root / repo_id / (revision or "main")
        shutil.copytree(folder_path, at, dirs_exist_ok=True)
        shutil.copytree(at, self.root / repo_id / "c0ffee")
        return SimpleNamespace(oid="c0ffee")

    def snapshot_download(self, repo_id, revision, allow_patterns, token):
        found = self.root / repo_id / (revision or "main")
        if not found.is_dir():
            raise refused(errors.RevisionNotFoundError, 404)
        copy = self.root / "cache" / f"{len(self.log)}"
        copy.mkdir(parents=True)
        for path in found.iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, copy)
        self.log.append(("download", repo_id, revision, sorted(path.name for path in copy.iterdir())))
        return str(copy)

    def hf_hub_download(self, repo_id, filename, revision, token):
        return str(self.root / repo_id / (revision or "main") / filename)


def refused(kind, status):
    answer = httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co"))
    return kind("no", response=answer)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    return made


def acted(agent):
    obs = np.linspace(-1, 1, 2 * agent.world_model.obs_shape[0], dtype=np.float32).reshape(2, -1)
    return agent.act(obs, None, np.ones(2, bool), explore=False)[0]


def test_the_card_of_a_run_tells_what_its_newest_checkpoint_can_do(run, tmp_path):
    text = (save_agent(run, tmp_path / "shared", licence="cc-by-4.0") / "README.md").read_text()
    manifest, summary = read_manifest(newest_checkpoint(run)), json.loads((run / "summary.json").read_text())
    rows = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE))
    assert rows["environment steps"] == "300 (300 frames)"
    assert rows["updates"] == str(manifest["limiter"]["updates"])
    assert rows["task"] == "`tests.environments:Counting-v0`, action repeat 1"
    assert rows["versions"] == summary["versions"]
    assert rows.get("commit") == (f"`{summary['commit']}`" if "commit" in summary else None)
    assert rows["licence of the weights"] == "cc-by-4.0"
    assert "Its return is 280.0 ± 0.0 (mean and deviation over 3 episodes)" in text


def test_the_hub_reads_the_card(run, tmp_path):
    card = HubCard((save_agent(run, tmp_path / "shared") / "README.md").read_text())
    assert (card.data.license, card.data.library_name) == ("mit", "worldloom")
    (result,) = card.data.eval_results
    assert (result.task_type, result.dataset_name) == ("reinforcement-learning", "tests.environments:Counting-v0")
    assert (result.metric_type, result.metric_value) == ("mean_reward", "280.0 +/- 0.0")
    assert "tdmpc2" in card.data.tags


def test_the_example_of_a_card_runs(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save_agent(save_agent(run, "shared/first"), "shared/second")  # as the tutorial names folders
    shutil.rmtree("shared/first")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 5
    namespace = {}
    exec(code, namespace)
    assert namespace["step"].rewards == [10.0]  # of the counter's first step


def test_the_example_makes_the_environment_of_the_run(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    (moved / "summary.json").unlink()  # as of a run that goes on
    env = {
        "action_repeat": 2,
        "frame_stack": 3,
        "image_size": None,
        "dmc": {"observations": "pixels", "image_size": 64},
    }
    (moved / "config.yaml").write_text(yaml.safe_dump({"env": env}))
    text = (save_agent(moved, tmp_path / "shared") / "README.md").read_text()
    assert "from worldloom.envs import AtariConfig, DMCConfig" in text
    assert "action_repeat=2, frame_stack=3, dmc=DMCConfig(observations='pixels'))" in text
    assert "300 (600 frames)" in text


def test_a_return_of_other_weights_is_left_out(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    summary = json.loads((moved / "summary.json").read_text())
    (moved / "summary.json").write_text(json.dumps({**summary, "env_steps": 200}))  # before the newest checkpoint
    text = (save_agent(moved, tmp_path / "shared") / "README.md").read_text()
    assert "It was not evaluated at its last step." in text
    assert "mean_reward" not in text
    (moved / "summary.json").unlink()
    assert "300 (300 frames)" in (save_agent(moved, tmp_path / "again") / "README.md").read_text()


@pytest.mark.parametrize("made", [tiny_agent, lambda: TDMPC2Agent(tiny_model())])
def test_saved_agents_act_as_before(made, tmp_path):
    agent = made()
    folder = save_agent(agent, tmp_path / "shared")
    expected = {"README.md", "config.json", "model.safetensors"} | (
        {"behaviour.safetensors"} if agent.behaviour else set()
    )
    assert {path.name for path in folder.iterdir()} == expected
    again = load_agent(folder)
    for loaded in (agent, again):
        loaded.acting_generator.manual_seed(3)
    np.testing.assert_array_equal(acted(agent), acted(again))


def test_a_card_that_a_directory_has_is_kept_unless_another_is_given(tmp_path):
    first = save_agent(tiny_agent(), tmp_path / "first")
    (first / "README.md").write_text("mine")
    (first / "notes.txt").write_text("not for others")
    second = save_agent(first, tmp_path / "second")
    assert (second / "README.md").read_text() == "mine"
    assert not (second / "notes.txt").exists()
    save_agent(first, first, card=ModelCard(algorithm="dreamerv3:size1m", task="CartPole-v1"))
    assert "# dreamerv3:size1m on CartPole-v1" in (first / "README.md").read_text()
    assert load_agent(first).world_model.action_dim == 2
    for nothing in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
            save_agent(nothing, tmp_path / "third")


def test_a_licence_that_a_kept_card_would_hide_is_refused(tmp_path):
    first = save_agent(tiny_agent(), tmp_path / "first")
    with pytest.raises(ValueError, match=r"has a model card, README.md, which names a licence and is kept"):
        save_agent(first, tmp_path / "second", licence="cc-by-nc-4.0")
    assert not (tmp_path / "second").exists()


def test_what_is_no_agent_or_no_folder_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agent = tiny_agent()
    with pytest.raises(TypeError, match=r"got a DreamerV3WorldModel, expected an agent"):
        save_agent(agent.world_model, "shared")
    with pytest.raises(FileNotFoundError):
        save_agent("typo", "shared")
    for write in (
        lambda url: save_agent(agent, url),
        agent.world_model.save_pretrained,
        lambda url: export(agent, url),
    ):
        with pytest.raises(ValueError, match=r"memory://bucket/x.pt2 is a URL, expected a place on this machine"):
            write("memory://bucket/x.pt2")
    assert not list(tmp_path.iterdir())


def test_the_example_plays_whole_games_from_seeds_of_their_own(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    (moved / "summary.json").unlink()
    atari = {"life_loss": "end", "same_seed": True, "resize": "area", "unknown": 3}
    (moved / "config.yaml").write_text(yaml.safe_dump({"env": {"action_repeat": 4, "atari": atari}}))
    text = (save_agent(moved, tmp_path / "shared") / "README.md").read_text()
    assert "action_repeat=4, atari=AtariConfig(resize='area'))" in text


def test_a_family_that_a_download_names_is_not_imported(run, hub, tmp_path, monkeypatch):
    folder = save_agent(run, tmp_path / "shared")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**description, "family": "surprise"}))
    (tmp_path / "surprise.py").write_text("raise SystemExit('run')")
    monkeypatch.syspath_prepend(tmp_path)
    push_to_hub(run, "me/other")
    (hub.root / "me" / "other" / "main" / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"me/other holds an agent of family 'surprise'.* import it first"):
        from_hub("me/other")


def test_agents_go_to_the_hub_and_come_back(run, hub):
    commit = push_to_hub(run, "me/counting", private=True, message="first")
    assert hub.log == [("create", "me/counting", True, True), ("upload", "me/counting", None, "first")]
    again = from_hub("me/counting", commit, num_samples=8)
    assert hub.log[-1] == ("download", "me/counting", "c0ffee", ["config.json", "model.safetensors"])
    assert again.config.num_samples == 8
    before, after = load_agent(run).world_model.state_dict(), again.world_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    text = (hub.root / "me" / "counting" / "main" / "README.md").read_text()
    assert "agent = worldloom.from_hub('me/counting')" in text
    assert "280.0 ± 0.0" in text


def test_a_directory_that_goes_to_the_hub_is_loaded_from_there(run, hub, tmp_path):
    folder = save_agent(run, tmp_path / "shared", licence="cc-by-4.0")
    push_to_hub(folder, "me/counting")
    text = (hub.root / "me" / "counting" / "main" / "README.md").read_text()
    assert "agent = worldloom.from_hub('me/counting')" in text
    assert str(folder) not in text
    assert '"cc-by-4.0"' in text


def test_a_branch_is_made_and_loaded(hub):
    agent = tiny_agent()
    push_to_hub(agent, "me/dreamer", revision="wide")
    assert {path.name for path in (hub.root / "me" / "dreamer" / "wide").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "behaviour.safetensors"
    }  # fmt: skip
    found = from_hub("me/dreamer", "wide").behaviour.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in agent.behaviour.state_dict().items())
    with pytest.raises(FileNotFoundError, match="from_hub: me/dreamer at narrow is not on the Hub, or not for you"):
        from_hub("me/dreamer", "narrow")


def official(folder):
    folder.mkdir(parents=True, exist_ok=True)
    save_official(tiny_model(simnorm_dim=8, latent_dim=32), folder / "walker-walk-1.pt")
    return folder / "walker-walk-1.pt"


def test_the_card_of_a_file_of_the_authors_names_it_and_their_licence(tmp_path):
    file = official(tmp_path)
    with pytest.raises(ValueError, match=r"whose licence has walker-walk-1\.pt\? Give the one of its authors"):
        save_agent(file, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    text = (save_agent(file, tmp_path / "shared", licence="mit") / "README.md").read_text()
    assert "the weights of `walker-walk-1.pt`, converted" in text
    assert "trained with" not in text
    assert "commit" not in text


def test_the_card_of_a_run_says_which_checkpoint_it_started_from(run, tmp_path):
    tuned = shutil.copytree(run, tmp_path / "tuned")
    (tuned / "config.yaml").write_text(yaml.safe_dump({"env": {}, "start": {"checkpoint": "mt30-5M.pt"}}))
    text = (save_agent(tuned, tmp_path / "shared") / "README.md").read_text()
    assert "| started from | `mt30-5M.pt` |" in text


def test_files_of_the_authors_load_from_the_hub(hub):
    official(hub.root / "them" / "tdmpc2" / "main")
    agent = from_hub("them/tdmpc2", filename="walker-walk-1.pt", episode_length=200)
    assert agent.world_model.obs_shape == (3,)


def test_what_the_hub_refuses_is_said_in_a_sentence(tmp_path, monkeypatch):
    def refuse(error):
        def create_repo(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: SimpleNamespace(create_repo=create_repo))

    refuse(refused(errors.HfHubHTTPError, 401))
    with pytest.raises(PermissionError, match="push_to_hub: the Hub refuses me/dreamer: no.*hf auth login"):
        push_to_hub(tiny_agent(), "me/dreamer")
    refuse(errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(ConnectionError, match="the Hub does not answer"):
        push_to_hub(tiny_agent(), "me/dreamer")
    refuse(httpx2.ConnectError("Connection refused"))
    with pytest.raises(ConnectionError, match="push_to_hub: the Hub does not answer: Connection refused"):
        push_to_hub(tiny_agent(), "me/dreamer")
    refuse(KeyError("a defect"))
    with pytest.raises(KeyError, match="a defect"):
        push_to_hub(tiny_agent(), "me/dreamer")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: push_to_hub(tiny_agent(), "me/dreamer"), lambda: from_hub("me/dreamer")):
        with pytest.raises(ImportError, match=r"huggingface_hub is not installed. Run: pip install 'worldloom\[hub\]'"):
            call()
    assert worldloom.save_agent(tiny_agent(), tmp_path / "needs no hub").is_dir()
