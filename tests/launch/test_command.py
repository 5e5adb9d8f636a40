"""The console command `worldloom`: what it lists, where it finds a checkout, and its completion."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.own_families import ROOT
from worldloom.command import COMMANDS, commands


@pytest.fixture
def site(tmp_path):
    """A folder of installed packages with the command, and a torch that cannot be imported."""
    (tmp_path / "site" / "worldloom").mkdir(parents=True)
    for name in ("__init__.py", "command.py", "nearest.py"):
        shutil.copy(ROOT / "worldloom" / name, tmp_path / "site" / "worldloom")
    (tmp_path / "site" / "torch.py").write_text("raise SystemExit('torch is imported now')\n")
    return tmp_path / "site"


def run(folder, path, *words):
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-P", "-m", "worldloom.command", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_every_command_of_the_checkout_is_listed():
    made = {path.stem for path in (ROOT / "launch").glob("*.py") if "\ndef main(" in path.read_text()}
    assert set(commands(ROOT)) == made
    assert made <= COMMANDS.keys()
    assert {"train", "evaluate", "imagine", "status"} <= made


def test_help_comes_without_torch(site):
    shown = run(ROOT, site, "--help")
    assert shown.returncode == 0, shown.stderr
    assert "  train       train an agent" in shown.stdout


def test_a_command_runs_in_the_checkout_that_is_the_current_folder(site):
    ran = run(ROOT, site, "train", "--run-dir", "runs/a")
    assert ran.stdout == "training in runs/a: loading …\n"
    assert ran.stderr == "torch is imported now\n"


def test_without_a_checkout_a_sentence_says_what_to_do(site, tmp_path):
    refused = run(tmp_path, site, "train")
    assert refused.returncode == 2
    assert "Run it in the folder of a checkout, or install worldloom from one with" in refused.stderr
    assert "imagine" in run(tmp_path, site).stdout


def test_a_command_that_is_not_there_is_refused_with_the_nearest(site):
    assert "there is no command 'trian'. Did you mean train?" in run(ROOT, site, "trian").stderr
    assert "Expected one of: train, evaluate" in run(ROOT, site, "xyz").stderr


def test_bash_completes_commands_options_and_choices(tmp_path):
    made = subprocess.run([sys.executable, "-m", "launch.completion", "bash"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (tmp_path / "completion.sh").write_text(made.stdout)
    function = re.search(r"complete .*-F (\w+) worldloom", made.stdout)[1]

    def completed(*words):
        listed = " ".join(f"'{word}'" for word in ("worldloom", *words))
        program = (
            f"source {tmp_path}/completion.sh; COMP_WORDS=({listed}); COMP_CWORD={len(words)}; "
            f"{function} worldloom '{words[-1]}'; echo ${{COMPREPLY[@]}}"
        )
        ran = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True)
        return ran.stdout.split()

    assert completed("ev") == ["evaluate"]
    assert completed("train", "--train.to") == ["--train.total_steps"]
    assert completed("train", "--runtime.kind", "") == ["ray", "inline"]
    assert completed("train", "--agent.num_s") == ["--agent.num_samples"]
    assert completed("evaluate", "--run-dir", "conf") == ["configs"]
