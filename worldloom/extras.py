"""The extras that install optional packages, for errors that say how to install them."""

from __future__ import annotations

import re

EXTRAS = {
    "ale_py": "atari",
    "Box2D": "box2d",
    "pygame": "box2d",
    "mujoco": "mujoco",
    "dm_control": "dmc",
    "shimmy": "dmc",
    **dict.fromkeys(("h5py", "minari", "pyarrow", "imageio_ffmpeg"), "data"),
    **dict.fromkeys(("onnx", "onnxscript"), "export"),
    "huggingface_hub": "hub",
    **dict.fromkeys(("ray", "yaml", "jsonargparse", "tensorboardX", "rich", "imageio"), "training"),
    **dict.fromkeys(("matplotlib", "jinja2", "shtab"), "training"),
}


def how_to_install(module: str) -> str:
    """Return a sentence that names the module and the command that installs it."""
    return f"{module} is not installed. Run: pip install 'worldloom[{EXTRAS[module]}]'"


def missing_extra(error: BaseException | None) -> str | None:
    """Return `how_to_install` for the module that this error, or one of its causes, misses; None for other errors."""
    while error is not None:
        named = [error.name or ""] if isinstance(error, ImportError) else re.findall(r"\w+", str(error))
        found = next((known for known in EXTRAS for word in named if word.lower() == known.lower()), None)
        if found is not None and (isinstance(error, ImportError) or "not installed" in str(error)):
            return how_to_install(found)
        error = error.__cause__
    return None
