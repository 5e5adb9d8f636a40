"""Checkpoint files of TD-MPC2's authors: a reader of all three layouts and of Newt's, and a writer of the current one.

Layout C is that of their code today, B that of October 2023 to November 2024, A is older than the public code; A's
encoders take symlog of the observation first. Nothing in a file is executed, and no model is built before all tensors
fit it; see `worldloom.tdmpc2.official.tensors`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worldloom.tdmpc2.config import TDMPC2Config
from worldloom.tdmpc2.official.mmbench import MMBENCH
from worldloom.tdmpc2.official.newt import from_newt, is_newt
from worldloom.tdmpc2.official.tensors import TensorFile, listed
from worldloom.tdmpc2.tasks import DM_CONTROL_STEPS, MT30, MT80, Task
from worldloom.tdmpc2.world_model import TDMPC2WorldModel
from worldloom.types import ObsShape

State = dict[str, Tensor]

OURS = {  # prefix in layout C -> prefix of our parameters
    "_encoder.state.": "encoder.",
    "_encoder.rgb.2.": "encoder.convs.0.",
    "_encoder.rgb.4.": "encoder.convs.1.",
    "_encoder.rgb.6.": "encoder.convs.2.",
    "_encoder.rgb.8.": "encoder.convs.3.",
    "_dynamics.": "dynamics.",
    "_reward.": "reward.",
    "_pi.": "policy.",
    "_termination.": "termination.",
    "_task_emb.": "task_embedding.",
    "_Qs.params.0.": "q.first.",
    "_Qs.params.1.": "q.second.",
    "_Qs.params.2.": "q.output.",
    "_target_Qs_params.0.": "target_q.first.",
    "_target_Qs_params.1.": "target_q.second.",
    "_target_Qs_params.2.": "target_q.output.",
}
PIXELS = (64, 64)  # height and width that the authors' image encoder takes
NO_CHECKPOINT = "not a checkpoint of TD-MPC2"
COUNTS = ("log_std_min", "log_std_dif", "_action_masks")  # tensors that may be integers
FLAT_Q = ("weight", "bias", "ln.weight", "ln.bias")  # the order of a value layer's tensors in layouts A and B
LAYOUT_A_MLP = {"0": "0", "1": "0.ln", "3": "1", "4": "1.ln", "6": "2"}
LAYOUT_A_DYNAMICS = {"0.0": "0", "0.1": "0.ln", "0.3": "1", "0.4": "1.ln", "0.6": "2", "1": "2.ln"}


def load_official(
    path: str | os.PathLike[str],
    obs_shape: ObsShape | None = None,
    action_dim: int | None = None,
    device: torch.device | str = "cpu",
    episode_length: int | None = None,
    tasks: Sequence[Task] = (),
    overrides: Mapping[str, Any] | None = None,
) -> TDMPC2WorldModel:
    """Load a model of TD-MPC2 or Newt from an official file; every size is inferred from its shapes.

    obs_shape, action_dim: checked against the file if given; Newt's models of one task read 128 numbers, filled up with
    zeros, unless obs_shape says how many there are. episode_length: agent steps, by default 500 (DeepMind Control); it
    sets the discount, which no file holds. tasks: those of a multi-task file, by default mt30 for 30 tasks, mt80 for
    80 and MMBench for 200. Raises FileNotFoundError, or ValueError for files that are not TD-MPC2's, are damaged, hold
    anything but tensors of finite real numbers, or have unexpected keys or sizes.
    """
    state, settings = _current(read_official(path), obs_shape, path)
    ours = _rename(state, path)
    fields = infer_sizes(ours, path)
    known = _tasks_of(ours, tasks, path)
    masks = ours.pop("action_masks", None)
    size = ours["policy.2.weight"].shape[0] // 2
    shape: tuple[int, ...]
    if "encoder.convs.0.weight" in ours:
        shape = (ours["encoder.convs.0.weight"].shape[1], *PIXELS)
    else:
        shape = (ours["encoder.0.weight"].shape[1] - fields["task_dim"],)
    wanted_shape = tuple(obs_shape) if isinstance(obs_shape, Sequence) else obs_shape
    for name, wanted, found in (("obs_shape", wanted_shape, shape), ("action_dim", action_dim, size)):
        if wanted is not None and wanted != found:
            raise ValueError(f"{path} holds a model with {name}={found}, but {name}={wanted} was asked for.")
    try:
        config = TDMPC2Config(**{**fields, **settings, **(overrides or {})})
        arguments = (shape, size, config, episode_length or DM_CONTROL_STEPS, known)
        with torch.device("meta"):  # a model without memory: so far, the file alone has chosen its sizes
            expected = TDMPC2WorldModel(*arguments).state_dict()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: no model has its sizes and these settings: {error}") from error
    _check_shapes(expected, ours, path)
    model = TDMPC2WorldModel(*arguments)
    embedding = model.task_embedding
    if masks is not None and (embedding is None or not torch.equal(masks.float(), embedding.action_masks)):
        raise ValueError(f"{path} masks actions differently than these {len(known)} tasks do. Give its own tasks.")
    model.load_state_dict(ours)
    return model.to(device)


def save_official(model: TDMPC2WorldModel, path: str | os.PathLike[str]) -> None:
    """Write layout C, which the authors' code loads. Raises ValueError for a model that their code cannot hold."""
    c = model.config
    for holds, what in (
        (c.symlog_obs, "takes symlog of observations"),
        (c.simnorm_dim != 8, f"has simplices of {c.simnorm_dim}"),
        (c.bin_limit != 10, f"has bins up to {c.bin_limit:g}"),
        ((c.log_std_min, c.log_std_max) != (-10, 2), f"has log_std in [{c.log_std_min:g}, {c.log_std_max:g}]"),
        (c.given_tasks, "has given task embeddings"),
        (model.action_classes, "chooses discrete actions"),
        (model.pixels and model.obs_shape[1:] != PIXELS, "reads images other than 64x64"),
        (model.pixels and c.latent_dim != 512, "projects images"),
    ):
        if holds:
            raise ValueError(f"save_official: this model {what}, which layout C cannot express. Use save_pretrained.")
    theirs: dict[str, Any] = {
        "log_std_min": torch.tensor(int(c.log_std_min)),
        "log_std_dif": torch.tensor(int(c.log_std_max - c.log_std_min)),
    }
    for name, tensor in model.state_dict().items():
        theirs[_official_name(name)] = tensor.detach().cpu().clone()
    for name in [name for name in theirs if name.startswith("_Qs.params.")]:
        theirs["_detach_Qs_params." + name.removeprefix("_Qs.params.")] = theirs[name].clone()
    for group in ("_Qs.params", "_detach_Qs_params", "_target_Qs_params"):
        theirs |= {f"{group}.__batch_size": torch.Size([c.num_q]), f"{group}.__device": None}
    if model.task_embedding is not None:
        theirs["_action_masks"] = model.task_embedding.action_masks.cpu().clone()
    torch.save({"model": theirs}, path)


def read_official(path: str | os.PathLike[str]) -> State:
    """Return a file's tensors by their names there; execute nothing. Raises ValueError for a file of another kind, or
    with a tensor that no network has."""
    file = TensorFile(path, NO_CHECKPOINT)
    model = file.content.get("model", file.content) if isinstance(file.content, dict) else None
    if not isinstance(model, dict) or not any(_name(key).startswith("_dynamics.") for key in model):
        raise ValueError(f'{path} is {NO_CHECKPOINT}: expected a mapping "model" with keys "_dynamics…".')
    state = file.tensors(
        {_name(k) or k: v for k, v in model.items() if not _name(k).rpartition(".")[2].startswith("__")}
    )
    for name, value in state.items():
        if name not in COUNTS and not value.is_floating_point():
            raise ValueError(f"{path}: {name} is {value.dtype}, expected floats. Check where the file comes from.")
        if not value.float().isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity, expected finite numbers. Use another checkpoint.")
    return state


def _name(key: Any) -> str:
    """Return a tensor's name without what training on several GPUs puts before it; "" for what is no text."""
    return key.removeprefix("module.") if isinstance(key, str) else ""


def _current(state: State, obs_shape: ObsShape | None, path: object) -> tuple[State, dict[str, Any]]:
    """Return a state in any layout under the names of C, and the config fields that its layout sets."""
    if not is_newt(state):
        state, symlog_obs = as_current(state, path)
        return state, {"symlog_obs": symlog_obs}
    size = obs_shape[0] if isinstance(obs_shape, Sequence) and len(obs_shape) == 1 else None
    return from_newt(state, size, path), {"given_tasks": "_task_emb.weight" in state, "dropout": 0.0}


def as_current(state: State, path: object = "the checkpoint") -> tuple[State, bool]:
    """Return a state in any layout under the names of C, and True if observations pass through symlog (layout A)."""
    twice = ("_detach_Qs.params.", "_target_Qs.params.") if "_detach_Qs_params.0.weight" in state else ()
    state = {key: value for key, value in state.items() if not key.startswith(twice or ("\0",))}
    first, second = state.get("_encoder.state.1.weight"), state.get("_encoder.state.2.weight")
    oldest = (
        not any(key.startswith("_encoder.state.0.") for key in state)
        and first is not None
        and first.ndim == 2
        and second is not None
        and second.ndim == 1
    )
    if oldest:
        state = _unique({_from_layout_a(key): (key, value) for key, value in state.items()}, state, path)
    return {_from_flat_q(key): value for key, value in state.items()}, oldest


def _from_layout_a(key: str) -> str:
    """Return the name in layout C. Some names of A mean something else in C, so never rename in place."""
    module, _, rest = key.partition(".")
    place, _, kind = rest.rpartition(".")
    if module == "_encoder" and (match := re.fullmatch(r"state\.(\d+)", place)):
        layer, part = divmod(int(match[1]) - 1, 3)
        return f"_encoder.state.{layer}{'.ln' if part else ''}.{kind}" if part < 2 and layer >= 0 else key
    if module == "_dynamics" and place in LAYOUT_A_DYNAMICS:
        return f"{module}.{LAYOUT_A_DYNAMICS[place]}.{kind}"
    if module in ("_reward", "_pi", "_termination") and place in LAYOUT_A_MLP:
        return f"{module}.{LAYOUT_A_MLP[place]}.{kind}"
    return key


def _unique(renamed: Mapping[str, tuple[str, Tensor]], state: State, path: object) -> State:
    if len(renamed) != len(state):
        lost = state.keys() - {old for old, _ in renamed.values()}
        raise ValueError(f"{path} has keys that are not TD-MPC2's: {listed(lost)}.")
    return {new: value for new, (_, value) in renamed.items()}


def _from_flat_q(key: str) -> str:
    """Return the name in layout C of a flat one: `_Qs.params.5` is the second layer's bias, and so on."""
    match = re.fullmatch(r"(_Qs\.params|_target_Qs\.params)\.(\d+)", key)
    if not match:
        return key
    group = match[1].replace("_target_Qs.params", "_target_Qs_params")
    layer, part = divmod(int(match[2]), 4)
    return f"{group}.{layer}.{FLAT_Q[part]}"


def _rename(state: State, path: object) -> State:
    """Return layout C under our names. `_detach_Qs_params` replaces `_Qs.params`, as in the authors' code."""
    state = dict(state)
    for name, expected in (("log_std_min", -10), ("log_std_dif", 12)):
        found = state.pop(name, torch.tensor(expected))
        if found.numel() != 1 or found.item() != expected:
            raise ValueError(f"{path}: {name} is not {expected}, expected log_std in [-10, 2].")
    detached = {k: state.pop(k) for k in list(state) if k.startswith("_detach_Qs_params.")}
    if detached:
        names = {"_Qs.params." + key.removeprefix("_detach_Qs_params.") for key in detached}
        own = {key for key in state if key.startswith("_Qs.params.")}
        if names != own:
            raise ValueError(f"{path}: _detach_Qs_params and _Qs.params differ in {listed(names ^ own)}.")
        state |= {"_Qs.params." + key.removeprefix("_detach_Qs_params."): value for key, value in detached.items()}
    ours = {}
    for key, value in state.items():
        prefix = next((theirs for theirs in OURS if key.startswith(theirs)), None)
        if prefix is None and key != "_action_masks":
            raise ValueError(f"{path} has a key that is not TD-MPC2's: {key}.")
        ours["action_masks" if prefix is None else OURS[prefix] + key.removeprefix(prefix)] = value
    return ours


def infer_sizes(ours: State, path: object = "the checkpoint") -> dict[str, Any]:
    """Return the config fields that shape a model, from its tensors' shapes. Raises ValueError if any is missing."""
    pixels = any(name.startswith("encoder.convs.") for name in ours)
    needed = ["dynamics.0.weight", "dynamics.2.weight", "reward.2.weight", "policy.2.weight"]
    needed += ["q.first.weight", "target_q.first.weight", "encoder.convs.0.weight" if pixels else "encoder.0.weight"]
    if missing := [name for name in needed if name not in ours]:
        raise ValueError(
            f"{path} lacks {', '.join(map(_official_name, missing))}: it is no checkpoint of TD-MPC2, or is cut short."
        )
    for name in (*needed, "task_embedding.weight"):
        axes = 4 if ".convs." in name else 3 if "q." in name else 2
        if name in ours and ours[name].ndim != axes:
            found = tuple(ours[name].shape)
            raise ValueError(f"{path}: {_official_name(name)} has shape {found}, expected {axes} axes.")
    embedding = ours.get("task_embedding.weight")
    encoder = (
        {
            "encoder_dim": ours["encoder.0.weight"].shape[0],
            "encoder_layers": sum(bool(re.fullmatch(r"encoder\.\d+\.weight", name)) for name in ours),
        }
        if not pixels
        else {}
    )
    return {
        **encoder,
        "mlp_dim": ours["dynamics.0.weight"].shape[0],
        "latent_dim": ours["dynamics.2.weight"].shape[0],
        "num_q": ours["q.first.weight"].shape[0],
        "num_bins": ours["reward.2.weight"].shape[0],
        "episodic": any(name.startswith("termination.") for name in ours),
        "task_dim": 0 if embedding is None else embedding.shape[1],
    }


def _tasks_of(ours: State, tasks: Sequence[Task], path: object) -> Sequence[Task]:
    embedding = ours.get("task_embedding.weight")
    count = 0 if embedding is None else len(embedding)
    known = tuple(tasks) or {0: (), len(MT30): MT30, len(MT80): MT80, len(MMBENCH): MMBENCH}.get(count)
    if known is None:
        raise ValueError(f"{path} knows {count} tasks, which are not mt30, mt80 or MMBench. Give tasks=[Task(…), …].")
    if len(known) != count:
        raise ValueError(f"{path} knows {count} tasks, but {len(known)} were given.")
    return known


def _check_shapes(expected: State, ours: State, path: object) -> None:
    for word, names in (("lacks", expected.keys() - ours.keys()), ("has unknown", ours.keys() - expected.keys())):
        if names:
            raise ValueError(f"{path} {word} {listed(map(_official_name, names))}, expected one model's tensors.")
    for name, value in ours.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {_official_name(name)} is {tuple(value.shape)}, expected {tuple(expected[name].shape)} "
                "to fit the other tensors."
            )


def _official_name(name: str) -> str:
    """Return the name in layout C of one of our parameters."""
    fitting = [(theirs, ours) for theirs, ours in OURS.items() if name.startswith(ours)]
    theirs, ours = max(fitting, key=lambda pair: len(pair[1]))  # encoder.convs.0. before encoder.
    return theirs + name.removeprefix(ours)
