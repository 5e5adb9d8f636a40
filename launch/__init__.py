"""Commands, run as `worldloom NAME` or `python -m launch.NAME`."""

import sys
from importlib.util import find_spec

from worldloom.extras import how_to_install

for module in ("jsonargparse", "yaml", "imageio"):  # without them, no command can be imported
    if find_spec(module) is None:
        sys.exit(f"launch: {how_to_install(module)}")
