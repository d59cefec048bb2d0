"""Sphinx: `python -m sphinx -W -b html docs build/docs`; nothing is fetched while it builds."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from lobo_fx.version import __version__  # after the path: the extensions are found there

project = "lobo-fx"
release = version = __version__
copyright = "the lobo-fx authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "lobo_docs"]
exclude_patterns = ["fragments", "notebooks", "_extensions"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
add_module_names = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"lobo-fx {release}"
html_static_path: list[str] = []
html_extra_path = ["report_schema.json"]
html_show_sphinx = False
