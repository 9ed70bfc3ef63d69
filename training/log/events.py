"""TensorBoard's event files: numbers and texts by step.

Written here and not by torch's SummaryWriter, whose thread keeps events back for half a minute, which a kill loses, and ends a
run at the first write that fails.
"""

import os
import socket
import time
from itertools import count
from pathlib import Path

from training.log.appended import AppendedFile


class EventFile:
    """A new event file in `folder`. What earlier files there say of start_step and later steps, TensorBoard then hides.

    Raises OSError where it cannot be written; a later event may be tried then.
    """

    def __init__(self, folder: Path, start_step: int):
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        host, now = socket.gethostname(), int(time.time())
        paths = (folder / f"events.out.tfevents.{now:010d}.{host}.{os.getpid()}.{i}" for i in count())
        self._records = RecordWriter(AppendedFile(next(path for path in paths if not path.exists())))
        try:
            self._add(step=start_step, file_version="brain.Event:2")
            self._add(step=start_step, session_log=SessionLog(status=SessionLog.START))
        except OSError:
            self.close()
            raise

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Add the numbers of a step, by name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=values))

    def text(self, step: int, name: str, text: str) -> None:
        """Add a text, which is shown as it is, not as Markdown."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        markdown = "\n".join("    " + line for line in text.splitlines())  # indented by four it is code
        tensor = TensorProto(
            dtype="DT_STRING",
            string_val=[markdown.encode(errors="replace")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)
        self._add(step=step, summary=Summary(value=[value]))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._records.close()

    def _add(self, **event) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **event).SerializeToString())
