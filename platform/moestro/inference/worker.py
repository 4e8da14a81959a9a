"""What the engine does inside vLLM's worker: seed the sampling, replace the weights.

vLLM mixes `WorkerExtension` into its worker class, so `self` is the worker; its methods are called by name through
`collective_rpc`.
"""

from collections.abc import Iterable
from typing import Any


class WorkerExtension:
    """Methods for vLLM's worker."""

    vllm_config: Any
    model_runner: Any

    def seed_sampling(self, seed: int) -> None:
        """Seed the generator that sampling draws from."""
        import torch

        torch.manual_seed(seed)

    def refresh_weights(self, folder: str) -> list[str]:
        """Load the weights in `folder` over the present ones; returns the names of parameters that got none.

        (Of an expert layer's fused parameter, which any one of its experts marks as loaded: whether all are there is
        the caller's to check.)

        vLLM 0.30 prepacks expert weights for the CPU only when it first builds a layer's kernel; on a reload it copies
        unpacked weights over packed ones, and the model then computes nonsense. Without a kernel the layer is set up
        as on the first load.
        """
        from vllm.config import set_current_vllm_config

        model = self.model_runner.get_model()
        for module in model.modules():
            method: Any = getattr(module, "quant_method", None)
            if hasattr(module, "w13_weight") and hasattr(method, "moe_kernel"):
                method.moe_kernel = None
        # the loader reports expert weights under the name of the module around the one that holds them
        expected = {name.replace(".routed_experts.", ".") for name, _ in model.named_parameters()}
        loaded: set[str] = set()
        load_weights = model.load_weights

        def recording(weights: Iterable[tuple[str, Any]]) -> set[str]:
            found: set[str] = load_weights(weights)
            loaded.update(found)
            return found

        model.load_weights = recording
        try:
            with set_current_vllm_config(self.vllm_config):
                self.model_runner.reload_weights(weights_path=folder)
        finally:
            del model.load_weights
        _repack_heads(model)
        return sorted(expected - loaded)


def _repack_heads(model: Any) -> None:
    """Pack the output head again from its present weights.

    On the CPU vLLM multiplies by a packed copy of the head, which a reload renews only for a head with weights of its
    own in the checkpoint. One that is tied to the embedding has none, and would go on with the old ones.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            method: Any = module.quant_method
            method.process_weights_after_loading(module)
