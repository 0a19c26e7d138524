"""An experiment: many configurations, several seeds each, put into one table, its pictures and one page.

A finished run is one JSON file, ``eval/results/EXPERIMENT/runs/CONFIG.seedN.json``, and its outputs lie beside it. All
that stands in a report follows from those files and the references; what is not there yet is left out.
"""

from mtmoe.evaluation.experiment.results import summarise
from mtmoe.evaluation.experiment.runs import Experiment, ExperimentRun

__all__ = ["Experiment", "ExperimentRun", "summarise"]
