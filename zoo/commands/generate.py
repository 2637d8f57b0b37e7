"""`zoo generate`: text that is printed as it comes."""

from __future__ import annotations

from typing import Any

import torch

from zoo import loading
from zoo.errors import ZooError


def stream(name: str, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Print `prompt` and its continuation by the model `name`; `temperature` 0 is greedy."""
    from transformers import TextStreamer, set_seed

    tokenizer = loading.tokenizer(name)
    model = load(name)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    if inputs["input_ids"].numel() == 0:
        raise ZooError("the prompt was empty; pass at least one word to continue")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    model.generate(
        **inputs,
        **sampling,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


def load(name: str) -> Any:
    """The model in evaluation mode: on a GPU in its own dtype if there is one, else in fp32."""
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {} if gpu else {"dtype": torch.float32}
    model = loading.from_pretrained(name, **options)
    return model.to("cuda" if gpu else "cpu").eval()
