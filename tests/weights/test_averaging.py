"""Weight averaging of checkpoints, in memory and on disk."""

import pytest
import torch

from the_mask.weights.averaging import average_checkpoints, average_state_dicts
from the_mask.weights.checkpoint import read_checkpoint, save_checkpoint


def states(count=3):
    generator = torch.Generator().manual_seed(0)
    result = []
    for index in range(count):
        half = torch.randn(4, generator=generator).half()
        result.append({"w": torch.randn(2, 3, generator=generator), "half": half, "n": torch.tensor(index)})
    return result


def test_mean_against_a_loop():
    three = states()
    result = average_state_dicts(three, [1, 2, 5])
    expected = sum(w * s["w"].double() for w, s in zip([1, 2, 5], three, strict=True)) / 8
    assert torch.equal(result["w"], expected.float())
    assert result["half"].dtype == torch.float16
    assert result["n"].item() == 2


def test_a_checkpoint_with_itself_is_that_checkpoint():
    (one,) = states(1)
    result = average_state_dicts([one] * 3)
    assert all(torch.equal(result[name], one[name]) for name in one)


def test_files(tmp_path):
    files = [tmp_path / f"{i}.pth" for i in range(2)]
    for file, state in zip(files, states(2), strict=True):
        save_checkpoint(file, {"model": state, "iteration": 7})
    average_checkpoints(files, tmp_path / "out" / "mean.pth")
    content = read_checkpoint(tmp_path / "out" / "mean.pth")
    torch.testing.assert_close(content["model"]["w"], (states(2)[0]["w"] + states(2)[1]["w"]) / 2)
    assert content["averaged"] == [[str(files[0]), 1.0], [str(files[1]), 1.0]]


def test_classes_are_kept_and_must_be_the_same(tmp_path):
    one, two = states(2)
    names = {"a": ["x", "y"], "A": ["X", "y"], "swapped": ["y", "x"], "none": None}
    files = {name: tmp_path / f"{name}.pth" for name in names}
    for state, (name, classes) in zip([one, two, two, two], names.items(), strict=True):
        save_checkpoint(files[name], {"model": state, **({"class_names": classes} if classes else {})})
    output = tmp_path / "mean.pth"
    for others in (["A"], ["none"], ["none", "A"]):
        average_checkpoints([files["a"], *(files[other] for other in others)], output)
        assert read_checkpoint(output)["class_names"] == ["x", "y"]
    average_checkpoints([files["none"], files["none"]], output)
    assert "class_names" not in read_checkpoint(output)
    output.unlink()
    with pytest.raises(ValueError, match=r"a\.pth and .*swapped\.pth were trained for different .* in another order"):
        average_checkpoints([files["a"], files["none"], files["swapped"]], output)
    assert not output.exists()


def test_bad_input(tmp_path):
    one, two = states(2)
    with pytest.raises(ValueError, match="no checkpoints"):
        average_state_dicts([])
    with pytest.raises(ValueError, match="one number >= 0 each"):
        average_state_dicts([one, two], [1.0])
    with pytest.raises(ValueError, match=r"different models: 1 tensors .* extra"):
        average_state_dicts([one, {**two, "extra": torch.ones(1)}])
    with pytest.raises(ValueError, match=r"different models: 1 tensors .* w"):
        average_state_dicts([one, {**two, "w": torch.ones(1)}])
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        average_checkpoints([tmp_path / "none.pth"], tmp_path / "mean.pth")
