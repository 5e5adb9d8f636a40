"""The example of a family of one's own, which tests use as a package outside the repository (fixture `package`)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "my_package.my_family"
MODEL = f"{NAME}:tiny"
EXAMPLE = ROOT / "examples" / "own_family" / "gru_family.py"
