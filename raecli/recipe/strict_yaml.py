"""YAML with its traps closed: plain values, the line of every key, and all that is wrong, none of it raised half-way.

PyYAML reads `2e-4` as text, `on` as true, and lets the last of two equal keys win. Here only its scanner and composer
are used; scalars follow the core rules of YAML 1.2, less its octal and hexadecimal numbers.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1 << 20  # of a document
MAX_DEPTH = 16  # of blocks and lists inside one another
MAX_NODES = 10_000  # keys and values: a recipe has about a hundred, and a MiB of them takes PyYAML most of a minute
MAX_DIGITS = 18  # of an integer: every such number fits into 64 bits

KeyPath = tuple[str | int, ...]
Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
EXPONENT = "([eE][-+]?[0-9]+)?"
INTEGER = re.compile("[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(rf"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?){EXPONENT}")
ZERO_LED = re.compile(rf"[-+]?0[0-9]+(\.[0-9]*)?{EXPONENT}")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
CONSTANTS: dict[str, Value] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
PLAIN_TEXT = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+(-][A-Za-z0-9_./+()-]*)*")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `line` counts from 1; `override` is the key=value it came by, instead of a line."""

    text: str
    path: KeyPath = ()
    line: int | None = None
    override: str | None = None


@dataclass
class Document:
    """What a text says. `values` is None where nothing could be read; a refused value is None and in `refused`."""

    values: dict[str, Value] | None = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[KeyPath] = field(default_factory=set)

    def refuse(self, text: str, path: KeyPath, line: int) -> None:
        """Note a value that cannot be read; it stays None."""
        self.problems.append(Problem(text, path, line))
        self.refused.add(path)


def parse_yaml(raw: bytes) -> Document:
    """Read a mapping out of UTF-8 bytes. Never raises for what the bytes say: see `problems`."""
    document = Document()
    if len(raw) > MAX_BYTES:
        document.problems.append(Problem(f"larger than {MAX_BYTES >> 20} MiB: not a recipe"))
        return document
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        document.problems.append(Problem("not UTF-8 text", line=raw.count(b"\n", 0, error.start) + 1))
        return document
    if found := NOT_TEXT.search(text):
        line = text.count("\n", 0, found.start()) + 1
        document.problems.append(Problem(f"control character U+{ord(found[0]):04X}: not a text file", line=line))
        return document
    _read_mapping(text, document)
    return document


def _read_mapping(text: str, document: Document) -> None:
    """Fill in a document from its text, or say that its text is no mapping."""
    composer = _Composer(text)
    try:
        root = composer.get_single_node()
    except yaml.YAMLError as error:
        document.problems.append(_syntax_problem(error))
        return
    except (ValueError, OverflowError):  # PyYAML lets chr() fail on an escape past Unicode's last character
        document.problems.append(Problem("not valid YAML: an escape that is no character", line=composer.line + 1))
        return
    if root is None:
        document.problems.append(Problem("empty; a recipe is a mapping of keys to values", line=1))
        return
    value = _read_node(root, (), document, composer.remarks)
    if isinstance(value, dict):
        document.values = value
    elif not document.problems:
        line = root.start_mark.line + 1
        document.problems.append(
            Problem(f"a recipe is a mapping of keys to values, found {describe(value)}", line=line)
        )


class _TooMuch(yaml.MarkedYAMLError):
    """Well-formed, but more than any recipe holds."""


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, watched: anchors, aliases and tags are remarked upon by node, depth is bounded."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.count = 0
        self.remarks: dict[int, str] = {}  # id of a node -> why it is refused
        self.nodes: list[yaml.Node] = []  # keeps the ids above from being used again

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose one node without following an alias, so that no text grows when it is read."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        remark = _remark(event)
        self.count += 1
        if self.count > MAX_NODES:
            text = f"more than {MAX_NODES} keys and values: not a recipe"
            raise _TooMuch(problem=text, problem_mark=event.start_mark)
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias:
            self.get_event()  # type: ignore[no-untyped-call]
            node: yaml.Node = yaml.ScalarNode("", "", event.start_mark, event.end_mark)
        else:
            event.anchor = None  # PyYAML would register it
            node = self._compose_deeper(parent, index, event)
        if remark:
            self.remarks[id(node)] = remark
            self.nodes.append(node)
        return node

    def _compose_deeper(self, parent: yaml.Node | None, index: Any, event: Any) -> yaml.Node:
        if self.depth == MAX_DEPTH:
            raise _TooMuch(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        assert node is not None
        self.depth -= 1
        return node


def _remark(event: Any) -> str | None:
    """Why a node that starts with this event is refused, if it is."""
    if isinstance(event, yaml.AliasEvent):
        return "aliases (*name) are not allowed: write the value out"
    if event.anchor is not None:
        return "anchors (&name) are not allowed: write the value out where it is needed"
    if event.tag is not None:
        tag = event.tag.replace("tag:yaml.org,2002:", "!!")
        return f"tag {show(tag)} is not allowed: write a plain value"
    return None


def _syntax_problem(error: yaml.YAMLError) -> Problem:
    """PyYAML's complaint, in one line, at its line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    if "'\\t'" in text:
        text = "a tab where YAML takes spaces alone"
    elif "another document" in text:
        text = "a second document starts here (---): one recipe a file"
    context = getattr(error, "context", None)
    where = f" ({context})" if context and "document" not in context else ""
    words = text if isinstance(error, _TooMuch) else f"not valid YAML: {text}{where}"
    return Problem(words, line=mark.line + 1 if mark else None)


def _read_node(node: yaml.Node, path: KeyPath, document: Document, remarks: dict[int, str]) -> Value:
    """The plain value of a node; what is refused is noted and reads as None."""
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if id(node) in remarks:
        document.refuse(remarks[id(node)], path, line)
        return None
    if isinstance(node, yaml.MappingNode):
        return _read_keys(node, path, document, remarks)
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(item, (*path, i), document, remarks) for i, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    if node.style is not None:  # quoted, or a block of text
        return str(node.value)
    try:
        return resolve_scalar(node.value)
    except ValueError as error:
        document.refuse(str(error), path, line)
        return None


def _read_keys(node: yaml.MappingNode, path: KeyPath, document: Document, remarks: dict[int, str]) -> dict[str, Value]:
    """A mapping, the first of equal keys kept and the others noted."""
    values: dict[str, Value] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key, why = _read_key(key_node, remarks)
        if why:
            document.problems.append(Problem(why, path, line))
        elif key in values:
            first = document.lines[(*path, key)]
            document.problems.append(Problem(f"duplicate key, first on line {first}", (*path, key), line))
        else:
            document.lines[(*path, key)] = line
            values[key] = _read_node(value_node, (*path, key), document, remarks)
    return values


def _read_key(node: yaml.Node, remarks: dict[int, str]) -> tuple[str, str | None]:
    """A key's text, and why it is refused, if it is."""
    if id(node) in remarks:
        return "", remarks[id(node)]
    if not isinstance(node, yaml.ScalarNode):
        return "", "a key must be text, found a list or a block"
    if node.style is not None:
        return str(node.value), None
    if node.value == "<<":
        return "", "merge keys (<<) are not allowed: write the values out"
    try:
        key = resolve_scalar(node.value)
    except ValueError as error:
        return "", str(error)
    return (key, None) if isinstance(key, str) else ("", f"a key must be text, found {describe(key)}")


def resolve_scalar(text: str) -> Value:
    """A plain scalar's value. ValueError for a number that nobody can have meant."""
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
        return int(text)
    if FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{show(text)} is too large for a number")
        return number
    if ZERO_LED.fullmatch(text):
        raise ValueError(f"{show(text)} starts with a 0: drop it if this is a number, quote it if it is text")
    if NOT_FINITE.fullmatch(text):
        raise ValueError(f"{show(text)} is not a number that a recipe can hold")
    return text


def parse_value(text: str) -> Value:
    """The value of a key=value: a scalar, quoted text, or a list in brackets. ValueError says what is wrong."""
    text = text.strip()
    if not text.startswith(("[", '"', "'")):
        return resolve_scalar(text)
    document = parse_yaml(f"value: {text}".encode(errors="replace"))
    if document.problems or document.values is None:
        raise ValueError(document.problems[0].text)
    if len(document.values) > 1:
        raise ValueError("more than one value")
    return document.values["value"]


def write_scalar(value: Value) -> str:
    """Text that reads back as exactly this scalar. Floats keep all their digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        assert math.isfinite(value), value
    if isinstance(value, int | float):
        return repr(value)
    assert isinstance(value, str), value
    is_plain = PLAIN_TEXT.fullmatch(value) and not ZERO_LED.fullmatch(value) and not NOT_FINITE.fullmatch(value)
    if is_plain and isinstance(resolve_scalar(value), str):
        return value
    return quote(value)


def quote(text: str) -> str:
    """Double-quoted YAML, with everything escaped that is not printable."""
    inside = (c if c.isprintable() and c not in '"\\\ufeff' else _escape(c) for c in text)
    return '"' + "".join(inside) + '"'


def _escape(character: str) -> str:
    if character in '"\\\n\t\r':
        return json.dumps(character)[1:-1]
    code = ord(character)
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"


def show(text: str, limit: int = 60) -> str:
    """A user's text for one line of a message: bounded, and quoted where it holds what is not printable."""
    short = text if len(text) <= limit else text[:limit] + "..."
    return short if short.isprintable() and "\ufeff" not in short else quote(short)


def describe(value: object) -> str:
    """A value as a message names it."""
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, str):
        return quote(value if len(value) <= 60 else value[:60] + "...")
    return show(write_scalar(value)) if value is None or isinstance(value, bool | int | float) else type(value).__name__
