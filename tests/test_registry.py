"""Names, options and third-party plug-ins."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import mmcompress
from mmcompress.budget import Budget
from mmcompress.errors import SpecError
from mmcompress.method import VisualMethod
from mmcompress.methods.random import Random
from mmcompress.methods.vtc_cls import VTCCLS
from mmcompress.registry import METHODS, POLICIES, MethodInfo, Registry
from mmcompress.types import Needs, Selection, VisualItem

BUILT_IN = ["pool", "random", "todre", "uniform", "vtc-cls"]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """The registry of methods; what a test registers is forgotten after it."""
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    return METHODS


def run(script: str, *paths: Path) -> str:
    """Run `script` in a fresh interpreter that finds distributions in `paths`."""
    prelude = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run([sys.executable, "-c", prelude + textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(site: Path, name: str, value: str, modules: Mapping[str, str]) -> None:
    """Put a distribution with one method entry point into the folder `site`."""
    info = site / f"{name.replace('-', '_')}_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmcompress.methods]\n{name} = {value}\n")
    for module, source in modules.items():
        (site / f"{module}.py").write_text(textwrap.dedent(source))


PLUGIN = """
    from dataclasses import dataclass
    import torch
    from mmcompress import register
    from mmcompress.method import VisualMethod
    from mmcompress.types import Selection

    @register("first", summary="The first tokens.", family="baseline")
    @dataclass(frozen=True)
    class First(VisualMethod):
        offset: int = 0

        def select(self, item, budget, needs):
            return Selection(torch.arange(budget) + self.offset)
"""


def test_the_built_in_methods_are_known() -> None:
    assert set(BUILT_IN) <= set(METHODS.names())
    assert METHODS.names() == sorted(METHODS.names())


def test_listing_names_imports_no_method_and_no_torch() -> None:
    out = run(
        """
        import mmcompress
        names = mmcompress.METHODS.names()
        loaded = [m for m in sys.modules if m.startswith("mmcompress.methods.") or m in ("torch", "transformers")]
        print(names, loaded)
        """
    )
    assert out.strip().endswith("[]")
    assert all(repr(name) in out for name in BUILT_IN)


def test_naming_a_method_imports_that_one_alone() -> None:
    out = run(
        """
        from mmcompress.registry import METHODS
        METHODS.get("uniform")
        print(sorted(m for m in sys.modules if m.startswith("mmcompress.methods.")))
        """
    )
    assert out.strip() == "['mmcompress.methods.uniform']"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_registers_itself_under_its_files_name(name: str) -> None:
    cls = METHODS.get(name)
    assert cls.__module__ == f"mmcompress.methods.{name.replace('-', '_')}"
    assert isinstance(cls.info, MethodInfo)
    assert cls.info.name == name
    assert cls.info.summary.endswith(".") and cls.info.family


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("todr", "unknown method 'todr'. Did you mean 'todre'? Available: "),
        ("ToDRE", "Did you mean 'todre'?"),
        ("vtc_cls", "Did you mean 'vtc-cls'?"),
        ("qqqqqq", "unknown method 'qqqqqq'. Available: "),
    ],
)
def test_unknown_methods_are_named_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(SpecError) as failure:
        METHODS.get(name)
    assert message in str(failure.value)
    assert f"Available: {', '.join(METHODS.names())}." in str(failure.value)


def test_a_policy_that_does_not_exist_is_called_a_policy() -> None:
    with pytest.raises(SpecError, match=r"unknown KV policy 'snapkw'\. Did you mean 'snapkv'\?"):
        POLICIES.get("snapkw")


def test_build_sets_options() -> None:
    assert METHODS.build("random", {"seed": 7}) == Random(seed=7)
    assert METHODS.build("vtc-cls", {"first_layer": None, "score": "received"}) == VTCCLS(score="received")
    assert METHODS.build("random", {}) == Random()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("random", {"sed": 1}, "unknown option of method 'random': 'sed'. Did you mean 'seed'? Available: seed."),
        ("pool", {"size": 1}, "unknown option of method 'pool': 'size'. Available: none."),
        ("random", {"keep": 1}, "unknown option of method 'random': 'keep'"),
        ("random", {"seed": "1"}, "method 'random': option seed='1' must be int."),
        ("random", {"seed": 1.0}, "seed=1.0 must be int."),
        ("random", {"seed": True}, "seed=True must be int."),
        ("random", {"seed": None}, "seed=None must be int."),
        ("random", {1: 1}, "unknown option of method 'random': '1'"),
        ("vtc-cls", {"first_layer": 16.0}, "first_layer=16.0 must be int or None."),
        ("vtc-cls", {"first_layer": False}, "first_layer=False must be int or None."),
        ("vtc-cls", {"score": "clas"}, "score='clas' must be one of 'cls', 'received'."),
        ("todre", {"objective": ["max-sum"]}, "must be one of 'max-sum', 'k-center'."),
    ],
)
def test_bad_options_are_named(name: str, options: dict[Any, Any], message: str) -> None:
    with pytest.raises(SpecError) as failure:
        METHODS.build(name, options)
    assert message in str(failure.value)


@dataclass(frozen=True)
class Options(VisualMethod):
    """A method with one option of every kind."""

    number: float = 0.5
    flag: bool = False
    word: str | None = None
    choice: Literal[1, 2] = 1
    layers: tuple[int, ...] | None = None
    shares: tuple[float, ...] = ()

    def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
        """Keep the first tokens."""
        return Selection(torch.arange(budget))


@pytest.mark.parametrize("options", [{"number": 2}, {"number": 0.1}, {"flag": True}, {"word": "x"}, {"choice": 2}])
def test_options_of_the_right_type_are_taken(registry: Registry, options: dict[str, Any]) -> None:
    registry.register("options", summary="s", family="f")(Options)
    assert registry.build("options", options) == Options(**options)


def test_a_list_becomes_a_tuple(registry: Registry) -> None:
    registry.register("options", summary="s", family="f")(Options)
    for layers, shares in (([1, 2], [1, 0.5]), ((1, 2), (1, 0.5))):
        built = registry.build("options", {"layers": layers, "shares": shares})
        assert built == Options(layers=(1, 2), shares=(1, 0.5))


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"layers": 3}, "a list of int or None"),
        ({"layers": "3, 5"}, "a list of int or None"),
        ({"layers": [3, 0.5]}, "a list of int or None"),
        ({"layers": [3, True]}, "a list of int or None"),
        ({"shares": None}, "a list of float"),
        ({"shares": (0.5, float("nan"))}, "a list of float"),
        ({"number": (0.5,)}, "float"),
        ({"number": float("nan")}, "float"),
        ({"number": float("inf")}, "float"),
        ({"number": True}, "float"),
        ({"flag": 1}, "bool"),
        ({"flag": "true"}, "bool"),
        ({"word": 3}, "str or None"),
        ({"choice": 3}, "one of 1, 2"),
    ],
)
def test_options_of_the_wrong_type_are_not(registry: Registry, options: dict[str, Any], allowed: str) -> None:
    registry.register("options", summary="s", family="f")(Options)
    with pytest.raises(SpecError, match=f"must be {allowed}"):
        registry.build("options", options)


def test_a_users_own_method_joins(registry: Registry) -> None:
    @mmcompress.register("every-other", summary="Every other token.", family="baseline")
    @dataclass(frozen=True)
    class EveryOther(VisualMethod):
        def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
            return Selection(torch.arange(budget) * 2)

    assert "every-other" in mmcompress.METHODS.names()
    method = mmcompress.METHODS.build("every-other", {})
    assert method.info == MethodInfo("every-other", "Every other token.", "baseline")
    item = VisualItem(torch.zeros(8, 2), ((2, 4),), torch.zeros(8, dtype=torch.long))
    assert method.compress([item], Budget(4), Needs())[0].anchor.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(("exact", "count"), [(True, 0), (True, 3), (True, 5), (False, 0), (False, 5)])
def test_a_method_that_keeps_the_wrong_number_is_caught(registry: Registry, exact: bool, count: int) -> None:
    @registry.register("wrong", summary="s", family="f")
    @dataclass(frozen=True)
    class Wrong(VisualMethod):
        @property
        def exact_count(self) -> bool:
            return exact

        def select(self, item: VisualItem, budget: int, needs: Needs) -> Selection:
            return Selection(torch.arange(count))

    item = VisualItem(torch.zeros(8, 2), ((2, 4),), torch.zeros(8, dtype=torch.long))
    with pytest.raises(SpecError, match=f"'wrong' returned {count} tokens for a budget of 4"):
        Wrong().compress([item], Budget(4), Needs())


def test_a_name_is_given_once(registry: Registry) -> None:
    registry.register("options", summary="s", family="f")(Options)
    with pytest.raises(SpecError, match="method 'options' is registered twice"):
        registry.register("options", summary="s", family="f")(type("Other", (Options,), {}))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_built_in_name_cannot_be_taken(registry: Registry, loaded: bool) -> None:
    registry.get("uniform")
    if not loaded:
        del registry._classes["uniform"]
    with pytest.raises(SpecError, match="method 'uniform' is registered twice"):
        registry.register("uniform", summary="s", family="f")(Options)


def test_a_plugin_is_imported_only_when_named(tmp_path: Path) -> None:
    install(tmp_path, "first", "first_plugin:First", {"first_plugin": PLUGIN})
    out = run(
        """
        from mmcompress.registry import METHODS
        print("first" in METHODS.names(), "first_plugin" in sys.modules)
        METHODS.get("uniform")
        print("first_plugin" in sys.modules)
        method = METHODS.build("first", {"offset": 2})
        print("first_plugin" in sys.modules, method, method.info.summary)
        """,
        tmp_path,
    )
    assert out.splitlines() == ["True False", "False", "True First(offset=2) The first tokens."]


def test_a_broken_plugin_harms_nobody_who_does_not_name_it(tmp_path: Path) -> None:
    install(tmp_path, "broken", "broken_plugin:Broken", {"broken_plugin": "raise RuntimeError('broken')"})
    script = "from mmcompress.registry import METHODS; print(METHODS.get('uniform').__name__)"
    assert run(script, tmp_path) == "Uniform\n"


def test_a_plugin_must_register_what_it_offers(tmp_path: Path) -> None:
    install(tmp_path, "second", "second_plugin:First", {"second_plugin": PLUGIN})
    out = run(
        """
        from mmcompress import METHODS, SpecError
        try:
            METHODS.get("second")
        except SpecError as error:
            print(error)
        """,
        tmp_path,
    )
    assert out.strip() == "second_plugin:First was loaded, but registered no method 'second'."


def test_a_plugin_cannot_shadow_a_built_in(tmp_path: Path) -> None:
    install(tmp_path, "uniform", "shadow_plugin:First", {"shadow_plugin": PLUGIN})
    out = run(
        """
        import warnings
        from mmcompress.registry import METHODS
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            METHODS.names()
        print([str(w.message) for w in caught])
        print(METHODS.get("uniform").__module__, "shadow_plugin" in sys.modules)
        """,
        tmp_path,
    )
    assert out.splitlines() == [
        """["shadow_plugin:First offers the built-in method 'uniform'; ignored."]""",
        "mmcompress.methods.uniform False",
    ]


def test_a_name_that_no_spec_can_say_is_refused() -> None:
    for name in ("My_Method", "two words", "", "a--b"):
        with pytest.raises(SpecError, match="lower-case words joined by hyphens"):
            METHODS.register(name, summary="", family="")


def test_a_class_that_is_no_dataclass_is_refused() -> None:
    with pytest.raises(SpecError, match=r"put @dataclass\(frozen=True\) below @register on Plain"):

        @METHODS.register("plain", summary="", family="")
        class Plain:
            pass


def test_registering_the_same_class_again_replaces_it() -> None:
    """As when a notebook cell is run twice."""

    def cell() -> type:
        @METHODS.register("again", summary="", family="")
        @dataclass(frozen=True)
        class Again:
            pass

        return Again

    try:
        cell()
        assert cell() is METHODS.get("again")
    finally:
        METHODS._classes.pop("again")
