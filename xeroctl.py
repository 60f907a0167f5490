#!/usr/bin/env python3
"""xeroctl: chat with Xerotier endpoints, and with any OpenAI-compatible server, from one file.

It needs Python 3.6 or later and nothing else.  Start with:

    python3 xeroctl.py chat --demo --stream -m "Hello"

The file reads bottom-up: a room uses only the rooms above it, and data flows one way,

    argv -> options -> Settings -> Request -> bytes -> events -> deltas -> Reply -> exit status

    Constants          exit statuses, defaults, names of variables, limits
    Errors             what can go wrong, and the exit status of each kind
    Records            the values that travel between rooms
    Settings           options, environment and config.toml made into one Settings    (pure)
    Config edits       changes to config.toml that leave all other lines alone        (pure)
    Requests           bodies, headers, addresses, the same request as a curl line    (pure)
    Event stream       bytes cut anywhere made into events                            (pure)
    Replies            deltas made into a Reply, error bodies into one sentence       (pure)
    Conversation       the messages of a chat, and the document that keeps them       (pure)
    Text               what is printed, and what a terminal must not be sent          (pure)
    Files              the config file, its keys, prompts, history, files that are private
    Transport          connections, TLS, proxies, and the bytes of a response
    Terminal           the three streams, notices, the spinner
    Rendering          an answer as text or as JSON
    Exchange           one question, its retries and its answer
    Practice endpoint  the server behind --demo
    Chat               the line editor, slash commands, the loop of --interactive
    Commands           what the commands share; chat and models
    Config commands    config: the deployments in the config file
    Status             status: a request step by step, and what each took
    Completions        completions: what --store had the server keep
    Shell completion   completion: scripts for bash, zsh and fish, made from the parser
    Command line       the parser, and main
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import sys
import time
from collections import namedtuple

# -- Constants --------------------------------------------------------------------------------

__version__ = "0.2.0"

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_AUTH = 3
EXIT_REFUSED = 4
EXIT_SERVER = 5
EXIT_NETWORK = 6
EXIT_RATE_LIMIT = 7
EXIT_CUT_SHORT = 8
EXIT_CLOSED_STDOUT = 141

ENV_BASE_URL = "XEROTIER_BASE_URL"
ENV_API_KEY = "XEROTIER_API_KEY"
ENV_CONTEXT = "XEROTIER_CONTEXT"

DEFAULT_CONNECT_TIMEOUT_SECONDS = 10
DEFAULT_TIMEOUT_SECONDS = 300
DEFAULT_RETRIES = 2
DEFAULT_INTERACTIVE_MAX_TOKENS = 4096
DEMO_ENDPOINT = "demo"

MAX_RETRY_DELAY_SECONDS = 60
HEARTBEAT_SECONDS = 0.25
MAX_TIMEOUT_SECONDS = 1000000
MAX_NUMBER = 2 ** 63 - 1
MAX_ERROR_BYTES = 64 * 1024
MAX_ERROR_CHARACTERS = 500
MAX_EVENT_BYTES = MAX_REPLY_BYTES = 64 * 1024 * 1024
MAX_HEAD_LINES = 1000
READ_BYTES = 64 * 1024
MAX_HISTORY_ENTRIES = 1000
MAX_PAGES = 1000
MIN_REDACTED_CHARACTERS = 8

ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
BODY_OPTIONS = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty",
                "seed", "store")
CHAT_PATH = "/chat/completions"
CONVERSATION_FORMAT, CONVERSATION_VERSION = "xeroctl-conversation", 1
KEY_PLACES = ("api_key", "api_key_keychain", "api_key_command")
DEPLOYMENT_KEYS = KEY_PLACES + ("base_url", "output")
SECRET_NAMES = "(?i)key|token|secret|password|credential|authorization|cookie"

# -- Errors -----------------------------------------------------------------------------------

class XeroctlError(Exception):
    """A failure that a user, a server or a network can cause, in one sentence.

    *status* is the HTTP status, *code* and *request_id* are the server's own words, *retry_after*
    is the seconds that the server asked us to wait.  Whoever raises it says if a retry may help.
    """
    kind, exit_status = "failure", EXIT_FAILURE

    def __init__(self, message, status=None, code=None, request_id=None,
                 retryable=False, retry_after=None):
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id
        self.retryable, self.retry_after = retryable, retry_after

class OutputError(XeroctlError):
    """Standard output could not be written."""
    kind = "output"

class InputError(XeroctlError):
    """Standard input could not be read."""
    kind, exit_status = "usage", EXIT_USAGE

class UsageError(XeroctlError):
    """The options, the environment, the config file or another file are wrong."""
    kind, exit_status = "usage", EXIT_USAGE

class AuthError(XeroctlError):
    """The server did not accept the API key (HTTP 401 or 403)."""
    kind, exit_status = "auth", EXIT_AUTH

class RefusedError(XeroctlError):
    """The server understood and refused the request (another HTTP 4xx)."""
    kind, exit_status = "refused", EXIT_REFUSED

class ServerError(XeroctlError):
    """The server failed (HTTP 5xx), or sent something that is no answer."""
    kind, exit_status = "server", EXIT_SERVER

class NetworkError(XeroctlError):
    """The server could not be reached, or fell silent."""
    kind, exit_status = "network", EXIT_NETWORK

class RateLimitError(XeroctlError):
    """The server asked us to slow down (HTTP 429), once more than we retried."""
    kind, exit_status = "rate_limit", EXIT_RATE_LIMIT

class CutShortError(XeroctlError):
    """The reply ended before its end; what came of it was shown."""
    kind, exit_status = "cut_short", EXIT_CUT_SHORT

class Page(Exception):
    """A text that was asked for in place of what a command does: help, version, a dry run."""

class Terminated(BaseException):
    """A signal, whose number it holds, asked us to end; it passes every handler but main's."""

# -- Records ----------------------------------------------------------------------------------

# Plain namedtuples: the typing module would add a quarter to the start-up time on Python 3.6.

Config = namedtuple("Config", "path current deployments notices")
Settings = namedtuple("Settings", "endpoint base_url api_key output timeout connect_timeout "
                                  "retries cacert dry_run notices sources")
Sampling = namedtuple("Sampling", "model fields headers")  # what chat's options add to a request
Request = namedtuple("Request", "method url headers body streamed")
Event = namedtuple("Event", "name data")
Usage = namedtuple("Usage", "prompt completion total cached reasoning")  # None: not told
Response = namedtuple("Response", "status headers chunks through")
Totals = namedtuple("Totals", "prompt completion exact")
ChatCommand = namedtuple("ChatCommand", "name argument run summary")

# -- Settings ---------------------------------------------------------------------------------

_TOML_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_TOML_KEYS = r"%s(?:\s*\.\s*%s)*" % (_TOML_KEY, _TOML_KEY)
_TOML_END = r"\s*(?:#.*)?$"
_TOML_HEADER = r"\s*\[\s*(%s)\s*\]%s" % (_TOML_KEYS, _TOML_END)
_TOML_PAIR = r"\s*(%s)\s*=\s*(.*)$" % _TOML_KEYS
_TOML_VALUE = (r"""("(?!"")(?:[^"\\]|\\.)*"|'(?!'')[^']*'|true|false|[+-]?\d+(?:\.\d+)?)"""
               + _TOML_END)

def toml_value(text):
    """Return the value that a TOML string, boolean or plain number stands for."""
    return text[1:-1] if text.startswith("'") else json.loads(text.lstrip("+"))

def toml_keys(text):
    """Return the parts of a dotted TOML key."""
    return [toml_value(key) if key[0] in "\"'" else key for key in re.findall(_TOML_KEY, text)]

def parse_toml_subset(text):
    """Return the tables of a TOML text of strings, booleans and plain numbers.

    Raise ValueError, with the line's number, for everything else that TOML allows.
    """
    document, headers = {}, []
    table = document
    for number, line in enumerate(text.split("\n"), 1):
        header, pair = re.match(_TOML_HEADER, line), re.match(_TOML_PAIR, line)
        try:
            if header:
                table, keys = document, toml_keys(header.group(1))
                for key in keys:
                    table = table.setdefault(key, {})
                    table.items()
                if keys in headers:
                    raise ValueError
                headers.append(keys)
            elif pair:
                target, value = table, re.match(_TOML_VALUE, pair.group(2))
                keys = toml_keys(pair.group(1))
                for key in keys[:-1]:
                    target = target.setdefault(key, {})
                if keys[-1] in target:
                    raise ValueError
                target[keys[-1]] = toml_value(value.group(1))
            elif not re.match(_TOML_END, line):
                raise ValueError
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError("cannot read this (at line %d)" % number) from error
    return document

def parse_toml(text, path):
    """Return the document in the TOML *text* of the file *path*.

    Raise UsageError, naming the file and the line, where it is broken.
    """
    try:
        import tomllib
    except ImportError:  # before Python 3.11
        parse = parse_toml_subset
    else:
        parse = tomllib.loads
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        last = text.rstrip().count("\n") + 1
        reason = str(error).replace("at end of document", f"at line {last}")
        raise UsageError(f"{path}: broken TOML: {reason}") from error

def parse_config(text, path):
    """Return the Config that the TOML *text* of the file *path* describes.

    Raise UsageError where it is broken, or a value in it is of the wrong kind.
    """
    document = parse_toml(text, path)
    deployments = document.get("deployment", {})
    shapes = [("current", document.get("current", ""), str), ("deployment", deployments, dict)]
    for name, deployment in deployments.items() if isinstance(deployments, dict) else ():
        shapes.append((f"deployment.{name}", deployment, dict))
        for key in DEPLOYMENT_KEYS if isinstance(deployment, dict) else ():
            shapes.append((f"deployment.{name}.{key}", deployment.get(key, ""), str))
    for name, value, kind in shapes:
        if not isinstance(value, kind):
            raise UsageError(f"{path}: {name} is not {'text' if kind is str else 'a table'}")
    return Config(path, document.get("current") or None, deployments, [])

def check_base_url(url):
    """Return *url* without trailing slashes; raise UsageError where it is no usable base URL."""
    from urllib.parse import urlsplit

    if re.match(r"[^/]*//[^/]*@", url):
        raise UsageError("a base URL holds no user or password: use --api-key")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.match(r"[!-~]+\Z", url) or "#" in url:
        raise UsageError(f"not a base URL: {url!r}: one is https://api.xerotier.ai/PROJECT/v1")
    if "?" in url and not parts.path.endswith(CHAT_PATH):
        raise UsageError(f"not a base URL: {url!r}: only an address that ends in {CHAT_PATH} "
                         "may have a query")
    return url if parts.query else url.rstrip("/")

def endpoint_url(base_url, slug, path):
    """Return the address of *path*, such as /models, at the endpoint *slug*.

    Without a slug it is that of the project; raise UsageError where the address needs one.
    """
    if not slug and "{endpoint}" in base_url:
        raise UsageError("this base URL has a place for an endpoint: give --endpoint SLUG")
    address, mark, query = base_url.replace("{endpoint}", slug or "").partition("?")
    if address.endswith(CHAT_PATH):
        address = address[:-len(CHAT_PATH)]
    elif slug and "{endpoint}" not in base_url:
        address = (address[:-3] if address.endswith("/v1") else address) + f"/{slug}/v1"
    return address + path + mark + query

def origin(url):
    """Return the scheme, host and port of *url* (RFC 6454): what a stored key is bound to."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)

def is_loopback(host):
    """Tell whether *host* names this machine by its loopback interface."""
    return host == "localhost" or host == "::1" or bool(re.match(r"127(\.\d+){3}\Z", host))

def known_contexts(config):
    """Return the names of the deployments of *config* as a list to read."""
    return ", ".join(sorted(config.deployments)) or "none"

def find_deployment(config, name):
    """Return the table of deployment *name*, empty for None; raise UsageError if unknown."""
    if name is None:
        return {}
    if name not in config.deployments:
        raise UsageError(f"unknown context {name!r}: {config.path} has: {known_contexts(config)}")
    return config.deployments[name]

def check_api_key(key):
    """Return *key*; raise UsageError, not showing it, where it could not stand in a header."""
    if not re.match(r"[!-~]*\Z", key):
        raise UsageError("the API key has a space, a line end or another character that no key has")
    return key

def check_deployment_name(text):
    """Return *text*; raise UsageError where it is no good name for a deployment."""
    if not re.match(r"[A-Za-z0-9._-]+\Z", text):
        raise UsageError(f"a deployment's name is letters, digits, '.', '_', '-', not {text!r}")
    return text

def first_set(*candidates):
    """Return the first (value, source) of *candidates* that has a value, else (None, None)."""
    return next((pair for pair in candidates if pair[0]), (None, None))

def missing_base_url(config, context):
    """Return the UsageError for settings without a base URL."""
    if config.deployments and not context:
        return UsageError(f"no context is chosen: {config.path} has: {known_contexts(config)}: "
                          "give --context CONTEXT, or choose with: xeroctl config use CONTEXT")
    return UsageError(f"no base URL: set it up with: xeroctl config init, or set {ENV_BASE_URL} "
                      f"and {ENV_API_KEY}, or try without any: xeroctl chat --demo -m Hello")

def resolve_settings(options, environ, config, fetch_key):
    """Return the Settings that *options*, then *environ*, then the Config *config* ask for.

    *fetch_key* takes a deployment whose key is kept elsewhere, and returns that key.
    """
    context = options.context or environ.get(ENV_CONTEXT) or config.current
    deployment, stored = find_deployment(config, context), f"deployment {context} in {config.path}"
    base_url, base_url_source = first_set(
        (options.base_url, "--base-url"), (environ.get(ENV_BASE_URL), ENV_BASE_URL),
        (deployment.get("base_url"), stored))
    if not base_url:
        raise missing_base_url(config, context)
    base_url = check_base_url(base_url)
    scheme, host, _ = origin(base_url)
    api_key, key_source = first_set(
        (options.api_key, "--api-key"), (environ.get(ENV_API_KEY), ENV_API_KEY))
    notices = list(config.notices)
    if not api_key and any(deployment.get(name) for name in KEY_PLACES):
        home = deployment.get("base_url")
        if home and origin(check_base_url(home)) == origin(base_url):
            api_key, key_source = deployment.get("api_key") or fetch_key(deployment), stored
        else:
            notices.append(f"the key of context {context} is for another server and is not sent")
    if api_key and scheme == "http" and not is_loopback(host):
        notices.append(f"the API key goes to {host} over plain http, for all on the way to read")
    output = options.output or deployment.get("output") or "text"
    if output not in ("text", "table", "json"):
        raise UsageError(f"{config.path}: deployment.{context}.output is not table or json")
    return Settings(
        endpoint=options.endpoint, base_url=base_url, api_key=check_api_key(api_key or "") or None,
        output="json" if output == "json" else "text", timeout=options.timeout,
        connect_timeout=options.connect_timeout, retries=options.retries, cacert=options.cacert,
        dry_run=options.dry_run, notices=notices,
        sources={"base_url": base_url_source, "api_key": key_source})

def masked(key):
    """Return what may be shown of an API key: its last four characters, of a long one."""
    return key and "****" + (key[-4:] if len(key) >= 2 * MIN_REDACTED_CHARACTERS else "")

# -- Config edits -----------------------------------------------------------------------------

def toml_text(text):
    """Return *text* as a TOML string."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

def begun_table(line):
    """Return the keys of the table that *line* begins, [] for other headers, None for no header."""
    header = re.match(_TOML_HEADER, line)
    if not header:
        return [] if line.lstrip().startswith("[[") else None
    with contextlib.suppress(ValueError):  # an escape that JSON has not: no table of ours
        return toml_keys(header.group(1))
    return []

def after_blank(lines):
    """Return those of *lines* that follow the first empty one."""
    return list(itertools.dropwhile(str.strip, lines))[1:]

def without_table(lines, keys):
    """Return the *lines* of a TOML text without the table *keys*, the tables and comments in it.

    What follows it after an empty line, or stands right above the next table, stays.
    """
    kept, tail, inside = [], [], False  # the tail: empty lines and comments at a table's end
    for line in lines:
        begun = begun_table(line)
        if begun is not None:
            was, inside = inside, begun[:len(keys)] == keys
            if was and not inside:
                kept += tail if all(map(str.strip, tail)) else after_blank(tail)
            tail = []
        if not inside:
            kept.append(line)
        else:
            tail = tail + [line] if re.match(_TOML_END, line) else []
    if inside:
        kept += after_blank(tail)
        if kept and not kept[-1].strip():  # what set the last table off
            kept.pop()
    return kept

def with_table(lines, keys, values):
    """Return the *lines* of a TOML text with the table *keys* of texts *values* at their end."""
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    if lines and not lines[-1].endswith("\n"):
        lines = lines[:-1] + [lines[-1] + end]
    quoted = [key if re.match(_TOML_KEY + r"\Z", key) else toml_text(key) for key in keys]
    table = [f"[{'.'.join(quoted)}]"] + [
        f"{key} = {toml_text(value)}" for key, value in values.items()]
    gap = [end] if lines and lines[-1].strip() else []
    return lines + gap + [line + end for line in table]

def with_current(lines, name):
    """Return the *lines* of a TOML text with *name* for current, or without that for None."""
    for place, line in enumerate(lines):
        pair = re.match(_TOML_PAIR, line)
        value = pair and pair.group(1) == "current" and re.match(_TOML_VALUE, pair.group(2))
        if value and name is None:  # goes with the empty line that sets it off at the top
            gap = place == 0 and not "".join(lines[1:2]).strip()
            return lines[:place] + lines[place + 1 + gap:]
        if value:
            start, end = pair.start(2) + value.start(1), pair.start(2) + value.end(1)
            return lines[:place] + [line[:start] + toml_text(name) + line[end:]] + lines[place + 1:]
        if line.lstrip().startswith("["):
            break
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    gap = [end] if lines and lines[0].strip() else []
    return lines if name is None else [f"current = {toml_text(name)}{end}"] + gap + lines

def edited_config(text, path, current, deployments):
    """Return the TOML *text* of the file *path* with this *current* and these *deployments*.

    Whole deployments come and go; all lines that say anything else stay as they are.  Raise
    UsageError where the text is written in a way that does not allow it.
    """
    old, document = parse_config(text, path), parse_toml(text, path)
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)  # with their ends
    for name in set(old.deployments) - set(deployments):
        lines = without_table(lines, ["deployment", name])
    for name in set(deployments) - set(old.deployments):
        lines = with_table(lines, ["deployment", name], deployments[name])
    if current != old.current:
        lines = with_current(lines, current)
    edited = "".join(lines)
    wanted = dict(document, current=current, deployment=deployments)
    try:
        found = parse_toml(edited, path)
        found.update(current=found.get("current") or None, deployment=found.get("deployment", {}))
    except UsageError:
        found = None
    as_text = json.JSONEncoder(sort_keys=True, default=repr).encode  # in which nan equals nan
    if as_text(found) != as_text(wanted):
        raise UsageError(f"{path} is written in a way that only an editor can change")
    return edited

# -- Requests ---------------------------------------------------------------------------------

def build_sampling(options):
    """Return the Sampling that the options of chat ask for: what the user set, and nothing else."""
    fields = {name: getattr(options, name) for name in BODY_OPTIONS
              if getattr(options, name) is not None}
    if options.metadata:
        fields["metadata"] = dict(options.metadata)
    fields.update(options.param)
    targets = (("X-SLO-TTFT-Ms", options.slo_ttft), ("X-SLO-TPOT-Ms", options.slo_tpot))
    return Sampling(options.model, fields,
                    [(name, str(value)) for name, value in targets if value is not None])

def build_request(method, url, settings, body=None, headers=()):
    """Return the Request that sends *body*, a JSON document or None, to *url*."""
    streamed = bool(body and body.get("stream"))
    accept = "text/event-stream" if streamed else "application/json"
    common = [("Accept", accept), ("User-Agent", "xeroctl/" + __version__)]
    data = None
    if body is not None:
        # UTF-8 as it stands, so that a lone surrogate cannot hide in an escape.
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        common.append(("Content-Type", "application/json"))
    if settings.api_key:
        common.append(("Authorization", "Bearer " + settings.api_key))
    return Request(method, url, common + list(headers), data, streamed)

def build_chat_request(sampling, settings, messages, stream):
    """Return the Request for the completion of *messages*."""
    body = {"model": sampling.model or settings.endpoint, "messages": messages, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    body.update(sampling.fields)
    url = endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH)
    return build_request("POST", url, settings, body, sampling.headers)

def build_stored_request(method, settings, path, query=(), body=None):
    """Return the Request for *path*, /ID or empty, below the stored completions of the endpoint."""
    from urllib.parse import urlencode

    url = endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH + path)
    if query:
        url += ("&" if "?" in url else "?") + urlencode(query, errors="replace")
    return build_request(method, url, settings, body)

def redacted(text, api_key):
    """Return *text* without the key, unless that is too short to be told from other words."""
    return text.replace(api_key, "***") if len(api_key or "") >= MIN_REDACTED_CHARACTERS else text

def redacted_head(data):
    """Return the lines of the head (and body) of a request, *data*, without its credentials."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").rstrip("\n")
    return re.sub(r"(?im)^((?:proxy-)?authorization: *\w+) .*$", r"\1 ***", text).split("\n")

def curl_line(request, settings):
    """Return *request* as a curl command that is safe to paste: the key is a variable in it."""
    from shlex import quote

    words = ["curl", "-gsSN" if request.streamed else "-gsS", quote(request.url)]
    if request.method not in ("GET", "POST"):
        words += ["-X", request.method]
    for name, value in request.headers:
        if name == "Authorization":
            words += ["-H", f'"Authorization: Bearer ${ENV_API_KEY}"']
        else:
            words += ["-H", quote(f"{name}: {value}")]
    if settings.cacert:
        words += ["--cacert", quote(settings.cacert)]
    if request.body is not None:
        words += ["--data-raw", quote(request.body.decode("utf-8"))]
    return " ".join(words)

# -- Event stream -----------------------------------------------------------------------------

class EventDecoder:
    """Turn the bytes of an event stream, cut anywhere, into events (WHATWG HTML, 9.2.6)."""

    def __init__(self):
        self._unfinished = []  # the pieces of a line whose end has not come
        self._after_cr = False  # the last chunk ended in CR: an LF that follows belongs to it
        self._first_line = True
        self._name = b""
        self._data = []
        self._size = 0  # bytes since the last event

    def feed(self, chunk):
        """Yield each event that *chunk* completes; raise ServerError where one has no end."""
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk[1:] if chunk.startswith(b"\n") else chunk
        if not chunk:
            return
        self._after_cr = chunk.endswith(b"\r")
        self._size += len(chunk)
        if self._size > MAX_EVENT_BYTES:
            raise ServerError(f"the stream has an event of over {MAX_EVENT_BYTES >> 20} MiB")
        lines = re.split(b"\r\n|\n|\r", chunk) if b"\r" in chunk else chunk.split(b"\n")
        self._unfinished.append(lines[0])
        if len(lines) == 1:
            return
        lines[0] = b"".join(self._unfinished)
        self._unfinished = [lines.pop()]
        if self._first_line:
            self._first_line = False
            if lines[0].startswith(b"\xef\xbb\xbf"):  # a byte-order mark
                lines[0] = lines[0][3:]
        for line in lines:
            if line:
                name, _, value = line.partition(b":")
                value = value[1:] if value.startswith(b" ") else value
                if name == b"data":
                    self._data.append(value)
                elif name == b"event":
                    self._name = value
            else:
                if self._data:
                    name = self._name.decode("utf-8", "replace") if self._name else "message"
                    yield Event(name, b"\n".join(self._data).decode("utf-8", "replace"))
                self._name, self._data, self._size = b"", [], 0

# -- Replies ----------------------------------------------------------------------------------

def finite(text):
    """Return the number *text*; refuse NaN and infinities, which JSON has not and Python reads."""
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text} is not JSON")
    return number

_JSON = json.JSONDecoder(parse_float=finite, parse_constant=finite)

def parse_json(text):
    """Return the document that *text* holds; raise ValueError where it is not JSON."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

def whole_text(text):
    """Return *text* with surrogate pairs joined and lone surrogates replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def field(document, name, kind):
    """Return the field *name* of *document* if both are of the right shape, else None."""
    value = document.get(name) if isinstance(document, dict) else None
    return value if isinstance(value, kind) and value is not True and value is not False else None

def content_text(message):
    """Return the text of a message or delta: its content, else its refusal."""
    content = field(message, "content", (str, list)) or field(message, "refusal", str) or ""
    if isinstance(content, list):
        content = "".join(field(part, "text", str) or "" for part in content)
    return content

def parse_usage(usage):
    """Return the Usage that the object *usage* of a reply or chunk tells."""
    prompt = field(usage, "prompt_tokens_details", dict)
    completion = field(usage, "completion_tokens_details", dict)
    counts = (field(usage, "prompt_tokens", int), field(usage, "completion_tokens", int),
              field(usage, "total_tokens", int), field(prompt, "cached_tokens", int),
              field(completion, "reasoning_tokens", int))
    return Usage(*(None if count is None or abs(count) > MAX_NUMBER else count for count in counts))

class Reply:
    """An answer, added up from the chunks of a stream or taken from one whole document.

    It holds what arrived when the exchange fails or is interrupted in the middle.
    """

    def __init__(self):
        self.begun = False  # a token came, be it of the answer or of the reasoning
        self.finish_reason = None
        self._text = bytearray()  # UTF-8: a list of 100,000 small strings would weigh 6 MB
        self._half = ""  # of a surrogate pair that the server split over two chunks
        self.id = self.model = None
        self.usage = parse_usage(None)
        self.chunks = 0  # with text in them
        self.seconds = self.first_token_seconds = None  # with those for connecting

    def forget(self):
        """Drop all that came: the try that it came from failed."""
        self.__init__()

    def add(self, document):
        """Take in one chunk or reply, of whatever shape, and return the text in it."""
        self.id = self.id or field(document, "id", str) or None
        self.model = self.model or field(document, "model", str) or None
        usage = field(document, "usage", dict)
        if usage:  # a later chunk may tell more, and does not take back
            self.usage = Usage(*(old if new is None else new
                                 for old, new in zip(self.usage, parse_usage(usage))))
        for choice in field(document, "choices", list) or ():
            if isinstance(choice, dict) and choice.get("index") in (0, None):
                break
        else:
            return ""
        self.finish_reason = field(choice, "finish_reason", str) or self.finish_reason
        message = field(choice, "delta" if "delta" in choice else "message", dict)
        text = self._half + content_text(message)
        half = "\ud800" <= text[-1:] <= "\udbff" and not self.finish_reason
        self._half = text[-1:] if half else ""
        text = whole_text(text[:-1] if half else text)
        if text:
            self._text += text.encode("utf-8")
            self.chunks += 1
        self.begun = self.begun or bool(text or field(message, "reasoning_content", str)
                                        or field(message, "reasoning", str))
        return text

    @property
    def text(self):
        """The text that arrived so far."""
        return self._text.decode("utf-8")

def event_document(event):
    """Return the JSON document that *event* carries; raise ServerError where it is none.

    An event named error is one whatever it carries, and becomes {"error": ...}.
    """
    try:
        document = parse_json(event.data)
    except ValueError as error:
        if event.name != "error":
            raise ServerError("the stream holds something that is not JSON") from error
        document = event.data
    if event.name == "error" and not field(document, "error", (str, dict)):
        document = {"error": document or "no reason given"}
    return document

def error_sentence(document, depth=4):
    """Return what an error *document* of any known shape says, or an empty text."""
    if isinstance(document, str):
        return document
    if isinstance(document, list) and depth:
        return "; ".join(filter(None, (error_sentence(item, depth - 1) for item in document)))
    for name in ("error", "detail", "message", "msg", "title"):
        found = field(document, name, (str, list, dict)) if depth else None
        sentence = found and error_sentence(found, depth - 1)
        if sentence:
            where = field(document, "loc", list)  # FastAPI's: the path of the field it refuses
            path = ".".join(str(part) for part in where or () if isinstance(part, (str, int)))
            return f"{path}: {sentence}" if path else sentence
    return ""

def failed_choice(document):
    """Return the choice of a reply or chunk that reports an error, as OpenRouter does, or None."""
    for choice in field(document, "choices", list) or ():
        if isinstance(choice, dict) and (
                choice.get("error") or choice.get("finish_reason") == "error"):
            return choice
    return None

def is_error(document):
    """Tell whether a document that came with HTTP 200 is an error all the same."""
    if not isinstance(document, dict) or document.get("error"):
        return True
    if "choices" in document:
        return failed_choice(document) is not None
    return bool(document.get("object") == "error" or document.get("detail")
                or field(document, "message", str))

def error_code(details, status):
    """Return the server's code for an error, else its type, where it says more than *status*."""
    for name in ("code", "type"):
        code = field(details, name, (str, int))
        if code and str(code) not in (str(status), "None"):  # Python servers print a missing one
            return str(code)
    return None

def retry_after_seconds(headers, details):
    """Return the seconds that a response asks us to wait (RFC 9110, 10.2.3), or None.

    The date form counts from the response's own Date, so that our clock need not be right.
    """
    from email.utils import mktime_tz, parsedate_tz

    value, number = headers.get("Retry-After") or "", r"\d+(\.\d+)?\Z"
    seconds = field(details, "retry_after", (int, float))
    if re.match(number, headers.get("Retry-After-Ms") or ""):
        seconds = float(headers["Retry-After-Ms"]) / 1000
    elif re.match(number, value.strip()):
        seconds = float(value)
    else:
        with contextlib.suppress(Exception):  # no dates, or odd ones, on which old versions break
            seconds = mktime_tz(parsedate_tz(value)) - mktime_tz(parsedate_tz(headers.get("Date")))
    return max(0, min(seconds, MAX_NUMBER)) if seconds is not None else None

def may_pass(status):
    """Tell whether a failure of this HTTP status is worth another try."""
    return status in (408, 409, 429) or 500 <= status <= 599

_HINTS = {
    401: "check the API key",
    403: "this key may not do that: check its scopes",
    404: f"check --endpoint and the base URL: without slugs it ends in {CHAT_PATH}",
    407: "the proxy wants a user and password: put them into its URL",
    429: "wait, or raise --retries",
}

def build_error(document, status, headers, api_key, where=""):
    """Return the error that *document* describes: parsed JSON, or text for anything else.

    *status* is the HTTP status; for an error inside a stream it is 200, and the document's own
    number, if it has one, takes its place.  *api_key* was sent, and is not to be repeated;
    *where* is the address, or the proxy that may be who speaks.
    """
    if not field(document, "error", (str, dict)):
        document = failed_choice(document) or document
    details = field(document, "error", dict) or document
    claimed = str(field(details, "code", (int, str)) or field(details, "status", (int, str)))
    effective = int(claimed) if status == 200 and re.match(r"[45]\d\d\Z", claimed) else status
    code, request_id = (word and redacted(word, api_key) for word in (
        error_code(details, effective), headers.get("X-Request-ID")))
    place = f"HTTP {status}" if status != 200 else "error in the reply"
    named = ", ".join(filter(None, [code, request_id and "request " + request_id]))
    sentence = " ".join(redacted(error_sentence(document), api_key).split())[:MAX_ERROR_CHARACTERS]
    hint = _HINTS.get(effective)
    if effective == 401 and not api_key:
        hint = f"set {ENV_API_KEY} or give --api-key"
    place += (f" ({named})" if named else "") + where
    message = ": ".join(filter(None, [place, sentence, hint]))
    kind = {401: AuthError, 403: AuthError, 429: RateLimitError}.get(
        effective, RefusedError if 400 <= effective <= 499 else ServerError)
    return kind(message, None if status == 200 else status, code, request_id,
                retryable=may_pass(effective),
                retry_after=retry_after_seconds(headers, details))

def parse_error(data, status, headers, api_key, where=""):
    """Return the error that a response of HTTP *status* with the body *data* stands for."""
    text = data.decode("utf-8", "replace").strip()
    if 300 <= status <= 399:
        target = headers.get("Location")
        text = "redirects are not followed" + (
            f": if you trust {target}, make it the base URL" if target else "")
    try:
        document = parse_json(text)
    except ValueError:
        document = "the answer is an HTML page" if text.startswith("<") else text
    return build_error(document, status, headers, api_key, where)

def retry_delay(attempt, retry_after, jitter):
    """Return the seconds to wait before try number *attempt* + 1; *jitter* is from 0 to 1.

    The server's word counts, up to a limit; else the wait doubles from half a second, less up to
    a quarter of it, so that a crowd of clients does not come back at once.
    """
    if retry_after is None:
        retry_after = 0.5 * 2 ** min(attempt - 1, 10) * (1 - jitter / 4)
    return min(retry_after, MAX_RETRY_DELAY_SECONDS)

# -- Conversation -----------------------------------------------------------------------------

class Conversation:
    """The messages of a chat: a system message or None, then (question, answer) pairs.

    Only a question that got an answer, if a part of one, becomes a turn: so the messages are well
    formed whatever fails.
    """

    def __init__(self, system=None, turns=()):
        self.system = system
        self.turns = list(turns)

    def messages(self, question=None):
        """Return the messages in the API's shape, with *question* as the newest."""
        pairs = [("system", self.system)] if self.system else []
        for asked, answer in self.turns:
            pairs += [("user", asked), ("assistant", answer)]
        if question:
            pairs.append(("user", question))
        return [{"role": role, "content": content} for role, content in pairs]

def saved_document(conversation, endpoint, model, saved_at):
    """Return the JSON text that keeps *conversation*; *saved_at* is its time in ISO 8601."""
    return json.dumps({
        "format": CONVERSATION_FORMAT, "version": CONVERSATION_VERSION, "endpoint": endpoint,
        "model": model, "saved_at": saved_at, "messages": conversation.messages(),
    }, ensure_ascii=False, indent=2) + "\n"

def parse_conversation(text):
    """Return the Conversation in *text*, and a last question without an answer, or None.

    It is a saved one, a list of messages, or an object with messages.  Raise UsageError that says
    what is wrong, and where.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from error
    if isinstance(document, dict):
        if document.get("format", CONVERSATION_FORMAT) != CONVERSATION_FORMAT or \
                document.get("version", CONVERSATION_VERSION) != CONVERSATION_VERSION:
            raise UsageError(f"not format {CONVERSATION_FORMAT!r}, version {CONVERSATION_VERSION}")
        document = document.get("messages", document.get("data"))
    if not isinstance(document, list):
        raise UsageError("no list of messages in it")
    system, spoken = None, []
    for place, message in enumerate(document):
        role, content = field(message, "role", str), content_text(message)
        wanted = ("user", "assistant")[len(spoken) % 2]
        if not content.strip() and role != "system":
            raise UsageError(f"messages[{place}]: no text in it")
        parts = field(message, "content", list) or ()
        if any(field(part, "text", str) is None for part in parts):
            raise UsageError(f"messages[{place}]: a part of it is no text")
        if place == 0 and role in ("system", "developer"):
            system = content
        elif role == wanted:
            spoken.append(content)
        else:
            raise UsageError(f"messages[{place}]: the role is {role!r}, not {wanted!r}")
    question = spoken.pop() if len(spoken) % 2 else None
    return Conversation(system, zip(spoken[::2], spoken[1::2])), question

# -- Text -------------------------------------------------------------------------------------

# Control characters become their pictures (U+2400 and on), C1 ones a replacement; a carriage
# return could overwrite what stands on the line, and is dropped.
_VISIBLE = {code: 0x2400 + code for code in range(0x20)}
_VISIBLE.update({code: 0xFFFD for code in range(0x80, 0xA0)})
_VISIBLE.update({0x7F: 0x2421, ord("\r"): None, ord("\n"): "\n", ord("\t"): "\t"})

def printable(text):
    """Return *text* with nothing in it that drives a terminal."""
    return text.translate(_VISIBLE)

def typed_text(text):
    """Return what was typed, the bytes in it that Python could not decode read as UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

def decode_prompt(data, name):
    """Return the text of the prompt *data*, which came from *name*, without line ends at its end.

    It is UTF-8; a byte-order mark and CRLF are accepted.  Raise UsageError for anything else.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (at byte {error.start})") from error

def finish_notice(reply):
    """Return what the user must know about how *reply* ended, or None."""
    return {
        None: "the server gave no reason for the end: the answer may be incomplete",
        "length": "the answer was cut at the token limit: see --max-tokens",
        "content_filter": "the answer was cut by a content filter",
        "tool_calls": "the model asked for a tool call: -o json shows it",
    }.get(reply.finish_reason)

def footer_line(reply):
    """Return the throughput line of a streamed reply; a count of chunks is marked ~."""
    tokens, mark = reply.chunks, "~"
    if reply.usage.completion is not None:
        tokens, mark = reply.usage.completion, ""
    rate = tokens / max(reply.seconds, 1e-9)
    return f"-- {mark}{tokens} tokens in {reply.seconds:.1f}s ({mark}{rate:.1f} tok/s)"

def columns_of(text):
    """Return how many columns of a terminal *text* takes."""
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(character) else 2 if east_asian_width(character) in "WF" else 1
               for character in text)

def cut(text, columns):
    """Return as much of *text* as fits into *columns* of a terminal."""
    for place, character in enumerate(text):
        columns -= columns_of(character)
        if columns < 0:
            return text[:place]
    return text

def token_counts(totals, form):
    """Return *form* filled in with the Totals of a session, marked ~ where a reply had no usage."""
    mark = "" if totals.exact else "~"
    return form.format(prompt=f"{mark}{totals.prompt}", completion=f"{mark}{totals.completion}")

def status_bar(endpoint, model, totals, turns, columns):
    """Return the line above the prompt, cut to *columns*."""
    parts = [f"endpoint: {endpoint}"] + ([f"model: {model}"] if model else [])
    parts += [token_counts(totals, "tokens: {prompt}/{completion}"), f"msgs: {2 * turns}"]
    return cut(printable(" ".join(" | ".join(parts).split())), columns)

def usage_fields(reply, streamed):
    """Return the (name, value) pairs of what the server said about *reply*."""
    pairs = [(name + "_tokens", value) for name, value in zip(Usage._fields, reply.usage)]
    if streamed:
        first = reply.first_token_seconds
        pairs += [("first_token_seconds", first and round(first, 3)),
                  ("finish_reason", reply.finish_reason)]
    pairs.append(("id", reply.id))
    return [(name, value) for name, value in pairs if value is not None]

# -- Files ------------------------------------------------------------------------------------

def utf8_text(text):
    """Return an argument, a variable or a file name, decoded as the locale has it, as UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # PyPy reads UTF-8 in the C locale, and does not write it
        return text

def environment():
    """Return our environment variables that are settings."""
    return {name: utf8_text(os.environ.get(name, ""))
            for name in (ENV_BASE_URL, ENV_API_KEY, ENV_CONTEXT)}

def xdg_path(variable, default, name):
    """Return the path of xeroctl's file *name* (XDG Base Directory)."""
    folder = os.environ.get(variable) or ""
    if not os.path.isabs(folder):
        home = os.path.expanduser("~")  # as it stands where a user has no home at all
        folder = os.path.join(home if os.path.isabs(home) else "/nonexistent", default)
    return os.path.join(folder, "xeroctl", name)

def config_path():
    """Return the path of the config file, which need not exist."""
    return xdg_path("XDG_CONFIG_HOME", ".config", "config.toml")

def state_path(name):
    """Return the path of the file *name* that xeroctl itself keeps, which need not exist."""
    return xdg_path("XDG_STATE_HOME", os.path.join(".local", "state"), name)

def native_path(text):
    """Return the file name *text* as this Python's functions for files want it in this locale."""
    if not text or "\0" in text:
        raise UsageError("a file name is needed")
    return os.path.expanduser(os.fsdecode(text.encode("utf-8", "surrogateescape")))

def read_file(path):
    """Return the bytes of the file *path*; raise UsageError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UsageError(f"cannot read {utf8_text(path)}: {reason}") from error

def read_config_text(path):
    """Return the byte-order mark, if any, and the text after it of the config file *path*."""
    data = read_file(path) if os.path.lexists(path) else b""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{utf8_text(path)}: not UTF-8 (at line {line})") from error
    return text[:text.startswith("\ufeff")], text[text.startswith("\ufeff"):]

def read_config():
    """Return the Config in the config file, an empty one where there is none."""
    path = config_path()
    if not os.path.lexists(path):
        return Config(utf8_text(path), None, {}, [])
    config = parse_config(read_config_text(path)[1], utf8_text(path))
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        config.notices.append(f"others can read {config.path}: chmod 600 it")
    return config

def write_private(path, text):
    """Write *text* to the file *path*, whole or not at all, for its owner alone (mode 0600)."""
    from tempfile import mkstemp

    try:
        path = os.path.realpath(path)  # fails where the current folder is gone
        descriptor, temporary = mkstemp(dir=os.path.dirname(path), prefix=".xeroctl-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise UsageError(f"cannot write {utf8_text(path)}: {error.strerror}") from error

def make_private_folder(path):
    """Make the folder *path* and those above it that are missing, for its owner alone (mode 0700).

    Unlike os.makedirs it makes all of them so.  Raise OSError.
    """
    if not os.path.isdir(path):
        make_private_folder(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)

@contextlib.contextmanager
def locked(path):
    """Keep other processes that ask for it from the file or folder *path*, where it can be done."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # not POSIX, or a disk that has no locks
            import fcntl
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield

def change_config(change):
    """Give the config file what *change* makes of its Config; return the new Config.

    That is the name of the current deployment, or None, and the deployments; all else stays.
    """
    path = config_path()
    shown, folder = utf8_text(path), os.path.dirname(path)
    try:
        make_private_folder(folder)
    except OSError as error:
        raise UsageError(f"cannot make {utf8_text(folder)}: {error.strerror}") from error
    with locked(folder):  # not the file, which is replaced
        mark, text = read_config_text(path)
        edited = edited_config(text, shown, *change(parse_config(text, shown)))
        write_private(path, mark + edited)
    return parse_config(edited, shown)

def fetch_key(deployment):
    """Return the API key that the keychain or the command of *deployment* prints.

    The program gets no standard input, since that may be the message.  Raise UsageError.
    """
    import subprocess
    from shlex import split
    from shutil import which

    name, program = deployment.get("api_key_keychain"), deployment.get("api_key_command")
    programs = (["security", "find-generic-password", "-s", name, "-w"],  # macOS
                ["secret-tool", "lookup", "service", name])  # Linux
    try:
        if name:
            words = next((words for words in programs if which(words[0])), None)
            if not words:
                raise UsageError(f"the API key is {name!r} in a keychain, and neither security nor "
                                 f"secret-tool is here to read it: set {ENV_API_KEY}")
            program = words[0]
        else:
            words = split(program) or [program]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot run {program} for the API key: {reason}") from error
    key = done.stdout.decode("utf-8", "replace").partition("\n")[0].strip()
    if done.returncode or not key:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UsageError(f"{program} gave no API key (status {done.returncode})"
                         + (f": {said}" if said else ""))
    return key

def read_history(path):
    """Return the newest entries of the history file *path*, the oldest first."""
    entries = []
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    entries.append(str(parse_json(line)))
    return entries[-MAX_HISTORY_ENTRIES:]

def append_history(path, entry):
    """Add *entry* to the history file *path*, under a lock, and drop the oldest over the limit.

    An entry is one line, a JSON string, since it may hold line ends.  Raise UsageError.
    """
    folder, line = os.path.dirname(path), json.dumps(entry) + "\n"
    try:
        make_private_folder(folder)
        with locked(folder):
            old = read_file(path) if os.path.isfile(path) else b""
            if old and not old.endswith(b"\n"):  # a write that did not come to its end
                line = "\n" + line
            if old.count(b"\n") < MAX_HISTORY_ENTRIES:
                descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "ab") as file:
                    file.write(line.encode())
            else:
                newest = b"\n".join(old.split(b"\n")[-MAX_HISTORY_ENTRIES:])
                write_private(path, newest.decode("utf-8", "replace") + line)
    except OSError as error:
        raise UsageError(f"cannot write {utf8_text(path)}: {error.strerror}") from error

# -- Transport --------------------------------------------------------------------------------

def find_proxy(url):
    """Return the proxy that the environment names for *url*, or None; this machine needs none.

    Raise UsageError for a proxy that does not speak plain HTTP.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    if is_loopback(parts.hostname) or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    try:
        parts = urlsplit(proxy if "://" in proxy else "http://" + proxy)
        usable = parts.scheme == "http" and re.match(r"[!-~]+\Z", parts.netloc) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not parts.hostname:
        raise UsageError(f"cannot use the proxy {proxy.rpartition('@')[2]}: "
                         "it has to be like http://HOST:PORT")
    return parts

@functools.lru_cache(maxsize=None)  # it takes 50 ms to read the authorities
def tls_context(cacert):
    """Return a TLS context that trusts the file *cacert*, or the system's authorities for None."""
    try:
        import ssl
    except ImportError as error:
        raise NetworkError("this Python has no ssl module, which https needs") from error
    try:
        return ssl.create_default_context(cafile=cacert)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot use {cacert} as CA certificates: {reason}") from error

def resolve(host, port, seconds):
    """Return the addresses of *host*; raise OSError, a timeout after *seconds*.

    A thread asks, because the system's resolver heeds neither a time limit nor Ctrl+C.
    """
    import socket
    import threading

    answer = []

    def ask_resolver():
        try:
            answer.append(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=ask_resolver, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise socket.timeout
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]

def connect_error(error, place, seconds, reached):
    """Return the NetworkError for *error*, raised while connecting to *place*.

    *reached* says that it was raised after that, by TLS.
    """
    import socket

    # An SSLError has a reason; a certificate for another host is a ValueError before Python 3.7.
    reason = getattr(error, "reason", None)
    if isinstance(error, socket.timeout) and reached:
        message = (f"no TLS at {place} within {seconds:g} s: is it an http:// address? "
                   "else see --connect-timeout")
    elif isinstance(error, socket.timeout):
        message = f"no connection to {place} within {seconds:g} s: see --connect-timeout"
    elif isinstance(error, (socket.gaierror, UnicodeError)):
        message = f"unknown host: {place}: {getattr(error, 'strerror', 'no host is named so')}"
    elif isinstance(error, ConnectionRefusedError):
        message = f"{place} refused the connection: is the server running?"
    elif reason == "WRONG_VERSION_NUMBER":
        message = f"no TLS at {place}: is it an http:// address?"
    elif reason or "Certificate" in type(error).__name__:
        message = f"TLS with {place} failed: {getattr(error, 'verify_message', '') or error}"
        untrusted = getattr(error, "verify_code", 20) in (2, 18, 19, 20, 21)  # before 3.7 not told
        if reason == "CERTIFICATE_VERIFY_FAILED" and untrusted:
            message += ": for an authority of your own give --cacert FILE or set SSL_CERT_FILE"
    else:
        message = f"cannot connect to {place}: {getattr(error, 'strerror', None) or error}"
    return NetworkError(message, retryable=isinstance(error, ConnectionError))

def tunnel_error(error, place, seconds):
    """Return the error for *error*, raised while asking the proxy *place* for a way through."""
    answer = re.match(r"Tunnel connection failed: ((\d\d\d).*)", str(error))
    if not answer:
        return connect_error(error, place, seconds, False)
    status, message = int(answer.group(2)), f"{place} does not connect us: HTTP {answer.group(1)}"
    if status == 407:
        return RefusedError(f"{message}: {_HINTS[status]}", status)
    return NetworkError(message, status, retryable=may_pass(status))

def exchange_error(error, place, seconds, begun):
    """Return the error for *error*, raised by the connection to *place* once it stood.

    *begun* says that some of the reply's body had come.
    """
    import http.client
    import socket

    if isinstance(error, socket.timeout):
        return NetworkError(f"{place} sent nothing for {seconds:g} s: see --timeout")
    broken = isinstance(error, ConnectionError)
    if begun or isinstance(error, http.client.IncompleteRead):
        return CutShortError(f"the reply was cut short: {place} closed the connection",
                             retryable=broken)
    if isinstance(error, (http.client.HTTPException, ValueError)) and not broken:
        return ServerError(f"{place} does not speak HTTP: {type(error).__name__}")
    return NetworkError(f"{place} closed the connection without an answer", retryable=broken)

def connected_socket(found, deadline):
    """Return a socket connected to one of the addresses *found*; raise OSError.

    Unlike socket.create_connection it keeps one *deadline*, a monotonic time, for all of them.
    """
    import socket

    for left, (family, kind, protocol, _, place) in zip(range(len(found), 0, -1), found):
        connection = None
        try:
            connection = socket.socket(family, kind, protocol)  # fails too, without IPv6
            connection.settimeout(max(0.001, (deadline - time.monotonic()) / left))
            connection.connect(place)
            connection.settimeout(max(0.001, deadline - time.monotonic()))  # for TLS and a proxy
            return connection
        except OSError as error:
            failure = error
            if connection:
                connection.close()
    raise failure

class _Watched:
    """Mixed into http.client's connections: two limits in time, and a trace of what is done."""

    def __init__(self, host, place, settings, trace, **options):
        super().__init__(host, **options)
        self._place, self._settings, self._trace = place, settings, trace
        self._create_connection = self._open

    def connect(self):
        try:
            super().connect()
        except (OSError, ValueError) as error:
            reached = self.sock is not None
            raise connect_error(error, self._place, self.timeout, reached) from error
        if hasattr(self.sock, "getpeercert"):
            version, expires = self.sock.version(), self.sock.getpeercert()["notAfter"]
            self._trace([f"* {version}, the certificate is good until {expires}"],
                        tls={"version": version, "certificate_expires": expires})
        self.sock.settimeout(self._settings.timeout)

    def _tunnel(self):
        try:
            super()._tunnel()
        except OSError as error:
            raise tunnel_error(error, self._place, self.timeout) from error
        self._place = self._tunnel_host  # which speaks from here on, through the proxy

    def _open(self, address, seconds, *unused):
        deadline = time.monotonic() + seconds
        found = resolve(*address, seconds)
        addresses = list(dict.fromkeys(place[0] for *_, place in found))
        self._trace([f"* {address[0]} is {', '.join(addresses)}"], name={"addresses": addresses})
        connection = connected_socket(found, deadline)
        self._trace(["* connected to " + self._place],
                    connection={"address": connection.getpeername()[0]})
        return connection

    def send(self, data):
        if self.sock is None:
            self.connect()
        self._trace(["> " + line for line in redacted_head(data)])
        super().send(data)

class _Head:
    """The head of a response as http.client reads it: whole, and without interim responses."""

    def __init__(self, file):
        self._file = file
        self._started = False
        self._lines = 0

    def readline(self, limit):
        line = self._whole_line(limit)
        while not self._started and re.match(rb"HTTP/\S+ 1(?!01)\d\d", line):  # RFC 9110, 15.2
            while line.strip():
                line = self._whole_line(limit)
            line = self._whole_line(limit)
        self._started = True
        return line

    def _whole_line(self, limit):
        self._lines += 1
        if self._lines > MAX_HEAD_LINES:
            raise ValueError("a head without end")
        line = self._file.readline(limit)
        ours = self._started or b"HTTP/".startswith(line[:5])  # else http.client says what it is
        if ours and not line.endswith(b"\n") and len(line) < limit:
            raise ConnectionResetError("closed in the head")  # which http.client takes for its end
        return line

    def close(self):
        self._file.close()

class _Headed:
    """Mixed into http.client's responses: they begin with a _Head."""

    def begin(self):
        file, self.fp = self.fp, _Head(self.fp)
        try:
            super().begin()
        finally:
            self.fp = self.fp and file

def send_request(request, settings, place, proxy, trace):
    """Send *request* and return http.client's response to it, whatever its status."""
    import base64
    import http.client
    import urllib.request
    from urllib.parse import unquote

    outgoing = urllib.request.Request(request.url, request.body, dict(request.headers),
                                      method=request.method)
    outgoing.timeout = settings.connect_timeout
    if proxy:
        outgoing.set_proxy(proxy.netloc.rpartition("@")[2], "http")
        if proxy.username:
            pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            outgoing.add_header("Proxy-Authorization",
                                "Basic " + base64.b64encode(pair.encode()).decode())
    options = {"place": place, "settings": settings, "trace": trace}
    if outgoing.type == "https":
        options["context"] = tls_context(settings.cacert)  # first: without ssl there is no class
        spoken = http.client.HTTPSConnection
    else:
        spoken = http.client.HTTPConnection
    headed = type("HeadedResponse", (_Headed, http.client.HTTPResponse), {})
    connection = type("Connection", (_Watched, spoken), {"response_class": headed})
    # Without a director around it, the handler follows no redirect and raises for no status.
    return urllib.request.AbstractHTTPHandler().do_open(connection, outgoing, **options)

def inflated(chunks):
    """Yield the bytes of the gzip or zlib stream *chunks*, as they become known."""
    import zlib

    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        for chunk in chunks:
            yield inflater.decompress(chunk)
    except zlib.error as error:
        raise ServerError("the reply is not in the encoding that it claims") from error

def response_chunks(response, place, seconds):
    """Yield the bytes of *response* as they arrive; raise where they end too early."""
    import http.client

    # read1 before Python 3.13 does not count what it reads, so that a length must be counted here.
    missing, begun = response.length, False
    while missing != 0:
        try:
            data = response.read1(min(missing or READ_BYTES, READ_BYTES))
            if not data and missing:
                raise http.client.IncompleteRead(b"")
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: length < 0
            raise exchange_error(error, place, seconds, begun) from error
        if not data:
            return
        missing, begun = missing and missing - len(data), True
        yield data

@contextlib.contextmanager
def heartbeat():
    """Let no wait in the block outlast HEARTBEAT_SECONDS without a look for signals.

    Python looks before it waits in the system, and again when that ends: a Ctrl+C in between,
    or one that another thread was given, would not be seen until the server sends a byte.
    """
    ours = hasattr(signal, "setitimer") and not any(signal.getitimer(signal.ITIMER_REAL))
    try:
        if ours:  # else a limit in time that our parent set, which outlives exec, or not POSIX
            signal.signal(signal.SIGALRM, lambda number, frame: None)
            signal.setitimer(signal.ITIMER_REAL, HEARTBEAT_SECONDS, HEARTBEAT_SECONDS)
        yield
    finally:
        if ours:
            signal.setitimer(signal.ITIMER_REAL, 0)

@contextlib.contextmanager
def open_response(request, settings, trace):
    """Send *request*, yield the Response to it, and close the connection.

    *trace* is called with lists of lines, the exchange without credentials; and, named for the
    step, with a dict of facts when the name, the connection and TLS are done.  Raise NetworkError
    where there is no response, ServerError where it is not HTTP; reading the chunks can raise
    these too, and CutShortError.
    """
    import http.client
    import urllib.error
    from email.utils import formatdate
    from urllib.parse import urlsplit

    proxy = find_proxy(request.url)
    speaker = place = urlsplit(request.url).netloc
    through = ""
    if proxy:
        place = "the proxy " + proxy.netloc.rpartition("@")[2]
        through = " through " + place
        if not request.url.startswith("https:"):
            speaker = place
    with contextlib.ExitStack() as stack:
        stack.enter_context(heartbeat())
        try:
            response = stack.enter_context(send_request(request, settings, place, proxy, trace))
        except (OSError, ValueError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            raise exchange_error(cause, speaker, settings.timeout, False) from error
        version = {10: "1.0"}.get(response.version, "1.1")
        trace([f"< HTTP/{version} {response.status} {response.reason}"]
              + [f"< {name}: {value}" for name, value in response.headers.items()])
        if "Date" not in response.headers:  # as RFC 9110, 6.6.1, wants it
            response.headers["Date"] = formatdate()
        chunks = response_chunks(response, speaker, settings.timeout)
        if response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
            chunks = inflated(chunks)
        yield Response(response.status, response.headers, chunks, through)

# -- Terminal ---------------------------------------------------------------------------------

class Output:
    """Standard output or standard error: UTF-8 for a pipe, what it can show for a terminal.

    It writes through, so that nothing is left to flush when the reader has gone.
    """

    def __init__(self, stream, environ):
        self._fd = stream.fileno() if stream else -1  # closed: writing fails as it should
        self.is_terminal = bool(stream) and stream.isatty()
        self._send = lambda data: os.write(self._fd, data)
        if self.is_terminal and os.name != "posix":  # a console has a code page of its own
            self._send = stream.buffer.raw.write
        self.dumb = not self.is_terminal or (environ.get("TERM") or "dumb") == "dumb"
        self.styled = not self.dumb and not environ.get("NO_COLOR")
        self._encoding = stream.encoding if self.is_terminal else "utf-8"

    def can_show(self, text):
        """Tell whether the encoding has all of *text*."""
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return False
        return True

    def write(self, text):
        """Write *text* whole; raise OSError where that fails."""
        data = text.encode(self._encoding, "replace")
        while data:
            try:
                data = data[self._send(data):]
            except BlockingIOError:  # another process made this pipe non-blocking
                import select
                select.select([], [self._fd], [])

    def is_ready(self):
        """Tell whether a few bytes can be written without a wait."""
        import select

        try:
            return bool(select.select([], [self._fd], [], 0)[1])
        except (OSError, ValueError):  # not POSIX, or closed
            return True

    def width(self):
        """Return the columns of the terminal."""
        try:
            return os.get_terminal_size(self._fd).columns or 80
        except OSError:
            return 80

    def in_foreground(self):
        """Tell whether the terminal is ours to draw on: a background job leaves it alone."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except (AttributeError, OSError):  # not POSIX, or not our controlling terminal
            return True

class Spinner:
    """A line on a terminal that says what we wait for, and for how long, drawn by a thread.

    Elsewhere it does nothing.  Stopping it joins the thread and erases the line, once.
    """

    def __init__(self, output, visible):
        self._output = output
        self._visible = visible
        self._drawn = self._asleep = self._suspendable = False
        self._thread = None

    def __enter__(self):
        self._since = time.monotonic()
        self.say("waiting")
        if self._visible:
            import threading
            self._stopped = threading.Event()
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()  # in which a Ctrl+C may come
            suspend = getattr(signal, "SIGTSTP", None)  # POSIX
            self._suspendable = suspend and signal.getsignal(suspend) == signal.SIG_DFL
            if self._suspendable:
                signal.signal(suspend, self._suspend)
        return self

    def __exit__(self, *exception):
        self.stop()

    def say(self, label, until=None):
        """Show *label* with the seconds since the start, or those left *until* a monotonic time."""
        self._line = " ".join(printable(label).split()), until

    def stop(self):
        """Leave the line as it was."""
        if self._thread:
            self._stopped.set()
            with contextlib.suppress(RuntimeError):  # it did not start, and then draws nothing
                self._thread.join()
            self._thread = None
            if self._suspendable:
                signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            if self._drawn:
                self._draw("")

    def _suspend(self, number, frame):
        self._asleep = True
        self._draw("")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # and here we stand until the shell resumes us
        signal.signal(number, self._suspend)
        self._asleep = False

    def _run(self):
        for frame in itertools.cycle("|/-\\"):
            if self._stopped.wait(0.1):
                return
            if self._output.in_foreground() and not self._asleep:
                label, until = self._line
                now = time.monotonic()
                seconds = now - self._since if until is None else max(0, until - now)
                self._drawn = True
                self._draw(cut(f"{frame} {label} {seconds:.0f}s", self._output.width() - 1))

    def _draw(self, line):
        with contextlib.suppress(OSError):
            self._output.write(f"\r{line}\x1b[K")

class Terminal:
    """The process's three streams.  Whatever is written stops the spinner first."""

    def __init__(self, stdin, stdout, stderr, environ):
        self._stdin, self._unread = stdin, b""
        self.out = Output(stdout, environ)
        self.err = Output(stderr, environ)
        self.json = self.quiet = self.verbose = False
        self.secret = None  # never shown on stderr
        self._spinner = Spinner(self.err, False)  # the last one

    def read_stdin(self, even_typed):
        """Return all of standard input, typed at a terminal only if *even_typed*; else None."""
        if self._stdin is None or self._stdin.isatty() and not even_typed:
            return None
        return self._unread + b"".join(iter(self._read, b""))

    def is_typed_at(self):
        """Tell whether a person types at standard input."""
        return self._stdin is not None and self._stdin.isatty()

    def typed_encoding(self):
        """Return the encoding of what is typed; where Python has ASCII for it, it is UTF-8."""
        from codecs import lookup

        encoding = lookup(self._stdin.encoding).name
        return "utf-8" if encoding == "ascii" else encoding

    def read_line(self, prompt):
        """Return the next line typed, without its end; raise EOFError at the end of the input."""
        if self.out.is_terminal:
            return self._typed(input, prompt)
        with contextlib.suppress(OSError):  # the prompt is no part of the answer
            self.err.write(prompt)
        return self.read_piped_line().decode("utf-8", "replace").rstrip("\n")

    def read_secret(self, prompt):
        """Return a line that is typed without being shown, or the next one of a pipe."""
        if self.is_typed_at():
            from getpass import getpass
            return self._typed(getpass, prompt).strip()
        return self.read_piped_line().decode("utf-8", "replace").strip()

    def _typed(self, read, prompt):
        try:
            return read(prompt)
        except UnicodeDecodeError:
            raise UsageError("what was typed is no text in the terminal's encoding") from None

    def read_piped_line(self):
        """Return the bytes of the next line of standard input; raise EOFError at its end."""
        while self._stdin and b"\n" not in self._unread:
            data = self._read()
            self._unread += data
            if not data:
                break
        line, end, self._unread = self._unread.partition(b"\n")
        if not line + end:
            raise EOFError
        return line + end

    def _read(self):
        while True:
            try:
                return os.read(self._stdin.fileno(), READ_BYTES)
            except BlockingIOError:  # another process made this pipe non-blocking
                import select
                select.select([self._stdin], [], [])
            except OSError as error:
                raise InputError(f"cannot read standard input: {error.strerror}") from error

    def set_echo(self, on):
        """Show what is typed, or keep it off the screen until the next prompt shows it."""
        try:
            import termios
        except ImportError:  # not POSIX
            return
        with contextlib.suppress(termios.error):
            if self.err.in_foreground():
                mode = termios.tcgetattr(self._stdin)
                mode[3] = mode[3] | termios.ECHO if on else mode[3] & ~termios.ECHO
                termios.tcsetattr(self._stdin, termios.TCSANOW, mode)

    def spinner(self):
        """Return a Spinner on stderr, for a with statement."""
        self._spinner = Spinner(self.err, self.err.styled and not self.quiet)
        return self._spinner

    def answer(self, text):
        """Write *text* to stdout, nothing in it driving a terminal.

        Raise BrokenPipeError where the reader has gone, OutputError for any other failure.
        """
        self._spinner.stop()
        try:
            self.out.write(printable(text) if self.out.is_terminal else text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to stdout: {error.strerror}") from error

    def say(self, line, dim=False):
        """Write *line* to stderr; where that cannot be done there is nobody to tell."""
        self._spinner.stop()
        line = redacted(printable(line.replace("\n", " ")), self.secret)
        with contextlib.suppress(OSError):
            self.err.write(f"\x1b[2m{line}\x1b[0m\n" if dim and self.err.styled else line + "\n")

    def notice(self, *sentences):
        """Tell the user what is no failure, a line each, unless asked to be quiet."""
        for sentence in sentences if not self.quiet else ():
            if self.json:
                self._say_object(kind="notice", message=sentence)
            else:
                self.say("xeroctl: note: " + sentence)

    def error(self, error):
        """Report the XeroctlError *error* in one line, with -o json as an object."""
        if self.json:
            self._say_object(kind=error.kind, message=str(error), **vars(error))
        else:
            self.say(f"xeroctl: {error}")

    def report(self, kind, pairs):
        """Write the (name, value) *pairs* to stderr, a line each, with -o json as one object."""
        if self.json:
            self._say_object(kind=kind, **dict(pairs))
        else:
            for name, value in pairs:
                self.say(f"{name.replace('_', ' ')}: {value}", dim=True)

    def trace(self, lines, **facts):
        """Show *lines* of the HTTP exchange if asked to."""
        for line in lines if self.verbose else ():
            self.say(line, dim=True)

    def _say_object(self, **fields):  # redacted before a key with a quote in it is escaped
        self.say(json.dumps({name: redacted(value, self.secret) if isinstance(value, str) else value
                             for name, value in fields.items()}))

# -- Rendering --------------------------------------------------------------------------------

class TextRenderer:
    """Show an answer as its text: as it comes if *streamed*, else in one piece at the end.

    One piece is one write, so that processes that share a pipe do not mix short answers.
    """

    def __init__(self, terminal, streamed):
        self._terminal, self._streamed = terminal, streamed
        self._held = self._last = ""
        self.begun = False

    def show(self, document, source, text):
        """Show the *text* of a chunk or reply."""
        self.begun = self.begun or bool(text)
        if not self._streamed:
            self._held += text
        elif text:
            self._last = text[-1]  # first: a Ctrl+C may come during the write
            self._terminal.answer(text)

    def forget(self):
        """Drop what is held: there is none, since no text came of a try that is made again."""

    def finish(self):
        """End the answer with one newline, its own or ours."""
        rest, self._held, self._streamed = self._held, "", True
        self.show(None, None, rest if (rest or self._last)[-1:] == "\n" else rest + "\n")

class JsonRenderer:
    """Show the server's own objects: a line each if *streamed*, else the one, for a reader."""

    def __init__(self, terminal, streamed):
        self._terminal, self._streamed = terminal, streamed
        self._held = None
        self.begun = False

    def show(self, document, source, text):
        """Show the chunk or reply *document* with every field it has, as its *source* if known."""
        if self._held:  # a second one: a stream, though we asked for none
            self._streamed = True
            self.finish()
        if self._streamed:
            self._write(document, source)
        else:
            self._held, self.begun = (document, source), self.begun or bool(text)

    def forget(self):
        """Drop what is held: the try that it came from failed."""
        self._held = None

    def finish(self):
        """Write what is still to be shown."""
        if self._held:
            held, self._held = self._held, None
            self._write(*held)

    def _write(self, document, source):
        layout = {"separators": (",", ":")} if self._streamed else {"indent": 2}
        try:
            if source is None or not self._streamed:
                source = json.dumps(document, ensure_ascii=False, **layout)
        except RecursionError as error:
            raise ServerError("the reply is nested too deeply to print") from error
        if not self._terminal.out.can_show(source):  # a lone surrogate no encoding has
            source = re.sub("[^\x00-\x7f]+", lambda match: json.dumps(match.group())[1:-1], source)
        self.begun = True
        self._terminal.answer(source + "\n")

def show_json(document, terminal):
    """Show *document* on stdout."""
    renderer = JsonRenderer(terminal, False)
    renderer.show(document, None, "")
    renderer.finish()

def show_rows(document, names, rows, terminal):
    """Show *rows* of texts: on a terminal as a table under *names*, else separated by tabs.

    With -o json show the *document* that they are from.
    """
    if terminal.json:
        show_json(document, terminal)
        return
    rows = [[" ".join(printable(cell).split()) for cell in row] for row in rows]
    if terminal.out.is_terminal:
        rows.insert(0, [name.upper() for name in names])
        widths = [max(map(columns_of, column)) for column in zip(*rows)]
        lines = ["  ".join(cell + " " * (width - columns_of(cell))
                           for cell, width in zip(row, widths)).rstrip() for row in rows]
        width = terminal.out.width()
        lines = [cut(line, width - 1) + ">" if columns_of(line) > width else line
                 for line in lines]
    else:
        lines = ["\t".join(row) for row in rows]
    terminal.answer("".join(line + "\n" for line in lines))

def report_reply(reply, streamed, show_usage, terminal):
    """Tell on stderr how *reply* ended and what it took."""
    notice = finish_notice(reply)
    if notice:
        terminal.notice(notice)
    if streamed and not terminal.json and not terminal.quiet:
        terminal.say(footer_line(reply), dim=True)
    if show_usage:
        terminal.report("token_usage", usage_fields(reply, streamed))

# -- Exchange ---------------------------------------------------------------------------------

def read_error_body(chunks):
    """Return the first bytes of an error's body, as far as they came."""
    data = bytearray()
    with contextlib.suppress(XeroctlError):
        for chunk in chunks:
            data += chunk
            if len(data) >= MAX_ERROR_BYTES:
                break
    return bytes(data[:MAX_ERROR_BYTES])

def stream_documents(chunks):
    """Yield each document of an event stream, and its text where that is one line, up to [DONE].

    Raise CutShortError where that does not come.
    """
    decoder = EventDecoder()
    for chunk in chunks:
        for event in decoder.feed(chunk):
            data = event.data.strip()
            if event.name == "message" and data == "[DONE]":
                return
            if event.name == "error" or event.name == "message" and data:
                yield event_document(event), None if "\n" in data else data
    raise CutShortError("the reply was cut short: the stream ended before its end")

def whole_document(chunks, through):
    """Return the one document that *chunks* are; raise ServerError where they are not JSON."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > MAX_REPLY_BYTES:
            raise ServerError(f"the reply is over {MAX_REPLY_BYTES >> 20} MiB")
    try:
        return parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        what = "an HTML page" if data.lstrip().startswith(b"<") else "not JSON" if data else "empty"
        raise ServerError(f"the reply{through} is {what}: check the base URL") from error

def documents(response, streamed):
    """Yield each JSON document of *response*, the chunks of a stream or the one that it is.

    With it comes its text, or None where that is not one line.  What a server calls it counts
    first, then whether we asked for a stream and it looks like one.
    """
    kind = response.headers.get("Content-Type", "").lower()
    first = next(response.chunks, b"")
    chunks = itertools.chain([first], response.chunks)
    looks_whole = "json" in kind or first.lstrip()[:1] in (b"{", b"<")
    if "event-stream" in kind or streamed and not looks_whole:
        yield from stream_documents(chunks)
    else:
        yield whole_document(chunks, response.through), None

def check_status(response, request, settings):
    """Raise the error that *response* to *request* stands for, if it is one by its HTTP status."""
    if not 200 <= response.status <= 299:
        address = f" at {request.url}" if response.status == 404 else ""
        raise parse_error(read_error_body(response.chunks), response.status, response.headers,
                          settings.api_key, address + response.through)

def receive(request, settings, trace):
    """Send *request* once and return the JSON document that answers it, empty for HTTP 204."""
    with open_response(request, settings, trace) as response:
        check_status(response, request, settings)
        if response.status == 204:
            return {}
        document = whole_document(response.chunks, response.through)
        # Not is_error: what answers here may be a list, or have a message.
        if field(document, "error", (str, dict)) or field(document, "object", str) == "error":
            raise build_error(document, 200, response.headers, settings.api_key)
        return document

def exchange(request, settings, trace, renderer, reply, spinner):
    """Send *request* once, show the answer as it comes, and add it to *reply*."""
    sent = time.monotonic()
    with open_response(request, settings, trace) as response:
        check_status(response, request, settings)
        try:
            for document, source in documents(response, request.streamed):
                if is_error(document):
                    raise build_error(document, 200, response.headers, settings.api_key)
                text = reply.add(document)
                if reply.first_token_seconds is None and reply.begun:
                    reply.first_token_seconds = time.monotonic() - sent
                if reply.begun and not reply.chunks:
                    spinner.say("thinking")
                renderer.show(document, source, text)
        except (CutShortError, NetworkError):
            if not reply.finish_reason:  # with one the answer is whole, however the wire broke
                raise
    if not reply.begun and not reply.finish_reason:
        raise ServerError("the reply holds no answer")
    renderer.finish()
    reply.seconds = time.monotonic() - sent

def pause(error, seconds, terminal):
    """Wait *seconds* before another try, and let the user see that we do, and why."""
    reason = str(error).partition(": ")[0]  # without the advice
    if not terminal.err.styled:
        terminal.notice(f"{reason}, trying again in {seconds:.1f} s")
    with terminal.spinner() as spinner, heartbeat():
        spinner.say(reason + ", trying again in", time.monotonic() + seconds)
        time.sleep(seconds)

def retried(request, attempt, begun, settings, terminal):
    """Return what *attempt*, given a Spinner, returns; call it again after what may pass.

    Once *begun* returns true there is no other try.  Raise Page, *request* as a curl line, for a
    dry run.
    """
    if settings.dry_run:
        raise Page(curl_line(request, settings) + "\n")
    for count in itertools.count(1):
        try:
            with terminal.spinner() as spinner:
                return attempt(spinner)
        except XeroctlError as error:
            if begun() or not error.retryable or count > settings.retries:
                raise
            from random import random
            pause(error, retry_delay(count, error.retry_after, random()), terminal)

def fetch(request, settings, terminal):
    """Send *request* and return the JSON document that answers it; retry what may be retried."""
    return retried(request, lambda spinner: receive(request, settings, terminal.trace),
                   lambda: False, settings, terminal)

def ask(request, settings, terminal, renderer, reply):
    """Send *request*, show the answer through *renderer* as it comes, and add it to *reply*.

    What may be retried is, as long as no token came and nothing was shown.
    """
    def attempt(spinner):
        reply.forget()
        renderer.forget()
        exchange(request, settings, terminal.trace, renderer, reply, spinner)

    try:
        retried(request, attempt, lambda: reply.begun or renderer.begun, settings, terminal)
    except BaseException as error:
        # At a signal a newline is not worth the wait for a reader that has stopped.
        if renderer.begun and (isinstance(error, Exception) or terminal.out.is_ready()):
            with contextlib.suppress(OSError, OutputError):  # what happened first counts
                renderer.finish()
        raise

# -- Practice endpoint ------------------------------------------------------------------------

PRACTICE_OPENINGS = ("Hello from the practice endpoint!", "The practice endpoint speaking.",
                     "You have reached the practice endpoint.")
PRACTICE_QUESTIONS = ("What do koalas eat?", "Name three colours.")  # of the stored samples
PRACTICE_FIRST_TOKEN_SECONDS = 0.4
PRACTICE_TOKEN_SECONDS = 0.02

def practice_reply(body):
    """Return the words that answer the request *body*, the reason for their end, and the usage."""
    from random import Random

    words = re.findall(r"\S+\s*", (
        f"{Random(body.get('seed')).choice(PRACTICE_OPENINGS)} No model reads this: it runs inside "
        f"xeroctl, for trying things out. You wrote: {body['messages'][-1]['content']}\n\n"
        f"To talk to a real endpoint, put its key into {ENV_API_KEY} and run:\n"
        "xeroctl chat --base-url https://api.xerotier.ai/PROJECT/v1 --endpoint SLUG -m Hello\n"))
    prompt = sum(len(message["content"].split()) for message in body["messages"])
    sent = words[:body.get("max_tokens", len(words))]
    usage = {"prompt_tokens": prompt, "completion_tokens": len(sent),
             "total_tokens": prompt + len(sent)}
    return sent, "length" if len(sent) < len(words) else "stop", usage

def practice_chunks(words, finish_reason, usage, common):
    """Yield the chunks of a stream of *words*; *common* is what each of them begins with."""
    common = dict(common, object="chat.completion.chunk")
    for word in words:
        yield dict(common, choices=[{"index": 0, "delta": {"content": word}}])
    yield dict(common, choices=[{"index": 0, "delta": {}, "finish_reason": finish_reason}])
    yield dict(common, choices=[], usage=usage)

def practice_completion(body, stored):
    """Return the documents that answer the request *body*, which may ask to have it *stored*.

    That is a dict of (completion, messages) by id.
    """
    words, finish_reason, usage = practice_reply(body)
    common = {"id": f"chatcmpl-practice-{len(stored) + 1}", "created": int(time.time()),
              "model": "practice"}
    message = {"role": "assistant", "content": "".join(words)}
    whole = dict(common, object="chat.completion", usage=usage,
                 metadata=body.get("metadata") or {}, choices=[
                     {"index": 0, "message": message, "finish_reason": finish_reason}])
    if body.get("store"):
        stored[whole["id"]] = whole, body["messages"]
    return practice_chunks(words, finish_reason, usage, common) if body.get("stream") else [whole]

def practice_samples():
    """Return what is stored before anyone asks for it."""
    stored = {}
    for place, question in enumerate(PRACTICE_QUESTIONS, 1):
        practice_completion({"store": True, "seed": place, "metadata": {"sample": str(place)},
                             "messages": [{"role": "user", "content": question}]}, stored)
    return stored

def practice_list(query, stored):
    """Return the list of the *stored* completions that *query*, a dict of texts, asks for."""
    tags = {name[len("metadata["):-1]: value for name, value in query.items() if "[" in name}
    found = [whole for whole, _ in stored.values()
             if tags.items() <= whole["metadata"].items()
             and query.get("model", "practice") == "practice"]
    found = found[::-1] if query.get("order") == "desc" else found
    ids = [whole["id"] for whole in found]
    start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
    end = start + int(query.get("limit", 20))
    return {"object": "list", "data": found[start:end], "has_more": end < len(found)}

def practice_answer(method, target, body, stored):
    """Return the HTTP status and the documents that answer a request."""
    from urllib.parse import parse_qsl

    path, _, query = target.partition("?")
    _, _, path = path.partition("/v1")
    name, _, part = path[len(CHAT_PATH) + 1:].partition("/")
    if path == CHAT_PATH and method == "POST":
        time.sleep(PRACTICE_FIRST_TOKEN_SECONDS)
        return 200, practice_completion(body, stored)
    if path == CHAT_PATH:
        return 200, [practice_list(dict(parse_qsl(query, keep_blank_values=True)), stored)]
    if path == "/models":
        return 200, [{"object": "list", "data": [{"id": "practice", "object": "model"}]}]
    if name not in stored or part not in ("", "messages"):
        return 404, [{"error": {"message": f"there is no {name or path} here",
                                "code": "not_found"}}]
    whole, messages = stored[name]
    if part:
        return 200, [{"object": "list", "data": messages, "has_more": False}]
    if method == "POST":
        whole["metadata"] = body["metadata"]
    if method == "DELETE":
        del stored[name]
        return 200, [{"id": name, "object": "chat.completion.deleted", "deleted": True}]
    return 200, [whole]

@contextlib.contextmanager
def practice_endpoint():
    """Serve a stand-in for an endpoint on a loopback port, and yield its base URL."""
    import threading
    from http.server import BaseHTTPRequestHandler
    from socketserver import TCPServer, ThreadingMixIn

    stored = practice_samples()

    def ignore(*args):
        pass

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length).decode() or "{}")
            status, answers = practice_answer(self.command, self.path, body, stored)
            streamed = body.get("stream")
            self.send_response(status)
            kind = "text/event-stream" if streamed else "application/json"
            self.send_header("Content-Type", kind)
            self.end_headers()
            for data in map(json.dumps, answers):
                self.wfile.write(f"data: {data}\n\n".encode() if streamed else data.encode())
                time.sleep(PRACTICE_TOKEN_SECONDS if streamed else 0)
            if streamed:
                self.wfile.write(b"data: [DONE]\n\n")

        do_POST = do_DELETE = do_GET

        log_message = ignore

    class Server(ThreadingMixIn, TCPServer):
        daemon_threads, handle_error = True, ignore  # errors are of clients that went away

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/practice/v1"
        finally:
            server.shutdown()

# -- Chat -------------------------------------------------------------------------------------

def folder_names(folder):
    """Return the names in *folder*, which may start with ~, a slash after those of folders."""
    path = os.path.expanduser(folder) or "."
    try:
        return [name + "/" * os.path.isdir(os.path.join(path, name)) for name in os.listdir(path)]
    except OSError:
        return []

def complete_line(line, commands):
    """Return the lines that *line* may become: slash commands, file names after some of them."""
    name, space, start = line.partition(" ")
    if not line.startswith("/"):
        return []
    if not space:
        return [command.name + (" " if command.argument else "") for command in commands
                if command.name.startswith(name)]
    if not any(command.name == name and command.argument == "FILE" for command in commands):
        return []
    folder = start[:start.rfind("/") + 1]
    return [f"{name} {folder}{found}" for found in sorted(folder_names(folder))
            if found.startswith(start[len(folder):])
            and (start[len(folder):] or not found.startswith("."))]

class LineEditor:
    """Reads lines typed at a terminal: with readline, and its history, where this Python has it."""

    def __init__(self, terminal, history_path, commands):
        self._terminal = terminal
        self._history_path = history_path
        self._before, self._after = "", ""
        self.abandoned = None  # what stood on the line when Ctrl+C ended it
        self._armed = self._reading = False
        self.ends_line = not terminal.out.dumb  # at the end of the input, as readline does
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            import readline
            readline.set_auto_history(False)
        except (ImportError, AttributeError):  # PyPy's is another one
            self._readline, self.ends_line = None, False
            return
        self._readline = readline
        self._commands, self._matches = commands, []
        readline.set_completer_delims("")  # a line is completed as a whole: file names have spaces
        readline.set_completer(self._complete)
        backend = getattr(readline, "backend", readline.__doc__ or "")  # an attribute since 3.13
        if "editline" in backend or "libedit" in backend:
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            if not terminal.out.dumb:
                readline.parse_and_bind("set enable-bracketed-paste on")
            if terminal.out.styled:  # \1 and \2 tell readline that what they enclose has no width
                self._before, self._after = "\1\x1b[1m\2", "\1\x1b[0m\2"
        for entry in read_history(history_path):
            self._recall(entry)

    def arm(self):
        """Let one Ctrl+C raise KeyboardInterrupt; further ones are dropped until the next call."""
        self._interruption, self._armed = KeyboardInterrupt(), True

    def read(self, prompt):
        """Return the next line; raise EOFError at the end of the input."""
        self.abandoned, self._reading = None, True
        try:
            line = self._terminal.read_line(self._before + prompt + self._after)
        except KeyboardInterrupt:
            self._armed = False
            raise
        finally:
            self._reading = False
        return typed_text(line)

    def remember(self, entry):
        """Put *entry* into the history, of this session and of those to come."""
        self._recall(entry)
        if self._history_path:
            try:
                append_history(self._history_path, entry)
            except UsageError as error:
                self._terminal.notice(f"no history: {error}")
                self._history_path = None

    def _recall(self, entry):
        if self._readline:  # which wants no NUL, and in any locale takes bytes in disguise
            data = entry.replace("\0", "").encode(self._terminal.typed_encoding(), "replace")
            self._readline.add_history(data.decode("ascii", "surrogateescape"))

    def _interrupt(self, number, frame):
        if self._armed:  # else what the last one led to is still being done
            # input() may call us again with the first one raised; then all that works is to raise
            # what is there: any call, even that of an exception's class, is a SystemError.
            self._armed = self._reading
            if self._reading and self._readline and self.abandoned is None:
                self.abandoned = self._readline.get_line_buffer()  # which it is about to forget
            raise self._interruption

    def _complete(self, text, state):
        if state == 0:
            self._matches = complete_line(text, self._commands)
        return self._matches[state] if state < len(self._matches) else None

class Chat:
    """One interactive session: the conversation, its totals, and what every command may use."""

    def __init__(self, sampling, settings, terminal, commands, conversation, show_usage):
        self.sampling, self.settings, self.terminal = sampling, settings, terminal
        self.commands, self.conversation, self.show_usage = commands, conversation, show_usage
        self.typed_at = terminal.is_typed_at()
        self.editor = (
            LineEditor(terminal, state_path("history"), commands) if self.typed_at else None)
        self.model = sampling.model
        self.totals = Totals(0, 0, True)
        self.unsaved = False

def as_typed(message):
    """Return the line that sends *message*, also where it looks like a command."""
    return " " + message if message.startswith("/") else message

def show(chat, text):
    """Show the lines of *text* to the person, not on stdout."""
    for line in text.split("\n"):
        chat.terminal.say(line)

def send(chat, question, turns):
    """Ask *question* after *turns*; with the answer, even a part of one, they are the conversation.

    Where no answer came it stays as it is.
    """
    context = Conversation(chat.conversation.system, turns)
    request = build_chat_request(chat.sampling, chat.settings, context.messages(question), True)
    reply, renderer = Reply(), TextRenderer(chat.terminal, True)
    complete = interrupted = False
    replacing = len(turns) < len(chat.conversation.turns)
    try:
        if chat.typed_at:
            chat.terminal.set_echo(False)  # until the next prompt
        ask(request, chat.settings, chat.terminal, renderer, reply)
        complete = True
    except KeyboardInterrupt:
        if not chat.typed_at:
            raise
        interrupted = True
        if not reply.text:
            show(chat, "stopped: " + (
                "the old answer stays" if replacing else "Up brings the question back"))
    finally:
        if reply.text.strip() and (complete or interrupted or not replacing):
            chat.conversation.turns = context.turns + [(question, reply.text)]
            chat.unsaved = True
        usage = reply.usage
        chat.model = chat.sampling.model or reply.model or chat.model
        chat.totals = Totals(
            chat.totals.prompt + (usage.prompt or 0),
            chat.totals.completion
            + (reply.chunks if usage.completion is None else usage.completion),
            chat.totals.exact and (usage.completion is not None or not reply.begun))
    if complete:
        report_reply(reply, True, chat.show_usage, chat.terminal)

def save(chat, path):
    """Write the conversation to the file *path*."""
    saved_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_private(path, saved_document(
        chat.conversation, chat.settings.endpoint, chat.model, saved_at))
    chat.unsaved = False

def do_help(chat, argument):
    """Show the commands and the keys."""
    for command in chat.commands:
        show(chat, f"  {command.name + ' ' + command.argument:<16}{command.summary}")
    show(chat, """
  Up, Down        recall earlier inputs
  Tab             complete commands, and file names after /save and /load
  Ctrl+A, Ctrl+E  to the start, to the end of the line
  Ctrl+U, Ctrl+K  delete to the start, to the end of the line
  Ctrl+W          delete the word before the cursor
  Ctrl+C          clear the line; stop a reply and keep what came of it
  Ctrl+D          end the session
  \\ at the end    continue on the next line; a pasted block is one message""")

def do_clear(chat, argument):
    """Forget the turns."""
    chat.conversation.turns = []
    chat.unsaved = False

def do_system(chat, argument):
    """Set the system message, or show it."""
    if argument:
        chat.conversation.system = argument
        chat.unsaved = bool(chat.conversation.turns)
    show(chat, "system: " + (chat.conversation.system or "none"))

def do_save(chat, argument):
    """Save the conversation, over nothing but a saved conversation."""
    path = native_path(argument)
    if os.path.lexists(path):
        found = None
        with contextlib.suppress(ValueError):
            found = os.path.isfile(path) and parse_json(read_file(path).decode("utf-8"))
        if field(found, "format", str) != CONVERSATION_FORMAT:
            raise UsageError(f"{path} is there, and no saved conversation: choose another name")
    save(chat, path)
    show(chat, f"saved {2 * len(chat.conversation.turns)} messages to {path}")

def do_load(chat, argument):
    """Replace the conversation, once the file is found good."""
    path = native_path(argument)
    data = read_file(path)
    try:
        conversation, question = parse_conversation(decode_prompt(data, "it"))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    chat.conversation, chat.unsaved = conversation, False
    show(chat, f"loaded {2 * len(conversation.turns)} messages from {path}")
    if question and chat.editor:
        chat.editor.remember(as_typed(question))
        show(chat, "its last question has no answer: Up brings it back")

def do_tokens(chat, argument):
    """Show the session's totals."""
    show(chat, token_counts(chat.totals, "tokens: {prompt} prompt, {completion} completion; ")
         + f"messages: {2 * len(chat.conversation.turns)}")

def do_retry(chat, argument):
    """Ask the last question again; its old answer stays until a new one, or what Ctrl+C left."""
    if not chat.conversation.turns:
        raise UsageError("nothing to ask again yet")
    *turns, (question, _) = chat.conversation.turns
    send(chat, question, turns)

def do_undo(chat, argument):
    """Take the last turn back."""
    if not chat.conversation.turns:
        raise UsageError("nothing to take back")
    question, _ = chat.conversation.turns.pop()
    chat.unsaved = bool(chat.conversation.turns)
    show(chat, "took back: " + cut(" ".join(question.split()), 60))

def do_edit(chat, argument):
    """Send what an editor leaves in a private file, which stays where it cannot be sent."""
    import subprocess
    from shlex import split
    from shutil import rmtree
    from tempfile import mkdtemp

    if not chat.typed_at:
        raise UsageError("/edit needs a terminal")
    usual = "vi" if os.name == "posix" else "notepad"
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or usual
    folder = mkdtemp(prefix="xeroctl-")  # mode 0700
    path = os.path.join(folder, "message.txt")
    write_private(path, argument)
    # Ctrl+C is the editor's; unlike SIG_IGN a handler of our own is not handed down to it.
    ours = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        status = subprocess.call(split(editor) + [path])
    except (OSError, ValueError) as error:
        rmtree(folder)
        raise UsageError(f"cannot run {editor}: {error}: set VISUAL or EDITOR") from error
    except Terminated:
        chat.terminal.say(f"xeroctl: what {editor} saved is in {path}")
        raise
    finally:
        signal.signal(signal.SIGINT, ours)
    text = decode_prompt(read_file(path), path)
    changed = text.strip() not in ("", argument)
    if status and changed:
        raise UsageError(f"{editor} failed: nothing was sent: what it saved is in {path}")
    rmtree(folder)
    if status or not changed:
        raise UsageError(f"nothing was sent: {editor} failed, or left the file as it was or empty")
    chat.editor.remember(as_typed(text))
    send(chat, text, chat.conversation.turns)

def do_quit(chat, argument):
    """End the session."""
    raise EOFError

CHAT_COMMANDS = (
    ChatCommand("/help", "", do_help, "show this"),
    ChatCommand("/clear", "", do_clear, "forget the conversation, keep the system message"),
    ChatCommand("/system", "TEXT", do_system, "set the system message; show it without TEXT"),
    ChatCommand("/save", "FILE", do_save, "save the conversation as JSON"),
    ChatCommand("/load", "FILE", do_load, "replace the conversation by a saved one"),
    ChatCommand("/tokens", "", do_tokens, "show the session's token totals"),
    ChatCommand("/retry", "", do_retry, "ask the last question again, replace the answer"),
    ChatCommand("/undo", "", do_undo, "take the last question and answer back"),
    ChatCommand("/edit", "TEXT", do_edit, "write the message in $VISUAL or $EDITOR"),
    ChatCommand("/quit", "", do_quit, "end the session, show its token totals"),
)

def handle(chat, line):
    """Do what one input asks for: a slash command, else a message to send."""
    if not line.strip():
        return
    if chat.editor:
        chat.editor.remember(line)
    if not line.startswith("/"):
        send(chat, line[line.startswith(" /"):].rstrip(), chat.conversation.turns)
        return
    name, _, argument = line.partition(" ")
    for command in chat.commands:
        if command.name == name:
            command.run(chat, argument.strip())
            return
    from difflib import get_close_matches

    nearest = get_close_matches(name, [command.name for command in chat.commands], 1, 0)[0]
    raise UsageError(f"no command {name}: did you mean {nearest}? "
                     "A space in front sends the line as a message")

def read_input(chat):
    """Return what the person types next, or the next line of a pipe; raise EOFError at the end."""
    if not chat.typed_at:
        return decode_prompt(chat.terminal.read_piped_line(), "standard input")
    chat.terminal.set_echo(True)
    if not chat.terminal.quiet:
        chat.terminal.say(status_bar(
            chat.settings.endpoint, chat.model, chat.totals, len(chat.conversation.turns),
            chat.terminal.err.width()), dim=True)
    line = chat.editor.read("> ")
    while line.endswith("\\"):
        try:
            line = line[:-1] + "\n" + chat.editor.read(". ")
        except BaseException:
            chat.editor.remember(line)
            raise
    return line

def take_input(chat, first):
    """Do what the next input asks for, *first* if that is one; return the status of a failure.

    Report that too.  Raise EOFError at the end of the inputs.
    """
    reading = True
    try:
        if chat.editor:
            chat.editor.arm()
        line = first or read_input(chat)
        reading = False
        handle(chat, line)
    except KeyboardInterrupt:
        if not chat.typed_at:
            raise
        if reading:
            show(chat, "" if chat.editor.abandoned else "\nCtrl+D or /quit ends the session")
    except EOFError:
        if chat.typed_at and not chat.terminal.is_typed_at():  # the terminal was closed
            raise Terminated(getattr(signal, "SIGHUP", signal.SIGTERM)) from None
        if reading and chat.typed_at and not chat.editor.ends_line:
            show(chat, "")
        raise
    except (InputError, OutputError):
        raise
    except XeroctlError as error:
        chat.terminal.error(error)
        return error.exit_status
    return EXIT_OK

def chat_loop(chat, first):
    """Take inputs until their end, *first* before all others; return the exit status.

    A failure is no reason to end; with a pipe the first one decides the status.
    """
    status = EXIT_OK
    while True:
        try:
            failed, first = take_input(chat, first), None
            status = status or failed
        except EOFError:
            return EXIT_OK if chat.typed_at else status
        except KeyboardInterrupt:  # one more, before the last one was dealt with
            if not chat.typed_at:
                raise
            first = None

def keep(chat):
    """Save a conversation that is about to be lost, and say where."""
    path = state_path(time.strftime("recovered-%Y%m%d-%H%M%S-") + f"{os.getpid()}.json")
    try:
        make_private_folder(os.path.dirname(path))
        save(chat, path)
    except (OSError, UsageError) as error:
        chat.terminal.say(f"xeroctl: the conversation is lost: {error}")
    else:
        chat.terminal.say(f"xeroctl: the conversation is kept: /load {path}")

# -- Commands ---------------------------------------------------------------------------------

@contextlib.contextmanager
def practice_settings(options):
    """Yield the Settings of a practice endpoint, which lives until the end."""
    if options.base_url or options.context:
        raise UsageError("--demo brings its own endpoint: give no --base-url or --context with it")
    with practice_endpoint() as base_url:
        options.base_url, options.endpoint = base_url, options.endpoint or DEMO_ENDPOINT
        settings = resolve_settings(options, {}, Config("", None, {}, []), fetch_key)
        yield settings._replace(sources=dict(settings.sources, base_url="--demo"))

@contextlib.contextmanager
def open_settings(options, terminal, endpoint_needed=True):
    """Yield the Settings for *options*, of which the terminal is told what it needs to know."""
    with contextlib.ExitStack() as stack:
        if options.demo:
            settings = stack.enter_context(practice_settings(options))
        else:
            if options.api_key == "-":
                raise UsageError("--api-key - is for config add alone")
            unused = options.dry_run or endpoint_needed and not options.endpoint
            kept_key = (lambda deployment: "-") if unused else fetch_key
            settings = resolve_settings(options, environment(), read_config(), kept_key)
        terminal.json, terminal.secret = settings.output == "json", settings.api_key
        if endpoint_needed and not settings.endpoint:
            raise UsageError("no endpoint: give --endpoint SLUG, or --demo to try without one")
        terminal.notice(*settings.notices)
        yield settings

def system_prompt(options):
    """Return the text of --from-file, else of --system, else None."""
    if options.from_file:
        return decode_prompt(read_file(options.from_file), options.from_file)
    return options.system

def first_message(options, terminal):
    """Return the text of -m, or of standard input where -m asks for it or is not given.

    With any other -m standard input is left alone, for the loop that we may run in.
    """
    text = options.message
    if text in (None, "-"):
        data = terminal.read_stdin(even_typed=text == "-")
        if data is None:
            raise UsageError("no message: give -m TEXT, or pipe one in")
        text = decode_prompt(data, "standard input")
    if not text.strip():
        raise UsageError("the message is empty")
    return text

def run_interactive(options, settings, terminal):
    """Hold a conversation until its end; keep it where it would be lost."""
    if options.dry_run or options.output == "json":
        raise UsageError("--interactive goes with neither --dry-run nor -o json")
    terminal.json = False  # which the config file may ask for
    sampling = build_sampling(options)
    if "max_completion_tokens" not in sampling.fields:  # the newer name of the same
        sampling.fields.setdefault("max_tokens", DEFAULT_INTERACTIVE_MAX_TOKENS)
    first = first_message(options, terminal) if options.message is not None else None
    if terminal.is_typed_at() and not terminal.quiet:
        terminal.say(cut("/help lists the commands, Ctrl+D ends the session",
                         terminal.err.width()), dim=True)
    chat = Chat(sampling, settings, terminal, CHAT_COMMANDS, Conversation(system_prompt(options)),
                options.show_usage)
    try:
        status = chat_loop(chat, first and as_typed(first))
        if not terminal.quiet:
            do_tokens(chat, "")
    except BaseException as error:
        ended = isinstance(error, BrokenPipeError) and not chat.typed_at  # as by head in a script
        if chat.unsaved and not ended:
            keep(chat)
        raise
    finally:
        if chat.typed_at:
            terminal.set_echo(True)
    return status

def run_single(options, settings, terminal):
    """Ask one question and show the answer."""
    messages = Conversation(system_prompt(options)).messages(first_message(options, terminal))
    request = build_chat_request(build_sampling(options), settings, messages, options.stream)
    renderer = (JsonRenderer if terminal.json else TextRenderer)(terminal, options.stream)
    reply = Reply()
    ask(request, settings, terminal, renderer, reply)
    report_reply(reply, options.stream, options.show_usage, terminal)

def run_chat(options, terminal):
    """Ask one question, or hold a conversation."""
    with open_settings(options, terminal) as settings:
        return (run_interactive if options.interactive else run_single)(options, settings, terminal)

def listed(document, what):
    """Return the objects in the list that the server answered with; raise ServerError for none."""
    found = document if isinstance(document, list) else field(document, "data", list)
    if found is None:
        raise ServerError(f"the reply holds no list of {what}")
    return [item for item in found if isinstance(item, dict)]

def models_request(settings):
    """Return the Request for the models behind the endpoint, or behind the project without one."""
    url = endpoint_url(settings.base_url, settings.endpoint, "/models")
    return build_request("GET", url, settings)

def run_models(options, terminal):
    """Show the ids of the models behind an endpoint."""
    with open_settings(options, terminal) as settings:
        document = fetch(models_request(settings), settings, terminal)
    ids = [(field(model, "id", str) or "",) for model in listed(document, "models")]
    show_rows(document, ("id",), ids, terminal)

def refuse_dry_run(options):
    """Raise UsageError for a dry run of a command that does more than send one request."""
    if options.dry_run:
        raise UsageError(f"--dry-run shows requests: {options.command} cannot be tried with it")

# -- Config commands --------------------------------------------------------------------------

def key_note(deployment):
    """Return where the key of *deployment* is, or as much of it as may be shown."""
    if deployment.get("api_key"):
        return masked(deployment["api_key"])
    return next((f"{name[len('api_key_'):]} {deployment[name]}" for name in KEY_PLACES
                 if deployment.get(name)), "")

def shown_deployment(deployment):
    """Return the fields of *deployment*, the keys in it masked, dates as texts."""
    def shown(name, value):  # the name with those of the tables around it
        if isinstance(value, dict):
            return {key: shown(f"{name}.{key}", found) for key, found in value.items()}
        if isinstance(value, list):
            return [shown(name, found) for found in value]
        if name not in KEY_PLACES[1:] and re.search(SECRET_NAMES, name):
            return masked(str(value))
        return re.sub("//[^/]*@", "//****@", value) if isinstance(value, str) else value

    fields = {name: shown(name, value) for name, value in deployment.items()}
    return json.loads(json.dumps(fields, default=str))

def run_config_list(options, terminal):
    """Show the deployments, the current one marked."""
    config = read_config()
    terminal.notice(*config.notices)
    shown = {name: shown_deployment(found) for name, found in config.deployments.items()}
    rows = [(name, "*" * (name == config.current), shown[name].get("base_url", ""), key_note(found))
            for name, found in config.deployments.items()]
    if rows or terminal.json:
        show_rows({"current": config.current, "deployment": shown},
                  ("name", "current", "base URL", "key"), rows, terminal)
    else:
        terminal.notice(f"no deployments in {config.path}: add one with: xeroctl config init")

def run_config_show(options, terminal):
    """Show one deployment, the chosen one unless another is named."""
    config = read_config()
    terminal.notice(*config.notices)
    name = options.name or options.context or environment()[ENV_CONTEXT] or config.current
    if name is None:
        raise UsageError(f"no context is chosen: {config.path} has: {known_contexts(config)}")
    shown = dict({"name": name}, **shown_deployment(find_deployment(config, name)))
    if terminal.json:
        show_json(shown, terminal)
    else:
        for key, value in shown.items():
            terminal.answer(f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n")

def run_config_path(options, terminal):
    """Show where the config file is, or would be."""
    path = utf8_text(config_path())
    if terminal.json:
        show_json(path, terminal)
    else:
        terminal.answer(path + "\n")

def add_deployment(name, base_url, api_key, terminal):
    """Put a new deployment into the config file; it becomes the current one if there is none."""
    values = {"base_url": check_base_url(base_url)}
    if api_key:
        values["api_key"] = check_api_key(api_key)

    def change(config):
        if name in config.deployments:
            raise UsageError(f"{name} is there already: remove it first, or edit {config.path}")
        current = config.current if config.current in config.deployments else name
        return current, dict(config.deployments, **{name: values})

    config = change_config(change)
    how = "it is the current one" if config.current == name else (
        f"choose it with --context {name}, or with: xeroctl config use {name}")
    terminal.notice(f"added {name} to {config.path}: {how}")

def run_config_add(options, terminal):
    """Add a deployment, its key from standard input for '-'."""
    refuse_dry_run(options)
    if not options.base_url:
        raise UsageError("no base URL: give --base-url URL")
    api_key = options.api_key
    if api_key == "-":
        with contextlib.suppress(EOFError):
            api_key = terminal.read_secret("API key, not shown: ")
        if api_key in ("", "-"):
            raise UsageError("no API key on standard input")
    add_deployment(options.name, options.base_url, api_key, terminal)

def run_config_use(options, terminal):
    """Make a deployment the current one."""
    refuse_dry_run(options)

    def change(config):
        find_deployment(config, options.name)
        return options.name, config.deployments

    change_config(change)
    terminal.notice(f"{options.name} is the current context")
    terminal.notice(*(f"{variable} is set, and counts before it"
                      for variable, value in environment().items() if value))

def run_config_remove(options, terminal):
    """Remove a deployment."""
    refuse_dry_run(options)

    def change(config):
        find_deployment(config, options.name)
        left = {name: found for name, found in config.deployments.items() if name != options.name}
        return None if config.current == options.name else config.current, left

    config = change_config(change)
    terminal.notice(f"removed {options.name}" + (
        ": none is the current one now, choose one with: xeroctl config use CONTEXT"
        if config.deployments and config.current is None else ""))

def asked(read, question, check, terminal):
    """Return what a person answers; ask again until *check*, which raises UsageError, takes it."""
    while True:
        try:
            return check(typed_text(read(question)).strip())
        except UsageError as error:
            terminal.error(error)

def confirmed(question, terminal):
    """Tell whether a person says yes."""
    try:
        return terminal.read_line(question + " [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # which leaves the cursor behind the question
        terminal.say("")
        return False

def run_config_init(options, terminal):
    """Ask for a deployment, see whether its address answers, and add it."""
    refuse_dry_run(options)
    if not terminal.is_typed_at():
        raise UsageError("config init asks at a terminal: without one use xeroctl config add")
    known, options.context = read_config().deployments, None

    def check_new_name(text):
        if (text or "default") in known:
            raise UsageError(f"{text or 'default'} is there already: take another name")
        return check_deployment_name(text or "default")

    try:
        name = asked(terminal.read_line, "name [default]: ", check_new_name, terminal)
        options.base_url = options.base_url or asked(
            terminal.read_line, "base URL (Xerotier .../PROJECT/v1, else .../chat/completions): ",
            check_base_url, terminal)
        options.api_key = options.api_key if options.api_key != "-" else None
        options.api_key = options.api_key or asked(
            terminal.read_secret, "API key, not shown; Enter for none: ", check_api_key, terminal)
        settings = resolve_settings(options, {}, Config("", None, {}, []), fetch_key)
        terminal.secret = settings.api_key
        terminal.notice(*settings.notices)
        try:
            if "{endpoint}" not in settings.base_url:  # else there is nothing to ask yet
                with terminal.spinner():
                    receive(models_request(settings), settings, terminal.trace)
        except RefusedError:
            pass  # it answers
        except (NetworkError, ServerError, AuthError, RateLimitError, CutShortError) as error:
            terminal.error(error)
            if not confirmed("Keep it all the same?", terminal):
                raise UsageError("nothing was written") from error
    except EOFError:
        terminal.say("")
        raise UsageError("nothing was written") from None
    add_deployment(name, options.base_url, options.api_key, terminal)
    terminal.notice(f"next: xeroctl chat --context {name} --endpoint SLUG -m Hello")

# -- Status -----------------------------------------------------------------------------------

STATUS_STEPS = ("settings", "name", "connection", "tls", "authorisation", "completion")
STATUS_QUESTION, STATUS_MAX_TOKENS = "Count from one to ten.", 16
ARRIVAL_GAP_SECONDS = 0.001

class Steps:
    """The steps of a check: a line each as they are done, with -o json one object at the end."""

    def __init__(self, terminal):
        self._terminal = terminal
        self._since = time.monotonic()
        self.done = []

    def add(self, name, sentence, **facts):
        """Take in the step *name*, which ended now, and what is known from it."""
        if "certificate_expires" in facts:
            from ssl import cert_time_to_seconds

            left = cert_time_to_seconds(facts["certificate_expires"]) - time.time()
            facts["certificate_days"] = int(left // (24 * 60 * 60))
            sentence += f", {facts['certificate_days']} more days"
        self._end(name, sentence, facts)

    def fail(self, error):
        """Take in that the step after the last one failed with *error*."""
        place = STATUS_STEPS.index(self.done[-1]["step"]) + 1 if self.done else 0
        self._end(STATUS_STEPS[place], "failed", {"ok": False, "message": str(error)})

    def finish(self, good):
        """Show the object, *good* or not."""
        if self._terminal.json:
            show_json({"ok": good, "steps": self.done}, self._terminal)

    def _end(self, name, sentence, facts):
        seconds = time.monotonic() - self._since
        self.done.append(dict({"step": name, "ok": True, "seconds": round(seconds, 4)}, **facts))
        if not self._terminal.json:
            sentence = " ".join(printable(sentence).split())
            self._terminal.answer(f"{name:<13}  {seconds:7.3f} s  {sentence}\n")
        self._since = time.monotonic()

class Arrivals:
    """A renderer that shows nothing but keeps the monotonic times at which chunks came."""

    def __init__(self):
        self.times = []

    def show(self, document, source, text):
        """Take in the time."""
        self.times.append(time.monotonic())

    def finish(self):
        """There is nothing left to show."""

    def count(self):
        """Return how often something came: chunks that came together count once."""
        return 1 + sum(later - earlier > ARRIVAL_GAP_SECONDS
                       for earlier, later in zip(self.times, self.times[1:]))

def pace(chunks, arrivals):
    """Return how *chunks* of a stream came, in so many *arrivals*."""
    if chunks == 1:
        return "in one piece: it may be that this server does not stream"
    if arrivals == 1:
        return "in one lump: something on the way, a proxy perhaps, holds the stream back"
    return "one by one" if 2 * arrivals >= chunks else f"in {arrivals} lumps"

def settings_sentence(settings):
    """Return where each setting came from."""
    key = "no API key"
    if settings.api_key:
        key = f"API key {masked(settings.api_key)} ({settings.sources['api_key']})"
    return f"base URL {settings.base_url} ({settings.sources['base_url']}), {key}"

def check_models(request, settings, trace, steps, terminal):
    """See who answers, and whether the key is taken, by asking for the models."""
    try:
        with terminal.spinner():
            models = listed(receive(request, settings, trace), "models")
    except (AuthError, RefusedError) as error:
        # It may be that this key, or this server, answers nothing but chats.
        if error.status not in (404, 405) and (error.status != 403 or not settings.endpoint):
            raise
        steps.add("authorisation", f"not known: {error}", ok=None, message=str(error))
    else:
        key = "with the key" if settings.api_key else "without a key"
        steps.add("authorisation", f"HTTP 200 {key}, models: {len(models)}", models=len(models))

def check_completion(settings, steps, terminal):
    """See how a short completion is streamed."""
    sampling = Sampling(None, {"max_tokens": STATUS_MAX_TOKENS}, [])
    messages = Conversation().messages(STATUS_QUESTION)
    request = build_chat_request(sampling, settings, messages, True)
    reply, arrivals = Reply(), Arrivals()
    with terminal.spinner() as spinner:
        exchange(request, settings, terminal.trace, arrivals, reply, spinner)
    came = arrivals.count()
    sentence = f"model {reply.model or 'not told'}, {pace(len(arrivals.times), came)}"
    if reply.first_token_seconds is not None:
        sentence = f"first token after {reply.first_token_seconds:.3f} s, {sentence}"
    steps.add("completion", sentence, model=reply.model, chunks=len(arrivals.times),
              arrivals=came, first_token_seconds=reply.first_token_seconds
              and round(reply.first_token_seconds, 4))

def run_status(options, terminal):
    """Check a deployment step by step; the first failure ends it."""
    from importlib import import_module

    import_module("urllib.request")  # now, so that no step is charged for it
    refuse_dry_run(options)
    steps = Steps(terminal)

    def trace(lines, **facts):
        terminal.trace(lines)
        for name, found in facts.items():
            steps.add(name, lines[0][2:], **found)
            if name == "connection" and origin(request.url)[0] == "http":
                steps.add("tls", "none: the address is http://", version=None)

    try:
        with open_settings(options, terminal, endpoint_needed=False) as settings:
            request = models_request(settings)
            find_proxy(request.url)
            if origin(request.url)[0] == "https":
                tls_context(settings.cacert)  # now, for the same reason
            steps.add("settings", settings_sentence(settings), base_url=settings.base_url,
                      api_key=masked(settings.api_key), endpoint=settings.endpoint,
                      sources=settings.sources)
            check_models(request, settings, trace, steps, terminal)
            if settings.endpoint:
                check_completion(settings, steps, terminal)
            else:
                terminal.notice("to try a completion too, give --endpoint SLUG")
    except OutputError:
        raise
    except XeroctlError as error:
        steps.fail(error)
        steps.finish(False)
        raise
    steps.finish(True)

# -- Completions ------------------------------------------------------------------------------

def metadata_text(completion):
    """Return the metadata of *completion* as NAME=VALUE words."""
    tags = field(completion, "metadata", dict) or {}
    return " ".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}"
                    for name, value in sorted(tags.items()))

COMPLETION_COLUMNS = ("id", "created", "model", "tokens", "metadata")

def completion_row(completion):
    """Return what a list tells of a stored completion."""
    created = field(completion, "created", (int, float))
    usage = parse_usage(field(completion, "usage", dict))
    stamp = ""
    if created is not None and 0 <= created < 1e11:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(created))
    return (field(completion, "id", str) or "", stamp, field(completion, "model", str) or "",
            "" if usage.total is None else str(usage.total), metadata_text(completion))

def message_of(completion):
    """Return the message that *completion* answered with; raise ServerError for none."""
    for choice in field(completion, "choices", list) or ():
        if field(choice, "message", dict):
            return choice["message"]
    raise ServerError("the reply holds no completion")

def has_more(document):
    """Tell whether the list that the server answered with goes on."""
    return isinstance(document, dict) and document.get("has_more") is True

def list_query(options):
    """Return the (name, value) pairs of a query for what the filters in *options* let through."""
    query = [(name, getattr(options, name)) for name in ("limit", "after", "order", "model")
             if getattr(options, name) is not None]
    tags = options.tags + options.more_tags
    return query + [(f"metadata[{name}]", value) for name, value in tags]

def refuse_filters(options):
    """Raise UsageError for filters in front of a command that does not list."""
    if list_query(options):
        raise UsageError(f"--limit and the other filters go with list, not with {options.verb}")

def run_completions_list(options, terminal):
    """List what is stored."""
    query = list_query(options)
    with open_settings(options, terminal) as settings:
        document = fetch(build_stored_request("GET", settings, "", query), settings, terminal)
    completions = listed(document, "completions")
    show_rows(document, COMPLETION_COLUMNS, map(completion_row, completions), terminal)
    last = field(completions[-1], "id", str) if completions else None
    if has_more(document) and last:
        terminal.notice(f"there are more: add --after {last}")

def run_completions_get(options, terminal):
    """Show the answer of a stored completion."""
    refuse_filters(options)
    with open_settings(options, terminal) as settings:
        request = build_stored_request("GET", settings, "/" + options.id)
        completion = fetch(request, settings, terminal)
    if terminal.json:
        show_json(completion, terminal)
    else:
        renderer = TextRenderer(terminal, False)
        renderer.show(completion, None, whole_text(content_text(message_of(completion))))
        renderer.finish()

def fetch_messages(name, settings, terminal):
    """Return all messages of the stored completion *name*, page by page, and its answer."""
    messages, seen, query = [], set(), []
    while True:
        request = build_stored_request("GET", settings, f"/{name}/messages", query)
        document = fetch(request, settings, terminal)
        page = listed(document, "messages")
        last = field(page[-1], "id", str) if page else None
        if last not in seen:
            messages += page
        if not has_more(document):
            break
        if last is None or last in seen or len(seen) == MAX_PAGES:
            terminal.notice("there may be more messages: the server does not page through them")
            break
        seen.add(last)
        query = [("after", last)]
    if messages and messages[-1].get("role") != "assistant":  # some servers keep it apart
        request = build_stored_request("GET", settings, "/" + name)
        answer = message_of(fetch(request, settings, terminal))
        messages.append(dict({"role": "assistant"}, **answer))
    return messages

def run_completions_messages(options, terminal):
    """Show the conversation of a stored completion; with -o json in a form that /load reads."""
    refuse_filters(options)
    with open_settings(options, terminal) as settings:
        messages = fetch_messages(options.id, settings, terminal)
    if terminal.json:
        show_json({"object": "list", "data": messages}, terminal)
    else:
        terminal.answer("\n".join(
            f"{field(message, 'role', str) or 'unknown'}: "
            + whole_text(content_text(message)).rstrip("\n") + "\n" for message in messages))

def run_completions_update(options, terminal):
    """Give a stored completion other metadata."""
    refuse_filters(options)
    if not options.metadata:
        raise UsageError("nothing to change: give --metadata NAME=VALUE")
    with open_settings(options, terminal) as settings:
        request = build_stored_request("POST", settings, "/" + options.id,
                                       body={"metadata": dict(options.metadata)})
        completion = fetch(request, settings, terminal)
    show_rows(completion, COMPLETION_COLUMNS, [completion_row(completion)], terminal)

def run_completions_delete(options, terminal):
    """Delete stored completions, once a person says yes; report each failure and go on."""
    refuse_filters(options)
    status, asks = EXIT_OK, not options.yes and not options.dry_run
    if asks and not terminal.is_typed_at():
        raise UsageError("delete asks at a terminal: without one give --yes")
    with open_settings(options, terminal) as settings:
        if asks and not confirmed(f"Delete {', '.join(options.id)}?", terminal):
            raise UsageError("nothing was deleted")
        for name in options.id:
            try:
                document = fetch(build_stored_request("DELETE", settings, "/" + name), settings,
                                 terminal)
                if isinstance(document, dict) and document.get("deleted") is False:
                    raise ServerError(f"the server did not delete {name}")
            except Page as page:
                terminal.answer(str(page))
            except XeroctlError as error:
                terminal.error(error)
                status = status or error.exit_status
            else:
                if terminal.json:
                    JsonRenderer(terminal, True).show(document, None, "")
                else:
                    terminal.answer(f"deleted {name}\n")
    return status

# -- Shell completion -------------------------------------------------------------------------

# What a shell is told of an option or argument.  *value* is None where it takes none, else a tuple
# of the words that it can be, as far as these are known; a FILE and a CONTEXT the shell looks up.
Word = namedtuple("Word", "names summary metavar value repeatable")

def command_tree(parser, path=""):
    """Return [(path, commands, options, arguments)] for *parser* and the commands below it.

    *path* is the names that lead to it, a space before each; *commands* are (name, summary) pairs,
    options and arguments are Words.
    """
    commands, options, arguments, below = [], [], [], []
    for action in parser.filled()._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = [(choice.dest, choice.help) for choice in action._choices_actions]
            for name, found in action.choices.items():
                below += command_tree(found, f"{path} {name}")
        else:
            (options if action.option_strings else arguments).append(Word(
                action.option_strings, (action.help or "").replace("%%", "%"),
                action.metavar, None if action.nargs == 0 else tuple(action.choices or ()),
                action.nargs in ("*", "+") or isinstance(action, argparse._AppendAction)))
    return [(path, commands, options, arguments)] + below

def with_parts(template, **parts):
    """Return *template* with each @NAME@ in it replaced by that part, a text or lines."""
    for name, part in parts.items():
        template = template.replace(f"@{name}@", part if isinstance(part, str) else "\n".join(part))
    return template

_BASH = r"""# Completion for bash; load it with: eval "$(xeroctl completion bash)"
_xeroctl() {
    local word=${COMP_WORDS[COMP_CWORD]}
    local before= path= place name quoted found= options=
    COMPREPLY=()
    if [[ ${COMP_WORDS[COMP_CWORD-1]} == *[\<\>]* ]]; then
        compopt -o default 2>/dev/null
        return
    fi
    [[ $word == = ]] && word=
    for ((place = 1; place < COMP_CWORD; place++)); do
        name=${COMP_WORDS[place]}
        case $name in
            @TAKING@)
                [[ ${COMP_WORDS[place+1]} == = ]] && ((place++)); ((place++))
                while ((place < COMP_CWORD)) && [[ ${COMP_WORDS[place+1]} == [=:]* ]]; do
                    ((place += 2))  # a value that bash splits
                done
                ((place >= COMP_CWORD)) && before=$name ;;
            *) case "$path $name" in @PATHS@) path+=" $name" ;; esac ;;
        esac
    done
    case $before in
@VALUES@
        @FREE@) ;;
        *)
            case $path in
@WORDS@
            esac
            [[ $word == -* ]] && found=$options ;;
    esac
    while IFS= read -r name; do
        printf -v quoted %q "$name"
        [[ $name && ( $name == "$word"* || $quoted == "$word"* ) ]] && COMPREPLY+=("$quoted")
    done <<< "$found"
}
complete -F _xeroctl xeroctl
"""

def bash_completion(tree):
    """Return the completion script for bash."""
    def lines(words):
        return "$'" + r"\n".join(words) + "'"

    def found(word):
        return {"FILE": 'compopt -o default 2>/dev/null && return; '
                        'found=$(compgen -f -- "$word")',  # bash 3.2 has no compopt
                "CONTEXT": 'found=$(xeroctl config list -o text 2>/dev/null | cut -f 1)',
                }.get(word.metavar, word.value and "found=" + lines(word.value))

    taking = {"|".join(option.names): found(option) for _, _, options, _ in tree
              for option in options if option.value is not None}
    words = []
    for path, commands, options, arguments in tree:
        offered = "found=" + lines(name for name, _ in commands)
        offered = arguments and found(arguments[0]) or offered
        names = lines(name for option in options for name in option.names)
        words.append(f"                '{path}') {offered}\n"
                     f"                    options={names} ;;")
    return with_parts(
        _BASH, TAKING="|".join(taking), WORDS=words,
        PATHS="|".join(f"'{path}'" for path, *_ in tree[1:]),
        VALUES=[f"        {names}) {offered} ;;" for names, offered in taking.items() if offered],
        FREE="|".join(names for names, offered in taking.items() if not offered))

_ZSH = r"""#compdef xeroctl
# Completion for zsh; load it with: eval "$(xeroctl completion zsh)"
_xeroctl_contexts() {
    local -a names
    names=(${(f)"$(xeroctl config list -o text 2>/dev/null | cut -f 1)"})
    compadd -a names
}
@FUNCTIONS@
if [[ $funcstack[1] == _xeroctl ]]; then _xeroctl "$@"; else compdef _xeroctl xeroctl; fi
"""

_ZSH_FUNCTION = r"""@NAME@() {
    local line state
    _arguments -s -C \
@SPECS@
    [[ $state == below ]] && case $line[1] in
@CASES@
    esac
}"""

def zsh_completion(tree):
    """Return the completion script for zsh."""
    def quoted(text):
        return "        '" + text.replace("'", r"'\''") + "'"

    def escaped(text):
        return re.sub(r"([\\:\[\]])", r"\\\1", text)

    def value(word):
        action = {"FILE": "_files", "CONTEXT": "_xeroctl_contexts"}.get(
            word.metavar, f"({' '.join(word.value)})" if word.value else " ")
        return f":{escaped(word.metavar)}:{action}"

    functions = []
    for path, commands, options, arguments in tree:
        specs = []
        for option in options:
            taking = option.value is not None
            before = "*" if option.repeatable else f"({' '.join(option.names)})"
            after = f"[{escaped(option.summary)}]" + (value(option) if taking else "")
            for name in option.names:
                sign = ("=" if name.startswith("--") else "+") if taking else ""
                specs.append(quoted(before + name + sign + after))
        specs += [quoted("*" * word.repeatable + value(word)) for word in arguments]
        name = "_xeroctl" + path.replace(" ", "_")
        if commands:
            choices = " ".join(rf'{command}\:"{escaped(summary)}"' for command, summary in commands)
            specs += [quoted(f"1: :(({choices}))"), quoted("*:: :->below")]
        functions.append(with_parts(_ZSH_FUNCTION, NAME=name, SPECS=" \\\n".join(specs), CASES=[
            f"        {command}) {name}_{command} ;;" for command, _ in commands]))
    return with_parts(_ZSH, FUNCTIONS=functions)

_FISH = r"""# Completion for fish; save it as ~/.config/fish/completions/xeroctl.fish
function __xeroctl_at
    set -l path
    set -l skip no
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if test $skip = yes
            set skip no
            continue
        end
        switch $word
            case @TAKING@
                set skip yes
            case '*'
                if contains -- "$path $word" @PATHS@
                    set path "$path $word"
                end
        end
    end
    test "$path" = "$argv"
end
complete -c xeroctl -f
@WORDS@
"""

def fish_completion(tree):
    """Return the completion script for fish."""
    def quoted(text):
        return "'" + re.sub(r"(['\\])", r"\\\1", text) + "'"

    def value(word):
        contexts = "(xeroctl config list -o text 2>/dev/null | cut -f 1)"
        return {"FILE": "-r -F", "CONTEXT": f"-x -a '{contexts}'"}.get(
            word.metavar, "-x -a " + quoted(" ".join(word.value)) if word.value else "-x")

    lines, taking = [], set()
    for path, commands, options, arguments in tree:
        start = f"complete -c xeroctl -n '__xeroctl_at \"{path}\"'"
        lines += [f"{start} -a {name} -d {quoted(summary)}" for name, summary in commands]
        lines += [f"{start} {value(word)}" for word in arguments if value(word) != "-x"]
        for option in options:
            names = " ".join(("-l " if name.startswith("--") else "-s ") + name.lstrip("-")
                             for name in option.names)
            if option.value is not None:
                taking.update(option.names)
                names += " " + value(option)
            lines.append(f"{start} {names} -d {quoted(option.summary)}")
    return with_parts(_FISH, TAKING=" ".join(sorted(taking)), WORDS=lines,
                      PATHS=" ".join(f"'{path}'" for path, *_ in tree[1:]))

SHELLS = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}

def run_completion(options, terminal):
    """Print the completion script for a shell."""
    terminal.answer(SHELLS[options.shell](command_tree(options.parser)))

def run_help(options, terminal):
    """Show the help of a command."""
    options.parser.parse_args(options.topic + ["--help"])

# -- Command line -----------------------------------------------------------------------------

class PageAction(argparse.Action):
    """Raise the Page that is the option's const, or the parser's help."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise Page(self.const or parser.format_help())

class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line as a UsageError and takes no abbreviations.

    Each of *fills* adds options to it once it is used: a command line needs those of one command.
    """

    def __init__(self, fills=(), **options):
        super().__init__(add_help=False, **options)
        self.color = False  # Python 3.14 would colour the help
        self._fills, self._own_options = fills, self.add_argument_group("options")

    def add_argument(self, *names, **options):
        """Add an argument, an option to a group: outside, argparse tries its help out.

        That takes 16 ms at each start of Python 3.14.
        """
        adder = self._own_options if names[0].startswith("-") else super()
        return adder.add_argument(*names, **options)

    def filled(self):
        """Return the parser with all its options."""
        fills, self._fills = self._fills, ()
        for fill in fills:
            fill(self)
        return self

    def parse_known_args(self, args=None, namespace=None):
        """Parse with all the options, as every parser does."""
        return super(Parser, self.filled()).parse_known_args(args, namespace)

    def _check_help(self, action):  # of a command, for the same reason
        pass

    def _get_option_tuples(self, option_string):  # allow_abbrev=False forbids -qv too before 3.8
        return [] if option_string.startswith("--") else super()._get_option_tuples(option_string)

    def error(self, message):
        # The word may be a key, behind an option in front of the command where it does not belong.
        message = re.sub(r"(?s)^argument COMMAND: invalid choice: .* \(choose from",
                         "no such command, or an option of a command in front of it (choose from",
                         message)
        raise UsageError(f"{message}: see {self.prog} --help")

def plain(text):
    """Return *text* if it is not empty and has no control characters (for argparse's type=)."""
    if not text or printable(text) != text or "\n" in text:
        raise argparse.ArgumentTypeError(f"empty, or with a control character in it: {text!r}")
    return text

def slug(text):
    """Return *text* if it is an endpoint's name or an id, which stays in its place in a path."""
    if not re.match(r"[A-Za-z0-9._-]+\Z", text) or not text.strip("."):
        raise argparse.ArgumentTypeError(
            f"it consists of letters, digits, '.', '_' and '-', not {text!r}")
    return text

def number(low, high, convert=float):
    """Return a type= function for numbers from *low* to *high*, whole ones if *convert* is int."""
    def parse(text):
        try:
            value = convert(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # nan is neither
            kind = "number" if convert is float else "whole number"
            limits = f"from {low} to {high}" if high < MAX_NUMBER else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"not a {kind} {limits}: {text!r}")
        return value
    return parse

def name_and_text(text):
    """Return the (name, value) pair of NAME=VALUE, both texts."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"not NAME=VALUE: {text!r}")
    return plain(typed_text(name)), typed_text(value)

def body_field(text):
    """Return the (name, value) pair of NAME=VALUE, the value read as JSON where it is JSON."""
    name, value = name_and_text(text)
    if name in ("messages", "stream"):
        raise argparse.ArgumentTypeError(f"{name} cannot be set this way")
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value

def add_global_options(parser):
    """Add the options that every command takes, before its name or after it."""
    group = parser.add_argument_group("global options")

    def add(*names, **options):
        group.add_argument(*names, default=argparse.SUPPRESS, **options)

    seconds = number(0.001, MAX_TIMEOUT_SECONDS)
    add("--base-url", metavar="URL", type=plain,
        help="address of the project, such as https://api.xerotier.ai/PROJECT/v1")
    add("--api-key", metavar="KEY", type=check_api_key,
        help=f"API key; {ENV_API_KEY} keeps it out of the process list")
    add("--context", metavar="CONTEXT", type=plain, help="deployment of the config file to use")
    add("-o", "--output", choices=("text", "json", "table"), metavar="FORM",
        help="form of the output: text or json (table, of other tools, is text)")
    add("--connect-timeout", metavar="SECONDS", type=seconds,
        help=f"limit for connecting (default: {DEFAULT_CONNECT_TIMEOUT_SECONDS})")
    add("--timeout", metavar="SECONDS", type=seconds,
        help=f"limit for silence once connected (default: {DEFAULT_TIMEOUT_SECONDS})")
    add("--retries", metavar="N", type=number(0, 1000, int),
        help=f"further tries after a failure that may pass (default: {DEFAULT_RETRIES})")
    add("--cacert", metavar="FILE", type=native_path, help="trust the authorities in this PEM file")
    add("--dry-run", action="store_true", help="print the request as a curl command; send nothing")
    add("-q", "--quiet", action="store_true", help="no spinner, notes or throughput line")
    add("-v", "--verbose", action="store_true", help="show the HTTP exchange on stderr")
    add("--version", action=PageAction, nargs=0, const=f"xeroctl {__version__}\n",
        help="print the version and exit")
    add("-h", "--help", action=PageAction, nargs=0, help="print this help and exit")

def add_target(parser):
    """Add the options that say which endpoint is asked."""
    parser.add_argument("--endpoint", metavar="SLUG", type=slug, default=argparse.SUPPRESS,
                        help="endpoint to ask; --demo brings its own")
    parser.add_argument("--demo", action="store_true", default=argparse.SUPPRESS,
                        help="ask a practice endpoint inside this process")

def add_metadata(parser, summary, name="metadata"):
    """Add the option --metadata, whose pairs *name* holds."""
    parser.add_argument("--metadata", metavar="NAME=VALUE", type=name_and_text, action="append",
                        dest=name, default=argparse.SUPPRESS, help=summary + "; may be repeated")

def add_chat(parser):
    """Add the options of chat."""
    add = parser.add_argument
    positive, whole = number(1, MAX_NUMBER, int), number(-MAX_NUMBER, MAX_NUMBER, int)
    add("-m", "--message", metavar="TEXT", type=typed_text,
        help="what to say; '-', or no -m, reads it from standard input")
    add("--stream", action="store_true", help="print the answer as it is generated")
    add("-i", "--interactive", action="store_true", help="hold a conversation; /help tells more")
    add("--system", metavar="TEXT", type=typed_text, help="system message")
    add("--from-file", metavar="FILE", type=native_path,
        help="system message from a file; beats --system")
    add("--model", metavar="NAME", type=plain, help="model name to send (default: the endpoint)")
    add("--max-tokens", metavar="N", type=positive, help="limit for the answer, in tokens")
    add("--temperature", metavar="X", type=number(0, 2), help="sampling temperature, 0 to 2")
    add("--top-p", metavar="X", type=number(0, 1), help="nucleus sampling threshold, 0 to 1")
    add("--frequency-penalty", metavar="X", type=number(-2, 2),
        help="against tokens used often, -2 to 2")
    add("--presence-penalty", metavar="X", type=number(-2, 2),
        help="against tokens used at all, -2 to 2")
    add("--seed", metavar="N", type=whole, help="seed for answers that can be repeated")
    add("--param", metavar="NAME=VALUE", type=body_field, action="append", default=[],
        help="any other field of the request body; VALUE is JSON, else text; may be repeated")
    add("--slo-ttft", metavar="MS", type=positive, help="target for the first token, in ms")
    add("--slo-tpot", metavar="MS", type=positive, help="target for each further token, in ms")
    add("--store", action="store_const", const=True, help="have the server keep the completion")
    add_metadata(parser, "tag for a completion that is kept")
    add("--show-usage", action="store_true", help="print token counts and the id on stderr")

def add_filters(parser, tags="tags"):
    """Add the options that say which stored completions are listed; *tags* holds their tags."""
    def add(name, **options):
        parser.add_argument(name, default=argparse.SUPPRESS, **options)

    add("--limit", metavar="N", type=number(1, 100, int), help="how many at most, 1 to 100")
    add("--after", metavar="ID", type=plain, help="those that follow this one")
    add("--order", metavar="ORDER", choices=("asc", "desc"),
        help="by time: asc, the oldest first, or desc")
    add("--model", metavar="NAME", type=plain, help="those of this model")
    add_metadata(parser, "those with this tag", tags)

def argument(*names, **options):
    """Return a function that adds this argument to a parser."""
    return lambda parser: parser.add_argument(*names, **options)

def add_command(commands, name, run, summary, *fills):
    """Add the command *name*, which *run* runs, and whose options the functions *fills* add."""
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:]
                                 + ".", fills=fills + (add_global_options,))
    parser.set_defaults(run=run)

def add_completions(parser):
    """Add the commands below completions."""
    below = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands",
                                  prog=parser.prog)
    one = argument("id", metavar="ID", type=slug, help="id of the completion")
    some = argument("id", metavar="ID", type=slug, nargs="+", help="ids of completions")
    add_command(below, "list", run_completions_list, "list completions; this is the default",
                lambda parser: add_filters(parser, "more_tags"), add_target)
    add_command(below, "get", run_completions_get, "show the answer of a completion",
                one, add_target)
    add_command(below, "messages", run_completions_messages,
                "show the conversation of a completion", one, add_target)
    add_command(below, "update", run_completions_update, "change the tags of a completion", one,
                lambda update: add_metadata(update, "new tag"), add_target)
    add_command(below, "delete", run_completions_delete, "delete completions", some,
                argument("--yes", action="store_true", help="do not ask"), add_target)

def add_config(parser):
    """Add the commands below config."""
    below = parser.add_subparsers(dest="verb", metavar="COMMAND", title="commands",
                                  prog=parser.prog)
    known = dict(metavar="CONTEXT", type=typed_text, help="name of a deployment")
    add_command(below, "list", run_config_list, "list the deployments; this is the default")
    add_command(below, "init", run_config_init, "ask for a deployment and add it")
    add_command(below, "add", run_config_add,
                "add a deployment: its --base-url, and its --api-key, or - for standard input",
                argument("name", metavar="NAME", type=check_deployment_name,
                         help="name of the new deployment"))
    add_command(below, "use", run_config_use, "make a deployment the current one",
                argument("name", **known))
    add_command(below, "show", run_config_show, "show a deployment, by default the chosen one",
                argument("name", nargs="?", **known))
    add_command(below, "remove", run_config_remove, "remove a deployment",
                argument("name", **known))
    add_command(below, "path", run_config_path, "print where the config file is")

def build_parser():
    """Return the parser of the whole command line."""
    parser = Parser(prog="xeroctl", description="Chat with Xerotier endpoints.",
                    epilog="xeroctl help COMMAND tells more. Try: xeroctl chat --demo -m Hello")
    parser.set_defaults(
        command=None, parser=parser, base_url=None, api_key=None, context=None, output=None,
        cacert=None, connect_timeout=DEFAULT_CONNECT_TIMEOUT_SECONDS,
        timeout=DEFAULT_TIMEOUT_SECONDS, retries=DEFAULT_RETRIES, dry_run=False, quiet=False,
        verbose=False, endpoint=None, demo=False, metadata=[], tags=[], more_tags=[], limit=None,
        after=None, order=None, model=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands",
                                     prog=parser.prog)
    add_command(commands, "chat", run_chat, "send a message to an endpoint and print the answer",
                add_target, add_chat)
    add_command(commands, "models", run_models, "list the models behind an endpoint", add_target)
    add_command(commands, "completions", run_completions_list,
                "list and change the completions that --store keeps",
                add_completions, add_filters, add_target)
    add_command(commands, "status", run_status,
                "check settings, connection, key and, with --endpoint, a short completion",
                add_target)
    add_command(commands, "config", run_config_list,
                "list and change the deployments in the config file", add_config)
    add_command(commands, "completion", run_completion, "print a script that completes commands",
                argument("shell", metavar="SHELL", choices=tuple(SHELLS), help="bash, zsh or fish"))
    add_command(commands, "help", run_help, "show the help of a command",
                argument("topic", metavar="COMMAND", nargs="*", help="words of the command"))
    add_global_options(parser)
    return parser

def asks_for_json(arguments):
    """Tell whether a command line that cannot be parsed asks for JSON."""
    form = r"(?:^|\0)(?:-[qvi]*o[\0=]?|--output[\0=])json(?:\0|$)"
    return bool(re.search(form, "\0".join(arguments)))

def run(arguments, terminal):
    """Parse *arguments* and run their command; return its exit status, or raise a Page.

    A command that knows no other status than EXIT_OK returns nothing.
    """
    terminal.json = asks_for_json(arguments)
    options, unknown = build_parser().parse_known_args(arguments)
    if not options.command:
        raise UsageError("no command: see xeroctl --help")
    if unknown:
        name = unknown[0].partition("=")[0]  # what follows may be a key
        if not name.startswith("-"):
            name += ", which no option takes (a message goes after -m)"
        raise UsageError(f"unknown argument {name}: see xeroctl {options.command} --help")
    terminal.json, terminal.quiet, terminal.verbose = (
        options.output == "json", options.quiet, options.verbose)
    return options.run(options, terminal) or EXIT_OK

def terminate(number, frame):
    """Turn the first signal to end into an exception, so that nothing is left undone."""
    for ending in ENDING_SIGNALS:
        signal.signal(ending, signal.SIG_IGN)
    raise Terminated(number)

def end_by_signal(number):
    """Die of signal *number*, so that a shell's loop around us ends too; else return its status."""
    if os.name == "posix":
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return 128 + number

def main(argv=None):
    """Run one command line and return its exit status."""
    if argv is None:  # UTF-8 whatever the locale
        argv = list(map(utf8_text, sys.argv[1:]))
    try:
        terminal = Terminal(sys.stdin, sys.stdout, sys.stderr, os.environ)
        for number in ENDING_SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, terminate)
        try:
            try:
                return run(argv, terminal)
            except Page as page:
                terminal.answer(str(page))
                return EXIT_OK
        except XeroctlError as error:
            terminal.error(error)  # in which a signal may come, too
            return error.exit_status
    except BrokenPipeError:
        return EXIT_CLOSED_STDOUT
    except KeyboardInterrupt:
        return end_by_signal(signal.SIGINT)
    except Terminated as end:
        return end_by_signal(*end.args)

if __name__ == "__main__":
    sys.exit(main())
