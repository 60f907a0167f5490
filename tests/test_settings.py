"""Where the settings come from, which addresses they make, and whom the key is sent to."""

import argparse
import contextlib
import json
import os
import re

import pytest

import loopback
from loopback import completion, json_response

HELLO = json_response(completion())
KEY = "xero_acme_0123456789"
DRY = ["chat", "--endpoint", "my-endpoint", "-m", "hi", "--dry-run"]


@pytest.fixture
def path(env):
    """The path of the config file, in a folder that exists."""
    path = os.path.join(env["HOME"], ".config", "xeroctl", "config.toml")
    os.makedirs(os.path.dirname(path))
    return path


@pytest.fixture
def config(path):
    """Write the config file, for its owner alone, and return its path."""

    def config(content, mode=0o600):
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        os.chmod(path, mode)
        return path

    return config


def deployments(current="prod", **tables):
    """Return the TOML text of *tables*, each a dict of texts."""
    lines = [f'current = "{current}"'] if current else []
    for name, table in tables.items():
        lines += [f"[deployment.{name}]"] + [f'{key} = "{value}"' for key, value in table.items()]
    return "\n".join(lines) + "\n"


def sent(result):
    """Return the URL and whether a key goes with it, as the curl line of a dry run says."""
    line = result.stdout.decode()
    assert result.status == 0 and line.startswith("curl ")
    return line.split()[2].strip("'"), "Authorization" in line


# -- Precedence ------------------------------------------------------


@pytest.mark.parametrize("option, variable, winner", [
    (True, "/env/v1", "option"), (True, None, "option"), (False, "/env/v1", "env"), (False, "", "file"), (False, None, "file"),
])
def test_option_beats_environment_beats_file(run, server, config, option, variable, winner):
    config(deployments(prod={"base_url": server.url + "/file/v1", "api_key": "file"}))
    server.script(HELLO)
    options = ["--base-url", server.url + "/option/v1", "--api-key", "option"] if option else []
    env = {"XEROTIER_BASE_URL": variable and server.url + variable, "XEROTIER_API_KEY": variable and "env"}
    assert run("chat", "--endpoint", "e", "-m", "hi", *options, env=env) == (0, b"Hello!\n", b"")
    assert server.requests[0].target == f"/{winner}/e/v1/chat/completions"
    assert server.requests[0].headers["authorization"] == "Bearer " + winner


@pytest.mark.parametrize("options, variable, current, winner", [
    (["--context", "a"], "b", "c", "a"), ([], "b", "c", "b"), ([], "", "c", "c"), ([], None, "c", "c"),
    (["--context", "a"], None, None, "a"),
])
def test_the_context_is_chosen_by_option_then_environment_then_file(run, config, options, variable, current, winner):
    config(deployments(current, **{name: {"base_url": f"https://{name}.example/v1", "api_key": KEY} for name in "abc"}))
    result = run(*DRY, *options, env={"XEROTIER_CONTEXT": variable})
    assert sent(result) == (f"https://{winner}.example/my-endpoint/v1/chat/completions", True)


@pytest.mark.parametrize("options, stored, is_json", [
    (["-o", "json"], "table", True), (["-o", "text"], "json", False), (["-o", "table"], "json", False),
    ([], "json", True), ([], "table", False), ([], "text", False), ([], None, False),
])
def test_the_output_form_is_the_options_then_the_files(chat, server, config, options, stored, is_json):
    config(deployments(prod={"output": stored} if stored else {}))
    server.script(HELLO)
    printed = json.dumps(completion(), indent=2).encode() if is_json else b"Hello!"
    assert chat("-m", "hi", *options) == (0, printed + b"\n", b"")


def test_the_file_may_ask_for_errors_in_json(run, config):
    config(deployments(prod={"base_url": "https://api.example/v1", "output": "json"}))
    result = run("chat", "--endpoint", "e", "-m", "")
    assert (result.status, result.stdout) == (9, b"")
    assert json.loads(result.stderr.decode())["message"] == "the message is empty"


@pytest.mark.smoke
def test_no_base_url_says_the_three_ways_to_give_one(run):
    line = (b"xeroctl: error: no base URL: set it up with: xeroctl config init, or set XEROTIER_BASE_URL and XEROTIER_API_KEY, "
            b"or try without any: xeroctl chat --demo -m Hello\n")
    assert run(*DRY) == (2, b"", line)
    assert run(*DRY, env={"XEROTIER_BASE_URL": ""}) == (2, b"", line)


def test_a_file_that_chooses_no_context_says_which_there_are(run, config):
    path = config('[deployment.prod]\nbase_url = "https://api.example/v1"\n')
    line = (f"xeroctl: error: no context is chosen: {path} has: prod: give --context CONTEXT, "
            "or choose with: xeroctl config use CONTEXT\n")
    assert run(*DRY) == (2, b"", line.encode())
    assert run(*DRY, "--context", "prod").status == 0


def test_an_unknown_context_names_the_known_ones(run, config):
    path = config(deployments("gone", staging={}, prod={}))
    for name, options in (("gone", []), ("x y", ["--context", "x y"])):
        line = f"xeroctl: error: unknown context '{name}': {path} has: prod, staging\n"
        assert run(*DRY, "--base-url", "https://api.example/v1", *options) == (2, b"", line.encode())


def test_a_context_without_a_file_is_unknown(run):
    result = run(*DRY, "--base-url", "https://api.example/v1", "--context", "prod")
    assert (result.status, result.stdout) == (2, b"")
    assert result.stderr.startswith(b"xeroctl: error: unknown context 'prod': ") and result.stderr.endswith(b" has: none\n")


# -- Everything that settings come from, as a table ------------------

XEROTIER = {"XEROTIER_BASE_URL": "https://env.example/v1", "XEROTIER_API_KEY": "env-key"}
OPENAI = {"OPENAI_BASE_URL": "https://openai.example/v1", "OPENAI_API_KEY": "openai-key"}
ENV_KEY = {"XEROTIER_API_KEY": "env-key"}
A = {"base_url": "https://a.example/v1", "api_key": "a-key", "endpoint": "ea", "stream": True}
KEYLESS = {"base_url": "https://a.example/v1"}
NOT_SENT = "XEROTIER_API_KEY is for another server and is not sent"
A_NOT_SENT = "the key of context a is for another server and is not sent"
FROM_A = ("https://a.example/v1", "a-key", "ea", True)
FROM_ENV = ("https://env.example/v1", "env-key", None, False)
FROM_OPENAI = ("https://openai.example/v1/chat/completions", "openai-key", None, False)
SOURCES = {  # options, variables, deployment a, whether it is the current one, settings, notes
    "the current deployment": ({}, {}, A, True, FROM_A, []),
    "a given one": ({"context": "a"}, {}, A, False, FROM_A, []),
    "one that a variable names": ({}, {"XEROTIER_CONTEXT": "a"}, A, False, FROM_A, []),
    "variables beat the current one": ({}, XEROTIER, A, True, FROM_ENV, []),
    "variables beat one that a variable names": ({}, {**XEROTIER, "XEROTIER_CONTEXT": "a"}, A, False, FROM_ENV, []),
    "a given one beats variables": ({"context": "a"}, XEROTIER, A, False, FROM_A, []),
    "a given current one beats variables": ({"context": "a"}, XEROTIER, A, True, FROM_A, []),
    "empty variables": ({}, dict.fromkeys([*XEROTIER, *OPENAI, "XEROTIER_ENDPOINT", "XEROTIER_CONTEXT"], ""), A, True, FROM_A, []),
    "the variable's key beats the current one's": ({}, ENV_KEY, A, True, (FROM_A[0], "env-key", "ea", True), []),
    "a given one's key beats the variable's": ({"context": "a"}, ENV_KEY, A, True, FROM_A, []),
    "options beat all": (
        {"context": "a", "base_url": "https://o.example", "api_key": "o-key", "endpoint": "eo", "stream": False},
        {**XEROTIER, **OPENAI, "XEROTIER_ENDPOINT": "ev"}, A, True, ("https://o.example", "o-key", "eo", False), []),
    "an address alone gets the variable's key": (
        {"base_url": "https://o.example"}, ENV_KEY, A, True, ("https://o.example", "env-key", None, False), []),
    "an address alone does not get a stored key": (
        {"base_url": "https://o.example"}, {}, A, True, ("https://o.example", None, None, False), [A_NOT_SENT]),
    "an address alone of the same origin does": (
        {"base_url": "https://a.example/v2"}, {}, A, True, ("https://a.example/v2", "a-key", None, False), []),
    "a variable's address does not get a stored key": (
        {}, {"XEROTIER_BASE_URL": "https://env.example/v1"}, A, True, (*FROM_ENV[:1], None, None, False), [A_NOT_SENT]),
    "a deployment without a key": ({}, {}, KEYLESS, True, (FROM_A[0], None, None, False), []),
    "it takes the variable's": ({}, ENV_KEY, KEYLESS, True, (FROM_A[0], "env-key", None, False), []),
    "given, it takes the variable's": ({"context": "a"}, ENV_KEY, KEYLESS, False, (FROM_A[0], "env-key", None, False), []),
    "but not one that is another server's": (
        {"context": "a"}, XEROTIER, KEYLESS, False, (FROM_A[0], None, None, False), [NOT_SENT]),
    "one of the same origin": (
        {"context": "a"}, {**ENV_KEY, "XEROTIER_BASE_URL": "https://a.example:443/b"}, KEYLESS, False,
        (FROM_A[0], "env-key", None, False), []),
    "a broken address owns its key too": (
        {"context": "a"}, {**ENV_KEY, "XEROTIER_BASE_URL": "nonsense"}, KEYLESS, False,
        (FROM_A[0], None, None, False), [NOT_SENT]),
    "a deployment without an address": (
        {}, XEROTIER, {"api_key": "a-key", "endpoint": "ea", "stream": True}, True, FROM_ENV, []),
    "given, it has an address in a variable": (
        {"context": "a"}, {"XEROTIER_BASE_URL": "https://env.example/v1"}, {"api_key": "a-key"}, True,
        (FROM_ENV[0], None, None, False), [A_NOT_SENT]),
    "the variable's endpoint": ({}, {"XEROTIER_ENDPOINT": "ev"}, A, True, (*FROM_A[:2], "ev", True), []),
    "the option's endpoint": ({"endpoint": "eo"}, {"XEROTIER_ENDPOINT": "ev"}, A, True, (*FROM_A[:2], "eo", True), []),
    "no stream all the same": ({"stream": False}, {}, A, True, (*FROM_A[:3], False), []),
    "a stream": ({"stream": True}, {}, KEYLESS, True, (FROM_A[0], None, None, True), []),
    "endpoint and stream of another address": (
        {"base_url": "https://a.example/v2"}, {}, {**A, "api_key": ""}, True, ("https://a.example/v2", None, None, False), []),
    "the same address with a slash": ({"base_url": "https://a.example/v1/"}, {}, A, True, FROM_A, []),
    "OpenAI's variables": ({}, OPENAI, {}, False, FROM_OPENAI, []),
    "OpenAI's variables are the last": ({}, {**OPENAI, **XEROTIER}, {}, False, FROM_ENV, []),
    "after the current one too": ({}, OPENAI, A, True, FROM_A, []),
    "OpenAI's whole address": (
        {}, {"OPENAI_BASE_URL": "http://localhost:1/v1/chat/completions/"}, {}, False,
        ("http://localhost:1/v1/chat/completions", None, None, False), []),
    "OpenAI's address alone": (
        {}, {"OPENAI_BASE_URL": "https://openai.example"}, {}, False,
        ("https://openai.example/chat/completions", None, None, False), []),
    "OpenAI's key alone is none": (
        {"base_url": "https://o.example"}, {"OPENAI_API_KEY": "openai-key"}, {}, False, ("https://o.example", None, None, False), []),
    "OpenAI's key goes to no other": (
        {"base_url": "https://o.example"}, OPENAI, {}, False, ("https://o.example", None, None, False), []),
    "Xerotier's key does not go to OpenAI": (
        {}, {**ENV_KEY, "OPENAI_BASE_URL": "https://openai.example/v1"}, {}, False,
        (*FROM_OPENAI[:1], None, None, False), [NOT_SENT]),
    "a name that is no slug at a whole address": (
        {"endpoint": "meta-llama/Llama-3"}, OPENAI, {}, False, (*FROM_OPENAI[:2], "meta-llama/Llama-3", False), []),
}


@pytest.fixture
def settings(xeroctl):
    """Return the Settings for these options, variables and a deployment a, and the deployments whose key was fetched."""
    def settings(options, environ, deployment, is_current=True):
        names = "base_url api_key context output cacert connect_timeout timeout retries endpoint stream model".split()
        namespace = argparse.Namespace(**dict(dict.fromkeys(names), dry_run=False, header=[], **options))
        fetched = []
        config = xeroctl.Config("f", "a" if is_current else None, {"a": deployment}, [])
        return xeroctl.resolve_settings(namespace, environ, config, lambda one: fetched.append(one) or "fetched"), fetched
    return settings


@pytest.mark.smoke
@pytest.mark.parametrize("options, environ, deployment, is_current, wanted, notes", SOURCES.values(), ids=SOURCES)
def test_where_settings_come_from(settings, options, environ, deployment, is_current, wanted, notes):
    found, fetched = settings(options, environ, deployment, is_current)
    assert (found.base_url, found.api_key, found.endpoint, found.stream) == wanted
    assert (found.notes, fetched) == (notes, [])


def test_settings_say_where_they_come_from(settings):
    found, _ = settings({"endpoint": "eo"}, ENV_KEY, A)
    assert found.sources == {"base_url": "deployment a in f", "api_key": "XEROTIER_API_KEY", "endpoint": "--endpoint"}
    found, _ = settings({}, {**OPENAI, "XEROTIER_ENDPOINT": "ev"}, {}, False)
    assert found.sources == {"base_url": "OPENAI_BASE_URL", "api_key": "OPENAI_API_KEY", "endpoint": "XEROTIER_ENDPOINT"}
    assert settings({}, {}, A)[0].retries == 2


@pytest.mark.parametrize("options, environ, is_fetched", [
    ({}, {}, True), ({"context": "a"}, XEROTIER, True), ({}, ENV_KEY, False), ({"api_key": "k"}, {}, False),
    ({"base_url": "https://o.example"}, {}, False), ({"context": "a", "base_url": "https://o.example"}, ENV_KEY, False),
])
def test_a_key_that_is_kept_elsewhere_is_fetched_only_for_its_own_server(settings, options, environ, is_fetched):
    deployment = {"base_url": "https://a.example/v1", "api_key_command": "pass"}
    found, fetched = settings(options, environ, deployment)
    assert (found.api_key == "fetched", fetched) == (is_fetched, [deployment] if is_fetched else [])


@pytest.mark.parametrize("endpoint, base_url, is_taken", [
    ("e", "https://h/v1", True), ("a/b", "https://h/v1", False), ("llama3.2:1b", "https://h/v1", False),
    ("llama3.2:1b", "https://h/v1/chat/completions", True), ("a/b", "https://h/v1/chat/completions?v=1", True),
    ("a b", "https://h/v1/chat/completions", True), ("a\nb", "https://h/v1/chat/completions", False),
    ("a/b", "https://h/{endpoint}/chat/completions", False), ("..", "https://h/v1", False), ("...a", "https://h/v1", True),
])
def test_an_endpoint_is_a_slug_unless_no_path_is_built_from_it(xeroctl, endpoint, base_url, is_taken):
    with contextlib.ExitStack() as stack:
        if not is_taken:
            stack.enter_context(pytest.raises(xeroctl.UsageError, match="^SOURCE must be letters"))
        assert xeroctl.check_endpoint(endpoint, base_url, "SOURCE") == endpoint


@pytest.mark.parametrize("base_url, plain", [
    ("https://h/acme/v1", "https://h/acme/v1/chat/completions"), ("https://h", "https://h/v1/chat/completions"),
    ("https://h/v10", "https://h/v10/v1/chat/completions"), ("https://h/v1/chat/completions", None),
    ("https://h/v1/chat/completions?v=1", None), ("https://{endpoint}.h/v1", None),
])
def test_the_address_that_a_server_without_slugs_would_have(xeroctl, base_url, plain):
    assert xeroctl.plain_address(base_url) == plain


@pytest.mark.parametrize("host, stays", [
    ("localhost", True), ("a.localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", True),
    ("localhost.evil.test", False), ("notlocalhost", False), ("127.0.0.1.evil.test", False), ("128.0.0.1", False),
    ("10.0.0.0", False), (".localhost", False), ("::", False),
])
def test_which_hosts_are_this_machine(xeroctl, host, stays):
    assert xeroctl.is_loopback(host) is stays


def test_what_is_shown_of_keys_and_of_values_that_may_be_one(xeroctl):
    shown = {None: "", "": "", "short": "****", "123456789012345": "****", "1234567890123456": "****3456"}
    assert {key: xeroctl.mask_key(key) for key in shown} == shown
    values = {"c/v1": "'c/v1'", "prod": "'prod'", "a-name-of-letters-alone": "'a-name-of-letters-alone'",
              KEY: "'****6789'", "https://a.example/0123456789": "'https://a.example/0123456789'"}
    assert {value: xeroctl.quote_value(value) for value in values} == values
    assert xeroctl.redact("abcdefgh-abcdefghij-short", ["abcdefgh", "abcdefghij", "short", ""]) == "***-***-short"
    names = {"Authorization": True, "api-key": True, "X-Auth": True, "Cookie": True, "access_token": True, "PASSWORD": True,
             "base_url": False, "X-SLO-TTFT-Ms": False, "model": False}
    assert {name: xeroctl.is_secret_name(name) for name in names} == names


@pytest.mark.smoke
def test_the_environment_names_an_endpoint_and_a_plain_server(run, config):
    hello = ["chat", "--dry-run", "-m", "hi"]
    config(deployments(None, prod={"base_url": "https://api.example/v1", "endpoint": "stored"}))
    for options, variables, url in (
            (["--context", "prod"], {}, "https://api.example/stored/v1/chat/completions"),
            (["--context", "prod"], {"XEROTIER_ENDPOINT": "env"}, "https://api.example/env/v1/chat/completions"),
            (["--context", "prod", "-e", "given"], {"XEROTIER_ENDPOINT": "env"}, "https://api.example/given/v1/chat/completions"),
            (["--context", "prod"], XEROTIER, "https://api.example/stored/v1/chat/completions"),
            (["--model", "a/b:c"], OPENAI, "https://openai.example/v1/chat/completions")):
        result = run(*hello, *options, env=variables)
        assert sent(result)[0] == url, (options, result)
    assert b'"model": "a/b:c"' in result.stdout


def test_a_deployment_may_stream_by_default(run, server, config):
    config('current = "prod"\n[deployment.prod]\nbase_url = "%s/v1"\nendpoint = "e"\nstream = true\n' % server.url)
    server.always(HELLO)
    for options, streams in (([], True), (["--no-stream"], False), (["--stream"], True),
                             (["--base-url", server.url, "-e", "e"], False)):
        assert run("chat", "-m", "hi", "-q", *options).stdout == b"Hello!\n"
        assert server.requests[-1].json["stream"] is streams, options


# -- Addresses -------------------------------------------------------


ADDRESSES = {
    ("/acme/v1", "/acme/my-endpoint/v1/chat/completions"),
    ("/acme/v1//", "/acme/my-endpoint/v1/chat/completions"),
    ("/v1", "/my-endpoint/v1/chat/completions"),
    ("", "/my-endpoint/v1/chat/completions"),
    ("/", "/my-endpoint/v1/chat/completions"),
    ("/acme", "/acme/my-endpoint/v1/chat/completions"),
    ("/acme/v10", "/acme/v10/my-endpoint/v1/chat/completions"),
    ("/acme-v1", "/acme-v1/my-endpoint/v1/chat/completions"),
    ("/v1/acme", "/v1/acme/my-endpoint/v1/chat/completions"),
    ("/{endpoint}/v1", "/my-endpoint/v1/chat/completions"),
    ("/{endpoint}/api/", "/my-endpoint/api/chat/completions"),
    ("/v1/chat/completions", "/v1/chat/completions"),
    ("/v1/chat/completions/", "/v1/chat/completions"),
    ("/v1/chat/completions?api-version=1%20&a=/", "/v1/chat/completions?api-version=1%20&a=/"),
    ("/openai/{endpoint}/chat/completions?v=1", "/openai/my-endpoint/chat/completions?v=1"),
}


def test_a_base_url_becomes_this_request_target(start, server):
    server.always(HELLO)
    command = ["chat", "--endpoint", "my-endpoint", "-m", "hi"]
    children = [start(*command, "--model", base + "!", env={"XEROTIER_BASE_URL": server.url + base}) for base, _ in ADDRESSES]
    assert {child.finish() for child in children} == {(0, b"Hello!\n", b"")}
    assert {(request.json["model"][:-1], request.target) for request in server.requests} == ADDRESSES


def test_the_slug_may_be_in_the_host(run):
    result = run(*DRY, "--base-url", "https://{endpoint}.proj_ABC123.api.xerotier.ai/v1")
    assert sent(result) == ("https://my-endpoint.proj_ABC123.api.xerotier.ai/v1/chat/completions", False)


NO_BASE_URLS = [
    "api.example/v1", "ftp://api.example/v1", "file:///etc/passwd", "http://", "http:///v1", "https://api.example:99999/v1",
    "https://api.example:0/v1", "https://api.example:x/v1", "https://api.example:/v1", "https://api.example/v1#x", "https://api.example/v 1",
    "https://api.example/v1?x=1", "https://héllo.example/v1", "https://api.example/v1\n", "http://[::1/v1", " ",
]


def test_what_is_no_base_url_is_refused(start):
    children = [start(*DRY, env={"XEROTIER_BASE_URL": url}) for url in NO_BASE_URLS]
    for url, child in zip(NO_BASE_URLS, children):
        result = child.finish()
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1), url
        assert result.stderr.startswith(b"xeroctl: error: not a base URL: ")


def test_a_base_url_with_a_password_is_refused_without_showing_it(run):
    line = b"xeroctl: error: a base URL holds no user or password: use --api-key\n"
    assert run(*DRY, "--base-url", "https://me:secret@api.example/v1") == (2, b"", line)


@pytest.mark.parametrize("slug", ["e", "A.b_c-9", ".a", "0", "-"])
def test_a_slug_is_letters_digits_dots_underscores_and_dashes(run, slug):
    result = run("chat", "--dry-run", "-m", "hi", "--base-url", "https://api.example/v1", "--endpoint=" + slug)
    assert sent(result) == (f"https://api.example/{slug}/v1/chat/completions", False)


def test_anything_else_is_no_slug(start):
    slugs = ["", ".", "..", "a/b", "../a", "a b", "é", "a\n", "a%2fb", "a?b", "a#b", "{a}", b"a\xff"]
    arguments = ["chat", "--dry-run", "-m", "hi", "--base-url", "https://api.example/v1", "--endpoint"]
    children = [start(*arguments, slug) for slug in slugs]
    for slug, child in zip(slugs, children):
        result = child.finish()
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1), slug
        assert result.stderr.startswith(b"xeroctl: error: --endpoint must "), slug
        assert re.search(b"must (not be empty|not hold control characters|be letters, digits, '.', '_' and '-', not)",
                         result.stderr), slug


# -- Keys ------------------------------------------------------------


@pytest.mark.parametrize("stored, used, goes", [
    ("https://api.example/acme/v1", None, True),
    ("https://api.example/acme/v1", "https://api.example/other", True),
    ("https://api.example/acme/v1", "https://API.Example:443/v1", True),
    ("https://api.example:443/v1", "https://api.example/v1/chat/completions?a=b", True),
    ("http://127.0.0.1/v1", "http://127.0.0.1:80/v1", True),
    ("https://api.example/v1", "http://api.example/v1", False),
    ("https://api.example/v1", "http://api.example:443/v1", False),
    ("https://api.example/v1", "https://api.example:8443/v1", False),
    ("https://api.example/v1", "https://api.example.evil.test/v1", False),
    ("https://api.example/v1", "https://evil.test/api.example/v1", False),
    ("https://api.example/v1", "https://example/v1", False),
    (None, "https://api.example/v1", False),
])
def test_a_stored_key_goes_only_to_its_origin(run, config, stored, used, goes):
    config(deployments(prod={**({"base_url": stored} if stored else {}), "api_key": KEY}))
    result = run(*DRY, *(["--base-url", used] if used else []))
    assert sent(result)[1] is goes
    assert KEY.encode() not in result.stdout
    note = b"" if goes else b"xeroctl: note: the key of context prod is for another server and is not sent\n"
    assert result.stderr == note


@pytest.mark.smoke
def test_a_stored_key_does_not_reach_another_server(run, server, config):
    with loopback.Server() as other:
        config(deployments(prod={"base_url": other.url + "/v1", "api_key": KEY}))
        server.always(HELLO)
        other.always(HELLO)
        for options in (["--base-url", server.url + "/v1"], []):
            assert run("chat", "--endpoint", "e", "-m", "hi", *options).stdout == b"Hello!\n"
        assert "authorization" not in server.requests[0].headers
        assert other.requests[0].headers["authorization"] == "Bearer " + KEY


def test_a_given_key_goes_wherever_the_user_says(run, config):
    config(deployments(prod={"base_url": "https://api.example/v1", "api_key": KEY}))
    result = run(*DRY, "--base-url", "https://other.example/v1", env={"XEROTIER_API_KEY": KEY})
    assert sent(result) == ("https://other.example/my-endpoint/v1/chat/completions", True)
    assert result.stderr == b""


@pytest.mark.parametrize("source", ["option", "environment", "file"])
def test_what_is_no_key_is_refused_without_showing_it(start, config, source):
    keys = {"s3cret\\r": "s3cret\r", "s3cret\\n": "s3cret\n", "s3 cret": "s3 cret", "s3crét": "s3crét", "s3cret\\t": "s3cret\t"}
    arguments = [*DRY, "--base-url", "https://api.example/v1"]
    for escaped, key in keys.items():
        if source == "file":
            config(deployments(prod={"base_url": "https://api.example/v1", "api_key": escaped}))
        result = start(*arguments, *(["--api-key", key] if source == "option" else []),
                       env={"XEROTIER_API_KEY": key if source == "environment" else None}).finish()
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
        assert b"s3" not in result.stderr, key


PLAIN_HTTP = [
    ("http://api.example/v1", KEY, True), ("http://api.example/v1", None, False), ("https://api.example/v1", KEY, False),
    ("http://127.0.0.1:8080/v1", KEY, False), ("http://127.1.2.3/v1", KEY, False), ("http://localhost/v1", KEY, False),
    ("http://[::1]:80/v1", KEY, False), ("http://127.0.0.1.evil.test/v1", KEY, True), ("http://localhost.evil.test/v1", KEY, True),
    ("http://192.168.1.2/v1", KEY, True),
]


def test_a_key_over_plain_http_draws_a_note_unless_it_stays_here(start):
    children = [start(*DRY, "--base-url", url, env={"XEROTIER_API_KEY": key}) for url, key, _ in PLAIN_HTTP]
    for (url, key, warned), child in zip(PLAIN_HTTP, children):
        host, result = url.split("/")[2], child.finish()
        note = f"xeroctl: note: the API key goes to {host} unencrypted, over plain http\n"
        assert sent(result)[1] is bool(key), url
        assert result.stderr.decode() == (note if warned else ""), url


# -- The file itself -------------------------------------------------


@pytest.mark.parametrize("mode, noted", [(0o600, False), (0o400, False), (0o640, True), (0o604, True), (0o666, True)], ids=oct)
def test_a_file_that_others_can_read_draws_one_note(run, config, mode, noted):
    path = config(deployments(prod={"base_url": "https://api.example/v1"}), mode)
    note = f"others can read {path}: chmod 600 it"
    result = run(*DRY)
    assert sent(result)[0] and result.stderr.decode() == (f"xeroctl: note: {note}\n" if noted else "")
    assert run(*DRY, "--quiet").stderr == b""


@pytest.mark.parametrize("options, output", [(["-o", "json"], "text"), ([], "json")], ids=["option", "file"])
def test_notes_are_objects_when_errors_are(run, config, options, output):
    path = config(deployments(prod={"base_url": "https://api.example/v1", "output": output}), 0o644)
    said = json.loads(run(*DRY, *options).stderr.decode())
    assert said == {"kind": "note", "message": f"others can read {path}: chmod 600 it"}


def test_a_file_that_cannot_be_read_is_named(run, path):
    os.mkdir(path)
    assert run(*DRY) == (2, b"", f"xeroctl: error: cannot read {path}: Is a directory\n".encode())
    os.rmdir(path)
    os.symlink("gone", path)
    assert run(*DRY) == (2, b"", f"xeroctl: error: cannot read {path}: No such file or directory\n".encode())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(run, config):
    path = config("", 0)
    assert run(*DRY) == (2, b"", f"xeroctl: error: cannot read {path}: Permission denied\n".encode())


@pytest.mark.smoke
def test_a_file_that_is_not_utf8_names_its_line(run, config):
    path = config(b'current = "a"\n# caf\xe9\n')
    assert run(*DRY) == (2, b"", f"xeroctl: error: {path}: not UTF-8 (at line 2)\n".encode())


def test_a_byte_order_mark_and_crlf_are_accepted(run, config):
    config(b"\xef\xbb\xbf" + deployments(prod={"base_url": "https://api.example/v1"}).replace("\n", "\r\n").encode())
    assert sent(run(*DRY))[0] == "https://api.example/my-endpoint/v1/chat/completions"


def test_xdg_config_home_comes_first_unless_it_is_relative(run, config, tmp_path):
    config(deployments(prod={"base_url": "https://home.example"}))
    (tmp_path / "xdg" / "xeroctl").mkdir(parents=True)
    (tmp_path / "xdg" / "xeroctl" / "config.toml").write_text(deployments(prod={"base_url": "https://xdg.example"}))
    (tmp_path / "xdg" / "xeroctl" / "config.toml").chmod(0o600)
    for folder, home, host in ((str(tmp_path / "xdg"), None, "xdg"), ("xdg", ..., "home"), ("", ..., "home")):
        env = {"XDG_CONFIG_HOME": folder, **({} if home is ... else {"HOME": home})}
        result = run(*DRY, env=env, cwd=str(tmp_path))
        assert (sent(result)[0], result.stderr) == (f"https://{host}.example/my-endpoint/v1/chat/completions", b"")


def test_without_a_home_options_are_enough(run, tmp_path):
    env = {"HOME": "", "XDG_CONFIG_HOME": str(tmp_path / "missing")}
    result = run(*DRY, "--base-url", "https://api.example/v1", env=env)
    assert (sent(result)[0], result.stderr) == ("https://api.example/my-endpoint/v1/chat/completions", b"")


@pytest.mark.parametrize("text, line", [
    ("current = \n", 1), ("current =", 1), ('current = "prod', 1), ("[deployment.prod]\nbase_url https\n", 2),
    ("[deployment.prod\n", 1), ("[deployment.prod", 1), ('a = "x"\n\na = "y"\n', 3), ('a = "x"\n[a]\n', 2),
    ('a = "\\q"\n', 1), ("a = 1 2\n", 1), ("=\n", 1), ("# fine\n\n}\n", 3),
    ("[a]\nx = 1\n[a]\ny = 2\n", 3),
], ids=ascii)
def test_broken_toml_names_the_file_and_the_line(run, config, text, line):
    path = config(text)
    result = run(*DRY, "--base-url", "https://api.example/v1")
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
    assert result.stderr.decode().startswith(f"xeroctl: error: {path}: broken TOML: ")
    assert f"at line {line}" in result.stderr.decode()


@pytest.mark.parametrize("text, message", [
    ("current = 1", "current is not text"),
    ("deployment = 1", "deployment is not a table"),
    ('deployment.prod = "x"', "deployment.prod is not a table"),
    ("deployment.prod.base_url = 1", "deployment.prod.base_url is not text"),
    ("[deployment.prod]\napi_key = true", "deployment.prod.api_key is not text"),
    ("[deployment.prod]\nstream = 1", "deployment.prod.stream is not true or false"),
    ('[deployment.prod]\nstream = "yes"', "deployment.prod.stream is not true or false"),
    ("[deployment.prod]\nendpoint = false", "deployment.prod.endpoint is not text"),
    ('[deployment.prod]\nendpoint = "a/b"',
     "deployment.prod.endpoint must be letters, digits, '.', '_' and '-', not 'a/b'"),
    ('current = "prod"\n[deployment.prod]\noutput = "xml"', "deployment.prod.output is not table or json"),
])
def test_a_value_of_the_wrong_shape_is_named(run, config, text, message):
    path = config(text)
    result = run(*DRY, "--base-url", "https://api.example/v1")
    assert result == (2, b"", f"xeroctl: error: {path}: {message}\n".encode())


# -- The small TOML reader -------------------------------------------

ACCEPTED = [
    "",
    "\n# a comment é\n\n",
    'current = "prod"\n[deployment.prod]\nbase_url = "https://x/v1"  # why\napi_key = "a#b"\n',
    "a = 'C:\\new # not \"one\"'\n",
    'a = "tab\\t nl\\n quote\\" back\\\\ e\\u00e9 \\b\\f\\r"\n',
    'a = ""\nb = \'\'\n',
    "a = 1\nb = -2\nc = +3\nd = 0\ne = 1.5\nf = -0.25\ng = +1.0\nh = -0\n",
    "a = true\nb = false\n",
    "  a  =  1  \n\t[ b ]\t\n\tc\t=\t2\n",
    "a.b.c = 1\na . d = 2\n\"a\".'e f' = 3\n",
    "[a.b]\nc = 1\n[a]\nd = 2\n[\"x.y\".'z']\nw = 1\n",
    "1 = 1\n2.3 = 4\na-b_c = 5\n\"\" = 6\n",
    'a = "\u2028 é 😀"\nb = 1',
    "[empty]\n[other]\n",
    "[deployment.prod]\n[deployment.staging]\n[deployment.prod.more]\nx = 1\n",
    'a = "[x]"\nb = "= 1"\n',
]
REFUSED = [
    "a", "a =", "= 1", "a = b", "a = 'x", 'a = "x', 'a = "x" y', "a 1", "[a", "a]", "[]", "[a.]", "[.a]", "a. = 1", "a..b = 1",
    "a = 1\na = 2", "a = 1\n[a]", "[a]\nb = 1\n[a.b]", "a.b = 1\na.b.c = 2", 'a = "x"\na.b = 1', "é = 1", "a b = 1", "a = tru",
    'a = "\\x41"', 'a = "\\u12"', "a = 1.", "a = .5", "a = --1", 'a = "a\nb"', "a = 1 [b]", "[a] b = 1", "a = 0x", "a = 1__0",
    "[a]\n[a]", "[a]\nx = 1\n[a]\ny = 2", "a = 01", "a = -01.5", "a = \u0663", "a = 1\rb = 2",
]
LOUD = ["a = [1]", "a = {b = 1}", 'a = """x"""', "a = '''x'''", "a = 2026-01-01", "a = 0x1f", "a = 1e5", "a = inf", "[[a]]"]


@pytest.mark.parametrize("text", ACCEPTED, ids=ascii)
def test_the_small_reader_reads_what_tomllib_reads(xeroctl, text):
    tomllib = pytest.importorskip("tomllib")
    assert repr(xeroctl.parse_toml_subset(text)) == repr(tomllib.loads(text))


@pytest.mark.parametrize("text", REFUSED, ids=ascii)
def test_the_small_reader_refuses_what_tomllib_refuses(xeroctl, text):
    tomllib = pytest.importorskip("tomllib")
    for loads in (tomllib.loads, xeroctl.parse_toml_subset):
        with pytest.raises(ValueError):
            loads(text)


@pytest.mark.parametrize("text", LOUD, ids=ascii)
def test_the_small_reader_refuses_loudly_what_it_cannot_read(xeroctl, text):
    with pytest.raises(ValueError, match="line 2"):
        xeroctl.parse_toml_subset("# one\n" + text)


@pytest.mark.parametrize("url", ["ftp://user:hunter22@host/v1", "https://user:hunter22@host:99999/v1"])
def test_a_password_in_a_refused_url_is_not_repeated(run, url):
    result = run("chat", "--endpoint", "e", "-m", "hi", "--base-url", url)
    assert (result.status, result.stderr) == (
        2, b"xeroctl: error: a base URL holds no user or password: use --api-key\n")


def test_an_empty_query_is_refused(run):
    assert run(*DRY, "--base-url", "https://h/v1/?").status == 2


KEYED_URL = "http://127.0.0.1:1/v1/chat/completions?version=2&api_key=SECRET-IN-QUERY"


@pytest.mark.parametrize("args", [
    ["status", "--retries", "0"], ["status", "-o", "json"], ["chat", "-m", "hi", "--retries", "0"], ["chat", "-m", "hi", "-v", "--retries", "0"], ["chat", "-m", "hi", "--dry-run"],
    ["models", "-v"], ["bench", "--dry-run"],
], ids=" ".join)
def test_a_key_in_the_query_of_a_base_url_is_not_shown(run, args):
    result = run(*args, "--base-url", KEYED_URL, "--endpoint", "x")
    assert b"SECRET-IN-QUERY" not in result.stdout + result.stderr
    assert result.status in (0, 6)


def test_a_key_in_the_query_is_not_shown_where_the_url_is_wrong(run):
    result = run("chat", "-m", "hi", "--endpoint", "x", "--base-url", KEYED_URL.replace("/chat/completions", ""))
    assert (result.status, b"SECRET-IN-QUERY" in result.stderr, b"api_key=***" in result.stderr) == (2, False, True)


@pytest.mark.parametrize("args", [["list"], ["show"], ["list", "-o", "json"], ["show", "-o", "json"]], ids=" ".join)
def test_a_key_in_the_query_of_a_stored_url_is_not_shown(run, config, args):
    config(deployments(prod={"base_url": KEYED_URL}))
    result = run("config", *args)
    assert (result.status, b"SECRET-IN-QUERY" in result.stdout, b"api_key=***" in result.stdout) == (0, False, True)
