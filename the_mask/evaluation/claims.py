"""Records which run a folder of predictions belongs to, by digests of everything that they were made from.

So a resumed run only continues a folder made with the same weights from the same frames.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from the_mask.config import load_config
from the_mask.data.files import file_digest, read_json, remove_leftovers, write_json
from the_mask.data.registry import Record
from the_mask.data.whole_folder import lock_folder
from the_mask.modeling.digest import weights_digest

INDEX = "predictions.json"
# Keys that do not affect predictions, or only change where files are.
IRRELEVANT = ("OUTPUT_DIR", "DATALOADER", "SOLVER", "SEED", "CUDNN_BENCHMARK", "VIS_PERIOD", "DATASETS")
WRITTEN = ("TEST.SAVE_PREDICTIONS", "TEST.SAVE_SCORES", "TEST.VOTING.SAVE_MASKS", "MODEL.KEYFRAME.CACHE_DIR")
# Further inputs of predictions, besides MODEL.WEIGHTS: their content matters, not their path.
READ = (
    "TEST.ENSEMBLE.CHECKPOINTS",
    "TEST.ENSEMBLE.SCORES",
    "TEST.REFINER.WEIGHTS",
    "TEST.STAGES.MASKS",
    "TEST.VOTING.FOLDER",
    "TEST.VOTING.WEIGHTS",
)
PLACES = ("MODEL.WEIGHTS", "MODEL.DEVICE", "TEST.ENSEMBLE.CONFIGS", *WRITTEN, *READ)


def make_claim(
    cfg: CfgNode, model: nn.Module, dataset_name: str, records: Sequence[Record], values: str
) -> dict[str, str]:
    """Digests of all inputs of a run's predictions, for :func:`claim_folder`; reads all frames once, on rank 0."""
    weights = weights_digest(model)
    if not comm.is_main_process():
        return {}
    frames = ((f"{r['video_id']}/{f['frame_id']}", Path(f["file_name"])) for r in records for f in r["frames"])
    return {
        "dataset": dataset_name,
        "values": values,
        "config": _config_digest(cfg),
        "weights": weights,
        "frames": _files_digest(frames),
        "inputs": _inputs_digest(cfg),
    }


def claim_folder(folder: Path, claim: dict[str, str], suffix: str = ".png") -> None:
    """Mark a folder as belonging to a run, so that files of another run are not mistaken for its own. Collective.

    Args:
        folder: created if needed.
        claim: result of :func:`make_claim`.
        suffix: suffix of the files that the run will write.

    Raises:
        ValueError: it belongs to another run, or has files of an unknown run.
    """
    problem = None
    if comm.is_main_process():
        try:
            problem = _claim(folder, claim, suffix)
        # The other processes wait for the result.
        except (ValueError, OSError) as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)


@contextmanager
def alone_in(*folders: Path | None) -> Iterator[None]:
    """Inside the block no other run writes into these folders; None are left out. Collective.

    Args:
        folders: created if needed.

    Raises:
        ValueError: another run is writing there.
    """
    problem: str | None = None
    locks: list[int | None] = []
    if comm.is_main_process():
        try:
            for folder in {folder.resolve() for folder in folders if folder is not None}:
                folder.mkdir(parents=True, exist_ok=True)
                locks.append(lock_folder(folder))
        # The other processes wait for the result.
        except (ValueError, OSError) as error:
            problem = str(error)
    try:
        problem = comm.all_gather(problem)[0]
        if problem:
            raise ValueError(problem)
        yield
    finally:
        for lock in locks:
            if lock is not None:
                os.close(lock)


def disclaim(folder: str | Path) -> None:
    """Remove the mark of a folder before an evaluation overwrites its files."""
    (Path(folder) / INDEX).unlink(missing_ok=True)


def _claim(folder: Path, claim: dict[str, str], suffix: str) -> str | None:
    path = folder / INDEX
    there = next(folder.rglob(f"*{suffix}"), None)
    found = read_json(path, "claim") if path.is_file() else None
    different = [key for key in claim if found is not None and found.get(key) != claim[key]]
    if there is not None and (found is None or different):
        whose = f"another run (differs in {', '.join(different)})" if different else f"an unknown run (no {INDEX})"
        return f"{folder} holds predictions of {whose}, e.g. {there}; choose another folder, or delete this one"
    remove_leftovers(folder, below=True)
    if found is None or different:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, claim)
    return None


def _config_digest(cfg: CfgNode) -> str:
    relevant = cfg.clone()
    relevant.defrost()
    for key in IRRELEVANT:
        relevant.pop(key, None)
    for key in PLACES:
        node, _, name = key.rpartition(".")
        _get(relevant, node)[name] = ""
    members = [load_config(path).dump() for path in cfg.TEST.ENSEMBLE.CONFIGS]
    return hashlib.sha256("\0".join([relevant.dump(), *members]).encode()).hexdigest()


def _inputs_digest(cfg: CfgNode) -> str:
    named: list[tuple[str, Path]] = []
    for key in READ:
        value = _get(cfg, key)
        for number, text in enumerate([value] if isinstance(value, str) else value):
            path = Path(text)
            if text and path.is_dir():
                files = sorted(p for p in path.rglob("*") if p.is_file())
                named += [(f"{key}[{number}]/{p.relative_to(path).as_posix()}", p) for p in files]
            elif text:
                named.append((f"{key}[{number}]", path))
    return _files_digest(named)


def _files_digest(named: Iterable[tuple[str, Path]]) -> str:
    """Digest of names and contents of ``(name, file)`` pairs, in order."""
    names, paths = [], []
    for name, path in named:
        names.append(name)
        paths.append(path)
    digest = hashlib.sha256()
    # Hashing releases the GIL.
    with ThreadPoolExecutor() as pool:
        for name, content in zip(names, pool.map(file_digest, paths), strict=True):
            digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()


def _get(cfg: CfgNode, key: str) -> Any:
    node: Any = cfg
    for part in key.split(".") if key else ():
        node = node[part]
    return node
