"""Signals within a block go to its handler, and afterwards where they went before."""

import os
import signal
import threading

from adapterhub_local.signals import handling


def test_a_block_gets_its_signals_and_gives_them_back() -> None:
    """Within the block the handler is called; after it, also after an error, the handler before is in place."""
    before, seen = signal.getsignal(signal.SIGUSR1), []
    try:
        with handling((signal.SIGUSR1,), lambda number, frame: seen.append(number)):
            os.kill(os.getpid(), signal.SIGUSR1)
            raise KeyError
    except KeyError:
        pass
    assert seen == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_an_ignored_signal_stays_ignored() -> None:
    """What nohup has set is respected, unless the block takes ignored signals too."""
    before, seen = signal.signal(signal.SIGUSR1, signal.SIG_IGN), []
    try:
        for ignored_too in (False, True):
            with handling((signal.SIGUSR1,), lambda number, frame: seen.append(number), ignored_too=ignored_too):
                os.kill(os.getpid(), signal.SIGUSR1)
            assert len(seen) == ignored_too
            assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_run_their_block_without_handlers() -> None:
    """Where Python sets no handlers the block runs all the same."""
    done = []

    def work() -> None:
        with handling((signal.SIGUSR1,), lambda number, frame: None):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
