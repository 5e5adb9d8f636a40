"""The text of --help: the usual settings first, every other field in the section that it belongs to."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from worldloom.families import FAMILIES, config_fields
from worldloom.meanings import meanings
from worldloom.nearest import nearest
from worldloom.runs.config import RunConfig

USUAL = (
    "--config",
    "--run-dir",
    "--resume",
    "--algorithm",
    "--env.id",
    "--train.total_steps",
    "--train.seed",
    "--train.device",
    "--runtime.kind",
    "--runtime.env_actors",
)
HELP = ("-h", "--help")
INDENT = 32  # columns before the meanings
MOST_COLUMNS = 120


@dataclass(frozen=True)
class Row:
    """One option, the kind of its value, and what it means."""

    option: str
    kind: str
    meaning: str

    def lines(self, width: int) -> list[str]:
        """Return the option with its meaning beside it, or below it if it is long."""
        head = f"  {self.option} {self.kind}".rstrip()
        text = textwrap.wrap(self.meaning, max(width - INDENT, 20)) or [""]
        rest = [" " * INDENT + line for line in text]
        return [head.ljust(INDENT) + text[0], *rest[1:]] if len(head) < INDENT else [head, *rest]


def asked(args: Sequence[str]) -> str | None:
    """Return what --help was asked about: "" for the usual settings, None if there is no --help."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        name, _, topic = word.partition("=")
        if word == "--help-all":
            return "all"
        if name in HELP:
            return topic or ("" if following.startswith("-") else following)
    return None


def help_text(parser: argparse.ArgumentParser, topic: str) -> str:
    """Return the help on the usual settings (""), on everything ("all"), or on one section.

    Raises ValueError for a section that does not exist.
    """
    sections = {"command": list(_own_rows(parser)), **_config_sections(), **_family_sections()}
    if topic not in ("", "all", *sections):
        near = nearest(topic, sections)
        hint = f"Did you mean {near[0]}?" if near else f"Expected all or one of: {', '.join(sections)}."
        raise ValueError(f"--help is asked about {topic!r}, which is no section. {hint}")
    width = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    intro = [f"usage: {parser.prog} --config FILE [--SECTION.FIELD VALUE …]", ""]
    intro += textwrap.wrap(parser.description or "", width)
    if topic in sections:
        return "\n".join([*intro, *_block(topic, sections[topic], width)])
    usual = [row for name in USUAL for rows in sections.values() for row in rows if row.option == name]
    others = [row for row in sections["command"] if row.option not in USUAL]
    blocks = [*_block("usual settings", usual, width), *_block("other options of this command", others, width)]
    if topic == "all":
        for name, rows in sections.items():
            blocks += _block(name, [row for row in rows if row not in [*usual, *others]], width)
        return "\n".join([*intro, *blocks])
    more = f"--help all shows every field with its default, --help SECTION those of: {', '.join(list(sections)[1:])}."
    return "\n".join([*intro, *blocks, "", *textwrap.wrap(more, width)])


def _block(title: str, rows: Sequence[Row], width: int) -> list[str]:
    return ["", f"{title}:", *(line for row in rows for line in row.lines(width))] if rows else []


def _own_rows(parser: argparse.ArgumentParser) -> Iterator[Row]:
    """Yield the options that are no fields of a RunConfig."""
    fields = {field.name for field in dataclasses.fields(RunConfig)}
    for action in parser._actions:
        ours = action.dest.partition(".")[0] not in fields
        if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help" and ours:
            kind = "" if action.nargs == 0 else {"config": "FILE", "run_dir": "DIR"}.get(action.dest, "VALUE")
            if action.choices:
                kind = "|".join(map(str, action.choices))
            yield Row(action.option_strings[-1], kind, (action.help or "").replace("%%", "%"))


def _config_sections() -> dict[str, list[Row]]:
    """Return the rows of a RunConfig by section; "run" has those of the config itself."""
    found: dict[str, list[Row]] = {"run": []}
    for row in _rows(RunConfig, "--"):
        section, dot, _ = row.option.removeprefix("--").partition(".")
        found.setdefault(section if dot else "run", []).append(row)
    return found


def _family_sections() -> dict[str, list[Row]]:
    """Return the rows of --agent for each family; defaults are those of its default size."""
    found = {}
    for name, family in FAMILIES.items():
        hints, said = get_type_hints(family.config), meanings(family.config)
        fields = config_fields(f"{name}:{family.default_size}")
        found[name] = [_row(f"--agent.{f.name}", hints[f.name], f, said.get(f.name, "")) for f in fields]
    return found


def _rows(config: type[Any], prefix: str) -> Iterator[Row]:
    hints, said = get_type_hints(config), meanings(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _rows(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield _row(prefix + field.name, hints[field.name], field, said.get(field.name, ""))


def _row(option: str, hint: Any, field: dataclasses.Field[Any], meaning: str) -> Row:
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    default = made if isinstance(made, str) else json.dumps(made)
    return Row(option, kind(hint), f"{meaning} (default: {default})")


def kind(hint: Any) -> str:
    """Return a type as a reader of YAML knows it: int, ray|inline, float|null."""
    if get_origin(hint) is dict:
        return "MAPPING"
    parts = get_args(hint) or (hint,)
    if all(isinstance(part, str) for part in parts):
        return "|".join(parts)
    words = [kind(part) if get_args(part) else getattr(part, "__name__", str(part)) for part in parts]
    return "|".join("null" if word == "NoneType" else word for word in words)
