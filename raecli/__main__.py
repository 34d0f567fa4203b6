"""The door: `rae` and `python -m raecli`."""

import os
import sys

from raecli.console import end_on_signals, finish_output, guard_streams, settle_home
from raecli.errors import ExitCode, RaeError, UsageError


def main() -> None:
    """Run the command line; every failure a user can cause ends in one message and its exit code."""
    guard_streams()
    end_on_signals()
    settle_home()
    try:
        check_current_folder()
        from raecli.cli.app import command_line

        try:
            command_line(sys.argv[1:])(prog_name="rae")
        finally:
            finish_output()
    except RaeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(int(ExitCode.INTERRUPTED))
    except OSError as error:
        from raecli.store.atomic import told_error

        told = told_error(error)
        print(f"error: {told}", file=sys.stderr)
        sys.exit(int(told.exit_code))


def check_current_folder() -> None:
    """Refuse to start in a folder that was removed: MKL ends the process there, before anything is told."""
    try:
        os.getcwd()  # noqa: PTH109 - pathlib costs the door time
    except FileNotFoundError:
        raise UsageError("the folder that this was started in is gone; change to one that is there") from None


if __name__ == "__main__":
    main()
