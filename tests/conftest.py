"""What every test needs: an own cache, no progress output, and as few threads as the small tensors can use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from prefopt.core import progress

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share the cores

settings.register_profile("untimed", deadline=None)  # a busy machine makes no property false
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder that starts empty, so that no test finds what an earlier session computed."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def quiet() -> None:
    progress.set_quiet(True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def fp32_unless_asked() -> Iterator[None]:
    """What a test expects of `precision: auto` does not depend on whether this machine multiplies bf16."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            patch.setattr("prefopt.model.precision.native_bf16", lambda device: device.type != "cpu")
        yield


@pytest.fixture
def shared() -> Path:
    """Folder of real rows and models that the project does not ship; skips where there is none."""
    folder = Path(os.environ.get("PREFOPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip("no folder with shared data (set PREFOPT_SHARED)")
    return folder
