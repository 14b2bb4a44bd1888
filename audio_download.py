"""
A path, address, base64 text or bytes -> a binary file object. Downloads are limited in size and time and, for
untrusted requests, to public addresses.
"""

import base64
import functools
import http.client
import io
import ipaddress
import os
import socket
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import numpy as np
import torch


try:
    from .audio_decoding import AudioError
except ImportError:  # not part of a package: the tools beside this file import it by its bare name
    from audio_decoding import AudioError

MAX_BYTES = 2**28  # limit of a source that is not a local file
CHUNK = 2**16  # bytes read from a connection at a time
TIMEOUT = 30.0  # seconds for a whole download
READ_LIMITS = ("max_bytes", "timeout", "public_only")  # of any file
FETCH_LIMITS = (*READ_LIMITS, "max_seconds")  # of audio, see `audio_utils.fetch_audio`
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"  # all others are written as %XX
WITHOUT_BREAKS = {ord(character): None for character in "\r\n"}
# `ipaddress` does not know these: IETF protocols, and a cloud's own services.
NOT_PUBLIC = [ipaddress.ip_network(network) for network in ("192.0.0.0/24", "168.63.129.16/32")]
# Hosts have these IPv6 addresses. Others are multicast or local, or carry IPv4 addresses through a translator.
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


def read(source, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT, public_only: bool = False) -> io.BufferedIOBase:
    """Turns a source that is not samples into a binary file object; see [`fetch_audio`] for the limits."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        content = source
    elif hasattr(source, "read"):
        content = source.read(max_bytes + 1)
    elif not isinstance(source, (str, Path)):
        raise AudioError(
            f"{describe(source)} is not audio: expected a path, an address, base64 text, bytes, a binary file object, "
            "a numpy array or a tensor, or a dict that holds one of these."
        )
    else:
        try:
            content = read_text(os.fspath(source), max_bytes, timeout, public_only)
        except AudioError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise AudioError(f"{describe(source)} cannot be read: {error}") from error
        if isinstance(content, io.BufferedIOBase):
            return content
    return io.BytesIO(at_most(max_bytes, content, source))


def read_text(source: str, max_bytes: int, timeout: float, public_only: bool) -> bytes | io.BufferedIOBase:
    """Returns the content of an address or of base64 text, or an open local file."""
    scheme = urlsplit(source[:4096]).scheme.lower()
    if scheme in ("http", "https"):
        return download(source, max_bytes, timeout, public_only)
    if scheme == "data":
        header, _, payload = source.partition(",")
        is_base64 = header.endswith(";base64")
        return decode_base64(unquote(payload)) if is_base64 else unquote_to_bytes(payload)
    path = unquote(urlsplit(source).path) if scheme == "file" else source
    if not public_only and len(path) < 4096 and os.path.isfile(path):
        return open(path, "rb")
    try:
        return decode_base64(source)
    except ValueError as error:
        reason = "neither an existing file, nor an address, nor base64"
        if public_only:
            reason = "neither an address nor base64; local files are not opened here"
        raise AudioError(f"{describe(source)} is {reason}.") from error


def decode_base64(text: str) -> bytes:
    """Decodes base64, also in lines, as MIME has it."""
    return base64.b64decode(text.translate(WITHOUT_BREAKS), validate=True)


def at_most(max_bytes: int, content: bytes, source) -> bytes:
    if len(content) > max_bytes:
        raise AudioError(f"{describe(source)} is larger than the limit of {max_bytes} bytes.")
    return content


def download(url: str, max_bytes: int, timeout: float, public_only: bool) -> bytes:
    """Reads an http(s) address. Its redirects are under the same limits and the same deadline."""
    deadline = time.monotonic() + timeout

    def time_left() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    handlers = [WebRedirects, WebHandler(time_left=time_left, public_only=public_only)]
    if public_only:
        handlers.append(urllib.request.ProxyHandler({}))  # a proxy would resolve names by itself
    request = urllib.request.Request(quote(url, safe=URL_CHARACTERS), headers={"User-Agent": "qwen2-audio-vl"})
    content = bytearray()
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            if response.status != 200:
                raise AudioError(f"{describe(url)} was answered with HTTP status {response.status} instead of 200.")
            while chunk := response.read(CHUNK):
                content += chunk
                at_most(max_bytes, content, url)
            if response.length:
                raise AudioError(f"{describe(url)} ended {response.length} bytes early.")
    except (OSError, HTTPException) as error:  # urllib hides some timeouts in errors of its own
        if time.monotonic() >= deadline:
            raise AudioError(f"{describe(url)} took longer than the limit of {timeout:g} s.") from error
        raise
    return bytes(content)


class WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, where urllib would follow them to ftp as well."""

    def redirect_request(self, request, fp, code, message, headers, new_url):
        if urlsplit(new_url).scheme.lower() not in ("http", "https"):
            raise AudioError(
                f"{describe(request.full_url)} redirects to {describe(new_url)}, which is not an http(s) address."
            )
        fp.close()  # or urllib reads all of its content, whatever its size
        return super().redirect_request(request, fp, code, message, headers, new_url)


class WebHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections that keep a deadline: `time_left` gives its seconds, and raises TimeoutError at its end."""

    def __init__(self, time_left: Callable[[], float], public_only: bool):
        super().__init__()
        self.time_left, self.public_only = time_left, public_only

    def http_open(self, request):
        return self.do_open(functools.partial(self.connection, http.client.HTTPConnection), request)

    def https_open(self, request):
        return self.do_open(functools.partial(self.connection, http.client.HTTPSConnection), request)

    def connection(self, connection_class: type, host: str, **kwargs) -> http.client.HTTPConnection:
        connection = connection_class(host, **kwargs)
        connection._create_connection = self.open_socket
        connection.response_class = self.open_response
        return connection

    def open_socket(self, address: tuple[str, int], *_) -> socket.socket:
        """
        Connects to the first address of a host that answers. With `public_only` all of them must be public, and the
        socket goes to the address that was checked, so that a second answer of the DNS cannot replace it.
        """
        host, port = address
        targets = [info[4][:2] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for target, _ in targets if self.public_only else ():
            if not is_public(ipaddress.ip_address(target.partition("%")[0])):
                raise AudioError(f"The host {host!r} resolves to an address that is not public.")
        for num_left in range(len(targets), 0, -1):
            try:  # with a share of the time, so that an address that does not answer leaves some for the others
                sock = socket.create_connection(targets[-num_left], self.time_left() / num_left)
                break
            except OSError:
                if num_left == 1:
                    raise
        sock.settimeout(self.time_left())  # for the TLS handshake, if one follows
        return sock

    def open_response(self, sock: socket.socket, **kwargs) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(sock, **kwargs)
        response.fp = io.BufferedReader(TimedReads(sock, response.fp.detach(), self.time_left))
        return response


class TimedReads(io.RawIOBase):
    """Reads a socket with the time that is left, as a fixed timeout for each read would let a slow server go on."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase, time_left: Callable[[], float]):
        self.sock, self.raw, self.time_left = sock, raw, time_left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self.sock.settimeout(self.time_left())
        return self.raw.readinto(buffer)

    def close(self):
        self.raw.close()
        super().close()


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    # An IPv6 address may carry an IPv4 address. The connection then reaches the IPv4 address.
    for embedded in (getattr(address, name, None) for name in ("ipv4_mapped", "sixtofour")):
        if embedded is not None:
            return is_public(embedded)
    if address.version == 6:
        return address.is_global and address in GLOBAL_UNICAST
    return address.is_global and not address.is_multicast and not any(address in network for network in NOT_PUBLIC)


def describe(source) -> str:
    """Describes a source in a few words for messages, and never shows its whole content."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        name = "array" if isinstance(source, np.ndarray) else "tensor"
        return f"The {name} of shape {tuple(source.shape)} and dtype {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"The content of {len(source)} bytes"
    if isinstance(source, (str, Path)):
        text = str(source)
        return f"The source {text if len(text) <= 80 else text[:60] + '...' + text[-17:]!r}"
    return "The file" if hasattr(source, "read") else f"The {type(source).__name__}"
