"""What files say, alone and together."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxycore.decode import describe, key_of
from proxycore.objects import Metadata, Service, ServiceSpec
from proxycore.source import Applied, Deleted, Trouble
from proxycore.sources.manifests import Found, Manifest, ManifestSet, Problem, broken, parse, printable

NO_PORT = "spec: {ports: [{port: '80'}]}"


def named(manifest):
    return {name: found.line for (_, _, name), found in manifest.objects.items()}


def problems(manifest):
    return [(problem.line, problem.reason) for problem in manifest.problems]


def test_documents_and_lists_with_their_lines():
    manifest = parse(b"""\
# a comment
apiVersion: v1
kind: Service
metadata: {name: a}
---
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata:
    name: b
- apiVersion: apps/v1
  kind: Deployment
- {apiVersion: v1, kind: Node, metadata: {name: c}}
...
""")
    assert named(manifest) == {"a": 2, "b": 10, "c": 16}
    assert manifest.problems == ()


def test_mistakes_name_the_line_of_the_field():
    manifest = parse(b"""\
apiVersion: v1
kind: Service
metadata:
  name: a
spec:
  ports:
  - port: 80
  - name: tls
    port: "443"
---
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Service
  metadata: {name: good}
- apiVersion: v1
  kind: Service
  metadata:
    labels: {}
    name: yes
- just text
---
a: b
""")
    assert named(manifest) == {"good": 14}
    assert problems(manifest) == [
        (9, "Service default/a: spec.ports[1].port: expected `int`, got `str`"),
        (21, "metadata.name: expected `str`, got `bool`; put it in quotes"),
        (22, "expected an object with apiVersion and kind, got text"),
        (24, "kind is missing"),
    ]
    assert [problem.key for problem in manifest.problems] == [("Service", "default", "a"), None, None, None]


def test_json_mistakes_name_object_and_line():
    items = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"ports": [{"port": port}]},
        }
        for name, port in (("a", 80), ("b", "x"), ("c", 80), ("d", None))
    ]
    text = json.dumps({"apiVersion": "v1", "items": items, "kind": "List"}, indent=1)
    manifest = parse(text.encode())
    assert set(named(manifest)) == {"a", "c"}
    lines = text.splitlines()
    for problem, name in zip(manifest.problems, "bd", strict=True):
        assert problem.reason.startswith(f"Service default/{name}: spec.ports[0].port: expected `int`")
        assert lines[problem.line - 1 :][4].strip() == f'"name": "{name}"'


@pytest.mark.parametrize(
    ("data", "line", "reason"),
    [
        (b"a: b: c\n", 1, "is not YAML"),
        (b"a: 1\nb: [\nc: }\n", 3, "is not YAML"),
        (b"a: 1\n\xff\n", 2, "is not text"),
        (b"a: 1\na: 2\n", 2, "stands twice"),
        (b"a: !!python/object:os.system x\n", 1, "tag"),
        (b'{"a": 1,\n "b": ]\n', 2, "is not JSON: expecting value (column 7)"),
        (b"a: 1\n--- b\x00\n", 2, "is not YAML"),
        (b"[" * 5000, 1, "is nested deeper"),
    ],
)
def test_broken_text_is_broken_as_a_whole(data, line, reason):
    manifest = parse(data)
    assert manifest.broken
    assert manifest.objects == {}
    (problem,) = manifest.problems
    assert problem.line == line
    assert problem.reason.startswith(reason) or reason in problem.reason


@pytest.mark.parametrize("data", [b"", b"\n", b"# nothing\n", b"---\n---\n", b"null\n", b"\xef\xbb\xbf"])
def test_files_without_objects(data):
    assert parse(data) == Manifest()


def test_encodings_that_yaml_allows():
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: ü}\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert set(named(parse(text.encode(encoding)))) == {"ü"}


def test_several_json_texts_in_one_file():
    one = '{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "%s"}}\n'
    assert named(parse((one % "a" + one % "b").encode())) == {"a": 1, "b": 2}


def test_large_damaged_json_is_named_with_its_line_and_not_taken_for_yaml():
    item = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a", "annotations": {"x": "y" * 100_000}},
    }
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [item] * 20}, indent=1)
    (cut,) = parse(text[:-30].encode()).problems
    assert cut.reason == "is not JSON: input data was truncated"
    assert cut.line == text[:-30].count("\n") + 1
    place = text.rindex('"kind"')
    (damaged,) = parse((text[:place] + "?" + text[place:]).encode()).problems
    assert damaged.reason.startswith("is not JSON: ")
    assert damaged.line == text[:place].count("\n") + 1


def test_flow_style_yaml_that_begins_like_json():
    assert named(parse(b"{apiVersion: v1, kind: Service, metadata: {name: a}}")) == {"a": 1}


def test_an_object_twice_in_one_file_counts_as_the_last():
    text = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: %s}\n---\n"
    manifest = parse((text % "10.0.0.1" + text % "10.0.0.2").encode())
    (found,) = manifest.objects.values()
    assert found.object.spec.cluster_ip == "10.0.0.2"
    assert problems(manifest) == [
        (6, "Service default/a: stands twice in this file, also at line 1; the last one counts")
    ]


def test_aliases_cannot_blow_up():
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    manifest = parse(f"l0: &l0 [x]\n{levels}\n".encode())
    assert manifest.broken
    assert "aliases" in manifest.problems[0].reason


def service(name, address="10.0.0.1"):
    return Service(Metadata(name, "default"), ServiceSpec(cluster_ip=address))


def says(*items, problems=()):
    return Manifest(
        {key_of(item): Found.of(item, number + 1) for number, item in enumerate(items)}, tuple(problems)
    )


def test_the_last_file_by_name_wins_whatever_the_order():
    one, two = service("a", "10.0.0.1"), service("a", "10.0.0.2")
    warning = Trouble(
        "Service default/a",
        "stands in a.yaml:1 and b.yaml:1; the last by file name counts, b.yaml",
        harmless=True,
    )
    manifests = ManifestSet()
    assert manifests.change({"b.yaml": says(two)}) == [Applied(two)]
    assert manifests.change({"a.yaml": says(one)}) == [warning]
    assert manifests.change({"b.yaml": None}) == [Applied(one), Trouble("Service default/a", "")]
    assert manifests.change({"b.yaml": says(two)}) == [Applied(two), warning]
    assert manifests.change({"a.yaml": None}) == [Trouble("Service default/a", "")]
    assert manifests.change({"b.yaml": None}) == [Deleted("Service", "default", "a")]


def test_an_object_that_moves_between_files_in_one_change_is_not_touched():
    manifests = ManifestSet()
    manifests.change({"a.yaml": says(service("a"))})
    assert manifests.change({"a.yaml": None, "b.yaml": says(service("a"))}) == []


def test_broken_file_keeps_all_its_objects():
    manifests = ManifestSet()
    manifests.change({"a.yaml": says(service("a"), service("b"))})
    assert manifests.change({"a.yaml": broken("is not YAML", 3)}) == [Trouble("a.yaml:3", "is not YAML")]
    assert manifests.change({"a.yaml": broken("is not YAML", 3)}) == []
    assert manifests.change({"a.yaml": says(service("b"))}) == [
        Trouble("a.yaml:3", ""),
        Deleted("Service", "default", "a"),
    ]


def test_a_mistake_in_an_object_keeps_that_object_and_lets_the_others_change():
    manifests = ManifestSet()
    manifests.change({"a.yaml": says(service("a"), service("b"), service("c"))})
    wrong = Problem(7, "Service default/a: wrong", ("Service", "default", "a"))
    assert manifests.change({"a.yaml": says(service("b", "10.0.0.9"), problems=[wrong])}) == [
        Trouble("a.yaml:7", "Service default/a: wrong"),
        Applied(service("b", "10.0.0.9")),
        Deleted("Service", "default", "c"),
    ]


def test_while_a_broken_object_cannot_be_told_nothing_goes():
    manifests = ManifestSet()
    manifests.change({"a.yaml": says(service("a"), service("b"))})
    nameless = Problem(1, "metadata.name: wrong")
    assert manifests.change({"a.yaml": says(service("b", "10.0.0.9"), problems=[nameless])}) == [
        Trouble("a.yaml:1", "metadata.name: wrong"),
        Applied(service("b", "10.0.0.9")),
    ]


def test_mistakes_at_one_line_share_a_trouble():
    manifests = ManifestSet()
    wrong = [Problem(1, f"r{number}") for number in range(8)]
    assert manifests.change({"a.json": Manifest(problems=tuple(wrong))}) == [
        Trouble("a.json:1", "r0; r1; r2; r3; r4; and 3 more")
    ]


def test_printable():
    assert printable("/a b/ü.yaml") == "/a b/ü.yaml"
    assert printable("a\n\udcff") == "a\\n\\\\udcff"


NAMES = st.sampled_from(["a", "b", "c"])
ITEMS = st.lists(st.builds(service, NAMES, st.sampled_from(["10.0.0.1", "10.0.0.2"])), max_size=3)
GOOD = ITEMS.map(lambda items: says(*items))
FILES = st.sampled_from(["1.yaml", "2.yaml", "3.yaml"])
UPDATES = st.dictionaries(FILES, st.none() | GOOD | st.just(broken("b", 2)), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(UPDATES, max_size=8))
def test_events_amount_to_what_the_files_say(changes):
    """Whatever the changes and their order: the same as reading the last good state of every file in one go."""
    manifests, objects, troubles, files, bad = ManifestSet(), {}, {}, {}, set()
    for updates in changes:
        for event in manifests.change(updates):
            match event:
                case Applied(item):
                    assert objects.get(key_of(item)) != item
                    objects[key_of(item)] = item
                case Deleted(kind, namespace, name):
                    del objects[(kind, namespace, name)]
                case Trouble(subject, ""):
                    del troubles[subject]
                case Trouble(subject, reason):
                    assert troubles.get(subject) != reason
                    troubles[subject] = reason
        for name, manifest in updates.items():
            bad.discard(name)
            if manifest is None:
                files.pop(name, None)
            elif manifest.broken:
                bad.add(name)
            else:
                files[name] = manifest
    expected, owners = {}, {}
    for name in sorted(files):
        for key, found in files[name].objects.items():
            expected[key] = found.object
            owners.setdefault(key, []).append(name)
    assert objects == expected
    contested = {describe(key) for key, names in owners.items() if len(names) > 1}
    assert set(troubles) == contested | {f"{name}:2" for name in bad}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_are_too_strange(data):
    parse(data)
