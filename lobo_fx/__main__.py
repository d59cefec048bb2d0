"""`python -m lobo_fx`: the `lobo-fx` command of this very interpreter."""

from lobo_fx.cli import main

main()
