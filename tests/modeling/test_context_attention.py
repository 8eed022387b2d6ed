"""Dense-attention blocks against naive loops and torch's own pooling: tma, apnb, afnb, nonlocal, channel."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from tolerances import assert_close
from torch.nn import functional as F

import the_mask.modeling  # noqa: F401  (fills the registries)
from the_mask.config import load_config
from the_mask.modeling.pixel.context.attention import attend, pool_bins, pooled_frame, pooled_slots, time_bins
from the_mask.modeling.pixel.context.image_blocks import channel_attention
from the_mask.modeling.pixel.context.registry import CONTEXT_BLOCKS, BlockInputs
from the_mask.modeling.pixel.context.types import ClipFeatures

CHANNELS, T = 8, 3
SIZES = [1, 3, 6, 8]


def make(kind, slots=T, norm="BN", channels=CHANNELS, **options):
    cfg = load_config(overrides=["MODEL.SEM_SEG_HEAD.NORM", norm, "MODEL.CONTEXT.MEMORY_LENGTH", str(slots)])
    own = cfg.MODEL.BLOCKS[kind.upper()].clone()
    small = {"KEY_CHANNELS": 4, "VALUE_CHANNELS": 6, "CHANNELS": 10}
    own.merge_from_other_cfg(CfgNode({k: v for k, v in small.items() if k in own} | options))
    levels = {"main": ShapeSpec(channels=channels, stride=8), "res4": ShapeSpec(channels=5, stride=8)}
    torch.manual_seed(0)
    block = CONTEXT_BLOCKS.get(kind)(BlockInputs(kind, own, levels, levels, cfg)).double().eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return block


def frame(batch=2, height=5, width=7, seed=0):
    torch.manual_seed(seed)
    return {
        "main": torch.randn(batch, CHANNELS, height, width).double(),
        "res4": torch.randn(batch, 5, height, width).double(),
    }


def clip(slots=T, batch=2, valid=None, **size):
    frames = tuple(frame(batch, seed=10 + t, **size) for t in range(slots))
    return ClipFeatures(frames, torch.ones(batch, slots, dtype=torch.bool) if valid is None else valid)


def naive_attention(query, key, value, scale):
    """Loops over queries: [C, N], [C, S], [V, S] -> [V, N]."""
    out = []
    for n in range(query.shape[1]):
        logits = torch.stack([scale * (query[:, n] * key[:, s]).sum() for s in range(key.shape[1])])
        weights = torch.exp(logits - logits.max())
        out.append((value * (weights / weights.sum())).sum(1))
    return torch.stack(out, 1)


@pytest.mark.parametrize(("c", "v"), [(4, 6), (6, 4), (5, 5)])
def test_attend_against_loops(c, v):
    torch.manual_seed(0)
    q, k, x = torch.randn(2, c, 9).double(), torch.randn(2, c, 11).double(), torch.randn(2, v, 11).double()
    valid = torch.rand(2, 11) > 0.4
    got, masked = attend(q, k, x, None, 0.7), attend(q, k, x, valid, 0.7)
    for b in range(2):
        torch.testing.assert_close(got[b], naive_attention(q[b], k[b], x[b], 0.7))
        keep = valid[b]
        torch.testing.assert_close(masked[b], naive_attention(q[b], k[b][:, keep], x[b][:, keep], 0.7))


def test_attention_rows_sum_to_one_and_no_key_gives_zero():
    q, k = torch.randn(2, 4, 9), torch.randn(2, 4, 11)
    ones = torch.ones(2, 3, 11)
    torch.testing.assert_close(attend(q, k, ones, None, 1.0), torch.ones(2, 3, 9))
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[1] = False
    out = attend(q, k, ones, valid, 1.0)
    torch.testing.assert_close(out[0], torch.ones(3, 9))
    assert (out[1] == 0).all()


@pytest.mark.parametrize("slots", [1, 3])
def test_tma_equals_naive_loops(slots):
    block = make("tma", slots)
    now, past = frame(height=3, width=4), clip(slots, height=3, width=4)
    p = block.projector
    q, own = p.query_key(now["main"]), p.query_value(now["main"])
    expected = []
    for b in range(2):
        keys = torch.cat([p.memory_key[t](f["main"])[b].flatten(1) for t, f in enumerate(past.frames)], 1)
        values = torch.cat([p.memory_value[t](f["main"])[b].flatten(1) for t, f in enumerate(past.frames)], 1)
        expected.append(naive_attention(q[b].flatten(1), keys, values, 1.0).view(6, 3, 4))
    expected = block.fusion.conv(torch.cat([own, torch.stack(expected)], 1))
    torch.testing.assert_close(block(now, past).feature, expected)
    assert block.out_channels == 10


@pytest.mark.parametrize(("kind", "options"), [("tma", {}), ("apnb", {"POOL": "plane"}), ("apnb", {"POOL": "cube"})])
def test_permuting_slots_with_their_weights(kind, options):
    """plane and tma do not care about the order of slots; cube does, since its bins join neighbours."""
    block, now, past = make(kind, **options), frame(), clip()
    before = block(now, past).feature
    order = [2, 0, 1]
    permuted = ClipFeatures(tuple(past.frames[i] for i in order), past.valid)
    for name in ("memory_key", "memory_value"):
        encoders = getattr(block.projector, name)
        setattr(block.projector, name, torch.nn.ModuleList(encoders[i] for i in order))
    after = block(now, permuted).feature
    assert torch.allclose(before, after) is (options.get("POOL") != "cube")


@pytest.mark.parametrize(
    ("kind", "options"), [("tma", {}), *(("apnb", {"POOL": pool}) for pool in ("cube", "clipped", "plane"))]
)
@pytest.mark.parametrize("current", [False, True])
def test_masked_slots_have_no_influence(kind, options, current):
    block = make(kind, INCLUDE_CURRENT=current, **options)
    valid = torch.tensor([[False, True, True], [False, False, False]])
    now, past = frame(), clip(valid=valid)
    changed = list(past.frames)
    changed[0] = frame(seed=99)
    keep = valid[:, 1, None, None, None]
    changed[1] = {k: torch.where(keep, v, v * 7) for k, v in changed[1].items()}
    before, after = block(now, past).feature, block(now, ClipFeatures(tuple(changed), valid)).feature
    assert_close(before, after, "same")
    assert torch.isfinite(before).all()


def test_include_current_is_the_newest_slot_and_shared_slots_are_one_set():
    block, now, past = make("tma", INCLUDE_CURRENT=True), frame(), clip()
    assert len(block.projector.memory_key) == T + 1
    longer = make("tma", slots=T + 1)
    longer.load_state_dict(block.state_dict())
    frames = (*past.frames, now)
    valid = torch.ones(2, T + 1, dtype=torch.bool)
    torch.testing.assert_close(block(now, past).feature, longer(now, ClipFeatures(frames, valid)).feature)

    shared = make("tma", SHARE_SLOTS=True)
    assert len(shared.projector.memory_key) == 1
    separate = make("tma")
    state = shared.state_dict()
    for t in range(1, T):
        state |= {k.replace(".0.", f".{t}.", 1): v for k, v in shared.state_dict().items() if "projector.memory_" in k}
    separate.load_state_dict(state)
    torch.testing.assert_close(shared(now, past).feature, separate(now, past).feature)


def test_only_the_newest_slots_are_read():
    block, now = make("tma", slots=2), frame()
    longer = clip(4)
    torch.testing.assert_close(block(now, longer).feature, block(now, longer.newest(2)).feature)
    with pytest.raises(ValueError, match="needs 2 memory frames, the clip has 1"):
        block(now, clip(1))
    with pytest.raises(ValueError, match="given no memory"):
        block(now)


def test_pyramid_of_cubes_is_adaptive_pooling_in_three_dimensions():
    torch.manual_seed(0)
    frames = torch.randn(2, 4, 3, 11, 13).double()
    valid = torch.ones(2, 4, dtype=torch.bool)
    got, mask = pooled_slots(frames, valid, SIZES, "cube")
    volume = frames.transpose(1, 2)
    expected = torch.cat([F.adaptive_avg_pool3d(volume, s).flatten(2) for s in SIZES], 2)
    torch.testing.assert_close(got, expected)
    assert mask is None
    expected = torch.cat([F.adaptive_avg_pool3d(volume, (min(s, 4), s, s)).flatten(2) for s in SIZES], 2)
    torch.testing.assert_close(pooled_slots(frames, valid, SIZES, "clipped")[0], expected)
    expected = torch.cat([F.adaptive_avg_pool3d(volume, (4, s, s)).flatten(2) for s in SIZES], 2)
    torch.testing.assert_close(pooled_slots(frames, valid, SIZES, "plane")[0], expected)
    assert [pooled_slots(frames, valid, SIZES, m)[0].shape[2] for m in ("cube", "clipped", "plane")] == [756, 428, 440]
    assert pooled_frame(frames[:, 0], SIZES).shape == (2, 3, 110)


def test_pooling_bins():
    assert pool_bins(4, 3).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert pool_bins(2, 4).int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    with pytest.raises(ValueError, match="POOL 'x'"):
        time_bins([1], 2, "x")


def test_spatial_apnb_is_the_original_and_starts_without_its_context():
    block, now = make("apnb", POOL="spatial"), frame()
    x = now["main"]
    joined = block.fusion.conv(torch.cat([x, torch.zeros_like(x)], 1))
    torch.testing.assert_close(block(now).feature, joined)
    torch.nn.init.normal_(block.fusion.expand.weight)
    q = block.projector.to_query(x)
    value = pooled_frame(block.projector.to_value(x), SIZES)
    context = torch.stack(
        [naive_attention(q[b].flatten(1), pooled_frame(q, SIZES)[b], value[b], 6**-0.5) for b in range(2)]
    )
    expected = block.fusion.conv(torch.cat([x, block.fusion.expand(context.unflatten(2, x.shape[-2:]))], 1))
    torch.testing.assert_close(block(now).feature, expected)
    assert block.memory_len == 0


def test_afnb_reads_the_earlier_level_and_starts_without_its_context():
    block, now = make("afnb"), frame()
    x, low = now["main"], now["res4"]
    torch.testing.assert_close(block(now).feature, block.fusion.conv(torch.cat([x, torch.zeros_like(x)], 1)))
    torch.nn.init.normal_(block.fusion.expand.weight)
    p = block.projector
    q, k, v = p.to_query(x), pooled_frame(p.to_key(low), SIZES), pooled_frame(p.to_value(low), SIZES)
    context = torch.stack([naive_attention(q[b].flatten(1), k[b], v[b], 0.5) for b in range(2)])
    expected = block.fusion.conv(torch.cat([x, block.fusion.expand(context.unflatten(2, x.shape[-2:]))], 1))
    torch.testing.assert_close(block(now).feature, expected)
    assert not block.fusion.conv.relu
    assert block.in_levels == ("main", "res4")


@pytest.mark.parametrize("norm", ["BN", ""])
def test_nonlocal_starts_as_its_convolutions_alone(norm):
    block, now = make("nonlocal", norm=norm), frame()
    x = now["main"]
    plain = block.bottleneck(torch.cat([x, block.after(block.before(x))], 1))
    if norm:
        torch.nn.init.zeros_(block.inner.fusion.expand.bn.running_mean)
    torch.testing.assert_close(block(now).feature, plain)
    inner = block.inner
    torch.nn.init.ones_((inner.fusion.expand.bn if norm else inner.fusion.expand.conv).weight)
    y = block.before(x)
    q, k, v = (
        conv(y).flatten(2) for conv in (inner.projector.to_query, inner.projector.to_key, inner.projector.to_value)
    )
    context = torch.stack([naive_attention(q[b], k[b], v[b], 5**-0.5) for b in range(2)])
    y = y + inner.fusion.expand(context.unflatten(2, x.shape[-2:]))
    torch.testing.assert_close(block(now).feature, block.bottleneck(torch.cat([x, block.after(y)], 1)))


def test_channel_attention():
    x = torch.randn(2, 4, 3, 5)
    got = channel_attention(x)
    for b in range(2):
        flat = x[b].flatten(1)
        energy = [[float((flat[i] * flat[j]).sum()) for j in range(4)] for i in range(4)]
        for i in range(4):
            weights = torch.softmax(torch.tensor([max(energy[i]) - e for e in energy[i]]), 0)
            torch.testing.assert_close(got[b, i].flatten(), (weights[:, None] * flat).sum(0))
    block, now = make("channel"), frame()
    torch.testing.assert_close(block(now).feature, block.after(block.before(now["main"])))
    torch.nn.init.ones_(block.gamma)
    assert not torch.allclose(block(now).feature, block.after(block.before(now["main"])))
