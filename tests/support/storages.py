"""Marks for tests that ask for `storage_root` but start Ray: one storage is enough where another test covers both."""

from __future__ import annotations

import pytest

ON_DISK = pytest.mark.parametrize("storage_root", ["local"], indirect=True)
ON_S3 = pytest.mark.parametrize("storage_root", ["s3"], indirect=True)
