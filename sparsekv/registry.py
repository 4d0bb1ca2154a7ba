"""A table from names to classes: how digests, policies and tasks are found by name."""

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
            ConfigError: another class already has that name. A class of the same module and name takes its place,
                as when a notebook cell runs twice.
        """

        def add(cls: type[T]) -> type[T]:
            known = self._classes.get(name)
            if known is not None and _full_name(known) != _full_name(cls):
                raise ConfigError(f"{self.field} {name!r} is already {_full_name(known)}: choose another name.")
            self._classes[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            UnknownNameError: there is none; the message has the nearest names.
        """
        if name not in list(self._classes):  # a list, as what is no name may not be hashable
            raise UnknownNameError(self.field, name, self._classes)
        return self._classes[name]

    def remove(self, name: str) -> None:
        """Frees a name, such as that of a notebook's own digest or policy. Raises UnknownNameError."""
        self.get(name)
        del self._classes[name]

    def classes(self) -> Iterator[type[T]]:
        """All classes, the one registered last first."""
        return reversed(list(self._classes.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
