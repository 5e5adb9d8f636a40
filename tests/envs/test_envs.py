import signal

import gymnasium
import numpy as np
import pytest

from tests import environments  # noqa: F401 - registers the test environments
from worldloom.envs import Environment, EnvironmentFailed, VectorEnv, make_env
from worldloom.envs.vector import guarded
from worldloom.interrupt import GracefulStop, StopAtOnce
from worldloom.spaces import ObservationCodec, observation_classes, observation_columns, resize_image
from worldloom.types import ColumnSpec


def counting(action_repeat=1, **kwargs):
    return Environment(gymnasium.make("Counting-v0", disable_env_checker=True, **kwargs), action_repeat)


def test_actions_are_rescaled_to_the_bounds_and_clipped():
    env = counting()
    env.reset(seed=0)
    assert [env.step(np.array([a], np.float32))[0][1] for a in (-1, 0, 0.5, 1, 3)] == [-2, 0, 1, 2, 2]


def test_action_repeat_sums_rewards_and_stops_at_the_end():
    env = counting(action_repeat=3)
    env.reset(seed=0)
    results = [env.step(np.zeros(1, np.float32)) for _ in range(3)]
    assert [reward for _, reward, _, _ in results] == [60, 150, 70]  # 10+20+30, 40+50+60, 70
    assert [terminated for _, _, terminated, _ in results] == [False, False, True]


def test_episode_length_counts_agent_steps():
    assert make_env("Pendulum-v1", action_repeat=3).episode_length == 67


def test_images_become_channel_first_and_discrete_actions_one_hot():
    env = make_env("tests.environments:Picture-v0")
    assert env.observation_space.shape == (3, 8, 6)
    assert env.observation_space.dtype == np.uint8
    assert env.action_classes == (4,)
    assert env.action_dim == 4
    obs = env.reset()
    step = env.step(np.eye(4, dtype=np.float32)[[2]])
    assert obs.shape == (1, 3, 8, 6)
    assert step.obs[0, 0].max() == step.obs[0, 0].min() == 1
    assert (step.obs[0, 2] == 5).all()  # the environment's own action: 3 + 2
    assert step.rewards[0] == 5


def test_mappings_keep_their_kinds_and_choices_become_one_hots():
    env = make_env("tests.environments:Mixed-v0", num_envs=2)
    assert observation_columns(env.observation_space) == {
        "obs/camera": ColumnSpec((3, 64, 64), "uint8"),
        "obs/phase": ColumnSpec((), "int32"),
        "obs/state": ColumnSpec((4,), "float32"),
        "obs/touch": ColumnSpec((2,), "int32"),
    }
    assert observation_classes(env.observation_space) == {"phase": 7, "touch": 2}
    assert env.action_classes == (2, 3)
    assert env.action_dim == 5
    obs = env.reset()
    assert obs["phase"].tolist() == [0, 0]
    step = env.step(np.array([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]], np.float32))
    assert step.rewards.tolist() == [12, 1]
    assert step.obs["camera"].shape == (2, 3, 64, 64)
    assert step.obs["state"].tolist() == [[1.5] * 4] * 2
    assert step.obs["phase"].tolist() == [1, 1]
    assert step.obs["touch"].tolist() == [[1, 1]] * 2


def test_stacked_frames_are_the_last_ones_and_begin_anew_with_each_episode():
    env = make_env("tests.environments:Picture-v0", frame_stack=3)
    assert env.observation_space.shape == (9, 8, 6)
    assert env.reset()[0, ::3, 0, 0].tolist() == [0, 0, 0]
    seen = [env.step(np.eye(4, dtype=np.float32)[[0]]) for _ in range(5)]
    assert [step.final_obs[0, ::3, 0, 0].tolist() for step in seen] == [
        [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5],
    ]  # fmt: skip
    assert seen[-1].obs[0, ::3, 0, 0].tolist() == [0, 0, 0]
    mixed = make_env("tests.environments:Mixed-v0", frame_stack=2)
    assert mixed.observation_space["camera"].shape == (6, 64, 64)
    assert mixed.reset()["camera"].shape == (1, 6, 64, 64)
    with pytest.raises(ValueError, match="Pendulum-v1 shows no images"):
        make_env("Pendulum-v1", frame_stack=2)


def test_a_mapping_that_lacks_a_key_names_what_was_expected():
    space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2), "b": gymnasium.spaces.Discrete(2)})
    read = ObservationCodec("Task-v0", space)
    with pytest.raises(ValueError, match=r"Task-v0 gave an observation with \['a'\], expected \['a', 'b'\]"):
        read({"a": 0})
    with pytest.raises(ValueError, match=r"observation 'b' came as 2, expected one of 2 classes"):
        read({"a": 0, "b": 2})
    with pytest.raises(TypeError, match=r"observation 'c' is Dict.*FlattenObservation"):
        ObservationCodec("Task-v0", gymnasium.spaces.Dict({"c": space}))


def test_true_ends_and_time_limits_stay_apart():
    for true_end in (True, False):
        env = VectorEnv(lambda end=true_end: counting(length=2, true_end=end), num_envs=2, seed=0)
        env.reset()
        env.step(np.zeros((2, 1), np.float32))
        step = env.step(np.zeros((2, 1), np.float32))
        assert step.terminated.tolist() == [true_end] * 2
        assert step.truncated.tolist() == [not true_end] * 2
        assert step.final_obs[:, 0].tolist() == [2, 2]
        assert step.obs[:, 0].tolist() == [0, 0]


def test_seeds_differ_between_environments_and_repeat_between_runs():
    def tags(seed):
        env = VectorEnv(counting, num_envs=3, seed=seed)
        return [*env.reset()[:, 2], *env.reset()[:, 2]]

    assert tags(1) == tags(1)
    assert tags(1) != tags(2)
    assert len(set(tags(1))) == 6


def test_a_failing_environment_is_rebuilt_in_place():
    make = lambda: Environment(gymnasium.make("Faulty-v0", period=5, length=100, disable_env_checker=True))  # noqa: E731
    env = VectorEnv(make, num_envs=1, seed=0)
    env.reset()
    steps = [env.step(np.zeros((1, 1), np.float32)) for _ in range(6)]
    assert [bool(step.failed[0]) for step in steps] == [False] * 4 + [True, False]
    assert steps[4].obs[0, 0] == 0
    assert steps[5].obs[0, 0] == 1
    assert env.failures == 1


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("raise", "the simulator exploded"),
        ("exit", "SystemExit: no licence"),
        ("interrupt", "the environment raised KeyboardInterrupt"),
        ("nan", r"NaN or infinity at entries \[1\]"),
        ("shape", r"shape \(2,\), expected \(3,\)"),
        ("reward", "reward inf, expected a finite number"),
        ("huge", r"reward 1e\+39, expected a finite number"),
    ],
)
def test_an_environment_that_always_fails_ends_the_run_with_its_own_error(kind, message):
    make = lambda: Environment(gymnasium.make("Broken-v0", kind=kind, disable_env_checker=True))  # noqa: E731
    env = VectorEnv(make, num_envs=1, seed=0)
    env.reset()

    def run():
        for _ in range(20):
            env.step(np.zeros((1, 1), np.float32))

    with GracefulStop(), pytest.raises(EnvironmentFailed, match=message) as failure:
        run()
    expected = {"raise": RuntimeError, "interrupt": RuntimeError, "exit": SystemExit}.get(kind, ValueError)
    assert type(failure.value.__cause__) is expected


def test_ctrl_c_within_an_environment_is_not_its_failure():
    broken = Environment(gymnasium.make("Broken-v0", kind="interrupt", disable_env_checker=True))
    env = VectorEnv(lambda: broken, num_envs=1, seed=0)
    env.reset()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process of pytest-xdist has not
    try:
        with pytest.raises(KeyboardInterrupt):  # without a handler of ours, it may be the user's
            env.step(np.zeros((1, 1), np.float32))
    finally:
        signal.signal(signal.SIGINT, before)
    with GracefulStop() as stop:
        stop.requested = True
        with pytest.raises(StopAtOnce):
            guarded(signal.raise_signal, signal.SIGINT)
    assert env.failures == 0


def test_a_constructor_that_fails_once_in_a_rebuild_is_tried_again():
    made = []

    def make():
        made.append(len(made))
        if len(made) == 2:
            raise OSError("the port is still in use")
        return Environment(gymnasium.make("Faulty-v0", period=5, length=100, disable_env_checker=True))

    env = VectorEnv(make, num_envs=1, seed=0)
    env.reset()
    for _ in range(6):
        env.step(np.zeros((1, 1), np.float32))
    assert made == [0, 1, 2]
    assert env.failures == 2
    assert "the port is still in use" in env.last_failure


def test_wrong_actions_and_names_are_refused():
    env = make_env("Pendulum-v1", num_envs=2)
    env.reset()
    with pytest.raises(ValueError, match=r"actions are \(2, 3\), expected \(2, 1\)"):
        env.step(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"Did you mean.*Pendulum-v1"):
        make_env("Pendulun-v1")
    with pytest.raises(ValueError, match=r"cannot be imported.*no_such_module"):
        make_env("no_such_module:Thing-v0")
    with pytest.raises(TypeError, match=r"the observation is Tuple.*expected numbers"):
        make_env("Blackjack-v1")


# Environments by factory, images of another size


def test_a_function_or_class_makes_the_environment():
    for name in ("tests.environments:screen", "tests.environments:Screen"):
        env = make_env(name, num_envs=2, render_mode="rgb_array")
        env.reset()
        assert env.observation_space.shape == (3, 64, 64)
        step = env.step(np.eye(2, dtype=np.float32))
        assert step.rewards.tolist() == [0, 1]
        assert (env.render() == 20).all()
        assert env.frames_per_second == 20
    assert make_env("tests.environments:Screen", action_repeat=2).frames_per_second == 10


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("tests.environments:no_environment", TypeError, "returned a int, expected a gymnasium.Env"),
        ("tests.environments:absent", ValueError, "has no function or class 'absent'"),
        ("tests.environments:os", ValueError, "has no function or class 'os'"),
        ("absent_module:make", ValueError, "cannot be imported"),
    ],
)
def test_factories_that_are_none_are_refused(name, error, words):
    with pytest.raises(error, match=words):
        make_env(name)


def test_images_are_resized_on_request():
    env = make_env("tests.environments:Picture-v0", image_size=16, frame_stack=2)  # 8 x 6, channels last
    assert env.observation_space.shape == (6, 16, 16)
    env.reset()
    step = env.step(np.eye(4, dtype=np.float32)[:1])
    newest = step.obs[0, 3:]
    assert (newest[:2] == 1).all()
    assert (newest[2] == 3).all()
    assert (step.obs[0, :3] == 0).all()
    mixed = make_env("tests.environments:Mixed-v0", image_size=32).observation_space
    assert mixed["camera"].shape == (3, 32, 32)
    assert mixed["state"].shape == (4,)
    assert make_env("tests.environments:Screen-v0", image_size=64).observation_space.shape == (3, 64, 64)
    with pytest.raises(ValueError, match="env.image_size is 0"):
        make_env("tests.environments:Screen-v0", image_size=0)


def test_resized_images_keep_their_mean_and_their_place():
    image = np.zeros((1, 8, 8), np.uint8)
    image[:, :4] = 200
    small = resize_image(image, 4)
    assert small.dtype == np.uint8
    assert abs(small.mean() - 100) < 1
    assert (small[0, 0] > 190).all()
    assert (small[0, -1] < 10).all()


@pytest.mark.parametrize(
    ("shape", "stacked"),
    [((16, 16, 3), (18, 16, 16)), ((3, 16, 16), (18, 16, 16)), ((8, 8, 9), (54, 8, 8))],
)
def test_a_stack_of_many_small_frames_stays_channel_first(shape, stacked):
    codec = ObservationCodec("x", gymnasium.spaces.Box(0, 255, shape, np.uint8), frame_stack=6)
    assert codec.space.shape == stacked
    assert observation_columns(codec.space)["obs"].shape == stacked


@pytest.mark.parametrize("name", ["tests.envs.test_envs:Silent", "tests.envs.test_envs:silent"])
def test_an_environment_that_renders_nothing_says_what_is_missing(name):
    env = make_env(name, render_mode="rgb_array")
    env.reset()
    with pytest.raises(ValueError, match=r"renders no frames. Let its class or factory take render_mode='rgb_array'"):
        env.render()


class Silent(gymnasium.Env):
    """Has no render(), as a first environment often does."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), float(action[0]), False, False, {}


def silent():
    """Make an environment whose render() returns None, since the factory drops render_mode."""
    return gymnasium.make("CartPole-v1")


def test_a_factory_of_any_arguments_is_told_the_render_mode():
    env = make_env("tests.envs.test_envs:whatever", render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (400, 600, 3)
    env.close()


def whatever(**arguments):
    return gymnasium.make("CartPole-v1", **arguments)
