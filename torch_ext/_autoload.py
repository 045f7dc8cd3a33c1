"""What torch calls at the end of its import: enables the patches that ``python -m torch_ext run`` asks for.

torch loads the entry points of the group ``torch.backends`` (pytorch #122468). Without the environment variable this
does nothing, and imports nothing of the machinery.
"""

import os


VARIABLE = "TORCH_EXT_ENABLE"  # names of patches, separated by commas


def autoload() -> None:
    """Enable the patches named in the environment variable ``TORCH_EXT_ENABLE``."""
    names = os.environ.get(VARIABLE)
    if names:
        from torch_ext._queue import enable

        enable(*names.split(","))
