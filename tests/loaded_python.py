"""`python SCRIPT ...` and `python -c CODE ...` in processes that have torch, transformers and overspill loaded from their beginning.

Loading takes four seconds of a core, more than most of what tests run that way. So one process of each worker of the suite loads, and
forks for each call. Rules:

1. Beside what was loaded, a process is like one that was started: arguments, environment, working directory, module path, standard
   files, session and signals are those that were asked for, no other file is open, no module of a benchmark is imported, and it ends
   with what was registered for its end.
2. What it starts itself by `subprocess` in this interpreter is forked in the same way.
3. Variables that libraries read while they load (OMP_NUM_THREADS) are those of the worker. What claims something of loading, or of a
   process being another one from its first instruction, is started, and not forked.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

MOST_BYTES = 1 << 20
"""Of a request: arguments and environment."""


# -- a worker of the suite ---------------------------------------------------------------------------------------------


def run_loaded(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of this interpreter with `arguments`, whose output is text and captured."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = StartedLoaded(arguments, output, errors, env=env, cwd=cwd)
        try:
            status = started.wait(timeout)
        except BaseException:
            os.kill(started.pid, signal.SIGKILL)
            started.wait()
            raise
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(started.command, status, output.read(), errors.read())


class StartedLoaded:
    """One such process, started and not yet waited for; one at a time.

    Args:
        output, errors: files that its output goes to.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        output: IO[str],
        errors: IO[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command, self._server = [sys.executable, *map(str, arguments)], _server()
        request = {"arguments": self.command, "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd())}
        message = json.dumps(request).encode()
        assert len(message) < MOST_BYTES
        with open(os.devnull) as nothing:
            socket.send_fds(self._server, [message], [nothing.fileno(), output.fileno(), errors.fileno()])
        self.pid = int(self._server.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, a signal's number negative.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if not select.select([self._server], [], [], timeout)[0]:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.command, timeout)
        return int(self._server.recv(64))


@functools.cache
def _server() -> socket.socket:
    """Of this process; it ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], env=environment, pass_fds=(theirs.fileno(),))
    theirs.close()
    return ours


# -- the process that has loaded ---------------------------------------------------------------------------------------


def serve(number: int) -> None:
    """Requests one after the other: the process of each is told, and how it ended."""
    import torch  # noqa: F401
    import transformers

    import overspill

    _ = overspill.Session, overspill.resume
    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast
    sys.path.pop(0)  # of this file
    gc.collect()
    gc.freeze()  # what is loaded is no garbage, and its pages stay shared
    fork = Fork()
    subprocess._fork_exec = fork.start  # type: ignore[attr-defined]
    with socket.socket(fileno=number) as server:
        while True:
            message, files, _, _ = socket.recv_fds(server, MOST_BYTES, 3)
            if not message:
                break
            request = json.loads(message)
            child = os.fork()
            if child == 0:
                fork.become(request["arguments"][1:], request["env"], request["cwd"], files, ())
            server.send(b"%d" % child)
            for file in files:
                os.close(file)
            server.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


class Fork:
    """Processes that begin as this one is now."""

    def __init__(self) -> None:
        self.modules, self.path, self.exec = set(sys.modules), list(sys.path), subprocess._fork_exec  # type: ignore[attr-defined]

    def start(self, command: Sequence[Any], executables: Sequence[bytes], close_fds: bool, pass_fds: Collection[int], *more: Any) -> int:
        """What `subprocess` calls in C to fork and exec (the first sixteen of its arguments are the same from Python 3.8 on)."""
        cwd, environment, *pipes, _, errpipe, _, is_session = more[:12]
        arguments = [os.fsdecode(argument) for argument in command]
        is_python = arguments[0] == sys.executable and (arguments[1] == "-c" or not arguments[1].startswith("-"))
        if not is_python or not close_fds:
            return int(self.exec(command, executables, close_fds, pass_fds, *more))
        child = os.fork()
        if child:
            return child
        files = [(pipes[0], 0), (pipes[3], 1), (pipes[5], 2)]
        found = dict(item.split("=", 1) for item in map(os.fsdecode, environment)) if environment is not None else dict(os.environ)
        kept = set(pass_fds) - {errpipe}
        self.become(arguments[1:], found, os.fsdecode(cwd or "."), [own if own >= 0 else std for own, std in files], kept, is_session)

    def become(
        self, arguments: list[str], environment: dict[str, str], cwd: str, files: list[int], kept: Collection[int], is_session: bool = False
    ) -> NoReturn:
        """Rule 1."""
        status = 1
        try:
            if is_session:
                os.setsid()
            for place, file in enumerate([fcntl.fcntl(file, fcntl.F_DUPFD, 1000) for file in files]):
                os.dup2(file, place)
            begin = 3
            for file in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
                os.closerange(begin, file)
                begin = file + 1
            for number in signal.valid_signals() - {signal.SIGINT}:
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            atexit._clear()
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]
            weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
            for name in set(sys.modules) - self.modules:
                del sys.modules[name]
            sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
            sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(cwd)
            status = self._run(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _run(self, arguments: list[str]) -> int:
        """The exit status."""
        is_code = arguments[0] == "-c"
        folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        sys.path[:] = ["" if is_code else str(Path(arguments[0]).resolve().parent), *folders, *self.path]
        sys.argv = ["-c", *arguments[2:]] if is_code else arguments
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            if is_code:
                exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
            else:
                runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return (end.code or 0) & 0xFF
            print(end.code, file=sys.stderr)
            return 1
        return 0


if __name__ == "__main__":
    serve(int(sys.argv[1]))
