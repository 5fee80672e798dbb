"""The C library's heap under training: large blocks have pages of their own, whatever was freed before."""

import subprocess
import sys

import pytest

FREED_AND_ASKED = """
import ctypes, sys
from adapterhub_local.rows.bounds import HEAP_CHUNK
from adapterhub_local.train.heap import map_large_tensors
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "fixed":
    map_large_tensors()
c.free(c.malloc(3 * HEAP_CHUNK))
block = c.malloc(HEAP_CHUNK)
heap = next(line.split()[0] for line in open("/proc/self/maps") if line.endswith("[heap]\\n"))
start, end = (int(bound, 16) for bound in heap.split("-"))
print("heap" if start <= block < end else "pages")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's setting")
def test_large_blocks_have_pages_of_their_own() -> None:
    """After a larger one was freed glibc takes a block of 8 MB from its heap; with the size fixed it maps it."""
    places = {
        how: subprocess.run([sys.executable, "-c", FREED_AND_ASKED, how], capture_output=True, text=True, check=True)
        for how in ("default", "fixed")
    }
    if places["default"].stdout.strip() != "heap":
        pytest.skip("this C library does not move the size by itself")

    assert places["fixed"].stdout.strip() == "pages"
