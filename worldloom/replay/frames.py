"""Images and videos of recorded episodes, as channel-first uint8 arrays."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.archive import UNREADABLE, explain
from worldloom.extras import how_to_install
from worldloom.spaces import resize_image
from worldloom.types import Array

# A playlist in place of a video could name other files, or addresses: nothing but one mp4 file is read.
ONE_FILE = ["-f", "mp4", "-protocol_whitelist", "file"]
EACH_FRAME_ONCE = ["-fps_mode", "passthrough"]
FPS_TOLERANCE = 0.01  # relative: a video whose rate differs more has other frames than the rows do


class VideoFrames:
    """The frames of one mp4 file by number, decoded from its beginning: cheapest if asked for in order.

    size: height and width that the frames must have. fps: frames per second, checked too. side: of the squares that
    frames are resized to; None leaves them. name: of the column, for errors. Needs imageio-ffmpeg, from
    worldloom[data]. Raises ValueError for a file that cannot be decoded or differs.
    """

    def __init__(self, path: Path, name: str, size: tuple[int, int], fps: float, side: int | None) -> None:
        self._path, self._name, self._size, self._fps, self._side = path, name, size, fps, side
        self._frames: Iterator[Any] = iter(())
        self._at = -1  # number of the next frame; -1 before the file is opened

    def take(self, first: int, count: int) -> Array:
        """Return frames first to first + count as [count, 3, H, W] uint8. Raises ValueError if there are fewer."""
        try:
            if not 0 <= self._at <= first:
                self._open()
            while self._at < first:
                self._next()
            return np.stack([self._image(self._next()) for _ in range(count)])
        except StopIteration:
            raise self._refusal(f"ends after {self._at} frames, expected at least {first + count}") from None
        except UNREADABLE as error:
            raise self._refusal(f"cannot be read: {explain(error)}") from error

    def close(self) -> None:
        """Stop the decoder."""
        if hasattr(self._frames, "close"):
            self._frames.close()
        self._at = -1

    def _open(self) -> None:
        try:
            import imageio_ffmpeg
        except ImportError:
            raise ImportError(f"{self._path} is a video, but {how_to_install('imageio_ffmpeg')}") from None
        self.close()
        if not self._path.is_file():
            raise ValueError("the file is missing")
        frames = imageio_ffmpeg.read_frames(
            os.path.abspath(self._path), input_params=list(ONE_FILE), output_params=list(EACH_FRAME_ONCE)
        )
        self._frames, about = frames, next(frames)
        found, rate = tuple(reversed(about["size"])), about["fps"]
        if found != self._size:
            raise ValueError(f"its frames are {found}, expected {self._size} (height, width) as meta/info.json says")
        if abs(rate - self._fps) > FPS_TOLERANCE * self._fps:
            raise ValueError(f"it has {rate} frames per second, expected {self._fps} as meta/info.json says")
        self._at = 0

    def _next(self) -> bytes:
        frame: bytes = next(self._frames)
        self._at += 1
        return frame

    def _image(self, frame: bytes) -> Array:
        pixels = np.frombuffer(frame, np.uint8).reshape(*self._size, 3)
        return channel_first(pixels, self._side)

    def _refusal(self, problem: str) -> ValueError:
        short = textwrap.shorten(problem, 300, placeholder=" …")  # ffmpeg says much
        return ValueError(f"{self._path}: video of {self._name} {short}. Get the dataset anew.")


def decode_image(encoded: bytes, size: tuple[int, int], side: int | None) -> Array:
    """Return an encoded image, such as PNG or JPEG, as [C, H, W] uint8; grey ones have one channel.

    size: height and width that it must have; side: as for `VideoFrames`. Needs imageio, from worldloom[data]. Raises
    ValueError for what is no such image.
    """
    try:
        import imageio.v3 as imageio
    except ImportError:
        raise ImportError(f"the episodes hold images, but {how_to_install('imageio_ffmpeg')}") from None
    try:
        about = imageio.improps(encoded, plugin="pillow")
        if about.shape[:2] != size or about.dtype != np.uint8:
            raise ValueError(f"it is {about.shape} {about.dtype}, expected {size} (height, width) of uint8")
        pixels = imageio.imread(encoded, plugin="pillow")
    except UNREADABLE as error:
        raise ValueError(f"is no image that can be read: {explain(error)}") from error
    return channel_first(pixels[..., None] if pixels.ndim == 2 else pixels[..., :3], side)


def channel_first(pixels: Array, side: int | None) -> Array:
    """Return an image [H, W, C] as [C, H, W], resized to a square of `side` if given."""
    image = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    return resize_image(image, side) if side is not None else image
