"""What a trainer needs around its loop: keyed sampling, a checkpoint store and a run log.

Nothing in here knows about mixing, networks or data sets.
"""

from crossmix.engine.checkpoints import CheckpointError, CheckpointStore
from crossmix.engine.run_log import RunLog
from crossmix.engine.sampling import KeyedCrops, keyed_generator, resident

__all__ = ["CheckpointError", "CheckpointStore", "KeyedCrops", "RunLog", "keyed_generator", "resident"]
