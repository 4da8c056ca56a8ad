"""Discovery and loading: plugins of made-up distributions, installed as pip would."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxycore import plugins
from proxycore.api import BackendContext, ChangeBatch, HostState, PluginError, SourceContext
from proxycore.plugins import BACKENDS, OBSERVERS, SOURCES

HEAD = """
from proxycore.api import *

INFO = BackendInfo(name="mem", summary="keeps all in memory", api=">=0.1,<0.2", capabilities=frozenset({Capability.TCP}))


class Plugin:
    @hookimpl
    def proxycore_backend_describe(self):
        return INFO

    @hookimpl
    def proxycore_backend_start(self, context):
        return Started()
"""
APPLY = """
    @hookimpl
    def proxycore_backend_apply(self, batch):
        return ApplyResult(generation=batch.generation)
"""
BACKEND = HEAD + APPLY
TOML = """
name = "mem"
summary = "keeps all in memory"
api = ">=0.1,<0.2"
capabilities = ["tcp"]
"""


class Site:
    """A directory on sys.path into which distributions are put."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def install(
        self,
        code: str,
        *,
        group: str = BACKENDS,
        name: str = "mem",
        package: str = "made_up_mem",
        distribution: str = "made-up-mem",
        toml: str | None = TOML,
        target: str = "Plugin",
    ) -> None:
        folder = self.root / package
        folder.mkdir()
        (folder / "__init__.py").write_text(textwrap.dedent(code))
        if toml is not None:
            (folder / "backend.toml").write_text(toml)
        info = self.root / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {package}:{target}\n")
        importlib.invalidate_caches()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    yield Site(tmp_path)
    for module in [name for name in sys.modules if name.startswith("made_up")]:
        del sys.modules[module]


def context() -> BackendContext:
    return BackendContext(host=HostState(node_name="n"), families=("IPv4",))


def refusal(name: str = "mem") -> str:
    with pytest.raises(PluginError) as caught:
        plugins.load_backend(name)
    return str(caught.value)


def listed(name: str = "mem") -> plugins.Listed:
    return next(item for item in plugins.list_plugins() if item.found.name == name)


def test_a_backend_is_listed_without_being_imported(site: Site) -> None:
    site.install("raise RuntimeError('imported')")
    found = listed()
    assert found.problem is None
    assert found.facts is not None
    assert found.facts.summary == "keeps all in memory"
    assert found.found.distribution == "made-up-mem 1.2"
    assert "mem" in plugins.backend_names()
    assert "made_up_mem" not in sys.modules


def test_a_backend_is_loaded_and_called(site: Site) -> None:
    site.install(BACKEND)
    cell = plugins.load_backend("mem")
    assert (cell.name, cell.distribution, cell.info.summary) == (
        "mem",
        "made-up-mem 1.2",
        "keeps all in memory",
    )
    batch = ChangeBatch(generation=7, changes=())
    assert cell.call("proxycore_backend_apply", batch=batch).generation == 7
    assert cell.probe(context()).problems == ()


def test_loading_one_backend_imports_no_other(site: Site) -> None:
    site.install(BACKEND)
    site.install("raise RuntimeError", name="bad", package="made_up_bad", distribution="made-up-bad")
    plugins.load_backend("mem")
    assert "made_up_bad" not in sys.modules


def test_an_unknown_name_is_answered_with_those_installed(site: Site) -> None:
    site.install(BACKEND)
    message = refusal("men")
    assert "there is no such backend" in message
    assert "mem" in message
    assert "did you mean 'mem'?" in message
    assert "pip install" in message


def test_a_name_that_two_distributions_claim_is_refused_with_both(site: Site) -> None:
    site.install(BACKEND)
    site.install(BACKEND, package="made_up_rival", distribution="made-up-rival")
    assert "made-up-mem 1.2 and made-up-rival 1.2" in refusal()
    assert "made-up-rival 1.2" in str(listed().problem)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("import made_up_missing", "cannot be imported: ModuleNotFoundError"),
        ("class Other: pass", "cannot be imported: AttributeError"),
        ("class Out(BaseException): pass\nraise Out('x')", "cannot be imported: Out: x"),
        ("Plugin = 3", "is not callable"),
        ("def Plugin(): raise SystemExit('bye')", "factory made_up_mem:Plugin failed: SystemExit: bye"),
        ("def Plugin(must): pass", "failed: TypeError"),
        ("def Plugin(): return None", "returned None"),
        (BACKEND + "\nMade = Plugin\ndef Plugin(): return Made", "returned the class Plugin"),
        (HEAD, "does not implement proxycore_backend_apply"),
        (HEAD + APPLY.replace("@hookimpl", ""), "proxycore_backend_apply lacks the decorator @hookimpl"),
        (
            HEAD + APPLY.replace("_apply", "_aply"),
            "there is no hook proxycore_backend_aply; did you mean proxycore_backend_apply?",
        ),
        (HEAD + APPLY.replace("self, batch", "self, bacth"), "Argument(s) {'bacth'}"),
        (
            BACKEND.replace("return INFO", "return 5"),
            "proxycore_backend_describe returned int, not BackendInfo",
        ),
        (BACKEND.replace('api=">=0.1,<0.2"', 'api=">=0.1"'), "disagree on api: '>=0.1' and '>=0.1,<0.2'"),
        (BACKEND.replace("Capability.TCP", "Capability.UDP"), "disagree on capabilities: udp and tcp"),
    ],
)
def test_a_broken_backend_is_named_with_distribution_version_and_cause(
    site: Site, code: str, cause: str
) -> None:
    site.install(code)
    message = refusal()
    assert "plugin 'mem' (from made-up-mem 1.2): " in message
    assert cause in message


def test_only_the_users_own_interrupt_passes(site: Site) -> None:
    site.install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plugins.load_backend("mem")


@pytest.mark.parametrize(
    ("toml", "cause"),
    [
        (None, "ships no backend.toml"),
        ("name = ", "backend.toml: Invalid value"),
        (TOML.replace('"mem"', '"men"'), "its name is 'men', but the entry point's is 'mem'"),
        (TOML.replace("summary", "sumary"), "sumary"),
        (TOML.replace('"tcp"', '"tpc"'), "there is no capability 'tpc'; did you mean 'tcp'?"),
        (TOML.replace(">=0.1,<0.2", ">=0.2,<0.3"), "is made for version >=0.2,<0.3 of the plugin contract"),
        (TOML.replace(">=0.1,<0.2", "~0.1"), "'~0.1' is not a clause"),
        (TOML + "conntrack = 1", "conntrack"),
        (TOML + 'state = "planned"', "the mem backend is not written yet"),
    ],
)
def test_wrong_static_facts_keep_the_package_from_being_imported(
    site: Site, toml: str | None, cause: str
) -> None:
    site.install("raise RuntimeError('imported')", toml=toml)
    assert cause in refusal()
    assert "made_up_mem" not in sys.modules


def test_a_file_for_a_later_contract_is_refused_for_that_not_for_its_new_fields(site: Site) -> None:
    site.install(BACKEND, toml=TOML.replace("0.1", "0.9").replace("0.2", "1.0") + "later = 1\n")
    assert "is made for version" in refusal()


def test_a_package_that_is_gone_is_named(site: Site) -> None:
    site.install(BACKEND)
    for file in (site.root / "made_up_mem").iterdir():
        file.unlink()
    (site.root / "made_up_mem").rmdir()
    importlib.invalidate_caches()
    assert "install made-up-mem 1.2 again" in refusal()


@pytest.mark.parametrize(
    ("api", "version", "admitted"),
    [
        (">=0.1,<0.2", "0.1", True),
        (">=0.1,<0.2", "0.1.7", True),
        (">=0.1,<0.2", "0.2", False),
        (">=0.1,<0.2", "0.10", False),
        ("==0.1", "0.1.0", True),
        ("!=0.1", "0.1", False),
        (" > 0.1 , <= 1 ", "1.0", True),
        (">0.1", "0.1", False),
    ],
)
def test_api_range(api: str, version: str, admitted: bool) -> None:
    assert plugins.api_admits(api, version) is admitted


OBSERVER = """
from proxycore.api import *


class Plugin:
    @hookimpl
    def proxycore_observer_applied(self, batch):
        pass
"""


def test_a_broken_observer_keeps_no_other_from_being_loaded(site: Site) -> None:
    site.install(OBSERVER, group=OBSERVERS, toml=None)
    site.install(
        "raise SystemExit", group=OBSERVERS, name="bad", package="made_up_bad", distribution="made-up-bad"
    )
    observers = plugins.load_observers(["bad", "mem", "nobody"])
    assert [cell.name for cell in observers.cells] == ["mem"]
    assert [(problem.plugin, problem.distribution) for problem in observers.problems] == [
        ("bad", "made-up-bad 1.2"),
        ("nobody", None),
    ]


def test_a_disabled_observer_is_not_imported(site: Site) -> None:
    site.install("raise SystemExit", group=OBSERVERS)
    observers = plugins.load_observers(["mem"], disabled=["mem"])
    assert observers == ((), ())


def test_a_source_is_opened(site: Site) -> None:
    site.install(
        """
        from proxycore.api import *

        class Source:
            def run(self, sink): pass
            def stop(self): pass

        class Plugin:
            @hookimpl
            def proxycore_source_open(self, context):
                if context.argument == "bad":
                    raise SourceError("no such thing")
                return Source() if context.argument else object()
        """,
        group=SOURCES,
        toml=None,
    )
    cell = plugins.load_source("mem")
    assert type(cell.open(SourceContext(argument="x", node_name="n"))).__name__ == "Source"
    with pytest.raises(Exception, match="no such thing"):
        cell.open(SourceContext(argument="bad", node_name="n"))
    with pytest.raises(PluginError, match=r"returned object, which has no run\(\)"):
        cell.open(SourceContext(argument="", node_name="n"))


@pytest.mark.parametrize("name", ["ipvs"])
def test_planned_backends_say_so_and_do_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[2] / "plugins" / name
    monkeypatch.syspath_prepend(folder)
    found = plugins.Found(BACKENDS, name, f"proxycore-{name} 0.1.0", f"proxycore_{name}:plugin")
    facts = plugins.read_facts(found)
    assert (facts.state, facts.capabilities) == ("planned", ())
    assert facts.summary.startswith("not available yet: planned")
    module = importlib.import_module(f"proxycore_{name}")
    cell = plugins.BackendCell(
        module.plugin(), plugins.BackendSpec, name=name, distribution=found.distribution
    )
    assert cell.describe().summary == facts.summary
    assert cell.probe(context()).problems == (f"the {name} backend is not written yet",)
    for hook, arguments in (
        ("proxycore_backend_start", {"context": context()}),
        ("proxycore_backend_apply", {"batch": ChangeBatch(generation=1, changes=())}),
    ):
        with pytest.raises(PluginError, match=f"the {name} backend is not written yet"):
            cell.call(hook, **arguments)
