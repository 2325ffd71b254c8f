"""Random access to ArrayRecord shards, however many there are: few of them are open at a time."""

from __future__ import annotations

import collections
import os
import threading
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

from llada2_jax.files import open_files_limit

# Of the files that a process may have open, those for shards: all of its sources share them.
SHARE, MOST_OPEN = 4, 4096


class Shard:
    """An ArrayRecord file that has to have `records` records. It may be read by several threads."""

    def __init__(self, path: Path, records: int):
        self.path, self.records = path, records

    def read(self, number: int) -> bytes:
        """Raises: RuntimeError as ArrayRecord does; ValueError for another number of records."""
        return _recent.reader(self).read(number)

    def open(self) -> ArrayRecordReader:
        """A new reader. Raises: as read."""
        options = "readahead_buffer_size:0,max_parallelism:0"  # nothing is read ahead
        reader = ArrayRecordReader(os.fsencode(self.path), options, file_reader_buffer_size=1 << 15)
        if not reader.ok():
            reader.close()  # raises what went wrong
        if reader.num_records() != self.records:
            raise ValueError(
                f"{self.path} has {reader.num_records()} records, not the manifest's {self.records}"
            )
        return reader


class _Reader:
    """A record at a time, by seeking to it: ArrayRecord's reads of given records take a time that
    grows with the shard, 0.3 ms among 100,000 records, where a seek takes some µs."""

    def __init__(self, shard: Shard):
        self._shard, self._lock = shard, threading.Lock()
        self._reader: ArrayRecordReader | None = None

    def read(self, number: int) -> bytes:
        with self._lock:
            # One that failed would go on to fail, whatever the record: it is not put back.
            reader, self._reader = self._reader or self._shard.open(), None
            reader.seek(number)
            record = reader.read()
            self._reader = reader
            return record


class _RecentReaders:
    """Readers of the shards that were read last. A file is closed with the last use of its reader,
    so that none is closed under a thread that reads it."""

    def __init__(self):
        self._readers: collections.OrderedDict[Shard, _Reader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def reader(self, shard: Shard) -> _Reader:
        with self._lock:
            reader = self._readers.pop(shard, None) or _Reader(shard)
            self._readers[shard] = reader  # the last
            while len(self._readers) > max(1, min(open_files_limit() // SHARE, MOST_OPEN)):
                self._readers.popitem(last=False)
        return reader

    def clear(self) -> None:
        with self._lock:
            self._readers.clear()


_recent = _RecentReaders()


def close_all() -> None:
    """Lets go of every reader: where storage failed, files are opened anew."""
    _recent.clear()
