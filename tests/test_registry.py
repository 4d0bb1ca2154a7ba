"""Names that are taken stay taken, by whatever module they are asked for."""

import pytest

from sparsekv.errors import ConfigError
from sparsekv.registry import Registry


def defined(module: str, name: str = "Red") -> type:
    return type(name, (), {"__module__": module})


def test_another_module_s_class_of_the_same_name_is_another_class() -> None:
    colours: Registry[object] = Registry("colour")
    first = defined("one")
    colours.register("red")(first)
    with pytest.raises(ConfigError, match=r"colour 'red' is already one\.Red: choose another name"):
        colours.register("red")(defined("two"))
    assert colours.get("red") is first


def test_a_notebook_cell_can_be_run_again() -> None:
    colours: Registry[object] = Registry("colour")
    colours.register("red")(defined("__main__"))
    again = defined("__main__")
    colours.register("red")(again)
    assert colours.get("red") is again


def test_a_name_that_is_removed_is_free_again() -> None:
    colours: Registry[object] = Registry("colour")
    colours.register("red")(defined("one"))
    colours.remove("red")
    assert list(colours) == []
    colours.register("red")(defined("two"))
    with pytest.raises(ConfigError, match="colour='rod' is not known"):
        colours.remove("rod")


def test_the_class_registered_last_comes_first() -> None:
    colours: Registry[object] = Registry("colour")
    for name, kind in (("red", int), ("blue", str)):
        colours.register(name)(kind)
    assert list(colours.classes()) == [str, int]


def test_a_name_that_is_no_text_is_not_known() -> None:
    colours: Registry[object] = Registry("colour")
    colours.register("red")(int)
    with pytest.raises(ConfigError, match=r"colour=\['red'\] is not known.* Known: red"):
        colours.get(["red"])
