"""Import directions: launch -> distributed -> worldloom, then one way through its rooms; sizes; no Ray in it."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("worldloom", "distributed", "launch")

# What a room of the library may import besides itself and the flat files, which import each other alone. Model folders
# are known to the registry only; everything else knows the protocols.
ROOMS = {
    "flat": set(),
    "diamond": set(),
    "dreamerv3": set(),
    "storm": set(),
    "tdmpc2": set(),
    "families": {"diamond", "dreamerv3", "storm", "tdmpc2"},
    "envs": {"families"},
    "replay": {"families", "envs"},
    "acting": {"families", "envs", "replay"},
    "report": {"families", "envs", "replay", "acting"},
    "runs": {"families", "envs", "replay", "acting", "report"},
    "training": {"families", "envs", "replay", "acting", "report", "runs"},
    "testing": {"families", "envs", "replay", "acting"},
    "sharing": {"families", "envs", "replay", "acting", "report", "runs"},
    "package": {"families", "sharing"},
}
FORBIDDEN = {"worldloom": {"ray", "distributed", "launch"}, "distributed": {"launch"}}

LINES, FUNCTION_LINES, METHODS, ATTRIBUTES = 350, 55, 25, 12


def sources(package, root=ROOT):
    return sorted((root / package).rglob("*.py"))


@cache
def parsed(path):
    return ast.parse(path.read_text())


def imported(path):
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_files(path, root=ROOT):
    """The files of the checkout that a file imports: `from a import b` is of a/b.py, or of a/__init__.py."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports {node.module} relatively"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            files = [file_of(name, root), file_of(name.rpartition(".")[0], root)]
            yield from [file for file in files if file is not None][:1]


def file_of(module, root):
    path = root / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def room_of(path):
    """The folder under worldloom, `families` of the registry, `package` of worldloom/__init__.py, or `flat`."""
    top = path.relative_to(ROOT / "worldloom").parts[0]
    if top in ("families.py", "__init__.py"):
        return "families" if top == "families.py" else "package"
    return "flat" if top.endswith(".py") else top


def reaches(module, forbidden):
    return any(module == name or module.startswith(name + ".") for name in forbidden)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction_only(package):
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(package)
        for module in imported(path)
        if reaches(module, FORBIDDEN[package])
    ]
    assert wrong == []


def test_rooms_of_the_library_import_in_one_direction_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {file.relative_to(ROOT)}"
        for path in sources("worldloom")
        for file in imported_files(path)
        if room_of(file) not in {room_of(path), "flat", *ROOMS[room_of(path)]}
    ]
    assert wrong == []


def circles(files, root=ROOT):
    """Sets of files that import one another, directly or through others."""
    leads = {file: set(imported_files(file, root)) & set(files) for file in files}
    reached = {}
    for start in files:
        seen, todo = set(), list(leads[start])
        while todo:
            file = todo.pop()
            if file not in seen:
                seen.add(file)
                todo.extend(leads[file])
        reached[start] = seen
    return {
        frozenset(str(other.relative_to(root)) for other in files if other in reached[file] and file in reached[other])
        for file in files
        if file in reached[file]
    }


def test_no_files_import_one_another_in_a_circle():
    assert circles([path for package in PACKAGES for path in sources(package)]) == set()


def test_a_circle_of_files_is_found(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from package import b\n")
    (package / "b.py").write_text("def f():\n    import package.c\n")
    (package / "c.py").write_text("from package.a import x\n")
    (package / "d.py").write_text("from package.a import x\n")
    assert circles(sources("package", tmp_path), tmp_path) == {
        frozenset({"package/a.py", "package/b.py", "package/c.py"})
    }


def too_large(path, root=ROOT):
    """The file, and those of its classes and functions, that are over the limits."""
    name, functions = str(path.relative_to(root)), (ast.FunctionDef, ast.AsyncFunctionDef)
    if len(path.read_text().splitlines()) > LINES:
        yield name
    for node in ast.walk(parsed(path)):
        if isinstance(node, functions) and node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
            yield f"{name}:{node.name}"
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, functions)]
            attributes = {
                part.attr
                for method in methods
                for part in ast.walk(method)
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                if isinstance(part.value, ast.Name) and part.value.id == "self"
            }
            if len(methods) > METHODS or len(attributes) > ATTRIBUTES:
                yield f"{name}:{node.name}"


def test_files_classes_and_functions_stay_small():
    assert {name for package in PACKAGES for path in sources(package) for name in too_large(path)} == set()


def test_what_is_too_large_is_found(tmp_path):
    attributes = "".join(f"        self.a{i} = {i}\n" for i in range(ATTRIBUTES + 1))
    methods = "".join(f"    def m{i}(self): pass\n" for i in range(METHODS + 1))
    lines = "".join(f"    x = {i}\n" for i in range(FUNCTION_LINES))
    text = f"class A:\n    def f(self):\n{attributes}class B:\n{methods}def g():\n{lines}"
    (tmp_path / "some.py").write_text(text)
    assert set(too_large(tmp_path / "some.py", tmp_path)) == {"some.py:A", "some.py:B", "some.py:g"}
    (tmp_path / "long.py").write_text("\n" * (LINES + 1))
    assert set(too_large(tmp_path / "long.py", tmp_path)) == {"long.py"}


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
