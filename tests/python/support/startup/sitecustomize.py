"""Read by every Python of an engine process before anything else: ranks that wait for each other sleep.

vLLM's ranks wait by yielding (`sched_yield`). On two cores and Linux 6.18, two engines of two ranks that did so kept
all other threads of the machine from running, for 30 s at a time: 40 were runnable, and three ran.
"""

import os
import time

PAUSE_S = 0.0002


def sleep_for_a_moment() -> None:
    time.sleep(PAUSE_S)


os.sched_yield = sleep_for_a_moment
