"""The command line: YAML files, typed overrides and --help out of the config dataclasses (jsonargparse)."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from worldloom.catalog import config_fields
from worldloom.training.config import RunConfig


class Parser(ArgumentParser):
    """Ends with one sentence that names the nearest valid key when one is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002 - the base class's
        text = re.sub(r"\s*\n\s*", " ", str(message)).strip()
        known = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        for wrong in re.findall(r"--([\w.]+)|[Kk]ey [\"']([\w.]+)[\"']|option [\"']?([\w.]+)", text):
            name = next(filter(None, wrong))
            if name not in known and (near := _nearest(name, known)):
                text += f" Did you mean {near}?"
        self.exit(2, f"{self.prog}: {text}\nTry --help for every field with its default.\n")
        raise AssertionError("exit returned")


def _nearest(name: str, known: list[str]) -> str | None:
    """The known key most like `name`, also where only the last part was given."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return near[0]
    last = {key.rsplit(".", 1)[-1]: key for key in known}
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)
    return last[near[0]] if near else None


def run_parser(prog: str, description: str) -> Parser:
    """A parser for a whole RunConfig, with --config FILE."""
    parser = Parser(prog=prog, description=description, epilog=_agent_help())
    parser.add_argument("--config", action="config", help="YAML file; what it leaves out keeps its default")
    parser.add_class_arguments(RunConfig, None, as_group=True)
    return parser


def _agent_help() -> str:
    fields = ", ".join(f"{field.name}={field.default}" for field in config_fields("tdmpc2:5m"))
    return f"Fields of --agent.NAME for tdmpc2 (defaults of tdmpc2:5m): {fields}."


def run_config(parser: Parser, parsed: Any) -> RunConfig:
    """The RunConfig out of parsed arguments; a bad value ends the program with its sentence."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    try:
        built = parser.instantiate_classes(parsed)
        return RunConfig(**{name: built[name] for name in names})
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def dump_config(config: RunConfig) -> str:
    """The complete config as YAML; --config reads it back."""
    text: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    return text
