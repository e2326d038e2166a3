"""Fill the tables of docs/reference/ from the code.

    python docs/generate_reference.py

A page of the reference holds text written by hand, and places for generated text:

    <!-- generated from: autoreg_pretrain -->
    <!-- end of generated text -->

A name with a dot is a dataclass, whose fields become a table. Any other name is a command, whose
options become a table. A unit test compares the committed pages with what this script writes.
"""

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from nnunet_autoreg.cli.common import COMMON_OPTIONS

REFERENCE = Path(__file__).with_name("reference")
PLACE = re.compile(
    r"(?P<start><!-- generated from: (?P<name>[\w.]+) -->\n)"
    r".*?"
    r"(?P<end><!-- end of generated text -->)",
    re.DOTALL,
)
PLAIN_TYPES = {
    int: "integer",
    float: "number",
    bool: "true or false",
    str: "text",
    dict: "object",
    tuple: "list",
    list: "list",
    type(None): "null",
    Any: "any value",
}
ATTRIBUTE = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


def cell(text: str) -> str:
    """Return text that fits into one cell of a table."""
    in_one_line = " ".join(text.split())
    return in_one_line.replace("|", "\\|").replace("``", "`")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# Commands.


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of an installed command of this package."""
    (point,) = entry_points(group="console_scripts", name=command)
    parser: argparse.ArgumentParser = import_module(point.module).parser()
    return parser


def describe_command(parser: argparse.ArgumentParser) -> str:
    """Return the description of a command and the table of its options."""
    parts = [f"{parser.description}\n"] if parser.description else []
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parts += [describe_subcommand(name, sub) for name, sub in action.choices.items()]
        elif not (isinstance(action, argparse._HelpAction) or is_common(action)):
            rows.append((f"`{cell(written(action))}`", cell(meaning_of_option(parser, action))))
    if rows:
        parts.append(table(("option", "meaning"), rows))
    return "\n".join(parts)


def is_common(action: argparse.Action) -> bool:
    """Return whether every command has the option. The page describes those once, by hand."""
    return any(flag in COMMON_OPTIONS for flag in action.option_strings)


def describe_subcommand(name: str, parser: argparse.ArgumentParser) -> str:
    """Return the heading and the table of one subcommand."""
    return f"### `{parser.prog}`\n\n{describe_command(parser)}"


def written(action: argparse.Action) -> str:
    """Return an option as it is typed, such as ``--labels N [N ...]``."""
    flags = ", ".join(action.option_strings)
    if action.nargs == 0:
        return flags

    value = action.metavar or (action.dest if not flags else action.dest.upper())
    if action.choices is not None and action.metavar is None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if isinstance(value, tuple):
        value = " ".join(value)
    elif isinstance(action.nargs, int):
        value = " ".join([value] * action.nargs)
    elif action.nargs == "+":
        value = f"{value} [{value} ...]"
    elif action.nargs == "*":
        value = f"[{value} ...]"
    return f"{flags} {value}".strip()


def meaning_of_option(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of an option, with its default where the help does not name it."""
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    is_required = action.required and action.option_strings
    if is_required:
        return f"{text} (required)"

    is_off = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
    if is_off or "default" in text.lower():
        return text
    return f"{text} (default: `{action.default}`)"


# Dataclasses.


def class_of(path: str) -> type:
    """Return the class of a dotted path."""
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def describe_class(cls: type) -> str:
    """Return the table of a dataclass: field, type, default, meaning."""
    hints = typing.get_type_hints(cls)
    meanings = meanings_of(cls)
    rows = []
    for field in dataclasses.fields(cls):
        meaning = meanings.get(field.name, "")
        rows.append(
            (f"`{field.name}`", type_name(hints[field.name]), default_of(field), cell(meaning)),
        )
    return table(("key", "type", "default", "meaning"), rows)


def meanings_of(cls: type) -> dict[str, str]:
    """Return what the "Attributes:" section of a docstring says of each field."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    texts: dict[str, list[str]] = {}
    names: list[str] = []
    for line in section.splitlines():
        entry = ATTRIBUTE.match(line)
        if entry:
            names = entry["names"].split(", ")
            for name in names:
                texts[name] = [entry["text"]]
        else:
            for name in names:
                texts[name].append(line)
    return {name: in_json_words(" ".join(lines)) for name, lines in texts.items()}


def in_json_words(text: str) -> str:
    """Return the text of a docstring as a reader of JSON knows it: ``null`` instead of None."""
    return re.sub(r"\bNone\b", "`null`", text).strip()


def type_name(hint: Any) -> str:
    """Return a type in words, as it appears in JSON."""
    if hint in PLAIN_TYPES:
        return PLAIN_TYPES[hint]
    if dataclasses.is_dataclass(hint):
        return f"`{hint.__name__}`"

    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin in (tuple, list):
        is_fixed = origin is tuple and Ellipsis not in arguments
        length = f"{len(arguments)} " if is_fixed else ""
        kind = type_name(arguments[0])
        return f"{length}{kind}s" if kind in ("integer", "number", "text") else f"list of {kind}"
    return PLAIN_TYPES.get(origin, str(hint))


def default_of(field: "dataclasses.Field[Any]") -> str:
    """Return the default of a field as JSON; nothing where it is always written."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    return f"`{json.dumps(value)}`"


# Pages.


def generated(name: str) -> str:
    """Return the text that belongs into the place of this name."""
    return describe_class(class_of(name)) if "." in name else describe_command(parser_of(name))


def fill(page: str) -> str:
    """Return a page with all its places filled."""
    return PLACE.sub(lambda place: place["start"] + generated(place["name"]) + place["end"], page)


def pages() -> Iterator[Path]:
    """Return the pages of the reference."""
    yield from sorted(REFERENCE.glob("*.md"))


def main() -> None:
    """Rewrite the pages of the reference."""
    for path in pages():
        page = path.read_text(encoding="utf-8")
        path.write_text(fill(page), encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
