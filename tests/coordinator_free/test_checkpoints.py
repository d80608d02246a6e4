"""Checkpoints survive what happens to disks and processes, or are refused."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free import certificates, checkpoints
from coordinator_free.chain import Chain
from coordinator_free.checkpoints import Checkpoint, CheckpointStore, Keeper
from coordinator_free.messages import (
    NO_DIGEST,
    Certificate,
    Contribution,
    Kind,
    Member,
    Outcome,
    Signature,
)
from coordinator_free.outer import OuterConfig, OuterOptimizer
from coordinator_free.partition import ALIGN_ELEMENTS
from coordinator_free.state import Fragment, Shape, State
from coordinator_free.wire import head_digest
from dht.errors import StateError

RUN = "ab" * 20
LAYOUT = "layout"
NUMEL = 1000


def member(peer: str, session: int = 1) -> Member:
    return Member(
        peer_id=peer,
        session=session,
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    )


def shape(numel: int = NUMEL, layout: str = LAYOUT, fragments: int = 1) -> Shape:
    return Shape.of(layout, numel, fragments, OuterOptimizer(OuterConfig()))


def state(seed: int, numel: int = NUMEL) -> State:
    generator = torch.Generator().manual_seed(seed)
    of = shape(numel)
    vectors = [[torch.randn(n, generator=generator) for n in each] for each in of.lengths]
    return State.of(of, vectors)


def decrees(
    round: int, root: bytes, roster: tuple[str, ...] = ("a", "b"), before: tuple[str, ...] = ("a",)
) -> tuple[Certificate, Certificate]:
    """A round's certificate after its predecessor; nobody checks signatures here."""
    pair: list[Certificate] = []
    for height, (peers, its_root) in enumerate(((before, NO_DIGEST), (roster, root)), round):
        outcome = Outcome(
            height=height,
            round=round - 1 + len(pair),
            kind=Kind.AVERAGE,
            previous=head_digest(pair[-1].outcome) if pair else NO_DIGEST,
            plan=NO_DIGEST,
            vector_root=NO_DIGEST,
            state_root=its_root,
            samples=10 * (round - 1 + len(pair)),
            contributions=(Contribution(peer_id="a", samples=10),),
            roster=tuple(member(peer) for peer in peers),
        )
        pair.append(
            Certificate(
                outcome=outcome,
                ballot=0,
                provisional=False,
                signatures=(Signature(peer_id="a", signature=bytes(64)),),
            )
        )
    return pair[0], pair[1]


def store(folder: Path, *, numel: int = NUMEL, keep: int = 3, run: str = RUN) -> CheckpointStore:
    return CheckpointStore(folder, run_id=run, shape=shape(numel), keep=keep)


def save(into: CheckpointStore, round: int, numel: int = NUMEL) -> Path:
    saved = state(round, numel)
    return into.save(saved, decrees(round, saved.root), b"chain %d" % round)


def newest_round(folder: Path, numel: int = NUMEL) -> int | None:
    found = store(folder, numel=numel).newest()
    return found.head.round if found is not None else None


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = state(1)
    path = store(tmp_path / "deep" / "run").save(saved, decrees(1, saved.root), b"proof")
    found = store(tmp_path / "deep" / "run").newest()
    assert found is not None
    assert all(map(torch.equal, found.state.vectors(), saved.vectors()))
    assert found.state.root == saved.root
    assert found.certificates == decrees(1, saved.root)
    assert found.chain == b"proof"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_state_in_fragments_is_loaded_as_it_was_cut_and_no_other_way(tmp_path: Path) -> None:
    numel = 5 * ALIGN_ELEMENTS + 7
    cut = shape(numel, fragments=3)
    generator = torch.Generator().manual_seed(3)
    saved = State.of(
        cut, [[torch.randn(n, generator=generator) for n in each] for each in cut.lengths]
    )
    CheckpointStore(tmp_path, run_id=RUN, shape=cut).save(saved, decrees(1, saved.root))
    found = CheckpointStore(tmp_path, run_id=RUN, shape=cut).newest()
    assert found is not None
    assert found.state.root == saved.root
    assert found.state.digests == saved.digests
    assert all(map(torch.equal, found.state.vectors(), saved.vectors()))
    # As many elements, but the run is another one.
    for fragments in (1, 2, 4):
        other = CheckpointStore(tmp_path, run_id=RUN, shape=shape(numel, fragments=fragments))
        assert other.newest() is None
        with pytest.raises(ValueError, match="differ"):
            other.save(saved, decrees(1, saved.root))


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert store(tmp_path / "none").newest() is None
    assert not (tmp_path / "none").exists()


def test_a_state_is_not_saved_under_a_certificate_of_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differ"):
        store(tmp_path).save(state(1), decrees(1, state(2).root))
    assert list(tmp_path.iterdir()) == []


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    kept = store(tmp_path, keep=2)
    paths = [save(kept, round) for round in range(1, 6)]
    assert sorted(tmp_path.iterdir()) == paths[-2:]
    assert newest_round(tmp_path) == 5


def test_the_furthest_is_loaded_whatever_was_written_last(tmp_path: Path) -> None:
    for round in (3, 7, 5):
        save(store(tmp_path), round)
    assert newest_round(tmp_path) == 7


def test_what_gives_no_vote_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(store(tmp_path), 1)
    path = save(store(tmp_path), 2)
    found = store(tmp_path).newest(lambda checkpoint: checkpoint.head.round < 2)
    assert found is not None
    assert found.head.round == 1
    assert str(path) in caplog.text


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save(store(folder), 1)
    save(store(folder), 2)
    return folder


def damaged(folder: Path, into: Path, content: bytes) -> Path:
    """Both checkpoints, the newer one with another content."""
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(folder, into)
    (into / "000000000002.checkpoint").write_bytes(content)
    return into


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_one_changed_byte_anywhere_is_refused(
    two_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray((two_checkpoints / "000000000002.checkpoint").read_bytes())
    where = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 500))
    raw[where] ^= data.draw(st.integers(1, 255))
    into = tmp_path_factory.getbasetemp() / "changed"
    assert newest_round(damaged(two_checkpoints, into, bytes(raw))) == 1


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_torn_or_longer_file_is_refused(
    two_checkpoints: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = (two_checkpoints / "000000000002.checkpoint").read_bytes()
    cut = data.draw(st.integers(0, len(raw) - 1))
    torn = raw[:cut] + data.draw(st.sampled_from([b"", bytes(len(raw) - cut), raw]))
    into = tmp_path_factory.getbasetemp() / "torn"
    if torn != raw:
        assert newest_round(damaged(two_checkpoints, into, torn)) == 1


def test_a_damaged_file_is_named_and_left(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    into = damaged(two_checkpoints, tmp_path / "x", b"short")
    assert newest_round(into) == 1
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(into / "000000000002.checkpoint") in warning.getMessage()
    assert "too short" in warning.getMessage()
    assert (into / "000000000002.checkpoint").exists()


def test_another_run_or_model_is_refused(two_checkpoints: Path) -> None:
    assert store(two_checkpoints, run="cd" * 20).newest() is None
    assert store(two_checkpoints, numel=NUMEL + 1).newest() is None
    other = CheckpointStore(two_checkpoints, run_id=RUN, shape=shape(layout="other"))
    assert other.newest() is None


def test_a_state_that_is_not_its_certificates_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is whole: somebody wrote it so."""
    real = state(1)
    (fragment,) = real.fragments
    theta_N, momentum_N = fragment.vectors
    forged = real.then(0, Fragment((theta_N + 1, momentum_N), fragment.digests))
    store(tmp_path).save(forged, decrees(1, real.root))
    assert store(tmp_path).newest() is None


def test_a_huge_or_odd_file_costs_no_memory(tmp_path: Path) -> None:
    header = checkpoints._HEADER
    belongs = store(tmp_path)._belongs
    huge = 1 << 40
    own = shape().elements
    for number, (elements, named, chain) in enumerate(
        [(huge, 10, 0), (own, 2**32 - 1, 0), (own, 10, 2**32 - 1), (own, 10, 0)], 1
    ):
        path = tmp_path / f"{number:012d}.checkpoint"
        path.write_bytes(
            header.pack(checkpoints._MAGIC, checkpoints._VERSION, belongs, elements, named, chain)
        )
        os.truncate(path, huge)  # sparse
    os.mkfifo(tmp_path / "000000000005.checkpoint")  # would never deliver
    (tmp_path / "000000000006.checkpoint").symlink_to("/dev/zero")
    (tmp_path / "000000000007.checkpoint").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert store(tmp_path).newest() is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


POINTS = [
    *(f"write {number}" for number in (1, 2, 3, 4, 6, 8)),
    "before fsync",
    "after fsync",
    "before rename",
    "after rename",
]
# One process that forks for each point: torch takes seconds to load.
WRITER = """
import os, signal, sys
from pathlib import Path
from coordinator_free import checkpoints
from tests.coordinator_free.test_checkpoints import POINTS, save, store

numel = 3_000_000  # several pieces
real_write, real_fsync, real_rename = checkpoints._write_all, os.fsync, os.rename

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(point):
    written = []
    def write(file, piece):
        written.append(piece)
        if point == f"write {len(written)}":
            real_write(file, piece[: len(piece) // 2])
            die()
        real_write(file, piece)
    checkpoints._write_all = write
    if point == "before fsync":
        os.fsync = die
    if point == "after fsync":
        os.fsync = lambda descriptor: (real_fsync(descriptor), die())
    if point == "before rename":
        os.rename = die
    if point == "after rename":
        os.rename = lambda *names: (real_rename(*names), die())

for point in POINTS:
    kept = store(Path(sys.argv[1]) / point, numel=numel, keep=1)
    save(kept, 1, numel)
    child = os.fork()
    if not child:
        arm(point)
        save(kept, 2, numel)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (point, status)
"""


def test_a_writer_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    writer = subprocess.run(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert writer.returncode == 0, writer.stderr
    numel = 3_000_000
    for point in POINTS:
        folder = tmp_path / point
        assert len(list(folder.iterdir())) == 2, point  # the old one, and what was begun
        assert newest_round(folder, numel) == (2 if point == "after rename" else 1), point
        assert {path.suffix for path in folder.iterdir()} == {".checkpoint"}, point
        save(store(folder, numel=numel, keep=1), 3, numel)
        assert newest_round(folder, numel) == 3, point
        assert len(list(folder.iterdir())) == 1, point


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of a quarter of a megabyte, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=384k", "shoal-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_costs_nothing_else(
    full_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    numel = 32_000
    kept = store(full_disk, numel=numel)
    save(kept, 1, numel)
    with pytest.raises(StateError, match="No space left"):
        save(kept, 2, numel)
    assert [path.name for path in full_disk.iterdir()] == ["000000000001.checkpoint"]
    keeper = Keeper(kept, me="a", every=1)
    for round in (2, 3):
        keeper.note(state(round, numel), proof(decrees(round, state(round, numel).root)))
        keeper._thread.submit(lambda: None).result()
    keeper.close()
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # once, not every round
    assert "No space left on device; training goes on" in warnings[0].getMessage()
    assert newest_round(full_disk, numel) == 1


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot write a checkpoint"):
        save(store(tmp_path / "file" / "run"), 1)


# -- the keeper


class SlowStore(CheckpointStore):
    """Writes when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, run_id=RUN, shape=shape(), keep=9)
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def save(self, state: State, chain_end: tuple[Certificate, ...], chain: bytes = b"") -> Path:
        self.begun.release()
        assert self.gate.wait(10)
        return super().save(state, chain_end, chain)


def noted(keeper: Keeper, round: int, **rosters: tuple[str, ...]) -> None:
    reached = state(round)
    keeper.note(reached, proof(decrees(round, reached.root, **rosters)))


def proof(end: tuple[Certificate, ...]) -> Chain:
    """A chain that ends like this."""
    return Chain((certificates.found(RUN, member("a"), Key("a"), NO_DIGEST), *end))


def rounds_in(folder: Path) -> list[int]:
    return [
        found.certificates[-1].outcome.round
        for _, path in store(folder)._files()
        for found in [store(folder)._load(path)]
    ]


def test_saves_do_not_block_and_do_not_pile_up(tmp_path: Path) -> None:
    slow = SlowStore(tmp_path)
    keeper = Keeper(slow, me="a", every=1)
    noted(keeper, 1)
    assert slow.begun.acquire(timeout=10)
    for round in (2, 3, 4):
        noted(keeper, round)  # returns at once, though the first write stands still
    assert keeper.round is None
    assert keeper.saving
    closing = threading.Thread(target=keeper.close)
    closing.start()
    assert keeper.saving
    slow.gate.set()
    closing.join(10)
    assert not keeper.saving
    assert rounds_in(tmp_path) == [1, 4]
    assert keeper.round == 4


def test_every_so_many_rounds_and_once_more_at_the_end(tmp_path: Path) -> None:
    keeper = Keeper(store(tmp_path, keep=9), me="a", every=3)
    for round in range(1, 8):
        noted(keeper, round)
        keeper._thread.submit(lambda: None).result()
    keeper.close()
    assert rounds_in(tmp_path) == [3, 6, 7]


def test_never_means_never(tmp_path: Path) -> None:
    keeper = Keeper(store(tmp_path / "run"), me="a", every=0)
    noted(keeper, 1)
    keeper.close()
    assert not (tmp_path / "run").exists()


def test_what_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    path = save(store(tmp_path), 1)
    found = store(tmp_path).newest()
    assert isinstance(found, Checkpoint)
    keeper = Keeper(store(tmp_path), me="a", every=1, saved=found)
    assert keeper.round == 1
    keeper.note(found.state, proof(found.certificates))
    keeper.close()
    assert list(tmp_path.iterdir()) == [path]


def test_only_what_gives_a_vote_is_saved_and_the_older_vote_stays(tmp_path: Path) -> None:
    keeper = Keeper(store(tmp_path, keep=9), me="a", every=1)
    noted(keeper, 1, roster=("a",), before=("a",))
    keeper._thread.submit(lambda: None).result()
    noted(keeper, 2, roster=("b",), before=("a",))  # let go, and it has the state all the same
    keeper._thread.submit(lambda: None).result()
    noted(keeper, 3, roster=("b",), before=("b",))
    keeper.close()
    assert rounds_in(tmp_path) == [1, 2]


# -- the revival's certificate


class Key:
    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id

    def sign(self, domain: bytes, message: bytes) -> bytes:
        return bytes(64)


def test_a_member_revives_on_top_of_the_head() -> None:
    pair = decrees(4, state(4).root)
    roster = (member("a", 2),)
    revived = certificates.revive(RUN, pair, roster, Key("a"), gathering=False)
    outcome = revived.outcome
    assert revived.provisional
    assert outcome.kind == Kind.REGROUP
    assert (outcome.height, outcome.round) == (pair[1].outcome.height + 1, 4)
    assert outcome.previous == head_digest(pair[1].outcome)
    assert outcome.state_root == pair[1].outcome.state_root
    assert outcome.roster == roster
    assert certificates.verify(revived, RUN, ("a", "b"), lambda *_: True)
    assert certificates.revive(RUN, pair, roster, Key("a"), gathering=True).outcome.kind == (
        Kind.GATHER
    )


def test_who_was_let_go_by_the_last_decree_decides_it_anew() -> None:
    pair = decrees(4, state(4).root, roster=("b",), before=("a", "b"))
    revived = certificates.revive(RUN, pair, (member("a", 2),), Key("a"), gathering=False)
    assert revived.provisional
    assert revived.outcome.height == pair[1].outcome.height
    assert revived.outcome.state_root == pair[1].outcome.state_root
    assert certificates.verify(revived, RUN, ("a", "b"), lambda *_: True)


def test_a_stranger_revives_nothing() -> None:
    pair = decrees(4, state(4).root)
    assert not certificates.has_vote(pair, "c")
    with pytest.raises(ValueError, match="no vote"):
        certificates.revive(RUN, pair, (member("c"),), Key("c"), gathering=False)
