"""Run a reader on damaged files. A finding is whatever is neither a result nor an error that names the file.

    python tests/fuzz/fuzz_loop.py coco --inputs 5000      # or --seconds 60; --engine atheris where it is installed

Findings are written as files. Put them into ``corpus/<reader>/``, fix the cause, and repeat until there are none.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import logging
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

import the_mask  # noqa: F401  (makes detectron2 importable)

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
CORPUS = Path(__file__).resolve().parent / "corpus"
# Limits of time (s) and memory (bytes) for one small file.
LONGEST, MOST_MEMORY = 10, 3 << 30
MEMORY = Path("/dev/shm")


class TooSlowError(Exception):
    """A reader took too long."""


@contextmanager
def limited(seconds: int = LONGEST) -> Iterator[None]:
    """Raise :class:`TooSlowError` when Python code takes too long; end the process when C code hangs."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlowError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    # Processor time, so that a busy machine does not matter.
    signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(60 * seconds, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


def quiet() -> None:
    """Suppress logs, warnings and FFmpeg's output; limit memory."""
    import av.logging

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    av.logging.set_level(None)
    import torch

    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))


def problem(case: object, data: bytes) -> str | None:
    """What a reader did wrong with a file, or None."""
    case.path.write_bytes(data)
    try:
        with limited():
            case.read()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        text = str(error)
        # The error may name another file that this one refers to.
        named = any(name in text for name in (case.path.name, str(case.path.parent))) or text.startswith("/")
        if isinstance(error, UnicodeError) or not named:
            return f"an error that does not name the file: {_where(error)}"
        if "\n" in text and len(text) > 4000:
            return f"an error of {len(text)} characters: {_where(error)}"
        return None
    except (Exception, MemoryError, TooSlowError) as error:  # noqa: BLE001  (that is what is looked for)
        return _where(error)
    return None


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if "the_mask" in f.filename]
    return f"{type(error).__name__}: {str(error)[:200]!r} at {' < '.join(reversed(own[-3:]))}"


def key_of(text: str) -> str:
    """Key of a finding; findings of equal keys have the same cause."""
    return text.partition("'")[0] + text.rpartition(" at ")[2].split(" < ")[0]


def corpus_of(name: str) -> list[bytes]:
    """Files of earlier findings."""
    return [path.read_bytes() for path in sorted((CORPUS / name.replace(" ", "_")).glob("*"))]


def run(name: str, inputs: int, seconds: float, seed: int, keep: Path | None = None) -> tuple[int, dict[str, str]]:
    """Try a number of damaged files, or as many as fit a time.

    Returns:
        number of files tried, and the findings by key.
    """
    from fuzz_readers import READERS

    reader, dice = READERS[name], Random(seed)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None, prefix="the_mask_fuzz_") as folder:
        case = reader.prepare(Path(folder))
        quiet()
        pool = [*case.seeds, *corpus_of(name)]
        for data in case.seeds:
            case.path.write_bytes(data)
            case.read()  # undamaged files must be read
        start, count = time.monotonic(), 0
        while count < inputs and time.monotonic() - start < seconds:
            data = reader.mutate(dice, dice.choice(pool))
            for _ in range(dice.choice((0, 0, 0, 1, 2))):
                data = reader.mutate(dice, data)
            count += 1
            if keep is not None:
                (keep / "current").write_bytes(data)  # kept if the process crashes or hangs
            text = problem(case, data)
            if text is None:
                continue
            key = key_of(text)
            if key not in found:
                found[key] = text
                if keep is not None:
                    (keep / hashlib.sha1(data).hexdigest()[:12]).write_bytes(data)
    return count, found


def guided(readers: list[str], seconds: float, keep: Path | None) -> int:
    """As :func:`run`, with files chosen by coverage (libFuzzer through Atheris).

    It ends its process, so each reader has one; what they read with is imported, and instrumented, once.

    Returns:
        number of readers with findings.
    """
    import atheris

    with atheris.instrument_imports(
        include=["the_mask", "PIL", "yaml", "zipfile", "pickletools", "json", "safetensors"]
    ):
        names = names_of(readers)

    bad = 0
    for name in names:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                _guided(name, seconds, None if keep is None else folder_of(keep, name))
            finally:
                os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, 1):
            print(f"{name}: ended with {code}", flush=True)
        bad += code != 0
    return bad


def names_of(readers: list[str]) -> list[str]:
    """Names of readers; "all" means all."""
    from fuzz_readers import READERS

    return list(READERS) if readers == ["all"] else readers


def folder_of(keep: Path, name: str) -> Path:
    """The folder for what is found in a reader."""
    folder = keep / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _guided(name: str, seconds: float, keep: Path | None) -> None:
    import atheris
    from fuzz_readers import READERS

    reader, found, count = READERS[name], set(), 0
    folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None, prefix="the_mask_fuzz_"))
    corpus, place = folder / "corpus", folder / "case"
    corpus.mkdir()
    place.mkdir()
    case = reader.prepare(place)
    for number, data in enumerate([*case.seeds, *corpus_of(name)]):
        (corpus / str(number)).write_bytes(data)
    quiet()
    start = time.monotonic()

    def end() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{name}: {count} inputs in {time.monotonic() - start:.0f} s, {len(found)} findings", flush=True)
        os._exit(1 if found else 0)

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        text = problem(case, data)
        if text is not None and key_of(text) not in found:
            found.add(key_of(text))
            print(f"  {text}", flush=True)
            if keep is not None:
                (keep / hashlib.sha1(data).hexdigest()[:12]).write_bytes(data)
        if time.monotonic() - start > seconds:
            end()

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        dice = Random(seed)
        # libFuzzer's mutations break checksums; ours ignore coverage. So both are used.
        return reader.mutate(dice, data)[:most] if dice.randrange(2) else atheris.Mutate(data, most)

    options = [sys.argv[0], str(corpus), "-max_len=200000", "-rss_limit_mb=0", "-timeout=60", "-verbosity=0"]
    atheris.Setup(options, one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", help="names of fuzz_readers.READERS, or all")
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    parser.add_argument("--keep", type=Path, help="folder for what is found")
    args = parser.parse_args()
    if args.engine == "atheris":
        sys.exit(1 if guided(args.readers, args.seconds, args.keep) else 0)
    total = findings = 0
    for name in names_of(args.readers):
        keep = None if args.keep is None else folder_of(args.keep, name)
        start = time.monotonic()
        count, found = run(name, args.inputs, args.seconds, args.seed, keep)
        print(f"{name}: {count} inputs in {time.monotonic() - start:.0f} s, {len(found)} findings", flush=True)
        for text in found.values():
            print(f"  {text}", flush=True)
        total, findings = total + count, findings + len(found)
    print(f"{total} inputs, {findings} findings")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
