"""`xeroctl models` and `xeroctl completions`: what they send, what they show, and how they fail."""

import itertools
import json
import re
import subprocess
from shlex import quote
from unicodedata import combining, east_asian_width

import pytest

from loopback import (BEFORE_REQUEST, DONE, Call, Reset, chunk, completion, head, json_response, read_request, response,
                      stream)
from terminal import screen

KEY = "xero_acme_0123456789"
STORED = "/acme/my-endpoint/v1/chat/completions"
MESSAGES_OF = STORED + "/c1/messages"
JSON = ["-o", "json"]
NOW = {"Retry-After": "0"}
TAG = ["--metadata", "k=v"]
MODELS, LIST = ["models"], ["completions"]
GET, MESSAGES = ["completions", "get", "c1"], ["completions", "messages", "c1"]
UPDATE, DELETE = ["completions", "update", "c1", *TAG], ["completions", "delete", "c1", "--yes"]
VERBS = [MODELS, LIST, GET, MESSAGES, UPDATE, DELETE]
ROW = "2026-01-01T00:00:00Z\ttest-model\t12\t"


def stored(name="c1", text="Hello!", **more):
    """Return a stored completion."""
    return completion(text, **{"id": name, "metadata": {}, **more})


def listing(*items, **more):
    return json_response({"object": "list", "data": list(items), **more})


def error(status, message="no", headers=(), **more):
    return json_response({"error": {"message": message, **more}}, status, headers)


def message(role, text, name):
    return {"id": name, "role": role, "content": text}


# What answers every command: a completion, and an empty list.
ANYTHING = json_response(stored(data=[]))


@pytest.fixture
def target(server):
    """The options that name the endpoint."""
    return ["--endpoint", "my-endpoint", "--base-url", server.url + "/acme/v1"]


@pytest.fixture
def ask(run, target):
    """Run the tool with *target*."""

    def ask(*arguments, **options):
        return run(*arguments, *target, **options)

    return ask


@pytest.fixture
def together(start, target):
    """Run the tool with each of some lists of arguments, all at once, and return their Results."""

    def together(*commands, to=target, **options):
        children = [start(*arguments, *to, **options) for arguments in commands]
        return [child.finish() for child in children]

    return together


@pytest.fixture
def answers(together, server):
    """Run the tool, all at once, for each (arguments, reply) of *cases*, and return the Results."""

    def answers(*cases):
        def answer(sock):
            request = read_request(sock)
            server.requests.append(request)
            sock.sendall(cases[int(request.target.split("/")[1])][1])

        server.always(BEFORE_REQUEST, Call(answer))
        return together(*([*arguments, "--base-url", f"{server.url}/{number}/chat/completions", "--endpoint", "e"]
                          for number, (arguments, _) in enumerate(cases)), to=[])

    return answers


def targets(server):
    return [request.target for request in server.requests]


def one_line(result, status):
    """Tell whether *result* is a failure with *status* that one line on stderr reports."""
    return (result.status, result.stdout) == (status, b"") and bool(re.fullmatch(rb"xeroctl: error: [^\n]+\n", result.stderr))


# -- What is sent ----------------------------------------------------

REQUESTS = [
    (["models"], "GET", "/acme/my-endpoint/v1/models", None),
    (["completions"], "GET", STORED, None),
    (["completions", "list", "--metadata", "b=2 &=", "--metadata", "a é=", "--order", "asc", "--model", "m/1",
      "--after", "c-1", "--limit", "100"], "GET",
     STORED + "?limit=100&after=c-1&order=asc&model=m%2F1&metadata%5Bb%5D=2+%26%3D&metadata%5Ba+%C3%A9%5D=", None),
    (["completions", "--after", "a/b é"], "GET", STORED + "?after=a%2Fb+%C3%A9", None),
    (["completions", "--limit", "7", "--metadata", "x=y", "list", "--limit", "9", "--metadata", "z="], "GET",
     STORED + "?limit=9&metadata%5Bx%5D=y&metadata%5Bz%5D=", None),
    (["completions", "get", "chatcmpl-1_2.A"], "GET", STORED + "/chatcmpl-1_2.A", None),
    (["completions", "messages", "c1"], "GET", MESSAGES_OF, None),
    (["completions", "update", "c1", "--metadata", "b=2=", "--metadata", "a=it's é", "--metadata", "c="], "POST",
     STORED + "/c1", {"metadata": {"b": "2=", "a": "it's é", "c": ""}}),
    (["completions", "delete", "--yes", "c1"], "DELETE", STORED + "/c1", None),
]


def test_each_command_is_one_request(together, server):
    server.always(ANYTHING)
    results = together(*(arguments for arguments, *_ in REQUESTS))
    assert [(result.status, result.stderr) for result in results] == [(0, b"")] * len(REQUESTS)
    seen = [(request.method, request.target, request.body and request.json) for request in server.requests]
    expected = [(method, address, body or b"") for _, method, address, body in REQUESTS]
    assert sorted(seen, key=str) == sorted(expected, key=str)
    for request in server.requests:
        assert ("content-type" in request.headers) == (request.method == "POST")
        assert request.headers["accept"] == "application/json" and "authorization" not in request.headers


@pytest.mark.smoke
def test_a_dry_run_prints_that_request_and_sends_nothing(together, server, xeroctl):
    agent = f" -H 'Accept: application/json' -H 'User-Agent: xeroctl/{xeroctl.__version__}'"
    requests = REQUESTS[2:]
    results = together(*([*arguments, "--dry-run", "--api-key", KEY] for arguments, *_ in requests))
    for result, (_, method, address, body) in zip(results, requests):
        line = "curl -gsS " + quote(server.url + address) + (" -X DELETE" if method == "DELETE" else "") + agent
        line += " -H 'Content-Type: application/json'" if body else ""
        line += ' -H "Authorization: Bearer $XEROTIER_API_KEY"'
        line += " --data-raw " + quote(json.dumps(body, ensure_ascii=False)) if body else ""
        assert result == (0, line.encode() + b"\n", b"")
    assert server.requests == []


def test_a_dry_run_of_delete_asks_nothing_and_prints_a_line_each(ask, server):
    result = ask("completions", "delete", "c1", "c2", "--dry-run")
    assert (result.status, result.stderr, server.requests) == (0, b"", [])
    assert re.findall(rb"(?m)^curl [^\n]+/(c\d) -X DELETE ", result.stdout) == [b"c1", b"c2"]


def test_each_form_of_the_base_url_leads_to_the_stored_completions(start, server):
    server.always(ANYTHING)
    forms = {
        "/v1": ("/e/v1/chat/completions", ""),
        "/{endpoint}/a": ("/e/a/chat/completions", ""),
        "/b/chat/completions": ("/b/chat/completions", ""),
        "/d/chat/completions?x=1": ("/d/chat/completions", "?x=1"),
    }
    commands = [(form, ["completions", "--limit", "2"]) for form in forms]
    commands += [("/d/chat/completions?x=1", GET), ("/d/chat/completions?x=1", MODELS)]
    children = [start(*arguments, "--endpoint", "e", "--base-url", server.url + form) for form, arguments in commands]
    assert [child.finish().status for child in children] == [0] * 6
    lists = [address + (query + "&" if query else "?") + "limit=2" for address, query in forms.values()]
    assert sorted(targets(server)) == sorted(lists + ["/d/chat/completions/c1?x=1", "/d/models?x=1"])


@pytest.mark.smoke
def test_options_stand_before_or_after_the_verb(together, server):
    server.always(ANYTHING)
    base, slug, more = ["--base-url", server.url], ["--endpoint", "e"], ["--limit", "5"]
    results = together(
        ["completions", *base, *slug, *more], [*base, "completions", *slug, "list", *more],
        ["completions", *more, "list", *slug, *base], to=["--api-key", KEY])
    assert [(result.status, result.stderr) for result in results] == [(0, b"")] * 3
    assert targets(server) == ["/e/v1/chat/completions?limit=5"] * 3
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer " + KEY}


def test_bytes_that_are_no_text_are_replaced(ask, server):
    server.script(ANYTHING)
    assert ask("completions", "--model", b"m\xff", "--metadata", b"n\xff=v\xff") == (0, b"", b"")


def test_chat_has_a_completion_stored_with_its_tags(run, server, target):
    server.script(json_response(completion()))
    tags = ["--store", "--metadata", "b=x=é", "--metadata", "a=", "--metadata", "b=y"]
    assert run("chat", *target, "-m", "hi", *tags) == (0, b"Hello!\n", b"")
    body = server.requests[0].json
    assert (body["store"], body["metadata"]) == (True, {"b": "y", "a": ""})


# -- What is refused -------------------------------------------------


@pytest.mark.smoke
def test_without_an_endpoint_nothing_is_asked(together, server):
    line = b"xeroctl: error: no endpoint: give --endpoint SLUG, or set XEROTIER_ENDPOINT, or try without one: --demo\n"
    assert together(MODELS, UPDATE, DELETE, to=["--base-url", server.url]) == [(2, b"", line)] * 3


def test_ids_are_checked_before_anything_is_sent(together):
    bad = ["a/b", "..", "", "é", "a?b", "a\n"]
    results = together(
        *(["completions", "get", name] for name in bad), ["completions", "update", "a/b", *TAG],
        ["completions", "delete", "--yes", "fine", "a/b"])
    for result, name in zip(results, bad + ["a/b"] * 2):
        assert (name, one_line(result, 2)) == (name, True)
        assert re.match(rb"xeroctl: error: ID ", result.stderr)
        assert f"not '{name.strip()}'".encode() in result.stderr


def test_an_id_that_is_refused_is_not_called_an_endpoint(ask):
    assert b"endpoint" not in ask("completions", "get", "a/b").stderr


WRONG = {
    ("list", "--limit", "0"): "--limit must be a whole number from 1 to 100, not '0'",
    ("--limit", "101"): "--limit must be a whole number from 1 to 100, not '101'",
    ("list", "--order", "up"): "--order must be asc or desc, not 'up'",
    ("list", "--metadata", "k"): "--metadata must be NAME=VALUE",
    ("list", "--metadata", "k\x1b=v"): "--metadata must be NAME=VALUE",
    ("update", "c1"): "nothing to change: give --metadata NAME=VALUE",
    ("delete", "c1"): "delete asks at a terminal: without one give --yes",
    ("nope",): "xeroctl completions has no such command: 'nope': see xeroctl completions --help",
    ("--limit", "1", "get", "c1"): "xeroctl completions get has no option --limit: see xeroctl completions get --help",
    ("--after", "c1", "messages", "c1"): "xeroctl completions messages has no option --after: see xeroctl completions messages --help",
    ("--metadata", "a=b", "update", "c1", "--metadata", "c=d"): "--metadata goes behind the command: xeroctl completions update --metadata",
    ("--model", "m", "delete", "c1", "--yes"): "xeroctl completions delete has no option --model: see xeroctl completions delete --help",
    ("get",): "ID is missing",
}


@pytest.mark.smoke
def test_a_command_line_that_is_wrong_is_one_line(together):
    results = together(*(["completions", *arguments] for arguments in WRONG))
    for result, (arguments, words) in zip(results, WRONG.items()):
        assert (arguments, one_line(result, 2)) == (arguments, True)
        assert result.stderr.decode().startswith("xeroctl: error: " + words)


# -- Lists -----------------------------------------------------------


def test_models_are_a_line_each(together, server):
    server.always(listing({"id": "a", "object": "model"}, {"id": "日本\tb\n"}, 5, {"id": 7}, {}))
    text, as_json = together(MODELS, [*MODELS, *JSON])
    assert text == (0, "a\n日本 b\n".encode(), b"")
    assert (as_json.status, len(json.loads(as_json.stdout.decode())["data"]), as_json.stderr) == (0, 5, b"")


def test_completions_are_a_row_each(ask, server):
    server.script(listing(stored(), stored("c2", created=0, model="other", usage=None, metadata={"b": "2", "a": "1"})))
    said = f"c1\t{ROW}\nc2\t1970-01-01T00:00:00Z\tother\t\ta=1 b=2\n"
    assert ask("completions") == (0, said.encode(), b"")


@pytest.mark.smoke
def test_json_is_what_the_server_sent(together, server):
    document = {"object": "list", "data": [stored(x_vendor=[1.5, None, "é"]), 7], "has_more": False, "x": {}}
    server.always(json_response(document))
    said = (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    assert together([*LIST, *JSON], [*MODELS, *JSON]) == [(0, said, b"")] * 2


def test_more_than_was_shown_is_said_to_be(together, server):
    server.always(listing(stored(), stored("c2"), has_more=True))
    text, as_json = together(LIST, [*LIST, *JSON])
    note = "there are more: add --after c2"
    assert text == (0, f"c1\t{ROW}\nc2\t{ROW}\n".encode(), f"xeroctl: note: {note}\n".encode())
    assert (as_json.status, json.loads(as_json.stdout.decode())["has_more"]) == (0, True)
    assert json.loads(as_json.stderr.decode()) == {"kind": "note", "message": note}


def test_no_page_follows_a_completion_without_an_id(ask, server):
    server.script(listing(stored(None), has_more=True))
    result = ask("completions")
    assert (result.status, b"None" in result.stderr) == (0, False)


def test_an_empty_list_is_nothing_and_a_bare_one_is_a_list(answers):
    documents = [{"data": [], "has_more": True}, {"data": [None, 5, "x", [stored()]]}, [stored(), stored("c2")]]
    documents.insert(0, {"object": "list", "data": None})
    results = answers(*((LIST, json_response(document)) for document in documents), (MODELS, json_response([stored()])))
    assert results[:3] == [(0, b"", b"")] * 3
    assert results[3:] == [(0, f"c1\t{ROW}\nc2\t{ROW}\n".encode(), b""), (0, b"c1\n", b"")]


STAMP = "2026-01-01T00:00:00Z"
ODD = [
    *(({"created": value}, ["c1", "", "test-model", "12", ""])
      for value in ("1767225600", 10 ** 300, 1e300, -1, True, None, [])),
    ({"created": 1767225600.75}, ["c1", STAMP, "test-model", "12", ""]),
    ({"id": 7, "model": {}, "usage": [], "metadata": "x"}, ["", STAMP, "", "", ""]),
    ({"usage": {"total_tokens": "12"}}, ["c1", STAMP, "test-model", "", ""]),
    ({"usage": {"total_tokens": 10 ** 300}}, ["c1", STAMP, "test-model", "", ""]),
    ({"usage": {"total_tokens": 0}}, ["c1", STAMP, "test-model", "0", ""]),
    ({"metadata": {"k": "a\tb\nc\r\u2028d\x1b[31m\x07\x85e"}},
     ["c1", STAMP, "test-model", "12", "k=a b c d␛[31m␇\ufffde"]),
    ({"metadata": {"a\nb": "", "é": "日本"}}, ["c1", STAMP, "test-model", "12", "a b= é=日本"]),
    ({"id": "c\n\td", "model": "a\x00\x7fb\vc\fd\x1ce"}, ["c d", STAMP, "a␀␡b␋c␌d␜e", "12", ""]),
    ({"model": "half \ud83d"}, ["c1", STAMP, "half ?", "12", ""]),
]


@pytest.mark.smoke
def test_what_is_odd_or_missing_is_an_empty_cell_and_every_row_has_five(ask, server):
    nested = {"metadata": {"a": {"b": [1, None, "\t\n"]}, "c": 1.5, "d": True, "e": 10 ** 300}}
    document = [{**stored(), **changes} for changes, _ in ODD + [(nested, None)]] + [{}]
    server.script(response(json.dumps(document).encode()))
    result = ask("completions")
    assert (result.status, result.stderr) == (0, b"")
    rows = [line.split("\t") for line in result.stdout.decode().split("\n")]
    assert rows[:len(ODD)] == [row for _, row in ODD]
    assert rows[len(ODD) + 1:] == [[""] * 5, [""]]
    assert (len(rows[len(ODD)]), 'c=1.5 d=true e=10' in rows[len(ODD)][4]) == (5, True)


def test_an_answer_without_a_list_is_status_5(answers):
    bodies = {b"null": LIST, b"{}": MODELS, b'{"data": "x"}': MESSAGES, b'{"data": {"id": "x"}}': LIST}
    results = answers(*((verb, response(body)) for body, verb in bodies.items()))
    for result, what in zip(results, ["completions", "models", "messages", "completions"]):
        assert result == (5, b"", f"xeroctl: error: the reply holds no list of {what}\n".encode())


def test_in_json_an_answer_without_a_list_is_status_5_too(answers):
    results = answers(*(([*verb, *JSON], response(b'"x"')) for verb in (LIST, MESSAGES, MODELS)))
    assert [(result.status, result.stdout, result.stderr.count(b"\n")) for result in results] == [(5, b"", 1)] * 3


# -- A terminal ------------------------------------------------------


def shown(child, columns=80):
    """Return the lines that a terminal shows once *child*, which is quiet, is done; nothing in them may drive it."""
    assert child.finish() == 0
    plain = re.sub(rb"\A\x1b\[1m([^\x1b\n]*)\x1b\[0m", rb"\1", child.output)  # headings are bold
    assert re.findall(rb"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]", plain) == []
    return screen(child.output, columns)


def columns_before(line, text):
    """Return the columns of a terminal that *line* takes up to the *text* in it."""
    return sum(0 if combining(character) else 2 if east_asian_width(character) in "WF" else 1
               for character in line[:line.index(text)])


def test_a_terminal_shows_a_table_that_is_cut_to_its_width(terminal, server, target):
    server.always(listing(stored(metadata={"k": "v" * 99}), stored("chatcmpl-2", usage={"total_tokens": 1234567})))
    wide, narrow = terminal("completions", "-q", *target), terminal("completions", "-q", *target, columns=40)
    expected = [
        "ID          CREATED               MODEL       TOKENS   METADATA",
        "c1          2026-01-01T00:00:00Z  test-model  12       k=" + "v" * 99,
        "chatcmpl-2  2026-01-01T00:00:00Z  test-model  1234567"]
    for child, columns in ((wide, 80), (narrow, 40)):
        assert shown(child, columns) == [
            line[:columns - 1] + ">" if len(line) > columns else line for line in expected]


@pytest.mark.needs("utf-8-terminal")
@pytest.mark.parametrize("names", [
    ["plain", "a\x1b[31m\x9b2Jb\x07\x00", "x\ty\nz\r"], ["plain", "日本語モデル", "😀", "e\u0301te\u0301"],
], ids=["control", "wide"])
def test_columns_stay_in_line_whatever_is_in_them(terminal, server, target, names):
    server.script(listing(*(stored(model=name, metadata={"k": "v"}) for name in names)))
    header, *rows = shown(terminal("completions", "-q", *target, columns=100), 100)
    assert [columns_before(row, "12  ") for row in rows] == [columns_before(header, "TOKENS")] * len(names)


@pytest.mark.needs("utf-8-terminal")
def test_a_terminal_shows_models_under_a_header(terminal, server, target):
    server.always(listing({"id": "a"}, {"id": "日本\x1b[31m" * 9}, {"id": "b\nc"}))
    assert shown(terminal("models", "-q", *target)) == ["ID", "a", "日本␛[31m" * 8 + "日本␛[3>", "b c"]


# -- One completion --------------------------------------------------

TEXTS = {
    "two\nlines\n": stored(text="two\nlines\n"),
    "é 😀\u2028\x1b[31m\n": stored(text="é 😀\u2028\x1b[31m"),
    "\n": stored(text=""),
    "in parts\n": stored(text=[{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
}


def test_get_prints_the_text_with_one_newline(answers):
    results = answers(*((GET, json_response(reply)) for reply in TEXTS.values()))
    assert results == [(0, text.encode(), b"") for text in TEXTS]


@pytest.mark.smoke
def test_get_in_json_is_what_the_server_sent(ask, server):
    reply = stored(x_vendor={"a": [1.5, None]}, usage=None)
    server.script(json_response(reply))
    assert ask(*GET, *JSON) == (0, (json.dumps(reply, indent=2) + "\n").encode(), b"")


@pytest.mark.needs("utf-8-terminal")
def test_get_on_a_terminal_does_not_drive_it(terminal, server, target):
    server.script(json_response(stored(text="a\x1b[2J\x07b\nc")))
    assert shown(terminal(*GET, "-q", *target)) == ["a␛[2J␇b", "c"]


def test_an_answer_without_a_completion_is_status_5(answers):
    bodies = [b"null", b'{"choices": null}', b'{"choices": [null, 5, {}, {"message": "x"}]}']
    results = answers(*((GET, response(body)) for body in bodies))
    assert results == [(5, b"", b"xeroctl: error: the reply holds no completion\n")] * len(bodies)


def test_update_shows_the_row_that_it_made(answers):
    whole, bare = stored(metadata={"k": "v", "a": "b\tc"}), {"id": "c1"}
    text, as_json = answers((UPDATE, json_response(whole)), ([*UPDATE, *JSON], json_response(bare)))
    assert text == (0, f"c1\t{ROW}a=b c k=v\n".encode(), b"")
    assert as_json == (0, (json.dumps(bare, indent=2) + "\n").encode(), b"")


# -- Messages --------------------------------------------------------

TALK = [message("system", "Be brief.", "m0"), message("user", "one", "m1"), message("assistant", "eins\n", "m2"),
        message("user", "two\nlines", "m3"), message("assistant", [{"type": "text", "text": "zwei"}], "m4")]
ONE = b"user: one\n\nassistant: eins\n"
TWO = b"user: two\nlines\n\nassistant: zwei\n"


def test_messages_are_shown_page_by_page(ask, server):
    server.script(listing(*TALK[:2], has_more=True), listing(TALK[2], has_more=True), listing(*TALK[3:]))
    assert ask(*MESSAGES) == (0, b"system: Be brief.\n\n" + ONE + b"\n" + TWO, b"")
    assert targets(server) == [MESSAGES_OF, MESSAGES_OF + "?after=m1", MESSAGES_OF + "?after=m2"]


def test_pages_keep_the_query_of_the_base_url(run, server):
    server.script(listing(TALK[1], has_more=True), listing(TALK[2]))
    base_url = server.url + "/v1/chat/completions?x=1"
    assert run(*MESSAGES, "--endpoint", "e", "--base-url", base_url) == (0, ONE, b"")
    assert targets(server)[1] == "/v1/chat/completions/c1/messages?x=1&after=m1"


NO_MORE_PAGES = b"xeroctl: note: there may be more messages: the server does not page through them\n"


@pytest.mark.parametrize("pages, said", [
    ([TALK[1:3]], ONE), ([TALK[1:3], TALK[3:]], ONE + b"\n" + TWO),
], ids=["one page", "two pages"])
def test_pages_that_a_server_repeats_are_shown_once(ask, server, pages, said):
    turns = itertools.chain(pages * 3, itertools.repeat([]))
    server.always(Call(lambda sock: sock.sendall(listing(*next(turns), has_more=True))))
    assert ask(*MESSAGES) == (0, said, NO_MORE_PAGES)
    assert len(server.requests) <= len(pages) + 1


def test_a_page_that_no_other_can_follow_is_the_last(ask, server):
    server.script(listing(TALK[1], has_more=True), listing({"role": "assistant", "content": "eins"}, has_more=True))
    result = ask(*MESSAGES)
    assert (result.status, result.stdout) == (0, ONE)


def test_an_answer_that_is_kept_apart_is_fetched(together, server):
    def answer(sock):
        apart = read_request(sock).target == STORED + "/c1"
        sock.sendall(json_response(stored(text="eins")) if apart else listing(TALK[1]))

    server.always(BEFORE_REQUEST, Call(answer))
    text, as_json = together(MESSAGES, [*MESSAGES, *JSON])
    assert text == (0, ONE, b"")
    assert (as_json.status, as_json.stderr) == (0, b"")
    assert json.loads(as_json.stdout.decode()) == {
        "object": "list", "data": [TALK[1], {"role": "assistant", "content": "eins"}]}


def test_an_answer_that_is_not_there_is_an_error(ask, server):
    server.script(listing(TALK[1]), error("404 Not Found"))
    assert one_line(ask(*MESSAGES), 4)


def test_no_messages_are_nothing(ask, server):
    server.script(listing(has_more=True))
    assert ask(*MESSAGES) == (0, b"", NO_MORE_PAGES)


def test_messages_of_odd_shapes_are_shown_as_far_as_they_go(ask, server):
    odd = [{}, {"role": 5, "content": 7}, {"role": "tool", "content": None}, "x", None, {"content": "a\tb"}]
    document = {"data": odd + [message("assistant", "half \ud83d", "m1")]}
    server.script(response(json.dumps(document).encode()))
    result = ask(*MESSAGES)
    assert (result.status, result.stderr, result.stdout.count(b"\n")) == (0, b"", 9)
    assert b"\n\ntool: \n\n" in result.stdout and result.stdout.endswith(b"a\tb\n\nassistant: half \xef\xbf\xbd\n")
    assert b"None" not in result.stdout


def test_messages_in_json_are_loaded_by_a_chat(run, server, target, tmp_path):
    drei = stream(chunk("drei"), chunk(finish="stop"), DONE)
    server.script(listing(*TALK[:4]), json_response(stored(text="zwei")), drei)
    saved = tmp_path / "talk.json"
    saved.write_bytes(run(*MESSAGES, *target, *JSON).stdout)
    result = run("chat", "-i", *target, stdin=f"/load {saved}\nthree\n".encode())
    assert (result.status, result.stdout) == (0, b"drei\n")
    said = [(turn["role"], turn["content"]) for turn in server.requests[-1].json["messages"]]
    assert said == [("system", "Be brief."), ("user", "one"), ("assistant", "eins\n"), ("user", "two\nlines"),
                    ("assistant", "zwei"), ("user", "three")]


# -- Delete ----------------------------------------------------------

GONE = json_response({"id": "c1", "object": "chat.completion.deleted", "deleted": True})
NO_CONTENT = head("204 No Content")
ASKED = "Delete c1, c2? [y/N] "
NOTHING = "xeroctl: error: nothing was deleted"


def test_several_are_deleted_in_their_order(ask, server):
    server.script(GONE, NO_CONTENT, GONE)
    assert ask("completions", "delete", "c1", "c2", "c3", "--yes") == (0, b"deleted c1\ndeleted c2\ndeleted c3\n", b"")
    assert [(request.method, request.target, request.body) for request in server.requests] == [
        ("DELETE", f"{STORED}/c{number}", b"") for number in (1, 2, 3)]


def test_one_that_is_not_there_does_not_keep_the_others(ask, server):
    server.script(GONE, error("404 Not Found", "gone"), error("403 Forbidden"), GONE)
    result = ask("completions", "delete", "c1", "c2", "c3", "c4", "--yes")
    assert (result.status, result.stdout) == (4, b"deleted c1\ndeleted c4\n")
    assert re.fullmatch(rb"xeroctl: error: HTTP 404 at [^\n]+/c2: gone: [^\n]+\nxeroctl: error: HTTP 403: [^\n]+\n", result.stderr)


def test_what_the_server_says_it_did_not_delete_is_a_failure(ask, server):
    server.script(json_response({"id": "c1", "deleted": False}), GONE)
    result = ask("completions", "delete", "c1", "c2", "--yes")
    assert result == (5, b"deleted c2\n", b"xeroctl: error: the server did not delete c1\n")


def test_a_deletion_in_json_is_a_line_each(ask, server):
    server.script(GONE, NO_CONTENT, error("404 Not Found"), GONE)
    result = ask("completions", "delete", "c1", "c2", "c3", "c4", "--yes", *JSON)
    documents = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert (result.status, len(documents)) == (4, 3)
    assert [document["deleted"] for document in documents[::2]] == [True, True]
    reported = json.loads(result.stderr.decode())
    assert (reported["kind"], reported["status"], result.stderr.count(b"\n")) == ("refused", 404, 1)


def test_a_person_is_asked_before_anything_is_deleted(terminal, server, target):
    server.always(GONE)
    answers = {"y": True, "n": False, "": False}
    children = [terminal("completions", "delete", "c1", "c2", *target) for _ in answers]
    for child, keys in zip(children, answers):
        child.expect(ASKED)
        child.send(keys + "\r")
    for child, (keys, yes) in zip(children, answers.items()):
        assert child.finish() == (0 if yes else 2)
        assert screen(child.output) == [(ASKED + keys).rstrip(), *(["deleted c1", "deleted c2"] if yes else [NOTHING])]
    assert len(server.requests) == 2


def test_ctrl_d_deletes_nothing_and_the_reason_has_a_line_of_its_own(terminal, target):
    child = terminal("completions", "delete", "c1", "c2", *target)
    child.expect(ASKED)
    child.send("\x04")
    assert child.finish() == 2
    assert screen(child.output) == [ASKED.rstrip(), NOTHING]


def test_the_question_does_not_mix_with_an_output_that_is_piped(terminal, server, target):
    server.script(GONE)
    child = terminal("completions", "delete", "c1", *target, stdout=subprocess.PIPE)
    child.expect("Delete c1? [y/N] ")
    child.send("y\r")
    assert (child.finish(), child.stdout) == (0, b"deleted c1\n")


def test_yes_on_a_terminal_asks_nothing(terminal, server, target):
    server.script(GONE)
    child = terminal("completions", "delete", "c1", "--yes", *target)
    assert (child.finish(), screen(child.output)) == (0, ["deleted c1"])


def test_a_pipe_says_neither_yes_nor_no(ask):
    line = b"xeroctl: error: delete asks at a terminal: without one give --yes\n"
    assert ask("completions", "delete", "c1", stdin=b"y\n") == (2, b"", line)


# -- Failures --------------------------------------------------------

FAILURES = {
    "401": (error("401 Unauthorized"), 3),
    "404": (error("404 Not Found"), 4),
    "429": (error("429 Slow"), 7),
    "500": (error("500 Broken"), 5),
    "404 inside": (json_response({"error": {"message": "no", "code": 404}}), 4),
    "error inside": (json_response({"error": "no"}), 5),
    "HTML": (response(b"<!DOCTYPE html><p>Hi", headers={"Content-Type": "text/html"}), 5),
    "empty": (response(), 5),
    "NaN": (response(b'{"data": [{"created": NaN}]}'), 5),
    "cut short": (json_response({"data": []})[:-3], 8),
}


def test_a_failure_is_one_line_with_its_status(answers):
    results = answers(*(([*verb, "--retries", "0"], reply)
                        for verb, (reply, _) in zip(itertools.cycle(VERBS), FAILURES.values())))
    assert [(name, one_line(result, status)) for result, (name, (_, status)) in zip(results, FAILURES.items())] == [
        (name, True) for name in FAILURES]


def test_a_failure_in_json_is_one_object(together, server):
    server.always(error("404 Not Found", "gone", {"X-Request-ID": "r1"}, code="not_found"))
    for result in together(*([*verb, *JSON] for verb in (MODELS, UPDATE, DELETE))):
        reported = json.loads(result.stderr.decode())
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (4, b"", 1)
        assert (reported["kind"], reported["status"], reported["code"], reported["request_id"]) == (
            "refused", 404, "not_found", "r1")


def test_what_may_pass_is_tried_three_times(answers, server):
    slow, broken = error("429 Slow", headers=NOW), error("500 Broken", headers=NOW)
    results = answers((GET, slow), (UPDATE, broken), (DELETE, slow))
    for result, status in zip(results, [7, 5, 7]):
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (status, b"", 3)
        assert result.stderr.count(b", trying again in 0.1 s\n") == 2
    assert len(server.requests) == 9


def test_a_retry_that_succeeds_is_a_success(ask, server):
    server.script(Reset(), error("503 Busy", headers={"retry-after-ms": "1"}), listing(stored()))
    result = ask("completions")
    assert (result.status, result.stdout, len(server.requests)) == (0, f"c1\t{ROW}\n".encode(), 3)
    assert result.stderr.count(b"trying again in 0.") == 2


def test_the_key_goes_out_and_is_not_shown(ask, server):
    server.script(error("401 Unauthorized", f"bad key {KEY}", code=KEY))
    result = ask(*UPDATE, "-v", env={"XEROTIER_API_KEY": KEY})
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer " + KEY]
    assert result.status == 3 and KEY.encode() not in result.stdout + result.stderr


# -- Practice endpoint -----------------------------------------------

SAMPLE = "chatcmpl-practice-1"
FILTERS = {
    (): [SAMPLE],
    ("--limit", "1"): [SAMPLE],
    ("--after", SAMPLE): [],
    ("--order", "desc"): [SAMPLE],
    ("--model", "other"): [],
    ("--metadata", "sample=1"): [SAMPLE],
    ("--metadata", "sample=2"): [],
    ("--metadata", "sample="): [],
}


def test_the_practice_endpoint_lists_what_it_is_asked_for(together):
    results = together(*(["completions", *options] for options in FILTERS), to=["--demo"])
    seen = {options: [line.split("\t")[0] for line in result.stdout.decode().splitlines()]
            for options, result in zip(FILTERS, results)}
    assert seen == FILTERS
    assert [result.stderr for result in results if result.stderr] == []


def test_the_practice_endpoint_has_every_verb(together):
    models, row, text, talk, updated, gone, missing = together(
        ["models"], ["completions", "--metadata", "sample=1"], ["completions", "get", SAMPLE],
        ["completions", "messages", SAMPLE, *JSON], ["completions", "update", SAMPLE, "--metadata", "a=b"],
        ["completions", "delete", "--yes", SAMPLE], ["completions", "get", "nope"], to=["--demo"])
    assert models == (0, b"practice\n", b"")
    pattern = rb"chatcmpl-practice-1\t20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ\tpractice\t\d+\tsample=1\n"
    assert (row.status, row.stderr) == (0, b"") and re.fullmatch(pattern, row.stdout)
    assert (text.status, text.stderr) == (0, b"") and b"What do koalas eat?" in text.stdout
    user, assistant = json.loads(talk.stdout.decode())["data"]
    assert (user["role"], user["content"], assistant["role"]) == ("user", "What do koalas eat?", "assistant")
    assert assistant["content"].encode() == text.stdout
    assert (updated.status, updated.stdout.endswith(b"\ta=b\n")) == (0, True)
    assert gone == (0, b"deleted chatcmpl-practice-1\n", b"")
    assert one_line(missing, 4)
