"""Weights of another class set: what is dropped, what is copied by name, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from the_mask.config import load_config
from the_mask.modeling.build import build_segmentor
from the_mask.weights.class_sets import CLASS_LAYERS, ClassSets, matching_rows, transfer_rows
from the_mask.weights.loading import load_weights

OURS = ("Person", "traffic_light", "sea", "new one")
THEIRS = ("sea", "cat", "person", "traffic-light", "dog")


class Segmentor(nn.Module):
    """The class layers of a mask decoder (one row more than classes), of a per-pixel head, and a body."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 3)
        self.class_embed = nn.Linear(3, classes + 1)
        self.conv_seg = nn.Conv2d(3, classes, 1)
        self.register_buffer("empty_weight", torch.ones(classes + 1))


def saved(path: Path, classes: int, names: tuple[str, ...] | None) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(classes)
    state = Segmentor(classes).state_dict()
    content = {"model": state} if names is None else {"model": state, "class_names": list(names)}
    torch.save(content, path)
    return path, state


def model(classes: int) -> tuple[Segmentor, dict[str, Tensor]]:
    torch.manual_seed(99)
    segmentor = Segmentor(classes)
    return segmentor, {name: value.clone() for name, value in segmentor.state_dict().items()}


def test_all_but_the_class_layers_are_loaded_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, state = saved(tmp_path / "w.pth", 5, THEIRS)
    ours, start = model(4)
    report = load_weights(ours, path, classes=ClassSets(OURS))
    found = ours.state_dict()
    assert torch.equal(found["backbone.weight"], state["backbone.weight"])
    assert all(torch.equal(found[name], start[name]) for name in start if not name.startswith("backbone"))
    assert [name for name, _, _ in report.dropped if name != "empty_weight"] == [
        *("class_embed.weight", "class_embed.bias", "conv_seg.weight", "conv_seg.bias"),
    ]
    assert "the file has another class set: 5 classes, the model has 4" in caplog.text
    assert "class layers, started anew" in caplog.text


def test_other_classes_of_the_same_number_are_dropped_too(tmp_path: Path) -> None:
    path, state = saved(tmp_path / "w.pth", 4, ("a", "traffic light", "sea", "new one"))
    ours, start = model(4)
    report = load_weights(ours, path, classes=ClassSets(OURS))
    assert torch.equal(ours.class_embed.weight, start["class_embed.weight"])
    assert "1 of 4 classes have another name: 0 is 'a', in the model 'Person'" in str(report)
    # The names are what tells: without them, or without the check, everything fits.
    for classes in (None, ClassSets(OURS, check=False)):
        load_weights(ours, path, strict=True, classes=classes)
        assert torch.equal(ours.class_embed.weight, state["class_embed.weight"])


def test_spelling_does_not_make_another_class(tmp_path: Path) -> None:
    path, state = saved(tmp_path / "w.pth", 4, ("person ", "Traffic Light", "sea", "new-one"))
    ours, _ = model(4)
    report = load_weights(ours, path, strict=True, classes=ClassSets(OURS, by_name=True))
    assert not report.dropped
    assert torch.equal(ours.conv_seg.bias, state["conv_seg.bias"])


@pytest.mark.parametrize("given", [False, True], ids=["stored", "given"])
def test_rows_are_copied_by_name(tmp_path: Path, given: bool) -> None:
    path, state = saved(tmp_path / "w.pth", 5, None if given else THEIRS)
    ours, start = model(4)
    report = load_weights(ours, path, classes=ClassSets(OURS, file=THEIRS if given else None, by_name=True))
    for name in ("class_embed.weight", "class_embed.bias", "conv_seg.weight", "conv_seg.bias"):
        found = ours.state_dict()[name]
        rows = [state[name][2], state[name][3], state[name][0], start[name][3]]
        rows += [state[name][5]] if name.startswith("class_embed") else []
        assert torch.equal(found, torch.stack(rows))
    assert torch.equal(ours.empty_weight, start["empty_weight"])
    assert "class rows: 3 of 4 copied by name, 1 started anew (new one)" in str(report)
    assert "rows copied by name" in str(report)


def test_names_that_occur_twice_are_no_match() -> None:
    assert matching_rows(["a", "b", "c"], ["b", "B", "c", "a"]) == {0: 3, 2: 2}


def test_assumed_classes_stand_in_for_a_file_that_names_none(tmp_path: Path) -> None:
    path, state = saved(tmp_path / "w.pth", 3, None)
    ours, _ = model(3)
    with pytest.raises(ValueError, match=r"does not name its classes; those of DATASETS.TRAIN"):
        load_weights(ours, path, strict=True, classes=ClassSets(("a", "b", "c"), assumed=("a", "c", "b")))
    named, _ = saved(tmp_path / "n.pth", 3, ("a", "b", "c"))
    for file, classes in (
        (named, ClassSets(("a", "b", "c"), assumed=("a", "c", "b"))),
        (path, ClassSets(("a", "b", "c"), file=("a", "b", "c"), assumed=("a", "c", "b"))),
        (path, ClassSets(("a", "b", "c"), assumed=("a", "c", "b"), check=False)),
    ):
        load_weights(ours, file, strict=True, classes=classes)
    assert torch.equal(ours.class_embed.weight, state["class_embed.weight"])


def test_refusals(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "w.pth", 4, ("a", "b", "c", "d"))
    ours, start = model(4)
    with pytest.raises(ValueError, match=r"w.pth was trained for other classes.*4 of 4 classes.*CHECK_CLASS_NAMES"):
        load_weights(ours, path, strict=True, classes=ClassSets(OURS))
    nameless, _ = saved(tmp_path / "n.pth", 5, None)
    with pytest.raises(ValueError, match=r"INIT_CLASSES_BY_NAME: .*n.pth does not say .*MODEL.WEIGHTS_CLASSES"):
        load_weights(ours, nameless, classes=ClassSets(OURS, by_name=True))
    with pytest.raises(ValueError, match=r"INIT_CLASSES_BY_NAME: the model's classes are unknown"):
        load_weights(ours, path, classes=ClassSets(None, by_name=True))
    with pytest.raises(ValueError, match=r"class_embed.weight has 6 rows in the file, which .* the 3 classes"):
        load_weights(ours, nameless, classes=ClassSets(OURS, file=("x", "y", "z"), by_name=True))
    assert all(torch.equal(value, start[name]) for name, value in ours.state_dict().items())


def test_layers_of_another_width_or_kind_are_left() -> None:
    start = {"class_embed.weight": torch.zeros(3, 4), "conv_seg.weight": torch.zeros(2, 4)}
    state = {"class_embed.weight": torch.ones(3, 5), "conv_seg.weight": torch.ones(3, 4)}
    assert transfer_rows(state, start, ["a", "b"], ["a", "b"]) == {}


@pytest.mark.parametrize("config", ["swiftnet_debug", "gsvnet_debug", "mask2former_debug", "decoderA_debug"])
def test_class_layers_are_those_whose_shape_depends_on_the_classes(config: str) -> None:
    """Also of the same number: otherwise rows of other classes would look trained."""
    shapes = []
    for count in (13, 17):
        words = ["MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(count), "MODEL.KEYFRAME.VARIANT", "paper"]
        cfg = load_config(f"configs/debug/{config}.yaml", words)
        shapes.append({name: value.shape for name, value in build_segmentor(cfg).state_dict().items()})
    differing = {name for name, shape in shapes[0].items() if shape != shapes[1][name]}
    assert differing
    assert {name for name in shapes[0] if CLASS_LAYERS.search(name)} == differing
