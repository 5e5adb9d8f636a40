"""Statistics against known values, grouping of runs, and the page that compares them."""

import json
import re

import numpy as np
import pytest
import yaml
from scipy import stats

from launch.compare import main
from worldloom.report.compare import write_comparison
from worldloom.report.compared import differences, grouped, normalised, read_compared
from worldloom.report.statistics import iqm, iqm_interval, mean_interval, on_one_axis, over_curves


def test_the_iqm_is_the_mean_of_the_middle_half():
    assert iqm(np.array([100.0, 1.0, 2.0, -50.0])) == 1.5
    assert iqm(np.arange(8.0)) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert iqm(np.array([7.0])) == 7.0
    scores = np.random.default_rng(0).normal(size=(3, 37))
    np.testing.assert_allclose(iqm(scores), stats.trim_mean(scores, 0.25, axis=1))  # as rliable computes it


def test_the_interval_of_a_mean_is_the_percentile_bootstrap():
    scores = np.random.default_rng(1).normal(3.0, 2.0, size=12)
    mean, low, high = mean_interval(scores, resamples=20_000)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert mean == pytest.approx(scores.mean())
    np.testing.assert_allclose([low, high], [theirs.low, theirs.high], atol=0.03)


def test_two_seeds_give_their_range_and_one_seed_gives_itself():
    # Of four equally likely draws, one is (a, a) and one is (b, b): both tails hold more than 2.5 %.
    assert [float(end) for end in mean_interval(np.array([1.0, 5.0]))] == [3.0, 1.0, 5.0]
    assert [float(end) for end in mean_interval(np.array([4.0]))] == [4.0, 4.0, 4.0]


def test_the_interval_over_tasks_draws_within_each_task():
    constant = [np.full(3, 1.0), np.full(3, 5.0)]  # all spread lies between the tasks, so none is left
    assert iqm_interval(constant) == (3.0, 3.0, 3.0)
    tasks = [np.random.default_rng(i).normal(i, 1.0, size=9) for i in range(4)]
    theirs = stats.bootstrap(
        tasks, lambda *drawn, axis: stats.trim_mean(np.concatenate(drawn, axis), 0.25, axis=axis),
        n_resamples=9999, method="percentile", rng=1, vectorized=True,
    ).confidence_interval  # fmt: skip
    middle, low, high = iqm_interval(tasks, resamples=20_000)
    assert middle == pytest.approx(stats.trim_mean(np.concatenate(tasks), 0.25))
    np.testing.assert_allclose([low, high], [theirs.low, theirs.high], atol=0.03)


def test_curves_meet_on_one_axis_and_a_short_one_counts_while_it_lasts():
    x, rows = on_one_axis(
        [(np.array([0.0, 10, 20]), np.array([0.0, 10, 20])), (np.array([0.0, 5]), np.array([2.0, 7]))]
    )
    assert x.tolist() == [0, 5, 10, 20]
    assert rows[0].tolist() == [0, 5, 10, 20]
    assert rows[1].tolist()[:2] == [2, 7]
    assert np.isnan(rows[1, 2:]).all()
    mean, low, high = over_curves(rows)
    assert mean.tolist() == [1, 6, 10, 20]
    assert low.tolist() == [0, 5, 10, 20]
    assert high.tolist() == [2, 7, 10, 20]
    assert len(on_one_axis([(np.arange(1000.0), np.arange(1000.0))])[0]) == 200


def fake_run(folder, env_id, seed, level, lr=3e-4, ended=True, algorithm="tdmpc2:5m", evaluations=5, pace=40.0):
    folder.mkdir(parents=True)
    config = {
        "algorithm": algorithm, "agent": {"lr": lr}, "env": {"id": env_id, "action_repeat": 2},
        "runtime": {"kind": "ray"},
        "train": {"seed": seed, "total_steps": 500_000, "train_ratio": None}, "log": {"interval": 1000 + seed},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    steps = [100_000 * (i + 1) for i in range(evaluations)]
    lines = [
        {"env_steps": step, "updates": step, "wall_seconds": step / pace * (1 + seed / 10), "episode/return": level / 2,
         "eval/return_mean": level * (1 - 0.5 ** (i + 1)) + 3 * seed}
        for i, step in enumerate(steps)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        (folder / "summary.json").write_text(json.dumps({"status": "completed"}))
    return folder


WALKER, CHEETAH = "dm_control/walker-walk-v0", "dm_control/cheetah-run-v0"


@pytest.fixture
def sweep(tmp_path):
    """Two tasks, two learning rates, three seeds; one run is not finished."""
    for task, level in ((WALKER, 950), (CHEETAH, 700)):
        for lr in (1e-4, 3e-4):
            for seed in range(3):
                name = f"{task[11:18]}-{lr}-{seed}"
                fake_run(
                    tmp_path / name, task, seed, level * (1 if lr > 2e-4 else 0.8), lr, ended=name != "walker--0.0001-2"
                )
    return tmp_path


def test_runs_are_grouped_by_task_and_by_what_differs_besides_the_seed(sweep):
    groups = grouped(read_compared([sweep]))
    assert set(groups) == {WALKER, CHEETAH}
    for variants in groups.values():
        assert {name: len(runs) for name, runs in variants.items()} == {"agent.lr 0.0001": 3, "agent.lr 0.0003": 3}
        assert all(run.subject.seed == seed for runs in variants.values() for seed, run in enumerate(runs))


def test_fields_that_differ_between_tasks_alone_make_no_variant(tmp_path):
    fake_run(tmp_path / "a", WALKER, 0, 900, lr=1e-4)
    fake_run(tmp_path / "b", CHEETAH, 0, 700, lr=3e-4)
    groups = grouped(read_compared([tmp_path / "a", tmp_path / "b"]))
    assert [list(variants) for variants in groups.values()] == [["tdmpc2:5m"], ["tdmpc2:5m"]]
    known = differences(read_compared([tmp_path]))
    assert known["agent.lr"] == {"0.0001": ["a"], "0.0003": ["b"]}
    assert set(known) == {"agent.lr", "env.id"}


def test_threads_and_timeouts_make_no_variant(tmp_path):
    for seed, settings in enumerate(({}, {"learner_threads": 4}, {"silence_timeout": 90.0})):
        fake_run(tmp_path / str(seed), WALKER, seed, 900)
        path = tmp_path / str(seed) / "config.yaml"
        config = yaml.safe_load(path.read_text())
        path.write_text(
            yaml.safe_dump(
                {**config, "runtime": {**config["runtime"], "learner_threads": 1, "silence_timeout": 60.0, **settings}}
            )
        )
    runs = read_compared([tmp_path])
    assert {name: len(same) for name, same in grouped(runs)[WALKER].items()} == {"tdmpc2:5m": 3}
    assert {"runtime.learner_threads", "runtime.silence_timeout"} <= set(differences(runs))  # the page names them


def test_scores_are_scaled_by_what_is_known_of_the_suite(sweep, tmp_path):
    scores, text = normalised(grouped(read_compared([sweep])))
    assert "divided by 1,000" in text
    assert scores[WALKER]["agent.lr 0.0003"].max() == pytest.approx((950 * (1 - 0.5**5) + 6) / 1000)
    for name, task, level in (("c", "CartPole-v1", 500), ("p", "Pendulum-v1", -200), ("q", "Pendulum-v1", -100)):
        fake_run(tmp_path / "others" / name, task, 0, level)
    scores, text = normalised(grouped(read_compared([tmp_path / "others"])))
    assert "0 is the lowest final return" in text
    assert scores["CartPole-v1"]["tdmpc2:5m"].tolist() == [0.0]  # one run alone has no range
    assert scores["Pendulum-v1"]["tdmpc2:5m"].tolist() == [0.0, 1.0]


def test_the_page_holds_curves_intervals_published_bands_tables_and_differences(sweep):
    page = write_comparison([sweep], sweep / "compare.html").read_text()
    for words in (
        "tdmpc2:5m on dm_control/cheetah-run-v0, dm_control/walker-walk-v0", "12 runs. Not complete: walker-",
        "walker--0.0001-2", "Over tasks", "Interquartile mean", "TD-MPC2, published (3 seeds)",
        "wall-clock time, hours",
        "agent.lr 0.0003 (3 seeds)", "Final returns", "Differences in the configurations", "not finished", "500,000",
    ):  # fmt: skip
        assert words in page, words
    assert page.count("<svg") == 3  # both tasks and the IQM
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)  # nothing is fetched
    row = re.search(rf"<th scope=\"row\">{WALKER}</th><td>agent.lr 0.0003</td>(.*?)</tr>", page).group(1)
    cells = re.findall(r"<td>(.*?)</td>", row)
    last = 950 * (1 - 0.5**5)
    assert cells[:4] == ["3", f"{last + 3:,.1f}", f"{last:,.1f} to {last + 6:,.1f}", f"{last:,.1f} to {last + 6:,.1f}"]
    assert 900 < float(cells[4]) < 1000  # what the authors report after 1,000,000 frames


def test_runs_without_two_evaluations_are_compared_by_their_training(tmp_path):
    fake_run(tmp_path / "a", "Pendulum-v1", 0, -200, evaluations=1)
    fake_run(tmp_path / "b", "Pendulum-v1", 1, -300)
    page = write_comparison([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html").read_text()
    assert "Return in training" in page
    assert "The authors report no curve for this task" in page
    assert "Over tasks" not in page


def test_the_command_writes_beside_the_runs_or_where_it_is_told(sweep, tmp_path, capsys):
    assert main([str(sweep)]) == 0
    assert (sweep / "compare.html").is_file()
    assert main([str(tmp_path / "cheetah-0.0001-0"), str(tmp_path / "cheetah-0.0001-1")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "compare.html")
    assert main([str(sweep), "--out", str(tmp_path / "here.html")]) == 0
    assert (tmp_path / "here.html").is_file()


def test_what_holds_no_runs_is_refused_in_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "holds no config.yaml, expected the directory of a run or of a sweep" in capsys.readouterr().err
    fake_run(tmp_path / "young", "Pendulum-v1", 0, 0, evaluations=0)
    assert main([str(tmp_path / "young")]) == 1
    assert "none of these runs has metrics yet" in capsys.readouterr().err


def test_runs_of_less_than_two_seconds_have_a_page(tmp_path):
    fake_run(tmp_path / "short", "Pendulum-v1", 0, -200, pace=1e6)
    assert "seconds" in write_comparison([tmp_path / "short"], tmp_path / "compare.html").read_text()
