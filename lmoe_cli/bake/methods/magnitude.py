"""Keep the largest elements of each delta, then add.

dW = sum_e w_e top_d(dW_e)          the trimming step of Yadav et al. 2023       https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from lmoe_cli.bake.methods.method import Method
from lmoe_cli.bake.methods.ties import trim

MAGNITUDE = Method(trim, elects_sign=False, normalizes=False)
