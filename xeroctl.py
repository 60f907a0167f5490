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
import collections
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
    seconds it asked us to wait, *body* the text of its error, for --verbose.  *retryable* says
    that a second try may succeed.  The attribute *reason* is the message without its advice.
    """
    kind = "failure"
    exit_status = EXIT_FAILURE

    def __init__(self, message, status=None, code=None, request_id=None,
                 retryable=False, retry_after=None, body=None):
        super().__init__(message)
        self.reason = message.partition(": ")[0]
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

# -- Config -----------------------------------------------------------------------------------

KEY_FIELDS = ("api_key", "api_key_keychain", "api_key_command")
FIELD_TYPES = dict.fromkeys(KEY_FIELDS + ("base_url", "endpoint", "output"), str)
FIELD_TYPES["stream"] = bool
TYPE_WORDS = {str: "text", dict: "a table", bool: "true or false"}

# The TOML that Pythons before 3.11 can read: tables of strings, booleans and plain numbers.
_TOML_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_TOML_KEYS = rf"({_TOML_KEY}(?:\s*\.\s*{_TOML_KEY})*)"
_TOML_STRING = r"""(?:"(?!"")(?:[^"\\]|\\.)*"|'(?!'')[^']*')"""
_TOML_VALUE = rf"({_TOML_STRING}|true|false|[+-]?\d+(?:\.\d+)?)"
_TOML_LINE = rf"\s*(?:\[\s*{_TOML_KEYS}\s*\]|{_TOML_KEYS}\s*=\s*{_TOML_VALUE})?\s*(?:#.*)?$"
# The comments and blank lines at the end of a table: up to the first blank line, and the rest.
_TOML_TAIL = r"(?m)^((?:[ \t]*#.*\n)*[ \t\r]*\n)?((?:[ \t\r]*(?:#.*)?\n)*)\Z"

SAMPLING_RANGES = {  # sampling option -> (type, lowest, highest)
    "max_tokens": (int, 1, MAX_NUMBER),
    "temperature": (float, 0, 2),
    "top_p": (float, 0, 1),
    "frequency_penalty": (float, -2, 2),
    "presence_penalty": (float, -2, 2),
    "seed": (int, -MAX_NUMBER, MAX_NUMBER),
}

def parse_number(text, convert, low, high):
    """Return the number from *low* to *high* that *text* is, made by *convert* (int or float).

    Raise ValueError for another text; its message says what is wanted, as "a number from 0 to 2".
    """
    with contextlib.suppress(ValueError):
        number = convert(text)
        if low <= number <= high:
            return number
    wanted = "a whole number" if convert is int else "a number"
    if high < MAX_NUMBER:
        wanted += f" from {low} to {high}"
    elif low > -MAX_NUMBER:
        wanted += f" of at least {low}"
    raise ValueError(wanted)

def is_secret_name(name):
    """Return whether a header, body field or config field of this *name* may hold a secret."""
    words = "(?i)auth|key|token|secret|password|credential|cookie"
    return re.search(words, name) is not None

def mask_key(key):
    """Return an API key masked: asterisks, then the last four of 16 or more."""
    if not key:
        return ""
    if len(key) < 2 * MIN_REDACTED_CHARACTERS:
        return "****"
    return "****" + key[-4:]

def redact(text, secrets):
    """Return *text* with *** for each of *secrets*.

    Secrets under 8 characters are not replaced: they may be ordinary words.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= MIN_REDACTED_CHARACTERS:
            text = text.replace(secret, "***")
    return text

def secret_parameters(url):
    """Return the values in the query of *url* that may be secrets, as they stand there."""
    parameters = re.findall("[?&]([^=&#]*)=([^&#]+)", url)
    return [value for name, value in parameters if is_secret_name(name)]

def mask_url(url):
    """Return *url* with its user, its password and the secrets in its query masked."""
    url = re.sub("//[^/]*@", "//****@", url)
    for value in secret_parameters(url):
        url = url.replace("=" + value, "=***")
    return url

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
    keys = re.findall(_TOML_KEY, text)
    return [_toml_value(key) if key[0] in "\"'" else key for key in keys]

def _toml_text(text):
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted.replace("\x7f", "\\u007f")

def _nested_table(table, keys):
    for key in keys:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ValueError
    return table

def parse_toml_subset(text):
    """Return the tables of a TOML text of strings, booleans and plain numbers.

    Raise ValueError, with the number of the line, for everything else.
    """
    document = {}
    headers = [[]]
    for number, line in enumerate(text.split("\n"), 1):
        match = re.match(_TOML_LINE, line)
        try:
            if not match:
                raise ValueError
            header, names, value = match.groups()
            if header:
                keys = _toml_keys(header)
                _nested_table(document, keys)
                if keys in headers:
                    raise ValueError
                headers.append(keys)
            elif names:
                *outer, key = headers[-1] + _toml_keys(names)
                table = _nested_table(document, outer)
                if key in table:
                    raise ValueError
                table[key] = _toml_value(value)
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
    """Return *url* without slashes at its end; raise UsageError where it is not a base URL."""
    from urllib.parse import urlsplit

    if re.match(r"[^/]*//[^/]*@", url):
        raise UsageError("a base URL holds no user or password: use --api-key")
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        is_usable = is_usable and not parts.netloc.endswith(":")
    except ValueError:
        is_usable = False
    if is_usable and re.match(r'[!"$%&-~]+\Z', url):  # no #
        if "?" not in url:
            return url.rstrip("/")
        if parts.query and parts.path.endswith(CHAT_PATH):
            return url
    raise UsageError(f"not a base URL: {quote_value(mask_url(url))}: "
                     "one is https://api.xerotier.ai/PROJECT/v1")

def origin(url):
    """Return the scheme, host and port of *url* (RFC 6454): a stored key is bound to them."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, port

def same_origin(url, other):
    """Return whether a URL has the same origin as the base URL *other*; None has no origin."""
    try:
        return origin(url or "") == origin(other)
    except ValueError:  # a broken host or port
        return False

def is_loopback(host):
    """Return whether *host* is a name or an address of this machine alone (RFC 6761)."""
    names = r"(.+\.)?localhost|127(\.\d+){3}|0\.0\.0\.0|::1"
    return re.match(rf"({names})\Z", host) is not None

def is_whole_address(base_url):
    """Return whether *base_url* is used as it stands, with no slug anywhere in it."""
    address = base_url.partition("?")[0].rstrip("/")
    return address.endswith(CHAT_PATH) and "{endpoint}" not in address

def plain_address(base_url):
    """Return the whole address that a server without slugs would have, or None if it is one."""
    if "{endpoint}" in base_url or is_whole_address(base_url):
        return None
    if not base_url.endswith("/v1"):
        base_url += "/v1"
    return base_url + CHAT_PATH

def is_endpoint(text, base_url):
    """Return whether *text* can be the endpoint at *base_url*.

    It is a slug; where no path is built from it, any name without control characters.
    """
    pattern = r"\.*[A-Za-z0-9_-][A-Za-z0-9._-]*\Z"
    if is_whole_address(base_url):
        pattern = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+\Z"
    return re.match(pattern, text) is not None

def check_endpoint(endpoint, base_url, source):
    """Return *endpoint*; raise UsageError, naming its *source*, where it cannot be one."""
    if is_endpoint(endpoint, base_url):
        return endpoint
    sentence = (f"{source} must be letters, digits, '.', '_' and '-', "
                f"not {quote_value(endpoint)}")
    plain_url = plain_address(base_url)
    if base_url and plain_url:
        sentence += f": a server that takes any name has the base URL {plain_url}"
    raise UsageError(sentence)

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

def parse_config(text, path):
    """Return the Config in the TOML *text* of the file *path*.

    Raise UsageError where it is broken, or where a value has the wrong type.
    """
    def check_types(prefix, table, types):
        for name, value in table.items():
            wanted = types.get(name, object)
            if not isinstance(value, wanted):
                raise UsageError(f"{path}: {prefix}{name} is not {TYPE_WORDS[wanted]}")

    document = parse_toml(text, path)
    check_types("", document, {"current": str, "deployment": dict})
    deployments = document.get("deployment", {})
    check_types("deployment.", deployments, dict.fromkeys(deployments, dict))
    for name, fields in deployments.items():
        prefix = f"deployment.{name}."
        check_types(prefix, fields, FIELD_TYPES)
        if fields.get("endpoint"):
            source = f"{path}: {prefix}endpoint"
            check_endpoint(fields["endpoint"], fields.get("base_url", ""), source)
    return Config(path, document.get("current") or None, deployments, [])

def known_contexts(config):
    """Return which deployments the file of *config* has, as the end of a sentence."""
    names = sorted(config.deployments)
    return f"{config.path} has: " + (", ".join(names) or "none")

def find_deployment(config, name):
    """Return the table of deployment *name*, empty for None; raise UsageError if unknown."""
    if name is None:
        return {}
    if name not in config.deployments:
        raise UsageError(f"unknown context {quote_value(name)}: {known_contexts(config)}")
    return config.deployments[name]

def first_given(*candidates):
    """Return the first (value, source) pair whose value is set, or (None, None)."""
    for value, source in candidates:
        if value:
            return value, source
    return None, None

def key_field(deployment):
    """Return the field of *deployment* that says where its key is, or None."""
    for field in KEY_FIELDS:
        if deployment.get(field):
            return field
    return None

def _credentials_by_precedence(options, environ, deployment, stored):
    """Return a tuple (base URL, its source, key, its source) of each place that may set them.

    For a deployment, key is the name of the field that holds it.
    """
    option = (options.base_url, "--base-url",
              options.api_key, "--api-key")
    variable = (environ.get(ENV_BASE_URL), ENV_BASE_URL,
                environ.get(ENV_API_KEY), ENV_API_KEY)
    own = (deployment.get("base_url"), stored,
           key_field(deployment), stored)
    openai = (environ.get(ENV_OPENAI_BASE_URL), ENV_OPENAI_BASE_URL,
              environ.get(ENV_OPENAI_API_KEY), ENV_OPENAI_API_KEY)
    if options.context:
        return [option, own, variable, openai]
    return [option, variable, own, openai]

def _may_send(key_source, key_base_url, base_url, base_url_source):
    """Return whether a key that belongs to *key_base_url* may go to *base_url*."""
    if key_source == "--api-key" or (key_source, base_url_source) == (ENV_API_KEY, "--base-url"):
        return True
    if key_source == ENV_API_KEY and not key_base_url:
        return base_url_source != ENV_OPENAI_BASE_URL
    return same_origin(key_base_url, base_url)

def _missing_base_url(config, context):
    if config.deployments and not context:
        return UsageError(
            f"no context is chosen: {known_contexts(config)}: "
            "give --context CONTEXT, or choose with: xeroctl config use CONTEXT")
    return UsageError(
        f"no base URL: set it up with: xeroctl config init, or set {ENV_BASE_URL} "
        f"and {ENV_API_KEY}, or try without any: xeroctl chat --demo -m Hello")

def _key_notes(api_key, base_url, environ, deployment, context):
    scheme, host, _ = origin(base_url)
    if api_key and scheme == "http" and not is_loopback(host):
        return [f"the API key goes to {host} unencrypted, over plain http"]
    if api_key:
        return []
    if key_field(deployment):
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
    places = _credentials_by_precedence(options, environ, deployment, stored)
    base_url, base_url_source = first_given(*[place[:2] for place in places])
    if not base_url:
        raise _missing_base_url(config, context)
    base_url = check_base_url(base_url)
    if base_url_source == ENV_OPENAI_BASE_URL and not is_whole_address(base_url):
        base_url += CHAT_PATH

    own = {}  # fields that count only with the deployment's own base URL
    if deployment.get("base_url", "").rstrip("/") == base_url:
        own = deployment
    endpoint, endpoint_source = first_given(
        (options.endpoint, "--endpoint"),
        (environ.get(ENV_ENDPOINT), ENV_ENDPOINT),
        (own.get("endpoint"), stored))
    if endpoint:
        check_endpoint(endpoint, base_url, endpoint_source)
    stream = options.stream
    if stream is None:
        stream = own.get("stream", False)
    output = options.output or deployment.get("output") or "text"
    if output not in ("text", "table", "json"):
        raise UsageError(f"{config.path}: deployment.{context}.output is not table or json")
    if output == "table":
        output = "text"
    retries = DEFAULT_RETRIES if options.retries is None else options.retries

    keys = [(key, source) for key_base_url, _, key, source in places
            if _may_send(source, key_base_url, base_url, base_url_source)]
    api_key, api_key_source = first_given(*keys)
    if api_key and api_key_source == stored:
        api_key = deployment.get("api_key") or fetch_key(deployment)
    api_key = check_api_key(api_key or "") or None
    notes = config.warnings + _key_notes(api_key, base_url, environ, deployment, context)
    sources = {"base_url": base_url_source, "api_key": api_key_source,
               "endpoint": endpoint_source}
    return Settings(
        endpoint, base_url, api_key, list(options.header), output, stream, options.timeout,
        options.connect_timeout, retries, options.cacert, options.dry_run, notes, sources)

def resolve_options(options):
    """Return the Settings that *options* alone ask for."""
    return resolve_settings(options, {}, Config("", None, {}, []), None)

# An edit works on blocks, [keys, text] pairs of a table each. The first block is what comes before
# the first table; its keys are [], as are those of a header that we cannot read.

def _split_blocks(text):
    blocks = [[[], ""]]
    for line in re.findall(".*\n", text):
        if line.lstrip().startswith("["):
            keys = []
            match = re.match(_TOML_LINE, line)
            if match:
                with contextlib.suppress(ValueError):  # TOML has escapes that JSON lacks
                    keys = _toml_keys(match.group(1))
            blocks.append([keys, ""])
        blocks[-1][1] += line
    return blocks

def _remove_table(blocks, keys):
    """Return *blocks* without the table *keys* and the tables in it.

    Comments after a blank line, or directly above the next table, are kept.
    """
    kept = []
    comments = ""  # of the table just above, if that is removed
    for header, text in blocks:
        if header[:len(keys)] == keys:
            comments = re.search(_TOML_TAIL, text).group(2)
        else:
            kept.append([header, comments + text])
            comments = ""
    kept[-1][1] += comments
    return kept

def _set_value(text, name, value, new_at):
    """Return *text* with *name* set to the text *value*, at *new_at* if new; None removes it.

    A setting in the first line is followed by a blank line.
    """
    start = end = new_at
    line = f"{name} = {_toml_text(value)}\n"
    match = re.search(rf"(?m)^([ \t]*{name}[ \t]*=[ \t]*){_TOML_STRING}(.*\n)", text)
    if match:
        start, end = match.span()
        line = match.group(1) + _toml_text(value) + match.group(2)
    after = text[end:]
    blank = re.match(r"[ \t\r]*\n", after)
    if value is None:
        line = ""
        if start == 0 and blank:
            after = after[blank.end():]
    elif end == 0 and not blank:
        line += "\n"
    return text[:start] + line + after

def _find_table(blocks, name):
    """Return the block of the deployment *name*, added at the end if it is missing."""
    keys = ["deployment", name]
    for block in blocks:
        if block[0] == keys:
            return block
    if not re.match(r"[A-Za-z0-9_-]+\Z", name):
        name = _toml_text(name)
    blocks.append([keys, f"[deployment.{name}]\n"])
    return blocks[-1]

def _check_meaning(text, path, wanted):
    """Raise UsageError where the TOML *text* does not mean the document *wanted*."""
    found = None
    with contextlib.suppress(UsageError):
        found = dict({"current": "", "deployment": {}}, **parse_toml(text, path))
    as_text = json.JSONEncoder(sort_keys=True, default=repr).encode  # nan equals nan in it
    if as_text(found) != as_text(wanted):
        raise UsageError(f"{path} is written in a way that only an editor can change")

def edit_config(text, path, current, deployments):
    """Return the TOML *text* of the file *path* with this *current* and these *deployments*.

    All lines that say anything else stay as they are.  Raise UsageError where the text is
    written in a way that does not allow it.
    """
    document = parse_toml(text, path)
    old_deployments = document.get("deployment", {})
    newline = "\n"
    if text.count("\r\n") == text.count("\n") > 0:
        newline = "\r\n"
    text = text.replace(newline, "\n")
    # During the edit the last table ends like any other: in a blank line.
    open_line = text.rpartition("\n")[2]
    if open_line:
        text += "\n"
    is_padded = re.search(r"\S[ \t\r]*\n\Z", text)
    if is_padded:
        text += "\n"

    blocks = _split_blocks(text)
    for name in old_deployments.keys() - deployments.keys():
        blocks = _remove_table(blocks, ["deployment", name])
    for name, deployment in deployments.items():
        old = old_deployments.get(name, {})
        for field in dict(old, **deployment):
            value = deployment.get(field)
            if value != old.get(field):
                block = _find_table(blocks, name)
                end = re.search(_TOML_TAIL, block[1]).start()
                block[1] = _set_value(block[1], field, value, end)
    if current != (document.get("current") or None):
        blocks[0][1] = _set_value(blocks[0][1], "current", current, 0)

    edited = "".join(block_text for _, block_text in blocks)
    if is_padded and edited.endswith("\n\n"):
        edited = edited[:-1]
    if open_line and edited.endswith(open_line + "\n"):
        edited = edited[:-1]
    edited = edited.replace("\n", newline)
    wanted = dict(document, current=current or "", deployment=deployments)
    _check_meaning(edited, path, wanted)
    return edited

# -- Wire -------------------------------------------------------------------------------------

class WireError(Exception):
    """The bytes are not an HTTP/1.1 response; the message says why."""

class IncompleteError(WireError):
    """A head or a body ends too early, or is broken; the message says what the peer did."""

_END_OF_HEAD = re.compile(br"\n\r?\n")
# The line end of the chunk before, the size, an extension, a line end (RFC 9112, 7.1).
_CHUNK_SIZE = br"\r?\n[ \t]*([0-9a-fA-F]{1,16})[ \t]*(?:;[^\n]*)?\r?\n"
_GZIP_START = b"\x1f"
_STATUS_LINE = re.compile(r"HTTP/1\.(\d) +([1-9]\d\d)(?: +(.*))?\Z", re.DOTALL)
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")

def parse_head(data):
    """Return the ResponseHead that *data* holds; raise WireError if it is not HTTP/1.1."""
    text = data.decode("latin-1").rstrip("\r\n")
    text = re.sub(r"\r?\n[ \t]+", " ", text)  # RFC 9112, 5.2: a header over several lines
    lines = [line.rstrip("\r") for line in text.split("\n")]
    status_line = _STATUS_LINE.match(lines[0].rstrip())
    if not status_line:
        raise WireError(f"the first line of its answer is {lines[0][:100]!r}")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        name = name.strip().lower()
        value = value.strip()
        if name in headers:
            value = f"{headers[name]}, {value}"
        headers[name] = value
    minor, status, reason = status_line.groups()
    version = "1.0" if minor == "0" else "1.1"
    return ResponseHead(version, int(status), reason or "", headers, lines)

def check_reply_size(count):
    """Raise ServerError if a reply of *count* bytes is too long to be held."""
    if count > MAX_REPLY_BYTES:
        raise ServerError(f"the reply is over {MAX_REPLY_BYTES >> 20} MiB")

class ResponseDecoder:
    """Decode one HTTP/1.1 response (RFC 9112) from bytes that come cut anywhere.

    The states, in the order in which they are passed:

        head is None       interim responses (1xx), then the head
        not complete       the body: by its length, in chunks, or until the connection closes
        complete           what comes now is not of this response, and is kept as *unread*
    """

    def __init__(self, method="GET"):
        self.head = None
        self.has_body = False  # some of the body came
        self.complete = False
        self.keeps_open = False  # another request can follow on the connection
        self.unread = b""
        self.failure = None  # IncompleteError or ServerError: what is wrong with the body
        self._method = method
        self._received = bytearray()  # of the head
        self._head_bytes = 0  # of interim responses
        # A function, since a method bound to this object would be a cycle.
        self._take = ResponseDecoder._take_until_close
        self._missing = 0  # bytes of the body, or of the chunk
        self._frame = b"\r\n"  # bytes after the last chunk, from the line end that closes it
        self._is_compressed = False
        self._inflater = None  # of the gzip member or deflate stream that is being read
        self._match_size = re.compile(_CHUNK_SIZE).match  # not compiled at import: that is slow

    def feed(self, data):
        """Return the bytes of the body that *data* brought, decompressed.

        Raise WireError where it is not HTTP.  If the body is broken, return the good bytes before
        that and set *failure*: the next call raises it.
        """
        if self.failure:
            raise self.failure
        if self.complete:
            self.unread += data
            return b""
        if self.head is None:
            data = self._take_head(data)
            if self.head is None:
                return b""
        body = self._take(self, data)
        if body:
            self.has_body = True
        if self._is_compressed:
            body = self._inflate(body)
            if self.complete:
                self._check_compressed_end()
        return body

    def finish(self):
        """Handle the end of the connection; raise IncompleteError where it comes too early.

        Where the head is still None, no response came.
        """
        may_end = self._take in (ResponseDecoder._take_until_close, ResponseDecoder._take_trailer)
        if self.head and may_end:
            self.complete = True
            self._check_compressed_end()
        if self.failure:
            raise self.failure
        if not self.complete:
            raise IncompleteError("closed the connection")

    def _take_head(self, data):
        start = max(0, len(self._received) - 3)
        self._received += data
        while True:
            self._check_beginning()
            end = _END_OF_HEAD.search(self._received, start)
            if not end:
                break
            head = parse_head(bytes(self._received[:end.end()]))
            del self._received[:end.end()]
            if head.status >= 200 or head.status == 101:
                self.head = head
                self._choose_framing()
                return bytes(self._received)
            self._head_bytes += end.end()
            start = 0
        if self._head_bytes + len(self._received) > MAX_HEAD_BYTES:
            raise WireError(f"the head of its answer is over {MAX_HEAD_BYTES >> 20} MiB")
        return b""

    def _check_beginning(self):
        beginning = bytes(self._received[:20])
        if beginning[:2] in _TLS_RECORDS:
            raise WireError("it speaks TLS: try https://")
        if not b"HTTP/1.".startswith(beginning[:7]):
            raise WireError(f"its answer begins with {beginning.decode('latin-1')!r}")

    def _choose_framing(self):  # RFC 9112, 6.3
        status = self.head.status
        headers = self.head.headers
        length = re.match(r"([0-9]+)\s*(,|\Z)", headers.get("content-length", ""))
        transfer_coding = headers.get("transfer-encoding", "").lower()
        content_coding = headers.get("content-encoding", "").lower()
        is_tunnel = self._method == "CONNECT" and status <= 299
        if is_tunnel or status in (101, 204, 304) or self._method == "HEAD":
            self._take = ResponseDecoder._take_length
        elif re.search(r"(^|[, \t])chunked$", transfer_coding):
            self._take = ResponseDecoder._take_chunks
        elif length:
            self._take = ResponseDecoder._take_length
            self._missing = int(length.group(1)[:20])  # int refuses thousands of digits
        self._is_compressed = content_coding in ("gzip", "x-gzip", "deflate")

    def _end(self, rest):
        connection = self.head.headers.get("connection", "").lower()
        self.complete = True
        self.unread = rest
        self.keeps_open = "close" not in connection
        if self.head.version == "1.0":
            self.keeps_open = "keep-alive" in connection

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

        Each iteration starts at the CRLF that ends the previous chunk.
        """
        data = self._frame + data
        self._frame = b""
        at = self._missing
        pieces = [data[:at]]
        available = len(data)
        while at + 2 < available:  # a line end alone holds no size
            line = self._match_size(data, at)
            if not line:
                self._hold_chunk_size(data[at:])
                break
            start = line.end()
            size = int(line[1], 16)
            if not size:
                self._take = ResponseDecoder._take_trailer
                self._take_trailer(data[start - 1:])
                break
            at = start + size
            pieces.append(data[start:at])
        else:
            self._frame = data[at:]
        self._missing = max(0, at - available)
        return b"".join(pieces)

    def _hold_chunk_size(self, line):
        """Keep the *line* of a chunk size until it is complete."""
        is_complete = line.find(b"\n", 2) >= 0
        if is_complete or len(line) > READ_BYTES:
            self.failure = IncompleteError("sent an invalid chunk size")
        self._frame = line

    def _take_trailer(self, data):
        self._frame += data
        end = _END_OF_HEAD.search(self._frame)
        if end:
            self._end(self._frame[end.end():])
        elif len(self._frame) > MAX_HEAD_BYTES:
            limit = MAX_HEAD_BYTES >> 20
            self.failure = IncompleteError(f"sent a trailer section over {limit} MiB")
        return b""

    def _inflate(self, body):
        """Return *body* decompressed; gzip can have several members (RFC 1952, 2.2)."""
        import zlib

        pieces = []
        size = 0
        try:
            while body:
                if self._inflater is None or self._inflater.eof and body.startswith(_GZIP_START):
                    self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
                elif self._inflater.eof:  # padding
                    break
                piece = self._inflater.decompress(body, MAX_REPLY_BYTES - size + 1)
                pieces.append(piece)
                size += len(piece)
                check_reply_size(size)
                body = self._inflater.unused_data
        except zlib.error as error:
            self._fail(ServerError("the reply is not in the encoding that it claims"))
            self.failure.__cause__ = error
        except ServerError as error:
            self._fail(error)
            return b""
        return b"".join(pieces)

    def _check_compressed_end(self):
        if self._inflater and not self._inflater.eof:
            self._fail(IncompleteError("sent an incomplete compressed body"))

    def _fail(self, error):
        self.failure = self.failure or error
        self.complete = False

class EventDecoder:
    """Decode a stream of server-sent events (WHATWG HTML, 9.2.6) that comes cut anywhere.

    Some servers write bare JSON between the events.  So an Event with an empty name stands for
    the lines of a block, between blank lines, that are no field of that standard.
    """

    def __init__(self):
        self._unfinished = [b""]  # pieces of a line whose end has not come
        self._after_cr = False  # the last bytes ended in CR: an LF that follows belongs to it
        self._at_beginning = True
        self._name = ""
        self._data = []
        self._stray_lines = []
        self._size = 0  # bytes since the last blank line

    def feed(self, data):
        """Return the Events that *data* completes; raise ServerError where one has no end."""
        if self._after_cr or b"\r" in data:
            data = self._with_newlines(data)
        self._size += len(data)
        if self._size > MAX_EVENT_BYTES:
            raise ServerError(f"the stream has an event of over {MAX_EVENT_BYTES >> 20} MiB")
        end = data.rfind(b"\n") + 1
        if not end:
            self._unfinished.append(data)
            return []
        self._unfinished.append(data[:end])
        text = b"".join(self._unfinished).decode("utf-8", "replace")
        self._unfinished = [data[end:]]
        if self._at_beginning:
            self._at_beginning = False
            text = re.sub(r"\A\ufeff", "", text)  # a byte-order mark
        return self._take_lines(text)

    def finish(self):
        """Return the Event of stray lines at the end; another one that is not ended is dropped."""
        line = b"".join(self._unfinished).decode("utf-8", "replace")
        self._take_line(line)
        self._data = []
        return self._end_block()

    def _with_newlines(self, data):
        """Return *data* with LF for each CR and CRLF, also where a CRLF was cut in two."""
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        elif not data:
            return b""
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _take_lines(self, text):
        if text.startswith("data: ") and text.endswith("\n\n"):
            # The usual case, a hundred events of one line at once, needs no loop.
            texts = text[6:-2].split("\n\ndata: ")
            in_block = self._data or self._name or self._stray_lines
            if text.count("\n") == 2 * len(texts) and not in_block:
                self._size = len(self._unfinished[0])
                return [Event("message", data) for data in texts]
        events = []
        for line in text[:-1].split("\n"):
            if line:
                self._take_line(line)
            else:
                events += self._end_block()
        return events

    def _take_line(self, line):
        name, _, value = line.partition(":")
        if value.startswith(" "):
            value = value[1:]
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._name = value
        elif name not in ("id", "retry", ""):
            self._stray_lines.append(line)

    def _end_block(self):
        events = []
        if self._stray_lines:
            events.append(Event("", "\n".join(self._stray_lines)))
        if self._data:
            events.append(Event(self._name or "message", "\n".join(self._data)))
        self._name = ""
        self._data = []
        self._stray_lines = []
        self._size = len(self._unfinished[0])
        return events

# -- Protocol ---------------------------------------------------------------------------------

BODY_OPTIONS = ("max_tokens", "temperature", "top_p", "frequency_penalty", "presence_penalty",
                "seed", "store")
HERE_DOCUMENT_BYTES = 100 * 1000  # a longer body does not fit into a command line
MAX_HELD_CHOICES = 4
MAX_TOKENS = 10 ** 12  # a larger count is ignored
MAX_REASON_CHARACTERS = 100
MAX_ERROR_NAME_CHARACTERS = 60
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
        value = getattr(options, name)
        if value is not None:
            fields[name] = value
    if options.metadata:
        fields["metadata"] = dict(options.metadata)
    if options.schema is not None:
        fields["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": options.schema_name, "schema": options.schema},
        }
    ours = set(fields)
    for name, value in options.param:
        if value is None and name in ours:
            fields.pop(name, None)
        else:
            fields[name] = value
    headers = []
    for name, option in (("X-SLO-TTFT-Ms", "slo_ttft"), ("X-SLO-TPOT-Ms", "slo_tpot")):
        value = getattr(options, option)
        if value is not None:
            headers.append((name, str(value)))
    return Sampling(options.model, fields, headers)

def token_limit(sampling):
    """Return the limit of tokens that *sampling* sets, or None."""
    fields = sampling.fields
    return fields.get("max_tokens") or fields.get("max_completion_tokens")

def _encode_body(body):
    # UTF-8 as it stands, so that a lone surrogate cannot hide in an escape.
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")

def build_request(method, url, settings, body=None, headers=()):
    """Return the Request that sends *body*, a JSON document or None, to *url*.

    The headers of *settings* replace those of the same name.
    """
    streamed = bool(body and body.get("stream"))
    accept = "text/event-stream" if streamed else "application/json"
    ours = [("Accept", accept), ("User-Agent", "xeroctl/" + __version__)]
    data = None
    if body is not None:
        data = _encode_body(body)
        ours.append(("Content-Type", "application/json"))
    if settings.api_key:
        ours.append(("Authorization", "Bearer " + settings.api_key))
    ours += headers
    given = list(settings.headers)
    names = {name.lower() for name, _ in given}
    kept = [(name, value) for name, value in ours if name.lower() not in names]
    return Request(method, url, kept + given, data, streamed)

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

def build_models_request(settings):
    """Return the Request for the models behind the endpoint, or behind the project without one."""
    url = endpoint_url(settings.base_url, settings.endpoint, "/models")
    return build_request("GET", url, settings)

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

    secrets = secret_parameters(request.url) + [settings.api_key or ""]
    words = ["curl", "-gsSN" if request.streamed else "-gsS"]
    words.append(quote(redact(request.url, secrets)))
    if request.method not in ("GET", "POST"):
        words += ["-X", request.method]
    for name, value in request.headers:
        if settings.api_key and value == "Bearer " + settings.api_key:
            words += ["-H", f'"{name}: Bearer ${ENV_API_KEY}"']
            continue
        if is_secret_name(name):
            value = "***"
        words += ["-H", quote(redact(f"{name}: {value}", secrets))]
    if settings.cacert:
        words += ["--cacert", quote(settings.cacert)]
    if request.body is None:
        return " ".join(words)
    body = redact(request.body.decode("utf-8"), secrets)
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

def _parse_count(document, name):
    count = get_field(document, name, (int, float))
    if count is None or count % 1 != 0 or not 0 <= count <= MAX_TOKENS:
        return None
    return int(count)

def parse_usage(usage):
    """Return the Usage that the object *usage* of a reply or chunk tells; floats may be whole."""
    prompt = get_field(usage, "prompt_tokens_details", dict)
    completion = get_field(usage, "completion_tokens_details", dict)
    return Usage(
        _parse_count(usage, "prompt_tokens"),
        _parse_count(usage, "completion_tokens"),
        _parse_count(usage, "total_tokens"),
        _parse_count(prompt, "cached_tokens"),
        _parse_count(completion, "reasoning_tokens"),
    )

def merge_usage(old, new):
    """Return *new* with what it does not tell from *old*: a later chunk takes nothing back."""
    if old is None:
        return new
    return Usage(*[before if after is None else after for before, after in zip(old, new)])

def join_surrogates(text):
    """Return *text* with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

def split_surrogate(text):
    """Return (*text* without a high surrogate at its end, that surrogate or nothing)."""
    if "\ud800" <= text[-1:] <= "\udbff":
        return text[:-1], text[-1]
    return text, ""

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

_CODE_BLOCK = re.compile(r"(?ms)^([ \t]*)(```+|~~~+)[^`\n]*$\n?(.*?)"
                         r"(?:^[ \t]*\2[`~]*[ \t]*$|\Z)")

def find_code_blocks(text):
    """Return the contents of the fenced code blocks of *text* (CommonMark, 4.5).

    A block that is not closed reaches to the end.
    """
    contents = []
    for block in _CODE_BLOCK.finditer(text.replace("\r\n", "\n")):
        indent, _, content = block.groups()
        content = re.sub("(?m)^[ \t]{0,%d}" % len(indent), "", content)
        if content.endswith("\n"):
            content = content[:-1]
        contents.append(content)
    return contents

def extract_code_block(text):
    """Return the content of the first fenced code block of *text*, or None."""
    contents = find_code_blocks(text)
    return contents[0] if contents else None

# Errors, whatever their shape

# Names in small letters without other characters, the best first.
_ERROR_FIELDS = ("error", "detail", "message", "msg", "errormessage", "errormsg", "errmsg",
                 "errordescription", "statusmsg", "baseresp", "faultstring", "fault", "errors")
_WEAK_ERROR_FIELDS = ("reason", "description", "title")  # do not make a document an error
_STATUS_FIELDS = ("code", "status", "status_code", "statusCode", "error_code")
_CODE_FIELDS = ("code", "type", "status", "status_code", "error_code", "__type")
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

def _page_title(text):
    import html

    title = re.search(r"(?is)<(title|message)\b[^>]*>(.*?)</\1>", text)
    if not title:
        return ""
    return html.unescape(title.group(2)).strip()

def _unpacked(text):
    """Return what an error's *text* holds: a JSON document, the title of a page, or itself."""
    packed = re.match(r"\s*(?:data: *|error: *)?([{\[].*)", text, re.DOTALL)
    try:
        if packed:
            return _JSON.raw_decode(packed.group(1))[0]
    except (ValueError, RecursionError):
        return text
    if text.startswith("<"):
        return _page_title(text) or text
    return text

def error_sentence(document, depth=6):
    """Return what an error *document* of any known shape says, or an empty text."""
    if isinstance(document, str):
        unpacked = _unpacked(document)
        if isinstance(unpacked, str):
            return unpacked
        return error_sentence(unpacked, depth - 1) or document
    if depth <= 0:
        return ""
    if isinstance(document, list):
        sentences = [error_sentence(item, depth - 1) for item in document]
        return "; ".join(filter(None, sentences))
    if not isinstance(document, dict):
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
    if raw and raw not in sentence:  # OpenRouter's: the words of the provider behind it
        sentence = f"{sentence.rstrip('.')}: {raw}"
    provider = get_field(fields.get("metadata"), "provider_name", str)
    if sentence and provider:
        sentence += f" (provider {provider})"
    where = get_field(document, "loc", list)  # FastAPI's: the path of the field it refuses
    if where and sentence:
        path = ".".join(str(part) for part in where if isinstance(part, (str, int)))
        sentence = f"{path}: {sentence}"
    return sentence

def _failed_choice(choices):  # as OpenRouter reports an error
    if not isinstance(choices, list):
        return None
    for choice in choices:
        if isinstance(choice, dict) and choice.get("error"):
            return choice
    return None

def has_error(document):
    """Return whether *document*, which came with HTTP 200, calls itself an error."""
    if not isinstance(document, dict):
        return False
    base = get_field(document, "base_resp", dict)  # MiniMax's, also in good replies
    if document.get("object") == "error" or document.get("success") is False:
        return True
    return bool(get_field(document, "error", (str, dict)) or get_field(base, "status_code", int))

def is_error(document):
    """Return whether *document*, which came with HTTP 200 for a completion, is an error."""
    if not isinstance(document, dict) or document.get("error"):
        return True
    choices = document.get("choices")
    if choices:
        return _failed_choice(choices) is not None
    if has_error(document):
        return True
    fields = _normalised(document)
    fields.pop("baseresp", None)
    if fields.get("detail") or fields.get("errors") or fields.get("fault"):
        return True
    return any(get_field(fields, name, str) for name in _ERROR_FIELDS)

def _merge_error_fields(document):
    """Return the fields of an error *document* and of the object in it, one beside the other."""
    facts = {}
    parts = [document]
    for name in ("error", "errors", "base_resp"):
        part = get_field(document, name, (dict, list))
        parts += part[:1] if isinstance(part, list) else [part]
    for part in parts:
        if isinstance(part, dict):
            facts.update(part)
    return facts

def _error_code(facts, status):
    for name in _CODE_FIELDS:
        code = get_field(facts, name, (str, int))
        if code and str(code) not in (str(status), "None"):  # Python servers print a missing one
            return str(code)
    return ""

def _names_in(facts):
    names = []
    for name in _CODE_FIELDS + ("error_type", "error"):
        text = get_field(facts, name, str) or ""
        names.append(text[:MAX_ERROR_NAME_CHARACTERS])
    return " ".join(names)

def _effective_status(facts, status):
    """Return the HTTP status of an error's class: in a reply of 2xx its own number or names."""
    if not 200 <= status <= 299:
        return status
    for field in _STATUS_FIELDS:
        claimed = str(get_field(facts, field, (int, str)))
        if re.match(r"[45]\d\d\Z", claimed):
            return int(claimed)
    for effective, pattern in _STATUS_WORDS:
        if re.search(pattern, _names_in(facts), re.IGNORECASE):
            return effective
    return status

# What email.utils raises for odd dates, the last two up to Python 3.8.
_DATE_ERRORS = (ValueError, TypeError, OverflowError, IndexError, UnboundLocalError)

def retry_after_seconds(headers, facts):
    """Return the seconds that a response asks us to wait (RFC 9110, 10.2.3), or None.

    The date form counts from the response's own Date, so that our clock need not be right.
    """
    from email.utils import mktime_tz, parsedate_tz

    value = headers.get("retry-after", "")
    number = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:,|\Z)")
    milliseconds = number.match(headers.get("retry-after-ms", ""))
    whole = number.match(value)
    if milliseconds:
        seconds = float(milliseconds.group(1)) / 1000
    elif whole:
        seconds = float(whole.group(1))
    else:
        seconds = get_field(facts, "retry_after", (int, float))
        with contextlib.suppress(*_DATE_ERRORS):
            begin = mktime_tz(parsedate_tz(headers.get("date")))
            seconds = mktime_tz(parsedate_tz(value)) - begin
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

def _advice(effective, context, retry_after, is_quota, is_from_server):
    if is_quota:
        return "waiting does not help: check the plan and the credit"
    if retry_after and retry_after > MAX_RETRY_DELAY_SECONDS:
        return f"the server asks to wait {round(retry_after)} s"
    if effective == 401 and not context.secrets:
        return f"set {ENV_API_KEY} or give --api-key"
    if effective == 403 and not is_from_server:
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
    if isinstance(document, str):
        return document
    try:
        return json_text(document)
    except XeroctlError:
        return ""

def _has_unrecognised_fields(document):
    if not isinstance(document, dict) or document.get("choices"):
        return False
    if not isinstance(document.get("error", []), (list, dict)):
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

def _status_prefix(context, code, request_id):
    names = code
    if request_id:
        names = f"{code}, request {request_id}".lstrip(", ")
    if names:
        names = f" ({names})"
    if 200 <= context.status <= 299:
        return "error in the reply" + names
    place = f"HTTP {context.status}{names}"
    if context.status == 404:
        place += " at " + redact(context.url, context.secrets)
    return place + context.via

def build_error(document, context, is_from_server=True):
    """Return the error that *document* describes: parsed JSON, or a text for anything else.

    With HTTP 200 the document's own number or names say what class of error it is.
    *is_from_server* says that no proxy wrote it.
    """
    body = redact(_body_text(document), context.secrets)
    if isinstance(document, list) and len(document) == 1:  # as Gemini sends it
        document = document[0]
    if not get_field(document, "error", (str, dict)):
        choices = get_field(document, "choices", list)
        document = _failed_choice(choices) or document
    facts = _merge_error_fields(document)
    effective = _effective_status(facts, context.status)
    retry_after = retry_after_seconds(context.headers, facts)
    is_quota = effective in (402, 429) and bool(_QUOTA_USED_UP.search(_names_in(facts)))
    advice = _advice(effective, context, retry_after, is_quota, is_from_server)
    sentence = error_sentence(document)
    if not sentence and _has_unrecognised_fields(document):
        sentence = body
    elif not sentence and 200 <= context.status <= 299 and not isinstance(document, (dict, str)):
        sentence = "not a completion: " + body
    if context.url.startswith("http:") and _PLAIN_HTTP.search(sentence):
        advice = "begin the base URL with https://"
    sentence = " ".join(redact(sentence, context.secrets).split())[:MAX_ERROR_CHARACTERS]
    if advice:
        sentence = sentence.rstrip(".")
    code = redact(_error_code(facts, effective), context.secrets)
    request_id = redact(context.headers.get("x-request-id", ""), context.secrets)
    place = _status_prefix(context, code, request_id)
    error = _error_class(effective)(": ".join(filter(None, [place, sentence, advice])))
    error.reason = place
    if not 200 <= context.status <= 299:
        error.status = context.status
    error.code = code or None
    error.request_id = request_id or None
    error.retryable = is_retryable_status(effective) and not is_quota
    error.retry_after = retry_after
    error.body = body
    return error

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
    is_from_server = not text  # an empty body is no proxy page
    try:
        document = parse_json(text)
        is_from_server = True
    except ValueError:
        document = text
        if text.startswith("<"):
            title = _page_title(text)
            document = "the answer is an HTML page" + (title and ": " + title)
    error = build_error(document, context, is_from_server)
    error.body = redact(body, context.secrets)
    return error

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

# Answers: from bytes to Chunks, and from Chunks to a Reply

class _ChunkBuilder:
    """Add up the documents of one read to a Chunk.

    It remembers over all reads what text was given, so that a whole message after its deltas,
    or a message that grows beside them, adds only what is new.
    """

    def __init__(self):
        self.has_end = False  # a finish reason came, or a whole message
        self._choice_index = None  # of the choice that is the answer, once that is known
        self._has_begun = False
        # Choices of another index, until choice 0 arrives, or MAX_HELD_CHOICES chunks came
        # without it.
        self._held = []
        self._given = bytearray()  # the text, in UTF-8: 100,000 small strings would weigh 6 MB
        self._id = self._model = None
        self._has_finished = False
        self._begin("", "")

    def _begin(self, text, thought):
        """Begin a Chunk with the halves of characters that are left from the last one."""
        self._texts = [text]
        self._thoughts = [thought]
        self._deltas = 0
        self._reason = self._usage = None
        self._tool_calls = []
        self._documents = []
        self._sources = []

    def add(self, document, source):
        """Add a chunk or reply of whatever shape, and its JSON text."""
        self._documents.append(document)
        self._sources.append(source)
        if not self._id:
            self._id = get_field(document, "id", str) or None
        if not self._model:
            self._model = get_field(document, "model", str) or None
        usage = document.get("usage")
        if usage:
            self._usage = merge_usage(self._usage, parse_usage(usage))
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
            if self._choice_index in (None, choice["index"]):
                self._choice_index = choice["index"]
                self._add_choice(choice)

    def _add_choice(self, choice):
        delta = choice.get("delta")
        message = choice.get("message")
        text = thought = ""
        if isinstance(delta, dict):
            text = delta.get("content")
            if not text or not isinstance(text, str):
                text = content_text(delta)
            if not text or len(delta) > 1:
                thought = self._add_other_fields(delta)
        if message and not text:
            text = self._rest_of_message(content_text(message))
            if not self._has_begun:
                thought = self._add_other_fields(message)
            self.has_end = self.has_end or delta is None
        if text:
            self._texts.append(text)
        if text or thought:
            self._deltas += 1
        self._has_begun = bool(self._has_begun or text or thought or self._tool_calls)
        reason = choice.get("finish_reason")
        if reason and isinstance(reason, str):
            self._reason = reason
            self.has_end = True

    def _add_other_fields(self, message):
        thought = (get_field(message, "reasoning_content", str)
                   or get_field(message, "reasoning", str))
        if thought:
            self._thoughts.append(thought)
        for call in get_field(message, "tool_calls", list) or ():
            if get_field(call, "function", dict) or get_field(call, "id", str):
                self._tool_calls.append(call)
        return thought

    def _rest_of_message(self, text):
        given = self._given.decode("utf-8") + join_surrogates("".join(self._texts))
        if text.startswith(given):
            return text[len(given):]
        return ""

    def build(self, at):
        """Return the Chunk of all that was added since the last call, or None for nothing.

        The first half of a character waits for the second one, until finish().
        """
        text = "".join(self._texts)
        thought = "".join(self._thoughts)
        half = half_thought = ""
        if not self._has_finished:
            text, half = split_surrogate(text)
            thought, half_thought = split_surrogate(thought)
        if not (text or thought or self._documents or self._tool_calls or self._reason):
            return None
        text = join_surrogates(text)
        self._given += text.encode("utf-8")
        if thought:
            thought = join_surrogates(thought)
        chunk = Chunk(text, thought, self._deltas, self._reason, self._usage, self._id,
                      self._model, self._tool_calls, self._documents, self._sources, at)
        self._begin(half, half_thought)
        return chunk

    def finish(self, at):
        """Return the last Chunk, or None for nothing."""
        self._add_held()
        self._has_finished = True
        return self.build(at)

def _source_line(text):
    """Return the JSON *text* if it can be printed as one line of valid JSON, else None."""
    if "NaN" in text or "Infinity" in text or "\n" in text:
        return None
    return text

class AnswerDecoder:
    """Decode the body of an answer, a stream or one document, from bytes to Chunks.

    The states, in the order in which they are passed:

        undecided          only blanks came; the type and the first other byte say what it is
        stream, document   events, and bare JSON between them; or one JSON text
        ended              after [DONE], or with *error* set: nothing more need be read

    *error* is the XeroctlError found in what was fed, to be raised after its Chunk was used.
    """

    def __init__(self, streamed, head, context):
        self.ended = False
        self.error = None
        self._context = context
        content_type = head.headers.get("content-type", "").lower()
        self._is_labelled = "event-stream" in content_type
        self._is_stream = self._is_labelled or streamed and "json" not in content_type
        self._is_stream = self._is_stream and head.status != 204
        self._events = None  # EventDecoder, once it is known to be a stream
        self._received = bytearray()  # while undecided, and of a document
        self._first = b""  # byte that is no blank
        self._builder = _ChunkBuilder()

    def feed(self, data, at):
        """Return the Chunk of what *data* brought at the monotonic time *at*, or None."""
        if self.ended:
            return None
        try:
            if self._events is None:
                self._received += data
                check_reply_size(len(self._received))
                self._decide()
                if self._events is None:
                    return None
                data = bytes(self._received)
            self._take_events(self._events.feed(data))
        except XeroctlError as error:
            self._fail(error)
        if self.ended:
            return self._builder.finish(at)
        return self._builder.build(at)

    def finish(self, at):
        """Return the last Chunk, or None; set *error* where the end or the answer is missing."""
        if self.ended:
            return None
        if self._events:
            self._take_events(self._events.finish())
        elif not self._is_stream:
            self._take_document()
        chunk = self._builder.finish(at)
        if self._is_stream and not self._builder.has_end:
            self._fail(CutShortError("the reply was cut short: the stream ended before its end",
                                     retryable=True))
        self.ended = True
        return chunk

    def _decide(self):
        if self._first:
            return
        self._first = self._received.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if self._first in (b"{", b"[", b"<") and not self._is_labelled:
            self._is_stream = False
        if self._first and self._is_stream:
            self._events = EventDecoder()

    def _take_events(self, events):
        """Add the documents of *events*: those of objects in a row are parsed at once."""
        texts = []
        for name, data in events:
            if self.ended:
                return
            if name == "message" and data.startswith("{"):
                texts.append(data)
                continue
            self._add_texts(texts)
            texts = []
            self._take_other_event(name, data.strip())
        self._add_texts(texts)

    def _take_other_event(self, name, data):
        if name == "message":
            if data.strip('"').lower() == "[done]":
                self.ended = True
            elif data:
                self._add_texts([data])
        elif not name:
            self._take_stray(data)
        else:
            try:
                document = parse_json(data)
            except ValueError:
                document = data
            if name == "error" and not get_field(document, "error", (str, dict)):
                document = {"error": document or "no reason given"}
            if name == "error" or get_field(document, "choices", list):
                self._add_documents([document], [None])

    def _take_stray(self, text):
        """Take bare JSON between the events, and lines such as `error: {...}`."""
        if text.startswith("error:"):
            self._take_other_event("error", text[6:].strip())
        while text[:1] in ("{", "[") and not self.ended:
            try:
                document, end = _JSON.raw_decode(text)
            except (ValueError, RecursionError):
                return
            self._add_documents([document], [None])
            text = text[end:].strip()
        if re.match(r"(?i)data: *\[done\]", text):
            self.ended = True

    def _add_texts(self, texts):
        """Add the JSON documents *texts*: parsed as one where that goes well, else one by one."""
        joined = "[" + ",".join(texts) + "]"
        is_whole = False
        try:
            documents, end = _JSON.raw_decode(joined)
            is_whole = end == len(joined) and len(documents) == len(texts)
        except (ValueError, RecursionError):
            pass  # one by one, then
        if is_whole:
            if "NaN" in joined or "Infinity" in joined or "\n" in joined:
                texts = map(_source_line, texts)
            self._add_documents(documents, texts)
            return
        for text in texts:
            try:
                document = parse_json(text.strip())
            except ValueError:
                self._fail(ServerError("the stream holds something that is not JSON", body=text))
                return
            self._add_documents([document], [None])

    def _add_documents(self, documents, sources):
        """Add *documents* up to the first that is an error; empty texts and null are skipped."""
        for document, source in zip(documents, sources):
            if self.ended:
                return
            if not is_error(document):
                self._builder.add(document, source)
            elif document not in (None, ""):
                self._fail(build_error(document, self._context))

    def _take_document(self):
        try:
            document = parse_reply(bytes(self._received), self._context)
            if is_error(document):
                raise build_error(document, self._context)
            self._builder.add(document, None)
        except XeroctlError as error:
            self._fail(error)

    def _fail(self, error):
        self.error = self.error or error
        self.ended = True

_REASON_KINDS = (  # the first that matches counts; what none matches is unknown
    ("end", r"(stop|eos|eos_token|end_turn|stop_sequence)\Z"),
    ("tool", r"(tool_calls?|tool_use|function_call)\Z"),
    ("failed", r"error|abort|cancel|timeout|failed|insufficient_system_resource|.*_error"),
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

class Reply:
    """An answer, added up from Chunks: what arrived, also of a try that failed in the middle."""

    def __init__(self, max_tokens=None):
        self.max_tokens = max_tokens  # the limit that the request set
        self.finish_reason = None
        self.usage = parse_usage(None)
        self.id = self.model = None
        self.deltas = 0  # events with text or reasoning in them
        self.tool_calls = []  # names of the functions that the model asked for
        self.first_at = self.last_at = None  # monotonic times of text or reasoning
        self.seconds = self.first_seconds = None  # set by receive_answer()
        self.has_reasoning = False  # in fields of its own or in the text
        self._splitter = ThoughtSplitter()
        self._has_thought = False  # in the text
        self._answer = bytearray()  # UTF-8: a list of 100,000 small strings would weigh 6 MB

    def add(self, chunk):
        """Take in one Chunk."""
        self.id = self.id or chunk.id
        self.model = self.model or chunk.model
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.usage:
            self.usage = merge_usage(self.usage, chunk.usage)
        for call in chunk.tool_calls:
            name = get_field(get_field(call, "function", dict), "name", str)
            if name or not self.tool_calls:
                self.tool_calls.append(name or "")
        thought, answer = self._splitter.feed(chunk.text)
        self._answer += answer.encode("utf-8")
        self._has_thought = self._has_thought or bool(thought)
        self.has_reasoning = self.has_reasoning or self._has_thought or bool(chunk.reasoning)
        if chunk.deltas:
            self.deltas += chunk.deltas
            self.last_at = chunk.at
            if self.first_at is None:
                self.first_at = chunk.at

    @property
    def started(self):
        """Whether a token came."""
        return bool(self.deltas or self.tool_calls)

    @property
    def text(self):
        """The answer that arrived so far, without <think>...</think> at its head."""
        _, held = self._splitter.finish()
        text = self._answer.decode("utf-8") + held
        if self._has_thought:
            return text.lstrip()
        return text

    def check_answer(self):
        """Raise CutShortError where the server says that it failed, ServerError for no answer."""
        kind = _reason_kind(self.finish_reason)
        reason = f" (finish reason {(self.finish_reason or '')[:MAX_REASON_CHARACTERS]})"
        if kind == "failed":
            raise CutShortError("the reply was cut short: the server failed" + reason,
                                retryable=True)
        if self.tool_calls or kind == "tool" or self.text.strip():
            return
        if not self.deltas and kind == "none":
            raise ServerError("the reply holds no answer")
        message = "the answer is empty"
        if self.has_reasoning:
            message += ": only reasoning came"
        if kind in _WARNINGS:
            message += reason
        raise ServerError(message)

def finish_warning(reply):
    """Return what the user must know about how *reply* ended, even with --quiet, or None."""
    kind = _reason_kind(reply.finish_reason)
    if kind not in _WARNINGS:
        return None
    warning = f"{_WARNINGS[kind]} (finish reason {reply.finish_reason[:MAX_REASON_CHARACTERS]})"
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

# -- Messages ---------------------------------------------------------------------------------

CONVERSATION_FORMAT = "xeroctl-conversation"
CONVERSATION_VERSION = 1
SYSTEM_ROLES = ("system", "developer")

def _turn_bounds(messages):
    """Return the indices in *messages* where each turn begins, and where the last one ends."""
    bounds = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return bounds + [len(messages)]

class Conversation:
    """The messages of a chat, oldest first, each in the API's shape with every field it came with.

    *unanswered* is the last question while it has no answer.  It is saved, and /retry asks it
    again, but no other question is sent with it.  A turn is a user message and all that follows
    it up to the next one.
    """

    def __init__(self, messages=(), unanswered=None):
        self.messages = list(messages)
        self.unanswered = unanswered

    def _has_system(self):
        return bool(self.messages) and self.messages[0]["role"] in SYSTEM_ROLES

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
        """Return the messages, with the question that has no answer as the last one."""
        if self.unanswered:
            return self.messages + [self.unanswered]
        return self.messages

    def add_turn(self, question, answer):
        """Add the message *question* and the text *answer*; a blank one leaves it unanswered."""
        self.unanswered = question
        if answer.strip():
            self.messages += [question, {"role": "assistant", "content": answer}]
            self.unanswered = None

    def clear(self):
        """Forget everything but the leading system message."""
        del self.messages[self._has_system():]
        self.unanswered = None

    def turns(self):
        """Return the list of turns, each a list of messages; the unanswered question is one."""
        messages = self.all_messages()
        bounds = _turn_bounds(messages)
        return [messages[start:end] for start, end in zip(bounds, bounds[1:])]

    def last_question(self):
        """Return (question, messages before it) of the newest turn, or (None, [])."""
        messages = self.all_messages()
        *starts, _ = _turn_bounds(messages)
        if not starts:
            return None, []
        return messages[starts[-1]], messages[:starts[-1]]

    def undo(self):
        """Take the newest turn away and return its question, or None where there is no turn."""
        question, before = self.last_question()
        if question:
            self.messages = before
            self.unanswered = None
        return question

    def drop(self, count):
        """Drop the oldest *count* turns, but no system messages; return how many there were."""
        messages = self.messages
        bounds = _turn_bounds(messages)
        count = min(count, len(bounds) - 1)
        if count:
            end = bounds[count]
            messages[:end] = [message for message in messages[:end]
                              if message["role"] in SYSTEM_ROLES]
        return count

    def last_answer(self):
        """Return the text of the newest answer that has text, or None."""
        for message in reversed(self.messages):
            if message["role"] == "assistant" and content_text(message).strip():
                return content_text(message)
        return None

def message_text(message):
    """Return what *message* says: its text, and the names of its other parts."""
    pieces = [content_text(message)]
    for part in get_field(message, "content", list) or ():
        if get_field(part, "text", str) is None:
            pieces.append(f"[{get_field(part, 'type', str) or 'part of unknown type'}]")
    if message.get("tool_calls"):
        pieces.append(f"[tool calls: {json_text(message['tool_calls'])}]")
    return "\n".join(filter(None, pieces))

def conversation_json(conversation, endpoint, model, saved_at):
    """Return the JSON text that keeps *conversation*; *saved_at* is its time in ISO 8601."""
    return json_text({
        "format": CONVERSATION_FORMAT,
        "version": CONVERSATION_VERSION,
        "endpoint": endpoint,
        "model": model,
        "saved_at": saved_at,
        "messages": conversation.all_messages(),
    }, indent=2) + "\n"

def _check_message(message, name):
    if not get_field(message, "role", str):
        raise UsageError(f"{name}: no message: it has no role")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return
    fields = ("refusal", "tool_calls", "function_call")
    if content is None and any(map(message.get, fields)):
        return
    if not isinstance(content, str):
        raise UsageError(f"{name}: no text in it")

def _unusual_roles(messages):
    """Return a note on the first role that is not the usual one, or no note."""
    usual_roles = itertools.cycle(("user", "assistant"))
    for index, message in enumerate(messages):
        role = message["role"]
        if index == 0 and role in SYSTEM_ROLES:
            continue
        usual = next(usual_roles)
        if role != usual:
            return [f"messages[{index}]: the role is {role!r} where {usual!r} is usual: "
                    "all is kept and sent as it is"]
    return []

def parse_conversation(text):
    """Return (conversation, endpoint, model, notes) of a saved or exported conversation.

    That is a document of /save, a list of messages, or an object with messages or data.  A last
    message of the user becomes the unanswered question.  Notes say what is unusual.  Raise
    UsageError for anything else, with what is wrong and where.
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
_VISIBLE = dict.fromkeys((*range(0x80, 0xA0), 0x200B, *range(0x202A, 0x202F),
                          *range(0x2060, 0x2070), 0xFEFF, *range(0xE0000, 0xE0080)), 0xFFFD)
_VISIBLE.update((code, 0x2400 + code) for code in range(0x20))
_VISIBLE.update({0x7F: 0x2421, ord("\n"): "\n", ord("\t"): "\t"})
_VISIBLE[ord("\r")] = None  # it would overwrite the line

def sanitize(text):
    """Return *text* with nothing in it that drives a terminal or hides from its reader."""
    return text.translate(_VISIBLE)

def one_line(text):
    """Return *text* sanitized, as one line with single blanks."""
    return " ".join(sanitize(text).split())

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
    from datetime import datetime, timezone

    moment = datetime.fromtimestamp(int(seconds), timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

def plural(count, noun):
    """Return *count* and its *noun*, such as 1 token or 2 tokens."""
    if str(count) != "1":
        noun += "s"
    return f"{count} {noun}"

def end_line(text):
    """Return *text* with a newline at its end."""
    if text.endswith("\n"):
        return text
    return text + "\n"

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
    end = truncate(text[::-1], kept // 2)[::-1]
    start = truncate(text, kept - display_width(end))
    return truncate(start + "..." + end, columns)

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
            line += cell + " " * (width - display_width(cell)) + "  "
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
    """Return the rate of *reply* after its first token, or None where it is unknown."""
    tokens = reply.usage.completion or 0
    if tokens < 2 or reply.first_at is None or reply.last_at <= reply.first_at:
        return None
    return (tokens - 1) / (reply.last_at - reply.first_at)

def usage_fields(reply, seconds, streamed):
    """Return name -> value of the known figures of *reply*, which took *seconds*."""
    fields = {}
    for name, count in reply.usage._asdict().items():
        fields[name + "_tokens"] = count
    fields["seconds"] = seconds
    if streamed:
        fields["first_token_seconds"] = reply.first_seconds
        fields["tokens_per_second"] = tokens_per_second(reply)
        fields["finish_reason"] = reply.finish_reason
    fields["id"] = reply.id
    for name, value in list(fields.items()):
        if value is None:
            del fields[name]
        elif isinstance(value, float):
            fields[name] = round(value, 3)
    return fields

def status_bar(endpoint, model, totals, messages, columns):
    """Return the line above the prompt of a chat, at most *columns* wide.

    In a narrow window the endpoint's part is left out first, then the model's.
    """
    mark = "~"
    if totals.exact:
        mark = ""
    parts = [f"endpoint: {endpoint}"]
    if model:
        parts.append(f"model: {model}")
    parts.append(f"tokens: {mark}{totals.prompt}/{mark}{totals.completion}")
    parts.append(f"msgs: {messages}")
    while True:
        line = one_line(" | ".join(parts))
        if display_width(line) <= columns or len(parts) == 1:
            return truncate(line, columns)
        del parts[0]

def percentile(sorted_values, percent):
    """Return the value below which *percent* of *sorted_values* lie, linear between ranks."""
    last = len(sorted_values) - 1
    rank = last * percent / 100
    position = int(rank)
    below = sorted_values[position]
    above = sorted_values[min(position + 1, last)]
    return below + (above - below) * (rank - position)

def summary(values):
    """Return number, mean, percentiles and extremes of *values*, or None for each unknown one."""
    figures = dict.fromkeys(("n", "mean", "p50", "p90", "p95", "p99", "max", "min"))
    ordered = sorted(values)
    count = len(ordered)
    figures["n"] = count
    if count:
        figures.update(mean=sum(ordered) / count, max=ordered[-1], min=ordered[0])
        for percent in (50, 90, 95, 99):
            figures[f"p{percent}"] = percentile(ordered, percent)
    return figures

class _WordWrapper:
    """Lay out styled text on the lines of a terminal; prose is wrapped at words.

    An unfinished word is shown, and moved to the next line when it no longer fits.  The last
    column stays free, so that the cursor never waits there for its wrap.
    """

    def __init__(self, columns, styled):
        self._styled = styled
        self._output = []
        self._style = ""  # now set on the terminal
        self._column = 0  # of the cursor, or beyond the limit where blanks did not fit
        self._hang = 0  # columns before the text after a wrap
        self._word = []  # (text, style) of the pieces of the unfinished word
        self._start = 0  # its column
        self._limit = 0  # columns that may be written
        self.resize(columns)

    def resize(self, columns):
        limit = columns - 1
        if columns < 10:  # too narrow to wrap
            limit = MAX_NUMBER
        if limit != self._limit:
            self.end_word()
        self._limit = limit

    def take(self):
        """Return what to write now; it ends without a style."""
        self._set_style("")
        output = "".join(self._output)
        self._output = []
        return output

    def add_fixed(self, text, style):
        """Add a piece that is not wrapped; prose after it is wrapped under its end."""
        self._write(self._expand_tabs(text), style)
        self._hang = min(self._column, self._limit // 2)

    def add_blanks(self, text, style):
        self.end_word()
        end = self._column + len(self._expand_tabs(text))
        if end <= self._limit:
            self._write(text, style)
        self._column = end

    def add_piece(self, text, style):
        if not self._word:
            self._start = self._column
        end = self._column + display_width(text)
        if end > self._limit and self._start > self._hang:
            erased = self._column - self._start
            self._output.append("\b \b" * erased + "\n" + " " * self._hang)
            self._column = self._hang
            self._start = self._hang
            for piece in self._word:
                self._write(*piece)
        self._word.append((text, style))
        self._write(text, style)

    def end_word(self):
        self._word = []

    def end_line(self):
        self.end_word()
        self._write("\n", "")
        self._column = 0
        self._hang = 0

    def _expand_tabs(self, text):
        # At its right edge a terminal writes over the character before a tab.
        before = " " * self._column
        return (before + text).expandtabs(8)[self._column:]

    def _write(self, text, style):
        if text:
            self._set_style(style)
            self._output.append(text)
            self._column += display_width(text)

    def _set_style(self, style):
        if not self._styled or style == self._style:
            return
        if self._style:
            self._output.append("\x1b[0m")
        if style:
            self._output.append(f"\x1b[{style}m")
        self._style = style

# Codes of styles, as a terminal knows them.
_BOLD = "1"
_DIM = "2"
_ITALIC = "3"
_CYAN = "36"
_LINE_STYLES = {"fence": [_CYAN], "code": [_CYAN], "heading": [_BOLD]}
_MARK_STYLES = {"*": _ITALIC, "_": _ITALIC, "**": _BOLD, "__": _BOLD,
                "***": "1;3", "___": "1;3"}  # code spans: _CYAN

# re compiles these patterns at their first use: most runs need none of them.
# A line: the marks of quotes and list items, then what tells its kind.
_LINE = r"""(?x)
    ( (?: [ \t]* (?: > | (?: [-*+] | \d{1,9}[.)] ) (?=[ \t]) ) )* [ \t]* )
    (?: (?P<undecided> (?: [-*+] | \d{1,9}[.)]? | \#{1,6} | `{1,2} | `{3,}[^`\n]* | ~+[ \t]* )? \Z )
    | (?P<fence> `{3,} (?=[^`\n]*\n) | ~{3,} )
    | (?P<heading> \#{1,6} [ \t\n] )
    | (?P<table> \| )
    | (?P<blank> \n )
    | (?P<prose> ) )"""
MAX_HELD_CHARACTERS = 200  # characters of a line to tell what it is
_INLINE_MARKS = "\\`*_"
# A mark, blanks, a run of other text, or one character from where the wide ones begin.
_TOKEN = r"\\[^\w\s]?|`+|\*+|_+|[ \t]+|[\x00-\x08\x0b-\x1f!-)+-\[\]^a-\u10ff]+|[^\x00-\u10ff]"
_NO_BREAK_BEFORE = ("、。，．：；？！）」』】〉》ー…"
                    "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")  # skin tones
_NO_BREAK_AFTER = "（「『【〈《\u200d([{\"'" + _INLINE_MARKS

def _may_break(before, after):
    """Return whether a line may end between two characters that are not blanks."""
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
        self._fence = ""  # the mark that opened the fence, inside one
        self._new_block = True  # the next line does not continue a paragraph
        self._content = 0  # column at which the text of the list item begins
        self._kind = ""  # of the line: a group of _LINE, or "code"; empty before its text
        self._base = []  # styles of the whole line
        self._open_marks = []  # such as "*", "__" and "`"
        self._before = ""  # the character before the next one

    def feed(self, text):
        """Return what of *text*, and of what was held, is to be written."""
        pieces = re.findall("[^\n]*\n|[^\n]+", self._held + text)
        self._held = ""
        for piece in pieces:
            if not self._kind:
                piece = self._begin_line(piece)
            if self._kind in ("fence", "code"):
                self._wrapper.add_fixed(piece.rstrip("\n"), self._style())
            else:
                self._add_inline(piece)
            if piece.endswith("\n"):
                self._wrapper.end_line()
                self._new_block = self._kind != "prose"
                self._kind = ""
        return self._wrapper.take()

    def finish(self):
        """Return what is still to be written."""
        return self.feed("\n")[:-1]

    def resize(self, columns):
        """Wrap at *columns* from here on."""
        self._wrapper.resize(columns)

    def _begin_line(self, line):
        """Find the kind of *line*, write the marks before its text and return the text.

        Hold the line, and return nothing of it, where more must come to tell what it is.
        """
        match = re.match(_LINE, line)
        kind = match.lastgroup
        if kind == "undecided" and len(line) < MAX_HELD_CHARACTERS:
            self._held = line
            return ""
        marks = match.group(1)
        indent = len(marks.expandtabs(4))
        is_item = bool(marks.strip(" \t>"))
        if self._fence:
            kind = "code"
            if re.match(rf"[ \t>]*{self._fence}[`~]*[ \t]*\n", line):
                self._fence = ""
        elif kind == "fence":
            self._fence = match.group(kind)
        elif marks.isspace() and self._new_block and kind != "blank":
            if indent >= self._content + 4:
                kind = "code"
        if kind == "code":
            marks = ""
        elif is_item:
            self._content = indent
        elif self._new_block:
            self._content = min(self._content, indent)
        if is_item or self._new_block or kind != "prose":
            self._open_marks = []
        self._kind = kind
        self._before = " "
        self._base = [_DIM] if ">" in marks else []
        self._wrapper.add_fixed(marks, self._style())
        self._base += _LINE_STYLES.get(kind, [])
        return line[len(marks):]

    def _style(self):
        codes = self._base + [_MARK_STYLES.get(mark, _CYAN) for mark in self._open_marks]
        if self.dim:
            codes.append(_DIM)
        codes = ";".join(codes).split(";")
        return ";".join(sorted(set(codes)))

    def _add_inline(self, text):
        """Add a piece of a line in which marks have a meaning."""
        for match in re.finditer(_TOKEN, text):
            token = match.group()
            after = text[match.end():match.end() + 1]
            style = self._style()
            if token[0] in _INLINE_MARKS:
                if not after and len(token) < MAX_HELD_CHARACTERS:
                    self._held = token
                    return
                self._read_mark(token, after)
                style = max(style, self._style(), key=len)  # style a mark like the text it encloses
            if self._kind == "table":
                self._wrapper.add_fixed(token, style)
            elif token[0] in " \t":
                self._wrapper.add_blanks(token, style)
            else:
                if _may_break(self._before, token[0]):
                    self._wrapper.end_word()
                self._wrapper.add_piece(token, style)
            self._before = token[-1]

    def _read_mark(self, mark, after):
        """Open or close what *mark* stands for, between the characters before and *after* it."""
        before = self._before
        marks = self._open_marks
        if marks and marks[-1][0] == "`":  # in code no other mark has a meaning
            if mark == marks[-1]:
                marks.pop()
            return
        if mark[0] == "`":
            marks.append(mark)
        if mark not in _MARK_STYLES:
            return
        if mark[0] == "_" and before.isalnum() and after.isalnum():
            return
        if marks and not before.isspace():
            if len(mark) == 3:
                mark = marks[0]
            if mark in marks:
                del marks[marks.index(mark):]
                return
        # 2*3 is more frequent than emphasis that begins in the middle of a word.
        if not after.isspace() and not (before < "\x80" and before.isalnum()):
            marks.append(mark)

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
    ready = dict(poll.poll(milliseconds))
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

    watching = None  # the Waiter inside watch_signals(), for the main thread

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
        if os.name != "posix":  # nothing can wait for a signal there: they raise
            for number in ENDING_SIGNALS:
                signal.signal(number, self._raise)
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
            Waiter.watching = self
            yield
        finally:
            Waiter.watching = None
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
        Suspended for Ctrl+Z.
        """
        self._presses = []
        self._exceptions = {number: Terminated(number) for number in ENDING_SIGNALS}
        self._exceptions[int(signal.SIGINT)] = KeyboardInterrupt()
        if SUSPEND_SIGNAL:
            self._exceptions[int(SUSPEND_SIGNAL)] = Suspended()
        self._start_watcher()
        self._prompting = True
        try:
            if self._noted:  # it came just before
                self.check()
                self._prompting = True
            line = read(text)
            if self._raised is not None:  # input() dropped it
                raise self._raised
            return line
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
        """Raise nothing in the with block although a line is typed: readline calls a completer.

        It swallows whatever a completer raises.  A signal that comes meanwhile is sent again by
        the prompt's watcher.
        """
        was_prompting, self._prompting = self._prompting, False
        before = list(self._noted)
        try:
            yield
        finally:
            self._noted = before
            self._prompting = was_prompting

    def suspend(self):
        """Stop until the shell continues us, as Ctrl+Z asks."""
        if self.before_stop:
            self.before_stop()
        ours = signal.signal(SUSPEND_SIGNAL, signal.SIG_DFL)
        os.kill(os.getpid(), SUSPEND_SIGNAL)
        signal.signal(SUSPEND_SIGNAL, ours)
        if self.after_stop:
            self.after_stop()

    def _raise(self, number, frame):
        raise Terminated(number)

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
LOCK_GAP_SECONDS = 0.001  # after a release, so that a process that waits is the next one
MAX_HISTORY_ENTRIES = 1000
MAX_HISTORY_BYTES = 4 * 1024 * 1024
MAX_KEPT_CONVERSATIONS = 50

def utf8_argument(text):
    """Return an argument, a variable or a file name as UTF-8 text, whatever the locale is."""
    try:
        return os.fsencode(text).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # PyPy reads UTF-8 in the C locale, and does not write it
        return text

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

@contextlib.contextmanager
def _failures_named(action, path):
    """Raise UsageError, with *action* and *path*, for a failure in the with block."""
    try:
        yield
    except (OSError, ValueError) as error:
        message = f"cannot {action} {utf8_argument(path)}: {os_reason(error)}"
        raise UsageError(message) from error

def check_regular(path):
    """Raise UsageError where *path* is not a regular file: a pipe would keep us waiting."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"cannot read {utf8_argument(path)}: it is not a regular file")

def _read_bytes(path, count):
    with open(path, "rb") as file:
        return file.read(count)

def read_file(path, limit=None):
    """Return the bytes of the file *path*; a signal ends the wait for a pipe.

    Raise UsageError where it cannot be read or is larger than *limit* bytes.
    """
    count = -1 if limit is None else limit + 1
    read = functools.partial(_read_bytes, path, count)
    with _failures_named("read", path):
        if Waiter.watching and not os.path.isfile(path):
            data = Waiter.watching.run_in_thread(read, None)
        else:
            data = read()
    if limit is not None and len(data) > limit:
        raise UsageError(f"{utf8_argument(path)} is larger than {limit >> 20} MiB")
    return data

def write_private(path, text):
    """Write *text* to the file *path*, whole or not at all, for its owner alone (mode 0600).

    Raise UsageError where it cannot be written.
    """
    from tempfile import mkstemp

    with _failures_named("write", path):
        target = os.path.realpath(path)  # fails where the current folder is gone
        descriptor, temporary = mkstemp(dir=os.path.dirname(target), prefix=".xeroctl-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

def _make_folders(path):
    if not os.path.isdir(path):
        _make_folders(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)

def make_private_folder(path):
    """Make the folder *path* and missing folders above it, each for its owner alone (mode 0700).

    os.makedirs gives that mode to the last one only.  Raise UsageError where it cannot be made.
    """
    with _failures_named("make", path):
        _make_folders(path)

def _try_lock(descriptor, seconds):
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        wait = functools.partial(flock, descriptor, LOCK_EX)
        with contextlib.suppress(OSError):  # it takes too long
            # This Waiter watches no signals, so Ctrl+C cannot interrupt the write.
            Waiter().run_in_thread(wait, seconds)
            return True
        return False
    except (ImportError, OSError):  # no locks here
        pass
    return True

@contextlib.contextmanager
def locked(path, seconds=LOCK_SECONDS):
    """Hold the lock of the file or folder *path* against other processes of xeroctl.

    Yield False if another process still holds it after *seconds*.  Yield True without a lock
    where there are none (not POSIX, some network file systems).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows, for example
        yield True
        return
    try:
        yield _try_lock(descriptor, seconds)
    finally:
        os.close(descriptor)
        Waiter().pause(LOCK_GAP_SECONDS)

# An entry of the history is one line, a JSON string, since it may hold line ends.

def _history_lines(path):
    if not os.path.exists(path):
        return []
    if not os.path.isfile(path):
        raise UsageError(f"{utf8_argument(path)} is not a regular file")
    with open(path, "rb") as file:
        return file.readlines()

def read_history(path):
    """Return the newest entries of the history file *path*, oldest first."""
    entries = []
    with contextlib.suppress(OSError, UsageError):
        for line in _history_lines(path)[-MAX_HISTORY_ENTRIES:]:
            with contextlib.suppress(ValueError):
                entries.append(str(parse_json(line.decode("utf-8", "replace"))))
    return entries

def _append_line(path, lines, line):
    if lines and not lines[-1].endswith(b"\n"):  # a write was cut off
        line = b"\n" + line
    kept = (lines + [line])[-MAX_HISTORY_ENTRIES:]
    while sum(map(len, kept)) > MAX_HISTORY_BYTES:
        del kept[0]
    if len(kept) <= len(lines):
        write_private(path, b"".join(kept).decode("utf-8", "replace"))
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "ab") as file:
        file.write(line)

def append_history(path, entry):
    """Add *entry* to the history file *path* and drop the oldest entries over its limits.

    Return False where another process held the lock and the entry was written without it.  Raise
    UsageError where it cannot be written.
    """
    folder = os.path.dirname(path)
    line = json.dumps(entry).encode("ascii") + b"\n"
    with _failures_named("write", path):
        _make_folders(folder)
        with locked(folder) as is_locked:
            lines = _history_lines(path)
            if lines[-1:] != [line] and len(line) <= MAX_HISTORY_BYTES:
                _append_line(path, lines, line)
    return is_locked

# Conversations

# Start in UTC, process, and a number where one process starts several within a second.
_CONVERSATION_NAME = re.compile(r"(\d{8}T\d{6}Z)-(\d+)(-\d+)?\.json\Z")

def read_conversation(path):
    """Return (what parse_conversation() returns, bytes) of the regular file *path*.

    Raise UsageError where it is not a conversation.
    """
    check_regular(path)
    data = read_file(path, MAX_CONVERSATION_BYTES)
    try:
        return parse_conversation(decode_prompt(data, "it")), data
    except (UnusableInputError, UsageError) as error:
        raise UsageError(f"{utf8_argument(path)}: {error}") from error

def _written_at(path):
    with contextlib.suppress(OSError):  # another process removed it
        return os.stat(path).st_mtime, path
    return 0, path

def list_conversations():
    """Return the paths of the conversations in the state folder, the newest first."""
    folder = state_path("conversations")
    names = []
    with contextlib.suppress(OSError):
        names = filter(_CONVERSATION_NAME.match, os.listdir(folder))
    paths = [os.path.join(folder, name) for name in names]
    return sorted(paths, key=_written_at, reverse=True)

def _free_path(started):
    """Return a free path in the state folder for a conversation *started* at that UTC stamp."""
    stem = state_path(os.path.join("conversations", f"{started}-{os.getpid()}"))
    path = stem + ".json"
    number = 1
    while os.path.lexists(path):
        number += 1
        path = f"{stem}-{number}.json"
    return path

def claim_conversation(path):
    """Put our process id into the file name *path* in the state folder; return the new path.

    Return None where the process in its name may still run: that process owns the conversation.
    """
    started, process = _CONVERSATION_NAME.match(os.path.basename(path)).groups()[:2]
    try:
        if os.name == "posix":  # os.kill ends processes elsewhere
            os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        ours = _free_path(started)
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(path, ours)
            return ours
    except OSError:  # another user's process
        pass
    return None

class ConversationStore:
    """Keeps a conversation on disk: in the file that the user named, else in the state folder.

    A file that another process changed since we read it is left alone.  A failure is reported
    and never raised: the chat goes on.
    """

    def __init__(self, console, path=None, data=None, uses_state=True):
        self.path = path  # of the conversation; None: choose one in the state folder
        self.named = path is not None and os.path.dirname(path) != state_path("conversations")
        self.uses_state = uses_state
        self.saved = False  # this chat wrote something
        self._told_lock = False
        self._data = data  # of the file when we last read or wrote it; None: it is missing
        self._console = console

    def save(self, conversation, endpoint, model):
        """Write *conversation*, once it has an answer or was written before."""
        if not self.path and not self.uses_state:
            return
        if self._data is None and not conversation.last_answer():
            return
        try:
            if self.path is None:
                self._start_file()
            self.write(conversation, endpoint, model)
        except UsageError as error:
            self._leave_file(error)
            self.save(conversation, endpoint, model)

    def claim(self):
        """Make the file of --continue ours, or go on in a copy where another chat has it."""
        if self.path:
            self.path = claim_conversation(self.path)
            if self.path is None:
                self._console.note(
                    "another chat still uses this conversation: a copy is continued")

    def keeps(self, path):
        """Return whether the conversation is kept in the file *path*."""
        return self.path is not None and os.path.realpath(path) == os.path.realpath(self.path)

    def begin_new(self, conversation, endpoint, model):
        """End this conversation: the next save begins a new file, or replaces the named one.

        Before that, what the named one holds is copied to the state folder.
        """
        if not self.named:
            self.path = self._data = None
        elif self.uses_state:
            ConversationStore(self._console).save(conversation, endpoint, model)

    def _start_file(self):
        folder = state_path("conversations")
        if not os.path.isdir(folder):
            make_private_folder(folder)
            self._console.note(f"chats are kept in {utf8_argument(os.path.dirname(folder))}: "
                               "--no-history keeps none")
        self.path = _free_path(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
        for old in list_conversations()[MAX_KEPT_CONVERSATIONS - 1:]:
            with contextlib.suppress(OSError):
                os.unlink(old)

    def write(self, conversation, endpoint, model):
        """Write *conversation* to the file; raise UsageError where another process changed it."""
        text = conversation_json(conversation, endpoint, model, utc_stamp(time.time()))
        shown = utf8_argument(self.path)
        with locked(os.path.dirname(os.path.realpath(self.path))) as is_locked:
            if os.path.lexists(self.path) and not self._is_unchanged():
                raise UsageError(f"another process changed {shown}")
            write_private(self.path, text)
        self._data = text.encode("utf-8", "replace")
        self.saved = True
        if not is_locked and not self._told_lock:
            self._told_lock = True
            self._console.note(f"another process holds the lock of {shown}: "
                               "it is written without")

    def _is_unchanged(self):
        return os.path.isfile(self.path) and read_file(self.path) == self._data

    def _leave_file(self, reason):
        """Give up the named file for the state folder; if that fails too, stop saving."""
        self.uses_state = self.uses_state and self.named
        outcome = "the conversation is not kept and will be lost"
        if self.uses_state:
            outcome = "the conversation is kept in the state folder from here on"
        self.path = self._data = None
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

@contextlib.contextmanager
def change_config():
    """Yield the Config of the config file as a Namespace, then write what was changed in it.

    Raise UsageError where the file cannot be read or written, or another process keeps its lock.
    """
    path = config_path()
    folder = os.path.dirname(path)
    make_private_folder(folder)
    with locked(folder, CONFIG_LOCK_SECONDS) as is_locked:  # not the file, since it is replaced
        if not is_locked:
            raise UsageError(f"another process is changing {utf8_argument(path)}: try again")
        mark, text = read_config_text(path)
        config = argparse.Namespace(**parse_config(text, utf8_argument(path))._asdict())
        yield config
        edited = edit_config(text, config.path, config.current, config.deployments)
        write_private(path, mark + edited)

def _keychain_words(service):
    from shutil import which

    if which("security"):  # macOS
        return ["security", "find-generic-password", "-s", service, "-w"]
    if which("secret-tool"):  # Linux
        return ["secret-tool", "lookup", "service", service]
    raise UsageError(f"the API key is {service!r} in a keychain, and neither security nor "
                     f"secret-tool is here to read it: set {ENV_API_KEY}")

def fetch_key(deployment, waiter):
    """Return the API key that the keychain or the command of *deployment* prints.

    The program gets no standard input, since that may be the message.  A command may ask the
    user for something, so its stderr is ours.  Raise UsageError, or as waiter.check() does.
    """
    from shlex import split
    from subprocess import DEVNULL, PIPE, Popen

    service = deployment.get("api_key_keychain")
    command = deployment.get("api_key_command")
    stderr = None
    try:
        if service:
            words = _keychain_words(service)
            command = words[0]
            stderr = PIPE
        else:
            words = split(command) or [command]
        process = Popen(words, stdin=DEVNULL, stdout=PIPE, stderr=stderr)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise UsageError(f"cannot run {command} for the API key: {reason}") from error
    try:
        output, errors = waiter.run_in_thread(process.communicate, None)
    except BaseException:  # an interrupt leaves the program running
        process.kill()
        process.wait()
        raise
    key = output.decode("utf-8", "replace").partition("\n")[0].strip()
    if process.returncode or not key:
        message = f"{command} gave no API key (status {process.returncode})"
        reason = (errors or b"").decode("utf-8", "replace").strip().rpartition("\n")[2]
        if reason:
            message += f": {reason}"
        raise UsageError(message)
    return key

Attachment = namedtuple("Attachment", [
    "name",  # of the file without its folders, or None for standard input
    "size",  # bytes
    "text",  # of a text file, else None
    "part",  # content part with an image or audio, else None
    "note",  # sentence for the user, or None
])

# The first bytes of files that servers take as parts, and their media types.
MEDIA_TYPES = (
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8[79]a", "image/gif"),
    (rb"(?s)RIFF....WEBP", "image/webp"),
    (rb"(?s)RIFF....WAVE", "audio/wav"),
    (rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]", "audio/mp3"),  # a tag, or layer III
)
# Logs contain backspaces, form feeds and escapes, but no other control characters.
NOT_TEXT = "[\x01-\x07\x0e-\x1a\x1c-\x1f\x7f]"

def _media_part(data):
    for first_bytes, media_type in MEDIA_TYPES:
        if not re.match(first_bytes, data):
            continue
        from base64 import b64encode

        encoded = b64encode(data).decode("ascii")
        if media_type.startswith("audio/"):
            audio = {"data": encoded, "format": media_type[6:]}
            return {"type": "input_audio", "input_audio": audio}
        return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{encoded}"}}
    return None

def parse_attachment(name, shown, data):
    """Return the Attachment for *data*, the contents of *shown*.

    Raise UnusableInputError where it is empty, or neither text nor a known image or audio.
    """
    if not data.strip():
        raise UnusableInputError(f"cannot attach {shown}: it is empty")
    part = _media_part(data)
    if part:
        return Attachment(name, len(data), None, part, None)
    text, replaced = decode_text(data)
    odd_count = replaced + len(re.findall(NOT_TEXT, text))
    if "\0" in text or 10 * odd_count > len(text):
        raise UnusableInputError(f"cannot attach {shown}: it is neither text nor PNG, JPEG, GIF, "
                                 "WebP, WAV or MP3")
    note = None
    if replaced:
        note = f"{shown} is not UTF-8: {plural(replaced, 'byte')} replaced"
    return Attachment(name, len(data), text, None, note)

def read_attachment(path, takes_pipe=True):
    """Return the Attachment for the file *path*, or raise UnusableInputError."""
    try:
        if not takes_pipe:
            check_regular(path)
        data = read_file(path, MAX_ATTACHMENT_BYTES)
    except UsageError as error:
        raise UnusableInputError(str(error)) from error
    shown = utf8_argument(path)
    return parse_attachment(os.path.basename(shown), shown, data)

def build_question(text, attachments=()):
    """Return the user's message of *text* and *attachments*: plain text where all of it is text.

    A text file is added under its name, in a fence longer than any inside it.  Raise
    UnusableInputError where all files together are larger than MAX_ATTACHMENT_BYTES.
    """
    if sum(attachment.size for attachment in attachments) > MAX_ATTACHMENT_BYTES:
        limit = MAX_ATTACHMENT_BYTES >> 20
        raise UnusableInputError(f"the attached files are larger than {limit} MiB together")
    blocks = [text] if text else []
    for attachment in attachments:
        block = attachment.text
        if block and attachment.name is not None:
            fence = "```"
            while fence in block:
                fence += "`"
            block = f"{attachment.name}:\n{fence}\n{end_line(block)}{fence}"
        if block:
            blocks.append(block)
    parts = [attachment.part for attachment in attachments if attachment.part]
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
    "tls",    # True for https
    "proxy",  # the proxy's URL as urlsplit returns it, or None
    "peer",   # who answers us, for messages: the server, or a proxy for http://
    "via",    # " through the proxy HOST:PORT", or ""
])

class ConnectLog:
    """Is told what is done on the way to an answer; shows it on *console* with --verbose."""

    def __init__(self, console=None):
        self.try_started_at = None  # monotonic time at which the newest try began
        self.is_shown = console is not None and console.verbose
        self._console = console

    def show_lines(self, mark, lines):
        """Show *lines*, each after *mark* and a blank, without the credentials in headers."""
        if not self.is_shown:
            return
        for line in lines:
            header = re.match(r"(([\w-]+): (\w+ )?)(.*)", line)
            if header and is_secret_name(header.group(2)) and not header.group(4).isdigit():
                line = header.group(1) + "***"  # a number is a rate limit
            self._console.trace(f"{mark} {line}")

    def add_step(self, name, sentence, **facts):
        """Note that the step *name* of connecting ended now; *facts* are what is known from it.

        The names are "name", "connection" and "tls".
        """
        self.show_lines("*", [sentence])

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

    Loopback hosts bypass the proxy.  Raise UsageError for a proxy that is not plain HTTP.
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
        usable = parts.scheme == "http" and re.match(r"[!-~]+(?<!:)\Z", parts.netloc)
        usable = usable and parts.port != 0
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
    peer = urlsplit(url).netloc
    via = ""
    if proxy:
        place = proxy_name(proxy)
        via = " through " + place
        if scheme == "http":
            peer = place
    return Route(url, host, port, scheme == "https", proxy, peer, via)

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

def response_error(error, peer, seconds, decoder=None):
    """Return the XeroctlError for *error*, an OSError or WireError on the way to a response.

    *decoder* is the ResponseDecoder, *seconds* the limit for silence.
    """
    import socket

    if isinstance(error, socket.timeout):
        return NetworkError(f"{peer} sent nothing for {seconds:g} s: see --timeout")
    is_incomplete = isinstance(error, IncompleteError)
    is_broken = isinstance(error, ConnectionError)
    if isinstance(error, WireError) and not is_incomplete:
        return ServerError(f"{peer} does not speak HTTP: {error}")
    if is_incomplete and decoder.head is not None:
        return CutShortError(f"the reply was cut short: {peer} {error}")
    if is_broken and decoder is not None and decoder.has_body:
        return CutShortError(f"the reply was cut short: {peer} closed the connection",
                             retryable=True)
    return NetworkError(f"{peer} closed the connection without an answer",
                        retryable=is_incomplete or is_broken)

def is_tls_wait(error):
    """Return True if *error* is TLS's way to say that it has to wait for the network."""
    return type(error).__name__ in ("SSLWantReadError", "SSLWantWriteError")

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
        if self.log.is_shown:
            text = data.decode("utf-8", "replace").replace("\r\n", "\n").rstrip("\n")
            self.log.show_lines(">", text.split("\n"))
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
        with contextlib.suppress(OSError):
            self._early = self.receive_now() or b""
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
    """Return a socket connected to the first of *addresses* that answers, and its IP address.

    Raise OSError.  The monotonic time *deadline* is one for all of them.
    """
    failure = OSError("no address")
    for count, address in zip(range(len(addresses), 0, -1), addresses):
        seconds = max(0.001, (deadline - time.monotonic()) / count)
        try:
            return connect_address(address, waiter, seconds), address[4][0]
        except OSError as error:
            failure = error
    raise failure

def read_tunnel_head(stream, decoder, deadline):
    """Send CONNECT for the host of the route of *stream*; return the proxy's ResponseHead."""
    route = stream.route
    host = f"[{route.host}]" if ":" in route.host else route.host
    target = f"{host}:{route.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    authorization = proxy_authorization(route.proxy)
    if authorization:
        lines.append("Proxy-Authorization: " + authorization)
    stream.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
    while decoder.head is None:
        data = stream.receive(deadline)
        decoder.feed(data)
        if not data:
            decoder.finish()
    stream.log.show_lines("<", decoder.head.lines)
    return decoder.head

def open_tunnel(stream, seconds, deadline):
    """Make the proxy at the other end of *stream* connect us to the host of its route.

    Raise NetworkError, or RefusedError where the proxy wants a password.
    """
    import socket

    place = proxy_name(stream.route.proxy)
    decoder = ResponseDecoder("CONNECT")
    try:
        head = read_tunnel_head(stream, decoder, deadline)
    except socket.timeout as error:
        raise connect_error(error, place, seconds) from error
    except (OSError, WireError) as error:
        raise response_error(error, place, seconds, decoder) from error
    if 200 <= head.status <= 299:
        return
    message = f"{place} does not connect us: HTTP {head.status} {head.reason}".rstrip()
    if head.status == 407:
        hint = "the proxy wants a user and password: put them into its URL"
        raise RefusedError(f"{message}: {hint}", head.status)
    raise NetworkError(message, head.status, retryable=is_retryable_status(head.status))

def start_tls(sock, host, context, waiter, deadline):
    """Return *sock* wrapped in TLS with *host*.

    Raise OSError or ssl.CertificateError, with the socket closed.
    """
    import socket

    wrapped = sock
    try:
        wrapped = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
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

def open_stream(route, settings, waiter, log):
    """Return a Stream to the server, or to its proxy, with TLS and a tunnel where needed.

    Each step is added to *log*.  Raise NetworkError, or RefusedError where a proxy wants a
    password.
    """
    seconds = settings.connect_timeout
    deadline = time.monotonic() + seconds
    context = tls_context(settings.cacert) if route.tls else None
    host, port, place = route.host, route.port, route.peer
    if route.proxy:
        host, port, place = route.proxy.hostname, route.proxy.port or 80, proxy_name(route.proxy)
    try:
        addresses = resolve(host, port, waiter, seconds)
        names = list(dict.fromkeys(address[4][0] for address in addresses))
        log.add_step("name", f"{host} is {', '.join(names)}", addresses=names)
        sock, address = connect_socket(addresses, waiter, deadline)
    except (OSError, UnicodeError) as error:
        raise connect_error(error, place, seconds) from error
    log.add_step("connection", "connected to " + place, address=address)
    if not route.tls:
        return Stream(sock, waiter, route, settings.timeout, log)
    try:
        if route.proxy:
            open_tunnel(Stream(sock, waiter, route, seconds, log), seconds, deadline)
        sock = start_tls(sock, route.host, context, waiter, deadline)
    except (OSError, ValueError) as error:  # CertificateError is a ValueError before Python 3.7
        raise tls_error(error, route.peer, seconds) from error
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
        self.context = None  # ErrorContext, set by open_response

    def begin(self):
        """Read the head, within the stream's timeout as a whole.

        Raise NetworkError where none comes, ServerError where it is not HTTP.
        """
        deadline = time.monotonic() + self._stream.timeout
        with self._naming_peer():
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
        with self._naming_peer():
            if not body and self._decoder.failure:
                raise self._decoder.failure
            while not body and not self._decoder.complete:
                body = self._receive(deadline)
        return body

    def close(self):
        """Close the connection."""
        self._stream.close()

    def _receive(self, deadline):
        data = self._stream.receive(deadline)
        if not data:
            self._decoder.finish()
        return self._decoder.feed(data)

    @contextlib.contextmanager
    def _naming_peer(self):
        try:
            yield
        except (OSError, WireError) as error:
            raise response_error(error, self._stream.route.peer, self._stream.timeout,
                                 self._decoder) from error

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
        raise response_error(error.reason, route.peer, settings.timeout) from error

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
    texts = secret_parameters(settings.base_url)
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
        log.show_lines("<", response.head.lines)
        response.context = build_context(response.head, request, route, settings)
        yield response

# -- Console ----------------------------------------------------------------------------------

PIPE_BYTES = 4096  # what a pipe that is ready takes without blocking (POSIX's PIPE_BUF is less)
DIM, RED, BOLD, RESET = "\x1b[2m", "\x1b[31m", "\x1b[1m", "\x1b[0m"

def write_piece(descriptor, data, waiter):
    """Write the beginning of the memoryview *data* and return the rest.

    Raise OSError where that fails, and as Waiter.wait() does.
    """
    if os.name == "posix":
        waiter.wait([], [descriptor])
    try:
        return data[os.write(descriptor, data[:PIPE_BYTES]):]
    except BlockingIOError:  # another process made it non-blocking
        return data

class Output:
    """Standard output or standard error: UTF-8 for a pipe, what it can show for a terminal.

    It is unbuffered: there is nothing to flush when the reader has gone.
    """

    def __init__(self, stream, environ, waiter):
        self._fd = -1  # closed
        if stream:
            self._fd = stream.fileno()
        self._waiter = waiter
        self._has_status = False
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
        import errno

        if self._fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        rest = memoryview(text.encode(self._encoding, "replace"))
        while rest:
            if self._console:
                rest = rest[self._console.write(rest):]
                continue
            rest = write_piece(self._fd, rest, self._waiter)

    def draw(self, text):
        """Write a few bytes of *text* from any thread, if the terminal takes them now."""
        with contextlib.suppress(OSError):
            if self.is_ready():
                os.write(self._fd, text.encode(self._encoding, "replace"))

    def draw_status(self, text):
        """Draw *text* over the current line, from any thread, if the terminal is ours."""
        if self.in_foreground():
            self._has_status = True
            self.draw(f"\r{truncate(text, self.width() - 1)}\x1b[K")

    def erase_status(self):
        """Erase what draw_status() has drawn."""
        if self._has_status:
            self._has_status = False
            self.draw("\r\x1b[K")

    def is_ready(self):
        """Return True if a few bytes can be written without a wait."""
        if os.name != "posix":
            return True
        return self._fd >= 0 and bool(poll_once([], [self._fd], 0)[1])

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
            self._output.erase_status()

    def _run(self):
        for frame in itertools.cycle("|/-\\"):
            if self._stopped.wait(0.1):
                return
            self._output.draw_status(f"{frame} {self._describe()}")

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

    def read_line(self, prompt, suspend=None):
        """Return the next line typed, without its end; raise EOFError at the end of the input.

        Ctrl+Z calls *suspend* in place of the waiter's.
        """
        if self.stdin_is_terminal() and self.out.is_terminal:
            return self._read_typed(input, prompt, suspend or self.waiter.suspend)
        with contextlib.suppress(OSError):  # the prompt is no part of the answer
            self.err.write(prompt)
        return self.read_piped_line().decode("utf-8", "replace").rstrip("\n")

    def read_secret(self, prompt):
        """Return a line that is typed without being shown, or the next one of a pipe."""
        if not self.stdin_is_terminal():
            return self.read_piped_line().decode("utf-8", "replace").strip()
        from getpass import getpass

        try:
            return self._read_typed(getpass, prompt, self.waiter.suspend).strip()
        except UnusableInputError as error:
            raise UsageError(str(error)) from error

    def _read_typed(self, read, prompt, suspend):
        self.stop_spinner()
        while True:
            try:
                return self.waiter.prompt(read, prompt)
            except Suspended:
                suspend()
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
        """Write *line* to stderr, sanitized and without secrets."""
        line = redact(sanitize(line.replace("\n", " ")), self.secrets)
        if dim and self.err.styled:
            line = DIM + line + RESET
        self.write_error(line + "\n")

    def write_error(self, text):
        """Write *text* to stderr as it is; where that cannot be done there is nobody to tell."""
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
        if error.body:
            for line in error.body.split("\n"):
                self.trace("< " + line.rstrip("\r"))
        if self.json:
            fields = dict(vars(error))
            del fields["body"], fields["reason"]
            self._print_object(kind=error.kind, message=str(error), **fields)
            return
        word = "error"
        if self.err.styled:
            word = RED + word + RESET
        line = redact(sanitize(str(error).replace("\n", " ")), self.secrets)
        self.write_error(f"xeroctl: {word}: {line}\n")

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
        self.write_error(redact(sanitize(json.dumps(fields)), self.secrets) + "\n")

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
            check_reply_size(len(data))

def stream_once(request, settings, console, log):
    """Send *request* once and yield the Chunks of the answer as they arrive.

    A reply that is not streamed is one Chunk.  Raise the error that the reply holds, after the
    Chunks before it.
    """
    log.try_started_at = time.monotonic()
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

    if attempt > settings.retries or not is_retryable_now(error):
        raise error
    seconds = retry_delay(attempt, error.retry_after, random())
    if not console.err.styled:
        console.note(f"{error.reason}, trying again in {max(seconds, 0.1):.1f} s")
    with console.spinner(error.reason):
        console.label_spinner(error.reason + ", trying again", time.monotonic() + seconds)
        console.waiter.pause(seconds)

def request_json(request, settings, console, log=None):
    """Send *request* and return the JSON document that answers it; retry where that may help."""
    log = log or ConnectLog(console)
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

def stream_answer(request, settings, console, log):
    """Send *request* and yield the Chunks of the answer; retry where that may help.

    The ConnectLog *log* keeps when the newest try began.  There is no retry once a token came.
    A spinner shows until something is written.  A server that refuses stream_options is asked
    once more without them.
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
    """Show an answer as text, as it comes; a whole answer in a pipe is one write.

    The text is styled as Markdown, with the <think> part dim, unless *plain*.  With
    *shows_reasoning* all reasoning goes to stderr instead.  Without *shows_thought*, the <think>
    part is not on stdout.
    """

    def __init__(self, console, streamed, plain, shows_reasoning, shows_thought):
        self.started = False  # there is something to show
        self._console = console
        self._streamed = streamed
        self._shows_reasoning = shows_reasoning
        self._shows_thought = shows_thought and not shows_reasoning
        self._splitter = ThoughtSplitter()
        self._styler = None
        if not plain:
            self._styler = MarkdownStyler(console.out.width(), console.out.styled)
        self._held = ""  # of a whole answer
        self._last = ""  # character of the answer
        self._last_thought = ""  # character of the reasoning on stderr

    def show(self, chunk):
        """Show what *chunk* brings."""
        thought, answer = self._splitter.feed(chunk.text)
        if self._shows_reasoning:
            self._show_reasoning(chunk.reasoning)
        self._show(thought, answer)

    def finish(self):
        """Show what is held, and end the answer with a newline if it has none."""
        self._show(*self._splitter.finish())
        self._splitter = ThoughtSplitter()
        self._end_reasoning()
        text = self._held
        if self._styler:
            text = self._styler.finish()
        if self._last != "\n":
            text += "\n"
        self._held = ""
        self._last = "\n"
        self._write(text)

    def _show(self, thought, answer):
        if self._shows_thought:
            self._show_text(thought, True)
        elif not self.started:
            answer = answer.lstrip("\n")  # the blank line after the reasoning
        if self._shows_reasoning:
            self._show_reasoning(thought.replace(THINK_START, "").replace(THINK_END, ""))
            if answer:
                self._end_reasoning()
        self._show_text(answer, False)

    def _show_text(self, text, is_thought):
        if not text:
            return
        self.started = True
        self._last = text[-1]  # before the write, in which an interrupt may come
        if self._styler:
            self._styler.resize(self._console.out.width())
            self._styler.dim = is_thought
            text = self._styler.feed(sanitize(text))
        if self._styler or self._streamed:
            self._write(text)
        else:
            self._held += text

    def _write(self, text):
        if text and self._styler:
            self._console.write_styled(text)
        elif text:
            self._console.write(text)

    def _show_reasoning(self, text):
        if not self._last_thought:
            text = text.lstrip("\n")
        if not text:
            return
        self._last_thought = text[-1]
        text = sanitize(text)
        if self._console.err.styled:
            text = DIM + text + RESET
        self._console.write_error(text)

    def _end_reasoning(self):
        if self._last_thought not in ("", "\n"):
            self._console.write_error("\n")
        self._last_thought = ""

def _write_json(text, console):
    if not console.out.can_show(text):
        text = re.sub("[^\x00-\x7f]+", lambda match: json.dumps(match.group())[1:-1], text)
    console.write(text + "\n")

def show_json(document, console):
    """Write *document* to stdout, indented for a reader."""
    _write_json(json_text(document, indent=2), console)

class JsonView:
    """Show the server's own documents: a line each if *streamed*, else the one, indented."""

    def __init__(self, console, streamed):
        self.started = False  # there is something to show
        self._console = console
        self._streamed = streamed
        self._document = None  # a whole reply
        self._lines = []

    def show(self, chunk):
        """Show the documents of *chunk*, as the server wrote them where each is a line."""
        for document, source in zip(chunk.documents, chunk.sources):
            self._document = document
            self._lines.append(source or json_text(document))
        if len(self._lines) > 1:
            self._streamed = True  # though nobody asked for a stream
        if self._streamed and self._lines:
            self.started = True
            _write_json("\n".join(self._lines), self._console)
            self._lines = []
        self.started = self.started or bool(chunk.text)

    def finish(self):
        """Show what is held."""
        if self._lines:
            self._lines = []
            show_json(self._document, self._console)

def build_view(console, streamed, plain=False, show_reasoning=False, show_thought=True):
    """Return the view for an answer; *plain* turns styles and wrapping off."""
    if console.json:
        return JsonView(console, streamed)
    return TextView(console, streamed, plain or console.out.dumb, show_reasoning, show_thought)

def receive_answer(request, settings, console, reply, show=None):
    """Send *request*, add each Chunk of the answer to *reply*, and call *show* with it.

    Set the seconds that the answer took, and those until its first token, in *reply*.
    """
    log = ConnectLog(console)
    with contextlib.closing(stream_answer(request, settings, console, log)) as chunks:
        for chunk in chunks:
            reply.add(chunk)
            if show:
                show(chunk)
    reply.seconds = time.monotonic() - log.try_started_at
    if reply.first_at is not None:
        reply.first_seconds = reply.first_at - log.try_started_at

def show_answer(request, settings, console, view, reply):
    """Send *request*, show the answer in *view* as it comes and add it to *reply*.

    Where the answer fails, what came of it is shown first.
    """
    try:
        receive_answer(request, settings, console, reply, view.show)
        if not console.json:
            reply.check_answer()
        view.finish()
        reply.check_answer()
    except BaseException as error:
        # On a signal, write the newline only if stdout would not block.
        if view.started and (isinstance(error, Exception) or console.out.is_ready()):
            with contextlib.suppress(OSError, OutputError):  # what happened first counts
                view.finish()
        raise

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
        fields = usage_fields(reply, seconds, streamed)
        rate = fields.get("tokens_per_second")
        if rate is not None and not console.json:  # the footer's rate is over the whole time
            fields["tokens/s after the first"] = fields.pop("tokens_per_second")
        console.print_report("token_usage", fields.items())

# -- Demo endpoint ----------------------------------------------------------------------------

DEMO_ANSWER = """Hello from the practice endpoint! \
No model reads this: it runs inside xeroctl, for trying things out. You wrote: {question}

To talk to a real endpoint, put its key into {variable} and run:
xeroctl chat --base-url https://api.xerotier.ai/PROJECT/v1 --endpoint SLUG -m Hello
"""
DEMO_QUESTION = {"role": "user", "content": "What do koalas eat?"}  # of the one stored completion
DEMO_TAGS = {"sample": "1"}
DEMO_TOKEN = r"\S+\s*"
DEMO_FIRST_TOKEN_SECONDS = 0.4
DEMO_TOKEN_SECONDS = 0.02

def _demo_completion(messages, metadata, max_tokens=None):
    """Return the completion that answers *messages*."""
    prompt = " ".join(content_text(message) for message in messages)
    question = content_text(messages[-1])
    words = re.findall(DEMO_TOKEN, DEMO_ANSWER.format(question=question, variable=ENV_API_KEY))
    finish_reason = "stop"
    if max_tokens is not None and max_tokens < len(words):
        finish_reason = "length"
        words = words[:max_tokens]
    prompt_tokens = len(prompt.split())
    message = {"role": "assistant", "content": "".join(words)}
    return {
        "id": "chatcmpl-practice-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "practice",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(words),
                  "total_tokens": prompt_tokens + len(words)},
        "metadata": metadata,
    }

def _demo_chunks(completion):
    """Yield the chunks of a stream that brings *completion* word by word."""
    choice = completion["choices"][0]
    chunk = dict(completion, object="chat.completion.chunk", usage=None)
    for word in re.findall(DEMO_TOKEN, choice["message"]["content"]):
        yield dict(chunk, choices=[{"index": 0, "delta": {"content": word}}])
    end = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    yield dict(chunk, choices=[end], usage=completion["usage"])

def answer_demo(method, target, body):
    """Return the HTTP status and the document that the endpoint of --demo answers with."""
    from urllib.parse import parse_qsl

    path, _, query = target.partition("?")
    path = path.partition("/v1")[2]
    if path == CHAT_PATH and method == "POST":
        limit = body.get("max_tokens")
        if limit is not None and not (get_field(body, "max_tokens", int) and limit > 0):
            return 400, {"error": {"message": "max_tokens must be a whole number of at least 1"}}
        metadata = body.get("metadata") or {}
        return 200, _demo_completion(body["messages"], metadata, limit)
    sample = _demo_completion([DEMO_QUESTION], DEMO_TAGS)
    sample_path = CHAT_PATH + "/" + sample["id"]
    if path == sample_path and method == "DELETE":
        return 200, {"id": sample["id"], "deleted": True}
    if path == sample_path:
        return 200, dict(sample, **body)  # an update sends the new metadata
    if path == "/models":
        items = [{"id": "practice", "object": "model"}]
    elif path == sample_path + "/messages":
        items = [DEMO_QUESTION]
    elif path == CHAT_PATH:
        filters = dict(parse_qsl(query, keep_blank_values=True), limit="", order="")
        fitting = {"model": "practice", "metadata[sample]": "1", "limit": "", "order": ""}
        items = [sample] if filters.items() <= fitting.items() else []
    else:
        return 404, {"error": {"message": f"there is no {path} here", "code": "not_found"}}
    return 200, {"object": "list", "data": items, "has_more": False}

@contextlib.contextmanager
def demo_endpoint():
    """Serve the endpoint of --demo on a loopback port inside the with block; yield its base URL."""
    import threading
    from http.server import BaseHTTPRequestHandler
    from socketserver import TCPServer, ThreadingMixIn

    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: a connection for each request
        def do_GET(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length).decode() or "{}")
            status, document = answer_demo(self.command, self.path, body)
            self.send_response(status)
            if status != 200 or not body.get("stream"):
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())
                return
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            ended.wait(DEMO_FIRST_TOKEN_SECONDS)
            for chunk in _demo_chunks(document):
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
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

MAX_COPY_BYTES = 74000  # about 100,000 in base64, the limit of terminals
MAX_CANONICAL_BYTES = 4095  # of a line in a terminal's canonical mode; it drops the rest
MODELS_SECONDS = 1
MAX_LISTED_CONVERSATIONS = 10
CONTEXT_FULL = re.compile(r"context|too (long|many tokens)", re.IGNORECASE)

ChatCommand = namedtuple("ChatCommand", "name argument summary")  # done by Chat.do_NAME

CHAT_COMMANDS = (  # an argument in brackets may be left out
    ChatCommand("/help", "", "show this"),
    ChatCommand("/clear", "", "begin anew, keep the system message"),
    ChatCommand("/system", "[TEXT]", "set the system message; - removes it"),
    ChatCommand("/save", "[FILE]", "save the conversation as JSON"),
    ChatCommand("/load", "[FILE]", "load a saved one; alone: list the last"),
    ChatCommand("/show", "[N]", "show the last N turns (1)"),
    ChatCommand("/tokens", "", "show the session's token totals"),
    ChatCommand("/retry", "", "ask the last question again"),
    ChatCommand("/undo", "[N]", "take back the last N turns (1)"),
    ChatCommand("/drop", "[N]", "forget the oldest N turns (1)"),
    ChatCommand("/edit", "[TEXT]", "write the message in $VISUAL or $EDITOR"),
    ChatCommand("/attach", "[FILE]", "send a file with the next message"),
    ChatCommand("/copy", "[code]", "copy the last answer, or its last code"),
    ChatCommand("/model", "[NAME]", "ask for this model; - asks for none"),
    ChatCommand("/endpoint", "[SLUG]", "ask this endpoint"),
    ChatCommand("/context", "[NAME]", "ask this deployment"),
    ChatCommand("/set", "[NAME VALUE]", "set a sampling option; - unsets it"),
    ChatCommand("/quit", "", "end the session, show its token totals"),
)
COMMANDS_BY_NAME = {command.name: command for command in CHAT_COMMANDS}
CHAT_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/q": "/quit", "/?": "/help"}

CHAT_KEYS = """
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

class LineEditor:
    """Reads lines typed at a terminal: with readline, and its history, where this Python has it.

    *complete* is called with the line up to the cursor and returns the lines it may become.

    What is typed during a reply waits, unseen, for the next prompt.  With readline the terminal
    stays out of canonical mode, where a line has at most 4,095 bytes, and marks pastes.  As a
    context manager it leaves the terminal as it was, also at Ctrl+Z and Ctrl+\\.
    """

    def __init__(self, console, history_path, complete):
        self._console = console
        self._history_path = history_path  # None: inputs are not kept
        self._complete = complete
        self._candidates = []
        self._inserted = ""  # put on the next line before anything is typed
        self._last_entry = None
        self._told_lock = False
        self._bold = "{}"
        self._original = None  # attributes of the terminal at the start
        self._mode = None
        self.marks_pastes = False
        self._readline = None
        if console.out.is_terminal:
            self._set_up_readline()
        if history_path:
            for entry in read_history(history_path):
                self._recall(entry)

    def _set_up_readline(self):
        try:
            import readline
            readline.set_auto_history(False)
        except (ImportError, AttributeError):  # PyPy has a different one
            return
        self._readline = readline
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
            self._bold = f"\1{BOLD}\2{{}}\1{RESET}\2"

    def __enter__(self):
        with contextlib.suppress(ImportError):  # not POSIX
            import termios

            self._original = termios.tcgetattr(sys.stdin)
            self._console.waiter.before_stop = self._restore
            self._console.waiter.after_stop = self._resume
            if signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL:
                signal.signal(signal.SIGQUIT, self._quit)
        return self

    def __exit__(self, *exception):
        self._restore()
        self._console.waiter.before_stop = None
        self._console.waiter.after_stop = None

    def set_terminal_mode(self, mode):
        """Set the terminal for a "reply", for a "prompt", or as it was at the start (None)."""
        self._mode = mode
        self._resume()

    def _restore(self):
        self._apply(None)

    def _resume(self):
        self._apply(self._mode)

    def _quit(self, number, frame):
        self._restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _apply(self, mode):
        if not self._original or not self._console.err.in_foreground():
            return
        import termios

        attributes = self._original[:6] + [list(self._original[6])]
        if mode:
            # NOFLSH: otherwise Ctrl+C flushes a key that select already reported, and readline
            # blocks.
            attributes[3] |= termios.NOFLSH
        if mode == "reply":  # not at the prompt: readline echoes only where the terminal does
            attributes[3] &= ~termios.ECHO
        if mode and self._readline:  # as readline sets them
            attributes[0] &= ~(termios.ICRNL | termios.INLCR)
            attributes[3] &= ~(termios.ICANON | termios.IEXTEN)
            attributes[6][termios.VMIN] = 1
            attributes[6][termios.VTIME] = 0
        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, attributes)
        if self.marks_pastes and mode != "prompt":  # there readline does it
            self._console.out.draw("\x1b[?2004h" if mode else "\x1b[?2004l")

    def drop_keys(self):
        """Discard the keys not read yet, as a terminal does at Ctrl+C without NOFLSH."""
        if self._original:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcflush(sys.stdin, termios.TCIFLUSH)

    def read(self, prompt):
        """Return the next line, without its end.

        Raise EOFError at the end of the input, Terminated where the terminal hung up.
        """
        self.set_terminal_mode("prompt")
        if self._console.out.is_terminal:
            prompt = self._bold.format(prompt)
        try:
            line = utf8_argument(self._console.read_line(prompt, self._suspend))
        except EOFError:
            if not self._console.stdin_is_terminal():  # it was closed
                raise Terminated(getattr(signal, "SIGHUP", signal.SIGTERM)) from None
            if not self._readline or self._console.out.dumb:  # the cursor is behind the prompt
                self._console.print_line("")
            raise
        except KeyboardInterrupt:
            if not self._typed_so_far():
                self._console.print_line("")
                self._console.print_line("Ctrl+D or /quit ends the session")
            raise
        except Terminated:
            self._console.print_line("")
            raise
        if not self._readline and len(line.encode("utf-8", "replace")) >= MAX_CANONICAL_BYTES:
            raise UnusableInputError(f"the terminal cut the line at {MAX_CANONICAL_BYTES:,} bytes: "
                                     "nothing was sent: /edit and /attach take more")
        return line

    def _suspend(self):
        self._inserted = self._typed_so_far()
        self._console.print_line("")
        self._console.waiter.suspend()

    def _typed_so_far(self):
        if self._readline:
            return self._readline.get_line_buffer()
        return ""

    def remember(self, entry):
        """Put *entry* into this session's history and, unless it begins with a blank, on disk."""
        if entry == self._last_entry:
            return
        self._recall(entry)
        if not self._history_path or entry[:1].isspace():
            return
        try:
            is_locked = append_history(self._history_path, entry)
        except UsageError as error:
            self._console.note(f"no history: {error}")
            self._history_path = None
            return
        if not is_locked and not self._told_lock:
            self._told_lock = True
            self._console.note("another process holds the lock of the history: "
                               "it is written without")

    def _recall(self, entry):
        self._last_entry = entry
        if not self._readline:
            return
        from codecs import lookup

        encoding = lookup(sys.stdin.encoding or "utf-8").name
        if encoding == "ascii":  # of the C locale before Python 3.7
            encoding = "utf-8"
        data = entry.replace("\0", "").encode(encoding, "replace")
        self._readline.add_history(data.decode("ascii", "surrogateescape"))  # so any bytes pass

    def _insert(self):
        inserted, self._inserted = self._inserted, ""
        self._readline.insert_text(inserted)

    def _next_candidate(self, text, state):
        if state == 0:
            with self._console.waiter.without_raising():
                self._candidates = self._find_candidates(text) + [None]
        return self._candidates[state]

    def _find_candidates(self, text):
        """Return what the word *text* before the cursor may become; a tab elsewhere is a tab."""
        data = os.fsencode(self._readline.get_line_buffer())[:self._readline.get_endidx()]
        line = data.decode("utf-8", "replace")
        if not line.startswith("/"):
            return [text + "\t"]
        start = line.rfind(" ") + 1
        words = [whole[start:] for whole in self._complete(line)]
        return [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in words]

def complete_path(start):
    """Return the paths that *start*, which may begin with ~, can become; folders end in a slash."""
    import glob

    full = os.path.expanduser(start)
    names = []
    for path in sorted(glob.glob(glob.escape(full) + "*")):
        name = start + path[len(full):]
        names.append(name + "/" if os.path.isdir(path) else name)
    return names

def find_chat_command(name):
    """Return the ChatCommand that *name* stands for, in any case, or None."""
    name = name.lower()
    return COMMANDS_BY_NAME.get(CHAT_ALIASES.get(name, name))

def complete_line(line, find_names):
    """Return the lines that *line* may become: commands, and what some of them take.

    *find_names* is called with the name of a command and returns what may follow it.
    """
    name, blank, start = line.partition(" ")
    if not blank:
        commands = [command for command in CHAT_COMMANDS
                    if name and command.name.startswith(name.lower())]
        return [f"{command.name} " if command.argument else command.name for command in commands]
    command = find_chat_command(name)
    if command is None:
        return []
    if command.argument == "[FILE]":
        names = complete_path(start)
    else:
        names = find_names(command.name)
    return [f"{name} {found}" for found in names if found.startswith(start)]

def as_typed(text):
    """Return the line that sends *text*, also where it looks like a command."""
    return re.sub(r"\A/", " /", text)

def parse_count(argument):
    """Return the number that a command's *argument* is, 1 where it is empty."""
    if not re.match(r"([1-9]\d{0,8})?\Z", argument):
        raise UsageError(f"not a number of turns: {argument}")
    return int(argument or 1)

def parse_setting(name, value):
    """Return the value of the sampling option *name* that the text *value* is."""
    try:
        return parse_number(value, *SAMPLING_RANGES[name])
    except ValueError as error:
        raise UsageError(f"{name} must be {error}, not {value!r}") from error

def is_yes(answer):
    """Return whether the line *answer* says yes."""
    return answer.strip().lower() in ("y", "yes")

def system_prompt(options):
    """Return the text of --from-file, else of --system, else None."""
    if not options.from_file:
        return options.system
    try:
        return decode_prompt(read_file(options.from_file), options.from_file)
    except UnusableInputError as error:
        raise UsageError(str(error)) from error

def clipboard_sequence(data):
    """Return the escape sequence that puts the bytes *data* into a terminal's clipboard (OSC 52).

    tmux takes it plain or wrapped, depending on its settings: so both are sent.
    """
    from base64 import b64encode

    sequence = "\x1b]52;c;" + b64encode(data).decode("ascii") + "\x07"
    if os.environ.get("TMUX") or os.environ.get("TERM", "").startswith("tmux"):
        sequence += "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    return sequence

def run_editor(editor, path, waiter):
    """Return the exit status of the program *editor*; every Ctrl+C goes to it meanwhile."""
    import subprocess
    from shlex import split

    process = subprocess.Popen(split(editor) + [path])
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return waiter.run_in_thread(process.wait, None)

def read_edited(text, console):
    """Return what $VISUAL or $EDITOR saves of a private file that begins with *text*.

    Raise UsageError where nothing is saved, or where the editor fails.  What it saved then stays
    in the file, and the error names it.
    """
    from shutil import rmtree
    from tempfile import mkdtemp

    usual = "vi" if os.name == "posix" else "notepad"
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or usual
    try:
        folder = mkdtemp(prefix="xeroctl-")  # mode 0700
    except OSError as error:
        raise UsageError(f"no temporary folder for the message: {os_reason(error)}") from error
    path = os.path.join(folder, "message.txt")
    write_private(path, text)
    os.utime(path, (0, 0))  # a save makes it newer
    try:
        status = run_editor(editor, path, console.waiter)
    except (OSError, ValueError) as error:
        rmtree(folder)
        raise UsageError(f"cannot run {editor}: {error}: set VISUAL or EDITOR") from error
    except Terminated:
        console.print_line(f"xeroctl: what {editor} saved is in {path}")
        raise
    saved = ""
    if os.path.isfile(path) and os.stat(path).st_mtime > 0:
        saved = decode_prompt(read_file(path), path)
    if saved.strip() and status:
        raise UsageError(f"{editor} failed: nothing was sent: what it saved is in {path}")
    rmtree(folder)
    if not saved.strip():
        raise UsageError(f"nothing was sent: {editor} failed, or saved nothing")
    return saved

def fetch_model_names(settings):
    """Return the names of the models behind the endpoint; none where it takes over a second."""
    settings = settings._replace(timeout=MODELS_SECONDS, connect_timeout=MODELS_SECONDS)
    request = build_models_request(settings)
    fetch = functools.partial(receive_json, request, settings, Waiter(), ConnectLog())
    try:
        document = Waiter().run_in_thread(fetch, MODELS_SECONDS)
        models = list_items(document, "models")
    except (OSError, XeroctlError):
        return []
    names = [get_field(model, "id", str) for model in models]
    return sorted(filter(None, names))

# The chat

class Chat:
    """One interactive session: a conversation, where it is kept, and what every command changes.

    *resolve* makes the Settings for (settings, context, endpoint).
    """

    def __init__(self, options, settings, console, resolve, conversation, store):
        self.sampling = build_sampling(options)
        self.settings = settings
        self.console = console
        self.resolve = resolve
        self.conversation = conversation
        self.store = store
        self.typed = console.stdin_is_terminal()
        self.model = options.model  # asked for, else the last that answered
        self.totals = Totals(0, 0, True)
        self.attachments = []  # go with the next message
        self.status = EXIT_OK  # exit status: of the first failure if input is piped
        self._options = options
        self._show_reasoning = options.show_reasoning
        self._last_prompt = None  # tokens
        self._saved = None  # (path, bytes) of /save or /load
        self._listed = []  # paths that /load listed
        self._models = None  # names, once they are asked for
        self._ended = False
        if self.typed:
            history = state_path("history") if store.uses_state else None
            complete = functools.partial(complete_line, find_names=self._find_names)
            self.editor = LineEditor(console, history, complete)

    # The loop

    def run(self, question):
        """Take inputs until their end, the message *question* or None first; return the status.

        A failure does not end the chat, but a failed command ends one that is piped.
        """
        while not self._ended:
            try:
                if question:
                    self._ask(question, self.conversation.messages)
                else:
                    self._take_input()
            except KeyboardInterrupt:  # also one that comes while another is handled
                if not self.typed:
                    raise
                self.editor.drop_keys()
            question = None
        if not self.console.quiet:
            if self.typed and self.store.saved:
                self._say_how_to_continue()
            self._print_totals()
        return self.status

    def _take_input(self):
        try:
            line = self._read_input()
        except EOFError:
            self._ended = True
            return
        except UnusableInputError as error:
            self._fail(error)
            return
        if not line.strip():
            return
        try:
            self._do_line(line)
        except XeroctlError as error:
            self._fail(error)
            self._ended = not self.typed

    def _read_input(self):
        if not self.typed:
            return decode_prompt(self.console.read_piped_line(), "standard input")
        if not self.console.quiet:
            bar = status_bar(self.settings.endpoint, self.model, self.totals,
                             self.conversation.count, self.console.err.width())
            self.console.print_line(bar, dim=True)
        line = self.editor.read("> ")
        while line.endswith("\\"):
            line = line[:-1] + "\n"
            try:
                line += self.editor.read(". ")
            except EOFError:
                break
            except BaseException:
                self.editor.remember(line[:-1] + "\\")
                raise
        return line

    def _do_line(self, line):
        """Do a slash command, or send a message."""
        if self.typed:
            self.editor.remember(line)
        if not line.startswith("/"):
            self._ask_text(line[line.startswith(" /"):].rstrip())
            return
        name = line.split()[0]
        argument = line[len(name):].strip()
        command = find_chat_command(name)
        if command is None:
            from difflib import get_close_matches

            near = get_close_matches(name.lower(), COMMANDS_BY_NAME, 1)
            advice = "".join(f": did you mean {other}?" for other in near)
            raise UsageError(f"no command {name}{advice}: /help lists them. "
                             "A space in front sends the line as a message")
        if argument and not command.argument:
            raise UsageError(f"{command.name} takes no argument")
        if command.argument == "[FILE]" and re.match(r"(['\"]).*\1\Z", argument):
            argument = argument[1:-1]
        getattr(self, "do_" + command.name[1:])(argument)

    def _fail(self, error):
        if isinstance(error, OutputError):
            raise error
        self.console.print_error(error)
        if not self.typed:
            self.status = self.status or error.exit_status

    def _print(self, text):
        """Show the lines of *text* to the person, not on stdout."""
        for line in text.split("\n"):
            self.console.print_line(line)

    def _print_totals(self):
        prompt, completion, is_exact = self.totals
        mark = "" if is_exact else "~"
        self._print(f"tokens: {mark}{prompt} prompt, {mark}{completion} completion; "
                    f"messages: {self.conversation.count}")

    def _say_how_to_continue(self):
        command = "xeroctl chat --continue"
        if self.store.named:
            command = f"xeroctl chat -i --conversation {utf8_argument(self.store.path)}"
        self.console.print_line(f"to continue: {command}", dim=True)

    # Asking

    def _ask_text(self, text):
        """Ask *text*, together with the files that wait."""
        question = build_question(text, self.attachments)
        self.attachments = []
        self._ask(question, self.conversation.messages)

    def _ask(self, question, before):
        """Ask the message *question* after the messages *before*, and keep what comes of it.

        With an answer, or a part of one, it is the newest turn.  Without, it stays unanswered.
        For /retry, an error keeps the old answer, and Ctrl+C keeps the new partial one.
        """
        conversation = self.conversation
        keeps_old = len(before) < len(conversation.messages)
        rest = "the old answer stays"
        if not keeps_old:
            conversation.unanswered = question
            rest = "/retry asks again"
        reply = Reply(token_limit(self.sampling))
        try:
            self._show_answer(before + [question], reply)
            keeps_old = False
        except KeyboardInterrupt:
            keeps_old = False
            if not self.typed:
                raise
            self.editor.drop_keys()
            if not reply.text.strip():
                self._print(f"stopped: {rest}")
        except XeroctlError as error:
            self._fail(error)
            if error.exit_status == EXIT_REFUSED and CONTEXT_FULL.search(str(error)):
                self.console.note("/drop forgets the oldest turns: then /retry")
        finally:
            if reply.text.strip() and not keeps_old:
                conversation.messages = list(before)
                conversation.add_turn(question, reply.text)
            self._count(reply)
            self._save()
        if self.typed:
            self._print("")

    def _show_answer(self, messages, reply):
        if self.typed:
            self.editor.set_terminal_mode("reply")
        request = build_chat_request(self.sampling, self.settings, messages, True)
        view = build_view(self.console, True, self._options.plain, self._show_reasoning)
        show_answer(request, self.settings, self.console, view, reply)
        report_reply(reply, reply.seconds, True, self._options.show_usage, self.console)

    def _count(self, reply):
        prompt, completion, is_exact = self.totals
        usage = reply.usage
        if usage.prompt:
            prompt += usage.prompt
            self._last_prompt = usage.prompt
        if usage.completion is not None:
            completion += usage.completion
        elif reply.started:
            completion += reply.deltas
        if reply.started and None in (usage.prompt, usage.completion):
            is_exact = False
        self.totals = Totals(prompt, completion, is_exact)
        self.model = self.sampling.model or reply.model or self.model

    def _save(self):
        self.store.save(self.conversation, self.settings.endpoint, self.model)

    def _end_conversation(self):
        self.store.begin_new(self.conversation, self.settings.endpoint, self.model)
        self._saved = None

    def attach(self, path, takes_pipe=True):
        """Add the file *path* to the next message; raise UnusableInputError where it cannot be."""
        attachment = read_attachment(path, takes_pipe)
        build_question("", self.attachments + [attachment])  # not too large together
        self.attachments.append(attachment)
        if attachment.note:
            self.console.note(attachment.note)

    # Commands: CHAT_COMMANDS says what each of them does

    def do_help(self, argument):
        for command in CHAT_COMMANDS:
            self._print(f"  {command.name + ' ' + command.argument:<19} {command.summary}")
        self._print(CHAT_KEYS)

    def do_clear(self, argument):
        self._end_conversation()
        self.conversation.clear()

    def do_system(self, argument):
        if argument:
            self.conversation.set_system(argument if argument != "-" else None)
            self._save()
        self._print("system: " + (self.conversation.system or "none"))

    def do_save(self, argument):
        if self._saved and not argument:
            path = self._saved[0]
        else:
            path = native_path(argument)
        arguments = self.conversation, self.settings.endpoint, self.model
        if self.store.keeps(path):
            self.store.write(*arguments)
            self._saved = path, None
        elif os.path.lexists(path) and not self._may_replace(path):
            return
        else:
            text = conversation_json(*arguments, utc_stamp(time.time()))
            write_private(path, text)
            self._saved = path, text.encode("utf-8", "replace")
        self._print(f"saved {plural(self.conversation.count, 'message')} to {utf8_argument(path)}")

    def _may_replace(self, path):
        """Return True if the file *path* may be replaced; raise UsageError where it never may."""
        data = document = None
        if os.path.isfile(path):
            data = read_file(path)
            with contextlib.suppress(ValueError):
                document = parse_json(data.decode("utf-8"))
        if self._saved == (path, data):
            return True
        shown = utf8_argument(path)
        if get_field(document, "format", str) != CONVERSATION_FORMAT:
            raise UsageError(f"{shown} exists and is not a saved conversation: choose another name")
        question = f"{shown} holds another conversation"
        if not self.typed:
            raise UsageError(f"{question}: choose another name")
        with contextlib.suppress(EOFError):
            return is_yes(self.editor.read(f"{question}. Write over it? [y/N] "))
        return False

    def do_load(self, argument):
        if not argument:
            self._list_conversations()
            return
        is_number = re.match(r"\d{1,2}\Z", argument)
        if is_number:
            path = self._numbered_path(int(argument))
        else:
            path = native_path(argument)
        (conversation, _, _, notes), data = read_conversation(path)
        self._end_conversation()
        self.conversation = conversation
        if not is_number:
            self._saved = path, data
        self._print(f"loaded {plural(conversation.count, 'message')} from {utf8_argument(path)}")
        self.console.note(*notes)
        if conversation.unanswered and self.typed:
            self.editor.remember(as_typed(content_text(conversation.unanswered)))
            self._print("its last question has no answer: /retry asks it")
        elif conversation.unanswered:
            self.do_retry("")

    def _numbered_path(self, number):
        self._listed = self._listed or self._other_conversations()
        if not 1 <= number <= len(self._listed):
            raise UsageError(f"no conversation {number}: /load alone lists them")
        return self._listed[number - 1]

    def _other_conversations(self):
        paths = [path for path in list_conversations() if path != self.store.path]
        return paths[:MAX_LISTED_CONVERSATIONS]

    def _list_conversations(self):
        self._listed = self._other_conversations()
        if not self._listed:
            raise UsageError("a file name is needed: no other conversation is kept")
        for number, path in enumerate(self._listed, 1):
            try:
                conversation, endpoint, _, _ = read_conversation(path)[0]
                question = content_text(conversation.last_question()[0] or {})
                what = f"{endpoint}  {plural(conversation.count, 'message')}  {question}"
                date = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.stat(path).st_mtime))
            except (UsageError, OSError):
                date, what = "unreadable", utf8_argument(path)
            line = one_line(f"{number} {date} {what}")
            self._print(truncate(line, self.console.err.width() - 1))

    def do_show(self, argument):
        turns = self.conversation.turns()
        if not turns:
            raise UsageError("nothing to show yet")
        for turn in turns[-parse_count(argument):]:
            for message in turn:
                mark = {"user": "> ", "assistant": ""}.get(message["role"], message["role"] + ": ")
                self._print(mark + message_text(message).rstrip("\n"))
            self._print("")

    def do_tokens(self, argument):
        if self._last_prompt is not None:
            self._print(f"last prompt: {plural(self._last_prompt, 'token')}")
        self._print_totals()

    def do_retry(self, argument):
        question, before = self.conversation.last_question()
        if question is None:
            raise UsageError("nothing to ask again yet")
        self._ask(question, before)

    def do_undo(self, argument):
        if not self.conversation.turns():
            raise UsageError("nothing to take back")
        for _ in self.conversation.turns()[-parse_count(argument):]:
            question = self.conversation.undo()
            self._print("took back: " + truncate(one_line(content_text(question)), 60))
        self._save()

    def do_drop(self, argument):
        dropped = self.conversation.drop(parse_count(argument))
        if not dropped:
            raise UsageError("nothing to drop")
        self._print(f"dropped {plural(dropped, 'turn')}; messages: {self.conversation.count}")
        self._save()

    def do_attach(self, argument):
        if argument:
            self.attach(native_path(argument), takes_pipe=False)
        if not self.attachments:
            self._print("no file waits for the next message")
        for attachment in self.attachments:
            self._print(f"with the next message: {attachment.name}, "
                        + plural(attachment.size, "byte"))

    def do_copy(self, argument):
        text = self.conversation.last_answer()
        if argument not in ("", "code"):
            raise UsageError("/copy takes no argument, or: code")
        if text is None:
            raise UsageError("nothing to copy yet")
        if argument:
            blocks = find_code_blocks(text)
            if not blocks:
                raise UsageError("there is no code block in the last answer")
            text = blocks[-1]
        data = text.encode("utf-8")
        if len(data) > MAX_COPY_BYTES:
            raise UsageError(f"too much for a terminal's clipboard: {len(data):,} bytes, "
                             f"{MAX_COPY_BYTES:,} at most")
        if self.console.out.dumb:
            raise UsageError("/copy needs standard output to be a terminal that knows escapes")
        self.console.write_styled(clipboard_sequence(data))
        self._print(f"copied {plural(len(text), 'character')}")

    def do_model(self, argument):
        if argument:
            self.model = one_line(argument) if argument != "-" else None
            self.sampling = self.sampling._replace(model=self.model)
        self._print("model: " + (self.sampling.model or "none asked for"))

    def do_endpoint(self, argument):
        if argument:
            self._change_settings(None, argument)
        self._print(f"endpoint: {self.settings.endpoint}")

    def do_context(self, argument):
        if argument:
            self._change_settings(argument, None)
        self._print(f"endpoint: {self.settings.endpoint} at {mask_url(self.settings.base_url)}")

    def _change_settings(self, context, endpoint):
        self.settings = self.resolve(self.settings, context, endpoint)
        self.model = self.sampling.model
        self._models = None
        self.console.note(*self.settings.notes)

    def do_set(self, argument):
        name, _, value = argument.partition(" ")
        name = name.lstrip("-").replace("-", "_").lower()
        value = value.strip().lower()
        fields = self.sampling.fields
        if name == "reasoning" and value in ("on", "off"):
            self._show_reasoning = value == "on"
        elif name in SAMPLING_RANGES and value == "-":
            fields.pop(name, None)
        elif name in SAMPLING_RANGES and value:
            fields[name] = parse_setting(name, value)
        elif argument:
            names = " ".join(SAMPLING_RANGES)
            raise UsageError(f"not an option and its value: {argument}: /set takes one of {names} "
                             "and a number or -, or reasoning and on or off")
        shown = dict.fromkeys(SAMPLING_RANGES, "-")
        for field, setting in fields.items():
            shown[field] = json_text(setting)
        shown["reasoning"] = "on" if self._show_reasoning else "off"
        for field in [name] if name else shown:
            self._print(f"{field}: {shown[field]}")

    def do_edit(self, argument):
        if not self.typed:
            raise UsageError("/edit needs a terminal")
        question, _ = self.conversation.last_question()
        self.editor.set_terminal_mode(None)
        text = read_edited(argument or content_text(question or {}), self.console)
        self.editor.remember(as_typed(text))
        self._ask_text(text)

    def do_quit(self, argument):
        self._ended = True

    def _find_names(self, name):
        """Return what may follow the command *name*; models are asked for once."""
        if name == "/set":
            return [option + " " for option in list(SAMPLING_RANGES) + ["reasoning"]]
        if name == "/copy":
            return ["code"]
        if name == "/context":
            with contextlib.suppress(XeroctlError):
                return sorted(read_config().deployments)
        if name == "/model":
            if self._models is None:
                self._models = fetch_model_names(self.settings)
            return self._models
        return []

def open_conversation(options, console, interactive):
    """Return (Conversation, ConversationStore) for the options of chat.

    With --conversation or --continue its endpoint and model go into *options*, unless others are
    given.  Raise UsageError where there is no such conversation.
    """
    keeps_history = not options.no_history and os.environ.get(ENV_NO_HISTORY, "") in ("", "0")
    path = options.conversation
    if options.continue_last:
        kept = list_conversations()
        if not kept:
            raise UsageError("there is no conversation to continue")
        path = kept[0]
    conversation, endpoint, model, notes, data = Conversation(), None, None, [], None
    if path and os.path.lexists(path):
        (conversation, endpoint, model, notes), data = read_conversation(path)
    elif path and not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"cannot make {utf8_argument(path)}: its folder is missing")
    console.note(*notes)
    if options.continue_last and not keeps_history:
        path = None
    if endpoint and options.endpoint in (None, endpoint) and not options.demo:
        options.endpoint = endpoint
        options.model = options.model or model
    prompt = system_prompt(options)
    if prompt is not None:
        conversation.set_system(prompt)
    is_typed = interactive and console.stdin_is_terminal()  # piped chats are scripts: not saved
    is_kept = is_typed or options.continue_last or path is not None
    uses_state = keeps_history and is_kept
    return conversation, ConversationStore(console, path, data, uses_state)

def run_interactive(options, settings, console, resolve, question, conversation, store):
    """Hold a conversation until its end; return the exit status."""
    if options.continue_last:
        store.claim()
    has_newer_name = "max_completion_tokens" in dict(options.param)
    if options.max_tokens is None and not has_newer_name:
        options.max_tokens = DEFAULT_INTERACTIVE_MAX_TOKENS
    chat = Chat(options, settings, console, resolve, conversation, store)
    if question is None:
        for path in options.attach:
            chat.attach(path)
        if options.attach:
            chat.do_attach("")
    if not chat.typed:
        return chat.run(question)
    with chat.editor:
        if not console.quiet:
            greeting = "/help lists the commands, Ctrl+D ends the session"
            console.print_line(truncate(greeting, console.err.width()), dim=True)
            if conversation.count:
                chat.do_show("")
        return chat.run(question)

# -- Commands ---------------------------------------------------------------------------------

def _demo_settings(options, base_url):
    if options.base_url or options.context:
        raise UsageError("--demo brings its own endpoint: give no --base-url or --context with it")
    options.endpoint = options.endpoint or DEMO_ENDPOINT
    options.base_url = base_url
    settings = resolve_options(options)
    settings.sources["base_url"] = "--demo"
    return settings

def _user_settings(options, console, endpoint_needed):
    if options.api_key == "-":
        raise UsageError("--api-key - is only for config add and config set")
    resolve = functools.partial(resolve_settings, options, environment(), read_config())
    settings = resolve(lambda deployment: "-")
    console.json = settings.output == "json"
    endpoint = settings.endpoint
    if is_whole_address(settings.base_url):  # a slug would only name the model there
        endpoint = endpoint or options.model
        if options.command in ("models", "completions"):
            endpoint_needed = False
    if endpoint_needed and not endpoint:
        raise UsageError(f"no endpoint: give --endpoint SLUG, or set {ENV_ENDPOINT}, "
                         "or try without one: --demo")
    if not options.dry_run:  # only now a program may be run for the key
        settings = resolve(functools.partial(fetch_key, waiter=console.waiter))
    return settings._replace(endpoint=endpoint)

@contextlib.contextmanager
def open_settings(options, console, endpoint_needed=True):
    """Yield the Settings for *options*.

    It sets console.json and console.secrets, and prints the notes.  Raise UsageError where an
    endpoint is needed and nothing names one.
    """
    with contextlib.ExitStack() as stack:
        if options.demo:
            settings = _demo_settings(options, stack.enter_context(demo_endpoint()))
        else:
            settings = _user_settings(options, console, endpoint_needed)
        console.secrets = secret_texts(settings)
        console.note(*settings.notes)
        yield settings

def change_settings(options, console, first_url, settings, context, endpoint):
    """Return *settings* with another endpoint, or those of the deployment *context*.

    A key and headers of the command line go only to the origin of the chat's *first_url*.  Raise
    UsageError where the context or the endpoint is unusable.
    """
    if context is None:
        check_endpoint(endpoint, settings.base_url, "the endpoint")
        return settings._replace(endpoint=endpoint, notes=[])
    if options.demo:
        raise UsageError("--demo has no contexts")
    config = read_config()
    deployment = find_deployment(config, context)
    changed = dict(vars(options), context=context, endpoint=endpoint, base_url=None)
    if not same_origin(deployment.get("base_url"), first_url):
        changed.update(api_key=None, header=[])
    read_key = functools.partial(fetch_key, waiter=console.waiter)
    changed = argparse.Namespace(**changed)
    found = resolve_settings(changed, environment(), config, read_key)
    console.secrets = console.secrets + secret_texts(found)
    return found._replace(endpoint=found.endpoint or settings.endpoint)

def confirm(question, console):
    """Return whether the person at the terminal answers *question* with yes."""
    try:
        answer = console.read_line(question + " [y/N] ")
    except EOFError:  # the cursor is still behind the question
        console.print_line("")
        return False
    return is_yes(answer)

def refuse_dry_run(options):
    """Raise UsageError for a dry run of a command that does more than send one request."""
    if options.dry_run:
        raise UsageError(f"--dry-run shows requests: {options.command} cannot be tried with it")

def _refuse_constant(name):
    raise ValueError(f"{name} is not a JSON number")

def parse_strict_json(text):
    """Return the document that *text* holds; raise ValueError where it is not JSON (RFC 8259)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

def load_schema(options):
    """Replace the path of --schema in *options* by the JSON Schema in the file, and name it.

    Raise UsageError where the file cannot be read or holds no JSON object.
    """
    options.schema_name = None
    if options.schema is None:
        return
    path = options.schema
    try:
        schema = parse_strict_json(decode_text(read_file(path))[0])
    except ValueError as error:
        raise UsageError(f"--schema {path} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageError(f"--schema {path} is not a JSON object")
    stem = os.path.basename(path).partition(".")[0]
    # OpenAI takes 64 characters of these as a name.
    options.schema_name = re.sub("[^A-Za-z0-9_-]", "_", stem)[:64] or "answer"
    options.schema = schema

def refuse_combinations(options, interactive):
    """Raise UsageError for options of chat that contradict each other."""
    single_only = {
        "-o json": options.output == "json",
        "--dry-run": options.dry_run,
        "--extract": options.extract,
        "--schema": options.schema,
        "--attach -": "-" in options.attach,
    }
    for name, is_given in single_only.items():
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
    name = "the message"
    if text not in (None, "-"):
        data = text.encode("utf-8", "surrogateescape")
    else:
        name = "standard input"
        data = None
        if text == "-" or not console.stdin_is_terminal():
            data = console.read_stdin()
    if data is None:
        raise UsageError("no message: give -m TEXT, or pipe one in")
    text = decode_prompt(data, name)
    if not text.strip():
        raise UnusableInputError("the message is empty")
    return text

def read_question(options, console):
    """Return the user's message: its text and the files of --attach; print their notes."""
    text = read_message(options, console)
    attachments = []
    for path in options.attach:
        if path == "-":
            data = console.read_stdin() or b""
            attachments.append(parse_attachment(None, "standard input", data))
        else:
            attachments.append(read_attachment(path))
    console.note(*[attachment.note for attachment in attachments if attachment.note])
    return build_question(text, attachments)

def note_unread_stdin(options, console):
    """Tell the user if standard input has data that this question does not use."""
    used = options.attach + [options.message]
    is_read = "-" in used or used == [None]
    if not is_read and console.stdin_has_data():
        console.note("standard input is not read: --attach - adds it to the question, "
                     "-q silences this note")

def show_code_block(request, settings, console, reply):
    """Send *request*, show the first code block of the answer once it is whole, and return it.

    Where there is none, or the answer fails, the text received goes to stderr.
    """
    try:
        receive_answer(request, settings, console, reply)
        reply.check_answer()
        block = extract_code_block(reply.text)
        if block is None:
            raise ServerError("there is no code block in the answer")
    except XeroctlError:
        if reply.text:
            for line in reply.text.rstrip("\n").split("\n"):
                console.print_line(line)
        raise
    console.write(end_line(block))
    return block

def check_json(text):
    """Raise ServerError where the answer *text* is not JSON as --schema asks."""
    try:
        parse_strict_json(text)
    except ValueError as error:
        raise ServerError(f"the answer is not JSON, as --schema asks: {error}") from error

def run_single(options, settings, console, conversation, store):
    """Ask one question after *conversation*, show the answer, and keep both in *store*."""
    note_unread_stdin(options, console)
    question = read_question(options, console)
    sampling = build_sampling(options)
    messages = conversation.messages + [question]
    request = build_chat_request(sampling, settings, messages, settings.stream)
    if settings.dry_run:
        send_dry_run(request, settings, console)
        return
    if options.continue_last:
        store.claim()
    reply = Reply(token_limit(sampling))
    conversation.unanswered = question
    try:
        if options.extract:
            answer = show_code_block(request, settings, console, reply)
        else:
            view = build_view(console, settings.stream, options.plain, options.show_reasoning,
                              show_thought=options.schema is None)
            show_answer(request, settings, console, view, reply)
            answer = reply.text
        report_reply(reply, reply.seconds, settings.stream, options.show_usage, console)
        if options.schema is not None:
            check_json(answer)
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
    if interactive or options.extract:
        options.output = "text"  # the config file may ask for JSON
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

def run_models(options, console):
    """List the ids of the models behind an endpoint."""
    with open_settings(options, console) as settings:
        request = build_models_request(settings)
        if settings.dry_run:
            send_dry_run(request, settings, console)
            return
        document = request_json(request, settings, console)
    models = list_items(document, "models")
    names = [get_field(model, "id", str) for model in models]
    show_rows(document, ("id",), [(name,) for name in names if name], console)

# -- Commands: config -------------------------------------------------------------------------

LIST_NAMES = ["", "name", "key", "endpoint", "base URL"]
MAX_KEY_COLUMNS = 30
MIN_URL_COLUMNS = 20
ADDRESS_VARIABLES = (ENV_BASE_URL, ENV_API_KEY, ENV_CONTEXT, ENV_ENDPOINT)

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
    if isinstance(value, (bool, int, float)):
        return value
    return mask_url(str(value))  # a date becomes a text

def fit_rows(rows, columns):
    """Return the *rows* of a list fitted to *columns*: long keys and URLs cut in the middle."""
    fitted = []
    for name, mark, _, key, endpoint in rows:
        fitted.append([mark, name, truncate_middle(key, MAX_KEY_COLUMNS), endpoint])
    lines = table_lines(LIST_NAMES[:-1], fitted, sys.maxsize)
    left = columns - max(map(display_width, lines)) - 2
    for cells, row in zip(fitted, rows):
        cells.append(truncate_middle(row[2], max(left, MIN_URL_COLUMNS)))
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
    for name, deployment in config.deployments.items():
        fields = mask_secrets("", deployment)
        masked[name] = fields
        mark = "*" if name == config.current else ""
        field = key_field(fields) or "api_key"
        kind = field[len("api_key_"):]
        key = f"{kind} {fields.get(field, '')}".strip()
        url = fields.get("base_url", "")
        endpoint = fields.get("endpoint", "")
        rows.append([name, mark, url, key, endpoint])
    if console.out.is_terminal:
        rows = fit_rows(rows, console.out.width())
    else:
        rows = [row if row[-1] else row[:-1] for row in rows]
    show_rows({"current": config.current, "deployment": masked}, LIST_NAMES, rows, console)

def run_config_show(options, console):
    """Show one deployment, the chosen one unless another is named."""
    config = read_config()
    console.note(*config.warnings)
    name = options.name or options.context or environment()[ENV_CONTEXT] or config.current
    if name is None:
        raise UsageError(f"no context is chosen: {known_contexts(config)}")
    fields = {"name": name}
    fields.update(mask_secrets("", find_deployment(config, name)))
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
    """Replace the - of --api-key by a line of standard input."""
    if options.api_key != "-":
        return
    key = ""
    with contextlib.suppress(EOFError):
        key = console.read_secret("API key, not shown: ")
    if key in ("", "-"):
        raise UsageError("no API key on standard input")
    options.api_key = check_api_key(key)

def change_fields(deployment, options):
    """Return *deployment* with the values of *options*: None changes nothing, "" removes."""
    changed = dict(deployment)
    for field in ("base_url", "api_key", "endpoint"):
        value = getattr(options, field)
        if value:
            changed[field] = value
        elif value == "":
            changed.pop(field, None)
    if options.api_key == "":  # wherever the key is kept
        changed.pop(key_field(deployment), None)
    if options.base_url:
        changed["base_url"] = check_base_url(options.base_url)
    if changed.get("endpoint"):
        check_endpoint(changed["endpoint"], changed.get("base_url", ""), "--endpoint")
    return changed

def add_deployment(options, console):
    """Put a new deployment into the config file; it becomes the current one if there is none."""
    name = options.name
    deployment = change_fields({}, options)
    with change_config() as config:
        if name in config.deployments:
            raise UsageError(f"{name} already exists: change it with: xeroctl config set {name}")
        if config.current not in config.deployments:
            config.current = name
        config.deployments[name] = deployment
    advice = f"choose it with --context {name}, or with: xeroctl config use {name}"
    if config.current == name:
        advice = "it is the current one"
    console.note(f"added {name} to {config.path}: {advice}")

def run_config_add(options, console):
    """Add a deployment."""
    refuse_dry_run(options)
    if not options.base_url:
        raise UsageError("no base URL: give --base-url URL")
    read_given_key(options, console)
    add_deployment(options, console)

def run_config_set(options, console):
    """Change a deployment in place; an empty value removes a field."""
    refuse_dry_run(options)
    name = options.name
    read_given_key(options, console)
    if (options.base_url, options.api_key, options.endpoint) == (None, None, None):
        raise UsageError("nothing to change: give --base-url, --api-key or --endpoint")
    with change_config() as config:
        old = find_deployment(config, name)
        new = change_fields(old, options)
        config.deployments[name] = new
    console.note(f"changed {name} in {config.path}")
    keeps_key = key_field(old) and options.api_key is None
    if keeps_key and options.base_url and not same_origin(old.get("base_url"), new["base_url"]):
        console.note(f"the API key of {name} goes to {new['base_url']} from now on")

def run_config_use(options, console):
    """Make a deployment the current one."""
    refuse_dry_run(options)
    with change_config() as config:
        find_deployment(config, options.name)
        config.current = options.name
    console.note(f"{options.name} is the current context")
    for variable, value in environment().items():
        if value and variable in ADDRESS_VARIABLES:
            console.note(f"{variable} is set and takes precedence")

def run_config_remove(options, console):
    """Remove a deployment."""
    refuse_dry_run(options)
    with change_config() as config:
        find_deployment(config, options.name)
        del config.deployments[options.name]
        if config.current == options.name:
            config.current = None
    advice = ""
    if config.deployments and config.current is None:
        advice = ": no context is chosen now, choose one with: xeroctl config use CONTEXT"
    console.note(f"removed {options.name}{advice}")

def ask_deployment(options, console):
    """Ask for each value of a new deployment that *options* lacks, until it is usable."""
    deployments = read_config().deployments

    def check_name(text):
        name = text or "default"
        if name in deployments:
            raise UsageError(f"{name} already exists: take another name")
        return check_deployment_name(name)

    def check_slug(text):
        plain_url = plain_address(options.base_url)
        if not text or is_endpoint(text, options.base_url):
            return text
        if not plain_url or " " in text:
            return check_endpoint(text, options.base_url, "the endpoint")
        options.base_url = plain_url
        console.note(f"{text} is not a slug: the base URL is {plain_url}")
        return text

    options.name = None
    for field, read, question, check in (
            ("name", console.read_line, "name [default]: ", check_name),
            ("base_url", console.read_line,
             "base URL (Xerotier .../PROJECT/v1, else .../chat/completions): ", check_base_url),
            ("api_key", console.read_secret,
             "API key, not shown; Enter for none: ", check_api_key),
            ("endpoint", console.read_line,
             "endpoint [to be given with each command]: ", check_slug)):
        value = getattr(options, field)
        is_given = value not in (None, "-")
        if is_given:
            value = check(value)
        while not is_given:
            try:
                value = check(read(question).strip())
                is_given = True
            except (UsageError, UnusableInputError) as error:
                console.print_error(error)
        setattr(options, field, value)

def find_address(settings, console):
    """Return the base URL that answers: the given one, or the plain one where that alone answers.

    Raise the error that makes the address doubtful.
    """
    base_url = settings.base_url
    if "{endpoint}" in base_url and not settings.endpoint:
        return base_url  # there is nothing to ask yet
    try:
        request_json(build_models_request(settings), settings, console)
        return base_url
    except RefusedError as error:  # it answers
        plain_url = plain_address(base_url)
        if error.status != 404 or not settings.endpoint or not plain_url:
            return base_url
    with contextlib.suppress(XeroctlError):
        request = build_models_request(settings._replace(base_url=plain_url))
        request_json(request, settings, console)
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
        ask_deployment(options, console)
        settings = resolve_options(options)
        settings = settings._replace(retries=0)
        console.secrets = secret_texts(settings)
        console.note(*settings.notes)
        options.base_url = find_address(settings, console)
    except EOFError:
        console.print_line("")
        raise UsageError("nothing was written") from None
    except (NetworkError, ServerError, AuthError, RateLimitError, CutShortError) as error:
        console.print_error(error)
        if not confirm("Keep it anyway?", console):
            raise UsageError("nothing was written") from error
    add_deployment(options, console)
    command = f"xeroctl chat --context {options.name}"
    if not options.endpoint:
        command += " --endpoint SLUG"
    console.note(f"next: {command} -m Hello")

# -- Commands: status -------------------------------------------------------------------------

STATUS_STEPS = ("settings", "name", "connection", "tls", "authorisation", "completion")
STEP_WORDS = {  # "ok" of a step in JSON -> its word on a terminal, and the colour
    True: ("ok", "\x1b[32m"),
    None: ("-", "\x1b[33m"),
    False: ("FAILED", RED),
}
STATUS_QUESTION = "Count from one to ten."
STATUS_MAX_TOKENS = 16
ARRIVAL_GAP_SECONDS = 0.001  # chunks with a shorter gap arrived together
BURST_SECONDS = 0.1  # a shorter answer may simply be fast

class Check(ConnectLog):
    """The steps of a check: shown one by one as they end, or with -o json as one object."""

    def __init__(self, console):
        super().__init__(console)
        self.is_plain = False  # the address is http://
        self._console = console
        self._started = time.monotonic()  # of the step
        self._done = []  # JSON objects

    def add_step(self, name, sentence, **facts):
        """Note that the step *name* of connecting ended now, and show it."""
        super().add_step(name, sentence, **facts)
        expires = facts.get("certificate_expires")
        if expires:
            from ssl import cert_time_to_seconds

            seconds_left = cert_time_to_seconds(expires) - time.time()
            facts["certificate_days"] = int(seconds_left // (24 * 60 * 60))
            sentence += ", " + plural(facts["certificate_days"], "more day")
        self.end_step(name, [sentence], facts)
        if name == "connection" and self.is_plain:
            self.end_step("tls", ["none: the address is http://"], {"version": None})

    def end_step(self, name, sentences, facts, ok=True):
        """Note that the step *name* ended now, and what is known from it; *ok* None: unknown."""
        now = time.monotonic()
        seconds = now - self._started
        self._started = now
        self._done.append(dict(facts, step=name, ok=ok, seconds=round(seconds, 4)))
        if self._console.json:
            return
        if self._console.out.is_terminal:
            self._draw(name, ok, seconds, sentences)
            return
        text = one_line(", ".join(sentences))
        self._console.write(f"{name:<13}  {seconds:7.3f} s  {text}\n")

    def fail(self, error):
        """Note that the step after the last one failed with *error*."""
        name = STATUS_STEPS[len(self._done)]
        sentences = []
        if not self._console.out.is_terminal:
            sentences.append("failed")
        self.end_step(name, sentences, {"message": str(error)}, ok=False)

    def finish(self, good):
        """Show the one object of -o json; *good* says that no step failed."""
        if self._console.json:
            show_json({"ok": good, "steps": self._done}, self._console)

    def _draw(self, name, ok, seconds, sentences):
        """Write a step to the terminal; each of its lines begins with its name."""
        from textwrap import wrap

        home = utf8_argument(os.path.expanduser("~"))
        word, colour = STEP_WORDS[ok]
        took = f"{seconds:.2f} s"
        margin = f"{name:<14}{word:<7}{took:>6}  "
        columns = max(20, self._console.out.width() - len(margin))
        lines = []
        for sentence in sentences:
            text = one_line(sentence).replace(home + "/", "~/")
            lines += wrap(text, columns, break_long_words=False, break_on_hyphens=False)
        separator = "\n" + name.ljust(len(margin))
        text = (margin + separator.join(lines)).rstrip() + "\n"
        if self._console.out.styled:
            text = text.replace(word, colour + word + RESET, 1)
        self._console.write_styled(text)

def describe_settings(settings, console):
    """Return sentences that say which base URL and key are used, and where they come from."""
    url_source = settings.sources["base_url"]
    key_source = settings.sources["api_key"]
    url_sentence = f"base URL {mask_url(settings.base_url)} ({url_source})"
    if not settings.api_key:
        return [url_sentence, "no API key"]
    if console.out.is_terminal and key_source == url_source:
        key_source = "the same"
    key = mask_key(settings.api_key)
    return [url_sentence, f"API key {key} ({key_source})"]

def check_models(settings, check, console):
    """Find out who answers, and whether the key is accepted, by asking for the models."""
    request = build_models_request(settings)
    try:
        document = request_json(request, settings, console, check)
        count = len(list_items(document, "models"))
    except (AuthError, RefusedError) as error:
        # A key can be restricted to completions of one endpoint, and a server can lack the list.
        is_restricted = error.status == 403 and settings.endpoint
        if error.status not in (404, 405) and not is_restricted:
            raise
        message = str(error)
        check.end_step("authorisation", ["not known: " + message], {"message": message}, ok=None)
        return
    key = "with the key" if settings.api_key else "without a key"
    sentence = f"HTTP 200 {key}, models: {count}"
    check.end_step("authorisation", [sentence], {"models": count})

def describe_pace(chunks, arrivals, seconds):
    """Return how an answer of *chunks* came, in *seconds* and at *arrivals* distinct times."""
    if chunks == 1:
        return "in one piece: it may be that this server does not stream"
    if arrivals == 1 and seconds < BURST_SECONDS:
        return "at once, too fast to see it stream"
    if arrivals == 1:
        return "in one burst: something on the way, a proxy perhaps, holds the stream back"
    if 2 * arrivals >= chunks:
        return "one by one"
    return f"in {arrivals} bursts"

def measure_answer(limit_name, settings, console):
    """Return the Reply to a short question, and the Chunks that it came in.

    *limit_name* is that of the body field that limits the tokens.
    """
    sampling = Sampling(None, {limit_name: STATUS_MAX_TOKENS}, [])
    messages = [build_message(STATUS_QUESTION)]
    request = build_chat_request(sampling, settings, messages, True)
    reply = Reply()
    chunks = []
    receive_answer(request, settings, console, reply, chunks.append)
    if not reply.has_reasoning:  # a model that reasons may need all the tokens for that
        reply.check_answer()
    return reply, chunks

def measure_completion(settings, console):
    """Return what measure_answer() does, with the token limit that the server knows."""
    try:
        return measure_answer("max_tokens", settings, console)
    except RefusedError as error:
        told = f"{error} {error.body}"
        if error.status not in (400, 422) or not re.search("max_(completion_)?tokens", told):
            raise
    return measure_answer("max_completion_tokens", settings, console)

def name_plain_address(settings, console, error):
    """Raise a RefusedError that names the address without a slug, where that one answers."""
    address = plain_address(settings.base_url)
    if error.status != 404 or address is None:
        return
    try:
        measure_completion(settings._replace(base_url=address), console)
    except XeroctlError:
        return
    raise RefusedError(f"HTTP 404 below {settings.base_url}, but {address} answers: this server "
                       "has no slugs: make that the base URL", 404) from error

def check_completion(settings, check, console):
    """Find out how a short completion is streamed."""
    try:
        reply, chunks = measure_completion(settings, console)
    except RefusedError as error:
        name_plain_address(settings, console, error)
        raise
    arrivals = 0
    count = 0
    last_at = 0
    for chunk in chunks:
        if chunk.at - last_at > ARRIVAL_GAP_SECONDS:
            arrivals += 1
        last_at = chunk.at
        count += len(chunk.documents)
    facts = usage_fields(reply, reply.seconds, True)
    del facts["seconds"]  # the step has its own
    facts.update(model=reply.model, chunks=count, arrivals=arrivals)
    sentences = []
    if reply.first_seconds is not None:
        sentences.append(f"first token after {reply.first_seconds:.2f} s")
    model = reply.model or "not told"
    sentences.append(f"model {model}")
    sentences.append(describe_pace(count, arrivals, reply.seconds))
    if "tokens_per_second" in facts:
        sentences.append(f"{facts['tokens_per_second']:.1f} tokens/s after it")
    check.end_step("completion", [", ".join(sentences)], facts)

def run_checks(settings, check, console):
    """Check what the Settings lead to; raise the error of the first step that fails."""
    import urllib.request  # noqa: F401 (before the steps are timed)

    route = find_route(build_models_request(settings).url)
    if route.tls:
        tls_context(settings.cacert)
    check.is_plain = not route.tls
    facts = {
        "base_url": mask_url(settings.base_url),
        "api_key": mask_key(settings.api_key) or None,
        "endpoint": settings.endpoint,
        "sources": settings.sources,
    }
    check.end_step("settings", describe_settings(settings, console), facts)
    check_models(settings, check, console)
    if settings.endpoint:
        check_completion(settings, check, console)
    else:
        console.note("to try a completion too, give --endpoint SLUG")

def run_status(options, console):
    """Check a deployment step by step; the first failure ends it."""
    refuse_dry_run(options)
    check = Check(console)
    try:
        with open_settings(options, console, endpoint_needed=False) as settings:
            run_checks(settings._replace(retries=0), check, console)
    except OutputError:
        raise
    except XeroctlError as error:
        check.fail(error)
        check.finish(False)
        raise
    check.finish(True)

# -- Commands: completions --------------------------------------------------------------------

COMPLETION_COLUMNS = ("id", "created", "model", "tokens", "metadata")
MAX_MESSAGE_PAGES = 1000

def completion_row(completion):
    """Return the cells that a list shows of a stored completion."""
    name, model = [get_field(completion, field, str) or "" for field in ("id", "model")]
    created = get_field(completion, "created", (int, float))
    stamp = ""
    if created is not None and 0 <= created < 1e11:  # more is not a time in seconds
        stamp = utc_stamp(created)
    tokens = parse_usage(get_field(completion, "usage", dict)).total
    if tokens is None:
        tokens = ""
    tags = []
    metadata = get_field(completion, "metadata", dict) or {}
    for tag, value in sorted(metadata.items()):
        if not isinstance(value, str):
            value = json_text(value)
        tags.append(f"{tag}={value}")
    return name, stamp, model, str(tokens), " ".join(tags)

def answer_message(completion):
    """Return the message of the first choice in *completion*; raise ServerError for none."""
    for choice in get_field(completion, "choices", list) or ():
        message = get_field(choice, "message", dict)
        if message:
            return message
    raise ServerError("the reply holds no completion")

def list_query(options):
    """Return the (name, value) pairs of the query for the filters in *options*."""
    query = [(name, getattr(options, name)) for name in ("limit", "after", "order", "model")]
    query += [(f"metadata[{name}]", value) for name, value in options.metadata]
    return [(name, value) for name, value in query if value is not None]

def request_stored(settings, console, method, path, query=(), body=None):
    """Return the document that answers *method* at *path* below the stored completions.

    For a dry run, show the request and return None.
    """
    request = build_stored_request(method, settings, path, query, body)
    if settings.dry_run:
        send_dry_run(request, settings, console)
        return None
    return request_json(request, settings, console)

def last_id(items):
    """Return the id of the last of *items*, or None."""
    if items:
        return get_field(items[-1], "id", str)
    return None

def run_completions_list(options, console):
    """List the stored completions."""
    with open_settings(options, console) as settings:
        document = request_stored(settings, console, "GET", "", list_query(options))
    if options.dry_run:
        return
    completions = list_items(document, "completions")
    rows = [completion_row(completion) for completion in completions]
    show_rows(document, COMPLETION_COLUMNS, rows, console)
    last = last_id(completions)
    if last and get_field(document, "has_more", bool):
        console.note(f"there are more: add --after {last}")

def run_completions_get(options, console):
    """Show the answer of a stored completion."""
    with open_settings(options, console) as settings:
        completion = request_stored(settings, console, "GET", "/" + options.id)
    if options.dry_run:
        return
    if console.json:
        show_json(completion, console)
        return
    text = join_surrogates(content_text(answer_message(completion)))
    console.write(end_line(text))

def read_messages(name, settings, console):
    """Return all messages of the stored completion *name*, page by page, and its answer."""
    messages = []
    seen = [None]  # last ids of the pages
    query = []
    has_more = True
    while has_more:
        document = request_stored(settings, console, "GET", f"/{name}/messages", query)
        if settings.dry_run:
            return []
        page = list_items(document, "messages")
        has_more = get_field(document, "has_more", bool)
        last = last_id(page)
        if last is None or last not in seen:
            messages += page
        if has_more and (last in seen or len(seen) == MAX_MESSAGE_PAGES):
            console.note("there may be more messages: the server does not page through them")
            break
        seen.append(last)
        query = [("after", last)]
    if messages and messages[-1].get("role") != "assistant":  # some servers keep it apart
        completion = request_stored(settings, console, "GET", "/" + name)
        messages.append(dict({"role": "assistant"}, **answer_message(completion)))
    return messages

def run_completions_messages(options, console):
    """Show the conversation of a stored completion; with -o json in a form that /load reads."""
    with open_settings(options, console) as settings:
        messages = read_messages(options.id, settings, console)
    if options.dry_run:
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
    if not options.metadata:
        raise UsageError("nothing to change: give --metadata NAME=VALUE")
    with open_settings(options, console) as settings:
        body = {"metadata": dict(options.metadata)}
        completion = request_stored(settings, console, "POST", "/" + options.id, body=body)
    if not options.dry_run:
        show_rows(completion, COMPLETION_COLUMNS, [completion_row(completion)], console)

def run_completions_delete(options, console):
    """Delete stored completions once confirmed; go on after a failure, and return its status."""
    asks = not options.yes and not options.dry_run
    if asks and not console.stdin_is_terminal():
        raise UsageError("delete asks at a terminal: without one give --yes")
    status = EXIT_OK
    with open_settings(options, console) as settings:
        if asks and not confirm(f"Delete {', '.join(options.id)}?", console):
            raise UsageError("nothing was deleted")
        for name in options.id:
            try:
                document = request_stored(settings, console, "DELETE", "/" + name)
                if get_field(document, "deleted", bool) is False:
                    raise ServerError(f"the server did not delete {name}")
            except XeroctlError as error:
                console.print_error(error)
                status = status or error.exit_status
                continue
            if options.dry_run:
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
READABLE, WRITABLE = 1, 2  # EVENT_READ and EVENT_WRITE of selectors
TIMEOUT_CHECK_SECONDS = 0.1
CROSSING_SECONDS = 1  # in which a request and the end of its connection may cross
MAX_SKIPPING = 16  # connections on which the rest of a body is skipped
LAG_SAMPLE_SECONDS = 0.01  # how often a measuring loop notes how late it is
WORK_SECONDS = 0.0003  # after which the loop looks for new bytes again
MAX_UNPARSED_BYTES = 4 << 20  # above it, a turn receives nothing
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
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError) as error:
        raise UsageError(f"{count} connections need {wanted} open files, and this process may "
                         f"have {hard}: see ulimit -n") from error

@contextlib.contextmanager
def open_for_append(path, waiter):
    """Yield a descriptor that appends to the file *path*, which is made if missing.

    Raise UsageError where it cannot be opened, and as Waiter.wait() does.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    try:  # in a thread: a pipe waits for its reader
        opening = functools.partial(os.open, path, flags, 0o666)
        descriptor = waiter.run_in_thread(opening, None)
    except OSError as error:
        raise UsageError(f"cannot write {utf8_argument(path)}: {os_reason(error)}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)

class Exchange:
    """One request of a RequestLoop and what came of it.  All times are monotonic, in seconds."""

    def __init__(self, request, route, settings):
        self.request = request
        self.route = route  # to the request's URL
        self.settings = settings
        self.due = time.monotonic()  # when it should be sent
        self.is_scheduled = False  # else it is not due before its connection is open
        self.sent_at = None  # when the request is given to its connection
        self.connect_seconds = None  # None: its connection was open already
        self.head = None
        self.reply = Reply()
        self.arrivals = []  # (time, number of chunks with text or reasoning), one a read
        self.chunks = []  # of the answer, where no stream was asked for
        self.error_body = b""
        self.error = None
        self._context = None
        self._answers = None  # None: what comes is the body of an error

    def feed(self, head, body, at):
        """Take some *body* that came after *head* at the time *at*; return True at the end."""
        if self.head is None:
            self.head = head
            self._context = build_context(head, self.request, self.route, self.settings)
            if 200 <= head.status <= 299:
                self._answers = AnswerDecoder(self.request.streamed, head, self._context)
        if self._answers is None:
            self.error_body = (self.error_body + body)[:MAX_ERROR_BYTES]
            return len(self.error_body) == MAX_ERROR_BYTES
        self._add(self._answers.feed(body, at))
        return self._answers.ended

    def finish(self, at):
        """Handle the end of the body; set *error* if something was wrong."""
        if self._answers is None:
            self.error = parse_error(self.error_body, self._context)
        else:
            self._add(self._answers.finish(at))

    def fail(self, error, at):
        """End with *error*; after an error status or a finish reason, as finish() does."""
        self.error = error
        has_failed = self.head is not None and self._answers is None
        if has_failed or self.reply.finish_reason:
            self.finish(at)

    def find_error(self):
        """Return what was wrong with the ended exchange, an empty answer included, or None."""
        try:
            if self.error is None:
                self.reply.check_answer()
        except XeroctlError as error:
            return error
        return self.error

    def _add(self, chunk):
        self.error = self._answers.error
        if chunk is None:
            return
        self.reply.add(chunk)
        if chunk.deltas:
            self.arrivals.append((chunk.at, chunk.deltas))
        if not self.request.streamed:
            self.chunks.append(chunk._replace(sources=[]))

class PooledConnection:
    """A connection of a RequestLoop.  Without a decoder it is idle."""

    def __init__(self, stream, opened_at):
        self.stream = stream
        self.opened_at = opened_at
        self.exchange = None  # None with a decoder: the answer has ended, the rest is skipped
        self.decoder = None
        self.unsent = b""
        self.unparsed = 0  # reads that wait for the parser
        self.heard_at = 0
        self.is_reused = False
        self.at_end = False  # the end was received
        self.failure = None  # the OSError that was the end, or None

class RequestLoop:
    """Sends many requests at once, from one thread, through one selector.

    A turn receives what is ready and notes the time, then parses for WORK_SECONDS.  Bytes that
    are not parsed by then wait in a queue.  So the time of arrival does not depend on the work
    for other connections.  A few threads connect.  After start_lag_sampling(), *lags* holds how
    late the loop was.
    """

    def __init__(self, waiter, keeps_connections=True):
        import queue
        import selectors
        import socket

        self.lags = []  # seconds, one a sample
        self._waiter = waiter
        self._keeps_connections = keeps_connections
        self._selector = selectors.DefaultSelector()
        self._connections = set()
        self._idle = []  # those of them that wait for a request
        self._in_flight = set()
        self._unparsed = collections.deque()  # (connection, data, time of arrival)
        self._unparsed_bytes = 0
        self._finished = []
        self._wanted = queue.Queue()  # exchanges that need a connection; None ends a thread
        # (exchange, Stream or exception, time of the start, time of the end), from the threads
        self._opened = collections.deque()
        self._threads = 0
        self._next_timeout_check = 0
        self._next_lag_sample = float("inf")
        self._wakeup_reader, self._wakeup_writer = socket.socketpair()
        self._wakeup_reader.setblocking(False)
        self.watch(self._wakeup_reader)
        if waiter.wakeup_fileno is not None:
            self.watch(waiter.wakeup_fileno)

    def start(self, exchange):
        """Send the request of *exchange* on an idle connection, or on a new one."""
        self._in_flight.add(exchange)
        for connection in reversed(self._idle):
            if connection.stream.route == exchange.route and not connection.unparsed:
                self._idle.remove(connection)
                self._send(connection, exchange)
                return
        self._connect(exchange)

    def start_lag_sampling(self):
        """Note from now on, once in LAG_SAMPLE_SECONDS, how late the loop is."""
        self.lags = []
        self._next_lag_sample = time.monotonic()

    def watch(self, descriptor):
        """Let a turn end when *descriptor* is readable; raise OSError where that cannot be."""
        self._selector.register(descriptor, READABLE, None)

    def unwatch(self, descriptor):
        """Undo watch()."""
        self._selector.unregister(descriptor)

    def turn(self, until):
        """Do one turn, which waits at most to the time *until*; return the exchanges that ended.

        Raise KeyboardInterrupt or Terminated for a signal.
        """
        is_receiving = self._unparsed_bytes < MAX_UNPARSED_BYTES
        if is_receiving:
            after_beat = self._next_lag_sample + 0.001
            wake_at = min(until, self._next_timeout_check, after_beat)
            self._receive(wake_at)
        self._waiter.check()  # before the work: all that ends in a turn is returned
        now = time.monotonic()
        while time.monotonic() < now + WORK_SECONDS and not self._finished:
            if self._opened:
                self._connection_opened(*self._opened.popleft())
            elif self._unparsed:
                self._parse(*self._unparsed.popleft())
            else:
                break
        if is_receiving and now >= self._next_timeout_check:
            self._next_timeout_check = now + TIMEOUT_CHECK_SECONDS
            self._end_silent_ones(now)
        finished = self._finished
        self._finished = []
        return finished

    def drop_all(self):
        """Give up what is in flight; close all connections."""
        self._in_flight.clear()
        for connection in list(self._connections):
            self._close(connection)
        self._unparsed.clear()
        self._unparsed_bytes = 0
        while self._opened:
            _, result, _, _ = self._opened.pop()
            if not isinstance(result, BaseException):
                result.close()

    def close(self):
        """Close all connections, and let the threads end."""
        for _ in range(self._threads):
            self._wanted.put(None)
        self.drop_all()
        self._selector.close()
        self._wakeup_reader.close()
        self._wakeup_writer.close()

    # Connections

    def _connect(self, exchange):
        import threading

        skipping = [one for one in self._connections if one.decoder and not one.exchange]
        if len(skipping) > MAX_SKIPPING:
            self._close(min(skipping, key=lambda one: one.heard_at))
        self._wanted.put(exchange)
        if self._threads < CONNECTOR_THREADS:
            try:
                threading.Thread(target=self._open_wanted, daemon=True).start()
                self._threads += 1
            except RuntimeError:  # can't start new thread
                if not self._threads:
                    self._wanted.put(None)
                    self._open_wanted()

    def _open_wanted(self):
        while True:
            exchange = self._wanted.get()
            if exchange is None:
                return
            started = time.monotonic()
            try:
                result = open_stream(exchange.route, exchange.settings, Waiter(), ConnectLog())
            except XeroctlError as error:
                result = error
            except BaseException as error:  # a defect: the loop raises it too
                result = error
                raise
            finally:
                self._opened.append((exchange, result, started, time.monotonic()))
                with contextlib.suppress(OSError):  # the loop was closed
                    self._wakeup_writer.send(b"!")

    def _connection_opened(self, exchange, result, started, opened_at):
        if isinstance(result, BaseException) and not isinstance(result, XeroctlError):
            raise result
        is_wanted = exchange in self._in_flight
        if isinstance(result, XeroctlError):
            exchange.error = result
            if is_wanted:
                self._end(exchange)
        elif is_wanted:
            connection = PooledConnection(result, opened_at)
            self._connections.add(connection)
            self._selector.register(result, READABLE, connection)
            exchange.connect_seconds = opened_at - started
            self._send(connection, exchange)
        else:
            result.close()

    def _close(self, connection):
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._selector.unregister(connection.stream)
        connection.stream.close()

    # Sending and receiving

    def _send(self, connection, exchange):
        connection.exchange = exchange
        connection.decoder = ResponseDecoder(exchange.request.method)
        connection.unsent = memoryview(request_bytes(exchange.request, exchange.route))
        connection.heard_at = exchange.sent_at = time.monotonic()
        if not exchange.is_scheduled:
            exchange.due = max(exchange.due, connection.opened_at)
        self._send_rest(connection)
        if connection.unsent:
            self._selector.modify(connection.stream, READABLE | WRITABLE, connection)

    def _send_rest(self, connection):
        try:
            sent = connection.stream.send_now(connection.unsent)
            connection.unsent = connection.unsent[sent:]
            connection.heard_at = time.monotonic()  # a slow upload is no silence
        except OSError:  # what the server said before it closed, if anything, is read next
            connection.unsent = b""

    def _receive(self, wake_at):
        """Wait to the time *wake_at* at most, send the rest of requests, and queue what arrives."""
        now = time.monotonic()
        milliseconds = 0
        if not self._unparsed and not self._opened:
            # Whole milliseconds, rounded down: epoll rounds up, and would wake late.
            milliseconds = max(0, int((wake_at - now) * 1000))
        ready = self._selector.select(max(0, milliseconds - 0.5) / 1000)
        if milliseconds and not ready:
            self._sample_lag(now + milliseconds / 1000)
        for key, events in ready:
            connection = key.data
            if connection is None:
                self._drain(key.fileobj)
                continue
            if connection.unsent and events & WRITABLE:
                self._send_rest(connection)
                if not connection.unsent:
                    self._selector.modify(connection.stream, READABLE, connection)
            if events & READABLE and not connection.at_end:
                self._receive_from(connection)
        self._sample_lag(0)

    def _receive_from(self, connection):
        """Queue what arrived on *connection*; b"" stands for its end."""
        try:
            data = connection.stream.receive_now()
        except OSError as error:
            connection.failure = error
            data = b""
        if data is None:
            return
        now = time.monotonic()
        if connection.exchange is not None:  # after an answer, more bytes give no more time
            connection.heard_at = now
        connection.at_end = not data
        connection.unparsed += 1
        self._unparsed.append((connection, data, now))
        self._unparsed_bytes += len(data)

    def _sample_lag(self, timer_at):
        """Add a sample for each beat up to now: how late the loop is.

        *timer_at* is when the timer that woke us was due, which is up to 1 ms after the beat; it
        is 0 where something else woke us.  Bytes that wait for the parser are late after a beat.
        """
        now = time.monotonic()
        parser_due = now
        if self._unparsed:
            _, _, arrived_at = self._unparsed[0]
            parser_due = arrived_at + LAG_SAMPLE_SECONDS
        while self._next_lag_sample <= now:
            due = max(self._next_lag_sample, timer_at)
            due = min(due, parser_due)
            lag = max(0, now - due)
            self.lags.append(lag)
            self._next_lag_sample += LAG_SAMPLE_SECONDS

    def _drain(self, source):
        with contextlib.suppress(BlockingIOError):
            if source is self._wakeup_reader:
                self._wakeup_reader.recv(READ_BYTES)
            elif source == self._waiter.wakeup_fileno:
                os.read(source, READ_BYTES)

    # Parsing, and ends

    def _parse(self, connection, data, at):
        self._unparsed_bytes -= len(data)
        connection.unparsed -= 1
        if connection not in self._connections:  # it was closed
            return
        exchange = connection.exchange
        decoder = connection.decoder
        if decoder is None:  # an idle connection ends, or says what nobody asked
            self._close(connection)
            return
        try:
            if connection.failure and not data:
                raise connection.failure
            body = decoder.feed(data)
            if not data:
                decoder.finish()
            if exchange and decoder.head is not None:
                # A streamed answer can end before its body does.
                if exchange.feed(decoder.head, body, at) or decoder.complete:
                    exchange.finish(at)
                    connection.exchange = None
                    self._end(exchange)
                elif decoder.failure:
                    raise decoder.failure
        except (OSError, WireError, XeroctlError) as error:
            self._connection_failed(connection, error, at)
            return
        if not decoder.complete:
            return
        is_in_use = decoder.unread or connection.unsent or connection.at_end
        if decoder.keeps_open and not is_in_use and self._keeps_connections:
            connection.decoder = None
            connection.is_reused = True
            self._idle.append(connection)
        else:
            self._close(connection)

    def _connection_failed(self, connection, error, at):
        """Close the connection on which *error* happened, and end its exchange."""
        exchange = connection.exchange
        decoder = connection.decoder
        self._close(connection)
        if exchange is None:
            return
        is_lost = decoder.head is None and isinstance(error, (OSError, IncompleteError))
        if is_lost and connection.is_reused and at < exchange.sent_at + CROSSING_SECONDS:
            # The server closed the idle connection while our request was on its way.
            exchange.is_scheduled = True  # the time that was lost counts
            self._connect(exchange)
            return
        if not isinstance(error, XeroctlError):
            timeout = exchange.settings.timeout
            error = response_error(error, exchange.route.peer, timeout, decoder)
        exchange.fail(error, at)
        self._end(exchange)

    def _end_silent_ones(self, now):
        import socket

        for connection in list(self._connections):
            exchange = connection.exchange
            limit = AFTER_FINISH_SECONDS
            if exchange and not exchange.reply.finish_reason:
                limit = exchange.settings.timeout
            is_heard = connection.unparsed or now - connection.heard_at < limit
            if connection.decoder is None or is_heard:
                continue
            self._close(connection)
            if exchange:
                error = response_error(socket.timeout(), exchange.route.peer, limit)
                exchange.fail(error, now)
                self._end(exchange)

    def _end(self, exchange):
        self._in_flight.discard(exchange)
        self._finished.append(exchange)

class Progress:
    """A line on a terminal's stderr that says how far we are, drawn twice a second."""

    def __init__(self, console):
        self._output = console.err
        self._next = time.monotonic() + PROGRESS_SECONDS
        self._visible = console.err.styled and not console.quiet

    def show(self, describe):
        """Draw what *describe* returns, if it is time."""
        now = time.monotonic()
        if self._visible and now >= self._next:
            self._next = now + PROGRESS_SECONDS
            self._output.draw_status(describe())

    def clear(self):
        """Erase the line, before something else is written."""
        self._output.erase_status()

# -- Batch ------------------------------------------------------------------------------------

GRACE_SECONDS = 5  # for requests in flight, once no more are sent
DEFAULT_BATCH_CONCURRENCY = 8
MAX_BUFFERED_RESULTS_PER_CONNECTION = 16  # that --ordered may keep back
RATE_LIMIT_TRIES = 5  # retries per --retries after a 429 with Retry-After
RESULT_START = b'{"id":"req_'
LINE_FIELDS = ("custom_id", "id", "message", "prompt", "messages", "method", "url")  # and body
LINE_ENDS = r"[\\\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"  # and the backslash that escapes them

class BatchRequest:
    """One line of the input: its names in the results, what is sent, and the tries so far."""

    def __init__(self, number, custom_id, content, request=None, error=None):
        from hashlib import sha256

        self.number = number
        self.custom_id = str(number) if custom_id is None else custom_id
        digest = sha256(b"%d\n%b" % (number, content)).hexdigest()
        self.id = "req_" + digest[:24]
        self.request = request
        self.error = error  # why the line cannot be sent, or None
        self.has_own_format = False  # the line says what form its answer has
        self.result_index = None
        self.failures = 0
        self.answered_at_last_429 = 0  # answers to all requests until then

def _find_custom_id(document):
    for name in ("custom_id", "id"):
        custom_id = document.get(name)
        if isinstance(custom_id, (str, int, float)):
            return custom_id
        if custom_id is not None:
            raise ValueError(f"its {name} is neither text nor a number")
    return None

def _check_messages(body):
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("its messages are missing, empty, or not a list")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("one of its messages is not an object")
    return body

def _find_body(document):
    """Return the fields of the body for a line's object, with messages; raise ValueError."""
    content = document.get("message", document.get("prompt"))
    body = {"messages": document.get("messages")}
    if "body" in document:
        url = str(document.get("url", CHAT_PATH))
        if document.get("method", "POST") != "POST" or not url.endswith(CHAT_PATH):
            raise ValueError(f"its method is not POST, or its url does not end in {CHAT_PATH}")
        body = document["body"]
        if not isinstance(body, dict):
            raise ValueError("its body is not an object")
        return _check_messages(body)
    for name in document:
        if name not in LINE_FIELDS:
            raise ValueError(f"it has an unknown field, {one_line(name)}")
    if body["messages"] is None:
        if not isinstance(content, (str, list)) or not content:
            raise ValueError("it has no message, prompt, messages or body, or an empty one")
        body["messages"] = [{"role": "user", "content": content}]
    return _check_messages(body)

def _build_line_request(document, sampling, settings, system):
    fields = dict(sampling.fields)
    fields.update(_find_body(document))
    fields.pop("stream", None)  # no request of a batch is streamed
    fields.pop("stream_options", None)
    messages = fields.pop("messages")
    model = fields.pop("model", None) or sampling.model
    has_system = any(message.get("role") in SYSTEM_ROLES for message in messages)
    if system is not None and not has_system:
        messages = [{"role": "system", "content": system}] + messages
    sampling = sampling._replace(model=model, fields=fields)
    try:
        return build_chat_request(sampling, settings, messages, False)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error

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
        failure = UnusableInputError(f"line {number} cannot be sent: {error}")
        return BatchRequest(number, custom_id, line, error=failure)
    request = BatchRequest(number, custom_id, request.body, request)
    request.has_own_format = "response_format" in document.get("body", ())
    return request

def _merge_tool_calls(pieces):
    calls = {}  # index -> call
    for piece in pieces:
        index = get_field(piece, "index", int)
        if index is None:
            index = len(calls)
        function = {"name": "", "arguments": ""}
        call = calls.setdefault(index, {"id": None, "type": "function", "function": function})
        call["id"] = call["id"] or get_field(piece, "id", str)
        for name in function:
            addition = get_field(get_field(piece, "function", dict), name, str)
            call["function"][name] += addition or ""
    return list(calls.values())

def build_completion(chunks, reply):
    """Return the completion that the *chunks* of a stream and their *reply* make, as one document.

    Return None where no chunk holds a document.
    """
    documents = list(itertools.chain(*[chunk.documents for chunk in chunks]))
    if not documents:
        return None
    message = {"role": "assistant", "content": "".join([chunk.text for chunk in chunks])}
    reasoning = "".join([chunk.reasoning for chunk in chunks])
    if reasoning:
        message["reasoning_content"] = reasoning
    pieces = itertools.chain(*[chunk.tool_calls for chunk in chunks])
    tool_calls = _merge_tool_calls(pieces)
    if tool_calls:
        message["tool_calls"] = tool_calls
    choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    completion = dict(documents[0], id=reply.id, object="chat.completion", model=reply.model)
    completion["choices"] = [choice]
    for document in documents:
        if document.get("usage"):
            completion["usage"] = document["usage"]
    return completion

def _is_piece(document):
    """Return whether *document* is a chunk of a stream, with a delta in place of a message."""
    for choice in get_field(document, "choices", list) or ():
        if get_field(choice, "delta", dict) and not get_field(choice, "message", dict):
            return True
    return False

def _answer_body(exchange):
    """Return the server's document, or one that is made of the stream that nobody asked for."""
    documents = list(itertools.chain(*[chunk.documents for chunk in exchange.chunks]))
    if len(documents) == 1 and not _is_piece(documents[0]):
        return documents[0]
    return build_completion(exchange.chunks, exchange.reply)

def _response_body(exchange):
    """Return the document that answered, or None; text for an error that is not JSON."""
    if not exchange.error_body:
        return _answer_body(exchange)
    text = exchange.error_body.decode("utf-8", "replace")
    try:
        return parse_json(text)
    except ValueError:
        return text

def build_result(request, error, exchange):
    """Return the JSON document that tells what came of the BatchRequest *request*.

    The *exchange* is None where it was not sent.
    """
    result = {"id": request.id, "custom_id": request.custom_id, "response": None, "error": None}
    if exchange is not None and exchange.head is not None:
        result["response"] = {
            "status_code": exchange.head.status,
            "request_id": exchange.head.headers.get("x-request-id"),
            "body": _response_body(exchange),
        }
    if error is not None:
        result["error"] = {
            "kind": error.kind,
            "message": str(error),
            "code": error.code,
            "status": error.status,
            "request_id": error.request_id,
        }
    return result

def _escape_in_json(match):
    return json.dumps(match.group())[1:-1]

class LineReader:
    """Reads the lines of a descriptor as they are needed, without a wait.

    *length* is the number of bytes to come, or 0 where it is not known.
    """

    def __init__(self, descriptor, length=0):
        self.descriptor = descriptor
        self.length = length
        self.received = 0  # bytes
        self.blank_lines = 0
        self._ended = False
        self._number = 0
        self._lines = []  # the next one last
        self._partial = bytearray()  # a line whose end has not come

    def next_line(self):
        """Return the next (number, line), or None if it has not come yet, or at the end."""
        while not self.is_exhausted():
            if self._lines:
                line = self._lines.pop()
                self._number += 1
                if line.strip():
                    return self._number, line
                self.blank_lines += 1
            elif os.name == "posix" and not poll_once([self.descriptor], [], 0)[0]:
                break
            else:
                self._read()
        return None

    def is_exhausted(self):
        """Return whether next_line() has no more to give."""
        return self._ended and not self._lines

    def _read(self):
        try:
            data = os.read(self.descriptor, READ_BYTES)
        except BlockingIOError:  # another process reads from it too
            return
        except OSError as error:
            raise UsageError(f"cannot read the requests: {os_reason(error)}") from error
        self.received += len(data)
        self._ended = not data
        if self._ended and self._partial:
            data = b"\n"
        self._partial += data
        if b"\n" in data:
            lines = bytes(self._partial).split(b"\n")
            self._partial = bytearray(lines.pop())
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
        """Return whether another request may be sent at the time *now*."""
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
    """Writes lines of results to a descriptor, in order if asked to.

    It keeps what an interrupt left unwritten, so that lines are written whole.  The descriptor is
    None for a terminal at stdout.
    """

    def __init__(self, descriptor, is_ordered, console, progress):
        self.held = {}  # index -> line, until those before it have come
        self._descriptor = descriptor
        self._is_ordered = is_ordered
        self._console = console
        self._progress = progress
        self._next_index = 0
        self._lines = []  # to be written
        self._rest = memoryview(b"")  # of lines that are written in part

    def add(self, index, line):
        """Take a line, the *index*th in the order of the requests."""
        self.held[index] = line
        if not self._is_ordered:
            self._next_index = index
        while self._next_index in self.held:
            self._lines.append(self.held.pop(self._next_index))
            self._next_index += 1

    def release(self, filler):
        """Let go of all that is held back, with *filler* in the place of a line that is missing."""
        for index in range(self._next_index, max(self.held, default=-1) + 1):
            self._lines.append(self.held.pop(index, filler))

    def flush(self):
        """Write what there is; raise as Console.write() and Waiter.wait()."""
        while self._rest or self._lines:
            if not self._rest:
                self._rest = memoryview(b"".join(self._lines))
                self._lines = []
            if self._descriptor is None:
                text = self._rest.tobytes().decode("utf-8")
                self._rest = memoryview(b"")
                self._progress.clear()
                self._console.write(text)
                continue
            try:
                self._rest = write_piece(self._descriptor, self._rest, self._console.waiter)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OutputError(f"cannot write the results: {os_reason(error)}") from error

def _parse_result(line, is_first):
    """Return the result in *line*, or None for the beginning of one; ValueError for the rest."""
    try:
        result = parse_json(line.decode("utf-8"))
    except ValueError:
        is_cut_early = RESULT_START.startswith(line) and not is_first
        if is_cut_early or line.startswith(RESULT_START):
            return None
        raise
    names = {"id", "custom_id", "response", "error"}
    if not isinstance(result, dict) or not names.issubset(result):
        raise ValueError("it is no result")
    return result

def _mend_end(path, whole_bytes, is_whole):
    with open(path, "ab") as file:
        file.truncate(whole_bytes)
        if is_whole:
            file.write(b"\n")

def read_answered(path, console):
    """Return the (custom_id, id) of each request that the file *path* has an answer for.

    A half-written line is cut off at the end, and skipped with a note before others.  Raise
    UsageError for a file of something else, which stays as it is.
    """
    name = utf8_argument(path)
    answered = set()
    half_lines = 0
    whole_bytes = 0
    line = b"\n"
    try:
        with open(path, "rb") as file:
            for line in file:
                result = _parse_result(line, whole_bytes == 0)
                if result is None and not line.endswith(b"\n"):
                    break
                whole_bytes += len(line)
                if result is None:
                    half_lines += 1
                elif result["response"] and not result["error"]:
                    answered.add((result["custom_id"], result["id"]))
        if not line.endswith(b"\n"):
            _mend_end(path, whole_bytes, is_whole=result is not None)
    except (ValueError, TypeError) as error:  # TypeError: a custom_id that is a list
        raise UsageError(f"{name} holds other things than results of batch: "
                         "give --results another file") from error
    except OSError as error:
        raise UsageError(f"cannot read and mend {name}: {os_reason(error)}") from error
    if half_lines:
        console.note(f"{name} has {plural(half_lines, 'half-written line')}: skipped")
    return answered

class Batch:
    """A run of batch: requests from a LineReader, results to a ResultWriter.

    *build* makes a BatchRequest of a number and a line.
    """

    def __init__(self, options, settings, console, build, reader, writer, progress):
        self.first_failure = None  # (number of the line, exit status)
        self.answered_before = set()  # (custom_id, id)
        self.prints_text = False  # the answers alone, in place of JSON lines
        self._options = options
        self._settings = settings
        self._console = console
        self._build = build
        self._reader = reader
        self._writer = writer
        self._progress = progress
        self._route = find_route(endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH))
        self._throttle = Throttle(options.concurrency)
        self._loop = None
        self._watches_input = False
        self._asked = {}  # Exchange -> BatchRequest
        self._again = []  # (monotonic time, number, BatchRequest) of those that are tried again
        self._stops_at = None  # monotonic time at which requests in flight are dropped
        self._started = time.monotonic()
        self._accepted = 0  # requests that get a result
        self._skipped = 0
        self._answered = 0
        self._failed = 0
        self._ended_early = []  # (number of the line, warning) of answers
        self._tokens_in = 0
        self._tokens_out = 0

    def run(self):
        """Ask everything; raise the KeyboardInterrupt or Terminated that ended it early.

        Whatever ends it, the results so far are written.
        """
        ending = None
        self._loop = RequestLoop(self._console.waiter)
        try:
            with contextlib.closing(self._loop):
                while not self._is_done():
                    try:
                        self._take_turn()
                    except (KeyboardInterrupt, Terminated) as interrupt:
                        self._take_interrupt(interrupt)
                        ending = ending or interrupt
        finally:
            self._write_rest()
        if ending:
            raise ending

    def _take_interrupt(self, interrupt):
        if self._stops_at is not None:
            self._stops_at = 0
        elif isinstance(interrupt, Terminated):
            self._stop_asking(signal.Signals(interrupt.args[0]).name + ": ", "Ctrl+C")
        else:
            self._stop_asking("", "another Ctrl+C")

    def _write_rest(self):
        filler = b""
        if self.prints_text:
            filler = b"\n"
        self._writer.release(filler)
        with contextlib.suppress(KeyboardInterrupt, Terminated):
            self._writer.flush()

    def summary(self):
        """Return one line: how many are answered, failed and skipped, how fast, and the tokens."""
        return ", ".join(self._counts() + self._tokens())

    def warning(self):
        """Return a sentence on the answers that may not be whole, or None where all are."""
        if not self._ended_early:
            return None
        number, reason = min(self._ended_early)
        count = plural(len(self._ended_early), "answer")
        return f"{count} ended early, first in line {number}: {reason}"

    def _counts(self):
        seconds = max(time.monotonic() - self._started, 0.001)
        parts = [f"{self._answered} answered", f"{self._failed} failed"]
        if self._ended_early:
            parts.append(f"{len(self._ended_early)} ended early")
        if self._skipped:
            parts.append(f"{self._skipped} answered before")
        if self._reader.blank_lines:
            parts.append(plural(self._reader.blank_lines, "blank line"))
        rate = (self._answered + self._failed) / seconds
        parts.append(f"{rate:.1f}/s")
        return parts

    def _tokens(self):
        return [f"{self._tokens_in} tokens in", f"{self._tokens_out} out"]

    def _describe(self):
        parts = self._counts()
        parts.append(f"{len(self._asked)} in flight")
        if self._reader.length and self._reader.received:
            seconds = time.monotonic() - self._started
            left = seconds * (self._reader.length / self._reader.received - 1)
            parts.append(f"about {max(0, left):.0f} s left")
        return ", ".join(parts + self._tokens())

    def _is_done(self):
        if self._stops_at is not None:
            return not self._asked or time.monotonic() >= self._stops_at
        return self._reader.is_exhausted() and not self._asked and not self._again

    def _take_turn(self):
        self._writer.flush()
        now = time.monotonic()
        if self._stops_at is None:
            self._launch(now)
        wake_at = now + PROGRESS_SECONDS
        events = [self._throttle.closed_until, self._stops_at or 0]
        if self._again:
            events.append(self._again[0][0])
        for at in events:
            if now < at < wake_at:
                wake_at = at
        for exchange in self._loop.turn(wake_at):
            self._take(exchange)
        self._progress.show(self._describe)

    def _stop_asking(self, cause, key):
        """Send no more requests; those in flight have some seconds, unless *key* is pressed."""
        self._again = []
        if self._stops_at is not None:
            return
        self._stops_at = time.monotonic() + GRACE_SECONDS
        if self._asked:
            self._progress.clear()
            count = plural(len(self._asked), "request")
            self._console.note(f"{cause}waiting up to {GRACE_SECONDS} s for {count} "
                               f"in flight; {key} drops them")

    # What is asked

    def _launch(self, now):
        while self._throttle.has_room(len(self._asked), now):
            request = self._next_request(now)
            if request is None:
                return
            exchange = Exchange(request.request, self._route, self._settings)
            self._asked[exchange] = request
            self._loop.start(exchange)

    def _next_request(self, now):
        """Return the BatchRequest to send next, or None if there is none at the time *now*."""
        if self._again and self._again[0][0] <= now:
            return self._again.pop(0)[2]
        self._watch_input(False)
        most = self._options.concurrency
        outstanding = len(self._asked) + len(self._again)
        while outstanding < most and self._stops_at is None:
            if outstanding + len(self._writer.held) >= MAX_BUFFERED_RESULTS_PER_CONNECTION * most:
                return None
            numbered = self._reader.next_line()
            if numbered is None:
                self._watch_input(not self._reader.is_exhausted())
                return None
            request = self._build(*numbered)
            if (request.custom_id, request.id) in self.answered_before:
                self._skipped += 1
                continue
            request.result_index = self._accepted
            self._accepted += 1
            if request.error is None:
                return request
            self._put(request, request.error, None)
        return None

    def _watch_input(self, on):
        if on == self._watches_input:
            return
        with contextlib.suppress(OSError, ValueError):  # a file, or not POSIX: it is always ready
            if on:
                self._loop.watch(self._reader.descriptor)
            else:
                self._loop.unwatch(self._reader.descriptor)
            self._watches_input = on

    # What comes back

    def _take(self, exchange):
        request = self._asked.pop(exchange)
        error = self._find_error(request, exchange)
        seconds = None
        if error is not None:
            seconds = self._delay_before_retry(request, error)
        if seconds is None:
            self._put(request, error, exchange)
            return
        now = time.monotonic()
        if isinstance(error, RateLimitError):
            self._throttle.note_refusal(exchange.sent_at, seconds, now)
        self._again.append((now + seconds, request.number, request))
        self._again.sort()

    def _find_error(self, request, exchange):
        error = exchange.find_error()
        if error is not None:
            return error
        text = exchange.reply.text
        try:
            if self.prints_text and not text.strip():
                raise ServerError("the model asked for a tool call: -o json shows it")
            if self._options.schema is not None and not request.has_own_format:
                check_json(text)
        except ServerError as failure:
            return failure
        return None

    def _delay_before_retry(self, request, error):
        """Return the seconds until *request* is tried again, or None where it has failed."""
        from random import random

        if not is_retryable_now(error) or self._stops_at is not None:
            return None
        tries = self._settings.retries
        if isinstance(error, RateLimitError):
            if self._answered > request.answered_at_last_429:  # the limit lets some through
                request.failures = 0
            request.answered_at_last_429 = self._answered
            if error.retry_after is not None:
                tries *= RATE_LIMIT_TRIES
        request.failures += 1
        if request.failures > tries:
            return None
        return retry_delay(request.failures, error.retry_after, random())

    def _put(self, request, error, exchange):
        try:
            line = self._result_line(request, error, exchange)
        except ServerError as failure:  # the reply is nested too deeply
            error = failure
            line = self._result_line(request, error, None)
        if error is None:
            self._count_answer(request.number, exchange.reply)
        else:
            self._failed += 1
            failure = request.number, error.exit_status
            self.first_failure = min(self.first_failure or failure, failure)
            if self._failed == self._options.max_failures:
                self._stop_asking(plural(self._failed, "failure") + ": ", "Ctrl+C")
        self._writer.add(request.result_index, (line + "\n").encode("utf-8", "replace"))

    def _result_line(self, request, error, exchange):
        if not self.prints_text:
            return json_text(build_result(request, error, exchange))
        if error is None:
            return re.sub(LINE_ENDS, _escape_in_json, exchange.reply.text)
        return ""

    def _count_answer(self, number, reply):
        self._throttle.note_answer()
        self._answered += 1
        self._tokens_in += reply.usage.prompt or 0
        self._tokens_out += reply.usage.completion or 0
        warning = finish_warning(reply)
        if warning:
            self._ended_early.append((number, warning))

@contextlib.contextmanager
def open_requests(path, waiter):
    """Yield a LineReader of the file *path*; '-' or None is standard input."""
    with contextlib.ExitStack() as stack:
        file = sys.stdin
        if path not in (None, "-"):
            try:  # in a thread: a pipe waits for its writer
                opening = functools.partial(open, path, "rb", buffering=0)
                file = stack.enter_context(waiter.run_in_thread(opening, None))
            except OSError as error:
                raise UsageError(
                    f"cannot read {utf8_argument(path)}: {os_reason(error)}") from error
        if file is None:
            raise UsageError("standard input is closed: give a FILE of requests")
        descriptor = file.fileno()
        yield LineReader(descriptor, os.fstat(descriptor).st_size)

@contextlib.contextmanager
def open_results(path, waiter):
    """Yield a descriptor that appends to the file *path*, which is made if missing and locked."""
    with contextlib.ExitStack() as stack:
        descriptor = stack.enter_context(open_for_append(path, waiter))
        if os.path.isfile(path) and not stack.enter_context(locked(path)):
            raise UsageError(f"another process writes to {utf8_argument(path)}")
        yield descriptor

def check_other_file(source, target):
    """Raise UsageError where the descriptors *source* and *target* are the same regular file."""
    import stat

    is_file = stat.S_ISREG(os.fstat(target).st_mode)
    if is_file and os.path.sameopenfile(source, target):
        raise UsageError("the requests are read from the file that the results go to")

def _show_requests(reader, build, settings, console):
    while not reader.is_exhausted():
        numbered = reader.next_line()
        if numbered is None:
            console.waiter.wait([reader.descriptor], seconds=PROGRESS_SECONDS)
            continue
        request = build(*numbered)
        if request.error:
            raise request.error
        send_dry_run(request.request, settings, console)

def run_batch(options, console):
    """Ask a question for each line of the input; return the exit status of the first failure."""
    prints_text = options.output in ("text", "table")
    if prints_text and options.results:
        raise UsageError("-o text goes to standard output: give --results or -o text, not both")
    load_schema(options)
    allow_connections(options.concurrency)
    with contextlib.ExitStack() as stack:
        settings = stack.enter_context(open_settings(options, console))
        build = functools.partial(parse_batch_line, sampling=build_sampling(options),
                                  settings=settings, system=system_prompt(options))
        reader = stack.enter_context(open_requests(options.file, console.waiter))
        if settings.dry_run:
            _show_requests(reader, build, settings, console)
            return EXIT_OK
        descriptor = None
        if not console.out.is_terminal and sys.stdout:
            descriptor = sys.stdout.fileno()
        if options.results:
            descriptor = stack.enter_context(open_results(options.results, console.waiter))
        if descriptor is not None:
            check_other_file(reader.descriptor, descriptor)
        progress = Progress(console)
        is_ordered = options.ordered or prints_text
        writer = ResultWriter(descriptor, is_ordered, console, progress)
        batch = Batch(options, settings, console, build, reader, writer, progress)
        batch.prints_text = prints_text
        if options.results and os.path.isfile(options.results):
            batch.answered_before = read_answered(options.results, console)
        try:
            batch.run()
        finally:
            progress.clear()
            if console.json:
                console.note(batch.summary())
            elif not console.quiet:
                console.print_line(batch.summary(), dim=True)
            warning = batch.warning()
            if warning:
                console.warn(warning)
    return batch.first_failure and batch.first_failure[1]

# -- Bench ------------------------------------------------------------------------------------

DEFAULT_CONCURRENCY = 4
DEFAULT_DURATION_SECONDS = 30
DEFAULT_PROMPT_TOKENS = 128
DEFAULT_BENCH_MAX_TOKENS = 128
GENERATED_PROMPTS = 32  # used round-robin
DRAIN_SECONDS = 30  # for requests in flight at the end of a run
BACKOFF_SECONDS = 1  # of a slot after a failure
FAILURES_TO_STOP = 20  # in a row
MAX_UNFINISHED = 1000  # with --rate
MAX_LAG_MS = 5  # at p99: over it the figures are not to be trusted
RESAMPLES = 2000
REPORT_COLUMNS = 80
MIN_COMPARED_MS = 0.01  # a median under this has no percentages
FIGURES_COLUMNS = 59  # of the table: all but endpoint and load
UNFINISHED = "unfinished"  # in place of an error, as NOT_SENT
NOT_SENT = "not sent"
BENCH_STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")
LAG_STATISTICS = ("p50", "p99", "max")
BENCH_RATES = {"tok/s": "output_tokens_per_second", "req/s": "requests_per_second"}
CONDITION = r"""(?x) \s*
    ( (?: ttft | tpot | itl | e2e | wait | connect )
        \. (?: mean | p50 | p90 | p95 | p99 | max | min )
      | lag\. (?: p50 | p99 | max ) | tok/s | req/s | ( errors | slo ) )
    \s* ( [<>]=? ) \s* ( \d+ (?: \.\d+ )? ) ( (?(2) %? ) ) \s* \Z"""  # % of errors or slo only
METRICS = ("ttft, tpot, itl, e2e, wait or connect with .mean .p50 .p90 .p95 .p99 .max or .min; "
           "lag.p50, lag.p99, lag.max, tok/s, req/s; errors or slo, also in %")
LOAD_OPTIONS = ("concurrency", "rate", "duration", "requests", "warmup", "prompt_tokens",
                "max_tokens", "cached", "seed", "no_keepalive", "model")  # that --save keeps
RUN_START = '{"run":"'  # of each line of --save
MAX_SAVED_NUMBER = 10 ** 15
SAVED_TEXTS = ("run", "endpoint", "load", "finish_reason", "error")
SAVED_OBJECTS = {"lag_ms": LAG_STATISTICS, "slo": ("ttft_ms", "tpot_ms")}
SAVED_OPTIONAL = ("slo", "wait_ms", "connect_ms", "ttft_ms", "e2e_ms", "input_tokens",
                  "cached_tokens", "finish_reason", "error")  # may be None
BENCH_WORDS = ("time river stone light quick green table seven paper north cloud music field "
               "early glass white train happy small bread ocean plain round sharp winter garden "
               "number letter doctor simple yellow market").split()
ERROR_HEADS = ("      TTFT ms          TPOT ms     E2E s    output",
               "    p50    p95    p50    p95    p95   tok/s  req/s   errors")
SLO_HEADS = ("      TTFT ms          TPOT ms     E2E s    output   within",
             "    p50    p95    p50    p95    p95   tok/s  req/s  targets")
TABLE_TIMES = (("ttft_ms", "p50", 1), ("ttft_ms", "p95", 1), ("tpot_ms", "p50", 1),
               ("tpot_ms", "p95", 1), ("e2e_ms", "p95", 2))  # with their decimals
BENCH_TIMES = {"ttft_ms": "TTFT ms", "tpot_ms": "TPOT ms", "itl_ms": "ITL ms",
               "e2e_ms": "E2E s", "wait_ms": "wait ms", "connect_ms": "connect ms"}
BLOCKS = " ▁▂▃▄▅▆▇█"
ASCII_BLOCKS = " .:-=+*#"

class BenchRequest(namedtuple("BenchRequest", [
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
])):
    """One request of a run; times in milliseconds."""
    __slots__ = ()

    @property
    def chunks(self):
        """The number of chunks with text or reasoning."""
        if self.ttft_ms is None:
            return 0
        return len(self.itl_ms) + 1

    @property
    def tpot_ms(self):
        """The time from the first chunk to the last, for each token after the first chunk."""
        if self.chunks < 2 or not self.output_tokens:
            return None
        later_tokens = self.output_tokens * (self.chunks - 1) / self.chunks
        return sum(self.itl_ms) / later_tokens

BenchRun = namedtuple("BenchRun", [
    "run",
    "load",
    "began",      # seconds since 1970
    "window_ms",  # [end of the ramp, last launch] since then
    "slo",        # None, or {"ttft_ms", "tpot_ms"}
    "lag_ms",     # how late the loop was: {"p50", "p99", "max"}
    "version",
    "options",    # LOAD_OPTIONS and their values
    "requests",   # list of BenchRequest
])

Condition = namedtuple("Condition", "text metric sign limit")  # of --fail-if

# What the options say

def _parse_numbers(text, convert, words):
    try:
        values = [convert(part) for part in text.split(",")]
    except ValueError:
        values = [0]
    if not all(0.001 <= value <= 10000 for value in values):  # False for nan
        raise argparse.ArgumentTypeError(f"must be {words}, or several with commas")
    return values

def parse_concurrencies(text):
    """Return the whole numbers of "N[,N...]" (for argparse's type=)."""
    return _parse_numbers(text, int, "a whole number from 1 to 10000")

def parse_rates(text):
    """Return the numbers of "R[,R...]" (for argparse's type=)."""
    return _parse_numbers(text, float, "a number from 0.001 to 10000")

def parse_condition(text):
    """Return the Condition in *text*, such as "ttft.p95>800" (for argparse's type=)."""
    match = re.match(CONDITION, text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"must be METRIC>NUMBER or METRIC<NUMBER, with a metric of {METRICS}")
    metric, _, sign, limit, percent = match.groups()
    return Condition(text, metric + percent, sign, float(limit))

def metric_value(metric, result, lag_ms=None):
    """Return what --fail-if calls *metric*, or None where it is unknown; times are in ms."""
    name, _, statistic = metric.partition(".")
    if name == "lag":
        return lag_ms[statistic]
    if statistic:
        return result[name + "_ms"][statistic]
    if metric in BENCH_RATES:
        return result[BENCH_RATES[metric]]
    count = sum(result["errors"].values())
    total = count + result["ok"]
    if name.startswith("slo"):
        if not result["slo"]:
            return None
        count = result["slo"]["met"]
        total = result["slo"]["of"]
    if not name.endswith("%"):
        return count
    if total:
        return 100 * count / total
    return None

def condition_holds(condition, value):
    """Return whether *condition* holds for the *value* of its metric, or False for None."""
    if value is None:
        return False
    if value == condition.limit:
        return "=" in condition.sign
    return (value < condition.limit) == ("<" in condition.sign)

# Arithmetic

def overlap(begin, end, other_begin, other_end):
    """Return the length that two spans have in common."""
    return max(0, min(end, other_end) - max(begin, other_begin))

def window_rates(requests, begin, end, chunk_tokens, usual_ms):
    """Return the (tokens, requests) per second from *begin* to *end*, in ms.

    A token counts where its chunk falls, a request by the share of its time.  An unfinished one
    counts as if its chunks held *chunk_tokens*, and as if it took *usual_ms* in all.
    """
    tokens = share = 0
    for request in requests:
        if request.error not in (None, UNFINISHED) or request.ttft_ms is None:
            continue
        at = request.start_ms + request.ttft_ms
        hits = int(begin <= at <= end)
        for gap in request.itl_ms:
            at += gap
            hits += int(begin <= at <= end)
        whole_ms = max(at - request.start_ms, 0.001)
        if request.error is None:
            tokens += hits * request.output_tokens / request.chunks
        else:
            tokens += hits * chunk_tokens
            whole_ms = max(whole_ms, usual_ms)
        share += overlap(request.start_ms, at, begin, end) / whole_ms
    seconds = (end - begin) / 1000
    return tokens / seconds, share / seconds

def run_window(run, requests):
    """Return the window of *run* in ms.

    An endpoint that had all its requests before the others has an end of its own.  If all
    requests started during the ramp, the window is from the first start to the last end.
    """
    begin, end = run.window_ms
    wanted = (run.options or {}).get("requests")
    if wanted and len(requests) >= wanted:
        end = min(end, max(request.start_ms for request in requests))
    if end <= begin:
        for request in requests:
            begin = min(begin, request.start_ms)
            end = max(end, request.start_ms + (request.e2e_ms or 0))
    return begin, end

def merge_rates(spans):
    """Return (tokens per second, requests per second, seconds, number of groups) of *spans*.

    Each is (begin, end, tokens per second, requests per second) of one run, in seconds.  Runs that
    overlap by half are a group, whose rates are summed; groups are averaged.
    """
    groups = []  # (begin, end) of the first run of each
    tokens = requests = seconds = 0
    for begin, end, token_rate, request_rate in sorted(spans):
        tokens += token_rate
        requests += request_rate
        for other_begin, other_end in groups:
            shorter = min(end - begin, other_end - other_begin)
            if overlap(begin, end, other_begin, other_end) >= shorter / 2:
                break
        else:
            groups.append((begin, end))
            seconds += end - begin
    if not groups:
        return None, None, 0, 0
    return tokens / len(groups), requests / len(groups), seconds, len(groups)

class BenchSet:
    """The requests of one endpoint at one load, from one run or from several."""

    def __init__(self, endpoint, load, runs):
        self.endpoint = endpoint
        self.load = load
        self.runs = []  # that asked this endpoint, with the requests to it alone
        self.requests = []
        for run in runs:
            requests = [one for one in run.requests if one.endpoint == endpoint]
            if requests and run.load == load:
                self.runs.append(run._replace(requests=requests))
                self.requests += requests
        self.slo = self.runs[0].slo
        self.has_same_targets = all(run.slo == self.slo for run in self.runs)
        if not self.has_same_targets:
            self.slo = None
        self.good = [one for one in self.requests if one.error is None]
        output = sum(self.values("output_tokens"))
        chunks = sum(self.values("chunks"))
        self.output_tokens = output
        self.tokens_per_chunk = None
        if chunks:
            self.tokens_per_chunk = output / chunks
        rates = self._rates()
        # Runs that overlap are one group; *groups* is how many there are.
        self.token_rate, self.request_rate, self.seconds, self.groups = rates

    def values(self, name):
        """Return the known values of an attribute of the requests that ended well."""
        values = [getattr(request, name) for request in self.good]
        if name == "itl_ms":
            values = itertools.chain(*values)
        return [value for value in values if value is not None]

    def result(self):
        """Return the result as -o json has it."""
        errors = [request.error for request in self.requests]
        failures = [error for error in errors if error not in (None, UNFINISHED, NOT_SENT)]
        counted = self.good or [one for one in self.requests if one.output_tokens]
        result = {
            "endpoint": self.endpoint,
            "load": self.load,
            "requests": len(errors) - errors.count(NOT_SENT),
            "ok": len(self.good),
            "unfinished": errors.count(UNFINISHED),
            "not_sent": errors.count(NOT_SENT),
            "errors": {name: failures.count(name) for name in sorted(set(failures))},
            "seconds": self.seconds,
        }
        for name in BENCH_TIMES:
            result[name] = summary(self.values(name))
        result.update(
            output_tokens_per_second=self.token_rate,
            requests_per_second=self.request_rate,
            input_tokens=sum(self.values("input_tokens")),
            output_tokens=self.output_tokens,
            cached_tokens=sum(self.values("cached_tokens")),
            exact=all(request.exact for request in counted),
            tokens_per_chunk=self.tokens_per_chunk,
            slo=self._count_targets(),
        )
        return result

    def _rates(self):
        chunk_tokens = self.tokens_per_chunk or 1
        ends = self.values("e2e_ms")
        usual_ms = sum(ends) / max(1, len(ends))
        spans = []
        for run in self.runs:
            begin, end = run_window(run, run.requests)
            if end > begin:
                rates = window_rates(run.requests, begin, end, chunk_tokens, usual_ms)
                began = run.began + begin / 1000
                ended = run.began + end / 1000
                spans.append((began, ended, *rates))
        return merge_rates(spans)

    def _count_targets(self):
        slo = self.slo
        if not slo:
            return None
        met = ended = 0
        for request in self.requests:
            missed = [name for name, target in slo.items()
                      if target and (getattr(request, name) or 0) > target]
            has_text = request.ttft_ms is not None
            ended += request.error not in (UNFINISHED, NOT_SENT)
            met += request.error is None and has_text and not missed
        return dict(slo, met=met, of=ended)

    def notes(self, result):
        """Return sentences on what a reader of *result* may not expect."""
        notes = []
        if 1 < result["ok"] < 100:
            notes.append(f"p99 of {result['ok']} requests is little more than their slowest one")
        per_chunk = result["tokens_per_chunk"] or 1
        if not result["exact"]:
            notes.append("the server sent no token counts: ~ marks counts of chunks")
        elif abs(per_chunk - 1) > 0.05:
            notes.append(f"ITL is by chunk, and a chunk holds {per_chunk:.1f} tokens")
        textless = len(self.good) - len(self.values("ttft_ms"))
        if textless:
            notes.append(f"not in the figures: {plural(textless, 'answer')} without text")
        if not self.has_same_targets:
            notes.append("the runs had different targets: none is counted")
        if self.groups > 1:
            notes.append(f"rates are averages of {self.groups} runs, one after the other")
        return notes

def _draw_median(ordered, random):
    """Return the median of as many values drawn from *ordered*: its rank is Beta distributed."""
    count = len(ordered)
    middle = count // 2 + 1
    rank = random.betavariate(middle, count - middle + 1)
    return ordered[min(int(rank * count), count - 1)]

def compare_medians(values, others, random):
    """Return by how many percent the median of *values* is above that of *others*: (it, low, high).

    The bounds hold 95 % of what resampling both gives (bootstrap).
    """
    values = sorted(values)
    others = sorted(others)
    pairs = [(percentile(values, 50), percentile(others, 50))]
    for _ in range(RESAMPLES):
        pairs.append((_draw_median(values, random), _draw_median(others, random)))
    changes = []
    for value, other in pairs:
        changes.append(100 * (value / max(other, 1e-9) - 1))
    change = changes.pop(0)
    changes.sort()
    return change, percentile(changes, 2.5), percentile(changes, 97.5)

# Saved runs

def read_finite(path):
    """Return the bytes of the file or pipe *path*; raise UsageError for a device or a folder."""
    import stat

    with contextlib.suppress(OSError):  # read_file() tells it
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISFIFO(mode):
            raise UsageError(f"cannot read {utf8_argument(path)}: it is neither a file nor a pipe")
    return read_file(path)

def save_lines(run):
    """Return the text that saves a BenchRun: a line of JSON for its head, and one a request."""
    head = run._asdict()
    del head["requests"]
    lines = [json_text(head)]
    for request in run.requests:
        lines.append(json_text(request._asdict()))
    return "\n".join(lines) + "\n"

def _is_saved_number(value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= MAX_SAVED_NUMBER

def _is_saved_value(name, value):
    """Return whether save_lines() writes such a *value* in the field *name*."""
    if value is None and name in SAVED_OPTIONAL or name in ("version", "options"):
        return True
    if name in SAVED_TEXTS:
        return isinstance(value, str)
    if name == "exact":
        return isinstance(value, bool)
    numbers = [value]
    if name in ("itl_ms", "window_ms"):
        numbers = value
        if not isinstance(value, list) or name == "window_ms" and len(value) != 2:
            return False
    elif name in SAVED_OBJECTS:
        if not isinstance(value, dict) or set(value) != set(SAVED_OBJECTS[name]):
            return False
        numbers = list(value.values())
        if name == "slo":  # one target may be missing
            numbers = filter(None, numbers)
    return all(map(_is_saved_number, numbers))

def _add_saved_line(line, runs):
    """Add what *line* holds to *runs*, id -> BenchRun; raise ValueError, LookupError, TypeError."""
    fields = parse_json(line)
    for name, value in fields.items():
        if not _is_saved_value(name, value):
            raise ValueError(name)
    name = fields["run"]
    if "began" in fields:
        runs[name] = BenchRun(requests=[], **fields)
        return
    if fields["load"] != runs[name].load:
        raise ValueError("load")
    runs[name].requests.append(BenchRequest(**fields))

def parse_saved_runs(text, path):
    """Return the BenchRuns that *text*, read from *path*, holds.

    Raise UsageError for any other text.  A last line that is half written is left out.
    """
    runs = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if not line:
            continue
        try:
            _add_saved_line(line, runs)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"line {number} of {path} is not one of bench --save") from error
    return list(runs.values())

def mend_saved_runs(path):
    """Cut off a half-written line at the end of the file *path*, to which runs are to be added.

    Raise UsageError for a file of something else, which stays as it is.
    """
    shown = utf8_argument(path)
    data = read_finite(path)
    whole, _, rest = data.rpartition(b"\n")
    text, _ = decode_text(whole + b"\n")
    parse_saved_runs(text, shown)
    if not rest:
        return
    start = RUN_START.encode("ascii")
    if not rest.startswith(start) and not (whole and start.startswith(rest)):
        raise UsageError(f"the last line of {shown} is not one of bench --save")
    try:
        _mend_end(path, len(data) - len(rest), is_whole=False)
    except OSError as error:
        raise UsageError(f"cannot mend {shown}: {os_reason(error)}") from error

# A run

class BenchTarget:
    """An endpoint that a run asks: its prompts, its slots or arrivals, and what came of it."""

    def __init__(self, settings, sampling, prompts, options):
        self.endpoint = settings.endpoint
        self.wanted = options.requests or float("inf")
        self._settings = settings
        self._route = find_route(endpoint_url(settings.base_url, settings.endpoint, CHAT_PATH))
        self.sampling = sampling._replace(fields=dict(sampling.fields))  # for this endpoint
        self._prompts = prompts
        self._options = options
        self.restart([])

    def restart(self, free_at):
        """Begin a run, with the same prompts and arrivals as each."""
        from random import Random

        self.free_at = free_at  # monotonic times at which a slot is free, or of the next arrival
        self.arrivals = Random(self._options.seed)
        self.sent = 0
        self.in_flight = 0
        self.failures = 0  # in a row
        self.good = self.good_tokens = 0  # requests that ended well, and their output
        self.requests = []  # BenchRequest, those that ended

    def build_exchange(self):
        """Return the Exchange for the next prompt."""
        prompt = self._prompts[self.sent % len(self._prompts)]
        if not self._options.cached:
            prompt = f"{os.urandom(4).hex()} {prompt}"
        messages = [{"role": "user", "content": prompt}]
        if self._options.system is not None:
            messages.insert(0, {"role": "system", "content": self._options.system})
        request = build_chat_request(self.sampling, self._settings, messages, True)
        self.sent += 1
        return Exchange(request, self._route, self._settings)

def find_failure(exchange):
    """Return the error of an ended exchange, or None.  Reasoning alone is no failure here."""
    error = exchange.find_error()
    if exchange.error is None and isinstance(error, ServerError) and exchange.arrivals:
        return None
    return error

def milliseconds(since, at):
    """Return the milliseconds from one monotonic time to another, or None if one is None."""
    if since is None or at is None:
        return None
    return round(1000 * (at - since), 3)

def gaps_between(arrivals):
    """Return the milliseconds from each chunk to the next; those of one read came together."""
    gaps = []
    last = None
    for at, count in arrivals:
        if last is not None:
            gaps.append(milliseconds(last, at))
        gaps += [0.0] * (count - 1)
        last = at
    return gaps

class BenchRunner:
    """Runs one load against all targets at the same time, on the RequestLoop *loop*.

    The load is ("c", number of slots) or ("rate", requests a second).
    """

    def __init__(self, loop, targets, load, options, progress):
        self.stopped = False  # by too many failures
        self.interrupt = None  # KeyboardInterrupt or Terminated
        self._loop = loop
        self._targets = targets
        self._kind, self._amount = load
        self._load = f"{self._kind}={self._amount:.12g}"
        self._options = options
        self._progress = progress
        self._run = os.urandom(6).hex()
        self._owners = {}  # Exchange -> BenchTarget
        self._began = self._last_launch = self._stops_at = time.monotonic()
        self._ramp = min(1, (options.duration or 10) / 10)
        self._slo = None
        if options.slo_ttft is not None or options.slo_tpot is not None:
            self._slo = {"ttft_ms": options.slo_ttft, "tpot_ms": options.slo_tpot}

    def measure(self):
        """Return the BenchRun; *interrupt* is the signal that ended it early, or None."""
        import gc

        gc.collect()
        gc.disable()
        began = time.time()
        self._began = time.monotonic()
        self._stops_at = self._began + (self._options.duration or float("inf"))
        self._loop.start_lag_sampling()
        first_launches = [self._began]
        if self._kind == "c":
            step = self._ramp / self._amount
            first_launches = [self._began + step * slot for slot in range(self._amount)]
        for target in self._targets:
            target.restart(list(first_launches))
        try:
            self._work()
        except (KeyboardInterrupt, Terminated) as error:
            self.interrupt = error
            if self._targets_to_ask(time.monotonic()):
                self._last_launch = time.monotonic()
        finally:
            gc.enable()
        if self._owners:
            self._loop.drop_all()
        for exchange, target in self._owners.items():
            self._keep(exchange, target, UNFINISHED)
        lags = summary([milliseconds(0, lag) for lag in self._loop.lags])
        return BenchRun(
            run=self._run,
            load=self._load,
            began=began,
            window_ms=[1000 * self._ramp, milliseconds(self._began, self._last_launch)],
            slo=self._slo,
            lag_ms={name: lags[name] or 0 for name in LAG_STATISTICS},
            version=__version__,
            options={name: getattr(self._options, name) for name in LOAD_OPTIONS},
            requests=list(itertools.chain(*[target.requests for target in self._targets])),
        )

    def _targets_to_ask(self, now):
        """Return the targets that still get requests at the time *now*."""
        if now >= self._stops_at or self.stopped:
            return []
        return [target for target in self._targets if target.sent < target.wanted]

    def _work(self):
        while True:
            now = time.monotonic()
            more = self._targets_to_ask(now)
            if not more and (not self._owners or now >= self._stops_at + DRAIN_SECONDS):
                return
            wake_at = now + PROGRESS_SECONDS
            for target in more:
                wake_at = min(wake_at, self._launch(target, now))
            for exchange in self._loop.turn(wake_at):
                self._take(exchange)
            self._progress.show(self._describe)

    def _launch(self, target, now):
        """Start what is due, and return when the next one is."""
        while target.free_at and target.sent < target.wanted:
            due = min(target.free_at)
            if due > now:
                return due
            target.free_at.remove(due)
            exchange = target.build_exchange()
            exchange.due = due
            if self._kind == "rate":
                exchange.is_scheduled = True
                target.free_at.append(due + target.arrivals.expovariate(self._amount))
                if target.in_flight >= MAX_UNFINISHED:
                    self._keep(exchange, target, NOT_SENT)
                    continue
            target.in_flight += 1
            self._owners[exchange] = target
            self._last_launch = now
            self._loop.start(exchange)
        return float("inf")

    def _take(self, exchange):
        now = time.monotonic()
        target = self._owners.pop(exchange)
        target.in_flight -= 1
        error = find_failure(exchange)
        name = None
        backoff = 0
        if error is None:
            target.failures = 0
        else:
            target.failures += 1
            self.stopped = self.stopped or target.failures >= FAILURES_TO_STOP
            name = error.kind
            if error.status:
                name += f" (HTTP {error.status})"
            backoff = BACKOFF_SECONDS
            if error.retry_after is not None:
                backoff = min(error.retry_after, MAX_RETRY_DELAY_SECONDS)
        self._keep(exchange, target, name)
        if self._kind == "c":
            target.free_at.append(now + backoff)

    def _keep(self, exchange, target, error):
        reply = exchange.reply
        due = exchange.due
        output = reply.usage.completion
        if output is None:
            output = reply.deltas
        if error is None:
            target.good += 1
            target.good_tokens += output
        target.requests.append(BenchRequest(
            run=self._run,
            endpoint=target.endpoint,
            load=self._load,
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
            error=error,
        ))

    def _describe(self):
        seconds = time.monotonic() - self._began
        elapsed = f"{seconds:.0f}"
        if self._options.duration:
            elapsed += f" of {self._options.duration:g}"
        parts = []
        for target in self._targets:
            failed = len(target.requests) - target.good
            rate = target.good_tokens / seconds
            parts.append(
                "{} {} {} s: {} done, {} in flight, {} failed, {:.0f} tok/s".format(
                    target.endpoint,
                    self._load,
                    elapsed,
                    target.good,
                    target.in_flight,
                    failed,
                    rate,
                ))
        return "; ".join(parts)

def warm_up(loop, target, count):
    """Send *count* requests to *target*, one after the other; raise the error of one that fails."""
    while target.sent < count:
        loop.start(target.build_exchange())
        finished = []
        while not finished:
            finished = loop.turn(time.monotonic() + PROGRESS_SECONDS)
        error = find_failure(finished[0])
        if error is None:
            continue
        if not refuses_stream_options(error) or "stream_options" in target.sampling.fields:
            raise error
        target.sampling.fields["stream_options"] = None  # then it is not sent
        target.sent -= 1

# The report

def condition_values(condition, results, lag_ms):
    """Return what *condition* looks at: a value, or None, for each of *results*."""
    return [metric_value(condition.metric, result, lag_ms) for result in results]

def build_bench_document(sets, conditions, interrupted):
    """Return what -o json prints on the BenchSets *sets*; the lag is that of the worst run."""
    results = [bench_set.result() for bench_set in sets]
    lag_ms = dict.fromkeys(LAG_STATISTICS, 0)
    for run in itertools.chain(*[bench_set.runs for bench_set in sets]):
        for name in lag_ms:
            lag_ms[name] = max(lag_ms[name], run.lag_ms[name])
    failed = []
    for condition in conditions:
        values = condition_values(condition, results, lag_ms)
        if any(condition_holds(condition, value) for value in values):
            failed.append(condition.text)
    return {
        "client": {"lag_ms": lag_ms, "trusted": lag_ms["p99"] <= MAX_LAG_MS},
        "interrupted": interrupted,
        "failed_conditions": failed,
        "results": results,
    }

def format_number(value, decimals, columns):
    """Return *value* right-aligned in *columns*, with fewer decimals if need be; "-" for None."""
    if value is None:
        return "-".rjust(columns)
    text = f"{value:.{decimals}f}"
    while len(text) >= columns and decimals:
        decimals -= 1
        text = f"{value:.{decimals}f}"
    return text.rjust(columns)

def mark_inexact(cell, result):
    """Return *cell* with a ~ if the output tokens behind it are counts of chunks."""
    if result["exact"]:
        return cell
    return ("~" + cell.lstrip()).rjust(len(cell))

def _time_cell(result, name, statistic, decimals, columns):
    value = result[name][statistic]
    if value is not None and name == "e2e_ms":
        value /= 1000
    cell = format_number(value, decimals, columns)
    if value is not None and name == "tpot_ms":
        return mark_inexact(cell, result)
    return cell

def _row_figures(result, styled):
    line = ""
    for name, statistic, decimals in TABLE_TIMES:
        line += _time_cell(result, name, statistic, decimals, 7)
    rate = format_number(result["output_tokens_per_second"], 1, 7)
    line += mark_inexact(rate.rjust(8), result) + format_number(result["requests_per_second"], 2, 7)
    if not result["slo"]:
        return line + format_number(metric_value("errors", result), 0, 9)
    share = metric_value("slo%", result)
    if share is None:
        return line + format_number(share, 0, 9)
    cell = format_number(share, 1, 7) + " %"
    if styled and share < 100:
        cell = RED + cell + RESET
    return line + cell

def report_table(results, styled):
    """Return the lines of the table of *results*, with styles for a terminal if asked for."""
    above, below = ERROR_HEADS
    if any(result["slo"] for result in results):
        above, below = SLO_HEADS
    rows = [("", "", above), ("endpoint", "load", below)]
    for result in results:
        name = one_line(result["endpoint"])
        load = one_line(result["load"])
        rows.append((name, load, _row_figures(result, styled)))
    names, loads, _ = zip(*rows)
    load_width = max(map(len, loads)) + 2
    room = REPORT_COLUMNS - FIGURES_COLUMNS - load_width
    width = min(room, max(map(display_width, names)) + 1)
    lines = []
    for name, load, figures in rows:
        name = truncate_middle(name, width - 1)
        blanks = " " * (width - display_width(name))
        lines.append(name + blanks + load.ljust(load_width) + figures)
    if styled:
        lines[:2] = [BOLD + line + RESET for line in lines[:2]]
    return lines

def detail_lines(result):
    """Return the lines that tell the figures of one result in full."""
    head = [name.rjust(9) for name in BENCH_STATISTICS]
    lines = [" " * 12 + "".join(head)]
    for name, label in BENCH_TIMES.items():
        if result[name]["n"]:
            cells = [_time_cell(result, name, one, 2, 9) for one in BENCH_STATISTICS]
            lines.append(label.ljust(12) + "".join(cells))
    return lines

def histogram_line(values, blocks, columns):
    """Return how *values*, in ms, are spread, in *columns*; *blocks* are bars of growing height."""
    low = min(values)
    high = max(values)
    before = f"TTFT: {low:.0f} ms |"
    after = f"| {high:.0f} ms"
    counts = [0] * (columns - len(before) - len(after))
    step = max(high - low, 0.001) / len(counts)
    for value in values:
        index = int((value - low) / step)
        counts[min(index, len(counts) - 1)] += 1
    line = before
    for count in counts:
        height = count * (len(blocks) - 1) / max(counts)
        line += blocks[int(height + 0.999)]  # not nothing for a few
    return line + after

def total_line(result):
    """Return one line: how many requests were done, their tokens, and what went wrong."""
    mark = ""
    if not result["exact"]:
        mark = "~"
    line = ("{ok} of {requests} done in {seconds:.1f} s, "
            "{input_tokens} tokens in, {mark}{output_tokens} out").format(mark=mark, **result)
    if result["cached_tokens"]:
        line += ", {cached_tokens} cached".format(**result)
    for name, count in result["errors"].items():
        line += f"; {count} x {name}"
    if result["unfinished"]:
        line += "; {unfinished} unfinished".format(**result)
    if result["not_sent"]:
        line += "; {not_sent} not sent".format(**result)
    return line

def comparison_lines(bench_set, other):
    """Return lines on how much slower *bench_set* was than *other*, or none without figures."""
    from random import Random
    from textwrap import wrap

    parts = []
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        values = bench_set.values(name)
        others = other.values(name)
        if values and others and percentile(sorted(others), 50) > MIN_COMPARED_MS:
            label, _ = BENCH_TIMES[name].split()
            changes = compare_medians(values, others, Random(0))
            change, low, high = map(round, changes)
            parts.append(f"{label} p50 {change:+} % ({low:+} to {high:+})")
    if not parts:
        return []
    names = one_line(f"{bench_set.endpoint} against {other.endpoint}")
    return wrap(f"{names}: {', '.join(parts)}", REPORT_COLUMNS, subsequent_indent="    ",
                break_on_hyphens=False)

def report_lines(document, sets, output):
    """Return the lines of the report for the Output *output*."""
    results = document["results"]
    lines = report_table(results, output.styled) + [""]
    first_times = sets[0].values("ttft_ms")
    if len(sets) == 1 and first_times:
        blocks = BLOCKS
        if not output.can_show(blocks):
            blocks = ASCII_BLOCKS
        lines += detail_lines(results[0]) + [""]
        lines.append(histogram_line(first_times, blocks, REPORT_COLUMNS))
    first_of = {}  # load -> BenchSet
    for bench_set, result in zip(sets, results):
        label = ""
        if len(sets) > 1:
            label = f"{bench_set.endpoint} {bench_set.load}: "
        lines.append(one_line(label + total_line(result)))
        lines += ["note: " + note for note in bench_set.notes(result)]
        first = first_of.setdefault(bench_set.load, bench_set)
        if bench_set is not first:
            lines += comparison_lines(bench_set, first)
    lag_ms = document["client"]["lag_ms"]
    lines.append("client: woken {p50:.1f} ms late (p50), {p99:.1f} ms (p99)".format(**lag_ms))
    if not document["client"]["trusted"]:
        lines.append("NOT TRUSTWORTHY: this machine was too busy to measure with")
    lines += ["failed: " + text for text in document["failed_conditions"]]
    return lines

# The command

def read_prompts(options, console):
    """Return the prompts in the file of --prompts, one a line, or generated ones."""
    from random import Random

    prompts = []
    path = options.prompts
    if path is None:
        random = Random(options.seed)
        for _ in range(GENERATED_PROMPTS):
            console.waiter.check()
            words = random.choices(BENCH_WORDS, k=options.prompt_tokens or DEFAULT_PROMPT_TOKENS)
            prompts.append(" ".join(words))
        return prompts
    if path == "-":
        data = console.read_stdin() or b""
    else:
        data = read_finite(path)
    lines = decode_prompt(data, path).split("\n")
    prompts = [line for line in lines if line.strip()]
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
    if len(set(options.endpoints)) < len(options.endpoints):
        raise UsageError("an endpoint is given twice")
    has_targets = options.report or options.slo_ttft is not None or options.slo_tpot is not None
    for condition in options.fail_if:
        if condition.metric.startswith("slo") and not has_targets:
            raise UsageError(f"--fail-if {condition.text} needs --slo-ttft or --slo-tpot")

def build_targets(options, settings, console):
    """Return the BenchTargets that *options* name."""
    endpoints = options.endpoints or [settings.endpoint]
    if endpoints == [None]:
        raise UsageError("no endpoint: give --endpoint SLUG, or --demo to try without one")
    sampling = build_sampling(options)
    if not any(name == "seed" for name, _ in options.param):
        sampling.fields.pop("seed", None)  # --seed is that of the prompts
    if "max_completion_tokens" not in sampling.fields:
        sampling.fields.setdefault("max_tokens", DEFAULT_BENCH_MAX_TOKENS)
    prompts = read_prompts(options, console)
    targets = []
    for endpoint in endpoints:
        check_endpoint(endpoint, settings.base_url, "--endpoint")
        settings = settings._replace(endpoint=endpoint)
        targets.append(BenchTarget(settings, sampling, prompts, options))
    return targets

def describe_bound(options, loads, most_tokens):
    """Return one line: what is going to be sent, and for how long."""
    limits = []
    if options.duration:
        limits.append(f"{options.duration:g} s")
    if options.requests:
        limits.append(plural(options.requests, "request"))
    until = " or ".join(limits)
    units = {"c": "in flight", "rate": "a second"}
    parts = [f"at each endpoint: {options.warmup} to warm up"]
    for kind, amount in loads:
        parts.append(f"then {amount:g} {units[kind]} for {until}")
    tokens = "no limit of tokens"
    if most_tokens is not None:
        tokens = f"{most_tokens} tokens at most"
    return ", ".join(parts) + "; " + tokens

class RunSaver:
    """Appends BenchRuns to the file *path*; '-' is standard output, None saves nothing.

    A failure is told and ends no run; nothing is saved after it.
    """

    def __init__(self, path, console):
        self.has_failed = False
        self._path = path
        self._console = console
        self._stack = contextlib.ExitStack()
        self._descriptor = None

    def __enter__(self):
        if self._path in (None, "-"):
            return self
        if os.path.isfile(self._path):
            mend_saved_runs(self._path)
        opening = open_for_append(self._path, self._console.waiter)
        self._descriptor = self._stack.enter_context(opening)
        return self

    def __exit__(self, *error):
        self._stack.close()

    def save(self, run):
        """Append *run*, unless an earlier one failed."""
        if self._path == "-":
            self._console.write(save_lines(run))
        elif self._descriptor is not None and not self.has_failed:
            self._append(memoryview(save_lines(run).encode("utf-8", "replace")))

    def _append(self, rest):
        try:
            if os.path.isfile(self._path):
                while rest:  # whole, as a rule: another process may append too
                    rest = rest[os.write(self._descriptor, rest):]
            while rest:
                rest = write_piece(self._descriptor, rest, self._console.waiter)
        except OSError as error:
            message = f"cannot write {utf8_argument(self._path)}: {os_reason(error)}"
            self._console.print_error(OutputError(message))
            self.has_failed = True

def measure_loads(options, targets, loads, saver, console):
    """Return the BenchRuns of *loads*, one after the other, and the signal that ended them.

    Each is handed to the RunSaver *saver*.
    """
    runs = []
    progress = Progress(console)
    with contextlib.closing(RequestLoop(console.waiter, not options.no_keepalive)) as loop:
        for target in targets:
            warm_up(loop, target, options.warmup)
        for load in loads:
            runner = BenchRunner(loop, targets, load, options, progress)
            runs.append(runner.measure())
            progress.clear()
            saver.save(runs[-1])
            if runner.stopped:
                console.warn(f"the run was stopped after {FAILURES_TO_STOP} failures in a row")
            if runner.interrupt or runner.stopped:
                break
    return runs, runner.interrupt

def status_of(results):
    """Return the exit status: 0 if a request ended well, else that of the most frequent error."""
    counts = {}
    for result in results:
        if result["ok"]:
            return EXIT_OK
        for name, count in result["errors"].items():
            counts[name] = counts.get(name, 0) + count
    most_frequent = max(counts, key=counts.get, default="")
    kind = most_frequent.partition(" ")[0]
    statuses = {one.kind: one.exit_status for one in XeroctlError.__subclasses__()}
    return statuses.get(kind, EXIT_FAILURE)

def show_runs(options, runs, interrupt, console):
    """Show the report on *runs*; return the exit status."""
    requests = itertools.chain(*[run.requests for run in runs])
    names = dict.fromkeys((one.endpoint, one.load) for one in requests)  # in their order
    sets = [BenchSet(endpoint, load, runs) for endpoint, load in names]
    document = build_bench_document(sets, options.fail_if, interrupt is not None)
    for condition in options.fail_if:
        lag_ms = document["client"]["lag_ms"]
        values = condition_values(condition, document["results"], lag_ms)
        if set(values) <= {None}:
            console.warn(f"--fail-if {condition.text}: there is no such figure")
    if console.json:
        console.write(json_text(document) + "\n")
    elif sets and options.save != "-":
        lines = report_lines(document, sets, console.out)
        if options.demo:
            lines.append("note: practice: --demo runs in this process, so the figures mean nothing")
        console.write_styled("\n".join(lines) + "\n")
    if document["failed_conditions"]:
        return EXIT_CONDITION
    return status_of(document["results"])

def show_saved_runs(options, console):
    """Show the report on the files of --report; return the exit status."""
    console.json = options.output == "json"
    runs_by_id = {}
    for path in options.report:
        text, _ = decode_text(read_finite(path))
        for run in parse_saved_runs(text, utf8_argument(path)):
            if run.run in runs_by_id:
                console.note(f"a run in {utf8_argument(path)} is counted once: it was given twice")
            runs_by_id.setdefault(run.run, run)
    runs = list(runs_by_id.values())
    if not any(run.requests for run in runs):
        paths = ", ".join(map(utf8_argument, options.report))
        raise UsageError(f"there are no saved requests in {paths}")
    return show_runs(options, runs, None, console)

def run_bench(options, console):
    """Measure endpoints, or report on saved runs; return the exit status."""
    check_bench_options(options)
    if options.report:
        return show_saved_runs(options, console)
    if options.duration is None and options.requests is None:
        options.duration = DEFAULT_DURATION_SECONDS
    loads = [("c", count) for count in options.concurrency or [DEFAULT_CONCURRENCY]]
    connections = max(loads)[1]
    if options.rate:
        loads = [("rate", rate) for rate in options.rate]
        connections = MAX_UNFINISHED
    with open_settings(options, console, endpoint_needed=False) as settings:
        targets = build_targets(options, settings, console)
        if settings.dry_run:
            for target in targets:
                send_dry_run(target.build_exchange().request, settings, console)
            return EXIT_OK
        allow_connections(connections * len(targets))
        if console.err.is_terminal and not console.quiet:
            limit = token_limit(targets[0].sampling)
            console.print_line(describe_bound(options, loads, limit), dim=True)
        with RunSaver(options.save, console) as saver:
            runs, interrupt = measure_loads(options, targets, loads, saver, console)
    status = show_runs(options, runs, interrupt, console)
    if interrupt:
        raise interrupt
    if saver.has_failed:
        return EXIT_FAILURE
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

def _values(argument):
    """Return the values that an option or an argument may have, as far as they are known."""
    if argument.choices:
        return argument.choices
    if argument.metavar == "FILE":
        return [FILES_ROW]
    if argument.metavar == "CONTEXT":
        with contextlib.suppress(UsageError):
            return [name for name in read_config().deployments if one_line(name) == name]
    return []

def find_candidates(parser, waiting, word):
    """Return the (candidate, meaning) pairs that can stand in place of *word*.

    *parser* is that of the command in front, *waiting* the option whose value *word* is, or None.
    """
    name, equals, _ = word.partition("=")
    if waiting:
        found = dict.fromkeys(_values(waiting), "")
    elif equals and name in parser.options:
        values = _values(parser.options[name])
        if values == [FILES_ROW]:
            return [(FILES_ROW, "")]
        found = {f"{name}={value}": "" for value in values}
    elif word.startswith("-"):
        found = {name: option.help for name, option in parser.options.items()}
    else:
        found = dict(parser.commands)
        if parser.argument:
            found.update(dict.fromkeys(_values(parser.argument), ""))
    return [pair for pair in found.items() if pair[0].startswith(word) or pair[0] == FILES_ROW]

# -- Command line -----------------------------------------------------------------------------

# The options of a command are written as its help shows them: a title, then a line such as
#
#     -e, --endpoint SLUG        endpoint to ask
#
# This is one option with a short and a long name; another long name begins another option.  SLUG
# says that it takes a value, and TYPES what the value must be.  "repeatable" in the summary makes
# a list of the values.  Without SLUG it would be a flag.

ENDPOINT_OPTION = f"""
Endpoint
  -e, --endpoint SLUG        endpoint to ask (default: {ENV_ENDPOINT})
"""
TARGET_OPTIONS = ENDPOINT_OPTION + """
  --demo                     ask a practice endpoint inside this process
"""
COMMON_OPTIONS = f"""
Output
  -o, --output FORM          text or json (table means text)
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
  --timeout SECONDS          longest silence of the server (default: {DEFAULT_TIMEOUT_SECONDS})
  --cacert FILE              trust the authorities in this PEM file
"""
GLOBAL_OPTIONS = COMMON_OPTIONS + f"""
  --retries N                retries after a transient failure (default: {DEFAULT_RETRIES})
"""
ASKING_OPTIONS = TARGET_OPTIONS + GLOBAL_OPTIONS
SYSTEM_OPTIONS = """
Message
  --system TEXT              system message
  --from-file FILE           system message from a file; overrides --system
"""
CHAT_OPTIONS = """
Message
  -m, --message TEXT         what to say; '-', or no -m, reads standard input
  -a, --attach FILE          add a text, image or sound; '-': stdin; repeatable
  -i, --interactive          hold a conversation; /help tells more
  -c, --continue             continue the newest conversation
  --conversation FILE        keep the conversation in FILE, and go on with it
  --no-history               keep neither inputs nor conversation
Output
  --stream, --no-stream      print the answer as it comes, or whole
  -x, --extract              print only the first code block
  --plain                    no styles and no word wrap on a terminal
  --show-usage               print token counts and the id on stderr
  --show-reasoning           print the model's reasoning on stderr
Examples
  xeroctl chat -e my-endpoint --stream -m "What is 2+2?"
  tail app.log | xeroctl chat -e my-endpoint -a - -m "What failed?"
  xeroctl chat -e my-endpoint -i --system "Keep it short."
"""
MODEL_OPTIONS = """
Sampling
  --model NAME               model name to send (default: the endpoint)
  --max-tokens N             limit for the answer, in tokens
  --param NAME=VALUE         any body field, as JSON, text or @FILE; repeatable
  --slo-ttft MS, --slo-tpot MS  latency targets (TTFT, TPOT) sent as headers
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
BATCH_OPTIONS = f"""
Results
  --concurrency N            requests in flight at once (default: {DEFAULT_BATCH_CONCURRENCY})
  --ordered                  keep the order of the requests
  --results FILE             append to FILE; ask only what it does not answer
  --max-failures N           end after N failed requests
Examples
  xeroctl batch -e my-endpoint questions.txt > answers.jsonl
  xeroctl batch -e my-endpoint --results answers.jsonl requests.jsonl
  xeroctl batch --demo -o text < questions.txt
"""
BENCH_OPTIONS = f"""
Message
  --prompt-tokens N          length of made-up prompts (default: about {DEFAULT_PROMPT_TOKENS})
  --prompts FILE             ask these instead, one per line; '-': stdin
  --cached                   do not make prompts unique: a cache can hit
  --system TEXT              system message
Sampling
  --seed N                   seed of prompts and arrival times (default: 0)
Load
  --concurrency N[,N...]     in flight at each endpoint (default: {DEFAULT_CONCURRENCY})
  --rate R[,R...]            instead: start R a second, at random times
  --duration SECONDS         length of each run (default: {DEFAULT_DURATION_SECONDS})
  --requests N               end a run after N requests per endpoint
  --warmup N                 first requests, not measured (default: 1 each)
  --no-keepalive             open a connection for each request
Results
  --fail-if CONDITION        status 10 where 'ttft.p95>800' holds; repeatable
  --save FILE                append a line per request; '-': replaces report
  --report FILE ...          report on these saved runs; send nothing
Endpoint
  -e, --endpoint SLUG        endpoint to measure; repeatable
  --demo                     ask a practice endpoint inside this process
Examples
  xeroctl bench -e blue -e green --concurrency 1,4,16
  xeroctl bench -e blue --rate 5 --duration 60 --save blue.jsonl
  xeroctl bench --report blue.jsonl
"""
FILTER_OPTIONS = """
Results
  --limit N                  how many at most, 1 to 100
  --after ID                 those that follow this one
  --order ORDER              by time: asc, the oldest first, or desc
  --model NAME               those of this model
  --metadata NAME=VALUE      those with this tag; repeatable
"""
TITLES = ("Message", "Sampling", "Load", "Results", "Output", "Endpoint", "Connection", "Examples")

# A type returns the value of a text, or raises ArgumentTypeError.

def _quoted(before, value):
    """Return *value* in quotes, or nothing where it may be a key: an error must not repeat one."""
    if len(value) >= MIN_REDACTED_CHARACTERS:
        return ""
    return f"{before}'{one_line(value)}'"

def _is_option(word):
    return word.startswith("-") and word not in ("-", "--")

def _nearest(word, names):
    """Return the name that begins with *word* or differs little from it, or None."""
    import difflib

    near = [name for name in names if word and name.startswith(word)]
    near += difflib.get_close_matches(word, names, 1, 0.75)
    if near:
        return near[0]
    return None

def _must_be(words, text):
    return argparse.ArgumentTypeError(f"must be {words}{_quoted(', not ', text)}")

def utf8_text(text):
    """Return *text*, with what is not UTF-8 in it replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

def completion_id(text):
    """Return *text* if it is an id, so that it stays in its place in the path of a URL."""
    if not re.match(r"[A-Za-z0-9._-]+\Z", text) or not text.strip("."):
        raise _must_be("letters, digits, '.', '_' and '-'", text)
    return text

def number(convert, low, high):
    """Return the type of numbers from *low* to *high*, made by *convert* (int or float)."""
    def parse(text):
        try:
            return parse_number(text, convert, low, high)
        except ValueError as error:
            raise _must_be(error, text) from None

    return parse

def one_of(choices):
    """Return the type of words that are one of *choices*."""
    def parse_choice(text):
        if text not in choices:
            raise _must_be(", ".join(choices[:-1]) + " or " + choices[-1], text)
        return text

    return parse_choice

def parse_pair(text):
    """Return the (name, value) of NAME=VALUE, both texts."""
    name, equals, value = utf8_text(text).partition("=")
    if not name or not equals or sanitize(name) != name:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")
    return name, value

def parse_field(text):
    """Return the (name, JSON value) of NAME=VALUE or NAME=@FILE; '@@' begins a text with '@'."""
    name, value = parse_pair(text)
    if name in ("messages", "stream"):
        raise argparse.ArgumentTypeError(f"cannot set {name}")
    if value.startswith("@@"):
        return name, value[1:]
    path = value[1:]
    is_file = value.startswith("@")
    if is_file:
        value = decode_text(read_file(native_path(path)))[0]
    try:
        document = json.loads(value)
        json.dumps(document, allow_nan=False)
        return name, document
    except (ValueError, RecursionError) as error:
        if is_file:
            raise UsageError(f"--param {name}: {path} is not JSON: {error}") from error
        return name, value

def parse_header(text):
    """Return the (name, value) of 'NAME: VALUE'; the name is a token of RFC 9110."""
    name, colon, value = utf8_text(text).partition(":")
    value = value.strip(" \t")
    if not colon or not re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", name):
        raise argparse.ArgumentTypeError("must be 'NAME: VALUE'")
    if not re.match(r"[\t -~\xa0-\xff]*\Z", value):
        raise argparse.ArgumentTypeError("must be one line of printable Latin-1 characters")
    if name.lower() in ("content-length", "transfer-encoding", "connection"):
        raise argparse.ArgumentTypeError(f"cannot set {name}: it frames the request")
    return name, value

# What a value must be, by the name of the option or by its metavar: a type, or the words to choose
# from.  Any other value is a text.
TYPES = {
    "--after": utf8_text,
    "--duration": number(float, 0.1, MAX_TIMEOUT_SECONDS),
    "--limit": number(int, 1, 100),
    "--message": str,  # run_chat refuses what is not UTF-8
    "--model": utf8_text,
    "--output": ("text", "json", "table"),
    "--param": parse_field,
    "--retries": number(int, 0, 1000),
    "--prompt-tokens": number(int, 1, 1000000),
    "--warmup": number(int, 0, 1000),
    "CONDITION": parse_condition,
    "FILE": native_path,
    "ID": completion_id,
    "KEY": check_api_key,
    "MS": number(int, 1, MAX_NUMBER),
    "N": number(int, 1, MAX_NUMBER),
    "N[,N...]": parse_concurrencies,
    "NAME": check_deployment_name,
    "NAME:VALUE": parse_header,
    "NAME=VALUE": parse_pair,
    "ORDER": ("asc", "desc"),
    "R[,R...]": parse_rates,
    "SECONDS": number(float, 0.001, MAX_TIMEOUT_SECONDS),
    "SHELL": tuple(SHELLS),
}
TYPES.update(("--" + name.replace("_", "-"), number(*limits))
             for name, limits in SAMPLING_RANGES.items())

class TextAction(argparse.Action):
    """The action of --help and --version: print a text and do nothing else."""

    def __call__(self, parser, namespace, values, option_string=None):
        raise TextRequested(self.const or parser.format_help())

# Settings for argparse that the line of an option does not show.
SPECIAL_OPTIONS = {
    "--connect-timeout": {"default": DEFAULT_CONNECT_TIMEOUT_SECONDS},
    "--continue": {"dest": "continue_last"},
    "--help": {"action": TextAction, "nargs": 0},
    "--no-stream": {"action": "store_false", "dest": "stream"},
    "--timeout": {"default": DEFAULT_TIMEOUT_SECONDS},
    "--version": {"action": TextAction, "nargs": 0, "const": f"xeroctl {__version__}\n"},
    "batch --concurrency": {"default": DEFAULT_BATCH_CONCURRENCY},
    "bench --endpoint": {"dest": "endpoints"},
    "bench --seed": {"default": 0},
    "bench --warmup": {"default": 1},
}

# Each row: the usage, the summary, the function, the options.  A word in capital letters at the end
# of the usage, alone or after two blanks, is a positional argument.
COMMANDS = {
    "": (
        "COMMAND", "chat with Xerotier endpoints and OpenAI-compatible servers", None,
        GLOBAL_OPTIONS + """
Examples
  xeroctl chat --demo --stream -m Hello
  xeroctl config init
  xeroctl help chat
"""),
    "chat": (
        "-e SLUG | --demo  [-m TEXT] [-i]", "send a message to an endpoint and print the answer",
        run_chat, CHAT_OPTIONS + SYSTEM_OPTIONS + SAMPLING_OPTIONS + ASKING_OPTIONS),
    "batch": (
        "-e SLUG | --demo  [FILE]", "ask many questions: JSON lines in, JSON lines out",
        run_batch, BATCH_OPTIONS + SYSTEM_OPTIONS + SAMPLING_OPTIONS + ASKING_OPTIONS),
    "bench": (
        "-e SLUG | --demo | --report FILE ...", "measure endpoints: time to first token, tokens/s",
        run_bench, BENCH_OPTIONS + MODEL_OPTIONS + COMMON_OPTIONS),
    "models": ("", "list the models behind an endpoint", run_models, ASKING_OPTIONS),
    "completions": (
        "[COMMAND]", "list and change the completions that --store keeps", run_completions_list,
        FILTER_OPTIONS + ASKING_OPTIONS + "Examples\n  xeroctl completions --demo\n"),
    "completions list": (
        "", "list stored completions; this is the default", run_completions_list,
        FILTER_OPTIONS + ASKING_OPTIONS),
    "completions get": (
        "ID", "show the answer of a completion", run_completions_get, ASKING_OPTIONS),
    "completions messages": (
        "ID", "show the conversation of a completion", run_completions_messages, ASKING_OPTIONS),
    "completions update": (
        "ID", "change the tags of a completion", run_completions_update, ASKING_OPTIONS
        + "Results\n  --metadata NAME=VALUE      tag of the new set; repeatable\n"),
    "completions delete": (
        "ID ...", "delete completions", run_completions_delete,
        ASKING_OPTIONS + "Results\n  --yes                      do not ask\n"),
    "status": ("", "check settings, connection, key and an answer", run_status, ASKING_OPTIONS),
    "config": (
        "[COMMAND]", "list and change the deployments in the config file", run_config_list,
        GLOBAL_OPTIONS),
    "config list": (
        "", "list the deployments; this is the default", run_config_list, GLOBAL_OPTIONS),
    "config init": (
        "", "ask for a deployment, try it and add it", run_config_init,
        ENDPOINT_OPTION + GLOBAL_OPTIONS),
    "config add": (
        "NAME", "add a deployment; --api-key - reads the key", run_config_add, ENDPOINT_OPTION
        + GLOBAL_OPTIONS + "Examples\n  xeroctl config add prod --api-key - --base-url URL\n"),
    "config set": (
        "CONTEXT", "change a deployment; an empty value removes", run_config_set, ENDPOINT_OPTION
        + GLOBAL_OPTIONS + "Examples\n  xeroctl config set prod --endpoint my-endpoint\n"),
    "config use": ("CONTEXT", "make a deployment the current one", run_config_use, GLOBAL_OPTIONS),
    "config show": (
        "[CONTEXT]", "show a deployment, by default the chosen one", run_config_show,
        GLOBAL_OPTIONS),
    "config remove": ("CONTEXT", "remove a deployment", run_config_remove, GLOBAL_OPTIONS),
    "config path": ("", "print where the config file is", run_config_path, GLOBAL_OPTIONS),
    "completion": (
        "SHELL", "print a script that completes commands", run_completion,
        GLOBAL_OPTIONS + 'Examples\n  eval "$(xeroctl completion bash)"\n'),
    "help": ("[COMMAND ...]", "show the help of a command", None, GLOBAL_OPTIONS),
}

class Parser(argparse.ArgumentParser):
    """The parser of one command; a wrong command line is a UsageError."""

    def __init__(self, name):
        super().__init__(prog=f"xeroctl {name}".strip(), add_help=False)
        self.name = name
        self._usage, self._summary, self.run, text = COMMANDS[name]
        self.options = {}     # name -> action of argparse
        self.argument = None  # action of the positional argument
        self.commands = {}    # word -> summary of the command below
        self._rows = {title: [] for title in TITLES}  # lines of the help
        # Through a group of argparse: the parser itself tries out each help, slow on Python 3.14.
        self._group = self.add_argument_group()
        rows = []  # of the title above
        for line in text.split("\n"):
            if line.startswith(" "):
                rows.append(line)
                self._add_options(line)
            elif line:
                rows = self._rows[line]
        for other, (_, summary, _, _) in COMMANDS.items():
            above, _, word = other.rpartition(" ")
            if above == name and word:
                self.commands[word] = summary
        argument = re.search(r"(?:^|  )(\[?([A-Z]+)(?: \.\.\.)?\]?)$", self._usage)
        if argument and not self.commands:
            value, metavar = argument.groups()
            dest = {"COMMAND": "topic", "CONTEXT": "name"}.get(metavar, metavar.lower())
            self.argument = self._add([dest], value, "")

    def _add_options(self, line):
        """Add the options of one line of the help; a line of the examples has none."""
        row = re.match(r"  (-\S+(?: \S+)*)  +(.*)", line)
        if not row:
            return
        names, summary = row.groups()
        strings = []
        for piece in names.split(", "):
            name, _, value = piece.partition(" ")
            strings.append(name)
            if name.startswith("--"):
                self.options.update(dict.fromkeys(strings, self._add(strings, value, summary)))
                strings = []

    def _add(self, strings, value, summary):
        """Return the new action for an option or an argument; *value* is a metavar, or empty."""
        name = strings[-1]
        settings = {"help": summary, "default": None}
        if value:
            metavar, _, several = re.sub(r"^\[(.*)\]$", r"\1", value).partition(" ")
            settings["metavar"] = metavar
            settings["type"] = TYPES.get(name) or TYPES.get(metavar, utf8_text)
            if isinstance(settings["type"], tuple):
                settings["choices"] = settings["type"]
                settings["type"] = one_of(settings["choices"])
            if several:
                settings["nargs"] = "+"
            if value.startswith("["):
                settings["nargs"] = "*" if several else "?"
            if "repeatable" in summary:
                settings.update(action="append", default=[])
        else:
            settings["action"] = "store_true"
        settings.update(SPECIAL_OPTIONS.get(name, {}))
        settings.update(SPECIAL_OPTIONS.get(f"{self.name} {name}", {}))
        return self._group.add_argument(*strings, **settings)

    def read_option(self, word):
        """Return the last option in *word*, or None, and whether the next word is its value."""
        name, equals, _ = word.partition("=")
        option = self.options.get(name) or self.options.get(word[:2])
        if option is None:
            return None, False
        if name in option.option_strings:
            return option, option.nargs != 0 and not equals
        if option.nargs == 0:
            return self.read_option("-" + word[2:])  # -qo
        return option, False  # -ojson

    def _get_option_tuples(self, option_string):
        # This forbids abbreviations.  Before Python 3.8, allow_abbrev=False forbids -qv too.
        if option_string.startswith("--"):
            return []
        return super()._get_option_tuples(option_string)

    def error(self, message):
        """Raise the UsageError for what argparse found wrong, in our words."""
        name, _, problem = re.sub(r"^argument (\S+/)?", "", message).partition(": ")
        if name.startswith("the following arguments"):
            name, problem = problem, "is missing"
        elif problem.startswith("expected"):
            problem = f"needs a value: one that begins with - is given as {name}=-x"
        elif problem.startswith("ignored explicit"):
            problem = "takes no value"
        raise UsageError(f"{name} {problem}")

    def refuse(self, words):
        """Raise the UsageError for an unknown option in *words*, else for the last of them."""
        for word in filter(_is_option, words):
            name = word.partition("=")[0]  # what follows may be a key
            if not self.read_option(word)[0]:
                near = _nearest(name, self.options)
                if near:
                    raise UsageError(f"{self.prog} has no option {name}: did you mean {near}?")
                if not name.startswith("--"):
                    name = name[:2]
                raise UsageError(f"{self.prog} has no option {name}: see {self.prog} --help")
        word = words[-1]
        near = _nearest(word, self.commands)
        if near:
            raise UsageError(f"{self.prog} has no command {word}: did you mean {near}?")
        problem = "unexpected argument" + _quoted(" ", word)
        if self.commands:
            problem = f"{self.prog} has no such command" + _quoted(": ", word)
        advice = f"see {self.prog} --help"
        if "--message" in self.options:
            advice = "a message goes behind -m, in quotes"
        raise UsageError(f"{problem}: {advice}")

    def usage_line(self):
        """Return the line of the help that shows how the command is written."""
        return f"usage: {self.prog} {self._usage}".rstrip() + " [options]"

    def command_lines(self):
        """Return the lines of the help that list the commands below."""
        lines = [f"  {word:<25}  {summary}" for word, summary in self.commands.items()]
        if lines:
            lines[:0] = ["", "Commands"]
        return lines

    def format_help(self):
        """Return the help: usage, options in groups, examples; 80 columns at most."""
        lines = [self.usage_line(), "", self._summary[0].upper() + self._summary[1:] + "."]
        lines += self.command_lines()
        for title, rows in self._rows.items():
            if rows:
                lines += ["", title, *rows]
        lines += ["", "Exit statuses, files and all else: man xeroctl"]
        return "\n".join(lines) + "\n"

@functools.lru_cache(maxsize=None)
def build_parser(name=""):
    """Return the parser of the command *name*, such as "config add"; of the whole tool for ""."""
    return Parser(name)

def enter_command(name, parser, words):
    """Return the parser of the command *name*, found behind *words* of the command of *parser*.

    Raise UsageError for an option in *words* that does not mean the same behind the command.
    """
    below = build_parser(name)
    for word in filter(_is_option, words):
        option = below.read_option(word)[0]
        if not option:
            below.refuse([word])
        above = parser.read_option(word)[0]
        if not above or above.help != option.help:
            word = word.partition("=")[0]
            raise UsageError(f"{word} goes behind the command: {below.prog} {word}")
    return below

def find_command(words):
    """Return the parser of the command in *words*, the other words, and an option that waits.

    That is the option whose value would be the next word, or None.
    """
    parser, others, waiting = build_parser(), [], None
    for word in words:
        name = f"{parser.name} {word}".lstrip()
        if _is_option(word):
            known = build_parser(parser.name or "chat")  # even in front of the command
            option, takes_next = known.read_option(word)
            waiting = option if takes_next else None
        elif waiting:
            if waiting.nargs != "+":
                waiting = None
        elif word and name in COMMANDS:
            parser = enter_command(name, parser, others)
            continue
        elif name == "chat send":  # as the vendor's client spells it
            continue
        elif parser.commands:
            parser.refuse(others + [word])
        others.append(word)
    return parser, others, waiting

# What the process does

def parse_arguments(arguments):
    """Return the options of a command line; raise UsageError or TextRequested."""
    parser, words, waiting = find_command(arguments)
    if waiting and _is_option(words[-1]) and waiting.nargs != "?":
        raise UsageError(f"{waiting.option_strings[-1]} needs a value")
    own, unknown = parser.parse_known_args(words)
    if unknown:
        parser.refuse(unknown)
    options = build_parser("chat").parse_args([])  # commands share functions with chat
    vars(options).update(vars(own))
    if parser.name == "help":
        raise TextRequested(find_command(options.topic)[0].format_help())
    if not parser.name:
        raise UsageError("no command: see xeroctl --help")
    for name in ("base_url", "endpoint", "context", "model"):
        if getattr(options, name) == "" and parser.name != "config set":
            raise UsageError(f"--{name.replace('_', '-')} must not be empty")
    options.command = parser.name.partition(" ")[0]
    options.run = parser.run
    return options

def print_candidates(command, words, console):
    """Print what can stand in place of the last of *words*, a line each."""
    *before, word = words or [""]
    with contextlib.suppress(UsageError):
        parser, _, waiting = find_command(before)
        for candidate, meaning in find_candidates(parser, waiting, word):
            if command == "__describe":
                console.write(f"{candidate}\t{meaning}\n")
            elif candidate != FILES_ROW:
                console.write(candidate + "\n")

def asks_for_json(arguments):
    """Return whether a command line that cannot be parsed asks for JSON."""
    form = r"(?:^|\0)(?:-[qvi]*o[\0=]?|--output[\0=])json(?:\0|$)"
    return re.search(form, "\0".join(arguments)) is not None

def run(arguments, console):
    """Run the command that *arguments* name; return the exit status."""
    if not arguments:
        parser = build_parser()
        for line in [parser.usage_line(), *parser.command_lines(), ""]:
            console.print_line(line)
        console.print_line("Try: xeroctl chat --demo -m Hello; xeroctl help COMMAND tells more.")
        return EXIT_USAGE
    if arguments[0] in ("__complete", "__describe"):
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
                status = run(argv, console)
            except XeroctlError as error:
                console.print_error(error)
                status = error.exit_status
            finally:
                console.stop_spinner()
            waiter.check()  # a signal that came too late to stop anything still ends a shell's loop
            return status
    except BrokenPipeError:
        return EXIT_CLOSED_STDOUT
    except KeyboardInterrupt:
        return end_by_signal(signal.SIGINT)
    except Terminated as end:
        return end_by_signal(end.args[0])

if __name__ == "__main__":
    sys.exit(main())
