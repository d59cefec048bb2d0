"""Arguments that several benchmarks take."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from lobo_fx.errors import suggestion

__all__ = ["add_networks"]


def add_networks(parser: argparse.ArgumentParser, names: Collection[str]) -> None:
    """Adds which networks to measure: any number of these names; an empty list stands for all."""

    def known(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(f"no network is called {name!r}; {suggestion(name, names)}")
        return name

    parser.add_argument("networks", nargs="*", type=known, metavar="network", help="which networks; default: all")
