"""`xeroctl bench`: figures beside what a paced server did, reports, saved runs, and the arithmetic as tables of cases."""

import argparse
import collections
import json
import os
import random
import re
import signal
import time

import pytest

import paced
from terminal import wait_until

QUICK = {"ttft_ms": [40, 50], "tpot_ms": 4, "tokens": 20}
NEVER_RUN = ["--base-url", "http://127.0.0.1:1"]
Benched = collections.namedtuple("Benched", "status stdout stderr document")


@pytest.fixture(scope="module")
def endpoint():
    """A server with an endpoint for each way to behave."""
    with paced.Server(
        blue=QUICK, green={**QUICK, "ttft_ms": [80, 90], "tpot_ms": 8}, untold={**QUICK, "usage": False},
        four={**QUICK, "per_chunk": 4}, role={**QUICK, "role_ms": 1}, thinking={**QUICK, "reasoning": 10},
        pensive={**QUICK, "reasoning": 20}, tenth={**QUICK, "share": {"500": 0.2}}, hold={**QUICK, "hold": True},
        limited={"share": {"429": 1}, "retry_after": 0}, close={**QUICK, "close": True}, cut={**QUICK, "share": {"cut": 0.5}},
        single={"tokens": 1}, long={"ttft_ms": [30, 30], "tpot_ms": 50, "tokens": 1000}, bad={"share": {"401": 1}},
        slow={"ttft_ms": [30000, 30000]}, calm={"ttft_ms": [40, 50], "tpot_ms": 20, "tokens": 10},
    ) as server:
        yield server


@pytest.fixture
def bench(run, endpoint):
    """Run bench and return its Result, with the parsed document of -o json."""

    def bench(slug, *args, **options):
        slugs = [word for name in slug.split() for word in ("-e", name)]
        result = run("bench", *slugs, "--base-url", endpoint.url, *args, **options)
        return Benched(*result, json.loads(result.stdout.decode()) if result.stdout[:1] == b"{" and "json" in args else None)

    return bench


def measured(bench, slug, *args):
    """Return the first result of a short run that ended well."""
    duration = "20" if "--requests" in args else "0.8"
    done = bench(slug, "--duration", duration, "-o", "json", *args)
    assert done.status == 0, done.stderr
    return done.document["results"][0]


# -- Figures ---------------------------------------------------------


@pytest.mark.smoke
def test_figures_of_a_known_endpoint(bench, endpoint):
    before = len(endpoint.log())
    result = measured(bench, "blue")
    sent = endpoint.log()[before:]
    assert list(result) == [
        "endpoint", "load", "requests", "ok", "unfinished", "not_sent", "errors", "seconds", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms",
        "wait_ms", "connect_ms", "output_tokens_per_second", "requests_per_second", "input_tokens", "output_tokens",
        "cached_tokens", "exact", "tokens_per_chunk", "slo"]
    assert (result["endpoint"], result["load"], result["errors"], result["exact"]) == ("blue", "c=4", {}, True)
    assert result["ok"] == result["requests"] == len(sent) - 1  # the warm-up
    assert (result["output_tokens"], result["tokens_per_chunk"], result["slo"]) == (20 * result["ok"], 1, None)
    assert result["ttft_ms"]["n"] == result["e2e_ms"]["n"] == result["ok"]
    assert result["itl_ms"]["n"] == 19 * result["ok"]
    truth = [1000 * (entry["first"] - entry["at"]) for entry in sent]
    assert min(truth) <= result["ttft_ms"]["min"] < 3 * max(truth)
    assert 3 <= result["tpot_ms"]["p50"] < 60
    assert result["e2e_ms"]["min"] >= result["ttft_ms"]["min"] + 70
    assert 0 < result["output_tokens_per_second"] <= 4 * 20 / 0.116


def test_what_is_sent(bench, endpoint):
    before = len(endpoint.log())
    measured(bench, "blue", "--requests", "6", "--slo-ttft", "200", "--system", "S", "--param", "top_k=1", "--seed", "3")
    first, *others = endpoint.log()[before:]
    assert first["body"]["messages"][0] == {"role": "system", "content": "S"}
    assert (first["body"]["stream"], first["body"]["stream_options"]) == (True, {"include_usage": True})
    assert (first["body"]["max_tokens"], first["body"]["top_k"], first["headers"]["x-slo-ttft-ms"]) == (128, 1, "200")
    assert "gzip" not in first["headers"].get("accept-encoding", "")
    assert len(first["message"].split()) == 129
    assert len({entry["message"][:8] for entry in [first] + others}) == 7
    assert re.match(r"[0-9a-f]{8} ", first["message"])


def test_prompts_are_the_same_with_the_same_seed(bench, endpoint):
    sent = []
    for seed in ("1", "1", "2"):
        before = len(endpoint.log())
        measured(bench, "blue", "--requests", "4", "--seed", seed, "--prompt-tokens", "5")
        sent.append(sorted(entry["message"][9:] for entry in endpoint.log()[before:]))
    assert sent[0] == sent[1] != sent[2]


def test_prompts_of_a_file(bench, endpoint, tmp_path):
    path = tmp_path / "prompts"
    path.write_text("one\n\ntwo\n")
    before = len(endpoint.log())
    measured(bench, "blue", "--requests", "4", "--prompts", str(path), "--cached", "--warmup", "0")
    assert sorted(entry["message"] for entry in endpoint.log()[before:]) == ["one", "one", "two", "two"]


@pytest.mark.parametrize("slug, exact, per_chunk, tokens", [
    ("untold", False, 1, 20), ("four", True, 4, 20), ("role", True, 1, 20), ("thinking", True, 1, 20),
    ("pensive", True, 1, 20), ("hold", True, 1, 20), ("close", True, 1, 20), ("single", True, 1, 1),
])
def test_figures_stay_true(bench, slug, exact, per_chunk, tokens):
    result = measured(bench, slug, "--requests", "8")
    assert (result["ok"], result["errors"]) == (8, {})
    assert (result["exact"], result["tokens_per_chunk"], result["output_tokens"]) == (exact, per_chunk, 8 * tokens)
    if tokens > 1:
        assert result["ttft_ms"]["min"] >= 39.9
        assert 3 <= result["tpot_ms"]["p50"] < 60
        assert result["itl_ms"]["mean"] >= 3.5 * per_chunk
        assert result["e2e_ms"]["min"] >= 39 + 4 * (tokens - per_chunk)


def test_a_connection_for_each_request(bench):
    assert measured(bench, "blue", "--requests", "6")["connect_ms"]["n"] <= 6
    assert measured(bench, "blue", "--requests", "6", "--no-keepalive")["connect_ms"]["n"] == 6


def test_failures_are_told_apart(bench):
    result = measured(bench, "tenth", "--requests", "40", "--concurrency", "40", "--warmup", "0", "--duration", "5")
    assert list(result["errors"]) == ["server (HTTP 500)"]
    assert result["ok"] + result["errors"]["server (HTTP 500)"] == result["requests"] == 40
    assert result["ttft_ms"]["n"] == result["ok"]
    result = measured(bench, "cut", "--requests", "10", "--concurrency", "10", "--warmup", "0")
    assert list(result["errors"]) == ["cut_short (HTTP 200)"] or list(result["errors"]) == ["cut_short"]


def test_twenty_failures_in_a_row_end_the_run(bench):
    done = bench("limited", "--warmup", "0", "-o", "json", "--duration", "10")
    result, = done.document["results"]
    assert (done.status, result["ok"]) == (7, 0)
    assert 20 <= result["errors"]["rate_limit (HTTP 429)"] <= 23


@pytest.mark.smoke
def test_a_failed_warm_up_ends_all(bench, endpoint):
    before = len(endpoint.log())
    done = bench("bad")
    assert (done.status, done.stdout, len(endpoint.log()) - before) == (3, b"", 1)
    assert b"HTTP 401" in done.stderr


def test_nobody_there(run):
    assert run("bench", "-e", "x", *NEVER_RUN).status == 6


def test_two_endpoints_at_once(bench):
    done = bench("blue green", "--duration", "1.5", "-o", "json", "--slo-ttft", "70", "--slo-tpot", "1000")
    blue, green = done.document["results"]
    assert (blue["endpoint"], green["endpoint"]) == ("blue", "green")
    assert green["ttft_ms"]["p50"] > blue["ttft_ms"]["p50"]
    assert green["tpot_ms"]["p50"] > blue["tpot_ms"]["p50"]
    assert (green["slo"]["met"], green["slo"]["of"]) == (0, green["ok"])
    assert blue["slo"]["met"] > 0


def test_a_sweep(bench):
    done = bench("blue", "--duration", "0.4", "--concurrency", "1,2,4", "-o", "json")
    assert [result["load"] for result in done.document["results"]] == ["c=1", "c=2", "c=4"]
    done = bench("blue", "--duration", "0.4", "--rate", "20,2.5", "-o", "json")
    assert [result["load"] for result in done.document["results"]] == ["rate=20", "rate=2.5"]


def test_a_rate_without_coordinated_omission(run):
    with paced.Server(stall={"ttft_ms": [5, 5], "tokens": 2, "stall_s": [1, 2]}) as server:
        done = run("bench", "-e", "stall", "--base-url", server.url, "--rate", "40", "--duration", "2.5", "--warmup", "0", "-o", "json")
        log = server.log()
    result, = json.loads(done.stdout.decode())["results"]
    assert 60 <= result["requests"] == result["ok"] == len(log) <= 150
    assert result["ttft_ms"]["max"] > 900  # those that were due at the beginning of the stall
    assert len([entry for entry in log if entry["first"] - entry["at"] > 0.1]) > 20
    assert result["ttft_ms"]["p90"] > 500


def test_the_same_arrivals_with_the_same_seed(bench, endpoint):
    times = []
    for _ in range(2):
        before = len(endpoint.log())
        measured(bench, "single", "--rate", "20", "--warmup", "0", "--duration", "1")
        log = endpoint.log()[before:]
        times.append([entry["at"] - log[0]["at"] for entry in log])
    assert len(times[0]) == len(times[1])
    assert all(abs(one - other) < 0.2 for one, other in zip(*times))


# -- Reports ---------------------------------------------------------


@pytest.mark.smoke
def test_the_report_of_one_row(bench):
    done = bench("blue", "--requests", "8")
    lines = done.stdout.decode().split("\n")
    assert done.status == 0
    assert all(len(line) <= 80 for line in lines)
    assert lines[1] == "endpoint load      p50    p95    p50    p95    p95   tok/s  req/s   errors"
    assert lines[2].split()[:2] == ["blue", "c=4"]
    assert [line.split("  ")[0] for line in lines[5:9]] == ["TTFT ms", "TPOT ms", "ITL ms", "E2E s"]
    text = done.stdout.decode()
    assert re.search(r"TTFT: \d+ ms \|[ ▁▂▃▄▅▆▇█]+\| \d+ ms\n", text)
    assert "8 of 8 done in" in text
    assert "p99 of 8 requests is little more than their slowest one" in text
    assert re.search(r"client: woken \d+\.\d ms late \(p50\), \d+\.\d ms \(p99\)\n", text)
    assert done.stderr == b""


def test_the_report_of_two_rows(bench):
    done = bench("blue green", "--requests", "8", "--slo-ttft", "70")
    text = done.stdout.decode()
    assert " targets\n" in text
    assert re.search(r"\ngreen against blue: TTFT p50 \+\d+ % \([+-]\d+ to [+-]\d+\), TPOT p50 \+", text)
    assert "\ngreen c=4: 8 of 8 done" in text


def test_one_request_has_no_slowest_one(bench):
    assert b"p99 of" not in bench("single", "--requests", "1").stdout


def test_chunks_are_marked(bench):
    text = bench("untold four", "--requests", "4").stdout.decode()
    assert re.search(r"untold +c=4 .* ~\d", text)
    assert "a chunk holds 4.0 tokens" in text
    assert "marks counts of chunks" in text


def test_the_report_on_a_terminal(terminal, endpoint):
    child = terminal("bench", "-e", "blue", "-e", "green", "--base-url", endpoint.url, "--duration", "1.2", "--slo-ttft", "70")
    child.expect("1 to warm up, then 4 in flight for 1.2 s; 128 tokens at most")
    child.expect(re.compile(r"blue c=4 \d of 1.2 s: \d+ done, \d in flight, 0 failed, \d+ tok/s"))
    child.expect(re.compile("\x1b\\[1m *TTFT ms"))
    child.expect(re.compile("\x1b\\[31m +0.0 %\x1b\\[0m"))
    assert child.finish() == 0


@pytest.mark.parametrize("args, tokens", [
    ([], "128 tokens at most"), (["--max-tokens", "7"], "7 tokens at most"),
    (["--param", "max_completion_tokens=9"], "9 tokens at most"), (["--param", "max_tokens=null"], "no limit of tokens"),
])
def test_the_line_on_what_will_be_sent_tells_the_limit(terminal, endpoint, args, tokens):
    child = terminal("bench", "-e", "single", "--base-url", endpoint.url, "--requests", "1", *args)
    child.expect("1 to warm up, then 4 in flight for 1 request; " + tokens)
    assert child.finish() == 0


BUSY_PARSER = """
import os, sys, time
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import xeroctl
feed = xeroctl.AnswerDecoder.feed
def slow_feed(self, data, at):
    end = time.monotonic() + 0.02
    while time.monotonic() < end:
        pass
    return feed(self, data, at)
xeroctl.AnswerDecoder.feed = slow_feed
sys.exit(xeroctl.main())
"""


def test_an_overloaded_parser_spoils_no_time_and_is_told(run, endpoint):
    """Eight streams of a chunk each 20 ms, and a parser that takes 20 ms for each of them."""
    done = run("bench", "-e", "calm", "--base-url", endpoint.url, "--concurrency", "8", "--requests", "8", "-o", "json",
               interpreter_options=("-c", BUSY_PARSER))
    document = json.loads(done.stdout.decode())
    assert document["results"][0]["ok"] == 8
    assert 10 < document["results"][0]["itl_ms"]["p50"] < 80  # with the parser's time, 160 or, read together, 0
    assert document["client"]["lag_ms"]["p99"] > 50
    assert document["client"]["trusted"] is False


def test_demo(run):
    done = run("bench", "--demo", "--requests", "2", "--concurrency", "2", "--max-tokens", "3")
    assert (done.status, b"practice" in done.stdout) == (0, True)


def test_dry_run_sends_nothing(bench, endpoint):
    before = len(endpoint.log())
    done = bench("blue green", "--dry-run")
    assert (done.status, done.stdout.count(b"curl ")) == (0, 2)
    assert len(endpoint.log()) == before


@pytest.mark.parametrize("condition, status", [
    ("ttft.p50>1", 10), ("ttft.p50>90000", 0), ("errors>1%", 0), ("errors>=0", 10), ("tok/s<1", 0), ("slo<95%", 10),
    ("req/s<100000", 10), ("lag.p99>100000", 0), ("e2e.max < 1", 0),
])
def test_fail_if(bench, condition, status):
    done = bench("blue", "--requests", "4", "--fail-if", condition, "--slo-ttft", "10", "-o", "json")
    assert done.status == status
    assert done.document["failed_conditions"] == ([condition] if status else [])


@pytest.mark.parametrize("args, words", [
    (["--fail-if", "ttft.p42>1"], "ttft, tpot, itl"), (["--fail-if", "nonsense"], "--fail-if"), (["--fail-if", "ttft.p50>1%"], "%"),
    (["--fail-if", "slo<1"], "--slo-ttft"), (["--retries", "1"], "--retries"), (["--save", "-", "-o", "json"], "--save"),
    (["--rate", "1", "--concurrency", "2"], "--rate"), (["--concurrency", "2,x"], "--concurrency"), (["--rate", "0"], "--rate"),
    (["--report", "f"], "--report"), (["-e", "x"], "twice"), (["--prompts", "nowhere"], "nowhere"), (["--concurrency", "1,,2"], "--concurrency"),
    (["--rate", "5,nan"], "--rate"), (["--rate", "5,inf"], "--rate"), (["--prompt-tokens", "20000000"], "--prompt-tokens"),
])
def test_wrong_options_ask_nobody(run, args, words):
    done = run("bench", "-e", "x", *NEVER_RUN, *args)
    assert (done.status, words in done.stderr.decode()) == (2, True)


# -- Saved runs, and ends --------------------------------------------


def test_save_and_report(bench, run, tmp_path):
    path = tmp_path / "saved.jsonl"
    first = bench("blue", "--requests", "5", "--save", str(path), "-o", "json", "--api-key", "xero_secret_key", "--seed", "9")
    second = bench("blue", "--requests", "7", "--save", str(path), "-o", "json")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    heads = [line for line in lines if "began" in line]
    assert (len(heads), len(lines)) == (2, 14)
    assert list(heads[0]) == ["run", "load", "began", "window_ms", "slo", "lag_ms", "version", "options"]
    assert list(lines[1]) == ["run", "endpoint", "load", "start_ms", "wait_ms", "connect_ms", "ttft_ms", "e2e_ms", "itl_ms",
                              "input_tokens", "cached_tokens", "output_tokens", "exact", "finish_reason", "error"]
    assert "xero_secret_key" not in path.read_text() and "river" not in path.read_text()
    report = run("bench", "--report", str(path), "-o", "json")
    result, = json.loads(report.stdout.decode())["results"]
    assert (report.status, result["ok"], result["ttft_ms"]["n"]) == (0, 12, 12)
    values = [done.document["results"][0] for done in (first, second)]
    assert abs(result["ttft_ms"]["max"] - max(value["ttft_ms"]["max"] for value in values)) < 0.01
    assert run("bench", "--report", str(path), "--fail-if", "ttft.p50>1").status == 10
    assert b"averages of 2 runs" in run("bench", "--report", str(path)).stdout


def test_save_to_stdout(bench):
    done = bench("blue", "--requests", "3", "--save", "-")
    assert [sorted(json.loads(line))[0] for line in done.stdout.decode().splitlines()] == ["began"] + 3 * ["cached_tokens"]


@pytest.mark.parametrize("path", ["/nonexistent/x", "/", "."])
def test_a_file_that_cannot_be_saved_to_asks_nobody(bench, endpoint, path):
    before = len(endpoint.log())
    done = bench("blue", "--requests", "2", "--save", path)
    assert (done.status, done.stderr.count(b"\n"), b"cannot write " + path.encode() in done.stderr) == (2, 1, True)
    assert len(endpoint.log()) == before


def test_a_failed_save_ends_no_run(bench):
    done = bench("blue", "--requests", "2", "--concurrency", "1,2", "--save", "/dev/full")
    assert (done.status, done.stderr.count(b"cannot write /dev/full")) == (1, 1)
    assert done.stdout.count(b"2 of 2 done") == 2


def test_a_half_written_line_is_cut_off(bench, run, tmp_path):
    path = tmp_path / "saved.jsonl"
    for end in (b"", b'{"ru', b'{"run":"a","loa'):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + end)
        assert bench("blue", "--requests", "2", "--save", str(path)).status == 0
        assert path.read_bytes().startswith(before + b'{"run":"')
    report = run("bench", "--report", str(path), "-o", "json")
    assert json.loads(report.stdout.decode())["results"][0]["ok"] == 6


@pytest.mark.parametrize("text", [b"my notes", b"my notes\n", b"{}\n", b"{", b'{"id":"x', b"\xff\n", b"[1]\n"], ids=str)
def test_runs_are_not_saved_to_a_file_of_something_else(bench, endpoint, tmp_path, text):
    path = tmp_path / "notes"
    path.write_bytes(text)
    before = len(endpoint.log())
    done = bench("blue", "--requests", "2", "--save", str(path))
    assert (done.status, done.stderr.count(b"\n"), path.read_bytes()) == (2, 1, text)
    assert len(endpoint.log()) == before


def test_save_to_a_pipe(start, endpoint, tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(str(path))
    child = start("bench", "-e", "blue", "--base-url", endpoint.url, "--requests", "3", "--save", str(path))
    assert path.read_bytes().count(b"\n") == 4
    assert child.finish().status == 0


def test_a_report_of_something_else(run, tmp_path):
    path = tmp_path / "other"
    path.write_text("{}\n")
    assert run("bench", "--report", str(path)).status == 2


@pytest.mark.parametrize("name, value", [
    ("load", 5), ("load", "c=2"), ("endpoint", None), ("output_tokens", None), ("output_tokens", "9"), ("cached_tokens", []), ("error", {}),
    ("error", 5), ("itl_ms", None), ("itl_ms", ["1"]), ("itl_ms", 5), ("ttft_ms", "1"), ("start_ms", None), ("e2e_ms", 1e16),
    ("exact", None), ("input_tokens", True), ("finish_reason", []), ("run", []), ("other", 1), ("start_ms", 10 ** 400),
], ids=str)
def test_an_odd_request_is_named_by_its_line(run, xeroctl, tmp_path, name, value):
    check_odd_line(run, xeroctl, tmp_path, 3, name, value)


@pytest.mark.parametrize("name, value", [
    ("run", None), ("load", 5), ("began", None), ("began", "1"), ("window_ms", [1]), ("window_ms", None), ("slo", {}), ("slo", 5),
    ("slo", {"ttft_ms": "1", "tpot_ms": None}), ("lag_ms", {}), ("lag_ms", {"p50": 1, "p99": None, "max": 1}), ("lag_ms", None), ("requests", []),
], ids=str)
def test_an_odd_head_is_named_by_its_line(run, xeroctl, tmp_path, name, value):
    check_odd_line(run, xeroctl, tmp_path, 1, name, value)


def check_odd_line(run, xeroctl, tmp_path, number, name, value):
    lines = xeroctl.save_lines(saved_run(xeroctl, [request(xeroctl), request(xeroctl)])).splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), name: value})
    path = tmp_path / "odd"
    path.write_text("\n".join(lines) + "\n")
    done = run("bench", "--report", str(path))
    assert (done.status, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert f"line {number} of {path}".encode() in done.stderr


@pytest.mark.parametrize("has_head", [False, True])
def test_a_report_of_nothing(run, xeroctl, tmp_path, has_head):
    path = tmp_path / "empty"
    path.write_text(xeroctl.save_lines(saved_run(xeroctl, [])) if has_head else "")
    done = run("bench", "--report", str(path))
    assert (done.status, done.stdout, done.stderr) == (2, b"", f"xeroctl: error: there are no saved requests in {path}\n".encode())


@pytest.mark.parametrize("option", ["--report", "--prompts"])
@pytest.mark.parametrize("path", ["/dev/zero", "/"])
def test_devices_and_folders_are_not_read(run, option, path):
    done = run("bench", "-e", "x", *NEVER_RUN, "--prompts", path) if option == "--prompts" else run("bench", "--report", path)
    assert (done.status, done.stderr) == (2, f"xeroctl: error: cannot read {path}: it is neither a file nor a pipe\n".encode())


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("option", ["--report", "--prompts"])
def test_a_pipe_without_another_end_is_not_deaf(start, tmp_path, option, number, status):
    path = tmp_path / "pipe"
    os.mkfifo(str(path))
    child = start("bench", *(["-e", "x", *NEVER_RUN] if option == "--prompts" else []), option, str(path))
    child.wait_until_handled(signal.SIGTERM)
    child.signal(number)
    assert child.finish().status == status


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_was_measured(start, endpoint, tmp_path, number, status):
    path = tmp_path / "saved.jsonl"
    before = len(endpoint.log())
    child = start("bench", "-e", "long", "--base-url", endpoint.url, "--concurrency", "3", "--warmup", "0", "--save", str(path))
    wait_until(lambda: len([entry for entry in endpoint.log()[before:] if len(entry["gaps"]) > 20]) == 3)
    child.signal(number)
    started = time.monotonic()
    done = child.finish()
    assert (done.status, time.monotonic() - started < 2) == (status, True)
    assert b"0 of 3 done" in done.stdout
    assert b"3 unfinished" in done.stdout
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("error") for line in lines] == [None] + 3 * ["unfinished"]
    assert all(len(line["itl_ms"]) > 5 for line in lines[1:])


def test_kill_9_leaves_finished_runs(start, endpoint, tmp_path):
    path = tmp_path / "saved.jsonl"
    child = start("bench", "-e", "single", "--base-url", endpoint.url, "--concurrency", "1,2,3", "--requests", "5", "--duration",
                  "60", "--save", str(path), "--prompt-tokens", "1")
    done = child.finish()
    assert (done.status, path.read_text().count("began")) == (0, 3)
    child = start("bench", "-e", "slow", "--base-url", endpoint.url, "--warmup", "0", "--save", str(path))
    wait_until(lambda: endpoint.log()[-1]["slug"] == "slow")
    child.signal(signal.SIGKILL)
    assert child.finish().status == 137
    assert [json.loads(line) for line in path.read_text().splitlines()]


# -- Arithmetic ------------------------------------------------------


def request(xeroctl, start=0, ttft=100, gaps=(), tokens=None, error=None, run="r", endpoint="e", load="c=1", **more):
    """Return a BenchRequest of good manners."""
    gaps = list(gaps)
    blank = xeroctl.BenchRequest(*[None] * len(xeroctl.BenchRequest._fields))
    return blank._replace(
        run=run, endpoint=endpoint, load=load, start_ms=start, wait_ms=0, ttft_ms=ttft, e2e_ms=None if ttft is None else ttft + sum(gaps),
        itl_ms=gaps, output_tokens=len(gaps) + 1 if tokens is None else tokens, exact=True, error=error, **more)


def saved_run(xeroctl, requests, window=(0, 1000), began=0, run="r", lag=1, slo=None, load="c=1"):
    return xeroctl.BenchRun(run, load, began, list(window), slo, {"p50": 0, "p99": lag, "max": lag}, "0", {}, requests)


def test_a_row_has_the_rates_of_the_runs_that_asked_its_endpoint(xeroctl):
    one = saved_run(xeroctl, [request(xeroctl, start=100 * n, gaps=[1]) for n in range(10)])
    other = saved_run(xeroctl, [request(xeroctl, endpoint="f")], began=50, run="s")
    alone = xeroctl.BenchSet("e", "c=1", [one])
    both = xeroctl.BenchSet("e", "c=1", [one, other])
    assert (both.token_rate, both.request_rate, both.groups) == (alone.token_rate, alone.request_rate, 1)


def test_an_endpoint_that_is_done_before_the_others_has_its_own_window(xeroctl):
    fast = [request(xeroctl, start=start) for start in (0, 100, 200)]
    slow = [request(xeroctl, start=start, ttft=1000, endpoint="f") for start in (0, 1000, 2000)]
    run = saved_run(xeroctl, fast + slow, window=(0, 2000))._replace(options={"requests": 3})
    rates = [xeroctl.BenchSet(endpoint, "c=1", [run]).request_rate for endpoint in "ef"]
    assert rates == [pytest.approx(10), pytest.approx(1)]


def test_different_targets_are_not_mixed(xeroctl):
    runs = [saved_run(xeroctl, [request(xeroctl, run=run)], run=run, slo=slo)
            for run, slo in (("r", None), ("s", {"ttft_ms": 10, "tpot_ms": None}))]
    for order in runs, runs[::-1]:
        both = xeroctl.BenchSet("e", "c=1", order)
        result = both.result()
        assert result["slo"] is None and "targets" in "".join(both.notes(result))
    assert xeroctl.BenchSet("e", "c=1", runs[1:]).result()["slo"]["met"] == 0


def test_a_run_is_counted_once(run, xeroctl, tmp_path):
    path = tmp_path / "saved"
    path.write_text(xeroctl.save_lines(saved_run(xeroctl, [request(xeroctl)])))
    done = run("bench", "--report", str(path), str(path), "-o", "json")
    assert json.loads(done.stdout.decode())["results"][0]["requests"] == 1
    assert b"given twice" in done.stderr


@pytest.mark.parametrize("condition", ["tpot.p95>1", "slo<95%"])
def test_a_condition_on_a_figure_that_is_missing_is_told(run, xeroctl, tmp_path, condition):
    path = tmp_path / "saved"
    path.write_text(xeroctl.save_lines(saved_run(xeroctl, [request(xeroctl)])))
    done = run("bench", "--report", str(path), "--fail-if", condition)
    assert (done.status, condition.encode() in done.stderr) == (0, True)


def test_close_rates_are_different_loads(bench):
    rows = bench("blue", "--rate", "50.00001,50.00002", "--requests", "2", "-o", "json").document["results"]
    assert [row["load"] for row in rows] == ["rate=50.00001", "rate=50.00002"]


def test_a_comparison_fits_80_columns_and_has_no_percents_of_nothing(xeroctl):
    rows = [(request(xeroctl, gaps=[0] * 9), "e"), (request(xeroctl, ttft=150, gaps=[10] * 9, endpoint="f" * 30), "f" * 30)]
    slow, fast = (xeroctl.BenchSet(name, "c=1", [saved_run(xeroctl, [one])]) for one, name in rows)
    lines = xeroctl.comparison_lines(fast, slow)
    assert "TTFT p50 +50 %" in " ".join(" ".join(lines).split()) and "TPOT" not in "".join(lines)
    assert max(map(len, xeroctl.comparison_lines(slow, fast) + lines)) <= 80


def test_no_seed_is_sent_unasked(bench, endpoint):
    bench("blue", "--requests", "1", "--warmup", "0")
    bench("blue", "--requests", "1", "--warmup", "0", "--param", "seed=7")
    assert [entry["body"].get("seed") for entry in endpoint.log()[-2:]] == [None, 7]


def test_an_interrupt_while_the_last_ones_end_leaves_the_window(start, endpoint):
    """Streams of 50 s; the window of 0.5 s is over when the interrupt comes."""
    before = len(endpoint.log())
    child = start("bench", "-e", "long", "--base-url", endpoint.url, "--duration", "0.5", "--rate", "20", "--warmup", "0",
                  "--max-tokens", "1000", "-o", "json")
    wait_until(lambda: len([entry for entry in endpoint.log()[before:] if len(entry["gaps"]) > 20]) > 3)
    child.signal(signal.SIGINT)
    document = json.loads(child.finish().stdout.decode())
    assert document["interrupted"] and document["results"][0]["seconds"] < 0.6


def test_a_run_that_is_stopped_says_so(bench):
    done = bench("bad", "--warmup", "0", "--concurrency", "30,2")
    assert b"20 failures in a row" in done.stderr


def test_a_request_without_text_meets_no_target(xeroctl):
    """A tool call alone: no time of a first token is known."""
    slo = {"ttft_ms": 200, "tpot_ms": None}
    run = saved_run(xeroctl, [request(xeroctl), request(xeroctl, ttft=None, tokens=20)], slo=slo)
    assert xeroctl.BenchSet("e", "c=1", [run]).result()["slo"] == {**slo, "met": 1, "of": 2}


@pytest.mark.parametrize("error, tokens, exact", [("server", 0, True), ("unfinished", 5, False)])
def test_only_counted_chunks_are_marked_where_nothing_ended_well(xeroctl, error, tokens, exact):
    one = request(xeroctl, error=error, tokens=tokens)._replace(exact=False)
    assert xeroctl.BenchSet("e", "c=1", [saved_run(xeroctl, [one])]).result()["exact"] is exact


def test_figures_from_chunks_are_marked(xeroctl):
    """Where output tokens are not told, in the table and in the details."""
    told, untold = request(xeroctl, gaps=[10] * 5), request(xeroctl, gaps=[10] * 5)._replace(exact=False)
    for one, tpot, rate in (told, " 10.0 ", " 6.0 "), (untold, " ~10.0 ", " ~6.0 "):
        result = xeroctl.BenchSet("e", "c=1", [saved_run(xeroctl, [one])]).result()
        row = xeroctl.report_table([result], False)[-1]
        assert row.count(tpot) == 2 and rate in row
        detail = [line for line in xeroctl.detail_lines(result) if line.startswith("TPOT")]
        assert detail[0].count(tpot.strip()) == 6


@pytest.mark.parametrize("text, metric, sign, limit", [
    ("ttft.p95>800", "ttft.p95", ">", 800), ("errors>1%", "errors%", ">", 1), ("slo<95%", "slo%", "<", 95), ("slo<5", "slo", "<", 5),
    ("tok/s<200", "tok/s", "<", 200), ("lag.p99>5", "lag.p99", ">", 5), (" e2e.mean >= 1.5 ", "e2e.mean", ">=", 1.5),
])
def test_parse_condition(xeroctl, text, metric, sign, limit):
    assert xeroctl.parse_condition(text) == (text, metric, sign, limit)


@pytest.mark.parametrize("text", ["", "ttft", "ttft>1", "ttft.p95=1", "ttft.p96>1", "lag.p95>1", "tok/s>1%", "x.p95>1", "ttft.p95>x", "errors>-1"])
def test_no_condition(xeroctl, text):
    with pytest.raises(argparse.ArgumentTypeError):
        xeroctl.parse_condition(text)


@pytest.mark.parametrize("text, holds", [
    ("ttft.p50>99", True), ("ttft.p50>100", False), ("ttft.p50>=100", True), ("ttft.p50<100", False), ("ttft.p50<=100", True),
    ("itl.p50>0", False), ("errors>0", True), ("errors>49%", True), ("errors>50%", False), ("slo<50%", False), ("slo<=50%", True),
    ("slo<2", True), ("lag.p99>=1", True), ("lag.p99>1", False),
])
def test_condition_holds(xeroctl, text, holds):
    requests = [request(xeroctl), request(xeroctl, error="server (HTTP 500)", ttft=None), request(xeroctl, error="unfinished")]
    runs = [saved_run(xeroctl, requests, slo={"ttft_ms": 100, "tpot_ms": None})]
    document = xeroctl.build_bench_document([xeroctl.BenchSet("e", "c=1", runs)], [xeroctl.parse_condition(text)], False)
    assert document["failed_conditions"] == ([text] if holds else [])


@pytest.mark.parametrize("gaps, tokens, tpot", [
    ([10] * 9, 10, 10), ([40] * 4, 20, 10), ([], 1, None), ([], 5, None), ([10, 10], 0, None), ([0, 30], 3, 15),
])
def test_time_per_output_token(xeroctl, gaps, tokens, tpot):
    assert request(xeroctl, gaps=gaps, tokens=tokens).tpot_ms == tpot


@pytest.mark.parametrize("cases, window, tokens, requests", [
    ([dict(start=0, ttft=100, gaps=[100] * 9)], (0, 1000), 10, 1),
    ([dict(start=0, ttft=100, gaps=[100] * 9)], (550, 1050), 10, 0.9),
    ([dict(start=0, ttft=100, gaps=[100] * 9, tokens=40)], (0, 500), 40, 1),
    ([dict(start=0, ttft=100, gaps=[100] * 9, error="server")], (0, 1000), 0, 0),
    ([dict(start=0, ttft=100, gaps=[100] * 4, error="unfinished")], (0, 500), 20, 1),
    ([dict(start=0, ttft=None, error="unfinished")], (0, 500), 0, 0),
])
def test_window_rates(xeroctl, cases, window, tokens, requests):
    rates = xeroctl.window_rates([request(xeroctl, **case) for case in cases], *window, 2, 1000)
    assert rates == pytest.approx((tokens, requests))


@pytest.mark.parametrize("window, wanted", [((100, 500), (100, 500)), ((500, 400), (0, 850)), ((500, 500), (0, 850))])
def test_run_window(xeroctl, window, wanted):
    requests = [request(xeroctl, start=start, ttft=100, gaps=[50]) for start in (0, 350, 700)]
    assert xeroctl.run_window(saved_run(xeroctl, requests, window), requests) == wanted


@pytest.mark.parametrize("spans, merged", [
    ([], (None, None, 0, 0)),
    ([(0, 10, 100, 1)], (100, 1, 10, 1)),
    ([(0, 10, 100, 1), (0, 10, 50, 2)], (150, 3, 10, 1)),
    ([(0, 10, 100, 1), (5, 15, 50, 2)], (150, 3, 10, 1)),
    ([(0, 10, 100, 1), (6, 16, 50, 2)], (75, 1.5, 20, 2)),
    ([(0, 10, 100, 1), (20, 30, 50, 2), (1, 9, 10, 1)], (80, 2, 20, 2)),
])
def test_merge_rates(xeroctl, spans, merged):
    assert xeroctl.merge_rates(spans) == merged


def test_rates_of_two_processes_are_summed(xeroctl):
    runs = []
    for name, lag in (("a", 1), ("b", 7)):
        requests = [request(xeroctl, start=100 * n, ttft=50, gaps=[10] * 5, run=name) for n in range(10)]
        runs.append(saved_run(xeroctl, requests, began=1000, run=name, lag=lag))
    document = xeroctl.build_bench_document([xeroctl.BenchSet("e", "c=1", runs)], [], False)
    result, = document["results"]
    assert (result["output_tokens_per_second"], result["requests_per_second"], result["seconds"]) == pytest.approx((120, 20, 1))
    assert document["client"] == {"lag_ms": {"p50": 0, "p99": 7, "max": 7}, "trusted": False}


@pytest.mark.parametrize("arrivals, gaps", [
    ([], []), ([(1, 1)], []), ([(1, 3)], [0, 0]), ([(1, 1), (1.001234567, 1)], [1.235]), ([(1, 1), (1.5, 2), (2, 1)], [500, 0, 500]),
])
def test_gaps_between(xeroctl, arrivals, gaps):
    assert xeroctl.gaps_between(arrivals) == gaps


def test_a_saved_run_is_read_back(xeroctl):
    run = saved_run(xeroctl, [request(xeroctl, gaps=[1.235, 2]), request(xeroctl, ttft=None, error="network")])
    text = xeroctl.save_lines(run)
    back, = xeroctl.parse_saved_runs(text + '{"run": "half', "f")
    assert back._replace(requests=[]) == run._replace(requests=[])
    assert [one.itl_ms for one in back.requests] == [[1.235, 2], []]
    for wrong in ("x\n", "{}\n", "[]\n", text.split("\n", 1)[1]):
        with pytest.raises(xeroctl.UsageError):
            xeroctl.parse_saved_runs(wrong, "f")


@pytest.mark.parametrize("count", [5, 500])
def test_compare_medians(xeroctl, count):
    chance = random.Random(1)
    values, others = [[chance.gauss(middle, 5) for _ in range(count)] for middle in (150, 100)]
    started = time.process_time()
    change, low, high = xeroctl.compare_medians(values, others, random.Random(0))
    assert time.process_time() - started < 5
    assert low <= change <= high
    assert 30 < low < 50 < high < 70 or count == 500
    assert high - low < 5 or count == 5
    assert (change, low, high) == xeroctl.compare_medians(values, others, random.Random(0))


def test_bootstrap_is_what_resampling_gives(xeroctl):
    chance = random.Random(2)
    values, others = [sorted(chance.gauss(middle, 20) for _ in range(41)) for middle in (150, 100)]
    changes = sorted(100 * (sorted(chance.choices(values, k=41))[20] / sorted(chance.choices(others, k=41))[20] - 1) for _ in range(4000))
    change, low, high = xeroctl.compare_medians(values, others, random.Random(0))
    assert low == pytest.approx(changes[100], abs=3)
    assert high == pytest.approx(changes[3900], abs=3)


@pytest.mark.parametrize("values, line", [
    ([100, 110], "TTFT: 100 ms |█                 █| 110 ms"),
    ([100, 100, 100], "TTFT: 100 ms |█                  | 100 ms"),
    ([0, 0, 0, 0, 0, 0, 0, 0, 9], "TTFT: 0 ms |█                    ▁| 9 ms"),
])
def test_histogram_line(xeroctl, values, line):
    assert xeroctl.histogram_line(values, " ▁▂▃▄▅▆▇█", len(line)) == line


@pytest.mark.parametrize("value, decimals, columns, text", [
    (1.25, 1, 7, "    1.2"), (12345.67, 1, 7, "12345.7"[:0] + "  12346"), (None, 1, 7, "      -"), (1463.21, 1, 7, " 1463.2"),
])
def test_format_number(xeroctl, value, decimals, columns, text):
    assert xeroctl.format_number(value, decimals, columns) == text


def test_wide_tables_stay_within_80_columns(xeroctl):
    runs, sets = [], []
    for name, load in (("a" * 60, "rate=1234.5"), ("宽" * 40, "c=10000")):
        requests = [request(xeroctl, ttft=123456.7, gaps=[99999.9] * 3, tokens=10 ** 9, endpoint=name, load=load)]
        runs.append(saved_run(xeroctl, requests, window=(0, 10 ** 6), slo={"ttft_ms": 1, "tpot_ms": None}, load=load))
        sets.append(xeroctl.BenchSet(name, load, runs))
    lines = xeroctl.report_table([one.result() for one in sets], False)
    assert all(xeroctl.display_width(line) <= 80 for line in lines)
