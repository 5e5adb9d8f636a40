"""Files that only look like recorded episodes of TD-MPC2's authors: refused with a ValueError, or read as they are."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strange import damaged, fuzz, outcome, refusal_of_bomb, repack
from tests.tdmpc2.test_strange_files import REPLACED, changed, made_of, write_claims
from worldloom.tdmpc2 import read_official_episodes

FILE = Path(__file__).parents[1] / "data" / "tdmpc2_episodes.pt"


def columns():
    """Three episodes of five rows, whose numbers half precision holds; the row that no action led to is NaN."""
    generator = torch.Generator().manual_seed(0)
    obs, action = torch.rand(3, 5, 4, generator=generator), torch.rand(3, 5, 2, generator=generator)
    action[:, 0] = torch.nan
    reward = torch.rand(3, 5, generator=generator)
    reward[:, 0] = torch.nan
    task = torch.tensor([0, 1, 1]).repeat_interleave(5).view(3, 5)
    made = {"obs": obs.half().float(), "action": action.half().float(), "reward": reward.half().float()}
    return made | {"task": task, "terminated": torch.zeros(3, 5)}


def read_all(path):
    return list(read_official_episodes(path))


def read_or_refuse(path, expected):
    """Assert that a file is refused, or gives these episodes."""
    episodes, message = outcome(read_all, path)
    if episodes is not None:
        assert len(episodes) == len(expected)
        for found, episode in zip(episodes, expected, strict=True):
            assert found.keys() == episode.keys()
            assert all(np.array_equal(found[name], value) for name, value in episode.items())
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strange")


@pytest.fixture(scope="module")
def expected(folder):
    torch.save(columns(), folder / "whole.pt")
    return read_all(folder / "whole.pt")


@fuzz(200)
@given(content=damaged(FILE.read_bytes()))
def test_a_damaged_file_is_refused_or_gives_the_same_episodes(content, folder):
    (folder / "damaged.pt").write_bytes(content)
    read_or_refuse(folder / "damaged.pt", read_all(FILE))


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz(300)
@given(data=st.data())
def test_changed_columns_are_refused_or_the_same_episodes(data, folder, expected):
    torch.save(changed(columns(), data.draw, optional=("task", "terminated")), folder / "changed.pt")
    read_or_refuse(folder / "changed.pt", expected)


@fuzz(150)
@given(data=st.data())
def test_a_damaged_pickle_is_refused_or_gives_finite_episodes(data, folder):
    with zipfile.ZipFile(FILE) as archive:
        pickled = data.draw(damaged(archive.read("chunk/data.pkl")))

    def change(archive, name, content):
        archive.writestr(name, pickled if name.endswith("data.pkl") else content)

    episodes, _ = outcome(read_all, repack(FILE, folder / "pickle.pt", change))
    for episode in episodes or ():
        assert np.isfinite(episode["obs"]).all()
        assert len(episode["actions"]) == len(episode["rewards"]) == len(episode["dones"]) == len(episode["obs"]) - 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("meta", "is a meta tensor"), ("sparse", "is a sparse tensor"), ("quantized", "is a quantized tensor"),
        ("complex", "is complex"), ("NaN", "of episode 2 holds NaN or infinity"), ("empty", "is empty"),
        ("infinity", "of episode 2 holds NaN or infinity"), ("text", "is of type str"), ("mapping", "is of type dict"),
        ("too large", "of episode 2 holds NaN or infinity"), ("repeated", "repeats its numbers to more bytes"),
        ("short", r"expected [episodes, T, ...]"), ("one axis more", r"expected [episodes, T, ...]"),
        ("number", r"expected [episodes, T, ...]"), ("list", "is of type list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["obs", "action", "reward", "terminated", "task"])
def test_the_column_that_is_refused_is_named(kind, problem, name, folder, expected):
    state = columns()
    torch.save({**state, name: REPLACED[kind](state[name])}, folder / "named.pt")
    message = read_or_refuse(folder / "named.pt", expected)
    assert problem in message
    assert name in message


@pytest.mark.parametrize("name", ["obs", "action", "reward"])
def test_columns_of_integers_are_refused(name, folder, expected):
    torch.save(columns() | {name: columns()[name].long()}, folder / "integers.pt")
    assert f"{name} is torch.int64, expected floats" in read_or_refuse(folder / "integers.pt", expected)


@pytest.mark.parametrize(
    "changes",
    [{"task": torch.full((3, 5), 0.5)}, {"task": torch.full((3, 5), -1)}, {"task": torch.arange(15).view(3, 5)}],
)
def test_tasks_that_are_no_numbers_of_tasks_are_refused(changes, folder, expected):
    torch.save(columns() | changes, folder / "tasks.pt")
    assert "task of episode 0 is not one number from 0" in read_or_refuse(folder / "tasks.pt", expected)


def test_a_small_file_that_asks_for_much_is_refused_before_anything_is_allocated(folder, expected):
    state = made_of(columns())
    state["obs"].claims = [10**9, 0, 3, 5, 10**8, 5 * 10**8, 10**8, 1]
    write_claims(state, folder / "claims.pt")
    torch.save(columns() | {"obs": torch.zeros(1).expand(3, 5, 10**8)}, folder / "repeats.pt")

    def change(archive, name, content):
        archive.writestr(name, bytes(200_000_000) if name.endswith("/0") else content, zipfile.ZIP_DEFLATED)

    repack(folder / "whole.pt", folder / "zeros.pt", change)
    for name, message in (("claims", "obs is damaged"), ("repeats", "obs repeats"), ("zeros", "is compressed")):
        assert message in refusal_of_bomb(read_all, folder / f"{name}.pt")
