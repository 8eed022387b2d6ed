"""ClipSegmentor: losses, memory, score maps, streams and bad input, with the smallest heads."""

from dataclasses import replace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from the_mask.config import load_config
from the_mask.config.keys.context import ClipSegmentorOptions
from the_mask.data.clips import Clip
from the_mask.modeling.pixel.clip_segmentor import ClipSegmentor
from the_mask.modeling.pixel.context.types import ClipFeatures, HeadOutput, fill_missing
from the_mask.modeling.pixel.heads.base import PixelHead

CLASSES = 5


def build_fcn(*overrides):
    base = ["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "ClipSegmentor", "MODEL.SEM_SEG_HEAD.NAME", "FCNHead"]
    base += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32]
    base += ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.CLIP_SEGMENTOR.AUX_CHANNELS", 32]
    torch.manual_seed(0)
    return build_model(load_config(overrides=[*map(str, base), *overrides]))


class SlotHead(PixelHead):
    """Reads slot t of its memory with weight 10^t, so that an output tells what every slot held."""

    def __init__(self, length, level="x"):
        super().__init__()
        self.memory_length, self.memory_levels, self.stride, self.level = length, (level,), 4, level
        self.seen = []

    def forward(self, features, memory=None, prior=None):
        x = features[self.level] * 0.1
        if memory is not None:
            self.seen.append((torch.stack(memory.level(self.level)), memory.valid))
            for t, slot in enumerate(memory.level(self.level)):
                x = x + 10.0**t * slot * memory.valid[:, t, None, None, None]
        return HeadOutput(torch.cat([x, -x], dim=1))


class MeanBackbone(nn.Module):
    """Stride-4 means of the images; counts its calls."""

    size_divisibility = 0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return {"x": F.avg_pool2d(images.mean(1, keepdim=True), 4) * self.weight}

    def output_shape(self):
        return {"x": ShapeSpec(channels=1, stride=4)}


def slot_model(length, **options):
    options = {"num_classes": 2, "ignore_label": 255, "pixel_mean": [0.0] * 3, "pixel_std": [100.0] * 3, **options}
    own = {name: options.pop(name) for name in ("fold_time", "memory_grad", "pad") if name in options}
    own = ClipSegmentorOptions(size_divisibility=4, **own)
    model = ClipSegmentor(backbone=MeanBackbone(), sem_seg_head=SlotHead(length), options=own, **options)
    return model.eval()


def clip_of(values, labels=True, **extra):
    frames = [torch.full((3, 8, 8), v, dtype=torch.uint8) for v in values]
    maps = [torch.zeros(8, 8, dtype=torch.int64) for _ in values]
    return Clip(frames, maps if labels else [None] * len(values), video_id="v", **extra)


def clip(seed=0, height=64, width=96):
    generator = torch.Generator().manual_seed(seed)
    frame = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (height // 16, width // 16), generator=generator)
    labels = labels.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return Clip([frame], [labels], seed=seed, video_id=str(seed))


def test_image_model_trains_and_predicts():
    model = build_fcn("MODEL.AUX_HEADS", "['res4','res3']")
    losses = model([clip(0), clip(1)])
    assert set(losses) == {"loss_ce", "loss_ce_aux_res4", "loss_ce_aux_res3"}
    sum(losses.values()).backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert trained == ["backbone.stem.fc.weight"] or trained == []
    model.eval()
    one = replace(clip(2), height=50, width=77)
    assert [tuple(m.shape) for m in model.predict([one])[0]] == [(50, 77)]
    scores = model.score_maps([one])[0]
    assert tuple(scores.shape) == (1, CLASSES, 2, 3)
    assert torch.allclose(scores.sum(1), torch.ones(1, 2, 3))
    streamed, state = model.step(one.frames[0], model.init_state())
    assert torch.equal(streamed, scores[0])
    assert state["memory"] == {"frames": [], "prior": {}}


def test_dicts_with_the_fields_of_a_clip_are_taken_as_detectron2_gives_them():
    model, one = build_fcn().eval(), clip(0)
    as_dict = {"frames": list(one.frames), "labels": list(one.labels), "seed": one.seed, "image_id": 7}
    (ours,), (theirs,) = model([as_dict])[0]["sem_seg"], model([one])[0]["sem_seg"]
    assert torch.equal(ours, theirs)
    model.train()
    losses = []
    for batch in ([as_dict, as_dict], [one, one]):
        torch.manual_seed(0)  # of the dropout
        losses.append(model(batch)["loss_ce"])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="clips to train on need `labels`: 1 have none"):
        model([as_dict, {"frames": list(one.frames)}])


def test_aux_loss_is_the_weighted_cross_entropy_of_its_head():
    model = build_fcn("MODEL.AUX_HEADS", "['res4']", "MODEL.CLIP_SEGMENTOR.AUX_WEIGHT", "0.3").eval()
    batch = [clip(0)]
    images, _ = model.stack(batch)
    logits = model.auxiliary_heads["res4"](model.backbone(images)).logits
    logits = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
    expected = 0.3 * F.cross_entropy(logits, batch[0].labels[0][None])
    torch.testing.assert_close(model.losses(batch)["loss_ce_aux_res4"], expected)


def test_only_ignored_pixels_give_a_zero_loss_with_a_graph():
    model = build_fcn()
    void = replace(clip(0), labels=[None])
    loss = model([void, void])["loss_ce"]
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize(("fold", "grad"), [(True, True), (True, False), (False, True), (False, False)])
def test_memory_of_a_training_clip_is_the_frames_before_the_reference(fold, grad):
    model = slot_model(2, fold_time=fold, memory_grad=grad)
    batch = model.training_batch([clip_of([10, 20, 30, 40, 50], reference=3)])
    model.clip_output(batch)
    slots, valid = model.sem_seg_head.seen[-1]
    torch.testing.assert_close(slots[:, 0, 0, 0, 0], torch.tensor([0.2, 0.3]))
    assert valid.all()
    assert slots.requires_grad is grad
    assert model.backbone.calls == {(True, True): 1, (True, False): 2, (False, True): 3, (False, False): 3}[fold, grad]


@pytest.mark.parametrize(
    ("pad", "indices", "expected", "missing"),
    [
        ("repeat_first", [0, 0, 0, 1], [0.1, 0.1, 0.1], []),
        ("repeat_current", [0, 0, 0, 1], [0.2, 0.2, 0.1], []),
        ("mask", [0, 0, 0, 1], None, [0, 1]),
        ("mask", [4, 1, 2, 4], None, [0]),
        ("mask", [3, 2, 1, 0], None, []),
    ],
)
def test_pad_policies_on_clips_of_the_loader(pad, indices, expected, missing):
    model = slot_model(3, pad=pad)
    batch = model.training_batch([clip_of([10 * (i + 1) for i in indices], frame_indices=indices)])
    model.clip_output(batch)
    slots, valid = model.sem_seg_head.seen[-1]
    if expected is not None:
        torch.testing.assert_close(slots[:, 0, 0, 0, 0], torch.tensor(expected))
    assert [t for t in range(3) if not valid[0, t]] == missing


def test_short_clips_are_continued_to_the_past():
    model = slot_model(3)
    model.clip_output(model.training_batch([clip_of([10, 20])]))
    torch.testing.assert_close(model.sem_seg_head.seen[-1][0][:, 0, 0, 0, 0], torch.tensor([0.1, 0.1, 0.1]))
    model.clip_output(model.training_batch([clip_of([20])]))
    torch.testing.assert_close(model.sem_seg_head.seen[-1][0][:, 0, 0, 0, 0], torch.tensor([0.2, 0.2, 0.2]))


def test_drop_refuses_incomplete_training_clips_only():
    model = slot_model(3, pad="drop")
    with pytest.raises(ValueError, match=r"clip v has no 3 frames before.*INPUT\.CLIP\.BOUNDARY to drop"):
        model.losses([clip_of([10, 20])])
    assert len(model.score_maps([clip_of([10, 20])])[0]) == 2


@pytest.mark.parametrize("pad", ["repeat_first", "repeat_current", "mask"])
@pytest.mark.parametrize("stride", [1, 2])
def test_stream_equals_clip_mode(pad, stride):
    model = slot_model(3, pad=pad, memory_stride=stride)
    values = [10, 20, 30, 40, 50, 60, 70, 80]
    state, streamed = model.init_state(), []
    for value in values:
        before = model.backbone.calls
        scores, state = model.step(clip_of([value]).frames[0], state)
        assert model.backbone.calls == before + 1
        streamed.append(scores)
    assert len(state["memory"]["frames"]) == 3 * stride
    torch.testing.assert_close(model.score_maps([clip_of(values)])[0], torch.stack(streamed))
    for t in range(len(values)):
        indices = [t - stride * back for back in (3, 2, 1, 0)]
        if pad == "repeat_first":
            window = clip_of([values[max(i, 0)] for i in indices])
        else:
            inside = [i for i in indices if i >= 0]
            window = clip_of([values[i] for i in inside])
        _, output = model.clip_output(model.training_batch([window]))
        torch.testing.assert_close(output.logits.softmax(1)[0], streamed[t])


def test_a_frame_of_another_size_starts_the_stream_anew():
    model = slot_model(2)
    _, state = model.step(torch.zeros(3, 8, 8), model.init_state())
    _, state = model.step(torch.zeros(3, 8, 16), state)
    assert (state["seen"], state["resets"], len(state["memory"]["frames"])) == (1, 1, 1)
    with pytest.raises(ValueError, match="init_state"):
        model.step(torch.zeros(3, 8, 8), {})


def test_fill_missing_copies_per_sample():
    frames = tuple({"x": torch.full((2, 1, 1, 1), float(t))} for t in range(3))
    valid = torch.tensor([[False, True, True], [False, False, False]])
    current = {"x": torch.full((2, 1, 1, 1), 9.0)}
    memory = ClipFeatures(frames, valid)
    filled = fill_missing(memory, "repeat_first", current)
    assert torch.stack(filled.level("x"))[:, :, 0, 0, 0].t().tolist() == [[1, 1, 2], [9, 9, 9]]
    assert filled.valid.all()
    assert fill_missing(memory, "mask", current) is memory
    with pytest.raises(ValueError, match="PAD 'reflect'"):
        fill_missing(memory, "reflect", current)


def test_bad_input_is_named():
    model = build_fcn()
    bad = clip(0)
    bad.labels[0][0, 0] = 77
    with pytest.raises(ValueError, match=r"labels \[77\] are outside 0..4"):
        model([bad])
    with pytest.raises(ValueError, match=r"MODEL.AUX_HEADS \['res9'\]"):
        build_fcn("MODEL.AUX_HEADS", "['res9']")
    with pytest.raises(ValueError, match="per-pixel head"):
        build_fcn("MODEL.SEM_SEG_HEAD.NAME", "MaskClassificationHead")
    with pytest.raises(ValueError, match=r"MODEL\.CONTEXT\.PRIOR 'guess'"):
        build_fcn("MODEL.CONTEXT.PRIOR", "guess")
