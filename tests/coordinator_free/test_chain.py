from __future__ import annotations

import dataclasses
import struct

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator_free import wire
from coordinator_free.certificates import ACCEPT_DOMAIN, found, signed_text
from coordinator_free.chain import MAX_CHAIN_BYTES, MAX_LINKS, Chain
from coordinator_free.messages import (
    MAX_SAMPLES,
    NO_DIGEST,
    Certificate,
    Contribution,
    Kind,
    Member,
    Outcome,
    Signature,
    samples_after,
)
from tests.sim.world import RUN, Key, check


def seat(name: str) -> Member:
    return Member(
        peer_id=name,
        session=1,
        hosts=("host",),
        port=1,
        certificate_sha256=NO_DIGEST,
        can_reduce=True,
    )


def signed(outcome: Outcome, signers: str, *, provisional: bool = False) -> Certificate:
    text = signed_text(RUN, 0, outcome)
    return Certificate(
        outcome=outcome,
        ballot=0,
        provisional=provisional,
        signatures=tuple(
            Signature(peer_id=s, signature=Key(s).sign(ACCEPT_DOMAIN, text)) for s in signers
        ),
    )


def after(
    before: Certificate,
    roster: str,
    signers: str,
    *,
    provisional: bool = False,
    seed: bytes = b"",
) -> Certificate:
    """What a swarm decides next: `roster` is the next one, `signers` are of the one before."""
    old = before.outcome
    contributions = (Contribution(peer_id=old.roster[0].peer_id, samples=10),)
    outcome = Outcome(
        height=old.height + 1,
        round=old.round + 1,
        kind=Kind.AVERAGE,
        previous=wire.head_digest(old),
        plan=NO_DIGEST,
        vector_root=NO_DIGEST,
        state_root=blake3(old.state_root + seed).digest(),
        samples=samples_after(old.samples, contributions),
        contributions=contributions,
        roster=tuple(seat(name) for name in sorted(roster)),
    )
    return signed(outcome, signers, provisional=provisional)


FIRST = found(RUN, seat("a"), Key("a"), blake3(b"initial").digest())


def verified(*links: Certificate) -> Chain:
    return Chain.verified(links, RUN, "a", check)


def grown(*certificates: Certificate) -> Chain:
    chain = Chain.begin(FIRST)
    for certificate in certificates:
        chain = chain.then(certificate)
    return chain


def history(*steps: tuple[str, str]) -> list[Certificate]:
    made: list[Certificate] = []
    for roster, signers in steps:
        made.append(after(made[-1] if made else FIRST, roster, signers))
    return made


def test_a_stable_roster_needs_few_links_however_long_it_runs() -> None:
    steps = [("abcd", "a")] + [("abcd", s) for s in ("abc", "bcd", "acd", "abd", "bcd") * 20]
    made = history(*steps)
    chain = grown(*made)
    assert len(chain) <= 4
    assert chain.newest == made[-1]
    assert verified(*chain.links) == chain


def test_links_are_kept_where_the_roster_turned_over() -> None:
    # The founder leaves, then everybody who came with it: no majority spans the changes.
    made = history(
        ("abc", "a"), ("bcd", "bc"), ("cde", "bcd"), ("def", "de"), ("efg", "ef"), ("efg", "fg")
    )
    chain = grown(*made)
    assert verified(*chain.links) == chain
    assert 3 < len(chain) < len(made) + 1
    # Without any one of them, its end is not proven.
    for drop in range(len(chain) - 1):
        kept = chain.links[:drop] + chain.links[drop + 1 :]
        with pytest.raises(ValueError, match="chain"):
            verified(*kept)


NEXT = after(FIRST, "abc", "a")
THIRD = after(NEXT, "abc", "ab")
FOURTH = after(THIRD, "bcd", "bc")
FIFTH = after(FOURTH, "bcd", "cd")


def changed(certificate: Certificate, **changes: object) -> Certificate:
    outcome = dataclasses.replace(certificate.outcome, **changes)
    return dataclasses.replace(certificate, outcome=outcome)


def void(before: Certificate, **changes: object) -> Certificate:
    """A regroup, with something else changed as well."""
    old = before.outcome
    same = {"round": old.round, "samples": old.samples, "state_root": old.state_root}
    outcome = dataclasses.replace(
        after(before, "abc", "abc").outcome, kind=Kind.REGROUP, contributions=(), **same
    )
    return signed(dataclasses.replace(outcome, **changes), "abc")


LIES = {
    "nothing": (),
    "no beginning": (NEXT, THIRD),
    "founded by another": (found(RUN, seat("b"), Key("b"), NO_DIGEST),),
    "of another run": (found("11" * 20, seat("a"), Key("a"), NO_DIGEST),),
    "a beginning that only claims to be one": (changed(NEXT, kind=Kind.FOUND),),
    "two beginnings": (FIRST, signed(changed(NEXT, kind=Kind.FOUND).outcome, "a")),
    "changed after signing": (FIRST, changed(NEXT, samples=10**9)),
    "signed by the next roster": (FIRST, after(FIRST, "abc", "bc")),
    "signed by nobody": (FIRST, after(FIRST, "abc", "")),
    "signed by too few": (FIRST, NEXT, after(NEXT, "abc", "a")),
    "signed by too few, provisional in a skip": (
        FIRST,
        NEXT,
        after(THIRD, "bcd", "b", provisional=True),
    ),
    "a skip by less than half": (FIRST, NEXT, signed(FIFTH.outcome, "cd"), FIFTH),
    "a skip by half of four": (
        FIRST,
        (four := after(FIRST, "abcd", "a")),
        (far := after(after(four, "abcd", "abc"), "abcd", "ab")),
        after(far, "abcd", "abc"),
    ),
    "a skip that a provisional one makes": (
        FIRST,
        NEXT,
        (way := after(THIRD, "abc", "ab", provisional=True)),
        after(way, "abc", "ab"),
    ),
    "a skip at the end": (FIRST, NEXT, after(after(NEXT, "abc", "ab"), "abc", "abc")),
    "backwards": (FIRST, NEXT, THIRD, NEXT),
    "the same again": (FIRST, NEXT, NEXT),
    "fewer samples": (FIRST, NEXT, signed(changed(THIRD, samples=0).outcome, "abc")),
    "samples that nobody contributed": (
        FIRST,
        NEXT,
        signed(changed(THIRD, samples=10**9).outcome, "abc"),
    ),
    "samples of one who says that the others were gone": (
        FIRST,
        NEXT,
        signed(changed(THIRD, samples=MAX_SAMPLES).outcome, "a", provisional=True),
    ),
    "work of strangers": (
        FIRST,
        NEXT,
        signed(
            changed(THIRD, contributions=(Contribution(peer_id="x", samples=10),)).outcome, "abc"
        ),
    ),
    "a round that nobody averaged": (FIRST, NEXT, signed(changed(THIRD, round=3).outcome, "abc")),
    "the same round again": (FIRST, NEXT, signed(changed(THIRD, round=1).outcome, "abc")),
    "a roster's change with samples": (FIRST, NEXT, void(NEXT, samples=30)),
    "a roster's change of the round": (FIRST, NEXT, void(NEXT, round=2)),
    "a roster's change of the state": (FIRST, NEXT, void(NEXT, state_root=NO_DIGEST)),
    "another branch's": (FIRST, NEXT, after(after(FIRST, "abc", "a", seed=b"x"), "abc", "a")),
}


@pytest.mark.parametrize("links", LIES.values(), ids=LIES)
def test_a_chain_that_does_not_prove_its_end_is_refused(links: tuple[Certificate, ...]) -> None:
    with pytest.raises(ValueError, match="chain"):
        verified(*links)


@pytest.mark.parametrize("kind", [Kind.REGROUP, Kind.GATHER])
def test_a_decree_that_changes_only_the_roster_is_a_link(kind: Kind) -> None:
    regrouped = void(NEXT, kind=kind)
    assert verified(FIRST, NEXT, regrouped, after(regrouped, "abc", "ab"))


def test_samples_end_at_the_bound_of_a_run() -> None:
    def full(before: Certificate) -> Certificate:
        roster = before.outcome.roster
        most = tuple(Contribution(peer_id=m.peer_id, samples=2**48) for m in roster)
        total = samples_after(before.outcome.samples, most)
        outcome = changed(after(before, "abc", ""), samples=total, contributions=most).outcome
        return signed(outcome, "abc", provisional=True)

    many = after(FIRST, "".join(map(chr, range(0x21, 0x7F))), "a")
    last = full(full(many))
    assert last.outcome.samples == MAX_SAMPLES
    assert verified(FIRST, many, full(many), last)


def test_a_majority_of_an_old_roster_proves_what_is_later() -> None:
    far = after(FOURTH, "bcd", "bcd")
    chain = verified(FIRST, NEXT, FOURTH, far)
    assert chain.newest == far


def test_a_provisional_certificate_is_a_link_but_never_a_skip() -> None:
    alone = after(THIRD, "a", "a", provisional=True)
    then = after(alone, "a", "a")
    chain = grown(NEXT, THIRD, alone, then)
    assert alone in chain.links
    assert verified(*chain.links) == chain


def test_only_what_follows_is_appended() -> None:
    chain = grown(NEXT)
    for wrong in (NEXT, FOURTH, FIRST, changed(THIRD, previous=NO_DIGEST)):
        with pytest.raises(ValueError, match="follow"):
            chain.then(wrong)


def test_a_liar_costs_no_more_than_one_wrong_link() -> None:
    made = history(*[("abc", "a")] + [("abc", "bc")] * 50)
    lie = after(made[0], "abc", "")
    asked: list[str] = []

    def counting(peer: str, domain: bytes, message: bytes, signature: bytes) -> bool:
        asked.append(peer)
        return check(peer, domain, message, signature)

    with pytest.raises(ValueError, match="link 2"):
        Chain.verified([FIRST, made[0], lie, *made * 50], RUN, "a", counting)
    assert len(asked) == 2


def test_there_is_an_end_to_what_is_read() -> None:
    same = FIRST

    def endless() -> object:
        nonlocal same
        while True:
            yield same
            same = after(same, "a", "a")

    with pytest.raises(ValueError, match=f"more than {MAX_LINKS}"):
        Chain.verified(endless(), RUN, "a", check)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="over the limit"):
        Chain.from_bytes(bytes(MAX_CHAIN_BYTES + 1), RUN, "a", check)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_a_swarm_decides_its_pruned_chain_proves(data: st.DataObject) -> None:
    newest, made = FIRST, []
    for _ in range(data.draw(st.integers(0, 12))):
        voters = [member.peer_id for member in newest.outcome.roster]
        provisional = data.draw(st.booleans())
        least = 1 if provisional else len(voters) // 2 + 1
        signers = data.draw(st.lists(st.sampled_from(voters), min_size=least, unique=True))
        roster = data.draw(st.sets(st.sampled_from("abcdef"), min_size=1))
        newest = after(newest, "".join(roster), "".join(signers), provisional=provisional)
        made.append(newest)
    chain = grown(*made)
    assert chain.newest == newest
    assert Chain.from_bytes(chain.to_bytes(), RUN, "a", check) == chain


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_mangled_bytes_are_refused_or_the_same_chain(data: st.DataObject) -> None:
    chain = grown(NEXT, THIRD, FOURTH, FIFTH)
    raw = bytearray(chain.to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if how == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del raw[at:]
    else:
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    try:
        got = Chain.from_bytes(bytes(raw), RUN, "a", check)
    except ValueError:
        return
    # Unknown fields of a certificate, or a chain cut at an earlier direct link, prove no more.
    assert got.newest.outcome in [link.outcome for link in chain.links]


def test_a_length_beyond_the_end_is_refused() -> None:
    raw = Chain.begin(FIRST).to_bytes() + struct.pack(">I", 2**31) + b"x"
    with pytest.raises(ValueError, match="cut off"):
        Chain.from_bytes(raw, RUN, "a", check)
