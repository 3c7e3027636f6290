"""An expert at rest is at rest, whatever acted on the token before."""

from __future__ import annotations

import tiny
import torch
from router.made import NAMES, loadout_of

from lmoe_cli.engine.build import start


def test_weights_turned_to_0_between_two_tokens_leave_the_base():
    engine = start(loadout_of({"type": "arrow", "top_k": 2}), dtype="float32")
    text = tiny.tokens(1, 8)[0].tolist()
    engine.key_values().logits(text, engine.blend)
    values = engine.key_values(keep=True)
    values.logits(text[:-2], engine.blend)
    values.logits(text[:-1], engine.blend)
    engine.set_weights(dict.fromkeys(NAMES, 0.0))
    one = torch.tensor([text[-1:]])
    with torch.inference_mode():
        at_rest = engine.model(input_ids=one).logits
        base = engine.detach()(input_ids=one).logits
    assert torch.equal(at_rest, base)
