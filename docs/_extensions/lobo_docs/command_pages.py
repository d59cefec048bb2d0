"""The page of the command line: what `lobo-fx COMMAND --help` says, of every command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from lobo_fx.cli.app import app

__all__ = ["pages"]


def pages(docs: Path) -> dict[str, str]:
    """One page, a section a command."""
    group: Any = typer.main.get_command(app)
    parts = ["# Command line", "Made from the commands themselves; `lobo-fx COMMAND --help` says the same."]
    for name, command in sorted(group.commands.items()):
        parts += [f"## lobo-fx {name}", command.help or "", _usage(name, command), _options(command)]
    return {"index.md": "\n\n".join(filter(None, parts)) + "\n"}


def _usage(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"lobo-fx {name}")
    pieces = command.collect_usage_pieces(context)
    return f"```text\nlobo-fx {name} {' '.join(pieces)}\n```"


def _options(command: Any) -> str:
    rows = ["| argument | default | what it says |", "|---|---|---|"]
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        name = " ".join(parameter.opts) if is_option else (parameter.metavar or parameter.name.upper())
        default = parameter.default
        value = "" if default in (None, False) or callable(default) else f"`{default}`"
        about = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {value} | {about} |")
    return "\n".join(rows)
