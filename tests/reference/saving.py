"""fairseq's saving of checkpoints, called as its training does."""

from fairseq import checkpoint_utils
from omegaconf import OmegaConf


def make_config(folder, **changes):
    config = checkpoint_utils.CheckpointConfig(save_dir=str(folder), save_interval_updates=10, keep_interval_updates=1)
    return OmegaConf.merge(OmegaConf.structured(config), {"model_parallel_size": 1, **changes})


def save(config, trainer, loss=None):
    return checkpoint_utils.save_checkpoint(config, trainer, trainer.epochs(), loss)


def names(folder):
    return sorted(path.name for path in folder.iterdir())
