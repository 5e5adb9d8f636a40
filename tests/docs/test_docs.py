"""Every code block of the README and of the documentation runs, made small; the pages build; the notebook runs.

What is made smaller: `total_steps=…` in Python, and runs of launch.train, by overrides at their end. Commands that need
another machine or minutes (git, make, ray, pip, tensorboard) are checked for what they name.
"""

import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import shtab
import torch
import yaml
from nbclient import NotebookClient

from launch.arguments import run_config
from launch.sweeps.plan import read_plan, sweep_parser
from launch.sweeps.workers import Ending
from launch.train import main as train_command
from tests.lerobot_files import ACTION, CAMERA, ENDS, STATE, write_lerobot
from worldloom import create_world_model
from worldloom.family import GROUP
from worldloom.tdmpc2 import save_official

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FROM_A_FRESH_FOLDER = ("own-environment", "own-world-model")  # tutorials
TINY = {
    "tdmpc2": "encoder_dim=16 mlp_dim=16 latent_dim=16 batch_size=8 num_samples=16 num_elites=4 num_pi_trajs=4 "
    "iterations=1",
    "dreamerv3": "deter=32 hidden=8 units=8 stoch=4 classes=4 batch_size=2 batch_length=8",
    "storm": "hidden=16 stoch=4 classes=4 units=16 batch_size=2 batch_length=8 imagination_length=2",
    "diamond": "channels=8 reward_channels=8 cond=16 reward_lstm=8 policy_lstm=8 batch_size=2 horizon=2",
    "gru_family": "units=16 batch_size=8 batch_length=6 candidates=16 elites=4",
}
NETWORK = ("encoder_dim", "mlp_dim", "latent_dim")  # which a run has from the published file that it starts from
SHORT = (
    "--runtime.kind inline --runtime.learners 1 --runtime.learner_threads 1 --train.total_steps 60 "
    "--train.learning_starts 50 --train.train_ratio 8 --train.compile false --eval.interval 0 --eval.episodes 1 "
    "--checkpoint.interval 0 --replay.capacity 1000 --env.num_envs 2"
)


def blocks(page, *kinds):
    return [(kind, title, code) for kind, title, code in BLOCK.findall(page.read_text()) if kind in kinds]


def written(page):
    """The files that a page has the reader write, perhaps block by block."""
    files = {}
    for _, title, code in blocks(page, "python", "yaml"):
        if match := re.search(r'title="([^"]+)"', title):
            files.setdefault(match[1], []).append(code)
    return {name: "\n".join(parts) for name, parts in files.items()}


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A directory with what the pages speak of: presets, a trained run, published checkpoints and episodes."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    arguments = ["--config", str(ROOT / "configs" / "tdmpc2_pendulum.yaml"), "--run-dir", str(folder / "runs" / "NAME")]
    assert train_command([*arguments, *shortened("tdmpc2")]) == 0
    torch.manual_seed(0)
    save_official(create_world_model("tdmpc2:1m", obs_shape=(24,), action_dim=6), folder / "walker-walk-1.pt")
    mt30 = create_world_model("tdmpc2:1m", obs_shape=(24,), action_dim=6, tasks="mt30", batch_size=8)
    save_official(mt30, folder / "mt30-1M.pt")
    pusht = {"observation.state": STATE, "observation.image": {**CAMERA, "dtype": "video"}, "action": ACTION, **ENDS}
    write_lerobot(folder / "pusht", features=pusht)
    (folder / "mt30").mkdir()
    (folder / "mt30" / "chunk_0.pt").symlink_to(ROOT / "tests" / "data" / "tdmpc2_episodes.pt")
    return folder


def shortened(family, network=True):
    fields = [field.split("=") for field in TINY[family].split()]
    fields = [field for field in fields if network or field[0] not in NETWORK]
    return [*SHORT.split(), *(word for name, value in fields for word in (f"--agent.{name}", value))]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run_in_order(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(workplace / "minari"))
    namespace = {"__name__": "page"}
    for name, text in written(page).items():
        (workplace / name).write_text(text)
    for _, title, code in blocks(page, "python"):
        if "title=" in title:
            continue
        small = re.sub(r"total_steps=[\d_]+", "total_steps=2", code)
        exec(compile(small, f"{page.name}: {code.splitlines()[0]}", "exec"), namespace)


def commands(page):
    """Each command line of the page's shell blocks, without its comment."""
    found = []
    for _, _, code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found += [part.split() for part in " ".join(map(shlex.quote, words)).split(" '&&' ")]
    return [[shlex.split(word)[0] for word in words] for words in found]


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "bash") and p.stem not in FROM_A_FRESH_FOLDER], ids=name_of
)
def test_commands_run_or_name_what_exists(page, workplace, monkeypatch):
    monkeypatch.setattr("launch.sweeps.workers.TaskWorkers", HereWorkers)
    monkeypatch.setattr("distributed.cluster.connect", lambda *about: False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    for name, text in written(page).items():
        (workplace / name).write_text(text)
    for words in commands(page):
        check_command(words, workplace)


@pytest.mark.parametrize("name", FROM_A_FRESH_FOLDER)
def test_tutorials_run_from_a_fresh_folder(name, tmp_path):
    """As a person does it: the page's files in a new folder, its commands in a shell, `worldloom` as pip makes it."""
    page = ROOT / "docs" / "tutorials" / f"{name}.md"
    folder, programs = tmp_path / "fresh", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for file, text in written(page).items():
        (folder / file).write_text(text)
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from worldloom.command import main; sys.exit(main())"
    (programs / "worldloom").write_text(f'#!/bin/sh\nexec {sys.executable} -P -c "{start}" "$@"\n')
    (programs / "worldloom").chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    family = "gru_family" if name == "own-world-model" else "tdmpc2"
    for words in commands(page):
        small = shortened(family) if words[:2] == ["worldloom", "train"] else []
        line = shlex.join([*words, *small])
        ran = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, f"{line}\n{ran.stdout}{ran.stderr}"
    assert list(folder.glob("runs/*/report.html"))


class HereWorkers:
    """Runs the runs of a sweep in this process, which spares Ray and each of them its imports."""

    def __init__(self, slots, stop_file):
        self._endings = []

    @property
    def running(self):
        return len(self._endings)

    def start(self, name, run):
        self._endings.append(Ending(name, train_command(run.arguments())))

    def ended(self):
        yield self._endings.pop()

    def stop(self):
        pass


def check_command(words, workplace):
    if words[:2] == ["python", "-m"] and words[2].startswith("launch."):
        run_launch(words[2:], workplace)
    elif words[0] == "worldloom" and words[1] == "completion":
        assert words[2] in shtab.SUPPORTED_SHELLS
    elif words[0] == "worldloom":
        run_launch([f"launch.{words[1]}", *words[2:]], workplace)
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        ran = subprocess.run([sys.executable, "-m", words[2], "--help"], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert all(word in ran.stdout for word in words[3:] if word.startswith("--")), (words, ran.stdout)
    elif words[0] == "make":
        ran = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    elif words[0].endswith("pip"):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        extras = [extra for word in words for found in re.findall(r"\[([\w,]+)\]", word) for extra in found.split(",")]
        assert set(extras) <= set(known), words
    elif words[:3] == ["ray", "job", "submit"]:
        check_command(words[words.index("--") + 1 :], workplace)
    else:
        known = {"ray": {"start"}, "git": {"clone"}, "cd": {"worldloom"}, "tensorboard": {"--logdir"}}
        known |= {"source": {".venv/bin/activate"}, "python3": {"-m"}, "export": {"RAY_AUTH_MODE=token"}}
        known |= {"prometheus": {"--config.file=/tmp/ray/session_latest/metrics/prometheus/prometheus.yml"}}
        assert words[1] in known.get(words[0], ()), f"nothing checks {' '.join(words)!r}"


def run_launch(words, workplace):
    """Run it where the pages' files are; runs are short, with tiny models, and go to a directory of their own."""
    module, *arguments = words
    arguments = [str(workplace / "bucket") if word.startswith("s3://") else word for word in arguments]
    if module == "launch.dashboard":
        (workplace / "ray" / "session_latest").mkdir(parents=True, exist_ok=True)
        arguments += ["--temp-dir", str(workplace / "ray")]
    if module == "launch.train" and "--resume" in arguments:
        arguments += ["--train.total_steps", "62"] if "--train.total_steps" not in arguments else []
        at = arguments.index("--train.total_steps") + 1
        arguments[at] = str(run_steps(workplace) + 2)
    elif module == "launch.train":
        text = " ".join(arguments)
        family = next((family for family in TINY if family in text), "tdmpc2")
        arguments += shortened(family, network="--from" not in arguments or "--from runs/" in text)
        if "dm_control" in text or "dmc" in text or "atari" in text:
            arguments += ["--train.total_steps", "20", "--train.learning_starts", "19"]
        fresh = f"runs/{len(list((workplace / 'runs').iterdir()))}"
        arguments += [] if "--name" in arguments else ["--run-dir", fresh]
    elif module == "launch.sweep":
        if "jobs" in arguments or "search.yaml" in arguments:  # they need a cluster; test_sweep.py runs them
            with contextlib.chdir(workplace):
                read_plan(sweep_parser(), arguments)
            return
        arguments = [word.replace("0..2", "0") for word in arguments] + shortened("tdmpc2")
    code, said = run_as_main(module, arguments, workplace)
    assert code in (0, None), f"{' '.join(words)}\n{said}"


def run_as_main(module, arguments, folder):
    """`python -m module` in this process, which spares each of many commands its imports; its exit code and output."""
    said, before, path = io.StringIO(), Path.cwd(), list(sys.path)
    argv, sys.argv = sys.argv, [module, *arguments]
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    importlib.invalidate_caches()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(module, run_name="__main__")
        return 0, said.getvalue()
    except SystemExit as end:
        return end.code, said.getvalue()
    finally:
        os.chdir(before)
        sys.argv, sys.path[:] = argv, path


def run_steps(workplace):
    """How far runs/NAME has come."""
    found = sorted((workplace / "runs" / "NAME" / "checkpoints").glob("step-*"))
    return int(found[-1].name.removeprefix("step-"))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=name_of)
def test_yaml_blocks_are_presets(page, tmp_path):
    for _, _, code in blocks(page, "yaml"):
        assert "algorithm" in yaml.safe_load(code)
        (tmp_path / "preset.yaml").write_text(code)
        parser = sweep_parser()  # it knows all that launch.train knows, and search
        run_config(parser, parser.parse_args(["--config", str(tmp_path / "preset.yaml")]))


def test_every_picture_of_a_page_is_there_and_all_but_rays_dashboard_are_made_by_a_command():
    named = {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())
    }
    folder, curves = ROOT / "docs" / "pictures", set((ROOT / "docs" / "results").glob("*.svg"))
    pictures = {path for path in folder.iterdir() if path.suffix in (".svg", ".gif", ".png")}
    assert named == pictures | curves
    made = (folder / "make.py").read_text()
    assert [p.name for p in sorted(pictures) if p.name not in made] == ["ray_dashboard.png"]  # of a live cluster
    assert all(path.with_suffix(".csv").is_file() for path in curves)  # the numbers that were drawn


def test_every_block_is_of_a_kind_that_is_tested():
    for page in PAGES:
        fences = re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"python", "bash", "yaml", "toml", "mermaid"}, page


def test_the_family_of_the_page_is_the_example():
    """Block by block the same code; only the blank lines between blocks may differ."""
    page = ROOT / "docs" / "tutorials" / "own-world-model.md"
    example = (ROOT / "examples" / "own_family" / "gru_family.py").read_text()
    assert [line for line in written(page)["gru_family.py"].splitlines() if line] == [
        line for line in example.splitlines() if line
    ]


def test_entry_points_of_the_page_are_those_that_are_read():
    (block,) = blocks(ROOT / "docs" / "tutorials" / "own-world-model.md", "toml")
    assert list(tomllib.loads(block[2])["project"]["entry-points"]) == [GROUP]


def test_the_pages_build_without_a_warning(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "site" / "reference" / "configuration" / "index.html").read_text()
    for words in ("env.action_repeat", "replayed steps per environment step", "num_pi_trajs", "learning_rate"):
        assert words in page
    row = re.search(r"<code>env.action_repeat</code></td>\s*<td>int</td>\s*<td><code>(\w+)</code>", page)
    assert row.group(1) == "1"
    api = (tmp_path / "site" / "reference" / "api" / "index.html").read_text()
    assert "create_world_model" in api
    assert not re.findall(
        r'(?:src|href)="https?://(?!gymnasium|squidfunk)[^"]+\.(?:js|css|woff2?)"', api
    )  # nothing is fetched


def test_no_configuration_field_lacks_its_meaning():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import configuration_hook
    finally:
        sys.path.pop(0)
    for name in configuration_hook.SECTIONS:
        for row in configuration_hook.table(name).splitlines()[2:]:
            assert not row.endswith("|  |"), f"{name}: {row}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r"total_steps=[\d_]+", "total_steps=3", cell.source)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
