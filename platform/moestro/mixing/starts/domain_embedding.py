"""One embedding per domain, the seed's mean last hidden state, in every layer.

L layers, D hidden, N domains.
"""

import torch

from moestro.config import DomainEmbeddingRouter
from moestro.mixing.starts.context import RouterRows, StartContext
from moestro.mixing.starts.hidden_states import overall_mean, read_text, with_unit_spread, without_common_part
from moestro.models.checkpoint import load_model


def domain_embedding(config: DomainEmbeddingRouter, context: StartContext) -> RouterRows:
    """One row [L, D] per domain; all experts made from a domain start from it. The generalist's is zero.

    A domain is an embedding, e_d, the mean of the seed's last hidden states over its text, and its expert's row is made
    from it (FlexOlmo, arXiv 2507.07024; Nexus, arXiv 2408.15901, learns a projection of it). In layer l, with mu_l the
    mean hidden state before the layer's experts,

        row_d,l = c_l P_l (e_d - e) / |e_d - e|,   e the mean of all e_d,   P_l x = x - mu_l (mu_l . x) / (mu_l . mu_l)

    P_l takes out what all tokens of the layer share, so that no row is favoured by a constant; c_l makes the standard
    deviation of the layer's logits 1.
    """
    windows, figures = context.windows(config.calibration_tokens)
    seed = load_model(context.folders["seed"])
    texts = {name: read_text(seed, [windows_NS]) for name, windows_NS in windows.items()}
    embeddings_ND = torch.stack([text.last.mean for text in texts.values()])
    centred_ND = embeddings_ND - embeddings_ND.mean(0)
    directions_ND = centred_ND / centred_ND.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rows = []
    for number in range(context.layers):
        layer = {name: text.layers[number] for name, text in texts.items()}
        rows.append(with_unit_spread(without_common_part(directions_ND, overall_mean(layer)), layer))
    rows_LND = torch.stack(rows).float()
    return RouterRows(context.by_row({name: rows_LND[:, number] for number, name in enumerate(texts)}), figures)
