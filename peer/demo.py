"""`shoal demo`: a whole swarm on this machine, watched from outside.

The peers are ordinary daemons, `shoal create` and `shoal join`, each its own process with its own
identity; the demo only starts them, listens to their events and shows them. Nothing of the training
passes through it.

Guarantees: what it reports is what the peers reported: `digests_agree` is true only if in every
round all digests were equal and none of a peer that lived to the end was missing. A peer that dies
is shown and the others go on. With `chaos` peers are killed, frozen and brought back on purpose
(`peer.chaos`); then one that ends by itself is a failure, and so is a loss that did not fall. At
the end, however it comes (last round, time, Ctrl-C, SIGTERM, SIGKILL of this process), the peers
end, frozen ones too, and the private folder goes: see `peer.supervision` for the case in which this
process cannot see to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group

from dht.errors import ConfigError, SwarmError
from dht.link import MAX_PEERS, Link
from peer import display, runfile
from peer.chaos import Action, Chaos, Deed
from peer.events import ChaosEvent, DiedEvent, LineWriter, MemoryUse, SummaryEvent
from peer.signals import heeded
from peer.status import Status
from peer.supervision import LOCK_NAME

DEFAULT_ROUNDS = 8
POLITE_S = 4.0  # for peers told to stop: as all leave, nobody is left to be polite to
SETTLE_S = 3.0  # for the libp2p daemons of killed peers to go
STRAGGLER_S = 45.0  # for the rest, once the first peer is done
BACK_S = 90.0  # for those in trouble when the chaos ends
TICK_S = 0.1
MEMORY_S = 1.0  # between two looks at the peers' memory
_LINE_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What to show.

    Attributes:
        peers: how many.
        rounds: after which it ends; 0 when `minutes` says so.
        minutes: after which it ends, with the round after the one under way; 0 for `rounds`.
        data: text file or folder; empty: the run file's default.
        codec: empty: the run file's default.
        seed: of the run and of the chaos; None: 0 for the run, any for the chaos.
        chaos: kill, freeze and revive peers. It ends with the first round after `rounds` or
            `minutes` at which everybody is back.
        local_steps: 0: the run file's default.
        json: events as JSON lines instead of a table.
        verbose: let the peers say on stderr what they do.
    """

    peers: int = 4
    rounds: int = DEFAULT_ROUNDS
    minutes: float = 0.0
    data: str = ""
    codec: str = ""
    seed: int | None = None
    chaos: bool = False
    local_steps: int = 0
    json: bool = False
    verbose: bool = False


@dataclass(slots=True)
class Child:
    """One peer as the demo sees it."""

    number: int
    process: asyncio.subprocess.Process
    peer: str = ""
    status: Status = field(default_factory=Status)
    digests: dict[int, str] = field(default_factory=dict)
    losses: dict[int, float | None] = field(default_factory=dict)
    done: dict[str, Any] | None = None
    last_words: str = ""
    exit_status: int | None = None
    link: str = ""
    trouble: str = ""  # "killed", "frozen" or, until it completes a round again, "back"
    contradicted: int | None = None  # a round that it reported with two digests
    memory: list[tuple[float, int]] = field(default_factory=list)  # when, resident bytes

    @property
    def died(self) -> bool:
        """Ended without having been done, told to or killed on purpose."""
        return self.exit_status not in (None, 0) and self.trouble != "killed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the reported rounds amount to."""

    rounds: int
    agree: bool
    problem: str


def judge(children: list[Child]) -> Verdict:
    """Whether all peers had the same model after each round.

    A peer that missed a round, frozen for a while perhaps, and came back is asked for what it
    reports afterwards and at the end; one that died, for the rounds that it reported.

    Args:
        children: all that were started.
    """
    reported = {number for child in children for number in child.digests}
    rounds = max(reported, default=-1) + 1
    problem = ""
    ends = {child.done["digest"] for child in children if child.done is not None}
    absent = [child for child in children if ends and child.done is None and not child.died]
    split = [
        number
        for number in sorted(reported)
        if len({child.digests[number] for child in children if number in child.digests}) > 1
        or any(child.contradicted == number for child in children)
    ]
    if split:
        problem = f"the peers' models differ after round {split[0]}"
    elif len(ends) > 1:
        problem = "the final models differ"
    elif not rounds:
        problem = "no round was completed"
    elif absent:
        problem = f"peer {absent[0].number} did not come to the end"
    return Verdict(rounds=rounds, agree=not problem, problem=problem)


def run_demo(config: DemoConfig) -> int:
    """Run a demo to its end; returns the exit status.

    Raises:
        ConfigError: a peer refused an option that the demo passed on.
        SwarmError: the swarm did not come into being.
    """
    with _private_folder() as folder:
        return asyncio.run(Demo(config, folder).run())


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
    try:
        (folder / LOCK_NAME).touch(mode=0o600)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Demo:
    """A running demo.

    Args:
        config: what to show.
        folder: private to this demo.
    """

    def __init__(self, config: DemoConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._children: list[Child] = []
        self._began = time.monotonic()
        self._stops = 0
        self._interrupted = False
        self._ending: asyncio.Task[None] | None = None
        self._shown_rounds = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer = LineWriter(sys.stdout, self._on_broken)
        self._table = not config.json and sys.stdout.isatty()
        seed = config.seed if config.seed is not None else secrets.randbelow(1 << 31)
        # Made here, so that too few peers are refused before any is started.
        self._chaos = Chaos(config.peers, seed, 0.0) if config.chaos else None
        self._chaos_seed = seed if config.chaos else None
        self._faults = 0
        self._last_deed = ""

    async def run(self) -> int:
        """Start the peers, watch them to the end, sum up."""
        self._loop = asyncio.get_running_loop()
        for ending in heeded():
            self._loop.add_signal_handler(ending, self._on_signal)
        run_path = self._folder / "run.toml"
        run_path.write_text(self._run_file(), encoding="utf-8")
        if self._chaos_seed is not None:
            sys.stderr.write(f"shoal demo: the chaos has --seed {self._chaos_seed}\n")
        deadline: asyncio.Task[None] | None = None
        with self._showing():
            try:
                async with asyncio.TaskGroup() as tasks:
                    for number in range(self._config.peers):
                        child = await self._spawn(number, run_path)
                        self._children.append(child)
                        tasks.create_task(self._watch(child))
                    tasks.create_task(self._watch_memory())
                    if self._chaos is not None:
                        tasks.create_task(self._make_trouble(tasks, self._chaos))
                    elif self._config.minutes:
                        deadline = asyncio.create_task(self._deadline())
            finally:
                for task in (deadline, self._ending):
                    if task is not None:
                        task.cancel()
                for child in self._children:
                    if child.process.returncode is None:
                        child.process.kill()
                        await child.process.wait()
                await self._settle()
        return self._sum_up()

    # -- the peers

    def _run_file(self) -> str:
        config = self._config
        tables = runfile.parse(runfile.starter(), "the starter run file")
        tables["name"] = "shoal demo"
        tables["seed"] = config.seed or 0
        # All peers share this machine: a quarter of the default work keeps rounds at seconds.
        tables["model"] |= {"layers": 2, "context": 64}
        # Whole rounds, one as the other: what can be seen to happen in a few of them.
        tables["round"] |= {"local_steps": 30, "fragments": 1, "delay_steps": 0, "codec": "int4"}
        tables["round"]["start_peers"] = config.peers
        fixed = not config.minutes and not config.chaos
        tables["round"]["rounds"] = config.rounds if fixed else 0
        if config.codec:
            tables["round"]["codec"] = config.codec
        if config.local_steps:
            tables["round"]["local_steps"] = config.local_steps
        if config.data:
            tables["data"]["path"] = config.data
        return runfile.dump(tables)

    async def _spawn(self, number: int, run_path: Path) -> Child:
        first = ["create", str(run_path)] if number == 0 else ["join"]
        return Child(
            number, await self._start(number, *first, "--link-file", str(self._folder / "link"))
        )

    async def _start(self, number: int, *command: str) -> asyncio.subprocess.Process:
        config = self._config
        threads = max(1, (os.cpu_count() or 1) // config.peers)
        arguments = [
            *(sys.executable, "-m", "peer.cli", *command),
            *("--home", str(self._folder / f"peer-{number}"), "--host", "127.0.0.1"),
            *("--threads", str(threads), "--supervised", str(self._folder), "--json"),
            *(("--data", config.data) if config.data else ()),
            *(("-v",) if config.verbose else ()),
        ]
        return await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            # Ctrl-C in the terminal is for the demo, which then asks the peers to leave.
            start_new_session=True,
            # Whatever the peers keep under TMPDIR (their libp2p sockets) goes with the folder.
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "TMPDIR": str(self._folder),
            },
        )

    async def _watch(self, child: Child) -> None:
        process = child.process
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_events(child))
            tasks.create_task(self._read_errors(child))
            status = await process.wait()
        child.exit_status = status
        # With chaos the run has no last round of its own: who is done early has left it as well.
        left = self._chaos is not None and status == 0 and child.done is None
        if (child.died or left) and not self._stops:
            self._on_death(child)

    async def _read_events(self, child: Child) -> None:
        assert child.process.stdout is not None
        async for raw in child.process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            try:
                event = json.loads(line)
                self._on_event(child, event, line)
            except (ValueError, KeyError, TypeError, AttributeError):
                # What a killed child did not finish writing.
                continue

    async def _read_errors(self, child: Child) -> None:
        assert child.process.stderr is not None
        async for raw in child.process.stderr:
            child.last_words = raw.decode(errors="replace").rstrip("\n") or child.last_words
            if self._config.verbose:
                sys.stderr.write(f"peer {child.number}: {child.last_words}\n")

    def _tell(self, child: Child, order: str) -> None:
        if child.process.stdin is not None and child.exit_status is None:
            with contextlib.suppress(OSError, RuntimeError):
                child.process.stdin.write(f"{order}\n".encode())

    def _stop_all(self) -> None:
        self._stops += 1
        for child in self._children:
            self._tell(child, "stop")
            if child.trouble == "frozen":
                self._signal(child, signal.SIGCONT)  # or it could not obey
        if self._ending is None:
            self._ending = asyncio.create_task(self._kill_after(POLITE_S))

    async def _kill_after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        for child in self._children:
            if child.exit_status is None:
                child.process.kill()

    async def _settle(self) -> None:
        """Wait until the libp2p daemons, which outlive a killed peer by a moment, are gone."""
        for _ in range(int(SETTLE_S / 0.02)):
            if not any(self._folder.glob("shoal-*")):
                break
            await asyncio.sleep(0.02)

    # -- what happens

    def _on_event(self, child: Child, event: dict[str, Any], line: str) -> None:
        kind = event["event"]
        child.peer = str(event["peer"])
        if kind == "progress":
            child.status = Status.from_dict(event["status"])
            return
        if kind == "round":
            digest = child.digests.setdefault(int(event["round"]), str(event["digest"]))
            if digest != event["digest"]:
                child.contradicted = int(event["round"])
            if child.trouble == "back" and self._chaos is not None:
                child.trouble = ""
                self._chaos.recovered(child.number)
            if event["val_loss"] is not None:
                child.losses[int(event["round"])] = event["val_loss"]
            child.status = dataclasses.replace(
                child.status, round=int(event["round"]) + 1, step=0, digest=str(event["digest"])
            )
        elif kind == "link":
            child.link = str(event["link"])
        elif kind == "done":
            child.done = event
            child.status = dataclasses.replace(child.status, val_loss=float(event["val_loss"]))
            if self._ending is None:
                self._ending = asyncio.create_task(self._kill_after(STRAGGLER_S))
        if self._config.json:
            self._writer.line(line)
        self._plain_rounds()

    def _on_death(self, child: Child) -> None:
        status = child.exit_status or 0
        reason = child.last_words or "without a word"
        if self._config.json:
            self._writer.event(
                DiedEvent(peer=child.peer, number=child.number, status=status, reason=reason)
            )
        elif not self._table:
            self._writer.line(f"peer {child.number} died ({_how(status)}): {reason}")
        started = any(other.status.step or other.digests for other in self._children)
        # The first round waits for all: it would never come. And with chaos a peer that ends by
        # itself is the failure that was looked for; to go on without it would hide the reason.
        if not started or self._chaos is not None:
            self._stop_all()
        self._plain_rounds()

    def _on_signal(self) -> None:
        if self._interrupted:
            for child in self._children:
                if child.exit_status is None:
                    child.process.kill()
        self._interrupted = True
        self._stop_all()

    def _on_broken(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop_all)

    async def _deadline(self) -> None:
        await asyncio.sleep(self._config.minutes * 60)
        self._finish()

    def _finish(self) -> None:
        under_way = max((child.status.round for child in self._children), default=0)
        # One more than is under way, so that the order reaches everybody in time.
        for child in self._children:
            self._tell(child, f"finish {under_way + 1}")

    # -- chaos

    async def _make_trouble(self, tasks: asyncio.TaskGroup, chaos: Chaos) -> None:
        """Do what the plan says until the end is near; then mend everything and finish."""
        while not self._all_trained():
            if self._over():
                return
            await asyncio.sleep(TICK_S)
        began = self._elapsed_s()
        while not self._over() and not self._time_is_up():
            await self._do(chaos.due(self._elapsed_s() - began), tasks)
            await asyncio.sleep(TICK_S)
        chaos.calm()
        until = self._elapsed_s() + BACK_S
        while not self._over() and self._elapsed_s() < until:
            await self._do(chaos.due(self._elapsed_s() - began), tasks)
            if not chaos.troubled:
                break
            await asyncio.sleep(TICK_S)
        self._finish()

    async def _do(self, deeds: list[Deed], tasks: asyncio.TaskGroup) -> None:
        for deed in deeds:
            child = self._children[deed.number]
            if child.died or (child.exit_status == 0):
                continue
            match deed.action:
                case Action.KILL:
                    child.trouble = "killed"
                    self._signal(child, signal.SIGKILL)
                case Action.FREEZE:
                    child.trouble = "frozen"
                    self._signal(child, signal.SIGSTOP)
                case Action.THAW:
                    child.trouble = "back"
                    self._signal(child, signal.SIGCONT)
                case Action.REVIVE:
                    await self._revive(child, tasks)
            self._faults += deed.action in (Action.KILL, Action.FREEZE)
            self._say_deed(child, deed.action)

    async def _revive(self, child: Child, tasks: asyncio.TaskGroup) -> None:
        """Start a killed peer again in its old folder; any other peer shows it the way back."""
        await child.process.wait()
        process = await self._start(child.number, "join", str(self._way_back(child)))
        child.process = process
        child.exit_status = None
        child.trouble = "back"
        tasks.create_task(self._watch(child))
        if self._stops:  # while it was being started
            self._tell(child, "stop")

    def _way_back(self, child: Child) -> Link:
        """A link with the addresses of the others, those that are well first."""
        others = [other for other in self._children if other is not child and other.link]
        others.sort(key=lambda other: (bool(other.trouble), other.number))
        links = [Link.parse(other.link) for other in others]
        addresses = dict.fromkeys(link.peers[0] for link in links)
        return Link(links[0].run_id, tuple(addresses)[:MAX_PEERS])

    def _say_deed(self, child: Child, action: Action) -> None:
        did = {
            Action.KILL: "was killed",
            Action.FREEZE: "is frozen",
            Action.THAW: "is thawed",
            Action.REVIVE: "is started again",
        }[action]
        self._last_deed = f"peer {child.number} {did}"
        if self._config.json:
            self._writer.event(
                ChaosEvent(action=action.value, peer=child.peer, number=child.number)
            )
        elif not self._table:
            self._writer.line(self._last_deed)

    def _signal(self, child: Child, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began

    def _all_trained(self) -> bool:
        return all(child.digests for child in self._children)

    def _time_is_up(self) -> bool:
        if self._config.minutes:
            return self._elapsed_s() >= self._config.minutes * 60
        return max(max(child.digests, default=-1) for child in self._children) + 2 >= (
            self._config.rounds
        )

    def _over(self) -> bool:
        """Whether nothing more is to be done to anybody."""
        ended = all(child.exit_status is not None for child in self._children)
        return bool(self._stops) or ended

    async def _watch_memory(self) -> None:
        while not self._over():
            if self._all_trained():
                for child in self._children:
                    resident = _resident_bytes(child.process.pid)
                    if child.exit_status is None and resident:  # an ended one has none
                        child.memory.append((time.monotonic(), resident))
            await asyncio.sleep(MEMORY_S)

    # -- what is shown

    def _rows(self) -> list[Status]:
        rows = []
        for child in self._children:
            status = child.status
            if child.exit_status is not None:
                phase = "done" if child.done else "gone" if child.died else "left"
                status = dataclasses.replace(status, phase=phase, tokens_per_s=0.0)
            if child.trouble and not self._stops:
                status = dataclasses.replace(status, phase=child.trouble, tokens_per_s=0.0)
            rows.append(status)
        return rows

    def _losses(self) -> list[float]:
        """Validation loss by round, the final model's last, as far as anybody reported it."""
        by_round: dict[int, float] = {}
        for child in self._children:
            for number, loss in child.losses.items():
                if loss is not None:
                    by_round.setdefault(number, loss)
        losses = [by_round[number] for number in sorted(by_round)]
        final = next((c.done["val_loss"] for c in self._children if c.done is not None), None)
        return losses if final is None else [*losses, final]

    @contextlib.contextmanager
    def _showing(self) -> Iterator[None]:
        if not self._table:
            yield
            return
        with display.live(self._screen, Console(file=sys.stdout)):
            yield

    def _screen(self) -> Group:
        peers = self._config.peers
        title = f"shoal demo  {peers} peers, each its own process; no server among them"
        agreed = judge(self._children)
        if self._stops:
            foot = "leaving politely; Ctrl-C again ends it at once"
        elif agreed.rounds:
            foot = f"after round {agreed.rounds - 1} all peers held the same model, bit for bit"
        else:
            foot = "the first round begins when all peers have found each other"
        if self._last_deed and not self._stops:
            foot = f"{self._last_deed}; {foot}"
        dead = [child for child in self._children if child.died]
        if dead:
            last = dead[-1]
            foot = f"peer {last.number} died ({_how(last.exit_status or 0)}); {foot}"
        return display.screen(title, self._rows(), self._losses(), foot)

    def _plain_rounds(self) -> None:
        """A line for each round that all living peers have completed, where lines are shown."""
        if self._config.json or self._table:
            return
        # Who is or was in trouble has missed rounds; with chaos, those who reported one are shown.
        living = [child for child in self._children if not child.died]
        if self._chaos is not None:
            newest = max((max(child.digests, default=-1) for child in living), default=-1)
            while self._shown_rounds < newest:
                self._plain_round([c for c in living if self._shown_rounds in c.digests])
            return
        while living and all(self._shown_rounds in child.digests for child in living):
            self._plain_round(living)

    def _plain_round(self, children: list[Child]) -> None:
        number = self._shown_rounds
        self._shown_rounds += 1
        loss = next((c.losses[number] for c in children), None)
        digests = {child.digests[number] for child in children}
        if digests:
            same = "the same digest" if len(digests) == 1 else "DIFFERENT digests"
            self._writer.line(
                f"round {number}: loss {display.human_loss(loss)}, {len(children)} peers with "
                f"{same} {min(digests)[:12]}"
            )

    # -- the end

    def _sum_up(self) -> int:
        refusal = next((c for c in self._children if c.exit_status == 2 and not c.digests), None)
        if refusal is not None and not self._interrupted:
            raise ConfigError(_without_command(refusal.last_words))
        verdict = judge(self._children)
        losses = self._losses()
        complete = all(c.done is not None for c in self._children if not c.died)
        problem = verdict.problem or self._chaos_problem(losses)
        summary = SummaryEvent(
            rounds=verdict.rounds,
            peers=len({child.peer for child in self._children if child.digests}),
            first_val_loss=losses[0] if losses else None,
            last_val_loss=losses[-1] if losses else None,
            digests_agree=verdict.agree,
            wall_s=round(self._elapsed_s(), 2),
            memory=tuple(memory_use(child) for child in self._children),
            chaos_seed=self._chaos_seed,
            faults=self._faults,
        )
        self._say_summary(summary, problem)
        if not problem and complete:
            return 0
        if self._interrupted or self._writer.broken:
            return 130 if self._interrupted else 1  # whoever did it knows why
        dead = next((child for child in self._children if child.died), None)
        problem = problem or "the run did not come to its end"
        if dead is not None:
            problem += f"; peer {dead.number} died ({_how(dead.exit_status or 0)})"
            if dead.last_words:
                problem += f": {_without_command(dead.last_words)}"
        raise SwarmError(problem)

    def _chaos_problem(self, losses: list[float]) -> str:
        """What is wrong although all digests agree; only chaos promises that nothing is."""
        if self._chaos is None or self._interrupted:
            return ""
        if any(child.died for child in self._children):
            return "a peer died that was not killed"
        if len(losses) > 1 and not losses[-1] < losses[0]:
            return "the loss did not fall"
        return ""

    def _say_summary(self, summary: SummaryEvent, problem: str) -> None:
        if self._config.json:
            self._writer.event(summary)
            return
        first = display.human_loss(summary.first_val_loss)
        last = display.human_loss(summary.last_val_loss)
        self._writer.line(
            f"{summary.rounds} rounds, {summary.peers} peers, validation loss {first} -> {last}, "
            f"{problem or 'the same model in all of them'}, {summary.wall_s:.0f} s"
        )
        if self._chaos is not None:
            uses = [
                f"{use.first_quarter_mb:.0f} -> {use.last_quarter_mb:.0f}"
                for use in summary.memory
                if use.first_quarter_mb is not None and use.last_quarter_mb is not None
            ]
            self._writer.line(
                f"{summary.faults} faults; megabytes of memory, first and last quarter: "
                + (", ".join(uses) or "not measured")
            )


def memory_use(child: Child) -> MemoryUse:
    """Mean resident memory in the first and the last quarter of the time that was watched."""
    if not child.memory:
        return MemoryUse(number=child.number, first_quarter_mb=None, last_quarter_mb=None)
    first, last = child.memory[0][0], child.memory[-1][0]
    quarter = (last - first) / 4

    def mean_mb(since: float, until: float) -> float:
        sizes = [resident for when, resident in child.memory if since <= when <= until]
        return round(sum(sizes) / len(sizes) / 1e6, 1)

    return MemoryUse(
        number=child.number,
        first_quarter_mb=mean_mb(first, first + quarter),
        last_quarter_mb=mean_mb(last - quarter, last),
    )


def _resident_bytes(pid: int) -> int | None:
    """Memory of a process; None where the system does not tell, or it has ended."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None


def _how(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
    return f"exit status {status}"


def _without_command(text: str) -> str:
    """A child's error line without its own `shoal create: `."""
    head, colon, rest = text.partition(": ")
    return rest if colon and head.startswith("shoal ") else text or "a peer ended without a word"
