"""Multi-stage inference against the passes written out."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_segmentor import ToySegmentor

from the_mask.config import load_config
from the_mask.inference.stages import MaskFolder, MultiStage
from the_mask.inference.views import MultiView, View
from the_mask.inference.window import SlidingWindow
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.stream import Hints

K = 3


def video(frames=4, height=10, width=14):
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy() for _ in range(frames)
    ]


def run(runner, frames, names=None):
    state = runner.init_state()
    outputs = []
    for index, frame in enumerate(frames):
        output, state = runner.step(frame, state, Hints(name=names[index] if names else None))
        outputs.append(output)
    return outputs


def written_out(frames, count, frame, memory, views):
    """Every stage over the whole video before the next one begins, as with masks on disk."""
    masks = None
    for stage in range(count + 1):
        runner = MultiView(ToySegmentor(K, stride=2, memory=memory), views, output="scores")
        state, scores = runner.init_state(), []
        for index, image in enumerate(frames):
            prior = None
            if stage and (frame == "same_frame" or index):
                mask = masks[index if frame == "same_frame" else index - 1]
                prior = PriorMap.from_labels(torch.as_tensor(mask, dtype=torch.int64)[None], K)
            score, state = runner.step(image, state, Hints(prior=prior))
            scores.append(score)
        masks = [score.argmax(0) for score in scores]
    return scores


@pytest.mark.parametrize("frame", ["same_frame", "previous_frame"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("views", [(View(),), (View(), View(1.5, True))])
def test_a_stream_equals_stages_over_the_whole_video(frame, count, views):
    scorer = MultiView(ToySegmentor(K, stride=2, memory=0.25), views, output="scores")
    got = run(MultiStage(scorer, count, frame), video())
    for ours, theirs in zip(got, written_out(video(), count, frame, 0.25, views), strict=True):
        assert torch.equal(ours, theirs)


def test_windows_crop_the_prior_with_the_frame():
    plain = MultiView(ToySegmentor(K, stride=2), output="scores")
    window = MultiView(SlidingWindow(ToySegmentor(K, stride=2), [8, 8], [4, 4]), output="scores")
    for ours, theirs in zip(run(MultiStage(window, 1), video()), run(MultiStage(plain, 1), video()), strict=True):
        assert torch.equal(ours, theirs)


def test_masks_on_disk_equal_masks_in_memory(tmp_path):
    frames = video()
    names = [("clip_a", f"{i:03d}") for i in range(len(frames))]
    scorer = MultiView(ToySegmentor(K, stride=2, memory=0.25), output="labels")
    table = [255, 0, 1, 2]
    for name, mask in zip(names, run(scorer, frames), strict=True):
        path = tmp_path / name[0] / f"{name[1]}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(mask.numpy() + 1).save(path)
    scorer = MultiView(ToySegmentor(K, stride=2, memory=0.25), output="scores")
    for frame in ("same_frame", "previous_frame"):
        stored = run(MultiStage(scorer, 2, frame, MaskFolder(str(tmp_path), table)), frames, names)
        kept = run(MultiStage(scorer, 2, frame), frames)
        assert all(torch.equal(a, b) for a, b in zip(stored, kept, strict=True))


def test_state_is_bounded_small_and_restarts_with_the_size():
    runner = MultiStage(MultiView(ToySegmentor(K, stride=2), output="scores"), 2, "previous_frame")
    state = runner.init_state()
    for frame in video():
        _, state = runner.step(frame, state)
        assert len(state["passes"]) == 3
        assert [mask.dtype for mask in state["masks"]] == [torch.uint8] * 2
    other = video(1, 8, 12)[0]
    labels, _ = runner.step(other, state)
    fresh, _ = runner.step(other, runner.init_state())
    assert torch.equal(labels, fresh)


def test_bad_input_is_named(tmp_path):
    scorer = MultiView(ToySegmentor(K, stride=2), output="scores")
    with pytest.raises(ValueError, match=r"TEST\.STAGES\.COUNT 0"):
        MultiStage(scorer, 0)
    with pytest.raises(ValueError, match=r"TEST\.STAGES\.FRAME 'next'"):
        MultiStage(scorer, 1, "next")
    with pytest.raises(ValueError, match="a state of 3 passes, but there are 2"):
        MultiStage(scorer, 1).step(video()[0], MultiStage(scorer, 2).init_state())
    stored = MultiStage(scorer, 1, masks=MaskFolder(str(tmp_path), [0, 1, 2, 7]))
    with pytest.raises(ValueError, match="a camera lacks"):
        stored.step(video()[0], stored.init_state())
    with pytest.raises(FileNotFoundError, match=r"v/0\.png does not exist.*SAVE_PREDICTIONS"):
        stored.step(video()[0], stored.init_state(), Hints(name=("v", "0")))
    (tmp_path / "v").mkdir()
    Image.fromarray(np.zeros((5, 7), np.uint8)).save(tmp_path / "v" / "0.png")
    with pytest.raises(ValueError, match=r"v/0\.png is 5x7 .*, its frame 10x14"):
        stored.step(video()[0], stored.init_state(), Hints(name=("v", "0")))
    Image.fromarray(np.full((10, 14), 3, np.uint8)).save(tmp_path / "v" / "1.png")
    with pytest.raises(ValueError, match=r"3 classes.*another class list"):
        stored.step(video()[0], stored.init_state(), Hints(name=("v", "1")))
    cfg = load_config(overrides=["TEST.STAGES.COUNT", "1"])
    scorer.model.reads_prior = False
    with pytest.raises(ValueError, match="reads no prior"):
        MultiStage.from_config(cfg, scorer)
