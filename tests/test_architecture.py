"""Import directions: launch -> distributed -> worldloom; worldloom never needs Ray."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "worldloom": {"ray", "distributed", "launch"},
    "distributed": {"launch"},
    "worldloom/tdmpc2": {"worldloom.dreamerv3", "worldloom.training"},
    "worldloom/dreamerv3": {"worldloom.tdmpc2", "worldloom.training"},
    "worldloom/training": {"worldloom.tdmpc2", "worldloom.dreamerv3"},
}


def imported(path):
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reaches(module, forbidden):
    return any(module == name or module.startswith(name + ".") for name in forbidden)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction_only(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (ROOT / package).rglob("*.py")
        for module in imported(path)
        if reaches(module, FORBIDDEN[package])
    ]
    assert wrong == []


def test_the_import_test_sees_a_forbidden_import(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    from ray import get\n")
    assert any(reaches(module, {"ray"}) for module in imported(tmp_path / "bad.py"))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_worldloom_works_where_ray_cannot_be_imported():
    code = """
import sys
for name in ("ray", "yaml", "jsonargparse", "rich", "tensorboardX", "matplotlib", "imageio"):
    sys.modules[name] = None
import torch, worldloom, worldloom.runs.inline
model = worldloom.create_world_model("tdmpc2:1m", obs_shape=(3,), action_dim=1)
print(tuple(model.imagine(model.encode(torch.zeros(1, 3)), torch.zeros(15, 1, 1)).rewards.shape))
"""
    result = run_python(code)
    assert result.stdout.strip() == "(15, 1, 1)", result.stderr


def test_importing_worldloom_leaves_gymnasium_and_ray_unloaded():
    result = run_python("import sys, worldloom; print([m for m in ('ray', 'gymnasium', 'yaml') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr
