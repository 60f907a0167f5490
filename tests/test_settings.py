"""Where the settings come from, which addresses they make, and whom the key is sent to."""

import json
import os

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
    assert (result.status, result.stdout) == (2, b"")
    assert json.loads(result.stderr.decode())["message"] == "the message is empty"


def test_no_base_url_says_the_three_ways_to_give_one(run):
    line = (b"xeroctl: no base URL: set it up with: xeroctl config init, or set XEROTIER_BASE_URL and XEROTIER_API_KEY, "
            b"or try without any: xeroctl chat --demo -m Hello\n")
    assert run(*DRY) == (2, b"", line)
    assert run(*DRY, env={"XEROTIER_BASE_URL": ""}) == (2, b"", line)


def test_a_file_that_chooses_no_context_says_which_there_are(run, config):
    path = config('[deployment.prod]\nbase_url = "https://api.example/v1"\n')
    line = (f"xeroctl: no context is chosen: {path} has: prod: give --context CONTEXT, "
            "or choose with: xeroctl config use CONTEXT\n")
    assert run(*DRY) == (2, b"", line.encode())
    assert run(*DRY, "--context", "prod").status == 0


def test_an_unknown_context_names_the_known_ones(run, config):
    path = config(deployments("gone", staging={}, prod={}))
    for name, options in (("gone", []), ("x y", ["--context", "x y"])):
        line = f"xeroctl: unknown context '{name}': {path} has: prod, staging\n"
        assert run(*DRY, "--base-url", "https://api.example/v1", *options) == (2, b"", line.encode())


def test_a_context_without_a_file_is_unknown(run):
    result = run(*DRY, "--base-url", "https://api.example/v1", "--context", "prod")
    assert (result.status, result.stdout) == (2, b"")
    assert result.stderr.startswith(b"xeroctl: unknown context 'prod': ") and result.stderr.endswith(b" has: none\n")


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
    "https://api.example:0/v1", "https://api.example:x/v1", "https://api.example/v1#x", "https://api.example/v 1",
    "https://api.example/v1?x=1", "https://héllo.example/v1", "https://api.example/v1\n", "http://[::1/v1", " ",
]


def test_what_is_no_base_url_is_refused(start):
    children = [start(*DRY, env={"XEROTIER_BASE_URL": url}) for url in NO_BASE_URLS]
    for url, child in zip(NO_BASE_URLS, children):
        result = child.finish()
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1), url
        assert result.stderr.startswith(b"xeroctl: not a base URL: ")


def test_a_base_url_with_a_password_is_refused_without_showing_it(run):
    line = b"xeroctl: a base URL holds no user or password: use --api-key\n"
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
        assert b"argument --endpoint: it consists of letters, digits, '.', '_' and '-', not " in result.stderr


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
        note = f"xeroctl: note: the API key goes to {host} over plain http, for all on the way to read\n"
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
    assert said == {"kind": "notice", "message": f"others can read {path}: chmod 600 it"}


def test_a_file_that_cannot_be_read_is_named(run, path):
    os.mkdir(path)
    assert run(*DRY) == (2, b"", f"xeroctl: cannot read {path}: Is a directory\n".encode())
    os.rmdir(path)
    os.symlink("gone", path)
    assert run(*DRY) == (2, b"", f"xeroctl: cannot read {path}: No such file or directory\n".encode())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(run, config):
    path = config("", 0)
    assert run(*DRY) == (2, b"", f"xeroctl: cannot read {path}: Permission denied\n".encode())


def test_a_file_that_is_not_utf8_names_its_line(run, config):
    path = config(b'current = "a"\n# caf\xe9\n')
    assert run(*DRY) == (2, b"", f"xeroctl: {path}: not UTF-8 (at line 2)\n".encode())


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
    assert result.stderr.decode().startswith(f"xeroctl: {path}: broken TOML: ")
    assert f"at line {line}" in result.stderr.decode()


@pytest.mark.parametrize("text, message", [
    ("current = 1", "current is not text"),
    ("deployment = 1", "deployment is not a table"),
    ('deployment.prod = "x"', "deployment.prod is not a table"),
    ("deployment.prod.base_url = 1", "deployment.prod.base_url is not text"),
    ("[deployment.prod]\napi_key = true", "deployment.prod.api_key is not text"),
    ('current = "prod"\n[deployment.prod]\noutput = "xml"', "deployment.prod.output is not table or json"),
])
def test_a_value_of_the_wrong_shape_is_named(run, config, text, message):
    path = config(text)
    result = run(*DRY, "--base-url", "https://api.example/v1")
    assert result == (2, b"", f"xeroctl: {path}: {message}\n".encode())


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
        2, b"xeroctl: a base URL holds no user or password: use --api-key\n")


def test_an_empty_query_is_refused(run):
    assert run(*DRY, "--base-url", "https://h/v1/?").status == 2
