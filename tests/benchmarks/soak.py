"""Random kills, again and again: whatever dies, every map ends as the undisturbed one, bit for bit.

    python -m tests.benchmarks.soak [--minutes 30] [--seed 0]

`flarefield invert` makes maps of many small tiles, in processes of its own: one map on the cluster that the
command starts, the next on a scheduler and workers that were there before; every third one is of a part of
the observation. At random moments something dies,
stands still or loses data: workers, nannies, the scheduler, the command itself, files of finished tiles, the
end of the journal. Whenever a command ends before its map is finished, the same command goes on. No command
may end but by a kill or with an error that somebody has thought of, none may wait for ever, and no process
may outlive its command. A finished map must pass ``flarefield invert --check``, and every variable must have
the bits of the map that nothing disturbed.

Prints what happened, and how commands ended; the exit code is 1 if anything was not as it should be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from pipeline.journal import read_journal
from pipeline.results import open_map
from pipeline.storage import Directory
from pipeline.tiles import TileGrid, tile_keys
from tests.fake_model import save_fake_model
from tests.toy_observation import write_toy_observation

FLAREFIELD = [sys.executable, "-m", "pipeline.cli"]
GRID = TileGrid((1, 40, 40), (2, 2))
PART = ("--region", "3:33,0:24")
"""Of maps that are of a part."""
PATIENCE = 300.0
"""Seconds that any one thing may take on a busy machine before it counts as never happening."""
UNFORESEEN = "run again with --debug"
"""What the command says of errors that nobody has thought of."""

ANYWHERE = {
    "a worker killed": 3,
    "two workers in a row killed": 3,
    "a worker stopped for a while": 2,
    "a tile damaged": 2,
    "the command killed": 1,
    "the command killed, the journal's end lost": 1,
}
"""What can happen on any cluster, and how often in comparison."""
ELSEWHERE = {**ANYWHERE, "a nanny killed": 2, "the scheduler killed": 1}
"""What can happen on one that is not the command's own."""

Thing = TypeVar("Thing")


class ProblemError(Exception):
    """Something that must not happen."""


# Processes


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise ProblemError(f"waited in vain for {what}")
        time.sleep(0.02)


def begin(arguments: list[str], log: Path) -> psutil.Popen:
    """Start a process, whose words go to a file."""
    with log.open("wb") as file:
        return psutil.Popen(arguments, stdout=file, stderr=file)


def end(process: psutil.Popen) -> None:
    """Kill a process that was started here, and those that it has started."""
    processes = [*family(process), process]
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes, timeout=PATIENCE)


def family(process: psutil.Process) -> list[psutil.Process]:
    """The processes that a process has started."""
    with suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def workers_of(parents: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Dask's workers among the processes that some have started."""
    found = []
    for child in (child for parent in parents for child in family(parent)):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


class Cluster:
    """A scheduler and two workers, each with its nanny, that are there before a command and after it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "scheduler.json"
        self.scheduler: psutil.Popen | None = None
        self.nannies: list[psutil.Popen] = []

    def mend(self) -> str:
        """Start what does not run; return the scheduler's address."""
        if self.scheduler is None or not alive(self.scheduler):
            self.end()
            self.file.unlink(missing_ok=True)
            self.scheduler = self._start("scheduler", "--port", "0", "--scheduler-file", str(self.file))
            wait_until(self.file.exists, "a scheduler")
        self.nannies = [nanny for nanny in self.nannies if alive(nanny)]
        while len(self.nannies) < 2:
            settings = ("--nthreads", "1", "--local-directory", str(self.folder))
            self.nannies.append(self._start("worker", "--scheduler-file", str(self.file), *settings))
        wait_until(lambda: all(workers_of([nanny]) for nanny in self.nannies), "workers")
        return str(json.loads(self.file.read_text())["address"])

    def _start(self, kind: str, *arguments: str) -> psutil.Popen:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--host", "127.0.0.1"]
        return begin([*command, "--no-dashboard", *arguments], self.folder / f"{kind}.log")

    def end(self) -> None:
        """End all of it."""
        for process in (*self.nannies, self.scheduler):
            if process is not None:
                end(process)
        self.nannies, self.scheduler = [], None


# Maps


def recorded(output: Path) -> list[dict[str, Any]]:
    """What a map's journal says of finished tiles."""
    journal = Directory(output).journal
    return [one for one in read_journal(journal)[1] if "sha256" in one] if journal.exists() else []


def values(output: Path) -> dict[str, bytes]:
    """The bits of a map's variables and coordinates."""
    with open_map(output) as dataset:
        return {str(name): variable.values.tobytes() for name, variable in dataset.variables.items()}


class Soak:
    """Maps made against all odds, and what became of them.

    Attributes
    ----------
    happened : Counter
        What was done to commands.
    endings : Counter
        How commands ended.
    maps : int
        Maps that were finished and are as they should be.
    problems : list of str
        What was not as it should be.
    """

    def __init__(self, folder: Path, seed: int, console: Console) -> None:
        self.folder, self.console = folder, console
        self.random = np.random.default_rng(seed)
        self.observation = write_toy_observation(
            folder / "o.zarr", times=GRID.shape[0], rows=GRID.shape[1], columns=GRID.shape[2]
        )
        self.model = save_fake_model(folder / "model")
        self.own = folder / "own.yaml"
        self.own.write_text("kind: local\nworkers: 2\ndashboard: null\n")
        self.cluster = Cluster(folder)
        self.log = folder / "command.log"
        self.relatives: list[psutil.Process] = []
        self.deadline = time.monotonic()
        self.happened: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.maps = 0
        self.problems: list[str] = []

    def run(self, seconds: float) -> None:
        """Make maps until the time is up; the last one is finished."""
        self.undisturbed = {part: self.made_in_peace(part) for part in ((), PART)}
        self.deadline = time.monotonic() + seconds
        number = 0
        try:
            while time.monotonic() < self.deadline:
                number += 1
                try:
                    self.make_map(
                        self.folder / f"map{number}.zarr",
                        PART if number % 3 == 0 else (),
                        elsewhere=number % 2 == 0,
                    )
                except ProblemError as problem:
                    self.problems.append(f"map {number}: {problem}")
                    self.console.print(self.problems[-1], markup=False)
        finally:
            self.cluster.end()

    def made_in_peace(self, part: Sequence[str]) -> dict[str, bytes]:
        """The bits of a map that nothing disturbs."""
        output = self.folder / f"undisturbed{'-part' if part else ''}.zarr"
        self.go_on(output, [], part, elsewhere=False)
        return values(output)

    def make_map(self, output: Path, part: Sequence[str], *, elsewhere: bool) -> None:
        """Make a map, whatever happens, and compare it with the undisturbed one."""
        kinds = ELSEWHERE if elsewhere else ANYWHERE
        often = np.array(list(kinds.values())) / sum(kinds.values())
        plan = [str(kind) for kind in self.random.choice(list(kinds), self.random.integers(4, 13), p=often)]
        happened: list[str] = ["nothing was there before"]
        finished = False
        while not finished:
            before = happened
            ending, happened = self.go_on(output, plan, part, elsewhere=elsewhere)
            if ending == "finished":
                check = subprocess.run(
                    [*FLAREFIELD, "invert", "--check", str(output)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                finished = check.returncode == 0
                if not finished:
                    ending = "finished, --check finds damage"
                    if "a tile damaged" not in happened:  # after the command had looked
                        raise ProblemError(f"a finished map is not sound: {check.stdout + check.stderr}")
            elif not happened and not before:
                raise ProblemError(f"a command that nothing disturbed ended: {ending}")
            self.happened.update(happened)
            self.endings[ending] += 1
            self.console.print(f"{output.name}: {', '.join(happened) or 'nothing'}: {ending}", markup=False)
        found = values(output)
        differing = [name for name, bits in self.undisturbed[tuple(part)].items() if found[name] != bits]
        if differing:
            raise ProblemError(f"the map differs in {', '.join(differing)}")
        wait_until(lambda: not any(map(alive, self.relatives)), "the end of a command's workers")
        self.relatives.clear()
        self.maps += 1

    def go_on(
        self, output: Path, plan: list[str], part: Sequence[str], *, elsewhere: bool
    ) -> tuple[str, list[str]]:
        """Run the command, disturb it as planned until it ends; say how it ended and what happened to it."""
        cluster = self.cluster.mend() if elsewhere else str(self.own)
        command = [*FLAREFIELD, "invert", str(self.observation), str(output), "--model", str(self.model)]
        command += ["--draws", "8", "--tile", str(GRID.tile[0]), "--cluster", cluster, *part]
        process = begin(command, self.log)
        happened = []
        try:
            while (
                plan
                and time.monotonic() < self.deadline
                and self.comes_to_a_moment(process, output, elsewhere=elsewhere)
            ):
                if not elsewhere:
                    self.relatives += family(process)
                if self.happens(plan[0], process, output, elsewhere=elsewhere):
                    happened.append(plan.pop(0))
            wait_until(lambda: self.over(process, elsewhere=elsewhere), "the end of a command")
            return self.ending(process.wait()), happened
        except ProblemError as problem:
            said = self.log.read_text(errors="replace")[-2000:]
            raise ProblemError(f"{problem}, after {', '.join(happened) or 'nothing'}: {said}") from problem
        finally:
            end(process)

    def comes_to_a_moment(self, process: psutil.Popen, output: Path, *, elsewhere: bool) -> bool:
        """Wait for a random moment; False if the command ends before."""
        if self.random.uniform() < 0.4:
            moment = time.monotonic() + self.random.uniform(0.0, 10.0)
            wait_until(
                lambda: self.over(process, elsewhere=elsewhere) or time.monotonic() > moment, "a moment"
            )
        else:
            tiles = len(recorded(output)) + self.random.integers(1, len(GRID) // 4)
            wait_until(
                lambda: self.over(process, elsewhere=elsewhere) or len(recorded(output)) >= tiles,
                "finished tiles",
            )
        return alive(process)

    def over(self, process: psutil.Popen, *, elsewhere: bool) -> bool:
        """Whether a command has ended; until then workers join a cluster that has lost all of them."""
        scheduler = self.cluster.scheduler
        manned = not elsewhere or any(map(alive, self.cluster.nannies))
        if not manned and scheduler is not None and alive(scheduler):
            self.cluster.mend()
        return not alive(process)

    def ending(self, code: int) -> str:
        """How a command has ended, in a few words."""
        if code in (0, -signal.SIGKILL):
            return "killed" if code else "finished"
        said = self.log.read_text(errors="replace")
        if code != 1 or UNFORESEEN in said or "error: " not in said:
            raise ProblemError(f"a command ended with code {code}: {said[-2000:]}")
        return said.rpartition("error: ")[2].splitlines()[0].rpartition(": ")[2]

    # What happens

    def happens(self, kind: str, process: psutil.Popen, output: Path, *, elsewhere: bool) -> bool:
        """Let something happen to a command; False if there is nothing yet that it could happen to."""
        if kind == "a tile damaged":
            return self.damage(output)
        if kind == "the scheduler killed":
            assert self.cluster.scheduler is not None
            self.cluster.scheduler.kill()
        elif kind == "a nanny killed":
            self.one_of(self.cluster.nannies).kill()
        elif kind.startswith("the command killed"):
            process.kill()
            process.wait()
            journal = Directory(output).journal
            if kind.endswith("lost") and journal.exists():
                with journal.open("rb") as file:
                    self.cut(journal, keep=len(file.readline()))
        else:
            return self.happens_to_workers(kind, self.cluster.nannies if elsewhere else [process])
        return True

    def happens_to_workers(self, kind: str, parents: Sequence[psutil.Process]) -> bool:
        """Kill a worker, or two in a row, or stop one for a while; False if there is none yet."""
        before = workers_of(parents)
        if not before:
            return False
        worker = self.one_of(before)
        with suppress(psutil.NoSuchProcess):
            if kind == "a worker stopped for a while":
                worker.suspend()
                time.sleep(self.random.uniform(0.5, 5.0))
                worker.resume()
                return True
            worker.kill()
        if kind == "two workers in a row killed":
            new: list[psutil.Process] = []

            def replaced() -> bool:
                new[:] = [worker for worker in workers_of(parents) if worker not in before]
                return bool(new) or not any(map(alive, parents))

            wait_until(replaced, "a worker in a dead one's place")
            time.sleep(self.random.uniform(0.0, 6.0))  # it is starting, or already at work
            for worker in new:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
        return True

    def damage(self, output: Path) -> bool:
        """Remove or cut a file of a finished tile; False if there is none."""
        tiles = (GRID[record["tile"]] for record in recorded(output))
        files = [output / key for tile in tiles for key in tile_keys(tile).values()]
        if not files:
            return False
        file = self.one_of(files)
        with suppress(FileNotFoundError):  # it is damaged already, or being done again
            if self.random.uniform() < 0.5:
                file.unlink()
            else:
                self.cut(file)
        return True

    def cut(self, file: Path, keep: int = 0) -> None:
        """Take some bytes from the end of a file."""
        size = file.stat().st_size
        os.truncate(file, size - self.random.integers(min(size - keep, 400) + 1))

    def one_of(self, things: Sequence[Thing]) -> Thing:
        """One of several things."""
        return things[int(self.random.integers(len(things)))]

    def table(self) -> Table:
        """What happened, and how commands ended."""
        title = f"{self.maps} maps as the undisturbed one, {self.endings.total()} commands"
        shown = Table(title=title, title_justify="left")
        shown.add_column("what happened, and how commands ended")
        shown.add_column("times", justify="right")
        for counts in (self.happened, self.endings, Counter({"problems": len(self.problems)})):
            for name, count in counts.most_common():
                shown.add_row(name, str(count))
            shown.add_section()
        return shown


def main() -> None:
    """Disturb maps until the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console(width=120, highlight=False)
    with TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), options.seed, console)
        soak.run(60.0 * options.minutes)
    console.print(soak.table())
    for problem in soak.problems:
        console.print(problem, markup=False)
    raise SystemExit(bool(soak.problems))


if __name__ == "__main__":
    main()
