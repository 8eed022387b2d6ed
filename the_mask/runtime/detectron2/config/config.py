"""``CfgNode`` with versions and ``_BASE_`` files, ``get_cfg``, and ``@configurable``."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode as _CfgNode

from ..utils.file_io import PathManager


class CfgNode(_CfgNode):
    """fvcore's ``CfgNode`` (``_BASE_``, ``COMPUTED_`` keys, ``!!python`` tags) plus a config version."""

    @classmethod
    def _open_cfg(cls, filename: str) -> Any:
        return PathManager.open(filename, "r")

    def merge_from_file(self, cfg_filename: str, allow_unsafe: bool = True) -> None:
        """Merge a YAML file, its ``_BASE_`` first.

        Args:
            cfg_filename: a path, or any URL that ``PathManager`` opens.
            allow_unsafe: as upstream, True lets YAML tags construct arbitrary Python objects.

        Raises:
            AssertionError: no such file, or a version other than the one of the defaults.
            KeyError: a key without a default.
        """
        assert PathManager.isfile(cfg_filename), f"Config file '{cfg_filename}' does not exist!"
        loaded = type(self)(self.load_yaml_with_base(cfg_filename, allow_unsafe=allow_unsafe))
        current = _defaults().VERSION
        assert current == self.VERSION, f"merge_from_file needs a config of version {current}, got {self.VERSION}"
        version = loaded.get("VERSION", None)
        if version is None:
            logging.getLogger(__name__).warning(
                "Config '%s' has no VERSION. Assuming it to be compatible with latest v%s.", cfg_filename, current
            )
            version = current
        assert version <= self.VERSION, f"Cannot merge a v{version} config into a v{self.VERSION} config."
        # Upstream converts v1 files; the conversion is not part of this runtime.
        assert version == self.VERSION, f"{cfg_filename}: v{version} configs need the real Detectron2"
        self.merge_from_other_cfg(loaded)


# The config that old-style code shares; ``set_global_cfg`` fills it.
global_cfg = CfgNode()


def _defaults() -> CfgNode:
    # Imported late: defaults.py builds on this module.
    from .defaults import _C

    return _C


def get_cfg() -> CfgNode:
    """Return a deep copy of the default config."""
    return _defaults().clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Make ``global_cfg`` hold the keys of ``cfg``, for code that cannot be handed a config."""
    global_cfg.clear()
    global_cfg.update(cfg)


def configurable(
    init_func: Callable[..., None] | None = None, *, from_config: Callable[..., dict[str, Any]] | None = None
) -> Callable[..., Any]:
    """Let a class or function be called with a config or with its explicit arguments.

    Two uses, as documented upstream:

    * ``@configurable`` on ``__init__`` of a class that has ``@classmethod from_config(cls, cfg, ...)``;
    * ``@configurable(from_config=fn)`` on a function.

    A call whose first argument, or keyword ``cfg``, is a config goes through ``from_config``. Keyword arguments that
    ``from_config`` does not accept override what it returns.

    Raises:
        AssertionError: wrong use of the decorator.
        AttributeError: the class has no ``from_config``.
        TypeError: ``from_config`` is not a classmethod, or its first parameter is not named ``cfg``.
    """
    if init_func is not None:
        is_init = inspect.isfunction(init_func) and init_func.__name__ == "__init__"
        assert is_init, "Incorrect use of @configurable: without arguments it decorates the __init__ of a class."
        assert from_config is None, "@configurable takes either the __init__ of a class or from_config."
        return _configurable_init(init_func)
    if from_config is None:
        # @configurable() with empty brackets means the same as @configurable.
        return configurable
    assert inspect.isfunction(from_config), "from_config argument of configurable must be a function!"
    return functools.partial(_configurable_function, from_config)


def _configurable_init(init_func: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init_func)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        owner = type(self)
        if not hasattr(owner, "from_config"):
            raise AttributeError(f"{owner.__name__}: a class with @configurable needs a classmethod from_config")
        if not inspect.ismethod(owner.from_config):
            raise TypeError(f"{owner.__name__}.from_config must be a classmethod")
        if _called_with_cfg(*args, **kwargs):
            init_func(self, **_explicit_arguments(owner.from_config, *args, **kwargs))
        else:
            init_func(self, *args, **kwargs)

    return wrapped


def _configurable_function(from_config: Callable[..., dict[str, Any]], function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _called_with_cfg(*args, **kwargs):
            return function(**_explicit_arguments(from_config, *args, **kwargs))
        return function(*args, **kwargs)

    wrapped.from_config = from_config  # type: ignore[attr-defined]
    return wrapped


def _called_with_cfg(*args: Any, **kwargs: Any) -> bool:
    candidates = [*args[:1], kwargs.get("cfg")]
    return any(isinstance(value, _CfgNode) or _is_omegaconf(value) for value in candidates)


def _is_omegaconf(value: Any) -> bool:
    # By name: omegaconf is not a dependency, and a config of it can only exist if somebody imported it.
    return any(c.__module__.startswith("omegaconf.") and c.__name__ == "DictConfig" for c in type(value).__mro__)


def _explicit_arguments(from_config: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Call ``from_config`` with what it accepts; the other keyword arguments override its result."""
    parameters = inspect.signature(from_config).parameters
    names = list(parameters)
    if not names or names[0] != "cfg":
        owner = from_config.__self__.__name__ if inspect.ismethod(from_config) else str(from_config)  # type: ignore
        raise TypeError(f"{owner}.from_config must take 'cfg' as the first argument, it takes {names}")
    kinds = {p.kind for p in parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return from_config(*args, **kwargs)
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name not in parameters}
    result = from_config(*args, **kwargs)
    result.update(overrides)
    return result
