"""Directives that document what the code holds, and docstrings as this package writes them.

    .. names:: ebm_defense.attacks

       PGD APGD

documents each by autodoc as what it is; `.. commands::` documents the command line, `.. flags::`
every flag.

Docstrings hold Markdown's code spans, in one backtick: the name of something public becomes a link
to it, everything else is code.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger
from sphinx.util.nodes import nested_parse_with_titles

from ebm_defense.commands.main import COMMANDS
from ebm_defense.eval.reporting.flags.registry import FLAGS

LOG = getLogger(__name__)
UNSAID = ("", "None", "()", "False")
"""Defaults that say nothing."""
ROOMS = ("ebm_defense", "ebm_defense.attacks", "ebm_defense.eval")
SPAN = re.compile(r"(?<![`:])`([^`\n]+(?:\n[^`\n]+)?)`(?![`_])")


class Names(SphinxDirective):
    """Document the names in the body, one after the other."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        room = self.arguments[0]
        module = import_module(room)
        source = [
            line
            for name in " ".join(self.content).split()
            for line in described(room, name, getattr(module, name))
        ]
        found = nodes.container()
        self.state.nested_parse(StringList(source, self.env.docname), self.content_offset, found)
        return found.children


class Commands(SphinxDirective):
    """Document every command of the command line, with its options and their defaults."""

    def run(self) -> list[nodes.Node]:
        lines = [line for name in COMMANDS for line in command_lines(name)]
        found = nodes.container()
        # Headings, which a directive may not hold otherwise.
        nested_parse_with_titles(self.state, StringList(lines, self.env.docname), found)
        return found.children


class Flags(SphinxDirective):
    """Document every flag by its name, with the advice that it gives."""

    def run(self) -> list[nodes.Node]:
        entries = ((name, entry[-1]) for name, entry in FLAGS.items())
        lines = [w for name, advice in entries for w in (f"*{name}*", f"   {as_rst(advice)}", "")]
        found = nodes.container()
        self.state.nested_parse(StringList(lines, self.env.docname), self.content_offset, found)
        return found.children


def command_lines(name: str) -> list[str]:
    """Return what is said of a command, as reStructuredText."""
    entry = COMMANDS[name]
    cls = getattr(import_module(f"ebm_defense.commands.{entry.module}"), entry.cls)
    title = f"ebm-defense {name}"
    doc = as_rst(inspect.getdoc(cls) or "").splitlines()
    options = [
        line
        for option in option_docs(cls)
        for line in (option.words, f"   {as_rst(option.doc)}", "")
    ]
    return [title, "-" * len(title), "", *doc, "", *options]


class Option(NamedTuple):
    """An option as it is typed, with its default, and what it does."""

    words: str
    doc: str


def option_docs(cls: type[Any]) -> Iterator[Option]:
    """Yield a command's options, in order, from its class: a docstring stands under each field."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for field, said in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(said, ast.Expr):
            doc = " ".join(ast.literal_eval(said.value).split())
            yield Option(_words(field), doc)


def _words(field: ast.AnnAssign) -> str:
    name = f"--{ast.unparse(field.target).replace('_', '-')}"
    if "Positional" in ast.unparse(field.annotation):
        return f"``{name.removeprefix('--').upper()}``"
    default = "" if field.value is None else ast.unparse(field.value)
    return f"``{name}``" + (f" (``{default}``)" if default not in UNSAID else "")


def described(room: str, name: str, value: Any) -> list[str]:
    """Return autodoc's directive for one name."""
    if inspect.isclass(value):
        return [f".. autoclass:: {room}.{name}", "   :members:", ""]
    if callable(value):
        return [f".. autofunction:: {room}.{name}", ""]
    return [f".. py:data:: {room}.{name}", "", *indented(registry(value)), ""]


def registry(entries: Mapping[str, Any]) -> list[str]:
    """Return a registry's names, each with what it stands for in a sentence."""
    return ["A registry; its names are:", ""] + [
        line for name, entry in entries.items() for line in (f"``{name}``", f"   {_said(entry)}")
    ]


def _said(entry: Any) -> str:
    summary = getattr(entry, "summary", None) or (inspect.getdoc(entry) or "").split("\n\n")[0]
    return as_rst(" ".join(summary.split()))


def indented(lines: Iterable[str]) -> list[str]:
    """Return lines as they stand inside of a directive."""
    return [f"   {line}" for line in lines]


def public() -> dict[str, str]:
    """Return the full name of every public one, by the name alone."""
    return {n: f"{room}.{n}" for room in reversed(ROOMS) for n in import_module(room).__all__}


def markdown_spans(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Turn code spans of Markdown into those of reStructuredText, in place."""
    lines[:] = as_rst("\n".join(lines)).split("\n")


def as_rst(text: str) -> str:
    """Return a docstring with its code spans as reStructuredText has them."""
    known = public()

    def span(match: re.Match[str]) -> str:
        code = " ".join(match[1].split())
        return f":py:obj:`{code} <{known[code]}>`" if code in known else f"``{code}``"

    return SPAN.sub(span, text)


def unknown_parameters(
    app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Warn of a docstring that documents a parameter which is not there."""
    if what not in ("class", "function", "method"):
        return
    try:
        known = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return
    for line in lines:
        match = re.match(r":param \\?\**(\w+):", line)
        if match and match[1] not in known:
            LOG.warning("%s has no parameter %s, which its docstring documents", name, match[1])


def setup(app: Sphinx) -> dict[str, bool]:
    """Tell Sphinx."""
    app.add_directive("names", Names)
    app.add_directive("commands", Commands)
    app.add_directive("flags", Flags)
    # Before napoleon, which also listens, so that it finds no code span of ours.
    app.connect("autodoc-process-docstring", markdown_spans, priority=400)
    app.connect("autodoc-process-docstring", unknown_parameters, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
