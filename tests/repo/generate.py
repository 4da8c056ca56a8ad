"""Writes what is generated from the code, or says how it differs: `generate.py --write | --check`.

`./dev update` writes; a test checks.  A difference in public_api.txt is a change of the public interface: look at it.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ForwardRef

from proxycore import api, hookspecs

ROOT = Path(__file__).parents[2]

INTRODUCTION = """\
# Hooks

Written from `proxycore/hookspecs.py` by `./dev update`; do not edit.

A plugin is any object with methods named as below and marked `@hookimpl` (from `proxycore.api`). An entry point in your
distribution names a function without arguments that returns it:

| what | entry-point group | hooks |
|---|---|---|
| a backend turns batches of changes into kernel state; one is active | `proxycore.backends` | `proxycore_backend_*` |
| an observer follows what has been programmed | `proxycore.plugins` | `proxycore_observer_*` |
| a source delivers Kubernetes objects | `proxycore.sources` | `proxycore_source_*` |

Implement the hooks that you need and name only the arguments that you use: hooks may gain arguments, they never lose
one without a warning first. All values that hooks exchange are in `proxycore.api`.
"""


def of(annotation: Any) -> str:
    """A type as a reader writes it, without the names of modules."""
    if isinstance(annotation, str):
        return annotation
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return re.sub(r"\b[a-z]\w*\.(?=[A-Za-z])", "", inspect.formatannotation(annotation))


def signature(function: Callable[..., Any]) -> str:
    """`name(argument: Type) -> Type`, without self."""
    plain = inspect.signature(function)
    arguments: list[str] = []
    for name, parameter in plain.parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        text = name if parameter.annotation is parameter.empty else f"{name}: {of(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            text += f" = {default if isinstance(default, enum.Enum) else repr(default)}"
        arguments.append(text)
    result = "" if isinstance(function, type) else f" -> {of(plain.return_annotation)}"
    return f"{function.__name__}({', '.join(arguments)}){result}"


def hooks(spec: type) -> list[Callable[..., Any]]:
    return [f for name, f in vars(spec).items() if name.startswith("proxycore_")]


SPECS = (hookspecs.BackendSpec, hookspecs.ObserverSpec, hookspecs.SourceSpec)


def hooks_page() -> str:
    """docs/hooks.md."""
    parts = [INTRODUCTION]
    for spec in SPECS:
        parts.append(f"## {spec.__name__.removesuffix('Spec')}\n\n{inspect.getdoc(spec)}\n")
        for hook in hooks(spec):
            parts.append(
                f"### {hook.__name__}\n\n```python\n{signature(hook)}\n```\n\n{inspect.getdoc(hook)}\n"
            )
    return "\n".join(parts)


def public_api() -> str:
    """tests/repo/public_api.txt: every public name with its shape."""
    lines = ["# Public names of proxycore.api and their shapes, and all hooks; written by ./dev update"]
    for name in sorted(api.__all__):
        lines.extend(describe(name, getattr(api, name)))
    lines.append("")
    for spec in SPECS:
        lines.extend(f"hook {signature(hook)}" for hook in hooks(spec))
    return "\n".join(lines) + "\n"


def describe(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, type) and issubclass(value, enum.Enum):
        yield f"enum {name}: {', '.join(f'{m.name}={m.value!r}' for m in value)}"
    elif isinstance(value, type):
        # What has no constructor of its own shows that of a base, which is Python's affair.
        shaped = hasattr(value, "__struct_fields__") or hasattr(value, "_fields") or "__init__" in vars(value)
        shaped = shaped and not getattr(value, "_is_protocol", False)
        bases = ", ".join(base.__name__ for base in value.__bases__)
        yield f"class {signature(value) if shaped else name}: {bases}"
        for attribute, member in sorted(vars(value).items()):
            if attribute.startswith("_"):
                continue
            if inspect.isfunction(member):
                yield f"    def {signature(member)}"
            elif isinstance(member, property):
                yield f"    property {attribute}"
    elif inspect.isfunction(value):
        yield f"def {signature(value)}"
    elif isinstance(value, str | tuple):
        yield f"{name} = {value!r}"
    else:
        # Of an object of a library only the name is ours; its text may hold an address in memory.
        text = str(value)
        yield name if " object at " in text else f"{name} = {of(value)}"


GENERATED: dict[Path, Callable[[], str]] = {
    ROOT / "docs" / "hooks.md": hooks_page,
    ROOT / "tests" / "repo" / "public_api.txt": public_api,
}


def main(arguments: list[str]) -> int:
    different = 0
    for path, text in GENERATED.items():
        old, new = path.read_text() if path.exists() else "", text()
        if old == new:
            continue
        different += 1
        name = str(path.relative_to(ROOT))
        if arguments == ["--write"]:
            path.write_text(new)
            print(f"written: {name}")
        else:
            print(
                *difflib.unified_diff(
                    old.splitlines(), new.splitlines(), name, "as generated now", lineterm=""
                ),
                sep="\n",
            )
    if arguments == ["--write"]:
        return 0
    if different:
        print(textwrap.dedent("\nIf this change is meant: ./dev update, and a line in CHANGELOG.md."))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
