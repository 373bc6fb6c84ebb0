"""How the documentation is built: Sphinx, with MyST for Markdown and the theme furo."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from ebm_defense import __version__

project, author, version = "ebm-defense", "The ebm-defense authors", __version__
project_copyright = "The ebm-defense authors, MIT licence"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "public_names"]
exclude_patterns = ["_build"]

# Every reference that a page or a docstring writes must lead somewhere; `make docs` makes a warning
# an error. What a signature names of other packages, or of ours without a page, has no target here.
nitpicky = True
nitpick_ignore_regex = [("py:class", r".*"), ("py:data", r"typing\..*"), ("py:obj", r"typing\..*")]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = "ebm-defense"
html_static_path = ["_static"]
html_css_files = ["wide-tables.css"]
html_copy_source = False
html_show_sphinx = False
