"""YAML and JSON with limits, and errors that name the line."""

from __future__ import annotations

import json
import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxycore.errors import DecodeError
from proxycore.yamlio import Document, load_documents

# PyYAML writes these words bare, for a number to it has a dot; to Kubernetes' tools they are numbers.
TEXT = st.text(max_size=20).filter(lambda text: not re.fullmatch(r"[-+]?[0-9_]+[eE][-+]?[0-9]+", text))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def values(text: str) -> list[object]:
    return [document.value for document in load_documents(text, where="f.yaml")]


def refusal(text: str, **limits: int) -> str:
    with pytest.raises(DecodeError) as caught:
        load_documents(text, where="f.yaml", **limits)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("null", None),
        ("y", "y"),
        ("12", 12),
        ("-7", -7),
        ("0o17", 15),
        ("017", 15),
        ("0x1F", 31),
        ("0b11", 3),
        ("08", 8.0),
        ("1_000", 1000),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("2026-01-02", "2026-01-02"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("22:22", "22:22"),
        ("1.2.3", "1.2.3"),
        ("10.0.0.1", "10.0.0.1"),
        ("+", "+"),
        ("-x", "-x"),
        (".", "."),
        ("._", "._"),
        ('"12"', "12"),
        ("'yes'", "yes"),
        ("! 12", "12"),
        ("!!str 12", "12"),
        ("!!int '12'", 12),
        ("!!float 12", 12.0),
        ("9" * 500, "9" * 500),
    ],
)
def test_scalars_mean_what_kubernetes_tools_take_them_for(text: str, value: object) -> None:
    (found,) = values(f"k: {text}\n")
    assert found == {"k": value}
    assert type(found["k"]) is type(value)  # type: ignore[index]


def test_keys_become_text() -> None:
    assert values("{1: a, true: b, 1.5: c, x: d}\n") == [{"1": "a", "true": "b", "1.5": "c", "x": "d"}]


def test_documents_items_and_values_know_their_lines() -> None:
    text = "# head\na: 1\n---\n---\nkind: List\nitems:\n- x: 1\n  y:\n  - 2\n- &it {x: 2}\n\n- *it\n"
    assert load_documents(text, where="f") == [
        Document(line=2, value={"a": 1}),
        Document(
            line=5,
            value={"kind": "List", "items": [{"x": 1, "y": [2]}, {"x": 2}, {"x": 2}]},
            item_lines=(7, 10, 12),
        ),
    ]
    (_, listed) = load_documents(text, where="f", with_lines=True)
    assert listed.lines[("items",)] == 6
    assert listed.lines[("items", 0)] == 7
    assert listed.lines[("items", 0, "y")] == 8
    assert listed.lines[("items", 0, "y", 0)] == 9
    assert listed.lines[("items", 1, "x")] == 10


def test_merge_keys_bring_in_what_is_not_said() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: [*a, *b]\n  x: 9\nd: {'<<': 1}\n"
    assert values(text)[0] == {
        "a": {"x": 1, "y": 1},
        "b": {"y": 2, "z": 2},
        "c": {"x": 9, "y": 1, "z": 2},
        "d": {"<<": 1},
    }


def test_json_is_read_as_json_and_json_one_after_another_too() -> None:
    assert values('{"a": "yes", "a": "no"}') == [{"a": "no"}]
    assert load_documents('\n{"a": 1}\n\n{"b": [2]}\n', where="f") == [
        Document(line=2, value={"a": 1}),
        Document(line=4, value={"b": [2]}),
    ]
    assert values("{a: b, c: [d]}\n---\ne: f\n") == [{"a": "b", "c": ["d"]}, {"e": "f"}]


def test_a_byte_order_mark_is_no_content() -> None:
    assert values("\ufeffa: 1\n") == [{"a": 1}]
    assert values('\ufeff{"a": 1}') == [{"a": 1}]


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n---\n", "null\n"])
def test_empty_documents_are_left_out(text: str) -> None:
    assert values(text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: key 'a' stands twice in one mapping"),
        (
            "ok: 1\n---\na: [1\n",
            "f.yaml:4: is not YAML: while parsing a flow sequence, did not find expected ',' or ']'",
        ),
        ("a: 1\nb: *gone\n", "f.yaml:2: alias *gone stands for nothing that is complete above it"),
        ("a: &a [*a]\n", "f.yaml:1: alias *a stands for nothing that is complete above it"),
        ("a: 1\n---\n<<: 3\n", "f.yaml:3: the value of << must be a mapping or a list of mappings"),
        ("x:\n  ? [1]\n  : 2\n", "f.yaml:2: a key must be a single value, not a list or mapping"),
        ("~: 2\n", "f.yaml:1: a key must be text"),
        (
            "a: !!python/object/apply:os.system [id]\n",
            "f.yaml:1: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed: only plain values are read",
        ),
        ("a: !!int x\n", "f.yaml:1: 'x' is not of the type int that its tag says"),
        ("\n\na: \x01\n", "f.yaml:3: is not YAML: control characters are not allowed"),
        ("a: \ud800\n", "f.yaml: is not text"),
    ],
)
def test_errors_name_the_line_and_the_reason(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


@pytest.mark.parametrize(
    ("where", "text", "message"),
    [
        ("f.json", '{"a": 1,\n "b": ]\n', "f.json:2: is not JSON: expecting value (column 7)"),
        ("f.json", '{"a": 1}\n{"b": [1}\n', "f.json:2: is not JSON: expecting ',' delimiter (column 9)"),
        ("f.json", "[1,\n", "f.json:2: is not JSON: expecting value (column 1)"),
        ("", '{"a": 1,\n', ":2: is not JSON: expecting property name enclosed in double quotes (column 1)"),
        ("f.yaml", '{"a": 1,\n', "f.yaml:2: is not YAML: while parsing a flow node"),
        ("", "{a: 1,\n", ":2: is not YAML: while parsing a flow node"),
    ],
)
def test_what_is_meant_as_json_is_blamed_as_json(where: str, text: str, message: str) -> None:
    with pytest.raises(DecodeError) as caught:
        load_documents(text, where=where)
    assert str(caught.value).startswith(message)


def test_duplicate_keys_may_be_allowed() -> None:
    documents = load_documents("a: 1\na: 2\n", where="f", allow_duplicates=True)
    assert [document.value for document in documents] == [{"a": 2}]


def test_multiplying_aliases_are_refused_before_they_multiply() -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
    )
    assert refusal(bomb) == "f.yaml:6: has aliases that stand for more than 100000 values"


def test_the_number_of_aliases_is_limited() -> None:
    text = "a: &a x\nb: [" + ",".join(["*a"] * 11) + "]\n"
    assert refusal(text, max_aliases=10) == "f.yaml:2: has more than 10 aliases"
    assert load_documents(text, where="f", max_aliases=11)


@pytest.mark.parametrize(
    "text", ["[" * 1000 + "]" * 1000, '{"a":' * 1000 + "1" + "}" * 1000, "{a: " * 90 + "1" + "}" * 90]
)
def test_depth_is_limited(text: str) -> None:
    assert "is nested deeper than 64 levels" in refusal(text)


def test_json_a_level_within_the_limit_is_read() -> None:
    assert len(values("[" * 64 + "]" * 64)) == 1
    assert len(values('{"a":' * 64 + "1" + "}" * 64)) == 1
    assert "deeper" in refusal('{"a":' * 65 + "1" + "}" * 65)
    assert "deeper" in refusal("[" * 65 + "]" * 65)


def test_size_is_limited_in_bytes() -> None:
    assert refusal("a: éé\n", max_bytes=7) == "f.yaml: is 8 bytes long; at most 7 are read"
    assert load_documents("a: éé\n", where="f", max_bytes=8)


@given(JSON)
def test_what_yaml_libraries_write_is_read_back(value: object) -> None:
    for text in (
        yaml.safe_dump({"k": value}),
        yaml.safe_dump({"k": value}, default_flow_style=True),
        json.dumps({"k": value}),
    ):
        (document,) = load_documents(text, where="f")
        # PyYAML writes 1e+16 for floats as JSON does, and both sides read the same number.
        assert document.value == {"k": value}


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@,? \n\t0<\u00e9\x85", max_size=60))
def test_any_text_is_read_or_refused_with_its_name(text: str) -> None:
    subject = "f.yaml"
    try:
        load_documents(text, where="f.yaml")
    except DecodeError as error:
        subject = error.subject
    assert subject.startswith("f.yaml")
