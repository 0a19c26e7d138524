"""Translation with a trained model: pure torch, without the trainer."""

from mtmoe.inference.decoding import Hypothesis, SearchOptions, search
from mtmoe.inference.model import Transformer
from mtmoe.inference.translator import Translator

__all__ = ["Hypothesis", "SearchOptions", "Transformer", "Translator", "search"]
