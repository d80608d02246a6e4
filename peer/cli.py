"""The command `shoal`.

Only what the terminal wants lives here: options, exit statuses, logging, and the one place where
the environment is read. Guarantees: 0 for done or politely stopped, 1 for a run that failed, 2 for
a person's mistake, 130 for Ctrl-C before there was anything to leave; errors are one line on
stderr, never a traceback without -v. What is slow to load (torch, hivemind) is loaded by the
commands that train, so that the others answer at once.
"""

from __future__ import annotations

import contextlib
import json as json_
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from dht.errors import ConfigError, SwarmError
from dht.link import Link, host_component, peer_address
from model.processes import processes, rank
from peer import runfile
from peer.link_file import wait_for_link_file

if TYPE_CHECKING:
    from peer.homes import Home
    from peer.status import Status

LINK_FILE_S = 120.0
STOP_S = 30.0
CODECS = ("fp32", "bf16", "int8", "int4", "int2", "int1", "top64", "top128")

_Command = TypeVar("_Command", bound=Callable[..., Any])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `shoal` and end the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _flush_and_exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Run `shoal` with these arguments; returns the exit status."""
    verbose = any(part in ("-v", "--verbose", "-vv") for part in arguments)
    command = _command_name(arguments)
    try:
        status = cli.main(args=arguments, prog_name="shoal", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "shoal"
        _complain(path, f"{_usage(error)}; see '{path} --help'")
        return 2
    except click.ClickException as error:
        _complain(command, error.format_message())
        return 2
    except ConfigError as error:
        if verbose:
            logging.getLogger(__name__).info("cli.config_error", exc_info=error)
        _complain(command, str(error))
        return 2
    except SwarmError as error:
        if verbose:
            logging.getLogger(__name__).info("cli.swarm_error", exc_info=error)
        _complain(command, str(error))
        return 1
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:  # the outermost supervisor: a bug of ours
        if verbose:
            logging.getLogger(__name__).exception("cli.bug")
        hint = "" if verbose else "; run with -v for the traceback"
        _complain(command, f"unexpected {type(error).__name__}: {error}{hint}")
        return 1


class _Verbatim(click.Command):
    r"""Lets a raw docstring say \b, click's mark of a paragraph that is not to be wrapped."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings["help"] = (settings.get("help") or "").replace("\\b", "\b")
        super().__init__(*arguments, **settings)


class _Group(_Verbatim, click.Group):
    """Commands in the order of use, and a did-you-mean."""

    command_class = _Verbatim

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0] if arguments else ""
        if name and not name.startswith("-") and name not in self.commands:
            import difflib

            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"unknown command {name!r}{hint}", context)
        return super().resolve_command(context, arguments)


class _Number(click.FloatRange):
    """A range without NaN, which compares with nothing, and without infinity."""

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> float:
        number: float = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", parameter, context)
        return number


def _version() -> str:
    try:
        return version("shoal")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


@click.group(
    cls=_Group,
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(_version(), prog_name="shoal", message="shoal %(version)s")
@click.pass_context
def cli(context: click.Context) -> int:
    r"""Train one neural network on many machines, with nobody in charge.

    Peers find each other over a DHT, each trains on its own part of the text, and they average what
    they learnt round after round. There is no server: any peer may leave, also the first.

    \b
    See it work, on this machine alone:
        shoal demo

    \b
    A run of your own:
        shoal init run.toml          write a run file to start from
        shoal create run.toml        be its first peer; prints a join link
        shoal join 'shoal://...'     in another terminal or on another machine
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        return 2
    return 0


def _verbose(command: _Command) -> _Command:
    def configure(context: click.Context, parameter: click.Parameter, value: int) -> int:
        _configure_logging(value)
        return value

    return click.option(
        "-v",
        "--verbose",
        count=True,
        callback=configure,
        expose_value=False,
        is_eager=True,
        help="Say on stderr what happens; -vv says more.",
    )(command)


def _json(command: _Command) -> _Command:
    return click.option(
        "--json", "json", is_flag=True, help="One JSON object per line on stdout, nothing else."
    )(command)


def _network_options(command: _Command) -> _Command:
    """The options of all who take part in a run."""
    options = [
        click.option(
            "--home",
            type=click.Path(file_okay=False, path_type=Path),
            help="Folder of this peer's identity; default: a free one of ~/.shoal/peer-0, "
            "peer-1, ...",
        ),
        click.option(
            "--host",
            default="0.0.0.0",
            show_default="all interfaces",
            help="IP address to listen on; 127.0.0.1 keeps the run on this machine.",
        ),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=0,
            show_default="a free one",
            help="TCP port for finding peers (libp2p).",
        ),
        click.option(
            "--grpc-port",
            type=click.IntRange(0, 65535),
            default=0,
            show_default="a free one",
            help="TCP port for exchanging tensors.",
        ),
        click.option(
            "--upload-limit",
            "upload_mbps",
            type=_Number(0),
            default=0,
            show_default="none",
            metavar="MBPS",
            help="Most megabits per second sent, over all connections.",
        ),
        click.option(
            "--download-limit",
            "download_mbps",
            type=_Number(0),
            default=0,
            show_default="none",
            metavar="MBPS",
            help="Most megabits per second received, over all connections.",
        ),
        click.option(
            "--announce-host",
            "announce_hosts",
            multiple=True,
            metavar="NAME",
            help="Host name or IP address under which others reach this machine; needs --port. "
            "May be repeated.",
        ),
        _json,
        _verbose,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _node_options(command: _Command) -> _Command:
    """The options that `create` and `join` share."""
    options = [
        _network_options,
        click.option(
            "--serve-mbps",
            type=_Number(0),
            default=0,
            show_default="no cap",
            help="Most megabits per second for newcomers that download the model from this peer; "
            "what training itself sends is not capped.",
        ),
        click.option(
            "--data",
            type=click.Path(exists=True, path_type=Path),
            help="Text file, or folder of them, to train on.",
        ),
        click.option(
            "--allow-download",
            is_flag=True,
            help="Fetch the model that the run names from the Hugging Face hub, if it is not here.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1, 4096),
            help="Processor threads for training; default: all.",
        ),
        click.option(
            "--checkpoint-every",
            type=click.IntRange(0, 1_000_000),
            default=1,
            show_default=True,
            metavar="ROUNDS",
            help="Save the model after so many rounds, for when all peers stop; 0: never.",
        ),
        click.option(
            "--keep-checkpoints",
            type=click.IntRange(1, 1_000_000),
            default=3,
            show_default=True,
            metavar="COUNT",
            help="How many of the last ones stay on disk.",
        ),
        click.option(
            "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 or auto."
        ),
        click.option(
            "--supervised",
            type=click.Path(path_type=Path),
            hidden=True,
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@click.argument(
    "path", default="run.toml", type=click.Path(dir_okay=False, path_type=Path), metavar="[PATH]"
)
@_verbose
def init(path: Path) -> None:
    r"""Write a commented run file to start from.

    PATH is run.toml unless you name another. An existing file is left as it is.

    \b
    Example:
        shoal init my-run.toml
    """
    runfile.write_starter(path)
    click.echo(f"wrote {path}; change what you like, then: shoal create {path}")


@cli.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN.toml")
@click.option(
    "--link-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the join link to this file.",
)
@click.option(
    "--new", is_flag=True, help="Begin a new run even if this peer created one from this file."
)
@_node_options
def create(path: Path, link_file: Path | None, new: bool, **options: Any) -> int:
    r"""Create a run and train as its first peer.

    Signs and publishes RUN.toml, prints the link with which others join, and trains until the run
    ends or you press Ctrl-C. The run goes on as long as any peer is in it; started again with the
    same file, this peer goes back to it, and if all had stopped, goes on from its newest
    checkpoint. 'shoal init' writes a RUN.toml.

    \b
    Example:
        shoal create run.toml
    """
    if rank():
        return _follow(options, run_file=path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_speaking_for_a_box())
        # Before anything slow: a missing file or a slip in it should show at once.
        text = runfile.read(path)
        tables = runfile.parse(text, str(path))
        if link_file is not None and not link_file.parent.is_dir():
            raise ConfigError(
                f"cannot write the link file {link_file}: there is no folder {link_file.parent}; "
                "make it first, or choose another --link-file"
            )
        published = _published(path, text, tables, options["data"])
        node_options = stack.enter_context(_taking_part(options, published))
        return _run_node(node_options, run_file=path, link_file=link_file, new=new)


@cli.command()
@click.argument("link", required=False)
@click.option(
    "--link-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Read the link from this file, which may appear up to {LINK_FILE_S:.0f} s later.",
)
@_node_options
def join(link: str | None, link_file: Path | None, **options: Any) -> int:
    r"""Join a run and train until it ends or you press Ctrl-C.

    LINK is what 'shoal create' printed; put it in quotes. This machine fetches the run's settings
    and its current model from the peers that are there, and takes part from the next round on.
    Ctrl-C leaves politely: the others go on at once. If all peers of a run have stopped, whichever
    is started again with the same LINK goes on from its newest checkpoint.

    With several GPUs, torchrun makes them one peer:

    \b
    Examples:
        shoal join 'shoal://5f0c...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3...'
        torchrun --nproc-per-node 4 --no-python shoal join 'shoal://5f0c...'
    """
    if (link is None) == (link_file is None):
        problem = "missing LINK" if link is None else "both LINK and --link-file given"
        raise click.UsageError(problem, click.get_current_context())
    if rank():
        return _follow(options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_speaking_for_a_box())
        parsed = Link.parse(link) if link is not None else None
        shown = parsed
        if link_file is not None:
            with contextlib.suppress(ConfigError):  # it may appear later
                shown = wait_for_link_file(link_file, 0.0, should_stop=lambda: False)
        run_id = shown.run_id if shown else ""
        node_options = stack.enter_context(_taking_part(options, run_id=run_id))
        if parsed is None:
            assert link_file is not None
            parsed = wait_for_link_file(link_file, LINK_FILE_S, should_stop=lambda: False)
        assert parsed is not None
        return _run_node(node_options, link=parsed)


@cli.command()
@click.argument("link")
@click.option(
    "--threads",
    type=click.IntRange(1, 4096),
    help="Processor threads for adding up; default: all but one.",
)
@_network_options
def assist(link: str, **options: Any) -> int:
    r"""Help a run without training: add up for peers behind slow links.

    Needs no GPU and no data, but a good link that others can dial. LINK is what 'shoal create'
    printed; put it in quotes. Runs until you press Ctrl-C, and may come and go at any time.

    \b
    Example:
        shoal assist 'shoal://5f0c...?peer=/ip4/203.0.113.7/tcp/4001/p2p/12D3...'
    """
    _refuse_torchrun("assist")
    parsed = Link.parse(link)
    _check_way(options)
    with _claim(options["home"], None, parsed.run_id) as home:
        from coordinator_free.network import NetworkConfig
        from peer import output
        from peer.assist import AssistConfig, Helper

        helpers: list[Helper] = []

        def leave() -> None:  # nobody reads our output any more
            for one in helpers:
                one.stop()

        helper = Helper(
            AssistConfig(
                network=NetworkConfig(
                    identity_path=home.identity_path,
                    host=options["host"],
                    port=options["port"],
                    announce_hosts=options["announce_hosts"],
                    link=parsed,
                    relay=_relays(options),
                ),
                grpc_port=options["grpc_port"],
                upload_bps=_bps(options["upload_mbps"]),
                download_bps=_bps(options["download_mbps"]),
                workers=options["threads"] or max(1, (os.cpu_count() or 2) - 1),
            ),
            home,
            output.lines(json=options["json"], on_broken=leave),
        )
        helpers.append(helper)
        return helper.run()


@cli.command()
@click.option("--peers", type=click.IntRange(1, 64), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(1), help="End after so many rounds.  [default: 8]")
@click.option("--minutes", type=_Number(0, min_open=True), help="End after so long.")
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="Text file, or folder of them, to train on; default: the source code of Python's "
    "standard library.",
)
@click.option("--codec", type=click.Choice(CODECS), help="What travels between the peers.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), help="Of the initial model, shards and chaos."
)
@click.option(
    "--chaos", is_flag=True, help="Kill, freeze and revive peers at random while they train."
)
@click.option("--local-steps", type=click.IntRange(1, 100_000), help="Steps between averagings.")
@_json
@_verbose
def demo(**options: Any) -> int:
    r"""Watch a swarm train on this machine.

    Starts some peers, each a process of its own with its own identity. They find each other over a
    DHT on 127.0.0.1, each trains on its own part of the text, and they average every round without
    a server among them. You see the loss fall, and every peer end every round with the same digest:
    bit for bit the same model. Nothing stays behind at the end.

    \b
    Examples:
        shoal demo
        shoal demo --peers 3 --minutes 2
        shoal demo --rounds 6 --json
        shoal demo --peers 5 --minutes 5 --chaos
    """
    _refuse_torchrun("demo")
    if options["rounds"] and options["minutes"]:
        raise click.UsageError("give --rounds or --minutes, not both", click.get_current_context())
    _check_data(options["data"])
    from peer.demo import DEFAULT_ROUNDS, DemoConfig, run_demo

    if not options["minutes"]:
        options["rounds"] = options["rounds"] or DEFAULT_ROUNDS
    given = {name: value for name, value in options.items() if value is not None}
    if "data" in given:
        given["data"] = str(given["data"].resolve())
    verbose = click.get_current_context().get_parameter_source("verbose")
    return run_demo(DemoConfig(**given, verbose=verbose is click.core.ParameterSource.COMMANDLINE))


@cli.command()
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Look here instead of in ~/.shoal.",
)
@_json
@_verbose
def status(home: Path | None, json: bool) -> int:
    r"""Show what the daemons of this machine are doing.

    Shows those whose state is in ~/.shoal; for one that was started with --home, give the same
    --home here. Exit status 1 when none is running.

    \b
    Example:
        shoal status
    """
    rows = []
    for path in _homes(home):
        row = _look(path)
        if row is not None:
            rows.append(row)
    if json:
        for row in rows:
            click.echo(json_.dumps(row.to_dict()))
    elif rows:
        from rich.console import Console

        from peer.display import chosen_lines, status_table

        console = Console()
        console.print(status_table(rows))
        for line in chosen_lines(rows):
            console.print(line, soft_wrap=True)
    if not rows:
        _note(f"no daemon is running in {_root(home)}")
        return 1
    return 0


@cli.command()
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Look here instead of in ~/.shoal.",
)
@_verbose
def link(home: Path | None) -> int:
    r"""Print the join links of the daemons of this machine, as they are now.

    A link names the peers of this machine and others that they know, so that it leads to the run
    even after one of them has gone. One line for each run; exit status 1 when none is running.

    \b
    Example:
        shoal link
    """
    rows = [row for row in map(_look, _homes(home)) if row is not None and row.link]
    for run in dict.fromkeys(row.run for row in rows):
        click.echo(Link.merged([Link.parse(row.link) for row in rows if row.run == run]))
    if not rows:
        _note(f"no daemon that can be joined is running in {_root(home)}")
    return 0 if rows else 1


@cli.command()
@click.option(
    "--home",
    type=click.Path(file_okay=False, path_type=Path),
    help="Look here instead of in ~/.shoal.",
)
@click.option("--peer", metavar="ID", help="Only this peer: its id, or the end of it.")
@_verbose
def stop(home: Path | None, peer: str | None) -> int:
    r"""Stop the daemons of this machine, politely.

    Each says goodbye to the others of its run, which go on without it. Waits until they have ended.

    \b
    Examples:
        shoal stop
        shoal stop --peer k7Xw9a
    """
    from peer.control import ask_stop
    from peer.homes import is_running, read_daemon_file, terminate

    wanted = (peer or "").removeprefix("..")
    if peer is not None and not wanted:
        raise click.UsageError("--peer needs a peer id, or its end", click.get_current_context())
    asked: dict[Path, int] = {}
    for path in _homes(home):
        row = _look(path)
        if row is None or not row.peer.endswith(wanted):
            continue
        daemon = read_daemon_file(path)
        heard = daemon is not None and ask_stop(daemon)
        pid = row.pid if heard else terminate(path)  # while it starts, nobody listens yet
        asked[path] = pid or row.pid
    if not asked:
        which = f"no daemon with peer id {peer}" if peer else "no daemon"
        _note(f"{which} is running in {_root(home)}")
        return 2 if peer else 0
    deadline = time.monotonic() + STOP_S
    while asked and time.monotonic() < deadline:
        for path in [path for path in asked if not is_running(path)]:
            click.echo(f"stopped process {asked.pop(path)}")
        time.sleep(0.05)
    for path, pid in asked.items():
        row = _look(path)
        if row is not None and row.phase == "saving":
            _note(f"process {pid} is still saving the model, and ends when that is done")
        else:
            _note(f"process {pid} has not ended within {STOP_S:.0f} s: kill {pid}")
    return 1 if asked else 0


@cli.command(hidden=True)
@click.argument("target", required=False, metavar="LINK_OR_ADDRESS")
@click.option(
    "--link-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Ask the peer that this file's link names; it may appear within the timeout.",
)
@click.option("--timeout", "timeout_s", type=_Number(0.1, 600), default=10.0)
@_verbose
def ping(target: str | None, link_file: Path | None, timeout_s: float) -> int:
    r"""Ask a peer for a sign of life.

    Exit status 0 when its DHT node (not only its port) answers in time, else 1; 2 when there is no
    link file in that time. For health checks.

    \b
    Examples:
        shoal ping /ip4/127.0.0.1/tcp/4001/p2p/12D3KooW...
        shoal ping --link-file link
    """
    if (target is None) == (link_file is None):
        given = "missing LINK_OR_ADDRESS", "both LINK_OR_ADDRESS and --link-file given"
        problem = given[link_file is not None]
        raise click.UsageError(problem, click.get_current_context())
    if link_file is not None:
        link = wait_for_link_file(link_file, timeout_s, should_stop=lambda: False)
        assert link is not None
        target = link.peers[0]
    assert target is not None
    address = peer_address(target)
    from peer.ping import ping_once

    took_s = ping_once(address, timeout_s)
    click.echo(f"{address.rsplit('/', 1)[-1]} answered in {took_s * 1000:.1f} ms")
    return 0


# -- what the commands share


def _refuse_torchrun(command: str) -> None:
    if rank():
        raise click.exceptions.Exit(2)  # rank 0 says why
    if processes() > 1:
        raise ConfigError(
            f"not for torchrun: start 'shoal {command}' by itself; only 'shoal create' and "
            "'shoal join' make one peer of its processes"
        )


@contextlib.contextmanager
def _speaking_for_a_box() -> Iterator[None]:
    """Rank 0: whatever fails here, the others shall not wait for it."""
    try:
        yield
    except BaseException:
        if processes() > 1:
            from model.box import Crew

            Crew().close()
        raise


def _follow(options: dict[str, Any], run_file: Path | None = None) -> int:
    from peer.follower import follow

    follow(
        rank=rank(),
        run_file=run_file,
        data=str(options["data"].resolve()) if options["data"] else "",
        device=options["device"],
        threads=options["threads"] or 0,
        allow_download=options["allow_download"],
    )
    return 0


@contextlib.contextmanager
def _taking_part(
    options: dict[str, Any], published: str | None = None, run_id: str = ""
) -> Iterator[dict[str, Any]]:
    """Check the cheap things, claim a home and listen to the demo; before the slow imports.

    Args:
        options: of the command.
        published: the run file that `create` publishes, None for `join`.
        run_id: what `join` joins, where that is known already.
    """
    _check_way(options)
    _check_data(options["data"])
    if not options["device"].strip():
        raise ConfigError("--device is empty: use auto, cpu, cuda or cuda:1")
    from coordinator_free import failpoints

    failpoints.arm(os.environ.get("SHOAL_FAILPOINTS", ""))
    options["supervision"] = supervision = None
    folder = options.pop("supervised")
    if folder is not None:
        from peer.supervision import Supervision

        # Before anything is put into the folder, which another orphan might just be removing.
        options["supervision"] = supervision = Supervision(folder)
    with _claim(options["home"], published, run_id) as home:
        from dht.identity import Identity

        Identity.load_or_create(home.identity_path)
        if supervision is not None:
            supervision.start()
        options["claimed"] = home
        try:
            yield options
        finally:
            if supervision is not None:
                home.release()
                supervision.clean_up()


def _run_node(
    options: dict[str, Any],
    *,
    run_file: Path | None = None,
    link: Link | None = None,
    link_file: Path | None = None,
    new: bool = False,
) -> int:
    if options["threads"]:
        # Before torch is loaded, which otherwise starts a thread per core.
        os.environ.setdefault("OMP_NUM_THREADS", str(options["threads"]))
    from coordinator_free.network import NetworkConfig
    from peer import output
    from peer.node import Node, NodeConfig

    home: Home = options["claimed"]
    nodes: list[Node] = []

    def leave() -> None:  # nobody reads our output any more
        for one in nodes:
            one.stop()

    node = Node(
        NodeConfig(
            network=NetworkConfig(
                identity_path=home.identity_path,
                host=options["host"],
                port=options["port"],
                announce_hosts=options["announce_hosts"],
                link=link,
                relay=_relays(options),
            ),
            run_file=run_file,
            grpc_port=options["grpc_port"],
            serve_bps=_bps(options["serve_mbps"]),
            upload_bps=_bps(options["upload_mbps"]),
            download_bps=_bps(options["download_mbps"]),
            link_file=link_file,
            new=new,
            data=str(options["data"].resolve()) if options["data"] else "",
            device=options["device"],
            allow_download=options["allow_download"],
            threads=options["threads"] or 0,
            checkpoint_every=options["checkpoint_every"],
            keep_checkpoints=options["keep_checkpoints"],
        ),
        home,
        output.choose(json=options["json"], on_broken=leave),
        supervision=options["supervision"],
    )
    nodes.append(node)
    return node.run()


def _root(home: Path | None) -> Path:
    if home is not None:
        return home
    return Path(os.environ.get("SHOAL_HOME") or Path.home() / ".shoal")


def _claim(home: Path | None, published: str | None, run_id: str) -> Home:
    from peer.homes import Home, claim_slot

    if home is not None:
        return Home.claim(home)
    run_file = published.encode() if published is not None else None
    return claim_slot(_root(None), run_file, run_id)


def _published(path: Path, text: str, tables: runfile.Tables, data: Path | None) -> str:
    """The run file at `path` as it will be published, to find the folder that did so before."""
    table = tables.get("data")
    own = table.get("path") if isinstance(table, dict) else None
    if data is not None:
        place = str(data.resolve())
    else:  # as a node sees it: beside the run file
        place = str(path.parent / own) if own and isinstance(own, str) else ""
    try:
        return runfile.published(text, place)
    except TypeError:  # what a run file cannot hold; the node says so, naming the field
        return text


def _homes(home: Path | None) -> list[Path]:
    from peer.homes import known_homes

    return known_homes(_root(home))


def _look(home: Path) -> Status | None:
    """What the daemon in this folder does; None, said on stderr, when it was killed."""
    from peer.control import ask_status
    from peer.homes import forget_dead, holder, is_running, read_daemon_file
    from peer.status import Status

    daemon = read_daemon_file(home)
    if daemon is None:
        pid = holder(home)
        return Status(pid=pid, home=str(home), phase="starting") if pid is not None else None
    found = ask_status(daemon)
    if found is not None:
        return found
    if is_running(home):
        return Status(run=daemon.run, pid=daemon.pid, home=str(home), phase="no answer")
    forget_dead(home)
    _note(f"the daemon in {home} (process {daemon.pid}) was killed; cleaned up")
    return None


def _check_way(options: dict[str, Any]) -> None:
    """Where others are told to find this peer, and where it listens."""
    _check_announced(options["announce_hosts"])
    if options["announce_hosts"] and not options["port"]:
        raise ConfigError(
            "--announce-host needs --port: the port under which others reach this machine"
        )
    _check_bind_host(options["host"])


def _bps(mbps: float) -> float:
    """Bytes per second."""
    return mbps * 1e6 / 8


def _relays(options: dict[str, Any]) -> bool:
    """Whether to carry connections of others, for which no limit holds."""
    return not (options["upload_mbps"] or options["download_mbps"])


def _check_announced(hosts: tuple[str, ...]) -> None:
    """What is said to others must fit into a seat of a roster, which is in every outcome."""
    from coordinator_free.messages import MAX_HOSTS, MAX_HOSTS_CHARACTERS

    for host in hosts:
        host_component(host)
    if len(hosts) > MAX_HOSTS:
        raise ConfigError(
            f"--announce-host is given {len(hosts)} times, at most {MAX_HOSTS} are possible: keep "
            "those under which most can reach this machine"
        )
    characters = sum(map(len, hosts))
    if characters > MAX_HOSTS_CHARACTERS:
        raise ConfigError(
            f"the names after --announce-host have {characters} characters in all, at most "
            f"{MAX_HOSTS_CHARACTERS} are possible: keep fewer, or shorter ones"
        )


def _check_bind_host(host: str) -> None:
    import ipaddress

    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(
            f"--host {host!r} is not an IP address of this machine: use for example 0.0.0.0 (all) "
            "or 127.0.0.1; names go with --announce-host"
        ) from error


def _check_data(data: Path | None) -> None:
    """What is seen at a glance; all else the trainer refuses."""
    if data is None or data.is_dir():
        return
    if not data.is_file():
        raise ConfigError(f"--data {data} is neither a file nor a folder: give a text to train on")
    if not data.stat().st_size:
        raise ConfigError(f"--data {data} is empty: give a text to train on")


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to what sys.stderr is now: while the live table is shown, rich puts lines above it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def _configure_logging(verbosity: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)]
    logging.basicConfig(
        level=level,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        handlers=[_CurrentStderr()],
        force=True,
    )


def _command_name(arguments: list[str]) -> str:
    known = [part for part in arguments if part in cli.commands]
    return f"shoal {known[0]}" if known else "shoal"


def _usage(error: click.UsageError) -> str:
    """The message without the capital letter and the full stop of a sentence."""
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"missing {error.param.make_metavar(error.ctx) if error.ctx else error.param.name}"
    message = error.format_message().rstrip(".").replace("\n", " ").replace(". (", " (")
    return message[:1].lower() + message[1:]


def _note(message: str) -> None:
    """A line on stderr from the running command."""
    _complain(click.get_current_context().command_path, message)


def _complain(command: str, message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"{command}: {' '.join(message.split())}", file=sys.stderr)


def _flush_and_exit(status: int) -> NoReturn:
    """End without waiting for what library threads still do: everything of ours is closed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
