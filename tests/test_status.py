"""`xeroctl status`: a request step by step, what each step took, and where it failed."""

import json
import os
import re
import select
import signal
import socket
import ssl
import subprocess
from threading import Event

import pytest

import loopback
from conftest import XEROCTL
from loopback import (BEFORE_REQUEST, DONE, USAGE, Call, Gate, Hold, Reset, chunk, completion, json_response,
                      read_request, response, sse, stream, stream_head)
from terminal import screen

KEY = "xero_acme_0123456789"
STEPS = ["settings", "name", "connection", "tls", "authorisation", "completion"]
MODELS = json_response({"object": "list", "data": [{"id": "test-model"}, {"id": "other"}]})
LUMP = stream(chunk("One"), chunk(finish="stop"), DONE)
HTML = response(b"<!DOCTYPE html><p>Hi", headers={"Content-Type": "text/html"})
NOTE = b"xeroctl: note: to try a completion too, give --endpoint SLUG\n"
PLAIN = "tls # s  none: the address is http://\n"
TAKEN = "authorisation # s  HTTP 200 without a key, models: 2\n"
JSON = ["-o", "json"]
ASKED = ["--endpoint", "e"]


def timeless(data):
    """Return the text of *data*, each time in it as #."""
    return re.sub(r" +\d+\.\d{2,3} s", " # s", data.decode())


def settings_line(url, source="--base-url", key="no API key"):
    return f"settings # s  base URL {url} ({source}), {key}\n"


def connected(url, *settings):
    """Return the lines of the steps up to the connection, for a server on this machine."""
    place = url.split("/")[2]
    return settings_line(url, *settings) + f"name # s  127.0.0.1 is 127.0.0.1\nconnection # s  connected to {place}\n"


def reached(url, *settings):
    """Return the lines of the steps that lead to a plain server on this machine."""
    return connected(url, *settings) + PLAIN


def outcome(result):
    """Return the (step, ok) pairs that the JSON on stdout tells, once its shape is seen to be right."""
    document = json.loads(result.stdout.decode())
    assert set(document) == {"ok", "steps"}
    assert document["ok"] is (result.status == 0)
    for step in document["steps"]:
        assert step["ok"] in (True, False, None)
        assert 0 <= step["seconds"] < 20
    return [(step["step"], step["ok"]) for step in document["steps"]]


def passed(count):
    """Return the (step, ok) pairs of a check whose first *count* steps are well."""
    return [(step, True) for step in STEPS[:count]]


def failed_at(name):
    """Return the (step, ok) pairs of a check that fails at the step *name*."""
    return passed(STEPS.index(name)) + [(name, False)]


def last_step(result):
    return json.loads(result.stdout.decode())["steps"][-1]


def error(status, message="no", **more):
    return json_response({"error": {"message": message, **more}}, status)


@pytest.fixture
def url(server):
    """A base URL of *server*."""
    return server.url + "/acme/v1"


@pytest.fixture
def together(start):
    """Run the status command with each of some lists of arguments, all at once, and return their Results."""

    def together(*commands, **options):
        children = [start("status", *arguments, **options) for arguments in commands]
        return [child.finish() for child in children]

    return together


@pytest.fixture
def check(together, server):
    """Check, all at once, places of the server that answer as each of *cases*, (options, models, chat), says.

    Return the Results; the nth place is server.url/n/v1.
    """

    def check(*cases):
        def answer(sock):
            request = read_request(sock)
            server.requests.append(request)
            _, models, chat = cases[int(request.target.split("/")[1])]
            reply = chat if request.target.endswith("/chat/completions") else models
            for step in reply if isinstance(reply, list) else [reply]:
                sock.sendall(step) if isinstance(step, bytes) else step.run(sock)

        server.always(BEFORE_REQUEST, Call(answer))
        return together(*(["--base-url", place(server, number), *case[0]] for number, case in enumerate(cases)))

    return check


def place(server, number):
    """Return the base URL of place *number*."""
    return f"{server.url}/{number}/v1"


# -- The steps -------------------------------------------------------


@pytest.mark.smoke
def test_each_step_is_a_line_with_its_time_in_one_column(run, server, url):
    server.script(MODELS)
    result = run("status", "--base-url", url)
    assert (result.status, timeless(result.stdout), result.stderr) == (0, reached(url) + TAKEN, NOTE)
    request = server.requests[0]
    assert (request.method, request.target, request.body) == ("GET", "/acme/v1/models", b"")
    assert "authorization" not in request.headers
    lines = result.stdout.decode().splitlines()
    assert len({line.index(" s  ") for line in lines}) == 1
    assert all(re.match(r"[a-z]+ +\d+\.\d{3} s  \S", line) for line in lines)


def test_json_is_one_object_with_the_same_steps(together, server, url):
    server.always(MODELS)
    command = ["--base-url", url, "--api-key", KEY, *JSON]
    loud, quiet = together(command, [*command, "--quiet"])
    assert (loud.status, outcome(loud)) == (0, passed(5))
    assert json.loads(loud.stderr.decode()) == {"kind": "note", "message": NOTE.decode()[15:-1]}
    assert (quiet.status, outcome(quiet), quiet.stderr) == (0, outcome(loud), b"")
    settings, name, connection, tls, authorisation = json.loads(loud.stdout.decode())["steps"]
    assert (settings["base_url"], settings["api_key"], settings["endpoint"]) == (url, "****6789", None)
    assert settings["sources"] == {"base_url": "--base-url", "api_key": "--api-key", "endpoint": None}
    assert (name["addresses"], connection["address"], tls["version"]) == (["127.0.0.1"], "127.0.0.1", None)
    assert authorisation["models"] == 2


@pytest.mark.smoke
def test_a_completion_is_streamed_and_told_of(run, server, url):
    server.script(MODELS, LUMP)
    result = run("status", "--base-url", url, "--endpoint", "my-endpoint", "--api-key", KEY)
    lines = timeless(result.stdout)
    assert (result.status, result.stderr, lines.count("\n")) == (0, b"", 6)
    assert lines.startswith(
        reached(url, "--base-url", "API key ****6789 (--api-key)")
        + "authorisation # s  HTTP 200 with the key, models: 2\n"
        "completion # s  first token after # s, model test-model, ")
    models, chat = server.requests
    assert (models.method, models.target) == ("GET", "/acme/my-endpoint/v1/models")
    assert (chat.method, chat.target) == ("POST", "/acme/my-endpoint/v1/chat/completions")
    body = chat.json
    assert [message["role"] for message in body.pop("messages")] == ["user"]
    assert body == {
        "model": "my-endpoint", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 16}
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer " + KEY}


def test_each_form_of_the_base_url_is_asked_at_its_addresses(together, server):
    def answer(sock):
        server.requests.append(read_request(sock))
        sock.sendall(MODELS if "/models" in server.requests[-1].target else LUMP)

    server.always(BEFORE_REQUEST, Call(answer))
    cases = {
        ("/acme/v1/", "--endpoint", "e"): ["/acme/e/v1/models", "/acme/e/v1/chat/completions"],
        ("/{endpoint}/v1", "--endpoint", "f"): ["/f/v1/models", "/f/v1/chat/completions"],
        ("/a/chat/completions", "--endpoint", "e"): ["/a/models", "/a/chat/completions"],
        ("/b/chat/completions?c=1", "--endpoint", "e"): ["/b/models?c=1", "/b/chat/completions?c=1"],
    }
    results = together(*(["--base-url", server.url + path, *slugs] for path, *slugs in cases))
    assert [result.status for result in results] == [0] * len(cases)
    assert sorted(request.target for request in server.requests) == sorted(sum(cases.values(), []))


# -- Settings --------------------------------------------------------


@pytest.fixture
def config(env):
    """Write the config file, and return its path."""

    def config(text):
        path = os.path.join(env["HOME"], ".config", "xeroctl", "config.toml")
        os.makedirs(os.path.dirname(path))
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o600)
        return path

    return config


@pytest.mark.smoke
def test_each_setting_names_its_source(start, server, url, config):
    server.always(MODELS)
    path = config(f'[deployment.prod]\nbase_url = "{url}"\napi_key = "{KEY}"\n[deployment.bare]\nbase_url = "{url}"\n')
    base, key = {"XEROTIER_BASE_URL": url}, {"XEROTIER_API_KEY": KEY}
    shown = "API key ****6789"
    cases = [
        (["--base-url", url, "--api-key", KEY], {}, "--base-url", f"{shown} (--api-key)"),
        (["--base-url", url], key, "--base-url", f"{shown} (XEROTIER_API_KEY)"),
        ([], {**base, **key}, "XEROTIER_BASE_URL", f"{shown} (XEROTIER_API_KEY)"),
        (["--context", "prod"], base, f"deployment prod in {path}", f"{shown} (deployment prod in {path})"),
        (["--context", "bare"], {}, f"deployment bare in {path}", "no API key"),
    ]
    children = [start("status", *arguments, env=variables) for arguments, variables, _, _ in cases]
    for child, (_, _, source, shown) in zip(children, cases):
        result = child.finish()
        assert timeless(result.stdout).startswith(reached(url, source, shown))
        assert (result.status, result.stderr) == (0, NOTE)


def test_the_form_of_the_output_comes_from_the_file_too(run, server, url, config):
    server.script(MODELS)
    config(f'current = "a"\n[deployment.a]\nbase_url = "{url}"\noutput = "json"\n')
    assert outcome(run("status", "--quiet")) == passed(5)


@pytest.mark.smoke
def test_the_key_is_never_shown(together, server, url):
    keys = {KEY: "****6789", "xero_a_b4567890": "****"}
    server.always(json_response({"data": []}, headers={"X-Echo": KEY}))
    for key, shown in keys.items():
        command = ["-v", "--base-url", url, "--api-key", key]
        for result in together(command, [*command, *JSON]):
            assert result.status == 0
            assert key[-5:].encode() not in result.stdout + result.stderr
            assert re.search(r"[ \"]%s[ \"]" % re.escape(shown), result.stdout.decode())
            assert b"> Authorization: Bearer ***\n" in result.stderr
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer " + key for key in keys}


def test_a_key_that_a_server_repeats_is_not_shown(run, server, url):
    server.always(error("404 Not Found", f"no {KEY}", code=KEY))
    result = run("status", "--base-url", url, *ASKED, "--api-key", KEY)
    assert result.status == 4
    assert KEY.encode() not in result.stdout + result.stderr


@pytest.mark.smoke
def test_settings_that_are_wrong_fail_at_the_first_step(together, config):
    config('[deployment.prod]\nbase_url = "http://127.0.0.1:1/v1"\n')
    text, as_json, unknown = together([], JSON, ["--context", "nope"])
    assert (text.status, timeless(text.stdout), text.stderr.count(b"\n")) == (2, "settings # s  failed\n", 1)
    assert text.stderr.startswith(b"xeroctl: error: no context is chosen: ")
    assert (as_json.status, outcome(as_json), as_json.stderr.count(b"\n")) == (2, failed_at("settings"), 1)
    assert (json.loads(as_json.stderr.decode())["kind"], last_step(as_json)["message"]) == (
        "usage", text.stderr.decode()[16:-1])
    assert (unknown.status, timeless(unknown.stdout)) == (2, "settings # s  failed\n")


def test_without_a_base_url_the_first_step_fails(run):
    result = run("status")
    assert (result.status, timeless(result.stdout)) == (2, "settings # s  failed\n")
    assert re.match(rb"xeroctl: error: no base URL: [^\n]+\n\Z", result.stderr)


@pytest.mark.smoke
def test_a_base_url_with_a_place_for_an_endpoint_wants_one(run, server):
    result = run("status", "--base-url", server.url + "/{endpoint}/v1")
    line = b"xeroctl: error: this base URL has a place for an endpoint: give --endpoint SLUG\n"
    assert (result.status, timeless(result.stdout), result.stderr) == (2, "settings # s  failed\n", line)


@pytest.mark.needs("tls")
def test_a_certificate_file_or_a_proxy_that_is_no_good_is_one_line(together):
    results = together(["--base-url", "https://127.0.0.1:1/v1", "--cacert", "/nonexistent.pem"],
                       ["--base-url", "http://api.invalid/v1"], env={"http_proxy": "socks5://127.0.0.1:1"})
    for result, word in zip(results, [b"/nonexistent.pem", b"socks5://127.0.0.1:1"]):
        assert (result.status, result.stderr.count(b"\n"), word in result.stderr) == (2, 1, True)
        assert timeless(result.stdout) == "settings # s  failed\n"


@pytest.mark.smoke
def test_a_dry_run_is_refused(together, url):
    for result in together(["--base-url", url, "--dry-run"], ["--demo", "--dry-run", *JSON]):
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
        assert b"--dry-run" in result.stderr


# -- Name and connection ---------------------------------------------

NAMED = """
import os, socket, sys
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import xeroctl

def answer(host, port, *unused):
    if host == "nowhere.invalid":
        raise socket.gaierror(-2, "Name or service not known")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))] * 2

socket.getaddrinfo = answer
sys.exit(xeroctl.main())
"""


@pytest.fixture
def refusing():
    """The host and port of an address that refuses connections."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield "127.0.0.1:%d" % sock.getsockname()[1]


def test_a_host_is_told_with_its_addresses_or_fails_at_the_name(together, server):
    server.script(MODELS)
    command = ["--base-url", "http://nowhere.invalid/v1", "--endpoint", "e"]
    known = f"http://somewhere.invalid:{server.port}/v1"
    text, as_json, found = together(
        command, [*command, *JSON], ["--base-url", known], interpreter_options=("-c", NAMED))
    line = "unknown host: nowhere.invalid: Name or service not known"
    said = settings_line(command[1]) + "name # s  failed\n"
    assert (text.status, timeless(text.stdout), text.stderr) == (6, said, f"xeroctl: error: {line}\n".encode())
    assert (as_json.status, outcome(as_json), last_step(as_json)["message"]) == (6, failed_at("name"), line)
    assert (as_json.stderr.count(b"\n"), json.loads(as_json.stderr.decode())["message"]) == (1, line)
    said = reached(known).replace("127.0.0.1 is", "somewhere.invalid is") + TAKEN
    assert (found.status, timeless(found.stdout), found.stderr) == (0, said, NOTE)


@pytest.mark.smoke
def test_a_refused_connection_fails_there_and_is_not_retried(together, refusing):
    url = f"http://{refusing}/v1"
    text, as_json = together(["--base-url", url], ["--base-url", url, *JSON])
    said = settings_line(url) + "name # s  127.0.0.1 is 127.0.0.1\nconnection # s  failed\n"
    line = f"{refusing} refused the connection: is the server running?"
    assert (text.status, timeless(text.stdout), text.stderr) == (6, said, f"xeroctl: error: {line}\n".encode())
    assert (as_json.status, outcome(as_json), as_json.stderr.count(b"\n")) == (6, failed_at("connection"), 1)
    assert json.loads(as_json.stderr.decode())["message"] == line


FAR = "http://api.invalid/v1"


def test_the_steps_name_the_proxy(start, server, refusing):
    server.script(MODELS)
    proxy = server.url.replace("://", "://user:pass-word@")
    through, refused = [child.finish() for child in [
        start("status", "--base-url", FAR, env={"http_proxy": address}) for address in (proxy, "http://" + refusing)]]
    said = settings_line(FAR) + "name # s  127.0.0.1 is 127.0.0.1\nconnection # s  "
    done = f"connected to the proxy 127.0.0.1:{server.port}\n"
    assert (through.status, timeless(through.stdout), through.stderr) == (0, said + done + PLAIN + TAKEN, NOTE)
    assert server.requests[0].target == FAR + "/models"
    line = f"xeroctl: error: the proxy {refusing} refused the connection: is the server running?\n"
    assert (refused.status, timeless(refused.stdout), refused.stderr) == (6, said + "failed\n", line.encode())


@pytest.mark.smoke
def test_a_proxy_that_wants_a_password_fails_the_check(run, server):
    server.script(response(status="407 Proxy Authentication Required"))
    result = run("status", "--base-url", FAR, env={"http_proxy": server.url})
    assert (result.status, result.stderr.count(b"\n")) == (4, 1)
    assert b"407" in result.stderr and b"the proxy wants a user and password" in result.stderr
    assert timeless(result.stdout).endswith("authorisation # s  failed\n")


@pytest.mark.needs("tls")
def test_a_proxy_that_gives_no_tunnel_is_named(run, server):
    server.script(response(status="502 Bad Gateway"))
    result = run("status", "--base-url", "https://api.invalid/v1", env={"https_proxy": server.url})
    assert (result.status, result.stderr.count(b"\n"), len(server.requests)) == (6, 1, 1)
    assert f"the proxy 127.0.0.1:{server.port}" in result.stderr.decode() and b"502" in result.stderr
    assert timeless(result.stdout).endswith(" # s  failed\n")


# -- TLS -------------------------------------------------------------


@pytest.fixture
def secure(certificate):
    """A scripted server that speaks TLS, and answers with models."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    with loopback.Server(tls_context=context) as server:
        server.always(MODELS)
        yield server


@pytest.mark.smoke
def test_tls_tells_its_version_and_how_long_the_certificate_is_good(together, secure, certificate):
    url = secure.url + "/v1"
    command = ["--base-url", url, "--cacert", str(certificate)]
    text, as_json = together(command, [*command, *JSON])
    line = r"tls # s  TLSv1\.[23], the certificate is good until \w{3} +\d+ \d\d:\d\d:\d\d 20\d\d GMT, (1 more day|2 more days)\n"
    said = timeless(text.stdout)
    assert (text.status, text.stderr) == (0, NOTE)
    assert re.fullmatch(re.escape(connected(url)) + line + re.escape(TAKEN), said)
    assert (as_json.status, outcome(as_json)) == (0, passed(5))
    tls = json.loads(as_json.stdout.decode())["steps"][3]
    assert re.fullmatch(r"TLSv1\.[23]", tls["version"]) and tls["certificate_days"] in (1, 2)


def test_a_certificate_that_nobody_knows_fails_at_tls(together, secure):
    url = secure.url + "/v1"
    text, as_json = together(["--base-url", url], ["--base-url", url, *JSON])
    assert (text.status, timeless(text.stdout)) == (6, connected(url) + "tls # s  failed\n")
    assert re.fullmatch(rb"xeroctl: error: TLS with 127[^\n]* failed: [^\n]+ --cacert FILE [^\n]+\n", text.stderr)
    assert (as_json.status, outcome(as_json), secure.requests) == (6, failed_at("tls"), [])


@pytest.mark.needs("tls")
def test_a_plain_server_behind_https_fails_at_tls(run, server):
    server.script([BEFORE_REQUEST, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"])
    url = server.url.replace("http", "https") + "/v1"
    result = run("status", "--base-url", url)
    line = f"xeroctl: error: no TLS at 127.0.0.1:{server.port}: is it an http:// address?\n"
    said = connected(url) + "tls # s  failed\n"
    assert (result.status, timeless(result.stdout), result.stderr) == (6, said, line.encode())


# -- Authorisation ---------------------------------------------------

REFUSALS = {
    "401": (ASKED, error("401 Unauthorized"), 3),
    "403": ([], error("403 Forbidden"), 3),
    "429": (ASKED, error("429 Slow", retry_after=0), 7),
    "500": (ASKED, error("500 Broken", retry_after=0), 5),
    "HTML": (ASKED, HTML, 5),
    "no list": ([], json_response({"object": "list"}), 5),
    "cut short": ([], MODELS[:-5], 8),
    "reset": ([], Reset(), 6),
}


def test_a_refusal_fails_at_the_authorisation_and_is_not_retried(check, server):
    results = check(*((options, reply, LUMP) for options, reply, _ in REFUSALS.values()))
    seen = {name: (result.status, timeless(result.stdout)) for name, result in zip(REFUSALS, results)}
    assert seen == {
        name: (status, reached(place(server, number)) + "authorisation # s  failed\n")
        for number, (name, (_, _, status)) in enumerate(REFUSALS.items())}
    assert all(re.fullmatch(rb"xeroctl: error: [^\n]+\n", result.stderr) for result in results)
    assert len(server.requests) == len(REFUSALS)


def test_json_has_the_step_that_was_refused(check):
    result, = check((ASKED + JSON, error("401 Unauthorized"), None))
    assert (result.status, outcome(result)) == (3, failed_at("authorisation"))
    reported = json.loads(result.stderr.decode())
    assert (result.stderr.count(b"\n"), reported["kind"], reported["message"]) == (
        1, "auth", last_step(result)["message"])


def test_a_401_inside_a_200_is_a_401(check):
    result, = check(([], error("200 OK", code=401), None))
    assert (result.status, result.stderr.count(b"\n")) == (3, 1)


CHATS_ALONE = {
    "403": (error("403 Forbidden"), LUMP, 0),
    "404": (error("404 Not Found"), LUMP, 0),
    "403 twice": (error("403 Forbidden"), error("403 Forbidden"), 3),
    "404 twice": (error("404 Not Found"), error("404 Not Found"), 4),
}


def test_a_key_or_server_for_chats_alone_is_decided_by_the_completion(check, server):
    results = check(*((ASKED, models, chat) for models, chat, _ in CHATS_ALONE.values()))
    for number, (name, (_, _, status)) in enumerate(CHATS_ALONE.items()):
        result, begin = results[number], reached(place(server, number))
        lines = timeless(result.stdout)[len(begin):].split("\n")
        assert (name, result.status, result.stderr.count(b"\n")) == (name, status, int(status > 0))
        assert timeless(result.stdout).startswith(begin)
        assert lines[0].startswith(f"authorisation # s  not known: HTTP {name[:3]}")
        assert (lines[1].startswith("completion # s  "), lines[1].endswith("  failed"), lines[2:]) == (
            True, status > 0, [""])


def test_json_tells_why_the_authorisation_is_not_known(check):
    result, = check((ASKED + JSON, error("404 Not Found", "nothing"), LUMP))
    assert (result.status, outcome(result), result.stderr) == (
        0, passed(4) + [("authorisation", None), ("completion", True)], b"")
    *_, authorisation, step = json.loads(result.stdout.decode())["steps"]
    assert "HTTP 404" in authorisation["message"]
    assert (step["model"], step["chunks"]) == ("test-model", 2)
    assert 0 < step["first_token_seconds"] <= step["seconds"] + 0.001


# -- Completion ------------------------------------------------------

FAILURES = {
    "401": (error("401 Unauthorized"), 3),
    "500": (error("500 Broken", retry_after=0), 5),
    "429": (error("429 Slow", retry_after=0), 7),
    "cut short": (stream(chunk("One")), 8),
    "error in the stream": (stream(chunk("One"), {"error": {"message": "no", "code": 503}}), 5),
    "no answer": (stream(DONE), 5),
    "reset": (Reset(), 6),
}


def test_a_completion_that_fails_has_its_own_status_and_is_not_retried(check, server):
    results = check(*((ASKED, MODELS, reply) for reply, _ in FAILURES.values()))
    seen = {name: (result.status, timeless(result.stdout)) for name, result in zip(FAILURES, results)}
    assert seen == {
        name: (status, reached(place(server, number)) + TAKEN + "completion # s  failed\n")
        for number, (name, (_, status)) in enumerate(FAILURES.items())}
    assert all(re.fullmatch(rb"xeroctl: error: [^\n]+\n", result.stderr) for result in results)
    assert len(server.requests) == 2 * len(FAILURES)


def test_json_tells_of_a_completion_that_fails(check):
    result, = check((ASKED + JSON, MODELS, error("400 Bad Request", "too long")))
    assert (result.status, outcome(result)) == (4, failed_at("completion"))
    assert last_step(result)["message"] == "HTTP 400: too long"
    assert json.loads(result.stderr.decode())["message"] == "HTTP 400: too long"


def moment(sock):
    """Say nothing for long enough that the last chunk was seen alone."""
    select.select([sock], [], [], 0.03)


def told(result):
    """Return what the completion's line tells after the model."""
    start = "completion # s  first token after # s, model test-model, "
    line = timeless(result.stdout).split("\n")[5]
    assert (result.status, line[:len(start)]) == (0, start)
    return line[len(start):]


ONE_BY_ONE = [stream_head(), sse(chunk("One")), Call(moment), sse(chunk(" two")), Call(moment),
              sse(chunk(" three")), Call(moment), sse(chunk(finish="stop"), DONE)]
IN_ONE_PIECE = "in one piece: it may be that this server does not stream"
AT_ONCE = "at once, too fast to see it stream"
HELD_BACK = "in one burst: something on the way, a proxy perhaps, holds the stream back"


def test_chunks_that_come_one_by_one_or_in_one_piece_are_told(check):
    results = check((ASKED, MODELS, ONE_BY_ONE), (ASKED, MODELS, json_response(completion())))
    assert [told(result) for result in results] == ["one by one", IN_ONE_PIECE]


def test_an_answer_that_is_simply_fast_blames_no_proxy(check):
    results = check((ASKED, MODELS, LUMP), (ASKED, MODELS, stream(*[chunk("a")] * 16, chunk(finish="stop"), DONE)))
    assert {told(result) for result in results} <= {AT_ONCE, "one by one"}  # a machine that is busy may look like a stream


def late(sock):
    """Say nothing for as long as some tokens would take."""
    select.select([sock], [], [], 0.3)


def test_chunks_that_come_late_and_in_one_burst_are_told(check):
    for reply in ([Call(late), LUMP], [stream_head(), Call(late), sse(chunk("One"), chunk(finish="stop"), DONE)]):
        result, = check((ASKED, MODELS, reply))
        assert told(result) == HELD_BACK


@pytest.mark.parametrize("chunks, arrivals, seconds, words", [
    (2, 2, 1, "one by one"), (3, 2, 1, "one by one"), (16, 8, 1, "one by one"), (16, 7, 1, "in 7 bursts"), (6, 2, 1, "in 2 bursts"),
    (2, 1, 1, HELD_BACK), (2, 1, 0.01, AT_ONCE), (1, 1, 1, IN_ONE_PIECE), (1, 1, 0.01, IN_ONE_PIECE),
], ids=str)
def test_the_pace_of_a_stream(xeroctl, chunks, arrivals, seconds, words):
    assert xeroctl.describe_pace(chunks, arrivals, seconds) == words


def test_figures_are_those_of_a_chat(check):
    reply = [stream_head(), sse(chunk("One")), Call(late), sse(chunk(" two"), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)]
    text, as_json = check((ASKED, MODELS, reply), (ASKED + JSON, MODELS, reply))
    pace, _, rate = told(text).rpartition(", ")
    rate, _, unit = rate.partition(" ")
    assert unit == "tokens/s after it" and 3 < float(rate) < 7  # two tokens after the first, in 0.3 s
    step = last_step(as_json)
    assert (step["prompt_tokens"], step["completion_tokens"], step["total_tokens"]) == (9, 3, 12)
    assert 3 < step["tokens_per_second"] < 7 and step["finish_reason"] == "stop"


# -- Servers that want another form ----------------------------------


def picky(refuses, words, status="400 Bad Request"):
    """Return a step that answers a completion, but refuses a body with the field *refuses*."""

    def answer(sock):
        request = read_request(sock)
        fields = request.json if request.body else {}
        log.append((request.target, sorted(set(fields) & {"max_tokens", "max_completion_tokens", "stream_options"})))
        if request.target.endswith("/models"):
            sock.sendall(MODELS)
        else:
            sock.sendall(error(status, words) if refuses in fields else LUMP)

    log = []
    return BEFORE_REQUEST, Call(answer), log


@pytest.mark.parametrize("refuses, words, forms", [
    ("max_tokens", "Unsupported parameter: 'max_tokens': use 'max_completion_tokens' instead.",
     [["max_tokens", "stream_options"], ["max_completion_tokens", "stream_options"]]),
    ("stream_options", "Extra inputs are not permitted: stream_options", [["max_tokens", "stream_options"], ["max_tokens"]]),
], ids=["max_tokens", "stream_options"])
@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable"])
def test_each_form_of_the_completion_is_sent_once(run, server, url, refuses, words, forms, status):
    before, step, log = picky(refuses, words, status)
    server.always(before, step)
    result = run("status", "--base-url", url, *ASKED)
    assert (result.status, result.stderr) == (0, b"")
    assert [fields for target, fields in log if target.endswith("completions")] == forms


def test_a_form_that_is_refused_again_is_the_failure(run, server, url):
    before, step, log = picky("model", "max_tokens is too small")
    server.always(before, step)
    result = run("status", "--base-url", url, *ASKED)
    assert (result.status, result.stderr) == (4, b"xeroctl: error: HTTP 400: max_tokens is too small\n")
    assert len(log) == 3


@pytest.mark.parametrize("body", [{"object": "list", "data": None}, {"data": []}, []], ids=str)
def test_no_models_are_no_failure(check, body):
    result, = check((JSON, json_response(body), None))
    assert (result.status, outcome(result), last_step(result)["models"]) == (0, passed(5), 0)


@pytest.mark.parametrize("status", ["404 Not Found", "405 Not Allowed"])
def test_a_server_without_a_list_of_models_is_said_to_have_none(run, server, status):
    server.script(error(status, "no route"), LUMP)
    result = run("status", "--base-url", server.url + "/v1/chat/completions", *ASKED)
    assert (result.status, result.stderr) == (0, b"")
    line = timeless(result.stdout).split("\n")[4]
    assert line.startswith("authorisation # s  not known: HTTP " + status[:3])
    assert "base URL" not in line and "slug" not in line


def test_an_address_without_a_slug_is_tried_and_named(run, server):
    def answer(sock):
        request = read_request(sock)
        server.requests.append(request)
        sock.sendall(LUMP if request.target == "/v1/chat/completions" else error("404 Not Found"))

    server.always(BEFORE_REQUEST, Call(answer))
    for path in ("", "/v1"):
        result = run("status", "--base-url", server.url + path, *ASKED)
        assert (result.status, result.stderr.count(b"\n")) == (4, 1)
        assert f"{server.url}/v1/chat/completions answers" in result.stderr.decode()
        assert timeless(result.stdout).endswith("completion # s  failed\n")
    good = run("status", "--base-url", server.url + "/v1/chat/completions", *ASKED)
    assert (good.status, good.stderr) == (0, b"")


def test_retries_are_neither_made_nor_advised(check, server):
    results = check((ASKED, MODELS, error("503 Unavailable")), (ASKED, error("429 Slow", retry_after=90), None))
    assert [result.status for result in results] == [5, 7]
    assert b"--retries" not in results[0].stderr + results[1].stderr
    assert len(server.requests) == 3


def test_a_plain_server_of_the_openai_variables(run, server):
    server.script(MODELS, LUMP)
    variables = {"OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": KEY}
    result = run("status", "--endpoint", "meta-llama/Llama-3:8b", env=variables)
    assert (result.status, result.stderr) == (0, b"")
    assert [request.target for request in server.requests] == ["/v1/models", "/v1/chat/completions"]
    assert server.requests[1].json["model"] == "meta-llama/Llama-3:8b"


# -- What is missing or odd ------------------------------------------


def named(model):
    return stream(chunk("One", model=model), chunk(finish="stop", model=model), DONE)


def test_what_is_missing_from_an_answer_is_not_told(check):
    results = check(
        (ASKED, MODELS, named(None)),
        (ASKED, MODELS, stream(chunk(delta={"reasoning": "Hm"}, model="日本語"), chunk(finish="length", model="日本語"))),
        (ASKED, MODELS, stream(chunk(), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)))
    lines = [timeless(result.stdout).split("\n")[5] for result in results]
    assert [(result.status, result.stderr.count(b"\n")) for result in results] == [(0, 0), (0, 0), (5, 1)]
    begin = ["first token after # s, model not told, ", "first token after # s, model 日本語, ", "failed"]
    assert [line.startswith("completion # s  " + text) for line, text in zip(lines, begin)] == [True] * 3


def test_whatever_a_server_says_each_step_is_one_line(check):
    results = check(
        (ASKED, MODELS, named("a\x1b[31m\tb\nname  0.1 s  c")),
        (ASKED, error("405 Not Allowed", "a\nb", code="x\ny"), LUMP))
    assert [(result.status, result.stdout.count(b"\n")) for result in results] == [(0, 6)] * 2


# -- Practice endpoint -----------------------------------------------


def test_the_practice_endpoint_passes(together):
    text, as_json = together(["--demo"], ["--demo", *JSON])
    lines = timeless(text.stdout).split("\n")
    assert (text.status, text.stderr, as_json.status, as_json.stderr) == (0, b"", 0, b"")
    assert re.fullmatch(r"settings # s  base URL http://127\.0\.0\.1:\d+/practice/v1 \(--demo\), no API key", lines[0])
    assert lines[3:5] == [PLAIN[:-1], TAKEN.replace("2\n", "1")]
    start, _, rate = lines[5].rpartition(", ")
    assert start == "completion # s  first token after # s, model practice, one by one"
    assert re.fullmatch(r"\d+\.\d tokens/s after it", rate)
    assert outcome(as_json) == passed(6)


# -- Streams and terminals -------------------------------------------


def test_a_reader_gone_from_the_start_is_status_141(together, server, url):
    server.always(MODELS)
    reader, writer = os.pipe()
    os.close(reader)
    results = together(["--base-url", url, "-q"], ["--base-url", url, "-q", *JSON], stdout=writer)
    os.close(writer)
    assert results == [(141, b"", b"")] * 2


def test_a_reader_that_goes_in_the_middle_is_status_141(start, server, url):
    gate = Event()
    server.script([Gate(gate), MODELS])
    reader, writer = os.pipe()
    child = start("status", "--base-url", url, stdout=writer)
    os.close(writer)
    server.wait_requests()
    os.close(reader)
    gate.set()
    assert child.finish() == (141, b"", b"")


def test_a_full_disk_is_one_line(together, server, url):
    server.always(MODELS)
    with open("/dev/full", "wb") as full:
        results = together(["--base-url", url, "-q"], ["--base-url", url, "-q", *JSON], stdout=full)
    for result in results:
        assert (result.status, result.stderr.count(b"\n")) == (1, 1)
        assert b"cannot write to stdout: No space left on device" in result.stderr


def test_a_file_that_is_full_at_the_last_line_is_one_line(interpreter, env, server, url, tmp_path):
    server.script(MODELS, named("m" * 2000))
    words = [interpreter, str(XEROCTL), "status", "--base-url", url, *ASKED]
    done = subprocess.run(["sh", "-c", 'ulimit -f 2; exec "$@" > out', "sh", *words], env=env, cwd=str(tmp_path),
                          stderr=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stderr) == (1, b"xeroctl: error: cannot write to stdout: File too large\n")


def test_ctrl_c_ends_it_at_once(start, server, url):
    server.script([Hold()])
    child = start("status", "--base-url", url)
    child.expect("none: the address is http://\n")
    server.wait_requests()
    child.signal(signal.SIGINT)
    result = child.finish(timeout=5)
    assert (result.status, timeless(result.stdout), result.stderr) == (130, reached(url), b"")


def on_screen(child, columns=200):
    """Return the lines on the screen, each time in it as #."""
    return [re.sub(r" +\d+\.\d\d s", " # s", line) for line in screen(child.output, columns)]


def test_a_terminal_shows_the_lines_and_nothing_else(terminal, server, url):
    gate = Event()
    server.script(MODELS, [Gate(gate), LUMP])
    child = terminal("status", "--base-url", url, *ASKED, columns=200)
    child.expect(re.compile(rb"\r[-|/\\] waiting"))
    gate.set()
    assert child.finish() == 0
    shown = on_screen(child)
    assert [line.split()[0] for line in shown] == ["settings"] + STEPS
    assert shown[0] == f"settings      ok # s  base URL {url} (--base-url)"
    assert shown[1].split(None, 1) == ["settings", "no API key"]
    assert all(re.match(r"[a-z]+ +ok # s  \S", line) for line in shown[2:])
    assert child.output.count(b"\x1b[32mok\x1b[0m") == len(STEPS)


def test_a_terminal_shows_a_failure_below_its_step(terminal, server, url):
    server.script(MODELS, error("400 Bad Request", "too \x1b[31mlong"))
    child = terminal("status", "--base-url", url, *ASKED, columns=200)
    assert child.finish() == 4
    assert on_screen(child)[-2:] == ["completion    FAILED # s", "xeroctl: error: HTTP 400: too ␛[31mlong"]
    assert b"\x1b[31mFAILED\x1b[0m" in child.output


def test_a_terminal_without_colours_shows_the_same_words(terminal, server, url):
    server.script(MODELS, error("400 Bad Request"))
    child = terminal("status", "--base-url", url, *ASKED, columns=200, env={"NO_COLOR": "1"})
    assert child.finish() == 4
    assert on_screen(child)[-2:] == ["completion    FAILED # s", "xeroctl: error: HTTP 400: no"]
    assert b"\x1b" not in child.output


def test_a_narrow_terminal_shows_each_setting_once_and_the_home_folder_as_a_tilde(terminal, server, url, config):
    server.script(MODELS)
    config(f'current = "prod"\n[deployment.prod]\nbase_url = "{url}"\napi_key = "{KEY}"\n')
    child = terminal("status", columns=80)
    assert child.finish() == 0
    shown = on_screen(child, 80)
    lines = [line for line in shown if line.startswith("settings ")]
    assert len(lines) >= 3 and all(len(line) <= 80 for line in lines)
    assert " ".join(re.sub(r"settings +(ok # s +)?", "", line) for line in lines) == (
        f"base URL {url} (deployment prod in ~/.config/xeroctl/config.toml) API key ****6789 (the same)")


@pytest.mark.smoke
def test_the_scheme_may_be_in_upper_case(run, server):
    server.script(response(b"no", "401 Unauthorized"))
    result = run("status", "--base-url", server.url.replace("http", "HTTP") + "/v1")
    assert (result.status, result.stdout.split(b"\n")[-2].split()[0]) == (3, b"authorisation")
