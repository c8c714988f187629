#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""Tasks beside `.ci/run`: other Pythons, the lowest dependencies, the package, and external meters."""

from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
# Compiling, and what only tests do (sharded networks on a CPU, pickles of another numpy), needs a newer PyTorch.
NEED_NEWER = "not (compile or graph or sharded or derivatives or over_ranks or objects__ or what_goes_wrong)"
nox.options.default_venv_backend = "uv|virtualenv"


@nox.session
def newest(session: nox.Session) -> None:
    """Run the fast tests with the newest dependencies; arguments after -- go to pytest."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(venv_backend="uv", python="3.11", default=False)
def lowest(session: nox.Session) -> None:
    """Run the tests of eager use with the lowest dependencies that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "-e", ".[dev]")
    rooms = ("tests/ops", "tests/models", "tests/engine")
    session.run("python", "-m", "pytest", *rooms, "-k", NEED_NEWER, *session.posargs)


@nox.session(default=False)
def interop(session: nox.Session) -> None:
    """Run what is about other packages beside these, some of which need torchvision of the same build as torch."""
    session.install("-e", ".[dev,interop]", "segmentation-models-pytorch", "timm", "torchvision")
    session.run("python", "-m", "pytest", "tests/contracts/test_docs.py", "tests/integrations", *session.posargs)


@nox.session(default=False)
def package(session: nox.Session) -> None:
    """Build wheel and sdist into dist/ and check both."""
    session.install("build", "check-wheel-contents", "pyroma", "twine", "validate-pyproject[all]")
    session.run("validate-pyproject", "pyproject.toml")
    session.run("python", "-m", "build")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
    session.run("check-wheel-contents", *map(str, Path("dist").glob("*.whl")))
    session.run("pyroma", "--min=10", ".")


@nox.session(default=False)
def meters(session: nox.Session) -> None:
    """Measure the repository by tools of others."""
    session.install("codespell", "deptry", "interrogate", "sp-repo-review[cli]", "zizmor")
    session.run("sp-repo-review", ".")
    session.run("codespell", "src", "tests", "examples", "benchmarks", "docs", *map(str, Path().glob("*.md")))
    session.run("deptry", ".")
    session.run("interrogate", "src")
    session.run("zizmor", "--offline", ".github")


@nox.session(default=False)
def audit(session: nox.Session) -> None:
    """Look for known vulnerabilities in the newest and in the lowest dependencies that pyproject.toml allows.

    Of torch and Pillow only in the newest: SECURITY.md says what older versions of torch lack, and of Pillow crossmix
    uses nothing but the reader of PNG.
    """
    session.install("pip-audit", "uv")
    resolve = "uv pip compile --quiet --upgrade --python-version 3.11 --extra weights --extra pictures --extra train"
    for name, options in {"highest": "", "lowest-direct": "--no-emit-package torch --no-emit-package pillow"}.items():
        found = str(Path(session.create_tmp()) / f"{name}.txt")
        session.run(*f"{resolve} --resolution {name} {options}".split(), "--output-file", found, "pyproject.toml")
        session.run("pip-audit", "--strict", "--disable-pip", "--no-deps", "--requirement", found)


@nox.session(default=False)
def types(session: nox.Session) -> None:
    """Measure how much of the public API is typed, as installed by a user."""
    session.install(".", "basedpyright")
    session.run("basedpyright", "--ignoreexternal", "--verifytypes", "crossmix")


@nox.session(default=False)
def links(session: nox.Session) -> None:
    """Look at every link of the documentation."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-b", "linkcheck", "docs", str(Path(session.create_tmp()) / "links"))


if __name__ == "__main__":
    nox.main()
