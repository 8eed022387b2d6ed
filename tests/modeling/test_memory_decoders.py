"""Decoders A and B as configs: priors, warm-up, memory updates, streams, and what is wrong with the input."""

import pytest
import torch
from detectron2.modeling import build_model
from tolerances import assert_close

from the_mask.config import load_config
from the_mask.data.clips import Clip
from the_mask.modeling.freezing import evaluation_mode
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.pixel.context.priors import PreviousPrediction, StoredMasks, label_prior
from the_mask.modeling.stream import Hints
from the_mask.weights import load_weights
from the_mask.weights.class_sets import transfer_rows

CLASSES = 4
A = "uper & (embed > class_memory)"
B = "uper & (embed > tma > class_memory)"


def build(expression=A, prior="previous_prediction", *extra, seed=0):
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.META_ARCHITECTURE": "ClipSegmentor",
        "MODEL.SEM_SEG_HEAD.NAME": "ContextHead",
        "MODEL.SEM_SEG_HEAD.NORM": "BN",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 16,
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.DROPOUT": 0.0,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.CONTEXT.EXPRESSION": expression,
        "MODEL.CONTEXT.MEMORY_LENGTH": 2,
        "MODEL.CONTEXT.PRIOR": prior,
        "MODEL.BLOCKS.UPER.CHANNELS": 16,
        "MODEL.BLOCKS.EMBED.CHANNELS": 16,
        "MODEL.BLOCKS.EMBED.LEVELS": ["res3", "res4", "res5"],
        "MODEL.BLOCKS.TMA.KEY_CHANNELS": 8,
        "MODEL.BLOCKS.TMA.VALUE_CHANNELS": 8,
        "MODEL.BLOCKS.TMA.CHANNELS": 16,
        "MODEL.BLOCKS.CLASS_MEMORY.UPDATE_RES": "features",
        "SOLVER.MAX_ITER": 100,
    }
    flat = [str(x) for pair in options.items() for x in pair] + [str(x) for x in extra]
    torch.manual_seed(seed)
    return build_model(load_config(overrides=flat))


def clip(frames=3, seed=0, size=64, **extra):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(CLASSES, (frames, size // 8, size // 8), generator=generator)
    maps = maps.repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = torch.randint(256, (frames, 3, size, size), generator=generator, dtype=torch.uint8)
    return Clip(images.unbind(), maps.unbind(), seed=seed, video_id=str(seed), **extra)


def filled(model, seed=3):
    memory = model.sem_seg_head.blocks["class_memory"].context.memory
    memory.rows.copy_(torch.randn(memory.rows.shape, generator=torch.Generator().manual_seed(seed)))
    memory.seen.fill_(True)
    return model


def spy(model):
    """Priors the head gets."""
    seen = []
    block = model.sem_seg_head.blocks["class_memory"]
    forward = block.forward
    block.forward = lambda query, memory=None, prior=None: (seen.append(prior), forward(query, memory, prior))[1]
    return seen


@pytest.mark.parametrize(("expression", "prior"), [(A, "previous_prediction"), (B, "stage1"), (A, "stage1")])
@pytest.mark.parametrize("iteration", [0, 50])
def test_a_training_step_reaches_every_parameter_and_the_memory(expression, prior, iteration):
    model = build(expression, prior).train()
    memory = model.sem_seg_head.blocks["class_memory"].context.memory
    model.set_iteration(iteration)
    losses = model([clip(seed=0), clip(seed=1)])
    assert set(losses) == {"loss_ce", "loss_ce_stage1"}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not memory.seen.any()  # read before written
    model.after_step()
    assert memory.seen.all()
    assert memory.rows.abs().sum() > 0
    assert all(module.training for module in model.sem_seg_head.modules())


def test_mixed_precision_keeps_the_memory_in_float32():
    model = build(B, "stage1", "MODEL.BLOCKS.CLASS_MEMORY.UPDATE_RES", "labels").train()
    for iteration in (0, 50):  # before and after the rows have been filled
        model.set_iteration(iteration)
        with torch.autocast("cpu", torch.bfloat16):
            losses = model([clip(seed=0), clip(seed=1)])
        total = sum(losses.values())
        total.backward()
        model.after_step()
        assert torch.isfinite(total)
    rows = model.sem_seg_head.blocks["class_memory"].context.memory.rows
    assert rows.dtype == torch.float32
    assert torch.isfinite(rows).all()


def test_ground_truth_stands_in_at_first_then_the_prediction():
    model = filled(build()).train()
    priors = spy(model)
    clips = [clip(seed=0), clip(seed=1, frames=1)]
    model.set_iteration(9)
    model.losses(clips)
    (truth,) = priors
    assert torch.equal(truth.labels[0], clips[0].labels[-2])
    assert (truth.labels[1] == 255).all()  # there is no frame before
    with torch.no_grad(), evaluation_mode(model):
        features = model.backbone(model.training_batch(clips).images[:, -2])
        logits = model.sem_seg_head(features, None, None).logits
    priors.clear()
    model.set_iteration(10)
    model.losses(clips)
    own, prediction = priors
    assert own is None  # the frame before is predicted from its own first classifier
    assert (prediction.labels[1] == 255).all()
    assert torch.equal(prediction.labels[0], logits.argmax(1)[0])

    other = build(B, "stage1").train()
    priors = spy(other)
    other.set_iteration(0)
    other.losses(clips)
    other.set_iteration(10)
    other.losses(clips)
    assert torch.equal(priors[0].labels[1], clips[1].labels[-1])  # B: the truth of the current frame
    assert priors[1] is None


def test_the_pass_over_the_frame_before_leaves_no_trace():
    """No gradient, no batch statistics, no part in the memory's update."""
    model = filled(build()).train()
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    provider = PreviousPrediction()
    prior = provider.for_training(model, model.training_batch([clip()]))
    assert not prior.labels.requires_grad
    assert all(torch.equal(b, statistics[n]) for n, b in model.named_buffers() if n in statistics)
    assert model.sem_seg_head.blocks["class_memory"].context._features is None
    assert all(module.training for module in model.sem_seg_head.modules())
    soft = PreviousPrediction(soft=True).for_training(model, model.training_batch([clip()]))
    assert torch.equal(soft.probabilities.argmax(1), prior.labels)


@pytest.mark.parametrize(
    ("expression", "prior"), [(A, "previous_prediction"), (B, "stage1"), (B, "previous_prediction")]
)
def test_a_stream_equals_clip_mode(expression, prior):
    model = filled(build(expression, prior)).eval()
    video = clip(frames=5)
    (scores,) = model.score_maps([video])
    state = model.init_state()
    for frame, expected in zip(video.frames, scores, strict=True):
        got, state = model.step(frame, state)
        assert_close(got, expected, "sum")


def test_a_stream_hands_on_the_last_mask_and_forgets_it_with_the_size():
    model = filled(build()).eval()
    priors = spy(model)
    frames = clip(frames=3).frames
    state = model.init_state()
    masks = []
    for frame in frames:
        scores, state = model.step(frame, state)
        masks.append(scores.argmax(0))
    assert priors[0] is None
    for given, mask in zip(priors[1:], masks[:-1], strict=True):
        assert torch.equal(given.labels[0], mask)
    assert state["memory"]["prior"]["labels"].dtype == torch.uint8
    _, state = model.step(clip(1, size=32).frames[0], state)
    assert priors[-1] is None
    assert state["resets"] == 1
    soft = filled(build(A, "previous_prediction", "MODEL.CONTEXT.PRIOR_SOFT", "True")).eval()
    _, state = soft.step(frames[0], soft.init_state())
    assert state["memory"]["prior"]["probabilities"].dtype == torch.float16
    soft.step(frames[1], state)


def test_a_prior_changes_the_scores_and_moves_with_the_image():
    """A given prior takes the provider's place; the model sees it at the place of its pixels."""
    model = filled(build()).eval()
    frame, labels = clip(1, seed=4).frames[0], clip(1, seed=4).labels[0][None]
    own, _ = model.step(frame, model.init_state())
    given, _ = model.step(frame, model.init_state(), Hints(prior=PriorMap.from_labels(labels, CLASSES)))
    assert not torch.allclose(own, given)
    block = model.sem_seg_head.blocks["class_memory"].context
    prior = PriorMap.from_labels(labels, CLASSES)
    logits = torch.zeros(1, CLASSES, 8, 8)
    assert torch.equal(block.look_up(logits, prior.flip()), block.look_up(logits, prior).flip(-1))
    window = block.look_up(logits[..., :4, :6], prior.crop(16, 8, 32, 48))
    assert torch.equal(window, block.look_up(logits, prior)[..., 2:6, 1:7])


def test_stored_masks_of_the_same_or_the_previous_frame():
    stored = [x.flip(-1) for x in clip().labels]
    for frame, index in (("same_frame", -1), ("previous_frame", -2)):
        model = build(A, "stored_masks", "MODEL.CONTEXT.STORED_FRAME", frame).train()
        priors = spy(model)
        model.set_iteration(99)
        model.losses([clip(priors=stored), clip(seed=1, priors=stored)])
        assert torch.equal(priors[0].labels[0], stored[index])
    with pytest.raises(ValueError, match=r"set INPUT\.PRIOR_MASKS"):
        model.losses([clip(), clip()])
    with pytest.raises(ValueError, match="STORED_FRAME 'next'"):
        StoredMasks("next")


def test_repeated_frames_before_the_start_give_no_prior():
    """A boundary policy repeats the first frame: its truth would be the answer."""
    model = build().train()
    batch = model.training_batch([clip(frames=2, frame_indices=[0, 0]), clip(frames=2, frame_indices=[0, 1])])
    prior = label_prior(model, batch, [own.labels for own in batch.clips], "previous_frame")
    assert (prior.labels[0] == 255).all()
    assert torch.equal(prior.labels[1], batch.clips[1].labels[0])


def test_memory_loss_needs_a_decoder_of_its_width_and_starts_late():
    options = ["MODEL.BLOCKS.CLASS_MEMORY.MEMORY_LOSS", 1.0, "MODEL.BLOCKS.CLASS_MEMORY.MEMORY_LOSS_START", 0.5]
    model = filled(build(A, "stage1", *options)).train()
    model.set_iteration(49)
    assert "loss_memory" not in model.losses([clip(), clip(seed=1)])
    model.set_iteration(50)
    losses = model.losses([clip(), clip(seed=1)])
    expected = model.sem_seg_head.blocks["class_memory"].context.memory_loss_of(model.sem_seg_head.conv_seg)
    torch.testing.assert_close(losses["loss_memory"], expected)
    with pytest.raises(ValueError, match=r"block class_memory classifies features of 16 channels .* reads 24"):
        build(A, "stage1", *options, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 24)


def test_checkpoint_carries_the_memory():
    model, copy = filled(build()), build(seed=1)
    copy.load_state_dict(model.state_dict())
    frame = clip().frames[0]
    assert torch.equal(model.eval().step(frame, model.init_state())[0], copy.eval().step(frame, copy.init_state())[0])
    other = build(A, "stage1", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES + 1)
    with pytest.raises(ValueError, match=r"class memory .* \[4, 1, 16\], the model's \[5, 1, 16\]"):
        other.load_state_dict(model.state_dict())


def test_weights_of_other_classes_start_the_memory_anew_or_fill_it_by_name(tmp_path):
    model, other = filled(build()), build(A, "previous_prediction", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", CLASSES + 1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    start = other.state_dict()
    report = load_weights(other, tmp_path / "weights.pth")
    name = "sem_seg_head.blocks.class_memory.context.memory"
    assert (f"{name}.rows", (4, 1, 16), (5, 1, 16)) in report.dropped
    assert not other.state_dict()[f"{name}.seen"].any()
    with pytest.raises(ValueError, match=r"weights.pth does not fill the whole model"):
        load_weights(other, tmp_path / "weights.pth", strict=True)
    rows = transfer_rows(model.state_dict(), start, list("abcde"), list("edcb"))
    assert torch.equal(rows[f"{name}.rows"][1:], model.state_dict()[f"{name}.rows"].flip(0))
    assert rows[f"{name}.seen"].tolist() == [False, True, True, True, True]


def test_bad_priors_and_settings_are_named():
    with pytest.raises(ValueError, match=r"MODEL\.CONTEXT\.PRIOR is none: set it to previous_prediction"):
        build(A, "none")
    with pytest.raises(ValueError, match=r"PRIOR 'oracle': expected one of none, previous_prediction"):
        build(A, "oracle")
    with pytest.raises(ValueError, match=r"PRIOR_GT_WARMUP 2.0"):
        build(A, "stage1", "MODEL.CONTEXT.PRIOR_GT_WARMUP", 2.0)
    with pytest.raises(ValueError, match=r"CLASS_MEMORY\.LOOKUP 'firm'"):
        build(A, "stage1", "MODEL.BLOCKS.CLASS_MEMORY.LOOKUP", "firm")
    with pytest.raises(ValueError, match=r"MOMENTUM 3\.0"):
        build(A, "stage1", "MODEL.BLOCKS.CLASS_MEMORY.MOMENTUM", 3.0)
    model = build().eval()
    frame, labels = clip().frames[0], clip().labels[0][None]
    with pytest.raises(ValueError, match=r"size \(32, 64\).*frames of size \(64, 64\)"):
        model.step(frame, model.init_state(), Hints(prior=PriorMap.from_labels(labels[:, :32], CLASSES)))
    with pytest.raises(ValueError, match="6 classes, the model 4"):
        model.step(frame, model.init_state(), Hints(prior=PriorMap.from_labels(labels, 6)))
    plain = build("ppm", "none", "MODEL.BLOCKS.PPM.CHANNELS", 16).eval()
    with pytest.raises(ValueError, match="no block of the model reads one"):
        plain.step(frame, plain.init_state(), Hints(prior=PriorMap.from_labels(labels, CLASSES)))
