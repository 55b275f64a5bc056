"""A local server that speaks the OpenAI interface, and misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """How to answer one question.

    Attributes:
        content: of the message; None for none.
        status: of HTTP.
        headers: further ones.
        body: in place of the usual answer.
        finish: finish_reason.
        refusal: of the message.
        delay: seconds before the answer.
        drip: seconds between its bytes.
        drop: close the connection without an answer.
    """

    content: str | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    finish: str = "stop"
    refusal: str | None = None
    delay: float = 0.0
    drip: float = 0.0
    drop: bool = False

    def encode(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        return json.dumps({"choices": [{"message": message, "finish_reason": self.finish}], "usage": usage}).encode()


@dataclass
class Question:
    """What a client asked: the whole request, its headers, and the response to be rated."""

    body: dict[str, Any]
    headers: dict[str, str]
    moment: float

    @property
    def response(self) -> str:
        material = json.loads(self.body["messages"][1]["content"])
        return str(material["response"])


class JudgeServer:
    """Answers every question with what `answer` says, and remembers it."""

    def __init__(self, answer: Callable[[Question], Reply]) -> None:
        self.questions: list[Question] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                question = Question(json.loads(self.rfile.read(length)), dict(self.headers), time.monotonic())
                with server._lock:
                    server.questions.append(question)
                    reply = answer(question)
                time.sleep(reply.delay)
                if reply.drop:
                    self.close_connection = True
                    return
                body = reply.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for part in [body] if not reply.drip else [body[i : i + 1] for i in range(len(body))]:
                        self.wfile.write(part)
                        self.wfile.flush()
                        time.sleep(reply.drip)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # a client that gave up

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def judge_server(answer: Callable[[Question], Reply]) -> Iterator[JudgeServer]:
    server = JudgeServer(answer)
    try:
        yield server
    finally:
        server.close()


def rating(score: object) -> str:
    return json.dumps({"score": score})


def honest(question: Question) -> Reply:
    """ " yes 12" is worth 8, " no 12" is worth 3."""
    return Reply(rating(8 if "yes" in question.response else 3))
