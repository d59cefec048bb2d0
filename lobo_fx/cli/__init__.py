"""The command line, one file per command: `lobo-fx compile | inspect | benchmark | passes | recipes | report | …`."""

from lobo_fx.cli import benchmark, compile, costs, inspect, passes, recipes, report, search  # noqa: F401  each adds its command
from lobo_fx.cli.app import app


def main() -> None:
    """Entry point of the `lobo-fx` command."""
    app()
