"""What stands for OpenAI's server and its code: tiny checkpoints, the original graph in NumPy, and a server here."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"  # as `data/make_openai_checkpoints.py` wrote it
AR, BERT = DATA / "openai-ar" / "model.ckpt-7", DATA / "openai-bert" / "model.ckpt-131000"


def original_graph(variables, tokens: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits (N, T, V), normed last states (N, T, D)) as src/model.py has them, float64; BERT where SOS is absent."""
    w = {name.removeprefix("model/"): value.astype(float) for name, value in variables.items()}
    x = w["wte"][tokens]
    if "sos" in w:
        x = np.concatenate([np.broadcast_to(w["sos"], (len(x), 1, x.shape[2])), x[:, :-1]], axis=1)
    x = x + w["wpe"]

    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    for i in range(blocks):
        n = norm(x, w[f"h{i}/ln_1/g"])
        q, k, v = (np.einsum("bsf,hef->bhse", n, w[f"h{i}/attn/{part}_proj"]) for part in "qkv")
        scores = np.einsum("bhse,bhte->bhst", q, k) / np.sqrt(q.shape[-1])
        if "sos" in w:
            scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -1e10)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhst,bhte->bhse", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("bhse,hef->bsf", mixed, w[f"h{i}/attn/c_proj"])
        inner = norm(x, w[f"h{i}/ln_2/g"]) @ w[f"h{i}/mlp/c_fc/w"]
        x = x + inner / (1 + np.exp(-1.702 * inner)) @ w[f"h{i}/mlp/c_proj/w"]
    x = norm(x, w["ln_f/g"])
    return x @ w["wtet"].T, x


class Server(ThreadingHTTPServer):
    """Serves `files` by path; `drops`: after how many bytes the next answers end; `log`: (method, path, range).

    `extra`: headers of every answer. `lies`: (status, headers, body) in place of a method's answers. `trusting`: ranges
    are served whatever If-Range says. `gate`: what a GET waits for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.drops, self.log, self.ranges, self.tag, self.broken = {}, [], [], True, '"1"', []
        self.broken_heads = []
        self.extra, self.lies, self.trusting, self.gate = {}, {}, False, None
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.log.append((self.command, self.path, asked))
        if self.command == "GET" and server.gate:
            server.gate()
        if self.command in server.lies:
            return self.lie(*server.lies[self.command])
        faults = server.broken if self.command == "GET" else server.broken_heads
        if self.path not in server.files or faults:
            return self.send_error(faults.pop() if self.path in server.files else 404)
        content, begin = server.files[self.path], 0
        if asked and server.ranges and (server.trusting or self.headers.get("If-Range") == server.tag):
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", server.tag)
        for name, value in server.extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        if self.command == "GET":
            drop = server.drops.pop(0) if server.drops else len(content)
            self.wfile.write(content[begin : begin + drop])

    def lie(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs as long as the block."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
