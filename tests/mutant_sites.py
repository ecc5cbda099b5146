"""The small faults that can be put into a file: what `mutants.py` draws from."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any


def both(*pairs: tuple[str, str]) -> dict[str, str]:
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


SIGN = re.compile(rb"is not|not in|\w+|[^\s()\w]+")  # between two operands
SWAPS = {
    "comparison": both(("<", "<="), (">", ">="), ("==", "!="), ("is", "is not"), ("in", "not in")),
    "arithmetic": both(("+", "-"), ("*", "/"), ("<<", ">>")) | {"//": "/", "%": "//", "**": "*"},
    "logic": both(("and", "or"), ("&", "|")) | {"^": "|"},
}
TWINS = both(
    ("maximum", "minimum"),
    ("max", "min"),
    ("amax", "amin"),
    ("argmax", "argmin"),
    ("any", "all"),
    ("floor", "ceil"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("new_zeros", "new_ones"),
) | {"sum": "mean", "cumsum": "cumprod", "sorted": "list"}


@dataclass
class Mutant:
    """A file in which the bytes from `start` to `end` are replaced by `text`."""

    operator: str
    file: str
    start: int
    end: int
    text: str
    statement: range  # its lines
    imported: bool  # runs when the module is imported, before any test
    line: int = 0
    before: str = ""
    after: str = ""
    status: str = "not run"
    killer: str = ""
    tests: int = 0
    seconds: float = 0.0

    def apply(self, source: bytes) -> bytes:
        """The faulty source."""
        return source[: self.start] + self.text.encode() + source[self.end :]

    def describe(self, source: bytes) -> Mutant:
        """Fill in what a reader needs: the line, and its text before and after."""
        first, last = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.end)
        faulty = self.apply(source)[first : last + len(self.text.encode()) + self.start - self.end]
        self.line = source.count(b"\n", 0, self.start) + 1
        self.before = " ".join(source[first:last].decode().split())
        self.after = " ".join(faulty.decode().split())
        return self

    def recall(self, run: dict[str, Any]) -> None:
        """Take over what came of it in an earlier run."""
        self.status, self.killer = run.get("status", self.status), run.get("killer", "")
        self.tests, self.seconds = run.get("tests", 0), run.get("seconds", 0.0)


class Sites(ast.NodeVisitor):
    """All mutants of a file. Strings, annotations and what is raised stay as they are."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source, self.found = file, source, list[Mutant]()
        self.starts = [0]  # of the lines, in bytes
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.statement, self.imported = range(0), True
        self.places = dict[int, tuple[range, bool]]()  # of each line
        tree = ast.parse(source)
        imports = [x for x in ast.walk(tree) if isinstance(x, ast.Import | ast.ImportFrom)]
        self.modules = {"cls", "self", *(x.asname or x.name for i in imports for x in i.names)}
        self.visit(tree)

    def span(self, node: Any) -> tuple[int, int]:
        """Its bytes, without parentheses around it."""
        first, last = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def add(self, operator: str, start: int, end: int, text: str) -> None:
        mutant = Mutant(operator, self.file, start, end, text, self.statement, self.imported)
        self.found.append(mutant.describe(self.source))

    def swap(self, left: ast.AST, right: ast.AST, *operators: str) -> None:
        """Replace the sign between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        sign = SIGN.search(self.source, start, end)
        for operator in operators:
            if sign and (new := SWAPS[operator].get(sign[0].decode())):
                self.add(operator, *sign.span(), new)

    def visit(self, node: ast.AST) -> None:
        outer = self.statement, self.imported
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            self.statement = range(node.lineno, max(last, node.lineno) + 1)
            self.places |= dict.fromkeys(self.statement, (self.statement, self.imported))
        super().visit(node)
        self.statement, self.imported = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults):
            if part is not None:
                self.visit(part)
        self.imported = False
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise | ast.JoinedStr) -> None:
        """Stays; so do strings with values in them, whose parts have no true place."""

    visit_JoinedStr = visit_Raise

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant | ast.Yield | ast.YieldFrom):
            self.add("statement deleted", *self.span(node), "pass")
            for call in (x.func for x in ast.walk(node) if isinstance(x, ast.Call)):
                name = getattr(call, "attr", "")
                if name.endswith("_") and not name.startswith("_"):  # in place
                    end = self.span(call)[1]
                    self.add("function swapped", end - 1, end, "")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(x, ast.Subscript | ast.Attribute) for x in node.targets):
            self.add("statement deleted", *self.span(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add("statement deleted", *self.span(node), "pass")
        self.swap(node.target, node.value, "arithmetic", "logic")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            self.swap(left, right, "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.swap(left, right, "logic")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(isinstance(x, ast.JoinedStr) for x in (node.left, node.right)):
            self.swap(node.left, node.right, "arithmetic", "logic")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        start, sign = self.span(node)[0], 3 if isinstance(node.op, ast.Not) else 1
        self.add("sign or negation", start, start + sign, "")
        self.generic_visit(node)

    def visit_If(self, node: ast.If | ast.While | ast.IfExp) -> None:
        if not isinstance(node.test, ast.UnaryOp) and self.text(node.test) != "TYPE_CHECKING":
            self.add("sign or negation", *self.span(node.test), f"not ({self.text(node.test)})")
        self.generic_visit(node)

    visit_While = visit_If
    visit_IfExp = visit_If

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add("boolean", *self.span(node), repr(not value))
        elif isinstance(value, int | float):
            new = value + 1 if isinstance(value, int) or value == 0 else value / 2
            self.add("number", *self.span(node), repr(new))

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None:
                self.add("bound dropped", *self.span(bound), "")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func
        name = getattr(called, "attr", getattr(called, "id", ""))
        if name == "isinstance":  # types stay
            return self.visit(node.args[0])
        if name == "zip":  # so does `strict`, which asserts
            node.keywords = []
        for keyword in node.keywords:
            start, end = self.span(keyword)
            comma = re.match(rb"\s*,", self.source[end:])
            self.add("keyword dropped", start, end + (comma.end() if comma else 0), "")
        if len(node.args) < 2:
            value = getattr(called, "value", None)  # `value.name(...)`
            if value is None or (isinstance(value, ast.Name) and value.id in self.modules):
                value = node.args[0] if node.args else None
            if value is not None and not isinstance(value, ast.Constant | ast.Starred):
                self.add("call dropped", *self.span(node), f"({self.text(value)})")
        if twin := TWINS.get(name):
            end = self.span(called)[1]
            self.add("function swapped", end - len(name), end, twin)
        self.generic_visit(node)
