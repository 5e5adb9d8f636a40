"""Episodes of LeRobot's datasets in version 3 of their layout, read without LeRobot.

Source: LeRobot's code of August 2026 (github.com/huggingface/lerobot, commit 7427f31): datasets/utils.py has the names
of files, dataset_metadata.py and dataset_writer.py write them, dataset_reader.py and video_utils.py read them. Many
episodes share a file: a record of each episode says where its rows and its frames are. Row t holds the observation that
action t was taken at, so the observation after the last action of an episode is not recorded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from worldloom.archive import UNREADABLE, explain
from worldloom.replay.frames import VideoFrames
from worldloom.replay.tables import Table
from worldloom.types import Array

INFO, EPISODES = "meta/info.json", "meta/episodes"
OBS, ACTION, REWARD, DONE, TRUNCATED = "observation.", "action", "next.reward", "next.done", "next.truncated"
ROW_NUMBERS = ("episode_index", "frame_index", "timestamp")  # columns that every data file has
NUMBERS = re.compile(r"(u?int|float)(8|16|32|64)|bool")
SEEN = ("numbers", "image", "video")  # the kinds of what can be observed
FIELD = re.compile(r"\{(video_key|chunk_index|file_index)(?::0(\d)d)?\}")
OFF_FRAME = 0.1  # of a frame's duration: float32 timestamps of an hour are a hundredth off


@dataclass(frozen=True)
class Feature:
    """A column as meta/info.json describes it; `size` is an image's height and width."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: tuple[int, int] = (0, 0)
    depth: bool = False

    @classmethod
    def read(cls, name: str, entry: Mapping[str, Any]) -> Feature:
        """Read an entry of `features`. Raises one of UNREADABLE for what is no such entry."""
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        if min(shape, default=1) < 1:
            raise ValueError(f"feature {name} has shape {shape}, expected numbers of at least 1")
        if dtype not in ("image", "video"):
            return cls(name, dtype, shape)
        if len(shape) != 3:
            raise ValueError(f"feature {name} has shape {shape}, expected height, width and channels")
        names, (first, second, third) = entry.get("names") or [""], shape
        size = (second, third) if names[0] in ("channel", "channels") else (first, second)
        about = {**(entry.get("video_info") or {}), **(entry.get("info") or {})}
        depth = bool(about.get("is_depth_map") or about.get("video.is_depth_map"))
        return cls(name, dtype, shape, size, depth)

    @property
    def kind(self) -> str:
        """Return what it holds: numbers, image, video, or its dtype if it cannot be read (text, depth)."""
        if self.depth:
            return "depth"
        return "numbers" if NUMBERS.fullmatch(self.dtype) else self.dtype


@dataclass(frozen=True)
class Layout:
    """Holds what meta/info.json says: the features, and where the files of rows and frames are."""

    root: Path
    fps: float
    features: Mapping[str, Feature]
    data_path: str
    video_path: str

    @classmethod
    def read(cls, root: Path) -> Layout:
        """Read meta/info.json. Raises ValueError for another version, or for what no such file holds."""
        if not root.is_dir():
            raise FileNotFoundError(f"{root} does not exist, expected the directory of a LeRobot dataset.")
        path = root / INFO
        try:
            info = json.loads(path.read_text())
            version = str(info["codebase_version"])
            features = {str(name): Feature.read(str(name), entry) for name, entry in info["features"].items()}
            made = cls(root, float(info["fps"]), features, str(info["data_path"]), str(info.get("video_path")))
        except UNREADABLE as error:
            raise ValueError(f"{path} describes no LeRobot dataset, or is damaged: {explain(error)}.") from error
        if not version.startswith("v3."):
            raise ValueError(
                f"{path} is of version {version[:20]}, expected v3. Convert the dataset with LeRobot's "
                "convert_dataset_v21_to_v30."
            )
        if not 0 < made.fps < float("inf"):
            raise ValueError(f"{path}: fps is {made.fps}, expected frames per second above 0.")
        return made

    def file(self, template: str, chunk: int, file: int, video: str = "") -> Path:
        """Return the path that a template means. Raises ValueError for one outside the dataset."""
        values: dict[str, Any] = {"chunk_index": chunk, "file_index": file, "video_key": video}
        name = FIELD.sub(lambda m: str(values[m[1]]).zfill(int(m[2] or 0)), template)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{self.root / INFO}: path {name!r} leads out of the dataset, expected one inside.")
        return self.root / name

    def feature(self, name: str, *kinds: str) -> Feature:
        """Return a feature of one of `kinds`. Raises ValueError that lists what there is."""
        found = self.features.get(name)
        if found is None or found.kind not in kinds:
            fitting = [feature.name for feature in self.features.values() if feature.kind in kinds]
            problem = "has no feature" if found is None else f"has {found.kind} as"
            without = {
                REWARD: " Without rewards: read_lerobot(reward=None).",
                DONE: " Without ends: read_lerobot(done=None).",
            }
            raise ValueError(
                f"{self.root / INFO} {problem} {name!r}, expected {' or '.join(kinds)}: one of {fitting}."
                + without.get(name, "")
            )
        return found

    def observed(self, names: Sequence[str] | None) -> list[Feature]:
        """Return the features to observe. Raises ValueError if there are none."""
        if names is None:
            names = [name for name, f in self.features.items() if name.startswith(OBS) and f.kind in SEEN]
        if not names:
            raise ValueError(f"{self.root / INFO} has no feature to observe in {sorted(self.features)}. Give obs=[…].")
        return [self.feature(name, *SEEN) for name in names]

    def records(self, videos: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the record of each episode, by its number: its length, and where its rows and frames are.

        Raises ValueError for records that are missing or name no such place.
        """
        whole = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        whole += [f"videos/{name}/{part}_index" for name in videos for part in ("chunk", "file")]
        times = [f"videos/{name}/from_timestamp" for name in videos]
        files = sorted((self.root / EPISODES).glob("*/*.parquet"))
        if not files:
            raise ValueError(f"{self.root / EPISODES} holds no Parquet file, expected the records of the episodes.")
        number = 0
        for path in files:
            table = Table(path, [*whole, *times])
            columns = {name: table.numbers(name) for name in (*whole, *times)}
            for name, column in columns.items():
                if (name in whole and column.dtype.kind not in "iu") or not (column >= (name == "length")).all():
                    raise table.refusal(name, "holds numbers that no dataset has, expected numbers of at least 0")
            for row in range(len(table)):
                if columns["episode_index"][row] != number:
                    raise table.refusal("episode_index", f"has {columns['episode_index'][row]}, expected {number} next")
                yield {name: column[row].item() for name, column in columns.items()}
                number += 1


def read_lerobot(
    directory: str | PathLike[str],
    *,
    obs: Sequence[str] | None = None,
    reward: str | None = REWARD,
    done: str | None = DONE,
    image_size: int | None = None,
    repeat_last: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the episodes of a LeRobot dataset (v3) in order, each as `ReplayBuffer.from_trajectories` takes it.

    obs: columns to observe; None takes all numbers, images and videos named observation.… One column gives arrays
    [L, …], several a mapping by name, without "observation.". Images and frames are channel-first uint8, resized to
    squares of `image_size` if given. reward: column of rewards; None gives zeros, for datasets without rewards. done:
    column that marks true ends; None if there are none. Where next.truncated is set too, an end counts as truncated.
    Actions stay as recorded: [L, A], or [L] if they are single integers; from_trajectories scales them by action_range.
    repeat_last: LeRobot does not record the observation after an episode's last action, so that this action, its
    reward and its end are dropped; True keeps them and takes the last observation for it once more, as LeRobot's own
    replay buffer does.

    Needs pyarrow and, for videos and images, imageio-ffmpeg, from worldloom[data]. Raises FileNotFoundError if the
    directory does not exist, ValueError for other or damaged datasets, naming file and column.
    """
    layout = Layout.read(Path(directory))
    reader = _Reader(layout, layout.observed(obs), reward, done, image_size)
    try:
        for record in layout.records([feature.name for feature in reader.seen if feature.kind == "video"]):
            episode = reader.read(record)
            if repeat_last:
                episode["observations"] = _with_last_twice(episode["observations"])
            yield episode
    finally:
        reader.close()


def holds_lerobot(directory: Path) -> bool:
    """Return whether a directory looks like a dataset of LeRobot."""
    return (directory / INFO).is_file()


class _Reader:
    """Reads one episode after the other; keeps the file of rows and the videos of the last one open."""

    def __init__(
        self, layout: Layout, seen: Sequence[Feature], reward: str | None, done: str | None, side: int | None
    ) -> None:
        self._layout, self._side, self.seen = layout, side, seen
        named = {"actions": ACTION, "rewards": reward, "terminations": done}
        self._numbers = {part: layout.feature(name, "numbers") for part, name in named.items() if name is not None}
        if done is not None and TRUNCATED in layout.features:
            self._numbers["truncations"] = layout.feature(TRUNCATED, "numbers")
        read = [*seen, *self._numbers.values()]
        self._columns = [*ROW_NUMBERS, *dict.fromkeys(feature.name for feature in read if feature.kind != "video")]
        self._table: Table | None = None
        self._videos: dict[str, tuple[Path, VideoFrames]] = {}

    def read(self, record: Mapping[str, Any]) -> dict[str, Any]:
        rows = self._rows(record)
        obs = {feature.name: self._observed(feature, record, rows) for feature in self.seen}
        part = {part: rows.numbers(feature.name, feature.shape) for part, feature in self._numbers.items()}
        length, none = len(rows), np.zeros(len(rows), bool)
        timeouts = part.get("truncations", none).reshape(length).astype(bool)
        return {
            "observations": next(iter(obs.values())) if len(obs) == 1 else {_short(n): v for n, v in obs.items()},
            "actions": _choices_alone(part["actions"]),
            "rewards": part.get("rewards", np.zeros(length, np.float32)).reshape(length),
            "terminations": part.get("terminations", none).reshape(length).astype(bool) & ~timeouts,
            "truncations": timeouts,
        }

    def close(self) -> None:
        for _, frames in self._videos.values():
            frames.close()

    def _rows(self, record: Mapping[str, Any]) -> Table:
        """Return the rows of an episode. Raises ValueError unless its file holds them, each once and in order."""
        path = self._layout.file(self._layout.data_path, record["data/chunk_index"], record["data/file_index"])
        if self._table is None or self._table.path != path:
            self._table = Table(path, self._columns)
        number, length = record["episode_index"], record["length"]
        at = np.flatnonzero(self._table.numbers("episode_index") == number)
        if len(at) != length or at[-1] - at[0] != length - 1:
            problem = f"has {len(at)} rows of episode {number}, expected {length} that follow one another"
            raise self._table.refusal("episode_index", problem)
        rows = self._table.part(int(at[0]), length)
        if (rows.numbers("frame_index") != np.arange(length)).any():
            raise rows.refusal("frame_index", f"does not count from 0 to {length - 1} in episode {number}")
        return rows

    def _observed(self, feature: Feature, record: Mapping[str, Any], rows: Table) -> Array:
        """Return an episode of one observation, [L, …]."""
        if feature.kind == "numbers":
            return rows.numbers(feature.name, feature.shape)
        if feature.kind == "image":
            return rows.images(feature.name, feature.size, self._side)
        name, fps, key = feature.name, self._layout.fps, f"videos/{feature.name}/"
        path = self._layout.file(self._layout.video_path, record[key + "chunk_index"], record[key + "file_index"], name)
        number = (record[key + "from_timestamp"] + rows.numbers("timestamp").astype(np.float64)) * fps
        first = round(number[0])
        if not (np.abs(number - first - np.arange(len(rows))) <= OFF_FRAME).all():
            raise rows.refusal("timestamp", f"does not lead from frame to frame of {path.name} at {fps} per second")
        if name not in self._videos or self._videos[name][0] != path:
            if name in self._videos:
                self._videos[name][1].close()
            self._videos[name] = path, VideoFrames(path, name, feature.size, fps, self._side)
        return self._videos[name][1].take(first, len(rows))


def _with_last_twice(obs: Any) -> Any:
    if isinstance(obs, dict):
        return {name: _with_last_twice(part) for name, part in obs.items()}
    return np.concatenate([obs, obs[-1:]])


def _choices_alone(actions: Array) -> Array:
    """Return single integers [L, 1] as [L], which replay makes one-hot; other actions as they are."""
    return actions[:, 0] if actions.shape[1:] == (1,) and actions.dtype.kind in "iu" else actions


def _short(name: str) -> str:
    return name.removeprefix(OBS)
