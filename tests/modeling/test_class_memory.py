"""Class memory against loops over pixels in float64, closed forms, and two processes against one."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from tolerances import assert_close
from torch.nn import functional as F

from the_mask.modeling.pixel.context.class_memory import ClassMemory, read_rows
from the_mask.modeling.pixel.context.class_rows import MomentumSchedule, downsample_labels
from the_mask.modeling.pixel.context.prior_map import PriorMap

K, C, IGNORE = 5, 6, 255


def batch(frames=4, size=(8, 10), label_size=(16, 20), seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, C, *size, generator=generator)
    labels = torch.randint(K - 1, (frames, *label_size), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    labels[frames // 2 :][labels[frames // 2 :] == 1] = 0  # class 1 in the first half only; class 4 nowhere
    return features, labels


def filled(prototypes=1, seed=9, **options):
    memory = ClassMemory(K, C, prototypes, **options)
    memory.rows.copy_(torch.randn(memory.rows.shape, generator=torch.Generator().manual_seed(seed)))
    memory.seen.fill_(True)
    return memory


def brute_force(rows, features, labels, momentum):
    """Eq. 1-4 pixel by pixel; rows [K, n, C]; every class was seen."""
    rows = rows.double()
    result = rows.clone()
    pixels = [
        (int(labels[b, y, x]), features[b, :, y, x].double())
        for b in range(labels.shape[0])
        for y in range(labels.shape[1])
        for x in range(labels.shape[2])
    ]
    for c in range(K):
        members = [[] for _ in range(rows.shape[1])]
        for label, r in pixels:
            if label == c:
                similarity = [float(r @ m / (r.norm() * m.norm())) for m in rows[c]]
                j = max(range(len(similarity)), key=similarity.__getitem__)
                members[j].append((1 - similarity[j], r))
        for j, group in enumerate(members):
            if group:
                new = sum(w * r for w, r in group) / sum(w for w, _ in group)
                result[c, j] = (1 - momentum) * rows[c, j] + momentum * new
    return result


@pytest.mark.parametrize("prototypes", [1, 3])
@pytest.mark.parametrize("update_at", ["labels", "features"])
def test_update_is_the_loop_over_pixels(prototypes, update_at):
    memory = filled(prototypes, update_at=update_at)
    features, labels = batch()
    before = memory.rows.clone()
    memory.collect(features, labels, range(4))
    assert_close(memory.rows, before, "same")
    memory.update(0.3)
    if update_at == "labels":
        features = F.interpolate(features.double(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    else:
        labels = downsample_labels(labels, features.shape[-2:])
    assert_close(memory.rows, brute_force(before, features, labels, 0.3), "sum")
    assert_close(memory.rows[4], before[4], "same")  # an absent class keeps its rows


@pytest.mark.parametrize("make", [filled, lambda: ClassMemory(K, C, 7)])
def test_bands_of_rows_add_up(monkeypatch, make):
    features, labels = batch()
    whole, bands = make(), make()
    whole.collect(features, labels, range(4))
    monkeypatch.setattr("the_mask.modeling.pixel.context.class_rows.VALUES_PER_BAND", C * 20 * 3)
    bands.collect(features, labels, range(4))
    whole.update(0.5)
    bands.update(0.5)
    assert_close(whole.rows, bands.rows, "formula")


def test_moving_average_in_closed_form():
    """Constant features f: M_t = f + (1 - m)^t (M_0 - f), whatever the weights."""
    memory = filled()
    start = memory.rows.clone()
    features = torch.randn(K, C, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(K).view(1, 1, K).expand(1, 3, K)
    maps = features.t().view(1, C, 1, K).expand(1, C, 3, K)
    for _ in range(7):
        memory.collect(maps, labels, [0])
        memory.update(0.2)
    assert_close(memory.rows[:, 0], features + 0.8**7 * (start[:, 0] - features), "network")


def test_pixels_equal_to_their_prototype_take_the_plain_mean():
    memory = filled()
    maps = (3 * memory.rows[:, 0]).t().reshape(1, C, 1, K)
    memory.collect(maps, torch.arange(K).view(1, 1, K), [0])
    before = memory.rows.clone()
    memory.update(1.0)
    torch.testing.assert_close(memory.rows, 3 * before)


@pytest.mark.parametrize("prototypes", [1, 2])
def test_first_sight_takes_the_mean_and_absent_classes_stay_unseen(prototypes):
    memory = ClassMemory(K, C, prototypes, update_at="features")
    features, labels = batch(label_size=(8, 10))
    memory.collect(features, labels, range(4))
    memory.update(0.1)
    assert memory.seen.tolist() == [True, True, True, True, False]
    assert not memory.rows[4].any()
    place = torch.arange(80).view(8, 10)
    for c in range(4):
        for j in range(prototypes):
            chosen = (labels == c) & (place % prototypes == j)
            torch.testing.assert_close(memory.rows[c, j], features.movedim(1, -1)[chosen].mean(0))


def test_first_sight_of_fewer_pixels_than_prototypes():
    memory = ClassMemory(K, C, 3, update_at="features")
    labels = torch.full((1, 2, 2), IGNORE)
    labels[0, 0, 1] = 2
    features = torch.randn(1, C, 2, 2, generator=torch.Generator().manual_seed(1))
    memory.collect(features, labels, [0])
    memory.update(0.1)
    torch.testing.assert_close(memory.rows[2], features[0, :, 0, 1].expand(3, C))


@pytest.mark.parametrize("prototypes", [1, 3])
def test_random_pixel_is_a_pixel_of_the_class_and_repeats(prototypes):
    features, labels = batch(label_size=(8, 10))
    rows = []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for seeds in (range(4), range(4), range(10, 14)):
        memory = ClassMemory(K, C, prototypes, init="random_pixel", update_at="features")
        memory.collect(features, labels, seeds)
        memory.update(0.9)
        rows.append(memory.rows.clone())
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    pixels = features.movedim(1, -1)
    for c in range(4):
        for row in rows[0][c]:
            assert (pixels[labels == c] == row).all(dim=1).any()
        assert len(rows[0][c].unique(dim=0)) == prototypes
    # From then on the row moves like any other.
    memory.collect(features, labels, range(4))
    memory.update(0.9)
    expected = brute_force(rows[2], features, labels, 0.9)
    assert_close(memory.rows[:4], expected[:4], "sum")


def test_sums_are_of_all_micro_batches_and_reset_forgets():
    features, labels = batch()
    whole, parts, other = filled(), filled(), filled()
    whole.collect(features, labels, range(4))
    parts.collect(features[:1], labels[:1], [0])
    parts.collect(features[1:], labels[1:], [1, 2, 3])
    other.collect(features, labels, range(4))
    other.reset()
    before = other.rows.clone()
    for memory in (whole, parts, other):
        memory.update(0.4)
    assert_close(whole.rows, parts.rows, "formula")
    assert torch.equal(other.rows, before)


def test_momentum_schedule():
    schedule = MomentumSchedule()
    for t in (0, 10, 99, 100, 250):
        s = min(t / 100, 1)
        assert schedule(t, 100) == pytest.approx(0.9 * (0.99 * (1 - s) ** 0.9 + 0.01))
    assert [MomentumSchedule(0.1, 0.0)(t, 10) for t in (0, 5, 10)] == pytest.approx([0.1] * 3)
    with pytest.raises(ValueError, match=r"MOMENTUM 1.5"):
        MomentumSchedule(1.5)


def test_hard_read_returns_the_row_and_soft_one_hot_the_same():
    memory = filled(2)
    memory.seen[3] = False
    labels = torch.tensor([[[0, 1, 2], [3, 4, IGNORE]]])
    hard = memory.read(PriorMap.from_labels(labels, K))
    assert hard.shape == (1, 2, C, 2, 3)
    for y in range(2):
        for x in range(3):
            label = int(labels[0, y, x])
            expected = memory.rows[label] if label in (0, 1, 2, 4) else torch.zeros(2, C)
            assert torch.equal(hard[0, :, :, y, x], expected)
    soft = memory.read(PriorMap.from_labels(labels, K).soften())
    torch.testing.assert_close(soft, hard)


def test_soft_read_is_the_expected_row():
    memory = filled()
    probabilities = torch.rand(2, K, 3, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    got = read_rows(memory.rows, memory.seen, PriorMap.from_probabilities(probabilities))
    expected = torch.zeros(2, C, 3, 4, dtype=torch.float64)
    for k in range(K):
        expected += probabilities[:, k, None].double() * memory.rows[k, 0].double()[None, :, None, None]
    assert_close(got[:, 0], expected, "sum")


def test_no_gradient_reaches_or_leaves_the_memory():
    memory = filled()
    features, labels = batch()
    features.requires_grad_()
    memory.collect(features, labels, range(4))
    memory.update(0.5)
    assert not memory.rows.requires_grad
    assert not memory.read(PriorMap.from_labels(labels, K)).requires_grad
    assert not list(memory.parameters())


def test_checkpoint_holds_rows_and_seen():
    memory, copy = filled(2), ClassMemory(K, C, 2)
    memory.seen[1] = False
    copy.load_state_dict(memory.state_dict())
    assert torch.equal(copy.rows, memory.rows)
    assert torch.equal(copy.seen, memory.seen)


@pytest.mark.parametrize(("classes", "prototypes"), [(K + 2, 1), (K, 2)])
def test_checkpoint_of_another_class_count_is_named(classes, prototypes):
    with pytest.raises(ValueError, match=rf"\[{classes}, {prototypes}, {C}\].*\[{K}, 1, {C}\].*NUM_CLASSES"):
        ClassMemory(K, C).load_state_dict(ClassMemory(classes, C, prototypes).state_dict())


def test_rows_from_a_file(tmp_path: Path):
    rows = torch.randn(K, C)
    rows[2] = 0
    torch.save({"rows": rows}, tmp_path / "rows.pth")
    save_file({"rows": rows[:, None].expand(K, 2, C).contiguous()}, tmp_path / "rows.safetensors")
    memory = ClassMemory(K, C, init="file", init_file=str(tmp_path / "rows.pth"))
    assert torch.equal(memory.rows[:, 0], rows)
    assert memory.seen.tolist() == [True, True, False, True, True]
    assert ClassMemory(K, C, 2, init="file", init_file=str(tmp_path / "rows.safetensors")).rows.shape == (K, 2, C)


def test_bad_files_and_settings_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        ClassMemory(K, C, init="file", init_file=str(tmp_path / "absent.pth"))
    torch.save(torch.zeros(K + 1, C), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other.pth holds \[{K + 1}, {C}\], expected .*\[{K}, 1, {C}\]"):
        ClassMemory(K, C, init="file", init_file=str(tmp_path / "other.pth"))
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two\.pth must hold one tensor"):
        ClassMemory(K, C, init="file", init_file=str(tmp_path / "two.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for name in ("broken.pth", "broken.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is corrupt"):
            ClassMemory(K, C, init="file", init_file=str(tmp_path / name))
    with pytest.raises(ValueError, match="INIT 'mean': expected one of first_seen_mean"):
        ClassMemory(K, C, init="mean")
    with pytest.raises(ValueError, match="UPDATE_RES 'half'"):
        ClassMemory(K, C, update_at="half")
    with pytest.raises(ValueError, match="INIT_FILE"):
        ClassMemory(K, C, init="file")
    with pytest.raises(ValueError, match="got 0 prototypes"):
        ClassMemory(K, C, 0)


def two_updates(memory, frames):
    """Two iterations on a share of the frames; returns the rows and who was seen."""
    for seed in (0, 1):
        features, labels = batch(seed=seed)
        seeds = [10 * seed + f for f in range(4)]
        memory.collect(features[frames], labels[frames], seeds[frames])
        memory.update(0.3)
    return memory.rows.clone(), memory.seen.clone()


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    frames = slice(2 * rank, 2 * rank + 2)
    results = [two_updates(ClassMemory(K, C, n, init=init), frames) for n in (1, 2) for init in RANDOM]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


RANDOM = ("first_seen_mean", "random_pixel")


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.skipif(sys.platform == "win32", reason="file rendezvous")
def test_two_gloo_processes_equal_one(tmp_path: Path):
    """Class 1 occurs on the first process only; no class is diluted."""
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = [two_updates(ClassMemory(K, C, n, init=init), slice(None)) for n in (1, 2) for init in RANDOM]
    for (rows0, seen0), (rows1, seen1), (rows, seen) in zip(first, second, alone, strict=True):
        assert torch.equal(rows0, rows1)
        assert torch.equal(seen0, seen1)
        assert torch.equal(seen0, seen)
        assert_close(rows0, rows, "formula")
