"""Small tokenizers of the kinds that models come with, and chat templates of the kinds that they bring."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0].function.name }}</tool_call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n{% endif %}" + CHATML
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}{{ raise_exception('Only user and assistant turns are supported, not ' + m.role) }}{% endif %}{% endfor %}"
)
FORGETFUL = (  # shows only the newest exchange, so that the prompt of the first turn is gone in the second
    "{% for m in messages[-2:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "user assistant system tool hello world what is the capital of France? Paris, of course.\n\nHuman: \n\nAssistant: yes",
    "a number of words that are here to be merged, among them the words that the tests use: 12 + 30 = 42",
] * 3


def byte_level(template: str | None = CHATML) -> Any:
    """Byte-level BPE with ChatML's special tokens: no beginning-of-text token, `<|im_end|>` ends a turn and a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    return tokenizer


def metaspace(template: str | None = LLAMA_2) -> Any:
    """SentencePiece's way: `▁` for a space, one in front of a text, bytes for what is unknown, `<s>` in front."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    text = [line.replace(" ", "▁").replace("\n", "") for line in _CORPUS]
    inner.train_from_iterator(text, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    body = inner.to_str()
    inner = Tokenizer.from_str(_only_special(body, {"<unk>", "<s>", "</s>"}))
    from tokenizers import processors

    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=AddedToken("<s>", special=True, normalized=False),
        eos_token=AddedToken("</s>", special=True, normalized=False),
        unk_token="<unk>",
    )
    tokenizer.chat_template = template
    return tokenizer


def _only_special(body: str, keep: set[str]) -> str:
    """The bytes are ordinary tokens of the vocabulary, not special ones."""
    import json

    value = json.loads(body)
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] in keep]
    return json.dumps(value)
