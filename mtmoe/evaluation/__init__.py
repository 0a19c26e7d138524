"""Scores of translations, their significance, and the reports on them; nothing here knows a model.

A model comes in as a callable that translates (`mtmoe.evaluation.decoding.Translate`), or not at all when the outputs
exist already. `evaluate` is the whole job; `compare` puts two finished evaluations side by side.
"""

from mtmoe.evaluation.comparison import Comparison, compare
from mtmoe.evaluation.decoding import Translate
from mtmoe.evaluation.run import EvaluationSettings, evaluate, score_hypotheses

__all__ = ["Comparison", "EvaluationSettings", "Translate", "compare", "evaluate", "score_hypotheses"]
