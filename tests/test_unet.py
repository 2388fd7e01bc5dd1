import pytest
import torch
from helpers import close

from unet import (
    PRESETS,
    Attention,
    InItsDtype,
    Stage,
    UNet,
    UNetConfig,
    attention,
    coordinate_channels,
    timestep_embedding,
)

SMALL = UNetConfig(in_channels=4, channels=(32, 32, 64), time_dim=64, text_dim=16, n_heads=4, dropout=0.0)


def small(**changes):
    torch.manual_seed(0)
    net = UNet(UNetConfig(**{**vars(SMALL), **changes})).eval()
    for p in net.parameters():  # fresh exits are zero; a test wants a network that answers
        torch.nn.init.normal_(p, std=0.15)
    return net


def inputs(b=2, n=5):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(b, 4, 8, 8, generator=g), torch.tensor([3, 700][:b]),
            torch.randn(b, n, 16, generator=g))


def test_the_papers_sizes_to_the_last_parameter():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(PRESETS["paper"]).parameters()) == 326_526_728
        assert sum(p.numel() for p in UNet(UNetConfig(self_conditioning=False)).parameters()) == 326_508_296


def test_a_fresh_network_answers_zero():
    assert UNet(SMALL)(*inputs()).abs().max() == 0


def test_self_cond_reaches_the_network():
    net, x = small(), inputs()
    zeros = torch.zeros_like(x[0])
    assert torch.equal(net(*x), net(*x, self_cond=zeros))
    assert not torch.allclose(net(*x), net(*x, self_cond=x[0]), atol=1e-4)
    with pytest.raises(ValueError, match="self_conditioning"):
        small(self_conditioning=False)(*x, self_cond=zeros)


def test_masked_words_are_not_looked_at_but_count_in_the_pooled_query():
    x_t, t, text = inputs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    block = Attention(32, 16, n_heads=4)
    q = torch.randn(2, 7, 32)
    other = text.clone()
    other[0, 3:] = 9.0
    torch.testing.assert_close(block(q, text, mask.bool()), block(q, other, mask.bool()))
    net = small()
    torch.testing.assert_close(net(x_t, t, text, torch.ones(2, 5)), net(x_t, t, text))
    assert not torch.allclose(net(x_t, t, text, mask)[0], net(x_t, t, other, mask)[0],
                              atol=1e-5)  # by the mean over all positions


@torch.no_grad()
def test_a_remembered_text_is_read_once():
    net, (x_t, t, text), mask = small(), inputs(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    predict, calls = InItsDtype(net), []
    for name, layer in net.named_modules():
        if name.startswith("text_") or name.endswith(("to_k", "to_v")):
            layer.register_forward_hook(lambda *args, name=name: calls.append(name))
    condition = predict.remember(text, mask)
    for step in range(3):
        close(predict(x_t + step, t, *condition, x_t), net(x_t + step, t, text, mask, x_t), 0)
    assert len(calls) == 4 * len(set(calls)) and len(set(calls)) > 20  # once, and three times without
    other = predict.remember(text + 1, mask)
    assert (predict(x_t, t, *other) - net(x_t, t, text, mask)).abs().max() > 1e-3


def test_a_residual_text_is_heard_where_its_layers_are_silent():
    x_t, t, text = inputs()
    for residual in (False, True):
        net = small(text_residual=residual)
        net.text_mlp[1].register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        assert torch.equal(net(x_t, t, text), net(x_t, t, -2 * text)) != residual


def test_coordinates_say_where_a_pixel_lies():
    where = coordinate_channels(torch.zeros(2, 3, 5, 9))
    assert where.shape == (2, 4, 5, 9) and torch.equal(where[0], where[1])
    torch.testing.assert_close(where[0, :, 0, 0],
                               torch.tensor([-1.0, -1, -1, -1]))   # upper left: x, y, cos pi x, cos pi y
    torch.testing.assert_close(where[0, :, 0, 8], torch.tensor([1.0, -1, -1, -1]))    # upper right
    torch.testing.assert_close(where[0, :, 2, 4], torch.tensor([0.0, 0, 1, 1]))       # centre
    assert small(coord_conv=True).conv_in.in_channels == small().conv_in.in_channels + 4
    assert small(coord_conv=True)(*inputs()).shape == inputs()[0].shape


def test_positions_attend_to_each_other_at_all_levels_but_the_finest():
    net, sides = small(channels=(32, 32, 64, 64), self_attention=True), []
    blocks = [m.image for m in net.modules() if isinstance(m, Stage) and m.image is not None]
    for block in blocks:
        torch.nn.init.zeros_(block.attention.to_q.weight)  # all positions are looked at alike
        torch.nn.init.zeros_(block.feed_forward[2].weight)
        block.register_forward_hook(lambda module, args, out: sides.append((args[0], out)))
    net(*inputs())
    assert [x.shape[-1] for x, _ in sides] == [4, 4, 2, 2, 2, 2, 2, 2, 4, 4, 4]
    for x, out in sides:
        mean = (out - x).mean((2, 3), keepdim=True)
        assert mean.abs().max() > 1e-3
        close(out - x, mean.expand_as(x), 1e-4)
    assert not [m for m in small().modules() if isinstance(m, Stage) and m.image is not None]


def test_attention_is_softmax_of_scaled_products():
    q, k, v = (torch.randn(2, n, 8) for n in (3, 5, 5))
    split = [y.view(2, -1, 2, 4).transpose(1, 2) for y in (q, k, v)]
    expected = ((split[0] @ split[1].mT / 2).softmax(-1) @ split[2]).transpose(1, 2).reshape(2, 3, 8)
    torch.testing.assert_close(attention(q, k, v, n_heads=2), expected)


def test_sinusoidal_starts_at_sine_zero_cosine_one():
    torch.testing.assert_close(timestep_embedding(torch.tensor([0]), 8),
                               torch.tensor([[0.0] * 4 + [1.0] * 4]))
    assert timestep_embedding(torch.tensor([1]),
                              8)[0, 3].item() == pytest.approx(1e-4, rel=1e-3)  # the slowest: 10000^-1


@pytest.mark.parametrize("wrong", [{"channels": (48, 64)}, {"time_dim": 100}])
def test_widths_that_do_not_divide_are_refused(wrong):
    with pytest.raises(ValueError, match="divisible"):
        UNetConfig(**wrong)
