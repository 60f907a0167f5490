"""`xeroctl chat --attach`: what a file becomes in the message, and what is refused."""

import base64
import json
import os
import subprocess

import pytest

from loopback import completion, json_response

HELLO = json_response(completion())
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF"
GIF = b"GIF89a\1\0\1\0"
WEBP = b"RIFF\x1a\0\0\0WEBPVP8 "
WAV = b"RIFF\x24\0\0\0WAVEfmt "
MP3 = b"ID3\4\0\0\0\0\0\0"
BARE_MP3 = b"\xff\xfb\x90\0\0"


def encoded(data):
    return base64.b64encode(data).decode()


def image(data, form):
    return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{encoded(data)}"}}


def audio(data, form):
    return {"type": "input_audio", "input_audio": {"data": encoded(data), "format": form}}


def text_part(text):
    return {"type": "text", "text": text}


@pytest.fixture
def write(tmp_path):
    """Write a file of this name, and return its path."""

    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


@pytest.fixture
def asked(chat, server):
    """Ask with some options, and return the content of the message that was sent."""

    def asked(*options, note=b"", **more):
        server.script(HELLO)
        assert chat(*options, **more) == (0, b"Hello!\n", note)
        message, = server.requests[-1].json["messages"]
        assert message["role"] == "user"
        return message["content"]

    return asked


# -- Text ------------------------------------------------------------


@pytest.mark.smoke
def test_a_text_is_added_under_its_name_in_a_fence(asked, write):
    path = write("notes.txt", b"one\ntwo\n")
    assert asked("-m", "Sum up", "-a", path) == "Sum up\n\nnotes.txt:\n```\none\ntwo\n```"


@pytest.mark.parametrize("data, fence", [(b"a ``` b", "````"), (b"`````\nx\n`````\n", "``````"), (b"a `b` c", "```")], ids=ascii)
def test_the_fence_is_longer_than_any_inside(asked, write, data, fence):
    content = asked("-m", "hi", "--attach", write("x.md", data))
    text = data.decode()
    if not text.endswith("\n"):
        text += "\n"
    assert content == f"hi\n\nx.md:\n{fence}\n{text}{fence}"


def test_standard_input_has_no_name_and_no_fence(asked):
    assert asked("-m", "What failed?", "-a", "-", stdin=b"disk full\n") == "What failed?\n\ndisk full\n"


def test_files_alone_are_a_question(asked, write):
    one, two = write("one", b"1\n"), write("two", b"2\n")
    assert asked("-a", one, "-a", two) == "one:\n```\n1\n```\n\ntwo:\n```\n2\n```"
    assert asked("-a", "-", stdin=b"only this") == "only this"


@pytest.mark.parametrize("options", [["-m", "-", "-a", "FILE"], ["-a", "FILE", "--message=-"]], ids=str)
def test_the_message_may_come_from_standard_input_beside_files(asked, write, options):
    path = write("f", b"x\n")
    options = [path if option == "FILE" else option for option in options]
    assert asked(*options, stdin=b"Read this\n") == "Read this\n\nf:\n```\nx\n```"


@pytest.mark.parametrize(
    "data, text, replaced",
    [
        ("é 😀\n".encode(), "é 😀\n", None),
        (b"\xef\xbb\xbfone\n", "one\n", None),
        ("é\r\nb\n".encode("utf-16"), "é\r\nb\n", None),
        (b"caf\xe9 is open all day long\n", "caf\ufffd is open all day long\n", "1 byte"),
        (b"\x1b[31mred\x1b[0m and \x08 and \x0c\n", "\x1b[31mred\x1b[0m and \x08 and \x0c\n", None),
        (b"a long enough line, \xff\xfe and so on\n" * 2, "a long enough line, \ufffd\ufffd and so on\n" * 2, "4 bytes"),
    ],
    ids=["UTF-8", "BOM", "UTF-16", "Latin-1", "escapes", "odd bytes"],
)
def test_text_in_any_shape_is_text(asked, write, data, text, replaced):
    path = write("log", data)
    note = f"xeroctl: note: {path} is not UTF-8: {replaced} replaced\n".encode() if replaced else b""
    assert asked("-a", path, note=note) == f"log:\n```\n{text}```"


def test_a_name_is_utf8_in_every_locale(asked, write):
    path = write("größe.txt", b"1\n")
    for variables in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}):
        assert asked("-a", os.fsencode(path), env=variables) == "größe.txt:\n```\n1\n```"


# -- Images and sounds -----------------------------------------------


@pytest.mark.parametrize(
    "data, part",
    [
        (PNG, image(PNG, "png")), (JPEG, image(JPEG, "jpeg")), (GIF, image(GIF, "gif")), (WEBP, image(WEBP, "webp")),
        (WAV, audio(WAV, "wav")), (MP3, audio(MP3, "mp3")), (BARE_MP3, audio(BARE_MP3, "mp3")),
    ],
    ids=["PNG", "JPEG", "GIF", "WebP", "WAV", "MP3", "MP3 without a tag"],
)
def test_the_first_bytes_say_what_a_file_is(asked, write, data, part):
    path = write("some.txt", data)
    assert asked("-m", "What is it?", "-a", path) == [text_part("What is it?"), part]
    assert asked("-a", "-", stdin=data) == [part]


def test_text_files_join_the_text_and_the_parts_follow(asked, write):
    content = asked("-m", "hi", "-a", write("a.png", PNG), "-a", write("b", b"b\n"), "-a", write("c.wav", WAV))
    assert content == [text_part("hi\n\nb:\n```\nb\n```"), image(PNG, "png"), audio(WAV, "wav")]


# -- What is refused -------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"\x7fELF\2\1\1\0", b"a\0b", b"%PDF-1.4\n%" + bytes(range(128, 256)), b"\x1f\x8b\x08" + bytes(range(1, 99)) + b"\xff" * 50,
     b"\1\2\3\4 some text", "a\0b".encode("utf-16")],
    ids=["ELF", "NUL", "PDF", "gzip", "control characters", "NUL in UTF-16"],
)
def test_other_bytes_are_refused(chat, write, data):
    path = write("thing", data)
    message = f"xeroctl: error: cannot attach {path}: it is neither text nor PNG, JPEG, GIF, WebP, WAV or MP3\n"
    assert chat("-m", "hi", "-a", path) == (9, b"", message.encode())
    assert chat("-m", "hi", "-a", "-", stdin=data) == (9, b"", message.replace(path, "standard input").encode())


def test_what_is_missing_or_empty_is_refused(chat, write, tmp_path):
    cases = {
        str(tmp_path / "none"): f"cannot read {tmp_path / 'none'}: No such file or directory",
        str(tmp_path): f"cannot read {tmp_path}: Is a directory",
        write("empty", b" \n"): f"cannot attach {tmp_path / 'empty'}: it is empty",
        "-": "cannot attach standard input: it is empty",
    }
    for path, message in cases.items():
        assert chat("-m", "hi", "-a", path) == (9, b"", f"xeroctl: error: {message}\n".encode())


def test_twenty_mebibytes_in_all_are_the_limit(chat, server, write):
    half = write("half", PNG + b"x" * (10 * 1024 * 1024 - len(PNG)))
    more = write("more", b"1")
    whole = write("whole", b"x" * (20 * 1024 * 1024 + 1))
    server.script(HELLO)
    assert chat("-m", "hi", "-a", half, "-a", half).status == 0
    together = b"xeroctl: error: the attached files are larger than 20 MiB together\n"
    assert chat("-m", "hi", "-a", half, "-a", half, "-a", more) == (9, b"", together)
    assert chat("-m", "hi", "-a", whole) == (9, b"", f"xeroctl: error: {whole} is larger than 20 MiB\n".encode())


def test_a_failure_in_json_is_one_object(chat, tmp_path):
    result = chat("-m", "hi", "-a", tmp_path / "none", "-o", "json")
    assert (result.status, result.stdout, json.loads(result.stderr.decode())["kind"]) == (9, b"", "input")


@pytest.mark.parametrize(
    "options",
    [["-m", "-", "-a", "-"], ["-m", "hi", "-a", "-", "-a", "-"], ["-i", "-a", "-"], ["-i", "-m", "hi", "--attach", "-"]], ids=str)
def test_standard_input_is_read_for_one_thing(chat, options):
    result = chat(*options, stdin=b"x")
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
    assert b"standard input" in result.stderr or b"--attach - goes with a single question" in result.stderr


def test_the_body_is_checked_before_it_is_sent_to_curl(chat, server, env, write):
    """A body of more than an argument can hold is read from a here-document."""
    path = write("big.txt", b"it's a $HOME `line` \\ of text\n" * 8000)
    options = ["-m", "hi", "-a", path]
    dry = chat(*options, "--dry-run")
    assert (dry.status, dry.stderr, server.requests) == (0, b"", [])
    server.always(HELLO)
    chat(*options)
    subprocess.run(["sh"], input=dry.stdout, env=env, timeout=20, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours, theirs = server.requests
    assert (ours.method, ours.target, ours.json) == (theirs.method, theirs.target, theirs.json)


# -- Standard input that is not read ---------------------------------

UNREAD = b"xeroctl: note: standard input is not read: --attach - adds it to the question, -q silences this note\n"


def test_what_waits_on_standard_input_is_said_to_be_unread(chat, server, write, tmp_path):
    server.always(HELLO)
    assert chat("-m", "hi", stdin=b"unread") == (0, b"Hello!\n", UNREAD)
    assert chat("-m", "hi", "-q", stdin=b"unread") == (0, b"Hello!\n", b"")
    assert chat("-m", "hi", stdin=b"") == (0, b"Hello!\n", b"")
    assert chat("-a", write("f", b"x"), stdin=b"unread") == (0, b"Hello!\n", UNREAD)
    with open(write("in", b"one\ntwo\n"), "rb") as file:
        assert chat("-m", "hi", stdin=file) == (0, b"Hello!\n", UNREAD)
        os.lseek(file.fileno(), 4, os.SEEK_SET)
        assert chat("-m", "hi", stdin=file) == (0, b"Hello!\n", b"")
