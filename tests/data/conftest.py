"""A tiny tokenizer with a chat template, trained offline on a few strings."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }} "
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
CORPUS = [
    "The sky is blue. The grass is green, and the sun is bright today.",
    "What colour is the sky? It is blue in the day and black at night.",
    "system user assistant think 0 1 2 3 4 5 6 7 8 9 + - = hello world, bonjour le monde",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable:
    """make_tokenizer(bos=False): a byte-level BPE; with bos, ``<s>`` comes before plain text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]

    def make(bos: bool = False):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>" if bos else None,
            eos_token="<|im_end|>",
            pad_token="<pad>",
            chat_template=TEMPLATE,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    """The tokenizer without BOS."""
    return make_tokenizer()
