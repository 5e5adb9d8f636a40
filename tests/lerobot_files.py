"""A writer of small LeRobot datasets, file by file as LeRobot (v3.0) lays them out."""

import io
import json
import subprocess
from itertools import pairwise

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

FPS = 10
SIDE = 64
NUMBERED = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    **{
        name: {"dtype": "int64", "shape": [1], "names": None}
        for name in ("frame_index", "episode_index", "index", "task_index")
    },
}
STATE = {"dtype": "float32", "shape": [2], "names": ["x", "y"]}
ACTION = {"dtype": "float32", "shape": [2], "names": None}
CAMERA = {"shape": [SIDE, SIDE, 3], "names": ["height", "width", "channel"]}
ENDS = {
    "next.reward": {"dtype": "float32", "shape": [1], "names": None},
    "next.done": {"dtype": "bool", "shape": [1], "names": None},
}


def grey(number):
    """The picture of frame `number` of the dataset: one grey level."""
    return np.full((SIDE, SIDE, 3), 8 * number + 4, np.uint8)


def rows_of(feature, name, numbers, length):
    """The Arrow column of a feature for the frames `numbers` of an episode: [n, n + 0.5] for vectors, and so on."""
    n = np.asarray(numbers)
    at = np.arange(length)
    values = {
        "timestamp": (at / FPS).astype(np.float32), "frame_index": at, "index": n, "task_index": at * 0,
        "next.reward": 10 * n.astype(np.float32), "next.done": at == length - 1, "next.truncated": at == length - 1,
    }  # fmt: skip
    if name in values:
        return pa.array(values[name])
    if feature["dtype"] == "image":
        return pa.array(
            [{"bytes": png(grey(k)), "path": None} for k in n], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        )
    if feature["dtype"] == "string":
        return pa.array(["go"] * length)
    kind = pa.from_numpy_dtype(np.dtype(feature["dtype"]))
    if feature["shape"] == [1]:
        return pa.array(n % 3, kind)
    whole = n[:, None] + np.arange(np.prod(feature["shape"])) / 2
    whole = whole.reshape(length, *feature["shape"]).astype(feature["dtype"])
    if whole.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(whole.reshape(-1), kind), whole.shape[1])
    return pa.array(whole.tolist())


def png(pixels):
    held = io.BytesIO()
    imageio.imwrite(held, pixels, extension=".png")
    return held.getvalue()


def write_video(path, groups, codec):
    """Encode each group of frames alone and join them without encoding again, as LeRobot joins its episodes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [path.parent / f"part-{number}.mp4" for number in range(len(groups))]
    for part, numbers in zip(parts, groups, strict=True):
        writer = imageio_ffmpeg.write_frames(
            str(part), (SIDE, SIDE), fps=FPS, codec=codec, pix_fmt_out="yuv420p", macro_block_size=2,
            output_params=["-g", "2", "-crf", "20"], ffmpeg_log_level="quiet",
        )  # fmt: skip
        writer.send(None)
        for number in numbers:
            writer.send(grey(number))
        writer.close()
    (path.parent / "parts.txt").write_text("".join(f"file '{part}'\n" for part in parts))
    joined = ["-y", "-f", "concat", "-safe", "0", "-i", str(path.parent / "parts.txt"), "-c", "copy", str(path)]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *joined], check=True, capture_output=True)
    for part in (*parts, path.parent / "parts.txt"):
        part.unlink()


def write_lerobot(root, lengths=(5, 3, 4), features=None, files=(0, 0, 1), codec="libx264"):
    """Write episodes of `lengths`, each in data and video file `files[episode]`; frames count on from 0."""
    features = {"observation.state": STATE, "action": ACTION, **ENDS} if features is None else features
    features = {**features, **NUMBERED}
    starts = np.concatenate([[0], np.cumsum(lengths)])
    episodes = [list(range(a, b)) for a, b in pairwise(starts)]
    videos = [name for name, feature in features.items() if feature["dtype"] == "video"]
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    info = {
        "codebase_version": "v3.0", "fps": FPS, "features": features, "total_episodes": len(lengths),
        "total_frames": int(starts[-1]), "total_tasks": 1, "chunks_size": 1000, "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200, "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4", "robot_type": None,
        "splits": {"train": f"0:{len(lengths)}"},
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
    stats = {"action": {"min": [0.0, 0.5], "max": [starts[-1] - 1.0, starts[-1] - 0.5]}}  # of two numbers
    (root / "meta/stats.json").write_text(json.dumps(stats, indent=4))
    parquet.write_table(pa.table({"task_index": [0], "task": ["go"]}), root / "meta/tasks.parquet")
    records = []
    for file in sorted(set(files)):
        inside = [number for number, place in enumerate(files) if place == file]
        write_rows(root / f"data/chunk-000/file-{file:03d}.parquet", features, {n: episodes[n] for n in inside})
        for name in videos:
            write_video(root / f"videos/{name}/chunk-000/file-{file:03d}.mp4", [episodes[n] for n in inside], codec)
        for n in inside:
            before = sum(lengths[m] for m in inside if m < n) / FPS
            record = {
                "episode_index": n, "tasks": ["go"], "length": lengths[n], "data/chunk_index": 0,
                "data/file_index": file, "dataset_from_index": int(starts[n]), "dataset_to_index": int(starts[n + 1]),
            }  # fmt: skip
            for name in videos:
                record |= {f"videos/{name}/chunk_index": 0, f"videos/{name}/file_index": file}
                record |= {f"videos/{name}/from_timestamp": before}
                record |= {f"videos/{name}/to_timestamp": before + lengths[n] / FPS}
            records.append(record | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    parquet.write_table(pa.Table.from_pylist(records), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def write_rows(path, features, episodes):
    """Write a data file, one row group for each episode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    for number, numbers in episodes.items():
        columns = {n: rows_of(f, n, numbers, len(numbers)) for n, f in features.items() if f["dtype"] != "video"}
        columns["episode_index"] = pa.array([number] * len(numbers))
        table = pa.table(columns)
        writer = writer or parquet.ParquetWriter(path, table.schema, compression="snappy", use_dictionary=True)
        writer.write_table(table)
    writer.close()


def change(path, **columns):
    """Replace columns of a Parquet file; None drops one."""
    table = parquet.read_table(path, partitioning=None)
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.remove_column(at) if values is None else table.set_column(at, name, pa.array(values))
    parquet.write_table(table, path)
