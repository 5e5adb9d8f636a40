"""DreamerV3 against numbers that the authors' code gave, and against hand-worked values."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.dreamerv3_models import PIXELS, TOKEN, H, Z, close, fill
from worldloom import functional as fn
from worldloom.dreamerv3 import SIZES, DreamerV3Config, DreamerV3WorldModel
from worldloom.dreamerv3.behaviour import Behaviour
from worldloom.dreamerv3.encoder import Decoder, Encoder, ImageDecoder, ImageEncoder
from worldloom.dreamerv3.layers import BlockLinear, Conv, Linear, NormedLinear, NormSiLU, UpConv, norm_silu
from worldloom.dreamerv3.rssm import RSSM, RSSMState, gru_gate, sample_one_hot
from worldloom.optim import LaProp

# The parity fixture


def small_rssm():
    return fill(RSSM(action_dim=2, tokens=5, deter=8, hidden=4, stoch=2, classes=3, blocks=2, unimix=0.01))


def test_rssm_equals_the_reference():
    rssm = small_rssm()
    action = rssm.embed_action(torch.tensor([[0.5, -2.0]]))
    assert_close(action, rssm.embed_action(torch.tensor([[0.5, -1.0]])))
    deter = rssm.core(RSSMState(H, Z), action)
    close(deter, [0.1358977, 0.3382060, 0.0975481, -0.2518224, -0.3667494, -0.0876316, 0.2686820, 0.3543142], 2e-6)
    prior, posterior = rssm.prior(deter), rssm.posterior(deter, TOKEN)
    expected = torch.tensor([[0.7349055, 1.0008738, 0.3466433], [-0.6262894, -1.0234146, -0.4796171]])
    assert_close(rssm.prior_logits(rssm.prior_in(deter)).view(2, 3), expected, rtol=1e-5, atol=2e-6)
    assert_close(prior[0], fn.unimix_log_probs(expected), rtol=1e-5, atol=2e-6)
    expected = torch.tensor([[0.7175235, 0.8316131, 0.1811214], [-0.6358924, -0.8682697, -0.3023638]])
    assert_close(posterior[0], fn.unimix_log_probs(expected), rtol=1e-5, atol=2e-6)
    close(fn.categorical_kl(posterior, prior), [0.006039148], 1e-6)
    for log_probs, entropy in ((prior, 2.140700679), (posterior, 2.136618558)):
        close(-(log_probs.exp() * log_probs).sum(), [entropy], 1e-5)


def test_observing_a_sequence_equals_observing_step_by_step():
    torch.manual_seed(0)
    rssm = small_rssm()
    actions, tokens = torch.randn(6, 3, 2), torch.randn(6, 3, 5)
    is_first = torch.zeros(6, 3, dtype=torch.bool)
    is_first[2, 1] = is_first[0, 2] = True
    noise = torch.empty(6, 3, 2, 3).exponential_()
    start = RSSMState(torch.randn(3, 8), Z.expand(3, 2, 3))
    whole = rssm.observe(start, actions, tokens, is_first, noise)
    state = start
    for t in range(6):
        reset = is_first[t].float()
        state = RSSMState(state.deter * (1 - reset)[:, None], state.stoch * (1 - reset)[:, None, None])
        action = actions[t] * (1 - reset)[:, None]
        deter = rssm.core(state, rssm.embed_action(action))
        log_probs = rssm.posterior(deter, tokens[t])
        state = RSSMState(deter, sample_one_hot(log_probs.exp(), noise[t]))
        assert_close(whole.states.deter[t], state.deter)
        assert_close(whole.log_probs[t], log_probs)
        assert_close(whole.states.stoch[t], state.stoch)


def test_is_first_forgets_state_and_action():
    rssm = small_rssm()
    noise, tokens = torch.ones(1, 1, 2, 3), TOKEN[None]
    first = torch.tensor([[True]])
    zero = RSSMState(torch.zeros_like(H), torch.zeros_like(Z))
    reset = rssm.observe(RSSMState(H, Z), torch.ones(1, 1, 2), tokens, first, noise)
    fresh = rssm.observe(zero, torch.zeros(1, 1, 2), tokens, ~first, noise)
    assert torch.equal(reset.states.deter, fresh.states.deter)
    assert torch.equal(reset.log_probs, fresh.log_probs)


def test_image_encoder_equals_the_reference():
    """As uint8 through the whole encoder, which scales them; only its network is made smaller than it allows."""
    encoder = Encoder({"image": (1, 48, 48)}, {}, units=4, depth=1, layers=1)
    encoder.image = fill(ImageEncoder(1, 2, (2, 3)))
    tokens = encoder({"image": PIXELS})[0]
    assert tokens.shape == (96,)
    close(tokens[:6], [-0.1171804, 0.6369990, 1.0487943, 1.1014340, 0.1968554, -0.2726452], 1e-5)
    close(tokens.sum(), [36.454875], 1e-5)


def test_vector_encoder_equals_the_reference():
    encoder = fill(Encoder({"b": (), "a": (3,)}, {}, units=4, depth=1, layers=2))
    tokens = encoder({"b": torch.tensor([0.5]), "a": torch.tensor([[1.0, -10, 100]])})
    close(tokens, [0.9271251, 1.1492256, 0.1754362, -0.2609266], 1e-5)


def test_image_decoder_equals_the_reference():
    decoder = Decoder({"image": (1, 48, 48)}, {}, deter=8, stoch=6, units=4, depth=1, layers=1, blocks=2)
    decoder.image = fill(ImageDecoder(8, 6, (1, 16, 16), depth=2, units=4, blocks=2, multipliers=(2, 4)))
    decoder.images = {"image": (1, 16, 16)}
    decoded = decoder(H, Z.flatten(1))
    image = decoded["image"]
    close(image[0, 0, 0, :6], [0.6126313, 0.6160621, 0.3169763, 0.3150636, 0.3594085, 0.1910068], 1e-5)
    close(image.mean(), [0.5683545], 1e-5)
    close(decoder.losses(decoded, {"image": PIXELS})["image"], [27.459108], 1e-5)


def test_vector_decoder_equals_the_reference():
    decoder = fill(Decoder({"b": (), "a": (3,)}, {}, deter=8, stoch=6, units=4, depth=1, layers=1, blocks=2))
    decoded = decoder(H, Z.flatten(1))
    close(decoded["a"], [0.3951017, 0.4204765, 0.0592672], 1e-5)
    close(decoded["b"], [0.7707022], 1e-5)
    losses = decoder.losses(decoded, {"a": torch.tensor([[1.0, -10, 100]]), "b": torch.tensor([0.5])})
    close(losses["a"], [28.787851], 1e-5)
    close(losses["b"], [0.133398], 1e-5)


# Golden facts


def test_rmsnorm_equals_golden_values():
    normed = torch.tensor([0.365145937, 0.730291875, 1.095437812, 1.460583749])
    close(NormSiLU(4)(torch.tensor([1.0, 2, 3, 4])), F.silu(normed))


@pytest.mark.parametrize("scales", [(6,), (5, 6)], ids=["one", "by row"])
def test_the_gradients_of_norm_and_silu_are_those_of_autograd(scales):
    x, scale = torch.randn(5, 6, dtype=torch.float64), torch.rand(scales, dtype=torch.float64) + 0.5
    gradient = torch.randn(5, 6, dtype=torch.float64)

    def composed(x, scale):
        return F.silu(x * scale / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt())

    found = []
    for function in (norm_silu, composed):
        inputs = x.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    for fused, plain in zip(*found, strict=True):
        assert_close(fused, plain, rtol=1e-12, atol=1e-12)


def test_doubling_and_convolution_in_one_equal_both_in_turn():
    conv = UpConv(4, 3).double()
    conv.bias.data.normal_()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=2)
    gradient, inputs = torch.randn_like(plain), (x, conv.weight, conv.bias)
    assert_close(conv(x), plain, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(out, inputs, gradient) for out in (conv(x), plain)), strict=True):
        assert_close(one, other, rtol=0, atol=1e-11)


def test_layers_are_linear_then_rmsnorm_then_silu():
    layer = NormedLinear(4, 4)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(4))
    close(layer(torch.full((4,), 1e4)), [0.731058579] * 4)  # silu(1)
    norm = torch.tensor([0.365145937, 0.730291875, 1.095437812, 1.460583749])
    close(layer(torch.tensor([1.0, 2, 3, 4])), (norm / (1 + torch.exp(-norm))).tolist())


@pytest.mark.parametrize(
    ("gates", "expected"),
    [((0, 0, 0, 0.5), 0.365529289), ((1, 1, 1, 0.5), 0.561856275), ((-2, 0.5, 3, -1), -0.066768203)],
)
def test_gru_gate_equals_golden_values(gates, expected):
    close(gru_gate(*(torch.tensor(float(g), dtype=torch.float64) for g in gates)), [expected], 1e-8)


def test_the_gradients_of_the_gate_are_those_of_autograd():
    rssm = small_rssm().double()
    gates, h = (torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (24, 8))
    by_block = gates.view(3, 2, 3, 4)
    plain = gru_gate(*by_block.unbind(2), h.view(3, 2, 4)).flatten(1)
    fused, gradient = rssm.gates(gates, h), torch.randn(3, 8, dtype=torch.float64)
    assert_close(fused, plain)
    for one, other in zip(*(torch.autograd.grad(out, (gates, h), gradient) for out in (fused, plain)), strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_straight_through_gradient_is_that_of_the_mixed_probabilities():
    jacobian = torch.autograd.functional.jacobian(
        lambda logits: sample_one_hot(fn.unimix_probs(logits), torch.ones(3, dtype=torch.float64)),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    )
    close(
        jacobian,
        [
            [0.081105813, -0.021812715, -0.059293099],
            [-0.021812715, 0.182988092, -0.161175370],
            [-0.059293099, -0.161175370, 0.220468476],
        ],
    )


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    probs = fn.unimix_probs(torch.tensor([1.0, 2.0, 3.0]))
    noise = fn.exponential_noise((200_000, 3), None, torch.device("cpu"))
    assert_close(noise.mean(), torch.tensor(1.0), rtol=0, atol=0.01)
    drawn = sample_one_hot(probs.expand(200_000, 3), noise).mean(0)
    assert_close(drawn, probs, rtol=0, atol=0.005)


def test_laprop_equals_golden_values():
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = LaProp([p], lr=0.1, warmup=0, clip=1e9)
    seen = []
    for gradient in (0.5, -0.1, 0.2):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        seen.append(p.item())
    close(seen, [0.9, 0.867232324, 0.823210024])


def test_warm_up_starts_at_zero():
    p = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer, before, moved = LaProp([p], lr=4e-5, warmup=1000, clip=1e9), 1.0, []
    for gradient in (0.5, -0.1, 0.2):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        moved.append(p.item() - before)
        before = p.item()
    assert moved[0] == 0
    assert moved[1:] == pytest.approx([-1.3107e-8, -3.5218e-8], rel=1e-4)


@pytest.mark.parametrize(
    ("p", "gradient", "expected"),
    [
        ((3, 4), (6, 8), (0.9, 1.2)),
        ((3, 4), (0.3, 0.4), (0.3, 0.4)),
        ((0, 0), (1, 0), (3e-4, 0)),  # a norm below 1e-3 counts as 1e-3
    ],
)
def test_adaptive_clipping_equals_golden_values(p, gradient, expected):
    """Where eps outweighs the gradient by far, and lr equals eps, a step is the clipped gradient itself."""
    before = torch.tensor(p, dtype=torch.float64)
    after = before.clone().requires_grad_()
    after.grad = torch.tensor(gradient, dtype=torch.float64)
    LaProp([after], lr=1e9, betas=(0.0, 0.999), eps=1e9, clip=0.3, warmup=0).step()
    close(before - after, expected)


def test_adaptive_clipping_with_laprop_equals_golden_values():
    p = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    optimizer = LaProp([p], lr=0.1, warmup=0, clip=0.3)
    for gradient, expected in (([6.0, 8.0], [2.9, 3.9]), ([0.3, -0.4], [2.829089, 3.876174])):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        close(p, expected)


@pytest.mark.parametrize("kind", ["linear", "conv", "block"])
def test_initial_kernels_have_the_references_spread(kind):
    torch.manual_seed(0)
    layer, fan_in = {
        "linear": (Linear(400, 500), 400),
        "conv": (Conv(40, 60), 1000),
        "block": (BlockLinear(800, 800, 8, shared=100), 1600),
    }[kind]
    std = layer.weight.std().item()
    assert std == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)
    assert layer.weight.abs().max() <= 2.2737 / math.sqrt(fan_in)
    assert not layer.bias.any()


IMAGE_COUNTS = {  # enc, dyn, dec, rew, con, pol, val, total for image (3, 64, 64) and 18 discrete actions
    "size1m": (14_304, 377_472, 80_595, 57_663, 41_153, 50_706, 66_111, 688_004),
    "size12m": (220_416, 5_982_720, 1_272_003, 721_407, 656_129, 792_594, 853_503, 10_498_772),
    "size25m": (493_824, 13_446_912, 2_857_635, 1_573_503, 1_475_713, 1_778_706, 1_869_951, 23_496_244),
    "size50m": (876_032, 23_892_992, 5_076_355, 2_753_279, 2_622_977, 3_158_034, 3_279_615, 41_659_284),
    "size100m": (1_966_848, 53_730_816, 11_413_059, 6_095_871, 5_900_545, 7_096_338, 7_278_591, 93_482_068),
    "size200m": (3_492_864, 95_496_192, 20_282_115, 10_749_183, 10_488_833, 12_607_506, 12_850_431, 165_967_124),
    "size400m": (7_850_496, 214_809_600, 45_617_283, 23_987_967, 23_597_569, 28_348_434, 28_712_703, 372_924_052),
}
VECTOR_COUNTS = {  # enc, dyn, dec, pol, total for 24 numbers in three keys and 6 continuous actions
    "size1m": (10_112, 364_416, 51_096, 50_316, 640_867),
    "size12m": (138_752, 5_783_040, 794_136, 791_052, 9_738_019),
    "size25m": (306_432, 12_999_936, 1_781_016, 1_776_396, 21_782_947),
    "size50m": (539_648, 23_100_416, 3_161_112, 3_154_956, 38_612_003),
    "size100m": (1_202_688, 51_952_128, 7_100_952, 7_091_724, 86_622_499),
    "size200m": (2_127_872, 92_338_176, 12_613_656, 12_601_356, 153_769_507),
    "size400m": (4_764_672, 207_713_280, 28_357_656, 28_339_212, 345_473_059),
}
WALKER = {"orientations": (14,), "height": (), "velocity": (9,)}


def counts(shape, action_dim, size, classes=()):
    """Of all parts, and their total: everything that learns, so without the slow critic."""
    with torch.device("meta"):
        model = DreamerV3WorldModel(shape, action_dim, DreamerV3Config(**SIZES[size]))
        behaviour = Behaviour(model, classes)
    parts = (model.encoder, model.rssm, model.decoder, model.reward, model.continues, behaviour.policy, behaviour.value)
    learned = [p for module in (model, behaviour) for p in module.parameters() if p.requires_grad]
    return (*(sum(p.numel() for p in part.parameters()) for part in parts), sum(p.numel() for p in learned))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_equal_the_reference(size):
    assert counts((3, 64, 64), 18, size, (18,)) == IMAGE_COUNTS[size]
    encoder, rssm, decoder, policy, total = VECTOR_COUNTS[size]
    reward, continues, value = (IMAGE_COUNTS[size][i] for i in (3, 4, 6))
    assert counts(WALKER, 6, size) == (encoder, rssm, decoder, reward, continues, policy, value, total)


def test_parameter_counts_of_other_observations_equal_the_reference():
    gray = counts((1, 96, 96), 18, "size12m", (18,))
    assert (gray[:3], gray[-1]) == ((218_816, 6_310_400, 2_256_001), 11_808_850)
    assert counts((1, 96, 96), 18, "size200m", (18,))[-1] == 186_936_082
    cartpole = counts((4,), 2, "size12m", (2,))
    assert (cartpole[:3], cartpole[5], cartpole[-1]) == ((133_632, 5_782_016, 788_996), 788_482, 9_724_165)
    both = counts({**WALKER, "image": (3, 64, 64)}, 6, "size12m")
    assert (both[:3], both[-1]) == ((359_168, 6_045_184, 2_066_139), 11_492_582)
