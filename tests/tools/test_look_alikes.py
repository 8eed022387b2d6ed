"""benchmarks/look_alikes.py counts pairs apart, and clear frames apart from spoiled ones."""

import importlib.util
from pathlib import Path

import pytest
import torch

from the_mask.data import register_all
from the_mask.data.synthetic import SceneSize, make_moving_shapes, render_video

ROOT = Path(__file__).parents[2]
SIZE = SceneSize(8, 48, 64)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    make_moving_shapes(tmp_path / "moving_shapes", train_videos=1, val_videos=3, size=SIZE)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all(tmp_path)
    spec = importlib.util.spec_from_file_location("look_alikes", ROOT / "benchmarks" / "look_alikes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    register_all()


def test_counts(tool, monkeypatch):
    spoiled = {f"val_{n:03d}": render_video(0, 1, n, SIZE).spoiled for n in range(3)}

    class Oracle(torch.nn.Module):
        """Right in spoiled frames; in clear ones wheels and squares are swapped with their look-alike."""

        def predict(self, clips):
            maps = []
            for clip in clips:
                bad = spoiled[clip.video_id]
                frames = []
                for file, label in zip(clip.file_names, clip.labels):
                    swapped = torch.where(label == 255, label, ((label - 3) ^ 1) + 3)
                    swap = ((label >= 5) & (label < 7)) | ((label >= 9) & (label < 11))
                    frames.append(label if bad[int(Path(file).stem)] else torch.where(swap, swapped, label))
                maps.append(frames)
            return maps

    monkeypatch.setattr(tool, "trained", lambda cfg, **options: Oracle())
    config = str(ROOT / "configs" / "debug" / "the_mask_debug_1f.yaml")
    pixels = tool.count(tool.RunOptions(config, ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]))
    for pair, right_when_clear in enumerate((100, 0, 100, 0)):
        assert sum(pixels[pair, False, truth] for truth in (True, False)) > 0, "no such pair in the set"
        assert tool.share(pixels, [pair], bad=False) == right_when_clear
        assert tool.share(pixels, [pair], bad=True) == 100
    assert sum(pixels.values()) > 1000


def test_the_flags_of_the_videos_are_those_of_the_pixels(tool):
    flags = tool.spoiled_frames()
    assert list(flags) == ["val_000", "val_001", "val_002"]
    blurred = {}
    for n in range(3):
        video = render_video(0, 1, n, SIZE)
        for image, bad in zip(video.images, flags[f"val_{n:03d}"]):
            noise = torch.from_numpy(image).float().diff(dim=1).abs().median()
            blurred.setdefault(bad, []).append(float(noise))
    # Spoiled frames have more noise than clear ones.
    assert min(blurred[True]) > 0.7 * max(blurred[False])
    assert len(blurred[True]) + len(blurred[False]) == 24
