"""One Python file as text and syntax tree, with what the patch machinery asks of it.

Positions of the syntax tree count UTF-8 bytes within a line; :meth:`Source.offset` turns them into indices of the text,
so that edits keep every byte around them. Nothing is imported or run.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cached_property


Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Source:
    """Source text of one file."""

    def __init__(self, text: str, name: str = "<source>") -> None:
        self.text = text
        self.tree = ast.parse(text, name)

    @cached_property
    def definitions(self) -> list[tuple[str, Definition]]:
        """Functions and classes with their qualified names, each as often as it is defined."""
        return list(_definitions(self.tree))

    @cached_property
    def functions(self) -> dict[str, Function]:
        """Functions by qualified name; of several definitions (overloads) the last."""
        found = self.definitions
        return {k: node for k, node in found if not isinstance(node, ast.ClassDef)}

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        """Classes by qualified name."""
        found = self.definitions
        return {k: node for k, node in found if isinstance(node, ast.ClassDef)}

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(m.end() for m in re.finditer("\n", self.text))]

    def offset(self, line: int, column: int = 0) -> int:
        """Index into ``text`` of a syntax tree position (``line`` counts from 1)."""
        start = self._line_starts[line - 1]
        if column == 0:
            return start
        end = start + column  # a byte is at most one character
        return start + len(self.text[start:end].encode()[:column].decode())

    def lines(self, start: int, end: int) -> str:
        """Text of the lines ``start`` up to, not including, ``end``."""
        return self.text[self.offset(start) : self.offset(end)]

    def span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self.offset(node.lineno, node.col_offset),
            self.offset(node.end_lineno, node.end_col_offset),
        )

    def import_line(self) -> int:
        """The line behind the imports that open the file."""
        line = 1
        for stmt in self.tree.body:
            if isinstance(stmt, (ast.Import, ast.ImportFrom)):
                line = end_line(stmt) + 1
            elif not (
                isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Constant)
            ):
                break
        return line

    @cached_property
    def exports(self) -> ast.List | None:
        """The list that the file assigns to ``__all__``."""
        for stmt in self.tree.body:
            if isinstance(stmt, ast.Assign) and _names_all(stmt):
                return stmt.value if isinstance(stmt.value, ast.List) else None
        return None

    @cached_property
    def has_all(self) -> bool:
        """Whether the file says anything of ``__all__``; else what it imports and defines is public."""
        nodes = ast.walk(self.tree)
        return any(isinstance(n, ast.Name) and n.id == "__all__" for n in nodes)

    @cached_property
    def public(self) -> set[str]:
        """Names that the file makes public: those of ``__all__``, or those that it imports from elsewhere."""
        if self.has_all:
            return (
                {ast.literal_eval(n) for n in self.exports.elts}
                if self.exports
                else set()
            )
        imports = [s for s in self.tree.body if isinstance(s, ast.ImportFrom)]
        return {alias.asname or alias.name for s in imports for alias in s.names}

    def fingerprint(self, qualname: str) -> str | None:
        """Hash of a function or class without its docstring, the same under every Python release; ``None`` if it is
        missing.
        """
        node = self.functions.get(qualname) or self.classes.get(qualname)
        if node is None:
            return None
        text = _dump(node, node.body[0] if docstring(node) else None)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _names_all(stmt: ast.Assign) -> bool:
    return [getattr(target, "id", "") for target in stmt.targets] == ["__all__"]


def assigned(node: ast.ClassDef) -> dict[str, ast.stmt]:
    """The statements of a class that assign to a name, by that name."""
    found: dict[str, ast.stmt] = {}
    for stmt in node.body:
        targets = stmt.targets if isinstance(stmt, ast.Assign) else []
        if isinstance(stmt, ast.AnnAssign):
            targets = [stmt.target]
        found.update({t.id: stmt for t in targets if isinstance(t, ast.Name)})
    return found


def docstring(node: Definition) -> ast.Constant | None:
    """The docstring's node."""
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def body_line(node: Definition) -> int:
    """The line where a function's or class's body begins, behind its docstring."""
    first = node.body[0]
    if docstring(node):
        return end_line(first) + 1
    decorators: list[ast.expr] = getattr(first, "decorator_list", [])
    return min([first.lineno, *(d.lineno for d in decorators)])


def end_line(node: ast.stmt | ast.expr) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node, f"{prefix}{node.name}.")


def _dump(node: object, leave_out: ast.AST | None) -> str:
    # NB: ast.dump() prints empty fields under some Python releases and not under others. Leaving them out always
    # makes one fingerprint serve all.
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields)
        inner = (f"{k}={_dump(v, leave_out)}" for k, v in fields if v not in (None, []))
        return f"{type(node).__name__}({','.join(inner)})"
    if isinstance(node, list):
        items = (_dump(item, leave_out) for item in node if item is not leave_out)
        return f"[{','.join(items)}]"
    return repr(node)
