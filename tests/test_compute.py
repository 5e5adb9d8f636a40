"""How updates compute: compiled, and in bfloat16, against eager float32."""

import pytest
import torch
from torch.testing import assert_close

from tests import diamond_models, storm_models
from tests.dreamerv3_models import MIXED, batch_of, shake, tiny_agent
from worldloom.tdmpc2 import TDMPC2Agent, TDMPC2Config, TDMPC2WorldModel

pytestmark = pytest.mark.timeout(1500)  # compiling takes minutes on a busy machine


def context_and_rows(agent, batch):
    rows = {name: value[:, 1:] for name, value in batch.items() if name != "obs"}
    obs = batch["obs"]
    rows["obs"] = {k: v[:, 1:] for k, v in obs.items()} if isinstance(obs, dict) else {"obs": obs[:, 1:]}
    return rows, agent.learning.context(agent.learning.stage(batch))


def loss_and_gradients(agent, batch):
    torch.manual_seed(3)
    noise = agent.learning.draw_noise(4, 8)
    total, scalars, *_ = agent.learning.loss(*context_and_rows(agent, batch), noise)
    modules = [agent.world_model, agent.behaviour]
    parameters = {n: p for module in modules for n, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(total, list(parameters.values()))
    return total.detach(), scalars, dict(zip(parameters, gradients, strict=True))


def test_compiled_updates_give_the_numbers_of_eager_ones():
    eager, compiled = (shake(tiny_agent(action_dim=3, classes=(3,))) for _ in range(2))
    compiled.configure_learning("float32", compiled=True)
    batch = batch_of(eager)
    for _ in range(3):
        expected, fresh = eager.update(batch)
        metrics, columns = compiled.update(batch)
        assert metrics == pytest.approx(expected, rel=2e-4, abs=1e-5)
        assert (columns["stoch"] == fresh["stoch"]).mean() > 0.99  # a draw may flip where probabilities tie
    obs = batch["obs"][:, 0].numpy()
    first = torch.ones(4, dtype=torch.bool).numpy()
    assert compiled.act(obs, None, first)[0].shape == (4, 3)


@pytest.mark.slow  # compiling takes minutes on a busy machine
@pytest.mark.parametrize("representation", ["r2dreamer", "infonce", "ne"])
def test_compiled_updates_without_a_decoder_give_the_numbers_of_eager_ones(representation):
    fields = {"representation": representation, "ne_width": 16}
    eager, compiled = (shake(tiny_agent(**fields)) for _ in range(2))
    compiled.configure_learning("float32", compiled=True)
    batch = batch_of(eager)
    for _ in range(3):
        expected, metrics = eager.update(batch)[0], compiled.update(batch)[0]
        assert metrics == pytest.approx(expected, rel=5e-4, abs=1e-5)


def test_bfloat16_updates_stay_near_float32_and_reach_every_parameter():
    wide, narrow = (shake(tiny_agent(MIXED, 3, obs_classes={"goal": 5})) for _ in range(2))
    narrow.configure_learning("bfloat16", compiled=False)
    batch = batch_of(wide)
    expected, _, reached = loss_and_gradients(wide, batch)
    loss, _, gradients = loss_and_gradients(narrow, batch)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=0.02, atol=0.0)
    assert all(g.dtype == torch.float32 for g in gradients.values())
    assert {n for n, g in gradients.items() if g.any()} == {n for n, g in reached.items() if g.any()}


def test_bfloat16_learns():
    agent = tiny_agent()
    agent.configure_learning("bfloat16", compiled=False)
    batch = batch_of(agent)
    losses = [agent.update(batch)[0]["reconstruction_loss"] for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == torch.float32 for p in agent.world_model.parameters())


def tiny_tdmpc2():
    torch.manual_seed(0)
    sizes = {"encoder_dim": 16, "mlp_dim": 16, "latent_dim": 16, "batch_size": 8}
    return TDMPC2Agent(TDMPC2WorldModel((3,), 2, TDMPC2Config(**sizes), episode_length=100))


def test_compiled_tdmpc2_updates_give_the_numbers_of_eager_ones():
    eager, compiled = tiny_tdmpc2(), tiny_tdmpc2()
    compiled.configure_learning("float32", compiled=True)
    torch.manual_seed(1)
    batch = {"obs": torch.randn(8, 4, 3), "actions": torch.rand(8, 4, 2) * 2 - 1, "rewards": torch.randn(8, 4)}
    for _ in range(3):
        expected, _ = eager.update(batch)
        assert compiled.update(batch)[0] == pytest.approx(expected, rel=2e-4, abs=1e-5)


def test_tdmpc2_refuses_bfloat16():
    with pytest.raises(ValueError, match="TD-MPC2 learns in float32"):
        tiny_tdmpc2().configure_learning("bfloat16", compiled=False)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # the latter is what GPUs do
def test_compiled_storm_updates_give_the_numbers_of_eager_ones(precision):
    made = ((3, 64, 64), 3, (3,))
    eager, compiled = (storm_models.tiny_agent(*made) for _ in range(2))
    eager.configure_learning(precision, compiled=False)
    compiled.configure_learning(precision, compiled=True)
    batch = storm_models.batch_of(eager)
    near = {"float32": 5e-4, "bfloat16": 5e-2}[precision]
    for update in range(3):
        expected, metrics = eager.update(batch)[0], compiled.update(batch)[0]
        for name in ("reconstruction_loss", "reward_loss", "termination_loss", "dynamics_loss"):
            assert metrics[name] == pytest.approx(expected[name], rel=near, abs=near)
        if not update:  # later a draw may flip, where probabilities tie
            assert metrics["loss"] == pytest.approx(expected["loss"], rel=near)
    means = [dict(agent.world_model.named_buffers()) for agent in (eager, compiled)]
    for name, value in means[0].items():
        if name.endswith("running_mean"):
            assert_close(means[1][name], value, rtol=near, atol=near)


@pytest.mark.slow  # compiling the U-Net took ten minutes on a busy machine
def test_compiled_diamond_updates_give_the_numbers_of_eager_ones():
    eager, compiled = (diamond_models.shake(diamond_models.tiny_agent()) for _ in range(2))
    compiled.configure_learning("float32", compiled=True)
    batch = diamond_models.batch_of(eager)
    for _ in range(3):
        expected, metrics = eager.update(batch)[0], compiled.update(batch)[0]
        for name in ("denoising_loss", "reward_loss", "end_loss"):  # a drawn frame may lose a grey level
            assert metrics[name] == pytest.approx(expected[name], rel=2e-4, abs=1e-5)
        assert metrics["loss"] == pytest.approx(expected["loss"], rel=2e-2)


def test_diamond_learns_in_bfloat16_and_reaches_every_parameter():
    wide, narrow = (diamond_models.shake(diamond_models.tiny_agent()) for _ in range(2))
    narrow.configure_learning("bfloat16", compiled=False)
    batch = diamond_models.batch_of(wide)
    expected, metrics = wide.update(batch)[0], narrow.update(batch)[0]
    for name in ("denoising_loss", "reward_loss", "end_loss"):
        assert metrics[name] == pytest.approx(expected[name], rel=0.02)
    parameters = [*narrow.world_model.parameters(), *narrow.behaviour.parameters()]
    assert all(p.grad.any() and p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    losses = [narrow.update(batch)[0]["reward_loss"] for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
