"""Words that the shell completes; nothing is imported that a plugin brings."""

from __future__ import annotations


def backends(incomplete: str) -> list[str]:
    """Names of installed backends."""
    from ..plugins import backend_names

    return [name for name in backend_names() if name.startswith(incomplete)]


def sources(incomplete: str) -> list[str]:
    """Names of installed sources, each with the colon that its argument follows."""
    from ..plugins import source_names

    return [name for name in (f"{name}:" for name in source_names()) if name.startswith(incomplete)]


def fields(incomplete: str) -> list[str]:
    """Configuration fields, each with its equals sign."""
    from ..config.fields import BY_PATH

    return [path for path in (f"{path}=" for path in sorted(BY_PATH)) if path.startswith(incomplete)]
