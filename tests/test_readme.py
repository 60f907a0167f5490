"""Every command of the README runs as a new user pastes it, and its lists are those of the tool.

Commands that fetch something from a registry, and tests/run, are checked for their form. ssh, scp, kubectl, journalctl
and Spark have stand-ins that run what they are given on this machine. Addresses lead to a server on loopback, and
measurements are cut short: REPLACED has the changes.
"""

import collections
import json
import os
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest

import session_svg
from conftest import TOP, XEROCTL
from loopback import BEFORE_REQUEST, DONE, USAGE, Call, Server, chunk, completion, json_response, read_request, stream
from terminal import Terminal

README = TOP / "README.md"
GUIDE = README.read_text(encoding="utf-8")
MOST_LINES, MOST_COLUMNS, MOST_PICTURE_BYTES = 230, 120, 100000
ANSWER = "Paris.\n\n```sh\nseq 10\n```\n"
CITY = '{"city": "Paris"}'
FOREIGN_OPTIONS = {"--from-env-file", "--numeric-suffixes", "--parallel", "--pipe", "--quick", "--since", "--sshlogin", "--suffix-length"}
FETCHING = ["pipx install .", "uv tool install .", "python3 -m pip install ."]
REPLACED = [
    (re.compile(r"http://127\.0\.0\.1:(11434|8000)(?=/)"), "{url}"),
    (re.compile(r"https://api\.xerotier\.ai(?=/)"), "{url}"),
    (re.compile(r"--duration 60"), "--duration 0.5"),
    (re.compile(r"xeroctl bench(?! --report)"), "xeroctl bench --requests 2"),
]
STAND_INS = {
    "ssh": 'mkdir -p "$HOSTS/$1" && cd "$HOSTS/$1" && shift && exec sh -c "$*"',
    "scp": '[ "$1" = -q ] && shift; mkdir -p "$HOSTS/${2%:*}" && cp "$1" "$HOSTS/${2%:*}/${2#*:}"',
    "kubectl": 'echo "$*" >> "$HOSTS/kubectl"; for word; do cp "${word#--from-file=}" "$HOSTS" 2>&-; done; true',
    "journalctl": 'echo "disk full"',
}
CONFIG = """\
current = "prod"

[deployment.prod]
base_url = "{url}/PROJECT/v1"
api_key = "KEY"
endpoint = "my-endpoint"
"""

# -- The README ------------------------------------------------------

Block = collections.namedtuple("Block", "section language text")


def blocks(language):
    """Return the fenced blocks in *language*, each with the section that it is in."""
    found, section = [], None
    for heading, kind, text in re.findall(r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        section = heading or section
        if kind == language:
            found.append(Block(section, kind, text))
    return found


def shell_text(section):
    """Return the lines of all shell blocks in *section*; None is what stands above the first."""
    return "".join(block.text for block in blocks("sh") if block.section == section)


def prose():
    return re.sub(r"^```.*?^```$", "", GUIDE, flags=re.MULTILINE | re.DOTALL)


INLINE = sorted(set(re.findall(r"`(xeroctl [^`]+)`", prose())))
SECTIONS = ["Install", "Quickstart", "Ask", "Use it in scripts", "Batch", "Bench", "Check, models and stored completions"]


# -- A server for them -----------------------------------------------


def answer_to(request):
    """Return the response of an endpoint that streams, fits schemas, and has one stored completion."""
    if request.method == "GET":
        return json_response(stored_document(request.target.partition("?")[0]))
    if request.method == "DELETE":
        return json_response({"id": "chatcmpl-1", "deleted": True})
    text = CITY if "response_format" in request.json else ANSWER
    if request.json["stream"]:
        return stream(chunk(text), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)
    return json_response(completion(text))


def stored_document(path):
    if path.endswith("/models"):
        return {"object": "list", "data": [{"id": "llama-3", "object": "model"}]}
    if path.endswith("/messages"):
        return {"object": "list", "data": [{"id": "m-0", "role": "user", "content": "Suggest three names for a cat"}],
                "has_more": False}
    if path.endswith("/chat/completions"):
        return {"object": "list", "data": [completion(metadata={"topic": "cats"})], "has_more": False}
    return completion()


@pytest.fixture
def endpoint():
    """A server that answers every request; `asked` holds them."""
    def serve(sock):
        request = read_request(sock)
        server.asked.append(request)
        sock.sendall(answer_to(request))

    with Server() as server:
        server.asked = []
        server.always(BEFORE_REQUEST, Call(serve))
        yield server
    assert server.failures == []


# -- A machine for them ----------------------------------------------


class Machine:
    """A folder with the file, a home and programs of its own, in which shell text runs."""

    def __init__(self, folder, env, interpreter, words, url):
        self.folder, self.url = folder / "checkout", url
        self.hosts, self.programs = folder / "hosts", folder / "bin"
        for new in (self.folder, self.hosts, self.programs):
            new.mkdir()
        shutil.copy(str(XEROCTL), str(self.folder / "xeroctl.py"))
        (self.folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0 a photo")
        (self.programs / "python3").symlink_to(interpreter)
        for name, text in {"xeroctl": f'exec {shlex.join(words)} "$@"', **STAND_INS}.items():
            (self.programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (self.programs / name).chmod(0o755)
        self.env = {**env, "PATH": f"{self.programs}:/usr/bin:/bin", "HOSTS": str(self.hosts)}
        self.home = env["HOME"]

    def configure(self):
        """Write the config file that the quickstart leads to."""
        path = os.path.join(self.home, ".config", "xeroctl", "config.toml")
        os.makedirs(os.path.dirname(path), mode=0o700)
        with open(path, "w") as file:
            file.write(CONFIG.format(url=self.url))
        os.chmod(path, 0o600)

    def run(self, text, shell=("sh",), stdin="", **variables):
        """Return the (stdout, stderr) of the shell *text*; each of its commands has to end well."""
        for pattern, new in REPLACED:
            text = pattern.sub(new.format(url=self.url), text)
        done = subprocess.run([*shell, "-ec", text], cwd=str(self.folder), env={**self.env, **variables},
                              input=stdin.encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        out, errors = done.stdout.decode(), done.stderr.decode()
        assert (done.returncode, "Traceback" in errors, "xeroctl: error:" in errors) == (0, False, False), errors
        return out, errors


@pytest.fixture
def bare(tmp_path, env, interpreter, command, endpoint):
    """A Machine on which nothing is set up."""
    return Machine(tmp_path, env, interpreter, command(()), endpoint.url)


@pytest.fixture
def machine(bare):
    """A Machine with a deployment."""
    bare.configure()
    return bare


def need(*programs):
    """Skip the test where one of *programs* is not installed, unless that is in CI."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        assert os.environ.get("CI") != "true", f"{missing} must be there in CI"
        pytest.skip(f"not installed: {', '.join(missing)}")


def questions(endpoint):
    """Return the last message of each question that *endpoint* was asked."""
    return [request.json["messages"][-1]["content"] for request in endpoint.asked if request.method == "POST"]


# -- Its commands ----------------------------------------------------


def test_each_shell_block_is_in_a_section_with_a_test():
    assert {block.section for block in blocks("sh")} - {None} == set(SECTIONS)
    assert set(re.findall(r"^```(\w+)$", GUIDE, re.MULTILINE)) == {"sh", "toml", "python", "yaml", "text"}


@pytest.mark.smoke
def test_the_first_command_answers_and_the_second_runs_the_tests(bare):
    first, second = shell_text(None).splitlines()
    out, errors = bare.run(first)
    assert (first, "Hello" in out) == ('python3 xeroctl.py chat --demo --stream -m "Hello"', True)
    assert re.fullmatch(r"-- \d+ tokens in [\d.]+s \([\d.]+ tok/s\)\n", errors)
    assert os.access(str(TOP / second), os.X_OK)


def test_the_ways_to_install_work_or_have_the_form_of_their_installer(bare, interpreter):
    lines = [line.partition("  #")[0].strip() for line in shell_text("Install").splitlines()]
    assert lines[3:6] == FETCHING
    for line in lines[:2]:
        bare.run(line)
    assert "Hello, world" in bare.run(lines[2])[0]
    assert os.listdir(str(bare.hosts)) == ["HOST"] and os.listdir(str(bare.hosts / "HOST")) == ["xeroctl.py"]
    assert bare.run('"$HOME"/.local/bin/xeroctl --version')[0] == bare.run("xeroctl --version")[0]


@pytest.mark.parametrize("shell, prepared", [
    ("bash", ""), ("zsh", "autoload -U compinit && compinit -u -d $HOME/dump\n"), ("fish", ""),
])
def test_the_lines_for_tab_completion_load(bare, shell, prepared):
    need(shell)
    line = next(line for line in shell_text("Install").splitlines() if f"completion {shell}" in line)
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": []}[shell]
    done = subprocess.run([shell, *options, "-c", prepared + line.replace("\\|", "|")], cwd=str(bare.folder), env=bare.env,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.smoke
def test_the_quickstart_leads_to_an_answer_from_each_server(bare, endpoint):
    *adding, asking = shell_text("Quickstart").splitlines()
    for number, line in enumerate(adding):
        bare.run(line, stdin="SECRET\n")
        out, _ = bare.run("xeroctl config use %s\n%s" % (line.split()[3], asking))
        assert (out, len(endpoint.asked)) == (ANSWER, number + 1)
    assert [request.target for request in endpoint.asked] == ["/v1/chat/completions"] * 2 + ["/PROJECT/my-endpoint/v1/chat/completions"]
    assert [request.json["model"] for request in endpoint.asked] == ["llama3.2:1b", "Qwen/Qwen3-8B", "my-endpoint"]
    assert endpoint.asked[-1].headers["authorization"] == "Bearer SECRET"


def test_the_first_deployment_is_the_one_that_is_asked(bare, endpoint):
    bare.run(shell_text("Quickstart"), stdin="SECRET\n")
    assert [request.json["model"] for request in endpoint.asked] == ["llama3.2:1b"]


def test_what_is_asked_reaches_the_server_as_the_comments_say(machine, endpoint):
    out, errors = machine.run(shell_text("Ask"))
    assert (out.count("Paris"), out.count(CITY)) == (7, 1)
    assert "total tokens" in errors
    bodies = [request.json for request in endpoint.asked]
    assert len(bodies) == 8
    assert bodies[0]["stream"] and not any(body["stream"] for body in bodies[1:])
    assert bodies[1]["messages"][0] == {"role": "system", "content": "Answer in one line of Python."}
    assert (bodies[2]["messages"][-1]["content"], bodies[2]["max_tokens"], bodies[2]["temperature"]) == ("What do koalas eat?", 100, 0)
    assert (bodies[3]["stop"], bodies[3]["reasoning_effort"]) == (["END"], "low")
    assert "Filesystem" in bodies[4]["messages"][-1]["content"]
    assert bodies[5]["messages"][-1]["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert bodies[6]["response_format"]["json_schema"]["schema"]["required"] == ["city"]
    assert (machine.folder / "count.sh").read_text() == "seq 10\n"


def test_the_loops_for_scripts_ask_each_question_once(machine, endpoint):
    need("jq")
    out, errors = machine.run(shell_text("Use it in scripts"))
    assert questions(endpoint) == ["Is 91 prime?", "Is 97 prime?", "Say OK.", "Say OK.", "Hello"]
    assert [request.target.split("/")[2] for request in endpoint.asked[2:4]] == ["blue", "green"]
    assert (out, errors) == (ANSWER * 4 + f"{USAGE['total_tokens']}\n", "")


def test_the_line_for_cron_prints_the_answer_alone(machine, endpoint):
    line = re.search(r"^# (?:[\d*]+ ){5}(.*)$", shell_text("Use it in scripts"), re.MULTILINE).group(1)
    assert "%" not in line  # a newline to cron
    machine.run(shell_text("Install").splitlines()[0])
    assert machine.run(line) == (ANSWER, "")
    assert "disk full" in questions(endpoint)[0]


def chat_at_a_terminal(machine):
    """Hold a conversation of one turn, to be kept."""
    with Terminal([str(machine.programs / "xeroctl"), "chat", "-i"], machine.env, cwd=str(machine.folder)) as child:
        for line in ("Hi\r", "/quit\r"):
            child.expect(session_svg.PROMPT)
            child.send(line)
        assert child.finish() == 0


INLINE_INPUT = {"xeroctl chat -i": "Hi\n/tokens\n", "xeroctl chat -c": "And then?\n"}


@pytest.mark.parametrize("line", INLINE)
def test_a_command_within_a_sentence_runs(machine, endpoint, line):
    if line == "xeroctl chat -c":
        chat_at_a_terminal(machine)
    out, errors = machine.run(line, stdin=INLINE_INPUT.get(line, ""))
    assert out or errors
    if line == "xeroctl chat -c":
        assert [message["role"] for message in endpoint.asked[-1].json["messages"]] == ["user", "assistant", "user"]


def test_batch_asks_the_reviews_and_does_not_ask_again(machine, endpoint):
    text = "".join(line + "\n" for line in shell_text("Batch").splitlines() if "reviews.txt" in line)
    assert text.count("xeroctl batch") == 3
    out, _ = machine.run(text)
    lines = out.splitlines()
    results = [json.loads(line) for line in lines[:2]]
    assert sorted(result["custom_id"] for result in results) == ["1", "2"]
    assert lines[2:] == [json.dumps(ANSWER)[1:-1]] * 2
    assert [request.json["messages"][0]["role"] for request in endpoint.asked] == ["system"] * 2 + ["user"] * 4
    machine.run(text.splitlines()[-1])
    assert len(endpoint.asked) == 6
    assert len((machine.folder / "results.jsonl").read_text().splitlines()) == 2


def custom_ids(text):
    """Return the sorted numbers of the requests n1, n2 … that the results in *text* answer."""
    results = [json.loads(line) for line in text.splitlines()]
    assert all(result["error"] is None for result in results)
    return sorted(int(result["custom_id"][1:]) for result in results)


ALL = list(range(1, 201))


def machines_text(*left_out):
    """Return the commands that spread requests over machines, without the lines that hold one of *left_out*."""
    text = next(block.text for block in blocks("sh") if "split" in block.text)
    return "".join(line + "\n" for line in text.splitlines() if not any(word in line for word in left_out))


def test_a_share_of_the_requests_goes_to_each_host(machine):
    machine.run(machines_text("parallel"))
    assert sorted(os.listdir(str(machine.hosts / "host2"))) == ["part2"]
    first, second = ((machine.folder / f"answers{number}.jsonl").read_text() for number in (1, 2))
    assert custom_ids(first) and custom_ids(second) and custom_ids(first + second) == ALL


def test_gnu_parallel_gives_requests_to_several_processes(machine):
    need("parallel")
    line = machines_text().splitlines()[1]
    out, _ = machine.run(f"{machines_text().splitlines()[0]}\n{line}")
    assert (line.startswith("parallel "), out) == (True, "")
    assert custom_ids((machine.folder / "answers.jsonl").read_text()) == ALL


class Lines:
    """Spark's data set of lines, as far as the README uses it, in *folder*; `pipe` does what PySpark's does."""

    def __init__(self, folder, partitions):
        self.folder, self.partitions = folder, partitions

    def pipe(self, command, env):
        def pipe(data):
            return subprocess.run(shlex.split(command), env=env, input=data, stdout=subprocess.PIPE, cwd=str(self.folder)).stdout

        return Lines(self.folder, [pipe(data) for data in self.partitions])

    def saveAsTextFile(self, name):
        for number, data in enumerate(self.partitions):
            (self.folder / f"{name}-{number}").write_bytes(data)


class SparkContext:
    def __init__(self, folder):
        self.folder = folder

    def textFile(self, name, count):
        lines = (self.folder / name).read_bytes().splitlines(True)
        return Lines(self.folder, [b"".join(lines[number::count]) for number in range(count)])


def test_spark_pipes_each_partition_through_a_process(machine):
    machine.run(machines_text().splitlines()[0])
    spark = SimpleNamespace(sparkContext=SparkContext(machine.folder))
    exec(blocks("python")[0].text, {"spark": spark, "os": SimpleNamespace(environ=machine.env)})
    outputs = [path.read_text() for path in machine.folder.glob("answers-*")]
    assert len(outputs) == 8 and all(outputs)
    assert custom_ids("".join(outputs)) == ALL


def test_the_pods_of_the_job_ask_all_requests_between_them(machine):
    machine.run(machines_text().splitlines()[0])
    (machine.folder / "settings.env").write_text("XEROTIER_ENDPOINT=my-endpoint\n")
    text = blocks("yaml")[0].text
    for line in re.findall(r"^# (kubectl .*?)(?:    \(.*)?$", text, re.MULTILINE):
        machine.run(line)
    assert {"xeroctl.py", "requests.jsonl"} <= set(os.listdir(str(machine.hosts)))
    command = re.search(r'command: \[sh, -c, "(.*)"\]', text).group(1)
    pods = int(re.search(r"completions: (\d+)", text).group(1))
    outputs = [machine.run(command.replace("/files", str(machine.hosts)), JOB_COMPLETION_INDEX=str(pod))[0] for pod in range(pods)]
    assert f"NR%{pods}" in command and all(outputs)
    assert custom_ids("".join(outputs)) == ALL


def test_the_commands_of_bench_measure_and_report(machine):
    out, _ = machine.run(shell_text("Bench"))
    heads = [line.split() for line in blocks("text")[0].text.splitlines()[:2]]
    for head in heads:
        assert head in [line.split() for line in out.splitlines()]
    loads = re.findall(r"^(blue|green) +([^\s:]+) +[\d.]+", out, re.MULTILINE)
    assert loads == [("blue", "c=4"), ("green", "c=4"), ("blue", "c=1"), ("blue", "c=4"), ("blue", "c=16"),
                     ("blue", "rate=5"), ("blue", "rate=5"), ("blue", "c=4")]


@pytest.mark.smoke
def test_the_commands_for_stored_completions_run_in_turn(machine, endpoint):
    out, _ = machine.run(shell_text("Check, models and stored completions"))
    assert endpoint.asked[0].json["metadata"] == {"topic": "cats"} and endpoint.asked[0].json["store"]
    assert [request.method for request in endpoint.asked[1:]] == ["GET", "GET", "GET", "DELETE"]
    assert "topic=cats" in out
    out, _ = machine.run("xeroctl chat -i -q", stdin="/load cats.json\nWhich is best?\n")
    assert "Which is best?" in questions(endpoint)


def test_the_config_file_is_what_config_set_would_leave(xeroctl):
    text = blocks("toml")[0].text
    config = xeroctl.parse_config(text, "README.md")
    assert config.current in config.deployments
    assert {name for deployment in config.deployments.values() for name in deployment} <= set(xeroctl.FIELD_TYPES)


# -- Its lists and its shape -----------------------------------------


def parsers(xeroctl):
    """Return all parsers, that of the tool first."""
    return [xeroctl.build_parser(name) for name in xeroctl.COMMANDS]


def test_it_names_every_command_and_no_option_that_does_not_exist(xeroctl):
    named = set(re.findall(r"\bxeroctl(?:\.py)? ([a-z]+)\b", "\n".join(INLINE + [block.text for block in blocks("sh")])))
    assert named == set(parsers(xeroctl)[0].commands)
    known = {name for parser in parsers(xeroctl) for name in parser.options}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", GUIDE)) - known == FOREIGN_OPTIONS


def test_it_names_every_shell_status_and_variable(xeroctl):
    assert set(re.findall(r"xeroctl completion (\w+)", shell_text("Install"))) == set(xeroctl.SHELLS)
    table = re.search(r"^\| status \|.*?\n\n", GUIDE, re.MULTILINE | re.DOTALL).group()
    statuses = [int(number) for number in re.findall(r"\| (\d+) (?=\|)", table)]
    ours = {value for name, value in vars(xeroctl).items() if name.startswith("EXIT_")}
    assert sorted(statuses) == sorted(ours | {130})
    ours = {value for name, value in vars(xeroctl).items() if name.startswith("ENV_")}
    assert set(re.findall(r"\b(?:XEROTIER|OPENAI)_[A-Z_]+", GUIDE)) == ours


def test_it_names_no_chat_command_that_does_not_exist(xeroctl):
    named = set(re.findall(r"`(/[a-z]+)", prose()))
    assert len(named) > 5
    assert named - {command.name for command in xeroctl.CHAT_COMMANDS} == set()


def test_it_is_short_and_its_links_lead_to_files():
    lines = GUIDE.split("\n")[:-1]
    assert (len(lines) <= MOST_LINES, [line for line in lines if len(line) > MOST_COLUMNS]) == (True, [])
    links = [link for link in re.findall(r"\]\(([^)]+)\)", GUIDE) if "://" not in link]
    assert links and [link for link in links if not (TOP / link).is_file()] == []


def test_the_changes_begin_with_this_version(xeroctl):
    version, changes = re.search(r"^## Changes\n+### (\S+), 20\d\d-[01]\d-[0-3]\d\n(.*)", GUIDE, re.MULTILINE | re.DOTALL).groups()
    assert version == xeroctl.__version__
    assert "###" not in changes and changes.strip().count("\n") < 10


@pytest.mark.needs("readline", "utf-8-terminal", "bare-environment")
def test_the_picture_shows_what_a_chat_looks_like_now(interpreter):
    assert session_svg.draw(session_svg.record_session(interpreter)) == session_svg.PICTURE.read_text(encoding="utf-8")
    assert session_svg.PICTURE.stat().st_size < MOST_PICTURE_BYTES
