#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Tests of pizauth.py, in the order of its sections; a demonstration; and benchmarks.

    python3 test_pizauth.py                 the tests (unittest's options and names may follow)
    python3 test_pizauth.py demo [--stay]   the main job before your eyes, with its own provider
    python3 test_pizauth.py day             a day of a user's, with real programs, checked all along
    python3 test_pizauth.py soak SECONDS    random histories, held against a model of the rules
    python3 test_pizauth.py fuzz SECONDS    mutations of good input, so long for each parser
    python3 test_pizauth.py bench [NAME]    what things cost, beside yardsticks of the same run,
                                            and what they are to cost at most ("reach")

Up to FuzzTest nothing is run but pure functions and the Authenticator, by a clock that only tests
move. The tests of the loop and its parts use socket pairs and real children; those of the command
line, and all below them, run the program itself, and poll for what they wait for.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import gzip
import hashlib
import hmac
import http.server
import html
import importlib.util
import io
import itertools
import json
import marshal
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import unittest
import unittest.mock
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from functools import partial
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pizauth

pizauth.server_imports()

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "pizauth.py")
CACHED = [  # runs it by its cached bytecode, as its header does, but by the Python that tests it
    sys.executable, "-c", "import sys; from importlib.machinery import SourceFileLoader as Loader\n"
    "del sys.argv[0]; exec(Loader('__main__', sys.argv[0]).get_code('__main__'))", PROGRAM]
GOOD = 'auth_uri = "http://a.example"; token_uri = "http://t.example/token"; client_id = "cid";'
ENDED = ("The login is too old, used up or revoked: log in again; if that fails at once, compare"
         " redirect_uri with the one in the console")
DENIED = ("You or an admin said no: approve the login; at Google, first add yourself to the test"
          " users, or publish the client (Audience, in the console)")
TRACE = (" Trace ID: 5f7d76c6-ec57-4833-9d29-6087922e2300 Correlation ID:"
         " 1f207b54-f311-4781-88d1-5a0f0cea3de5 Timestamp: 2025-02-26 16:02:16Z")


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

    def __init__(self, kind, uri, form, authorization, then):
        self.kind, self.uri, self.form, self.then = kind, uri, dict(form), then
        self.authorization = authorization
        self.cancelled = False

    def cancel(self):
        self.cancelled = True

    def answer(self, status=200, body=None, retry_after=0, whole=True, location="", **fields):
        """Have the token endpoint answer with these bytes or JSON fields."""
        data = json.dumps(fields).encode() if body is None else body
        self.then(pizauth.outcome_bytes(status, retry_after, whole, data, location))

    def grant(self, access_token="at1", refresh_token="rt1", expires_in=3600, **fields):
        """Have it give tokens."""
        tokens = {
            "access_token": access_token, "refresh_token": refresh_token, "expires_in": expires_in}
        self.answer(**{"token_type": "Bearer", **tokens, **fields})

    def fail(self, reason="connection refused"):
        self.answer(0, reason.encode())


class Command:
    """A shell command that was asked for: the test decides how it ends."""

    def __init__(self, command, variables, limit, then, capture):
        self.command, self.variables, self.limit = command, variables, limit
        self.capture = capture
        self.then, self.cancelled = then, False

    def cancel(self):
        self.cancelled = True

    def end(self, status=0, output=b""):
        self.then(status, output)


def answered(peer, respond, request, answer):
    """Have a request answered, as an Exchange does."""
    try:
        respond(request, answer)
    except pizauth.PizauthError as error:
        answer(pizauth.error_reply(error, peer))


class World:
    """An Authenticator among recorded requests, by a clock of the test's."""

    def __init__(self, text=None, port=8080):
        self.clock, self.posts, self.commands, self.logged = Clock(), [], [], []
        self.auth = pizauth.Authenticator(
            config(text), self.clock, self.post, self.run, self.log)
        self.auth.ports["http"] = [port]

    def post(self, *arguments):
        self.posts.append(Post(*arguments))
        return self.posts[-1].cancel

    def run(self, *arguments):
        self.commands.append(Command(*arguments))
        return self.commands[-1].cancel

    def log(self, level, message):
        self.logged.append((level, message))

    def ask(self, request):
        """The reply to a control request; None if there is none yet."""
        replies = self.park(request)
        assert len(replies) <= 1
        return replies[0] if replies else None

    def show(self, name="x"):
        return self.ask(f"showtoken:withurl {name}")

    def refresh(self, name="x"):
        return self.ask(f"refresh:withurl {name}")

    def visit(self, target, scheme="http", host="localhost:8080"):
        """What a browser gets that asks for this target: a list that fills when it is answered."""
        pages = []
        answered("browser", lambda *asked: self.auth.redirected(scheme, *asked), (target, host),
                 pages.append)
        return pages

    def approve(self, name="x", code="c0de"):
        """Have the person visit the URL that `show` gives, and the provider approve."""
        return self.visit(f"/?state={self.state(name)}&code={code}")

    def park(self, request):
        """Send a control request that is answered later: a list that fills with its reply."""
        replies = []
        answered("control", self.auth.control, request.encode(),
                 lambda reply: replies.append(reply.decode()))
        return replies

    def approve_at(self, target, name="x"):
        """Have the browser return to a target that has a query."""
        return self.visit(f"{target}&state={self.state(name)}&code=c0de")

    def state(self, name="x"):
        return query_of(self.show(name).partition(":")[2])["state"]

    def authorise(self, name="x", **grant):
        """Go from Empty to Active."""
        self.approve(name)
        self.posts.pop().grant(**grant)

    def wait(self, seconds):
        """Let time pass as the loop does: from deadline to deadline."""
        end = self.clock.moment + seconds
        while (due := self.auth.deadline()) <= end:
            self.clock.moment = max(due, self.clock.moment)
            self.auth.run_due()
        self.clock.moment = end
        self.auth.run_due()

    def status(self):
        return self.ask("status:")

    def dump(self):
        replies = []
        self.auth.control(b"dump:", replies.append)
        return replies[0]

    def restore(self, dump):
        replies = []
        answered("control", self.auth.control, b"restore:" + dump, replies.append)
        return replies[0].decode()

    def sealed(self):
        """A dump of this configuration in which account x has tokens; it has none before."""
        token = pizauth.Active(access_token="at1", refresh_token="rt1", expires_at=4600,
                               obtained_at=self.clock.now())
        self.auth._replace("x", token, None)
        return self.dump()

    def reload(self, text, port=8080):
        self.auth.reconfigure(config(text), {"http": [port], "https": []})

    @staticmethod
    def authorised(**grant):
        """A world whose account x has tokens."""
        world = World()
        world.authorise(**grant)
        return world


def query_of(url):
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query))


def token_response(outcome, form):
    """The tokens in an outcome of the token endpoint."""
    return pizauth.judged(outcome, form, pizauth.good_answer)


@contextlib.contextmanager
def transient_error(test, said="", refused=False):
    """Expect a TokenError with this text that is worth retrying."""
    with test.assertRaisesRegex(pizauth.TokenError, said) as caught:
        yield caught
    test.assertEqual(caught.exception.cause == "refused", refused)


def refusal(test, said=""):
    """Expect the TokenError of a provider that refuses."""
    return transient_error(test, said, True)


def secure(text):
    """A configuration with https: for http:."""
    return text.replace("http:", "https:")


def text_of(page):
    """Status and paragraph of a page."""
    head, _, body = page.decode().partition("\r\n\r\n")
    return int(head.split()[1]), re.search("<p>(.*?)</p>", body)[1]


# ---- An authorization server on loopback ----


class Provider:
    """Strict about PKCE, redirect URIs, clients and codes used twice. A `fault` in the token URI's
    query, a key of FAULTS, makes the token endpoint fail that way at every refresh while `broken`
    is set."""

    handler = None  # instead of ProviderHandler

    def __init__(self, expires_in=3600):
        self.expires_in, self.broken = expires_in, False
        self.codes, self.refresh_tokens, self.posts, self.stray = {}, set(), [], []
        self.slow = False  # is a slow answer on its way?
        self.open(0)

    def open(self, port):
        """Serve on this port, again after close()."""
        self.closing = threading.Event()
        self.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", port), self.handler or ProviderHandler)
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


    def leaked(self):
        """Tokens that come in an answer which cannot be used."""
        tokens = {"access_token": "at-leaked", "refresh_token": "rt-leaked"}
        self.refresh_tokens.add(tokens["refresh_token"])
        return tokens


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
        if fault == ["silent-code"] or (
                provider.broken and form.get("grant_type") == "refresh_token" and fault):
            return FAULTS[fault[0]][1](self, form)
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

    def wrapped(self, form, coding="", pack=bytes, interim=(), more=b""):
        """Answer well, in an odd wrapping: a Content-Encoding, interim answers, a field more."""
        status, answer = self.server.provider.token(form)
        for line in interim:
            self.wfile.write(f"HTTP/1.1 {line}\r\nLink: </x>; rel=preload\r\n\r\n".encode())
        body = json.dumps(answer).encode()[:-1] + more + b"}"
        self.reply(status, pack(body), [("Content-Encoding", coding)] if coding else [])

    def slow(self, form, seconds):
        """Answer well, but late."""
        self.server.provider.slow = True
        self.server.provider.closing.wait(seconds)
        self.reply(*self.server.provider.token(form))

    def redirect(self, status):
        """Redirect to another address of this server."""
        self.reply(status, {}, [("Location", f"{self.server.provider.url}/elsewhere")])

    def reset(self):
        """End the connection with an RST."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


PORTAL = b"<html><form action=/login><input name=room></form></html>"
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
# What a token endpoint may do, and what becomes of a refresh: it fails (at once, or only at its
# limit), it succeeds in the end, or the test itself looks at the outcome.
FAILS, FAILS_LATE, SUCCEEDS, LOOKED_AT = "fails", "fails late", "succeeds", "looked at"
WRAPPED = "succeeds at once, in an odd wrapping"
CHUNKED = OK_HEAD + b"Transfer-Encoding: chunked\r\n"
FAULTS = {
    "503": (FAILS, lambda handler, form: handler.reply(503, {"error": "invalid_grant"})),
    "429": (FAILS, lambda handler, form: handler.reply(429, {}, [("Retry-After", "5")])),
    "after": (FAILS, lambda handler, form: handler.reply(
        503, {}, [("Retry-After", "129 Oct , M5 1:2:3:4 -")])),
    "404": (FAILS, lambda handler, form: handler.reply(404, b"not here", kind="text/plain")),
    "portal": (FAILS, lambda handler, form: handler.reply(200, PORTAL, kind="text/html")),
    "json": (FAILS, lambda handler, form: handler.reply(200, b'{"access_token": "half')),
    "empty": (FAILS, lambda handler, form: handler.reply(200, {})),
    "302": (FAILS, lambda handler, form: handler.redirect(302)),
    "303": (FAILS, lambda handler, form: handler.redirect(303)),
    "redirect": (FAILS, lambda handler, form: handler.redirect(307)),
    "location": (FAILS, lambda handler, form: handler.reply(
        302, {}, [("Location", "http://[::1")])),
    "echo": (FAILS, lambda handler, form: handler.reply(502, {
        "error": "server_error",
        "error_description": "\x1b[2Jcannot use " + " ".join(form.values())})),
    "reset": (FAILS, lambda handler, form: handler.reset()),
    "no-head": (FAILS, lambda handler, form: handler.raw(
        json.dumps(handler.server.provider.leaked()).encode() + b"\r\n\r\n")),
    "bad-status": (FAILS, lambda handler, form: handler.raw(
        b"HTTP/1.1 " + json.dumps(handler.server.provider.leaked()).encode() + b"\r\n\r\n")),
    "chunk-size": (FAILS, lambda handler, form: handler.raw(
        CHUNKED + b"\r\n" + handler.server.provider.leaked()["access_token"].encode())),
    "garbage": (FAILS, lambda handler, form: handler.raw(b"\x16\x03\x01 nonsense\r\n\r\n")),
    "short": (FAILS, lambda handler, form: handler.raw(
        OK_HEAD, b'Content-Length: 900\r\n\r\n{"access_token": "cut"}')),
    "cut-chunk": (FAILS, lambda handler, form: handler.raw(
        CHUNKED, b'\r\n20\r\n{"access_token": "cut"}')),
    "huge": (FAILS, lambda handler, form: handler.raw(OK_HEAD + b"\r\n", *[b" " * (1 << 20)] * 64)),
    "endless": (FAILS, lambda handler, form: handler.raw(
        CHUNKED + b"\r\n-1\r\n", *[b" " * (1 << 20)] * 400)),
    "drip": (FAILS_LATE, lambda handler, form: handler.raw(
        OK_HEAD + b"Content-Length: 9000\r\n\r\n", *[b" "] * 9000, pause=0.2)),
    "silent": (FAILS_LATE, lambda handler, form: handler.server.provider.closing.wait(60)),
    "slow": (SUCCEEDS, lambda handler, form: handler.slow(form, 0.5)),
    "late": (SUCCEEDS, lambda handler, form: handler.slow(form, 1.5)),
    "silent-code": (SUCCEEDS, lambda handler, form: handler.slow(form, 60)),
    "gzip": (WRAPPED, lambda handler, form: handler.wrapped(form, "gzip", gzip.compress)),
    "x-gzip": (WRAPPED, lambda handler, form: handler.wrapped(form, "X-GZip", gzip.compress)),
    "deflate": (WRAPPED, lambda handler, form: handler.wrapped(form, "deflate", zlib.compress)),
    "raw-deflate": (WRAPPED, lambda handler, form: handler.wrapped(
        form, "deflate", lambda body: zlib.compress(body)[2:-4])),
    "103": (WRAPPED, lambda handler, form: handler.wrapped(form, interim=("103 Early Hints",))),
    "1xx": (WRAPPED, lambda handler, form: handler.wrapped(
        form, interim=("100 Continue", "102 Processing", "103 Early Hints", "199 Odd"))),
    "latin-1": (WRAPPED, lambda handler, form: handler.wrapped(form, more=b', "n": "Jos\xe9"')),
    "cp1252": (WRAPPED, lambda handler, form: handler.wrapped(form, more=b', "\x80": "\x93"')),
    "headers": (LOOKED_AT, lambda handler, form: handler.reply(200, dict(handler.headers))),
    "chunked": (LOOKED_AT, lambda handler, form: handler.raw(
        CHUNKED + b"Content-Length: 900\r\n\r\n2\r\n{}\r\n0\r\n\r\n")),
    "until-eof": (LOOKED_AT, lambda handler, form: handler.raw(OK_HEAD + b"\r\n{}")),
    "twice": (LOOKED_AT, lambda handler, form: handler.raw(
        OK_HEAD + b"Content-Length: 2, 2\r\n\r\n{}")),
}


def faults(*outcomes):
    """The names of the faults with these outcomes."""
    return {name for name, (outcome, _) in FAULTS.items() if outcome in outcomes}


# ---- A real server, and its clients ----


def ask_at(path, request, timeout=10):
    """The reply of the server of a Unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


class Daemon:
    """pizauth.py in a temporary directory of its own, its home and its runtime directory. With a
    `prelude`, Python that may change `pizauth`, its server is run by that; with a `program`, server
    and clients are run by this command."""

    def __init__(self, text, *options, environment=(), prelude="", program=(), cwd=None):
        self.directory = tempfile.mkdtemp(prefix="piz")
        self.config = os.path.join(self.directory, "pizauth.conf")
        self.log = os.path.join(self.directory, "log")
        kept = {
            name: value for name, value in os.environ.items()
            if not name.endswith(("_proxy", "_PROXY"))}
        places = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"), self.directory)
        self.environment = {**kept, **places, **dict(environment)}
        self.options, self.process, self.cwd = options, None, cwd
        self.client = list(program) or CACHED
        self.program = self.client if not prelude else [
            sys.executable, "-c", f"import sys; sys.path.insert(0, {HERE!r}); import pizauth\n"
            f"{prelude}\nraise SystemExit(pizauth.main(sys.argv[1:]))"]
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(self.config, 0o600)

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
                [*self.program, "server", "-d", *self.options], cwd=self.cwd,
                env=self.environment, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        until(lambda: self.process.poll() is not None or self.answers())
        assert self.process.poll() is None, self.logged()

    def answers(self):
        with contextlib.suppress(OSError):
            return bool(self.ask(b"info:"))

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
            [*self.client, *arguments], env=self.environment, capture_output=True, text=True,
            timeout=60, cwd=self.cwd)

    def show(self, name="work"):
        """The access token; empty if there is none."""
        return self.run("show", name).stdout.strip()

    def ask(self, request, timeout=10):
        """The reply to a request, without the cost of a process."""
        return ask_at(self.socket, request, timeout)

    def url(self, name="work"):
        """The URL that `show` asks a person to visit."""
        return self.ask(f"showtoken:withurl {name}".encode()).decode().partition(":")[2]

    def visit(self, name="work"):
        """Visit that URL as a browser would, by way of the provider; the page in the end."""
        return visit(self.url(name))

    def descriptors(self):
        """How many the server has open, where that can be known."""
        with contextlib.suppress(FileNotFoundError):
            return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def children(self):
        """The numbers of its children."""
        if not os.path.isdir("/proc/self"):
            listed = subprocess.run(["ps", "-axo", "pid=,ppid="], stdout=subprocess.PIPE, text=True)
            pairs = [line.split() for line in listed.stdout.splitlines()]
            return [int(pid) for pid, parent in pairs if parent == str(self.process.pid)]
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == self.process.pid:
                    found.append(int(pid))
        return found

    def processor_time(self):
        """What it has used, in seconds; 0 where that cannot be known."""
        with contextlib.suppress(FileNotFoundError), open(f"/proc/{self.process.pid}/stat") as file:
            return sum(map(int, file.read().split()[13:15])) / os.sysconf("SC_CLK_TCK")
        return 0.0

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

    def test_every_option_is_read_as_written(self):
        got = config(
            'auth_notify_cmd = "a \\"b\\" \\\\"; auth_notify_interval = 1m; error_notify_cmd = "e";'
            'http_listen = "127.0.0.1:80"; https_listen = "[::1]:0"; refresh_at_least = 2h; '
            'refresh_before_expiry = 3s;refresh_retry = 4d; startup_cmd = "s"; '
            'token_event_cmd = "t\nu"; transient_error_if_cmd = "i"; // note\n'
            'https_cert = "/c"; https_key = "k";'
            'account "wörk \\"1\\"" { auth_uri = "HTTP://A.example/x?y=z"; '
            'token_uri = "https://t"; client_id = "c";client_secret = "s"; '
            'auth_uri_fields = {"k": "1", "k": "2"}; scopes = ["b", "a"]; login_hint = "h";'
            'redirect_uri = "http://localhost:99/p"; refresh_at_least = 5s; '
            'refresh_before_expiry = 6s; refresh_retry = 7s; device_auth_uri = "https://d";'
            'client_auth = "basic"; revoke_uri = "https://r"; token_uri_fields = {"f": "1"};'
            'issuer = "https://i"; expect_user = "me@x"; }'
            'account "y" { auth_uri = "https://a"; token_uri = "https://t"; client_id = "c";'
            'client_secret_cmd = "pass show x"; }'
        )
        self.assertEqual(vars(got) | {"accounts": None}, {
            "accounts": None, "auth_notify_cmd": 'a "b" \\', "auth_notify_interval": 60,
            "error_notify_cmd": "e", "http_listen": (("127.0.0.1", 80),),
            "https_listen": (("::1", 0),), "refresh_at_least": 7200, "refresh_before_expiry": 3,
            "refresh_retry": 345600, "startup_cmd": "s", "token_event_cmd": "t\nu",
            "transient_error_if_cmd": "i", "https_cert": "/c", "https_key": "k",
        })
        self.assertEqual(vars(got.accounts['wörk "1"']), {
            "name": 'wörk "1"', "auth_uri": "HTTP://A.example/x?y=z",
            "auth_uri_fields": (("k", "1"), ("k", "2")), "client_id": "c", "client_secret": "s",
            "redirect_uri": "http://localhost:99/p", "scopes": ("b", "a"), "token_uri": "https://t",
            "device_auth_uri": "https://d", "login_hint": "h", "refresh_at_least": 5,
            "client_auth": "basic", "client_secret_cmd": None, "revoke_uri": "https://r",
            "token_uri_fields": (("f", "1"),), "issuer": "https://i", "expect_user": "me@x",
            "refresh_before_expiry": 6,
            "refresh_retry": 7,
        })

    def test_defaults(self):
        got = config()
        times = (
            got.auth_notify_interval, got.refresh_at_least, got.refresh_before_expiry,
            got.refresh_retry)
        self.assertEqual(times, (900, 5400, 90, 40))
        both = (("127.0.0.1", 0), ("::1", 0))
        self.assertEqual((got.addresses("http"), got.addresses("https")), ([both], []))
        secure = config(account() + account("y", 'redirect_uri = "HTTPS://localhost/";'))
        self.assertEqual((secure.addresses("http"), secure.addresses("https")), ([both], [both]))
        self.assertEqual(got.accounts["x"].redirect_uri, "http://localhost/")
        self.assertEqual(
            (got.auth_notify_cmd, got.accounts["x"].client_secret, got.accounts["x"].scopes),
            (None, None, ()))

    def test_every_option_has_a_reader_and_a_known_layout_in_dumps(self):
        for block in (pizauth.Config, pizauth.Account):
            for name, declared in block.options().items():
                with self.subTest(option=name):
                    self.assertTrue(callable(getattr(pizauth.Parser, declared.read)))
                    self.assertIn(declared.dump, ("", "extension", *pizauth.LAYOUTS))

    def test_every_field_that_pizauth_sends_itself_is_reserved(self):
        one = config(account("x", 'scopes = ["a"];')).accounts["x"]
        sent = query_of(pizauth.authorization_request(one, "s", "v", "http://localhost/"))
        self.assertEqual(set(sent), set(pizauth.RESERVED_KEYS["auth_uri_fields"]))

    def test_times_of_an_account_override_the_global_ones_wherever_they_stand(self):
        got = config(
            account("x", "refresh_retry = 1s;") + account("y")
            + "refresh_retry = 2m; refresh_at_least = 1h;")
        self.assertEqual([a.refresh_retry for a in got.accounts.values()], [1, 120])
        self.assertEqual([a.refresh_at_least for a in got.accounts.values()], [3600, 3600])

    def test_samples_of_what_the_original_accepts_and_refuses(self):
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

    def test_every_row_of_the_corpus_gets_the_originals_verdict(self):
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
                    line = line.replace('client_secret = "d"', 'client_secret = "***"')
                    line = line.replace("me:pw@", "me:***@")
                    margin = "    " + re.sub(r"[^\t]", " ", line[: int(place[2]) - 1])
                    self.assertEqual(excerpt, ["    " + line, margin + "^"])

    def test_an_error_shows_no_client_secret_and_no_password_of_a_uri(self):
        for line, shown in (
            ('client_secret = "hush"; oops', 'client_secret = "***"; oops'),
            ('oops; client_secret = "hush";', 'oops; client_secret = "***";'),
            ('client_secret="a"; client_secret = "hush";',
             'client_secret="***"; client_secret = "***";'),
            ('client_secret = "hu\\"sh" oops', 'client_secret = "***" oops'),
            ('client_secret = "hush', 'client_secret = "***'),
            ('client_secret = "hu\nsh\\n";', '******";'),
            ('client_secret\n= "hu\n\nsh" oops', '= "***'),
            ('token_uri = "https://me:hush@t/";', 'token_uri = "https://me:***@t/";'),
            ('login_hint = "http://:hush@t"; 5', 'login_hint = "http://:***@t"; 5'),
            ('client_secret = ""; oops', 'client_secret = ""; oops'),
            ("client_secret = hush;", "client_secret = ***;"),
            ("client_secret = 'hush';", "client_secret = ***;"),
            ('client_secret: "hush";', 'client_secret: "***";'),
            ('client_secret "hush";', 'client_secret "***";'),
            ('client_secret = ["hush"];', 'client_secret = ["***"];'),
            ('clientsecret = "hush";', 'clientsecret = "***";'),
            ('Client_Secrets="hush";', 'Client_Secrets="***";'),
            ('client_secret = // note\n "hush" bogus', ' "***" bogus'),
            ('token_uri = "https://me:hu@sh@t/";', 'token_uri = "https://me:***@t/";'),
            ('token_uri = "https://me:hu/sh@t/";', 'token_uri = "https://me:***@t/";'),
        ):
            with self.subTest(line=line):
                error = self.error(f'account "x" {{\n{line}\n}}')
                self.assertNotRegex(error, "hu.?sh|\\bhu\\b|\\bsh\\b")
                self.assertEqual(error.split("\n")[1], f"    {shown}")

    def test_the_mark_stands_under_the_culprit_behind_a_secret(self):
        shown, mark = self.error('account "x" { client_secret = "hush"; oops').split("\n")[1:]
        self.assertEqual(shown[mark.index("^") :], "oops")

    def test_an_error_in_a_long_or_hostile_line_shows_a_short_printable_part(self):
        message = self.error("x" * 10_000 + "\x1b[2J = 1s;")
        self.assertLess(len(message), 700)
        self.assertNotIn("\x1b", message)
        for text in (2 * account("\x1b]0;owned\u202e"),
                     "http_listen = none;" + account("\x1b]0;owned\u202e")):
            lines = self.error(text).split("\n")
            self.assertEqual(lines, [pizauth.printable(line) for line in lines])

    def test_file_must_be_utf8_and_may_start_with_a_byte_order_mark(self):
        self.assertEqual(pizauth.decode_config(b"\xef\xbb\xbfa"), "a")
        for mark in (b"", b"\xef\xbb\xbf"):
            with self.assertRaises(pizauth.ConfigError) as caught:
                pizauth.decode_config(mark + b"ok\n\nab\xff")
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

    def test_an_international_host_is_sent_in_ascii_where_both_rules_agree(self):
        for host, sent in (
            ("bücher.example", "xn--bcher-kva.example"), ("BÜCHER.DE", "xn--bcher-kva.de"),
            ("例え.テスト", "xn--r8jz45g.xn--zckzah"), ("ﬁ.example", "fi.example"),
            ("xn--strae-oqa.example", "xn--strae-oqa.example"),
        ):
            with self.subTest(host=host):
                self.assertEqual(pizauth.normal_uri(f"https://{host}/"), f"https://{sent}/")

    def test_a_host_that_names_another_domain_by_newer_rules_is_refused(self):
        for host in ("straße.example", "FAẞ.example", "Σοφός.example", "a\u200db.example",
                     "نامه\u200cای.example", "☃.example", "i♥u.example", "Ⱥ.example", "ꙮꟿ.example",
                     "a\u00adb.example", "a。b"):
            with self.subTest(host=host), \
                    self.assertRaisesRegex(ValueError, "programs disagree .* xn--"):
                pizauth.normal_uri(f"https://{host}/")

    def test_a_numeric_host_is_sent_in_normal_form_or_refused(self):
        for host, sent in (
            ("127.0.0.1", "127.0.0.1"), ("[0:0::1]", "[::1]"), ("[2001:DB8:0::1]", "[2001:db8::1]"),
            ("[0:0:0:0:0:0:0:0001]", "[::1]"), ("[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
            ("[::1.2.3.4]", "[::102:304]"), ("1a.example", "1a.example"), ("0x.eu", "0x.eu"),
        ):
            with self.subTest(host=host):
                self.assertEqual(pizauth.normal_uri(f"http://{host}:8/"), f"http://{sent}:8/")
        for host in ("127.1", "2130706433", "0x7f.0.0.1", "0x7f000001", "127.0.0.01", "1.2.3.256",
                     "1.2.3.4.", "1.2.3.4.5", "a.1", "[::1.2.3]", "[1::2::3]", "[:]", "[::1%lo]"):
            with self.subTest(host=host), self.assertRaises(ValueError):
                pizauth.normal_uri(f"http://{host}:8/")

    def test_a_path_with_dot_segments_is_refused(self):
        for path in ("/.", "/..", "/a/./b", "/a/../b", "/a/%2e%2E", "/%2e/", "/a/.%2e/b?c"):
            with self.subTest(path=path), self.assertRaisesRegex(ValueError, "'.' or '..' in its"):
                pizauth.normal_uri(f"http://a{path}")
        for path in ("/.a", "/a..", "/...", "/a.b/..c", "/a?x=/../y"):
            self.assertEqual(pizauth.normal_uri(f"http://a{path}"), f"http://a{path}")

    def test_an_unknown_account_is_told_the_nearest_name_or_those_there_are(self):
        for name, names, told in (
            ("wrok", ["home", "work"], "No account 'wrok': did you mean 'work'?"),
            ("Work", ["work"], "No account 'Work': did you mean 'work'?"),
            ("zzz", ["home", "work"], "No account 'zzz': the accounts are home, work."),
            ("", ["a\x1b b"], "No account '': the accounts are a b."),
            ("q" * 70_000, list("abc"), f"No account '{'q' * 70_000}': the accounts are a, b, c."),
            ("?", [str(n) for n in range(30)],
             f"No account '?': the accounts are {', '.join(map(str, range(20)))}, ...."),
        ):
            with self.subTest(name=name[:9]):
                got, _, reload = pizauth.no_account(name, names).partition(" If you have just")
                self.assertEqual(got, told)
                self.assertIn("pizauth reload", reload)

    def test_redirect_uri_carries_the_listeners_port(self):
        for uri, ports, expected in (
            ("http://localhost/", [8080], "http://localhost:8080/"),
            ("http://localhost:1/p?a=b", [8080], "http://localhost:8080/p?a=b"),
            ("http://LOCALHOST:1", [80], "http://localhost/"),
            ("http://LOCALHOST:99", [8080, 99], "http://localhost:99/"),
            ("http://host.example:99", [8080, 99], "http://host.example:8080/"),
        ):
            world = World(account(extra=f'redirect_uri = "{uri}";'))
            world.auth.ports["http"] = ports
            self.assertEqual(query_of(world.show()[8:])["redirect_uri"], expected)

    def test_by_default_the_ports_of_loopback_redirects_are_listened_on(self):
        def both(port):
            return (("127.0.0.1", port), ("::1", port))

        uris = ("http://localhost:8080/", "http://127.0.0.1:9090/a", "http://[::1]:8080/b",
                "http://host.example:7/", "http://localhost/", "https://localhost:8443/")
        text = "".join(account(str(number), f'redirect_uri = "{uri}";')
                       for number, uri in enumerate(uris))
        got = config(text)
        self.assertEqual((got.addresses("http"), got.addresses("https")),
                         ([both(8080), both(9090)], [both(8443)]))
        got = config(text + 'http_listen = "127.0.0.1:5"; https_listen = "[::1]:6";')
        self.assertEqual((got.addresses("http"), got.addresses("https")),
                         ([(("127.0.0.1", 5),)], [(("::1", 6),)]))


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
     'line 2, column 12: Invalid URI: its host or port is missing or misspelt; write '
     'https://HOST/PATH'),
    ('account "x" {\n\ttoken_uri = "ftp://a";\n}\n',
     'line 2, column 14: This is not a valid HTTP or HTTPS URI: it starts with ftp: '
     'instead of https:'),
    ('account "x" {\nredirect_uri = "http://localhost/#x";\n}\n',
     "line 2, column 16: URI fragments ('#...') are not allowed: leave out the '#' "
     'and what follows'),
    ('account "x" {\nauth_uri = "http://a:99999/";\n}\n',
     'line 2, column 12: Invalid URI: its host or port is missing or misspelt; write '
     'https://HOST/PATH'),
    ('account "x" {\nauth_uri = "http://me:pw@a/";\n}\n',
     'line 2, column 12: Invalid URI: a user name or password in it is not supported'),
    ('account "x" {\nauth_uri = "http://127.1/";\n}\n',
     'line 2, column 12: Invalid URI: 127.1 is not a whole IPv4 address, such as 127.0.0.1'),
    ('account "x" {\nauth_uri = "http://a/b/../c";\n}\n',
     "line 2, column 12: Invalid URI: '.' or '..' in its path: write the path without them"),
    ('account "x" {\nauth_uri = "https://straße.example/";\n}\n',
     "line 2, column 12: Invalid URI: programs disagree about which domain a host with 'ß' is:"
     ' write it in its ASCII form, xn--...'),
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
     "line 1, column 17: Invalid time '5x': write a whole number and a unit, such as"
     ' 90s, 15m, 2h or 1d'),
    ('refresh_retry = "5s";',
     "line 1, column 17: Expected a whole number and a unit, such as 90s, 15m, 2h or 1d after '='"),
    ('refresh_retry = 1h2m;',
     "line 1, column 17: Invalid time '1h2m': write a whole number and a unit, such "
     'as 90s, 15m, 2h or 1d'),
    ('http_listen = "127.0.0.1";',
     'line 1, column 15: Not a listen address: write "HOST:PORT", the port 65535 at '
     'most, for instance "127.0.0.1:0" or "[::1]:8080"'),
    ('http_listen = "127.0.0.1:65536";',
     'line 1, column 15: Not a listen address: write "HOST:PORT", the port 65535 at '
     'most, for instance "127.0.0.1:0" or "[::1]:8080"'),
    ('http_listen = 127.0.0.1:0;', 'line 1, column 15: Expected "HOST:PORT" or none after \'=\''),
    ('auth_notify_cmd = none;', "line 1, column 19: Expected a string in double quotes after '='"),
    ('refresh_rety = 5s;',
     "line 1, column 1: Unknown option 'refresh_rety': did you mean 'refresh_retry'?"),
    ('acount "x" { }', "line 1, column 1: Unknown block 'acount': did you mean 'account'?"),
    ('zzz = 5s;',
     "line 1, column 1: Unknown option 'zzz': they are account, auth_notify_cmd, "
     'auth_notify_interval, error_notify_cmd, http_listen, https_cert, https_key, https_listen, '
     'refresh_at_least, refresh_before_expiry, refresh_retry, startup_cmd, '
     'token_event_cmd, transient_error_if_cmd'),
    ('client_id = "c";',
     'line 1, column 1: Option \'client_id\' belongs in an account: account "NAME" { '
     'client_id = ...; }'),
    ('account "x" {\nstartup_cmd = "c";\n}\n',
     "line 2, column 1: Option 'startup_cmd' is for all accounts: move it out of "
     "this account's braces, or is the account's '}' missing above?"),
    ('account "x" {\nclient_id = "c";\n\naccount "y" {\n}\n',
     "line 4, column 1: This account starts inside another one: a '}' is missing above"),
    ('account "x" {\nscopes = [];\n  account y',
     "line 3, column 3: This account starts inside another one: a '}' is missing above"),
    ('account "x" {\naccount = "y";',
     "line 2, column 1: This account starts inside another one: a '}' is missing above"),
    ('account "x" {\nclientid = "c";\n}\n',
     "line 2, column 1: Unknown option 'clientid': did you mean 'client_id'?"),
    ('auth_error_cmd = "x";',
     "line 1, column 1: Unknown option 'auth_error_cmd': it is called error_notify_cmd now"),
    ('refresh_retry_interval = 5s;',
     "line 1, column 1: Unknown option 'refresh_retry_interval': it is called refresh_retry now"),
    ('not_transient_error_if = "x";',
     "line 1, column 1: Unknown option 'not_transient_error_if': write "
     'transient_error_if_cmd = "! ..." instead'),
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
     'line 2, column 10: Expected a list of strings, ["a", "b"], after \'=\''),
    ('account "x" {\nscopes = ["a",];\n}\n',
     "line 2, column 15: Expected a string in double quotes after ',': leave out the ','"),
    ('account "x" {\nscopes = ["a" "b"];\n}\n',
     "line 2, column 15: Expected ',' or ']' after a string"),
    ('account "x" {\nauth_uri_fields = ["a"];\n}\n',
     'line 2, column 19: Expected a map of strings, {"key": "value"}, after \'=\''),
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
    ("startup_cmd = 'a';",
     "line 1, column 15: Unexpected ''': strings are written in double quotes"),
    ('startup_cmd = “a”;',
     'line 1, column 15: Unexpected \'“\': strings are written in straight double quotes, "..."'),
    ('\x00', "line 1, column 1: Unexpected '\\x00'"),
    ('startup_cmd "x";', "line 1, column 13: Expected '=' after 'startup_cmd'"),
    ('} ', "line 1, column 1: Expected the name of an option after nothing: leave out the '}'"),
    ('account "x" {\nclient_id = "c;\nclient_secret = "d";\n}\n',
     'line 2, column 13: This string continues on the next line: is its last double '
     'quote missing?'),
    ('account "x" {\n'
     'client_id = "c;\n'
     'auth_uri = "http://a";\n'
     'token_uri = "http://t"; client_id = "c";\n'
     '\n'
     '}\n',
     'line 2, column 13: This string continues on the next line: is its last double '
     'quote missing?'),
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
        self.assertEqual(pizauth.access_token_request(plain, "c", "v", "http://localhost/"), [
            ("code", "c"), ("client_id", "cid"), ("code_verifier", "v"),
            ("redirect_uri", "http://localhost/"), ("grant_type", "authorization_code")])
        form = [("client_id", "cid"), ("refresh_token", "r"), ("grant_type", "refresh_token")]
        self.assertEqual(pizauth.refresh_request(empty, "r"), form)
        for account_, secret, sent in (
            (plain, None, (form, "")), (empty, "", ([*form, ("client_secret", "")], "")),
        ):
            self.assertEqual(pizauth.authenticated(account_, form, secret), sent)

    def judge(self, body, status=200, whole=True, form=None, retry_after=0):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return token_response(
            pizauth.outcome_bytes(status, retry_after, whole, data), list((form or {}).items()))

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

    def test_other_answers_are_transient_and_their_cause_and_reason_are_told(self):
        portal = ("HTTP 200, but no OAuth answer: is token_uri right, or is it a login page of the"
                  " network?")
        no_token = "HTTP 200, but it has no access_token: is token_uri right?"
        strange = "HTTP {}, but no OAuth answer: is token_uri right?"
        other = "HTTP {}, but its JSON is not an OAuth error"
        for status, body, cause, message in (
            (200, b"", "passing", portal), (200, b"<html>log in</html>", "passing", portal),
            (200, b"{", "passing", portal), (200, b"[1]", "passing", portal),
            (200, b"null", "passing", portal), (200, b"\xff\xfe", "passing", portal),
            (200, b"[" * 100_000, "passing", portal), (200, b" " * 1_000_000, "passing", portal),
            (200, b'{"a":' * 100_000, "passing", portal), (203, "x", "passing",
                                                           portal.replace("200", "203")),
            (200, {}, "odd", no_token), (200, {"access_token": None, "x": 1}, "odd", no_token),
            (200, b"error=invalid_grant", "odd", no_token),
            (200, {"access_token": ""}, "odd",
             "HTTP 200, but its access_token is not printable ASCII without blanks"),
            (200, {"access_token": "a b"}, "odd", None), (200, {"access_token": 7}, "odd", None),
            (200, {"access_token": "a\n"}, "odd", None), (200, {"access_token": "é"}, "odd", None),
            (200, {"access_token": "t", "token_type": "mac"}, "odd",
             "HTTP 200, but its token_type is 'mac' instead of 'bearer'"),
            (200, b"access_token=t&token_type=jwt-bearer", "odd",
             "HTTP 200, but its token_type is 'jwt-bearer' instead of 'bearer'"),
            (200, {"access_token": "t", "token_type": ["x"]}, "odd", None),
            (200, {"access_token": "t", "refresh_token": "r r"}, "odd",
             "HTTP 200, but its refresh_token is not printable ASCII without blanks"),
            (200, {"access_token": "t", "refresh_token": ["r"]}, "odd", None),
            (400, {"error": "temporarily_unavailable"}, "passing",
             "HTTP 400: temporarily_unavailable. The provider has trouble: wait a few minutes"),
            (400, {"error": "server_error"}, "passing", None),
            (200, {"error": "slow_down"}, "passing", "HTTP 200: slow_down"),
            (400, {"error": "slow_down", "error_description": "wait"}, "passing",
             "HTTP 400: slow_down: wait"),
            (200, {"access_token": "t", "token_type": "mac", "status": "ok"}, "odd",
             "HTTP 200, but its token_type is 'mac' instead of 'bearer'"),
            (200, {"code": "0", "message": "just-issued"}, "odd", no_token),
            (200, b"<html><a href='http://p/?a=b'></html>", "passing", portal),
            (200, b"a=b&c=d", "passing", portal),
            (302, b"", "passing", portal.replace("200", "302")),
            (307, {"access_token": "t"}, "passing", None),
            (400, {"access_token": "t"}, "unexplained", other.format(400)),
            (401, {}, "unexplained", other.format(401)), (400, {"error": 5}, "unexplained", None),
            (400, {"error": ""}, "unexplained", None),
            (400, {"error": "two words"}, "unexplained", "HTTP 400: two words"),
            (400, {"code": 400, "error_code": "refresh_token_not_found"}, "unexplained",
             "HTTP 400: refresh_token_not_found"),
            (401, {"error": {"code": 401, "status": "DENIED", "message": "Log in again."}},
             "unexplained", "HTTP 401: DENIED: Log in again."),
            (400, b"error=invalid_grant", "odd", strange.format(400)),
            (404, b"nothing", "odd", strange.format(404)), (401, b"", "odd", strange.format(401)),
            (403, {"message": "no"}, "odd", "HTTP 403: no"),
        ):
            with self.subTest(status=status, body=str(body)[:60]):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                with transient_error(self) as caught:
                    token_response(pizauth.outcome_bytes(status, 0, True, data), [])
                self.assertEqual(caught.exception.cause, cause)
                if message is not None:
                    self.assertEqual(str(caught.exception), message)

    def test_what_kept_an_answer_from_being_read_is_told_without_secrets(self):
        for status, body, cause in ((302, b'{"message": "Moved"}', "passing"), (200, b"", "odd"),
                                    (200, b"\x1b\x14", "odd"), (401, b"\x1b", "odd")):
            outcome = pizauth.outcome_bytes(status, 0, True, body, "here\n\x1b/rt%2F1 \u00e9")
            said = "but here/[.]{3} é" + (": is token_uri right, or" if status == 302 else "$")
            with self.subTest(status=status), \
                    transient_error(self, said) as caught:
                token_response(outcome, [("refresh_token", "rt/1")])
            self.assertEqual(caught.exception.cause, cause)

    def test_an_answer_that_can_be_read_is_judged_whatever_its_label_says(self):
        trouble = "its Content-Encoding is br, which was not asked for"
        good = pizauth.outcome_bytes(200, 0, True, b'{"access_token": "t"}', trouble)
        self.assertEqual(token_response(good, []).access_token, "t")
        with refusal(self):
            token_response(
                pizauth.outcome_bytes(400, 0, True, b'{"error": "invalid_grant"}', trouble), [])

    def test_a_byte_that_is_not_utf_8_spoils_only_its_own_text(self):
        for body, token in (
            (b'{"access_token": "t", "name": "Jos\xe9"}', "t"),
            (b'{"caf\xe9": 1, "access_token": "t2", "expires_in": 60}', "t2"),
            (b"access_token=t3&name=Jos\xe9", "t3"),
            ('{"access_token": "t4"}'.encode("utf-16"), "t4"),
        ):
            with self.subTest(body=body):
                self.assertEqual(self.judge(body).access_token, token)
        for body in (b'{"error": "invalid_grant", "error_description": "jet\xf3n caducado"}',
                     b'{"error": "invalid_grant", "\xe9": "\xff"}'):
            with self.subTest(body=body), \
                    refusal(self, "^HTTP 400: invalid_grant"):
                self.judge(body, 400)
        with transient_error(self):
            self.judge(b'{"access_token": "t\xe9"}')

    def test_a_body_is_unpacked_from_what_nobody_asked_for(self):
        text = b'{"access_token": "t"}' * 50
        raw = zlib.compressobj(wbits=-15)
        for coding, packed in (
            ("", text), ("identity", text), ("gzip", gzip.compress(text)),
            ("x-gzip", gzip.compress(text)), ("deflate", zlib.compress(text)),
            ("gzip", gzip.compress(text[:9]) + gzip.compress(b"") + gzip.compress(text[9:])),
            ("gzip", gzip.compress(b"") + gzip.compress(text)),
            ("deflate", raw.compress(text) + raw.flush()),
        ):
            with self.subTest(coding=coding):
                self.assertEqual(pizauth.unpacked(packed, coding), text)
                self.assertEqual(pizauth.unpacked(b"", coding), b"")
                for end in range(1, len(packed)) if packed != text else ():
                    try:
                        got = pizauth.unpacked(packed[:end], coding)
                    except OSError:
                        continue
                    self.assertIn(got, (None, b"", text[:9]))  # a first byte, or whole members
        for coding in ("br", "zstd", "gzip, gzip", "gzip", "deflate", "none"):
            self.assertIsNone(pizauth.unpacked(b"\x1b\x14\x00", coding))
        self.assertEqual(pizauth.unpacked(gzip.compress(text) + b"junk", "gzip"), text)

    def test_a_bomb_is_not_unpacked_to_its_end(self):
        bomb = gzip.compress(bytes(64 << 20))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertEqual(len(pizauth.unpacked(bomb, "gzip")), pizauth.ANSWER_LIMIT + 1)
        self.assertLess(tracemalloc.get_traced_memory()[1], 8 << 20)

    def test_the_proxy_is_that_of_the_scheme_or_of_all(self):
        for variables, uri, proxy in (
            ({}, "https://t.example/", {}),
            ({"ALL_PROXY": "http://p:1"}, "https://t.example/", {"https": "http://p:1"}),
            ({"all_proxy": "p:1"}, "http://t.example/", {"http": "p:1"}),
            ({"ALL_PROXY": "http://p:1", "https_proxy": "http://q:2"}, "https://t.example/",
             {"https": "http://q:2"}),
            ({"ALL_PROXY": "socks5://p:1", "https_proxy": "http://q:2"}, "https://t.example/",
             {"https": "http://q:2"}),
            ({"http_proxy": "http://p:1"}, "https://t.example/", {}),
            ({"ALL_PROXY": "http://p:1", "no_proxy": "t.example"}, "https://t.example/", {}),
            ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": ".example"}, "https://t.example:8/", {}),
            ({"ALL_PROXY": "http://p:1"}, "http://127.0.0.1:99/", {}),
            ({"ALL_PROXY": "socks5h://p:1"}, "https://localhost/", {}),
        ):
            with self.subTest(variables=variables, uri=uri), \
                    unittest.mock.patch.dict(os.environ, variables, clear=True):
                self.assertEqual(pizauth.proxy_for(uri), proxy)

    def test_a_socks_proxy_is_refused_by_a_sentence_without_its_password(self):
        for proxy in ("socks5://me:hush@p:1", "socks5h://me:hush@p", "SOCKS4://me:hush@p:1"):
            for name in ("ALL_PROXY", "https_proxy"):
                with self.subTest(proxy=proxy, name=name), \
                        unittest.mock.patch.dict(os.environ, {name: proxy}, clear=True), \
                        self.assertRaisesRegex(OSError, "a socks.* only HTTP proxies") as caught:
                    pizauth.proxy_for("https://t.example/")
                self.assertNotIn("hush", str(caught.exception))

    def test_a_form_of_unknown_length_may_be_cut_short_and_is_refused(self):
        with transient_error(self):
            self.judge(b"access_token=t", whole=False)

    def test_outages_are_transient_whatever_the_body_says(self):
        for status in (408, 425, 429, 500, 502, 503, 504, 599):
            with self.subTest(status=status), transient_error(self) as caught:
                self.judge({"error": "invalid_grant"}, status, retry_after=7)
            self.assertEqual(
                (caught.exception.cause, caught.exception.retry_after), ("outage", 7))
        with transient_error(self) as caught:
            self.judge(b"no answer from h: timed out", 0)
        self.assertEqual(
            (str(caught.exception), caught.exception.cause),
            ("no answer from h: timed out", "outage"))
        with transient_error(self) as caught:
            self.judge({}, 503, retry_after=float("inf"))
        self.assertEqual(caught.exception.retry_after, 3600)

    def test_an_oauth_error_is_permanent_whatever_the_status_is_otherwise(self):
        for status in (200, 400, 401, 403, 302):
            with self.subTest(status=status), refusal(self) as caught:
                self.judge(
                    {"error": "invalid_grant", "error_description": "Token\x07 was\nrevoked."},
                    status)
            self.assertEqual(
                str(caught.exception),
                f"HTTP {status}: invalid_grant: Token wasrevoked. {ENDED}")

    def test_a_known_error_is_followed_by_its_cause_and_the_next_step(self):
        tested = set()
        for names, words, advice in (
            ("50057", "invalid_grant: AADSTS{}: The user account is disabled.",
             "Your account is disabled: ask"),
            ("50072, 50074, 50076, 50079, 50158", "invalid_grant: AADSTS{}: Due to a configuration"
             " change made by your administrator, or because you moved to a new location, you must"
             " use multi-factor authentication.", "A second factor is required"),
            ("50078, 70043", "interaction_required: AADSTS{}: The refresh token has expired or is"
             " invalid due to sign-in frequency checks by conditional access.",
             "Your organisation limits how long a login lasts: log in"),
            ("50132, 50133, 50173", "invalid_grant: AADSTS{}: The provided grant has expired due to"
             " it being revoked, a fresh auth token is needed.", "The password was changed or the"),
            ("50196", "invalid_grant: AADSTS{}: The server terminated an operation because it"
             " encountered a client request loop.", "The provider was asked too often: make"),
            ("53000, 53001", "interaction_required: AADSTS{}: Device is not in required device"
             " state: compliant.", "Only devices that your organisation manages"),
            ("53003, 530032, 530035", "invalid_grant: AADSTS{}: Access has been blocked by"
             " Conditional Access policies.", "A policy blocks the login: delete device_auth_uri"),
            ("65001, 65004", "access_denied: AADSTS{}: User declined to consent to access the app.",
             "The client's access was not accepted: log in"),
            ("65005, 650057, 90008", "invalid_request: AADSTS{}: Invalid resource. The client has"
             " requested access to a resource which is not listed in the requested permissions.",
             "The client lacks a scope: add it"),
            ("70000", "invalid_grant: AADSTS{}: The request was denied because one or more scopes"
             " requested are unauthorized or expired.", "The login has ended, or scopes asks for"),
            ("70008, 700082", "invalid_grant: AADSTS{}: The refresh token has expired due to"
             " inactivity.", "The login was not used for too long"),
            ("700084, 9002326, 9002327", "invalid_request: AADSTS{}: Cross-origin token redemption"
             " is permitted only for the 'Single-Page Application' client-type.",
             "redirect_uri is registered for a single-page application: register"),
            ("9002331, 9002332", "invalid_request: AADSTS{}: Application 'cid'(mail) is configured"
             " for use by Microsoft Account users only. Please use the /consumers endpoint.",
             "This client is for other accounts: as the tenant"),
            ("7000218", "invalid_client: AADSTS{}: The request body must contain the following"
             " parameter: 'client_assertion' or 'client_secret'.", "A secret is required: set"),
            ("700025", "invalid_client: AADSTS{}: Client is public so neither 'client_assertion'"
             " nor 'client_secret' should be presented.", "This client must not send a secret"),
            ("70002, 7000215, 7000222", "invalid_client: AADSTS{}: Invalid client secret provided.",
             "client_secret is wrong or expired: make"),
            ("28002, 70011, 700022", "invalid_scope: AADSTS{}: The provided value for the input"
             " parameter 'scope' is not valid.", "A scope is wrong or of another service: use"),
            ("50059, 90002", "invalid_request: AADSTS{}: Tenant 'exmaple.org' not found.",
             "The provider does not know this tenant: check"),
            ("admin_policy_enforced", "access_denied: Error 400: {}", "Your Workspace blocks this"),
            ("org_internal", "access_denied: Error 403: {}", "This client is for one organisation"),
            ("deleted_client", "{}: The OAuth client was deleted.", "The client was deleted or"),
            ("client was not found", "invalid_client: The OAuth {}.", "The client was deleted or"),
            ("Token has been expired or revoked", "invalid_grant: {}.", "The login has ended: log"),
            ("INVALID_INPUT, invalid_redirect_uri", "{}: The request is not acceptable.",
             "A field is empty or not allowed: check"),
            ("server_error, temporarily_unavailable", "{}", "The provider has trouble: wait"),
            ("invalid_grant", "{}: Bad Request", ENDED),
            ("invalid_grant", "{}: AADSTS54005: OAuth2 Authorization code was already redeemed.",
             ENDED),
            ("invalid_grant", "{}: AADSTS501481: The Code_Verifier does not match the"
             " code_challenge supplied in the authorization request.", ENDED),
            ("invalid_client", "{}: Unauthorized", "client_id, client_secret or client_auth is"),
            ("unauthorized_client", "{}: The client is not enabled for consumers.",
             "This client may not log in this way, or not with this kind of account: check"),
            ("invalid_request, unsupported_grant_type, unsupported_response_type",
             "{}: AADSTS9002313: Invalid request. Request is malformed or invalid.",
             "The request was not understood: check auth_uri"),
            ("invalid_scope", "{}: Invalid device flow scope: https://mail.google.com/",
             "A scope is misspelt or not allowed: check"),
            ("access_denied", "{}", DENIED),
            ("interaction_required, login_required", "{}: AADSTS50058: Session information is not"
             " sufficient for single-sign-on.", "The provider wants to ask you something: log in"),
            ("authorization_declined, bad_verification_code, expired_token", "{}",
             "The code was refused, wrong or too late: run 'pizauth show'"),
        ):
            tested.add(names)
            for name in names.split(", "):
                message = f"HTTP 400: {words.format(name)}"
                with self.subTest(message=message):
                    told = pizauth.advised(message)
                    self.assertTrue(told.startswith(f"{message.rstrip('.')}. {advice}"), told)
                    long = pizauth.advised(message + TRACE * 9)
                    self.assertTrue(long.startswith(message) and f". {advice}" in long, long)
                    self.assertLessEqual(len(long), 500)
        names = {name for names in pizauth.ADVICE for name in names.split(", ")}
        self.assertEqual({name for names in tested for name in names.split(", ")}, names)

    def test_other_words_are_left_alone(self):
        for words in (
            "authorization_pending: AADSTS70016: OAuth 2.0 device flow error. Authorization is"
            " pending. Continue polling." + TRACE, "authorization_pending", "slow_down: Wait.",
            "odd: AADSTS7000: x", "odd: AADSTS700080: x", "odd: AADSTS70008x", "odd: xAADSTS70008:",
            "odd: 70008", "odd: AADSTS 70008", "not_invalid_grant", "invalid_grants: x",
            "odd: our client was not foundering", "INVALID_INPUTS", "Invalid_Grant", "",
        ):
            with self.subTest(words=words):
                self.assertEqual(pizauth.advised(words), words)

    def test_the_most_specific_advice_wins(self):
        for words in ("invalid_grant: AADSTS700082: late", "access_denied: AADSTS700082"):
            self.assertIn(". The login was not used", pizauth.advised(words))

    def test_an_outage_gets_no_advice_to_log_in_again(self):
        with transient_error(self) as caught:
            self.judge({"error": "invalid_grant"}, 503)
        self.assertEqual(str(caught.exception), "HTTP 503: invalid_grant")

    def test_the_words_of_an_error_are_cut_and_not_the_advice(self):
        for words in (("AADSTS700082: late. " + "x" * 999), "AADSTS700082: late." + TRACE * 9):
            with refusal(self) as caught:
                self.judge({"error": "invalid_grant", "error_description": words}, 400)
            self.assertRegex(str(caught.exception), "^HTTP 400: invalid_grant: AADSTS700082: late. "
                             ".*[.] The login was not used for too long .*: log in again$")
            self.assertIn(len(str(caught.exception)), range(490, 501))
            refused = {"error": "access_denied", "error_description": "AADSTS65004: " + words[20:]}
            self.assertRegex(pizauth.error_words(refused), "^access_denied: AADSTS65004: .* The"
                             " client's access was not accepted: log in again, and accept it$")

    def test_an_error_message_holds_no_secret_and_is_short(self):
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

    def test_secrets_are_removed_in_every_form_that_a_provider_may_repeat(self):
        for secret, echo in (
            ("a\tb-secret", "a\tb-secret"), ("x\u00a0yz", "x\u00a0yz"),
            ("hush hush", "hush%20hush"), ("hush hush", "hush+hush"),
            ("rt/1+x=", "rt%2f1%2bx%3d"), ("rt/1+x=", "rt/1%2Bx%3D"),
            ("a<b>&c", "a&lt;b&gt;&amp;c"), ("Hush", "hUSH"), ("it's&", "it&#39;s&amp;"),
            ("it's&", "it&#x27;s&amp;"), ("it's&", "it's&amp;"),
        ):
            with self.subTest(secret=secret, echo=echo):
                form = [("client_secret", secret), ("client_id", "no")]
                self.assertEqual(pizauth.without_secrets(f"no '{echo}'", form), "no '...'")

    def test_errors_below_http_are_reported_shortly_and_without_secrets(self):
        form = {"refresh_token": "rt1", "client_secret": "rt1-and-more"}
        text = b"no answer: \x1b[2J r\1t1 rt1-and-more \xff" + b"x" * 60_000
        with transient_error(self) as caught:
            self.judge(text, 0, form=form)
        message = str(caught.exception)
        self.assertTrue(message.startswith("no answer: [2J ... ... \ufffdxx"), message[:60])
        self.assertEqual(len(message), 500)

    def test_retry_after_counts_whatever_the_answer_was(self):
        for body, status in (({"error": "slow_down"}, 400), (b"<html>", 403), ({}, 503)):
            with transient_error(self) as caught:
                self.judge(body, status, retry_after=120)
            self.assertEqual(caught.exception.retry_after, 120)

    def test_authorization_response(self):
        got = pizauth.authorization_response("state=s%26&code=c+d&x=1&x=2")
        self.assertEqual(got, {"state": "s&", "code": "c d", "x": "2"})
        for name in ("state", "code", "error", "error_description"):
            with self.assertRaisesRegex(pizauth.BadRequest, f"more than one '{name}'"):
                pizauth.authorization_response(f"{name}=s&a=b&{name}=")

    def test_retry_after_is_seconds_or_a_date(self):
        for value, expected in (
            ("", 0), ("120", 120), (" 5 ", 5), ("soon", 0), ("-5", 0), ("1e9", 0),
            ("9" * 400, float("inf")), ("100000", 100000),
        ):
            with self.subTest(value=value):
                self.assertEqual(pizauth.retry_after(value), expected)
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
        self.assertAlmostEqual(pizauth.retry_after(date), 100, delta=3)
        self.assertEqual(pizauth.retry_after("Thu, 01 Jan 1970 00:00:00 GMT"), 0)

    def test_loopback_is_never_asked_through_a_proxy(self):
        for uri, loopback in (
            ("http://localhost:1/", True), ("http://127.9.9.9/", True), ("https://[::1]/", True),
            ("http://localhost./", True), ("http://a.localhost:1/", True),
            ("http://[::ffff:7f00:1]:9/", True), ("http://[::ffff:a00:1]/", False),
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

    def in_pieces(self, data, size):
        """What is made of a head that comes in pieces."""
        buffer = bytearray()
        for at in range(0, len(data), size):
            buffer += data[at : at + size]
            if (got := pizauth.http_head(buffer, False)) is not None:
                return got
        return None

    def test_a_get_is_read_whole_byte_by_byte_and_in_pieces(self):
        for end in range(len(self.GOOD)):
            self.assertIsNone(self.head(self.GOOD[:end]))
            self.assertIsNone(self.in_pieces(self.GOOD[:end], 1))
        for size in (1, 2, 3, 7, 50, 1000):
            for data in (self.GOOD + b"trailing junk", self.GOOD.replace(b"\r", b"") + b"\n\n"):
                got = self.in_pieces(data, size)
                self.assertEqual(got, ("/?state=s&code=c", "localhost:8080"))

    def test_bare_line_feeds_and_http_1_0_are_understood(self):
        got = self.head(b"GET / HTTP/1.0\nhost:  LOCALHOST \n\n")
        self.assertEqual(got, ("/", "LOCALHOST"))

    def test_anything_but_a_get_is_refused_as_soon_as_possible(self):
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
            (b"GET /" + b"a" * 66_000, 431),
            (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 66_000, 431),
            (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 66_000 + b"\r\n\r\n", 431),
        ):
            for size in (1 << 20, 1 if len(data) < 9000 else 999, 5 if len(data) < 9000 else 99):
                with self.subTest(data=data[:60], size=size):
                    with self.assertRaises(pizauth.BadRequest) as caught:
                        self.in_pieces(data, size)
                    self.assertEqual(caught.exception.status, status)

    def test_a_browser_that_insists_on_https_is_worth_a_warning_that_names_the_ways_out(self):
        for hello in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x16\x03\x03\0", b"\x16"):
            with self.assertRaisesRegex(pizauth.BadRequest, "HSTS.*127.0.0.1 or https:") as caught:
                self.head(hello)
            self.assertEqual(caught.exception.level, pizauth.WARNING)

    def test_a_head_of_many_cookies_is_read_and_one_of_too_many_is_told_what_to_do(self):
        for size in (20_000, 60_000):
            cookie = b"Cookie: a=" + b"x" * size + b"\r\n"
            self.assertIsNotNone(self.head(self.GOOD[:-2] + cookie + b"\r\n"))
        with self.assertRaises(pizauth.BadRequest) as caught:
            self.head(self.GOOD[:-2] + b"Cookie: a=" + b"x" * 66_000)
        self.assertRegex(caught.exception.advice, "cookies for localhost: delete them.*127.0.0.1")

    def test_each_page_tells_at_a_glance_how_the_login_went_and_what_to_do(self):
        for sign, title in (("worked", "✔ Authorised"), ("failed", "✘ Not authorised"),
                            ("waiting", "… Not finished yet")):
            page = pizauth.page(200, sign, "the text", pizauth.next_step(sign, "x")).decode()
            self.assertIn(f"<title>{title} - pizauth</title>", page)
            self.assertIn(f'<h1 class="{sign}">{title}</h1><p>the text</p><p>', page)
        self.assertIn("pizauth show a b", pizauth.next_step("failed", "a b"))

    def test_a_truncated_request_is_refused_and_an_empty_one_is_ignored(self):
        with self.assertRaises(pizauth.BadRequest):
            self.head(self.GOOD[:-2], eof=True)
        self.assertIsNone(self.head(b"", eof=True))

    def test_a_request_with_an_empty_body_is_fine(self):
        self.assertEqual(
            self.head(b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"), ("/", "a"))

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
                    pizauth.redirect_matches(uri, scheme, host, target), matches)

    def test_a_page_is_escaped_and_complete(self):
        page = pizauth.page(405, "failed", '<script>alert("x")</script>\x1b', "<script>\x1b")
        head, _, body = page.partition(b"\r\n\r\n")
        self.assertNotIn(b"<script", body)
        self.assertNotIn(b"\x1b", body)
        self.assertEqual(body.count(b"&lt;script&gt;"), 2)
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
        self.assertIsNone(pizauth.until_eof(bytearray(b"restore:" + b"x" * 65537), False))
        with self.assertRaises(pizauth.RequestError):
            pizauth.until_eof(bytearray(b"restore:" + bytes(16 << 20)), False)


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
        self.assertIn((pizauth.INFO, "x: pending"), world.logged)
        pages = world.visit(f"/?state={query_of(url)['state']}&code=c0de")
        (post,) = world.posts
        self.assertEqual((post.uri, post.kind), ("http://t.example/token", "code"))
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
                self.assertEqual(world.posts[0].kind, "refresh")

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

    def test_however_short_the_intervals_there_is_one_attempt_a_second(self):
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

    def test_ever_shorter_tokens_are_refreshed_once_a_second_at_most(self):
        world, posts = World(), 0
        world.authorise(expires_in=4)
        for number in range(1200):
            world.wait(0.1)
            while world.posts:
                posts += 1
                world.posts.pop().grant(expires_in=4 / 2**number)
        self.assertLessEqual(posts, 120)

    def test_during_an_outage_of_three_days_it_tries_every_40_s_and_keeps_the_login(self):
        world, posts = World(), 0
        world.authorise(expires_in=3600)
        end = world.clock.now() + 3 * 86400
        while world.clock.now() < end:
            world.wait(world.auth.deadline() - world.clock.now())
            posts += len(world.posts)
            for post in world.posts[:]:
                world.posts.remove(post)
                post.fail()
        self.assertLessEqual(posts, 3 * 86400 / 40)
        self.assertIn("Access token expired", world.status())
        world.wait(40)
        world.posts.pop().grant("at2")
        self.assertEqual(world.show(), "access_token:at2")

    def test_after_a_sleep_the_refresh_comes_at_once(self):
        world = self.world
        world.authorise(expires_in=3600)
        world.clock.advance(8 * 3600)
        self.assertLess(world.auth.deadline(), world.clock.now())
        world.auth.run_due()
        self.assertEqual(len(world.posts), 1)

    def test_a_requested_refresh_waits_for_a_second_at_most(self):
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

    def test_a_repeated_access_token_is_removed_from_the_message(self):
        self.world.authorise("x", access_token="s3cret", expires_in=3600)
        self.world.refresh()
        self.world.posts.pop().answer(503, error="oh", error_description="no s3cret rt1 here")
        self.assertIn("HTTP 503: oh: no ... ... here", self.world.status())

    def test_a_permanent_failure_ends_the_login_and_is_reported(self):
        world = self.world
        world.authorise()
        world.refresh()
        world.posts.pop().answer(
            400, error="invalid_grant", error_description="Token has been revoked")
        message = ("Refreshing x failed: HTTP 400: invalid_grant: Token has been revoked. "
                   + ENDED)
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

    def test_a_token_without_refresh_token_is_kept_until_it_expires(self):
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

    def test_show_and_refresh_of_an_expired_token_without_refresh_token_ask_for_a_login(self):
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

    UNEXPLAINED = (
        {"code": 400, "error_code": "refresh_token_not_found"},
        {"error": {"code": 401, "message": "Log in again."}}, {"error": "invalid grant"}, {})

    def refused(self, token_uri="https://t.example/token", life=3600.0):
        """A world whose token, which lives so long, is refreshed at once."""
        world = World(account().replace("http://t.example/token", token_uri)
                      + 'error_notify_cmd = "e"; refresh_retry = 40s;')
        world.authorise(expires_in=life)
        world.wait(1)
        world.refresh()
        return world

    def told(self, world):
        return [command.variables["PIZAUTH_MSG"] for command in world.commands]

    def test_a_refusal_in_other_words_is_final_at_the_third_after_expiry(self):
        for number, body in enumerate(self.UNEXPLAINED):
            with self.subTest(body=body):
                world = self.refused(("https://t.example/token", "http://127.0.0.1:1/token",
                                      "http://[0:0::1]:1/t", "http://localhost/t")[number], 70)
                for status in (400, 401):
                    world.posts.pop().answer(status, **body)
                    world.wait(40)  # the token has expired at the second one
                self.assertIn("Access token expired", world.status())
                world.posts.pop().answer(400, **body)
                self.assertIn("No access token; last error at", world.status())
                self.assertTrue(self.told(world)[-1].startswith("Refreshing x failed: HTTP 400"))

    def test_before_the_token_expires_no_number_of_such_refusals_is_final(self):
        world = self.refused(life=400)
        for _ in range(9):
            self.assertIn("Active access token", world.status())
            world.posts.pop().answer(400, **self.UNEXPLAINED[0])
            self.assertEqual(self.told(world), [])
            world.wait(40)
        world.wait(40)  # it expires while a refresh runs
        self.assertEqual(self.told(world), [])
        world.posts.pop().answer(401, **self.UNEXPLAINED[0])
        self.assertIn("No access token; last error at", world.status())
        self.assertEqual(len(self.told(world)), 1)

    def test_other_failures_between_such_refusals_keep_the_login(self):
        for other in (lambda post: post.fail(), lambda post: post.answer(503, b""),
                      lambda post: post.answer(401, b""), lambda post: post.answer(200, b"<html>")):
            world = self.refused(life=30)
            for _ in range(6):
                for _ in range(2):
                    world.posts.pop().answer(400, **self.UNEXPLAINED[0])
                    world.wait(40)
                other(world.posts.pop())
                world.wait(40)
            self.assertIn("Access token expired", world.status())

    def test_over_plain_http_such_refusals_may_be_anybodys_and_keep_the_login(self):
        for uri in ("http://t.example/token", "http://127.0.0.1.example/t", "http://10.0.0.1/t"):
            world = self.refused(uri, life=30)
            for _ in range(9):
                world.posts.pop().answer(400, **self.UNEXPLAINED[0])
                world.wait(40)
            self.assertIn("Access token expired", world.status())
            self.assertEqual(len(self.told(world)), 1)

    def test_failures_that_are_no_outage_are_told_once_when_the_token_expires(self):
        for answer, reason in (
            (lambda post: post.answer(404, b"not here"),
             "HTTP 404, but no OAuth answer: is token_uri right?"),
            (lambda post: post.answer(401, b""),
             "HTTP 401, but no OAuth answer: is token_uri right?"),
            (lambda post: post.answer(200, access_token="t", token_type="jwt-bearer"),
             "HTTP 200, but its token_type is 'jwt-bearer' instead of 'bearer'"),
        ):
            with self.subTest(reason=reason):
                world = self.refused(life=100)
                answer(world.posts.pop())
                world.wait(98)
                self.assertEqual(self.told(world), [])
                while world.posts:
                    answer(world.posts.pop())
                world.wait(1)
                self.assertEqual(self.told(world), [
                    f"Refreshing x keeps failing: {reason} (it will be tried again;"
                    " 'pizauth revoke x' leads to a new login)"])
                for _ in range(5):
                    world.wait(40)
                    answer(world.posts.pop())
                self.assertEqual(len(self.told(world)), 1)
                world.wait(40)
                world.posts.pop().grant("at2", expires_in=100)
                self.assertEqual(world.show(), "access_token:at2")

    def test_without_error_notify_cmd_they_are_told_in_the_log(self):
        world = World()
        world.authorise(expires_in=20)
        world.wait(10)
        world.posts.pop().answer(404, b"")
        world.wait(10)
        self.assertTrue(any(level == pizauth.ERROR and "keeps failing" in message
                            for level, message in world.logged))

    def test_an_outage_is_not_told_but_what_follows_it_is(self):
        for answer in (
            lambda post: post.fail(), lambda post: post.answer(503, b""),
            lambda post: post.answer(429, b""), lambda post: post.answer(400, error="slow_down"),
            lambda post: post.answer(200, b"<html>"), lambda post: post.answer(302, b""),
        ):
            world = self.refused(life=50)
            for _ in range(5):
                answer(world.posts.pop())
                world.wait(40)
            self.assertEqual(self.told(world), [])
            world.posts.pop().answer(404, b"")
            world.wait(0)
            self.assertEqual(len(self.told(world)), 1)

    def test_a_refresh_asked_for_while_transient_error_if_cmd_runs_comes_after_it(self):
        for verdict in (0, 126):
            world = World(account() + 'transient_error_if_cmd = "i"; refresh_retry = 1h;')
            world.authorise(expires_in=90_000)
            world.refresh()
            for _ in range(6):
                world.posts.pop().answer(429, b"", retry_after=3600)
                if not world.commands:
                    world.wait(3600)
            self.assertEqual((world.refresh(), world.posts), ("scheduled:", []))
            world.wait(100)
            self.assertEqual(world.posts, [])
            world.commands.pop().end(verdict)
            world.wait(0)
            self.assertEqual(len(world.posts), 1)

    def test_without_a_refresh_token_status_says_so_and_why_the_token_is_gone(self):
        world, date = self.world, self.world.clock.date
        world.authorise(refresh_token=None, expires_in=60)
        now = world.clock.now()
        self.assertIn(f"x: Active access token (obtained {date(now)}; expires {date(now + 60)};"
                      " no refresh token)", world.status().split("\n")[0])
        gone = ("The access token of x has expired, and the provider had given no refresh token:"
                " log in again")
        for expire in (world.wait, lambda seconds: (world.clock.advance(seconds), world.show())):
            expire(60)
            self.assertIn(f"last error at {date(world.clock.now())}: {gone}", world.status())
            world.authorise(refresh_token="", expires_in=60)
            self.assertNotIn("last error", world.status())

    def test_a_code_exchange_is_tried_ten_times_over_an_outage(self):
        world = self.world
        pages = world.approve()
        for tries in range(1, 10):
            world.posts.pop().answer(503, b"")
            self.assertIn("HTTP 503", world.status())
            world.wait(5.9)
            self.assertEqual(world.posts, [])
            world.wait(0.2)
            self.assertEqual((tries, len(world.posts), world.posts[0].kind), (tries, 1, "code"))
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

    def test_an_appointment_of_a_state_that_was_replaced_in_the_same_pass_is_not_kept(self):
        world = World(account() + 'auth_notify_cmd = "a"; auth_notify_interval = 6s;')
        world.approve()
        world.auth.run_due()
        world.commands.pop().end()
        world.posts.pop().fail()  # it is due again in 6 s, as is the reminder, which comes first
        run = world.auth._run
        world.auth._run = lambda *arguments: world.ask("revoke:x") and run(*arguments)
        world.clock.advance(6)
        world.auth.run_due()
        self.assertEqual((len(world.commands), world.posts), (1, []))

    def test_without_anything_scheduled_there_is_no_deadline(self):
        self.assertEqual(self.world.auth.deadline(), pizauth.FOR_EVER)

    def test_the_deadline_is_the_earliest_of_all_accounts(self):
        self.world.authorise("x", expires_in=3600)
        self.world.authorise("y", expires_in=600)
        self.assertEqual(self.world.auth.deadline(), 1000 + 510)

    def test_a_huge_refresh_at_least_makes_no_huge_lifetime(self):
        world = World(account("x", "refresh_at_least = 18446744073709551615s;"))
        world.authorise(expires_in=None)
        self.assertIn("Active access token", world.status())
        self.assertIn("2036", world.status())

    def test_waiting_browsers_are_answered_when_the_server_ends(self):
        pages = self.world.approve()
        self.world.auth.answer_waiting()
        self.assertIn("pizauth was stopped", text_of(pages[0])[1])

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

    def test_more_fields_than_any_provider_sends_are_400(self):
        self.assertEqual(self.visited(f"/?state={self.world.state()}" + "&a=b" * 200)[0], 400)

    def test_more_than_one_state_or_code_is_400(self):
        self.assertEqual(self.visited("/?state=a&state=b")[0], 400)

    def test_an_unknown_state_is_told_to_request_a_fresh_token(self):
        self.world.show()
        for state in ("", "x", "%00", "%FF", "é".encode().hex()):
            self.assertEqual(
                self.visited(f"/?state={state}&code=c"),
                (200, "No pending token matches request state: request a fresh token"))

    def test_an_unknown_state_does_not_reach_an_account_without_a_name(self):
        world = World(account(""))
        world.show("")
        for more in ("&code=evil", "&error=evil", ""):
            (page,) = world.visit(f"/?state=forged{more}")
            self.assertIn("No pending token matches", text_of(page)[1])
        self.assertEqual((world.posts, world.status()),
                         ([], "ok:: Access token pending authentication"))

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
            (400, f"Authentication for x failed: access_denied: You saidno&lt;b&gt;. {DENIED}"))
        self.assertIn("x: No access token; last error at", self.world.status())
        self.assertIn(f"access_denied: You saidno<b>. {DENIED}", self.world.status())

    def test_no_code_is_400_and_changes_nothing(self):
        state, before = self.world.state(), self.world.status()
        for more in ("", "&code="):
            self.assertEqual(self.visited(f"/cb?a=b&state={state}{more}")[0], 400)
        self.assertEqual(self.world.status(), before)

    def test_requests_during_the_exchange_get_its_outcome_and_post_nothing(self):
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

    def test_each_browser_waits_for_ten_seconds(self):
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

    def test_the_cause_and_the_next_step_of_a_failed_exchange_are_on_the_page(self):
        pages = self.world.visit(f"/cb?a=b&state={self.world.state()}&code=c0de")
        words = "AADSTS700025: Client is public." + TRACE
        self.world.posts.pop().answer(401, error="invalid_client", error_description=words)
        self.assertEqual(text_of(pages[0])[1].replace("&#x27;", "'"), (
            f"Authentication for x failed: HTTP 401: invalid_client: {words}. This client"
            " must not send a secret: delete client_secret"))
        self.assertIn("To try again, run", pages[0].decode())

    def test_an_error_without_a_state_is_repeated_and_changes_nothing(self):
        self.world.show()
        before = self.world.status()
        for query, words in (
            ("error=access_denied&error_description=Ask+your+%3Cadmin%3E",
             f"access_denied: Ask your &lt;admin&gt;. {DENIED}"),
            ("error=unheard_of", "unheard_of"),
            ("code=c&error=", "no reason given"),
        ):
            (page,) = self.world.visit(f"/cb?a=b&{query}")
            self.assertEqual(text_of(page), (404, f"The provider refused: {words}"))
            self.assertIn('class="failed"', page.decode())
            self.assertIn("pizauth show", page.decode())
        self.assertEqual((self.world.status(), self.world.posts), (before, []))

    def test_a_state_is_good_for_one_exchange_and_then_tells_that_it_worked(self):
        state = self.world.state()
        target = f"/cb?a=b&state={state}"
        self.world.visit(target + "&code=c")
        self.world.posts.pop().grant()
        for more in ("&code=c", "&error=access_denied", ""):
            for _ in range(2):
                (page,) = self.world.visit(target + more)
                self.assertEqual(text_of(page), (
                    200, "Account x is authorised already: you can safely close this page."))
                self.assertIn('class="worked"', page.decode())
            self.world.refresh()  # which does not end the login that the state began
            self.world.wait(1)
            self.world.posts.pop().grant()
        self.assertEqual(self.world.posts, [])
        dump = self.world.dump()
        self.world.ask("revoke:x")
        self.assertIn("No pending token", self.visited(target)[1])
        self.world.restore(dump)
        self.assertIn("No pending token", self.visited(target)[1])

    def test_every_page_says_what_to_do_next(self):
        world, name = self.world, "x"
        state = world.state()
        for target, sign, advice in (
            ("/favicon.ico", "unknown", "run 'pizauth show ACCOUNT'"),
            ("/?state=old", "unknown", "or the address is damaged: 'pizauth status'"),
            (f"/elsewhere?state={state}", "unknown", "is redirect_uri in pizauth.conf what the"),
            (f"/cb?a=b&state={state}", "unknown", f"Open the URL that 'pizauth show {name}'"),
            (f"/cb?a=b&state={state}&error=no", "failed", f"run 'pizauth show {name}' and open"),
        ):
            with self.subTest(target=target):
                (page,) = world.visit(target)
                text = html.unescape(page.decode())
                self.assertIn(f'class="{sign}"', text)
                self.assertIn(advice, text.rpartition("<p>")[2])

    def test_show_during_an_exchange_says_that_no_login_is_needed(self):
        self.world.show()
        self.world.approve_at("/cb?a=b")
        told = "error:The login is being completed: {}. Do not log in again"
        self.assertEqual(self.world.show(),
                         told.format("its code is being exchanged for a token"))
        self.world.posts.pop().fail()
        again = told.format(
            "exchanging its code failed (see 'pizauth status') and is being retried")
        self.assertEqual((self.world.show(), self.world.ask("showtoken:withouturl x")),
                         (again, again))
        self.world.wait(6)
        self.assertEqual(self.world.show(), again)
        self.world.posts.pop().answer(400, error="invalid_grant")
        self.assertTrue(self.world.show().startswith("pending:http"))

    def test_each_account_has_its_own_state(self):
        self.world.visit(f"/?state={self.world.state('y')}&code=c")
        self.world.posts.pop().grant("at-y")
        self.assertEqual(self.world.show("y"), "access_token:at-y")
        self.assertTrue(self.world.show("x").startswith("pending:"))


# ---- Logins without a browser on this machine ----

DEVICE = ('account "{}" {{ device_auth_uri = "https://d.example/device"; client_id = "cid";'
          ' token_uri = "https://t.example/token"; {} }}\n')
PENDING = "pending:https://d.example/enter and code ABCD-EFGH"
CODE = {"device_code": "dc1", "user_code": "ABCD-EFGH", "expires_in": 1800,
        "verification_uri": "https://d.example/enter"}


class DeviceTest(unittest.TestCase):
    """The device authorization grant (RFC 8628)."""

    def world(self, extra="", options="", **code):
        """A world whose account x has a code to enter."""
        world = World(DEVICE.format("x", extra) + account("y") + options)
        replies = world.park("showtoken:withurl x")
        self.assertEqual(replies, [])
        world.posts.pop().answer(**{**CODE, **code})
        self.assertEqual(len(replies), 1)
        world.told = replies[0]
        return world

    def poll(self, world, seconds=5.0):
        """The poll that is made after so long, and not before."""
        world.wait(seconds - 0.01)
        self.assertEqual(world.posts, [])
        world.wait(0.02)
        return world.posts.pop()

    def pending(self, world, error="authorization_pending", status=400, **how):
        self.poll(world, **how).answer(status, error=error)

    def test_the_whole_grant(self):
        world = World(DEVICE.format("x", 'scopes = ["a", "b"]; client_secret = "hush";')
                      + 'auth_notify_cmd = "n"; token_event_cmd = "t";')
        replies = world.park("showtoken:withurl x")
        (post,) = world.posts
        self.assertEqual((post.uri, post.kind, post.form), ("https://d.example/device", "device", {
            "client_id": "cid", "scope": "a b", "client_secret": "hush"}))
        self.assertIn("x: Access token pending authentication", world.status())
        world.wait(2)
        self.assertEqual((replies, world.commands), ([], []))
        world.posts.pop().answer(**CODE)
        self.assertEqual(replies, [PENDING])
        self.assertEqual(world.show(), PENDING)
        self.assertEqual(world.ask("showtoken:withouturl x"), "pending:")
        world.wait(0)
        notify = world.commands.pop()
        self.assertEqual(notify.variables, {
            "PIZAUTH_ACCOUNT": "x", "PIZAUTH_URL": "https://d.example/enter",
            "PIZAUTH_CODE": "ABCD-EFGH"})
        date = world.clock.date(world.clock.now())
        self.assertIn(f"pending authentication (last notification {date}); open"
                      " https://d.example/enter and enter ABCD-EFGH", world.status())
        poll = self.poll(world)
        self.assertEqual((poll.uri, poll.form), ("https://t.example/token", {
            "client_id": "cid", "device_code": "dc1", "client_secret": "hush",
            "grant_type": "urn:ietf:params:oauth:grant-type:device_code"}))
        poll.grant("at1")
        self.assertEqual(world.show(), "access_token:at1")
        self.assertEqual(world.commands.pop().variables["PIZAUTH_EVENT"], "token_new")
        world.refresh()
        self.assertEqual(world.posts.pop().form["grant_type"], "refresh_token")

    def test_answers_of_every_honest_kind(self):
        complete = "https://d.example/enter?user_code=ABCD-EFGH"
        for code, url, interval in (
            ({}, CODE["verification_uri"], 5),
            ({"verification_uri_complete": complete}, complete, 5),
            ({"verification_uri_complete": None, "interval": "7"}, CODE["verification_uri"], 7),
            ({"verification_uri": None, "verification_url": "https://www.g.example/device"},
             "https://www.g.example/device", 5),
            ({"interval": 0}, CODE["verification_uri"], 5),
            ({"interval": 0.1}, CODE["verification_uri"], 1),
            ({"interval": None, "expires_in": None}, CODE["verification_uri"], 5),
            ({"interval": 30}, CODE["verification_uri"], 30),
        ):
            with self.subTest(code=code):
                world = self.world(**code)
                self.assertEqual(world.told, f"pending:{url} and code ABCD-EFGH")
                self.pending(world, seconds=interval)
                self.poll(world, interval).grant("at1")
                self.assertEqual(world.show(), "access_token:at1")

    def test_a_user_code_may_be_a_number_and_may_have_blanks_around_it(self):
        for given, shown in ((12345678, "12345678"), (" AB CD\n", "AB CD")):
            self.assertEqual(self.world(user_code=given).told,
                             f"pending:{CODE['verification_uri']} and code {shown}")

    def test_answers_without_a_code_or_an_address_end_the_login(self):
        for code, reason in (
            ({"device_code": None}, "it has no device_code: is device_auth_uri right?"),
            ({"device_code": ""}, "it has no device_code: is device_auth_uri right?"),
            ({"device_code": "\ud800a"}, "it has no device_code: is device_auth_uri right?"),
            ({"device_code": "a b"}, "it has no device_code: is device_auth_uri right?"),
            ({"user_code": None}, "it has no user_code that can be typed"),
            ({"user_code": "\x1b"}, "it has no user_code that can be typed"),
            ({"user_code": "AB\u200bCD"}, "it has no user_code that can be typed"),
            ({"user_code": " "}, "it has no user_code that can be typed"),
            ({"user_code": True}, "it has no user_code that can be typed"),
            ({"user_code": "x" * 101}, "it has no user_code that can be typed"),
            ({"verification_uri": None}, "it has no verification_uri that can be opened"),
            ({"verification_uri": "javascript:x"}, "it has no verification_uri that can be opened"),
            ({"verification_uri": "https://a b"}, "it has no verification_uri that can be opened"),
        ):
            with self.subTest(code=code):
                world = World(DEVICE.format("x", "") + 'error_notify_cmd = "e";')
                replies = world.park("showtoken:withurl x")
                world.posts.pop().answer(**{**CODE, **code})
                message = f"Authentication for x failed: HTTP 200, but {reason}"
                self.assertEqual(replies, [f"error:{message}"])
                self.assertEqual(world.commands.pop().variables["PIZAUTH_MSG"], message)
                self.assertIn("x: No access token; last error at", world.status())

    def test_a_refusal_of_the_request_ends_the_login(self):
        for answer, reason in (
            (lambda post: post.answer(400, error="invalid_client"), "HTTP 400: invalid_client."
             " client_id, client_secret or client_auth is wrong: check them in the console"),
            (lambda post: post.answer(404, b""),
             "HTTP 404, but no OAuth answer: is device_auth_uri right?"),
            (lambda post: post.answer(200, b"<html>"),
             "HTTP 200, but no OAuth answer: is device_auth_uri right, or is it a login page"),
            (lambda post: post.answer(302, b"", location="redirects are not followed"),
             "HTTP 302, but redirects are not followed: is device_auth_uri right, or is it a"),
        ):
            world = World(DEVICE.format("x", ""))
            replies = world.park("refresh:withurl x")
            answer(world.posts.pop())
            self.assertIn(f"error:Authentication for x failed: {reason}", replies[0])
            self.assertIn("x: No access token", world.status())

    def test_an_outage_is_waited_for_ten_times_and_the_client_nine_seconds(self):
        world = World(DEVICE.format("x", ""))
        replies = world.park("showtoken:withurl x")
        world.posts.pop().fail()
        world.wait(6)
        self.assertEqual(replies, [])
        world.posts.pop().answer(503, b"")
        world.wait(2.9)
        self.assertEqual(replies, [])
        world.wait(0.2)
        self.assertTrue(replies[0].startswith("error:The provider is asked for a login code aga"))
        later = world.park("showtoken:withouturl x")
        for _ in range(7):
            world.wait(6)
            world.posts.pop().fail()
        world.wait(6)
        self.assertTrue(later[0].startswith("error:The provider is asked for a login code again"))
        last = world.park("showtoken:withurl x")
        world.posts.pop().fail("connection refused")
        self.assertEqual(last, ["error:Authentication for x failed: connection refused"])
        self.assertIn("x: No access token; last error", world.status())
        again = world.park("showtoken:withurl x")
        world.wait(5)
        world.posts.pop().answer(**CODE)
        self.assertEqual(again, [PENDING])
        self.assertNotIn("last error", world.status())

    def test_a_refresh_waits_with_the_others_while_the_code_is_asked_for(self):
        world = World(DEVICE.format("x", ""))
        waiting = [world.park("showtoken:withurl x")]
        for _ in range(4):
            world.wait(1)
            waiting.append(world.park("refresh:withurl x"))
        (post,) = world.posts
        self.assertFalse(post.cancelled)
        post.answer(**CODE)
        self.assertEqual(waiting, [[PENDING]] * 5)

    def test_two_requests_for_a_code_are_five_seconds_apart_whoever_asks(self):
        world = World(DEVICE.format("x", ""))
        for _ in range(50):
            world.park("refresh:withurl x")
        (post,) = world.posts
        for _ in range(3):
            world.posts.pop().answer(400, error="invalid_client")
            replies = [world.park("refresh:withurl x"), world.park("showtoken:withurl x")]
            world.wait(4.8)
            self.assertEqual((replies, world.posts), ([[], []], []))
            world.wait(0.2)

    def test_retry_after_of_the_request_for_a_code_is_obeyed(self):
        world = World(DEVICE.format("x", ""))
        world.park("showtoken:withurl x")
        world.posts.pop().answer(429, b"", retry_after=120)
        date = world.clock.date(world.clock.now() + 120)
        again = f"error:The provider is asked for a login code again at {date}"
        self.assertEqual([world.show(), world.refresh()], [again, again])
        self.assertIn("the provider has not given a login code yet; last", world.status())
        world.wait(119)
        self.assertEqual(world.posts, [])
        world.wait(2)
        world.posts.pop().answer(**CODE)
        self.assertEqual(world.show(), PENDING)

    def test_a_code_that_expires_while_the_polls_fail_says_so(self):
        world = self.world(expires_in=12)
        self.poll(world).fail("refused")
        world.wait(6)
        world.posts.pop().fail("refused")
        world.wait(6)
        self.assertRegex(world.status(), "code ABCD-EFGH has expired; at the last try: refused\n")

    def test_a_code_that_expires_between_two_polls_is_told_at_once(self):
        world = self.world(expires_in=900, interval=600, options='error_notify_cmd = "e";')
        self.pending(world, seconds=600)
        world.wait(299)
        self.assertEqual(world.commands, [])
        world.wait(1)
        self.assertIn("has expired", world.commands.pop().variables["PIZAUTH_MSG"])

    def test_slow_down_adds_five_seconds_for_good(self):
        world = self.world()
        self.pending(world)
        self.pending(world, "slow_down")
        self.pending(world, seconds=10)
        self.pending(world, "slow_down", seconds=10)
        self.pending(world, "slow_down", status=429, seconds=15)
        for _ in range(3):
            self.pending(world, seconds=20)
        self.poll(world, 20).grant("at1")
        self.assertEqual(world.show(), "access_token:at1")
        self.assertNotIn("last error", world.status())

    def test_retry_after_counts_whatever_the_word_beside_it(self):
        for error in ("slow_down", "authorization_pending", "server_error"):
            world = self.world()
            self.poll(world).answer(429, retry_after=100, error=error)
            self.poll(world, 100).grant("at1")
            self.assertEqual(world.show(), "access_token:at1")

    def test_an_interval_that_is_longer_than_the_code_lives_is_no_reason_not_to_poll(self):
        world = self.world(interval=5000, expires_in=900)
        self.pending(world, seconds=450)
        world.wait(450)
        self.assertEqual(world.posts, [])
        self.assertIn("has expired before it was entered", world.status())

    def test_a_connection_failure_doubles_the_gap_until_the_provider_answers(self):
        world = self.world()
        for gap in (5, 10, 20, 40, 60, 60):
            self.poll(world, gap).fail()
            self.assertIn("will be tried again", world.status())
        self.pending(world, seconds=60)
        self.assertNotIn("last error", world.status())
        self.poll(world, 5).answer(200, b"<html>portal</html>")
        self.poll(world, 10).answer(503, b"", retry_after=100)
        self.pending(world, seconds=100)
        self.pending(world, seconds=5)

    def test_the_login_survives_an_hour_without_the_provider_as_long_as_the_code_lives(self):
        world = self.world(expires_in=7200)
        end = world.clock.now() + 3600
        while world.clock.now() < end:
            world.wait(1)
            for post in world.posts:
                post.fail()
            world.posts.clear()
        world.wait(60)
        self.assertEqual(world.show(), PENDING)
        world.posts.pop().grant("at1")
        self.assertEqual(world.show(), "access_token:at1")

    def test_however_long_the_gap_there_is_a_poll_just_before_the_code_expires(self):
        world = self.world(expires_in=100)
        for gap in (5, 10, 20, 40):
            self.poll(world, gap).fail()
        world.wait(24)  # instead of 60
        world.posts.pop().grant("at1")
        self.assertEqual(world.show(), "access_token:at1")

    def test_each_final_word_ends_the_login_and_is_told(self):
        fresh = " The code was refused, wrong or too late: run 'pizauth show' for a new one"
        for word, advice in (
            ("expired_token", fresh), ("authorization_declined", fresh),
            ("bad_verification_code", fresh), ("access_denied", f" {DENIED}"),
            ("invalid_grant", f" {ENDED}"), ("odd_word", ""),
            ("invalid_client", " client_id, client_secret or client_auth is wrong: check them in"
                               " the console"),
        ):
            for status in (400, 401, 403):
                with self.subTest(word=word, status=status):
                    world = self.world(options='error_notify_cmd = "e";')
                    self.poll(world).answer(status, error=word, error_description="Why.")
                    message = f"Authentication for x failed: HTTP {status}: {word}: Why.{advice}"
                    self.assertEqual(world.commands.pop().variables["PIZAUTH_MSG"], message)
                    self.assertIn("x: No access token; last error at", world.status())
                    world.wait(100)
                    self.assertEqual(world.posts, [])

    def test_when_the_code_has_expired_the_next_show_gets_a_fresh_one(self):
        for life in (12, 14.9):
            world = self.world(expires_in=life)
            self.pending(world)
            self.pending(world)
            world.wait(5)
            self.assertEqual(world.posts, [])
            self.assertIn("failed: the code ABCD-EFGH has expired before it was", world.status())
            replies = world.park("showtoken:withurl x")
            world.posts.pop().answer(**{**CODE, "user_code": "NEW"})
            self.assertEqual(replies, ["pending:https://d.example/enter and code NEW"])

    def test_a_poll_on_its_way_when_the_code_expires_still_counts(self):
        world = self.world(expires_in=6)
        poll = self.poll(world)
        world.wait(20)
        poll.grant("at1")
        self.assertEqual(world.show(), "access_token:at1")

    def test_reminders_come_with_the_code_and_refresh_asks_for_a_fresh_one(self):
        world = self.world(options='auth_notify_cmd = "n"; auth_notify_interval = 10s;',
                           interval=100)
        for seconds in (0, 10, 10):
            world.wait(seconds)
            command = world.commands.pop()
            self.assertEqual(command.variables["PIZAUTH_CODE"], "ABCD-EFGH")
            command.end()
        replies = world.park("refresh:withurl x")
        self.assertEqual(world.posts[-1].uri, "https://d.example/device")
        world.posts.pop().answer(**{**CODE, "user_code": "NEW"})
        self.assertEqual(replies, ["pending:https://d.example/enter and code NEW"])

    def test_reload_revoke_restore_and_shutdown_while_the_code_is_asked_for(self):
        other = DEVICE.format("x", "").replace("d.example", "e.example")
        sealed = World(DEVICE.format("x", "")).sealed()
        for act, told in (
            (lambda world: world.ask("revoke:x"), "error:This authorization request is void"),
            (lambda world: world.reload(other), "error:This authorization request is void"),
            (lambda world: world.reload(account("y")), "error:This authorization request is void"),
            (lambda world: world.restore(sealed), "access_token:at1"),
            (lambda world: (world.ask("shutdown:"), world.auth.answer_waiting()),
             "error:pizauth was stopped"),
        ):
            world = World(DEVICE.format("x", "") + account("y"))
            replies, (post,) = world.park("showtoken:withurl x"), world.posts
            act(world)
            self.assertEqual(len(replies), 1)
            self.assertTrue(replies[0].startswith(told), replies)
            if "stopped" not in told:
                self.assertTrue(post.cancelled)
                before = world.status()
                post.answer(**CODE)
                self.assertEqual(world.status(), before)

    def test_reload_revoke_and_restore_while_it_is_polled(self):
        same, sealed = DEVICE.format("x", "refresh_retry = 1s;"), World(
            DEVICE.format("x", "")).sealed()
        for act, kept in (
            (lambda world: world.reload(same + account("y")), True),
            (lambda world: world.reload(same.replace("d.example", "e.example")), False),
            (lambda world: world.reload(account("x")), False),
            (lambda world: world.ask("revoke:x"), False),
            (lambda world: world.restore(sealed), False),
            (lambda world: world.restore(World.authorised().dump()), True),  # of another kind
        ):
            world = self.world()
            poll = self.poll(world)
            act(world)
            self.assertEqual(poll.cancelled, not kept)
            poll.grant("late")
            self.assertEqual(world.show() == "access_token:late", kept) if kept else None
            self.assertNotIn("access_token:late" if not kept else "pending:", world.show() or "")

    def test_a_poll_in_flight_at_the_end_is_waited_for_and_none_is_begun(self):
        world = self.world()
        poll = self.poll(world)
        world.ask("shutdown:")
        poll.answer(400, error="authorization_pending")
        world.wait(100)
        self.assertEqual((world.posts, world.auth.deadline()), ([], pizauth.FOR_EVER))

    def test_a_dump_made_with_it_restores_only_where_it_is_equal(self):
        device, redirect = DEVICE.format("x", ""), account("x")
        both = DEVICE.format("x", 'auth_uri = "http://a.example";')
        sealed = {text: World(text).sealed() for text in (device, redirect, both)}
        for made, dump in sealed.items():
            for text in (device, redirect, both, device.replace("d.example", "e.example")):
                world = World(text)
                self.assertEqual(world.restore(dump), "ok:")
                self.assertEqual(world.show() == "access_token:at1" if made == text else False,
                                 made == text)

    def test_an_account_may_have_both_addresses_or_needs_one_of_them(self):
        both = config(DEVICE.format("x", 'auth_uri = "http://a.example";')).accounts["x"]
        self.assertEqual((both.auth_uri, both.redirect_scheme), ("http://a.example", ""))
        world = World(DEVICE.format("x", 'auth_uri = "http://a.example";'))
        world.park("showtoken:withurl x")
        self.assertEqual(world.posts[0].uri, "https://d.example/device")  # the device is used
        with self.assertRaisesRegex(pizauth.ConfigError, "auth_uri not specified"):
            config('account "x" { client_id = "c"; token_uri = "https://t"; }')
        with self.assertRaisesRegex(pizauth.ConfigError, "token_uri not specified"):
            config('account "x" { client_id = "c"; device_auth_uri = "https://t"; }')
        with self.assertRaisesRegex(pizauth.ConfigError, "Invalid URI"):
            config(DEVICE.format("x", "").replace("https://d.example", "d.example"))

    def test_an_account_without_a_redirect_needs_no_listener(self):
        none = "http_listen = none; https_listen = none;"
        self.assertTrue(config(none + DEVICE.format("x", "")).accounts)
        self.assertEqual(config(DEVICE.format("x", 'redirect_uri = "https://localhost/";'))
                         .addresses("https"), [])
        with self.assertRaisesRegex(pizauth.ConfigError, "Cannot set both"):
            config(none + DEVICE.format("x", "") + account("y"))


class CompleteTest(unittest.TestCase):
    """The address of a browser that could not reach the listener, pasted."""

    def setUp(self):
        self.world = World(account("x", 'redirect_uri = "http://localhost/cb?a=b";'))
        self.query = f"a=b&state={self.world.state()}&code=c0de%2F1"
        self.url = f"http://localhost:8080/cb?{self.query}"

    def accepted(self):
        url, query = self.url, self.query
        half = len(url) // 2
        return [
            url, f" {url}\n", f"'{url}'", f'"{url}"', f"<{url}>", f"`{url}`", f"“{url}”",
            f"‘{url}’", f"« {url} »", f"\t{url}\r\n", url.replace("&", "&amp;"),
            url[:half] + "\n" + url[half:], url[:half] + "\r\n   " + url[half:],
            "\n".join(url[at : at + 20] for at in range(0, len(url), 20)),
            url.replace("http://", "HTTP://"), url.replace("localhost", "LOCALHOST"),
            url.replace("http://", ""), url + "#", url + "#_=_", f"?{query}", query, f"/cb?{query}",
            f"{query}#", f'"?{query}"', url + "&session_state=x&iss=https%3A%2F%2Fp.example",
            url.replace(f"?{query}", "?" + "&".join(reversed(query.split("&")))),
            f"> {url}", f"> > {url[:half]}\n> > {url[half:]}", f"URL: {url}", f"view-source:{url}",
            f"({url})", f"[{url}]", f"{url}.", f"see <{url}>,", url.replace("=", "=3D"),
            url.replace("=", "=3D")[:half] + "=\n" + url.replace("=", "=3D")[half:],
            url.replace("&", "&am\np;"), url.replace("&", "&amp;amp;"), url.replace("&", "&#38;"),
            url.replace("?", "\\?").replace("=", "\\=").replace("&", "\\&"),
            f"\ufeff{url[:half]}\u200b{url[half:]}", f"{query}&iss=https://p.example",
            f"{url} thanks", f"<{url}> thanks", f"It is {url}, thanks.", f"{url}\n\n-- \nBob",
            f"Hello,\n\n{url}\n\nBob", f"{url}\u2026", f"{url} [1]", f"{{{url}}}", url + url,
            f"{url}\n{url}\n", f'<a href="{url}">{url}</a>', f"[{url}]({url})", f"{url}<{url}>",
            "Sch=C3=B6n: " + url.replace("=", "=3D"), f"> {url[:half]}=\n> {url[half:]}".replace(
                "a=b", "a=3Db").replace("state=", "state=3D").replace("code=", "code=3D"),
        ]

    def test_every_form_of_the_same_redirect_is_taken(self):
        self.assertGreaterEqual(len(self.accepted()), 20)
        for number in range(len(self.accepted())):
            self.setUp()
            text = self.accepted()[number]
            with self.subTest(text=text):
                replies = self.world.park(f"complete:{text}")
                self.assertEqual(replies, [])
                (post,) = self.world.posts
                self.assertEqual(post.form["code"], "c0de/1")
                post.grant("at1")
                self.assertEqual(replies, ["ok:Account x is authorised"])
                self.assertEqual(self.world.show(), "access_token:at1")

    def test_every_other_text_is_refused_by_a_sentence_and_changes_nothing(self):
        url, query, state = self.url, self.query, self.world.state()
        request = self.world.show().partition(":")[2]
        refused = [
            "", " \n", "hello", "https://", "http://localhost:8080/cb", "?",
            "ftp://localhost:8080/cb?" + query, request, query[:30], "x" * 60_000, "\0" + url[1:],
            "?error=access_denied", url.replace("//", "//user:pw@"), url + "&x=y" * 200,
            url + "&code=other", url + f"&state={state}",
            *(url.replace(*change) for change in (
                ("http:", "https:"), ("8080", "8081"), (":8080", ""), ("localhost", "127.0.0.1"),
                ("/cb", "/"), ("/cb", "/cb/"), ("a=b&", ""), (state, "forged"), ("state", "s"),
                (f"state={state}", ""), ("code=c0de%2F1", ""), ("c0de%2F1", ""), (query, "")))]
        self.assertGreaterEqual(len(refused), 20)
        before = self.world.status()
        for text in refused:
            with self.subTest(text=text[:200]):
                (reply,) = self.world.park(f"complete:{text}")
                self.assertRegex(reply, "^error:[A-Z].{20,}")
                self.assertEqual((self.world.status(), self.world.posts), (before, []))
        self.assertEqual(len(self.world.park(f"complete:{url}")), 0)

    def test_the_sentence_says_what_is_wrong_with_it(self):
        for text, sentence in (
            (self.url.replace("state", "s"), "redirect, for it has no 'state': paste all that"),
            (self.url.replace("8080", "8081"), "This is not the address that account x redirects"
             " to, which begins with http://localhost:8080/cb. The login still waits."),
            (self.url.replace("state=", "state=0"), "The login that this address belongs to has"),
        ):
            (reply,) = self.world.park(f"complete:{text}")
            self.assertIn(sentence, reply)

    def test_an_error_in_it_ends_the_login_as_at_the_listener(self):
        text = self.url.replace("code=c0de%2F1", "error=access_denied&error_description=No+%27t")
        (reply,) = self.world.park(f"complete:{text}")
        self.assertEqual(reply, "error:Authentication for x failed: access_denied: No 't."
                                f" {DENIED}. To try again, run 'pizauth show x' and open the URL"
                                " that it prints.")
        self.assertIn("x: No access token", self.world.status())

    def test_it_waits_for_a_slow_provider(self):
        replies = self.world.park(f"complete:{self.url}")
        for _ in range(9):
            self.world.posts.pop().fail()
            self.world.wait(6)
        self.assertEqual(replies, [])
        self.world.wait(20)
        self.world.posts.pop().grant("at1")
        self.assertEqual(replies, ["ok:Account x is authorised"])

    def test_it_does_not_wait_for_ever_and_tells_how_the_login_failed(self):
        replies = self.world.park(f"complete:{self.url}")
        self.world.wait(75)
        self.assertEqual(replies, ["error:The provider has not answered yet. 'pizauth status' tells"
                                   " how it ends."])
        replies = self.world.park(f"complete:{self.url}")  # the code is posted once only
        self.world.posts.pop().answer(400, error="invalid_grant")
        self.assertIn(f"error:Authentication for x failed: HTTP 400: invalid_grant. {ENDED}. To",
                      replies[0])
        self.assertEqual(self.world.posts, [])

    def test_a_redirect_that_came_already_is_told_so(self):
        self.world.park(f"complete:{self.url}")
        self.world.posts.pop().grant("at1")
        self.assertEqual(self.world.park(f"complete:{self.query}"),
                         ["ok:Account x is authorised already"])

    def test_every_truncation_and_mutation_is_a_redirect_or_an_error(self):
        text = "<http://localhost:8080/cb?a=b&amp;state=s&code=c#x>"
        for at in range(len(text)):
            for changed in (text[:at], text[at:], text[:at] + text[at + 1 :],
                            *(text[:at] + c + text[at:] for c in '?#/&="\n\0é')):
                with contextlib.suppress(pizauth.RequestError):
                    scheme, (target, _) = pizauth.pasted_redirect(changed)
                    self.assertIn(scheme, ("", "http", "https"))
                    self.assertTrue(target.startswith("/"))


# ---- What fits a provider ----


def jwt(**claims):
    """A JSON Web Token, as a provider writes it."""
    payload = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    return f"eyJh.{payload}.c2ln"


class ImportTest(unittest.TestCase):
    """A refresh token that another program got."""

    def test_it_is_refreshed_at_once_and_shown(self):
        world = World(account("a b"))
        self.assertEqual(world.ask("import:rt0 a b"), "ok:")
        self.assertIn("Access token expired (refresh not yet attempted)", world.status())
        waiting = world.park("showtoken:withurl,wait=9 a b")
        world.wait(0)
        (post,) = world.posts
        self.assertEqual((post.form["grant_type"], post.form["refresh_token"]),
                         ("refresh_token", "rt0"))
        post.grant("at1", None)
        self.assertEqual(waiting, ["access_token:at1"])
        world.wait(2)
        world.refresh("a b")
        self.assertEqual(world.posts[-1].form["refresh_token"], "rt0")

    def test_who_waits_for_a_login_that_it_ends_is_not_told_that_it_worked(self):
        world = World()
        (browser, waiting) = world.approve(), world.park("showtoken:withurl,wait=60 x")
        world.ask("import:rt0 x")
        self.assertIn("This authorization request is void", text_of(browser[0])[1])
        self.assertEqual(waiting, [])
        world.wait(0)
        world.posts.pop().grant("at2")
        self.assertEqual(waiting, ["access_token:at2"])

    def test_it_takes_the_place_of_a_login_that_has_begun(self):
        world = World()
        state = world.state()
        world.ask("import:rt0 x")
        (page,) = world.visit(f"/?state={state}&code=c")
        self.assertIn("No pending token", text_of(page)[1])

    def test_one_that_is_refused_is_told(self):
        world = World(account("x") + 'error_notify_cmd = "e";')
        world.ask("import:rt0 x")
        world.wait(0)
        world.posts.pop().answer(400, error="invalid_grant", error_description="no rt0 here")
        (command,) = world.commands
        self.assertRegex(command.variables["PIZAUTH_MSG"],
                         "^Refreshing x failed: HTTP 400: invalid_grant: no ... here. ")
        self.assertIn("x: No access token", world.status())

    def test_bad_requests_change_nothing(self):
        world = World.authorised()
        for request, reply in (
            ("import:", "error:A refresh token is"), ("import:rt0", "error:No account"),
            ("import: x", "error:A refresh token is printable ASCII"),
            ("import:r\u00e9 x", "error:A refresh token is printable ASCII"),
            ("import:a\nb x", "error:A refresh token is printable ASCII"),
            ("import:rt0 y", "error:No account 'y'"), ("import:\u00e9 y", "error:A refresh token"),
        ):
            self.assertTrue(world.ask(request).startswith(reply), world.ask(request))
        self.assertEqual(world.show(), "access_token:at1")


class ProviderFitTest(unittest.TestCase):
    """Options for what a provider demands or offers."""

    def pending(self, extra, **more):
        """A world whose account x has options, and has its redirect; and the post or command."""
        world = World(account("x", extra) + more.get("options", ""))
        self.redirected = world.approve()
        return world

    def test_token_uri_fields_are_in_every_form_and_not_in_the_authorization_request(self):
        world = self.pending('token_uri_fields = {"audience": "mail", "audience": "dav"};')
        self.assertNotIn("audience", world.show())
        post = world.posts.pop()
        self.assertEqual(post.form["audience"], "dav")
        post.grant()
        world.refresh()
        self.assertEqual(world.posts.pop().form["audience"], "dav")
        world = World(DEVICE.format("x", 'token_uri_fields = {"audience": "mail"};'))
        world.park("showtoken:withurl x")
        self.assertEqual(world.posts[0].form["audience"], "mail")
        world.posts.pop().answer(**CODE)
        world.wait(5)
        self.assertEqual(world.posts[0].form["audience"], "mail")

    def test_client_auth_basic_encodes_both_as_forms_do_and_hides_them_in_errors(self):
        world = self.pending('client_auth = "basic"; client_secret = "a b:/+%ü";')
        post = world.posts.pop()
        self.assertNotIn("client_secret", post.form)
        secret = "a+b%3A%2F%2B%25%C3%BC"
        encoded = base64.b64encode(f"cid:{secret}".encode()).decode()
        self.assertEqual(post.authorization, f"Basic {encoded}")
        post.answer(400, error="invalid_client", error_description=f"no {encoded} a b:/+%ü!")
        self.assertIn("invalid_client: no ... ...!", world.status())
        world = self.pending('client_auth = "basic";')  # a client without a secret
        self.assertEqual(world.posts[0].authorization, "")

    def test_client_secret_cmd_runs_when_the_secret_is_first_needed(self):
        world = self.pending('client_secret_cmd = "pass show x";')
        self.assertEqual(world.posts, [])
        command = world.commands.pop()
        self.assertEqual((command.command, command.variables, command.limit, command.capture),
                         ("pass show x", {"PIZAUTH_ACCOUNT": "x"}, 30, True))
        command.end(0, b"s3cret\r\nuser: me\n")
        post = world.posts.pop()
        self.assertEqual(post.form["client_secret"], "s3cret")
        post.grant()
        for _ in range(2):
            world.wait(2)
            world.refresh()
            self.assertEqual((world.posts[0].form["client_secret"], world.commands), ("s3cret", []))
            world.posts.pop().grant()
        world.reload(account("x", 'client_secret_cmd = "pass show x";'))
        world.wait(2)
        world.refresh()
        self.assertEqual((world.posts, len(world.commands)), ([], 1))

    def test_a_client_secret_cmd_that_fails_costs_no_login_and_shows_nothing_of_its_output(self):
        for (status, output), how in (
            ((None, b"s3cret"), "was killed after 30 s"), ((1, b"s3cret"), "ended with status 1"),
            ((-11, b""), "ended with status -11"), ((0, b""), "printed nothing on its first line"),
            ((0, b"\ns3cret"), "printed nothing on its first line"),
            ((0, b"s3cret" * 200_000), "printed a first line that is too long, or not printable"),
            ((0, b"s3cret\x1b\n"), "printed a first line that is too long, or not printable"),
        ):
            with self.subTest(how=how):
                world = self.pending('client_secret_cmd = "c";')
                world.commands.pop().end(status, output)
                self.assertIn(f"will be tried again: client_secret_cmd {how}", world.status())
                world.wait(6)
                world.commands.pop().end(0, b"s3cret\n")
                world.posts.pop().grant(expires_in=60)
                world.auth._secrets.clear()
                world.wait(61)
                world.commands.pop().end(status, output)
                self.assertIn("Refreshing x failed, and will be tried again: client_secret_cmd "
                              + how, world.status())
                self.assertNotIn("s3cret", repr(world.logged) + world.status())
                world.wait(40)
                world.commands.pop().end(0, b"s3cret\n")
                world.posts.pop().grant("at2")
                self.assertEqual(world.show(), "access_token:at2")

    def test_work_on_the_secret_is_cancelled_with_its_login(self):
        world = self.pending('client_secret_cmd = "c";')
        world.ask("revoke:x")
        command = world.commands.pop()
        self.assertTrue(command.cancelled)
        command.end(0, b"s3cret")
        self.assertEqual((world.posts, world.auth._secrets), ([], {}))

    def test_a_secret_that_has_been_renewed_costs_no_login(self):
        world = self.pending('client_secret_cmd = "c";')
        world.commands.pop().end(0, b"old")
        world.posts.pop().grant(expires_in=60)
        world.wait(60)
        world.posts.pop().answer(401, error="invalid_client")
        self.assertIn("will be tried again: HTTP 401: invalid_client", world.status())
        world.wait(40)
        world.commands.pop().end(0, b"new")
        self.assertEqual(world.posts[0].form["client_secret"], "new")
        world.posts.pop().answer(401, error="invalid_client")  # of a secret that is fresh
        self.assertIn("x: No access token; last error", world.status())

    def test_control_replies_are_the_same_with_all_new_options_in_the_file_as_without(self):
        def replies(extra, options):
            world = World(account("x", extra) + account("y") + options)
            secret_command = "client_secret_cmd" in extra
            told = [world.ask(request) for request in (
                "info:", "status:", "showtoken:withouturl x", "showtoken:withurl x",
                "refresh:withurl y", "refresh:withouturl nope", "oops", "status:more", "revoke:y")]
            world.approve()
            if secret_command:
                world.commands.pop().end(0, b"secret")
            told.append(world.ask("showtoken:withurl x"))
            world.posts.pop().grant(expires_in=60)
            told += [world.ask(request) for request in (
                "showtoken:withurl x", "status:", "refresh:withurl x", "restore:junk")]
            dump = world.dump()
            told += [len(dump) > 100, world.ask("revoke:x"), world.restore(dump), world.show()]
            world.clock.advance(61)
            told += [world.ask("showtoken:withurl x"), world.ask("showtoken:withurl x")]
            world.ask("shutdown:")
            return told

        new = ('client_secret_cmd = "pass"; client_auth = "basic"; issuer = "https://i.example";'
               ' token_uri_fields = {"audience": "mail"}; revoke_uri = "https://r.example/";'
               ' expect_user = "me";')
        with unittest.mock.patch("secrets.token_urlsafe", lambda size: "s" * size):
            self.assertEqual(replies(new, 'https_cert = "/c"; https_key = "/k";'), replies("", ""))

    def test_revoke_tells_the_provider_in_the_background(self):
        for refresh_token, kind in (("rt1", "refresh_token"), (None, "access_token")):
            world = self.pending('revoke_uri = "https://r.example/revoke"; client_secret = "s";')
            world.posts.pop().grant(refresh_token=refresh_token)
            self.assertEqual(world.ask("revoke:x"), "ok:")
            self.assertEqual(world.status(), "ok:x: No access token")
            post = world.posts.pop()
            self.assertEqual((post.uri, post.form), ("https://r.example/revoke", {
                "client_id": "cid", "client_secret": "s", "token": refresh_token or "at1",
                "token_type_hint": kind}))
            login = world.show()
            post.answer(200, b"")
            self.assertEqual((world.show(), world.auth._errors), (login, {}))

    def test_a_revocation_that_waits_for_the_secret_ends_with_a_reload(self):
        extra = 'revoke_uri = "https://r.example/"; client_secret_cmd = "c";'
        for text in (account("y"), account("x", 'client_secret = "new";'), account("x", extra)):
            world = self.pending(extra)
            world.commands.pop().end(0, b"old")
            world.posts.pop().grant()
            world.auth._secrets.clear()
            world.ask("revoke:x")
            command = world.commands.pop()
            world.reload(text)
            command.end(0, b"old")
            self.assertEqual((world.posts, world.auth._secrets), ([], {}))
            self.assertIn((pizauth.ERROR, "x is not revoked at the provider: the configuration was"
                           " reloaded meanwhile"), world.logged)

    def test_a_revocation_that_fails_is_told_and_changes_nothing(self):
        world = self.pending('revoke_uri = "https://r.example/revoke";')
        world.posts.pop().grant("at1", "rt1")
        world.ask("revoke:x")
        login = world.show()
        world.posts.pop().answer(503, b"rt1")
        self.assertEqual(world.show(), login)
        self.assertNotIn("revoked here", world.status())  # of the new login
        self.assertIn("x is revoked here, but not at the provider: HTTP 503",
                      [text for _, text in world.logged])
        world = self.pending('revoke_uri = "https://r.example/revoke";')
        world.posts.pop().grant("at1", "rt1")
        world.ask("revoke:x")
        world.posts.pop().answer(503, b"rt1")
        self.assertRegex(world.status(), "x is revoked here, but not at the provider: HTTP 503$")

    def test_nothing_is_revoked_where_there_is_no_token_or_no_address(self):
        world = World(account("x", 'revoke_uri = "https://r.example/revoke";'))
        world.show()
        world.ask("revoke:x")
        self.assertEqual(world.posts, [])
        world = World.authorised()
        world.ask("revoke:x")
        self.assertEqual(world.posts, [])

    def test_a_wrong_issuer_is_refused_and_the_login_waits(self):
        world = World(account("x", 'issuer = "https://i.example";'))
        for more in ("&code=c&iss=https://evil.example", "&code=c&iss=", "&error=no&iss=%1b[2Jx",
                     "&code=c&iss=https://i.example/"):
            (page,) = world.visit(f"/?state={world.state()}{more}")
            status, text = text_of(page)
            self.assertEqual(status, 400)
            self.assertIn("The answer is not https://i.example&#x27;s: its &#x27;iss&#x27;", text)
            (reply,) = world.park(f"complete:state={world.state()}{more}")
            self.assertIn("error:The answer is not https://i.example's", reply)
            self.assertTrue(reply.isprintable())
        self.assertEqual(world.posts, [])
        (page,) = world.visit(f"/?state={world.state()}&code=c&iss=x&iss=https://i.example")
        self.assertEqual(text_of(page)[0], 400)
        world.visit(f"/?state={world.state()}&code=c&iss=https://i.example")
        self.assertEqual(world.posts.pop().form["code"], "c")

    def test_a_missing_issuer_is_tolerated_until_it_has_been_seen(self):
        world = World(account("x", 'issuer = "https://i.example";'))
        world.authorise()
        world.ask("revoke:x")
        world.visit(f"/?state={world.state()}&code=c&iss=https://i.example")
        world.posts.pop().grant()
        world.ask("revoke:x")
        (page,) = world.approve()
        self.assertIn("its &#x27;iss&#x27; is missing", text_of(page)[1])
        self.assertEqual(world.posts, [])
        world = World()  # without the option nothing is compared
        world.visit(f"/?state={world.state()}&code=c&iss=https://any.example")
        self.assertEqual(len(world.posts), 1)

    def test_tokens_of_somebody_else_are_dropped_and_the_person_is_told(self):
        me = "Me@Example.com"
        for fields, right in (
            ({"id_token": jwt(email="me@example.COM")}, True),
            ({"id_token": jwt(preferred_username="me@example.com", email="alias@x")}, True),
            ({"id_token": jwt(upn="me@example.com")}, True),
            ({"access_token": jwt(upn="me@example.com")}, True),
            ({"id_token": jwt(sub="1"), "access_token": jwt(upn="me@example.com")}, True),
            ({"id_token": jwt(email="you@example.com")}, False),
            ({"id_token": jwt(email="you@example.com"), "access_token": jwt(upn=me)}, False),
            ({"access_token": jwt(preferred_username="you@example.com")}, False),
        ):
            for text in (account, lambda name, extra: DEVICE.format(name, extra)):
                with self.subTest(fields=fields):
                    world = World(text("x", f'expect_user = "{me}";')
                                  + 'error_notify_cmd = "e"; token_event_cmd = "t";')
                    if text is account:
                        world.approve()
                    else:
                        world.park("showtoken:withurl x")
                        world.posts.pop().answer(**CODE)
                        world.wait(5)
                    world.posts.pop().grant(**fields)
                    self.assertEqual(world.show().startswith("access_token:") if right else
                                     "No access token" in world.status(), True)
                    told = [command.variables["PIZAUTH_MSG"] for command in world.commands
                            if command.command == "e"]
                    self.assertEqual(told, [] if right else [
                        "Authentication for x failed: you@example.com has logged in: log in as"
                        " Me@Example.com, perhaps in a private window"])

    def test_where_no_claim_tells_who_has_logged_in_that_is_a_warning(self):
        for token in ("opaque", "a.b.c", "a.%%%.c", jwt(email=5), jwt(), "..", "a." + "x" * 9999,
                      jwt(email=["me"])):
            world = self.pending('expect_user = "me";')
            world.posts.pop().grant(access_token=token, id_token=token)
            self.assertEqual(world.show(), f"access_token:{token}")
            self.assertIn((pizauth.WARNING, "x: the provider does not say who has logged in, so"
                           " that expect_user is of no use"), world.logged)

    def test_a_name_of_any_length_is_cut(self):
        world = self.pending('expect_user = "me";')
        world.posts.pop().grant(id_token=jwt(email="x" * 300_000))
        self.assertLess(len(world.status()), 600)

    def test_a_refresh_is_not_asked_whose_it_is(self):
        world = self.pending('expect_user = "me";')
        world.posts.pop().grant(id_token=jwt(email="me"))
        world.wait(2)
        world.refresh()
        world.posts.pop().grant("at2", id_token=jwt(email="you"))
        self.assertEqual(world.show(), "access_token:at2")


# ---- What `show` may be asked besides ----


class ShowTest(unittest.TestCase):
    """The option words of `showtoken`, and `status:json`."""

    def show(self, world, *words, name="x"):
        """The reply, if there is one yet, to `showtoken` with these words."""
        return world.park(f"showtoken:{','.join(words)} {name}")

    def test_every_word_alone_and_every_pair_on_a_token(self):
        world = World(account("x", 'scopes = ["a", "b"];'))
        world.authorise(access_token="at1", expires_in=3600)
        about = {"access_token": "at1", "token_type": "Bearer", "account": "x", "scope": "a b",
                 "expires_at": int(world.clock.wall()) + 3600}
        words = ("withurl", "withouturl", "wait=5", "life=3600", "json", "unknown", "")
        for first in words:
            for second in words:
                with self.subTest(first=first, second=second):
                    (reply,) = self.show(world, first, second)
                    kind, _, text = reply.partition(":")
                    self.assertEqual(kind, "access_token")
                    if "json" in (first, second):
                        self.assertEqual(json.loads(text), about)
                    else:
                        self.assertEqual(text, "at1")

    def test_bad_values_are_refused_by_a_sentence_and_change_nothing(self):
        world = World()
        for word in ("wait=", "wait", "wait=x", "wait=-1", "wait=1.5", "wait=86401", "wait=1e9",
                     "life=", "life", "life=999999", "life=٣", "wait=" + "9" * 5000):
            with self.subTest(word=word[:20]):
                (reply,) = self.show(world, "withurl", word)
                self.assertEqual(reply, f"error:'{word[:4]}' takes a number of seconds, at most"
                                        " 86400")
        self.assertEqual(world.status(), "ok:x: No access token")

    def test_the_url_is_given_if_any_word_is_withurl(self):
        world = World()
        for words, given in ((("withurl",), True), (("json", "withurl"), True),
                             (("life=5", "withurl", "json"), True), (("json",), False),
                             (("withouturl", "life=5"), False), (("withurlx",), False)):
            (reply,) = self.show(world, *words)
            self.assertEqual(reply != "pending:", given)

    def test_two_hundred_clients_wait_for_one_authorisation_and_are_answered_at_once(self):
        world = World()
        waiting = [self.show(world, "withurl", "wait=600") for _ in range(200)]
        other = self.show(world, "withurl", "wait=600", name="nope")
        self.assertTrue(other[0].startswith("error:No account"))
        state = world.state()
        world.visit(f"/?state={state}&code=c")
        world.wait(20)
        self.assertEqual(waiting, [[]] * 200)
        world.posts.pop().grant("at1")
        self.assertEqual(waiting, [["access_token:at1"]] * 200)
        self.assertEqual(world.auth._waiters, [])

    def test_the_outcome_of_what_is_waited_for_is_told_whatever_it_is(self):
        sealed = World.dump(World.authorised(access_token="restored"))
        for act, reply in (
            (lambda world: world.visit(f"/?state={world.state()}&error=access_denied"),
             "error:Authentication for x failed: access_denied"),
            (lambda world: world.ask("revoke:x"), "error:This authorization request is void"),
            (lambda world: world.reload(account("y")), "error:This authorization request is void"),
            (lambda world: world.restore(sealed), "access_token:restored"),
            (lambda world: (world.ask("shutdown:"), world.auth.answer_waiting()),
             "error:pizauth was stopped"),
            (lambda world: world.wait(60), f"pending:{World().show()[8:20]}"),
        ):
            world = World()
            replies = self.show(world, "withurl", "wait=60")
            world.wait(59.9)
            self.assertEqual(replies, [])
            act(world)
            self.assertEqual(len(replies), 1)
            self.assertTrue(replies[0].startswith(reply), replies)

    def test_a_refresh_is_waited_for_over_failures(self):
        world = World()
        world.authorise(expires_in=60)
        world.clock.advance(60)
        replies = self.show(world, "withurl", "wait=300", "json")
        for _ in range(3):
            world.posts.pop().fail()
            world.wait(40)
        self.assertEqual(replies, [])
        world.posts.pop().grant("at2")
        self.assertIn('access_token:{"access_token": "at2"', replies[0])

    def test_a_lost_login_is_told_to_whom_waits_for_a_refresh(self):
        world = World()
        world.authorise(expires_in=60)
        world.clock.advance(60)
        replies = self.show(world, "withurl", "wait=300")
        world.posts.pop().answer(400, error="invalid_grant")
        self.assertTrue(replies[0].startswith(
            "error:Refreshing x failed: HTTP 400: invalid_grant. The login is too old, used up"))

    def test_a_device_code_ends_no_wait(self):
        world = World(DEVICE.format("x", ""))
        waiting = self.show(world, "withurl", "wait=100")
        plain = self.show(world, "withurl")
        world.posts.pop().answer(**CODE)
        self.assertEqual((waiting, plain), ([], [PENDING]))
        world.wait(5)
        world.posts.pop().grant("at1")
        self.assertEqual(waiting, ["access_token:at1"])

    def test_a_token_with_too_little_life_is_refreshed_first(self):
        world = World()
        world.authorise(expires_in=3600)
        world.wait(2000)
        self.assertEqual(self.show(world, "life=1600"), ["access_token:at1"])
        self.assertEqual(world.posts, [])
        soon = "error:Access token will expire too soon. Refreshing "
        self.assertEqual(self.show(world, "life=1601"), [soon + "initiated"])
        self.assertEqual(self.show(world, "life=1601"),
                         [soon + "is in progress but has not yet succeeded"])
        self.assertEqual(self.show(world), ["access_token:at1"])
        waiting = self.show(world, "life=1601", "wait=9")
        world.posts.pop().grant("at2")
        self.assertEqual(waiting, ["access_token:at2"])

    def test_tokens_that_never_last_so_long_are_an_error_and_no_storm(self):
        world = World()
        world.authorise(expires_in=60)
        told = "error:The access tokens of x last only {} s: give -l less than that"
        for words in (("life=61",), ("life=61", "wait=5")):
            self.assertEqual(self.show(world, *words), [told.format(60)])
        self.assertEqual(world.posts, [])
        world.wait(2)
        self.assertEqual(self.show(world, "life=60"), [told.format(60)])
        waiting = self.show(world, "life=59", "wait=5")
        world.posts.pop().grant("short", expires_in=30)
        self.assertEqual(waiting, [told.format(30)])

    def test_without_a_refresh_token_too_little_life_is_an_error_with_its_end(self):
        world = World()
        world.authorise(refresh_token=None, expires_in=60)
        world.wait(20)
        for words in (("life=50",), ("life=50", "wait=5")):
            (reply,) = self.show(world, *words)
            self.assertIn("error:'x' has no refresh token; its access token lasts until", reply)

    def test_status_as_json(self):
        world = World(account("b") + account("a") + DEVICE.format("d", ""))
        rows = {row["account"]: row for row in json.loads(world.ask("status:json")[3:])}
        self.assertEqual(list(rows), ["a", "b", "d"])
        nothing = dict.fromkeys(("obtained_at", "expires_at", "last_error", "last_error_at", "url",
                                 "user_code"))
        self.assertEqual(rows["a"], {"account": "a", "state": "empty", "refresh_token": False,
                                     **nothing})
        url, wall = world.show("a")[8:], int(world.clock.wall())
        world.authorise("b", expires_in=60)
        world.park("showtoken:withurl d")
        world.posts.pop().answer(**CODE)
        world.refresh("b")
        world.posts.pop().fail("down")
        rows = {row["account"]: row for row in json.loads(world.ask("status:json")[3:])}
        self.assertEqual(rows["a"], {**nothing, "account": "a", "state": "pending", "url": url,
                                     "refresh_token": False})
        self.assertEqual(rows["b"], {
            **nothing, "account": "b", "state": "active", "obtained_at": wall,
            "expires_at": wall + 60, "last_error_at": wall, "refresh_token": True,
            "last_error": "Refreshing b failed, and will be tried again: down"})
        self.assertEqual(rows["d"]["user_code"], "ABCD-EFGH")
        world.clock.advance(60)
        rows = {row["account"]: row for row in json.loads(world.ask("status:json")[3:])}
        self.assertEqual(rows["b"]["state"], "expired")
        self.assertNotIn("at1", world.ask("status:json"))


# ---- The control protocol ----


class ControlTest(unittest.TestCase):
    def setUp(self):
        self.world = World(account("x") + account('a b "q" é'.replace('"', '\\"')))

    def test_a_request_about_one_account_does_not_iterate_over_the_others(self):
        world = World(account("x") + account("y"))
        walk = unittest.mock.patch.object(world.auth, "_appointments", side_effect=AssertionError)
        with walk:
            for request in ("showtoken:withurl x", "showtoken:withurl x", "refresh:withurl x",
                            "revoke:x", "refresh:withurl x"):
                self.assertNotIn("error:", world.ask(request))
        world.authorise()
        with walk:
            self.assertEqual(world.show(), "access_token:at1")
            self.assertEqual(world.refresh(), "scheduled:")
        self.assertEqual(len(world.posts), 1)

    def test_unknown_requests(self):
        for request in ("", "status", "nonsense:", "showtoken withurl x", ":", "STATUS:"):
            reply = self.world.ask(request)
            self.assertTrue(reply.startswith("error:") and len(reply) > 20, reply)

    def test_a_request_that_takes_nothing_refuses_what_follows_its_colon(self):
        self.world.authorise()
        for verb in ("dump", "info", "reload", "status", "shutdown"):
            for rest in ("x", " ", "x y", "\n"):
                self.assertEqual(self.world.ask(f"{verb}:{rest}"),
                                 f"error:Nothing may follow '{verb}:' in this version")
        self.assertFalse(self.world.auth.stopping)

    def test_a_name_that_is_not_utf8_is_unknown(self):
        replies = []
        answered("control", self.world.auth.control, b"showtoken:withurl \xff\xfe",
                 replies.append)
        self.assertTrue(replies[0].startswith(b"error:No account '"))

    def test_unknown_account(self):
        for verb in ("showtoken", "refresh"):
            for name in ("nope", ""):
                reply = self.world.ask(f"{verb}:withurl {name}".rstrip())
                self.assertTrue(reply.startswith(f"error:No account '{name}': the accounts are "))

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
        self.world.auth.about_server = {"config_file": "/c"}
        self.assertEqual(json.loads(self.world.ask("info:"))["config_file"], "/c")

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

    def test_without_accounts_status_says_so(self):
        self.world.auth.reconfigure(pizauth.Config(accounts={}), {})
        self.assertEqual(self.world.status(), "error:No accounts configured")

    def test_revoke_forgets_that_account_in_any_state_and_no_other(self):
        self.assertIn("error:No account 'nope'", self.world.ask("revoke:nope"))
        for before in (lambda: None, self.world.show, self.world.authorise):
            before()
            self.assertEqual(self.world.ask("revoke:x"), "ok:")
            self.assertIn("x: No access token", self.world.status().split("\n"))
        name = 'a b "q" é'
        self.world.authorise(name)
        self.world.ask("revoke:x")
        self.assertEqual(self.world.show(name), "access_token:at1")

    def test_shutdown_is_not_answered(self):
        self.assertIsNone(self.world.ask("shutdown:"))
        self.assertTrue(self.world.auth.stopping)

    def test_while_stopping_no_refresh_is_started(self):
        self.world.authorise()
        self.world.ask("shutdown:")
        self.assertEqual((self.world.refresh(), self.world.posts), ("scheduled:", []))

    def test_a_truncated_request_is_an_error(self):
        request = b"showtoken:withurl x"
        for end in range(len(request)):
            replies = []
            answered("control", self.world.auth.control, request[:end], replies.append)
            self.assertEqual(len(replies), 1)
            self.assertTrue(replies[0].startswith(b"error:"))


# ---- Shell commands, dump and restore, reload, revoke ----


class HooksTest(unittest.TestCase):
    """Shell commands as the authenticator asks for them."""

    def world(self, *options):
        return World(account("x") + account("y") + "".join(f'{o} = "do {o}";' for o in options))

    def test_auth_notify_cmd_runs_at_each_request_and_then_at_every_interval(self):
        world = self.world("auth_notify_cmd")
        url = world.show().partition(":")[2]
        world.wait(0)
        (first,) = world.commands
        self.assertEqual(first.command, "do auth_notify_cmd")
        self.assertEqual(first.variables, {"PIZAUTH_ACCOUNT": "x", "PIZAUTH_URL": url,
                                           "PIZAUTH_CODE": ""})
        self.assertEqual(first.limit, float("inf"))
        world.show()
        first.end()
        world.wait(899)
        self.assertEqual(len(world.commands), 1)
        world.wait(1)
        self.assertEqual(len(world.commands), 2)
        world.refresh()
        world.wait(1)
        fresh = world.commands[-1]
        self.assertEqual(len(world.commands), 3)
        self.assertNotEqual(fresh.variables["PIZAUTH_URL"], url)
        fresh.end()
        world.approve()
        world.posts.pop().grant(expires_in=36000)
        world.wait(3600)
        self.assertEqual(len(world.commands), 3)
        self.assertFalse(any(command.cancelled for command in world.commands))

    def test_a_reminder_is_left_out_while_the_last_one_runs_and_a_fresh_request_is_not(self):
        world = self.world("auth_notify_cmd")
        world.show()
        start = world.clock.now()
        world.wait(2000)  # a browser that stays open, say
        self.assertEqual(len(world.commands), 1)
        self.assertIn(f"(last notification {world.clock.date(start)})", world.status())
        world.refresh()
        world.wait(0)
        self.assertEqual(len(world.commands), 2)
        world.commands[0].end()  # which is no end of the fresh one
        world.wait(900)
        self.assertEqual(len(world.commands), 2)
        world.commands[1].end()
        world.wait(900)
        self.assertEqual(len(world.commands), 3)

    def test_fresh_requests_are_notified_once_a_second_at_most(self):
        """As with auth_notify_cmd = "pizauth refresh x", or one that ends with revoke and show."""
        for verbs in (("refresh:withurl x",), ("revoke:x", "showtoken:withurl x")):
            world, ran = World(account() + 'auth_notify_cmd = "n";'), 0
            world.show()
            for _ in range(100):
                world.wait(0.1)
                for command in world.commands:
                    ran += 1
                    command.end()
                    for verb in verbs:
                        world.ask(verb)
                world.commands.clear()
            self.assertIn(ran, (10, 11))

    def test_with_an_interval_of_0s_a_reminder_comes_every_second(self):
        world = World(account() + 'auth_notify_cmd = "x"; auth_notify_interval = 0s;')
        world.show()
        ran = 0
        for _ in range(100):
            world.wait(0.1)
            for command in world.commands:
                command.end()
            ran += len(world.commands)
            world.commands.clear()
        self.assertIn(ran, (10, 11))

    def test_lost_logins_go_to_error_notify_cmd_or_else_to_the_log(self):
        message = f"Refreshing x failed: HTTP 400: invalid_grant. {ENDED}"
        for options in ((), ("error_notify_cmd",)):
            world = self.world(*options)
            world.authorise()
            world.refresh()
            world.posts.pop().answer(400, error="invalid_grant")
            self.assertEqual((pizauth.ERROR, message) in world.logged, not options)
            if options:
                (command,) = world.commands
                expected = {"PIZAUTH_ACCOUNT": "x", "PIZAUTH_MSG": message}
                self.assertEqual((command.variables, command.limit), (expected, 60))

    def test_the_cause_and_the_next_step_are_in_pizauth_msg_and_in_status(self):
        world = self.world("error_notify_cmd")
        world.authorise()
        world.refresh()
        world.posts.pop().answer(400, error="invalid_grant", error_description=(
            "AADSTS50173: The provided grant has expired due to it being revoked." + TRACE * 5))
        told = world.commands.pop().variables["PIZAUTH_MSG"]
        self.assertRegex(told, "^Refreshing x failed: HTTP 400: invalid_grant: AADSTS50173: The .*"
                               r"\. The password was changed or the login revoked: log in again$")
        self.assertTrue(world.status().partition("\n")[0].endswith(told), world.status())

    def test_error_notify_cmd_runs_for_failed_logins_but_not_for_transient_failures(self):
        world = self.world("error_notify_cmd")
        world.visit(f"/?state={world.state()}&error=access_denied")
        expected = f"Authentication for x failed: access_denied. {DENIED}"
        self.assertEqual(world.commands.pop().variables["PIZAUTH_MSG"], expected)
        world.authorise()
        world.refresh()
        world.posts.pop().fail()
        self.assertEqual(world.commands, [])

    def test_events_are_told_one_at_a_time_in_order_over_all_accounts(self):
        world = self.world("token_event_cmd")
        world.authorise("x")
        world.authorise("y", refresh_token=None, expires_in=60)
        world.ask("revoke:x")
        world.wait(60)
        told = []
        while world.commands:
            (command,) = world.commands
            world.commands.clear()
            self.assertEqual((command.command, command.limit), ("do token_event_cmd", 60))
            told.append((command.variables["PIZAUTH_ACCOUNT"], command.variables["PIZAUTH_EVENT"]))
            self.assertTrue(world.auth.events)
            command.end(1 if len(told) == 2 else 0)
        self.assertEqual(told, [("x", "token_new"), ("y", "token_new"), ("x", "token_revoked"),
                                ("y", "token_invalidated")])
        self.assertIn((pizauth.ERROR, "token_event_cmd for y: ended with status 1"), world.logged)
        self.assertFalse(world.auth.events)

    def test_what_fires_an_event_and_what_does_not(self):
        def events(*acts):
            world = self.world("token_event_cmd")
            for act in acts:
                act(world)
                world.wait(1)
            told = []
            while world.commands:
                command = world.commands.pop(0)
                told.append(command.variables["PIZAUTH_EVENT"])
                command.end()
            return told

        def refused(world):
            world.refresh()
            world.posts.pop().answer(400, error="invalid_grant")

        def refreshed(world):
            world.refresh()
            world.posts.pop().grant("at2")

        def failed(world):
            world.refresh()
            world.posts.pop().fail()

        def denied(world):
            world.visit(f"/?state={world.state()}&error=e")

        self.assertEqual(events(World.show, World.refresh), [])
        self.assertEqual(events(denied), [])
        self.assertEqual(events(World.authorise), ["token_new"])
        told = events(World.authorise, refreshed, failed)
        self.assertEqual(told, ["token_new", "token_refreshed"])
        self.assertEqual(events(World.authorise, refused), ["token_new", "token_invalidated"])
        for before in (lambda world: None, World.show, World.authorise):
            told = events(before, lambda world: world.ask("revoke:x"))
            self.assertEqual(told[-1], "token_revoked")
        reload = lambda world: world.reload(account("x", 'scopes = ["new"];'))  # noqa: E731
        self.assertEqual(events(World.authorise, reload), ["token_new"])
        dump = World.dump(World.authorised())
        self.assertEqual(events(lambda world: world.restore(dump)), [])

    def test_every_sixth_failure_in_a_row_asks_transient_error_if_cmd(self):
        for status, output, lost in ((0, b"", False), (1, b"", True), (None, b"", True),
                                     (126, b"", False), (127, b"", False), (-9, b"", True),
                                     (0, b"cannot start", False)):
            with self.subTest(status=status, output=output):
                world = self.world("transient_error_if_cmd", "token_event_cmd")
                world.authorise(expires_in=36000)
                world.commands.pop().end()
                for failures in range(1, 7):
                    self.assertEqual((world.refresh(), world.commands), ("scheduled:", []))
                    world.wait(1)
                    world.posts.pop().fail()
                    self.assertEqual(len(world.commands), failures == 6)
                command = world.commands.pop()
                self.assertEqual(command.variables, {"PIZAUTH_ACCOUNT": "x"})
                self.assertEqual(command.limit, 180)
                self.assertEqual(world.refresh(), "scheduled:")
                self.assertEqual(world.show(), "access_token:at1")
                world.wait(100)
                self.assertEqual(world.posts, [])  # while it runs the refresh counts as running
                command.end(status, output)
                self.assertEqual("No access token" in world.status().split("\n")[0], lost)
                events = [command.variables["PIZAUTH_EVENT"] for command in world.commands]
                self.assertEqual(events, ["token_invalidated"] if lost else [])
                world.wait(40)
                self.assertEqual(len(world.posts), not lost)

    def test_while_stopping_transient_error_if_cmd_ends_no_login(self):
        world = self.world("transient_error_if_cmd")
        world.authorise(expires_in=36000)
        for _ in range(6):
            world.refresh()
            world.wait(1)
            world.posts.pop().fail()
        world.ask("shutdown:")
        world.commands.pop().end(1)
        self.assertEqual(world.show(), "access_token:at1")

    def test_a_success_resets_the_count_of_failures(self):
        world = self.world("transient_error_if_cmd")
        world.authorise(expires_in=36000)
        for outcome in [Post.fail] * 5 + [Post.grant] + [Post.fail] * 5:
            world.refresh()
            world.wait(1)
            outcome(world.posts.pop())
        self.assertEqual(world.commands, [])

    def test_a_verdict_on_a_token_revoked_meanwhile_is_dropped(self):
        world = self.world("transient_error_if_cmd")
        world.authorise(expires_in=36000)
        for _ in range(6):
            world.refresh()
            world.wait(1)
            world.posts.pop().fail()
        command = world.commands.pop()
        world.ask("revoke:x")
        self.assertTrue(command.cancelled)
        world.authorise(access_token="at2")
        command.end(1)
        self.assertEqual(world.show(), "access_token:at2")


class DumpTest(unittest.TestCase):
    """The dump's cipher, its format, and what is restored."""

    def test_chacha20_and_poly1305_are_those_of_rfc_8439(self):
        key = bytes(range(32))
        text = (b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for"
                b" the future, sunscreen would be it.")
        got = pizauth.chacha20(key, 1, bytes.fromhex("000000000000004a00000000"), text)  # 2.4.2
        self.assertEqual(got.hex(), (
            "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593d"
            "abcd62b3571639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16cc"
            "f806818ce91ab77937365af90bbf74a35be6b40b8eedf2785e42874d"))
        one_time = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
        tag = pizauth.poly1305(one_time, b"Cryptographic Forum Research Group")  # 2.5.2
        self.assertEqual(tag.hex(), "a8061dc1305136c6c22b8baf0c0127a9")
        keystream = pizauth.chacha20(bytes.fromhex("808182838485868788898a8b8c8d8e8f90919293949596"
                                                   "9798999a9b9c9d9e9f"), 0,
                                     bytes.fromhex("000000000001020304050607"), bytes(32))  # 2.6.2
        self.assertEqual(keystream.hex(),
                         "8ad5a08b905f81cc815040274ab29471a833b637e3fd0da508dbb8e2fdd1a646")
        for size in (0, 1, 63, 64, 65, 200):  # blocks are independent of what follows them
            plain = bytes(range(200))[:size]
            whole = pizauth.chacha20(key, 7, bytes(12), bytes(range(200)))
            self.assertEqual(pizauth.chacha20(key, 7, bytes(12), plain), whole[:size])

    def test_poly1305_at_its_edges(self):
        for key, data, tag in (  # RFC 8439 A.3, vectors 7 to 11
            ("01", "ff" * 16 + "f0" + "ff" * 15 + "11" + "00" * 15, "05"),
            ("01", "ff" * 16 + "fb" + "fe" * 15 + "01" * 16, "00"),
            ("02", "fd" + "ff" * 15, "fa" + "ff" * 15),
        ):
            got = pizauth.poly1305(bytes.fromhex(key).ljust(32, b"\0"), bytes.fromhex(data))
            self.assertEqual(got, bytes.fromhex(tag).ljust(16, b"\0"))

    def test_the_originals_dumps_are_read_and_written_back(self):
        for row in ORIGINAL_DUMPS:
            with self.subTest(what=row["what"]):
                dump = base64.b64decode(row["dump"])
                plain = pizauth.decrypt_dump(dump)
                self.assertEqual(pizauth.encrypt_dump(dump[:12], plain), dump)
                got = pizauth.read_dump(plain)
                expected = row["accounts"]
                self.assertEqual(
                    {name: json.loads(json.dumps(options)) for name, (options, _) in got.items()},
                    {name: [one["account"], {}] for name, one in expected.items()})
                for name, (_, token) in got.items():
                    self.check_state(token, expected[name]["state"])
                again = pizauth.dump_bytes([
                    (pizauth.Account(name=name, **options), token)
                    for name, ((options, _), token) in got.items()], 0)
                self.assertEqual(again[-8:], bytes(8))  # no extensions
                self.assertEqual(len(again) - 8, len(plain))
                self.assertEqual(self.known(again), self.known(plain))

    def known(self, plain):
        return [(name, options, token and vars(token))
                for name, (options, token) in pizauth.read_dump(plain).items()]

    def check_state(self, token, state):
        """Compare a token with what dumps.json tells of it."""
        self.assertEqual(token is None, state is None)
        if token is not None:
            self.assertEqual((token.access_token, token.refresh_token),
                             (state["access_token"], state["refresh_token"]))
            for moment, field in ((token.obtained_at, "obtained"), (token.expires_at, "expires")):
                seconds, nanoseconds = state[field]
                self.assertAlmostEqual(moment, seconds + nanoseconds / 1e9, places=5)

    def test_extension_options_must_be_equal_and_do_not_change_the_originals_part(self):
        class Extended(pizauth.Account):
            flavour: str | None = pizauth.option("string", default=None, dump="extension")
            extras: tuple = pizauth.option("pairs", default=(), dump="extension")

        plain = World.authorised().dump()
        with unittest.mock.patch.object(pizauth, "Account", Extended):
            options = 'flavour = "ü"; extras = {"a": "b"};'
            world = World(account("x", options))
            world.authorise()
            extended = world.dump()
            for dump, extra, restores in (
                (extended, options, True), (extended, 'flavour = "ü";', False),
                (extended, "", False), (plain, "", True), (plain, options, False),
                (World.authorised().dump(), "", True),
            ):
                with self.subTest(extra=extra):
                    target = World(account("x", extra))
                    self.assertEqual(target.restore(dump), "ok:")
                    self.assertEqual(target.show() == "access_token:at1", restores)
                    target = World(account("x", options))
                    target.authorise()
                    target.reload(account("x", extra))
                    self.assertEqual(target.show() == "access_token:at1", extra == options)
        self.assertEqual(World().restore(extended), "ok:")  # an older version passes it over
        with_none, with_some = map(pizauth.decrypt_dump, (plain, extended))
        self.assertEqual(with_some[: len(with_none) - 8 - 60], with_none[:-8 - 60])

    def test_a_dump_with_a_token_that_is_none_is_bad_and_changes_nothing(self):
        for token in ("", "a\nb", "a b", "\n", "caf\u00e9", "a\x7f"):
            for field in ("access_token", "refresh_token"):
                with self.subTest(token=token, field=field):
                    source = World(account("x") + account("y"))
                    for name in "xy":
                        source.authorise(name)
                    setattr(source.auth._tokens["y"], field, token)
                    target = World(account("x") + account("y"))
                    self.assertTrue(target.restore(source.dump()).startswith(
                        "error:This dump holds an invalid token"))
                    self.assertNotIn("Active", target.status())

    def test_an_original_dump_restores_here(self):
        row = ORIGINAL_DUMPS[-1]
        text = ""
        for name, given in row["accounts"].items():
            options = given["account"]
            quoted = name.replace('"', '\\"')
            fields = ", ".join(f'"{key}": "{value}"' for key, value in options["auth_uri_fields"])
            scopes = ", ".join(f'"{scope}"' for scope in options["scopes"])
            secret = options["client_secret"]
            text += (
                f'account "{quoted}" {{ auth_uri = "{options["auth_uri"]}";'
                f' token_uri = "{options["token_uri"]}"; client_id = "{options["client_id"]}";'
                f' redirect_uri = "{options["redirect_uri"]}"; scopes = [{scopes}];'
                f" auth_uri_fields = {{{fields}}};"
                + (f' client_secret = "{secret}";' if secret is not None else "") + "}\n")
        world = World(text)
        world.clock.offset = 1_795_376_650 - world.clock.moment
        self.assertEqual(world.restore(base64.b64decode(row["dump"])), "ok:")
        self.assertEqual(world.show('work é "q"'), "access_token:at5")
        self.assertEqual(world.show("home"), "access_token:at7")
        self.assertTrue(world.show("pending").startswith("pending:"))

    def dumps(self):
        """The original's dumps, and one of ours."""
        return [*(base64.b64decode(row["dump"]) for row in ORIGINAL_DUMPS),
                World.dump(World.authorised())]

    def test_every_changed_bit_and_every_truncation_is_refused_and_changes_nothing(self):
        world = World()
        before = world.status()
        for sealed in self.dumps():
            for at in range(len(sealed)):
                bit = bytes([sealed[at] ^ 1 << at % 8])
                for changed in (sealed[:at], sealed[:at] + bit + sealed[at + 1 :]):
                    self.assertTrue(world.restore(changed).startswith("error:This is no dump"))
        self.assertEqual(world.status(), before)

    def test_a_correctly_encrypted_dump_that_makes_no_sense_is_refused(self):
        world = World()
        before = world.status()
        whole = len(pizauth.decrypt_dump(self.dumps()[-1])) - 8  # without its extensions
        for plain in map(pizauth.decrypt_dump, self.dumps()):
            cases = [plain[:at] for at in range(len(plain)) if at != whole]
            cases.append((2).to_bytes(8, "little") + plain[8:])  # the version
            name = 24 + int.from_bytes(plain[16:24], "little")
            huge = (1 << 63).to_bytes(8, "little")
            cases += [plain[:at] + huge + plain[at + 8 :]  # accounts, and lengths of two strings
                      for at in (8, 16, name)]
            cases.append(plain[:24] + b"\xff" + plain[25:])
            for case in cases:
                reply = world.restore(pizauth.encrypt_dump(bytes(12), case))
                self.assertTrue(reply.startswith("error:This dump"), reply)
        plain = pizauth.decrypt_dump(self.dumps()[-1])
        at = plain.index(b"at1") - 12
        for case in (plain[:at] + b"\2" + plain[at + 1 :], plain[:-20] + b"\2" + plain[-19:]):
            reply = world.restore(pizauth.encrypt_dump(bytes(12), case))
            self.assertIn("of a kind that this version does not know", reply)
        self.assertEqual(world.status(), before)

    def test_a_changed_client_secret_cmd_restores_nothing(self):
        first, second = (account("x", f'client_secret_cmd = "{word}";') for word in "ab")
        world = World(second)
        world.restore(World(first).sealed())
        self.assertEqual(world.status(), "ok:x: No access token")
        world.restore(World(second).sealed())
        self.assertEqual(world.show(), "access_token:at1")

    def test_bytes_after_the_extensions_are_ignored(self):
        plain = pizauth.decrypt_dump(World.dump(World.authorised()))
        world = World()
        self.assertEqual(world.restore(pizauth.encrypt_dump(bytes(12), plain + b"more")), "ok:")
        self.assertEqual(world.show(), "access_token:at1")

    def test_every_security_relevant_option_must_be_equal_and_no_other(self):
        def world(**changed):
            options = {
                "auth_uri": '"http://a"', "token_uri": '"http://t"', "client_id": '"c"',
                "client_secret": '"s"', "scopes": '["a"]', "auth_uri_fields": '{"k": "v"}',
                "redirect_uri": '"http://localhost/"', "login_hint": '"h"', "refresh_retry": "5s",
                "refresh_at_least": "9m", "refresh_before_expiry": "7s", **changed}
            body = " ".join(f"{name} = {value};" for name, value in options.items() if value)
            return World(f'account "x" {{ {body} }}')

        source = world()
        source.authorise()
        sealed = source.dump()
        cases = (
            ("auth_uri", '"http://a/"', False), ("token_uri", '"http://b"', False),
            ("client_id", '"d"', False), ("client_secret", '""', False),
            ("client_secret", "", False), ("scopes", '["a", "b"]', False),
            ("auth_uri_fields", '{"k": "w"}', False), ("redirect_uri", '"http://localhost"', False),
            ("device_auth_uri", '"http://d"', False), ("client_auth", '"basic"', False),
            ("token_uri_fields", '{"k": "v"}', False), ("revoke_uri", '"http://r"', False),
            ("issuer", '"http://i"', False), ("expect_user", '"me"', False),
            ("login_hint", '"me"', True), ("refresh_retry", "6s", True),
            ("refresh_at_least", "1m", True), ("refresh_before_expiry", "1s", True),
        )
        self.assertEqual({option for option, *_ in cases} | {"client_secret_cmd"},
                         set(pizauth.Account.options()))
        for option, value, restores in cases:
            with self.subTest(option=option, value=value):
                target = world(**{option: value})
                self.assertEqual(target.restore(sealed), "ok:")
                self.assertEqual(target.show() == "access_token:at1", restores)
                reloaded = world()
                reloaded.authorise()
                reloaded.auth.reconfigure(target.auth.config, reloaded.auth.ports)
                self.assertEqual(reloaded.show() == "access_token:at1", restores)

    def test_an_active_account_is_left_alone_and_a_pending_one_is_replaced(self):
        sealed = World.dump(World.authorised())
        world = World()
        world.authorise(access_token="newer")
        self.assertEqual((world.restore(sealed), world.show()), ("ok:", "access_token:newer"))
        world = World()
        state = world.state()
        world.restore(sealed)
        (page,) = world.visit(f"/?state={state}&code=c")
        self.assertIn("No pending token", text_of(page)[1])
        self.assertEqual((world.show(), world.posts), ("access_token:at1", []))

    def test_accounts_that_are_not_configured_are_ignored(self):
        world = World(account("other"))
        self.assertEqual(world.restore(World.dump(World.authorised())), "ok:")
        self.assertEqual(world.restore(World.dump(World())), "ok:")

    def test_a_restored_token_keeps_its_expiry_and_is_refreshed_in_time(self):
        world = World()
        world.clock.advance(1000)
        world.restore(World.dump(World.authorised(expires_in=3600)))
        world.wait(2509)
        self.assertEqual((world.show(), world.posts), ("access_token:at1", []))
        world.wait(2)
        self.assertEqual(world.posts.pop().form["refresh_token"], "rt1")
        world.wait(100)
        self.assertTrue(world.show().startswith("error:Access token has expired"))

    def test_tokens_obtained_in_the_future_or_long_ago_count_as_expired(self):
        for years in (-1, 1):
            world = World()
            world.clock.offset += years * 365 * 86400
            world.restore(World.dump(World.authorised(expires_in=3600)))
            world.wait(0)
            self.assertEqual(len(world.posts), 1)
            self.assertNotIn("access_token", world.show())
            world.posts.pop().grant("at2")
            self.assertEqual(world.show(), "access_token:at2")


class ReloadTest(unittest.TestCase):
    """A new configuration, as the authenticator takes it."""

    def test_an_unchanged_account_keeps_its_state_pending_included(self):
        world = World(account("x") + account("y"))
        world.authorise("x")
        pending = world.show("y")
        world.reload(account("y", "refresh_retry = 1s;") + account("x", 'login_hint = "me";'))
        self.assertEqual((world.show("x"), world.show("y")), ("access_token:at1", pending))

    def test_a_changed_account_is_empty_and_work_in_flight_for_it_is_dropped(self):
        world = World()
        world.authorise()
        world.refresh()
        post = world.posts.pop()
        world.reload(account("x", 'client_secret = "new";'))
        self.assertTrue(post.cancelled)
        post.grant("at2")
        self.assertEqual(world.status(), "ok:x: No access token")

    def test_accounts_come_and_go(self):
        world = World(account("x") + account("y"))
        world.authorise("x")
        world.authorise("y")
        world.reload(account("y") + account("z"))
        self.assertIn("error:No account 'x'", world.ask("showtoken:withurl x"))
        self.assertEqual(world.show("y"), "access_token:at1")
        self.assertTrue(world.show("z").startswith("pending:"))
        self.assertEqual(world.status().count("\n"), 1)

    def test_new_times_take_effect_at_once(self):
        world = World()
        world.authorise(expires_in=3600)
        world.reload(account("x", "refresh_before_expiry = 59m;"))
        self.assertEqual(world.auth.deadline(), world.clock.now() + 60)

    def test_a_pending_request_whose_redirect_uri_moves_is_replaced_by_a_fresh_one(self):
        world = World()
        old = world.state()
        world.reload(account(), port=9090)
        self.assertEqual(query_of(world.show().partition(":")[2])["redirect_uri"],
                         "http://localhost:9090/")
        self.assertNotEqual(world.state(), old)

    def test_a_failed_reload_leaves_no_descriptor_open(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            before = os.dup(0)
            os.close(before)
            for _ in range(3):
                with self.assertRaisesRegex(pizauth.PizauthError, "regular file|Is a directory"):
                    pizauth.load_config(directory, self.fail, reloading=True)
            after = os.dup(0)
            os.close(after)
        self.assertEqual(after, before)

    def test_a_failed_reload_is_reported_and_changes_nothing(self):
        world = World()
        world.authorise()

        error = pizauth.ConfigError("p: line 1, column 1: bad\n    shown")
        world.auth.reload = lambda then: then(error)
        self.assertEqual(world.ask("reload:"), "error:p: line 1, column 1: bad\n    shown")
        self.assertEqual(world.show(), "access_token:at1")
        self.assertNotIn("shown", str(world.logged))

    def test_a_command_that_a_reload_removes_is_not_run_again(self):
        world = World(account() + 'token_event_cmd = "t";')
        world.authorise()
        world.ask("revoke:x")
        world.reload(account())
        world.commands.pop().end()
        self.assertEqual((world.commands, world.auth.events), ([], []))


class RaceTest(unittest.TestCase):
    """Five interruptions of four things in flight: no wrong token, no event lost or doubled."""

    INTERRUPTIONS = {
        "revoke": lambda world: world.ask("revoke:x"),
        "reload": lambda world: world.reload(RaceTest.text('client_secret = "new";')),
        "restore": lambda world: world.restore(RaceTest.dump()),
        "fresh request": lambda world: world.refresh(),
        "shutdown": lambda world: world.ask("shutdown:"),
    }

    @staticmethod
    def text(extra=""):
        return account("x", extra) + 'token_event_cmd = "t"; auth_notify_cmd = "a";'

    @staticmethod
    def dump():
        source = World(RaceTest.text())
        source.authorise(access_token="restored", refresh_token="rt-restored")
        return source.dump()

    def events(self, world):
        told = []
        while commands := [c for c in world.commands if c.command == "t"]:
            world.commands.remove(commands[0])
            told.append(commands[0].variables["PIZAUTH_EVENT"])
            commands[0].end()
        return told

    def test_while_a_code_exchange_is_in_flight(self):
        for what, interrupt in self.INTERRUPTIONS.items():
            with self.subTest(what):
                world = World(self.text())
                pages = world.approve()
                post = world.posts.pop()
                interrupt(world)
                self.assertEqual(post.cancelled, what != "shutdown")
                self.assertEqual(len(pages), what != "shutdown")
                post.grant("late")
                shown, events = {
                    "revoke": ("pending:", ["token_revoked"]), "reload": ("pending:", []),
                    "restore": ("access_token:restored", []), "fresh request": ("pending:", []),
                    "shutdown": ("access_token:late", ["token_new"]),
                }[what]
                self.assertTrue(world.show().startswith(shown), world.show())
                self.assertEqual((self.events(world), len(pages)), (events, 1))

    def test_while_a_refresh_is_in_flight(self):
        for what, interrupt in self.INTERRUPTIONS.items():
            with self.subTest(what):
                world = World(self.text())
                world.authorise()
                self.events(world)
                world.refresh()
                post = world.posts.pop()
                interrupt(world)
                self.assertEqual(post.cancelled, what in ("revoke", "reload"))
                self.assertEqual(world.posts, [])
                post.grant("late")
                shown, events = {
                    "revoke": ("pending:", ["token_revoked"]), "reload": ("pending:", []),
                }.get(what, ("access_token:late", ["token_refreshed"]))
                self.assertTrue(world.show().startswith(shown), world.show())
                self.assertEqual(self.events(world), events)

    def test_while_a_reminder_is_due_or_runs(self):
        for what, interrupt in self.INTERRUPTIONS.items():
            with self.subTest(what):
                world = World(self.text())
                state = world.state()
                world.wait(0)
                reminder = world.commands.pop()
                interrupt(world)
                world.wait(1)
                reminders = [c for c in world.commands if c.command == "a"]
                self.assertEqual(len(reminders), what == "fresh request")
                self.assertFalse(reminder.cancelled)
                reminder.end(None)
                world.visit(f"/?state={state}&code=c")
                self.assertEqual(len(world.posts), what == "shutdown")
                self.assertEqual(self.events(world), ["token_revoked"] if what == "revoke" else [])

    def test_while_a_token_event_is_being_told(self):
        for what, interrupt in self.INTERRUPTIONS.items():
            with self.subTest(what):
                world = World(self.text())
                world.authorise()
                interrupt(world)
                self.assertEqual(len([c for c in world.commands if c.command == "t"]), 1)
                events = ["token_new"] + (["token_revoked"] if what == "revoke" else [])
                self.assertEqual(self.events(world), events)
                self.assertEqual(self.events(world), [])
                shown = "pending:" if what in ("revoke", "reload") else "access_token:at1"
                self.assertTrue(world.show().startswith(shown))


# Dumps that the original made, and what is in them.
ORIGINAL_DUMPS = [
    {
        "what": "one account without a token",
        "dump": (
            "7avnl5QkCwHqYDBOJvCYG0EBZwijUi4ckvm7xPk6H1kn+MlbeiuktpyjXY1rsSPPfBP/W17QAAKM7SFFFxgH"
            "m0mAjwc+W/q9J3V74TJs5SwRiEv31coLcM8GWTawjjkNktX8zqCXmmVGLuMRFIFKrWBFMdUgTOUTO1EfwV0C"
            "lW8IQp+XPk32odmz469C+Un4VCE6vT1b/w0fZmM9AojmjKbtuPt2OQObeQTG2E/4yJkvmOsrl2jyYXuj"
        ),
        "accounts": {'x': {'account': {'auth_uri': 'http://127.0.0.1:44871/authorize',
                'auth_uri_fields': [],
                'client_id': 'cid',
                'client_secret': None,
                'redirect_uri': 'http://localhost/',
                'scopes': [],
                'token_uri': 'http://127.0.0.1:44871/token'},
             'state': None}},
    },
    {
        "what": "one account with tokens",
        "dump": (
            "apFILf6E//2MdpH2YMS8+V59xigtn7EiyqXjcD9jAApZQHmkH67jWDBuHW17RkVO/QU35bnCuS1QI9BnZwuf"
            "WWlwz/mghKEQJY2XdcyanOlqVavw4NBb6cVp/S67mY5DLTMbgkx3XlfzRhzhSbPfQnuPtXnZgY+F03OLfcu0"
            "KG0iYH1QtSD0lDPxme/qmxPYRD1fuiXvB4Ao4bUXVCzy7P1ORF88v+3lkeOl5t+KPDoYH39L+1N7EtBGtZ2C"
            "mv5lOd0p19tSv5hC+olkYdk0d02sxZsVruum4PWn97p+Rn4AMcyV3afOJgY0YnG5kw/ED70KlHM="
        ),
        "accounts": {'x': {'account': {'auth_uri': 'http://127.0.0.1:44871/authorize',
                'auth_uri_fields': [],
                'client_id': 'cid',
                'client_secret': 'csec',
                'redirect_uri': 'http://localhost/',
                'scopes': [],
                'token_uri': 'http://127.0.0.1:44871/token'},
             'state': {'access_token': 'at2',
                'obtained': [1795376649, 40308835],
                'expires': [1795380249, 40308549],
                'refresh_token': 'rt2'}}},
    },
    {
        "what": "no refresh token",
        "dump": (
            "xPSA+OH0bsz7mMeCJkNBHRWOdgHL1FXvtRJl9W7yM33pfCp5eCNqBcfCYMlcprRJo0X2iS+vJIuAvicuBmha"
            "x9cqLBxaHJkFTc6sXCmpPSoIaOzaifG8jgWEsBo3RJ3eWrgkf9NvZ3kvn4ajnJkPZjRcbHk95oznvVIlgltw"
            "7Gu+RD8iQImhg71w5MQCN4kvRT7Cx2MYuYJjXyrGl2I5X8V7mD/cdzrB4Fv/WR+/G9fM1N9U82bipH3N4ors"
            "zXlYAbfDFwX/k3EuQztG/BAcUav5yZ8H7gQHvO1KW6jQlEbaw6w5WYTnGLiX06jAwcZV3Zw="
        ),
        "accounts": {'x': {'account': {'auth_uri': 'http://127.0.0.1:44871/authorize',
                'auth_uri_fields': [],
                'client_id': 'cid',
                'client_secret': 'csec',
                'redirect_uri': 'http://localhost/',
                'scopes': [],
                'token_uri': 'http://127.0.0.1:44871/token'},
             'state': {'access_token': 'only-access',
                'obtained': [1795376649, 109910305],
                'expires': [1795380249, 109909936],
                'refresh_token': None}}},
    },
    {
        "what": "every kind of field, names and values beyond ASCII, one pending",
        "dump": (
            "pPX01QIXGoVDKLmoB+54l8GQva5Wv6F5BaqHQlNttF+71mLFHcH5cDbzH4+cxXvdpvnpvk8tZkLWPZwutysj"
            "eWNtU7o4TGypWeRah2JLzeMA3bNCwuCtS53bFXFY+gpjYLfULuTIamWlJgtbr8GyIzIeH1ptA7f+3s16wJrh"
            "BZ9jJU1FHEX+UtfOUidf7PQvAbMyBoqPyZhndcoJrQv0eEWaSaTqnVBNwi+qMQaFZfdfNqPqUIfQ5+mcWAmF"
            "wma66dkXrjiI9iNzkanSxdKQ6xbi8l9Z2GwOKjIp7Nm6yCD4MMEomPdtwZfm34R680XvK7qUtWkYTUStIuR/"
            "r3dCQ+qTdTsS2CL1h6RvBPiThrWSnnprZxc9WVkycoqgi0r6iuBaLNXBBMowFwCNWMmeJs47xodHdTRDBzOm"
            "D0E5oidCuqF1lmP05DNAz0FKlRe3nDGq3pWxeC+1JakOiETq73KXpAuKtgmE998TqQZ17ltI8C1nGNoiNTRd"
            "xG5c6CRROvn9VKoJY1VnDTor+NvJTLZnmJvxdIN3mHnWNaTT/qBLbtudABgJdQUFefFuIyc2p21myjRwSybg"
            "shwaSN4h3Tmj/X1LWvVLECwFBWhV6dbaEu96pTPr+NlFvNUzSTzowCYARuoz3ud9Has5bMrMDrB7G0Q19IjY"
            "FG0S/UJlYZFN0DTmcgSPM4AsBp6dpY3TbVbagJed+ftwF47lOVlG6Cs5CxAN2+m2tvj+M4zx6kaXtjsA+kg2"
            "+BOMGBKbmaTLgC8rJbORfC9++XHEjQlccqzEF9JcEvpe5cfaJUq+OoKw2+keyMOcMQC+5+xqhcsHbvtAIWSS"
            "4NGjuHsQ2k5C8LTE+vKeV0yq2wjjX5A4PNhDLGMsuuA9gwqZyzEL3Sn4Al7CErH0yvywpPLXC2naPhWlJRwW"
            "esy0voGUjXm+8wNHRcY1a0pnmPKJL5DuH4O5CCjDPFmVokZ1KAo="
        ),
        "accounts": {'work é "q"': {'account': {'auth_uri': 'http://127.0.0.1:44871/authorize',
                   'auth_uri_fields': [['prompt', 'consent'],
                        ['k', '1'], ['k', 'ü']],
                   'client_id': 'cid',
                   'client_secret': 'csec',
                   'redirect_uri': 'http://localhost/cb?a=b',
                   'scopes': ['https://a.example/IMAP',
                     'offline_access'],
                   'token_uri': 'http://127.0.0.1:44871/token'},
                'state': {'access_token': 'at5',
                  'obtained': [1795376649, 184540508],
                  'expires': [1795380249, 184540428],
                  'refresh_token': 'rt5'}},
            'pending': {'account': {'auth_uri': 'http://127.0.0.1:44871/authorize',
                  'auth_uri_fields': [],
                  'client_id': 'cid',
                  'client_secret': 'csec',
                  'redirect_uri': 'http://localhost/',
                  'scopes': [],
                  'token_uri': 'http://127.0.0.1:44871/token'},
               'state': None},
            'home': {'account': {'auth_uri': 'http://127.0.0.1:44871/authorize',
                 'auth_uri_fields': [],
                 'client_id': 'cid',
                 'client_secret': None,
                 'redirect_uri': 'http://localhost/',
                 'scopes': [],
                 'token_uri': 'http://127.0.0.1:44871/token'},
              'state': {'access_token': 'at7',
                 'obtained': [1795376649, 219042725],
                 'expires': [1795380249, 219042725],
                 'refresh_token': 'rt7'}}},
    },
]


# ---- Random histories, held against a model ----


class Model:
    """What the rules say of two accounts, in a tenth of the code: only what a client can see.

    `accounts` maps a name to None (Empty), "pending", or what is known of its token.
    """

    def __init__(self):
        self.accounts = {"x": None, "y": None}
        self.identity = {"x": 0, "y": 0}  # changes with every security-relevant reload
        self.events = []
        self.told = 0

    def change(self, name, state, event=None):
        self.accounts[name] = state
        if event:
            self.events.append((name, event))


class History:
    """One random history: its steps are triples of numbers, any of which can be left out. Account x
    is authorised by a redirect, y by a device code."""

    OPTIONS = ('token_event_cmd = "t"; auth_notify_cmd = "a"; transient_error_if_cmd = "i";'
               ' error_notify_cmd = "e"; refresh_retry = 7s;')

    def __init__(self):
        self.model, self.counter = Model(), 0
        self.world = World(self.text())
        self.live = {"x": None, "y": None}  # the account's post that nobody has answered
        self.started = {"x": -9, "y": -9}  # when its last refresh was sent
        self.notified = {"x": -9, "y": -9}  # when its person was last notified
        self.dead, self.states, self.dumps = [], [], []
        self.device = None  # what is known of y's login while it is pending
        self.asked = -9  # when a device code was last asked for
        self.parked = []  # clients that wait for a device code: since when, and their replies

    def text(self):
        x, y = (f'client_secret = "{n}{i}";' for n, i in self.model.identity.items())
        redirect = account("x", x).replace("http://t.", "https://t.")
        return redirect + DEVICE.format("y", y) + self.OPTIONS

    def run(self, steps):
        """Take each step and check every invariant after it. Raises AssertionError."""
        acts = (self.show, self.show, self.refresh, self.revoke, self.visit, self.visit, self.visit,
                self.provider, self.provider, self.provider, self.provider, self.late, self.command,
                self.command, self.outage, self.wait, self.wait, self.reload, self.dump,
                self.restore)
        for kind, a, b in steps:
            acts[kind % len(acts)]("xy"[a % 2], b)
            self.settle()
            self.check()

    # What may happen. `name` is the account, `b` chooses among the ways.

    def ask_for_login(self, name, verb):
        """Have a client ask for an account's URL: its reply, unless it waits for a device code."""
        replies = self.world.park(f"{verb}:withurl {name}")
        if replies:
            return replies[0]
        assert name == "y" and not self.device, "a client waits for nothing"
        self.parked.append((self.now(), replies))
        return None

    def begun(self, name, reply):
        """A login of the account has begun, or goes on; `reply` is what the client was told."""
        self.model.accounts[name] = "pending"
        if name == "x":
            assert reply.startswith("pending:http"), reply
            self.states.append((name, query_of(reply.partition(":")[2])["state"]))
        else:
            assert reply == (self.device and f"pending:https://v/e and code {self.device['code']}")

    def show(self, name, b):
        token = self.expired(name)
        if not isinstance(token, dict) and not self.exchanging(name):
            return self.begun(name, self.ask_for_login(name, "showtoken"))
        reply = self.world.show(name)
        if isinstance(token, dict) and self.now() < token["expires"]:
            assert reply == f"access_token:{token['token']}", (reply, token)
        elif isinstance(token, dict):
            assert reply.startswith("error:Access token has expired. Refreshing"), reply
            token["wanted"] = True
            token["must"] = token.get("must") or reply.endswith("initiated")
        else:
            assert reply.startswith("error:The login is being completed"), reply

    def exchanging(self, name):
        """Whether a redirect has brought a code."""
        login = self.world.auth._tokens[name]
        return isinstance(login, pizauth.RedirectLogin) and login.form is not None

    def refresh(self, name, b):
        token = self.expired(name)
        if not isinstance(token, dict):
            joins = name == "y" and token == "pending" and not self.device
            self.device = None if name == "y" else self.device
            reply = self.ask_for_login(name, "refresh")
            if not joins:
                self.bury(name)
            self.begun(name, reply)
            return
        reply = self.world.refresh(name)
        if token["refresh"]:
            assert reply == "scheduled:", reply
            token["wanted"] = True
            token["must"] = token.get("must") or self.live[name] is None
        else:
            assert "has no refresh token" in reply, reply

    def revoke(self, name, b):
        assert self.world.ask(f"revoke:{name}") == "ok:"
        self.bury(name)
        self.model.change(name, None, "token_revoked")

    def visit(self, name, b):
        """A redirect: the account's own, an old one or a forged one; a code, another, an error."""
        own = [state for owner, state in self.states if owner == name][-1:] or ["none"]
        state = (own[0], own[0], own[0], "forged", (self.states or [("", "old")])[0][1])[b % 5]
        more = ("&code=c", "&code=d", "&code=e", "&error=access_denied", "")[b // 5 % 5]
        owner = {state: owner for owner, state in self.states}.get(state, name)
        pending = self.current_state(owner) == state and self.model.accounts[owner] == "pending"
        exchanging = pending and self.exchanging(owner)
        token = self.model.accounts[owner]
        if b // 25 % 2:
            told = self.world.park(f"complete:state={state}{more}")
        else:
            told = [text_of(page)[1] for page in self.world.visit(f"/?state={state}{more}")]
        if isinstance(token, dict) and state == token["state"]:
            assert "is authorised already" in told[0], told
        elif not pending:
            assert "No pending token" in told[0], told
        if pending and not exchanging and more.startswith("&error"):
            self.model.change(owner, None)

    def provider(self, name, b):
        """The provider answers what the account has asked, in one of many ways."""
        post, self.live[name] = self.live[name], None
        if post is None:
            return
        grant_type = post.form.get("grant_type")
        if grant_type is None:
            self.give_code(post, b)
            return
        if "device" in grant_type and b % 4:
            self.poll(post, b // 4)
            return
        code = grant_type != "refresh_token"
        before = self.model.accounts[name]
        self.counter += 1
        token = f"at{self.counter}"
        fresh = (f"rt{self.counter}", None, f"rt{self.counter}", "")[b // 17 % 4]
        life = (3600, 5, 0.5, None, 86400)[b // 68 % 5]
        tried = self.world.auth._tokens[name].tries if name == "x" and code else 0
        ways = (*[lambda: post.grant(token, fresh, life)] * 8,
                lambda: post.answer(503, b""), lambda: post.answer(429, b"", retry_after=90),
                post.fail, lambda: post.answer(200, b"<html>"), lambda: post.answer(404, b""),
                lambda: post.answer(400, error="invalid_grant"),
                lambda: post.answer(400, error="slow_down"),
                lambda: post.answer(200, access_token="a b"),
                lambda: post.answer(401, error_code="session_not_found"))
        way = b % 17
        if "device" in grant_type:
            way, self.device = 0, None
        ways[way]()
        if way < 8:
            refresh = fresh or (None if code else before["refresh"])
            expires = self.now() + (life or 5400)
            state = {"token": token, "refresh": refresh, "expires": expires,
                     "obtained": self.now(), "refusals": 0, "complaint": False, "told": False,
                     "state": before["state"] if not code else
                     self.current_state(name) if name == "x" else ""}
            self.model.change(name, self.scheduled(state),
                              "token_new" if code else "token_refreshed")
        elif code and (way > 10 or tried >= 10):
            self.model.change(name, None)
        elif not code:
            before["refusals"] = before["refusals"] + 1 if way == 16 else 0
            if way == 13 or before["refusals"] >= 3 and self.now() >= before["expires"]:
                self.model.change(name, None, "token_invalidated")
            else:
                before.update(due=self.now() + (90 if way == 9 else 7),
                              complaint=way in (12, 15, 16))

    def give_code(self, post, b):
        """The provider answers the request for a device code."""
        tried, way = self.world.auth._tokens["y"].tries, b % 8
        if way < 5:
            self.counter += 1
            life, interval = (20, 60, 1800)[b // 8 % 3], (None, 1, 7)[b // 24 % 3]
            post.answer(device_code="dc", user_code=f"C{self.counter}", interval=interval,
                        expires_in=life, verification_uri="https://v/e")
            interval = interval or 5
            self.device = {"code": f"C{self.counter}", "expires": self.now() + life,
                           "interval": interval, "gap": interval, "due": self.now() + interval}
        elif way == 5:
            post.answer(400, error="invalid_client")
        else:
            post.fail()
        if way == 5 or way > 5 and tried >= 10:
            self.model.change("y", None)

    def poll(self, post, b):
        """The provider answers a poll, without tokens."""
        device, way = self.device, b % 8
        if way == 0:
            post.answer(400, error=("expired_token", "access_denied", "odd")[b // 8 % 3])
            self.model.change("y", None)
            self.device = None
            return
        if way < 5:
            device["interval"] += 5 * (way == 4)
            device["gap"] = device["interval"]
            post.answer(400, error="slow_down" if way == 4 else "authorization_pending")
        else:
            device["gap"] = max(device["interval"], min(2 * device["gap"], 60))
            ways = post.fail, lambda: post.answer(503, b""), lambda: post.answer(200, b"<html>")
            ways[way - 5]()
        last = device["expires"] - 1 - self.now()
        device["due"] = self.now() + max(device["interval"], min(device["gap"], last))

    def late(self, name, b):
        """An outcome of a request that nobody waits for any more."""
        if self.dead:
            post = self.dead[-1]
            (post.grant, post.fail, lambda: post.answer(400, error="invalid_grant"))[b % 3]()

    def command(self, name, b):
        """A shell command ends."""
        if self.world.commands:
            command = self.world.commands.pop(b // 7 % len(self.world.commands))
            status = (0, 0, 1, None, 126, 0)[b % 6]
            cancelled = command.cancelled
            command.end(status)
            owner = command.variables["PIZAUTH_ACCOUNT"]
            if command.command == "i" and not cancelled and status in (1, None):
                self.model.change(owner, None, "token_invalidated")

    def outage(self, name, b):
        """Some attempts to refresh fail, or are refused in other words, one after the other; then
        somebody may ask for one more, before transient_error_if_cmd lets it go on."""
        for _ in range(b % 14):
            token, due = self.model.accounts[name], self.world.auth.deadline()
            if isinstance(token, dict) and token["refresh"] and due < pizauth.FOR_EVER:
                self.world.clock.moment = max(due, self.now())
                self.settle()
                if self.live[name] is not None:
                    self.provider(name, 10 if b // 14 % 2 else 16)
        if b // 28 % 2:
            self.settle()
            self.refresh(name, b)
            self.settle()
            self.world.clock.advance(1)
            for command in [c for c in self.world.commands if c.command == "i"]:
                self.world.commands.remove(command)
                command.end(0)

    def wait(self, name, b):
        """Time passes, or jumps as after a suspension; the wall's clock may be set."""
        seconds = (0.3, 1, 7, 40, 600, 3000, 90_000)[b % 7]
        if b // 7 % 3:
            end = self.now() + seconds
            while (due := self.world.auth.deadline()) <= end:
                self.world.clock.moment = max(due, self.now())
                self.settle()
            self.world.clock.moment = end
        else:
            self.world.clock.advance(seconds)
        if b // 21 % 8 == 0:
            self.world.clock.offset += (-86400, 3600, 366 * 86400)[b % 3]

    def reload(self, name, b):
        """A reload: nothing new, other times, or another secret for one account."""
        self.model.identity[name] += b % 3 == 0
        self.world.reload(self.text())
        if b % 3 == 0:
            self.bury(name)
            self.model.change(name, None)

    def dump(self, name, b):
        offset = self.world.clock.offset
        states = {n: dict(t, obtained=t["obtained"] + offset, expires=t["expires"] + offset)
                  for n, t in self.model.accounts.items() if isinstance(t, dict)}
        self.dumps.append((self.world.dump(), dict(self.model.identity), states))

    def restore(self, name, b):
        for sealed, identity, states in self.dumps[b % 3 :][:1]:
            assert self.world.restore(sealed) == "ok:"
            for owner, token in states.items():
                known = identity[owner] == self.model.identity[owner]
                if known and not isinstance(self.model.accounts[owner], dict):
                    self.bury(owner)
                    self.model.change(owner, self.revived(token))
                    if owner == "y" and self.parked and self.expired("y") is None:
                        self.model.accounts["y"] = "pending"  # asked for by who waits
        if b % 5 == 0:
            assert self.world.restore(b"junk" * 9).startswith("error:")

    def revived(self, token):
        wall = self.world.clock.wall()
        life = token["expires"] - token["obtained"]
        left = min(token["expires"] - wall, life) if token["obtained"] <= wall else 0
        return self.scheduled(
            {**token, "expires": self.now() + left, "obtained": self.now() + left - life,
             "refusals": 0, "complaint": False, "told": False, "state": "", "must": False})

    def scheduled(self, token):
        """A token with the moment at which it is to be refreshed."""
        obtained, expires = token["obtained"], token["expires"]
        early = max(expires - 90, obtained + min(10, (expires - obtained) / 2))
        return {**token, "due": max(min(obtained + 5400, early), obtained + 1)}

    # Bookkeeping, and what must hold after every step.

    def now(self):
        return self.world.clock.now()

    def current_state(self, name):
        return next((state for owner, state in reversed(self.states) if owner == name), None)

    def bury(self, name):
        """What was in flight for the account is of no interest any more."""
        if name == "y":
            self.device = None
        for command in self.world.commands:
            if command.command == "i" and command.variables["PIZAUTH_ACCOUNT"] == name:
                assert command.cancelled
        if self.live[name]:
            assert self.live[name].cancelled
            self.dead.append(self.live[name])
            self.live[name] = None

    def expired(self, name):
        """The account's state now, after what its expiry may have done."""
        token = self.model.accounts[name]
        if isinstance(token, dict) and not token["refresh"] and token["expires"] <= self.now():
            self.model.change(name, None, "token_invalidated")
        return self.model.accounts[name]

    def settle(self):
        """What the loop would do now: run what is due, and take up what was asked of it."""
        for name in self.model.accounts:
            self.expired(name)
        device = self.device
        if device and not self.live["y"] and self.now() >= device["expires"]:
            self.model.change("y", None)
            self.device = None
        self.world.auth.run_due()
        self.hear()
        for post in self.world.posts:
            owner = post.form["client_secret"][0]
            assert self.live[owner] is None, "two requests in flight for one account"
            assert post.form["client_secret"] == f"{owner}{self.model.identity[owner]}"
            if "grant_type" not in post.form:
                assert self.now() >= self.asked + 5, "requests for a code come as a storm"
                self.asked = self.now()
            if "device_code" in post.form:
                assert self.now() >= self.device["due"], "polled too soon"
                assert self.now() < self.device["expires"], "polled in vain"
            if post.form.get("grant_type") == "refresh_token":
                token = self.model.accounts[owner]
                assert self.now() >= self.started[owner] + 1, "refreshes come as a storm"
                assert post.form["refresh_token"] == token["refresh"], "an old refresh token"
                assert token.pop("wanted", False) or self.now() >= token["due"], "too early"
                token["must"] = False
                self.started[owner] = self.now()
            self.live[owner] = post
        self.world.posts.clear()

    def hear(self):
        """Take note of what the person is told."""
        for command in self.world.commands:
            owner, seen = command.variables["PIZAUTH_ACCOUNT"], hasattr(command, "heard")
            command.heard = True
            if command.command == "a" and not seen:
                assert self.now() >= self.notified[owner] + 1, "reminders come as a storm"
                self.notified[owner] = self.now()
            if "keeps failing" in command.variables.get("PIZAUTH_MSG", "") and not seen:
                token = self.model.accounts[owner]
                assert token["complaint"] and not token["told"], "an outage was told"
                assert self.now() >= token["expires"], "told too soon"
                token["told"] = True

    def check_device(self):
        """No poll is overdue, and clients wait for a code as long as it is asked for."""
        pending = self.model.accounts["y"] == "pending"
        self.device = self.device if pending else None
        if self.device:
            assert self.live["y"] or self.now() < self.device["due"], "a poll is overdue"
        for since, replies in self.parked:
            assert len(replies) <= 1, "a client was told twice"
            if not replies:
                assert pending and not self.device and self.now() < since + 9, "a client hangs"
        self.parked = [(since, replies) for since, replies in self.parked if not replies]

    def check(self):
        self.check_device()
        world, model, now = self.world, self.model, self.now()
        world.auth.run_due()
        deadline = world.auth.deadline()
        assert deadline > now, "something is due, and nothing was done"
        moments = [moment for moment, *_ in world.auth._appointments()]
        moments += [waiter.until for waiter in world.auth._waiters]
        assert deadline == min(moments, default=pizauth.FOR_EVER), "the deadline lies"
        lines = dict(line.split(": ", 1) for line in world.status()[3:].split("\n"))
        for name, token in model.accounts.items():
            text = ("No access token" if token is None else
                    "Access token pending" if token == "pending" else
                    "Active access token" if now < token["expires"] else "Access token expired")
            assert lines[name].startswith(text), (name, lines[name], token)
            judged = [c for c in world.commands if c.command == "i" and not c.cancelled
                      and c.variables["PIZAUTH_ACCOUNT"] == name]
            if self.live[name] is not None:
                assert not self.live[name].cancelled
            elif isinstance(token, dict) and token["refresh"] and not judged:
                due = 0 if token.get("must") else token["due"]
                assert now < max(due, self.started[name] + 1), "a refresh is overdue"
                owed = token["complaint"] and not token["told"] and now >= token["expires"]
                assert not owed, "a failure was not told"
        told = [command for command in world.commands if command.command == "t"]
        assert len(told) <= 1, "two events are told at once"
        for command in told:
            if not hasattr(command, "counted"):
                command.counted = True
                event = command.variables["PIZAUTH_ACCOUNT"], command.variables["PIZAUTH_EVENT"]
                assert event == model.events[model.told], (event, model.events[model.told :])
                model.told += 1
        assert told or model.told == len(model.events), "an event was lost"


def random_steps(seed, length):
    generator = random.Random(seed)
    return [(generator.randrange(1000), generator.randrange(2), generator.randrange(10_000))
            for _ in range(length)]


def failure(steps):
    """What goes wrong in a history; None if nothing does."""
    try:
        History().run(steps)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shrunk(steps):
    """A shorter history that goes wrong, too."""
    size = len(steps) // 2
    while size:
        at = 0
        while at < len(steps):
            shorter = steps[:at] + steps[at + size :]
            steps, at = (shorter, at) if failure(shorter) else (steps, at + size)
        size //= 2
    return steps


def soak(seconds, length=200, seeds=None):
    """Random histories for so long; the exit status. A failure is printed with its seed, shrunk."""
    end, done = time.monotonic() + seconds, 0
    for seed in seeds or iter(lambda: random.randrange(1 << 48), None):
        if time.monotonic() > end:
            break
        steps = random_steps(seed, length)
        if failure(steps):
            steps = shrunk(steps)
            print(f"seed {seed}: {failure(steps)}\n  History().run({steps})")
            return 1
        done += 1
    print(f"{done} histories of {length} steps, and nothing amiss")
    return 0


class SoakTest(unittest.TestCase):
    def test_fixed_and_fresh_histories(self):
        for seed in (*range(40), *(random.randrange(1 << 48) for _ in range(40))):
            steps = random_steps(seed, 200)
            with self.subTest(seed=seed):
                self.assertIsNone(failure(steps))


# ---- Fuzzing: bytes from outside, near those that are good ----


def fuzz_config(data):
    with contextlib.suppress(pizauth.ConfigError):
        pizauth.parse(pizauth.decode_config(data))


def fuzz_head(data):
    """The head whole and in pieces, and the redirect that it may be."""
    with contextlib.suppress(pizauth.BadRequest):
        for end in (*range(0, len(data), 1 + len(data) // 8), len(data)):
            pizauth.http_head(bytearray(data[:end]), False)
        head = pizauth.http_head(bytearray(data), True)
        if head is not None:
            target, host = head
            pizauth.redirect_matches("http://localhost:8080/?a=b", "http", host, target)
            world = World()
            world.show()
            assert len(world.visit(target, host=host)) == 1


def fuzz_answer(data):
    """What a token endpoint sends, for a code and for a refresh; what is told of it is harmless."""
    form = [("refresh_token", "rt1"), ("client_secret", "hush")]
    for status in (200, 400, 503):
        try:
            got = token_response(pizauth.outcome_bytes(status, 0, True, data), form)
        except pizauth.TokenError as error:
            text = str(error)
            assert len(text) <= 500 and text == pizauth.printable(text), text
            assert "rt1" not in text and "hush" not in text, text
        else:
            assert re.fullmatch("[!-~]+", got.access_token), got.access_token
            assert got.expires_in is None or 0 < got.expires_in <= pizauth.LIFE_LIMIT


def fuzz_control(data):
    world = World()
    replies = []
    with contextlib.suppress(pizauth.RequestError):
        request = pizauth.until_eof(bytearray(data), True)
        answered("control", world.auth.control, request, replies.append)
        assert len(replies) == (not world.auth.stopping), replies
    world.status()


def fuzz_dump(data):
    """A dump's plaintext, sealed, restored into a world that has such an account."""
    world = World()
    for sealed in (data, pizauth.encrypt_dump(bytes(12), data)):
        reply = world.restore(sealed)
        assert reply == "ok:" or reply.startswith("error:"), reply
    world.wait(10)
    world.status()


CONFIG_SAMPLE = (
    'auth_notify_cmd = "a \\"b\\" \\\\"; refresh_retry = 40s; // note\n'
    'http_listen = "127.0.0.1:0"; '
    + account("wörk", 'scopes = ["a", "b"]; auth_uri_fields = {"k": "v"}; client_secret = "s";'
              ' redirect_uri = "http://localhost:1/x?a=b";')).encode()
TOKEN_SAMPLE = (
    b'{"access_token": "at", "token_type": "Bearer", "expires_in": 3600, "refresh_token": "rt",'
    b' "error": "invalid_grant", "error_description": "not hush rt1"}')
FUZZERS = {
    "config": (fuzz_config, [CONFIG_SAMPLE]),
    "head": (fuzz_head, [WireTest.GOOD, b"GET /?state=s&error=e&error_description=d HTTP/1.0\n"
                         b"Host: localhost:8080\nContent-Length: 0\n\n"]),
    "answer": (fuzz_answer, [TOKEN_SAMPLE, TOKEN_SAMPLE.replace(b'"error": "invalid_grant",', b""),
                             b"access_token=at&expires_in=3600&refresh_token=rt", b'{"error": 5}']),
    "control": (fuzz_control, [b"showtoken:withurl x", b"refresh:withouturl x", b"revoke:x",
                               b"status:", b"info:", b"dump:", b"restore:" + bytes(40)]),
    "dump": (fuzz_dump, [pizauth.decrypt_dump(World.dump(World.authorised()))]),
}


def mutated(sample, generator):
    """The sample with a few bytes changed, inserted, removed, repeated or moved."""
    data = bytearray(sample)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        at, size = generator.randrange(len(data) + 1), generator.choice((1, 1, 2, 8, 40))
        piece = data[at : at + size]
        new = generator.choice((
            b"", piece * generator.choice((2, 9, 200)), generator.choice(INTERESTING), piece[::-1],
            bytes(generator.randrange(256) for _ in piece),
            data[generator.randrange(len(data) + 1) :][:size]))
        data[at : at + size] = new
    return bytes(data[:200_000])


INTERESTING = (
    b"\0", b"\r\n", b"\n\n", b'"', b"\\", b"{", b"[", b"]", b"}", b":", b";", b"//", b"%00",
    b"\xff", b"&", b"=", b"&state=", b" ", b"\t", b"\xed\xa0\x80", "\u202e\x1b[2J".encode(),
    b"9" * 5000, b"[" * 5000, b"e999", b"NaN", b"\x00\x00\x00\x00\x00\x00\x00\x80")


def fuzz(seconds, names=FUZZERS, generator=random):
    """Each parser for so long; the exit status. What is not allowed is printed with its input."""
    for name in names:
        run, samples = FUZZERS[name]
        end, done, slowest = time.monotonic() + seconds, 0, (0.0, b"")
        while time.monotonic() < end or done < 50:
            data = mutated(generator.choice(samples), generator)
            start = time.process_time()
            try:
                run(data)
                slowest = max(slowest, (time.process_time() - start, data))
                assert slowest[0] < 10, "too slow"
            except Exception:
                print(f"{name}: {data!r}\n{traceback.format_exc()}")
                return 1
            done += 1
        print(f"{name}: {done} inputs, the slowest took {slowest[0] * 1000:.0f} ms"
              f" ({len(slowest[1])} bytes)", flush=True)
    return 0


def judged(body):
    """A token endpoint's answer to a form with a secret."""
    outcome = pizauth.outcome_bytes(200, 0, True, body)
    return token_response(outcome, [("client_secret", "aa"), ("code", ".")])


def head_by_byte(data):
    buffer = bytearray()
    for byte in data:
        buffer.append(byte)
        if pizauth.http_head(buffer, False):
            break


# What could cost more than it is long: a parser, the largest size, and what makes a bad input of n.
EVIL = [
    *[(fuzz_config, 1 << 20, lambda n, piece=piece: (piece * n)[:n]) for piece in (
        b'"', b"\\", b'"a" ', b"// comment\n", b"[", b" ", b'"\\\\', b"9", "é".encode(), b"a ",
        b"a=\n", b'x = "', b"client_secret ", b"client_secret\n", b'client_secret = "\\"')],
    *[(fuzz_config, 1 << 20, lambda n, start=start: start + b'"a",' * (n // 4)) for start in (
        b'account "x" { scopes = [', b'client_secret = "', b"client_secret = [", b"oops = ")],
    *[(fuzz_config, 1 << 13, lambda n, start=start, piece=piece: (start + piece * n)[:n])
      for start in (b'"', b"a = ", b"client_id = ", b'a = "', b"") for piece in (
        b"secret", b"secret ", b'secret"', b"a secret=", b"password\n", b"9s", b"// ", b'{"a":',
        b"\n", b" ", b"=", b"client_id // ", b"client_id ", b"client_id //\n", b"{")],
    *[(fuzz_config, 1 << 13, lambda n, piece=piece: b"oops " + piece * (n // len(piece)) + b"y")
      for piece in (b"\n", b" =", b"client_id // ", b";")],
    *[(fuzz_config, 1 << 20, lambda n, piece=piece: account(
        "x", f'redirect_uri = "http://{piece * (n // len(piece))}/";').encode())
      for piece in ("a", "1:", "ü.", "[", "a/é", "%41", "a?", "@")],
    (fuzz_config, 1 << 20, lambda n: b"".join(account(f"n{i}").encode() for i in range(n // 120))),
    (fuzz_config, 1 << 20, lambda n: b"refresh_retry = " + b"9" * n + b"s;"),
    *[(head_by_byte, 1 << 13, lambda n, start=start: start + b"a" * (n - 40)) for start in (
        b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nX: ")],
    (fuzz_head, 1 << 14, lambda n: b"GET /?state=x" + b"&%41=%41" * (n // 9) + b" HTTP/1.1\r\n"),
    *[(judged, 1 << 20, lambda n, piece=piece: (piece * n)[:n]) for piece in (
        b"[", b'{"a":', b"9", b'"', b"a=%41&", b"a=+&", b"%", b"a", b"&", b"\xff")],
    *[(judged, 1 << 20, lambda n, piece=piece: b'{"error": "e", "expires_in": 5,'
       b'"error_description": "' + (piece * n)[:n] + b'"}') for piece in (
        b".", b"a", b"\\u0000", b"aa.", b"&lt;")],
    *[(pizauth.advised, 1 << 20, lambda n, piece=piece: piece * (n // len(piece))) for piece in (
        "x", ".a", "AADSTS", "AADSTS7000 ", "client was not foun ", "Token has been expired or ")],
    *[(judged, 1 << 20, lambda n, piece=piece: b'{"access_token": "t", "expires_in": '
       + (piece * n)[:n] + b"}") for piece in (b"9", b"1e9", b"[", b"0.")],
    (fuzz_control, 1 << 16, lambda n: b"showtoken:withurl " + b"a" * n),
    (fuzz_dump, 1 << 18, lambda n: struct.pack("<QQQ", 1, 1, 1) + b"x" + bytes(n)),
]


class BoundsTest(unittest.TestCase):
    """No input from outside costs more time or memory than its length warrants."""

    def cost(self, parser, data):
        start = time.process_time()
        with contextlib.suppress(pizauth.PizauthError):
            parser(data)
        return time.process_time() - start

    def test_time_grows_with_the_length_and_no_faster(self):
        for number, (parser, size, make) in enumerate(EVIL):
            with self.subTest(parser=parser.__name__, number=number):
                small, large = make(size // 8), make(size)
                for _ in range(4):  # another process may have had the cache
                    short, cost = self.cost(parser, small), self.cost(parser, large)
                    if cost < 14 * short + 0.02:
                        break
                self.assertLess(cost, 14 * short + 0.02, large[:80])

    def test_memory_is_bounded(self):
        for number, (parser, size, make) in enumerate(EVIL):
            with self.subTest(parser=parser.__name__, number=number):
                data = make(size // 16)
                tracemalloc.start()
                try:
                    self.cost(parser, data)
                    self.assertLess(tracemalloc.get_traced_memory()[1], 150 * len(data) + 400_000)
                finally:
                    tracemalloc.stop()


class FuzzTest(unittest.TestCase):
    def test_a_second_of_mutations_of_each(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status = fuzz(0.4)
        self.assertEqual(status, 0, printed.getvalue())

    def test_the_samples_are_good(self):
        """Or mutations of them would be far from what is good."""
        pizauth.parse(pizauth.decode_config(CONFIG_SAMPLE))
        for sample in FUZZERS["head"][1]:
            self.assertIsNotNone(pizauth.http_head(bytearray(sample), True))
        for sample in FUZZERS["answer"][1][1:3]:
            good = pizauth.outcome_bytes(200, 0, True, sample)
            self.assertEqual(token_response(good, []).access_token, "at")
        world = World()
        dump = pizauth.encrypt_dump(bytes(12), FUZZERS["dump"][1][0])
        self.assertEqual(world.restore(dump), "ok:")
        self.assertEqual(world.show(), "access_token:at1")


# ---- Loop: connections and children ----


def alive(pid):
    """Does a process run? (One that nobody has reaped does not.)"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True


class Parts(unittest.TestCase):
    """What the tests of the loop and its parts share: a loop whose clock stands still."""

    def setUp(self):
        self.clock, self.logged = Clock(), []
        self.loop = pizauth.Loop(self.clock, lambda level, message: self.logged.append(message))
        self.connections = pizauth.Connections(self.loop)
        self.children = pizauth.Children(self.loop)
        self.loop.parts = [self.connections, self.children]
        self.peers, self.requests = [], []

    def tearDown(self):
        for exchange in self.connections.all():
            exchange.close()
        for sock in (*self.peers, self.loop.wakeup, self.loop.woken):
            sock.close()
        self.loop.selector.close()

    def connect(self, peer="control", frame=pizauth.until_eof, respond=None):
        """The other end of a new exchange; requests are recorded, then given to `respond`."""

        def record(request, answer):
            self.requests.append((request, answer))
            if respond:
                respond(request, answer)

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.settimeout(5)
        self.peers.append(theirs)
        service = pizauth.Service(peer=peer, frame=frame, respond=record)
        pizauth.Exchange(self.connections, ours, service).proceed()
        return theirs

    def pump(self):
        """Let the loop do all it can without waiting."""
        self.run_due()
        while events := self.loop.selector.select(0):
            for key, mask in events:
                key.data(mask)

    def run_due(self):
        for part in self.loop.parts:
            part.run_due()

    def received(self, peer):
        """All that the peer gets, up to end of file."""
        data = b""
        while piece := peer.recv(65536):
            data += piece
            self.pump()
        return data

    def open(self, peer="control"):
        return len(self.connections.exchanges[peer])

    def run_until(self, condition):
        """Run the real loop with real signals until a condition holds."""
        self.loop.clock = self.clock = pizauth.Clock()
        kept = {number: signal.getsignal(number) for number in self.loop.signals}
        self.loop.handlers.setdefault(signal.SIGCHLD, self.children.reap)
        self.loop.caught.add(signal.SIGCHLD)  # a child may have ended before we listened
        self.loop.catch_signals()
        tick = unittest.mock.Mock(deadline=lambda: self.clock.now() + 0.02)
        self.loop.parts.append(tick)
        end = time.monotonic() + 10
        try:
            self.loop.run(lambda: condition() or time.monotonic() > end, lambda: None)
        finally:
            self.loop.parts.remove(tick)
            signal.set_wakeup_fd(-1)
            for number, handler in kept.items():
                signal.signal(number, handler)
            self.loop.selector.unregister(self.loop.woken)
        self.assertTrue(condition())

    @contextlib.contextmanager
    def out_of_descriptors(self):
        hoard = []
        with contextlib.suppress(OSError):
            while True:
                hoard.append(os.dup(0))
        try:
            yield
        finally:
            for descriptor in hoard:
                os.close(descriptor)


class LoopTest(Parts):
    """How long it sleeps, signals, and bugs."""

    def test_while_something_is_scheduled_it_never_sleeps_longer_than_37_s(self):
        part = unittest.mock.Mock()
        self.loop.parts.append(part)
        for due, patience in ((1000, 37), (20, 20), (-5, 0), (pizauth.FOR_EVER, None)):
            part.deadline.return_value = self.clock.now() + due
            self.assertEqual(self.loop.patience(), patience)

    def test_a_signal_that_comes_while_others_are_handled_is_handled_next(self):
        self.loop.caught.add(signal.SIGTERM)  # its byte has been read already
        self.assertEqual(self.loop.patience(), 0)
        handled = []

        def handle():
            handled.append(1)
            if len(handled) == 1:
                self.loop.caught.add(signal.SIGTERM)

        self.loop.handlers[signal.SIGTERM] = handle
        for count in (1, 2):
            self.loop.handle_signals()
            self.assertEqual((len(handled), self.loop.caught), (count, {signal.SIGTERM}
                                                                if count == 1 else set()))

    def test_a_bug_is_logged_even_if_traceback_cannot_be_imported(self):
        try:
            raise ZeroDivisionError("oh")
        except ZeroDivisionError:
            with unittest.mock.patch.dict(sys.modules, {"traceback": None}):
                self.loop.log_bug("lost")
            self.loop.log_bug("lost")
        self.assertEqual(self.logged[0], "lost: ZeroDivisionError('oh')")
        self.assertRegex(self.logged[1], r"(?s)^lost: Traceback .* line \d+, in test_a_bug")

    def test_a_due_action_that_always_raises_blocks_neither_clients_nor_signals(self):
        peer = self.connect(respond=lambda _, answer: answer(b"served"))
        peer.shutdown(socket.SHUT_WR)
        self.loop.parts.insert(0, unittest.mock.Mock(
            deadline=lambda: 0, run_due=unittest.mock.Mock(side_effect=ZeroDivisionError)))
        stopped = []
        self.loop.handlers[signal.SIGTERM] = lambda: stopped.append(1)
        os.kill(os.getpid(), 0)
        start = time.monotonic()
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        self.run_until(lambda: stopped)
        timer.join()
        self.assertLess(time.monotonic() - start, 5)
        self.loop.parts.pop(0)
        self.assertEqual(self.received(peer), b"served")
        self.assertIn("ZeroDivisionError", "".join(self.logged))

    def test_a_handler_that_always_raises_blocks_no_signal(self):
        ours, peer = socket.socketpair()
        self.peers += [ours, peer]
        peer.send(b"x")
        calls, stopped = [], []

        def broken(_):
            calls.append(1)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if len(calls) > 50:
                raise SystemExit("SIGTERM was not handled")
            raise ZeroDivisionError

        self.loop.handlers[signal.SIGTERM] = lambda: stopped.append(1)
        self.loop.selector.register(ours, pizauth.selectors.EVENT_READ, broken)
        with unittest.mock.patch.object(pizauth, "PAUSE", 0.01):
            self.run_until(lambda: stopped)
        self.assertIn("ZeroDivisionError", "".join(self.logged))


class ExchangeTest(Parts):
    """One connection, from its first byte to its end."""

    def test_a_request_is_answered_and_the_connection_ends(self):
        peer = self.connect(respond=lambda request, answer: answer(b"ok:" + request))
        for byte in b"status:":
            peer.send(bytes([byte]))
            self.pump()
        self.assertEqual(self.requests, [])
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual(self.received(peer), b"ok:status:")
        self.assertEqual(self.open(), 0)

    def test_an_answer_may_come_on_a_later_pass(self):
        peer = self.connect()
        peer.send(b"x:")
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        ((_, answer),) = self.requests
        self.assertIsNone(self.loop.patience())  # and meanwhile nothing spins
        self.assertEqual(self.loop.selector.select(0), [])
        answer(b"later")
        answer(b"twice")
        self.assertEqual(self.received(peer), b"later")

    def test_an_answer_to_a_client_that_has_gone_is_dropped(self):
        peer = self.connect()
        peer.send(b"x:")
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        peer.close()
        self.requests[0][1](b"reply" * 100_000)
        self.pump()
        self.assertEqual(self.open(), 0)

    def test_a_silent_client_is_dropped_after_ten_seconds_and_delays_nobody(self):
        silent = self.connect()
        self.assertEqual(self.loop.patience(), 10)
        peer = self.connect(respond=lambda _, answer: answer(b"at once"))
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual(self.received(peer), b"at once")
        self.clock.advance(10)
        self.pump()
        self.assertEqual((self.received(silent), self.open()), (b"", 0))

    def test_an_oversized_request_is_read_on_and_refused(self):
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
        self.assertEqual((self.requests, self.open()), ([], 0))

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
        self.assertEqual((len(self.requests), self.loop.selector.select(0)), (1, []))
        self.requests[0][1](b"page")
        self.assertEqual(self.received(peer), b"page")

    def test_a_bug_in_a_handler_ends_that_exchange_alone(self):
        peer = self.connect(respond=lambda _, answer: 1 / 0)
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual((self.received(peer), self.open()), (b"", 0))
        self.assertIn("ZeroDivisionError", self.logged[0])

    def test_a_bug_in_a_frame_ends_that_exchange_alone(self):
        peer = self.connect(frame=lambda buffer, eof: 1 / 0 if buffer else None)
        peer.send(b"x")
        self.pump()
        self.assertEqual((self.open(), self.loop.selector.select(0)), (0, []))
        self.assertIn("ZeroDivisionError", self.logged[0])

    def test_an_error_of_the_system_in_a_handler_is_a_bug_and_not_a_peer_that_has_gone(self):
        peer = self.connect(respond=lambda _, answer: os.unlink("/nowhere/at/all"))
        peer.shutdown(socket.SHUT_WR)
        self.pump()
        self.assertEqual((self.received(peer), self.open()), (b"", 0))
        self.assertIn("FileNotFoundError", self.logged[0])


class ConnectionsTest(Parts):
    """Caps, listeners, and what happens when descriptors run out."""

    def listener(self):
        """A listener whose connections are answered, and its address."""
        listening = socket.create_server(("127.0.0.1", 0))
        listener = pizauth.Listener(self.connections, listening, pizauth.Service(
            peer="browser", frame=pizauth.until_eof, respond=lambda _, answer: answer(b"hello")))
        self.addCleanup(listener.sock.close)
        return listener, listening.getsockname()

    def test_at_the_cap_the_one_that_has_been_reading_longest_makes_room(self):
        peers = [self.connect() for _ in range(256)]
        peers[0].send(b"x:")
        peers[0].shutdown(socket.SHUT_WR)
        self.pump()  # parked now
        self.connections.make_room("control")
        self.connections.make_room("browser")
        self.assertEqual(self.open(), 255)
        self.assertTrue(self.received(peers[1]).startswith(b"error:Too many clients"))
        self.requests[0][1](b"still here")
        self.assertEqual(self.received(peers[0]), b"still here")

    def parked(self, count, peer="control", frame=pizauth.until_eof, request=b"x:"):
        """So many clients that wait for an answer."""
        peers = [self.connect(peer, frame) for _ in range(count)]
        for one in peers:
            one.send(request)
            if peer == "control":
                one.shutdown(socket.SHUT_WR)
        self.pump()
        return peers

    def test_where_all_wait_those_that_hung_up_make_room_and_then_who_waited_longest(self):
        peers = self.parked(256)
        for gone in (7, 100):
            peers[gone].close()
        self.connections.make_room("control")
        self.assertEqual(self.open(), 254)
        self.parked(2)
        self.connections.make_room("control")
        self.assertEqual(self.open(), 255)
        self.assertEqual(self.received(peers[0]),
                         b"error:" + str(pizauth.TOO_MANY["control"]).encode())
        self.requests[1][1](b"still here")
        self.assertEqual(self.received(peers[1]), b"still here")

    def test_a_request_that_has_just_begun_does_not_make_room_for_the_next_one(self):
        peers = self.parked(250) + [self.connect() for _ in range(6)]
        self.connections.make_room("control")
        self.assertTrue(self.received(peers[0]).startswith(b"error:Too many"))
        self.clock.advance(1)
        self.connect()
        self.connections.make_room("control")
        self.assertTrue(self.received(peers[250]).startswith(b"error:Too many"))

    def test_browsers_that_all_wait_make_room_by_a_page(self):
        peers = self.parked(128, "browser", pizauth.http_head, WireTest.GOOD)
        self.connections.make_room("browser")
        self.assertEqual(self.open("browser"), 127)
        self.assertEqual(text_of(self.received(peers[0])), (503, "Too many browsers wait at once."))

    def test_out_of_descriptors_accepting_pauses_and_goes_on(self):
        listener, address = self.listener()
        peer = socket.create_connection(address)
        self.peers.append(peer)
        peer.shutdown(socket.SHUT_WR)
        with self.out_of_descriptors():
            self.pump()
        self.assertEqual((self.connections.paused, self.loop.patience()), ([listener], 1))
        self.assertEqual(self.loop.selector.select(0), [])
        self.clock.advance(1)
        self.pump()
        self.assertEqual(self.received(peer), b"hello")

    def test_accepting_stays_paused_while_there_is_no_memory_to_go_on(self):
        listener, address = self.listener()
        self.connections.pause(listener)
        self.peers.append(socket.create_connection(address))
        self.peers[-1].shutdown(socket.SHUT_WR)
        self.clock.advance(1)
        error = OSError(errno.ENOMEM, "no memory")
        with unittest.mock.patch.object(self.loop.selector, "register", side_effect=error):
            self.run_due()
        self.assertEqual((self.connections.paused, self.loop.patience()), ([listener], 1))
        self.clock.advance(1)
        self.pump()
        self.assertEqual(self.peers[-1].recv(9), b"hello")

    def test_many_connections_at_once_are_not_all_accepted_before_others_have_their_turn(self):
        listener, address = self.listener()
        self.peers += [socket.create_connection(address) for _ in range(40)]
        for connected in (32, 40):
            listener.accept(0)
            self.assertEqual(self.open("browser"), connected)

    @unittest.skipIf(os.getuid(), "only root can become another user")
    @unittest.skipUnless(sys.platform == "linux", "peers' credentials are known on Linux alone")
    def test_a_control_client_of_another_user_is_refused(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            os.chmod(directory, 0o755)
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(f"{directory}/s")
            os.chmod(f"{directory}/s", 0o777)
            listening.listen()
            pizauth.Listener(self.connections, listening, pizauth.Service(
                peer="control", frame=pizauth.until_eof,
                respond=lambda _, answer: answer(b"hello")))
            self.addCleanup(listening.close)
            script = (
                "import os, socket, sys\nos.chdir(sys.argv[1])\n"  # for TMPDIR may be private
                "if len(sys.argv) > 2: os.setuid(int(sys.argv[2]))\n"
                "s = socket.socket(socket.AF_UNIX); s.connect('s'); s.shutdown(1)\n"
                "try: print(s.recv(9).decode())\nexcept OSError: print()")
            for user, reply in (((), "hello\n"), (("12345",), "\n")):
                client = subprocess.Popen([sys.executable, "-c", script, directory, *user],
                                          stdout=subprocess.PIPE, text=True)
                while client.poll() is None:
                    self.pump()
                    time.sleep(0.01)
                self.assertEqual(client.communicate()[0], reply)
        self.assertIn("A client of another user was refused", self.logged)


class ChildrenTest(Parts):
    """Children: what they get, how they end, and that what they return arrives."""

    def setUp(self):
        super().setUp()
        self.ended = []

    def add(self, work, limit=30.0, kind="command", host=""):
        """A job whose outcome is recorded."""
        job = pizauth.Job(kind=kind, work=work, limit=limit, host=host,
                          then=lambda *outcome: self.ended.append(outcome))
        self.children.add(job)
        return job

    def start(self, *arguments, **more):
        """A job that has its child."""
        job = self.add(*arguments, **more)
        self.run_due()
        self.assertNotEqual(job.pid, 0)
        return job

    def test_a_child_that_cannot_be_watched_is_killed_and_tried_again(self):
        self.add(lambda: b"done")
        error = OSError(errno.ENOSPC, "no space")
        with unittest.mock.patch.object(self.loop.selector, "register", side_effect=error), \
                unittest.mock.patch("os.kill", wraps=os.kill) as kill:
            self.run_due()
        self.assertEqual((self.children.running, self.loop.patience()), ({}, 1))
        self.assertRaises(ChildProcessError, os.waitpid, kill.call_args[0][0], os.WNOHANG)
        self.run_until(lambda: self.ended)
        self.assertEqual(self.ended, [(0, b"done")])

    def test_a_result_that_has_come_is_not_lost_to_its_limit(self):
        job = self.start(lambda: b"tokens")
        self.assertTrue(until(lambda: not alive(job.pid)))
        self.clock.advance(40)  # suspended meanwhile
        self.run_due()
        self.assertEqual(self.ended, [(0, b"tokens")])

    def test_a_child_ends_by_itself_when_its_server_was_killed(self):
        script = (
            "import os, signal, time, pizauth; pizauth.server_imports()\n"
            "pizauth.AFTER_SUSPEND = 0; loop = pizauth.Loop(pizauth.Clock(), print)\n"
            "children, sleep = pizauth.Children(loop), lambda: time.sleep(60)\n"
            "job = pizauth.Job(kind='command', work=sleep, limit=0.1, then=print)\n"
            "children.add(job); children.run_due()\n"
            "os.write(1, b'%d' % job.pid); os.kill(os.getpid(), signal.SIGKILL)")
        done = subprocess.run([sys.executable, "-c", script], cwd=HERE, stdout=subprocess.PIPE)
        self.assertTrue(until(lambda: not alive(int(done.stdout)), 5))

    def test_a_child_tells_what_it_returned_and_how_it_ended(self):
        for work in (
            lambda: b"x" * 300_000, lambda: 1 / 0, lambda: os._exit(7),
            lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: __import__("gone.parts"),
        ):
            self.add(work, 5)
        self.run_until(lambda: len(self.ended) == 5)
        upgraded = b" (if Python was upgraded since pizauth was started, restart pizauth)"
        self.assertEqual(sorted(self.ended), [
            (-9, b""), (0, b"x" * 300_000), (1, b"ModuleNotFoundError: No module named 'gone'"
             + upgraded), (1, b"ZeroDivisionError: division by zero" + upgraded), (7, b"")])
        self.assertEqual(self.children.running, {})

    def test_children_of_others_are_reaped_too(self):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        self.run_until(lambda: not os.path.exists(f"/proc/{pid}") or not alive(pid))
        self.assertTrue(until(lambda: self.children.reap() or not self.exists(pid)))

    def exists(self, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 0)
            return True
        return False

    def test_a_child_at_its_limit_is_killed_and_reported(self):
        job = self.add(lambda: time.sleep(60), 0.1)
        self.run_until(lambda: self.ended and not self.children.running)
        self.assertEqual(self.ended, [(None, b"")])
        self.assertFalse(self.exists(job.pid))

    def test_a_child_keeps_none_of_the_servers_resources(self):
        own = os.nice(0)

        def look():
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
            descriptors = [number for number in range(3, 64) if self.is_open(number)]
            return json.dumps([
                len(descriptors), len(blocked), os.nice(0) - own,
                signal.getsignal(signal.SIGTERM) == signal.SIG_IGN]).encode()

        self.connect()
        self.add(look, kind="refresh", host="h")
        self.run_until(lambda: self.ended)
        self.assertEqual(json.loads(self.ended[0][1]), [1, 0, min(10, 19 - own), True])

    def is_open(self, descriptor):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            return True
        return False

    def test_a_job_without_a_process_is_started_once_there_is_one(self):
        """A command may make a dump of rotated tokens, and a token request is no worse for it."""
        for kind in ("command", "refresh", "mint"):
            self.add(lambda: b"done", kind=kind, host="h" if kind == "refresh" else "")
        with unittest.mock.patch("os.fork", side_effect=BlockingIOError(errno.EAGAIN, "no more")):
            for _ in range(3):
                self.pump()
                self.assertEqual((self.loop.patience(), self.ended), (1, []))
                self.clock.advance(1)
        self.run_until(lambda: len(self.ended) == 3)
        self.assertEqual(self.logged, ["Cannot start another process: no more"])

    def test_a_child_whose_limit_passed_while_the_machine_slept_gets_five_seconds_more(self):
        """Its answer may hold a rotated token, and be there already."""
        job = self.start(lambda: time.sleep(60), 30)
        for slept in (3600, 7200):
            self.clock.advance(slept)
            self.run_due()
            self.assertEqual((self.ended, self.loop.patience()), ([], 5))
        self.clock.advance(5)
        self.run_due()
        self.assertEqual(self.ended, [(None, b"")])
        self.assertTrue(until(lambda: not alive(job.pid)))
        self.children.reap()

    def test_one_job_is_started_a_pass(self):
        with unittest.mock.patch.object(self.children, "_start") as started:
            for _ in range(10):
                self.add(bytes)
            for total in range(1, 11):
                self.assertEqual(self.loop.patience(), 0)
                self.run_due()
                self.assertEqual(started.call_count, total)
            self.run_due()
            self.assertEqual((started.call_count, self.loop.patience()), (10, None))

    def test_a_job_that_is_cancelled_before_it_started_never_starts(self):
        with unittest.mock.patch.object(self.children, "_start") as started:
            cancel = self.children.run("x", {}, 5, print)
            cancel()
            cancel()
            self.run_due()
        self.assertEqual(started.call_count, 0)

    def test_a_cancelled_job_is_killed_and_its_result_dropped(self):
        cancel = self.children.run("sleep 60", {}, 5, lambda *outcome: self.ended.append(outcome))
        self.run_due()
        (job,) = self.children.running.values()
        cancel()
        self.run_until(lambda: not self.children.running)
        cancel()
        self.assertEqual((self.ended, self.exists(job.pid)), ([], False))

    def test_a_bug_in_what_takes_a_result_does_not_end_the_loop(self):
        self.children.add(pizauth.Job(kind="command", work=bytes, limit=5,
                                      then=lambda *_: 1 / 0))
        self.add(bytes)
        self.run_until(lambda: self.ended and not self.children.running)
        self.assertIn("ZeroDivisionError", "".join(self.logged))

    def test_at_the_end_children_with_a_limit_are_killed(self):
        jobs = [self.start(lambda: time.sleep(60), limit) for limit in (60, pizauth.FOR_EVER)]
        self.children.kill_all()
        self.assertTrue(until(lambda: not alive(jobs[0].pid)))
        self.assertTrue(alive(jobs[1].pid))
        os.kill(jobs[1].pid, signal.SIGKILL)
        self.run_until(lambda: not self.children.running)


class RequestQueueTest(Parts):
    """Which token request is started when; none is really forked."""

    def setUp(self):
        super().setUp()
        self.started, self.numbers = [], iter(range(1, 1000))
        self.children._start = self.record

    def record(self, job):
        job.pid, job.due = next(self.numbers), self.clock.now() + job.limit
        self.children.running[job.pid] = job
        self.started.append(job.host)

    def post(self, host="h", kind="refresh"):
        return self.children.post(kind, f"http://{host}/token", {}, "", self.requests.append)

    def start_all(self):
        """Let all start that may."""
        while self.loop.patience() == 0:
            self.run_due()

    def end(self, job, status=0, output=b"200 0 1\n{}"):
        """Have a child end."""
        with unittest.mock.patch("os.waitpid", side_effect=[(job.pid, status), (0, 0)]), \
                unittest.mock.patch("os.waitstatus_to_exitcode", return_value=status):
            job.output = output
            self.children.reap()

    def running(self):
        return list(self.children.running.values())

    def test_while_stopping_no_waiting_token_request_is_started(self):
        """It would be killed, and its answer, which may hold a rotated token, be lost."""
        for _ in range(6):
            self.post()
        self.start_all()
        self.children.stopping = True
        for job in self.running():
            self.assertTrue(self.children.in_flight())
            self.end(job)
        self.start_all()
        self.assertEqual((self.started, len(self.requests)), (["h"] * 4, 4))
        self.assertFalse(self.children.in_flight())
        self.children.run("true", {}, 5, print)  # but commands are
        self.start_all()
        self.assertEqual(self.started, ["h"] * 4 + [""])

    def test_hosts_that_hang_do_not_hold_up_another(self):
        for number in range(24):
            self.post(f"dead{number % 4}")
        self.start_all()
        self.post("alive")
        self.start_all()
        self.assertEqual(len(self.started), 12)
        self.end(self.running()[0])
        self.start_all()
        self.assertEqual(self.started[12:], ["alive"])

    def test_slots_are_kept_free_for_code_exchanges_which_come_first(self):
        for number in range(20):
            self.post(f"h{number}")
        self.start_all()
        self.assertEqual(len(self.started), 12)
        for number in range(20):
            self.post(f"u{number}", "code")
        self.start_all()
        self.assertEqual(self.started[12:], ["u0", "u1", "u2", "u3"])
        self.end(self.running()[0])
        self.start_all()
        self.assertEqual(self.started[16:], ["u4"])

    def test_one_host_takes_four_slots_at_most(self):
        cancels = [self.post("h") for _ in range(7)]
        self.start_all()
        self.post("other")
        self.post("h", "code")
        self.start_all()
        self.assertEqual(self.started, ["h"] * 4 + ["other"])
        self.end(self.running()[0])
        self.start_all()
        self.assertEqual((self.requests, self.started[5:]), ([b"200 0 1\n{}"], ["h"]))
        self.assertEqual(self.running()[-1].kind, "code")
        with unittest.mock.patch("os.kill"):
            for cancel in cancels:
                cancel()
        self.assertEqual(self.children.waiting, [])

    def test_a_request_that_was_killed_or_broke_is_no_answer(self):
        for status, output, reason in (
            (-9, b"200 0 1\n\xff", "the process that asked h ended with status -9"),
            (1, b"ImportError: no http", "the process that asked h ended with status 1:"
                                         " ImportError: no http"),
        ):
            self.post()
            self.start_all()
            self.end(self.running()[0], status, output)
            with transient_error(self) as caught:
                token_response(self.requests.pop(), [])
            self.assertEqual(
                (str(caught.exception), caught.exception.cause), (reason, "outage"))
        self.post()
        self.start_all()
        self.clock.advance(30)
        with unittest.mock.patch("os.kill"):
            self.run_due()
        with transient_error(self, "^no answer from h within 30 s$"):
            token_response(self.requests.pop(), [])


class CommandTest(Parts):
    """Shell commands, in real shells."""

    def run_commands(self, *commands, limit=5.0):
        """Run shell commands to their end; their outcomes, in order of ending."""
        ended = []
        for command in commands:
            self.children.run(command, {"PIZAUTH_ACCOUNT": "ü x"}, limit,
                              lambda *outcome: ended.append(outcome))
        self.run_until(lambda: len(ended) == len(commands))
        return ended

    def in_file(self):
        """A path for a command to write to."""
        directory = tempfile.TemporaryDirectory(prefix="piz")
        self.addCleanup(directory.cleanup)
        return os.path.join(directory.name, "out")

    def number_in(self, path):
        with open(path, encoding="ascii") as file:
            return int(file.read())

    @contextlib.contextmanager
    def shell(self, path):
        with unittest.mock.patch.dict(os.environ, {"SHELL": path or ""}):
            if path is None:
                del os.environ["SHELL"]
            yield

    def test_a_command_is_given_utf_8_in_any_locale(self):
        script = ("import pizauth; pizauth.server_imports()\n"
                  "print(pizauth.run_command('echo \\xfc $X', {'X': '\\u2019\\ud800'}, 99))")
        locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **locale},
                              cwd=HERE, stdout=subprocess.PIPE, timeout=20)
        self.assertEqual(done.stdout, "ü ’?\n".encode())

    def test_a_command_has_its_environment_no_input_and_no_descriptor_of_the_server(self):
        path = self.in_file()
        self.connect()
        inherited = os.environ.get("HOME", "")
        (outcome,) = self.run_commands(
            f'exec > {path}; echo "$PIZAUTH_ACCOUNT|$HOME|$PWD"; umask; cat;'
            " ls /proc/self/fd | wc -l; ulimit -S -n; exit 3")
        self.assertEqual(outcome, (3, b""))
        with open(path, encoding="utf-8") as file:
            name, umask, *more = file.read().split("\n")
        own = os.umask(0)
        os.umask(own)
        self.assertEqual(name, f"ü x|{inherited}|{os.getcwd()}")
        self.assertEqual(int(umask, 8), own)
        self.assertEqual(more[1], "1024")
        if os.path.isdir("/proc/self/fd"):
            self.assertEqual(more[0].strip(), "4")  # the standard three, and ls's own

    def executable(self, name, text):
        """The path of an executable file in a directory of its own."""
        directory = tempfile.TemporaryDirectory(prefix="piz")
        self.addCleanup(directory.cleanup)
        path = os.path.join(directory.name, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        os.chmod(path, 0o755)
        return path

    def test_the_shell_is_that_of_the_environment_if_it_can_run_commands_else_sh(self):
        own = self.executable("mysh", '#!/bin/sh\n[ "$1" = -c ] && exit 9\n')
        broken, plain = self.executable("broken", "\0\1"), self.executable("plain", "")
        os.chmod(plain, 0o644)
        nologin = self.executable("nologin", "#!/bin/sh\nexit 1\n")
        for path, status in (
            (None, 7), ("", 7), ("/bin/sh", 7), (own, 9), ("/", 7), (os.path.dirname(own), 7),
            ("/nope", 7), ("nope", 7), ("/nope\udcff", 7), (plain, 7), (nologin, 7), (broken, 7),
            (shutil.which("false"), 7),
        ):
            with self.subTest(path=path), self.shell(path):
                self.assertEqual(self.run_commands("exit 7"), [(status, b"")])

    def test_a_shell_that_cannot_start_is_reported_and_gives_no_verdict(self):
        huge = {"PIZAUTH_URL": "x" * (1 << 22)}  # more than a process may be given
        ended = []
        self.children.run("exit 1", huge, 5, lambda *outcome: ended.append(outcome))
        self.run_until(lambda: ended)
        ((status, reason),) = ended
        self.assertEqual(status, 0)
        self.assertTrue(reason.startswith(b"cannot start /bin/sh: "), reason)

    def test_a_command_gets_the_defaults_of_signals_back(self):
        kept = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # as the server does
        self.addCleanup(signal.signal, signal.SIGTTOU, kept)
        path = self.in_file()
        self.run_commands(
            f"{sys.executable} -c 'import signal; print([name for name in range(1, 32)"
            f" if signal.getsignal(name) == signal.SIG_IGN])' > {path}")
        with open(path, encoding="ascii") as file:
            # Python itself ignores these two.
            self.assertEqual(json.load(file), [signal.SIGPIPE, signal.SIGXFSZ])

    def test_at_its_limit_the_shell_alone_is_killed_so_a_pipeline_can_finish(self):
        path = self.in_file()
        command = f"(sleep 1; echo 7) > {path} & wait"
        start = time.monotonic()
        self.assertEqual(self.run_commands(command, limit=0.3), [(None, b"")])
        self.assertLess(time.monotonic() - start, 0.9)
        self.assertTrue(until(lambda: os.path.getsize(path)))
        self.assertEqual(self.number_in(path), 7)

    def test_a_child_that_a_command_leaves_behind_holds_nothing_up(self):
        path = self.in_file()
        self.assertEqual(self.run_commands(f"sleep 60 & echo $! > {path}"), [(0, b"")])
        os.kill(self.number_in(path), signal.SIGKILL)


def minted():
    """What the child makes that mints the certificate."""
    done = subprocess.run(
        [sys.executable, "-c", "import os, pizauth; pizauth.server_imports();"
         " os.write(1, pizauth.mint_certificate())"],
        cwd=HERE, capture_output=True, check=True)
    return json.loads(done.stdout)


@unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
class TlsTest(unittest.TestCase):
    """The TLS filter, against the standard library's client in memory."""

    @classmethod
    def setUpClass(cls):
        cls.about = minted()
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            cls.context = pizauth.minted_context(cls.about["pem"], directory)
            assert os.listdir(directory) == []
        cls.certificate = cls.about["pem"].partition("-----BEGIN CERTIFICATE-----")
        cls.certificate = "".join(cls.certificate[1:])

    def setUp(self):
        self.loop = pizauth.Loop(Clock(), lambda *_: None)
        self.ours, self.peer = socket.socketpair()
        self.ours.setblocking(False)
        self.peer.setblocking(False)
        service = pizauth.Service(
            peer="browser", frame=pizauth.http_head, context=self.context,
            respond=lambda head, answer: answer(pizauth.page(200, "worked", head[0], "")))
        self.exchange = pizauth.Exchange(pizauth.Connections(self.loop), self.ours, service)
        self.exchange.proceed()

    def tearDown(self):
        self.exchange.close()
        for sock in (self.peer, self.loop.wakeup, self.loop.woken):
            sock.close()
        self.loop.selector.close()

    def pump(self):
        while events := self.loop.selector.select(0):
            for key, mask in events:
                key.data(mask)

    def client(self, host="localhost", curve=None):
        context = ssl.create_default_context(cadata=self.certificate)
        if curve:
            context.set_ecdh_curve(curve)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        return context.wrap_bio(incoming, outgoing, server_hostname=host), incoming, outgoing

    def carry(self, incoming, outgoing, piece=65536):
        """Carry bytes between client and server until nothing moves."""
        moved = True
        while moved:
            moved = False
            while data := outgoing.read(piece):
                self.peer.send(data)
                self.pump()
                moved = True
            with contextlib.suppress(BlockingIOError):
                while data := self.peer.recv(65536):
                    incoming.write(data)
                    moved = True

    def talk(self, request, host="localhost", piece=65536):
        """What the server answers to a request over TLS."""
        client, incoming, outgoing = self.client(host)
        for act in (client.do_handshake, lambda: client.write(request)):
            for _ in range(3):
                with contextlib.suppress(ssl.SSLWantReadError):
                    act()
                    break
                self.carry(incoming, outgoing, piece)
        self.carry(incoming, outgoing, piece)
        reply = b""
        with contextlib.suppress(ssl.SSLZeroReturnError, ssl.SSLWantReadError):
            while piece := client.read(65536):
                reply += piece
        return reply

    def test_requests_over_tls_whole_and_byte_by_byte_for_every_name_of_the_host(self):
        for host in ("localhost", "127.0.0.1", "::1", os.uname().nodename):
            for piece in (65536, 1):
                with self.subTest(host=host, piece=piece):
                    self.tearDown()
                    self.setUp()
                    reply = self.talk(WireTest.GOOD, host, piece)
                    self.assertEqual(text_of(reply), (200, "/?state=s&amp;code=c"))

    def test_another_name_is_not_in_the_certificate(self):
        with self.assertRaises(ssl.SSLCertVerificationError):
            self.talk(WireTest.GOOD, "elsewhere.example")

    def test_a_handshake_costs_no_more_than_one_on_p_256(self):
        """A hello for ffdhe8192, recorded once and sent for ever, would cost 120 ms each."""
        client, incoming, outgoing = self.client(curve="secp521r1")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        self.carry(incoming, outgoing)
        self.assertEqual(self.exchange.state, "draining")
        with self.assertRaisesRegex(ssl.SSLError, "ALERT_HANDSHAKE_FAILURE"):
            client.do_handshake()

    def test_a_failed_handshake_is_told_by_an_alert(self):
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = old.wrap_bio(incoming, outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        self.carry(incoming, outgoing)
        with self.assertRaisesRegex(ssl.SSLError, "ALERT_PROTOCOL_VERSION"):
            client.do_handshake()
        self.peer.close()
        self.pump()
        self.assertEqual(self.exchange.state, "closed")

    def test_bytes_that_are_not_tls_end_the_exchange(self):
        for data in (b"\0" * 20, b"\x16\xff" * 20, b"\xff" * 999):
            self.tearDown()
            self.setUp()
            self.peer.send(data)
            self.pump()
            self.assertIn(self.exchange.state, ("closed", "draining"))

    def test_plain_http_is_told_so_in_plain_http(self):
        for data in (WireTest.GOOD, b"GET", b"POST / HTTP/1.1\r\n"):
            self.tearDown()
            self.setUp()
            self.peer.send(data)
            self.pump()
            self.assertEqual(text_of(self.peer.recv(9999))[0], 400)
            self.assertEqual(self.exchange.state, "draining")

    def test_a_refusal_is_readable(self):
        self.assertEqual(text_of(self.talk(b"POST / HTTP/1.1\r\n"))[0], 405)

    def test_too_much_tls_around_too_little_http_ends_the_exchange(self):
        client, incoming, outgoing = self.client()
        for _ in range(3):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            self.carry(incoming, outgoing)
        client.write(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(8000):  # records of one byte each
            if self.exchange.state == "closed":
                break
            with contextlib.suppress(OSError):
                client.write(b"x")
                self.carry(incoming, outgoing)
        self.assertEqual(self.exchange.state, "closed")

    def test_a_pass_decrypts_a_kibibyte_at_most(self):
        """For 27 bytes may be a KeyUpdate, and a hundred clients may send them without end."""
        sizes = []
        self.exchange.tls = unittest.mock.Mock(
            decrypt=lambda data: sizes.append(len(data)) or b"",
            outgoing=unittest.mock.Mock(pending=0))
        self.peer.send(b"x" * 5000)
        for _ in range(2):
            self.exchange.proceed()
        self.assertEqual(sizes, [1024, 1024])

    def test_bytes_after_the_answer_are_discarded_undecrypted(self):
        self.talk(WireTest.GOOD)
        self.assertEqual(self.exchange.state, "draining")
        received = self.exchange.tls.received
        self.peer.send(b"x" * 5000)
        self.pump()
        self.assertEqual((self.exchange.tls.received, self.exchange.state), (received, "draining"))

    def test_the_certificate_matches_its_description(self):
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        certificate = x509.load_pem_x509_certificate(self.certificate.encode())
        key = certificate.public_key()
        self.assertIsInstance(key.curve, ec.SECP256R1)
        point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        self.assertEqual(self.about["https_pub_key"], point.hex(":").upper())
        self.assertTrue(self.about["https_pub_key"].startswith("04:"))
        fingerprint = certificate.fingerprint(hashes.SHA256())
        self.assertEqual(self.about["https_cert_sha256"], fingerprint.hex(":").upper())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        self.assertLessEqual({"localhost", os.uname().nodename},
                             set(names.get_values_for_type(x509.DNSName)))
        self.assertEqual({str(ip) for ip in names.get_values_for_type(x509.IPAddress)},
                         {"127.0.0.1", "::1"})
        new = hasattr(certificate, "not_valid_before_utc")  # since version 42
        start, end = (
            (certificate.not_valid_before_utc, certificate.not_valid_after_utc) if new else
            (certificate.not_valid_before, certificate.not_valid_after))
        self.assertEqual(end - start, datetime.timedelta(days=825))
        utc = datetime.timezone.utc
        age = datetime.datetime.now(utc) - start.replace(tzinfo=utc)
        self.assertAlmostEqual(age.total_seconds(), 86400, delta=3600)


    def test_the_certificate_of_a_machine_whose_clock_is_not_set_is_good_once_it_is(self):
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        for now in (0, 100 * 86400, 1_600_000_000):
            certificate = pizauth.self_signed(key, now)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the names are old, but every version knows them
                lasts = certificate.not_valid_before.year, certificate.not_valid_after.year
            self.assertEqual(lasts, (1970, 2049))


# ---- The server's directories, and the command line ----


class ConnectTest(unittest.TestCase):
    """How a token request reaches its host; addresses are found by the test."""

    def hole(self):
        """The address of a listener that takes no connection: connecting to it hangs."""
        listening = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.addCleanup(listening.close)
        for _ in range(8):  # until its queue is full
            sock = socket.socket()
            self.addCleanup(sock.close)
            sock.setblocking(False)
            sock.connect_ex(listening.getsockname())
        return listening.getsockname()

    def connect(self, *places):
        """What comes of these (family, address), found for a host, with 0.2 s for each."""
        found = [(family, socket.SOCK_STREAM, 0, "", address) for family, address in places]
        with unittest.mock.patch("socket.getaddrinfo", return_value=found), \
                unittest.mock.patch.object(pizauth, "CONNECT_TIMEOUT", 0.2):
            return pizauth.connect(self.one_address, ("host.example", 443), None, None)

    def one_address(self, address, timeout):
        """Connect to an IPv4 address, as socket.create_connection() would, without a look-up."""
        sock = socket.socket()
        try:
            sock.settimeout(timeout)
            sock.connect(address)
        except OSError:
            sock.close()
            raise
        return sock

    def test_a_black_hole_of_many_addresses_leaves_time_for_the_other_family(self):
        """IPv6 is played by another number, for a machine may have none."""
        hole = self.hole()
        with socket.create_server(("127.0.0.1", 0)) as good:
            start = time.monotonic()
            with self.connect(*[(-socket.AF_INET, hole)] * 8,
                              (socket.AF_INET, good.getsockname())) as sock:
                self.assertLess(time.monotonic() - start, 0.4)
                self.assertIsNone(sock.gettimeout())

    def test_the_last_reason_is_told(self):
        with socket.create_server(("127.0.0.1", 0)) as gone:
            place = gone.getsockname()
        with self.assertRaises(ConnectionRefusedError):
            self.connect((socket.AF_INET, self.hole()), (socket.AF_INET, place))
        with self.assertRaises(socket.timeout):
            self.connect((socket.AF_INET, place), (socket.AF_INET, self.hole()))


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

    def test_it_is_in_xdg_runtime_dir_which_is_not_changed_but_made_if_it_is_missing(self):
        os.chmod(self.base, 0o755)
        self.assertEqual(pizauth.make_runtime_directory(), f"{self.base}/pizauth")
        self.assertEqual(os.stat(self.base).st_mode & 0o777, 0o755)
        self.assertEqual(os.stat(f"{self.base}/pizauth").st_mode & 0o777, 0o700)
        for missing in ("missing", "several/that/are/missing"):
            self.environ({"XDG_RUNTIME_DIR": f"{self.base}/{missing}"})
            self.assertEqual(pizauth.make_runtime_directory(), f"{self.base}/{missing}/pizauth")
            self.assertEqual(os.stat(f"{self.base}/{missing}").st_mode & 0o777, 0o700)
        with open(f"{self.base}/file", "w", encoding="ascii"):
            os.symlink("/nowhere", f"{self.base}/link")
        for wrong in ("file", "link"):
            self.environ({"XDG_RUNTIME_DIR": f"{self.base}/{wrong}"})
            self.assertEqual(self.refused(), f"Cannot make the directory {self.base}/{wrong}, mode"
                                             " 0700: File exists")

    def test_a_configuration_that_others_may_write_or_whose_secret_they_may_read_is_warned_of(self):
        path = f"{self.base}/conf"
        secret = account(extra='client_secret = "s";')
        writable = f"Other users can change {path}, and so the commands that pizauth runs: "
        readable = f"Other users can read the client_secret in {path}: "
        for text, mode, warned in (
            (account(), 0o600, None), (account(), 0o644, None), (account(), 0o444, None),
            (account(), 0o666, writable), (account(), 0o620, writable), (secret, 0o602, writable),
            (secret, 0o600, None), (secret, 0o640, None), (secret, 0o644, readable),
            (secret, 0o604, readable), (account(extra='client_secret = "";'), 0o644, None),
        ):
            with open(path, "w", encoding="ascii") as file:
                file.write(text.replace("http:", "https:"))
            os.chmod(path, mode)
            for reloading in (False, True):
                with self.subTest(text=text, mode=oct(mode), reloading=reloading):
                    warnings_ = []
                    pizauth.load_config(path, warnings_.append, reloading)
                    self.assertEqual(len(warnings_), warned is not None)
                    if warned:
                        self.assertTrue(warnings_[0].startswith(warned), warnings_)
                        self.assertIn(f"run 'chmod 600 {path}'", warnings_[0])

    def test_a_plain_http_endpoint_beyond_this_machine_is_warned_of(self):
        for uri, warned in (("https://a.example/", False), ("http://a.example/", True),
                            ("http://localhost:1/", False), ("HTTP://127.0.0.1/", False)):
            for option in ("auth_uri", "token_uri", "device_auth_uri", "revoke_uri"):
                values = {"auth_uri": "https://a", "token_uri": "https://t", option: uri}
                lines = " ".join(f'{name} = "{value}";' for name, value in values.items())
                with open(f"{self.base}/conf", "w", encoding="ascii") as file:
                    file.write(f'account "x" {{ {lines} client_id = "c"; }}')
                os.chmod(f"{self.base}/conf", 0o600)
                warnings_ = []
                pizauth.load_config(f"{self.base}/conf", warnings_.append)
                self.assertEqual(warnings_, ["Others on the network can read what account x sends:"
                                             f" write https: in {option}"] if warned else [])

    def test_a_pipe_is_nobody_elses(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.write(writer, secure(account(extra='client_secret = "s";')).encode())
        os.close(writer)
        self.assertTrue(pizauth.load_config(f"/dev/fd/{reader}", self.fail).accounts)

    def test_without_it_a_directory_named_after_the_user_is_made(self):
        import pwd

        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # as in a container
            user = str(os.getuid())
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

    def test_a_path_that_is_too_long_for_a_socket_is_reported(self):
        os.mkdir(f"{self.base}/{'x' * 100}")
        with self.assertRaisesRegex(pizauth.PizauthError, "^Cannot lock .*: AF_UNIX path too long"):
            pizauth.take_lock(f"{self.base}/{'x' * 100}")

    def test_only_one_can_hold_the_lock_even_before_there_is_a_socket(self):
        directory = pizauth.make_runtime_directory()
        lock = pizauth.take_lock(directory)
        with self.assertRaisesRegex(pizauth.PizauthError, "already running"):
            pizauth.take_lock(directory)
        os.close(lock)
        os.close(pizauth.take_lock(directory))
        self.assertEqual(os.stat(f"{directory}/pizauth.lock").st_mode & 0o777, 0o600)

    def test_the_control_socket_is_never_open_to_others(self):
        before = os.umask(0)
        try:
            with unittest.mock.patch.object(pizauth, "keep_from_sweepers"):
                pizauth.bind_control(f"{self.base}/s").close()
            self.assertEqual(os.umask(0), 0)
        finally:
            os.umask(before)
        self.assertEqual(os.stat(f"{self.base}/s").st_mode & 0o077, 0)

    def test_redirect_listeners_of_both_families_share_a_port_and_nothing_else(self):
        sockets = pizauth.bind_redirect("http_listen", pizauth.LOOPBACK, False)
        self.addCleanup(lambda: [sock.close() for sock in sockets])
        self.assertEqual(len({sock.getsockname()[1] for sock in sockets}), 1)
        for sock in sockets[1:]:
            self.assertTrue(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
        address = sockets[0].getsockname()
        with self.assertRaisesRegex(pizauth.PizauthError, "Address already in use"):
            pizauth.bind_redirect("http_listen", (address,), False)
        with self.assertRaisesRegex(pizauth.PizauthError, 'Cannot listen on http_listen "a..b:80"'):
            pizauth.bind_redirect("http_listen", (("a..b", 80),), False)

    def test_the_clock_counts_suspension_where_there_is_such_a_clock(self):
        expected = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self.assertAlmostEqual(pizauth.Clock().now(), time.clock_gettime(expected), delta=1)

    def test_the_log_has_one_harmless_line_a_message_and_none_above_its_level(self):
        for verbosity, lines in ((0, ["ERROR - a[2J", "ERROR - b"]), (1, ["ERROR - a[2J",
                                 "ERROR - b", "WARNING - w"])):
            reader, writer = os.pipe()
            log = pizauth.Log(verbosity, writer)
            for level, message in ((pizauth.ERROR, "a\x1b[2J\nb"), (pizauth.WARNING, "w"),
                                   (pizauth.INFO, "i")):
                log(level, message)
            os.close(writer)
            log(pizauth.ERROR, "to nobody")
            with open(reader, encoding="utf-8") as file:
                self.assertEqual(file.read().splitlines(), lines)

    def test_a_log_that_nobody_reads_blocks_nothing(self):
        reader, writer = os.pipe()
        log = pizauth.Log(0, writer)
        for _ in range(300):
            log(pizauth.ERROR, "x" * 9000)
        with open(reader, "rb", buffering=0) as file:
            self.assertLessEqual(max(map(len, file.read(1 << 20).splitlines())), 4095)
            log(pizauth.ERROR, "heard")
            os.close(writer)
            self.assertEqual(file.read(), b"ERROR - heard\n")

    def syslog(self):
        """A log whose syslog is a socket of the test's; that socket."""
        log = pizauth.Log(4)
        log.SYSLOG = (os.path.join(self.base, "none"), os.path.join(self.base, "log"))
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(receiver.close)
        receiver.bind(log.SYSLOG[1])
        log.use_syslog()
        self.addCleanup(log.syslog.close)
        return log, receiver

    def test_syslog_gets_datagrams_of_its_kind(self):
        log, receiver = self.syslog()
        for level in range(5):
            log(level, "m\x1b")
        for priority in (11, 12, 14, 15, 15):
            told = receiver.recv(999).decode()
            self.assertRegex(told, rf"^<{priority}>[A-Z][a-z][a-z] [ 1-3][0-9] [0-9:]{{8}} ")
            self.assertTrue(told.endswith(f" pizauth[{os.getpid()}]: m"), told)

    def test_a_syslog_that_hangs_or_is_gone_blocks_nothing(self):
        log, receiver = self.syslog()
        for number in range(5000):
            log(pizauth.ERROR, f"{number}")
        receiver.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                receiver.recv(99)
        log(pizauth.ERROR, "heard")
        self.assertTrue(receiver.recv(99).endswith(b": heard"))
        receiver.close()
        log(pizauth.ERROR, "to nobody")
        os.unlink(log.SYSLOG[1])
        log(pizauth.ERROR, "to nobody")

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "there is no dual-stack IPv6")
    def test_a_listener_on_every_ipv6_address_takes_ipv4_too_and_others_do_not(self):
        for host in ("::", "0::0", "0:0:0:0:0:0:0:0"):
            with self.subTest(host=host), pizauth.bind_inet(host, 0) as sock:
                for peer in ("::1", "127.0.0.1"):
                    socket.create_connection((peer, sock.getsockname()[1]), 5).close()
        with pizauth.bind_inet("::1", 0) as sock:
            socket.create_connection(("::1", sock.getsockname()[1]), 5).close()
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", sock.getsockname()[1]), 5)

    def test_a_port_that_is_taken_on_the_other_family_is_given_up_ten_times_at_most(self):
        for taken, tries in ((3, 4), (99, 10)):
            bound = []

            def bind(host, port, flags=0, taken=taken, bound=bound):
                bound.append((host, port))
                if host == "::1" and len(bound) < 2 * taken + 2:
                    raise OSError(errno.EADDRINUSE, "in use")
                sock = unittest.mock.Mock()
                sock.getsockname.return_value = (host, 5000 + len(bound))
                return sock

            with unittest.mock.patch.object(pizauth, "bind_inet", bind):
                if taken == 3:
                    sockets = pizauth.bind_redirect("http_listen", pizauth.LOOPBACK, False)
                    self.assertEqual(len(sockets), 2)
                else:
                    with self.assertRaisesRegex(pizauth.PizauthError, "taken on ::1"):
                        pizauth.bind_redirect("http_listen", pizauth.LOOPBACK, False)
            self.assertEqual([host for host, _ in bound], ["127.0.0.1", "::1"] * tries)
            self.assertEqual([port for host, port in bound if host == "::1"][0], 5001)

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
        for option in {**pizauth.Config.options(), **pizauth.Account.options()}:
            self.assertTrue(re.search(rf"(?m)^\.It Ic {option}\b", manual), option)

    def test_every_command_and_flag_is_in_the_manual_page(self):
        manual = self.read("pizauth.1")
        for command, (_, _, arguments) in pizauth.COMMANDS.items():
            self.assertTrue(re.search(rf"(?m)^\.It Cm {command}\b", manual), command)
            for flag in arguments:
                self.assertIn(f"Fl {flag[1:2]}" if flag.startswith("-") else "Ar", manual)

    def test_the_options_that_tokens_depend_on_and_the_reserved_keys_are_listed(self):
        compared = re.search(r"(?s)An account keeps its tokens.*?are what they were",
                             self.read("pizauth.1"))[0]
        for name, declared in pizauth.Account.options().items():
            self.assertEqual(name in re.findall(r"\w+", compared), bool(declared.dump), name)
        reserved = re.search(r"(?s)These keys are reserved.*?\.It", self.read("pizauth.conf.5"))[0]
        for key in pizauth.RESERVED_KEYS["auth_uri_fields"]:
            self.assertIn(f".Ql {key}", reserved)
        fields = re.search(r"(?s)Ic token_uri_fields.*?[.]It Ic", self.read("pizauth.conf.5"))[0]
        for key in pizauth.RESERVED_KEYS["token_uri_fields"]:
            self.assertIn(f".Ql {key}", fields)

    def test_the_example_is_a_configuration(self):
        text = self.read("pizauth.conf.example")
        self.assertTrue(pizauth.parse(text).accounts)
        for option in pizauth.Config.options():
            self.assertIn(option, text)

    def test_every_name_that_the_readme_points_at_is_in_the_program(self):
        names = re.findall(r"\b([A-Za-z_]\w+)\(\)", self.read("README"))
        self.assertGreater(len(names), 25)
        program = self.read("pizauth.py")
        self.assertEqual(
            [name for name in names if not re.search(rf"(?m)^ *(def|class) {name}\b", program)], [])

    def test_the_readme_has_the_two_commands(self):
        text = self.read("README")
        self.assertIn("python3 test_pizauth.py demo\n", text)
        self.assertIn("python3 test_pizauth.py\n", text)


# ---- The whole, as its users run it ----


class CommandLineTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon(secure(account("x"))).__enter__()
        cls.addClassCleanup(cls.daemon.__exit__)

    def run_in(self, directory, *arguments, program=CACHED):
        environment = {
            **self.daemon.environment, "XDG_RUNTIME_DIR": directory, "XDG_CONFIG_HOME": directory}
        return subprocess.run([*program, *arguments], env=environment,
                              capture_output=True, text=True, timeout=30)

    def fails(self, done, message):
        self.assertEqual(
            (done.returncode, done.stdout, done.stderr), (1, "", f"ERROR - {message}\n"))

    def test_ctrl_c_ends_a_client_by_the_signal_and_silently(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX) as hangs:
            os.mkdir(f"{directory}/pizauth", 0o700)
            hangs.bind(f"{directory}/pizauth/pizauth.sock")
            hangs.listen()
            hangs.settimeout(20)
            client = subprocess.Popen(
                [sys.executable, PROGRAM, "show", "x"],
                env={**self.daemon.environment, "XDG_RUNTIME_DIR": directory},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            with hangs.accept()[0]:
                client.send_signal(signal.SIGINT)
                self.assertEqual(client.communicate(timeout=20), (b"", b""))
            self.assertEqual(client.returncode, -signal.SIGINT)

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
        for arguments, name in ((("show", "nope"), "nope"), (("show", "--", "-x"), "-x"),
                                (("refresh", ""), ""), (("revoke", "nope"), "nope")):
            self.fails(self.daemon.run(*arguments), pizauth.no_account(name, ["x"]))

    def test_without_a_server_clients_say_so(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            for arguments in (
                ("show", "x"), ("show", "-u", "x"), ("refresh", "x"), ("status",), ("shutdown",),
            ):
                self.fails(
                    self.run_in(directory, *arguments),
                    "pizauth authenticator not running or not responding: start it with 'pizauth"
                    " server'; if it runs, it has another XDG_RUNTIME_DIR, for there is none in"
                    f" {directory}/pizauth")

    def test_a_server_that_has_lost_its_socket_is_named_with_the_remedy(self):
        for lose in (os.unlink, self.dead_socket_at):
            with Daemon(account("x")) as daemon:
                lose(daemon.socket)
                pid, where = daemon.process.pid, f"{daemon.directory}/pizauth"
                for command in ("status", "shutdown"):
                    self.fails(daemon.run(command), "pizauth authenticator not running or not"
                               f" responding: process {pid} has lost its socket in {where};"
                               f" 'kill -HUP {pid}' has it make a new one")

    def dead_socket_at(self, path):
        os.unlink(path)
        self.dead_socket(path)

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
            how = ": write one, for instance from pizauth.conf.example; the manual page is" \
                " pizauth.conf(5)"
            self.fails(self.run_in(directory, "server"), f"No config file found at {path}{how}")
            self.fails(self.run_in(directory, "server", "-c", "/nope"),
                       f"No config file found at /nope{how}")
            self.fails(
                self.run_in(directory, "server", "--config", "/"),
                "Cannot read the configuration /: Is a directory")
            with open(path, "w", encoding="ascii") as file:
                file.write("\nrefresh_rety = 5s;")
            for option in ("-n", "-d"):
                self.fails(self.run_in(directory, "server", option), (
                    f"{path}: line 2, column 1: Unknown option 'refresh_rety': did you mean "
                    "'refresh_retry'?\n    refresh_rety = 5s;\n    ^"
                ))
            self.assertEqual(os.listdir(f"{directory}/pizauth"), ["pizauth.lock"])

    def test_a_configuration_is_checked_without_a_server(self):
        """One runs here, and is neither asked nor disturbed; elsewhere none is started."""
        before = os.listdir(os.path.dirname(self.daemon.socket))
        done = self.daemon.run("server", "-n")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(os.listdir(os.path.dirname(self.daemon.socket)), before)
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            path = f"{directory}/other.conf"
            self.assertRegex(self.run_in(directory, "server", "-n").stderr,
                             "^ERROR - No config file found at ")
            with open(path, "w", encoding="ascii") as file:
                file.write(secure(account("x")))
            os.chmod(path, 0o622)
            done = self.run_in(directory, "server", "-n", "-c", path)
            self.assertEqual((done.returncode, done.stdout), (0, ""))
            self.assertRegex(done.stderr, f"^WARNING - Other users can change {path}, .*\n$")
            self.assertEqual(os.listdir(directory), ["other.conf"])

    def test_a_port_in_use_is_said_before_the_server_daemonises(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.create_server(("127.0.0.1", 0)) as other:
            address = f"127.0.0.1:{other.getsockname()[1]}"
            with open(f"{directory}/pizauth.conf", "w", encoding="ascii") as file:
                file.write(secure(account()) + f'http_listen = "{address}"; https_listen = none;')
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

    def test_pizauth_alone_lists_the_commands_on_stderr_and_exits_1(self):
        for arguments in ((), ("-v",), ("--verbose", "-v")):
            done = self.daemon.run(*arguments)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            for command, (_, text, _) in pizauth.COMMANDS.items():
                self.assertRegex(done.stderr, rf"(?m)^ +{command} +{text[:20]}")

    def test_verbose_is_taken_before_every_command_and_after_it(self):
        for arguments in (("-v", "status"), ("--verbose", "status"), ("status", "--verbose"),
                          ("-vv", "info", "-v"), ("--verbose", "info", "--verbose", "-j")):
            self.assertEqual(self.daemon.run(*arguments).returncode, 0, arguments)
        with Daemon(account("x"), "--verbose", "-v", program=[*CACHED, "-vv"]) as daemon:
            self.assertIn("TRACE", daemon.logged())
        with Daemon(account("x"), program=[*CACHED, "--verbose", "-v"]) as daemon:
            self.assertTrue("INFO" in daemon.logged() and "TRACE" not in daemon.logged())

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
        self.assertEqual(lines[3:7], ["server running:", f"  config file: {self.daemon.config}",
                                      f"  HTTP port: {port}", "  HTTPS port: none"])
        text = self.daemon.run("info", "-j", "-c", "/c").stdout
        self.assertRegex(text, r'^{"cache_directory":"[^ ]*","config_file":"/c",.*true}\n$')
        self.assertNotIn(" ", text)
        about = json.loads(text)
        self.assertEqual(about, {
            "cache_directory": f"{self.daemon.directory}/pizauth", "config_file": "/c",
            "executed_as": PROGRAM, "info_format_version": 2, "pizauth_version": pizauth.VERSION,
            "server_running": True, "server_info": {
                "config_file": self.daemon.config, "http_port": port, "https_port": "none"},
        })

    def test_info_names_the_servers_own_configuration_wherever_it_was_started(self):
        for given in ("pizauth.conf", "./pizauth.conf", None):
            options = [] if given is None else ["-c", given]
            daemon = Daemon(account("x"), *options)
            daemon.cwd = daemon.directory
            with daemon:
                lines = self.run_in(daemon.directory, "info", "-c", "/mine").stdout.split("\n")
                self.assertIn("  config file: /mine", lines[:3])
                self.assertEqual(lines[4], f"  config file: {os.path.realpath(daemon.directory)}"
                                           "/pizauth.conf")

    def test_info_needs_neither_server_nor_configuration(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            done = self.run_in(directory, "info")
            self.assertEqual(
                (done.returncode, done.stdout.split("\n")[3]), (0, "server not running"))
            about = json.loads(self.run_in(directory, "info", "-j").stdout)
            self.assertEqual((about["server_running"], "server_info" in about), (False, False))

    def patched(self, constant, value, *arguments):
        """The command line of a pizauth with another constant."""
        script = (f"import pizauth; pizauth.{constant} = {value}\n"
                  f"raise SystemExit(pizauth.main({list(arguments)}))")
        return [sys.executable, "-c", script]

    def test_a_client_does_not_wait_for_ever(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX) as other:
            os.mkdir(f"{directory}/pizauth", 0o700)
            other.bind(f"{directory}/pizauth/pizauth.sock")
            other.listen()
            environment = {**self.daemon.environment, "XDG_RUNTIME_DIR": directory}

            def asked(*arguments):
                return subprocess.run(self.patched("CLIENT_TIMEOUT", 0.2, *arguments), cwd=HERE,
                                      capture_output=True, text=True, timeout=5, env=environment)

            silent = "pizauth authenticator not running or not responding: it hangs{}, silent for" \
                " 0.2 s; {}"
            nobody = silent.format("", "end it and run 'pizauth server'")
            self.fails(asked("status"), nobody)
            with open(f"{directory}/pizauth/pizauth.lock", "w", encoding="ascii") as lock:
                lock.write("4711\n")
                lock.flush()
                self.fails(asked("show", "x"), nobody)  # and nobody holds the lock
                fcntl.flock(lock, fcntl.LOCK_EX)
                for arguments in (("show", "x"), ("shutdown",), ("dump",)):
                    self.fails(asked(*arguments), silent.format(
                        " (process 4711)", "'kill -CONT 4711' wakes one that was stopped: then"
                        " look at 'pizauth status'; otherwise 'kill -9 4711', which loses its"
                        " tokens, and 'pizauth server'"))
                self.assertTrue(asked("info").stdout.endswith("\nserver not responding\n"))
                self.assertFalse(json.loads(asked("info", "-j").stdout)["server_running"])

    def test_a_client_whose_connection_is_reset_does_not_say_that_there_is_no_socket(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX) as server:
            os.mkdir(f"{directory}/pizauth", 0o700)
            server.bind(f"{directory}/pizauth/pizauth.sock")
            server.listen()
            server.settimeout(20)
            for command in (("status",), ("show", "x")):
                client = subprocess.Popen(
                    [*CACHED, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    env={**self.daemon.environment, "XDG_RUNTIME_DIR": directory})
                with server.accept()[0] as connection:
                    connection.recv(1, socket.MSG_PEEK)  # unread, so that its close is a reset
                self.assertEqual(client.communicate(timeout=20), (
                    "", "ERROR - pizauth authenticator not running or not responding: it ended the"
                    " connection: try again\n"))
                self.assertEqual(client.returncode, 1)

    def test_a_client_waits_for_a_place_in_a_queue_that_is_full(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX) as server, contextlib.ExitStack() as stack:
            path = f"{directory}/pizauth/pizauth.sock"
            os.mkdir(f"{directory}/pizauth", 0o700)
            server.bind(path)
            server.listen(1)
            server.settimeout(20)
            others = 0
            while True:  # until the queue is full
                other = stack.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                if other.connect_ex(path) != 0:
                    break
                others += 1
            client = subprocess.Popen(
                [*CACHED, "status"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**self.daemon.environment, "XDG_RUNTIME_DIR": directory})
            self.assertIsNone(until(client.poll, 0.5))
            for _ in range(others):
                server.accept()[0].close()
            with server.accept()[0] as connection:
                while connection.recv(99):
                    pass
                connection.sendall(b"ok:served")
            self.assertEqual(client.communicate(timeout=20), (b"served\n", b""))
            self.assertEqual(client.returncode, 0)

    def test_a_queue_that_stays_full_is_a_server_that_hangs(self):
        path = os.path.join(self.daemon.directory, "full")
        sock = unittest.mock.Mock()
        sock.connect.side_effect = BlockingIOError
        with unittest.mock.patch.object(pizauth, "CONNECT_AGAIN", 0.001), \
                unittest.mock.patch.object(pizauth, "CLIENT_TIMEOUT", 0.01), \
                self.assertRaises(BlockingIOError):
            pizauth.connect_client(sock, path)
        self.assertEqual(sock.connect.call_count, 11)

    def test_a_dump_is_refused_on_a_terminal_and_written_to_anything_else(self):
        master, terminal = os.openpty()
        self.addCleanup(os.close, master)
        done = subprocess.run([*CACHED, "dump"], env=self.daemon.environment, stdout=terminal,
                              stderr=subprocess.PIPE, text=True)
        os.close(terminal)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, "^ERROR - A dump is not for a terminal: write it to a file")
        os.set_blocking(master, False)
        with contextlib.suppress(OSError):
            self.assertEqual(os.read(master, 99), b"")
        with tempfile.TemporaryFile() as file:
            subprocess.run([*CACHED, "dump"], env=self.daemon.environment, stdout=file, check=True)
            file.seek(0)
            pizauth.check_dump(file.read())

    def test_restore_of_endless_input_ends_soon_and_within_bounds(self):
        script = ("import sys, tracemalloc, pizauth; tracemalloc.start()\n"
                  "status = pizauth.main(['restore'])\n"
                  "print(tracemalloc.get_traced_memory()[1]); sys.exit(status)")
        with tempfile.TemporaryFile() as big, open("/dev/zero", "rb") as zero:
            big.truncate((16 << 20) + 1)
            for source in (big, zero):
                done = subprocess.run(
                    [sys.executable, "-c", script], stdin=source, cwd=HERE, text=True,
                    capture_output=True, timeout=20, env=self.daemon.environment)
                self.fails(types.SimpleNamespace(**{**vars(done), "stdout": ""}),
                           "Standard input is no dump: it is longer than 16384 KiB")
                self.assertLess(int(done.stdout), 48 << 20)

    def test_a_configuration_may_come_from_a_descriptor(self):
        for form in ("/proc/self/fd/{}", "/dev/fd/{}"):
            for foreground in ((), ("-d",)):
                if not os.path.isdir(os.path.dirname(form)):
                    continue
                with self.subTest(form=form, foreground=foreground):
                    self.from_descriptor(form, foreground)

    def from_descriptor(self, form, foreground):
        daemon = Daemon("")
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        reader, writer = os.pipe()
        os.write(writer, account("piped").encode())
        os.close(writer)
        daemon.process = subprocess.Popen(
            [*CACHED, "server", "-c", form.format(reader), *foreground], pass_fds=(reader,),
            env=daemon.environment, stderr=subprocess.PIPE)
        os.close(reader)
        self.assertTrue(until(daemon.answers))
        self.assertEqual(daemon.run("status").stdout, "piped: No access token\n")
        self.assertIn(form.format(reader), daemon.run("info").stdout)
        self.assertRegex(daemon.run("reload").stderr, "^ERROR - ")
        self.assertEqual(daemon.run("status").stdout, "piped: No access token\n")
        daemon.run("shutdown")
        daemon.process.communicate()

    @unittest.skipUnless(shutil.which("zsh") and shutil.which("bash"), "there is no zsh or bash")
    def test_a_configuration_may_come_from_a_process_substitution(self):
        for shell in ("zsh", "bash"):
            with self.subTest(shell=shell):
                daemon = Daemon(account("x"))
                self.addCleanup(daemon.__exit__)
                self.addCleanup(daemon.run, "shutdown")
                subprocess.run([shell, "-c", f"{PROGRAM} server -c <(cat {daemon.config})"],
                               check=True, env=daemon.environment, timeout=30)
                self.assertEqual(daemon.run("status").stdout, "x: No access token\n")

    def dead_socket(self, path):
        """Put a socket there that nobody serves."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)

    def test_a_lost_socket_is_replaced_and_another_servers_socket_ends_us(self):
        with Daemon(account("x")) as daemon:
            daemon.stop()
            os.unlink(daemon.socket)
            command = self.patched("SOCKET_CHECK", 0.1, "server", "-d")
            with open(daemon.log, "ab") as log:
                daemon.process = subprocess.Popen(
                    command, cwd=HERE, env=daemon.environment, stderr=log)
            self.assertTrue(until(daemon.answers))
            shutil.rmtree(os.path.dirname(daemon.socket))
            time.sleep(0.2)
            daemon.process.send_signal(signal.SIGHUP)  # which wakes it
            self.assertTrue(until(daemon.answers))
            for replace in (
                lambda path: os.symlink("/nowhere", path),
                lambda path: shutil.copyfile(daemon.config, path),
                self.dead_socket,
            ):
                os.unlink(daemon.socket)
                replace(daemon.socket)
                time.sleep(0.2)
                daemon.process.send_signal(signal.SIGHUP)
                self.assertTrue(until(daemon.answers))
            os.unlink(daemon.socket)
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(daemon.socket)
                other.listen()
                time.sleep(0.2)
                daemon.process.send_signal(signal.SIGHUP)
                self.assertEqual(daemon.process.wait(5), 0)
            self.assertTrue(os.path.exists(daemon.socket))
            self.assertIn("Another server has taken over", daemon.logged())

    def test_a_socket_that_could_not_be_replaced_is_tried_again(self):
        unwatched = ("with unittest.mock.patch('selectors.DefaultSelector.register',"
                     " lambda *_: os.stat('/nowhere')): server.check_socket()\n")
        no_descriptors = ("hoard = []\ntry:\n  while True: hoard.append(os.dup(0))\n"
                          "except OSError: server.check_socket()\n"
                          "for one in hoard: os.close(one)\n")
        for trouble in (unwatched, no_descriptors):
            with self.subTest(trouble=trouble), Daemon(account("x")) as daemon:
                daemon.stop()
                script = (
                    "import os, unittest.mock, pizauth; pizauth.server_imports()\n"
                    f"server = pizauth.Server({daemon.config!r}, 0, lambda server: None)\n"
                    "server._start(None); server.control_checked = -99\n"
                    f"os.unlink(server.control_path)\n{trouble}"
                    "server.control_checked = -99\n"
                    "server.check_socket(); print(pizauth.is_served(server.control_path))")
                done = subprocess.run([sys.executable, "-c", script], cwd=HERE, text=True,
                                      capture_output=True, env=daemon.environment)
                self.assertEqual(done.stdout, "True\n", done.stderr)

    def test_a_server_that_cannot_let_go_of_the_terminal_says_so_and_leaves_no_socket(self):
        with Daemon(secure(account("x"))) as daemon:
            daemon.stop()
            daemon.program = [
                sys.executable, "-c", "import pizauth\n"
                "def fail(log): raise OSError(24, 'no more')\n"
                "pizauth.Log.use_syslog = fail; raise SystemExit(pizauth.main())"]
            done = subprocess.run([*daemon.program, "server"], cwd=HERE,
                                  capture_output=True, text=True, env=daemon.environment)
            self.fails(done, "Cannot start the server: no more")
            self.assertFalse(os.path.exists(daemon.socket))

    def test_a_server_started_with_closed_streams_keeps_its_lock(self):
        daemon = Daemon(account("x"))
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        for option in ("", " -d &"):
            command = f"{sys.executable} {PROGRAM} server{option}"
            subprocess.run(["sh", "-c", f"exec 0<&- 1>&- 2>&-; {command}"], env=daemon.environment)
            self.assertTrue(until(daemon.answers))
            self.fails(daemon.run("server"), "pizauth authenticator already running")
            daemon.run("shutdown")

    @unittest.skipUnless(os.path.exists("/proc/self/limits"), "there is no /proc to read them from")
    def test_no_core_file_and_just_the_descriptors_it_needs(self):
        with open(f"/proc/{self.daemon.process.pid}/limits", encoding="ascii") as file:
            limits = file.read()
        self.assertRegex(limits, r"Max core file size +0 +0 ")
        self.assertRegex(limits, r"Max open files +1024 ")

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "there is no /proc to read them from")
    def test_the_package_that_mints_is_not_in_the_server(self):
        with Daemon(account("x", 'redirect_uri = "https://localhost/";')) as daemon:
            self.assertRegex(json.loads(daemon.ask(b"info:"))["https_port"], "^[0-9]+$")
            with open(f"/proc/{daemon.process.pid}/maps", encoding="utf-8") as file:
                self.assertNotRegex(file.read(), "cryptography|cffi")

    def replied(self, reply, *arguments, program=CACHED):
        """What a client does that gets this reply, or these, one a connection."""
        replies = [reply] if isinstance(reply, bytes) else reply
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX) as server:
            os.mkdir(f"{directory}/pizauth", 0o700)
            server.bind(f"{directory}/pizauth/pizauth.sock")
            server.listen()

            def answer():
                for one in replies:
                    with server.accept()[0] as client:
                        while client.recv(99):
                            pass
                        client.sendall(one)

            thread = threading.Thread(target=answer)
            thread.start()
            done = self.run_in(directory, *arguments, program=program)
            thread.join()
            return done

    def test_a_dump_of_nothing_or_of_a_part_is_an_error(self):
        whole = World.authorised().dump()
        for reply, message in ((b"", "The server gave no dump"),
                               (b"error:Oh", "The server gave no dump: Oh"),
                               (whole[:-1], "This is no dump of pizauth's, or it was changed or cut"
                                            " short")):
            with self.subTest(reply=reply):
                self.fails(self.replied(reply, "dump"), message)

    def test_info_ignores_a_reply_that_makes_no_sense(self):
        for reply in (b"", b"5", b"[1]", b"{", b"error:x"):
            with self.subTest(reply=reply):
                done = self.replied(reply, "info")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertTrue(done.stdout.endswith("\nserver not running\n"), done.stdout)

    def test_restore_reads_all_its_input_before_it_connects(self):
        with Daemon(account("x")) as daemon:
            dump = daemon.ask(b"dump:")
            daemon.stop()
            restore = subprocess.Popen(
                [sys.executable, PROGRAM, "restore"], env=daemon.environment,
                stdin=subprocess.PIPE, stderr=subprocess.PIPE)
            restore.stdin.write(dump[:10])
            restore.stdin.flush()
            daemon.start()
            self.assertEqual((restore.communicate(dump[10:])[1], restore.returncode), (b"", 0))

    def test_more_than_four_v_are_four(self):
        with Daemon(account("x"), "-vvvvvvv") as daemon:
            self.assertEqual(daemon.run("status", "-vvvvvvv").returncode, 0)

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

    def test_a_plain_show_imports_no_large_module(self):
        done = self.replied(b"access_token:t", "-X", "importtime", PROGRAM, "show", "x",
                            program=[sys.executable])
        bare = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", ""], capture_output=True, text=True)
        loaded, anyway = (
            set(re.findall(r"\| +(\S+)$", text.stderr, re.MULTILINE)) for text in (done, bare))
        loaded -= anyway
        self.assertEqual(done.stdout, "t\n")
        self.assertIn("_socket", loaded)
        self.assertEqual(
            loaded & {
                "socket", "re", "argparse", "json", "typing", "enum", "subprocess", "selectors"},
            set())

    def test_the_reason_of_the_last_failure_comes_first_and_the_url_last(self):
        pending, url = b"pending:http://u", "unavailable until authorised with URL http://u"
        rows = [{"account": "y", "last_error": "No."}, {"account": "x", "last_error": None}]
        failed = [*rows[:1], {"account": "x", "last_error": "Refreshing x failed: HTTP 400: gone"}]
        for status, reason in (
            (b"error:Unknown request", ""),  # as the original says
            (b"ok:" + json.dumps(rows).encode(), ""), (b"ok:[]", ""), (b"ok:{", ""), (b"", ""),
            (b"ok:5", ""), (b"ok:[[]]", ""),
            (b"ok:" + json.dumps(failed).encode(), "Refreshing x failed: HTTP 400: gone; "),
        ):
            with self.subTest(status=status):
                self.fails(self.replied([pending, status], "show", "x"),
                           f"{reason}Access token {url}")
        for command in (("show", "-j", "x"), ("refresh", "x")):
            self.fails(self.replied([pending, status], *command), f"{reason}Access token {url}")
        self.fails(self.replied([b"error:Access token has expired", status], "show", "x"),
                   f"{reason}Access token has expired")
        told = b"error:Refreshing x failed: HTTP 400: gone"
        self.fails(self.replied([told, status], "show", "x"), told[6:].decode())

    def test_every_flag_of_show_alone_and_every_pair(self):
        with Daemon(account("work")) as daemon:
            self.assertEqual(daemon.ask(b"restore:" + dump_of(daemon.config)), b"ok:")
            token = daemon.show()
            flags = {"-u": (), "-w": ("5",), "-l": ("30",), "-j": (), "-x": ("me@example.com",)}
            encoded = base64.b64encode(f"user=me@example.com\1auth=Bearer {token}\1\1".encode())
            for used in itertools.combinations_with_replacement(flags, 2):
                with self.subTest(used=used):
                    arguments = [word for flag in used for word in (flag, *flags[flag])]
                    done = daemon.run("show", *arguments, "work")
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    text = done.stdout[:-1]
                    if "-j" in used:
                        about = json.loads(text)
                        self.assertEqual(about["access_token"], token)
                        self.assertEqual(about.get("xoauth2"),
                                         encoded.decode() if "-x" in used else None)
                    else:
                        self.assertEqual(text, encoded.decode() if "-x" in used else token)
            self.assertEqual(daemon.run("show", "work", "-w").stdout, f"{token}\n")
            self.assertEqual(daemon.run("show", "-uw", "work").stdout, f"{token}\n")
            self.assertEqual(json.loads(daemon.run("status", "-j").stdout)[0]["state"], "active")
            for wrong in (("-w", "x", "work"), ("-w1.5", "work"), ("-w", "86401", "work"), ("-l",),
                          ("-l", "-5", "work"), ("-l", "", "work"), ("-x", "", "work"),
                          ("-x", "a\1b", "work"), ("-x",), ("-w", "9"), ("-l", "9" * 5000, "work")):
                with self.subTest(wrong=[word[:9] for word in wrong]):
                    done = daemon.run("show", *wrong)
                    self.assertEqual((done.returncode, done.stdout), (1, ""))
                    self.assertRegex(done.stderr, r"^usage: pizauth (.|\n)*\npizauth( show)?: .")

    def test_show_w_names_the_url_at_once_and_prints_the_token_in_the_end(self):
        provider = Provider()
        self.addCleanup(provider.close)
        with Daemon(provider.account()) as daemon:
            client = subprocess.Popen([*CACHED, "show", "-w", "20", "work"], text=True,
                                      env=daemon.environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE)
            line = client.stderr.readline()
            self.assertRegex(line, "^WARNING - Access token unavailable until authorised with URL ")
            visit(line.split()[-1])
            out, error = client.communicate(timeout=20)
            self.assertEqual((client.returncode, out, error), (0, daemon.show() + "\n", ""))
            daemon.run("revoke", "work")
            done = daemon.run("show", "-w1", "work")
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            warning, error = done.stderr.splitlines()
            self.assertEqual(warning.replace("WARNING", "ERROR"), error)

    def test_three_hundred_waiting_clients_lock_nobody_out(self):
        with Daemon(account("x")) as daemon, contextlib.ExitStack() as stack:
            url = daemon.url("x")
            socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(300)]
            for sock in socks:
                sock.connect(daemon.socket)
                sock.sendall(b"showtoken:withurl,wait=600 x")
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(20)
            self.assertEqual(daemon.run("show", "x").stderr.split()[-1], url)
            self.assertEqual(socks[0].recv(999),
                             b"error:" + str(pizauth.TOO_MANY["control"]).encode())
            for sock in socks[200:]:  # these hang up, so nobody else has to make room
                sock.close()
            for _ in range(60):
                self.assertEqual(daemon.url("x"), url)
            self.assertEqual(daemon.run("shutdown").returncode, 0)
            self.assertEqual(socks[199].recv(99), b"error:pizauth was stopped: start it again.")


ISSUER = "https://login.example.com/tenant"
METADATA = {
    "issuer": ISSUER, "authorization_endpoint": f"{ISSUER}/authorize?p=1",
    "device_authorization_endpoint": f"{ISSUER}/device", "token_endpoint": f"{ISSUER}/token",
    "revocation_endpoint": f"{ISSUER}/revoke", "jwks_uri": f"{ISSUER}/keys",
    "scopes_supported": ["openid", "offline_access"], "response_types_supported": ["code"]}
INJECTION = '";\n startup_cmd = "id'
DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE_METADATA = [  # what is changed, and the error
    *[({"issuer": issuer}, f"The metadata of {ISSUER} has the issuer '{shown}': ask for that one if"
       " you mean it") for issuer, shown in (
        ("https://evil.example\x1b[2J" + "x" * 999, "https://evil.example[2J" + "x" * 177),
        (f"{ISSUER}//", f"{ISSUER}//"), (f"{ISSUER}x", f"{ISSUER}x"),
        (ISSUER.upper(), ISSUER.upper()),
        *[(issuer, "") for issuer in ("", None, [ISSUER], {}, 5.0, DEEP)])],
    *[({"token_endpoint": uri}, f"{reason} (token_endpoint {shown})") for uri, reason, shown in (
        ("http://t.example/", "http: is for this machine alone: it must be https:",
         "http://t.example/"),
        (f"https://t.example/{INJECTION}",
         "Invalid URI: it has blanks around it, or control characters in it",
         'https://t.example/"; startup_cmd = "id'),
        ("javascript:alert(1)", "This is not a valid HTTP or HTTPS URI: it starts with javascript:"
         " instead of https:", "javascript:alert(1)"),
        ("https://u:p@t.example/", "Invalid URI: a user name or password in it is not supported",
         "https://u:p@t.example/"),
        ("https://t.example/\ud800", "'utf-8' codec can't encode character '\\ud800' in position 1:"
         " surrogates not allowed", "https://t.example/"),
        ("", "Invalid URI: it must start with https:// or http://", ""))],
    *[({"token_endpoint": uri}, f"The metadata of {ISSUER} lacks endpoints: write the account by"
       " hand") for uri in (None, 5.0, [f"{ISSUER}/token"], {"a": f"{ISSUER}/token"}, DEEP)],
    ({"authorization_endpoint": None, "device_authorization_endpoint": None},
     f"The metadata of {ISSUER} lacks endpoints: write the account by hand"),
]


class MetadataHandler(ProviderHandler):
    """Answers a GET by the provider's `documents`: status and answer, or a function, by path."""

    def do_GET(self):
        provider = self.server.provider
        provider.asked.append(self.path)
        found = provider.documents.get(self.path, (404, b"not here"))
        if callable(found):
            return found(self)
        self.reply(*found, headers=[("Location", provider.url + "/elsewhere")])


class MetadataProvider(Provider):
    handler = MetadataHandler

    def __init__(self):
        self.documents, self.asked = {}, []
        super().__init__()

    def metadata(self, issuer):
        return {"issuer": issuer, "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token"}


class DiscoverTest(unittest.TestCase):
    OPENID, OAUTH = "/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"

    def setUp(self):
        self.provider, self.daemon = MetadataProvider(), Daemon("")
        self.addCleanup(self.provider.close)
        self.addCleanup(self.daemon.__exit__)

    def block(self, **changed):
        return pizauth.account_block(ISSUER, {**METADATA, **changed})

    def parsed(self, block):
        """The account in a block, without the options that this version does not have."""
        lines = [line for line in block.splitlines()
                 if line.split()[0] not in {"revoke_uri", "issuer"} - {*pizauth.Account.options()}]
        [found] = pizauth.parse("\n".join(lines)).accounts.values()
        return found

    def fails(self, done, message):
        self.assertEqual(
            (done.returncode, done.stdout, done.stderr), (1, "", f"ERROR - {message}\n"))

    def test_the_block_of_an_account(self):
        block = self.block()
        self.assertEqual(block, """\
account "login.example.com" {
    auth_uri = "https://login.example.com/tenant/authorize?p=1";
    // device_auth_uri = "https://login.example.com/tenant/device";  // logs in with a code instead
    token_uri = "https://login.example.com/tenant/token";
    revoke_uri = "https://login.example.com/tenant/revoke";
    issuer = "https://login.example.com/tenant";
    client_auth = "basic";
    client_id = "";  // fill in what the provider gave you for your client
    // client_secret = "";  // and this one, if it gave you a secret
    // scopes = ["openid", "offline_access"];  // choose from these, and add those for mail
    redirect_uri = "http://localhost/";
}
""")
        found = self.parsed(block)
        self.assertEqual((found.name, found.auth_uri, found.token_uri, found.device_auth_uri), (
            "login.example.com", f"{ISSUER}/authorize?p=1", f"{ISSUER}/token", None))
        found = self.parsed(block.replace("// device", "device").replace("// scopes", "scopes"))
        self.assertEqual((found.device_auth_uri, found.scopes),
                         (f"{ISSUER}/device", ("openid", "offline_access")))

    def test_basic_is_printed_only_where_post_is_not_offered(self):
        for methods, client_auth in (
            (["client_secret_basic"], "basic"), (["client_secret_post"], "post"),
            (["client_secret_basic", "client_secret_post"], "post"), (["none"], "post"),
            ([], "post"), (None, "post"), ("client_secret_basic", "post"),
        ):
            with self.subTest(methods=methods):
                block = self.block(token_endpoint_auth_methods_supported=methods)
                self.assertEqual(self.parsed(block).client_auth, client_auth)
        self.assertEqual(self.parsed(self.block()).client_auth, "basic")  # the default

    def test_a_provider_that_knows_only_the_device_login(self):
        found = self.parsed(self.block(authorization_endpoint=None, scopes_supported=None))
        self.assertEqual((found.auth_uri, found.device_auth_uri), ("", f"{ISSUER}/device"))

    def test_a_slash_at_the_issuers_end_is_printed_as_the_metadata_has_it(self):
        self.assertIn(f'\n    issuer = "{ISSUER}/";\n', self.block(issuer=f"{ISSUER}/"))

    def test_hostile_metadata_is_refused(self):
        for changed, message in HOSTILE_METADATA:
            with self.subTest(changed=str(changed)[:99]):
                with self.assertRaises(pizauth.PizauthError) as caught:
                    self.block(**changed)
                self.assertEqual(str(caught.exception), message)

    def test_hostile_metadata_that_is_printed_changes_no_other_line(self):
        usual = [line for line in self.block().splitlines() if "issuer" in line or "id" in line]
        for name, value in (
            *[("token_endpoint", f"https://t.example/{path}") for path in (
                '";startup_cmd="id";//', "\\", "\u202e\x9b2J\u2028", "{}$(id)`id`'", " x")],
            ("token_endpoint", 'https://t";{}.example/'), ("token_endpoint", "http://localhost:1/"),
            ("device_authorization_endpoint", "https://d.example/\u2028token_uri"),
            *[("scopes_supported", scopes) for scopes in (
                [INJECTION, "\x1b[2J", "\x9b2J", "\u2028x", "\ud800", "\x7f", None, 5.0, DEEP], {},
                "openid", {INJECTION: 1}, 5.0, True, DEEP)],
        ):
            with self.subTest(name=name, value=str(value)[:99]):
                block = self.block(**{name: value})
                self.assertRegex(block, r"\A[ -~\n]+\Z")
                self.assertEqual(len(block.splitlines()), 12)
                self.assertLess(set(usual[:-1]), set(block.splitlines()))
                self.parsed(block)
                uri = self.parsed(block.replace("// device", "device")).token_uri
                if name == "token_endpoint":
                    self.assertEqual(uri, pizauth.normal_uri(value))

    def test_where_metadata_is_looked_for(self):
        """With and without a path, and a slash: the person's need not be the provider's."""
        url = self.provider.url
        for path, place in (("", self.OPENID), ("", self.OAUTH), ("/a/b", f"/a/b{self.OPENID}"),
                            ("/a/b", f"{self.OAUTH}/a/b")):
            for typed, real in itertools.product(("", "/"), repeat=2):
                with self.subTest(place=place, typed=typed, real=real):
                    self.provider.asked.clear()
                    issuer = url + path + real
                    self.provider.documents = {place: (200, self.provider.metadata(issuer))}
                    done = self.daemon.run("discover", url + path + typed)
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
                    self.assertIn(f'\n    issuer = "{issuer}";\n', done.stdout)
                    self.assertEqual(self.parsed(done.stdout).auth_uri, f"{url}/authorize")
                    self.assertEqual(self.provider.asked[-1], place)
        self.assertEqual(os.listdir(self.daemon.directory), ["pizauth.conf"])  # no server's

    def test_issuers_that_are_not_asked(self):
        for issuer, message in (
            ("http://login.example.com", "http: is for this machine alone: it must be https:"
             " (issuer http://login.example.com)"),
            ("ftp://x", "This is not a valid HTTP or HTTPS URI: it starts with ftp: instead of"
             " https: (issuer ftp://x)"),
            ("me@login.example.com", "Invalid URI: a user name or password in it is not supported"
             " (issuer https://me@login.example.com)"),
            ("", "Invalid URI: its host or port is missing or misspelt; write https://HOST/PATH"
             " (issuer https://)")):
            with self.subTest(issuer=issuer):
                self.fails(self.daemon.run("discover", issuer), message)

    def test_without_a_scheme_it_is_https(self):
        place = self.provider.url.partition("//")[2]
        self.assertRegex(self.daemon.run("discover", place).stderr,
                         rf"^ERROR - No metadata of https://{place}: no answer from {place}: .*\n$")

    def test_metadata_of_another_issuer_is_refused(self):
        url = self.provider.url
        self.provider.documents = {
            f"/a{self.OPENID}": (200, self.provider.metadata(f"{url}/b")),
            f"{self.OAUTH}/a": (200, self.provider.metadata(f"{url}/a"))}
        self.fails(self.daemon.run("discover", f"{url}/a"),
                   f"The metadata of {url}/a has the issuer '{url}/b': ask for that one if you mean"
                   " it")

    def test_answers_that_are_no_metadata(self):
        url = self.provider.url
        long = json.dumps(self.provider.metadata(url)).encode().ljust((1 << 20) + 1)
        for answer, reason in (
            (None, f"HTTP 404 at {url}{self.OAUTH}"), ((302, {}), f"HTTP 302 at {url}{self.OAUTH}"),
            ((200, PORTAL), f"HTTP 200 at {url}{self.OAUTH}"),
            ((200, long), f"HTTP 200 at {url}{self.OAUTH}"),
            ((200, b"[" * 10**6), f"HTTP 200 at {url}{self.OAUTH}"),
            ((200, {}), f"HTTP 200 at {url}{self.OAUTH}"),
            (FAULTS["short"][1], f"no answer from {url[7:]}: it was cut short"),
            (FAULTS["garbage"][1], f"no answer from {url[7:]}: it is not HTTP (BadStatusLine)"),
        ):
            with self.subTest(reason=reason):
                found = (lambda handler, fault=answer: fault(handler, {})) if callable(answer) \
                    else answer
                self.provider.documents = {} if answer is None else {
                    self.OPENID: found, self.OAUTH: found}
                self.fails(self.daemon.run("discover", url),
                           f"No metadata of {url}: {reason}: is that the issuer's right name?")
        self.assertEqual(set(self.provider.asked), {self.OPENID, self.OAUTH})  # not /elsewhere

    def test_a_provider_that_is_silent_is_given_up(self):
        self.provider.documents = dict.fromkeys(
            (self.OPENID, self.OAUTH), lambda handler: FAULTS["silent"][1](handler, {}))
        done = subprocess.run(
            [sys.executable, "-c", "import pizauth, sys; pizauth.CLIENT_TIMEOUT = 0.2\n"
             "sys.exit(pizauth.main())", "discover", self.provider.url], cwd=HERE, text=True,
            capture_output=True, env=self.daemon.environment, timeout=20)
        self.fails(done, f"No metadata of {self.provider.url}: no answer from"
                         f" {self.provider.url[7:]}: timed out: is that the issuer's right name?")


class HeaderTest(unittest.TestCase):
    """A plain copy of the program, run by its name as its users run it."""

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="piz")
        self.addCleanup(directory.cleanup)
        self.base = directory.name
        os.mkdir(f"{self.base}/my bin")
        self.program = f"{self.base}/my bin/pizauth"
        shutil.copy(PROGRAM, self.program)
        os.mkdir(f"{self.base}/python")  # where `python3` is the one that runs the tests
        with open(f"{self.base}/python/python3", "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        os.chmod(f"{self.base}/python/python3", 0o755)
        self.environment = {
            "PATH": f"{self.base}/python:{os.environ['PATH']}", "XDG_RUNTIME_DIR": self.base}

    def run_it(self, *command, **more):
        return subprocess.run(command, env={**os.environ, **self.environment}, text=True,
                              capture_output=True, timeout=30, **more)

    def says_its_version(self, *command, **more):
        done = self.run_it(*command, "--version", **more)
        self.assertEqual((done.returncode, done.stdout, done.stderr),
                         (0, f"pizauth {pizauth.VERSION}\n", ""), command)

    @property
    def cache(self):
        return importlib.util.cache_from_source(f"{self.base}/my bin/pizauth")

    def test_it_runs_by_its_cached_bytecode_which_it_makes_itself(self):
        self.says_its_version(self.program)
        with open(self.cache, "rb") as file:
            head = file.read(16)
        with open(self.cache, "wb") as file:  # other code for the same source
            file.write(head + marshal.dumps(compile("print('cached')", "x", "exec")))
        self.assertEqual(self.run_it(self.program).stdout, "cached\n")

    def test_it_runs_under_every_shell(self):
        shells = ("sh", "dash", "bash", "busybox", "ksh", "mksh", "zsh")
        for shell in filter(shutil.which, shells):
            with self.subTest(shell=shell):
                names = (shell, "sh") if shell == "busybox" else (shell,)
                self.says_its_version(*names, self.program)
                done = self.run_it(*names, self.program, "show", "a 'b' \"c\" $d")
                self.assertIn("not running or not responding", done.stderr)

    def test_it_runs_by_a_symbolic_link_and_is_cached_beside_the_file(self):
        os.mkdir(f"{self.base}/links")
        os.symlink(self.program, f"{self.base}/links/piz auth")
        self.says_its_version(f"{self.base}/links/piz auth")
        self.assertTrue(os.path.exists(self.cache))
        self.assertEqual(os.listdir(f"{self.base}/links"), ["piz auth"])
        about = json.loads(self.run_it(f"{self.base}/links/piz auth", "info", "-j").stdout)
        self.assertEqual(about["executed_as"], f"{self.base}/links/piz auth")

    def test_it_runs_where_no_cache_can_be_written(self):
        with open(f"{self.base}/my bin/__pycache__", "w", encoding="ascii"):
            self.says_its_version(self.program)

    def test_the_environment_of_python_does_not_matter(self):
        self.environment.update(PYTHONHOME="/nowhere", PYTHONPATH=f"{self.base}/traps")
        self.set_traps(f"{self.base}/traps")
        self.says_its_version(self.program)
        self.assertFalse(os.path.exists(f"{self.base}/sprung"))

    def set_traps(self, directory):
        """Modules with the names of the standard library's, which tell when they are imported."""
        os.makedirs(directory, exist_ok=True)
        for name in ("argparse", "base64", "email", "http", "importlib", "json", "re", "selectors",
                     "signal", "socket", "ssl", "stat", "traceback", "urllib", "cryptography"):
            with open(f"{directory}/{name}.py", "w", encoding="utf-8") as file:
                file.write(f"open({self.base + '/sprung'!r}, 'a').write({name!r})\n")

    def test_no_module_is_taken_from_beside_it_or_from_the_working_directory(self):
        self.set_traps(f"{self.base}/my bin")
        self.set_traps(f"{self.base}/here")
        provider = Provider()
        self.addCleanup(provider.close)
        for program in ([self.program], [sys.executable, self.program]):
            for redirect in ("http", "https"):
                if redirect == "https" and not importlib.util.find_spec("cryptography"):
                    continue
                extra = f'redirect_uri = "{redirect}://localhost/";'
                with self.subTest(program=program, redirect=redirect), Daemon(
                        provider.account("work", extra), program=program,
                        environment={"PATH": self.environment["PATH"]},
                        cwd=f"{self.base}/here") as daemon:
                    self.log_in(daemon)
                    self.assertRegex(daemon.show(), "^at-")
                    self.assertEqual(daemon.run("status").returncode, 0)
                    self.assertEqual(daemon.run("shutdown").returncode, 0)
        self.assertFalse(os.path.exists(f"{self.base}/sprung"))

    def log_in(self, daemon):
        """Log in over HTTP or HTTPS."""
        unchecked = ssl.create_default_context()
        unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}),
                                             urllib.request.HTTPSHandler(context=unchecked))
        with opener.open(daemon.url(), timeout=20) as page:
            self.assertIn("is authorised", page.read().decode())


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
        self.provider.expires_in = 2
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
                daemon.process.wait(0.5)
            else:
                daemon.process.send_signal(end)
            self.assertEqual(daemon.process.wait(3), 0)
            self.assertEqual(os.listdir(os.path.dirname(daemon.socket)), ["pizauth.lock"])
            self.assertEqual(daemon.logged(), "")

    def test_shutdown_and_then_server_works_and_the_daemon_has_a_session_of_its_own(self):
        daemon = Daemon(self.provider.account())
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        self.assertEqual(daemon.run("server").returncode, 0)
        for _ in range(5):
            self.assertEqual(daemon.ask(b"shutdown:"), b"")
            done = daemon.run("server")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        with open(os.path.join(daemon.directory, "pizauth", "pizauth.lock"), "rb") as file:
            pid = int(file.read())
        self.assertEqual(os.getsid(pid), pid)

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

    def test_no_fault_of_a_provider_costs_a_login_or_reveals_a_secret(self):
        """All at once, so that those which end at the limit, here 3 s, take it once."""
        bad = faults(FAILS, FAILS_LATE)
        names = sorted({*bad, "late"})
        accounts = {fault: self.provider.account(fault, fault=fault) for fault in names}
        daemon = self.start("".join(accounts.values()) + "refresh_retry = 1s;", "-vvvv",
                            prelude="pizauth.TOKEN_REQUEST_LIMIT = 3")
        tokens = {}
        for fault in accounts:
            daemon.visit(fault)
            tokens[fault] = daemon.ask(f"showtoken:withurl {fault}".encode())
            self.assertRegex(tokens[fault], b"^access_token:at-")
        secrets_told = self.secrets(tokens)
        self.provider.broken = True
        for fault in accounts:
            daemon.ask(f"refresh:withurl {fault}".encode())
        start = time.monotonic()

        def failed():
            lines = daemon.ask(b"status:").decode()[3:].split("\n")
            return {line.split(":")[0] for line in lines if "; last error at" in line}

        until(lambda: failed() == bad, 25)
        self.assertEqual(failed(), bad)
        self.assertLess(time.monotonic() - start, 20)
        for fault in bad:
            self.assertEqual(daemon.ask(f"showtoken:withurl {fault}".encode()), tokens[fault])
        late = daemon.ask(b"showtoken:withurl late")  # slow is no failure
        self.assertNotIn(late, (b"", tokens["late"]))
        self.assertRegex(late, b"^access_token:at-")
        self.assertEqual(self.provider.stray, [])
        status = daemon.ask(b"status:").decode()
        self.provider.broken = False
        for fault in faults(FAILS):
            daemon.ask(f"refresh:withurl {fault}".encode())
            until(lambda fault=fault: (
                daemon.ask(f"showtoken:withurl {fault}".encode()) != tokens[fault]))
            self.assertNotEqual(
                daemon.ask(f"showtoken:withurl {fault}".encode()), tokens[fault], fault)
        for place in (
            daemon.logged(), status, daemon.run("info", "-j").stdout, daemon.run("info").stdout,
            process_list(),
        ):
            for secret in {*secrets_told, "at-leaked", "rt-leaked"}:
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

    def test_good_answers_in_odd_wrappings_keep_the_rotated_token(self):
        self.provider.broken = True
        names = sorted(faults(WRAPPED))
        daemon = self.start("".join(self.provider.account(name, fault=name) for name in names))
        tokens = {}
        for name in names:
            daemon.visit(name)
            tokens[name] = daemon.ask(f"showtoken:withurl {name}".encode())
        for _ in range(2):  # the second one needs the refresh token that came with the first
            for name in names:
                daemon.ask(f"refresh:withurl {name}".encode())
            for name in names:
                with self.subTest(name=name):
                    shown = f"showtoken:withurl {name}".encode()
                    self.assertTrue(until(lambda: daemon.ask(shown) != tokens[name]))  # noqa: B023
                    tokens[name] = daemon.ask(shown)
                    self.assertRegex(tokens[name], b"^access_token:at-")
        self.assertNotIn(b"error", daemon.ask(b"status:"))

    def test_where_a_token_endpoint_redirects_to_is_told(self):
        self.provider.broken = True
        daemon = self.start("".join(self.provider.account(f, fault=f) for f in ("302", "redirect")))
        for fault in ("302", "redirect"):
            daemon.visit(fault)
            daemon.ask(f"refresh:withurl {fault}".encode())
        self.assertTrue(until(lambda: daemon.ask(b"status:").count(
            f"not followed, here to {self.provider.url}/elsewhere: is token_uri".encode()) == 2))
        self.assertEqual(self.provider.stray, [])

    def test_a_proxy_for_all_schemes_is_used_and_a_socks_proxy_is_a_sentence(self):
        status, _ = self.posted("http://provider.example/token",
                                {"http_proxy": "", "ALL_PROXY": self.provider.url})
        self.assertEqual((status, len(self.provider.posts)), (401, 1))
        for name in ("ALL_PROXY", "http_proxy"):
            proxies = {"http_proxy": "", name: "socks5h://me:hush@127.0.0.1:1"}
            status, rest = self.posted("http://provider.example/token", proxies)
            self.assertEqual(status, 0)
            self.assertRegex(rest, b"no answer from provider.example: a socks5h proxy is set .*"
                                   b" only HTTP proxies")
            self.assertNotIn(b"hush", rest)

    def test_a_server_on_a_terminal_in_the_background_is_not_stopped_by_its_log(self):
        """As with `stty tostop; pizauth server -d -vvvv &` in an interactive shell."""
        for verbosity in ("-vvvv", "-v"):
            daemon = Daemon(account("x"))
            self.addCleanup(daemon.__exit__)
            os.chmod(daemon.config, 0o666)  # a warning is the first line that it writes
            script = (
                "import fcntl, os, subprocess, sys, termios, threading\n"
                "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
                "modes = termios.tcgetattr(0); modes[3] |= termios.TOSTOP\n"
                "termios.tcsetattr(0, termios.TCSANOW, modes)\n"
                "server = subprocess.Popen(sys.argv[1:], preexec_fn=lambda: os.setpgid(0, 0))\n"
                "raise SystemExit(server.wait())")
            master, terminal = os.openpty()
            starter = subprocess.Popen(
                [sys.executable, "-c", script, *CACHED, "server", "-d", verbosity],
                env=daemon.environment, stdin=terminal, stdout=terminal, stderr=terminal)
            os.close(terminal)
            self.addCleanup(os.close, master)
            self.addCleanup(starter.kill)
            self.assertTrue(until(daemon.answers, 5))
            for _ in range(20):
                self.assertEqual(daemon.ask(b"nonsense", 5)[:6], b"error:")
            self.assertEqual(daemon.run("shutdown").returncode, 0)
            self.assertEqual(starter.wait(5), 0)
            self.assertIn(b"WARNING - Other users can change", os.read(master, 4096))

    @unittest.skipUnless(os.path.exists("/proc/self/comm"), "there is no /proc to read it from")
    def test_the_process_is_called_pizauth(self):
        foreground = self.start(self.provider.account())
        background = Daemon(account("x"))
        self.addCleanup(background.__exit__)
        self.addCleanup(background.run, "shutdown")
        self.assertEqual(background.run("server").returncode, 0)
        with open(f"{background.directory}/pizauth/pizauth.lock", encoding="ascii") as lock:
            pids = foreground.process.pid, int(lock.read())
        for pid in pids:
            with open(f"/proc/{pid}/comm", encoding="ascii") as file:
                self.assertEqual(file.read(), "pizauth\n")

    def test_a_runtime_directory_that_became_unwritable_ends_it_cleanly_and_tells_browsers(self):
        unwritable = ("import os; unlink = os.unlink\n"
                      "def refuse(path):\n"
                      "    if path.endswith('.sock'): raise OSError({0}, os.strerror({0}))\n"
                      "    unlink(path)\n"
                      "os.unlink = refuse")
        for number in (errno.EACCES, errno.EROFS):
            daemon = self.start(self.provider.account(fault="silent-code"), "-vv",
                                prelude=unwritable.format(number))
            url, pages = daemon.url(), []
            browser = threading.Thread(target=lambda: pages.append(visit(url)))  # noqa: B023
            browser.start()
            self.assertTrue(until(lambda: self.provider.slow))
            daemon.process.terminate()
            daemon.process.send_signal(signal.SIGINT)  # which ends the grace
            self.assertEqual(daemon.process.wait(10), 0)
            browser.join()
            self.assertIn("pizauth was stopped", pages[0][1])
            self.assertIn(f"Cannot remove {daemon.socket}: {os.strerror(number)}", daemon.logged())
            self.assertNotIn("Traceback", daemon.logged())
            self.provider.slow = False

    def test_a_warning_of_a_loose_configuration_reaches_the_terminal_and_later_the_log(self):
        daemon = Daemon(self.provider.account())
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        os.chmod(daemon.config, 0o644)
        done = daemon.run("server")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stderr, "^WARNING - Other users can read the client_secret in .*'\n$")
        daemon.run("shutdown")
        os.chmod(daemon.config, 0o600)
        daemon.options = ("-v",)
        daemon.start()
        self.assertEqual(daemon.logged(), "")
        os.chmod(daemon.config, 0o664)
        self.assertEqual(daemon.run("reload").returncode, 0)
        self.assertRegex(daemon.logged(), "^WARNING - Other users can change ")

    def test_a_browser_that_insists_on_https_is_told_of_in_the_log(self):
        daemon = self.start(self.provider.account(), "-v")
        port = int(json.loads(daemon.ask(b"info:"))["http_port"])
        for _ in range(2):
            with socket.create_connection(("127.0.0.1", port)) as sock, \
                    self.assertRaises((ssl.SSLError, OSError)):
                ssl.create_default_context().wrap_socket(sock, server_hostname="localhost")
        self.assertEqual(daemon.logged().count("HTTPS to the HTTP port"), 2)
        self.assertIn("WARNING - A browser request was refused", daemon.logged())

    def test_more_clients_than_connections_at_one_moment_are_all_served(self):
        daemon = self.start(self.provider.account())
        daemon.visit()
        token = daemon.show()
        clients = [subprocess.Popen([*CACHED, "show", "work"], stdout=subprocess.PIPE,
                                    env=daemon.environment) for _ in range(20)]
        daemon.process.send_signal(signal.SIGSTOP)
        socks = []
        for _ in range(600):
            sock = socket.socket(socket.AF_UNIX)
            self.addCleanup(sock.close)
            sock.setblocking(False)
            socks.append(sock.connect_ex(daemon.socket))
        self.assertIn(errno.EAGAIN, socks)
        clients += [subprocess.Popen([*CACHED, "show", "work"], stdout=subprocess.PIPE,
                                     env=daemon.environment) for _ in range(20)]
        until(lambda: False, 0.5)
        daemon.process.send_signal(signal.SIGCONT)
        told = [client.communicate(timeout=20)[0].decode().strip() for client in clients]
        self.assertEqual(told, [token] * 40)

    def redirected(self, daemon):
        """The address at which a browser ends that cannot reach the server."""
        query = query_of(daemon.url())
        return self.provider.authorize(query)

    def test_complete_by_argument_pipe_and_terminal(self):
        self.provider.expires_in = 3600
        daemon = self.start(self.provider.account(fault="slow"))
        told = (0, "Account work is authorised\n", "")
        done = daemon.run("complete", self.redirected(daemon))
        self.assertEqual((done.returncode, done.stdout, done.stderr), told)
        self.assertRegex(daemon.show(), "^at-")
        daemon.run("revoke", "work")
        done = subprocess.run([*CACHED, "complete"], input=f"<{self.redirected(daemon)}>\n",
                              env=daemon.environment, capture_output=True, text=True, timeout=30)
        self.assertEqual((done.returncode, done.stdout, done.stderr), told)
        daemon.run("revoke", "work")
        done = daemon.run("complete", self.redirected(daemon).replace("code=", "code=x"))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, "^ERROR - Authentication for work failed: HTTP 400: invalid_")
        done = subprocess.run([*CACHED, "complete"], stdin=subprocess.DEVNULL, text=True,
                              env=daemon.environment, capture_output=True, timeout=30)
        self.assertRegex(done.stderr, "^ERROR - This is not the address of a redirect: paste all")

    def test_complete_takes_a_long_address_and_a_wrapped_one_from_a_terminal(self):
        daemon = self.start(self.provider.account())
        long = "&filler=" + "x" * 6000
        for number, wrap in enumerate((lambda url: url + long,
                                       lambda url: "\n".join(re.findall(".{1,40}", url)))):
            with self.subTest(number=number):
                daemon.run("revoke", "work")
                master, terminal = os.openpty()
                environment = {**daemon.environment, "TERM": "xterm"}
                client = subprocess.Popen([*CACHED, "complete"], env=environment,
                                          stdin=terminal, stdout=terminal, stderr=terminal,
                                          start_new_session=True)
                os.close(terminal)
                shown = b""
                while b"press Enter:" not in shown:
                    shown += os.read(master, 4096)
                text = b"\n" + wrap(self.redirected(daemon)).encode() + b"\n"
                while text:  # a terminal takes a few at a time, and echoes them
                    text = text[os.write(master, text[:500]) :]
                    shown += os.read(master, 99_999)
                with contextlib.suppress(OSError):  # how a terminal ends
                    while piece := os.read(master, 99_999):
                        shown += piece
                self.assertEqual(client.wait(20), 0, shown[-500:])
                self.assertIn(b"Account work is authorised", shown)
                os.close(master)
                self.assertRegex(daemon.show(), "^at-")

    def test_six_servers_at_once_leave_one(self):
        daemon = Daemon(self.provider.account())
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        servers = [subprocess.Popen([sys.executable, PROGRAM, "server"], env=daemon.environment,
                                    stderr=subprocess.PIPE, text=True) for _ in range(6)]
        told = sorted((server.wait(30), server.communicate()[1]) for server in servers)
        refused = (1, "ERROR - pizauth authenticator already running\n")
        self.assertEqual(told, [(0, ""), *[refused] * 5])
        self.assertEqual(daemon.run("status").returncode, 0)

    def test_the_whole_with_hooks_reload_revoke_and_restore(self):
        text = self.provider.account(fault="portal") + (
            'startup_cmd = "echo started >> $HOME/told";'
            ' auth_notify_cmd = "echo $PIZAUTH_ACCOUNT $PIZAUTH_URL >> $HOME/told";'
            ' error_notify_cmd = "echo $PIZAUTH_ACCOUNT $PIZAUTH_MSG >> $HOME/told";'
            ' token_event_cmd = "echo $PIZAUTH_ACCOUNT $PIZAUTH_EVENT >> $HOME/told;'
            f' {sys.executable} {PROGRAM} dump > $HOME/new && mv $HOME/new $HOME/dump";')
        daemon = self.start(text)
        path = os.path.join(daemon.directory, "dump")

        def told(text):
            def found():
                with open(os.path.join(daemon.directory, "told"), encoding="utf-8") as file:
                    return text in file.read().split("\n")
            return until(found)

        self.assertTrue(until(lambda: os.path.exists(os.path.join(daemon.directory, "told"))))
        self.assertTrue(told("started"))
        url = daemon.url()
        self.assertTrue(told(f"work {url}"))
        visit(f"{query_of(url)['redirect_uri']}?state={query_of(url)['state']}&error=denied")
        self.assertTrue(told("work Authentication for work failed: denied"))
        daemon.visit()
        self.assertTrue(told("work token_new"))
        first = daemon.show()
        self.assertEqual(daemon.run("reload").returncode, 0)
        self.assertEqual(daemon.show(), first)
        daemon.run("refresh", "work")
        self.assertTrue(told("work token_refreshed"))
        second = daemon.show()
        self.assertTrue(until(lambda: self.holds(path, second)))
        self.provider.broken = True  # a junk answer changes neither state nor dump
        daemon.run("refresh", "work")
        self.assertTrue(until(lambda: "last error" in daemon.run("status").stdout))
        self.assertEqual(daemon.show(), second)
        self.assertTrue(self.holds(path, second))
        with open(path, "rb") as file:
            kept = file.read()
        self.assertEqual(daemon.run("revoke", "work").returncode, 0)
        self.assertTrue(told("work token_revoked"))
        self.assertEqual(daemon.show(), "")
        done = subprocess.run([sys.executable, PROGRAM, "restore"], input=kept,
                              env=daemon.environment, capture_output=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b"", b""))
        self.assertEqual(daemon.show(), second)
        done = subprocess.run([sys.executable, PROGRAM, "restore"], input=kept[:-1],
                              env=daemon.environment, capture_output=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"ERROR - This is no dump", done.stderr)

    def holds(self, path, access_token):
        """Is this token in a dump?"""
        with contextlib.suppress(OSError, pizauth.RequestError), open(path, "rb") as file:
            return access_token.encode() in pizauth.decrypt_dump(file.read())
        return False

    def test_results_in_flight_at_the_end_reach_the_dump_and_the_next_server(self):
        """And so does the last good refresh token after an outage, a junk answer, a restart."""
        hook = f"{sys.executable} {PROGRAM} dump > $HOME/new && mv $HOME/new $HOME/dump"
        daemon = self.start(self.provider.account(fault="slow") + f'token_event_cmd = "{hook}";')
        path = os.path.join(daemon.directory, "dump")
        for end in ("shutdown", signal.SIGTERM):
            if end == "shutdown":
                daemon.visit()
                self.assertTrue(until(lambda: self.holds(path, daemon.show())))
            else:
                daemon.start()
                with open(path, "rb") as file:
                    self.assertEqual(daemon.ask(b"restore:" + file.read()), b"ok:")
            before = daemon.show()
            self.provider.broken = True  # which makes a refresh take half a second
            posts = len(self.provider.posts)
            daemon.run("refresh", "work")
            until(lambda: daemon.ask(b"status:") and self.provider.slow)
            start = time.monotonic()
            if end == "shutdown":
                daemon.run("shutdown")
            else:
                daemon.process.send_signal(end)
            self.assertEqual(daemon.process.wait(5), 0)
            self.assertLess(time.monotonic() - start, 3)
            self.assertEqual(len(self.provider.posts), posts + 1)
            self.provider.slow = False
            self.assertFalse(self.holds(path, before))
        self.provider.broken = False
        daemon.start()
        with open(path, "rb") as file:
            self.assertEqual(daemon.ask(b"restore:" + file.read()), b"ok:")
        last = daemon.show()
        daemon.run("refresh", "work")
        self.assertTrue(until(lambda: daemon.show() not in ("", last)))

    def test_browsers_that_wait_at_the_end_get_a_page(self):
        daemon = self.start(self.provider.account().replace("/token", "/token?fault=silent-code"))
        pages = []
        thread = threading.Thread(target=lambda: pages.append(daemon.visit()))
        thread.start()
        self.assertTrue(until(lambda: self.provider.slow))
        self.assertEqual(daemon.run("shutdown").returncode, 0)
        thread.join()
        self.assertEqual(pages[0][0], 200)
        self.assertIn("pizauth was stopped", pages[0][1])

    def test_odd_starters(self):
        """SIGCHLD ignored, and a configuration that comes through a pipe."""
        daemon = Daemon(secure(account("x")))
        self.addCleanup(daemon.__exit__)
        self.addCleanup(daemon.run, "shutdown")
        server = f"{sys.executable} {PROGRAM} server"
        piped = f"cat {daemon.config} | {server} -c /dev/fd/9 9<&0"
        for command in (f"trap '' CHLD; {server}", piped,
                        f"{server} -c /dev/fd/0 < {daemon.config}",
                        f"{server} 3> {daemon.directory}/held"):
            done = subprocess.run(["sh", "-c", command], env=daemon.environment,
                                  capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(daemon.run("status").stdout, "x: No access token\n")
            self.assertNotIn(f"{daemon.directory}/held", self.files_of(daemon))
            self.assertEqual(daemon.run("shutdown").returncode, 0)

    def files_of(self, daemon):
        """What a server in the background has open, where that can be known."""
        with open(f"{daemon.directory}/pizauth/pizauth.lock", encoding="ascii") as lock:
            directory = f"/proc/{int(lock.read())}/fd"
        names = os.listdir(directory) if os.path.isdir(directory) else ()
        return [os.readlink(f"{directory}/{name}") for name in names]

    def test_a_second_signal_ends_it_at_once(self):
        daemon = self.start(self.provider.account(fault="silent"))
        daemon.visit()
        self.provider.broken = True
        daemon.run("refresh", "work")
        start = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        daemon.process.send_signal(signal.SIGTERM)
        self.assertEqual(daemon.process.wait(5), 0)
        self.assertLess(time.monotonic() - start, 1)
        self.assertFalse(os.path.exists(daemon.socket))

    def test_a_sighup_while_it_stops_is_ignored(self):
        """A reload would drop the result that is in flight, with a rotated token."""
        hook = f"{sys.executable} {PROGRAM} dump > $HOME/dump"
        text = self.provider.account(fault="slow") + f'token_event_cmd = "{hook}";'
        daemon = self.start(text, "-vv")
        daemon.visit()
        before = daemon.show()
        self.provider.broken = True
        daemon.ask(b"refresh:withurl work")
        self.assertTrue(until(lambda: self.provider.slow))
        with open(daemon.config, "w", encoding="utf-8") as file:
            file.write(text.replace("hush-hush", "another"))
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGHUP)
        self.assertEqual(daemon.process.wait(5), 0)
        self.assertNotIn("Reloaded", daemon.logged())
        self.assertIn("token_refreshed", daemon.logged())
        self.assertFalse(self.holds(os.path.join(daemon.directory, "dump"), before))

    def is_told(self, daemon, text):
        return text in daemon.ask(b"status:")

    def test_client_secret_cmd_whatever_it_does_costs_no_login_and_tells_no_secret(self):
        daemon = Daemon(
            self.provider.account(extra='client_secret_cmd = "sh $HOME/secret";').replace(
                'client_secret = "hush-hush";', ""), "-vvvv",
            prelude="pizauth.SECRET_LIMIT = 0.5; pizauth.CODE_RETRY_INTERVAL = 0.2")
        self.addCleanup(daemon.__exit__)

        def script(text):
            with open(f"{daemon.directory}/secret", "w", encoding="ascii") as file:
                file.write(text)

        daemon.start()
        for text, reason in (
            ("echo hush-hush; exit 3", "ended with status 3"), ("exit 0", "printed nothing"),
            ("echo hush-hush; sleep 60", "was killed after 0.5 s"),
            ("yes hush-hush | tr -d '\\n'", "ended with status 141"),
            ("yes hush-hush | tr -d '\\n' | head -c 999999", "printed a first line that is too"),
            ("sleep 60 & echo hush-hush; echo user: me", None),
        ):
            with self.subTest(text=text):
                script(text)
                daemon.ask(b"reload:")  # which forgets the secret
                visiting = threading.Thread(target=daemon.visit)
                visiting.start()
                told = f"client_secret_cmd {reason}".encode()
                if reason is not None:
                    self.assertTrue(until(partial(self.is_told, daemon, told)), told)
                    script("echo hush-hush")
                visiting.join()
                self.assertRegex(daemon.ask(b"showtoken:withurl work"), b"^access_token:at-")
                daemon.ask(b"revoke:work")
        listed = subprocess.run(["ps", "-axww", "-o", "args="], stdout=subprocess.PIPE, text=True)
        self.assertNotIn("hush-hush", listed.stdout.replace("yes hush-hush", ""))
        with open(daemon.log, encoding="utf-8") as log:
            self.assertNotIn("hush-hush", log.read())
        self.assertNotIn(b"hush-hush", daemon.ask(b"dump:") + daemon.ask(b"status:json"))

    def test_import_reads_the_token_from_standard_input(self):
        daemon = self.start(self.provider.account())
        self.provider.refresh_tokens.add("rt-elsewhere")
        done = subprocess.run([*CACHED, "import", "work"], input="rt-elsewhere\n", text=True,
                              env=daemon.environment, capture_output=True, timeout=30)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertRegex(daemon.run("show", "-w", "9", "work").stdout, "^at-")

    def test_the_port_of_a_redirect_uri_is_listened_on_if_it_is_free(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            text = self.provider.account(extra=f'redirect_uri = "http://127.0.0.1:{port}/cb";')
            daemon = self.start(text)
            with open(daemon.log, encoding="utf-8") as log:
                self.assertIn("; redirect_uri gets another port\n", log.read())
            self.assertNotIn(str(port), query_of(daemon.url())["redirect_uri"])
        self.assertEqual(daemon.run("reload").returncode, 0)
        self.assertEqual(json.loads(daemon.ask(b"info:"))["http_port"], str(port))
        self.assertEqual(query_of(daemon.url())["redirect_uri"], f"http://127.0.0.1:{port}/cb")
        self.assertEqual(daemon.visit()[0], 200)
        self.configure(daemon, "", text + self.provider.account("other"))
        self.assertEqual(daemon.run("reload").returncode, 0)
        self.assertEqual(daemon.visit("other")[0], 200)
        self.assertTrue(daemon.show())

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "it makes the certificates")
    def test_a_certificate_of_ones_own_is_used_and_read_again_at_a_reload(self):
        first, second = (minted()["pem"] for _ in range(2))
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            path = f"{directory}/both.pem"

            def write(pem):
                with open(path, "w", encoding="ascii") as file:
                    file.write(pem)

            def shown():
                port = json.loads(daemon.ask(b"info:"))["https_port"]
                return ssl.get_server_certificate(("127.0.0.1", int(port))).strip()

            write(first)
            https = self.provider.account(extra='redirect_uri = "https://localhost/";')
            daemon = self.start(f'{https} https_cert = "{path}";')
            self.assertIn(shown(), first)
            self.assertNotIn("https_pub_key", json.loads(daemon.ask(b"info:")))
            write(second)
            self.assertEqual(daemon.run("reload").returncode, 0)
            self.assertIn(shown(), second)
            os.mkfifo(f"{directory}/pipe")
            for used, error in ((f"{directory}/pipe", "pipe is not a regular file"),
                                (f"{directory}/none", f"No such file or directory: '{directory}/")):
                self.configure(daemon, f'https_cert = "{used}";', https)
                self.assertIn(error, daemon.run("reload").stderr)
            self.configure(daemon, f'https_cert = "{path}";', https)
            for text, error in (("junk", f"Cannot use https_cert {path}: "), (first[:300], path)):
                write(text)
                done = daemon.run("reload")
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn(error, done.stderr)
                self.assertIn(shown(), second)
            key, certificate = first.split("-----BEGIN CERTIFICATE", 1)
            write("-----BEGIN CERTIFICATE" + certificate)
            with open(f"{directory}/key", "w", encoding="ascii") as file:
                file.write(key)
            self.configure(daemon, f'https_cert = "{path}"; https_key = "{directory}/key";', https)
            self.assertEqual(daemon.run("reload").returncode, 0)
            self.assertIn(shown(), first)
            self.configure(daemon, f'https_cert = "{path}";')  # no account needs it
            self.assertEqual(daemon.run("reload").returncode, 0)
            self.configure(daemon, "", https)
            self.assertEqual(daemon.run("reload").returncode, 0)  # one is made again
            self.assertNotIn(shown(), first + second)
            self.assertIn("https_pub_key", json.loads(daemon.ask(b"info:")))

    def test_reload_moves_listeners_or_changes_nothing(self):
        daemon = self.start(self.provider.account())
        before = json.loads(daemon.ask(b"info:"))["http_port"]
        old = daemon.url()
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            for text, error in (
                (f'http_listen = "127.0.0.1:{taken}";', "Address already in use"),
                ('http_listen = "example.invalid:1";', "names are looked up only at start"),
                ("oops", "Unknown option 'oops'"),
            ):
                self.configure(daemon, text)
                done = daemon.run("reload")
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn(error, done.stderr)
                self.assertEqual(daemon.url(), old)
            if importlib.util.find_spec("cryptography"):  # else https_listen is ignored
                before_failing = daemon.descriptors()
                self.configure(
                    daemon, f'http_listen = "127.0.0.1:0"; https_listen = "127.0.0.1:{taken}";')
                for _ in range(5):
                    self.assertEqual(daemon.run("reload").returncode, 1)
                self.assertEqual(daemon.descriptors(), before_failing)
        os.unlink(daemon.config)
        os.mkfifo(daemon.config)
        self.assertIn("is not a regular file", daemon.run("reload").stderr)
        os.unlink(daemon.config)
        self.configure(daemon, "https_listen = none; refresh_retry = 1s;")
        self.assertEqual(daemon.run("reload").returncode, 0)
        self.assertEqual(json.loads(daemon.ask(b"info:"))["http_port"], before)
        self.assertEqual(daemon.url(), old)
        self.configure(daemon, 'https_listen = none; http_listen = "127.0.0.1:0";')
        daemon.process.send_signal(signal.SIGHUP)
        self.assertTrue(until(lambda: json.loads(daemon.ask(b"info:"))["http_port"] != before))
        self.assertNotEqual(daemon.url(), old)
        self.assertEqual(daemon.visit()[0], 200)
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.1", int(before)))

    def configure(self, daemon, text, account=None):
        with open(daemon.config, "w", encoding="utf-8") as file:
            file.write((account or self.provider.account()) + text)

    def https_port(self, daemon):
        return json.loads(daemon.ask(b"info:"))["https_port"]

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_https_comes_with_the_first_account_that_needs_it_and_goes_with_the_last(self):
        daemon = self.start(self.provider.account())
        secure = self.provider.account("secure", 'redirect_uri = "https://localhost/";')
        fingerprints = set()
        for _ in range(2):
            self.assertEqual(self.https_port(daemon), "none")
            self.configure(daemon, secure)
            self.assertEqual(daemon.ask(b"reload:"), b"ok:")
            about = json.loads(daemon.ask(b"info:"))
            pem = ssl.get_server_certificate(("127.0.0.1", int(about["https_port"])))
            digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()
            self.assertEqual(about["https_cert_sha256"], digest.hex(":").upper())
            fingerprints.add(digest)
            self.configure(daemon, "")
            self.assertEqual(daemon.ask(b"reload:"), b"ok:")
            with self.assertRaises(OSError):
                socket.create_connection(("127.0.0.1", int(about["https_port"])))
        self.assertEqual(len(fingerprints), 1)  # a certificate once made stays
        self.configure(daemon, 'https_listen = "127.0.0.1:0";')  # and it is on if it is asked for
        self.assertEqual(daemon.ask(b"reload:"), b"ok:")
        self.assertRegex(self.https_port(daemon), "^[0-9]+$")

    @unittest.skipUnless(os.path.exists("/proc/self/maps"), "there is no /proc to read them from")
    def test_a_server_without_https_does_not_load_tls(self):
        daemon = self.start(self.provider.account())
        with open(f"/proc/{daemon.process.pid}/maps", encoding="utf-8") as file:
            self.assertNotRegex(file.read(), r"libssl|/_ssl\.")

    def making_a_certificate(self):
        """A server that takes a second to make its certificate, the list of the replies to the
        reload that waits for it, and that client's thread."""
        daemon = self.start(self.provider.account(), prelude=(
            "import time; mint = pizauth.mint_certificate\n"
            "pizauth.mint_certificate = lambda: time.sleep(1) or mint()"))
        self.configure(daemon, self.provider.account(
            "secure", 'redirect_uri = "https://localhost/";'))
        replies = []
        thread = threading.Thread(target=lambda: replies.append(daemon.ask(b"reload:")))
        thread.start()
        self.assertTrue(until(daemon.children))
        return daemon, replies, thread

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_while_a_certificate_is_made_others_are_served_and_the_reload_waits(self):
        daemon, replies, thread = self.making_a_certificate()
        start = time.monotonic()
        self.assertEqual(daemon.ask(b"status:"), b"ok:work: No access token")
        self.assertLess(time.monotonic() - start, 0.3)
        self.assertEqual((replies, self.https_port(daemon)), ([], "none"))
        thread.join()
        self.assertEqual(replies, [b"ok:"])
        self.assertEqual(daemon.ask(b"status:").count(b"No access token"), 2)

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_a_reload_that_waits_for_a_certificate_does_not_undo_a_later_one(self):
        daemon, replies, thread = self.making_a_certificate()
        self.configure(daemon, "", self.provider.account("later"))
        self.assertEqual(daemon.ask(b"reload:"), b"ok:")
        thread.join()
        self.assertEqual(replies, [b"ok:"])
        self.assertEqual(daemon.ask(b"status:"), b"ok:later: No access token")

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_a_certificate_that_cannot_be_used_is_reported(self):
        daemon = self.start(self.provider.account(), prelude=(
            "def odd(*_): raise AttributeError('no such option')\npizauth.minted_context = odd"))
        self.configure(daemon, "", self.provider.account(
            "secure", 'redirect_uri = "https://localhost/";'))
        self.assertEqual(daemon.ask(b"reload:"), b"error:Account secure has an 'https' redirect,"
                         b" but the certificate cannot be used: no such option")

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_a_server_that_is_stopped_while_it_makes_its_certificate_ends(self):
        daemon = Daemon(HTTPS, prelude="import time; pizauth.mint_certificate = lambda:"
                                       " open(pizauth.os.environ['HOME'] + '/minting', 'w') and"
                                       " time.sleep(60)")
        self.addCleanup(daemon.__exit__)
        daemon.process = subprocess.Popen([*daemon.program, "server", "-d"], env=daemon.environment)
        self.assertTrue(until(lambda: os.path.exists(f"{daemon.directory}/minting")))
        daemon.process.send_signal(signal.SIGTERM)
        self.assertEqual(daemon.process.wait(5), 0)
        self.assertEqual(os.listdir(f"{daemon.directory}/pizauth"), ["pizauth.lock"])

    def test_the_default_listener_takes_both_families(self):
        daemon = self.start(self.provider.account())
        port = int(json.loads(daemon.ask(b"info:"))["http_port"])
        hosts = ["127.0.0.1", "localhost"]
        with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
            hosts.append("[::1]")
        for host in hosts:
            self.assertEqual(visit(f"http://{host}:{port}/")[0], 404)

    def test_the_service_manager_is_told(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory, \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(f"{directory}/n")
            manager.settimeout(10)
            daemon = self.start(
                self.provider.account() + 'startup_cmd = "sleep 0.5; touch $HOME/up";',
                environment={"NOTIFY_SOCKET": f"{directory}/n"})
            self.assertEqual(daemon.ask(b"reload:"), b"ok:")  # which is no reason to be READY
            self.assertEqual(manager.recv(99), b"READY=1")
            self.assertTrue(os.path.exists(os.path.join(daemon.directory, "up")))
            daemon.run("reload")
            self.assertRegex(manager.recv(99), rb"^RELOADING=1\nMONOTONIC_USEC=[0-9]+$")
            self.assertEqual(manager.recv(99), b"READY=1")
            daemon.run("shutdown")
            self.assertEqual(manager.recv(99), b"STOPPING=1")

    def without_cryptography(self):
        """An environment in which `cryptography` cannot be imported."""
        directory = tempfile.TemporaryDirectory(prefix="piz")
        self.addCleanup(directory.cleanup)
        with open(os.path.join(directory.name, "cryptography.py"), "w", encoding="ascii") as file:
            file.write("raise ImportError")
        return {"PYTHONPATH": directory.name}

    def test_without_cryptography_https_is_off_with_a_warning_or_starting_fails(self):
        text = self.provider.account() + 'https_listen = "127.0.0.1:0";'
        daemon = self.start(text, environment=self.without_cryptography())
        self.assertRegex(
            daemon.logged(), "^WARNING - https_listen is ignored: .* cryptography: install")
        self.assertEqual(json.loads(daemon.ask(b"info:"))["https_port"], "none")
        daemon = Daemon(
            self.provider.account("work", 'redirect_uri = "https://localhost/";'),
            environment=self.without_cryptography())
        self.addCleanup(daemon.__exit__)
        done = daemon.run("server")
        self.assertEqual(done.returncode, 1)
        error = "^ERROR - Account work has an 'https' redirect, .* cryptography: install it"
        self.assertRegex(done.stderr, error)
        daemon = self.start(self.provider.account(), environment=self.without_cryptography())
        self.assertEqual(daemon.logged(), "")  # nothing needs it
        self.configure(daemon, self.provider.account(
            "secure", 'redirect_uri = "https://localhost/";'))
        done = daemon.run("reload")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, error.replace("Account work", "Account secure"))
        self.assertEqual(daemon.run("status").stdout, "work: No access token\n")

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_https_from_a_strict_browser_while_half_open_handshakes_wait(self):
        daemon = self.start(self.provider.account("work", 'redirect_uri = "https://localhost/cb";'))
        about = json.loads(daemon.ask(b"info:"))
        port = int(about["https_port"])
        pem = ssl.get_server_certificate(("127.0.0.1", port))
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest()
        self.assertEqual(about["https_cert_sha256"], fingerprint.hex(":").upper())
        context = ssl.create_default_context(cadata=pem)
        hello, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            context.wrap_bio(hello, outgoing, server_hostname="localhost").do_handshake()
        first_half = outgoing.read()[:100]
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                half = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                half.sendall(first_half)
            start = time.monotonic()
            opener = urllib.request.build_opener(
                urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
            with opener.open(daemon.url(), timeout=20) as page:
                self.assertIn("is authorised", page.read().decode())
            self.assertRegex(daemon.show(), "^at-")
            self.assertLess(time.monotonic() - start, 2)
        self.assertEqual(os.listdir(os.path.join(daemon.directory, "pizauth")).count("pem"), 0)
        with open(f"/proc/{daemon.process.pid}/maps" if os.path.isdir("/proc") else os.devnull,
                  encoding="utf-8") as file:
            self.assertNotIn("cryptography", file.read())

    @unittest.skipUnless(shutil.which("chromium") and importlib.util.find_spec("cryptography"),
                         "Chromium or cryptography is not installed")
    def test_chromium_comes_back_over_https_and_shows_the_page(self):
        daemon = self.start(self.provider.account("work", 'redirect_uri = "https://localhost/";'))
        pem = ssl.get_server_certificate(
            ("127.0.0.1", int(json.loads(daemon.ask(b"info:"))["https_port"])))
        self.assertIn("BEGIN CERTIFICATE", pem)
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--ignore-certificate-errors", "--no-proxy-server",
             f"--user-data-dir={daemon.directory}/chromium", "--virtual-time-budget=8000",
             "--dump-dom", daemon.url()],
            env=daemon.environment, capture_output=True, text=True, timeout=60)
        self.assertIn("Account work is authorised: you can safely close this page.", done.stdout)
        self.assertRegex(daemon.show(), "^at-")

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

    def posted(self, path, environment=()):
        """What a token request in a process of its own reports: status, and the rest."""
        script = (
            "import os, sys, pizauth; pizauth.server_imports()\n"
            "outcome = pizauth.fetch(sys.argv[1], [('grant_type', 'refresh_token')])\n"
            "os.write(1, outcome)")
        uri = path if "://" in path else self.provider.url + path
        done = subprocess.run(
            [sys.executable, "-c", script, uri], cwd=HERE, stdout=subprocess.PIPE, check=True,
            env={**os.environ, "http_proxy": "http://127.0.0.1:1", **dict(environment)})
        status, rest = done.stdout.split(b" ", 1)
        return int(status), rest

    def test_a_token_request_is_what_it_should_be_and_loopback_has_no_proxy(self):
        self.provider.broken = True
        status, rest = self.posted("/token?fault=headers")
        self.assertEqual(status, 200)
        headers = json.loads(rest.partition(b"\n")[2])
        self.assertEqual(headers["Accept"], "application/json")
        self.assertEqual(headers["Content-Type"], "application/x-www-form-urlencoded")

    def test_other_hosts_are_asked_by_way_of_the_proxy(self):
        status, _ = self.posted("http://provider.example/token", {"http_proxy": self.provider.url})
        self.assertEqual((status, len(self.provider.posts)), (401, 1))

    @unittest.skipUnless(importlib.util.find_spec("cryptography"), "cryptography is not installed")
    def test_certificates_of_token_endpoints_are_verified(self):
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            pem = minted()["pem"]
            context = pizauth.minted_context(pem, directory)
            server = self.provider.server
            server.socket = context.wrap_socket(server.socket, server_side=True)
            uri = f"https://localhost:{server.server_port}/token"
            status, rest = self.posted(uri)
            self.assertEqual(status, 0)
            self.assertIn(b"CERTIFICATE_VERIFY_FAILED", rest)
            self.assertEqual(self.provider.posts, [])
            with open(f"{directory}/ca.pem", "w", encoding="ascii") as file:
                file.write(pem[pem.index("-----BEGIN CERT") :])
            status, _ = self.posted(uri, {"SSL_CERT_FILE": f"{directory}/ca.pem"})
            self.assertEqual((status, len(self.provider.posts)), (401, 1))

    def test_odd_but_whole_answers_are_taken_and_short_ones_are_not(self):
        self.provider.broken = True
        for fault, status, whole in (("chunked", 200, b"1"), ("until-eof", 200, b"0"),
                                     ("twice", 200, None), ("location", 302, b"1"),
                                     ("after", 503, b"1"), ("302", 302, b"1"), ("303", 303, b"1"),
                                     ("redirect", 307, b"1"), ("short", 0, None),
                                     ("cut-chunk", 0, None)):
            with self.subTest(fault=fault):
                got, rest = self.posted(f"/token?fault={fault}")
                self.assertEqual(got, status, rest)
                if whole is not None:
                    self.assertEqual(rest.split(b"\n")[0].split()[1], whole)
        self.assertEqual(self.provider.stray, [])

    @unittest.skipUnless(
        os.path.exists("/proc/self/status"), "there is no /proc to read the memory from")
    def test_a_token_request_stays_small(self):
        self.provider.broken = True
        script = (
            "import sys, pizauth; pizauth.server_imports(); "
            "pizauth.fetch(sys.argv[1], [('grant_type', 'refresh_token')]);"
            "print(next(line for line in open('/proc/self/status') "
            "if line.startswith('VmHWM')).split()[1])"
        )
        for fault in ("huge", "endless"):
            done = subprocess.run(
                [sys.executable, "-c", script, f"{self.provider.url}/token?fault={fault}"],
                cwd=HERE, capture_output=True, text=True, check=True)
            self.assertLess(int(done.stdout), 60_000, fault)


class FaultTest(unittest.TestCase):
    """Faults of machine and network, and clients that mean no good, against a real server."""

    def setUp(self):
        self.provider = Provider()
        self.addCleanup(self.provider.close)

    def start(self, text=None, *options, **more):
        daemon = Daemon(self.provider.account() if text is None else text, *options, **more)
        self.addCleanup(daemon.__exit__)
        daemon.start()
        return daemon

    def authorised(self, *arguments, **more):
        """A server whose account has a token, and that."""
        daemon = self.start(*arguments, **more)
        daemon.visit()
        token = daemon.ask(b"showtoken:withurl work")
        self.assertRegex(token, b"^access_token:at-")
        return daemon, token

    def http_port(self, daemon):
        return int(json.loads(daemon.ask(b"info:"))["http_port"])

    def test_out_of_descriptors_it_does_not_spin_and_recovers(self):
        daemon, token = self.authorised(None, "-v", prelude=(
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))"))
        with contextlib.ExitStack() as stack:
            for _ in range(70):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(daemon.socket)
            self.assertTrue(until(lambda: "Out of descriptors" in daemon.logged()))
            before = daemon.processor_time()
            time.sleep(1)
            self.assertLess(daemon.processor_time() - before, 0.3)
        self.assertEqual(daemon.ask(b"showtoken:withurl work"), token)
        daemon.ask(b"refresh:withurl work")
        self.assertTrue(until(lambda: daemon.ask(b"showtoken:withurl work") != token))

    def test_clients_that_go_away_at_any_point_leave_nothing_behind(self):
        daemon, token = self.authorised()
        port, before = self.http_port(daemon), daemon.descriptors()
        generator = random.Random(5)
        for _ in range(300):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(daemon.socket)
                request = generator.choice((b"showtoken:withurl work", b"dump:", b"status:"))
                sock.sendall(request[: generator.randrange(1 + len(request))])
                if generator.random() < 0.5:
                    sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as web:
                web.sendall(WireTest.GOOD[: generator.randrange(1 + len(WireTest.GOOD))])
                if generator.random() < 0.5:  # an RST
                    web.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.assertTrue(until(lambda: daemon.descriptors() == before))
        self.assertEqual(daemon.ask(b"showtoken:withurl work"), token)
        self.assertNotIn("bug", daemon.logged())

    def test_many_silent_connections_block_nobody(self):
        daemon, token = self.authorised()
        port, before = self.http_port(daemon), daemon.descriptors()
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(socket.socket(socket.AF_UNIX)).connect(daemon.socket)
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            self.assertEqual(daemon.ask(b"showtoken:withurl work"), token)
            self.assertEqual(visit(f"http://127.0.0.1:{port}/")[0], 404)
            if before is not None:
                self.assertLessEqual(daemon.descriptors(), before + 256 + 128)
        self.assertTrue(until(lambda: daemon.descriptors() == before))

    def test_network_failures_of_any_kind_cost_no_login_and_delay_nobody(self):
        """Names that are never found, a proxy that is down, and a server that speaks no TLS."""
        text = "".join(
            account(name).replace("http://t.example/token", uri) for name, uri in (
                ("dns", "http://hangs.example/token"), ("proxy", "http://proxied.example/token"),
                ("tls", self.provider.url.replace("http", "https") + "/token")))
        prelude = (
            "import socket, time; found = socket.getaddrinfo; pizauth.TOKEN_REQUEST_LIMIT = 2\n"
            "socket.getaddrinfo = lambda host, *more, **named: (\n"
            "    time.sleep(60) if host == 'hangs.example' else found(host, *more, **named))")
        daemon = self.start(text, prelude=prelude, environment={
            "http_proxy": "http://127.0.0.1:1", "no_proxy": "hangs.example"})
        self.assertEqual(daemon.ask(b"restore:" + dump_of(daemon.config)), b"ok:")
        for name in ("dns", "proxy", "tls"):
            self.assertEqual(daemon.ask(b"refresh:withurl " + name.encode()), b"scheduled:")
        slowest, end = 0.0, time.monotonic() + 8
        while daemon.ask(b"status:").count(b"last error") < 3 and time.monotonic() < end:
            start = time.monotonic()
            self.assertEqual(
                daemon.ask(b"showtoken:withurl dns"), b"access_token:" + b"a" * 40)
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.01)
        status = daemon.ask(b"status:").decode()
        for reason in ("no answer from hangs.example within 2 s",
                       "no answer from proxied.example: ", "Connection refused", "SSL"):
            self.assertIn(reason, status)
        self.assertEqual(status.count("Active access token"), 3)
        self.assertLess(slowest, 0.5)

    def test_a_token_request_that_is_killed_costs_nothing(self):
        daemon, token = self.authorised(self.provider.account(fault="silent"))
        self.provider.broken = True
        daemon.ask(b"refresh:withurl work")
        for child in until(daemon.children):
            os.kill(child, signal.SIGKILL)
        self.assertTrue(until(lambda: b"ended with status -9" in daemon.ask(b"status:")))
        self.assertEqual(daemon.ask(b"showtoken:withurl work"), token)

    def test_a_log_that_nobody_reads_or_that_is_full_stops_nothing(self):
        reader, writer = os.pipe()
        full = os.open("/dev/full" if os.path.exists("/dev/full") else os.devnull, os.O_WRONLY)
        for log in (writer, full):
            daemon = Daemon(account("x"), "-vvvv")
            self.addCleanup(daemon.__exit__)
            daemon.process = subprocess.Popen(
                [sys.executable, PROGRAM, "server", "-d", "-vvvv"], env=daemon.environment,
                stderr=log)
            os.close(log)
            self.assertTrue(until(daemon.answers))
            for _ in range(3000):  # two pipes full
                self.assertEqual(daemon.ask(b"nonsense")[:6], b"error:")
            daemon.process.terminate()
            self.assertEqual(daemon.process.wait(5), 0)
        os.close(reader)

    def test_hooks_that_flood_close_or_never_end_block_nothing(self):
        flood = "head -c 3000000 /dev/zero >&2; exec >&- 2>&-; echo $$ >> $HOME/pids; kill -STOP $$"
        hooks = "".join(f'{name} = "{flood}";' for name in (
            "auth_notify_cmd", "token_event_cmd", "startup_cmd"))
        daemon, token = self.authorised(self.provider.account() + hooks)
        daemon.ask(b"refresh:withurl work")
        self.assertTrue(until(
            lambda: daemon.ask(b"showtoken:withurl work") not in (b"", token)))
        daemon.process.terminate()
        self.assertEqual(daemon.process.wait(5), 0)
        with open(f"{daemon.directory}/pids", encoding="ascii") as file:
            for pid in map(int, file):  # the server has killed those that have a limit
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


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


def authlib_provider(expires_in, registered=AUTHLIB_CLIENT, auth_method="client_secret_post",
                     sends_issuer=False):
    """Start an authorization server on loopback, in memory, with one client, `registered`, that has
    to show its secret by `auth_method`. Whoever opens /authorize approves at once, as the `user` in
    the query, or denies if that is empty. It demands PKCE and rotates refresh tokens; one that is
    used again ends its whole grant. With the scope openid an ID token tells the user's address.

    `url` is its base and its issuer identifier, which redirects tell if it `sends_issuer`;
    account() gives the configuration of an account there, `metadata` is what it publishes,
    `requests` the grant types seen at /token, `issued` the tokens given, in their order. It answers
    at /revoke once `may_revoke` is set, as it is at first. close() ends it."""
    import flask
    from authlib.integrations.flask_oauth2 import AuthorizationServer
    from authlib.oauth2.rfc6749 import InvalidRequestError, grants
    from authlib.oauth2.rfc7009 import RevocationEndpoint
    from authlib.oauth2.rfc7636 import CodeChallenge
    from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
    from authlib.oauth2.rfc8628 import (
        DeviceAuthorizationEndpoint, DeviceCodeGrant, DeviceCredentialDict)
    from authlib.oauth2.rfc9207 import IssuerParameter
    from authlib.oidc.core import OpenIDCode, UserInfo

    codes, issued, requests = {}, [], []
    may_revoke = threading.Event()
    may_revoke.set()
    client = types.SimpleNamespace(
        check_client_secret=lambda secret: secret == registered["client_secret"],
        check_endpoint_auth_method=lambda method, endpoint: method == auth_method,
        check_grant_type=lambda name: True,
        check_redirect_uri=lambda uri: urllib.parse.urlsplit(uri).hostname == "localhost",
        check_response_type=lambda name: name == "code",
        get_client_id=lambda: registered["client_id"],
        get_allowed_scope=lambda scope: scope or "mail",
    )

    def basic(query_client, request):
        """Authlib's own method of this name leaves a + as it is, where RFC 6749, section 2.3.1,
        has both halves encoded as in a form, with + for a blank: this one decodes them so."""
        scheme, _, pair = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Basic" or "client_secret" in request.form:  # one method a request
            return None
        client_id, secret = base64.b64decode(pair).decode().split(":")
        found = query_client(urllib.parse.unquote_plus(client_id))
        known = found and found.check_client_secret(urllib.parse.unquote_plus(secret))
        return found if known else None

    def credential(**fields):
        """What Authlib wants a code or a refresh token to be."""
        return types.SimpleNamespace(
            check_client=lambda other: other is client,
            get_redirect_uri=lambda: fields["redirect_uri"],
            get_scope=lambda: fields["scope"],
            get_nonce=lambda: None,
            get_auth_time=lambda: None,
            get_acr=lambda: None,
            get_amr=lambda: None,
            **fields,
        )

    def save_token(token, request):
        """Each token belongs to the grant that began with its code."""
        origin = request.authorization_code or request.refresh_token
        grant = origin.grant if origin else token["access_token"]
        issued.append(credential(revoked=False, grant=grant, user=request.user, **token))

    def end_grant(ended):
        for token in issued:
            token.revoked = token.revoked or token.grant == ended.grant

    class CodeGrant(grants.AuthorizationCodeGrant):
        TOKEN_ENDPOINT_AUTH_METHODS = [auth_method]

        def save_authorization_code(self, code, request):
            names = ("redirect_uri", "code_challenge", "code_challenge_method")
            sent = {name: flask.request.args[name] for name in names}
            sent["scope"] = client.get_allowed_scope(flask.request.args.get("scope"))
            codes[code] = credential(code=code, grant=code, user=request.user, **sent)

        def query_authorization_code(self, code, client):
            return codes.get(code)

        def delete_authorization_code(self, authorization_code):
            del codes[authorization_code.code]

        def authenticate_user(self, authorization_code):
            return authorization_code.user

    class RefreshGrant(grants.RefreshTokenGrant):
        TOKEN_ENDPOINT_AUTH_METHODS = [auth_method]
        INCLUDE_NEW_REFRESH_TOKEN = True

        def authenticate_refresh_token(self, refresh_token):
            known = (token for token in issued if token.refresh_token == refresh_token)
            found = next(known, None)
            if found is None or not found.revoked:
                return found
            end_grant(found)  # somebody has a copy, and nobody knows who (RFC 9700, 4.14.2)
            return None

        def authenticate_user(self, refresh_token):
            return refresh_token.user

        def revoke_old_credential(self, refresh_token):
            refresh_token.revoked = True

    class RequiredS256(CodeChallenge):
        def validate_code_challenge(self, grant, redirect_uri):
            if flask.request.args.get("code_challenge_method") != "S256":  # would be optional
                raise InvalidRequestError("PKCE with S256 is required")
            super().validate_code_challenge(grant, redirect_uri)

    class IdToken(OpenIDCode):
        key = {"kty": "oct", "k": "bm9ib2R5IGxvb2tzIGF0IHRoaXMga2V5LCBub3QgZXZlbiB1cw"}

        def resolve_client_private_key(self, client):
            return self.key

        def get_client_algorithm(self, client):
            return "HS256"

        def get_encode_header(self, client):
            return {"alg": "HS256"}

        def get_client_claims(self, client):
            return {"iss": url}

        if not hasattr(OpenIDCode, "get_client_claims"):
            def get_jwt_config(self, grant, client):  # what Authlib 1.6 has instead of these four
                return {"key": self.key, "alg": "HS256", "iss": url, "exp": 3600}

        def generate_user_info(self, user, scope):
            return UserInfo(sub="1", email=user)

    class Issuer(IssuerParameter):
        def get_issuer(self):
            return url

    class Revocation(RevocationEndpoint):
        CLIENT_AUTH_METHODS = [auth_method]

        def query_token(self, token_string, token_type_hint):
            fitting = (token for token in issued if getattr(token, token_type_hint) == token_string)
            return next(fitting, None)

        def revoke_token(self, token, request):
            end_grant(token)

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    devices, verdicts, polls = {}, {}, []

    class DeviceEndpoint(DeviceAuthorizationEndpoint):
        CLIENT_AUTH_METHODS = [auth_method]
        INTERVAL = 1

        def create_endpoint_response(self, request):
            self.EXPIRES_IN = provider.code_life
            return super().create_endpoint_response(request)

        def get_verification_uri(self):
            return f"{url}/device"

        def save_device_credential(self, client_id, scope, data):
            expires_at = time.time() + data["expires_in"]
            devices[data["device_code"]] = DeviceCredentialDict(
                **data, client_id=client_id, scope=scope, expires_at=expires_at)

    class DeviceGrant(DeviceCodeGrant):
        TOKEN_ENDPOINT_AUTH_METHODS = [auth_method]

        def query_device_credential(self, device_code):
            return devices.get(device_code)

        def query_user_grant(self, user_code):
            return verdicts.get(user_code)

        def should_slow_down(self, credential):
            polls.append(time.monotonic())
            return len(polls) == 1

    app = flask.Flask("provider")
    lives = dict.fromkeys(
        ("authorization_code", "refresh_token", DeviceGrant.GRANT_TYPE), expires_in)
    app.config.update(OAUTH2_REFRESH_TOKEN_GENERATOR=True, OAUTH2_TOKEN_EXPIRES_IN=lives)
    provider = AuthorizationServer(
        app,
        query_client={registered["client_id"]: client}.get,
        save_token=save_token,
    )
    provider.register_client_auth_method("client_secret_basic", basic)
    provider.register_grant(CodeGrant, [RequiredS256(), IdToken()])
    provider.register_grant(RefreshGrant)
    provider.register_grant(DeviceGrant)
    provider.register_endpoint(DeviceEndpoint)
    provider.register_endpoint(Revocation)
    if sends_issuer:
        provider.register_extension(Issuer())
    provider.code_life = 60

    @app.route("/device_authorization", methods=["POST"])
    def device_authorization():
        return provider.create_endpoint_response(DeviceEndpoint.ENDPOINT_NAME)

    @app.route("/device")
    def device():
        verdicts[flask.request.args["user_code"]] = (
            "the user", flask.request.args.get("approved", "yes") == "yes")
        return "Thank you."

    @app.route("/authorize")
    def authorize():
        user = flask.request.args.get("user", "the user") or None
        grant = provider.get_consent_grant(end_user=user)
        return provider.create_authorization_response(grant_user=user, grant=grant)

    @app.route("/token", methods=["POST"])
    def token():
        requests.append(flask.request.form["grant_type"])
        return provider.create_token_response()

    @app.route("/revoke", methods=["POST"])
    def revoke():
        may_revoke.wait(10)
        return provider.create_endpoint_response(Revocation.ENDPOINT_NAME)

    @app.route("/.well-known/oauth-authorization-server")
    def well_known():
        AuthorizationServerMetadata(metadata).validate()
        return metadata

    def account(name="work", extra="", secret=None, scopes=("mail", "offline_access")):
        secret = secret or f'client_secret = "{registered["client_secret"]}";'
        return f"""account "{name}" {{
            auth_uri = "{url}/authorize";
            token_uri = "{url}/token";
            client_id = "{registered["client_id"]}";
            scopes = {json.dumps(scopes)};
            {secret}
            {extra}
        }}
        """

    def close():
        may_revoke.set()
        server.shutdown()
        thread.join()
        server.server_close()
        del os.environ["AUTHLIB_INSECURE_TRANSPORT"]

    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"  # or Authlib would refuse plain HTTP
    server = make_server("127.0.0.1", 0, app, handler_class=Quiet)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    metadata = {
        "issuer": url, "authorization_endpoint": f"{url}/authorize",
        "token_endpoint": f"{url}/token", "revocation_endpoint": f"{url}/revoke",
        "device_authorization_endpoint": f"{url}/device_authorization",
        "scopes_supported": ["mail", "openid"], "response_types_supported": ["code"],
        "grant_types_supported": [*lives], "code_challenge_methods_supported": ["S256"],
        "token_endpoint_auth_methods_supported": [auth_method],
        "revocation_endpoint_auth_methods_supported": [auth_method],
        "authorization_response_iss_parameter_supported": sends_issuer}
    return types.SimpleNamespace(
        url=url, metadata=metadata, account=account, requests=requests, issued=issued,
        may_revoke=may_revoke, close=close, polls=polls, authlib=provider)


needs_authlib = unittest.skipUnless(
    importlib.util.find_spec("authlib") and importlib.util.find_spec("flask"),
    "Authlib and Flask are not installed")


@needs_authlib
class AuthlibTest(unittest.TestCase):
    """The whole of pizauth, as people run it, against a provider that its authors did not write."""

    def setUp(self):
        self.provider = authlib_provider(expires_in=3600)
        self.addCleanup(self.provider.close)

    def test_from_authorization_to_rotated_refresh_tokens_of_which_each_is_used_once(self):
        with Daemon(self.provider.account()) as daemon:
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
        used = issued[0].refresh_token  # which the provider does not take again
        form = [*AUTHLIB_CLIENT.items(), ("grant_type", "refresh_token"), ("refresh_token", used)]
        outcome = pizauth.fetch(self.provider.url + "/token", form)
        with refusal(self, "^HTTP 400: invalid_grant"):
            token_response(outcome, form)

    def device_daemon(self, options=""):
        """A running server with an account for the device grant."""
        daemon = Daemon(f"""account "work" {{
            device_auth_uri = "{self.provider.url}/device_authorization";
            token_uri = "{self.provider.url}/token";
            client_id = "{AUTHLIB_CLIENT["client_id"]}";
            client_secret = "{AUTHLIB_CLIENT["client_secret"]}";
            scopes = ["mail", "offline_access"];
        }} error_notify_cmd = "echo \\"$PIZAUTH_MSG\\" >> $HOME/errors"; {options}""",
            prelude="pizauth.SLOW_DOWN = 0.5; pizauth.DEVICE_GAP = 0.1")
        self.addCleanup(daemon.__exit__)
        daemon.start()
        return daemon

    def code(self, daemon):
        """The URL, complete, and the code that `show` gives."""
        done = daemon.run("show", "work")
        told = re.fullmatch("ERROR - Access token unavailable until authorised with URL"
                            " (http://.*/device[?]user_code=(.*)) and code (.*)\n", done.stderr)
        self.assertEqual((done.returncode, done.stdout, told[2]), (1, "", told[3]))
        return told[1]

    def errors(self, daemon):
        with contextlib.suppress(FileNotFoundError), \
                open(f"{daemon.directory}/errors", encoding="utf-8") as file:
            return file.read()
        return ""

    def test_the_device_grant_with_slow_down_and_refresh(self):
        daemon = self.device_daemon(
            'auth_notify_cmd = "echo $PIZAUTH_URL $PIZAUTH_CODE > $HOME/told";')
        url = self.code(daemon)
        self.assertEqual(self.code(daemon), url)
        self.assertTrue(until(lambda: os.path.exists(f"{daemon.directory}/told")))
        with open(f"{daemon.directory}/told", encoding="ascii") as file:
            self.assertTrue(until(lambda: file.read() == f"{url} {url.partition('=')[2]}\n"))
        self.assertTrue(until(lambda: len(self.provider.polls) >= 2))
        first, second = self.provider.polls[:2]
        self.assertGreater(second - first, 1.4)  # the provider asked for slower polls
        self.assertEqual(visit(url)[1], "Thank you.")
        token = until(daemon.show)
        self.assertEqual(token, self.provider.issued[0].access_token)
        self.assertEqual(daemon.run("refresh", "work").returncode, 0)
        self.assertTrue(until(lambda: daemon.show() != token))
        self.assertEqual(daemon.show(), self.provider.issued[1].access_token)
        self.assertEqual(self.errors(daemon), "")

    def test_a_denial_and_the_expiry_of_a_device_code(self):
        daemon = self.device_daemon()
        visit(self.code(daemon) + "&approved=no")
        self.assertTrue(until(lambda: "access_denied" in self.errors(daemon)))
        self.assertIn("work: No access token; last error", daemon.run("status").stdout)
        self.provider.authlib.code_life = 1
        first = self.code(daemon)
        self.assertTrue(until(lambda: "expired" in self.errors(daemon)))
        self.provider.authlib.code_life = 60
        second = self.code(daemon)
        self.assertNotEqual(first, second)
        visit(second)
        self.assertTrue(until(daemon.show))


@needs_authlib
class AuthlibFitTest(unittest.TestCase):
    """What providers demand or offer besides, as Authlib implements it: the RFCs by two readers."""

    def provider(self, **options):
        provider = authlib_provider(3600, **options)
        self.addCleanup(provider.close)
        return provider

    def start(self, text, prelude=""):
        """A running server that logs its warnings and what it did."""
        daemon = Daemon(text, "-vv", prelude=prelude)
        self.addCleanup(daemon.__exit__)
        daemon.start()
        return daemon

    def refresh(self, daemon, provider, name="work"):
        """Refresh, until the newest token of the provider is shown."""
        before = len(provider.issued)
        self.assertEqual(daemon.run("refresh", name).returncode, 0)
        self.assertTrue(until(lambda: len(provider.issued) > before and daemon.show(name)
                              == provider.issued[-1].access_token), daemon.logged())
        self.assertEqual(len(provider.issued), before + 1)

    def refused(self, provider, refresh_token):
        """Use a refresh token that is good no more, as a thief would."""
        form = [*AUTHLIB_CLIENT.items(), ("grant_type", "refresh_token"),
                ("refresh_token", refresh_token)]
        with self.assertRaisesRegex(pizauth.TokenError, "^HTTP 400: invalid_grant"):
            token_response(pizauth.fetch(provider.url + "/token", form), form)

    def test_basic_authentication_of_a_client_whose_id_and_secret_need_encoding(self):
        client = {"client_id": "Büro: mail+%2B/1", "client_secret": "a b:c+d%20e/f é€&="}
        provider = self.provider(registered=client, auth_method="client_secret_basic")
        daemon = self.start(
            provider.account("work", 'client_auth = "basic";')
            + provider.account("command", 'client_auth = "basic";',
                               'client_secret_cmd = "cat $HOME/secret";')
            + provider.account("wrong", 'client_auth = "basic";', 'client_secret = "a+b:c d";')
            + provider.account("post"))
        with open(os.path.join(daemon.directory, "secret"), "w", encoding="utf-8") as file:
            file.write(client["client_secret"] + "\n")
        for name in ("work", "command"):
            self.assertIn("is authorised", daemon.visit(name)[1])
            self.refresh(daemon, provider, name)
        for name in ("wrong", "post"):
            self.assertIn("HTTP 401: invalid_client", daemon.visit(name)[1])

    def test_revoke_ends_the_login_at_the_provider_in_the_background(self):
        provider = self.provider()
        daemon = self.start(provider.account("work", f'revoke_uri = "{provider.url}/revoke";'))
        daemon.visit()
        self.refresh(daemon, provider)
        provider.may_revoke.clear()
        done = daemon.run("revoke", "work")
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        self.assertEqual(daemon.run("status").stdout, "work: No access token\n")
        self.assertEqual([token.revoked for token in provider.issued], [True, False])
        self.assertNotIn("revoked at the provider", daemon.logged())
        provider.may_revoke.set()
        self.assertTrue(until(lambda: "work: revoked at the provider" in daemon.logged()))
        self.assertEqual([token.revoked for token in provider.issued], [True, True])
        self.assertEqual(daemon.run("status").stdout, "work: No access token\n")
        self.refused(provider, provider.issued[-1].refresh_token)
        self.assertIn("is authorised", daemon.visit()[1])  # a new grant

    def test_an_answer_of_another_issuer_is_refused_and_the_login_still_waits(self):
        provider = self.provider(sends_issuer=True)
        daemon = self.start(
            provider.account("work", f'issuer = "{provider.url}";')
            + provider.account("astray", f'issuer = "{provider.url}/";'))
        url = daemon.url("astray")
        for answer in ("", "&user="):  # a code, and a denial
            status, page = visit(url + answer)
            self.assertEqual(status, 400)
            self.assertIn(f"its &#x27;iss&#x27; is {provider.url}.", page)
            self.assertIn("The login still waits.", page)
            self.assertIn("astray: Access token pending", daemon.run("status").stdout)
            self.assertEqual(daemon.url("astray"), url)
        self.assertEqual(provider.requests, [])
        self.assertIn("failed: access_denied", visit(daemon.url() + "&user=")[1])
        self.assertIn("is authorised", daemon.visit()[1])
        self.assertEqual(daemon.show(), provider.issued[0].access_token)

    def test_the_configuration_that_discover_prints_logs_in(self):
        self.logs_in_as_discovered(self.provider(sends_issuer=True))

    def test_and_so_it_does_where_the_secret_has_to_be_in_a_header(self):
        self.logs_in_as_discovered(
            self.provider(auth_method="client_secret_basic", sends_issuer=True))

    def test_a_provider_that_names_no_authentication_method_takes_the_header(self):
        """RFC 8414, section 2, and OpenID Connect Discovery 1.0, section 3, have this default."""
        provider = self.provider(auth_method="client_secret_basic", sends_issuer=True)
        del provider.metadata["token_endpoint_auth_methods_supported"]
        self.logs_in_as_discovered(provider)

    def logs_in_as_discovered(self, provider):
        """Discover, fill in the client, log in, refresh and revoke."""
        daemon, name = Daemon(""), "127.0.0.1"
        self.addCleanup(daemon.__exit__)
        done = daemon.run("discover", provider.url)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        head, empty, tail = done.stdout.partition('client_id = "";')
        self.assertTrue(empty)
        filled = "".join(f'{option} = "{value}"; ' for option, value in AUTHLIB_CLIENT.items())
        with open(daemon.config, "w", encoding="utf-8") as file:
            file.write(head + filled + tail)
        daemon.start()
        self.assertIn("is authorised", daemon.visit(name)[1])
        self.assertEqual(daemon.show(name), provider.issued[0].access_token)
        self.refresh(daemon, provider, name)
        self.assertEqual(daemon.run("revoke", name).returncode, 0)
        self.assertTrue(until(lambda: provider.issued[-1].revoked))

    def test_no_refresh_token_is_used_twice_over_reloads_and_restarts(self):
        """The provider would end the grant, as it does in the end, by another's hand."""
        provider = self.provider()
        issued, prelude = provider.issued, "pizauth.REFRESH_GAP = 0.05"
        daemon = self.start(provider.account(), prelude)
        daemon.visit()
        self.refresh(daemon, provider)
        self.refresh(daemon, provider)
        with open(daemon.config, "a", encoding="utf-8") as file:
            file.write("refresh_before_expiry = 2m;\n")
        self.assertEqual(daemon.run("reload").returncode, 0)
        self.refresh(daemon, provider)
        dumped = subprocess.run([*CACHED, "dump"], env=daemon.environment, capture_output=True,
                                check=True, timeout=30).stdout
        self.assertEqual(daemon.run("shutdown").returncode, 0)
        self.assertEqual(daemon.process.wait(5), 0)
        daemon.start()
        self.assertEqual(daemon.show(), "")
        done = subprocess.run([*CACHED, "restore"], input=dumped, env=daemon.environment,
                              capture_output=True, timeout=30)
        self.assertEqual((done.returncode, done.stderr), (0, b""))
        self.assertEqual(daemon.show(), issued[-1].access_token)
        self.refresh(daemon, provider)
        self.refresh(daemon, provider)
        self.assertEqual(provider.requests, ["authorization_code"] + ["refresh_token"] * 5)
        self.assertEqual([token.revoked for token in issued], [True] * 5 + [False])
        self.refused(provider, issued[1].refresh_token)
        self.assertTrue(issued[-1].revoked)
        self.assertEqual(daemon.run("refresh", "work").returncode, 0)
        self.assertTrue(until(lambda: "invalid_grant" in daemon.run("status").stdout))
        self.assertTrue(daemon.run("status").stdout.startswith("work: No access token; last error"))

    def test_import_goes_on_with_the_login_of_another_program(self):
        provider = self.provider()
        daemon = self.start(provider.account())
        done = subprocess.run(
            [*CACHED, "import", "work"], input=self.refresh_token_of_another_program(provider),
            text=True, env=daemon.environment, capture_output=True, timeout=30)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
        shown = daemon.run("show", "-w", "9", "work")
        self.assertEqual(shown.stdout.strip(), provider.issued[1].access_token)
        self.assertEqual([token.revoked for token in provider.issued], [True, False])
        self.refresh(daemon, provider)
        self.assertEqual(provider.requests, ["authorization_code"] + ["refresh_token"] * 2)

    def refresh_token_of_another_program(self, provider):
        """Log in without any code of pizauth's."""
        class NoRedirect(urllib.request.HTTPRedirectHandler):
            def redirect_request(self, *_):
                return None

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)
        verifier, redirect_uri = secrets.token_urlsafe(32), "http://localhost:9/other"
        digest = hashlib.sha256(verifier.encode()).digest()
        query = urllib.parse.urlencode({
            "response_type": "code", "client_id": AUTHLIB_CLIENT["client_id"], "state": "s",
            "redirect_uri": redirect_uri, "scope": "mail", "code_challenge_method": "S256",
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode()})
        with self.assertRaises(urllib.error.HTTPError) as caught:
            opener.open(f"{provider.url}/authorize?{query}", timeout=20)
        with caught.exception as answer:
            code = query_of(answer.headers["Location"])["code"]
        form = urllib.parse.urlencode({
            **AUTHLIB_CLIENT, "grant_type": "authorization_code", "code": code,
            "redirect_uri": redirect_uri, "code_verifier": verifier})
        with opener.open(f"{provider.url}/token", form.encode(), timeout=20) as answer:
            return json.load(answer)["refresh_token"] + "\n"

    def test_the_id_token_tells_whether_the_right_person_has_logged_in(self):
        provider = self.provider()
        daemon = self.start(provider.account(
            "work", 'expect_user = "Me@example.com";', scopes=("mail", "openid", "email")))
        page = visit(daemon.url() + "&user=you@example.com")[1]
        self.assertIn("you@example.com has logged in: log in as Me@example.com", page)
        status = daemon.run("status").stdout
        self.assertTrue(status.startswith("work: No access token; last error"), status)
        self.assertEqual(len(provider.issued), 1)
        self.assertIn("is authorised", visit(daemon.url() + "&user=me@example.com")[1])
        self.assertEqual(daemon.show(), provider.issued[1].access_token)
        self.refresh(daemon, provider)
        self.assertNotIn("expect_user is of no use", daemon.logged())


# ---- Mail programs ----


class MailProvider(Provider):
    """Remembers the access tokens that it has issued, for the mail servers to know."""

    def __init__(self):
        super().__init__()
        self.issued = []

    def token(self, form):
        status, answer = super().token(form)
        if status == 200:
            self.issued.append(answer["access_token"])
        return status, answer


class MailServer(socketserver.ThreadingTCPServer):
    """A server of a MailHandler's kind on loopback, without TLS. It remembers who tried to log in,
    as mechanism, user and token, and the mails that it took."""

    daemon_threads = True

    def __init__(self, handler, provider):
        super().__init__(("127.0.0.1", 0), handler)
        self.port, self.provider = self.server_address[1], provider
        self.logins, self.mails = [], []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class MailHandler(socketserver.StreamRequestHandler):
    """What IMAP and SMTP have in common. A refusal comes without the challenge that real servers
    send first, after which mbsync 1.4 waits for ever."""

    timeout = 10

    def handle(self):
        with contextlib.suppress(OSError):
            self.serve()

    def line(self):
        """The next line from the client; ConnectionError where it ends."""
        if not (line := self.rfile.readline()):
            raise ConnectionError
        return line.decode().rstrip("\r\n")

    def say(self, *lines):
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())

    def knows(self, mechanism, response="", challenge=""):
        """Is this response, or that to a challenge, of our user, and with the newest token?"""
        if not response:
            self.say(challenge)
            response = self.line()
        form = {
            "XOAUTH2": "user=(.*)\x01auth=Bearer (.*)\x01\x01",
            "OAUTHBEARER": "n,a=(.*),\x01(?:host=.*\x01port=.*\x01)?auth=Bearer (.*)\x01\x01"}
        found = re.fullmatch(form[mechanism], base64.b64decode(response, validate=True).decode())
        self.server.logins.append((mechanism, *found.groups()))
        return found.groups() == (MailTest.USER, self.server.provider.issued[-1])


class SmtpHandler(MailHandler):
    def serve(self):
        self.say("220 localhost ESMTP")
        known = False
        while True:
            verb, *words = self.line().split(" ")
            verb = verb.upper()
            if verb == "EHLO":
                self.say("250-localhost", "250 AUTH XOAUTH2 OAUTHBEARER")
            elif verb == "AUTH":
                known = self.knows(*words, challenge="334 ")
                self.say("235 welcome" if known else "535 5.7.8 not welcome")
            elif verb == "QUIT":
                return self.say("221 bye")
            elif not known:
                self.say("530 5.7.0 log in first")
            elif verb == "DATA":
                self.say("354 go on")
                self.server.mails.append("\n".join(iter(self.line, ".")))
                self.say("250 taken")
            else:
                self.say("250 well")


class ImapHandler(MailHandler):
    """A mailbox that always holds one mail."""

    MAIL = "Subject: greetings\r\n\r\nSee you.\r\n"

    def serve(self):
        self.say("* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=XOAUTH2] ready")
        known = False
        while True:
            tag, verb, *words = self.line().split(" ")
            if verb == "AUTHENTICATE":
                known = self.knows(*words, challenge="+ ")
            elif verb == "CAPABILITY":
                self.say("* CAPABILITY IMAP4rev1 SASL-IR AUTH=XOAUTH2")
            elif verb == "LOGOUT":
                return self.say("* BYE bye", f"{tag} OK done")
            elif verb in ("SELECT", "EXAMINE"):
                self.say("* FLAGS ()", "* 1 EXISTS", "* OK [UIDVALIDITY 7] x", "* OK [UIDNEXT 2] x")
            elif "BODY" in words[-1]:
                self.say(f"* 1 FETCH (UID 1 FLAGS () BODY[] {{{len(self.MAIL)}}}", f"{self.MAIL})")
            else:
                self.say("* 1 FETCH (UID 1 FLAGS ())")
            if not known and verb != "CAPABILITY":
                return self.say(f"{tag} NO not welcome")
            self.say(f"{tag} OK done")


# Sends a mail by Python's own SMTP, which has no XOAUTH2 and takes the response as it is printed.
READY_SENDER = """
import smtplib, subprocess, sys
shown = subprocess.run(["pizauth", "show", "-x", sys.argv[2], "work"],
                       stdout=subprocess.PIPE, text=True)
if shown.returncode:
    sys.exit("no mail sent")
with smtplib.SMTP("127.0.0.1", int(sys.argv[1]), timeout=10) as smtp:
    smtp.ehlo()
    smtp.docmd("AUTH", "XOAUTH2 " + shown.stdout.rstrip("\\n"))
    smtp.sendmail(sys.argv[2], "you@example.net", sys.stdin.read())
"""


class MailTest(unittest.TestCase):
    """The README's recipes, with the mail programs that they are for, and pizauth in the PATH."""

    USER = "me@example.com"

    def setUp(self):
        self.provider = MailProvider()
        self.addCleanup(self.provider.close)
        self.daemon = Daemon(self.provider.account())
        self.addCleanup(self.daemon.__exit__)
        self.daemon.start()
        programs = os.path.join(self.daemon.directory, "bin")
        os.mkdir(programs)
        self.write("bin/pizauth", f'#!/bin/sh\nexec {shlex.join(CACHED)} "$@"\n')
        self.daemon.environment.update(PATH=f"{programs}:{os.environ['PATH']}", LC_ALL="C")

    def write(self, name, text):
        path = os.path.join(self.daemon.directory, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(path, 0o700)

    def recipe(self, program):
        """What the README has to be written into the configuration of a program."""
        with open(os.path.join(HERE, "README"), encoding="utf-8") as file:
            return re.search(rf"(?s)\n   {program}, .*?:\n\n(.*?\n)\n", file.read())[1]

    def server(self, handler):
        server = MailServer(handler, self.provider)
        self.addCleanup(server.close)
        return server

    def run_program(self, *command, text=""):
        """Run a program without a terminal of its own. At the limit its children end with it."""
        with subprocess.Popen(
                command, env=self.daemon.environment, cwd=self.daemon.directory, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True) as process:
            try:
                output, errors = process.communicate(text, 10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def msmtp(self, mechanism="xoauth2"):
        """A server, and what sends a mail there with msmtp."""
        server = self.server(SmtpHandler)
        recipe = self.recipe("msmtp").replace("xoauth2", mechanism)
        self.write(".msmtprc", "account default\nhost 127.0.0.1\ntls off\n"
                   f"port {server.port}\nfrom {self.USER}\n{recipe}")
        return server, lambda: self.run_program("msmtp", "you@example.net", text="\nHello.\n")

    def mbsync(self):
        """A server, and what fetches a mail from there with mbsync."""
        server = self.server(ImapHandler)
        version = re.search(r"(\d+)\.(\d+)", self.run_program("mbsync", "--version").stdout)
        tls = "TLSType" if tuple(map(int, version.groups())) >= (1, 5) else "SSLType"
        self.write(".mbsyncrc", "\n".join((
            f"IMAPAccount work\nHost 127.0.0.1\nPort {server.port}\n{tls} None",
            self.recipe("mbsync"), "IMAPStore far\nAccount work\n",
            "MaildirStore near\nPath ~/\nInbox ~/Mail\n",
            "Channel all\nFar :far:\nNear :near:\nSync Pull\nSyncState *\n")))

        def fetch():
            done = self.run_program("mbsync", "--all")
            if "SASL mechanism(s) not available" in done.stderr:
                self.skipTest("mbsync finds no SASL module for XOAUTH2")
            return done

        return server, fetch

    def ready(self):
        """A server, and what sends a mail there with a ready response."""
        server = self.server(SmtpHandler)
        return server, lambda: self.run_program(
            sys.executable, "-c", READY_SENDER, str(server.port), self.USER, text="\nHello.\n")

    def check_login(self, server, run, mechanism="XOAUTH2"):
        """With a token, a program logs in with just that, and pizauth is silent."""
        self.assertEqual(self.daemon.visit()[0], 200)
        done = run()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(self.provider.issued), 1)
        self.assertEqual(server.logins, [(mechanism, self.USER, self.provider.issued[0])])
        self.assertNotRegex(done.stderr, "(ERROR|WARNING) - ")

    def check_lost_login(self, server, run):
        """When the login is lost, the program's user is told why, and then the way back."""
        self.assertEqual(self.daemon.visit()[0], 200)
        self.provider.refresh_tokens.clear()
        self.assertEqual(self.daemon.run("refresh", "work").returncode, 0)
        self.assertTrue(until(lambda: b"last error" in self.daemon.ask(b"status:")))
        done = run()
        self.assertNotEqual(done.returncode, 0)
        self.assertEqual((server.logins, server.mails), ([], []))
        told = [line for line in done.stderr.splitlines() if "ERROR" in line]
        self.assertEqual(len(told), 1, done.stderr)
        self.assertTrue(told[0].startswith(
            "ERROR - Refreshing work failed: HTTP 400: invalid_grant: unknown refresh token."
            f" {ENDED}; Access token unavailable until authorised with URL http://"), told[0])
        self.assertEqual(visit(told[0].split()[-1])[0], 200)
        done = run()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(self.provider.issued), 2)
        self.assertEqual(server.logins, [("XOAUTH2", self.USER, self.provider.issued[1])])

    @unittest.skipUnless(shutil.which("msmtp"), "there is no msmtp")
    def test_msmtp_sends_a_mail_with_the_token(self):
        server, send = self.msmtp()
        self.check_login(server, send)
        self.assertEqual(len(server.mails), 1)
        self.assertIn("\n\nHello.", server.mails[0])

    @unittest.skipUnless(shutil.which("msmtp"), "there is no msmtp")
    def test_msmtp_sends_a_mail_with_the_newer_mechanism(self):
        server, send = self.msmtp("oauthbearer")
        self.check_login(server, send, "OAUTHBEARER")
        self.assertEqual(len(server.mails), 1)

    @unittest.skipUnless(shutil.which("msmtp"), "there is no msmtp")
    def test_msmtp_tells_why_the_login_was_lost_and_where_to_log_in(self):
        self.check_lost_login(*self.msmtp())

    @unittest.skipUnless(shutil.which("mbsync"), "there is no mbsync")
    def test_mbsync_fetches_a_mail_with_the_token(self):
        self.check_login(*self.mbsync())
        new = os.path.join(self.daemon.directory, "Mail", "new")
        self.assertEqual(len(os.listdir(new)), 1)
        with open(os.path.join(new, os.listdir(new)[0]), encoding="ascii") as file:
            mail = re.sub("(?m)^X-TUID: .*\n", "", file.read())  # mbsync's own line
        self.assertEqual(mail, ImapHandler.MAIL.replace("\r", ""))

    @unittest.skipUnless(shutil.which("mbsync"), "there is no mbsync")
    def test_mbsync_tells_why_the_login_was_lost_and_where_to_log_in(self):
        self.check_lost_login(*self.mbsync())

    def test_a_ready_response_sends_a_mail(self):
        server, send = self.ready()
        self.check_login(server, send)
        self.assertEqual(len(server.mails), 1)

    def test_a_ready_response_is_not_printed_when_the_login_was_lost(self):
        self.check_lost_login(*self.ready())


# ---- Demonstration ----


class Demo:
    """The main job before the reader's eyes: each command as typed, and what it printed."""

    def __init__(self, provider):
        self.provider = provider
        self.daemon = Daemon(
            provider.account("work", "refresh_before_expiry = 3s; refresh_retry = 1s;"))
        os.mkdir(os.path.join(self.daemon.directory, "bin"))
        launcher = os.path.join(self.daemon.directory, "bin", "pizauth")
        with open(launcher, "w", encoding="utf-8") as file:
            file.write(f'#!/bin/sh\nexec "{sys.executable}" "{PROGRAM}" "$@"\n')
        os.chmod(launcher, 0o755)

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
            print("$ cat pizauth.conf\n" + file.read(), end="")
        self.say(
            "The server starts (at login, in real life; without -d it goes into the background):")
        print("$ pizauth server -d -c pizauth.conf &")
        self.daemon.start()
        self.say(
            "There is no token yet: the error on stderr has the URL to visit, stdout stays empty.")
        self.type("show", "work")
        self.say(
            "A browser visits the URL, the person approves, and the provider sends it back to "
            "pizauth:")
        status, page = self.daemon.visit()
        print(f"HTTP {status}: {re.search('<p>(.*?)</p>', page)[1]}")
        self.say("Now mail programs get the access token, and nothing else:")
        first = self.type("show", "work")
        self.type("status")
        self.say("The token lives 6 s. After 3 s, before it expires, pizauth replaces it:")
        until(lambda: self.daemon.show() != first, 8)
        second = self.type("show", "work")
        self.provider.expires_in = 3600
        until(lambda: self.daemon.show() != second, 8)
        self.say("And again; the next token lives an hour:")
        held = self.type("show", "work")
        self.say(
            "The provider goes down. Asked to refresh, pizauth fails, says so, and keeps both "
            "token and login:")
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
            "All stays running. In another terminal, with these, type along (Ctrl-C here ends it,"
            " and so does `pizauth shutdown` there):")
        print(
            f"export XDG_RUNTIME_DIR={environment['XDG_RUNTIME_DIR']} "
            f"XDG_CONFIG_HOME={environment['XDG_CONFIG_HOME']}")
        print(f'PATH={self.daemon.directory}/bin:"$PATH"\npizauth status', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while self.daemon.process.poll() is None:
                time.sleep(0.2)

    def end(self):
        """End what still runs, also a server that was started by hand meanwhile."""
        try:
            if os.path.exists(self.daemon.socket):
                self.say("And the end, which takes the tokens with it:")
                self.type("shutdown")
        finally:
            with contextlib.suppress(OSError):
                self.daemon.ask(b"shutdown:")
            self.daemon.__exit__()
            self.provider.close()


def demonstrate(stay):
    """Run the demonstration; the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # by way of the `finally` below
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


# ---- A day in the life of a user ----

EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload; as=style\r\n\r\n"
GZIP, DEFLATE = ([("Content-Encoding", coding)] for coding in ("gzip", "deflate"))
REFUSAL = {"code": 400, "error_code": "refresh_token_not_found",
           "msg": "Invalid Refresh Token: Refresh Token Not Found"}
ODDITIES = {  # how the refreshes are answered, in this order: bytes before, headers, coding
    "plain": (b"", (), bytes),
    "gzip": (b"", GZIP, gzip.compress),
    "early hints": (EARLY_HINTS, (), bytes),
    "deflate": (b"", DEFLATE, zlib.compress),
    "refused": (b"", (), bytes),  # in words that are not OAuth's; once only
    "ISO 8859-1": (b"", (), lambda body: body.replace(b"{", b'{"region": "Qu\xe9bec", ', 1)),
    "early hints and gzip": (EARLY_HINTS, GZIP, gzip.compress),
}
BROWSER = """#!/usr/bin/env python3
import os, sys, time, urllib.request
with open("browsers", "a") as file:
    print(os.environ["PIZAUTH_ACCOUNT"], os.getpid(), file=file)
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1]).read()
while os.path.exists(__file__):  # whoever removes the program closes the browser
    time.sleep(0.1)
"""


def expect(condition, otherwise):
    """Raise an AssertionError, even under python3 -O."""
    if not condition:
        raise AssertionError(otherwise)


class DayHandler(ProviderHandler):
    protocol_version = "HTTP/1.1"

    def reply(self, status, answer, oddity="plain"):
        before, headers, encode = ODDITIES[oddity]
        self.wfile.write(before)
        super().reply(status, encode(json.dumps(answer).encode()), headers)


class DayProvider(Provider):
    """Answers in odd ways, knows who has which token, and remembers what was done wrong. A refresh
    token is good for one use."""

    handler = DayHandler
    life = 4  # of an access token, in seconds

    def __init__(self):
        self.logins, self.issued, self.wrong = [], [], []
        self.owners = {}  # a code or a refresh token that is good -> the account
        later = [oddity for oddity in ODDITIES if oddity != "refused"]
        self.oddities = itertools.chain(ODDITIES, itertools.cycle(later))
        self.served = []  # of ODDITIES, one for each refresh answered so
        self.pause = 0  # before an answer
        self.lock = threading.Lock()
        super().__init__(self.life)

    def authorize(self, query):
        self.logins.append(query.get("login_hint"))
        location = super().authorize(query)
        if location is None:
            self.wrong.append(f"a bad authorization request: {query}")
        else:
            self.owners[query_of(location)["code"]] = query["login_hint"]
        return location

    def token(self, form):
        with self.lock:
            answer = self.answer(form)
        if self.pause:
            self.slow = True
            self.closing.wait(self.pause)
        return answer

    def answer(self, form):
        """Status and answer to a form, and the oddity."""
        refresh = form.get("grant_type") == "refresh_token"
        oddity = next(self.oddities) if refresh else "plain"
        used = form.get("refresh_token" if refresh else "code")
        if oddity == "refused":
            self.served.append(oddity)
            return 400, REFUSAL
        status, answer = super().token(form)
        if status == 200:
            owner = self.owners[answer["refresh_token"]] = self.owners.pop(used)
            self.issued.append((time.monotonic(), owner, answer["access_token"]))
            self.served += [oddity] if refresh else []
        else:
            self.wrong.append(f"a token request that got {answer}, after {self.served[-3:]}")
        return status, answer, oddity

    def refresh_tokens_of(self):
        """The accounts, each with its refresh token."""
        return {owner: token for token, owner in self.owners.items()}

    def refreshes(self):
        return len(self.issued) - len(self.logins)

    def gaps(self, name, since=0.0):
        """The seconds between the tokens that an account got after this moment."""
        moments = [moment for moment, owner, _ in self.issued if owner == name and moment > since]
        return [later - earlier for earlier, later in zip(moments, moments[1:])]


class Day:
    """Two accounts from the first login to the evening, with bash, gpg and a browser that stays
    open. What must hold at any time is checked again and again; each step prints a line."""

    NAMES = ("home", "work")

    def __init__(self, stack):
        self.start, self.over = time.monotonic(), threading.Event()
        self.provider = DayProvider()
        stack.callback(self.provider.close)
        self.daemon = Daemon("", "-vv")
        self.directory = self.daemon.cwd = self.daemon.directory
        self.others = {}  # processes that are not the server's to end, by number
        stack.callback(self.daemon.__exit__)
        gpg = "gpg --batch --yes --quiet --pinentry-mode loopback --passphrase-file passphrase"
        self.gpg = bool(shutil.which("gpg"))
        self.encrypt, self.decrypt = (
            (f"{gpg} --symmetric", f"{gpg} --decrypt") if self.gpg else ("cat", "cat"))
        stack.callback(self.end_agent)
        self.dumps, self.bad_dumps, self.log_checked = 0, [], 0
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        stack.callback(self.end_watcher)
        stack.callback(self.end_server)
        self.furnish()

    # The house, and the end of it.

    def furnish(self):
        """Programs in a PATH of ours, a passphrase, and the configuration."""
        programs = os.path.join(self.directory, "bin")
        os.mkdir(programs)
        shutil.copy(PROGRAM, os.path.join(programs, "pizauth"))
        python = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        for name, text in (("python3", python), ("browser", BROWSER)):
            with open(os.path.join(programs, name), "w", encoding="utf-8") as file:
                file.write(text)
        for name in os.listdir(programs):
            os.chmod(os.path.join(programs, name), 0o755)
        os.mkdir(self.path("gnupg"), 0o700)
        with open(self.path("passphrase"), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe() + "\n")
        self.daemon.environment.update(
            SHELL="/bin/bash", GNUPGHOME=self.path("gnupg"),
            PATH=f"{programs}:{os.environ['PATH']}")
        self.daemon.client = self.daemon.program = [os.path.join(programs, "pizauth")]
        self.configure()

    def configure(self, refresh_at_least="90m"):
        """Write the configuration."""
        commands = {
            "auth_notify_cmd": 'browser "$PIZAUTH_URL"',
            "error_notify_cmd": 'echo "$PIZAUTH_MSG" >> errors',
            "token_event_cmd":
                f"umask 077; pizauth dump | {self.encrypt} > dump.new && mv dump.new dump.gpg",
            "startup_cmd": f"{self.decrypt} dump.gpg | pizauth restore"}
        with open(self.daemon.config, "w", encoding="utf-8") as file:
            for option, command in commands.items():
                file.write(f"{option} = {json.dumps(command)};\n")
            file.write("refresh_before_expiry = 2s;\nrefresh_retry = 1s;\n"
                       f"refresh_at_least = {refresh_at_least};\n")
            for name in self.NAMES:
                file.write(self.provider.account(name, f'login_hint = "{name}";'))

    def path(self, name):
        return os.path.join(self.directory, name)

    def read(self, name):
        """The bytes of a file; none if it is not there."""
        with contextlib.suppress(FileNotFoundError), open(self.path(name), "rb") as file:
            return file.read()
        return b""

    def end_server(self):
        with contextlib.suppress(OSError):
            self.daemon.ask(b"shutdown:")

    def end_watcher(self):
        self.over.set()
        if self.watcher.is_alive():
            self.watcher.join()

    def end_agent(self):
        """Have gpg's helpers end."""
        if self.gpg:
            subprocess.run(["gpgconf", "--kill", "all"], env=self.daemon.environment,
                           stderr=subprocess.DEVNULL)

    def left(self):
        """What still runs when all should have ended: the browsers go with the directory."""
        until(lambda: not any(map(alive, self.others)), 5)
        return [what for pid, what in self.others.items() if alive(pid)]

    # The dump, as a backup program sees it: at any time.

    def watch(self):
        """Read each version of the dump that is ever there."""
        seen = b""
        while not self.over.wait(0.01):
            try:
                if os.path.exists(self.path("dump.gpg")):
                    data = self.read("dump.gpg")
                    if not self.dumps or data != seen:
                        seen, self.dumps = data, self.dumps + 1
                        self.read_dump(data)
            except Exception as error:  # of any kind: it is reported at the next check
                self.bad_dumps.append(f"version {self.dumps}: {error!r}")

    def read_dump(self, data):
        """The refresh tokens in a dump that gpg has encrypted, by account."""
        done = subprocess.run(["bash", "-c", self.decrypt], input=data, capture_output=True,
                              cwd=self.directory, env=self.daemon.environment, timeout=30)
        expect(done.returncode == 0, f"gpg cannot decrypt {len(data)} bytes: {done.stderr}")
        accounts = pizauth.read_dump(pizauth.decrypt_dump(done.stdout))
        return {name: token and token.refresh_token for name, (_, token) in accounts.items()}

    # What must hold.

    def say(self, text):
        print(f"{time.monotonic() - self.start:5.1f} s  {text}", flush=True)

    def token(self, name):
        """The token that `show` prints, one that the provider has just given to this account; empty
        if it has expired. A login is never asked for."""
        done = self.daemon.run("show", name)
        token = done.stdout.strip()
        given = [(moment, one) for moment, owner, one in self.provider.issued if owner == name]
        if done.returncode:
            expect("Access token has expired" in done.stderr and not token,
                   f"show {name} printed '{token}', and the error: {done.stderr}")
            return ""
        age = {one: time.monotonic() - moment for moment, one in given[-2:]}.get(token)
        expect(age is not None, f"show {name} printed {token}, which is neither of {given[-2:]}")
        expect(age < self.provider.life + 0.5, f"show {name} printed {token}, {age:.1f} s old")
        return token

    def check(self):
        """What holds always, whether or not there are tokens."""
        expect(not self.provider.wrong, f"the provider met {self.provider.wrong}")
        expect(not self.provider.stray, f"the provider was asked for {self.provider.stray}")
        expect(sorted(self.provider.logins) == sorted(self.NAMES),
               f"logins were asked for by {self.provider.logins}")
        ended = [what for pid, what in self.others.items() if not alive(pid)]
        expect(not ended, f"killed: {ended}")
        expect(not self.bad_dumps, f"dump.gpg was unusable: {self.bad_dumps}")
        expect(not self.read("errors"), f"error_notify_cmd was run: {self.read('errors')}")
        complaints = [line for line in self.daemon.logged()[self.log_checked :].splitlines()
                      if not line.startswith("INFO - ")]
        expect(not complaints, f"the server's log has {complaints}")

    def check_shows(self):
        self.check()
        for name in self.NAMES:
            expect(self.token(name), f"show {name} had no token: {self.status()}")

    def status(self):
        return self.daemon.ask(b"status:").decode()

    def live(self, condition, what, limit=20, check=None):
        """Look at everything, again and again, until this has come about."""
        end = time.monotonic() + limit
        while True:
            (check or self.check_shows)()
            if condition():
                return
            expect(time.monotonic() < end, f"in {limit} s there was not {what}: {self.status()}")
            time.sleep(0.1)

    # The steps.

    def run(self):
        for step in (self.morning, self.log_in, self.refresh, self.lose_network, self.reload,
                     self.hang_up, self.shut_down, self.start_again, self.evening):
            step()

    def morning(self):
        expect(os.access("/bin/bash", os.X_OK), "there is no /bin/bash here")
        if not self.gpg:
            self.say("There is no gpg here: `cat` takes its place.")
        self.daemon.start()
        expect(until(lambda: "startup_cmd" in self.daemon.logged()), "startup_cmd has not failed")
        expect(self.status().count("No access token") == 2, self.status())
        self.log_checked = len(self.daemon.logged())
        self.say("The server starts. There is no dump yet, as startup_cmd says.")

    def log_in(self):
        self.watcher.start()
        for name in self.NAMES:
            done = self.daemon.run("show", name)
            expect((done.returncode, done.stdout) == (1, ""), f"show {name}: {done}")
            expect("authorised with URL" in done.stderr, f"show {name}: {done}")
        expect(until(lambda: self.status().count("Active") == 2), self.status())
        for line in self.read("browsers").decode().splitlines():
            self.others[int(line.split()[1])] = f"the browser of {line.split()[0]}"
        expect(len(self.others) == 2, f"there are not two browsers but {self.others}")
        expect({*self.others} <= {*self.daemon.children()}, "bash has not turned into the browsers")
        self.live(lambda: self.dumps, "a dump")
        if self.gpg:
            done = subprocess.run(
                ["gpg-connect-agent", "--no-autostart", "getinfo pid", "/bye"],
                env=self.daemon.environment, capture_output=True, text=True)
            expect(done.stdout.startswith("D "), f"there is no gpg-agent: {done}")
            self.others[int(done.stdout.split()[1])] = "gpg-agent, which a token_event_cmd started"
        self.say("Both accounts are logged in, by notification. The browsers stay open.")

    def refresh(self):
        served = self.provider.served
        self.live(lambda: len(served) >= 10 and {*served} == {*ODDITIES}, "each kind of answer", 30)
        self.say(f"{self.provider.refreshes()} refreshes, with each kind of answer:"
                 f" {', '.join(ODDITIES)}.")

    def lose_network(self):
        port = self.provider.server.server_port
        self.provider.close()
        failing = time.monotonic()
        self.live(lambda: self.status().count("no answer") == 2, "a failure of both",
                  check=self.check)
        while time.monotonic() < failing + 4:
            self.check()
            for name in self.NAMES:
                self.token(name)
        before = self.provider.refreshes()
        self.provider.open(port)
        expect(until(lambda: all(map(self.token, self.NAMES)), 5), self.status())
        self.live(lambda: self.provider.refreshes() >= before + 2, "a refresh after the outage")
        self.say("The provider was out of reach for a while; both accounts have recovered.")

    def reload(self):
        self.configure(refresh_at_least="1s")
        done = self.daemon.run("reload")
        expect(done.returncode == 0, f"reload: {done.stderr}")
        now = time.monotonic()
        self.live(lambda: all(min(self.provider.gaps(name, now), default=9) < 1.8
                              for name in self.NAMES), "a refresh after a second")
        self.say("Reloaded: tokens are refreshed every second now, the logins are kept.")

    def hang_up(self):
        self.configure()
        self.daemon.process.send_signal(signal.SIGHUP)
        now = time.monotonic()
        self.live(lambda: all(max(self.provider.gaps(name, now), default=0) > 1.9
                              for name in self.NAMES), "a refresh after two seconds")
        self.say("Reloaded by SIGHUP: every two seconds again, the logins are kept.")

    def shut_down(self):
        """With a refresh on its way, whose rotated token must reach the dump."""
        self.provider.slow, self.provider.pause = False, 0.5
        expect(until(lambda: self.provider.slow), "there was no refresh before the end")
        done = self.daemon.run("shutdown")
        expect((done.returncode, self.daemon.process.wait(5)) == (0, 0), f"shutdown: {done}")
        self.provider.pause = 0
        self.check()
        dumped = self.read_dump(self.read("dump.gpg"))
        expect(dumped == self.provider.refresh_tokens_of(),
               f"the dump has {dumped}, the provider {self.provider.refresh_tokens_of()}")
        self.say("Shut down amid a refresh: the dump has its outcome. The browsers are still open.")

    def start_again(self):
        self.daemon.start()
        expect(until(lambda: "No access token" not in self.status()), self.status())
        expect(until(lambda: all(map(self.token, self.NAMES)), 5), self.status())
        self.check_shows()
        self.say("Started again: startup_cmd has restored the dump, and `show` works.")

    def evening(self):
        goal = max(24, self.provider.refreshes() + 4)
        self.live(lambda: self.provider.refreshes() >= goal, "more refreshes")
        self.check_shows()
        expect(self.daemon.run("shutdown").returncode == 0, "shutdown failed")
        expect(self.daemon.process.wait(5) == 0, "the server did not end well")
        self.check()
        self.say(f"The end, after {self.provider.refreshes()} refreshes, {len(self.NAMES)} logins"
                 f" and {self.dumps} dumps, each of which could be read.")


def live_a_day():
    """Run the day; the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # by way of the stack's callbacks
    failure = ""
    with contextlib.ExitStack() as stack:
        day = Day(stack)
        try:
            day.run()
        except AssertionError as error:
            print("The server's log ends so:\n" + day.daemon.logged()[-3000:], end="")
            failure = str(error)
    left = day.left()
    if left and not failure:
        failure = f"still running at the end: {left}"
    print(f"FAILED: {failure}" if failure else "All was as it should be.")
    return 1 if failure else 0


# ---- Benchmarks ----

BARE_SERVER = """
import selectors, socket, sys
selector, listener = selectors.DefaultSelector(), socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1]); listener.listen(256); listener.setblocking(False)
def accept():
    sock = listener.accept()[0]
    sock.setblocking(False)
    selector.register(sock, selectors.EVENT_READ, lambda: read(sock))
def read(sock):
    if not sock.recv(65536):
        sock.send(b'x' * 20)
        selector.unregister(sock)
        sock.close()
selector.register(listener, selectors.EVENT_READ, accept)
while True:
    for key, _ in selector.select():
        key.data()
"""
TOKEN_ENDPOINT = """
import http.server, os, socketserver, threading
answered = 0
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self): self.reply(b'%d' % answered)
    def do_POST(self):
        global answered
        self.rfile.read(int(self.headers['Content-Length']))
        self.reply(b'{"access_token": "%s", "expires_in": 86400, "refresh_token": "%s"}' % (
            os.urandom(20).hex().encode(), os.urandom(20).hex().encode()))
        answered += 1
    def reply(self, body):
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(socketserver.ThreadingTCPServer):
    request_queue_size = 64
servers = [Server(('127.0.0.1', 0), Handler) for _ in range(4)]
print(*[server.server_address[1] for server in servers], flush=True)
for server in servers[1:]:
    threading.Thread(target=server.serve_forever).start()
servers[0].serve_forever()
"""
HTTPS = secure(account("secure", 'redirect_uri = "https://localhost/";'))


def accounts(count, ports=(1,)):
    """A configuration of so many accounts, their token endpoints on these ports in turn."""
    return "refresh_before_expiry = 1h;\n" + "".join(
        account(f"a{number}").replace("t.example", f"127.0.0.1:{ports[number % len(ports)]}")
        .replace("http://a.example", "https://a.example")
        for number in range(count))


def dump_of(path, life=86400, age=0):
    """A dump in which every account of a configuration has a token."""
    with open(path, encoding="utf-8") as file:
        configured = pizauth.parse(file.read()).accounts.values()
    obtained = time.time() - age
    token = pizauth.Active(access_token="a" * 40, obtained_at=obtained, expires_at=obtained + life,
                           refresh_token="r" * 40)
    states = [(one, token) for one in configured]
    return pizauth.encrypt_dump(bytes(12), pizauth.dump_bytes(states, 0))


def key_updates(port, count):
    """A TLS 1.3 connection whose handshake is done, and so many KeyUpdates (RFC 8446 4.6.3), packed
    as no library sends them."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    def expand(secret, label, length, size):
        info = struct.pack(">HB", length, 6 + len(label)) + b"tls13 " + label + b"\0\1"
        return hmac.digest(secret, info, f"sha{size}")[:length]

    with tempfile.NamedTemporaryFile() as log:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.keylog_filename = log.name
        sock = context.wrap_socket(socket.create_connection(("127.0.0.1", port)))
        cipher = sock.cipher()[0]
        secret = bytes.fromhex(re.search(
            r"CLIENT_TRAFFIC_SECRET_0 \w+ (\w+)", log.read().decode())[1])
    assert cipher.startswith("TLS_AES"), cipher
    size, key_length, data = int(cipher[-3:]), int(cipher[8:11]) // 8, bytearray()
    for _ in range(count):
        key, nonce = expand(secret, b"key", key_length, size), expand(secret, b"iv", 12, size)
        data += b"\x17\3\3\0\x16" + AESGCM(key).encrypt(
            nonce, b"\x18\0\0\1\1\x16", b"\x17\3\3\0\x16")
        secret = expand(secret, b"traffic upd", size // 8, size)
    return socket.socket(fileno=sock.detach()), bytes(data)


class Bench:
    """Ours, a plain copy named `pizauth` that runs by its cached bytecode, beside a yardstick taken
    in turn in one run: medians, and their ratio. It needs Linux's /proc."""

    ROUNDS = 25
    WIDTHS = (66, 10, 36, 10, 6, 9)

    def __init__(self):
        # `python3` is the interpreter itself, no launcher of it, and as it starts by default.
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        self.ends = contextlib.ExitStack()
        self.home = self.ends.enter_context(tempfile.TemporaryDirectory(prefix="piz"))
        self.program = shutil.copy(PROGRAM, os.path.join(self.home, "pizauth"))
        self.process(self.program, "--version")  # which caches the bytecode

    def run(self, names):
        """Measure all, or the sections that are named, and print the table."""
        sections = [self.show, self.requests, self.start, self.memory, self.idle, self.tls,
                    self.growth, self.tokens, self.load]
        with open(PROGRAM, encoding="utf-8") as file:
            lines = len(file.readlines())
        print(f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, {lines} lines")
        with self.ends:
            self.row("what", "ours", "yardstick", "takes", "ratio", "reach")
            for section in sections:
                if not names or section.__name__ in names:
                    section()
        return 0

    def row(self, what, ours, name="", yardstick="", ratio="", reach=""):
        """A row of the table, printed at once, for some take a minute. What is to be reached is a
        ratio, if there is one, or else ours."""
        cells = (what, ours, name, yardstick, ratio, reach)
        line = "  ".join(str(cell).ljust(width) for cell, width in zip(cells, self.WIDTHS)).rstrip()
        bound = re.match(r"([<>]=) ([0-9.]+)", reach)
        if bound:
            value, limit = float(str(ratio or ours).split()[0]), float(bound[2])
            fine = value <= limit if bound[1] == "<=" else value >= limit
            line += "" if fine else "  MISSED"
        print(line, flush=True)

    def process(self, *command, environment=None):
        """How long a process takes, from start to end, in seconds."""
        start = time.perf_counter()
        subprocess.run(command, env=environment or self.environment, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, check=True)
        return time.perf_counter() - start

    def python(self, code):
        """How long the interpreter takes for this code."""
        return self.process(sys.executable, "-c", code)

    def compare(self, what, ours, name, yardstick, reach, rounds=ROUNDS):
        """Take both in turn and print a row of medians."""
        pairs = [(ours(), yardstick()) for _ in range(rounds)]
        mine, other = (statistics.median(times) for times in zip(*pairs))
        self.row(what, f"{mine * 1000:.1f} ms", name, f"{other * 1000:.1f} ms",
                 f"{mine / other:.2f}", reach)

    @contextlib.contextmanager
    def daemon(self, text, tokens=True):
        """A server whose accounts have tokens."""
        daemon = Daemon(text, program=[self.program])
        places = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME")
        daemon.environment = {**self.environment, **dict.fromkeys(places, daemon.directory)}
        with daemon:
            if tokens:
                assert daemon.ask(b"restore:" + dump_of(daemon.config)) == b"ok:"
            yield daemon

    @contextlib.contextmanager
    def endpoint(self):
        """The ports of a token endpoint, in a process of its own, that grants all, and counts."""
        process = subprocess.Popen([sys.executable, "-c", TOKEN_ENDPOINT], env=self.environment,
                                   stdout=subprocess.PIPE, text=True)
        try:
            yield process.stdout.readline().split()
        finally:
            process.kill()
            process.communicate()

    def number(self, pid, file, name=""):
        """The number that follows a name in a file of /proc, or the first there."""
        with open(f"/proc/{pid}/{file}", encoding="ascii") as lines:
            return int(re.search(rf"(?m)^{name}\s*([0-9]+)", lines.read())[1])

    def memory_of(self, daemon, kind="Pss"):
        """The memory of a server in MiB: its own and its share of what others have, too."""
        return self.number(daemon.process.pid, "smaps_rollup", f"{kind}:") / 1024

    def ask_often(self, path, count, pause=0.0):
        """How long each of so many showtokens takes, in seconds, sorted."""
        times = []
        for _ in range(count):
            start = time.perf_counter()
            reply = ask_at(path, b"showtoken:withurl a0")
            times.append(time.perf_counter() - start)
            assert reply, "no answer"
            if pause:
                time.sleep(pause)
        return sorted(times)

    def show(self):
        with self.daemon(accounts(100)) as daemon:
            for what, command, reach in (("show ACCOUNT", ("show", "a0"), "<= 1.35"),
                                         ("status of 100 accounts", ("status",), ""),
                                         ("dump of 100 accounts", ("dump",), "")):
                self.compare(
                    what, lambda command=command: self.process(
                        self.program, *command, environment=daemon.environment),
                    "python3 -c pass", lambda: self.python("pass"), reach, 50)

    def requests(self):
        for count in (1, 1000):
            rounds = []
            for _ in range(4):  # for a process is faster or slower than another for all its life
                with self.daemon(accounts(count)) as daemon, self.bare_server() as path:
                    rounds += [[self.ask_often(server, 500) for server in (daemon.socket, path)]
                               for _ in range(8)]
            for what, value, better in (
                    (f"requests a second, {count} account(s)",
                     lambda times: 500 / sum(times), ">= 0.75"),
                    ("  99th percentile, microseconds", lambda times: times[494] * 1e6, "")):
                ours, theirs = (statistics.median(map(value, side)) for side in zip(*rounds))
                self.row(what, f"{ours:.0f}", "bare selectors server", f"{theirs:.0f}",
                         f"{ours / theirs:.2f}", better)

    @contextlib.contextmanager
    def bare_server(self):
        """The path of a bare server's socket, as deep as ours."""
        with tempfile.TemporaryDirectory(prefix="piz") as directory:
            path = os.path.join(directory, "pizauth", "pizauth.sock")
            os.mkdir(os.path.dirname(path))
            process = subprocess.Popen(
                [sys.executable, "-c", BARE_SERVER, path], env=self.environment)
            try:
                until(lambda: os.path.exists(path))
                yield path
            finally:
                process.kill()
                process.wait()

    def start(self):
        imports = "import ssl, urllib.request"
        for what, more, reach in (("HTTP alone", "", "<= 1.0"), ("with HTTPS", HTTPS, "")):
            with self.daemon(accounts(1) + more, tokens=False) as daemon:
                def start(daemon=daemon):
                    daemon.ask(b"shutdown:")
                    daemon.process.wait()
                    begin = time.perf_counter()
                    daemon.process = subprocess.Popen(
                        [self.program, "server", "-d"], env=daemon.environment)
                    while not daemon.answers():
                        time.sleep(0.0005)
                    return time.perf_counter() - begin

                self.compare(f"start to first answer, {what}", start, imports,
                             lambda: self.python(imports), reach)

    def memory(self):
        for what, more, reach in (("HTTP alone", "", 13), ("with HTTPS", HTTPS, 18)):
            with self.endpoint() as ports, self.daemon(
                    accounts(1, ports) + more, tokens=False) as daemon:
                for background in (False, True):
                    if background:
                        daemon.ask(b"shutdown:")
                        daemon.process.wait()
                        daemon.run("server")
                        lock = os.path.join(os.path.dirname(daemon.socket), "pizauth.lock")
                        with open(lock, encoding="ascii") as file:
                            daemon.process.pid = int(file.read())
                    self.authorise(daemon, 1)
                    until(lambda: not daemon.children())
                    self.row(f"memory (Pss) after a login, {what}"
                             f"{', in the background' if background else ''}",
                             f"{self.memory_of(daemon):.1f} MiB", "resident in all",
                             f"{self.memory_of(daemon, 'Rss'):.1f} MiB", "", f"<= {reach} MiB")
                daemon.ask(b"shutdown:")
        with self.endpoint() as ports, self.daemon(accounts(1000, ports), tokens=False) as daemon:
            before = self.memory_of(daemon)
            self.authorise(daemon, 1000)
            for number in range(1000):
                daemon.ask(b"refresh:withurl a%d" % number)
            until(lambda: int(visit(f"http://127.0.0.1:{ports[0]}/")[1]) == 2000, 200)
            until(lambda: not daemon.children())
            after = self.memory_of(daemon)
            self.row("memory after 1,000 accounts authorised and refreshed",
                     f"{after:.1f} MiB", "before", f"{before:.1f} MiB")
            self.row("  more for an account", f"{(after - before) * 1.024:.2f} KiB")
            for _ in range(2):
                before = self.memory_of(daemon)
                self.ask_often(daemon.socket, 50_000)
            self.row("memory after 100,000 requests", f"{self.memory_of(daemon):.1f} MiB",
                     "after 50,000", f"{before:.1f} MiB", "", "flat")

    def authorise(self, daemon, count, at_once=16):
        """Have so many accounts authorised, as by browsers that come back."""
        port = int(json.loads(daemon.ask(b"info:"))["http_port"])
        for first in range(0, count, at_once):
            with contextlib.ExitStack() as stack:
                browsers = []
                for number in range(first, min(first + at_once, count)):
                    state = query_of(daemon.url(f"a{number}"))["state"]
                    browser = socket.create_connection(("127.0.0.1", port), 60)
                    browsers.append(stack.enter_context(browser))
                    browser.sendall(f"GET /?state={state}&code=c HTTP/1.1\r\n"
                                    f"Host: localhost:{port}\r\n\r\n".encode())
                for browser in browsers:
                    page = b"".join(iter(lambda browser=browser: browser.recv(65536), b""))
                    assert b"is authorised" in page, page

    def refresh(self, daemon, ports, count):
        """Have so many accounts restored that are due at once, and wait until all are refreshed;
        how long that took, and the latencies of showtokens meanwhile."""
        start, times = time.perf_counter(), []
        assert daemon.ask(b"restore:" + dump_of(daemon.config, 6000, 3600)) == b"ok:"
        while int(visit(f"http://127.0.0.1:{ports[0]}/")[1]) < count:
            times += self.ask_often(daemon.socket, 20, 0.002)
            assert time.perf_counter() < start + 300
        until(lambda: not daemon.children())
        return time.perf_counter() - start, sorted(times)

    def idle(self):
        with self.daemon(accounts(1), tokens=False) as empty, self.daemon(accounts(1000)) as full:
            time.sleep(2)
            names = ("nothing scheduled", "1,000 accounts Active")
            before = [self.usage(daemon) for daemon in (empty, full)]
            time.sleep(60)
            for name, daemon, (wakes, used), reach in zip(
                    names, (empty, full), before, ("<= 0", "<= 4")):
                now_wakes, now_used = self.usage(daemon)
                self.row(f"wake-ups in 60 s, {name}", now_wakes - wakes, "", "", "", reach)
                self.row("  processor time", f"{now_used - used:.1f} ms", "", "", "", "<= 5 ms")

    def usage(self, daemon):
        """How often a server has waited, and its processor time in milliseconds."""
        pid = daemon.process.pid
        return (self.number(pid, "status", "voluntary_ctxt_switches:"),
                self.number(pid, "schedstat") / 1e6)

    def tls(self):
        with self.daemon(accounts(1) + HTTPS) as daemon:
            port = int(json.loads(daemon.ask(b"info:"))["https_port"])
            quiet = self.ask_often(daemon.socket, 3000)[-1]
            hello = self.client_hello()
            for what, flood in (
                ("a TLS client floods KeyUpdates", lambda: [key_updates(port, 2300)]),
                ("20 TLS clients flood KeyUpdates", lambda: [
                    key_updates(port, 2300) for _ in range(20)]),
                ("40 TLS clients shake hands a byte at a time", lambda: [
                    (socket.create_connection(("127.0.0.1", port)), hello) for _ in range(40)]),
            ):
                with self.feeding(flood(), 1 if "byte" in what else 1 << 16):
                    worst = self.ask_often(daemon.socket, 5000)[-1]
                self.row(f"worst showtoken while {what}", f"{worst * 1000:.1f} ms",
                         "the worst without", f"{quiet * 1000:.1f} ms", "", "<= 50 ms")

    def client_hello(self):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = ssl.create_default_context().wrap_bio(
            incoming, outgoing, server_hostname="localhost")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        return outgoing.read()

    @contextlib.contextmanager
    def feeding(self, pairs, piece):
        """A child sends to each socket its data, in pieces, until all is sent or this ends."""
        pid = os.fork()
        if pid == 0:
            for sock, _ in pairs:
                sock.setblocking(False)
            while pairs:
                for sock, data in pairs[:]:
                    pairs.remove((sock, data))
                    try:
                        data = data[sock.send(data[:piece]) :]
                    except BlockingIOError:
                        pass
                    except OSError:
                        continue
                    if data:
                        pairs.append((sock, data))
            os._exit(0)
        for sock, _ in pairs:
            sock.close()
        try:
            yield
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def growth(self):
        for what, prepare, act in (
            ("parsing", lambda text: text, pizauth.parse),
            ("a dump", lambda text: self.restored(World(text)), World.dump),
            ("a restore", lambda text: (World(text), self.restored(World(text)).dump()),
             lambda pair: pair[0].restore(pair[1])),
        ):
            times = []
            for count in (1000, 100):
                text = accounts(count)
                runs = []
                for _ in range(7):
                    prepared, start = prepare(text), time.perf_counter()
                    act(prepared)
                    runs.append(time.perf_counter() - start)
                times.append(statistics.median(runs))
            self.row(f"{what} of 1,000 accounts", f"{times[0] * 1000:.1f} ms", "of 100",
                     f"{times[1] * 1000:.1f} ms", f"{times[0] / times[1]:.1f}", "about 10")

    def restored(self, world):
        """A world whose accounts all have tokens."""
        token = pizauth.Active(access_token="a" * 40, obtained_at=world.clock.wall(),
                               expires_at=world.clock.wall() + 3600, refresh_token="r" * 40)
        states = [(one, token) for one in world.auth.config.accounts.values()]
        dump = pizauth.encrypt_dump(bytes(12), pizauth.dump_bytes(states, 0))
        assert world.restore(dump) == "ok:"
        return world

    def tokens(self):
        imports = "import urllib.request"
        with self.endpoint() as ports, self.daemon(accounts(30, ports)) as daemon:
            names = iter(range(30))

            def refresh():
                name = f"a{next(names)}".encode()
                start = time.perf_counter()
                daemon.ask(b"refresh:withurl " + name)
                while daemon.ask(b"showtoken:withurl " + name).endswith(b"a" * 40):
                    time.sleep(0.0005)
                return time.perf_counter() - start

            self.compare("a token request, from due to done", refresh, imports,
                         lambda: self.python(imports), "<= 1.5")
        with self.endpoint() as ports, self.daemon(accounts(200, ports), tokens=False) as daemon:
            took, times = self.refresh(daemon, ports, 200)
            self.row("200 token requests due at once", f"{took:.1f} s", "", "", "", "<= 10 s")
            self.row("  99th percentile of showtoken meanwhile",
                     f"{times[int(len(times) * 0.99)] * 1000:.1f} ms", "", "", "", "<= 15 ms")

    def load(self):
        """Under load: 1,000 accounts, half of them at a provider that hangs, silent clients, half
        a handshake without end; and whether all is as it was when that is over."""
        hole = socket.create_server(("127.0.0.1", 0))
        text = accounts(1000, (1, hole.getsockname()[1])) + HTTPS
        with hole, self.daemon(text) as daemon:
            port = int(json.loads(daemon.ask(b"info:"))["https_port"])
            quiet = self.ask_often(daemon.socket, 5000)
            descriptors = daemon.descriptors()
            with contextlib.ExitStack() as stack:
                for number in range(1, 1000, 2):
                    daemon.ask(b"refresh:withurl a%d" % number)
                for _ in range(200):
                    stack.enter_context(socket.socket(socket.AF_UNIX)).connect(daemon.socket)
                    half = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    half.sendall(self.client_hello()[:200])
                loaded = self.ask_often(daemon.socket, 5000)
            (slow, fast) = (times[4950] * 1000 for times in (loaded, quiet))
            self.row("under load: 99th percentile of showtoken", f"{slow:.2f} ms", "without",
                     f"{fast:.2f} ms", f"{slow / fast:.2f}", "<= 5")
            self.ask_often(daemon.socket, 1000)
            before = self.memory_of(daemon)
            self.ask_often(daemon.socket, 100_000)
            self.row("  memory after 100,000 requests more", f"{self.memory_of(daemon):.1f} MiB",
                     "before them", f"{before:.1f} MiB", "", "< 1 MiB more")
            hole.close()
            for number in range(1, 1000, 2):
                daemon.ask(b"revoke:a%d" % number)
            until(lambda: not daemon.children(), 40)
            until(lambda: daemon.descriptors() == descriptors)
            self.row("  descriptors and children when all is over",
                     f"{daemon.descriptors()}, {len(daemon.children())}", "before",
                     f"{descriptors}, 0", "", "equal")


def load_tests(loader, tests, pattern):
    """The test classes in the order in which they stand here."""
    classes = [
        value for value in globals().values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)]
    return unittest.TestSuite(map(loader.loadTestsFromTestCase, classes))


WAITING = ("AuthlibTest", "EndToEndTest", "MailTest")  # classes that wait more than they work


def run_all():
    """Run all tests, those that mostly wait in a second process. Returns the exit status."""
    classes = [name for name, one in globals().items()
               if isinstance(one, type) and issubclass(one, unittest.TestCase)]
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen([sys.executable, os.path.abspath(__file__), *WAITING],
                                  stdout=output, stderr=subprocess.STDOUT)
        try:
            here = unittest.main(argv=[sys.argv[0], *sorted({*classes} - {*WAITING})], exit=False)
        finally:
            status = second.wait()
        output.seek(0)
        sys.stderr.write(f"In the other process:\n{output.read().decode()}")
    return 0 if here.result.wasSuccessful() and status == 0 else 1


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(run_all())
    if sys.argv[1:] in (["-h"], ["--help"]):
        raise SystemExit(print(__doc__))
    if sys.argv[1:2] == ["soak"] and len(sys.argv) == 3 and sys.argv[2].isdecimal():
        raise SystemExit(soak(float(sys.argv[2])))
    if sys.argv[1:2] == ["fuzz"] and sys.argv[2:] and sys.argv[2].isdecimal():
        raise SystemExit(fuzz(float(sys.argv[2]), sys.argv[3:] or FUZZERS))
    if sys.argv[1:2] == ["bench"] and set(sys.argv[2:]) <= set(dir(Bench)):
        raise SystemExit(Bench().run(sys.argv[2:]))
    if sys.argv[1:] in (["demo"], ["demo", "--stay"], ["day"]):
        try:
            raise SystemExit(
                live_a_day() if sys.argv[1] == "day" else demonstrate("--stay" in sys.argv))
        except (KeyboardInterrupt, BrokenPipeError):  # the reader has seen enough
            os._exit(1)
    if sys.argv[1:2] and not sys.argv[1].startswith("-") and "Test" not in sys.argv[1]:
        raise SystemExit(__doc__)
    unittest.main()
