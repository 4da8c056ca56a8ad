"""Running a kubeconfig's exec plugin: a program that prints credentials.

Semantics: client.authentication.k8s.io, v1 and v1beta1.  It gets no terminal and no input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated

import msgspec

from ..errors import SourceError
from .kubeconfig import Access

TIME_LIMIT_SECONDS = 60.0
_KILLED_SECONDS = 5.0
_POLL_SECONDS = 0.05
_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")
_SHOWN = 300


class Credential(msgspec.Struct, frozen=True, rename="camel"):
    """What a plugin gave: a token, or a certificate and its key (PEM), and until when they are good."""

    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | None = None

    @property
    def expires_at(self) -> float | None:
        """Seconds since the epoch."""
        return None if self.expiration_timestamp is None else self.expiration_timestamp.timestamp()


class _Answer(msgspec.Struct, frozen=True, rename="camel"):
    kind: str
    api_version: str
    status: Credential | None = None


def run(access: Access, stopping: threading.Event, limit: float | None = None) -> Credential:
    """Run the plugin of `access`, which has one, to its end.

    Raises SourceError in words for people: it is missing, failed, said nothing that can be used, or took longer than
    `limit` seconds (TIME_LIMIT_SECONDS).  It is killed then, and as soon as `stopping` is set.
    """
    plugin = access.exec
    assert plugin is not None
    name = f"{access.origin}: exec plugin {plugin.command}"
    if plugin.api_version not in _VERSIONS:
        raise SourceError(f"{name}: apiVersion {plugin.api_version!r} is none of {', '.join(_VERSIONS)}")
    if plugin.interactive_mode == "Always":
        raise SourceError(f"{name}: wants to ask a person, and a proxy has none")
    command = plugin.command
    if os.sep in command:
        command = os.path.join(access.base, command)
    environment = {**os.environ, **{item.name: item.value for item in plugin.env or ()}}
    try:
        environment["KUBERNETES_EXEC_INFO"] = _info(access)
        process = subprocess.Popen(
            [command, *(plugin.args or ())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        hint = f" ({plugin.install_hint.strip()})" if plugin.install_hint else ""
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SourceError(f"{name}: cannot be run: {reason}{hint}") from None
    out, err = _wait(process, stopping, TIME_LIMIT_SECONDS if limit is None else limit, name)
    if process.returncode:
        said = " ".join(err.decode(errors="replace").split())
        raise SourceError(
            f"{name}: ended with status {process.returncode}: {said[:_SHOWN] or 'it said nothing'}"
        )
    return _credential(out, plugin.api_version, name)


def _wait(
    process: subprocess.Popen[bytes], stopping: threading.Event, limit: float, name: str
) -> tuple[bytes, bytes]:
    deadline = time.monotonic() + limit
    try:
        while True:
            try:
                return process.communicate(timeout=_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if stopping.is_set():
                    raise SourceError(f"{name}: was ended, as the proxy ends") from None
                if time.monotonic() >= deadline:
                    raise SourceError(f"{name}: did not end within {limit:g} s and was killed") from None
    except SourceError:
        # With all that it may have started, which would hold its output open.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that left the group may hold the pipes for as long as it lives; nobody waits for that.
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        process.wait(_KILLED_SECONDS)
        raise


def _info(access: Access) -> str:
    assert access.exec is not None
    spec: dict[str, object] = {"interactive": False}
    cluster = access.cluster
    if access.exec.provide_cluster_info and cluster is not None:
        ca = access.ca
        if ca and isinstance(ca, str):
            with open(ca, "rb") as file:
                ca = file.read()
        told: dict[str, object] = {"server": access.server}
        if ca:
            told["certificate-authority-data"] = ca
        if access.insecure:
            told["insecure-skip-tls-verify"] = True
        for key, text in (("tls-server-name", access.tls_server_name), ("proxy-url", access.proxy_url)):
            if text:
                told[key] = text
        for extension in cluster.extensions if isinstance(cluster.extensions, list) else ():
            if isinstance(extension, dict) and extension.get("name") == "client.authentication.k8s.io/exec":
                told["config"] = extension.get("extension")
        spec["cluster"] = told
    value = {"kind": "ExecCredential", "apiVersion": access.exec.api_version, "spec": spec}
    return msgspec.json.encode(value).decode()


def _credential(out: bytes, version: str, name: str) -> Credential:
    try:
        answer = msgspec.json.decode(out, type=_Answer)
    except (msgspec.DecodeError, ValueError) as error:
        raise SourceError(f"{name}: what it printed is no ExecCredential: {error}") from None
    if answer.kind != "ExecCredential" or answer.api_version != version:
        raise SourceError(
            f"{name}: printed {answer.kind} of {answer.api_version}, not ExecCredential of {version}"
        )
    found = answer.status or Credential()
    if bool(found.client_certificate_data) != bool(found.client_key_data):
        raise SourceError(f"{name}: gave a certificate without its key, or a key without its certificate")
    token = (found.token or "").strip()
    if not token and not found.client_certificate_data:
        raise SourceError(f"{name}: gave neither a token nor a certificate")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SourceError(f"{name}: gave a token that no header can carry")
    if found.expiration_timestamp is not None and found.expiration_timestamp < datetime.now(UTC):
        raise SourceError(f"{name}: gave credentials that have expired")
    return msgspec.structs.replace(found, token=token or None)
