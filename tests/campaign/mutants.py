"""Mutation testing: small random changes to the package, each of which a test ought to notice.

    python tests/campaign/mutants.py --folder FOLDER --number 400 --save

In FOLDER it makes a copy of the checkout, runs the fast tests once to learn which of them execute which line, and then,
mutant by mutant, those that execute the changed line, quick ones first, until one fails. The sample is random with a
fixed seed. What has been tried is kept in FOLDER: the same command goes on, a larger number adds mutants, and `--again`
tries survivors again with new tests. Reasons for survivors are written into the result file by hand, and kept.
"""

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:1] = [str(ROOT / "tests"), str(ROOT)]  # in place of this folder

import coverage
import pytest

from benchmarks.speed.common import RESULTS, commit, machine, today
from campaign.mutations import Mutation, mutations

Lines = dict[str, dict[int, set[str]]]
PRELOADED = ("hypothesis", "kornia", "torch._dynamo", "matplotlib.pyplot")  # once for all forked processes
PRELOAD_WARNING = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
DRAWINGS = ("_street_layout.py", "_street_rich.py", "_street_sprites.py")  # another picture would do as well
OWN, QUICK, SECONDS = 2, 40, 20  # quick tests of two files come first; the others of a mutant may take so long
MEMORY = 8 << 30


def main() -> None:
    """Try as many mutants as wanted, and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the copy, the coverage and what was tried")
    parser.add_argument("--number", type=int, default=400, help="of mutants (%(default)s)")
    parser.add_argument("--again", nargs="+", default=[], metavar="TEST", help="try survivors again with these tests")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/mutation.json")
    args = parser.parse_args()
    for name in PRELOADED:
        importlib.import_module(name)
    copy, tried = args.folder / "copy", args.folder / "tried.json"
    fill(copy)
    lines, seconds = learned(copy, args.folder)
    outcomes = json.loads(tried.read_text(encoding="utf-8")) if tried.exists() else {}
    everything = all_mutants(copy, lines)
    random.Random(0).shuffle(everything)  # noqa: S311 - a sample
    mutants = {said(copy, *mutant): mutant for mutant in everything[: args.number]}
    gc.freeze()  # a forked process would touch all of this, and so copy it
    for name, (path, mutation) in mutants.items():
        there = [lines[path][line] for line in mutation.lines if line in lines[path]]
        tests = set().union(*there) or set().union(*lines[path].values())  # those of the file, for other processes
        if args.again and outcomes.get(name) == "survived":
            tests = args.again
        elif name in outcomes:
            continue
        times = {test: seconds.get(test, 1.0) for test in sorted(tests, key=lambda test: seconds.get(test, 1.0))}
        outcomes[name] = outcome(copy, path, mutation, times)
        print(outcomes[name], len(tests), name, flush=True)
        tried.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    report({name: outcomes[name] for name in mutants}, len(everything), save=args.save)


def fill(copy: Path) -> None:
    """With the checkout as it is now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)


def learned(copy: Path, folder: Path) -> tuple[Lines, dict[str, float]]:
    """By file and line, the tests that execute it, and the seconds of each test: measured once."""
    data, times = folder / "coverage", folder / "seconds.json"
    os.environ["COVERAGE_FILE"] = str(data)
    if not times.exists():
        code, seen = tested(copy, ["--cov", "--cov-context=test", "--cov-report=", "--cov-fail-under=0"], 7200)
        if code:
            sys.exit("the tests have to pass on the copy first")
        times.write_text(json.dumps(seen["seconds"]), encoding="utf-8")
    measured = coverage.Coverage(data_file=data, config_file=copy / "pyproject.toml")
    measured.load()
    lines: Lines = {}
    for path in sorted(measured.get_data().measured_files()):
        _, statements, excluded, _, _ = measured.analysis2(path)
        tests = {line: set() for line in statements}
        for line, contexts in measured.get_data().contexts_by_lineno(path).items():
            tests[line] = {context.rpartition("|")[0] for context in contexts if context}
        lines[str(Path(path).relative_to(copy))] = {line: tests[line] for line in tests.keys() - set(excluded)}
    return lines, json.loads(times.read_text(encoding="utf-8"))


def all_mutants(copy: Path, lines: Lines) -> list[tuple[str, Mutation]]:
    """By file and place; none where coverage is not asked for."""
    return [
        (path, mutation)
        for path in lines
        if not path.endswith(DRAWINGS)
        for mutation in mutations((copy / path).read_bytes())
        if any(line in lines[path] for line in mutation.lines)
    ]


def said(copy: Path, path: str, mutation: Mutation) -> str:
    """Where, what, and what in its place."""
    source = (copy / path).read_bytes()
    before, old = source[: mutation.start].decode(), source[mutation.start : mutation.end].decode()
    line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
    return f"{path}:{line}:{column}: {' '.join(old.split())} -> {mutation.new}"


def outcome(copy: Path, name: str, mutation: Mutation, seconds: dict[str, float]) -> str:
    """Whether a test fails, does not end, or cannot even be collected; or whether the mutant survives."""
    path, tests = copy / name, list(seconds)
    source = path.read_bytes()
    own = {file for file, _ in Counter(test.partition("::")[0] for test in tests).most_common(OWN)}
    quick = [test for test in tests if test.partition("::")[0] in own and seconds[test] < 1][:QUICK]
    late = [test for test in tests if test not in quick]
    while sum(seconds[test] for test in late) > SECONDS:
        late.pop()
    try:
        compile(mutation.applied(source), path, "exec")
        path.write_bytes(mutation.applied(source))
        for part in filter(None, (quick, late)):
            limit = 30 + 3 * sum(seconds[test] for test in part)
            code, seen = tested(copy, ["-x", *part], limit)
            if code:
                return f"killed by {seen['failed']}" if code == 1 else f"killed with exit code {code}"
        return "survived"
    except SyntaxError:
        return "no code"
    finally:
        path.write_bytes(source)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()


def tested(copy: Path, arguments: list[str], limit: float) -> tuple[int, dict[str, Any]]:
    """Pytest's exit code, -9 after the limit, and what was seen, in a process forked from this one."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = child(copy, arguments)
        finally:
            os._exit(code)
    seen, ended, begun = copy.parent / "last.json", (0, 0), time.monotonic()
    while not ended[0] and time.monotonic() - begun < limit:
        time.sleep(0.02)
        ended = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what tests have started, too
    if not ended[0]:
        ended = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(ended[1]), json.loads(seen.read_text(encoding="utf-8")) if seen.exists() else {}


def child(copy: Path, arguments: list[str]) -> int:
    """Run tests in the copy as `python -m pytest` does."""
    os.setsid()
    os.chdir(copy)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    output = os.open(copy.parent / "last.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    roots = [str(copy / "src"), str(copy)]
    sys.path[:2] = roots
    os.environ["PYTHONPATH"] = os.pathsep.join(roots)
    watch = Watch()
    code = int(
        pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", "-W", PRELOAD_WARNING, *arguments], plugins=[watch])
    )
    (copy.parent / "last.json").write_text(json.dumps(vars(watch)), encoding="utf-8")
    return code


class Watch:
    """The seconds of each test with its fixtures, and the last one that failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of its set-up, call or end."""
        if report.failed:
            self.failed = report.nodeid
        else:
            self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


def report(outcomes: dict[str, str], all_there_are: int, *, save: bool) -> None:
    """The share of mutants that were killed, with its 95 % interval (Wilson), and those that survived."""
    counted = [outcome for outcome in outcomes.values() if outcome != "no code"]
    killed = sum(outcome.startswith("killed") for outcome in counted)
    file = RESULTS / "mutation.json"
    reasons = json.loads(file.read_text(encoding="utf-8"))["survivors"] if file.exists() else {}
    document = {
        "date": today(), "commit": commit(), "machine": machine("cpu"),
        "all": all_there_are, "mutants": len(counted), "killed": killed, "interval": wilson(killed, len(counted)),
        "survivors": {name: reasons.get(name, "") for name, outcome in outcomes.items() if outcome == "survived"},
    }  # fmt: skip
    print(json.dumps(document, indent=1))
    if save:
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def wilson(good: int, number: int) -> tuple[float, float]:
    """A 95 % interval for a share."""
    share, z = good / number, 1.96
    middle = share + z * z / (2 * number)
    half = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number**2))
    return tuple(round((middle + sign * half) / (1 + z * z / number), 4) for sign in (-1, 1))


if __name__ == "__main__":
    main()
