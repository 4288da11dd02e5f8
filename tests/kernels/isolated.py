"""Runs one launcher in a process of its own, which a sanitizer may watch or a fault may kill.

Used as a program: `python isolated.py REQUEST RESPONSE`, both pickles. It imports nothing that is
not Python's own, so that it also starts quickly under a sanitizer. Every buffer is a heap block of
exactly its size: an access behind it is one behind the block.
"""

import ctypes
import pickle
import sys
from pathlib import Path


def _run(request: dict) -> dict:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    library = ctypes.CDLL(request["library"])
    library.simt_error.restype = ctypes.c_char_p
    library.simt_set_order(request["order"], request["seed"])
    buffers = []
    for content in request["buffers"]:
        address = libc.malloc(ctypes.c_size_t(len(content)))
        ctypes.memmove(address, content, len(content))
        buffers.append(address)
    kinds = {
        "buffer": lambda index: ctypes.c_void_p(buffers[index]),
        "buffers": lambda indices: (ctypes.c_void_p * len(indices))(*[buffers[i] for i in indices]),
        "null": lambda _: ctypes.c_void_p(None),
        "int": ctypes.c_int64,
        "float": ctypes.c_float,
    }
    launcher, together = getattr(library, request["function"]), len(request["devices"]) > 1
    if together:
        library.simt_defer()
    codes = [
        launcher(*[kinds[kind](value) for kind, value in arguments])
        for arguments in request["devices"]
    ]
    code = max(codes) or (library.simt_synchronize() if together else 0)
    return {
        "code": code,
        "error": library.simt_error().decode(),
        "buffers": [
            ctypes.string_at(address, len(content))
            for address, content in zip(buffers, request["buffers"], strict=True)
        ],
    }


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(pickle.dumps(_run(pickle.loads(Path(sys.argv[1]).read_bytes()))))
