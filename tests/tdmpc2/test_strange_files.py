"""Files that only look like those of TD-MPC2's authors: each is refused with a ValueError, or read as what it holds."""

import io
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.strange import damaged, fuzz, outcome, refusal_of_bomb, repack
from tests.tdmpc2.test_official_checkpoints import layout_a, layout_b, layout_c, model_of, save
from worldloom.tdmpc2 import TDMPC2WorldModel, load_official
from worldloom.tdmpc2.official import checkpoints

# What a tensor can be replaced by. Values survive half precision, so that other floats hold the same model.


def with_one(tensor, value):
    changed = tensor.clone().to(torch.float64 if isinstance(value, float) else tensor.dtype)
    changed.view(-1)[-1] = value
    return changed


REPLACED = {
    "meta": lambda t: torch.empty(t.shape, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: torch.eye(3).to_sparse_csr(),
    "complex": lambda t: t + 1j,
    "real complex": lambda t: t.to(torch.complex64),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "NaN": lambda t: with_one(t, float("nan")),
    "infinity": lambda t: with_one(t, float("inf")),
    "too large": lambda t: with_one(t, 1e300),
    "repeated": lambda t: torch.zeros(1).expand(30_000_000),
    "int64": lambda t: t.long(),
    "uint16": lambda t: t.to(torch.uint16),
    "bool": lambda t: t.bool(),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "parameter": lambda t: torch.nn.Parameter(t.float()),
    "one axis more": lambda t: t[None],
    "six axes more": lambda t: t[(None,) * 6],
    "one axis": lambda t: t.flatten(),
    "empty": lambda t: t[:0],
    "without end": lambda t: torch.empty(0, 2**50),
    "short": lambda t: t[:-1],
    "number": lambda t: torch.tensor(1.0),
    "array": lambda t: t.numpy(),
    "text": lambda t: "tensor",
    "nothing": lambda t: None,
    "float": lambda t: 0.5,
    "list": lambda t: [t, t],
    "mapping": lambda t: {"weight": t},
    "ordered": lambda t: OrderedDict(a=t),
    "set": lambda t: {1, 2},
    "bytes": lambda t: b"tensor",
    "size": lambda t: torch.Size([3]),
    "storage": lambda t: t.untyped_storage(),
    "dtype": lambda t: torch.float32,
}
ODD_KEYS = [3, None, "", "\0", ("a",), 1.5, "_dynamics.", "_Qs.params.99", "_encoder.state.9.weight", "a" * 999]


def changed(state, draw, optional=()):
    """The state with one or two of its tensors replaced, missing, renamed or added."""
    state = dict(state)
    for key in draw(st.lists(st.sampled_from(list(state)), min_size=1, max_size=2, unique=True)):
        tensor = state[key] if isinstance(state[key], torch.Tensor) else torch.ones(2, 2)
        kind = draw(st.sampled_from([*REPLACED, "missing", "renamed", "added"]))
        odd = draw(st.sampled_from(ODD_KEYS))
        if kind in REPLACED:
            try:
                state[key] = REPLACED[kind](tensor)
            except (RuntimeError, IndexError):  # a tensor that cannot be made so
                state[key] = kind
        elif key not in optional:
            state[odd if kind != "missing" else key] = tensor
            if kind != "added":
                del state[key]
    return state


# Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strange")


def halved_model():
    model = model_of()
    return model.half().float()


MODEL = halved_model()


def read_or_refuse(path):
    """Assert that a file is refused, or gives MODEL; torch may warn of the kinds of tensor that it writes."""
    loaded, message = outcome(load_official, path)
    if loaded is not None:
        for name, value in MODEL.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    return message


class Layouts(dict):
    __repr__ = object.__repr__  # a failing example prints its arguments


@pytest.fixture(scope="module")
def layouts(folder):
    current = layout_c(MODEL, folder / "c.pt")
    return Layouts(c=current, b=layout_b(current), a=layout_a(current))


@fuzz(200)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_the_same_model(data, folder, layouts):
    (folder / "damaged.pt").write_bytes(data.draw(damaged((folder / "c.pt").read_bytes())))
    read_or_refuse(folder / "damaged.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
@fuzz(250)
@given(data=st.data())
def test_changed_tensors_of_a_checkpoint_are_refused_or_the_same_model(data, folder, layouts):
    state = changed(layouts[data.draw(st.sampled_from("abc"))], data.draw)
    torch.save(state if data.draw(st.booleans()) else {"model": state}, folder / "changed.pt")
    read_or_refuse(folder / "changed.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("meta", "is a meta tensor"), ("sparse", "is a sparse tensor"), ("compressed", "is a sparse tensor"),
        ("quantized", "is a quantized tensor"), ("complex", "is complex"), ("real complex", "is complex"),
        ("NaN", "holds NaN or infinity"), ("infinity", "holds NaN or infinity"), ("too large", "holds NaN or infinity"),
        ("repeated", "repeats its numbers to more bytes than the file has"), ("nothing", "is of type NoneType"),
        ("empty", "is empty"), ("text", "is of type str"), ("mapping", "is of type dict"), ("int64", "is torch.int64"),
        ("one axis more", "expected"), ("number", "expected"), ("nested", "is of type torch._utils._rebuild_nested"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["_dynamics.0.weight", "_encoder.state.0.ln.bias", "_target_Qs_params.1.weight"])
def test_the_tensor_that_is_refused_is_named(kind, problem, name, folder, layouts):
    state = layouts["c"]
    message = read_or_refuse(save({**state, name: REPLACED[kind](state[name])}, folder / "named.pt"))
    assert problem in message
    assert name in message


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("_pi.2.weight", (1, 24), "action_dim"), ("_dynamics.2.weight", (31, 24), "latent_dim is 31"),
        ("_reward.2.weight", (2, 24), "num_bins is 2"), ("_detach_Qs_params.0.weight", (1, 36, 24), "num_q is 1"),
        ("_encoder.state.0.weight", (16,), "has shape (16,), expected 2 axes"),
    ],
)  # fmt: skip
def test_sizes_that_no_model_has_are_named(name, shape, problem, folder, layouts):
    assert problem in read_or_refuse(save({**layouts["c"], name: torch.ones(shape)}, folder / "sizes.pt"))


# Claims: files of torch.save written by hand, whose tensors say other things than their bytes


class Made:
    """A tensor as torch.save pickles one."""

    def __init__(self, tensor, key):
        self.tensor, self.key = tensor.contiguous(), key
        self.claims = [self.tensor.numel(), 0, *tensor.shape, *self.tensor.stride()]

    def __reduce__(self):
        (count, offset), axes = self.claims[:2], self.tensor.ndim
        shape, stride = tuple(self.claims[2 : 2 + axes]), tuple(self.claims[2 + axes :])
        arguments = (Stored((self.key, count, self.tensor.dtype)), offset, shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class Stored(tuple):
    pass


class ClaimPickler(pickle.Pickler):
    def persistent_id(self, item):
        if not isinstance(item, Stored):
            return None
        kind = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}[item[2]]
        return ("storage", kind, item[0], "cpu", item[1])


def write_claims(state, path):
    pickled = io.BytesIO()
    ClaimPickler(pickled, 2).dump(state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled.getvalue())
        for made in state.get("model", state).values():
            archive.writestr(f"x/data/{made.key}", made.tensor.numpy().tobytes())
    return path


def made_of(layout):
    return {key: Made(value, str(number)) for number, (key, value) in enumerate(layout.items())}


def test_a_file_that_is_missing_is_no_strange_file(folder):
    with pytest.raises(FileNotFoundError):
        load_official(folder / "absent.pt")


def test_a_checkpoint_written_by_hand_loads(folder, layouts):
    assert read_or_refuse(write_claims({"model": made_of(layouts["b"])}, folder / "hand.pt")) == ""


@fuzz(150)
@given(data=st.data())
def test_claims_that_no_bytes_stand_behind_are_refused(data, folder, layouts):
    state = made_of(layouts["b"])
    made = state[data.draw(st.sampled_from(sorted(state)))]
    at = data.draw(st.integers(0, len(made.claims) - 1))
    wrong = [-1, -(2**40), 2**31, 2**40, 2**63, 2**200, 10**5000, None, "a", 1.5, (1,), {}]
    made.claims[at] = data.draw(st.sampled_from(wrong))
    assert read_or_refuse(write_claims({"model": state}, folder / "claims.pt")) != ""


@fuzz(150)
@given(data=st.data())
def test_a_damaged_pickle_is_refused_or_holds_finite_tensors(data, folder, layouts):
    """Under a checksum that is right, as a stranger writes it."""
    with zipfile.ZipFile(folder / "c.pt") as archive:
        pickled = data.draw(damaged(archive.read("c/data.pkl")))

    def change(archive, name, content):
        archive.writestr(name, pickled if name.endswith("data.pkl") else content)

    loaded, _ = outcome(load_official, repack(folder / "c.pt", folder / "pickle.pt", change))
    if loaded is not None:  # perhaps its tensors have changed places in the file
        assert all(value.isfinite().all() for value in loaded.state_dict().values())


# Bombs: small files that ask for much


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test in which a model takes memory."""
    with torch.device("meta"):
        TDMPC2WorldModel((5,), 4)  # torch imports modules for the first one

    class Meta(TDMPC2WorldModel):
        def __init__(self, *arguments):
            assert torch.empty(0).device.type == "meta", "a model was built"
            super().__init__(*arguments)

    monkeypatch.setattr(checkpoints, "TDMPC2WorldModel", Meta)


def bomb_of_wide_layers(folder, layouts):
    """Columns only: the layers between them would have 100 million weights."""
    wide = {
        key: torch.zeros(10_000, 1) if key in ("_dynamics.0.weight", "_encoder.state.0.weight") else value
        for key, value in layouts["c"].items()
    }
    return save(wide, folder / "wide.pt")


def bomb_of_repeats(folder, layouts):
    return save({k: v for k, v in layouts["c"].items() if "." not in k} | {
        key: torch.zeros(1).expand(4096, 4096) for key in layouts["c"] if key.endswith("weight")
    }, folder / "repeats.pt")  # fmt: skip


def bomb_of_many_repeats(folder, layouts):
    """Each tensor as large as the file allows."""
    return save(layouts["c"] | {f"_dynamics.{n}.weight": torch.zeros(1).expand(60, 500) for n in range(500)},
                folder / "many.pt")  # fmt: skip


def bomb_of_claims(folder, layouts):
    state = made_of(layouts["b"])
    state["_dynamics.0.weight"].claims = [60_000**2, 0, 60_000, 60_000, 60_000, 1]  # 14.4 GB
    return write_claims({"model": state}, folder / "claimed.pt")


def bomb_of_zeros(folder, layouts):
    def change(archive, name, content):
        archive.writestr(name, bytes(200_000_000) if name.endswith("/0") else content, zipfile.ZIP_DEFLATED)

    return repack(folder / "c.pt", folder / "zeros.pt", change)


def bomb_of_a_table(folder, layouts):
    """A pickle that numbers an object 2 ** 31 - 1, for which pickle makes a table of that length."""
    return _pickled(b"\x80\x02}r\xff\xff\xff\x7f.", folder / "table.pt")


def bomb_of_a_call(folder, layouts):
    """bytearray(2 ** 31 - 1), which torch.load calls."""
    return _pickled(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", folder / "call.pt")


def bomb_of_a_key(folder, layouts):
    """A key whose hash takes 2 ** 60 steps: a tuple of one tuple twice, 60 times."""
    nested = b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))
    return _pickled(b"\x80\x02}X\0\0\0\0" + nested + b"Ns.", folder / "key.pt")


def _pickled(content, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
    return path


@pytest.mark.parametrize(
    ("bomb", "message"),
    [
        (bomb_of_wide_layers, "expected"), (bomb_of_repeats, "repeats its numbers to more bytes than the file has"),
        (bomb_of_many_repeats, "its tensors claim"), (bomb_of_claims, "_dynamics.0.weight is damaged"),
        (bomb_of_zeros, "is compressed"), (bomb_of_a_table, "numbers an object"),
        (bomb_of_a_call, "expected a mapping"), (bomb_of_a_key, "uses a tuple again"),
    ],
)  # fmt: skip
def test_a_small_file_that_asks_for_much_is_refused_before_anything_is_built(bomb, message, folder, layouts, no_model):
    assert message in refusal_of_bomb(load_official, bomb(folder, layouts))


def test_entries_that_overlap_or_share_a_name_are_refused(folder, layouts):
    def twice(archive, name, content):
        archive.writestr(name, content)
        if name.endswith("/1"):
            archive.filelist.append(archive.filelist[-1])

    with pytest.raises(ValueError, match="two of its entries have one name|its entries claim"):
        load_official(repack(folder / "c.pt", folder / "twice.pt", twice))

    def everywhere(archive, name, content):
        archive.writestr(name, content)
        for number in range(20):
            archive.filelist.append(zipfile.ZipInfo(f"c/extra/{number}"))
            for field in ("header_offset", "CRC", "compress_size", "file_size", "external_attr"):
                setattr(archive.filelist[-1], field, getattr(archive.filelist[-2], field))

    with pytest.raises(ValueError, match="its entries claim"):
        load_official(repack(folder / "c.pt", folder / "everywhere.pt", everywhere))
