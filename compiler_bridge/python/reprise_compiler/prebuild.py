"""Builds the shared parts of all programs ahead: see toolchain.py.

    python -m reprise_compiler.prebuild FOLDER

Run when Reprise is built. FOLDER is replaced as a whole, so that what is in it is
complete; without a compiler it stays empty, and programs stay interpreted.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from .build_package import PackageBuilder
from .toolchain import ToolchainError


def prebuild(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prebuild-") as scratch:
        made = Path(scratch) / "toolchain"
        made.mkdir()
        try:
            PackageBuilder(scratch).build_toolchain()
        except ToolchainError as error:
            print(f"prebuild: programs will build their shared parts themselves: {error}")
            made = Path(tempfile.mkdtemp(dir=scratch))
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


if __name__ == "__main__":
    prebuild(Path(sys.argv[1]).absolute())
