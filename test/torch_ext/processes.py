"""Start Python processes that import a torch of one's choice, also from a suite that runs in a tree itself."""

import os
import subprocess
import sys


def python(*args, root=None, check=False):
    """Run ``python *args`` with torch from below ``root`` (default: the installed one); text output is captured."""
    ours = ("PYTHONPATH", "TORCH_EXT_TREE", "TORCH_EXT_ENABLE")
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    if root is not None:
        environ["PYTHONPATH"] = str(root)
    done = subprocess.run(
        [sys.executable, *args], env=environ, capture_output=True, text=True
    )
    assert not (check and done.returncode), done.stderr
    return done
