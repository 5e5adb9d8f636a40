"""Files that only look like saved replay buffers: each is refused with a ValueError, or loaded as what it holds."""

import copy
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.replay.test_episodes import counting
from tests.strange import damaged, fuzz, outcome, refusal_of_bomb, repack
from worldloom.encoding import pack, unpack
from worldloom.replay.buffer import ReplayBuffer
from worldloom.types import ColumnSpec, WindowSpec


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strange")


@pytest.fixture(scope="module")
def saved(folder):
    """A buffer that has wrapped, with every kind of column."""
    made = ReplayBuffer(
        40, {"position": (1,), "camera": (3, 4, 4)}, 1, windows=WindowSpec(5, 1, True, online_queue=True),
        columns={"task": ColumnSpec((), "int64"), "latent": ColumnSpec((2,), "float16")},
    )  # fmt: skip
    for number in range(4):
        episode = counting(12, 100 * number)
        camera = np.full((13, 3, 4, 4), number, np.uint8)
        made.add_episode(**{**episode, "obs": {"position": episode["obs"], "camera": camera}}, task=number)
    made.draw(3)
    made.save(folder / "saved.npz")
    return made


def rows_of(buffer):
    """The rows that a buffer holds, oldest first, whatever their numbers."""
    end = buffer.accepted().rows
    return buffer.rows_between(end - len(buffer), end)


def load_or_refuse(path, saved):
    """Assert that a file is refused, or gives the same rows and can be drawn from."""
    loaded, message = outcome(ReplayBuffer.load, path)
    if message:
        return message
    assert rows_of(saved).keys() == rows_of(loaded).keys()
    assert all((column == rows_of(loaded)[name]).all() for name, column in rows_of(saved).items())
    if loaded.num_windows:
        drawn = loaded.draw(50)
        follows = np.diff(drawn["obs/position"][..., 0], axis=1) == 1
        assert (follows | drawn["is_first"][:, 1:]).all()
    return ""


@fuzz(200)
@given(data=st.data())
def test_a_damaged_buffer_is_refused_or_the_same(data, folder, saved):
    (folder / "damaged.npz").write_bytes(data.draw(damaged((folder / "saved.npz").read_bytes())))
    load_or_refuse(folder / "damaged.npz", saved)


def described(folder):
    with np.load(folder / "saved.npz") as file:
        columns = {name: file[name] for name in file.files}
    return unpack(columns.pop("about").tobytes()), columns


def write(about, columns, path, save=np.savez):
    packed = np.frombuffer(about if isinstance(about, bytes) else pack(about), np.uint8)
    save(path, about=packed, **columns)
    return path


WRONG = [
    None, True, -1, 0, 1, 2, 7, 10**6, 2**63, 10**18, 10**40, 1.5, float("nan"), "", "obs", "float64", "O", [], [1],
    ["a"], [[]], [-1] * 3, [0] * 20, [10**9], {}, {"a": 1}, np.zeros(3), np.arange(40), b"\0",
]  # fmt: skip


@st.composite
def changed(draw, about):
    """The description with one of its entries, at any depth, replaced, missing or added."""
    about = copy.deepcopy(about)
    at, key = about, None
    while True:
        inside = at if key is None else at[key]
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        if not keys or (key is not None and draw(st.integers(0, 3)) == 0):
            break
        at, key = inside, draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["replaced", "replaced", "replaced", "missing", "added"]))
    if how == "replaced":
        at[key] = draw(st.sampled_from(WRONG))
    elif how == "missing":
        del at[key]
    elif isinstance(at, dict):
        at[draw(st.sampled_from(["a", "", 3, "obs", "task"]))] = draw(st.sampled_from(WRONG))
    return about


@fuzz(300)
@given(data=st.data())
def test_a_changed_description_is_refused_or_has_no_effect_on_rows(data, folder, saved):
    about, columns = described(folder)
    load_or_refuse(write(data.draw(changed(about)), columns, folder / "changed.npz"), saved)


@fuzz(150)
@given(data=st.data())
def test_a_damaged_description_is_refused_or_has_no_effect_on_rows(data, folder, saved):
    about, columns = described(folder)
    load_or_refuse(write(data.draw(damaged(pack(about))), columns, folder / "changed.npz"), saved)


CHANGED = {
    "float64": lambda c: c.astype(np.float64),
    "complex": lambda c: c + 1j,
    "object": lambda c: np.array([None] * len(c), object),
    "text": lambda c: c.astype(str),
    "record": lambda c: np.zeros(len(c), [("a", "f4")]),
    "time": lambda c: np.zeros(len(c), "datetime64[s]"),
    "NaN": lambda c: np.full_like(c, np.nan, dtype=c.dtype if c.dtype.kind == "f" else np.float32),
    "infinity": lambda c: np.full_like(c, np.inf, dtype=c.dtype if c.dtype.kind == "f" else np.float32),
    "other truth": lambda c: np.full(c.shape, 7, np.uint8).view(bool),
    "short": lambda c: c[:-1],
    "empty": lambda c: c[:0],
    "number": lambda c: np.float32(1),
    "one axis more": lambda c: c[:, None],
    "other order": lambda c: np.asfortranarray(c.reshape(2, -1)),
    "bytes swapped": lambda c: c.astype(c.dtype.newbyteorder()),
}


@fuzz(150)
@given(data=st.data())
def test_changed_columns_are_refused_or_the_same(data, folder, saved):
    about, columns = described(folder)
    name = data.draw(st.sampled_from(sorted(columns)))
    column = columns.pop(name)
    if kind := data.draw(st.sampled_from([None, *CHANGED])):
        columns[data.draw(st.sampled_from([name, name, name, "other"]))] = CHANGED[kind](column)
    load_or_refuse(write(about, columns, folder / "columns.npz"), saved)


def test_what_is_wrong_with_a_buffer_is_named(folder, saved):
    about, columns = described(folder)
    state = about["state"]
    for wrong, other, message in [
        (about | {"format": 3}, {}, "it is of format 3, expected at most 2. Update WorldLoom"),
        (about | {"capacity": 10**15}, {}, r"replay.capacity=1,000,000,000,000,000 rows needs .* GiB"),
        (about | {"capacity": 3}, {}, "capacity is 3, expected a whole number from 40"),
        (about | {"state": state | {"rows": 30}}, {}, "rows is 30, expected a whole number from 40"),
        (about | {"state": state | {"rows": 60}}, {"rewards": columns["rewards"][:30]}, r"is .* expected .* \(30"),
        ({name: value for name, value in about.items() if name != "state"}, {}, "it lacks 'state'"),
        (about, {"latent": columns["latent"] * np.nan}, "column 'latent' holds NaN"),
        (about, {"rewards": columns["rewards"] + 1j}, "an array has dtype complex"),
        (about, {"rewards": columns["rewards"].astype(object)}, "an array has dtype object"),
        (about, {"extra": columns["rewards"]}, "it has columns .*'extra'"),
    ]:
        with pytest.raises(ValueError, match=message):
            ReplayBuffer.load(write(wrong, columns | other, folder / "named.npz"))
    load_or_refuse(write(about, columns, folder / "same.npz"), saved)


# Bombs: small files that ask for much


def bomb_of_zeros(folder):
    about, columns = described(folder)
    return write(about, {**columns, "rewards": np.zeros(50_000_000, np.float32)}, folder / "b.npz", np.savez_compressed)


def bomb_of_a_header(folder):
    """An array of 40 GB by its header alone."""

    def change(archive, name, content):
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,), }"
        made = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header
        archive.writestr(name, made if name == "rewards.npy" else content)

    return repack(folder / "saved.npz", folder / "header.npz", change)


def bomb_of_columns(folder):
    """A description of rows that the columns do not have."""
    about, columns = described(folder)
    about["state"]["specs"]["latent"] = [[50_000_000], "float32"]
    return write(about, columns, folder / "specs.npz")


def bomb_of_empty_rows(folder):
    """No rows, of 4 EB each."""
    about, columns = described(folder)
    about["state"]["specs"]["latent"] = [[2**60], "float32"]
    about["state"] |= dict.fromkeys(("rows", "begin", "steps", "episodes"), 0)
    columns = {name: column[:0] for name, column in columns.items()} | {"latent": np.zeros((0, 2**60), np.float32)}
    return write(about, columns, folder / "rows.npz")


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (bomb_of_zeros, "is compressed or encrypted, expected plain bytes"), (bomb_of_a_header, "cannot reshape"),
        (bomb_of_columns, "column 'latent' is float16"), (bomb_of_empty_rows, "GiB of memory are free"),
    ],
)  # fmt: skip
def test_a_small_file_that_asks_for_much_is_refused_before_anything_is_allocated(bomb, message, folder, saved):
    assert message in refusal_of_bomb(ReplayBuffer.load, bomb(folder))


def test_an_archive_with_a_password_is_refused(folder, saved):
    whole = bytearray((folder / "saved.npz").read_bytes())
    with zipfile.ZipFile(folder / "saved.npz") as archive:
        entry = whole.rindex(b"PK\x01\x02", 0, archive.start_dir + 4)
    whole[entry + 8] |= 1
    (folder / "locked.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        ReplayBuffer.load(folder / "locked.npz")
