"""What the pages say can be followed: links lead somewhere, and commands exist with the options shown."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from proxycore.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|[`$|&;] *|\bsudo +)(proxyctl(?: [^`\n]*)?)", re.MULTILINE)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ +(.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for target in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text())):
            broken.append(target)
    assert broken == []


def test_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target).resolve() for target in LINK.findall(index.read_text())}
    assert set(ROOT.glob("docs/**/*.md")) - {index} - linked == set()


def defined(file: Path) -> set[str]:
    """Names of functions, classes and methods, as `name` and `Class.name`."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            inside = {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
            found |= {node.name} | inside
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_code_that_pages_name_exists(page: Path) -> None:
    missing = []
    for path, _, name in re.findall(r"`([\w./-]+\.(?:py|toml|yaml|txt))(::([\w.]+))?`", page.read_text()):
        file = ROOT / path
        if "/" in path and not file.is_file():
            missing.append(path)
        elif name and name not in defined(file):
            missing.append(f"{path}::{name}")
    assert missing == []


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for line in COMMAND.findall(page.read_text()):
            command = re.split(r"\s(?:#|\||>|&&|2>|<)", line.replace("\\\n", " "))[0].rstrip(".,;:")
            yield f"{ids(page)}: {command}", shlex.split(command)[1:]


def fault(words: list[str]) -> str:
    """What is wrong with a command line; empty if it could be run."""
    command: Any = typer.main.get_command(app)
    options = set()
    while True:
        options |= {
            name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")
        }
        if not hasattr(command, "commands") or not words:
            break
        if words[0].startswith("-") or words[0].isupper():  # COMMAND stands for any
            break
        if words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command = command.commands[words[0]]
        words = words[1:]
    used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    unknown = used - options - {"--help", "-h"}
    return f"no option {', '.join(sorted(unknown))}" if unknown else ""


def test_commands_in_pages_exist_with_their_options() -> None:
    found = list(commands())
    assert len(found) > 5
    assert {where: wrong for where, words in found if (wrong := fault(words))} == {}


def test_a_wrong_command_would_be_noticed() -> None:
    assert fault(["run", "--no-such-option"]) == "no option --no-such-option"
    assert fault(["no-such-command"]) == "no command 'no-such-command'"
    assert fault(["run", "--backend", "nft"]) == ""
