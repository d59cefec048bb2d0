"""`python -m lobo_fx.cli`."""

from lobo_fx.cli import main

main()
