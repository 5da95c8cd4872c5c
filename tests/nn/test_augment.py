from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from unfused.nn.augment import (
    AudioAugment,
    CepstralLift,
    ImageAugment,
    LogMixupExp,
    Masks,
    NoiseFloor,
    RandomResizeCrop,
    Recenter,
    SpectralTilt,
    Warp,
    warp,
)

LOG_MEL_MODULES = [
    LogMixupExp,
    RandomResizeCrop,
    Warp,
    SpectralTilt,
    Masks,
    NoiseFloor,
    CepstralLift,
    Recenter,
    AudioAugment,
    lambda: AudioAugment("byola"),
    lambda: AudioAugment("sound"),
    lambda: AudioAugment(time_bend=0.05, noise=-1.0, cepstra=12),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", LOG_MEL_MODULES)
def test_a_log_mel_module_leaves_its_input_alone_and_is_the_identity_in_eval_mode(make):
    x = torch.randn(6, 1, 20, 16)
    before, module = x.clone(), make()
    module(x)
    out = module(x)
    assert x.equal(before) and out.shape == x.shape and not out.equal(x) and out.isfinite().all()
    assert module.eval()(x) is x


@pytest.mark.parametrize("make", [make for make in LOG_MEL_MODULES if make is not Recenter])
def test_every_item_gets_its_own_draw(make):
    module = make()
    module(torch.randn(6, 1, 20, 16))
    out = module(torch.randn(1, 1, 20, 16).expand(6, -1, -1, -1))
    assert len(torch.unique(out.flatten(1), dim=0)) == 6


@pytest.mark.parametrize("make", LOG_MEL_MODULES)
def test_a_resumed_module_goes_on_exactly_where_it_stopped(make):
    module, resumed = make(), make()
    batches = torch.randn(3, 5, 1, 20, 16)
    module(batches[0])
    state, rng = {name: value.clone() for name, value in module.state_dict().items()}, torch.get_rng_state()
    expected = [module(batch) for batch in batches[1:]]
    resumed.load_state_dict(state)
    torch.set_rng_state(rng)
    assert all(resumed(batch).equal(out) for batch, out in zip(batches[1:], expected, strict=True))


def test_autocast_does_not_lower_the_precision():
    x, module = torch.randn(4, 1, 40, 32), Warp()
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).equal(expected)


def test_log_mels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="batch, 1, mels, frames"):
        AudioAugment()(torch.zeros(2, 40, 32))


# Log-mixup-exp


def explains(out, x, z, alpha):
    """Whether out = log((1 - l) exp x + l exp z + eps) for one l in [0, alpha]."""
    share = (out.exp() - torch.finfo(torch.float32).eps - x.exp()) / (z.exp() - x.exp())
    return share.std() < 1e-3 and -1e-4 <= share.mean() <= alpha + 1e-4


def test_mixup_takes_one_share_of_one_of_the_last_clips():
    module, seen = LogMixupExp(alpha=0.4, bank=7), []
    for step in range(6):
        x = torch.randn(4, 1, 5, 4)
        out = module(x)
        if step == 0:
            assert out.equal(x)
        else:
            for mixed, clip in zip(out, x, strict=True):
                assert sum(explains(mixed, clip, earlier, 0.4) for earlier in seen[-7:]) == 1
        seen += list(x)
    assert int(module.seen) == 24
    assert torch.unique(module.bank, dim=0).equal(torch.unique(torch.stack(seen[-7:]), dim=0))


def test_mixup_reaches_the_whole_bank_and_range_of_shares():
    module = LogMixupExp(alpha=0.4, bank=5)
    module(torch.arange(1.0, 6).reshape(5, 1, 1, 1).expand(5, 1, 1, 2) * torch.tensor([1.0, 2.0]))
    out = module(torch.zeros(2000, 1, 1, 2)).exp() - torch.finfo(torch.float32).eps
    ratio = (out[:, 0, 0, 1] - 1) / (out[:, 0, 0, 0] - 1)  # exp(c) + 1 for the clip with level c
    level = (ratio - 1).log()
    share = (out[:, 0, 0, 0] - 1) / (level.exp() - 1)
    clear = share > 0.01  # the ratio of two tiny numbers says nothing
    assert level[clear].round().unique().tolist() == [1, 2, 3, 4, 5]
    assert share.max() < 0.401 and abs(share[clear].mean() - 0.205) < 0.01


def test_a_batch_larger_than_the_bank_leaves_its_last_clips():
    module, x = LogMixupExp(bank=3), torch.randn(8, 1, 2, 2)
    module(x)
    assert torch.unique(module.bank, dim=0).equal(torch.unique(x[-3:], dim=0))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\), got \(1, 2, 3\)"):
        module(torch.zeros(1, 1, 2, 3))


# Random resize crop


def naive_crop(x, top, left, height, width, canvas):
    rows, columns = int(canvas[0] * x.shape[0]), int(canvas[1] * x.shape[1])
    area = torch.zeros(rows, columns)
    y0, x0 = (rows - x.shape[0]) // 2, (columns - x.shape[1]) // 2
    area[y0 : y0 + x.shape[0], x0 : x0 + x.shape[1]] = x
    box = area[top : top + height, left : left + width]
    return F.interpolate(box[None, None], x.shape, mode="bicubic", align_corners=True)[0, 0]


@pytest.mark.parametrize("canvas", [(1.0, 1.5), (1.3, 1.0)])
def test_every_crop_is_one_of_the_boxes_that_the_card_allows(canvas):
    mels, frames, scale = 7, 9, (0.6, 1.5)
    x = torch.randn(mels, frames)
    rows, columns = int(canvas[0] * mels), int(canvas[1] * frames)
    boxes, outputs = [], []
    for height in range(int(0.6 * mels), min(rows, int(1.5 * mels)) + 1):
        for width in range(int(0.6 * frames), min(columns, int(1.5 * frames)) + 1):
            for top in range(rows - height + 1):
                for left in range(columns - width + 1):
                    boxes.append((top, left, height, width))
                    outputs.append(naive_crop(x, *boxes[-1], canvas).flatten())
    out = RandomResizeCrop(canvas, scale)(x.expand(1000, 1, -1, -1)).flatten(1)
    distance, nearest = (out[:, None] - torch.stack(outputs)).abs().amax(2).min(1)
    assert distance.max() < 1e-4
    found = torch.tensor([boxes[k] for k in nearest.tolist()])
    for column in range(4):
        assert set(found[:, column].tolist()) == {box[column] for box in boxes}


# Warp


def naive_warp(x, frequency, frequency_shift, time, time_shift, bends):
    """One clip through grid_sample: coordinates of -1..1 along both axes."""
    mels, frames = x.shape
    u, v = torch.linspace(0, 1, mels), torch.linspace(0, 1, frames)
    rows = 2 * (u * frequency + frequency_shift) - 1
    columns = (2 * v - 1) * time + 2 * time_shift
    for k, bend in enumerate(bends, 1):
        columns = columns + 2 * bend * torch.sin(math.pi * k * v)
    grid = torch.stack([columns.expand(mels, -1), rows[:, None].expand(-1, frames)], -1)[None]
    return F.grid_sample(x[None, None], grid, padding_mode="border", align_corners=True)[0, 0]


def test_warp_equals_grid_sample_clip_by_clip():
    x = torch.randn(8, 1, 20, 16)
    parameters = torch.rand(4, 8) * torch.tensor([0.6, 0.4, 0.6, 0.4])[:, None]
    frequency, frequency_shift, time, time_shift = parameters + torch.tensor([0.7, -0.2, 0.7, -0.2])[:, None]
    bends = torch.randn(8, 2) * 0.1
    out = warp(x, frequency, frequency_shift, time, time_shift, bends)
    for i in range(8):
        expected = naive_warp(x[i, 0], frequency[i], frequency_shift[i], time[i], time_shift[i], bends[i])
        torch.testing.assert_close(out[i, 0], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(warp(x), x)


def test_warp_draws_the_range_it_promises():
    ramp = torch.linspace(0, 1, 41)
    x = (ramp[:, None] + 10 * ramp).expand(4000, 1, -1, -1)  # the value tells where it was read

    out = Warp(frequency=0.2, time=0.0, frequency_shift=0.0, time_shift=0.0)(x)[:, 0]
    scale = (out[:, 20, 0] - out[:, 0, 0]) * 2
    assert abs(scale.min() - 0.8) < 0.005 and abs(scale.max() - 1.2) < 0.005 and abs(scale.mean() - 1) < 0.01

    out = Warp(frequency=0.0, time=0.0, frequency_shift=0.1, time_shift=0.1)(x)[:, 0, 20]
    shift = (out - x[:, 0, 20])[:, 20]  # of frequency + 10 * of time
    assert abs(shift.max() - 1.1) < 0.05 and abs(shift.min() + 1.1) < 0.05

    bent = Warp(frequency=0.0, time=0.0, frequency_shift=0.0, time_shift=0.0, time_bend=0.05)(x)[:, 0, 0]
    move = (bent - x[:, 0, 0])[:, [10, 20, 30]] / 10
    assert abs(move[:, 1].std() - 0.05) < 0.003  # the middle sees the first bend only
    assert abs((move[:, 0] - move[:, 2]).std() - 0.05) < 0.003  # 2 x 0.025


# Spectra, masks, level


def cosines(mels, count):
    return torch.cos(math.pi / mels * (torch.arange(mels) + 0.5) * torch.arange(count)[:, None])


def test_tilt_adds_a_smooth_spectrum_of_the_given_strength():
    x = torch.randn(3000, 1, 24, 5)
    added = (SpectralTilt(0.5, (1.0, 0.4))(x) - x)[:, 0]
    torch.testing.assert_close(added, added[..., :1].expand_as(added), atol=1e-5, rtol=0)
    amounts = added[..., 0] @ cosines(24, 24).T / 12
    assert amounts[:, [0, *range(3, 24)]].abs().max() < 1e-5
    torch.testing.assert_close(amounts[:, 1:3].std(0), torch.tensor([0.5, 0.2]), rtol=0.05, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_masks_zero_whole_bands_and_nothing_else(count):
    x = torch.rand(2000, 1, 40, 32) + 1
    out = Masks(0.2, 0.1875, count)(x)[:, 0]
    masked = out == 0
    rows, columns = masked.all(2), masked.all(1)
    assert masked.equal(rows[:, :, None] | columns[:, None, :])
    assert out[~masked].equal(x[:, 0][~masked])
    for bands, widest in ((rows, 8), (columns, 6)):
        starts = (bands[:, 1:] & ~bands[:, :-1]).sum(1) + bands[:, 0]
        assert starts.max() == count or (count > 1 and 1 < starts.max() <= count)
        assert bands.sum(1).max() in range(widest - 1, widest * count + 1)
        assert (bands.sum(0) > 0).all()  # every bin is masked in some clip


def test_noise_floor_fills_the_valleys_and_spares_the_peaks():
    x = torch.full((300, 1, 20, 10), -6.0)
    x[..., 5:] = 12
    out = NoiseFloor(level=0.0)(x)
    assert (out >= x).all() and (out - x)[..., 5:].max() < 0.1
    level = out[..., :5].mean((1, 2, 3))
    assert -4.5 < level.min() < -3 and -1 < level.max() < 1.5


def test_lift_scales_what_is_above_the_envelope_by_one_factor():
    x = torch.randn(400, 1, 20, 6)
    before, after = ((cosines(20, 20) @ clip[:, 0]) for clip in (x, CepstralLift(8)(x)))
    torch.testing.assert_close(after[:, :8], before[:, :8], atol=1e-4, rtol=0)
    factor = (after[:, 8:] * before[:, 8:]).sum((1, 2)) / before[:, 8:].square().sum((1, 2))
    torch.testing.assert_close(after[:, 8:], before[:, 8:] * factor[:, None, None], atol=1e-4, rtol=0)
    assert 0 <= factor.min() < 0.02 and 0.98 < factor.max() <= 1


def test_recenter_removes_the_level_of_each_clip():
    out = Recenter()(torch.randn(4, 1, 8, 8) + torch.arange(4.0).reshape(4, 1, 1, 1))
    assert out.mean((1, 2, 3)).abs().max() < 1e-6


# The chains


def test_the_chains_are_those_documented():
    def names(augment):
        return [type(module).__name__ for module in augment]

    assert names(AudioAugment()) == ["Warp", "SpectralTilt", "Masks", "Recenter"]
    assert names(AudioAugment(noise=0.0, cepstra=12))[::3] == ["CepstralLift", "NoiseFloor"]
    assert names(AudioAugment("byola", alpha=0.2)) == ["LogMixupExp", "RandomResizeCrop"]
    x = torch.randn(2, 1, 8, 8)
    assert AudioAugment("none")(x) is x


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AudioAugment("shout"), ValueError, "'byola', 'none', 'sound', 'voice'"),
        (lambda: AudioAugment("byola", tilt=1.0), TypeError, "it knows no tilt"),
        (lambda: LogMixupExp(alpha=1.0), ValueError, "alpha=1.0"),
        (lambda: LogMixupExp(bank=0), ValueError, "bank=0"),
        (lambda: RandomResizeCrop(canvas=(0.5, 1.0)), ValueError, "canvas"),
        (lambda: RandomResizeCrop(scale=(1.5, 0.6)), ValueError, "scale"),
        (lambda: Masks(frequency=8), ValueError, "frequency=8"),
        (lambda: CepstralLift(0), ValueError, "cepstra=0"),
        (lambda: ImageAugment(scale=(0.5, 2.0)), ValueError, "scale"),
        (lambda: ImageAugment(jitter=1.5), ValueError, "jitter=1.5"),
        (lambda: ImageAugment()(torch.zeros(2, 1, 8, 8)), ValueError, "batch, 3, height, width"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Pictures


STILL = {"scale": (1.0, 1.0), "flip": False, "rotation": 0.0, "jitter": 0.0, "hue": 0.0, "grayscale": 0.0}


def pictures(batch=8, side=16):
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)


def raw(augment, x):
    return x * augment.std + augment.mean


def test_normalised_pictures_are_changed_as_raw_ones_are():
    x, augment = pictures(), ImageAugment(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    torch.manual_seed(1)
    from_raw = augment(x)
    torch.manual_seed(1)
    from_normalised = augment((x / 255 - augment.mean) / augment.std)
    torch.testing.assert_close(from_normalised, from_raw, atol=1e-4, rtol=1e-4)
    assert -1e-5 <= raw(augment, from_raw).min() and raw(augment, from_raw).max() <= 1 + 1e-5
    assert len(torch.unique(augment(x[:1].expand(6, -1, -1, -1)).flatten(1), dim=0)) == 6


def test_eval_mode_only_resizes_and_normalises():
    x, augment = pictures(), ImageAugment(24).eval()
    expected = F.interpolate(x / 255, (24, 24), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(raw(augment, augment(x)), expected)
    normalised = torch.randn(2, 3, 24, 24)
    assert augment(normalised) is normalised


def test_characters_are_never_mirrored():
    x = torch.zeros(400, 3, 16, 16, dtype=torch.uint8)
    x[..., :8] = 255
    for flip, mirrored in ((False, 0.0), (True, 0.5)):
        out = ImageAugment(**(STILL | {"flip": flip}))(x)
        share = (out[..., :8].mean((1, 2, 3)) < out[..., 8:].mean((1, 2, 3))).float().mean()
        assert abs(share - mirrored) < 0.1 * flip + 1e-6


def test_crops_have_the_area_and_ratio_promised():
    ramp = torch.linspace(-1, 1, 64) * 63 / 64  # pixel centres
    x = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)])
    augment = ImageAugment(**(STILL | {"scale": (0.3, 0.6)}), mean=(0, 0, 0), std=(1, 1, 1))
    out = augment._cut(x.expand(2000, -1, -1, -1), 64)
    width = out[:, 0, 32, 48] - out[:, 0, 32, 16]
    height = out[:, 1, 48, 32] - out[:, 1, 16, 32]
    area, ratio = width * height, width / height
    assert 0.299 < area.min() < 0.305 and 0.595 < area.max() < 0.601
    assert 0.749 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.334


def test_rotation_turns_about_the_centre():
    x = torch.zeros(1, 3, 33, 33)
    x[..., 16, 22] = 1  # right of the centre
    augment = ImageAugment(**(STILL | {"rotation": 90.0}), mean=(0, 0, 0), std=(1, 1, 1))
    out = augment._cut(x.expand(200, -1, -1, -1), 33)[:, 0]
    peak = out.flatten(1).argmax(1)
    radius = ((peak // 33 - 16).square() + (peak % 33 - 16).square()).float().sqrt()
    assert ((radius > 3) & (radius < 10)).all()  # 6, moved and stretched a little by the crop's ratio
    assert (peak // 33).unique().numel() > 8


def test_colours():
    x, luma = torch.rand(500, 3, 6, 6) * 0.4 + 0.3, torch.tensor([0.299, 0.587, 0.114])
    grey = (x * luma[:, None, None]).sum(1, keepdim=True).expand_as(x)

    torch.testing.assert_close(ImageAugment(**(STILL | {"grayscale": 1.0}))._colour(x), grey)
    torch.testing.assert_close(ImageAugment(**STILL)._colour(x), x)
    turned = ImageAugment(**(STILL | {"hue": 0.5}))._colour(x)
    torch.testing.assert_close(turned.mean(1), x.mean(1))  # about the grey axis
    torch.testing.assert_close(turned.std(1), x.std(1), atol=1e-4, rtol=1e-4)
    # A grey picture keeps its hue and saturation; brightness scales it, contrast spreads it about its mean.
    out = ImageAugment(**(STILL | {"jitter": 0.4}))._colour(grey)
    torch.testing.assert_close(out[:, 0], out[:, 1], atol=1e-5, rtol=1e-5)
    brightness = out.mean((1, 2, 3)) / grey.mean((1, 2, 3))
    contrast = out.std((1, 2, 3)) / grey.std((1, 2, 3)) / brightness
    for factor in (brightness, contrast):
        assert 0.6 <= factor.min() + 1e-3 < 0.63 and 1.37 < factor.max() <= 1.401
