"""nnunet-autoreg: autoregressive pretraining for stock nnU-Net v2."""

__version__ = "0.1.0"
