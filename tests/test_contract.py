"""What the library asks of an agent, on values that break it."""

import numpy as np
import pytest
import torch

from worldloom.contract import ContractBroken, as_floats, check_actions, check_description
from worldloom.types import LatentState


def test_metrics_may_be_floats_or_tensors_of_one_number():
    assert as_floats({"a": 1, "b": torch.tensor(2.5), "c": np.float32(3)}) == {"a": 1.0, "b": 2.5, "c": 3.0}
    for wrong, kind in [("high", "str"), (torch.zeros(2), "Tensor"), (None, "NoneType")]:
        with pytest.raises(ContractBroken, match=f"the metric 'loss' is a {kind}, expected a float"):
            as_floats({"fine": 1.0, "loss": wrong})


@pytest.mark.parametrize(
    ("actions", "classes", "sentence"),
    [
        (np.zeros((1, 3), np.float64), (), r"float64 \(1, 3\), expected a float32 array \(1, 3\)"),
        (np.zeros(3, np.float32), (), r"float32 \(3,\), expected"),
        (torch.zeros(1, 3), (), "act gives Tensor, expected"),
        (np.full((1, 3), 7, np.float32), (), r"expected entries in \[-1, 1\]"),
        (np.full((1, 3), np.nan, np.float32), (), r"expected entries in \[-1, 1\]"),
        (np.array([[1, 1, 0]], np.float32), (3,), r"expected a one-hot for each of \(3,\)"),
        (np.array([[0, 1, 0]], np.float32), (2, 1), r"expected a one-hot for each of \(2, 1\)"),
    ],
)
def test_actions_that_no_environment_takes_are_named(actions, classes, sentence):
    with pytest.raises(ContractBroken, match=sentence):
        check_actions(actions, 1, 3, classes)


def test_actions_one_hot_in_range_or_normal_around_it_pass():
    assert check_actions(np.array([[0, 1, 1]], np.float32), 1, 3, (2, 1)) == 1
    assert check_actions(np.array([[-1, 0.5, 2.5]], np.float32), 1, 3, ()) == 2.5


def test_descriptions_hold_jsons_types_and_every_key():
    whole = {"family": "x", "obs_shape": [3], "action_dim": 1, "episode_length": None, "config": {}}
    check_description(whole)
    for broken, sentence in [
        ({**whole, "obs_shape": (3,)}, "make tuples lists"),
        ({**whole, "config": {"f": torch.nn.ReLU()}}, "holds more than JSON's types"),
        ({name: value for name, value in whole.items() if name != "config"}, r"describe\(\) lacks config"),
        ([], "gives a list, expected a dict"),
    ]:
        with pytest.raises(ContractBroken, match=sentence):
            check_description(broken)


def test_a_state_takes_its_memory_along():
    memory = {"tokens": torch.ones(2, 3, 4, requires_grad=True) * 2, "filled": torch.tensor([1, 3])}
    state = LatentState(torch.zeros(2, 5), memory=memory)
    assert state.detach().memory["tokens"].grad_fn is None
    assert state.memory["tokens"].grad_fn is not None
    moved = state.to("meta")
    assert {name: (part.device.type, part.dtype) for name, part in moved.memory.items()} == {
        "tokens": ("meta", torch.float32),
        "filled": ("meta", torch.int64),
    }
    assert state.features.shape == (2, 5)
