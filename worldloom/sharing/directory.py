"""An agent as a directory: config.json, safetensors files, and a model card in README.md."""

from __future__ import annotations

from pathlib import Path

from worldloom.families import load_agent
from worldloom.locations import Location, download, find, is_file, locate
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
    licence: str = LIBRARY_LICENCE,
    name: str | None = None,
) -> Path:
    """Write the directory of an agent: what `load_agent` reads, and README.md, its model card.

    agent: an agent, a run (its newest checkpoint), a model directory, or a file that a family's authors published.
    card: its facts, which a run knows by itself; the card that a model directory already has is kept. licence: of the
    weights, for a card that is made here. name: what the card's example loads, by default the directory. Returns the
    directory. Raises FileNotFoundError or ValueError for what is no agent, FloatingPointError for NaN parameters.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    source = agent if isinstance(agent, Agent) else locate(agent)
    if isinstance(source, Path) and is_file(source):
        source = load_agent(source)
    if isinstance(source, Agent):
        _write(source, target)
        made = card_of_agent(source.describe()["family"], source.updates or None, licence)
    else:
        run = (source / "checkpoints").is_dir()
        folder = newest_checkpoint(source) / "agent" if run else source
        family = str(read_description(folder).get("family"))
        made = card_of_run(source, licence) if run else card_of_agent(family, None, licence)
        names = [path.name for path in find(folder, "*") if path.name in PARTS]
        kept = card is None and is_file(folder / CARD)
        for part in [*names, *([CARD] if kept else [])]:
            download(folder / part, target / part)
        if kept:
            return target
    (target / CARD).write_text((card or made).text(name or str(directory)))
    return target


def _write(agent: Agent, target: Path) -> None:
    snapshot = take_agent(agent)
    save_described(target, snapshot.description, snapshot.model)
    if snapshot.behaviour is not None:
        save_parameters(target / "behaviour.safetensors", snapshot.behaviour)
