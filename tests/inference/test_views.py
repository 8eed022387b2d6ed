"""Views: identity, flips, scales against a plain loop, states per view, limits, memory."""

import gc

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from tolerances import assert_close
from toy_segmentor import ToySegmentor

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.data.augmentation import fit_size, resize_image, round_up
from the_mask.data.clips import Clip
from the_mask.inference import MultiView, SlidingWindow, StreamingSegmentor
from the_mask.inference.views import View, make_views
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.scores import resize_scores
from the_mask.modeling.stream import Hints


def frame(height=30, width=44, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def real(config="debug/mask2former_debug"):
    cfg = load_config(f"configs/{config}.yaml", ["MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    return cfg, build_model(cfg).eval()


@pytest.fixture(scope="module", autouse=True)
def _root(tmp_path_factory):
    from pathlib import Path

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).resolve().parents[2])
        yield


@pytest.mark.parametrize("config", ["debug/mask2former_debug", "debug/the_mask_debug_video"])
def test_identity_view_equals_plain_inference(config):
    cfg, model = real(config)
    plain = {out: StreamingSegmentor(cfg, model=model, output=out) for out in ("labels", "scores")}
    for output, stream in plain.items():
        runner = MultiView.from_config(cfg, model, output)
        state, expected_state = runner.init_state(), stream.init_state()
        for seed in range(3):
            result, state = runner.step(frame(57, 90, seed), state)
            expected, expected_state = stream.step(frame(57, 90, seed), expected_state)
            if output == "labels":
                assert torch.equal(result, expected)
            else:
                assert_close(result, expected, "sum")


def test_identity_view_of_clips_equals_predict():
    _, model = real("debug/the_mask_debug_video")
    frames = [torch.from_numpy(frame(64, 64, seed)).permute(2, 0, 1).contiguous() for seed in range(2)]
    clip = Clip(frames, height=40, width=50)
    runner = MultiView(model, box=(64, 64), size_multiple=64)
    expected = model.predict([clip])[0]
    for result, labels in zip(runner.predict([clip])[0], expected, strict=True):
        assert result.dtype == labels.dtype
        assert torch.equal(result, labels)


@pytest.mark.parametrize(("stride", "width"), [(1, 44), (1, 45), (4, 44), (4, 45)])
def test_flip_of_a_symmetric_model_is_exact(stride, width):
    model = ToySegmentor(stride=stride)
    plain, _ = MultiView(model, output="scores").step(frame(30, width), MultiView(model).init_state())
    both = MultiView(model, make_views([1.0], True), output="scores")
    flipped, _ = both.step(frame(30, width), both.init_state())
    only = MultiView(model, [View(1.0, True)], output="scores")
    mirrored, _ = only.step(frame(30, width), only.init_state())
    if width % stride == 0:
        assert torch.equal(flipped, plain)
        assert torch.equal(mirrored, plain)
    else:
        # The last, partial column of cells is padded on one side and then on the other: turned back at frame size.
        pixels = torch.from_numpy(frame(30, width)).permute(2, 0, 1).flip(-1)
        (scores,) = model.score_maps([Clip([pixels])])
        expected = resize_scores(scores[0], (30, width), (30, width), stride).flip(-1)
        assert_close(mirrored, expected, "unit")
        assert_close(flipped, (plain + expected) / 2, "unit")


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("normalization", ["none", "softmax"])
def test_views_equal_a_loop(mean, normalization):
    model = ToySegmentor(num_classes=5, stride=4, sharpness=0.02)
    scales, box, multiple = (0.5, 1.0, 1.75), (64, 40), 8
    runner = MultiView(
        model,
        make_views(scales, True),
        box=box,
        size_multiple=multiple,
        normalization=normalization,
        mean=mean,
        output="scores",
    )
    picture = frame(50, 70)
    result, _ = runner.step(picture, runner.init_state())
    maps = []
    for scale in scales:
        size = round_up(fit_size(50, 70, box, scale), multiple)
        pixels = torch.from_numpy(resize_image(picture, size).transpose(2, 0, 1).copy())
        for mirrored in (False, True):
            (scores,) = model.score_maps([Clip([pixels.flip(-1) if mirrored else pixels])])
            full = resize_scores(scores[0], size, (50, 70), 4)
            full = full.flip(-1) if mirrored else full
            maps.append((full.softmax(0) if normalization == "softmax" else full).double())
    stacked = torch.stack(maps)
    expected = stacked.mean(0) if mean == "arithmetic" else stacked.log().mean(0).exp()
    assert_close(result, expected, "sum")
    assert model.sizes[0] == (24, 32)


def test_views_of_clips_read_the_files_again(tmp_path):
    picture = frame(50, 70)
    Image.fromarray(picture).save(tmp_path / "0.png")
    model = ToySegmentor(stride=4)
    runner = MultiView(model, make_views([0.5, 1.0], True), box=(64, 40), size_multiple=8, output="scores")
    size = round_up(fit_size(50, 70, (64, 40)), 8)
    pixels = torch.from_numpy(resize_image(picture, size).transpose(2, 0, 1).copy())
    clip = Clip([pixels], height=50, width=70, file_names=[str(tmp_path / "0.png")])
    stream, _ = runner.step(picture, runner.init_state())
    assert torch.equal(runner.clip_scores(clip)[0], stream)


def test_every_view_has_its_own_state():
    model = ToySegmentor(memory=0.5)
    runner = MultiView(model, make_views([1.0, 2.0], True), output="scores")
    state = runner.init_state()
    for seed in range(3):
        merged, state = runner.step(frame(seed=seed), state)
    alone = []
    for view in runner.views:
        single = MultiView(model, [view], output="scores")
        own = single.init_state()
        for seed in range(3):
            scores, own = single.step(frame(seed=seed), own)
        alone.append(scores)
    assert_close(merged, torch.stack(alone).mean(0), "unit")
    assert len(state["views"]) == 4
    _, state = runner.step(frame(20, 20), state)
    assert state["resets"] == 1


def test_priors_take_the_geometry_of_the_view():
    model = ToySegmentor()
    prior = PriorMap.from_labels(torch.randint(0, 3, (1, 30, 44), generator=torch.Generator().manual_seed(3)), 3)
    runner = MultiView(model, make_views([1.0], True), output="scores")
    result, _ = runner.step(frame(), runner.init_state(), Hints(prior=prior))
    pixels = torch.from_numpy(frame().transpose(2, 0, 1).copy())
    assert_close(result, model.step(pixels, model.init_state(), Hints(prior=prior))[0], "unit")


def test_windows_inside_views():
    model = ToySegmentor(stride=4)
    views = make_views([1.0, 2.0], True)
    plain = MultiView(model, views, size_multiple=8, output="scores")
    windowed = MultiView(SlidingWindow(model, (16, 24)), views, size_multiple=8, output="scores")
    expected, _ = plain.step(frame(32, 48), plain.init_state())
    result, _ = windowed.step(frame(32, 48), windowed.init_state())
    assert_close(result, expected, "unit")


def test_scales_below_the_minimum():
    model = ToySegmentor()
    views = make_views([0.5, 1.0], False)
    runner = MultiView(model, views, box=(80, 40), min_short_edge=40)
    with pytest.raises(ValueError, match=r"SCALES 0\.5 .*20x29.*minimum of 40 pixels.*PARITY"):
        runner.step(frame(), runner.init_state())
    clamped = MultiView(model, views, box=(80, 40), min_short_edge=40, parity="mmseg")
    clamped.step(frame(), clamped.init_state())
    # Both run at the size of scale 1: the short edge is the box's 40.
    assert model.sizes == [(40, 59)] * 2
    model.size_divisibility = 32
    with pytest.raises(ValueError, match="minimum of 32"):
        MultiView(model, [View(0.1)]).step(frame(64, 64), MultiView(model, [View(0.1)]).init_state())


def test_mmseg_parity_is_a_second_softmax():
    model = ToySegmentor()
    runner = MultiView(model, parity="mmseg", output="scores")
    plain = MultiView(model, output="scores")
    torch.testing.assert_close(
        runner.step(frame(), runner.init_state())[0], plain.step(frame(), plain.init_state())[0].softmax(0)
    )


def test_one_score_map_and_one_view_at_a_time():
    """However many views, the score maps alive during a forward pass are the running sum and nothing else."""

    class Counting(ToySegmentor):
        alive = ()

        def scores(self, pixels):
            gc.collect()
            sizes = [o.numel() for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() >= 3 * 64 * 64]
            self.alive = (*self.alive, len(sizes))
            return super().scores(pixels)

    model = Counting()
    runner = MultiView(model, make_views([1.0, 1.25, 1.5, 1.75], True), output="scores")
    gc.collect()
    before = sum(type(o) is torch.Tensor and o.numel() >= 3 * 64 * 64 for o in gc.get_objects())
    state = runner.init_state()
    # States of a memoryless model: drop them, so that only the runner's own tensors count.
    model.step_result = None
    runner.model.step = lambda pixels, state, hints: (model.scores(pixels), {})
    runner.step(frame(64, 64), state)
    # The frame's pixels, and from the second view on the sum.
    assert max(model.alive) - before <= 3
    assert len(set(model.alive[1:])) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": "harmonic"}, "MEAN 'harmonic'"),
        ({"normalization": "l2"}, "NORMALIZE 'l2'"),
        ({"parity": "paddle"}, "PARITY 'paddle'"),
        ({"output": "pictures"}, "output"),
        ({"views": []}, "at least one view"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MultiView(ToySegmentor(), **options)
    with pytest.raises(ValueError, match="SCALES"):
        make_views([1.0, 0.0], False)


def test_foreign_states_and_frames():
    runner = MultiView(ToySegmentor(), make_views([1.0], True))
    with pytest.raises(ValueError, match="not a state"):
        runner.step(frame(), {})
    with pytest.raises(ValueError, match="1 views, but there are 2"):
        runner.step(frame(), MultiView(ToySegmentor()).init_state())
    with pytest.raises(ValueError, match="uint8 RGB"):
        runner.step(frame().astype(np.float32), runner.init_state())
