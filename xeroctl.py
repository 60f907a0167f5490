#!/usr/bin/env python3
"""xeroctl: chat with Xerotier endpoints, and with any OpenAI-compatible server, from one file.

It needs Python 3.6 or later and nothing else.  Start with:

    python3 xeroctl.py chat --demo --stream -m "Hello"

The file is read from top to bottom: a room uses only the rooms above it.  Data flows one way:

    argv -> options -> Settings -> Request -> bytes -> events -> Chunks -> Reply -> exit status

    Constants          exit statuses, names of variables, limits with their units
    Errors             what can go wrong, and the exit status of each kind
    Records            the values that travel between rooms
    Config             settings and where they come from, edits to config.toml         (pure)
    Wire               bytes of HTTP/1.1 and of event streams, cut anywhere, decoded   (pure)
    Protocol           everything that is the shape of chat completions                (pure)
    Messages           questions, conversations and the document that saves them       (pure)
    Text               sanitising, widths, tables, Markdown styling, percentiles       (pure)
    Waiting            the one place that waits, and the signals that end a wait
    Files              config file, prompts, attachments, history, conversations
    Transport          names, sockets, proxies, TLS, urllib.request's opener
    Console            the three streams, notes, warnings, errors, the spinner
    Client             one request, its retries and its answer
    Views              an answer as plain text, styled text or JSON
    Demo endpoint      the server behind --demo
    Chat               the line editor, slash commands, the loop of --interactive
    Commands           chat, models, config, status, completions
    Many requests      one selector loop for batch and bench
    Batch              batch: JSON lines in, JSON lines out
    Bench              bench: measure endpoints
    Shell completion   completion scripts, and the candidates that they ask for
    Command line       the parser, and main
"""

import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    # A json.py beside this file, or in the working folder of `python3 -`, must not be imported.
    del sys.path[0]

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import signal
import time
from collections import namedtuple

# -- Constants --------------------------------------------------------------------------------

__version__ = "0.3.0"

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_AUTH = 3
EXIT_REFUSED = 4
EXIT_SERVER = 5
EXIT_NETWORK = 6
EXIT_RATE_LIMIT = 7
EXIT_CUT_SHORT = 8
EXIT_UNUSABLE_INPUT = 9
EXIT_CONDITION = 10
EXIT_INTERRUPTED = 130
EXIT_CLOSED_STDOUT = 141

ENV_BASE_URL = "XEROTIER_BASE_URL"
ENV_API_KEY = "XEROTIER_API_KEY"
ENV_CONTEXT = "XEROTIER_CONTEXT"
ENV_ENDPOINT = "XEROTIER_ENDPOINT"
ENV_NO_HISTORY = "XEROTIER_NO_HISTORY"
ENV_OPENAI_BASE_URL = "OPENAI_BASE_URL"
ENV_OPENAI_API_KEY = "OPENAI_API_KEY"

DEFAULT_CONNECT_TIMEOUT_SECONDS = 10
DEFAULT_TIMEOUT_SECONDS = 300
DEFAULT_RETRIES = 2
DEFAULT_INTERACTIVE_MAX_TOKENS = 4096
DEMO_ENDPOINT = "demo"
CHAT_PATH = "/chat/completions"

MAX_TIMEOUT_SECONDS = 1000000
MAX_RETRY_DELAY_SECONDS = 60
AFTER_FINISH_SECONDS = 1  # of silence, once a finish reason came
MAX_NUMBER = 2 ** 63 - 1
READ_BYTES = 64 * 1024
MAX_HEAD_BYTES = 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
MAX_ERROR_CHARACTERS = 500
MAX_EVENT_BYTES = 64 * 1024 * 1024
MAX_REPLY_BYTES = 64 * 1024 * 1024
MAX_CONVERSATION_BYTES = 64 * 1024 * 1024
MAX_ATTACHMENT_BYTES = 20 * 1024 * 1024
MIN_REDACTED_CHARACTERS = 8

# -- Errors -----------------------------------------------------------------------------------

class XeroctlError(Exception):
    """A failure that a user, a server or a network can cause, in one sentence.

    *status* is the HTTP status.  *code* and *request_id* are the server's, *retry_after* the
    seconds it asked us to wait, *body* the text of its error, which --verbose shows.
    *retryable* says that a second try may succeed.
    """
    kind = "failure"
    exit_status = EXIT_FAILURE

    def __init__(self, message, status=None, code=None, request_id=None,
                 retryable=False, retry_after=None, body=None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.request_id = request_id
        self.retryable = retryable
        self.retry_after = retry_after
        self.body = body

class OutputError(XeroctlError):
    """Standard output could not be written."""
    kind = "output"

class UsageError(XeroctlError):
    """The options, the environment, the config file or another file are wrong."""
    kind = "usage"
    exit_status = EXIT_USAGE

class UnusableInputError(XeroctlError):
    """There is nothing usable to ask: an empty message, bytes that are not text, a bad file."""
    kind = "input"
    exit_status = EXIT_UNUSABLE_INPUT

class AuthError(XeroctlError):
    """The server did not accept the API key (HTTP 401 or 403)."""
    kind = "auth"
    exit_status = EXIT_AUTH

class RefusedError(XeroctlError):
    """The server understood and refused the request (another HTTP 4xx)."""
    kind = "refused"
    exit_status = EXIT_REFUSED

class ServerError(XeroctlError):
    """The server failed (HTTP 5xx), or sent what is no answer, or an empty one."""
    kind = "server"
    exit_status = EXIT_SERVER

class NetworkError(XeroctlError):
    """The server could not be reached, or fell silent."""
    kind = "network"
    exit_status = EXIT_NETWORK

class RateLimitError(XeroctlError):
    """The server asked us to slow down (HTTP 429), or a quota is used up."""
    kind = "rate_limit"
    exit_status = EXIT_RATE_LIMIT

class CutShortError(XeroctlError):
    """The reply ended before its end; what arrived of it was shown."""
    kind = "cut_short"
    exit_status = EXIT_CUT_SHORT

class TextRequested(Exception):
    """--help or --version: print this text and do nothing else (raised while parsing)."""

class Terminated(BaseException):
    """A signal, whose number it holds, asked us to end; only main catches it."""

# -- Records ----------------------------------------------------------------------------------

# Plain namedtuples: the typing module would add a quarter to the start-up time on Python 3.6.

Config = namedtuple("Config", [
    "path",         # of the config file, as text
    "current",      # name of the deployment that is used by default, or None
    "deployments",  # name -> table
    "warnings",     # sentences for the user, such as a file that others can read
])

Settings = namedtuple("Settings", [
    "endpoint",         # slug, or None
    "base_url",
    "api_key",          # or None
    "headers",          # (name, value) pairs of --header
    "output",           # "text" or "json"
    "stream",           # True where --stream or the deployment asks for it
    "timeout",          # seconds of silence
    "connect_timeout",  # seconds
    "retries",
    "cacert",           # path of a PEM file, or None
    "dry_run",
    "notes",            # sentences for the user
    "sources",          # "base_url", "api_key", "endpoint" -> where each came from, as text
])

Sampling = namedtuple("Sampling", [
    "model",    # --model, or None
    "fields",   # body fields that the user set, name -> JSON value
    "headers",  # (name, value) pairs, the latency targets
])

Request = namedtuple("Request", "method url headers body streamed")  # body: bytes, or None

ResponseHead = namedtuple("ResponseHead", [
    "version",  # "1.1" or "1.0"
    "status",   # int
    "reason",
    "headers",  # name in small letters -> value; repeated headers are joined by ", "
    "lines",    # the head as received, one text a line, for --verbose
])

Event = namedtuple("Event", "name data")  # both texts; the name is "message" by default

ErrorContext = namedtuple("ErrorContext", [  # what build_error must know beside the document
    "status",   # HTTP status of the response
    "headers",  # of the response, names in small letters
    "secrets",  # texts that were sent and must not be repeated
    "url",      # of the request
    "via",      # " through the proxy HOST:PORT", or ""
    "method",   # of the request
    "plain_url",  # address that a server without slugs would have, or None
])

Chunk = namedtuple("Chunk", [  # what one read of a reply brought
    "text",           # of the answer, whole characters
    "reasoning",      # text of the model's reasoning
    "deltas",         # number of events with text or reasoning in them
    "finish_reason",  # or None
    "usage",          # Usage, or None
    "id",             # of the completion, or None
    "model",          # that answered, or None
    "tool_calls",     # list of tool calls or pieces of them, as sent
    "documents",      # parsed JSON, one an event
    "sources",        # the JSON text of each document as the server sent it
    "at",             # monotonic time at which the bytes arrived
])

Usage = namedtuple("Usage", "prompt completion total cached reasoning")  # None: not told

Totals = namedtuple("Totals", "prompt completion exact")  # tokens of a chat session

# One step of connecting, "name", "connection" or "tls": its duration, and what is known from it.
ConnectStep = namedtuple("ConnectStep", "name seconds sentence facts")

# -- Config -----------------------------------------------------------------------------------

KEY_FIELDS = ("api_key", "api_key_keychain", "api_key_command")
FIELD_TYPES = dict.fromkeys(KEY_FIELDS + ("base_url", "endpoint", "output"), str)
FIELD_TYPES["stream"] = bool
TYPE_WORDS = {str: "text", dict: "a table", bool: "true or false"}

# The TOML that Pythons before 3.11 read with it: tables of strings, booleans and plain numbers.
_TOML_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_TOML_KEYS = r"%s(?:\s*\.\s*%s)*" % (_TOML_KEY, _TOML_KEY)
_TOML_BLANK = r"\s*(?:#.*)?$"
_TOML_HEADER = r"\s*\[\s*(%s)\s*\]%s" % (_TOML_KEYS, _TOML_BLANK)
_TOML_PAIR = r"\s*(%s)\s*=\s*(.*)$" % _TOML_KEYS
_TOML_STRING = r""""(?!"")(?:[^"\\]|\\.)*"|'(?!'')[^']*'"""
_TOML_VALUE = r"(%s|true|false|[+-]?\d+(?:\.\d+)?)%s" % (_TOML_STRING, _TOML_BLANK)

def is_secret_name(name):
    """Return whether a header, body field or config field of this *name* may hold a secret."""
    pattern = "(?i)auth|key|token|secret|password|credential|cookie"
    return re.search(pattern, name) is not None

def mask_key(key):
    """Return what may be shown of an API key: asterisks, and the last four of 16 or more."""
    if not key:
        return ""
    if len(key) < 2 * MIN_REDACTED_CHARACTERS:
        return "****"
    return "****" + key[-4:]

def redact(text, secrets):
    """Return *text* with *** for each of *secrets*; short ones could be any word, and stay."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_REDACTED_CHARACTERS:
            text = text.replace(secret, "***")
    return text

def quote_value(text):
    """Return *text* in quotes for an error message, masked where it may be a key."""
    if re.match(r"(?=.*\d)[A-Za-z0-9_-]{16,}\Z", text):
        text = mask_key(text)
    return repr(text)

def _toml_value(text):
    if text.startswith("'"):
        return text[1:-1]
    return json.loads(text.lstrip("+"))

def _toml_keys(text):
    keys = []
    for key in re.findall(_TOML_KEY, text):
        if key[0] in "\"'":
            key = _toml_value(key)
        keys.append(key)
    return keys

def _toml_text(text):
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted.replace("\x7f", "\\u007f")

def _nested_table(table, keys):
    for key in keys:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError
    return table

def _read_toml_pair(table, name, rest):
    value = re.match(_TOML_VALUE, rest)
    *outer, key = _toml_keys(name)
    target = _nested_table(table, outer)
    if value is None or key in target:
        raise ValueError
    target[key] = _toml_value(value.group(1))

def parse_toml_subset(text):
    """Return the tables of a TOML text of strings, booleans and plain numbers.

    Raise ValueError, with the number of the line, for everything else.
    """
    document = {}
    table = document
    headers = []
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(_TOML_HEADER, line)
        pair = re.match(_TOML_PAIR, line)
        try:
            if header:
                keys = _toml_keys(header.group(1))
                table = _nested_table(document, keys)
                if keys in headers:
                    raise ValueError
                headers.append(keys)
            elif pair:
                _read_toml_pair(table, *pair.groups())
            elif not re.match(_TOML_BLANK, line):
                raise ValueError
        except ValueError as error:
            raise ValueError(f"cannot read this (at line {number})") from error
    return document

def parse_toml(text, path):
    """Return the document in the TOML *text* of the file *path*.

    Raise UsageError, with the file and the line, where it is broken.
    """
    try:
        from tomllib import loads
    except ImportError:  # before Python 3.11
        loads = parse_toml_subset
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        last = text.rstrip().count("\n") + 1
        reason = str(error).replace("at end of document", f"at line {last}")
        raise UsageError(f"{path}: broken TOML: {reason}") from error

def check_base_url(url):
    """Return *url* without slashes at its end; raise UsageError where it is no base URL."""
    from urllib.parse import urlsplit

    if re.match(r"[^/]*//[^/]*@", url):
        raise UsageError("a base URL holds no user or password: use --api-key")
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or "#" in url or not re.match(r"[!-~]+\Z", url):
        raise UsageError(f"not a base URL: {quote_value(url)}: "
                         "one is https://api.xerotier.ai/PROJECT/v1")
    if "?" not in url:
        return url.rstrip("/")
    if not parts.query or not parts.path.endswith(CHAT_PATH):
        raise UsageError(f"not a base URL: {url!r}: only an address that ends in {CHAT_PATH} "
                         "may have a query")
    return url

def origin(url):
    """Return the scheme, host and port of *url* (RFC 6454): a stored key is bound to them."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port
    if not port:
        port = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port

def same_origin(url, other):
    """Return whether two URLs have one origin; what is missing or no base URL has none."""
    try:
        check_base_url(url or "")
        check_base_url(other or "")
    except UsageError:
        return False
    return origin(url) == origin(other)

def is_loopback(host):
    """Return whether *host* is a name or an address of this machine alone (RFC 6761)."""
    names = r"(.+\.)?localhost|127(\.\d+){3}|0\.0\.0\.0|::1"
    return re.match(rf"({names})\Z", host) is not None

def is_whole_address(base_url):
    """Return whether *base_url* is used as it stands, with no slug anywhere in it."""
    address = base_url.partition("?")[0]
    is_whole = address.rstrip("/").endswith(CHAT_PATH)
    return is_whole and "{endpoint}" not in base_url

def plain_address(base_url):
    """Return the whole address that a server without slugs would have, or None if it is one."""
    if "{endpoint}" in base_url or is_whole_address(base_url):
        return None
    if not base_url.endswith("/v1"):
        base_url += "/v1"
    return base_url + CHAT_PATH

def check_endpoint(endpoint, base_url, source):
    """Return *endpoint*; raise UsageError, naming its *source*, where it cannot be a slug.

    Where no path is built from it, it may be any name without control characters.
    """
    if is_whole_address(base_url):
        is_valid = re.match(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+\Z", endpoint)
    else:
        is_valid = re.match(r"\.*[A-Za-z0-9_-][A-Za-z0-9._-]*\Z", endpoint)
    if not is_valid:
        raise UsageError(f"{source} must be letters, digits, '.', '_' and '-', "
                         f"not {quote_value(endpoint)}")
    return endpoint

def check_api_key(key):
    """Return *key*; raise UsageError, without showing it, where no header can hold it."""
    if not re.match(r"[!-~]*\Z", key):
        raise UsageError("the API key has a space, a line end or another character that no key has")
    return key

def check_deployment_name(text):
    """Return *text*; raise UsageError where it cannot name a new deployment."""
    if not re.match(r"[A-Za-z0-9._-]+\Z", text):
        raise UsageError("a deployment's name is letters, digits, '.', '_', '-', "
                         f"not {quote_value(text)}")
    return text

def _check_type(path, name, value, wanted):
    if not isinstance(value, wanted):
        raise UsageError(f"{path}: {name} is not {TYPE_WORDS[wanted]}")

def parse_config(text, path):
    """Return the Config in the TOML *text* of the file *path*.

    Raise UsageError where it is broken, or where a value has the wrong type.
    """
    document = parse_toml(text, path)
    current = document.get("current", "")
    deployments = document.get("deployment", {})
    _check_type(path, "current", current, str)
    _check_type(path, "deployment", deployments, dict)
    for name, deployment in deployments.items():
        label = f"deployment.{name}"
        _check_type(path, label, deployment, dict)
        for field, wanted in FIELD_TYPES.items():
            if field in deployment:
                _check_type(path, f"{label}.{field}", deployment[field], wanted)
        endpoint = deployment.get("endpoint")
        if endpoint:
            base_url = deployment.get("base_url", "")
            check_endpoint(endpoint, base_url, f"{path}: {label}.endpoint")
    return Config(path, current or None, deployments, [])

def known_contexts(config):
    """Return the names of the deployments of *config* in one line."""
    names = sorted(config.deployments)
    return ", ".join(names) or "none"

def find_deployment(config, name):
    """Return the table of deployment *name*, empty for None; raise UsageError if unknown."""
    if name is None:
        return {}
    if name not in config.deployments:
        raise UsageError(f"unknown context {quote_value(name)}: "
                         f"{config.path} has: {known_contexts(config)}")
    return config.deployments[name]

def first_given(*candidates):
    """Return the first (value, source) pair whose value is set, or (None, None)."""
    for value, source in candidates:
        if value:
            return value, source
    return None, None

def kept_key(deployment):
    """Return the field of *deployment* that says where its key is, or None."""
    for field in KEY_FIELDS:
        if deployment.get(field):
            return field
    return None

def _in_order(options, variable, stored):
    """Return the two sources as they count: --context beats the environment."""
    if options.context:
        return stored, variable
    return variable, stored

def _find_base_url(options, environ, deployment, stored):
    variable = environ.get(ENV_BASE_URL), ENV_BASE_URL
    own = deployment.get("base_url"), stored
    ordered = _in_order(options, variable, own)
    url, source = first_given((options.base_url, "--base-url"), *ordered)
    if url:
        return check_base_url(url), source
    url = environ.get(ENV_OPENAI_BASE_URL)
    if not url:
        return None, None
    url = check_base_url(url)
    if not is_whole_address(url):
        url += CHAT_PATH
    return url, ENV_OPENAI_BASE_URL

def _takes_variable_key(environ, base_url, source):
    """Return whether XEROTIER_API_KEY may go to *base_url*: a URL beside it claims that key."""
    if source == "--base-url":
        return True
    if source == ENV_OPENAI_BASE_URL:
        return False
    variable_url = environ.get(ENV_BASE_URL)
    return not variable_url or same_origin(variable_url, base_url)

def _find_api_key(options, environ, deployment, stored, base_url, base_url_source):
    """Return the key and its source; of a stored key, what says where it is."""
    nowhere = None, None
    variable = own = openai = nowhere
    if _takes_variable_key(environ, base_url, base_url_source):
        variable = environ.get(ENV_API_KEY), ENV_API_KEY
    if same_origin(deployment.get("base_url"), base_url):
        own = kept_key(deployment), stored
    if same_origin(environ.get(ENV_OPENAI_BASE_URL), base_url):
        openai = environ.get(ENV_OPENAI_API_KEY), ENV_OPENAI_API_KEY
    ordered = _in_order(options, variable, own)
    return first_given((options.api_key, "--api-key"), *ordered, openai)

def _missing_base_url(config, context):
    if config.deployments and not context:
        return UsageError(
            f"no context is chosen: {config.path} has: {known_contexts(config)}: "
            "give --context CONTEXT, or choose with: xeroctl config use CONTEXT")
    return UsageError(
        f"no base URL: set it up with: xeroctl config init, or set {ENV_BASE_URL} "
        f"and {ENV_API_KEY}, or try without any: xeroctl chat --demo -m Hello")

def _key_notes(api_key, base_url, environ, deployment, context):
    scheme, host, _ = origin(base_url)
    if api_key and scheme == "http" and not is_loopback(host):
        return [f"the API key goes to {host} over plain http, for all on the way to read"]
    if api_key:
        return []
    if kept_key(deployment):
        return [f"the key of context {context} is for another server and is not sent"]
    if environ.get(ENV_API_KEY):
        return [f"{ENV_API_KEY} is for another server and is not sent"]
    return []

def resolve_settings(options, environ, config, fetch_key):
    """Return the Settings that *options*, *environ* and the Config *config* ask for.

    *fetch_key* takes a deployment whose key is kept elsewhere, and returns that key.
    """
    context = options.context or environ.get(ENV_CONTEXT) or config.current
    deployment = find_deployment(config, context)
    stored = f"deployment {context} in {config.path}"
    base_url, base_url_source = _find_base_url(options, environ, deployment, stored)
    if not base_url:
        raise _missing_base_url(config, context)

    own = {}  # fields that count only with the deployment's own base URL
    if deployment.get("base_url", "").rstrip("/") == base_url:
        own = deployment
    endpoint, endpoint_source = first_given(
        (getattr(options, "endpoint", None), "--endpoint"),
        (environ.get(ENV_ENDPOINT), ENV_ENDPOINT),
        (own.get("endpoint"), stored))
    if endpoint:
        check_endpoint(endpoint, base_url, endpoint_source)
    stream = getattr(options, "stream", None)
    if stream is None:
        stream = own.get("stream", False)
    output = options.output or deployment.get("output") or "text"
    if output not in ("text", "table", "json"):
        raise UsageError(f"{config.path}: deployment.{context}.output is not table or json")
    if output == "table":
        output = "text"
    retries = options.retries
    if retries is None:
        retries = DEFAULT_RETRIES

    api_key, api_key_source = _find_api_key(
        options, environ, deployment, stored, base_url, base_url_source)
    if api_key and api_key_source == stored:
        api_key = deployment.get("api_key") or fetch_key(deployment)
    api_key = check_api_key(api_key or "") or None
    notes = config.warnings + _key_notes(api_key, base_url, environ, deployment, context)
    sources = {"base_url": base_url_source, "api_key": api_key_source,
               "endpoint": endpoint_source}
    return Settings(
        endpoint, base_url, api_key, list(options.header), output, stream, options.timeout,
        options.connect_timeout, retries, options.cacert, options.dry_run, notes, sources)

# An edit works on blocks, (header, lines) pairs: the keys of a table, and its lines.  The header
# is None above the first table, and [] for a table that is none of ours.

def _parse_header(line):
    header = re.match(_TOML_HEADER, line)
    if header:
        try:
            return _toml_keys(header.group(1))
        except ValueError:  # TOML has escapes that JSON lacks
            return []
    if line.lstrip().startswith("[["):
        return []
    return None

def split_blocks(text):
    """Return the blocks of a TOML *text*; the first one has the lines above the first table."""
    blocks = [(None, [])]
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for line in lines:
        header = _parse_header(line)
        if header is not None:
            blocks.append((header, []))
        blocks[-1][1].append(line)
    return blocks

def _content_end(lines):
    """Return the index after the last of *lines* that is no comment and not blank."""
    end = len(lines)
    while end and re.match(_TOML_BLANK, lines[end - 1]):
        end -= 1
    return end

def _kept_comments(lines, is_last):
    """Return the comments at the end of the removed table *lines* that belong to what follows."""
    comments = lines[_content_end(lines):]
    if not is_last and all(map(str.strip, comments)):
        return comments
    after_blank = itertools.dropwhile(str.strip, comments)
    return list(after_blank)[1:]

def remove_table(blocks, keys):
    """Return *blocks* without the table *keys* and the tables in it.

    Comments after a blank line, or directly above the next table, are kept.
    """
    kept = []
    removed = []  # lines of the table just above, if that is removed
    for header, lines in blocks:
        if header and header[:len(keys)] == keys:
            removed = lines
            continue
        if removed:
            kept[-1][1].extend(_kept_comments(removed, False))
        removed = []
        kept.append((header, lines))
    if removed:
        last_lines = kept[-1][1]
        last_lines.extend(_kept_comments(removed, True))
        if last_lines and not last_lines[-1].strip():
            last_lines.pop()
    return kept

def _find_value(lines, key):
    """Return the index of the line that sets *key*, and where the value is in it, or None."""
    for index, line in enumerate(lines):
        pair = re.match(_TOML_PAIR, line)
        if pair and pair.group(1) == key:
            value = re.match(_TOML_VALUE, pair.group(2))
            if value:
                start = pair.start(2)
                return index, start, start + value.end(1)
        if index and line.lstrip().startswith("["):  # a line of an array
            return None
    return None

def set_value(lines, key, value, new_index):
    """Set *key* to the text *value* in *lines*, remove it for None; add a line at *new_index*."""
    found = _find_value(lines, key)
    if found:
        index, start, end = found
        line = lines.pop(index)
        if value is not None:
            lines.insert(index, line[:start] + _toml_text(value) + line[end:])
    elif value is not None:
        lines.insert(new_index, f"{key} = {_toml_text(value)}")

def set_current(blocks, name):
    """Set current, or remove it for None; a blank line sets it off at the top of the file."""
    lines = blocks[0][1]
    found = _find_value(lines, "current")
    first_line = "".join((lines + blocks[-1][1])[:1])
    set_value(lines, "current", name, 0)
    if not found and first_line.strip():
        lines.insert(1, "")
    if found and found[0] == 0 and name is None and lines and not lines[0].strip():
        del lines[0]

def _find_table(blocks, keys):
    for header, lines in blocks:
        if header == keys:
            return lines
    return None

def add_table(blocks, keys):
    """Add the table *keys* at the end of *blocks*, after a blank line; return its lines."""
    last_lines = blocks[-1][1]
    if last_lines and last_lines[-1].strip():
        last_lines.append("")
    names = []
    for key in keys:
        if not re.match(_TOML_KEY + r"\Z", key):
            key = _toml_text(key)
        names.append(key)
    lines = ["[" + ".".join(names) + "]"]
    blocks.append((keys, lines))
    return lines

def change_table(blocks, keys, old, new):
    """Change the table *keys* of *blocks* from the fields *old* to *new*, in texts alone."""
    for name in dict(old, **new):
        value = new.get(name)
        if value != old.get(name):
            lines = _find_table(blocks, keys) or add_table(blocks, keys)
            set_value(lines, name, value, _content_end(lines))

def _join_blocks(blocks, old_text):
    """Return the text of *blocks*, its last line as open as it was in *old_text*."""
    lines = []
    for _, block_lines in blocks:
        lines.extend(block_lines)
    text = "\n".join(lines)
    open_line = old_text.rpartition("\n")[2]
    stays_open = open_line and lines and lines[-1] == open_line
    if stays_open or not lines:
        return text
    return text + "\n"

def _has_meaning(text, path, wanted):
    try:
        document = parse_toml(text, path)
    except UsageError:
        return False
    document["current"] = document.get("current") or None
    document.setdefault("deployment", {})
    as_text = json.JSONEncoder(sort_keys=True, default=repr).encode  # nan equals nan in it
    return as_text(document) == as_text(wanted)

def edit_config(text, path, current, deployments):
    """Return the TOML *text* of the file *path* with this *current* and these *deployments*.

    All lines that say anything else stay as they are.  Raise UsageError where the text is
    written in a way that does not allow it.
    """
    config = parse_config(text, path)
    wanted = dict(parse_toml(text, path), current=current, deployment=deployments)
    has_crlf = text.count("\r\n") == text.count("\n") > 0
    if has_crlf:
        text = text.replace("\r\n", "\n")
    blocks = split_blocks(text)
    for name in config.deployments:
        if name not in deployments:
            blocks = remove_table(blocks, ["deployment", name])
    for name, deployment in deployments.items():
        old = config.deployments.get(name, {})
        change_table(blocks, ["deployment", name], old, deployment)
    if current != config.current:
        set_current(blocks, current)
    edited = _join_blocks(blocks, text)
    if has_crlf:
        edited = edited.replace("\n", "\r\n")
    if not _has_meaning(edited, path, wanted):
        raise UsageError(f"{path} is written in a way that only an editor can change")
    return edited
# -- Wire -------------------------------------------------------------------------------------

class WireError(Exception):
    """The bytes are not an HTTP/1.1 response; the message says why."""

class IncompleteError(WireError):
    """The connection was closed in the middle of a head or a body."""

_END_OF_HEAD = re.compile(br"\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.(\d) +([1-9]\d\d)(?: +(.*))?\Z", re.DOTALL)
_NO_BODY = (204, 304)
_TLS_RECORD = (b"\x15\x03", b"\x16\x03")
_SHOWN_BYTES = 20  # of an answer that is not HTTP

def parse_head(data):
    """Return the ResponseHead that the bytes *data* are; raise WireError where they are none.

    A line without a colon is ignored.  A line that begins with a blank continues the one before.
    """
    lines = [line.rstrip("\r") for line in data.decode("latin-1").rstrip("\r\n").split("\n")]
    status_line = _STATUS_LINE.match(lines[0].rstrip())
    if not status_line:
        raise WireError(f"the first line of its answer is {lines[0][:100]!r}")
    unfolded = []
    for line in lines[1:]:
        if line[:1] in (" ", "\t") and unfolded:
            unfolded[-1] += " " + line.strip()
        else:
            unfolded.append(line)
    headers = {}
    for line in unfolded:
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not name or not colon:
            continue
        value = value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    version = "1.0" if status_line.group(1) == "0" else "1.1"
    status = int(status_line.group(2))
    return ResponseHead(version, status, status_line.group(3) or "", headers, [lines[0]] + unfolded)

class ResponseDecoder:
    """Decode one HTTP/1.1 response (RFC 9112) from bytes that come cut anywhere.

    The states, in the order in which they are passed:

        head is None       interim responses (1xx), then the head
        not complete       the body: by its length, in chunks, or until the connection closes
        complete           what comes now is not of this response, and is kept as *unread*
    """

    def __init__(self, method="GET"):
        self.head = None
        self.complete = False
        self.keeps_open = False
        self.unread = b""
        self._method = method
        self._received = bytearray()  # of the head
        self._interim_bytes = 0
        self._take = self._take_until_close
        self._missing = 0  # bytes of the body, or of the chunk
        self._frame = b"\r\n"  # unfinished bytes between chunks, with the line end before them
        self._failure = None  # raised by the next call
        self._inflater = None

    def feed(self, data):
        """Return the bytes of the body that *data* brought, their content coding undone.

        Raise WireError where it is not HTTP.  Of a broken body the good bytes are returned, and
        the next call raises IncompleteError for its framing, ServerError for its coding.
        """
        if self._failure:
            raise self._failure
        if self.complete:
            self.unread += data
            return b""
        if self.head is None:
            data = self._take_head(data)
            if self.head is None:
                return b""
        body = self._take(data)
        if self._inflater:
            body = self._inflate(body)
        return body

    def finish(self):
        """Take note that the connection was closed; raise IncompleteError where that is too early.

        Where the head is still None, no response came.
        """
        if self._failure:
            raise self._failure
        if self.complete:
            return
        may_end = self._take in (self._take_until_close, self._take_trailer)
        if self.head is None or not may_end:
            raise IncompleteError("the connection was closed")
        self.complete = True

    def _take_head(self, data):
        """Take *data* as a part of the head; return what follows the head once that is whole."""
        start = max(0, len(self._received) - 3)
        self._received += data
        while True:
            self._check_beginning()
            end = _END_OF_HEAD.search(self._received, start)
            if not end:
                if self._interim_bytes + len(self._received) > MAX_HEAD_BYTES:
                    raise WireError(f"the head of its answer is over {MAX_HEAD_BYTES >> 20} MiB")
                return b""
            head = parse_head(bytes(self._received[:end.end()]))
            del self._received[:end.end()]
            if head.status >= 200 or head.status == 101:
                break
            self._interim_bytes += end.end()
            start = 0
        self.head = head
        self._choose_framing()
        rest = bytes(self._received)
        self._received = None
        return rest

    def _check_beginning(self):
        """Raise WireError as soon as the bytes received cannot become a head."""
        beginning = bytes(self._received[:7])
        if beginning == b"HTTP/1."[:len(beginning)]:
            return
        if beginning[:2] in _TLS_RECORD:
            raise WireError("it speaks TLS: try https://")
        shown = bytes(self._received[:_SHOWN_BYTES]).decode("latin-1")
        raise WireError(f"its answer begins with {shown!r}")

    def _choose_framing(self):
        """Choose how the end of the body is found (RFC 9112, 6.3)."""
        status, headers = self.head.status, self.head.headers
        tunnel = self._method == "CONNECT" and 200 <= status <= 299
        length = re.match(r"([0-9]+)\s*(,|\Z)", headers.get("content-length", ""))
        codings = headers.get("transfer-encoding", "").lower().split(",")
        if tunnel or status in _NO_BODY or status == 101 or self._method == "HEAD":
            self._take = self._take_length
        elif codings[-1].strip() == "chunked":
            self._take = self._take_chunks
        elif length:
            self._take = self._take_length
            self._missing = int(length.group(1)[:20])  # int refuses thousands of digits
        if headers.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate"):
            import zlib

            self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def _end(self, rest):
        """Note that the body is whole, and that *rest* comes after it."""
        connection = self.head.headers.get("connection", "").lower()
        self.complete = True
        self.unread = rest
        if self.head.version == "1.0":
            self.keeps_open = "keep-alive" in connection
        else:
            self.keeps_open = "close" not in connection and self.head.status != 101

    def _take_until_close(self, data):
        return data

    def _take_length(self, data):
        body = data[:self._missing]
        self._missing -= len(body)
        if not self._missing:
            self._end(data[len(body):])
        return body

    def _take_chunks(self, data):
        """Return what the chunks in *data* hold (RFC 9112, 7.1): a tight loop, once a chunk.

        Each turn begins at the line end after a chunk.  int() accepts the blanks around a size.
        """
        data = self._frame + data
        self._frame = b""
        at = self._missing
        pieces = [data[:at]]
        available = len(data)
        while at < available:
            end = data.find(b"\n", at + 2)
            if end < 0:
                self._frame = data[at:]
                if len(self._frame) > READ_BYTES:
                    self._failure = IncompleteError("a chunk of its answer has no size")
                break
            try:
                size = int(data[at:end], 16)
            except ValueError:
                size = self._parse_size(data[at:end])
            if size < 0:
                self._failure = IncompleteError("a chunk of its answer has no size")
                break
            if not size:
                self._take = self._take_trailer
                self._take_trailer(data[end:])
                break
            at = end + 1 + size
            pieces.append(data[end + 1:at])
        self._missing = max(0, at - available)
        return b"".join(pieces)

    def _parse_size(self, line):
        """Return the size in a *line* with an extension, or -1 for none."""
        try:
            return int(line.partition(b";")[0], 16)
        except ValueError:
            return -1

    def _take_trailer(self, data):
        """Ignore the lines after the last chunk, to the blank one."""
        self._frame += data
        end = _END_OF_HEAD.search(self._frame)
        if end:
            self._end(self._frame[end.end():])
        elif len(self._frame) > MAX_HEAD_BYTES:
            self._failure = IncompleteError("the end of its answer is too long")
        return b""

    def _inflate(self, body):
        import zlib

        try:
            return self._inflater.decompress(body)
        except zlib.error as error:
            self._failure = ServerError("the reply is not in the encoding that it claims")
            self._failure.__cause__ = error
            self.complete = False
            return b""

_FIELDS = ("data", "event", "id", "retry")

class EventDecoder:
    """Decode a stream of server-sent events (WHATWG HTML, 9.2.6) that comes cut anywhere.

    Lines that are no field of that standard are kept in *stray*, a list of texts, one for each
    block between blank lines: some servers write a bare JSON text there.  Take them out of it.
    """

    def __init__(self):
        self.stray = []
        self._unfinished = []  # pieces of a line whose end has not come
        self._after_cr = False  # the last bytes ended in CR: an LF that follows belongs to it
        self._at_beginning = True
        self._name = ""
        self._data = []
        self._stray_lines = []
        self._size = 0  # bytes since the last blank line

    def feed(self, data):
        """Return the Events that *data* completes; raise ServerError where one has no end."""
        if self._after_cr and data:
            self._after_cr = False
            if data.startswith(b"\n"):
                data = data[1:]
        if not data:
            return []
        self._size += len(data)
        if self._size > MAX_EVENT_BYTES:
            raise ServerError(f"the stream has an event of over {MAX_EVENT_BYTES >> 20} MiB")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = data.rfind(b"\n") + 1
        if not end:
            self._unfinished.append(data)
            return []
        self._unfinished.append(data[:end])
        text = b"".join(self._unfinished).decode("utf-8", "replace")
        self._unfinished = [data[end:]]
        if self._at_beginning:
            self._at_beginning = False
            if text.startswith("\ufeff"):  # a byte-order mark
                text = text[1:]
        return self._take_lines(text)

    def finish(self):
        """Take note of the end: an event that is not ended is dropped, a stray block is kept."""
        line = b"".join(self._unfinished).decode("utf-8", "replace")
        self._unfinished = []
        if line:
            self._take_line(line)
        self._end_stray()

    def _take_lines(self, text):
        """Return the Events that the lines of *text* complete."""
        if text.startswith("data: ") and text.endswith("\n\n"):
            # The usual case, a hundred events of one line at once, is worth no loop.
            texts = text[6:-2].split("\n\ndata: ")
            if text.count("\n") == 2 * len(texts) and not self._in_block():
                self._size = len(self._unfinished[0])
                return [Event("message", data) for data in texts]
        events = []
        for line in text[:-1].split("\n"):
            if line:
                self._take_line(line)
                continue
            if self._data:
                events.append(Event(self._name or "message", "\n".join(self._data)))
            self._end_stray()
            self._name = ""
            self._data = []
            self._size = len(self._unfinished[0])
        return events

    def _in_block(self):
        return bool(self._data or self._name or self._stray_lines)

    def _take_line(self, line):
        name, _, value = line.partition(":")
        if value.startswith(" "):
            value = value[1:]
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name and name not in _FIELDS:
            self._stray_lines.append(line)

    def _end_stray(self):
        if self._stray_lines:
            self.stray.append("\n".join(self._stray_lines))
            self._stray_lines = []
# -- Protocol ---------------------------------------------------------------------------------

BODY_OPTIONS = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty",
                "seed", "store")
HERE_DOCUMENT_BYTES = 100 * 1000  # a longer body does not fit into a command line
MAX_HELD_CHOICES = 4
MAX_REASON_CHARACTERS = 100
MAX_ERROR_NAME_CHARACTERS = 60  # a longer text in `error` is a sentence
THINK_START = "<think>"
THINK_END = "</think>"

# JSON documents

def _parse_number(text):
    """Return the number, or None for NaN and infinities: Python servers print them in logprobs."""
    number = float(text)
    if number - number != 0:
        return None
    return number

_JSON = json.JSONDecoder(parse_float=_parse_number, parse_constant=_parse_number)

def parse_json(text):
    """Return the document that *text* holds, with None for NaN; raise ValueError for no JSON."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

def _escape_surrogate(match):
    return "\\u%04x" % ord(match.group())

def json_text(document, indent=None):
    """Return *document* as JSON text, on one line without *indent*.

    Raise ServerError where it is nested too deeply.
    """
    separators = (",", ":") if indent is None else None
    try:
        text = json.dumps(document, ensure_ascii=False, indent=indent, separators=separators)
    except RecursionError as error:
        raise ServerError("the reply is nested too deeply to print") from error
    return re.sub("[\ud800-\udfff]", _escape_surrogate, text)

def get_field(document, name, kind):
    """Return the field *name* of *document* if both have the right shape, else None.

    *kind* is a type or a tuple of types.  True and False are no numbers.
    """
    if not isinstance(document, dict):
        return None
    value = document.get(name)
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    return None

# Requests

def endpoint_url(base_url, slug, path):
    """Return the address of *path*, such as /models, at the endpoint *slug*, or at the project.

    Raise UsageError where the address needs a slug and has none.
    """
    if not slug and "{endpoint}" in base_url:
        raise UsageError("this base URL has a place for an endpoint: give --endpoint SLUG")
    address, mark, query = base_url.replace("{endpoint}", slug or "").partition("?")
    if address.endswith(CHAT_PATH):
        address = address[:-len(CHAT_PATH)]
    elif slug and "{endpoint}" not in base_url:
        if address.endswith("/v1"):
            address = address[:-3]
        address += f"/{slug}/v1"
    return address + path + mark + query

def build_sampling(options):
    """Return the Sampling that the options ask for: what the user set, and nothing else.

    A --param of null drops a field that another option set, and stays null otherwise.
    """
    fields = {}
    for name in BODY_OPTIONS:
        value = getattr(options, name, None)
        if value is not None:
            fields[name] = value
    if getattr(options, "metadata", None):
        fields["metadata"] = dict(options.metadata)
    schema = getattr(options, "schema", None)
    if schema is not None:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": options.schema_name or "answer", "schema": schema},
        }
    ours = set(fields)
    for name, value in options.param:
        if value is None and name in ours:
            fields.pop(name, None)
        else:
            fields[name] = value
    headers = []
    for name, option in (("X-SLO-TTFT-Ms", "slo_ttft"), ("X-SLO-TPOT-Ms", "slo_tpot")):
        value = getattr(options, option, None)
        if value is not None:
            headers.append((name, str(value)))
    return Sampling(options.model, fields, headers)

def token_limit(sampling):
    """Return the limit of tokens that *sampling* sets, or None."""
    limit = sampling.fields.get("max_tokens")
    if limit is None:
        limit = sampling.fields.get("max_completion_tokens")
    return limit

def _encode_body(body):
    # UTF-8 as it stands, so that a lone surrogate cannot hide in an escape.
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")

def build_request(method, url, settings, body=None, headers=()):
    """Return the Request that sends *body*, a JSON document or None, to *url*.

    The headers of *settings* replace those of the same name.
    """
    streamed = bool(body and body.get("stream"))
    accept = "text/event-stream" if streamed else "application/json"
    common = [("Accept", accept), ("User-Agent", "xeroctl/" + __version__)]
    data = None
    if body is not None:
        data = _encode_body(body)
        common.append(("Content-Type", "application/json"))
    if settings.api_key:
        common.append(("Authorization", "Bearer " + settings.api_key))
    given = {name.lower() for name, _ in settings.headers}
    kept = [pair for pair in common + list(headers) if pair[0].lower() not in given]
    return Request(method, url, kept + list(settings.headers), data, streamed)

def build_chat_request(sampling, settings, messages, stream):
    """Return the Request for the completion of *messages*."""
    body = {"model": sampling.model or settings.endpoint, "messages": messages, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    ours = set(body)
    for name, value in sampling.fields.items():
        if value is None and name in ours:
            del body[name]
        else:
            body[name] = value
    url = endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH)
    return build_request("POST", url, settings, body, sampling.headers)

def build_stored_request(method, settings, path, query=(), body=None):
    """Return the Request for *path*, /ID or empty, below the stored completions of the endpoint."""
    from urllib.parse import urlencode

    url = endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH + path)
    if query:
        url += ("&" if "?" in url else "?") + urlencode(query, errors="replace")
    return build_request(method, url, settings, body)

def without_stream_options(request):
    """Return *request* without its stream_options, or None if it has none."""
    if not request.streamed:
        return None
    body = json.loads(request.body.decode("utf-8"))
    if "stream_options" not in body:
        return None
    del body["stream_options"]
    return request._replace(body=_encode_body(body))

def refuses_stream_options(error):
    """Return whether *error* is the refusal of a server that does not know stream_options."""
    if error.status not in (400, 422):
        return False
    words = f"{error} {error.body}"
    return re.search("(?i)stream_?options|include_usage", words) is not None

def build_curl_command(request, settings):
    """Return *request* as a curl command that is safe to paste: the key is a variable in it."""
    from shlex import quote

    words = ["curl", "-gsSN" if request.streamed else "-gsS", quote(request.url)]
    if request.method not in ("GET", "POST"):
        words += ["-X", request.method]
    for name, value in request.headers:
        if settings.api_key and value == "Bearer " + settings.api_key:
            words += ["-H", f'"{name}: Bearer ${ENV_API_KEY}"']
            continue
        if is_secret_name(name):
            value = "***"
        words += ["-H", quote(f"{name}: {value}")]
    if settings.cacert:
        words += ["--cacert", quote(settings.cacert)]
    if request.body is None:
        return " ".join(words)
    body = request.body.decode("utf-8")
    if len(request.body) <= HERE_DOCUMENT_BYTES:
        return " ".join(words + ["--data-raw", quote(body)])
    # The body is one line of JSON, and can be no end of the document.  -d drops its line end.
    return " ".join(words + ["-d", "@-", "<<'END'"]) + f"\n{body}\nEND"

# Messages, usage, text

def build_message(text, parts=()):
    """Return a user's message: its content is *text*, or a list of it and the other *parts*."""
    if not parts:
        return {"role": "user", "content": text}
    texts = [{"type": "text", "text": text}] if text else []
    return {"role": "user", "content": texts + list(parts)}

def content_text(message):
    """Return the text of a message or delta: its content, else its refusal."""
    content = get_field(message, "content", (str, list)) or get_field(message, "refusal", str)
    if isinstance(content, list):
        return "".join(get_field(part, "text", str) or "" for part in content)
    return content or ""

def _reasoning_text(message):
    return (get_field(message, "reasoning_content", str)
            or get_field(message, "reasoning", str) or "")

def _parse_count(document, name):
    count = get_field(document, name, (int, float))
    if isinstance(count, float) and count.is_integer():
        count = int(count)
    if isinstance(count, float) or count is None or abs(count) > MAX_NUMBER:
        return None
    return count

def parse_usage(usage):
    """Return the Usage that the object *usage* of a reply or chunk tells; floats may be whole."""
    prompt = get_field(usage, "prompt_tokens_details", dict)
    completion = get_field(usage, "completion_tokens_details", dict)
    return Usage(_parse_count(usage, "prompt_tokens"), _parse_count(usage, "completion_tokens"),
                 _parse_count(usage, "total_tokens"), _parse_count(prompt, "cached_tokens"),
                 _parse_count(completion, "reasoning_tokens"))

def _merge_usage(old, new):
    """Return *new* with what it does not tell from *old*: a later chunk takes nothing back."""
    if old is None:
        return new
    counts = [before if after is None else after for before, after in zip(old, new)]
    return Usage(*counts)

def join_surrogates(text):
    """Return *text* with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    if not re.search("[\ud800-\udfff]", text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

def _ends_in_high_surrogate(text):
    return "\ud800" <= text[-1:] <= "\udbff"

class ThoughtSplitter:
    """Tell <think>...</think> at the head of an answer from the rest, however the text is cut."""

    def __init__(self):
        self._is_head = True  # nothing but blanks came, or a part of the mark
        self._is_thought = False
        self._held = ""

    def feed(self, text):
        """Return (thought, answer): what *text* adds to each, the marks with the thought."""
        text = self._held + text
        self._held = ""
        if self._is_head:
            head = text.lstrip()
            if len(head) < len(THINK_START) and THINK_START.startswith(head):
                self._held = text
                return "", ""
            self._is_head = False
            self._is_thought = head.startswith(THINK_START)
        if not self._is_thought:
            return "", text
        thought, mark, answer = text.partition(THINK_END)
        if mark:
            self._is_thought = False
            return thought + mark, answer
        start = thought.rfind("<")
        if start >= 0 and THINK_END.startswith(thought[start:]):
            self._held = thought[start:]
            thought = thought[:start]
        return thought, ""

    def finish(self):
        """Return (thought, answer): what was held."""
        if self._is_thought:
            return self._held, ""
        return "", self._held

def extract_code_block(text):
    """Return the content of the first fenced code block of *text*, or None (CommonMark, 4.5).

    A block that is not closed reaches to the end.
    """
    block = re.search(r"(?ms)^([ \t]*)(```+|~~~+)[^`\n]*$\n?(.*?)(?:^[ \t]*\2[`~]*[ \t]*$|\Z)", text)
    if not block:
        return None
    indent = len(block.group(1))
    content = re.sub("(?m)^[ \t]{0,%d}" % indent, "", block.group(3))
    if content.endswith("\n"):
        content = content[:-1]
    return content

# The answer: from bytes to Chunks, and from Chunks to a Reply

class _ChunkBuilder:
    """Add up the documents of one read to a Chunk.

    It remembers over all reads what text was given, so that a whole message after its deltas,
    or a message that grows beside them, adds only what is new.
    """

    def __init__(self):
        self.finish_reason = None
        self.has_message = False  # a whole message came: it needs no finish reason
        self._choice_index = None  # of the choice that is the answer, once that is known
        self._held = []  # choices of another index, until choice 0 comes or is not expected
        self._given = bytearray()  # the text, in UTF-8: 100,000 small strings would weigh 6 MB
        self._pending_surrogate = ""
        self._has_id = self._has_model = False
        self._begin()

    def _begin(self):
        self._texts = []
        self._thoughts = []
        self._deltas = 0
        self._reason = self._usage = self._id = self._model = None
        self._tool_calls = []
        self._documents = []
        self._sources = []

    def add(self, document, source):
        """Add a chunk or reply of whatever shape, and its JSON text."""
        self._documents.append(document)
        self._sources.append(source)
        if not self._has_id:
            self._id = get_field(document, "id", str) or None
            self._has_id = self._id is not None
        if not self._has_model:
            self._model = get_field(document, "model", str) or None
            self._has_model = self._model is not None
        if document.get("usage"):
            usage = get_field(document, "usage", dict)
            self._usage = _merge_usage(self._usage, parse_usage(usage))
        choices = document.get("choices")
        if choices and isinstance(choices, list):
            self._add_choices(choices)

    def _add_choices(self, choices):
        """Add choice 0; where a server numbers its only choice otherwise, that one."""
        held = None
        for choice in choices:
            if not isinstance(choice, dict):
                continue
            index = choice.get("index") or 0
            if index == self._choice_index or index == 0 and self._choice_index is None:
                self._choice_index = index
                self._held = []
                self._add_choice(choice)
                return
            held = held or choice
        if held and self._choice_index is None:
            self._held.append(held)
            if len(self._held) > MAX_HELD_CHOICES:
                self._add_held()

    def _add_held(self):
        """Take the choices of another index for the answer: choice 0 does not come."""
        held = self._held
        self._held = []
        for choice in held:
            index = choice.get("index")
            if self._choice_index is None:
                self._choice_index = index
            if index == self._choice_index:
                self._add_choice(choice)

    def _add_choice(self, choice):
        delta = choice.get("delta")
        text = thought = ""
        if isinstance(delta, dict):
            text = delta.get("content")
            if not text or not isinstance(text, str):
                text = content_text(delta)
            if not text or len(delta) > 1:
                thought = self._add_other_fields(delta)
        message = choice.get("message")
        if message and not text:
            text = self._rest_of_message(content_text(message))
            thought = thought or self._add_other_fields(message)
            self.has_message = self.has_message or delta is None
        if text:
            self._texts.append(text)
        if text or thought:
            self._deltas += 1
        reason = choice.get("finish_reason")
        if reason and isinstance(reason, str):
            self._reason = self.finish_reason = reason

    def _add_other_fields(self, message):
        """Add what stands beside the content of a message or delta; return its reasoning."""
        thought = _reasoning_text(message)
        if thought:
            self._thoughts.append(thought)
        calls = list(get_field(message, "tool_calls", list) or ())
        if get_field(message, "function_call", dict):  # the older form
            calls.append({"function": message["function_call"]})
        for call in calls:
            if get_field(call, "function", dict) or get_field(call, "id", str):
                self._tool_calls.append(call)
        return thought

    def _rest_of_message(self, text):
        """Return what the *text* of a whole message adds to what was given."""
        given = self._given.decode("utf-8") + join_surrogates("".join(self._texts))
        if text.startswith(given):
            return text[len(given):]
        return ""

    def build(self, at):
        """Return the Chunk of all that was added since the last call, or None for nothing."""
        if not (self._documents or self._deltas or self._reason or self._tool_calls):
            return None
        text = self._pending_surrogate + "".join(self._texts)
        self._pending_surrogate = ""
        if _ends_in_high_surrogate(text) and not self.finish_reason:
            self._pending_surrogate = text[-1]
            text = text[:-1]
        text = join_surrogates(text)
        self._given += text.encode("utf-8")
        thoughts = join_surrogates("".join(self._thoughts))
        chunk = Chunk(text, thoughts, self._deltas, self._reason, self._usage, self._id,
                      self._model, self._tool_calls, self._documents, self._sources, at)
        self._begin()
        return chunk

    def finish(self, at):
        """Return the last Chunk, or None for nothing."""
        self._add_held()
        return self.build(at)

class AnswerDecoder:
    """Decode the body of an answer, a stream or one document, from bytes to Chunks.

    The states, in the order in which they are passed:

        undecided      blanks came at most: what it is shows in the type and the first other byte
        stream         events, and bare JSON where servers put it between them
        document       one JSON text, parsed at its end
        ended          after [DONE], or with *error* set: nothing more need be read

    *error* is the XeroctlError found in what was fed, to be raised after its Chunk was used.
    """

    def __init__(self, streamed, head, context):
        self.ended = False
        self.error = None
        self._streamed = streamed
        self._context = context
        self._has_no_body = head.status == 204
        self._type = head.headers.get("content-type", "").lower()
        self._received = bytearray()  # while undecided, and of a document
        self._events = None  # EventDecoder of a stream
        self._is_document = False
        self._builder = _ChunkBuilder()

    def feed(self, data, at):
        """Return the Chunk of what *data* brought at the monotonic time *at*, or None."""
        if self.ended:
            return None
        if self._events is None:
            self._received += data
            if len(self._received) > MAX_REPLY_BYTES:
                self._fail(ServerError(f"the reply is over {MAX_REPLY_BYTES >> 20} MiB"))
            if not self._is_document:
                self._decide()
            if self._events is None:
                return None
            data = bytes(self._received)
            self._received = bytearray()
        return self._feed_stream(data, at)

    def finish(self, at):
        """Return the last Chunk, or None; set *error* where the end or the answer is missing."""
        if self.ended:
            return None
        self.ended = True
        is_stream = "event-stream" in self._type or self._streamed and "json" not in self._type
        if self._events:
            self._events.finish()
            self._take_stray()
        elif self._is_document or self._has_no_body or not is_stream:
            self._parse_document()
        chunk = self._builder.finish(at)
        has_end = self._builder.finish_reason or self._builder.has_message
        if is_stream and not self._is_document and not has_end:
            self._fail(CutShortError("the reply was cut short: the stream ended before its end",
                                     retryable=True))
        return chunk

    def _decide(self):
        """Decide whether it is a stream, once a byte that is no blank came."""
        first = self._received.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if not first:
            return
        looks_whole = "json" in self._type or first in (b"{", b"[", b"<") or not self._streamed
        if "event-stream" in self._type or not looks_whole:
            self._events = EventDecoder()
        else:
            self._is_document = True

    def _feed_stream(self, data, at):
        try:
            events = self._events.feed(data)
            self._take_events(events)
        except XeroctlError as error:
            self._fail(error)
        if self._events.stray:
            self._take_stray()
        if self.ended:
            return self._builder.finish(at)
        return self._builder.build(at)

    def _take_events(self, events):
        """Add the documents of *events*; all of a read are parsed as one where that goes well."""
        texts = []
        for name, data in events:
            if name == "message" and data[:1] == "{":
                texts.append(data)
                continue
            self._add_texts(texts)
            texts = []
            if not self.ended:
                self._take_odd_event(name, data.strip())
            if self.ended:
                return
        self._add_texts(texts)

    def _take_odd_event(self, name, data):
        """Take an event that has a name, or whose data is no object."""
        if name == "message":
            if data.strip('"').lower() == "[done]":
                self.ended = True
            elif data:
                self._add_texts([data])
            return
        try:
            document = parse_json(data)
        except ValueError:
            document = data
        if name == "error":
            if not get_field(document, "error", (str, dict)):
                document = {"error": document or "no reason given"}
            self._add_documents([document], [None])
        elif get_field(document, "choices", list):
            self._add_documents([document], [data])

    def _add_texts(self, texts):
        """Add the JSON documents *texts*."""
        if not texts or self.ended:
            return
        joined = ",".join(texts)
        try:
            documents = _JSON.decode(f"[{joined}]")
        except (ValueError, RecursionError):
            documents = ()
        sources = texts
        if "NaN" in joined or "Infinity" in joined or "\n" in joined:
            sources = [None] * len(texts)
        if len(documents) == len(texts):
            self._add_documents(documents, sources)
            return
        for text in texts:
            try:
                document = parse_json(text)
            except ValueError as error:
                failure = ServerError("the stream holds something that is not JSON", body=text)
                failure.__cause__ = error
                self._fail(failure)
                return
            self._add_documents([document], [None])

    def _add_documents(self, documents, sources):
        """Add *documents* up to the first that is an error; empty texts and null are skipped."""
        for document, source in zip(documents, sources):
            if not is_error(document):
                self._builder.add(document, source)
            elif document not in (None, "", []):
                self._fail(build_error(document, self._context))
                return

    def _take_stray(self):
        """Take the bare JSON that stands in the stream, and lines such as `error: {...}`."""
        blocks = self._events.stray
        self._events.stray = []
        for block in blocks:
            block = block.lstrip()
            if block.startswith("error:"):
                self._take_odd_event("error", block[6:].strip())
            while block[:1] in ("{", "[") and not self.error:
                try:
                    document, end = _JSON.raw_decode(block)
                except (ValueError, RecursionError):
                    break
                self._add_documents([document], [None])
                block = block[end:].strip()
            if re.match(r"(?i)data: *\[done\]", block):
                self.ended = True

    def _parse_document(self):
        """Add the one document that was received; set *error* where it is none."""
        try:
            document = parse_reply(bytes(self._received), self._context)
            if is_error(document):
                raise build_error(document, self._context)
        except XeroctlError as error:
            self._fail(error)
        else:
            self._builder.add(document, None)

    def _fail(self, error):
        self.error = self.error or error
        self.ended = True

def parse_reply(data, context):
    """Return the JSON document that *data* is; raise ServerError where it is none or an error.

    For a completion is_error tells more: a list, or a document with a message, is no error here.
    """
    try:
        document = parse_json(data.decode("utf-8-sig"))
    except ValueError as error:
        what = "not JSON"
        if data.lstrip().startswith(b"<"):
            what = "an HTML page"
        elif not data:
            what = "empty"
        message = f"the reply{context.via} is {what}: check the base URL"
        raise ServerError(message) from error
    if has_error(document):
        raise build_error(document, context)
    return document

class Reply:
    """An answer, added up from Chunks: what arrived, also of a try that failed in the middle."""

    def __init__(self, max_tokens=None):
        self.max_tokens = max_tokens  # the limit that the request set
        self.finish_reason = None
        self.usage = parse_usage(None)
        self.id = self.model = None
        self.deltas = 0  # events with text or reasoning in them
        self.tool_calls = []  # names of the functions that the model asked for
        self.started = False  # a token came
        self.first_at = self.last_at = None  # monotonic times of text or reasoning
        self.seconds = self.first_seconds = None  # of the try that answered, set by who shows it
        self._has_reasoning_field = False
        self._raw_text = bytearray()  # UTF-8: a list of 100,000 small strings would weigh 6 MB

    def add(self, chunk):
        """Take in one Chunk."""
        self.id = self.id or chunk.id
        self.model = self.model or chunk.model
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.usage:
            self.usage = _merge_usage(self.usage, chunk.usage)
        for call in chunk.tool_calls:
            name = get_field(get_field(call, "function", dict), "name", str)
            if name or not self.tool_calls:
                self.tool_calls.append(name or "")
        self._raw_text += chunk.text.encode("utf-8")
        self._has_reasoning_field = self._has_reasoning_field or bool(chunk.reasoning)
        if chunk.deltas:
            self.deltas += chunk.deltas
            self.last_at = chunk.at
            if self.first_at is None:
                self.first_at = chunk.at
        self.started = self.started or bool(chunk.deltas or chunk.tool_calls)

    @property
    def raw_text(self):
        """The text that arrived so far, as the server sent it."""
        return self._raw_text.decode("utf-8")

    @property
    def text(self):
        """The answer that arrived so far, without <think>...</think> at its head."""
        splitter = ThoughtSplitter()
        thought, answer = splitter.feed(self.raw_text)
        answer += splitter.finish()[1]
        if thought:
            return answer.lstrip()
        return answer

    @property
    def has_reasoning(self):
        """Whether reasoning came, in fields of its own or in the text."""
        return self._has_reasoning_field or self.raw_text.lstrip().startswith(THINK_START)

    def check_answer(self):
        """Raise CutShortError where the server says that it failed, ServerError for no answer."""
        kind = _reason_kind(self.finish_reason)
        if kind == "failed":
            raise CutShortError("the reply was cut short: the server failed"
                                + _reason_in_brackets(self.finish_reason), retryable=True)
        if self.tool_calls or kind == "tool" or self.text.strip():
            return
        if not self.deltas and kind == "none":
            raise ServerError("the reply holds no answer")
        message = "the answer is empty"
        if self.has_reasoning:
            message += ": only reasoning came"
        if kind in _WARNINGS:
            message += _reason_in_brackets(self.finish_reason)
        raise ServerError(message)

_REASON_KINDS = (  # the first that matches counts; what none matches is unknown
    ("end", r"(stop|eos|eos_token|end_turn|stop_sequence)\Z"),
    ("tool", r"(tool_calls?|tool_use|function_call)\Z"),
    ("failed", r"(error|abort|cancell?ed|timeout|failed)|.*(network|server|internal)_error|"
               r"insufficient_system_resource"),
    ("withheld", r".*(filter|safety|recitation|refus|block|prohibit|spii|sensitive|moderat)"),
    ("cut", r".*(length|max|token)"),
)
_WARNINGS = {
    "withheld": "the answer was cut or withheld by a content filter",
    "cut": "the answer was cut at the token limit",
    "unknown": "the answer may not be whole",
}

def _reason_kind(reason):
    """Return what a finish reason means: none, end, tool, failed, withheld, cut or unknown."""
    if reason is None:
        return "none"
    for kind, pattern in _REASON_KINDS:
        if re.match(pattern, reason.lower(), re.DOTALL):
            return kind
    return "unknown"

def _reason_in_brackets(reason):
    return f" (finish reason {reason[:MAX_REASON_CHARACTERS]})"

def finish_warning(reply):
    """Return what the user must know about how *reply* ended, even with --quiet, or None."""
    kind = _reason_kind(reply.finish_reason)
    if kind not in _WARNINGS:
        return None
    warning = _WARNINGS[kind] + _reason_in_brackets(reply.finish_reason)
    if kind == "cut" and reply.max_tokens is not None:
        warning += ": see --max-tokens"
    return warning

def finish_note(reply):
    """Return what the user may want to know about how *reply* ended, or None."""
    if reply.tool_calls or _reason_kind(reply.finish_reason) == "tool":
        return "the model asked for a tool call: -o json shows it"
    if reply.finish_reason is None:
        return "the server gave no reason for the end: the answer may be incomplete"
    return None

# Errors, whatever their shape

# Names in small letters without other characters, the best first.
_ERROR_FIELDS = ("error", "detail", "message", "msg", "errormessage", "errormsg", "errmsg",
                 "errordescription", "statusmsg", "baseresp", "faultstring", "fault", "errors")
_WEAK_ERROR_FIELDS = ("reason", "description", "title")  # do not make a document an error
_STATUS_FIELDS = ("code", "status", "status_code", "statusCode", "error_code")
_CODE_FIELDS = ("code", "type", "status", "status_code", "__type")
_STATUS_WORDS = (  # of codes and types, for errors that come with HTTP 200
    (429, "rate.?limit|too.?many|quota|throttl"),
    (401, "api.?key|authenticat|unauthori[sz]ed|invalid.?token"),
    (403, "permission|forbidden|access.?denied|scope_"),
    (404, "not.?found"),
    (503, "overload|unavailable|server.?error|internal|time.?out|capacity"),
    (400, "invalid.?request|bad.?request|context.?length|validation|invalid_"),
)
_QUOTA_USED_UP = re.compile("(?i)insufficient.?(quota|balance|credit|fund)|quota.?exceeded|"
                            "exceeded.?current.?quota|billing|credit.?balance")
_PLAIN_HTTP = re.compile("(?i)plain HTTP (request|to an SSL)|HTTP request (was sent )?to an HTTPS")

def _normalised(document):
    return {re.sub("[^a-z]", "", name.lower()): value for name, value in document.items()}

def _unpacked_text(text, depth):
    """Return what an error *text* says: it may be JSON, or HTML, in its turn."""
    packed = re.match(r"\s*(?:data: *|error: *)?([{\[].*)", text, re.DOTALL)
    if packed and depth:
        try:
            document, _ = _JSON.raw_decode(packed.group(1))
        except (ValueError, RecursionError):
            return text
        return error_sentence(document, depth - 1) or text
    if text.startswith("<"):
        return _page_title(text) or text
    return text

def _page_title(text):
    import html

    title = re.search(r"(?is)<(title|message)\b[^>]*>(.*?)</\1>", text)
    if not title:
        return ""
    return html.unescape(title.group(2)).strip()

def error_sentence(document, depth=6):
    """Return what an error *document* of any known shape says, or an empty text."""
    if isinstance(document, str):
        return _unpacked_text(document, depth)
    if isinstance(document, list) and depth:
        sentences = [error_sentence(item, depth - 1) for item in document]
        return "; ".join(filter(None, sentences))
    if not isinstance(document, dict) or not depth:
        return ""
    fields = _normalised(document)
    sentences = []
    for name in _ERROR_FIELDS + _WEAK_ERROR_FIELDS:
        sentence = error_sentence(fields.get(name), depth - 1)
        if not sentence or sentence in sentences:
            continue
        sentences.append(sentence)
        if name != "error" or isinstance(fields[name], dict):  # a text may be a mere name
            break
    sentence = ": ".join(sentences)
    raw = error_sentence(get_field(fields.get("metadata"), "raw", (str, dict)), depth - 1)
    if raw:  # OpenRouter's: the words of the provider behind it
        sentence = f"{sentence.rstrip('.')}: {raw}"
    provider = get_field(fields.get("metadata"), "provider_name", str)
    if sentence and provider:
        sentence += f" (provider {provider})"
    where = get_field(document, "loc", list)  # FastAPI's: the path of the field it refuses
    if where and sentence:
        path = ".".join(str(part) for part in where if isinstance(part, (str, int)))
        sentence = f"{path}: {sentence}"
    return sentence

def _failed_choice(document):
    """Return the choice of a reply or chunk that reports an error, as OpenRouter does, or None."""
    for choice in get_field(document, "choices", list) or ():
        if isinstance(choice, dict) and choice.get("error"):
            return choice
    return None

def has_error(document):
    """Return whether *document*, which came with HTTP 200, calls itself an error."""
    if not isinstance(document, dict):
        return False
    base = document.get("base_resp")  # MiniMax's, also in good replies
    return bool(get_field(document, "error", (str, dict)) or document.get("object") == "error"
                or document.get("success") is False
                or isinstance(base, dict) and base.get("status_code"))

def is_error(document):
    """Return whether *document*, which came with HTTP 200 for a completion, is an error."""
    if not isinstance(document, dict) or document.get("error"):
        return True
    if document.get("choices"):
        return _failed_choice(document) is not None
    if has_error(document):
        return True
    fields = _normalised(document)
    fields.pop("baseresp", None)
    if fields.get("detail") or fields.get("errors") or fields.get("fault"):
        return True
    return any(get_field(fields, name, str) for name in _ERROR_FIELDS)

def _error_details(document):
    """Return the part of an error *document* that holds its code."""
    for name in ("error", "errors", "base_resp"):
        value = get_field(document, name, (dict, list))
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict):
            return value
    return document

def _error_code(details, status):
    """Return the server's code for an error, else its type, where it says more than *status*."""
    for name in _CODE_FIELDS:
        code = get_field(details, name, (str, int))
        if code and str(code) not in (str(status), "None"):  # Python servers print a missing one
            return str(code)
    return None

def _names_of(document):
    """Return the texts in *document* that may name the class of an error."""
    names = [get_field(document, name, str) or "" for name in _CODE_FIELDS + ("error_type",)]
    error = get_field(document, "error", str) or ""
    if len(error) <= MAX_ERROR_NAME_CHARACTERS:
        names.append(error)
    return " ".join(names)

def _effective_status(details, document, names, status):
    """Return the HTTP status of an error's class: its own number or *names* in a reply of 2xx."""
    if not 200 <= status <= 299:
        return status
    for part in (details, document):
        for field in _STATUS_FIELDS:
            claimed = str(get_field(part, field, (int, str)))
            if re.match(r"[45]\d\d\Z", claimed):
                return int(claimed)
    for effective, pattern in _STATUS_WORDS:
        if re.search(pattern, names, re.IGNORECASE):
            return effective
    return status

def retry_after_seconds(headers, details):
    """Return the seconds that a response asks us to wait (RFC 9110, 10.2.3), or None.

    The date form counts from the response's own Date, so that our clock need not be right.
    """
    from email.utils import mktime_tz, parsedate_tz

    number = r"\s*(\d+(?:\.\d+)?)\s*(?:,|\Z)"
    value = headers.get("retry-after", "")
    milliseconds = re.match(number, headers.get("retry-after-ms", ""))
    if milliseconds:
        seconds = float(milliseconds.group(1)) / 1000
    elif re.match(number, value):
        seconds = float(re.match(number, value).group(1))
    else:
        seconds = get_field(details, "retry_after", (int, float))
        with contextlib.suppress(Exception):  # no dates, or odd ones: old Pythons break on them
            seconds = mktime_tz(parsedate_tz(value)) - mktime_tz(parsedate_tz(headers.get("date")))
    if seconds is None:
        return None
    return max(0, min(seconds, MAX_NUMBER))

def is_retryable_status(status):
    """Return whether a failure with this HTTP status may pass."""
    return status in (408, 409, 429) or 500 <= status <= 599

def is_retryable_now(error):
    """Return whether another try may help, and the server does not ask for a long wait first."""
    return error.retryable and (error.retry_after or 0) <= MAX_RETRY_DELAY_SECONDS

def _asks_for_chat(context):
    return context.method == "POST" and context.url.partition("?")[0].endswith(CHAT_PATH)

def _advice_for_missing(context):
    """Return the advice for HTTP 404: this server may lack what was asked for."""
    advice = "check the base URL"
    if context.plain_url:
        advice = f"check --endpoint and the base URL: without slugs it is {context.plain_url}"
    if _asks_for_chat(context):
        return advice
    missing = "stored completions, or not this one"
    if context.url.endswith("/models"):
        missing = "list of models"
    if not context.plain_url:
        return f"this server has no {missing}"
    return f"this server has no {missing}, or {advice}"

def _advice(effective, context, retry_after, is_quota, is_json):
    """Return what to do about an error of this HTTP status, or None."""
    if is_quota:
        return "waiting does not help: check the plan and the credit"
    if retry_after and retry_after > MAX_RETRY_DELAY_SECONDS:
        return f"the server asks to wait {round(retry_after)} s"
    if effective == 401 and not context.secrets:
        return f"set {ENV_API_KEY} or give --api-key"
    if effective == 403 and not is_json:
        return "a proxy or firewall on the way may have answered"
    if effective == 404 or effective == 405 and not _asks_for_chat(context):
        return _advice_for_missing(context)
    return {
        401: "check the API key",
        403: "this key may not do that: check its scopes",
        407: "the proxy wants a user and password: put them into its URL",
        429: "wait, or raise --retries",
    }.get(effective)

def _body_text(document):
    """Return *document*, text or parsed JSON, as text for --verbose and for unknown shapes."""
    if isinstance(document, str):
        return document
    try:
        return json_text(document)
    except XeroctlError:
        return ""

def _has_unknown_words(document):
    """Return whether an error *document* has none of the known fields, but others."""
    if not isinstance(document, dict) or "error" in document or document.get("choices"):
        return False
    return any(value not in (None, "", [], {}) for value in document.values())

def _error_class(status):
    if status in (401, 403):
        return AuthError
    if status == 429:
        return RateLimitError
    if 400 <= status <= 499:
        return RefusedError
    return ServerError

def build_error(document, context, is_json=True):
    """Return the error that *document* describes: parsed JSON, or a text for anything else.

    With HTTP 200 the document's own number or names say what class of error it is.  *is_json*
    says that the server itself wrote it, not a proxy with a page of its own.
    """
    body = redact(_body_text(document), context.secrets)
    if isinstance(document, list) and len(document) == 1:  # as Gemini sends it
        document = document[0]
    if not get_field(document, "error", (str, dict)):
        document = _failed_choice(document) or document
    details = _error_details(document)
    names = f"{_names_of(details)} {_names_of(document)}"
    effective = _effective_status(details, document, names, context.status)
    retry_after = retry_after_seconds(context.headers, details)
    is_quota = effective in (402, 429) and _QUOTA_USED_UP.search(names) is not None
    advice = _advice(effective, context, retry_after, is_quota, is_json)
    sentence = error_sentence(document)
    if not sentence and _has_unknown_words(document):
        sentence = body
    if context.url.startswith("http:") and _PLAIN_HTTP.search(sentence):
        advice = "begin the base URL with https://"
    sentence = " ".join(redact(sentence, context.secrets).split())[:MAX_ERROR_CHARACTERS]
    if advice:
        sentence = sentence.rstrip(".")
    code = redact(_error_code(details, effective) or "", context.secrets)
    request_id = redact(context.headers.get("x-request-id", ""), context.secrets)
    place, status = _error_place(context, code, request_id)
    return _error_class(effective)(
        ": ".join(filter(None, [place, sentence, advice])), status, code or None,
        request_id or None, retryable=is_retryable_status(effective) and not is_quota,
        retry_after=retry_after, body=body)

def _error_place(context, code, request_id):
    """Return the first words of an error's message, and the HTTP status that is to be told."""
    named = [code, request_id and "request " + request_id]
    names = ", ".join(filter(None, named))
    if names:
        names = f" ({names})"
    if 200 <= context.status <= 299:
        return "error in the reply" + names, None
    place = f"HTTP {context.status}{names}"
    if context.status == 404:
        place += " at " + redact(context.url, context.secrets)
    return place + context.via, context.status

def parse_error(data, context):
    """Return the error that a response with an HTTP status of failure and body *data* is."""
    body = data.decode("utf-8", "replace").strip().lstrip("\ufeff")
    text = body
    if 300 <= context.status <= 399:
        target = context.headers.get("location")
        text = "redirects are not followed"
        if target and _asks_for_chat(context):
            text += f": if you trust {target}, make it the base URL"
        elif target:
            text += f" (to {target})"
    is_json = not text
    try:
        document = parse_json(text)
        is_json = True
    except ValueError:
        document = text
        if text.startswith("<"):
            title = _page_title(text)
            document = "the answer is an HTML page" + (title and ": " + title)
    error = build_error(document, context, is_json)
    error.body = redact(body, context.secrets)
    return error

def retry_delay(attempt, retry_after, jitter):
    """Return the seconds to wait before try number *attempt* + 1; *jitter* is from 0 to 1.

    The server's word counts, up to a limit; else the wait doubles from half a second, less up to
    a quarter of it, so that a crowd of clients does not come back at once.
    """
    if retry_after is None:
        retry_after = 0.5 * 2 ** min(attempt - 1, 10) * (1 - jitter / 4)
    return min(retry_after, MAX_RETRY_DELAY_SECONDS)

def list_items(document, what):
    """Return the objects in the list that *document* is or holds; null counts as an empty list.

    Raise ServerError, which names *what*, where it holds no list.
    """
    items = document
    if isinstance(document, dict) and "data" in document:
        items = document["data"] or []
    if not isinstance(items, list):
        raise ServerError(f"the reply holds no list of {what}")
    return [item for item in items if isinstance(item, dict)]
# -- Messages ---------------------------------------------------------------------------------

CONVERSATION_FORMAT = "xeroctl-conversation"
CONVERSATION_VERSION = 1
SYSTEM_ROLES = ("system", "developer")

class Conversation:
    """The messages of a chat, oldest first, each in the API's shape with every field it came with.

    *messages* are what the next question is sent after.  *unanswered* is the last question while
    it has no answer: it is saved, and asked again by /retry, but no other question is sent with
    it.  A turn is a user message and all that follows it up to the next one.
    """

    def __init__(self, messages=(), unanswered=None):
        self.messages = list(messages)
        self.unanswered = unanswered

    @property
    def system(self):
        """The text of the leading system message, or None."""
        if self._has_system():
            return content_text(self.messages[0])
        return None

    def set_system(self, text):
        """Set the leading system message to *text*; remove it where that is empty or None."""
        message = {"role": "system"}
        if self._has_system():
            message = self.messages.pop(0)
        if text:
            self.messages.insert(0, dict(message, content=text))

    @property
    def count(self):
        """The number of messages, the leading system message not counted."""
        return len(self.all_messages()) - self._has_system()

    def all_messages(self):
        """Return the messages and, as the last one, the question that has no answer."""
        if self.unanswered:
            return self.messages + [self.unanswered]
        return self.messages

    def add_turn(self, question, answer):
        """Add the message *question* and the text *answer*; where that is blank, it is unanswered."""
        self.unanswered = None
        if answer.strip():
            self.messages += [question, {"role": "assistant", "content": answer}]
        else:
            self.unanswered = question

    def clear(self):
        """Forget everything but the leading system message."""
        del self.messages[self._has_system():]
        self.unanswered = None

    def turns(self):
        """Return the list of turns, each a list of messages; the unanswered question is one."""
        turns = []
        for message in self.all_messages():
            if message["role"] == "user":
                turns.append([message])
            elif turns:
                turns[-1].append(message)
        return turns

    def last_question(self):
        """Return (message, messages before it) of the newest turn; (None, []) where there is none."""
        turns = self.turns()
        if not turns:
            return None, []
        messages = self.all_messages()
        return turns[-1][0], messages[:len(messages) - len(turns[-1])]

    def undo(self):
        """Take the newest turn away and return its question, or None where there is no turn."""
        question, before = self.last_question()
        if question:
            self.messages, self.unanswered = list(before), None
        return question

    def drop(self, count):
        """Take the oldest *count* turns away, system messages in them stay; return how many went."""
        starts = []
        for index, message in enumerate(self.messages):
            if message["role"] == "user":
                starts.append(index)
        count = min(count, len(starts))
        end = (starts + [len(self.messages)])[count]
        if count:
            kept = [message for message in self.messages[:end] if message["role"] in SYSTEM_ROLES]
            self.messages[:end] = kept
        return count

    def last_answer(self):
        """Return the text of the newest answer that has text, or None."""
        for message in reversed(self.messages):
            if message["role"] == "assistant" and content_text(message).strip():
                return content_text(message)
        return None

    def _has_system(self):
        return bool(self.messages) and self.messages[0]["role"] in SYSTEM_ROLES

def message_text(message):
    """Return what *message* says, for a reader: its text, and names for all else that is in it."""
    pieces = [content_text(message)]
    for part in get_field(message, "content", list) or ():
        if get_field(part, "text", str) is None:
            pieces.append(f"[{get_field(part, 'type', str) or 'part of unknown type'}]")
    if message.get("tool_calls"):
        pieces.append(f"[tool calls: {json_text(message['tool_calls'])}]")
    return "\n".join(filter(None, pieces))

def build_document(conversation, endpoint, model, saved_at):
    """Return the JSON text that keeps *conversation*; *saved_at* is its time in ISO 8601."""
    return json_text({
        "format": CONVERSATION_FORMAT,
        "version": CONVERSATION_VERSION,
        "endpoint": endpoint,
        "model": model,
        "saved_at": saved_at,
        "messages": conversation.all_messages(),
    }, indent=2) + "\n"

def _check_message(message, where):
    if not isinstance(message, dict) or not get_field(message, "role", str):
        raise UsageError(f"{where}: no message: it has no role")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return
    has_other = any(message.get(name) for name in ("refusal", "tool_calls", "function_call"))
    if not isinstance(content, str) and (content is not None or not has_other):
        raise UsageError(f"{where}: no text in it")

def _unusual_roles(messages):
    """Return a note on the first message whose role is not the usual one there, or no note."""
    usual = "user"
    for index, message in enumerate(messages):
        role = message["role"]
        if index == 0 and role in SYSTEM_ROLES:
            continue
        if role != usual:
            return [f"messages[{index}]: the role is {role!r} where {usual!r} is usual: "
                    "all is kept and sent as it is"]
        usual = "assistant" if role == "user" else "user"
    return []

def parse_conversation(text):
    """Return (conversation, endpoint, model, notes) of a saved or exported conversation.

    That is a document of /save, a list of messages, or an object with messages or data.  A last
    message of the user becomes the unanswered question.  Notes say what is unusual.  Raise
    UsageError, saying what is wrong and where, for what is no conversation.
    """
    try:
        document = parse_json(text)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from error
    messages = document
    if isinstance(document, dict):
        form = document.get("format", CONVERSATION_FORMAT)
        version = document.get("version", CONVERSATION_VERSION)
        if (form, version) != (CONVERSATION_FORMAT, CONVERSATION_VERSION):
            raise UsageError(f"not format {CONVERSATION_FORMAT!r}, version {CONVERSATION_VERSION}")
        messages = document.get("messages", document.get("data"))
    if not isinstance(messages, list):
        raise UsageError("no list of messages in it")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    conversation = Conversation(messages)
    if messages and messages[-1]["role"] == "user":
        conversation.unanswered = conversation.messages.pop()
    endpoint, model = get_field(document, "endpoint", str), get_field(document, "model", str)
    return conversation, endpoint, model, _unusual_roles(messages)

# -- Text -------------------------------------------------------------------------------------

# Control characters become their pictures (U+2400 and on).  What hides or reorders text becomes
# U+FFFD: zero-width space and no-break space, word joiner, bidirectional overrides and isolates,
# tags.  The joiners U+200C, U+200D and U+FE0F stay: scripts and emoji need them.
_VISIBLE = {code: 0x2400 + code for code in range(0x20)}
_VISIBLE[0x7F] = 0x2421
for _code in (*range(0x80, 0xA0), 0x200B, *range(0x202A, 0x202F), *range(0x2060, 0x2070), 0xFEFF,
              *range(0xE0000, 0xE0080)):
    _VISIBLE[_code] = 0xFFFD
_VISIBLE[ord("\n")] = "\n"
_VISIBLE[ord("\t")] = "\t"
_VISIBLE[ord("\r")] = None  # it would overwrite the line

def sanitize(text):
    """Return *text* with nothing in it that drives a terminal or hides from its reader."""
    return text.translate(_VISIBLE)

def one_line(text):
    """Return *text* sanitized, as one line with single blanks."""
    return " ".join(sanitize(text).split())

def utf8_argument(text):
    """Return an argument, a variable or a file name as UTF-8 text, whatever the locale is."""
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # PyPy reads UTF-8 in the C locale, and does not write it
        return text

def decode_prompt(data, name):
    """Return the text of the prompt *data*, read from *name*, without line ends at its end.

    It is UTF-8; a byte-order mark and CRLF are accepted.  Raise UnusableInputError otherwise.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableInputError(f"{name} is not UTF-8 text (at byte {error.start})") from error
    return text.replace("\r\n", "\n").rstrip("\n")

def decode_text(data):
    """Return the text of *data*, and how many odd bytes of it were replaced.

    It is UTF-8, or UTF-16 with its byte-order mark.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = data.decode("utf-16", "replace")
        return text, text.count("\ufffd")
    text = data.decode("utf-8-sig", "replace")
    return text, text.count("\ufffd") - data.count(b"\xef\xbf\xbd")

def os_reason(error):
    """Return why the OSError *error* happened, without its number and its file."""
    return (error.strerror or str(error) or type(error).__name__).rstrip(".")

def utc_stamp(seconds):
    """Return a time in *seconds* since 1970 as ISO 8601 in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

def format_seconds(seconds):
    """Return a time in *seconds* as text, such as 0.58 s."""
    return f"{seconds:.2f} s"

def plural(count, noun):
    """Return *count* and its *noun*, such as 1 token or 2 tokens."""
    if count in (1, "1"):
        return f"{count} {noun}"
    return f"{count} {noun}s"

def is_ascii(text):
    """Tell whether *text* is all ASCII (str.isascii is younger than Python 3.6)."""
    return len(text) == len(text.encode("utf-8", "surrogatepass"))

@functools.lru_cache(maxsize=4096)
def _character_width(character):
    from unicodedata import category, east_asian_width

    if category(character) in ("Mn", "Me", "Cf") and character != "\u00ad":
        return 0
    if east_asian_width(character) in ("W", "F"):
        return 2
    return 1

def display_width(text):
    """Return how many columns of a terminal the line *text* takes."""
    if is_ascii(text):
        return len(text)
    return sum(map(_character_width, text))

def truncate(text, columns):
    """Return as much of *text* as fits into *columns* of a terminal."""
    for position, character in enumerate(text):
        columns -= _character_width(character)
        if columns < 0:
            return text[:position]
    return text

def truncate_middle(text, columns):
    """Return *text*, or its ends around three dots, in at most *columns* of a terminal."""
    if display_width(text) <= columns:
        return text
    kept = columns - 3
    if kept < 2:
        return truncate(text, columns)
    end = truncate(text[::-1], kept // 2)[::-1]
    return truncate(text, kept - display_width(end)) + "..." + end

def table_lines(names, rows, columns):
    """Return the lines of a table of *rows* under *names*, each at most *columns* wide.

    A line that is cut ends in >.
    """
    table = [[name.upper() for name in names]]
    for row in rows:
        table.append([one_line(cell) for cell in row])
    widths = [max(map(display_width, column)) for column in zip(*table)]
    lines = []
    for row in table:
        line = ""
        for cell, width in zip(row, widths):
            blanks = width - display_width(cell)
            line += cell + " " * (blanks + 2)
        line = line.rstrip()
        if display_width(line) > columns:
            line = truncate(line, columns - 1) + ">"
        lines.append(line)
    return lines

def footer_line(reply, seconds):
    """Return the throughput line of a streamed *reply* that took *seconds* in all.

    A count of chunks is marked ~.
    """
    mark = ""
    tokens = reply.usage.completion
    if tokens is None:
        mark = "~"
        tokens = reply.deltas
    rate = tokens / max(seconds, 1e-9)
    count = plural(tokens, "token")
    return f"-- {mark}{count} in {seconds:.1f}s ({mark}{rate:.1f} tok/s)"

def tokens_per_second(reply):
    """Return the rate of *reply* after its first token, or None where it cannot be told."""
    tokens = reply.usage.completion or 0
    if tokens < 2 or reply.first_at is None:
        return None
    seconds = reply.last_at - reply.first_at
    if seconds <= 0:
        return None
    return (tokens - 1) / seconds

def usage_fields(reply, seconds, streamed):
    """Return the (name, value) pairs of what is known about *reply*, which took *seconds*."""
    pairs = []
    for name, count in zip(Usage._fields, reply.usage):
        pairs.append((name + "_tokens", count))
    pairs.append(("seconds", seconds))
    if streamed:
        pairs.append(("first_token_seconds", reply.first_seconds))
        pairs.append(("tokens_per_second", tokens_per_second(reply)))
        pairs.append(("finish_reason", reply.finish_reason))
    pairs.append(("id", reply.id))
    known = []
    for name, value in pairs:
        if isinstance(value, float):
            value = round(value, 3)
        if value is not None:
            known.append((name, value))
    return known

def status_bar(endpoint, model, totals, messages, columns):
    """Return the line above the prompt of a chat, at most *columns* wide.

    Where that is narrow, the endpoint's part is left out first, then the model's.
    """
    mark = "~"
    if totals.exact:
        mark = ""
    parts = [f"endpoint: {endpoint}"]
    if model:
        parts.append(f"model: {model}")
    parts.append(f"tokens: {mark}{totals.prompt}/{mark}{totals.completion}")
    parts.append(f"msgs: {messages}")
    line = one_line(" | ".join(parts))
    while display_width(line) > columns and len(parts) > 1:
        del parts[0]
        line = one_line(" | ".join(parts))
    return truncate(line, columns)

def percentile(sorted_values, percent):
    """Return the value below which *percent* of *sorted_values* lie, linear between ranks."""
    last = len(sorted_values) - 1
    rank = last * percent / 100
    position = int(rank)
    below = sorted_values[position]
    above = sorted_values[min(position + 1, last)]
    return below + (above - below) * (rank - position)

def summary(values):
    """Return number, mean, percentiles and extremes of *values*; None for those of no values."""
    ordered = sorted(values)
    count = len(ordered)
    if not ordered:
        ordered = [None]
    figures = {"n": count, "mean": None}
    if count:
        figures["mean"] = sum(ordered) / count
    for percent in (50, 90, 95, 99):
        figures[f"p{percent}"] = None
        if count:
            figures[f"p{percent}"] = percentile(ordered, percent)
    figures["max"] = ordered[-1]
    figures["min"] = ordered[0]
    return figures

class _WordWrapper:
    """Lay out styled text on the lines of a terminal; prose is wrapped at words.

    The last word can still grow: it is shown all the same, and moved when it no longer fits.  The
    last column stays free, so that the cursor never waits there for its wrap.
    """

    def __init__(self, columns, styled):
        self._styled = styled
        self._output = []
        self._style = ""  # that is in force on the terminal
        self._column = 0  # of the cursor, or beyond the limit where blanks did not fit
        self._hang = 0  # columns before the text after a wrap
        self._word = []  # (text, style) of its pieces
        self._width = 0  # of the word
        self._start = 0  # column of the word, once some of it is shown
        self._shown = 0  # number of its pieces that are shown
        self.resize(columns)

    def resize(self, columns):
        self.end_word()
        self._limit = columns - 1
        if columns < 10:  # too narrow to wrap
            self._limit = sys.maxsize

    def take(self):
        """Return what to write now; it ends without a style."""
        self._show_word()
        self._write("", "")
        output = "".join(self._output)
        self._output = []
        return output

    def add_fixed(self, text, style):
        """Add a piece that is not wrapped; prose after it is wrapped under its end."""
        # At its right edge a terminal writes over the character before a tab.
        text = self._expand_tabs(text)
        if text:
            self._write(text, style)
        self._column += display_width(text)
        self._hang = min(self._column, self._limit // 2)

    def add_blanks(self, text, style):
        self.end_word()
        end = self._column + len(self._expand_tabs(text))
        if end <= self._limit:
            self._write(text, style)
        self._column = end

    def add_piece(self, text, style):
        self._word.append((text, style))
        self._width += display_width(text)

    def end_word(self):
        self._show_word()
        self._word = []
        self._width = 0
        self._shown = 0

    def end_line(self):
        self.end_word()
        self._write("\n", "")
        self._column = 0
        self._hang = 0

    def _expand_tabs(self, text):
        if "\t" not in text:
            return text
        before = " " * self._column
        return (before + text).expandtabs(8)[self._column:]

    def _show_word(self):
        if self._shown == len(self._word):
            return
        if not self._shown:
            self._start = self._column
        end = self._start + self._width
        if end > self._limit and self._start > self._hang:
            self._move_word()
            end = self._start + self._width
        for text, style in self._word[self._shown:]:
            self._write(text, style)
        self._shown = len(self._word)
        self._column = min(end, self._limit + 1)  # the terminal wraps what is wider than a line

    def _move_word(self):
        shown = self._column - self._start
        self._output.append("\b" * shown + " " * shown)
        self._output.append("\n" + " " * self._hang)
        self._start = self._hang
        self._shown = 0

    def _write(self, text, style):
        if self._styled and style != self._style:
            if self._style:
                self._output.append("\x1b[0m")
            if style:
                self._output.append(f"\x1b[{style}m")
            self._style = style
        self._output.append(text)

# Codes of styles, as a terminal knows them.
_BOLD = "1"
_DIM = "2"
_ITALIC = "3"
_CYAN = "36"

# Patterns are compiled by re at their first use: most runs of the command have none.
_LINE_MARKS = r"(?:[ \t]*(?:>|(?:[-*+]|\d{1,9}[.)])(?=[ \t])))*[ \t]*"  # of quotes and list items
_ENOUGH = 200  # characters of a line to tell what it is
_UNDECIDED = r"(?:[-*+]|\d{1,9}[.)]?|#{1,6}|`+|~+)?\Z"
_FENCE = "`{3,}|~{3,}"
_HEADING = r"#{1,6}(?:[ \t]|\Z)"
_INLINE_MARKS = "\\`*_"
# A mark, blanks, a run of other text, or one character from where the wide ones begin.
_TOKEN = r"\\[^\w\s]?|`+|\*+|_+|[ \t]+|[\x00-\x08\x0a-\x1f!-)+-\[\]^a-\u10ff]+|[^\x00-\u10ff]"
_NO_BREAK_BEFORE = "、。，．：；？！）」』】〉》ー…\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_NO_BREAK_AFTER = "（「『【〈《\u200d([{\"'" + _INLINE_MARKS

def _may_break(before, after):
    """Tell whether a line may end between two characters that no blank parts."""
    if before in _NO_BREAK_AFTER or after in _NO_BREAK_BEFORE:
        return False
    if _character_width(after) == 2:
        return True
    return _character_width(before) == 2 and after.isalnum()

class MarkdownStyler:
    """Style Markdown as it streams in: the marks stay, styles are added, prose is wrapped.

    feed() and finish() take sanitized text and return what to write now.  A mark at the end of
    what came is held until its meaning is clear.  With *styled* false, words are only wrapped.
    The rules are CommonMark's, where they do not need the text that is still to come.
    """

    def __init__(self, columns, styled=True):
        self.dim = False  # show what comes dim
        self._wrapper = _WordWrapper(columns, styled)
        self._held = ""  # the beginning of a line, or the mark at the end of what came
        self._fence = ""  # the mark of the fence that we are in
        self._quoted = False
        self._new_block = True  # the next line does not continue a paragraph
        self._content = 0  # column at which the text of the list item begins
        self._end_block()
        self._begin_line()

    def feed(self, text):
        """Return what of *text*, and of what was held, is to be written."""
        lines = (self._held + text).split("\n")
        self._held = ""
        for line in lines[:-1]:
            self._add(line, True)
            self._end_line()
        self._add(lines[-1], False)
        return self._wrapper.take()

    def finish(self):
        """Return what is still to be written."""
        held = self._held
        self._held = ""
        self._add(held, True)
        return self._wrapper.take()

    def resize(self, columns):
        """Wrap at *columns* from here on."""
        self._wrapper.resize(columns)

    def _begin_line(self):
        self._kind = ""  # "fence", "code", "table", "heading" or "prose"
        self._beginning = ""  # enough of the line to tell what it was
        self._base = []  # styles of the whole line
        self._before = " "  # the character before the next one

    def _end_block(self):
        self._open_marks = []  # "*", "**", "_" or "__" of emphasis that is open
        self._code_mark = ""  # the backticks of code that is open

    def _add(self, text, complete):
        """Add a piece of a line; after a *complete* one the line ends."""
        if not self._kind:
            marks = self._open_line(text, complete)
            if not self._kind:
                self._held = text
                return
            self._beginning = marks
            text = text[len(marks):]
        if len(self._beginning) < _ENOUGH:
            self._beginning += text[:_ENOUGH]
        if self._kind in ("fence", "code"):
            self._wrapper.add_fixed(text, self._style())
        else:
            self._add_inline(text, complete)

    def _open_line(self, line, complete):
        """Find the kind of *line*, write the marks before its text and return them.

        The kind stays empty where *line* must grow first.
        """
        if self._fence:
            self._set_kind("code", _CYAN)
            return ""
        marks = re.match(_LINE_MARKS, line).group()
        text = line[len(marks):]
        if not complete and len(line) < _ENOUGH and re.match(_UNDECIDED, text):
            return ""
        indent = len(marks.expandtabs(4))
        fence = re.match(_FENCE, text)
        is_bare = marks.isspace() and text and not fence
        if is_bare and self._new_block and indent >= self._content + 4:
            self._set_kind("code", _CYAN)
            return ""
        is_item = bool(marks.strip(" \t>"))
        if is_item or self._new_block or self._quoted != (">" in marks):
            self._end_block()
        if is_item:
            self._content = indent
        elif self._new_block:
            self._content = min(self._content, indent)
        self._quoted = ">" in marks
        if self._quoted:
            self._base.append(_DIM)
        self._wrapper.add_fixed(marks, self._style())
        if fence:
            self._fence = fence.group()
            self._set_kind("fence", _CYAN)
        elif text.startswith("|"):
            self._set_kind("table")
        elif re.match(_HEADING, text):
            self._set_kind("heading", _BOLD)
        else:
            self._kind = "prose"
        return marks

    def _set_kind(self, kind, *styles):
        self._kind = kind
        self._base += styles
        self._end_block()

    def _end_line(self):
        line = self._beginning.strip(" \t>")
        if self._kind == "fence":
            info = line.partition(self._fence)[2]
            if self._fence[0] in info and self._fence[0] == "`":  # code in a line
                self._fence = ""
        elif self._fence and line.startswith(self._fence):
            info = line.strip(self._fence[0])
            if not info:
                self._fence = ""
        self._new_block = not line or self._kind != "prose"
        self._wrapper.end_line()
        self._begin_line()

    def _style(self):
        styles = list(self._base)
        if self.dim:
            styles.append(_DIM)
        for mark in self._open_marks:
            styles.append(_BOLD if len(mark) == 2 else _ITALIC)
        if self._code_mark:
            styles.append(_CYAN)
        return ";".join(sorted(set(styles)))

    def _add_inline(self, text, complete):
        """Add a piece of a line in which marks have a meaning."""
        for match in re.finditer(_TOKEN, text):
            token = match.group()
            end = match.end()
            after = text[end:end + 1]
            is_mark = token[0] in _INLINE_MARKS
            if is_mark and not after and not complete and len(token) < _ENOUGH:
                self._held = token
                return
            self._add_token(token, after or " ")
            self._before = token[-1]

    def _add_token(self, token, after):
        style = self._style()
        if token[0] in _INLINE_MARKS:
            self._read_mark(token, after)
            style = max(style, self._style(), key=len)  # a mark is styled like what it encloses
        if self._kind == "table":
            self._wrapper.add_fixed(token, style)
        elif token[0] in " \t":
            self._wrapper.add_blanks(token, style)
        else:
            if _may_break(self._before, token[0]):
                self._wrapper.end_word()
            self._wrapper.add_piece(token, style)

    def _read_mark(self, mark, after):
        """Open or close what *mark* stands for, between the characters before and *after* it."""
        before = self._before
        if self._code_mark:
            if mark == self._code_mark:
                self._code_mark = ""
            return
        if mark[0] == "`":
            self._code_mark = mark
        if mark[0] not in "*_":
            return
        in_word = before.isalnum() and after.isalnum()
        if in_word and mark[0] == "_":
            return
        if not before.isspace() and self._close_emphasis(mark):
            return
        # 2*3 is more frequent than emphasis that begins in the middle of a word.
        if after.isspace() or before.isalnum() and is_ascii(before):
            return
        self._open_marks += re.findall(r"\*\*?|__?", mark[:3])

    def _close_emphasis(self, run):
        length = len(run)
        for size in (2, 1):
            mark = run[0] * size
            if length >= size and mark in self._open_marks:
                del self._open_marks[self._open_marks.index(mark):]
                length -= size
        return length < len(run)
# -- Waiting ----------------------------------------------------------------------------------

ENDING_SIGNALS = [int(getattr(signal, name)) for name in ("SIGTERM", "SIGHUP")
                  if hasattr(signal, name)]
SUSPEND_SIGNAL = getattr(signal, "SIGTSTP", None)  # Ctrl+Z, on POSIX alone
INTERRUPTS_TO_DIE = 3  # Ctrl+C's within a second, without a prompt in between
INTERRUPT_GAP_SECONDS = 0.1  # a held key or a burst counts once in this time
RESEND_SECONDS = 0.05

class Suspended(Exception):
    """Ctrl+Z came while a line was typed."""

def poll_once(reads, writes, seconds):
    """Return the ([readable], [writable]) file descriptors, both empty after *seconds*."""
    import select

    if not hasattr(select, "poll"):
        readable, writable, _ = select.select(reads, writes, [], seconds)
        return readable, writable
    masks = {}
    for descriptor in reads:
        masks[descriptor] = select.POLLIN
    for descriptor in writes:
        masks[descriptor] = masks.get(descriptor, 0) | select.POLLOUT
    poll = select.poll()
    for descriptor, mask in masks.items():
        poll.register(descriptor, mask)
    milliseconds = None if seconds is None else int(seconds * 1000) + 1
    ready = {descriptor: events for descriptor, events in poll.poll(milliseconds)}
    # An error or a hang-up ends both waits: the call that follows reports it.
    readable = [one for one in reads if ready.get(one, 0) & ~select.POLLOUT]
    writable = [one for one in writes if ready.get(one, 0) & ~select.POLLIN]
    return readable, writable

class Waiter:
    """Waits for file descriptors, for a time or for a helper thread, and for signals meanwhile.

    Python raises an exception from a signal handler between any two bytecodes: in a lock, in a
    thread's start.  So inside watch_signals() the handlers only note a signal.  A wait, or check(),
    raises KeyboardInterrupt for SIGINT and Terminated for SIGTERM and SIGHUP.  A worker thread has
    a Waiter of its own that watches no signals.

    *before_stop* and *after_stop* are called around a stop by Ctrl+Z, the first one also before a
    third Ctrl+C ends the process.
    """

    def __init__(self):
        self.before_stop = None
        self.after_stop = None
        self._noted = []  # numbers of signals that nothing has been raised for
        self._presses = []  # monotonic times of Ctrl+C's since the last prompt
        self._prompting = False  # a line is typed: a signal raises one of _exceptions
        self._exceptions = {}
        self._raised = None  # the exception that ended the prompt
        self._missed = None  # number of a signal that came after it
        self._watcher = None  # (thread, event that is set while a line is typed)
        self._wakeup = None  # (reader, writer) of a pipe that a signal makes readable

    @contextlib.contextmanager
    def watch_signals(self):
        """Note signals instead of raising at them, inside the with block (main thread, POSIX)."""
        if os.name != "posix":
            yield
            return
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)
        defaults = {int(signal.SIGINT): signal.default_int_handler}
        for number in ENDING_SIGNALS + [int(SUSPEND_SIGNAL)]:
            defaults[number] = signal.SIG_DFL  # nohup, for example, ignores SIGHUP
        replaced = [number for number, default in defaults.items()
                    if signal.getsignal(number) == default]
        previous = signal.set_wakeup_fd(self._wakeup[1])
        try:
            for number in replaced:
                signal.signal(number, self._note)
            yield
        finally:
            for number in replaced:
                signal.signal(number, defaults[number])
            signal.set_wakeup_fd(previous)
            (reader, writer), self._wakeup = self._wakeup, None
            self._stop_watcher(writer)
            os.close(reader)
            os.close(writer)

    @property
    def wakeup_fileno(self):
        """The descriptor that a signal makes readable, or None: then call check()."""
        return self._wakeup and self._wakeup[0]

    def check(self):
        """Raise KeyboardInterrupt or Terminated if a signal was noted; stop after Ctrl+Z."""
        self._prompting = False
        if not self._noted:
            return
        noted, self._noted = self._noted, []
        self._drain()
        for number in noted:
            if number in ENDING_SIGNALS:
                raise Terminated(number)
        if signal.SIGINT in noted:
            raise KeyboardInterrupt
        self.suspend()

    def wait(self, reads=(), writes=(), seconds=None):
        """Return the ([readable], [writable]) descriptors, both empty after *seconds*.

        Raise as check() does.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            self.check()
            left = None if deadline is None else max(0, deadline - time.monotonic())
            watched = list(reads)
            if self._wakeup:
                watched.append(self._wakeup[0])
            readable, writable = poll_once(watched, list(writes), left)
            if self._wakeup and self._wakeup[0] in readable:
                readable.remove(self._wakeup[0])
                self._drain()
                self.check()
            if readable or writable:
                return readable, writable
            if deadline is not None and time.monotonic() >= deadline:
                return [], []

    def pause(self, seconds):
        """Wait for *seconds*; raise as check() does."""
        if os.name == "posix":
            self.wait(seconds=seconds)
        else:  # select has nothing to wait for there
            import threading
            threading.Event().wait(seconds)

    def run_in_thread(self, function, seconds):
        """Return what *function* returns, called in a thread; raise socket.timeout after *seconds*.

        An OSError, ValueError or XeroctlError of it is raised here.  Without a thread to be had
        it is called right away, and can take longer.
        """
        import socket
        import threading

        outcome = []
        ours, theirs = socket.socketpair()

        def call():
            with theirs:  # the close wakes us
                try:
                    outcome.append((function(), None))
                except (OSError, ValueError, XeroctlError) as error:
                    outcome.append((None, error))

        with ours:
            try:
                threading.Thread(target=call, daemon=True).start()
            except RuntimeError:  # can't start new thread
                theirs.close()
                return function()
            readable, _ = self.wait([ours.fileno()], seconds=seconds)
        if not readable:
            raise socket.timeout("timed out")
        result, error = outcome[0]
        if error:
            raise error
        return result

    def prompt(self, read, text):
        """Return read(text), such as input("> "), in which alone a signal raises at once.

        Readline knows no other way out.  The exceptions are KeyboardInterrupt, Terminated, and
        Suspended for Ctrl+Z.  An earlier Ctrl+C that nothing has noticed is forgotten.
        """
        self._presses = []
        self._exceptions = {number: Terminated(number) for number in ENDING_SIGNALS}
        self._exceptions[int(signal.SIGINT)] = KeyboardInterrupt()
        if SUSPEND_SIGNAL:
            self._exceptions[int(SUSPEND_SIGNAL)] = Suspended()
        self._start_watcher()
        self._prompting = True
        try:
            self._noted = [number for number in self._noted if number != signal.SIGINT]
            if self._noted:
                self.check()
                self._prompting = True
            return read(text)
        except SystemError:  # a second signal came while input() passed the first one on
            if self._raised is None:
                raise
            raise self._raised from None
        finally:
            self._prompting = False
            self._raised = None
            if self._watcher:
                self._watcher[1].clear()
            missed, self._missed = self._missed, None
            if missed in ENDING_SIGNALS:
                self._noted.append(missed)

    def _start_watcher(self):
        """Have a thread send a signal again that does not end the prompt.

        Python looks for signals before readline waits for a key: one that comes in between would
        be seen with the next key.  And input() drops what is raised while it flushes stderr.
        """
        import threading

        if self._wakeup is None:
            return
        if self._watcher is None:
            is_typing = threading.Event()
            thread = threading.Thread(
                target=self._watch, args=(self._wakeup[0], is_typing), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # can't start new thread
                return
            self._watcher = thread, is_typing
        self._watcher[1].set()

    def _watch(self, reader, is_typing):
        import threading

        clock = threading.Event()  # nothing sets it
        while True:
            is_typing.wait()
            poll_once([reader], [], None)
            if self._wakeup is None:
                return
            clock.wait(RESEND_SECONDS)  # the prompt has ended by then, as a rule
            if self._prompting:
                self._raised = None
                with contextlib.suppress(BlockingIOError):
                    number = os.read(reader, 1)[0]
                    signal.pthread_kill(threading.main_thread().ident, number)

    def _stop_watcher(self, writer):
        if self._watcher:
            thread, is_typing = self._watcher
            self._watcher = None
            with contextlib.suppress(BlockingIOError):
                os.write(writer, b"\0")
            is_typing.set()
            thread.join(1)

    @contextlib.contextmanager
    def without_raising(self):
        """Note signals in the with block although a line is typed: readline calls a completer.

        It swallows whatever a completer raises.  A signal that came is sent once more, for
        readline to meet when it waits for keys again.
        """
        was_prompting = self._prompting
        self._prompting = False
        before = list(self._noted)
        try:
            yield
        finally:
            came = self._noted[len(before):]
            self._noted = before
            self._prompting = was_prompting
            if came:
                self._send_again(came[-1])

    def _send_again(self, number):
        import threading

        thread = threading.main_thread().ident
        timer = threading.Timer(0.05, signal.pthread_kill, [thread, number])
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # can't start new thread
            timer.start()

    def suspend(self):
        """Stop until the shell continues us, as Ctrl+Z asks."""
        if self.before_stop:
            self.before_stop()
        ours = signal.signal(SUSPEND_SIGNAL, signal.SIG_DFL)
        os.kill(os.getpid(), SUSPEND_SIGNAL)
        signal.signal(SUSPEND_SIGNAL, ours)
        if self.after_stop:
            self.after_stop()

    def _note(self, number, frame):
        # Readline and input() can call this with an exception set.  Then any call in here, even
        # one that makes an exception, is a SystemError: so raise a ready one, and only once.
        if self._raised is not None:
            self._missed = number
            return
        if self._prompting:
            self._raised = self._exceptions[number]
            raise self._raised
        self._noted.append(number)
        if number == signal.SIGINT:
            self._count_press(time.monotonic())

    def _count_press(self, now):
        if self._presses and now - self._presses[-1] < INTERRUPT_GAP_SECONDS:
            return
        self._presses = [press for press in self._presses if now - press < 1] + [now]
        if len(self._presses) < INTERRUPTS_TO_DIE:
            return
        if self.before_stop:
            self.before_stop()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def _drain(self):
        with contextlib.suppress(BlockingIOError):
            while self._wakeup and os.read(self._wakeup[0], 4096):
                pass

# -- Files ------------------------------------------------------------------------------------

LOCK_SECONDS = 0.5
LOCK_POLL_SECONDS = 0.02
MAX_HISTORY_ENTRIES = 1000
MAX_HISTORY_BYTES = 4 * 1024 * 1024
MAX_KEPT_CONVERSATIONS = 50

def environment():
    """Return our environment variables that are settings, as UTF-8 text; empty where unset."""
    names = (ENV_BASE_URL, ENV_API_KEY, ENV_CONTEXT, ENV_ENDPOINT,
             ENV_OPENAI_BASE_URL, ENV_OPENAI_API_KEY)
    return {name: utf8_argument(os.environ.get(name, "")) for name in names}

def _xdg_path(variable, default, name):
    """Return the path of xeroctl's file *name* (XDG Base Directory Specification)."""
    folder = os.environ.get(variable) or ""
    if not os.path.isabs(folder):
        home = os.path.expanduser("~")  # stays "~" for a user without a home
        if not os.path.isabs(home):
            home = "/nonexistent"
        folder = os.path.join(home, default)
    return os.path.join(folder, "xeroctl", name)

def config_path():
    """Return the path of the config file, whether or not it exists."""
    return _xdg_path("XDG_CONFIG_HOME", ".config", "config.toml")

def state_path(name):
    """Return the path of the file *name* in our state folder, whether or not it exists."""
    return _xdg_path("XDG_STATE_HOME", os.path.join(".local", "state"), name)

def native_path(text):
    """Return the file name *text* as Python's file functions want it in this locale."""
    if not text or "\0" in text:
        raise UsageError("a file name is needed")
    return os.path.expanduser(os.fsdecode(text.encode("utf-8", "surrogateescape")))

def shown_path(path):
    """Return *path* as UTF-8 text for a reader, the home folder as ~."""
    home = os.path.expanduser("~")
    if home != "/" and path.startswith(home + os.sep):
        path = "~" + path[len(home):]
    return utf8_argument(path)

def read_file(path, limit=None):
    """Return the bytes of the file *path*.

    Raise UsageError where it cannot be read or is larger than *limit* bytes.
    """
    try:
        with open(path, "rb") as file:
            if limit is None:
                return file.read()
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {utf8_argument(path)}: {os_reason(error)}") from error
    if len(data) > limit:
        raise UsageError(f"{utf8_argument(path)} is larger than {limit >> 20} MiB")
    return data

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
        raise UsageError(f"cannot write {utf8_argument(path)}: {os_reason(error)}") from error

def _make_folders(path):
    if not os.path.isdir(path):
        _make_folders(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)

def make_private_folder(path):
    """Make the folder *path* and missing folders above it, each for its owner alone (mode 0700).

    os.makedirs gives that mode to the last one only.  Raise UsageError where it cannot be made.
    """
    try:
        _make_folders(path)
    except OSError as error:
        raise UsageError(f"cannot make {utf8_argument(path)}: {os_reason(error)}") from error

def _try_lock(fcntl, descriptor, seconds):
    clock = Waiter()  # watches no signals: nothing can interrupt a write half done
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        except OSError:
            return True
        clock.pause(LOCK_POLL_SECONDS)

@contextlib.contextmanager
def locked(path, seconds=LOCK_SECONDS):
    """Hold the lock of the file or folder *path*, which other processes of ours ask for too.

    Yield False where another process still holds it after *seconds*: go on without it then.
    Without locks to be had (not POSIX, some network file systems) nobody holds one: yield True.
    """
    descriptor = None
    try:
        import fcntl
        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        yield True
        return
    try:
        yield _try_lock(fcntl, descriptor, seconds)
    finally:
        os.close(descriptor)

# An entry of the history is one line, a JSON string, since it may hold line ends.

def _history_lines(path):
    """Return the lines in the newest MAX_HISTORY_BYTES of the history file *path*."""
    if not os.path.exists(path):
        return []
    if not os.path.isfile(path):
        raise UsageError(f"{utf8_argument(path)} is no regular file")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_HISTORY_BYTES))
        lines = re.findall(b"[^\n]*\n|[^\n]+\\Z", file.read())
    if size > MAX_HISTORY_BYTES:
        del lines[0]  # the rest of it
    return lines

def read_history(path):
    """Return the newest entries of the history file *path*, oldest first."""
    entries = []
    with contextlib.suppress(OSError, UsageError):
        for line in _history_lines(path)[-MAX_HISTORY_ENTRIES:]:
            with contextlib.suppress(ValueError):
                entries.append(str(parse_json(line.decode("utf-8", "replace"))))
    return entries

def append_history(path, entry):
    """Add *entry* to the history file *path* and drop the oldest entries over its limits.

    Return False where another process kept the lock and it was done without.  Raise UsageError
    where it cannot be written.
    """
    folder = os.path.dirname(path)
    line = json.dumps(entry).encode("ascii") + b"\n"
    try:
        _make_folders(folder)
        with locked(folder) as is_locked:
            lines = _history_lines(path)
            if lines[-1:] != [line] and len(line) <= MAX_HISTORY_BYTES:
                _append_line(path, lines, line)
    except OSError as error:
        raise UsageError(f"cannot write {utf8_argument(path)}: {os_reason(error)}") from error
    return is_locked

def _append_line(path, lines, line):
    if lines and not lines[-1].endswith(b"\n"):  # a write that was cut off
        line = b"\n" + line
    size = sum(map(len, lines)) + len(line)
    if size <= MAX_HISTORY_BYTES and len(lines) < MAX_HISTORY_ENTRIES:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line)
        return
    lines = (lines + [line])[-MAX_HISTORY_ENTRIES:]
    while size > MAX_HISTORY_BYTES:
        size -= len(lines.pop(0))
    write_private(path, b"".join(lines).decode("utf-8", "replace"))

# Conversations

# Start in UTC, process, and a number where one process starts several within a second.
_CONVERSATION_NAME = re.compile(r"(\d{8}T\d{6}Z)-(\d+)(-\d+)?\.json\Z")

def read_conversation(path):
    """Return ((conversation, endpoint, model, notes), text) of the regular file *path*.

    Raise UsageError where it is no conversation.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"cannot read {utf8_argument(path)}: it is no regular file")
    data = read_file(path, MAX_CONVERSATION_BYTES)
    try:
        text = decode_prompt(data, "it")
        return parse_conversation(text), data.decode("utf-8")
    except (UnusableInputError, UsageError) as error:
        raise UsageError(f"{utf8_argument(path)}: {error}") from error

# Start in UTC, process, and a number where one process starts several within a second.
_CONVERSATION_NAME = re.compile(r"(\d{8}T\d{6}Z)-(\d+)(-\d+)?\.json\Z")

def _written_at(path):
    with contextlib.suppress(OSError):  # another process removed it
        return os.stat(path).st_mtime, path
    return 0, path

def list_conversations():
    """Return the paths of the conversations in the state folder, the last written first."""
    folder = state_path("conversations")
    names = []
    with contextlib.suppress(OSError):
        names = filter(_CONVERSATION_NAME.match, os.listdir(folder))
    paths = [os.path.join(folder, name) for name in names]
    return sorted(paths, key=_written_at, reverse=True)

def new_conversation_path(started=None):
    """Return a free path in the state folder for a conversation *started* at that stamp, or now."""
    started = started or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{started}-{os.getpid()}"
    for number in itertools.count(2):
        path = state_path(os.path.join("conversations", name + ".json"))
        if not os.path.lexists(path):
            return path
        name = f"{started}-{os.getpid()}-{number}"

def claim_conversation(path):
    """Return the new path of the conversation *path* with our process in its name.

    Return None where its process may still run, and it is to be copied.
    """
    started, process = _CONVERSATION_NAME.match(os.path.basename(path)).groups()[:2]
    if os.name != "posix":  # os.kill ends processes there
        return None
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        ours = new_conversation_path(started)
        os.rename(path, ours)
        return ours
    except PermissionError:  # another user's
        return None
    return None

class ConversationStore:
    """Keeps a conversation on disk: in the file that the user named, else in the state folder.

    A file that another process changed since we read it is left alone.  A failure is said, and
    never raised: the chat goes on.
    """

    def __init__(self, console, path=None, text=None, uses_state=True):
        self.path = path  # of the conversation; None: choose one in the state folder
        self.named = path is not None and os.path.dirname(path) != state_path("conversations")
        self.uses_state = uses_state
        self.saved = False  # something of this chat was written
        self._text = text  # that the file held when we last read or wrote it; None: it is missing
        self._console = console

    def save(self, conversation, endpoint, model):
        """Write *conversation*, once it has an answer or was written before."""
        is_begun = self._text or len(conversation.turns()) > bool(conversation.unanswered)
        if not is_begun or not (self.path or self.uses_state):
            return
        text = build_document(conversation, endpoint, model, utc_stamp(time.time()))
        is_first = not os.path.isdir(state_path("conversations"))
        try:
            if self.path is None:
                self._start_file()
            self._write(text)
        except UsageError as error:
            self._leave_file(str(error))
            self.save(conversation, endpoint, model)
            return
        if is_first and not self.named:
            folder = shown_path(os.path.dirname(state_path("history")))
            self._console.note(f"chats are kept in {folder}: --no-history keeps none")

    def begin_new(self, conversation, endpoint, model):
        """End this conversation: the next save begins a new file, or replaces the named one.

        Before that, what the named one holds is copied to the state folder.
        """
        if not self.named:
            self.path = self._text = None
        elif self.uses_state:
            ConversationStore(self._console).save(conversation, endpoint, model)

    def _start_file(self):
        make_private_folder(state_path("conversations"))
        self.path = new_conversation_path()
        for old in list_conversations()[MAX_KEPT_CONVERSATIONS - 1:]:
            with contextlib.suppress(OSError):
                os.unlink(old)

    def _write(self, text):
        with locked(os.path.dirname(os.path.realpath(self.path))):
            if os.path.lexists(self.path) and (
                    self._text is None or read_file(self.path) != self._text.encode("utf-8")):
                raise UsageError(f"another process changed {utf8_argument(self.path)}")
            write_private(self.path, text)
        self._text = text
        self.saved = True

    def _leave_file(self, reason):
        """Go on in the state folder after the named file; after that, keep nothing."""
        outcome = "the conversation is not kept, and lost at the end"
        if self.named and self.uses_state:
            outcome = "the conversation is kept in the state folder from here on"
        else:
            self.uses_state = False
        self.path = self._text = None
        self.named = False
        self._console.warn(f"{reason}: {outcome}")

CONFIG_LOCK_SECONDS = 10

def read_config_text(path):
    """Return the byte-order mark, if any, and the text after it of the config file *path*."""
    data = b""
    if os.path.lexists(path):
        data = read_file(path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{utf8_argument(path)}: not UTF-8 (at line {line})") from error
    if text.startswith("\ufeff"):
        return text[:1], text[1:]
    return "", text

def read_config():
    """Return the Config in the config file, an empty one where there is none."""
    path = config_path()
    name = utf8_argument(path)
    if not os.path.lexists(path):
        return Config(name, None, {}, [])
    config = parse_config(read_config_text(path)[1], name)
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        config.warnings.append(f"others can read {name}: chmod 600 it")
    return config

def change_config(change):
    """Change the config file, and return its new Config.

    *change* takes the old Config, and returns the name of the current deployment, or None, and
    the deployments.  Raise UsageError where the file cannot be read or written.
    """
    path = config_path()
    name = utf8_argument(path)
    folder = os.path.dirname(path)
    make_private_folder(folder)
    with locked(folder, CONFIG_LOCK_SECONDS):  # not the file, which is replaced
        mark, text = read_config_text(path)
        current, deployments = change(parse_config(text, name))
        edited = edit_config(text, name, current, deployments)
        write_private(path, mark + edited)
    return parse_config(edited, name)

def keychain_command(service):
    """Return the words of the command that prints the key of *service* in a keychain."""
    from shutil import which

    commands = (["security", "find-generic-password", "-s", service, "-w"],  # macOS
                ["secret-tool", "lookup", "service", service])  # Linux
    for words in commands:
        if which(words[0]):
            return words
    raise UsageError(f"the API key is {service!r} in a keychain, and neither security nor "
                     f"secret-tool is here to read it: set {ENV_API_KEY}")

def fetch_key(deployment, waiter):
    """Return the API key that the keychain or the command of *deployment* prints.

    The program gets no standard input, since that may be the message.  A command may ask the
    user for something, so its stderr is ours.  Raise UsageError, or as waiter.check() does.
    """
    import subprocess
    from shlex import split

    service = deployment.get("api_key_keychain")
    command = deployment.get("api_key_command")
    try:
        if service:
            words = keychain_command(service)
            command = words[0]
            stderr = subprocess.PIPE
        else:
            words = split(command) or [command]
            stderr = None
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=stderr)
    except OSError as error:
        raise UsageError(f"cannot run {command} for the API key: {os_reason(error)}") from error
    except ValueError as error:
        raise UsageError(f"cannot run {command} for the API key: {error}") from error
    try:
        output, errors = waiter.run_in_thread(process.communicate, None)
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
    key = output.decode("utf-8", "replace").partition("\n")[0].strip()
    if process.returncode or not key:
        message = f"{command} gave no API key (status {process.returncode})"
        lines = (errors or b"").decode("utf-8", "replace").split("\n")
        reasons = [line.strip() for line in lines if line.strip()]
        raise UsageError(": ".join([message] + reasons[-1:]))
    return key

Attachment = namedtuple("Attachment", [
    "name",  # of the file without its folders, or None for standard input
    "size",  # bytes
    "text",  # of a text file, else None
    "part",  # content part with an image or audio, else None
    "note",  # sentence for the user, or None
])

# The first bytes of what servers take as parts, and its media type.
MEDIA_TYPES = (
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8[79]a", "image/gif"),
    (rb"(?s)RIFF....WEBP", "image/webp"),
    (rb"(?s)RIFF....WAVE", "audio/wav"),
    (rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", "audio/mp3"),  # a tag, or layer III
)
# Logs hold backspaces, form feeds and escapes. Text holds none of the other control characters.
NOT_TEXT = "[\x01-\x07\x0e-\x1a\x1c-\x1f\x7f]"

def _build_part(data, media_type):
    from base64 import b64encode

    encoded = b64encode(data).decode("ascii")
    kind, _, form = media_type.partition("/")
    if kind == "audio":
        audio = {"data": encoded, "format": form}
        return {"type": "input_audio", "input_audio": audio}
    image = {"url": f"data:{media_type};base64,{encoded}"}
    return {"type": "image_url", "image_url": image}

def read_attachment(path, data=None):
    """Return the Attachment that the file *path* is, or *data* from standard input.

    Raise UnusableInputError where it cannot be read, is empty, is larger than
    MAX_ATTACHMENT_BYTES, or is neither text nor an image or audio of a known kind.
    """
    if data is None:
        shown = utf8_argument(path)
        name = os.path.basename(shown)
        try:
            data = read_file(path, MAX_ATTACHMENT_BYTES)
        except UsageError as error:
            raise UnusableInputError(str(error)) from error
    else:
        name = None
        shown = "standard input"
    if not data.strip():
        raise UnusableInputError(f"cannot attach {shown}: it is empty")
    for first_bytes, media_type in MEDIA_TYPES:
        if re.match(first_bytes, data):
            return Attachment(name, len(data), None, _build_part(data, media_type), None)
    text, replaced = decode_text(data)
    odd_count = replaced + len(re.findall(NOT_TEXT, text))
    if "\0" in text or 10 * odd_count > len(text):
        raise UnusableInputError(f"cannot attach {shown}: it is neither text nor PNG, JPEG, GIF, "
                                 "WebP, WAV or MP3")
    note = None
    if replaced:
        note = f"{shown} is not UTF-8: {plural(replaced, 'byte')} replaced"
    return Attachment(name, len(data), text, None, note)

def _text_block(attachment):
    text = attachment.text
    if attachment.name is None:
        return text
    if not text.endswith("\n"):
        text += "\n"
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{attachment.name}:\n{fence}\n{text}{fence}"

def build_question(text, attachments=()):
    """Return the user's message of *text* and *attachments*: plain text where all of it is text.

    A text file is added under its name, in a fence longer than any inside it.  Raise
    UnusableInputError where all files together are larger than MAX_ATTACHMENT_BYTES.
    """
    if sum(attachment.size for attachment in attachments) > MAX_ATTACHMENT_BYTES:
        limit = MAX_ATTACHMENT_BYTES >> 20
        raise UnusableInputError(f"the attached files are larger than {limit} MiB together")
    blocks = [_text_block(attachment) for attachment in attachments if attachment.text]
    parts = [attachment.part for attachment in attachments if attachment.part]
    if text:
        blocks.insert(0, text)
    return build_message("\n\n".join(blocks), parts)

# -- Transport --------------------------------------------------------------------------------

# Codes of OpenSSL for a chain that ends in an authority we do not know, and the range of those
# for an authority that is known but breaks RFC 5280, which Python 3.13 and later reject.
UNTRUSTED_CODES = (2, 18, 19, 20, 21)
STRICT_CODES = range(79, 95)

Route = namedtuple("Route", [
    "url",
    "host",
    "port",
    "tls",      # True for https
    "proxy",    # the proxy's URL as urlsplit returns it, or None
    "speaker",  # who answers us, for messages: the server, or a proxy for http://
    "via",      # " through the proxy HOST:PORT", or ""
])

class ConnectLog:
    """What is done on the way to an answer: the steps of connecting, and lines for --verbose.

    *trace* is called with each line.
    """

    def __init__(self, trace=None):
        self.steps = []
        self.sent_at = None  # monotonic time at which the newest try began
        self._trace = trace
        self._since = time.monotonic()

    def line(self, text):
        """Show one line of --verbose."""
        if self._trace:
            self._trace(text)

    def add_step(self, name, sentence, **facts):
        """Note that the step *name* ended now, and show its *sentence*."""
        now = time.monotonic()
        self.add(ConnectStep(name, now - self._since, sentence, facts))
        self._since = now
        self.line("* " + sentence)

    def add(self, step):
        """Keep the ConnectStep *step*."""
        self.steps.append(step)

def is_in_network(host, network):
    """Return True if *host* is an IP address inside *network*, an address or CIDR block."""
    from ipaddress import ip_address, ip_network

    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False

def bypasses_proxy(host, port, no_proxy):
    """Return True if *no_proxy* names *host*, read as curl and Go read it.

    It is a list of domains (their subdomains included), addresses, networks in CIDR form and "*",
    with commas or blanks in between; an entry can end in a port.
    """
    host = host.lower().rstrip(".")
    is_address = is_in_network(host, host)
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name = entry
        with_port = re.match(r"(\[.*\]|[^:]*):(\d+)\Z", entry)
        if with_port:
            name = with_port.group(1)
            if int(with_port.group(2)) != port:
                continue
        name = name.strip("[]").rstrip(".")
        if name == "*":
            return True
        if is_in_network(host, name):
            return True
        domain = re.sub(r"\A\*?\.", "", name)
        if domain and (host == domain or host.endswith("." + domain)) and not is_address:
            return True
    return False

def find_proxy(url):
    """Return the proxy that the environment names for *url*, as urlsplit returns it, or None.

    This machine needs none.  Raise UsageError for a proxy that does not speak plain HTTP.
    """
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_loopback(parts.hostname):
        return None
    if bypasses_proxy(parts.hostname, origin(url)[2], proxies.get("no", "")):
        return None
    if proxy_bypass(parts.netloc):  # what macOS and Windows are set to
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

def proxy_name(proxy):
    """Return how messages name *proxy*, without its password."""
    return "the proxy " + proxy.netloc.rpartition("@")[2]

def find_route(url):
    """Return the Route to *url*; raise UsageError for a proxy that cannot be used."""
    from urllib.parse import urlsplit

    scheme, host, port = origin(url)
    proxy = find_proxy(url)
    speaker = urlsplit(url).netloc
    via = ""
    if proxy:
        place = proxy_name(proxy)
        via = " through " + place
        if scheme == "http":
            speaker = place
    return Route(url, host, port, scheme == "https", proxy, speaker, via)

def proxy_authorization(proxy):
    """Return the value of the header Proxy-Authorization, or None where no user is given."""
    from base64 import b64encode
    from urllib.parse import unquote

    if not proxy.username:
        return None
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return "Basic " + b64encode(pair.encode()).decode()

@functools.lru_cache(maxsize=None)  # it takes 50 ms to read the authorities
def tls_context(cacert):
    """Return a TLS context that trusts the file *cacert*, or the system's authorities for None."""
    try:
        import ssl
    except ImportError as error:
        raise NetworkError("this Python has no ssl module, which https needs") from error
    try:
        context = ssl.create_default_context(cafile=cacert)
    except OSError as error:
        raise UsageError(
            f"cannot use {cacert} as CA certificates: {os_reason(error)}") from error
    if cacert or os.environ.get("SSL_CERT_FILE"):
        # An authority that the user chose may be as old-fashioned as Python 3.12 allows.
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    return context

def connect_error(error, place, seconds):
    """Return the NetworkError for *error*, raised before the connection to *place* stood."""
    import socket

    if isinstance(error, socket.timeout):
        message = f"no connection to {place} within {seconds:g} s: see --connect-timeout"
    elif isinstance(error, (socket.gaierror, UnicodeError)):
        message = f"unknown host: {place}: {getattr(error, 'strerror', 'no host is named so')}"
    elif isinstance(error, ConnectionRefusedError):
        message = f"{place} refused the connection: is the server running?"
    else:
        message = f"cannot connect to {place}: {os_reason(error)}"
    return NetworkError(message, retryable=isinstance(error, ConnectionError))

def tls_error(error, place, seconds):
    """Return the NetworkError for *error*, raised by the TLS handshake with *place*."""
    import socket

    if isinstance(error, socket.timeout):
        return NetworkError(f"no TLS at {place} within {seconds:g} s: is it an http:// address? "
                            "else see --connect-timeout")
    reason = getattr(error, "reason", None)
    if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return NetworkError(f"no TLS at {place}: is it an http:// address?")
    if not reason and "Certificate" not in type(error).__name__:  # 3.6 has CertificateError
        return connect_error(error, place, seconds)
    message = f"TLS with {place} failed: {getattr(error, 'verify_message', '') or error}"
    code = getattr(error, "verify_code", 20)  # not told before Python 3.7
    if reason == "CERTIFICATE_VERIFY_FAILED" and (code in UNTRUSTED_CODES or code in STRICT_CODES):
        message += ": for an authority of your own give --cacert FILE or set SSL_CERT_FILE"
    return NetworkError(message)

def lost_error(error, place, seconds):
    """Return the NetworkError for *error*, raised before any byte of an answer from *place*."""
    import socket

    if isinstance(error, socket.timeout):
        return NetworkError(f"{place} sent nothing for {seconds:g} s: see --timeout")
    broken = isinstance(error, (ConnectionError, IncompleteError))
    return NetworkError(f"{place} closed the connection without an answer", retryable=broken)

def is_tls_wait(error):
    """Return True if *error* is TLS's way to say that it has to wait for the network."""
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")

def redact_head(data):
    """Return the lines of a request's bytes *data*, without its credentials."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n").rstrip("\n")
    lines = []
    for line in text.split("\n"):
        header = re.match(r"([\w-]+): (\w+ )?", line)
        if header and is_secret_name(header.group(1)):
            line = header.group() + "***"
        lines.append(line)
    return lines

class Stream:
    """A connected socket, plain or TLS, that never blocks: each wait goes through a Waiter.

    http.client takes it for its socket, and so it has sendall, makefile and close.  It closes the
    socket with the last of its users.
    """

    def __init__(self, sock, waiter, route, timeout, log):
        self.timeout = timeout  # seconds of silence
        self.route = route
        self.log = log
        self._socket = sock
        self._waiter = waiter
        self._early = b""  # of a response that came before our request had left
        self._users = 1

    def fileno(self):
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    def makefile(self, *unused):
        """Return this stream to one more user, who closes it."""
        self._users += 1
        return self

    def close(self):
        """Close the socket, if this was its last user."""
        self._users -= 1
        if self._users == 0:
            self._socket.close()

    def receive_now(self):
        """Return the bytes that have arrived, b"" at the end, or None if there are none yet.

        Raise OSError.
        """
        if self._early:
            data, self._early = self._early, b""
            return data
        try:
            return self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if is_tls_wait(error):
                return None
            raise

    def send_now(self, data):
        """Return how many bytes of *data* were sent without a wait; raise OSError."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            if is_tls_wait(error):
                return 0
            raise

    def receive(self, deadline=None):
        """Return the next bytes, b"" at the end; raise OSError.

        That is socket.timeout after *timeout* seconds of silence, or at the monotonic time
        *deadline* if that comes earlier.
        """
        import socket

        self._waiter.check()  # a fast stream never waits
        data = self.receive_now()
        until = time.monotonic() + self.timeout
        if deadline is not None:
            until = min(until, deadline)
        while data is None:
            left = until - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            self._waiter.wait([self.fileno()], seconds=left)
            data = self.receive_now()
        return data

    def sendall(self, data):
        """Send *data*, or as much of it as the server wants: it may answer before the end.

        Raise OSError.
        """
        for line in redact_head(data):
            self.log.line("> " + line)
        rest = memoryview(data)
        while rest and not self._early:
            try:
                sent = self.send_now(rest)
            except OSError:
                if self._has_answer():
                    return
                raise
            rest = rest[sent:]
            if sent:
                self._waiter.check()
            else:
                self._wait_to_send()

    def _wait_to_send(self):
        import socket

        ours = [self.fileno()]
        readable, writable = self._waiter.wait(ours, ours, self.timeout)
        if not readable and not writable:
            raise socket.timeout("timed out")
        if readable and not self._has_answer() and not writable:
            self._waiter.wait([], ours, self.timeout)

    def _has_answer(self):
        try:
            self._early = self.receive_now() or b""
        except OSError:
            pass
        return bool(self._early)

def resolve(host, port, waiter, seconds):
    """Return the addresses of *host*, as getaddrinfo does; raise OSError or UnicodeError.

    A thread asks, because the system's resolver knows neither a time limit nor Ctrl+C.
    """
    import socket

    # The codec of names is imported on first use, which a thread should not do.
    "".encode("idna")
    return waiter.run_in_thread(
        functools.partial(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM), seconds)

def connect_address(address, waiter, seconds):
    """Return a non-blocking socket connected to *address*, an item of getaddrinfo's list."""
    import errno
    import socket

    family, kind, protocol, _, place = address
    sock = socket.socket(family, kind, protocol)  # fails too, without IPv6
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(place)
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            _, writable = waiter.wait([], [sock.fileno()], seconds)
            if not writable:
                raise socket.timeout("timed out")
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))  # ConnectionRefusedError, for example
    except BaseException:
        sock.close()
        raise
    return sock

def connect_socket(addresses, waiter, deadline):
    """Return a socket connected to the first of *addresses* that answers; raise OSError.

    The monotonic time *deadline* is one for all of them.
    """
    failure = OSError("no address")
    for count, address in zip(range(len(addresses), 0, -1), addresses):
        seconds = max(0.001, (deadline - time.monotonic()) / count)
        try:
            return connect_address(address, waiter, seconds)
        except OSError as error:
            failure = error
    raise failure

def read_tunnel_head(stream, deadline):
    """Send CONNECT for the host of the route of *stream*; return the proxy's ResponseHead."""
    route = stream.route
    host = f"[{route.host}]" if ":" in route.host else route.host
    target = f"{host}:{route.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    authorization = proxy_authorization(route.proxy)
    if authorization:
        lines.append("Proxy-Authorization: " + authorization)
    stream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
    decoder = ResponseDecoder("CONNECT")
    while decoder.head is None:
        data = stream.receive(deadline)
        decoder.feed(data)
        if not data:
            decoder.finish()
    for line in decoder.head.lines:
        stream.log.line("< " + line)
    return decoder.head

def open_tunnel(stream, seconds, deadline):
    """Make the proxy at the other end of *stream* connect us to the host of its route.

    Raise NetworkError, or RefusedError where the proxy wants a password.
    """
    import socket

    place = proxy_name(stream.route.proxy)
    try:
        head = read_tunnel_head(stream, deadline)
    except socket.timeout as error:
        raise connect_error(error, place, seconds) from error
    except (OSError, IncompleteError) as error:
        raise lost_error(error, place, seconds) from error
    except WireError as error:
        raise ServerError(f"{place} does not speak HTTP: {error}") from error
    if 200 <= head.status <= 299:
        return
    message = f"{place} does not connect us: HTTP {head.status} {head.reason}".rstrip()
    if head.status == 407:
        hint = "the proxy wants a user and password: put them into its URL"
        raise RefusedError(f"{message}: {hint}", head.status)
    raise NetworkError(message, head.status, retryable=is_retryable_status(head.status))

def start_tls(sock, host, context, waiter, deadline):
    """Return *sock* wrapped in TLS with *host*; raise OSError or ssl.CertificateError."""
    import socket

    wrapped = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                wrapped.do_handshake()
                return wrapped
            except OSError as error:
                if not is_tls_wait(error):
                    raise
                ours = [wrapped.fileno()]
                reads = ours if "Read" in type(error).__name__ else []
                writes = [] if reads else ours
            left = deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            waiter.wait(reads, writes, left)
    except BaseException:
        wrapped.close()
        raise

def peer_address(sock):
    """Return the IP address at the other end of *sock*, or None if it has gone already."""
    try:
        return sock.getpeername()[0]
    except OSError:
        return None

def open_stream(route, settings, waiter, log):
    """Return a Stream to the server, or to its proxy, with TLS and a tunnel where needed.

    Each step is added to *log*.  Raise NetworkError, or RefusedError where a proxy wants a
    password.
    """
    seconds = settings.connect_timeout
    deadline = time.monotonic() + seconds
    context = tls_context(settings.cacert) if route.tls else None
    host, port, place = route.host, route.port, route.speaker
    if route.proxy:
        host, port, place = route.proxy.hostname, route.proxy.port or 80, proxy_name(route.proxy)
    try:
        addresses = resolve(host, port, waiter, seconds)
        names = list(dict.fromkeys(address[4][0] for address in addresses))
        log.add_step("name", f"{host} is {', '.join(names)}", addresses=names)
        sock = connect_socket(addresses, waiter, deadline)
    except (OSError, UnicodeError) as error:
        raise connect_error(error, place, seconds) from error
    log.add_step("connection", "connected to " + place, address=peer_address(sock))
    if not route.tls:
        return Stream(sock, waiter, route, settings.timeout, log)
    try:
        if route.proxy:
            open_tunnel(Stream(sock, waiter, route, seconds, log), seconds, deadline)
        sock = start_tls(sock, route.host, context, waiter, deadline)
    except (OSError, ValueError) as error:  # CertificateError is a ValueError before Python 3.7
        raise tls_error(error, route.speaker, seconds) from error
    except BaseException:
        sock.close()
        raise
    version, expires = sock.version(), sock.getpeercert()["notAfter"]
    log.add_step("tls", f"{version}, the certificate is good until {expires}",
                 version=version, certificate_expires=expires)
    return Stream(sock, waiter, route, settings.timeout, log)

class Response:
    """A response whose head and body are read by Wire's decoder, in the shape http.client wants."""

    will_close = True  # http.client then gives up the connection, and the response keeps it

    def __init__(self, stream, debuglevel=0, method=None, url=None):
        self._stream = stream.makefile("rb")
        self._decoder = ResponseDecoder(method)
        self._body = b""  # that came with the head
        self._started = False  # some of the body came
        self.context = None  # ErrorContext, set by open_response

    def begin(self):
        """Read the head, within the stream's timeout as a whole.

        Raise NetworkError where none comes, ServerError where it is not HTTP.
        """
        deadline = time.monotonic() + self._stream.timeout
        while self.head is None:
            self._body += self._receive(deadline)
        self.reason = self.head.reason  # urllib.request asks for it

    @property
    def head(self):
        """The ResponseHead."""
        return self._decoder.head

    def read(self, deadline=None):
        """Return the next bytes of the body, b"" at its end.

        Raise CutShortError where it ends too early, NetworkError for silence: the stream's
        timeout, or up to the monotonic time *deadline*.
        """
        body, self._body = self._body, b""
        if not body:
            body = self._decode(b"")  # where the bytes before were broken, this says so
        while not body and not self._decoder.complete:
            body = self._receive(deadline)
        self._started = self._started or bool(body)
        return body

    def close(self):
        """Close the connection."""
        self._stream.close()

    def _receive(self, deadline):
        speaker = self._stream.route.speaker
        try:
            data = self._stream.receive(deadline)
        except OSError as error:
            broken = isinstance(error, ConnectionError)
            if not broken or not self._started:
                raise lost_error(error, speaker, self._stream.timeout) from error
            raise CutShortError(f"the reply was cut short: {speaker} closed the connection",
                                retryable=True) from error
        return self._decode(data, closed=not data)

    def _decode(self, data, closed=False):
        try:
            if closed:
                self._decoder.finish()
            return self._decoder.feed(data)
        except WireError as error:
            raise self._wire_error(error, self._stream.route.speaker) from error

    def _wire_error(self, error, speaker):
        if self.head is not None:
            return CutShortError(f"the reply was cut short: {speaker} closed the connection")
        if isinstance(error, IncompleteError):
            return lost_error(error, speaker, self._stream.timeout)
        return ServerError(f"{speaker} does not speak HTTP: {error}")

@functools.lru_cache(maxsize=None)
def build_opener():
    """Return urllib.request's opener with one handler, which connects through open_stream.

    The request that it opens has an attribute *connect* that returns a Stream.  It follows no
    redirect and raises for no status.
    """
    import http.client
    import urllib.request

    class Connection(http.client.HTTPConnection):
        response_class = Response

        def connect(self):
            self.sock = self.open_stream()

    class Handler(urllib.request.HTTPHandler):
        def http_open(self, request):
            def build_connection(host, **options):
                connection = Connection(host, **options)
                connection.open_stream = request.open_stream
                return connection
            return self.do_open(build_connection, request)

        https_open = http_open
        https_request = urllib.request.HTTPHandler.http_request

    opener = urllib.request.OpenerDirector()
    opener.add_handler(Handler())
    return opener

def send_request(request, route, settings, waiter, log):
    """Send *request* and return the Response to it, whatever its status."""
    import urllib.error
    import urllib.request

    outgoing = urllib.request.Request(request.url, request.body, dict(request.headers),
                                      method=request.method)
    outgoing.open_stream = functools.partial(open_stream, route, settings, waiter, log)
    if route.proxy and not route.tls:
        outgoing.set_proxy(route.proxy.netloc.rpartition("@")[2], "http")
        authorization = proxy_authorization(route.proxy)
        if authorization:
            outgoing.add_header("Proxy-Authorization", authorization)
    try:
        return build_opener().open(outgoing, timeout=settings.timeout)
    except urllib.error.URLError as error:
        raise lost_error(error.reason, route.speaker, settings.timeout) from error

class Recorder:
    """Stands in for a socket and keeps what is sent."""

    def __init__(self):
        self.sent = bytearray()

    def sendall(self, data):
        """Keep *data*."""
        self.sent += data

def request_bytes(request, route):
    """Return the head and body of *request* as http.client writes them, on a connection kept open.

    This is for a selector loop, which cannot go through urllib.request.
    """
    import http.client
    from urllib.parse import urlsplit

    parts = urlsplit(request.url)
    headers = dict(request.headers)
    target = parts.path + ("?" + parts.query if parts.query else "")
    if route.proxy and not route.tls:
        target = request.url
        authorization = proxy_authorization(route.proxy)
        if authorization:
            headers["Proxy-Authorization"] = authorization
    connection = http.client.HTTPConnection(parts.netloc)
    connection.sock = Recorder()
    headers.setdefault("Host", parts.netloc)
    connection.request(request.method, target, request.body, headers)
    return bytes(connection.sock.sent)

def secret_texts(settings):
    """Return the texts in *settings* that must not be shown or repeated."""
    texts = []
    if settings.api_key:
        texts.append(settings.api_key)
    for name, value in settings.headers:
        if is_secret_name(name):
            texts += [value, value.rpartition(" ")[2]]  # with and without a scheme as Basic
    return texts

def build_context(head, request, route, settings):
    """Return the ErrorContext of a response with *head* to *request*."""
    from email.utils import formatdate

    headers = dict(head.headers)
    headers.setdefault("date", formatdate())  # as RFC 9110, 6.6.1, wants it
    plain_url = None
    if settings.endpoint:
        plain_url = plain_address(settings.base_url)
    return ErrorContext(head.status, headers, secret_texts(settings), request.url, route.via,
                        request.method, plain_url)

@contextlib.contextmanager
def open_response(request, settings, waiter, log):
    """Send *request*, yield the Response to it, and close the connection.

    Raise NetworkError where there is no response, ServerError where it is not HTTP; reading can
    raise these too, and CutShortError.
    """
    route = find_route(request.url)
    with contextlib.closing(send_request(request, route, settings, waiter, log)) as response:
        for line in response.head.lines:
            log.line("< " + line)
        response.context = build_context(response.head, request, route, settings)
        yield response

# -- Console ----------------------------------------------------------------------------------

PIPE_BYTES = 4096  # what a pipe that is ready takes without blocking (POSIX's PIPE_BUF is less)
DIM, RED, BOLD, RESET = "\x1b[2m", "\x1b[31m", "\x1b[1m", "\x1b[0m"

class Output:
    """Standard output or standard error: UTF-8 for a pipe, what it can show for a terminal.

    It keeps nothing back, so that there is nothing to flush when the reader has gone.
    """

    def __init__(self, stream, environ, waiter):
        self._fd = stream.fileno() if stream else -1  # closed: writing fails as it should
        self._waiter = waiter
        self.is_terminal = bool(stream) and stream.isatty()
        self._console = None
        if self.is_terminal and os.name != "posix":  # a Windows console has a code page
            self._console = stream.buffer.raw
        self.dumb = not self.is_terminal or (environ.get("TERM") or "dumb") == "dumb"
        self.styled = not self.dumb and not environ.get("NO_COLOR")
        self._encoding = stream.encoding if self.is_terminal else "utf-8"

    def can_show(self, text):
        """Return True if the encoding has all of *text*."""
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return False
        return True

    def write(self, text):
        """Write *text* whole; raise OSError where that fails, and as Waiter.wait() does."""
        rest = text.encode(self._encoding, "replace")
        while rest:
            if self._console:
                rest = rest[self._console.write(rest):]
                continue
            if os.name == "posix":
                self._waiter.wait([], [self._fd])
            with contextlib.suppress(BlockingIOError):  # another process made it non-blocking
                rest = rest[os.write(self._fd, rest[:PIPE_BYTES]):]

    def draw(self, text):
        """Write a few bytes of *text* from any thread, if the terminal takes them now."""
        with contextlib.suppress(OSError):
            if os.name != "posix" or poll_once([], [self._fd], 0)[1]:
                os.write(self._fd, text.encode(self._encoding, "replace"))

    def is_ready(self):
        """Return True if a few bytes can be written without a wait."""
        return os.name != "posix" or bool(poll_once([], [self._fd], 0)[1])

    def width(self):
        """Return the columns of the terminal."""
        try:
            return os.get_terminal_size(self._fd).columns or 80
        except OSError:
            return 80

    def in_foreground(self):
        """Return True if the terminal is ours to draw on: a background job leaves it alone."""
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except (AttributeError, OSError):  # not POSIX, or not our controlling terminal
            return True

class Spinner:
    """A line on a terminal, drawn by a thread, that says what we wait for and how long."""

    def __init__(self, output, label):
        self._output = output
        self._started = time.monotonic()
        self._thread = None
        self._stopped = None
        self._drawn = False
        self.say(label)

    def say(self, label, until=None):
        """Show *label* with the seconds since the start, or those left *until* a monotonic time."""
        self._label = one_line(label), until

    def start(self):
        """Draw from here on, where there is a thread to be had."""
        import threading

        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # can't start new thread
            self._thread = None

    def stop(self):
        """Stop drawing, and erase the line."""
        if self._thread:
            self._stopped.set()
            self._thread.join(1)  # a stopped terminal may hold it
            self._thread = None
        if self._drawn:
            self._output.draw("\r\x1b[K")
            self._drawn = False

    def _run(self):
        for frame in itertools.cycle("|/-\\"):
            if self._stopped.wait(0.1):
                return
            if self._output.in_foreground():
                self._drawn = True
                line = truncate(f"{frame} {self._describe()}", self._output.width() - 1)
                self._output.draw(f"\r{line}\x1b[K")

    def _describe(self):
        label, until = self._label
        now = time.monotonic()
        if until is None:
            return f"{label} {now - self._started:.0f}s"
        left = until - now
        if left < 0.5:
            return f"{label} now"
        return f"{label} in {left:.0f}s"

class Console:
    """The process's three streams.  Whatever is written stops the spinner first."""

    def __init__(self, stdin, stdout, stderr, environ, waiter):
        self.waiter = waiter
        self.out = Output(stdout, environ, waiter)
        self.err = Output(stderr, environ, waiter)
        self.json = False
        self.quiet = False
        self.verbose = False
        self.secrets = []  # texts that stderr never shows
        self._stdin = stdin
        self._unread = b""  # of a piped line
        self._spinner = None

    # Standard input

    def stdin_is_terminal(self):
        """Return True if a person types at standard input."""
        return self._stdin is not None and self._stdin.isatty()

    def stdin_has_data(self):
        """Return True if standard input is a pipe with data, or a file at its beginning."""
        import stat

        try:
            descriptor = self._stdin.fileno()
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                return status.st_size > 0 and os.lseek(descriptor, 0, os.SEEK_CUR) == 0
            if not stat.S_ISFIFO(status.st_mode) and not stat.S_ISSOCK(status.st_mode):
                return False
            return self._count_waiting(descriptor) > 0
        except (AttributeError, ImportError, OSError, ValueError):  # closed, or not POSIX
            return False

    def _count_waiting(self, descriptor):
        from array import array
        from fcntl import ioctl
        from termios import FIONREAD

        count = array("i", [0])
        ioctl(descriptor, FIONREAD, count)
        return count[0]

    def read_stdin(self):
        """Return all of standard input as bytes, or None where it is closed."""
        if self._stdin is None:
            return None
        pieces = [self._unread]
        self._unread = b""
        while True:
            data = self._read()
            if not data:
                return b"".join(pieces)
            pieces.append(data)

    def read_line(self, prompt):
        """Return the next line typed, without its end; raise EOFError at the end of the input."""
        if self.stdin_is_terminal() and self.out.is_terminal:
            return self._read_typed(input, prompt)
        with contextlib.suppress(OSError):  # the prompt is no part of the answer
            self.err.write(prompt)
        return self.read_piped_line().decode("utf-8", "replace").rstrip("\n")

    def read_secret(self, prompt):
        """Return a line that is typed without being shown, or the next one of a pipe."""
        if not self.stdin_is_terminal():
            return self.read_piped_line().decode("utf-8", "replace").strip()
        from getpass import getpass

        return self._read_typed(getpass, prompt).strip()

    def _read_typed(self, read, prompt):
        self.stop_spinner()
        while True:
            try:
                return self.waiter.prompt(read, prompt)
            except Suspended:
                self.waiter.suspend()
            except UnicodeDecodeError:
                raise UnusableInputError(
                    "what was typed is not text in the terminal's encoding") from None

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
        descriptor = self._stdin.fileno()
        while True:
            try:
                if os.name == "posix":
                    self.waiter.wait([descriptor])
                return os.read(descriptor, READ_BYTES)
            except BlockingIOError:  # another process made it non-blocking, and was faster
                continue
            except OSError as error:
                raise UsageError(f"cannot read standard input: {os_reason(error)}") from error

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

    # The spinner

    def start_spinner(self, label):
        """Show *label* and the seconds on stderr, where that is a terminal with styles."""
        self.stop_spinner()
        if self.err.styled and not self.quiet:
            self._spinner = Spinner(self.err, label)
            self._spinner.start()

    def label_spinner(self, label, until=None):
        """Show *label* from here on, with the seconds left *until* a monotonic time if given."""
        if self._spinner:
            self._spinner.say(label, until)

    def stop_spinner(self):
        """Leave the line as it was before the spinner."""
        if self._spinner:
            self._spinner.stop()
            self._spinner = None

    @contextlib.contextmanager
    def spinner(self, label):
        """Show a spinner during the with block."""
        self.start_spinner(label)
        try:
            yield
        finally:
            self.stop_spinner()

    # Standard output

    def write(self, text):
        """Write *text* to stdout; a terminal gets nothing that could drive it.

        Raise BrokenPipeError where the reader has gone, OutputError for any other failure.
        """
        self.write_styled(sanitize(text) if self.out.is_terminal else text)

    def write_styled(self, text):
        """Write *text*, sanitized already and with our own styles, to stdout; raise as write()."""
        self.stop_spinner()
        try:
            self.out.write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to stdout: {os_reason(error)}") from error

    # Standard error

    def print_line(self, line, dim=False):
        """Write *line* to stderr; where that cannot be done there is nobody to tell."""
        line = redact(sanitize(line.replace("\n", " ")), self.secrets)
        if dim and self.err.styled:
            line = DIM + line + RESET
        self._write_error(line + "\n")

    def _write_error(self, text):
        self.stop_spinner()
        with contextlib.suppress(OSError):
            self.err.write(text)

    def note(self, *sentences):
        """Tell the user what may be useful, a line each, unless --quiet is given."""
        if not self.quiet:
            self._print_sentences("note", sentences)

    def warn(self, *sentences):
        """Tell the user that the answer may not be what it seems, also with --quiet."""
        self._print_sentences("warning", sentences)

    def _print_sentences(self, kind, sentences):
        for sentence in sentences:
            if self.json:
                self._print_object(kind=kind, message=sentence)
            else:
                self.print_line(f"xeroctl: {kind}: {sentence}")

    def print_error(self, error):
        """Report the XeroctlError *error* in one line, with -o json as an object."""
        for line in (error.body or "").split("\n") if self.verbose else ():
            self.trace("< " + line.rstrip("\r"))
        if self.json:
            fields = {name: value for name, value in vars(error).items() if name != "body"}
            self._print_object(kind=error.kind, message=str(error), **fields)
            return
        word = "error"
        if self.err.styled:
            word = RED + word + RESET
        line = redact(sanitize(str(error).replace("\n", " ")), self.secrets)
        self._write_error(f"xeroctl: {word}: {line}\n")

    def print_report(self, kind, pairs):
        """Write the (name, value) *pairs* to stderr as an aligned block, as JSON with -o json."""
        if self.json:
            self._print_object(kind=kind, **dict(pairs))
            return
        width = max([len(name) for name, _ in pairs], default=0) + 1
        for name, value in pairs:
            label = name.replace("_", " ") + ":"
            self.print_line(f"{label:<{width}} {value}", dim=True)

    def trace(self, line):
        """Show one *line* of the HTTP exchange, with --verbose."""
        if self.verbose:
            self.print_line(line, dim=True)

    def _print_object(self, **fields):
        for name, value in fields.items():
            if isinstance(value, str):  # before a key with a quote in it is escaped
                fields[name] = redact(value, self.secrets)
        self._write_error(redact(sanitize(json.dumps(fields)), self.secrets) + "\n")

# -- Client -----------------------------------------------------------------------------------

def read_error_body(response, seconds):
    """Return the first bytes of an error's body, as far as they come within *seconds*."""
    deadline = time.monotonic() + seconds
    data = b""
    try:
        while len(data) < MAX_ERROR_BYTES:
            piece = response.read(deadline)
            if not piece:
                break
            data += piece
    except XeroctlError:  # the status says more than a body that breaks off
        pass
    return data[:MAX_ERROR_BYTES]

def check_status(response, settings):
    """Raise the error that *response* stands for, if it is one by its HTTP status."""
    if not 200 <= response.head.status <= 299:
        raise parse_error(read_error_body(response, settings.timeout), response.context)

def receive_json(request, settings, waiter, log):
    """Send *request* once and return the JSON document that answers it, empty for HTTP 204."""
    with open_response(request, settings, waiter, log) as response:
        check_status(response, settings)
        if response.head.status == 204:
            return {}
        data = bytearray()
        while True:
            piece = response.read()
            if not piece:
                return parse_reply(bytes(data), response.context)
            data += piece
            if len(data) > MAX_REPLY_BYTES:
                raise ServerError(f"the reply is over {MAX_REPLY_BYTES >> 20} MiB")

def stream_once(request, settings, console, log=None):
    """Send *request* once and yield the Chunks of the answer as they arrive.

    A reply that is not streamed is one Chunk.  Raise the error that the reply holds, after the
    Chunks before it.
    """
    log = log or ConnectLog(console.trace)
    log.sent_at = time.monotonic()
    with open_response(request, settings, console.waiter, log) as response:
        check_status(response, settings)
        decoder = AnswerDecoder(request.streamed, response.head, response.context)
        finished = False
        deadline = None
        while not decoder.ended:
            try:
                data = response.read(deadline)
            except (CutShortError, NetworkError):
                if finished:  # the answer is whole, however the wire broke
                    return
                raise
            now = time.monotonic()
            chunk = decoder.feed(data, now) if data else decoder.finish(now)
            if chunk:
                finished = finished or bool(chunk.finish_reason)
                if finished:
                    deadline = now + AFTER_FINISH_SECONDS
                yield chunk
            if decoder.error:
                raise decoder.error
            if not data:
                return

def pause_before_retry(error, attempt, settings, console):
    """Wait before another try after *error*, the *attempt*th; raise it if there is to be none."""
    from random import random

    if not error.retryable or attempt > settings.retries:
        raise error
    if error.retry_after is not None and error.retry_after > MAX_RETRY_DELAY_SECONDS:
        raise error
    seconds = retry_delay(attempt, error.retry_after, random())
    reason = str(error).partition(": ")[0]  # without the advice
    if not console.err.styled:
        console.note(f"{reason}, trying again in {max(seconds, 0.1):.1f} s")
    with console.spinner(reason):
        console.label_spinner(reason + ", trying again", time.monotonic() + seconds)
        console.waiter.pause(seconds)

def request_json(request, settings, console, log=None):
    """Send *request* and return the JSON document that answers it; retry where that may help."""
    log = log or ConnectLog(console.trace)
    for attempt in itertools.count(1):
        try:
            with console.spinner("waiting"):
                return receive_json(request, settings, console.waiter, log)
        except XeroctlError as error:
            pause_before_retry(error, attempt, settings, console)

def read_first_chunks(chunks, console):
    """Return the first of *chunks*, up to the one that holds a part of the answer."""
    first = []
    for chunk in chunks:
        first.append(chunk)
        if chunk.text or chunk.tool_calls:
            break
        if chunk.reasoning:
            console.label_spinner("thinking")
            break
    return first

def stream_answer(request, settings, console, log=None):
    """Send *request* and yield the Chunks of the answer; retry where that may help.

    *log* is a ConnectLog, for the time at which the try that answered was sent.  There is no
    retry once a token came.  A spinner shows until something is written.  Where the
    server refuses stream_options, it is asked once more without them.
    """
    attempt = 1
    try:
        while True:
            console.start_spinner("waiting")
            chunks = stream_once(request, settings, console, log)
            try:
                first = read_first_chunks(chunks, console)
                break
            except XeroctlError as error:
                plainer = without_stream_options(request)
                if plainer and refuses_stream_options(error):
                    request = plainer
                    continue
                pause_before_retry(error, attempt, settings, console)
                attempt += 1
        with contextlib.closing(chunks):
            yield from first
            yield from chunks
    finally:
        console.stop_spinner()

def send_dry_run(request, settings, console):
    """Write the curl command that would send *request* to stdout."""
    console.write(build_curl_command(request, settings) + "\n")

# -- Views ------------------------------------------------------------------------------------

class TextView:
    """Show an answer as its text: as it comes if *streamed*, else whole at its end.

    A whole answer is one write, so that processes that share a pipe do not mix short answers.
    """

    def __init__(self, console, streamed):
        self.started = False  # there is something to show
        self._console = console
        self._streamed = streamed
        self._held = []
        self._last = ""  # character

    def show(self, chunk):
        """Show the text of *chunk*."""
        if not chunk.text:
            return
        self.started = True
        self._last = chunk.text[-1]  # before the write, in which an interrupt may come
        if self._streamed:
            self._console.write(chunk.text)
        else:
            self._held.append(chunk.text)

    def finish(self):
        """Show what is held, and end the answer with a newline if it has none."""
        text = "".join(self._held)
        if self._last != "\n":
            text += "\n"
        self._held = []
        self._last = "\n"
        if text:
            self._console.write(text)

class StyledView(TextView):
    """Show an answer on a terminal as styled Markdown, with what is inside <think> dim."""

    def __init__(self, console):
        super().__init__(console, True)
        self._columns = console.out.width()
        self._styler = MarkdownStyler(self._columns, console.out.styled)
        self._splitter = ThoughtSplitter()

    def show(self, chunk):
        """Show the text of *chunk*."""
        self._show(*self._splitter.feed(sanitize(chunk.text)))

    def finish(self):
        """Show what is held, and end the answer with a newline if it has none."""
        self._show(*self._splitter.finish())
        self._write(self._styler.finish())
        super().finish()

    def _show(self, thought, answer):
        columns = self._console.out.width()
        if columns != self._columns:
            self._columns = columns
            self._styler.resize(columns)
        output = ""
        for text, is_thought in ((thought, True), (answer, False)):
            if text:
                self.started = True
                self._last = text[-1]
                self._styler.dim = is_thought
                output += self._styler.feed(text)
        self._write(output)

    def _write(self, text):
        if text:
            self._console.write_styled(text)

class ReasoningView:
    """Show reasoning on stderr, dim where it has colours, and the rest of an answer in *view*.

    Reasoning is what comes as such, and what stands inside <think> at the head of the answer.
    """

    def __init__(self, console, view):
        self._console = console
        self._view = view
        self._splitter = ThoughtSplitter()
        self._chunk = None  # the last one
        self._last = ""  # character of the reasoning

    @property
    def started(self):
        """True once there is something of the answer to show."""
        return self._view.started

    def show(self, chunk):
        """Show what *chunk* brings."""
        self._chunk = chunk
        self._show_reasoning(chunk.reasoning)
        self._show(*self._splitter.feed(chunk.text))

    def finish(self):
        """Show what is held, and end both with a newline."""
        self._show(*self._splitter.finish())
        self._end_reasoning()
        self._view.finish()

    def _show(self, thought, answer):
        self._show_reasoning(thought.replace(THINK_START, "").replace(THINK_END, ""))
        if answer:
            self._end_reasoning()
            if not self.started:
                answer = answer.lstrip("\n")  # the blank line after the reasoning
            self._view.show(self._chunk._replace(text=answer))

    def _show_reasoning(self, text):
        if not self._last:
            text = text.lstrip("\n")
        if text:
            self._last = text[-1]
            text = sanitize(text)
            if self._console.err.styled:
                text = DIM + text + RESET
            self._write(text)

    def _end_reasoning(self):
        if self._last and self._last != "\n":
            self._write("\n")
        self._last = ""

    def _write(self, text):
        self._console.stop_spinner()
        with contextlib.suppress(OSError):  # nobody to tell
            self._console.err.write(text)

def _escape_match(match):
    return json.dumps(match.group())[1:-1]

class JsonView:
    """Show the server's own documents: a line each if *streamed*, else the one, indented."""

    def __init__(self, console, streamed):
        self.started = False  # there is something to show
        self._console = console
        self._streamed = streamed
        self._held = None  # the Chunk of a whole reply

    def show(self, chunk):
        """Show the documents of *chunk*, as the server wrote them where each is a line."""
        if self._held or not self._streamed and len(chunk.documents) > 1:
            self._streamed = True  # though we asked for none
            self.finish()
        if self._streamed and chunk.documents:
            self._show_lines(chunk)
        elif chunk.documents:
            self._held = chunk
            self.started = bool(chunk.text)

    def finish(self):
        """Show what is held."""
        chunk = self._held
        self._held = None
        if chunk and self._streamed:
            self._show_lines(chunk)
        elif chunk:
            self.show_document(chunk.documents[0])

    def show_document(self, document):
        """Show *document*, indented for a reader."""
        self._write(json_text(document, indent=2))

    def _show_lines(self, chunk):
        lines = chunk.sources
        if None in lines:
            lines = []
            for document, source in zip(chunk.documents, chunk.sources):
                lines.append(source or json_text(document))
        self._write("\n".join(lines))

    def _write(self, text):
        if not self._console.out.can_show(text):
            text = re.sub("[^\x00-\x7f]+", _escape_match, text)
        self.started = True
        self._console.write(text + "\n")

def build_view(console, streamed, plain=False, show_reasoning=False):
    """Return the view for an answer; *plain* turns styles and wrapping off."""
    if console.json:
        return JsonView(console, streamed)
    if plain or console.out.dumb:
        view = TextView(console, streamed)
    else:
        view = StyledView(console)
    if show_reasoning:
        return ReasoningView(console, view)
    return view

def show_answer(request, settings, console, view, reply):
    """Send *request*, show the answer in *view* as it comes and add it to *reply*.

    Return the seconds that the try took that answered.  Where the answer fails, what came of it
    is shown first.
    """
    log = ConnectLog(console.trace)
    try:
        with contextlib.closing(stream_answer(request, settings, console, log)) as chunks:
            for chunk in chunks:
                reply.add(chunk)
                view.show(chunk)
        reply.seconds = time.monotonic() - log.sent_at
        if reply.first_at is not None:
            reply.first_seconds = reply.first_at - log.sent_at
        if not console.json:
            reply.check_answer()
        view.finish()
        reply.check_answer()
    except BaseException as error:
        # At a signal a newline is not worth the wait for a reader that has stopped.
        if view.started and (isinstance(error, Exception) or console.out.is_ready()):
            with contextlib.suppress(OSError, OutputError):  # what happened first counts
                view.finish()
        raise
    return reply.seconds

def show_json(document, console):
    """Show *document* on stdout."""
    JsonView(console, False).show_document(document)

def show_rows(document, names, rows, console):
    """Show *rows* of texts: on a terminal as a table under *names*, else separated by tabs.

    With -o json show the *document* that they are from.
    """
    if console.json:
        show_json(document, console)
        return
    if console.out.is_terminal:
        lines = table_lines(names, rows, console.out.width())
        if console.out.styled:
            lines[0] = BOLD + lines[0] + RESET
    else:
        lines = ["\t".join(map(one_line, row)) for row in rows]
    console.write_styled("".join(line + "\n" for line in lines))

FIGURE_NAMES = {"tokens_per_second": "tokens/s after the first"}  # the footer's is over all

def report_reply(reply, seconds, streamed, show_usage, console):
    """Tell on stderr how *reply* ended and, in *seconds* and tokens, what it took."""
    warning = finish_warning(reply)
    if warning:
        console.warn(warning)
    note = finish_note(reply)
    if note:
        console.note(note)
    if streamed and not console.json and not console.quiet:
        console.print_line(footer_line(reply, seconds), dim=True)
    if show_usage:
        pairs = usage_fields(reply, seconds, streamed)
        if not console.json:
            pairs = [(FIGURE_NAMES.get(name, name), value) for name, value in pairs]
        console.print_report("token_usage", pairs)
# -- Demo endpoint ----------------------------------------------------------------------------

DEMO_OPENINGS = ("Hello from the practice endpoint!", "The practice endpoint speaking.",
                 "You have reached the practice endpoint.")
DEMO_ADVICE = (
    f"To talk to a real endpoint, put its key into {ENV_API_KEY} and run:\n"
    "xeroctl chat --base-url https://api.xerotier.ai/PROJECT/v1 --endpoint SLUG -m Hello\n")
DEMO_FIRST_TOKEN_SECONDS = 0.4
DEMO_TOKEN_SECONDS = 0.02

class DemoServer:
    """What the endpoint of --demo knows and answers; no model is behind it."""

    def __init__(self):
        self._stored = {}  # id -> (completion, messages)
        question = {"role": "user", "content": "What do koalas eat?"}
        self._complete({"store": True, "seed": 1, "metadata": {"sample": "1"},
                        "messages": [question]})

    def answer(self, method, target, body):
        """Return the HTTP status and the list of documents that answer a request."""
        from urllib.parse import parse_qsl

        path, _, query = target.partition("?")
        path = path.partition("/v1")[2]
        if path == "/models":
            return 200, [{"object": "list", "data": [{"id": "practice", "object": "model"}]}]
        if path == CHAT_PATH and method == "POST":
            return 200, self._complete(body)
        if path == CHAT_PATH:
            return 200, [self._list(dict(parse_qsl(query, keep_blank_values=True)))]
        name, _, part = path[len(CHAT_PATH) + 1:].partition("/")
        if name not in self._stored or part not in ("", "messages"):
            message = f"there is no {name or path} here"
            return 404, [{"error": {"message": message, "code": "not_found"}}]
        completion, messages = self._stored[name]
        if part:
            return 200, [{"object": "list", "data": messages, "has_more": False}]
        if method == "POST":
            completion["metadata"] = body["metadata"]
        if method == "DELETE":
            del self._stored[name]
            return 200, [{"id": name, "object": "chat.completion.deleted", "deleted": True}]
        return 200, [completion]

    def _complete(self, body):
        """Return the documents of the answer: one, or the chunks of a stream."""
        from random import Random

        messages = [content_text(message) for message in body["messages"]]
        opening = Random(body.get("seed")).choice(DEMO_OPENINGS)
        words = re.findall(r"\S+\s*", (
            f"{opening} No model reads this: it runs inside xeroctl, for trying things out. "
            f"You wrote: {messages[-1]}\n\n{DEMO_ADVICE}"))
        limit = body.get("max_tokens", len(words))
        finish_reason = "length" if limit < len(words) else "stop"
        words = words[:limit]
        prompt_tokens = sum(len(message.split()) for message in messages)
        common = {"id": f"chatcmpl-practice-{len(self._stored) + 1}", "created": int(time.time()),
                  "model": "practice"}
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(words),
                 "total_tokens": prompt_tokens + len(words)}
        choice = {"index": 0, "finish_reason": finish_reason,
                  "message": {"role": "assistant", "content": "".join(words)}}
        completion = dict(common, object="chat.completion", choices=[choice], usage=usage,
                          metadata=body.get("metadata") or {})
        if body.get("store"):
            self._stored[completion["id"]] = completion, body["messages"]
        if not body.get("stream"):
            return [completion]
        choices = [[{"index": 0, "delta": {"content": word}}] for word in words]
        choices.append([{"index": 0, "delta": {}, "finish_reason": finish_reason}])
        common["object"] = "chat.completion.chunk"
        chunks = [dict(common, choices=one) for one in choices]
        return chunks + [dict(common, choices=[], usage=usage)]

    def _list(self, query):
        """Return the list of the stored completions that *query*, a dict of texts, asks for."""
        tags = {name[len("metadata["):-1]: value for name, value in query.items() if "[" in name}
        completions = []
        for completion, _ in self._stored.values():
            if tags.items() <= completion["metadata"].items():
                if query.get("model", "practice") == "practice":
                    completions.append(completion)
        if query.get("order") == "desc":
            completions.reverse()
        ids = [completion["id"] for completion in completions]
        start = 0
        if query.get("after") in ids:
            start = ids.index(query["after"]) + 1
        end = start + int(query.get("limit", 20))
        return {"object": "list", "data": completions[start:end], "has_more": end < len(ids)}

@contextlib.contextmanager
def demo_endpoint():
    """Serve the endpoint of --demo on a loopback port inside the with block; yield its base URL."""
    import threading
    from http.server import BaseHTTPRequestHandler
    from socketserver import TCPServer, ThreadingMixIn

    demo = DemoServer()
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: a connection for each request
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length).decode() or "{}")
            status, documents = demo.answer(self.command, self.path, body)
            streamed = body.get("stream")
            self.send_response(status)
            self.send_header("Content-Type",
                             "text/event-stream" if streamed else "application/json")
            self.end_headers()
            if "messages" in body:
                ended.wait(DEMO_FIRST_TOKEN_SECONDS)
            if not streamed:
                self.wfile.write(json.dumps(documents[0]).encode())
                return
            for document in documents:
                self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
                ended.wait(DEMO_TOKEN_SECONDS)
            self.wfile.write(b"data: [DONE]\n\n")

        do_POST = do_DELETE = do_GET

        def log_message(self, *args):
            pass

    class Server(ThreadingMixIn, TCPServer):
        daemon_threads = True
        request_queue_size = 1024  # for bench

        def handle_error(self, *args):
            pass  # a client that went away

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/practice/v1"
        finally:
            ended.set()
            server.shutdown()
# -- Chat -------------------------------------------------------------------------------------

MAX_COPY_BYTES = 74000  # in base64 about 100,000, what terminals take
MAX_CANONICAL_BYTES = 4095  # of a line; the terminal drops the rest (termios(3), canonical mode)
MODELS_SECONDS = 1
MAX_LISTED_CONVERSATIONS = 10
PASTE_MARKS_ON, PASTE_MARKS_OFF = "\x1b[?2004h", "\x1b[?2004l"
CONTEXT_FULL = re.compile(r"context|too (long|many tokens)", re.IGNORECASE)

# name -> (type, lowest, highest) of what /set takes; the ranges are those of the options
SETTABLE = {
    "max_tokens": (int, 1, MAX_NUMBER),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "seed": (int, -MAX_NUMBER, MAX_NUMBER),
}

ChatCommand = namedtuple("ChatCommand", "name argument method summary")

CHAT_COMMANDS = (  # an argument in brackets may be left out
    ChatCommand("/help", "", "do_help", "show this"),
    ChatCommand("/clear", "", "do_clear", "begin anew, keep the system message"),
    ChatCommand("/system", "[TEXT]", "do_system", "set the system message; - removes it"),
    ChatCommand("/save", "[FILE]", "do_save", "save the conversation as JSON"),
    ChatCommand("/load", "[FILE]", "do_load", "take up a saved one; alone: list the last"),
    ChatCommand("/show", "[N]", "do_show", "show the last N turns (1)"),
    ChatCommand("/tokens", "", "do_tokens", "show the session's token totals"),
    ChatCommand("/retry", "", "do_retry", "ask the last question again"),
    ChatCommand("/undo", "[N]", "do_undo", "take back the last N turns (1)"),
    ChatCommand("/drop", "[N]", "do_drop", "forget the oldest N turns (1)"),
    ChatCommand("/edit", "[TEXT]", "do_edit", "write the message in $VISUAL or $EDITOR"),
    ChatCommand("/attach", "[FILE]", "do_attach", "send a file with the next message"),
    ChatCommand("/copy", "[code]", "do_copy", "copy the last answer, or its last code"),
    ChatCommand("/model", "[NAME]", "do_model", "ask for this model; - asks for none"),
    ChatCommand("/endpoint", "[SLUG]", "do_endpoint", "ask this endpoint"),
    ChatCommand("/context", "[NAME]", "do_context", "ask this deployment"),
    ChatCommand("/set", "[NAME VALUE]", "do_set", "set a sampling option; - unsets it"),
    ChatCommand("/quit", "", "do_quit", "end the session, show its token totals"),
)
CHAT_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/?": "/help"}

CHAT_KEYS = """\
  Up, Down        recall earlier inputs
  Tab             complete commands, file names, models, deployments
  Ctrl+A, Ctrl+E  to the start, to the end of the line
  Ctrl+U, Ctrl+K  delete to the start, to the end of the line
  Ctrl+W          delete the word before the cursor
  Ctrl+C          clear the line; stop a reply and keep what came of it
  Ctrl+Z          to the shell; fg comes back
  Ctrl+D          end the session
  \\ at the end    continue on the next line; a pasted block is one message
  space in front  send a line that looks like a command; not kept on disk"""

# Typing

class TypeAhead:
    """The terminal during a chat: keys typed during a reply wait, unseen and whole, for the prompt.

    With readline the terminal stays out of canonical mode, where a line has at most 4,095 bytes,
    and marks pastes.  Without readline only the echo is off during a reply.  As a context manager
    it leaves the terminal as it was, also for Ctrl+Z and Ctrl+\\.
    """

    def __init__(self, console, has_readline, marks_pastes):
        self._console = console
        self._has_readline = has_readline
        self._marks_pastes = marks_pastes
        self._before = None  # terminal attributes at the start
        self._held = None  # how keys are held: "prompt", "reply", or None

    def __enter__(self):
        with contextlib.suppress(ImportError, OSError, ValueError):
            import termios
            with contextlib.suppress(termios.error):
                self._before = termios.tcgetattr(sys.stdin)
        if self._before:
            self._console.waiter.before_stop = self._restore
            self._console.waiter.after_stop = self._hold_again
            if signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL:
                signal.signal(signal.SIGQUIT, self._quit)
        return self

    def __exit__(self, *exception):
        self.release()
        self._console.waiter.before_stop = self._console.waiter.after_stop = None
        if self._before and signal.getsignal(signal.SIGQUIT) == self._quit:
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)

    def hold(self, occasion):
        """Keep keys for the next prompt; *occasion* is "prompt", just before it, or "reply"."""
        self._held = occasion
        if not self._before or not self._console.err.in_foreground():
            return
        import termios

        mode = self._copy_mode()
        if occasion == "reply":  # readline echoes only where the terminal did
            mode[3] &= ~termios.ECHO
        if self._has_readline:  # the same that readline sets
            mode[0] &= ~(termios.ICRNL | termios.INLCR)
            mode[3] &= ~(termios.ICANON | termios.IEXTEN)
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        self._set(mode)
        if self._marks_pastes and occasion == "reply":  # at the prompt readline does it
            self._console.out.draw(PASTE_MARKS_ON)

    def release(self):
        """Leave the terminal as it was before the chat, for another program or plain input."""
        self._held = None
        self._restore()

    def _restore(self):
        if self._before and self._console.err.in_foreground():
            self._set(self._before)
            if self._marks_pastes:
                self._console.out.draw(PASTE_MARKS_OFF)

    def _hold_again(self):
        if self._held:
            self.hold(self._held)

    def _copy_mode(self):
        mode = list(self._before)
        mode[6] = list(mode[6])
        return mode

    def _set(self, mode):
        import termios

        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, mode)

    def _quit(self, number, frame):
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

class LineEditor:
    """Reads lines typed at a terminal: with readline, and its history, where this Python has it.

    *complete* is called with the line up to the cursor and returns the lines it may become.
    """

    def __init__(self, console, history_path, complete):
        self._console = console
        self._history_path = history_path  # None: inputs are not kept
        self._complete = complete
        self._candidates = []
        self._inserted = ""  # put on the next line before anything is typed
        self._last_entry = None
        self._told_lock = False
        self._before, self._after = "", ""
        self.abandoned = ""  # what stood on the line when Ctrl+C ended it
        self.marks_pastes = False
        self.readline = None
        if console.out.is_terminal:
            self._set_up_readline()
        # Without readline the cursor stays behind the prompt when the input ends.
        self.ends_line = self.readline is not None and not console.out.dumb
        if self.readline and history_path:
            for entry in read_history(history_path):
                self._recall(entry)

    def _set_up_readline(self):
        try:
            import readline
            readline.set_auto_history(False)
        except (ImportError, AttributeError):  # PyPy's is another one
            return
        self.readline = readline
        readline.set_completer_delims(" ")
        readline.set_completer(self._next_candidate)
        readline.set_startup_hook(self._insert)
        backend = getattr(readline, "backend", readline.__doc__ or "")  # an attribute since 3.13
        if "editline" in backend or "libedit" in backend:
            readline.parse_and_bind("bind ^I rl_complete")
            return
        readline.parse_and_bind("tab: complete")
        if not self._console.out.dumb:
            readline.parse_and_bind("set enable-bracketed-paste on")
            self.marks_pastes = True
        if self._console.out.styled:  # \1 and \2 enclose what has no width
            self._before, self._after = "\1" + BOLD + "\2", "\1" + RESET + "\2"

    def read(self, prompt):
        """Return the next line, without its end; raise EOFError at the end of the input."""
        self.abandoned = ""
        if not self.readline:
            return self._read_plain(prompt)
        while True:
            try:
                line = self._console.waiter.prompt(input, self._before + prompt + self._after)
                return utf8_argument(line)
            except Suspended:
                self._inserted = self.readline.get_line_buffer()
                self._console.print_line("")
                self._console.waiter.suspend()
            except KeyboardInterrupt:
                self.abandoned = self.readline.get_line_buffer()
                raise
            except UnicodeDecodeError:
                raise UnusableInputError(
                    "what was typed is not text in the terminal's encoding") from None

    def _read_plain(self, prompt):
        line = utf8_argument(self._console.read_line(prompt))
        if len(line.encode("utf-8", "replace")) >= MAX_CANONICAL_BYTES:
            raise UnusableInputError(f"the terminal cut the line at {MAX_CANONICAL_BYTES:,} bytes: "
                                     "nothing was sent: /edit and /attach take more")
        return line

    def remember(self, entry):
        """Put *entry* into the history of this session and, unless led by a blank, on disk."""
        if entry == self._last_entry:
            return
        self._recall(entry)
        if not self._history_path or entry[:1].isspace():
            return
        try:
            if not append_history(self._history_path, entry) and not self._told_lock:
                self._told_lock = True
                self._console.note("another process holds the lock of the history: "
                                   "it is written without")
        except UsageError as error:
            self._console.note(f"no history: {error}")
            self._history_path = None

    def _recall(self, entry):
        self._last_entry = entry
        if self.readline:  # takes no NUL, and bytes of any encoding as surrogates
            data = entry.replace("\0", "").encode(self._encoding(), "replace")
            self.readline.add_history(data.decode("ascii", "surrogateescape"))

    def _encoding(self):
        from codecs import lookup

        encoding = lookup(getattr(sys.stdin, "encoding", None) or "utf-8").name
        if encoding == "ascii":  # of the C locale before Python 3.7
            return "utf-8"
        return encoding

    def _insert(self):
        text, self._inserted = self._inserted, ""
        if text:
            self.readline.insert_text(text)

    def _next_candidate(self, text, state):
        if state == 0:
            with self._console.waiter.without_raising():
                self._candidates = self._find_candidates(text)
        if state < len(self._candidates):
            return self._candidates[state]
        return None

    def _find_candidates(self, text):
        """Return what the word *text* before the cursor may become; a tab elsewhere is a tab."""
        data = os.fsencode(self.readline.get_line_buffer())[:self.readline.get_endidx()]
        line = data.decode("utf-8", "replace")
        if not line.startswith("/"):
            return [text + "\t"]
        start = line.rfind(" ") + 1
        return [os.fsdecode(whole[start:].encode("utf-8", "surrogateescape"))
                for whole in self._complete(line)]

def folder_names(folder):
    """Return the names in *folder*, which may begin with ~, with a slash after those of folders."""
    path = os.path.expanduser(folder) or "."
    names = []
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            if os.path.isdir(os.path.join(path, name)):
                name += "/"
            names.append(name)
    return names

def find_command(name):
    """Return the ChatCommand that *name* stands for, in any case, or None."""
    name = name.lower()
    name = CHAT_ALIASES.get(name, name)
    for command in CHAT_COMMANDS:
        if command.name == name:
            return command
    return None

def complete_line(line, find_names):
    """Return the lines that *line* may become: commands, and what some of them take.

    *find_names* is called with the name of a command and returns what may follow it.
    """
    name, space, start = line.partition(" ")
    if not line.startswith("/"):
        return []
    if not space:
        lines = []
        for command in CHAT_COMMANDS:
            if command.name.startswith(name.lower()):
                lines.append(command.name + (" " if command.argument else ""))
        return lines
    command = find_command(name)
    if command is None:
        return []
    if command.argument == "[FILE]":
        folder = start[:start.rfind("/") + 1]
        names = [folder + found for found in sorted(folder_names(folder))
                 if not found.startswith(".") or start[len(folder):].startswith(".")]
    else:
        names = find_names(command.name)
    return [f"{name} {found}" for found in names if found.startswith(start)]

def as_typed(text):
    """Return the line that sends *text*, also where it looks like a command."""
    if text.startswith("/"):
        return " " + text
    return text

def parse_count(argument):
    """Return the number that a command's *argument* is, 1 where it is empty."""
    if not argument:
        return 1
    if not re.match(r"[1-9]\d{0,8}\Z", argument):
        raise UsageError(f"not a number of turns: {argument}")
    return int(argument)

def parse_setting(name, value):
    """Return the value of the sampling option *name* that the text *value* is."""
    convert, low, high = SETTABLE[name]
    what = "a whole number" if convert is int else "a number"
    try:
        number = convert(value)
    except ValueError:
        raise UsageError(f"{name} must be {what}, not {value!r}") from None
    if not low <= number <= high:
        raise UsageError(f"{name} must be {what} from {low} to {high}, not {value}")
    return number

def list_code_blocks(text):
    """Return the contents of the fenced code blocks in *text*."""
    blocks = []
    while text:
        block = extract_code_block(text)
        if block is None:
            break
        blocks.append(block)
        text = text[text.index(block) + len(block):].partition("\n")[2]
    return blocks

def clipboard_sequence(data, environ):
    """Return the escape sequence that puts the bytes *data* into a terminal's clipboard (OSC 52).

    tmux passes it on in either of two ways, as it is set up: in a wrapping of its own, or plain.
    """
    from base64 import b64encode

    sequence = "\x1b]52;c;" + b64encode(data).decode("ascii") + "\x07"
    if environ.get("TMUX") or environ.get("TERM", "").startswith("tmux"):
        escaped = sequence.replace("\x1b", "\x1b\x1b")
        return f"{sequence}\x1bPtmux;{escaped}\x1b\\"
    return sequence

# The chat

class Chat:
    """One interactive session: a conversation, where it is kept, and what every command changes."""

    def __init__(self, options, sampling, settings, console, conversation, store):
        self.sampling = sampling
        self.settings = settings
        self.console = console
        self.conversation = conversation
        self.store = store
        self.typed = console.stdin_is_terminal()
        self.model = sampling.model  # asked for, else the last that answered
        self.totals = Totals(0, 0, True)
        self.attachments = []  # go with the next message
        self.status = EXIT_OK  # of the first failure
        self.resolve = None  # (settings, context, endpoint) -> Settings
        self._plain = options.plain
        self._show_usage = options.show_usage
        self._show_reasoning = options.show_reasoning
        self._last_prompt = None  # tokens
        self._saved = None  # (path, text) of /save or /load
        self._listed = []  # paths that /load listed
        self._models = None
        self._ended = False
        self.editor = None
        if self.typed:
            history = state_path("history") if store.uses_state else None
            self.editor = LineEditor(console, history, self._complete)
        self._type_ahead = TypeAhead(
            console, self.editor is not None and self.editor.readline is not None,
            self.editor is not None and self.editor.marks_pastes)

    # The loop

    def run(self, question=None):
        """Take inputs until their end, the message *question* first; return the exit status.

        A failure does not end the chat, but a failed command ends one that is piped.
        """
        with contextlib.ExitStack() as stack:
            if self.typed:
                stack.enter_context(self._type_ahead)
            while not self._ended:
                try:
                    self._take_input(question)
                except KeyboardInterrupt:  # one more, while the last one was dealt with
                    if not self.typed:
                        raise
                question = None
            if not self.console.quiet:
                self._say_how_to_continue()
                self._print(self._totals_line())
        if self.typed:
            return EXIT_OK
        return self.status

    def _take_input(self, question):
        """Ask the message *question*, or else do what the next input asks for."""
        line = None
        try:
            if question:
                self._ask(question, self.conversation.messages)
                return
            line = self._read_input()
            if line is None:
                self._ended = True
            else:
                self._do_line(line)
        except KeyboardInterrupt:
            if not self.typed:
                raise
            if line is None and not self.editor.abandoned:
                self._print("\nCtrl+D or /quit ends the session")
        except OutputError:
            raise
        except XeroctlError as error:
            self._fail(error)
            if line is not None and not self.typed:
                self._ended = True

    def _read_input(self):
        """Return what the person types next, or the next line of a pipe; None at the end."""
        if not self.typed:
            try:
                return decode_prompt(self.console.read_piped_line(), "standard input")
            except EOFError:
                return None
        if not self.console.quiet:
            self.console.print_line(self._bar(), dim=True)
        if self.editor.readline:
            self._type_ahead.hold("prompt")
        else:
            self._type_ahead.release()
        try:
            return self._read_typed()
        except Terminated:
            self._print("")
            raise

    def _read_typed(self):
        try:
            line = self.editor.read("> ")
        except EOFError:
            if not self.console.stdin_is_terminal():  # it was closed
                raise Terminated(getattr(signal, "SIGHUP", signal.SIGTERM)) from None
            if not self.editor.ends_line:
                self._print("")
            return None
        while line.endswith("\\"):
            try:
                line = line[:-1] + "\n" + self.editor.read(". ")
            except EOFError:
                if not self.editor.ends_line:
                    self._print("")
                return line[:-1]
            except BaseException:
                self.editor.remember(line)
                raise
        return line

    def _do_line(self, line):
        """Do a slash command, or send a message."""
        if not line.strip():
            return
        if self.editor:
            self.editor.remember(line)
        if not line.startswith("/"):
            text = line[1:] if line.startswith(" /") else line
            self._ask_text(text.rstrip())
            return
        name, *argument = line.split(None, 1)
        argument = "".join(argument).strip()
        command = find_command(name)
        if command is None:
            raise UsageError(self._unknown_command(name))
        if argument and not command.argument:
            raise UsageError(f"{command.name} takes no argument")
        if command.argument == "[FILE]" and argument[:1] in ("'", '"'):
            argument = argument[1:].rstrip(argument[0]) if argument[-1] == argument[0] else argument
        getattr(self, command.method)(argument)

    def _unknown_command(self, name):
        from difflib import get_close_matches

        names = [command.name for command in CHAT_COMMANDS]
        near = get_close_matches(name.lower(), names, 1)
        meant = f": did you mean {near[0]}?" if near else ": /help lists them."
        return f"no command {name}{meant} A space in front sends the line as a message"

    def _fail(self, error):
        self.console.print_error(error)
        self.status = self.status or error.exit_status

    def _print(self, text):
        """Show the lines of *text* to the person, not on stdout."""
        for line in text.split("\n"):
            self.console.print_line(line)

    def _bar(self):
        columns = self.console.err.width()
        return status_bar(self.settings.endpoint, self.model, self.totals,
                          self.conversation.count, columns)

    def _totals_line(self):
        mark = "" if self.totals.exact else "~"
        return (f"tokens: {mark}{self.totals.prompt} prompt, {mark}{self.totals.completion} "
                f"completion; messages: {self.conversation.count}")

    def _say_how_to_continue(self):
        if not self.typed or not self.store.saved:
            return
        command = "xeroctl chat --continue"
        if self.store.named:
            command = f"xeroctl chat -i --conversation {shown_path(self.store.path)}"
        self.console.print_line(f"to continue: {command}", dim=True)

    # Asking

    def _ask_text(self, text):
        """Ask *text*, together with the files that wait."""
        question = build_question(text, self.attachments)
        self.attachments = []
        self._ask(question, self.conversation.messages)

    def _ask(self, question, before):
        """Ask the message *question* after the messages *before*, and keep what comes of it.

        With an answer, or a part of one, it is the newest turn.  Without, it stays unanswered; but
        a question that has an answer already keeps that.
        """
        conversation = self.conversation
        replaces = len(before) < len(conversation.messages)
        if not replaces:
            conversation.unanswered = question
        reply = Reply(token_limit(self.sampling))
        keeps_part = not replaces
        try:
            self._show_answer(before + [question], reply)
            keeps_part = True
        except KeyboardInterrupt:
            if not self.typed:
                raise
            keeps_part = True
            if not reply.text.strip():
                self._say_stopped(replaces)
        except OutputError:
            raise
        except XeroctlError as error:
            self._fail(error)
            if error.exit_status == EXIT_REFUSED and CONTEXT_FULL.search(str(error)):
                self.console.note("/drop forgets the oldest turns: then /retry")
        finally:
            if keeps_part and reply.text.strip():
                conversation.messages = list(before)
                conversation.add_turn(question, reply.text)
            self._count(reply)
            self._save()
        if self.typed:
            self._print("")

    def _show_answer(self, messages, reply):
        if self.typed:
            self._type_ahead.hold("reply")
        request = build_chat_request(self.sampling, self.settings, messages, True)
        view = build_view(self.console, True, self._plain, self._show_reasoning)
        show_answer(request, self.settings, self.console, view, reply)
        report_reply(reply, reply.seconds, True, self._show_usage, self.console)

    def _say_stopped(self, replaces):
        kept = "/retry asks again"
        if replaces:
            kept = "the old answer stays"
        self._print(f"stopped: {kept}")

    def _count(self, reply):
        usage = reply.usage
        completion = reply.deltas
        is_exact = not reply.started
        if usage.completion is not None:
            completion, is_exact = usage.completion, True
        self.totals = Totals(self.totals.prompt + (usage.prompt or 0),
                             self.totals.completion + completion, self.totals.exact and is_exact)
        self.model = self.sampling.model or reply.model or self.model
        self._last_prompt = usage.prompt or self._last_prompt

    def _save(self):
        self.store.save(self.conversation, self.settings.endpoint, self.model)

    def _begin_new(self):
        self.store.begin_new(self.conversation, self.settings.endpoint, self.model)
        self._saved = None

    # Commands

    def do_help(self, argument):
        """Show the commands and the keys."""
        for command in CHAT_COMMANDS:
            usage = f"{command.name} {command.argument}"
            self._print(f"  {usage:<19} {command.summary}")
        self._print("\n" + CHAT_KEYS)

    def do_clear(self, argument):
        """End this conversation and begin one with the same system message."""
        self._begin_new()
        self.conversation.clear()

    def do_system(self, argument):
        """Set, remove or show the system message."""
        if argument:
            self.conversation.set_system(None if argument == "-" else argument)
            self._save()
        self._print("system: " + (self.conversation.system or "none"))

    def do_save(self, argument):
        """Save the conversation, but over another file only if that is a conversation."""
        if argument:
            path = native_path(argument)
        elif self._saved:
            path = self._saved[0]
        else:
            raise UsageError("a file name is needed")
        if os.path.lexists(path) and not self._may_replace(path):
            return
        text = build_document(self.conversation, self.settings.endpoint, self.model,
                              utc_stamp(time.time()))
        write_private(path, text)
        self._saved = path, text
        self._print(f"saved {plural(self.conversation.count, 'message')} to {utf8_argument(path)}")

    def _may_replace(self, path):
        """Return whether the file *path* may be written over; raise UsageError where it never is."""
        shown = utf8_argument(path)
        document = None
        with contextlib.suppress(ValueError):
            if os.path.isfile(path):
                text = read_file(path, MAX_CONVERSATION_BYTES).decode("utf-8")
                if self._saved == (path, text):
                    return True
                document = parse_json(text)
        if get_field(document, "format", str) != CONVERSATION_FORMAT:
            raise UsageError(f"{shown} is there, and no saved conversation: choose another name")
        if not self.typed:
            raise UsageError(f"{shown} holds another conversation: choose another name")
        question = f"{shown} holds another conversation. Write over it? [y/N] "
        try:
            return self.editor.read(question).strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def do_load(self, argument):
        """Replace the conversation by that of a file, once that is found good."""
        if not argument:
            self._list_conversations()
            return
        path = None
        if re.match(r"\d{1,2}\Z", argument):
            self._listed = self._listed or self._other_conversations()
            if not 1 <= int(argument) <= len(self._listed):
                raise UsageError(f"no conversation {argument}: /load alone lists them")
            path = self._listed[int(argument) - 1]
        (conversation, _, _, notes), text = read_conversation(path or native_path(argument))
        self._begin_new()
        self.conversation = conversation
        if path is None:
            path = native_path(argument)
            self._saved = path, text
        self._print(f"loaded {plural(conversation.count, 'message')} from {utf8_argument(path)}")
        self.console.note(*notes)
        if conversation.unanswered and self.typed:
            self.editor.remember(as_typed(content_text(conversation.unanswered)))
            self._print("its last question has no answer: /retry asks it")
        elif conversation.unanswered:
            self._ask(conversation.unanswered, conversation.messages)

    def _other_conversations(self):
        paths = [path for path in list_conversations() if path != self.store.path]
        return paths[:MAX_LISTED_CONVERSATIONS]

    def _list_conversations(self):
        self._listed = self._other_conversations()
        if not self._listed:
            raise UsageError("a file name is needed: no conversation is kept yet")
        width = self.console.err.width() - 1
        for number, path in enumerate(self._listed, 1):
            date = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.stat(path).st_mtime))
            try:
                conversation, endpoint = read_conversation(path)[0][:2]
                text = ""
                for turn in conversation.turns()[:1]:
                    text = content_text(turn[0])
                what = f"{endpoint}  {plural(conversation.count, 'message')}  {text}"
            except UsageError:
                what = "not readable"
            self._print(truncate(one_line(f"{number:2}  {date}  {what}"), width))

    def do_show(self, argument):
        """Show the last turns."""
        turns = self.conversation.turns()
        if not turns:
            raise UsageError("nothing to show yet")
        for turn in turns[-parse_count(argument):]:
            for message in turn:
                mark = "> " if message["role"] == "user" else ""
                if message["role"] not in ("user", "assistant"):
                    mark = message["role"] + ": "
                self._print(mark + message_text(message).rstrip("\n"))
            self._print("")

    def do_tokens(self, argument):
        """Show the size of the last prompt and the session's totals."""
        if self._last_prompt is not None:
            self._print(f"last prompt: {plural(self._last_prompt, 'token')}")
        self._print(self._totals_line())

    def do_retry(self, argument):
        """Ask the last question again; its answer stays until a new one, or a part of it, comes."""
        question, before = self.conversation.last_question()
        if question is None:
            raise UsageError("nothing to ask again yet")
        self._ask(question, list(before))

    def do_undo(self, argument):
        """Take the last turns back."""
        count = parse_count(argument)
        if not self.conversation.turns():
            raise UsageError("nothing to take back")
        for _ in range(min(count, len(self.conversation.turns()))):
            text = one_line(content_text(self.conversation.undo()))
            self._print("took back: " + truncate(text, 60))
        self._save()

    def do_drop(self, argument):
        """Forget the oldest turns."""
        dropped = self.conversation.drop(parse_count(argument))
        if not dropped:
            raise UsageError("nothing to drop")
        self._print(f"dropped {plural(dropped, 'turn')}; messages: {self.conversation.count}")
        self._save()

    def do_attach(self, argument):
        """Keep a file for the next message, or list those that wait."""
        if argument:
            attachment = read_attachment(native_path(argument))
            if attachment.note:
                self.console.note(attachment.note)
            build_question("", self.attachments + [attachment])  # not too large together
            self.attachments.append(attachment)
        if not self.attachments:
            self._print("no file waits for the next message")
        for attachment in self.attachments:
            self._print(f"with the next message: {attachment.name}, "
                        + plural(attachment.size, "byte"))

    def do_copy(self, argument):
        """Have the person's own terminal put the last answer into its clipboard (OSC 52)."""
        text = self.conversation.last_answer()
        if argument not in ("", "code"):
            raise UsageError("/copy takes nothing, or: code")
        if text is None:
            raise UsageError("nothing to copy yet")
        if argument:
            blocks = list_code_blocks(text)
            if not blocks:
                raise UsageError("there is no code block in the last answer")
            text = blocks[-1]
        data = text.encode("utf-8")
        if len(data) > MAX_COPY_BYTES:
            raise UsageError(f"too much for a terminal's clipboard: {len(data):,} bytes, "
                             f"{MAX_COPY_BYTES:,} at most")
        output = self.console.out if self.console.out.is_terminal else self.console.err
        if output.dumb:
            raise UsageError("/copy needs a terminal")
        output.write(clipboard_sequence(data, os.environ))
        self._print(f"copied {plural(len(text), 'character')}")

    def do_model(self, argument):
        """Set or show the model that is asked for."""
        if argument:
            self.model = None if argument == "-" else one_line(argument)
            self.sampling = self.sampling._replace(model=self.model)
        self._print("model: " + (self.sampling.model or "none asked for"))

    def do_endpoint(self, argument):
        """Set or show the endpoint."""
        if argument:
            self._change_settings(None, argument)
        self._print(f"endpoint: {self.settings.endpoint}")

    def do_context(self, argument):
        """Ask another deployment from here on, or show where questions go."""
        if argument:
            self._change_settings(argument, None)
        self._print(f"endpoint: {self.settings.endpoint} at {self.settings.base_url}")

    def _change_settings(self, context, endpoint):
        self.settings = self.resolve(self.settings, context, endpoint)
        self.model = self.sampling.model
        self._models = None
        self.console.note(*self.settings.notes)

    def do_set(self, argument):
        """Set, unset or show sampling options, and whether reasoning is shown."""
        name, *value = argument.split(None, 1)[:2] if argument else ("",)
        name = name.lstrip("-").replace("-", "_").lower()
        if not name:
            self._show_sampling()
            return
        if name != "reasoning" and name not in SETTABLE and name not in self.sampling.fields:
            names = ", ".join(list(SETTABLE) + ["reasoning"])
            raise UsageError(f"no option {name}: /set takes {names}")
        if not value:
            raise UsageError(f"a value is needed: /set {name} VALUE, or - to unset it")
        if name == "reasoning":
            if value[0].lower() not in ("on", "off", "-"):
                raise UsageError("reasoning is on or off")
            self._show_reasoning = value[0].lower() == "on"
        else:
            self._set_field(name, value[0])
        self._show_sampling(name)

    def _set_field(self, name, value):
        fields = dict(self.sampling.fields)
        if value == "-":
            fields.pop(name, None)
        elif name in SETTABLE:
            fields[name] = parse_setting(name, value)
        else:
            fields[name] = value
            with contextlib.suppress(ValueError):
                fields[name] = parse_json(value)
        self.sampling = self.sampling._replace(fields=fields)

    def _show_sampling(self, only=None):
        fields = self.sampling.fields
        for name in list(SETTABLE) + sorted(set(fields) - set(SETTABLE)) + ["reasoning"]:
            value = json_text(fields[name]) if name in fields else "-"
            if name == "reasoning":
                value = "on" if self._show_reasoning else "off"
            if only in (None, name):
                self._print(f"{name}: {value}")

    def do_edit(self, argument):
        """Send what an editor saves, beginning with a text, or with the last question."""
        if not self.typed:
            raise UsageError("/edit needs a terminal")
        question, before = self.conversation.last_question()
        if not argument and question is not None:
            argument = content_text(question)
        self._type_ahead.release()
        text = self._edit_text(argument)
        self.editor.remember(as_typed(text))
        self._ask_text(text)

    def _edit_text(self, text):
        """Return what $VISUAL or $EDITOR saves of a private file that begins with *text*.

        Raise UsageError where nothing is saved, or where the editor fails: the file stays then.
        """
        from shutil import rmtree
        from tempfile import mkdtemp

        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if not editor:
            editor = "vi" if os.name == "posix" else "notepad"
        try:
            folder = mkdtemp(prefix="xeroctl-")  # mode 0700
        except OSError as error:
            raise UsageError(f"no temporary folder for the message: {os_reason(error)}") from error
        path = os.path.join(folder, "message.txt")
        write_private(path, text)
        os.utime(path, (0, 0))  # any save is later
        try:
            status = self._run_editor(editor, path)
        except (OSError, ValueError) as error:
            rmtree(folder)
            raise UsageError(f"cannot run {editor}: {error}: set VISUAL or EDITOR") from error
        except Terminated:
            self._print(f"xeroctl: what {editor} saved is in {path}")
            raise
        is_saved = os.path.isfile(path) and os.stat(path).st_mtime > 0
        edited = decode_prompt(read_file(path), path) if is_saved else ""
        if edited.strip() and not status:
            rmtree(folder)
            return edited
        if edited.strip():
            raise UsageError(f"{editor} failed: nothing was sent: what it saved is in {path}")
        rmtree(folder)
        raise UsageError(f"nothing was sent: {editor} failed, or saved nothing")

    def _run_editor(self, editor, path):
        import subprocess
        from shlex import split

        process = subprocess.Popen(split(editor) + [path])
        while True:  # Ctrl+C is the editor's
            with contextlib.suppress(KeyboardInterrupt):
                self.console.waiter.run_in_thread(process.wait, None)
                return process.returncode

    def do_quit(self, argument):
        """End the session."""
        self._ended = True

    # Completion

    def _complete(self, line):
        return complete_line(line, self._find_names)

    def _find_names(self, name):
        """Return what may follow the command *name*; models are asked for once."""
        if name == "/set":
            return [option + " " for option in list(SETTABLE) + ["reasoning"]]
        if name == "/copy":
            return ["code"]
        if name == "/context":
            with contextlib.suppress(XeroctlError):
                return sorted(read_config().deployments)
        if name == "/model":
            if self._models is None:
                self._models = self._fetch_models()
            return self._models
        return []

    def _fetch_models(self):
        quick = self.settings._replace(timeout=MODELS_SECONDS, connect_timeout=MODELS_SECONDS)

        def fetch():
            with contextlib.suppress(XeroctlError):
                url = endpoint_url(quick.base_url, quick.endpoint, "/models")
                request = build_request("GET", url, quick)
                return receive_json(request, quick, Waiter(), ConnectLog(len))
            return None

        models = []
        with contextlib.suppress(XeroctlError, OSError):  # too late, or no list
            document = Waiter().run_in_thread(fetch, MODELS_SECONDS)
            for model in list_items(document, "models"):
                models.append(get_field(model, "id", str) or "")
        return sorted(filter(None, models))

def system_prompt(options):
    """Return the text of --from-file, else of --system, else None."""
    if not options.from_file:
        return options.system
    try:
        return decode_prompt(read_file(options.from_file), options.from_file)
    except UnusableInputError as error:
        raise UsageError(str(error)) from error

def open_conversation(options, console, interactive):
    """Return (Conversation, ConversationStore) for the options of chat.

    With --conversation or --continue its endpoint and model go into *options*, unless others are
    given.  Raise UsageError where there is no such conversation.
    """
    conversation, endpoint, model, notes = Conversation(), None, None, []
    path = text = None
    keeps_history = not (options.no_history or os.environ.get(ENV_NO_HISTORY, "") not in ("", "0"))
    if options.conversation:
        path = options.conversation
        if os.path.lexists(path):
            (conversation, endpoint, model, notes), text = read_conversation(path)
        elif not os.path.isdir(os.path.dirname(path) or "."):
            raise UsageError(f"cannot make {utf8_argument(path)}: its folder is missing")
    elif options.continue_last:
        newest = list_conversations()[:1]
        if not newest:
            folder = shown_path(state_path("conversations"))
            raise UsageError(f"there is no conversation to continue in {folder}")
        (conversation, endpoint, model, notes), text = read_conversation(newest[0])
        if keeps_history:
            path = claim_conversation(newest[0])
        if path is None:
            text = None
        if keeps_history and path is None:
            notes = notes + ["another chat still uses this conversation: a copy is continued"]
    console.note(*notes)
    if endpoint and options.endpoint in (None, endpoint) and not options.demo:
        options.endpoint = endpoint
        options.model = options.model or model
    prompt = system_prompt(options)
    if prompt is not None:
        conversation.set_system(prompt)
    is_typed = interactive and console.stdin_is_terminal()  # what is piped is a script's
    uses_state = keeps_history and (options.continue_last or is_typed)
    return conversation, ConversationStore(console, path, text, uses_state)

def run_interactive(options, settings, console, resolve, question, conversation, store):
    """Hold a conversation until its end; return the exit status."""
    console.json = False  # the config file may ask for it
    params = [name for name, _ in options.param]
    if options.max_tokens is None and "max_completion_tokens" not in params:  # the newer name
        options.max_tokens = DEFAULT_INTERACTIVE_MAX_TOKENS
    chat = Chat(options, build_sampling(options), settings, console, conversation, store)
    chat.resolve = resolve
    if chat.typed and not console.quiet:
        greeting = "/help lists the commands, Ctrl+D ends the session"
        console.print_line(truncate(greeting, console.err.width()), dim=True)
        if conversation.count:
            chat.do_show("")
    if question is None:
        for path in options.attach:
            chat.do_attach(path)
    return chat.run(question)

# -- Commands ---------------------------------------------------------------------------------

@contextlib.contextmanager
def _demo_settings(options):
    if options.base_url or options.context:
        raise UsageError("--demo brings its own endpoint: give no --base-url or --context with it")
    no_config = Config("", None, {}, [])
    options.endpoint = options.endpoint or DEMO_ENDPOINT
    with demo_endpoint() as base_url:
        options.base_url = base_url
        settings = resolve_settings(options, {}, no_config, None)
        settings.sources["base_url"] = "--demo"
        yield settings

def _user_settings(options, console, endpoint_needed):
    if options.api_key == "-":
        raise UsageError("--api-key - is for config add and config set alone")
    config = read_config()
    environ = environment()
    settings = resolve_settings(options, environ, config, lambda deployment: "-")
    endpoint = settings.endpoint
    if is_whole_address(settings.base_url):  # a slug would only name the model there
        endpoint = endpoint or getattr(options, "model", None)
        if options.command in ("models", "completions"):
            endpoint_needed = False
    if endpoint_needed and not endpoint:
        console.json = settings.output == "json"
        raise UsageError(f"no endpoint: give --endpoint SLUG, or set {ENV_ENDPOINT}, "
                         "or try without one: --demo")
    if not options.dry_run:  # only now a program may be run for the key
        read_key = functools.partial(fetch_key, waiter=console.waiter)
        settings = resolve_settings(options, environ, config, read_key)
    return settings._replace(endpoint=endpoint)

@contextlib.contextmanager
def open_settings(options, console, endpoint_needed=True):
    """Yield the Settings for *options*; the console learns its form, its secrets and the notes.

    Raise UsageError where an endpoint is needed and nothing names one.
    """
    with contextlib.ExitStack() as stack:
        if options.demo:
            settings = stack.enter_context(_demo_settings(options))
        else:
            settings = _user_settings(options, console, endpoint_needed)
        console.json = settings.output == "json"
        console.secrets = secret_texts(settings)
        console.note(*settings.notes)
        yield settings

def change_settings(options, console, first_url, settings, context, endpoint):
    """Return *settings* with another endpoint, or those of the deployment *context*.

    A key and headers of the command line go only to the origin of the chat's *first_url*.  Raise
    UsageError where the context or the endpoint is no good.
    """
    if context is None:
        check_endpoint(endpoint, settings.base_url, "the endpoint")
        return settings._replace(endpoint=endpoint, notes=[])
    if options.demo:
        raise UsageError("--demo has no contexts")
    config = read_config()
    changed = argparse.Namespace(**vars(options))
    changed.context = context
    changed.endpoint = endpoint
    changed.base_url = None
    deployment = find_deployment(config, context)
    if not same_origin(deployment.get("base_url"), first_url):
        changed.api_key = None
        changed.header = []
    read_key = functools.partial(fetch_key, waiter=console.waiter)
    found = resolve_settings(changed, environment(), config, read_key)
    console.secrets = console.secrets + secret_texts(found)
    if not found.endpoint:
        found = found._replace(endpoint=settings.endpoint)
    return found

def confirm(question, console):
    """Return whether the person at the terminal answers *question* with yes."""
    try:
        answer = console.read_line(question + " [y/N] ")
    except EOFError:  # the cursor is still behind the question
        console.print_line("")
        return False
    return answer.strip().lower() in ("y", "yes")

def refuse_dry_run(options):
    """Raise UsageError for a dry run of a command that does more than send one request."""
    if options.dry_run:
        raise UsageError(f"--dry-run shows requests: {options.command} cannot be tried with it")

def load_schema(options):
    """Put the JSON Schema in the file of --schema, and a name for it, in the place of the path.

    Raise UsageError where the file cannot be read or holds no JSON object.
    """
    options.schema_name = None
    if options.schema is None:
        return
    path = options.schema
    try:
        schema = parse_json(decode_text(read_file(path))[0])
    except ValueError as error:
        raise UsageError(f"--schema {path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {path} is not a JSON object")
    stem = os.path.basename(path).partition(".")[0]
    # OpenAI takes 64 characters of these as a name.
    options.schema_name = re.sub("[^A-Za-z0-9_-]", "_", stem)[:64] or "answer"
    options.schema = schema

def refuse_combinations(options, interactive):
    """Raise UsageError for options of chat that make no sense together."""
    single_only = (
        ("-o json", options.output == "json"),
        ("--dry-run", options.dry_run),
        ("--extract", options.extract),
        ("--schema", options.schema),
        ("--attach -", "-" in options.attach),
    )
    for name, is_given in single_only:
        if interactive and is_given:
            raise UsageError(f"{name} goes with a single question, not with --interactive")
    if (options.attach + [options.message]).count("-") > 1:
        raise UsageError("standard input is read once: as the message, or as one attachment")
    if options.extract and options.output == "json":
        raise UsageError("--extract prints a code block, -o json the whole reply: give one of them")
    if options.continue_last and options.conversation:
        raise UsageError("--continue and --conversation name two conversations: give one of them")

def read_message(options, console):
    """Return the text of the message, which may be empty beside attachments.

    It is that of -m, or standard input where -m is -, or where there is no -m and no file.  Raise
    UnusableInputError where it is empty or not UTF-8.
    """
    text = options.message
    if text is None and options.attach:
        return ""
    if text is None and console.stdin_is_terminal():
        data = None
    elif text in (None, "-"):
        data = console.read_stdin()
    else:
        data = text.encode("utf-8", "surrogateescape")
    if data is None:
        raise UsageError("no message: give -m TEXT, or pipe one in")
    name = "standard input" if text in (None, "-") else "the message"
    text = decode_prompt(data, name)
    if not text.strip():
        raise UnusableInputError("the message is empty")
    return text

def read_question(options, console):
    """Return the user's message: its text and the files of --attach, with their notes told."""
    text = read_message(options, console)
    attachments = []
    for path in options.attach:
        if path == "-":
            attachments.append(read_attachment(path, console.read_stdin()))
        else:  # in a thread: it may be a pipe that says nothing
            read = functools.partial(read_attachment, path)
            attachments.append(console.waiter.run_in_thread(read, None))
    console.note(*[attachment.note for attachment in attachments if attachment.note])
    return build_question(text, attachments)

def note_unread_stdin(options, console):
    """Tell the user where standard input has something that this question does not use."""
    used = options.attach + [options.message]
    is_read = "-" in used or used == [None]
    if not is_read and console.stdin_has_data():
        console.note("standard input is not read: --attach - adds it to the question, "
                     "-q silences this note")

class CodeBlockView:
    """Show the first code block of an answer, and nothing else, once the answer is whole."""

    started = False

    def __init__(self, console, reply):
        self._console = console
        self._reply = reply

    def show(self, chunk):
        """Wait for the rest: the Reply keeps what came."""

    def finish(self):
        """Write the block; raise ServerError where there is none."""
        block = extract_code_block(self._reply.text)
        if block is None:
            raise ServerError("there is no code block in the answer")
        if not block.endswith("\n"):
            block += "\n"
        self._console.write(block)

def show_single(request, options, settings, console, reply):
    """Send *request* and show the answer, or on stderr what --extract can take nothing from."""
    if not options.extract:
        view = build_view(console, settings.stream, options.plain, options.show_reasoning)
        show_answer(request, settings, console, view, reply)
        return
    try:
        show_answer(request, settings, console, CodeBlockView(console, reply), reply)
    except XeroctlError:
        if reply.text:
            for line in reply.text.rstrip("\n").split("\n"):
                console.print_line(line)
        raise

def check_json(reply, is_extracted):
    """Raise ServerError where the answer, or its code block, is not JSON as --schema asks."""
    text = reply.text
    if is_extracted:
        text = extract_code_block(text)
    try:
        parse_json(text)
    except ValueError as error:
        raise ServerError(f"the answer is not JSON, as --schema asks: {error}") from error

def run_single(options, settings, console, conversation, store):
    """Ask one question after *conversation*, show the answer, and keep both in *store*."""
    if options.extract:
        console.json = False  # the config file may ask for it
    note_unread_stdin(options, console)
    question = read_question(options, console)
    sampling = build_sampling(options)
    messages = conversation.messages + [question]
    request = build_chat_request(sampling, settings, messages, settings.stream)
    if settings.dry_run:
        send_dry_run(request, settings, console)
        return
    reply = Reply(token_limit(sampling))
    conversation.unanswered = question
    try:
        show_single(request, options, settings, console, reply)
        report_reply(reply, reply.seconds, settings.stream, options.show_usage, console)
        if options.schema is not None:
            check_json(reply, options.extract)
    finally:
        if reply.text.strip():
            conversation.add_turn(question, reply.text)
        store.save(conversation, settings.endpoint, options.model or reply.model)

def run_chat(options, console):
    """Ask one question, or with -i, or -c alone at a terminal, hold a conversation."""
    is_alone = options.message is None and not options.attach
    interactive = options.interactive
    if options.continue_last and is_alone and console.stdin_is_terminal():
        interactive = True
    refuse_combinations(options, interactive)
    load_schema(options)
    conversation, store = open_conversation(options, console, interactive)
    with open_settings(options, console) as settings:
        if not interactive:
            return run_single(options, settings, console, conversation, store)
        question = None
        if options.message is not None:
            question = read_question(options, console)
        resolve = functools.partial(change_settings, options, console, settings.base_url)
        return run_interactive(options, settings, console, resolve, question, conversation, store)

def build_models_request(settings):
    """Return the Request for the models behind the endpoint, or behind the project without one."""
    url = endpoint_url(settings.base_url, settings.endpoint, "/models")
    return build_request("GET", url, settings)

def run_models(options, console):
    """List the ids of the models behind an endpoint."""
    with open_settings(options, console) as settings:
        request = build_models_request(settings)
        if settings.dry_run:
            send_dry_run(request, settings, console)
            return
        document = request_json(request, settings, console)
    rows = []
    for model in list_items(document, "models"):
        rows.append((get_field(model, "id", str) or "",))
    show_rows(document, ("id",), rows, console)

# -- Commands: config -------------------------------------------------------------------------

LIST_NAMES = ["", "name", "key", "endpoint", "base URL"]
MAX_KEY_COLUMNS = 30
MIN_URL_COLUMNS = 20
ADDRESS_VARIABLES = (ENV_BASE_URL, ENV_API_KEY, ENV_CONTEXT, ENV_ENDPOINT)

def describe_key(deployment):
    """Return where the key of *deployment* is kept, or as much of it as may be shown."""
    field = kept_key(deployment)
    if field is None:
        return ""
    if field == "api_key":
        return mask_key(deployment[field])
    kind = field[len("api_key_"):]
    return f"{kind} {deployment[field]}"

def mask_secrets(name, value):
    """Return the *value* of the config field *name* with what may be a secret in it masked.

    *name* includes the names of the tables around it.
    """
    if isinstance(value, dict):
        return {key: mask_secrets(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, list):
        return [mask_secrets(name, item) for item in value]
    if is_secret_name(name) and name not in (".api_key_keychain", ".api_key_command"):
        return mask_key(str(value))
    if isinstance(value, str):
        return re.sub("//[^/]*@", "//****@", value)
    return json.loads(json.dumps(value, default=str))  # a date becomes a text

def fit_rows(rows, columns):
    """Return the *rows* of a list for so many *columns*: long keys and URLs cut in the middle."""
    fitted = []
    for mark, name, key, endpoint, _ in rows:
        key = truncate_middle(key, MAX_KEY_COLUMNS)
        fitted.append([mark, name, key, endpoint])
    lines = table_lines(LIST_NAMES[:-1], fitted, sys.maxsize)
    left = columns - max(map(display_width, lines)) - 2
    for cells, row in zip(fitted, rows):
        url = truncate_middle(row[-1], max(left, MIN_URL_COLUMNS))
        cells.append(url)
    return fitted

def run_config_list(options, console):
    """List the deployments, the current one marked."""
    config = read_config()
    console.note(*config.warnings)
    if not config.deployments and not console.json:
        console.note(f"no deployments in {config.path}: add one with: xeroctl config init")
        return
    masked = {}
    rows = []
    piped_rows = []
    for name, deployment in config.deployments.items():
        masked[name] = mask_secrets("", deployment)
        mark = "*" if name == config.current else ""
        url = masked[name].get("base_url", "")
        key = describe_key(deployment)
        endpoint = deployment.get("endpoint", "")
        rows.append([mark, name, key, endpoint, url])
        piped_rows.append([name, mark, url, key])
        if endpoint:
            piped_rows[-1].append(endpoint)
    document = {"current": config.current, "deployment": masked}
    if console.out.is_terminal:
        rows = fit_rows(rows, console.out.width())
        show_rows(document, LIST_NAMES, rows, console)
    else:
        show_rows(document, [], piped_rows, console)

def run_config_show(options, console):
    """Show one deployment, the chosen one unless another is named."""
    config = read_config()
    console.note(*config.warnings)
    name = options.name or options.context or environment()[ENV_CONTEXT] or config.current
    if name is None:
        raise UsageError(f"no context is chosen: {config.path} has: {known_contexts(config)}")
    deployment = find_deployment(config, name)
    fields = dict({"name": name}, **mask_secrets("", deployment))
    if console.json:
        show_json(fields, console)
        return
    for key, value in fields.items():
        text = value if isinstance(value, str) else json.dumps(value)
        console.write(f"{key}: {text}\n")

def run_config_path(options, console):
    """Show where the config file is, or would be."""
    path = utf8_argument(config_path())
    if console.json:
        show_json(path, console)
    else:
        console.write(path + "\n")

def read_given_key(options, console):
    """Return the key of --api-key, a line of standard input for -; None where none is given."""
    if options.api_key != "-":
        return options.api_key
    key = ""
    with contextlib.suppress(EOFError):
        key = console.read_secret("API key, not shown: ")
    if key in ("", "-"):
        raise UsageError("no API key on standard input")
    return check_api_key(key)

def change_fields(deployment, base_url, api_key, endpoint):
    """Return *deployment* with other values; None changes nothing, an empty text removes."""
    if base_url:
        base_url = check_base_url(base_url)
    values = {"base_url": base_url, "api_key": api_key, "endpoint": endpoint}
    if api_key == "":
        values[kept_key(deployment)] = ""  # wherever it is kept
    changed = dict(deployment)
    for field, value in values.items():
        if value == "":
            changed.pop(field, None)
        elif value is not None:
            changed[field] = value
    if changed.get("endpoint"):
        check_endpoint(changed["endpoint"], changed.get("base_url", ""), "--endpoint")
    return changed

def add_deployment(name, base_url, api_key, endpoint, console):
    """Put a new deployment into the config file; it becomes the current one if there is none."""
    deployment = change_fields({}, base_url, api_key, endpoint)

    def change(config):
        if name in config.deployments:
            raise UsageError(f"{name} is there already: change it with: xeroctl config set {name}")
        current = config.current
        if current not in config.deployments:
            current = name
        return current, dict(config.deployments, **{name: deployment})

    config = change_config(change)
    advice = f"choose it with --context {name}, or with: xeroctl config use {name}"
    if config.current == name:
        advice = "it is the current one"
    console.note(f"added {name} to {config.path}: {advice}")

def run_config_add(options, console):
    """Add a deployment."""
    refuse_dry_run(options)
    if not options.base_url:
        raise UsageError("no base URL: give --base-url URL")
    api_key = read_given_key(options, console)
    add_deployment(options.name, options.base_url, api_key, options.endpoint, console)

def run_config_set(options, console):
    """Change a deployment in place; an empty value removes a field."""
    refuse_dry_run(options)
    name = options.name
    api_key = read_given_key(options, console)
    if (options.base_url, api_key, options.endpoint) == (None, None, None):
        raise UsageError("nothing to change: give --base-url, --api-key or --endpoint")
    notes = []

    def change(config):
        old = find_deployment(config, name)
        new = change_fields(old, options.base_url, api_key, options.endpoint)
        keeps_key = api_key is None and kept_key(old)
        if keeps_key and options.base_url and not same_origin(old.get("base_url"), new["base_url"]):
            notes.append(f"the API key of {name} goes to {new['base_url']} from now on")
        return config.current, dict(config.deployments, **{name: new})

    config = change_config(change)
    console.note(f"changed {name} in {config.path}", *notes)

def run_config_use(options, console):
    """Make a deployment the current one."""
    refuse_dry_run(options)

    def change(config):
        find_deployment(config, options.name)
        return options.name, config.deployments

    change_config(change)
    console.note(f"{options.name} is the current context")
    environ = environment()
    for variable in ADDRESS_VARIABLES:
        if environ[variable]:
            console.note(f"{variable} is set, and counts before it")

def run_config_remove(options, console):
    """Remove a deployment."""
    refuse_dry_run(options)

    def change(config):
        find_deployment(config, options.name)
        deployments = dict(config.deployments)
        del deployments[options.name]
        current = config.current
        if current == options.name:
            current = None
        return current, deployments

    config = change_config(change)
    sentence = f"removed {options.name}"
    if config.deployments and config.current is None:
        sentence += (": none is the current one now, "
                     "choose one with: xeroctl config use CONTEXT")
    console.note(sentence)

def ask(read, question, check, console):
    """Return what a person answers; ask again until *check*, which raises UsageError, takes it."""
    while True:
        try:
            return check(read(question).strip())
        except UsageError as error:
            console.print_error(error)

def ask_deployment(options, console):
    """Return the name of a new deployment; ask for it and for what *options* do not give."""
    deployments = read_config().deployments

    def check_name(text):
        name = text or "default"
        if name in deployments:
            raise UsageError(f"{name} is there already: take another name")
        return check_deployment_name(name)

    def check_slug(text):
        return text and check_endpoint(text, options.base_url, "the endpoint")

    name = ask(console.read_line, "name [default]: ", check_name, console)
    if not options.base_url:
        question = "base URL (Xerotier .../PROJECT/v1, else .../chat/completions): "
        options.base_url = ask(console.read_line, question, check_base_url, console)
    if options.api_key in (None, "-"):
        question = "API key, not shown; Enter for none: "
        options.api_key = ask(console.read_secret, question, check_api_key, console)
    if not options.endpoint:
        question = "endpoint [to be given with each command]: "
        options.endpoint = ask(console.read_line, question, check_slug, console)
    return name

def answers_for_models(settings, console):
    """Ask for the models; return False for HTTP 404.  Raise what makes the address doubtful."""
    try:
        request_json(build_models_request(settings), settings, console)
    except RefusedError as error:  # it answers
        return error.status != 404
    return True

def try_address(settings, console):
    """Return the base URL that answers: where the slug in it is not found, perhaps the plain one.

    Raise the error that makes the address doubtful.
    """
    base_url = settings.base_url
    if "{endpoint}" in base_url and not settings.endpoint:
        return base_url  # there is nothing to ask yet
    is_found = answers_for_models(settings, console)
    plain_url = plain_address(base_url)
    if is_found or not plain_url or not settings.endpoint:
        return base_url
    with contextlib.suppress(XeroctlError):
        if answers_for_models(settings._replace(base_url=plain_url), console):
            console.note(f"{base_url} has no address for an endpoint, but {plain_url} answers: "
                         "that is kept")
            return plain_url
    return base_url

def run_config_init(options, console):
    """Ask for a deployment, see whether its address answers, and add it."""
    refuse_dry_run(options)
    if not console.stdin_is_terminal():
        raise UsageError("config init asks at a terminal: without one use xeroctl config add")
    options.context = None
    try:
        name = ask_deployment(options, console)
        settings = resolve_settings(options, {}, Config("", None, {}, []), fetch_key)
        settings = settings._replace(retries=0)
        console.secrets = secret_texts(settings)
        console.note(*settings.notes)
        options.base_url = try_address(settings, console)
    except EOFError:
        console.print_line("")
        raise UsageError("nothing was written") from None
    except (NetworkError, ServerError, AuthError, RateLimitError, CutShortError) as error:
        console.print_error(error)
        if not confirm("Keep it all the same?", console):
            raise UsageError("nothing was written") from error
    add_deployment(name, options.base_url, options.api_key, options.endpoint, console)
    command = f"xeroctl chat --context {name}"
    if not options.endpoint:
        command += " --endpoint SLUG"
    console.note(f"next: {command} -m Hello")
# -- Commands: status -------------------------------------------------------------------------

STATUS_STEPS = ("settings", "name", "connection", "tls", "authorisation", "completion")
STEP_WORDS = {  # "ok" of a step in JSON -> its word on a terminal, and the colour of that
    True: ("ok", "\x1b[32m"),
    None: ("-", "\x1b[33m"),
    False: ("FAILED", "\x1b[31m"),
}
STATUS_QUESTION = "Count from one to ten."
STATUS_MAX_TOKENS = 16
ARRIVAL_GAP_SECONDS = 0.001  # chunks that are closer came together
LUMP_SECONDS = 0.1  # an answer that is whole sooner may simply be fast

class Steps:
    """The steps of a check: shown one by one as they end, or with -o json as one object."""

    def __init__(self, console):
        self._console = console
        self._since = time.monotonic()
        self._done = []  # JSON objects

    def add(self, name, *sentences, ok=True, **facts):
        """Note that the step *name* ended now, and what is known from it; *ok* None: who knows."""
        now = time.monotonic()
        seconds = now - self._since
        self._since = now
        step = {"step": name, "ok": ok, "seconds": round(seconds, 4)}
        step.update(facts)
        self._done.append(step)
        if self._console.json:
            return
        if self._console.out.is_terminal:
            self._draw(name, ok, seconds, sentences)
            return
        text = one_line(", ".join(sentences) or "failed")
        self._console.write(f"{name:<13}  {seconds:7.3f} s  {text}\n")

    def fail(self, error):
        """Note that the step after the last one failed with *error*, and show the whole."""
        index = 0
        if self._done:
            last = self._done[-1]["step"]
            index = STATUS_STEPS.index(last) + 1
        self.add(STATUS_STEPS[index], ok=False, message=str(error))
        self.finish(False)

    def finish(self, good):
        """Show the one object of -o json; *good* says that no step failed."""
        if self._console.json:
            show_json({"ok": good, "steps": self._done}, self._console)

    def _draw(self, name, ok, seconds, sentences):
        """Write a step to the terminal; each of its lines begins with its name."""
        from textwrap import wrap

        home = utf8_argument(os.path.expanduser("~"))
        word, colour = STEP_WORDS[ok]
        took = format_seconds(seconds)
        margin = f"{name:<14}{word:<7}{took:>6}  "
        columns = max(20, self._console.out.width() - len(margin))
        lines = []
        for sentence in sentences:
            text = one_line(sentence).replace(home + "/", "~/")
            lines += wrap(text, columns, break_long_words=False, break_on_hyphens=False)
        separator = "\n" + name.ljust(len(margin))
        text = margin + separator.join(lines)
        text = text.rstrip() + "\n"
        if self._console.out.styled:
            coloured = colour + word + RESET
            text = text.replace(word, coloured, 1)
        self._console.write_styled(text)

class CheckLog(ConnectLog):
    """A ConnectLog that shows the steps of connecting as steps of the check."""

    def __init__(self, steps, is_plain, trace):
        super().__init__(trace)
        self._check = steps
        self._is_plain = is_plain

    def add_step(self, name, sentence, **facts):
        """Note that the step *name* ended now, and show it."""
        super().add_step(name, sentence, **facts)
        expires = facts.get("certificate_expires")
        if expires:
            from ssl import cert_time_to_seconds

            seconds_left = cert_time_to_seconds(expires) - time.time()
            days = int(seconds_left // (24 * 60 * 60))
            facts["certificate_days"] = days
            sentence += ", " + plural(days, "more day")
        self._check.add(name, sentence, **facts)
        if name == "connection" and self._is_plain:
            self._check.add("tls", "none: the address is http://", version=None)

def describe_settings(settings, console):
    """Return sentences that say which base URL and key are used, and where they come from."""
    url_source = settings.sources["base_url"]
    key_source = settings.sources["api_key"]
    url_sentence = f"base URL {settings.base_url} ({url_source})"
    if not settings.api_key:
        return [url_sentence, "no API key"]
    if console.out.is_terminal and key_source == url_source:
        key_source = "the same"
    key = mask_key(settings.api_key)
    return [url_sentence, f"API key {key} ({key_source})"]

def check_models(settings, steps, console, log):
    """See who answers, and whether the key is accepted, by asking for the models."""
    request = build_models_request(settings)
    try:
        document = request_json(request, settings, console, log)
        count = len(list_items(document, "models"))
    except (AuthError, RefusedError) as error:
        # A key can be restricted to completions of one endpoint, and a server can lack the list.
        is_restricted = error.status == 403 and settings.endpoint
        if error.status not in (404, 405) and not is_restricted:
            raise
        message = str(error)
        steps.add("authorisation", "not known: " + message, ok=None, message=message)
        return
    key = "with the key" if settings.api_key else "without a key"
    steps.add("authorisation", f"HTTP 200 {key}, models: {count}", models=count)

def describe_pace(chunks, arrivals, seconds):
    """Return how the *chunks* of an answer that took *seconds* came, at so many *arrivals*."""
    if chunks == 1:
        return "in one piece: it may be that this server does not stream"
    if arrivals == 1 and seconds < LUMP_SECONDS:
        return "at once, too fast to see it stream"
    if arrivals == 1:
        return "in one lump: something on the way, a proxy perhaps, holds the stream back"
    if 2 * arrivals >= chunks:
        return "one by one"
    return f"in {arrivals} lumps"

def measure_answer(request, settings, console):
    """Return the Reply to *request*, the number of its chunks, and at how many times they came."""
    reply = Reply()
    chunk_count = 0
    arrivals = 0
    last_at = None
    log = ConnectLog(console.trace)
    with contextlib.closing(stream_once(request, settings, console, log)) as chunks:
        for chunk in chunks:
            reply.add(chunk)
            chunk_count += len(chunk.documents)
            if last_at is None or chunk.at - last_at > ARRIVAL_GAP_SECONDS:
                arrivals += 1
            last_at = chunk.at
    if not reply.has_reasoning:  # a model that reasons may need all the tokens for that
        reply.check_answer()
    reply.seconds = time.monotonic() - log.sent_at
    if reply.first_at is not None:
        reply.first_seconds = reply.first_at - log.sent_at
    return reply, chunk_count, arrivals

def other_form(request, error):
    """Return *request* in the form that *error*, which refused it, asks for, or None."""
    plainer = without_stream_options(request)
    if plainer and refuses_stream_options(error):
        return plainer
    told = f"{error} {error.body}"
    if error.status in (400, 422) and re.search("max_(completion_)?tokens", told):
        body = request.body.replace(b'"max_tokens"', b'"max_completion_tokens"')
        if body != request.body:
            return request._replace(body=body)
    return None

def measure_completion(settings, console):
    """Return what measure_answer does for a short question; each form of it is sent once."""
    sampling = Sampling(None, {"max_tokens": STATUS_MAX_TOKENS}, [])
    messages = [build_message(STATUS_QUESTION)]
    request = build_chat_request(sampling, settings, messages, True)
    while True:
        try:
            with console.spinner("waiting"):
                return measure_answer(request, settings, console)
        except RefusedError as error:
            request = other_form(request, error)
            if request is None:
                raise

def raise_with_plain_address(settings, console, error):
    """Raise *error*, or a RefusedError that names the address without a slug if that answers."""
    address = plain_address(settings.base_url)
    if error.status != 404 or address is None:
        raise error
    try:
        measure_completion(settings._replace(base_url=address), console)
    except XeroctlError:
        raise error from None
    raise RefusedError(f"HTTP 404 below {settings.base_url}, but {address} answers: this server "
                       "has no slugs: make that the base URL", 404) from error

def check_completion(settings, steps, console):
    """See how a short completion is streamed."""
    try:
        reply, chunks, arrivals = measure_completion(settings, console)
    except RefusedError as error:
        raise_with_plain_address(settings, console, error)
    facts = dict(usage_fields(reply, reply.seconds, True))
    del facts["seconds"]  # the step has its own
    facts.update(model=reply.model, chunks=chunks, arrivals=arrivals)
    pace = describe_pace(chunks, arrivals, reply.seconds)
    model = reply.model or "not told"
    words = [f"model {model}", pace]
    if reply.first_seconds is not None:
        first = format_seconds(reply.first_seconds)
        words.insert(0, f"first token after {first}")
    rate = facts.get("tokens_per_second")
    if rate is not None:
        words.append(f"{rate:.1f} tokens/s after it")
    steps.add("completion", ", ".join(words), **facts)

def run_checks(settings, steps, console):
    """Check what the Settings lead to; raise the error of the first step that fails."""
    import urllib.request  # so that no step is charged for it

    route = find_route(build_models_request(settings).url)
    if route.tls:
        tls_context(settings.cacert)
    facts = {
        "base_url": settings.base_url,
        "api_key": mask_key(settings.api_key) or None,
        "endpoint": settings.endpoint,
        "sources": settings.sources,
    }
    sentences = describe_settings(settings, console)
    steps.add("settings", *sentences, **facts)
    log = CheckLog(steps, not route.tls, console.trace)
    check_models(settings, steps, console, log)
    if settings.endpoint:
        check_completion(settings, steps, console)
    else:
        console.note("to try a completion too, give --endpoint SLUG")

def run_status(options, console):
    """Check a deployment step by step; the first failure ends it."""
    refuse_dry_run(options)
    steps = Steps(console)
    try:
        with open_settings(options, console, endpoint_needed=False) as settings:
            run_checks(settings._replace(retries=0), steps, console)
    except OutputError:
        raise
    except XeroctlError as error:
        steps.fail(error)
        raise
    steps.finish(True)

# -- Commands: completions --------------------------------------------------------------------

COMPLETION_COLUMNS = ("id", "created", "model", "tokens", "metadata")
MAX_MESSAGE_PAGES = 1000

def metadata_text(completion):
    """Return the metadata of *completion* as NAME=VALUE words, sorted by name."""
    words = []
    metadata = get_field(completion, "metadata", dict) or {}
    for name, value in sorted(metadata.items()):
        if not isinstance(value, str):
            value = json_text(value)
        words.append(f"{name}={value}")
    return " ".join(words)

def completion_row(completion):
    """Return the cells that a list shows of a stored completion."""
    created = get_field(completion, "created", (int, float))
    stamp = ""
    if created is not None and 0 <= created < 1e11:  # what is larger is no time in seconds
        stamp = utc_stamp(created)
    total = parse_usage(get_field(completion, "usage", dict)).total
    return (
        get_field(completion, "id", str) or "",
        stamp,
        get_field(completion, "model", str) or "",
        "" if total is None else str(total),
        metadata_text(completion),
    )

def answer_message(completion):
    """Return the message of the first choice in *completion*; raise ServerError for none."""
    for choice in get_field(completion, "choices", list) or ():
        message = get_field(choice, "message", dict)
        if message:
            return message
    raise ServerError("the reply holds no completion")

def list_query(options):
    """Return the (name, value) pairs of the query that the filters in *options* stand for."""
    query = []
    for name in ("limit", "after", "order", "model"):
        value = getattr(options, name)
        if value is not None:
            query.append((name, value))
    for name, value in options.tags + options.more_tags:
        query.append((f"metadata[{name}]", value))
    return query

def refuse_filters(options):
    """Raise UsageError for filters before a command that does not list."""
    if list_query(options):
        raise UsageError(f"--limit and the other filters go with list, not with {options.verb}")

def request_stored(method, settings, path, console, query=(), body=None):
    """Return the document that answers *method* at *path* below the stored completions.

    For a dry run, show the request and return None.
    """
    request = build_stored_request(method, settings, path, query, body)
    if settings.dry_run:
        send_dry_run(request, settings, console)
        return None
    return request_json(request, settings, console)

def run_completions_list(options, console):
    """List the stored completions."""
    query = list_query(options)
    with open_settings(options, console) as settings:
        document = request_stored("GET", settings, "", console, query)
    if settings.dry_run:
        return
    completions = list_items(document, "completions")
    rows = [completion_row(completion) for completion in completions]
    show_rows(document, COMPLETION_COLUMNS, rows, console)
    last = None
    if completions:
        last = get_field(completions[-1], "id", str)
    if last and get_field(document, "has_more", bool):
        console.note(f"there are more: add --after {last}")

def run_completions_get(options, console):
    """Show the answer of a stored completion."""
    refuse_filters(options)
    with open_settings(options, console) as settings:
        completion = request_stored("GET", settings, "/" + options.id, console)
    if settings.dry_run:
        return
    if console.json:
        show_json(completion, console)
        return
    text = join_surrogates(content_text(answer_message(completion)))
    if not text.endswith("\n"):
        text += "\n"
    console.write(text)

def read_messages(name, settings, console):
    """Return all messages of the stored completion *name*, page by page, and its answer."""
    messages = []
    seen = set()
    query = []
    while True:
        document = request_stored("GET", settings, f"/{name}/messages", console, query)
        if settings.dry_run:
            return []
        page = list_items(document, "messages")
        last = None
        if page:
            last = get_field(page[-1], "id", str)
        if last not in seen:
            messages += page
        if not get_field(document, "has_more", bool):
            break
        if last is None or last in seen or len(seen) == MAX_MESSAGE_PAGES:
            console.note("there may be more messages: the server does not page through them")
            break
        seen.add(last)
        query = [("after", last)]
    if messages and messages[-1].get("role") != "assistant":  # some servers keep it apart
        completion = request_stored("GET", settings, "/" + name, console)
        messages.append(dict({"role": "assistant"}, **answer_message(completion)))
    return messages

def run_completions_messages(options, console):
    """Show the conversation of a stored completion; with -o json in a form that /load reads."""
    refuse_filters(options)
    with open_settings(options, console) as settings:
        messages = read_messages(options.id, settings, console)
    if settings.dry_run:
        return
    if console.json:
        show_json({"object": "list", "data": messages}, console)
        return
    blocks = []
    for message in messages:
        role = get_field(message, "role", str) or "unknown"
        text = join_surrogates(content_text(message)).rstrip("\n")
        blocks.append(f"{role}: {text}\n")
    console.write("\n".join(blocks))

def run_completions_update(options, console):
    """Replace the metadata of a stored completion."""
    refuse_filters(options)
    if not options.metadata:
        raise UsageError("nothing to change: give --metadata NAME=VALUE")
    body = {"metadata": dict(options.metadata)}
    with open_settings(options, console) as settings:
        completion = request_stored("POST", settings, "/" + options.id, console, body=body)
    if not settings.dry_run:
        show_rows(completion, COMPLETION_COLUMNS, [completion_row(completion)], console)

def run_completions_delete(options, console):
    """Delete stored completions after a yes; go on after a failure, and return its status."""
    refuse_filters(options)
    asks = not options.yes and not options.dry_run
    if asks and not console.stdin_is_terminal():
        raise UsageError("delete asks at a terminal: without one give --yes")
    status = EXIT_OK
    with open_settings(options, console) as settings:
        if asks and not confirm(f"Delete {', '.join(options.id)}?", console):
            raise UsageError("nothing was deleted")
        for name in options.id:
            try:
                document = request_stored("DELETE", settings, "/" + name, console)
                if get_field(document, "deleted", bool) is False:
                    raise ServerError(f"the server did not delete {name}")
            except XeroctlError as error:
                console.print_error(error)
                status = status or error.exit_status
                continue
            if settings.dry_run:
                continue
            line = f"deleted {name}"
            if console.json:
                line = json_text(document)
            console.write(line + "\n")
    return status

# -- Many requests ----------------------------------------------------------------------------

CONNECTOR_THREADS = 16
SPARE_DESCRIPTORS = 40  # of the process, beside its connections
MAX_SELECT_CONNECTIONS = 500  # Windows' select takes 512 sockets
SWEEP_SECONDS = 0.1
BEAT_SECONDS = 0.01  # how often a measuring loop notes how late it wakes
PROGRESS_SECONDS = 0.5

def allow_connections(count):
    """Let the process have *count* connections open; raise UsageError where the system forbids."""
    import selectors

    if selectors.DefaultSelector is selectors.SelectSelector and count > MAX_SELECT_CONNECTIONS:
        raise UsageError(f"{count} connections are more than select can watch here: "
                         f"at most {MAX_SELECT_CONNECTIONS}")
    try:
        import resource
    except ImportError:  # not POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_DESCRIPTORS
    if resource.RLIM_INFINITY in (soft, hard) or wanted <= soft:
        return
    if wanted > hard:
        raise UsageError(f"{count} connections need {wanted} open files, and this process may "
                         f"have {hard}: see ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

class Exchange:
    """One request of a RequestLoop and what came of it.  All times are monotonic, in seconds."""

    def __init__(self, request, route, settings, due=None):
        self.request = request
        self.route = route  # to the request's URL
        self.settings = settings
        self.due = due  # when it should be sent; None: as soon as its connection is open
        self.sent_at = None  # when the first byte left
        self.connect_seconds = None  # None: its connection was open already
        self.reply = Reply()
        self.arrivals = []  # (time, number of chunks with text or reasoning), one a read
        self.head = None
        self.document = None  # of an answer that is not streamed
        self.error_body = bytearray()
        self.error = None
        self.context = None
        self._answers = None

    def start_reading(self, head):
        """Take the ResponseHead *head*: what follows is an answer, or the body of an error."""
        self.head = head
        self.context = build_context(head, self.request, self.route, self.settings)
        if 200 <= head.status <= 299:
            self._answers = AnswerDecoder(self.request.streamed, head, self.context)

    def feed(self, body, at):
        """Take some *body* that arrived at the time *at*; return True once the answer has ended."""
        if self._answers is None:
            self.error_body += body[:MAX_ERROR_BYTES - len(self.error_body)]
            return False
        self._add(self._answers.feed(body, at))
        return bool(self._answers.ended or self.error)

    def finish(self, at):
        """Take the end of the body: from here on *error* is what was wrong, or None."""
        if self._answers is None:
            self.error = parse_error(bytes(self.error_body), self.context)
            return
        if self.error is None:
            self._add(self._answers.finish(at))

    def fail(self, error, at):
        """End with *error*, unless the answer is whole, however the wire broke."""
        if self.head is not None and self._answers is None:
            self.finish(at)  # the status says more than a body that breaks off
        elif self.reply.finish_reason and self.request.streamed:
            self.finish(at)
        else:
            self.error = error

    def _add(self, chunk):
        self.error = self._answers.error
        if chunk is None:
            return
        self.reply.add(chunk)
        if chunk.deltas:
            self.arrivals.append((chunk.at, chunk.deltas))
        if chunk.documents and not self.request.streamed:
            self.document = chunk.documents[-1]

class Lane:
    """One connection of a RequestLoop: it is idle, or serves an exchange, or reads to an end."""

    def __init__(self, stream, key):
        self.stream = stream
        self.key = key  # exchanges with an equal key can use it
        self.exchange = None
        self.decoder = None  # of the response, until that has ended
        self.unsent = b""
        self.heard_at = 0
        self.is_reused = False

class RequestLoop:
    """Sends many requests at once, from one thread, through one selector.

    A turn has three steps: receive and stamp all that is ready, then parse it, then deal with
    ends.  So the time at which bytes arrived does not depend on the work that others cause.  A few
    threads connect.  From restart_beats() on, *lags* holds how late the loop wakes.
    """

    def __init__(self, waiter, keeps_connections=True):
        import queue
        import selectors
        import socket

        self.lags = []  # seconds, one a beat
        self.in_flight = set()
        self._waiter = waiter
        self._keeps_connections = keeps_connections
        self._selector = selectors.DefaultSelector()
        self._lanes = set()
        self._idle = {}  # key -> list of lanes
        self._finished = []
        self._wanted = queue.Queue()  # exchanges that need a connection, for the threads
        self._connected = []  # (exchange, stream or exception, seconds), from the threads
        self._threads = 0
        self._closed = False
        self._next_sweep = 0
        self._next_beat = float("inf")
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, None)
        if waiter.wakeup_fileno is not None:
            self._selector.register(waiter.wakeup_fileno, selectors.EVENT_READ, None)

    def start(self, exchange):
        """Send the request of *exchange* on an idle connection, or on a new one."""
        self.in_flight.add(exchange)
        idle = self._idle.get(self._key(exchange))
        if idle:
            self._send(idle.pop(), exchange)
        else:
            self._connect(exchange)

    def restart_beats(self):
        """Note from now on, once a beat, how late the loop wakes."""
        self.lags = []
        self._next_beat = time.monotonic()

    def watch(self, descriptor):
        """Let a turn end when *descriptor* is readable; raise OSError where that cannot be."""
        self._selector.register(descriptor, 1, None)

    def unwatch(self, descriptor):
        """Undo watch()."""
        self._selector.unregister(descriptor)

    def turn(self, until):
        """Wait for something to happen, at most to the time *until*; return the ended exchanges.

        Raise KeyboardInterrupt or Terminated for a signal.
        """
        ready = self._selector.select(self._seconds_to_wait(until))
        received = self._receive(ready)
        self._note_lag(time.monotonic())
        for lane, data, at in received:
            self._parse(lane, data, at)
        self._adopt_connections()
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._end_silent_ones(now)
        self._waiter.check()
        finished, self._finished = self._finished, []
        return finished

    def drop(self, exchange):
        """Give up *exchange*, and its connection."""
        self.in_flight.discard(exchange)
        for lane in list(self._lanes):
            if lane.exchange is exchange:
                self._close(lane)

    def close(self):
        """Close all connections and let the threads end."""
        self._closed = True
        for _ in range(self._threads):
            self._wanted.put(None)
        for lane in list(self._lanes):
            self._close(lane)
        for _, stream, _ in self._connected:
            if isinstance(stream, Stream):
                stream.close()
        self._selector.close()
        self._bell.close()
        self._ring.close()

    # Waiting

    def _seconds_to_wait(self, until):
        """Return whole milliseconds, rounded down: epoll rounds up, and would wake late."""
        wake_at = min(until, self._next_sweep, self._next_beat)
        milliseconds = int((wake_at - time.monotonic()) * 1000)
        return max(0, (milliseconds - 0.5) / 1000)

    def _note_lag(self, now):
        """Note how late each beat is seen that has passed.  One within a millisecond is due."""
        while self._next_beat <= now + 0.001:
            self.lags.append(max(0, now - self._next_beat))
            self._next_beat += BEAT_SECONDS

    # Connections

    def _key(self, exchange):
        return exchange.route[1:], exchange.settings.cacert

    def _connect(self, exchange):
        import threading

        self._wanted.put(exchange)
        if self._threads < min(CONNECTOR_THREADS, len(self.in_flight)):
            try:
                threading.Thread(target=self._connect_wanted, daemon=True).start()
                self._threads += 1
            except RuntimeError:  # can't start new thread
                if not self._threads:
                    self._open(self._wanted.get())

    def _connect_wanted(self):
        while True:
            exchange = self._wanted.get()
            if exchange is None:
                return
            self._open(exchange)

    def _open(self, exchange):
        started = time.monotonic()
        try:
            result = open_stream(exchange.route, exchange.settings, Waiter(), ConnectLog())
        except Exception as error:  # raised again in the loop's thread if it is not ours
            result = error
        self._connected.append((exchange, result, time.monotonic() - started))
        with contextlib.suppress(OSError):  # the loop was closed
            self._ring.send(b"!")

    def _adopt_connections(self):
        while self._connected:
            exchange, result, seconds = self._connected.pop(0)
            if isinstance(result, Stream):
                self._adopt(exchange, result, seconds)
            elif not isinstance(result, XeroctlError):
                raise result
            elif exchange in self.in_flight:
                exchange.error = result
                self._end(exchange)

    def _adopt(self, exchange, stream, seconds):
        lane = Lane(stream, self._key(exchange))
        self._lanes.add(lane)
        self._selector.register(stream, 1, lane)
        if exchange in self.in_flight:
            exchange.connect_seconds = seconds
            self._send(lane, exchange)
        else:
            self._close(lane)

    def _close(self, lane):
        self._lanes.discard(lane)
        idle = self._idle.get(lane.key, [])
        if lane in idle:
            idle.remove(lane)
        self._selector.unregister(lane.stream)
        lane.stream.close()

    # Sending and receiving

    def _send(self, lane, exchange):
        lane.exchange = exchange
        lane.decoder = ResponseDecoder(exchange.request.method)
        lane.unsent = memoryview(request_bytes(exchange.request, exchange.route))
        lane.heard_at = exchange.sent_at = time.monotonic()
        if exchange.due is None:
            exchange.due = exchange.sent_at
        self._send_rest(lane)
        if lane.unsent:
            self._selector.modify(lane.stream, 3, lane)

    def _send_rest(self, lane):
        try:
            sent = lane.stream.send_now(lane.unsent)
            lane.unsent = lane.unsent[sent:]
        except OSError:  # what the server said before it closed, if anything, is read next
            lane.unsent = b""

    def _receive(self, ready):
        """Return a (lane, data, time) for each of the *ready* connections that brought bytes.

        The data is b"" at the end, and an OSError where the connection broke.
        """
        received = []
        for key, events in ready:
            lane = key.data
            if lane is None:
                self._silence_bell(key.fileobj)
                continue
            if lane.unsent and events & 2:
                self._send_rest(lane)
                if not lane.unsent:
                    self._selector.modify(lane.stream, 1, lane)
            if events & 1:
                try:
                    data = lane.stream.receive_now()
                except OSError as error:
                    data = error
                if data is not None:
                    received.append((lane, data, time.monotonic()))
        return received

    def _silence_bell(self, source):
        with contextlib.suppress(BlockingIOError):
            if source is self._bell:
                self._bell.recv(READ_BYTES)
            elif source == self._waiter.wakeup_fileno:
                os.read(source, READ_BYTES)

    # Parsing, and ends

    def _parse(self, lane, data, at):
        lane.heard_at = at
        if lane.decoder is None:  # an idle connection ends, or says what nobody asked
            self._close(lane)
            return
        exchange = lane.exchange
        try:
            body = self._decode(lane.decoder, data)
            if exchange and self._feed(exchange, lane.decoder, body, at):
                lane.exchange = None
                self._end(exchange)
            if lane.decoder.complete:
                self._release(lane, data)
        except (OSError, WireError, XeroctlError) as error:
            self._lose(lane, error, at)

    def _decode(self, decoder, data):
        if isinstance(data, OSError):
            raise data
        if data:
            return decoder.feed(data)
        decoder.finish()
        return b""

    def _feed(self, exchange, decoder, body, at):
        """Hand *body* on; return True once the exchange has ended, also before its body has."""
        if decoder.head is None:
            return False
        if exchange.head is None:
            exchange.start_reading(decoder.head)
        if body and exchange.feed(body, at) and not decoder.complete:
            exchange.finish(at)
            return True
        if decoder.complete:
            exchange.finish(at)
        return decoder.complete

    def _release(self, lane, data):
        """Keep the connection of a response that has ended, if another can follow."""
        can_follow = lane.decoder.keeps_open and not lane.decoder.unread and data
        if not can_follow or lane.unsent or not self._keeps_connections:
            self._close(lane)
            return
        lane.decoder = None
        lane.is_reused = True
        self._idle.setdefault(lane.key, []).append(lane)

    def _lose(self, lane, error, at):
        exchange, decoder = lane.exchange, lane.decoder
        self._close(lane)
        if exchange is None:
            return
        closed = isinstance(error, (OSError, IncompleteError))
        if lane.is_reused and closed and decoder.head is None:
            # The server closed the idle connection while our request was on its way.
            if exchange.due == exchange.sent_at:
                exchange.due = None
            self._connect(exchange)
            return
        exchange.fail(self._failure(exchange, decoder, error), at)
        self._end(exchange)

    def _failure(self, exchange, decoder, error):
        """Return the XeroctlError for what broke the connection, or was not HTTP on it."""
        speaker = exchange.route.speaker
        if isinstance(error, XeroctlError):  # a broken content coding
            return error
        if decoder.head is not None:
            broken = isinstance(error, ConnectionError)
            return CutShortError(f"the reply was cut short: {speaker} closed the connection",
                                 retryable=broken and not exchange.arrivals)
        if isinstance(error, (OSError, IncompleteError)):
            return lost_error(error, speaker, exchange.settings.timeout)
        return ServerError(f"{speaker} does not speak HTTP: {error}")

    def _end_silent_ones(self, now):
        for lane in list(self._lanes):
            exchange = lane.exchange
            if lane.decoder is None:
                continue
            limit = AFTER_FINISH_SECONDS
            if exchange and not exchange.reply.finish_reason:
                limit = exchange.settings.timeout
            if now - lane.heard_at < limit:
                continue
            self._close(lane)
            if exchange:
                exchange.fail(NetworkError(f"{exchange.route.speaker} sent nothing for "
                                           f"{limit:g} s: see --timeout"), now)
                self._end(exchange)

    def _end(self, exchange):
        self.in_flight.discard(exchange)
        self._finished.append(exchange)

class Progress:
    """A line on a terminal's stderr that says how far we are, drawn twice a second."""

    def __init__(self, console):
        self._output = console.err
        self._next = time.monotonic() + PROGRESS_SECONDS
        self._visible = console.err.styled and not console.quiet
        self._drawn = False

    def show(self, describe):
        """Draw what *describe* returns, if it is time."""
        now = time.monotonic()
        if self._visible and now >= self._next:
            self._next = now + PROGRESS_SECONDS
            if self._output.in_foreground():
                self._drawn = True
                line = truncate(describe(), self._output.width() - 1)
                self._output.draw(f"\r{line}\x1b[K")

    def clear(self):
        """Erase the line, before something else is written."""
        if self._drawn:
            self._drawn = False
            self._output.draw("\r\x1b[K")
# -- Batch ------------------------------------------------------------------------------------

GRACE_SECONDS = 5  # for requests in flight, once no more are sent
HELD_RESULTS = 16  # that --ordered may keep back, for each connection
RATE_LIMIT_TRIES = 5  # for each of --retries, where the server says when to come back
LINE_ENDS = r"[\\\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"  # and the backslash that escapes them

class BatchRequest:
    """One line of the input: its names in the results, what is sent, and the tries so far."""

    def __init__(self, number, custom_id, request, error=None, line=b""):
        from hashlib import sha256

        self.custom_id = str(number) if custom_id is None else custom_id
        self.number = number
        self.request = request
        self.error = error  # why the line cannot be sent, or None
        content = line if error else request.body
        self.id = "req_" + sha256(b"%d\n%b" % (number, content)).hexdigest()[:24]
        self.place = None  # in the order of the results
        self.failures = 0
        self.answers_before = 0  # answers to others at the last time that a rate limit was met

    @property
    def key(self):
        """What tells it from all others in a file of results."""
        return result_key(self.custom_id, self.id)

def result_key(custom_id, name):
    """Return what tells the request with these two names from all others."""
    return json.dumps([custom_id, name])

def _find_custom_id(document):
    for name in ("custom_id", "id"):
        custom_id = document.get(name)
        if isinstance(custom_id, (str, int, float)):
            return custom_id
        if custom_id is not None:
            raise ValueError(f"its {name} is neither text nor a number")
    return None

def _find_messages(document):
    """Return the (messages, other body fields) of a line's object; raise ValueError."""
    fields = {}
    if "body" in document:
        if not isinstance(document["body"], dict):
            raise ValueError("its body is no object")
        if document.get("method", "POST") != "POST":
            raise ValueError("its method is not POST")
        if not str(document.get("url", CHAT_PATH)).endswith(CHAT_PATH):
            raise ValueError(f"its url does not end in {CHAT_PATH}")
        fields = dict(document["body"])
        for name in ("stream", "stream_options"):
            fields.pop(name, None)
        messages = fields.pop("messages", None)
    elif "messages" in document:
        messages = document["messages"]
    else:
        messages = [{"role": "user", "content": document.get("message", document.get("prompt"))}]
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has no messages")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("one of its messages is no object")
    if fields or "messages" in document:
        return messages, fields
    content = messages[0].get("content")
    if not isinstance(content, (str, list)) or not content:
        raise ValueError("it has no message, prompt, messages or body, or an empty one")
    return messages, fields

def _build_line_request(document, sampling, settings, system):
    messages, fields = _find_messages(document)
    roles = [message.get("role") for message in messages]
    if system is not None and "system" not in roles and "developer" not in roles:
        messages = [{"role": "system", "content": system}] + messages
    model = fields.pop("model", None) or sampling.model
    merged = dict(sampling.fields)
    merged.update(fields)
    sampling = sampling._replace(model=model, fields=merged)
    return build_chat_request(sampling, settings, messages, False)

def parse_batch_line(number, line, sampling, settings, system=None):
    """Return the BatchRequest of the bytes *line*, the *number*th of the input.

    *sampling* and the message *system* count where the line has nothing of its own.
    """
    custom_id = None
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
        document = {"message": text}
        if text.startswith("{"):
            document = parse_json(text)
            custom_id = _find_custom_id(document)
        request = _build_line_request(document, sampling, settings, system)
    except ValueError as error:
        reason = f"line {number} cannot be sent: {error}"
        return BatchRequest(number, custom_id, None, UnusableInputError(reason), line)
    return BatchRequest(number, custom_id, request)

def build_result(request, error, exchange=None):
    """Return the JSON document that tells what came of the BatchRequest *request*.

    The *exchange* is None where it was not sent.
    """
    response = None
    if exchange is not None and exchange.head is not None:
        body = exchange.document
        if body is None and exchange.error_body:
            body = exchange.error_body.decode("utf-8", "replace")
            with contextlib.suppress(ValueError):
                body = parse_json(body)
        response = {"status_code": exchange.head.status,
                    "request_id": exchange.head.headers.get("x-request-id"), "body": body}
    described = None
    if error is not None:
        described = {"kind": error.kind, "message": str(error), "code": error.code,
                     "status": error.status, "request_id": error.request_id}
    return {"id": request.id, "custom_id": request.custom_id, "response": response,
            "error": described}

def escape_line_ends(text):
    """Return *text* as one line: its line ends and backslashes escaped as in JSON."""
    return re.sub(LINE_ENDS, _escape_in_json, text)

def _escape_in_json(match):
    return json.dumps(match.group())[1:-1]

class LineReader:
    """Reads the lines of a descriptor as they are needed, without a wait."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.ended = False
        self.read_bytes = 0
        self.blank_lines = 0
        self._number = 0
        self._pieces = []  # of a line whose end has not come
        self._lines = []  # the next one last

    def next_line(self):
        """Return the next (number, line), or None if it is not there yet, or at the end."""
        while True:
            while self._lines:
                line = self._lines.pop()
                self._number += 1
                if line.strip():
                    return self._number, line
                self.blank_lines += 1
            if self.ended or not self._is_ready():
                return None
            self._read()

    def is_exhausted(self):
        """Tell whether next_line() has no more to give."""
        return self.ended and not self._lines

    def _is_ready(self):
        return os.name != "posix" or bool(poll_once([self.descriptor], [], 0)[0])

    def _read(self):
        try:
            data = os.read(self.descriptor, READ_BYTES)
        except BlockingIOError:  # another process reads from it too
            return
        except OSError as error:
            raise UsageError(f"cannot read the requests: {os_reason(error)}") from error
        self.read_bytes += len(data)
        self.ended = not data
        self._pieces.append(data)
        if b"\n" in data or self.ended:
            lines = b"".join(self._pieces).split(b"\n")
            self._pieces = [lines.pop()]
            if self.ended and self._pieces[0]:
                lines += self._pieces
            self._lines = lines[::-1]

class Throttle:
    """How many requests may be in flight: half as many at each 429, then slowly more again.

    A 429 also makes all wait.  Times are monotonic.
    """

    def __init__(self, most):
        self.limit = float(most)
        self.closed_until = 0
        self._most = most
        self._lowered_at = 0

    def has_room(self, in_flight, now):
        """Tell whether another request may be sent at the time *now*."""
        return now >= self.closed_until and in_flight < int(self.limit)

    def note_answer(self):
        """Let in a little more: one request more for each round of answers."""
        self.limit = min(self._most, self.limit + 1 / self.limit)

    def note_refusal(self, sent_at, seconds, now):
        """Close for *seconds*, and halve the limit once for all requests that were in flight."""
        self.closed_until = max(self.closed_until, now + seconds)
        if sent_at >= self._lowered_at:
            self._lowered_at = now
            self.limit = max(1.0, self.limit / 2)

class ResultWriter:
    """Writes lines of results to a descriptor, whole ones in any event, in order if asked to.

    It keeps what an interrupt left unwritten.
    """

    def __init__(self, descriptor, console, progress, ordered):
        self.held = {}  # place -> line, until those before it are there
        self._descriptor = descriptor  # None: the terminal at stdout
        self._console = console
        self._progress = progress
        self._ordered = ordered
        self._next_place = 0
        self._unwritten = b""

    def add(self, place, line):
        """Take a line, the *place*th in the order of the requests."""
        if not self._ordered:
            self._unwritten += line
            return
        self.held[place] = line
        while self._next_place in self.held:
            self._unwritten += self.held.pop(self._next_place)
            self._next_place += 1

    def release(self, filler):
        """Let go of all that is held back, with *filler* in the place of a line that is missing."""
        for place in range(self._next_place, max(self.held, default=-1) + 1):
            self._unwritten += self.held.pop(place, filler)

    def flush(self):
        """Write what there is; raise as Console.write(), and as Waiter.wait()."""
        if self._unwritten and self._descriptor is None:
            self._progress.clear()
            text, self._unwritten = self._unwritten.decode("utf-8"), b""
            self._console.write(text)
        while self._unwritten:
            if os.name == "posix":
                self._console.waiter.wait([], [self._descriptor])
            try:
                sent = os.write(self._descriptor, self._unwritten[:PIPE_BYTES])
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OutputError(f"cannot write the results: {os_reason(error)}") from error
            self._unwritten = self._unwritten[sent:]

def read_answered(path):
    """Return the keys of the requests that the file *path* has an answer for.

    A last line that is half written is cut off.  Raise UsageError for a file of something else.
    """
    answered = set()
    good_bytes = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                result = parse_json(line.decode("utf-8"))
                key = result_key(result["custom_id"], result["id"])
                if result["response"] and not result["error"]:
                    answered.add(key)
            except (ValueError, LookupError, TypeError):
                if line.endswith(b"\n"):
                    raise UsageError(f"{utf8_argument(path)} holds other things than results of "
                                     "batch: give --results another file") from None
                break
            good_bytes += len(line)
            if not line.endswith(b"\n"):
                with open(path, "ab") as end:
                    end.write(b"\n")
                return answered
    os.truncate(path, good_bytes)
    return answered

class Batch:
    """A run of the command batch: requests from a LineReader, results to a ResultWriter."""

    def __init__(self, build, settings, console, reader, writer, progress, limits):
        self._build = build  # (number, line) -> BatchRequest
        self._settings = settings
        self._console = console
        self._reader = reader
        self._writer = writer
        self._progress = progress
        self._limits = limits  # BatchLimits
        self._throttle = Throttle(limits.concurrency)
        self._loop = None
        self._watches_input = False
        self._asked = {}  # Exchange -> BatchRequest
        self._again = []  # (monotonic time, BatchRequest) of those that are tried again
        self._places = 0
        self._stops_at = None  # monotonic time at which requests in flight are dropped
        self._started = time.monotonic()
        self.answered_keys = set()  # asked before
        self.skipped = self.answered = self.failed = self.tokens_in = self.tokens_out = 0
        self.first_failure = None  # (number of the line, exit status)

    def run(self):
        """Ask everything; raise the KeyboardInterrupt or Terminated that ended it early."""
        ending = None
        self._loop = RequestLoop(self._console.waiter)
        with contextlib.closing(self._loop):
            while not self._is_done():
                try:
                    self._take_turn()
                except (KeyboardInterrupt, Terminated) as interrupt:
                    self.stop_asking()
                    if ending:
                        self._stops_at = 0
                    elif self._asked:
                        self._say_waiting()
                    ending = ending or interrupt
        self._finish()
        if ending:
            raise ending

    def stop_asking(self):
        """Send no more requests; those in flight have some seconds."""
        self._again = []
        if self._stops_at is None:
            self._stops_at = time.monotonic() + GRACE_SECONDS

    def _is_done(self):
        if self._stops_at is not None:
            return not self._asked or time.monotonic() >= self._stops_at
        return self._reader.is_exhausted() and not self._asked and not self._again

    def _take_turn(self):
        self._writer.flush()
        if self._stops_at is None:
            self._launch()
        for exchange in self._loop.turn(self._wake_time()):
            self._take(exchange)
        self._progress.show(self._describe)

    def _finish(self):
        self._writer.release(self._limits.filler)
        with contextlib.suppress(KeyboardInterrupt, Terminated):
            self._writer.flush()
        self._progress.clear()

    # What is asked

    def _launch(self):
        now = time.monotonic()
        while self._throttle.has_room(len(self._asked), now):
            request = self._next_request(now)
            if request is None:
                return
            exchange = Exchange(request.request, self._limits.route, self._settings)
            self._asked[exchange] = request
            self._loop.start(exchange)

    def _next_request(self, now):
        if self._again and self._again[0][0] <= now:
            return self._again.pop(0)[1]
        self._watch_input(False)
        held = len(self._writer.held) + len(self._asked) + len(self._again)
        while len(self._asked) + len(self._again) < self._limits.concurrency:
            if held >= HELD_RESULTS * self._limits.concurrency or self._stops_at is not None:
                return None
            numbered = self._reader.next_line()
            if numbered is None:
                self._watch_input(not self._reader.ended)
                return None
            request = self._build(*numbered)
            if request.key in self.answered_keys:
                self.skipped += 1
                continue
            request.place = self._places
            self._places += 1
            if request.error is None:
                return request
            self._put_failure(request, request.error)
        return None

    def _watch_input(self, on):
        if on == self._watches_input:
            return
        try:
            if on:
                self._loop.watch(self._reader.descriptor)
            else:
                self._loop.unwatch(self._reader.descriptor)
            self._watches_input = on
        except (OSError, ValueError):  # a file, or not POSIX: it is always ready
            pass

    def _wake_time(self):
        now = time.monotonic()
        if self._stops_at is not None:
            return self._stops_at
        times = [now + PROGRESS_SECONDS]
        if self._again:
            times.append(max(self._again[0][0], self._throttle.closed_until))
        elif self._throttle.closed_until > now:
            times.append(self._throttle.closed_until)
        return min(times)

    # What comes back

    def _take(self, exchange):
        request = self._asked.pop(exchange)
        error = exchange.error
        try:
            if error is None:
                exchange.reply.check_answer()
        except XeroctlError as no_answer:
            error = no_answer
        if error is None:
            self._throttle.note_answer()
            self._put_answer(request, exchange)
            return
        seconds = self._delay_before_retry(request, error)
        now = time.monotonic()
        if isinstance(error, RateLimitError) and seconds is not None:
            self._throttle.note_refusal(exchange.sent_at, seconds, now)
        if seconds is None:
            self._put_failure(request, error, exchange)
        else:
            self._again.append((now + seconds, request))
            self._again.sort(key=_retry_time)

    def _delay_before_retry(self, request, error):
        """Return the seconds until *request* is tried again, or None where it has failed."""
        from random import random

        after = error.retry_after
        if not is_retryable_now(error) or self._stops_at is not None:
            return None
        tries = self._settings.retries
        if isinstance(error, RateLimitError):
            if self.answered > request.answers_before:  # the limit lets some through
                request.failures = 0
            request.answers_before = self.answered
            if after is not None:
                tries *= RATE_LIMIT_TRIES
        request.failures += 1
        if request.failures > tries:
            return None
        return retry_delay(request.failures, after, random())

    def _put_answer(self, request, exchange):
        self.answered += 1
        usage = exchange.reply.usage
        if usage:
            self.tokens_in += usage.prompt or 0
            self.tokens_out += usage.completion or 0
        self._put(request, None, exchange)

    def _put_failure(self, request, error, exchange=None):
        self.failed += 1
        failure = request.number, error.exit_status
        if self.first_failure is None or failure < self.first_failure:
            self.first_failure = failure
        self._put(request, error, exchange)
        if self.failed == self._limits.max_failures:
            self.stop_asking()

    def _put(self, request, error, exchange):
        if self._limits.as_text:
            line = "" if error else escape_line_ends(exchange.reply.text)
        else:
            line = json_text(build_result(request, error, exchange))
        self._writer.add(request.place, (line + "\n").encode("utf-8", "replace"))

    # What is told

    def _say_waiting(self):
        self._progress.clear()
        count = plural(len(self._asked), "request")
        self._console.print_line(f"waiting up to {GRACE_SECONDS} s for {count} in flight; "
                                 "another Ctrl+C drops them")

    def _describe(self):
        line = f"{self.summary()}, {len(self._asked)} in flight"
        if self._limits.input_bytes and self._reader.read_bytes:
            share = min(1, self._reader.read_bytes / self._limits.input_bytes)
            seconds = time.monotonic() - self._started
            line += f", about {seconds / share - seconds:.0f} s left"
        return line

    def summary(self):
        """Return one line: how many are done, failed and skipped, how fast, and the tokens."""
        seconds = time.monotonic() - self._started
        done = self.answered + self.failed
        parts = [f"{done} done", f"{self.failed} failed"]
        if self.skipped:
            parts.append(f"{self.skipped} answered before")
        if self._reader.blank_lines:
            parts.append(plural(self._reader.blank_lines, "blank line"))
        parts.append(f"{done / max(seconds, 0.001):.1f}/s")
        parts.append(f"{self.tokens_in} tokens in, {self.tokens_out} out")
        return ", ".join(parts)

def _retry_time(waiting):
    return waiting[0]

BatchLimits = namedtuple("BatchLimits", [
    "route",         # to the endpoint
    "concurrency",
    "max_failures",  # or None
    "input_bytes",   # length of the input, or None where it is not known
    "as_text",       # True: answers alone, in place of JSON
    "filler",        # line that stands for a result that is missing
])

@contextlib.contextmanager
def open_requests(path):
    """Yield the (descriptor, length or None) of the input *path*; '-' or None is stdin."""
    import stat

    if path in (None, "-"):
        descriptor = 0
    else:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UsageError(f"cannot read {utf8_argument(path)}: {os_reason(error)}") from error
    try:
        length = None
        with contextlib.suppress(OSError):  # closed: reading it will tell
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode):
                length = status.st_size - os.lseek(descriptor, 0, os.SEEK_CUR)
        yield descriptor, length
    finally:
        if descriptor:
            os.close(descriptor)

@contextlib.contextmanager
def open_results(path, console):
    """Yield the (descriptor, answered keys) of the file *path*, made if missing; None is stdout.

    The descriptor is None where stdout is a terminal.
    """
    if path is None:
        yield None if console.out.is_terminal else 1, set()
        return
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise UsageError(f"cannot write {utf8_argument(path)}: {os_reason(error)}") from error
    try:
        with locked(path) as is_ours:
            if not is_ours:
                raise UsageError(f"another process writes to {utf8_argument(path)}")
            yield descriptor, read_answered(path)
    finally:
        os.close(descriptor)

def run_batch(options, console):
    """Ask a question for each line of the input; return the exit status of the first failure."""
    as_text = options.output in ("text", "table")
    if as_text and options.results:
        raise UsageError("-o text goes to standard output: give --results or -o text, not both")
    load_schema(options)
    allow_connections(options.concurrency)
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(open_settings(options, console))
        build = functools.partial(parse_batch_line, sampling=build_sampling(options),
                                  settings=settings, system=system_prompt(options))
        descriptor, length = stack.enter_context(open_requests(options.file))
        reader = LineReader(descriptor)
        if settings.dry_run:
            return _show_requests(reader, build, settings, console)
        output, answered = stack.enter_context(open_results(options.results, console))
        filler = b"\n" if as_text else b""
        route = find_route(endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH))
        limits = BatchLimits(route, options.concurrency, options.max_failures, length, as_text,
                             filler)
        progress = Progress(console)
        writer = ResultWriter(output, console, progress, as_text or options.ordered)
        batch = Batch(build, settings, console, reader, writer, progress, limits)
        batch.answered_keys = answered
        try:
            batch.run()
        finally:
            progress.clear()
            if not console.quiet:
                console.print_line(batch.summary(), dim=True)
    return batch.first_failure and batch.first_failure[1]

def _show_requests(reader, build, settings, console):
    while not reader.ended:
        numbered = reader.next_line()
        if numbered is None:
            console.waiter.wait([reader.descriptor])
            continue
        request = build(*numbered)
        if request.error:
            raise request.error
        send_dry_run(request.request, settings, console)
# -- Bench ------------------------------------------------------------------------------------

DEFAULT_CONCURRENCY = 4
DEFAULT_DURATION_SECONDS = 30
DEFAULT_PROMPT_TOKENS = 128
DEFAULT_BENCH_MAX_TOKENS = 128
MADE_UP_PROMPTS = 32  # that take turns
DRAIN_SECONDS = 30  # for requests in flight at the end of a run
REST_SECONDS = 1  # of a slot after a failure
FAILURES_TO_STOP = 20  # in a row
MAX_UNFINISHED = 1000  # with --rate
MAX_LAG_MS = 5  # at p99: over it the figures are not to be trusted
RESAMPLES = 2000
REPORT_COLUMNS = 80
UNFINISHED = "unfinished"  # in place of an error, as NOT_SENT
NOT_SENT = "not sent"
BENCH_TIMES = ("ttft", "tpot", "itl", "e2e", "wait", "connect")
BENCH_STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max", "min")
LAG_STATISTICS = ("p50", "p99", "max")
LOAD_OPTIONS = ("concurrency", "rate", "duration", "requests", "warmup", "prompt_tokens",
                "max_tokens", "cached", "seed", "no_keepalive", "model")  # that --save keeps
BENCH_WORDS = ("time river stone light quick green table seven paper north cloud music field "
               "early glass white train happy small bread ocean plain round sharp winter garden "
               "number letter doctor simple yellow market").split()

BenchRequest = namedtuple("BenchRequest", [  # one request of a run; times in milliseconds
    "run",            # id of the run
    "endpoint",
    "load",           # such as "c=16" or "rate=50"
    "start_ms",       # when it was due, since the run began
    "wait_ms",        # from then to its first byte sent
    "connect_ms",     # or None where its connection was open already
    "ttft_ms",        # from due to the first chunk with text or reasoning
    "e2e_ms",         # from due to the last one
    "itl_ms",         # list: from each such chunk to the next
    "input_tokens",   # or None where the server does not tell
    "cached_tokens",
    "output_tokens",  # chunks where the server does not tell tokens
    "exact",          # False: they are chunks
    "finish_reason",
    "error",          # None, a kind such as "rate_limit (HTTP 429)", UNFINISHED or NOT_SENT
])

BenchRun = namedtuple("BenchRun", [
    "run",
    "load",
    "began",      # seconds since 1970
    "window_ms",  # [end of the ramp, last launch] since then
    "slo",        # None, or {"ttft_ms", "tpot_ms"}
    "lag_ms",     # how late the loop woke: {"p50", "p99", "max"}
    "version",
    "options",    # LOAD_OPTIONS and their values
    "requests",   # list of BenchRequest
])

Condition = namedtuple("Condition", "text metric sign limit is_percent")  # of --fail-if

# What the options say

def parse_loads_whole(text):
    """Return the whole numbers of "N[,N...]" (for argparse's type=)."""
    return _parse_numbers(text, int, "whole numbers from 1 to 10000, with commas")

def parse_rates(text):
    """Return the numbers of "R[,R...]" (for argparse's type=)."""
    return _parse_numbers(text, float, "numbers from 0.001 to 10000, with commas")

def _parse_numbers(text, convert, words):
    values = []
    for part in text.split(","):
        with contextlib.suppress(ValueError):
            values.append(convert(part))
        if not values or not 0.001 <= values[-1] <= 10000:
            raise argparse.ArgumentTypeError(f"must be {words}")
    if len(values) < len(text.split(",")):
        raise argparse.ArgumentTypeError(f"must be {words}")
    return values

def parse_condition(text):
    """Return the Condition in *text*, such as "ttft.p95>800" (for argparse's type=)."""
    match = re.match(r"([a-z0-9./]+) *(<=|>=|<|>) *(\d+(?:\.\d+)?) *(%?)\Z", text.strip())
    if not match:
        raise argparse.ArgumentTypeError("must be like 'ttft.p95>800', 'errors>1%' or 'tok/s<200'")
    metric, sign, limit, percent = match.groups()
    name, _, statistic = metric.partition(".")
    is_known = metric in ("tok/s", "req/s", "errors", "slo")
    if name in BENCH_TIMES:
        is_known = statistic in BENCH_STATISTICS
    elif name == "lag":
        is_known = statistic in LAG_STATISTICS
    if not is_known:
        raise argparse.ArgumentTypeError(
            f"has no metric {metric}: there are {', '.join(BENCH_TIMES)}, each with one of "
            f".{' .'.join(BENCH_STATISTICS)}; lag.{' .'.join(LAG_STATISTICS)}; tok/s; req/s; "
            "errors; slo")
    if percent and metric not in ("errors", "slo"):
        raise argparse.ArgumentTypeError(f"must have no % for {metric}")
    return Condition(text, metric, sign, float(limit), bool(percent))

def count_of(metric, result):
    """Return the (count, total) of the requests that failed, or that met the targets."""
    if metric == "slo":
        slo = result["slo"] or {"met": 0, "of": 0}
        return slo["met"], slo["of"]
    failed = sum(result["errors"].values())
    return failed, failed + result["ok"]

def metric_value(condition, result, lag_ms):
    """Return the number that *condition* is about, in ms for times; None where there is none."""
    metric = condition.metric
    name, _, statistic = metric.partition(".")
    if name == "lag":
        return lag_ms[statistic]
    if name in BENCH_TIMES:
        return result[name + "_ms"][statistic]
    if metric == "tok/s":
        return result["output_tokens_per_second"]
    if metric == "req/s":
        return result["requests_per_second"]
    count, total = count_of(metric, result)
    if not total:
        return None
    if condition.is_percent:
        return 100 * count / total
    return count

def condition_holds(condition, result, lag_ms):
    """Tell whether *condition* holds for a result."""
    value = metric_value(condition, result, lag_ms)
    if value is None:
        return False
    if value == condition.limit:
        return condition.sign in ("<=", ">=")
    return (value < condition.limit) == (condition.sign in ("<", "<="))

# Arithmetic

def chunk_count(request):
    """Return how many chunks with text or reasoning the BenchRequest brought."""
    if request.ttft_ms is None:
        return 0
    return len(request.itl_ms) + 1

def tpot_ms(request):
    """Return the time per output token of a request, or None for a single chunk.

    It is the time from the first chunk to the last, over the tokens that came in it: all but those
    of the first chunk.
    """
    chunks = chunk_count(request)
    if chunks < 2 or not request.output_tokens:
        return None
    later_tokens = request.output_tokens * (chunks - 1) / chunks
    return sum(request.itl_ms) / later_tokens

def overlap(begin, end, other_begin, other_end):
    """Return the length that two spans have in common."""
    return max(0, min(end, other_end) - max(begin, other_begin))

def window_rates(requests, window_ms, chunk_tokens, usual_ms):
    """Return the (tokens, requests) per second inside the window; (None, None) if it is empty.

    A token counts where its chunk falls, a request by the share of its time.  An unfinished one
    counts as if its chunks held *chunk_tokens*, and as if it took *usual_ms* in all.
    """
    begin, end = window_ms
    if end <= begin:
        return None, None
    tokens = share = 0
    for request in requests:
        if request.error not in (None, UNFINISHED) or request.ttft_ms is None:
            continue
        at = request.start_ms + request.ttft_ms
        hits = int(begin <= at <= end)
        for gap in request.itl_ms:
            at += gap
            if begin <= at <= end:
                hits += 1
        whole_ms = max(at - request.start_ms, 0.001)
        if request.error == UNFINISHED:
            whole_ms = max(whole_ms, usual_ms)
            tokens += hits * chunk_tokens
        else:
            tokens += hits * request.output_tokens / chunk_count(request)
        share += overlap(request.start_ms, at, begin, end) / whole_ms
    seconds = (end - begin) / 1000
    return tokens / seconds, share / seconds

def run_window(run, requests):
    """Return the window of *run*; where all were launched in the ramp, the time they took."""
    begin, end = run.window_ms
    if end > begin or not requests:
        return begin, end
    ends = [request.start_ms + (request.e2e_ms or 0) for request in requests]
    return min(request.start_ms for request in requests), max(ends)

def merge_rates(spans):
    """Return (tokens per second, requests per second, seconds, number of groups) of *spans*.

    Each is (begin, end, tokens per second, requests per second) of one run, in seconds.  Runs that
    overlap by half are a group, whose rates are summed; groups are averaged.
    """
    groups = []
    for span in sorted(spans):
        begin, end = span[:2]
        for group in groups:
            shorter = min(end - begin, group[0][1] - group[0][0])
            if overlap(begin, end, *group[0][:2]) >= shorter / 2:
                group.append(span)
                break
        else:
            groups.append([span])
    if not groups:
        return None, None, 0, 0
    tokens = sum(span[2] for span in spans) / len(groups)
    requests = sum(span[3] for span in spans) / len(groups)
    seconds = sum(max(span[1] - span[0] for span in group) for group in groups)
    return tokens, requests, seconds, len(groups)

def count_errors(requests):
    """Return how often each error happened."""
    counts = {}
    for request in requests:
        if request.error not in (None, UNFINISHED, NOT_SENT):
            counts[request.error] = counts.get(request.error, 0) + 1
    return counts

def meets_targets(request, slo):
    """Tell whether a request ended well, and within the targets *slo*."""
    if request.error is not None:
        return False
    for value, target in ((request.ttft_ms, slo["ttft_ms"]), (tpot_ms(request), slo["tpot_ms"])):
        if value is not None and target is not None and value > target:
            return False
    return True

def count_slo(requests, slo):
    """Return the targets with how many of *requests*, of all that ended, met them, or None."""
    if not slo:
        return None
    ended = [one for one in requests if one.error not in (UNFINISHED, NOT_SENT)]
    met = [one for one in ended if meets_targets(one, slo)]
    return dict(slo, met=len(met), of=len(ended))

class BenchSet:
    """The requests of one endpoint at one load, from one run or from several."""

    def __init__(self, endpoint, load, runs):
        self.endpoint = endpoint
        self.load = load
        self.name = f"{endpoint} {load}"
        self.runs = [run for run in runs if run.load == load]
        self.requests = []
        for run in self.runs:
            self.requests += self._of(run)
        self.good = [request for request in self.requests if request.error is None]

    def values(self, name):
        """Return the known values of a field, or of "tpot_ms", of the requests that ended well."""
        if name == "tpot_ms":
            values = map(tpot_ms, self.good)
        else:
            values = [getattr(request, name) for request in self.good]
        return [value for value in values if value is not None]

    def result(self):
        """Return the result as -o json has it, with "groups", the number of runs in a row."""
        errors = [request.error for request in self.requests]
        chunks = sum(map(chunk_count, self.good))
        output = sum(self.values("output_tokens"))
        chunk_tokens = output / chunks if chunks else None
        tokens_rate, request_rate, seconds, groups = self._rates(chunk_tokens)
        gaps = [gap for request in self.good for gap in request.itl_ms]
        connects = [one.connect_ms for one in self.requests if one.connect_ms is not None]
        return {
            "endpoint": self.endpoint,
            "load": self.load,
            "requests": len(self.requests) - errors.count(NOT_SENT),
            "ok": len(self.good),
            "unfinished": errors.count(UNFINISHED),
            "not_sent": errors.count(NOT_SENT),
            "errors": count_errors(self.requests),
            "seconds": seconds,
            "ttft_ms": summary(self.values("ttft_ms")),
            "tpot_ms": summary(self.values("tpot_ms")),
            "itl_ms": summary(gaps),
            "e2e_ms": summary(self.values("e2e_ms")),
            "wait_ms": summary(self.values("wait_ms")),
            "connect_ms": summary(connects),
            "output_tokens_per_second": tokens_rate,
            "requests_per_second": request_rate,
            "input_tokens": sum(self.values("input_tokens")),
            "output_tokens": output,
            "cached_tokens": sum(self.values("cached_tokens")),
            "exact": all(request.exact for request in self.good),
            "tokens_per_chunk": chunk_tokens,
            "slo": count_slo(self.requests, self.runs[0].slo),
            "groups": groups,
        }

    def notes(self, result):
        """Return sentences on what a reader of *result* may not expect."""
        notes = []
        if 0 < result["ok"] < 100:
            requests = plural(result["ok"], "request")
            notes.append(f"p99 of {requests} is little more than their slowest one")
        if not result["exact"]:
            notes.append("the server tells no token counts: ~ marks counts of chunks")
        elif abs((result["tokens_per_chunk"] or 1) - 1) > 0.05:
            tokens = f"{result['tokens_per_chunk']:.1f}"
            notes.append(f"ITL is by chunk, and a chunk holds {tokens} tokens")
        if result["groups"] > 1:
            notes.append(f"rates are averages of {result['groups']} runs, one after the other")
        if result["not_sent"]:
            notes.append(f"{result['not_sent']} not sent while {MAX_UNFINISHED} were unfinished")
        return [f"{self.name}: {note}" for note in notes]

    def _of(self, run):
        return [request for request in run.requests if request.endpoint == self.endpoint]

    def _rates(self, chunk_tokens):
        ends = self.values("e2e_ms")
        usual_ms = sum(ends) / len(ends) if ends else 0
        spans = []
        for run in self.runs:
            begin, end = run_window(run, self._of(run))
            rates = window_rates(self._of(run), (begin, end), chunk_tokens or 1, usual_ms)
            if rates[0] is not None:
                spans.append((run.began + begin / 1000, run.began + end / 1000) + rates)
        return merge_rates(spans)

def compare_medians(values, others, random):
    """Return by how many percent the median of *values* is above that of *others*: (it, low, high).

    The bounds hold 95 % of what resampling both gives (bootstrap).  The median of n values drawn
    from n sorted ones is drawn at once: its rank follows a Beta distribution.
    """
    changes = []
    for _ in range(RESAMPLES):
        medians = []
        for ordered in (sorted(values), sorted(others)):
            middle = len(ordered) // 2 + 1
            rank = random.betavariate(middle, len(ordered) - middle + 1)
            medians.append(ordered[min(int(rank * len(ordered)), len(ordered) - 1)])
        changes.append(_percent_above(*medians))
    changes.sort()
    change = _percent_above(percentile(sorted(values), 50), percentile(sorted(others), 50))
    return change, percentile(changes, 2.5), percentile(changes, 97.5)

def _percent_above(value, other):
    return 100 * (value / max(other, 1e-9) - 1)

# Saved runs

def save_lines(run):
    """Return the text that saves a BenchRun: a line of JSON for its head, and one a request."""
    head = run._asdict()
    del head["requests"]
    lines = [json_text(head)]
    for request in run.requests:
        lines.append(json_text(_round_times(request._asdict())))
    return "\n".join(lines) + "\n"

def _round_times(fields):
    rounded = {}
    for name, value in fields.items():
        if isinstance(value, float):
            value = round(value, 3)
        elif name == "itl_ms":
            value = [round(gap, 3) for gap in value]
        rounded[name] = value
    return rounded

def parse_saved_runs(text, path):
    """Return the BenchRuns that *text*, read from *path*, holds; raise UsageError for others.

    A last line that is half written is left out.
    """
    runs = {}
    lines = text.split("\n")
    try:
        for line in filter(None, lines[:-1]):
            fields = parse_json(line)
            if "began" in fields:
                known = [fields[name] for name in BenchRun._fields[:-1]]
                runs[fields["run"]] = BenchRun(*known, requests=[])
            else:
                request = BenchRequest(*[fields[name] for name in BenchRequest._fields])
                runs[request.run].requests.append(request)
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} holds other things than lines of bench --save") from error
    return list(runs.values())

# A run

def build_prompts(tokens, random):
    """Return some made-up prompts of about as many *tokens*; *random* is a random.Random."""
    prompts = []
    for _ in range(MADE_UP_PROMPTS):
        prompts.append(" ".join(random.choice(BENCH_WORDS) for _ in range(tokens)))
    return prompts

class BenchTarget:
    """An endpoint that a run asks: its prompts, its slots or arrivals, and what came of it."""

    def __init__(self, settings, sampling, prompts, options):
        from random import Random

        self.settings = settings
        self.endpoint = settings.endpoint
        self.takes_stream_options = True
        self.free_at = []  # monotonic times at which a slot is free, or of the next arrival
        self.sent = self.in_flight = self.failures = 0  # failures in a row
        self.requests = []  # BenchRequest, those that ended
        self.arrivals = Random()
        self._route = find_route(endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH))
        self._sampling = sampling
        self._prompts = prompts or build_prompts(
            options.prompt_tokens or DEFAULT_PROMPT_TOKENS, Random(options.seed))
        self._options = options
        self.restart()

    def restart(self):
        """Begin a run: the same prompts and arrivals again, and no requests yet."""
        self.arrivals.seed(self._options.seed)
        self.sent = self.in_flight = self.failures = 0
        self.requests = []

    def build_exchange(self, due=None):
        """Return the Exchange for the next prompt, due at a monotonic time."""
        messages = [{"role": "user", "content": self._next_prompt()}]
        if self._options.system is not None:
            messages.insert(0, {"role": "system", "content": self._options.system})
        request = build_chat_request(self._sampling, self.settings, messages, True)
        if not self.takes_stream_options:
            request = without_stream_options(request) or request
        self.sent += 1
        return Exchange(request, self._route, self.settings, due)

    def _next_prompt(self):
        prompt = self._prompts[self.sent % len(self._prompts)]
        if self._options.cached:
            return prompt
        return f"{os.urandom(4).hex()} {prompt}"

def find_failure(exchange):
    """Return the error of an ended exchange, or None.  Reasoning alone is no failure here."""
    if exchange.error is None:
        try:
            exchange.reply.check_answer()
        except ServerError as error:
            if not exchange.arrivals:
                return error
        except CutShortError as error:
            return error
    return exchange.error

def describe_failure(error):
    """Return how a report names *error*, None or an XeroctlError: its kind, and HTTP status."""
    if error is None:
        return None
    if error.status:
        return f"{error.kind} (HTTP {error.status})"
    return error.kind

def milliseconds(since, at):
    """Return the milliseconds from one monotonic time to another, or None if one is None."""
    if since is None or at is None:
        return None
    return 1000 * (at - since)

def gaps_between(arrivals):
    """Return the milliseconds from each chunk to the next; those of one read came together."""
    gaps = []
    last = None
    for at, count in arrivals:
        if last is not None:
            gaps.append(1000 * (at - last))
        gaps += [0.0] * (count - 1)
        last = at
    return gaps

class BenchRunner:
    """Runs one load against all targets at the same time, on the RequestLoop *loop*."""

    def __init__(self, loop, targets, load, options, progress):
        self.stopped = False  # by a signal, or by too many failures
        self.interrupt = None  # KeyboardInterrupt or Terminated
        self._loop = loop
        self._targets = targets
        self._kind, self._amount = load  # "c" and a number of slots, or "rate" and one a second
        self._load = f"{self._kind}={self._amount:g}"
        self._options = options
        self._progress = progress
        self._run = os.urandom(6).hex()
        self._owners = {}  # Exchange -> BenchTarget
        self._duration = run_duration(options)
        self._began = self._ramp = self._stops_at = self._last_launch = 0

    def measure(self):
        """Return the BenchRun; *interrupt* is the signal that ended it early, or None."""
        import gc

        gc.collect()
        gc.disable()
        began = time.time()
        self._loop.restart_beats()
        try:
            self._begin()
            self._work()
        except (KeyboardInterrupt, Terminated) as error:
            self.interrupt = error
            self._last_launch = time.monotonic()
        finally:
            gc.enable()
        for exchange, target in self._owners.items():
            self._keep(exchange, target, UNFINISHED)
            self._loop.drop(exchange)
        return self._build_run(began)

    def _begin(self):
        self._began = time.monotonic()
        self._ramp = min(1, (self._duration or 10) / 10)
        self._stops_at = self._began + (self._duration or float("inf"))
        for target in self._targets:
            target.restart()
            target.free_at = [self._began]
            if self._kind == "c":
                steps = range(self._amount)
                target.free_at = [self._began + self._ramp * n / self._amount for n in steps]

    def _work(self):
        dropped_at = float("inf")
        while True:
            now = time.monotonic()
            launching = self._is_launching(now)
            if not launching and self._duration:
                dropped_at = min(dropped_at, now + DRAIN_SECONDS)
            if now >= dropped_at or not launching and not self._owners:
                return
            wake_at = min(dropped_at, now + PROGRESS_SECONDS)
            if launching:
                for target in self._targets:
                    wake_at = min(wake_at, self._launch(target, now))
            for exchange in self._loop.turn(wake_at):
                self._take(exchange)
            self._progress.show(self._describe)

    def _is_launching(self, now):
        if self.stopped or now >= self._stops_at:
            return False
        return any(self._wants_more(target) for target in self._targets)

    def _wants_more(self, target):
        return self._options.requests is None or target.sent < self._options.requests

    def _launch(self, target, now):
        """Start what is due, and return when the next one is."""
        while target.free_at and self._wants_more(target):
            due = min(target.free_at)
            if due > now:
                return due
            target.free_at.remove(due)
            if self._kind == "c":
                due = None
            else:
                target.free_at.append(due + target.arrivals.expovariate(self._amount))
                if target.in_flight >= MAX_UNFINISHED:
                    self._skip(target, due)
                    continue
            exchange = target.build_exchange(due)
            target.in_flight += 1
            self._owners[exchange] = target
            self._last_launch = now
            self._loop.start(exchange)
        return float("inf")

    def _take(self, exchange):
        target = self._owners.pop(exchange)
        target.in_flight -= 1
        error = find_failure(exchange)
        self._keep(exchange, target, describe_failure(error))
        rest = 0
        target.failures += 1
        if error is None:
            target.failures = 0
        elif error.retry_after is None:
            rest = REST_SECONDS
        else:
            rest = min(error.retry_after, MAX_RETRY_DELAY_SECONDS)
        if target.failures >= FAILURES_TO_STOP:
            self.stopped = True
        if self._kind == "c":
            target.free_at.append(time.monotonic() + rest)

    def _keep(self, exchange, target, error):
        reply = exchange.reply
        due = exchange.due
        if due is None:  # it never had a connection
            due = exchange.sent_at or time.monotonic()
        output = reply.usage.completion
        if output is None:
            output = reply.deltas
        target.requests.append(BenchRequest(
            self._run, target.endpoint, self._load,
            start_ms=milliseconds(self._began, due),
            wait_ms=milliseconds(due, exchange.sent_at),
            connect_ms=milliseconds(0, exchange.connect_seconds),
            ttft_ms=milliseconds(due, reply.first_at),
            e2e_ms=milliseconds(due, reply.last_at),
            itl_ms=gaps_between(exchange.arrivals),
            input_tokens=reply.usage.prompt,
            cached_tokens=reply.usage.cached,
            output_tokens=output,
            exact=reply.usage.completion is not None,
            finish_reason=reply.finish_reason,
            error=error))

    def _skip(self, target, due):
        blank = BenchRequest(*[None] * len(BenchRequest._fields))
        target.requests.append(blank._replace(
            run=self._run, endpoint=target.endpoint, load=self._load, error=NOT_SENT,
            start_ms=milliseconds(self._began, due), itl_ms=[]))

    def _build_run(self, began):
        options = self._options
        slo = None
        if options.slo_ttft is not None or options.slo_tpot is not None:
            slo = {"ttft_ms": options.slo_ttft, "tpot_ms": options.slo_tpot}
        lags = summary([round(1000 * seconds, 3) for seconds in self._loop.lags])
        window_ms = [1000 * self._ramp, milliseconds(self._began, self._last_launch)]
        requests = []
        for target in self._targets:
            requests += target.requests
        return BenchRun(
            self._run, self._load, began, window_ms, slo,
            lag_ms={name: lags[name] or 0 for name in LAG_STATISTICS},
            version=__version__,
            options={name: getattr(options, name) for name in LOAD_OPTIONS},
            requests=requests)

    def _describe(self):
        seconds = time.monotonic() - self._began
        until = f"{seconds:.0f} s"
        if self._duration:
            until = f"{seconds:.0f} of {self._duration:g} s"
        parts = []
        for target in self._targets:
            good = [one for one in target.requests if one.error is None]
            rate = sum(one.output_tokens for one in good) / seconds
            parts.append(f"{target.endpoint} {self._load} {until}: {len(good)} done, "
                         f"{target.in_flight} in flight, {len(target.requests) - len(good)} failed, "
                         f"{rate:.0f} tok/s")
        return "; ".join(parts)

def run_duration(options):
    """Return the seconds of a run, or None where --requests alone ends it."""
    if options.duration is None and options.requests is None:
        return DEFAULT_DURATION_SECONDS
    return options.duration

def warm_up(loop, target, count):
    """Send *count* requests to *target*, one after the other; raise the error of one that fails."""
    for _ in range(count):
        error = _ask_once(loop, target)
        if error and refuses_stream_options(error):
            target.takes_stream_options = False
            error = _ask_once(loop, target)
        if error:
            raise error

def _ask_once(loop, target):
    loop.start(target.build_exchange())
    finished = []
    while not finished:
        finished = loop.turn(time.monotonic() + PROGRESS_SECONDS)
    return find_failure(finished[0])

# The report

def build_bench_document(sets, conditions, interrupted):
    """Return what -o json prints on the BenchSets *sets*; the lag is that of the worst run."""
    results = [bench_set.result() for bench_set in sets]
    lag_ms = dict.fromkeys(LAG_STATISTICS, 0)
    for bench_set in sets:
        for run in bench_set.runs:
            for name in lag_ms:
                lag_ms[name] = max(lag_ms[name], run.lag_ms[name])
    failed = []
    for condition in conditions:
        if any(condition_holds(condition, result, lag_ms) for result in results):
            failed.append(condition.text)
    client = {"lag_ms": lag_ms, "trusted": lag_ms["p99"] <= MAX_LAG_MS}
    return {"client": client, "interrupted": interrupted, "failed_conditions": failed,
            "results": results}

def fixed(value, decimals, columns):
    """Return *value* right-aligned in *columns*, with fewer decimals if need be; "-" for None."""
    if value is None:
        return "-".rjust(columns)
    while decimals and len(f"{value:.{decimals}f}") >= columns:
        decimals -= 1
    return f"{value:{columns}.{decimals}f}"

def _row_line(result):
    """Return the figures of a row, without its last column."""
    cells = []
    for name in ("ttft_ms", "tpot_ms"):
        cells.append(fixed(result[name]["p50"], 1, 7))
        cells.append(fixed(result[name]["p95"], 1, 7))
    longest = result["e2e_ms"]["p95"]
    cells.append(fixed(longest and longest / 1000, 2, 7))
    rate = fixed(result["output_tokens_per_second"], 1, 7).strip()
    if not result["exact"]:
        rate = "~" + rate
    cells.append(rate.rjust(8))
    cells.append(fixed(result["requests_per_second"], 2, 7))
    return "".join(cells)

def report_table(results, styled):
    """Return the lines of the table of *results*, with styles for a terminal if asked for."""
    bold, red, reset = (BOLD, RED, RESET) if styled else ("", "", "")
    load_width = max(len(result["load"]) for result in results) + 2
    names = [one_line(result["endpoint"]) for result in results]
    widest = max(map(display_width, names + ["endpoint"]))
    width = min(widest + 1, REPORT_COLUMNS - load_width - 59)
    has_targets = any(result["slo"] for result in results)
    above, last = ("within", "targets") if has_targets else ("", "errors")
    head = "endpoint".ljust(width) + "load".ljust(load_width)
    blank = " " * (width + load_width)
    lines = [f"{bold}{blank}       TTFT ms       TPOT ms  E2E s  output{above:>16}{reset}",
             f"{bold}{head}    p50    p95    p50    p95    p95   tok/s  req/s{last:>9}{reset}"]
    for name, result in zip(names, results):
        name = truncate_middle(name, width - 1)
        padding = " " * (width - display_width(name))
        count, total = count_of("errors", result)
        cell = f"{count:9}"
        if result["slo"]:
            count, total = count_of("slo", result)
            cell = fixed(100 * count / total if total else None, 1, 7) + " %"
            if count < total:
                cell = red + cell + reset
        lines.append(f"{name}{padding}{result['load']:<{load_width}}{_row_line(result)}{cell}")
    return lines

def detail_lines(result):
    """Return the lines that tell the figures of one result in full."""
    statistics = BENCH_STATISTICS[:-1]
    lines = [" " * 12 + "".join(f"{name:>9}" for name in statistics)]
    labels = (("ttft", "TTFT ms"), ("tpot", "TPOT ms"), ("itl", "ITL ms"), ("e2e", "E2E s"),
              ("wait", "wait ms"), ("connect", "connect ms"))
    for name, label in labels:
        values = result[name + "_ms"]
        line = f"{label:<12}"
        for statistic in statistics if values["n"] else ():
            value = values[statistic]
            if label.endswith(" s"):
                value /= 1000
            line += fixed(value, 2, 9)
        if values["n"]:
            lines.append(line)
    return lines

def histogram_line(values, blocks, columns):
    """Return how *values*, in ms, are spread, in *columns*; *blocks* are bars of growing height."""
    low, high = min(values), max(values)
    before, after = f"TTFT: {low:.0f} ms |", f"| {high:.0f} ms"
    counts = [0] * (columns - len(before) - len(after))
    step = max(high - low, 0.001) / len(counts)
    for value in values:
        counts[min(int((value - low) / step), len(counts) - 1)] += 1
    top = len(blocks) - 1
    bars = [blocks[-(-count * top // max(counts))] for count in counts]
    return before + "".join(bars) + after

def total_line(result):
    """Return one line: how many requests were done, their tokens, and what went wrong."""
    mark = "" if result["exact"] else "~"
    line = (f"{result['ok']} of {result['requests']} done in {result['seconds']:.1f} s, "
            f"{result['input_tokens']} tokens in, {mark}{result['output_tokens']} out")
    if result["cached_tokens"]:
        line += f", {result['cached_tokens']} cached"
    for name, count in result["errors"].items():
        line += f"; {count} x {name}"
    if result["unfinished"]:
        line += f"; {result['unfinished']} unfinished"
    return line

def comparison_lines(sets):
    """Return a line for each of *sets* that is compared with the first one at the same load."""
    from random import Random

    lines = []
    first_of = {}  # load -> BenchSet
    for bench_set in sets:
        first = first_of.setdefault(bench_set.load, bench_set)
        parts = []
        for label, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("E2E", "e2e_ms")):
            values, others = bench_set.values(name), first.values(name)
            if bench_set is not first and values and others:
                change, low, high = compare_medians(values, others, Random(0))
                parts.append(f"{label} p50 {change:+.0f} % ({low:+.0f} to {high:+.0f})")
        if parts:
            lines.append(f"{bench_set.endpoint} against {first.endpoint}: {', '.join(parts)}")
    return lines

def report_lines(document, sets, notes, output):
    """Return the lines of the report for the Output *output*."""
    results = document["results"]
    lines = report_table(results, output.styled) + [""]
    if len(sets) == 1 and results[0]["ttft_ms"]["n"]:
        blocks = " ▁▂▃▄▅▆▇█"
        if not output.can_show(blocks):
            blocks = " .:-=+*#"
        lines += detail_lines(results[0]) + [""]
        lines.append(histogram_line(sets[0].values("ttft_ms"), blocks, REPORT_COLUMNS))
    for bench_set, result in zip(sets, results):
        label = "" if len(sets) == 1 else bench_set.name + ": "
        lines.append(label + total_line(result))
        notes = notes + bench_set.notes(result)
    lines += comparison_lines(sets)
    lines += [f"note: {note}" for note in notes]
    lag_ms = document["client"]["lag_ms"]
    lines.append(f"client: woken {lag_ms['p50']:.1f} ms late (p50), {lag_ms['p99']:.1f} ms (p99)")
    if not document["client"]["trusted"]:
        lines.append("NOT TRUSTWORTHY: this machine was too busy to measure with")
    lines += [f"failed: {text}" for text in document["failed_conditions"]]
    return lines

# The command

def read_prompts(path, console):
    """Return the prompts in the file *path*, one a line; '-' is standard input, None no file."""
    if path is None:
        return []
    data = (console.read_stdin() or b"") if path == "-" else read_file(path)
    prompts = [line for line in decode_prompt(data, path).split("\n") if line.strip()]
    if not prompts:
        raise UsageError(f"there are no prompts in {utf8_argument(path)}")
    return prompts

def check_bench_options(options):
    """Raise UsageError where options of bench exclude each other."""
    if options.save == "-" and options.output == "json":
        raise UsageError("--save - and -o json both write to standard output: give one of them")
    if options.rate and options.concurrency:
        raise UsageError("--rate and --concurrency are two loads: give one of them")
    if options.report and (options.endpoints or options.demo or options.save):
        raise UsageError("--report asks nobody: give no --endpoint, --demo or --save with it")
    has_targets = options.slo_ttft is not None or options.slo_tpot is not None
    for condition in options.fail_if:
        if condition.metric == "slo" and not has_targets and not options.report:
            raise UsageError(f"--fail-if {condition.text} needs --slo-ttft or --slo-tpot")

def build_targets(options, settings, console):
    """Return the BenchTargets that *options* name."""
    endpoints = options.endpoints or [settings.endpoint]
    if endpoints == [None]:
        raise UsageError("no endpoint: give --endpoint SLUG, or --demo to try without one")
    if len(set(endpoints)) < len(endpoints):
        raise UsageError("an endpoint is given twice")
    sampling = build_sampling(options)
    if "max_completion_tokens" not in sampling.fields:
        sampling.fields.setdefault("max_tokens", DEFAULT_BENCH_MAX_TOKENS)
    prompts = read_prompts(options.prompts, console)
    targets = []
    for endpoint in endpoints:
        check_endpoint(endpoint, settings.base_url, "--endpoint")
        targets.append(BenchTarget(settings._replace(endpoint=endpoint), sampling, prompts, options))
    return targets

def list_loads(options):
    """Return the loads that *options* ask for, each ("c", slots) or ("rate", a second)."""
    if options.rate:
        return [("rate", rate) for rate in options.rate]
    return [("c", count) for count in options.concurrency or [DEFAULT_CONCURRENCY]]

def describe_bound(options, loads):
    """Return one line: what is going to be sent, and for how long."""
    steps = [f"{options.warmup} to warm up"]
    limits = []
    if run_duration(options):
        limits.append(f"{run_duration(options):g} s")
    if options.requests:
        limits.append(plural(options.requests, "request"))
    for kind, amount in loads:
        words = f"{amount} in flight" if kind == "c" else f"{amount:g} a second"
        steps.append(f"{words} for {' or '.join(limits)}")
    tokens = options.max_tokens or DEFAULT_BENCH_MAX_TOKENS
    return f"at each endpoint: {', then '.join(steps)}; {tokens} tokens at most"

def save_run(run, path, console):
    """Append a BenchRun to the file *path*; '-' is standard output."""
    if path == "-":
        console.write(save_lines(run))
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(save_lines(run))
    except OSError as error:
        raise OutputError(f"cannot write {utf8_argument(path)}: {os_reason(error)}") from error

def measure_loads(options, targets, loads, console):
    """Return the BenchRuns of *loads*, one after the other, and the signal that ended them."""
    runs = []
    progress = Progress(console)
    loop = RequestLoop(console.waiter, not options.no_keepalive)
    with contextlib.closing(loop):
        for target in targets:
            warm_up(loop, target, options.warmup)
        for load in loads:
            runner = BenchRunner(loop, targets, load, options, progress)
            run = runner.measure()
            progress.clear()
            runs.append(run)
            if options.save:
                save_run(run, options.save, console)
            if runner.interrupt or runner.stopped:
                break
    return runs, runner.interrupt

def show_runs(options, runs, interrupt, notes, console):
    """Show the report on *runs*; return the exit status."""
    pairs = [(request.endpoint, request.load) for run in runs for request in run.requests]
    sets = [BenchSet(endpoint, load, runs) for endpoint, load in dict.fromkeys(pairs)]
    document = build_bench_document(sets, options.fail_if, interrupt is not None)
    if console.json:
        for result in document["results"]:
            del result["groups"]
        console.write(json_text(document) + "\n")
    elif sets and options.save != "-":
        lines = report_lines(document, sets, notes, console.out)
        console.write_styled("\n".join(lines) + "\n")
    if document["failed_conditions"]:
        return EXIT_CONDITION
    return status_of(document["results"])

def status_of(results):
    """Return the exit status: 0 if a request ended well, else that of the most frequent error."""
    counts = {}
    for result in results:
        if result["ok"]:
            return EXIT_OK
        for name, count in result["errors"].items():
            counts[name] = counts.get(name, 0) + count
    kind = max(counts, key=counts.get, default="").partition(" ")[0]
    for error_class in XeroctlError.__subclasses__():
        if error_class.kind == kind:
            return error_class.exit_status
    return EXIT_FAILURE

def run_bench(options, console):
    """Measure endpoints, or report on saved runs; return the exit status."""
    check_bench_options(options)
    if options.report:
        console.json = options.output == "json"
        runs = []
        for path in options.report:
            text = decode_text(read_file(path))[0]
            runs += parse_saved_runs(text, utf8_argument(path))
        return show_runs(options, runs, None, [], console)
    loads = list_loads(options)
    notes = []
    if options.demo:
        notes.append("practice: the endpoint of --demo shares this process, and its time")
    with open_settings(options, console, endpoint_needed=False) as settings:
        targets = build_targets(options, settings, console)
        if settings.dry_run:
            for target in targets:
                send_dry_run(target.build_exchange().request, settings, console)
            return EXIT_OK
        most = [amount if kind == "c" else MAX_UNFINISHED for kind, amount in loads]
        allow_connections(max(most) * len(targets))
        if console.err.is_terminal and not console.quiet:
            console.print_line(describe_bound(options, loads), dim=True)
        runs, interrupt = measure_loads(options, targets, loads, console)
    status = show_runs(options, runs, interrupt, notes, console)
    if interrupt:
        raise interrupt
    return status
# -- Shell completion -------------------------------------------------------------------------

# The scripts below call `xeroctl __describe WORD...` at each Tab.  It prints what may stand in
# place of the last word, a line each, with a tab and its meaning behind it.  `__complete` is the
# same without the meanings.  Neither asks a server or runs a key command.

FILES_ROW = ":files"  # tells the scripts that the shell is to complete the name of a file

BASH_SCRIPT = r"""# Completion for bash; load it with: eval "$(xeroctl completion bash)"
_xeroctl() {
    local word=${COMP_WORDS[COMP_CWORD]} part candidate quoted words=() last=-1 typed
    COMPREPLY=()
    if [[ ${COMP_WORDS[COMP_CWORD-1]} == *[\<\>]* ]]; then
        compopt -o default 2>/dev/null
        return
    fi
    # bash splits a word at = and at :, so put its parts together again.
    for part in "${COMP_WORDS[@]:1:COMP_CWORD}"; do
        if ((last >= 0)) && [[ $part == [=:]* || ${words[last]} == *[=:] ]]; then
            words[last]+=$part
        else
            words[++last]=$part
        fi
    done
    [[ $word == [=:] ]] && word=
    typed=${words[last]//\\/}
    while IFS= read -r candidate; do
        candidate=${candidate%%$'\t'*}
        if [[ $candidate == :files ]]; then
            compopt -o default 2>/dev/null || COMPREPLY=($(compgen -f -- "$word"))
            return
        fi
        printf -v quoted %q "${candidate#"${typed%"${word//\\/}"}"}"
        COMPREPLY+=("$quoted")
    done < <(xeroctl __describe "${words[@]:0:last}" "$typed" 2>/dev/null)
}
complete -F _xeroctl xeroctl
"""

ZSH_SCRIPT = r"""#compdef xeroctl
# Completion for zsh; load it with: eval "$(xeroctl completion zsh)"
_xeroctl() {
    local row rows
    local -a names shown
    rows=$(xeroctl __describe "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)
    for row in "${(@f)rows}"; do
        case $row in
            '') ;;
            :files*) compset -P '--*='; _files; return ;;
            *) names+=("${row%%$'\t'*}"); shown+=("${row/$'\t'/  -- }") ;;
        esac
    done
    compadd -l -d shown -a names
}
if [[ $funcstack[1] == _xeroctl ]]; then _xeroctl "$@"; else compdef _xeroctl xeroctl; fi
"""

FISH_SCRIPT = r"""# Completion for fish; save it as ~/.config/fish/completions/xeroctl.fish
function __xeroctl
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l rows (xeroctl __describe $words[2..-1] "$word" 2>/dev/null)
    if not string match -q ':files*' -- "$rows[1]"
        printf '%s\n' $rows
        return
    end
    set -l option (string match -r -- '^--[a-z-]+=' $word)
    for path in (complete -C "'' "(string replace -- "$option" '' $word))
        echo "$option$path"
    end
end
complete -c xeroctl -f -a '(__xeroctl)'
"""

SHELLS = {"bash": BASH_SCRIPT, "zsh": ZSH_SCRIPT, "fish": FISH_SCRIPT}

def run_completion(options, console):
    """Print the completion script for a shell."""
    console.write(SHELLS[options.shell])

def _option_that_waits(parser, word):
    """Return the option of *parser* whose value is the word after *word*, or None."""
    if word.startswith("--"):
        names = [word]
    else:
        names = ["-" + letter for letter in word[1:]]  # -qvo
    for name in names:
        action = parser.names.get(name)
        if action and action.nargs != 0:
            is_last = name is names[-1]
            return action if is_last else None
    return None

def _values(action, contexts):
    """Return what can follow an option or stand for an argument, as far as that is known."""
    if action.choices:
        return [(choice, "") for choice in action.choices]
    if action.metavar == "CONTEXT":
        return [(name, "") for name in contexts]
    if action.metavar == "FILE":
        return [(FILES_ROW, "")]
    return []

def _matching(word, pairs):
    return [pair for pair in pairs if pair[0].startswith(word) or pair[0] == FILES_ROW]

def find_candidates(parser, words, contexts):
    """Return the (word, meaning) pairs that can stand in place of the last of *words*.

    *parser* has to be the one of the whole command line, *contexts* the names of deployments.
    """
    option, position = None, 0
    for word in words[:-1]:
        if word.startswith("-"):
            option = _option_that_waits(parser, word)
        elif option:
            if option.nargs != "+":
                option = None
        elif word in parser.commands:
            parser, position = parser.commands[word].with_options(), 0
        else:
            position += 1
    word = words[-1]
    name, equals, _ = word.partition("=")
    if option:
        return _matching(word, _values(option, contexts))
    if equals and name in parser.names:
        values = _values(parser.names[name], contexts)
        if values == [(FILES_ROW, "")]:
            return values
        return _matching(word, [(name + "=" + value, meaning) for value, meaning in values])
    if word.startswith("-"):
        return _matching(word, [(name, action.help) for name, action in parser.names.items()])
    commands = [(name, below.summary) for name, below in parser.commands.items()]
    arguments = parser.arguments[position:position + 1]
    return _matching(word, sum([_values(action, contexts) for action in arguments], commands))
# -- Command line -----------------------------------------------------------------------------

# Options are written as the help shows them: a title, then a line each.  A small letter's option
# belongs to the long one behind it; "repeatable" in the summary makes a list of the values.  The
# metavar, or the name where it is in TYPES, says what a value must be.

ENDPOINT_OPTION = f"""
Endpoint
  -e, --endpoint SLUG        endpoint to ask (default: {ENV_ENDPOINT})
"""
TARGET_OPTIONS = ENDPOINT_OPTION + """
  --demo                     ask a practice endpoint inside this process
"""
COMMON_OPTIONS = f"""
Output
  -o, --output FORM          text or json (table, of other tools, is text)
  -q, --quiet                no spinner, notes or footer
  -v, --verbose              show the HTTP exchange on stderr
  --dry-run                  print the request as a curl command; send nothing
  -h, --help, --version      print this help, or the version, and exit
Endpoint
  --context CONTEXT          deployment of the config file to use
  --base-url URL             such as https://api.xerotier.ai/PROJECT/v1
  --api-key KEY              others can see it: {ENV_API_KEY} is safer
  -H, --header NAME:VALUE    add or replace a header; repeatable
Connection
  --connect-timeout SECONDS  limit for connecting (default: {DEFAULT_CONNECT_TIMEOUT_SECONDS})
  --timeout SECONDS          limit for silence of the server (default: {DEFAULT_TIMEOUT_SECONDS})
  --cacert FILE              trust the authorities in this PEM file
"""
GLOBAL_OPTIONS = COMMON_OPTIONS + f"""
  --retries N                tries after a failure that may pass (default: {DEFAULT_RETRIES})
"""
ASKING_OPTIONS = TARGET_OPTIONS + GLOBAL_OPTIONS
SYSTEM_OPTIONS = """
Message
  --system TEXT              system message
  --from-file FILE           system message from a file; beats --system
"""
CHAT_OPTIONS = """
Message
  -m, --message TEXT         what to say; '-', or no -m, reads standard input
  -a, --attach FILE          add a text, image or sound; '-': stdin; repeatable
  -i, --interactive          hold a conversation; /help tells more
  -c, --continue             go on with the newest conversation
  --conversation FILE        keep the conversation in FILE, and go on with it
  --no-history               keep neither inputs nor conversation
Output
  --stream, --no-stream      print the answer as it comes, or whole
  -x, --extract              print the first code block alone
  --plain                    no styles and no word wrap on a terminal
  --show-usage               print token counts and the id on stderr
  --show-reasoning           print the model's reasoning on stderr
"""
MODEL_OPTIONS = """
Sampling
  --model NAME               model name to send (default: the endpoint)
  --max-tokens N             limit for the answer, in tokens
  --param NAME=VALUE         any body field, as JSON, text or @FILE; repeatable
  --slo-ttft MS, --slo-tpot MS  targets: first token, each further one
"""
SAMPLING_OPTIONS = MODEL_OPTIONS + """
  --temperature X            sampling temperature, 0 to 2
  --top-p X                  nucleus sampling threshold, 0 to 1
  --frequency-penalty X      against tokens used often, -2 to 2
  --presence-penalty X       against tokens used at all, -2 to 2
  --seed N                   seed for answers that can be repeated
  --schema FILE              JSON Schema that the answer must fit
  --store                    have the server keep the completion
  --metadata NAME=VALUE      tag of a completion that is kept; repeatable
"""
BATCH_OPTIONS = """
Results
  --concurrency N            requests in flight at once (default: 8)
  --ordered                  keep the order of the requests
  --results FILE             append to FILE; ask only what it does not answer
  --max-failures N           end after N failed requests
"""
BENCH_OPTIONS = """
Message
  --prompt-tokens N          length of made-up prompts (default: about 128)
  --prompts FILE             ask these instead, one a line; '-': stdin
  --cached                   send prompts without a mark against caches
  --system TEXT              system message
Sampling
  --seed N                   seed of prompts and arrival times (default: 0)
Load
  --concurrency N[,N...]     in flight at each endpoint (default: 4)
  --rate R[,R...]            instead: start R a second, at random times
  --duration SECONDS         length of each run (default: 30)
  --requests N               end a run after N requests an endpoint
  --warmup N                 first requests, not measured (default: 1 each)
  --no-keepalive             open a connection for each request
Results
  --fail-if CONDITION        status 10 where 'ttft.p95>800' holds; repeatable
  --save FILE                append a line a request; '-': in place of report
  --report FILE ...          report on these saved runs; ask nobody
Endpoint
  -e, --endpoint SLUG        endpoint to measure; repeatable
  --demo                     ask a practice endpoint inside this process
"""
FILTER_OPTIONS = """
Results
  --limit N                  how many at most, 1 to 100
  --after ID                 those that follow this one
  --order ORDER              by time: asc, the oldest first, or desc
  --model NAME               those of this model
  --metadata NAME=VALUE      those with this tag; repeatable
"""
UPDATE_OPTIONS = """
Results
  --metadata NAME=VALUE      tag of the new set; repeatable
"""
DELETE_OPTIONS = """
Results
  --yes                      do not ask
"""
BRIEF_HELP_END = "Try: xeroctl chat --demo -m Hello; xeroctl help COMMAND tells more."
HELP_COLUMN = 29
TITLES = ("Message", "Sampling", "Load", "Results", "Output", "Endpoint", "Connection")

def _nearest(word, names):
    """Return the name that begins like *word* or differs little from it, or None."""
    import difflib

    bare = {name.lstrip("-"): name for name in names}
    word = word.lstrip("-")
    near = [name for name in bare if name.startswith(word)]
    near = near or difflib.get_close_matches(word, bare, 1)
    return bare[near[0]] if word and near else None

def _quoted(before, value):
    """Return *value* in quotes, or nothing where it may be a key: an error must not repeat one."""
    if len(value) >= MIN_REDACTED_CHARACTERS:
        return ""
    return f"{before}'{one_line(value)}'"

# Each type returns the value of a text, or raises ArgumentTypeError.

def plain_text(text):
    """Return *text* if it holds no control characters."""
    if sanitize(text) != text or "\n" in text:
        raise argparse.ArgumentTypeError("must not hold control characters")
    return text

def prompt_text(text):
    """Return *text*, with what is not UTF-8 in it replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

def completion_id(text):
    """Return *text* if it is an id, so that it stays in its place in the path of a URL."""
    if not re.match(r"[A-Za-z0-9._-]+\Z", text) or not text.strip("."):
        raise argparse.ArgumentTypeError(
            f"must be letters, digits, '.', '_' and '-'{_quoted(', not ', text)}")
    return text

def number(low, high, convert=float):
    """Return the type of numbers from *low* to *high*, of whole ones if *convert* is int."""
    words = "a whole number" if convert is int else "a number"
    if high < MAX_NUMBER:
        words += f" from {low} to {high}"
    elif low > -MAX_NUMBER:
        words += f" of at least {low}"

    def parse_number(text):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {words}{_quoted(', not ', text)}")
        return value

    return parse_number

def one_of(choices):
    """Return the type of words that are one of *choices*."""
    def parse_choice(text):
        if text not in choices:
            words = ", ".join(choices[:-1]) + " or " + choices[-1]
            raise argparse.ArgumentTypeError(f"must be {words}{_quoted(', not ', text)}")
        return text

    return parse_choice

def parse_pair(text):
    """Return the (name, value) of NAME=VALUE, both texts."""
    name, equals, value = prompt_text(text).partition("=")
    if not name or not equals or sanitize(name) != name:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value

def _parse_strict_json(text):
    """Return the JSON document *text*; raise ValueError for anything else, NaN included."""
    try:
        document = json.loads(text)
        json.dumps(document, allow_nan=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return document

def parse_field(text):
    """Return the (name, JSON value) of NAME=VALUE or NAME=@FILE; '@@' begins a text with '@'."""
    name, value = parse_pair(text)
    if name in ("messages", "stream"):
        raise argparse.ArgumentTypeError(f"cannot set {name}")
    if value.startswith("@@"):
        return name, value[1:]
    if value.startswith("@"):
        path = native_path(value[1:])
        try:
            return name, _parse_strict_json(decode_text(read_file(path))[0])
        except ValueError as error:
            raise UsageError(f"--param {name}: {value[1:]} is not JSON: {error}") from error
    try:
        return name, _parse_strict_json(value)
    except ValueError:
        return name, value

def parse_header(text):
    """Return the (name, value) of 'NAME: VALUE'; the name is a token of RFC 9110."""
    name, colon, value = prompt_text(text).partition(":")
    value = value.strip(" \t")
    if not colon or not re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", name):
        raise argparse.ArgumentTypeError("must be 'NAME: VALUE'")
    if re.search(r"[\0-\x08\x0a-\x1f\x7f]", value):
        raise argparse.ArgumentTypeError("must have no line end or control character in it")
    if name.lower() in ("content-length", "transfer-encoding", "connection"):
        raise argparse.ArgumentTypeError(f"cannot set {name}: it frames the request")
    return name, value

_POSITIVE = number(1, MAX_NUMBER, int)
CHOICES = {
    "--output": ("text", "json", "table"),
    "--order": ("asc", "desc"),
    "SHELL": tuple(SHELLS),
}
TYPES = {
    "--after": plain_text,
    "--duration": number(0.1, MAX_TIMEOUT_SECONDS),
    "--frequency-penalty": number(-2, 2),
    "--limit": number(1, 100, int),
    "--context": plain_text,
    "--message": str,  # run_chat refuses what is not UTF-8
    "--model": plain_text,
    "--param": parse_field,
    "--presence-penalty": number(-2, 2),
    "--retries": number(0, 1000, int),
    "--seed": number(-MAX_NUMBER, MAX_NUMBER, int),
    "--temperature": number(0, 2),
    "--top-p": number(0, 1),
    "--warmup": number(0, 1000, int),
    "COMMAND": str,
    "CONDITION": parse_condition,
    "CONTEXT": prompt_text,
    "FILE": native_path,
    "ID": completion_id,
    "KEY": check_api_key,
    "MS": _POSITIVE,
    "N": _POSITIVE,
    "N[,N...]": parse_loads_whole,
    "NAME": check_deployment_name,
    "NAME:VALUE": parse_header,
    "NAME=VALUE": parse_pair,
    "R[,R...]": parse_rates,
    "SECONDS": number(0.001, MAX_TIMEOUT_SECONDS),
    "SLUG": plain_text,
    "TEXT": prompt_text,
    "URL": plain_text,
}
for _name, _choices in CHOICES.items():
    TYPES[_name] = one_of(_choices)

def _value_settings(name, metavar):
    """Return how argparse reads the values of an option, or of an argument if *name* is None."""
    settings = {"metavar": metavar.split()[0]}
    if metavar.endswith(" ..."):
        settings["nargs"] = "+"
    key = name if name in TYPES else settings["metavar"]
    settings["type"] = TYPES[key]
    if key in CHOICES:
        settings["choices"] = CHOICES[key]
    return settings

class TextAction(argparse.Action):
    """An option that asks for a text in place of what a command does: --help, --version."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise TextRequested(self.const or parser.format_help())

SPECIAL_OPTIONS = {
    "--continue": {"action": "store_true", "dest": "continue_last"},
    "--help": {"action": TextAction, "nargs": 0},
    "--no-stream": {"action": "store_const", "const": False, "dest": "stream"},
    "--store": {"action": "store_const", "const": True},
    "--stream": {"action": "store_const", "const": True},
    "--version": {"action": TextAction, "nargs": 0, "const": f"xeroctl {__version__}\n"},
}

ARGUMENT_DESTS = {"COMMAND": "topic", "CONTEXT": "name", "FILE": "file", "ID": "id", "NAME": "name",
                  "SHELL": "shell"}

# What argparse says, and what we say in its place: it has no other way to choose the words.
ARGPARSE_ERRORS = (
    (r"argument (?:\S+/)?(\S+): expected .*", r"\1 needs a value"),
    (r"argument (?:\S+/)?(\S+): ignored explicit argument .*", r"\1 takes no value"),
    (r"the following arguments are required: (.*)", r"\1 is missing"),
    (r"argument (?:\S+/)?(\S+): (.*)", r"\1 \2"),
)

class Parser(argparse.ArgumentParser):
    """A parser of one command, which reports a wrong command line as a UsageError.

    It is set up when it is first used: a command line needs the options of one command.  All
    parsers fill one namespace, and the last one sets `parser` and `run` there.
    """

    def __init__(self, run, summary, options, arguments="", usage=None, examples=(), commands=(),
                 defaults=None, dests=None, ignored_word=None, **settings):
        self.run = run
        self.summary = summary
        self.names = {}      # of options -> their actions
        self.arguments = []  # actions that no option starts
        self.commands = {}   # name -> Parser
        self._options = options      # lines of the help
        self._arguments = arguments  # as the usage line shows them
        self._usage = usage
        self._examples = examples
        self._commands = commands
        self._own_defaults = defaults or {}
        self._dests = dests or {}  # names of options that have another dest than their name
        self._ignored_word = ignored_word  # may stand first
        self._settings = settings  # for argparse
        self._rows = {}  # title -> lines of the help
        self._group = None
        self._words = []
        self._namespace = None

    def with_options(self):
        """Return the parser with its options and commands."""
        if self._group:
            return self
        super().__init__(add_help=False, **self._settings)
        self._group = self.add_argument_group()
        for line in self._options.split("\n"):
            row = re.match(r"  (\S+(?: \S+)*)  +(.*)", line)
            if row:
                self._rows[title].append(line)
                self._add_row(*row.groups())
            elif line:
                title = line
                self._rows.setdefault(title, [])
        if self._arguments:
            self._add_argument(self._arguments)
        if self._commands:
            dest = "verb" if " " in self.prog else "command"
            subparsers = self.add_subparsers(dest=dest, metavar="COMMAND", prog=self.prog)
            for name, run, summary, options, special in self._commands:
                self.commands[name] = subparsers.add_parser(
                    name, run=run, summary=summary, options=options, **special)
        return self

    def _add_row(self, names, summary):
        """Add the options of one line of the help."""
        strings = []
        for piece in names.split(", "):
            name, _, metavar = piece.partition(" ")
            strings.append(name)
            if name.startswith("--"):
                self._add_option(strings, metavar, summary)
                strings = []

    def _add_option(self, strings, metavar, summary):
        name = strings[-1]
        settings = {"dest": name[2:].replace("-", "_"), "help": summary, "action": "store_true"}
        if metavar:
            settings["action"] = "append" if "repeatable" in summary else "store"
            settings.update(_value_settings(name, metavar))
        settings.update(SPECIAL_OPTIONS.get(name, {}))
        if name in self._dests:
            settings["dest"] = self._dests[name]
        # Through a group of argparse: the parser itself tries out each help, slow on Python 3.14.
        action = self._group.add_argument(*strings, **settings)
        self.names.update(dict.fromkeys(strings, action))

    def _add_argument(self, text):
        settings = _value_settings(None, text.strip("[]"))
        if text.startswith("["):
            settings["nargs"] = "*" if "nargs" in settings else "?"
        dest = ARGUMENT_DESTS[settings["metavar"]]
        self.arguments.append(self._group.add_argument(dest, **settings))

    def parse_known_args(self, args=None, namespace=None):
        """Parse into the namespace of the parser above, if there is one."""
        self.with_options()
        if namespace is None:
            namespace = self._namespace or argparse.Namespace()
        vars(namespace).update(self._own_defaults, parser=self, run=self.run)
        for below in self.commands.values():
            below._namespace = namespace
        if self._ignored_word and args[:1] == [self._ignored_word]:
            args = args[1:]
        self._words = args
        return super().parse_known_args(args, namespace)

    def _get_option_tuples(self, option_string):
        # This forbids abbreviations.  Before Python 3.8, allow_abbrev=False forbids -qv too.
        if option_string.startswith("--"):
            return []
        return super()._get_option_tuples(option_string)

    def error(self, message):
        """Raise the UsageError for what argparse found wrong."""
        wrong_command = re.match(r"(?s)argument COMMAND: invalid choice: .(.*). \(choose", message)
        if wrong_command:
            self._raise_wrong_command(wrong_command.group(1))
        for pattern, words in ARGPARSE_ERRORS:
            match = re.match(pattern, message, re.DOTALL)
            if match:
                raise UsageError(match.expand(words))
        raise UsageError(message + self._hint(None))

    def check_unknown(self, words):
        """Raise a UsageError if there are *words* that the parser did not know."""
        for word in words:
            name = word.partition("=")[0]  # what follows may be a key
            if len(name) > 1 and name.startswith("-"):
                raise UsageError(self._unknown_option(name))
        for word in words:
            advice = self._hint(None)
            if "--message" in self.names:
                advice = ": a message goes behind -m, in quotes"
            raise UsageError(f"{self.prog} takes no further word{_quoted(' like ', word)}{advice}")

    def _raise_wrong_command(self, word):
        # The word may be the value of an option in front of it that is wrong: even a key.
        for other in itertools.takewhile(word.__ne__, self._words):
            is_known = other.partition("=")[0] in self.names or other[:2] in self.names
            if other.startswith("-") and not is_known:
                self.check_unknown([other])
        near = _nearest(word, self.commands)
        shown = f" {word}" if near else _quoted(" ", word)
        raise UsageError(f"{self.prog} has no command{shown}{self._hint(near)}")

    def _unknown_option(self, name):
        if name in self.names:
            return f"{name} goes behind the command: {self.prog} {name}"
        for below in self.commands.values():
            if name in below.with_options().names:
                return f"{name} goes behind the command: {below.prog} {name}"
        near = _nearest(name, self.names)
        if not near and not name.startswith("--"):
            name = name[:2]
        return f"{self.prog} has no option {name}{self._hint(near)}"

    def _hint(self, near):
        if near:
            return f": did you mean {near}?"
        return f": see {self.prog} --help"

    def format_help(self):
        """Return the help: usage, options in groups, examples; 80 columns at most."""
        self.with_options()
        lines = [self.usage_line(), "", self.summary[0].upper() + self.summary[1:] + "."]
        lines.extend(self.command_lines())
        for title in TITLES:
            if title in self._rows:
                lines.extend(["", title, *self._rows[title]])
        if self._examples:
            lines.extend(["", "Examples"])
            lines.extend("  " + example for example in self._examples)
        lines.extend(["", "Exit statuses, files and all else: man xeroctl"])
        return "\n".join(lines) + "\n"

    def usage_line(self):
        """Return the line of the help that shows how the command is written."""
        words = self._usage or " ".join([self._arguments, "[options]"])
        if self.commands:
            words = "[COMMAND] [options]" if self.run else "COMMAND [options]"
        return f"usage: {self.prog} {words.strip()}"

    def command_lines(self):
        """Return the lines of the help that list the commands."""
        if not self.commands:
            return []
        lines = ["", "Commands"]
        for name, below in self.commands.items():
            lines.append(f"  {name:<{HELP_COLUMN - 4}}  {below.summary}")
        return lines

def run_help(options, console):
    """Print the help of a command."""
    options.top.parse_known_args(options.topic + ["--help"])

# The name, the function, the summary and the options of each command, and what else is special.
COMPLETIONS_COMMANDS = (
    ("list", run_completions_list, "list stored completions; this is the default",
     FILTER_OPTIONS + ASKING_OPTIONS, {"dests": {"--metadata": "tags"}}),
    ("get", run_completions_get, "show the answer of a completion",
     ASKING_OPTIONS, {"arguments": "ID"}),
    ("messages", run_completions_messages, "show the conversation of a completion",
     ASKING_OPTIONS, {"arguments": "ID"}),
    ("update", run_completions_update, "change the tags of a completion",
     UPDATE_OPTIONS + ASKING_OPTIONS, {"arguments": "ID"}),
    ("delete", run_completions_delete, "delete completions",
     DELETE_OPTIONS + ASKING_OPTIONS, {"arguments": "ID ..."}),
)
CONFIG_COMMANDS = (
    ("list", run_config_list, "list the deployments; this is the default", GLOBAL_OPTIONS, {}),
    ("init", run_config_init, "ask for a deployment, try it and add it",
     ENDPOINT_OPTION + GLOBAL_OPTIONS, {}),
    ("add", run_config_add, "add a deployment; --api-key - reads the key",
     ENDPOINT_OPTION + GLOBAL_OPTIONS,
     {"arguments": "NAME",
      "examples": ("xeroctl config add prod --api-key - --base-url URL",)}),
    ("set", run_config_set, "change a deployment; an empty value removes",
     ENDPOINT_OPTION + GLOBAL_OPTIONS,
     {"arguments": "CONTEXT",
      "examples": ("xeroctl config set prod --endpoint my-endpoint",)}),
    ("use", run_config_use, "make a deployment the current one",
     GLOBAL_OPTIONS, {"arguments": "CONTEXT"}),
    ("show", run_config_show, "show a deployment, by default the chosen one",
     GLOBAL_OPTIONS, {"arguments": "[CONTEXT]"}),
    ("remove", run_config_remove, "remove a deployment",
     GLOBAL_OPTIONS, {"arguments": "CONTEXT"}),
    ("path", run_config_path, "print where the config file is", GLOBAL_OPTIONS, {}),
)
COMMANDS = (
    ("chat", run_chat, "send a message to an endpoint and print the answer",
     CHAT_OPTIONS + SYSTEM_OPTIONS + SAMPLING_OPTIONS + ASKING_OPTIONS,
     {"usage": "-e SLUG | --demo  [-m TEXT] [-i] [options]", "ignored_word": "send",
      "examples": ('xeroctl chat -e my-endpoint --stream -m "What is 2+2?"',
                   'tail app.log | xeroctl chat -e my-endpoint -a - -m "What failed?"',
                   'xeroctl chat -e my-endpoint -i --system "Keep it short."')}),
    ("batch", run_batch, "ask many questions: JSON lines in, JSON lines out",
     BATCH_OPTIONS + SYSTEM_OPTIONS + SAMPLING_OPTIONS + ASKING_OPTIONS,
     {"arguments": "[FILE]", "usage": "-e SLUG | --demo  [options] [FILE]",
      "defaults": {"concurrency": 8},
      "examples": ("xeroctl batch -e my-endpoint questions.txt > answers.jsonl",
                   "xeroctl batch -e my-endpoint --results answers.jsonl requests.jsonl",
                   "xeroctl batch --demo -o text < questions.txt")}),
    ("bench", run_bench, "measure endpoints: time to first token, tokens/s",
     BENCH_OPTIONS + MODEL_OPTIONS + COMMON_OPTIONS,
     {"usage": "-e SLUG | --demo | --report FILE ...  [options]",
      "dests": {"--endpoint": "endpoints"},
      "defaults": {"endpoints": [], "fail_if": [], "warmup": 1, "seed": 0},
      "examples": ("xeroctl bench -e blue -e green --concurrency 1,4,16",
                   "xeroctl bench -e blue --rate 5 --duration 60 --save blue.jsonl",
                   "xeroctl bench --report blue.jsonl")}),
    ("models", run_models, "list the models behind an endpoint", ASKING_OPTIONS, {}),
    ("completions", run_completions_list, "list and change the completions that --store keeps",
     FILTER_OPTIONS + ASKING_OPTIONS,
     {"commands": COMPLETIONS_COMMANDS, "dests": {"--metadata": "tags"},
      "examples": ("xeroctl completions --demo",)}),
    ("status", run_status, "check settings, connection, key and an answer", ASKING_OPTIONS, {}),
    ("config", run_config_list, "list and change the deployments in the config file",
     GLOBAL_OPTIONS, {"commands": CONFIG_COMMANDS}),
    ("completion", run_completion, "print a script that completes commands",
     GLOBAL_OPTIONS,
     {"arguments": "SHELL", "examples": ('eval "$(xeroctl completion bash)"',)}),
    ("help", run_help, "show the help of a command",
     GLOBAL_OPTIONS, {"arguments": "[COMMAND ...]"}),
)
HIDDEN_COMMANDS = ("__complete", "__describe")

# A command finds every option in its namespace; its own defaults come on top.
UNSET_OPTIONS = (
    "base_url api_key context output cacert retries endpoint message stream system from_file model "
    "max_tokens temperature top_p frequency_penalty presence_penalty seed schema schema_name "
    "slo_ttft slo_tpot store conversation limit after order").split()
FALSE_OPTIONS = (
    "dry_run quiet verbose demo interactive extract show_usage show_reasoning plain continue_last "
    "no_history yes").split()
LIST_OPTIONS = "header attach param metadata tags more_tags".split()

def build_parser():
    """Return the parser of the whole command line."""
    parser = Parser(
        None, "chat with Xerotier endpoints and OpenAI-compatible servers", GLOBAL_OPTIONS,
        prog="xeroctl", commands=COMMANDS,
        examples=("xeroctl chat --demo --stream -m Hello", "xeroctl config init",
                  "xeroctl help chat")).with_options()
    parser.set_defaults(
        top=parser, command=None, connect_timeout=DEFAULT_CONNECT_TIMEOUT_SECONDS,
        timeout=DEFAULT_TIMEOUT_SECONDS, **dict.fromkeys(UNSET_OPTIONS))
    parser.set_defaults(**dict.fromkeys(FALSE_OPTIONS, False))
    parser.set_defaults(**dict.fromkeys(LIST_OPTIONS, []))
    return parser

# What the process does

def print_candidates(command, words, console):
    """Print what can stand in place of the last of *words*, a line each."""
    contexts = []
    with contextlib.suppress(UsageError):
        contexts = [name for name in read_config().deployments if one_line(name) == name]
    for word, meaning in find_candidates(build_parser(), words or [""], contexts):
        if command == "__describe":
            console.write(f"{word}\t{meaning}\n")
        elif word != FILES_ROW:
            console.write(word + "\n")

def asks_for_json(arguments):
    """Return whether a command line that cannot be parsed asks for JSON."""
    form = r"(?:^|\0)(?:-[qvi]*o[\0=]?|--output[\0=])json(?:\0|$)"
    return re.search(form, "\0".join(arguments)) is not None

def parse_arguments(arguments):
    """Return the options of a command line; raise UsageError or TextRequested."""
    options, unknown = build_parser().parse_known_args(arguments)
    retries = [word for word in unknown if word.partition("=")[0] == "--retries"]
    if options.command == "bench" and (retries or options.retries is not None):
        raise UsageError("--retries is not for bench: it tries nothing again")
    options.parser.check_unknown(unknown)
    if not options.run:
        raise UsageError("no command: see xeroctl --help")
    for name in ("base_url", "endpoint", "context", "model"):
        if getattr(options, name) == "" and options.run is not run_config_set:
            raise UsageError(f"--{name.replace('_', '-')} must not be empty")
    return options

def run(arguments, console):
    """Run the command that *arguments* name; return the exit status."""
    if not arguments:
        parser = build_parser()
        for line in [parser.usage_line(), *parser.command_lines(), "", BRIEF_HELP_END]:
            console.print_line(line)
        return EXIT_USAGE
    if arguments[0] in HIDDEN_COMMANDS:
        print_candidates(arguments[0], arguments[1:], console)
        return EXIT_OK
    console.json = asks_for_json(arguments)
    try:
        options = parse_arguments(arguments)
        console.json = options.output == "json"
        console.quiet = options.quiet
        console.verbose = options.verbose
        return options.run(options, console) or EXIT_OK
    except TextRequested as request:
        console.write(str(request))
        return EXIT_OK

def end_by_signal(number):
    """Die of signal *number*, so that a loop in a shell ends too; else return its status."""
    if os.name == "posix":
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return 128 + number

def main(argv=None):
    """Run one command line and return its exit status."""
    if argv is None:
        argv = [utf8_argument(argument) for argument in sys.argv[1:]]
    waiter = Waiter()
    try:
        with waiter.watch_signals():
            console = Console(sys.stdin, sys.stdout, sys.stderr, os.environ, waiter)
            try:
                return run(argv, console)
            except XeroctlError as error:
                console.print_error(error)
                return error.exit_status
            finally:
                console.stop_spinner()
    except BrokenPipeError:
        return EXIT_CLOSED_STDOUT
    except KeyboardInterrupt:
        return end_by_signal(signal.SIGINT)
    except Terminated as end:
        return end_by_signal(end.args[0])

if __name__ == "__main__":
    sys.exit(main())
