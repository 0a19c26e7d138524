"""Trained models on disk: the portable folder, and the foreign formats that turn into it."""

from mtmoe.checkpoint.config import TransformerConfig
from mtmoe.checkpoint.opening import locate_model, open_model
from mtmoe.checkpoint.stored import LanguageSet, StoredModel

__all__ = ["LanguageSet", "StoredModel", "TransformerConfig", "locate_model", "open_model"]
