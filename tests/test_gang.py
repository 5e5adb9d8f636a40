"""Several learners are the same algorithm as one: processes that learn from shares of a batch, against one with all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.test_core import KINDS as ALL_KINDS
from tests.test_core import batch_of
from worldloom.gang import Gang

pytestmark = pytest.mark.timeout(900)
UPDATES = 6
FREE = ("output.3.bias", "project.bias")  # of NE-Dreamer's transformer
KINDS = [(make, kind) for make, kind in ALL_KINDS if kind != "churn"]  # which takes long, and draws one number more
NAMES = [f"{make.__name__}-{kind}" for make, kind in KINDS]


def learner(make, kind):
    torch.manual_seed(3)
    return make(kind)


def batches(make, kind):
    """Batches of 8 windows; each learner has the same."""
    torch.manual_seed(4)
    agent = make(kind)
    return [batch_of(agent) for _ in range(UPDATES)]


def part(batch, gang):
    def share(entry):
        if isinstance(entry, dict):
            return {key: share(value) for key, value in entry.items()}
        return gang.share(entry, 0)

    return {name: share(entry) for name, entry in batch.items()}


def record(agent, given, gang):
    """States after the first update and after all, as arrays."""
    found = []
    for batch in given:
        agent.update(part(batch, gang))
        found.append({name: value.clone() for name, value in arrays(agent.state_dict()) if "generator" not in name})
    return [found[0], found[-1]]


def arrays(state, name=""):
    if torch.is_tensor(state):
        yield name, state
    elif isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from arrays(value, f"{name}/{key}")


def learn_together(rank, size, folder):
    """One process of a gang: every kind of agent in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    gang = Gang(rank, size)
    for name, (make, kind) in zip(NAMES, KINDS, strict=True):
        agent = learner(make, kind)
        agent.learning.join(gang)
        torch.save(record(agent, batches(make, kind), gang), Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gang")
    mp.spawn(learn_together, args=(request.param, str(folder)), nprocs=request.param)
    return request.param, folder


@pytest.mark.parametrize("name", NAMES)
def test_learners_together_do_what_one_does(name, together):
    size, folder = together
    make, kind = KINDS[NAMES.index(name)]
    alone = record(learner(make, kind), batches(make, kind), Gang())
    ranks = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(size)]
    for other in ranks[1:]:
        for one, same in zip(ranks[0], other, strict=True):
            assert all(torch.equal(value, same[key]) for key, value in one.items())  # bit for bit
    first = 2e-5 if kind in ("images", "mixed", "ne") else 1e-5  # they sum over more, in another order
    last = 2e-2 if kind == "ne" else 2e-3  # LaProp's first steps are as long where a gradient is nearly noise
    for bound, one, same in zip((first, last), alone, ranks[0], strict=True):
        assert one.keys() == same.keys()
        for key, value in one.items():
            if key.endswith("/momentum"):
                continue  # LaProp's, of gradients divided by their own size: entries near zero are mostly noise
            if kind == "ne" and key.endswith(FREE):
                continue  # means and softmax take these biases away: their gradients are noise alone
            scale = value.abs().max().clamp(min=1e-8)
            squares = 2 if key.endswith(("/square", "/exp_avg_sq")) else 1
            assert (value - same[key]).abs().max() <= squares * bound * scale, key


def test_a_share_is_never_uneven():
    assert Gang(2, 4).share(torch.arange(8), 0).tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"axis 0 of \(2,\) does not divide among 4 learners"):
        Gang(2, 4).share(torch.arange(2), 0)
