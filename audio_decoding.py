"""
An audio or video file -> float32 samples, by PyAV, whose wheel carries FFmpeg. Untrusted files are decoded by this file
run as a process of its own, so it imports no more than it needs.
"""

import collections
import concurrent.futures
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from tempfile import TemporaryFile

import av
import numpy as np


try:
    import resource
except ImportError:  # Windows, where untrusted files are decoded in the process itself
    resource = None

MAX_SECONDS = 3600.0  # limit of decoded audio; the positions of the model end after about ten minutes
FULL_RATE = 48_000  # Hz; at a higher rate `max_seconds` is proportionally shorter, because it also limits memory
FULL_SCALE = {"u1": (128, 2**7), "i2": (0, 2**15), "i4": (0, 2**31)}  # zero and full scale of integer samples
LEAST_GAP = 0.1  # seconds between the end of a frame and the timestamp of the next
FRAME_BATCH = 2**16  # samples converted at a time
QUICK_SECONDS = 0.5  # for the first try of an untrusted file, so that short ones do not wait for long ones
WORKER_SECONDS = 8  # for the second try, at least
WORKER_SHARE = 0.01  # of what the audio may last, for the second try; an hour of Opus takes 11 s of a slow core
LONGEST_STREAM = 86_400  # seconds of a stream without a limit of length, for the time to decode it
START_SECONDS = 60  # for a process to start; a program that Python is built into would not start one
CHECK_SECONDS = 5.0  # between two looks whether a process that sends nothing still runs
BATCH_SECONDS = 86_400  # for a file of a batch, which is trusted
AT_ONCE = 8  # files of a batch that are decoded at a time, each in a thread and perhaps in a process
LONG_FRAMES = (b"RIFF", b"fLaC")  # these files need no process: in threads as many are decoded
WORKER_MEMORY = 2**26  # bytes for an untrusted file of any size; an hour of audio in any container needs half of that
DEMUXER = {
    # FFmpeg's names of audio and video containers. Playlists are left out: with them FFmpeg would open other addresses.
    "format_whitelist": "wav,w64,aiff,au,caf,flac,mp3,aac,ogg,mov,mp4,matroska,webm,asf,avi,amr,mpegts,mpeg",
    # FFmpeg probes PCM in a wav for other codecs. Probing one packet only opens such files thirty times faster.
    "max_probe_packets": "1",
    "max_size": str(2**15),  # bytes of wav in a frame, where FFmpeg's own choice is many small frames
}


class AudioError(ValueError):
    """Audio that cannot be opened, decoded or trusted. The message names the source (shortened) and the reason."""


@functools.cache
def audio_codecs() -> str:
    """Returns FFmpeg's audio decoders for its `codec_whitelist`, so that it decodes no pictures, such as covers."""
    codecs = []
    for name in sorted(av.codecs_available):
        with contextlib.suppress(ValueError):  # this codec has no decoder
            codecs += [name] if av.Codec(name, "r").type == "audio" else []
    return ",".join(codecs)


def decode(file, name: str, max_seconds: float = MAX_SECONDS) -> tuple[np.ndarray, int]:
    """
    Decodes the first audio track of a binary file object, and closes it.

    Args:
        name: What messages call the source.
        max_seconds (`float`, defaults to 3600): Limit of the audio; for rates above 48 kHz proportionally less.

    Returns:
        float32 `[samples]` mono in [-1, 1] or a little beyond, and the sampling rate in Hz.

    Raises:
        AudioError: if there is no audio, if it cannot be decoded, or if it lasts longer.
    """
    return join_pieces(decode_pieces(file, name, max_seconds), name)


def join_pieces(pieces: Iterator[tuple[int, np.ndarray]], name: str) -> tuple[np.ndarray, int]:
    joined, rates = bytearray(), set()
    for rate, samples in of_one_rate(pieces, name):
        rates.add(rate)
        joined += samples.data
    if not joined:
        raise AudioError(f"{name} holds no samples.")
    return np.frombuffer(joined, np.float32), rates.pop()


def of_one_rate(pieces: Iterator[tuple[int, np.ndarray]], name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the pieces of a file; raises AudioError where the sampling rate changes."""
    first_rate = None
    for rate, samples in pieces:
        if first_rate not in (None, rate):
            raise AudioError(f"{name} changes its sampling rate from {first_rate} to {rate} Hz midway.")
        first_rate = rate
        yield rate, samples


def decode_pieces(file, name: str, max_seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the rate and the samples of a second or so at a time."""
    options = {**DEMUXER, "codec_whitelist": audio_codecs()}
    try:
        with file, av.open(file, metadata_errors="ignore", options=options) as container:
            if not container.streams.audio:
                raise AudioError(f"{name} has no audio track.")
            frames = fill_gaps(container.decode(container.streams.audio[0]), container)
            frames = limit_length(frames, name, max_seconds)
            layouts = itertools.groupby(frames, lambda f: (f.sample_rate, f.format.name, f.layout.nb_channels))
            for (rate, format, channels), alike in layouts:
                if channels > 7:
                    # PyAV 18 reads past the end of a frame's table of 8 planes and crashes, unless the frame is packed.
                    packer = av.AudioResampler(format=av.AudioFormat(format).packed)
                    alike = (piece for frame in alike for piece in packer.resample(frame))
                    format = packer.format.name
                for frame in join_frames(alike):
                    samples = frame.to_ndarray()  # [channels, samples], or [1, samples * channels] if packed
                    samples = samples if av.AudioFormat(format).is_planar else samples.reshape(-1, channels).T
                    yield rate, mix_down(samples, name)
    except AudioError:
        raise
    except Exception as error:  # besides FFmpeg's errors, hostile files cause IndexError and others in PyAV
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise AudioError(f"{name} cannot be decoded: {reason}") from error


def header_duration(file) -> float | None:
    """Returns the seconds that the header of a binary file object names, None where it names none."""
    with file, av.open(file, metadata_errors="ignore", options=DEMUXER) as container:
        audio, begin = container.streams.audio[0], (container.start_time or 0) / av.time_base
        if audio.duration:  # pictures may go on for longer
            return float(((audio.start_time or 0) + audio.duration) * audio.time_base) - begin
        return container.duration / av.time_base


def fill_gaps(frames: Iterator[av.AudioFrame], container) -> Iterator[av.AudioFrame]:
    """
    Yields the frames, and silence where their timestamps leave a gap, such as before the audio of a video that begins
    later: what follows keeps its place in time. Gaps that would end after the file's own duration are not believed.
    """
    begin, length = ((value or 0) / av.time_base for value in (container.start_time, container.duration))
    position = 0.0
    for frame in frames:
        place = position if frame.time is None else frame.time - begin
        if place - position > LEAST_GAP and place <= length:
            missing = round((place - position) * frame.sample_rate)
            for start in range(0, missing, frame.sample_rate):  # a second at a time
                yield make_silence(frame, min(frame.sample_rate, missing - start))
            position = place
        yield frame
        position += frame.samples / frame.sample_rate


def make_silence(frame: av.AudioFrame, num_samples: int) -> av.AudioFrame:
    """Returns a frame of silence of the kind of another frame."""
    like = frame.to_ndarray()
    zero, _ = FULL_SCALE.get(like.dtype.str[1:], (0, 1))
    width = num_samples if frame.format.is_planar else num_samples * frame.layout.nb_channels
    silence = av.AudioFrame.from_ndarray(np.full((len(like), width), zero, like.dtype), frame.format.name, frame.layout)
    silence.sample_rate = frame.sample_rate
    return silence


def limit_length(frames: Iterator[av.AudioFrame], name: str, max_seconds: float) -> Iterator[av.AudioFrame]:
    """Yields the frames; raises AudioError past the limit. Every frame is counted, since a file sets their length."""
    num_samples = 0
    for frame in frames:
        num_samples += frame.samples
        if num_samples > max_seconds * min(frame.sample_rate, FULL_RATE):
            is_high = frame.sample_rate > FULL_RATE
            reason = f", which is for {FULL_RATE} Hz; it has {frame.sample_rate}" if is_high else ""
            raise AudioError(f"{name} lasts longer than the limit of {max_seconds:g} s{reason}.")
        yield frame


def join_frames(frames: Iterator[av.AudioFrame]) -> Iterator[av.AudioFrame]:
    """Yields one frame in place of many short ones, because every call of numpy costs time and holds Python's lock."""
    queue = av.AudioFifo()
    for frame in frames:
        frame.pts = None  # the queue refuses gaps, which are filled before
        queue.write(frame)
        if queue.samples >= FRAME_BATCH:
            yield queue.read()
    if rest := queue.read():
        yield rest


def mix_down(samples: np.ndarray, name: str) -> np.ndarray:
    """`[channels, samples]` of any format -> float32 `[samples]`: integers in [-1, 1), the mean of the channels."""
    code = samples.dtype.str[1:]
    if samples.dtype.kind != "f" and code not in FULL_SCALE:
        raise AudioError(f"{name} has samples of type {samples.dtype}; expected float, int16, int32 or uint8.")
    zero, scale = FULL_SCALE.get(code, (0, 1))
    with np.errstate(all="ignore"):  # `fetch_audio` refuses what is not finite
        total = samples[0].astype(np.float32)
        for channel in samples[1:]:  # numpy's mean of samples that alternate is twenty times slower
            total += channel.astype(np.float32)
        return (total - np.float32(zero * len(samples))) / np.float32(scale * len(samples))


class DecodingWorker:
    """
    Decodes untrusted files in a process whose memory and time are limited: a file of a few kilobytes can make FFmpeg
    allocate gigabytes or compute for minutes. It starts with the first file, and is replaced when it had to be killed.
    """

    process = connection = None
    is_idle = True

    def decode(self, file, name: str, max_seconds: float, deadline: float, seconds: float) -> tuple[np.ndarray, int]:
        """
        Does what [`decode`] does, in at most `seconds` after the process has started, and before `deadline`, a time of
        `time.monotonic`. The process reads the file by its descriptor, so that its content needs no memory there.

        Raises:
            AudioError: also if decoding needs more memory than the limit, or if the process ends.
            TimeoutError: at the deadline or after `seconds`.
        """
        try:
            self.ask(file, name, max_seconds, min(deadline, time.monotonic() + START_SECONDS))
            return join_pieces(self.receive_pieces(min(deadline, time.monotonic() + seconds)), name)
        except TimeoutError:
            raise
        except (EOFError, OSError) as error:
            raise AudioError(f"{name} cannot be decoded: the process that decodes it ended.") from error
        finally:
            if not self.is_idle:  # it is dead, out of time, or still sends an answer that nobody waits for
                self.stop()

    def stream(self, file, name: str, max_seconds: float, seconds: float) -> Iterator[tuple[int, np.ndarray]]:
        """
        Yields what [`decode_pieces`] yields, and stops the process at the end. It may compute for `seconds`; what it
        waits for its reader does not count, as a pipe holds no more than the next samples.

        Raises:
            AudioError: as [`decode`], also after `seconds`.
        """
        try:
            self.ask(file, name, max_seconds, time.monotonic() + START_SECONDS, seconds)
            for rate, samples in self.receive_pieces(math.inf):
                yield rate, samples.copy()  # torch warns of arrays that are read-only
        except (EOFError, OSError) as error:
            reason = "cannot be decoded: the process that decodes it ended"
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self.process and self.process.wait(1) == -signal.SIGKILL:
                    reason = f"takes longer than the limit of {seconds:g} s to decode, or there is no memory left"
            raise AudioError(f"{name} {reason}.") from error
        finally:
            self.stop()

    def ask(self, file, name: str, max_seconds: float | None, deadline: float, seconds: float | None = None):
        """Sends the process a file, see [`serve`]. It has to start before the deadline."""
        if self.process is None or self.process.poll() is not None:
            self.start()
            self.receive(deadline)  # it is ready
        self.is_idle = False
        self.connection.send((name, max_seconds, seconds))
        send_handle(self.connection, file.fileno(), self.process.pid)

    def receive(self, deadline: float) -> bytes:
        # A process that another thread forked meanwhile may hold the other end open, so that it has no end.
        while not self.connection.poll(max(0.0, min(CHECK_SECONDS, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimeoutError
            if self.process.poll() is not None and not self.connection.poll(0):
                raise EOFError
        return self.connection.recv_bytes()

    def receive_pieces(self, deadline: float) -> Iterator[tuple[int, np.ndarray]]:
        while message := self.receive(deadline):
            rate = int.from_bytes(message[:4], "little")
            if not rate:
                self.is_idle = True
                raise AudioError(message[4:].decode())
            yield rate, np.frombuffer(message, np.float32, offset=4)
        self.is_idle = True

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()

    def start(self):
        if not sys.executable:  # a program that Python is built into
            raise OSError("sys.executable does not name the program that runs this file")
        self.connection, worker_end = multiprocessing.Pipe()
        with worker_end:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(worker_end.fileno())],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for this process
            )
        self.is_idle = False


class WorkerPool:
    """
    Workers that take files in the order in which they came. They spend at most `seconds` on each, or `share` of the
    time that its audio may last, if that is more.
    """

    def __init__(self, num_workers: int, seconds: float, share: float = 0.0):
        self.free, self.seconds, self.share = [DecodingWorker() for _ in range(num_workers)], seconds, share
        self.turns, self.lock = collections.deque(), threading.Lock()

    def decode(self, file, name: str, max_seconds: float, deadline: float) -> tuple[np.ndarray, int]:
        """See [`DecodingWorker.decode`]."""
        turn = concurrent.futures.Future()
        try:
            self.turns.append(turn)
            self.give_turns()
            worker = turn.result(max(0.0, deadline - time.monotonic()))
            return worker.decode(file, name, max_seconds, deadline, self.limit(max_seconds))
        except concurrent.futures.TimeoutError:
            if turn.cancel():
                reason = "every process that decodes files was busy until `timeout` ended. Try again later."
                raise AudioError(f"{name} cannot be decoded: {reason}") from None
            raise
        finally:
            if not turn.cancel():  # also where Ctrl-C came before the worker
                self.free.append(turn.result())
                self.give_turns()

    def limit(self, max_seconds: float) -> float:
        return max(self.seconds, self.share * max_seconds)

    def give_turns(self):
        """Gives free workers to the calls that wait the longest. In a plain queue later calls could overtake."""
        with self.lock:
            while self.turns and self.free:
                turn = self.turns.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(self.free.pop())


def make_pools():
    """
    Makes the pools of processes, which start with their first file. A file that takes too long for the first of `POOLS`
    is decoded again by the second. So a short clip waits half a second, and the start of a process, for every four long
    files that came before it.
    """
    global POOLS, BATCHES
    POOLS = WorkerPool(4, QUICK_SECONDS), WorkerPool(2, WORKER_SECONDS, WORKER_SHARE)
    BATCHES = WorkerPool(AT_ONCE, BATCH_SECONDS)


make_pools()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=make_pools)  # the processes belong to the parent


def decode_in_worker(file, name: str, max_seconds: float, deadline: float) -> tuple[np.ndarray, int]:
    """Decodes an untrusted file as [`decode`] does, by the next free worker. Also raises AudioError at the deadline."""
    if resource is None:
        return decode(file, name, max_seconds)
    with give_descriptor(file, name) as file:
        for pool in POOLS:
            with contextlib.suppress(TimeoutError):
                return pool.decode(file, name, max_seconds, deadline)
            if time.monotonic() >= deadline:
                raise AudioError(f"{name} was not decoded before `timeout` ended, which counts its download as well.")
    raise AudioError(f"{name} takes longer than the limit of {pool.limit(max_seconds):g} s to decode.")


def stream_in_worker(file, name: str, max_seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """Yields what [`decode_pieces`] yields for an untrusted file, from a process of its own. Closes the file."""
    if resource is None:
        yield from decode_pieces(file, name, max_seconds)
        return
    with give_descriptor(file, name) as file:
        seconds = POOLS[-1].limit(min(max_seconds, LONGEST_STREAM))
        yield from DecodingWorker().stream(file, name, max_seconds, seconds)


def header_duration_in_worker(file) -> float | None:
    """Does for an untrusted file what [`header_duration`] does, in a process of its own."""
    if resource is None:
        return header_duration(file)
    worker, deadline = DecodingWorker(), time.monotonic() + START_SECONDS
    with give_descriptor(file, "The file") as file:
        try:
            worker.ask(file, "", None, deadline, WORKER_SECONDS)
            return json.loads(worker.receive(deadline))
        finally:
            worker.stop()


def decode_in_batch(file, name: str, max_seconds: float) -> tuple[np.ndarray, int]:
    """
    Does what [`decode`] does, by the next free process: of files with short frames, such as MP3, threads decode no more
    than one thread, because they wait for Python's lock. What the process cannot decode, such as a file that needs more
    memory than an untrusted one may, is decoded here.
    """
    if resource is not None and sys.executable and not is_child():
        with contextlib.suppress(AudioError, TimeoutError, OSError):
            begin = file.read(4)
            file.seek(0)
            if begin not in LONG_FRAMES:
                file = give_descriptor(file, name)
                decoded = BATCHES.decode(file, name, max_seconds, time.monotonic() + BATCH_SECONDS)
                file.close()
                return decoded
        with contextlib.suppress(OSError):
            # The process moved the place in the file, which a seek to 0 does not notice while that is in the buffer.
            file.seek(0, os.SEEK_END)
            file.seek(0)
    return decode(file, name, max_seconds)


def is_child() -> bool:
    """Whether this process is one of several that decode, such as a DataLoader's or of the `map` of `datasets`."""
    modules = (sys.modules.get(name) for name in ("multiprocessing", "multiprocess"))
    return any(module.parent_process() is not None for module in modules if module)


def give_descriptor(file, name: str):
    """
    Returns the file, or a copy without a name, on Linux in memory, because a process reads it by its descriptor. Closes
    what it copied, so that its memory is free while the other process decodes. Raises an AudioError if that fails.
    """
    if not isinstance(file, io.BytesIO):
        return file
    try:
        with contextlib.ExitStack() as closed_after_errors:
            if hasattr(os, "memfd_create"):
                copy = closed_after_errors.enter_context(open(os.memfd_create("audio"), "w+b"))
            else:
                copy = closed_after_errors.enter_context(TemporaryFile())
            shutil.copyfileobj(file, copy)
            copy.flush()
            closed_after_errors.pop_all()
    except OSError as error:
        raise AudioError(f"{name} cannot be decoded: {error}") from error
    file.close()
    return copy


def serve(connection: Connection):
    """
    Runs in the process of a [`DecodingWorker`]. For each file it sends messages of 4 bytes of rate and float32 samples,
    then an empty one; an error is a rate of 0 and its text. The process never holds all samples of a file. For a file
    without a limit of its length it sends what [`header_duration`] returns, as JSON, and nothing else. `seconds` limits
    for how long the process may compute, for a file that is its last.
    """
    pages = Path("/proc/self/statm")  # Linux; other systems limit the time alone
    if pages.exists():
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        limit = int(pages.read_text().split()[0]) * resource.getpagesize() + WORKER_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard_limit < 0 else min(limit, hard_limit), hard_limit))
    connection.send_bytes(b"ready")
    while True:
        name, max_seconds, seconds = connection.recv()
        if seconds is not None:
            limit, (_, hard_limit) = math.ceil(time.process_time() + seconds), resource.getrlimit(resource.RLIMIT_CPU)
            limit = limit if hard_limit < 0 else min(limit, hard_limit)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        with open(recv_handle(connection), "rb") as file:
            file.seek(0)
            try:
                if max_seconds is None:
                    found = None
                    with contextlib.suppress(Exception):  # it would stand in the log of the server
                        found = header_duration(file)
                    connection.send_bytes(json.dumps(found).encode())
                    continue
                for rate, samples in decode_pieces(file, name, max_seconds):
                    connection.send_bytes(rate.to_bytes(4, "little") + samples.tobytes())
                connection.send_bytes(b"")
            except AudioError as error:
                connection.send_bytes(bytes(4) + str(error).encode())
            except MemoryError:  # there is no memory left to send a long piece
                connection.send_bytes(bytes(4) + f"{name} needs more memory to decode than the limit.".encode())


if __name__ == "__main__":
    with contextlib.suppress(EOFError, OSError):  # the other process has ended
        serve(Connection(int(sys.argv[1])))
