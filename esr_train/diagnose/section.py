"""What every diagnostic is: a measurement that becomes JSON, and how that is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esr_train.diagnose.bench import Bench
from esr_train.report.figures import Picture
from esr_train.report.tables import Table

Result = dict[str, Any]  # numbers, text and lists of them: what JSON can hold


@dataclass(frozen=True)
class Shown:
    """A section of the report."""

    findings: list[str]  # sentences with the numbers that they rest on
    tables: list[tuple[str, Table]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A diagnostic; everything that is shown is computed from the result alone."""

    name: str
    title: str
    question: str  # what is measured, and on what
    measure: Callable[[Bench], Result]
    show: Callable[[Result, Path], Shown]  # writes figures into the folder
