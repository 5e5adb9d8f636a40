"""The authors' checkpoint layouts, made here from the published tables of keys, and what must be refused."""

import os
import pickle

import numpy as np
import pytest
import torch

from worldloom import create_world_model, load_agent
from worldloom.tdmpc2 import Task, TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel, load_official, save_official
from worldloom.tdmpc2.tasks import MT30, MT80

SMALL = {"encoder_dim": 16, "mlp_dim": 24, "latent_dim": 32, "num_q": 3}
THREE = (Task("walker-walk", 4), Task("cup-catch", 2), Task("mw-reach", 3, 100))


def model_of(obs=5, action=4, tasks=(), **overrides):
    torch.manual_seed(0)
    config = TDMPC2Config(**{**SMALL, "task_dim": 6 if tasks else 0, **overrides})
    model = TDMPC2WorldModel((obs,), action, config, 500, tasks=tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def layout_c(model, path):
    save_official(model, path)
    return torch.load(path, weights_only=True)["model"]


def layout_b(current):
    """No log_std, masks or _detach; value layers in flat lists."""
    parts = ["weight", "bias", "ln.weight", "ln.bias"]
    names = [f"{layer}.{part}" for layer in range(2) for part in parts] + ["2.weight", "2.bias"]
    dropped = ("log_std", "_action_masks", "_detach", "_Qs", "_target_Qs")
    older = {key: value for key, value in current.items() if not key.startswith(dropped)}
    for theirs, mine in (("_Qs.params", "_Qs.params"), ("_target_Qs.params", "_target_Qs_params")):
        older |= {f"{theirs}.{index}": current[f"{mine}.{name}"] for index, name in enumerate(names)}
    return older


LAYOUT_A = {  # of a two-layer encoder, prefix by prefix
    "_encoder.state.0": "_encoder.state.1", "_encoder.state.0.ln": "_encoder.state.2",
    "_encoder.state.1": "_encoder.state.4", "_encoder.state.1.ln": "_encoder.state.5",
    "_dynamics.0": "_dynamics.0.0", "_dynamics.0.ln": "_dynamics.0.1", "_dynamics.1": "_dynamics.0.3",
    "_dynamics.1.ln": "_dynamics.0.4", "_dynamics.2": "_dynamics.0.6", "_dynamics.2.ln": "_dynamics.1",
    "_reward.0": "_reward.0", "_reward.0.ln": "_reward.1", "_reward.1": "_reward.3", "_reward.1.ln": "_reward.4",
    "_reward.2": "_reward.6", "_pi.0": "_pi.0", "_pi.0.ln": "_pi.1", "_pi.1": "_pi.3", "_pi.1.ln": "_pi.4",
    "_pi.2": "_pi.6",
}  # fmt: skip


def layout_a(current):
    oldest = {}
    for key, value in layout_b(current).items():
        prefix, _, kind = key.rpartition(".")
        oldest[f"{LAYOUT_A[prefix]}.{kind}" if prefix in LAYOUT_A else key] = value
    return oldest


def save(state, path):
    torch.save({"model": state}, path)
    return str(path)


def outputs(model, task=None):
    torch.manual_seed(1)
    z = model.latent(torch.randn(7, *model.obs_shape) * 3, task)
    action, noise = torch.rand(7, model.action_dim) * 2 - 1, torch.randn(7, model.action_dim)
    sample = model.policy.sample(z, noise, model.action_mask(task))
    return [
        z, model.next_latent(z, action), model.predict_reward(z, action), model.values(z, action), sample.action,
        sample.mean_action, sample.log_std, sample.scaled_entropy, model.terminates(z),
        model.target_q(torch.cat([z, action], -1)),
    ]  # fmt: skip


def assert_same(a, b, task=None):
    for x, y in zip(outputs(a, task), outputs(b, task), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("episodic", [False, True])
def test_layout_c_round_trip_is_bit_exact_and_has_the_published_keys(episodic, tmp_path):
    model = model_of(episodic=episodic)
    current = layout_c(model, tmp_path / "c.pt")
    assert len(current) == (88 if episodic else 78)
    assert current["log_std_dif"].dtype == torch.int64
    assert current["_Qs.params.__batch_size"] == torch.Size([3])
    loaded = create_world_model(tmp_path / "c.pt", obs_shape=(5,), action_dim=4)
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_layouts_b_and_a_load_to_the_same_outputs(tmp_path):
    model = model_of()
    current = layout_c(model, tmp_path / "c.pt")
    assert len(layout_b(current)) == len(layout_a(current)) == 60
    assert_same(model, load_official(save(layout_b(current), tmp_path / "b.pt")))
    oldest = load_official(save(layout_a(current), tmp_path / "a.pt"))
    assert oldest.config.symlog_obs
    assert_same(model_of(symlog_obs=True), oldest)
    with pytest.raises(ValueError, match="symlog"):
        save_official(oldest, tmp_path / "no.pt")


def test_a_bare_state_dict_loads_and_duplicates_of_late_2024_are_ignored(tmp_path):
    model = model_of()
    current = layout_c(model, tmp_path / "c.pt")
    torch.save(current, tmp_path / "bare.pt")
    assert_same(model, load_official(tmp_path / "bare.pt"))
    twice = {k.replace("_detach_Qs_params.", "_detach_Qs.params."): v for k, v in current.items()} | current
    assert_same(model, load_official(save(twice, tmp_path / "twice.pt")))


def test_detached_values_win_where_the_two_differ(tmp_path):
    model = model_of()
    current = layout_c(model, tmp_path / "c.pt")
    own = {k: v + 1 if k.startswith("_Qs.params.") and isinstance(v, torch.Tensor) else v for k, v in current.items()}
    assert_same(model, load_official(save(own, tmp_path / "differ.pt")))


def test_multi_task_files_keep_tasks_and_masks(tmp_path):
    model, task = model_of(tasks=THREE), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    current = layout_c(model, tmp_path / "c.pt")
    assert len(current) == 80
    assert_same(model, load_official(tmp_path / "c.pt", tasks=THREE), task)
    assert_same(model, load_official(save(layout_b(current), tmp_path / "b.pt"), tasks=THREE), task)
    assert [model.task_embedding.discounts[i].item() for i in (0, 2)] == pytest.approx([0.99, 0.95])
    assert load_agent(tmp_path / "c.pt", tasks=THREE).world_model.tasks == THREE
    with pytest.raises(ValueError, match="tasks is 'mt31', expected mt30 or mt80"):
        create_world_model(tmp_path / "c.pt", tasks="mt31")
    with pytest.raises(ValueError, match=r"knows 3 tasks, which are not mt30, mt80 or MMBench"):
        load_official(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="masks actions differently"):
        load_official(tmp_path / "c.pt", tasks=(*THREE[:2], Task("other", 4)))


def test_the_task_lists_are_the_published_ones():
    assert (len(MT30), len(MT80)) == (30, 80)
    assert MT80[:30] == MT30
    named = {task.name: task.action_dim for task in MT80}
    assert [named[n] for n in ("walker-run", "fish-swim", "reacher-three-hard", "reacher-hard", "mw-sweep")] == [
        6, 5, 3, 2, 4,
    ]  # fmt: skip
    assert (MT30[17].name, MT80[30].name, MT80[79].name) == ("hopper-stand", "mw-assembly", "mw-hand-insert")


def test_an_mt30_file_loads_by_itself_and_acts(tmp_path):
    model = model_of(obs=24, action=6, tasks=MT30)
    save_official(model, tmp_path / "mt30.pt")
    agent = load_agent(tmp_path / "mt30.pt")
    actions, _ = agent.act(np.zeros((2, 24), np.float32), None, np.ones(2, bool), explore=True, task=np.array([1, 7]))
    assert (actions[0] != 0).all()
    assert (actions[1][1:] == 0).all()  # pendulum has one action


def test_our_own_directory_keeps_what_an_official_file_held(tmp_path):
    model = model_of(tasks=THREE)
    model.save_pretrained(tmp_path / "ours")
    assert_same(model, create_world_model(tmp_path / "ours"), torch.tensor([0, 1, 2, 2, 1, 0, 0]))


def test_pixel_files_hold_the_published_keys_and_load(tmp_path):
    torch.manual_seed(0)
    model = TDMPC2WorldModel((9, 64, 64), 4, TDMPC2Config(augment_eval=False), 500)
    current = layout_c(model, tmp_path / "c.pt")
    assert {k: tuple(v.shape) for k, v in current.items() if k.startswith("_encoder") and k.endswith("weight")} == {
        "_encoder.rgb.2.weight": (32, 9, 7, 7),
        "_encoder.rgb.4.weight": (32, 32, 5, 5),
        "_encoder.rgb.6.weight": (32, 32, 3, 3),
        "_encoder.rgb.8.weight": (32, 32, 3, 3),
    }
    loaded = create_world_model(tmp_path / "c.pt", obs_shape=(9, 64, 64), action_dim=4, augment_eval=False)
    image = torch.randint(256, (2, 9, 64, 64), dtype=torch.uint8)
    assert torch.equal(loaded.encode(image).deterministic, model.encode(image).deterministic)


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ({"action_classes": (4,)}, "discrete actions"),
        ({"obs_shape": (9, 64, 64)}, "projects images"),
        ({"config": TDMPC2Config(**SMALL, simnorm_dim=4)}, "simplices of 4"),
        ({"config": TDMPC2Config(**SMALL, bin_limit=8.0)}, "bins up to 8"),
        ({"config": TDMPC2Config(**SMALL, log_std_max=1.5)}, r"log_std in \[-10, 1.5\]"),
        ({"obs_shape": (9, 80, 80), "config": TDMPC2Config()}, "images other than 64x64"),
    ],
)
def test_models_that_the_authors_code_does_not_know_are_not_exported(made, what, tmp_path):
    arguments = {"obs_shape": (5,), "action_dim": 4, "config": TDMPC2Config(**SMALL), **made}
    with pytest.raises(ValueError, match=what):
        save_official(TDMPC2WorldModel(**arguments), tmp_path / "no.pt")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_pickled_object_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    current = layout_c(model_of(), tmp_path / "c.pt")
    torch.save({"model": {**current, "extra": Bomb()}}, tmp_path / "bomb.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    for name, message in (("bomb.pt", "extra is of type posix.mkdir, expected"), ("bare.pt", "is not a checkpoint of")):
        with pytest.raises(ValueError, match=f"{name}:? {message}"):
            load_official(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_files_that_are_cut_short_or_foreign_are_refused(tmp_path):
    current = layout_c(model_of(), tmp_path / "c.pt")
    whole = (tmp_path / "c.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    broken = [b"text file", b"state,action", b"\x80\x02}q", b"J\x00"]
    for number, content in enumerate(broken):
        (tmp_path / f"{number}.pt").write_bytes(content)
    for name in ("cut.pt", "text.pt", "empty.pt", *(f"{number}.pt" for number in range(len(broken)))):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint of TD-MPC2"):
            load_official(tmp_path / name)
    with pytest.raises(ValueError, match=r'expected a mapping "model"'):
        load_official(save({"linear.weight": torch.zeros(2)}, tmp_path / "foreign.pt"))
    extra = {**current, "_surprise.0.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"not TD-MPC2's: _surprise\.0\.weight"):
        load_official(save(extra, tmp_path / "extra.pt"))
    deeper = {**current, "_reward.3.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"unknown _reward\.3\.weight"):
        load_official(save(deeper, tmp_path / "deeper.pt"))
    for lost in ("_reward.1.ln.bias", "_pi.2.weight"):
        less = {key: value for key, value in current.items() if key != lost}
        with pytest.raises(ValueError, match=f"lacks {lost}"):
            load_official(save(less, tmp_path / "less.pt"))
    single = {**current, "_dynamics.0.weight": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"_dynamics\.0\.weight has shape \(\), expected 2 axes"):
        load_official(save(single, tmp_path / "single.pt"))
    bent = {**current, "_reward.1.weight": torch.zeros(24, 23)}
    with pytest.raises(ValueError, match=r"_reward.1.weight is \(24, 23\), expected \(24, 24\)"):
        load_official(save(bent, tmp_path / "bent.pt"))


def test_sizes_that_contradict_the_file_are_named(tmp_path):
    save_official(model_of(), tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"obs_shape=\(5,\), but obs_shape=\(6,\) was asked for"):
        create_world_model(tmp_path / "c.pt", obs_shape=(6,), action_dim=4)
    with pytest.raises(ValueError, match=r"action_dim=4, but action_dim=3 was asked for"):
        create_world_model(tmp_path / "c.pt", obs_shape=(5,), action_dim=3)
    assert create_world_model(tmp_path / "c.pt", obs_shape=[5], action_dim=4).obs_shape == (5,)


def test_an_official_file_becomes_an_agent_that_learns_on(tmp_path):
    save_official(model_of(), tmp_path / "c.pt")
    assert load_agent(tmp_path / "c.pt", episode_length=100).world_model.discount == pytest.approx(0.95)
    agent = load_agent(tmp_path / "c.pt")
    assert isinstance(agent, TDMPC2Agent)
    assert agent.world_model.discount == pytest.approx(0.99)
    batch = {"obs": torch.randn(8, 4, 5), "actions": torch.rand(8, 4, 4), "rewards": torch.randn(8, 4)}
    assert agent.update(batch)[0]["loss"] > 0
