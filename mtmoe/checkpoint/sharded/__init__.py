"""Sharded checkpoints: a directory in which each expert-parallel place has a file with its experts.

``shared.pt`` holds everything else, ``manifest.json`` says what belongs to the checkpoint. The files are written by
``torch.save``, as fairseq's: a training state is nested options, meters and tensors, which safetensors cannot hold, and
torch's weights-only loader reads them without running anything, mapped. Share a model as a portable folder instead.
"""

from mtmoe.checkpoint.sharded.background import BackgroundWriter
from mtmoe.checkpoint.sharded.manifest import MANIFEST, SHARED, Manifest, read_manifest
from mtmoe.checkpoint.sharded.reading import check_files, fill, is_sharded, plain_types, read_experts, read_state
from mtmoe.checkpoint.sharded.resharding import reshard, share_out
from mtmoe.checkpoint.sharded.rotation import (
    Complete,
    complete_checkpoints,
    free_directory,
    give_name,
    newest_complete,
    remove_abandoned_saves,
    remove_old,
    remove_unnamed,
)
from mtmoe.checkpoint.sharded.state import (
    ExpertTensor,
    SplitState,
    copy_to_cpu,
    describe,
    insert,
    is_expert,
    parameter_names,
    split_state,
)
from mtmoe.checkpoint.sharded.writing import SavePlan, commit, give_up, write_experts, write_shared

__all__ = [
    "BackgroundWriter",
    "Complete",
    "ExpertTensor",
    "MANIFEST",
    "Manifest",
    "SHARED",
    "SavePlan",
    "SplitState",
    "check_files",
    "commit",
    "complete_checkpoints",
    "copy_to_cpu",
    "describe",
    "fill",
    "free_directory",
    "give_name",
    "give_up",
    "insert",
    "is_expert",
    "is_sharded",
    "newest_complete",
    "parameter_names",
    "plain_types",
    "read_experts",
    "read_manifest",
    "read_state",
    "remove_abandoned_saves",
    "remove_old",
    "remove_unnamed",
    "reshard",
    "share_out",
    "split_state",
    "write_experts",
    "write_shared",
]
