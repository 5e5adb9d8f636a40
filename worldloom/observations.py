"""Observations by key: vectors and images, as the encoders of world models read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloom import functional as fn
from worldloom.types import Obs, ObsShape, is_image

ObsShapes = Mapping[str, tuple[int, ...]]
Classes = Mapping[str, int]  # the class count, by key, of observations that are class indices
VECTOR = "obs"  # the key of an observation that is not a mapping
MISSING = float("-inf")  # marks a number that was not observed, as -1 does a class index


def as_mapping(obs: Any) -> dict[str, Any]:
    """Return observations by key; a single one gets the key "obs"."""
    return dict(obs) if isinstance(obs, Mapping) else {VECTOR: obs}


def as_tuples(obs_shape: ObsShape) -> ObsShape:
    """Return the shape of an observation, or a mapping of shapes, as tuples."""
    if isinstance(obs_shape, Mapping):
        return {name: tuple(shape) for name, shape in obs_shape.items()}
    return tuple(obs_shape)


def as_lists(obs_shape: ObsShape) -> list[int] | dict[str, list[int]]:
    """Return the shape of an observation, or a mapping of shapes, as lists, which JSON can hold."""
    if isinstance(obs_shape, Mapping):
        return {name: list(shape) for name, shape in obs_shape.items()}
    return list(obs_shape)


def split_kinds(shapes: ObsShapes) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return (vectors, images), each sorted by name. Raises ValueError unless image sides agree and halve to 3..16."""
    images = {name: tuple(shapes[name]) for name in sorted(shapes) if is_image(tuple(shapes[name]))}
    vectors = {name: tuple(shapes[name]) for name in sorted(shapes) if name not in images}
    sides = {shape[1:] for shape in images.values()}
    if len(sides) > 1:
        raise ValueError(f"images of different sides {sorted(sides)}, expected one. Resize them ({', '.join(images)}).")
    for name, (_, height, width) in images.items():
        if any(side % 16 or not 3 <= side // 16 <= 16 for side in (height, width)):
            raise ValueError(
                f"obs {name!r} is {height}x{width}, expected sides that are halved four times to 3..16: multiples of "
                "16 from 48 to 256. Resize the image."
            )
    return vectors, images


def vector_sizes(shapes: ObsShapes, classes: Classes) -> dict[str, int]:
    """Return the number of entries of each flattened vector; class indices count one-hot."""
    return {name: int(torch.Size(shape).numel()) * classes.get(name, 1) for name, shape in shapes.items()}


def flat_vectors(obs: Mapping[str, Tensor], shapes: ObsShapes, classes: Classes) -> Tensor:
    """Return symlog of every vector, and one-hot class indices, flattened and concatenated in order of name: [..., V].

    Entries that are marked as missing become zeros.
    """
    parts = []
    for name, shape in shapes.items():
        value = obs[name]
        if name in classes:
            value = fn.one_hot(value.long(), classes[name])  # all zeros for -1
            parts.append(value.float().flatten(value.ndim - len(shape) - 1))
            continue
        value = torch.where(value == MISSING, 0.0, fn.symlog(value.float()))
        parts.append(value.flatten(value.ndim - len(shape)) if shape else value.unsqueeze(-1))
    return torch.cat(parts, -1)


def joined_images(obs: Mapping[str, Tensor], images: ObsShapes) -> Tensor:
    """Return all images [..., C, h, w] as floats in [0, 1], their channels one after the other."""
    return torch.cat([fn.unit_pixels(obs[name]) for name in images], -3)


def split_images(pixels: Tensor, images: ObsShapes) -> dict[str, Tensor]:
    """Return the images in pixels [..., C, h, w] by key: the inverse of `joined_images`."""
    return dict(zip(images, pixels.split([shape[0] for shape in images.values()], -3), strict=True))


def reconstruction_errors(
    decoded: Mapping[str, Tensor], obs: Mapping[str, Tensor], shapes: ObsShapes, classes: Classes
) -> dict[str, Tensor]:
    """Return squared errors, or cross-entropies of class indices, summed over each observation's entries: [...].

    decoded: [..., *shape] by key, or logits [..., *shape, K]. Vectors are compared in symlog space, images in [0, 1].
    Entries that are marked as missing cost nothing.
    """
    errors = {}
    for name, shape in shapes.items():
        found, value = decoded[name].float(), obs[name]
        if name in classes:
            log_probs = F.log_softmax(found, -1)
            chosen = log_probs.gather(-1, value.long().clamp(min=0).unsqueeze(-1)).squeeze(-1)
            error = -chosen * (value >= 0)
        elif is_image(shape):
            error = (found - fn.unit_pixels(value)).square()
        else:
            seen = value != MISSING
            error = (found - fn.symlog(torch.where(seen, value, 0.0).float())).square() * seen
        errors[name] = error.flatten(error.ndim - len(shape)).sum(-1) if shape else error
    return errors


def checked(obs: Obs, shapes: ObsShapes, classes: Classes, where: str, lead: int) -> dict[str, Tensor]:
    """Return every observation of `shapes` by key, [B, …] or, for lead=2, [B, T, …].

    where: the caller, for the message. Raises ValueError that names a missing key, a wrong shape or kind.
    """
    given = as_mapping(obs)
    for name, shape in shapes.items():
        if name not in given:
            raise ValueError(f"{where}: obs lacks the key {name!r}; it has {sorted(given)}, expected {sorted(shapes)}.")
        if tuple(given[name].shape[lead:]) != shape:
            letters = ", ".join(("B", "T")[:lead])
            raise ValueError(f"{where}: obs {name!r} is {tuple(given[name].shape)}, expected [{letters}, {shape}].")
        _check_kind(given[name], name, is_image(shape), classes, where)
    return {name: given[name] for name in shapes}


def _check_kind(value: Tensor, name: str, image: bool, classes: Classes, where: str) -> None:
    """Raise ValueError where class indices are given for numbers or images, or numbers for class indices."""
    indices = not value.is_floating_point()
    if image and indices and value.dtype != torch.uint8:
        shape = tuple(value.shape)
        raise ValueError(f"{where}: image {name!r} is {value.dtype} {shape}, expected uint8, or floats in [0, 1].")
    if name in classes and not indices:
        raise ValueError(f"{where}: obs {name!r} is {value.dtype}, expected class indices (integers or bools).")
    if indices and name not in classes and not image:
        raise ValueError(
            f"{where}: obs {name!r} is {value.dtype} {tuple(value.shape)} without a class count. Give "
            f"obs_classes={{{name!r}: count}} where the model is made, or floats."
        )
