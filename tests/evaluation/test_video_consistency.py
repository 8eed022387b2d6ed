"""VC against a brute force that compares the n frames of every window pixel by pixel."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from the_mask.evaluation.video_consistency import MODES, VideoConsistency, WindowTotal, video_consistency


def brute_windows(pred, gt, n, mode, ignore_label):
    """VC of every window that counts, by the definition, one pixel at a time; None for an empty G."""
    length, height, width = gt.shape
    starts = range(length - n + 1) if mode == "strict" else range(length - n)
    if length <= (16 if mode == "compat" else n if mode == "compat-vspw" else 0):
        return []
    values = []
    for start in starts:
        common = kept = 0
        for y in range(height):
            for x in range(width):
                truth = [int(gt[start + k, y, x]) for k in range(n)]
                answer = [int(pred[start + k, y, x]) for k in range(n)]
                if any(t != truth[0] for t in truth):
                    continue
                if mode == "strict":
                    if truth[0] == ignore_label:
                        continue
                    common += 1
                    kept += answer == truth
                else:
                    common += 1
                    kept += all(a == answer[0] for a in answer)
        values.append(kept / common if common else None)
    return values


def brute_score(videos, n, mode, ignore_label=255):
    values = [v for pred, gt in videos for v in brute_windows(pred, gt, n, mode, ignore_label) if v is not None]
    return sum(values) / len(values) if values else float("nan")


def random_video(rng, length, num_classes=3, size=(3, 4), change=0.15):
    """Maps that hold still most of the time, with void, and predictions that are often right."""
    gt = np.empty((length, *size), dtype=np.uint8)
    gt[0] = rng.integers(0, num_classes, size)
    for t in range(1, length):
        fresh = np.where(rng.random(size) < 0.3, 255, rng.integers(0, num_classes, size))
        gt[t] = np.where(rng.random(size) < change, fresh, gt[t - 1])
    wrong = rng.random(gt.shape) < change
    constant = np.broadcast_to(rng.integers(0, num_classes, size), gt.shape)
    pred = np.where((gt == 255) | wrong, constant, gt).astype(np.uint8)
    return pred, gt


def feed(meter, videos):
    for pred, gt in videos:
        for pred_frame, gt_frame in zip(pred, gt, strict=True):
            meter.update(pred_frame, gt_frame)
        meter.end_video()
    return meter


@pytest.fixture(scope="module")
def sixteen_videos():
    rng = np.random.default_rng(7)
    return [random_video(rng, length) for length in (*range(1, 9), 15, 16, 17, 18, 20, 25, 33, 40)]


@pytest.mark.parametrize("mode", MODES)
def test_sixteen_videos_match_brute_force(sixteen_videos, mode):
    result = feed(VideoConsistency((8, 16), mode), sixteen_videos).result()
    for n in (8, 16):
        assert 0.02 < result[n] < 0.98
        assert result[n] == pytest.approx(brute_score(sixteen_videos, n, mode), abs=1e-12)
    assert result[8] != pytest.approx(result[16], abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(1, 9), st.sampled_from(MODES), st.integers(0, 2**31))
def test_one_video_matches_brute_force(length, window, mode, seed):
    pred, gt = random_video(np.random.default_rng(seed), length)
    expected = brute_score([(pred, gt)], window, mode)
    assert video_consistency(pred, gt, window, mode) == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("mode", MODES)
def test_window_lengths_do_not_mix(sixteen_videos, mode):
    together = feed(VideoConsistency((8, 16, 3), mode), sixteen_videos).result()
    for n in (3, 8, 16):
        assert feed(VideoConsistency((n,), mode), sixteen_videos).result()[n] == together[n]


def test_prediction_must_be_correct_in_strict_and_only_constant_in_compat():
    gt = np.zeros((20, 2, 2), dtype=np.uint8)
    wrong_but_constant = np.ones_like(gt)
    assert video_consistency(wrong_but_constant, gt, 8, "compat") == 1.0
    assert video_consistency(wrong_but_constant, gt, 8, "strict") == 0.0


def test_void_counts_as_a_label_in_compat_only():
    gt = np.zeros((20, 1, 2), dtype=np.uint8)
    gt[:, 0, 1] = 255
    pred = np.zeros_like(gt)
    pred[::2, 0, 1] = 1  # flickers under void
    assert video_consistency(pred, gt, 8, "strict") == 1.0
    assert video_consistency(pred, gt, 8, "compat") == 0.5


def test_the_scripts_differ_in_void_and_in_short_videos():
    """CFFM's makes one label of the stored 0 and 255, VSPW's keeps both; CFFM's leaves 16 frames out for n = 8."""
    raw = np.full((20, 1, 2), 7, dtype=np.uint8)
    raw[::2, 0, 1] = 0
    raw[1::2, 0, 1] = 255
    ids = np.where((raw == 0) | (raw == 255), 255, raw - 1)
    pred = np.zeros_like(raw)
    pred[::2, 0, 1] = 1  # flickers under void
    assert video_consistency(pred, ids, 8, "compat") == 0.5
    assert video_consistency(pred, raw, 8, "compat-vspw") == 1.0
    assert math.isnan(video_consistency(pred[:16], ids[:16], 8, "compat"))
    assert video_consistency(pred[:16], raw[:16], 8, "compat-vspw") == 1.0
    assert math.isnan(video_consistency(pred[:8], raw[:8], 8, "compat-vspw"))


def test_only_void_leaves_nothing_to_score():
    gt = np.full((20, 2, 2), 255, dtype=np.uint8)
    pred = np.zeros_like(gt)
    assert math.isnan(video_consistency(pred, gt, 8, "strict"))
    meter = feed(VideoConsistency((8,), "strict"), [(pred, gt)])
    assert (meter.totals[8].windows, meter.totals[8].empty) == (0, 13)


def test_compat_leaves_out_the_last_window():
    gt = np.zeros((17, 1, 1), dtype=np.uint8)
    pred = np.zeros_like(gt)
    pred[-1] = 1  # breaks only the last window
    assert video_consistency(pred, gt, 16, "compat") == 1.0
    assert video_consistency(pred, gt, 16, "strict") == 0.5


def test_compat_drops_short_videos_for_every_window():
    maps = np.zeros((16, 1, 1), dtype=np.uint8)
    meter = feed(VideoConsistency((8, 16), "compat"), [(maps, maps)])
    assert all(math.isnan(value) for value in meter.result().values())
    assert meter.skipped_videos == 1
    assert video_consistency(maps, maps, 8, "compat", min_frames=9) == 1.0
    assert video_consistency(maps, maps, 8, "strict") == 1.0


def test_windows_never_cross_videos():
    zero, one = np.zeros((4, 1, 1), dtype=np.uint8), np.ones((4, 1, 1), dtype=np.uint8)
    meter = feed(VideoConsistency((8,), "strict"), [(zero, zero), (one, one)])
    assert math.isnan(meter.result()[8])


@pytest.mark.parametrize("mode", ["strict", "compat"])
def test_any_split_over_processes_gives_the_same_bits(sixteen_videos, mode):
    whole = feed(VideoConsistency((8, 16), mode), sixteen_videos)
    for world in (2, 3):
        parts = [feed(VideoConsistency((8, 16), mode), sixteen_videos[r::world]).finished() for r in range(world)]
        merged = parts[-1]
        for part in parts[:-1]:
            merged.merge(part)
        assert merged.result() == whole.result()
        assert merged.skipped_videos == whole.skipped_videos


def test_runs_longer_than_the_counter_type():
    frame = np.zeros((1, 1), dtype=np.uint8)
    meter = VideoConsistency((4,), "strict")
    for _ in range(70_000):
        meter.update(frame, frame)
    meter.end_video()
    assert meter.result()[4] == 1.0
    assert meter.totals[4].windows == 70_000 - 3


def test_reused_buffers_and_wide_labels():
    rng = np.random.default_rng(1)
    gt = rng.integers(0, 2, (10, 2, 2)).astype(np.int32) * 300
    pred = np.where(rng.random(gt.shape) < 0.2, 300 - gt, gt)
    buffer_pred, buffer_gt = np.empty_like(pred[0]), np.empty_like(gt[0])
    for mode in ("strict", "compat"):
        meter = VideoConsistency((2,), mode, ignore_label=65535, min_frames=1)
        for pred_frame, gt_frame in zip(pred, gt, strict=True):
            np.copyto(buffer_pred, pred_frame)
            np.copyto(buffer_gt, gt_frame)
            meter.update(buffer_pred, buffer_gt)
        meter.end_video()
        assert meter.result()[2] == pytest.approx(video_consistency(pred, gt, 2, mode, 65535, min_frames=1))


def test_state_does_not_grow():
    frame = np.zeros((5, 6), dtype=np.uint8)
    meter = VideoConsistency((8, 16), "compat")
    for _ in range(100):
        meter.update(frame, frame)
    arrays = [value for value in vars(meter._runs).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 4
    assert {array.shape for array in arrays} == {(5, 6)}


def test_bad_input():
    frame = np.zeros((2, 2), dtype=np.uint8)
    with pytest.raises(ValueError, match="windows"):
        VideoConsistency(())
    with pytest.raises(ValueError, match="windows"):
        VideoConsistency((8, 0))
    with pytest.raises(ValueError, match="mode 'soft'"):
        VideoConsistency((8,), "soft")
    meter = VideoConsistency((8,))
    meter.update(frame, frame)
    with pytest.raises(ValueError, match="frame 1 has shape"):
        meter.update(frame[:1], frame[:1])
    with pytest.raises(ValueError, match="ground truth"):
        meter.update(frame, frame[:1])
    with pytest.raises(ValueError, match=r"\[L, H, W\]"):
        video_consistency(frame, frame, 8)
    with pytest.raises(ValueError, match="merged"):
        meter.merge(VideoConsistency((16,)))


def test_total_is_exact_to_the_last_bit_of_a_double():
    total = WindowTotal()
    values = np.random.default_rng(0).random(1000)
    for value in values:
        total.add(value)
    assert total.mean == pytest.approx(math.fsum(values) / 1000, abs=1e-15)
