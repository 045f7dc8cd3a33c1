"""TorchScript archives look like files of ``torch.save``, and are refused with what they are."""

import os
import zipfile


def refuse_torchscript(path: str) -> None:
    """Raise RuntimeError if ``path`` is what ``torch.jit.save`` wrote."""
    if _is_torchscript(path):
        raise RuntimeError(
            "Expected a file of weights, got a TorchScript archive. (Did you mean torch.jit.load?)"
        )


def _is_torchscript(path: str) -> bool:
    if not (os.path.isfile(path) and zipfile.is_zipfile(path)):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
