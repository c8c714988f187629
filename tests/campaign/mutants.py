"""Mutation testing: small random changes to the package, each of which a test ought to notice.

    python tests/campaign/mutants.py --folder FOLDER --number 400 --save

In FOLDER it makes a copy of the checkout and runs the fast tests once, to learn which of them execute which line. Then
it imports the package and its tests, and for each mutant forks a process that changes the functions in place and runs
the tests of the changed line, the shortest first, until one fails. Survivors, and changes outside of functions, are
written into the copy and tried again by a new pytest. The sample is random by its seed: after tests were written for
one sample, only another one says how much the tests notice. What was tried is kept in FOLDER: the same command goes on,
a larger number adds mutants, and `--again` tries survivors with new tests. The note and the reasons of survivors are
written into the result file by hand, and kept.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:1] = [str(ROOT / "tests"), str(ROOT)]  # in place of this folder

import coverage
import pytest
from _pytest.runner import runtestprotocol

from benchmarks.speed.common import RESULTS, commit, machine, today
from campaign.mutations import Mutation, mutations

Lines = dict[str, dict[int, set[str]]]
Mutant = tuple[str, Mutation]
DRAWINGS = ("_street_layout.py", "_street_rich.py", "_street_sprites.py")  # another picture would do as well
FOLDERS = (
    "src",
    "tests/ops",
    "tests/engine",
    "tests/models",
    "tests/datasets",
    "tests/integrations",
    "tests/contracts",
)
SIGNATURES = "tests/contracts/test_api_surface.py"  # executes no line of what it compares
SECONDS = 8, 60  # how long the tests of a mutant may take together, without it and with it


def main() -> None:
    """Try as many mutants as wanted, and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the copy, the coverage and what was tried")
    parser.add_argument("--number", type=int, default=400, help="of mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--again", nargs="+", default=[], metavar="TEST", help="try survivors again with these tests")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/mutation.json")
    args = parser.parse_args()
    copy, tried = args.folder.resolve() / "copy", args.folder.resolve() / "tried.json"
    fill(copy)
    os.chdir(copy)
    sys.path[:2] = [str(copy / "tests"), str(copy)]
    sys.path.insert(0, str(copy / "src"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(copy / "src"), str(copy)])
    lines, seconds = learned(copy)
    everything = all_mutants(copy, lines)
    random.Random(args.seed).shuffle(everything)  # noqa: S311 - a sample
    trials = Trials(copy, {said(copy, *one): one for one in everything[: args.number]}, lines, seconds, tried)
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:cov", "--tb=no", *FOLDERS], plugins=[trials])
    for name, mutant in trials.mutants.items():
        if trials.outcomes[name] == "survived" or (args.again and trials.outcomes[name] == "survives"):
            trials.keep(name, anew(copy, mutant, [SIGNATURES, *args.again, *trials.tests(mutant)]))
    report({name: trials.outcomes[name] for name in trials.mutants}, len(everything), args.seed, save=args.save)


def fill(copy: Path) -> None:
    """With the checkout as it is now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)


def learned(copy: Path) -> tuple[Lines, dict[str, float]]:
    """By file and line, the tests that execute it, and the seconds of each test: measured once."""
    data, times = copy.with_name("coverage"), copy.with_name("seconds.json")
    if not times.exists():
        flags = ["--cov", "--cov-context=test", "--cov-report=", "--cov-fail-under=0", "--durations=0", "-vv"]
        command = [sys.executable, "-m", "pytest", *flags]
        done = subprocess.run(
            command, env={**os.environ, "COVERAGE_FILE": str(data)}, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"the tests have to pass on the copy first:\n{done.stdout[-2000:]}")
        seconds: dict[str, float] = {}
        for spent, test in re.findall(r"^([\d.]+)s (?:setup|call|teardown) +(\S.*)$", done.stdout, re.MULTILINE):
            seconds[test] = seconds.get(test, 0.0) + float(spent)
        times.write_text(json.dumps(seconds), encoding="utf-8")
    measured = coverage.Coverage(data_file=data, config_file=copy / "pyproject.toml")
    measured.load()
    lines: Lines = {}
    for path in sorted(measured.get_data().measured_files()):
        _, statements, excluded, _, _ = measured.analysis2(path)
        tests: dict[int, set[str]] = {line: set() for line in statements}
        for line, contexts in measured.get_data().contexts_by_lineno(path).items():
            tests[line] = {context.rpartition("|")[0] for context in contexts if context}
        lines[str(Path(path).relative_to(copy))] = {line: tests[line] for line in tests.keys() - set(excluded)}
    return lines, json.loads(times.read_text(encoding="utf-8"))


def all_mutants(copy: Path, lines: Lines) -> list[Mutant]:
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


class Trials:
    """Pytest's loop, of mutants in place of tests."""

    def __init__(
        self, copy: Path, mutants: dict[str, Mutant], lines: Lines, seconds: dict[str, float], kept: Path
    ) -> None:
        self.copy, self.mutants, self.lines, self.seconds, self.kept = copy, mutants, lines, seconds, kept
        self.outcomes: dict[str, str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}

    def keep(self, name: str, outcome: str) -> None:
        """Also for the next run."""
        self.outcomes[name] = outcome
        self.kept.write_text(json.dumps(self.outcomes, indent=1), encoding="utf-8")
        print(outcome, name, flush=True)

    def tests(self, mutant: Mutant) -> list[str]:
        """Those of the changed line, else of the file; the shortest first, as many as the time allows."""
        path, mutation = mutant
        found = set().union(*(self.lines[path].get(line, ()) for line in mutation.lines))
        ordered = sorted(found or set().union(*self.lines[path].values()), key=lambda test: self.seconds.get(test, 1))
        while sum(self.seconds.get(test, 1) for test in ordered) > SECONDS[0]:
            ordered.pop()
        return ordered

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Try those that were not tried before."""
        items = {item.nodeid: item for item in session.items}
        functions = [one for one in gc.get_objects() if type(one) is types.FunctionType]
        gc.freeze()  # forked processes would touch all objects, and so copy them
        for name, mutant in self.mutants.items():
            if name not in self.outcomes:
                known = [items[test] for test in self.tests(mutant) if test in items]
                self.keep(name, trial(self.copy, mutant, known, functions))
        return True


def trial(copy: Path, mutant: Mutant, items: list[pytest.Item], functions: list[types.FunctionType]) -> str:
    """Whether one of the tests fails, or does not end, in a forked process with the change; if not, it survives."""
    source = mutant[1].applied((copy / mutant[0]).read_bytes())
    try:
        compile(source, mutant[0], "exec")
    except SyntaxError:
        return "no code"
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        said = b"killed by an exception"
        with contextlib.suppress(BaseException):
            os.setsid()
            for handle in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), handle)
            change(".".join(Path(mutant[0]).with_suffix("").parts[1:]), source, functions)
            said = first_failure(items)
        os.write(write, said[:500])
        os._exit(0)
    os.close(write)
    ended, begun = (0, 0), time.monotonic()
    while not ended[0] and time.monotonic() - begun < SECONDS[1]:
        time.sleep(0.01)
        ended = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # with what tests have started
    if not ended[0]:
        os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read().decode() if ended[0] else "killed by the time limit"


def first_failure(items: list[pytest.Item]) -> bytes:
    for item, following in zip(items, [*items[1:], None], strict=True):
        if any(one.failed for one in runtestprotocol(item, log=False, nextitem=following)):
            return f"killed by {item.nodeid}".encode()
    return b"survived"


def change(name: str, source: bytes, functions: list[types.FunctionType]) -> None:
    """Give the functions of an imported module the code and the defaults that they have in another source."""
    module = sys.modules[name.removesuffix(".__init__")]
    other = types.ModuleType(module.__name__)
    other.__dict__.update(__file__=module.__file__, __package__=module.__package__, __spec__=module.__spec__)
    exec(compile(source, str(module.__file__), "exec"), vars(other))  # noqa: S102 - its own code
    new = {place(one): one for one in gc.get_objects() if type(one) is types.FunctionType and of(one, other)}
    for one in functions:
        if of(one, module) and (changed := new.get(place(one))):
            one.__code__, one.__defaults__ = changed.__code__, changed.__defaults__
            one.__kwdefaults__ = changed.__kwdefaults__  # type: ignore[assignment]


def of(function: types.FunctionType, module: types.ModuleType) -> bool:
    return function.__globals__ is vars(module)


def place(function: types.FunctionType) -> tuple[str, int, int]:
    return function.__qualname__, function.__code__.co_firstlineno, len(function.__code__.co_freevars)


def anew(copy: Path, mutant: Mutant, tests: list[str]) -> str:
    """Whether tests notice the change in the file."""
    path = copy / mutant[0]
    source = path.read_bytes()
    path.write_bytes(mutant[1].applied(source))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            *dict.fromkeys(tests),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=10 * SECONDS[1], check=False)
    except subprocess.TimeoutExpired:
        return "killed by the time limit"
    finally:
        path.write_bytes(source)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return f"killed by {failed[1] if failed else f'exit code {done.returncode}'}" if done.returncode else "survives"


def report(outcomes: dict[str, str], all_there_are: int, seed: int, *, save: bool) -> None:
    """The share of mutants that were killed, at first with its 95 % interval (Wilson) and by now, and the survivors."""
    counted = [outcome for outcome in outcomes.values() if outcome != "no code"]
    killed = sum(outcome.startswith("killed") for outcome in counted)
    file = RESULTS / "mutation.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    same = (before.get("seed"), before.get("mutants")) == (seed, len(counted))
    reasons, at_first = before.get("survivors", {}), before["killed_at_first"] if same else killed
    document: dict[str, Any] = {
        "date": today(), "commit": commit(), "machine": machine("cpu"), "seed": seed,
        "all": all_there_are, "mutants": len(counted), "killed_at_first": at_first,
        "interval_at_first": wilson(at_first, len(counted)), "killed": killed,
        "note": before.get("note", "") if same else "",
        "survivors": {name: reasons.get(name, "") for name, outcome in outcomes.items() if outcome == "survives"},
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
