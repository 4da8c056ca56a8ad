"""Decoding API objects, from JSON and from plain values."""

from __future__ import annotations

import json

import msgspec
import pytest

from proxycore.decode import (
    FieldError,
    Misfit,
    decode_bytes,
    decode_json,
    decode_value,
    describe,
    encode,
    identify,
    items_of,
    key_of,
    located_items,
)
from proxycore.errors import DecodeError
from proxycore.objects import API_VERSIONS, EndpointSlice, Node, Service
from proxycore.yamlio import load_documents


def service(**changes):
    value = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}, {"port": 443, "name": "tls"}]},
    }
    return value | changes


def from_yaml(text):
    (document,) = load_documents(text, where="m.yaml")
    return decode_value(document.value, "m.yaml:1")


def both_ways(value):
    """The same object by the watch path and by the YAML path; they must agree, on the error too."""
    results = []
    for decode in (
        lambda: decode_bytes(value["kind"], json.dumps(value).encode()),
        lambda: decode_value(value, value["kind"]),
    ):
        try:
            results.append(decode())
        except FieldError as error:
            results.append((str(error), error.path))
    assert results[0] == results[1]
    return results[0]


def test_only_the_fields_we_read():
    item = both_ways(
        service(status={"loadBalancer": {"ingress": [{"ip": "1.2.3.4", "ports": []}]}}, secret={"a": [1]})
    )
    assert isinstance(item, Service)
    assert item.spec.ports[1].name == "tls"
    assert item.status.load_balancer.ingress[0].ip == "1.2.3.4"


def test_watch_bookmark_has_null_lists():
    data = b'{"metadata":{"name":"x","namespace":"y","resourceVersion":"12"},"addressType":"","endpoints":null,"ports":null}'
    item = decode_bytes("EndpointSlice", data)
    assert isinstance(item, EndpointSlice)
    assert item.endpoints is None


@pytest.mark.parametrize(
    "metadata", [{"name": "a"}, {"name": "a", "namespace": ""}, {"name": "a", "namespace": None}]
)
def test_namespaced_object_without_namespace_is_in_default(metadata):
    assert key_of(both_ways(service(metadata=metadata))) == ("Service", "default", "a")


def test_cluster_scoped_object_has_no_namespace():
    value = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "namespace": "x"}}
    item = both_ways(value)
    assert isinstance(item, Node)
    assert key_of(item) == ("Node", "", "n1")


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("Deployment", "apps/v1"),
        ("Endpoints", "v1"),
        ("Service", "serving.knative.dev/v1"),
        ("EndpointSlice", "discovery.k8s.io/v1beta1"),
        ("EndpointSlice", "v1"),
        ("ServiceCIDR", "networking.k8s.io/v1beta1"),
    ],
)
def test_other_kinds_and_versions_are_not_ours(kind, version):
    value = {"apiVersion": version, "kind": kind, "metadata": 3}
    assert decode_value(value, "m.yaml:1") is None
    assert list(decode_json(json.dumps(value).encode())) == []
    assert list(decode_json(json.dumps({"kind": "List", "items": [value]}).encode())) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"spec": {"ports": [{"port": "80"}]}},
            "Service shop/web: spec.ports[0].port: expected `int`, got `str`",
        ),
        (
            {"spec": {"ports": [{"port": 80.5}]}},
            "Service shop/web: spec.ports[0].port: expected `int`, got `float`",
        ),
        (
            {"spec": {"ports": [{"port": True}]}},
            "Service shop/web: spec.ports[0].port: expected `int`, got `bool`",
        ),
        ({"spec": {"ports": [{"port": 0}]}}, "Service shop/web: spec.ports[0].port: expected `int` >= 1"),
        (
            {"spec": {"ports": [{"port": 65536}]}},
            "Service shop/web: spec.ports[0].port: expected `int` <= 65535",
        ),
        (
            {"spec": {"ports": [{"port": 10**30}]}},
            "Service shop/web: spec.ports[0].port: expected `int` <= 65535",
        ),
        (
            {"spec": {"ports": [{"port": 1, "nodePort": -1}]}},
            "Service shop/web: spec.ports[0].nodePort: expected `int` >= 0",
        ),
        ({"spec": {"ports": [{}]}}, "Service shop/web: spec.ports[0]: object missing required field `port`"),
        (
            {"spec": {"ports": {"port": 1}}},
            "Service shop/web: spec.ports: expected `array | null`, got `object`",
        ),
        (
            {"spec": {"ports": [{"port": 1, "protocol": "tcp"}]}},
            "Service shop/web: spec.ports[0].protocol: invalid enum value 'tcp'",
        ),
        (
            {"spec": {"ports": [{"port": 1}, None]}},
            "Service shop/web: spec.ports[1]: expected `object`, got `null`",
        ),
        (
            {"spec": {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}}},
            "Service shop/web: spec.sessionAffinityConfig.clientIP.timeoutSeconds: expected `int` >= 1",
        ),
        ({"spec": []}, "Service shop/web: spec: expected `object | null`, got `array`"),
        (
            {"metadata": {"name": True}},
            "Service: metadata.name: expected `str`, got `bool`; put it in quotes",
        ),
        ({"metadata": {"name": 12}}, "Service: metadata.name: expected `str`, got `int`; put it in quotes"),
        ({"metadata": {"name": ""}}, "Service: metadata.name: expected `str` of length >= 1"),
        ({"metadata": {"name": None}}, "Service: metadata.name: expected `str`, got `null`"),
        (
            {"metadata": {"name": "a", "namespace": 5}},
            "Service: metadata.namespace: expected `str`, got `int`; put it in quotes",
        ),
        ({"metadata": {}}, "Service: metadata: object missing required field `name`"),
        ({"metadata": None}, "Service: metadata: expected `object`, got `null`"),
        (
            {"metadata": {"name": "a", "labels": {"on": True}}},
            "Service default/a: metadata.labels[...]: expected `str`, got `bool`; put it in quotes",
        ),
    ],
)
def test_what_the_api_would_refuse_names_object_and_field(changes, message):
    text, path = both_ways(service(**changes))
    assert text == message
    value = service(**changes)
    for step in path:
        value = value[step]


def test_name_of_sane_length_only():
    name = "n" * 1025
    with pytest.raises(DecodeError, match=r"metadata\.name: expected `str` of length <= 1024") as caught:
        decode_value(service(metadata={"name": name}), "m.yaml:1")
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    "name", ["a\nb", "q\"uo'te", "x" * 253, "ünï-код-名前", "a b;$(c)", "\u202e", "\x00", "-f"]
)
def test_odd_names_pass_through_and_are_printed_on_one_line(name):
    item = both_ways(service(metadata={"name": name, "namespace": name}))
    assert key_of(item) == ("Service", name, name)
    assert decode_bytes("Service", encode(item)) == item
    assert describe(key_of(item)).isprintable()


def test_half_a_surrogate_pair_is_not_text():
    with pytest.raises(DecodeError, match=r"Service default/a\\ud800: .*surrogate"):
        decode_value(service(metadata={"name": "a\ud800"}), "m.yaml:1")
    with pytest.raises(DecodeError, match="surrogate"):
        decode_value(service(spec={"ports": [{"port": 1, "name": "\udfff"}]}), "m.yaml:1")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "m.yaml:3: kind is missing"),
        ({"kind": "Service"}, "m.yaml:3: apiVersion is missing"),
        ({"kind": 1, "apiVersion": "v1"}, "m.yaml:3: kind: expected `str`, got a number"),
        ({"kind": "Service", "apiVersion": 1}, "m.yaml:3: apiVersion: expected `str`, got a number"),
        ([], "m.yaml:3: expected an object with apiVersion and kind, got a list"),
        ("text", "m.yaml:3: expected an object with apiVersion and kind, got text"),
        (True, "m.yaml:3: expected an object with apiVersion and kind, got true or false"),
    ],
)
def test_documents_that_are_no_objects_are_named_by_place(value, message):
    with pytest.raises(DecodeError) as caught:
        decode_value(value, "m.yaml:3")
    assert str(caught.value) == message


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "true", "~", "12", "1e3", "0x1F"])
def test_yaml_words_that_are_not_text_need_quotes(word):
    with pytest.raises(DecodeError, match=r"metadata\.name"):
        from_yaml(f"apiVersion: v1\nkind: Service\nmetadata: {{name: {word}}}")
    item = from_yaml(f"apiVersion: v1\nkind: Service\nmetadata: {{name: '{word}'}}")
    assert item.metadata.name == word


def test_unquoted_yaml_dates_are_what_they_look_like():
    item = from_yaml(
        "apiVersion: v1\nkind: Service\nmetadata: {name: a, creationTimestamp: 2024-01-02T03:04:05Z}"
    )
    assert item.metadata.creation_timestamp == "2024-01-02T03:04:05Z"


@pytest.mark.parametrize(
    "data", [b"", b"{", b'{"metadata":{"name":"a\xff"}}', b"[" * 100_000, b'{"metadata":{"name":"a"}} x']
)
def test_bytes_that_are_not_json(data):
    with pytest.raises(DecodeError, match=r"^Service: is not JSON"):
        decode_bytes("Service", data)


@pytest.mark.parametrize("data", [b"[]", b"3", b"null"])
def test_json_that_is_no_object(data):
    with pytest.raises(DecodeError, match=r"^Service: expected an object"):
        decode_bytes("Service", data)


def test_items_of_lists():
    one, two = service(), service(metadata={"name": "b"})
    assert list(items_of(one)) == [one]
    assert list(items_of({"kind": "List", "items": [one, two]})) == [one, two]
    assert list(items_of({"kind": "List", "items": None})) == []
    assert list(items_of({"kind": "List", "items": [{"kind": "List", "items": [one]}, two]})) == [one, two]
    bare = {"metadata": {"name": "b"}}
    (item,) = items_of({"apiVersion": "v1", "kind": "ServiceList", "items": [bare]})
    assert key_of(decode_value(item, "x")) == ("Service", "default", "b")
    assert bare == {"metadata": {"name": "b"}}
    assert [path for path, _ in located_items({"kind": "List", "items": [one, two]})] == [
        ("items", 0),
        ("items", 1),
    ]
    with pytest.raises(DecodeError, match="items: expected a list"):
        list(items_of({"kind": "List", "items": {}}))


def test_lists_of_lists_end_somewhere():
    value = service()
    for _ in range(30):
        value = {"apiVersion": "v1", "kind": "List", "items": [value]}
    with pytest.raises(DecodeError, match="nested deeper"):
        list(items_of(value))
    (misfit,) = decode_json(json.dumps(value).encode())
    assert "nested deeper" in misfit.error.reason


DOCUMENTS = [
    service(),
    {"apiVersion": "v1", "kind": "List", "items": [service(), service(metadata={"name": "b"})]},
    {"apiVersion": "v1", "kind": "ServiceList", "items": [{"metadata": {"name": "b"}}]},
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSliceList",
        "items": [{"metadata": {"name": "b"}, "endpoints": None}],
    },
    {"apiVersion": "v1", "kind": "List", "items": None},
    {"kind": "List", "items": [{"kind": "List", "items": [service()]}, {"kind": "Pod", "apiVersion": "v1"}]},
    {
        "apiVersion": "v1",
        "kind": "List",
        "items": [service(), service(spec={"ports": [{"port": "x"}]}), service(metadata={"name": "c"})],
    },
    {
        "apiVersion": "v1",
        "kind": "List",
        "items": [service(), None, 3, [], {}, {"kind": 3}, {"kind": "Service"}],
    },
    {"apiVersion": "v1", "kind": "List", "items": 3},
    {"apiVersion": "x/v1", "kind": "Menu", "items": {"a": 1}},
    {"apiVersion": "v1", "kind": "Service", "items": [], "metadata": {"name": "a"}},
    {"items": []},
    [],
]


@pytest.mark.parametrize("value", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_the_fast_way_through_json_finds_what_the_slow_way_finds(value):
    good, bad = [], 0
    try:
        for item in items_of(value):
            try:
                found = decode_value(item, "")
            except DecodeError:
                bad += 1
            else:
                good += [found] if found is not None else []
    except DecodeError:
        bad += 1
    fast = list(decode_json(json.dumps(value).encode()))
    assert [item for item in fast if not isinstance(item, Misfit)] == good
    assert sum(isinstance(item, Misfit) for item in fast) == bad


def test_a_misfit_comes_with_its_bytes():
    data = json.dumps(
        {"kind": "List", "items": [service(), service(spec=3), service(metadata={"name": "z"})]}
    ).encode()
    first, (raw, error), last = decode_json(data)
    assert first.metadata.name == "web"
    assert last.metadata.name == "z"
    assert msgspec.json.decode(raw) == service(spec=3)
    assert str(error) == "Service shop/web: spec: expected `object | null`, got `int`"


@pytest.mark.parametrize("data", [b"", b"   ", b"{", b'{"kind": "List", "items": [{]}', b"{} {}"])
def test_a_document_that_is_not_json_is_an_error_as_a_whole(data):
    with pytest.raises(DecodeError, match="is not JSON"):
        list(decode_json(data))


def test_identify():
    assert identify(service()) == ("Service", "shop", "web")
    assert identify({"kind": "Node", "metadata": {"name": "n", "namespace": "x"}}) == ("Node", "", "n")
    for value in (
        None,
        [],
        {},
        {"kind": "Pod", "metadata": {"name": "a"}},
        {"kind": [], "metadata": {"name": "a"}},
    ):
        assert identify(value) is None
    for metadata in (None, {}, {"name": 3}, {"name": ""}, {"name": "a", "namespace": 3}):
        assert identify(service(metadata=metadata)) is None


def test_encode_is_api_json():
    item = decode_value(service(), "x")
    value = json.loads(encode(item))
    assert value == service()
    assert (value["apiVersion"], value["kind"]) == (API_VERSIONS["Service"], "Service")
