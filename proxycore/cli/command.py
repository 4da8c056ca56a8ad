"""A command with another grammar than the rest: all of its arguments go to the reader of kube-proxy's flags."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .kubeflags import FLAGS, help_text


class KubeProxyCommand(TyperCommand):
    """Takes its arguments as they are; they are in the context's `args`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []

    def get_help(self, ctx: Any) -> str:
        return help_text().rstrip("\n")


def with_flags(function: Callable[[typer.Context], None]) -> Callable[[typer.Context], None]:
    """Give a command's function kube-proxy's flags, so that the shell completes them; nothing is ever passed by them."""
    parameters = [inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for flag in FLAGS.values():
        names = [f"--{flag.name}", *([f"-{flag.letter}"] if flag.letter else [])]
        alone = bool(flag.shape.alone)
        parameters.append(
            inspect.Parameter(
                flag.name.replace("-", "_"),
                inspect.Parameter.KEYWORD_ONLY,
                default=False if alone else None,
                annotation=Annotated[bool if alone else str | None, typer.Option(*names, help=flag.help)],
            )
        )

    def command(ctx: typer.Context, **_: Any) -> None:
        function(ctx)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command
