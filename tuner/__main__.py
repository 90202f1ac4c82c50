"""`python -m tuner`: the command line."""

from tuner.cli import run

if __name__ == "__main__":
    run()
