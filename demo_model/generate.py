"""Answers of a model to many prompts at once."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen3ForCausalLM


def answers(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    temperature: float,
    generator: torch.Generator,
    most_tokens: int = 96,
) -> list[str]:
    """Answer each prompt as the first message of a chat.

    Args:
        model: base or blend.
        tokenizer: with its chat template.
        prompts: user messages.
        temperature: 0 takes the likeliest token.
        generator: source of the sampling.
        most_tokens: longest answer, in tokens.

    Returns:
        One answer per prompt.
    """
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    width = max(len(ids) for ids in asked)
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    # Padded on the left, so that all answers begin in the same column.
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in asked])  # (B, T)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked])  # (B, T)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    is_done = torch.zeros(len(prompts), dtype=torch.bool)
    drawn: list[Tensor] = []
    with torch.inference_mode():
        for _ in range(most_tokens):
            out = model(
                input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            token = _draw(out.logits[:, -1].float(), temperature, generator).masked_fill(is_done, pad)  # (B,)
            is_done |= token == end
            drawn.append(token)
            if bool(is_done.all()):
                break
            ids = token[:, None]
            seen = torch.cat([seen, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
    return [text.strip() for text in tokenizer.batch_decode(torch.stack(drawn, dim=1), skip_special_tokens=True)]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Choose a token per row of logits, (B, V); returns (B,), int64."""
    if temperature == 0:
        return logits.argmax(-1)
    chances = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]
