#!/bin/sh
# SPDX-License-Identifier: Apache-2.0 OR MIT
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography"]
# ///
""":" # For sh: run this file from Python's bytecode cache, so that `show` starts fast.
exec python3 -E -c 'import os, sys
sys.path = [path for path in sys.path if path]
from importlib.machinery import SourceFileLoader as Loader
del sys.argv[0]
exec(Loader("__main__", os.path.realpath(sys.argv[0])).get_code("__main__"))' "$0" "$@"

pizauth: an OAuth2 token daemon for command-line mail programs.

`pizauth server` keeps access tokens in memory and fresh; `pizauth show ACCOUNT` prints one. This
file is both; start reading at main(), at the end: each section uses only what stands above it.
The terms are those of RFC 6749 (OAuth 2.0), 7636 (PKCE), 8252 (native apps), 8628 (device logins).

The state of an account, and what changes it (also: revoke and reload to Empty, restore to Active):

            show, refresh              code exchanged               refreshed
    Empty ----------------> Pending -------------------> Active ----------------+
      ^                        |                          |   ^                 |
      |   refused, failed      |    refused for good,     |   +-----------------+
      +------------------------+    or expired for good   |
      +---------------------------------------------------+   (Empty is None)

One authorization, step by step:

 1. `show work` finds Empty: Authenticator makes a Pending, with a fresh `state` and
    `code_verifier`, and answers with its URL.
 2. The person opens it; the provider sends the browser to our redirect listener, with that `state`
    and a `code`.
 3. Authenticator.redirected finds the Pending by its `state`, and a child process posts code and
    verifier to the token endpoint.
 4. The answer turns it into an Active, and the waiting browser gets a page that says so.
 5. Before the token expires another child posts the refresh token: a new Active.

A device login has no redirect: after 1 a child asks for a code, and then polls until 4.

The control protocol: a client of the Unix socket sends `VERB ":" REST` and end of file, and gets
`KIND ":" TEXT`, or `error:` and a sentence (`dump` and `info`: bytes and JSON).

One process with one thread owns all state and waits in one place, Loop.run. Whatever may block is a
forked child: it sees what it was forked with, and writes its result into a pipe. There are no
timers: what is due, and when, is derived from the state (deadline() and run_due() of each part), so
there is nothing to cancel. A late result counts only if the token it belongs to is still in place.
"""

from __future__ import annotations

import os
import stat
import sys

if __name__ == "__main__":  # Python adds this file's directory, where some http.py may be.
    sys.path[:] = [path for path in sys.path
                   if path not in ("", os.path.dirname(os.path.realpath(sys.argv[0])))]

TYPE_CHECKING = False  # typing.TYPE_CHECKING for mypy; importing it would slow every `show`
if TYPE_CHECKING:
    import argparse, base64, errno, fcntl, gc, hashlib, html, http, json, re, resource, secrets
    import select, selectors, signal, socket, ssl, time, urllib.parse
    from collections.abc import Iterator, Mapping
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from contextlib import suppress
    from functools import partial
    from typing import Any, Callable, NoReturn, Optional, TypeVar, Union
    from typing import dataclass_transform  # novermin: mypy alone reads this

    Addresses = tuple[tuple[str, int], ...]  # hosts and ports of a listener
    Place = tuple[str, Addresses]  # scheme and addresses of a redirect listener
    Answered = TypeVar("Answered")  # a good answer of a provider's endpoint
    Answer = Callable[[bytes], None]  # gives a peer its reply; used once, now or on a later pass
    Cancel = Callable[[], None]  # stops work whose result is no longer wanted
    Ended = Callable[[Optional[int], bytes], None]  # takes a child's exit status and output
    Fields = dict[str, str]  # of a query, or the environment variables of a command
    Form = list[tuple[str, str]]  # the fields of a request to a provider, in order
    Reloaded = Callable[[Optional["PizauthError"]], None]  # takes why a reload failed, or None
    Token = Union["Pending", "Active"]  # what an account has, unless it is Empty
else:
    def dataclass_transform(**_options):
        """Does nothing: it tells mypy that subclasses get an __init__ from their annotations."""
        return lambda cls: cls


def server_imports() -> None:
    """Import what only the server needs: `show` runs at every login of a mail program."""
    global base64, errno, fcntl, gc, hashlib, html, http, json, partial, re, resource, secrets
    global select, selectors, signal, socket, suppress, time, urllib
    import base64, errno, fcntl, gc, hashlib, html, http, json, re, resource, secrets
    import select, selectors, signal, socket, time, urllib.parse
    from contextlib import suppress
    from functools import partial


VERSION = "0.1.0"
FOR_EVER = float("inf")  # the limit of work that has none, and the moment that never comes
CHUNK = 64 << 10  # bytes read, or encrypted, at a time
ERROR, WARNING, INFO, DEBUG, TRACE = range(5)  # levels of the log; each -v adds one


# ---- Errors and records ----
# An error holds a sentence for a person; its class says who reads it. Two small functions that
# several sections use come first.


def printable(text: str) -> str:
    """The text without control characters: text from outside must not control a terminal."""
    return "".join(c for c in text if c.isprintable())


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the data. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class PizauthError(Exception):
    """Base class: main() prints it after `ERROR - ` and exits 1. Any other exception is a bug."""

    level = WARNING  # of the log, when a peer's request is refused by it


class ConfigError(PizauthError):
    """The configuration cannot be used: the first line says where and why, the rest shows it."""


class RequestError(PizauthError):
    """An impossible request of a control client; the reply is `error:` and this text."""


class BadRequest(PizauthError):
    """A redirect that cannot be used: a browser gets a page() of these arguments, `complete` the
    text and the advice; the text is logged at `level`."""

    def __init__(self, status: int, text: str, advice: str = "", sign: str = "unknown",
                 level: int = DEBUG) -> None:
        super().__init__(text)
        self.status, self.advice, self.sign, self.level = status, advice, sign, level


class TokenError(PizauthError):
    """A request to a provider has failed. The text is cut to 500 printable characters; `error` is
    the provider's error code (RFC 6749 5.2), if it gave one; `retry_after` is in seconds. `cause`:

    refused       in the words of RFC 6749 5.2, as a poll is with authorization_pending, too; the
                  others are worth retrying
    outage        no answer, no client secret, or HTTP 408, 425, 429 or 5xx: only then is a code
                  exchange or the request for a device code retried
    passing       an error that passes by its name, or a login page of the network
    unexplained   HTTP 400 or 401 with JSON that is no OAuth error
    odd           any other answer
    """

    def __init__(self, text: str, cause: str, retry_after: float = 0, error: str = "") -> None:
        super().__init__(printable(text)[:500])
        self.cause, self.retry_after, self.error = cause, retry_after, error


@dataclass_transform(kw_only_default=True)
class Record:
    """Named fields: the annotations of a subclass and of its bases; class attributes are defaults.
    Each record equals only itself. (Importing `dataclasses` would slow `show`.)"""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(self.defaults(), **given)
        if self.__dict__.keys() != set(self.fields()):
            raise TypeError(f"{type(self).__name__} has the fields {self.fields()}, not {given}")

    @classmethod
    def fields(cls) -> list[str]:
        """The names of the fields, those of base classes first."""
        annotations = [getattr(base, "__annotations__", {}) for base in reversed(cls.__mro__)]
        return list({name: None for names in annotations for name in names})

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The fields that have a default."""
        return {name: getattr(cls, name) for name in cls.fields() if hasattr(cls, name)}


# ---- Configuration ----
# Text in, a Config or a ConfigError out. Account and Config declare the options; the docstring of
# Parser is the grammar.

MANDATORY: Any = object()  # the default of an option that has none
LOOPBACK = (("127.0.0.1", 0), ("::1", 0))  # any free port, the same for both families


class Option:
    """The declaration of an option; no Record, for each `show` makes all of them."""

    def __init__(self, read: str, default: Any, dump: str, unless: str) -> None:
        self.read, self.default, self.dump, self.unless = read, default, dump, unless


def option(read: str, *, default: Any = MANDATORY, dump: str = "", unless: str = "") -> Any:
    """Declare an option, as a field of Account or Config; without a default it is mandatory, and so
    it is with `unless`, unless that option is set.

    `read` is the method of Parser that reads its value. `dump` marks an option that tokens depend
    on: a reload that changes it drops the token, and a restore requires it to be equal. `dump` is
    its layout in a dump: one of LAYOUTS for options that the original has, declared in the order of
    its dumps; "extension" for any other option, which may stand anywhere."""
    return Option(read, default, dump, unless)


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class Block(Record):
    """A record whose fields are options."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options that may stand in this block, in the order of their declaration."""
        return {name: one for name, one in super().defaults().items() if isinstance(one, Option)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {name: option.default for name, option in cls.options().items()
                if option.default is not MANDATORY}


class Schedule(Block):
    """Options that may stand in an account, or outside for all accounts. Times are in seconds."""

    refresh_at_least: int = option("time", default=90 * 60)
    refresh_before_expiry: int = option("time", default=90)
    refresh_retry: int = option("time", default=40)


class Account(Schedule):
    """An account and its options, texts as written."""

    name: str
    auth_uri: str = option("uri", default="", dump="string", unless="device_auth_uri")
    auth_uri_fields: tuple[tuple[str, str], ...] = option("pairs", default=(), dump="pairs")
    client_id: str = option("string", dump="string")
    client_secret: str | None = option("string", default=None, dump="optional")
    client_secret_cmd: str | None = option("string", default=None, dump="extension")
    client_auth: str = option("string", default="post", dump="extension")
    redirect_uri: str = option("uri", default="http://localhost/", dump="string")
    scopes: tuple[str, ...] = option("strings", default=(), dump="strings")
    token_uri: str = option("uri", dump="string")
    token_uri_fields: tuple[tuple[str, str], ...] = option("pairs", default=(), dump="extension")
    revoke_uri: str | None = option("uri", default=None, dump="extension")
    device_auth_uri: str | None = option("uri", default=None, dump="extension")
    issuer: str | None = option("string", default=None, dump="extension")
    expect_user: str | None = option("string", default=None, dump="extension")
    login_hint: str | None = option("string", default=None)

    @property
    def redirect_scheme(self) -> str:
        """The scheme of the listener that the browser returns to; empty if it does not return."""
        return "" if self.device_auth_uri else split_uri(self.redirect_uri).scheme

    @property
    def redirect_port(self) -> int:
        """The port that is written in a redirect URI of this machine, or 0."""
        ours = is_loopback(normal_uri(self.redirect_uri))
        return (split_uri(self.redirect_uri).port or 0) if ours else 0


class Config(Schedule):
    """A whole configuration. Times are in seconds."""

    accounts: dict[str, Account]
    auth_notify_cmd: str | None = option("string", default=None)
    auth_notify_interval: int = option("time", default=15 * 60)
    error_notify_cmd: str | None = option("string", default=None)
    http_listen: Addresses | None = option("listen", default=None)
    https_listen: Addresses | None = option("listen", default=None)
    https_cert: str | None = option("string", default=None)
    https_key: str | None = option("string", default=None)
    startup_cmd: str | None = option("string", default=None)
    token_event_cmd: str | None = option("string", default=None)
    transient_error_if_cmd: str | None = option("string", default=None)

    def addresses(self, scheme: str) -> list[Addresses]:
        """Where to listen for redirects, a group for each port: its first address must bind, the
        others may fail. By default HTTPS is on only while an account redirects to it."""
        written: Addresses | None = getattr(self, f"{scheme}_listen")
        if written is not None:
            return [written] if written else []
        if scheme == "https" and not self.https_account():
            return []
        ports = [one.redirect_port for one in self.accounts.values()
                 if one.redirect_scheme == scheme and one.redirect_port]
        return [tuple((host, port) for host, _ in LOOPBACK) for port in dict.fromkeys(ports or [0])]

    def https_account(self) -> Account | None:
        """The first account that redirects to https, if there is one."""
        return next((one for one in self.accounts.values() if one.redirect_scheme == "https"), None)


RESERVED_KEYS = {  # of maps: pizauth sends these fields itself
    "auth_uri_fields": ("access_type", "client_id", "code_challenge", "code_challenge_method",
                        "redirect_uri", "response_type", "scope", "state"),
    "token_uri_fields": ("client_id", "client_secret", "code", "code_verifier", "device_code",
                         "grant_type", "redirect_uri", "refresh_token")}
RENAMED = {
    "auth_error_cmd": "it is called error_notify_cmd now",
    "refresh_retry_interval": "it is called refresh_retry now",
    "not_transient_error_if": 'write transient_error_if_cmd = "! ..." instead'}
CHARACTER_HINTS = {
    **dict.fromkeys("#/", "comments start with //"),
    "-": "names of options are written with '_', and numbers without a sign",
    "'": "strings are written in double quotes",
    **dict.fromkeys("\u201c\u201d", 'strings are written in straight double quotes, "..."')}
A_TIME = "a whole number and a unit, such as 90s, 15m, 2h or 1d"
A_STRING = "a string in double quotes"
OVER_LINES = "This string continues on the next line"
NAMES_SHOWN = 20  # How many names the error for an unknown account lists.
SHOWN_WIDTH = 60  # characters of the line that an error shows on either side of its mark


class Lexeme:
    """A lexical token: its kind (start, word, time, string, end, or the punctuation itself)."""

    def __init__(self, kind: str, text: str, at: int) -> None:
        self.kind, self.text, self.at = kind, text, at

    def __str__(self) -> str:
        shown = self.text if len(self.text) <= 40 else self.text[:40] + "..."
        return {"start": "nothing", "string": "a string"}.get(self.kind, f"'{shown}'")

    def value(self) -> str:
        """The text that a STRING stands for."""
        return re.sub(r'\\(["\\])', r"\1", self.text[1:-1])


def decode_config(data: bytes) -> str:
    """The text of a configuration file, without a byte order mark. Raises ConfigError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = error.object  # without the byte order mark, like error.start
        line = text.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"line {line}: byte {text[error.start]:#04x} is not UTF-8:"
                          " save the file as UTF-8") from None


def parse(text: str) -> Config:
    """The configuration in a text. Raises ConfigError with line, column, and the line itself."""
    return Parser(text).config()


def config_error(text: str, at: int, message: str) -> ConfigError:
    """The error at an offset: its place, the message, that line, and a mark under the culprit."""
    start = text.rfind("\n", 0, at) + 1
    line, column = text.count("\n", 0, at) + 1, at - start + 1
    hidden = hide_secrets(text)
    before = hidden[max(start, at - SHOWN_WIDTH) : at]
    after = hidden[at : at + SHOWN_WIDTH].partition("\n")[0]
    before, after = (re.sub("\0+", "***", part) for part in (before, after))
    shown = "".join(c if c == "\t" or c.isprintable() else "?" for c in before + after)
    margin = re.sub(r"[^\t]", " ", before)
    return ConfigError(
        f"line {line}, column {column}: {printable(message)}\n    {shown}\n    {margin}^")


def hide_secrets(text: str) -> str:
    """The text, with NULs for client secrets, however misspelt, and passwords in URIs; as long."""
    text = text.replace("\0", "?")
    name = r"(client_?secrets?(?!\w)(?:\s|[=:\[{(]|//[^\n]*\n)*"  # as people may write it
    for secret in (name + r'")([^"\\]*(?:\\.[^"\\]*)*)', name + r')([^\s"=:\[{(;\0][^;\n]*)',
                   r'(://[^\s/"@:]*:)([^\s"]+)(?=@)'):
        text = re.sub(secret, lambda match: match[1] + re.sub(r"[^\n]", "\0", match[2]), text,
                      flags=re.DOTALL | re.IGNORECASE)
    return text


def lexemes(text: str) -> Iterator[Lexeme]:
    """The lexical tokens, lazily, and last an `end`. Raises ConfigError where no token starts."""
    lexicon = re.compile(
        r"""(?P<blank>  [ \t\r\n]+ | //[^\n]* )
          | (?P<time>   [0-9]+[smhd] (?!\w) )
          | (?P<string> "[^"\\]*(?:\\["\\][^"\\]*)*" )
          | (?P<word>   \w+ )
          | [=,{}\[\];:]""", re.VERBOSE)
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
    """The error where no token starts: an unfinished string, or a character of no use here."""
    half = re.compile(r'"[^"\\]*(?:\\["\\][^"\\]*)*').match(text, at)
    if half is None:
        hint = CHARACTER_HINTS.get(text[at])
        character = printable(text[at]) or f"\\x{ord(text[at]):02x}"
        return config_error(text, at, f"Unexpected '{character}'" + (f": {hint}" if hint else ""))
    if half.end() == len(text):
        return config_error(text, at, "This string is never closed: a double quote is missing")
    return config_error(text, half.end(), r"Invalid escape: in a string write \\ for a backslash"
                                          r" and \" for a double quote; there are no others")


def split_uri(uri: str) -> urllib.parse.SplitResult:
    """The parts of an HTTP or HTTPS URI. Raises ValueError, which says what is wrong with it."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", uri)
    if scheme is None:
        raise ValueError("Invalid URI: it must start with https:// or http://")
    if scheme[0].lower() not in ("http:", "https:"):
        raise ValueError("This is not a valid HTTP or HTTPS URI:"
                         f" it starts with {scheme[0]} instead of https:")
    if re.search(r"[\x00-\x1f\x7f]|^ | $", uri):
        raise ValueError("Invalid URI: it has blanks around it, or control characters in it")
    if "#" in uri:
        raise ValueError("URI fragments ('#...') are not allowed:"
                         " leave out the '#' and what follows")
    try:
        parts = urllib.parse.urlsplit(uri)
        place = re.fullmatch(r"(?:\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|[^\s%:<>?\[\\\]^|]{1,253})"
                             r"(?::([0-9]{0,5}))?", parts.netloc)
        if "@" in parts.netloc:
            raise ValueError("a user name or password in it is not supported")
        if place is None or int(place[1] or 0) > 65535:
            raise ValueError("its host or port is missing or misspelt; write https://HOST/PATH")
        normal_host(parts.hostname or "")
    except ValueError as error:
        raise ValueError(f"Invalid URI: {error}") from None
    if re.search(r"/(\.|%2[Ee]){1,2}(/|$)", parts.path):
        raise ValueError("Invalid URI: '.' or '..' in its path: write the path without them")
    return parts


def normal_host(host: str) -> str:
    """A host as sent: in ASCII, and a numeric one in its normal form. Raises ValueError."""
    if ":" in host:
        import ipaddress  # few configurations need it
        address = ipaddress.IPv6Address(host)
        number = int(address) & 0xffffffff
        return re.sub(r"[0-9]+\..*", f"{number >> 16:x}:{number & 0xffff:x}", str(address))
    if not host.isascii():
        host = ascii_host(host)
    if re.search(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.?$", host):  # others would read it as a number
        numbers = re.fullmatch(r"(0|[1-9][0-9]{0,2})" + r"\.(0|[1-9][0-9]{0,2})" * 3, host)
        if numbers is None or any(int(number) > 255 for number in numbers.groups()):
            raise ValueError(f"{host} is not a whole IPv4 address, such as 127.0.0.1")
    return host


def ascii_host(host: str) -> str:
    """An international host in ASCII, if IDNA 2003 (RFC 3490) and 2008 (RFC 5891) agree on it.

    Python's codec follows 2003: it turns a sharp s into ss and drops joiners (another domain under
    2008), accepts symbols that 2008 forbids, and lacks newer letters. Raises ValueError."""
    import unicodedata
    for c in host:
        known = unicodedata.ucd_3_2_0.category(c)[0] in "LMN" or c in "-."
        if not known or c in "\u00df\u1e9e\u03c2":  # sharp s, small and capital; final sigma
            shown = c if c.isprintable() else ascii(c)[1:-1]
            raise ValueError(f"programs disagree about which domain a host with '{shown}' is:"
                             " write it in its ASCII form, xn--...")
    return host.encode("idna").decode()


def normal_uri(uri: str, port: int | None = None) -> str:
    """A URI as sent: lower-case scheme and host, a path, no default port; `port` replaces it."""
    parts = split_uri(uri)
    host = normal_host(parts.hostname or "")
    host = f"[{host}]" if ":" in host else host
    port = parts.port if port is None else port
    default = {"http": 80, "https": 443}[parts.scheme]
    place = host if port in (None, default) else f"{host}:{port}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return f"{parts.scheme}://{place}" + urllib.parse.quote(target, safe="/%:@!$&'()*+,;=~|[]^?")


def is_loopback(uri: str) -> bool:
    """Whether a URI in normal form is on this machine."""
    host = (urllib.parse.urlsplit(uri).hostname or "").rstrip(".")
    return host == "::1" or re.fullmatch(  # RFC 6761 6.3
        r"(.*\.)?localhost|127(\.[0-9]+){3}|::ffff:7f..:[0-9a-f]+", host) is not None


def no_account(name: str, names: list[str]) -> str:
    """The message for the name of an account that is not configured."""
    import difflib
    near = difflib.get_close_matches(name[:64], names, 1, 0.6)
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    hint = f"did you mean '{near[0]}'?" if near else f"the accounts are {shown}."
    return printable(f"No account '{name}': {hint} If you have just added it, run 'pizauth reload'")


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
        self.last = Lexeme("start", "", 0)  # the one taken last
        self.lexeme = next(self.lexemes)  # the one to be taken next
        self.reading = ""  # the name of the option whose value is being read
        self.global_options, self.account_options = Config.options(), Account.options()

    def error(self, lexeme: Lexeme, message: str) -> ConfigError:
        return config_error(self.source, lexeme.at, message)

    def take(self, kind: str, wanted: str = "") -> Lexeme:
        """The next lexeme, which must be of this kind; `wanted` describes it in errors."""
        lexeme, last = self.lexeme, self.last
        if lexeme.kind == kind:
            self.lexeme, self.last = next(self.lexemes, lexeme), lexeme
            return lexeme
        message = f"Expected {wanted or repr(kind)} after {last}"
        if "\n" in last.text:
            lexeme, message = last, f"{OVER_LINES}: is its last double quote missing?"
        elif lexeme.kind == "end":
            message += ", but the file ends"
        elif (kind, lexeme.kind) == ("word", "}"):
            message += ": leave out the '}'"
        elif (last.kind, lexeme.kind) in (("}", ";"), (",", "]"), (",", "}")):
            message += f": leave out the '{lexeme.kind if lexeme.kind == ';' else ','}'"
        elif kind == ";":  # it was probably forgotten there, not where the next option starts
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
                name = place.value()
                if name in accounts:
                    raise self.error(place, f"There is an account '{name}' already:"
                                            " choose another name")
                accounts[name], places[name] = account, place
            else:
                self.option(self.global_options, values)
        config = Config(accounts={}, **values)
        schedule = {name: getattr(config, name) for name in Schedule.options()}
        config.accounts = {name: Account(name=name, **{**schedule, **account})
                           for name, account in accounts.items()}
        self.check_listeners(config, places)
        return config

    def check_listeners(self, config: Config, places: dict[str, Lexeme]) -> None:
        """Raise ConfigError if there is no account, or no listener for some account's redirect."""
        if not config.accounts:
            raise ConfigError('Must specify at least one account: account "NAME" { ... }')
        redirects = any(account.redirect_scheme for account in config.accounts.values())
        if config.https_key is not None and config.https_cert is None:
            raise ConfigError("https_key is set, but not https_cert: set both, or neither")
        if config.http_listen == config.https_listen == () and redirects:
            raise ConfigError("Cannot set both http_listen and https_listen to 'none':"
                              " the browser must reach one of them")
        deaf = [scheme for scheme in ("http", "https") if not config.addresses(scheme)]
        for name, account in config.accounts.items():
            if (scheme := account.redirect_scheme) in deaf:
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
            self.option(self.account_options, values)
        self.take("}")
        for name, option in self.account_options.items():
            mandatory = option.default is MANDATORY or option.unless
            if mandatory and name not in values and option.unless not in values:
                raise self.error(place, f'{name} not specified: this account needs {name} = "...";')
        if values.get("client_auth", "post") not in ("post", "basic"):
            raise self.error(place, 'client_auth is neither "post" nor "basic"')
        if values.keys() >= {"client_secret", "client_secret_cmd"}:
            raise self.error(place, "Both client_secret and client_secret_cmd are set: keep one")
        if "login_hint" in values and "login_hint" in dict(values.get("auth_uri_fields", ())):
            raise self.error(place, "Both login_hint and auth_uri_fields have a 'login_hint':"
                                    " keep the one in auth_uri_fields")
        return place, values

    def option(self, options: Mapping[str, Option], values: dict[str, Any]) -> None:
        """option := NAME "=" value ";" """
        inside = options is self.account_options
        name = self.take("word", "the name of an option" + (" or '}'" if inside else ""))
        if name.text not in options:
            raise self.error(name, self.unknown(name.text, inside))
        if name.text in values:
            raise self.error(name, f"Mustn't specify '{name.text}' more than once")
        self.take("=")
        self.reading = name.text
        values[name.text] = getattr(self, options[name.text].read)()
        self.take(";")

    def unknown(self, name: str, inside: bool) -> str:
        """The message for a name that is no option here, inside or outside of an account."""
        if name in RENAMED:
            return f"Unknown option '{name}': {RENAMED[name]}"
        if name == "account":
            return "This account starts inside another one: a '}' is missing above"
        if name in self.account_options:
            return f"Option '{name}' belongs in an account: account \"NAME\" {{ {name} = ...; }}"
        if name in self.global_options:
            return (f"Option '{name}' is for all accounts: move it out of this account's braces, or"
                    " is the account's '}' missing above?")
        import difflib
        block = self.lexeme.kind in ("string", "{")
        known = ["account"] if block or not inside else []
        if not block:
            known += self.account_options if inside else self.global_options
        near = difflib.get_close_matches(name[:64].lower(), known, 1, 0.6)
        hint = f": did you mean '{near[0]}'?" if near else f": they are {', '.join(sorted(known))}"
        return f"Unknown {'block' if block else 'option'} '{name[:64]}'{hint}"

    def string(self) -> str:
        return self.take("string", A_STRING).value()

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
            raise self.error(lexeme, f"{OVER_LINES}, so it is no URI: is a double quote missing?")
        try:
            normal_uri(lexeme.value())
        except ValueError as error:
            raise self.error(lexeme, str(error)) from None
        return lexeme.value()

    def listen(self) -> Addresses:
        """Where a listener listens: `none`, `off`, or a STRING `HOST:PORT`."""
        lexeme = self.lexeme
        if lexeme.text in ("none", "off"):
            self.take("word")
            return ()
        address = self.take("string", '"HOST:PORT" or none').value()
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
        """The items between a pair of brackets, separated by commas."""
        self.take(brackets[0], wanted)
        while self.lexeme.kind != brackets[1]:
            if self.last.kind != brackets[0]:
                self.take(",", f"',' or '{brackets[1]}'")
            yield item()
        self.take(brackets[1])

    def pair(self) -> tuple[str, str]:
        """pair := STRING ":" STRING; the key must be none that we send ourselves"""
        lexeme = self.take("string", A_STRING)
        key = lexeme.value()
        if key in RESERVED_KEYS.get(self.reading, ()):
            raise self.error(lexeme, f"'{key}' is a reserved key: pizauth sends that field itself")
        self.take(":")
        return key, self.string()


# ---- OAuth 2.0 messages ----
# One pure function a message: built and judged here, sent by fetch alone.

TOKEN_REQUEST_LIMIT = 30  # Seconds that one token request may take in all, look-ups included.
RETRY_AFTER_LIMIT = 3600  # A Retry-After of more seconds is shortened to this.
LIFE_LIMIT = 10 * 365 * 86400  # Longer lifetimes (in seconds) are ignored.
DEVICE_LIFE = 300  # Seconds that a device code lasts if the provider does not say.
DEVICE_INTERVAL = 5  # Seconds between two polls if the provider does not say (RFC 8628 3.2).
CODE_LENGTH = 100  # Characters of a user code.
SECRET_LENGTH = 4096  # Characters of a client secret.
SECRET_LIMIT = 30  # Seconds that client_secret_cmd may run.
ANSWER_LIMIT = 1 << 20  # Bytes of a token endpoint's answer.
FORM_LIMIT = 64 << 10  # Bytes of an answer that is a form.
FIELDS_LIMIT = 100  # Fields of a query or a form.
PASSING_ERRORS = ("temporarily_unavailable", "server_error", "slow_down")
OTHER_WORDS = ("error_code", "code", "status", "title", "message", "msg", "error_description",
               "detail")  # where errors that are not of OAuth have theirs
USER_CLAIMS = ("email", "preferred_username", "upn")  # of ID tokens
SECRET_FIELDS = ("code", "code_verifier", "refresh_token", "client_secret", "access_token",
                 "device_code", "token")
ADVICE = {  # What a provider's words mean, and what to do: AADSTS numbers, phrases, error codes.
    # The first entry that fits counts, so particular ones stand before general ones. Sources:
    # entra-docs reference-error-codes, unless another source is named
    "50057": "Your account is disabled: ask your organisation's admin",
    "50072, 50074, 50076, 50079, 50158": "A second factor is required: log in again with it",
    "50078, 70043": "Your organisation limits how long a login lasts: log in again",
    "50132, 50133, 50173": "The password was changed or the login revoked: log in again",
    "50196": "The provider was asked too often: make refresh_at_least longer, and log in again",
    "53000, 53001": "Only devices that your organisation manages may log in: ask its admin",
    "53003, 530032, 530035": "A policy blocks the login: delete device_auth_uri, or ask the admin",
    "65001, 65004": "The client's access was not accepted: log in again, and accept it",
    "65005, 650057, 90008": "The client lacks a scope: add it under API permissions in its console",
    "70000": "The login has ended, or scopes asks for more than was accepted: log in again",
    "70008, 700082": "The login was not used for too long (90 days, usually): log in again",
    "700084, 9002326, 9002327": "redirect_uri is registered for a single-page application: register"
        " it for 'Mobile and desktop applications' instead",
    "9002331, 9002332": "This client is for other accounts: as the tenant in all URIs, write"
        " consumers for personal accounts, organizations for those of work",  # mail-archiver#478
    "7000218": "A secret is required: set client_secret, or allow public client flows in the"
        " console, and register redirect_uri for 'Mobile and desktop applications'",
    "700025": "This client must not send a secret: delete client_secret",  # authd#1881
    "70002, 7000215, 7000222": "client_secret is wrong or expired: make a new one; copy its Value",
    "28002, 70011, 700022": "A scope is wrong or of another service: use only those for Outlook and"
        " offline_access",
    "50059, 90002": "The provider does not know this tenant: check the tenant in all URIs",
    # Google: OAuth for desktop apps
    "admin_policy_enforced": "Your Workspace blocks this client: ask its admin to trust client_id",
    "org_internal": "This client is for one organisation: make it External, or log in from there",
    "deleted_client, client was not found": "The client was deleted or never existed: check"
        " client_id; for 30 days, the console can restore it",
    # Google: refresh token expiration
    "Token has been expired or revoked": "The login has ended: log in again; if it never lasts more"
        " than 7 days at Google, publish the client (Audience, in its console)",
    "INVALID_INPUT, invalid_redirect_uri": "A field is empty or not allowed: check client_id,"
        " client_secret and redirect_uri",  # Yahoo's troubleshooting page; tried at Fastmail
    # RFC 6749 4.1.2.1 and 5.2
    "server_error, temporarily_unavailable": "The provider has trouble: wait a few minutes",
    "invalid_grant": "The login is too old, used up or revoked: log in again; if that fails at"
        " once, compare redirect_uri with the one in the console",
    "invalid_client": "client_id, client_secret or client_auth is wrong: check them in the console",
    "unauthorized_client": "This client may not log in this way, or not with this kind of account:"
        " check client_id and the client's account types in the console",
    "invalid_request, unsupported_grant_type, unsupported_response_type": "The request was not"
        " understood: check auth_uri, token_uri and auth_uri_fields",
    "invalid_scope": "A scope is misspelt or not allowed: check scopes; for Google's mail, delete"
        " device_auth_uri",  # git-credential-oauth#38
    "access_denied": "You or an admin said no: approve the login; at Google, first add yourself to"
        " the test users, or publish the client (Audience, in the console)",
    "interaction_required, login_required": "The provider wants to ask you something: log in again,"
        " without prompt=none",  # OpenID Connect Core 3.1.2.6
    "authorization_declined, bad_verification_code, expired_token": "The code was refused, wrong or"
        " too late: run 'pizauth show' for a new one"}  # entra-docs v2-oauth2-device-code


class TokenResponse(Record):
    """A good answer (RFC 6749 5.1); expires_in is in seconds, None if missing or senseless."""

    access_token: str
    expires_in: float | None
    refresh_token: str | None
    users: tuple[str, ...]  # names of who has logged in; empty if it does not tell


class DeviceResponse(Record):
    """A good answer of the device authorization endpoint (RFC 8628 3.2); times in seconds."""

    device_code: str
    user_code: str
    url: str  # verification_uri_complete if there is one
    expires_in: float
    interval: float


def code_challenge(code_verifier: str) -> str:
    """The S256 challenge of a verifier (RFC 7636 4.2)."""
    digest = hashlib.sha256(code_verifier.encode()).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def authorization_request(account: Account, state: str, code_verifier: str,
                          redirect_uri: str) -> str:
    """The URL that the person must visit (RFC 6749 4.1.1, RFC 7636 4.3)."""
    fields = [
        ("access_type", "offline"),
        ("code_challenge", code_challenge(code_verifier)), ("code_challenge_method", "S256"),
        ("client_id", account.client_id), ("redirect_uri", redirect_uri),
        ("response_type", "code"), ("state", state),
        *([("scope", " ".join(account.scopes))] if account.scopes else []),
        *account.auth_uri_fields,
        *([("login_hint", account.login_hint)] if account.login_hint is not None else [])]
    uri = normal_uri(account.auth_uri)
    return uri + ("&" if "?" in uri else "?") + urllib.parse.urlencode(fields)


def authorization_response(query: str) -> Fields:
    """The fields of a redirect's query (RFC 6749 4.1.2, 4.1.2.1). Raises BadRequest."""
    try:
        pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, max_num_fields=FIELDS_LIMIT)
    except ValueError:
        raise BadRequest(400, "The address has too many fields.") from None
    names = [name for name, _ in pairs]
    for name in ("state", "code", "error", "error_description", "iss"):
        if names.count(name) > 1:  # RFC 6749 3.1
            raise BadRequest(400, f"The address has more than one '{name}'.",
                             "The login still waits: give the whole address, once.")
    return dict(pairs)


def access_token_request(account: Account, code: str, code_verifier: str,
                         redirect_uri: str) -> Form:
    """The form that exchanges a code for tokens (RFC 6749 4.1.3, RFC 7636 4.5)."""
    return [("code", code), ("client_id", account.client_id), ("code_verifier", code_verifier),
            ("redirect_uri", redirect_uri), ("grant_type", "authorization_code")]


def refresh_request(account: Account, refresh_token: str) -> Form:
    """The form that asks for a new access token (RFC 6749 6)."""
    return [("client_id", account.client_id), ("refresh_token", refresh_token),
            ("grant_type", "refresh_token")]


def device_request(account: Account) -> Form:
    """The form that asks for a device code and a user code (RFC 8628 3.1)."""
    scope = [("scope", " ".join(account.scopes))] if account.scopes else []
    return [("client_id", account.client_id), *scope]


def device_token_request(account: Account, device_code: str) -> Form:
    """The form that asks for the tokens of a device login (RFC 8628 3.4)."""
    return [("client_id", account.client_id), ("device_code", device_code),
            ("grant_type", "urn:ietf:params:oauth:grant-type:device_code")]


def revocation_request(account: Account, access_token: str, refresh_token: str | None) -> Form:
    """The form that revokes an account's tokens (RFC 7009 2.1)."""
    kind = "access_token" if refresh_token is None else "refresh_token"
    return [("client_id", account.client_id), ("token", refresh_token or access_token),
            ("token_type_hint", kind)]


def authenticated(account: Account, form: Form, secret: str | None) -> tuple[Form, str]:
    """A form as sent, and its Authorization header or "": a secret is in one (RFC 6749 2.3.1)."""
    form = [*form, *account.token_uri_fields]
    if secret is None:
        return form, ""
    if account.client_auth == "post":
        return [*form, ("client_secret", secret)], ""
    pair = ":".join(map(urllib.parse.quote_plus, (account.client_id, secret)))
    return form, "Basic " + base64.b64encode(pair.encode()).decode()


def printed_secret(status: int | None, output: bytes) -> str:
    """The first line that client_secret_cmd printed. Raises TokenError, without the output."""
    line = output.partition(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
    how = (f"was killed after {SECRET_LIMIT} s" if status is None else
           f"ended with status {status}" if status else
           "printed nothing on its first line" if not line else
           "" if line.isprintable() and len(line) <= SECRET_LENGTH else
           "printed a first line that is too long, or not printable")
    if how:
        raise TokenError(f"client_secret_cmd {how}", "outage")
    return line


def without_secrets(text: str, form: Form) -> str:
    """A provider's message, printable, the form's secrets removed even where it escapes them."""
    escapes = (str, printable, html.escape, partial(html.escape, quote=False), urllib.parse.quote,
               urllib.parse.quote_plus, partial(urllib.parse.quote, safe=""))
    sent = {escape(value) for name, value in form if name in SECRET_FIELDS
            for escape in escapes} - {""}
    longest_first = "|".join(map(re.escape, sorted(sent, key=len, reverse=True)))
    text = text.replace("&#39;", "&#x27;")  # html.escape() writes the latter
    for clean in (str, printable):
        text = re.sub(longest_first, "...", clean(text), flags=re.IGNORECASE) if sent else text
    return printable(text)


def advised(words: str) -> str:
    """A provider's words, and the ADVICE on them if there is any: at most 500 characters."""
    said = re.sub(r"\W+", " ", f" {words} ")
    for names, advice in ADVICE.items():
        known = [f"AADSTS{name}" if name.isdigit() else name for name in names.split(", ")]
        if any(f" {name} " in said for name in known):
            return f"{words[: 498 - len(advice)].rstrip('. ')}. {advice}"
    return words[:500]


def outcome_bytes(status: int, retry_after: float, whole: bool, body: bytes,
                  trouble: str = "") -> bytes:
    """A child's report of a token request. Status 0: no answer, and the body says why. `whole`: the
    length of the body was declared, so truncation would have been noticed. `trouble`: what keeps
    the answer from being read or followed, for the person."""
    head = f"{status} {retry_after} {whole:d} {printable(trouble)}\n"
    return head.encode("utf-8", "replace") + body


def judged(outcome: bytes, form: Form, read: Callable[[dict[str, Any]], Answered],
           option: str = "token_uri") -> Answered:
    """What read() makes of the fields of a good answer of an option's endpoint; read() raises
    ValueError. Raises TokenError, without secrets of the form."""
    head, _, body = outcome.partition(b"\n")
    number, delay, whole, trouble = head.decode("utf-8", "replace").split(" ", 3)
    status, retry_after = int(number), min(float(delay), RETRY_AFTER_LIMIT)
    if not status:
        reason = without_secrets(body.decode("utf-8", "replace"), form)
        raise TokenError(reason, "outage")
    answer = json_object(body)
    error, words = provider_words(answer or {}, status)
    message = f"HTTP {status}" + (f": {without_secrets(words, form)}" if words else "")
    if status in (408, 425, 429) or status >= 500:
        raise TokenError(message, "outage", retry_after, error)
    fault = ""
    if 200 <= status < 300:
        fields = form_fields(body, whole == "1") if answer is None else answer
        try:
            return read(fields or {})
        except ValueError as reason:
            fault = "" if fields is None or trouble else str(reason)
    message = advised(message)
    cause, guess = cause_and_guess(status, error, answer, fault, trouble, option)
    if guess and (status < 400 or not words):
        message += f", but {without_secrets(guess, form)}"
    raise TokenError(message, cause, retry_after, error)


def cause_and_guess(status: int, error: str, answer: dict[str, Any] | None, fault: str,
                    trouble: str, option: str) -> tuple[str, str]:
    """The cause of the TokenError that an answer leads to, and what to tell the person. `fault`
    is what is wrong with the fields of a 2xx answer; for `trouble` see outcome_bytes()."""
    if error in PASSING_ERRORS:
        return "passing", ""
    if is_visible_ascii(error):
        return "refused", ""
    if 300 <= status < 400 or status < 400 and not fault and not trouble:
        return "passing", (f"{trouble or 'no OAuth answer'}: is {option} right, or is it a login"
                           " page of the network?")
    if fault or trouble:
        return "odd", fault or trouble
    if status in (400, 401) and answer is not None:
        return "unexplained", "its JSON is not an OAuth error"
    return "odd", f"no OAuth answer: is {option} right?"


def json_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body, or None. A byte that is not UTF-8 spoils only its own text."""
    with suppress(ValueError, RecursionError):
        text = body.decode(json.detect_encoding(body), "replace")
        value = json.loads(text, parse_int=float)  # a million digits are fast then
        if isinstance(value, dict):
            return value
    return None


def provider_words(answer: dict[str, Any], status: int) -> tuple[str, str]:
    """The `error` of a bad answer (RFC 6749 5.2), or "", and what the person gets to read."""
    error = answer.get("error")
    code = error if isinstance(error, str) else ""
    found = [code, answer.get("error_description")]
    if not code and status >= 400:
        found = [one.get(key) for one in (answer, error) if isinstance(one, dict)
                 for key in OTHER_WORDS]
    return code[:CHUNK], ": ".join(word for word in found if isinstance(word, str) and word)[:CHUNK]


def form_fields(body: bytes, whole: bool) -> dict[str, Any] | None:
    """The fields of a form, as some providers answer, if the body is surely whole; else None."""
    text = body.decode("utf-8", "replace").strip() if whole and len(body) <= FORM_LIMIT else ""
    if not re.fullmatch(r"[!-~\x80-\U0010ffff]+", text) or text.count("&") >= FIELDS_LIMIT:
        return None
    fields = dict(urllib.parse.parse_qsl(text))
    return fields if fields.keys() & {"access_token", "error"} else None  # not a page


def good_answer(answer: dict[str, Any]) -> TokenResponse:
    """The tokens in an answer (RFC 6749 5.1), read with tolerance. Raises ValueError with why."""
    access_token, refresh_token = answer.get("access_token"), answer.get("refresh_token") or None
    token_type = answer.get("token_type")
    for name, token in (("access_token", access_token), ("refresh_token", refresh_token)):
        if token is not None and not (isinstance(token, str) and is_visible_ascii(token)):
            raise ValueError(f"its {name} is not printable ASCII without blanks")
    if access_token is None:
        raise ValueError("it has no access_token: is token_uri right?")
    if token_type is not None and str(token_type).lower() != "bearer":
        raise ValueError(f"its token_type is '{str(token_type)[:100]}' instead of 'bearer'")
    return TokenResponse(access_token=access_token, refresh_token=refresh_token,
                         expires_in=sensible_life(answer.get("expires_in")),
                         users=claimed_users(answer))


def claimed_users(answer: dict[str, Any]) -> tuple[str, ...]:
    """The user's names in the claims of the ID token, or else of an access token that is a JWT. The
    signature is not checked: the answer comes from the token endpoint (OpenID Connect 3.1.3.7)."""
    for name in ("id_token", "access_token"):
        with suppress(ValueError, IndexError):  # it is no JWT
            payload = str(answer.get(name)).split(".")[1]
            claims = json_object(base64.urlsafe_b64decode(payload + "==")) or {}
            users = [claims[claim] for claim in USER_CLAIMS if isinstance(claims.get(claim), str)]
            if users:
                return tuple(printable(user)[:254] for user in users)  # RFC 5321 4.5.3.1.3
    return ()


def good_device_answer(answer: dict[str, Any]) -> DeviceResponse:
    """The codes in an answer (RFC 8628 3.2), read with tolerance. Raises ValueError with why."""
    device_code, user_code = answer.get("device_code"), answer.get("user_code")
    if isinstance(user_code, float):  # a number in JSON
        user_code = f"{user_code:.0f}"
    uris = [answer.get(name) for name in (
        "verification_uri_complete", "verification_uri", "verification_url")]  # Google's last
    url = next((uri for uri in uris if isinstance(uri, str)
                and re.fullmatch(r"https?://[!-~]+", uri, re.IGNORECASE)), None)
    if not isinstance(device_code, str) or not is_visible_ascii(device_code):
        raise ValueError("it has no device_code: is device_auth_uri right?")
    user_code = user_code.strip() if isinstance(user_code, str) else ""
    if not user_code or not user_code.isprintable() or len(user_code) > CODE_LENGTH:
        raise ValueError("it has no user_code that can be typed")
    if url is None:
        raise ValueError("it has no verification_uri that can be opened")
    return DeviceResponse(
        device_code=device_code, user_code=user_code, url=url,
        expires_in=sensible_life(answer.get("expires_in")) or DEVICE_LIFE,
        interval=max(1, sensible_life(answer.get("interval")) or DEVICE_INTERVAL))


def is_visible_ascii(text: str) -> bool:
    """Printable ASCII without blanks, as tokens and error codes are (RFC 6749 A.7, A.12, A.17)."""
    return re.fullmatch(r"[!-~]+", text) is not None


def sensible_life(expires_in: object) -> float | None:
    """A token's life in seconds, given as number or text; None if it makes no sense."""
    with suppress(ValueError):
        seconds = float(expires_in) if isinstance(expires_in, (str, float)) else 0
        if 0 < seconds <= LIFE_LIMIT:
            return seconds
    return None


# ---- Wire formats ----
# A reader of requests takes all bytes that have come so far. It returns the request, or None if
# more must come, or raises the error to answer with. Pages are bytes out.

REQUEST_LIMIT = 64 << 10  # Bytes of a control request.
RESTORE_LIMIT = 16 << 20  # Bytes of one that brings a dump.
WISH_LIMIT = 86400  # Seconds that a client may wait, or want a token to last.
HEAD_LIMIT = 64 << 10  # Bytes of an HTTP head: browsers send the cookies of all localhost.
HTTPS_HERE = ("it came by HTTPS to the HTTP port. Probably a program on localhost once told the"
              " browser to use only HTTPS there (HSTS). Make the browser forget that (in Chromium"
              " at chrome://net-internals/#hsts), or write 127.0.0.1 or https: in redirect_uri")
HTTP_HERE = "This port speaks HTTPS: is redirect_uri in pizauth.conf what it should be?"
PASTE = ("paste all that the browser's address bar shows after the login, or at least all from the"
         " '?' on (a login with a code needs no 'complete')")
# What may stand around a pasted address.
AROUND = " \"'`<>()[].,;\u2018\u2019\u201c\u201d\u00ab\u00bb"
TOO_MANY: dict[str, PizauthError] = {  # for peers that must make room
    "control": RequestError("Too many clients are connected at once, so this one was turned away:"
                            " 'pizauth status' tells how things are"),
    "browser": BadRequest(503, "Too many browsers wait at once.", "Reload this page in a while.")}
LOG_IN_AGAIN = "To log in, run 'pizauth show ACCOUNT' and open the URL that it prints."


def until_eof(buffer: bytearray, eof: bool) -> bytes | None:
    """A control request: all until end of file. Raises RequestError as soon as it is too long."""
    limit = RESTORE_LIMIT if buffer.startswith(b"restore:") else REQUEST_LIMIT
    if len(buffer) > limit:
        raise RequestError(f"The request is longer than {limit >> 10} KiB")
    return bytes(buffer) if eof else None


def read_wish(words: str) -> dict[str, int]:
    """What the option words of `showtoken` and `refresh` ask for, 0 if nothing; `wait` and `life`
    are in seconds. Unknown words mean nothing. Raises RequestError."""
    wish = dict.fromkeys(("withurl", "json", "wait", "life"), 0)
    for word in words.split(","):
        name, _, value = word.partition("=")
        if name in ("wait", "life"):
            if not re.fullmatch("[0-9]{1,5}", value) or int(value) > WISH_LIMIT:
                raise RequestError(f"'{name}' takes a number of seconds, at most {WISH_LIMIT}")
            wish[name] = int(value)
        elif word in wish:
            wish[word] = 1
    return wish


def http_head(buffer: bytearray, eof: bool) -> tuple[str, str] | None:
    """Target and Host of a GET (RFC 9112). Raises BadRequest as soon as it is clearly not one."""
    line_end = buffer.find(b"\n")
    line = bytes(buffer[: line_end if line_end >= 0 else 32])
    check_request_line(line, line_end >= 0)
    blank_line = re.search(rb"\n\r?\n", buffer)
    end = len(buffer) if blank_line is None else blank_line.start()
    if end > HEAD_LIMIT:
        raise BadRequest(
            431, f"The request is longer than {HEAD_LIMIT >> 10} KiB.",
            "The browser stores too many cookies for localhost: delete them and open the URL again,"
            " or write 127.0.0.1 instead of localhost in redirect_uri.")
    if blank_line is None:
        if eof and buffer:
            raise BadRequest(400, "The request ended too soon.")
        return None
    return line.split(b" ")[1].decode(), host_header(bytes(buffer[line_end + 1 : end]))


def check_request_line(line: bytes, whole: bool) -> None:
    """Raise BadRequest if a request line, or the start of one, is not a GET of a path."""
    method, space, rest = line.partition(b" ")
    if line.startswith(b"\x16"):  # a TLS handshake (RFC 8446 5.1)
        raise BadRequest(400, HTTPS_HERE, level=WARNING)
    if (not re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{0,16}", method)
            or (space or whole) and not method):
        raise BadRequest(400, "This is not an HTTP request.")
    if space and method != b"GET":
        raise BadRequest(405, "Only GET is answered here.")
    if rest and not rest.startswith(b"/"):
        raise BadRequest(400, "The request's target must be a path.")
    if whole and not re.fullmatch(rb"GET /[!-\"$-~]* HTTP/1\.[0-9]\r?", line):
        raise BadRequest(400, "This is not an HTTP/1.x request.")


def host_header(headers: bytes) -> str:
    """The one Host among the header lines. Raises BadRequest, also if a body is announced."""
    hosts = []
    for line in headers.split(b"\n") if headers else ():
        match = re.fullmatch(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)\r?", line)
        if match is None:
            raise BadRequest(400, "A header line is malformed.")
        name, value = match[1].lower(), match[2].strip(b" \t")
        if name == b"host":
            hosts.append(value.decode("latin-1"))
        if name == b"transfer-encoding" or name == b"content-length" and value != b"0":
            raise BadRequest(413, "Requests with a body are not supported.")
    if len(hosts) != 1:
        raise BadRequest(400, "The request must have exactly one Host.")
    return hosts[0]


def redirect_matches(redirect_uri: str, scheme: str, host: str, target: str) -> bool:
    """Whether a request fits a redirect URI: extra query pairs are allowed, none may be missing."""
    expected = urllib.parse.urlsplit(redirect_uri)
    path, _, query = target.partition("?")
    host = host.lower().removesuffix(":80" if scheme == "http" else ":443")
    given = urllib.parse.parse_qsl(query, keep_blank_values=True)
    wanted = urllib.parse.parse_qsl(expected.query, keep_blank_values=True)
    return ((expected.scheme, expected.netloc, expected.path) == (scheme, host, path)
            and all(given.count(pair) >= wanted.count(pair) for pair in wanted))


def address_in(text: str) -> str:
    """The address in a pasted text, which a terminal may have wrapped or a mail program encoded,
    and which may have words around it."""
    import quopri
    text = re.sub(r"(?m)^[>| ]+", "", text)  # a mail that is quoted in another one
    if "=3D" in text and re.fullmatch(r"[^=]*(?:=(?:[0-9A-F]{2}|\r?\n)[^=]*)+", text):
        text = quopri.decodestring(text.encode()).decode("utf-8", "replace")
    text = re.sub(r"[\\\u00ad\u200b\u2060\ufeff]", "", text)  # escaped, or invisible
    text = next((part for part in re.split(r"\n\s*\n", text.strip()) if "=" in part), "")
    text = re.sub(r"\s*\n\s*", "", text)
    text = re.sub(r"&(?:(?:amp|#38|#x26);)+", "&", text, flags=re.I)
    text = re.sub(r'^[^?&=]*?(?:href="?)?(?=https?://)', "", text, flags=re.I).strip(AROUND)
    text = re.split(r'[^!-~]|["<>{}\[\]]', text)[0].rstrip(AROUND)  # an address holds none of these
    half = text[: len(text) // 2]  # it may have been pasted twice
    return half if half * 2 == text else text


def pasted_redirect(text: str) -> tuple[str, tuple[str, str]]:
    """Scheme, and target and host, of a redirect copied from a browser's address bar; scheme and
    host are empty if only the query was, the scheme if the browser hid it. Raises RequestError."""
    text = address_in(text)
    if "?" not in text and "=" in text.partition("&")[0] and "/" not in text.partition("=")[0]:
        text = "?" + text
    match = re.fullmatch(r"(?:(https?)://)?([^/?#]*)(/[^?#]*)?\?([^#]*)(?:#.*)?", text,
                         re.IGNORECASE)
    if match is None:
        raise RequestError(f"This is not the address of a redirect: {PASTE}")
    scheme, host, path, query = (part or "" for part in match.groups())
    if not re.search("(?:^|&)(?:state|error)=", query):
        raise RequestError(f"This is not the address of a redirect, for it has no 'state': {PASTE}")
    return scheme.lower(), (f"{path or '/'}?{query}", host)


SIGNS = {  # of a page: how the login went
    "worked": "\u2714 Authorised", "failed": "\u2718 Not authorised",
    "waiting": "\u2026 Not finished yet", "unknown": "? Outcome unknown"}
STYLE = (
    "body{font:1.1em/1.5 sans-serif;max-width:36em;margin:12vh auto;padding:0 1em;"
    "overflow-wrap:anywhere}h1{font-size:1.5em}.worked{color:#17652c}.failed{color:#b3261e}"
    "@media(prefers-color-scheme:dark){.worked{color:#6fdd8b}.failed{color:#ff9d94}}")


def page(status: int, sign: str, text: str, advice: str) -> bytes:
    """An HTTP response for a person; `sign` is a key of SIGNS. Text and advice are escaped."""
    text, advice = (html.escape(printable(part)) for part in (text, advice))
    body = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        '<meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{SIGNS[sign]} - pizauth</title><style>{STYLE}</style>"
        f'<h1 class="{sign}">{SIGNS[sign]}</h1><p>{text}</p><p>{advice}</p></html>\n').encode()
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    headers = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        "Content-Type: text/html; charset=utf-8", f"Content-Length: {len(body)}",
        "Connection: close", "Cache-Control: no-store", "Referrer-Policy: no-referrer",
        "X-Content-Type-Options: nosniff",
        (f"Content-Security-Policy: default-src 'none'; style-src 'sha256-{digest}';"
         " frame-ancestors 'none'"),
        *(["Allow: GET"] if status == 405 else []), "", ""]
    return "\r\n".join(headers).encode() + body


def next_step(sign: str, name: str) -> str:
    """What the person can do after a login with this sign."""
    return {"worked": "Mail programs get its tokens from now on.",
            "failed": f"To try again, run 'pizauth show {name}' and open the URL that it prints.",
            "waiting": "'pizauth status' tells how it ends."}[sign]


def login_reply(peer: str, name: str, sign: str, text: str) -> bytes:
    """The reply to a browser, or to `complete`, about how a login went."""
    step = next_step(sign, name)
    if peer == "browser":
        closing = "" if sign == "failed" else ": you can safely close this page."
        return page(200, sign, text + closing, step)
    text = "The provider has not answered yet" if sign == "waiting" else text.rstrip(".")
    return (f"ok:{text}" if sign == "worked" else f"error:{text}. {step}").encode()


def error_words(response: Fields) -> str:
    """The provider's words in an authorization response with an `error` (RFC 6749 4.1.2.1)."""
    words = filter(None, map(response.get, ("error", "error_description")))
    return advised(printable(": ".join(words))) or "no reason given"


def without_state(response: Fields) -> BadRequest:
    """The answer to a request without `state`. It may still carry a provider's error."""
    if "error" not in response:
        return BadRequest(404, "There is nothing here.")
    return BadRequest(404, f"The provider refused: {error_words(response)}",
                      "It did not say which login that was, so an account may still wait for one:"
                      " see 'pizauth status'. " + LOG_IN_AGAIN, "failed", INFO)


def error_reply(error: PizauthError, peer: str = "control") -> bytes:
    """The reply to a refused peer: a page for a browser, `error:` and a sentence for a client."""
    text = str(error)
    if isinstance(error, BadRequest):
        advice = error.advice or LOG_IN_AGAIN
        if peer == "browser":
            return page(error.status, error.sign, text, advice)
        text = f"{text.rstrip('.')}. {advice}"
    return f"error:{text}".encode("utf-8", "replace")


# ---- Time and token states ----
# Authenticator replaces a token's record when its meaning changes; fields with a default are its
# bookkeeping. Moments are by the clock that counts suspension. A record lists its appointments:
# when something is due, and the key of the act in Authenticator._ACTS.

REFRESH_GAP = 1  # Seconds between the starts of two refreshes of one account, whoever asks.
LEAST_AGE = 10  # refresh_before_expiry spares tokens younger than this, or than half their life.


class Clock:
    """The time, by a clock that counts suspension and by the wall clock. Tests have their own."""

    def __init__(self) -> None:
        self.id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now(self) -> float:
        """Seconds since some moment; never set back."""
        return time.clock_gettime(self.id)

    def wall(self) -> float:
        """Seconds since the epoch, as far as the machine knows."""
        return time.time()

    def epoch(self, moment: float) -> float:
        """A moment of now() in seconds since the epoch."""
        return self.wall() - self.now() + moment

    def date(self, moment: float) -> str:
        """A moment of now() as local time, in the form of RFC 2822."""
        return time.strftime("%a, %d %b %Y %H:%M:%S %z", time.localtime(self.epoch(moment)))


class Pending(Record):
    """A login has begun: the person must visit the URL."""

    url: str = ""
    user_code: str = ""  # what the person must enter there, if anything
    state: str = ""  # identifies its redirect; empty if it ends without one
    remind_at: float
    notified_at: float | None = None
    notifying: bool = False  # while auth_notify_cmd runs
    what: str  # the request that the login goes on with, a key of Authenticator._REQUESTS
    form: Form | None = None  # what that request sends
    tries: int = 0
    retry_at: float | None = None  # when that request is tried again, or may be made
    cancel: Cancel | None = None  # set while a token request runs

    def appointments(self, account: Account) -> Iterator[tuple[float, str]]:
        """When to remind the person, and when to post the next request."""
        yield self.remind_at, "remind"
        if self.retry_at is not None:
            yield self.retry_at, "proceed"

    def reply(self, with_url: bool) -> str:
        """The reply to a control client that wants a token."""
        code = f" and code {self.user_code}" if self.user_code else ""
        return f"pending:{self.url}{code}" if with_url else "pending:"

    def status(self, clock: Clock) -> str:
        """The state as `status` prints it."""
        notified = ("" if self.notified_at is None
                    else f" (last notification {clock.date(self.notified_at)})")
        device = ("; the provider has not given a login code yet" if not self.url else
                  f"; open {self.url} and enter {self.user_code}" if self.user_code else "")
        return f"Access token pending authentication{notified}{device}"


class RedirectLogin(Pending):
    """A login that ends with a redirect of the browser to our listener (RFC 6749 4.1)."""

    what: str = "exchange"
    code_verifier: str
    redirect_uri: str

    def reply(self, with_url: bool) -> str:
        """The same, but no URL once the person has been there."""
        if self.form is None:
            return super().reply(with_url)
        if self.tries > 1 or self.retry_at is not None:
            return ("error:The login is being completed: exchanging its code failed (see 'pizauth"
                    " status') and is being retried. Do not log in again")
        return ("error:The login is being completed: its code is being exchanged for a token."
                " Do not log in again")


class DeviceLogin(Pending):
    """A login that the person does on any machine, with a code (RFC 8628). URL and code are empty
    until the provider has given them; then it is polled."""

    what: str = "device"  # then poll
    expires_at: float = FOR_EVER  # when the codes are void
    interval: float = 0  # at least between two polls
    gap: float = 0  # to the next poll; more than the interval while the provider is out of reach
    fault: str = ""  # why the last poll failed


class Active(Record):
    """There is an access token. It may have expired, and may have no refresh token."""

    access_token: str
    obtained_at: float
    expires_at: float
    refresh_token: str | None
    state: str = ""  # of the redirect that this login came by
    wanted: bool = False  # a refresh was asked for that could not start at once
    cancel: Cancel | None = None  # set while a refresh runs, or transient_error_if_cmd
    judging: bool = False  # while transient_error_if_cmd runs
    attempted_at: float | None = None
    failed_at: float | None = None
    failures: int = 0  # in a row
    unexplained: int = 0  # refusals in a row that are no OAuth error
    retry_after: float = 0
    last_fault: str = ""  # the last failure, unless it was an outage
    fault_told: bool = False  # once the person has heard of one

    def appointments(self, account: Account) -> Iterator[tuple[float, str]]:
        """When it expires, if it has no refresh token; else, unless a refresh runs, the next one,
        and when to tell the person that none succeeds."""
        if self.refresh_token is None:
            yield self.expires_at, "expire"
        elif self.cancel is None:
            yield self.refresh_due(account), "refresh"
            if self.last_fault and not self.fault_told:
                yield self.expires_at, "tell of fault"

    def refresh_due(self, account: Account) -> float:
        """When the next refresh starts if none runs (pizauth.conf(5) tells the schedule)."""
        if self.wanted:
            return 0
        if self.failed_at is not None:
            return self.failed_at + max(account.refresh_retry, self.retry_after)
        floor = self.obtained_at + min(LEAST_AGE, (self.expires_at - self.obtained_at) / 2)
        due = max(self.expires_at - account.refresh_before_expiry, floor)
        return max(min(due, self.obtained_at + account.refresh_at_least),
                   self.obtained_at + REFRESH_GAP)

    def status(self, clock: Clock) -> str:
        """The state as `status` prints it."""
        if clock.now() < self.expires_at:
            lasting = "" if self.refresh_token else "; no refresh token"
            return (f"Active access token (obtained {clock.date(self.obtained_at)};"
                    f" expires {clock.date(self.expires_at)}{lasting})")
        if self.attempted_at is None:
            return "Access token expired (refresh not yet attempted)"
        return f"Access token expired (last refresh attempt {clock.date(self.attempted_at)})"


# ---- Dump ----
# Version 1 of pizauth's own format, so that each program restores the other's dumps: a nonce, then
# the states, little-endian, encrypted with ChaCha20-Poly1305 (RFC 8439). After the last account,
# where the original stops reading, come the options that only this program has.

DUMP_VERSION = 1
DUMP_KEY = bytes.fromhex("66a247a85e48cfecaaed9b36eba97d5350d4286375097a44eeffb9c4546b65a3")
# The key is not secret: it only keeps grep and strings from finding tokens.
LAYOUTS = ("string", "optional", "strings", "pairs")  # of options in the original's dumps


def encoded(layout: str, value: Any) -> bytes:
    """A value in a layout of the dump: u32, u64, string, time, or one of LAYOUTS."""
    if layout in ("u32", "u64"):
        return int(value).to_bytes(4 if layout == "u32" else 8, "little")
    if layout == "string":
        text: bytes = value.encode()
        return encoded("u64", len(text)) + text
    if layout == "time":
        seconds, nanoseconds = divmod(max(0, round(value * 1e9)), 10**9)
        return encoded("u64", seconds) + encoded("u32", nanoseconds)
    if layout == "optional":
        return b"\0" if value is None else b"\1" + encoded("string", value)
    texts = value if layout == "strings" else [text for pair in value for text in pair]
    return encoded("u64", len(value)) + b"".join(encoded("string", text) for text in texts)


class DumpReader:
    """Reads the plaintext of a dump from its start. Raises RequestError if it makes no sense."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise RequestError("This dump ends too soon")
        self.at += size
        return self.data[self.at - size : self.at]

    def read(self, layout: str) -> Any:
        """The next value, in a layout of encoded()."""
        if layout in ("u32", "u64"):
            return int.from_bytes(self.take(4 if layout == "u32" else 8), "little")
        if layout == "string":
            try:
                return self.take(self.read("u64")).decode()
            except UnicodeDecodeError:
                raise RequestError("This dump holds text that is not UTF-8") from None
        if layout == "time":
            return self.read("u64") + self.read("u32") / 1e9
        if layout == "optional":
            return self.read("string") if self.choice(1) else None
        items = range(self.read("u64"))
        if layout == "strings":
            return tuple(self.read("string") for _ in items)
        return tuple((self.read("string"), self.read("string")) for _ in items)

    def choice(self, size: int) -> bool:
        """A number that is 0 or 1."""
        number = int.from_bytes(self.take(size), "little")
        if number > 1:
            raise RequestError("This dump is of a kind that this version does not know")
        return number == 1

    def state(self) -> Active | None:
        """An Active with times in seconds since the epoch, or None."""
        if not self.choice(4):
            return None
        token = Active(access_token=self.read("string"), obtained_at=self.read("time"),
                       expires_at=self.read("time"), refresh_token=self.read("optional"))
        for text in (token.access_token, token.refresh_token):
            if text is not None and not is_visible_ascii(text):
                raise RequestError("This dump holds an invalid token: it is empty or not printable"
                                   " ASCII without blanks")
        return token


def dumped_options(account: Account) -> tuple[dict[str, Any], dict[str, str]]:
    """The options that tokens depend on: the original's, and as JSON extensions unless default."""
    declared = {name: one for name, one in account.options().items() if one.dump}
    values = {name: getattr(account, name) for name in declared}
    return ({name: values[name] for name, one in declared.items() if one.dump in LAYOUTS},
            {name: json.dumps(values[name]) for name, one in declared.items()
             if one.dump not in LAYOUTS and values[name] != one.default})


def dump_bytes(accounts: list[tuple[Account, Token | None]], epoch: float) -> bytes:
    """The plaintext of a dump: accounts and their states, then the extensions. `epoch` is added to
    moments. An extension is the names of an account and an option, and its value as JSON."""
    layouts = {name: option.dump for name, option in Account.options().items()}
    parts, extensions = [encoded("u64", DUMP_VERSION), encoded("u64", len(accounts))], []
    for account, token in accounts:
        options, more = dumped_options(account)
        parts.append(encoded("string", account.name))
        parts += [encoded(layouts[name], value) for name, value in options.items()]
        parts.append(encoded("u32", isinstance(token, Active)))
        if isinstance(token, Active):
            parts += [encoded("string", token.access_token),
                      encoded("time", token.obtained_at + epoch),
                      encoded("time", token.expires_at + epoch),
                      encoded("optional", token.refresh_token)]
        extensions += [encoded("string", text) for name, value in more.items()
                       for text in (account.name, name, value)]
    return b"".join([*parts, encoded("u64", len(extensions) // 3), *extensions])


def read_dump(plaintext: bytes) -> dict[str, tuple[Any, Active | None]]:
    """The accounts in a dump: their dumped_options() and states. Raises RequestError."""
    reader = DumpReader(plaintext)
    accounts: dict[str, tuple[Any, Active | None]] = {}
    extensions: dict[str, Fields] = {}
    if reader.read("u64") != DUMP_VERSION:
        raise RequestError("This dump is of a version that is not known here")
    for _ in range(reader.read("u64")):
        name = reader.read("string")
        options = {option: reader.read(one.dump) for option, one in Account.options().items()
                   if one.dump in LAYOUTS}
        extensions[name] = {}
        accounts[name] = (options, extensions[name]), reader.state()
    for _ in range(reader.read("u64") if reader.at < len(plaintext) else 0):  # 0: the original's
        name, option, value = reader.read("string"), reader.read("string"), reader.read("string")
        if name in extensions:
            extensions[name][option] = value
    return accounts


def chacha20(key: bytes, counter: int, nonce: bytes, data: bytes) -> bytes:
    """Data xor the key stream (RFC 8439 2.4), 64 KiB at a time, which bounds the memory."""
    return b"".join(chacha20_slice(key, counter + at // 64, nonce, data[at : at + CHUNK])
                    for at in range(0, len(data), CHUNK))


def chacha20_slice(key: bytes, counter: int, nonce: bytes, data: bytes) -> bytes:
    """One slice of chacha20(), all its blocks at once.

    Each word of the state is one big integer with a 64-bit lane for each block; the upper half of a
    lane takes carries and rotations until the mask clears it. This is much faster than block by
    block, so that a dump of 100 accounts can be made in the loop."""
    blocks = -(-len(data) // 64)
    ones = int.from_bytes((b"\1" + bytes(7)) * blocks, "little")
    mask = ones * 0xFFFFFFFF
    counters = b"".join(encoded("u64", counter + block) for block in range(blocks))
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
    number = int.from_bytes(data, "little") ^ int.from_bytes(stream[: len(data)], "little")
    return number.to_bytes(len(data), "little")


def poly1305(key: bytes, data: bytes) -> bytes:
    """The tag of data under a key used once (RFC 8439 2.5)."""
    r, s = int.from_bytes(key[:16], "little"), int.from_bytes(key[16:], "little")
    r &= 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    tag = 0
    for at in range(0, len(data), 16):
        tag = (tag + int.from_bytes(data[at : at + 16] + b"\1", "little")) * r % ((1 << 130) - 5)
    return (tag + s & (1 << 128) - 1).to_bytes(16, "little")


def aead_tag(nonce: bytes, ciphertext: bytes) -> bytes:
    """The tag of a ciphertext without associated data (RFC 8439 2.8)."""
    message = ciphertext + bytes(-len(ciphertext) % 16) + bytes(8) + encoded("u64", len(ciphertext))
    return poly1305(chacha20(DUMP_KEY, 0, nonce, bytes(32)), message)


def encrypt_dump(nonce: bytes, plaintext: bytes) -> bytes:
    """A dump of these bytes; the nonce is 12 bytes, random."""
    ciphertext = chacha20(DUMP_KEY, 1, nonce, plaintext)
    return nonce + ciphertext + aead_tag(nonce, ciphertext)


def check_dump(dump: bytes) -> None:
    """Raise RequestError unless this is a whole, unchanged dump."""
    if len(dump) < 28 or aead_tag(dump[:12], dump[12:-16]) != dump[-16:]:
        raise RequestError("This is no dump of pizauth's, or it was changed or cut short")


def decrypt_dump(dump: bytes) -> bytes:
    """The plaintext of a dump. Raises RequestError."""
    check_dump(dump)
    return chacha20(DUMP_KEY, 1, dump[:12], dump[12:-16])


# ---- Authenticator ----
# All state and every transition. It has no socket, process or clock of its own: time, token
# requests, commands and the log are given to it.

CODE_TRIES = 10  # How often a code exchange is tried in all.
CODE_RETRY_INTERVAL = 6  # Seconds between two of these tries.
DEVICE_GAP = 5  # Seconds between two device requests of one account, whoever asks.
BROWSER_PATIENCE = 10  # Seconds that a browser is kept waiting for the outcome of its login.
DEVICE_PATIENCE = 9  # Seconds that a client waits for a device code; less than CLIENT_TIMEOUT.
COMPLETE_PATIENCE = 75  # Seconds that `complete` waits for the outcome: ten tries take a minute.
SLOW_DOWN = 5  # Seconds that `slow_down` adds to the interval, for good (RFC 8628 3.5).
LONGEST_GAP = 60  # Seconds between two polls, at most, while the provider is out of reach.
LAST_POLL = 1  # Seconds before a code expires for one more poll, whatever gap and Retry-After say.
REMINDER_GAP = 1  # Seconds between two reminders, even if auth_notify_interval is less.
HOOK_LIMIT = 60  # Seconds that error_notify_cmd and token_event_cmd may run.
VERDICT_LIMIT = 180  # Seconds that transient_error_if_cmd may run.
VERDICT_FAILURES = 6  # Failures in a row between two runs of transient_error_if_cmd.
KEEPS_LOGIN = (0, 126, 127)  # Its exit statuses that keep the login: yes, or it could not start.
UNEXPLAINED_LIMIT = 3  # After so many such refusals in a row an expired token is dropped.
NO_CODE_YET = ("error:The provider has not given a login code yet: ask again in a few seconds;"
               " 'pizauth status' shows the last error")
SUPERSEDED = "This authorization request is void: there is a newer one, or the account has changed."
NO_REFRESH_TOKEN = ("the provider gave no refresh token, so this account must be authorised again"
                    " when its access token expires; what usually helps is the scope offline_access"
                    " or prompt=consent in auth_uri_fields (access_type=offline is always sent)")


class Waiter(Record):
    """A peer that waits for an account's token, or for the URL of its login."""

    account: str
    until: float  # when it is told that there is none yet
    tell: Callable[[str, str], None]  # takes a key of SIGNS, and a sentence for the person


class Asked(Record):
    """A request to a provider, on its way."""

    what: str  # a key of Authenticator._REQUESTS
    account: Account
    form: Form
    fresh: bool  # client_secret_cmd has printed its secret just now
    hidden: Form = []  # the secrets in what is sent, which nothing told may hold


class Authenticator:
    """The accounts' tokens, and what may be done with them.

    `post(kind, uri, form, authorization, then)` starts a token request, whose kind is its urgency,
    a key of SLOTS; it returns a Cancel, and calls then(outcome) on a later pass. `run(command,
    environment, limit, then, capture)` does the same for a shell command; its `then` is an Ended,
    which gets what the command prints if that is captured.
    """

    def __init__(self, config: Config, clock: Clock,
                 post: Callable[[str, str, Form, str, Callable[[bytes], None]], Cancel],
                 run: Callable[[str, Fields, float, Ended, bool], Cancel],
                 log: Callable[[int, str], None]) -> None:
        self.config = config
        self.ports: dict[str, list[int]] = {"http": [], "https": []}  # of redirect listeners
        self.about_server: Fields = {}  # what `info` says besides the ports
        self.about_https: Fields = {}  # and what it adds about the HTTPS listener
        self.reload: Callable[[Reloaded], None]  # given by the server
        self.stopping = False
        self._clock, self._post, self._run, self._log = clock, post, run, log
        self._tokens: dict[str, Token | None] = dict.fromkeys(config.accounts)
        self._waiters: list[Waiter] = []
        self._errors: dict[str, tuple[float, str]] = {}  # when and why an account's last try failed
        # The moment before which an act for an account must not happen again; _appointments() obeys
        # it. "device" is no act: it is looked up when a device login begins.
        self._not_before: dict[tuple[str, str], float] = {}
        self._secrets: dict[str, str] = {}  # what client_secret_cmd has printed for an account
        self._issuers: set[str] = set()  # those that are known to send `iss`
        self.events: list[Callable[[], Cancel]] = []  # the runs of token_event_cmd; the first runs
        # The cached deadline(); None after any change to an appointment or to the waiters.
        self._deadline: float | None = None

    # What is due, and when.

    def deadline(self) -> float:
        """The moment at which run_due() next has something to do; FOR_EVER if never."""
        if self.stopping:
            return FOR_EVER
        if self._deadline is None:
            self._deadline = min((*(moment for moment, *_ in self._appointments()),
                                  *(waiter.until for waiter in self._waiters)), default=FOR_EVER)
        return self._deadline

    def run_due(self) -> None:
        """Do everything that is due by now."""
        now = self._clock.now()
        if self.deadline() > now:
            return
        for moment, act, name, token in list(self._appointments()):
            if moment <= now and self._tokens.get(name) is token:
                self._ACTS[act](self, name, token)
        late = [waiter for waiter in self._waiters if waiter.until <= now]
        self._waiters = [waiter for waiter in self._waiters if waiter.until > now]
        for waiter in late:
            waiter.tell("waiting", "pizauth processing authentication")
        self._deadline = None

    def _appointments(self) -> Iterator[tuple[float, str, str, Token]]:
        """Everything that the tokens have scheduled: when, which act, account and token."""
        for name, token in self._tokens.items():
            if token is not None:
                for moment, act in token.appointments(self.config.accounts[name]):
                    yield max(moment, self._not_before.get((act, name), 0)), act, name, token

    # Transitions.

    def _replace(self, name: str, token: Token | None, event: str | None, told: str = "") -> None:
        """Change an account's state; nothing else does. `told`: why waiting peers get no token."""
        old = self._tokens[name]
        self._tokens[name] = token
        self._deadline = None
        state = "no token" if not token else "active" if isinstance(token, Active) else "pending"
        self._log(INFO, f"{name}: {state}" + (f" ({event})" if event else ""))
        if old is not None and old.cancel is not None:
            old.cancel()
        if event is not None:
            self._tell_event(name, event)
        if isinstance(token, Active):  # last, because a waiter may replace the state again
            self._tell_waiters(name, "worked", f"Account {name} is authorised")
        else:
            self._tell_waiters(name, "failed", told)

    def _tell_waiters(self, name: str, sign: str, text: str) -> None:
        """Tell the peers that wait for an account's login how it went."""
        waiters = [waiter for waiter in self._waiters if waiter.account == name]
        self._waiters = [waiter for waiter in self._waiters if waiter.account != name]
        for waiter in waiters:
            waiter.tell(sign, text)

    def _go_on(self, then: Any, name: str, token: Token | None, *results: Any) -> None:
        """The work that token.cancel stops has ended: then(name, token, *results), unless the token
        has been replaced meanwhile (revoked, reloaded, refreshed). No token: always."""
        if token is None:
            then(name, token, *results)
        elif self._tokens.get(name) is token:
            token.cancel = None
            self._deadline = None
            then(name, token, *results)

    def _request_authorization(self, account: Account) -> Pending:
        """Begin a fresh login; the person is notified once there is a URL."""
        if account.device_auth_uri is not None:
            at = self._not_before.get(("device", account.name), 0)
            login = DeviceLogin(remind_at=FOR_EVER, form=device_request(account), retry_at=at)
            self._replace(account.name, login, None, SUPERSEDED)
            if at <= self._clock.now():
                self._proceed(account.name, login)
            return login
        state, code_verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(64)
        redirect_uri = self._redirect_uri(account)
        url = authorization_request(account, state, code_verifier, redirect_uri)
        pending = RedirectLogin(url=url, remind_at=self._clock.now(), state=state,
                                code_verifier=code_verifier, redirect_uri=redirect_uri)
        self._replace(account.name, pending, None, SUPERSEDED)
        return pending

    def _redirect_uri(self, account: Account) -> str:
        """The account's redirect URI, with the port of our listener (RFC 8252 7.3)."""
        ports, own = self.ports[account.redirect_scheme], account.redirect_port
        return normal_uri(account.redirect_uri, own if own in ports else ports[0])

    def _remind(self, name: str, pending: Pending) -> None:
        """Notify the person of the URL; again only once the last auth_notify_cmd has ended."""
        now = self._clock.now()
        pending.remind_at = now + max(self.config.auth_notify_interval, REMINDER_GAP)
        self._deadline = None
        if pending.notifying:
            return
        pending.notified_at, self._not_before["remind", name] = now, now + REMINDER_GAP
        if self.config.auth_notify_cmd is not None:
            pending.notifying = True
            variables = {"PIZAUTH_URL": pending.url, "PIZAUTH_CODE": pending.user_code}
            self._command("auth_notify_cmd", name, variables, FOR_EVER,
                          lambda *_: setattr(pending, "notifying", False))

    def _proceed(self, name: str, login: Pending) -> None:
        """Post the form that the login goes on with, for the first time or again: the exchange of a
        code (RFC 6749 4.1.3), the request for a device code, or a poll (RFC 8628 3.1, 3.4)."""
        now = self._clock.now()
        if isinstance(login, DeviceLogin) and login.expires_at <= now:
            why = f"; at the last try: {login.fault}" if login.fault else " before it was entered"
            self._login_failed(name, None, f"Authentication for {name} failed: the code"
                                           f" {login.user_code} has expired{why}")
            return
        login.tries += 1
        login.retry_at = None
        if login.what == "device":
            self._not_before["device", name] = now + DEVICE_GAP
        self._ask(login.what, name, login, login.form or [])

    def _proceed_failed(self, name: str, pending: Pending, error: TokenError) -> None:
        """The request has failed: try again after an outage, or give the login up."""
        if error.cause == "outage" and pending.tries < CODE_TRIES:
            wait = error.retry_after if isinstance(pending, DeviceLogin) else 0  # a code ages
            pending.retry_at = self._clock.now() + max(CODE_RETRY_INTERVAL, wait)
            message = f"Authentication for {name} failed, and will be tried again: {error}"
            self._failed(name, message, INFO)
        else:
            self._login_failed(name, None, f"Authentication for {name} failed: {error}")

    def _device_asked(self, name: str, login: DeviceLogin, response: DeviceResponse) -> None:
        """There is a device code: tell the person, and poll."""
        now = self._clock.now()
        login.url, login.user_code = response.url, response.user_code
        login.what = "poll"
        login.form = device_token_request(self.config.accounts[name], response.device_code)
        login.expires_at = now + response.expires_in
        sensible = response.interval < response.expires_in  # else it may be in milliseconds
        login.interval = login.gap = response.interval if sensible else response.expires_in / 2
        login.retry_at, login.remind_at = now + login.gap, now
        self._errors.pop(name, None)
        self._tell_waiters(name, "waiting", "")

    def _poll_failed(self, name: str, login: DeviceLogin, error: TokenError) -> None:
        """A poll gave no tokens: go on, unless the provider has refused (RFC 8628 3.5)."""
        if error.error == "slow_down":
            login.interval += SLOW_DOWN
        login.fault = "" if error.error in ("authorization_pending", "slow_down") else str(error)
        if not login.fault:
            login.gap = max(login.interval, error.retry_after)
            self._errors.pop(name, None)
        elif error.cause != "refused":
            login.gap = max(login.interval, min(2 * login.gap, LONGEST_GAP), error.retry_after)
            message = f"Authentication for {name} failed, and will be tried again: {error}"
            self._failed(name, message, INFO)
        else:
            self._login_failed(name, None, f"Authentication for {name} failed: {error}")
            return
        now = self._clock.now()
        before_expiry = login.expires_at - LAST_POLL - now
        login.retry_at = min(now + max(login.interval, min(login.gap, before_expiry)),
                             login.expires_at)

    def _ask(self, what: str, name: str, old: Token | None, form: Form,
             fresh: bool = False) -> None:
        """Post a form for a request, a key of _REQUESTS, once the client secret is known; `fresh`:
        client_secret_cmd has printed it just now."""
        account, (kind, option, *_) = self.config.accounts[name], self._REQUESTS[what]
        secret = self._secrets.get(name, account.client_secret)
        asked = Asked(what=what, account=account, form=form, fresh=fresh)
        if account.client_secret_cmd is not None and secret is None:
            printed = partial(self._secret_printed, asked)
            cancel = self._run(account.client_secret_cmd, {"PIZAUTH_ACCOUNT": name}, SECRET_LIMIT,
                               partial(self._go_on, printed, name, old), True)
        else:
            sent, authorization = authenticated(account, form, secret)
            asked.hidden = [*sent, ("client_secret", secret or ""),
                            ("client_secret", authorization.rpartition(" ")[2]),
                            ("access_token", old.access_token if isinstance(old, Active) else "")]
            answered = partial(self._answered, asked)
            cancel = self._post(kind, normal_uri(getattr(account, option)), sent, authorization,
                                partial(self._go_on, answered, name, old))
        if old is not None:
            old.cancel = cancel
        self._deadline = None

    def _secret_printed(self, asked: Asked, name: str, old: Token | None, status: int | None,
                        output: bytes) -> None:
        """Handle the end of client_secret_cmd: go on with the request."""
        if old is None and self.config.accounts.get(name) is not asked.account:
            self._log(ERROR, f"{name} is not revoked at the provider: the configuration was"
                             " reloaded meanwhile")
            return
        try:
            self._secrets[name] = printed_secret(status, output)
        except TokenError as error:
            self._REQUESTS[asked.what][-1](self, name, old, error)
        else:
            self._ask(asked.what, name, old, asked.form, fresh=True)

    def _answered(self, asked: Asked, name: str, old: Token | None, outcome: bytes) -> None:
        """Judge the outcome of a request, and go on by _REQUESTS."""
        _, option, read, good, failed = self._REQUESTS[asked.what]
        try:
            response = judged(outcome, asked.hidden, read, option)
        except TokenError as error:
            if (error.error == "invalid_client" and not asked.fresh
                    and self._secrets.pop(name, None) is not None):  # it may have been renewed
                error = TokenError(str(error), "outage")
            failed(self, name, old, error)
        else:
            good(self, name, old, response)

    def _obtained(self, name: str, old: Token, response: TokenResponse) -> None:
        """A new access token replaces the account's state, if it is the right person's."""
        if not isinstance(old, Active) and not self._accepts(name, response.users):
            return
        kept = old.refresh_token if isinstance(old, Active) else None
        now, refresh_token = self._clock.now(), response.refresh_token or kept
        life = response.expires_in or min(self.config.accounts[name].refresh_at_least, LIFE_LIMIT)
        token = Active(access_token=response.access_token, obtained_at=now, expires_at=now + life,
                       refresh_token=refresh_token, state=old.state)
        self._errors.pop(name, None)
        self._replace(name, token, "token_refreshed" if isinstance(old, Active) else "token_new")
        if refresh_token is None:
            self._log(WARNING, f"{name}: {NO_REFRESH_TOKEN}")

    def _accepts(self, name: str, users: tuple[str, ...]) -> bool:
        """Whether to take the tokens of a login. If somebody else has logged in, it has failed; if
        nobody can tell, that is a warning."""
        expected = self.config.accounts[name].expect_user
        if expected is None or expected.casefold() in map(str.casefold, users):
            return True
        if users:
            self._login_failed(name, None, f"Authentication for {name} failed: {users[0]} has"
                               f" logged in: log in as {expected}, perhaps in a private window")
            return False
        self._log(WARNING, f"{name}: the provider does not say who has logged in, so that"
                           " expect_user is of no use")
        return True

    def _refresh(self, name: str, token: Active) -> None:
        """Post the refresh token (RFC 6749 6)."""
        assert token.refresh_token is not None
        token.wanted, token.attempted_at = False, self._clock.now()
        self._not_before["refresh", name] = token.attempted_at + REFRESH_GAP
        self._ask("refresh", name, token,
                  refresh_request(self.config.accounts[name], token.refresh_token))
        self._log(DEBUG, f"{name}: refreshing")

    def _refresh_failed(self, name: str, token: Active, error: TokenError) -> None:
        """Try again later, or drop a token that is refused for good, or time and again."""
        now, token_uri = self._clock.now(), normal_uri(self.config.accounts[name].token_uri)
        token.failures += 1
        token.failed_at, token.retry_after = now, error.retry_after
        # Over plain HTTP the answer may be anybody's.
        refused = error.cause == "unexplained" and (
            token_uri.startswith("https:") or is_loopback(token_uri))
        token.unexplained = token.unexplained + 1 if refused else 0
        dropped = token.unexplained >= UNEXPLAINED_LIMIT and token.expires_at <= now
        if dropped or error.cause == "refused":
            self._login_failed(name, "token_invalidated", f"Refreshing {name} failed: {error}")
            return
        token.last_fault = str(error) if error.cause in ("unexplained", "odd") else ""
        self._failed(name, f"Refreshing {name} failed, and will be tried again: {error}", INFO)
        if token.failures % VERDICT_FAILURES == 0 and self.config.transient_error_if_cmd:
            token.judging = True
            token.cancel = self._command("transient_error_if_cmd", name, {}, VERDICT_LIMIT,
                                         partial(self._go_on, self._judged, name, token))

    def _tell_of_fault(self, name: str, token: Active) -> None:
        """Tell the person, once, that an expired token cannot be refreshed; not in an outage."""
        token.fault_told = True
        self._deadline = None
        self._report(name, f"Refreshing {name} keeps failing: {token.last_fault} (it will be tried"
                           f" again; 'pizauth revoke {name}' leads to a new login)")

    def _judged(self, name: str, token: Active, status: int | None, output: bytes) -> None:
        """Drop the login if transient_error_if_cmd fails or is killed; not if it cannot start."""
        token.judging = False
        if status not in KEEPS_LOGIN and not output and not self.stopping:
            message = f"Refreshing {name} failed for good, says transient_error_if_cmd"
            self._replace(name, None, "token_invalidated", message)
            self._failed(name, message, ERROR)

    def _expire(self, name: str, token: Active) -> None:
        """An access token without refresh token has expired."""
        self._replace(name, None, "token_invalidated")
        self._failed(name, f"The access token of {name} has expired, and the provider had given no"
                           " refresh token: log in again", ERROR)

    def _revoked(self, name: str, _token: None, answer: object) -> None:
        """The provider has revoked tokens, of a login that has ended here."""
        self._log(INFO, f"{name}: revoked at the provider")

    def _revocation_failed(self, name: str, _token: None, error: TokenError) -> None:
        """It has not, and is not asked again."""
        message = printable(f"{name} is revoked here, but not at the provider: {error}")
        if self._tokens.get(name) is None:
            self._failed(name, message, ERROR)
        else:  # there is another login, which this is no fault of
            self._log(ERROR, message)

    # What is asked of a provider: the urgency, the option with the address, what reads a good
    # answer, and what follows from a good and from a bad one.
    _REQUESTS: Mapping[str, tuple[str, str, Callable[[dict[str, Any]], Any],
                                  Callable[..., None], Callable[..., None]]] = {
        "exchange": ("code", "token_uri", good_answer, _obtained, _proceed_failed),
        "device": ("device", "device_auth_uri", good_device_answer, _device_asked, _proceed_failed),
        "poll": ("refresh", "token_uri", good_answer, _obtained, _poll_failed),
        "refresh": ("refresh", "token_uri", good_answer, _obtained, _refresh_failed),
        "revoke": ("refresh", "revoke_uri", dict, _revoked, _revocation_failed)}

    _ACTS: Mapping[str, Callable[[Authenticator, str, Any], None]] = {
        "expire": _expire, "proceed": _proceed, "refresh": _refresh, "remind": _remind,
        "tell of fault": _tell_of_fault}

    def _login_failed(self, name: str, event: str | None, message: str) -> None:
        """The login has ended in failure: forget it, and tell the person."""
        self._replace(name, None, event, message)
        self._report(name, message)

    def _report(self, name: str, message: str) -> None:
        """Tell of a failure by error_notify_cmd, or in the log if that fails or is not set."""
        message, hook = printable(message), self.config.error_notify_cmd is not None
        self._failed(name, message, INFO if hook else ERROR)
        if hook:
            self._command("error_notify_cmd", name, {"PIZAUTH_MSG": message}, HOOK_LIMIT,
                          lambda status, _: self._log(ERROR, message) if status != 0 else None)

    def _failed(self, name: str, message: str, level: int) -> None:
        """Remember an account's failure for `status`, and log it."""
        message = printable(message)  # the account's name may hold anything
        self._errors[name] = (self._clock.now(), message)
        self._log(level, message)

    # Shell commands.

    def _command(self, option: str, name: str, variables: Fields, limit: float,
                 then: Ended = lambda status, output: None) -> Cancel:
        """Run an option's command for an account; its failure is logged."""

        def ended(status: int | None, output: bytes) -> None:
            if status != 0 or output:
                how = f"killed after {limit} s" if status is None else f"ended with status {status}"
                self._log(ERROR, f"{option} for {name}: {output.decode('utf-8', 'replace') or how}")
            then(status, output)

        environment = {"PIZAUTH_ACCOUNT": name, **variables}
        return self._run(getattr(self.config, option), environment, limit, ended, False)

    def _tell_event(self, name: str, event: str) -> None:
        """Run token_event_cmd for an event, once it has ended for the events before."""
        if self.config.token_event_cmd is not None:
            self.events.append(partial(self._command, "token_event_cmd", name,
                                       {"PIZAUTH_EVENT": event}, HOOK_LIMIT, self._event_told))
            if len(self.events) == 1:
                self.events[0]()

    def _event_told(self, status: int | None, output: bytes) -> None:
        del self.events[0]
        if self.config.token_event_cmd is None:  # a reload has removed it
            self.events.clear()
        if self.events:
            self.events[0]()

    # The redirect listeners.

    def redirected(self, scheme: str, head: tuple[str, str], answer: Answer,
                   peer: str = "browser") -> None:
        """Handle target and host of an authorization response, and answer how the login went. The
        checks are ordered so that no stray or forged request changes any state; without a host the
        address is not checked, for only its query is known. Raises BadRequest."""
        target, host = head
        response = authorization_response(target.partition("?")[2])
        if "state" not in response:
            raise without_state(response)
        # A login's state has 256 random bits (RFC 6749 10.12); device logins have an empty one.
        state = response["state"] or "none"
        name = next((name for name, one in self._tokens.items() if one and one.state == state), "")
        if not name:
            raise BadRequest(
                200, "No pending token matches request state: request a fresh token",
                "The login that this address belongs to has ended, or a newer one has taken its"
                " place, or the address is damaged: 'pizauth status' tells how things are. "
                + LOG_IN_AGAIN)
        token = self._tokens[name]
        if isinstance(token, Active):
            answer(login_reply(peer, name, "worked", f"Account {name} is authorised already"))
            return
        assert isinstance(token, RedirectLogin), "no other login waits for a redirect"
        scheme = scheme or token.redirect_uri.partition(":")[0]
        if host and not redirect_matches(token.redirect_uri, scheme, host, target):
            address = token.redirect_uri.partition("?")[0]
            raise BadRequest(
                404, f"This is not the address that account {name} redirects to, which begins with"
                     f" {address}", "The login still waits. Is this where the browser ended, and is"
                " redirect_uri in pizauth.conf what the provider has on record?")
        if token.form is None:
            self._respond(name, token, response)
        patience = BROWSER_PATIENCE if peer == "browser" else COMPLETE_PATIENCE
        self._wait(name, self._clock.now() + patience,
                   lambda sign, text: answer(login_reply(peer, name, sign, text)))

    def _wait(self, name: str, until: float, tell: Callable[[str, str], None]) -> None:
        """Keep a peer waiting for the outcome of an account's login."""
        self._waiters.append(Waiter(account=name, until=until, tell=tell))
        self._deadline = None

    def _respond(self, name: str, pending: RedirectLogin, response: Fields) -> None:
        """Exchange the code of a response. Raises BadRequest if it has none, or another issuer."""
        issuer, iss = self.config.accounts[name].issuer, response.get("iss")
        if issuer is not None and iss != issuer and (iss is not None or issuer in self._issuers):
            raise BadRequest(
                400, f"The answer is not {issuer}'s: its 'iss' is"
                     f" {printable(iss or '')[:200] or 'missing'}.", "The login still waits. Is"
                " issuer in pizauth.conf right? If so, this answer comes from somebody else.",
                level=WARNING)
        if iss is not None and iss == issuer:
            self._issuers.add(iss)
        if "error" in response:
            message = f"Authentication for {name} failed: {error_words(response)}"
            self._login_failed(name, None, message)
            raise BadRequest(400, message, next_step("failed", name), "failed")
        if not response.get("code"):
            raise BadRequest(400, "The address has no 'code': the login still waits for one.",
                             f"Open the URL that 'pizauth show {name}' prints.")
        pending.form = access_token_request(self.config.accounts[name], response["code"],
                                            pending.code_verifier, pending.redirect_uri)
        self._proceed(name, pending)

    # The control protocol: a method for each verb, their table, and the dispatch.

    def _complete(self, rest: bytes, answer: Answer) -> None:
        """Take the redirect of a browser that could not reach our listener (RFC 6749 4.1.2)."""
        scheme, head = pasted_redirect(rest.decode("utf-8", "replace"))
        self.redirected(scheme, head, answer, "control")

    def _dump(self, rest: bytes, answer: Answer) -> None:
        states = [(account, self._tokens[name]) for name, account in self.config.accounts.items()]
        answer(encrypt_dump(secrets.token_bytes(12), dump_bytes(states, self._clock.epoch(0))))

    def _info(self, rest: bytes, answer: Answer) -> None:
        ports = {f"{scheme}_port": str(ports[0]) if ports else "none"
                 for scheme, ports in self.ports.items()}
        about_https = self.about_https if self.ports["https"] else {}
        answer(json.dumps({**self.about_server, **ports, **about_https}).encode())

    def _import(self, rest: bytes, answer: Answer) -> None:
        """Take a refresh token that another program got for the same client, and refresh it."""
        token, _, name = rest.partition(b" ")
        refresh_token = token.decode("utf-8", "replace")
        if not is_visible_ascii(refresh_token):
            raise RequestError("A refresh token is printable ASCII without blanks")
        account, now = self._account(name), self._clock.now()
        self._errors.pop(account.name, None)
        self._tell_waiters(account.name, "failed", SUPERSEDED)  # nobody knows yet if it is good
        # The access token is a placeholder, which has expired: dumps need one.
        self._replace(account.name, Active(
            access_token="not-yet-refreshed", obtained_at=now, expires_at=now,
            refresh_token=refresh_token, wanted=True), None)
        answer(b"ok:")

    def _refresh_now(self, rest: bytes, answer: Answer) -> None:
        """Start a refresh, or make a fresh request if there is nothing to refresh."""
        wish, account = self._wish_and_account(rest)
        token = self._expire_if_due(account.name)
        if not isinstance(token, Active):
            if token is None or token.url:  # else a fresh login begins already
                self._request_authorization(account)
            self._show(account.name, wish, answer)
            return
        self._refresh_soon(account.name, token)
        answer(b"scheduled:")

    def _reload(self, rest: bytes, answer: Answer) -> None:
        self.reload(lambda error: answer(b"ok:" if error is None else error_reply(error)))

    def _restore(self, rest: bytes, answer: Answer) -> None:
        """Restore tokens to accounts that have none and whose options are unchanged."""
        fitting = []
        for name, (options, dumped) in read_dump(decrypt_dump(rest)).items():
            account = self.config.accounts.get(name)
            if (account is not None and options == dumped_options(account)
                    and dumped is not None and not isinstance(self._tokens[name], Active)):
                fitting.append((name, self._revived(dumped)))
        for name, token in fitting:
            self._replace(name, token, None)
        self._log(INFO, f"Restored the tokens of {len(fitting)} account(s)")
        answer(b"ok:")

    def _revoke(self, rest: bytes, answer: Answer) -> None:
        account = self._account(rest)
        token = self._tokens[account.name]
        self._errors.pop(account.name, None)
        self._replace(account.name, None, "token_revoked", SUPERSEDED)
        if isinstance(token, Active) and account.revoke_uri is not None:
            self._ask("revoke", account.name, None, revocation_request(
                account, token.access_token, token.refresh_token))
        answer(b"ok:")

    def _showtoken(self, rest: bytes, answer: Answer) -> None:
        wish, account = self._wish_and_account(rest)
        self._show(account.name, wish, answer)

    def _show(self, name: str, wish: dict[str, int], answer: Answer,
              until: float | None = None) -> None:
        """Give a client the token, or begin what leads to one and tell. It waits if it wishes to,
        or if there is no URL yet; until a moment if it has waited before."""

        def tell(sign: str, text: str) -> None:
            if sign == "failed" and (self.stopping or self._tokens.get(name) is None):
                answer(f"error:{text}".encode())
            else:  # there is a token, a URL, or a newer login
                self._show(name, wish, answer, until)

        now, token = self._clock.now(), self._expire_if_due(name)
        token = token or self._request_authorization(self.config.accounts[name])
        until = now + (wish["wait"] or DEVICE_PATIENCE) if until is None else until
        if isinstance(token, Active):
            left, refreshing = token.expires_at - now, token.cancel is not None
            if 0 < left >= wish["life"]:
                answer(f"access_token:{self._token_text(name, token, wish)}".encode())
                return
            try:
                life = token.expires_at - token.obtained_at
                if left > 0 and life < wish["life"] + 1:  # a fresh one would be too old at once
                    raise RequestError(f"The access tokens of {name} last only {life:.0f} s:"
                                       " give -l less than that")
                self._refresh_soon(name, token)
            except RequestError as error:
                answer(error_reply(error))
                return
            reply = "error:Access token " + ("will expire too soon" if left > 0 else "has expired")
            reply += (". Refreshing is in progress but has not yet succeeded" if refreshing else
                      ". Refreshing initiated")
        else:
            reply = token.reply(bool(wish["withurl"])) if token.url else NO_CODE_YET
            if not token.url and (token.retry_at or 0) > until:
                date = self._clock.date(token.retry_at or 0)
                reply = f"error:The provider is asked for a login code again at {date}"
        if now < until and (wish["wait"] or reply is NO_CODE_YET):
            self._wait(name, until, tell)
        else:
            answer(reply.encode())

    def _token_text(self, name: str, token: Active, wish: dict[str, int]) -> str:
        """The access token, or a JSON object with what is known of it."""
        if not wish["json"]:
            return token.access_token
        return json.dumps({
            "access_token": token.access_token, "token_type": "Bearer", "account": name,
            "expires_at": int(self._clock.epoch(token.expires_at)),
            "scope": " ".join(self.config.accounts[name].scopes)})

    def _shutdown(self, rest: bytes, answer: Answer) -> None:
        self.stopping = True  # the client's connection is closed last of all

    def _status(self, rest: bytes, answer: Answer) -> None:
        if rest == b"json":
            rows = [self._status_row(name) for name in sorted(self._tokens)]
            answer(b"ok:" + json.dumps(rows).encode())
            return
        lines = [self._status_line(name) for name in sorted(self._tokens)]
        answer(("ok:" + "\n".join(lines)).encode() if lines else b"error:No accounts configured")

    _VERBS = {
        b"complete": _complete, b"dump": _dump, b"import": _import, b"info": _info,
        b"refresh": _refresh_now, b"reload": _reload, b"restore": _restore, b"revoke": _revoke,
        b"showtoken": _showtoken, b"shutdown": _shutdown, b"status": _status}

    _ALONE = (b"dump", b"info", b"reload", b"shutdown", b"status")  # and nothing more

    def control(self, request: bytes, answer: Answer) -> None:
        """Answer a control client's request. Raises PizauthError."""
        verb, colon, rest = request.partition(b":")
        if not colon or verb not in self._VERBS:
            raise RequestError("Unknown request: do client and server differ in version?")
        if rest and verb in self._ALONE and request != b"status:json":
            raise RequestError(f"Nothing may follow '{verb.decode()}:' in this version")
        self._log(TRACE, f"Control request: {verb.decode()}")
        self._VERBS[verb](self, rest, answer)

    def _wish_and_account(self, rest: bytes) -> tuple[dict[str, int], Account]:
        """Split `OPTION NAME`: the option's words, and the account."""
        words, _, name = rest.partition(b" ")
        return read_wish(words.decode("ascii", "replace")), self._account(name)

    def _account(self, raw: bytes) -> Account:
        name = raw.decode("utf-8", "replace")
        if name not in self.config.accounts:
            raise RequestError(no_account(name, list(self.config.accounts)))
        return self.config.accounts[name]

    def _expire_if_due(self, name: str) -> Token | None:
        """The account's state now; an expired token without a refresh token is dropped first."""
        token = self._tokens[name]
        if (isinstance(token, Active) and token.refresh_token is None
                and token.expires_at <= self._clock.now()):
            self._expire(name, token)
        return self._tokens[name]

    def _refresh_soon(self, name: str, token: Active) -> None:
        """Refresh as soon as allowed, before schedule and Retry-After. Raises RequestError."""
        if token.refresh_token is None:
            until = self._clock.date(token.expires_at)
            raise RequestError(f"'{name}' has no refresh token; its access token lasts until"
                               f" {until}")
        if self.stopping or token.cancel is not None and not token.judging:
            return  # its result would be lost, or a refresh runs already
        earliest = self._not_before.get(("refresh", name), 0)
        if token.cancel is None and earliest <= self._clock.now():
            self._refresh(name, token)
        else:
            token.wanted = True
            self._deadline = None

    def _revived(self, dumped: Active) -> Active:
        """A dumped token, converted to our clock. One obtained in the future counts as expired."""
        now, wall = self._clock.now(), self._clock.wall()
        life = min(max(dumped.expires_at - dumped.obtained_at, 0), LIFE_LIMIT)
        left = min(dumped.expires_at - wall, life) if dumped.obtained_at <= wall else 0
        return Active(access_token=dumped.access_token, obtained_at=now + left - life,
                      expires_at=now + left, refresh_token=dumped.refresh_token)

    def _status_line(self, name: str) -> str:
        """The line of `status` about an account; it never holds a token."""
        token = self._tokens[name]
        text = "No access token" if token is None else token.status(self._clock)
        if name in self._errors:
            at, error = self._errors[name]
            text += f"; last error at {self._clock.date(at)}: {error}"
        return f"{printable(name)}: {text}"

    def _status_row(self, name: str) -> dict[str, Any]:
        """What `status -j` says about an account; times are in seconds since the epoch."""
        token = self._tokens[name]
        row: dict[str, Any] = dict.fromkeys((
            "obtained_at", "expires_at", "last_error", "last_error_at", "url", "user_code"))
        row.update(account=name, state="empty", refresh_token=False)
        if isinstance(token, Active):
            row.update(state="active" if self._clock.now() < token.expires_at else "expired",
                       obtained_at=int(self._clock.epoch(token.obtained_at)),
                       expires_at=int(self._clock.epoch(token.expires_at)),
                       refresh_token=token.refresh_token is not None)
        elif token is not None:
            row.update(state="pending", url=token.url or None, user_code=token.user_code or None)
        if name in self._errors:
            at, row["last_error"] = self._errors[name]
            row["last_error_at"] = int(self._clock.epoch(at))
        return row

    # Reload, and the end.

    def reconfigure(self, config: Config, ports: dict[str, list[int]]) -> None:
        """Take a new configuration; an account whose options are the same keeps its state."""
        before, self.config, self.ports = self.config, config, ports
        self._secrets.clear()
        for name, account in before.accounts.items():
            after = config.accounts.get(name)
            if after is None or dumped_options(after) != dumped_options(account):
                self._errors.pop(name, None)
                self._replace(name, None, None, SUPERSEDED)
        self._tokens = {name: self._tokens.get(name) for name in config.accounts}
        self._not_before = {(act, name): moment for (act, name), moment in self._not_before.items()
                            if name in config.accounts}
        self._deadline = None
        for name, token in self._tokens.items():
            account = config.accounts[name]
            if (isinstance(token, RedirectLogin)
                    and token.redirect_uri != self._redirect_uri(account)):
                self._request_authorization(account)

    def answer_waiting(self) -> None:
        """Tell the peers that wait for a login that there will be no outcome."""
        for name in self._tokens:
            self._tell_waiters(name, "failed", "pizauth was stopped: start it again.")


# ---- Work for children ----
# These functions run in forked children and may block (limit_resources() runs in the server, too).
# They see what they were forked with; what they return goes to the server through a pipe. The
# client's `discover` runs fetch() and what that uses, too.

CONNECT_TIMEOUT = 5  # Seconds for one address, which leaves time for five more.
AFTER_SUSPEND = 5  # Seconds more for a child whose limit passed while the machine was suspended.
DESCRIPTORS = 1024  # The soft limit: enough for all connections, and quick to close in a child.


def run_child(work: Callable[[], bytes], pipe: int, limit: float, nice: int,
              capture: bool) -> NoReturn:
    """The child's side of fork(): release the server's resources, send the result, exit. If work()
    raises, the exit status is 1 and the exception's text is sent. `capture`: work() is a command,
    whose standard output is the result."""
    status = 1
    try:
        os.nice(nice)  # first: the server's clients have priority
        gc.freeze()  # else a finaliser of the server could close a descriptor reused here
        gc.disable()
        signal.set_wakeup_fd(-1)
        # Ctrl-C and systemd signal the whole group, and an answer may hold a rotated token.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if limit < FOR_EVER:
            signal.alarm(int(limit) + AFTER_SUSPEND + 2)  # in case the server has died
        os.closerange(3, pipe)  # else we would keep a dead server's port and lock
        os.closerange(pipe + 1, DESCRIPTORS)
        try:
            if capture:
                os.dup2(pipe, 1)
            output, status = work(), int(capture)  # a captured command returns if no shell starts
        except PizauthError as error:
            output = str(error).encode()
        except Exception as error:  # a bug, or a module that was removed: the server reports it
            output = (f"{type(error).__name__}: {error} (if Python was upgraded since pizauth was"
                      " started, restart pizauth)").encode("utf-8", "replace")
        write_all(pipe, output)
    finally:
        os._exit(status)


def limit_resources(descriptors: int) -> int:
    """Forbid core files (they may hold tokens), limit descriptors; returns the old limit."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = descriptors if hard == resource.RLIM_INFINITY else min(descriptors, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return before


def run_command(command: str, variables: Fields, descriptors: int) -> bytes:
    """In a child: become a shell that runs the command: SHELL, but /bin/sh if that is unset, does
    not start or is no shell. Returns only if neither starts."""
    shell = os.environ.get("SHELL") or "/bin/sh"
    if os.path.basename(shell) in ("nologin", "false"):
        shell = "/bin/sh"
    reason = ""
    try:
        os.setsid()  # so that Ctrl-C on the server's terminal does not end it
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        with suppress(ValueError):  # macOS does not take an infinite limit back
            limit_resources(descriptors)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        ours = {name.encode(): value.replace("\0", "").encode("utf-8", "replace")
                for name, value in variables.items()}  # UTF-8 in any locale
        for path in (shell, "/bin/sh"):
            arguments = [os.fsencode(path), b"-c", command.encode()]
            try:
                os.execve(path, arguments, {**os.environb, **ours})
            except OSError as error:
                reason = f"cannot start {path}: {error}"
    except Exception as error:  # of any kind: the command did not start
        reason = f"cannot start a shell: {error}"
    return reason.encode("utf-8", "replace")


def fetch(uri: str, form: Form | None = None, authorization: str = "") -> bytes:
    """In a child, or `discover`: post a form, or GET if there is none; returns outcome_bytes()."""
    import http.client
    import urllib.request

    class AnyStatus(urllib.request.HTTPErrorProcessor):
        def http_response(self, request: Any, response: Any) -> Any:
            return response  # a redirect is not followed: it would take secrets elsewhere

        https_response = http_response

    class FinalResponse(http.client.HTTPResponse):
        def _read_status(self) -> tuple[str, int, str]:
            version, status, reason = super()._read_status()  # type: ignore[misc]
            interim = 100 <= status < 200  # begin() passes over 100 alone (RFC 9110 15.2)
            return version, http.client.CONTINUE if interim else status, reason

    http.client.HTTPConnection.response_class = FinalResponse  # in this process alone
    socket.create_connection = partial(connect, socket.create_connection)
    headers = {"Accept": "application/json", "User-Agent": f"pizauth.py/{VERSION}",
               **({"Authorization": authorization} if authorization else {})}
    data = None if form is None else urllib.parse.urlencode(form).encode()
    request = urllib.request.Request(uri, data, headers)
    try:
        proxies = urllib.request.ProxyHandler(proxy_for(uri))
        with urllib.request.build_opener(proxies, AnyStatus).open(request) as response:
            delay = retry_after(response.headers.get("Retry-After", ""))
            return outcome_bytes(response.status, delay, *read_answer(response))
    except http.client.IncompleteRead:
        reason = "it was cut short"
    except (http.client.HTTPException, ValueError) as error:  # its text may hold tokens
        reason = f"it is not HTTP ({type(error).__name__})"
    except OSError as error:
        reason = str(getattr(error, "reason", None) or error)
    host = urllib.parse.urlsplit(uri).netloc
    return outcome_bytes(0, 0, False, f"no answer from {host}: {reason}".encode())


def read_answer(response: http.client.HTTPResponse) -> tuple[bool, bytes, str]:
    """In a child: whether a body's length was declared; the body, unpacked; and what keeps it from
    being read or followed, if anything does. Raises OSError if it is cut short."""
    body = bytearray(ANSWER_LIMIT + 1)
    size = response.readinto(body)  # unlike read(n), not fooled by a chunk of size -1
    if response.length and size <= ANSWER_LIMIT:
        raise OSError("it was cut short")
    whole = response.length is not None or response.chunked
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    plain = unpacked(bytes(body[:size]), coding) if size <= ANSWER_LIMIT else bytes(body)
    trouble = ""
    if 300 <= response.status < 400:
        location = re.sub(r"[?#].*|//[^/]*@", "", response.headers.get("Location") or "nowhere")
        trouble = f"redirects are not followed, here to {location}"
    elif plain is None:
        trouble = f"its Content-Encoding is {coding}, which was not asked for"
    elif len(plain) > ANSWER_LIMIT:
        plain, trouble = b"", f"its answer is longer than {ANSWER_LIMIT >> 10} KiB"
    return whole, bytes(body[:size]) if plain is None else plain, trouble


def unpacked(body: bytes, coding: str) -> bytes | None:
    """A body without its Content-Encoding (RFC 9110 8.4.1), cut just above ANSWER_LIMIT; None if it
    cannot be unpacked. Some servers encode unasked. Raises OSError if it is cut short."""
    import zlib
    if not body or coding in ("", "identity"):
        return body
    # deflate should have the zlib format, and has none from some servers
    for window in {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}.get(coding, ()):
        with suppress(zlib.error):
            return inflated(body, window)
    return None


def inflated(packed: bytes, window: int) -> bytes:
    """All members unpacked, without junk after them. Raises OSError if cut short, zlib.error."""
    import zlib
    plain = b""
    while True:
        unpacker = zlib.decompressobj(window)
        plain += unpacker.decompress(packed, ANSWER_LIMIT + 1 - len(plain))
        if len(plain) > ANSWER_LIMIT:
            return plain
        if not unpacker.eof:
            raise OSError("it was cut short")
        packed = unpacker.unused_data
        if not packed.startswith(b"\x1f\x8b"):  # no further member of gzip (RFC 1952 2.2)
            return plain


def proxy_for(uri: str) -> Fields:
    """In a child: the proxy for a URI, for ProxyHandler; none for this machine. Raises OSError."""
    import urllib.request
    parts = urllib.parse.urlsplit(uri)
    found = urllib.request.getproxies_environment()
    proxy = found.get(parts.scheme) or found.get("all") or ""
    if not proxy or is_loopback(uri) or urllib.request.proxy_bypass(parts.netloc):
        return {}
    kind = proxy.partition("://")[0].lower() if "://" in proxy else "http"
    if kind not in ("http", "https"):
        raise OSError(f"a {kind} proxy is set in the environment, and only HTTP proxies are"
                      f" supported: set {parts.scheme}_proxy to one, or no_proxy")
    return {parts.scheme: proxy}


def connect(one_address: Callable[..., socket.socket], host: tuple[str, int],
            *_: object) -> socket.socket:
    """In a child: a connection to a host, given a function for one address. Raises OSError. IPv6
    and IPv4 take turns (RFC 8305 4), because one of the two may be wholly unreachable."""
    found = socket.getaddrinfo(*host, type=socket.SOCK_STREAM)
    families = [one[0] for one in found]
    turns = [families[:at].count(family) for at, family in enumerate(families)]
    reason = OSError("no address found")
    for _turn, (*_kind, address) in sorted(zip(turns, found), key=lambda pair: pair[0]):
        try:
            sock = one_address(address[:2], CONNECT_TIMEOUT)
            sock.settimeout(socket.getdefaulttimeout())  # in children None, lest a token be lost
            return sock
        except OSError as error:
            reason = error
    raise reason


def retry_after(value: str) -> float:
    """The seconds that a Retry-After asks for, possibly as a date (RFC 9110 10.2.3), or 0."""
    from email.utils import parsedate_to_datetime
    if re.fullmatch(r"[0-9]+", value.strip()):
        return float(value)
    with suppress(TypeError, ValueError, OverflowError, IndexError):
        return max(0, parsedate_to_datetime(value).timestamp() - time.time())
    return 0


def mint_certificate() -> bytes:
    """In a child: JSON with a fresh key, its certificate and fingerprints. Raises PizauthError."""
    try:
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError:
        raise PizauthError("HTTPS needs the Python package cryptography: install it, for instance"
                           " as python3-cryptography or with pip") from None
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = self_signed(key, time.time())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    point = key.public_key().public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return json.dumps({
        "pem": (private + certificate.public_bytes(pem)).decode(),
        "https_pub_key": point.hex(":").upper(),
        "https_cert_sha256": certificate.fingerprint(hashes.SHA256()).hex(":").upper()}).encode()


def self_signed(key: ec.EllipticCurvePrivateKey, now: float) -> x509.Certificate:
    """In a child: a certificate for all loopback names of this host. `now`: since the epoch."""
    import datetime, ipaddress
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    hosts = dict.fromkeys(("localhost", os.uname().nodename))
    names = [x509.DNSName(host) for host in hosts if host.isascii()]
    addresses = [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ("127.0.0.1", "::1")]
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    epoch = datetime.datetime(1970, 1, 1)
    start = epoch + datetime.timedelta(seconds=now, days=-1)
    end = start + datetime.timedelta(days=825)  # no browser has ever refused this length
    if start.year < 2026:  # before this was written: the clock will be set later
        start, end = epoch, datetime.datetime(2049, 12, 31)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pizauth")])
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), start, end)
    for extension, critical in (
        (x509.SubjectAlternativeName([*names, *addresses]), False),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.KeyUsage(True, *[False] * 8), True),  # digital_signature alone
        (x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (identifier, False),
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False)):
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256())


# ---- Loop ----
# The only place that waits. The parts of the server (connections, children, Authenticator and the
# server itself) have deadline() and run_due(); the loop sleeps until the earliest deadline, a
# signal, or an event of a descriptor, and calls every run_due() or the handler concerned.

LONGEST_SLEEP = 37  # Seconds; bounds how late a resume is noticed (select does not count suspend).
PAUSE = 1  # Seconds of rest after a bug, or while descriptors or memory have run out.


class Loop:
    """Waits for descriptors, signals and deadlines.

    A signal is noted in a set, and its byte on a socket pair ends the wait. The byte has no other
    meaning, for with many signals the socket pair is full, and bytes are lost."""

    def __init__(self, clock: Clock, log: Callable[[int, str], None]) -> None:
        self.clock, self.log = clock, log
        self.selector = selectors.DefaultSelector()
        self.parts: list[Any] = []
        self.signals = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)
        self.handlers: dict[int, Callable[[], None]] = {}  # of these signals
        self.caught: set[int] = set()  # signals that have come
        self.wakeup, self.woken = socket.socketpair()

    def catch_signals(self) -> None:
        """From now on these signals go to the handlers, even if our starter blocked them."""
        for end in (self.wakeup, self.woken):
            end.setblocking(False)
        self.selector.register(self.woken, selectors.EVENT_READ, lambda _: self.woken.recv(CHUNK))
        signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        for number in self.signals:
            signal.signal(number, lambda number, _frame: self.caught.add(number))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def handle_signals(self) -> None:
        """Call the handlers of the signals that have come."""
        caught, self.caught = self.caught, set()  # first, so that a later signal is not lost
        for number in self.signals:
            if number in caught:
                self.handlers[number]()

    def patience(self) -> float | None:
        """How long to sleep; 0: something is to be done; None: nothing is scheduled."""
        if self.caught:
            return 0
        moment = min([part.deadline() for part in self.parts], default=FOR_EVER)
        return None if moment == FOR_EVER else max(0, min(LONGEST_SLEEP, moment - self.clock.now()))

    def run(self, finished: Callable[[], bool], each_pass: Callable[[], None]) -> None:
        """Serve until finished(), which is asked before every wait."""
        while not finished():
            try:
                patience = self.patience()
                for part in self.parts if patience == 0 else ():
                    part.run_due()
            except Exception:  # a bug, which must neither end the server nor keep clients out
                self.log_bug("Something due was lost to a bug")
                patience = PAUSE
            try:
                events = self.selector.select(patience)
                if self.caught:  # first: an event handler that always raises must not block signals
                    self.handle_signals()
                for key, mask in events:
                    key.data(mask)
                each_pass()
            except Exception:  # a bug, which must not end the server
                self.log_bug("Something was lost to a bug")
                time.sleep(PAUSE)

    def log_bug(self, what: str) -> None:
        """Log the exception that is being handled: it is a bug of ours."""
        text = repr(sys.exc_info()[1])
        with suppress(Exception):  # without a free descriptor nothing can be imported
            import traceback  # not before it is needed, for it would slow the start
            text = traceback.format_exc()
        self.log(ERROR, f"{what}: {text}")


# ---- Children ----
# The only place that forks once the server serves. Jobs wait in one queue; a job ends with exactly
# one call of its `then`, unless it is cancelled.

# Most urgent first. A job starts only while fewer token requests than its number are running.
SLOTS = {"command": FOR_EVER, "mint": FOR_EVER, "code": 16, "device": 16, "refresh": 12}
HOST_SLOTS = 4  # Token requests at a time to one host.
NICE = 10  # Niceness of token requests: clients of the server come first.
OUTPUT_LIMIT = 2 << 20  # Bytes that the server takes from a child.
LATE = 1  # Overdue by more seconds than this: the machine was suspended.


class Job(Record):
    """Work for a child; at its end then(exit status, output), at its limit then(None, b"")."""

    kind: str  # a key of SLOTS
    work: Callable[[], bytes]
    limit: float  # in seconds from its start; at FOR_EVER it is never killed
    then: Ended
    host: str = ""  # of a token request
    capture: bool = False  # a command's standard output is its output
    pid: int = 0  # 0: it has not been started
    pipe: int = -1  # -1: there is no more to read
    due: float = FOR_EVER  # when it is killed
    output: bytes = b""


class Children:
    """The jobs that wait for a child, and those that have one."""

    def __init__(self, loop: Loop, descriptors: int = DESCRIPTORS) -> None:
        self.loop = loop
        self.descriptors = descriptors  # the soft limit that commands get
        self.waiting: list[Job] = []
        self.running: dict[int, Job] = {}  # by process number
        self.start_at = FOR_EVER  # when to look for a job to start
        self.fork_failed = False  # at the last try
        self.stopping = False  # once True, no token request is started

    def add(self, job: Job) -> Cancel:
        """Put a job into the queue; it never starts, nor ends, before the next pass."""
        self.waiting.append(job)
        self.start_at = 0
        return partial(self._cancel, job)

    def post(self, kind: str, uri: str, form: Form, authorization: str,
             then: Callable[[bytes], None]) -> Cancel:
        """Add a token request; then(outcome) at its end."""
        host = urllib.parse.urlsplit(uri).netloc

        def ended(status: int | None, output: bytes) -> None:
            reason = f"the process that asked {host} ended with status {status}"
            if status is None:
                reason = f"no answer from {host} within {TOKEN_REQUEST_LIMIT} s"
            elif status == 1 and output:  # the text of an exception
                reason += ": " + output.decode("utf-8", "replace")
            then(output if status == 0 else outcome_bytes(0, 0, False, reason.encode()))

        work = partial(fetch, uri, form, authorization)
        return self.add(Job(kind=kind, host=host, work=work, limit=TOKEN_REQUEST_LIMIT, then=ended))

    def run(self, command: str, variables: Fields, limit: float, then: Ended,
            capture: bool = False) -> Cancel:
        """Add a shell command. At its limit the shell alone is killed: a pipeline goes on."""
        work = partial(run_command, command, variables, self.descriptors)
        return self.add(Job(kind="command", work=work, limit=limit, then=then, capture=capture))

    def in_flight(self) -> bool:
        """Whether a request runs that may bring a token, or revokes one."""
        return any(job.host and job.kind != "device" for job in self.running.values())

    def deadline(self) -> float:
        return min([self.start_at, *(job.due for job in self.running.values())])

    def run_due(self) -> None:
        """Kill children at their limit, and start a job."""
        now = self.loop.clock.now()
        if any(job.due <= now for job in self.running.values()):
            self.reap()  # first: a result that has come is not lost to the limit
        for job in [job for job in self.running.values() if job.due <= now]:
            if now > job.due + LATE:
                job.due = now + AFTER_SUSPEND  # it was suspended, too; its answer may be on its way
            else:
                then = job.then
                self._kill(job)
                self._deliver(then, None)
        if self.start_at <= now:
            self._start_next()

    def reap(self) -> None:
        """Deliver the results of children that have ended; as PID 1, also reap those of others."""
        with suppress(ChildProcessError):  # there are no children
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                job = self.running.pop(ended[0], None)
                if job is None:
                    continue
                while self._read(job):
                    pass  # what it wrote last
                self._close_pipe(job)
                self.start_at = 0  # there is a free slot
                self._deliver(job.then, os.waitstatus_to_exitcode(ended[1]), job.output)

    def kill_all(self) -> None:
        """At the end: kill children with a limit; one without may be the person's browser."""
        for job in self.running.values():
            if job.limit < FOR_EVER:
                self._kill(job)

    def _deliver(self, then: Ended, status: int | None, output: bytes = b"") -> None:
        try:
            then(status, output)
        except Exception:  # a bug, which must not end the server
            self.loop.log_bug("A result was lost to a bug")

    def _cancel(self, job: Job) -> None:
        """Have a job never start, or kill its child; nothing if it has ended."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif self.running.get(job.pid) is job:
            self._kill(job)

    def _kill(self, job: Job) -> None:
        """Kill a child; its result is dropped."""
        job.then, job.due = lambda status, output: None, FOR_EVER
        self._close_pipe(job)
        with suppress(OSError):  # it has become another user's, by sudo
            os.kill(job.pid, signal.SIGKILL)  # it is not reaped yet, so the number is still its own

    def _start_next(self) -> None:
        """Start the job whose turn it is: one a pass, for a fork takes long."""
        job = self._next()
        self.start_at = FOR_EVER if job is None else 0
        if job is None:
            return
        try:
            self._start(job)
        except OSError as error:
            if not self.fork_failed:  # logged once: there may be hundreds of jobs
                self.loop.log(ERROR, f"Cannot start another process: {error.strerror}")
            self.fork_failed, self.start_at = True, self.loop.clock.now() + PAUSE
        else:
            self.fork_failed = False
            self.waiting.remove(job)

    def _next(self) -> Job | None:
        """The most urgent job that may start; among equals, to the host with fewest requests."""
        hosts = [job.host for job in self.running.values() if job.host]
        startable = [job for job in self.waiting
                     if not (job.host and self.stopping)  # it would be killed with its result
                     and len(hosts) < SLOTS[job.kind] and hosts.count(job.host) < HOST_SLOTS]
        return min(startable, default=None,
                   key=lambda job: (list(SLOTS).index(job.kind), hosts.count(job.host)))

    def _start(self, job: Job) -> None:
        """Fork the job's child. Raises OSError, and leaves nothing behind then."""
        job.pid, (reader, writer) = 0, os.pipe()  # 0: a failed try may have left a number
        signal.pthread_sigmask(signal.SIG_BLOCK, self.loop.signals)  # until the child has its own
        try:
            job.pid = os.fork()
            if job.pid == 0:
                run_child(job.work, writer, job.limit, NICE if job.host else 0, job.capture)
            self.loop.selector.register(reader, selectors.EVENT_READ, partial(self._read, job))
        except OSError:  # there is no process, or no memory to watch its pipe
            os.close(reader)
            if job.pid:
                os.kill(job.pid, signal.SIGKILL)
                os.waitpid(job.pid, 0)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.loop.signals)
            os.close(writer)
        os.set_blocking(reader, False)
        job.pipe, job.due = reader, self.loop.clock.now() + job.limit
        self.running[job.pid] = job

    def _read(self, job: Job, _events: int = 0) -> bool:
        """Take what the child has written; False if there was nothing."""
        if job.pipe < 0:
            return False
        try:
            data = os.read(job.pipe, CHUNK)
        except BlockingIOError:
            return False
        job.output += data
        if not data or len(job.output) > OUTPUT_LIMIT:
            self._close_pipe(job)
        return bool(data)

    def _close_pipe(self, job: Job) -> None:
        if job.pipe >= 0:
            self.loop.selector.unregister(job.pipe)
            os.close(job.pipe)
            job.pipe = -1


# ---- Connections ----
# A connection is one Exchange, of a control client or a browser: read a request, answer it, close.
# One that fails takes nothing else with it.

CONNECTION_TIMEOUT = 10  # Seconds to send a request, and then to read the reply.
FAIR_TIME = 1  # Seconds that a request may take to come before it makes room for another.
CAPS = {"control": 256, "browser": 128}  # Open connections of each kind of peer.
ACCEPTS = 32  # Connections accepted in a row before others have their turn.
READS = 4  # Reads from one connection in a row.
TLS_CHUNK = 1 << 10  # Bytes a read under TLS: as few as 27 may be a KeyUpdate, which costs time.
TLS_LIMIT = 128 << 10  # Bytes that a TLS client may send before its request is whole.


class Tls:
    """A server's TLS as a filter of bytes; an SSLSocket would go on while KeyUpdates come."""

    def __init__(self, context: ssl.SSLContext) -> None:
        import ssl  # only here and in tls_context(): most servers need no TLS
        self.incomplete = ssl.SSLWantReadError
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.connection = context.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.received = 0

    def decrypt(self, data: bytes) -> bytes:
        """The plaintext that these bytes complete. Raises OSError if they are no TLS."""
        self.received += len(data)
        if self.received > TLS_LIMIT:
            raise OSError("too much TLS around too little HTTP")
        self.incoming.write(data)
        plain = bytearray()
        with suppress(self.incomplete):
            while piece := self.connection.read(CHUNK):
                plain += piece
        return bytes(plain)

    def encrypt(self, data: bytes) -> bytes:
        """The bytes to send for a whole reply, and the end. Raises OSError before a handshake."""
        self.connection.write(data)
        with suppress(self.incomplete):  # we do not wait for the client to say that it closes, too
            self.connection.unwrap()
        return self.outgoing.read()


class Service(Record):
    """What a listener speaks, and with whom."""

    peer: str  # a key of CAPS
    frame: Callable[[bytearray, bool], Any]  # a reader of the wire formats
    respond: Callable[[Any, Answer], None]  # takes what it has read
    context: ssl.SSLContext | None = None  # for TLS


class Exchange:
    """One connection: reads a request, parks until it is answered, writes, drains, closes."""

    # The state at first; class attributes, because most exchanges change little of it.
    state = "reading"  # then parked, writing, draining, closed
    watched = 0  # the events that the selector watches for
    outgoing: bytes | memoryview = b""
    eof = False

    def __init__(self, connections: Connections, sock: socket.socket, service: Service) -> None:
        self.connections, self.sock, self.service = connections, sock, service
        self.loop = connections.loop
        self.tls = None if service.context is None else Tls(service.context)
        self.due = self.loop.clock.now() + CONNECTION_TIMEOUT  # when it is closed
        self.buffer = bytearray()
        connections.exchanges[service.peer][self] = None

    def proceed(self, _events: int = 0) -> None:
        """Go on as far as the socket allows."""
        try:
            if self.outgoing:
                self._write()
            elif self.state != "closed":
                self._read()
        except OSError:
            self._abort()  # the peer has gone, or speaks no TLS
        except Exception:
            self.loop.log_bug("A request was lost to a bug")
            self.close()

    def _abort(self) -> None:
        """Close, after sending the alert that says why TLS has failed (RFC 8446 6)."""
        if self.tls is None or self.state != "reading" or not self.tls.outgoing.pending:
            self.close()
            return
        try:
            self._send_last(self.tls.outgoing.read())
        except OSError:
            self.close()  # the peer has gone

    def answer(self, reply: bytes) -> None:
        """Send the reply and end; does nothing if the peer has gone meanwhile."""
        if self.state not in ("reading", "parked"):
            return
        try:
            self._send_last(reply if self.tls is None else self.tls.encrypt(reply))
        except OSError:
            self.close()  # the peer has gone, or was refused before the handshake was done

    def _send_last(self, data: bytes) -> None:
        """Send the last bytes that the peer gets. Raises OSError."""
        self.state, self.due = "writing", self.loop.clock.now() + CONNECTION_TIMEOUT
        self.outgoing = data
        self._write()

    def close(self) -> None:
        if self.state != "closed":
            self.state = "closed"
            self._watch(0)
            self.sock.close()
            del self.connections.exchanges[self.service.peer][self]

    def _read(self) -> None:
        """Take in what is there, but not for ever; bytes after the request are discarded."""
        reads, chunk = (READS, CHUNK) if self.tls is None else (1, TLS_CHUNK)
        with suppress(BlockingIOError):
            for _ in range(reads):
                data = self.sock.recv(chunk)
                self.eof = not data
                if self.eof:
                    break
                if self.tls is not None and not self.tls.received and data[:1].isalpha():
                    self.tls = None  # plain HTTP, which no TLS client starts with
                    self.answer(page(400, "unknown", HTTP_HERE, LOG_IN_AGAIN))
                elif self.state == "reading":
                    self.buffer += data if self.tls is None else self.tls.decrypt(data)
        if self.state == "reading":
            self._pass_on()
        if self.eof and self.state == "draining":
            self.close()
        elif self.state != "closed" and not self.outgoing:  # else _write() watches
            self._watch(0 if self.eof else selectors.EVENT_READ)  # an end of file stays readable

    def _pass_on(self) -> None:
        """Pass the request on, once it is whole."""
        try:
            request = self.service.frame(self.buffer, self.eof)
            if request is not None:
                self.state, self.due = "parked", FOR_EVER  # every answer has a limit of its own
                self.buffer.clear()
                self.service.respond(request, self.answer)
        except PizauthError as error:
            self.loop.log(error.level, f"A {self.service.peer} request was refused: {error}")
            self.answer(error_reply(error, self.service.peer))
        except Exception:  # an OSError is a bug here, not a peer that has gone
            self.loop.log_bug("A request was lost to a bug")
            self.close()
        if self.state != "reading":
            return
        if self.eof:
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
            self._watch(selectors.EVENT_WRITE)
            return
        if self.state == "writing":
            if self.eof:
                self.close()
                return
            self.state = "draining"  # a close while the peer still sends would destroy the reply
            self.sock.shutdown(socket.SHUT_WR)
        self._watch(selectors.EVENT_READ)  # after a reply, or a piece of a handshake

    def _watch(self, events: int) -> None:
        """Have the selector watch for these events; 0: for none."""
        if events == self.watched:
            return
        if not events:
            self.loop.selector.unregister(self.sock)
        elif not self.watched:
            self.loop.selector.register(self.sock, events, self.proceed)
        else:
            self.loop.selector.modify(self.sock, events, self.proceed)
        self.watched = events


class Listener:
    """A listening socket; each of its connections becomes an Exchange."""

    def __init__(self, connections: Connections, sock: socket.socket, service: Service) -> None:
        self.connections, self.sock, self.service = connections, sock, service
        self.loop = connections.loop
        self.due = FOR_EVER  # when to resume accepting, if paused
        sock.setblocking(False)
        self.loop.selector.register(sock, selectors.EVENT_READ, self.accept)

    def accept(self, _events: int) -> None:
        """Accept the connections that have come, but not for ever."""
        for _ in range(ACCEPTS):
            try:
                sock, _address = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.connections.pause(self)
                return  # otherwise the peer has gone already
            sock.setblocking(False)
            if self.service.peer == "control" and not is_our_user(sock):
                self.loop.log(WARNING, "A client of another user was refused")
                sock.close()
            else:
                self.connections.make_room(self.service.peer)
                Exchange(self.connections, sock, self.service).proceed()

    def close(self) -> None:
        """Stop listening, and give the port back."""
        if self in self.connections.paused:
            self.connections.paused.remove(self)
        else:
            self.loop.selector.unregister(self.sock)
        with suppress(OSError):  # some systems shut down connections only
            self.sock.shutdown(socket.SHUT_RDWR)  # or a child just forked would still hold the port
        self.sock.close()


def is_our_user(sock: socket.socket) -> bool:
    """Whether our user runs the peer: known on Linux only, else the directory keeps others out."""
    if sys.platform != "linux":
        return True
    with suppress(OSError):  # it has gone already
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[4:8], sys.byteorder) == os.getuid()
    return False


class Connections:
    """All open connections, and the listeners that are paused because descriptors ran out."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        # For each kind of peer, the oldest first.
        self.exchanges: dict[str, dict[Exchange, None]] = {peer: {} for peer in CAPS}
        self.paused: list[Listener] = []

    def deadline(self) -> float:
        timed: list[Any] = [*self.all(), *self.paused]
        return min([one.due for one in timed], default=FOR_EVER)

    def run_due(self) -> None:
        """Close the connections whose time is up, and accept again where that was paused."""
        now = self.loop.clock.now()
        for exchange in self.all():
            if exchange.due <= now:
                exchange.close()
        for listener in [listener for listener in self.paused if listener.due <= now]:
            listener.due = now + PAUSE
            with suppress(OSError):  # there is still no memory
                self.loop.selector.register(listener.sock, selectors.EVENT_READ, listener.accept)
                self.paused.remove(listener)

    def all(self) -> list[Exchange]:
        return [exchange for some in self.exchanges.values() for exchange in some]

    def make_room(self, peer: str) -> None:
        """Make room at the cap of this kind of peer. Parked clients that hung up are closed first.
        Otherwise one exchange ends: the one that has been reading longest; but if it began less
        than FAIR_TIME ago, and fewer than half are reading, one that writes or drains, or else the
        one that has been parked longest."""
        exchanges = self.exchanges[peer]
        if len(exchanges) >= CAPS[peer]:
            self.close_hung_up()
        if len(exchanges) >= CAPS[peer]:
            reading = [exchange for exchange in exchanges if exchange.state == "reading"]
            begun = self.loop.clock.now() + CONNECTION_TIMEOUT - FAIR_TIME
            spared = 2 * len(reading) < len(exchanges) and reading and reading[0].due > begun
            rank = {"reading": 3 if spared else 0, "parked": 2}
            victim = min(exchanges, key=lambda exchange: rank.get(exchange.state, 1))
            victim.answer(error_reply(TOO_MANY[peer], peer))
            victim.close()

    def close_hung_up(self) -> None:
        """Close the parked exchanges of control clients that have gone; TCP does not tell it."""
        parked = {one.sock.fileno(): one for one in self.exchanges["control"]
                  if one.state == "parked"}
        poll = select.poll()
        for descriptor in parked:
            poll.register(descriptor, 0)  # only for the end of both directions
        for descriptor, _event in poll.poll(0):
            parked[descriptor].close()

    def pause(self, listener: Listener) -> None:
        """Accept no more until a second has passed."""
        self.loop.log(WARNING, "Out of descriptors or memory: accepting connections is paused")
        self.loop.selector.unregister(listener.sock)
        self.paused.append(listener)
        listener.due = self.loop.clock.now() + PAUSE


# ---- Paths and standard streams ----
# What server and client share; nothing here imports anything that would slow a client down.

SOCKET_NAME = "pizauth.sock"
LOCK_NAME = "pizauth.lock"  # The server locks it, and writes its process number into it.


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
    """Raise PizauthError unless this is a real directory of our user's: others could plant one."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise PizauthError(f"{path} is not a directory (a symbolic link does not count): remove it")
    if status.st_uid != os.getuid():
        raise PizauthError(f"The directory {path} belongs to another user: refusing to use it")


def complain(text: str) -> None:
    """Write a message to standard error, in UTF-8."""
    try:
        write_all(2, text.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass  # it is closed, or nobody reads it


def put(data: bytes | str) -> None:
    """Write to standard output, in UTF-8 whatever the locale. Raises PizauthError."""
    try:
        write_all(1, data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)
    except OSError as error:
        raise PizauthError(f"Cannot write to standard output: {error.strerror}") from None


# ---- Server ----
# A background server is forked first. It takes the directory, the lock, the configuration and the
# sockets while it can still complain on the terminal; then it lets go of the terminal.

PORT_TRIES = 10  # Ports tried until one is free for both loopback families.
MINT_LIMIT = 30  # Seconds to make a certificate.
STARTUP_PATIENCE = 60  # Seconds that READY=1 waits for startup_cmd, which may run for ever.
GRACE = 2  # Seconds at the end for results that are on their way, and their token_event_cmd.
SOCKET_CHECK = 60  # Seconds between two looks at the control socket, while the loop is awake.


class Log:
    """Called with a level and a message; drops those above the verbosity. It never waits, as
    syslog(3) would: what a full pipe or a hanging syslog does not take is lost."""

    LEVELS = (("ERROR", 3), ("WARNING", 4), ("INFO", 6), ("DEBUG", 7), ("TRACE", 7))
    SYSLOG = ("/dev/log", "/var/run/log", "/var/run/syslog")

    def __init__(self, verbosity: int, descriptor: int = 2) -> None:
        self.verbosity, self.descriptor = verbosity, descriptor
        self.syslog: socket.socket | None = None

    def __call__(self, level: int, message: str) -> None:
        if level > self.verbosity:
            return
        name, priority = self.LEVELS[level]
        for line in map(printable, message.splitlines()):
            if self.syslog is None:
                self._write(f"{name} - {line}")
            else:
                self._send(self.syslog, priority, line)

    def use_syslog(self) -> None:
        """From now on messages go to syslog; if none runs, they are dropped."""
        self.syslog = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.syslog.setblocking(False)

    def _write(self, line: str) -> None:
        text = line.encode("utf-8", "replace")[: select.PIPE_BUF - 1]
        with suppress(OSError):  # nobody reads it
            if select.select((), (self.descriptor,), (), 0)[1]:  # there is room for PIPE_BUF bytes
                write_all(self.descriptor, text + b"\n")

    def _send(self, syslog: socket.socket, priority: int, line: str) -> None:
        """Send a datagram of RFC 3164, of the facility `user`."""
        head = f"<{8 + priority}>{time.strftime('%b %e %H:%M:%S')} pizauth[{os.getpid()}]: "
        for path in self.SYSLOG:
            with suppress(OSError):  # it hangs, or is elsewhere
                syslog.sendto((head + line).encode("utf-8", "replace"), path)
                return


def config_path(given: str | None) -> str:
    """The path of the configuration: given, or by the XDG rules."""
    if given is not None:
        return given
    directory = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(directory, "pizauth.conf")


def load_config(path: str, warn: Callable[[str], None], reloading: bool = False) -> Config:
    """Read and parse a file. A reload refuses pipes, which could block. Raises PizauthError.
    Calls warn(sentence) if other users can change the file, or read a client_secret in it, or if an
    endpoint is plain http."""
    try:
        more = os.O_NONBLOCK if reloading else 0
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | more)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if reloading and not stat.S_ISREG(mode):
                raise PizauthError(f"{path} is not a regular file, as a reload requires")
            data = file.read()
    except FileNotFoundError:
        if reloading:
            raise PizauthError(f"{path} is not there any more: a configuration that came through a"
                               " pipe takes a restart") from None
        raise PizauthError(f"No config file found at {path}: write one, for instance from"
                           " pizauth.conf.example; the manual page is pizauth.conf(5)") from None
    except OSError as error:
        raise PizauthError(f"Cannot read the configuration {path}: {error.strerror}") from None
    try:
        config = parse(decode_config(data))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if stat.S_ISREG(mode):
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            warn(f"Other users can change {path}, and so the commands that pizauth runs: run"
                 f" 'chmod 600 {path}'")
        elif mode & stat.S_IROTH and any(one.client_secret for one in config.accounts.values()):
            warn(f"Other users can read the client_secret in {path}: run 'chmod 600 {path}'")
    for account in config.accounts.values():
        uris = {name: normal_uri(uri) for name in (
            "auth_uri", "token_uri", "device_auth_uri", "revoke_uri")
            if (uri := getattr(account, name))}
        plain = [name for name, uri in uris.items()
                 if uri.startswith("http:") and not is_loopback(uri)]
        if plain:
            warn(printable(f"Others on the network can read what account {account.name} sends:"
                           f" write https: in {' and '.join(plain)}"))
    return config


def make_runtime_directory() -> str:
    """The directory of our socket, made if need be. Raises PizauthError unless it is ours alone."""
    directory, given = runtime_directory(), os.environ.get("XDG_RUNTIME_DIR")
    for path in [os.path.dirname(directory), directory]:
        try:
            if given and path != directory:
                os.makedirs(path, 0o700, exist_ok=True)  # one that is there is not changed
                continue
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            check_directory(path)
            os.chmod(path, 0o700)
        except OSError as error:
            raise PizauthError(f"Cannot make the directory {path}, mode 0700:"
                               f" {error.strerror}") from None
    return directory


def take_lock(directory: str) -> int:
    """Lock the directory and note our PID; the lock's descriptor. Raises PizauthError if taken."""
    path = os.path.join(directory, LOCK_NAME)
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        keep_from_sweepers(path)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_served(os.path.join(directory, SOCKET_NAME)):  # by the original, which has no lock
            raise BlockingIOError
    except BlockingIOError:
        raise PizauthError("pizauth authenticator already running") from None
    except OSError as error:
        raise PizauthError(f"Cannot lock {path}: {error.strerror or error}") from None
    with suppress(OSError):  # a full disk does not keep us from serving
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    return lock


def is_served(path: str) -> bool:
    """Whether anybody listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EAGAIN)  # EAGAIN: too busy, but it runs


def file_id(path: str) -> tuple[int, int] | None:
    """Device and inode of a file, which change if another takes its place; None without one."""
    with suppress(OSError):
        return (status := os.lstat(path)).st_dev, status.st_ino
    return None


def keep_from_sweepers(path: str) -> None:
    """Set the sticky bit, which keeps cleaners of runtime directories away from a file."""
    with suppress(OSError):  # the BSDs allow that bit to root alone
        os.chmod(path, 0o1600)


def bind_control(path: str) -> socket.socket:
    """The control socket, which only its user can open; a file in its place is removed."""
    sock = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o077)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        sock.bind(path)
        sock.listen(CAPS["control"])
    except OSError as error:
        sock.close()
        raise PizauthError(f"Cannot listen on {path}: {error.strerror or error}") from None
    finally:
        os.umask(umask)
    keep_from_sweepers(path)
    return sock


def bind_redirect(option: str, addresses: Addresses, reloading: bool) -> list[socket.socket]:
    """The sockets of a redirect listener, all with one port. Raises PizauthError if the first
    address cannot be bound; the others may fail. A reload must not wait to look names up."""
    (host, port), *others = addresses
    for _ in range(PORT_TRIES):
        try:
            sockets = [bind_inet(host, port, socket.AI_NUMERICHOST if reloading else 0)]
        except (OSError, UnicodeError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            if reloading and isinstance(error, socket.gaierror):
                reason = "names are looked up only at start: restart, or write a numeric address"
            elif reloading and getattr(error, "errno", None) == errno.EADDRINUSE:
                reason += " (if by this server's own listener, restart it)"
            raise PizauthError(f"Cannot listen on {option} \"{host}:{port}\": {reason}") from None
        try:
            return sockets + [bind_inet(other, sockets[0].getsockname()[1]) for other, _ in others]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return sockets  # this machine does not have the other family
        sockets[0].close()  # a stranger has our port there, and would get our redirects
    raise PizauthError(f"Cannot listen on {option}: every port is taken on {others[0][0]}")


def bind_inet(host: str, port: int, flags: int = 0) -> socket.socket:
    """A listening TCP socket; only [::] takes IPv6 and IPv4. Raises OSError or UnicodeError."""
    name = host.encode("ascii" if host.isascii() else "idna")  # a str would load tables of Unicode
    family, *_, address = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=flags)[0]
    every = address[0] == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((name, port), family=family, backlog=CAPS["browser"],
                                dualstack_ipv6=every)


def tls_context(certificate: str, key: str | None = None) -> ssl.SSLContext:
    """A context with a certificate and its key, read from files. Raises OSError or ValueError."""
    import ssl
    for path in (certificate, key or certificate):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe could block
            raise ValueError(f"{path} is not a regular file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # each would cost a handshake
    context.set_ecdh_curve("prime256v1")  # the cheapest: others let a client cost much time
    context.load_cert_chain(certificate, key, lambda: "")  # else it would ask for a password
    return context


def minted_context(pem: str, directory: str) -> ssl.SSLContext:
    """The same with a certificate in memory, which passes through a file, as `ssl` wants it."""
    path = os.path.join(directory, "certificate.pem")  # a killed server may have left one
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(descriptor, pem.encode())
        return tls_context(path)
    finally:
        os.close(descriptor)
        os.unlink(path)


def notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3)); it may take a second."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        address = "\0" + path[1:] if path.startswith("@") else path
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)  # it may be busy, and kills a service that is never READY
            sock.sendto(state.encode(), address)


class Server:
    """The daemon: the loop, its parts, and the sockets between them. It is one of these parts."""

    def __init__(self, path: str, verbosity: int, ready: Callable[[Server], None]) -> None:
        self.path, self.log, self.clock, self.ready = path, Log(verbosity), Clock(), ready
        self.control: Listener | None = None  # once we serve
        self.directory = make_runtime_directory()
        self.control_path = os.path.join(self.directory, SOCKET_NAME)
        self.lock = take_lock(self.directory)
        config = load_config(path, self.warn)
        close_inherited()  # not before: the configuration may come from one of them
        self.loop = Loop(self.clock, self.log)
        self.connections = Connections(self.loop)
        self.children = Children(self.loop, limit_resources(DESCRIPTORS))
        self.authenticator = Authenticator(
            config, self.clock, self.children.post, self.children.run, self.log)
        self.authenticator.reload = self.reload
        self.authenticator.about_server = {"config_file": os.path.abspath(path)}
        self.loop.parts = [self.connections, self.children, self.authenticator, self]
        self.loop.handlers = {
            signal.SIGTERM: self.stop, signal.SIGINT: self.stop, signal.SIGCHLD: self.children.reap,
            signal.SIGHUP: lambda: (  # results in flight would be dropped with their account
                None if self.authenticator.stopping else self.reload(lambda error: None))}
        # For HTTPS: a certificate, and what `info` says of it. The minted one, once it was needed,
        # is kept to the end; the other is in use.
        self.minted: tuple[ssl.SSLContext, Fields] | None = None
        self.certificate: tuple[ssl.SSLContext, Fields] | None = None
        self.newest = config  # the last one that was taken, or that waits for its certificate
        self.redirects: dict[Place, list[Listener]] = {}
        self.control_id: tuple[int, int] | None = None
        self.control_checked = self.clock.now()
        self.failure: Exception | None = None  # why we cannot start
        self.ready_by = FOR_EVER  # when READY=1 is sent at the latest
        self.ready_told = False
        self.grace_ends = FOR_EVER  # once stopping: when to end even if something is in flight

    # Its life.

    def run(self) -> None:
        """Serve until told to stop. Raises PizauthError or OSError if the server cannot start."""
        self.loop.catch_signals()
        self.configure(self.authenticator.config, self._start)
        self.loop.run(self.finished, self.check_socket)
        self._end()
        if self.failure is not None:
            raise self.failure

    def warn(self, text: str) -> None:
        """Warn the person: at start on the terminal, later in the log."""
        if self.control is None:
            complain(f"WARNING - {text}")
        else:
            self.log(WARNING, text)

    def _start(self, error: PizauthError | None) -> None:
        """Go on once the redirect listeners are set up; `error` says why they could not be."""
        try:
            if error is not None:
                raise error
            self.listen_to_clients()
            self.ready(self)
        except (PizauthError, OSError) as error:
            self.failure, self.authenticator.stopping = error, True
            return
        self.log(INFO, f"Serving on {self.control_path}")
        command = self.authenticator.config.startup_cmd
        if command is None:
            self._tell_ready()
        else:
            self.ready_by = self.clock.now() + STARTUP_PATIENCE
            self.children.run(command, {}, FOR_EVER, self._tell_ready)

    def _tell_ready(self, status: int | None = 0, output: bytes = b"") -> None:
        """Send READY=1, once: startup_cmd has ended, has run long enough or is not configured."""
        if status or output:
            self.log(ERROR, f"startup_cmd: {output.decode() or f'ended with status {status}'}")
        self.ready_by = FOR_EVER
        if not self.ready_told:
            self.ready_told = True
            notify("READY=1")

    def deadline(self) -> float:
        return min(self.ready_by, self.grace_ends)

    def run_due(self) -> None:
        if self.ready_by <= self.clock.now():
            self._tell_ready()

    def stop(self) -> None:
        """Handle SIGTERM and SIGINT: the first asks to end, the second ends the grace."""
        if self.authenticator.stopping:
            self.grace_ends = self.clock.now()
        self.authenticator.stopping = True

    def finished(self) -> bool:
        """Whether to end now: once told to stop, and when nothing is in flight or the grace is
        over. A rotated refresh token must reach the dump that token_event_cmd makes."""
        if not self.authenticator.stopping:
            return False
        if not self.children.stopping:
            self.children.stopping = True
            self.grace_ends = min(self.grace_ends, self.clock.now() + GRACE)
            notify("STOPPING=1")
        in_flight = self.children.in_flight() or self.authenticator.events
        return not in_flight or self.clock.now() >= self.grace_ends

    def _end(self) -> None:
        """Close sockets and release the lock; then close waiting clients, `shutdown` last."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.loop.signals)  # one more changes nothing
        self.log(INFO, "Stopping")
        self.children.kill_all()
        for listener in sum(self.redirects.values(), []):
            listener.close()
        if self.control is not None:
            self.control.close()
        if self.control_id is not None and file_id(self.control_path) == self.control_id:
            try:
                os.unlink(self.control_path)
            except OSError as error:  # the next server replaces it
                self.log(WARNING, f"Cannot remove {self.control_path}: {error.strerror}")
        fcntl.flock(self.lock, fcntl.LOCK_UN)  # a child just forked may still have it open
        os.close(self.lock)
        self.authenticator.answer_waiting()
        for exchange in self.connections.all():
            exchange.close()

    # The configuration, and the redirect listeners.

    def reload(self, then: Reloaded) -> None:
        """Read the configuration again; take all of it, then(None), or nothing, then(the error)."""

        def reloaded(error: PizauthError | None) -> None:
            if error is None:
                self.log(INFO, f"Reloaded {self.path}")
            else:
                first_line = str(error).partition("\n")[0]
                self.log(ERROR, f"The configuration was not reloaded: {first_line}")
            if self.ready_told:
                notify("READY=1")
            then(error)

        if self.ready_told:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = load_config(self.path, self.warn, reloading=True)
        except PizauthError as error:
            reloaded(error)
        else:
            self.configure(config, reloaded)

    def configure(self, config: Config, then: Reloaded) -> None:
        """Take a configuration, and first read or make the certificate that it needs."""
        if not config.addresses("https"):
            self._apply(config, None, "", then)
        elif config.https_cert is not None:
            path, key = os.path.expanduser(config.https_cert), config.https_key
            try:
                context = tls_context(path, None if key is None else os.path.expanduser(key))
            except (OSError, ValueError) as error:
                then(PizauthError(f"Cannot use https_cert {path}: {error}"))
            else:
                self._apply(config, (context, {}), "", then)
        elif self.minted is not None:
            self._apply(config, self.minted, "", then)
        else:
            self.newest = config
            self.children.add(Job(kind="mint", work=mint_certificate, limit=MINT_LIMIT,
                                  then=partial(self._minted, then)))

    def _minted(self, then: Reloaded, status: int | None, output: bytes) -> None:
        """Go on with configure(); without a certificate `output` says why."""
        if self.newest.https_cert is not None:  # there was another reload meanwhile
            self.configure(self.newest, then)
            return
        no_https = output.decode("utf-8", "replace") or "making a certificate failed or timed out"
        if status == 0 and self.minted is None:
            about = json.loads(output)
            try:
                self.minted = minted_context(about.pop("pem"), self.directory), about
            except Exception as error:  # of any kind, even of an odd `ssl`: then() must be called
                no_https = f"the certificate cannot be used: {error}"
        self._apply(self.newest, self.minted, no_https, then)

    def _apply(self, config: Config, certificate: tuple[ssl.SSLContext, Fields] | None,
               no_https: str, then: Reloaded) -> None:
        """Take a configuration, all or nothing; without a certificate `no_https` says why."""
        wanted = [(scheme, group) for scheme in ("http", "https")
                  for group in config.addresses(scheme)]
        bound: dict[Place, list[socket.socket]] = {}
        try:
            if certificate is None and config.addresses("https"):
                if account := config.https_account():
                    raise PizauthError(f"Account {printable(account.name)} has an 'https' redirect,"
                                       f" but {no_https}")
                wanted = [place for place in wanted if place[0] == "http"]
                self.warn(f"https_listen is ignored: {no_https}")
            wanted = [self._bind(config, place, bound) for place in wanted]
        except PizauthError as error:
            for sock in sum(bound.values(), []):
                sock.close()
            then(error)
            return
        self.certificate, self.newest = certificate, config
        self.authenticator.about_https = certificate[1] if certificate else {}
        self.authenticator.reconfigure(config, self.swap_listeners(wanted, bound))
        then(None)

    def _bind(self, config: Config, place: Place, bound: dict[Place, list[socket.socket]]) -> Place:
        """Bind a place, if it is not; where a redirect_uri's port is taken, another one instead."""
        scheme, group = place
        if place not in self.redirects and place not in bound:
            try:
                bound[place] = bind_redirect(f"{scheme}_listen", group, self.control is not None)
            except PizauthError as error:
                if group == LOOPBACK or getattr(config, f"{scheme}_listen") is not None:
                    raise
                self.warn(f"{error}; redirect_uri gets another port")
                return self._bind(config, (scheme, LOOPBACK), bound)
        return place

    def swap_listeners(self, wanted: list[Place],
                       bound: dict[Place, list[socket.socket]]) -> dict[str, list[int]]:
        """Listen at these places alone, some of them newly bound; returns the ports."""
        for place in [place for place in self.redirects if place not in wanted]:
            for listener in self.redirects.pop(place):
                listener.close()
        for place, sockets in bound.items():
            service = Service(peer="browser", frame=http_head,
                              respond=partial(self.authenticator.redirected, place[0]))
            self.redirects[place] = [Listener(self.connections, sock, service) for sock in sockets]
        ports: dict[str, list[int]] = {"http": [], "https": []}
        for (scheme, _), listeners in self.redirects.items():
            ports[scheme].append(listeners[0].sock.getsockname()[1])
            if scheme == "https" and self.certificate is not None:
                for listener in listeners:
                    listener.service.context = self.certificate[0]
        return ports

    # The control socket.

    def listen_to_clients(self) -> None:
        """Make the control socket, in place of one that we may have. Raises PizauthError."""
        sock, replaced = bind_control(self.control_path), self.control
        service = Service(peer="control", frame=until_eof, respond=self.authenticator.control)
        self.control = Listener(self.connections, sock, service)
        self.control_id = file_id(self.control_path)
        if replaced is not None:
            replaced.close()

    def check_socket(self) -> None:
        """Once a minute: replace a lost control socket; stop if another server has its place."""
        now = self.clock.now()
        if now < self.control_checked + SOCKET_CHECK or self.control is None:
            return
        self.control_checked = now
        if self.control_id is not None and file_id(self.control_path) == self.control_id:
            return
        try:
            if is_served(self.control_path):
                self.log(ERROR, f"Another server has taken over {self.control_path}: this one ends")
                self.authenticator.stopping = True
                return
            self.log(WARNING, f"{self.control_path} is gone: making a new one")
            make_runtime_directory()
            self.listen_to_clients()
        except (PizauthError, OSError) as error:  # perhaps temporary: tried again in a minute
            self.log(ERROR, f"Cannot make a new control socket: {error}")


def open_standard_streams() -> None:
    """Open those that are closed: our sockets must not take their numbers."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def close_inherited() -> None:
    """Close what our starter left open; Python's own descriptors are not inheritable."""
    for descriptor in range(3, 256):  # shells use no higher ones
        with suppress(OSError):  # it is not open
            if os.get_inheritable(descriptor):
                os.close(descriptor)


def daemonise() -> int:
    """Go on in a child; returns the pipe on which it is to say that it is ready. The starter waits
    for that and exits: with 1 if the child failed, which has said why. Raises OSError."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        raise SystemExit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    return writer


def leave_terminal(writer: int, server: Server) -> None:
    """Let go of the terminal and its session, and tell the starter that the server is ready."""
    server.log.use_syslog()
    null = os.open(os.devnull, os.O_RDWR)
    os.setsid()
    for standard in range(3):  # or `$(pizauth server)` would go on waiting
        os.dup2(null, standard)
    os.close(null)
    with suppress(OSError):  # the starter was interrupted meanwhile
        os.write(writer, b"!")
    os.close(writer)


# ---- Client and command line ----
# A client sends one request. It speaks through `_socket`, the half of `socket` written in C, and a
# plain `show ACCOUNT` builds no parser: it runs at every login of a mail program.

CLIENT_TIMEOUT = 10  # Seconds that a client waits for the next byte.
CONNECT_AGAIN = 0.05  # Seconds until a client that found the socket's queue full tries again.
WAIT = 60  # Seconds that `show -w` waits if it is not told how long.
PASTED = 0.5  # Seconds after which no more lines of a pasted address are expected.
GOOD_KINDS = {b"showtoken": b"access_token", b"refresh": b"scheduled"}  # of replies; others: ok
NO_SERVER = "pizauth authenticator not running or not responding"


def lock_holder(directory: str) -> str:
    """The process number of the server that holds the lock of a directory; empty if none does."""
    import fcntl
    try:
        with open(os.path.join(directory, LOCK_NAME), encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.readline().strip()
    except (OSError, ValueError):
        pass  # the original has no such file
    return ""


class ServerHangs(PizauthError):
    """The server of this directory is there, but silent for so many seconds."""

    def __init__(self, directory: str, patience: float) -> None:
        pid = lock_holder(directory)
        process, remedy = "", "end it and run 'pizauth server'"
        if pid:
            process, remedy = f" (process {pid})", (
                f"'kill -CONT {pid}' wakes one that was stopped: then look at 'pizauth status';"
                f" otherwise 'kill -9 {pid}', which loses its tokens, and 'pizauth server'")
        super().__init__(f"{NO_SERVER}: it hangs{process}, silent for {patience:g} s; {remedy}")


def no_server(directory: str) -> PizauthError:
    """The error of a client that finds no server in this directory."""
    if pid := lock_holder(directory):
        return PizauthError(f"{NO_SERVER}: process {pid} has lost its socket in {directory};"
                            f" 'kill -HUP {pid}' has it make a new one")
    return PizauthError(f"{NO_SERVER}: start it with 'pizauth server'; if it runs, it has another"
                        f" XDG_RUNTIME_DIR, for there is none in {directory}")


def connect_client(sock: Any, path: str) -> None:
    """Connect to the server. If its queue is full, wait for a place. Raises OSError."""
    for _ in range(round(CLIENT_TIMEOUT / CONNECT_AGAIN)):
        try:
            sock.connect(path)
            return
        except BlockingIOError:
            import time
            time.sleep(CONNECT_AGAIN)
    sock.connect(path)


def ask(request: bytes, patience: float = 0) -> bytes:
    """The server's reply; `patience` is added to the usual seconds. Raises PizauthError."""
    import _socket
    directory = runtime_directory()
    reply = bytearray()
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        check_directory(directory)  # another user's server would get our dumps
        sock.settimeout(CLIENT_TIMEOUT)
        connect_client(sock, os.path.join(directory, SOCKET_NAME))
        try:
            sock.sendall(request)
            sock.shutdown(_socket.SHUT_WR)
        except ConnectionError:
            pass  # the server has answered before it read everything
        sock.settimeout(CLIENT_TIMEOUT + patience)
        while data := sock.recv(CHUNK):
            reply += data
    except (_socket.timeout, BlockingIOError):
        raise ServerHangs(directory, sock.gettimeout() or 0) from None
    except ConnectionResetError:  # at the limit of clients, or at the server's end
        raise PizauthError(f"{NO_SERVER}: it ended the connection: try again") from None
    except OSError:
        raise no_server(directory) from None
    finally:
        sock.close()
    return bytes(reply)


class Refused(PizauthError):
    """The server answered `error:` or `pending:`; the latter if the person must log in."""

    def __init__(self, text: str, pending: bool) -> None:
        super().__init__(text)
        self.pending = pending


def request(verb: bytes, rest: bytes = b"", patience: float = 0) -> str:
    """The text of a good reply. Raises PizauthError with the reason if it is another."""
    reply = ask(verb + b":" + rest, patience)
    got, _, raw = reply.partition(b":")
    text = raw.decode("utf-8", "replace")
    if got == b"pending":
        text = f"Access token unavailable until authorised with URL {text}".rstrip()
    if got in (b"error", b"pending"):
        raise Refused(text, got == b"pending")
    if not reply:
        raise PizauthError("The server ended the connection before it answered: try again")
    if got != GOOD_KINDS.get(verb, b"ok"):
        raise PizauthError("The server's answer makes no sense: is it another version?")
    return text


def request_with_reason(verb: bytes, words: str, account: str, patience: float = 0) -> str:
    """A request about an account; its error starts with why the account's last attempt failed."""
    try:
        return request(verb, f"{words} ".encode() + os.fsencode(account), patience)
    except Refused as error:
        reason, text = last_error(account), str(error)
        told = text.startswith(reason.rstrip("; "))  # a login that failed while we waited
        raise Refused(text if told else reason + text, error.pending) from None


def last_error(account: str) -> str:
    """Why the account's last attempt failed, and `; `; empty if it did not, or nobody knows."""
    import json

    try:
        rows = json.loads(request(b"status", b"json"))
        reason = {row["account"]: row["last_error"] for row in rows}.get(account)
    except (PizauthError, ValueError, TypeError, KeyError):
        return ""  # the original's server does not know that request
    return f"{reason}; " if reason else ""


def show(options: argparse.Namespace) -> None:
    """Print a token, after waiting for it if asked to; the URL to log in with is shown at once."""
    words = options.words + (f",life={options.life}" if options.life else "")
    words += ",json" if options.json else ""
    try:
        text = request_with_reason(b"showtoken", words, options.account)
    except Refused as error:
        if not options.wait:
            raise
        if error.pending:
            complain(f"WARNING - {error}")
        words += f",wait={options.wait}"
        text = request_with_reason(b"showtoken", words, options.account, options.wait)
    put((text if options.user is None else with_xoauth2(text, options.user, options.json)) + "\n")


def with_xoauth2(text: str, user: str, as_json: bool) -> str:
    """The initial response of SASL XOAUTH2 in place of a token, or besides in its JSON."""
    import base64, json

    about = json.loads(text) if as_json else {"access_token": text}
    response = f"user={user}\x01auth=Bearer {about['access_token']}\x01\x01"
    encoded = base64.b64encode(os.fsencode(response)).decode()
    return json.dumps({**about, "xoauth2": encoded}) if as_json else encoded


def info(options: argparse.Namespace) -> None:
    """Print where things are, and what a running server says about itself."""
    import json
    server_info, server_is = {}, "running:"
    try:
        server_info = dict(json.loads(ask(b"info:")))
    except ServerHangs:
        server_is = "not responding"
    except (PizauthError, TypeError, ValueError):
        server_is = "not running"
    cache, config = runtime_directory(), config_path(options.config)
    if options.json:
        summary = {
            "cache_directory": cache, "config_file": config, "executed_as": sys.argv[0],
            "info_format_version": 2, "pizauth_version": VERSION,
            "server_running": bool(server_info),
            **({"server_info": server_info} if server_info else {})}
        put(json.dumps(summary, sort_keys=True, separators=(",", ":")) + "\n")
        return
    titles = {"config_file": "config file", "http_port": "HTTP port", "https_port": "HTTPS port",
              "https_pub_key": "HTTPS public key", "https_cert_sha256": "HTTPS certificate SHA-256"}
    put("\n".join([
        f"{os.path.basename(sys.argv[0])} version {VERSION}:", f"  cache directory: {cache}",
        f"  config file: {config}", f"server {server_is}",
        *[f"  {titles[key]}: {server_info[key]}" for key in titles if key in server_info], ""]))


def provider_uri(name: str, uri: str) -> str:
    """A URI in normal form, not of http: except on this machine. Raises PizauthError."""
    try:
        if (normal := normal_uri(uri)).startswith("http:") and not is_loopback(normal):
            raise ValueError("http: is for this machine alone: it must be https:")
        return normal
    except ValueError as error:
        raise PizauthError(printable(f"{error} ({name} {uri})")[:500]) from None


def account_block(issuer: str, metadata: dict[str, Any]) -> str:
    """An account by an issuer's untrusted metadata (RFC 8414 2, 8628 4). Raises PizauthError."""
    texts = {name: value for name, value in metadata.items() if isinstance(value, str)}
    found = texts.get("issuer", "")
    if found not in (issuer, issuer + "/"):  # RFC 8414 3.3
        raise PizauthError(f"The metadata of {issuer} has the issuer '{printable(found)[:200]}':"
                           " ask for that one if you mean it")
    uris = {option: provider_uri(name, texts[name]) for option, name in (
        ("auth_uri", "authorization_endpoint"),
        ("device_auth_uri", "device_authorization_endpoint"), ("token_uri", "token_endpoint"),
        ("revoke_uri", "revocation_endpoint")) if name in texts}
    if "token_uri" not in uris or not {"auth_uri", "device_auth_uri"} & uris.keys():
        raise PizauthError(f"The metadata of {issuer} lacks endpoints: write the account by hand")
    # JSON's strings are printable ASCII; those of URIs are also the configuration's.
    lines = []
    for option, value in (*uris.items(), ("issuer", found)):
        choice = option == "device_auth_uri" and "auth_uri" in uris
        lines.append(f"// {option} = {json.dumps(value)};  // logs in with a code instead" if choice
                     else f"{option} = {json.dumps(value)};")
    methods = metadata.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
    if (isinstance(methods, list) and "client_secret_basic" in methods
            and "client_secret_post" not in methods):
        lines.append('client_auth = "basic";')
    scopes = metadata.get("scopes_supported")
    known = [one for one in scopes if isinstance(one, str)] if isinstance(scopes, list) else []
    return "\n    ".join([
        f"account {json.dumps(urllib.parse.urlsplit(issuer).hostname)} {{", *lines,
        'client_id = "";  // fill in what the provider gave you for your client',
        '// client_secret = "";  // and this one, if it gave you a secret',
        f"// scopes = {json.dumps(known)};  // choose from these, and add those for mail",
        'redirect_uri = "http://localhost/";']) + "\n}\n"


def discover(options: argparse.Namespace) -> None:
    """Print an account by an issuer's metadata (OpenID Connect Discovery 1.0 4, RFC 8414 3)."""
    server_imports()

    def too_late(*_: object) -> NoReturn:
        raise PizauthError(f"No metadata within {TOKEN_REQUEST_LIMIT} s: try again later")

    socket.setdefaulttimeout(CLIENT_TIMEOUT)
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(TOKEN_REQUEST_LIMIT)
    typed = options.issuer if "://" in options.issuer else f"https://{options.issuer}"
    issuer = provider_uri("issuer", typed).removesuffix("/")
    for uri in (issuer + "/.well-known/openid-configuration", re.sub(
            "//[^/]+", r"\g<0>/.well-known/oauth-authorization-server", issuer, count=1)):
        head, _, body = fetch(uri).partition(b"\n")
        status = int(head.split()[0])
        if status == 200 and (metadata := json_object(body)):
            put(account_block(issuer, metadata))
            return
    reason = f"HTTP {status} at {uri}" if status else printable(body.decode("utf-8", "replace"))
    raise PizauthError(f"No metadata of {issuer}: {reason}: is that the issuer's right name?")


def dump(options: argparse.Namespace) -> None:
    """Print a dump. A truncated one must not replace a good one, so it is checked first."""
    if os.isatty(1):
        raise PizauthError("A dump is not for a terminal: write it to a file or a program,"
                           " for instance with pizauth dump > FILE")
    reply = ask(b"dump:")
    if not reply or reply.startswith(b"error:"):
        why = reply.decode("utf-8", "replace").replace("error:", ": ", 1)
        raise PizauthError(f"The server gave no dump{why}")
    check_dump(reply)
    put(reply)


def read_input(limit: int, expected: str) -> bytes:
    """All of standard input, which may have so many bytes. Raises PizauthError."""
    data = bytearray()
    try:
        while piece := os.read(0, min(CHUNK, limit + 1 - len(data))):
            data += piece
    except OSError as error:
        raise PizauthError(f"Cannot read standard input: {error.strerror}") from None
    if len(data) > limit:
        raise PizauthError(f"Standard input is no {expected}: it is longer than {limit >> 10} KiB")
    return bytes(data)


def import_token(options: argparse.Namespace) -> None:
    """Send the server a refresh token, read from standard input."""
    token = read_input(REQUEST_LIMIT, "refresh token").strip()
    if len(token.split()) != 1:
        raise PizauthError("Standard input is no refresh token, which is one word, and alone")
    request(b"import", token + b" " + os.fsencode(options.account))


def complete(options: argparse.Namespace) -> None:
    """Send the server the address at which a browser ended that could not reach it."""
    ask(b"info:")  # so that a server that is not there, or hangs, is noticed early
    if options.url is not None:
        address = os.fsencode(options.url)
    elif os.isatty(0):
        address = typed_address().encode("utf-8", "surrogateescape")
    else:
        address = read_input(REQUEST_LIMIT, "address")
    put(request(b"complete", address, patience=COMPLETE_PATIENCE) + "\n")


def typed_address() -> str:
    """What the person pastes into the terminal, all its lines. Raises PizauthError."""
    import select
    try:
        import readline  # noqa: F401 - without it a terminal takes 4,096 characters at most
    except ImportError:
        pass
    complain("Paste the address that the browser shows after the login, and press Enter:")
    text = ""
    try:
        while not text.strip() or select.select([0], [], [], PASTED)[0]:
            text += input() + "\n"
    except EOFError:
        if not text.strip():
            raise PizauthError("No address was given") from None
    return text


def server(options: argparse.Namespace) -> None:
    """Run the daemon, in the foreground or in a child, or only check its configuration."""
    server_imports()
    if options.check:
        load_config(config_path(options.config), lambda text: complain(f"WARNING - {text}"))
        return
    open_standard_streams()
    with suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write("pizauth")  # the name of this process, for pgrep; Linux only
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # else `stty tostop` stops us at a log line
    verbosity = min(options.verbose + options.verbose_before, TRACE)
    try:
        ready = (lambda _: None) if options.foreground else partial(leave_terminal, daemonise())
        Server(config_path(options.config), verbosity, ready).run()
    except OSError as error:
        raise PizauthError(f"Cannot start the server: {error.strerror or error}") from None


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], object], str, tuple[str, ...]]] = {
    "complete": (complete, "finish a login whose browser could not reach the server", ("url",)),
    "discover": (discover, "print an account, by the metadata of a provider", ("issuer",)),
    "dump": (dump, "write the tokens to standard output", ()),
    "import": (import_token, "take a refresh token that another program got", ("account",)),
    "info": (info, "print where things are and what the server says about itself",
             ("-c --config", "-j")),
    "refresh": (lambda options: request_with_reason(b"refresh", options.words, options.account),
                "ask for a new access token now", ("-u", "account")),
    "reload": (lambda _: request(b"reload"), "have the server read its configuration again", ()),
    "restore": (lambda _: request(b"restore", read_input(RESTORE_LIMIT, "dump")),
                "read tokens from a dump on standard input", ()),
    "revoke": (lambda options: request(b"revoke", os.fsencode(options.account)),
               "have the server forget an account's tokens", ("account",)),
    "server": (server, "start the server", ("-c --config", "-d", "-n")),
    "show": (show, "print an access token", ("-u", "-w", "-l", "-j", "-x", "account")),
    "shutdown": (lambda _: ask(b"shutdown:"), "stop the server", ()),
    "status": (lambda options: put(request(b"status", b"json" if options.json else b"") + "\n"),
               "print a line about each account", ("-j",)),
}


def seconds(text: str) -> int:
    """An argument that is a number of seconds."""
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) <= WISH_LIMIT):
        raise ValueError
    return int(text)


def sasl_user(text: str) -> str:
    """An argument that is a user's name for SASL."""
    if not text or not text.isprintable():
        raise ValueError
    return text


ARGUMENTS: dict[str, dict[str, Any]] = {
    "account": {"metavar": "ACCOUNT", "help": "a configured account"},
    "issuer": {"metavar": "ISSUER", "help": "the provider's, such as https://login.example.com"},
    "url": {"metavar": "URL", "nargs": "?", "help": "the address at which the browser ended; if"
            " left out, it is read from standard input and stays out of the list of processes"},
    "-c --config": {"metavar": "FILE", "help": "the configuration file"},
    "-d": {"dest": "foreground", "action": "store_true", "help": "stay in the foreground"},
    "-j": {"dest": "json", "action": "store_true", "help": "print JSON"},
    "-n": {"dest": "check", "action": "store_true", "help": "only check the configuration"},
    "-l": {"dest": "life", "metavar": "SECONDS", "type": seconds, "default": 0,
           "help": "want a token that lasts so long, at most a day; refresh it first if need be"},
    "-w": {"dest": "wait", "metavar": "SECONDS", "type": seconds, "default": 0,
           "help": f"wait for a token, {WAIT} seconds if none are given, at most a day"},
    "-x": {"dest": "user", "metavar": "USER", "type": sasl_user,
           "help": "print the SASL XOAUTH2 initial response for this user of the mail server"},
    "-u": {"dest": "words", "action": "store_const", "const": "withouturl", "default": "withurl",
           "help": "leave the URL out of the error"},
    "-v --verbose": {"dest": "verbose", "action": "count", "default": 0,
                     "help": "log more, up to four times (server)"}}


def command_line() -> argparse.ArgumentParser:
    """The parser of the command line; wrong usage exits 1."""
    import argparse

    class Usage(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            complain(f"{self.format_usage()}{self.prog}: {message}")
            raise SystemExit(1)

        def _print_message(self, message: str, file: object = None) -> None:
            put(message)

    parser = Usage(prog="pizauth", allow_abbrev=False,
                   description="OAuth2 access tokens for command-line mail programs")
    parser.set_defaults(function=None)
    parser.add_argument("--version", action="version", version=f"pizauth {VERSION}")
    verbose = ARGUMENTS["-v --verbose"]
    parser.add_argument("-v", "--verbose", **{**verbose, "dest": "verbose_before"})
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (function, text, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        for argument in (*arguments, "-v --verbose"):
            command.add_argument(*argument.split(), **ARGUMENTS[argument])
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command, by default that of sys.argv; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if len(arguments) == 2 and arguments[0] == "show" and not arguments[1].startswith("-"):
            put(request_with_reason(b"showtoken", "withurl", arguments[1]) + "\n")
        else:
            parser = command_line()
            options = parser.parse_args([  # a `-w` without seconds gets the usual ones
                f"{one}{WAIT}" if one[:1] == "-" and one[-1] == "w"
                and set(one[1:-1]) <= set("juv") and not following.isdigit() else one
                for one, following in zip(arguments, [*arguments[1:], ""])])
            if options.function is None:
                complain(parser.format_help().rstrip())
                return 1
            options.function(options)
        return 0
    except PizauthError as error:
        complain(f"ERROR - {error}")
    except KeyboardInterrupt:
        # Die of SIGINT as if it were not caught, so that a loop of the shell ends too.
        import signal
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    return 1


if __name__ == "__main__":
    os._exit(main())  # nothing is buffered, and tidying up would slow `show`
