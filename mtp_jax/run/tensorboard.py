"""A file of scalars for TensorBoard, written in the thread that has them."""

import time
from collections.abc import Mapping

from etils import epath


class TensorBoardFile:
    """The scalars of one start of a run.

    The library's own writer has a thread that ends where the disk is full, and then
    blocks whoever gives it more.
    """

    def __init__(self, folder: epath.Path, after: int):
        """Begins a file; TensorBoard drops what older ones have after step `after`."""
        from tensorboardX.event_file_writer import EventsWriter  # over a second
        from tensorboardX.proto import event_pb2

        folder.mkdir(parents=True, exist_ok=True)
        self._event = event_pb2.Event
        self._writer = EventsWriter(str(folder / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=after + 1, session_log=start)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step, by their names."""
        from tensorboardX.summary import scalar

        for name, value in scalars.items():
            self._write(step=step, summary=scalar(name, value))
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Closes the file."""
        del failed
        self._writer.close()

    def _write(self, **fields: object) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))
