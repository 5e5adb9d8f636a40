"""Golden values come from the papers' reference code or a pencil, never from the functions under test."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from worldloom import functional as fn

EVEN_BINS = torch.linspace(-10, 10, 101, dtype=torch.float64)
SYMEXP_BINS = fn.symexp_bins(255, dtype=torch.float64)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-6):
    assert_close(actual, f64(*expected), rtol=tolerance, atol=tolerance)


def test_symlog_and_symexp_equal_golden_values():
    close(
        fn.symlog(f64(0.5, 1, 10, -100, 1000)),
        (0.405465108, 0.693147181, 2.397895273, -4.615120517, 6.908754779),
    )
    close(fn.symexp(f64(0.5, 1, 10)), (0.648721271, 1.718281828, 22025.465795))


@given(st.floats(-1e6, 1e6))
def test_symexp_undoes_symlog(x):
    assert_close(fn.symexp(fn.symlog(f64(x))), f64(x), rtol=1e-9, atol=1e-12)


TDMPC2_TWO_HOT = {
    0.0: {50: 1.0},
    1.0: {53: 0.5342641, 54: 0.4657359},
    -1.0: {46: 0.4657359, 47: 0.5342641},
    0.1: {50: 0.5234491, 51: 0.4765509},
    0.5: {52: 0.9726745, 53: 0.0273255},
    10.0: {61: 0.0105236, 62: 0.9894764},
    100.0: {73: 0.9243974, 74: 0.0756026},
    -250.0: {22: 0.6272647, 23: 0.3727353},
    1000.0: {84: 0.4562261, 85: 0.5437739},
    22025.0: {99: 0.0001057, 100: 0.9998943},
    1e6: {100: 1.0},
    -1e6: {0: 1.0},
}
DREAMER_TWO_HOT = {
    0.0: {127: 1.0},
    0.1: {127: 0.413688206, 128: 0.586311794},
    0.5: {129: 0.444607886, 130: 0.555392114},
    1.0: {131: 0.617329079, 132: 0.382670921},
    -1.0: {122: 0.382670921, 123: 0.617329079},
    10.0: {142: 0.786963016, 143: 0.213036984},
    -100.0: {97: 0.289470739, 98: 0.710529261},
    1000.0: {170: 0.138448504, 171: 0.861551496},
    1e9: {254: 1.0},
}


@pytest.mark.parametrize(("x", "mass"), TDMPC2_TWO_HOT.items())
def test_two_hot_in_symlog_space_equals_golden_weights(x, mass):
    expected = torch.zeros(101, dtype=torch.float64)
    for index, weight in mass.items():
        expected[index] = weight
    assert_close(fn.two_hot(fn.symlog(f64(x)), EVEN_BINS)[0], expected, rtol=0, atol=1e-6)
    in_float32 = fn.two_hot(fn.symlog(torch.tensor([x])), EVEN_BINS.float())[0]
    assert_close(in_float32.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("x", "mass"), DREAMER_TWO_HOT.items())
def test_two_hot_on_symexp_bins_equals_golden_weights(x, mass):
    expected = torch.zeros(255, dtype=torch.float64)
    for index, weight in mass.items():
        expected[index] = weight
    assert_close(fn.two_hot(f64(x), SYMEXP_BINS)[0], expected, rtol=0, atol=1e-8)


@given(st.floats(-1e7, 1e7))
def test_two_hot_weights_sum_to_one_and_keep_the_value(x):
    target = fn.two_hot(f64(x), SYMEXP_BINS)[0]
    assert_close(target.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert (target >= 0).all()
    assert_close(target @ SYMEXP_BINS, f64(x)[0], rtol=1e-9, atol=1e-9)


def test_symexp_bins_equal_golden_values():
    assert SYMEXP_BINS[127] == 0
    close(
        SYMEXP_BINS[128:136],
        (
            0.170557715,
            0.370205365,
            0.603904461,
            0.877462742,
            1.197678497,
            1.572509521,
            2.011270867,
            2.524866351,
        ),
    )
    close(SYMEXP_BINS[[0, 1, 254]], (-485165194.40979, -414473535.06, 485165194.40979), 1e-9)
    assert torch.equal(SYMEXP_BINS, -SYMEXP_BINS.flip(0))


def test_symlog_mean_equals_golden_values():
    logits = torch.zeros(3, 101, dtype=torch.float64)
    logits[1, 60] = 10
    logits[2, 60], logits[2, 65] = 8, 9
    close(fn.symlog_mean(logits, EVEN_BINS), (0, 6.3219059, 13.9757804))
    ends = fn.two_hot(fn.symlog(f64(1e6, -1e6)), EVEN_BINS)
    assert_close(fn.symlog_mean(1e3 * ends, EVEN_BINS), f64(22025.46579, -22025.46579), rtol=1e-9, atol=0)


def test_antisymmetric_mean_is_zero_for_equal_logits_and_equals_golden_values():
    assert fn.antisymmetric_mean(torch.zeros(255), SYMEXP_BINS.float()) == 0
    logits = torch.zeros(2, 255, dtype=torch.float64)
    logits[0, 134], logits[1, 134] = 5, 12
    close(fn.antisymmetric_mean(logits, SYMEXP_BINS), (0.736775, 2.008124703))
    pair = torch.full((255,), -1e9, dtype=torch.float64)
    pair[127:129] = 0
    assert_close(fn.antisymmetric_mean(pair, SYMEXP_BINS).item(), 0.085278857, rtol=1e-6, atol=0)


def test_soft_cross_entropy_equals_golden_values():
    def tdmpc2(logits, x):
        return fn.soft_cross_entropy(logits, fn.two_hot(fn.symlog(f64(*x)), EVEN_BINS))

    close(tdmpc2(torch.zeros(2, 101, dtype=torch.float64), (0, 37)), (math.log(101),) * 2)
    ramp = torch.linspace(-1, 1, 101, dtype=torch.float64).expand(4, 101)
    close(tdmpc2(ramp, (0, 1, -5, 37)), (4.7796873, 4.7103726, 4.9588633, 4.4159287))

    logits = torch.zeros(3, 255, dtype=torch.float64)
    logits[1:, 134] = 5
    close(
        fn.soft_cross_entropy(logits, fn.two_hot(f64(1, 1, 0), SYMEXP_BINS)),
        (5.541263545, 5.997479, 5.997479),
    )


@pytest.mark.parametrize(("lam", "expected"), [(0.0, (6.0, 12.0)), (0.5, (6.5, 12.0)), (1.0, (7.0, 12.0))])
def test_lambda_return_equals_hand_worked_values(lam, expected):
    # lam=0.5:  G1 = 2 + 0.5*(10 + 10) = 12,   G0 = 1 + 0.5*(5 + 6) = 6.5
    close(fn.lambda_return(f64(1, 2), f64(0.5, 0.5), f64(10, 20), lam), expected)


C = 0.996996997


@pytest.mark.parametrize(
    ("discount", "lam", "expected"),
    [
        ((C, C, C), 0.95, (3.572650956, 2.684631478, 2.797597598)),
        ((C, 0, C), 0.95, (1.029909910, 0, 2.797597598)),  # a true end on arriving at step 2
        ((C, C, C), f64(0.95, 0, 0.95), (1.690921913, 0.697897898, 2.797597598)),  # cut short at step 2
        ((0.9, 0.9, 0.9), 0.5, (1.96255, 1.539, 2.72)),
    ],
)
def test_lambda_return_equals_reference_values(discount, lam, expected):
    close(fn.lambda_return(f64(1, 0, 2), f64(*discount), f64(0.6, 0.7, 0.8), lam), expected)


def test_lambda_return_refuses_values_of_another_length():
    with pytest.raises(ValueError, match="Drop the first row of value"):
        fn.lambda_return(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(4, 1), 0.95)


@pytest.mark.parametrize(
    ("x", "low", "high"),
    [
        (torch.arange(256.0), 12.75, 242.25),
        (torch.tensor([3.0, -1, 4, 1, 5, 9, 2, 6]), -0.3, 7.95),
        (torch.linspace(-3, 5, 10), -2.6, 4.6),
        (torch.linspace(0, 10, 101), 0.5, 9.5),
    ],
)
def test_percentile_range_equals_golden_values(x, low, high):
    actual = fn.percentile_range(x[torch.randperm(len(x))])
    assert_close(actual, (torch.tensor(low), torch.tensor(high)), rtol=1e-5, atol=1e-5)


def test_unimix_equals_golden_values():
    log_probs = fn.unimix_log_probs(f64(1, 2, 3))
    close(log_probs.exp(), (0.092463601, 0.245614520, 0.661921880))
    assert_close(-(log_probs.exp() * log_probs).sum().item(), 0.838105206, rtol=1e-7, atol=0)
    close(fn.unimix_log_probs(f64(1000, 0, 0, 0)).exp(), (0.9925, 0.0025, 0.0025, 0.0025))
    close(fn.unimix_log_probs(f64(1000, *[0] * 15)).exp(), (0.990625, *[0.000625] * 15), 1e-9)


def test_categorical_kl_equals_golden_values():
    def kl(p, q, mix=0.01):
        return fn.categorical_kl(fn.unimix_log_probs(p, mix), fn.unimix_log_probs(q, mix)).item()

    ramp, flat, back = f64(1, 2, 3)[None], f64(0, 0, 0)[None], f64(3, 2, 1)[None]
    for actual, expected in [
        (kl(ramp, flat), 0.260507082),
        (kl(flat, ramp), 0.300567684),
        (kl(ramp, back), 1.120883226),
        (kl(ramp, flat, 0.0), 0.266216707),
        (kl(ramp, back, 0.0), 1.150420766),
    ]:
        assert_close(actual, expected, rtol=1e-7, atol=0)
    p = torch.zeros(32, 16, dtype=torch.float64)
    q = p.clone()
    p[:, 0], q[:, 1] = 1e4, 1e4
    assert_close(kl(p[:1], q[:1]), 7.294656289, rtol=1e-9, atol=0)
    assert_close(kl(p, q), 233.429001, rtol=1e-8, atol=0)


def test_redundancy_reduction_equals_hand_worked_values():
    """Over the rows (1, -1, 1, -1), std is 2 / sqrt(3): an entry correlates 3/4 with itself, its double and x + 1."""
    wave, other = torch.tensor([1.0, -1, 1, -1]).double(), torch.tensor([1.0, 1, -1, -1]).double()
    x, same = torch.stack([wave, other], 1), torch.stack([2 * wave + 1, other], 1)
    swapped, both = same.flip(1), torch.stack([same[:, 0], same[:, 0]], 1)
    for y, expected in [(same, 2 / 16), (swapped, 2 + 0.5 * 2 * 9 / 16), (both, 1 / 16 + 1 + 0.5 * 9 / 16)]:
        assert_close(fn.redundancy_reduction(x, y, 0.5).item(), expected, rtol=1e-7, atol=0)
    more = torch.cat([x, torch.full((2, 2), 7.0).double()])  # two rows that do not count
    counted = torch.tensor([1.0, 1, 1, 1, 0, 0]).double().unsqueeze(1)
    assert_close(fn.redundancy_reduction(more, more.flip(1), 0.5, counted).item(), 2 + 9 / 16, rtol=1e-7, atol=0)


def test_redundancy_of_what_never_varies_has_a_finite_gradient():
    x = torch.ones(4, 2, requires_grad=True)
    loss = fn.redundancy_reduction(x, torch.randn(4, 2), 0.5)
    loss.backward()
    assert loss == 2
    assert x.grad.isfinite().all()


def test_free_nats_floor_has_no_gradient():
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    kl = fn.free_nats(fn.categorical_kl(fn.unimix_log_probs(logits), fn.unimix_log_probs(torch.zeros(1, 3))))
    kl.backward()
    assert kl == 1
    assert torch.equal(logits.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.2, 0.9])
def test_random_masks_are_independent_draws(rate):
    generator = torch.Generator().manual_seed(0)
    mask = fn.random_mask((1000, 700), rate, generator, torch.device("cpu"))
    assert mask.shape == (1000, 700)
    assert mask.dtype == torch.bool
    spread = (rate * (1 - rate) / mask.numel()) ** 0.5
    assert mask.float().mean().item() == pytest.approx(rate, abs=5 * spread + 1e-12)
    flat = mask.flatten().float()
    for lag in (1, 2, 700):  # no row and no neighbour tells of another
        both = (flat[lag:] * flat[:-lag]).mean().item()
        assert both == pytest.approx(rate**2, abs=6 * spread * max(rate, 0.05) + 1e-12)
    halves = mask[:500].float().mean(), mask[500:].float().mean()
    assert halves[0].item() == pytest.approx(halves[1].item(), abs=8 * spread + 1e-12)
    if 0 < rate < 0.9:
        assert not torch.equal(mask, fn.random_mask((1000, 700), rate, generator, torch.device("cpu")))
    first = [fn.random_mask((3,), 0.5, generator, torch.device("cpu")).tolist() for _ in range(4000)]
    assert all(abs(sum(m[i] for m in first) / 4000 - 0.5) < 0.04 for i in range(3))
