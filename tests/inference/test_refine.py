"""Global and local steps, splitting, reassembly, and refinement as a step of a pipeline."""

import cv2
import numpy as np
import pytest
import torch
from tolerances import assert_close
from torch.nn import functional as F

from the_mask.config.keys.inference import RefinementOptions
from the_mask.inference.class_refine import ClassRefinement, Piece, reassemble, split_classes, uncertain_share
from the_mask.inference.refine import local_step, refine_mask, resize, tile_corners, working_size


class Keeper(torch.nn.Module):
    """A refiner that answers with the mask it is given (or with a fixed function of place); counts its calls."""

    def __init__(self, answer=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answer = answer
        self.calls = []

    def refine(self, images, masks, coarse=None):
        self.calls.append((tuple(images.shape), coarse is not None))
        out = (masks + 1) / 2 if self.answer is None else self.answer(images, masks)
        return out, out


def test_working_sizes():
    assert working_size(300, 400) == (300, 400)
    assert working_size(900, 1800) == (450, 900)
    assert working_size(50, 100, 900, 224) == (112, 224)
    assert working_size(50, 100, 900, 224, 32) == (128, 224)
    assert working_size(3, 400, 900, 224, 32) == (32, 384)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(100, 230, 100), (900, 901, 900), (95, 95, 100), (2000, 900, 900)]
)
def test_tiles_cover_the_picture_inside_it(height, width, side):
    corners = tile_corners(height, width, side)
    covered = np.zeros((height, width), dtype=int)
    for top, left in corners:
        assert 0 <= top <= max(height - side, 0)
        assert 0 <= left <= max(width - side, 0)
        covered[top : top + side, left : left + side] += 1
    assert covered.min() >= 1
    assert len(set(corners)) == len(corners)


def test_a_mask_without_a_border_comes_back():
    network = Keeper()
    image = torch.zeros(3, 40, 50, dtype=torch.uint8)
    for value in (False, True):
        mask = torch.full((40, 50), value)
        assert torch.equal(refine_mask(network, image, mask), mask.float())
    assert not network.calls


def test_the_global_step_alone():
    network = Keeper()
    image, mask = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.bool)
    mask[10:30, 10:40] = True
    assert torch.equal(refine_mask(network, image, mask), mask.float())
    assert network.calls == [((1, 3, 40, 60), False)]
    refine_mask(network, image, mask, long_edge=30, local=False)
    assert network.calls[1:] == [((1, 3, 20, 30), False)]


def test_the_local_step_against_a_loop():
    """A network that answers with a ramp: overlaps averaged, inner sides trimmed, dull tiles skipped."""
    side, height, width = 100, 150, 230
    network = Keeper(lambda images, masks: masks * 0 + torch.arange(masks.shape[-1]) / 1000)
    whole = torch.zeros(1, 1, height, width)
    whole[..., 40:] = 0.9
    result = local_step(network, torch.zeros(1, 3, height, width), whole, whole, side)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for top in (0, 18, 36, 50):
        for left in (0, 18, 36, 54, 72, 90, 108, 126, 130):
            share = (whole[0, 0, top : top + side, left : left + side] > 0.5).float().mean()
            if share < 0.1 or share > 0.9:
                continue
            for y in range(top + (16 if top else 0), top + side - (16 if top + side < height else 0)):
                for x in range(left + (16 if left else 0), left + side - (16 if left + side < width else 0)):
                    total[y, x] += (x - left) / 1000
                    count[y, x] += 1
    expected = np.where(count > 0, total / np.maximum(count, 1), (whole[0, 0] > 0.5).numpy())
    assert_close(result[0, 0], expected, "unit")
    assert (count == 0).any()
    assert all(call[1] for call in network.calls)


def label_map():
    labels = np.zeros((200, 260), dtype=np.uint8)
    labels[20:90, 20:100] = 1
    labels[20:90, 108:180] = 1  # a gap of 8 pixels: joined with the first
    labels[130:190, 200:255] = 1  # apart
    labels[150:160, 20:30] = 2  # too small
    return labels


def test_splitting():
    pieces = list(split_classes(label_map()))
    assert [piece.label for piece in pieces] == [0, 1, 1]
    near, far = pieces[1:]
    # The released disk is not symmetric, and loses the first row and column of a component.
    assert near.mask.sum() == 69 * 79 + 69 * 72
    assert far.mask.sum() == 59 * 54
    # Boxes grow by an eighth on every side and stop at the frame.
    assert near.box == (21 - 9, 21 - 20, 90 + 9, 180 + 20)
    assert far.box == (131 - 7, 201 - 7, 190 + 7, 260)
    for piece in pieces:
        assert ((label_map()[piece.slices] == piece.label) >= piece.mask).all()


def naive_morphology(mask, pick):
    """Maximum or minimum over the released disk (offsets -5 to 4, at most 5 from the centre) inside the picture."""
    result = np.empty_like(mask)
    for y, x in np.ndindex(mask.shape):
        values = [
            mask[y + dy, x + dx]
            for dy in range(-5, 5)
            for dx in range(-5, 5)
            if dy * dy + dx * dx <= 25 and 0 <= y + dy < mask.shape[0] and 0 <= x + dx < mask.shape[1]
        ]
        result[y, x] = pick(values)
    return result


@pytest.mark.parametrize(("gap", "pieces"), [(8, 1), (9, 1), (10, 2), (19, 2)])
def test_parts_join_over_the_gaps_of_the_release(gap, pieces):
    labels = np.zeros((40, 92 + gap), dtype=np.uint8)
    labels[2:, :40] = labels[2:, 40 + gap : 80 + gap] = 1
    found = [piece for piece in split_classes(labels, least_area=100) if piece.label == 1]
    assert len(found) == pieces
    grown = naive_morphology(labels, max)
    count, components = cv2.connectedComponents(grown, connectivity=8)
    assert count == pieces + 1
    for number, piece in enumerate(found, start=1):
        kept = naive_morphology((components == number).astype(np.uint8), min) & labels
        whole = np.zeros_like(labels)
        whole[piece.slices] = piece.mask
        np.testing.assert_array_equal(whole, kept)


def test_reassembly_against_a_loop():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (20, 30)).astype(np.uint8)
    pieces = []
    for label in (0, 1, 2, 3, 1):
        top, left = int(rng.integers(10)), int(rng.integers(10))
        mask = rng.random((10, 20)) < 0.5
        pieces.append((Piece(label, (top, left, top + 10, left + 20), mask), rng.random((10, 20)).astype(np.float32)))
    expected, confidence = labels.copy(), np.full(labels.shape, 0.5)
    for piece, probability in pieces:
        for y in range(10):
            for x in range(20):
                value = probability[y, x] * (0.51 if piece.label == 2 else 1)
                place = (piece.box[0] + y, piece.box[1] + x)
                if value > confidence[place]:
                    expected[place], confidence[place] = piece.label, value
    assert (reassemble(labels, pieces, {2}) == expected).all()
    assert (reassemble(labels, []) == labels).all()


def certain(labels, classes=4, sharp=1.0):
    hot = F.one_hot(torch.from_numpy(labels).long(), classes).permute(2, 0, 1).float()
    return hot * sharp + (1 - sharp) / classes


def test_refinement_that_keeps_masks_keeps_labels():
    labels = label_map()
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    network = Keeper()
    step = ClassRefinement(network, RefinementOptions(min_uncertain=0.0, least_edge=1), multiple=1)
    assert (step(image, torch.from_numpy(labels), certain(labels), None).numpy() == labels).all()
    assert len(network.calls) == 3


def test_only_uncertain_components_are_refined():
    labels = label_map()
    image = np.zeros((*labels.shape, 3), dtype=np.uint8)
    scores = certain(labels)
    network = Keeper()
    step = ClassRefinement(network, RefinementOptions(min_uncertain=0.5))
    assert torch.equal(step(image, torch.from_numpy(labels), scores, None), torch.from_numpy(labels))
    assert not network.calls
    # Blur the scores around the far component alone.
    scores[:, 115:200, 185:] = certain(labels, sharp=0.3)[:, 115:200, 185:]
    pieces = step.uncertain_pieces(labels, scores)
    assert [piece.box for piece in pieces] == [(124, 194, 197, 260)]
    assert uncertain_share(pieces[0], np.zeros(labels.shape), 0.5) == 1
    step(image, torch.from_numpy(labels), scores, None)
    assert len(network.calls) == 1
    assert (step.frames, step.components) == (2, 1)
    assert step.seconds > 0


def test_crops_of_one_size_run_in_batches():
    labels = np.zeros((120, 400), dtype=np.uint8)
    for index in range(4):
        labels[30:90, 20 + 95 * index : 80 + 95 * index] = 1
    network = Keeper()
    step = ClassRefinement(network, RefinementOptions(min_uncertain=0.0, batch=3))
    image = np.zeros((120, 400, 3), dtype=np.uint8)
    result = step(image, torch.from_numpy(labels), certain(labels), None)
    sizes = [call[0] for call in network.calls]
    assert sorted(size[0] for size in sizes) == [1, 1, 3]
    assert (result.numpy() != labels).mean() < 0.05
    one = ClassRefinement(Keeper(), RefinementOptions(min_uncertain=0.0, batch=1))
    assert torch.equal(one(image, torch.from_numpy(labels), certain(labels), None), result)


def test_maps_without_borders():
    network = Keeper()
    step = ClassRefinement(network, RefinementOptions(min_uncertain=0.0))
    for labels in (np.full((60, 70), 2, dtype=np.uint8), np.zeros((0, 0), dtype=np.uint8)):
        scores = certain(labels)
        result = step(np.zeros((*labels.shape, 3), np.uint8), torch.from_numpy(labels), scores, None)
        assert (result.numpy() == labels).all()
    # Nothing large enough.
    labels = np.indices((40, 40)).sum(0).astype(np.uint8) % 3
    assert torch.equal(
        step(np.zeros((40, 40, 3), np.uint8), torch.from_numpy(labels), certain(labels), None), torch.from_numpy(labels)
    )
    assert not network.calls


def test_a_good_refiner_improves_a_bad_map():
    """The network answers with the truth, read off the picture."""
    labels = label_map()
    image = np.repeat((labels == 1).astype(np.uint8)[..., None] * 255, 3, axis=2)

    def truth(images, masks):
        foreground = (images[:, :1] > 0).float()
        # Background pieces ask for the opposite.
        inside = (masks > 0).float()
        agrees = (foreground * inside).sum((2, 3), keepdim=True) > 0.5 * inside.sum((2, 3), keepdim=True)
        return torch.where(agrees, foreground, 1 - foreground)

    rough = np.roll(labels, 4, axis=1)
    step = ClassRefinement(Keeper(truth), RefinementOptions(min_uncertain=0.0, least_edge=1), multiple=1)
    refined = step(image, torch.from_numpy(rough), certain(rough), None).numpy()
    assert ((refined == 1) == (labels == 1)).mean() > 0.99 > ((rough == 1) == (labels == 1)).mean()


def test_bad_options():
    with pytest.raises(ValueError, match=r"TEST\.REFINER"):
        ClassRefinement(Keeper(), RefinementOptions(least_edge=1000))
    with pytest.raises(ValueError, match=r"TEST\.REFINER\.MIN_UNCERTAIN 2: expected a number in 0\.\.1"):
        ClassRefinement(Keeper(), RefinementOptions(min_uncertain=2))
    assert resize(torch.ones(1, 1, 3, 3), (3, 3), "area").shape == (1, 1, 3, 3)
