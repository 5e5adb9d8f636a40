"""Products by oneDNN equal MKL's, gradients included, and are asked for only where they win."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.test_core import KINDS, batch_of
from worldloom import products
from worldloom.types import Agent


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make products of any size go to oneDNN, on any processor that it runs on."""
    monkeypatch.setattr(products, "WORTH", 0)
    monkeypatch.setattr(products, "_WIDE", True)
    if products._ONEDNN is None:
        pytest.skip("this build of torch has no oneDNN")


def numbers(*shape: int, gradient: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(gradient)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one with each product by oneDNN."""
    found, real = [], products._ONEDNN

    def counted(*args: object) -> Tensor:
        found.append(1)
        result: Tensor = real(*args)
        return result

    monkeypatch.setattr(products, "_ONEDNN", counted)
    return found


def column_slice(rows: int, columns: int) -> Tensor:
    return numbers(rows, columns + 7)[:, 3 : columns + 3]


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6 * expected.detach().abs().max().item())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (3, 4), (1,)])
@pytest.mark.parametrize("weight", [lambda: numbers(6, 40), lambda: numbers(40, 6).mT, lambda: column_slice(6, 40)])
def test_a_linear_map_and_its_gradients_equal_those_in_float64(
    weight: Callable[[], Tensor], lead: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calls(monkeypatch)
    inputs = [numbers(*lead, 40), weight(), numbers(6)] if bias else [numbers(*lead, 40), weight()]
    ours = [value.detach().requires_grad_() for value in inputs]
    exact = [value.double().detach().requires_grad_() for value in inputs]
    out, expected = products.linear(*ours), F.linear(*exact)
    close(out, expected.float())
    (out * numbers(*lead, 6)).sum().backward()
    (expected * numbers(*lead, 6).double()).sum().backward()
    for value, reference in zip(ours, exact, strict=True):
        assert value.grad is not None
        assert reference.grad is not None
        close(value.grad, reference.grad.float())
    assert len(found) == 3


def test_gradients_are_formed_only_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(monkeypatch)
    products.linear(numbers(5, 8), numbers(3, 8, gradient=True)).sum().backward()
    assert len(found) == 2, "the gradient of the inputs was not asked for"
    with torch.no_grad():
        assert not products.linear(numbers(5, 8), numbers(3, 8, gradient=True)).requires_grad


def test_a_product_is_added_with_gradients_of_both_but_the_weight() -> None:
    added, x, weight = numbers(5, 6, gradient=True), numbers(5, 40, gradient=True), numbers(40, 6)
    out = products.addmm(added, x, weight)
    close(out, torch.addmm(added, x, weight))
    given = numbers(5, 6)
    ours = torch.autograd.grad(out, [added, x], given)
    for value, expected in zip(ours, (given, given @ weight.mT), strict=True):
        close(value, expected)


@pytest.mark.parametrize("turned", [False, True])
def test_plain_and_grouped_products_take_any_layout(turned: bool) -> None:
    a = numbers(3, 40, 5).mT if turned else numbers(3, 5, 40)
    b = numbers(40, 3, 6).transpose(0, 1)
    close(products.bmm(a, b), torch.bmm(a, b))
    close(products.matmul(a[1], b[1]), a[1] @ b[1])


def test_grouped_products_keep_gradients() -> None:
    a, b = numbers(3, 5, 40, gradient=True), numbers(3, 40, 6)
    (found,) = torch.autograd.grad(products.bmm(a, b).sum(), a)
    close(found, b.sum(-1).unsqueeze(1).expand(3, 5, 40))


def test_a_compiled_graph_holds_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(monkeypatch)
    x, weight = numbers(5, 40, gradient=True), numbers(6, 40, gradient=True)
    out = torch.compile(products.linear, fullgraph=True)(x, weight)
    close(out, F.linear(x, weight))
    out.sum().backward()
    assert x.grad is not None
    assert len(found) == 3
    close(x.grad, weight.sum(0).expand(5, 40))


@pytest.mark.parametrize("case", ["small", "float64", "meta", "autocast"])
def test_other_products_are_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(monkeypatch)
    x, weight = numbers(5, 40), numbers(6, 40)
    if case == "small":
        monkeypatch.setattr(products, "WORTH", 5 * 40 * 6 + 1)
    if case in ("float64", "meta"):
        x, weight = (value.double() if case == "float64" else value.to("meta") for value in (x, weight))
    with torch.autocast("cpu", enabled=case == "autocast"):
        out = products.linear(x, weight)
    assert out.shape == (5, 6)
    assert not found
    assert out.dtype == {"float64": torch.float64, "autocast": torch.bfloat16}.get(case, torch.float32)


def test_a_bias_gets_its_gradient_beside_a_fixed_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = numbers(6, gradient=True)
    products.linear(numbers(5, 40), numbers(6, 40), bias).sum().backward()
    assert bias.grad is not None
    close(bias.grad, torch.full((6,), 5.0))


@pytest.mark.parametrize(("make", "kind"), [pair for pair in KINDS if pair[1] in ("vectors", "states", "ne")])
def test_agents_learn_the_same_by_either_library(
    make: Callable[[str], Agent], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of two updates: those of the second see the gradients of the first."""
    means = []
    for worth in (0, 1 << 60):
        monkeypatch.setattr(products, "WORTH", worth)
        found = calls(monkeypatch)
        torch.manual_seed(3)
        agent = make(kind)
        batch = batch_of(agent)
        means.append([agent.update(batch)[0], agent.update(batch)[0]])
        assert bool(found) == (worth == 0)
    for one, other in zip(*means, strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx(
            {name: float(value) for name, value in other.items()}, rel=1e-4, abs=1e-4
        )
