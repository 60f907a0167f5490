"""The command line: help pages, wrong options and commands, and the options that every command takes."""

import json
import shlex

import pytest

from loopback import completion, json_response

HELLO = json_response(completion())
KEY = "sk-0123456789abcdef"
CHAT = ["chat", "--endpoint", "e", "-m", "hi"]


def error_line(result):
    """Return what a usage error says after `xeroctl: error: `."""
    lines = result.stderr.decode().split("\n")
    assert (result.status, result.stdout, len(lines)) == (2, b"", 2)
    assert lines[0].startswith("xeroctl: error: ")
    return lines[0][len("xeroctl: error: "):]


# -- Help ------------------------------------------------------------


@pytest.mark.smoke
def test_the_help_of_chat_is_one_screen_in_groups_with_three_examples(run):
    lines = run("chat", "--help").stdout.decode().split("\n")[:-1]
    assert len(lines) <= 60 and max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("usage:")] == lines[:1]
    titles = [line for line in lines[3:-1] if line and not line.startswith(" ")]
    assert titles == ["Message", "Sampling", "Output", "Endpoint", "Connection", "Examples"]
    assert sum("xeroctl chat" in line for line in lines[1:]) == 3
    assert lines[-1] == "Exit statuses, files and all else: man xeroctl"


@pytest.mark.parametrize("name", ["chat", "batch", "bench"])
def test_the_examples_of_a_help_page_parse(run, xeroctl, name):
    page = run(name, "--help").stdout.decode()
    examples = page.partition("\nExamples\n")[2].split("\n\n")[0].split("\n")
    for example in examples:
        words = shlex.split(example.partition("xeroctl ")[2].partition(">")[0].partition("<")[0])
        assert xeroctl.parse_arguments(words).command == name
    assert len(examples) == 3


# -- Wrong command lines ---------------------------------------------

WRONG = [
    (["caht"], "xeroctl has no command caht: did you mean chat?"),
    (["completion", "fsh"], "SHELL must be bash, zsh or fish, not 'fsh'"),
    (["completions", "updat", "x"], "xeroctl completions has no command updat: did you mean update?"),
    (["config", "xyz"], "xeroctl config has no such command: 'xyz': see xeroctl config --help"),
    (["chat", "--strem"], "xeroctl chat has no option --strem: did you mean --stream?"),
    (["chat", "-stream"], "xeroctl chat has no option -stream: did you mean --stream?"),
    (["chat", "--temp", "1"], "xeroctl chat has no option --temp: did you mean --temperature?"),
    (["chat", "--nonsense"], "xeroctl chat has no option --nonsense: see xeroctl chat --help"),
    (["--nonsense", "chat"], "xeroctl chat has no option --nonsense: see xeroctl chat --help"),
    (["chat", "-K1"], "xeroctl chat has no option -K: see xeroctl chat --help"),
    (["--stream", "chat"], "--stream goes behind the command: xeroctl chat --stream"),
    (["--endpoint", "e", "chat"], "--endpoint goes behind the command: xeroctl chat --endpoint"),
    (["chat", "hello"], "unexpected argument 'hello': a message goes behind -m, in quotes"),
    (["models", "more"], "unexpected argument 'more': see xeroctl models --help"),
    (["chat", "--endpoint"], "--endpoint needs a value"),
    (["chat", "-m"], "--message needs a value"),
    (["chat", "-qm"], "--message needs a value"),
    (["chat", "-m", "-x"], "--message needs a value: one that begins with - is given as --message=-x"),
    (["chat", "--stream=yes"], "--stream takes no value"),
    (["config", "add"], "NAME is missing"),
    (["-q"], "no command: see xeroctl --help"),
    (CHAT + ["--temperature", "3"], "--temperature must be a number from 0 to 2, not '3'"),
    (CHAT + ["--top-p", "x"], "--top-p must be a number from 0 to 1, not 'x'"),
    (CHAT + ["--max-tokens", "0"], "--max-tokens must be a whole number of at least 1, not '0'"),
    (CHAT + ["--seed", "1.5"], "--seed must be a whole number, not '1.5'"),
    (CHAT + ["-o", "yaml"], "--output must be text, json or table, not 'yaml'"),
    (CHAT + ["--param", "x"], "--param must be NAME=VALUE"),
    (CHAT + ["--param", "stream=true"], "--param cannot set stream"),
    (CHAT + ["--base-url", ""], "--base-url must not be empty"),
    (CHAT + ["--endpoint", ""], "--endpoint must not be empty"),
    (["completions", "get", "a/b"], "ID must be letters, digits, '.', '_' and '-', not 'a/b'"),
    (["bench", "--retries", "3"], "xeroctl bench has no option --retries: see xeroctl bench --help"),
    (["--retries=3", "bench"], "xeroctl bench has no option --retries: see xeroctl bench --help"),
    (["bench", "--fail-if", "ttft>1"], None),
    (["bench", "--concurrency", "1,x"], None),
]


@pytest.mark.smoke
@pytest.mark.parametrize("args, line", WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_a_wrong_command_line_is_one_line_that_helps(run, args, line):
    said = error_line(run(*args))
    assert line is None or said == line
    for word in ("argument ", "arguments", "choose from"):  # argparse's
        assert word not in said.replace("unexpected argument ", "")


@pytest.mark.parametrize("args", [
    ["--apikey", KEY, "models"], ["models", "--apikey", KEY], ["models", f"--apikey={KEY}"], ["--apikey", KEY],
    ["models", "--retries", KEY], ["models", KEY], [KEY], ["models", "-o", KEY], ["completions", "get", KEY + "/"],
    ["config", KEY], ["models", "--header", KEY], ["models", "--timeout", KEY], ["chat", "--param", KEY],
    ["completion", KEY], ["models", "--api-key", KEY + " "], ["chat", "-K" + KEY],
], ids=" ".join)
def test_an_error_about_an_option_repeats_no_value_that_may_be_a_key(run, args):
    assert KEY not in error_line(run(*args))


def test_a_wrong_option_is_an_object_where_json_is_asked_for(run):
    result = run("chat", "-o", "json", "--temperature", "3")
    document = json.loads(result.stderr.decode())
    assert (result.status, document["kind"]) == (2, "usage")
    assert document["message"] == "--temperature must be a number from 0 to 2, not '3'"


# -- Headers ---------------------------------------------------------


@pytest.mark.parametrize("before, after", [([], ["-H", "X-One: 1", "--header=x-two:2"]), (["-H", "X-One: 1"], ["-H", "x-two: 2"])])
def test_a_header_is_added_before_and_after_the_command(run, server, before, after):
    server.script(HELLO)
    result = run(*before, *CHAT, "--base-url", server.url + "/v1", *after)
    assert (result.status, result.stderr) == (0, b"")
    headers = server.requests[0].headers
    assert (headers["x-one"], headers["x-two"]) == ("1", "2")


def test_a_header_replaces_one_of_ours(run, server):
    server.script(HELLO)
    run(*CHAT, "--base-url", server.url + "/v1", "--api-key", KEY, "-H", "Authorization: Basic YTpi")
    assert server.requests[0].headers["authorization"] == "Basic YTpi"


@pytest.mark.parametrize("header", [
    "no colon", ": value", "a b: c", "A: b\r\nC: d", "A: b\n", "A: b\rc", "A: \0", "A: \x85", "A: 日本", "Content-Length: 3",
    "transfer-encoding: chunked",
], ids=repr)
def test_a_header_that_cannot_be_sent_is_a_usage_error(xeroctl, header):
    with pytest.raises(xeroctl.UsageError, match="^--header "):
        xeroctl.parse_arguments([*CHAT, "--header", header])


@pytest.mark.parametrize("name", ["chat", "batch", "bench", "models", "completions", "status", "config", "completion"])
def test_every_command_takes_a_header(xeroctl, name):
    words = [name] + ["bash"] * (name == "completion")
    assert xeroctl.parse_arguments([*words, "-H", "A: b"]).header == [("A", "b")]


# -- Values ----------------------------------------------------------


def test_a_parameter_is_json_or_text_or_a_file(xeroctl, tmp_path):
    (tmp_path / "tools.json").write_text('[{"type": "function"}]')
    values = ["a=1", "b=no json", "c=null", "d=1e999", "e=NaN", f"f=@{tmp_path}/tools.json", "g=@@home", "h=", "i==x"]
    options = xeroctl.parse_arguments(CHAT + [word for value in values for word in ("--param", value)])
    assert options.param == [
        ("a", 1), ("b", "no json"), ("c", None), ("d", "1e999"), ("e", "NaN"), ("f", [{"type": "function"}]),
        ("g", "@home"), ("h", ""), ("i", "=x"),
    ]


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b""], ids=repr)
def test_a_parameter_from_a_file_that_is_missing_or_broken_is_a_usage_error(run, tmp_path, content):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    assert "file" in error_line(run(*CHAT, "--param", f"x=@{tmp_path}/file"))


@pytest.mark.parametrize("name", ["llama3.2:1b", "meta-llama/Llama-3", "über model"])
def test_an_endpoint_can_have_the_name_of_any_model(run, server, name):
    server.script(HELLO)
    result = run("chat", "-e", name, "--base-url", server.url + "/v1/chat/completions", "-m", "hi")
    assert result == (0, b"Hello!\n", b"")
    assert server.requests[0].json["model"] == name


def test_an_endpoint_that_becomes_a_part_of_the_address_is_a_slug(run):
    assert "--endpoint" in error_line(run("chat", "-e", "a/../b", "--base-url", "http://127.0.0.1:1/v1", "-m", "hi"))


@pytest.mark.smoke
def test_chat_send_is_chat(run, server):
    server.script(HELLO)
    assert run("chat", "send", "-e", "e", "--base-url", server.url + "/v1", "-m", "send") == (0, b"Hello!\n", b"")
    assert server.requests[0].json["messages"] == [{"role": "user", "content": "send"}]
    assert run("help", "chat", "send") == run("chat", "--help")


def test_each_command_finds_every_option_in_its_namespace(xeroctl):
    words = {"completion": ["bash"]}
    found = [set(vars(xeroctl.parse_arguments([name, *words.get(name, [])])))
             for name in xeroctl.build_parser().commands if name != "help"]
    of_chat = {action.dest for action in xeroctl.build_parser("chat").options.values()} - {"help", "version"}
    assert len(of_chat) >= 40 and set.intersection(*found) >= of_chat


# -- What a shell's completion asks ----------------------------------


@pytest.mark.parametrize("words, offered", [
    ([""], None), (["c"], ["chat", "completions", "config", "completion"]), (["chat", "--st"], ["--stream", "--store"]),
    (["chat", "send", "--st"], ["--stream", "--store"]), (["-qo"], []), (["-qo", ""], ["text", "json", "table"]),
    (["--output=j"], ["--output=json"]), (["completions", "--order", ""], ["asc", "desc"]), (["completion", "z"], ["zsh"]),
    (["config", "use", "p"], ["prod"]), (["--context", ""], ["prod", "test"]), (["chat", "--context=t"], ["--context=test"]),
    (["chat", "-m", "c"], []), (["chat", "--from-file", ""], []), (["batch", ""], []), (["bench", "--report", "a", ""], []),
    (["nonsense", "x"], []), ([], None),
], ids=repr)
def test_the_tool_prints_the_candidates_one_a_line(run, env, tmp_path, words, offered):
    folder = tmp_path / "home" / ".config" / "xeroctl"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        "[deployment.prod]\nbase_url = 'http://127.0.0.1:1/v1'\napi_key_command = 'touch ran'\n[deployment.test]\n")
    result = run("__complete", *words, cwd=str(tmp_path))
    assert (result.status, result.stderr) == (0, b"")
    lines = result.stdout.decode().split("\n")[:-1]
    if offered is None:
        offered = [line.split()[0] for line in run().stderr.decode().split("\n") if line.startswith("  ")]
    assert lines == offered
    assert not (tmp_path / "ran").exists()


# -- The practice endpoint -------------------------------------------


def test_the_practice_endpoint_keeps_one_sample(run):
    lines = run("completions", "--demo").stdout.decode().split("\n")
    assert len(lines) == 2 and lines[0].startswith("chatcmpl-practice-1\t")
    assert run("completions", "--demo", "--metadata", "sample=1", "--limit", "1").stdout.decode().split("\t")[0] == "chatcmpl-practice-1"
    assert run("completions", "--demo", "--metadata", "sample=2") == (0, b"", b"")
