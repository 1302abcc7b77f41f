"""One grammar for strings, dicts and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcompress.budget import Budget
from mmcompress.errors import SpecError, unknown_name
from mmcompress.spec import FORMAT, VERSION, CompressionConfig, Spec, split_specs

NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,12}", fullmatch=True)
KEEPS = st.none() | st.builds(Budget, st.integers(1, 5000) | st.floats(0, 1, exclude_min=True))
OPTIONS = st.dictionaries(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
        lambda key: key not in ("name", "keep", "pruning_rate")
    ),
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
    max_size=4,
)
SPECS = st.builds(Spec, NAMES, KEEPS, OPTIONS)


def identical(one: Spec, other: Spec) -> bool:
    """Equality that tells 1 from 1.0 and True."""
    return repr((one.name, one.keep, list(one.options.items()))) == repr(
        (other.name, other.keep, list(other.options.items()))
    )


@given(SPECS)
def test_a_spec_reads_back_from_its_string(spec: Spec) -> None:
    assert identical(Spec.parse(str(spec)), spec)


@given(SPECS)
def test_a_spec_reads_back_from_its_dict_and_its_json(spec: Spec) -> None:
    assert identical(Spec.parse(spec.to_dict()), spec)
    assert identical(Spec.parse(json.loads(json.dumps(spec.to_dict()))), spec)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("todre", Spec("todre")),
        ("  todre ( ) ", Spec("todre")),
        ("VTC_CLS", Spec("vtc-cls")),
        ("todre(keep=0.2)", Spec("todre", Budget(0.2))),
        ("todre(keep=64,)", Spec("todre", Budget(64))),
        ("todre(pruning_rate=0.75)", Spec("todre", Budget(0.25))),
        ("todre( keep = 1 , objective = k-center )", Spec("todre", Budget(1), {"objective": "k-center"})),
        (
            "x(a=true, b=False, c=None, d=null, e=none)",
            Spec("x", None, {"a": True, "b": False, "c": None, "d": None, "e": "none"}),
        ),
        ("x(a=1, b=-2.5, c=1e-3, d=word)", Spec("x", None, {"a": 1, "b": -2.5, "c": 1e-3, "d": "word"})),
        ("""x(a="1", b='true', c="p, q=(r)")""", Spec("x", None, {"a": "1", "b": "true", "c": "p, q=(r)"})),
        (r"""x(a="say \"hi\"", b='C:\temp')""", Spec("x", None, {"a": 'say "hi"', "b": r"C:\temp"})),
        (
            "x(a=[3, 5,6], b=[ 0.5 , 1 ], c=[-1e-3,], d=[])",
            Spec("x", None, {"a": (3, 5, 6), "b": (0.5, 1), "c": (-1e-3,), "d": ()}),
        ),
        ("""x(a="[3]", b='[3, 5]')""", Spec("x", None, {"a": "[3]", "b": "[3, 5]"})),
        ("x(a=__import__)", Spec("x", None, {"a": "__import__"})),  # literals, never evaluated
    ],
)
def test_strings(text: str, spec: Spec) -> None:
    assert identical(Spec.parse(text), spec)


def test_dicts() -> None:
    full = {"name": "vtc_cls", "keep": 0.2, "first_layer": 8}
    assert identical(Spec.parse(full), Spec("vtc-cls", Budget(0.2), {"first_layer": 8}))
    assert identical(Spec.parse({"name": "todre", "pruning_rate": 0.75}), Spec("todre", Budget(0.25)))
    spec = Spec("todre")
    assert Spec.parse(spec) is spec


def test_a_list_is_the_same_however_it_is_given() -> None:
    spec = Spec.parse("x(a=[3, 5])")
    assert str(spec) == "x(a=[3, 5])"
    assert spec.to_dict() == {"name": "x", "a": [3, 5]}
    for same in (spec.to_dict(), {"name": "x", "a": (3, 5)}, Spec("x", None, {"a": [3, 5]})):
        assert identical(Spec.parse(same), spec)
    assert split_specs("x(a=[3, 5]), y") == ["x(a=[3, 5])", " y"]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("", "''"),
        ("to dre", "'to dre'"),
        ("todre(", "name\\(option=value"),
        ("todre(keep)", "'keep'"),
        ("todre(keep=)", "'keep='"),
        ("todre(0.2)", "'0.2'"),
        ("todre(keep=0.2 objective=x)", "keep=0.2 objective=x"),
        ("todre(a=[1])x", "todre"),
        ("todre(a=(1))", "a="),
        ('todre(a="x)', "a="),
        ("todre(a=[1)", "a="),
        ("todre(a=[[1]])", "a="),
        ("todre(a=3, 5)", "'5'"),
        ("todre(a=[3, x])", r"a list holds numbers, as in \[3, 5\], not 'x'"),
        ("todre(a=[3,, 5])", "not ''"),
        ("todre(a=[,])", "not ''"),
        ("todre(a=[true])", "not 'true'"),
        ("todre(keep=[0.5])", r"\(0.5,\)"),
        (r'todre(a="\x")', "escape"),
        ("todre(a=1, a=2)", "todre: an option is given twice"),
        ("todre(keep=0.2, keep=0.2)", "todre: an option is given twice"),
        ("todre(keep=0.2, pruning_rate=0.8)", "keep or pruning_rate, not both"),
        ("todre(keep=1.5)", "keep=1.5"),
        ("todre(keep=0)", "keep=0 "),
        ("todre(keep=nan)", "keep=nan"),
        ("todre(keep=true)", "True"),
        ("todre(keep='0.5')", "'0.5'"),
        ("todre(pruning_rate=1.0)", "pruning_rate.*1.0"),
        ({"keep": 0.2}, '"name"'),
        ({"name": 3}, '"name"'),
        (3, "int"),
        (None, "NoneType"),
        (b"todre", "bytes"),
    ],
)
def test_bad_specs_are_named(value: Any, named: str) -> None:
    with pytest.raises(SpecError, match=named):
        Spec.parse(value)


def test_unknown_names_come_with_the_choices_and_the_nearest() -> None:
    message = str(unknown_name("method", "ToDer", ["todre", "pool"]))
    assert message == "unknown method 'ToDer'. Did you mean 'todre'? Available: pool, todre."
    assert "Did you mean" not in str(unknown_name("method", "zzz", ["todre"]))
    assert str(unknown_name("KV policy", "h2o", [])).endswith("Available: none.")
    assert "unknown option 5" in str(unknown_name("option", 5, ["seed"])).replace("'", "")  # type: ignore[arg-type]


def test_create_takes_the_arguments_of_wrap() -> None:
    assert CompressionConfig.create("todre", keep=0.2).methods == (Spec("todre", Budget(0.2)),)
    assert CompressionConfig.create("todre", pruning_rate=0.8).methods == (Spec("todre", Budget(0.2)),)
    assert CompressionConfig.create({"name": "todre"}, keep=5, options={"objective": "k-center"}).methods == (
        Spec("todre", Budget(5), {"objective": "k-center"}),
    )
    staged = CompressionConfig.create(["todre(keep=0.2)", Spec("pool")], kv="snapkv(keep=0.5)", positions="original")
    methods = (Spec("todre", Budget(0.2)), Spec("pool"))
    assert staged == CompressionConfig(methods, (Spec("snapkv", Budget(0.5)),), "original")
    assert CompressionConfig.create() == CompressionConfig()
    assert str(staged) == "todre(keep=0.2) + pool + snapkv(keep=0.5)"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(method="todre(keep=0.2)", keep=0.2), "keep is given twice: 0.2"),
        (dict(method="todre", keep=0.2, pruning_rate=0.8), "not both"),
        (dict(method=["todre", "pool"], keep=0.2), "exactly one method"),
        (dict(method=None, keep=0.2), "exactly one method"),
        (dict(method=[], options={"seed": 1}), "exactly one method"),
        (dict(method="random(seed=1)", options={"seed": 1}), "'seed' is given twice"),
        (dict(method="todre", positions="orignal"), "'orignal'. Did you mean 'original'"),
        (dict(method="todre", positions=["original"]), "Available: original, renumber"),
        (dict(method=5), "int"),
        (dict(method=[None]), "NoneType"),
        (dict(method="todre", kv=5), "int"),
    ],
)
def test_bad_configs_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(SpecError, match=named):
        CompressionConfig.create(**arguments)


@given(
    st.builds(
        CompressionConfig,
        st.lists(SPECS, max_size=3).map(tuple),
        st.lists(SPECS, max_size=2).map(tuple),
        st.sampled_from([None, "renumber", "original"]),
    )
)
def test_a_config_reads_back_from_its_json(config: CompressionConfig) -> None:
    data = json.loads(json.dumps(config.to_dict()))
    assert (data["format"], data["version"]) == (FORMAT, VERSION)
    again = CompressionConfig.from_dict(data)
    assert again == config
    assert all(identical(*pair) for pair in zip(again.methods, config.methods, strict=True))


def test_a_saved_config_loads(tmp_path: Path) -> None:
    config = CompressionConfig.create("vtc-cls(keep=0.25, first_layer=8)", kv="snapkv(keep=64)", positions="original")
    config.save(tmp_path / "config.json")
    assert CompressionConfig.load(tmp_path / "config.json") == config
    assert json.loads((tmp_path / "config.json").read_text())["version"] == VERSION


def test_hand_written_configs_need_no_header() -> None:
    config = CompressionConfig.from_dict({"method": "todre", "keep": 0.2})
    assert config == CompressionConfig.create("todre(keep=0.2)")
    assert config == CompressionConfig.from_dict({"method": ["todre"], "pruning_rate": 0.8})


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"format": "other", "method": "todre"}', "'other'.*'mmcompress-config'"),
        ('{"format": "mmcompress-config", "version": 2, "method": "todre"}', "version 2.*reads 1"),
        ('{"version": "1", "method": "todre"}', "version '1'"),
        ('{"methd": "todre"}', "'methd'. Did you mean 'method'"),
        ('{"method": "todre", "keep": 2.5}', "keep=2.5"),
        ('{"method": {"keep": 0.5}}', '"name"'),
        ('["todre"]', "expected a JSON object"),
        ('{"method": ', "cannot read config"),
        (None, "cannot read config"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, named: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError, match=named):
        CompressionConfig.load(path)


def test_bytes_that_are_no_text_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot read config"):
        CompressionConfig.load(tmp_path / "config.json")
