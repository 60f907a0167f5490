"""Conversations on disk: what a chat keeps, what takes it up again, and what leaves a file alone."""

import fcntl
import json
import os
import re
import stat

import pytest

from loopback import DONE, Call, chunk, stream, stream_head
from test_interactive import NEW, PROMPT, TURN, answer, end, enter, failure, kept, leave, said
from test_interactive import pipe, state, talk  # noqa: F401 (fixtures)


def read(path):
    with open(str(path)) as file:
        return json.load(file)


def pairs(path):
    return [(message["role"], message["content"]) for message in read(path)["messages"]]


def keep(state, name, messages=TURN, **fields):
    """Write a conversation into the state folder as an earlier chat has, and return its path."""
    folder = os.path.join(state, "conversations")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    document = {"format": "xeroctl-conversation", "version": 1, "endpoint": "my-endpoint", "model": None,
                "saved_at": "2026-01-02T03:04:05Z", **fields,
                "messages": [{"role": role, "content": content} for role, content in messages]}
    with open(path, "w") as file:
        json.dump(document, file)
    os.utime(path, (len(os.listdir(folder)), len(os.listdir(folder))))
    return path


@pytest.fixture
def once(run, server):
    """Ask a single question; return the status, stdout and the lines of stderr."""
    def once(*more, endpoint=("--endpoint", "my-endpoint"), **how):
        result = run("chat", *endpoint, "--base-url", server.url + "/v1", "--retries", "0", *more, **how)
        return result.status, result.stdout.decode(), result.stderr.decode().splitlines()
    return once


# -- Kept after each turn --------------------------------------------


@pytest.mark.smoke
def test_a_chat_is_on_disk_after_each_turn(talk, server, state):
    server.script(answer("eins"), answer("zwei"))
    child = talk("--system", "be short")
    assert kept(state) == []
    enter(child, "one")
    [path] = kept(state)
    assert re.match(r"\d{8}T\d{6}Z-%d\.json\Z" % child.process.pid, os.path.basename(path))
    assert pairs(path) == [("system", "be short")] + TURN
    assert (read(path)["format"], read(path)["endpoint"], read(path)["model"]) == (
        "xeroctl-conversation", "my-endpoint", "test-model")
    assert [stat.S_IMODE(os.stat(name).st_mode) for name in (path, os.path.dirname(path))] == [0o600, 0o700]
    enter(child, "two")
    assert pairs(path)[3:] == [("user", "two"), ("assistant", "zwei")]
    leave(child)
    assert kept(state) == [path]


def test_the_first_chat_that_keeps_one_says_so(talk, server):
    server.always(answer())
    for count in (1, 0):
        child = talk()
        enter(child, "one")
        enter(child, "two")
        leave(child)
        assert child.output.count(b"--no-history keeps none") == count


@pytest.mark.parametrize("how", [("--no-history",), {"XEROTIER_NO_HISTORY": "1"}], ids=["option", "variable"])
def test_nothing_is_kept_where_that_is_wanted(talk, server, state, how):
    server.always(answer())
    child = talk(env=how) if isinstance(how, dict) else talk(*how)
    enter(child, "one")
    leave(child)
    assert not os.path.exists(state)
    assert b"to continue" not in child.output


def test_a_piped_chat_keeps_nothing_of_its_own_accord(pipe, server, state):
    server.always(answer())
    assert pipe("one\ntwo\n")[0] == 0
    assert not os.path.exists(state)


def test_a_question_without_an_answer_is_on_disk_too(talk, server, state):
    server.script(answer("eins"), failure())
    child = talk()
    enter(child, "one")
    enter(child, "two")
    leave(child)
    assert pairs(kept(state)[0]) == TURN + NEW


@pytest.mark.parametrize("line, left", [("/undo", []), ("/drop", []), ("/system be kind", [("system", "be kind")] + TURN)])
def test_a_change_is_on_disk_at_once(talk, server, state, line, left):
    server.always(answer("eins"))
    child = talk()
    enter(child, "one")
    enter(child, line)
    end(child, "SIGTERM")
    assert pairs(kept(state)[0]) == left


@pytest.mark.parametrize("line", ["/clear", "/load old.json"])
def test_clear_and_load_end_a_conversation_and_begin_a_new_file(talk, server, state, tmp_path, line):
    (tmp_path / "old.json").write_text("[]")
    server.script(answer("eins"), answer("zwei"))
    child = talk(cwd=str(tmp_path))
    enter(child, "one")
    enter(child, line)
    assert len(kept(state)) == 1
    enter(child, "two")
    leave(child)
    assert sorted(map(pairs, kept(state))) == [TURN, NEW + [("assistant", "zwei")]]
    assert (tmp_path / "old.json").read_text() == "[]"


def test_the_newest_fifty_are_kept(talk, server, state):
    names = [f"20260102T0304{number:02}Z-1.json" for number in range(60)]
    for name in names:
        keep(state, name)
    server.script(answer())
    child = talk()
    enter(child, "one")
    leave(child)
    left = [os.path.basename(path) for path in kept(state)]
    assert (len(left), left[:-1]) == (50, names[-49:])


def test_a_history_whose_lock_another_holds_is_written_without_and_that_is_said_once(talk, server, state):
    server.always(answer())
    os.makedirs(state)
    descriptor = os.open(state, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    child = talk()
    for line in ("one", "two"):
        enter(child, line)
    leave(child)
    os.close(descriptor)
    assert child.output.count(b"holds the lock") == 1
    with open(os.path.join(state, "history")) as file:
        assert file.read() == '"one"\n"two"\n"/quit"\n'


# -- Continued -------------------------------------------------------


@pytest.mark.smoke
def test_continue_takes_up_the_newest_with_its_endpoint_and_model(terminal, server, state):
    server.always(answer("zwei"))
    keep(state, "20260102T030405Z-1.json", [("user", "old"), ("assistant", "alt")])
    keep(state, "20260102T030406Z-999999999.json", endpoint="its-endpoint", model="its-model")
    child = terminal("chat", "-c", "--base-url", server.url + "/v1", env={"XEROTIER_ENDPOINT": "not-this"})
    child.expect(PROMPT)
    enter(child, "two")
    leave(child)
    assert said(server, 1) == TURN + NEW
    assert (server.requests[0].target, server.requests[0].json["model"]) == (
        "/its-endpoint/v1/chat/completions", "its-model")
    assert len(kept(state)) == 2
    assert pairs(kept(state)[1]) == TURN + NEW + [("assistant", "zwei")]


def test_another_endpoint_or_model_given_counts(once, server, state):
    keep(state, "20260102T030405Z-999999999.json", endpoint="its-endpoint", model="its-model")
    server.always(answer("zwei"))
    assert once("-c", "-m", "two", "--model", "m", endpoint=())[0] == 0
    assert once("-c", "-m", "two", endpoint=("-e", "mine"))[0] == 0
    assert [(request.target.split("/")[1], request.json["model"]) for request in server.requests] == [
        ("its-endpoint", "m"), ("mine", "mine")]


def test_a_single_question_continues_too(once, server, state):
    server.script(answer("zwei"), answer("drei"))
    keep(state, "20260102T030405Z-999999999.json")
    assert once("-c", "-m", "two")[:2] == (0, "zwei\n")
    assert once("--continue", stdin=b"three")[:2] == (0, "drei\n")
    assert said(server, 2) == TURN + NEW + [("assistant", "zwei"), ("user", "three")]
    assert pairs(kept(state)[0]) == said(server, 2) + [("assistant", "drei")]


def test_a_single_question_of_its_own_keeps_nothing(once, server, state):
    server.script(answer())
    assert once("-m", "one")[0] == 0
    assert not os.path.exists(state)


def test_there_may_be_nothing_to_continue(once):
    status, out, lines = once("-c", "-m", "two")
    assert (status, out, len(lines)) == (2, "", 1)
    assert "no conversation to continue" in lines[0]


def test_a_conversation_in_use_is_continued_as_a_copy(once, talk, server, state):
    server.script(answer("eins"), answer("zwei"), answer("drei"))
    child = talk()
    enter(child, "one")
    [path] = kept(state)
    status, _, lines = once("-c", "-m", "two")
    assert (status, "a copy is continued" in lines[0]) == (0, True)
    assert pairs(path) == TURN
    assert sorted(map(len, map(pairs, kept(state)))) == [2, 4]
    enter(child, "three")
    leave(child)
    assert pairs(path) == TURN + [("user", "three"), ("assistant", "drei")]


def test_system_given_again_replaces_the_system_message(once, server, state):
    keep(state, "20260102T030405Z-999999999.json", [("system", "old")] + TURN)
    server.script(answer("zwei"))
    assert once("-c", "-m", "two", "--system", "new")[0] == 0
    assert said(server, 1) == [("system", "new")] + TURN + NEW


def test_a_question_that_failed_is_asked_again_by_retry_in_the_next_chat(talk, server, state):
    keep(state, "20260102T030405Z-999999999.json", TURN + NEW)
    server.script(answer("zwei"))
    child = talk("-c")
    enter(child, "/retry")
    leave(child)
    assert said(server, 1) == TURN + NEW


def test_continued_without_a_history_nothing_is_written(once, server, state):
    path = keep(state, "20260102T030405Z-999999999.json")
    server.script(answer("zwei"))
    assert once("-c", "-m", "two", "--no-history")[0] == 0
    assert (kept(state), pairs(path), said(server, 1)) == ([path], TURN, TURN + NEW)


@pytest.mark.parametrize("more", [["-m", "two", "--dry-run"], ["-m", ""], ["-m", "two", "--context", "none"]], ids=" ".join)
def test_a_conversation_keeps_its_file_where_nothing_is_sent(once, server, state, more):
    path = keep(state, "20260102T030405Z-999999999.json")
    once("-c", *more)
    assert (kept(state), pairs(path), server.requests) == ([path], TURN, [])


# -- In a file of one's own ------------------------------------------


@pytest.mark.smoke
def test_a_conversation_is_kept_in_a_file(once, pipe, server, state, tmp_path):
    server.script(answer("eins"), answer("zwei"), answer("drei"))
    path = tmp_path / "c.json"
    assert once("--conversation", str(path), "-m", "one")[:2] == (0, "eins\n")
    assert pairs(path) == TURN
    assert stat.S_IMODE(os.stat(str(path)).st_mode) == 0o600
    assert pipe("two\n", "--conversation", str(path))[0] == 0
    assert once("--conversation", str(path), "-m", "three")[0] == 0
    assert said(server, 3) == TURN + NEW + [("assistant", "zwei"), ("user", "three")]
    assert not os.path.exists(state)


def test_clear_does_not_empty_the_file(talk, server, state, tmp_path):
    server.script(answer("eins"), answer("zwei"))
    path = tmp_path / "c.json"
    child = talk("--conversation", str(path))
    enter(child, "one")
    enter(child, "/clear")
    assert pairs(path) == TURN
    enter(child, "two")
    leave(child)
    assert pairs(path) == NEW + [("assistant", "zwei")]
    assert [pairs(name) for name in kept(state)] == [TURN]


def test_a_file_that_another_process_changed_is_left_alone(talk, server, state, tmp_path):
    server.script(answer("eins"), answer("zwei"), answer("drei"))
    path = tmp_path / "c.json"
    child = talk("--conversation", str(path), columns=200)
    enter(child, "one")
    path.write_text("other")
    assert any(f"another process changed {path}" in line for line in enter(child, "two", 200))
    enter(child, "three")
    leave(child)
    assert (path.read_text(), child.output.count(b"another process changed")) == ("other", 1)
    assert [len(pairs(name)) for name in kept(state)] == [6]


CHANGED = "another process changed c.json: the conversation is "


@pytest.mark.parametrize("change", ["write", "pipe"])
@pytest.mark.parametrize("piped", [False, True], ids=["single", "piped"])
def test_a_question_whose_file_is_changed_meanwhile_is_kept_in_the_state_folder(
        once, pipe, server, state, tmp_path, piped, change):
    path = tmp_path / "c.json"

    def replace(sock):
        path.unlink()
        if change == "pipe":
            os.mkfifo(str(path))
        else:
            path.write_text("other")

    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in TURN]}))
    server.script([Call(replace), answer("zwei")])
    options = ["--conversation", "c.json"]
    ask = pipe("two\n", *options, cwd=str(tmp_path)) if piped else once(*options, "-m", "two", cwd=str(tmp_path))
    assert (ask[:2], path.is_file()) == ((0, "zwei\n"), change == "write")
    assert f"xeroctl: warning: {CHANGED}kept in the state folder from here on" in ask[2]
    assert [pairs(name) for name in kept(state)] == [TURN + NEW + [("assistant", "zwei")]]


def test_without_a_history_a_conversation_whose_file_is_changed_is_lost(once, server, state, tmp_path):
    server.script([Call(lambda sock: (tmp_path / "c.json").write_text("other")), answer("eins")])
    status, _, lines = once("--conversation", "c.json", "--no-history", "-m", "one", cwd=str(tmp_path))
    assert (status, lines[-1]) == (0, f"xeroctl: warning: {CHANGED}not kept and will be lost")
    assert not os.path.exists(state)


def test_a_save_to_the_conversations_own_file_is_one_of_its_saves(pipe, server, state, tmp_path):
    server.script(answer("eins"), answer("zwei"))
    (tmp_path / "link.json").symlink_to("c.json")
    status, _, lines = pipe("/save link.json\none\n/save c.json\ntwo\n/save\n", "--conversation", "c.json", cwd=str(tmp_path))
    assert (status, lines[0], lines[-2]) == (0, "saved 0 messages to link.json", "saved 4 messages to c.json")
    assert (len(pairs(tmp_path / "c.json")), kept(state)) == (4, [])


def test_a_save_to_the_conversations_own_file_does_not_ask(talk, server, tmp_path):
    server.script(answer("eins"), answer("zwei"), answer("drei"))
    child = talk("--conversation", "c.json", cwd=str(tmp_path), columns=200)
    enter(child, "one")
    assert enter(child, "/save c.json") == ["saved 2 messages to c.json"]
    enter(child, "two")
    (tmp_path / "c.json").write_text("other")
    assert "another process changed c.json" in enter(child, "/save", 200)[-1]
    leave(child)
    assert (tmp_path / "c.json").read_text() == "other"


def test_a_conversation_whose_lock_another_holds_is_written_without_and_that_is_said_once(talk, server, tmp_path):
    server.always(answer())
    path = tmp_path / "c" / "c.json"
    path.parent.mkdir()
    descriptor = os.open(str(path.parent), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    child = talk("--conversation", str(path))
    for line in ("one", "two"):
        enter(child, line)
    leave(child)
    os.close(descriptor)
    assert (child.output.count(b"holds the lock"), len(pairs(path))) == (1, 4)


@pytest.mark.parametrize("content", ["", "hello", "{}", '[{"content": "x"}]'], ids=repr)
def test_a_file_that_is_no_conversation_is_refused_before_anything_is_sent(once, server, tmp_path, content):
    (tmp_path / "c.json").write_text(content)
    status, out, lines = once("--conversation", str(tmp_path / "c.json"), "-m", "one")
    assert (status, out, len(lines), server.requests) == (2, "", 1, [])
    assert (tmp_path / "c.json").read_text() == content


@pytest.mark.parametrize("path", ["missing/c.json", "/dev/null", "."])
def test_a_place_for_no_file_is_refused_before_anything_is_sent(once, server, tmp_path, path):
    status, out, lines = once("--conversation", path, "-m", "one", cwd=str(tmp_path))
    assert (status, out, len(lines), server.requests) == (2, "", 1, [])


@pytest.mark.parametrize("script", [failure(), [stream_head()]], ids=["failed", "nothing came"])
def test_a_failure_leaves_the_file_as_it_was_but_for_the_question(pipe, server, tmp_path, script):
    path = tmp_path / "c.json"
    server.script(answer("eins"), script)
    pipe("one\ntwo\n", "--conversation", str(path))
    assert pairs(path) == TURN + NEW


def test_a_tool_call_joins_no_conversation_and_retry_holds_the_question(talk, server, state):
    call = {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    server.script(answer("eins"), stream(chunk(delta=call), chunk(finish="tool_calls"), DONE), answer("zwei"))
    child = talk()
    enter(child, "one")
    assert any("tool" in line for line in enter(child, "two"))
    assert pairs(kept(state)[0]) == TURN + NEW
    enter(child, "/retry")
    leave(child)
    assert said(server, 3) == TURN + NEW


# -- /load and /save -------------------------------------------------


def test_load_alone_lists_the_last_ten_and_a_number_takes_one(talk, server, state):
    for number in range(12):
        keep(state, f"20260102T0304{number:02}Z-1.json", [("user", f"question {number}"), ("assistant", "a")])
    server.script(answer())
    child = talk(columns=100)
    lines = enter(child, "/load", 100)
    assert (len(lines), [line.split()[0] for line in lines]) == (10, [str(number) for number in range(1, 11)])
    assert "question 11" in lines[0] and "2 messages" in lines[0] and "question 2" in lines[9]
    assert enter(child, "/load 3", 100)[0].startswith("loaded 2 messages from ")
    enter(child, "one")
    assert "no conversation 11" in enter(child, "/load 11", 100)[0]
    leave(child)
    assert said(server, 1) == [("user", "question 9"), ("assistant", "a"), ("user", "one")]


def test_save_without_a_name_saves_where_it_was_saved_or_loaded(talk, server, tmp_path):
    server.script(answer("eins"), answer("zwei"), answer("drei"))
    child = talk(cwd=str(tmp_path))
    enter(child, "one")
    assert enter(child, "/save")[0].startswith("xeroctl: error: ")
    enter(child, "/save a.json")
    enter(child, "two")
    assert enter(child, "/save") == ["saved 4 messages to a.json"]
    enter(child, "/load a.json")
    enter(child, "three")
    assert enter(child, "/save") == ["saved 6 messages to a.json"]
    leave(child)
    assert len(pairs(tmp_path / "a.json")) == 6


@pytest.mark.parametrize("reply, saved", [("y", 2), ("", 0), ("n", 0), ("\x04", 0)])
def test_save_asks_before_it_writes_over_another_conversation(talk, server, tmp_path, reply, saved):
    server.script(answer("eins"))
    (tmp_path / "a.json").write_text(json.dumps({"format": "xeroctl-conversation", "version": 1, "messages": []}))
    child = talk(cwd=str(tmp_path))
    enter(child, "one")
    child.send("/save a.json\r")
    child.expect("Write over it")
    child.send(reply + "\r" * (reply != "\x04"))
    child.expect(PROMPT)
    leave(child)
    assert len(pairs(tmp_path / "a.json")) == saved


def test_save_over_another_conversation_is_refused_where_nobody_can_be_asked(pipe, server, tmp_path):
    server.script(answer("eins"))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"format": "xeroctl-conversation", "version": 1, "messages": []}))
    status, _, lines = pipe(f"one\n/save {path}\n")
    assert (status, len(pairs(path))) == (2, 0)
    assert any("holds another conversation" in line for line in lines)
