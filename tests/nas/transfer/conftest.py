from __future__ import annotations

import pytest

from nas.data import ImageTask, load_task


@pytest.fixture(scope="session")
def animals(tmp_path_factory: pytest.TempPathFactory) -> ImageTask:
    """200 small silhouettes."""
    return load_task("animals", root=tmp_path_factory.mktemp("unused"), limit=200, image_size=8)
