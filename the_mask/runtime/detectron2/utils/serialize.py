"""Pickling of what pickle refuses."""

from __future__ import annotations

from typing import Any

import cloudpickle


class PicklableWrapper:
    """Hold an object that may be a lambda or closure, and pickle it by cloudpickle."""

    def __init__(self, obj: Any) -> None:
        # Wrapping twice would hide the callable one level deeper at each trip between processes.
        self._obj: Any = obj._obj if isinstance(obj, PicklableWrapper) else obj

    def __reduce__(self) -> Any:
        return cloudpickle.loads, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks for attributes before _obj exists.
        if name == "_obj":
            raise AttributeError(name)
        return getattr(self._obj, name)
