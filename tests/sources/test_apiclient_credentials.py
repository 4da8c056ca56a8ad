"""Which API server, and who we are: kubeconfig files, service accounts, tokens that change, exec plugins."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from proxycore.apiclient import Unreachable, connect, execplugin, kubeconfig, read
from proxycore.apiclient import client as apiclient
from proxycore.errors import SourceError
from proxycore.source import APIServer
from proxycore.testing.apiserver import FakeAPIServer
from proxycore.testing.apitls import Authority

from .kubernetes_run import live, node, running


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No configuration of the machine's is found."""
    place = tmp_path / "home"
    place.mkdir()
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(kubeconfig, "SERVICE_ACCOUNT", str(tmp_path / "serviceaccount"))
    return place


@pytest.fixture
def server():
    with FakeAPIServer(tokens={"good"}) as fake:
        fake.apply(node())
        yield fake


def client_of(path="", environment=None, **settings):
    settings = APIServer(kubeconfig=str(path), qps=0.0, **settings)
    return connect(settings, user_agent="x", environment=environment or {})


def status_of(client):
    response = client.get("/api/v1/nodes")
    read(response)
    return response.status


def config(path, text):
    path.write_text(textwrap.dedent(text))
    return path


SIMPLE = """
    apiVersion: v1
    kind: Config
    current-context: one
    contexts:
    - {name: one, context: {cluster: one, user: me}}
    - {name: two, context: {cluster: two, user: me}}
    clusters:
    - {name: one, cluster: {server: 'https://one:6443/'}}
    - {name: two, cluster: {server: 'https://two'}}
    users:
    - {name: me, user: {token: secret}}
"""

# -- where it stands --


def test_the_order_in_which_is_looked(tmp_path, home):
    named = config(tmp_path / "named", SIMPLE)
    other = config(tmp_path / "other", SIMPLE.replace("one:6443", "other"))
    environment = {}
    with pytest.raises(SourceError) as caught:
        client_of(environment=environment)
    for word in (
        "KUBECONFIG (not set)",
        "KUBERNETES_SERVICE_HOST is not set",
        "~/.kube/config (not there)",
        "--master",
    ):
        assert word in str(caught.value)
    (home / ".kube").mkdir()
    config(home / ".kube" / "config", SIMPLE.replace("one:6443", "home"))
    assert client_of(environment=environment).server == "https://home"
    environment |= {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "444"}
    assert client_of(environment=environment).server == "https://home"
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text("from-the-pod\n")
    assert client_of(environment=environment).server == "https://10.96.0.1:444"
    environment["KUBERNETES_SERVICE_HOST"] = "fd00::1"
    assert client_of(environment=environment).server == "https://[fd00::1]:444"
    environment["KUBECONFIG"] = f"{tmp_path / 'missing'}:{other}"
    assert client_of(environment=environment).server == "https://other"
    assert client_of(named, environment).server == "https://one:6443"
    assert client_of(named, environment, context="two").server == "https://two"
    assert client_of(named, environment, master="http://boss:8080/").server == "http://boss:8080"


def test_a_master_alone_is_enough():
    assert client_of(master="boss:8080").server == "http://boss:8080"
    with pytest.raises(SourceError, match="the master: server 'ftp://x' is no URL"):
        client_of(master="ftp://x")


def test_a_master_with_a_pods_account(tmp_path, server):
    """The address of the Service `kubernetes` is not there before the first proxy is."""
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text("good\n")
    client = client_of(environment={"KUBERNETES_SERVICE_HOST": "192.0.2.1"}, master=server.url)
    assert status_of(client) == 200
    assert server.requests[0].authorization == "Bearer good"


def test_files_are_merged_and_the_first_counts(tmp_path):
    first = config(
        tmp_path / "a",
        """
        contexts: [{name: mine, context: {cluster: one}}]
        current-context: mine
        """,
    )
    second = config(tmp_path / "b", SIMPLE)
    third = config(tmp_path / "c", SIMPLE.replace("one:6443", "wrong"))
    client = client_of(environment={"KUBECONFIG": f"{first}:{second}:{third}"})
    assert client.server == "https://one:6443"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "holds no configuration"),
        ("a: 1\n---\nb: 2\n", "holds more than one configuration"),
        ("a: [\n", "kubeconfig"),
        ("- 1\n", "expected `object`, got `array`"),
        ("contexts: 7\n", "contexts: expected `array | null`, got `int`"),
        ("users: [{name: x, user: {token: 7}}]\n", "users[0].user.token: expected `str | null`, got `int`"),
        ("contexts: []\n", "has no current-context"),
        ("current-context: x\n", "there is no context 'x'; it has none"),
        (SIMPLE.replace("current-context: one", "current-context: tow"), "no context 'tow'; it has one, two"),
        (SIMPLE.replace("{cluster: one", "{cluster: three"), "there is no cluster 'three'; it has one, two"),
        (SIMPLE.replace("user: me}", "user: you}"), "there is no user 'you'; it has me"),
        (SIMPLE.replace("https://one:6443/", ""), "cluster one: server '' is no URL"),
        (
            SIMPLE.replace("{token: secret}", "{client-certificate-data: '%', client-key-data: x}"),
            "is not base64",
        ),
        (
            SIMPLE.replace("{token: secret}", "{client-certificate: no.crt}"),
            "client-certificate: there is no file",
        ),
        (SIMPLE.replace("{token: secret}", "{tokenFile: none}"), "none: cannot be read: No such file"),
        (
            SIMPLE.replace("server: 'https://one:6443/'", "server: https://x, certificate-authority: ca"),
            "no file",
        ),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, text, said):
    path = tmp_path / "kubeconfig"
    if text is not None:
        config(path, text)
    with pytest.raises(SourceError) as caught:
        client_of(path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- credentials --


@pytest.mark.parametrize("data", [False, True])
def test_client_certificates(tmp_path, authority, data):
    with FakeAPIServer(authority=authority, users={"node-1"}) as secure:
        path = secure.kubeconfig(tmp_path / "kc", client=authority.client("node-1"), data=data)
        assert status_of(client_of(path)) == 200
        path = secure.kubeconfig(tmp_path / "kc", client=authority.client("somebody"), data=data)
        assert status_of(client_of(path)) == 401


def test_paths_are_relative_to_the_file(tmp_path, authority, monkeypatch):
    with FakeAPIServer(authority=authority, tokens={"good"}) as secure:
        place = tmp_path / "conf"
        place.mkdir()
        (place / "ca.crt").write_bytes(authority.ca.read_bytes())
        (place / "token").write_text("  good\n\n")
        config(
            place / "kubeconfig",
            SIMPLE.replace(
                "server: 'https://one:6443/'", f"server: {secure.url}, certificate-authority: ca.crt"
            ).replace("token: secret", "tokenFile: token"),
        )
        monkeypatch.chdir(tmp_path)
        assert status_of(client_of("conf/kubeconfig")) == 200


def test_insecure_is_for_those_who_ask_for_it(tmp_path, authority):
    with FakeAPIServer(authority=authority) as secure:
        text = SIMPLE.replace(
            "server: 'https://one:6443/'", f"server: {secure.url}, insecure-skip-tls-verify: true"
        )
        with pytest.warns(Warning, match="Unverified HTTPS request"):
            assert status_of(client_of(config(tmp_path / "kc", text))) == 200


def test_a_password(tmp_path, server):
    path = server.kubeconfig(tmp_path / "kc", user={"username": "me", "password": "pass word"})
    status_of(client_of(path))
    scheme, _, value = server.requests[0].authorization.partition(" ")
    assert (scheme, base64.b64decode(value)) == ("Basic", b"me:pass word")


@pytest.mark.parametrize("content", ["", " \n", "two words", "b\x00d", "\xff\xfe"])
def test_a_token_file_with_something_else(tmp_path, server, content):
    (tmp_path / "token").write_text(content, encoding="latin-1")
    with pytest.raises(SourceError, match=r"token: (is empty|holds no token)"):
        client_of(server.kubeconfig(tmp_path / "kc", user={"tokenFile": str(tmp_path / "token")}))


def replace(path, text):
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


def test_a_token_that_rotates_is_read_anew(tmp_path, server, monkeypatch):
    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    token = tmp_path / "token"
    token.write_text("good\n")
    client = client_of(server.kubeconfig(tmp_path / "kc", user={"tokenFile": "token"}))
    assert status_of(client) == 200
    server.tokens = {"good", "better"}
    replace(token, "better\n")
    assert status_of(client) == 200
    assert server.requests[-1].authorization == "Bearer better"
    # Half a rotation: what there was goes on being used.
    replace(token, "")
    assert status_of(client) == 200
    assert server.requests[-1].authorization == "Bearer better"


def test_a_refused_token_is_looked_for_anew_and_the_request_repeated(tmp_path, server, monkeypatch):
    token = tmp_path / "token"
    token.write_text("good\n")
    client = client_of(server.kubeconfig(tmp_path / "kc", user={"tokenFile": "token"}))
    assert status_of(client) == 200
    server.tokens = {"better"}
    replace(token, "better\n")
    # Not within the shortest time between two looks.
    assert status_of(client) == 401
    assert len(server.requests) == 2
    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    server.tokens = {"best"}
    client._session = client._session._replace(stamps=apiclient._stamps(client._access))
    replace(token, "best\n")
    assert status_of(client) == 200


def test_a_source_survives_a_rotation(tmp_path, server, monkeypatch):
    from proxycore.sources import reflector
    from proxycore.sources.kubernetes import KubernetesSource

    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(reflector, "BACK_OFF_SECONDS", (0.02, 0.1))
    token = tmp_path / "token"
    token.write_text("good\n")
    source = KubernetesSource(
        client_of(server.kubeconfig(tmp_path / "kc", user={"tokenFile": "token"})), "n1"
    )
    with running(source) as sink:
        sink.until(live)
        server.tokens = {"better"}
        server.cut_watches()
        sink.until(lambda s: not live(s))
        assert "answers 401" in sink.health.reason
        replace(token, "better")
        sink.until(live)


def test_a_new_kubeconfig_is_followed(tmp_path, server, monkeypatch):
    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    path = server.kubeconfig(tmp_path / "kc", user={"token": "bad"})
    client = client_of(path)
    assert status_of(client) == 401
    server.kubeconfig(path, user={"token": "good"})
    assert status_of(client) == 200
    (tmp_path / "kc").write_text("broken: [")
    assert status_of(client) == 200


# -- exec plugins --

VERSION = "client.authentication.k8s.io/v1"


@pytest.fixture
def plugin(tmp_path):
    """Make a kubeconfig whose plugin is this shell script."""

    def make(server, script, **fields):
        program = tmp_path / "plugin"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        user = {"exec": {"command": "./plugin", "apiVersion": VERSION, **fields}}
        return server.kubeconfig(tmp_path / "kc", user=user)

    return make


def credential(token="good", expires=None, **status):
    if expires is not None:
        when = datetime.now(UTC) + timedelta(seconds=expires)
        status["expirationTimestamp"] = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    return json.dumps({"kind": "ExecCredential", "apiVersion": VERSION, "status": {"token": token, **status}})


def counted(tmp_path, text):
    return f"echo run >> {tmp_path}/runs\ncat <<'E'\n{text}\nE"


def runs(tmp_path):
    return (tmp_path / "runs").read_text().count("run")


def test_a_plugins_token(tmp_path, server, plugin):
    script = (
        f'test "$A" = b && test "$1" = c || exit 9\nprintf %s "$KUBERNETES_EXEC_INFO" > {tmp_path}/info\n'
    )
    path = plugin(
        server,
        script + counted(tmp_path, credential()),
        args=["c"],
        env=[{"name": "A", "value": "b"}],
        provideClusterInfo=True,
    )
    client = client_of(path)
    assert not (tmp_path / "runs").exists()
    assert [status_of(client) for _ in range(3)] == [200] * 3
    assert runs(tmp_path) == 1
    info = json.loads((tmp_path / "info").read_text())
    assert (info["kind"], info["apiVersion"]) == ("ExecCredential", VERSION)
    assert info["spec"] == {"interactive": False, "cluster": {"server": server.url}}


def test_it_runs_again_before_its_token_expires(tmp_path, server, plugin, monkeypatch):
    client = client_of(plugin(server, counted(tmp_path, credential(expires=3600))))
    assert [status_of(client), status_of(client), runs(tmp_path)] == [200, 200, 1]
    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    assert [status_of(client), runs(tmp_path)] == [200, 1]
    monkeypatch.setattr(apiclient, "EXPIRY_MARGIN_SECONDS", 3700.0)
    assert [status_of(client), runs(tmp_path)] == [200, 2]


def test_it_runs_again_when_its_token_is_refused(tmp_path, server, plugin, monkeypatch):
    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    client = client_of(plugin(server, counted(tmp_path, credential())))
    assert status_of(client) == 200
    server.tokens = {"better"}
    plugin(server, counted(tmp_path, credential("better")))
    assert status_of(client) == 200


def test_a_plugins_certificate(tmp_path, authority, plugin):
    with FakeAPIServer(authority=authority, users={"by-plugin"}) as secure:
        made = authority.client("by-plugin")
        text = credential(
            None, clientCertificateData=made.certificate.read_text(), clientKeyData=made.key.read_text()
        )
        assert status_of(client_of(plugin(secure, f"cat <<'E'\n{text}\nE"))) == 200


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no such profile >&2; exit 3", "exec plugin ./plugin: ended with status 3: no such profile"),
        ("exit 1", "ended with status 1: it said nothing"),
        ("echo hello", "what it printed is no ExecCredential"),
        ("echo '{}'", "what it printed is no ExecCredential"),
        (
            f"echo '{credential()}' | sed s,/v1,/v1beta1,",
            "printed ExecCredential of client.authentication.k8s.io/v1beta1",
        ),
        (f"echo '{credential('')}'", "gave neither a token nor a certificate"),
        (f"echo '{credential('two words')}'", "gave a token that no header can carry"),
        (f"echo '{credential('x', clientKeyData='k')}'", "a key without its certificate"),
        (f"echo '{credential('x', expires=-60)}'", "gave credentials that have expired"),
        ("sleep 60 & wait", "did not end within 0.3 s and was killed"),
    ],
)
def test_a_plugin_that_fails_is_told_and_nothing_is_sent_without_it(
    server, plugin, script, said, monkeypatch
):
    monkeypatch.setattr(execplugin, "TIME_LIMIT_SECONDS", 0.3)
    with pytest.raises(SourceError) as caught:
        status_of(client_of(plugin(server, script)))
    assert said in str(caught.value)
    assert not isinstance(caught.value, Unreachable)
    assert server.requests == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"command": "/no/such/program", "installHint": "get it"},
            "cannot be run: No such file or directory (get it)",
        ),
        ({"apiVersion": "client.authentication.k8s.io/v1alpha1"}, "v1alpha1' is none of"),
        ({"interactiveMode": "Always"}, "wants to ask a person"),
    ],
)
def test_a_plugin_that_cannot_be_run(server, plugin, fields, said):
    with pytest.raises(SourceError) as caught:
        status_of(client_of(plugin(server, "true", **fields)))
    assert said in str(caught.value)


def test_a_plugin_that_recovers(server, plugin, monkeypatch):
    monkeypatch.setattr(apiclient, "RETRY_SECONDS", 0.0)
    client = client_of(plugin(server, "exit 1"))
    with pytest.raises(SourceError):
        status_of(client)
    plugin(server, f"echo '{credential()}'")
    assert status_of(client) == 200


def test_a_failing_plugin_is_not_run_by_every_request(tmp_path, server, plugin, monkeypatch):
    monkeypatch.setattr(apiclient, "RETRY_SECONDS", 1000.0)
    client = client_of(plugin(server, f"echo run >> {tmp_path}/runs; exit 1"))
    for _ in range(3):
        with pytest.raises(SourceError, match="ended with status 1"):
            status_of(client)
    assert runs(tmp_path) == 1


def test_old_credentials_go_on_while_new_ones_cannot_be_had(tmp_path, server, plugin, monkeypatch):
    monkeypatch.setattr(apiclient, "REFRESH_SECONDS", 0.0)
    client = client_of(plugin(server, f"echo '{credential(expires=3600)}'"))
    assert status_of(client) == 200
    monkeypatch.setattr(apiclient, "EXPIRY_MARGIN_SECONDS", 3700.0)
    plugin(server, "exit 1")
    assert status_of(client) == 200


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_end_kills_a_plugin_that_hangs_with_all_that_it_started(tmp_path, server, plugin):
    client = client_of(
        plugin(
            server,
            f"sleep 300 &\necho $! > {tmp_path}/child.new\nmv {tmp_path}/child.new {tmp_path}/child\nwait",
        )
    )
    failed = []

    def ask():
        try:
            status_of(client)
        except SourceError as error:
            failed.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "child").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert "was ended, as the proxy ends" in failed[0]
    child = int((tmp_path / "child").read_text())
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- what is left behind --


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGKILL])
def test_no_key_is_left_on_disk_however_the_process_ends(tmp_path, authority, number):
    with FakeAPIServer(authority=authority, users={"me"}) as secure:
        path = secure.kubeconfig(tmp_path / "kc", client=authority.client("me"), data=True)
        place = tmp_path / "tmp"
        place.mkdir()
        script = (
            "import sys\nfrom proxycore.apiclient import *\nfrom proxycore.source import APIServer\n"
            f"client = connect(APIServer(kubeconfig={path!r}), user_agent='x')\n"
            "print(client.get('/api/v1/nodes').status, flush=True)\nsys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(place)},
        )
        assert process.stdout.readline() == b"200\n"
        if number is not None:
            process.send_signal(number)
        process.communicate(timeout=20)
        assert list(place.iterdir()) == []


@pytest.mark.parametrize("token", ["SECRET\nTOKEN", "SECR\u00c9T", "two words"])
def test_an_inline_token_that_no_header_can_carry_is_refused_and_not_repeated(tmp_path, token):
    with FakeAPIServer() as server:
        path = server.kubeconfig(tmp_path / "config", user={"token": token})
    with pytest.raises(SourceError, match="holds no token but something else") as caught:
        connect(APIServer(kubeconfig=path), user_agent="test")
    assert "SECR" not in str(caught.value)
