"""Writes the model folder: weights, configs and the word-level tokenizer that Auto classes load."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsekv.evaluation.testbed import vocabulary as vocab

from .batches import WORD_IDS


def build_tokenizer(model_max_length: int) -> PreTrainedTokenizerFast:
    """Splits at whitespace, one token a word; adds no special tokens, so word index == token index."""
    words = Tokenizer(models.WordLevel(WORD_IDS, unk_token=vocab.UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=vocab.UNKNOWN,
        pad_token=vocab.PAD,
        eos_token=vocab.END,
        padding_side="left",  # what generate() needs of a batch
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Saves the model in bf16, which it is afterwards, with its tokenizer."""
    config = model.config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(config.max_position_embeddings).save_pretrained(folder)
