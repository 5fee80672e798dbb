"""`python -m adapterhub_local` is `qhub`."""

from adapterhub_local.cli.main import run

if __name__ == "__main__":
    run()
