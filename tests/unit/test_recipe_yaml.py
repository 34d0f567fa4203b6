"""Strict YAML: each of PyYAML's traps is closed, and hostile text costs nothing."""

import math
import time

import pytest

from raecli.recipe.strict_yaml import MAX_BYTES, parse_value, parse_yaml, resolve_scalar, write_scalar


def told(text: str | bytes) -> list[tuple[int | None, str, str]]:
    """(line, path, words) of every problem of a text."""
    raw = text if isinstance(text, bytes) else text.encode()
    return [(p.line, ".".join(map(str, p.path)), p.text) for p in parse_yaml(raw).problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("+3", 3),
        ("0", 0),
        ("1024", 1024),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("N", "N"),
        ("0x10", "0x10"),
        ("0o17", "0o17"),
        ("1_000", "1_000"),
        ("190:20:30", "190:20:30"),
        ("2026-11-24", "2026-11-24"),
        ("1e", "1e"),
        (".", "."),
        ("-", "-"),
        ("nan", "nan"),
        ("40 epochs", "40 epochs"),
    ],
)
def test_plain_scalars_follow_the_core_rules_of_yaml_1_2(text, value):
    found = resolve_scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "-007", "00.5", ".inf", "-.INF", ".nan", "1e999", "9" * 5000])
def test_numbers_that_nobody_can_have_meant_are_refused_by_line(text):
    problems = told(f"a: 1\nb:\n  c: {text}\n")
    assert [(line, path) for line, path, _ in problems] == [(3, "b.c")]


@pytest.mark.parametrize("text", ['"010"', "'on'", '"1e-4"', '"null"', "''"])
def test_quoted_scalars_are_text(text):
    assert parse_yaml(f"a: {text}".encode()).values == {"a": text[1:-1]}


def test_lines_are_those_of_keys_and_list_items():
    document = parse_yaml(b"# first\na: 1\n\nb:\n  c:\n    - 1\n    - 2\n  d: {e: 3}\n")
    assert document.problems == []
    assert document.values == {"a": 1, "b": {"c": [1, 2], "d": {"e": 3}}}
    expected = {("a",): 2, ("b",): 4, ("b", "c"): 5, ("b", "c", 0): 6, ("b", "c", 1): 7, ("b", "d"): 8}
    assert {path: document.lines[path] for path in expected} == expected
    assert document.lines[("b", "d", "e")] == 8


def test_every_duplicate_is_told_with_both_lines_and_the_first_is_kept():
    text = "a: 1\nb:\n  c: 1\n  c: 2\na: 3\na: 4\n"
    assert told(text) == [
        (4, "b.c", "duplicate key, first on line 3"),
        (5, "a", "duplicate key, first on line 1"),
        (6, "a", "duplicate key, first on line 1"),
    ]
    assert parse_yaml(text.encode()).values == {"a": 1, "b": {"c": 1}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: &x 1\n", 2, "anchors"),
        ("a: &x 1\nb: *x\n", 2, "aliases"),
        ("a: 1\nb: !!python/object/apply:os.system [true]\n", 2, "!!python/object/apply:os.system"),
        ("a: !!int '5'\n", 1, "!!int"),
        ("a: !mine 5\n", 1, "!mine"),
        ("a: 1\n<<: {b: 1}\n", 2, "merge keys"),
        ("a: 1\n3: x\n", 2, "a key must be text, found 3"),
        ("true: x\n", 1, "a key must be text, found true"),
        ("? [a, b]\n: x\n", 1, "a key must be text"),
        ("007: x\n", 1, "starts with a 0"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("- 1\n- 2\n", 1, "found a list of 2"),
        ("just text\n", 1, 'found "just text"'),
        ("", 1, "empty"),
        ("# a comment\n", 1, "empty"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: 1\nb: [1, 2\n", 3, "not valid YAML"),
        ("a: 1\nb: 'x\n", 3, "not valid YAML"),
        ("a: 1\nb: c: d\n", 2, "not valid YAML"),
        ('a: 1\nb: "\\U7FFFFFFF"\n', 2, "no character"),
        ("a: 1\nb: \x07\n", 2, "control character U+0007"),
        (b"a: 1\nb: \xff\n", 2, "not UTF-8"),
        (b"\x7fELF\x02\x01\x01\x00\x00", 1, "control character"),
        ("a: 1".encode("utf-16"), 1, "not UTF-8"),
    ],
)
def test_what_is_not_a_plain_mapping_is_told_at_its_line(text, line, words):
    problems = told(text)
    assert any(found == line and words in message for found, _, message in problems), problems


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm():
    document = parse_yaml(b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    assert document.values == {"a": 1, "b": "x"}
    assert document.lines[("b",)] == 2


def test_several_problems_are_told_together():
    problems = told("a: 010\na: 1\nb: *x\nc: !!str y\n4: z\nd: .nan\n")
    assert [line for line, _, _ in problems] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 100_000,
        "a: " + "{a: " * 100_000,
        "".join(f"{' ' * i}a:\n" for i in range(1000)),
        "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]\n" for i in range(20)),
        "a: " + "x" * (MAX_BYTES + 1),
        "a: [" + "1," * (MAX_BYTES // 2 - 4) + "]",
        "{" + "a," * (MAX_BYTES // 2 - 2) + "}",
    ],
    ids=["lists", "flow blocks", "blocks", "alias bomb", "huge", "long list", "many keys"],
)
def test_hostile_text_is_refused_at_once(text):
    start = time.process_time()
    assert told(text)
    # Under a second in truth; a bomb that went off would take minutes or the whole memory.
    assert time.process_time() - start < 10


def test_nothing_in_a_text_runs_code(tmp_path):
    mark = tmp_path / "ran"
    assert told(f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]\n")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        (" 1e-4 ", 1e-4),
        ("null", None),
        ("[0.9, 0.95]", [0.9, 0.95]),
        ("[]", []),
        ('"3"', "3"),
        ("'a: b'", "a: b"),
        ("Table 7: XL # 1", "Table 7: XL # 1"),
        ("s3://bucket/x=1", "s3://bucket/x=1"),
    ],
)
def test_an_overrides_value_is_a_scalar_or_a_list(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["[1, 2", "'x", "'x'\nstage: y", "[*a]", "010", '"a" b'])
def test_an_overrides_broken_value_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_value(text)


TEXTS = [
    "on",
    "1e5",
    "null",
    "~",
    "",
    " ",
    "a b",
    "a: b",
    "a #b",
    "- a",
    "'",
    '"',
    "\\",
    "\x07\x7f\x85",
    "\u2028\ufeff",
]
TEXTS += ["010", ".5", ".inf", "+1", "[a]", "{a}", "*a", "&a", "!a", "%a", "@a", "a\nb", "\ttab", "e\u0301\U0001f600"]
TEXTS += ["40 epochs", "runs/a-b_c.d+e", "Table 7: gFID 1.53, 1.18", "x,", "a:", "yes ", "=", "a (b)", "- ", "?", "---"]


@pytest.mark.parametrize("value", [*TEXTS, 0, -3, 1e-4, 1e-5, 0.1 + 0.2, 1e22, 5e-324, -0.0, True, False, None])
def test_a_written_scalar_reads_back_alone_and_in_a_list(value):
    document = parse_yaml(f"a: {write_scalar(value)}\nb: [{write_scalar(value)}, 1]\n".encode())
    assert document.problems == []
    assert document.values == {"a": value, "b": [value, 1]}
    found = document.values["a"]
    assert type(found) is type(value)
    assert not isinstance(value, float) or math.copysign(1, found) == math.copysign(1, value)
