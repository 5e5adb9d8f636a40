"""The text of --help."""

import dataclasses
import re

import pytest

from launch.sections import USUAL
from launch.train import main
from worldloom.dreamerv3 import DreamerV3Config
from worldloom.meanings import meanings
from worldloom.runs.config import RunConfig
from worldloom.tdmpc2 import TDMPC2Config


def shown(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(list(words))
    said = capsys.readouterr()
    assert end.value.code == (2 if said.err else 0)
    return said.err or said.out


def test_help_begins_with_the_ten_usual_settings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, "--help")
    assert re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE)[:10] == list(USUAL)
    assert "--runtime.chunk_steps" not in text
    assert "--help all" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("words", [["--help", "all"], ["--help=all"], ["--help-all"]])
def test_help_all_has_every_field_with_its_meaning_and_default(capsys, words):
    text = shown(capsys, "--config", "configs/tdmpc2_pendulum.yaml", *words)
    for config in (DreamerV3Config, TDMPC2Config):
        for field in dataclasses.fields(config):
            assert f"--agent.{field.name} " in text
            assert " ".join(meanings(config)[field.name].split()[:3]) in re.sub(r"\s+", " ", text)
    for section in dataclasses.fields(RunConfig):
        for field in dataclasses.fields(section.default_factory()) if section.name in ("train", "log") else ():
            assert f"--{section.name}.{field.name} " in text
    assert "--env.atari.sticky" in text
    assert not re.search(r"--agent\.\w+ [\w|]+ +\(default", text), "a field without a meaning"


def test_help_shows_one_section_and_refuses_others(capsys):
    text = shown(capsys, "--help", "eval")
    assert re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE) == ["--eval.interval", "--eval.episodes"]
    assert "Did you mean train?" in shown(capsys, "--help", "trian")
