"""What the mock says and the load generator expects: the one place that knows both ends.

The prompt tells the mock what to do, because a prompt passes every gateway untouched.
"""

from __future__ import annotations

import json
import re

JSON, FLOOD, PACED = b"json", b"flood", b"paced"
# The way of the answer; chunks a second; chunks at once at the beginning.
ORDER = re.compile(rb"bench:(json|flood|paced)(?:=(\d+))?(?:\+(\d+))?")

# The id carries the time of sending: every chunk has the same length and no foreign field.
_CHUNK = (
    b'data: {"id":"chatcmpl-%s","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"bench","choices":[{"index":0,"delta":%s,"finish_reason":%s}]%s}\n\n'
)
CHUNK = _CHUNK % (b"%019d", b'{"content":" word"}', b"null", b"")
SENT_AT = re.compile(rb'"id":"chatcmpl-(\d{19})"')
CHUNK_BYTES = len(CHUNK % 0)

# Before [DONE] the mock says how many chunks and body bytes the stream had: the receiver's
# count must be the same, or something was lost, added or sent twice on the way.
SUM = re.compile(rb'"chatcmpl-sum-(\d{12})-(\d{12})"')
_LAST = _CHUNK % (b"sum-%012d-%012d", b"{}", b'"stop"', b"")
USAGE = (
    b'data: {"id":"chatcmpl-usage","object":"chat.completion.chunk","created":1700000000,'
    b'"model":"bench","choices":[],"usage":'
    b'{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ENDING_BYTES = len(_LAST % (0, 0)) + len(DONE)


def ending(chunks: int, *, usage: bool) -> bytes:
    """The last events. A usage chunk is not in the sum: who asked for it takes it out again."""
    asked = USAGE % (chunks, chunks + 9) if usage else b""
    return _LAST % (chunks, chunks * CHUNK_BYTES + ENDING_BYTES) + asked + DONE


def answer(request_bytes: int) -> bytes:
    """The body of the small non-streamed answer; it says how much of the request arrived."""
    return (
        b'{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"bench",'
        b'"choices":[{"index":0,"message":{"role":"assistant","content":"A short answer."},'
        b'"finish_reason":"stop"}],"usage":{"prompt_tokens":%d,"completion_tokens":4,'
        b'"total_tokens":%d}}' % (request_bytes, request_bytes + 4)
    )


def request(port: int, order: str, *, stream: bool, filler: int = 0) -> bytes:
    """A whole chat completion request, head and body."""
    body = json.dumps(
        {
            "model": "bench",
            "stream": stream,
            "messages": [{"role": "user", "content": f"bench:{order} " + "word " * (filler // 5)}],
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        "Accept: application/json\r\nUser-Agent: bench\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {CLIENT_KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


CLIENT_KEY = "sk-bench-client"
