"""Sphinx configuration."""

import importlib
import json
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import crossmix

project = "crossmix"
author = "crossmix developers"
project_copyright = "2026, crossmix developers"
version = release = crossmix.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

copybutton_selector = "div:not(.highlight-output) > div.highlight > pre"  # code, not what it prints

html_theme = "pydata_sphinx_theme"
html_title = f"crossmix {release}"
html_static_path = ["_static"]
html_css_files = ["crossmix.css"]
html_theme_options = {
    "github_url": "https://github.com/crossmix/crossmix",
    "header_links_before_dropdown": 7,
    "navigation_depth": 2,
    "show_nav_level": 1,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
}
html_sidebars = {"index": [], "quickstart": []}

autodoc_mock_imports = ["torchmetrics"]
autosummary_generate = True
autosummary_imported_members = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["State"]
napoleon_use_ivar = True
default_role = "name"

# The docs build without a network, so the pages of other projects that are linked to are listed in a file.
ELSEWHERE: dict[str, str] = json.loads((Path(__file__).parent / "elsewhere.json").read_text(encoding="utf-8"))
nitpick_ignore_regex = [
    (r"py:.*", r"crossmix\..*\.(Samples|FolderDataset)"),  # private protocols
    (r"py:class", r"numpy\.(ndarray|dtype)"),  # NumPy's inventory would have to be downloaded
]


PUBLIC = (
    "", ".functional", ".recipes", ".mixing", ".augment", ".self_training", ".models", ".datasets",
    ".datasets.classes", ".metrics", ".evaluation", ".diagnostics", ".visualize", ".optim", ".engine",
    ".integrations",
)  # fmt: skip


def public_names() -> dict[str, str]:
    """The documented name of each public object, by where it is defined and by the name alone."""
    found: dict[str, str] = {}
    for room in PUBLIC:
        module = importlib.import_module(f"crossmix{room}")
        for name in module.__all__:
            thing = getattr(module, name)
            path = f"{module.__name__}.{name}"
            found.setdefault(name, path)
            if callable(thing) and hasattr(thing, "__qualname__"):
                found.setdefault(f"{thing.__module__}.{thing.__qualname__}", path)
    return {where: path for where, path in found.items() if where != path}


NAMES = public_names()


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """Link names to where they are documented: an object may be defined elsewhere than imported from."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target in ELSEWHERE:
        return nodes.reference("", "", content, internal=False, refuri=ELSEWHERE[target])
    owner, _, member = target.rpartition(".")
    path = NAMES.get(target) or (f"{NAMES[owner]}.{member}" if owner in NAMES else None)
    if path is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", path, node, content)


def name_role(_role: str, rawtext: str, text: str, *_: object) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """What stands between single backticks: a link where it is a public name, otherwise code."""
    literal = nodes.literal(rawtext, text, classes=["code"])
    name = text.removesuffix("()")
    owner, _, member = name.rpartition(".")
    is_method = owner[:1].isupper() and owner in NAMES
    path = f"{NAMES[owner]}.{member}" if is_method else NAMES.get(name, name)
    is_argument = text.islower() and "_" not in text  # such as `mix`, perhaps
    if not is_method and (path not in NAMES.values() or is_argument):
        return [literal], []
    link = pending_xref("", literal, refdomain="py", reftype="obj", reftarget=path, refexplicit=True, refwarn=False)
    return [link], []


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_role("name", name_role)
    app.connect("missing-reference", resolve)
