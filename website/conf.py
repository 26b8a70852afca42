"""Sphinx's configuration of the site. `make docs` runs it over the pages that ``website/pages.py`` prepares."""

from pathlib import Path

import mixup_recipes

project = "Mixup Recipes"
version = release = mixup_recipes.__version__
html_title = f"Mixup Recipes {release}"
extensions = ["myst_parser", "sphinx.ext.githubpages", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
root_doc = "index"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 6  # links to headings are those of GitHub
suppress_warnings = ["myst.header"]  # a page may begin with a small heading
add_module_names = False
smartquotes = False  # -- begins a flag
python_maximum_signature_line_length = 72
toc_object_entries = False  # a page of the reference has its headings, and each field a mark to link to

html_theme = "furo"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_favicon = str(Path(__file__).parent / "static/icon.svg")
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7ab8ff", "color-brand-content": "#7ab8ff"},
}
copybutton_prompt_text = "$ "
