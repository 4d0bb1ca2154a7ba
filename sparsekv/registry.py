"""A table from names to classes: how digests, policies and (later) tasks are found by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from sparsekv.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name. It holds classes, never instances, so that nothing in it carries state.

    Args:
        field: the name of the setting that holds the name; it appears in the error messages.
    """

    def __init__(self, field: str) -> None:
        self.field = field
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that files a class under `name`.

        Raises:
            ConfigError: another class already has that name (the same class may be registered again, as
                happens when a notebook cell runs twice).
        """

        def add(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            if known is not None and known.__qualname__ != cls.__qualname__:
                raise ConfigError(f"{self.field} {name!r} is already {known.__qualname__}: choose another name.")
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class called `name`; raises UnknownNameError with the nearest names."""
        if name not in self._classes:
            raise UnknownNameError(self.field, name, self._classes)
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __contains__(self, name: str) -> bool:
        return name in self._classes
