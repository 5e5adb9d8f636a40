"""Datasets in LeRobot's layout (v3), read as episodes for replay."""

import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from tests.lerobot_files import ACTION, CAMERA, ENDS, FPS, SIDE, STATE, change, grey, write_lerobot
from worldloom.training import ReplayBuffer, read_episodes, read_lerobot

FRONT, WRIST = "observation.images.front", "observation.images.wrist"
WRITTEN = Path(__file__).resolve().parents[1] / "data" / "lerobot_dataset.tar.xz"  # by LeRobot at commit 7427f31
RANGE = ([-1, -1], [20, 20])
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def buffer_of(root, **options):
    return ReplayBuffer.from_trajectories(read_lerobot(root, **options), action_range=RANGE)


def test_rows_arrive_and_the_last_action_is_dropped(tmp_path):
    buffer = buffer_of(write_lerobot(tmp_path / "set"))
    rows = buffer.rows_between(0, 12)
    assert rows["obs"][:, 0].tolist() == list(range(12))
    assert rows["obs"][:, 1].tolist() == [n + 0.5 for n in range(12)]
    assert rows["is_first"].nonzero()[0].tolist() == [0, 5, 8]
    led = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # row n + 1 was led to by the action and the reward of frame n
    for row in set(led) - {0, 5, 8}:
        assert rows["rewards"][row] == 10 * (row - 1)
        np.testing.assert_allclose(
            rows["actions"][row], np.array([row - 1, row - 0.5]) * 2 / 21 + 2 / 21 - 1, atol=1e-6
        )
    assert rows["truncated"].nonzero()[0].tolist() == [4, 7, 11]
    assert not rows["terminated"].any()  # the end came with the action that was dropped


def test_the_last_observation_twice_keeps_the_reward_and_the_end(tmp_path):
    rows = buffer_of(write_lerobot(tmp_path / "set"), repeat_last=True).rows_between(0, 15)
    assert rows["obs"][:, 0].tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 11, 11]
    assert rows["rewards"].tolist() == [0, 0, 10, 20, 30, 40, 0, 50, 60, 70, 0, 80, 90, 100, 110]
    assert rows["terminated"].nonzero()[0].tolist() == [5, 9, 14]
    assert not rows["truncated"].any()


def test_ends_that_are_truncated_are_no_true_ends(tmp_path):
    cut = {**ENDS, "next.truncated": ENDS["next.done"]}
    root = write_lerobot(tmp_path / "set", features={"observation.state": STATE, "action": ACTION, **cut})
    rows = buffer_of(root, repeat_last=True).rows_between(0, 15)
    assert rows["truncated"].nonzero()[0].tolist() == [5, 9, 14]
    assert not rows["terminated"].any()


def test_datasets_of_demonstrations_have_neither_rewards_nor_ends(tmp_path):
    root = write_lerobot(tmp_path / "set", features={"observation.state": STATE, "action": ACTION})
    with pytest.raises(ValueError, match=r"meta/info.json has no feature 'next.reward', expected numbers: one of \["):
        buffer_of(root)
    with pytest.raises(ValueError, match=r"read_lerobot\(reward=None\)"):
        list(read_episodes(root))
    with pytest.raises(ValueError, match=r"has no feature 'next.done'.* read_lerobot\(done=None\)"):
        buffer_of(root, reward=None)
    rows = buffer_of(root, reward=None, done=None, repeat_last=True).rows_between(0, 15)
    assert not rows["rewards"].any()
    assert not rows["terminated"].any()


def test_single_integers_are_choices_and_single_numbers_are_not(tmp_path):
    choice = {"dtype": "int64", "shape": [1], "names": None}
    features = {"observation.state": STATE, "action": choice, **ENDS}
    buffer = ReplayBuffer.from_trajectories(read_lerobot(write_lerobot(tmp_path / "a", features=features)))
    assert buffer.rows_between(0, 5)["actions"].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    features["action"] = {**choice, "dtype": "float32"}
    episode = next(read_lerobot(write_lerobot(tmp_path / "b", features=features)))
    assert episode["actions"].tolist() == [[0], [1], [2], [0], [1]]


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_each_frame_of_a_video_belongs_to_its_row(tmp_path, codec):
    camera = {**CAMERA, "dtype": "video"}
    features = {"observation.state": STATE, FRONT: camera, "action": ACTION, **ENDS}
    root = write_lerobot(tmp_path / "set", features=features, codec=codec)
    episodes = list(read_lerobot(root))
    assert [set(episode["observations"]) for episode in episodes] == [{"state", "images.front"}] * 3
    numbers = np.concatenate([episode["observations"]["state"][:, 0] for episode in episodes])
    frames = np.concatenate([episode["observations"]["images.front"] for episode in episodes])
    assert frames.shape == (12, 3, SIDE, SIDE)
    assert frames.dtype == np.uint8
    for number, frame in zip(numbers, frames, strict=True):
        assert np.abs(frame.astype(int) - grey(int(number)).transpose(2, 0, 1)).max() <= 3  # 8 lie between two frames
    (episode,) = (e for e in read_lerobot(root, obs=[FRONT], image_size=16) if len(e["actions"]) == 3)
    assert episode["observations"].shape == (3, 3, 16, 16)
    assert np.abs(episode["observations"][:, 0, 8, 8].astype(int) - [8 * n + 4 for n in (5, 6, 7)]).max() <= 3


def test_images_and_grids_of_numbers_are_read(tmp_path):
    grid = {"dtype": "float64", "shape": [2, 3], "names": None}
    features = {
        WRIST: {**CAMERA, "dtype": "image"}, "observation.map": grid,
        "observation.words": {"dtype": "string", "shape": [1]},
        "action": ACTION, **ENDS,
    }  # fmt: skip
    episode = list(read_lerobot(write_lerobot(tmp_path / "set", features=features), repeat_last=True))[1]
    obs = episode["observations"]
    assert set(obs) == {"images.wrist", "map"}
    assert (obs["images.wrist"] == np.stack([grey(n).transpose(2, 0, 1) for n in (5, 6, 7, 7)])).all()
    assert obs["map"][0].tolist() == [[5, 5.5, 6], [6.5, 7, 7.5]]
    assert obs["map"].shape == (4, 2, 3)


def test_a_dataset_that_lerobot_wrote_is_read(tmp_path):
    """Three episodes, of frames numbered from 0: every number of a row is its frame's, a pixel is 8 times it plus 4."""
    with tarfile.open(WRITTEN) as archive:
        archive.extractall(tmp_path, filter="data")
    episodes = list(read_lerobot(tmp_path))
    assert [len(episode["actions"]) for episode in episodes] == [7, 5, 9]
    begin = 0
    for episode in episodes:
        obs, numbers = episode["observations"], np.arange(begin, begin + len(episode["actions"]))
        assert (obs["state"][:, 0] == numbers).all()
        assert (obs["grid"] == numbers[:, None, None]).all()
        assert (episode["rewards"] == numbers).all()
        np.testing.assert_allclose(episode["actions"], np.stack([numbers, -numbers], 1) / 30, atol=1e-7)
        assert obs["images.top"].shape[1:] == (3, 64, 96)
        for camera, loss in (("images.top", 3), ("images.wrist", 0)):  # a video in AV1, and PNG
            assert np.abs(obs[camera].astype(int) - (8 * numbers + 4)[:, None, None, None]).max() <= loss
        assert episode["terminations"].nonzero()[0].tolist() == [len(numbers) - 1]
        begin += len(numbers)


def test_directories_of_datasets_are_read_by_read_episodes(tmp_path):
    root = write_lerobot(tmp_path / "set")
    assert [len(episode["actions"]) for episode in read_episodes(root)] == [5, 3, 4]


def shorter_record(root):
    change(root / EPISODES, length=[4, 3, 4])


def rows_apart(root):
    change(root / DATA, episode_index=[0, 1, 0, 0, 0, 0, 1, 1])


def cut_in_half(name):
    def cut(root):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2])

    return cut


def rewrite(**changes):
    def write(root):
        info = json.loads((root / "meta/info.json").read_text())
        (root / "meta/info.json").write_text(json.dumps({**info, **changes}))

    return write


DAMAGE = {
    "a record of another length": (shorter_record, "file-000.parquet: column episode_index has 5 rows of episode 0"),
    "rows apart": (rows_apart, "column episode_index has 5 rows of episode 0, expected 5 that follow"),
    "rows out of order": (
        lambda root: change(root / DATA, frame_index=[1, 0, 2, 3, 4, 0, 1, 2]),
        "column frame_index does not count from 0 to 4 in episode 0",
    ),
    "a column less": (lambda root: change(root / DATA, action=None), r"lacks the columns \['action'\], expected"),
    "gaps": (
        lambda root: change(root / DATA, **{"next.reward": [1.0, None, 3, 4, 5, 6, 7, 8]}),
        "next.reward has gaps",
    ),
    "text for numbers": (
        lambda root: change(root / DATA, **{"next.reward": list("abcdefgh")}),
        "next.reward has gaps or holds string",
    ),
    "vectors of another width": (
        lambda root: change(root / DATA, action=[[1.0, 2.0, 3.0]] * 8),
        r"action has rows of other lengths than 2",
    ),
    "ragged vectors": (
        lambda root: change(root / DATA, action=[[1.0], [1.0, 2.0, 3.0]] * 4),
        "action has rows of other lengths than 2",
    ),
    "one number for two": (
        lambda root: change(root / DATA, action=[1.0] * 8),
        r"action has 5 numbers in 5 rows, expected shape \(2,\)",
    ),
    "an episode less": (
        lambda root: change(root / EPISODES, episode_index=[0, 2, 3]),
        "column episode_index has 2, expected 1 next",
    ),
    "a negative file": (
        lambda root: change(root / EPISODES, **{"data/file_index": [-1, 0, 0]}),
        "file_index holds numbers that no",
    ),
    "no number": (
        lambda root: change(root / EPISODES, length=[5.0, float("nan"), 4.0]),
        "length holds numbers that no dataset",
    ),
    "half a data file": (cut_in_half(DATA), "file-000.parquet is no Parquet file, or is damaged"),
    "half the records": (cut_in_half(EPISODES), "file-000.parquet is no Parquet file, or is damaged"),
    "half the description": (cut_in_half("meta/info.json"), "info.json describes no LeRobot dataset, or is damaged"),
    "no data file": (lambda root: (root / DATA).unlink(), "file-000.parquet is missing"),
    "no records": (lambda root: (root / EPISODES).unlink(), "meta/episodes holds no Parquet file"),
    "an older version": (rewrite(codebase_version="v2.1"), "is of version v2.1, expected v3. Convert"),
    "no features": (rewrite(features={}), "has no feature to observe"),
    "no rate": (rewrite(fps=0), "fps is 0.0, expected frames per second above 0"),
    "another path": (rewrite(data_path="../{file_index}"), "path '../0' leads out of the dataset"),
    "an absolute path": (rewrite(data_path="/etc/passwd"), "path '/etc/passwd' leads out of the dataset"),
    "a template with attributes": (rewrite(data_path="{file_index.__class__}"), "is missing, expected a Parquet file"),
    "a feature without numbers": (rewrite(features={"observation.a": {"dtype": "float32"}}), "it lacks 'shape'"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_with_file_and_column(tmp_path, what):
    damage, message = DAMAGE[what]
    damage(write_lerobot(tmp_path / "set"))
    with pytest.raises(ValueError, match=message):
        list(read_lerobot(tmp_path / "set"))


VIDEO = f"videos/{FRONT}/chunk-000/file-000.mp4"


def playlist(root):
    (root / VIDEO).write_text(f"#EXTM3U\n#EXTINF:1,\n{root / VIDEO.replace('000.mp4', '001.mp4')}\n#EXT-X-ENDLIST\n")


VIDEO_DAMAGE = {
    "half a video": (cut_in_half(VIDEO), "file-000.mp4: video of observation.images.front cannot be read"),
    "a playlist": (playlist, "file-000.mp4: video of observation.images.front cannot be read"),
    "no video": (lambda root: (root / VIDEO).unlink(), "cannot be read: the file is missing"),
    "too few frames": (
        lambda root: change(root / EPISODES, **{f"videos/{FRONT}/from_timestamp": [0.4, 0.5, 0]}),
        "ends after 8 frames, expected at least 9",
    ),
    "other times": (
        lambda root: change(root / DATA, timestamp=[0.1 * n for n in (0, 1, 2, 3, 5, 0, 1, 2)]),
        "column timestamp does not lead from frame to frame of file-000.mp4 at 10.0 per second",
    ),
    "another rate": (rewrite(fps=2 * FPS), "column timestamp does not lead"),
    "another size": (
        lambda root: rewrite(features={**json.loads((root / "meta/info.json").read_text())["features"],
            FRONT: {**CAMERA, "dtype": "video", "shape": [480, 640, 3]}})(root),
        r"its frames are \(64, 64\), expected \(480, 640\)",
    ),
    "depth": (
        lambda root: rewrite(features={**json.loads((root / "meta/info.json").read_text())["features"],
            FRONT: {**CAMERA, "dtype": "video", "info": {"is_depth_map": True}}})(root),
        "has depth as 'observation.images.front', expected numbers or image or video",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", VIDEO_DAMAGE)
def test_damage_of_videos_is_named_with_file_and_column(tmp_path, what):
    damage, message = VIDEO_DAMAGE[what]
    camera = {**CAMERA, "dtype": "video"}
    damage(write_lerobot(tmp_path / "set", features={FRONT: camera, "action": ACTION, **ENDS}, lengths=(5, 3, 4)))
    with pytest.raises(ValueError, match=message):
        list(read_lerobot(tmp_path / "set", obs=[FRONT]))


def test_damage_of_images_is_named_with_the_row(tmp_path):
    features = {WRIST: {**CAMERA, "dtype": "image"}, "action": ACTION, **ENDS}
    root = write_lerobot(tmp_path / "set", features=features)
    images = parquet.read_table(root / DATA, partitioning=None)[WRIST].to_pylist()
    for wrong, message in [
        ({"bytes": images[0]["bytes"][:60], "path": None}, "row 3 is no image that can be read"),
        ({"bytes": b"no", "path": None}, "row 3 is no image that can be read"),
        ({"bytes": None, "path": "images/3.png"}, "has no bytes of an image in row 3"),
    ]:
        change(root / DATA, **{WRIST: [*images[:3], wrong, *images[4:]]})
        with pytest.raises(ValueError, match=f"column {WRIST} {message}"):
            list(read_lerobot(root))
    rewrite(features={**features, WRIST: {**features[WRIST], "shape": [32, 32, 3]}})(root)
    with pytest.raises(ValueError, match=r"row 0 .*it is \(64, 64, 3\) uint8, expected \(32, 32\)"):
        list(read_lerobot(root))


@pytest.mark.parametrize("module", ["pyarrow", "imageio_ffmpeg"])
def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch, module):
    camera = {**CAMERA, "dtype": "video"}
    root = write_lerobot(tmp_path / "set", features={FRONT: camera, "action": ACTION, **ENDS})
    for name in [name for name in sys.modules if name.split(".")[0] == module] + [module]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"{module} is not installed. Run: pip install 'worldloom\[data\]'"):
        list(read_lerobot(root))
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        list(read_lerobot(tmp_path / "absent"))
