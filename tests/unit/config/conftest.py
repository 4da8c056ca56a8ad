"""Configuration files for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from proxycore.config import Config, Loaded, load
from proxycore.errors import ConfigError

KUBE_PROXY = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PROXYCORE = "apiVersion: proxycore.io/v1alpha1\nkind: ProxycoreConfiguration\n"

Write = Callable[..., Path]
Read = Callable[[str], Loaded]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def read(write: Write) -> Read:
    """A KubeProxyConfiguration and a ProxycoreConfiguration after `---`, without their heads."""

    def read(text: str) -> Loaded:
        first, _, second = text.partition("---\n")
        return load([write(f"{KUBE_PROXY}{first}\n---\n{PROXYCORE}{second}\n")])

    return read


@pytest.fixture
def refuse(read: Read, tmp_path: Path) -> Callable[[str], str]:
    """The error's text, the file's folder left out."""

    def refuse(text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            read(text)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refuse


@pytest.fixture
def warnings(read: Read, tmp_path: Path) -> Callable[[str], list[str]]:
    def warnings(text: str) -> list[str]:
        return [warning.replace(f"{tmp_path}/", "") for warning in read(text).warnings]

    return warnings


@pytest.fixture
def changed() -> Callable[[Config], dict[str, object]]:
    """Tells what differs from the defaults."""

    def changed(config: Config) -> dict[str, object]:
        """What differs from the defaults."""
        default = Config()
        return {
            name: getattr(config, name)
            for name in Config.__struct_fields__
            if getattr(config, name) != getattr(default, name)
        }

    return changed
