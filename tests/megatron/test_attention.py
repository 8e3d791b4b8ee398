import pytest
import torch

from tests.megatron.ranks import run_ranks

pytestmark = pytest.mark.parallel


def _compare(tensor_parallel: int) -> tuple[float, float]:
    """Return the largest difference to Megatron's attention, of outputs and of query gradients."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_pvs.megatron.attention import SdpaCausalAttention
    from nemo_pvs.megatron.cpu import megatron_on_cpu

    with megatron_on_cpu():
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_parallel)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=48,
            num_attention_heads=8,
            num_query_groups=4,
            kv_channels=16,
            attention_dropout=0.0,
            masked_softmax_fusion=False,
            attention_softmax_in_fp32=True,
            tensor_model_parallel_size=tensor_parallel,
        )
        heads, groups = 8 // tensor_parallel, 4 // tensor_parallel
        torch.manual_seed(torch.distributed.get_rank())
        query, key, value = (torch.randn(33, 2, count, 16, requires_grad=True) for count in (heads, groups, groups))
        mask = torch.triu(torch.ones(1, 1, 33, 33, dtype=torch.bool), 1)
        results = []
        for attention in (SdpaCausalAttention, DotProductAttention):
            core = attention(config, 1, AttnMaskType.causal, "self")
            output = core(query, key, value, mask)
            (gradient,) = torch.autograd.grad(output.square().sum(), query)
            results.append((output, gradient))
    return tuple(float((ours - theirs).abs().max()) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_equals_megatrons_attention_with_grouped_queries(tensor_parallel):
    for output, gradient in run_ranks(tensor_parallel, _compare, tensor_parallel):
        assert output < 1e-5
        assert gradient < 1e-5
