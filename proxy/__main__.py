"""F6 process: argv to exit code.

0: stopped as asked; 1: failed while running; 2: bad config or arguments.
"""

from __future__ import annotations

import signal
import sys

# First of all: the imports below take half a second, and a container's first process that has no
# handler for a signal ignores it, so that `docker stop` would wait and then kill.
for _number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(_number, lambda *_: sys.exit(0))
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the config is about to be read anyway

import argparse
import asyncio
import json
import os
import secrets
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from proxy import __version__, config, logs, server


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `sluice` with these arguments (default: the process's own); returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "schema":
        print(json.dumps(config.schema(), indent=2))
        return 0

    if arguments.command == "key":
        _make_key(arguments.name)
        return 0

    def load(host: str | None) -> config.Config:
        return config.load(
            arguments.config, os.environ, host=host or arguments.host, port=arguments.port
        )

    try:
        loaded = load(None)
    except config.ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.command == "check":
        print(config.render(loaded), end="")
        return 0
    logs.configure(loaded.log.format, loaded.log.level)
    return _serve(loaded, load)


def _make_key(name: str) -> None:
    """Prints a new key, and what the config needs to know of it; the key itself is kept nowhere."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    print(key)
    print("clients:")
    print(f"  - {{name: {name}, key_sha256: {sha256(key.encode()).hexdigest()}}}")


def _serve(loaded: config.Config, load: server.Load) -> int:
    async def run() -> None:
        await server.Process(loaded, load).run()
        # All is said and done: a signal that comes now must not change the exit code.
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(run())
    except server.BindError as error:
        print(f"sluice: {error}", file=sys.stderr)
        return 1
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's, where there is one: it has no Windows version."""
    if find_spec("uvloop") is None:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    return factory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice", description="A streaming reverse proxy for chat completions."
    )
    parser.add_argument("--version", action="version", version=f"sluice {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{check,schema,key}")
    check = commands.add_parser("check", help="validate the config and print what holds")
    commands.add_parser("schema", help="print the JSON Schema of the config")
    key = commands.add_parser("key", help="make a client's key, and its line for the config")
    key.add_argument("name", metavar="NAME", type=_client_name, help="the client's")
    _add_options(parser, Path("config.yaml"), None)
    # Without defaults of its own, lest they overwrite what stood before the word `check`.
    _add_options(check, argparse.SUPPRESS, argparse.SUPPRESS)
    return parser


def _client_name(value: str) -> str:
    try:
        return config.Client(name=value).name
    except ValueError:
        message = "must be 1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit"
        raise argparse.ArgumentTypeError(message) from None


def _add_options(parser: argparse.ArgumentParser, config: Any, override: Any) -> None:
    parser.add_argument("--config", type=Path, default=config, help="default: ./config.yaml")
    parser.add_argument("--host", default=override, help="listen here instead of the file's host")
    parser.add_argument("--port", type=int, default=override, help="and on this port")


if __name__ == "__main__":
    sys.exit(main())
