"""`python -m granatum.cli`, and the command `granatum`."""

from granatum.cli.main import main

if __name__ == "__main__":
    main()
