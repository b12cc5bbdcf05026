"""What the sdist and the wheel must hold, and nothing else: python check_archives.py SOURCE DIST

The wheel has every file of the two packages and its own metadata. The sdist has these, and what a
user reads and runs beside them.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = ("esr_kernels", "esr_train")
BESIDE = ("configs", "examples")
FILES = {"README.md", "CHANGELOG.md", "LICENSE", "constraints.txt", "pyproject.toml", "MANIFEST.in"}
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools


def files_of(source: Path, folders: tuple[str, ...]) -> set[str]:
    """Paths of all files below the folders of a source tree."""
    return {
        str(path.relative_to(source))
        for folder in folders
        for path in (source / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def differences(source: Path, dist: Path) -> list[str]:
    """What an archive lacks or has too much; empty if both are right."""
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        members = [member.name.partition("/")[2] for member in archive if member.isfile()]
    in_sdist = {name for name in members if ".egg-info/" not in name} - MADE
    wanted = {
        wheel.name: (in_wheel, files_of(source, PACKAGES)),
        sdist.name: (in_sdist, files_of(source, PACKAGES + BESIDE) | FILES),
    }
    return [
        f"{name}: {what} {sorted(names)}"
        for name, (has, wants) in wanted.items()
        for what, names in (("lacks", wants - has), ("should not have", has - wants))
        if names
    ]


def main() -> int:
    """Print the differences; 1 if there are any."""
    found = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
