"""The command line. `normlab` and `python -m normlab` are the same; one module a command.

Exit codes: 0; 1 a fault of the machine; 2 a mistake in config or command; 3 diverged; 130 and 143
interrupted. A mistake is one line on stderr that names the thing and the nearest right one.
"""

import argparse
import importlib
import io
import logging
import os
import signal
import sys
from typing import NoReturn

from normlab.environment import check_deterministic, reexecute
from normlab.errors import MachineFault, UserError, printable, unknown

COMMANDS = {
    "train": "train",
    "compare": "compare",
    "sweep": "sweep",
    "paper": "paper",
    "eval": "eval",
    "calibrate": "calibrate",
    "rerun": "rerun",
    "report": "report",
    "status": "status",
    "watch": "watch",
    "inspect": "inspect",
    "probe": "probe",
    "bench": "bench",
    "data": "data",
    "import": "imports",
    "list": "names",
}
"""Module of each command; Python has a `list` and an `import` of its own."""

_COMPUTING = (
    *("train", "compare", "sweep", "paper", "eval", "calibrate", "rerun"),
    *("probe", "bench"),
)


def entry() -> NoReturn:
    """Runs the command in sys.argv, in the environment that makes training fast, and exits."""
    # Until a command has work to save, Ctrl-C ends it as it stands, amid an import too.
    signal.signal(signal.SIGINT, lambda *_: os._exit(_fail("interrupted", 130)))
    arguments = sys.argv[1:]
    if arguments and arguments[0] in _COMPUTING:
        reexecute(
            arguments,
            share_devices=arguments[0] in ("compare", "sweep", "paper"),
            # argparse takes a beginning of an option for the option.
            deterministic=any(
                argument.startswith("--de") and "--deterministic".startswith(argument)
                for argument in arguments
            ),
        )
    sys.exit(main(arguments))


def main(arguments: list[str]) -> int:
    """Runs one command; returns its exit code. Never raises for a mistake or a machine's fault."""
    _warn_on_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8
    try:
        return _dispatch(arguments)
    except (UserError, MachineFault) as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is not None:
            return _fail(str(error), code)
        fault = _machine_fault(error)
        if fault is None:
            raise
        return _fail(fault, 1)


def _warn_on_stderr() -> None:
    """Shows normlab's warnings as lines of its own, whatever handlers a library has installed."""
    logger = logging.getLogger("normlab")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("normlab: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(prog="normlab", description="A laboratory for normalization experiments.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {}
    for name, home in COMMANDS.items():
        module = modules[name] = importlib.import_module(f"normlab.cli.{home}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        takes_config = getattr(module, "TAKES_CONFIG", False)
        command.set_defaults(overrides={}, takes_config=takes_config)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise unknown("command", arguments[0], COMMANDS)
    parsed, rest = parser.parse_known_args(arguments)
    if rest and not parsed.takes_config:
        raise _unknown_argument(rest[0], commands.choices[parsed.command])
    parsed.overrides = _overrides(rest, commands.choices[parsed.command])
    parsed.command_line = arguments
    if getattr(parsed, "deterministic", False):
        check_deterministic()
    return modules[parsed.command].main(parsed)


def _overrides(rest: list[str], parser: argparse.ArgumentParser) -> dict[str, str]:
    """Returns {dotted name: text} of `--config.a.b=value`, `--config.a.b value`, `--config.a`."""
    overrides: dict[str, str] = {}
    queue = list(rest)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            raise _unknown_argument(argument, parser)
        if not equals:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        name = name.removeprefix("--config.")
        if overrides.get(name, value) != value:
            raise UserError(f"config field {name!r} is given twice: {overrides[name]!r}, {value!r}")
        overrides[name] = value
    return overrides


def add_deterministic(parser: argparse.ArgumentParser) -> None:
    """Declares `--deterministic`, which `entry` sees first: it must stand before XLA starts."""
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="what GPUs need to give the same bytes again; slower (docs/reliability.md)",
    )


def _unknown_argument(argument: str, parser: argparse.ArgumentParser) -> UserError:
    options = [option for action in parser._actions for option in action.option_strings]
    return unknown("argument", argument.partition("=")[0], options)


def _machine_fault(error: Exception) -> str | None:
    """Returns one line for an error that is the machine's fault, None for any other."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "No space left on device" in str(error):
        return "no space left on device"
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        return f"out of memory: {text}"
    if isinstance(error, OSError):
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror or text}"
    return None


def _fail(message: str, code: int) -> int:
    print(f"normlab: {printable(message)}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on a mistake instead of the usage page."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")
