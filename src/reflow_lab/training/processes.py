"""Several processes that train one run on this machine, each on its own device; torchrun and srun start them by themselves.

Every process makes the same parts from the same configuration and takes its rows of every batch; Lightning's DDP averages the
gradients. The first one alone writes. Started by us and not by Lightning's launcher, which repeats the whole command: of a sweep
or a study that would be every other run too.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig, OmegaConf

from ..errors import UserError
from ..hydra_errors import explain
from ..parallel import rank

POLL_S = 0.1
GRACE_S = 5.0  #: for the others, when one process has failed: those of the same failure say so, those that wait for it end

Workers = Sequence["subprocess.Popen[bytes]"]


def launch(cfg: DictConfig, num: int) -> None:
    """Train in `num` processes of this machine. SIGINT and SIGTERM are passed on to them.

    Raises what they ended with: a `UserError`, `KeyboardInterrupt` after a signal, `RuntimeError` with a traceback in it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        command = [sys.executable, "-P", "-m", __name__, str(folder)]
        with started(command, num) as workers, forwarded(workers) as signals:
            wait(workers)
        codes = [worker.returncode for worker in workers]
        if signals or 130 in codes:
            raise KeyboardInterrupt
        if any(codes):
            raise failure(folder, codes)


@contextlib.contextmanager
def started(command: Sequence[str], num: int) -> Iterator[Workers]:
    """`num` processes of a command, in sessions of their own: ctrl-C reaches them through us only. None of them outlives us."""
    port = free_port()
    environments = [environment(number, num, port) for number in range(num)]
    workers = [subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True) for env in environments]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()  # which closes the pipe, too


def environment(number: int, num: int, port: int) -> dict[str, str]:
    """The variables of process `number` of `num`: torchrun's, our search path, and its part of the processor's threads.

    Not what a torchrun that started us alone says of its own meeting point.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    own = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num, "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num))}
    fixed = {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return threads | ours | fixed | {name: str(value) for name, value in own.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def forwarded(workers: Workers) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on; yields the list of those that came."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for worker in workers:
            worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(workers: Workers) -> None:
    """Wait for all, or, once one has failed, as long as the others may take to end too."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        if deadline == float("inf") and any(worker.returncode for worker in workers):
            deadline = time.monotonic() + GRACE_S
        time.sleep(POLL_S)


def failure(folder: Path, codes: Sequence[int | None]) -> Exception:
    """What to raise: a user's error before the troubles of those that waited for the process that had it."""
    said = {number: path.read_text() for number in range(len(codes)) if (path := report(folder, number)).exists()}
    for number, text in said.items():
        if codes[number] == 2:
            return UserError(text)
    return RuntimeError(
        f"of {len(codes)} processes that trained together, ended with status {codes}\n" + "\n".join(said.values())
    )


def report(folder: Path, number: int) -> Path:
    """Where a process says why it failed."""
    return folder / f"{number}.txt"


def end_with_parent() -> None:
    """End at once when the process that holds the other end of our standard input is no more."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # unbuffered: Python aborts at its end where a thread holds the buffer's lock
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(folder: Path) -> int:
    """One process's part; its exit status: 0, 130 after a signal, 2 after a user's mistake, else 1; `folder` takes the reason."""
    from .train import plan, train_here

    end_with_parent()
    try:
        loaded = OmegaConf.load(folder / "config.yaml")
        assert isinstance(loaded, DictConfig)
        train_here(loaded, plan(loaded))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        line = explain(error)
        report(folder, rank()).write_text(line or traceback.format_exc())
        return 2 if line else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
