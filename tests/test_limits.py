"""make test ONLY=tests/test_limits.py: what untrusted files and addresses may cost, and whom a server may ask."""

import base64
import contextlib
import io
import ipaddress
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import trustme
from bombs import BOMBS, id3
from fuzz import peak_memory
from helpers import answer, start_python
from serving import serve_by_path
from sounds import ENCODINGS, RECORDINGS, encode

import audio_decoding
import audio_download
from audio_streaming import find_duration, stream_audio
from audio_utils import AudioError, fetch_audio
from demo.bases import ASSETS


def silence(rate: int, seconds: int, **settings: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(rate * seconds, np.int16), rate, **settings)
    return file.getvalue()


def test_long_silence_in_a_small_file_is_not_decoded_to_its_end():
    hour = silence(8000, seconds=3700, format="flac")
    assert len(hour) < 2**20
    with pytest.raises(AudioError, match="lasts longer than the limit of 3600 s"):
        fetch_audio(hour)
    with pytest.raises(AudioError, match="lasts 11 s, past the limit of 10 s"):
        fetch_audio(np.zeros(176_000, np.float32), max_seconds=10)
    with pytest.raises(AudioError, match="limit of 4 s, which is for 48000 Hz; it has 192000"):
        fetch_audio(silence(192_000, seconds=2, format="wav"), max_seconds=4)


@pytest.mark.long
def test_bombs_cost_little_memory(tmp_path, web):
    """Each in a process of its own, which says how much its peak grew: 10 s at 48 kHz are 2 MB."""
    (tmp_path / "bomb.flac").write_bytes(silence(48_000, seconds=300, format="flac"))
    (tmp_path / "bomb.opus").write_bytes(silence(48_000, seconds=300, format="ogg", subtype="opus"))
    with (tmp_path / "bomb.wav").open("wb") as file:  # 2**31 samples that the disk does not hold
        soundfile.write(file, np.zeros(8, np.int16), 48_000, format="wav", subtype="PCM_U8")
        file.truncate(2**31 + 44)
        file.seek(40)
        file.write((2**31).to_bytes(4, "little"))
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        from audio_utils import AudioError, fetch_audio

        def peak_memory():
            return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) // 1024

        fetch_audio(f"{sys.argv[1]}/assets/audio/english.wav")
        before = peak_memory()
        try:
            fetch_audio(sys.argv[2], max_seconds=10, max_bytes=10**7)
        except AudioError as error:
            print("TOKENS", peak_memory() - before, error)
    """
    sources = [str(path) for path in sorted(tmp_path.glob("bomb.*"))] + [f"{web}endless"]
    for process in [start_python(code, str(ASSETS.parent), source) for source in sources]:
        _, megabytes, message = answer(process).split(maxsplit=2)
        assert "limit of 10 s" in message or "limit of 10000000 bytes" in message
        assert int(megabytes) < 40, message


@pytest.fixture
def pools(monkeypatch):
    """`pools(seconds, ...)` replaces the pools of workers by some of one worker, and returns their workers."""

    def replace(*seconds: float) -> list[audio_decoding.DecodingWorker]:
        pools = [audio_decoding.WorkerPool(1, limit) for limit in seconds]
        monkeypatch.setattr(audio_decoding, "POOLS", pools)
        workers.extend(worker for pool in pools for worker in pool.free)
        return workers

    workers = []
    yield replace
    for worker in workers:
        if worker.process:
            worker.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_untrusted_bombs_are_limited_in_memory_and_time(name, pools, clip):
    """Whatever a file says: it is decoded or refused within the limits, and the next good file is decoded."""
    (worker,) = pools(2)
    good = RECORDINGS / "jfk.mp3"
    assert torch.equal(fetch_audio(good.read_bytes(), public_only=True), fetch_audio(good))
    pid = worker.process.pid
    usual = peak_memory(pid)
    bomb = BOMBS[name](clip)
    assert len(bomb) < 2**22
    start = time.monotonic()
    try:
        assert len(fetch_audio(bomb, max_seconds=600, public_only=True)) == 16_000
    except AudioError as error:
        assert re.search("limit of 600 s|limit of 2 s to decode|Cannot allocate memory|Unable to allocate", str(error))
    assert time.monotonic() - start < 3
    if worker.process.poll() is None:
        assert worker.process.pid == pid and peak_memory(pid) - usual < 70
    assert torch.equal(fetch_audio(good.read_bytes(), public_only=True), fetch_audio(good))


@pytest.mark.parametrize("name", BOMBS)
def test_untrusted_bombs_are_limited_where_recordings_are_streamed(name, pools, clip):
    pools(2)
    before, start, samples = peak_memory(), time.monotonic(), 0
    try:
        for part in stream_audio(BOMBS[name](clip), max_seconds=600, public_only=True):
            samples += len(part)
        assert samples == 16_000
    except AudioError as error:
        assert re.search("limit of 600 s|limit of 2 s to decode|Cannot allocate memory|Unable to allocate", str(error))
    assert time.monotonic() - start < 9 and peak_memory() - before < 70


def test_untrusted_recordings_are_streamed_as_trusted_ones(monkeypatch):
    """The process waits for the reader, and ends with it."""
    workers, start = [], audio_decoding.DecodingWorker.start

    def started(self):
        workers.append(self)
        start(self)

    monkeypatch.setattr(audio_decoding.DecodingWorker, "start", started)
    for path in sorted(RECORDINGS.iterdir()):
        stream = stream_audio(path.open("rb"), public_only=True)
        first = next(stream)
        time.sleep(0.05)
        assert torch.equal(torch.cat([first, *stream]), fetch_audio(path))
        assert find_duration(path, in_worker=True) == find_duration(path)
    stream = stream_audio(path.open("rb"), public_only=True)
    next(stream)
    stream.close()
    assert all(worker.process.poll() is not None for worker in workers) and len(workers) > 8


def test_headers_of_untrusted_recordings_cost_no_memory(tmp_path, clip, monkeypatch):
    monkeypatch.setattr(audio_decoding, "WORKER_SECONDS", 1)
    before = peak_memory()
    for name, bomb in BOMBS.items():
        path = tmp_path / name.replace(" ", "-")
        path.write_bytes(bomb(clip))
        find_duration(path, in_worker=True)
    assert peak_memory() - before < 40


@pytest.mark.parametrize("program", [None, "/bin/false", "/nowhere/python"])
def test_no_process_is_an_error_of_the_audio(program, monkeypatch):
    monkeypatch.setattr(sys, "executable", program)
    for open_audio in (lambda *given, **limits: list(stream_audio(*given, **limits)), fetch_audio):
        with pytest.raises(AudioError, match="The file cannot be decoded: the process that decodes it ended"):
            open_audio((RECORDINGS / "jfk.mp3").open("rb"), public_only=True)
    assert find_duration(RECORDINGS / "jfk.mp3", in_worker=True) is None


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """A second of speech."""
    return fetch_audio(RECORDINGS / "jfk.mp3")[:16_000].numpy()


@contextlib.contextmanager
def sending(content: bytes, count: int, timeout: float):
    """Sends a file so many times at once, and gives the futures. The block ends after all of them."""
    with ThreadPoolExecutor(count) as pool:
        yield [pool.submit(fetch_audio, content, public_only=True, timeout=timeout) for _ in range(count)]


@contextlib.contextmanager
def refused(message: str, within: float):
    """Expects an error of the audio within some seconds."""
    start = time.monotonic()
    with pytest.raises(AudioError, match=message):
        yield
    assert time.monotonic() - start < within


def test_a_short_clip_does_not_wait_for_long_ones(pools, clip):
    """The clip comes after two files each of which takes all of the 4 s that it has."""
    pools(0.25, 8)
    with sending(BOMBS["mp3 with many tags"](clip), 2, timeout=4) as slow:
        time.sleep(0.1)
        assert len(fetch_audio(encode(clip, "clip.mp3"), public_only=True)) == 16_000
        assert not all(future.done() for future in slow)


def test_long_recordings_have_more_time(pools, clip):
    """An hour of Opus takes longer than what a short clip may take."""
    pools(1e-4)
    with pytest.raises(AudioError, match="limit of 0.0001 s to decode"):
        fetch_audio(encode(clip, "opus.ogg"), public_only=True, max_seconds=600)
    audio_decoding.POOLS[0].share = audio_decoding.WORKER_SHARE
    assert len(fetch_audio(encode(clip, "opus.ogg"), public_only=True, max_seconds=600)) == len(clip)


def test_one_timeout_for_download_wait_and_decoding(pools, web, clip, monkeypatch):
    pools(8)
    monkeypatch.setattr(audio_download, "is_public", lambda address: True)
    slow = BOMBS["mp3 with many tags"](clip)
    with sending(slow, 1, timeout=2):
        time.sleep(0.1)
        with refused("every process that decodes files was busy until `timeout` ended", within=1.8):
            fetch_audio(f"{web}late-to=/clip.wav", public_only=True, timeout=1.4)  # it is downloaded after 1 s
    with refused("was not decoded before `timeout` ended", within=0.7):
        fetch_audio(slow, public_only=True, timeout=0.3)


def test_who_waits_the_longest_is_next(pools):
    """Eight threads that send file after file to one worker take turns."""
    pools(8)
    content, order = (RECORDINGS / "jfk.mp3").read_bytes()[:3000], []
    fetch_audio(content, public_only=True)  # the process starts

    def send(number: int):
        for _ in range(30):
            fetch_audio(content, public_only=True)
            order.append(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(8)))
    for number in range(8):
        places = np.flatnonzero(np.array(order) == number)
        assert np.diff(places).max() <= 16, order


def test_what_people_send_fits_into_the_memory(clip):
    """Eight channels in the longest frames, a song with a cover of 15 MB, and 200 MB of wav after a few."""
    cover = id3([(b"APIC", b"\x00image/png\x00\x03cover\x00" + bytes(15_000_000))])
    surround = [encode(clip, name, "7.1") for name in ("s24.flac", "aac.m4a", "f64.wav")]
    small = encode(clip, "s16.wav")
    place = small.index(b"data")
    large = small[:place] + b"JUNK" + (2 * 10**8).to_bytes(4, "little") + bytes(2 * 10**8) + small[place:]
    for content in (cover + encode(clip, "clip.mp3"), *surround, small, large, small):
        samples = fetch_audio(content, public_only=True)
        assert len(samples) >= 16_000 and torch.equal(samples, fetch_audio(content))


def test_a_worker_that_ends_at_its_start_is_an_error_of_the_audio(pools, monkeypatch):
    content, executable = (RECORDINGS / "jfk.mp3").read_bytes(), sys.executable
    pools(2)
    for program in ("/bin/false", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(AudioError, match="The content of .* bytes cannot be decoded: the process .* ended"):
            fetch_audio(content, public_only=True)
    monkeypatch.setattr(sys, "executable", executable)
    assert len(fetch_audio(content, public_only=True)) == 176_000


def test_a_worker_that_died_is_replaced(pools):
    (worker,) = pools(8)
    clip, limits = RECORDINGS / "jfk.mp3", (time.monotonic() + 60, 8)
    for _ in range(2):
        samples, rate = worker.decode(clip.open("rb"), "clip", 60, *limits)
        expected, expected_rate = audio_decoding.decode(clip.open("rb"), "clip")
        assert rate == expected_rate and np.array_equal(samples, expected)
        worker.process.kill()
        worker.process.wait()
    with Path(__file__).open("rb") as file, pytest.raises(AudioError, match="clip cannot be decoded"):
        worker.decode(file, "clip", 60, *limits)


def test_an_answer_that_ends_early_does_not_hold_up_the_next(pools, clip, monkeypatch, tmp_path):
    """A file whose rate changes midway is refused at once; what its decoder still sends must not meet the next file."""
    monkeypatch.setitem(ENCODINGS, "high.aac", ("aac", "adts", 44_100, "fltp"))
    (worker,), limits = pools(8), (time.monotonic() + 60, 8)
    changing = tmp_path / "changing.aac"
    changing.write_bytes(encode(clip, "high.aac") + encode(np.tile(clip, 220), "clip.aac"))
    for _ in range(2):
        with pytest.raises(AudioError, match="changes its sampling rate from 44100 to 22050 Hz midway"):
            worker.decode(changing.open("rb"), "clip", 600, *limits)
        samples, _ = worker.decode((RECORDINGS / "english.wav").open("rb"), "clip", 600, *limits)
        assert len(samples) > 10**5


def test_covers_are_not_decoded_in_the_own_process_either(clip):
    before = peak_memory()
    assert len(fetch_audio(BOMBS["mp3 with covers"](clip))) == 16_000
    with pytest.raises(AudioError, match="limit of 600 s"):
        fetch_audio(BOMBS["matroska with compressed blocks"](clip), max_seconds=600)
    assert peak_memory() - before < 500  # 600 s at 48 kHz are 115 MB


def test_a_header_that_lies_about_its_length():
    """It claims 2**31 samples, or all that 32 bits can say, and 16,000 follow."""
    header = (RECORDINGS / "jfk.wav").read_bytes()[:78]
    data = header.index(b"data")
    for claim in (2**31, 2**32 - 2):
        lying = header[: data + 4] + claim.to_bytes(4, "little") + bytes(32_000)
        assert len(fetch_audio(lying)) == 16_000


@pytest.fixture
def web():
    with serve_by_path() as address:
        yield address


@pytest.mark.long
def test_broken_files_are_decoded_or_refused():
    """3,000 seeded mutations in processes of their own, so that a crash of the interpreter is seen as one."""
    script = Path(__file__).with_name("fuzz.py")
    runs = [
        subprocess.Popen([sys.executable, script, "1500", "--seed", seed], stdout=subprocess.PIPE, text=True)
        for seed in "01"
    ]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
        count = {name: float(value) for name, value in re.findall(r"([a-z]+)=([0-9.]+)", output)}
        assert count["decoded"] > 200 and count["refused"] > 200 and count["decoded"] + count["refused"] == 1500
        assert count["seconds"] < 5 and count["megabytes"] < 70


def test_downloads(web):
    """urllib would read the content of a redirect to its end, whatever its size, before it follows."""
    expected, before = fetch_audio(RECORDINGS / "english.wav"), peak_memory()
    for path in ("clip.wav", "chunked", f"to={web}clip.wav", "to=/to%3D/chunked", "endless-redirect"):
        assert torch.equal(fetch_audio(web + path, timeout=5), expected), path
    assert peak_memory() - before < 50


def test_an_address_that_does_not_answer_leaves_time_for_the_next(web, monkeypatch):
    """A name with two addresses, the first of which drops all connections because its queue is full."""
    port = urllib.parse.urlsplit(web).port
    look_up = socket.getaddrinfo

    def resolve(host, *arguments, **settings):
        hosts = ["127.0.0.2", "127.0.0.1"] if host == "two.example" else [host]
        return [answer for host in hosts for answer in look_up(host, *arguments, **settings)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.2", port), backlog=0), contextlib.ExitStack() as fillers:
        for _ in range(3):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", port))
        samples = fetch_audio(f"http://two.example:{port}/clip.wav", timeout=1.5)
    assert torch.equal(samples, fetch_audio(RECORDINGS / "english.wav"))


@pytest.mark.parametrize("limits", [{}, {"public_only": True}])
def test_secure_downloads(limits, monkeypatch, tmp_path):
    """Certificates are checked, also where the address is, and a server that never speaks costs no more than time."""
    authority = trustme.CA()
    monkeypatch.setattr(audio_download, "is_public", lambda address: True)
    with (
        serve_by_path() as plain,
        serve_by_path(authority.issue_cert("127.0.0.1")) as web,
        serve_by_path(authority.issue_cert("elsewhere.example")) as other,
    ):
        with pytest.raises(AudioError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch_audio(f"{web}clip.wav", **limits)
        authority.cert_pem.write_to_path(tmp_path / "authority.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        for path in ("clip.wav", "chunked", f"to={web}clip.wav", f"to={plain}clip.wav"):
            assert torch.equal(fetch_audio(web + path, **limits), fetch_audio(RECORDINGS / "english.wav"))
        with pytest.raises(AudioError, match="mismatch"):
            fetch_audio(f"{web}to={other}clip.wav", **limits)
        for path in ("slow", "slow-header"):
            with refused("took longer than the limit of 1 s", within=4):
                fetch_audio(web + path, timeout=1, **limits)


@pytest.mark.parametrize(
    "path, limits, message",
    [
        ("missing", {}, "cannot be read: HTTP Error 404"),
        ("short", {}, "ended 1000 bytes early|IncompleteRead"),
        ("partial", {}, "answered with HTTP status 206 instead of 200"),
        ("clip.wav", {"max_bytes": 1000}, "larger than the limit of 1000 bytes"),
        ("loop", {}, "infinite loop"),
        ("to=file:///etc/hostname", {}, "file:///etc/hostname. is not allowed"),
        ("to=ftp://127.0.0.1/clip.wav", {}, "which is not an http"),
    ],
)
def test_downloads_have_limits(path, limits, message, web):
    with refused(message, within=4):
        fetch_audio(web + path, **limits)


@pytest.mark.parametrize("limits", [{}, {"public_only": True}])
def test_one_deadline_for_redirects_and_handshakes(limits, web, monkeypatch):
    """A slow redirect, to a server that accepts connections and sends its TLS handshake a byte at a time."""
    monkeypatch.setattr(audio_download, "is_public", lambda address: True)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                connection.sendall(b"\x16\x03\x03\x40\x00")  # a handshake record of 16 KB
                while True:
                    connection.sendall(bytes(1))
                    time.sleep(0.1)

        thread = threading.Thread(target=drip)
        thread.start()
        with refused("took longer than the limit of 1.5 s", within=2):
            fetch_audio(f"{web}late-to=https://127.0.0.1:{server.getsockname()[1]}/", timeout=1.5, **limits)
        thread.join()


def test_a_server_opens_public_addresses_only(web, monkeypatch):
    """Other addresses are refused by number, by name, in every spelling and after a redirect."""
    port = urllib.parse.urlsplit(web).port
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1", "[::ffff:127.0.0.1]", "10.0.0.1"):
        for scheme in ("http", "https"):
            with pytest.raises(AudioError, match="an address that is not public|cannot be read"):
                fetch_audio(f"{scheme}://{host}:{port}/clip.wav", public_only=True, timeout=5)
    for source in (str(RECORDINGS / "jfk.wav"), RECORDINGS / "jfk.wav", (RECORDINGS / "jfk.wav").as_uri()):
        with pytest.raises(AudioError, match="local files are not opened here"):
            fetch_audio(source, public_only=True)

    # A public server that redirects to this machine, as the resolver and the check see it.
    checked = []

    def first_is_public(address):
        checked.append(str(address))
        return len(checked) == 1

    monkeypatch.setattr(audio_download, "is_public", first_is_public)
    with pytest.raises(AudioError, match="'localhost' resolves to an address that is not public"):
        fetch_audio(f"{web}to=http://localhost:{port}/clip.wav", public_only=True)
    assert checked[0] == "127.0.0.1"


# Loopback, private, link-local, shared and multicast addresses, and those of a cloud.
IPV4 = ("127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "233.252.0.1")
IPV4 += ("192.0.0.192", "168.63.129.16")
IPV6 = ("::", "::1", "fe80::1", "fd00::1", "fec0::1", "2001:db8::1", "ff02::1", "ff05::2", "ff0e::1", "ff3e::1")


def addresses_with(address: str) -> list[str]:
    """An IPv4 address, and all IPv6 addresses that carry it."""
    high, low = divmod(int(ipaddress.ip_address(address)), 2**16)
    number, inverted = f"{high:x}:{low:x}", f"{high ^ 0xFFFF:x}:{low ^ 0xFFFF:x}"
    mapped, compatible, translated = f"::ffff:{number}", f"::{number}", f"::ffff:0:{number}"
    nat64, local_nat64 = f"64:ff9b::{number}", f"64:ff9b:1::{number}"
    six_to_four, teredo = f"2002:{number}::1", f"2001:0:808:808:0:0:{inverted}"
    teredo_server = f"2001:0:{number}:0:0:f7f7:f7f7"
    return [address, mapped, compatible, translated, nat64, local_nat64, six_to_four, teredo, teredo_server]


def test_public_addresses():
    public = ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8"]
    others = [*IPV6, *(form for address in IPV4 for form in addresses_with(address))]
    assert [address for address in public + others if audio_download.is_public(ipaddress.ip_address(address))] == public


def test_base64_in_lines_and_addresses_that_are_not_quoted(web):
    """`base64` without -w0 writes lines; people copy addresses with spaces from browsers."""
    content = (RECORDINGS / "english.wav").read_bytes()
    expected = fetch_audio(content)
    for source in (
        f"data:audio/wav;base64,{base64.encodebytes(content).decode()}",
        base64.encodebytes(content).decode(),
    ):
        assert torch.equal(fetch_audio(source), expected)
    assert torch.equal(fetch_audio(f"{web}my clip é.wav"), expected)
