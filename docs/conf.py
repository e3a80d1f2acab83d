"""Configure Sphinx: `tox run -e docs` builds the site into `build/docs`."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # Keras needs a backend to be imported; the documentation is the same for all

import vsgd

project = "vsgd"
author = "the vsgd authors"
version = release = vsgd.__version__
html_title = "vsgd"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
default_role = "code"  # docstrings use Markdown's single backticks

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
copybutton_prompt_text = ">>> "
copybutton_copy_empty_lines = False
linkcheck_retries = 3  # for `tox run -e docs-links`

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
