"""Data preparation: from parallel text and a recipe to what fairseq-train reads.

`prepare` does it all; `load_recipe` reads and checks a recipe. Each step is one file: ``readers`` and ``wheel`` read,
``filters`` and ``overlap`` clean, ``vocabulary`` trains SentencePiece, ``binarise`` writes fairseq's files through
``mmap_dataset``, and ``summary`` tells what was dropped and why.
"""

from mtmoe.data.prepare import Prepared, prepare
from mtmoe.data.recipe import Recipe, load_recipe

__all__ = ["Prepared", "Recipe", "load_recipe", "prepare"]
