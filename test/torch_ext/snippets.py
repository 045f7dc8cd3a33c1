"""The snippets of the documents and docstrings; ``python snippets.py NAME`` runs one, as it is printed.

What a snippet uses and does not define comes from ``CONTEXT``, which imports only what defines it.
"""

import ast
import doctest
import re
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from hypothesis import settings


REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "rfcs/*.md")
# NB: the docstrings of torch_ext.testing are run by test_testing.py.
SOURCES = ("torch_ext/*.py", "torch_ext/seams/**/*.py", "torch_ext/overlay/**/*.py")

CONTEXT = {
    "Model": """
class Model(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, config)
        layers = [torch.nn.Linear(config, config) for _ in range(2)]
        self.layers = torch.nn.ModuleList(layers)
        self.register_buffer("column", torch.arange(5.0), persistent=False)
""",
    "Transformer": "Transformer = Model",
    "config": "config = 4",
    "model": "model = Model(config)",
    "fsdp_model": "fsdp_model = Model(config)",
    "optimizer": "optimizer = torch.optim.AdamW(model.parameters())",
    "sd": 'sd = torch.load("model.pt", lazy=True)',
    "state_dict": "state_dict = model.state_dict()",
    "fully_shard": """
from torch.distributed import HashStore, init_process_group
from torch.distributed.fsdp import fully_shard
init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
""",
    "fail_together": "from torch.distributed.errors import fail_together",
    "ranks": "ranks = [0]",
    "dcp": "import torch.distributed.checkpoint as dcp",
    "StorageReader": "from torch.distributed.checkpoint import StorageReader",
    "TorchSaveReader": "from torch.distributed.checkpoint import TorchSaveReader",
    **{
        name: f"from torch.distributed.checkpoint.{module} import {name}"
        for name, module in {
            "dcp_to_safetensors": "format_utils",
            "dcp_to_torch_save": "format_utils",
            "get_model_state_dict": "state_dict",
            "get_optimizer_state_dict": "state_dict",
            "set_model_state_dict": "state_dict",
        }.items()
    },
    "fsspec": """
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
class Bucket(MemoryFileSystem):
    protocol = "s3"
    store, pseudo_dirs = {}, [""]
fsspec.register_implementation("s3", Bucket, clobber=True)
with fsspec.open("s3://bucket/model.pt", "wb") as target:
    target.write(open("model.pt", "rb").read())
""",
    "rank": "rank = 0",
    "world": "world = 2",
    "ranges_of": "from torch._load_lazy._ranges import ranges_of",
}


class Snippet(NamedTuple):
    """A piece of a document, or the examples of a docstring."""

    name: str  # the file, and the line at which it begins
    text: str
    is_docstring: bool

    @property
    def code(self):
        """Its Python."""
        if not self.is_docstring:
            return self.text
        return "".join(example.source for example in self.examples())

    def examples(self):
        # NB: torch's docstrings have comments without a prompt, between the examples.
        text = re.sub(r"^( *)# ", r"\1>>> # ", self.text, flags=re.MULTILINE)
        return doctest.DocTestParser().get_examples(text, self.name)


def snippets():
    """All of them, by name."""
    found = [*_of_documents(), *_of_docstrings()]
    return {snippet.name: snippet for snippet in found}


def _of_documents():
    for pattern in DOCUMENTS:
        for path in sorted(REPOSITORY.glob(pattern)):
            text = path.read_text()
            for match in re.finditer(
                r"^( *)```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL
            ):
                indent, code = match.groups()
                code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
                yield Snippet(
                    _name(path, text.count("\n", 0, match.start())), code, False
                )


def _of_docstrings():
    for pattern in SOURCES:
        for path in sorted(REPOSITORY.glob(pattern)):
            for node in ast.walk(ast.parse(path.read_text())):
                kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
                text = ast.get_docstring(node) if isinstance(node, kinds) else None
                if text and ">>> " in text:
                    yield Snippet(_name(path, getattr(node, "lineno", 0)), text, True)


def _name(path, line):
    return f"{path.relative_to(REPOSITORY)}:{line}"


def context_of(code, known=()):
    """The code that defines what ``code`` uses and does not define."""
    known, pieces = {*known, *_defined(code)}, []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and node.id in CONTEXT.keys() - known:
            piece = CONTEXT[node.id]
            pieces += [context_of(piece, known), piece]
            known.update(_defined("\n".join(pieces)))
    return "\n".join(pieces)


def _defined(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def run(snippet):
    """Run a snippet in this process, in a folder that has the files that it names."""
    import torch

    import torch_ext

    if "torch_ext.enable()" not in snippet.code:
        torch_ext.enable()
    names = {"torch": torch, "torch_ext": torch_ext, "__name__": "__main__"}
    exec(context_of(snippet.code), names)
    if not snippet.is_docstring:
        exec(compile(snippet.text, snippet.name, "exec"), names)
        for test in [value for name, value in names.items() if name[:5] == "test_"]:
            settings(max_examples=20, deadline=None)(test)()
        return
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for example in snippet.examples():
        with redirect_stdout(StringIO()) as out:
            exec(compile(example.source, snippet.name, "single"), names)
        # NB: torch's docstrings do not show what most examples print.
        if example.want and not doctest.OutputChecker().check_output(
            example.want, out.getvalue(), flags
        ):
            raise AssertionError(f"expected {example.want!r}, got {out.getvalue()!r}")


if __name__ == "__main__":
    run(snippets()[sys.argv[1]])
