"""The exceptions and the registry: one family, messages that help, names that cannot be taken twice."""

import copy
import inspect
import pickle

import pytest

from sparsekv import errors
from sparsekv.errors import ConfigError, SparseKVError, UnknownNameError
from sparsekv.registry import Registry

FAMILY = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", FAMILY)
def test_one_family(cls: type[Exception]) -> None:
    assert issubclass(cls, SparseKVError)
    assert cls.__doc__


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("UnknownNameError", ValueError),
        ("UnsupportedModelError", TypeError),
        ("PatchError", RuntimeError),
        ("CacheFullError", RuntimeError),
        ("CacheStateError", RuntimeError),
        ("RankError", RuntimeError),
        ("KernelCompileError", RuntimeError),
    ],
)
def test_each_is_also_the_builtin_one_would_expect(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("recnt", " Did you mean 'recent'?"),
        ("topk", " Did you mean 'top_k' or 'top_p'?"),
        ("xyz", ""),
        (None, ""),
        (3, ""),
    ],
)
def test_unknown_names_suggest_the_nearest_and_list_all(name: object, hint: str) -> None:
    message = str(UnknownNameError("policy", name, ["top_p", "recent", "top_k"]))
    assert message == f"policy={name!r} is not known.{hint} Known: recent, top_k, top_p."


@pytest.mark.parametrize("error", [ConfigError("sinks=-1"), UnknownNameError("policy", "topk", ["top_k", "all"])])
def test_survives_pickling_and_copying(error: Exception) -> None:
    """An error raised in a worker process must arrive as what it is."""
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)


def test_a_registry_files_classes() -> None:
    colours: Registry[object] = Registry("colour")

    @colours.register("red")
    class Red: ...

    assert colours.get("red") is Red
    assert "red" in colours
    assert "blue" not in colours
    colours.register("blue")(int)
    assert list(colours) == ["blue", "red"]  # sorted, so that lists in messages and reports are stable
    with pytest.raises(UnknownNameError, match=r"colour='rod' is not known\. Did you mean 'red'"):
        colours.get("rod")


def test_a_name_cannot_be_taken_twice() -> None:
    colours: Registry[object] = Registry("colour")

    def define(name: str) -> type:
        @colours.register("red")
        class Red: ...

        return Red

    define("red")
    again = define("red")  # the same class once more, as when a notebook cell runs twice: the newest counts
    assert colours.get("red") is again
    with pytest.raises(ConfigError, match=r"colour 'red' is already .*Red: choose another name"):
        colours.register("red")(int)
    assert colours.get("red") is again


@pytest.mark.parametrize("name", [int, None, 3])
def test_a_name_of_the_wrong_type_is_an_unknown_name(name: object) -> None:
    colours: Registry[object] = Registry("colour")
    with pytest.raises(UnknownNameError, match="colour="):
        colours.get(name)
