from __future__ import annotations

import contextlib
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator_free.codecs import codec
from dht.errors import ConfigError
from dht.records import MAX_RUN_FILE_BYTES
from peer import cli, runfile
from peer.config import RunConfig, load, localised, published


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, "run.toml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("run.toml")
    return str(caught.value)


def test_the_starter_says_what_the_defaults_are() -> None:
    assert load(runfile.starter(), "run.toml") == load("", "run.toml") == RunConfig()


def test_what_a_run_file_says_arrives() -> None:
    config = load(
        """
        name = "mine"
        seed = 7
        [model]
        kind = "transformers"
        name = "gpt2"
        overrides = { n_positions = 64 }
        [optimizer]
        kind = "adamw"
        lr = 1
        betas = [0.8, 0.9]
        [training]
        batch_size = 3
        [round]
        local_steps = 5
        fragments = 2
        delay_steps = 1
        mixing = 0.25
        feedback = "on"
        start_peers = 2
        codec = "int8"
        [outer]
        momentum = 0.9
        """,
        "run.toml",
    )
    assert (config.name, config.local.local_steps, config.trainer.seed) == ("mine", 5, 7)
    assert config.trainer.model.overrides == {"n_positions": 64}
    assert config.trainer.optimizer.lr == 1.0
    assert isinstance(config.trainer.optimizer.lr, float)
    assert config.trainer.optimizer.betas == (0.8, 0.9)
    assert config.trainer.batch_size == 3
    assert (config.round.start_peers, config.round.codec) == (2, "int8")
    assert (config.round.fragments, config.local.delay_steps, config.local.mixing) == (2, 1, 0.25)
    assert config.local.feedback == "on"
    assert config.outer.momentum == 0.9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name = ", "not valid TOML"),
        ("nmae = 'x'", "unknown field 'nmae': did you mean 'name'?"),
        ("modle = 3", "unknown field 'modle': did you mean 'model'?"),
        ("zzz = 1", "known are name, seed, model"),
        ("model = 3", "model = 3 is a value: write a table [model]"),
        (
            "[round]\nlocalsteps = 3",
            "[round] unknown field 'localsteps': did you mean 'local_steps'?",
        ),
        ("[round]\nrounds = '3'", "rounds = '3' is text: write a whole number, without quotes"),
        ("[round]\nrounds = 1.5", "rounds = 1.5 is a number: write a whole number"),
        ("[round]\nrounds = true", "rounds = true is true or false"),
        ("[round]\ncodec = 4", "codec = 4 is a number: write it in quotes"),
        ("[round]\ncodec = 'int3'", "[round] codec = 'int3'"),
        ("[round]\nlocal_steps = -1", "local_steps = -1: use 0 to"),
        ("[round]\nlocal_steps = 5", "[round] local_steps = 5 is less than fragments = 6"),
        (f"a = {'[' * 20_000}", "nested too deeply"),
        ("[round]\ndelay_steps = 0\nmode = 'gradient'", '[round] mode = "gradient" needs a target'),
        (
            "[round]\nmode = 'gradient'\ntarget_batch = 64\nmixing = 0.9",
            "mixing = 0.9 means nothing",
        ),
        (
            "[round]\nmode = 'gradient'\ntarget_batch = 64\n[outer]\nlr = 1.0",
            '[outer] means nothing with mode = "gradient"',
        ),
        ("[training]\nmicro_batch = 1000000000", "micro_batch = 1000000000: use 0 to"),
        ("[training]\nmicro_batch = 9", "micro_batch = 9 is more than batch_size = 8"),
        ("[optimizer]\ntotal_samples = 100", "must be more than warmup_samples = 128"),
        ("[optimizer]\nlr = 101", "lr = 101.0 must be a number from 0 to 100"),
        ("[outer]\nlr = 11", "lr = 11.0: use 0 to 10"),
        ("[round]\nfeedback = 'off'", '[round] codec = "int2" needs what it cuts off fed back'),
        ("[round]\nfeedback = 'never'", "feedback = 'never': use 'auto' or 'on' or 'off'"),
        ("[round]\nstart_peers = -1", "start_peers = -1: use 1 to"),
        ("[round]\ngrace_s = nan", "grace_s = nan: use a finite number"),
        ("[optimizer]\nmomentum = nan", "momentum = nan: use a finite number"),
        ("[optimizer]\nbetas = [nan, 0.9]", "must be at least 0 and below 1"),
        (f"seed = {'9' * 5000}", "too many digits"),
        (f"seed = 0x{'f' * 5000}", "run.toml: 'seed' has more than 64 bits"),
        (f"[optimizer]\nlr = 1{'0' * 400}", "'lr' has more than 64 bits"),
        (f"[model.overrides]\na = [1{'0' * 400}]", "'a' has more than 64 bits"),
        (f"[{'a.' * 5000}a]", "nested too deeply"),
        (f"[model.overrides]\n{'a.' * 5000}a = 1", "nested too deeply"),
        ("[model.overrides]\na = 2020-01-01", "use numbers, text"),
        ("[model.overrides]\na = { b = nan }", "use finite numbers"),
        ('[model.overrides]\na = ["\\u0000"]', "NUL"),
        ("[outer]\nmomentum = 1", "momentum = 1.0: use 0 to 0.999"),
        ("[model]\nlayers = 1000000000", "layers = 1000000000: use 1 to"),
        ("[model]\nheads = 5", "[model] model width = 96"),
        ("[model]\nkind = 'rnn'", "kind = 'rnn': use 'gpt' or 'transformers'"),
        ("[model]\nlayers = {a = 1}", "is not allowed"),
        ("[model]\noverrides = 3", "is no table"),
        ("[optimizer]\nkind = 'rmsprop'", "use 'muon' or 'adamw'"),
        ("[optimizer]\nbetas = [0.9]", "is not a list of 2"),
        ("[optimizer]\nbetas = [0.9, 'x']", "without quotes"),
        ("[data]\nvalidation_fraction = 0.7", "at most 0.5"),
        ('[data]\npath = "a\\u0000b"', "NUL"),
        ("[training]\ndevice = 'cuda'", "unknown field 'device'"),
        ("name = ''", "use 1 to 64"),
        ('name = "a\\nb"', "use 1 to 64"),
        (f"name = '{'x' * 100}'", "use 1 to 64"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(text: str, says: str) -> None:
    assert says in refused(text)


def test_the_text_is_published_as_it_was_written() -> None:
    text = runfile.starter()
    assert published(text, load(text, "run.toml")) == text
    assert len(text.encode()) < MAX_RUN_FILE_BYTES


def test_nobody_learns_where_the_data_lie() -> None:
    text = "[data]\npath = '/home/somebody/private/words.txt'\n"
    shown = published(text, load(text, "run.toml"))
    assert "somebody" not in shown
    assert load(shown, "run.toml").trainer.data.path == "words.txt"


def test_own_data_given_on_the_command_line_are_published_by_name() -> None:
    config = localised(load("", "run.toml"), data="/home/somebody/words.txt", device="cpu")
    assert config.trainer.data.path == "/home/somebody/words.txt"
    assert config.trainer.device == "cpu"
    shown = published(runfile.starter(), config)
    assert load(shown, "run.toml").trainer.data.path == "words.txt"


def test_the_demo_offers_the_codecs_that_exist() -> None:
    for name in cli.CODECS:
        assert codec(name).name == name
    with pytest.raises(ConfigError) as caught:
        codec("none")
    assert all(name in str(caught.value) for name in cli.CODECS)


def test_run_file_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match="'shoal init"):
        runfile.read(path)
    runfile.write_starter(path)
    assert runfile.read(path) == runfile.starter()
    with pytest.raises(ConfigError, match="left as it is"):
        runfile.write_starter(path)
    with pytest.raises(ConfigError, match="cannot write"):
        runfile.write_starter(tmp_path / "no" / "run.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        runfile.read(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        runfile.read(path)
    path.write_bytes(b"#" * (runfile.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="longer than"):
        runfile.read(path)


values = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.booleans()
)
names = st.from_regex(r"[a-z_]{1,10}", fullmatch=True)
plain = st.dictionaries(names, values | st.lists(st.integers(0, 9), max_size=3), max_size=4)


@given(plain, st.dictionaries(names, plain, max_size=3))
def test_what_is_dumped_is_read_back(
    top: dict[str, object], tables: dict[str, dict[str, object]]
) -> None:
    content = {**top, **tables}
    assert tomllib.loads(runfile.dump(content)) == content


@given(st.text(max_size=300))
def test_no_text_does_worse_than_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        load(text, "run.toml")
