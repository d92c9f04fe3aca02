"""Sphinx's settings for the site; `build_site.py` writes its source folder and calls Sphinx."""

from typing import Annotated, get_args, get_origin

from sphinx.util.typing import stringify_annotation

import protea
from protea import language_model

project = "Protea"
version = release = protea.__version__
copyright = "the authors of Protea; Apache-2.0"  # noqa: A001

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4
templates_path: list[str] = []
html_static_path = ["static"]
html_css_files = ["site.css"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# Signatures show the types of annotated names, without the words that error messages take from them.
autodoc_type_aliases = {
    name: stringify_annotation(get_args(value)[0], "smart").replace("~", "")
    for name, value in vars(language_model).items()
    if get_origin(value) is Annotated
}
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

# Prompts and output are not copied.
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "pydata_sphinx_theme"
html_title = "Protea"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "Protea"},
    "header_links_before_dropdown": 8,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "glossary": []}
