"""Model directories: config.json describes the model, model.safetensors holds its parameters. Nothing is unpickled.

Each checkpoint of a run holds one; the newest is the trained agent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldloom.locations import Location, is_file, local_folder, locate, read_bytes


def save_model(directory: Location, description: dict[str, Any], model: nn.Module) -> None:
    """Write config.json and model.safetensors. Raises OSError if the disk refuses."""
    save_described(directory, description, model.state_dict())


def save_described(directory: Location, description: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Write what `save_model` writes, from a model's state dict."""
    folder = local_folder(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_parameters(folder / "model.safetensors", parameters)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def save_parameters(path: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError if the disk refuses, for which safetensors has no error of its own."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_description(directory: Location) -> dict[str, Any]:
    """Return config.json of a model directory. Raises FileNotFoundError or ValueError that names the directory."""
    path = locate(directory) / "config.json"
    if not is_file(path):
        raise FileNotFoundError(f"{directory} holds no config.json, expected a directory written by save_pretrained.")
    try:
        description = json.loads(read_bytes(path).decode())
        if not isinstance(description, dict):
            raise ValueError(f"it holds a {type(description).__name__}, expected an object")
    except ValueError as error:  # not text, not JSON, or other JSON
        raise ValueError(f"{path} is not valid JSON ({error}). Save the model again.") from error
    return description


def load_parameters(path: Path, model: nn.Module) -> None:
    """Fill `model` from a safetensors file. Raises FileNotFoundError, or ValueError if names or shapes differ."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no {path.name}. Save the model again.") from None
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}). Save the model again.") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from error
