"""A limit on the time that a compile may take."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Iterator


class CompileTimeout(RuntimeError):
    """The compile took longer than it may."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises CompileTimeout in the calling thread once `seconds` are over, and kills the
    processes that the thread has started. 0: no limit.
    """
    if seconds <= 0:
        yield
        return
    thread, task = threading.get_ident(), threading.get_native_id()
    lock, done = threading.Lock(), threading.Event()
    expired = False

    def raise_in_thread(exception: type[Exception] | None) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(exception) if exception else None
        )

    def stop() -> None:
        nonlocal expired
        with lock:
            if done.is_set():
                return
            expired = True
            raise_in_thread(CompileTimeout)
        # It may be waiting for a child, where no exception reaches it.
        while not done.wait(0.1):
            _kill_children(task)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except BaseException as error:
        if expired and not isinstance(error, SystemExit):
            raise CompileTimeout(
                f"it took longer than {seconds:g} s, the limit that REPRISE_COMPILE_SECONDS sets"
            ) from None
        raise
    finally:
        with lock:
            done.set()
            if expired:
                raise_in_thread(None)
        timer.cancel()


def _kill_children(task: int) -> None:
    """Those that the thread has started, and theirs. The host's own stay alone."""
    found = _children(f"/proc/self/task/{task}")
    for process in found:
        found += _children(f"/proc/{process}/task/{process}")
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _children(task_folder: str) -> list[int]:
    try:
        with open(f"{task_folder}/children", encoding="ascii") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []
