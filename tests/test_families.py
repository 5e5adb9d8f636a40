"""Models by name."""

import dataclasses

import pytest
import torch

from worldloom import create_world_model, get_config, get_model_info, list_models
from worldloom.dreamerv3 import DreamerV3Config
from worldloom.families import FAMILIES
from worldloom.tdmpc2 import TDMPC2Config


def test_presets_are_listed_with_what_they_are():
    presets = list_models()
    for size in ("size12m", "size25m", "size50m", "size100m", "size200m"):
        assert f"dreamerv3:{size}" in presets
    for size in ("5m", "19m", "48m", "317m"):
        assert f"tdmpc2:{size}" in presets
    verbose = list_models(verbose=True)
    assert list(verbose) == presets
    assert verbose["dreamerv3:size12m"]["default_obs"] == "image"
    assert verbose["tdmpc2:317m"]["parameters"] == "317M"
    assert all(info.keys() == {"description", "family", "parameters", "default_obs"} for info in verbose.values())


SMALL = ("dreamerv3:size1m", "tdmpc2:1m", "storm:tiny", "diamond:tiny")


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in list_models()]
)
def test_the_quick_starts_five_lines_are_those_of_every_preset(preset):
    shape = (3, 64, 64) if get_model_info(preset)["default_obs"] == "image" else (39,)
    model = create_world_model(preset, obs_shape=shape, action_dim=4)
    trajectory = model.imagine(model.encode(torch.rand(1, *shape)), torch.rand(15, 1, 4) * 2 - 1)
    assert list(trajectory.rewards.shape) == [15, 1, 1]


def test_every_family_has_a_small_preset_in_these_tests():
    assert {name.partition(":")[0] for name in SMALL} == set(FAMILIES)


@pytest.mark.parametrize(
    ("alias", "preset"),
    [
        ("dreamer", "dreamerv3:size12m"), ("dreamerv3", "dreamerv3:size12m"), ("dreamer-small", "dreamerv3:size12m"),
        ("dreamer-medium", "dreamerv3:size50m"), ("dreamer-large", "dreamerv3:size200m"), ("tdmpc", "tdmpc2:5m"),
        ("tdmpc2", "tdmpc2:5m"), ("tdmpc-small", "tdmpc2:5m"), ("tdmpc-medium", "tdmpc2:48m"),
        ("tdmpc-large", "tdmpc2:317m"),
    ],
)  # fmt: skip
def test_aliases_mean_their_presets(alias, preset):
    assert get_config(alias) == get_config(preset)
    assert get_model_info(alias) == list_models(verbose=True)[preset]


def test_configs_take_overrides():
    assert get_config("tdmpc2:5m") == TDMPC2Config()
    assert get_config("tdmpc", num_samples=256) == dataclasses.replace(TDMPC2Config(), num_samples=256)
    assert isinstance(get_config("dreamer"), DreamerV3Config)
    with pytest.raises(ValueError, match="agent.num_sample is not a field of TDMPC2Config. Did you mean 'num_samples'"):
        get_config("tdmpc", num_sample=256)


@pytest.mark.parametrize("ask", [get_config, get_model_info, lambda name: create_world_model(name, (3,), 1)])
def test_unknown_names_list_the_nearest(ask):
    with pytest.raises(ValueError, match="unknown model 'dreamr'. Did you mean dreamer"):
        ask("dreamr")
