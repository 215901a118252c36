"""Products of activations and weights in 8 bits: `scaled_einsum` and `scaled_grouped_matmul` for training, and for
serving the two of frozen.py, whose weights are quantized already."""

from moe.ops.scaled.einsum import scaled_einsum as scaled_einsum
from moe.ops.scaled.frozen import frozen_einsum as frozen_einsum
from moe.ops.scaled.frozen import frozen_grouped_matmul as frozen_grouped_matmul
from moe.ops.scaled.grouped import scaled_grouped_matmul as scaled_grouped_matmul
from moe.ops.scaled.history import HISTORY_LENGTH as HISTORY_LENGTH
from moe.ops.scaled.history import new_history as new_history
from moe.ops.scaled.recipe import Recipe as Recipe
from moe.ops.scaled.recipe import Scaling as Scaling
from moe.ops.scaled.recipe import Split as Split
