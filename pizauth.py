#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography"]
# ///
"""pizauth: an OAuth2 token daemon for command-line mail programs.

`pizauth server` holds access tokens in memory and keeps them fresh; `pizauth show ACCOUNT` prints
one. This file is both.
The vocabulary is that of RFC 6749 (OAuth 2.0), 7636 (PKCE) and 8252 (native applications).

The state of an account, and what moves it:

            show, refresh              code exchanged               refreshed
    Empty ----------------> Pending -------------------> Active ----------------+
      ^                        |                          |   ^                 |
      |   refused, failed      |    refused for good,     |   +-----------------+
      +------------------------+    or expired for good   |
      +---------------------------------------------------+      (in the code, Empty is None)

One authorization, step by step:

 1. `show work` finds Empty: Authenticator makes a Pending, with a fresh `state` and
    `code_verifier`, and answers its URL.
 2. The person opens the URL; the provider sends the browser to our redirect listener with that
    `state` and a `code`.
 3. Authenticator.redirected finds the Pending by its `state` and posts code and verifier to the
    token endpoint, in a child.
 4. The answer replaces Pending by Active; the browser, which waited, is told; `show work` prints
    the access token.
 5. Before the token expires a second child posts the refresh token, and the answer replaces Active
    by a new Active.

The control protocol: a client of the Unix socket sends one request, `VERB ":" REST`, shuts down its
half, and reads the reply to end of file: `KIND ":" TEXT`, or `error:` and a sentence (`dump` and
`info` answer bytes and JSON as they are). Authenticator.control answers it.

One process, which never has a second thread, owns all state and waits in one place, Loop.run.
Whatever may block is a forked child, which sees what it was forked with and at most writes bytes
into a pipe. There are no timers: everything due is derived from the state (Authenticator.run_due,
.deadline), so nothing has to be cancelled. A late outcome counts only if the token it belongs to is
still in place.

Sections: errors and records; configuration; OAuth 2.0 messages; wire formats; time and token
states; dump; Authenticator; what children do; Loop; paths and standard streams; the server; the
client. Each uses only what stands above it. Start reading at main(), at the end.
"""

from __future__ import annotations

import os
import stat
import sys

TYPE_CHECKING = False  # `typing` would cost every `show` 2 ms; mypy takes this name for its own
if TYPE_CHECKING:
    import _socket, argparse, binascii, errno, fcntl, gc, json, re, resource, select, selectors
    import signal, socket, ssl, time, urllib.parse
    from collections.abc import Iterable, Iterator, Mapping
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from functools import partial
    from typing import Any, Callable, NoReturn, Optional

    Answer = Callable[[bytes], None]  # gives a peer its reply, exactly once, now or on a later pass
    Cancel = Callable[[], None]  # stops a child whose outcome nobody wants any more
    Ended = Callable[[Optional[int], bytes], None]  # told exit status and output of a child
    Fields = dict[str, str]  # a form, or the environment variables of a command


def server_imports() -> None:
    """Bind what only the server needs: `show` runs at every login and must not pay for it.

    A server sits in memory for months, so it does without secrets and hashlib, which bring in
    libcrypto (3.7 MiB), and without html, base64, difflib and traceback (1.2 MiB).
    """
    global _socket, binascii, errno, fcntl, gc, json, re, resource, select, selectors, signal
    global socket, time, urllib, partial
    import _socket, binascii, errno, fcntl, gc, json, re, resource, select, selectors, signal
    import socket, time, urllib.parse
    from functools import partial


VERSION = "0.1.0"

# Lengths of time, in seconds.
TOKEN_REQUEST_LIMIT = 30  # How long may one token request take in all, look-ups included?
CONNECT_TIMEOUT = 5  # And how long to connect to one address? Leaves time for five more.
CODE_RETRY_INTERVAL = 6  # How long after a failed code exchange is it tried again?
BROWSER_PATIENCE = 10  # How long does a browser wait for the outcome until told to close the page?
REFRESH_GAP = 1  # How far apart do refreshes of one account start, whatever is asked or sent?
REMINDER_GAP = 1  # How far apart are reminders, when auth_notify_interval is 0s?
LEAST_AGE = 10  # How old does a token get before it is refreshed, unless half its life is less?
RETRY_AFTER_LIMIT = 3600  # How long may a server's Retry-After hold a refresh back?
LIFE_LIMIT = 10 * 365 * 86400  # What expires_in is beyond belief?
CONNECTION_TIMEOUT = 10  # How long may a client take to send a request, and then to read the reply?
LONGEST_SLEEP = 37  # How late may we notice that the machine slept? (poll does not count that time)
ERROR_LIMIT = 60  # How long may error_notify_cmd run?
EVENT_LIMIT = 10  # And token_event_cmd, which holds up the next event?
VERDICT_LIMIT = 180  # And transient_error_if_cmd, which holds up the next refresh?
FOR_EVER = float("inf")  # the limit of what has none, the moment of what is not to come
STARTUP_PATIENCE = 60  # How long does READY=1 wait for startup_cmd, which may run for ever?
GRACE = 2  # How long may what is in flight at the end still reach token_event_cmd?
FORK_RETRY = 1  # How long until a shell command is started for which there was no process?
LATE = 1  # How late must the loop be for a child's limit to count as slept through?
AFTER_SLEEP = 5  # And how much more time does the child get from then on?
PAUSE = 1  # How long is accepting paused out of descriptors or memory, or the loop after a bug?
SOCKET_CHECK = 60  # How often is the control socket looked at, when the loop is awake anyway?
CLIENT_TIMEOUT = 10  # How long do clients wait for the server's next byte, `shutdown` for its end?

# Sizes, in bytes.
CONFIG_LIMIT = 16 << 20  # of a configuration file
CONTEXT = 8 << 10  # of it on either side of an error, to tell names from what may be a secret
ANSWER_LIMIT = 1 << 20  # of a token endpoint's answer
FORM_LIMIT = 64 << 10  # of one that is a form
REQUEST_LIMIT = 64 << 10  # of a control request
RESTORE_LIMIT = 16 << 20  # of one that brings a dump
HEAD_LIMIT = 16 << 10  # of the head of an HTTP request
CHUNK = 64 << 10  # read, or enciphered, at a time
READ_CHUNK = 8 << 10  # read from a connection at a time: nearly all requests are small
TLS_CHUNK = 1 << 10  # read a pass where 27 bytes may be a KeyUpdate: 38 of them cost 0.4 ms
TLS_LIMIT = 64 << 10  # of all that a TLS client sends before its request is whole

# Counts.
CODE_TRIES = 10  # How often is a code exchange tried in all?
CONNECTIONS = {"control": 256, "browser": 128}  # How many connections of each kind may be open?
NICE = 10  # By how much does a token request give way, at first to the server that answers others?
TOKEN_REQUESTS = {"refresh": 12, "code": 16}  # At how many does one more wait? Codes are urgent.
HOST_REQUESTS = {"refresh": 3, "code": 4}  # And to one host?
VERDICT_FAILURES = 6  # After how many failures in a row is transient_error_if_cmd asked again?
COMMANDS_A_PASS = 4  # How many shell commands are started before others have their turn?
ACCEPTS = 32  # How many connections are accepted before others have their turn?
READS = 4  # How often is one connection read before others have their turn?
FIELDS = 100  # How many fields may a query, a form or an HTTP head have?
PORT_TRIES = 10  # How many ports are tried until both loopback families have the same one free?
DESCRIPTORS = 1024  # The soft limit: enough for all the above, and cheap to close in a child.

ERROR, WARNING, INFO, DEBUG, TRACE = range(5)  # levels of the log; -v adds one


# ---- Errors and records ----
# An error holds a sentence for a person: which account or line, and what happened. Its class says
# who reads it. Before them stand four small tools that several sections use.


def printable(text: str) -> str:
    """The text without control characters: what comes from outside must not drive a terminal."""
    return "".join(c for c in text if c.isprintable())


def html_text(text: str) -> str:
    """The text as it is written in a page, between tags or in an attribute."""
    return text.translate({38: "&amp;", 60: "&lt;", 62: "&gt;", 34: "&quot;", 39: "&#39;"})


def stack_trace() -> str:
    """Where the exception being handled came from: it is a bug of ours."""
    error = sys.exc_info()[1]
    try:
        import traceback
    except Exception:  # no descriptor is left, or another Python has taken the place of this one
        return repr(error)
    return traceback.format_exc()


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the data. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class PizauthError(Exception):
    """The root: main() prints it after `ERROR - ` and exits 1. What else escapes is a bug."""


class ConfigError(PizauthError):
    """The configuration cannot be used: the first line tells where and why, the rest shows it."""


class RequestError(PizauthError):
    """A control client asked for what cannot be done; it is answered `error:` and this."""


class BadRequest(PizauthError):
    """A browser sent what cannot be used; it is answered a page with this status and text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class TokenError(PizauthError):
    """The token endpoint gave no token: 500 characters at most, without what drives a terminal."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text)[:500])


class TransientError(TokenError):
    """It was no OAuth answer: the login is kept. `outage`: transport or status invite a new try."""

    def __init__(self, text: str, outage: bool = False, retry_after: float = 0) -> None:
        super().__init__(text)
        self.outage = outage
        self.retry_after = retry_after


class PermanentError(TokenError):
    """The authorization server said no, in the words of RFC 6749 5.2."""


class Record:
    """Named fields: a subclass's annotations, its attributes as defaults; equal if identical."""

    def __init__(self, *values: Any, **named: Any) -> None:
        names = list(type(self).__annotations__)
        fields = dict(zip(names, values), **named)
        missing = [name for name in names if name not in fields and not hasattr(type(self), name)]
        if missing or len(values) > len(names) or not fields.keys() <= set(names):
            raise TypeError(f"{type(self).__name__}: fields are {names}, missing {missing}")
        self.__dict__.update(fields)


# ---- Configuration ----
# Text in, a Config or a ConfigError out; no file is opened here. The class docstring of Parser is
# the grammar.


class Account(Record):
    """An account, its texts as written; from auth_uri to token_uri all is security-relevant."""

    name: str
    auth_uri: str
    auth_uri_fields: tuple[tuple[str, str], ...] = ()
    client_id: str
    client_secret: str | None = None
    redirect_uri: str = "http://localhost/"
    scopes: tuple[str, ...] = ()
    token_uri: str
    login_hint: str | None = None
    refresh_at_least: int
    refresh_before_expiry: int
    refresh_retry: int

    @classmethod
    def security_fields(cls) -> list[str]:
        """The options that a token depends on: all but the times and login_hint."""
        fields = list(cls.__annotations__)
        return fields[fields.index("auth_uri") : fields.index("token_uri") + 1]

    def security(self) -> dict[str, Any]:
        """Those options: a token obtained with other values must not be shown for this account."""
        return {field: getattr(self, field) for field in self.security_fields()}

    def redirect_uri_at(self, port: int) -> str:
        """The redirect URI as sent, with our listener's port in place of its own (RFC 8252 7.3)."""
        return normal_uri(self.redirect_uri, port)


class Config(Record):
    """Times are in seconds; a listener is the addresses it takes, the first of them for sure."""

    accounts: dict[str, Account]
    auth_notify_cmd: str | None = None
    auth_notify_interval: int = 15 * 60
    error_notify_cmd: str | None = None
    http_listen: tuple[tuple[str, int], ...] = (("127.0.0.1", 0), ("::1", 0))
    https_listen: tuple[tuple[str, int], ...] = (("127.0.0.1", 0), ("::1", 0))
    refresh_at_least: int = 90 * 60
    refresh_before_expiry: int = 90
    refresh_retry: int = 40
    startup_cmd: str | None = None
    token_event_cmd: str | None = None
    transient_error_if_cmd: str | None = None


class Lexeme:
    """A lexical token: its kind (start, word, time, string, end, or the mark itself)."""

    __slots__ = ("at", "kind", "text")

    def __init__(self, kind: str, text: str, at: int) -> None:
        self.kind, self.text, self.at = kind, text, at

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 40 else self.text[:40] + "..."
        return {"start": "nothing", "string": "a string"}.get(self.kind, f"'{shown}'")


MANDATORY = ("auth_uri", "client_id", "token_uri")
RESERVED_FIELDS = ("access_type", "client_id", "code_challenge", "code_challenge_method",
                   "redirect_uri", "response_type", "scope", "state")
RENAMED = {
    "auth_error_cmd": "it is called error_notify_cmd now",
    "refresh_retry_interval": "it is called refresh_retry now",
    "not_transient_error_if":
        'write transient_error_if_cmd = "! ..." instead: it exits 0 if the error is transient',
}
NOT_OURS = {
    "#": "comments start with //",
    "/": "comments start with //",
    "-": "the names of options are written with '_', and numbers without a sign",
    "'": "strings stand in double quotes",
    "\u201c": 'strings stand in straight double quotes, "..."',
    "\u201d": 'strings stand in straight double quotes, "..."',
}
A_TIME = "a whole number and a unit, such as 90s, 15m, 2h or 1d"
A_STRING = "a string in double quotes"
OVER_LINES = "This string goes over several lines"


def decode_config(data: bytes) -> str:
    """The text of a configuration file, less a byte order mark. Raises ConfigError if not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = error.object  # the data less its mark, from where error.start counts
        line = text.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: byte {text[error.start]:#04x} is not UTF-8:"
                          " save the file as UTF-8") from None


def parse(text: str) -> Config:
    """The configuration in a text. Raises ConfigError with line, column, and the line itself."""
    return Parser(text).config()


def config_error(text: str, at: int, message: str) -> ConfigError:
    """The error at an offset: place, message, that line (secrets starred), and a mark below it."""
    start = text.rfind("\n", 0, at) + 1
    line, column = text.count("\n", 0, at) + 1, at - start + 1
    near = max(0, at - CONTEXT)
    hidden = re.sub(r"(?i)(secret|password)([^\n]*)",  # however the quotes pair
                    lambda match: match[1] + starred(match[2]),
                    without_values(text[near : at + CONTEXT]))
    before = hidden[max(start, at - 60) - near : at - near]
    after = hidden[at - near : at - near + 60].split("\n")[0]
    shown = "".join(c if c == "\t" or c.isprintable() else "?" for c in before + after)
    margin = re.sub(r"[^\t]", " ", before)
    return ConfigError(
        f"line {line}, column {column}: {printable(message)}\n    {shown}\n    {margin}^")


def starred(text: str) -> str:
    """The text with stars for all but what gives it its shape."""
    return re.sub(r'[^"\s;=]', "*", text)


def without_values(text: str) -> str:
    """The text with stars for all that is, or may be meant as, a secret: what follows a name that
    is no known option's, or client_secret's, to the end of its line and of a string there."""
    string = r'"[^"\\]*(?:\\.[^"\\]*)*"?'
    known = {*Parser.GLOBAL_OPTIONS, *Parser.ACCOUNT_OPTIONS, *RENAMED, "account"}
    harmless = "|".join(known - {"client_secret"}) + "|none|off|[0-9]+[smhd]"
    gap = r"\s*(?://[^\n]*\n\s*)*"

    def without_value(match: re.Match[str]) -> str:
        """A match, starred from where a secret may stand in it."""
        if match["comment"]:
            return starred(match[0])
        name, value = match["name"] or "", match["value"] or ""
        core = value.strip(" \t\r\n=;{}")
        if (not name or not re.search(r'[\w"]', core)
                or re.fullmatch(r"[0-9]+[smhd]|none|off", core)
                or re.fullmatch(r'\s*"[^"]*"\s*\{[^\w"]*', value)):
            return match[0]
        return name + starred(value)

    return re.sub(rf"""(?P<name> "(?=\w*(?i:secret|password))\w*" | (?!(?:{harmless})\b) \w+ )
                       (?P<value> {gap} [=:>]* {gap} [^"\n]* (?: {string} [^"\n]* )*)
                     | {string} | \w+ (?:{gap}= (?: (?!\w*(?i:secret)) \w+ | [^\w\n";] )* )?
                     | (?P<comment> // [^\n]* )
                  """, without_value, text, flags=re.DOTALL | re.VERBOSE)


def lexemes(text: str) -> Iterator[Lexeme]:
    """The lexical tokens, lazily, and last an `end`. Raises ConfigError at what is none."""
    lexicon = re.compile(
        r"""(?P<blank>  [ \t\r\n]+ | //[^\n]* )
          | (?P<time>   [0-9]+[smhd] (?!\w) )
          | (?P<string> "[^"\\]*(?:\\["\\][^"\\]*)*" )
          | (?P<word>   \w+ )
          | [=,{}\[\];:]""",
        re.VERBOSE,
    )
    at = 0
    while at < len(text):
        match = lexicon.match(text, at)
        if match is None:
            raise lexical_error(text, at)
        if match.lastgroup != "blank":
            yield Lexeme(match.lastgroup or match[0], match[0], at)
        at = match.end()
    yield Lexeme("end", "", at)


def lexical_error(text: str, at: int) -> ConfigError:
    """What is wrong where no token starts: half a string, or a character that has no place here."""
    half = re.compile(r'"[^"\\]*(?:\\["\\][^"\\]*)*').match(text, at)
    if half is None:
        hint = NOT_OURS.get(text[at])
        character = printable(text[at]) or f"\\x{ord(text[at]):02x}"
        return config_error(text, at, f"Unexpected '{character}'" + (f": {hint}" if hint else ""))
    if half.end() == len(text):
        return config_error(text, at, "This string is never closed: a double quote is missing")
    return config_error(text, half.end(),
                        r"Invalid escape: in a string write \\ for a backslash and \" for a double"
                        " quote; there are no others")


def split_uri(uri: str) -> urllib.parse.SplitResult:
    """The parts of an HTTP or HTTPS URI. Raises ValueError with a sentence if it is none."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri)
    if scheme is None:
        raise ValueError("Invalid URI: it must start with https:// or http://")
    if scheme[0].lower() not in ("http:", "https:"):
        raise ValueError("This is not a valid HTTP or HTTPS URI:"
                         f" it starts with {scheme[0]} instead of https:")
    if re.search(r"[\x00-\x1f\x7f]|^ | $", uri):
        raise ValueError("Invalid URI: there are blanks around it, or control characters in it")
    if "#" in uri:
        raise ValueError("URI fragments ('#...') are not allowed:"
                         " leave out the '#' and what follows")
    try:
        parts = urllib.parse.urlsplit(uri)
        host, _ = (parts.hostname or "")[:300], parts.port
        host.encode("ascii" if host.isascii() else "idna")
    except ValueError as error:
        raise ValueError(f"Invalid URI: {error}") from None
    if "@" in parts.netloc:
        raise ValueError("Invalid URI: a user name or password in it is not supported")
    if len(host) > 253:
        raise ValueError("Invalid URI: its host is too long")
    bracketed = parts.netloc.startswith("[") and re.fullmatch(r"[0-9a-f:.]*:[0-9a-f:.]*", host)
    if not bracketed and not re.fullmatch(r"[^\s%:<>?\[\\\]^|]+", host):
        raise ValueError("Invalid URI: its host is missing or misspelt;"
                         " write it as https://HOST/PATH")
    return parts


def normal_uri(uri: str, port: int | None = None) -> str:
    """A URI as it is sent: scheme and host in lower case, a path, no default port; or this port."""
    parts = split_uri(uri)
    host = parts.hostname or ""
    if not host.isascii():
        host = host.encode("idna").decode()
    host = f"[{host}]" if ":" in host else host
    port = parts.port if port is None else port
    default = {"http": 80, "https": 443}[parts.scheme]
    place = host if port in (None, default) else f"{host}:{port}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return f"{parts.scheme}://{place}" + urllib.parse.quote(target, safe="/%:@!$&'()*+,;=~|[]^?")


class Parser:
    """A recursive-descent parser with one token of look-ahead and one method a production.

    config  := { account | option }
    account := "account" STRING "{" { option } "}"
    option  := NAME "=" value ";"
    value   := STRING | TIME | "none" | "off" | list | map
    list    := "[" [ STRING { "," STRING } ] "]"
    map     := "{" [ pair { "," pair } ] "}"
    pair    := STRING ":" STRING
    """

    def __init__(self, text: str) -> None:
        self.source = text
        self.lexemes = lexemes(text)
        self.last = Lexeme("start", "", 0)
        self.lexeme = next(self.lexemes)

    def error(self, lexeme: Lexeme, message: str) -> ConfigError:
        return config_error(self.source, lexeme.at, message)

    def take(self, kind: str, wanted: str = "") -> Lexeme:
        """The lexeme at hand, which must be of this kind; the next one is at hand then."""
        lexeme, last = self.lexeme, self.last
        if lexeme.kind == kind:
            self.lexeme, self.last = next(self.lexemes, lexeme), lexeme
            return lexeme
        message = f"Expected {wanted or repr(kind)} after {last}"  # what is there may be a secret
        if "\n" in last.text:
            lexeme, message = last, f"{OVER_LINES}: is its last double quote missing?"
        elif lexeme.kind == "end":
            message += ", but the file ends"
        elif (last.kind, lexeme.kind) in (("}", ";"), (",", "]"), (",", "}")):
            message += f": leave out the '{lexeme.kind if lexeme.kind == ';' else ','}'"
        elif kind == ";":  # most likely forgotten there, and not where the next option starts
            lexeme = Lexeme(";", "", last.at + len(last.text))
        raise self.error(lexeme, message)

    def config(self) -> Config:
        """config := { account | option }"""
        accounts: dict[str, dict[str, Any]] = {}
        places: dict[str, Lexeme] = {}
        values: dict[str, Any] = {}
        while self.lexeme.kind != "end":
            if self.lexeme.text == "account":
                place, account = self.account()
                name = unquoted(place)
                if name in accounts:
                    raise self.error(place, f"There is an account '{name}' already:"
                                            " choose another name")
                accounts[name], places[name] = account, place
            else:
                self.option(self.GLOBAL_OPTIONS, values)
        config = Config(accounts, **values)
        inherited = {option: getattr(config, option) for option in self.ACCOUNT_OPTIONS
                     if hasattr(config, option)}
        config.accounts = {name: Account(name, **{**inherited, **account})
                           for name, account in accounts.items()}
        self.check_listeners(config, places)
        return config

    def check_listeners(self, config: Config, places: dict[str, Lexeme]) -> None:
        """Raise ConfigError if there is no account, or no listener for some account's redirect."""
        if not config.accounts:
            raise ConfigError('Must specify at least one account: account "NAME" { ... }')
        if not config.http_listen and not config.https_listen:
            raise ConfigError("Cannot set both http_listen and https_listen to 'none':"
                              " the browser must reach one of them")
        for name, account in config.accounts.items():
            scheme = split_uri(account.redirect_uri).scheme
            if not getattr(config, f"{scheme}_listen"):
                raise self.error(places[name], f"Account {name} has an '{scheme}' redirect but the"
                                               f" {scheme.upper()} server is set to 'none':"
                                               f" change its redirect_uri or {scheme}_listen")

    def account(self) -> tuple[Lexeme, dict[str, Any]]:
        """account := "account" STRING "{" { option } "}" """
        self.take("word")
        place = self.take("string", "the account's name, a string in double quotes")
        self.take("{")
        values: dict[str, Any] = {}
        while self.lexeme.kind != "}":
            self.option(self.ACCOUNT_OPTIONS, values)
        self.take("}")
        for option in MANDATORY:
            if option not in values:
                raise self.error(
                    place, f"{option} not specified: this account needs {option} = \"...\";")
        if "login_hint" in values and "login_hint" in dict(values.get("auth_uri_fields", ())):
            raise self.error(place, "Both login_hint and auth_uri_fields have a 'login_hint':"
                                    " keep the one in auth_uri_fields")
        return place, values

    def option(self, readers: Mapping[str, Callable[[Parser], object]],
               values: dict[str, Any]) -> None:
        """option := NAME "=" value ";" """
        name = self.take("word", "the name of an option"
                         + (" or '}'" if readers is self.ACCOUNT_OPTIONS else ""))
        if name.text not in readers:
            raise self.error(name, self.unknown(name.text, readers))
        if name.text in values:
            raise self.error(name, f"Mustn't specify '{name.text}' more than once")
        self.take("=")
        values[name.text] = readers[name.text](self)
        self.take(";")

    def unknown(self, name: str, readers: Mapping[str, Callable[[Parser], object]]) -> str:
        """What to say of a name that is no option here."""
        if name in RENAMED:
            return f"Unknown option '{name}': {RENAMED[name]}"
        if name in self.ACCOUNT_OPTIONS:
            return f"Option '{name}' belongs in an account: account \"NAME\" {{ {name} = ...; }}"
        if name in self.GLOBAL_OPTIONS:
            return f"Option '{name}' is for all accounts: move it out of this account's braces"
        block = self.lexeme.kind in ("string", "{")
        known = ["account"] if block else [
            *readers, *(() if readers is self.ACCOUNT_OPTIONS else ["account"])]
        import difflib

        near = difflib.get_close_matches(name[:64].lower(), known, 1, 0.6)
        hint = f": did you mean '{near[0]}'?" if near else f": they are {', '.join(sorted(known))}"
        return f"Unknown {'block' if block else 'option'} '{name[:64]}'{hint}"

    def string(self) -> str:
        return unquoted(self.take("string", A_STRING))

    def time(self) -> int:
        """A TIME in seconds, which must fit into 64 bits."""
        lexeme = self.lexeme
        if lexeme.kind == "word" and lexeme.text[0].isdigit():
            raise self.error(lexeme, f"Invalid time {lexeme}: write {A_TIME}")
        self.take("time", A_TIME)
        digits = lexeme.text[:-1].lstrip("0")
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}[lexeme.text[-1]]
        seconds = int(digits[:21] or "0") * unit
        if seconds >= 1 << 64:
            raise self.error(lexeme, f"Invalid time {lexeme}: that is more than 64 bits of seconds")
        return seconds

    def uri(self) -> str:
        """A STRING that is an HTTP or HTTPS URI."""
        lexeme = self.take("string", A_STRING)
        if "\n" in lexeme.text:
            raise self.error(lexeme, f"{OVER_LINES}, which is no URI: is a double quote missing?")
        try:
            normal_uri(unquoted(lexeme))
        except ValueError as error:
            raise self.error(lexeme, str(error)) from None
        return unquoted(lexeme)

    def listen(self) -> tuple[tuple[str, int], ...]:
        """Where a listener listens: `none`, `off`, or a STRING `HOST:PORT`."""
        lexeme = self.lexeme
        if lexeme.text in ("none", "off"):
            self.take("word")
            return ()
        address = unquoted(self.take("string", "\"HOST:PORT\" or none"))
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s\[\]:/\"]+)):([0-9]{1,5})", address)
        if match is None or int(match[3]) > 65535:
            raise self.error(lexeme, 'Not a listen address: write "HOST:PORT", the port 65535 at'
                                     ' most, for instance "127.0.0.1:0" or "[::1]:8080"')
        return ((match[1] or match[2], int(match[3])),)

    def strings(self) -> tuple[str, ...]:
        """list := "[" [ STRING { "," STRING } ] "]" """
        return tuple(self.items("[]", self.string, 'a list of strings, ["a", "b"],'))

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """map := "{" [ pair { "," pair } ] "}" """
        return tuple(self.items("{}", self.pair, 'a map of strings, {"key": "value"},'))

    def items(self, brackets: str, item: Callable[[], Any], wanted: str) -> Iterator[Any]:
        """What stands between brackets, separated by commas."""
        self.take(brackets[0], wanted)
        while self.lexeme.kind != brackets[1]:
            if self.last.kind != brackets[0]:
                self.take(",", f"',' or '{brackets[1]}'")
            yield item()
        self.take(brackets[1])

    def pair(self) -> tuple[str, str]:
        """pair := STRING ":" STRING, and its key is none that we send ourselves"""
        lexeme = self.take("string", A_STRING)
        key = unquoted(lexeme)
        if key in RESERVED_FIELDS:
            raise self.error(lexeme, f"'{key}' is a reserved key: pizauth sends that field itself")
        self.take(":")
        return key, self.string()

    GLOBAL_OPTIONS = {
        "auth_notify_cmd": string,
        "auth_notify_interval": time,
        "error_notify_cmd": string,
        "http_listen": listen,
        "https_listen": listen,
        "refresh_at_least": time,
        "refresh_before_expiry": time,
        "refresh_retry": time,
        "startup_cmd": string,
        "token_event_cmd": string,
        "transient_error_if_cmd": string,
    }
    ACCOUNT_OPTIONS = {
        "auth_uri": uri,
        "auth_uri_fields": pairs,
        "client_id": string,
        "client_secret": string,
        "login_hint": string,
        "redirect_uri": uri,
        "refresh_at_least": time,
        "refresh_before_expiry": time,
        "refresh_retry": time,
        "scopes": strings,
        "token_uri": uri,
    }


def unquoted(lexeme: Lexeme) -> str:
    """What a STRING lexeme stands for."""
    return re.sub(r'\\(["\\])', r"\1", lexeme.text[1:-1])


# ---- OAuth 2.0 messages ----
# One pure function a message. They are built and judged here, and sent elsewhere: only post_form
# knows HTTP.


PASSING_ERRORS = ("temporarily_unavailable", "server_error", "slow_down")


class AuthorizationResponse(Record):
    """What the authorization server sends back by way of the browser (RFC 6749 4.1.2, 4.1.2.1)."""

    state: str | None
    code: str | None
    error: str | None
    error_description: str | None


class TokenResponse(Record):
    """A good answer (RFC 6749 5.1); expires_in is in seconds, None if there was no sensible one."""

    access_token: str
    expires_in: float | None
    refresh_token: str | None


def sha256(data: bytes) -> bytes:
    """The digest by Python's own code where that was built, for hashlib loads libcrypto."""
    for module in ("_sha2", "_sha256", "hashlib"):
        try:
            new = __import__(module).sha256
            break
        except ImportError:
            pass  # this is of another version, or Python was built without
    digest: bytes = new(data).digest()
    return digest


def base64url(data: bytes) -> str:
    """The data in base64url without padding (RFC 7636 A)."""
    text = binascii.b2a_base64(data, newline=False).decode()
    return text.rstrip("=").replace("+", "-").replace("/", "_")


def code_challenge(code_verifier: str) -> str:
    """The S256 challenge of a verifier (RFC 7636 4.2)."""
    return base64url(sha256(code_verifier.encode()))


def authorization_request(account: Account, state: str, code_verifier: str,
                          redirect_uri: str) -> str:
    """The URL that the person must visit (RFC 6749 4.1.1, RFC 7636 4.3)."""
    fields = [
        ("access_type", "offline"),
        ("code_challenge", code_challenge(code_verifier)),
        ("code_challenge_method", "S256"),
        ("client_id", account.client_id),
        ("redirect_uri", redirect_uri),
        ("response_type", "code"),
        ("state", state),
        *([("scope", " ".join(account.scopes))] if account.scopes else []),
        *account.auth_uri_fields,
        *([("login_hint", account.login_hint)] if account.login_hint is not None else []),
    ]
    uri = normal_uri(account.auth_uri)
    return uri + ("&" if "?" in uri else "?") + urllib.parse.urlencode(fields)


def authorization_response(query: str) -> AuthorizationResponse:
    """What a redirect's query says; a parameter given twice is a BadRequest (RFC 6749 3.1)."""
    found: dict[str, str] = {}
    try:
        fields = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=FIELDS)
    except ValueError:
        raise BadRequest(400, "The address has too many fields.") from None
    for name, value in fields:
        if name in found and name in AuthorizationResponse.__annotations__:
            raise BadRequest(400, f"The address has more than one '{name}'.")
        found[name] = value
    return AuthorizationResponse(*map(found.get, AuthorizationResponse.__annotations__))


def access_token_request(account: Account, code: str, code_verifier: str,
                         redirect_uri: str) -> Fields:
    """The form that exchanges a code for tokens (RFC 6749 4.1.3, RFC 7636 4.5)."""
    return with_client_secret(account, {
        "code": code,
        "client_id": account.client_id,
        "code_verifier": code_verifier,
        "redirect_uri": redirect_uri,
        "grant_type": "authorization_code",
    })


def refresh_request(account: Account, refresh_token: str) -> Fields:
    """The form that asks for a new access token (RFC 6749 6)."""
    return with_client_secret(account, {
        "client_id": account.client_id,
        "refresh_token": refresh_token,
        "grant_type": "refresh_token",
    })


def with_client_secret(account: Account, form: Fields) -> Fields:
    """The form with the client's secret, if one is set, even if it is empty (RFC 6749 2.3.1)."""
    secret = account.client_secret
    return form if secret is None else {**form, "client_secret": secret}


def without_secrets(text: str, form: Fields) -> str:
    """A provider's message without control characters and the form's secrets, which it may echo,
    as they are or escaped for a URL or a page."""
    escapes = (str, printable, html_text, urllib.parse.quote, urllib.parse.quote_plus,
               partial(urllib.parse.quote, safe=""),
               lambda text: html_text(text).replace("&#39;", "'"))
    fields = ("code", "code_verifier", "refresh_token", "client_secret", "access_token")
    sent = {escape(form.get(field, "")) for escape in escapes for field in fields} - {""}
    longest_first = "|".join(map(re.escape, sorted(sent, key=len, reverse=True)))
    text = text.replace("&#x27;", "&#39;")
    for clean in (str, printable):
        text = re.sub(longest_first, "...", clean(text), flags=re.IGNORECASE) if sent else text
    return printable(text)


def outcome_bytes(status: int, retry_after: float, whole: bool, body: bytes) -> bytes:
    """What a child reports of a token request: status 0 means no answer, and the body says why.

    `whole`: the server told where its body ends (so that a body cut short cannot pass for it).
    """
    return f"{status} {retry_after} {whole:d}\n".encode() + body


def token_response(outcome: bytes, form: Fields) -> TokenResponse:
    """Judge a token request's outcome. Raises TransientError or PermanentError, fit to be shown."""
    head, _, body = outcome.partition(b"\n")
    status, delay, whole = (float(word) for word in head.split())
    delay = min(delay, RETRY_AFTER_LIMIT)
    if not status:
        raise TransientError(without_secrets(body.decode("utf-8", "replace"), form), outage=True)
    answer = json_object(body)
    error = answer.get("error")
    words = [word[:REQUEST_LIMIT] for word in (error, answer.get("error_description"))
             if isinstance(word, str)]
    message = f"HTTP {status:.0f}" + "".join(f": {without_secrets(w, form)}" for w in words if w)
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(message, True, delay)
    if 200 <= status < 300:
        good = good_answer(answer or form_fields(body, bool(whole)))
        if good is not None:
            return good
    if isinstance(error, str) and re.fullmatch(r"[!-~]+", error) and error not in PASSING_ERRORS:
        raise PermanentError(message)
    guess = "is token_uri right?" if status >= 400 else "is it a login page of the network?"
    raise TransientError(message if words else f"{message}, but no OAuth answer: {guess}",
                         retry_after=delay)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, or {}. Numbers are floats: a million digits cost nothing then."""
    try:
        value = json.loads(body, parse_int=float)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def form_fields(body: bytes, whole: bool) -> dict[str, Any]:
    """The fields of a form, as some providers answer, if the body is surely whole; or {}."""
    text = body.decode("ascii", "replace").strip() if whole and len(body) <= FORM_LIMIT else ""
    if not re.fullmatch(r"[!-~]+", text) or text.count("&") >= FIELDS:
        return {}
    return dict(urllib.parse.parse_qsl(text))


def good_answer(answer: dict[str, Any]) -> TokenResponse | None:
    """The tokens in an answer (RFC 6749 5.1), read with tolerance; None if it is no good."""
    access_token, refresh_token = answer.get("access_token"), answer.get("refresh_token")
    token_type = answer.get("token_type")
    if not (isinstance(access_token, str) and re.fullmatch(r"[!-~]+", access_token)):
        return None
    if not (refresh_token is None
            or isinstance(refresh_token, str) and re.fullmatch(r"[!-~]*", refresh_token)):
        return None
    if not (token_type is None or isinstance(token_type, str) and token_type.lower() == "bearer"):
        return None
    expires_in = sensible_life(answer.get("expires_in"))
    return TokenResponse(access_token, expires_in, refresh_token or None)


def sensible_life(expires_in: object) -> float | None:
    """A token's life in seconds, given as number or text; None for what makes no sense."""
    if not isinstance(expires_in, (str, float)):  # JSON's numbers are floats here
        return None
    try:
        seconds = float(expires_in)
    except ValueError:
        return None
    return seconds if 0 < seconds <= LIFE_LIMIT else None


# ---- Wire formats ----
# Bytes in; a value, None (more is needed), or an exception out. Pages are bytes out.


class Received(bytearray):
    """What a peer has sent so far; no end of a head starts before `searched`, so that one which
    comes a byte at a time is not searched anew each time."""

    searched = 0


class Head(Record):
    """What matters in an HTTP request's head: its target, which starts with `/`, and its Host."""

    target: str
    host: str


STATUS_TEXTS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
}


def until_eof(buffer: Received, eof: bool) -> bytes | None:
    """A control request: all until end of file. Raises RequestError as soon as it is too long."""
    limit = RESTORE_LIMIT if buffer.startswith(b"restore:") else REQUEST_LIMIT
    if len(buffer) > limit:
        raise RequestError(f"The request is longer than {limit >> 10} KiB")
    return bytes(buffer) if eof else None


def http_head(buffer: Received, eof: bool) -> Head | None:
    """The head of a GET (RFC 9112). Raises BadRequest as soon as it is clear that it is none."""
    line_end = buffer.find(b"\n")
    line = bytes(buffer[: line_end if line_end >= 0 else 32])
    if line_end < 0 or line_end >= buffer.searched:
        check_request_line(line, line_end >= 0)
    blank_line = re.compile(rb"\n\r?\n").search(buffer, max(0, buffer.searched - 2))
    buffer.searched = len(buffer)
    end = len(buffer) if blank_line is None else blank_line.start()
    if end > HEAD_LIMIT:
        raise BadRequest(431, f"The request is longer than {HEAD_LIMIT >> 10} KiB.")
    if blank_line is None:
        if eof and buffer:
            raise BadRequest(400, "The request ended too soon.")
        return None
    return Head(line.split(b" ")[1].decode(), host_header(bytes(buffer[line_end + 1 : end])))


def check_request_line(line: bytes, whole: bool) -> None:
    """Raise BadRequest if a request line, or the start of one, is no GET with a target of ours."""
    method, space, rest = line.partition(b" ")
    if (not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{0,16}", method)
            or (space or whole) and not method):
        raise BadRequest(400, "This is not an HTTP request.")
    if space and method != b"GET":
        raise BadRequest(405, "Only GET is answered here.")
    if rest and not rest.startswith(b"/"):
        raise BadRequest(400, "The request's target must be a path.")
    if whole and not re.fullmatch(rb"GET /[!-\"$-~]* HTTP/1\.[0-9]\r?", line):
        raise BadRequest(400, "This is not a request of HTTP/1.x.")


def host_header(headers: bytes) -> str:
    """The one Host among the header lines. Raises BadRequest, also for a body announced."""
    hosts = []
    if headers.count(b"\n") >= FIELDS:
        raise BadRequest(431, "The request has too many header lines.")
    for line in headers.split(b"\n") if headers else ():
        match = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r?", line)
        if match is None:
            raise BadRequest(400, "A header line is malformed.")
        name, value = match[1].lower(), match[2].strip(b" \t")
        if name == b"host":
            hosts.append(value.decode("latin-1"))
        if name == b"transfer-encoding" or name == b"content-length" and value != b"0":
            raise BadRequest(413, "A request with a body is not answered here.")
    if len(hosts) != 1:
        raise BadRequest(400, "The request must have exactly one Host.")
    return hosts[0]


def redirect_matches(redirect_uri: str, scheme: str, head: Head) -> bool:
    """Does a request arrive at this redirect URI? It may carry more query pairs, but none less."""
    expected = urllib.parse.urlsplit(redirect_uri)
    path, _, query = head.target.partition("?")
    host = head.host.lower().removesuffix(":80" if scheme == "http" else ":443")
    given = urllib.parse.parse_qsl(query, keep_blank_values=True)
    wanted = urllib.parse.parse_qsl(expected.query, keep_blank_values=True)
    return (
        (expected.scheme, expected.netloc, expected.path) == (scheme, host, path)
        and all(given.count(pair) >= wanted.count(pair) for pair in wanted)
    )


def page(status: int, text: str) -> bytes:
    """A whole HTTP response with a text for a person, in which all from outside is escaped."""
    style = ("body{font:1.1em/1.5 sans-serif;max-width:36em;margin:15vh auto;padding:0 1em;"
             "overflow-wrap:anywhere}")
    body = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>pizauth</title><style>{style}</style>"
        f"<h1>pizauth</h1><p>{html_text(printable(text))}</p></html>\n"
    ).encode()
    digest = binascii.b2a_base64(sha256(style.encode()), newline=False).decode()
    headers = [
        f"HTTP/1.1 {status} {STATUS_TEXTS[status]}",
        "Content-Type: text/html; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "Cache-Control: no-store",
        "Referrer-Policy: no-referrer",
        "X-Content-Type-Options: nosniff",
        (f"Content-Security-Policy: default-src 'none'; style-src 'sha256-{digest}';"
         " frame-ancestors 'none'"),
        *(["Allow: GET"] if status == 405 else []),
    ]
    return "\r\n".join([*headers, "", ""]).encode() + body


def refusal(error: PizauthError) -> bytes:
    """What a refused peer reads: a browser a page, a control client `error:` and a sentence."""
    if isinstance(error, BadRequest):
        return page(error.status, str(error))
    return f"error:{error}".encode("utf-8", "replace")


# ---- Time and token states ----
# Records that Authenticator replaces when their meaning changes; the fields with a default are its
# bookkeeping. Moments are by the clock that counts suspend. Empty is None.


class Clock:
    """The time, by a clock that counts suspension and by the wall's. Tests have their own."""

    now: Callable[[], float]  # gives seconds since some moment, which nobody sets back

    def __init__(self) -> None:
        boottime = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self.now = partial(time.clock_gettime, boottime)

    def wall(self) -> float:
        """Seconds since the epoch, as far as the machine knows."""
        return time.time()

    def date(self, moment: float) -> str:
        """A moment of now() as local time, in the form of RFC 2822."""
        seconds = self.wall() - self.now() + moment
        return time.strftime("%a, %d %b %Y %H:%M:%S %z", time.localtime(seconds))


class Pending(Record):
    """An authorization request is out; while `form` is set, its code is being exchanged."""

    state: str
    code_verifier: str
    redirect_uri: str
    url: str
    remind_at: float
    notified_at: float | None = None
    form: Fields | None = None
    tries: int = 0
    retry_at: float | None = None
    cancel: Cancel | None = None  # set while a token request runs
    browsers: tuple[tuple[float, Answer], ...] = ()  # who waits for the outcome, and until when


class Active(Record):
    """There is an access token; it may have expired, and may come with a refresh token or not."""

    access_token: str
    obtained_at: float
    expires_at: float
    refresh_token: str | None
    wanted: bool = False  # did somebody ask for a refresh that could not start at once?
    cancel: Cancel | None = None  # set while a refresh runs
    attempted_at: float | None = None
    failed_at: float | None = None
    failures: int = 0  # in a row
    retry_after: float = 0

    def refresh_due(self, account: Account) -> float:
        """When the next refresh starts, if none runs (by the schedule in pizauth.conf(5))."""
        if self.wanted:
            return 0
        if self.failed_at is not None:
            return self.failed_at + max(account.refresh_retry, self.retry_after)
        floor = self.obtained_at + min(LEAST_AGE, (self.expires_at - self.obtained_at) / 2)
        due = max(self.expires_at - account.refresh_before_expiry, floor)
        return max(min(due, self.obtained_at + account.refresh_at_least),
                   self.obtained_at + REFRESH_GAP)


# ---- Dump ----
# A dump is version 1 of pizauth's own format, so that it restores there, and one made there here:
# a nonce, then the states, little-endian, sealed with ChaCha20-Poly1305 (RFC 8439). Bytes that are
# no dump are a RequestError, before anything is allocated that they do not warrant.

DUMP_VERSION = 1
DUMP_KEY = bytes.fromhex("66a247a85e48cfecaaed9b36eba97d5350d4286375097a44eeffb9c4546b65a3")
# No secret: sealed, a dump's tokens are not found by grep and strings, and that is all.


class Dumped(Record):
    """A token in a dump. Moments are in seconds after the epoch."""

    access_token: str
    obtained: float
    expires: float
    refresh_token: str | None


def dump_number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


def dump_string(text: str) -> bytes:
    return dump_number(len(text.encode())) + text.encode()


def dump_optional(text: str | None) -> bytes:
    return b"\0" if text is None else b"\1" + dump_string(text)


def dump_list(items: tuple[Any, ...]) -> bytes:
    """A list of strings, or of tuples of strings."""
    flat = [text for item in items for text in ((item,) if isinstance(item, str) else item)]
    return dump_number(len(items)) + b"".join(map(dump_string, flat))


def dump_time(moment: float) -> bytes:
    seconds, nanoseconds = divmod(max(0, round(moment * 1e9)), 10**9)
    return dump_number(seconds) + dump_number(nanoseconds, 4)


def dump_bytes(accounts: list[tuple[Account, Dumped | None]]) -> bytes:
    """The plaintext of a dump: accounts and their states."""
    parts = [dump_number(DUMP_VERSION), dump_number(len(accounts))]
    for account, token in accounts:
        parts.append(dump_string(account.name))
        for field, value in account.security().items():
            form = account.__annotations__[field]
            writer = {"str": dump_string, "str | None": dump_optional}.get(form, dump_list)
            parts.append(writer(value))
        parts.append(dump_number(token is not None, 4))
        if token is not None:
            parts += [dump_string(token.access_token), dump_time(token.obtained),
                      dump_time(token.expires), dump_optional(token.refresh_token)]
    return b"".join(parts)


class DumpReader:
    """Takes the plaintext of a dump apart, from its start."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise RequestError("This dump ends too soon")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int = 8) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError:
            raise RequestError("This dump holds text that is not UTF-8") from None

    def choice(self, size: int) -> bool:
        """Is there a value, or not?"""
        number = self.number(size)
        if number > 1:
            raise RequestError("This dump is of a kind that this version does not know")
        return number == 1

    def optional(self) -> str | None:
        return self.string() if self.choice(1) else None

    def time(self) -> float:
        return self.number() + self.number(4) / 1e9

    def field(self, form: str) -> object:
        """A field of Account, whose form its annotation tells."""
        if form == "str":
            return self.string()
        if form == "str | None":
            return self.optional()
        if form == "tuple[str, ...]":
            return tuple(self.string() for _ in range(self.number()))
        return tuple((self.string(), self.string()) for _ in range(self.number()))

    def state(self) -> Dumped | None:
        if not self.choice(4):
            return None
        return Dumped(self.string(), self.time(), self.time(), self.optional())


def read_dump(plaintext: bytes) -> Iterator[tuple[str, dict[str, Any], Dumped | None]]:
    """Name, security-relevant options and state of each account, one at a time: all at once would
    leave a server that restores 1,000 with 2 MiB of holes. What follows them is not for us."""
    reader = DumpReader(plaintext)
    if reader.number() != DUMP_VERSION:
        raise RequestError("This dump is of a version that is not known here")
    forms = {field: Account.__annotations__[field] for field in Account.security_fields()}
    for _ in range(reader.number()):
        name = reader.string()
        yield name, {field: reader.field(forms[field]) for field in forms}, reader.state()


def chacha20(key: bytes, counter: int, nonce: bytes, data: bytes) -> bytes:
    """Data xor the key stream (RFC 8439 2.4), 64 KiB at a time, which bounds the memory."""
    return b"".join(chacha20_slice(key, counter + at // 64, nonce, data[at : at + CHUNK])
                    for at in range(0, len(data), CHUNK))


def chacha20_slice(key: bytes, counter: int, nonce: bytes, data: bytes) -> bytes:
    """A piece of that: all blocks at once.

    Each word of the state is one big integer with a 64-bit lane a block, whose
    upper half takes carries and rotations until the mask clears it. 17 times as fast as block by
    block, so that a dump of 100 accounts can be made in the loop.
    """
    blocks = -(-len(data) // 64)
    ones = int.from_bytes((b"\1" + bytes(7)) * blocks, "little")
    mask = ones * 0xFFFFFFFF
    counters = b"".join(dump_number(counter + block) for block in range(blocks))
    setup = b"expand 32-byte k" + key + bytes(4) + nonce
    words = [int.from_bytes(setup[at : at + 4], "little") * ones for at in range(0, 64, 4)]
    words[12] = int.from_bytes(counters, "little")
    state = words[:]
    columns = [(i, 4 + i, 8 + i, 12 + i) for i in range(4)]
    diagonals = [(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4)]
    for a, b, c, d in (columns + diagonals) * 10:
        for x, y, z, left in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = state[x] + state[y] & mask
            mixed = state[z] ^ state[x]
            state[z] = (mixed << left | mixed >> 32 - left) & mask
    lanes = [(a + b & mask).to_bytes(8 * blocks, "little") for a, b in zip(state, words)]
    stream = b"".join(lane[at : at + 4] for at in range(0, 8 * blocks, 8) for lane in lanes)
    size = len(data)
    number = int.from_bytes(data, "little") ^ int.from_bytes(stream[:size], "little")
    return number.to_bytes(size, "little")


def poly1305(key: bytes, data: bytes) -> bytes:
    """The tag of data under a key used once (RFC 8439 2.5)."""
    r, s = int.from_bytes(key[:16], "little"), int.from_bytes(key[16:], "little")
    r &= 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    tag = 0
    for at in range(0, len(data), 16):
        tag = (tag + int.from_bytes(data[at : at + 16] + b"\1", "little")) * r % ((1 << 130) - 5)
    return (tag + s & (1 << 128) - 1).to_bytes(16, "little")


def aead_tag(nonce: bytes, ciphertext: bytes) -> bytes:
    """The tag that seals a ciphertext without associated data (RFC 8439 2.8)."""
    message = ciphertext + bytes(-len(ciphertext) % 16) + bytes(8) + dump_number(len(ciphertext))
    return poly1305(chacha20(DUMP_KEY, 0, nonce, bytes(32)), message)


def seal(nonce: bytes, plaintext: bytes) -> bytes:
    """A dump of these bytes; the nonce is 12 bytes, random."""
    ciphertext = chacha20(DUMP_KEY, 1, nonce, plaintext)
    return nonce + ciphertext + aead_tag(nonce, ciphertext)


def check_seal(dump: bytes) -> None:
    """Raise RequestError if these bytes were not sealed so. (The key is no secret: plain `!=`.)"""
    if len(dump) < 28 or aead_tag(dump[:12], dump[12:-16]) != dump[-16:]:
        raise RequestError("This is no dump of pizauth's, or it was changed or cut short")


def unseal(dump: bytes) -> bytes:
    """What was sealed. Raises RequestError if these bytes were not sealed so."""
    check_seal(dump)
    return chacha20(DUMP_KEY, 1, dump[:12], dump[12:-16])


# ---- Authenticator ----
# All state and every transition. It has no socket, process or clock of its own: time, token
# requests, commands and the log are given to it. What it hears comes through control(),
# redirected(), run_due(), hang_up(), reconfigure() and the outcomes of what it asked for.


SUPERSEDED = "This authorization request is void: there is a newer one, or the account has changed."
# What transient_error_if_cmd may end with that does not end the login: yes, go on; the shell could
# not start it; or somebody stopped it together with us (SIGHUP, SIGINT, SIGTERM).
NO_VERDICT = (0, 126, 127, -1, -2, -15)
NO_REFRESH_TOKEN = (
    "the provider gave no refresh token, so this account must be authorised again when its access"
    " token expires; what usually helps is the scope offline_access, or prompt=consent in"
    " auth_uri_fields (beside access_type=offline, which is always sent)"
)


class Authenticator:
    """The accounts' tokens and what may be done with them.

    `post(uri, form, urgent, then)` starts a token request, calls `then(outcome)` on a later pass,
    and returns a Cancel; so does `run(command, environment, limit, then)` for a command, whose
    `then` is an Ended. One without a limit (FOR_EVER) is cancelled without its children.
    """

    def __init__(self, config: Config, clock: Clock,
                 post: Callable[[str, Fields, bool, Callable[[bytes], None]], Cancel],
                 run: Callable[[str, Fields, float, Ended], Cancel],
                 log: Callable[[int, str], None]) -> None:
        self.config = config
        self.ports: dict[str, int | None] = {"http": None, "https": None}  # of redirect listeners
        self.about_https: Fields = {}  # what else `info` tells of the HTTPS listener
        self.reload: Callable[[], None] = lambda: None  # rereads the file; raises PizauthError
        self.stopping = False
        self._clock, self._post, self._run, self._log = clock, post, run, log
        self._tokens: dict[str, Pending | Active | None] = dict.fromkeys(config.accounts)
        self._states: dict[str, str] = {}  # which account's Pending has this `state`
        self._errors: dict[str, tuple[float, str]] = {}  # when and why an account's last try failed
        self._not_before: dict[str, float] = {}  # an account's next refresh, whoever asks for it
        self._events: list[tuple[str, str]] = []  # to be told; the first is being told
        self._notifiers: dict[str, Cancel] = {}  # each account's last auth_notify_cmd
        self._deadline: float | None = None  # None if not known

    # What is due, and when.

    def deadline(self) -> float:
        """The moment at which run_due() next has something to do; FOR_EVER if never."""
        if self._deadline is None:
            self._deadline = min((moment for moment, *_ in self._appointments()), default=FOR_EVER)
        return self._deadline

    def run_due(self) -> None:
        """Do everything that is due by now."""
        now = self._clock.now()
        if self.deadline() > now:
            return
        for moment, act, name, token in list(self._appointments()):
            if moment <= now:  # no act replaces a token that has another appointment
                act(name, token)
        self._rescheduled()

    def _appointments(self) -> Iterator[tuple[float, Callable[..., None], str, Any]]:
        """All that is scheduled: when, what, and for which token."""
        for name, token in self._tokens.items():
            if isinstance(token, Pending):
                yield token.remind_at, self._remind, name, token
                if token.retry_at is not None:
                    yield token.retry_at, self._exchange, name, token
                if token.browsers:
                    yield token.browsers[0][0], self._let_browsers_go, name, token
            elif isinstance(token, Active) and token.refresh_token is None:
                yield token.expires_at, self._expire, name, token
            elif isinstance(token, Active) and token.cancel is None:
                due = token.refresh_due(self.config.accounts[name])
                yield max(due, self._not_before.get(name, 0)), self._refresh, name, token

    def _rescheduled(self) -> None:
        """Every change of what _appointments() yields ends here."""
        self._deadline = None

    # Transitions.

    def _replace(self, name: str, token: Pending | Active | None, event: str | None,
                 told: str = "") -> None:
        """Change an account's state: the only way to. Browsers waiting for the old are told why."""
        old = self._tokens[name]
        self._tokens[name] = token
        if isinstance(old, Pending):
            del self._states[old.state]
        if isinstance(token, Pending):
            self._states[token.state] = name
        self._rescheduled()
        self._log(INFO, f"{name}: {'no token' if token is None else type(token).__name__.lower()}"
                  + (f" ({event})" if event else ""))
        if old is not None and old.cancel is not None:
            old.cancel()
        if isinstance(old, Pending):
            for _, answer in old.browsers:
                answer(page(200, told))
        if event is not None:
            self._tell_event(name, event)

    def _request_authorization(self, account: Account) -> Pending:
        """Make a fresh authorization request and wait for the person to visit its URL."""
        state, code_verifier = base64url(os.urandom(32)), base64url(os.urandom(64))
        redirect_uri = self._redirect_uri(account)
        url = authorization_request(account, state, code_verifier, redirect_uri)
        pending = Pending(state, code_verifier, redirect_uri, url, remind_at=self._clock.now())
        self._replace(account.name, pending, None, SUPERSEDED)
        return pending

    def _redirect_uri(self, account: Account) -> str:
        """Where the browser is sent back to: the listener of the configured URI's scheme."""
        port = self.ports[split_uri(account.redirect_uri).scheme]
        assert port is not None, "the server neither starts nor reloads without that listener"
        return account.redirect_uri_at(port)

    def _remind(self, name: str, pending: Pending) -> None:
        """Remind the person of the URL; the Pending stays, and with it an exchange in flight."""
        now = self._clock.now()
        pending.notified_at = now
        pending.remind_at = now + max(self.config.auth_notify_interval, REMINDER_GAP)
        self._rescheduled()
        if self.config.auth_notify_cmd is not None:
            self._notifiers.pop(name, lambda: None)()  # it may have waited for a click until now
            self._notifiers[name] = self._command(
                "auth_notify_cmd", name, {"PIZAUTH_URL": pending.url}, FOR_EVER)

    def _let_browsers_go(self, name: str, pending: Pending) -> None:
        """Answer the browsers that have waited long enough for the outcome."""
        now, browsers = self._clock.now(), pending.browsers
        pending.browsers = tuple((until, answer) for until, answer in browsers if until > now)
        self._rescheduled()
        for _, answer in browsers[: len(browsers) - len(pending.browsers)]:
            answer(page(200, "pizauth processing authentication: you can safely close this page."))

    def _exchange(self, name: str, pending: Pending) -> None:
        """Post the code (RFC 6749 4.1.3), for the first time or again."""
        assert pending.form is not None
        pending.tries += 1
        pending.retry_at = None
        uri = normal_uri(self.config.accounts[name].token_uri)
        pending.cancel = self._post(
            uri, pending.form, True, partial(self._exchanged, name, pending))
        self._rescheduled()

    def _exchanged(self, name: str, pending: Pending, outcome: bytes) -> None:
        """The token endpoint's answer to a code."""
        if self._tokens.get(name) is not pending:
            return  # revoked, reloaded or asked for anew while the request was in flight
        assert pending.form is not None
        pending.cancel = None
        try:
            response = token_response(outcome, pending.form)
        except TokenError as error:
            if isinstance(error, TransientError) and error.outage and pending.tries < CODE_TRIES:
                pending.retry_at = self._clock.now() + CODE_RETRY_INTERVAL
                self._rescheduled()
                message = f"Authentication for {name} failed, and will be tried again: {error}"
                self._failed(name, message, INFO)
            else:
                self._login_failed(name, None, f"Authentication for {name} failed: {error}")
        else:
            self._obtained(name, response, response.refresh_token, "token_new")
            if response.refresh_token is None:
                self._log(WARNING, f"{name}: {NO_REFRESH_TOKEN}")

    def _obtained(self, name: str, response: TokenResponse, refresh_token: str | None,
                  event: str) -> None:
        """A new access token takes the place of whatever was there."""
        now = self._clock.now()
        life = response.expires_in or min(self.config.accounts[name].refresh_at_least, LIFE_LIMIT)
        token = Active(response.access_token, now, now + life, refresh_token)
        self._errors.pop(name, None)
        self._replace(
            name, token, event, f"Account {name} is authorised: you can safely close this page.")

    def _refresh(self, name: str, token: Active) -> None:
        """Post the refresh token (RFC 6749 6)."""
        assert token.refresh_token is not None
        account, now = self.config.accounts[name], self._clock.now()
        form = refresh_request(account, token.refresh_token)
        token.wanted, token.attempted_at = False, now
        self._not_before[name] = now + REFRESH_GAP
        token.cancel = self._post(normal_uri(account.token_uri), form, False,
                                  partial(self._refreshed, name, token, form))
        self._log(DEBUG, f"{name}: refreshing")
        self._rescheduled()

    def _refreshed(self, name: str, token: Active, form: Fields, outcome: bytes) -> None:
        """The token endpoint's answer to a refresh token."""
        if self._tokens.get(name) is not token:
            return  # revoked, reloaded or restored while the request was in flight
        token.cancel = None
        try:
            response = token_response(outcome, {**form, "access_token": token.access_token})
        except TransientError as error:
            token.failures += 1
            token.failed_at, token.retry_after = self._clock.now(), error.retry_after
            self._rescheduled()
            self._failed(name, f"Refreshing {name} failed, and will be tried again: {error}", INFO)
            if token.failures % VERDICT_FAILURES == 0 and self.config.transient_error_if_cmd:
                token.cancel = self._command("transient_error_if_cmd", name, {}, VERDICT_LIMIT,
                                             partial(self._judged, name, token))
        except PermanentError as error:
            self._login_failed(name, "token_invalidated", f"Refreshing {name} failed: {error}")
        else:
            refresh_token = response.refresh_token or token.refresh_token
            self._obtained(name, response, refresh_token, "token_refreshed")

    def _judged(self, name: str, token: Active, status: int | None, reason: bytes) -> None:
        """transient_error_if_cmd has spoken; if it could not be asked, the login is kept."""
        if self._tokens.get(name) is not token:
            return  # revoked, reloaded or restored while it ran
        token.cancel = None
        self._rescheduled()
        if status in NO_VERDICT or reason or self.stopping:
            return
        self._replace(name, None, "token_invalidated")
        self._failed(name, f"Refreshing {name} failed for good, says transient_error_if_cmd", ERROR)

    def _expire(self, name: str, token: Active) -> None:
        """An access token without a refresh token has reached the end of its life."""
        self._replace(name, None, "token_invalidated")

    def _login_failed(self, name: str, event: str | None, message: str) -> None:
        """The provider or the person said no, or there was no answer to be had: tell the person."""
        self._replace(name, None, event, message)
        notify = self.config.error_notify_cmd is not None
        self._failed(name, message, INFO if notify else ERROR)
        if notify:
            variables = {"PIZAUTH_MSG": printable(message)}
            self._command("error_notify_cmd", name, variables, ERROR_LIMIT)

    def _failed(self, name: str, message: str, level: int) -> None:
        """Remember an account's failure for `status`, and log it."""
        message = printable(message)  # an account's name may be anything
        self._errors[name] = (self._clock.now(), message)
        self._log(level, message)

    # Shell commands.

    def _command(self, option: str, name: str, variables: Fields, limit: float,
                 then: Ended = lambda status, output: None) -> Cancel:
        """Run an option's command about an account; the log hears if it fails."""

        def ended(status: int | None, output: bytes) -> None:
            if status != 0 or output:
                how = f"killed after {limit} s" if status is None else f"ended with status {status}"
                self._log(ERROR, f"{option} for {name}: {output.decode('utf-8', 'replace') or how}")
            then(status, output)

        environment = {"PIZAUTH_ACCOUNT": name, **variables}
        return self._run(getattr(self.config, option), environment, limit, ended)

    def _tell_event(self, name: str, event: str) -> None:
        """Have token_event_cmd told of an event, after those before it."""
        if self.config.token_event_cmd is not None:
            self._events.append((name, event))
            if len(self._events) == 1:
                self._tell_next_event()

    def _tell_next_event(self) -> None:
        name, event = self._events[0]
        variables = {"PIZAUTH_EVENT": event}
        self._command("token_event_cmd", name, variables, EVENT_LIMIT, self._event_told)

    def _event_told(self, status: int | None, output: bytes) -> None:
        del self._events[0]
        if self.config.token_event_cmd is None:  # since a reload
            self._events.clear()
        if self._events:
            self._tell_next_event()

    # The redirect listeners.

    def redirected(self, scheme: str, head: Head, answer: Answer) -> None:
        """Answer a browser, which may bring an authorization response."""
        try:
            self._redirected(scheme, head, answer)
        except BadRequest as error:
            self._log(DEBUG, f"A browser request was refused: {error}")
            answer(refusal(error))

    def _redirected(self, scheme: str, head: Head, answer: Answer) -> None:
        """The decision, in the order that lets no stray or forged request touch any state."""
        response = authorization_response(head.target.partition("?")[2])
        if response.state is None:
            raise BadRequest(404, "There is nothing here.")
        name = self._states.get(response.state, "")  # of 256 random bits (RFC 6749 10.12)
        pending = self._tokens.get(name)
        if not isinstance(pending, Pending):
            return answer(
                page(200, "No pending token matches request state: request a fresh token"))
        if not redirect_matches(pending.redirect_uri, scheme, head):
            raise BadRequest(404, "This is not the address that the account redirects to.")
        if pending.form is None:  # else this is told the outcome of the code that came first
            if response.error is not None:
                words = filter(None, (response.error, response.error_description))
                reason = printable(": ".join(words))[:500] or "no reason given"
                message = f"Authentication for {name} failed: {reason}"
                self._login_failed(name, None, message)
                raise BadRequest(400, message)
            if not response.code:
                raise BadRequest(400, "The address has no 'code': request a fresh token.")
            pending.form = access_token_request(
                self.config.accounts[name], response.code, pending.code_verifier,
                pending.redirect_uri)
            self._exchange(name, pending)
        pending.browsers += ((self._clock.now() + BROWSER_PATIENCE, answer),)
        self._rescheduled()

    # The control protocol: a method for each verb, their table, and the dispatch.

    def _dump(self, rest: bytes, answer: Answer) -> None:
        answer(seal(os.urandom(12), dump_bytes([
            (account, self._dumped(name)) for name, account in self.config.accounts.items()])))

    def _info(self, rest: bytes, answer: Answer) -> None:
        ports = {f"{scheme}_port": str(port or "none") for scheme, port in self.ports.items()}
        about_https = self.about_https if self.ports["https"] else {}
        answer(json.dumps({**ports, **about_https}).encode())

    def _refresh_now(self, rest: bytes, answer: Answer) -> None:
        """A refresh, or a fresh request if there is nothing to refresh; nobody waits for it."""
        with_url, account = self._option_and_account(rest)
        token = self._current(account.name)
        if not isinstance(token, Active):
            return answer(self._pending_reply(self._request_authorization(account), with_url))
        if token.refresh_token is None:
            until = self._clock.date(token.expires_at)
            raise RequestError(f"'{account.name}' has no refresh token;"
                               f" its access token lasts until {until}")
        self._refresh_wanted(account.name, token)
        answer(b"scheduled:")

    def _reload(self, rest: bytes, answer: Answer) -> None:
        self.reload()
        answer(b"ok:")

    def _restore(self, rest: bytes, answer: Answer) -> None:
        """Take tokens from a dump for accounts that have none and are what they were."""
        fitting = []
        for name, security, dumped in read_dump(unseal(rest)):
            account = self.config.accounts.get(name)
            unchanged = account is not None and account.security() == security
            if unchanged and dumped is not None and not isinstance(self._tokens[name], Active):
                fitting.append((name, self._revived(dumped)))
        for name, token in fitting:  # only now: a dump that ends too soon changes nothing
            self._replace(name, token, None, SUPERSEDED)
        self._log(INFO, f"Restored the tokens of {len(fitting)} account(s)")
        answer(b"ok:")

    def _revoke(self, rest: bytes, answer: Answer) -> None:
        account = self._account(rest)
        self._errors.pop(account.name, None)
        self._replace(account.name, None, "token_revoked", SUPERSEDED)
        answer(b"ok:")

    def _showtoken(self, rest: bytes, answer: Answer) -> None:
        with_url, account = self._option_and_account(rest)
        token = self._current(account.name)
        if not isinstance(token, Active):
            pending = token or self._request_authorization(account)
            return answer(self._pending_reply(pending, with_url))
        if self._clock.now() < token.expires_at:
            return answer(b"access_token:" + token.access_token.encode())
        if token.cancel is not None:
            return answer(b"error:Access token has expired."
                          b" Refreshing is in progress but has not yet succeeded")
        self._refresh_wanted(account.name, token)
        answer(b"error:Access token has expired. Refreshing initiated")

    def _shutdown(self, rest: bytes, answer: Answer) -> None:
        self.stopping = True  # and the client is let go when all has ended

    def _status(self, rest: bytes, answer: Answer) -> None:
        lines = [self._status_line(name) for name in sorted(self._tokens)]
        answer(("ok:" + "\n".join(lines)).encode() if lines else b"error:No accounts configured")

    _VERBS = {
        b"dump": _dump,
        b"info": _info,
        b"refresh": _refresh_now,
        b"reload": _reload,
        b"restore": _restore,
        b"revoke": _revoke,
        b"showtoken": _showtoken,
        b"shutdown": _shutdown,
        b"status": _status,
    }

    def control(self, request: bytes, answer: Answer) -> None:
        """Answer a control client's request."""
        verb, colon, rest = request.partition(b":")
        try:
            if not colon or verb not in self._VERBS:
                raise RequestError(
                    "Unknown request: is the client of another version than the server?")
            self._log(TRACE, f"Control request: {verb.decode()}")
            self._VERBS[verb](self, rest, answer)
        except PizauthError as error:
            self._log(WARNING, "A control request was refused: " + str(error).partition("\n")[0])
            answer(refusal(error))

    def _option_and_account(self, rest: bytes) -> tuple[bool, Account]:
        """Split `OPTION NAME`: is the URL wanted, and which account?"""
        option, _, name = rest.partition(b" ")
        return option == b"withurl", self._account(name)

    def _account(self, raw: bytes) -> Account:
        name = raw.decode("utf-8", "replace")
        if name not in self.config.accounts:
            raise RequestError(f"No account '{printable(name)}'")
        return self.config.accounts[name]

    def _current(self, name: str) -> Pending | Active | None:
        """An account's state now; a token that has expired for good is dropped first."""
        token = self._tokens[name]
        if (isinstance(token, Active) and token.refresh_token is None
                and token.expires_at <= self._clock.now()):
            self._expire(name, token)
        return self._tokens[name]

    def _refresh_wanted(self, name: str, token: Active) -> None:
        """Refresh as soon as may be, whatever the schedule or Retry-After say."""
        if token.cancel is not None or self.stopping:
            return  # one runs already, or its outcome would be lost with us
        if self._not_before.get(name, 0) <= self._clock.now():
            self._refresh(name, token)
        else:
            token.wanted = True
            self._rescheduled()

    def _dumped(self, name: str) -> Dumped | None:
        """An account's state as a dump has it: by the wall's clock."""
        token, offset = self._tokens[name], self._clock.wall() - self._clock.now()
        if not isinstance(token, Active):
            return None
        return Dumped(token.access_token, token.obtained_at + offset, token.expires_at + offset,
                      token.refresh_token)

    def _revived(self, dumped: Dumped) -> Active:
        """A dumped state by our clock; what the wall's clock cannot be right about has expired."""
        now, wall = self._clock.now(), self._clock.wall()
        life = min(max(dumped.expires - dumped.obtained, 0), LIFE_LIMIT)
        left = min(dumped.expires - wall, life) if dumped.obtained <= wall else 0
        expires_at = now + left
        return Active(dumped.access_token, expires_at - life, expires_at, dumped.refresh_token)

    # What changes with the configuration, and at the end.

    def hang_up(self) -> None:
        """SIGHUP has come: reload, and tell the log if that fails."""
        try:
            self.reload()
        except PizauthError as error:
            self._log(ERROR, "The configuration was not reloaded: " + str(error).partition("\n")[0])

    def reconfigure(self, config: Config, ports: dict[str, int | None]) -> None:
        """Take a new configuration; an account that is still what it was keeps its state."""
        before, self.config, self.ports = self.config, config, ports
        for name, account in before.accounts.items():
            after = config.accounts.get(name)
            if after is None or after.security() != account.security():
                self._errors.pop(name, None)
                if after is None:
                    self._not_before.pop(name, None)
                    self._notifiers.pop(name, lambda: None)()  # there will be no next to end it
                self._replace(name, None, None, SUPERSEDED)
        self._tokens = {name: self._tokens.get(name) for name in config.accounts}
        self._rescheduled()
        for name, token in self._tokens.items():
            account = config.accounts[name]
            if isinstance(token, Pending) and token.redirect_uri != self._redirect_uri(account):
                self._request_authorization(account)

    def busy(self) -> bool:
        """Is an event untold?"""
        return bool(self._events)

    def farewell(self) -> None:
        """Tell the browsers that wait that there will be no outcome."""
        for token in self._tokens.values():
            for _, answer in token.browsers if isinstance(token, Pending) else ():
                answer(page(200, "pizauth was stopped: start it and request a fresh token."))

    def _pending_reply(self, pending: Pending, with_url: bool) -> bytes:
        return b"pending:" + (pending.url.encode() if with_url else b"")

    def _status_line(self, name: str) -> str:
        """What `status` says of an account; never a token."""
        token, date = self._tokens[name], self._clock.date
        if token is None:
            text = "No access token"
        elif isinstance(token, Pending):
            text = "Access token pending authentication"
            if token.notified_at is not None:
                text += f" (last notification {date(token.notified_at)})"
        elif self._clock.now() < token.expires_at:
            text = (f"Active access token (obtained {date(token.obtained_at)};"
                    f" expires {date(token.expires_at)})")
        elif token.attempted_at is None:
            text = "Access token expired (refresh not yet attempted)"
        else:
            text = f"Access token expired (last refresh attempt {date(token.attempted_at)})"
        if name in self._errors:
            at, error = self._errors[name]
            text += f"; last error at {date(at)}: {error}"
        return f"{printable(name)}: {text}"


# ---- What children do ----
# These run in forked children (limit_resources() in the server, too) and may block. They see what
# they were forked with, and what they return goes through a pipe.


def run_child(work: Callable[[], bytes], pipe: int, limit: float, nice: int) -> NoReturn:
    """Be a child: drop what is the server's, write what work() returns into the pipe, end."""
    try:
        os.nice(nice)  # first of all: the 99th percentile of showtoken is 5 ms then, else 18
        gc.freeze()  # a finaliser of the server's would close descriptors that are ours by then
        gc.disable()
        signal.set_wakeup_fd(-1)
        # Ctrl-C and systemd reach the whole group, and an answer may hold a rotated token.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if limit < FOR_EVER:
            signal.alarm(int(limit) + AFTER_SLEEP + 2)  # should the server not be there to kill us
        os.closerange(3, pipe)  # a killed server's port and lock would live on in us
        os.closerange(pipe + 1, DESCRIPTORS)
        write_all(pipe, work())
        os._exit(0)
    finally:
        os._exit(1)


def limit_resources(descriptors: int) -> int:
    """Runs in the server and in its commands: no core file, which may hold tokens, and this soft
    limit of descriptors, or the hard one if that is less. The soft limit before."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = descriptors if hard == resource.RLIM_INFINITY else min(descriptors, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return before


def run_command(command: str, variables: Fields, descriptors: int) -> bytes:
    """Runs in a child, which becomes a shell: returns only if there is none, and then says so."""
    shell = os.environ.get("SHELL") or "/bin/sh"
    try:
        os.setsid()  # a group of its own, to be killed as one, which the terminal's Ctrl-C spares
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE,
                       signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        try:
            limit_resources(descriptors)
        except ValueError:
            pass  # macOS takes no infinite limit back
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        ours = {name.encode(): value.replace("\0", "").encode("utf-8", "replace")
                for name, value in variables.items()}  # whatever the locale
        arguments = [os.fsencode(shell), b"-c", command.encode()]
        os.execve(shell, arguments, {**os.environb, **ours})
    except Exception as error:  # whatever it is, it is not the command's verdict
        return f"cannot start {shell}: {error}".encode("utf-8", "replace")


def post_form(uri: str, form: Fields) -> bytes:
    """Runs in a child: post a form and return outcome_bytes()."""
    import http.client
    import urllib.request

    class AnyStatus(urllib.request.HTTPErrorProcessor):
        def http_response(self, request: Any, response: Any) -> Any:
            return response  # a redirect is not followed: it would carry secrets elsewhere

        https_response = http_response

    socket.create_connection = connect  # type: ignore[assignment]  # in this process alone
    headers = {"Accept": "application/json", "User-Agent": f"pizauth.py/{VERSION}"}
    request = urllib.request.Request(uri, urllib.parse.urlencode(form).encode(), headers)
    proxies = {} if is_loopback(uri) else urllib.request.getproxies_environment()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), AnyStatus)
    try:
        with opener.open(request) as response:
            body = bytearray(ANSWER_LIMIT + 1)
            size = response.readinto(body)  # read(n) would take a chunk of size -1 for endless
            if response.length and size <= ANSWER_LIMIT:
                raise OSError("the answer was cut short")
            whole = response.length is not None or response.chunked
            delay = retry_after(response.headers.get("Retry-After", ""))
            return outcome_bytes(response.status, delay, whole,
                                 bytes(body[:size]) if size <= ANSWER_LIMIT else b"")
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        host = urllib.parse.urlsplit(uri).netloc
        return outcome_bytes(0, 0, False, f"no answer from {host}: {reason}".encode())


def connect(address: tuple[str, int], *_: object) -> socket.socket:
    """Runs in a child: a connection to a host, whose IPv6 and IPv4 addresses are tried in turn
    (RFC 8305 4): some have eight of one kind, and all may be a black hole. Raises OSError."""
    found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    families = [one[0] for one in found]
    turns = [families[:at].count(family) for at, family in enumerate(families)]
    reason = OSError("no address found")
    for _turn, (*family, _name, place) in sorted(zip(turns, found), key=lambda pair: pair[0]):
        try:
            sock = socket.socket(*family)
            try:
                sock.settimeout(CONNECT_TIMEOUT)
                sock.connect(place)
                sock.settimeout(None)  # an answer given up too soon may have held a rotated token
                return sock
            except OSError:
                sock.close()
                raise
        except OSError as error:
            reason = error
    raise reason


def is_loopback(uri: str) -> bool:
    """Is the host of a URI this machine? No proxy is asked then."""
    host = urllib.parse.urlsplit(uri).hostname or ""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]+){3}", host) is not None


def retry_after(value: str) -> float:
    """The seconds that a Retry-After, maybe a date, asks for (RFC 9110 10.2.3); 0 for nonsense."""
    from email.utils import parsedate_to_datetime

    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    try:
        return max(0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError, IndexError):
        return 0


def mint_certificate() -> bytes:
    """Runs in a child: JSON with a fresh key and certificate for this host, and their fingerprints.

    The object is empty where `cryptography` is not installed. The child is forked before the
    server's own imports, so that both run at the same time, and imports all it needs itself.
    """
    try:
        import json
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        return b"{}"
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = self_signed(key)
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    point = key.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return json.dumps({
        "pem": (private + certificate.public_bytes(pem)).decode(),
        "https_pub_key": point.hex(":").upper(),
        "https_cert_sha256": certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
    }).encode()


def self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Runs in a child: a certificate for this host by all its loopback names."""
    import datetime, ipaddress
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    hosts = dict.fromkeys(("localhost", os.uname().nodename))
    names = [x509.DNSName(host) for host in hosts if host.isascii()]
    addresses = [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1")]
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    end = start + datetime.timedelta(days=825)  # the most that browsers have taken
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pizauth")])
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), start, end)
    for extension, critical in (
        (x509.SubjectAlternativeName([*names, *addresses]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.KeyUsage(True, *[False] * 8), True),  # digital_signature, and none of the others
        (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (identifier, False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256())


# ---- Loop ----
# The only place that waits (but for notify(), a second at most) and, once the server serves, the
# only place that forks. An Exchange that fails takes nothing else with it.


class Tls:
    """The server's side of a TLS connection as a filter of bytes.

    An SSLSocket would not do: one SSL_read of it goes on for as long as its peer sends KeyUpdates.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        import ssl  # not among server_imports(): a server without HTTPS does not carry it

        self.incomplete = ssl.SSLWantReadError
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.connection = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.received = 0

    def decrypt(self, data: bytes) -> bytes:
        """What can be read now that these bytes have come. Raises OSError if they are no TLS."""
        self.received += len(data)
        if self.received > TLS_LIMIT:
            raise OSError("too much TLS around too little HTTP")
        self.incoming.write(data)
        plain = bytearray()
        try:
            while piece := self.connection.read(CHUNK):
                plain += piece
        except self.incomplete:
            pass  # that was all
        return bytes(plain)

    def encrypt(self, data: bytes) -> bytes:
        """These bytes, the last ones, as they are to be sent. Raises OSError before a handshake."""
        self.connection.write(data)
        try:
            self.connection.unwrap()
        except self.incomplete:
            pass  # our part of the closing is said; theirs is not waited for
        return self.outgoing.read()


class Exchange:
    """One connection of either kind: reads a request, parks until it is answered, writes the reply,
    drains, closes.

    `frame(buffer, eof)` gives the request, None if more is needed, or raises PizauthError;
    `respond(request, answer)` gets it.
    """

    # Where each begins: one is made for every request, and most change little of this.
    state = "reading"  # then parked, writing, draining, closed
    watched = 0  # the events that the selector watches for
    outgoing: bytes | memoryview = b""
    eof = False

    def __init__(self, loop: Loop, sock: _socket.socket, kind: str,
                 frame: Callable[[Received, bool], Any], respond: Callable[[Any, Answer], None],
                 *, tls: Tls | None = None) -> None:
        self.loop, self.sock, self.kind, self.tls = loop, sock, kind, tls
        self.frame, self.respond = frame, respond
        self.due = loop.clock.now() + CONNECTION_TIMEOUT  # when it is closed
        self.buffer = Received()
        loop.exchanges[kind][self] = None

    def ready(self, _events: int = 0) -> None:
        """Go on as far as the socket lets us; what goes wrong ends this exchange alone."""
        try:
            if self.outgoing:
                self._write()
            elif self.state != "closed":
                self._read()
        except OSError:
            self.close()  # the peer has gone, or speaks no TLS
        except Exception:
            self._lost()

    def _lost(self) -> None:
        """A bug of ours must end neither the daemon nor, by staying readable, its sleep."""
        self.loop.log(ERROR, "A request was lost to a bug: " + stack_trace())
        self.close()

    def answer(self, reply: bytes) -> None:
        """Send the reply and end; does nothing if the peer has gone meanwhile."""
        if self.state not in ("reading", "parked"):
            return
        self.state, self.due = "writing", self.loop.clock.now() + CONNECTION_TIMEOUT
        try:
            self.outgoing = reply if self.tls is None else self.tls.encrypt(reply)
            self._write()
        except OSError:
            self.close()  # gone, or refused before there was a handshake to say so in

    def close(self) -> None:
        if self.state != "closed":
            self.state = "closed"
            if self.watched:
                self._watch(0)
            self.sock.close()
            self.loop.closed(self)

    def _read(self) -> None:
        """Take in what is there, but not for ever; what comes after the request is discarded."""
        reads, chunk = (READS, READ_CHUNK) if self.tls is None else (1, TLS_CHUNK)
        try:
            for _ in range(reads):
                data = self.sock.recv(chunk)
                self.eof = not data
                if self.eof:
                    break
                if self.state == "reading":
                    self.buffer += data if self.tls is None else self.tls.decrypt(data)
        except BlockingIOError:
            pass  # that is all for now
        if self.state == "reading":
            self._take()
        if self.state == "closed" or self.outgoing:
            return  # _write() watches
        if self.eof and self.state == "draining":
            return self.close()
        spins = self.eof or self.state == "parked" and self.kind == "control"
        self._watch(0 if spins else selectors.EVENT_READ)  # an end of file stays readable

    def _take(self) -> None:
        """Hand the request on, once it is whole."""
        try:
            request = self.frame(self.buffer, self.eof)
            if request is None and len(self.buffer) > REQUEST_LIMIT:
                self.loop.admit_large(self)
        except PizauthError as error:
            self.loop.log(DEBUG, f"A {self.kind} request was refused: {error}")
            return self.answer(refusal(error))
        if request is not None:
            self.state, self.due = "parked", FOR_EVER  # who answers has a limit
            self.buffer.clear()
            try:
                self.respond(request, self.answer)
            except Exception:  # also an OSError, which is not the peer's here
                self._lost()
        elif self.eof:
            self.close()
        elif self.tls is not None and self.tls.outgoing.pending:
            self.outgoing = self.tls.outgoing.read()
            self._write()

    def _write(self) -> None:
        """Send what there is to send; after a reply, end."""
        try:
            while size := len(self.outgoing):
                sent = self.sock.send(self.outgoing)
                self.outgoing = b"" if sent == size else memoryview(self.outgoing)[sent:]
        except BlockingIOError:
            return self._watch(selectors.EVENT_WRITE)
        if self.state == "writing":
            if self.eof:
                return self.close()
            self.state = "draining"  # to close while the peer still sends would throw it all away
            self.sock.shutdown(socket.SHUT_WR)
        self._watch(selectors.EVENT_READ)  # or that was a piece of a handshake

    def _watch(self, events: int) -> None:
        """Have the selector watch for these events; 0: for none."""
        if events == self.watched:
            return
        if not events:
            self.loop.selector.unregister(self.sock)
        elif not self.watched:
            self.loop.selector.register(self.sock, events, self.ready)
        else:
            self.loop.selector.modify(self.sock, events, self.ready)
        self.watched = events


class Listener:
    """A listening socket, whose every connection is an Exchange with this frame() and respond();
    over TLS if there is a context."""

    def __init__(self, loop: Loop, sock: _socket.socket, kind: str,
                 frame: Callable[[Received, bool], Any], respond: Callable[[Any, Answer], None],
                 *, context: ssl.SSLContext | None = None) -> None:
        self.loop, self.kind, self.context = loop, kind, context
        self.frame, self.respond = frame, respond
        self.due = FOR_EVER  # when accepting goes on, if it is paused
        # The half of `socket` that is C: accept() of the other half adds nothing that ready() does
        # not do, and it and its larger object would cost 4 % of the requests a second.
        self.sock = _socket.socket(sock.family, sock.type, 0, sock.detach())
        self.sock.setblocking(False)
        loop.selector.register(self.sock, selectors.EVENT_READ, self.ready)

    def ready(self, _events: int) -> None:
        """Accept what has come, but not for ever."""
        # If nobody else is connected, nobody is kept waiting by one more pass, and to hear that no
        # other connection has come would cost 6 % of the requests a second.
        alone = not any(self.loop.exchanges.values())
        for _ in range(1 if alone else ACCEPTS):
            try:
                descriptor, _address = self.sock._accept()  # type: ignore[attr-defined]
                sock = _socket.socket(self.sock.family, self.sock.type, 0, descriptor)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.loop.pause(self)
                return  # else the peer has gone before we looked
            sock.setblocking(False)
            if self.kind == "control" and not is_our_user(sock):
                self.loop.log(WARNING, "A client of another user was refused")
                sock.close()
            elif self.loop.make_room(self.kind):
                tls = None if self.context is None else Tls(self.context)
                Exchange(self.loop, sock, self.kind, self.frame, self.respond, tls=tls).ready()
            else:
                sock.close()

    def close(self) -> None:
        """Stop listening, and give the port back."""
        if self in self.loop.paused:
            self.loop.paused.remove(self)
        else:
            self.loop.selector.unregister(self.sock)
        try:
            self.sock.shutdown(socket.SHUT_RDWR)  # or a child just forked would still hold the port
        except OSError:
            pass  # some systems know that of connections alone
        self.sock.close()


def is_our_user(sock: _socket.socket) -> bool:
    """Does our user run the peer? Known on Linux alone; elsewhere the directory is the guard."""
    if sys.platform != "linux":
        return True
    try:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except OSError:
        return False  # gone already
    return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()


class Child:
    """A forked child: what it has written so far, and who waits for it; None if nobody does."""

    def __init__(self, loop: Loop, pid: int, pipe: int, limit: float, then: Ended | None, *,
                 group: bool, spared: bool) -> None:
        self.loop, self.pid, self.pipe, self.then = loop, pid, pipe, then
        self.due = loop.clock.now() + limit  # when it is killed, and its owner told
        self.group = group  # is its process group killed with it?
        self.spared = spared  # does it live on when its owner has been told of its limit?
        self.output = bytearray()
        loop.selector.register(pipe, selectors.EVENT_READ, self.ready)
        loop.children[pid] = self

    def ready(self, _events: int = 0) -> bool:
        """Take in what the child has written; was there anything?"""
        if self.pipe < 0:
            return False
        try:
            data = os.read(self.pipe, CHUNK)
        except BlockingIOError:
            return False
        self.output += data
        if not data:
            self._close_pipe()
        return bool(data)

    def kill(self) -> None:
        """End it without hearing from it; it is reaped when it has gone."""
        self.then, self.due = None, FOR_EVER
        self._close_pipe()
        for kill in (os.killpg, os.kill) if self.group else (os.kill,):
            try:
                kill(self.pid, signal.SIGKILL)  # not reaped yet, so that this is still its number
            except OSError:
                pass  # too young to have made its group, or another user's by sudo

    def expire(self, now: float) -> None:
        """It has reached its limit: its owner hears so at once, unless it has ended in time.

        But if the limit passed while the machine slept, or we were stopped, so did the child: its
        answer may be on its way, and may hold a rotated token.
        """
        if self.reap():
            return
        if now > self.due + LATE:
            self.due = now + AFTER_SLEEP
            return
        then = self.then
        if self.spared:
            self.due = FOR_EVER  # and its owner hears of its end, too
        else:
            self.kill()
        self.loop.tell(then, None, b"")

    def reap(self) -> bool:
        """Has it ended? Then its owner hears how."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return False
        del self.loop.children[self.pid]
        while self.ready():
            pass  # what it wrote last
        self._close_pipe()
        then, self.then = self.then, None  # its number may be another's from here on
        self.loop.tell(then, os.waitstatus_to_exitcode(status), bytes(self.output))
        return True

    def _close_pipe(self) -> None:
        if self.pipe >= 0:
            self.loop.selector.unregister(self.pipe)
            os.close(self.pipe)
            self.pipe = -1


class TokenRequest(Record):
    """A token request that waits for its turn or runs."""

    work: Callable[[], bytes]
    host: str
    kind: str  # "code", which is urgent, or "refresh"
    then: Callable[[bytes], None]
    child: Child | None = None


class Command(Record):
    """A shell command that waits to be started, at `due` again, or runs."""

    start: Callable[[], Child]
    due: float = 0
    child: Child | None = None


def loop_signals() -> tuple[signal.Signals, ...]:
    """The signals that the loop heeds."""
    return (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Loop:
    """Waits for sockets, children, signals and moments, and calls who waits for them."""

    def __init__(self, clock: Clock, log: Callable[[int, str], None],
                 descriptors: int = DESCRIPTORS) -> None:
        self.clock, self.log = clock, log
        self.descriptors = descriptors  # the soft limit that commands get back
        self.selector = selectors.DefaultSelector()
        # The oldest of each kind come first.
        self.exchanges: dict[str, dict[Exchange, None]] = {kind: {} for kind in CONNECTIONS}
        self.large: Exchange | None = None  # the one that reads a long request
        self.paused: list[Listener] = []
        self.children: dict[int, Child] = {}
        self.unforked: list[Callable[[], None]] = []  # tells those who could have no child
        self.fork_failed = False  # at the last try?
        self.requests: list[TokenRequest] = []
        self.starting = False  # may one of them have its turn to be started?
        self.commands: list[Command] = []  # that wait to be started
        self.signals = loop_signals()
        self.flags: set[int] = set()  # those that came
        self.grace_ends = FOR_EVER  # once stopping: when we end whatever is in flight
        self.bell, self.rung = socket.socketpair()

    # Signals: a handler adds to a set, and its byte on a socket pair ends the wait. The byte is a
    # bell, not a message.

    def catch_signals(self) -> None:
        """From now on these signals are the loop's, blocked ones too (a mask survives exec)."""
        for end in (self.bell, self.rung):
            end.setblocking(False)
        self.selector.register(self.rung, selectors.EVENT_READ, lambda _: self.rung.recv(CHUNK))
        signal.set_wakeup_fd(self.bell.fileno(), warn_on_full_buffer=False)
        for number in self.signals:
            signal.signal(number, lambda number, _frame: self.flags.add(number))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def heed_signals(self, authenticator: Authenticator) -> None:
        """Do what the signals that have come ask for."""
        flags, self.flags = self.flags, set()  # taken first: a later signal has its own turn
        if flags & {signal.SIGTERM, signal.SIGINT}:
            self.grace_ends = self.clock.now() if authenticator.stopping else FOR_EVER
            authenticator.stopping = True
        if signal.SIGCHLD in flags:
            for child in list(self.children.values()):
                child.reap()
        if signal.SIGHUP in flags and not authenticator.stopping:
            authenticator.hang_up()

    # The loop itself.

    def run(self, authenticator: Authenticator, each_pass: Callable[[], None]) -> None:
        """Serve until the authenticator is stopping, and what is in flight has had its grace."""
        while not self.finished(authenticator):
            try:
                patience = self.patience(authenticator)
                if patience == 0:
                    self.run_due(authenticator)
            except Exception:  # a bug of ours, which must neither make it spin nor keep others out
                self.log(ERROR, "Something due was lost to a bug: " + stack_trace())
                patience = PAUSE
            try:
                ready = self.selector.select(patience)
                if self.flags:  # before what may raise at every pass
                    self.heed_signals(authenticator)
                for key, events in ready:
                    key.data(events)
                each_pass()
            except Exception:  # a bug of ours, which must not end the daemon, nor make it spin
                self.log(ERROR, "Something was lost to a bug: " + stack_trace())
                time.sleep(PAUSE)

    def finished(self, authenticator: Authenticator) -> bool:
        """Is it time to end? A rotated refresh token must reach the dump of token_event_cmd."""
        if not authenticator.stopping:
            return False
        if self.grace_ends == FOR_EVER:
            self.grace_ends = self.clock.now() + GRACE
        in_flight = any(request.child is not None for request in self.requests)
        return not (in_flight or authenticator.busy()) or self.clock.now() >= self.grace_ends

    def patience(self, authenticator: Authenticator) -> float | None:
        """How long the loop may sleep; 0: something is due; None: until somebody comes."""
        if self.unforked or self.starting or self.flags:
            return 0
        moment = self.grace_ends if authenticator.stopping else authenticator.deadline()
        timed: tuple[Iterable[Any], ...] = (
            *self.exchanges.values(), self.children.values(), self.commands, self.paused)
        for some in timed:
            for one in some:
                moment = min(moment, one.due)
        return None if moment == FOR_EVER else max(0, min(LONGEST_SLEEP, moment - self.clock.now()))

    def run_due(self, authenticator: Authenticator) -> None:
        """End what has reached its limit, tell who could have no child, start what waits for its
        turn, accept connections again, and have the authenticator do what is due."""
        now = self.clock.now()
        for exchange in [exchange for some in self.exchanges.values() for exchange in some
                         if exchange.due <= now]:
            exchange.close()
        for child in [child for child in self.children.values() if child.due <= now]:
            child.expire(now)
        unforked, self.unforked = self.unforked, []
        for tell in unforked:
            tell()
        for command in [one for one in self.commands if one.due <= now][:COMMANDS_A_PASS]:
            self._start_command(command)
        if self.starting:
            self._start_request()
        for listener in [listener for listener in self.paused if listener.due <= now]:
            self._resume(listener)
        if not authenticator.stopping:
            authenticator.run_due()

    def tell(self, then: Ended | None, status: int | None, output: bytes) -> None:
        """Tell who waits for a child, if anybody does, how it ended."""
        try:
            if then is not None:
                then(status, output)
        except Exception:  # a bug of ours, which must not end the daemon
            self.log(ERROR, "An outcome was lost to a bug: " + stack_trace())

    # Connections: a cap for each kind, and what happens when descriptors run out.

    def make_room(self, kind: str) -> bool:
        """Is there room for one more? At the cap the one that has been reading longest must go, or
        if none reads, the oldest that is not waiting for its answer."""
        exchanges = self.exchanges[kind]
        if len(exchanges) < CONNECTIONS[kind]:
            return True
        victim = next((exchange for exchange in exchanges if exchange.state != "parked"), None)
        victim = next((exchange for exchange in exchanges if exchange.state == "reading"), victim)
        if victim is not None:
            victim.close()
        return victim is not None

    def admit_large(self, exchange: Exchange) -> None:
        """Let an exchange read a long request. Raises RequestError if another does: 256 dumps of
        16 MiB at once would be 4 GiB."""
        if self.large not in (None, exchange):
            raise RequestError("Another dump is being restored: try again in a moment")
        self.large = exchange

    def closed(self, exchange: Exchange) -> None:
        """An exchange has ended, so that there is room again."""
        del self.exchanges[exchange.kind][exchange]
        if self.large is exchange:
            self.large = None
        for listener in self.paused[:]:
            self._resume(listener)

    def pause(self, listener: Listener) -> None:
        """Descriptors or memory have run out: accept no more until some are free or time passed."""
        self.log(WARNING, "Out of descriptors or memory: accepting connections is paused")
        self.selector.unregister(listener.sock)
        self.paused.append(listener)
        listener.due = self.clock.now() + PAUSE

    def _resume(self, listener: Listener) -> None:
        try:
            self.selector.register(listener.sock, selectors.EVENT_READ, listener.ready)
        except OSError:
            listener.due = self.clock.now() + PAUSE  # there is still no memory
        else:
            self.paused.remove(listener)

    # Children.

    def fork(self, work: Callable[[], bytes], limit: float, then: Ended, *, group: bool = False,
             spared: bool = False, nice: int = 0) -> Child:
        """Run work() in a child; then(exit status, what work returned) once it has ended, on a
        later pass.

        After `limit` seconds then(None, b""), and it is killed: with its group if `group`, not at
        all if it is spared. Raises OSError if there can be no child.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, self.signals)  # or the young child's ring our bell
        try:
            reader, writer = os.pipe()
            try:
                pid = os.fork()
            except OSError:
                os.close(reader)
                os.close(writer)
                raise
            if pid == 0:
                run_child(work, writer, FOR_EVER if spared else limit, nice)
        except OSError as error:
            if not self.fork_failed:  # told once, for there may be hundreds
                self.log(ERROR, f"Cannot start another process: {error.strerror}")
            self.fork_failed = True
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.signals)
        self.fork_failed = False
        os.close(writer)
        os.set_blocking(reader, False)
        try:
            return Child(self, pid, reader, limit, then, group=group, spared=spared)
        except OSError:  # no memory to watch its pipe with; it has hardly begun
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            raise

    def post(self, uri: str, form: Fields, urgent: bool,
             then: Callable[[bytes], None]) -> Cancel:
        """Start a token request in a child once there is a slot; code exchanges are urgent."""
        host, kind = urllib.parse.urlsplit(uri).netloc, "code" if urgent else "refresh"
        request = TokenRequest(partial(post_form, uri, form), host, kind, then)
        self.requests.append(request)
        self.starting = True
        return partial(self._cancel, self.requests, request)

    def _cancel(self, queue: list[Any], job: TokenRequest | Command) -> None:
        """Have a job never start, or kill its child; nothing if it has ended."""
        if job in queue:
            queue.remove(job)
        if job.child is not None and job.child.then is not None:
            job.child.kill()
        self.starting = True  # a slot may have come free

    def _start_request(self) -> None:
        """Start the request whose turn it is, one a pass, for a fork takes a millisecond or two.

        The urgent come first, for which some slots are kept free, then those of the hosts that have
        the fewest, so that a host which hangs does not hold up the others.
        """
        hosts = [request.host for request in self.requests if request.child is not None]
        able = [request for request in self.requests
                if request.child is None and len(hosts) < TOKEN_REQUESTS[request.kind]
                and hosts.count(request.host) < HOST_REQUESTS[request.kind]]
        self.starting = bool(able) and self.grace_ends == FOR_EVER
        if not self.starting:
            return  # at the end it would be killed with us, and may hold a rotated token by then
        request = min(able, key=lambda one: (one.kind, hosts.count(one.host)))
        posted = partial(self._posted, request)
        try:
            request.child = self.fork(request.work, TOKEN_REQUEST_LIMIT, posted, nice=NICE)
        except OSError as error:
            self.requests.remove(request)
            reason = f"cannot start another process: {error.strerror}"
            self.unforked.append(partial(self.tell, posted, None, reason.encode()))

    def _posted(self, request: TokenRequest, status: int | None, output: bytes) -> None:
        if request in self.requests:
            self.requests.remove(request)
        self.starting = True
        if status != 0:
            why = f"the process that asked {request.host} ended with status {status}"
            if status is None:
                limit = f"no answer from {request.host} within {TOKEN_REQUEST_LIMIT} s"
                why = output.decode() or limit
            output = outcome_bytes(0, 0, False, why.encode())
        request.then(output)

    def run_command(self, command: str, variables: Fields, limit: float, then: Ended, *,
                    spared: bool = False) -> Cancel:
        """Run a shell command in a child; at its limit its process group is killed, or, if it is
        spared, nobody. One without a limit is killed alone: it may have opened a browser."""
        work = partial(run_command, command, variables, self.descriptors)
        group = limit < FOR_EVER and not spared
        waiting = Command(lambda: self.fork(work, limit, then, group=group, spared=spared))
        self.commands.append(waiting)
        return partial(self._cancel, self.commands, waiting)

    def _start_command(self, command: Command) -> None:
        try:
            command.child = command.start()
        except OSError:
            command.due = self.clock.now() + FORK_RETRY  # the dump that it makes may matter
        else:
            self.commands.remove(command)

    def close_exchanges(self) -> None:
        """Close every connection."""
        for exchange in [exchange for some in self.exchanges.values() for exchange in some]:
            exchange.close()


# ---- Paths and standard streams ----
# What server and client share. A client needs nothing else of this file but ask(), so nothing here
# imports anything dear.

SOCKET_NAME = "pizauth.sock"


def runtime_directory() -> str:
    """The directory of the control socket."""
    xdg = os.environ.get("XDG_RUNTIME_DIR")
    if xdg:
        return os.path.join(xdg, "pizauth")
    import pwd

    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    return os.path.join(os.environ.get("TMPDIR") or "/tmp", f"runtime-{user}", "pizauth")


def check_directory(path: str) -> None:
    """Raise PizauthError unless a path is a real directory of our user's: else it is a trap."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise PizauthError(f"{path} is not a directory (a symbolic link does not count): remove it")
    if status.st_uid != os.getuid():
        raise PizauthError(f"The directory {path} belongs to another user: refusing to use it")


def complain(text: str) -> None:
    """Write a message to standard error, whether or not it is open, in UTF-8."""
    try:
        write_all(2, text.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass  # nobody listens


def put(data: bytes | str) -> None:
    """Write to standard output, in UTF-8 whatever the locale. Raises PizauthError."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    try:
        write_all(1, data)
    except OSError as error:
        raise PizauthError(f"Cannot write to standard output: {error.strerror}") from None


# ---- Server ----
# Start-up goes from what is cheap to refuse to what others see: the directory, the lock, the
# configuration, the sockets; then the terminal is let go, and what failed until then has been said
# on it.


class Log:
    """Called with a level and a message; messages above the verbosity are dropped.

    It never waits: what a full pipe or a syslog that hangs cannot take is lost, and counted. (The
    libc's syslog(3) would wait for ever, and with it every mail program.)
    """

    LEVELS = (("ERROR", 3), ("WARNING", 4), ("INFO", 6), ("DEBUG", 7), ("TRACE", 7))
    SYSLOG = ("/dev/log", "/var/run/log", "/var/run/syslog")

    def __init__(self, verbosity: int, descriptor: int = 2) -> None:
        self.verbosity, self.descriptor = verbosity, descriptor
        if os.isatty(descriptor):  # whose reader may have typed Ctrl-S
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
            try:
                self.descriptor = os.open(os.ttyname(descriptor), flags)
            except OSError:
                pass  # another user's since su, or of another mount namespace
        self.syslog: socket.socket | None = None
        self.lost = 0

    def __call__(self, level: int, message: str) -> None:
        if level > self.verbosity:
            return
        for line in map(printable, message.splitlines()):
            told = f"{self.lost} messages were lost: the log was full"
            if self.lost and self.tell(WARNING, told):
                self.lost = 0
            self.lost += not self.tell(level, line)

    def tell(self, level: int, line: str) -> bool:
        """Was there room for a line?"""
        name, priority = self.LEVELS[level]
        if self.syslog is not None:
            return self.send(f"<{8 + priority}>{time.strftime('%b %e %H:%M:%S')}"  # 8: user's
                             f" pizauth[{os.getpid()}]: {line}".encode("utf-8", "replace"))
        text = f"{name} - {line}".encode("utf-8", "replace")[: select.PIPE_BUF - 1]
        try:
            if not select.select((), (self.descriptor,), (), 0)[1]:
                return False
            write_all(self.descriptor, text + b"\n")
        except BlockingIOError:
            return False
        except OSError:
            pass  # nobody listens
        return True

    def send(self, datagram: bytes) -> bool:
        """Hand a message to syslog (RFC 3164); where none runs it is dropped, which is no error."""
        assert self.syslog is not None
        for path in self.SYSLOG:
            try:
                self.syslog.sendto(datagram, path)
                break
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOBUFS):
                    return False
        return True

    def use_syslog(self) -> None:
        """From now on messages go to syslog, and the terminal is let go."""
        if self.descriptor > 2:
            os.close(self.descriptor)
            self.descriptor = 2
        self.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.syslog.setblocking(False)


def config_path(given: str | None) -> str:
    """Where the configuration is, given or by the XDG rules."""
    if given is not None:
        return given
    directory = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(directory, "pizauth.conf")


def load_config(path: str, reloading: bool = False) -> Config:
    """Read and parse a configuration file. Raises PizauthError with the path."""
    try:
        more = os.O_NONBLOCK if reloading else 0
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | more)) as file:
            if reloading and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PizauthError(f"{path} is no file, and only a file can be read anew")
            data = file.read(CONFIG_LIMIT + 1)
    except FileNotFoundError:
        raise PizauthError(f"No config file found at {path}") from None
    except OSError as error:
        raise PizauthError(f"Cannot read the configuration {path}: {error.strerror}") from None
    if len(data) > CONFIG_LIMIT:
        raise PizauthError(f"{path} has more than {CONFIG_LIMIT >> 20} MiB: is it the right file?")
    try:
        return parse(decode_config(data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def make_runtime_directory() -> str:
    """Our socket's directory, made if need be; refused unless it and its parent are ours alone."""
    directory = runtime_directory()
    above = [] if os.environ.get("XDG_RUNTIME_DIR") else [os.path.dirname(directory)]
    for path in [*above, directory]:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise PizauthError(f"Cannot make the directory {path}: {error.strerror}") from None
        check_directory(path)
        try:
            os.chmod(path, 0o700)
        except OSError as error:
            raise PizauthError(
                f"Cannot make the directory {path} private: {error.strerror}") from None
    return directory


def take_lock(directory: str) -> int:
    """A descriptor holding the lock. Raises PizauthError if a server runs, with a lock or not."""
    path = os.path.join(directory, "pizauth.lock")
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        keep_from_sweepers(path)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PizauthError("pizauth authenticator already running") from None
    except OSError as error:
        raise PizauthError(f"Cannot lock {path}: {error.strerror}") from None
    if is_served(os.path.join(directory, SOCKET_NAME)):  # by the original, which has no lock
        raise PizauthError("pizauth authenticator already running")
    return lock  # no socket is there, or one that a killed server left behind


def is_served(path: str) -> bool:
    """Does anybody listen on a Unix socket?"""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            pass  # one that is too busy to take us runs all the same
        except OSError:
            return False
    return True


def file_id(path: str) -> tuple[int, int] | None:
    """What tells a file from one that takes its place; None if there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def keep_from_sweepers(path: str) -> None:
    """Set the sticky bit, which tells cleaners of runtime directories to leave a file alone."""
    try:
        os.chmod(path, 0o1600)
    except OSError:
        pass  # the BSDs keep that bit for root


def bind_control(path: str) -> socket.socket:
    """The control socket, which only its user can open, in place of one that nobody serves."""
    sock = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o077)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        sock.bind(path)
        sock.listen(CONNECTIONS["control"])
    except OSError as error:
        sock.close()
        raise PizauthError(f"Cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(umask)
    keep_from_sweepers(path)
    return sock


def bind_redirect(option: str, addresses: tuple[tuple[str, int], ...]) -> list[socket.socket]:
    """The sockets of a redirect listener, all with one port; only the first address must be had."""
    (host, port), *others = addresses
    for _ in range(PORT_TRIES):
        try:
            sockets = [bind_inet(host, port)]
        except (OSError, UnicodeError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            raise PizauthError(
                f"Cannot listen on {option} \"{host}:{port}\": {reason}") from error
        try:
            return sockets + [bind_inet(other, sockets[0].getsockname()[1]) for other, _ in others]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return sockets  # this machine does not have the other family
        sockets[0].close()  # a stranger has our port there, and would get our redirects
    raise PizauthError(f"Cannot listen on {option}: every port is taken on {others[0][0]}")


def bind_inet(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on one family alone. Raises OSError or UnicodeError."""
    name = host.encode("ascii" if host.isascii() else "idna")  # a str loads tables of 0.3 MiB
    family = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((name, port), family=family, backlog=CONNECTIONS["browser"])


NEEDS = ("needs the Python package cryptography: install it, for instance as python3-cryptography"
         " or with pip")


class Server:
    """The daemon: the loop, the authenticator and the sockets between them."""

    def __init__(self, path: str, verbosity: int, minting_pipe: int) -> None:
        self.path, self.log, self.clock = path, Log(verbosity), Clock()
        self.descriptors = limit_resources(DESCRIPTORS)
        self.directory = make_runtime_directory()
        self.control_path = os.path.join(self.directory, SOCKET_NAME)
        self.lock = take_lock(self.directory)
        self.config = load_config(path)
        self.context: ssl.SSLContext | None = None
        self.about_https: Fields = {}
        self.https_missing = False  # is `cryptography` not there?
        if self.config.https_listen:
            self.set_up_https(self.config, minting_pipe)
        self.redirects: dict[str, list[Listener]] = {"http": [], "https": []}
        self.bound = self.bind_redirects(self.config, None)
        # From here on a signal must not end us without run(), which takes it up again.
        signal.pthread_sigmask(signal.SIG_BLOCK, loop_signals())
        self.control_socket = bind_control(self.control_path)
        self.stopping_told = self.ready_told = False

    def set_up_loop(self) -> None:
        """Make what does not survive a fork everywhere: a kqueue is not inherited."""
        self.loop = Loop(self.clock, self.log, self.descriptors)
        self.authenticator = Authenticator(
            self.config, self.clock, self.loop.post, self.loop.run_command, self.log)
        self.authenticator.reload = self.reload
        self.authenticator.about_https = self.about_https
        self.authenticator.ports = self.adopt(self.bound)
        self.listen_to_clients(self.control_socket)

    # The redirect listeners.

    def set_up_https(self, config: Config, minting_pipe: int) -> None:
        """Have TLS with the minted certificate; without `cryptography` only if nobody needs it."""
        with open(minting_pipe, "rb", closefd=False) as file:
            self.about_https = json.loads(file.read() or b"{}")  # nothing: that child has failed
        if self.about_https:
            self.context = tls_context(self.about_https.pop("pem"), self.directory)
        else:
            self.do_without_https(config, f"which {NEEDS}")
            self.https_missing = True
            complain(f"WARNING - HTTPS is off: it {NEEDS}, or set https_listen = none")

    def do_without_https(self, config: Config, why: str) -> None:
        """Raise PizauthError if an account's redirect needs what this server cannot have."""
        for name, account in config.accounts.items():
            if split_uri(account.redirect_uri).scheme == "https":
                raise PizauthError(f"Account {printable(name)} has an 'https' redirect, {why}")

    def bind_redirects(self, config: Config, before: Config | None) -> dict[str, list[Any]]:
        """Sockets for the redirect listeners whose addresses have changed: all, or PizauthError."""
        wanted = {scheme: getattr(config, f"{scheme}_listen") for scheme in self.redirects}
        if before is not None:
            wanted = {scheme: addresses for scheme, addresses in wanted.items()
                      if addresses != getattr(before, f"{scheme}_listen")}
            for scheme, addresses in wanted.items():
                self.check_reloadable(f"{scheme}_listen", addresses)
        if self.context is None and (before is None or self.https_missing):
            wanted["https"] = ()
        bound: dict[str, list[Any]] = {}
        try:
            for scheme, addresses in wanted.items():
                option = f"{scheme}_listen"
                bound[scheme] = bind_redirect(option, addresses) if addresses else []
        except PizauthError as error:
            for sock in sum(bound.values(), []):
                sock.close()
            in_use = getattr(error.__cause__, "errno", None) == errno.EADDRINUSE
            hint = " (if by this server's own listener, restart it)"
            raise PizauthError(f"{error}{hint if before and in_use else ''}") from None
        return bound

    def check_reloadable(self, option: str, addresses: tuple[tuple[str, int], ...]) -> None:
        """Raise PizauthError for a change of listeners that only a restart can make."""
        if addresses and option == "https_listen" and not self.context and not self.https_missing:
            raise PizauthError("HTTPS was off when the server started: restart it to turn it on")
        for host, _ in addresses:
            try:
                socket.getaddrinfo(host.encode(), None, flags=socket.AI_NUMERICHOST)
            except OSError:
                raise PizauthError(f"{option}: '{host}' is a name, and names are looked up only at"
                                   " start: restart the server, or write a numeric address"
                                   ) from None

    def adopt(self, bound: dict[str, list[Any]]) -> dict[str, int | None]:
        """Listen on these sockets in place of the old ones; the ports of all listeners."""
        ports = dict(self.authenticator.ports)
        for scheme, sockets in bound.items():
            for listener in self.redirects[scheme]:
                listener.close()
            ports[scheme] = sockets[0].getsockname()[1] if sockets else None
            respond = partial(self.authenticator.redirected, scheme)
            context = self.context if scheme == "https" else None
            self.redirects[scheme] = [
                Listener(self.loop, sock, "browser", http_head, respond, context=context)
                for sock in sockets]
        return ports

    def reload(self) -> None:
        """Read the configuration anew and take it, listeners and all, or nothing of it."""
        if self.ready_told:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            before, config = self.authenticator.config, load_config(self.path, True)
            if self.context is None:
                self.do_without_https(config, f"which {NEEDS}, and restart" if self.https_missing
                                      else "but HTTPS was off when the server started: restart it")
            self.authenticator.reconfigure(config, self.adopt(self.bind_redirects(config, before)))
            self.log(INFO, f"Reloaded {self.path}")
        finally:
            if self.ready_told:
                notify("READY=1")

    # The control socket.

    def listen_to_clients(self, sock: socket.socket) -> None:
        """Serve the control socket, and remember which one is ours."""
        self.control = Listener(
            self.loop, sock, "control", until_eof, self.authenticator.control)
        self.control_id = file_id(self.control_path)
        self.control_checked = self.clock.now()

    def check_socket(self) -> None:
        """Bind anew a control socket that was swept away or replaced; end if another server has its
        place."""
        self.control_checked = self.clock.now()
        if self.control_id is not None and file_id(self.control_path) == self.control_id:
            return
        try:
            served = is_served(self.control_path)
        except OSError:
            return  # out of descriptors: the next look may tell
        if served:
            self.log(ERROR, f"Another server has taken over {self.control_path}: this one ends")
            self.authenticator.stopping = True
        else:
            self.log(WARNING, f"{self.control_path} is gone: making it anew")
            self.remake_socket()

    def remake_socket(self) -> None:
        """Bind the control socket anew; what is in the way of that may pass until the next look."""
        try:
            make_runtime_directory()
            replaced = self.control
            self.listen_to_clients(bind_control(self.control_path))
            replaced.close()
        except (PizauthError, OSError) as error:
            self.log(ERROR, f"Cannot make the control socket anew: {error}")

    # Its life.

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until told to stop and leave nothing behind; ready() says that clients can come.
        Raises PizauthError before that."""
        config = self.config
        try:
            self.set_up_loop()
            self.loop.catch_signals()
            self.note_pid()
            ready()
        except OSError as error:
            os.unlink(self.control_path)
            raise PizauthError(f"Cannot start the server: {error.strerror}") from None
        self.log(INFO, f"Serving {len(config.accounts)} account(s) on {self.control_path}")
        if config.startup_cmd is None:
            self.started(0, b"")
        else:
            self.loop.run_command(
                config.startup_cmd, {}, STARTUP_PATIENCE, self.started, spared=True)
        self.loop.run(self.authenticator, self.each_pass)
        self.end()

    def note_pid(self) -> None:
        """Write our number into the lock file, for who must kill a server that hangs."""
        try:
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, b"%d\n" % os.getpid(), 0)
        except OSError:
            pass  # a full disk is no reason not to serve

    def started(self, status: int | None, output: bytes) -> None:
        """startup_cmd has ended, or has run long enough to be left to itself."""
        if status or output:
            self.log(ERROR, f"startup_cmd: {output.decode() or f'ended with status {status}'}")
        self.ready_told = True
        notify("READY=1")

    def each_pass(self) -> None:
        if self.authenticator.stopping and not self.stopping_told:
            self.stopping_told = True
            notify("STOPPING=1")
        if self.clock.now() >= self.control_checked + SOCKET_CHECK:
            self.check_socket()

    def end(self) -> None:
        """Close sockets, release the lock, and last let go who waits, the `shutdown` client too."""
        signal.pthread_sigmask(signal.SIG_BLOCK, loop_signals())  # one more changes nothing
        self.log(INFO, "Stopping")
        for child in self.loop.children.values():
            child.kill()
        for listener in [self.control, *self.redirects["http"], *self.redirects["https"]]:
            listener.close()
        if self.control_id is not None and file_id(self.control_path) == self.control_id:
            os.unlink(self.control_path)
        fcntl.flock(self.lock, fcntl.LOCK_UN)  # a child just forked may still have it open
        os.close(self.lock)
        self.authenticator.farewell()
        self.loop.close_exchanges()


def tls_context(pem: str, directory: str) -> ssl.SSLContext:
    """A context with this key and certificate, which ssl takes from a file alone."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # each would cost a handshake
    context.set_ecdh_curve("prime256v1")  # 0.3 ms; a replayed hello of ffdhe8192 would cost 120 ms
    path = os.path.join(directory, "certificate.pem")
    if os.path.lexists(path):
        os.unlink(path)  # one that a killed server left; we hold the lock
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        write_all(descriptor, pem.encode())
        context.load_cert_chain(path)
    finally:
        os.close(descriptor)
        os.unlink(path)
    return context


def notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)  # it may be busy, and kills what was never READY
                sock.sendto(state.encode(), address)
        except OSError:
            pass  # nobody listens


def daemonise(server: Server) -> None:
    """Run a server in a child that has let go of the terminal; return once it answers clients."""
    try:
        reader, writer = os.pipe()
        child = os.fork()
    except OSError as error:
        os.unlink(server.control_path)
        raise PizauthError(f"Cannot start another process: {error.strerror}") from None
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, loop_signals())
        os.close(writer)
        word = os.read(reader, CHUNK)
        if word != b"!":
            raise PizauthError(word.decode() or "The server ended before it could answer")
        return
    os.close(reader)
    os.setsid()

    def ready() -> None:
        """Let go of the terminal, and give the parent our word."""
        null = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):  # or `$(pizauth server)` would wait for us
            os.dup2(null, standard)
        os.close(null)
        server.log.use_syslog()
        try:
            os.write(writer, b"!")
        except OSError:
            pass  # the parent was interrupted meanwhile
        os.close(writer)

    try:
        server.run(ready)
    except PizauthError as error:
        os.write(writer, str(error).encode())  # the parent says it
        raise SystemExit(1) from None
    except Exception:  # a bug of ours: standard error may be /dev/null by now
        server.log(ERROR, "The server ended: " + stack_trace())
        raise


# ---- Client and command line ----
# A client is one ask(). It speaks through _socket, the half of `socket` that is C, and a plain
# `show ACCOUNT` is answered before argparse is imported: together they would cost `show` 3 ms, a
# quarter of the interpreter's own start. Nor is it for a plain `server`, which would keep 0.5 MiB.


def ask(request: bytes) -> bytes:
    """The server's reply. Raises PizauthError if there is no server, or somebody else's."""
    import _socket

    directory = runtime_directory()
    reply = bytearray()
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        check_directory(directory)  # else whoever made it would be handed our requests, even dumps
        sock.settimeout(CLIENT_TIMEOUT)
        sock.connect(os.path.join(directory, SOCKET_NAME))
        try:
            sock.sendall(request)
            sock.shutdown(_socket.SHUT_WR)
        except ConnectionError:
            pass  # the server has answered before it read everything
        while data := sock.recv(CHUNK):
            reply += data
    except OSError:
        raise PizauthError("pizauth authenticator not running or not responding") from None
    finally:
        sock.close()
    return bytes(reply)


def asked(verb: bytes, rest: bytes = b"", kind: bytes = b"ok") -> str:
    """The text of a reply of this kind. Raises PizauthError for an error, or without a token."""
    got, _, raw = ask(verb + b":" + rest).partition(b":")
    text = raw.decode("utf-8", "replace")
    if got == b"error":
        raise PizauthError(text)
    if got == b"pending":
        raise PizauthError(f"Access token unavailable until authorised with URL {text}".rstrip())
    if got != kind:
        raise PizauthError("The server gave no answer that makes sense: is it another version?")
    return text


def about(options: argparse.Namespace) -> bytes:
    """The rest of a request about an account, in which its URL is wanted or not."""
    return (b"withouturl " if options.without_url else b"withurl ") + os.fsencode(options.account)


def print_token(rest: bytes) -> None:
    put(asked(b"showtoken", rest, b"access_token") + "\n")


def info(options: argparse.Namespace) -> None:
    """Where things are, and what the running server says of itself; no server is no error."""
    import json

    try:
        server_info = dict(json.loads(ask(b"info:")))
    except (PizauthError, TypeError, ValueError):
        server_info = {}
    cache, config = runtime_directory(), config_path(options.config)
    if options.json:
        summary = {
            "cache_directory": cache,
            "config_file": config,
            "executed_as": sys.argv[0],
            "info_format_version": 2,
            "pizauth_version": VERSION,
            "server_running": bool(server_info),
            **({"server_info": server_info} if server_info else {}),
        }
        return put(json.dumps(summary, indent=2) + "\n")
    titles = {"http_port": "HTTP port", "https_port": "HTTPS port",
              "https_pub_key": "HTTPS public key", "https_cert_sha256": "HTTPS certificate SHA-256"}
    put("\n".join([
        f"{os.path.basename(sys.argv[0])} version {VERSION}:",
        f"  cache directory: {cache}",
        f"  config file: {config}",
        "server running:" if server_info else "server not running",
        *[f"  {titles[key]}: {server_info[key]}" for key in titles if key in server_info],
        "",
    ]))


def dump(options: argparse.Namespace) -> None:
    reply = ask(b"dump:")
    if not reply or reply.startswith(b"error:"):
        why = reply.decode("utf-8", "replace").replace("error:", ": ", 1)
        raise PizauthError(f"The server gave no dump{why}")
    check_seal(reply)  # the server may have ended amid it, and an older dump be overwritten
    put(reply)


def restore(options: argparse.Namespace) -> None:
    """Send a dump to the server, all of it read before the server is bothered."""
    data = bytearray()
    try:
        while piece := os.read(0, CHUNK):
            data += piece
    except OSError as error:
        raise PizauthError(f"Cannot read standard input: {error.strerror}") from None
    asked(b"restore", bytes(data))


def server(config: str | None, verbosity: int, foreground: bool) -> None:
    """Run the daemon, in the foreground or in a child whose word is waited for."""
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it may be inherited as ignored
    path = config_path(config)
    while os.open(os.devnull, os.O_RDWR) < 3:
        pass  # a standard stream was closed, and our sockets must not take its number
    given = path.rpartition("/")[2] if path.startswith("/dev/fd/") else ""  # -c <(decrypt ...)
    spared = min(max(2, int(given[:9])), DESCRIPTORS) if given.isdecimal() else 2
    os.closerange(3, spared)  # what our starter left open is not ours to hold
    os.closerange(spared + 1, DESCRIPTORS)
    pid, minting_pipe = start_minting()
    try:
        server_imports()
        daemon = Server(path, min(verbosity, TRACE), minting_pipe)
    except OSError as error:
        raise PizauthError(f"Cannot start the server: {error}") from None
    finally:
        os.close(minting_pipe)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if foreground:
        daemon.run()
    else:
        daemonise(daemon)


def start_minting() -> tuple[int, int]:
    """A child that mints a certificate while we do our imports, and the pipe that it writes to."""
    try:
        reader, writer = os.pipe()
        pid = os.fork()
    except OSError as error:
        raise PizauthError(f"Cannot start another process: {error.strerror}") from None
    if pid == 0:
        try:
            os.close(reader)
            write_all(writer, mint_certificate())
        finally:
            os._exit(0)
    os.close(writer)
    return pid, reader


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], object], str, tuple[str, ...]]] = {
    "dump": (dump, "write the tokens to standard output", ()),
    "info": (info, "print where things are and what the server says of itself",
             ("-c --config", "-j")),
    "refresh": (lambda options: asked(b"refresh", about(options), b"scheduled"),
                "ask for a new access token now", ("-u", "account")),
    "reload": (lambda _: asked(b"reload"), "have the server read its configuration anew", ()),
    "restore": (restore, "read tokens from a dump on standard input", ()),
    "revoke": (lambda options: asked(b"revoke", os.fsencode(options.account)),
               "have the server forget an account's tokens", ("account",)),
    "server": (lambda options: server(options.config, options.verbose, options.foreground),
               "start the server", ("-c --config", "-d")),
    "show": (lambda options: print_token(about(options)),
             "print an access token", ("-u", "account")),
    "shutdown": (lambda _: ask(b"shutdown:"), "stop the server", ()),
    "status": (lambda _: put(asked(b"status") + "\n"), "print a line about each account", ()),
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "account": {"metavar": "ACCOUNT", "help": "an account of the configuration"},
    "-c --config": {"metavar": "FILE", "help": "the configuration file"},
    "-d": {"dest": "foreground", "action": "store_true", "help": "stay in the foreground"},
    "-j": {"dest": "json", "action": "store_true", "help": "print JSON"},
    "-u": {"dest": "without_url", "action": "store_true", "help": "leave the URL out of the error"},
    "-v": {"dest": "verbose", "action": "count", "default": 0,
           "help": "log more, up to four times (server)"},
}


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line; wrong usage exits 1."""
    import argparse

    class Usage(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            complain(f"{self.format_usage()}{self.prog}: {message}")
            raise SystemExit(1)

        def _print_message(self, message: str, file: object = None) -> None:
            put(message)

    def layout(prog: str) -> argparse.HelpFormatter:
        """Asked for the terminal's width, argparse would load three libraries of compression."""
        return argparse.HelpFormatter(prog, width=78)

    parser = Usage(prog="pizauth", allow_abbrev=False, formatter_class=layout,
                   description="OAuth2 access tokens for command-line mail programs")
    parser.add_argument("--version", action="version", version=f"pizauth {VERSION}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (function, text, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False,
                                      formatter_class=layout)
        command.set_defaults(function=function, parser=command)
        for argument in (*arguments, "-v"):
            command.add_argument(*argument.split(), **ARGUMENTS[argument])
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command, of the command line if none is given; the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # What mail programs and login scripts run, without argparse.
        if len(arguments) == 2 and arguments[0] == "show" and not arguments[1].startswith("-"):
            print_token(b"withurl " + os.fsencode(arguments[1]))
        elif arguments in (["server"], ["server", "-d"]):
            server(None, 0, len(arguments) == 2)
        else:
            options, unknown = command_line().parse_known_args(arguments)
            if unknown:
                options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            options.function(options)
        return 0
    except PizauthError as error:
        complain(f"ERROR - {error}")
    except KeyboardInterrupt:
        # End as who does not catch it, so that a loop of the shell ends, too, but silently.
        import signal

        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    return 1


def run() -> NoReturn:
    """Run the command line and end the process: for a launcher, too."""
    # Nothing is buffered, and what the interpreter would tidy up now costs `show` 2 ms.
    os._exit(main())


if __name__ == "__main__":
    run()
