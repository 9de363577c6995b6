"""The op and its backends: so far PyTorch alone.  A fused step of the Token Turing Machine will be registered here."""

from mirasol_kernels._dispatch import Op

OP = Op("latent_recurrence", cases=f"{__package__}.cases")
