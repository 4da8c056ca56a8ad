"""Where the API server is and who we are: kubeconfig files, or what a pod finds in its service account.

Nothing is asked of the network, and no plugin is run.  Semantics: client-go's loading rules.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

from ..errors import DecodeError, SourceError
from ..source import APIServer
from ..sources.manifests import printable
from ..yamlio import load_documents

SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
DEFAULT_KUBECONFIG = "~/.kube/config"
_MAX_FILE_BYTES = 4 << 20

_Item = TypeVar("_Item", bound="_NamedItem")


class _Part(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Unknown fields are skipped, as kubectl skips them."""


class Cluster(_Part, frozen=True, kw_only=True):
    server: str | None = None
    certificate_authority: str | None = None
    certificate_authority_data: str | None = None
    insecure_skip_tls_verify: bool | None = None
    tls_server_name: str | None = None
    proxy_url: str | None = None
    extensions: Any = None


class ExecVariable(msgspec.Struct, frozen=True):
    name: str
    value: str


class Exec(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A program that gives credentials."""

    command: str
    api_version: str
    args: tuple[str, ...] | None = None
    env: tuple[ExecVariable, ...] | None = None
    provide_cluster_info: bool | None = None
    interactive_mode: str | None = None
    install_hint: str | None = None


class User(_Part, frozen=True, kw_only=True):
    token: str | None = None
    token_file: str | None = msgspec.field(name="tokenFile", default=None)
    client_certificate: str | None = None
    client_certificate_data: str | None = None
    client_key: str | None = None
    client_key_data: str | None = None
    username: str | None = None
    password: str | None = None
    exec: Exec | None = None
    auth_provider: Any = None


class _Context(_Part, frozen=True, kw_only=True):
    cluster: str
    user: str | None = None


class _NamedItem(_Part, frozen=True, kw_only=True):
    name: str


class _NamedCluster(_NamedItem, frozen=True, kw_only=True):
    cluster: Cluster


class _NamedUser(_NamedItem, frozen=True, kw_only=True):
    user: User | None = None


class _NamedContext(_NamedItem, frozen=True, kw_only=True):
    context: _Context


class _Kubeconfig(_Part, frozen=True, kw_only=True):
    current_context: str | None = None
    clusters: tuple[_NamedCluster, ...] | None = None
    users: tuple[_NamedUser, ...] | None = None
    contexts: tuple[_NamedContext, ...] | None = None


class _Loaded(NamedTuple):
    path: str
    content: _Kubeconfig


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """One API server and one user of it.

    `origin` says where this stands, for messages.  `server`: URL without a slash at its end.
    `ca`, `certificate`, `key`: PEM, or the path of a file with it; paths are absolute.  `token` was read, and stripped.
    `base`: directory of the file that names an exec plugin.  `files`: those that a change of which makes this outdated.
    """

    origin: str
    server: str
    ca: str | bytes = ""
    certificate: str | bytes = ""
    key: str | bytes = ""
    token: str = ""
    username: str = ""
    password: str = ""
    exec: Exec | None = None
    cluster: Cluster | None = None
    auth_provider: Any = None
    base: str = ""
    insecure: bool = False
    tls_server_name: str = ""
    proxy_url: str = ""
    files: tuple[str, ...] = ()


def load(settings: APIServer, environment: Mapping[str, str]) -> Access:
    """Find and read the configuration.

    In this order: the kubeconfig of `settings`, those of KUBECONFIG, a pod's service account, ~/.kube/config; the master
    of `settings` overrules the server, and is enough where none of these is there.
    Raises SourceError naming the file and the reason, or everywhere that was looked.
    """
    access = _find(settings, environment)
    if settings.master:
        access = msgspec.structs.replace(access, server=_url(settings.master, "the master"))
    return access


def _find(settings: APIServer, environment: Mapping[str, str]) -> Access:
    looked: list[str] = []
    if settings.kubeconfig:
        return _from_files([os.path.expanduser(settings.kubeconfig)], settings.context, bool(settings.master))
    if environment.get("KUBECONFIG"):
        paths = [os.path.expanduser(p) for p in environment["KUBECONFIG"].split(os.pathsep) if p]
        found = [path for path in paths if os.path.exists(path)]
        if found:
            return _from_files(found, settings.context, bool(settings.master))
        looked.append(f"KUBECONFIG ({', '.join(map(printable, paths))}: not there)")
    else:
        looked.append("KUBECONFIG (not set)")
    host = environment.get("KUBERNETES_SERVICE_HOST")
    token_file = os.path.join(SERVICE_ACCOUNT, "token")
    if host and os.path.exists(token_file) and not settings.context:
        return _in_cluster(host, environment.get("KUBERNETES_SERVICE_PORT") or "443", token_file)
    missing = "KUBERNETES_SERVICE_HOST is not set" if not host else f"{token_file} is not there"
    looked.append(f"a pod's service account ({'a context was asked for' if settings.context else missing})")
    default = os.path.expanduser(DEFAULT_KUBECONFIG)
    if os.path.exists(default):
        return _from_files([default], settings.context, bool(settings.master))
    if settings.master and not settings.context:
        return Access(origin="the master", server="")
    looked.append(f"{DEFAULT_KUBECONFIG} (not there)")
    raise SourceError(
        f"no way to the API server is configured: looked at {'; '.join(looked)}; give a kubeconfig by "
        "clientConnection.kubeconfig or --kubeconfig, or an address by --master"
    )


def _in_cluster(host: str, port: str, token_file: str) -> Access:
    ca = os.path.join(SERVICE_ACCOUNT, "ca.crt")
    joined = f"[{host}]" if ":" in host else host
    return Access(
        origin="the pod's service account",
        server=f"https://{joined}:{port}",
        ca=ca if os.path.exists(ca) else "",
        token=_token(token_file),
        files=(token_file, ca),
    )


def _from_files(paths: Sequence[str], context: str, has_master: bool) -> Access:
    """Merged as kubectl does: of two entries with one name the first counts, and the first current-context."""
    files = [_Loaded(path, _parse(path)) for path in paths]
    origin = f"kubeconfig {', '.join(printable(path) for path in paths)}"
    chosen = context or next((f.content.current_context for f in files if f.content.current_context), "")
    contexts = _merged([(f.path, f.content.contexts) for f in files])
    if not chosen:
        there = f"; it has {', '.join(sorted(contexts))}" if contexts else ""
        raise SourceError(f"{origin}: has no current-context{there}")
    _, entry = _pick(contexts, "context", chosen, origin)
    clusters = _merged([(f.path, f.content.clusters) for f in files])
    cluster_path, named = _pick(clusters, "cluster", entry.context.cluster, origin)
    cluster = named.cluster
    user, user_path = User(), paths[0]
    if entry.context.user:
        users = _merged([(f.path, f.content.users) for f in files])
        user_path, person = _pick(users, "user", entry.context.user, origin)
        user = person.user or User()
    server = (
        ""
        if has_master and not cluster.server
        else _url(cluster.server or "", f"{origin}: cluster {named.name}")
    )
    beside = _Beside(origin, os.path.dirname(os.path.abspath(cluster_path)))
    own = _Beside(origin, os.path.dirname(os.path.abspath(user_path)))
    token_file = own.path(user.token_file)
    token = _token(token_file, user.token) if token_file else (user.token or "").strip()
    if not token.isascii() or (token and not token.isprintable()) or " " in token:
        # Further on it would be quoted by whoever cannot send it.
        raise SourceError(
            f"{origin}: token of the user {entry.context.user}: holds no token but something else"
        )
    named_files = (
        beside.path(cluster.certificate_authority),
        token_file,
        own.path(user.client_certificate),
        own.path(user.client_key),
    )
    return Access(
        origin=origin,
        server=server,
        ca=beside.file_or_data(
            "certificate-authority", cluster.certificate_authority, cluster.certificate_authority_data
        ),
        certificate=own.file_or_data(
            "client-certificate", user.client_certificate, user.client_certificate_data
        ),
        key=own.file_or_data("client-key", user.client_key, user.client_key_data),
        token=token,
        username=user.username or "",
        password=user.password or "",
        exec=user.exec,
        cluster=cluster,
        auth_provider=user.auth_provider,
        base=own.directory,
        insecure=bool(cluster.insecure_skip_tls_verify),
        tls_server_name=cluster.tls_server_name or "",
        proxy_url=cluster.proxy_url or "",
        files=(*paths, *filter(None, named_files)),
    )


class _Beside(NamedTuple):
    """Paths of a kubeconfig are relative to the file that they stand in."""

    origin: str
    directory: str

    def path(self, value: str | None) -> str:
        return os.path.normpath(os.path.join(self.directory, value)) if value else ""

    def file_or_data(self, field: str, file: str | None, data: str | None) -> str | bytes:
        """The data wins, as in client-go; a file must be there."""
        if data:
            try:
                return base64.b64decode(data)
            except (binascii.Error, ValueError):
                raise SourceError(f"{self.origin}: {field}-data is not base64") from None
        path = self.path(file)
        if path and not os.path.isfile(path):
            raise SourceError(f"{self.origin}: {field}: there is no file {printable(path)}")
        return path


def _parse(path: str) -> _Kubeconfig:
    where = f"kubeconfig {printable(path)}"
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise SourceError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SourceError(f"{where}: is not UTF-8 text") from None
    try:
        documents = load_documents(text, where=where, max_bytes=_MAX_FILE_BYTES, allow_duplicates=True)
    except DecodeError as error:
        raise SourceError(str(error)) from None
    if len(documents) != 1:
        raise SourceError(f"{where}: holds {'no' if not documents else 'more than one'} configuration")
    try:
        return msgspec.convert(documents[0].value, _Kubeconfig)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        field = f"{place.rstrip('`')}: " if place else ""
        raise SourceError(f"{where}: {field}{what[:1].lower()}{what[1:]}") from None


def _merged(parts: list[tuple[str, tuple[_Item, ...] | None]]) -> dict[str, tuple[str, _Item]]:
    merged: dict[str, tuple[str, _Item]] = {}
    for path, items in parts:
        for item in items or ():
            merged.setdefault(item.name, (path, item))
    return merged


def _pick(items: dict[str, tuple[str, _Item]], what: str, name: str, origin: str) -> tuple[str, _Item]:
    found = items.get(name)
    if found is None:
        there = f"it has {', '.join(sorted(items))}" if items else "it has none"
        raise SourceError(f"{origin}: there is no {what} {name!r}; {there}")
    return found


def _url(text: str, where: str) -> str:
    url = text.strip().rstrip("/")
    if url and "://" not in url:
        url = f"http://{url}"  # as client-go has it
    scheme, _, host = url.partition("://")
    if scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise SourceError(f"{where}: server {text!r} is no URL such as https://192.0.2.1:6443")
    if "@" in host.partition("/")[0]:
        # It would be shown wherever the server is named.
        raise SourceError(
            f"{where}: the server's URL must not hold a user or a password; use a user of the kubeconfig"
        )
    return url


def _token(path: str, otherwise: str | None = None) -> str:
    """The token in a file; `otherwise` where there is one and the file cannot be read."""
    try:
        with open(path, "rb") as file:
            token = file.read(_MAX_FILE_BYTES).decode("ascii", "replace").strip()
    except OSError as error:
        if otherwise:
            return otherwise.strip()
        raise SourceError(f"token file {printable(path)}: cannot be read: {error.strerror}") from None
    if not token:
        raise SourceError(f"token file {printable(path)}: is empty")
    if not token.isprintable() or " " in token or "\ufffd" in token:
        raise SourceError(f"token file {printable(path)}: holds no token but something else")
    return token
