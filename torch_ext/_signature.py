"""A function's parameter list as text: what it names, and how to add keyword-only parameters to it.

Upstream's parameters stay as they are written. The list is wrapped anew only where the formatter of pytorch would.
"""

import io
import tokenize
from collections.abc import Iterable

from torch_ext._source import Function, Source


LINE_LENGTH = 88  # of pytorch's formatter


class Signature:
    """The parameter list of ``node``, cut at its outer commas."""

    def __init__(self, source: Source, node: Function) -> None:
        self._text = source.text
        self._indent = node.col_offset
        self._line = source.offset(node.lineno)
        self._spans: list[tuple[int, int]] = []
        self._has_comment = False
        self._open = self._close = 0
        self._cut(source, node)

    def _cut(self, source: Source, node: Function) -> None:
        text = source.text[self._line :]
        depth = 0
        span: list[int] = []  # where the current parameter's tokens begin and end
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            at = source.offset(node.lineno + token.start[0] - 1) + token.start[1]
            if token.type in (tokenize.COMMENT, tokenize.NL):
                self._has_comment |= token.type == tokenize.COMMENT
                continue
            if token.string in (")", "]", "}"):
                depth -= 1
            if (depth, token.string) in ((1, ","), (0, ")")):
                if span:
                    self._spans.append((span[0], span[-1]))
                span = []
            elif depth > 0:
                span += [at, at + len(token.string)]
            if token.string in ("(", "[", "{"):
                self._open = at + 1 if depth == 0 else self._open
                depth += 1
            if (depth, token.string) == (0, ")"):
                self._close = at
                return

    @property
    def params(self) -> dict[str, str]:
        """Source text of each parameter by its name; markers and ``*args`` stand under their own text."""
        texts = [self._text[start:end] for start, end in self._spans]
        return {_name(text): text for text in texts}

    def add(self, new: Iterable[str]) -> tuple[int, int, str]:
        """The edit (start, end, text) that adds keyword-only parameters."""
        params = list(self.params.values())
        at = len(params) - any(p.startswith("**") for p in params)
        new = list(new)
        if not any(p.startswith("*") for p in params[:at]):
            new = ["*", *new]
        if self._has_comment:  # wrapping anew would lose it
            end = self._spans[at - 1][1]
            return end, end, "".join(f", {p}" for p in new)
        params[at:at] = new
        return self._open, self._close, self._wrap(params)

    def _wrap(self, params: list[str]) -> str:
        head = self._text[self._line : self._open]
        tail = self._text[self._close :].split("\n", 1)[0]
        behind_last = (
            self._text[self._spans[-1][1] : self._close] if self._spans else ""
        )
        outer, inner = " " * self._indent, " " * (self._indent + 4)
        line = ", ".join(params)
        if not behind_last.startswith(","):  # else it was one to a line, and stays so
            if len(head + line + tail) <= LINE_LENGTH:
                return line
            if len(inner + line) <= LINE_LENGTH:
                return f"\n{inner}{line}\n{outer}"
        return "\n" + "".join(f"{inner}{p},\n" for p in params) + outer


def _name(param: str) -> str:
    return param.split(":", 1)[0].split("=", 1)[0].strip()
