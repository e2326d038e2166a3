"""nnunet-autoreg: autoregressive pretraining for stock nnU-Net v2."""

__version__ = "0.2.0"


def __getattr__(name: str) -> object:
    """Import ``load_encoder`` when it is first used, because it needs torch."""
    if name == "load_encoder":
        from nnunet_autoreg.downstream.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
