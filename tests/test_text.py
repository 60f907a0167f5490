"""Text, without a process: sanitising, widths, tables, figures, and Markdown styled while it streams."""

import random
import re
import unicodedata
from collections import namedtuple
from types import SimpleNamespace

import pytest

from terminal import screen

STYLES = {"1": "b", "2": "dim", "3": "i", "36": "c", "1;3": "bi", "1;2": "dim-b", "2;36": "dim-c", "1;36": "bc", "2;3": "dim-i"}


# -- Sanitising ------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("text, shown", [
    ("plain, é 😀\u2028", "plain, é 😀\u2028"),
    ("a\tb\nc", "a\tb\nc"),
    ("a\rb\r\nc", "ab\nc"),
    ("\x1b[31m\x1b]0;t\x07", "\u241b[31m\u241b]0;t\u2407"),
    ("\x00\x08\x0b\x0c\x7f", "\u2400\u2408\u240b\u240c\u2421"),
    ("\x80\x85\x9b2J\x9d\x9f", "\ufffd\ufffd\ufffd2J\ufffd\ufffd"),
    ("\xa0\xad", "\xa0\xad"),
    ("a\u202eb\u202a\u202b\u202c\u202d", "a\ufffdb\ufffd\ufffd\ufffd\ufffd"),
    ("\u2066a\u2067b\u2068c\u2069", "\ufffda\ufffdb\ufffdc\ufffd"),
    ("a\u200bb\u2060c\ufeffd", "a\ufffdb\ufffdc\ufffdd"),
    ("a\U000e0041\U000e0020\U000e007f\U000e0001", "a\ufffd\ufffd\ufffd\ufffd"),
    ("म\u200dन \u0646\u200c\u0645 ❤\ufe0f 👩\u200d💻 \u200e\u200f", "म\u200dन \u0646\u200c\u0645 ❤\ufe0f 👩\u200d💻 \u200e\u200f"),
    ("", ""),
], ids=ascii)
def test_sanitize_leaves_nothing_that_drives_a_terminal_or_hides(xeroctl, text, shown):
    assert xeroctl.sanitize(text) == shown


def test_sanitize_leaves_no_control_character_but_newline_and_tab(xeroctl):
    shown = xeroctl.sanitize("".join(map(chr, range(0x250))))
    assert [character for character in shown if ord(character) < 32 or 127 <= ord(character) < 160] == ["\t", "\n"]


def test_one_line_is_one_line_with_single_blanks(xeroctl):
    assert xeroctl.one_line(" a\tb \r\n\n c\x1b\u2028d ") == "a b c\u241b d"


# -- Widths ----------------------------------------------------------


@pytest.mark.parametrize("text, columns", [
    ("", 0), ("abc", 3), ("é", 1), ("e\u0301", 1), ("日本", 4), ("ａ", 2), ("😀", 2), ("👩\u200d💻", 4), ("❤\ufe0f", 1), ("a\xadb", 3),
], ids=ascii)
def test_the_width_of_a_text(xeroctl, text, columns):
    assert xeroctl.display_width(text) == columns


@pytest.mark.parametrize("text, columns, expected", [
    ("abc", 3, "abc"), ("abc", 2, "ab"), ("abc", 0, ""), ("abc", -1, ""), ("", 5, ""), ("日本", 3, "日"), ("日本", 4, "日本"),
    ("日", 1, ""), ("a\u0301b", 1, "a\u0301"), ("a\u0301b", 2, "a\u0301b"), ("ａb", 2, "ａ"), ("😀!", 2, "😀"), ("é", 1, "é"),
], ids=repr)
def test_a_text_is_cut_between_characters(xeroctl, text, columns, expected):
    assert xeroctl.truncate(text, columns) == expected


@pytest.mark.parametrize("text, columns, expected", [
    ("abcdefghij", 10, "abcdefghij"), ("abcdefghij", 9, "abc...hij"), ("abcdefghij", 8, "abc...ij"), ("abcdefghij", 5, "a...j"),
    ("abcdefghij", 4, "a..."), ("abcdefghij", 2, ".."), ("abcdefghij", 0, ""), ("日本語日本語", 11, "日本...本語"), ("日本語日本語", 10, "日本...語"),
], ids=repr)
def test_a_text_is_cut_in_its_middle(xeroctl, text, columns, expected):
    shown = xeroctl.truncate_middle(text, columns)
    assert xeroctl.display_width(shown) <= max(0, columns)
    assert shown == expected


def test_a_table_is_cut_to_the_columns(xeroctl):
    rows = [["a", "1\n2"], ["日本語", "x" * 20]]
    assert xeroctl.table_lines(("name", "value"), rows, 14) == ["NAME    VALUE", "a       1 2", "日本語  xxxxx>"]


# -- Figures ---------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("values, percent, expected", [
    ([7], 50, 7), ([7], 99, 7), ([1, 2], 50, 1.5), ([1, 2], 0, 1), ([1, 2], 100, 2), ([1, 2, 3, 4], 50, 2.5), ([1, 2, 3, 4], 25, 1.75),
    (list(range(101)), 95, 95), (list(range(100)), 95, 94.05), ([0, 0, 10], 90, 8),
], ids=str)
def test_a_percentile_is_linear_between_ranks(xeroctl, values, percent, expected):
    assert xeroctl.percentile(values, percent) == pytest.approx(expected)


def test_a_summary_has_every_figure(xeroctl):
    assert xeroctl.summary([3, 1, 2]) == {
        "n": 3, "mean": 2, "p50": 2, "p90": pytest.approx(2.8), "p95": pytest.approx(2.9), "p99": pytest.approx(2.98), "max": 3, "min": 1}
    nothing = xeroctl.summary([])
    assert nothing.pop("n") == 0 and set(nothing.values()) == {None}


Usage = namedtuple("Usage", "prompt completion total cached reasoning")


def reply(**fields):
    """Return what the figures look at in a Reply."""
    usage = fields.pop("usage", {})
    whole = {"prompt": None, "completion": None, "total": None, "cached": None, "reasoning": None, **usage}
    return SimpleNamespace(**{"deltas": 3, "first_at": 10.0, "last_at": 12.0, "first_seconds": 0.25, "finish_reason": "stop",
                              "id": "c1", "usage": Usage(**whole), **fields})


@pytest.mark.parametrize("fields, line", [
    ({"usage": {"completion": 312}}, "-- 312 tokens in 4.2s (74.3 tok/s)"),
    ({"usage": {"completion": 1}}, "-- 1 token in 4.2s (0.2 tok/s)"),
    ({"usage": {"completion": 0}}, "-- 0 tokens in 4.2s (0.0 tok/s)"),
    ({}, "-- ~3 tokens in 4.2s (~0.7 tok/s)"),
    ({"deltas": 1}, "-- ~1 token in 4.2s (~0.2 tok/s)"),
], ids=str)
def test_the_footer(xeroctl, fields, line):
    assert xeroctl.footer_line(reply(**fields), 4.2) == line


def test_the_rate_counts_the_tokens_after_the_first(xeroctl):
    fields = dict(xeroctl.usage_fields(reply(usage={"completion": 21}), 4.2, True))
    assert fields == {"completion_tokens": 21, "seconds": 4.2, "first_token_seconds": 0.25, "tokens_per_second": 10.0,
                      "finish_reason": "stop", "id": "c1"}


@pytest.mark.parametrize("fields", [{"usage": {"completion": 1}}, {}, {"usage": {"completion": 5}, "last_at": 10.0},
                                    {"usage": {"completion": 5}, "first_at": None, "last_at": None}], ids=str)
def test_there_is_no_rate_where_it_cannot_be_told(xeroctl, fields):
    assert "tokens_per_second" not in dict(xeroctl.usage_fields(reply(**fields), 4.2, True))


def test_what_is_not_streamed_has_seconds_alone(xeroctl):
    assert dict(xeroctl.usage_fields(reply(), 4.2, False)) == {"seconds": 4.2, "id": "c1"}


@pytest.mark.smoke
@pytest.mark.parametrize("columns, bar", [
    (80, "endpoint: my-endpoint | model: llama-3 | tokens: 148/532 | msgs: 6"),
    (66, "endpoint: my-endpoint | model: llama-3 | tokens: 148/532 | msgs: 6"),
    (65, "model: llama-3 | tokens: 148/532 | msgs: 6"),
    (42, "model: llama-3 | tokens: 148/532 | msgs: 6"),
    (41, "tokens: 148/532 | msgs: 6"),
    (25, "tokens: 148/532 | msgs: 6"),
    (24, "msgs: 6"),
    (5, "msgs:"),
])
def test_the_status_bar_leaves_whole_parts_out(xeroctl, columns, bar):
    assert xeroctl.status_bar("my-endpoint", "llama-3", xeroctl.Totals(148, 532, True), 6, columns) == bar


def test_the_status_bar_marks_counts_that_are_not_exact(xeroctl):
    bar = xeroctl.status_bar("a\tb\x1b", None, xeroctl.Totals(1, 2, False), 0, 80)
    assert bar == "endpoint: a b\u241b | tokens: ~1/~2 | msgs: 0"


@pytest.mark.parametrize("count, text", [(0, "0 tokens"), (1, "1 token"), (2, "2 tokens"), ("1", "1 token")])
def test_one_is_not_many(xeroctl, count, text):
    assert xeroctl.plural(count, "token") == text


# -- Bytes -----------------------------------------------------------


@pytest.mark.parametrize("data, expected", [
    (b"a\xc3\xa9", ("aé", 0)), (b"\xef\xbb\xbfa", ("a", 0)), (b"a\xffb\xfe", ("a\ufffdb\ufffd", 2)),
    ("\ufffd".encode() + b"\xff", ("\ufffd\ufffd", 1)), ("aé".encode("utf-16"), ("aé", 0)), (b"\xfe\xff\0a", ("a", 0)), (b"", ("", 0)),
], ids=repr)
def test_bytes_become_text(xeroctl, data, expected):
    assert xeroctl.decode_text(data) == expected


def test_a_prompt_is_utf_8(xeroctl):
    assert xeroctl.decode_prompt(b"\xef\xbb\xbfa\r\nb\r\n\n", "standard input") == "a\nb"
    with pytest.raises(xeroctl.UnusableInputError, match=r"^standard input is not UTF-8 text \(at byte 1\)$"):
        xeroctl.decode_prompt(b"a\xff", "standard input")


# -- Markdown --------------------------------------------------------


def readable(text):
    """Return *text* with names for its styles, such as <b>...</>, one for neighbours of the same style."""
    text = re.sub(r"\x1b\[([\d;]+)m", lambda match: "<" + STYLES[match.group(1)] + ">", text.replace("\x1b[0m", "</>"))
    joined = None
    while joined != text:
        joined, text = text, re.sub(r"(<[\w-]+>)([^<]*)</>( *)\1", r"\1\2\3", text)
    return text


def styled(xeroctl, text, columns=80, size=None, **options):
    """Return what is written for *text* that comes in pieces of *size*."""
    styler = xeroctl.MarkdownStyler(columns, **options)
    size = size or len(text) or 1
    return "".join([styler.feed(text[start:start + size]) for start in range(0, len(text), size)] + [styler.finish()])


@pytest.mark.smoke
@pytest.mark.parametrize("text, expected", [
    ("plain text", "plain text"),
    ("# Title\ntext", "<b># Title</>\ntext"),
    ("###### Six\n", "<b>###### Six</>\n"),
    ("####### Seven\n#no", "####### Seven\n#no"),
    ("a **b c** d", "a <b>**b c**</> d"),
    ("__b__ and *i* and _i_", "<b>__b__</> and <i>*i*</> and <i>_i_</>"),
    ("***both***.", "<bi>***both***</>."),
    ("**a *b***. c", "<b>**a </><bi>*b***</>. c"),
    ("**a *b* c**", "<b>**a </><bi>*b*</><b> c**</>"),
    ("**one\ntwo** three", "<b>**one</>\n<b>two**</> three"),
    ("**open\n\nnext", "<b>**open</>\n\nnext"),
    ("**open\n- item", "<b>**open</>\n- item"),
    ("# a **b\nc", "<b># a **b</>\nc"),
    ("snake_case_name 2*3*4 2 * 3 2**10 a * b", "snake_case_name 2*3*4 2 * 3 2**10 a * b"),
    (r"\*no\* \` \\*i*", r"\*no\* \` \\<i>*i*</>"),
    ("`code *x*` *i*", "<c>`code *x*`</> <i>*i*</>"),
    ("``a ` b`` c", "<c>``a ` b``</> c"),
    ("**`bc`**", "<b>**</><bc>`bc`</><b>**</>"),
    ("中**强**文", "中<b>**强**</>文"),
    ("```py\nx = *y*\n```\n*i*", "<c>```py</>\n<c>x = *y*</>\n<c>```</>\n<i>*i*</>"),
    ("~~~\n```\n~~~\na", "<c>~~~</>\n<c>```</>\n<c>~~~</>\na"),
    ("````md\n```\n````\na", "<c>````md</>\n<c>```</>\n<c>````</>\na"),
    ("```\n\n# x\n", "<c>```</>\n\n<c># x</>\n"),
    ("- ```sh\n  ls\n  ```\n- b", "- <c>```sh</>\n<c>  ls</>\n<c>  ```</>\n- b"),
    ("1. a\n\n   ```\n   x\n   ```\n2. b", "1. a\n\n   <c>```</>\n<c>   x</>\n<c>   ```</>\n2. b"),
    ("```x``` in a line\nnext *i*", "<c>```x```</> in a line\nnext <i>*i*</>"),
    ("> a **b** c\n\nd", "<dim>> a </><dim-b>**b**</><dim> c</>\n\nd"),
    ("> ```\n> x\n> ```\nd", "<dim>> </><dim-c>```</>\n<c>> x</>\n<c>> ```</>\nd"),
    ("a\n\n    x = *y*\n\n    z\n\nb *i*", "a\n\n<c>    x = *y*</>\n\n<c>    z</>\n\nb <i>*i*</>"),
    ("a\n    still *prose*", "a\n    still <i>*prose*</>"),
    ("- a\n\n    still *prose*", "- a\n\n    still <i>*prose*</>"),
    ("- a\n    - b *i*\n        - c", "- a\n    - b <i>*i*</>\n        - c"),
    ("* * *\n***\n---\n- *i*", "* * *\n***\n---\n- <i>*i*</>"),
    ("| a | **b** |\n|---|---|\n| `c` | d |\n\n*i*", "| a | <b>**b**</> |\n|---|---|\n| <c>`c`</> | d |\n\n<i>*i*</>"),
    ("1986. A year\n2) b", "1986. A year\n2) b"),
    ("", ""), ("\n", "\n"), ("\n\na\n\n", "\n\na\n\n"), ("*", "*"), ("**", "**"), ("-", "-"), ("12", "12"), ("```", "<c>```</>"), ("a  \nb", "a  \nb"),
], ids=lambda value: ascii(value)[:40])
def test_markdown_keeps_its_marks_and_gets_styles(xeroctl, text, expected):
    assert readable(styled(xeroctl, text)) == expected
    assert readable(styled(xeroctl, text, size=1)) == expected
    assert styled(xeroctl, text, size=1, styled=False) == text


@pytest.mark.parametrize("text, lines", [
    ("one two three four five six", ["one two three four", "five six"]),
    ("one two three 45678", ["one two three 45678"]),
    ("one two three 456789", ["one two three", "456789"]),
    ("- one two three four five six", ["- one two three", "  four five six"]),
    ("  - one two three four five six", ["  - one two three", "    four five six"]),
    ("10. one two three four five six", ["10. one two three", "    four five six"]),
    ("> one two three four five six", ["> one two three", "  four five six"]),
    ("- a\n  one two three four five six", ["- a", "  one two three", "  four five six"]),
    ("one two three\nfour five six", ["one two three", "four five six"]),
    ("# one two three four five", ["# one two three", "four five"]),
    ("an abcdefghijklmnopqrstuvwxyz of it", ["an", "abcdefghijklmnopqrst", "uvwxyz", "of it"]),
    ("one two **three four** five", ["one two **three", "four** five"]),
    ("one two three fo**ur**five", ["one two three", "fo**ur**five"]),
    ("日本語の文章は空白がない。", ["日本語の文章は空白", "がない。"]),
    ("日本語日本語日本語、語", ["日本語日本語日本", "語、語"]),
    ("日本語日本語日本（語）", ["日本語日本語日本", "（語）"]),
    ("emoji 😀😀😀😀😀😀😀 end", ["emoji 😀😀😀😀😀😀", "😀 end"]),
    ("one two three 👩\u200d💻👩\u200d💻 x", ["one two three 👩\u200d💻", "👩\u200d💻 x"]),
    ("one\ttwo three four", ["one     two three", "four"]),
    ("```\none two three four five six\n```", ["```", "one two three four f", "ive six", "```"]),
    ("| one | two | three | four |", ["| one | two | three", "| four |"]),
    ("a\n\n    one two three four five", ["a", "", "    one two three fo", "ur five"]),
], ids=lambda value: ascii(value)[:40])
def test_prose_is_wrapped_at_words_and_nothing_else_is(xeroctl, text, lines):
    for size in (None, 1, 3):
        for options in ({}, {"styled": False}):
            written = styled(xeroctl, text, 20, size, **options)
            assert shown(written, 20) == lines


def shown(written, columns, rows=400):
    """Return the lines on the screen after what was *written*, as the terminal driver hands it on."""
    return screen(written.replace("\n", "\r\n").encode(), columns, rows)


DOCUMENT = """# A heading that is **very** long and goes on and on, so that it wraps

Some *emphasis* and **strong text** and `code in a line` and snake_case, 2*3 = 6, __dunder__ and ***both*** end. \\*

- first item that is long enough to be wrapped under its own text, yes
  - nested item that is also long enough to be wrapped under its text
    1. third level that is also long enough to be wrapped, and `code span here`

       A paragraph in the third level, long enough to be wrapped somewhere.

       ```python
       def f(x): return x * 2  # a long line in a fence that is never wrapped at all
       ```
- back

> A quote that is long enough to be wrapped **somewhere** in the middle of it.
> > nested

| a | b |
|---|---|
| a long cell | another **long** cell that makes this row very long indeed, is it not |

    indented code that is long enough to be wrapped, but is code

日本語の文章は空白がないので、どこでも折り返すことができます。 emoji 👩\u200d💻 ❤\ufe0f 🇩🇪 done.

https://example.com/a/very/long/url/that/does/not/fit/into/the/line/at/all/and/goes/on and more
The end with an unclosed **strong
"""


@pytest.mark.parametrize("columns", [1, 9, 10, 20, 33, 80, 200])
@pytest.mark.parametrize("options", [{}, {"styled": False}], ids=["styled", "plain"])
def test_how_the_text_is_cut_changes_nothing_on_the_screen(xeroctl, columns, options):
    expected = shown(styled(xeroctl, DOCUMENT, columns, **options), columns, 2000)
    sizes = random.Random(columns)
    for size in (1, 2, 3, 7, 50):
        assert shown(styled(xeroctl, DOCUMENT, columns, size, **options), columns, 2000) == expected
    styler, written, rest = xeroctl.MarkdownStyler(columns, **options), "", DOCUMENT
    while rest:
        size = sizes.randint(1, 40)
        written, rest = written + styler.feed(rest[:size]), rest[size:]
    assert shown(written + styler.finish(), columns, 2000) == expected


def test_any_text_keeps_its_words_and_fits(xeroctl):
    chance = random.Random(1)
    parts = ["*", "**", "_", "`", "```", "\n", "\n\n", " ", "  ", "    ", "- ", "1. ", "> ", "# ", "| ", "\\", "word", "longer-word",
             "日本", "，", "😀", "e\u0301", "\t", "~~~", "(x)", "---", "x|y"]
    for _ in range(300):
        text = "".join(chance.choice(parts) + " " * (count % 6 == 5) for count in range(chance.randint(1, 60)))
        columns = chance.choice([10, 20, 40])
        lines = shown(styled(xeroctl, text, columns, size=chance.choice([1, 4, 100])), columns)
        assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)


def test_an_unfinished_word_is_shown_and_moved_when_it_does_not_fit(xeroctl):
    styler = xeroctl.MarkdownStyler(20)
    written = styler.feed("one two three fo")
    assert shown(written, 20) == ["one two three fo"]
    written += styler.feed("u")
    assert shown(written, 20) == ["one two three fou"]
    written += styler.feed("rteen")
    assert shown(written, 20) == ["one two three", "fourteen"]
    assert styler.feed(" ") + styler.finish() == " "


def test_a_mark_is_held_until_its_meaning_is_clear(xeroctl):
    styler = xeroctl.MarkdownStyler(40)
    assert [styler.feed(piece) for piece in ("a", " *", "*", "b", "*", "*", " c")] == [
        "a", " ", "", "\x1b[1m**b\x1b[0m", "", "", "\x1b[1m**\x1b[0m c"]


def test_every_piece_ends_without_a_style(xeroctl):
    styler = xeroctl.MarkdownStyler(40)
    for piece in (DOCUMENT[start:start + 5] for start in range(0, len(DOCUMENT), 5)):
        codes = re.findall(r"\x1b\[([\d;]*)m", styler.feed(piece))
        assert not codes or codes[-1] == "0"


def test_a_window_may_change_in_the_middle(xeroctl):
    styler = xeroctl.MarkdownStyler(40)
    styler.feed("- one two three four fiv")
    styler.resize(20)
    assert styler.feed("e six") == "\n  e six"
    styler.resize(60)
    assert styler.feed("teen seven eight nine ten eleven twelve") == "teen seven eight nine ten eleven twelve"


def test_what_is_dim_stays_dim(xeroctl):
    styler = xeroctl.MarkdownStyler(40)
    styler.dim = True
    written = styler.feed("Hm, **so**\n")
    styler.dim = False
    assert readable(written + styler.feed("yes")) == "<dim>Hm, </><dim-b>**so**</>\nyes"


def test_the_tables_of_widths_agree_with_unicode(xeroctl):
    for character in "a日ａ😀é":
        wide = unicodedata.east_asian_width(character) in "WF"
        assert xeroctl.display_width(character) == 1 + wide


# -- Views -----------------------------------------------------------


class Writes:
    """Stand in for the Console of a pipe, and keep each write."""

    def __init__(self):
        self.json, self.writes = False, []
        self.out = SimpleNamespace(dumb=True, is_terminal=False, can_show=lambda text: True)

    def write(self, text):
        self.writes.append(text)


def chunk(xeroctl, text, *sources):
    """Return a Chunk of *text*, from as many documents as there are *sources*."""
    return xeroctl.Chunk(text, "", len(sources), None, None, None, None, [], [{"n": 1}] * len(sources), list(sources), 0.0)


@pytest.mark.parametrize("as_json, streamed, writes", [
    (False, True, ["ab", "c", "\n"]), (False, False, ["abc\n"]), (True, True, ['{"n":1}\n{ }\n', "{}\n"]),
    (True, False, ['{"n":1}\n{ }\n', "{}\n"]),
], ids=["text streamed", "text", "json streamed", "json"])
def test_a_read_is_one_write(xeroctl, as_json, streamed, writes):
    console = Writes()
    console.json = as_json
    view = xeroctl.build_view(console, streamed)
    view.show(chunk(xeroctl, "ab", None, "{ }"))
    view.show(chunk(xeroctl, "c", "{}"))
    view.finish()
    view.finish()
    assert (console.writes, view.started) == (writes, True)


def test_a_whole_document_is_indented(xeroctl):
    console = Writes()
    console.json = True
    view = xeroctl.build_view(console, False)
    view.show(chunk(xeroctl, "", "{}"))
    assert not view.started
    view.finish()
    assert console.writes == ['{\n  "n": 1\n}\n']
