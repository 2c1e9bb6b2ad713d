"""A real HTTP server that says what it was told to, for whatever asks a model behind an endpoint."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A chat-completions server. `script` answers each request: (status, body, headers) or a callable of the
    request's JSON and its number; the last entry repeats."""

    def __init__(self, script, delay=0.0):
        self.script, self.delay, self.requests, self.keys, self.times = list(script), delay, [], [], []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append((self.path, body))
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.times.append(time.monotonic())
                    outer.running += 1
                    outer.most_running = max(outer.most_running, outer.running)
                try:
                    time.sleep(outer.delay)
                    step = outer.script[min(number, len(outer.script) - 1)]
                    status, content, headers = step(body, number) if callable(step) else step
                finally:
                    with outer.lock:
                        outer.running -= 1
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(data)),
                        **headers,
                    }.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()
