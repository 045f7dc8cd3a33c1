"""From upstream's source text and the seams of that file, make the patched source text.

Both appliers (graft, tree) and the export start from this text, so what runs is what is sent upstream. Nothing of
upstream's text is lost: parameters are added to a signature, sections to a docstring, and a prologue before a body,
with the indentation and the wrapping that the file has; assignments go to the end of a class. Only a seam without a
lone ``...`` replaces a body.

Whether a seam still fits upstream's function is not decided here but in ``_drift.py``.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from torch_ext._error import PatchError
from torch_ext._seam import Seam
from torch_ext._signature import Signature
from torch_ext._source import assigned, body_line, docstring, end_line, Source


Edit = tuple[int, int, str]  # replace text[start:end]


def splice(source: Source, seams: Iterable[Seam]) -> str:
    """Return the text of ``source`` with ``seams`` (of this file, in the order of the series) worked in."""
    by_function: dict[str, list[Seam]] = {}
    imports: dict[str, None] = {}
    for seam in seams:
        by_function.setdefault(seam.qualname, []).append(seam)
        imports.update(dict.fromkeys(seam.imports))
    edits = [
        edit
        for group in by_function.values()
        for edit in _edits_of(group[0])(source, group)
    ]
    if imports:
        at = source.offset(source.import_line())
        edits.append((at, at, "".join(f"{line}\n" for line in imports)))
    text = source.text
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _edits(source: Source, seams: Sequence[Seam]) -> list[Edit]:
    """The edits of one function."""
    where = seams[0]
    node = source.functions.get(where.qualname)
    if node is None:
        raise PatchError(f"Expected {where.file} to define {where.qualname}.")
    if node.body[0].lineno == node.lineno:
        raise PatchError(f"Expected the body of {where} to stand on lines of its own.")
    if any(seam.replaces_body for seam in seams[:-1]):
        raise PatchError(f"Expected only the last seam of {where} to replace its body.")
    edits = []
    signature = Signature(source, node)
    have = signature.params
    for seam in seams:
        if not have.keys() >= set(seam.needs) or have.keys() & seam.adds.keys():
            raise PatchError(
                f"Expected {where} to have the parameters {list(seam.needs)} and to lack the annotated "
                f"ones {list(seam.adds)}, got {list(have)}."
            )
    new = [text for seam in seams for text in seam.adds.values()]
    if new:
        edits.append(signature.add(new))

    margin = " " * node.body[0].col_offset
    prologue = "".join(seam.prologue for seam in seams)
    docs = [seam.doc for seam in seams if seam.doc]
    literal = docstring(node)
    if docs and literal is None:
        prologue = '"""' + "\n\n".join(docs) + '\n"""\n' + prologue
    elif docs and literal is not None:
        start, end = source.span(literal)
        edits.append((start, end, merge_docs(source.text[start:end], docs, margin)))
    start = end = source.offset(body_line(node))
    if seams[-1].replaces_body:
        end = source.offset(end_line(node) + 1)
    edits.append((start, end, textwrap.indent(prologue, margin)))
    return edits


def _edits_of(seam: Seam) -> Callable[[Source, Sequence[Seam]], list[Edit]]:
    if seam.is_exports:
        return _export_edits
    return _class_edits if seam.is_class else _edits


def _class_edits(source: Source, seams: Sequence[Seam]) -> list[Edit]:
    """The edit of one class: assignments behind its own."""
    where = seams[0]
    node = source.classes.get(where.qualname)
    if node is None:
        raise PatchError(f"Expected {where.file} to define the class {where.qualname}.")
    if node.body[0].lineno == node.lineno:
        raise PatchError(f"Expected the body of {where} to stand on lines of its own.")
    have = set(assigned(node))
    for seam in seams:
        if have & seam.adds.keys():
            raise PatchError(
                f"Expected {where} to lack {list(seam.adds)}, got {sorted(have)}."
            )
        have |= seam.adds.keys()
    at = source.offset(end_line(node) + 1)
    text = "".join(seam.prologue for seam in seams)
    return [(at, at, textwrap.indent(text, " " * node.body[0].col_offset))]


def _export_edits(source: Source, seams: Sequence[Seam]) -> list[Edit]:
    """The edit of ``__all__``, if there is one: names behind those that it has."""
    if not source.has_all:
        return []
    where = seams[0]
    node = source.exports
    if node is None or not node.elts:
        raise PatchError(f"Expected {where.file} to assign a list to __all__.")
    at = source.offset(end_line(node.elts[-1]) + 1)
    margin = " " * node.elts[0].col_offset
    names = [name for seam in seams for name in seam.adds]
    return [(at, at, "".join(f'{margin}"{name}",\n' for name in names))]


def merge_docs(literal: str, docs: Iterable[str], margin: str) -> str:
    """Work the seams' docstrings into upstream's string literal.

    A first line that is a call (``load(f, ...)``) replaces upstream's, a section such as ``Args:`` goes to the end of
    upstream's section of that name, a directive such as ``.. note::`` behind the last of its kind, and everything else
    goes to the end.
    """
    match = re.fullmatch(r'([rR]?""")(.*)"""', literal, re.DOTALL)
    if match is None:
        raise PatchError(
            f'Expected a docstring to open with """ or r""", got {literal[:20]!r}.'
        )
    opening, body = match.groups()
    lines = body.rstrip().split("\n")
    for doc in docs:
        if '"""' in doc or ("\\" in doc and opening == '"""'):
            raise PatchError(
                f"Expected a seam's docstring without quotes and escapes, got {doc!r}."
            )
        _merge_doc(lines, doc, margin)
    ending = f"\n{margin}" if len(lines) > 1 else ""
    return opening + "\n".join(lines) + ending + '"""'


def _merge_doc(lines: list[str], doc: str, margin: str) -> None:
    sections = re.split(r"\n\n(?=\S)", doc)
    call = re.match(r"\w+\(", sections[0])
    if call and lines[0].startswith(call.group()):
        lines[0] = sections.pop(0)
    for section in sections:
        head, _, rest = section.partition("\n")
        found = [i for i, line in enumerate(lines) if line == margin + head]
        if not (rest and head.endswith(":") and found):
            lines += ["", *textwrap.indent(section, margin).split("\n")]
        elif head.startswith(".. "):
            at = _section_end(lines, found[-1])
            lines[at:at] = ["", *textwrap.indent(section, margin).split("\n")]
        else:
            at = _section_end(lines, found[0])
            lines[at:at] = textwrap.indent(rest, margin).split("\n")


def _section_end(lines: Sequence[str], header: int) -> int:
    """Index behind the last line of the section that ``lines[header]`` opens."""

    def depth(line: str) -> int:
        return len(line) - len(line.lstrip())

    end = header + 1
    for i in range(header + 1, len(lines)):
        if lines[i].strip():
            if depth(lines[i]) <= depth(lines[header]):
                break
            end = i + 1
    return end
