"""`xeroctl chat`, whole answers: what it sends, what it prints, what it refuses."""

import json
import os
import re
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import XEROCTL, changed
from loopback import DONE, USAGE, Call, chunk, completion, json_response, sse, stream, stream_head

HELLO = json_response(completion())
KEY = "xero_acme_0123456789"
TARGET = "/acme/my-endpoint/v1/chat/completions"
NETWORK_MODULES = {"socket", "ssl", "http", "http.client", "http.server", "urllib.request", "email", "socketserver"}


def user(text):
    return {"role": "user", "content": text}


def system(text):
    return {"role": "system", "content": text}


def body(**fields):
    """Return the body of the plainest request, with *fields* added."""
    return {"model": "my-endpoint", "messages": [user("hi")], "stream": False, **fields}


def wait_a_little(sock):
    select.select([sock], [], [], 0.1)


@pytest.fixture
def shell(interpreter, env):
    """Run a script of sh or bash in which "$@" is the tool, and return the finished process."""

    def shell(script, *args, program="sh", stdin=b"", env_changes=None):
        return subprocess.run(
            [program, "-c", script, program, interpreter, str(XEROCTL), *args], input=stdin,
            env=changed(env, env_changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20,
        )

    return shell


# -- What is printed -------------------------------------------------


@pytest.mark.parametrize(
    "text, printed",
    [
        ("Hello!", "Hello!\n"),
        ("Hello!\n", "Hello!\n"),
        ("two\nlines\n\n", "two\nlines\n\n"),
        ("héllo 😀\u2028\x1b[31m\r\n", "héllo 😀\u2028\x1b[31m\r\n"),
    ],
    ids=ascii,
)
def test_the_answer_is_printed_unchanged_and_ends_in_a_newline(chat, server, text, printed):
    server.script(json_response(completion(text)))
    assert chat("-m", "hi") == (0, printed.encode(), b"")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "reply, printed",
    [
        (completion(None, message={"refusal": "I cannot."}), b"I cannot.\n"),
        (completion("", message={"refusal": "I cannot."}), b"I cannot.\n"),
        (completion("Yes.", message={"refusal": None}), b"Yes.\n"),
        (completion([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]), b"in parts\n"),
        (completion(message={"reasoning_content": "Hm.", "reasoning": "Hm."}), b"Hello!\n"),
    ],
    ids=["refusal", "empty content", "null refusal", "parts", "reasoning"],
)
def test_the_text_is_found_wherever_the_message_has_it(chat, server, reply, printed):
    server.script(json_response(reply))
    assert chat("-m", "hi") == (0, printed, b"")


@pytest.mark.parametrize(
    "reply, words",
    [
        (completion(""), b"empty"), (completion("\n"), b"empty"), (completion(" \t\n "), b"empty"), (completion(None), b"empty"),
        (completion(message={"content": None, "reasoning_content": "Hm."}), b"reasoning"), (completion("<think>Hm.</think>\n"), b"reasoning"),
        (completion(choices=[{"index": 0, "message": None, "finish_reason": "stop"}]), b""),
        (completion(choices=[{"index": 0, "finish_reason": "stop"}]), b""),
    ],
    ids=["empty", "newline", "blank", "null", "reasoning", "thoughts", "null message", "no message"],
)
def test_an_empty_answer_is_status_5(chat, server, reply, words):
    server.always(json_response(reply))
    result = chat("-m", "hi")
    assert (result.status, result.stderr.count(b"\n")) == (5, 1)
    assert result.stderr.startswith(b"xeroctl: error: ") and words in result.stderr
    assert "<think>" in str(reply) or result.stdout.strip() == b""
    in_json = chat("-m", "hi", "-o", "json")
    assert (in_json.status, json.loads(in_json.stdout.decode())) == (5, reply)
    assert json.loads(in_json.stderr.decode())["kind"] == "server"


WARNINGS = {
    "length": "the answer was cut at the token limit",
    "content_filter": "the answer was cut or withheld by a content filter",
}
TOOL_CALL = "the model asked for a tool call: -o json shows it"


@pytest.mark.parametrize("reason, warning", WARNINGS.items())
def test_an_answer_that_is_not_whole_is_warned_about(chat, server, reason, warning):
    server.always(json_response(completion("Hel", reason)))
    for options in ([], ["--quiet"]):
        result = chat("-m", "hi", *options)
        assert result[:2] == (0, b"Hel\n")
        assert result.stderr.startswith(f"xeroctl: warning: {warning}".encode()) and result.stderr.count(b"\n") == 1
    said = json.loads(chat("-m", "hi", "-o", "json").stderr.decode())
    assert said["kind"] == "warning" and said["message"].startswith(warning)


def test_max_tokens_is_named_where_it_was_given(chat, server):
    server.always(json_response(completion("Hel", "length")))
    assert b"--max-tokens" in chat("-m", "hi", "--max-tokens", "5").stderr
    assert b"--max-tokens" not in chat("-m", "hi").stderr


@pytest.mark.smoke
def test_json_is_the_servers_object_indented_by_two(chat, server):
    reply = completion("é 😀 \u2028", x_vendor={"b": [1, 2.5, None, True], "a": {}}, system_fingerprint=None)
    server.script(json_response(reply))
    assert chat("-m", "hi", "-o", "json") == (0, (json.dumps(reply, indent=2, ensure_ascii=False) + "\n").encode(), b"")


@pytest.mark.smoke
def test_json_with_half_a_surrogate_pair_stays_json(chat, server):
    reply = json.dumps(completion("half \ud83d")).encode()
    server.always(b"HTTP/1.1 200 OK\r\n\r\n" + reply)
    result = chat("-m", "hi", "-o", "json")
    assert (result.status, json.loads(result.stdout.decode())) == (0, json.loads(reply.decode()))
    assert chat("-m", "hi") == (0, b"half \xef\xbf\xbd\n", b"")


CHUNKS = [chunk(delta={"role": "assistant"}), chunk("é"), chunk(finish="stop"), chunk(usage=USAGE, choices=[])]


def json_lines(documents):
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode()


@pytest.mark.smoke
def test_a_stream_that_nobody_asked_for_is_a_json_line_a_chunk(chat, server):
    server.script(stream(*CHUNKS, DONE))
    assert chat("-m", "hi", "-o", "json") == (0, json_lines(CHUNKS), b"")


@pytest.mark.smoke
@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_that_nobody_asked_for_is_printed_as_far_as_it_came(chat, server, count):
    server.script(stream(*[chunk("lo")] * count))
    result = chat("-m", "hi", "-o", "json")
    assert (result.status, json.loads(result.stderr.decode())["kind"]) == (8, "cut_short")
    assert b"".join(result.stdout.split()).count(b'"chat.completion.chunk"') == count


# -- Usage -----------------------------------------------------------

FULL_USAGE = {
    "prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2},
}


@pytest.mark.parametrize(
    "reply, pairs",
    [
        (completion(usage=FULL_USAGE), [
            ("prompt tokens", "9"), ("completion tokens", "0"), ("total tokens", "9"), ("cached tokens", "4"),
            ("reasoning tokens", "2"), ("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage=None), [("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage=None, id=None), [("seconds", "#")]),
        (completion(usage={}, id=7), [("seconds", "#")]),
        (completion(usage="much"), [("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage=[1]), [("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage={"prompt_tokens": None, "completion_tokens": "3", "total_tokens": True}),
         [("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage={"prompt_tokens_details": None, "completion_tokens_details": [], "total_tokens": 12}),
         [("total tokens", "12"), ("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage={"prompt_tokens_details": {"cached_tokens": 0}}),
         [("cached tokens", "0"), ("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage={**dict.fromkeys(USAGE, 10 ** 400), "total_tokens": 12}),
         [("total tokens", "12"), ("seconds", "#"), ("id", "chatcmpl-1")]),
        (completion(usage={"prompt_tokens": 9.0, "completion_tokens": 1.5}), [("prompt tokens", "9"), ("seconds", "#"), ("id", "chatcmpl-1")]),
    ],
    ids=["full", "null", "no id", "empty", "text", "list", "wrong types", "wrong details", "zero", "400 digits", "floats"],
)
def test_show_usage_leaves_out_what_the_server_did_not_send(chat, server, reply, pairs):
    server.script(json_response(reply))
    result = chat("-m", "hi", "--show-usage")
    lines = re.sub(r"(?m)^(seconds: +)\d+\.\d+$", r"\1#", result.stderr.decode()).splitlines()
    assert result[:2] == (0, b"Hello!\n")
    assert [tuple(re.split(": +", line)) for line in lines] == pairs
    assert len({re.match("[^:]+: +", line).end() for line in lines}) == 1, "one aligned block"


@pytest.mark.smoke
def test_show_usage_with_json_is_one_object_on_stderr(chat, server):
    server.script(json_response(completion()))
    result = chat("-m", "hi", "--show-usage", "-o", "json")
    assert (result.status, json.loads(result.stdout.decode())) == (0, completion())
    assert result.stderr.count(b"\n") == 1
    report = json.loads(result.stderr.decode())
    assert 0 <= report.pop("seconds") < 10
    assert report == {"kind": "token_usage", "id": "chatcmpl-1", **USAGE}


def test_show_usage_of_a_stream_has_the_rate_after_the_first_token(chat, server):
    server.script([stream_head(), sse(chunk("One")), Call(wait_a_little), sse(chunk(" two"), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)])
    result = chat("-m", "hi", "--show-usage", "--stream", "-o", "json")
    report = json.loads(result.stderr.decode())
    assert set(report) == {"kind", "id", "seconds", "first_token_seconds", "tokens_per_second", "finish_reason", *USAGE}
    assert 0 < report["first_token_seconds"] < report["seconds"] < 10
    assert 5 < report["tokens_per_second"] < 25  # two tokens after the first, in 0.1 s


# -- What is sent ----------------------------------------------------


@pytest.mark.smoke
def test_the_plainest_request_has_nothing_that_was_not_asked_for(chat, server):
    server.script(HELLO)
    assert chat("-m", "hi").status == 0
    request = server.requests[0]
    assert (request.method, request.target, request.json) == ("POST", TARGET, body())
    assert request.json["stream"] is False
    del request.headers["user-agent"], request.headers["content-length"]
    assert request.headers == {
        "host": f"127.0.0.1:{server.port}", "content-type": "application/json", "accept": "application/json",
        "accept-encoding": "identity", "connection": "close",
    }


@pytest.mark.parametrize(
    "options, fields",
    [
        ("--max-tokens 1", {"max_tokens": 1}),
        ("--temperature 0", {"temperature": 0}),
        ("--temperature 2.0 --top-p 1", {"temperature": 2, "top_p": 1}),
        ("--top-p 0", {"top_p": 0}),
        ("--frequency-penalty -2 --presence-penalty -2", {"frequency_penalty": -2, "presence_penalty": -2}),
        ("--frequency-penalty 2 --presence-penalty 0", {"frequency_penalty": 2, "presence_penalty": 0}),
        ("--seed 0", {"seed": 0}),
        ("--seed -42", {"seed": -42}),
        ("--store", {"store": True}),
        ("--model llama-3", {"model": "llama-3"}),
        ("--param reasoning_effort=low", {"reasoning_effort": "low"}),
        ('--param stop=["END"] --param metadata={"a":"b"}', {"stop": ["END"], "metadata": {"a": "b"}}),
        ("--param top_k=0 --param a=1.5 --param b=null --param c=false", {"top_k": 0, "a": 1.5, "b": None, "c": False}),
        ('--param a="text" --param b= --param c=x=y', {"a": "text", "b": "", "c": "x=y"}),
        ("--param a=NaN --param b=Infinity --param c=-Infinity --param d=1e999",
         {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "1e999"}),
        ("--param a=1 --param a=2", {"a": 2}),
        ("--store --seed 42 --temperature 0.9 --top-p 0.95 --max-tokens 200",
         {"store": True, "seed": 42, "temperature": 0.9, "top_p": 0.95, "max_tokens": 200}),
    ],
    ids=str,
)
def test_each_option_becomes_its_field_of_the_body(chat, server, options, fields):
    server.script(HELLO)
    assert chat("-m", "hi", *options.split()) == (0, b"Hello!\n", b"")
    assert server.requests[0].json == body(**fields)
    assert all(type(server.requests[0].json[name]) is type(value) or not isinstance(value, (bool, str))
               for name, value in fields.items())


@pytest.mark.smoke
def test_a_stream_is_asked_for_with_usage(chat, server):
    server.script(stream(chunk("Hello!"), chunk(finish="stop"), DONE))
    assert chat("-m", "hi", "--stream", "--quiet") == (0, b"Hello!\n", b"")
    assert server.requests[0].json == body(stream=True, stream_options={"include_usage": True})
    assert server.requests[0].headers["accept"] == "text/event-stream"


@pytest.mark.smoke
def test_latency_targets_and_the_key_ride_in_headers(chat, server):
    server.script(HELLO)
    assert chat("-m", "hi", "--slo-ttft", "200", "--slo-tpot", "20", "--api-key", KEY) == (0, b"Hello!\n", b"")
    headers = server.requests[0].headers
    assert (headers["x-slo-ttft-ms"], headers["x-slo-tpot-ms"], headers["authorization"]) == ("200", "20", "Bearer " + KEY)
    assert server.requests[0].json == body()


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["messages", "stream"])
def test_a_param_may_not_override(chat, name):
    result = chat("-m", "hi", "--param", name + "=1")
    assert result == (2, b"", f"xeroctl: error: --param cannot set {name}\n".encode())


@pytest.mark.smoke
@pytest.mark.parametrize("option", ["x", "=1", ""])
def test_a_param_needs_a_name_and_a_value(chat, option):
    result = chat("-m", "hi", "--param", option)
    assert (result.status, result.stdout) == (2, b"")
    assert b"--param must be NAME=VALUE" in result.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("before", [0, 2, 4, 6, 8])
def test_global_options_stand_before_or_after_the_command(run, server, before):
    server.script(HELLO)
    options = ["--base-url", server.url, "--api-key", KEY, "-o", "json", "--timeout", "9"]
    result = run(*options[:before], "chat", *options[before:], "--endpoint", "e", "-m", "hi")
    assert (result.status, json.loads(result.stdout.decode()), result.stderr) == (0, completion(), b"")
    assert server.requests[0].headers["authorization"] == "Bearer " + KEY


@pytest.mark.smoke
@pytest.mark.parametrize("options", [["-ojson", "-mhi"], ["--output=json", "--message=hi"], ["-qo", "json", "-mhi"]], ids=str)
def test_options_may_be_written_together(chat, server, options):
    server.script(HELLO)
    result = chat(*options)
    assert (result.status, result.stderr) == (0, b"")
    assert json.loads(result.stdout.decode()) == completion()
    assert server.requests[0].json == body()


# -- Ranges ----------------------------------------------------------

WRONG = {
    "--max-tokens": ["0", "-1", "1.5", "nan", ""],
    "--temperature": ["-0.1", "2.1", "nan", "inf", "-inf", "hot", ""],
    "--top-p": ["-0.1", "1.1", "nan", "inf"],
    "--frequency-penalty": ["-2.1", "2.1", "nan", "inf"],
    "--presence-penalty": ["-2.1", "2.1", "nan", "inf"],
    "--seed": ["1.5", "nan", "x"],
    "--timeout": ["0", "-1", "nan", "inf"],
    "--connect-timeout": ["0", "-1", "nan", "inf"],
    "--retries": ["-1", "1.5", "inf"],
    "--slo-ttft": ["0", "-1", "1.5", "nan"],
    "--slo-tpot": ["0", "-1", "1.5", "inf"],
}


@pytest.mark.parametrize("option", WRONG)
def test_a_number_out_of_range_is_refused_before_anything_is_sent(start, server, option):
    arguments = ["chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi"]
    children = {value: start(*arguments, f"{option}={value}") for value in WRONG[option]}
    for value, child in children.items():
        result = child.finish()
        assert (result.status, result.stdout) == (2, b"")
        pattern = rf"xeroctl: error: {option} must be a (whole )?number\b.*, not '{re.escape(value)}'\n"
        assert re.fullmatch(pattern, result.stderr.decode())


# -- Messages --------------------------------------------------------


@pytest.mark.parametrize(
    "content, text",
    [
        (b"Be brief.", "Be brief."),
        (b"\xef\xbb\xbfBe brief.\r\nAnd kind.\r\n", "Be brief.\nAnd kind."),
        ("  é 😀\n\n indented\n\n".encode(), "  é 😀\n\n indented"),
    ],
    ids=["plain", "BOM and CRLF", "spaces"],
)
def test_the_system_message_comes_from_the_file_and_beats_the_option(chat, server, tmp_path, content, text):
    (tmp_path / "pröm pt").write_bytes(content)
    server.script(HELLO)
    assert chat("-m", "hi", "--from-file", tmp_path / "pröm pt", "--system", "no").status == 0
    assert server.requests[0].json == body(messages=[system(text), user("hi")])


@pytest.mark.parametrize("text, messages", [("Be brief.\n", [system("Be brief.\n")]), ("", [])], ids=ascii)
def test_a_system_message_is_sent_before_the_question(chat, server, text, messages):
    server.script(HELLO)
    assert chat("-m", "hi", "--system", text).status == 0
    assert server.requests[0].json == body(messages=messages + [user("hi")])


def test_a_system_file_that_cannot_be_read_is_named(chat, tmp_path):
    missing, binary = tmp_path / "missing", tmp_path / "binary"
    binary.write_bytes(b"ab\xff")
    expected = {
        missing: f"cannot read {missing}: No such file or directory",
        tmp_path: f"cannot read {tmp_path}: Is a directory",
        binary: f"{binary} is not UTF-8 text (at byte 2)",
    }
    for name, message in expected.items():
        assert chat("-m", "hi", "--from-file", name) == (2, b"", f"xeroctl: error: {message}\n".encode())


@pytest.mark.parametrize("options", [[], ["-m", "-"]], ids=str)
@pytest.mark.parametrize(
    "data, text",
    [(b"\xef\xbb\xbfline one\r\nline two\r\n", "line one\nline two"), ("é 😀\n".encode(), "é 😀"), (b"-", "-")],
    ids=ascii,
)
def test_the_message_comes_from_stdin(chat, server, options, data, text):
    server.script(HELLO)
    assert chat(*options, stdin=data) == (0, b"Hello!\n", b"")
    assert server.requests[0].json == body(messages=[user(text)])


@pytest.mark.parametrize(
    "options, stdin, message",
    [
        (["-m", ""], b"", "the message is empty"),
        (["-m", " \n\t"], b"", "the message is empty"),
        (["-m", "-"], b"", "the message is empty"),
        ([], b"\r\n", "the message is empty"),
        ([], b"ok \xff", "standard input is not UTF-8 text (at byte 3)"),
        (["-m", b"ok \xff"], b"", "the message is not UTF-8 text (at byte 3)"),
        (["-m", b"\xed\xa0\xbd"], b"", "the message is not UTF-8 text (at byte 0)"),
    ],
    ids=str,
)
def test_without_a_message_nothing_is_sent(chat, options, stdin, message):
    assert chat(*options, stdin=stdin) == (9, b"", f"xeroctl: error: {message}\n".encode())


@pytest.mark.parametrize("options, status", [([], 2), (["-m", "-"], 2), (["-m", "hi"], 0)], ids=str)
def test_stdin_may_be_closed(shell, server, options, status):
    server.always(HELLO)
    done = shell('"$@" <&-', "chat", "--endpoint", "e", "--base-url", server.url, *options)
    said = b"xeroctl: error: no message: give -m TEXT, or pipe one in\n" if status else b""
    assert (done.returncode, done.stdout, done.stderr) == (status, b"" if status else b"Hello!\n", said)
    assert len(server.requests) == (0 if status else 1)


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_a_while_read_loop_keeps_its_input(shell, server):
    server.always(HELLO)
    done = shell('while read -r line; do "$@" -m "$line"; done', "chat", "--endpoint", "e", "--base-url", server.url,
                 program="bash", stdin=b"one\ntwo\nthree\n")
    assert (done.returncode, done.stdout) == (0, b"Hello!\n" * 3)
    assert done.stderr.count(b"xeroctl: note: standard input is not read: ") == done.stderr.count(b"\n") == 2
    assert [request.json["messages"][0]["content"] for request in server.requests] == ["one", "two", "three"]


# -- Conversations that last -----------------------------------------


def kept(path):
    return json.loads(path.read_text())


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_conversation_in_a_file_grows_by_each_question(chat, server, tmp_path):
    path = tmp_path / "talk.json"
    server.always(HELLO)
    assert chat("-m", "one", "--system", "Be brief.", "--conversation", path) == (0, b"Hello!\n", b"")
    assert chat("-m", "two", "--conversation", path, "--model", "m") == (0, b"Hello!\n", b"")
    first = [system("Be brief."), user("one")]
    assert [request.json["messages"] for request in server.requests] == [first, first + [assistant("Hello!"), user("two")]]
    document = kept(path)
    assert document["messages"] == first + [assistant("Hello!"), user("two"), assistant("Hello!")]
    assert (document["endpoint"], document["model"], path.stat().st_mode & 0o777) == ("my-endpoint", "m", 0o600)


def test_a_question_that_fails_is_kept_as_one_without_an_answer(chat, server, tmp_path):
    path = tmp_path / "talk.json"
    server.script(HELLO, json_response({"error": {"message": "no"}}, "400 Bad"), stream(chunk("Hal"), chunk("f")))
    assert chat("-m", "one", "--conversation", path).status == 0
    assert chat("-m", "two", "--conversation", path).status == 4
    assert kept(path)["messages"] == [user("one"), assistant("Hello!"), user("two")]
    assert chat("-m", "three", "--stream", "--conversation", path).status == 8
    assert kept(path)["messages"] == [user("one"), assistant("Hello!"), user("three"), assistant("Half")]


def test_the_endpoint_and_model_of_a_conversation_are_used_again(run, chat, server, tmp_path):
    path = tmp_path / "talk.json"
    server.always(HELLO)
    assert chat("-m", "one", "--model", "m", "--conversation", path).status == 0
    base_url = ["--base-url", server.url + "/acme/v1"]
    assert run("chat", *base_url, "-m", "two", "--conversation", path, env={"XEROTIER_ENDPOINT": "other"}).status == 0
    assert run("chat", *base_url, "-m", "three", "--conversation", path, "-e", "given").status == 0
    _, second, third = server.requests
    assert (second.target, second.json["model"]) == (TARGET, "m")
    assert third.target == "/acme/given/v1/chat/completions"


def test_a_dry_run_changes_no_conversation(chat, tmp_path):
    path = tmp_path / "talk.json"
    result = chat("-m", "one", "--conversation", path, "--dry-run")
    assert (result.status, path.exists()) == (0, False)


def test_what_is_no_conversation_is_refused(chat, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text("{}")
    result = chat("-m", "one", "--conversation", path)
    assert (result.status, result.stdout, path.read_text()) == (2, b"", "{}")


def test_the_newest_conversation_is_continued(chat, server, env):
    server.always(HELLO)
    none = chat("-m", "one", "-c")
    assert (none.status, none.stderr.count(b"\n")) == (2, 1)
    folder = Path(env["HOME"]) / ".local" / "state" / "xeroctl" / "conversations"
    folder.mkdir(parents=True)
    (folder / "20260101T000000Z-999999999.json").write_text(json.dumps({"messages": [user("zero"), assistant("ok")]}))
    assert chat("-m", "one", "-c") == (0, b"Hello!\n", b"")
    assert chat("--continue", "-m", "two") == (0, b"Hello!\n", b"")
    assert [message["content"] for message in server.requests[-1].json["messages"]] == ["zero", "ok", "one", "Hello!", "two"]
    newest, = folder.iterdir()
    assert len(kept(newest)["messages"]) == 6


# -- Endpoints that are models ---------------------------------------


@pytest.mark.parametrize("name", ["llama3.2:1b", "meta-llama/Llama-3", "a b é"])
def test_at_a_whole_address_an_endpoint_is_any_model_name(run, server, name):
    server.always(HELLO)
    whole = ["--base-url", server.url + "/v1/chat/completions"]
    for options in (["-e", name], ["--model", name]):
        assert run("chat", *whole, "-m", "hi", *options) == (0, b"Hello!\n", b"")
    assert [(request.target, request.json["model"]) for request in server.requests] == [("/v1/chat/completions", name)] * 2
    result = run("chat", "--base-url", server.url + "/v1", "-m", "hi", "-e", name)
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)


# -- Encodings -------------------------------------------------------

LOCALES = [
    {"LC_ALL": "C", "LANG": None},
    {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": None, "LANG": None, "PYTHONIOENCODING": "latin-1"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=str)
def test_text_travels_unharmed_in_every_locale(chat, server, tmp_path, locale):
    text = "héllo 😀"
    (tmp_path / text).write_text("système", encoding="utf-8")
    server.script(json_response(completion(text)))
    result = chat("-m", text.encode(), "--from-file", os.fsencode(str(tmp_path / text)), "--model", text.encode(),
                  "--param", f"{text}={text}".encode(), env=locale)
    assert result == (0, (text + "\n").encode(), b"")
    assert server.requests[0].body.decode()
    assert server.requests[0].json == body(model=text, messages=[system("système"), user(text)], **{text: text})


@pytest.mark.parametrize("locale", LOCALES[:3], ids=str)
def test_piped_text_travels_unharmed_in_every_locale(chat, server, locale):
    server.script(HELLO)
    assert chat(stdin="héllo 😀\n".encode(), env=locale).status == 0
    assert server.requests[0].json == body(messages=[user("héllo 😀")])


@pytest.mark.parametrize(
    "options",
    [
        [b"-m", b"hi", b"--system", b"\xff"], [b"-m", b"hi", b"--model", b"m\xff"],
        [b"-m", b"hi", b"--param", b"a=\xff"], [b"-m", b"hi", b"--param", b"n\xff=1"],
        [b"-m", b"hi", b"--param", b'a="\\ud83d"'], [b"-m", b"hi", b"--param", b'a={"\\udc00": ["\\ud83d"]}'],
    ],
    ids=str,
)
def test_no_lone_surrogate_is_sent(chat, server, options):
    server.script(HELLO)
    assert chat(*options, env=LOCALES[1]) == (0, b"Hello!\n", b"")
    document = json.loads(server.requests[0].body.decode("utf-8", "strict"))
    assert json.dumps(document, ensure_ascii=False).encode("utf-8", "strict")


def test_bytes_that_are_no_text_in_a_system_message_are_replaced(chat, server):
    server.script(HELLO)
    assert chat("-m", "hi", "--system", b"a\xffb").status == 0
    assert server.requests[0].json == body(messages=[system("a\ufffdb"), user("hi")])


# -- Verbose, dry run ------------------------------------------------


@pytest.mark.smoke
def test_verbose_shows_the_exchange_without_the_key(chat, server):
    server.script(json_response(completion(), headers={"X-Request-ID": "req-1", "X-Echo": KEY}))
    result = chat("-m", "hi é", "--verbose", env={"XEROTIER_API_KEY": KEY})
    assert (result.status, result.stdout) == (0, b"Hello!\n")
    lines = result.stderr.decode().split("\n")
    assert KEY not in result.stderr.decode()
    for line in (
        f"> POST {TARGET} HTTP/1.1", "> Authorization: Bearer ***", "> " + server.requests[0].body.decode(),
        "< HTTP/1.1 200 OK", "< X-Request-ID: req-1", "< X-Echo: ***",
    ):
        assert lines.count(line) == 1, line
    assert all(re.match(r"[*<>]( |$)", line) for line in lines[:-1])


AWKWARD = "it's \"$HOME\" `id` $(id) \\n !! * ~ %s\n#two\ttabs 😀"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
@pytest.mark.parametrize(
    "path, options",
    [
        ("/acme/v1", ["-m", AWKWARD]),
        ("/acme/v1", ["-m", "@/etc/passwd", "--stream", "--api-key", KEY, "--slo-ttft", "5", "--system", AWKWARD]),
        ("/v1/chat/completions?a=1&b=$HOME'", ["-m", "hi", "--model", AWKWARD.split("\n")[0]]),
        ("/{a,b}/[1-2]/v1", ["-m", "hi"]),
    ],
    ids=["awkward", "key and stream", "query", "braces"],
)
def test_a_dry_run_prints_a_curl_line_that_sends_the_same(chat, server, env, path, options):
    options = ["--base-url", server.url + path, *options]
    dry = chat(*options, "--dry-run")
    assert (dry.status, dry.stderr, server.requests) == (0, b"", [])
    assert dry.stdout.startswith(b"curl ") and dry.stdout.endswith(b"\n") and KEY.encode() not in dry.stdout
    server.always(HELLO)
    chat(*options, "--quiet")
    subprocess.run(["sh", "-c", dry.stdout], env={**env, "XEROTIER_API_KEY": KEY}, timeout=20,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ours, *theirs = server.requests
    assert len(theirs) == 1
    assert (ours.method, ours.target, ours.body) == (theirs[0].method, theirs[0].target, theirs[0].body)
    for name in ("authorization", "content-type", "accept", "x-slo-ttft-ms", "user-agent"):
        assert ours.headers.get(name) == theirs[0].headers.get(name), name


def test_a_dry_run_shows_the_key_nowhere(chat, server):
    options = ["-H", "X-Foo: " + KEY, "--param", "user=" + KEY, "--base-url", f"{server.url}/{KEY}/v1", "-m", KEY]
    result = chat(*options, "--api-key", KEY, "--dry-run")
    assert (result.status, result.stdout.count(b"***"), KEY.encode() in result.stdout) == (0, 4, False)


# -- Help ------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["chat", "--help"], ["chat", "-h", "--nonsense"]], ids=str)
def test_help_goes_to_stdout(run, arguments):
    result = run(*arguments)
    assert (result.status, result.stderr) == (0, b"")
    assert b"usage: xeroctl" in result.stdout and b"--base-url" in result.stdout
    assert (b"--max-tokens" in result.stdout) == ("chat" in arguments)


@pytest.mark.parametrize("arguments", [["--version"], ["chat", "--version"]], ids=str)
def test_the_version_goes_to_stdout(run, xeroctl, arguments):
    assert run(*arguments) == (0, f"xeroctl {xeroctl.__version__}\n".encode(), b"")


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_load_no_network_module(run, argument):
    driver = (
        "import os, sys\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
        "import xeroctl\n"
        "status = xeroctl.main(sys.argv[2:])\n"
        "sys.stderr.write(' '.join(sys.modules))\n"
        "sys.exit(status)\n"
    )
    result = run(argument, interpreter_options=("-c", driver))
    assert result.status == 0 and b"xeroctl" in result.stdout
    loaded = set(result.stderr.decode().split())
    assert "xeroctl" in loaded
    assert loaded & NETWORK_MODULES == set()
