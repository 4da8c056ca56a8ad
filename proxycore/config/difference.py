"""What a new configuration changes, and how much of it a proxy that runs can take over."""

from __future__ import annotations

from collections.abc import Set
from typing import Literal

import msgspec

from ..errors import InternalError
from .documents import Setting
from .dump import text_of
from .field import Field
from .fields import BY_PATH, FIELDS
from .gates import GATES
from .kubeproxy import MODES
from .model import Config, Loaded
from .resolve import Resolver, serves

Effect = Literal["live", "restart", "none"]
"""When a changed field takes effect: at once, at the next start, or not at all in this configuration."""

_NODE_PORTS = "nodePortAddresses"


class FieldChange(msgspec.Struct, frozen=True, kw_only=True):
    """One field whose value changes; `old` and `new` as a flag would say them, `origin` of the new one."""

    path: str
    old: str
    new: str
    origin: str
    effect: Effect


class Difference(msgspec.Struct, frozen=True):
    """All fields that change, in the order of the documents; false if there is none."""

    changes: tuple[FieldChange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def live(self) -> tuple[str, ...]:
        """Paths of the fields that take effect at once."""
        return tuple(change.path for change in self.changes if change.effect == "live")

    @property
    def needs_restart(self) -> tuple[str, ...]:
        """Paths of the fields that wait for a restart."""
        return tuple(change.path for change in self.changes if change.effect == "restart")


def difference(old: Loaded, new: Loaded) -> Difference:
    """What `new` changes in a proxy that runs with `old`."""
    held = _held(old, new)
    return Difference(
        tuple(
            FieldChange(
                path=field.path,
                old=_text(field, before),
                new=_text(field, after),
                origin=new.origin_and_place(field.path),
                effect=_effect(field, old, new, held),
            )
            for field in FIELDS
            if (before := _value(old, field)) != (after := _value(new, field))
        )
    )


def merged(old: Loaded, new: Loaded) -> Loaded:
    """`new`, but for the fields that need a restart, which stay as they are in `old`, in force now.

    While another backend or mode waits for a restart, the sections of all modes stay too: a file that was written
    for the next mode says nothing about the one that runs.
    """
    return _combine(old, new, _held(old, new))


def _value(loaded: Loaded, field: Field) -> object:
    return loaded.values.get(field.path, field.default)


def _text(field: Field, value: object) -> str:
    match field.type, value:
        case "text", str():
            return value
        case "list", list() | tuple():
            return ",".join(map(str, value))
    return text_of(field, value)


def _effect(field: Field, old: Loaded, new: Loaded, held: Set[str]) -> Effect:
    if field.treatment == "ignored":
        return "none"
    if not any(serves(field.path, loaded.config.backend, loaded.config.mode) for loaded in (old, new)):
        return "none"
    if field.path == "featureGates" and not _gates_matter(old.config, new.config):
        return "none"
    return "restart" if field.path in held else "live"


def _gates_matter(old: Config, new: Config) -> bool:
    return any(
        old.feature_gates.get(name, held) != new.feature_gates.get(name, held)
        for name, (treatment, held, _) in GATES.items()
        if treatment != "ignored"
    )


def _held(old: Loaded, new: Loaded) -> Set[str]:
    """The fields that must stay as they are."""
    held = {field.path for field in FIELDS if field.reload == "restart" and field.treatment != "ignored"}
    if (old.config.backend, old.config.mode) != (new.config.backend, new.config.mode):
        held |= {path for path in BY_PATH if path.partition(".")[0] in MODES}
        # Its default is the mode's.
        if new.origins.get(_NODE_PORTS, "default") == "default":
            held.add(_NODE_PORTS)
    if _combine(old, new, held).config.backend_options != old.config.backend_options:
        # In iptables mode it decides whether node ports are wanted on loopback, of which the backend hears at its start.
        held.add(_NODE_PORTS)
    return held


def _combine(old: Loaded, new: Loaded, held: Set[str]) -> Loaded:
    settings: dict[str, Setting] = {}
    for path in BY_PATH:
        loaded = old if path in held else new
        origin = loaded.origins.get(path, "default")
        # What nobody wrote is worked out again, since it may depend on other fields.
        if origin != "default":
            settings[path] = Setting(loaded.values[path], origin, loaded.places.get(path, origin))
    resolver = Resolver(settings)
    config = resolver.config()
    if config is None:
        reasons = "; ".join(problem.reason for problem in resolver.problems)
        raise InternalError(f"two configurations that are sound by themselves make none together: {reasons}")
    return Loaded(
        config=config,
        warnings=new.warnings,
        origins=resolver.origins,
        values=resolver.values,
        places=resolver.places,
    )
