"""What a world model imagines, shown; and the page that a run ends with."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from importlib.resources import files

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from tests.dreamerv3_models import tiny_agent
from worldloom import create_world_model
from worldloom.envs.suites import AtariConfig
from worldloom.imagination import OpenLoop, open_loop
from worldloom.report.origin import commit, origin
from worldloom.report.page import read_metrics, write_report
from worldloom.report.pictures import (
    NO_DECODER,
    figure_of,
    film,
    image_keys,
    plot,
    reward_film,
    show_sequence,
    strip,
)
from worldloom.report.published import published_curve
from worldloom.runs.build import subject_of
from worldloom.runs.config import EnvConfig, RunConfig
from worldloom.training import ReplayBuffer
from worldloom.types import LatentState, Trajectory

# Open loop


class Adder(torch.nn.Module):
    """A world whose state is its observation [1]; an action is added to it, and the reward is ten times the sum."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.seen = []

    def encode(self, obs):
        self.seen.append(("encode", obs.item()))
        return LatentState(obs)

    def observe(self, state, action, obs):
        self.seen.append(("observe", state.deterministic.item(), action.item(), obs.item()))
        return LatentState(obs)

    def imagine(self, state, actions):
        states = [state]
        for action in actions:
            states.append(LatentState(states[-1].deterministic + action))
        rewards = torch.stack([10 * s.deterministic for s in states[1:]])
        return Trajectory(tuple(states), rewards, torch.ones_like(rewards))

    def decode(self, state):
        return {"obs": state.deterministic}


def test_the_first_rows_are_observed_and_the_rest_imagined_under_the_true_actions():
    model, obs = Adder(), np.array([[1.0], [2], [4], [9], [9], [9]], np.float32)
    actions, rewards = np.array([[7.0], [0.5], [0.25], [2], [3], [4]], np.float32), np.arange(6.0)
    loop = open_loop(model, obs, actions, rewards, observed=3)
    assert model.seen == [("encode", 1), ("observe", 1, 0.5, 2), ("observe", 2, 0.25, 4)]
    assert loop.predicted["obs"][:, 0].tolist() == [1, 2, 4, 6, 9, 13]
    assert loop.predicted_rewards.tolist() == [60, 90, 130]
    assert loop.true_rewards.tolist() == [3, 4, 5]
    assert (loop.truth["obs"] == obs).all()
    for observed in (0, 6):
        with pytest.raises(ValueError, match=f"observed is {observed} of 6 rows"):
            open_loop(model, obs, actions, rewards, observed=observed)


def test_imagining_leaves_torchs_generator_alone_and_repeats_itself():
    model = create_world_model("dreamerv3:size1m", obs_shape=(2,), action_dim=1, deter=32, hidden=8, units=8)
    rows = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32), np.zeros((9, 1), np.float32), np.zeros(9)
    before = torch.get_rng_state()
    first, second = open_loop(model, *rows), open_loop(model, *rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.predicted["obs"] == second.predicted["obs"]).all()
    assert (open_loop(model, *rows, seed=1).predicted["obs"] != first.predicted["obs"]).any()
    assert len(first.predicted["obs"]) == 9
    assert len(first.predicted_rewards) == 4


def test_a_model_without_a_decoder_predicts_rewards_alone():
    model = create_world_model("tdmpc2:1m", obs_shape=(2,), action_dim=1, mlp_dim=16, latent_dim=16, encoder_dim=16)
    loop = open_loop(model, np.zeros((9, 2), np.float32), np.zeros((9, 1), np.float32), np.zeros(9))
    assert loop.predicted == {}
    assert image_keys(loop) == []
    assert len(loop.predicted_rewards) == 4


# Pictures


def images(channels, guess=0.5, steps=8):
    truth = np.zeros((steps, channels, 4, 6), np.float32)
    truth[:, -1] = 1.0
    return OpenLoop(5, {"obs": truth}, {"obs": np.full_like(truth, guess)}, np.ones(steps - 5), np.zeros(steps - 5))


def test_films_show_truth_prediction_and_error_side_by_side():
    frames = film(images(3), "obs", scale=1)
    assert frames.shape == (8, 6, 24, 3)
    assert frames.dtype == np.uint8
    true, guess, error = frames[:, 1:-1, 1:7], frames[:, 1:-1, 9:15], frames[:, 1:-1, 17:23]
    assert (true == [0, 0, 255]).all()
    assert (guess == 128).all()
    assert (error == 128).all()
    border = frames[:, 0, 8]
    assert (border[:5] == border[0]).all()
    assert (border[5:] == border[5]).all()
    assert (border[0] != border[5]).any()  # seen, and imagined
    assert film(images(3), "obs", scale=2).shape == (8, 12, 48, 3)
    assert film(images(3), "obs").shape == (8, 6 * 36, 24 * 36, 3)  # 4 pixels become 144


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_stacks_show_their_newest_frame_and_grey_stays_grey(channels):
    shown, steps = strip(images(channels), "obs")
    assert shown.shape == (3 * 6, len(steps) * 8, 3)
    assert (shown[1:5, 1:7] == ([0, 0, 1] if channels % 3 == 0 else [1, 1, 1])).all()


def test_plots_show_a_panel_for_rewards_and_each_entry():
    vector = OpenLoop(5, {"obs": np.zeros((9, 2))}, {"obs": np.ones((9, 2))}, np.zeros(4), np.ones(4))
    rewards = OpenLoop(5, {"obs": np.zeros((9, 2))}, {}, np.zeros(4), np.ones(4))
    heights = [plot(loop).shape[0] for loop in (rewards, vector)]
    assert heights[1] - heights[0] == 300  # two panels more
    blue = (np.abs(plot(vector).astype(int) - [0x2A, 0x6F, 0xDB]).sum(-1) < 30).sum()
    assert blue > 500
    assert plot(images(3)).ndim == 3


def texts(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_a_sentence_says_that_there_is_no_decoder():
    steps = {"truth": {"obs": np.zeros((9, 2))}, "true_rewards": np.zeros(4), "predicted_rewards": np.ones(4)}
    assert texts(figure_of(OpenLoop(5, predicted={}, **steps))) == [NO_DECODER]
    assert NO_DECODER not in texts(figure_of(OpenLoop(5, predicted={"obs": np.ones((9, 2))}, **steps)))


def test_films_without_a_decoder_show_true_images_and_the_rewards_so_far():
    red = np.zeros((7, 3, 8, 8), np.float32)
    red[:, 0] = np.linspace(0, 1, 7)[:, None, None]
    vector, image = (OpenLoop(5, {"obs": obs}, {}, np.array([0.0, 2]), np.ones(2)) for obs in (np.zeros((7, 2)), red))
    wide, narrow = reward_film(image), reward_film(vector)
    assert wide.shape == (7, 260, 800, 3)
    assert narrow.shape == (7, 260, 600, 3)
    blue = (np.abs(narrow.astype(int) - [0x2A, 0x6F, 0xDB]).sum(-1) < 60).sum((1, 2))
    assert blue[6] > blue[4] + 20  # the predicted rewards of two steps, beside the legend's line
    pure = [((frame[..., 0] > 250) & (frame[..., 1:].max(-1) < 5)).sum() for frame in wide]
    assert pure[6] > 1000
    assert pure[0] == 0


def test_a_single_imagined_reward_is_drawn_as_a_point():
    loop = OpenLoop(5, {"obs": np.zeros((6, 3, 8, 8))}, {"obs": np.zeros((6, 3, 8, 8))}, np.ones(1), np.zeros(1))
    below = plot(loop)[-180:].astype(int)  # beneath the images and the legend
    assert (np.abs(below - [0x2A, 0x6F, 0xDB]).sum(-1) < 60).sum() > 10


def test_rewards_of_a_model_that_knows_their_signs_are_compared_by_sign():
    class Signs(Adder):
        predicts_signs = True

    loops = [
        open_loop(model, np.zeros((4, 1), np.float32), np.zeros((4, 1), np.float32), np.array([0.0, 2, -7, 0]), 1)
        for model in (Adder(), Signs())
    ]
    assert [loop.true_rewards.tolist() for loop in loops] == [[2, -7, 0], [1, -1, 0]]
    assert [loop.reward for loop in loops] == ["reward", "sign of reward"]
    assert create_world_model("diamond:tiny", obs_shape=(3, 16, 16), action_dim=2).predicts_signs


def test_pictures_are_drawn_from_a_sequence_of_replay():
    model = tiny_agent().world_model
    buffer = ReplayBuffer(100, (3,), 2)
    assert show_sequence(model, buffer.draw_sequence(50), "x") is None
    obs = np.random.default_rng(0).normal(size=(13, 3))
    buffer.add_episode(obs=obs, actions=np.zeros((12, 2)), rewards=np.ones(12), dones=np.zeros(12))
    sequence = buffer.draw_sequence(50)
    assert len(sequence["actions"]) == 12  # of 13 rows: 50 halved twice
    assert not sequence["is_first"][1:].any()
    picture, shown = show_sequence(model, sequence, "x")
    assert picture.dtype == np.uint8
    assert shown is None  # vectors are drawn, not filmed


def test_predicted_images_of_a_sequence_are_filmed_and_others_are_not():
    buffer = ReplayBuffer(100, (3, 48, 48), 2)
    obs = np.random.default_rng(0).integers(256, size=(13, 3, 48, 48), dtype=np.uint8)
    buffer.add_episode(obs=obs, actions=np.zeros((12, 2)), rewards=np.ones(12), dones=np.zeros(12))
    sequence = buffer.draw_sequence(50)
    _, shown = show_sequence(tiny_agent(obs_shape=(3, 48, 48)).world_model, sequence, "x")
    assert (shown.shape[0], shown.dtype) == (12, np.uint8)
    assert (
        show_sequence(tiny_agent(obs_shape=(3, 48, 48), representation="r2dreamer").world_model, sequence, "x").film
        is None
    )


# The report


def subject(env_id, algorithm="tdmpc2:5m", **env):
    return subject_of(RunConfig(algorithm=algorithm, env=EnvConfig(id=env_id, **env)))


def test_published_curves_are_found_by_task_and_algorithm():
    walker = published_curve(subject("dm_control/walker-walk-v0", action_repeat=2))
    assert dict(zip(walker.frames, walker.mean, strict=True))[100_000] == pytest.approx(961.9, abs=0.05)
    assert walker.seeds == 3
    cup = published_curve(subject("dm_control/ball_in_cup-catch-v0"))
    assert max(cup.mean) > 900
    pong = published_curve(subject("ALE/Pong-v5", "dreamerv3:size200m"))
    assert pong.mean[-1] == pytest.approx(-5.0, abs=0.1)
    assert published_curve(subject("ALE/MsPacman-v5", "dreamer")).mean[-1] == pytest.approx(1521, abs=1)
    assert published_curve(subject("ALE/Pong-v5")) is None  # TD-MPC2's authors played none
    sticky = AtariConfig(sticky=0.25)
    found = published_curve(subject("ALE/KungFuMaster-v5", "storm:18m", atari=sticky))
    assert (found.label, found.frames, found.seeds) == ("STORM, published (5 seeds)", (400_000,), 5)
    assert published_curve(subject("ALE/Qbert-v5", "storm", atari=sticky)).mean == (pytest.approx(4523, abs=1),)
    assert published_curve(subject("ALE/Qbert-v5", "storm")) is None  # without sticky actions it is another task
    assert published_curve(subject("ALE/Boxing-v5", "diamond")).std == (pytest.approx(11.6, abs=0.05),)
    assert published_curve(subject("ALE/Boxing-v5", "diamond", atari=sticky)) is None
    assert published_curve(subject("ALE/Pong-v5", "dreamer", atari=sticky)).frames[-1] > 10**8


def test_every_game_of_atari100k_has_the_scores_of_three_families():
    games = {family: set() for family in ("dreamerv3", "storm", "diamond")}
    for row in csv.DictReader((files("worldloom.report") / "published_scores.csv").read_text().splitlines()):
        if row["suite"].startswith("atari100k"):
            games[row["family"]].add(row["task"])
    assert games["storm"] == games["diamond"] == games["dreamerv3"]
    assert len(games["storm"]) == 26


def test_the_score_of_trained_agents_is_a_band_that_a_long_run_is_drawn_with(tmp_path):
    about = subject("ALE/Boxing-v5", "diamond", action_repeat=4)
    fake_run(tmp_path, scale=300)  # 90,000 steps: 360,000 frames
    page = write_report(tmp_path, about, "").read_text()
    assert "<!-- DIAMOND, published (5 seeds) -->" in page
    assert "of agents trained for 400,000 frames" in page
    fake_run(tmp_path)
    page = write_report(tmp_path, about, "").read_text()
    assert "DIAMOND, published" not in page
    assert "first point lies at 400,000 frames: 86.9" in page
    assert published_curve(subject("Pendulum-v1")) is None


def fake_run(folder, scale=1, **changes):
    lines = [
        {"env_steps": step, "updates": step, "wall_seconds": step / 10, "episode/return": 3.0 * step,
         "learner/loss": 1 / step, "rate/updates_per_second": 40.0}
        for step in (100 * scale, 200 * scale, 300 * scale)
    ]  # fmt: skip
    lines.append(
        {"env_steps": 300 * scale, "eval/return_mean": 870.0, "eval/return_std": 10.0, "eval/length_mean": 500.0}
    )
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"env_st')
    summary = {
        "status": "completed", "algorithm": "tdmpc2:5m", "env_id": "dm_control/walker-walk-v0", "env_steps": 300,
        "updates": 300, "eval_return_mean": 870.0, "eval_return_std": 10.0, "eval_episodes": 10, "wall_seconds": 3725.0,
        "train_ratio_target": 768, "train_ratio_actual": 767.5, "seed": 3, "device": "cpu", "runtime": "inline",
        "limited_by": {"learner": 0.6, "environments": 0.2, "warm-up": 0.2}, **changes,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def test_the_report_is_one_file_with_everything(tmp_path):
    fake_run(tmp_path, scale=1000)
    imageio.imwrite(tmp_path / "imagined.png", np.full((4, 5, 3), 77, np.uint8))
    frames = np.stack([np.full((4, 5, 3), grey, np.uint8) for grey in (0, 255)])
    imageio.imwrite(tmp_path / "imagined.gif", frames, duration=100, loop=0)
    about = subject("dm_control/walker-walk-v0", action_repeat=2)
    page = write_report(tmp_path, about, "algorithm: <b>tdmpc2:5m</b>").read_text()
    for words in (
        "tdmpc2:5m on dm_control/walker-walk-v0", "870.0 ± 10.0", "1 h 2 min", "767.5 / 768", "3, cpu, inline",
        "For 75% of its time after the warm-up it was limited by: learner", "learner 60%, environments 20%",
        "&lt;b&gt;tdmpc2",
        "as the authors report them",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("<svg") == 3
    assert "<!-- TD-MPC2, published (3 seeds) -->" in page  # how the drawing marks its legend
    embedded = re.search(r'src="data:image/png;base64,([^"]+)"', page).group(1)
    assert (imageio.imread(io.BytesIO(base64.b64decode(embedded))) == 77).all()
    film = re.search(r'src="data:image/gif;base64,([^"]+)"', page).group(1)
    assert imageio.imread(io.BytesIO(base64.b64decode(film)), index=None).shape == (2, 4, 5, 3)
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing is fetched
    assert len(read_metrics(tmp_path)) == 4
    fake_run(tmp_path)
    page = write_report(tmp_path, about, "").read_text()
    assert "first point lies at 100,000 frames: 961.9." in page
    assert "published (3 seeds)" not in page


def test_single_points_are_drawn_and_steady_values_are_not_magnified(tmp_path):
    fake_run(tmp_path)
    line = {"env_steps": 100, "episode/return": 800.0, "rate/train_ratio": 384.0, "learner/loss": 1e-6}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps(line) + "\n" + json.dumps({**line, "env_steps": 200, "rate/train_ratio": 384.004}) + "\n"
    )
    page = write_report(tmp_path, subject("Pendulum-v1")).read_text()
    labels = re.findall(r"<!-- (\S+) -->", page)
    assert not {"384.001", "384.002"} & set(labels), "rounding errors are magnified"
    assert not [label for label in labels if label.startswith("+")], "an offset above the plot"
    returns = page[page.index("<h2>Return") : page.index("<h2>Learning")]
    assert returns.count("<use ") > 10  # ticks, and the marker of the line of two points
    assert len(re.findall(r'<g clip-path="[^"]+">\s*<use ', returns)) == 1


def test_the_origin_is_the_command_the_versions_and_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/launch/train.py", "--env.id", "a b", "--resume"])
    found = origin()
    assert found["command"] == "python -m launch.train --env.id 'a b' --resume"
    assert f"torch {torch.__version__}" in found["versions"]
    assert commit(tmp_path) is None
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a", "--allow-empty"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", commit(tmp_path))


def test_a_run_that_was_interrupted_early_has_a_report_too(tmp_path):
    fake_run(tmp_path, status="interrupted", eval_return_mean=None, eval_return_std=None, limited_by={})
    (tmp_path / "metrics.jsonl").write_text("")
    page = write_report(tmp_path, subject("Pendulum-v1")).read_text()
    assert "interrupted; it can be resumed" in page
    assert "The authors report no curve for this task" in page
