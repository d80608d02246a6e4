"""`SwarmOptimizer` in plain torch loops: real sessions, real DHT, one process a swarm."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coordinator_free import Recipe, Step, SwarmOptimizer, cosine
from coordinator_free.catchup import CatchUp
from coordinator_free.config import RoundConfig
from coordinator_free.gradient import GradientConfig
from coordinator_free.outer import OuterConfig
from coordinator_free.pace import LocalConfig
from coordinator_free.tensors import FlatTensors
from dht.errors import ConfigError, StateError
from model import optimizers

WAIT_S = 60.0


def model(width: int = 32) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


def batch(seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 8, generator=generator)
    return inputs, inputs[:, :4].cumsum(1)


def loss_of(net: nn.Module, seed: int) -> Tensor:
    inputs, targets = batch(seed)
    return F.mse_loss(net(inputs), targets)


def train(swarm: SwarmOptimizer, net: nn.Module, seeds: Callable[[int], int]) -> list[Step]:
    """Until the run is over; what every step did."""
    steps = []
    for number in range(100_000):
        loss_of(net, seeds(number)).backward()
        steps.append(swarm.step())
        if steps[-1].over:
            return steps
    raise AssertionError("the run does not end")


class Pair:
    """Two peers of one run, each in a thread."""

    def __init__(
        self,
        recipe: Recipe,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer | None],
        schedule: Callable[[], Callable[[int], float] | None] = lambda: None,
    ):
        self.nets = [model(), model()]
        with torch.no_grad():
            for p in self.nets[1].parameters():
                p.add_(1.0)  # a joiner gets the swarm's parameters, whatever it had
        self.steps: list[list[Step]] = [[], []]
        self._recipe = recipe
        self._optimizer = optimizer
        self._schedule = schedule
        self._link = ""
        self._linked = threading.Event()
        self.digests = ["", ""]
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(self._first), pool.submit(self._second)]:
                done.result(WAIT_S)

    def _first(self) -> None:
        net = self.nets[0]
        swarm = SwarmOptimizer(
            net,
            self._optimizer(net),
            batch_size=4,
            schedule=self._schedule(),
            recipe=self._recipe,
            host="127.0.0.1",
        )
        with swarm:
            self._link = swarm.link
            self._linked.set()
            self.steps[0] = train(swarm, net, lambda n: 2 * n)
            self.digests[0] = swarm.state.root.hex()

    def _second(self) -> None:
        assert self._linked.wait(WAIT_S)
        net = self.nets[1]
        swarm = SwarmOptimizer(
            net,
            self._optimizer(net),
            batch_size=4,
            schedule=self._schedule(),
            link=self._link,
            host="127.0.0.1",
        )
        with swarm:
            assert swarm.recipe == self._recipe
            self.steps[1] = train(swarm, net, lambda n: 2 * n + 1)
            self.digests[1] = swarm.state.root.hex()

    def rounds(self, number: int) -> list[tuple[int, list[int]]]:
        """Of one peer: each round that ended, and which of its steps were in it."""
        rounds, since = [], 0
        for at, step in enumerate(self.steps[number]):
            if step.ended is not None:
                rounds.append((step.ended.round, list(range(since, at + 1))))
                since = at + 1
        return rounds


@pytest.mark.slow
def test_a_plain_loop_trains_with_another_one() -> None:
    recipe = Recipe(
        name="two",
        round=RoundConfig(start_peers=2, rounds=12, fragments=2, codec="int2"),
        local=LocalConfig(local_steps=20, delay_steps=5),
    )
    pair = Pair(recipe, lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2))
    assert pair.digests[0] == pair.digests[1]
    ended = [step.ended for step in pair.steps[0] if step.ended is not None]
    assert [result.round for result in ended] == list(range(12))
    assert {result.members for result in ended} == {2}
    for mine, theirs in zip(pair.nets[0].parameters(), pair.nets[1].parameters(), strict=True):
        assert torch.equal(mine, theirs), "both end with what the swarm decided"
    assert loss_of(pair.nets[0], 999).item() < 0.3 * loss_of(model(), 999).item()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "sgd", "muon"])
def test_gradient_mode_is_one_process_on_all_the_samples(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 steps in fp32, to 1e-5 relative, against torch's own optimizers.

    But for Muon: torch's computes in bfloat16, hence the local one of `model` in fp32 as reference.
    """
    monkeypatch.setattr(optimizers, "_products_in", lambda device_type: torch.float32)
    settings = {
        "adamw": GradientConfig(kind="adamw", lr=1e-2, grad_clip=0, weight_decay=0.05),
        "sgd": GradientConfig(kind="sgd", lr=1e-2, momentum=0.9, grad_clip=1.0, weight_decay=0),
        "muon": GradientConfig(kind="muon", lr=1e-2, adamw_lr=1e-2, grad_clip=0, weight_decay=0),
    }
    recipe = Recipe(
        round=RoundConfig(mode="gradient", target_batch=8, start_peers=2, rounds=50, codec="fp32"),
        gradient=settings[kind],
    )
    pair = Pair(recipe, lambda net: None)
    assert pair.digests[0] == pair.digests[1]
    alone = model()
    step = reference(alone, settings[kind])
    mine, theirs = pair.rounds(0), pair.rounds(1)
    assert [round for round, _ in mine] == [round for round, _ in theirs] == list(range(50))
    for (_, firsts), (_, seconds) in zip(mine, theirs, strict=True):
        seeds = [2 * n for n in firsts] + [2 * n + 1 for n in seconds]
        alone.zero_grad()
        inputs, targets = (torch.cat(part) for part in zip(*map(batch, seeds), strict=True))
        F.mse_loss(alone(inputs), targets).backward()
        if settings[kind].grad_clip:
            nn.utils.clip_grad_norm_(alone.parameters(), settings[kind].grad_clip)
        step()
    for ours, single in zip(pair.nets[0].parameters(), alone.parameters(), strict=True):
        assert ((ours - single).norm() / single.norm()).item() < 1e-5


def reference(net: nn.Module, config: GradientConfig) -> Callable[[], object]:
    matrices = [p for p in net.parameters() if p.ndim == 2]
    vectors = [p for p in net.parameters() if p.ndim != 2]
    if config.kind == "sgd":
        return torch.optim.SGD(net.parameters(), config.lr, config.momentum, nesterov=True).step
    if config.kind == "adamw":
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, config.lr, config.betas, config.eps).step
    muon = optimizers.Muon(matrices, momentum=config.momentum, weight_decay=0.0)
    adamw = optimizers.AdamW(vectors, betas=config.betas, weight_decay=0.0)

    def step() -> None:
        muon.step(config.lr)
        adamw.step(config.adamw_lr)

    return step


@pytest.mark.slow
def test_who_leaves_early_can_take_what_all_share() -> None:
    net = model()
    recipe = Recipe(
        round=RoundConfig(start_peers=1, codec="fp32"), local=LocalConfig(local_steps=4)
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    swarm = SwarmOptimizer(net, optimizer, batch_size=4, recipe=recipe, host="127.0.0.1")
    with swarm:
        for number in range(6):
            loss_of(net, number).backward()
            swarm.step()
        flat = FlatTensors(net)
        mine = flat.read(torch.empty(flat.numel), start=0, stop=flat.numel)
        assert not torch.equal(mine, swarm.state.theta_N)
        swarm.adopt()
        flat.read(mine, start=0, stop=flat.numel)
        assert torch.equal(mine, swarm.state.theta_N)


class Watched(torch.optim.SGD):
    """Remembers the learning rate of every step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net.parameters(), lr=0.1)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


@pytest.mark.slow
def test_learning_rates_go_by_what_the_swarm_is_trained_on() -> None:
    recipe = Recipe(
        round=RoundConfig(start_peers=2, rounds=4, codec="fp32"), local=LocalConfig(local_steps=6)
    )
    optimizers: list[Watched] = []
    asked: list[list[int]] = []

    def watched(net: nn.Module) -> Watched:
        optimizers.append(Watched(net))
        return optimizers[-1]

    def schedule() -> Callable[[int], float]:
        mine: list[int] = []
        asked.append(mine)

        def half(samples: int) -> float:
            mine.append(samples)
            return 0.5

        return half

    pair = Pair(recipe, watched, schedule)
    for number in (0, 1):
        before = 0
        for round, steps in pair.rounds(number):
            each = [asked[number][at] for at in steps]
            assert each == [before + 8 * (n + 1) for n in range(len(steps))], (number, round)
            ended = pair.steps[number][steps[-1]].ended
            assert ended is not None
            before += ended.total_samples
        # A joiner's first steps are smaller: its optimizer knows nothing yet.
        rising = [0.01, 0.02, 0.03, 0.04, 0.05] if number else []
        rates = optimizers[number].rates
        wanted = rising + [0.05] * (len(rates) - len(rising))
        assert rates == pytest.approx(wanted)
        assert optimizers[number].param_groups[0]["lr"] == 0.1


def test_a_cosine_rises_and_falls() -> None:
    factor = cosine(warmup_samples=100, total_samples=1100)
    assert [factor(n) for n in (10, 100, 600, 1100, 9999)] == pytest.approx(
        [0.1, 1.0, 0.55, 0.1, 0.1]
    )
    assert cosine(warmup_samples=0, total_samples=0)(5) == 1.0
    for numbers in ((-1, 5), (10, 5), (10, 10)):
        with pytest.raises(ConfigError, match=r"at least 0|more than"):
            cosine(warmup_samples=numbers[0], total_samples=numbers[1])


def test_gradient_mode_has_the_recipe_s_schedule() -> None:
    recipe = Recipe(round=RoundConfig(mode="gradient", target_batch=8))
    with (
        pytest.raises(ConfigError, match=r"recipe\.gradient"),
        SwarmOptimizer(model(), batch_size=4, recipe=recipe, schedule=lambda samples: 1.0),
    ):
        pass


def test_a_schedule_may_go_beyond_one_but_not_be_no_number() -> None:
    net = model()
    optimizer = Watched(net)
    recipe = Recipe(round=RoundConfig(codec="fp32"), local=LocalConfig(local_steps=50))
    factors = iter([5.0, math.nan])
    swarm = SwarmOptimizer(
        net,
        optimizer,
        batch_size=4,
        recipe=recipe,
        schedule=lambda n: next(factors),
        host="127.0.0.1",
    )
    with swarm:
        loss_of(net, 0).backward()
        swarm.step()
        assert optimizer.rates == [pytest.approx(0.5)]
        with pytest.raises(ConfigError, match=r"schedule\(8\) = nan"):
            swarm.step()
        assert swarm.pace == "50: as configured"


def test_a_swarm_is_entered_once_and_before_its_first_step() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    swarm = SwarmOptimizer(net, optimizer, batch_size=4, host="127.0.0.1")
    with pytest.raises(ConfigError, match="was not entered"):
        swarm.step()
    with swarm:
        with pytest.raises(ConfigError, match="entered once"):
            swarm.enter()
        loss_of(net, 0).backward()
        assert not swarm.step().over, "the first one goes on"
    with pytest.raises(ConfigError, match="entered once"):
        swarm.enter()
    assert swarm.step().over


def test_the_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(model().parameters(), 0.1)
    with pytest.raises(ConfigError, match="none of these parameters"):
        SwarmOptimizer(model(), optimizer, batch_size=4)


def test_in_gradient_mode_there_is_no_step_of_ones_own() -> None:
    recipe = Recipe(round=RoundConfig(mode="gradient", target_batch=8, codec="fp32"))
    with (
        SwarmOptimizer(model(), batch_size=4, recipe=recipe, host="127.0.0.1") as swarm,
        pytest.raises(ConfigError, match=r"use step\(\)"),
    ):
        swarm.stepped()


@pytest.mark.slow
def test_what_is_frozen_stays_in_gradient_mode() -> None:
    net = model()
    frozen = next(net.parameters()).requires_grad_(False)
    before = frozen.clone()
    recipe = Recipe(
        round=RoundConfig(mode="gradient", target_batch=4, codec="fp32", rounds=5),
        gradient=GradientConfig(lr=0.1),
    )
    with SwarmOptimizer(net, batch_size=4, recipe=recipe, host="127.0.0.1") as swarm:
        train(swarm, net, lambda n: n)
    assert torch.equal(frozen, before)
    assert not torch.equal(list(net.parameters())[2], list(model().parameters())[2])


def test_a_joiner_that_finds_no_state_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net, other = model(), model()

    async def find(self: CatchUp, seconds: float) -> None:
        raise StateError("nobody who has the run's state could be found")

    with SwarmOptimizer(
        net, torch.optim.SGD(net.parameters(), 0.1), batch_size=4, host="127.0.0.1"
    ) as swarm:
        monkeypatch.setattr(CatchUp, "find", find)
        joiner = SwarmOptimizer(
            other,
            torch.optim.SGD(other.parameters(), 0.1),
            batch_size=4,
            link=swarm.link,
            host="127.0.0.1",
        )
        with pytest.raises(StateError, match="nobody who has"):
            joiner.enter()


@pytest.mark.slow
def test_a_run_that_is_over_leaves_its_model_also_to_who_comes_back(tmp_path: Path) -> None:
    recipe = Recipe(round=RoundConfig(codec="fp32", rounds=3), local=LocalConfig(local_steps=2))
    ends = []
    for _ in range(2):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with SwarmOptimizer(
            net, optimizer, batch_size=4, recipe=recipe, home=tmp_path, host="127.0.0.1"
        ) as swarm:
            train(swarm, net, lambda n: n)
        flat = FlatTensors(net)
        ends.append(flat.read(torch.empty(flat.numel), start=0, stop=flat.numel))
    assert torch.equal(*ends)
    assert not torch.equal(next(net.parameters()), next(model().parameters()))


@pytest.mark.slow
def test_a_joiner_s_optimizer_begins_anew() -> None:
    recipe = Recipe(
        round=RoundConfig(start_peers=2, rounds=2, codec="fp32"), local=LocalConfig(local_steps=5)
    )
    optimizers: list[torch.optim.AdamW] = []

    def used(net: nn.Module) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.AdamW(net.parameters(), lr=1e-2))
        for seed in range(50):
            loss_of(net, seed).backward()
            optimizers[-1].step()
            optimizers[-1].zero_grad()
        return optimizers[-1]

    pair = Pair(recipe, used)
    taken = [next(iter(o.state.values()))["step"].item() for o in optimizers]
    assert taken == [50 + len(pair.steps[0]), len(pair.steps[1])]


def test_processes_of_one_box_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    net = model()
    swarm = SwarmOptimizer(net, torch.optim.SGD(net.parameters(), 0.1), batch_size=1)
    with pytest.raises(ConfigError, match="2 processes of torch"), swarm:
        pass


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"local": LocalConfig(feedback="ON")}, "local.feedback = 'ON': it has to be 'auto' or"),
        ({"round": RoundConfig(mode="gradiant")}, "'diloco' or 'gradient'"),
        ({"round": RoundConfig(fragments="6")}, "round.fragments = '6': it has to be of type int"),
        ({"round": RoundConfig(rounds=1.5)}, "of type int"),
        ({"gradient": GradientConfig(betas=(0, 0.9))}, "it has to be (float, float)"),
        ({"round": {}}, "give a RoundConfig"),
        ({"gradient": GradientConfig(lr=0.1)}, 'gradient means nothing with round.mode = "diloco"'),
        (
            {"round": RoundConfig(mode="gradient", target_batch=8), "outer": OuterConfig(lr=1.0)},
            'outer means nothing with round.mode = "gradient"',
        ),
        (
            {
                "round": RoundConfig(mode="gradient", target_batch=8),
                "local": LocalConfig(work_s=3.0),
            },
            'work_s = 3.0 means nothing in mode = "gradient"',
        ),
    ],
)
def test_a_recipe_that_nobody_could_join_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        Recipe(**settings)


@pytest.mark.slow
def test_another_model_or_a_link_to_nowhere_is_told_in_one_line(tmp_path: Path) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with SwarmOptimizer(net, optimizer, batch_size=1, home=tmp_path, host="127.0.0.1") as swarm:
        other = model(width=16)
        joiner = SwarmOptimizer(
            other,
            torch.optim.SGD(other.parameters(), 0.1),
            batch_size=1,
            link=swarm.link,
            host="127.0.0.1",
        )
        with pytest.raises(ConfigError, match="names or shapes") as caught, joiner:
            pass
        assert "\n" not in str(caught.value)
        averaging = SwarmOptimizer(model(), batch_size=1, link=swarm.link, host="127.0.0.1")
        with pytest.raises(ConfigError, match="give the optimizer"), averaging:
            pass
    assert swarm.step().over, "after the end no step counts"


@pytest.mark.slow
def test_a_run_goes_on_from_its_home(tmp_path: Path) -> None:
    """The only peer stops in the middle; started again, it is at the round where it was."""
    recipe = Recipe(round=RoundConfig(rounds=6, codec="int4"), local=LocalConfig(local_steps=3))

    def go(stop_after: int) -> list[Step]:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        swarm = SwarmOptimizer(
            net, optimizer, batch_size=4, recipe=recipe, home=tmp_path, host="127.0.0.1"
        )
        steps = []
        with swarm:
            while not steps or not steps[-1].over:
                loss_of(net, len(steps)).backward()
                steps.append(swarm.step())
                ended = steps[-1].ended
                if ended is not None and ended.round == stop_after:
                    return steps
        return steps

    first = [step.ended.round for step in go(2) if step.ended is not None]
    second = [step.ended.round for step in go(99) if step.ended is not None]
    assert first == [0, 1, 2]
    assert second == [3, 4, 5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size = 0: use a whole number"),
        ({"batch_size": 1, "link": "shoal://nonsense"}, "run id"),
        ({"batch_size": 1, "recipe": Recipe(), "link": "shoal://x"}, "leave recipe or link out"),
        ({"batch_size": 8.5}, "batch_size = 8.5: use a whole number"),
        ({"batch_size": True}, "batch_size = True: use a whole number"),
        ({"batch_size": 2**70}, "from 1 to 1048576"),
        ({"batch_size": "8"}, "batch_size = '8': use a whole number"),
        ({"batch_size": 1, "workers": 0}, "workers = 0"),
        ({"batch_size": 1, "upload_bps": -1}, "upload_bps = -1"),
        ({"batch_size": 1, "download_bps": float("nan")}, "download_bps = nan"),
        ({"batch_size": 1, "recipe": {}}, "recipe = {}: give a Recipe"),
        ({"batch_size": 1, "link": 5}, "link = 5: give a str"),
        ({"batch_size": 1, "announce_hosts": ("example.org",)}, "announce_hosts needs a port"),
        ({"batch_size": 1, "schedule": 0.5}, "schedule: give a function"),
        ({"batch_size": 1, "hidden_matrices": [torch.zeros(2, 2)]}, "no matrix of this model"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    options: dict[str, object], says: str
) -> None:
    net = model()
    with pytest.raises(ConfigError, match=says) as caught:
        SwarmOptimizer(net, torch.optim.SGD(net.parameters(), 0.1), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_recipe_is_read_back_as_it_was_published() -> None:
    recipe = Recipe(
        name="a name",
        round=RoundConfig(mode="gradient", target_batch=64, codec="fp32"),
        gradient=GradientConfig(kind="muon", betas=(0.8, 0.9)),
    )
    assert Recipe.load(recipe.dump("layout")) == (recipe, "layout")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tables: tables.pop("shoal library run"), "shoal join"),
        (lambda tables: tables.update(extra=1), "unknown"),
        (lambda tables: tables["round"].update(extra=1), "install the same shoal"),
        (lambda tables: tables["round"].update(fragments="six"), "fragments"),
        (lambda tables: tables["round"].update(codec="int3"), "int3"),
        (lambda tables: tables["round"].update(fragments=0), "fragments = 0: use 1 to 4096"),
        (lambda tables: tables["round"].update(suspect_s=float("nan")), "suspect_s = nan"),
        (lambda tables: tables["round"].update(rounds=10**400), "rounds = 1000"),
        (lambda tables: tables["local"].update(delay_steps=-1), "delay_steps = -1"),
        (lambda tables: tables["gradient"].update(betas=[0.9]), "betas"),
        (lambda tables: tables["gradient"].update(betas=["a", "b"]), "betas"),
        (lambda tables: tables["gradient"].update(total_samples=10**400), "gradient"),
        (lambda tables: tables["local"].update(feedback="off"), "fed back"),
        (lambda tables: tables["outer"].update(lr=-1.0), "outer"),
        (lambda tables: tables.update(name=""), "printable"),
        (lambda tables: tables.update(round=[]), "round"),
    ],
)
def test_what_a_hostile_creator_published_is_refused(
    change: Callable[[dict[str, object]], object], says: str
) -> None:
    tables = json.loads(Recipe().dump("layout"))
    change(tables)
    with pytest.raises(ConfigError, match=says) as caught:
        Recipe.load(json.dumps(tables).encode())
    assert "\n" not in str(caught.value)


def test_what_is_nested_without_end_is_no_run() -> None:
    with pytest.raises(ConfigError, match="shoal join"):
        Recipe.load(b"[" * 30_000)
