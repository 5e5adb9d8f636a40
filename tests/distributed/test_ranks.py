"""Learners that are one gang: what an error means, what breaks them, and where they find a place."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed import learning, ranks
from distributed.actors import member
from distributed.actors.learner import UpdateResult
from distributed.actors.member import GangBroken, Member, Receipt, Seat
from distributed.launcher import ActorLost, ExchangeLost, Launcher, WorkLost
from distributed.learning import Learning, Task
from distributed.ranks import Ranks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
REPLAY_DIED = ActorLost("replay/0: died.")


# Errors


def two_learners(first=None):
    """Two without processes; first: what waits for one of their results."""
    made = Learning(SimpleNamespace(config=None, launcher=SimpleNamespace(first=first)), None)
    made.ranks.handles = [None, None]
    return made


def task(outcomes):
    return Task([1, 2], [3, 4], [5, 6], 2, 0, outcomes)


@pytest.mark.parametrize(
    ("outcomes", "expected", "broken"),
    [
        ([ActorLost("learner/0: died."), ExchangeLost("learner/1: closed")], "learner/0: died", True),
        ([ExchangeLost("learner/0: closed"), ActorLost("learner/1: died.")], "learner/1: died", True),
        ([RuntimeError("closed, in words of a later torch"), ActorLost("learner/1: died.")], "learner/1: died", True),
        ([WorkLost("replay"), WorkLost("replay")], "replay", False),  # nobody learned anything
        ([WorkLost("replay"), ExchangeLost("learner/1: closed")], "learner/1: closed", True),
        ([ExchangeLost("closed"), FloatingPointError("NaN")], "NaN", True),
        ([Receipt(20, 4, "a"), Receipt(20, 4, "b")], r"learner/1 differs .* digest='b'\) against .* digest='a'", True),
        ([Receipt(20, 4, "a"), Receipt(22, 4, "a")], "learner/1 differs from learner/0", True),
        ([Receipt(20, 4, None), Receipt(20, 4, None)], None, False),
    ],
)
def test_what_leaves_learners_apart_breaks_the_gang(outcomes, expected, broken):
    made = two_learners()
    results = [UpdateResult({}, 2, 0.1, 0.0, None, each) if isinstance(each, Receipt) else each for each in outcomes]
    if expected is None:
        assert made._results(task(dict(enumerate(results)))) == results
    else:
        with pytest.raises(Exception, match=expected):
            made._results(task(dict(enumerate(results))))
    assert made.ranks.broken == broken


def test_a_gang_that_broke_stays_broken_when_replay_is_lost_meanwhile():
    def replay_dies(*_):
        raise REPLAY_DIED

    made = two_learners(replay_dies)
    lost = WorkLost("replay/0")
    made.tasks += [task({1: ExchangeLost("learner/1: closed")}), task({0: lost, 1: lost})]
    with pytest.raises(ActorLost, match="replay/0: died"):
        made.take_oldest()
    assert made.ranks.broken  # learner/0 may have learned what learner/1 did not
    made.abandon()
    assert made.ranks.broken
    assert not made.tasks


def test_a_learner_that_is_silent_after_the_other_failed_is_named():
    waits = []

    def nobody(left, who, seconds):
        waits.append((left, who, seconds))
        return []

    made = two_learners(nobody)
    with pytest.raises(ExchangeLost, match="learner/1: timed out No result came from learner/0"):
        made._results(task({1: ExchangeLost("learner/1: timed out")}))
    assert waits == [([1], "learner/0", learning.STRAGGLER_SECONDS)]
    assert made.ranks.broken


def test_learners_that_fail_alike_after_a_wait_live_on():
    given = task({0: WorkLost("replay/0")})

    def the_other_fails_too(left, who, seconds):
        given.outcomes[1] = WorkLost("replay/0")
        return left

    made = two_learners(the_other_fails_too)
    with pytest.raises(WorkLost):
        made._results(given)
    assert not made.ranks.broken


def test_those_that_gave_no_answer_are_named(monkeypatch):
    launcher, ready = Launcher("run"), [["first"], []]
    monkeypatch.setattr(launcher, "first", lambda references, who, seconds: ready.pop(0))
    monkeypatch.setattr("distributed.launcher.result_of", lambda reference, who: None)
    with pytest.raises(ActorLost, match=r"^learner/1: no answer within 3 s"):
        launcher.all(["first", "second"], ["learner/0", "learner/1"], 3.0)


def meet(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    dist.all_reduce(torch.zeros(1))


def leave_after_one(_, file):
    meet(1, file)
    os.kill(os.getpid(), signal.SIGKILL)


def wait_after_one(_, file):
    meet(1, file)
    time.sleep(60)


@pytest.mark.parametrize(("other", "bound"), [(leave_after_one, 60.0), (wait_after_one, 0.5)])
def test_an_exchange_that_fails_is_told_from_other_errors(other, bound, tmp_path):
    here = Member("learner/0")
    here._seat = Seat(0, 2, "", 0, "gloo", bound, 60.0)
    process = mp.spawn(other, args=(tmp_path / "meet",), join=False)
    try:
        meet(0, tmp_path / "meet")
        here.prepared()
        begun = time.monotonic()
        with pytest.raises(RuntimeError) as failed:
            dist.all_reduce(torch.zeros(1))
        assert time.monotonic() - begun < 30
    finally:
        process.processes[0].kill()
        dist.destroy_process_group()
    told = here.explain(failed.value)
    assert isinstance(told, GangBroken)
    assert str(told).startswith("learner/0 could not exchange with the others: ")
    assert here.explain(RuntimeError("shapes differ")) is None


def test_a_learner_that_cannot_join_says_what_must_be_open(monkeypatch):
    monkeypatch.setattr(member, "JOIN_SECONDS", 1.0)
    monkeypatch.setattr(member.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(member, "_use_interface_of", lambda address: None)
    with pytest.raises(GangBroken, match=r"learner/1 could not join .* ports must be open .* GLOO_SOCKET_IFNAME"):
        Member("learner/1").join(Seat(1, 2, "127.0.0.1", 1, "gloo", 60.0, 60.0))


def test_a_learner_that_can_open_no_port_says_at_which_address(monkeypatch):
    monkeypatch.setattr(member.ray.util, "get_node_ip_address", lambda: "192.0.2.1")  # of nobody
    monkeypatch.setattr(member, "JOIN_SECONDS", 1.0)
    with pytest.raises(GangBroken, match=r"learner/0 could not open a port at 192\.0\.2\.1, its node's address in Ray"):
        Member("learner/0").host()


# Places


def placed(nodes, monkeypatch, learners=2, env_actors=4):
    """Ranks that were lost in a cluster that now has nodes of so many CPUs, of which each process had one."""
    shares = SimpleNamespace(cpus=1.0, gpus=0.0, processes=learners + env_actors, learners=learners)
    made = Ranks(SimpleNamespace(shares=shares, spec=SimpleNamespace(batch_size=8), launcher=None))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in nodes])
    return made


@pytest.mark.parametrize(
    ("nodes", "wanted", "expected"), [([2.0, 2.0], 2, 0), ([2.0, 4.0], 2, 2), ([7.0, 0.0], 4, 2), ([9.0], 4, 4)]
)
def test_learners_that_start_again_leave_room_for_all_env_actors(nodes, wanted, expected, monkeypatch):
    made = placed(nodes, monkeypatch)
    monkeypatch.setattr(made, "_reserve", lambda size, seconds: True)
    assert made._find_place(wanted, again=True) == expected


@pytest.mark.parametrize(
    ("nodes", "free", "expected"),
    [
        ([2.0, 2.0], [1.0, 0.0], 0.0),
        ([3.0, 2.0], [0.0, 1.5], 1.0),
        ([3.0, 2.0], [0.0, 0.304], 0.3),
        ([5.0], [0.0], 0.0),
    ],
)
def test_one_learner_alone_asks_for_cpus_that_nobody_else_needs(nodes, free, expected, monkeypatch):
    made = placed(nodes, monkeypatch)
    monkeypatch.setattr(ranks, "free_cpus_by_node", lambda: free)
    assert made._cpus_that_are_left() == expected


def test_a_place_that_is_not_waited_for_to_the_end_is_given_back(monkeypatch):
    made, removed = placed([2.0], monkeypatch), []

    def replay_dies():
        raise REPLAY_DIED

    made._state.launcher = SimpleNamespace(between=replay_dies)
    group = SimpleNamespace(wait=lambda seconds: False)
    monkeypatch.setattr(ranks, "placement_group", lambda bundles, strategy: group)
    monkeypatch.setattr(ranks, "remove_placement_group", removed.append)
    with pytest.raises(ActorLost):
        made._placed(2, "PACK", 30.0)
    made.end()
    assert removed == [group]


def test_learners_of_which_one_is_lost_while_they_load_are_broken():
    def one_dies(references, names, seconds=None):
        raise ActorLost("learner/1: died.")

    made = Ranks(SimpleNamespace(launcher=SimpleNamespace(all=one_dies)))
    made.handles = [SimpleNamespace(load=SimpleNamespace(remote=lambda checkpoint: None))] * 2
    with pytest.raises(ActorLost):
        made.load("step-300")
    assert made.broken
