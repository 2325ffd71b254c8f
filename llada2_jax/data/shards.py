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
        return _recent.reader(self).read([number])[0]

    def open(self) -> ArrayRecordReader:
        """A new reader. Raises: as read."""
        options = "readahead_buffer_size:0"
        reader = ArrayRecordReader(os.fsencode(self.path), options, file_reader_buffer_size=1 << 15)
        if not reader.ok():
            reader.close()  # raises what went wrong
        if reader.num_records() != self.records:
            raise ValueError(
                f"{self.path} has {reader.num_records()} records, not the manifest's {self.records}"
            )
        return reader


class _RecentReaders:
    """Readers of the shards that were read last. A file is closed with the last use of its reader,
    so that none is closed under a thread that reads it."""

    def __init__(self):
        self._readers: collections.OrderedDict[Shard, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def reader(self, shard: Shard) -> ArrayRecordReader:
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        reader = shard.open()
        with self._lock:
            self._readers[shard] = reader
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
