"""The sparse Mixture-of-Experts layer, shared by training, inference and pruning."""

from mtmoe.moe.config import MoEConfig
from mtmoe.moe.layer import MoELayer, MoEOutput
from mtmoe.moe.routing import RoutingDecision
from mtmoe.moe.statistics import RoutingStatistics

__all__ = ["MoEConfig", "MoELayer", "MoEOutput", "RoutingDecision", "RoutingStatistics"]
