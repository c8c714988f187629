"""Building blocks of a training loop: sampling, checkpoints, logging, progress, locking, shutdown, non-finite guard.

They are independent of mixing, networks and data sets.
"""

from crossmix._files import BusyError, FolderLock
from crossmix._workers import QuietLoader, quiet_worker
from crossmix.engine.checkpoints import CheckpointError, CheckpointStore
from crossmix.engine.finite import FiniteGuard, NonFiniteError
from crossmix.engine.progress import Progress
from crossmix.engine.run_log import RunLog
from crossmix.engine.sampling import KeyedCrops, keyed_generator, resident
from crossmix.engine.stop import StopRequest

__all__ = [
    "BusyError",
    "CheckpointError",
    "CheckpointStore",
    "FiniteGuard",
    "FolderLock",
    "KeyedCrops",
    "NonFiniteError",
    "Progress",
    "QuietLoader",
    "RunLog",
    "StopRequest",
    "keyed_generator",
    "quiet_worker",
    "resident",
]
