"""The compiled CPU kernels of ``csrc/``: an extra that makes things faster, never a condition.

setup.py compiles them where it finds torch and a C++ compiler. They are used on processors with AVX-512 BF16 (AMD from
Zen 4, Intel from Cooper Lake and Sapphire Rapids, whose AMX is used too); anywhere else plain torch does the work.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

OPERATORS = (
    "adamw_replay", "adamw_step", "attention", "attention_backward", "combine_backward", "cross_entropy",
    "dropout", "grouped_linear_backward", "grouped_linear_forward", "layer_norm", "layer_norm_backward",
    "residual_add", "residual_add_backward", "sum_choices", "sum_of_squares",
)  # fmt: skip
"""What the kernels are called: one that was compiled from older sources lacks some of them."""


@functools.cache
def available() -> bool:
    """Whether ``torch.ops.mtmoe`` has the compiled kernels and this processor can run them."""
    files = sorted(Path(__file__).parent.glob("_extension*.so"))
    if not files or not processor_fits():
        return False
    try:
        torch.ops.load_library(str(files[0]))
        compiled_for = torch.ops.mtmoe.compiled_for()
    except (OSError, AttributeError) as error:
        logger.warning("%s cannot be loaded, so that plain torch is used: %s; install mtmoe again", files[0], error)
        return False
    if compiled_for != torch.__version__.partition("+")[0]:
        logger.warning(
            "%s was compiled for torch %s, this is %s; install mtmoe again to have the compiled kernels",
            files[0], compiled_for, torch.__version__,
        )  # fmt: skip
        return False
    missing = [name for name in OPERATORS if not hasattr(torch.ops.mtmoe, name)]
    if missing:
        logger.warning(
            "%s was compiled from other sources, it lacks %s; install mtmoe again", files[0], ", ".join(missing)
        )
        return False
    return True


def processor_fits() -> bool:
    """Whether this processor has all instructions that the extension is compiled with."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # older versions of torch do not tell
    capabilities: dict[str, object] = ask() if ask is not None else {}
    return bool(capabilities.get("avx512_bf16") and capabilities.get("avx512_vl"))


def why_not() -> str | None:
    """The reason why the compiled kernels are not used, for people; None when they are."""
    if available():
        return None
    if not processor_fits():
        return "this processor has no AVX-512 BF16, or this torch cannot tell"
    if not sorted(Path(__file__).parent.glob("_extension*.so")):
        return "they were not compiled: install a C++ compiler, then mtmoe again with --no-build-isolation"
    return "they were compiled for another torch or from other sources: install mtmoe again"
