"""docs/configuration.md lists exactly the fields and gates that the code knows, as the code treats them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from proxycore.config.dump import flow
from proxycore.config.duration import format_duration
from proxycore.config.field import KUBE_PROXY, PROXYCORE, Field
from proxycore.config.fields import FIELDS
from proxycore.config.gates import GATES

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
TREATMENTS = {"obeyed": "obeyed", "differently": "obeyed differently", "ignored": "ignored, with a warning"}
EFFECTS = {"live": "at once", "restart": "at a restart"}


def field_row(field: Field) -> str:
    default = format_duration(field.default) if field.type == "duration" else flow(field.default)  # type: ignore[arg-type]
    treatment = TREATMENTS[field.treatment] + (f": {field.note}" if field.note else "")
    if field.choices:
        treatment += f" ({', '.join(f'`{choice}`' for choice in field.choices)})"
    effect = "" if field.treatment == "ignored" else EFFECTS[field.reload]
    row = f"| `{field.path}` | `{default}` | {treatment} | {effect} | `{field.environment}` |".replace(
        "|  |", "| |"
    )
    if field.document == PROXYCORE:
        return row
    flags = ", ".join(f"`{flag}`" for flag in field.flags)
    return f"{row} {flags} |".replace("|  |", "| |")


def gate_row(name: str) -> str:
    treatment, held, reason = GATES[name]
    return f"| `{name}` | {'on' if held else 'off'} | {TREATMENTS[treatment]}: {reason} |"


def rows_below(heading: str) -> list[str]:
    """The rows of the first table below a heading, its head left out."""
    text = PAGE.read_text().partition(f"\n{heading}\n")[2]
    assert text, f"{PAGE.name} has no heading {heading!r}"
    return [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| `")]


def expected(document: str) -> list[str]:
    return [field_row(field) for field in FIELDS if field.document == document]


@pytest.mark.parametrize(
    ("heading", "rows"),
    [
        (f"## {KUBE_PROXY}", expected(KUBE_PROXY)),
        (f"## {PROXYCORE}", expected(PROXYCORE)),
        ("## Feature gates", [gate_row(name) for name in GATES]),
    ],
)
def test_the_tables_list_what_the_code_knows(heading: str, rows: Iterable[str]) -> None:
    assert rows_below(heading) == list(rows)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.path)
def test_every_field_that_is_not_simply_obeyed_says_why(field: Field) -> None:
    assert field.treatment == "obeyed" or field.note
