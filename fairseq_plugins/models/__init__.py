"""The architectures: importing this package registers them with fairseq."""

from fairseq_plugins.models.mtmoe_transformer import MtmoeTransformerModel

__all__ = ["MtmoeTransformerModel"]
