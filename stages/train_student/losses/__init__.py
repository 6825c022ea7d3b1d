"""Distillation losses: pure functions of tensors, computed in float32 whatever autocast does; one idea a file.

A teacher tensor is a constant: no gradient reaches it. Unless its name or argument says otherwise, a loss is a mean
over examples of a per-example value that depends on nothing else in the batch (`reduce.py`).
"""

from .attention import attention_kl, probability_mse, relation_scores, score_mse
from .contrastive import info_nce, noise_contrastive, similarities
from .gold import gold_binary_cross_entropy, gold_cross_entropy, gold_squared_error, token_cross_entropies
from .logits import bernoulli_kl, flsw_temperatures, logit_distances, logit_mse, soft_target_kl, soft_target_kls
from .reduce import Pooling, over_masked, over_pairs, over_tokens, wide
from .states import (
    attended_mse,
    direction,
    flow_distance,
    flow_matrix,
    half_squared_distance,
    joined,
    layer_weights,
    mean_mse,
    normalized_mse,
    squared_distances,
    token_cosine,
    token_mse,
    unit_distance,
    variance_l1,
    vector_cosine,
    vector_distance,
)

__all__ = [
    "Pooling",
    "attended_mse",
    "attention_kl",
    "bernoulli_kl",
    "direction",
    "flow_distance",
    "flow_matrix",
    "flsw_temperatures",
    "gold_binary_cross_entropy",
    "gold_cross_entropy",
    "gold_squared_error",
    "half_squared_distance",
    "info_nce",
    "joined",
    "layer_weights",
    "logit_distances",
    "logit_mse",
    "mean_mse",
    "noise_contrastive",
    "normalized_mse",
    "over_masked",
    "over_pairs",
    "over_tokens",
    "probability_mse",
    "relation_scores",
    "score_mse",
    "similarities",
    "soft_target_kl",
    "soft_target_kls",
    "squared_distances",
    "token_cosine",
    "token_cross_entropies",
    "token_mse",
    "unit_distance",
    "variance_l1",
    "vector_cosine",
    "vector_distance",
    "wide",
]
