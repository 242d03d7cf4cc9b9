"""Bytes as a file that Arrow can read."""

import pyarrow as pa


def arrow_file(data: bytes) -> pa.BufferReader:
    """The bytes, copied into memory of Arrow's own.

    Arrow's threads let go of what they read a moment after the table is there. Of a Python object they could only do so
    under the interpreter's lock, and a process that ends meanwhile is aborted ("terminate called without an active
    exception") or hangs: apache/arrow issues 34314 and 50482.
    """
    sink = pa.BufferOutputStream()
    sink.write(data)
    return pa.BufferReader(sink.getvalue())
