#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Tests of pizauth.py, in the order of its sections; and a demonstration that needs only Python.

    python3 test_pizauth.py                 the tests (unittest's options and names may follow)
    python3 test_pizauth.py demo [--stay]   the main job before your eyes, with its own provider

All but the last two classes run without a socket or with a socket pair, by a clock that only
tests move.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import importlib.util
import io
import json
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pizauth

pizauth.server_imports()

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pizauth.py")
GOOD = 'auth_uri = "http://a.example"; token_uri = "http://t.example/token"; client_id = "cid";'


# ---- What the tests share ----


def account(name="x", extra=""):
    """The text of an account that needs nothing more."""
    return f'account "{name}" {{ {GOOD} {extra} }}\n'


def config(text=None):
    return pizauth.parse(account() if text is None else text)


class Clock(pizauth.Clock):
    """A clock that stands still until a test moves it; at 1000 the wall's is at 1,795,438,800."""

    def __init__(self):
        self.moment, self.offset = 1000.0, 1_795_438_800.0 - 1000

    def now(self):
        return self.moment

    def wall(self):
        return self.moment + self.offset

    def advance(self, seconds):
        self.moment += seconds


class Post:
    """A token request that was asked for: the test decides what becomes of it."""

    def __init__(self, uri, form, urgent, then):
        self.uri, self.form, self.urgent, self.then = uri, form, urgent, then
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    def answer(self, status=200, body=None, retry_after=0, whole=True, **fields):
        """Have the token endpoint answer with these bytes or JSON fields."""
        data = json.dumps(fields).encode() if body is None else body
        self.then(pizauth.outcome_bytes(status, retry_after, whole, data))

    def grant(self, access_token="at1", refresh_token="rt1", expires_in=3600, **fields):
        """Have it give tokens."""
        tokens = {
            "access_token": access_token, "refresh_token": refresh_token, "expires_in": expires_in}
        self.answer(**{"token_type": "Bearer", **tokens, **fields})

    def fail(self, reason="connection refused"):
        self.answer(0, reason.encode())


class World:
    """An Authenticator among recorded requests, by a clock of the test's."""

    def __init__(self, text=None, port=8080):
        self.clock, self.posts, self.logged = Clock(), [], []
        self.auth = pizauth.Authenticator(config(text), self.clock, self.post, self.log)
        self.auth.ports["http"] = port

    def post(self, *arguments):
        self.posts.append(Post(*arguments))
        return self.posts[-1].cancel

    def log(self, level, message):
        self.logged.append((level, message))

    def ask(self, request):
        """The reply to a control request; None if there is none yet."""
        replies = []
        self.auth.control(request.encode(), replies.append)
        assert len(replies) <= 1
        return replies[0].decode() if replies else None

    def show(self, name="x"):
        return self.ask(f"showtoken:withurl {name}")

    def refresh(self, name="x"):
        return self.ask(f"refresh:withurl {name}")

    def visit(self, target, scheme="http", host="localhost:8080"):
        """What a browser gets that asks for this target: a list that fills when it is answered."""
        pages = []
        self.auth.redirected(scheme, pizauth.Head(target, host), pages.append)
        return pages

    def approve(self, name="x", code="c0de"):
        """Have the person visit the URL that `show` gives, and the provider approve."""
        return self.visit(f"/?state={self.state(name)}&code={code}")

    def state(self, name="x"):
        return query_of(self.show(name).partition(":")[2])["state"]

    def authorise(self, name="x", **grant):
        """Go from Empty to Active."""
        self.approve(name)
        self.posts.pop().grant(**grant)

    def wait(self, seconds):
        """Let time pass as the loop does: from deadline to deadline."""
        end = self.clock.moment + seconds
        while (due := self.auth.deadline()) is not None and due <= end:
            self.clock.moment = max(due, self.clock.moment)
            self.auth.run_due()
        self.clock.moment = end
        self.auth.run_due()

    def status(self):
        return self.ask("status:")


def query_of(url):
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


def text_of(page):
    """Status and paragraph of a page."""
    head, _, body = page.decode().partition("\r\n\r\n")
    return int(head.split()[1]), re.search("<p>(.*)</p>", body)[1]


# ---- An authorization server on loopback ----


class Provider:
    """Strict about PKCE, redirect URIs, clients and codes used twice. A `fault` in the token URI's
    query, a key of FAULTS, makes the token endpoint fail that way at every refresh while `broken`
    is set."""

    def __init__(self, expires_in=3600):
        self.expires_in, self.broken = expires_in, False
        self.codes, self.refresh_tokens, self.posts, self.stray = {}, set(), [], []
        self.open(0)

    def open(self, port):
        """Serve on this port, again after close()."""
        self.closing = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), ProviderHandler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.server.provider = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def account(self, name="work", extra="", fault=""):
        """The configuration of an account here."""
        token_uri = f"{self.url}/token" + (f"?fault={fault}" if fault else "")
        return (
            f'account "{name}" {{\n    auth_uri = "{self.url}/authorize";\n'
            f'    token_uri = "{token_uri}";\n    client_id = "the-client";\n'
            f'    client_secret = "hush-hush";\n    scopes = ["mail", "offline_access"];\n'
            f"    {extra}\n}}\n"
        )

    def authorize(self, query):
        """Approve at once: the redirect that a person's click would lead to."""
        if query.get("response_type") != "code" or query.get("code_challenge_method") != "S256":
            return None
        if query.get("client_id") != "the-client" or not query.get("code_challenge"):
            return None
        code = secrets.token_urlsafe(16)
        self.codes[code] = query["code_challenge"], query["redirect_uri"]
        uri = query["redirect_uri"]
        fields = urllib.parse.urlencode({"code": code, "state": query["state"]})
        return uri + ("&" if "?" in uri else "?") + fields

    def token(self, form):
        """Status and answer of the token endpoint to a form."""
        self.posts.append(form)
        if form.get("client_id") != "the-client" or form.get("client_secret") != "hush-hush":
            return 401, {"error": "invalid_client"}
        if form.get("grant_type") == "authorization_code":
            challenge, redirect_uri = self.codes.pop(form.get("code"), (None, None))
            digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
            proof = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
            if challenge != proof or redirect_uri != form.get("redirect_uri"):
                return 400, {
                    "error": "invalid_grant",
                    "error_description": "bad code, verifier or redirect_uri"}
        elif form.get("grant_type") != "refresh_token":
            return 400, {"error": "unsupported_grant_type"}
        elif form.get("refresh_token") not in self.refresh_tokens:
            return 400, {"error": "invalid_grant", "error_description": "unknown refresh token"}
        self.refresh_tokens.discard(form.get("refresh_token"))
        refresh_token = "rt-" + secrets.token_urlsafe(12)
        self.refresh_tokens.add(refresh_token)
        answer = {"access_token": "at-" + secrets.token_urlsafe(12), "token_type": "Bearer"}
        return 200, {**answer, "expires_in": self.expires_in, "refresh_token": refresh_token}


class ProviderHandler(http.server.BaseHTTPRequestHandler):
    """The HTTP side of a Provider."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        provider = self.server.provider
        if url.path != "/authorize":
            provider.stray.append(self.path)
            return self.reply(404, {})
        location = provider.authorize(dict(urllib.parse.parse_qsl(url.query)))
        if location is None:
            return self.reply(400, {"error": "invalid_request"})
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        url, provider = urllib.parse.urlsplit(self.path), self.server.provider
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        form = dict(urllib.parse.parse_qsl(body, keep_blank_values=True))
        fault = urllib.parse.parse_qs(url.query).get("fault")
        if url.path != "/token":
            provider.stray.append(self.path)
            return self.reply(404, {})
        if provider.broken and form.get("grant_type") == "refresh_token" and fault:
            return FAULTS[fault[0]](self, form)
        self.reply(*provider.token(form))

    def reply(self, status, answer, headers=(), kind="application/json"):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def raw(self, *pieces, pause=0.0):
        """Write bytes as they are, then close."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.wfile.write(piece)
                if pause and self.server.provider.closing.wait(pause):
                    break

    def reset(self):
        """End the connection with an RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


PORTAL = b"<html><form action=/login><input name=room></form></html>"
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
FAULTS = {
    "503": lambda handler, form: handler.reply(503, {"error": "invalid_grant"}),
    "429": lambda handler, form: handler.reply(429, {}, [("Retry-After", "5")]),
    "portal": lambda handler, form: handler.reply(200, PORTAL, kind="text/html"),
    "json": lambda handler, form: handler.reply(200, b'{"access_token": "half'),
    "empty": lambda handler, form: handler.reply(200, {}),
    "404": lambda handler, form: handler.reply(404, b"not here", kind="text/plain"),
    "reset": lambda handler, form: handler.reset(),
    "short": lambda handler, form: handler.raw(
        OK_HEAD, b'Content-Length: 900\r\n\r\n{"access_token": "cut"}'),
    "garbage": lambda handler, form: handler.raw(b"\x16\x03\x01 nonsense\r\n\r\n"),
    "huge": lambda handler, form: handler.raw(OK_HEAD + b"\r\n", *[b" " * (1 << 20)] * 64),
    "redirect": lambda handler, form: handler.reply(
        307, {}, [("Location", f"{handler.server.provider.url}/elsewhere")]),
    "echo": lambda handler, form: handler.reply(502, {
        "error": "server_error",
        "error_description": "\x1b[2Jcannot use " + " ".join(form.values())}),
    "drip": lambda handler, form: handler.raw(
        OK_HEAD + b"Content-Length: 9000\r\n\r\n", *[b" "] * 9000, pause=0.2),
    "silent": lambda handler, form: handler.server.provider.closing.wait(60),
}
SLOW_FAULTS = ("drip", "silent")


# ---- A real server, and its clients ----


class Daemon:
    """pizauth.py in a temporary directory of its own, its home and its runtime directory."""

    def __init__(self, text, *options, environment=()):
        self.directory = tempfile.mkdtemp(prefix="piz")
        self.config = os.path.join(self.directory, "pizauth.conf")
        self.log = os.path.join(self.directory, "log")
        kept = {
            name: value for name, value in os.environ.items()
            if not name.endswith(("_proxy", "_PROXY"))}
        places = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"), self.directory)
        self.environment = {**kept, **places, **dict(environment)}
        self.options, self.process = options, None
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(text)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()
        subprocess.run(["rm", "-rf", self.directory], check=True)

    def start(self):
        """Start the server in the foreground, and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, "server", "-d", *self.options], env=self.environment,
                stderr=log, stdin=subprocess.DEVNULL)
        until(lambda: self.process.poll() is not None or os.path.exists(self.socket))
        assert self.process.poll() is None, self.logged()

    def stop(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        if self.process is not None:
            self.process.wait()

    @property
    def socket(self):
        return os.path.join(self.directory, "pizauth", "pizauth.sock")

    def run(self, *arguments):
        """Run a client to its end."""
        return subprocess.run(
            [sys.executable, PROGRAM, *arguments], env=self.environment, capture_output=True,
            text=True, timeout=60)

    def show(self, name="work"):
        """The access token; empty if there is none."""
        return self.run("show", name).stdout.strip()

    def ask(self, request, timeout=10):
        """The reply to a request, without the cost of a process."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(timeout)
            sock.connect(self.socket)
            sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def url(self, name="work"):
        """The URL that `show` asks a person to visit."""
        return self.ask(f"showtoken:withurl {name}".encode()).decode().partition(":")[2]

    def visit(self, name="work"):
        """Visit that URL as a browser would, by way of the provider; the page in the end."""
        return visit(self.url(name))

    def logged(self):
        with open(self.log, encoding="utf-8") as file:
            return file.read()


def visit(url):
    """What a browser gets that opens a URL: status and text."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def until(condition, limit=15.0):
    """Wait until a condition holds and return what it gave; after the limit, what it gives then."""
    end = time.monotonic() + limit
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


# ---- Configuration ----


class ConfigTest(unittest.TestCase):
    def error(self, text):
        with self.assertRaises(pizauth.ConfigError) as caught:
            pizauth.parse(text)
        return str(caught.exception)

    def test_every_option_is_read_and_kept_as_written(self):
        got = config(
            'auth_notify_cmd = "a \\"b\\" \\\\"; auth_notify_interval = 1m; error_notify_cmd = "e";'
            'http_listen = "127.0.0.1:80"; https_listen = "[::1]:0"; refresh_at_least = 2h; '
            'refresh_before_expiry = 3s;refresh_retry = 4d; startup_cmd = "s"; '
            'token_event_cmd = "t\nu"; transient_error_if_cmd = "i"; // note\n'
            'account "wörk \\"1\\"" { auth_uri = "HTTP://A.example/x?y=z"; '
            'token_uri = "https://t"; client_id = "c";client_secret = "s"; '
            'auth_uri_fields = {"k": "1", "k": "2"}; scopes = ["b", "a"]; login_hint = "h";'
            'redirect_uri = "http://localhost:99/p"; refresh_at_least = 5s; '
            'refresh_before_expiry = 6s; refresh_retry = 7s; }'
        )
        self.assertEqual(vars(got) | {"accounts": None}, {
            "accounts": None, "auth_notify_cmd": 'a "b" \\', "auth_notify_interval": 60,
            "error_notify_cmd": "e", "http_listen": (("127.0.0.1", 80),),
            "https_listen": (("::1", 0),), "refresh_at_least": 7200, "refresh_before_expiry": 3,
            "refresh_retry": 345600, "startup_cmd": "s", "token_event_cmd": "t\nu",
            "transient_error_if_cmd": "i",
        })
        self.assertEqual(vars(got.accounts['wörk "1"']), {
            "name": 'wörk "1"', "auth_uri": "HTTP://A.example/x?y=z",
            "auth_uri_fields": (("k", "1"), ("k", "2")), "client_id": "c", "client_secret": "s",
            "redirect_uri": "http://localhost:99/p", "scopes": ("b", "a"), "token_uri": "https://t",
            "login_hint": "h", "refresh_at_least": 5, "refresh_before_expiry": 6,
            "refresh_retry": 7,
        })

    def test_defaults(self):
        got = config()
        times = (
            got.auth_notify_interval, got.refresh_at_least, got.refresh_before_expiry,
            got.refresh_retry)
        self.assertEqual(times, (900, 5400, 90, 40))
        self.assertEqual(got.http_listen, (("127.0.0.1", 0), ("::1", 0)))
        self.assertEqual(got.accounts["x"].redirect_uri, "http://localhost/")
        self.assertEqual(
            (got.auth_notify_cmd, got.accounts["x"].client_secret, got.accounts["x"].scopes),
            (None, None, ()))

    def test_times_of_an_account_override_the_globals_wherever_these_stand(self):
        got = config(
            account("x", "refresh_retry = 1s;") + account("y")
            + "refresh_retry = 2m; refresh_at_least = 1h;")
        self.assertEqual([a.refresh_retry for a in got.accounts.values()], [1, 120])
        self.assertEqual([a.refresh_at_least for a in got.accounts.values()], [3600, 3600])

    def test_telling_rows_of_the_originals_verdicts(self):
        base = account().strip()
        accepted = [
            base, base + "\r\n", "// c\n" + base, base + "// end", base.replace("{", "// x\n{", 1),
            base.replace(" ", ""), base + 'http_listen = "[::1]:0";', base + "https_listen = none;",
            base + "https_listen = off;",
            account(extra='redirect_uri = "http://localhost:1234/path?a=b";'),
            account(extra="scopes = [];"), account(extra="auth_uri_fields = {};"),
            account(extra='auth_uri_fields = {"a": "b", "a": "c"};'),
            account(extra='client_secret = "c\\\\";'), account(extra='client_secret = "a\tb//";'),
            account(""), account("a b"), account(extra="refresh_retry = 01s;"),
            account(extra="refresh_retry = 18446744073709551615s;"),
            account(extra='redirect_uri = "https://a.com/b[?c=d";'),
            account(extra='redirect_uri = "HTTP://A.COM/";'),
            account(extra='redirect_uri = "http://b,.com";'),
            account(extra='login_hint = "state";'),
            account(extra='redirect_uri = "http://127.0.0.1:1/x";'),
            account(extra='redirect_uri = "http://[::1]/";'),
        ]
        for text in accepted:
            with self.subTest(text=text):
                pizauth.parse(text)
        refused = [
            "", " ", "// only", base + "/* c */", base + "# c", base + "\0", base + "\f",
            base + "\xa0", base + "}", account(extra='scopes = ["a",];'),
            account(extra="scopes = [,];"), account(extra="auth_uri_fields = {,};"),
            account(extra="refresh_retry = 1 s;"), account(extra="refresh_retry = 1.5h;"),
            account(extra="refresh_retry = -1s;"), account(extra="refresh_retry = 1h2m;"),
            account(extra="refresh_retry = s;"), account(extra=";"),
            account(extra="refresh_retry = 213503982334602d;"),
            account(extra='redirect_uri = "ftp://a.com";'),
            account(extra='redirect_uri = "mailto:x@y";'),
            account(extra='redirect_uri = "http://";'),
            account(extra='redirect_uri = "http://a b.com/";'),
            account(extra='redirect_uri = "http://a.com:99999/";'),
            account(extra='redirect_uri = "http:a.com";'),
            account(extra='redirect_uri = " http://a.com";'), base + "https_listen = NONE;",
            base + 'http_listen = ["a"];', base + "auth_notify_cmd = none;",
        ]
        for text in refused:
            with self.subTest(text=text), self.assertRaises(pizauth.ConfigError):
                pizauth.parse(text)

    def test_every_row_of_the_originals_verdicts(self):
        corpus = os.path.join(HERE, "..", "shared", "config-corpus.json")
        if not os.path.exists(corpus):
            self.skipTest(
                "the corpus is not beside this checkout; its telling rows are in the test above")
        with open(corpus, encoding="utf-8") as file:
            rows = json.load(file)
        for row in rows:
            with self.subTest(text=row["text"]):
                try:
                    accepted = bool(pizauth.parse(row["text"]))
                except pizauth.ConfigError:
                    accepted = False
                self.assertEqual(accepted, row["accepted"])

    def test_every_error_tells_the_place_and_the_remedy(self):
        for text, message in CONFIG_ERRORS:
            with self.subTest(text=text):
                told, *excerpt = self.error(text).split("\n")
                self.assertEqual(told, message)
                place = re.match(r"line (\d+), column (\d+): ", told)
                self.assertEqual(len(excerpt), 2 if place else 0)
                if place:
                    line = (text + "\n").split("\n")[int(place[1]) - 1].replace("\0", "?")
                    margin = "    " + re.sub(r"[^\t]", " ", line[: int(place[2]) - 1])
                    self.assertEqual(excerpt, ["    " + line.replace('"d"', '"*"'), margin + "^"])

    def test_an_error_never_shows_a_secret(self):
        for text in (
            account(extra='client_secret = "hush\n"; oops').replace("\n\"", '"'),
            'account "x" { client_secret = "hush',
            'account "x" { client_secret = "hu\nsh\\n"; }',
            'account "x" { client_secret = hush; }',
            'account "x" { client_secret hush; }',
            'account "x" { client_secret = "x"hush; }',
            "account \"x\" { client_secret = 'hush'; }",
            'account "x" { client_id = "c;\nclient_secret = "hush"; }',
            'account "x" { client_secret = "hush\\"sh" oops',
        ):
            with self.subTest(text=text):
                self.assertNotRegex(self.error(text), "hu?sh")

    def test_an_error_in_a_long_or_hostile_line_shows_a_short_harmless_piece(self):
        message = self.error("x" * 10_000 + "\x1b[2J = 1s;")
        self.assertLess(len(message), 700)
        self.assertNotIn("\x1b", message)

    def test_file_must_be_utf8_and_may_start_with_a_byte_order_mark(self):
        self.assertEqual(pizauth.decode_config(b"\xef\xbb\xbfa"), "a")
        with self.assertRaises(pizauth.ConfigError) as caught:
            pizauth.decode_config(b"ok\n\nab\xff")
        self.assertEqual(
            str(caught.exception), "line 3: byte 0xff is not UTF-8: save the file as UTF-8")

    def test_every_truncation_and_mutation_gives_a_config_or_a_config_error(self):
        text = account(
            "x", 'scopes = ["a", "b"]; auth_uri_fields = {"k": "v"}; refresh_retry = 1s; // c\n')
        for at in range(len(text)):
            for changed in (
                text[:at], text[:at] + '"' + text[at:], text[:at] + text[at + 1 :],
                text[:at] + "\\" + text[at:],
            ):
                with contextlib.suppress(pizauth.ConfigError):
                    pizauth.parse(changed)

    def test_parsing_is_linear(self):
        def cost(n, piece):
            start = time.perf_counter()
            with contextlib.suppress(pizauth.ConfigError):
                pizauth.parse(piece * n)
            return time.perf_counter() - start

        for piece in (
            "\\", '"a" ', "// comment\n", 'account "x" { scopes = ["a","b"]; } ', "[", " ",
            '"\\\\', "9", "é",
        ):
            with self.subTest(piece=piece):
                small = min(cost(20_000, piece) for _ in range(3))
                self.assertLess(cost(200_000, piece), 60 * small + 0.2)

    def test_uris_are_sent_in_normal_form(self):
        for uri, expected in (
            ("HTTP://A.Example", "http://a.example/"),
            ("https://a:443/x?y", "https://a/x?y"),
            ("http://a:443", "http://a:443/"),
            ("http://a:80/", "http://a/"),
            ("https://[::1]:8080/", "https://[::1]:8080/"),
            ("http://bücher.example/é b", "http://xn--bcher-kva.example/%C3%A9%20b"),
            ("http://a/%7e?x=%zz", "http://a/%7e?x=%zz"),
        ):
            with self.subTest(uri=uri):
                self.assertEqual(pizauth.normal_uri(uri), expected)

    def test_redirect_uri_carries_the_listeners_port(self):
        for uri, port, expected in (
            ("http://localhost/", 8080, "http://localhost:8080/"),
            ("http://localhost:1/p?a=b", 8080, "http://localhost:8080/p?a=b"),
            ("http://LOCALHOST:1", 80, "http://localhost/"),
        ):
            got = config(
                account(extra=f'redirect_uri = "{uri}";')).accounts["x"].redirect_uri_at(port)
            self.assertEqual(got, expected)


# A text, and what is said of it before the line itself: every error that a configuration can have.
CONFIG_ERRORS = [
    ('', 'Must specify at least one account: account "NAME" { ... }'),
    ('refresh_retry = 1s;', 'Must specify at least one account: account "NAME" { ... }'),
    ('refresh_retry = 1s;\nrefresh_retry = 2s;',
     "line 2, column 1: Mustn't specify 'refresh_retry' more than once"),
    ('account "x" {\n  client_id = "a";\n  client_id = "b";\n}\n',
     "line 3, column 3: Mustn't specify 'client_id' more than once"),
    ('account "x" {\nauth_uri = "http://a"; token_uri = "http://t";\n}\n',
     'line 1, column 9: client_id not specified: this account needs client_id = "...";'),
    ('account "x" {\ntoken_uri = "http://t"; client_id = "c";\n}\n',
     'line 1, column 9: auth_uri not specified: this account needs auth_uri = "...";'),
    ('account "x" {\nauth_uri = "http://a"; client_id = "c";\n}\n',
     'line 1, column 9: token_uri not specified: this account needs token_uri = "...";'),
    ('account "x" {\nauth_uri = "a.example/x";\n}\n',
     'line 2, column 12: Invalid URI: it must start with https:// or http://'),
    ('account "x" {\nauth_uri = "http://";\n}\n',
     'line 2, column 12: Invalid URI: its host is missing or misspelt; write it as '
     'https://HOST/PATH'),
    ('account "x" {\n\ttoken_uri = "ftp://a";\n}\n',
     'line 2, column 14: This is not a valid HTTP or HTTPS URI: it starts with ftp: '
     'instead of https:'),
    ('account "x" {\nredirect_uri = "http://localhost/#x";\n}\n',
     "line 2, column 16: URI fragments ('#...') are not allowed: leave out the '#' "
     'and what follows'),
    ('account "x" {\nauth_uri = "http://a:99999/";\n}\n',
     'line 2, column 12: Invalid URI: Port out of range 0-65535'),
    ('account "x" {\nauth_uri = "http://me:pw@a/";\n}\n',
     'line 2, column 12: Invalid URI: a user name or password in it is not supported'),
    ('account "x" {\nauth_uri = " http://a";\n}\n',
     'line 2, column 12: Invalid URI: it must start with https:// or http://'),
    ('account "x" {\nauth_uri_fields = {"a": "b", "state": "c"};\n}\n',
     "line 2, column 30: 'state' is a reserved key: pizauth sends that field itself"),
    ('account "x" {\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     'auth_uri_fields = {"login_hint": "a"}; login_hint = "b";\n'
     '}\n',
     "line 1, column 9: Both login_hint and auth_uri_fields have a 'login_hint': "
     'keep the one in auth_uri_fields'),
    ('account "x" {\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     '\n'
     '}\n'
     'http_listen = none; https_listen = off;',
     "Cannot set both http_listen and https_listen to 'none': the browser must reach one of them"),
    ('http_listen = none;\n'
     'account "x" {\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     '\n'
     '}\n',
     "line 2, column 9: Account x has an 'http' redirect but the HTTP server is set "
     "to 'none': change its redirect_uri or http_listen"),
    ('https_listen = none;\n'
     'account "x" {\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     'redirect_uri = "https://localhost/";\n'
     '}\n',
     "line 2, column 9: Account x has an 'https' redirect but the HTTPS server is "
     "set to 'none': change its redirect_uri or https_listen"),
    ('refresh_retry = 18446744073709551616s;',
     "line 1, column 17: Invalid time '18446744073709551616s': that is more than 64 "
     'bits of seconds'),
    ('refresh_retry = 5x;',
     "line 1, column 17: Invalid time '5x': write a time such as 90s, 15m, 2h or 1d"),
    ('refresh_retry = "5s";',
     "line 1, column 17: Expected a time such as 90s, 15m, 2h or 1d after '='"),
    ('refresh_retry = 1h2m;',
     "line 1, column 17: Invalid time '1h2m': write a time such as 90s, 15m, 2h or 1d"),
    ('http_listen = "127.0.0.1";',
     'line 1, column 15: Not a listen address: write "HOST:PORT", for instance '
     '"127.0.0.1:0" or "[::1]:8080"'),
    ('http_listen = "127.0.0.1:65536";',
     'line 1, column 15: Not a listen address: write "HOST:PORT", for instance '
     '"127.0.0.1:0" or "[::1]:8080"'),
    ('http_listen = 127.0.0.1:0;', 'line 1, column 15: Expected "HOST:PORT" or none after \'=\''),
    ('auth_notify_cmd = none;', "line 1, column 19: Expected a string in double quotes after '='"),
    ('refresh_rety = 5s;',
     "line 1, column 1: Unknown option 'refresh_rety': did you mean 'refresh_retry'?"),
    ('acount "x" { }', "line 1, column 1: Unknown block 'acount': did you mean 'account'?"),
    ('zzz = 5s;',
     "line 1, column 1: Unknown option 'zzz': they are account, auth_notify_cmd, "
     'auth_notify_interval, error_notify_cmd, http_listen, https_listen, '
     'refresh_at_least, refresh_before_expiry, refresh_retry, startup_cmd, '
     'token_event_cmd, transient_error_if_cmd'),
    ('client_id = "c";',
     'line 1, column 1: Option \'client_id\' belongs into an account: account "NAME" {'
     ' client_id = ...; }'),
    ('account "x" {\nstartup_cmd = "c";\n}\n',
     "line 2, column 1: Option 'startup_cmd' is for all accounts: move it out of "
     "this account's braces"),
    ('account "x" {\nclientid = "c";\n}\n',
     "line 2, column 1: Unknown option 'clientid': did you mean 'client_id'?"),
    ('auth_error_cmd = "x";',
     "line 1, column 1: Unknown option 'auth_error_cmd': it is called error_notify_cmd now"),
    ('refresh_retry_interval = 5s;',
     "line 1, column 1: Unknown option 'refresh_retry_interval': it is called refresh_retry now"),
    ('not_transient_error_if = "x";',
     "line 1, column 1: Unknown option 'not_transient_error_if': write "
     'transient_error_if_cmd = "! ..." instead: it exits 0 if the error is transient'),
    ('account "x" {\nauth_error_cmd = "x";\n}\n',
     "line 2, column 1: Unknown option 'auth_error_cmd': it is called error_notify_cmd now"),
    ('account "x" {\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     '\n'
     '}\n'
     'account "x" {\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     '\n'
     '}\n',
     "line 6, column 9: There is an account 'x' already: choose another name"),
    ('account x {',
     "line 1, column 9: Expected the account's name, a string in double quotes after 'account'"),
    ('account "x" = ', "line 1, column 13: Expected '{' after a string"),
    ('account "x" {\nscopes = "a";\n}\n',
     'line 2, column 10: Expected a list of strings, ["a", "b"] after \'=\''),
    ('account "x" {\nscopes = ["a",];\n}\n',
     "line 2, column 15: Expected a string in double quotes after ','"),
    ('account "x" {\nscopes = ["a" "b"];\n}\n',
     "line 2, column 15: Expected ',' or ']' after a string"),
    ('account "x" {\nauth_uri_fields = ["a"];\n}\n',
     'line 2, column 19: Expected a map of strings, {"key": "value"} after \'=\''),
    ('account "x" {\nauth_uri_fields = {"a", "b"};\n}\n',
     "line 2, column 23: Expected ':' after a string"),
    ('account "x" {\nclient_id = "c"\n\n}\n', "line 2, column 16: Expected ';' after a string"),
    ('account "x" { client_id = "c";',
     "line 1, column 31: Expected the name of an option or '}' after ';', but the file ends"),
    ('startup_cmd = "never',
     'line 1, column 15: This string is never closed: a double quote is missing'),
    ('startup_cmd = "a\\n";',
     'line 1, column 17: Invalid escape: in a string write \\\\ for a backslash and \\"'
     ' for a double quote; there are no others'),
    ('# note', "line 1, column 1: Unexpected '#': comments start with //"),
    ('/* note */', "line 1, column 1: Unexpected '/': comments start with //"),
    ("startup_cmd = 'a';", "line 1, column 15: Unexpected ''': strings stand in double quotes"),
    ('startup_cmd = “a”;',
     'line 1, column 15: Unexpected \'“\': strings stand in straight double quotes, "..."'),
    ('\x00', "line 1, column 1: Unexpected '\\x00'"),
    ('startup_cmd "x";', "line 1, column 13: Expected '=' after 'startup_cmd'"),
    ('} ', "line 1, column 1: Expected the name of an option after nothing"),
    ('account "x" {\nclient_id = "c;\nclient_secret = "d";\n}\n',
     "line 3, column 18: Expected ';' after a string of several lines: is its last "
     'double quote missing?'),
    ('account "x" {\n'
     'client_id = "c;\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     '\n'
     '}\n',
     "line 3, column 13: Expected ';' after a string of several lines: is its last "
     'double quote missing?'),
]


# ---- OAuth 2.0 messages ----


class MessagesTest(unittest.TestCase):
    def test_code_challenge_is_that_of_rfc_7636_appendix_b(self):
        verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
        self.assertEqual(
            pizauth.code_challenge(verifier), "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM")

    def test_authorization_request_has_its_fields_in_order(self):
        one = config(account("x", (
            'client_secret = "hush"; scopes = ["a", "b&c"]; login_hint = "me"; '
            'auth_uri_fields = {"p": "1", "p": "ü"};'
        ))).accounts["x"]
        url = pizauth.authorization_request(one, "st", "ver", "http://localhost:8080/")
        self.assertTrue(url.startswith("http://a.example/?access_type=offline&"))
        self.assertEqual(urllib.parse.parse_qsl(url.partition("?")[2]), [
            ("access_type", "offline"), ("code_challenge", pizauth.code_challenge("ver")),
            ("code_challenge_method", "S256"), ("client_id", "cid"),
            ("redirect_uri", "http://localhost:8080/"), ("response_type", "code"), ("state", "st"),
            ("scope", "a b&c"), ("p", "1"), ("p", "ü"), ("login_hint", "me"),
        ])
        self.assertNotIn("hush", url)

    def test_authorization_request_keeps_the_query_of_auth_uri_and_omits_empty_scopes(self):
        text = account().replace("http://a.example", "http://A.example/auth?tenant=7")
        url = pizauth.authorization_request(
            config(text).accounts["x"], "st", "ver", "http://localhost/")
        self.assertTrue(url.startswith("http://a.example/auth?tenant=7&access_type=offline&"))
        self.assertNotIn("scope", query_of(url))

    def test_forms(self):
        plain, empty = (
            config().accounts["x"], config(account(extra='client_secret = "";')).accounts["x"])
        self.assertEqual(pizauth.access_token_request(plain, "c", "v", "http://localhost/"), {
            "code": "c", "client_id": "cid", "code_verifier": "v",
            "redirect_uri": "http://localhost/", "grant_type": "authorization_code",
        })
        self.assertEqual(pizauth.refresh_request(empty, "r"), {
            "client_id": "cid", "refresh_token": "r", "grant_type": "refresh_token",
            "client_secret": "",
        })

    def judge(self, body, status=200, whole=True, form=None, retry_after=0):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return pizauth.token_response(
            pizauth.outcome_bytes(status, retry_after, whole, data), form or {})

    def test_good_answers_of_every_honest_kind(self):
        for body, expires_in, refresh_token in (
            ({"access_token": "t", "token_type": "Bearer", "expires_in": 60, "refresh_token": "r"},
             60, "r"),
            ({"access_token": "t", "token_type": "bearer", "expires_in": "60"}, 60, None),
            ({"access_token": "t", "expires_in": 60.5, "refresh_token": None}, 60.5, None),
            ({"access_token": "t", "token_type": None, "refresh_token": ""}, None, None),
            ({"access_token": "t", "expires_in": 0}, None, None),
            ({"access_token": "t", "expires_in": -5}, None, None),
            ({"access_token": "t", "expires_in": True}, None, None),
            ({"access_token": "t", "expires_in": None}, None, None),
            ({"access_token": "t", "expires_in": "soon"}, None, None),
            ({"access_token": "t", "expires_in": [60]}, None, None),
            ({"access_token": "t", "expires_in": 315_360_001}, None, None),
            ({"access_token": "t", "expires_in": 315_360_000, "error": None}, 315_360_000, None),
            (b'{"access_token": "t", "expires_in": 1e999}', None, None),
            (b'{"access_token": "t", "expires_in": NaN}', None, None),
            (b'{"access_token": "t", "expires_in": ' + b"9" * 500_000 + b"}", None, None),
            (b'\xef\xbb\xbf{"access_token": "t", "expires_in": 60}', 60, None),
            (b"access_token=t&expires_in=60&refresh_token=r&token_type=bearer", 60, "r"),
            (b"access_token=t\n", None, None),
        ):
            with self.subTest(body=body[:90] if isinstance(body, bytes) else body):
                got = self.judge(body)
                self.assertEqual(
                    (got.access_token, got.expires_in, got.refresh_token),
                    ("t", expires_in, refresh_token))

    def test_answers_that_are_no_oauth_answer_are_transient_and_no_outage(self):
        for status, body in (
            (200, b""), (200, b"<html>log in</html>"), (200, b"{"), (200, b"[1]"), (200, b"null"),
            (200, b"\xff\xfe"), (200, {}), (200, {"access_token": ""}),
            (200, {"access_token": "a b"}), (200, {"access_token": "a\n"}),
            (200, {"access_token": "é"}), (200, {"access_token": 7}),
            (200, {"access_token": "t", "token_type": "mac"}),
            (200, {"access_token": "t", "refresh_token": "r r"}),
            (200, {"access_token": "t", "refresh_token": ["r"]}), (400, {"access_token": "t"}),
            (400, {"error": 5}), (400, {"error": ""}), (400, {"error": "two words"}),
            (400, b"error=invalid_grant"), (302, b""), (404, b"nothing"), (401, b""),
            (403, {"message": "no"}), (400, {"error": "temporarily_unavailable"}),
            (400, {"error": "server_error"}), (400, {"error": "slow_down"}), (200, b"[" * 100_000),
            (200, b'{"a":' * 100_000), (200, b" " * 1_000_000), (200, b"error=invalid_grant"),
        ):
            with self.subTest(status=status, body=str(body)[:60]), \
                    self.assertRaises(pizauth.TransientError) as caught:
                self.judge(body, status)
            self.assertFalse(caught.exception.outage)

    def test_a_form_of_unknown_length_may_be_cut_short_and_is_refused(self):
        with self.assertRaises(pizauth.TransientError):
            self.judge(b"access_token=t", whole=False)

    def test_outages_are_transient_whatever_the_body_says(self):
        for status in (408, 425, 429, 500, 502, 503, 504, 599):
            with self.subTest(status=status), self.assertRaises(pizauth.TransientError) as caught:
                self.judge({"error": "invalid_grant"}, status, retry_after=7)
            self.assertEqual((caught.exception.outage, caught.exception.retry_after), (True, 7))
        with self.assertRaises(pizauth.TransientError) as caught:
            self.judge(b"no answer from h: timed out", 0)
        self.assertEqual(
            (str(caught.exception), caught.exception.outage), ("no answer from h: timed out", True))
        with self.assertRaises(pizauth.TransientError) as caught:
            self.judge({}, 503, retry_after=1e9)
        self.assertEqual(caught.exception.retry_after, 3600)

    def test_an_oauth_error_is_permanent_whatever_the_status_is_otherwise(self):
        for status in (200, 400, 401, 403, 302):
            with self.subTest(status=status), self.assertRaises(pizauth.PermanentError) as caught:
                self.judge(
                    {"error": "invalid_grant", "error_description": "Token\x07 was\nrevoked."},
                    status)
            self.assertEqual(
                str(caught.exception), f"HTTP {status}: invalid_grant: Token wasrevoked.")

    def test_a_message_never_holds_what_was_sent_and_is_not_long(self):
        form = {
            "client_secret": "hu sh", "refresh_token": "rt/1", "code": "c0de",
            "code_verifier": "veri", "client_id": "cid",
        }
        text = "hu sh hu+sh rt/1 rt%2F1 c0de veri cid " + "x" * 600
        for error, status in (("invalid_grant", 400), ("server_error", 400), ("x", 503)):
            with self.subTest(error=error), self.assertRaises(pizauth.TokenError) as caught:
                self.judge({"error": error, "error_description": text}, status, form=form)
            self.assertNotRegex(str(caught.exception), "hu.sh|rt.*1|c0de|veri")
            self.assertIn("cid", str(caught.exception))
            self.assertLess(len(str(caught.exception)), 520)

    def test_authorization_response(self):
        got = pizauth.authorization_response("state=s%26&code=c+d&x=1&x=2")
        self.assertEqual((got.state, got.code, got.error), ("s&", "c d", None))
        with self.assertRaises(pizauth.BadRequest):
            pizauth.authorization_response("state=s&state=t")

    def test_retry_after_is_seconds_or_a_date(self):
        for value, expected in (
            (None, 0), ("120", 120), (" 5 ", 5), ("soon", 0), ("-5", 0), ("1e9", 0), ("9" * 400, 0),
        ):
            with self.subTest(value=value):
                self.assertEqual(pizauth.retry_after(value), expected)
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
        self.assertAlmostEqual(pizauth.retry_after(date), 100, delta=3)
        self.assertEqual(pizauth.retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), 0)

    def test_no_proxy_is_asked_for_loopback(self):
        for uri, loopback in (
            ("http://localhost:1/", True), ("http://127.9.9.9/", True), ("https://[::1]/", True),
            ("http://127.0.0.1.example/", False), ("http://localhost.example/", False),
            ("http://10.0.0.1/", False),
        ):
            with self.subTest(uri=uri):
                self.assertEqual(pizauth.is_loopback(uri), loopback)


# ---- Wire formats ----


class WireTest(unittest.TestCase):
    GOOD = b"GET /?state=s&code=c HTTP/1.1\r\nHost: localhost:8080\r\nAccept: */*\r\n\r\n"

    def head(self, data, eof=False):
        return pizauth.http_head(bytearray(data), eof)

    def test_a_get_is_read_whole_and_byte_by_byte(self):
        for end in range(len(self.GOOD)):
            self.assertIsNone(self.head(self.GOOD[:end]))
        got = self.head(self.GOOD + b"trailing junk")
        self.assertEqual((got.target, got.host), ("/?state=s&code=c", "localhost:8080"))

    def test_bare_line_feeds_and_http_1_0_are_understood(self):
        got = self.head(b"GET / HTTP/1.0\nhost:  LOCALHOST \n\n")
        self.assertEqual((got.target, got.host), ("/", "LOCALHOST"))

    def test_what_is_no_get_is_refused_as_soon_as_it_is_clear(self):
        for data, status in (
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400), (b"\r\n", 400), (b"\n", 400),
            (b" GET", 400), (b"G\0", 400), (b"POST ", 405), (b"HEAD ", 405), (b"get ", 405),
            (b"PRI * HTTP/2.0\r\n", 405), (b"A" * 17, 400), (b"GET h", 400), (b"GET  /", 400),
            (b"GET / HTTP/2\r\n", 400), (b"GET /\r\n", 400), (b"GET /a b HTTP/1.1\r\n", 400),
            (b"GET /# HTTP/1.1\r\n", 400), (b"GET /\xc3\xa9 HTTP/1.1\r\n", 400),
            (b"GET /\r HTTP/1.1\r\n", 400), (b"GET / HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\0\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", 413),
            (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
            (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 5\r\n\r\n", 413),
            (b"GET /" + b"a" * 17_000, 431),
            (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 17_000, 431),
            (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 17_000 + b"\r\n\r\n", 431),
        ):
            with self.subTest(data=data[:60]), self.assertRaises(pizauth.BadRequest) as caught:
                self.head(data)
            self.assertEqual(caught.exception.status, status)

    def test_a_request_cut_short_is_refused_and_silence_is_not_answered(self):
        with self.assertRaises(pizauth.BadRequest):
            self.head(self.GOOD[:-2], eof=True)
        self.assertIsNone(self.head(b"", eof=True))

    def test_a_request_with_an_empty_body_is_fine(self):
        self.assertEqual(
            self.head(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").host, "a")

    def test_mutations_give_a_head_or_a_bad_request(self):
        for at in range(len(self.GOOD)):
            for byte in (b"\0", b"\r", b"\n", b" ", b":", b"\xff"):
                with contextlib.suppress(pizauth.BadRequest):
                    self.head(self.GOOD[:at] + byte + self.GOOD[at:])

    def test_redirect_matching(self):
        for uri, scheme, host, target, matches in (
            ("http://localhost:8080/", "http", "localhost:8080", "/?state=s&code=c", True),
            ("http://localhost:8080/", "http", "LocalHost:8080", "/?state=s", True),
            ("http://localhost:8080/", "http", "127.0.0.1:8080", "/?state=s", False),
            ("http://localhost:8080/", "http", "localhost", "/?state=s", False),
            ("http://localhost:8080/", "http", "localhost:80", "/?state=s", False),
            ("http://localhost:8080/", "https", "localhost:8080", "/?state=s", False),
            ("http://localhost/", "http", "localhost:80", "/?state=s", True),
            ("http://localhost/", "http", "localhost", "/?state=s", True),
            ("http://localhost/", "http", "localhost:443", "/", False),
            ("https://localhost/", "https", "localhost:443", "/", True),
            ("http://[::1]:8080/cb", "http", "[::1]:8080", "/cb?state=s", True),
            ("http://localhost:8080/cb", "http", "localhost:8080", "/?state=s", False),
            ("http://localhost:8080/cb", "http", "localhost:8080", "/cb/?state=s", False),
            ("http://localhost:8080/?a=b&a=b", "http", "localhost:8080", "/?a=b&state=s", False),
            ("http://localhost:8080/?a=b&a=b", "http", "localhost:8080", "/?a=b&state=s&a=b", True),
            ("http://localhost:8080/?a=b", "http", "localhost:8080", "/?state=s", False),
            ("http://localhost:8080/?a=", "http", "localhost:8080", "/?a=&state=s", True),
            ("http://localhost:8080/", "http", "evil.example:8080", "/?state=s", False),
        ):
            with self.subTest(uri=uri, host=host, target=target):
                self.assertEqual(
                    pizauth.redirect_matches(uri, scheme, pizauth.Head(target, host)), matches)

    def test_a_page_is_escaped_and_complete(self):
        page = pizauth.page(405, '<script>alert("x")</script>\x1b')
        head, _, body = page.partition(b"\r\n\r\n")
        self.assertNotIn(b"<script", body)
        self.assertNotIn(b"\x1b", body)
        self.assertIn(b"&lt;script&gt;", body)
        for line in (
            b"HTTP/1.1 405 Method Not Allowed", b"Content-Type: text/html; charset=utf-8",
            b"Connection: close", b"Allow: GET", b"Cache-Control: no-store",
            b"Referrer-Policy: no-referrer", f"Content-Length: {len(body)}".encode(),
        ):
            self.assertIn(line, head.split(b"\r\n"))
        style = re.search(b"<style>(.*)</style>", body)[1]
        digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
        self.assertIn(
            f"Content-Security-Policy: default-src 'none'; style-src 'sha256-{digest}'",
            head.decode())

    def test_control_request_ends_with_the_file(self):
        self.assertIsNone(pizauth.until_eof(bytearray(b"status:"), False))
        self.assertEqual(pizauth.until_eof(bytearray(b"status:"), True), b"status:")
        with self.assertRaises(pizauth.RequestError):
            pizauth.until_eof(bytearray(b"x" * 65537), False)


# ---- Token states, the schedule, and the redirects ----


class TokensTest(unittest.TestCase):
    """Histories of accounts, told as calls in an order."""

    def setUp(self):
        self.world = World(account("x", 'client_secret = "hush";') + account("y"))

    def test_from_empty_to_pending_to_active(self):
        world = self.world
        url = world.show().partition(":")[2]
        self.assertEqual(query_of(url)["redirect_uri"], "http://localhost:8080/")
        self.assertEqual(len(base64.urlsafe_b64decode(query_of(url)["state"] + "=")), 32)
        self.assertEqual(world.show(), f"pending:{url}")
        pages = world.visit(f"/?state={query_of(url)['state']}&code=c0de")
        (post,) = world.posts
        self.assertEqual((post.uri, post.urgent), ("http://t.example/token", True))
        verifier = post.form["code_verifier"]
        self.assertEqual(len(base64.urlsafe_b64decode(verifier + "==")), 64)
        self.assertEqual(pizauth.code_challenge(verifier), query_of(url)["code_challenge"])
        self.assertEqual(post.form, {
            "code": "c0de", "client_id": "cid", "code_verifier": verifier,
            "redirect_uri": "http://localhost:8080/", "grant_type": "authorization_code",
            "client_secret": "hush",
        })
        self.assertEqual(pages, [])
        post.grant("at1")
        self.assertEqual(
            text_of(pages[0]), (200, "Account x is authorised: you can safely close this page."))
        self.assertEqual(world.show(), "access_token:at1")

    def test_states_and_verifiers_never_repeat(self):
        states = set()
        for _ in range(50):
            states.add(query_of(self.world.refresh().partition(":")[2])["state"])
        self.assertEqual(len(states), 50)

    def test_refresh_of_empty_or_pending_makes_a_fresh_request_and_voids_the_old(self):
        first, second = self.world.refresh(), self.world.refresh()
        self.assertTrue(first.startswith("pending:http"))
        self.assertNotEqual(first, second)
        old_state = query_of(first.partition(":")[2])["state"]
        (page,) = self.world.visit(f"/?state={old_state}&code=c")
        self.assertEqual(
            text_of(page), (200, "No pending token matches request state: request a fresh token"))
        self.assertEqual(self.world.posts, [])

    def test_a_fresh_request_during_an_exchange_voids_it(self):
        pages = self.world.approve()
        post = self.world.posts.pop()
        self.world.refresh()
        self.assertTrue(post.cancelled)
        self.assertEqual(text_of(pages[0])[0], 200)
        post.grant()
        self.assertTrue(self.world.show().startswith("pending:"))

    def test_the_schedule(self):
        for life, options, due in (
            (3600, "", 3510),  # refresh_before_expiry
            (3600, "refresh_before_expiry = 10m;", 3000),
            (36000, "", 5400),  # refresh_at_least
            (36000, "refresh_at_least = 1m;", 60),
            (95, "", 10),  # the floor keeps short lives from being refreshed without pause
            (12, "", 6),
            (None, "", 5310),  # no sensible expires_in: as if refresh_at_least
        ):
            with self.subTest(life=life, options=options):
                world = World(account("x", options))
                start = world.clock.now()
                world.authorise(expires_in=life)
                world.wait(due - 0.01)
                self.assertEqual(len(world.posts), 0)
                world.wait(0.01)
                self.assertEqual(len(world.posts), 1)
                self.assertEqual(world.clock.now(), start + due)
                self.assertFalse(world.posts[0].urgent)

    def test_a_refreshed_token_replaces_the_old_before_it_expires(self):
        world = self.world
        world.authorise(access_token="at1", refresh_token="rt1")
        world.wait(3510)
        post = world.posts.pop()
        self.assertEqual(post.form, {
            "client_id": "cid", "refresh_token": "rt1", "grant_type": "refresh_token",
            "client_secret": "hush",
        })
        self.assertEqual(world.show(), "access_token:at1")
        post.grant("at2", refresh_token="rt2")
        self.assertEqual(world.show(), "access_token:at2")
        world.wait(3510)
        self.assertEqual(world.posts.pop().form["refresh_token"], "rt2")

    def test_a_refresh_token_that_is_not_sent_again_is_kept(self):
        for again in (None, "", "absent"):
            with self.subTest(again=again):
                world = World()
                world.authorise(refresh_token="rt1")
                world.refresh()
                post = world.posts.pop()
                if again == "absent":
                    post.answer(access_token="at2", expires_in=3600)
                else:
                    post.grant("at2", refresh_token=again)
                world.wait(3510)
                self.assertEqual(world.posts.pop().form["refresh_token"], "rt1")

    def test_transient_failures_are_tried_again_and_cost_nothing(self):
        world = self.world
        world.authorise(expires_in=3600)
        world.wait(3510)
        for _ in range(20):
            world.posts.pop().answer(503, b"<html>down</html>")
            world.wait(39.9)
            self.assertEqual(world.posts, [])
            world.wait(0.2)
        self.assertEqual(
            world.show(),
            "error:Access token has expired. Refreshing is in progress but has not yet succeeded")
        world.posts.pop().grant("at2")
        self.assertEqual(world.show(), "access_token:at2")
        self.assertNotIn("error", world.status())

    def test_while_attempts_fail_an_unexpired_token_is_shown(self):
        self.world.authorise("x", access_token="at1", expires_in=3600)
        self.world.wait(3510)
        self.world.posts.pop().fail()
        self.assertEqual(self.world.show(), "access_token:at1")

    def test_retry_after_counts_if_longer(self):
        for asked, waits in ((5, 40), (300, 300), (1e12, 3600)):
            with self.subTest(asked=asked):
                world = World()
                world.authorise(expires_in=3600)
                world.wait(3510)
                world.posts.pop().answer(429, b"", retry_after=asked)
                world.wait(waits - 0.01)
                self.assertEqual(len(world.posts), 0)
                world.wait(0.02)
                self.assertEqual(len(world.posts), 1)

    def test_no_interval_makes_a_storm(self):
        options = "refresh_retry = 0s; refresh_at_least = 0s; refresh_before_expiry = 1d;"
        for answer in (lambda post: post.fail(), lambda post: post.grant(expires_in=0.001)):
            world, posts = World(account("x", options)), 0
            world.authorise(expires_in=1)
            for _ in range(200):
                world.wait(0.1)
                world.refresh()
                world.show()
                while world.posts:
                    posts += 1
                    answer(world.posts.pop())
            self.assertLessEqual(posts, 21)
            self.assertGreaterEqual(posts, 19)

    def test_a_refresh_asked_for_is_not_held_back_by_the_schedule_but_for_a_second(self):
        world = self.world
        world.authorise(expires_in=3600)
        self.assertEqual(world.refresh(), "scheduled:")
        self.assertEqual(world.refresh(), "scheduled:")
        world.posts.pop().answer(429, b"", retry_after=3000)
        world.wait(0.5)
        self.assertEqual(world.refresh(), "scheduled:")
        self.assertEqual(world.posts, [])
        world.wait(0.5)
        world.posts.pop().grant("at2")
        self.assertEqual(world.show(), "access_token:at2")

    def test_permanent_failures_cost_the_login_and_say_so(self):
        world = self.world
        world.authorise()
        world.refresh()
        world.posts.pop().answer(
            400, error="invalid_grant", error_description="Token has been revoked")
        message = "Refreshing x failed: HTTP 400: invalid_grant: Token has been revoked"
        self.assertIn((pizauth.ERROR, message), world.logged)
        date = world.clock.date(world.clock.now())
        self.assertIn(f"x: No access token; last error at {date}: {message}", world.status())
        self.assertTrue(world.show().startswith("pending:"))

    def test_an_expired_token_is_never_shown_and_starts_a_refresh(self):
        world = self.world
        world.authorise(expires_in=3600)
        world.clock.advance(3600)  # the machine was suspended
        self.assertEqual(world.show(), "error:Access token has expired. Refreshing initiated")
        self.assertEqual(
            world.show(),
            "error:Access token has expired. Refreshing is in progress but has not yet succeeded")
        world.posts.pop().grant("at2")
        self.assertEqual((world.show(), world.posts), ("access_token:at2", []))

    def test_without_a_refresh_token_a_token_lives_its_life_and_goes(self):
        world = self.world
        world.authorise(access_token="at1", refresh_token=None, expires_in=3600)
        (warning,) = [message for level, message in world.logged if level == pizauth.WARNING]
        for remedy in ("offline_access", "access_type", "prompt"):
            self.assertIn(remedy, warning)
        until_date = world.clock.date(world.clock.now() + 3600)
        self.assertEqual(
            world.refresh(),
            f"error:'x' has no refresh token; its access token lasts until {until_date}")
        world.wait(3599)
        self.assertEqual((world.show(), world.posts), ("access_token:at1", []))
        world.wait(1)
        self.assertIn("x: No access token", world.status())
        self.assertTrue(any("token_invalidated" in message for _, message in world.logged))
        self.assertTrue(world.show().startswith("pending:"))

    def test_without_a_refresh_token_show_and_refresh_of_an_expired_token_ask_anew(self):
        for verb in ("showtoken", "refresh"):
            world = World()
            world.authorise(refresh_token=None, expires_in=60)
            world.clock.advance(60)
            self.assertTrue(world.ask(f"{verb}:withurl x").startswith("pending:http"))

    def test_a_late_outcome_is_dropped(self):
        world = self.world
        world.authorise(refresh_token=None, expires_in=60)
        world.clock.advance(60)
        world.approve()
        old = world.posts.pop()
        world.refresh()
        for outcome in (old.grant, old.fail, lambda: old.answer(400, error="invalid_grant")):
            before = world.status()
            outcome()
            self.assertEqual(world.status(), before)

    def test_a_code_exchange_is_tried_ten_times_over_an_outage(self):
        world = self.world
        pages = world.approve()
        for tries in range(1, 10):
            world.posts.pop().answer(503, b"")
            self.assertIn("HTTP 503", world.status())
            world.wait(5.9)
            self.assertEqual(world.posts, [])
            world.wait(0.2)
            self.assertEqual((tries, len(world.posts), world.posts[0].urgent), (tries, 1, True))
        self.assertEqual([text_of(page)[1] for page in pages], [
            "pizauth processing authentication: you can safely close this page."
        ])
        world.posts.pop().answer(503, b"")
        world.wait(60)
        self.assertEqual(world.posts, [])
        message = "Authentication for x failed: HTTP 503"
        self.assertIn((pizauth.ERROR, message), world.logged)
        self.assertIn(message, world.status())

    def test_a_code_exchange_succeeds_after_an_outage(self):
        self.world.approve()
        self.world.posts.pop().fail()
        self.world.wait(6)
        self.world.posts.pop().grant("at1")
        self.assertEqual(self.world.show(), "access_token:at1")
        self.assertNotIn("error", self.world.status())

    def test_any_other_failure_of_a_code_exchange_ends_the_request(self):
        for body, status in (
            (b"<html>", 200), (b'{"error": "invalid_grant"}', 400),
            (b'{"error": "slow_down"}', 400),
        ):
            world = World()
            pages = world.approve()
            world.posts.pop().answer(status, body)
            code, text = text_of(pages[0])
            self.assertEqual(code, 200)
            self.assertTrue(text.startswith(f"Authentication for x failed: HTTP {status}"), text)
            self.assertIn((pizauth.ERROR, text), world.logged)
            self.assertTrue(world.status().startswith("ok:x: No access token; last error at"))

    def test_reminders_move_with_the_interval_and_do_not_disturb_an_exchange(self):
        world = World(account() + "auth_notify_interval = 10s;")
        world.approve()
        first = world.clock.now()
        world.auth.run_due()
        self.assertIn(f"(last notification {world.clock.date(first)})", world.status())
        world.wait(25)
        self.assertIn(f"(last notification {world.clock.date(first + 20)})", world.status())
        world.posts.pop().grant("at1")
        self.assertEqual(world.show(), "access_token:at1")
        self.assertNotEqual(world.auth.deadline(), first + 30)

    def test_nothing_scheduled_is_no_deadline(self):
        self.assertIsNone(self.world.auth.deadline())

    def test_the_deadline_is_the_earliest_of_all_accounts(self):
        self.world.authorise("x", expires_in=3600)
        self.world.authorise("y", expires_in=600)
        self.assertEqual(self.world.auth.deadline(), 1000 + 510)

    def test_a_wall_clock_set_back_changes_nothing_but_dates(self):
        self.world.authorise("x", expires_in=3600)
        due = self.world.auth.deadline()
        self.world.clock.offset -= 365 * 86400
        self.assertEqual((self.world.auth.deadline(), self.world.show()), (due, "access_token:at1"))
        self.assertIn("2025", self.world.status())


class RedirectTest(unittest.TestCase):
    """Rows of the decision, in order: each leaves the state as it is unless it says otherwise."""

    def setUp(self):
        self.world = World(account("x", 'redirect_uri = "http://localhost/cb?a=b";') + account("y"))

    def visited(self, target, **how):
        (page,) = self.world.visit(target, **how)
        return text_of(page)

    def test_no_state_is_404(self):
        self.assertEqual(self.visited("/favicon.ico")[0], 404)

    def test_more_than_one_state_or_code_is_400(self):
        self.assertEqual(self.visited("/?state=a&state=b")[0], 400)

    def test_a_state_of_nobody(self):
        self.world.show()
        for state in ("", "x", "%00", "%FF", "é".encode().hex()):
            self.assertEqual(
                self.visited(f"/?state={state}&code=c"),
                (200, "No pending token matches request state: request a fresh token"))

    def test_a_url_that_is_not_the_redirect_uri_is_404_and_changes_nothing(self):
        state, before = self.world.state(), self.world.status()
        for target, how in (
            (f"/?a=b&state={state}&code=c", {}), (f"/cb?state={state}&code=c", {}),
            (f"/cb?a=b&state={state}&error=e", {"host": "e"}),
            (f"/cb?a=b&state={state}&code=c", {"scheme": "https"}),
            (f"/cb?a=b&state={state}&code=c", {"host": "localhost"}),
        ):
            self.assertEqual(self.visited(target, **how)[0], 404)
        self.assertEqual((self.world.status(), self.world.posts), (before, []))

    def test_an_error_ends_the_request_and_is_told(self):
        state = self.world.state()
        status, text = self.visited(
            f"/cb?a=b&state={state}&error=access_denied&error_description=You+said%0Ano%3Cb%3E")
        self.assertEqual(
            (status, text),
            (400, "Authentication for x failed: access_denied: You saidno&lt;b&gt;"))
        self.assertIn("x: No access token; last error at", self.world.status())
        self.assertIn("access_denied: You saidno<b>", self.world.status())

    def test_no_code_is_400_and_changes_nothing(self):
        state, before = self.world.state(), self.world.status()
        for more in ("", "&code="):
            self.assertEqual(self.visited(f"/cb?a=b&state={state}{more}")[0], 400)
        self.assertEqual(self.world.status(), before)

    def test_what_arrives_while_the_exchange_runs_is_told_the_same_outcome_and_posts_nothing(self):
        state = self.world.state()
        target = f"/cb?a=b&state={state}"
        pages = [
            self.world.visit(target + more)
            for more in ("&code=c", "&code=c", "&code=other", "&error=e", "")]
        self.assertEqual(pages, [[]] * 5)
        (post,) = self.world.posts
        self.assertEqual(post.form["code"], "c")
        post.grant()
        self.assertEqual([text_of(page) for (page,) in pages], [
            (200, "Account x is authorised: you can safely close this page.")
        ] * 5)

    def test_a_browser_waits_ten_seconds_and_another_its_own_ten(self):
        state = self.world.state()
        first = self.world.visit(f"/cb?a=b&state={state}&code=c")
        self.world.wait(4)
        second = self.world.visit(f"/cb?a=b&state={state}&code=c")
        self.world.wait(5.9)
        self.assertEqual((first, second), ([], []))
        self.world.wait(0.2)
        self.assertEqual(
            text_of(first[0]),
            (200, "pizauth processing authentication: you can safely close this page."))
        self.assertEqual(second, [])
        self.world.posts.pop().grant()
        self.assertIn("is authorised", text_of(second[0])[1])

    def test_a_state_is_good_for_one_exchange(self):
        state = self.world.state()
        self.world.visit(f"/cb?a=b&state={state}&code=c")
        self.world.posts.pop().grant()
        self.assertIn("No pending token", self.visited(f"/cb?a=b&state={state}&code=c")[1])

    def test_each_account_has_its_own_state(self):
        self.world.visit(f"/?state={self.world.state('y')}&code=c")
        self.world.posts.pop().grant("at-y")
        self.assertEqual(self.world.show("y"), "access_token:at-y")
        self.assertTrue(self.world.show("x").startswith("pending:"))


# ---- The control protocol ----


class ControlTest(unittest.TestCase):
    def setUp(self):
        self.world = World(account("x") + account('a b "q" é'.replace('"', '\\"')))

    def test_unknown_requests(self):
        for request in ("", "status", "nonsense:", "showtoken withurl x", ":", "STATUS:"):
            reply = self.world.ask(request)
            self.assertTrue(reply.startswith("error:") and len(reply) > 20, reply)

    def test_bytes_that_are_no_utf8(self):
        replies = []
        self.world.auth.control(b"showtoken:withurl \xff\xfe", replies.append)
        self.assertTrue(replies[0].startswith(b"error:No account '"))

    def test_unknown_account(self):
        for verb in ("showtoken", "refresh"):
            self.assertEqual(self.world.ask(f"{verb}:withurl nope"), "error:No account 'nope'")
            self.assertEqual(self.world.ask(f"{verb}:withurl"), "error:No account ''")

    def test_names_may_hold_spaces_quotes_and_any_utf8(self):
        name = 'a b "q" é'
        self.assertTrue(self.world.show(name).startswith("pending:"))
        self.world.authorise(name, access_token="at-q")
        self.assertEqual(self.world.show(name), "access_token:at-q")

    def test_without_url(self):
        for verb in ("showtoken", "refresh"):
            for word in ("withouturl", "anything", ""):
                self.assertEqual(self.world.ask(f"{verb}:{word} x"), "pending:")

    def test_info(self):
        self.assertEqual(
            json.loads(self.world.ask("info:")), {"http_port": "8080", "https_port": "none"})

    def test_status_lines(self):
        world, date = self.world, self.world.clock.date
        self.assertEqual(world.status(), 'ok:a b "q" é: No access token\nx: No access token')
        world.show()
        self.assertIn("x: Access token pending authentication", world.status().split("\n"))
        start = world.clock.now()
        world.authorise(expires_in=3600)
        active = f"x: Active access token (obtained {date(start)}; expires {date(start + 3600)})"
        self.assertIn(active, world.status().split("\n"))
        world.clock.advance(4000)
        self.assertIn(
            "x: Access token expired (refresh not yet attempted)", world.status().split("\n"))
        world.auth.run_due()
        tried = f"x: Access token expired (last refresh attempt {date(start + 4000)})"
        self.assertIn(tried, world.status().split("\n"))
        world.posts.pop().fail("connection refused")
        error = "Refreshing x failed, and will be tried again: connection refused"
        self.assertIn(
            f"{tried}; last error at {date(start + 4000)}: {error}", world.status().split("\n"))

    def test_dates_are_those_of_rfc_2822(self):
        from email.utils import parsedate_to_datetime

        date = self.world.clock.date(1000)
        self.assertRegex(
            date, r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}$")
        self.assertEqual(parsedate_to_datetime(date).timestamp(), 1_795_438_800)

    def test_shutdown_is_not_answered(self):
        self.assertIsNone(self.world.ask("shutdown:"))
        self.assertTrue(self.world.auth.stopping)

    def test_a_request_reads_the_same_cut_anywhere(self):
        request = b"showtoken:withurl x"
        for end in range(len(request)):
            replies = []
            self.world.auth.control(request[:end], replies.append)
            self.assertEqual(len(replies), 1)
            self.assertTrue(replies[0].startswith(b"error:"))

    def test_an_account_whose_listener_is_missing_is_told_so(self):
        self.world.auth.ports["http"] = None
        self.assertIn("no such listener", self.world.show())


# ---- Loop: connections and children ----


class Idle:
    """An authenticator with nothing to do, which stops the loop when a condition holds."""

    def __init__(self, stop):
        self.stop, self.stopping, self.end = stop, False, time.monotonic() + 10

    def deadline(self):
        return None

    def run_due(self):
        pass

    def check(self):
        self.stopping = self.stop() or time.monotonic() > self.end


class LoopTest(unittest.TestCase):
    def setUp(self):
        self.clock, self.logged = Clock(), []
        self.loop = pizauth.Loop(self.clock, lambda level, message: self.logged.append(message))
        self.peers, self.asked = [], []

    def tearDown(self):
        self.loop.end()
        for sock in (*self.peers, self.loop.bell, self.loop.rung):
            sock.close()
        self.loop.selector.close()

    def connect(self, kind="control", frame=pizauth.until_eof, respond=None):
        """The other end of a new exchange; requests are recorded, then given to `respond`."""

        def record(request, answer):
            self.asked.append((request, answer))
            if respond:
                respond(request, answer)

        ours, peer = socket.socketpair()
        ours.setblocking(False)
        peer.settimeout(5)
        self.peers.append(peer)
        pizauth.Exchange(self.loop, ours, kind, frame, record).ready()
        return peer

    def pump(self):
        """Let the loop do all it can without waiting."""
        self.loop.expire()
        while events := self.loop.selector.select(0):
            for key, mask in events:
                key.data(mask)

    def received(self, peer):
        """All that the peer gets, up to end of file."""
        data = b""
        while piece := peer.recv(65536):
            data += piece
            self.pump()
        return data

    def open(self, kind="control"):
        return len(self.loop.exchanges[kind])

    def test_a_request_is_answered_and_the_connection_ends(self):
        peer = self.connect(respond=lambda request, answer: answer(b"ok:" + request))
        for byte in b"status:":
            peer.send(bytes([byte]))
            self.pump()
        self.assertEqual(self.asked, [])
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual(self.received(peer), b"ok:status:")
        self.assertEqual(self.open(), 0)

    def test_an_answer_may_come_on_a_later_pass(self):
        peer = self.connect()
        peer.send(b"x:")
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        ((_, answer),) = self.asked
        self.assertIsNone(self.loop.patience(Idle(None)))  # and meanwhile nothing spins
        self.assertEqual(self.loop.selector.select(0), [])
        answer(b"later")
        answer(b"twice")
        self.assertEqual(self.received(peer), b"later")

    def test_an_answer_to_a_client_that_has_gone_is_nothing(self):
        peer = self.connect()
        peer.send(b"x:")
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        peer.close()
        self.asked[0][1](b"reply" * 100_000)
        self.pump()
        self.assertEqual(self.open(), 0)

    def test_a_silent_client_is_dropped_after_ten_seconds_and_delays_nobody(self):
        silent = self.connect()
        self.assertEqual(self.loop.patience(Idle(None)), 10)
        peer = self.connect(respond=lambda _, answer: answer(b"at once"))
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual(self.received(peer), b"at once")
        self.clock.advance(10)
        self.pump()
        self.assertEqual((self.received(silent), self.open()), (b"", 0))

    def test_an_oversized_request_is_read_on_and_told(self):
        peer = self.connect()
        peer.setblocking(False)
        sent = 0
        for _ in range(400):
            with contextlib.suppress(BlockingIOError):
                sent += peer.send(b"x" * 8192)
            self.pump()
        self.assertGreater(sent, 1_000_000)
        peer.settimeout(5)
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual(self.received(peer), b"error:The request is longer than 64 KiB")
        self.assertEqual((self.asked, self.open()), ([], 0))

    def test_a_long_reply_reaches_a_slow_reader(self):
        peer = self.connect(respond=lambda _, answer: answer(b"y" * 3_000_000))
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual(self.open(), 1)
        self.assertEqual(len(self.received(peer)), 3_000_000)

    def test_a_reader_that_stops_reading_is_dropped(self):
        peer = self.connect(respond=lambda _, answer: answer(b"y" * 3_000_000))
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.clock.advance(10)
        self.pump()
        self.assertEqual(self.open(), 0)

    def test_a_browser_gets_its_refusal_though_it_sends_on(self):
        peer = self.connect("browser", pizauth.http_head)
        peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)
        self.pump()
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertTrue(self.received(peer).startswith(b"HTTP/1.1 405 "))

    def test_a_waiting_browser_that_sends_on_or_half_closes_does_not_spin(self):
        peer = self.connect("browser", pizauth.http_head)
        peer.send(WireTest.GOOD + WireTest.GOOD)
        self.pump()
        peer.send(b"more")
        self.pump()
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual((len(self.asked), self.loop.selector.select(0)), (1, []))
        self.asked[0][1](b"page")
        self.assertEqual(self.received(peer), b"page")

    def test_a_bug_in_a_handler_ends_that_exchange_alone(self):
        peer = self.connect(respond=lambda _, answer: 1 / 0)
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual((self.received(peer), self.open()), (b"", 0))
        self.assertIn("ZeroDivisionError", self.logged[0])

    def test_at_the_cap_the_one_that_has_been_reading_longest_makes_room(self):
        peers = [self.connect() for _ in range(256)]
        peers[0].send(b"x:")
        peers[0].shutdown(socket.SHUT_WR)
        self.pump()  # parked now
        self.assertTrue(self.loop.make_room("control"))
        self.assertTrue(self.loop.make_room("browser"))
        self.assertEqual(self.open(), 255)
        self.assertEqual(peers[1].recv(1), b"")
        self.asked[0][1](b"still here")
        self.assertEqual(self.received(peers[0]), b"still here")

    def listener(self):
        """A listener whose connections are answered, and its address."""
        listening = socket.create_server(("127.0.0.1", 0))
        self.peers.append(listening)

        def exchange(sock):
            return pizauth.Exchange(
                self.loop, sock, "control", pizauth.until_eof, lambda _, answer: answer(b"hello"))

        return pizauth.Listener(self.loop, listening, "control", exchange), listening.getsockname()

    def test_out_of_descriptors_accepting_pauses_and_goes_on(self):
        listener, address = self.listener()
        peer = socket.create_connection(address)
        self.peers.append(peer)
        peer.shutdown(socket.SHUT_WR)
        hoard = []
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.dup(0))
        try:
            self.pump()
        finally:
            for descriptor in hoard:
                os.close(descriptor)
        self.assertEqual((list(self.loop.paused), self.loop.patience(Idle(None))), ([listener], 1))
        self.assertEqual(self.loop.selector.select(0), [])
        self.clock.advance(1)
        self.pump()
        self.assertEqual(self.received(peer), b"hello")

    def run_until(self, condition):
        """Run the real loop with real signals until a condition holds."""
        kept = {number: signal.getsignal(number) for number in self.loop.signals}
        self.loop.catch_signals()
        idle = Idle(condition)
        try:
            self.loop.run(idle, idle.check)
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in kept.items():
                signal.signal(number, handler)
            self.loop.selector.unregister(self.loop.rung)
        self.assertTrue(condition())

    def test_a_child_tells_what_it_returned_and_how_it_ended(self):
        ended = []
        self.loop.clock = pizauth.Clock()
        for work in (
            lambda: b"x" * 300_000, lambda: 1 / 0, lambda: os._exit(7),
            lambda: os.kill(os.getpid(), signal.SIGKILL),
        ):
            with contextlib.redirect_stderr(io.StringIO()):
                self.loop.fork(work, 5, lambda status, output: ended.append((status, len(output))))
        self.run_until(lambda: len(ended) == 4)
        self.assertEqual(sorted(ended), [(-9, 0), (0, 300_000), (1, 0), (7, 0)])
        self.assertEqual(self.loop.children, {})

    def test_a_child_at_its_limit_is_killed_and_its_owner_told(self):
        ended = []
        self.loop.clock = pizauth.Clock()
        child = self.loop.fork(lambda: time.sleep(60), 0.1, lambda *outcome: ended.append(outcome))
        self.run_until(lambda: ended and not self.loop.children)
        self.assertEqual(ended, [(None, b"")])
        with self.assertRaises(ProcessLookupError):
            os.kill(child.pid, 0)

    def test_a_child_has_nothing_of_the_servers(self):
        outputs = []
        self.loop.clock = pizauth.Clock()

        def look():
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            descriptors = [number for number in range(3, 64) if self.is_open(number)]
            return json.dumps([
                len(descriptors), len(blocked),
                signal.getsignal(signal.SIGTERM) == signal.SIG_IGN]).encode()

        self.connect()
        self.loop.fork(look, 5, lambda status, output: outputs.append(json.loads(output)))
        self.run_until(lambda: outputs)
        self.assertEqual(outputs, [[1, 0, True]])

    def is_open(self, descriptor):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            return True
        return False

    def test_a_child_that_cannot_be_forked_is_a_failure_told_on_the_next_pass_and_logged_once(self):
        told = []
        hoard = []
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.dup(0))
        try:
            for _ in range(3):
                self.assertIsNone(self.loop.fork(bytes, 5, lambda *outcome: told.append(outcome)))
        finally:
            for descriptor in hoard:
                os.close(descriptor)
        self.assertEqual((told, self.loop.patience(Idle(None)), len(self.logged)), ([], 0, 1))
        self.pump()
        self.assertEqual([status for status, _ in told], [None] * 3)
        self.assertIn(b"Too many open files", told[0][1])

    def post(self, host="h", urgent=False):
        return self.loop.post(f"http://{host}/token", {}, urgent, self.asked.append)

    def hold_forks(self):
        """Record what would be forked."""
        started = []

        def fork(work, limit, then):
            started.append(work.args[0].split("/")[2])
            return unittest.mock.Mock(spec=pizauth.Child, deadline=0.0, kill=lambda: None, end=then)

        self.loop.fork = fork
        return started

    def test_slots_are_kept_free_for_code_exchanges(self):
        started = self.hold_forks()
        for number in range(20):
            self.post(f"h{number}")
        self.assertEqual(len(started), 12)
        for number in range(20):
            self.post(f"u{number}", urgent=True)
        self.assertEqual(started[12:], ["u0", "u1", "u2", "u3"])

    def test_one_host_takes_four_slots_at_most_and_refreshes_three_of_them(self):
        started = self.hold_forks()
        cancels = [self.post("h") for _ in range(5)]
        self.post("h", urgent=True)
        self.post("h", urgent=True)
        self.post("other")
        self.assertEqual(started, ["h", "h", "h", "h", "other"])
        urgent = self.loop.requests[5]
        urgent.child.end(0, b"200 0 1\n{}")
        self.assertEqual((self.asked, started[5:]), ([b"200 0 1\n{}"], ["h"]))
        for cancel in cancels:
            cancel()
            cancel()
        self.assertEqual(len(self.loop.requests), 2)

    def test_a_request_that_was_killed_or_never_forked_is_no_answer(self):
        self.hold_forks()
        for status, output, reason in (
            (None, b"", "no answer from h within 30 s"),
            (None, b"cannot start", "cannot start"),
            (-9, b"200 0 1\n", "the process that asked h ended with status -9"),
        ):
            self.post()
            self.loop.requests[0].child.end(status, output)
            with self.assertRaises(pizauth.TransientError) as caught:
                pizauth.token_response(self.asked.pop(), {})
            self.assertEqual((str(caught.exception), caught.exception.outage), (reason, True))


# ---- The server's directories, and the command line ----


class DirectoryTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="piz")
        self.addCleanup(directory.cleanup)
        self.base = directory.name
        kept = {
            name: os.environ.get(name)
            for name in ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "TMPDIR", "HOME")}
        self.addCleanup(self.environ, kept)
        self.environ({
            "XDG_RUNTIME_DIR": self.base, "TMPDIR": None, "XDG_CONFIG_HOME": None, "HOME": "/h"})

    def environ(self, variables):
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def refused(self):
        with self.assertRaises(pizauth.PizauthError) as caught:
            pizauth.make_runtime_directory()
        return str(caught.exception)

    def test_it_is_in_xdg_runtime_dir_which_is_neither_made_nor_changed(self):
        os.chmod(self.base, 0o755)
        self.assertEqual(pizauth.make_runtime_directory(), f"{self.base}/pizauth")
        self.assertEqual(os.stat(self.base).st_mode & 0o777, 0o755)
        self.assertEqual(os.stat(f"{self.base}/pizauth").st_mode & 0o777, 0o700)
        self.environ({"XDG_RUNTIME_DIR": f"{self.base}/missing"})
        self.assertIn("Cannot make the directory", self.refused())

    def test_without_it_a_directory_named_after_the_user_is_made(self):
        import pwd

        user = pwd.getpwuid(os.getuid()).pw_name
        for unset in (None, ""):
            self.environ({"XDG_RUNTIME_DIR": unset, "TMPDIR": self.base})
            self.assertEqual(
                pizauth.make_runtime_directory(), f"{self.base}/runtime-{user}/pizauth")
            self.assertEqual(os.stat(f"{self.base}/runtime-{user}").st_mode & 0o777, 0o700)
            self.environ({"TMPDIR": ""})
            self.assertEqual(pizauth.runtime_directory(), f"/tmp/runtime-{user}/pizauth")

    def test_a_directory_that_is_too_open_is_made_private(self):
        os.mkdir(f"{self.base}/pizauth", 0o777)
        pizauth.make_runtime_directory()
        self.assertEqual(os.stat(f"{self.base}/pizauth").st_mode & 0o777, 0o700)

    def test_a_symbolic_link_or_a_file_in_its_place_is_refused(self):
        os.mkdir(f"{self.base}/elsewhere")
        os.symlink(f"{self.base}/elsewhere", f"{self.base}/pizauth")
        self.assertIn("is not a directory", self.refused())
        os.unlink(f"{self.base}/pizauth")
        with open(f"{self.base}/pizauth", "w", encoding="ascii"):
            self.assertIn("is not a directory", self.refused())

    @unittest.skipIf(os.getuid(), "only root can give a directory to another user")
    def test_somebody_elses_directory_is_refused_by_server_and_client(self):
        os.mkdir(f"{self.base}/pizauth")
        os.chown(f"{self.base}/pizauth", 12345, 12345)
        self.assertIn("belongs to another user", self.refused())
        with self.assertRaisesRegex(pizauth.PizauthError, "belongs to another user"):
            pizauth.ask(b"info:")

    def test_configuration_paths(self):
        self.assertEqual(pizauth.config_path("/g"), "/g")
        self.assertEqual(pizauth.config_path(None), "/h/.config/pizauth.conf")
        self.environ({"XDG_CONFIG_HOME": ""})
        self.assertEqual(pizauth.config_path(None), "/h/.config/pizauth.conf")
        self.environ({"XDG_CONFIG_HOME": "/x"})
        self.assertEqual(pizauth.config_path(None), "/x/pizauth.conf")


class ManualTest(unittest.TestCase):
    """The manual pages and the example know what the program knows."""

    def read(self, name):
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            return file.read()

    def test_every_option_is_in_the_manual_page(self):
        manual = self.read("pizauth.conf.5")
        for option in {**pizauth.Parser.GLOBAL_OPTIONS, **pizauth.Parser.ACCOUNT_OPTIONS}:
            self.assertRegex(manual, rf"(?m)^\.It Ic {option}\b")

    def test_every_command_and_flag_is_in_the_manual_page(self):
        manual = self.read("pizauth.1")
        for command, (_, _, arguments) in pizauth.COMMANDS.items():
            self.assertRegex(manual, rf"(?m)^\.It (Ic|Cm) {command}\b")
            for flag in arguments:
                self.assertIn(f"Fl {flag[1:]}" if flag.startswith("-") else "Ar", manual)

    def test_the_example_is_a_configuration(self):
        text = self.read("pizauth.conf.example")
        self.assertTrue(pizauth.parse(text).accounts)
        for option in pizauth.Parser.GLOBAL_OPTIONS:
            self.assertIn(option, text)

    def test_the_readme_has_the_two_commands(self):
        text = self.read("README")
        self.assertIn("python3 test_pizauth.py demo\n", text)
        self.assertIn("python3 test_pizauth.py\n", text)


# ---- The whole, as its users run it ----


class CommandLineTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = (
            cls.enterClassContext(Daemon(account("x"))) if hasattr(cls, "enterClassContext")
            else None)
        if cls.daemon is None:
            cls.daemon = Daemon(account("x")).__enter__()
            cls.addClassCleanup(cls.daemon.__exit__)

    def run_in(self, directory, *arguments, **more):
        environment = {
            **self.daemon.environment, "XDG_RUNTIME_DIR": directory, "XDG_CONFIG_HOME": directory}
        return subprocess.run(
            [sys.executable, PROGRAM, *arguments], env={**environment, **more},
            capture_output=True, text=True, timeout=30)

    def fails(self, done, message):
        self.assertEqual(
            (done.returncode, done.stdout, done.stderr), (1, "", f"ERROR - {message}\n"))

    def test_show_prints_an_error_with_the_url_and_nothing_on_stdout(self):
        url = self.daemon.url("x")
        self.fails(
            self.daemon.run("show", "x"),
            f"Access token unavailable until authorised with URL {url}")
        for arguments in (("show", "-u", "x"), ("show", "x", "-u"), ("refresh", "x", "-u", "-v")):
            self.fails(
                self.daemon.run(*arguments), "Access token unavailable until authorised with URL")
        self.assertRegex(
            self.daemon.run("refresh", "x").stderr, "^ERROR - Access token .* URL http.*\n$")

    def test_an_unknown_account(self):
        self.fails(self.daemon.run("show", "nope"), "No account 'nope'")
        self.fails(self.daemon.run("show", "--", "-x"), "No account '-x'")
        self.fails(self.daemon.run("refresh", ""), "No account ''")

    def test_without_a_server_clients_say_so(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            for arguments in (
                ("show", "x"), ("show", "-u", "x"), ("refresh", "x"), ("status",), ("shutdown",),
            ):
                self.fails(
                    self.run_in(directory, *arguments),
                    "pizauth authenticator not running or not responding")

    def test_a_second_server_says_so_and_the_first_is_not_disturbed(self):
        self.fails(self.daemon.run("server"), "pizauth authenticator already running")
        self.fails(self.daemon.run("server", "-d"), "pizauth authenticator already running")
        self.assertEqual(self.daemon.run("status").returncode, 0)

    def test_the_originals_server_which_has_no_lock_is_seen(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX) as other:
            os.mkdir(f"{directory}/pizauth", 0o700)
            other.bind(f"{directory}/pizauth/pizauth.sock")
            other.listen()
            self.fails(self.run_in(directory, "server"), "pizauth authenticator already running")

    def test_configurations_that_cannot_be_used(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            path = f"{directory}/pizauth.conf"
            self.fails(self.run_in(directory, "server"), f"No config file found at {path}")
            self.fails(
                self.run_in(directory, "server", "-c", "/nope"), "No config file found at /nope")
            self.fails(
                self.run_in(directory, "server", "--config", "/"),
                "Cannot read the configuration /: Is a directory")
            with open(path, "w", encoding="ascii") as file:
                file.write("\nrefresh_rety = 5s;")
            self.fails(self.run_in(directory, "server", "-d"), (
                f"{path}: line 2, column 1: Unknown option 'refresh_rety': did you mean "
                "'refresh_retry'?\n    refresh_rety = 5s;\n    ^"
            ))
            self.assertEqual(os.listdir(f"{directory}/pizauth"), ["pizauth.lock"])

    def test_a_port_in_use_is_said_before_the_server_daemonises(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            with open(f"{directory}/pizauth.conf", "w", encoding="ascii") as file:
                file.write(account() + f'http_listen = "{address}";')
            self.fails(
                self.run_in(directory, "server"),
                f'Cannot listen on http_listen "{address}": Address already in use')

    def test_wrong_usage_prints_usage_on_stderr_and_exits_1(self):
        for arguments in (
            (), ("nonsense",), ("show",), ("show", "-z", "x"), ("show", "a", "b"), ("server", "x"),
            ("sho", "x"),
        ):
            done = self.daemon.run(*arguments)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertTrue(done.stderr.startswith("usage: pizauth"), done.stderr)

    def test_help_and_version_are_no_errors(self):
        for arguments in (
            ("-h",), ("--help",), ("show", "-h"), ("server", "--help"), ("--version",),
        ):
            done = self.daemon.run(*arguments)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn(
                pizauth.VERSION if "version" in arguments[0] else "usage: pizauth", done.stdout)

    def test_info(self):
        lines = self.daemon.run("info").stdout.split("\n")
        self.assertEqual(lines[0], f"pizauth.py version {pizauth.VERSION}:")
        self.assertIn(f"  cache directory: {self.daemon.directory}/pizauth", lines)
        self.assertIn(f"  config file: {self.daemon.config}", lines)
        port = json.loads(self.daemon.ask(b"info:"))["http_port"]
        self.assertEqual(
            lines[3:6], ["server running:", f"  HTTP port: {port}", "  HTTPS port: none"])
        about = json.loads(self.daemon.run("info", "-j", "-c", "/c").stdout)
        self.assertEqual(about, {
            "cache_directory": f"{self.daemon.directory}/pizauth", "config_file": "/c",
            "executed_as": PROGRAM, "info_format_version": 2, "pizauth_version": pizauth.VERSION,
            "server_running": True, "server_info": {"http_port": port, "https_port": "none"},
        })

    def test_info_needs_neither_server_nor_configuration(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            done = self.run_in(directory, "info")
            self.assertEqual(
                (done.returncode, done.stdout.split("\n")[3]), (0, "server not running"))
            about = json.loads(self.run_in(directory, "info", "-j").stdout)
            self.assertEqual((about["server_running"], "server_info" in about), (False, False))

    def test_nothing_is_written_to_a_closed_or_full_stdout(self):
        full = os.open("/dev/full", os.O_WRONLY)
        try:
            done = subprocess.run(
                [sys.executable, PROGRAM, "status"], env=self.daemon.environment, stdout=full,
                stderr=subprocess.PIPE, text=True)
        finally:
            os.close(full)
        self.assertEqual(
            (done.returncode, done.stderr),
            (1, "ERROR - Cannot write to standard output: No space left on device\n"))

    def test_a_plain_show_imports_nothing_dear(self):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", PROGRAM, "show", "x"],
            env=self.daemon.environment, capture_output=True, text=True)
        bare = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True)
        loaded, anyway = (
            set(re.findall(r"\| +(\S+)$", text.stderr, re.MULTILINE)) for text in (done, bare))
        loaded -= anyway
        self.assertIn("_socket", loaded)
        self.assertEqual(
            loaded & {
                "socket", "re", "argparse", "json", "typing", "enum", "subprocess", "selectors"},
            set())


class EndToEndTest(unittest.TestCase):
    """Real processes, a real provider, real time: few, and each polls to a limit."""

    def setUp(self):
        self.provider = Provider()
        self.addCleanup(self.provider.close)

    def start(self, text, *options, **more):
        daemon = Daemon(text, *options, **more)
        self.addCleanup(daemon.__exit__)
        daemon.start()
        return daemon

    def test_the_main_job(self):
        self.provider.expires_in = 4
        daemon = self.start(self.provider.account("work", "refresh_before_expiry = 1s;"))
        self.assertEqual(daemon.show(), "")
        status, page = daemon.visit()
        self.assertEqual(status, 200)
        self.assertIn("you can safely close this page", page)
        done = daemon.run("show", "work")
        first = done.stdout.strip()
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, f"{first}\n", ""))
        self.assertRegex(first, "^at-")
        second = until(lambda: (daemon.show() != first) and daemon.show(), 4)  # before it expires
        self.assertRegex(second, "^at-")
        self.provider.expires_in = 3600
        until(lambda: daemon.show() not in (first, second), 4)
        third = daemon.show()
        self.assertEqual(daemon.run("refresh", "work").returncode, 0)
        until(lambda: daemon.show() != third)
        self.assertNotIn(daemon.show(), (first, second, third, ""))
        done = daemon.run("status")
        self.assertRegex(done.stdout, r"^work: Active access token \(obtained .*; expires .*\)\n$")

    def test_it_ends_cleanly_and_leaves_nothing_behind(self):
        for end in (signal.SIGTERM, signal.SIGINT, "shutdown"):
            daemon = self.start(self.provider.account())
            self.assertTrue(until(
                lambda daemon=daemon: os.stat(daemon.socket).st_mode & 0o7777 == 0o1600))
            if end == "shutdown":
                self.assertEqual(daemon.run("shutdown").returncode, 0)
                self.assertFalse(os.path.exists(daemon.socket))
                daemon.process.wait(0.5)  # and so `pizauth shutdown && pizauth server` works
            else:
                daemon.process.send_signal(end)
            self.assertEqual(daemon.process.wait(3), 0)
            self.assertEqual(os.listdir(os.path.dirname(daemon.socket)), ["pizauth.lock"])
            self.assertEqual(daemon.logged(), "")

    def test_after_kill_9_it_starts_again(self):
        daemon = self.start(self.provider.account())
        daemon.process.kill()
        daemon.process.wait()
        self.assertTrue(os.path.exists(daemon.socket))
        daemon.start()
        self.assertEqual(until(lambda: daemon.run("status").returncode == 0), True)

    def test_it_daemonises_once_it_answers(self):
        daemon = Daemon(self.provider.account())
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        done = daemon.run("server", "-vvvv")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(daemon.run("status").stdout, "work: No access token\n")
        self.assertEqual(daemon.run("shutdown").returncode, 0)
        self.assertFalse(os.path.exists(daemon.socket))

    def test_nobody_who_is_slow_delays_anybody(self):
        silent_provider = self.provider.account("hung", fault="silent")
        daemon = self.start(self.provider.account() + silent_provider)
        for name in ("work", "hung"):
            daemon.visit(name)
        self.provider.broken = True
        daemon.ask(b"refresh:withurl hung")
        token, port = daemon.show(), int(json.loads(daemon.ask(b"info:"))["http_port"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(socket.socket(socket.AF_UNIX)).connect(daemon.socket)
            for _ in range(200):
                half = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                half.sendall(b"GET / HTTP/1.1\r\nHo")
            start = time.monotonic()
            for _ in range(50):
                self.assertEqual(
                    daemon.ask(b"showtoken:withurl work"), b"access_token:" + token.encode())
            self.assertLess(time.monotonic() - start, 1)
            self.assertEqual(visit(f"http://127.0.0.1:{port}/favicon.ico")[0], 404)
            start = time.monotonic()
            self.assertEqual(daemon.run("shutdown").returncode, 0)
            self.assertLess(time.monotonic() - start, 3)
            self.assertEqual(daemon.process.wait(3), 0)

    def test_no_fault_of_a_provider_costs_a_login_or_gets_the_secret(self):
        """All faults of FAULTS at once, so those ended by the 30 s limit take that long once."""
        accounts = {fault: self.provider.account(fault, fault=fault) for fault in FAULTS}
        daemon = self.start("".join(accounts.values()) + "refresh_retry = 1s;", "-vvvv")
        tokens = {}
        for fault in FAULTS:
            daemon.visit(fault)
            tokens[fault] = daemon.ask(f"showtoken:withurl {fault}".encode())
            self.assertRegex(tokens[fault], b"^access_token:at-")
        secrets_told = self.secrets(tokens)
        self.provider.broken = True
        for fault in FAULTS:
            daemon.ask(f"refresh:withurl {fault}".encode())
        start = time.monotonic()

        def failed():
            lines = daemon.ask(b"status:").decode()[3:].split("\n")
            return {line.split(":")[0] for line in lines if "; last error at" in line}

        until(lambda: failed() == set(FAULTS), 45)
        self.assertEqual(failed(), set(FAULTS))
        self.assertLess(time.monotonic() - start, 40)
        for fault in FAULTS:
            self.assertEqual(daemon.ask(f"showtoken:withurl {fault}".encode()), tokens[fault])
        self.assertEqual(self.provider.stray, [])
        status = daemon.ask(b"status:").decode()
        self.provider.broken = False
        for fault in set(FAULTS) - set(SLOW_FAULTS):
            daemon.ask(f"refresh:withurl {fault}".encode())
            until(lambda fault=fault: (
                daemon.ask(f"showtoken:withurl {fault}".encode()) != tokens[fault]))
            self.assertNotEqual(
                daemon.ask(f"showtoken:withurl {fault}".encode()), tokens[fault], fault)
        for place in (
            daemon.logged(), status, daemon.run("info", "-j").stdout, daemon.run("info").stdout,
            process_list(),
        ):
            for secret in secrets_told:
                self.assertNotIn(secret, place)
        self.assertIn("cannot use", status)
        self.assertNotIn("\x1b", daemon.logged() + status)

    def secrets(self, tokens):
        """What must never be told: tokens, codes, verifiers and the client secret."""
        told = {"hush-hush", *(token.decode().partition(":")[2] for token in tokens.values())}
        for form in self.provider.posts:
            told |= {
                value for name, value in form.items()
                if name in ("code", "code_verifier", "refresh_token")}
        return told | self.provider.refresh_tokens

    def test_an_outage_of_the_provider_is_survived(self):
        daemon = self.start(self.provider.account("work", "refresh_retry = 1s;"))
        daemon.visit()
        token = daemon.show()
        port = self.provider.server.server_port
        self.provider.close()
        daemon.run("refresh", "work")
        until(lambda: "last error" in daemon.run("status").stdout)
        self.assertIn(f"no answer from 127.0.0.1:{port}: ", daemon.run("status").stdout)
        self.assertEqual(daemon.show(), token)

    def test_a_code_used_twice_a_wrong_verifier_and_a_wrong_redirect_uri_are_refused(self):
        """That the stand-in is strict, or the tests above would show little."""
        query = {
            "response_type": "code", "code_challenge_method": "S256", "client_id": "the-client",
            "state": "s", "redirect_uri": "http://localhost:1/",
            "code_challenge": pizauth.code_challenge("v"),
        }
        form = {
            "client_id": "the-client", "client_secret": "hush-hush",
            "grant_type": "authorization_code",
        }
        for verifier, redirect_uri, status in (
            ("v", "http://localhost:1/", 200), ("w", "http://localhost:1/", 400), ("v", "x", 400),
        ):
            code = query_of(self.provider.authorize(query))["code"]
            sent = {**form, "code": code, "code_verifier": verifier, "redirect_uri": redirect_uri}
            self.assertEqual(self.provider.token(sent)[0], status)
            self.assertEqual(self.provider.token(sent)[0], 400)
        self.assertIsNone(self.provider.authorize({**query, "code_challenge_method": "plain"}))

    @unittest.skipUnless(
        os.path.exists("/proc/self/status"), "there is no /proc to read the memory from")
    def test_a_token_request_stays_small(self):
        self.provider.broken = True
        script = (
            "import sys, pizauth; pizauth.server_imports(); "
            "pizauth.post_form(sys.argv[1], {'grant_type': 'refresh_token'});"
            "print(next(line for line in open('/proc/self/status') "
            "if line.startswith('VmHWM')).split()[1])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, f"{self.provider.url}/token?fault=huge"], cwd=HERE,
            capture_output=True, text=True, check=True)
        self.assertLess(int(done.stdout), 60_000)


def process_list():
    """The command lines and environments of all processes that we may see."""
    text = ""
    for pid in filter(str.isdigit, os.listdir("/proc")) if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError), \
                open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
            text += file.read()
    return text


# ---- An authorization server made by others ----

AUTHLIB_CLIENT = {"client_id": "mail", "client_secret": "a+b/c %&="}


def authlib_provider(expires_in):
    """Start an authorization server on loopback, in memory, with one client and one user, who
    approves at once. It demands PKCE and rotates refresh tokens. `url` is its base, `requests` the
    grant types seen at /token, `issued` the tokens given, in their order; close() ends it."""
    import flask
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from authlib.oauth2.rfc6749 import InvalidRequestError, grants
    from authlib.oauth2.rfc7636 import CodeChallenge

    codes, issued, requests = {}, [], []
    client = types.SimpleNamespace(
        check_client_secret=lambda secret: secret == AUTHLIB_CLIENT["client_secret"],
        check_endpoint_auth_method=lambda method, endpoint: method == "client_secret_post",
        check_grant_type=lambda name: True,
        check_redirect_uri=lambda uri: urllib.parse.urlsplit(uri).hostname == "localhost",
        check_response_type=lambda name: name == "code",
        get_allowed_scope=lambda scope: scope,
    )

    def credential(**fields):
        """What Authlib wants a code or a refresh token to be."""
        return types.SimpleNamespace(
            check_client=lambda other: other is client,
            get_redirect_uri=lambda: fields["redirect_uri"],
            get_scope=lambda: fields["scope"],
            **fields,
        )

    class CodeGrant(grants.AuthorizationCodeGrant):
        TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_post"]

        def save_authorization_code(self, code, request):
            names = ("redirect_uri", "scope", "code_challenge", "code_challenge_method")
            sent = {name: flask.request.args[name] for name in names}
            codes[code] = credential(code=code, **sent)

        def query_authorization_code(self, code, client):
            return codes.get(code)

        def delete_authorization_code(self, authorization_code):
            del codes[authorization_code.code]

        def authenticate_user(self, authorization_code):
            return "the user"

    class RefreshGrant(grants.RefreshTokenGrant):
        TOKEN_ENDPOINT_AUTH_METHODS = ["client_secret_post"]
        INCLUDE_NEW_REFRESH_TOKEN = True

        def authenticate_refresh_token(self, refresh_token):
            valid = (token for token in issued if not token.revoked)
            return next((token for token in valid if token.refresh_token == refresh_token), None)

        def authenticate_user(self, refresh_token):
            return "the user"

        def revoke_old_credential(self, refresh_token):
            refresh_token.revoked = True

    class RequiredS256(CodeChallenge):
        def validate_code_challenge(self, grant, redirect_uri):
            if flask.request.args.get("code_challenge_method") != "S256":  # would be optional
                raise InvalidRequestError("PKCE with S256 is required")
            super().validate_code_challenge(grant, redirect_uri)

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    app = flask.Flask("provider")
    lives = {"authorization_code": expires_in, "refresh_token": expires_in}
    app.config.update(OAUTH2_REFRESH_TOKEN_GENERATOR=True, OAUTH2_TOKEN_EXPIRES_IN=lives)
    provider = AuthorizationServer(
        app,
        query_client={AUTHLIB_CLIENT["client_id"]: client}.get,
        save_token=lambda token, request: issued.append(credential(revoked=False, **token)),
    )
    provider.register_grant(CodeGrant, [RequiredS256()])
    provider.register_grant(RefreshGrant)

    @app.route("/authorize")
    def authorize():
        grant = provider.get_consent_grant(end_user="the user")
        return provider.create_authorization_response(grant_user="the user", grant=grant)

    @app.route("/token", methods=["POST"])
    def token():
        requests.append(flask.request.form["grant_type"])
        return provider.create_token_response()

    def close():
        server.shutdown()
        thread.join()
        server.server_close()
        del os.environ["AUTHLIB_INSECURE_TRANSPORT"]

    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"  # or Authlib would refuse plain HTTP
    server = make_server("127.0.0.1", 0, app, handler_class=Quiet)
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    return types.SimpleNamespace(url=url, requests=requests, issued=issued, close=close)


@unittest.skipUnless(
    importlib.util.find_spec("authlib") and importlib.util.find_spec("flask"),
    "Authlib and Flask are not installed",
)
class AuthlibTest(unittest.TestCase):
    """The whole of pizauth, as people run it, against a provider that its authors did not write."""

    def setUp(self):
        self.provider = authlib_provider(expires_in=3600)
        self.addCleanup(self.provider.close)

    def test_from_authorization_to_rotated_refresh_tokens(self):
        text = f"""account "work" {{
            auth_uri = "{self.provider.url}/authorize";
            token_uri = "{self.provider.url}/token";
            client_id = "{AUTHLIB_CLIENT["client_id"]}";
            client_secret = "{AUTHLIB_CLIENT["client_secret"]}";
            scopes = ["mail", "offline_access"];
        }}"""
        with Daemon(text) as daemon:
            pending = daemon.run("show", "work")
            self.assertEqual((pending.returncode, pending.stdout), (1, ""))
            self.assertIn("is authorised", visit(pending.stderr.split()[-1])[1])
            tokens = [daemon.show()]
            for _ in range(3):
                self.assertEqual(daemon.run("refresh", "work").returncode, 0)
                until(lambda: daemon.show() not in ("", *tokens))
                tokens.append(daemon.show())
            self.assertEqual(daemon.run("shutdown").returncode, 0)
            self.assertEqual(daemon.process.wait(3), 0)
        issued = self.provider.issued
        self.assertEqual(tokens, [token.access_token for token in issued])
        self.assertEqual(len({token.refresh_token for token in issued}), 4)
        self.assertEqual([token.revoked for token in issued], [True, True, True, False])
        self.assertEqual(self.provider.requests, ["authorization_code"] + ["refresh_token"] * 3)

    def test_that_provider_refuses_a_refresh_token_used_before(self):
        self.test_from_authorization_to_rotated_refresh_tokens()
        used = self.provider.issued[0].refresh_token
        form = {**AUTHLIB_CLIENT, "grant_type": "refresh_token", "refresh_token": used}
        outcome = pizauth.post_form(self.provider.url + "/token", form)
        with self.assertRaisesRegex(pizauth.PermanentError, "^HTTP 400: invalid_grant"):
            pizauth.token_response(outcome, form)


# ---- Demonstration ----


class Demo:
    """The main job before the reader's eyes: each command as typed, and what it printed."""

    def __init__(self, provider):
        self.provider = provider
        self.daemon = Daemon(
            provider.account("work", "refresh_before_expiry = 3s; refresh_retry = 1s;"))
        os.mkdir(os.path.join(self.daemon.directory, "bin"))
        os.symlink(PROGRAM, os.path.join(self.daemon.directory, "bin", "pizauth"))

    def say(self, text):
        print(f"\n# {text}", flush=True)

    def type(self, *arguments):
        """Run a command as typed, print what it prints, and return that."""
        print(f"$ pizauth {' '.join(arguments)}", flush=True)
        done = self.daemon.run(*arguments)
        print(done.stdout + done.stderr, end="")
        print(
            f"(exit status {done.returncode})" if done.returncode else "",
            end="\n" if done.returncode else "", flush=True)
        return done.stdout.strip()

    def run(self):
        """The walk; true if everything was as it should be."""
        self.provider.expires_in = 6
        self.say("A configuration for a provider that this demonstration has started on loopback:")
        with open(self.daemon.config, encoding="utf-8") as file:
            print("$ cat ~/.config/pizauth.conf\n" + file.read(), end="")
        self.say(
            "The server starts (at login, in real life; without -d it goes into the background):")
        print("$ pizauth server -d &")
        self.daemon.start()
        self.say(
            "There is no token yet: the error on stderr has the URL to visit, stdout stays empty.")
        self.type("show", "work")
        self.say(
            "A browser visits the URL, the person approves, and the provider sends it back to "
            "pizauth:")
        status, page = self.daemon.visit()
        print(f"HTTP {status}: {re.search('<p>(.*)</p>', page)[1]}")
        self.say("Now mail programs get the access token, and nothing else:")
        first = self.type("show", "work")
        self.type("status")
        self.say("The token lives 6 s. After 3 s, before it expires, pizauth replaces it:")
        until(lambda: self.daemon.show() != first, 8)
        second = self.type("show", "work")
        self.say(
            "The provider goes down. Asked to refresh, pizauth fails, says so, and keeps both "
            "token and login:")
        self.provider.expires_in = 3600
        until(lambda: self.daemon.show() != second, 8)
        held = self.daemon.show()
        port = self.provider.server.server_port
        self.provider.close()
        self.type("refresh", "work")
        until(lambda: "last error" in self.daemon.run("status").stdout, 5)
        self.type("status")
        self.type("show", "work")
        self.say(
            "The provider is back, and pizauth, which has been trying again, refreshes by itself:")
        self.provider.open(port)
        until(lambda: self.daemon.show() != held, 8)
        last = self.type("show", "work")
        return first and len({first, second, held, last}) == 4

    def stay(self):
        """Leave everything running for a person to type along."""
        environment = self.daemon.environment
        self.say(
            "All stays running. In another terminal, with these, type along (Ctrl-C here ends it):")
        print(
            f"export XDG_RUNTIME_DIR={environment['XDG_RUNTIME_DIR']} "
            f"XDG_CONFIG_HOME={environment['XDG_CONFIG_HOME']}")
        print(f'PATH={self.daemon.directory}/bin:"$PATH"\npizauth status', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while self.daemon.process.poll() is None:
                time.sleep(0.2)

    def end(self):
        if self.daemon.process and self.daemon.process.poll() is None:
            self.say("And the end, which takes the tokens with it:")
            self.type("shutdown")
        self.daemon.__exit__()
        self.provider.close()


def demonstrate(stay):
    """Run the demonstration; the exit status."""
    demo = Demo(Provider())
    fine = False
    try:
        fine = demo.run()
        if stay:
            demo.stay()
    finally:
        demo.end()
    print(
        "\n# That was the whole main job." if fine
        else "\n# Something went wrong: the lines above tell what.")
    return 0 if fine else 1


def load_tests(loader, tests, pattern):
    """The test classes in the order in which they stand here."""
    classes = [
        value for value in globals().values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    return unittest.TestSuite(map(loader.loadTestsFromTestCase, classes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        raise SystemExit(demonstrate("--stay" in sys.argv[2:]))
    unittest.main()
