"""Sphinx configuration."""

import crossmix

project = "crossmix"
author = "crossmix developers"
project_copyright = "2026, crossmix developers"
version = release = crossmix.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = f"crossmix {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["State"]
napoleon_use_ivar = True

# The docs build without a network, so other projects' names are not looked up.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|collections|typing|pathlib|os|argparse)\b.*"),
    (r"py:.*", r"(Tensor|nn\.Module|optional|Path|Any|Sequence)"),
    (r"py:.*", r"crossmix\..*\.(Samples|Labelled|Resident|FileSamples|FolderDataset|_\w+)"),
]
