"""The patches of ``kinds_of_seams.py`` as the series, for the tests of the machinery."""

from unittest import mock

import kinds_of_seams as kinds
import pytest

import torch_ext
from torch_ext import _drift, _queue
from torch_ext._upstream import installed


def _fingerprints(series):
    return {
        patch.name: installed().source(seam.file).fingerprint(seam.qualname)
        for patch in series
        for seam in _drift.seams_of(patch)
    }


@pytest.fixture(scope="session")
def test_series(tmp_path_factory):
    draft = kinds.make_series(
        tmp_path_factory.mktemp("draft"), dict.fromkeys(kinds.NAMES, "")
    )
    return kinds.make_series(tmp_path_factory.mktemp("series"), _fingerprints(draft))


@pytest.fixture
def use_test_series(test_series):
    with mock.patch.object(_queue, "series", test_series):
        yield
        torch_ext.disable()
        assert torch_ext.enabled() == ()
