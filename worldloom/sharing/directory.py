"""An agent as a directory: config.json, safetensors files, and a model card in README.md."""

from __future__ import annotations

import os
import re
from pathlib import Path

from worldloom.families import load_agent
from worldloom.locations import Location, download, find, is_file, local_folder, locate
from worldloom.manifest import newest_checkpoint
from worldloom.pretrained import read_description, save_described, save_parameters
from worldloom.runs.agent_state import take_agent
from worldloom.sharing.card import LIBRARY_LICENCE, ModelCard, card_of_agent, card_of_run
from worldloom.types import Agent

CARD = "README.md"
PARTS = ("config.json", "model.safetensors", "behaviour.safetensors")  # all that `load_agent` reads


def save_agent(
    agent: Agent | Location,
    directory: Location,
    *,
    card: ModelCard | None = None,
    licence: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the directory of an agent: what `load_agent` reads, and README.md, its model card.

    agent: an agent, a run (its newest checkpoint), a model directory, or a file that a family's authors published.
    card: its facts, which a run knows by itself; the card that a model directory already has is kept. licence: of the
    weights, for a card that is made here; mit by default, but what authors published needs theirs. repo_id: where on
    the Hub the card's example finds the agent, by default in this directory. Returns the directory. Raises
    FileNotFoundError, TypeError or ValueError for what is no agent, ValueError for a URL or a licence beside a card
    that is kept, FloatingPointError for NaN parameters.
    """
    if not isinstance(agent, Agent | str | os.PathLike):
        raise TypeError(f"save_agent: got a {type(agent).__name__}, expected an agent, or where one lies.")
    target, source = local_folder(directory), agent if isinstance(agent, Agent) else locate(agent)
    published = source.name if isinstance(source, Path) and is_file(source) else None
    if published is not None and card is None and licence is None:
        raise ValueError(f"whose licence has {published}? Give the one of its authors, as in licence='mit'.")
    if isinstance(source, Path) and published is not None:
        source = load_agent(source)
    load = f"from_hub({repo_id!r})" if repo_id is not None else f"load_agent({str(directory)!r})"
    if isinstance(source, Agent):
        _write(source, target)
        family, updates = source.describe()["family"], source.updates or None
        made = card_of_agent(family, updates, licence or LIBRARY_LICENCE, published)
    else:
        run = (source / "checkpoints").is_dir()
        folder = newest_checkpoint(source) / "agent" if run else source
        family = str(read_description(folder).get("family"))
        own = licence or LIBRARY_LICENCE
        made = card_of_run(source, own) if run else card_of_agent(family, None, own)
        names = [path.name for path in find(folder, "*") if path.name in PARTS]
        kept = card is None and is_file(folder / CARD)
        if kept and licence is not None:
            raise ValueError(
                f"{folder} has a model card, {CARD}, which names a licence and is kept. Change it there, or give card=."
            )
        for part in [*names, *([CARD] if kept else [])]:
            download(folder / part, target / part)
        if kept:
            _load_by(load, target / CARD)
            return target
    target.mkdir(parents=True, exist_ok=True)
    (target / CARD).write_text((card or made).text(load))
    return target


def _load_by(load: str, card: Path) -> None:
    """Let the example of a card that was made elsewhere load the agent from where it lies now."""
    line = re.compile(r"^agent = worldloom\.(load_agent|from_hub)\(.*\)$", re.MULTILINE)
    card.write_text(line.sub(lambda _: f"agent = worldloom.{load}", card.read_text()))


def _write(agent: Agent, target: Path) -> None:
    snapshot = take_agent(agent)
    save_described(target, snapshot.description, snapshot.model)
    if snapshot.behaviour is not None:
        save_parameters(target / "behaviour.safetensors", snapshot.behaviour)
