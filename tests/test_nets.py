import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from worldloom import nets
from worldloom.nets import Ensemble, NormedLinear, SimNorm, mish, mlp, mlp_of_pair


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (
            range(8),
            (0.00057661, 0.00156740, 0.00426062, 0.01158158, 0.03148199, 0.08557692, 0.23262221, 0.63233268),
        ),
        (
            (-3, -2, -1, 0, 1, 2, 3, 10),
            (0.00000226, 0.00000614, 0.00001668, 0.00004533, 0.00012323, 0.00033498, 0.00091057, 0.99856073),
        ),
        (
            [i / 2 for i in range(8)],
            (0.01210343, 0.01995517, 0.03290052, 0.05424379, 0.08943290, 0.14744991, 0.24310382, 0.40081042),
        ),
    ],
)
def test_simnorm_equals_golden_values(x, expected):
    actual = SimNorm()(torch.tensor([float(v) for v in x], dtype=torch.float64))
    assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_simnorm_normalises_consecutive_groups():
    out = SimNorm()(torch.randn(3, 5, 24))
    assert_close(out.view(3, 5, 3, 8).sum(-1), torch.ones(3, 5, 3))


def test_mish_equals_golden_values():
    x = torch.tensor([-2, -1, 0, 0.5, 1, 2], dtype=torch.float64)
    expected = (-0.25250148, -0.30340146, 0, 0.37524521, 0.86509839, 1.94395896)
    assert_close(mish(x), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-8)


def test_mish_and_its_gradient_equal_torchs_over_the_whole_range():
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-3, 3, 601)]).requires_grad_()
    weight = torch.randn_like(x)
    ours, theirs = mish(x), F.mish(x)
    assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    (a,) = torch.autograd.grad((ours * weight).sum(), x)
    (b,) = torch.autograd.grad((theirs * weight).sum(), x)
    assert_close(a, b, rtol=1e-5, atol=1e-6)
    exact = torch.linspace(-5, 5, 50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, (exact,))


def test_normed_linear_is_linear_then_layernorm_then_mish():
    layer = NormedLinear(4, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.zero_()
    out = layer(torch.tensor([1.0, 2, 3, 4]))
    assert_close(out, torch.tensor([-0.30609324, -0.20466678, 0.32911763, 1.23113757]), rtol=0, atol=1e-5)


def member(ensemble: Ensemble, n: int, x: torch.Tensor, dropout: torch.Tensor | None = None) -> torch.Tensor:
    """The n-th member, one plain layer after the other."""
    for layer in (ensemble.first, ensemble.second, ensemble.output):
        x = F.linear(x, layer.weight[n], layer.bias[n])
        if dropout is not None and layer is ensemble.first:
            x = x * dropout
        if layer.ln is not None:
            x = F.mish(F.layer_norm(x, x.shape[-1:], layer.ln.weight[n], layer.ln.bias[n]))
    return x


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    made = Ensemble(3, 6, 16, 4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_ensemble_equals_its_members_one_by_one(ensemble):
    x = torch.randn(2, 5, 6)
    expected = torch.stack([member(ensemble, n, x) for n in range(3)])
    assert_close(ensemble(x), expected, rtol=1e-5, atol=1e-5)
    assert_close(ensemble(x, torch.tensor([2, 0])), expected[[2, 0]], rtol=1e-5, atol=1e-5)


def test_frozen_ensemble_passes_gradients_to_its_input_only(ensemble):
    x = torch.randn(5, 6, requires_grad=True)
    ensemble(x, torch.tensor([0, 1]), frozen=True).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in ensemble.parameters())


def test_one_latent_serves_many_actions_as_if_it_were_repeated():
    torch.manual_seed(0)
    network = mlp([7, 16, 16], 3)
    z, action = torch.randn(2, 1, 5), torch.randn(2, 4, 2)
    assert_close(mlp_of_pair(network, z, action), network(torch.cat([z.expand(-1, 4, -1), action], -1)))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("heads", [None, [2, 0]])
@pytest.mark.parametrize("form", ["_one_by_one", "_together"])
def test_dropout_before_a_norm_scales_what_is_kept(form, heads, rate, monkeypatch):
    """Against the plain form, factors 0 and 1 / (1 - rate), also where the norm's eps matters."""
    torch.manual_seed(0)
    net = Ensemble(3, 5, 16, 4)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.first.bias.detach().mul_(1e-2)  # deviations near the root of eps
    x = (1e-2 * torch.randn(40, 5)).requires_grad_()
    chosen = [0, 1, 2] if heads is None else heads
    dropped = torch.rand(40, len(chosen), 16) < rate
    monkeypatch.setattr(nets, "_one_by_one", getattr(nets, form))
    found = net(x, None if heads is None else torch.tensor(heads), dropped if rate else None, rate)
    factors = (~dropped).float() / (1 - rate)
    wanted = torch.stack([member(net, n, x, factors[:, place]) for place, n in enumerate(chosen)])
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    trained = [x, *net.parameters()]
    gradients = [torch.autograd.grad(out.square().sum(), trained) for out in (found, wanted)]
    for ours, plain in zip(*gradients, strict=True):
        assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
