"""Streams: equal to clips of the same window, one feature pass per frame, bounded and serialisable state."""

import gc
import io
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from tolerances import assert_close

import the_mask.modeling  # noqa: F401
from the_mask.config import load_config
from the_mask.data.augmentation import fit_size, resize_image, round_up
from the_mask.data.clips import Clip
from the_mask.inference import StreamingSegmentor
from the_mask.modeling.scores import resize_scores

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "debug"


def config(length, stride, name="the_mask_debug_video", **changes):
    overrides = ["MODEL.DEVICE", "cpu", "TEST.CLIP_LENGTH", str(length), "TEST.CLIP_STRIDE", str(stride)]
    for key, value in changes.items():
        overrides += [key, str(value)]
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def build(length, stride, name="the_mask_debug_video", **changes):
    torch.manual_seed(0)
    return build_model(config(length, stride, name, **changes)).eval()


def video(frames, height=64, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator))


def tensors(value):
    """All tensors in a nested state."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [t for child in children for t in tensors(child)]


def loop_window(newest, length, stride):
    """Positions of a window, by counting back from the newest frame."""
    positions = [newest]
    while len(positions) < length and positions[0] - stride >= 0:
        positions.insert(0, positions[0] - stride)
    return positions


@pytest.mark.parametrize("decoder", ["TemporalAggregationDecoder", "MaskedAttentionDecoder"])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (2, 1), (2, 3), (4, 2)])
def test_stream_equals_the_clip_of_its_window(decoder, length, stride):
    model = build(length, stride, **{"MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": decoder})
    frames = video(9)
    state = model.init_state()
    for newest, frame in enumerate(frames):
        scores, state = model.step(frame, state)
        clip = Clip([frames[i] for i in loop_window(newest, length, stride)])
        (expected,) = model.score_maps([clip])
        assert_close(scores, expected[-1], "sum")


def test_context_changes_the_result():
    """Else the equality above would say little."""
    model = build(2, 1)
    first, second, other = video(3)
    results = []
    for before in (first, other):
        _, state = model.step(before, model.init_state())
        results.append(model.step(second, state)[0])
    assert not torch.allclose(results[0], results[1], atol=1e-4)


def test_features_are_computed_once_per_frame():
    model = build(4, 1)
    shapes: list[object] = []
    model.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    model.sem_seg_head.pixel_decoder.register_forward_hook(lambda *_: shapes.append("pixel decoder"))
    state = model.init_state()
    for frame in video(6):
        _, state = model.step(frame, state)
    assert shapes == [(1, 3, 64, 64), "pixel decoder"] * 6


def test_state_is_not_changed_in_place():
    model = build(2, 1)
    frames = video(3)
    _, before = model.step(frames[0], model.init_state())
    kept = [t.clone() for t in tensors(before)]
    once, _ = model.step(frames[1], before)
    model.step(frames[2], before)
    again, _ = model.step(frames[1], before)
    assert torch.equal(once, again)
    assert before["seen"] == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(before), strict=True))


def test_streams_do_not_mix():
    model = build(2, 1)
    videos = [video(3, seed=1), video(3, 96, 64, seed=2)]
    apart = []
    for frames in videos:
        state = model.init_state()
        for frame in frames:
            scores, state = model.step(frame, state)
        apart.append(scores)
    states = [model.init_state() for _ in videos]
    for index in range(3):
        for v, frames in enumerate(videos):
            scores, states[v] = model.step(frames[index], states[v])
            if index == 2:
                assert torch.equal(scores, apart[v])


def test_state_survives_a_file():
    model = build(2, 3)
    segmentor = StreamingSegmentor(config(2, 3), model=model)
    frames = [frame.permute(1, 2, 0).numpy() for frame in video(6, 60, 80)]
    state = segmentor.init_state()
    for frame in frames[:5]:
        _, state = segmentor.step(frame, state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(segmentor.step(frames[5], state)[0], segmentor.step(frames[5], loaded)[0])


def test_state_is_bounded():
    model = build(3, 2)
    state = model.init_state()
    sizes = []
    for frame in video(12):
        _, state = model.step(frame, state)
        sizes.append(sum(t.untyped_storage().nbytes() for t in tensors(state)))
    assert len(state["ring"]) == model.ring.capacity == 5
    assert state["seen"] == 12
    assert sizes[4] > sizes[3]
    assert set(sizes[4:]) == {sizes[4]}


def test_a_new_frame_size_starts_anew():
    model = build(2, 1)
    small, large = video(2), video(1, 96, 64, seed=5)
    state = model.init_state()
    for frame in small:
        _, state = model.step(frame, state)
    scores, state = model.step(large[0], state)
    assert torch.equal(scores, model.step(large[0], model.init_state())[0])
    assert state["seen"] == len(state["ring"]) == 1
    assert state["resets"] == 1
    assert state["size"] == [96, 64]


def test_segmentor_resets_on_a_new_source_size():
    """Also when both sizes are resized to the same network size."""
    segmentor = StreamingSegmentor(config(2, 1), model=build(2, 1))
    frames = [
        np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        for i, size in enumerate([(60, 80), (61, 81)])
    ]
    assert segmentor.network_size(60, 80) == segmentor.network_size(61, 81)
    _, state = segmentor.step(frames[0], segmentor.init_state())
    labels, state = segmentor.step(frames[1], state)
    assert torch.equal(labels, segmentor.step(frames[1], segmentor.init_state())[0])
    assert state["resets"] == 1


@pytest.mark.parametrize("as_tensor", [False, True])
def test_segmentor_equals_predict_on_the_mapped_frame(as_tensor):
    """Same resizing as the clip mapper's test clips, same label maps as the model's own."""
    cfg = config(1, 1)
    model = build(1, 1)
    segmentor = StreamingSegmentor(cfg, model=model)
    frame = np.random.default_rng(0).integers(0, 256, (57, 90, 3), dtype=np.uint8)
    size = round_up(fit_size(57, 90, (cfg.INPUT.TEST.LONG_EDGE, cfg.INPUT.TEST.SHORT_EDGE)), 32)
    mapped = torch.from_numpy(np.ascontiguousarray(resize_image(frame, size).transpose(2, 0, 1)))
    clip = Clip([mapped], height=57, width=90)
    labels, state = segmentor.step(torch.from_numpy(frame) if as_tensor else frame, segmentor.init_state())
    assert labels.shape == (57, 90)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, model.predict([clip])[0][0])
    scores, _ = StreamingSegmentor(cfg, model=model, output="scores").step(frame, segmentor.init_state())
    assert torch.equal(scores, resize_scores(model.score_maps([clip])[0][0], size, (57, 90), 4))
    assert state["size"] == [57, 90]


def test_segmentor_from_a_model_uses_the_default_size():
    segmentor = StreamingSegmentor(build(1, 1).train())
    assert not segmentor.model.training
    assert segmentor.network_size(480, 853) == (480, 864)


def test_segmentor_builds_and_fills_the_model_of_a_config(tmp_path):
    model = build(2, 1)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    torch.manual_seed(5)
    segmentor = StreamingSegmentor(config(2, 1, **{"MODEL.WEIGHTS": tmp_path / "weights.pth"}))
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    expected, _ = StreamingSegmentor(config(2, 1), model=model).step(frame, segmentor.init_state())
    assert torch.equal(segmentor.step(frame, segmentor.init_state())[0], expected)


def test_bad_input_is_named():
    model = build(1, 1)
    segmentor = StreamingSegmentor(config(1, 1), model=model)
    state = segmentor.init_state()
    for frame in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 RGB \[H, W, 3\], got"):
            segmentor.step(frame, state)
    with pytest.raises(ValueError, match=r"not a state of StreamingSegmentor; make one with init_state"):
        segmentor.step(np.zeros((4, 4, 3), np.uint8), {})
    with pytest.raises(ValueError, match=r"not a state of MaskClassifier; make one with init_state"):
        model.step(video(1)[0], {"frames": []})
    with pytest.raises(ValueError, match=r"output is 'masks'; expected one of labels, scores"):
        StreamingSegmentor(model, output="masks")
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty"):
        StreamingSegmentor(config(1, 1))


@pytest.mark.slow
def test_ten_thousand_frames_leave_memory_flat():
    """Peak memory after 1,000 frames is peak memory after 10,000, to 2 MiB, and no tensor is left behind."""
    small = {"INPUT.TEST.LONG_EDGE": 64, "INPUT.TEST.SHORT_EDGE": 32, "MODEL.MASK_FORMER.DEC_LAYERS": 2}
    segmentor = StreamingSegmentor(config(4, 2, **small), model=build(4, 2, **small))
    frames = [np.random.default_rng(i).integers(0, 256, (32, 64, 3), dtype=np.uint8) for i in range(8)]
    state = segmentor.init_state()
    peaks, counts = [], []
    for index in range(10_000):
        _, state = segmentor.step(frames[index % 8], state)
        if index + 1 in (1000, 10_000):
            gc.collect()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            # type(), not isinstance(): the latter wakes up lazy module attributes.
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert state["views"][0]["seen"] == 10_000
    assert counts[1] == counts[0]
    assert peaks[1] - peaks[0] <= 2048  # KiB
