"""Apply patches to the torch that this process has imported, by swapping the code of functions in place.

The whole patched file is compiled, as Python would compile it from a tree, and the touched functions' code objects are
taken out of it. The function objects stay, so names taken before (``from torch import load``) are patched too, and a
call costs what it did. Law: code objects are equal to a tree's, and undo puts back the very objects that were there.
Options that a patch adds to a config module are for ``_graft_config.py``.

What seams import stays imported after undo: a call in another thread may be about to use it.
"""

import __future__

import importlib
import inspect
import linecache
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch_ext._error import PatchError
from torch_ext._graft_config import plan_options
from torch_ext._on_import import on_import
from torch_ext._seam import Seam
from torch_ext._splice import splice
from torch_ext._upstream import installed


SUFFIX = "+torch_ext"  # NB: behind the file's name, or Dynamo's rules for torch's own files no longer match


@dataclass(frozen=True)
class _State:
    """What a patch swaps of a function object."""

    code: types.CodeType
    kwdefaults: dict[str, Any] | None
    doc: str | None
    annotations: dict[str, Any]

    @classmethod
    def of(cls, f: types.FunctionType) -> "_State":
        return cls(f.__code__, f.__kwdefaults__, f.__doc__, f.__annotations__)

    def put(self, f: types.FunctionType) -> None:
        # NB: another thread may call f at any moment; a default that its code doesn't name is harmless, one that is
        # missing is not.
        f.__kwdefaults__ = {**(f.__kwdefaults__ or {}), **(self.kwdefaults or {})}
        f.__code__ = self.code
        f.__kwdefaults__ = self.kwdefaults
        f.__doc__ = self.doc
        f.__annotations__ = self.annotations


@dataclass
class _Grafted:
    function: types.FunctionType
    original: _State


_grafted: dict[tuple[str, str], _Grafted] = {}  # by (file, qualname): all ever touched
_current: dict[
    str, Sequence[Seam]
] = {}  # by file, of those imported: the seams in force
_exported: dict[str, set[str]] = {}  # by file: public names that are there by a graft


def graft(seams: Iterable[Seam], tree: Iterable[Seam]) -> None:
    """Make exactly ``seams`` (in the series' order) the ones in force, or raise and change nothing.

    ``tree`` are those that the files carry already. A module that has not been imported gets its seams when it is.
    """
    wanted, loaded = by_file(seams), by_file(tree)
    waiting = dict.fromkeys([*_current, *loaded, *wanted])
    arguments = {f: (f, wanted.get(f, []), loaded.get(f, [])) for f in waiting}
    changes: list[Callable[[], None]] = []
    # NB: what a seam imports may import modules that others change.
    while ready := [file for file in waiting if module_name(file) in sys.modules]:
        for file in ready:
            del waiting[file]
            changes += _plan(*arguments[file])
    for change in changes:
        change()
    on_import({module_name(f): partial(_graft_now, *arguments[f]) for f in waiting})


def _graft_now(file: str, seams: Sequence[Seam], loaded: Sequence[Seam]) -> None:
    for change in _plan(file, seams, loaded):
        change()


def by_file(seams: Iterable[Seam]) -> dict[str, list[Seam]]:
    """Seams by the upstream file that they change."""
    files: dict[str, list[Seam]] = {}
    for seam in seams:
        files.setdefault(seam.file, []).append(seam)
    return files


def _plan(
    file: str, seams: Sequence[Seam], loaded: Sequence[Seam]
) -> list[Callable[[], None]]:
    """What brings all of ``file`` that is or will be touched, functions, classes and names, to its new state."""
    before = _current.get(file, loaded)
    if before == seams:
        return []
    module = importlib.import_module(module_name(file))
    text = splice(installed().source(file), seams)
    name = f"{module.__file__}{SUFFIX}"
    code = compile(text, name, "exec", dont_inherit=True)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    for line in dict.fromkeys(line for seam in seams for line in seam.imports):
        exec(line, module.__dict__)

    changes: list[Callable[[], None]] = [partial(_current.__setitem__, file, seams)]
    options = [seam for seam in seams if seam.is_class]
    if options != [seam for seam in before if seam.is_class]:
        changes.append(plan_options(module, code, options))
    if any(seam.is_exports for seam in [*seams, *before]):
        in_tree = {n for seam in loaded if seam.is_exports for n in seam.adds}
        wanted = [n for seam in seams if seam.is_exports for n in seam.adds]
        changes.append(partial(_export, module, file, set(wanted) - in_tree))
    touched = [qualname for f, qualname in _grafted if f == file]
    named = [seam.qualname for seam in seams if seam.is_function]
    for qualname in dict.fromkeys([*touched, *named]):
        grafted = _resolve(module, file, qualname)
        group = [seam for seam in seams if seam.qualname == qualname]
        if group == [seam for seam in loaded if seam.qualname == qualname]:
            changes.append(partial(grafted.original.put, grafted.function))
        else:
            patched = find_code(code, qualname)
            assert patched is not None
            state = _patched(grafted, patched, group)
            changes.append(partial(state.put, grafted.function))
    return changes


def _export(module: types.ModuleType, file: str, names: set[str]) -> None:
    """Let ``names`` be the ones that ``module`` exports by a graft; their imports have run."""
    before = _exported.get(file, set())
    public = getattr(module, "__all__", [*before])
    for name in before - names:
        delattr(module, name)
        public.remove(name)
    public += sorted(names - before)
    _exported[file] = names


def _resolve(module: types.ModuleType, file: str, qualname: str) -> _Grafted:
    """The function object that ``file`` defined as ``qualname``, behind descriptors and wrappers."""
    if (file, qualname) in _grafted:
        return _grafted[file, qualname]
    *outer, name = qualname.split(".")
    owner: Any = module
    for part in outer:
        owner = vars(owner)[part]
    found = vars(owner).get(name)
    function = inspect.unwrap(getattr(found, "__func__", found))
    loader = module.__spec__.loader if module.__spec__ else None
    code = loader.get_code(module.__name__)  # type: ignore[union-attr]
    if getattr(function, "__code__", None) != find_code(code, qualname):
        raise PatchError(
            f"Expected {module.__name__}.{qualname} to be the function that {file} defines, got {function!r}. "
            "(Did another library replace it? Enable torch_ext before that library is imported.)"
        )
    grafted = _Grafted(function, _State.of(function))
    _grafted[file, qualname] = grafted
    return grafted


def _patched(grafted: _Grafted, code: types.CodeType, seams: Sequence[Seam]) -> _State:
    original, function = grafted.original, grafted.function
    if code.co_freevars != original.code.co_freevars:
        raise PatchError(
            f"Expected the seams of {seams[0]} to use the same closure as upstream "
            f"{original.code.co_freevars}, got {code.co_freevars}. (Did you mean to name the class "
            "instead of calling super() without arguments? A tree can run it as it is.)"
        )
    new = [text for seam in seams for text in seam.adds.values()]
    kwdefaults, annotations = _evaluate(new, function)
    returns = {k: v for k, v in original.annotations.items() if k == "return"}
    closure = function.__closure__
    return _State(
        code=code,
        kwdefaults={**(original.kwdefaults or {}), **kwdefaults} or None,
        doc=types.FunctionType(code, function.__globals__, closure=closure).__doc__,
        annotations={**original.annotations, **annotations, **returns},
    )


def _evaluate(
    params: Iterable[str], function: types.FunctionType
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defaults and annotations of new keyword-only parameters, evaluated where the function was defined."""
    text = ", ".join(params)
    if not text:
        return {}, {}
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(
        f"def f(*, {text}): pass", "<seam>", "exec", flags, dont_inherit=True
    )
    namespace: dict[str, Any] = {}
    exec(code, function.__globals__, namespace)
    f = namespace["f"]
    return f.__kwdefaults__ or {}, f.__annotations__


def find_code(code: types.CodeType, qualname: str) -> types.CodeType | None:
    """The code object of ``qualname`` in a module's code; of several definitions (overloads) the last."""
    found: types.CodeType | None = code
    for name in qualname.split("."):
        nested = (
            [c for c in found.co_consts if isinstance(c, types.CodeType)]
            if found
            else []
        )
        found = next((c for c in reversed(nested) if c.co_name == name), None)
    return found


def module_name(file: str) -> str:
    """``"torch/nn/modules/module.py"`` -> ``"torch.nn.modules.module"``."""
    parts = Path(file).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
