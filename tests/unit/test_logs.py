"""Log lines: whatever a name holds, one entry is one line and its fields are its own."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore import logs
from proxycore.model import ServicePortName

FORGED = 'web"\nlevel=error msg="all is lost" \u2028\u202e\x1b[31m'


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(format: logs.Format, verbosity: int = 0) -> tuple[io.StringIO, logs.Log]:
    stream = io.StringIO()
    logs.configure(format, verbosity, stream)
    return stream, logs.get("engine")


def text_fields(line: str) -> dict[str, str]:
    """Reads a line as logfmt parsers do: split at blanks outside quotes, then at the first equals sign."""
    fields = {}
    rest = line.rstrip("\n")
    while rest:
        key, _, rest = rest.partition("=")
        if rest.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(rest)
        else:
            end = len(rest.partition(" ")[0])
            value = rest[:end]
        fields[key] = value
        rest = rest[end:].removeprefix(" ")
    return fields


def test_a_text_line() -> None:
    stream, log = written("text")
    log.info("synced", changes=3, ms=1.23456789, full=True, reason=None)
    line = stream.getvalue()
    assert line.endswith(
        "Z level=info msg=synced logger=engine changes=3 ms=1.234568 full=true reason=null\n"
    )
    assert line.startswith("time=2")


def test_a_json_line_keeps_types() -> None:
    stream, log = written("json")
    name = ServicePortName("shop", "web", "http", "TCP", "IPv4")
    log.bind(service=name).warning("not programmed", changes=3, ratio=float("inf"), level="x")
    entry = json.loads(stream.getvalue())
    del entry["time"]
    assert entry == {
        "level": "warning",
        "msg": "not programmed",
        "logger": "engine",
        "service": "shop/web:http",
        "changes": 3,
        "ratio": "inf",
        "level_": "x",
    }


def test_a_name_cannot_forge_an_entry_a_field_or_a_terminal_sequence() -> None:
    stream, log = written("text")
    log.info("ignored", service=FORGED)
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert line.isascii()
    assert "\x1b" not in line
    fields = text_fields(line)
    assert (fields["level"], fields["service"]) == ("info", FORGED)


@given(st.dictionaries(st.sampled_from(["service", "error", "why"]), st.text(), max_size=3), st.text())
def test_every_value_is_read_back_as_it_was(values: dict[str, str], message: str) -> None:
    stream, log = written("text")
    log.info(message, **values)
    fields = text_fields(stream.getvalue())
    assert stream.getvalue().count("\n") == 1
    assert {key: fields[key] for key in values} == values
    assert fields["msg"] == message
    assert len(fields) == 4 + len(values)


def test_a_list_keeps_its_items_apart() -> None:
    stream, log = written("text")
    log.info(
        "x",
        families=["IPv4", "IPv6"],
        what=("a,b", 'c" d="'),
        name=ServicePortName("s", "w", "", "TCP", "IPv4"),
    )
    assert stream.getvalue().endswith(' families=[IPv4,IPv6] what=["a,b","c\\" d=\\""] name=s/w\n')
    stream, log = written("json")
    log.info("x", families=["IPv4", "IPv6"], name=ServicePortName("s", "w", "", "TCP", "IPv4"))
    entry = json.loads(stream.getvalue())
    assert (entry["families"], entry["name"]) == (["IPv4", "IPv6"], "s/w")


def test_a_percent_sign_in_a_message_is_no_conversion() -> None:
    stream, log = written("text")
    log.info("100 %s")
    assert 'msg="100 %s"' in stream.getvalue()


def test_entries_of_libraries_and_plugins_have_the_same_form() -> None:
    stream, _ = written("text")
    logging.getLogger("made_up.plugin").warning("lost %d\nlevel=error", 3)
    assert text_fields(stream.getvalue())["msg"] == "lost 3\nlevel=error"


def test_an_exception_is_one_line() -> None:
    stream, log = written("text")
    try:
        raise ValueError(FORGED)
    except ValueError as error:
        log.exception("failed", error)
    assert stream.getvalue().count("\n") == 1
    assert FORGED in text_fields(stream.getvalue())["traceback"]


def test_a_value_that_cannot_be_told_costs_only_its_field() -> None:
    class Mute:
        def __str__(self) -> str:
            raise RuntimeError

    stream, log = written("text")
    log.info("x", value=Mute())
    assert text_fields(stream.getvalue())["value"] == "<Mute>"


@pytest.mark.parametrize(("verbosity", "debugs"), [(0, False), (3, False), (4, True), (10, True)])
def test_verbosity(verbosity: int, debugs: bool) -> None:
    stream, log = written("text", verbosity)
    log.debug("detail")
    assert bool(stream.getvalue()) is debugs
    assert log.debugs() is debugs


def test_configuring_again_replaces_the_former_stream() -> None:
    first, _ = written("text")
    second, log = written("json")
    log.info("x")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["msg"] == "x"


def test_a_reader_that_went_away_does_not_disturb_us(capfd: pytest.CaptureFixture[str]) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    logs.configure(stream=Gone())
    logs.get("engine").info("x")
    assert capfd.readouterr().err == ""
