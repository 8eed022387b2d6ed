"""The example of an own script in docs/start/reproduce.md trains, with its mapper and its hook."""

import json
import re
from pathlib import Path

from detectron2.data import MetadataCatalog
from engine_fakes import DEBUG

from the_mask.config import load_config
from the_mask.data import build_train_loader

DOC = Path(__file__).resolve().parents[2] / "docs" / "start" / "reproduce.md"


def test_the_example_trains(tiny_shapes: Path, tmp_path: Path) -> None:
    match = re.search(r"<!-- example -->\n```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    script = {"__name__": "own_script"}
    exec(compile(match[1], str(DOC), "exec"), script)
    classes = len(MetadataCatalog.get("moving_shapes_train").stuff_classes)
    words = ["OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes)]
    words += ["SOLVER.MAX_ITER", "2", "SEED", "1"]
    script["main"](str(DEBUG), *words)
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["last_rate"] > 0 for row in rows] == [True, True]

    cfg = load_config(DEBUG, words)
    (plain,), (dark,) = (
        [next(iter(loader))[0]] for loader in (build_train_loader(cfg), script["MyTrainer"].build_train_loader(cfg, 0))
    )
    assert plain.frames[0].float().mean() > 0
    assert (dark.frames[0] == plain.frames[0] * 0.5).all()
