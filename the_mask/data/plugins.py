"""Modules of the user that register data sets: ``DATASETS.IMPORT``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.utils import comm

logger = logging.getLogger(__name__)
KEY = "DATASETS.IMPORT"


def import_dataset_modules(names: Sequence[str]) -> None:
    """Import the modules of ``DATASETS.IMPORT``, each once per process.

    Args:
        names: module names (``my_package.my_data``, looked for as by any import, and in the working directory), or
            paths of ``.py`` files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a list of names, no such module, or an error inside it (the cause is chained).
    """
    if isinstance(names, str):
        raise ValueError(f'{KEY} {names!r}: expected a list, ["{names}"]')
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{KEY} {list(names)}: expected names of modules or paths of .py files")
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            _import_module(name)


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{KEY}: {path} does not exist (looked for from {Path.cwd()})")
    path = path.resolve()
    # One module name per file: files in different folders may share their name.
    module_name = f"the_mask_datasets_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return
    _announce(str(path))
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ValueError(f"{KEY}: {path} fails when it is imported: {_brief(error)}") from error


def _import_module(name: str) -> None:
    if name in sys.modules:
        return
    # For tools/*.py, the script's folder is on the path, not the working directory.
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    _announce(f"module {name}")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"{KEY}: there is no module {name!r}, neither installed nor in {here}; a file is given by its path, "
                f"{name.replace('.', '/')}.py"
            ) from error
        raise ValueError(f"{KEY}: module {name} fails when it is imported: {_brief(error)}") from error
    except Exception as error:
        raise ValueError(f"{KEY}: module {name} fails when it is imported: {_brief(error)}") from error
    finally:
        if added:
            sys.path.remove(here)


def _announce(what: str) -> None:
    """Warn that this config runs code, which most people do not expect of a config."""
    if comm.is_main_process():
        logger.warning("%s RUNS THE CODE OF %s", KEY, what)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
