"""Write a run's log for TensorBoard while the run is in progress."""

from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["Events"]


class Events:
    """The event files of one run.

    They are rewritten from the log at the start, so that a resumed run has no step twice, and one that is resumed with
    `--tensorboard` has all of them.

    Args:
        folder: Folder of the event files.
        records: Lines of the log so far.
    """

    def __init__(self, folder: Path, records: Iterable[Mapping[str, float]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, float]) -> None:
        """Write a line of the log and flush it."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
