"""A mock engine that costs little: streams tokens at fixed times. ``python mock_engine.py PORT TTFT_S ITL_S``."""

from __future__ import annotations

import asyncio
import json
import sys

PORT, TTFT_S, ITL_S = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(content: object) -> bytes:
    return chunk(b"data: " + json.dumps(content).encode() + b"\n\n")


TOKEN = event({"choices": [{"text": "a", "index": 0, "finish_reason": None}]})


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            line, *headers = head.decode().split("\r\n")
            length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length")), 0)
            body = await reader.readexactly(length)
            if line.startswith("GET") or not json.loads(body).get("stream"):
                content = b'{"data": [{"id": "m"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))
                continue
            tokens = int(json.loads(body).get("max_tokens", 1))
            writer.write(HEAD)
            await asyncio.sleep(TTFT_S)
            for token in range(tokens):
                if token:
                    await asyncio.sleep(ITL_S)
                writer.write(TOKEN)
            usage = {"prompt_tokens": 1, "completion_tokens": tokens}
            writer.write(event({"choices": [], "usage": usage}) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", PORT)
    await server.serve_forever()


asyncio.run(main())
