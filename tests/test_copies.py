"""Agents beside one another in a process: loaded from one another, copied, and given batches made by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.run_configs import TINY_AGENT, TINY_DIAMOND, TINY_DREAMER, TINY_STORM
from worldloom.testing.subject import Subject


def image(size):
    return spaces.Box(0, 255, (3, size, size), np.uint8)


SUBJECTS = {
    "dreamerv3:size1m": Subject("dreamerv3:size1m", image(64), spaces.Discrete(3), TINY_DREAMER),
    "tdmpc2:1m": Subject("tdmpc2:1m", spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), TINY_AGENT),
    "storm:tiny": Subject("storm:tiny", image(64), spaces.Discrete(3), TINY_STORM),
    "diamond:tiny": Subject("diamond:tiny", image(16), spaces.Discrete(3), TINY_DIAMOND),
}
each = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def weights(agent):
    return torch.nn.utils.parameters_to_vector(agent.world_model.parameters())


@each
def test_an_agent_shares_nothing_with_the_one_whose_state_it_loads(subject):
    first = subject.agent()
    batch = subject.batch(first)
    first.update(batch)
    loaded, apart = subject.agent(seed=1), subject.agent(seed=2)
    state = first.state_dict()
    apart.load_state_dict(copy.deepcopy(state))
    loaded.load_state_dict(state)
    first.update(batch)
    loaded.update(batch)
    apart.update(batch)
    assert torch.equal(weights(loaded), weights(apart))


@each
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))], ids=["copy", "pickle"]
)
def test_a_copy_of_an_agent_that_has_learned_learns_on(subject, copied):
    agent = subject.agent()
    batch = subject.batch(agent)
    agent.update(batch)
    again = copied(agent)
    agent.update(batch)
    again.update(batch)
    assert torch.equal(weights(agent), weights(again))


@each
def test_an_update_reads_ends_from_continues_where_terminated_is_missing(subject):
    batch = {name: value for name, value in subject.batch(subject.agent()).items() if name != "continues"}
    ends = torch.zeros(batch["rewards"].shape, dtype=torch.bool)
    ends[:, -1] = True
    without = {name: value for name, value in batch.items() if name != "terminated"}
    told, inferred = subject.agent(), subject.agent()
    told.update({**batch, "terminated": ends})
    inferred.update({**without, "continues": 1 - ends.float()})
    assert torch.equal(weights(told), weights(inferred))


@each
def test_what_is_done_to_actions_changes_no_acting_state(subject):
    agent = subject.agent()
    actions, state = agent.act(subject.obs(), None, np.ones(3, bool))
    before = copy.deepcopy(state)
    actions *= 2
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(state[name])) for name in before)


@each
def test_metrics_before_the_first_update_are_empty_of_losses(subject):
    found = subject.agent().collect()
    assert set(found) - {"update_norm"} == {"skipped_updates"}
    assert not any(found.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("preset", ["dreamerv3:size1m", "storm:tiny", "diamond:tiny"])
def test_float_images_of_any_precision_are_read(preset, dtype):
    subject = SUBJECTS[preset]
    features = subject.agent().world_model.encode(torch.rand(2, *subject.observation_space.shape, dtype=dtype)).features
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
