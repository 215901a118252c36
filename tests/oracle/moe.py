"""A mixture-of-experts layer, token by token and choice by choice, in float64."""

import numpy as np


def swiglu(x_D: np.ndarray, w_gate_DF: np.ndarray, w_up_DF: np.ndarray, w_down_FD: np.ndarray) -> np.ndarray:
    gate = x_D @ w_gate_DF
    return (gate / (1.0 + np.exp(-gate)) * (x_D @ w_up_DF)) @ w_down_FD


def routed(x_AD, experts_AK, weights_AK, w_gate_EDF, w_up_EDF, w_down_EFD) -> np.ndarray:
    """Σ_k weight_k · expert_k(x); a choice of expert E was dropped and adds nothing."""
    y_AD = np.zeros(x_AD.shape)
    for a in range(x_AD.shape[0]):
        for expert, weight in zip(experts_AK[a], weights_AK[a], strict=True):
            if expert < len(w_gate_EDF):
                y_AD[a] += weight * swiglu(x_AD[a], w_gate_EDF[expert], w_up_EDF[expert], w_down_EFD[expert])
    return y_AD
