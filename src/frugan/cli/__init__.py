"""The command line: one file a command, and what all of them share in `frugan.cli.parsing`.

Add a command by writing a file here with a `COMMAND`, and its name in `COMMANDS`. None imports torch before it has work to do.
"""

import atexit
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import tyro

from frugan.cli import data, evaluate, generate, plan, report, summary, train
from frugan.cli.parsing import Command, check, spelled_out
from frugan.utils.errors import UserError, nearest

COMMANDS: dict[str, Command | Mapping[str, Command]] = {
    "train": train.COMMAND,
    "plan": plan.COMMAND,
    "generate": generate.COMMAND,
    "evaluate": evaluate.COMMAND,
    "report": report.COMMAND,
    "data": data.COMMANDS,
    "summary": summary.COMMAND,
}


# Of cuBLAS, which takes them once for each stream: 8 and 4 MiB, where torch gives it 64 on large GPUs.
WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:2:16:8", "CUBLASLT_WORKSPACE_SIZE": "4096"}


def parse(arguments: Sequence[str]) -> tuple[Command, Any]:
    """The command that was asked for, and what was said to it.

    Raises:
        UserError: an unknown command, recipe, objective or flag, a value of the wrong type, words too many or missing.
        SystemExit: with 0 after ``--help``.
    """
    prog, commands, arguments = "frugan", COMMANDS, spelled_out(arguments)
    while arguments and isinstance(further := commands.get(arguments[0]), Mapping):
        prog, commands, arguments = f"{prog} {arguments[0]}", dict(further), arguments[1:] or ["--help"]
    name = arguments[0]
    if name not in (*commands, "-h", "--help"):
        if name.startswith("-"):
            raise UserError(
                f"a command comes before {name}: {prog} {'|'.join(commands)}, as in {prog} {next(iter(commands))} --help."
            )
        raise UserError(f"there is no command {name!r}: {nearest(name, commands)}")
    options: dict[str, Any] = {each: _options(command, arguments[1:] if each == name else ()) for each, command in commands.items()}
    if name in commands:
        check(arguments[1:], options[name], f"{prog} {name}")
    said = tyro.extras.subcommand_cli_from_dict(
        options, prog=prog, description="Trains GANs in the memory you have.", args=arguments
    )
    command = commands.get(name)
    assert isinstance(command, Command)
    return command, said


def _options(command: Command | Mapping[str, Command], arguments: Sequence[str]) -> type[Any]:
    return command.options(arguments) if isinstance(command, Command) else data.Data  # for the help alone


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 2 on an error of the user's, 130 or 143 when stopped by a signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["--version"]:
            print(f"frugan {version('frugan')}")
            return
        command, said = parse(arguments or ["--help"])
        command.run(said)
    except UserError as error:
        if not error.said:
            print(f"frugan: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as in `frugan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (RuntimeError, MemoryError) as error:
        from frugan.memory import limit

        if not limit.is_out_of_memory(error):
            raise
        print("frugan: memory ran out: close other programs or ask for less, then run the command again.", file=sys.stderr)
        sys.exit(2)


def run() -> None:
    """Runs the command line and ends the process.

    On Linux it ends at once, when all that was registered for the end has run: the end of CUDA's libraries, which importing torch
    loads, touches 150 MiB of them that this process never needed, and would exceed its budget.
    """
    for name, value in WORKSPACES.items():
        os.environ.setdefault(name, value)
    code: object = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    if sys.platform != "linux":
        sys.exit(code if isinstance(code, int) else 1)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
