"""Python's garbage collector, which has no work where millions of records come to stay.

While a large index is read it would look at all of them again and again: more than half of the time that opening
takes at a million blocks, and half a second of standstill now and then afterwards.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """No automatic collections inside, in the whole process, and none of what is there at the end ever again.

    Only cycles matter to the collector: everything else is freed as always. Cyclic garbage that waits at this moment
    is the price.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
