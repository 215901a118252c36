"""Routing with loops, as FACTS of the released code describe it."""

import numpy as np


def softmax(x: np.ndarray) -> np.ndarray:
    exponent = np.exp(x - x.max())
    return exponent / exponent.sum()


def choose(logits_AE: np.ndarray, top_k: int, renormalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Experts (best first, the lower number first among equals) and their weights, token by token."""
    experts, weights = [], []
    for logits_E in logits_AE:
        probs_E = softmax(logits_E.astype(np.float64))
        best = sorted(range(len(probs_E)), key=lambda e: (-probs_E[e], e))[:top_k]
        chosen = np.array([probs_E[e] for e in best])
        experts.append(best)
        weights.append(chosen / chosen.sum() if renormalize else chosen)
    return np.array(experts), np.array(weights)


def kept(experts_TK: np.ndarray, num_experts: int, slots: int) -> np.ndarray:
    """Which choices of one sequence fit: all first choices in order, then all second ones. Expert E is padding."""
    taken = [0] * num_experts
    fits = np.zeros(experts_TK.shape, bool)
    for k in range(experts_TK.shape[1]):
        for t in range(experts_TK.shape[0]):
            expert = experts_TK[t, k]
            if expert < num_experts and taken[expert] < slots:
                taken[expert] += 1
                fits[t, k] = True
    return fits


def aux_loss(logits_AE: np.ndarray, experts_AK: np.ndarray) -> float:
    """E · Σ_e (share of tokens that chose e) · (mean probability of e)."""
    num_tokens, num_experts = logits_AE.shape
    total = 0.0
    for expert in range(num_experts):
        share = sum(expert in row for row in experts_AK) / num_tokens
        mean_prob = sum(softmax(row.astype(np.float64))[expert] for row in logits_AE) / num_tokens
        total += share * mean_prob
    return num_experts * total
