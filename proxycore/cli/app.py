"""Commands and their options.

Bodies are in the neighbouring modules and imported when called, so that help is quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from . import complete
from .command import KubeProxyCommand, with_flags
from .exits import TABLE, Exit, hang_up, report, say
from .output import Format

# click's base of all usage errors, by way of the class of it that typer exports.
_CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


class LogFormat(StrEnum):
    """Forms of log lines."""

    TEXT = "text"
    JSON = "json"


class Takeover(StrEnum):
    """What to do about another proxy's rules."""

    AUTO = "auto"
    REFUSE = "refuse"
    LEAVE = "leave"


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _codes() -> str:
    return "\b\nExit codes:\n" + "\n".join(f"  {code:<4}{meaning}" for code, meaning in TABLE.items())


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    name="proxyctl",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings=_SETTINGS,
    epilog=_examples(
        "proxyctl demo",
        "proxyctl render --backend nft examples",
        "proxyctl plan --backend nft --source file:/etc/kubernetes/services",
        "proxyctl run --backend nft --source file:/etc/kubernetes/services --set clusterCIDR=10.244.0.0/16",
        "proxyctl kube-proxy --config=/var/lib/kube-proxy/config.conf --hostname-override=node-1",
    )
    + "\n\n"
    + _codes(),
)
config_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings=_SETTINGS,
    epilog=_examples(
        "proxyctl config show --config config.conf --set mode=nftables",
        "proxyctl config validate config.conf",
    ),
)
app.add_typer(config_app, name="config", help="Show or check the configuration.")

Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Configuration file: KubeProxyConfiguration, ProxycoreConfiguration, or both as two documents. "
        "May be repeated.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Overrule one configuration field. May be repeated.",
        autocompletion=complete.fields,
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Backend to use; `proxyctl backends` lists them. Default: what the configuration's mode means.",
        autocompletion=complete.backends,
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:ARGUMENT]",
        help="Where Services come from: kubernetes, kubernetes:CONTEXT, file:DIR, recording:FILE. "
        "Default: the configuration's.",
        autocompletion=complete.sources,
    ),
]
Kubeconfig = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="How the API server is reached. Default: KUBECONFIG, the pod's service account, ~/.kube/config.",
    ),
]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Context of the kubeconfig.")]
Master = Annotated[
    str | None, typer.Option(metavar="URL", help="The API server's URL; overrules the kubeconfig's.")
]
NodeName = Annotated[
    str | None,
    typer.Option(
        "--node-name", "--hostname-override", metavar="NAME", help="This node. Default: the host's name."
    ),
]
Manifests = Annotated[
    str | None,
    typer.Argument(
        metavar="[MANIFESTS]", help="Folder or file of manifests; short for --source file:MANIFESTS."
    ),
]
Output = Annotated[Format, typer.Option("-o", "--output", help="Form of the list.")]
LogForm = Annotated[LogFormat | None, typer.Option("--log-format", help="Form of log lines.")]
Verbosity = Annotated[
    int | None,
    typer.Option("-v", "--v", metavar="N", min=0, help="Verbosity; from 4 on, a line for each Service."),
]
TraceHooks = Annotated[bool, typer.Option("--trace-hooks", help="Print each call of a plugin's hook.")]


_OWN_FLAGS = {
    "hostnameOverride": "--node-name",
    "logging.format": "--log-format",
    "logging.verbosity": "-v",
    "clientConnection.kubeconfig": "--kubeconfig",
    "apiServer.context": "--context",
    "apiServer.master": "--master",
}
"""Flags that are not called as their field is."""


def _flags(set_: list[str] | None, **fields: str | None) -> dict[str, object]:
    """Flags by field path; a flag of its own beats `--set`."""
    from ..config import Flag
    from ..options import assignments

    given = {field.replace("__", "."): value for field, value in fields.items() if value is not None}
    named = {field: Flag(value, _OWN_FLAGS.get(field, f"--{field}")) for field, value in given.items()}
    return {**assignments(set_ or []), **named}


def _one_source(manifests: str | None, source: str | None) -> str | None:
    if manifests is not None and source is not None:
        raise typer.BadParameter("give either MANIFESTS or --source")
    return f"file:{manifests}" if manifests is not None else source


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """kube-proxy as a pluggable framework: programs a node's kernel so that Services work."""
    if version:
        from .. import __version__

        typer.echo(f"proxyctl {__version__}")
        raise typer.Exit


@app.command(
    short_help="Program this node's kernel until stopped.",
    epilog=_examples(
        "proxyctl run --backend nft --kubeconfig ~/.kube/config --context kind-kind --node-name kind-worker",
        "proxyctl run --backend nft --source file:/etc/kubernetes/services",
        "proxyctl run --config /var/lib/kube-proxy/config.conf --node-name node-1 -v 4",
        "proxyctl run --backend nft --source recording:today.rec --pace 10",
        "proxyctl run --backend nft --source file:. --set clusterCIDR=10.244.0.0/16 --log-format json",
    ),
)
def run(
    backend: Backend = None,
    source: Source = None,
    config: Config = None,
    node_name: NodeName = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    master: Master = None,
    takeover: Annotated[
        Takeover | None,
        typer.Option(
            help="Another proxy's rules: replace them once ours work, refuse to start, or leave them."
        ),
    ] = None,
    pace: Annotated[
        float | None,
        typer.Option(
            metavar="SPEED", help="Speed of a recording: 1 as it was, 10 ten times as fast. Default: at once."
        ),
    ] = None,
    log_format: LogForm = None,
    verbosity: Verbosity = None,
    trace_hooks: TraceHooks = False,
    safe: Annotated[
        bool, typer.Option("--safe", help="Load no observer but those of proxycore itself.")
    ] = False,
    init_only: Annotated[
        bool,
        typer.Option("--init-only", help="Do once what needs all rights, such as host settings, and end."),
    ] = False,
    set_: Set = None,
) -> None:
    """Program this node's kernel, and keep it so, until SIGTERM or SIGINT.

    What is programmed stays when the command ends. A second signal ends it at once. Configuration files are read
    again when they change, and on SIGHUP.
    """
    import os

    from ..options import resolve
    from .live import run_until_stopped

    flags = _flags(
        set_,
        backend=backend,
        source=source,
        hostnameOverride=node_name,
        takeover=takeover and takeover.value,
        logging__format=log_format and log_format.value,
        logging__verbosity=None if verbosity is None else str(verbosity),
        clientConnection__kubeconfig=kubeconfig,
        apiServer__context=context,
        apiServer__master=master,
    )
    if pace is not None and pace <= 0:
        raise typer.BadParameter("it must be above 0", param_hint="--pace")
    options = resolve(
        config or [], flags, os.environ, pace=pace, trace_hooks=trace_hooks, safe=safe, init_only=init_only
    )
    raise typer.Exit(run_until_stopped(options))


@app.command(
    "kube-proxy",
    cls=KubeProxyCommand,
    short_help="Be kube-proxy: its own command line, flag by flag.",
    add_help_option=False,
)
@with_flags
def kube_proxy(ctx: typer.Context) -> None:
    """Be kube-proxy: its own command line, flag by flag."""
    import os

    from .kubeproxy import run_kube_proxy

    raise typer.Exit(run_kube_proxy(ctx.args, os.environ))


@app.command(
    epilog=_examples("proxyctl backends", "proxyctl backends -o wide", "proxyctl backends --probe -o json")
)
def backends(
    probe: Annotated[
        bool, typer.Option("--probe", help="Load each, and ask whether this host can carry it.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """List installed backends.  Without --probe none is loaded."""
    from .lists import show_backends

    show_backends(probe, output)


@app.command(
    short_help="Print what would be programmed, as native text.",
    epilog=_examples(
        "proxyctl render --backend nft examples",
        "kubectl get svc,endpointslices,nodes -A -o yaml > all.yaml; proxyctl render --backend nft all.yaml",
    ),
)
def render(
    manifests: Manifests = None,
    backend: Backend = None,
    source: Source = None,
    config: Config = None,
    node_name: NodeName = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    master: Master = None,
    set_: Set = None,
    trace_hooks: TraceHooks = False,
) -> None:
    """Print what would be programmed for these manifests, in the backend's native text.

    Needs no rights and touches nothing.
    """
    import os

    from ..options import resolve
    from .lists import show_rendered

    flags = _flags(
        set_,
        backend=backend,
        source=_one_source(manifests, source),
        hostnameOverride=node_name,
        clientConnection__kubeconfig=kubeconfig,
        apiServer__context=context,
        apiServer__master=master,
    )
    show_rendered(resolve(config or [], flags, os.environ, trace_hooks=trace_hooks))


@app.command(
    short_help="Print the operations from the live kernel to it.",
    epilog=_examples(
        "proxyctl plan --backend nft examples",
        "proxyctl plan --backend nft --source file:/etc/kubernetes/services -o json",
        "proxyctl plan --backend nft all.yaml > /dev/null; test $? -eq 3 && echo the kernel differs",
    ),
)
def plan(
    manifests: Manifests = None,
    backend: Backend = None,
    source: Source = None,
    config: Config = None,
    node_name: NodeName = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    master: Master = None,
    set_: Set = None,
    output: Output = Format.TABLE,
    trace_hooks: TraceHooks = False,
) -> None:
    """Print the kernel operations that lead from what is in force to these manifests.

    Reads the kernel, changes nothing.  Exits 0 when there is nothing to do, 3 when there is.
    """
    import os

    from ..options import resolve
    from .lists import show_plan

    flags = _flags(
        set_,
        backend=backend,
        source=_one_source(manifests, source),
        hostnameOverride=node_name,
        clientConnection__kubeconfig=kubeconfig,
        apiServer__context=context,
        apiServer__master=master,
    )
    options = resolve(config or [], flags, os.environ, trace_hooks=trace_hooks)
    raise typer.Exit(show_plan(options, output))


@app.command(
    short_help="Write a source's events to a file.",
    epilog=_examples(
        "proxyctl record --source file:/etc/kubernetes/services today.rec",
        "proxyctl record --source file:. --for 60 today.rec",
    ),
)
def record(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Recording to write, - for standard output.")],
    source: Source = None,
    config: Config = None,
    node_name: NodeName = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    master: Master = None,
    for_: Annotated[
        float | None, typer.Option("--for", metavar="SECONDS", min=0, help="End after this time.")
    ] = None,
    set_: Set = None,
) -> None:
    """Write a source's events to a file, with their times, until SIGINT or the source's end.

    `--source recording:FILE` plays it back.
    """
    import os

    from ..options import resolve
    from .live import record_events

    flags = _flags(
        set_,
        source=source,
        hostnameOverride=node_name,
        clientConnection__kubeconfig=kubeconfig,
        apiServer__context=context,
        apiServer__master=master,
    )
    record_events(resolve(config or [], flags, os.environ), file, for_)


@app.command(
    short_help="Remove everything that was programmed.",
    epilog=_examples("proxyctl cleanup", "proxyctl cleanup --backend nft -o json"),
)
def cleanup(
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Only this backend's. Default: each one installed.",
            autocompletion=complete.backends,
        ),
    ] = None,
    config: Config = None,
    set_: Set = None,
    output: Output = Format.TABLE,
    trace_hooks: TraceHooks = False,
) -> None:
    """Remove everything that proxycore has programmed in this network namespace, and list it.

    Services stop working at once.  Nothing of anyone else's is touched.
    """
    import os

    from ..options import resolve
    from .lists import clean_up

    options = resolve(config or [], _flags(set_), os.environ, trace_hooks=trace_hooks)
    clean_up(options, backend, output)


@app.command(
    short_help="Show real connections through the proxy.",
    epilog=_examples("proxyctl demo", "proxyctl demo --backend nft --plain"),
)
def demo(
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="Backend to show.", autocompletion=complete.backends)
    ] = "nft",
    seconds: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="SECONDS",
            min=0,
            help="How long it lasts, 10 seconds at the least. Default: half a minute.",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live picture.")] = False,
) -> None:
    """Show real connections through the proxy, in network namespaces made for it and removed afterwards."""
    from .live import show_demo

    raise typer.Exit(show_demo(backend, seconds, plain))


@config_app.command(
    "show",
    epilog=_examples(
        "proxyctl config show --config config.conf",
        "proxyctl config show --origin -o yaml --config config.conf",
        "proxyctl config show -o json --set mode=nftables",
    ),
)
def config_show(
    config: Config = None,
    set_: Set = None,
    origin: Annotated[
        bool,
        typer.Option("--origin", help="Say where a value was written: file and line, variable, or flag."),
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Print every field with the value in force and where it comes from: flag > environment > file > default."""
    import os

    from .lists import show_config

    show_config(config or [], _flags(set_), os.environ, output, origin)


@config_app.command("validate", epilog=_examples("proxyctl config validate config.conf"))
def config_validate(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Configuration files, as for --config.")
    ],
) -> None:
    """Check configuration files: warnings on standard error, exit code 2 if they cannot be used."""
    from .lists import check_config

    check_config(files)


def run_command_line(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; every way to end becomes an exit code."""
    stdout = sys.stdout
    try:
        result = app(
            args=None if arguments is None else list(arguments), prog_name="proxyctl", standalone_mode=False
        )
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except BrokenPipeError:
        return hang_up()
    except SystemExit as error:
        # typer ends so after completion; and for a broken pipe, with another stdout in the place of ours.
        if sys.stdout is not stdout:
            sys.stdout = stdout
            return hang_up()
        return error.code if isinstance(error.code, int) else Exit.OK
    except (KeyboardInterrupt, typer.Abort):
        return Exit.INTERRUPTED
    except _CommandLineError as error:
        return _usage(error)
    except Exception as error:  # noqa: BLE001  the last line of defence: a message and a code, never a traceback
        return report(error)
    return int(result or 0)


def _usage(error: Exception) -> Exit:
    """One line for wrong usage; without any argument the help is what was asked for."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "proxyctl"
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(context.get_help() if context is not None else "", err=True)
        return Exit.USAGE
    message = str(getattr(error, "format_message", error.__str__)()).replace("Value error, ", "")
    say(f"{' '.join(message.split()).rstrip('.')}; see `{path} --help`")
    return Exit.USAGE
