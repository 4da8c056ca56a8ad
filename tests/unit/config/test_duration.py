"""Go's notation for durations."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.config.duration import MAX, SECOND, format_duration, parse_duration

NANOSECONDS = st.integers(-MAX - 1, MAX)
UNITS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": SECOND, "m": 60 * SECOND, "h": 3600 * SECOND}


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0", 0),
        ("-0", 0),
        ("0s", 0),
        ("30s", 30 * SECOND),
        ("1h0m0s", 3600 * SECOND),
        ("500ms", SECOND // 2),
        ("1.5s", 3 * SECOND // 2),
        (".5s", SECOND // 2),
        ("5.s", 5 * SECOND),
        ("+5s", 5 * SECOND),
        ("-1m30s", -90 * SECOND),
        ("1us", 1000),
        ("1µs", 1000),
        ("1μs", 1000),
        ("1h1h", 7200 * SECOND),
        ("2562047h47m16.854775807s", MAX),
        ("-2562047h47m16.854775808s", -MAX - 1),
    ],
)
def test_what_go_understands_is_understood(text: str, nanoseconds: int) -> None:
    assert parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "3",
        "-",
        "+",
        "1.",
        ".s",
        "1.2.3s",
        "1d",
        "1 s",
        " 1s",
        "1S",
        "--1s",
        "1s-1s",
        "\u0661s",
        "1h2",
        "∞",
    ],
)
def test_what_go_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no duration|has no unit"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["2562047h47m16.854775808s", "9999999999h", "1" * 5000 + "s"])
def test_more_than_an_int64_holds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="292 years"):
        parse_duration(text)


def test_a_bare_number_is_told_its_unit() -> None:
    with pytest.raises(ValueError, match="'5' has no unit: write 5s for seconds"):
        parse_duration("5")


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ns"),
        (1100, "1.1µs"),
        (2_200_000, "2.2ms"),
        (3_300_000_000, "3.3s"),
        (5 * 60 * SECOND, "5m0s"),
        (5 * 60 * SECOND + 1_000_000, "5m0.001s"),
        (3600 * SECOND, "1h0m0s"),
        (-90 * SECOND, "-1m30s"),
        (MAX, "2562047h47m16.854775807s"),
    ],
)
def test_durations_are_printed_as_go_prints_them(nanoseconds: int, text: str) -> None:
    assert format_duration(nanoseconds) == text


@given(NANOSECONDS)
def test_what_is_printed_is_read_back(nanoseconds: int) -> None:
    assert parse_duration(format_duration(nanoseconds)) == nanoseconds


@given(st.lists(st.tuples(st.integers(0, 10**5), st.sampled_from(sorted(UNITS))), min_size=1, max_size=5))
def test_parts_add_up(parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(text) == sum(number * UNITS[unit] for number, unit in parts)


@given(st.text(alphabet="0123456789.+-nuµmsh x", max_size=12))
def test_any_text_gives_a_number_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert -MAX - 1 <= parse_duration(text) <= MAX
