#!/usr/bin/env python3
"""Draw a chat as an SVG: .github/session.svg, the picture in the README.

    tests/session_svg.py            write the picture
    tests/session_svg.py --check    status 1 where the file differs from what would be written

The chat is real: it runs at a pseudo-terminal and asks a scripted server on loopback. A terminal of 80 columns
interprets what it prints, and each run of cells in one style becomes a text element. The figures in the footer depend
on the machine, so they are replaced by those of a server with TOKENS_PER_SECOND. All else is drawn as it came.
"""

import os
import re
import sys
import tempfile
from collections import namedtuple
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

from loopback import DONE, Server, chunk, stream
from terminal import TOKEN, Screen, Terminal

TOP = Path(__file__).resolve().parent.parent
XEROCTL = Path(os.environ.get("XEROCTL_FILE") or TOP / "xeroctl.py").resolve()
PICTURE = TOP / ".github" / "session.svg"
COLUMNS, ROWS = 80, 60
TOKENS_PER_SECOND = 74.3
PROMPT = re.compile(rb"\n(?:\x1b\[\?2004h)?(?:\x1b\[1m)?> (?:\x1b\[0m)?")
FOOTER = re.compile(rb"-- (\d+) tokens in [\d.]+s \([\d.]+ tok/s\)")

# -- The session -----------------------------------------------------

COMMAND = "xeroctl chat --interactive"
VARIABLES = {"XEROTIER_ENDPOINT": "my-endpoint", "LANG": "C.UTF-8", "TERM": "xterm-256color"}
MODEL = "llama-3"

Turn = namedtuple("Turn", "question answer prompt_tokens tokens")
TURNS = [
    Turn("My server says the disk is full. Where do I look?", """\
## Find what fills the disk

1. **Large directories.** `-x` stays on one file system, so that mounted shares do not count:

   ```sh
   sudo du -xh / | sort -h | tail -n 20
   ```

2. **Deleted files** that a process still holds open. Their space is free only once it ends:
   `sudo lsof +L1`
3. **No free inodes**, although `df -h` shows free space: `df -i`
""", 21, 112),
    Turn("Empty that log without a restart, please.", """\
Truncate it in place. The process keeps its *file descriptor*:

```sh
sudo truncate -s 0 /var/log/app.log
```
""", 156, 36),
]


def pieces(text):
    """Return *text* in pieces as long as tokens are."""
    return re.findall(r"\s*\S{1,6}|\s+", text)


def answer(turn):
    """Return the server's response to the question of *turn*."""
    usage = {"prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.tokens,
             "total_tokens": turn.prompt_tokens + turn.tokens}
    chunks = [chunk(piece, model=MODEL) for piece in pieces(turn.answer)]
    return stream(*chunks, chunk(finish="stop", model=MODEL), chunk(usage=usage, choices=[], model=MODEL), DONE)


def record_session(interpreter=sys.executable):
    """Return what the chat writes to its terminal, from its start to the prompt after the last answer."""
    with tempfile.TemporaryDirectory() as home, Server() as server:
        state = Path(home, ".local", "state", "xeroctl", "conversations")
        state.mkdir(parents=True)  # as on a machine that has seen a chat
        server.script(*map(answer, TURNS))
        env = {**VARIABLES, "PATH": os.environ["PATH"], "HOME": home, "XEROTIER_BASE_URL": server.url + "/v1"}
        words = [interpreter, str(XEROCTL), *COMMAND.split()[1:]]
        with Terminal(words, env, COLUMNS, ROWS) as child:
            child.expect(PROMPT)
            for turn in TURNS:
                child.send(turn.question + "\r")
                child.expect(FOOTER)
                child.expect(PROMPT)
            output = child.output
            child.send("/quit\r")
            child.finish()
    return FOOTER.sub(nominal_footer, output)


def nominal_footer(match):
    """Return the footer in *match* with the figures of TOKENS_PER_SECOND."""
    tokens = int(match.group(1))
    return b"-- %d tokens in %.1fs (%.1f tok/s)" % (tokens, tokens / TOKENS_PER_SECOND, TOKENS_PER_SECOND)


# -- The terminal ----------------------------------------------------

SGR_CLASSES = {1: "b", 2: "d", 3: "i", **{30 + number: f"c{number}" for number in range(8)}}
PLAIN = ()  # a style is the SGR parameters in force
Cell = namedtuple("Cell", "character style")


class StyledScreen(Screen):
    """A Screen whose cells keep the style in which they were written."""

    def __init__(self, columns, rows):
        self.style = PLAIN
        super().__init__(columns, rows)

    def blank(self, length=None):
        return [Cell(" ", PLAIN)] * (self.columns if length is None else length)

    def put(self, character):
        if self.column == self.columns:
            self.column = 0
            self.newline()
        self.cells[self.row][self.column] = Cell(character, self.style)
        self.column += 1

    def command(self, parameters, final):
        if final != "m":
            super().command(parameters, final)
        for number in parameters.split(";") if final == "m" else ():
            self.style = self.style + (int(number),) if int(number or 0) else PLAIN


def styled_lines(output):
    """Return the rows that the terminal shows, each a list of Cell, and where the cursor stands as (row, column)."""
    screen = StyledScreen(COLUMNS, ROWS)
    for private, parameters, final, character in TOKEN.findall(output.decode()):
        if character and character < " ":
            screen.control(character)
        elif character:
            screen.put(character)
        elif final and not private:
            screen.command(parameters, final)
    return screen.cells[:screen.row + 1], (screen.row, screen.column)


# -- The picture -----------------------------------------------------

CELL_WIDTH, CELL_HEIGHT, FONT_SIZE = 8.43, 19, 14
MARGIN, TITLE_HEIGHT = 16, 34
COLORS = ["#6e7681", "#ff7b72", "#7ee787", "#d29922", "#79c0ff", "#d2a8ff", "#56d4dd", "#e6edf3"]
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">
<title>{title}</title>
<style>
text {{ font: {size}px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #e6edf3;
  white-space: pre }}
.b {{ font-weight: bold }}
.d {{ fill: #8b949e }}
.i {{ font-style: italic }}
{colors}
</style>
<rect x="0.5" y="0.5" width="{inner_width}" height="{inner_height}" rx="9" fill="#0d1117" stroke="#30363d"/>
<path d="M1 {title_height}H{inner_width}" stroke="#30363d"/>
<circle cx="20" cy="17" r="6" fill="#ff5f57"/>
<circle cx="40" cy="17" r="6" fill="#febc2e"/>
<circle cx="60" cy="17" r="6" fill="#28c840"/>
<text class="d" x="{middle}" y="22" text-anchor="middle">{title}</text>
"""


def text_element(column, row, cells, style):
    """Return the text element for *cells* of one *style*, with the width that they take on the terminal."""
    names = " ".join(SGR_CLASSES[number] for number in style)
    kind = f' class="{names}"' if names else ""
    text = "".join(cell.character for cell in cells)
    start = column + len(text) - len(text.lstrip())
    text = text.strip()
    x, y = MARGIN + start * CELL_WIDTH, TITLE_HEIGHT + MARGIN + FONT_SIZE + row * CELL_HEIGHT
    width = len(text) * CELL_WIDTH
    return (f'<text{kind} x="{x:.1f}" y="{y}" textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs" '
            f'xml:space="preserve">{escape(text)}</text>\n')


def line_elements(row, cells):
    """Return the text elements of one line of the terminal."""
    found, column = "", 0
    for style, run in groupby(cells, key=lambda cell: cell.style):
        run = list(run)
        if any(cell.character != " " for cell in run):
            found += text_element(column, row, run, style)
        column += len(run)
    return found


def draw(output):
    """Return the picture of the *output* of a session, under the command that started it."""
    lines, (row, column) = styled_lines(output)
    shell = [Cell(character, (2,)) for character in "$ "]
    lines.insert(0, shell + [Cell(character, PLAIN) for character in COMMAND])
    width = round(2 * MARGIN + COLUMNS * CELL_WIDTH)
    height = TITLE_HEIGHT + 2 * MARGIN + len(lines) * CELL_HEIGHT
    elements = "".join(line_elements(*line) for line in enumerate(lines))
    colors = "\n".join(f".c{number} {{ fill: {color} }}" for number, color in enumerate(COLORS) if f"c{number}" in elements)
    head = HEAD.format(
        width=width, height=height, inner_width=width - 1, inner_height=height - 1, middle=width / 2,
        title_height=TITLE_HEIGHT + 0.5, title="A chat with xeroctl", size=FONT_SIZE, colors=colors)
    x, y = MARGIN + column * CELL_WIDTH, TITLE_HEIGHT + MARGIN + (row + 1) * CELL_HEIGHT
    cursor = f'<rect x="{x:.1f}" y="{y}" width="{CELL_WIDTH}" height="17" fill="#e6edf3"/>\n'
    return head + elements + cursor + "</svg>\n"


def main():
    picture = draw(record_session())
    if sys.argv[1:] == ["--check"]:
        return int(picture != PICTURE.read_text(encoding="utf-8"))
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
