"""The record of an archive: ``results.jsonl`` in the output folder, a line per video, each flushed to the disk.

The first line describes the model. The line of a video is written after its outputs are complete and in place, so it
is true even if processes are killed; the last line of an output counts.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from the_mask.data.files import TEMPORARY, parse_json, read_text, sync_folder
from the_mask.data.schema import Each, check_schema
from the_mask.inference.archive.manifest import RESULTS, VideoTask

DONE, FAILED = "done", "failed"
RECORD = {"task": str, "status": str, "output": Each(list, str)}
OWN = (RESULTS, ".lock")


class Results:
    """The results of a run in its output folder, read and continued."""

    def __init__(self, folder: Path, model: Mapping[str, Any]) -> None:
        """Begin a run or continue an earlier one; unfinished outputs of a killed run are removed.

        Args:
            folder: created if needed; without results it must be empty.
            model: everything that the results depend on besides the manifest.

        Raises:
            ValueError: the folder holds other files, results of another model, or a damaged line (file and line are
                named).
        """
        self.folder, self.path = folder, folder / RESULTS
        # The key of the task that made an output, by its name.
        self._made_by: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        header = {"results": "the-mask segment", **model}
        known = self._read()
        if known is None:
            strange = next((path for path in sorted(folder.iterdir()) if not _is_own(path)), None)
            if strange is not None:
                raise ValueError(
                    f"output {folder} holds {strange.name} and no {RESULTS}: an archive goes into a folder of its own"
                )
            self._append([header])
            sync_folder(folder)
        elif known != header:
            differs = sorted(key for key in {*known, *header} if known.get(key) != header.get(key))
            raise ValueError(
                f"{self.path} has results of another model ({', '.join(differs)} differ): choose another output folder"
            )
        for left in folder.glob(f".*{TEMPORARY}"):
            discard(left)

    def done(self, task: VideoTask) -> bool:
        """Whether a video was segmented with the same options, and its outputs exist."""
        made = all(self._made_by.get(name) == task.key for name in task.outputs)
        return made and all((self.folder / name).exists() for name in task.outputs)

    def add(self, task: VideoTask, status: str, facts: Mapping[str, Any]) -> None:
        """Write the line of a video."""
        record = {"video": task.video, "output": list(task.outputs), "status": status, **facts, "task": task.key}
        self._append([record])
        self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        for name in record["output"]:
            self._made_by[name] = record["task"] if record["status"] == DONE else ""

    def _append(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        # Names of files need not be UTF-8: such bytes, surrogates in Python, become escapes of JSON.
        data = text.encode(errors="backslashreplace")
        with open(self.path, "ab") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> dict[str, Any] | None:
        """Read all records; returns the header, None if nothing was written yet."""
        if not self.path.exists():
            return None
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            # A line that a killed run, or a full disk, has cut off: its video is done again.
            os.truncate(self.path, whole)
        if not whole:
            self.path.unlink()
            return None
        header: dict[str, Any] | None = None
        for number, text in enumerate(read_text(self.path, "results").split("\n")[:-1], start=1):
            record = parse_json(text, f"results {self.path}, line {number}: it")
            if header is None:
                if not isinstance(record, dict) or "results" not in record:
                    raise ValueError(f"results {self.path}, line 1: expected what made them, found {text[:60]}")
                header = record
            else:
                check_schema(record, RECORD, f"results {self.path}, line {number}: no record of a video")
                self._take(record)
        return header


def _is_own(path: Path) -> bool:
    return path.name in OWN or (path.name.startswith(".") and path.name.endswith(TEMPORARY))


def discard(folder: Path) -> None:
    """Delete an unfinished result, even if a worker still writes there: rename it first."""
    gone = folder.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
    try:
        # After this nothing that lies in it can get its name any more.
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink()
