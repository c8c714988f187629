"""Small changes to a source file, each of which a test ought to notice."""

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Mutation(NamedTuple):
    """New text for the bytes from `start` to `end`, and the lines that run where the change matters."""

    start: int
    end: int
    new: str
    lines: range

    def applied(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutations(source: bytes) -> list[Mutation]:
    """All of them, in the order of the file; a few do not compile."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = set()
    tree = ast.parse(source)
    for node, new, lines in _changes(tree, range(1, len(starts)), inside=False):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        found.add(Mutation(start, end, new, lines))
    return sorted(found, key=lambda one: one[:3])


Change = tuple[ast.expr | ast.stmt, str, range]


def _changes(node: ast.AST, lines: range, *, inside: bool) -> Iterator[Change]:
    """Those of a node and of what it contains; outside of functions only numbers are changed."""
    inside |= isinstance(node, FUNCTIONS)
    if isinstance(node, ast.ClassDef) or (inside and isinstance(node, ast.stmt)):
        lines = _lines(node)
    if inside and isinstance(node, ast.stmt):
        yield from ((place, new, lines) for place, new in _statement(node))
    elif isinstance(node, ast.expr) and (inside or isinstance(node, ast.Constant)):
        yield from ((node, f"({ast.unparse(new)})", lines) for new in _expression(node))
    for child in _children(node):
        yield from _changes(child, lines, inside=inside)


def _lines(node: ast.stmt) -> range:
    """Of a statement's head; but that of a function or class runs on import, and its body is what matters."""
    body = getattr(node, "body", None)
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return range(body[0].lineno, node.end_lineno + 1)
    return range(node.lineno, max(node.lineno, body[0].lineno - 1 if body else node.end_lineno) + 1)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """Without annotations, docstrings, messages and names that are exported."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)) or ast.unparse(node).startswith(("warnings.warn(", "__all__")):
        return
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "type_params"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            is_doc = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not is_doc:
                yield child


def _statement(node: ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Calls, raises and in-place arithmetic left out, conditions negated, nothing returned, decorators removed."""
    if isinstance(node, ast.Raise | ast.AugAssign | ast.Break | ast.Continue) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.YieldFrom)
    ):
        yield node, "pass"
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield node, ast.unparse(_with(node, op=SWAPS[type(node.op)]()))
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        yield node, "return None"
    if isinstance(node, FUNCTIONS):
        yield from ((decorator, "(lambda plain: plain)") for decorator in node.decorator_list)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            if isinstance(default, ast.Constant) and isinstance(default.value, str):
                yield default, repr(default.value + "X")


def _expression(node: ast.expr) -> Iterator[ast.expr]:
    """The same with another operator, number or string to compare with, swapped arguments, or an argument less."""
    if isinstance(node, ast.Compare):
        yield from _comparisons(node)
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield ast.Constant(_another(node.value))
    if isinstance(node, ast.Call):
        if len(node.args) > 1:
            yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for i in range(len(node.keywords)):
            yield _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _comparisons(node: ast.Compare) -> Iterator[ast.Compare]:
    for i, (op, side) in enumerate(zip(node.ops, node.comparators, strict=True)):
        yield _with(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
        if isinstance(side, ast.Constant) and isinstance(side.value, str):
            other = ast.Constant(side.value + "X")
            yield _with(node, comparators=[*node.comparators[:i], other, *node.comparators[i + 1 :]])


def _with(node: ast.AST, **fields: object) -> Any:
    """A copy with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _another(value: float) -> float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 2 * value or 1.0
