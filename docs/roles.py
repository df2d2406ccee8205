"""Docstrings mark code as Sphinx does; here it becomes Markdown."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object

from servegym.agents.catalogue import markdown


class Roles(Extension):
    """Rewrites the docstring of every object before it is parsed."""

    def on_instance(self, *, obj: Object, **arguments: Any) -> None:
        """Rewrite a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
