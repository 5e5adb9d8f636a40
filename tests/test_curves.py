"""The command that draws learning curves over the published ones."""

import csv

import pytest

from benchmarks import curves


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stands in for the training: two seeds of cup-catch as far as the first published point."""
    asked = []

    def sweep(argv):
        asked.append(argv)
        for seed, final in ((1, 970.0), (2, 984.0)):
            run = tmp_path / f"seed-{seed}"
            run.mkdir(exist_ok=True)
            (run / "config.yaml").write_text(
                "algorithm: tdmpc2:5m\nenv: {id: dm_control/ball_in_cup-catch-v0, action_repeat: 2}\n"
                f"train: {{total_steps: 50000, seed: {seed}}}\nruntime: {{kind: inline}}\n"
            )
            lines = [(25_000, 400.0), (50_000, final)]
            (run / "metrics.jsonl").write_text(
                "".join(
                    f'{{"env_steps": {steps}, "wall_seconds": {steps / 10}, "eval/return_mean": {value}}}\n'
                    for steps, value in lines
                )
            )
        return 0

    monkeypatch.setattr(curves, "sweep", sweep)
    return asked


def test_the_table_gives_the_difference_in_published_standard_deviations(trained, tmp_path, capsys):
    more = ["--train.device", "cpu"]
    assert curves.main(["--tasks", "cup-catch", "--seeds", "1,2", "--out", str(tmp_path), *more]) == 0
    (argv,) = trained
    assert argv[argv.index("--env.id") + 1] == "dm_control/ball_in_cup-catch-v0"
    assert argv[:2] == ["--config", "configs/tdmpc2_dmc.yaml"]
    assert argv[-2:] == more
    row = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert "| dm_control/ball_in_cup-catch-v0 | 1, 2 | 100,000 | 100,000 | 977.0 ± 9.9 | 981.2 ± 7.0 | -0.6 |" in row
    with (tmp_path / "curves.csv").open() as file:
        assert [(row["frames"], row["return"]) for row in csv.DictReader(file)][:2] == [
            ("50000", "400.0"),
            ("100000", "970.0"),
        ]
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    assert "977.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "cup-throw"], "has no such task, expected some of: dm_control/cartpole-swingup-v0"),
        (["--algorithm", "tdmpc3:5m"], "unknown model 'tdmpc3:5m'"),
    ],
)
def test_wrong_requests_are_refused_with_what_there_is(words, said, capsys):
    with pytest.raises(SystemExit):
        curves.main(words)
    assert said in capsys.readouterr().err
