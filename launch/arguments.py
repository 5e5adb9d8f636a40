"""The command line: YAML files, typed overrides and --help, made from the config dataclasses (jsonargparse)."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser

from launch.sections import asked, help_text
from worldloom.nearest import nearest
from worldloom.runs.config import RunConfig


class Parser(ArgumentParser):
    """Parses the command line; a misspelt key ends the program with an error that names the nearest valid key."""

    def parse_args(self, args: Any = None, namespace: Any = None, **rest: Any) -> Any:  # type: ignore[override]
        """Parse as the base class does; the preset's fields for the chosen protocol apply before the overrides."""
        args = list(sys.argv[1:] if args is None else args)
        if (topic := asked(args)) is not None:
            try:
                print(help_text(self, topic))
            except ValueError as error:
                self.error(str(error))
            self.exit()
        parsed = super().parse_args(args, namespace, **rest)
        if parsed.protocol == "paper":
            return parsed
        if parsed.protocol not in parsed.protocols:
            self.error(f"--protocol is {parsed.protocol!r}, but this preset offers paper only. Use --protocol paper.")
        at = max((i for i, word in enumerate(args) if word.startswith("--config")), default=-1)
        at += 1 if "=" in args[at] else 2
        preset, overlay = super().parse_args(args[:at], namespace, **rest), parsed.protocols[parsed.protocol]
        overlay = {**overlay, "agent": {**preset.agent, **overlay.get("agent", {})}}
        return super().parse_args([*args[:at], "--config", json.dumps(overlay), *args[at:]], namespace, **rest)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002 - the base class's
        text = re.sub(r"\s*\n\s*", " ", str(message)).strip()
        known = [action.dest for action in self._actions if action.dest not in ("help", "config")]
        for wrong in re.findall(r"--([\w.-]+)|[Kk]ey [\"']([\w.]+)[\"']|option [\"']?([\w.]+)", text):
            name = next(filter(None, wrong))
            if name.replace("-", "_") not in known and (near := _nearest(name, known)):
                text += f" Did you mean {near}?"
        self.refuse(f"{text}\nRun with --help to see the usual settings, or with --help all for every field.")

    def refuse(self, text: str) -> NoReturn:
        """End the program with an error that is complete as it is."""
        self.exit(2, f"{self.prog}: {text}\n")
        raise AssertionError("exit returned")


def _nearest(name: str, known: list[str]) -> str | None:
    """Return the known key nearest to `name`, which may be only the last part of a key; None if none is near."""
    if near := nearest(name, known):
        return near[0]
    last = {key.rsplit(".", 1)[-1]: key for key in known}
    near = nearest(name.rsplit(".", 1)[-1], last)
    return last[near[0]] if near else None


def run_parser(prog: str, description: str) -> Parser:
    """Return a parser for a whole RunConfig, with --config FILE."""
    parser = Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="YAML file; fields that it leaves out keep their defaults")
    parser.add_class_arguments(RunConfig, None, as_group=True)
    help_text = "in presets: the fields that each protocol changes; the config.yaml of a run already has them applied"
    parser.add_argument("--protocols", type=dict[str, dict[str, Any]], default={}, help=help_text)
    return parser


def run_config(parser: Parser, parsed: Any) -> RunConfig:
    """Build the RunConfig from parsed arguments; a bad value ends the program with its error message."""
    names = {field.name for field in dataclasses.fields(RunConfig)}
    try:
        built = parser.instantiate_classes(parsed)
        return RunConfig(**{name: built[name] for name in names})
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def dump_config(config: RunConfig) -> str:
    """Return the complete config as YAML; --config reads it back."""
    values = dataclasses.asdict(config)
    if config.protocol != "paper":
        values["protocols"] = {config.protocol: {}}  # its fields are already in the values
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text
