"""A run's log for TensorBoard, written as the run goes on."""

from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["Events"]


class Events:
    """Event files of one run.

    They are begun anew from the log, so that a resumed run holds no step twice, and one that is given `--tensorboard`
    late holds all of them.

    Args:
        folder: Where they are.
        records: The lines of the log so far.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, float]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, float]) -> None:
        """Add a line of the log; it can be seen at once."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
