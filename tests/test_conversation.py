"""The messages of a chat and their saved document, the status bar, completion, the history file, private files."""

import contextlib
import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from conftest import XEROCTL

TWO_TURNS = [
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "eins"},
    {"role": "user", "content": "two"}, {"role": "assistant", "content": "zwei"},
]
SYSTEM = {"role": "system", "content": "be short"}
OPEN = {"role": "user", "content": "three?"}


def mode(path):
    return stat.S_IMODE(os.stat(str(path)).st_mode)


# -- Messages --------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "c", "name": "f", "content": "17"}


@pytest.mark.smoke
def test_a_system_message_is_set_replaced_and_taken_away(xeroctl):
    conversation = xeroctl.Conversation(TWO_TURNS)
    assert conversation.system is None
    conversation.set_system("be short")
    assert (conversation.system, conversation.messages) == ("be short", [SYSTEM] + TWO_TURNS)
    conversation.set_system("be kind")
    assert conversation.messages == [{"role": "system", "content": "be kind"}] + TWO_TURNS
    for text in ("", None):
        conversation.set_system(text)
        assert (conversation.system, conversation.messages) == (None, TWO_TURNS)


def test_a_developer_message_that_is_replaced_keeps_its_role_and_fields(xeroctl):
    conversation = xeroctl.Conversation([{"role": "developer", "name": "n", "content": "old"}])
    conversation.set_system("new")
    assert conversation.messages == [{"role": "developer", "name": "n", "content": "new"}]


def test_a_conversation_has_messages_of_its_own(xeroctl):
    messages = list(TWO_TURNS)
    conversation = xeroctl.Conversation(messages)
    messages.append(OPEN)
    assert (conversation.messages, xeroctl.Conversation().messages) == (TWO_TURNS, [])


@pytest.mark.parametrize("answer, messages, unanswered", [("drei", 2, False), ("", 0, True), (" \n", 0, True)])
def test_only_an_answer_makes_a_turn(xeroctl, answer, messages, unanswered):
    conversation = xeroctl.Conversation([SYSTEM] + TWO_TURNS)
    conversation.add_turn(OPEN, answer)
    assert (len(conversation.messages), conversation.unanswered) == (5 + messages, OPEN if unanswered else None)
    assert (conversation.count, conversation.all_messages()[5]) == (4 + (messages or 1), OPEN)


def test_the_last_question_is_the_one_without_an_answer_else_that_of_the_last_turn(xeroctl):
    conversation = xeroctl.Conversation([SYSTEM] + TWO_TURNS + [RESULT], OPEN)
    assert conversation.last_question() == (OPEN, [SYSTEM] + TWO_TURNS + [RESULT])
    assert conversation.undo() == OPEN
    assert conversation.last_question() == (TWO_TURNS[2], [SYSTEM] + TWO_TURNS[:2])
    assert [conversation.undo() for _ in range(3)] == [TWO_TURNS[2], TWO_TURNS[0], None]
    assert conversation.messages == [SYSTEM]


@pytest.mark.parametrize("count, dropped, left", [
    (1, 1, [SYSTEM] + TWO_TURNS[2:]), (2, 2, [SYSTEM]), (9, 2, [SYSTEM])])
def test_the_oldest_turns_are_dropped_and_system_messages_stay(xeroctl, count, dropped, left):
    conversation = xeroctl.Conversation([SYSTEM, dict(TWO_TURNS[1])] + TWO_TURNS, OPEN)
    assert (conversation.drop(count), conversation.messages, conversation.unanswered) == (dropped, left, OPEN)


def test_clear_leaves_the_system_message(xeroctl):
    conversation = xeroctl.Conversation([SYSTEM] + TWO_TURNS, OPEN)
    conversation.clear()
    assert (conversation.all_messages(), conversation.count) == ([SYSTEM], 0)


@pytest.mark.parametrize("message, text", [
    (TWO_TURNS[0], "one"), (CALL, '[tool calls: [{"id":"c","function":{"name":"f","arguments":"{}"}}]]'), (RESULT, "17"),
    ({"role": "user", "content": [{"type": "text", "text": "see"}, IMAGE]}, "see\n[image_url]"),
    ({"role": "user", "content": [{"text": "see"}, {}]}, "see\n[part of unknown type]"),
    ({"role": "assistant", "content": None, "refusal": "no"}, "no"),
])
def test_all_of_a_message_can_be_shown(xeroctl, message, text):
    assert xeroctl.message_text(message) == text


# -- Saved documents -------------------------------------------------


def test_the_saved_document_is_readable_json_and_names_its_form(xeroctl):
    conversation = xeroctl.Conversation([SYSTEM])
    conversation.add_turn(TWO_TURNS[0], "é 日本 😀")
    text = xeroctl.conversation_json(conversation, "my-endpoint", "llama-3", "2026-01-02T03:04:05Z")
    assert json.loads(text) == {
        "format": "xeroctl-conversation", "version": 1, "endpoint": "my-endpoint", "model": "llama-3",
        "saved_at": "2026-01-02T03:04:05Z",
        "messages": [SYSTEM, TWO_TURNS[0], {"role": "assistant", "content": "é 日本 😀"}],
    }
    assert text.endswith("}\n") and "é 日本 😀" in text


ODD = [{"role": "user", "content": "line\nline\n\n\\ \"quoted\""},
       {"role": "assistant", "content": "\ttab \u2028 \x1b[31m \x00 😀"}]


@pytest.mark.parametrize("messages, unanswered", [
    ([], None), ([SYSTEM], None), (TWO_TURNS, None), ([SYSTEM] + TWO_TURNS, OPEN), (ODD, None),
    ([dict(TWO_TURNS[0], content=[{"type": "text", "text": "see"}, IMAGE]), CALL, RESULT, TWO_TURNS[1]], None),
], ids=["nothing", "system", "turns", "a question", "odd characters", "parts and tools"])
def test_what_is_saved_can_be_loaded(xeroctl, messages, unanswered):
    saved = xeroctl.Conversation(messages, unanswered)
    text = xeroctl.conversation_json(saved, "e", None, "2026-01-02T03:04:05Z")
    conversation, endpoint, model, _ = xeroctl.parse_conversation(text)
    assert (conversation.messages, conversation.unanswered, endpoint, model) == (messages, unanswered, "e", None)


SAVED = {"format": "xeroctl-conversation", "version": 1, "endpoint": "e", "model": "m", "saved_at": "2026"}
PARTS = [{"type": "text", "text": "o"}, {"type": "text", "text": "ne"}]


@pytest.mark.parametrize("document, messages, unanswered", [
    (dict(SAVED, messages=[SYSTEM] + TWO_TURNS), [SYSTEM] + TWO_TURNS, None),
    (dict(SAVED, messages=TWO_TURNS, added_later=[1]), TWO_TURNS, None),
    ({"model": "gpt", "messages": TWO_TURNS, "stream": True}, TWO_TURNS, None),
    ({"object": "list", "data": TWO_TURNS}, TWO_TURNS, None),
    (TWO_TURNS + [OPEN], TWO_TURNS, OPEN),
    ([SYSTEM, OPEN], [SYSTEM], OPEN),
    ([OPEN], [], OPEN),
    ([], [], None),
], ids=["saved", "saved with more fields", "messages", "data", "no last answer", "system and a question",
        "a question", "empty"])
def test_each_form_of_conversation_is_read(xeroctl, document, messages, unanswered):
    conversation, _, _, notes = xeroctl.parse_conversation(json.dumps(document))
    assert (conversation.messages, conversation.unanswered, notes) == (messages, unanswered, [])


@pytest.mark.parametrize("messages", [
    [{"role": "developer", "content": "be short"}] + TWO_TURNS,
    [dict(TWO_TURNS[0], content=PARTS)] + TWO_TURNS[1:],
    [dict(message, id="msg_1", name=None) for message in TWO_TURNS],
    [{"role": "system", "content": " "}] + TWO_TURNS,
    [dict(TWO_TURNS[0], content=[{"type": "text", "text": "x"}, IMAGE])] + TWO_TURNS[1:],
    [SYSTEM],
    TWO_TURNS[:1] + [{"role": "assistant", "content": ""}],
], ids=["developer first", "text parts", "more fields", "a blank", "an image", "system alone", "an empty answer"])
def test_messages_are_kept_as_they_are(xeroctl, messages):
    conversation, _, _, notes = xeroctl.parse_conversation(json.dumps(messages))
    assert (conversation.messages, notes) == (messages, [])


@pytest.mark.parametrize("messages, note", [
    (TWO_TURNS[1:], "messages[0]: the role is 'assistant' where 'user' is usual"),
    ([SYSTEM] + TWO_TURNS[1:], "messages[1]: the role is 'assistant' where 'user' is usual"),
    (TWO_TURNS[:1] + TWO_TURNS[2:], "messages[1]: the role is 'user' where 'assistant' is usual"),
    (TWO_TURNS[:2] + TWO_TURNS[1:], "messages[2]: the role is 'assistant' where 'user' is usual"),
    ([SYSTEM, SYSTEM], "messages[1]: the role is 'system' where 'user' is usual"),
    (TWO_TURNS + [SYSTEM], "messages[4]: the role is 'system' where 'user' is usual"),
    (TWO_TURNS[:1] + [CALL, RESULT] + TWO_TURNS[1:], "messages[2]: the role is 'tool' where 'user' is usual"),
], ids=["greeting", "greeting after system", "two questions", "two answers", "two systems", "system last", "tools"])
def test_what_people_have_is_taken_with_a_note(xeroctl, messages, note):
    conversation, _, _, notes = xeroctl.parse_conversation(json.dumps(messages))
    assert (conversation.all_messages(), notes) == (messages, [note + ": all is kept and sent as it is"])


@pytest.mark.parametrize("document, sentence", [
    (dict(SAVED, version=2, messages=[]), "not format 'xeroctl-conversation', version 1"),
    (dict(SAVED, version="1", messages=[]), "not format 'xeroctl-conversation', version 1"),
    (dict(SAVED, format="other", messages=[]), "not format 'xeroctl-conversation', version 1"),
    (dict(SAVED), "no list of messages in it"),
    ({}, "no list of messages in it"),
    ({"messages": {"role": "user", "content": "one"}}, "no list of messages in it"),
    ({"messages": "one"}, "no list of messages in it"),
    ("one", "no list of messages in it"),
    (17, "no list of messages in it"),
    (None, "no list of messages in it"),
    ([{"content": "one"}], "messages[0]: no message: it has no role"),
    ([{"role": ["user"], "content": "one"}], "messages[0]: no message: it has no role"),
    (TWO_TURNS + [{"role": "user"}], "messages[4]: no text in it"),
    ([{"role": "user", "content": None}], "messages[0]: no text in it"),
    ([{"role": "user", "content": 17}], "messages[0]: no text in it"),
    ([{"role": "user", "content": ["x"]}], "messages[0]: no text in it"),
    (TWO_TURNS[:2] + ["two"], "messages[2]: no message: it has no role"),
    ([None], "messages[0]: no message: it has no role"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_conversation_is_refused_with_what_is_wrong_and_where(xeroctl, document, sentence):
    with pytest.raises(xeroctl.UsageError) as caught:
        xeroctl.parse_conversation(json.dumps(document))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("text, sentence", [
    ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    ("hello", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    ('[\n{"role":\n]', "not JSON: Expecting value: line 3 column 1 (char 11)"),
    ("[] []", "not JSON: Extra data: line 1 column 4 (char 3)"),
    ("[" * 200000, "not JSON: nested too deeply"),
], ids=["empty", "text", "broken", "two", "deep"])
def test_what_is_not_json_is_refused_with_the_place(xeroctl, text, sentence):
    with pytest.raises(xeroctl.UsageError) as caught:
        xeroctl.parse_conversation(text)
    assert str(caught.value) == sentence


# -- The status bar --------------------------------------------------


@pytest.mark.parametrize("model, totals, messages, expected", [
    ("llama-3", (148, 532, True), 6, "endpoint: my-endpoint | model: llama-3 | tokens: 148/532 | msgs: 6"),
    (None, (0, 0, True), 0, "endpoint: my-endpoint | tokens: 0/0 | msgs: 0"),
    ("", (0, 0, True), 0, "endpoint: my-endpoint | tokens: 0/0 | msgs: 0"),
    ("m", (9, 3, False), 2, "endpoint: my-endpoint | model: m | tokens: ~9/~3 | msgs: 2"),
    ("a\x1b[31mb\x07\x9b\x7f\r", (0, 0, True), 0,
     "endpoint: my-endpoint | model: a\u241b[31mb\u2407\ufffd\u2421 | tokens: 0/0 | msgs: 0"),
], ids=["all", "no model", "an empty model", "counted", "control characters"])
def test_the_status_bar_says_what_is_known(xeroctl, model, totals, messages, expected):
    assert xeroctl.status_bar("my-endpoint", model, xeroctl.Totals(*totals), messages, 200) == expected


@pytest.mark.parametrize("model, columns, expected", [
    ("llama-3", 54, "endpoint: e | model: llama-3 | tokens: 0/0 | msgs: 0"),
    ("llama-3", 51, "model: llama-3 | tokens: 0/0 | msgs: 0"),
    ("llama-3", 38, "model: llama-3 | tokens: 0/0 | msgs: 0"),
    ("llama-3", 37, "tokens: 0/0 | msgs: 0"),
    ("日本語", 37, "model: 日本語 | tokens: 0/0 | msgs: 0"),
    ("日本語", 36, "tokens: 0/0 | msgs: 0"),
    ("e\u0301e\u0301x", 34, "model: e\u0301e\u0301x | tokens: 0/0 | msgs: 0"),
    ("e\u0301e\u0301x", 33, "tokens: 0/0 | msgs: 0"),
    ("m", 20, "msgs: 0"), ("m", 6, "msgs: "), ("m", 1, "m"), ("m", 0, ""),
], ids=repr)
def test_the_status_bar_drops_whole_parts_where_it_is_narrow(xeroctl, model, columns, expected):
    assert xeroctl.status_bar("e", model, xeroctl.Totals(0, 0, True), 0, columns) == expected


@pytest.mark.parametrize("model", ["a\tb", "a\nb"], ids=repr)
def test_the_status_bar_is_one_line_without_tabs(xeroctl, model):
    bar = xeroctl.status_bar("e", model, xeroctl.Totals(0, 0, True), 0, 80)
    assert "\t" not in bar and "\n" not in bar


@pytest.mark.parametrize("text, columns, expected", [
    ("abc", 3, "abc"), ("abc", 2, "ab"), ("", 5, ""), ("日本", 3, "日"), ("日本", 4, "日本"), ("日", 1, ""),
    ("a\u0301b", 1, "a\u0301"), ("a\u0301b", 2, "a\u0301b"), ("ａb", 2, "ａ"), ("😀!", 2, "😀"), ("é", 1, "é"),
], ids=repr)
def test_a_text_is_cut_between_characters(xeroctl, text, columns, expected):
    assert xeroctl.truncate(text, columns) == expected


# -- Completion ------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with files and folders in it, and a home folder."""
    for name in ("b.json", "a b.json", ".hidden", "a.json", "sub dir/in side.json", "sub dir/more/x", "[x].json"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes one.json").write_text("")
    (tmp_path / "home" / ".profile").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("line, expected", [
    ("/he", ["/help"]), ("/help", ["/help"]), ("/s", ["/system ", "/save ", "/show ", "/set "]), ("/l", ["/load "]),
    ("/x", []), ("/HE", ["/help"]),
    ("", []), ("hello", []), ("/help x", []), ("/system a", []), ("/nothing a", []), (" /he", []), ("a /he", []),
    ("/save ", ["/save [x].json", "/save a b.json", "/save a.json", "/save b.json", "/save sub dir/"]),
    ("/save [x", ["/save [x].json"]),
    ("/save a", ["/save a b.json", "/save a.json"]),
    ("/load a b", ["/load a b.json"]),
    ("/load .", ["/load .hidden"]),
    ("/load s", ["/load sub dir/"]),
    ("/load sub dir/", ["/load sub dir/in side.json", "/load sub dir/more/"]),
    ("/load sub dir/in s", ["/load sub dir/in side.json"]),
    ("/load ~/", ["/load ~/notes one.json"]),
    ("/load ~/.", ["/load ~/.profile"]),
    ("/load /et", ["/load /etc/"]),
    ("/load missing/", []), ("/load z", []), ("/attach a.", ["/attach a.json"]),
    ("/model l", ["/model llama", "/model lora"]), ("/context ", ["/context prod"]), ("/context x", []),
])
def test_a_line_is_completed(xeroctl, folder, line, expected):
    names = {"/model": ["llama", "lora", "m"], "/context": ["prod"]}
    assert xeroctl.complete_line(line, lambda name: names.get(name, [])) == expected


def test_a_slash_alone_offers_every_command(xeroctl):
    lines = xeroctl.complete_line("/", None)
    assert [line.strip() for line in lines] == [command.name for command in xeroctl.CHAT_COMMANDS]


# -- Line editors ----------------------------------------------------

GNU = "Importing this module enables command line editing using GNU readline."
LIBEDIT = "Importing this module enables command line editing using libedit readline."


class FakeReadline:
    """A readline module that records how it is set up."""

    def __init__(self, doc, backend=None):
        self.__doc__, self.bound, self.history = doc, [], []
        if backend:
            self.backend = backend

    def parse_and_bind(self, line):
        self.bound.append(line)

    def add_history(self, entry):
        self.history.append(entry)

    def __getattr__(self, name):
        if name.startswith("set_"):
            return lambda value: setattr(self, "got_" + name[4:], value)
        raise AttributeError(name)


class FakeWaiter:
    """Prompts by returning the prompt."""

    def prompt(self, read, text):
        return text

    @contextlib.contextmanager
    def without_raising(self):
        yield


@pytest.fixture
def line_editor(xeroctl, tmp_path, monkeypatch):
    """Return the LineEditor that is made over a module in place of readline."""

    def line_editor(module, styled=True):
        monkeypatch.setitem(sys.modules, "readline", module)
        console = SimpleNamespace(out=SimpleNamespace(is_terminal=True, styled=styled, dumb=False), waiter=FakeWaiter(),
                                  read_line=lambda prompt, suspend: prompt)
        return xeroctl.LineEditor(console, str(tmp_path / "history"), lambda line: [line + "!"])

    return line_editor


@pytest.mark.parametrize("doc, backend, is_libedit", [
    (GNU, None, False), (GNU, "readline", False), (LIBEDIT, None, True), (LIBEDIT, "editline", True),
    ("", "editline", True), (None, "readline", False), (None, None, False),
])
def test_each_kind_of_readline_is_bound_in_its_own_language(line_editor, doc, backend, is_libedit):
    module = FakeReadline(doc, backend)
    editor = line_editor(module)
    if is_libedit:
        assert module.bound == ["bind ^I rl_complete"]
        assert editor.read("> ") == "> "
    else:
        assert "tab: complete" in module.bound and "set enable-bracketed-paste on" in module.bound
        assert not any(line.startswith("bind ") for line in module.bound)
        assert editor.read("> ") == "\1\x1b[1m\2> \1\x1b[0m\2"
    assert (module.got_completer_delims, module.got_auto_history) == (" ", False)
    assert editor.marks_pastes is not is_libedit


@pytest.mark.parametrize("line, end, candidates", [
    ("/qu", 3, ["/qu!"]), ("/load a b", 9, ["b!"]), ("/load a bc", 7, ["a!"]), ("/load é b", 10, ["b!"]),
    ("see", 3, ["see\t"]), ("a b", 3, ["b\t"]), ("", 0, ["\t"]), ("/load ", 6, ["!"])])
def test_candidates_are_words_and_a_tab_in_a_message_is_a_tab(line_editor, line, end, candidates):
    module = FakeReadline(GNU)
    module.get_line_buffer, module.get_endidx = lambda: line, lambda: end
    line_editor(module)
    word = line.encode()[:end].decode().rpartition(" ")[2]
    assert [module.got_completer(word, state) for state in range(len(candidates) + 1)] == candidates + [None]


def test_without_colour_the_prompt_is_plain(line_editor):
    assert line_editor(FakeReadline(GNU), styled=False).read("> ") == "> "


def test_without_readline_a_line_is_read_all_the_same(line_editor):
    editor = line_editor(None)
    editor.remember("one")
    assert editor.read("> ") == "> "


def test_without_readline_a_line_that_the_terminal_cut_is_refused(xeroctl, line_editor):
    editor = line_editor(None)
    assert editor.read("x" * 4094) == "x" * 4094
    with pytest.raises(xeroctl.UnusableInputError):
        editor.read("é" * 2048)


# -- The history file ------------------------------------------------


@pytest.fixture
def history(tmp_path):
    """The path of a history file, which is not there yet."""
    return tmp_path / "state" / "xeroctl" / "history"


def test_no_history_is_an_empty_one(xeroctl, history):
    assert xeroctl.read_history(str(history)) == []


def test_the_history_is_private_whatever_the_umask(xeroctl, history):
    old = os.umask(0)
    try:
        xeroctl.append_history(str(history), "one")
    finally:
        os.umask(old)
    assert (mode(history), mode(history.parent)) == (0o600, 0o700)


ENTRIES = ["one", "two\nlines\n", "é 日本 😀", "tab\t\\ \"quoted\" \u2028 \x1b", " led by a space"]


def test_entries_come_back_as_they_were(xeroctl, history):
    for entry in ENTRIES:
        xeroctl.append_history(str(history), entry)
    assert xeroctl.read_history(str(history)) == ENTRIES
    assert history.read_bytes().count(b"\n") == len(ENTRIES)


@pytest.mark.parametrize("before, kept", [(998, 998), (999, 999), (1000, 999), (5000, 999)])
def test_the_oldest_entries_over_a_thousand_go(xeroctl, history, before, kept):
    history.parent.mkdir(parents=True)
    history.write_text("".join(f'"{number}"\n' for number in range(before)))
    xeroctl.append_history(str(history), "new")
    expected = [str(number) for number in range(before - kept, before)] + ["new"]
    assert xeroctl.read_history(str(history)) == expected
    assert history.read_bytes().count(b"\n") == kept + 1


def test_only_the_newest_thousand_of_a_longer_file_are_read(xeroctl, history):
    history.parent.mkdir(parents=True)
    history.write_text("".join(f'"{number}"\n' for number in range(1500)))
    assert xeroctl.read_history(str(history)) == [str(number) for number in range(500, 1500)]


def test_a_history_of_5_megabytes_takes_no_longer_than_a_small_one(xeroctl, history):
    history.parent.mkdir(parents=True)
    history.write_text(f'"{"x" * 5000}"\n' * 1000)
    begin = time.process_time()
    xeroctl.append_history(str(history), "new")
    assert time.process_time() - begin < 1
    assert xeroctl.read_history(str(history)) == ["x" * 5000] * (4 * 1024 * 1024 // 5003) + ["new"]


def test_the_history_holds_4_mebibytes(xeroctl, history):
    for letter in "abcd":
        xeroctl.append_history(str(history), letter * 1024 * 1024)
    assert [entry[0] for entry in xeroctl.read_history(str(history))] == ["b", "c", "d"]
    assert os.path.getsize(str(history)) <= 4 * 1024 * 1024


def test_an_entry_over_the_limit_is_not_kept(xeroctl, history):
    xeroctl.append_history(str(history), "one")
    xeroctl.append_history(str(history), "x" * 5 * 1024 * 1024)
    xeroctl.append_history(str(history), "two")
    assert xeroctl.read_history(str(history)) == ["one", "two"]


def test_an_entry_that_repeats_the_last_one_is_not_added(xeroctl, history):
    for entry in ("one", "one", "two", "one"):
        xeroctl.append_history(str(history), entry)
    assert xeroctl.read_history(str(history)) == ["one", "two", "one"]


@pytest.mark.parametrize("lock", ["free", "held"])
def test_a_lock_that_another_holds_is_tried_for_half_a_second_and_done_without(xeroctl, history, lock):
    history.parent.mkdir(parents=True)
    descriptor = os.open(str(history.parent), os.O_RDONLY)
    if lock == "held":
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    begin = time.monotonic()
    assert xeroctl.append_history(str(history), "one") is (lock == "free")
    assert (time.monotonic() - begin >= 0.5) is (lock == "held")
    os.close(descriptor)
    assert xeroctl.read_history(str(history)) == ["one"]


def test_a_history_that_is_no_regular_file_is_left_alone(xeroctl, history):
    history.parent.mkdir(parents=True)
    os.mkfifo(str(history))
    assert xeroctl.read_history(str(history)) == []
    with pytest.raises(xeroctl.UsageError) as caught:
        xeroctl.append_history(str(history), "one")
    assert str(caught.value) == f"{history} is not a regular file"
    assert stat.S_ISFIFO(os.stat(str(history)).st_mode)


@pytest.mark.parametrize("broken", [b"", b"not json", b'"half', b"\x00\x00\x00", b"{", b"[" * 200000],
                         ids=["empty", "text", "half", "zeros", "brace", "deep"])
def test_broken_lines_are_skipped(xeroctl, history, broken):
    history.parent.mkdir(parents=True)
    history.write_bytes(b'"one"\n' + broken + b'\n"two"\n')
    assert xeroctl.read_history(str(history)) == ["one", "two"]


def test_invalid_utf8_is_no_failure(xeroctl, history):
    history.parent.mkdir(parents=True)
    history.write_bytes(b'"one"\n"\xff\xfe"\n"two"\n')
    assert xeroctl.read_history(str(history))[::2] == ["one", "two"]


def test_an_entry_after_a_line_without_its_end_is_not_lost(xeroctl, history):
    history.parent.mkdir(parents=True)
    history.write_bytes(b'"one"\n"half of an ent')
    xeroctl.append_history(str(history), "two")
    assert xeroctl.read_history(str(history)) == ["one", "two"]


@pytest.mark.parametrize("before", [0, 900])
def test_two_processes_at_once_lose_nothing(xeroctl, history, before):
    history.parent.mkdir(parents=True)
    history.write_text("".join(f'"{number}"\n' for number in range(before)))
    code = ("import sys, xeroctl\nsys.stdin.readline()\n"
            "for number in range(150): xeroctl.append_history(sys.argv[1], f'{sys.argv[2]} {number}')")
    children = [subprocess.Popen([sys.executable, "-c", code, str(history), name], stdin=subprocess.PIPE,
                                 env={**os.environ, "PYTHONPATH": str(XEROCTL.parent)}) for name in "ab"]
    for child in children:
        child.stdin.write(b"\n")
        child.stdin.close()
    assert [child.wait(20) for child in children] == [0, 0]
    entries = xeroctl.read_history(str(history))
    for name in "ab":
        assert [entry for entry in entries if entry.startswith(name)] == [f"{name} {i}" for i in range(150)]
    assert len(entries) == min(before + 300, 1000)


@pytest.mark.parametrize("path", ["/dev/null/xeroctl/history", "/dev"])
def test_a_history_that_cannot_be_written_is_a_usage_error(xeroctl, path):
    with pytest.raises(xeroctl.UsageError):
        xeroctl.append_history(path, "one")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_history_is_cut_to_its_limit_whole_or_not_at_all(xeroctl, tmp_path, monkeypatch, failure):
    history = tmp_path / "history"
    history.write_text("".join(f'"{number}"\n' for number in range(1000)))

    def fail(*unused):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((xeroctl.UsageError, KeyboardInterrupt)):
        xeroctl.append_history(str(history), "new")
    assert xeroctl.read_history(str(history)) == [str(number) for number in range(1000)]
    assert [path.name for path in tmp_path.iterdir()] == ["history"]


# -- Private files ---------------------------------------------------


def test_a_private_file_is_its_owners_alone(xeroctl, tmp_path):
    path = tmp_path / "a b.json"
    old = os.umask(0)
    try:
        xeroctl.write_private(str(path), "é 😀\n")
    finally:
        os.umask(old)
    assert (mode(path), path.read_bytes()) == (0o600, "é 😀\n".encode())
    assert os.listdir(str(tmp_path)) == ["a b.json"]


def test_a_file_that_others_could_read_becomes_private(xeroctl, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o644)
    xeroctl.write_private(str(path), "new")
    assert (mode(path), path.read_text()) == (0o600, "new")


def test_a_link_stays_a_link(xeroctl, tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "file", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    xeroctl.write_private(str(link), "new")
    assert link.is_symlink() and not target.is_symlink()
    assert (target.read_text(), os.listdir(str(target.parent))) == ("new", ["file"])


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("raised, seen", [
    (OSError(errno.ENOSPC, "No space left on device"), "UsageError"), (KeyboardInterrupt(), "KeyboardInterrupt"),
], ids=["full disk", "interrupt"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
        xeroctl, tmp_path, monkeypatch, function, raised, seen):
    def fail(*unused):
        raise raised
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(BaseException) as caught:
        xeroctl.write_private(str(path), "new" * 10000)
    monkeypatch.undo()
    assert type(caught.value).__name__ == seen
    if seen == "UsageError":
        assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert (path.read_text(), os.listdir(str(tmp_path))) == ("old", ["file"])


@pytest.mark.parametrize("name, reason", [
    ("missing/file", "No such file or directory"), ("plain/file", "Not a directory"), ("folder", "Is a directory"),
])
def test_a_place_that_cannot_be_written_is_named(xeroctl, tmp_path, name, reason):
    (tmp_path / "plain").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(xeroctl.UsageError) as caught:
        xeroctl.write_private(str(tmp_path / name), "new")
    assert str(caught.value) == f"cannot write {tmp_path / name}: {reason}"
    assert sorted(os.listdir(str(tmp_path))) == ["folder", "plain"]
