"""TC with exact synthetic flows, against naive loops."""

import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_small

from the_mask.evaluation.temporal_consistency import (
    TemporalConsistency,
    raft_flow,
    temporal_consistency,
    warp_labels,
    warp_labels_compat,
)


def naive_warp(labels, flow):
    height, width = labels.shape
    warped, valid = np.zeros_like(labels), np.zeros(labels.shape, dtype=bool)
    for y in range(height):
        for x in range(width):
            u, v = int(np.floor(x + flow[y, x, 0] + 0.5)), int(np.floor(y + flow[y, x, 1] + 0.5))
            if 0 <= u < width and 0 <= v < height:
                warped[y, x], valid[y, x] = labels[v, u], True
    return warped, valid


def naive_compat_warp(labels, flow):
    """Position x of the next frame is read at x * W / (W - 1) - 1/2, halves to even; 0 outside."""
    height, width = labels.shape
    warped = np.zeros_like(labels)
    for y in range(height):
        for x in range(width):
            u = round((x + float(flow[y, x, 0])) * width / (width - 1) - 0.5)
            v = round((y + float(flow[y, x, 1])) * height / (height - 1) - 0.5)
            if 0 <= u < width and 0 <= v < height:
                warped[y, x] = labels[v, u]
    return warped, np.ones(labels.shape, dtype=bool)


def naive_tc(preds, flows, num_classes, warp=naive_warp):
    pairs = []
    for t, flow in enumerate(flows):
        warped, valid = warp(preds[t + 1], flow)
        pairs += list(zip(preds[t][valid].tolist(), warped[valid].tolist(), strict=True))
    ious = []
    for c in range(num_classes):
        if any(a == c for a, _ in pairs):
            either = sum(1 for a, b in pairs if c in (a, b))
            ious.append(sum(1 for a, b in pairs if a == b == c) / either)
    return sum(ious) / len(ious)


def moving_scene(length, step, size=(14, 18), num_classes=4):
    """A label world seen through a window that moves by ``step`` (dx, dy) a frame, so the exact flow is -step."""
    rng = np.random.default_rng(0)
    margin = length * max(abs(step[0]), abs(step[1]))
    world = rng.integers(0, num_classes, (size[0] + 2 * margin, size[1] + 2 * margin)).astype(np.uint8)
    views = []
    for t in range(length):
        y, x = margin + t * step[1], margin + t * step[0]
        views.append(world[y : y + size[0], x : x + size[1]])
    maps = np.stack(views)
    return np.repeat(maps[..., None] * 50, 3, axis=-1), maps


def constant_flow(dx, dy):
    return lambda a, b: np.broadcast_to(np.array([dx, dy], dtype=np.float32), (*a.shape[:2], 2))


@pytest.mark.parametrize("step", [(0, 0), (2, 0), (-1, 3), (4, -2)])
def test_exact_flow_of_a_translation_gives_one(step):
    frames, maps = moving_scene(5, step)
    assert temporal_consistency(frames, maps, 4, constant_flow(-step[0], -step[1])) == 1.0
    if step != (0, 0):
        assert temporal_consistency(frames, maps, 4, constant_flow(0, 0)) < 0.5


@pytest.mark.parametrize(("mode", "warp"), [("strict", naive_warp), ("compat", naive_compat_warp)])
def test_matches_naive_loops_on_random_flows(mode, warp):
    rng = np.random.default_rng(2)
    preds = rng.integers(0, 3, (4, 9, 11))
    frames = np.zeros((4, 9, 11, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = np.arange(4)
    flows = rng.normal(0, 3, (3, 9, 11, 2))

    def flow(first, second):
        assert second[0, 0, 0] == first[0, 0, 0] + 1
        return flows[first[0, 0, 0]]

    # A class that only the warped map has counts nowhere in the mean.
    preds[:-1][preds[:-1] == 2] = 1
    assert (preds[-1] == 2).any()
    expected = naive_tc(preds, flows, 5, warp)
    assert temporal_consistency(frames, preds, 5, flow, mode) == pytest.approx(expected, abs=1e-12)


def test_compat_counts_what_leaves_the_frame_as_class_0():
    labels = np.array([[0, 3, 3, 3, 3, 3, 3, 3]], dtype=np.uint8).repeat(6, 0)
    out = np.full((6, 8, 2), 100.0)
    assert (warp_labels_compat(labels, out) == 0).all()
    assert (warp_labels_compat(labels, np.full((6, 8, 2), np.nan)) == 0).all()
    still = np.zeros((6, 8, 2))
    assert warp_labels_compat(labels, still)[0].tolist() == [0, 3, 3, 3, 3, 3, 3, 0]  # 7 is read at 7.5, outside
    assert warp_labels(labels, still)[0][0].tolist() == labels[0].tolist()


def test_warp_takes_the_nearest_pixel():
    labels = np.arange(6).reshape(1, 6)
    flow = np.zeros((1, 6, 2))
    flow[0, :, 0] = [0.49, 0.5, -0.51, 2.0, 1.5, np.nan]
    warped, valid = warp_labels(labels, flow)
    assert valid.tolist() == [[True, True, True, True, False, False]]
    assert warped[0, :4].tolist() == [0, 2, 1, 5]


def test_pairs_never_cross_videos():
    frames, maps = moving_scene(3, (0, 0))
    meter = TemporalConsistency(4, constant_flow(0, 0))
    for video in range(2):
        for frame, pred in zip(frames, (maps + video) % 4, strict=True):
            meter.update(frame, pred)
        meter.end_video()
    assert meter.pairs == 4
    assert meter.result() == 1.0


def test_bad_input():
    frames, maps = moving_scene(2, (0, 0))
    meter = TemporalConsistency(2, constant_flow(0, 0))
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        meter.update(frames[0][:-1], maps[0])
    with pytest.raises(ValueError, match="flow"):
        warp_labels(maps[0], np.zeros((2, 2, 2)))
    meter.update(frames[0], maps[0])
    with pytest.raises(ValueError, match="illegal class ids"):
        meter.update(frames[1], maps[1])
    meter.end_video()
    meter.update(frames[0], maps[0] % 2)
    with pytest.raises(ValueError, match="size changes"):
        meter.update(frames[0][:-1], maps[0][:-1] % 2)


def test_raft_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = raft_small(weights=None)
    path = tmp_path / "raft.pth"
    torch.save(model.state_dict(), path)
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    flow = raft_flow(path, updates=2)(image, image)
    assert flow.shape == (60, 90, 2)
    assert np.isfinite(flow).all()


def test_raft_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        raft_flow(tmp_path / "nowhere.pth")
    foreign = tmp_path / "foreign.pth"
    torch.save({"module.fnet.conv1.weight": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match=r"foreign\.pth.*module\.fnet"):
        raft_flow(foreign)
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pth is corrupt"):
        raft_flow(broken)
