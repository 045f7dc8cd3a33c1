"""Splice: nothing of upstream's text is lost, and what is added looks as if upstream's formatter had written it."""

import textwrap
from pathlib import Path

import pytest
from torch.testing._internal.common_utils import run_tests, TestCase

from torch_ext import PatchError
from torch_ext._seam import read_seam_file
from torch_ext._source import Source
from torch_ext._splice import merge_docs, splice


def spliced(tmp_path, upstream, seams):
    path = tmp_path / "seams.py"
    path.write_text(textwrap.dedent(seams))
    return splice(Source(textwrap.dedent(upstream)), read_seam_file(path, "torch/f.py"))


class TestSplice(TestCase):
    @pytest.fixture(autouse=True)
    def _tmp_path(self, tmp_path: Path):
        self.tmp_path = tmp_path

    def splice(self, upstream, seams):
        return spliced(self.tmp_path, upstream, seams)

    def test_prologue_comes_behind_the_docstring(self):
        out = self.splice(
            '''
            import os

            def f(a, b=1):
                # a comment of upstream's
                """Doc."""
                return a
            ''',
            """
            from torch import _new
            from torch import _unused
            @seam("p", base=())
            def f(b, *, c: int = 2):
                # why
                if c:
                    return _new.f(b)
                ...
            """,
        )
        self.assertExpectedInline(
            out,
            '''\

import os
from torch import _new

def f(a, b=1, *, c: int = 2):
    # a comment of upstream's
    """Doc."""
    # why
    if c:
        return _new.f(b)
    return a
''',
        )

    def test_wraps_as_the_formatter_does(self):
        seams = """
        @seam("p", base=())
        def f(*, a_new_argument: bool = False): ...
        """
        name = "x" * 20
        for upstream, signature in (
            (
                f"def f({name}, **kw):\n    pass\n",
                f"def f({name}, *, a_new_argument: bool = False, **kw):",
            ),
            (
                f"def f({name}, {name}1=(1, 2)):\n    pass\n",
                f"def f(\n    {name}, {name}1=(1, 2), *, a_new_argument: bool = False\n):",
            ),
            (
                f"def f({name}, {name}1, {name}2):\n    pass\n",
                f"def f(\n    {name},\n    {name}1,\n    {name}2,\n    *,\n    a_new_argument: bool = False,\n):",
            ),
            (
                "def f(\n    a,\n    *,\n    b=1,\n):\n    pass\n",
                "def f(\n    a,\n    *,\n    b=1,\n    a_new_argument: bool = False,\n):",
            ),
            ("def f():\n    pass\n", "def f(*, a_new_argument: bool = False):"),
            (
                "def f(a, /):\n    pass\n",
                "def f(a, /, *, a_new_argument: bool = False):",
            ),
            (
                "def f(*args):\n    pass\n",
                "def f(*args, a_new_argument: bool = False):",
            ),
            (
                "def f(  # type: ignore\n    a=(1), # b\n):\n    pass\n",
                "def f(  # type: ignore\n    a=(1), *, a_new_argument: bool = False, # b\n):",
            ),
        ):
            out = self.splice(upstream, seams)
            self.assertEqual(out, f"{signature}\n    pass\n")
            compile(out, "f", "exec")

    def test_columns_are_bytes_for_ast_and_characters_for_us(self):
        out = self.splice(
            'def f(a="é€𝄞", b="é"): # é\n    """é"""; x = 1\n    return a\n',
            '@seam("p", base=())\ndef f(*, c: str = "ü"):\n    ...\n',
        )
        self.assertTrue(out.startswith('def f(a="é€𝄞", b="é", *, c: str = "ü"): # é\n'))

    def test_last_definition_is_the_one_that_counts(self):
        out = self.splice(
            """
            @overload
            def f(a: int) -> int: ...
            def f(a):
                return a
            """,
            '@seam("p", base=())\ndef f(a):\n    a = 2\n    ...\n',
        )
        self.assertIn("def f(a):\n    a = 2\n    return a", out)

    def test_two_seams_of_one_function(self):
        seams = "".join(
            f'@seam("{name}", base=())\ndef f(*, {name}: int = 1):\n    print({name})\n    ...\n'
            for name in "pq"
        )
        self.assertExpectedInline(
            self.splice("def f():\n    pass\n", seams),
            """\
def f(*, p: int = 1, q: int = 1):
    print(p)
    print(q)
    pass
""",
        )

    def test_docs_go_to_the_section_of_their_name(self):
        upstream = '''r"""load(f)

    Loads.

    Args:
        f: a file
            or a path

    Returns:
        what was saved
    """'''
        doc = "load(f, *, lazy=False)\n\nArgs:\n    lazy: read nothing\n\nExample::\n\n    >>> load(f, lazy=True)"
        self.assertExpectedInline(
            merge_docs(upstream, [doc], "    "),
            '''\
r"""load(f, *, lazy=False)

    Loads.

    Args:
        f: a file
            or a path
        lazy: read nothing

    Returns:
        what was saved

    Example::

        >>> load(f, lazy=True)
    """''',
        )

    def test_directives_follow_their_kind(self):
        upstream = """\"\"\"save(f)

    .. note::
        One.

    .. note::
        Two.

    Example:
        >>> save(f)
    \"\"\""""
        self.assertExpectedInline(
            merge_docs(upstream, [".. note::\n    Three."], "    "),
            '''\
"""save(f)

    .. note::
        One.

    .. note::
        Two.

    .. note::
        Three.

    Example:
        >>> save(f)
    """''',
        )

    def test_refusals(self):
        upstream = 'def f(a):\n    """Doc."""\n    return a\n\ndef g(a): return a\n'
        for seams, message in (
            ("def f(a):\n    ...\n", "decorated with @seam"),
            (
                '@seam("p", base=())\ndef f(a):\n    ...\n    a = 1\n',
                "to be its last statement",
            ),
            (
                '@seam("p", base=())\ndef f(b):\n    ...\n',
                r"to have the parameters \['b'\].*got \['a'\]",
            ),
            ('@seam("p", base=())\ndef h():\n    ...\n', "to define h"),
            ('@seam("p", base=())\ndef g(a):\n    ...\n', "on lines of its own"),
            (
                '@seam("p", base=())\ndef f(a):\n    "a \\\\n escape"\n    ...\n',
                "without quotes and escapes",
            ),
        ):
            with self.assertRaisesRegex(PatchError, message):
                self.splice(upstream, seams)

    def test_assignments_go_to_the_end_of_a_class(self):
        out = self.splice(
            """
            import sys

            class load:
                mmap: bool = False

            class save:
                class inner:
                    a = 1
            """,
            """
            from os import sep
            from torch_ext.seams import seam
            @seam("p", base=())
            class load:
                # what it is for
                # and why
                lazy: bool = True
                folder = sep  # none

            class save:
                @seam("q", base=())
                class inner:
                    b = 2
            """,
        )
        self.assertExpectedInline(
            out,
            """\

import sys
from os import sep

class load:
    mmap: bool = False
    # what it is for
    # and why
    lazy: bool = True
    folder = sep  # none

class save:
    class inner:
        a = 1
        b = 2
""",
        )

    def test_classes_that_do_not_fit(self):
        upstream = "class A:\n    a: int = 1\n\nclass B: b = 1\n"
        mark = '@seam("p", base=())\n'
        for seams, message in (
            (f"{mark}class A:\n    a = 2\n", r"A in torch/f.py to lack \['a'\]"),
            (f"{mark}class B:\n    a = 2\n", "on lines of its own"),
            (f"{mark}class C:\n    a = 2\n", "to define the class C"),
            (f"{mark}class A:\n    b, c = 1, 2\n", "assignments to one name each"),
            (f"{mark}class A:\n    def f(self):\n        ...\n", "mark its methods"),
        ):
            with self.assertRaisesRegex(PatchError, message):
                self.splice(upstream, seams)

    def test_fingerprint_is_of_the_code_alone(self):
        base = Source("def f(a):\n    return a\n").fingerprint("f")
        same = Source('# moved\n\ndef f(a):\n    """Doc."""\n    return (a)  # why\n')
        self.assertEqual(same.fingerprint("f"), base)
        self.assertNotEqual(Source("def f(a):\n    return b\n").fingerprint("f"), base)
        self.assertNotEqual(
            Source("def f(a, b=1):\n    return a\n").fingerprint("f"), base
        )
        self.assertIsNone(Source("").fingerprint("f"))
        base = Source("class A:\n    a = 1\n").fingerprint("A")
        same = Source('class A:\n    """Doc."""\n\n    a = 1  # why\n')
        self.assertEqual(same.fingerprint("A"), base)
        self.assertNotEqual(Source("class A:\n    a = 2\n").fingerprint("A"), base)


if __name__ == "__main__":
    run_tests()
