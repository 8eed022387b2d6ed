"""Datasets by name, and facts about them."""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable
from typing import Any

__all__ = ["DatasetCatalog", "Metadata", "MetadataCatalog"]


class _DatasetCatalog(UserDict):
    """Name of a dataset to the function that returns its list of records.

    The function must return the same records in the same order at every call.
    """

    def register(self, name: str, func: Callable[[], list[dict[str, Any]]]) -> None:
        """Register ``func`` under ``name``.

        Raises:
            AssertionError: not a function, or the name is taken.
        """
        assert callable(func), "You must register a function with `DatasetCatalog.register`!"
        assert name not in self, f"Dataset '{name}' is already registered!"
        self[name] = func

    def get(self, name: str) -> list[dict[str, Any]]:  # type: ignore[override]
        """Call the function registered under ``name`` and return what it returns.

        Raises:
            KeyError: unknown name; lists the known ones.
        """
        try:
            func = self[name]
        except KeyError as error:
            known = ", ".join(self)
            raise KeyError(f"Dataset '{name}' is not registered! Available datasets are: {known}") from error
        return func()

    def list(self) -> list[str]:
        """Return all names."""
        return list(self.keys())

    def remove(self, name: str) -> None:
        """Forget ``name``."""
        self.pop(name)

    def __str__(self) -> str:
        return f"DatasetCatalog(registered datasets: {', '.join(self)})"

    __repr__ = __str__


class Metadata(types.SimpleNamespace):
    """Facts about a dataset that are not in its records: class names, colours, roots, ... set once."""

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        if len(self.__dict__) > 1:
            detail = f"Available keys are {list(self.__dict__)}."
        else:
            # A name that was only just created: probably misspelt or not registered.
            detail = "metadata is empty."
        raise AttributeError(f"Attribute '{key}' does not exist in the metadata of dataset '{self.name}': {detail}")

    def __setattr__(self, key: str, val: Any) -> None:
        if key in self.__dict__:
            old = self.__dict__[key]
            assert old == val, (
                f"Attribute '{key}' in the metadata of '{self.name}' cannot be set to another value!\n{old} != {val}"
            )
        else:
            super().__setattr__(key, val)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy as a dict."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several facts and return self. AssertionError when one is already set to another value."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """Return a fact, or ``default`` if it was never set."""
        return self.__dict__.get(key, default)


class _MetadataCatalog(UserDict):
    """Name of a dataset to its one ``Metadata`` object."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """Return the metadata of ``name``, new and empty at the first call."""
        assert len(name) > 0
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]

    def list(self) -> list[str]:
        """Return all names."""
        return list(self.keys())

    def remove(self, name: str) -> None:
        """Forget ``name``."""
        self.pop(name)

    def __str__(self) -> str:
        return f"MetadataCatalog(registered metadata: {', '.join(self)})"

    __repr__ = __str__


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
