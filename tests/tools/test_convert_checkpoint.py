"""tools/convert_checkpoint.py: exit status, report, and nothing written on error."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from the_mask.modeling.backbones.mit import MixTransformer

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    state = MixTransformer("B0").state_dict()
    torch.save({**state, "head.weight": torch.zeros(1000, 256)}, tmp_path / "mit_b0.pth")
    return tmp_path / "mit_b0.pth"


def test_converts_and_reports(tool, source, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert tool.main([str(source), str(out), "--from", "segformer"]) == 0
    text = capsys.readouterr().out
    assert "read as a bare backbone: MiT" in text
    assert "ignored: classifier" in text
    assert "missing" in text
    state = torch.load(source, weights_only=True)
    stored = load_file(out)
    assert set(stored) == {f"backbone.{name}" for name in state if name != "head.weight"}
    # Once more: the same.
    assert tool.main([str(out), str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes()[-4096:] == out.read_bytes()[-4096:]
    assert load_file(tmp_path / "again.safetensors").keys() == stored.keys()


def test_errors(tool, source, tmp_path, capsys):
    out = tmp_path / "out.pth"
    assert tool.main([str(source), str(out), "--from", "beit"]) == 1
    assert "not of family 'beit'; it looks like a bare backbone: MiT" in capsys.readouterr().err
    content = source.read_bytes()
    source.write_bytes(content[: len(content) // 2])
    assert tool.main([str(source), str(out)]) == 1
    assert "corrupt" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "none.pth"), str(out)]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not out.exists()
