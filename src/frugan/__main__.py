"""``python -m frugan``."""

from frugan.cli import run

if __name__ == "__main__":
    run()
