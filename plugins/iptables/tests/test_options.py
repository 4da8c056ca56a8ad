"""The backend's own settings: what is said of wrong ones, and how a start with them ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxycore.api import ConfigError
from proxycore.testing.netns import Namespace
from proxycore.testing.states import context
from proxycore_iptables import offline
from proxycore_iptables.shape import Options, parse_options

FIELD = "backendOptions.iptables"
WRONG = {"varaint": "nft", "lockSeconds": 60, "treeFrom": 10, "dropInvalid": "yes", "colour": 1}
SAID = [
    f"{FIELD}.varaint: no such setting; did you mean variant (one of auto, legacy, nft)?",
    f"{FIELD}.lockSeconds: 60 is not a number from 1 to 20",
    f"{FIELD}.dropInvalid: 'yes' is not one of auto, always, never",
    f"{FIELD}.colour: no such setting; there are variant, localhostNodePorts, dropInvalid, commentsUpTo, treeFrom, "
    "lockSeconds, chainsPerRestore",
]


def test_right_ones_are_taken() -> None:
    assert parse_options({}) == Options()
    found = parse_options({"variant": "legacy", "localhostNodePorts": True, "lockSeconds": 20, "treeFrom": 0})
    assert found == Options(variant="legacy", localhost_node_ports=True, lock_seconds=20, tree_from=0)


def test_all_wrong_ones_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options(WRONG)
    assert list(caught.value.lines) == SAID
    assert caught.value.field == f"{FIELD}.varaint"
    assert str(caught.value) == "; ".join(SAID)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Variant", "variant"),
        ("lock_seconds", "lockSeconds"),
        ("drop-invalid", "dropInvalid"),
        ("treeForm", "treeFrom"),
        ("commentUpTo", "commentsUpTo"),
        ("chainsPerRestor", "chainsPerRestore"),
        ("localhostNodePort", "localhostNodePorts"),
    ],
)
def test_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"iptables\.{name}: no such setting; did you mean {meant} \("):
        parse_options({name: 1})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("localhostNodePorts", "true", "'true' is not true or false"),
        ("localhostNodePorts", 1, "1 is not true or false"),
        ("lockSeconds", True, "True is not a number from 1 to 20"),
        ("lockSeconds", 1.5, "1.5 is not a number from 1 to 20"),
        ("lockSeconds", "5", "'5' is not a number from 1 to 20"),
        ("variant", ["nft"], "['nft'] is not one of auto, legacy, nft"),
        ("variant", None, "None is not one of auto, legacy, nft"),
    ],
)
def test_values_that_are_not_allowed(name: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_options({name: value})
    assert str(caught.value) == f"{FIELD}.{name}: {said}"


NAMES = st.sampled_from(["variant", "lockSeconds", "localhostNodePorts"]) | st.text(max_size=20)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text(), max_size=3)


def lines_about(given: dict[str, object]) -> tuple[str, ...]:
    try:
        parse_options(given)
    except ConfigError as error:
        return error.lines
    return ()


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_whatever_is_given_is_options_or_told(given: dict[str, object]) -> None:
    """Each wrong one has its line, which it has whatever stands beside it."""
    lines = lines_about(given)
    assert lines == tuple(line for name in given for line in lines_about({name: given[name]}))
    assert all(len(line) < 300 for line in lines)


def test_a_probe_lets_the_error_out() -> None:
    with pytest.raises(ConfigError, match="did you mean variant"):
        offline.probe(context(options=WRONG))


@pytest.mark.root
def test_a_run_ends_as_with_any_wrong_configuration(xtables_lock: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "proxycore",
        "run",
        "--backend",
        "iptables",
        "--source",
        f"file:{tmp_path}",
    ]
    given = f"backendOptions={json.dumps({'iptables': WRONG})}"
    with Namespace("options") as namespace:
        done = namespace.run([*command, "--set", given, "--node-name", "here"], check=False)
        tables = namespace.run(["cat", "/proc/net/ip_tables_names"]).stdout
        tables += namespace.run(["nft", "list", "tables"]).stdout
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert (done.returncode, errors) == (2, [f"proxyctl: error: {line}" for line in SAID])
    assert "cannot carry" not in done.stderr
    assert tables == ""
