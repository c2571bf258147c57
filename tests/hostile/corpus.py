"""The corpus: what is sent to a proxy that stands on the internet, and what was meant to happen.

Each entry proves one thing that no other does, and names where it comes from: the section of the
RFC that says so, the public advisory of a server that read it otherwise, or the technique by its
usual name. Bytes are written out, as every one of them matters.

An entry that is refused ends with `NEXT`, a request that must never be read as one. After one that
is served the connection must serve another request, or be closed if the entry says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.hostile.reading import Request

# The statuses of the proxy's own errors; an answer in the corpus is a status or one of these.
STATUSES = {
    "invalid_request": 400,
    "invalid_path": 400,
    "unknown_url": 404,
    "method_not_allowed": 405,
    "request_too_large": 413,
    "uri_too_long": 414,
    "expectation_failed": 417,
    "headers_too_large": 431,
    "loop_detected": 508,
}
MAX_BODY = 64 * 1024  # what the proxies under test are configured with


@dataclass(frozen=True, slots=True)
class Entry:
    """`sent` are the segments, one write each. `reached` is what must reach the upstream, in this
    order; `answers` what the client must see. `again`: whether the connection must serve another
    request afterwards, else it must be closed. `dropped` are header fields that must not reach the
    upstream. `hangs_up`: the client closes its side after the last segment; no answer is owed then."""

    name: str
    source: str
    sent: tuple[bytes, ...]
    reached: tuple[Request, ...] = ()
    answers: tuple[int | str, ...] = ()
    again: bool = False
    dropped: tuple[str, ...] = ()
    hangs_up: bool = False

    @property
    def data(self) -> bytes:
        return b"".join(self.sent)


HOST = b"Host: sluice\r\n"
GET = b"GET /v1/a HTTP/1.1\r\n" + HOST
POST = b"POST /v1/a HTTP/1.1\r\n" + HOST
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HELLO = b"Content-Length: 5\r\n\r\nhello"
CHUNKED_JSON = POST + JSON + CHUNKED + b"\r\n"
CHUNKED_UPLOAD = POST + CHUNKED + b"\r\n"
# An upload goes up while it comes: its upstream may see the beginning of one that is refused, but
# never a whole one.
CUT_TARGET = "/v1/cut"
CUT_UPLOAD = CHUNKED_UPLOAD.replace(b"/v1/a", CUT_TARGET.encode())
HELLO_CHUNK = b"5\r\nhello\r\n"
LAST = b"0\r\n\r\n"
NEXT = b"GET /v1/next HTTP/1.1\r\nHost: sluice\r\n\r\n"

GOT = Request("GET", "/v1/a")
SAID_HELLO = Request("POST", "/v1/a", b"hello")
SAID_NOTHING = Request("POST", "/v1/a")
GOT_NEXT = Request("GET", "/v1/next")


def refused(name: str, source: str, *sent: bytes, code: str = "invalid_request") -> Entry:
    """Refused with one error; the connection ends, and what is behind is not read."""
    return Entry(name, source, (*sent[:-1], sent[-1] + NEXT), (), (code,))


def served(
    name: str,
    source: str,
    *sent: bytes,
    reached: Request = SAID_HELLO,
    dropped: tuple[str, ...] = (),
) -> Entry:
    """Reaches the upstream as this one request, and the connection goes on."""
    return Entry(name, source, sent, (reached,), (200,), again=True, dropped=dropped)


# ---------------------------------------------------------------- Content-Length
CONTENT_LENGTH = [
    served("length", "RFC 9112 6.2", POST + HELLO),
    served("length: of a GET", "RFC 9110 9.3.1", GET + HELLO, reached=Request("GET", "/v1/a", b"hello")),
    served("length: none", "RFC 9112 6.3 rule 7", POST + b"\r\n", reached=SAID_NOTHING),
    served("length: zero", "RFC 9112 6.2", POST + b"Content-Length: 0\r\n\r\n", reached=SAID_NOTHING),
    served("length: leading zeros", "RFC 9110 8.6: 1*DIGIT", POST + b"Content-Length: 005\r\n\r\nhello"),
    served("length: white space around it", "RFC 9110 5.5", POST + b"Content-Length:\t 5 \t\r\n\r\nhello"),
    refused("length: two that differ", "CVE-2020-10108", POST + b"Content-Length: 0\r\n" + HELLO),
    refused("length: two that are equal", "CVE-2019-16792", POST + b"Content-Length: 5\r\n" + HELLO),
    refused("length: two in other case", "RFC 9110 5.1", POST + b"CONTENT-LENGTH: 0\r\n" + HELLO),
    refused("length: a list of equals", "RFC 9110 8.6", POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    refused("length: a list that differs", "RFC 9112 6.3 rule 5", POST + b"Content-Length: 5, 0\r\n\r\nhello"),
    refused("length: a list with an empty member", "RFC 9110 5.6.1", POST + b"Content-Length: 5,\r\n\r\nhello"),
    refused("length: plus", "CVE-2021-32715", POST + b"Content-Length: +5\r\n\r\nhello"),
    refused("length: minus", "RFC 9110 8.6", POST + b"Content-Length: -5\r\n\r\nhello"),
    refused("length: minus zero", "RFC 9110 8.6", POST + b"Content-Length: -0\r\n\r\n"),
    refused("length: a space in it", "CVE-2018-7159", POST + b"Content-Length: 5 0\r\n\r\nhello"),
    refused("length: hexadecimal", "CVE-2023-38697", POST + b"Content-Length: 0x5\r\n\r\nhello"),
    refused("length: letters behind it", "RFC 9110 8.6", POST + b"Content-Length: 5a\r\n\r\nhello"),
    refused("length: underscores", "CVE-2023-47627", POST + b"Content-Length: 0_5\r\n\r\nhello"),
    refused("length: decimal point", "RFC 9110 8.6", POST + b"Content-Length: 5.0\r\n\r\nhello"),
    refused("length: exponent", "RFC 9110 8.6", POST + b"Content-Length: 5e0\r\n\r\nhello"),
    refused("length: quoted", "RFC 9110 8.6", POST + b'Content-Length: "5"\r\n\r\nhello'),
    refused("length: a parameter", "RFC 9110 8.6", POST + b"Content-Length: 5;a\r\n\r\nhello"),
    refused("length: empty", "CVE-2023-40225", POST + b"Content-Length:\r\n\r\nhello"),
    refused("length: digits that are not ASCII", "CVE-2024-23829", POST + b"Content-Length: \xd9\xa5\r\n\r\nhello"),
    refused("length: vertical tab", "CVE-2019-16789", POST + b"Content-Length: \x0b5\r\n\r\nhello"),
    refused("length: overflows 64 bits", "RFC 9110 8.6", POST + b"Content-Length: 18446744073709551621\r\n\r\nhello"),
    refused(
        "length: overflows 32 bits", "RFC 9110 8.6", POST + b"Content-Length: 4294967301\r\n\r\nhello",
        code="request_too_large",
    ),
    refused("length: on a folded line", "RFC 9112 5.2", POST + b"Content-Length:\r\n 5\r\n\r\nhello"),
    refused("length: folded away", "CVE-2024-27982", POST + b"X: y\r\n Content-Length: 0\r\n" + HELLO),
    Entry(
        "length: an underscore in its name", "CGI name mapping", (POST + b"Content_Length: 5\r\n\r\n" + NEXT,),
        (SAID_NOTHING, GOT_NEXT), (200, 200), again=True,
    ),
    Entry(
        "length: shorter than what follows", "RFC 9112 9.3.2", (POST + HELLO + b"world" + NEXT,),
        (SAID_HELLO,), (200, "method_not_allowed"),
    ),
    Entry(
        "length: longer than what follows", "RFC 9112 8", (POST + JSON + b"Content-Length: 9\r\n\r\nhello",),
        hangs_up=True,
    ),
    Entry(
        "length: a body that looks like a request", "CL.0",
        (POST + b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT,),
        (Request("POST", "/v1/a", NEXT),), (200,), again=True,
    ),
]  # fmt: skip

# ---------------------------------------------------------------- Transfer-Encoding
_SMUGGLE = LAST + NEXT  # what a reader of Content-Length: 5 and one of chunks take differently
_CL_TE = b"Content-Length: %d\r\n" % len(_SMUGGLE)

TRANSFER_ENCODING = [
    served("coding", "RFC 9112 7.1", CHUNKED_UPLOAD + HELLO_CHUNK + LAST),
    served("coding: of JSON", "RFC 9112 7.1", CHUNKED_JSON + HELLO_CHUNK + LAST),
    served("coding: an empty body", "RFC 9112 7.1", CHUNKED_JSON + LAST, reached=SAID_NOTHING),
    served("coding: upper case", "RFC 9112 7", POST + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n" + HELLO_CHUNK + LAST),
    served("coding: white space around it", "RFC 9110 5.5", POST + b"Transfer-Encoding:chunked \t\r\n\r\n" + HELLO_CHUNK + LAST),
    served("coding: of a GET", "RFC 9110 9.3.1", GET + CHUNKED + b"\r\n" + HELLO_CHUNK + LAST, reached=Request("GET", "/v1/a", b"hello")),
    refused("coding: behind a length", "CL.TE, RFC 9112 6.1", POST + _CL_TE + CHUNKED + b"\r\n" + LAST),
    refused("coding: before a length", "TE.CL, CVE-2023-47641", POST + CHUNKED + b"Content-Length: 3\r\n\r\n5\r\nhello\r\n" + LAST),
    refused("coding: beside a length of zero", "TE.0", POST + CHUNKED + b"Content-Length: 0\r\n\r\n" + LAST),
    refused("coding: in HTTP/1.0", "RFC 9112 6.1", b"POST /v1/a HTTP/1.0\r\n" + HOST + CHUNKED + b"\r\n" + HELLO_CHUNK + LAST),
    refused("coding: twice the same", "TE.TE", POST + CHUNKED + CHUNKED + b"\r\n" + LAST),
    refused("coding: twice, last identity", "TE.TE", POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n" + LAST),
    refused("coding: twice, first unknown", "TE.TE", POST + b"Transfer-Encoding: x\r\n" + CHUNKED + b"\r\n" + LAST),
    refused("coding: chunked, chunked", "RFC 9112 6.1", POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + LAST),
    refused("coding: chunked, identity", "CVE-2022-32213", POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + LAST),
    refused("coding: gzip, chunked", "CVE-2019-16786", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + LAST),
    refused("coding: chunked, gzip", "RFC 9112 6.3 rule 4", POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n" + LAST),
    refused("coding: an empty member behind it", "RFC 9110 5.6.1", POST + b"Transfer-Encoding: chunked,\r\n\r\n" + LAST),
    refused("coding: an empty member before it", "RFC 9110 5.6.1", POST + b"Transfer-Encoding: ,chunked\r\n\r\n" + LAST),
    refused("coding: identity", "RFC 9112 7, B.3", POST + b"Transfer-Encoding: identity\r\n" + HELLO),
    refused("coding: unknown", "RFC 9112 6.1", POST + b"Transfer-Encoding: cow\r\n\r\n" + LAST),
    refused("coding: empty", "RFC 9112 6.1", POST + b"Transfer-Encoding:\r\n" + HELLO),
    refused("coding: letters before it", "TE.TE", POST + b"Transfer-Encoding: xchunked\r\n\r\n" + LAST),
    refused("coding: digits behind it", "CVE-2023-47641", POST + b"Transfer-Encoding: chunked123\r\n\r\n" + LAST),
    refused("coding: a parameter", "RFC 9112 7.1", POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n" + LAST),
    refused("coding: quoted", "TE.TE", POST + b'Transfer-Encoding: "chunked"\r\n\r\n' + LAST),
    refused("coding: a Kelvin sign, lower case k", "CVE-2025-69224", POST + b"Transfer-Encoding: chun\xe2\x84\xaaed\r\n\r\n" + LAST),
    refused("coding: no-break space", "TE.TE", POST + b"Transfer-Encoding: \xa0chunked\r\n\r\n" + LAST),
    refused("coding: vertical tab", "CVE-2019-16789", POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n" + LAST),
    refused("coding: NUL behind it", "TE.TE", POST + b"Transfer-Encoding: chunked\x00\r\n\r\n" + LAST),
    refused("coding: a space behind its name", "CVE-2021-22959", POST + b"Transfer-Encoding : chunked\r\n\r\n" + LAST),
    refused("coding: a tab behind its name", "TE.TE", POST + b"Transfer-Encoding\t: chunked\r\n\r\n" + LAST),
    refused("coding: a space before its name", "RFC 9112 5.2", POST + b" Transfer-Encoding: chunked\r\n\r\n" + LAST),
    refused("coding: on a folded line", "CVE-2022-32215", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n" + LAST),
    refused("coding: a folded line behind it", "CVE-2022-32215", POST + b"Transfer-Encoding: chunked\r\n , identity\r\n\r\n" + LAST),
    refused("coding: behind a bare LF", "CVE-2022-32214", POST + b"X: y\nTransfer-Encoding: chunked\r\n\r\n" + LAST),
    refused("coding: behind a bare CR", "CVE-2023-30589", POST + b"X: y\rTransfer-Encoding: chunked\r\n\r\n" + LAST),
    refused("coding: behind an odd CR", "CVE-2023-37276", POST + b"X: \rxTransfer-Encoding: chunked\r\n\r\n" + LAST),
    refused("coding: a CR for its hyphen", "CVE-2020-8201", POST + b"Transfer\rEncoding: chunked\r\n\r\n" + LAST),
    refused("coding: no colon", "CVE-2019-20444", POST + b"Transfer-Encoding chunked\r\n\r\n" + LAST),
    Entry(
        "coding: an underscore in its name", "CGI name mapping",
        (POST + b"Transfer_Encoding: chunked\r\n\r\n" + LAST + NEXT,), (SAID_NOTHING,), (200, "invalid_request"),
    ),
]  # fmt: skip

# ---------------------------------------------------------------- chunks
CHUNKS = [
    served("chunk: several", "RFC 9112 7.1", CHUNKED_JSON + b"2\r\nhe\r\n3\r\nllo\r\n" + LAST),
    served("chunk: leading zeros", "RFC 9112 7.1", CHUNKED_JSON + b"0005\r\nhello\r\n" + LAST),
    served("chunk: hexadecimal in both cases", "RFC 9112 7.1", CHUNKED_JSON + b"a\r\n0123456789\r\nA\r\n0123456789\r\n" + LAST, reached=Request("POST", "/v1/a", b"0123456789" * 2)),
    served("chunk: last one of many zeros", "RFC 9112 7.1", CHUNKED_JSON + HELLO_CHUNK + b"000\r\n\r\n"),
    served("chunk: data that looks like the end", "RFC 9112 7.1", CHUNKED_JSON + b"7\r\n" + LAST + b"\r\n\r\n" + LAST, reached=Request("POST", "/v1/a", LAST + b"\r\n")),
    served("chunk: extensions", "RFC 9112 7.1.1", CHUNKED_JSON + b'5;a;b=c;d="e"\r\nhello\r\n0;f\r\n\r\n'),
    served("chunk: each byte for itself", "RFC 9112 7.1", CHUNKED_JSON, *(bytes([byte]) for byte in HELLO_CHUNK + LAST)),
    refused("chunk: plus", "CVE-2023-38697", CHUNKED_JSON + b"+5\r\nhello\r\n" + LAST),
    refused("chunk: minus", "RFC 9112 7.1", CHUNKED_JSON + b"-5\r\nhello\r\n" + LAST),
    refused("chunk: 0x", "CVE-2022-24761", CHUNKED_JSON + b"0x5\r\nhello\r\n" + LAST),
    refused("chunk: a space before its size", "RFC 9112 7.1", CHUNKED_JSON + b" 5\r\nhello\r\n" + LAST),
    refused("chunk: a space behind its size", "RFC 9112 7.1", CHUNKED_JSON + b"5 \r\nhello\r\n" + LAST),
    refused("chunk: underscores", "CVE-2023-47627", CHUNKED_JSON + b"0_5\r\nhello\r\n" + LAST),
    refused("chunk: no size", "RFC 9112 7.1", CHUNKED_JSON + b"\r\nhello\r\n" + LAST),
    refused("chunk: an extension without a size", "RFC 9112 7.1", CHUNKED_JSON + b";a\r\nhello\r\n" + LAST),
    refused("chunk: no digit", "RFC 9112 7.1", CHUNKED_JSON + b"g\r\nhello\r\n" + LAST),
    refused("chunk: full-width digit", "CVE-2023-47627", CHUNKED_JSON + b"\xef\xbc\x95\r\nhello\r\n" + LAST),
    refused("chunk: a comma for the semicolon", "RFC 9112 7.1.1", CHUNKED_JSON + b"5,a\r\nhello\r\n" + LAST),
    refused("chunk: size overflows 64 bits", "CVE-2021-32714", CHUNKED_JSON + b"10000000000000005\r\nhello\r\n" + LAST),
    refused("chunk: larger than what may come", "interface: max_body", CHUNKED_JSON + b"fffffff\r\n" + bytes(MAX_BODY + 1), code="request_too_large"),
    refused("chunk: longer than its size", "SPILL.TERM", CHUNKED_JSON + b"5\r\nhello!\r\n" + LAST),
    refused("chunk: two other bytes for its end", "CVE-2025-43859", CHUNKED_JSON + b"5\r\nhelloXX" + LAST),
    refused("chunk: shorter than its size", "TERM.SPILL", CHUNKED_JSON + b"6\r\nhello\r\n" + LAST),
    refused("chunk: LF ends its size", "TERM.EXT, CVE-2025-22871", CHUNKED_JSON + b"5\nhello\r\n" + LAST),
    refused("chunk: LF ends its data", "RFC 9112 7.1", CHUNKED_JSON + b"5\r\nhello\n" + LAST),
    refused("chunk: CR ends its size", "RFC 9112 2.2", CHUNKED_JSON + b"5\rhello\r\n" + LAST),
    refused("chunk: CR ends its data", "RFC 9112 2.2", CHUNKED_JSON + b"5\r\nhello\r" + LAST),
    refused("chunk: LF in an extension", "EXT.TERM, CVE-2024-52304", CHUNKED_JSON + b"5;a\nb\r\nhello\r\n" + LAST),
    refused("chunk: CR in an extension", "CVE-2021-22960", CHUNKED_JSON + b"5;a\rb\r\nhello\r\n" + LAST),
    refused("chunk: NUL in an extension", "RFC 9112 7.1.1", CHUNKED_JSON + b"5;a\x00\r\nhello\r\n" + LAST),
    refused("chunk: LF in the last one's extension", "Funky chunks", CHUNKED_JSON + HELLO_CHUNK + b"0;\n\r\n\r\n"),
    refused("chunk: a huge extension", "CVE-2024-22019", CHUNKED_JSON + b"5;" + b"a" * 65536 + b"\r\nhello\r\n" + LAST),
    refused("chunk: LF ends the body", "RFC 9112 7.1", CHUNKED_JSON + HELLO_CHUNK + b"0\r\n\n"),
    refused("chunk: LF behind the last size", "RFC 9112 7.1", CHUNKED_JSON + HELLO_CHUNK + b"0\n\r\n"),
    refused("chunk: no empty line at the end", "RFC 9112 7.1", CHUNKED_JSON + HELLO_CHUNK + b"0\r\n"),
    refused("chunk: a body without chunks", "RFC 9112 7.1", CHUNKED_JSON + b"hello\r\n"),
    refused("chunk: malformed, of an upload", "interface 3: not completed upstream", CUT_UPLOAD + HELLO_CHUNK + b"x\r\n"),
    refused("chunk: an upload that grows too large", "interface: max_body", CUT_UPLOAD + HELLO_CHUNK + b"fffffff\r\n" + bytes(MAX_BODY), code="request_too_large"),
    Entry("chunk: cut before the last one", "RFC 9112 8", (CHUNKED_JSON + HELLO_CHUNK,), hangs_up=True),
    Entry("chunk: cut before the empty line", "RFC 9112 8", (CHUNKED_JSON + HELLO_CHUNK + b"0\r\n",), hangs_up=True),
    Entry("chunk: an upload that is cut", "RFC 9112 8", (CUT_UPLOAD + HELLO_CHUNK,), hangs_up=True),
    Entry("chunk: an upload that is cut between its lines", "RFC 9112 8", (CUT_UPLOAD + HELLO_CHUNK + b"0\r\n",), hangs_up=True),
]  # fmt: skip

# ---------------------------------------------------------------- trailers
_TRAILED = CHUNKED_JSON + HELLO_CHUNK + b"0\r\n"
TRAILERS = [
    served("trailer", "RFC 9112 7.1.2", _TRAILED + b"X-Trailer: 1\r\n\r\n", dropped=("x-trailer",)),
    served("trailer: announced", "RFC 9110 6.6.2", POST + b"Trailer: X-Trailer\r\nTE: trailers\r\n" + CHUNKED + b"\r\n" + HELLO_CHUNK + b"0\r\nX-Trailer: 1\r\n\r\n", dropped=("x-trailer", "trailer", "te")),
    served("trailer: a credential", "RFC 9110 6.5.1", _TRAILED + b"X-Api-Key: sk-stolen\r\n\r\n", dropped=("x-api-key",)),
    served("trailer: a length", "TR.CL, RFC 9110 6.5.1", _TRAILED + b"Content-Length: 99\r\n\r\n"),
    served("trailer: a coding", "RFC 9110 6.5.1", _TRAILED + b"Transfer-Encoding: chunked\r\n\r\n"),
    refused("trailer: the next request", "CVE-2025-53643", _TRAILED),
    refused("trailer: a space behind its name", "RFC 9112 5.1", _TRAILED + b"X : y\r\n\r\n"),
    refused("trailer: folded", "RFC 9112 5.2", _TRAILED + b"X: y\r\n z\r\n\r\n"),
    refused("trailer: no name", "RFC 9110 5.1", _TRAILED + b": y\r\n\r\n"),
    refused("trailer: bare LF", "RFC 9112 2.2", _TRAILED + b"X: y\n\r\n"),
    refused("trailer: bare CR", "RFC 9112 2.2", _TRAILED + b"X: y\rZ: z\r\n\r\n"),
    refused("trailer: NUL", "RFC 9110 5.5", _TRAILED + b"X: \x00\r\n\r\n"),
    refused("trailer: huge", "RFC 9110 6.5", _TRAILED + b"X: " + b"y" * 70_000 + b"\r\n\r\n"),
    refused("trailer: very many", "RFC 9110 6.5", _TRAILED + b"X: y\r\n" * 10_000 + b"\r\n"),
    refused("trailer: malformed, of an upload", "RFC 9112 7.1.2", CUT_UPLOAD + HELLO_CHUNK + b"0\r\nX\r\n\r\n"),
]  # fmt: skip

# ---------------------------------------------------------------- the request line
REQUEST_LINE = [
    served("line: an empty line before it", "RFC 9112 2.2", b"\r\n" + GET + b"\r\n", reached=GOT),
    served("line: absolute form", "RFC 9112 3.2.2", b"GET http://sluice/v1/a?b HTTP/1.1\r\n" + HOST + b"\r\n", reached=Request("GET", "/v1/a?b")),
    served("line: absolute form, another host", "RFC 9112 3.2.2", b"GET HTTP://other:81/v1/a HTTP/1.1\r\n" + HOST + b"\r\n", reached=GOT),
    served("line: a method by extension", "RFC 9110 16.1", b"PROPFIND /v1/a HTTP/1.1\r\n" + HOST + b"\r\n", reached=Request("PROPFIND", "/v1/a")),
    served("line: every visible character", "RFC 3986 2", b"GET /v1/!$&'()*+,;=:@~-._%41?/?\"<>[]^`{|} HTTP/1.1\r\n" + HOST + b"\r\n", reached=Request("GET", "/v1/!$&'()*+,;=:@~-._%41?/?\"<>[]^`{|}")),
    Entry("line: HEAD", "RFC 9110 9.3.2", (b"HEAD /v1/a HTTP/1.1\r\n" + HOST + b"\r\n",), (Request("HEAD", "/v1/a"),), (200,), again=True),
    Entry("line: HTTP/1.0 has one request", "RFC 9112 9.3", (b"GET /v1/a HTTP/1.0\r\n\r\n" + NEXT,), (GOT,), (200,)),
    Entry("line: HTTP/1.0, keep-alive", "RFC 9112 C.2.2", (b"GET /v1/a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" + NEXT,), (GOT,), (200,)),
    Entry("line: asterisk form", "RFC 9112 3.2.4", (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n",), (), ("unknown_url",), again=True),
    Entry("line: absolute form without a path", "RFC 9112 3.2.2", (b"GET http://sluice?/v1/a HTTP/1.1\r\n" + HOST + b"\r\n",), (), ("unknown_url",), again=True),
    refused("line: asterisk form, not OPTIONS", "RFC 9112 3.2.4", b"GET * HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: authority form", "RFC 9112 3.2.3", b"GET sluice:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: another scheme", "RFC 9110 4.2", b"GET ftp://sluice/v1/a HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: no leading slash", "RFC 9112 3.2.1", b"GET v1/a HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: CONNECT", "RFC 9112 3.2.3", b"CONNECT sluice:443 HTTP/1.1\r\n" + HOST + b"\r\n", code="method_not_allowed"),
    refused("line: TRACE", "RFC 9110 9.3.8", b"TRACE /v1/a HTTP/1.1\r\n" + HOST + b"\r\n", code="method_not_allowed"),
    refused("line: unknown method", "RFC 9110 9.1", b"SMUGGLE /v1/a HTTP/1.1\r\n" + HOST + b"\r\n", code="method_not_allowed"),
    refused("line: method in lower case", "RFC 9110 9.1", b"get /v1/a HTTP/1.1\r\n" + HOST + b"\r\n", code="method_not_allowed"),
    refused("line: method with a separator", "CVE-2024-23829", b"GET/: /v1/a HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: no method", "RFC 9112 3", b" /v1/a HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: a space before it", "RFC 9112 3", b" " + GET + b"\r\n"),
    refused("line: two spaces", "RFC 9112 3", b"GET  /v1/a HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: tabs", "RFC 9112 3", b"GET\t/v1/a\tHTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: a space behind it", "RFC 9112 3", b"GET /v1/a HTTP/1.1 \r\n" + HOST + b"\r\n"),
    refused("line: a space in the target", "RFC 9112 3.2", b"GET /v1/a HTTP/1.1 HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: no target", "RFC 9112 3", b"GET HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: a target that is not ASCII", "RFC 9112 3.2", "GET /v1/ü HTTP/1.1\r\n".encode() + HOST + b"\r\n"),
    refused("line: NUL in the target", "RFC 9112 3.2", b"GET /v1/\x00 HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: DEL in the target", "RFC 9112 3.2", b"GET /v1/\x7f HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: bare CR in the target", "RFC 9112 2.2", b"GET /v1/\rX HTTP/1.1\r\n" + HOST + b"\r\n"),
    refused("line: byte order mark", "RFC 9112 3", b"\xef\xbb\xbf" + GET + b"\r\n"),
    refused("line: an LF before it", "RFC 9112 2.2", b"\n" + GET + b"\r\n"),
    refused("line: ends in LF", "CVE-2021-41136", b"GET /v1/a HTTP/1.1\n" + HOST + b"\r\n"),
    refused("line: ends in CR", "RFC 9112 2.2", b"GET /v1/a HTTP/1.1\r" + HOST + b"\r\n"),
    refused("line: ends in CR CR LF", "RFC 9112 2.2", b"GET /v1/a HTTP/1.1\r\r\n" + HOST + b"\r\n"),
    refused("line: HTTP/0.9", "RFC 9112 3", b"GET /v1/a\r\n"),
    refused("line: HTTP/1.2", "RFC 9112 2.3", b"GET /v1/a HTTP/1.2\r\n" + HOST + b"\r\n"),
    refused("line: HTTP/2.0", "RFC 9112 2.3", b"GET /v1/a HTTP/2.0\r\n" + HOST + b"\r\n"),
    refused("line: HTTP/1.10", "RFC 9112 2.3", b"GET /v1/a HTTP/1.10\r\n" + HOST + b"\r\n"),
    refused("line: HTTP/01.1", "RFC 9112 2.3", b"GET /v1/a HTTP/01.1\r\n" + HOST + b"\r\n"),
    refused("line: HTTP/1", "RFC 9112 2.3", b"GET /v1/a HTTP/1\r\n" + HOST + b"\r\n"),
    refused("line: a version that is no dot", "CVE-2024-23829", "GET /v1/a HTTP/1ö1\r\n".encode() + HOST + b"\r\n"),
    refused("line: version in lower case", "RFC 9112 2.3", b"GET /v1/a http/1.1\r\n" + HOST + b"\r\n"),
    refused("line: another protocol", "RFC 2326", b"OPTIONS /v1/a RTSP/1.0\r\n" + HOST + b"\r\n"),
    refused("line: the HTTP/2 preface", "RFC 9113 3.4", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"),
    refused("line: a TLS handshake", "RFC 8446 5.1", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00\r\n"),
    refused("line: the PROXY protocol", "haproxy proxy-protocol.txt", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + GET + b"\r\n"),
    refused("line: a response", "RFC 9112 2.1", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    refused("line: very long", "RFC 9112 3", b"GET /v1/" + b"a" * 16_400 + b" HTTP/1.1\r\n" + HOST + b"\r\n", code="uri_too_long"),
]  # fmt: skip

# ---------------------------------------------------------------- header fields
FIELDS = [
    served("field: bytes above ASCII", "RFC 9110 5.5: obs-text", GET + b"X: \xff\xc3\xbc\r\n\r\n", reached=GOT),
    served("field: empty value", "RFC 9110 5.5", GET + b"X:\r\n\r\n", reached=GOT),
    served("field: odd but valid name", "RFC 9110 5.6.2", GET + b"!#$%&'*+-.^_`|~: y\r\n\r\n", reached=GOT),
    served("field: as many as may be", "interface 4: headers_too_large", GET + b"X: y\r\n" * 127 + b"\r\n", reached=GOT),
    served("field: nominated by Connection", "RFC 9110 7.6.1", GET + b"Connection: X-Secret\r\nX-Secret: 1\r\n\r\n", reached=GOT, dropped=("x-secret", "connection")),
    served("field: a nominated length", "hop-by-hop header abuse", POST + b"Connection: Content-Length\r\n" + HELLO),
    served("field: a nominated coding", "CVE-2026-26365", POST + JSON + b"Connection: Transfer-Encoding, Host\r\n" + CHUNKED + b"\r\n" + HELLO_CHUNK + LAST),
    served("field: an upgrade to h2c", "h2c smuggling", GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n", reached=GOT, dropped=("upgrade", "http2-settings", "connection")),
    served("field: an upgrade to a WebSocket", "RFC 6455 4.1, WebSocket smuggling", GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 777\r\n\r\n", reached=GOT, dropped=("upgrade",)),
    served("field: an upgrade that is not nominated", "RFC 9110 7.8", GET + b"Upgrade: h2c\r\nKeep-Alive: 9\r\n\r\n", reached=GOT, dropped=("upgrade", "keep-alive")),
    Entry("field: Connection: close", "RFC 9112 9.6", (GET + b"Connection: x, CLOSE\r\n\r\n" + NEXT,), (GOT,), (200,)),
    Entry("field: Connection: close beside keep-alive", "RFC 9112 9.3", (GET + b"Connection: keep-alive\r\nConnection: close\r\n\r\n" + NEXT,), (GOT,), (200,)),
    Entry("field: a loop", "RFC 9110 7.6.3", (GET + b"Via: 1.1 sluice\r\n\r\n",), (), ("loop_detected",), again=True),
    refused("field: a space behind its name", "CVE-2019-16276", GET + b"X : y\r\n\r\n"),
    refused("field: a tab behind its name", "RFC 9112 5.1", GET + b"X\t: y\r\n\r\n"),
    refused("field: no colon", "CVE-2019-20444", GET + b"X\r\n\r\n"),
    refused("field: no name", "CVE-2023-25725", GET + b": y\r\n\r\n"),
    refused("field: a space in its name", "RFC 9110 5.1", GET + b"X Y: z\r\n\r\n"),
    refused("field: a separator in its name", "CVE-2023-47627", GET + b"X(Y: z\r\n\r\n"),
    refused("field: a name that is not ASCII", "RFC 9110 5.1", GET + "Ü: y\r\n\r\n".encode()),
    refused("field: NUL in its name", "RFC 9110 5.1", GET + b"X\x00: y\r\n\r\n"),
    refused("field: folded by a space", "RFC 9112 5.2", GET + b"X: y\r\n z\r\n\r\n"),
    refused("field: folded by a tab", "RFC 9112 5.2", GET + b"X: y\r\n\tz\r\n\r\n"),
    refused("field: folded before the first", "RFC 9112 2.2", b"GET /v1/a HTTP/1.1\r\n X: y\r\n" + HOST + b"\r\n"),
    refused("field: a line of one space", "RFC 9112 5.2", GET + b" \r\n\r\n"),
    refused("field: NUL in its value", "RFC 9110 5.5", GET + b"X: \x00\r\n\r\n"),
    refused("field: bare CR in its value", "RFC 9112 2.2", GET + b"X: y\rz\r\n\r\n"),
    refused("field: CR CR LF", "RFC 9112 2.2", GET + b"X: y\r\r\n\r\n"),
    refused("field: a control character in its value", "RFC 9110 5.5", GET + b"X: \x01\r\n\r\n"),
    refused("field: DEL in its value", "RFC 9110 5.5", GET + b"X: \x7f\r\n\r\n"),
    refused("field: LF only", "CVE-2022-35256", GET + b"X: y\n\r\n"),
    refused("field: LF for the empty line", "RFC 9112 2.2", GET + b"\n"),
    refused("field: CR LF for one half only", "RFC 9112 2.2", GET + b"X: y\n\n"),
    refused("field: LF in the whole request", "CVE-2022-32214", GET.replace(b"\r", b"") + b"\n"),
    refused("field: CR in the whole request", "RFC 9112 2.2", GET.replace(b"\n", b"") + b"\r"),
    refused("field: one more than may be", "interface 4: headers_too_large", GET + b"X: y\r\n" * 128 + b"\r\n", code="headers_too_large"),
    refused("field: very many that never end", "interface 4: headers_too_large", GET + b"X: y\r\n" * 12_000, code="headers_too_large"),
    refused("field: very long", "RFC 9110 5.4", GET + b"X: " + b"y" * 70_000 + b"\r\n\r\n", code="headers_too_large"),
]  # fmt: skip

# ---------------------------------------------------------------- Host


def _host(value: bytes) -> bytes:
    return b"GET /v1/a HTTP/1.1\r\nHost: " + value + b"\r\n\r\n"


HOSTS = [
    served("host: a port", "RFC 9110 7.2", _host(b"sluice:8080"), reached=GOT),
    served("host: an IPv6 address", "RFC 3986 3.2.2", _host(b"[::1]:80"), reached=GOT),
    refused("host: none", "RFC 9112 3.2", b"GET /v1/a HTTP/1.1\r\n\r\n"),
    refused("host: two", "RFC 9112 3.2", GET + b"Host: other\r\n\r\n"),
    refused("host: two that are equal", "RFC 9112 3.2", GET + b"host: sluice\r\n\r\n"),
    refused("host: two, in HTTP/1.0", "RFC 9112 3.2", b"GET /v1/a HTTP/1.0\r\n" + HOST + HOST + b"\r\n"),
    refused("host: empty", "RFC 9110 4.2.1", _host(b"")),
    refused("host: a space", "RFC 9112 3.2", _host(b"a b")),
    refused("host: a list", "RFC 9110 7.2", _host(b"a, b")),
    refused("host: a path", "RFC 9112 3.2", _host(b"a/b")),
    refused("host: a query", "RFC 9112 3.2", _host(b"a?b")),
    refused("host: user info", "RFC 9110 4.2.4", _host(b"a@b")),
    refused("host: a URL", "RFC 9112 3.2", _host(b"http://a")),
    refused("host: a port that is too large", "RFC 3986 3.2.3", _host(b"a:99999")),
    refused("host: a port that is no number", "RFC 3986 3.2.3", _host(b"a:+80")),
    refused("host: two ports", "RFC 3986 3.2.3", _host(b"a:80:80")),
    refused("host: half a bracket", "RFC 3986 3.2.2", _host(b"[::1")),
    refused("host: bytes above ASCII", "RFC 3986 3.2.2", _host("ü".encode())),
]  # fmt: skip

# ---------------------------------------------------------------- paths


def _path(name: str, source: str, target: bytes) -> Entry:
    """Refused for its path; its framing is sound, so the connection goes on."""
    request = b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    return Entry(f"path: {name}", source, (request,), (), ("invalid_path",), again=True)


PATHS = [
    _path("dot segments", "RFC 3986 5.2.4", b"/v1/../a"),
    _path("a dot segment at the end", "RFC 3986 5.2.4", b"/v1/a/.."),
    _path("one dot", "RFC 3986 5.2.4", b"/v1/./a"),
    _path("dots before the prefix", "RFC 3986 5.2.4", b"/../v1/a"),
    _path("encoded dots", "CWE-22", b"/v1/%2e%2E/a"),
    _path("one encoded dot", "CVE-2021-41773", b"/v1/.%2e/a"),
    _path("an encoded slash", "CWE-22", b"/v1/..%2fa"),
    _path("encoded twice", "CVE-2021-42013", b"/v1/%252e%252e/a"),
    _path("encoded again and again", "CWE-174", b"/v1/%2525252525252e/a"),
    _path("overlong UTF-8", "CVE-2000-0884", b"/v1/%c0%ae%c0%ae/a"),
    _path("path parameters", "Tomcat's ..;/", b"/v1/..;x/a"),
    _path("a backslash", "CWE-22", b"/v1/..\\a"),
    _path("an encoded backslash", "CWE-22", b"/v1/%5c..%5ca"),
    _path("two slashes at its start", "interface 3", b"//v1/a"),
    _path("two slashes below the prefix", "interface 3", b"/v1//a"),
    _path("an encoded slash below the prefix", "interface 3", b"/v1/%2fa"),
    _path("a fragment", "CVE-2023-45539", b"/v1/a#b"),
    _path("dots in absolute form", "RFC 9112 3.2.2", b"http://sluice/v1/../a"),
]

# ---------------------------------------------------------------- one after another
_LENGTHY = POST + HELLO
_CHUNKY = CHUNKED_UPLOAD + HELLO_CHUNK + LAST
_NOWHERE = b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n"
_CLOSE_BEHIND = GET + b"Connection: close\r\n\r\n"

SEQUENCES = [
    Entry("pipeline", "RFC 9112 9.3.2", (_LENGTHY + _CHUNKY + GET + b"\r\n",), (SAID_HELLO, SAID_HELLO, GOT), (200,) * 3, again=True),
    Entry("pipeline: many", "RFC 9112 9.3.2", (NEXT * 40 + _LENGTHY,), (*[GOT_NEXT] * 40, SAID_HELLO), (200,) * 41, again=True),
    Entry("pipeline: behind HEAD", "HEAD response queue", (b"HEAD /v1/a HTTP/1.1\r\n" + HOST + b"\r\n" + NEXT,), (Request("HEAD", "/v1/a"), GOT_NEXT), (200, 200), again=True),
    Entry("pipeline: an own error between", "RFC 9112 9.3.2", (NEXT + _NOWHERE + NEXT,), (GOT_NEXT, GOT_NEXT), (200, "unknown_url", 200), again=True),
    Entry("pipeline: an own answer between", "interface 3: /livez", (b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n" + NEXT,), (GOT_NEXT,), (200, 200), again=True),
    Entry("pipeline: garbage behind", "the issue: still answered", (GET + b"\r\n" + b"\x00\r\n\r\n" + NEXT,), (GOT,), (200, "invalid_request")),
    Entry("pipeline: garbage behind a body", "the issue: still answered", (_CHUNKY + b"GET\r\n\r\n" + NEXT,), (SAID_HELLO,), (200, "invalid_request")),
    Entry("pipeline: ambiguity behind", "the issue: still answered", (_LENGTHY + POST + CHUNKED + b"Content-Length: 3\r\n\r\n" + LAST + NEXT,), (SAID_HELLO,), (200, "invalid_request")),
    Entry("pipeline: garbage behind two", "the issue: still answered", (NEXT + _LENGTHY + b"\r\n\r\n\x00" + NEXT,), (GOT_NEXT, SAID_HELLO), (200, 200, "invalid_request")),
    Entry("pipeline: garbage behind the last", "RFC 9112 9.6", (_CLOSE_BEHIND + b"\x00\x00" + NEXT,), (GOT,), (200,)),
    Entry("split: in the request line", "RFC 9112 3", (b"GE", b"T /v1/", b"a HTT", b"P/1.1\r\nHost: sluice\r\n\r\n"), (GOT,), (200,), again=True),
    Entry("split: between CR and LF", "RFC 9112 2.2", (GET + b"\r", b"\n"), (GOT,), (200,), again=True),
    Entry("split: before the last CR LF", "RFC 9112 2.2", (GET, b"\r\n" + NEXT), (GOT, GOT_NEXT), (200, 200), again=True),
    Entry("split: in a field's name", "RFC 9112 5", (POST + b"Content-", b"Length: 5\r\n\r\nhello"), (SAID_HELLO,), (200,), again=True),
    Entry("split: in the body", "RFC 9112 6.2", (POST + b"Content-Length: 5\r\n\r\nhe", b"llo" + NEXT), (SAID_HELLO, GOT_NEXT), (200, 200), again=True),
    Entry("split: after each byte", "RFC 9112 2.2", tuple(bytes([byte]) for byte in GET + b"X: y\r\n" + HELLO), (Request("GET", "/v1/a", b"hello"),), (200,), again=True),
    Entry("split: the leading empty line", "RFC 9112 2.2", (b"\r", b"\n" + GET + b"\r\n"), (GOT,), (200,), again=True),
    Entry("split: a bare CR at the border", "RFC 9112 2.2", (GET + b"X: y\r", b"Z: z\r\n\r\n" + NEXT), (), ("invalid_request",)),
    Entry("split: an LF at the border", "RFC 9112 2.2", (GET + b"X: y", b"\nZ: z\r\n\r\n" + NEXT), (), ("invalid_request",)),
    Entry("split: garbage on its own", "the issue: still answered", (GET + b"\r\n", b"\x00\r\n\r\n" + NEXT), (GOT,), (200, "invalid_request")),
]  # fmt: skip

# ---------------------------------------------------------------- bodies that are not taken
_EXPECTS = b"Expect: 100-continue\r\n"
_HIDDEN = b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT  # a body that looks like a request

EXPECTATIONS = [
    Entry("expect: 100-continue", "RFC 9110 10.1.1", (POST + JSON + _EXPECTS + b"Content-Length: 5\r\n\r\n", b"hello"), (SAID_HELLO,), (100, 200), again=True, dropped=("expect",)),
    Entry("expect: of an upload", "RFC 9110 10.1.1", (POST + _EXPECTS + CHUNKED + b"\r\n", HELLO_CHUNK + LAST), (SAID_HELLO,), (100, 200), again=True, dropped=("expect",)),
    Entry("expect: without a body", "RFC 9110 10.1.1", (GET + _EXPECTS + b"\r\n",), (GOT,), (200,), again=True, dropped=("expect",)),
    Entry("expect: in HTTP/1.0", "RFC 9110 10.1.1", (b"POST /v1/a HTTP/1.0\r\n" + _EXPECTS + HELLO,), (SAID_HELLO,), (200,), dropped=("expect",)),
    refused("expect: something else", "RFC 9110 10.1.1", POST + b"Expect: 200-ok\r\n" + HELLO, code="expectation_failed"),
    refused("expect: obfuscated", "0.CL by Expect", POST + b"Expect: y 100-continue\r\n" + HELLO, code="expectation_failed"),
    refused("expect: two of them", "0.CL by Expect", POST + _EXPECTS + b"Expect: 200-ok\r\n" + HELLO, code="expectation_failed"),
    refused("expect: folded", "CVE-2025-32094", b"OPTIONS /v1/a HTTP/1.1\r\n" + HOST + b"Expect:\r\n 100-continue\r\n" + HELLO),
    refused("expect: of what is too large", "RFC 9110 10.1.1", POST + _EXPECTS + b"Content-Length: 65537\r\n\r\n", code="request_too_large"),
    refused("expect: of what is ambiguous", "RFC 9112 6.1", POST + _EXPECTS + CHUNKED + b"Content-Length: 5\r\n\r\n"),
    Entry("expect: on a wrong path", "RFC 9110 10.1.1", (b"POST /nowhere HTTP/1.1\r\n" + HOST + _EXPECTS + _HIDDEN,), (), ("unknown_url",), again=True),
]  # fmt: skip

BODIES = [
    refused("body: declared too large", "RFC 9110 15.5.14", POST + b"Content-Length: 65537\r\n\r\n" + bytes(65537), code="request_too_large"),
    refused("body: too large, behind a request's head", "CL.0", POST + b"Content-Length: 99999\r\n\r\n", code="request_too_large"),
    served("body: as large as may be", "interface: max_body", POST + b"Content-Length: 65536\r\n\r\n" + b"x" * MAX_BODY, reached=Request("POST", "/v1/a", b"x" * MAX_BODY)),
    served("body: gzip", "RFC 9110 8.4", POST + b"Content-Encoding: gzip\r\nContent-Length: 12\r\n\r\n\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\x4b\x04", reached=Request("POST", "/v1/a", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\x4b\x04")),
    served("body: not the gzip that it claims to be", "RFC 9110 8.4", POST + JSON + b"Content-Encoding: gzip\r\n" + HELLO),
    served("body: every byte there is", "RFC 9110 6.4", POST + b"Content-Length: 256\r\n\r\n" + bytes(range(256)), reached=Request("POST", "/v1/a", bytes(range(256)))),
    served("body: multipart", "RFC 2046 5.1", POST + b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 9\r\n\r\n--b--\r\n\r\n", reached=Request("POST", "/v1/a", b"--b--\r\n\r\n")),
    served("body: of DELETE", "RFC 9110 9.3.5", b"DELETE /v1/a HTTP/1.1\r\n" + HOST + HELLO, reached=Request("DELETE", "/v1/a", b"hello")),
    served("body: of HEAD", "RFC 9110 9.3.2", b"HEAD /v1/a HTTP/1.1\r\n" + HOST + HELLO, reached=Request("HEAD", "/v1/a", b"hello")),
    Entry("body: of an unknown path", "CL.0", (b"POST /nowhere HTTP/1.1\r\n" + HOST + _HIDDEN,), (), ("unknown_url",), again=True),
    Entry("body: of a forbidden path", "CL.0", (b"POST /v1/../a HTTP/1.1\r\n" + HOST + _HIDDEN,), (), ("invalid_path",), again=True),
    Entry("body: of the proxy's own path", "CL.0", (b"GET /livez HTTP/1.1\r\n" + HOST + _HIDDEN,), (), (200,), again=True),
    Entry("body: chunked, of the proxy's own path", "TE.0", (b"GET /livez HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n%x\r\n" % len(NEXT) + NEXT + b"\r\n" + LAST,), (), (200,), again=True),
    Entry("body: malformed, of an unknown path", "TE.0", (b"POST /nowhere HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n", b"x\r\n" + NEXT), (), ("unknown_url",)),
]  # fmt: skip

CORPUS = [
    *CONTENT_LENGTH,
    *TRANSFER_ENCODING,
    *CHUNKS,
    *TRAILERS,
    *REQUEST_LINE,
    *FIELDS,
    *HOSTS,
    *PATHS,
    *SEQUENCES,
    *EXPECTATIONS,
    *BODIES,
]
