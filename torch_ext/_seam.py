"""Read the seam files: which function or class each patch changes, and how.

A seam names the parameters of upstream's function that it needs, bare, and those that it adds, annotated; the latter
are keyword-only. Its docstring is what the patch adds to upstream's. Its body is a prologue; a lone ``...`` at its end
says "and here upstream's body goes on", and without it the seam replaces the body. For an example see
``torch_ext/seams/__init__.py``.

A seam that is a class holds assignments, which upstream's class gets behind its own: new options of a config. An
``exports(patch, names...)`` statement is a seam of the module: it gets the names, which the file imports.
"""

import ast
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch_ext._error import PatchError
from torch_ext._signature import Signature
from torch_ext._source import (
    assigned,
    body_line,
    Definition,
    docstring,
    end_line,
    Function,
    Source,
)


@dataclass(frozen=True)
class Seam:
    """One change to one upstream function or class, or to the public names of an upstream module.

    ``needs`` are parameters that upstream's function has; ``adds`` maps the new ones to their source text;
    ``prologue`` is source text without indentation; ``imports`` are what it uses of the seam file's imports. Of a
    class, ``adds`` and ``prologue`` are its new assignments, one by one and as they stand. Of a module, ``adds`` has
    the new names, and ``qualname`` is ``__all__``.
    """

    patch: str
    file: str
    qualname: str
    base: tuple[str, ...]
    needs: tuple[str, ...]
    adds: dict[str, str]
    doc: str
    prologue: str
    replaces_body: bool
    imports: tuple[str, ...]
    is_class: bool = False
    is_exports: bool = False

    @property
    def is_function(self) -> bool:
        """Whether it changes a function."""
        return not (self.is_class or self.is_exports)

    def __str__(self) -> str:
        return f"{self.qualname} in {self.file}"


@cache
def read_seams(root: Path) -> tuple[Seam, ...]:
    """All seams below ``root``, whose folders mirror upstream's."""
    return tuple(
        seam
        for path in sorted(root.glob("torch/**/*.py"))
        for seam in read_seam_file(path, path.relative_to(root).as_posix())
    )


def read_seam_file(path: Path, file: str) -> list[Seam]:
    """The seams of ``path``, which change upstream's ``file`` (``"torch/nn/modules/module.py"``)."""
    source = Source(path.read_text(encoding="utf-8"), str(path))
    imports = [
        stmt
        for stmt in source.tree.body
        if isinstance(stmt, (ast.Import, ast.ImportFrom))
        and getattr(stmt, "module", "") != "torch_ext.seams"
    ]
    return [
        *(
            _read_exports(file, stmt.value, imports)
            for stmt in source.tree.body
            if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call)
        ),
        *(
            _read_class_seam(source, file, qualname, node, imports)
            for qualname, node in source.classes.items()
            if node.decorator_list
        ),
        *(
            _read_seam(source, file, qualname, node, imports)
            for qualname, node in source.definitions  # NB: several patches may change one function
            if not isinstance(node, ast.ClassDef)
        ),
    ]


def _read_exports(
    file: str, call: ast.Call, imports: Sequence[ast.Import | ast.ImportFrom]
) -> Seam:
    patch, *names = (ast.literal_eval(arg) for arg in call.args)
    bound = set().union(*map(_binds, imports))
    if ast.unparse(call.func) != "exports" or not bound.issuperset(names):
        raise PatchError(
            f"Expected a statement of the seams of {file} to be exports(patch, names...) of names that the file "
            f"imports, got {ast.unparse(call)}."
        )
    return Seam(
        patch=patch,
        file=file,
        qualname="__all__",
        base=(),
        needs=(),
        adds={name: name for name in names},
        doc="",
        prologue="",
        replaces_body=False,
        imports=tuple(ast.unparse(s) for s in imports if _binds(s) & set(names)),
        is_exports=True,
    )


def _read_seam(
    source: Source,
    file: str,
    qualname: str,
    node: Function,
    imports: Sequence[ast.Import | ast.ImportFrom],
) -> Seam:
    patch, base = _mark(node, f"{qualname} in the seams of {file}")
    body = node.body[1:] if docstring(node) else node.body
    goes_on = [i for i, stmt in enumerate(body) if _is_ellipsis(stmt)]
    if goes_on not in ([], [len(body) - 1]):
        raise PatchError(
            f"Expected the lone `...` of {qualname} in the seams of {file} to be its last statement, "
            "since upstream's body goes on where the seam ends."
        )
    first = _first_line(source, node)
    last = body[-1].lineno if goes_on else end_line(node) + 1
    params = {n: p for n, p in Signature(source, node).params.items() if n not in "*/"}
    adds = {a.arg for a in node.args.kwonlyargs if a.annotation}
    return Seam(
        patch=patch,
        file=file,
        qualname=qualname,
        base=base,
        needs=tuple(name for name in params if name not in adds),
        adds={name: text for name, text in params.items() if name in adds},
        doc=_doc(node),
        prologue=textwrap.dedent(source.lines(first, last)),
        replaces_body=not goes_on,
        imports=tuple(ast.unparse(s) for s in imports if _binds(s) & _names(body)),
    )


def _read_class_seam(
    source: Source,
    file: str,
    qualname: str,
    node: ast.ClassDef,
    imports: Sequence[ast.Import | ast.ImportFrom],
) -> Seam:
    patch, base = _mark(node, f"{qualname} in the seams of {file}")
    adds = assigned(node)
    if list(adds.values()) != node.body:
        raise PatchError(
            f"Expected the class {qualname} in the seams of {file} to hold assignments to one name each and nothing "
            "else. (Did you mean to mark its methods as seams?)"
        )
    return Seam(
        patch=patch,
        file=file,
        qualname=qualname,
        base=base,
        needs=(),
        adds={name: ast.unparse(stmt) for name, stmt in adds.items()},
        doc="",
        prologue=textwrap.dedent(
            source.lines(_first_line(source, node), end_line(node) + 1)
        ),
        replaces_body=False,
        imports=tuple(ast.unparse(s) for s in imports if _binds(s) & _names(node.body)),
        is_class=True,
    )


def _first_line(source: Source, node: Definition) -> int:
    """The line where the body begins, with the comments above its first statement."""
    first = body_line(node)
    while source.lines(first - 1, first).lstrip().startswith("#"):
        first -= 1
    return first


def _mark(node: Definition, where: str) -> tuple[str, tuple[str, ...]]:
    """Arguments of the ``@seam(patch, base=(...))`` decorator."""
    for mark in node.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "seam":
            patch = ast.literal_eval(mark.args[0])
            (base,) = (ast.literal_eval(k.value) for k in mark.keywords)
            return patch, base
    raise PatchError(f"Expected {where} to be decorated with @seam(patch, base=...).")


def _doc(node: Function) -> str:
    """The docstring less the margin of the body, so that a section which opens it keeps its indentation."""
    literal = docstring(node)
    text = str(literal.value) if literal else ""
    return text.replace("\n" + " " * node.body[0].col_offset, "\n").strip()


def _is_ellipsis(stmt: ast.stmt) -> bool:
    return isinstance(stmt, ast.Expr) and (
        isinstance(stmt.value, ast.Constant) and stmt.value.value is ...
    )


def _binds(stmt: ast.Import | ast.ImportFrom) -> set[str]:
    return {(alias.asname or alias.name).split(".")[0] for alias in stmt.names}


def _names(body: Iterable[ast.stmt]) -> set[str]:
    nodes = (node for stmt in body for node in ast.walk(stmt))
    return {node.id for node in nodes if isinstance(node, ast.Name)}
