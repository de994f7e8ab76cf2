"""Pickled messages over a socket, as frames: 8 bytes of length, then the message."""

from __future__ import annotations

import pickle
import select
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

LENGTH = 8  # bytes of a frame that hold its length
CHUNK = 2**20  # bytes that are read at a time


def frame(message: Any) -> bytes:
    text = pickle.dumps(message, protocol=5)
    return len(text).to_bytes(LENGTH, "little") + text


def length(head: bytes | bytearray) -> int:
    return int.from_bytes(head, "little")


def loads(text: bytes | bytearray) -> Any:
    return pickle.loads(text)


def messages(connection: socket.socket) -> Iterator[Any]:
    """Wait for whole frames and yield what they hold, until the other side closes, or ends."""
    with suppress(OSError):
        while (head := _exactly(connection, LENGTH)) and (text := _exactly(connection, length(head))):
            yield pickle.loads(text)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    """Return the next `size` bytes, none if the end comes before.

    The kernel waits for all of them: each time that it returned earlier, the lock would have to be won again,
    from a process that is busy.
    """
    received = bytearray(size)
    rest = memoryview(received)
    while rest and (count := connection.recv_into(rest, 0, socket.MSG_WAITALL)):
        rest = rest[count:]
    return bytearray() if rest else received


class Channel:
    """One end of a connection whose other end may stand still at any byte: nothing here blocks.

    What the other end does not take yet is kept, and leaves in `wait`. `has_ended` is true once the other end
    has closed, however that was, and everything it sent has been received.
    """

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self.socket = connection
        self.unsent = bytearray()
        self.received = bytearray()  # of the frame that is not whole yet
        self.has_ended = False

    def send(self, message: Any) -> None:
        self.unsent += frame(message)
        self.flush()

    def flush(self) -> None:
        """Send what the other end takes now. One that has ended is noticed by `receive`."""
        with suppress(OSError):  # BlockingIOError, too
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]

    def receive(self) -> list[Any]:
        """Return the messages that have come whole since the last call."""
        try:
            while chunk := self.socket.recv(CHUNK):
                self.received += chunk
            self.has_ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.has_ended = True
        found = []
        while len(self.received) >= LENGTH:
            end = LENGTH + length(self.received[:LENGTH])
            if len(self.received) < end:
                break
            found.append(pickle.loads(self.received[LENGTH:end]))
            del self.received[:end]
        return found

    def close(self) -> None:
        self.socket.close()


def wait(channels: Iterable[Channel], seconds: float) -> list[Channel]:
    """Wait until one has something to receive, or has ended. Return which; send meanwhile what is unsent."""
    poll = select.poll()
    by_number = {channel.socket.fileno(): channel for channel in channels}
    for number, channel in by_number.items():
        poll.register(number, select.POLLIN | (select.POLLOUT if channel.unsent else 0))
    ready = []
    for number, events in poll.poll(1000 * seconds):
        if events & select.POLLOUT:
            by_number[number].flush()
        if events & ~select.POLLOUT:
            ready.append(by_number[number])
    return ready
