"""Write the series as a mailbox that ``git am`` takes in a pytorch checkout.

Git itself makes it: the touched upstream files are committed to a scratch repository, then each patch on top, with its
new files and tests; an RFC rides below the ``---`` line, where reviewers see it and the commit message does not.
"""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch_ext._drift import seams_of
from torch_ext._error import PatchError
from torch_ext._series import Patch
from torch_ext._tree import patched_files
from torch_ext._upstream import Upstream


def export(out: Path, patches: Sequence[Patch], upstream: Upstream) -> None:
    """Write the mailbox of ``patches``, in the series' order, to the file ``out``."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _git(root, "init", "--quiet")
        touched = {seam.file for patch in patches for seam in seams_of(patch)}
        _write(root, {file: upstream.source(file).text for file in touched})
        _commit(root, f"torch {upstream.version()}")
        for i, patch in enumerate(patches):
            _write(root, patched_files(patches[: i + 1], upstream))
            _write(root, {test: _read(patch, test) for test in patch.tests})
            _commit(root, f"{patch.subject}\n\n{patch.rationale}")
            if patch.rfc:
                _git(root, "notes", "add", "-m", _read(patch, patch.rfc))
        mailbox = _git(
            root,
            "format-patch",
            "--stdout",
            "--notes",
            "--full-index",
            "--no-signature",
            f"HEAD~{len(patches)}",
        )
    out.write_text(mailbox, encoding="utf-8")


def _read(patch: Patch, file: str) -> str:
    try:  # NB: tests and RFCs are part of the repository, not of the package
        return (patch.root.parent / file).read_text(encoding="utf-8")
    except OSError as e:
        raise PatchError(
            f"Expected {file} beside the package: {e}. (Did you mean to export from a checkout of torch_ext?)"
        ) from e


def _write(root: Path, files: dict[str, str]) -> None:
    for file, text in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")


def _commit(root: Path, message: str) -> None:
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", message)


def _git(root: Path, *args: str) -> str:
    """Run git as the user who stages the patches, or under the project's name where no user is configured."""
    environ = dict(os.environ)
    if subprocess.run(["git", "config", "user.email"], capture_output=True).returncode:
        for who in ("AUTHOR", "COMMITTER"):
            environ |= {
                f"GIT_{who}_NAME": "torch_ext",
                f"GIT_{who}_EMAIL": "torch_ext@localhost",
            }
    done = subprocess.run(
        ["git", "-c", "commit.gpgsign=false", *args],
        cwd=root,
        env=environ,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PatchError(f"git {args[0]} failed:\n{done.stderr}")
    return done.stdout
