"""The door: `rae` and `python -m raecli`."""

import sys

from raecli.console import end_on_signals, finish_output, guard_streams
from raecli.errors import ExitCode, RaeError


def main() -> None:
    """Run the command line; every failure a user can cause ends in one message and its exit code."""
    guard_streams()
    end_on_signals()
    try:
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
        from raecli.store.atomic import storage_error

        print(f"error: {storage_error(error)}", file=sys.stderr)
        sys.exit(int(ExitCode.STORAGE))


if __name__ == "__main__":
    main()
