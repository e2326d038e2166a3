import time

import torch
from dynamic_network_architectures.architectures.primus import Primus
from torch import nn

from nnunet_autoreg.model.memory import GIB, TrainingMemory, kept_bytes, training_memory
from nnunet_autoreg.model.sizes import ENCODERS


def make(name: str, shape: tuple[int, int, int], drop_path: float = 0.0) -> Primus:
    arguments = ENCODERS[name].arguments
    return Primus(
        input_channels=1,
        num_classes=3,
        input_shape=shape,
        drop_path_rate=drop_path,
        **arguments,
    )


def test_the_count_without_data_agrees_with_the_bytes_really_kept() -> None:
    shape = (32, 24, 32)
    really, _ = kept_bytes(make("primus_tiny", shape).train(), torch.randn(2, 1, *shape))
    with torch.device("meta"):
        # On the meta device tensors have no memory; in single precision as the real ones.
        counted, output = kept_bytes(
            make("primus_tiny", shape).train(),
            torch.empty(2, 1, *shape),
            half=False,
        )

    assert abs(counted - really) < 0.1 * really
    assert output == (2, 3, *shape)


def test_a_linear_layer_keeps_its_input() -> None:
    layer = nn.Linear(8, 4, bias=False, device="meta")
    volume = torch.empty(10, 8, device="meta")

    # The input: 10 rows of 8 values of 4 bytes.
    assert kept_bytes(layer, volume, half=False)[0] == 10 * 8 * 4

    volume.requires_grad_()

    # In half precision 2 bytes each; with a gradient for the input the weight is needed as well.
    assert kept_bytes(layer, volume, half=True)[0] == 10 * 8 * 2 + 8 * 4 * 2


def test_attention_is_counted_as_the_fused_kernel_keeps_it() -> None:
    class Attend(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    tokens = torch.empty(1, 1, 1000, 8, device="meta", requires_grad=True)
    # Query, key and value are one tensor here; with it the output and one sum per row are kept.
    assert kept_bytes(Attend(), tokens, half=False)[0] == 2 * 1000 * 8 * 4 + 1000 * 4


def test_the_batch_that_fits_is_the_whole_part_of_what_is_left() -> None:
    memory = TrainingMemory(fixed_bytes=1000, sample_bytes=300)

    # 1000 + 3 * 300; one byte less leaves room for two.
    assert memory.total_bytes(3) == 1900
    assert memory.largest_batch(1899) == 2
    assert memory.largest_batch(900) == 0


def test_a_large_encoder_is_estimated_within_seconds_and_sensibly() -> None:
    shape = (128, 128, 128)
    # The time of this process: the machine may be busy.
    start = time.process_time()
    memory = training_memory(lambda: make("primus_m", shape, 0.2), (1, *shape))

    assert time.process_time() - start < 10
    # 148.8 million parameters with a gradient and two moments, 4 bytes each.
    assert 148.8e6 * 16 < memory.fixed_bytes < 5 * GIB
    assert 1 * GIB < memory.sample_bytes < 10 * GIB
