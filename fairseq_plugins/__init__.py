"""The skin over fairseq: give this folder to fairseq's commands as ``--user-dir`` (``mtmoe plugin-dir`` prints it).

fairseq itself imports every file of ``tasks/`` and ``models/``; what it does not look for is imported here.
"""

from fairseq_plugins import compatibility

compatibility.repair()

from fairseq_plugins.criterions import label_smoothed_cross_entropy  # noqa: E402, F401
from fairseq_plugins.optim import adamw  # noqa: E402, F401
