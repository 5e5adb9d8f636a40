"""An agent's acting as a program, and the files that hold it: they act where worldloom is not installed.

Names of inputs and outputs say what they are. `X_in` is state: zeros at first, then the output `X_out` of the step
before. `normal_X`, `uniform_X` and `exponential_X` are noise of that standard distribution, drawn anew for each step.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from worldloom.extras import how_to_install
from worldloom.locations import local_folder
from worldloom.types import Agent, ObsShape, is_image

M = TypeVar("M", bound=nn.Module)

TORCH, ONNX = ".pt2", ".onnx"
OPSET = 20  # of ONNX; onnxruntime reads it since 1.17
ABOUT = "worldloom.json"  # what a .pt2 file calls its description; in ONNX it is metadata, without the suffix


@dataclass(frozen=True)
class Program:
    """One step of acting as a function of tensors: `module(**inputs)` gives `action` and the state, by name."""

    module: nn.Module
    inputs: Mapping[str, Tensor]  # an example of each; all shapes are fixed


@runtime_checkable
class Exportable(Protocol):
    """The further method of an agent that can leave the house."""

    def acting_program(self, envs: int, sample: bool, plan: bool | None) -> Program:
        """Return `act` of `envs` environments as a program. Raises ValueError for what this agent cannot do."""


def example_obs(shape: ObsShape, envs: int, classes: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an example of each observation [envs, *shape] by the name of its input, and input -> key.

    One observation is called `obs`, those of a mapping `obs_KEY`. Images are uint8, class indices (the keys in
    `classes`) int32, all others float32. Raises ValueError for keys that give one name.
    """
    shapes = dict(shape) if isinstance(shape, Mapping) else {"obs": shape}
    single = not isinstance(shape, Mapping)
    names = {"obs" if single else "obs_" + re.sub(r"\W", "_", key): key for key in shapes}
    if len(names) < len(shapes):
        raise ValueError(f"export: the observations {sorted(shapes)} differ in signs only. Rename them.")
    examples = {}
    for name, key in names.items():
        kind = torch.uint8 if is_image(tuple(shapes[key])) else torch.int32 if key in classes else torch.float32
        examples[name] = torch.zeros(envs, *shapes[key], dtype=kind)
    return examples, names


def without(model: M, *parts: str) -> M:
    """Return a copy of a module on the CPU that lacks some parts, so that no file holds what it does not need."""
    kept = copy.copy(model)
    kept._modules = {name: None if name in parts else part for name, part in model._modules.items()}
    return copy.deepcopy(kept).cpu()


class Step(nn.Module):
    """A step of acting with inputs and outputs by name.

    step: a module from tensors to `action` and the state after; it takes `is_first`, observations as `obs/KEY`, the
    state before, and noise. obs_names: input -> key. state: names. modes: noise that is not an input, by name.
    """

    def __init__(
        self, step: nn.Module, obs_names: Mapping[str, str], state: Sequence[str], modes: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.step, self.obs_names, self.state, self.modes = step, dict(obs_names), tuple(state), dict(modes)

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        before = {f"obs/{key}": given[name] for name, key in self.obs_names.items()}
        before |= {name: given[f"{name}_in"] for name in self.state}
        after = self.step({**given, **before, **self.modes})
        return {"action": after["action"].clone(), **{f"{name}_out": after[name] for name in self.state}}


def step_program(
    step: nn.Module,
    obs_shape: ObsShape,
    envs: int,
    state: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    sample: bool,
) -> Program:
    """Return a step of acting, as `Step` takes it, as a program.

    state: the first one, zeros. noise: the numbers that give every distribution's mode; `sample` makes them inputs.
    """
    obs, obs_names = example_obs(obs_shape, envs)
    before = {f"{name}_in": value.cpu() for name, value in state.items()}
    inputs = {**obs, "is_first": torch.ones(envs, dtype=torch.bool), **before, **(noise if sample else {})}
    apart = {name: value.clone() for name, value in inputs.items()}  # torch.export takes one tensor for one input
    return Program(Step(step, obs_names, tuple(state), {} if sample else noise), apart)


def refuse_plan(plan: bool | None, name: str) -> None:
    """Raise ValueError for plan=True, for an agent of this name that acts without a search."""
    if plan:
        raise ValueError(f"export: plan is True, but {name} acts with its policy. Leave it out.")


def export(
    agent: Agent,
    path: str | os.PathLike[str],
    *,
    envs: int = 1,
    sample: bool = False,
    plan: bool | None = None,
) -> Path:
    """Write a file that acts as `agent` does, without worldloom: `.pt2` for torch.export, `.onnx` for ONNX.

    envs: E, the environments of a call; all shapes are fixed. sample: draw actions as in training, with noise as
    inputs; by default the file acts without exploration: DreamerV3 with the mode of latents and policy, TD-MPC2 as
    `act(explore=False)`, without random shifts of images. plan: search with the model, whose noise is an input, or act
    with the policy alone (obs to mean action), which does worse on hard tasks; by default as the agent does.

    Actions [E, A] lie in [-1, 1] (samples of DreamerV3 may lie outside, and are to be clipped) or are one-hot. With
    the same noise they equal those of `agent.act`, up to rounding and, in plans, the order of sequences with exactly
    the same value; the modes that DreamerV3, STORM and DIAMOND give by default are not what `act` draws. Returns the
    path. Raises ValueError for another suffix, a URL, an agent that has no program, or what it cannot do; ImportError,
    which names the extra, without onnx.
    """
    target = local_folder(path)
    if target.suffix not in (TORCH, ONNX):
        raise ValueError(f"export: {target} ends in {target.suffix!r}, expected {TORCH} (torch.export) or {ONNX}.")
    if envs < 1:
        raise ValueError(f"export: envs is {envs}, expected at least 1.")
    if not isinstance(agent, Exportable):
        raise ValueError(
            f"export: {type(agent).__name__} has no acting_program, so it cannot be exported. Give it one, which "
            "returns a worldloom.program.Program."
        )
    if target.suffix == ONNX:
        _need("onnx", "onnxscript")
    program = agent.acting_program(envs, sample, plan)
    target.parent.mkdir(parents=True, exist_ok=True)
    about = json.dumps({"agent": agent.describe(), "inputs": _shapes(program.inputs)})
    traced = trace(program)
    if target.suffix == TORCH:
        torch.export.save(traced, target, extra_files={ABOUT: about})
    else:
        _write_onnx(traced, program, target, about)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the screen what the exporter says about itself: packages that it does not need, folding of constants."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", (FutureWarning, DeprecationWarning))
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def trace(program: Program) -> torch.export.ExportedProgram:
    """Return the program as torch.export traces it on the CPU, in evaluation mode."""
    module = program.module.cpu().eval().requires_grad_(False)
    with torch.no_grad():
        return torch.export.export(module, (), dict(program.inputs), strict=False)


def _write_onnx(traced: torch.export.ExportedProgram, program: Program, path: Path, about: str) -> None:
    with torch.no_grad():
        outputs = list(traced.module()(**program.inputs))
    with _quiet():
        written: Any = torch.onnx.export(
            traced,
            (),
            kwargs=dict(program.inputs),
            input_names=list(program.inputs),
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    written.model.metadata_props["worldloom"] = about
    written.save(path)


def _shapes(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in inputs.items()}


def _need(*modules: str) -> None:
    """Raise ImportError, which says what to install, for a module that is not there."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(how_to_install(name)) from error
