"""`xeroctl chat --schema` and `--extract`: answers in the shape that a script can use, or status 5."""

import json

import pytest

from loopback import DONE, chunk, completion, json_response, stream

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
BLOCK = "Here it is:\n\n```python\nprint(1)\n\nprint(2)\n```\n\nand more\n\n```\nnot this\n```\n"
CODE = b"print(1)\n\nprint(2)\n"
NO_BLOCK = b"xeroctl: error: there is no code block in the answer\n"


@pytest.fixture
def schema(tmp_path):
    """The path of a file with SCHEMA."""
    path = tmp_path / "my numbers.schema.json"
    path.write_text(json.dumps(SCHEMA))
    return str(path)


def whole(text, finish="stop"):
    return json_response(completion(text, finish))


def streamed(text, finish="stop"):
    """Return a stream of *text*, three characters a chunk."""
    pieces = [text[start:start + 3] for start in range(0, len(text), 3)]
    return stream(*map(chunk, pieces), chunk(finish=finish), DONE)


@pytest.fixture(params=["whole", "streamed"])
def answers(request, chat, server):
    """Ask with some options, streamed and not, and let the server answer with a text."""

    def answers(text, *options, finish="stop"):
        form, extra = (whole, []) if request.param == "whole" else (streamed, ["--stream", "-q"])
        server.script(form(text, finish))
        return chat("-m", "hi", *extra, *options)

    return answers


# -- Schemas ---------------------------------------------------------


@pytest.mark.smoke
def test_a_schema_is_sent_as_the_format_of_the_response(chat, server, schema):
    server.script(whole('{"n": 1}'))
    assert chat("-m", "hi", "--schema", schema) == (0, b'{"n": 1}\n', b"")
    assert server.requests[0].json["response_format"] == {
        "type": "json_schema", "json_schema": {"name": "my_numbers", "schema": SCHEMA}}


@pytest.mark.parametrize("text", ['{"n": 1}', "[1, 2]", '"text"', " null\n"], ids=str)
def test_json_is_shown_as_it_is(answers, schema, text):
    printed = text if text.endswith("\n") else text + "\n"
    assert answers(text, "--schema", schema) == (0, printed.encode(), b"")


@pytest.mark.parametrize("text", ['{"a":NaN}', "[-Infinity]", "[" * 100000], ids=lambda text: text[:20])
def test_what_json_does_not_have_is_not_json(answers, schema, text):
    assert answers(text, "--schema", schema).status == 5


@pytest.mark.parametrize("text", ['{"n": 1', "Sure: {}", "```json\n{}\n```"], ids=ascii)
def test_what_is_not_json_is_shown_and_status_5(answers, schema, text):
    result = answers(text, "--schema", schema)
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (5, text.encode() + b"\n", 1)
    assert result.stderr.startswith(b"xeroctl: error: the answer is not JSON, as --schema asks: ")


def test_with_json_output_the_document_is_shown_and_the_answer_is_checked(chat, server, schema):
    server.script(whole("no"), whole("1"))
    result = chat("-m", "hi", "-o", "json", "--schema", schema)
    assert (result.status, json.loads(result.stdout.decode())) == (5, completion("no"))
    assert json.loads(result.stderr.decode())["kind"] == "server"
    assert chat("-m", "hi", "-o", "json", "--schema", schema).status == 0


def test_thoughts_before_the_json_are_no_part_of_it(answers, schema):
    result = answers('<think>\n{hm\n</think>\n\n{"n": 2}', "--schema", schema)
    assert result == (0, b'{"n": 2}\n', b"")


def test_thoughts_before_the_json_are_shown_on_stderr_where_that_is_wanted(answers, schema):
    result = answers('<think>hm</think>{"n": 2}', "--schema", schema, "--show-reasoning")
    assert result == (0, b'{"n": 2}\n', b"hm\n")


@pytest.mark.parametrize("data, words", [
    (None, "cannot read"), (b"{", "is not JSON"), (b"[1]", "is not a JSON object"), (b"\xff\xff", "is not JSON"),
    (b'{"a": NaN}', "is not JSON")], ids=str)
def test_a_schema_that_is_no_good_is_refused_before_anything_is_sent(chat, tmp_path, data, words):
    path = tmp_path / "schema.json"
    if data is not None:
        path.write_bytes(data)
    result = chat("-m", "hi", "--schema", path)
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
    assert words in result.stderr.decode() and str(path) in result.stderr.decode()


# -- Code blocks -----------------------------------------------------


@pytest.mark.smoke
def test_the_first_code_block_is_all_that_is_printed(answers):
    assert answers(BLOCK, "-x") == (0, CODE, b"")


@pytest.mark.parametrize("text, code", [
    ("~~~\na\n~~~", "a\n"), ("````md\n```\nx\n```\n````\n", "```\nx\n```\n"), ("```\nunclosed", "unclosed\n"),
    ("<think>```\nno\n```</think>\n```\nyes\n```", "yes\n"), ("a `b` c\n\n```sh\nls\n```", "ls\n")], ids=ascii)
def test_blocks_of_any_fence(answers, text, code):
    assert answers(text, "--extract") == (0, code.encode(), b"")


def test_without_a_block_the_answer_goes_to_stderr(answers):
    assert answers("Just\nwords.\n", "-x") == (5, b"", b"Just\nwords.\n" + NO_BLOCK)


def test_a_cut_answer_with_a_block_is_warned_about(answers):
    result = answers("```\nhalf", "-x", finish="length")
    assert (result.status, result.stdout) == (0, b"half\n")
    assert result.stderr.startswith(b"xeroctl: warning: ")


def test_an_answer_that_breaks_off_goes_to_stderr(chat, server):
    server.script(stream(chunk("```\nha")))
    result = chat("-m", "hi", "--stream", "-x", "--retries", "0")
    assert (result.status, result.stdout) == (8, b"")
    assert result.stderr.startswith(b"```\nha\nxeroctl: error: ")


def test_json_in_a_block_is_checked_against_the_schema_option(answers, schema):
    assert answers('So:\n```json\n{"n": 1}\n```', "-x", "--schema", schema) == (0, b'{"n": 1}\n', b"")
    result = answers("```\nno\n```", "-x", "--schema", schema)
    assert (result.status, result.stdout) == (5, b"no\n")


# -- Combinations ----------------------------------------------------


@pytest.mark.parametrize("options", [
    ["-x", "-o", "json", "-m", "hi"], ["-x", "-i"], ["-i", "-o", "json"], ["-i", "--dry-run"],
    ["-c", "--conversation", "x", "-m", "hi"]], ids=str)
def test_what_makes_no_sense_together_is_refused(chat, options):
    result = chat(*options)
    assert (result.status, result.stdout) == (2, b"")
    assert result.stderr.count(b"\n") == 1


def test_a_schema_with_a_conversation_is_refused(chat, schema):
    assert chat("-i", "--schema", schema).status == 2
