"""Several learners are the same algorithm as one: processes that learn from shares of a batch, against one with all.

What remains is the order of sums. `pytest tests/test_gang.py -m slow -s -k rows` prints, in parts of each array's
maximum, how far one learner is from itself if it is given the rows of its batches, and their noise, in another order;
how far if each of its weights is off by one rounding, or without oneDNN's kernels; and how far several learners are
from it. The second is there since a learner with fewer rows multiplies and convolves by other kernels, which round each
row otherwise; another order of rows does not show that. One can grow large: DIAMOND rounds its frames to bytes.
"""

import contextlib
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.test_core import KINDS as ALL_KINDS
from tests.test_core import batch_of
from worldloom.gang import Gang

pytestmark = pytest.mark.timeout(1800)
FREE = ("output.3.bias", "project.bias")  # of NE-Dreamer's transformer
KINDS = {f"{make.__name__}-{kind}": (make, kind) for make, kind in ALL_KINDS if kind != "churn"}  # it draws one more
QUICK = ["dreamer-vectors", "dreamer-r2dreamer", "storm-vectors", "tdmpc2-states", "tdmpc2-tasks", "diamond-published"]
UPDATES, QUICK_UPDATES = 20, 3
ORDERS = 2  # of rows, in which one learner is given its batches
ROUNDINGS = 3  # in which one learner's weights are off by one rounding; one draw of them says little
FIRST = 1e-5  # of each array's maximum: what may differ after one update
DRAWN = 0.1  # from here on a rounding in the weights has made a draw fall otherwise, which is no measure of anything


@dataclass(frozen=True)
class Reordered(Gang):
    """One learner, which gives the rows of a batch and their noise another order."""

    order: tuple[int, ...] = ()

    def share(self, whole, dim):
        parts = whole.chunk(len(self.order), dim)  # what belongs to a row lies together
        return torch.cat([parts[place] for place in self.order], dim)


def learner(name):
    make, kind = KINDS[name]
    torch.manual_seed(3)
    return make(kind)


def batches(name, updates):
    """Return the same batches of 8 windows for everybody."""
    agent = learner(name)
    return [batch_of(agent) for _ in range(updates)]


def part(batch, gang):
    def share(entry):
        if isinstance(entry, dict):
            return {key: share(value) for key, value in entry.items()}
        return gang.share(entry, 0)

    return {name: share(entry) for name, entry in batch.items()}


def record(name, updates, gang, compiled=False, rounded=None):
    """Return states after the first update and all, as arrays; rounded: a seed, for weights off by one rounding."""
    agent, found = learner(name), []
    if compiled:
        agent.configure_learning("float32", compiled=True)
    if rounded is not None:
        round_otherwise(agent, rounded)
    agent.learning.join(gang)
    for batch in batches(name, updates):
        agent.update(part(batch, gang))
        found.append({key: value.clone() for key, value in arrays(agent.state_dict()) if "generator" not in key})
    return [found[0], found[-1]]


@contextlib.contextmanager
def other_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TF32, which is not used
        with torch.backends.mkldnn.flags(enabled=False):
            yield


@torch.no_grad()
def round_otherwise(agent, seed):
    generator = torch.Generator().manual_seed(seed)
    for module in filter(None, (agent.world_model, agent.behaviour)):
        for weight in module.parameters():
            up = torch.randint(2, weight.shape, generator=generator) > 0
            weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf)))


def arrays(state, name=""):
    if torch.is_tensor(state):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from arrays(value, f"{name}/{key}")


def learn_together(rank, size, folder, names, updates, compiled):
    """One process of a gang: every kind of agent in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    for name in names:
        torch.save(record(name, updates, Gang(rank, size), compiled), Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def together(folder, size, names, updates, compiled=False):
    """Return, by name, what the first of so many learners has; the others have the same, bit for bit."""
    mp.spawn(learn_together, args=(size, str(folder), names, updates, compiled), nprocs=size)
    found = {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(size)] for name in names}
    for first, *others in found.values():
        for other in others:
            for one, same in zip(first, other, strict=True):
                assert all(torch.equal(value, same[key]) for key, value in one.items())
    return {name: ranks[0] for name, ranks in found.items()}


def differences(one, other):
    """Return, by array, how far the second is from the first, in parts of the first's maximum."""
    assert one.keys() == other.keys()
    found = {}
    for key, value in one.items():
        if key.endswith(FREE):
            continue  # means and softmax take these biases away: their gradients are noise alone
        distance = (value - other[key]).abs().max() / value.abs().max().clamp(min=1e-8)
        found[key] = float(distance) / (2 if key.endswith(("/square", "/exp_avg_sq")) else 1)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together(tmp_path_factory.mktemp("gang"), 2, QUICK, QUICK_UPDATES)


@pytest.mark.parametrize("name", QUICK)
def test_two_learners_do_what_one_does(name, two):
    alone = record(name, QUICK_UPDATES, Gang())
    for bound, one, same in zip((FIRST, 2e-3), alone, two[name], strict=True):
        far = {key: distance for key, distance in differences(one, same).items() if distance > bound}
        # LaProp's momentum is of gradients divided by their own size: entries near zero are mostly noise.
        assert not [key for key in far if not key.endswith("/momentum")], far


# In full


@cache
def alone(name):
    """Return states of one learner, those of the same with other orders of rows, and those with other roundings."""
    windows = len(batches(name, 1)[0]["actions"])
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(windows, generator=generator).tolist() for _ in range(ORDERS)]
    reordered = [record(name, UPDATES, Reordered(order=tuple(order))) for order in orders]
    rounded = [record(name, UPDATES, Gang(), rounded=seed) for seed in range(ROUNDINGS)]
    with other_kernels():
        rounded.append(record(name, UPDATES, Gang()))
    return record(name, UPDATES, Gang()), reordered, rounded


GROUPS = {
    "momentum": ("/exp_avg", "/momentum"),
    "squares": ("/exp_avg_sq", "/square"),
    "targets": ("target", "slow"),
    "statistics": ("range", "scale", "running_"),
}


def group_of(key):
    """Return what kind of array this is, by its name in a state."""
    for group, names in GROUPS.items():
        if key.endswith(names) if group in ("squares", "momentum") else any(name in key for name in names):
            return group
    return "parameters"


def largest(found):
    """Return, by group, the largest of differences by array."""
    groups = {}
    for key, distance in found.items():
        groups[group_of(key)] = max(distance, groups.get(group_of(key), 0.0))
    return groups


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_learners_together_differ_no_more_than_one_whose_rows_are_in_another_order(size, name, tmp_path):
    one, *others = alone(name)
    several, wrong = together(tmp_path, size, [name], UPDATES)[name], []
    for place, when in enumerate(("1 update", f"{UPDATES} updates")):
        gang = largest(differences(one[place], several[place]))
        own = [[largest(differences(one[place], each[place])) for each in kind] for kind in others]
        for group, distance in gang.items():
            order = max(each[group] for each in own[0])
            rounding = max((each[group] for each in own[1] if each[group] < DRAWN), default=0.0)
            line = f"| {name} | {size} | {when} | {group} | {order:.1e} | {rounding:.1e} | {distance:.1e} |"
            print(line)
            if distance > max(FIRST, 4 * order, 4 * rounding):
                wrong.append(line)
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dreamer-vectors", "dreamer-r2dreamer", "storm-vectors", "tdmpc2-discrete"])
def test_two_learners_with_compiled_updates_do_what_one_does(name, tmp_path):
    alone, found = record(name, 3, Gang()), together(tmp_path, 2, [name], 3, compiled=True)[name]
    far = {key: distance for key, distance in differences(alone[0], found[0]).items() if distance > 1e-4}
    assert not [key for key in far if not key.endswith("/momentum")], far


# Parts


@dataclass(frozen=True)
class Twins(Gang):
    """Two learners with the same rows, in one process; what they exchange must not be part of a compiled graph."""

    size: int = 2

    def gather(self, part):
        assert not torch.compiler.is_compiling()
        return part.detach().flatten().repeat(self.size)

    def summed(self, part):
        assert not torch.compiler.is_compiling()
        return part.mul_(self.size)


@pytest.mark.parametrize(
    "name", [name if name.startswith("tdmpc2") else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
@pytest.mark.parametrize("first", ["compile", "join"])
def test_no_exchange_is_part_of_a_compiled_graph(name, first, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    eager, compiled = learner(name), learner(name)
    steps = [partial(compiled.configure_learning, "float32", compiled=True), partial(compiled.learning.join, Twins())]
    for step in steps if first == "compile" else reversed(steps):
        step()
    eager.learning.join(Twins())
    (batch,) = batches(name, 1)
    expected = eager.update(batch)[0]
    assert compiled.update(batch)[0] == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_a_share_is_never_uneven():
    assert Gang(2, 4).share(torch.arange(8), 0).tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"axis 0 of \(2,\) does not divide among 4 learners"):
        Gang(2, 4).share(torch.arange(2), 0)
