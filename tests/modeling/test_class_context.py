"""Lookup and attention of the class memory against the paper's equations written out."""

import pytest
import torch
from tolerances import assert_close
from torch import nn

from the_mask.data.clips import Clip
from the_mask.modeling.pixel.context.class_context import ClassAttention, ClassContext
from the_mask.modeling.pixel.context.class_memory import ClassMemory
from the_mask.modeling.pixel.context.prior_map import PriorMap
from the_mask.modeling.pixel.context.types import TrainBatch

K, C, IGNORE = 4, 8, 255


def context(prototypes=1, seed=0, **options):
    torch.manual_seed(seed)
    memory = ClassMemory(K, C, prototypes, update_at="features")
    memory.rows.copy_(torch.randn(K, prototypes, C))
    memory.seen.fill_(True)
    return ClassContext(C, memory, **options).eval()


def features(batch=2, size=(3, 5), seed=1):
    return torch.randn(batch, C, *size, generator=torch.Generator().manual_seed(seed))


def labels(batch=2, size=(3, 5), seed=2):
    return torch.randint(K, (batch, *size), generator=torch.Generator().manual_seed(seed))


def naive(block, r, looked_up, known):
    """Eq. 5-6 for one frame, query by query, in float64; r and looked_up [C, h, w], known [h, w]."""
    block = block.double()
    query, key, value = block.query(r[None])[0], block.key(looked_up[None])[0], block.value(looked_up[None])[0]
    inner, height, width = query.shape
    out = torch.zeros_like(query)
    keys = [(y, x) for y in range(height) for x in range(width) if known[y, x]]
    for y in range(height):
        for x in range(width):
            if keys:
                scores = torch.stack([query[:, y, x] @ key[:, j, i] for j, i in keys]) / inner**0.5
                weights = scores.softmax(0)
                out[:, y, x] = sum(w * value[:, j, i] for w, (j, i) in zip(weights, keys, strict=True))
    return block.out(out[None])[0]


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_attention_is_the_equation(share):
    torch.manual_seed(0)
    block = ClassAttention(C, "BN").eval()
    r, looked_up = features(), features(seed=5)
    known = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(3)) < share
    got = block(r, looked_up, known)
    reference = ClassAttention(C, "BN").eval()
    reference.load_state_dict(block.state_dict())
    for b in range(2):
        want = naive(reference, r[b].double(), looked_up[b].double(), known[b])
        assert_close(got[b], want, "sum")


def test_pixels_without_a_row_have_no_influence():
    torch.manual_seed(0)
    block = ClassAttention(C, "BN").eval()
    r, looked_up = features(1), features(1, seed=5)
    known = torch.ones(1, 3, 5, dtype=torch.bool)
    known[0, 1] = False
    other = looked_up.clone()
    other[:, :, 1] = 99.0
    assert torch.equal(block(r, looked_up, known), block(r, other, known))


@pytest.mark.parametrize("prototypes", [1, 2])
def test_context_puts_lookup_and_attention_together(prototypes):
    model = context(prototypes)
    r, prior = features(), PriorMap.from_labels(labels(), K)
    got = model(r, prior)
    parts = []
    for n in range(prototypes):
        rows = model.memory.rows[labels(), n].permute(0, 3, 1, 2)
        parts.append(model.attention[n](r, rows, torch.ones(2, 3, 5, dtype=torch.bool)))
    want = model.fuse(torch.cat(parts, 1))
    torch.testing.assert_close(got.feature, want)
    torch.testing.assert_close(got.stage1, model.conv_seg(model.stage1(r)))
    assert got.feature.shape == r.shape


def test_without_prior_the_first_classifier_decides():
    hard, soft = context(lookup="hard"), context(lookup="soft")
    logits = hard.conv_seg(hard.stage1(features()))
    assert torch.equal(hard.look_up(logits, None), hard.memory.read(PriorMap.from_labels(logits.argmax(1), K)))
    rows = torch.einsum("bkhw,kc->bchw", logits.softmax(1), soft.memory.rows[:, 0])
    torch.testing.assert_close(soft.look_up(logits, None)[:, 0], rows)


def test_unknown_pixels_of_a_prior_read_the_first_classifier_softly():
    model = context()
    logits = model.conv_seg(model.stage1(features()))
    given = labels()
    given[:, 1] = IGNORE
    rows = model.look_up(logits, PriorMap.from_labels(given, K))[:, 0]
    soft = torch.einsum("bkhw,kc->bchw", logits.softmax(1), model.memory.rows[:, 0])
    torch.testing.assert_close(rows[:, :, 1], soft[:, :, 1])
    assert torch.equal(rows[:, :, 0], model.memory.rows[given[:, 0], 0].permute(0, 2, 1))


def test_prior_of_any_size_is_resized_and_others_are_refused():
    model = context()
    big = labels().repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(
        model(features(), PriorMap.from_labels(big, K)).feature,
        model(features(), PriorMap.from_labels(labels(), K)).feature,
    )
    with pytest.raises(ValueError, match="5 classes, the model 4"):
        model(features(), PriorMap.from_labels(labels(), 5))
    with pytest.raises(ValueError, match="3 maps"):
        model(features(), PriorMap.from_labels(labels(3), K))


def test_nothing_seen_yet_gives_finite_features_and_gradients():
    torch.manual_seed(0)
    model = ClassContext(C, ClassMemory(K, C)).train()
    output = model(features(), PriorMap.from_labels(labels(), K))
    (output.feature.sum() + output.stage1.sum()).backward()
    assert torch.isfinite(output.feature).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()


def batch_of(count, size=(3, 5), seed=2):
    images = torch.zeros(count, 1, 3, *size)
    clips = [Clip(seed=i) for i in range(count)]
    return TrainBatch(clips, images, labels(count, size, seed), torch.ones(count, 0, dtype=torch.bool))


def test_memory_is_read_before_it_is_updated_and_once_per_iteration():
    model = context(total_iterations=10).train()
    before = model.memory.rows.clone()
    for part in (slice(0, 1), slice(1, 2)):
        whole = batch_of(2)
        model(features()[part])
        model.after_loss(TrainBatch(whole.clips[part], whole.images[part], whole.labels[part], whole.valid[part]), 3)
        assert torch.equal(model.memory.rows, before)
    model.after_step()
    other = context(total_iterations=10).train()
    other.memory.collect(features(), labels(), range(2))
    other.memory.update(other.memory.momentum(3, 10))
    torch.testing.assert_close(model.memory.rows, other.memory.rows)
    # What an iteration left that never came to its step is forgotten.
    model(features(seed=7))
    model.after_loss(batch_of(2, seed=9), 4)
    model(features())
    model.after_loss(batch_of(2), 5)
    model.after_step()
    other.memory.collect(features(), labels(), range(2))
    other.memory.update(other.memory.momentum(5, 10))
    torch.testing.assert_close(model.memory.rows, other.memory.rows)


def test_eval_mode_leaves_nothing_for_an_update():
    model = context()
    model(features())
    model.after_loss(batch_of(2), 0)
    before = model.memory.rows.clone()
    model.after_step()
    assert torch.equal(model.memory.rows, before)


def test_memory_loss_is_cross_entropy_of_the_seen_rows():
    model = context(2)
    model.memory.seen[1] = False
    last = nn.Conv2d(C, K, 1)
    want = 0.0
    for k in (0, 2, 3):
        for row in model.memory.rows[k]:
            want = want - (last.weight[:, :, 0, 0] @ row + last.bias).log_softmax(0)[k]
    got = model.memory_loss_of(last)
    torch.testing.assert_close(got, want / 6)
    got.backward()
    assert last.weight.grad is not None
    model.memory.seen.fill_(False)
    assert model.memory_loss_of(last).item() == 0.0


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="LOOKUP 'firm'"):
        context(lookup="firm")
    with pytest.raises(ValueError, match="rows of 8 channels for features of 6"):
        ClassContext(6, ClassMemory(K, C))
