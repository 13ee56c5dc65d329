"""`python -m granatum.cli`, and the command `granatum`."""

import sys


def main() -> None:
    """Run the command line, or say what to install where its libraries are missing."""
    try:
        from granatum.cli.main import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"granatum: {error.name} is missing: pip install 'granatum[cli]'")
    run()


if __name__ == "__main__":
    main()
