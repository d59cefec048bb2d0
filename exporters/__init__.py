"""Exporters and runtimes: how a program becomes a file, and what runs the file on CPU."""

if not __name__.startswith("lobo_fx."):
    raise ImportError("import lobo_fx.exporters, not exporters: a module must exist only once")
