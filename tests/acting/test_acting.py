"""Acting backends: batches, acting states that never mix, and both backends acting alike."""

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.run_configs import TINY_AGENT, TINY_DREAMER
from worldloom import create_agent
from worldloom.acting.evaluation import evaluate, record_episode
from worldloom.acting.local import LocalActing
from worldloom.acting.rollout import Acted, ActingLost, Lane, Rollout
from worldloom.acting.server import ActingServer, Client
from worldloom.envs import make_env
from worldloom.families import agent_from_description
from worldloom.replay.buffer import ReplayBuffer
from worldloom.types import ColumnSpec, Weights, WindowSpec


class Summing:
    """An agent whose action is the sum of its environment's observations since is_first: state that must not mix."""

    columns = {"sum": ColumnSpec((1,), "float32")}  # noqa: RUF012

    def __init__(self, delay=0.0):
        self.delay, self.batches, self.loaded = delay, [], []
        self.acting_generator = torch.Generator()

    def act(self, obs, act_state, is_first, explore=True):
        time.sleep(self.delay)
        if (obs < 0).any():
            raise ValueError("observations must not be negative")
        self.batches.append(len(obs))
        before = torch.zeros(len(obs), 1) if act_state is None else act_state["sum"]
        total = before * ~torch.as_tensor(is_first)[:, None] + torch.as_tensor(obs[:, :1])
        return total.numpy(), {"sum": total}

    def replay_columns(self, act_state):
        return {"sum": act_state["sum"].numpy()}

    def load_acting_weights(self, flat):
        self.loaded.append(float(flat[0]))


@pytest.fixture
def serve():
    servers = []

    def start(agent, rows, deadline):
        servers.append(ActingServer(lambda: agent, rows, deadline))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server, client, values, first=False):
    obs = np.array(values, np.float32)[:, None]
    return server.act(client, {"obs": obs}, np.full(len(values), first)).actions[:, 0].tolist()


def test_many_clients_that_die_and_come_back_never_mix_their_states(serve):
    server, failures = serve(Summing(delay=0.0005), rows=6, deadline=0.002), []

    def live(actor):
        rng = random.Random(actor)
        for incarnation in range(5):
            expected = np.zeros(actor + 1)
            for step in range(rng.randrange(5, 40)):  # then it dies; the next one starts without saying is_first
                values = [rng.randrange(100) + 1000 * actor for _ in range(actor + 1)]
                ends = step > 0 and rng.random() < 0.2
                expected = np.array(values, float) + (0 if ends else expected)
                got = ask(server, Client(actor, 0, incarnation, 0), values, first=ends)
                if got != expected.tolist():
                    failures.append((actor, incarnation, step, got, expected))

    threads = [threading.Thread(target=live, args=(actor,)) for actor in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures, failures[0]
    assert len(server._states) == 4  # of dead incarnations nothing is kept


def test_a_request_that_was_given_up_starts_its_client_anew(serve):
    server = serve(Summing(), rows=1, deadline=0.0)
    assert ask(server, Client(0, 0, 0, 0), [5], first=True) == [5]
    assert ask(server, Client(0, 0, 0, 0), [2]) == [7]
    assert ask(server, Client(0, 0, 0, 1), [2]) == [2]
    assert ask(server, Client(0, 0, 0, 0), [2]) == [2]  # a late one of before: acted on, not remembered
    assert ask(server, Client(0, 0, 0, 1), [3]) == [5]


def test_a_batch_closes_on_size_without_waiting_for_its_deadline(serve):
    agent = Summing()
    server = serve(agent, rows=5, deadline=600.0)
    answers = {}
    threads = [
        threading.Thread(target=lambda a=actor: answers.update({a: ask(server, Client(a, 0, 0, 0), [a] * (a + 1))}))
        for actor in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {1: [1, 1], 2: [2, 2, 2]}
    assert agent.batches == [5]
    assert server.gauges()["acting/batch_fill"] == 1


def test_a_silent_client_holds_nobody_up(serve):
    agent = Summing()
    server = serve(agent, rows=1000, deadline=0.002)
    for value in range(20):
        ask(server, Client(0, 0, 0, 0), [value])
    assert agent.batches == [1] * 20
    assert server.gauges()["acting/batch_fill"] == pytest.approx(0.001)


def test_what_the_agent_raises_reaches_whoever_asked_and_the_server_goes_on(serve):
    server = serve(Summing(), rows=1, deadline=0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        ask(server, Client(0, 0, 0, 0), [-1])
    assert ask(server, Client(0, 0, 0, 0), [4]) == [4]
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        ask(server, Client(0, 0, 0, 0), [4])


def test_weights_are_taken_up_between_batches_and_never_go_back(serve):
    agent = Summing()
    server = serve(agent, rows=1, deadline=0.0)
    obs = {"obs": np.zeros((1, 1), np.float32)}
    assert server.act(Client(0, 0, 0, 0), obs, np.ones(1, bool)).version == 0
    server.load(Weights(3, np.array([7.0])))
    assert server.act(Client(0, 0, 0, 0), obs, np.ones(1, bool)).version == 3
    assert agent.loaded == [7.0]
    with pytest.raises(ValueError, match="version 2 came after version 3"):
        server.load(Weights(2, np.array([1.0])))


def evaluate_two(agent, make):
    evaluate(agent, make, episodes=2, seed=0)


def record_one(agent, make):
    record_episode(agent, make(1), rows=5, seed=0)


@pytest.mark.parametrize("play", [evaluate_two, record_one])
def test_ctrl_c_and_errors_close_the_environments_of_an_evaluation(play):
    class Interrupted(Summing):
        def act(self, *args, **kwargs):
            raise KeyboardInterrupt

    closed = []

    def make(count):
        env = make_env("tests.environments:Counting-v0", num_envs=count)
        close = env.close
        env.close = lambda: (closed.append(count), close())
        return env

    with pytest.raises(KeyboardInterrupt):
        play(Interrupted(), make)
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("preset", "fields"), [("tdmpc2:1m", TINY_AGENT), ("dreamerv3:size1m", TINY_DREAMER)], ids=["tdmpc2", "dreamerv3"]
)
def test_a_server_acts_bit_for_bit_like_the_agent_itself(preset, fields, serve):
    env = make_env("tests.environments:Counting-v0", 3, seed=4)
    made = create_agent(preset, env.observation_space, env.action_space, episode_length=7, **fields)
    local = LocalActing(agent_from_description(made.describe(), seed=2))
    served = agent_from_description(made.describe(), seed=2)
    server = serve(served, rows=3, deadline=60.0)
    for each in (local, server):
        each.load(Weights(1, made.acting_weights()))
    local.start(11)
    served.acting_generator.manual_seed(11)
    obs, first = env.reset(), np.ones(3, bool)
    for _ in range(12):
        mine = local.request({"obs": obs}, first)()
        theirs = server.act(Client(0, 0, 0, 0), {"obs": obs}, first)
        np.testing.assert_array_equal(mine.actions, theirs.actions)
        assert mine.columns.keys() == theirs.columns.keys()
        for name in mine.columns:
            np.testing.assert_array_equal(mine.columns[name], theirs.columns[name])
        step = env.step(mine.actions)
        obs, first = step.obs, step.is_first


@pytest.mark.parametrize(
    ("model", "shape"),
    [("dreamerv3:size1m", (3,)), ("tdmpc2:1m", (3,)), ("storm:tiny", (48, 48, 3)), ("diamond:tiny", (16, 16, 3))],
)
def test_an_agent_that_only_acts_makes_no_optimiser(model, shape, monkeypatch):
    image = len(shape) == 3
    space = gym.spaces.Box(0, 255, shape, np.uint8) if image else gym.spaces.Box(-1, 1, shape)
    learner, actor = (create_agent(model, space, gym.spaces.Discrete(3), seed=seed) for seed in range(2))
    learner.configure_learning("float32", compiled=False)
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", lambda *args: pytest.fail("an optimiser was made"))
    actor.load_acting_weights(learner.acting_weights())
    obs = np.zeros((2, *shape[::-1]), space.dtype)
    actor.replay_columns(actor.act(obs, None, np.ones(2, bool))[1])
    assert (actor.windows, actor.columns) == (learner.windows, learner.columns)
    with pytest.raises(pytest.fail.Exception, match="an optimiser was made"):
        actor.configure_learning("float32", compiled=False)


@pytest.mark.parametrize(
    ("preset", "fields"), [("tdmpc2:1m", TINY_AGENT), ("dreamerv3:size1m", TINY_DREAMER)], ids=["tdmpc2", "dreamerv3"]
)
def test_an_evaluation_on_a_server_plays_the_episodes_that_the_agent_plays(preset, fields):
    make = lambda count: make_env("tests.environments:Target-v0", count, 3)  # noqa: E731
    env = make(1)
    made = create_agent(preset, env.observation_space, env.action_space, episode_length=20, **fields)
    server = ActingServer(lambda: agent_from_description(made.describe(), seed=8), rows=1, deadline=0.0)

    class Judge:
        acting_generator = torch.Generator()

        def act(self, obs, act_state, is_first, explore=True):
            assert not explore
            server.load(Weights(3, -made.acting_weights()))  # what others act with changes nothing
            ask(server, Client(0, 0, 0, 0), [0.5])
            return server.act_in_evaluation(obs, is_first), {}

    expected = evaluate(made, make, episodes=6, seed=5)
    for _ in range(2):
        server.begin_evaluation(Weights(1, made.acting_weights()), 5)
        assert evaluate(Judge(), make, episodes=6, seed=5) == expected
    server.close()


def test_an_evaluation_acts_in_one_thread_whoever_asks(serve):
    threads = []

    class Noting(Summing):
        def act(self, *args, **more):
            threads.append(threading.get_ident())
            return super().act(*args, **more)

    server = serve(Noting(), rows=1, deadline=0.0)
    server.begin_evaluation(Weights(1, np.zeros(1, np.float32)), 5)
    obs, is_first = np.zeros((1, 1), np.float32), np.array([True])
    with contextlib.ExitStack() as held:
        for asking in [held.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]:
            asking.submit(server.act_in_evaluation, obs, is_first).result()
    assert len(threads) == 3
    assert len(set(threads)) == 1


# Lanes


class Asked:
    """An Acting that answers obs[0] / 100 late, writes down the order of things, and fails when told to."""

    columns = {"mark": ColumnSpec((1,), "float32")}  # noqa: RUF012

    def __init__(self, name, log, lose=()):
        self.name, self.log, self.lose, self.asked = name, log, set(lose), 0

    def start(self, seed):
        pass

    def request(self, obs, is_first):
        self.log.append(f"ask {self.name}")
        self.asked += 1
        lost = self.asked in self.lose

        def answer():
            self.log.append(f"answer {self.name}")
            if lost:
                raise ActingLost("gone")
            return Acted(obs["obs"][:, :1] / 100, {"mark": obs["obs"][:, :1] + 0.5}, self.asked)

        return answer


def rollout_of(*actings, envs=2):
    lanes = [Lane(make_env("tests.environments:Counting-v0", envs, seed=i), acting) for i, acting in enumerate(actings)]
    return Rollout(lanes, seed=0)


def check_rows(chunks, envs):
    """The time alignment, end to end, as in `tests/replay/test_replay.py`."""
    windows = WindowSpec(length=8, context=0, crosses_episodes=False)
    replay = ReplayBuffer(5000, (3,), 1, windows=windows, columns=Asked.columns)
    for chunk in chunks:
        assert len(chunk.lengths) == envs
        replay.insert(chunk)
    batch = replay.draw(500)
    count = batch["obs"][..., 0]
    np.testing.assert_array_equal(count, np.broadcast_to(np.arange(8.0), (500, 8)))
    np.testing.assert_array_equal(batch["rewards"], 10 * count)
    np.testing.assert_allclose(batch["actions"][:, 1:, 0], (count[:, 1:] - 1) / 100, rtol=1e-6)
    np.testing.assert_array_equal(batch["mark"][:, :-1, 0], count[:, :-1] + 0.5)


def test_one_lane_steps_while_the_other_waits_for_its_actions():
    log = []
    rollout = rollout_of(Asked("a", log), Asked("b", log))
    rollout.collect(3)
    assert log == ["ask a", "ask b", *["answer a", "ask a", "answer b", "ask b"] * 2, "answer a", "answer b"]


def test_lanes_make_one_chunk_with_the_oldest_version_that_acted():
    rollout = rollout_of(Asked("a", []), Asked("b", []))
    chunks = [rollout.collect(5) for _ in range(8)]
    assert [chunk.info.version for chunk in chunks] == [1 + 5 * n for n in range(8)]
    assert [chunk.info.key.sequence for chunk in chunks] == list(range(8))
    assert sum(chunk.info.steps for chunk in chunks) == 8 * 5 * 4 - 4
    check_rows(chunks, envs=4)


def test_a_backend_that_is_lost_ends_the_chunk_and_loses_no_step():
    rollout = rollout_of(Asked("a", [], lose=[3, 11]), Asked("b", [], lose=[20]))
    chunks = [rollout.collect(5) for _ in range(9)]
    lost = [chunk.info.acting_lost for chunk in chunks]
    assert lost.count("gone") == 3
    assert set(lost) == {"gone", ""}
    assert chunks[0].info.steps < 5 * 4 - 4
    check_rows(chunks, envs=4)


def test_a_chunk_ends_early_when_it_is_told_to_and_after_its_time():
    rollout = rollout_of(Asked("a", []))
    assert rollout.collect(50, stop=lambda: True).lengths == (1, 1)
    assert len(rollout.collect(50, seconds=-1.0).lengths) == 2
    random_one = rollout.collect(4, random=True)
    assert random_one.info.version is None
    assert not random_one.columns["mark"][: random_one.lengths[0] - 1].any()


@pytest.mark.parametrize("length", [100, 36_000])
def test_an_episode_travels_in_chunks_of_bounded_size_and_is_one_again_in_replay(length):
    lane = Lane(make_env("tests.environments:Counting-v0", 1), Asked("a", []))
    lane.env._envs[0]._env.unwrapped.length = length
    rollout, replay = Rollout([lane], seed=0), ReplayBuffer(40_000, (3,), 1, columns=Asked.columns)
    largest = 0
    for _ in range(length // 64 + 2):
        chunk = rollout.collect(64)
        largest = max(largest, sum(column.nbytes for column in chunk.columns.values()))
        replay.insert(chunk)
    row = sum(column.nbytes for column in chunk.columns.values()) / len(chunk.columns["rewards"])
    assert largest <= 66 * row  # 64 steps, and one end and start among them
    rows = replay.rows_between(0, length + 1)
    assert np.flatnonzero(rows["is_first"]).tolist() == [0]
    np.testing.assert_array_equal(rows["obs"][:, 0], np.arange(length + 1))
    assert rows["terminated"].sum() == rows["terminated"][-1] == 1
