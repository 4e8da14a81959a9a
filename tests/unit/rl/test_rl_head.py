"""In bfloat16 the logits alone are computed in float32, by the trainer as by the engine."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moestro.rl.policy import head_in_float32


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def model(request):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        tie_word_embeddings=request.param,
    )
    return MixtralForCausalLM(config).to(torch.bfloat16).eval()


def test_logits_are_those_of_the_hidden_states_unrounded(model):
    tokens_BS = torch.arange(12)[None]
    hidden_BSD = model.model(tokens_BS).last_hidden_state
    with head_in_float32(model):
        logits_BSV = model(tokens_BS).logits
    assert hidden_BSD.dtype == torch.bfloat16
    assert logits_BSV.dtype == torch.float32
    torch.testing.assert_close(logits_BSV, hidden_BSD.float() @ model.lm_head.weight.float().T)
    assert (logits_BSV != logits_BSV.bfloat16()).any()


def test_gradients_reach_the_head_and_it_is_itself_again_afterwards(model):
    before = model(torch.arange(12)[None]).logits
    with head_in_float32(model):
        model(torch.arange(12)[None]).logits.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    assert (model.lm_head.weight.grad != 0).any()
    assert torch.equal(model(torch.arange(12)[None]).logits, before)
