"""For `make docs`: sections of docstrings that Google's style does not have, such as "Memory: ...",
become paragraphs. Griffe would take the first line of each for the title of a box.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAMES = "Exactness|Memory|Gradients|Reference|Limits|Source"
_SECTION = re.compile(rf"^({_NAMES}): (.*(?:\n {{4}}.*)*)", re.MULTILINE)


def as_paragraphs(docstring: str) -> str:
    """The docstring with each such section a paragraph of its own, its lines not indented.

    `Example:` becomes Google's `Examples:`, which has its lines as code.
    """
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    return _SECTION.sub(
        lambda found: f"\n**{found[1]}.** " + re.sub(r"\n {4}", "\n", found[2]) + "\n", docstring
    )


class Sections(griffe.Extension):
    """Rewrites every docstring that Griffe reads."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_paragraphs(obj.docstring.value)
