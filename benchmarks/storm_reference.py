"""Seconds per update and per action of STORM's authors' code, in a Python of its own.

python benchmarks/storm_reference.py CHECKOUT OPTIONS: CHECKOUT holds weipu-zhang/STORM, OPTIONS are JSON. That Python
needs torch, einops, tensorboardX and yacs. The code runs from a copy in which the device and the precision are those
asked for, and the widths that it has no setting for are those of the option "config" (our STORMConfig). An update is
what their train.py does in one step: the world model's, imagination from other windows, the agent's. An action encodes
the last 16 frames, as theirs does. Their attention is not fused, on either device.

Prints seconds as JSON: {"update": [...], "act_1": [...]}. Imports nothing of WorldLoom.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tdmpc2_reference import timed

IMAGE, ACTIONS = (3, 64, 64), 6


def copy_for(checkout: Path, options: dict[str, Any]) -> Path:
    """The checkout's code with another device, precision and width in it."""
    folder, c, device = Path(tempfile.mkdtemp()), options["config"], options["device"]
    replaced = {
        ".cuda()": f'.to("{device}")',
        'device="cuda"': f'device="{device}"',
        "device_type='cuda'": f"device_type='{device.split(':')[0]}'",
        "use_amp = True": f"use_amp = {options['precision'] == 'bfloat16'}",
        "stoch_dim = 32": f"stoch_dim = {c['stoch']}",
        "stem_channels=32": f"stem_channels={c['stem_channels']}",
    }
    for path in [checkout / "agents.py", checkout / "utils.py", *(checkout / "sub_models").glob("*.py")]:
        text = path.read_text()
        for old, new in replaced.items():
            text = text.replace(old, new)
        copy = folder / path.relative_to(checkout)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(text)
    return folder


def main() -> None:
    checkout, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    c, device = options["config"], options["device"]
    if c["stoch"] != c["classes"]:
        sys.exit(f"the authors' code has as many variables as classes, not {c['stoch']} and {c['classes']}")
    torch.set_num_threads(options["threads"])
    warnings.filterwarnings("ignore")  # as their train.py
    sys.path.insert(0, str(copy_for(checkout, options)))
    from agents import ActorCriticAgent
    from sub_models.world_models import WorldModel

    world = WorldModel(IMAGE[0], ACTIONS, c["max_length"], c["hidden"], c["layers"], c["heads"]).to(device)
    features = c["stoch"] * c["classes"] + c["hidden"]
    behaviour = (c["agent_layers"], c["units"], ACTIONS, c["discount"], c["lam"], c["entropy_scale"])
    agent = ActorCriticAgent(features, *behaviour).to(device)

    def rows(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        frames = torch.rand(batch, length, *IMAGE, device=device)
        actions = torch.randint(ACTIONS, (batch, length), device=device).float()
        return frames, actions, torch.randn(batch, length, device=device), torch.zeros(batch, length, device=device)

    windows, starts = rows(options["batch"], options["length"]), rows(c["imagination_starts"], c["context"])
    seen = rows(1, 16)

    def update() -> None:
        world.update(*windows)
        world.eval()
        agent.eval()
        sizes = (c["imagination_starts"], c["imagination_length"])
        with torch.no_grad():
            latents, actions, rewards, ends = world.imagine_data(agent, *starts[:2], *sizes, False, None)
        agent.update(latents, actions, None, None, rewards, ends)

    @torch.no_grad()
    def act() -> None:
        world.eval()
        latents = world.encode_obs(seen[0])
        agent.sample_as_env_action(torch.cat(world.calc_last_dist_feat(latents, seen[1]), -1))

    found = {"update": timed("update", update, options), "act_1": timed("act_1", act, options)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
